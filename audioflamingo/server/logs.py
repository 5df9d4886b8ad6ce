"""Logs as one JSON object a line, each with the id of the request it belongs to."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("audioflamingo.server")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; its `fields` become keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            content["request_id"] = current
        content.update(getattr(record, "fields", {}))
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


def log(level: int, message: str, **fields: Any) -> None:
    """Writes a line with extra keys."""
    logger.log(level, message, extra={"fields": fields})


def set_up_logs(level: str) -> None:
    """Sends this package's and the HTTP server's logs, and warnings, to the error stream as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.captureWarnings(True)
    logging.getLogger("python_multipart").setLevel(
        logging.ERROR
    )  # it warns of every bad form; the client is told
    for name in ("audioflamingo.server", "uvicorn", "py.warnings"):
        target = logging.getLogger(name)
        target.handlers = [handler]
        target.setLevel(level.upper())
        target.propagate = False
