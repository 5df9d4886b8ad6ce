"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with a true status code."""

from __future__ import annotations

from typing import Any

from audioflamingo.errors import (
    ArgumentError,
    AudioError,
    AudioTooLongError,
    ContextLengthError,
    EngineStoppedError,
    FetchError,
    MissingDependencyError,
    PromptError,
)

RETRY_AFTER_S = 1


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status code.
        message: one sentence that says what to do.
        code: short name of the case, for programs.
        param: the field of the request that is wrong.
        headers: of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the reply."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGoneError(Exception):
    """The client hung up; there is nobody to answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that can never succeed as it is."""
    return ApiError(400, message, code, param)


def busy(num_waiting: int) -> ApiError:
    """Too many requests at a time."""
    message = f"{num_waiting} requests are waiting already; send this one again in a moment."
    return ApiError(429, message, "server_busy", headers={"Retry-After": str(RETRY_AFTER_S)})


def shutting_down() -> ApiError:
    """The server is about to end."""
    message = "the server is shutting down; send the request again."
    return ApiError(503, message, "shutting_down", headers={"Retry-After": str(RETRY_AFTER_S)})


def timed_out(seconds: float) -> ApiError:
    """The answer took too long."""
    return ApiError(504, f"there was no complete answer within {seconds:g} s; ask for less.", "timeout")


def as_api_error(error: BaseException) -> ApiError | None:
    """What the client is told about an error; None for a fault of the server's own."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineStoppedError):
        return shutting_down()
    if isinstance(error, ContextLengthError):
        return bad_request(str(error), "messages", "context_length_exceeded")
    if isinstance(error, FetchError):
        return bad_request(f"audio_url: {error}", "audio_url", "url_not_allowed")
    if isinstance(error, AudioTooLongError):
        return bad_request(str(error), code="audio_too_long")
    if isinstance(error, AudioError):
        return bad_request(str(error), code="invalid_audio")
    if isinstance(error, MissingDependencyError):
        return ApiError(501, f"this server cannot do that: {error}", "not_implemented")
    if isinstance(error, PromptError | ArgumentError):
        return bad_request(str(error))
    return None


def internal_error(request_id: str) -> ApiError:
    """A fault of the server's own: the client gets a number to find it in the log, and no details."""
    return ApiError(500, f"the server failed; its log has the details under {request_id}.", "internal_error")
