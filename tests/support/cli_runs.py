"""Runs `af3`: in this process with a scripted model, or as a process of its own with a tiny one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from audioflamingo.cli.commands import app
from tests.support.tiny_model import tiny_model
from tests.support.tiny_tokenizer import write_tiny_processor

ROOT = Path(__file__).parents[2]


def af3(*arguments: object, **options: Any) -> Result:
    """Runs the command in this process."""
    return CliRunner().invoke(
        app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"}, **options
    )


def af3_process(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Starts the command as a process, which Ctrl-C reaches: what runs in a shell's background ignores it, and so would
    its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
    }
    environment = {**os.environ, **settings}
    command = [sys.executable, "-m", "audioflamingo.cli", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, **{"cwd": ROOT, **pipes, **options})


def write_tiny_model(folder: Path) -> Path:
    """A folder with the tiny model and its processor."""
    write_tiny_processor(folder)
    model = tiny_model()
    model.generation_config.eos_token_id = [497]
    model.save_pretrained(folder)
    return folder
