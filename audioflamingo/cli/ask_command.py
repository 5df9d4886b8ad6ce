"""`af3 ask`: one question about one or several clips."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audioflamingo.cli.flags import ScreenOptions, with_flags
from audioflamingo.cli.inputs import AUDIO_SUFFIXES, STDIN
from audioflamingo.cli.model_loading import ModelOptions, load
from audioflamingo.cli.terminal import Terminal
from audioflamingo.config import DEFAULT_TRANSCRIPTION_PROMPT
from audioflamingo.fields import option

if TYPE_CHECKING:
    from audioflamingo.engine.chat import Chat

# "transcribe" and "caption" are prompts that NVIDIA publishes with the model; the others are plain questions.
TASKS = {
    "transcribe": DEFAULT_TRANSCRIPTION_PROMPT,
    "caption": "Please describe the audio in detail.",
    "sound": "What is the sound in this audio?",
    "music": "Which instrument is playing in this audio?",
    "emotion": "What is the emotion of the speaker?",
    "language": "Which language is spoken in this audio?",
}
# Published too: it turns on the thinking of checkpoints that were trained for it.
THINK_SUFFIX = "Please think and reason about the input audio before you respond."
_ANSWER = "Answer"

Task = StrEnum("Task", {name.upper(): name for name in TASKS})  # type: ignore[misc]


class OnLong(StrEnum):
    """What to do with a clip that is too long."""

    TRUNCATE = "truncate"
    ERROR = "error"


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
        OnLong.TRUNCATE, "What to do with a clip of more than 10 minutes.", group=_ANSWER
    )

    def generate_options(self) -> dict[str, Any]:
        """Keywords of `generate` for what was asked for."""
        from audioflamingo.engine.generate_options import sampling_options

        named = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        options = {name: value for name, value in named.items() if value is not None}
        return {**options, **sampling_options(self.temperature)}

    def chat(self, model: ModelOptions, is_verbose: bool) -> Chat:
        """Loads a model and begins a conversation with it."""
        from audioflamingo.engine.chat import Chat

        return Chat(*load(model, is_verbose), system=self.system, on_long=self.on_long.value)


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
        Task | None, typer.Option("--task", "-t", help="Ask a ready-made question.", rich_help_panel=_ANSWER)
    ] = None,
    think: Annotated[
        bool,
        typer.Option("--think", help="Ask the model to reason first, if it can.", rich_help_panel=_ANSWER),
    ] = False,
    answer: AnswerOptions,
    model: ModelOptions,
    screen: ScreenOptions,
) -> None:
    """Ask a question about audio. The answer is printed as it comes.

    \b
    Examples:
      af3 ask bird.wav "What is this?"
      af3 ask first.wav second.wav "Which one is speech?"
      af3 ask song.mp3 --task music
      af3 ask talk.flac "What is it about? (A) Sport (B) Music (C) Politics" --max-new-tokens 50
    """
    clips, question = split_arguments(arguments, task)
    if think:
        question = f"{question} {THINK_SUFFIX}"
    sources = [_source(clip) for clip in clips]  # before the model is loaded: a missing file is found at once
    chat = answer.chat(model, screen.verbose)
    for source in sources:
        chat.add_audio(source)
    pieces = chat.ask(question, **answer.generate_options())
    if task == "transcribe":  # the sentence around the transcript is only known when it is complete
        from audioflamingo.processor.conversation import strip_framing

        Terminal.show(strip_framing("".join(pieces)) + "\n")
    else:
        print_answer(pieces)


def split_arguments(arguments: list[str], task: str | None) -> tuple[list[str], str]:
    """Clips and question of a command line.

    Raises:
        typer.BadParameter: there is no question, or two.
    """
    if task is not None:
        last = arguments[-1]
        if " " in last.strip() and len(arguments) > 1 and not _may_be_audio(last):
            raise typer.BadParameter(f"--task {task} brings its own question; leave out {last!r}.")
        return arguments, TASKS[task]
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
    from audioflamingo.audio.sources import open_source

    if name == STDIN:
        return sys.stdin.buffer.read()
    if "://" not in name and not name.startswith("data:"):
        with open_source(name):
            pass
    return name


def print_answer(pieces: Iterator[str]) -> None:
    """Prints the pieces of an answer as they come, then a line end; Ctrl-C ends the answer cleanly."""
    with closing(pieces):  # type: ignore[type-var]  # a generator
        try:
            for piece in pieces:
                Terminal.show(piece)
        finally:
            Terminal.show("\n")
