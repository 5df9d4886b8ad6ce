"""The commands of `af3`, and what happens when one fails.

Exit codes: 0 all went well; 1 something failed, the rest was done; 2 the command was written wrongly; 130
Ctrl-C.
"""

from __future__ import annotations

import typer

from audioflamingo.cli.failures import FriendlyGroup
from audioflamingo.cli.help import APP_HELP, EPILOG
from audioflamingo.cli.options import show_version

app = typer.Typer(
    name="af3",
    cls=FriendlyGroup,
    help=APP_HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", is_eager=True, callback=show_version
    ),
) -> None:
    pass


def _add_commands() -> None:
    from audioflamingo.cli.ask import ask
    from audioflamingo.cli.chat import chat
    from audioflamingo.cli.info import info
    from audioflamingo.cli.inspect import inspect
    from audioflamingo.cli.quantize import quantize
    from audioflamingo.cli.serve import serve
    from audioflamingo.cli.train import evaluate, train
    from audioflamingo.cli.transcribe import transcribe

    for command in (transcribe, ask, chat, serve, inspect, info, quantize, train, evaluate):
        app.command()(command)


_add_commands()
