"""`af3 ask`: one question about one or several clips."""

from __future__ import annotations

from contextlib import closing
from enum import StrEnum
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

# "transcribe" and "caption" are prompts that NVIDIA publishes with the model; the others are plain questions.
TASKS = {
    "transcribe": "Transcribe the input speech.",
    "caption": "Please describe the audio in detail.",
    "sound": "What is the sound in this audio?",
    "music": "Which instrument is playing in this audio?",
    "emotion": "What is the emotion of the speaker?",
    "language": "Which language is spoken in this audio?",
}
# Published too: it turns on the thinking of checkpoints that were trained for it.
THINK_SUFFIX = "Please think and reason about the input audio before you respond."

Task = StrEnum("Task", {name.upper(): name for name in TASKS})  # type: ignore[misc]


def ask(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar='AUDIO... "QUESTION"',
            help="Clips (files, URLs, - for standard input), then the question; with --task the clips only.",
            show_default=False,
        ),
    ],
    task: Annotated[
        Task | None, typer.Option("--task", "-t", help="Ask a ready-made question.", rich_help_panel="Answer")
    ] = None,
    think: Annotated[
        bool,
        typer.Option("--think", help="Ask the model to reason first, if it can.", rich_help_panel="Answer"),
    ] = False,
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
    from audioflamingo.cli.loading import load
    from audioflamingo.cli.terminal import Terminal
    from audioflamingo.engine.chat import Chat

    loaded, processor = load(model, device, dtype, verbose, quantization)
    chat = Chat(loaded, processor, system=system, on_long=on_long)
    for source in sources:
        chat.add_audio(source)
    options = answer_options(max_new_tokens, temperature, seed)
    if task == "transcribe":  # the sentence around the transcript is only known when it is complete
        from audioflamingo.processor.conversation import strip_framing

        Terminal.show(strip_framing("".join(chat.ask(question, **options))) + "\n")
        return
    print_answer(chat.ask(question, **options))


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
    from audioflamingo.cli.inputs import AUDIO_SUFFIXES, STDIN

    if text == STDIN or text.startswith(("http://", "https://", "data:")):
        return True
    try:
        return Path(text).expanduser().exists() or (
            " " not in text and Path(text).suffix.lower() in AUDIO_SUFFIXES
        )
    except OSError:  # too long for a path
        return False


def _source(name: str) -> Any:
    """What `load_audio` takes for a clip that the user named, opened if that shows a mistake at once."""
    import sys

    from audioflamingo.audio.sources import open_source

    if name == "-":
        return sys.stdin.buffer.read()
    if "://" not in name and not name.startswith("data:"):
        with open_source(name):
            pass
    return name


def print_answer(answer: Any) -> None:
    """Prints the pieces of an answer as they come, then a line end; Ctrl-C ends the answer cleanly."""
    from audioflamingo.cli.terminal import Terminal

    with closing(answer):
        try:
            for piece in answer:
                Terminal.show(piece)
        finally:
            Terminal.show("\n")
