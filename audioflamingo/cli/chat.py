"""`af3 chat`: a conversation at the terminal."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from audioflamingo.cli.options import (
    DEFAULT_MODEL,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    MaxNewTokensOption,
    ModelOption,
    OnLongOption,
    QuantizationOption,
    QuietOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    VerboseOption,
    answer_options,
)

COMMANDS = """\
/add FILE    add a clip to your next question
/save FILE   write the conversation to a file (JSON)
/help        show this
/quit        leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(
    ctx: typer.Context,
    audio: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[AUDIO]...", help="Clips that the first question is about.", show_default=False
        ),
    ] = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    on_long: OnLongOption = "truncate",
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    quantization: QuantizationOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Talk with the model about audio. It remembers the conversation and all clips.

    \b
    Examples:
      af3 chat interview.wav
      af3 chat first.ogg second.ogg --system "Answer in one sentence."

    In the conversation: /add FILE, /save FILE, /help, /quit.
    """
    from audioflamingo.cli.loading import load
    from audioflamingo.cli.terminal import Terminal
    from audioflamingo.engine.chat import Chat

    loaded, processor = load(model, device, dtype, verbose, quantization)
    conversation = Chat(loaded, processor, system=system, on_long=on_long)
    for name in audio or []:
        _add(conversation, name)
    if not quiet and sys.stdin.isatty():
        Terminal.say("Ask something. /help shows the commands.")
    options = answer_options(max_new_tokens, temperature, seed)
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if not _run_command(ctx, conversation, line):
                return
            continue
        _answer(ctx, conversation, line, options)


def _read_line() -> str | None:
    """The next line, None at the end of the input."""
    try:
        return input("> ") if sys.stdin.isatty() else input()
    except EOFError:
        return None


def _answer(ctx: typer.Context, conversation: Any, question: str, options: dict[str, Any]) -> None:
    from audioflamingo.cli.ask import print_answer
    from audioflamingo.cli.failures import is_expected, report
    from audioflamingo.cli.terminal import Terminal

    try:
        print_answer(conversation.ask(question, **options))
    except KeyboardInterrupt:
        Terminal.say("(stopped)")
    except Exception as error:
        if not is_expected(error):
            raise
        report(ctx, error)  # the conversation is as it was before the question


def _run_command(ctx: typer.Context, conversation: Any, line: str) -> bool:
    """Obeys a line that starts with a slash. Returns whether the conversation goes on."""
    from audioflamingo.cli.failures import is_expected, report
    from audioflamingo.cli.terminal import Terminal

    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command in ("/quit", "/exit"):
        return False
    try:
        if command == "/add" and rest:
            _add(conversation, _unquote(rest))
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


def _add(conversation: Any, name: str) -> None:
    from audioflamingo.cli.terminal import Terminal

    duration_s = conversation.add_audio(name)
    Terminal.say(f"clip {conversation.num_clips}: {name} ({duration_s:.1f} s)")


def _save(conversation: Any, path: Path) -> None:
    from audioflamingo.cli.terminal import Terminal
    from audioflamingo.errors import OutputError
    from audioflamingo.files import write_whole

    if path.exists():
        raise OutputError(f"{str(path)!r} exists; choose another name.")
    text = json.dumps(conversation.transcript(), ensure_ascii=False, indent=2) + "\n"
    write_whole(path, text.encode())
    Terminal.say(f"saved to {path}")
