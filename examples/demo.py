"""What `make demo` runs: real recordings, shown as the model sees them, transcribed and asked about.

The model is the one that comes with the package. With AF3_MODEL set to a hub id or a checkpoint folder the answers are
that model's.
"""

from __future__ import annotations

import os
from pathlib import Path

from audioflamingo.cli.commands import app

ROOT = Path(__file__).parents[1]
PROMPT = "tests/data/directory_prompt.flac"  # a woman reads a telephone prompt
MONKEYS = "tests/data/monkeys.ogg"
PICTURE = ".demo/directory_prompt.png"

COMMANDS = (
    ("transcribe", PROMPT, "--quiet"),
    ("ask", MONKEYS, "What is the sound in this audio?"),
    ("ask", PROMPT, "Is someone speaking?"),
    ("inspect", PROMPT, "--png", PICTURE, "--overwrite"),
)


def main() -> None:
    """Runs the commands, each shown as a user would type it."""
    os.chdir(ROOT)
    Path(PICTURE).parent.mkdir(exist_ok=True)
    for arguments in COMMANDS:
        print("$ af3", *(f'"{a}"' if " " in a else a for a in arguments), flush=True)
        app(arguments, prog_name="af3", standalone_mode=False)
        print(flush=True)


if __name__ == "__main__":
    main()
