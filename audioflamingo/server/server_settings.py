"""Everything about a server that can be set. The command's flags take their names and defaults from here.

Imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from audioflamingo.engine.limits import EngineOptions
from audioflamingo.errors import ArgumentError

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class ServerSettings:
    """How a server behaves.

    Attributes:
        host: address to listen on; the default is reachable from this machine only.
        port: port to listen on; 0 takes a free one.
        api_key: what clients must send as `Authorization: Bearer ...`; None lets everybody in.
        served_model_name: what the model is called in requests; by default the name it was loaded by.
        max_running: client requests that the model works for at the same time; who they are is for the engine's
            scheduler to say, which goes on with those that have had least of the model.
        max_queue: client requests that may be inside besides: uploading, being prepared, or waiting for the model.
            More are answered with 429.
        max_upload_mb: largest request body, in 10^6 bytes.
        max_audio_seconds: longest audio of one request, counted after decoding.
        timeout_seconds: longest time from a request's arrival to the end of its answer.
        upload_timeout_seconds: longest pause in the middle of an upload; a whole upload may take ten times as long.
        shutdown_seconds: how long running answers may go on once the server is told to stop.
        cache_tokens: tokens whose keys and values are kept, for running answers and for reuse.
        max_rows: answers that the model works on at the same time.
        decode_threads: audio files that are decoded at the same time.
        fetch_hosts: hosts from which `audio_url` may be fetched over http(s); `*` allows every public one.
        cors_origins: web pages on other hosts that may use the server from a browser.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    max_running: int = EngineOptions.max_requests
    max_queue: int = 64
    max_upload_mb: float = 25.0
    max_audio_seconds: float = 14400.0
    timeout_seconds: float = 3600.0
    upload_timeout_seconds: float = 30.0
    shutdown_seconds: float = 30.0
    cache_tokens: int = EngineOptions.cache_tokens
    max_rows: int = EngineOptions.max_rows
    decode_threads: int = 2
    fetch_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_running", "cache_tokens", "max_rows", "decode_threads"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("max_upload_mb", "max_audio_seconds", "timeout_seconds", "upload_timeout_seconds"):
            self._require(getattr(self, name) > 0, name, "above 0")
        for name in ("max_queue", "shutdown_seconds", "port"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        self._require(
            self.api_key is None or bool(self.api_key.strip()), "api_key", "a key that is not empty"
        )

    def _require(self, is_allowed: bool, name: str, allowed: str) -> None:
        if not is_allowed:
            raise ArgumentError(f"{name} must be {allowed}, got {getattr(self, name)!r}.")

    @property
    def max_upload_bytes(self) -> int:
        """Largest request body."""
        return int(self.max_upload_mb * MEGABYTE)
