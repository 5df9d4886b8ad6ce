"""The reference of the HTTP interface, made of its OpenAPI document."""

from __future__ import annotations

import json
from typing import Any

Schema = dict[str, Any]


def http_page(document: Schema) -> str:
    """The page.

    Args:
        document: as `audioflamingo.server.openapi.openapi` gives it.
    """
    schemas: Schema = document["components"]["schemas"]
    lines = [
        "# HTTP",
        "",
        f"{document['info']['description']} The same as a file for tools: [openapi.json](../openapi.json); a running "
        "server has it at `/openapi.json`. With a key the server wants `Authorization: Bearer KEY` for all under "
        '`/v1` and for `/metrics`. Errors are `{"error": {"message", "type", "param", "code"}}`.',
        "",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines += _operation(path, method, operation)
    lines += ["## Objects", ""]
    for name, schema in schemas.items():
        lines += [f"### {name}", ""]
        if about := schema.get("description"):
            lines += [" ".join(about.split()), ""]
        lines += _fields(schema)
    return "\n".join(lines)


def _operation(path: str, method: str, operation: Schema) -> list[str]:
    lines = [f"## {method.upper()} {path}", "", operation["summary"], ""]
    for media, body in operation.get("requestBody", {}).get("content", {}).items():
        lines += [f"Body, `{media}`: {_kind(body['schema'])}", ""]
    lines += ["| Status | | Body |", "|---|---|---|"]
    for status, reply in operation["responses"].items():
        bodies = "; ".join(
            f"`{media}`: {_kind(c['schema'])}" for media, c in reply.get("content", {}).items()
        )
        lines.append(f"| {status} | {_cell(reply['description'])} | {bodies} |")
    return [*lines, ""]


def _fields(schema: Schema) -> list[str]:
    if "properties" not in schema:
        return [f"One of: {_kind(schema)}", ""] if "enum" in schema else []
    required = schema.get("required", ())
    lines = ["| Field | Type | |", "|---|---|---|"]
    for name, field in schema["properties"].items():
        default = field.get("default")
        notes = [_cell(field.get("description", ""))]
        notes += ["required"] if name in required else []
        notes += [f"default `{json.dumps(default)}`"] if default not in (None, [], {}) else []
        lines.append(f"| `{name}` | {_kind(field)} | {'; '.join(filter(None, notes))} |")
    return [*lines, ""]


def _kind(schema: Schema) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = [_kind(s) for s in schema[several] if s.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        kind = " or ".join(kind)
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if kind == "object" and "properties" in schema:
        return "object of " + ", ".join(f"`{name}`" for name in schema["properties"])
    return kind + _bounds(schema)


def _bounds(schema: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {schema[name]:g}" for name, sign in signs.items() if abs(schema.get(name, 1e19)) < 1e18
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
