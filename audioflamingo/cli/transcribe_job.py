"""The work of `af3 transcribe`: which inputs are left to do, and what becomes of each."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import typer

from audioflamingo.cli.failures import EXIT_FAILED, EXIT_INTERRUPTED, report
from audioflamingo.cli.flags import ScreenOptions
from audioflamingo.cli.inputs import STDIN, Input
from audioflamingo.cli.model_loading import AdaptedModelOptions, load_with_adapter
from audioflamingo.cli.terminal import ProgressBar, Terminal
from audioflamingo.errors import AudioError, OutputError, reason_of
from audioflamingo.fields import option
from audioflamingo.transcription.segments import Finished, Segment, has_speech
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.writers import (
    FORMATS,
    Formatter,
    format_transcript,
    time_stamp,
    write_transcript,
)

if TYPE_CHECKING:
    from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
    from audioflamingo.processor import AudioFlamingo3Processor

# After these no other output can be written either.
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_OUTPUT = "Output"
DEFAULT_FORMAT = "txt"


def check_format(name: str) -> str:
    """The name of a format, given in any case.

    Raises:
        typer.BadParameter: there is none of this name.
    """
    known = name.strip().lower()
    if known not in FORMATS:
        raise typer.BadParameter(f"{known!r} is not one of {', '.join(FORMATS)}.", param_hint="--format")
    return known


@dataclass(frozen=True)
class OutputOptions:
    """Where transcripts go, and how they look."""

    formats: tuple[str, ...] = option(
        (DEFAULT_FORMAT,),
        f"Format of the transcripts: {', '.join(FORMATS)}; may be repeated. By default {DEFAULT_FORMAT}.",
        short="-f",
        metavar="FORMAT",
        group=_OUTPUT,
    )
    output_dir: Path | None = option(
        None, "Write one file for each audio here, in place of printing.", short="-o", group=_OUTPUT
    )
    overwrite: bool = option(False, "Transcribe again what has its output already.", group=_OUTPUT)

    @classmethod
    def from_flags(cls, formats: tuple[str, ...], **values: Any) -> Self:
        """Formats may also be given as `srt,json`."""
        names = [check_format(name) for given in formats for name in given.split(",")]
        return cls(tuple(dict.fromkeys(names)) or (DEFAULT_FORMAT,), **values)


class TranscribeJob:
    """One run over many inputs.

    Attributes:
        num_done, num_failed, num_skipped: inputs so far.
    """

    def __init__(
        self,
        ctx: typer.Context,
        inputs: list[Input],
        output: OutputOptions,
        options: TranscriptionOptions,
        screen: ScreenOptions,
    ) -> None:
        self._ctx = ctx
        self._inputs = inputs
        self._formats = output.formats
        self._output_dir = output.output_dir
        self._overwrite = output.overwrite
        self._options = options
        self._quiet = screen.quiet
        self._verbose = screen.verbose
        self._todo: list[Input] = []
        self._segments: list[Segment] = []
        self._has_speech = False
        self._formatter: Formatter | None = None
        self.num_done = self.num_failed = self.num_skipped = 0

    def run(self, model: AdaptedModelOptions) -> None:
        """Transcribes what is left to do.

        Raises:
            typer.Exit: something failed, or Ctrl-C.
        """
        if self._output_dir is not None:
            check_writable(self._output_dir)
        self._find_work()
        try:
            if self._todo:
                loaded, processor, name = load_with_adapter(model, self._verbose)
                self._options = dataclasses.replace(self._options, adapter=name)
                self._transcribe(loaded, processor)
        except KeyboardInterrupt:
            hint = "" if self._output_dir is None else " The same command goes on with the rest."
            Terminal.say(f"interrupted: {self.num_done} of {len(self._todo)} transcribed.{hint}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        if not self._quiet and (len(self._inputs) > 1 or self.num_skipped):
            counts = (
                ("transcribed", self.num_done),
                ("skipped", self.num_skipped),
                ("failed", self.num_failed),
            )
            Terminal.say(
                ", ".join(f"{count} {what}" for what, count in counts if count or what == "transcribed") + "."
            )
        if self.num_failed:
            raise typer.Exit(EXIT_FAILED)

    def _find_work(self) -> None:
        for item in self._inputs:
            if item.error is not None:
                self._fail(item, item.error)
            elif (
                not self._overwrite
                and (paths := self._output_paths(item))
                and all(path.exists() for path in paths.values())
            ):
                self.num_skipped += 1
                if self._verbose:
                    Terminal.say(f"{item.name}: {', '.join(map(str, paths.values()))} exists, skipped.")
            else:
                self._todo.append(item)
        if self.num_skipped and not self._quiet:
            Terminal.say(f"{self.num_skipped} already transcribed; --overwrite does them again.")

    def _output_paths(self, item: Input) -> dict[str, Path]:
        """The file of each format; none where transcripts are printed."""
        if self._output_dir is None:
            return {}
        stem = self._output_dir / item.output_stem
        return {name: stem.with_name(f"{stem.name}.{name}") for name in self._formats}

    def _transcribe(
        self, model: AudioFlamingo3ForConditionalGeneration, processor: AudioFlamingo3Processor
    ) -> None:
        from audioflamingo.transcription.transcriber import transcribe_all

        durations = self._durations()
        total = sum(durations) or None  # what cannot be read takes no time
        before = (
            list(itertools.accumulate(durations, initial=0.0)) if durations else []
        )  # without a bar: nothing
        with Terminal.progress(total, not self._quiet) as bar:
            sources = (item.source for item in self._todo)
            events = transcribe_all(model, processor, sources, options=self._options)
            current = -1
            for index, event in events:
                item = self._todo[index]
                if index != current:
                    current = index
                    self._start(item)
                end_s = event.end_s if isinstance(event, Segment) else event.duration_s
                self._show_progress(bar, before[index] + end_s if before else 0, index)
                if isinstance(event, Segment):
                    self._take(item, event)
                else:
                    self._finish(item, event)

    def _durations(self) -> list[float]:
        """Seconds of each input, for the bar; 0 where its file does not say."""
        if self._quiet:
            return []
        from audioflamingo.audio.decoding import read_audio_info

        durations = []
        for item in self._todo:
            info = None if item.path is None else read_audio_info(item.path)
            duration_s = 0.0 if info is None or info.duration_s is None else info.duration_s
            if item.stretch is not None and item.stretch.duration_s is not None:
                duration_s = item.stretch.duration_s
            durations.append(self._options.part_s(duration_s))
        return durations

    def _show_progress(self, bar: ProgressBar, completed: float, index: int) -> None:
        place = f"{index + 1}/{len(self._todo)} " if len(self._todo) > 1 else ""
        bar.update(completed, place + Path(self._todo[index].name).name[:40])

    def _start(self, item: Input) -> None:
        self._segments = []
        self._has_speech = False
        if self._output_dir is not None or FORMATS[self._formats[0]].is_whole:
            self._formatter = None
            return
        self._formatter = Formatter(self._formats[0], item.name)
        if self._formats[0] == "txt" and len(self._inputs) > 1:
            Terminal.show(f"==> {item.name} <==\n")
        if self._formatter.head:
            Terminal.show(self._formatter.head)

    def _take(self, item: Input, segment: Segment) -> None:
        times = f"{time_stamp(segment.start_s)} --> {time_stamp(segment.end_s)}"
        self._has_speech = self._has_speech or has_speech([segment])
        if self._formatter is not None:
            Terminal.show(self._formatter.piece(segment))
        else:
            self._segments.append(segment)
            if not self._quiet and segment.text:
                channel = "" if segment.channel is None else f"{segment.channel}: "
                Terminal.say(f"[{times}] {channel}{segment.text}")
        if segment.finish_reason == "loop" and not self._quiet:
            Terminal.say(
                f"warning: {item.name}, {times}: the model repeated itself; the text is cut where that began."
            )
        elif segment.finish_reason == "length" and not self._quiet:
            Terminal.say(f"warning: {item.name}, {times}: the text is cut at --max-new-tokens.")

    def _finish(self, item: Input, end: Finished) -> None:
        if end.error is not None:
            self._fail(item, end.error)
            return
        paths = self._output_paths(item)
        name = "stdin" if item.name == STDIN else item.name
        try:
            for form, path in paths.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_transcript(path, self._segments, form, name, end.duration_s)
            if not paths and self._formatter is None:
                Terminal.show(format_transcript(self._segments, self._formats[0], name, end.duration_s))
        except BrokenPipeError:
            raise
        except OSError as error:
            self._fail(item, error)
            if _errno_of(error) in HOPELESS:
                Terminal.say(f"stopped: {self.num_done} transcribed. The same command goes on with the rest.")
                raise typer.Exit(EXIT_FAILED) from None
            return
        self.num_done += 1
        if not self._has_speech and not self._quiet:
            Terminal.say(f"{item.name}: no speech was found in {end.duration_s:.1f} s of audio.")
        if paths and not self._quiet:
            Terminal.say(f"{item.name} -> {', '.join(map(str, paths.values()))}")

    def _fail(self, item: Input, error: Exception) -> None:
        self.num_failed += 1
        if not isinstance(error, AudioError | OutputError):
            error = _named(error, item)
        report(self._ctx, error)


def _named(error: Exception, item: Input) -> Exception:
    """Puts the name of the input before a message that does not have it."""
    named = AudioError(f"{item.name}: {error}")
    named.__cause__ = error
    return named.with_traceback(error.__traceback__)


def _errno_of(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__
    return None


def check_writable(folder: Path) -> None:
    """Makes the output folder and tries to write there, before any work is done.

    Raises:
        OutputError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to the folder {str(folder)!r}: {reason_of(error)}. Choose another --output-dir."
        ) from error
