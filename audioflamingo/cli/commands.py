"""All commands of `af3`, for whoever looks at more than one of them: the tests and the documentation."""

from __future__ import annotations

from audioflamingo.cli.app import build_app

app = build_app()
