"""`af3 inspect`: what the model gets to see of a recording."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audioflamingo.audio.reading import Reading
from audioflamingo.cli.flags import QuietOptions, with_flags
from audioflamingo.cli.inputs import STDIN
from audioflamingo.cli.terminal import Terminal
from audioflamingo.errors import MissingDependencyError, OutputError

if TYPE_CHECKING:
    from audioflamingo.cli.recording_view import RecordingView


@with_flags
def inspect(
    audio: Annotated[str, typer.Argument(metavar="AUDIO", help="A file, a URL, or - for standard input.")],
    *,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png",
            help="Picture of waveform and log-mel; by default NAME.af3.png in this folder.",
            show_default=False,
        ),
    ] = None,
    no_png: Annotated[bool, typer.Option("--no-png", help="Draw no picture.")] = False,
    num_mels: Annotated[
        int, typer.Option("--mels", min=1, help="Mel bins: 128, or 80 for the built-in model.")
    ] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the picture named by --png.")
    ] = False,
    reading: Reading,
    screen: QuietOptions,
) -> None:
    """Show what the model sees of a recording: windows, frames, audio tokens, and a picture.

    \b
    Examples:
      af3 inspect talk.wav
      af3 inspect talk.wav --png talk.png
      af3 inspect https://example.org/a.mp3 --json --no-png
    """
    from audioflamingo.audio import load_audio
    from audioflamingo.audio.sources import is_pipe
    from audioflamingo.cli.recording_plot import draw_recording
    from audioflamingo.cli.recording_view import look_at

    if png is not None and png.exists() and not overwrite:
        raise OutputError(f"{str(png)!r} exists; add --overwrite, or choose another name.")
    source: Any = audio
    if audio == STDIN:
        source = sys.stdin.buffer.read()
    elif is_pipe(audio):
        source = Path(audio).expanduser().read_bytes()
    waveform = load_audio(source, **asdict(reading))
    view = look_at(audio, source, waveform, reading.track)
    if as_json:
        content = {**asdict(view), "num_audio_tokens": view.num_audio_tokens}
        Terminal.show(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    else:
        Terminal.show(describe_view(view))
    if no_png:
        return
    path = png or Path(f"{_stem(audio)}.af3.png")
    try:
        draw_recording(view, waveform, num_mels, path)
    except MissingDependencyError as error:
        if png is not None:
            raise
        Terminal.say(f"no picture: {error}")
        return
    if not screen.quiet:
        Terminal.say(f"picture: {path}")


def _stem(name: str) -> str:
    if name == STDIN:
        return "stdin"
    if name.startswith("data:"):
        return "data"
    return Path(name.split("?")[0]).stem or "audio"


def describe_view(view: RecordingView) -> str:
    """The view as a table."""
    kind = "unknown" if view.codec is None else f"{view.container}, {view.codec}"
    rate = "?" if view.sampling_rate_hz is None else f"{view.sampling_rate_hz} Hz"
    channels = (
        "?" if view.num_channels is None else f"{view.num_channels} channel{'s' * (view.num_channels != 1)}"
    )
    plural = "s" * (len(view.windows) != 1)
    lines = [
        f"file          {view.name}",
        f"format        {kind}, {rate}, {channels}; the model gets 16000 Hz mono",
        f"duration      {view.duration_s:.3f} s",
        f"level         peak {view.peak:.3f}, RMS {view.rms:.4f}" + (" (silence)" if view.peak == 0 else ""),
        f"audio tokens  {view.num_audio_tokens} in {len(view.windows)} window{plural}",
    ]
    if view.used_s < view.duration_s:
        lines.append(
            f"beyond        {view.duration_s - view.used_s:.1f} s lie past the 10 minutes of one prompt; "
            "af3 transcribe takes all"
        )
    lines += ["", "window       start         end   frames   tokens    speech"]
    for number, w in enumerate(view.windows, start=1):
        lines.append(
            f"{number:6}  {w.start_s:8.3f} s  {w.end_s:8.3f} s  {w.num_frames:7}  {w.num_audio_tokens:7}  "
            f"{w.speech_s:6.2f} s"
        )
    return "\n".join(lines) + "\n"
