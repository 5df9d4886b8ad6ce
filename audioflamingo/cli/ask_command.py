"""`af3 ask`: one question about one or several clips."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audioflamingo.audio.reading import Reading
from audioflamingo.cli.flags import ScreenOptions, with_flags
from audioflamingo.cli.inputs import AUDIO_SUFFIXES, STDIN
from audioflamingo.cli.model_loading import (
    AdaptedModelOptions,
    find_think_adapter,
    load_with_adapter,
)
from audioflamingo.cli.terminal import Terminal
from audioflamingo.errors import ArgumentError, reason_of
from audioflamingo.fields import option
from audioflamingo.tasks import GENERATION_PRESETS, TASKS, THINK_SUFFIX

if TYPE_CHECKING:
    from audioflamingo.engine.chat import Chat
    from audioflamingo.processor.stretches import Stretch

_ANSWER = "Answer"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

TaskName = StrEnum("TaskName", {name.upper().replace("-", "_"): name for name in TASKS})  # type: ignore[misc]
Preset = StrEnum(  # type: ignore[misc]
    "Preset", {name.upper().replace("-", "_"): name for name in GENERATION_PRESETS}
)


class OnLong(StrEnum):
    """What to do with a clip that is too long."""

    TRUNCATE = "truncate"
    ERROR = "error"
    WINDOWS = "windows"


@dataclass(frozen=True)
class AnswerOptions:
    """How questions are answered; what is left open is the checkpoint's."""

    system: str | None = option(None, "System message.", group=_ANSWER)
    max_new_tokens: int | None = option(
        None, "Longest answer; by default the checkpoint's.", at_least=1, group=_ANSWER
    )
    temperature: float | None = option(
        None, "Draw answers at random; 0 or nothing: the most likely one.", at_least=0.0, group=_ANSWER
    )
    seed: int | None = option(None, "Makes random answers repeatable.", at_least=0, group=_ANSWER)
    on_long: OnLong = option(
        OnLong.TRUNCATE,
        "What to do with a clip that is longer than the model takes. windows: ask each stretch, then once more with "
        "their answers in place of the audio.",
        group=_ANSWER,
    )
    preset: Preset | None = option(
        None, "Generate as the card of this checkpoint does; single settings win.", group=_ANSWER
    )
    show_thoughts: bool = option(
        False, "Print the thoughts of a thinking model even where no one watches.", group=_ANSWER
    )

    def generate_options(self) -> dict[str, Any]:
        """Keywords of `generate` for what was asked for."""
        from audioflamingo.engine.generate_options import sampling_options

        named = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        options = {name: value for name, value in named.items() if value is not None}
        preset = {} if self.preset is None else GENERATION_PRESETS[self.preset]
        return {**preset, **options, **sampling_options(self.temperature)}

    def chat(self, model: AdaptedModelOptions, screen: ScreenOptions) -> Chat:
        """Loads a model and begins a conversation with it, or with an adapter of it."""
        from audioflamingo.engine.chat import Chat

        loaded, processor, name = load_with_adapter(model, screen.verbose)
        on_stretch = None if screen.quiet else _show_stretch
        return Chat(loaded, processor, self.system, self.on_long.value, adapter=name, on_stretch=on_stretch)


@dataclass(frozen=True)
class AskScreenOptions(ScreenOptions):
    """What is shown of an answer."""

    json: bool = option(
        False,
        "Print one JSON object: answer, thoughts, finish_reason, and the stretches of a long clip.",
        group="Output",
    )


def _show_stretch(stretch: Stretch) -> None:
    Terminal.say(f"[clip {stretch.clip}, {stretch.times}] {stretch.answer}")


@dataclass(frozen=True)
class HowOptions:
    """What `af3 ask` may ask for besides."""

    think: bool = option(
        False,
        "Let the model reason first, with the adapter for it that lies in its folder, or with --adapter.",
        group=_ANSWER,
    )
    schema: Path | None = option(
        None,
        "Answer with JSON that meets the JSON schema in this file; no thoughts.",
        metavar="FILE",
        group=_ANSWER,
    )


def _show_tasks(is_asked: bool) -> None:
    if is_asked:
        for name, task in TASKS.items():
            typer.echo(f"{name}  ({task.models})\n    {task.prompt}")
        raise typer.Exit


