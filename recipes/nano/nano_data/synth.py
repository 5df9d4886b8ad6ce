"""Synthesised sound events: small random instruments of noise, resonances and sweeps.

Every class has several families, functions `(rng, duration_s) -> waveform (N,)` at 16 kHz. The last family of
each class is held out for the test set, so that the test asks for the class and not for a generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 16000
Wave = NDArray[np.float32]
Family = Callable[[np.random.Generator, float], Any]


def seconds(duration_s: float) -> NDArray[np.float64]:
    """Time axis (N,) of a duration."""
    return np.arange(int(duration_s * RATE)) / RATE


def noise(rng: np.random.Generator, duration_s: float, slope: float = 0.0) -> NDArray[np.float64]:
    """Noise whose power falls with frequency to the power of `slope` (0 white, 1 pink, 2 brown), RMS 1."""
    count = max(2, int(duration_s * RATE))
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.fft.rfftfreq(count, 1 / RATE)
    spectrum *= np.maximum(frequency, 20) ** (-slope / 2)
    shaped = np.fft.irfft(spectrum, count)
    return shaped / (np.std(shaped) + 1e-9)


def band(waveform: Any, low_hz: float, high_hz: float) -> NDArray[np.float64]:
    """Second-order band-pass filter."""
    from scipy.signal import butter, sosfilt

    edges = [max(20.0, low_hz), min(7900.0, high_hz)]
    return sosfilt(butter(2, edges, "bandpass", fs=RATE, output="sos"), waveform)


def slow(
    rng: np.random.Generator, duration_s: float, rate_hz: float, low: float = 0.0, high: float = 1.0
) -> Any:
    """A smooth random curve (N,) between `low` and `high`, with about `rate_hz` turns a second."""
    count = int(duration_s * RATE)
    knots = rng.random(max(2, int(duration_s * rate_hz) + 2))
    return low + (high - low) * np.interp(np.linspace(0, len(knots) - 1, count), np.arange(len(knots)), knots)


def tone(frequency_hz: Any, duration_s: float) -> NDArray[np.float64]:
    """Sine of a constant or varying frequency."""
    frequency = np.broadcast_to(np.asarray(frequency_hz, float), (int(duration_s * RATE),))
    return np.sin(2 * np.pi * np.cumsum(frequency) / RATE)


def buzz(
    frequency_hz: Any, duration_s: float, tilt: float = 1.0, top_hz: float = 7000
) -> NDArray[np.float64]:
    """Harmonic sound: partial k has amplitude k ** -tilt."""
    frequency = np.broadcast_to(np.asarray(frequency_hz, float), (int(duration_s * RATE),))
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    count = max(1, min(60, int(top_hz / max(20.0, float(frequency.max())))))
    return sum(np.sin(k * phase) * k**-tilt for k in range(1, count + 1))


def ring(
    rng: np.random.Generator, partials_hz: Any, decay_s: float, duration_s: float
) -> NDArray[np.float64]:
    """Struck resonator: decaying partials, high ones faster."""
    time = seconds(duration_s)
    result = np.zeros_like(time)
    lowest = min(partials_hz)
    for partial in partials_hz:
        if partial < 7800:
            decay = decay_s * (lowest / partial) ** 0.6 * rng.uniform(0.6, 1.2)
            result += (
                rng.uniform(0.3, 1)
                * np.sin(2 * np.pi * partial * time + rng.uniform(0, 6))
                * np.exp(-time / decay)
            )
    return result


def hit(rng: np.random.Generator, low_hz: float, high_hz: float, decay_s: float) -> NDArray[np.float64]:
    """Short noise burst in a band."""
    duration_s = decay_s * 6
    return band(rng.standard_normal(int(duration_s * RATE) + 1), low_hz, high_hz) * np.exp(
        -np.arange(int(duration_s * RATE) + 1) / RATE / decay_s
    )


def scatter(duration_s: float, starts_s: Any, make: Callable[[], Any]) -> NDArray[np.float64]:
    """Adds one event made by `make` at each start."""
    result = np.zeros(int(duration_s * RATE))
    for start_s in starts_s:
        start = int(start_s * RATE)
        if start < len(result):
            event = make()[: len(result) - start]
            result[start : start + len(event)] += event
    return result


def bank(rng: np.random.Generator, make: Callable[[], Any], size: int = 24) -> Callable[[], Any]:
    """Picks from `size` events made once: for textures of hundreds of grains, which are slow to filter."""
    events = [make() for _ in range(size)]
    return lambda: events[rng.integers(size)] * rng.uniform(0.5, 1)


def beats(rng: np.random.Generator, duration_s: float, period_s: float, jitter: float = 0.1) -> list[float]:
    """Start times about `period_s` apart."""
    starts, now = [], rng.uniform(0, min(0.4, period_s))
    while now < duration_s - 0.05:
        starts.append(now)
        now += period_s * rng.uniform(1 - jitter, 1 + jitter)
    return starts


def random_starts(rng: np.random.Generator, duration_s: float, rate_hz: float) -> Any:
    """Start times of a Poisson process."""
    return np.sort(rng.uniform(0, duration_s, rng.poisson(rate_hz * duration_s)))


def gated(rng: np.random.Generator, waveform: Any, on_s: float, off_s: float) -> Any:
    """Switches a sound on and off."""
    time = np.arange(len(waveform)) / RATE + rng.uniform(0, on_s)
    gate = ((time % (on_s + off_s)) < on_s).astype(float)
    return waveform * np.convolve(gate, np.ones(80) / 80, "same")


def formants(waveform: Any, centres_hz: Any, width: float = 0.25) -> Any:
    """Sum of band-passes, as of a mouth."""
    return sum(band(waveform, centre * (1 - width), centre * (1 + width)) for centre in centres_hz)
