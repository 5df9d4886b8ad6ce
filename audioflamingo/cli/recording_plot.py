"""Pictures of audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.audio.loading import SAMPLING_RATE, split_windows
from audioflamingo.cli.recording_view import RecordingView
from audioflamingo.config import AUDIO_TOKENS_PER_S
from audioflamingo.figures import new_figure, save_png

MAX_COLUMNS = 4000  # of the spectrogram picture
TOKEN_S = 1 / AUDIO_TOKENS_PER_S
# Clip of at most so many seconds: a line every so many audio tokens.
TOKEN_GRIDS = ((12.0, 1), (120.0, 25), (float("inf"), 250))


def draw_recording(view: RecordingView, waveform: np.ndarray, num_mels: int, path: Path) -> None:
    """Draws waveform and log-mel, with the windows and, in short clips, every audio token.

    Args:
        view: what was measured.
        waveform: 16 kHz (samples,).
        num_mels: mel bins.
        path: the PNG to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure = new_figure(12, 6)
    used = waveform[: round(view.used_s * SAMPLING_RATE)]
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    _draw_waveform(top, used)
    log_mel = _log_mel(used, num_mels)
    step = max(1, log_mel.shape[1] // MAX_COLUMNS)
    bottom.imshow(
        log_mel[:, ::step],
        origin="lower",
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        extent=(0, view.used_s, 0, num_mels),
    )
    _draw_grid((top, bottom), view)
    bottom.set_xlabel("seconds")
    bottom.set_ylabel("mel bin")
    top.set_title(
        f"{view.name[-80:].replace('$', ' ')}: {view.duration_s:.2f} s, {len(view.windows)} windows, "
        f"{view.num_audio_tokens} audio tokens of 40 ms"
    )
    save_png(figure, path, dpi=100)


def _draw_waveform(axes: Any, waveform: np.ndarray) -> None:
    """The range of the samples in each column; a plain line would draw millions of points."""
    size = max(1, len(waveform) // MAX_COLUMNS)
    columns = waveform[: len(waveform) // size * size].reshape(-1, size)
    times = np.arange(len(columns)) * size / SAMPLING_RATE
    axes.fill_between(times, columns.min(axis=1), columns.max(axis=1), linewidth=0.5, color="tab:blue")
    axes.set_ylabel("waveform")


def _log_mel(waveform: np.ndarray, num_mels: int) -> np.ndarray:
    """The features of all valid frames, (mels, frames)."""
    extractor = AudioFlamingo3FeatureExtractor(feature_size=num_mels)
    parts = []
    for window in split_windows(waveform):
        features, mask = extractor.extract([window])
        parts.append(features[0, :, : int(mask.sum())].numpy())
    return np.concatenate(parts, axis=1)


def _draw_grid(axes: tuple[Any, ...], view: RecordingView) -> None:
    for one in axes:
        for window in view.windows[1:]:
            one.axvline(window.start_s, color="tab:red", linewidth=1.5)
        one.set_xlim(0, view.used_s)
    step = next(tokens for longest_s, tokens in TOKEN_GRIDS if view.used_s <= longest_s)
    for window in view.windows:
        edges = window.start_s + TOKEN_S * np.arange(0, window.num_audio_tokens + 1, step)
        axes[-1].vlines(edges, *axes[-1].get_ylim(), color="white", linewidth=0.4, alpha=0.5)
    scale = axes[0].secondary_xaxis("top", functions=(lambda s: s / TOKEN_S, lambda token: token * TOKEN_S))
    scale.set_xlabel(
        f"audio tokens (white lines: every {step})" if step > 1 else "audio tokens (white lines)"
    )
