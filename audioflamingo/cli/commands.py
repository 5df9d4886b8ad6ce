"""The commands of `af3`, and what happens when one fails.

Exit codes: 0 all went well; 1 something failed, the rest was done; 2 the command was written wrongly; 130
Ctrl-C.
"""

from __future__ import annotations

import typer

from audioflamingo.cli.failures import FriendlyGroup


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from audioflamingo import __version__

        typer.echo(f"af3 {__version__}")
        raise typer.Exit


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


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
    ),
) -> None:
    pass


def _add_commands() -> None:
    from audioflamingo.cli.ask_command import ask
    from audioflamingo.cli.chat_command import chat
    from audioflamingo.cli.evaluate_command import evaluate
    from audioflamingo.cli.info_command import info
    from audioflamingo.cli.inspect_command import inspect
    from audioflamingo.cli.listen_command import listen
    from audioflamingo.cli.merge_command import merge
    from audioflamingo.cli.quantize_command import quantize
    from audioflamingo.cli.serve_command import serve
    from audioflamingo.cli.train_command import train
    from audioflamingo.cli.transcribe_command import transcribe

    for command in (transcribe, listen, ask, chat, serve, inspect, info, quantize, merge, train, evaluate):
        app.command()(command)


_add_commands()