@with_flags
def ask(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar='AUDIO... "QUESTION"',
            help="Clips (files, URLs, - for standard input), then the question; with --task the clips only.",
            show_default=False,
        ),
    ],
    *,
    task: Annotated[
        TaskName | None,
        typer.Option(
            "--task",
            "-t",
            help="Ask a ready-made question; --tasks shows them.",
            metavar="NAME",
            rich_help_panel=_ANSWER,
        ),
    ] = None,
    tasks: Annotated[
        bool,
        typer.Option(
            "--tasks",
            help="Show the ready-made questions and the checkpoints that they are published for.",
            callback=_show_tasks,
            is_eager=True,
            rich_help_panel=_ANSWER,
        ),
    ] = False,
    how: HowOptions,
    answer: AnswerOptions,
    reading: Reading,
    model: AdaptedModelOptions,
    screen: AskScreenOptions,
) -> None:
    """Ask a question about audio. The answer is printed as it comes.

    \b
    Examples:
      af3 ask bird.wav "What is this?"
      af3 ask first.wav second.wav "Which one is speech?"
      af3 ask song.mp3 --task music
      af3 ask call.wav "Who calls, and why?" --schema call.json
      af3 ask talk.wav "Who is right?" --think --model ./audio-flamingo-3-hf
      af3 ask lecture.mp3 "What is it about?" --on-long windows
      af3 ask talk.flac "What is it about? (A) Sport (B) Music (C) Politics" --max-new-tokens 50
    """
    clips, question = split_arguments(arguments, task)
    options = answer.generate_options()
    if how.schema is not None:
        options["constraint"] = {"json_schema": _read_schema(how.schema)}
    sources = [_source(clip) for clip in clips]  # before the model is loaded: a missing file is found at once
    if how.think:
        question = f"{question}\n{THINK_SUFFIX}"
        if model.adapter is None and (folder := find_think_adapter(model.model)) is not None:
            model = dataclasses.replace(model, adapter=str(folder))
    chat = answer.chat(model, screen)
    for source in sources:
        chat.add_audio(source, reading)
    pieces = chat.ask(question, **options)
    if screen.json:
        Terminal.show(_json_answer(chat, "".join(pieces), task == "transcribe"))
    elif task == "transcribe":  # the sentence around the transcript is only known when it is complete
        from audioflamingo.processor.conversation import strip_framing

        Terminal.show(strip_framing("".join(pieces)) + "\n")
    else:
        print_answer(pieces, answer.show_thoughts)
    if how.schema is not None and chat.finish_reason == "length":
        raise ArgumentError(
            "the answer reached its longest length before the JSON was complete; raise --max-new-tokens."
        )


def _read_schema(path: Path) -> Any:
    """The JSON schema in a file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--schema {path}: {reason_of(error)}.") from None


def _json_answer(chat: Chat, text: str, is_transcript: bool) -> str:
    """What `--json` prints."""
    from audioflamingo.processor.conversation import strip_framing
    from audioflamingo.processor.thoughts import split_thoughts

    thoughts, answer = split_thoughts(text)
    content = {
        "answer": strip_framing(text) if is_transcript else answer,
        "thoughts": thoughts,
        "finish_reason": chat.finish_reason,
        "stretches": [stretch.to_dict() for stretch in chat.stretches],
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def split_arguments(arguments: list[str], task: str | None) -> tuple[list[str], str]:
    """Clips and question of a command line.

    Raises:
        typer.BadParameter: there is no question, or two.
    """
    if task is not None:
        last = arguments[-1]
        if " " in last.strip() and len(arguments) > 1 and not _may_be_audio(last):
            raise typer.BadParameter(f"--task {task} brings its own question; leave out {last!r}.")
        return arguments, TASKS[task].prompt
    *clips, question = arguments
    if _may_be_audio(question):
        raise typer.BadParameter(
            f"the last argument is the question, and {question!r} is audio. Add a question in quotes, or "
            f"--task {'|'.join(TASKS)}."
        )
    return clips, question


def _may_be_audio(text: str) -> bool:
    if text == STDIN or text.startswith(("http://", "https://", "data:")):
        return True
    try:
        return Path(text).expanduser().exists() or (
            " " not in text and Path(text).suffix.lower() in AUDIO_SUFFIXES
        )
    except OSError:  # too long for a path
        return False


def _source(name: str) -> str | bytes:
    """What `load_audio` takes for a clip that the user named, opened if that shows a mistake at once."""
    from audioflamingo.audio.sources import is_pipe, open_source

    if name == STDIN:
        return sys.stdin.buffer.read()
    if is_pipe(name):
        return Path(name).expanduser().read_bytes()
    if "://" not in name and not name.startswith("data:"):
        with open_source(name):
            pass
    return name


def print_answer(pieces: Iterator[str], shows_thoughts: bool = False) -> None:
    """Prints the pieces of an answer as they come, then a line end; Ctrl-C ends the answer cleanly.

    Thoughts are dimmed at a terminal, and elsewhere left out unless `shows_thoughts`.
    """
    from audioflamingo.processor.thoughts import split_pieces

    is_watched = sys.stdout.isatty()
    was_thinking = False
    with closing(pieces):  # type: ignore[type-var]  # a generator
        try:
            for is_thinking, piece in split_pieces(pieces):
                if is_thinking and not (is_watched or shows_thoughts):
                    continue
                if was_thinking and not is_thinking:
                    Terminal.show("\n\n")
                was_thinking = is_thinking
                Terminal.show(f"{_DIM}{piece}{_PLAIN}" if is_thinking and is_watched else piece)
        finally:
            Terminal.show("\n")
