"""The routes, put together."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from audioflamingo.server.chat_route import ChatRoute
from audioflamingo.server.error_replies import ApiError
from audioflamingo.server.middleware import PATHS, KeyMiddleware, RequestMiddleware
from audioflamingo.server.openapi import openapi
from audioflamingo.server.realtime_route import RealtimeRoute
from audioflamingo.server.replies import JsonResponse
from audioflamingo.server.responses_route import ResponsesRoute
from audioflamingo.server.service import Service
from audioflamingo.server.transcription_route import TranscriptionRoute, TranslationRoute

PAGE = Path(__file__).parent / "page"


def create_app(service: Service) -> Starlette:
    """The server as an ASGI application, which starts and stops the engine with itself.

    Args:
        service: the model and its limits.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(service.worker.start)
        try:
            yield
        finally:
            await service.shut_down()

    return Starlette(
        routes=_routes(service),
        middleware=_middleware(service),
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )


def _routes(service: Service) -> list[BaseRoute]:
    pages = StatusPages(service)
    interface = [
        Route("/models", pages.models),
        Route("/models/{name:path}", pages.model),
        Route("/chat/completions", ChatRoute(service), methods=["POST"]),
        Route("/responses", ResponsesRoute(service), methods=["POST"]),
        WebSocketRoute("/realtime", RealtimeRoute(service)),
        Route("/realtime", pages.realtime),
        Route("/audio/transcriptions", TranscriptionRoute(service), methods=["POST"]),
        Route("/audio/translations", TranslationRoute(service), methods=["POST"]),
    ]
    # A mount of its own, so that a wrong method there is not taken for a file of the page.
    routes: list[BaseRoute] = [
        Route("/health", pages.health),
        Route("/metrics", pages.metrics),
        Route("/openapi.json", pages.openapi),
        Mount("/v1", routes=interface),
    ]
    if (PAGE / "index.html").exists():
        routes.append(Mount("/", StaticFiles(directory=PAGE, html=True)))
    return routes


def _middleware(service: Service) -> list[Middleware]:
    """From the outside in."""
    middleware = [Middleware(RequestMiddleware, metrics=service.metrics)]
    if service.settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(service.settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        )
    middleware.append(Middleware(KeyMiddleware, api_key=service.settings.api_key))
    return middleware


class StatusPages:
    """What tells about the server itself.

    Args:
        service: what is told about.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, _: Request) -> Response:
        """`/health`: whether requests have a chance."""
        is_healthy = self._service.is_healthy
        return JsonResponse({"status": "ok" if is_healthy else "unavailable"}, 200 if is_healthy else 503)

    async def metrics(self, _: Request) -> Response:
        """`/metrics`, as Prometheus reads it."""
        return Response(self._service.metrics.render(), media_type="text/plain; version=0.0.4")

    async def openapi(self, _: Request) -> Response:
        """`/openapi.json`: the interface, for tools."""
        return JsonResponse(openapi())

    async def realtime(self, _: Request) -> Response:
        """`/v1/realtime`, asked for as a page."""
        message = "this address is a websocket; connect with ws:// or wss://."
        headers = {"Upgrade": "websocket", "Connection": "Upgrade, close"}
        raise ApiError(426, message, "upgrade_required", headers=headers)

    async def models(self, _: Request) -> Response:
        """`/v1/models`: the model, and its adapters as models of their own."""
        return JsonResponse({"object": "list", "data": list(map(self._model, self._service.model_names))})

    async def model(self, request: Request) -> Response:
        """`/v1/models/...`."""
        self._service.check_model(request.path_params["name"])
        return JsonResponse(self._model(request.path_params["name"]))

    def _model(self, name: str) -> dict[str, Any]:
        is_adapter = self._service.adapter_of(name) is not None
        return {
            **({"parent": self._service.model_name} if is_adapter else {}),
            "id": name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "audioflamingo",
            "max_model_len": self._service.worker.engine.room(0, self._service.generation_config.num_beams),
        }


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors (no such path, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    path, status, headers = request.url.path, error.status_code, error.headers
    is_known = path == "/" or path in PATHS or path.startswith("/v1/models/")
    if status == 405 and not is_known:  # the files of the page take every path, and no POST
        status, headers = 404, None
    if status == 404:
        api_error = ApiError(status, f"there is no {path[:100]!r} here{_did_you_mean(path)}", "not_found")
    else:
        api_error = ApiError(status, f"{error.detail.lower()}.")
    return JsonResponse(api_error.body, status, headers)


def _did_you_mean(path: str) -> str:
    """The known path that a wrong one is part of, holds, or is like."""
    path = "/" + path[:200].strip("/")
    inside = [known for known in PATHS if path != "/" and (known.endswith(path) or path.endswith(known))]
    close = inside or difflib.get_close_matches(path, PATHS, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else "."
