"""`af3 listen`: speech from a microphone or a pipe, written down while it is spoken."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from audioflamingo.cli.flags import QuietOptions, with_flags
from audioflamingo.cli.inputs import STDIN
from audioflamingo.cli.live_sound import LiveSound, Microphone, listen_to_pipe
from audioflamingo.cli.model_loading import AdaptedModelOptions, load_with_adapter
from audioflamingo.cli.terminal import Terminal
from audioflamingo.cli.transcribe_job import DEFAULT_FORMAT, check_format
from audioflamingo.fields import option, same_option
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.transcription_options import TranscriptionOptions, VadOptions
from audioflamingo.transcription.writers import FORMATS, Formatter, format_transcript, write_transcript

NAME = "live"  # of the recording, where a format has a place for it


@dataclass(frozen=True)
class SoundOptions:
    """Where the sound comes from."""

    microphone: str | None = option(
        None, "Number or part of the name of the microphone; by default the system's.", group="Audio"
    )
    rate: int = option(
        16000, "Samples a second of raw sound from a pipe.", at_least=1000, at_most=192000, group="Audio"
    )


@dataclass(frozen=True)
class LiveOutput:
    """Where the transcript goes, and how it looks."""

    format: str = option(
        DEFAULT_FORMAT, f"{', '.join(FORMATS)}; json is printed at the end.", short="-f", group="Output"
    )
    output_file: Path | None = option(
        None,
        "Write the transcript here, too: whole after each segment, so that nothing is lost.",
        short="-o",
        group="Output",
    )

    @classmethod
    def from_flags(cls, format: str, output_file: Path | None) -> Self:
        """Formats in any case."""
        return cls(check_format(format), output_file)


@dataclass(frozen=True)
class ListenOptions:
    """How speech is heard."""

    draft_s: float = option(
        1.0,
        "Hear growing speech again after so many seconds, to show its words early; 0: only when it has ended.",
        at_least=0.0,
        group="Model",
    )
    prompt: str | None = same_option(TranscriptionOptions, "prompt")
    max_new_tokens: int = same_option(TranscriptionOptions, "max_new_tokens")
    num_beams: int | None = same_option(TranscriptionOptions, "num_beams")
    word_timestamps: bool = same_option(TranscriptionOptions, "word_timestamps")
    threshold: float = same_option(VadOptions, "threshold")
    min_silence_ms: float = same_option(VadOptions, "min_silence_ms")
    max_window_s: float = same_option(VadOptions, "max_window_s")

    def transcription(self, adapter: str | None) -> TranscriptionOptions:
        """The same for the library."""
        return TranscriptionOptions(
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            word_timestamps=self.word_timestamps,
            adapter=adapter,
            vad=VadOptions.from_flags(
                self.threshold,
                min_silence_ms=self.min_silence_ms,
                max_window_s=self.max_window_s,
                max_pause_ms=0.0,
            ),
        )


@with_flags
def listen(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[-]",
            help="Nothing for a microphone; - for raw samples from standard input: 16 bits, little-endian, one "
            "channel, --rate of them a second.",
            show_default=False,
        ),
    ] = None,
    *,
    sound: SoundOptions,
    output: LiveOutput,
    model: AdaptedModelOptions,
    options: ListenOptions,
    screen: QuietOptions,
) -> None:
    """Transcribe speech while it is spoken.

    Words appear while you speak, as soon as two hearings agree on them; a pause ends a segment, which takes their
    place. Ctrl-C ends: what was said until then is still written.

    The microphone needs the package sounddevice: pip install 'audioflamingo[microphone]'.

    \b
    Examples:
      af3 listen
      af3 listen -f srt -o meeting.srt --min-silence-ms 500
      arecord -q -t raw -f S16_LE -r 16000 -c 1 | af3 listen -
      ffmpeg -i rtsp://camera/door -f s16le -ar 16000 -ac 1 - | af3 listen - -f jsonl
    """
    if source not in (None, STDIN):
        raise typer.BadParameter(
            f"{source!r} is neither absent nor -; files are for af3 transcribe.", param_hint="SOURCE"
        )
    loaded, processor, adapter = load_with_adapter(model, False)
    with _opened(source, sound, screen.quiet) as live, _ended_by_ctrl_c(live):
        from audioflamingo.transcription.live import listen as listen_to

        events = listen_to(
            loaded,
            processor,
            live.blocks(),
            options=options.transcription(adapter),
            draft_every_s=options.draft_s if options.draft_s and _shows_drafts(screen.quiet) else None,
        )
        write(events, output)


@contextmanager
def _opened(source: str | None, sound: SoundOptions, is_quiet: bool) -> Iterator[LiveSound]:
    if source == STDIN:
        yield listen_to_pipe(read_input, sound.rate)
        return
    microphone = Microphone(sound.microphone)
    with microphone as live:
        if not is_quiet:
            Terminal.say(f"listening to {microphone.name}; Ctrl-C ends.")
        yield live


def read_input(num_bytes: int) -> bytes:
    """Up to so many bytes of standard input, past Python's buffer: a thread that waits in it would block the end."""
    return os.read(sys.stdin.fileno(), num_bytes)


@contextmanager
def _ended_by_ctrl_c(live: LiveSound) -> Iterator[None]:
    """Ctrl-C ends the sound, and a second one the command."""

    def end(_signal: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        live.stop()

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _shows_drafts(is_quiet: bool) -> bool:
    """Whether there is a screen for words that may be replaced."""
    return not is_quiet and sys.stderr.isatty()


def write(events: Iterable[Any], output: LiveOutput) -> None:
    """Shows drafts and segments as they come, and keeps the file whole."""
    is_whole = FORMATS[output.format].is_whole
    formatter = None if is_whole else Formatter(output.format, NAME)
    segments: list[Segment] = []
    if formatter is not None and formatter.head:
        Terminal.show(formatter.head)
    for event in events:
        if not isinstance(event, Segment):
            _show_draft(event.text)
            continue
        _show_draft("")
        segments.append(event)
        if formatter is not None:
            Terminal.show(formatter.piece(event))
        if output.output_file is not None:
            write_transcript(output.output_file, segments, output.format, NAME)
    if is_whole:
        Terminal.show(format_transcript(segments, output.format, NAME))
    if output.output_file is not None and not segments:
        write_transcript(output.output_file, segments, output.format, NAME)


def _show_draft(text: str) -> None:
    """The end of the words so far, in one line that the next output takes the place of."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{text[-width:]}")
        sys.stderr.flush()
