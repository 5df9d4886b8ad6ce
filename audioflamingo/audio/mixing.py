"""Channels to what is heard: their mean, one of them, or each.

The mean of a stereo recording with one side inverted is silence. Where the mean has far less power than
unrelated channels would leave, the stronger channel is taken in its place, and a warning says so.
"""

from __future__ import annotations

import math

import numpy as np

from audioflamingo.audio.reading import ChannelChoice
from audioflamingo.errors import AudioError, warn

PIECES_A_SECOND = 2  # channels are compared within half a second
CANCELLED = 0.03  # power of the mean over what unrelated channels would leave: 15 dB less
INAUDIBLE = 1e-9  # power of a channel (-90 dB) below which nothing is compared
CHANGE_S = 0.01  # from the mean to a channel and back
SIDES = ("left", "right")


class Mixer:
    """Mixes the blocks of one source.

    Args:
        channel: see `Reading`.
        name: what messages call the source.
    """

    def __init__(self, channel: ChannelChoice, name: str) -> None:
        self._channel = channel
        self._name = name
        self._num_channels: int | None = None
        self._used: int | None = None  # the channel that stands for the mean at the moment
        self._last = 0  # the one that did so the last time
        self._cancelled_s = self._total_s = 0.0
        self._weakest = 1.0
        self._peak_in = self._peak_out = 0.0

    def mix(self, samples: np.ndarray, rate: float) -> np.ndarray:
        """What is heard of `samples` (channels, n) float32: (1, n), or (channels, n) for each.

        Raises:
            AudioError: there is no such channel.
        """
        num_channels = len(samples)
        if self._channel == "each":
            return self._each(samples)
        if self._channel in SIDES:
            if num_channels < 2:
                raise AudioError(
                    f"{self._name} has one channel, neither left nor right. Leave out channel={self._channel!r}."
                )
            side = SIDES.index(self._channel)
            mixed = samples[side : side + 1]
        elif num_channels == 1:
            return samples
        else:
            mixed = self._mean(samples, rate)
        self._peak_in = max(self._peak_in, float(np.abs(samples).max(initial=0.0)))
        self._peak_out = max(self._peak_out, float(np.abs(mixed).max(initial=0.0)))
        return mixed

    def finish(self) -> None:
        """Warns, at the end, about sound that nobody heard."""
        if self._cancelled_s:
            is_silent = self._weakest < 1e-12
            mean = (
                "silent" if is_silent else f"{-10 * math.log10(self._weakest):.0f} dB weaker than a channel"
            )
            warn(
                f"{self._name}: its channels cancel each other (one is inverted): in {self._cancelled_s:.1f} of "
                f"{self._total_s:.1f} s their mean is {mean}. There the stronger channel is heard; "
                "channel='left' or 'right' takes one throughout."
            )
        if self._peak_out < 1e-3 * self._peak_in:
            warn(
                f"{self._name}: it holds sound (peak {self._peak_in:.3g}), but what is heard of it is silent (peak "
                f"{self._peak_out:.3g}) with channel={self._channel!r}. Choose another channel."
            )

    def _each(self, samples: np.ndarray) -> np.ndarray:
        if self._num_channels not in (None, len(samples)):
            raise AudioError(
                f"{self._name}: the number of channels changes from {self._num_channels} to {len(samples)}, so they "
                "cannot be heard each for itself. Leave out channel='each'."
            )
        self._num_channels = len(samples)
        return samples

    def _mean(self, samples: np.ndarray, rate: float) -> np.ndarray:
        mixed = samples.mean(axis=0)
        size = max(1, int(rate) // PIECES_A_SECOND)
        for start in range(0, samples.shape[1], size):
            self._mend(samples[:, start : start + size], mixed[start : start + size], rate)
        return mixed[None]

    def _mend(self, samples: np.ndarray, mixed: np.ndarray, rate: float) -> None:
        """Puts a channel in the place of a mean (n,) in which they cancel, in place."""
        duration_s, is_first = len(mixed) / rate, not self._total_s
        self._total_s += duration_s
        with np.errstate(over="ignore", invalid="ignore"):
            powers = np.einsum("cn,cn->c", samples, samples) / len(mixed)
            power = float(mixed @ mixed) / len(mixed)
        strongest = float(powers.max())
        is_last_good = self._last < len(powers) and powers[self._last] > strongest / 4
        best = self._last if is_last_good else int(powers.argmax())
        is_cancelled = strongest > INAUDIBLE and power < CANCELLED * float(powers.sum()) / len(powers) ** 2
        before, self._used = self._used, best if is_cancelled else None
        if before is None and self._used is None:
            return
        mean = mixed.copy()
        if is_cancelled:
            self._last = best
            self._cancelled_s += duration_s
            self._weakest = min(self._weakest, power / strongest)
            mixed[:] = samples[best]
        if not is_first and before != self._used and (before is None or before < len(samples)):
            length = min(len(mixed), max(1, round(CHANGE_S * rate)))
            ramp = np.linspace(0, 1, length, dtype=np.float32)
            old = (mean if before is None else samples[before])[:length]
            mixed[:length] = ramp * mixed[:length] + (1 - ramp) * old
