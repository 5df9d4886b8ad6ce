"""The reference of the command line, made of the commands themselves."""

from __future__ import annotations

import re
from enum import EnumType
from pathlib import Path
from typing import Any, get_args

import typer

from audioflamingo.cli.commands import app


def command_page() -> str:
    """The page."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        str(group.help),
        "",
        "Exit codes: 0 all went well; 1 something failed, the rest was done; 2 the command was written wrongly; "
        "130 Ctrl-C.",
        "",
    ]
    for name, command in group.commands.items():
        lines += _command(name, command)
    return "\n".join(lines)


def _command(name: str, command: Any) -> list[str]:
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["af3", name, *("[OPTIONS]" if options else "",), *map(_usage, arguments)])
    lines = [f"## af3 {name}", "", "```text", usage, "```", "", _prose(command.help), ""]
    if arguments:
        lines += [
            "| Argument | |",
            "|---|---|",
            *(f"| `{_usage(a)}` | {_cell(a.help)} |" for a in arguments),
            "",
        ]
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for panel, members in panels.items():
        lines += [f"| {panel} | Default | |", "|---|---|---|", *map(_option, members), ""]
    return lines


def _usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    name = name.strip("[].") + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _option(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    kind = "" if option.is_flag else f" {_cell(option.metavar or _kind(option.type_descriptor.annotation))}"
    default = getattr(option.default, "value", option.default)  # of an enumeration, what is typed
    shown = f"`{default}`" if isinstance(default, str | int | float) and default is not False else ""
    variable = f" Also `{option.envvar}`." if option.envvar else ""
    return f"| {names}{kind} | {shown} | {_cell(option.help)}{_bounds(option)}{variable} |"


def _kind(annotation: Any) -> str:
    members: Any = annotation  # an enumeration's, or a literal's
    choices = [m.value for m in members] if isinstance(annotation, EnumType) else get_args(annotation)
    words = {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}
    if annotation in words:
        return words[annotation]
    return " | ".join(map(str, choices)) if all(isinstance(c, str) for c in choices) else "TEXT"


def _bounds(option: Any) -> str:
    low, high = getattr(option, "min", None), getattr(option, "max", None)
    if low is None:
        return "" if high is None else f" At most {high:g}."
    return f" At least {low:g}." if high is None else f" From {low:g} to {high:g}."


def _prose(text: str | None) -> str:
    """A command's help as Markdown: paragraphs marked with a backspace keep their lines."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text or ""):
        if paragraph.lstrip().startswith("\b"):
            body = "\n".join(
                line.strip() for line in paragraph.replace("\b", "").splitlines() if line.strip()
            )
            paragraphs.append(f"```text\n{body}\n```")
        else:
            paragraphs.append(" ".join(paragraph.split()))
    return _plain("\n\n".join(paragraphs))


def _cell(text: str | None) -> str:
    return _plain(" ".join((text or "").split())).replace("|", "\\|").replace("<", "&lt;")


def _plain(text: str) -> str:
    """Without the marks of rich."""
    return re.sub(r"\[/?(?:bold|dim|cyan|green|yellow|red|italic)\]", "", text)
