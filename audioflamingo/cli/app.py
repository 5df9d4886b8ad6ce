"""The command `af3`, made of the command that is asked for alone, or of all.

Exit codes: 0 all went well; 1 something failed, the rest was done; 2 the command was written wrongly; 130
Ctrl-C.
"""

from __future__ import annotations

from importlib import import_module

import typer

from audioflamingo.cli.failures import FriendlyGroup

# In the order of `af3 --help`. Each is the function of its name in the module `<name>_command`.
COMMANDS = (
    "transcribe",
    "listen",
    "ask",
    "chat",
    "serve",
    "inspect",
    "info",
    "quantize",
    "merge",
    "train",
    "evaluate",
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from audioflamingo import __version__

        typer.echo(f"af3 {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
    ),
) -> None:
    pass


def build_app(asked: str | None = None) -> typer.Typer:
    """The command line.

    Args:
        asked: its first argument. The name of a command gives that command alone, which spares what the others
            import; anything else gives all.
    """
    app = typer.Typer(
        name="af3",
        cls=FriendlyGroup,
        help="Audio Flamingo 3: transcribe, describe and discuss audio.",
        epilog="Examples:  af3 transcribe talk.mp3  ·  af3 transcribe recordings/ --format srt --output-dir subtitles"
        '  ·  af3 ask bird.wav "What is this?"',
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in (asked,) if asked in COMMANDS else COMMANDS:
        app.command()(getattr(import_module(f"audioflamingo.cli.{name}_command"), name))
    return app
