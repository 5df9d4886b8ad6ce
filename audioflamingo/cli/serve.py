"""`af3 serve`: the HTTP server."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from audioflamingo.cli.options import (
    DEFAULT_MODEL,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    QuantizationOption,
)
from audioflamingo.engine.memory import share_one_heap
from audioflamingo.errors import ArgumentError, MissingDependencyError
from audioflamingo.server.server_settings import ServerSettings

_LIMITS = "Limits"
_ACCESS = "Access"


class LogLevel(StrEnum):
    """The least of what is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def serve(
    model: ModelOption = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.", rich_help_panel=_ACCESS)
    ] = ServerSettings.host,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=_ACCESS)
    ] = ServerSettings.port,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="AF3_API_KEY", help="What clients must send as Bearer token.", rich_help_panel=_ACCESS
        ),
    ] = ServerSettings.api_key,
    served_model_name: Annotated[
        str | None, typer.Option(help="What the model is called in requests.", rich_help_panel="Model")
    ] = ServerSettings.served_model_name,
    max_running: Annotated[
        int, typer.Option(min=1, help="Requests at work.", rich_help_panel=_LIMITS)
    ] = ServerSettings.max_running,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; more get a 429.", rich_help_panel=_LIMITS)
    ] = ServerSettings.max_queue,
    max_upload_mb: Annotated[
        float, typer.Option(help="Largest request.", rich_help_panel=_LIMITS)
    ] = ServerSettings.max_upload_mb,
    max_audio_seconds: Annotated[
        float, typer.Option(help="Longest audio of a request, decoded.", rich_help_panel=_LIMITS)
    ] = ServerSettings.max_audio_seconds,
    timeout_seconds: Annotated[
        float, typer.Option(help="Longest time for an answer.", rich_help_panel=_LIMITS)
    ] = ServerSettings.timeout_seconds,
    upload_timeout_seconds: Annotated[
        float, typer.Option(help="Longest pause in an upload.", rich_help_panel=_LIMITS)
    ] = ServerSettings.upload_timeout_seconds,
    shutdown_seconds: Annotated[
        float, typer.Option(help="How long running answers may go on at the end.", rich_help_panel=_LIMITS)
    ] = ServerSettings.shutdown_seconds,
    cache_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens whose keys and values are kept; the memory is taken at once.",
            rich_help_panel=_LIMITS,
        ),
    ] = ServerSettings.cache_tokens,
    max_rows: Annotated[
        int, typer.Option(min=1, help="Answers that the model gives at once.", rich_help_panel=_LIMITS)
    ] = ServerSettings.max_rows,
    decode_threads: Annotated[
        int, typer.Option(min=1, help="Audio files decoded at once.", rich_help_panel=_LIMITS)
    ] = ServerSettings.decode_threads,
    fetch_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--fetch-host",
            help="Host from which audio_url may be fetched; may be repeated; '*' is every public one.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Web page that may use the server; may be repeated.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    quantization: QuantizationOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    log_level: Annotated[
        LogLevel, typer.Option(help="The least of what is logged.", rich_help_panel="Output")
    ] = LogLevel.INFO,
    debug: DebugOption = False,
) -> None:
    """Serve a model over HTTP, for clients of OpenAI's interface.

    \b
    Examples:
      af3 serve
      af3 serve --model nvidia/audio-flamingo-3-hf --quantization int4 --port 9000
      af3 serve --host 0.0.0.0 --api-key "$KEY"
    """
    try:
        settings = ServerSettings(
            host=host,
            port=port,
            api_key=api_key,
            served_model_name=served_model_name,
            max_running=max_running,
            max_queue=max_queue,
            max_upload_mb=max_upload_mb,
            max_audio_seconds=max_audio_seconds,
            timeout_seconds=timeout_seconds,
            upload_timeout_seconds=upload_timeout_seconds,
            shutdown_seconds=shutdown_seconds,
            cache_tokens=cache_tokens,
            max_rows=max_rows,
            decode_threads=decode_threads,
            fetch_hosts=tuple(fetch_hosts or ()),
            cors_origins=tuple(cors_origins or ()),
        )
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None
    share_one_heap()  # before the first thread: the C library looks at the number once
    try:
        from audioflamingo.server.run import serve as run_server
        from audioflamingo.server.run import served_name
    except ImportError as error:
        raise MissingDependencyError(
            f"the server needs more packages ({error.name}): pip install 'audioflamingo[server]'"
        ) from error
    from audioflamingo.cli.loading import load

    loaded, processor = load(model, device, dtype, quantization=quantization)
    run_server(loaded, processor, served_name(model), settings, log_level.value)
