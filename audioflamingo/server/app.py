"""The routes, put together."""

from __future__ import annotations

import asyncio
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
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from audioflamingo.server.chat_route import ChatRoute
from audioflamingo.server.error_replies import ApiError
from audioflamingo.server.middleware import KeyMiddleware, RequestMiddleware
from audioflamingo.server.replies import JsonResponse
from audioflamingo.server.service import Service
from audioflamingo.server.transcription_route import TranscriptionRoute

PAGE = Path(__file__).parent / "page"


def create_app(service: Service) -> Starlette:
    """The server as an ASGI application, which starts and stops the engine with itself.

    Args:
        service: the model and its limits.
    """

    async def health(_: Request) -> Response:
        state = "ok" if service.is_healthy else "unavailable"
        return JsonResponse({"status": state}, 200 if service.is_healthy else 503)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    async def models(_: Request) -> Response:
        return JsonResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JsonResponse(_model(service))

    interface = [
        Route("/models", models),
        Route("/models/{name:path}", model),
        Route("/chat/completions", ChatRoute(service), methods=["POST"]),
        Route("/audio/transcriptions", TranscriptionRoute(service), methods=["POST"]),
    ]
    # A mount of its own, so that a wrong method there is not taken for a file of the page.
    routes: list[BaseRoute] = [
        Route("/health", health),
        Route("/metrics", metrics),
        Mount("/v1", routes=interface),
    ]
    if (PAGE / "index.html").exists():
        routes.append(Mount("/", StaticFiles(directory=PAGE, html=True)))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(service.worker.start)
        try:
            yield
        finally:
            await service.shut_down()

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
    return Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own errors (no such path, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    api_error = ApiError(
        error.status_code, f"{error.detail.lower()}.", "not_found" if error.status_code == 404 else None
    )
    return JsonResponse(api_error.body, error.status_code, error.headers)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "audioflamingo",
        "max_model_len": service.worker.engine.room(0),
    }
