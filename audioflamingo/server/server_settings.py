"""Everything about a server that can be set. The command's flags are made of the same fields.

Imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from audioflamingo.engine.limits import EngineOptions
from audioflamingo.fields import check_fields, check_value, option, same_option

MEGABYTE = 1_000_000
_ACCESS = "Access"
_LIMITS = "Limits"


@dataclass(frozen=True)
class ServerSettings:
    """How a server behaves."""

    host: str = option(
        "127.0.0.1",
        "Address to listen on; the default is reachable from this machine only, 0.0.0.0 is every one.",
        group=_ACCESS,
    )
    port: int = option(8000, "0 takes a free one.", at_least=0, at_most=65535, group=_ACCESS)
    api_key: str | None = option(
        None, "What clients must send as Bearer token.", group=_ACCESS, envvar="AF3_API_KEY"
    )
    served_model_name: str | None = option(
        None, "What the model is called in requests; by default the name it was loaded by.", group="Model"
    )
    adapters: tuple[str, ...] = option(
        (),
        "An adapter of the model and what requests call it, served beside the model. May be repeated.",
        metavar="NAME=FOLDER",
        group="Model",
    )
    max_running: int = same_option(EngineOptions, "max_requests")
    max_queue: int = option(
        64,
        "Requests that may be inside besides: uploading, being prepared, or waiting for the model. More get a 429.",
        at_least=0,
        group=_LIMITS,
    )
    max_upload_mb: float = option(25.0, "Largest request, in 10^6 bytes.", above=0, group=_LIMITS)
    max_audio_seconds: float = option(14400.0, "Longest audio of a request, decoded.", above=0, group=_LIMITS)
    timeout_seconds: float = option(
        3600.0, "Longest time from a request's arrival to the end of its answer.", above=0, group=_LIMITS
    )
    upload_timeout_seconds: float = option(
        30.0,
        "Longest pause in an upload; a whole one may take ten times as long.",
        above=0,
        group=_LIMITS,
    )
    shutdown_seconds: float = option(
        30.0,
        "How long running answers may go on once the server is told to stop.",
        at_least=0.0,
        group=_LIMITS,
    )
    live_buffer_seconds: float = option(
        300.0,
        "Audio of a live session that may wait to be heard or committed; more is refused with an error event.",
        at_least=30.0,
        group=_LIMITS,
    )
    cache_tokens: int = same_option(EngineOptions, "cache_tokens")
    max_rows: int = same_option(EngineOptions, "max_rows")
    decode_threads: int = option(2, "Audio files decoded at once.", at_least=1, group=_LIMITS)
    fetch_hosts: tuple[str, ...] = option(
        (),
        "Host from which audio_url may be fetched over http(s); '*' is every public one. May be repeated.",
        group=_ACCESS,
    )
    cors_origins: tuple[str, ...] = option(
        (),
        "Web page on another host that may use the server from a browser. May be repeated.",
        group=_ACCESS,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        is_allowed = self.api_key is None or bool(self.api_key.strip())
        check_value(is_allowed, "api_key", self.api_key, "a key that is not empty")

        for item in self.adapters:
            name, _, folder = item.partition("=")
            check_value(bool(name and folder), "adapters", item, "NAME=FOLDER")
        names = list(self.adapter_folders)
        check_value(len(names) == len(self.adapters), "adapters", self.adapters, "names that differ")

    @property
    def adapter_folders(self) -> dict[str, str]:
        """Folders of the adapters by name."""
        return dict((name, folder) for name, _, folder in (item.partition("=") for item in self.adapters))

    @property
    def max_upload_bytes(self) -> int:
        """Largest request body."""
        return int(self.max_upload_mb * MEGABYTE)
