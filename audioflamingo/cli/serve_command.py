"""`af3 serve`: the HTTP server."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from audioflamingo.cli.flags import with_flags
from audioflamingo.cli.model_loading import ModelOptions, load
from audioflamingo.engine.memory import share_one_heap
from audioflamingo.errors import require
from audioflamingo.server.server_settings import ServerSettings


class LogLevel(StrEnum):
    """The least of what is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@with_flags
def serve(
    *,
    model: ModelOptions,
    settings: ServerSettings,
    log_level: Annotated[
        LogLevel, typer.Option(help="The least of what is logged.", rich_help_panel="Output")
    ] = LogLevel.INFO,
) -> None:
    """Serve a model over HTTP, for clients of OpenAI's interface.

    \b
    Examples:
      af3 serve
      af3 serve --model nvidia/audio-flamingo-3-hf --quantization int4 --port 9000
      af3 serve --host 0.0.0.0 --api-key "$KEY"
    """
    share_one_heap()  # before the first thread: the C library looks at the number once
    server = require("audioflamingo.server.run_server", "server")
    server.serve(*load(model), server.served_name(model.model), settings, log_level.value)
