"""`af3 inspect`: what the model gets to see of a recording."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from audioflamingo.cli.options import DebugOption, QuietOption


@dataclass(frozen=True)
class WindowView:
    """One window of the encoder: where it is, and how much of it is there."""

    start_s: float
    end_s: float
    num_frames: int
    num_audio_tokens: int
    speech_s: float


@dataclass(frozen=True)
class AudioView:
    """A recording as the model sees it.

    Attributes:
        container, codec, sampling_rate_hz, num_channels: of the file; None where it does not say.
        duration_s: seconds that were decoded.
        used_s: seconds that one prompt takes; the rest is only reached by `af3 transcribe`.
        peak, rms: of the mono waveform, 1 is full scale.
        windows: in order.
    """

    name: str
    container: str | None
    codec: str | None
    sampling_rate_hz: int | None
    num_channels: int | None
    duration_s: float
    used_s: float
    peak: float
    rms: float
    windows: list[WindowView]

    @property
    def num_audio_tokens(self) -> int:
        """Positions of the prompt that hold audio."""
        return sum(window.num_audio_tokens for window in self.windows)


def inspect(
    audio: Annotated[str, typer.Argument(metavar="AUDIO", help="A file, a URL, or - for standard input.")],
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
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what the model sees of a recording: windows, frames, audio tokens, and a picture.

    \b
    Examples:
      af3 inspect talk.wav
      af3 inspect talk.wav --png talk.png
      af3 inspect https://example.org/a.mp3 --json --no-png
    """
    from audioflamingo.audio import load_audio
    from audioflamingo.cli.terminal import Terminal
    from audioflamingo.errors import MissingDependencyError, OutputError
    from audioflamingo.transcription.writers import write_whole

    if png is not None and png.exists() and not overwrite:
        raise OutputError(f"{str(png)!r} exists; add --overwrite, or choose another name.")
    source: Any = sys.stdin.buffer.read() if audio == "-" else audio
    waveform = load_audio(source)
    view = look_at(audio, source, waveform)
    if as_json:
        content = {**asdict(view), "num_audio_tokens": view.num_audio_tokens}
        Terminal.show(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    else:
        Terminal.show(describe_view(view))
    if no_png:
        return
    path = png or Path(f"{_stem(audio)}.af3.png")
    try:
        from audioflamingo.cli.plots import draw_audio

        picture = draw_audio(view, waveform, num_mels)
    except MissingDependencyError as error:
        if png is not None:
            raise
        Terminal.say(f"no picture: {error}")
        return
    write_whole(path, picture)
    if not quiet:
        Terminal.say(f"picture: {path}")


def _stem(name: str) -> str:
    if name == "-":
        return "stdin"
    if name.startswith("data:"):
        return "data"
    return Path(name.split("?")[0]).stem or "audio"


def look_at(name: str, source: Any, waveform: Any) -> AudioView:
    """Measures a recording.

    Raises:
        AudioError: it is too short for one audio token.
    """
    import numpy as np

    from audioflamingo.audio.loading import (
        HOP_LENGTH,
        MAX_AUDIO_S,
        N_SAMPLES,
        SAMPLING_RATE,
        check_waveform,
        num_audio_tokens,
        split_windows,
    )
    from audioflamingo.cli.audio_info import read_audio_info

    check_waveform(waveform, repr(name))
    info = read_audio_info(source)
    used = waveform[: MAX_AUDIO_S * SAMPLING_RATE]
    speech = _speech(used)
    windows = []
    for index, window in enumerate(split_windows(used)):
        start = index * N_SAMPLES
        num_frames = math.ceil(len(window) / HOP_LENGTH)
        frames = speech[start // 512 : (start + len(window)) // 512 + 1]
        windows.append(
            WindowView(
                start / SAMPLING_RATE,
                (start + len(window)) / SAMPLING_RATE,
                num_frames,
                num_audio_tokens(num_frames),
                round(
                    min(len(window) / SAMPLING_RATE, float((frames >= 0.5).sum()) * 512 / SAMPLING_RATE), 2
                ),
            )
        )
    return AudioView(
        name=name,
        container=None if info is None else info.container,
        codec=None if info is None else info.codec,
        sampling_rate_hz=None if info is None else info.sampling_rate,
        num_channels=None if info is None else info.num_channels,
        duration_s=len(waveform) / SAMPLING_RATE,
        used_s=len(used) / SAMPLING_RATE,
        peak=float(np.abs(waveform).max()),
        rms=float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))),
        windows=windows,
    )


def _speech(waveform: Any) -> Any:
    """Probability of speech in each 32 ms."""
    import numpy as np

    from audioflamingo.transcription.vad import SpeechDetector, frames_of

    detector = SpeechDetector()
    return np.concatenate([detector(block) for block in frames_of([waveform])])


def describe_view(view: AudioView) -> str:
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
