"""`af3 chat`: a conversation at the terminal."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audioflamingo.audio.reading import Reading
from audioflamingo.cli.ask_command import AnswerOptions, print_answer
from audioflamingo.cli.failures import is_expected, report
from audioflamingo.cli.flags import ScreenOptions, with_flags
from audioflamingo.cli.model_loading import AdaptedModelOptions
from audioflamingo.cli.terminal import Terminal
from audioflamingo.errors import OutputError
from audioflamingo.files import write_whole

if TYPE_CHECKING:
    from audioflamingo.engine.chat import Chat

COMMANDS = """\
/add FILE    add a clip to your next question
/save FILE   write the conversation to a file (JSON)
/help        show this
/quit        leave (so does Ctrl-D); Ctrl-C stops an answer"""


@with_flags
def chat(
    ctx: typer.Context,
    audio: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[AUDIO]...", help="Clips that the first question is about.", show_default=False
        ),
    ] = None,
    *,
    answer: AnswerOptions,
    reading: Reading,
    model: AdaptedModelOptions,
    screen: ScreenOptions,
) -> None:
    """Talk with the model about audio. It remembers the conversation and all clips.

    \b
    Examples:
      af3 chat interview.wav
      af3 chat first.ogg second.ogg --system "Answer in one sentence."

    In the conversation: /add FILE, /save FILE, /help, /quit.
    """
    conversation = answer.chat(model, screen)
    for name in audio or []:
        _add(conversation, name, reading)
    if not screen.quiet and sys.stdin.isatty():
        Terminal.say("Ask something. /help shows the commands.")
    options = answer.generate_options()
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if not _run_command(ctx, conversation, line, reading):
                return
            continue
        _answer(ctx, conversation, line, options, answer.show_thoughts)


def _read_line() -> str | None:
    """The next line, None at the end of the input."""
    try:
        return input("> ") if sys.stdin.isatty() else input()
    except EOFError:
        return None


def _answer(
    ctx: typer.Context, conversation: Chat, question: str, options: dict[str, Any], shows_thoughts: bool
) -> None:
    try:
        print_answer(conversation.ask(question, **options), shows_thoughts)
    except KeyboardInterrupt:
        Terminal.say("(stopped)")
    except Exception as error:
        if not is_expected(error):
            raise
        report(ctx, error)  # the conversation is as it was before the question


def _run_command(ctx: typer.Context, conversation: Chat, line: str, reading: Reading) -> bool:
    """Obeys a line that starts with a slash. Returns whether the conversation goes on."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command in ("/quit", "/exit"):
        return False
    try:
        if command == "/add" and rest:
            _add(conversation, _unquote(rest), reading)
        elif command == "/save" and rest:
            _save(conversation, Path(_unquote(rest)).expanduser())
        elif command == "/help":
            Terminal.say(COMMANDS)
        elif command in ("/add", "/save"):
            Terminal.say(f"{command} needs the name of a file.")
        else:
            Terminal.say(f"there is no command {command}. /help shows those there are.")
    except Exception as error:
        if not is_expected(error):
            raise
        report(ctx, error)
    return True


def _unquote(text: str) -> str:
    """A file name as a shell would take it, or as it stands."""
    try:
        parts = shlex.split(text)
    except ValueError:
        return text
    return parts[0] if len(parts) == 1 else text


def _add(conversation: Chat, name: str, reading: Reading) -> None:
    duration_s = conversation.add_audio(name, reading)
    Terminal.say(f"clip {conversation.num_clips}: {name} ({duration_s:.1f} s)")


def _save(conversation: Chat, path: Path) -> None:
    if path.exists():
        raise OutputError(f"{str(path)!r} exists; choose another name.")
    text = json.dumps(conversation.transcript(), ensure_ascii=False, indent=2) + "\n"
    write_whole(path, text.encode())
    Terminal.say(f"saved to {path}")
