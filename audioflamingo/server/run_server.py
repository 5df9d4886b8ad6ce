"""Runs the server: binds, serves, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from audioflamingo.engine.engine import Engine
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.worker import EngineWorker
from audioflamingo.errors import ArgumentError
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.server.asgi_app import create_app
from audioflamingo.server.middleware import log, set_up_logs
from audioflamingo.server.realtime_session import MAX_APPEND_BYTES
from audioflamingo.server.server_settings import ServerSettings
from audioflamingo.server.service import Service

MAX_EVENT_BYTES = 2 * MAX_APPEND_BYTES  # of a live session; larger ones end it without being read
GRACE_S = 5  # for replies to leave once the engine has ended
# The model's thread and the event loop take turns in Python; with the usual 5 ms every token would wait for its reply.
SWITCH_INTERVAL_S = 0.0005


def build_service(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    model_name: str,
    settings: ServerSettings,
) -> Service:
    """Puts a loaded model behind the settings."""
    options = EngineOptions(
        max_rows=settings.max_rows, max_requests=settings.max_running, cache_tokens=settings.cache_tokens
    )
    name = settings.served_model_name or model_name
    for adapter, folder in settings.adapter_folders.items():
        if adapter == name:
            raise ArgumentError(
                f"--adapter {adapter}={folder}: the model itself is called so; choose another name."
            )
        model.load_adapter(folder, adapter)
    worker = EngineWorker(Engine(model, processor.tokenizer, options))
    return Service(worker, processor, model.generation_config, name, settings)


def served_name(model: str) -> str:
    """What a model is called in requests: a folder by its last part, anything else as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def serve(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    model_name: str,
    settings: ServerSettings,
    log_level: str,
) -> None:
    """Serves until it is told to stop (SIGINT, SIGTERM).

    Args:
        model: what answers; belongs to the server from now on.
        processor: its processor.
        model_name: what requests call it, unless the settings say otherwise.
        settings: limits and the address.
        log_level: `"debug"`, `"info"`, `"warning"` or `"error"`.
    """
    set_up_logs(log_level)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if settings.api_key is None and not is_loopback(settings.host):
        log(
            logging.WARNING,
            f"listening on {settings.host} without a key: whoever reaches this machine can use the model. "
            "Set --api-key, or listen on 127.0.0.1.",
        )
    service = build_service(model, processor, model_name, settings)
    Server(service).run()


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """Begins to turn requests away the moment it is told to stop, so that those in the queue get an answer."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        config = uvicorn.Config(
            create_app(service),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.shutdown_seconds) + GRACE_S,
            ws_max_size=MAX_EVENT_BYTES,
        )
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Starts to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            log(
                logging.INFO,
                "listening",
                address=f"http://{self.config.host}:{port}",
                model=self._service.model_name,
            )

    async def shutdown(self, sockets: Any = None) -> None:
        """Lets live sessions hear to their end what has been said: uvicorn would cut them off at once."""
        if not self.force_exit:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._service.settings.shutdown_seconds):
                    await self._service.gate.wait_for_sessions()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal."""
        super().handle_exit(sig, frame)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._ending is None:
            log(logging.INFO, "shutting down")
            self._ending = asyncio.get_running_loop().create_task(self._service.shut_down())
