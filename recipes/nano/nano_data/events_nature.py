"""Families of animals, weather, water and fire; see `events` for their classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .synth import (
    RATE,
    band,
    bank,
    beats,
    buzz,
    formants,
    gated,
    hit,
    noise,
    random_starts,
    scatter,
    seconds,
    slow,
    tone,
)

Rng = np.random.Generator


# animal
def bird(rng: Rng, d: float) -> Any:
    base, depth, rate = rng.uniform(2000, 5000), rng.uniform(200, 1500), rng.uniform(5, 40)
    length = rng.uniform(0.05, 0.35)
    slope = rng.uniform(-1500, 1500)

    def chirp() -> Any:
        time = seconds(length)
        frequency = (
            base * rng.uniform(0.95, 1.05) + slope * time / length + depth * np.sin(2 * np.pi * rate * time)
        )
        return tone(frequency, length) * np.hanning(len(time))

    return scatter(d, beats(rng, d, rng.uniform(0.12, 0.7), 0.4), chirp)


def dog(rng: Rng, d: float) -> Any:
    pitch, length = rng.uniform(180, 600), rng.uniform(0.1, 0.28)

    def bark() -> Any:
        time = seconds(length)
        bend = pitch * (1 + 0.5 * np.sin(np.pi * time / length)) * rng.uniform(0.93, 1.07)
        source = buzz(bend, length, 0.6) + 0.8 * noise(rng, length, 1)[: len(time)]
        return formants(source, (pitch * 2.5, 1400, 2600)) * np.hanning(len(time)) ** 0.5

    return scatter(d, beats(rng, d, rng.uniform(0.35, 1.0), 0.35), bark)


def cat(rng: Rng, d: float) -> Any:
    pitch = rng.uniform(400, 800)

    def meow() -> Any:
        length = rng.uniform(0.5, 1.1)
        x = seconds(length) / length
        source = buzz(pitch * (0.8 + 0.6 * np.sin(np.pi * x**0.7)), length, 0.7)
        mouth = np.sin(np.pi * x)
        return (
            formants(source, (900, 2400)) * mouth + formants(source, (1700, 3200)) * (1 - mouth)
        ) * np.sin(np.pi * x)

    return scatter(d, beats(rng, d, rng.uniform(1.2, 2.2), 0.3), meow)


def cow(rng: Rng, d: float) -> Any:
    pitch = rng.uniform(80, 180)

    def moo() -> Any:
        length = rng.uniform(1.0, 2.2)
        x = seconds(length) / length
        source = (
            buzz(pitch * (0.9 + 0.3 * np.sin(np.pi * x)), length, 0.5) + 0.1 * noise(rng, length)[: len(x)]
        )
        return formants(source, (rng.uniform(350, 600), 900, 2300)) * np.sin(np.pi * x) ** 0.5

    return scatter(d, beats(rng, d, rng.uniform(2.2, 3.2), 0.2), moo)


def cricket(rng: Rng, d: float) -> Any:
    pulses = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * rng.uniform(15, 45) * seconds(d)))
    song = tone(rng.uniform(3000, 6000) + 60 * slow(rng, d, 4), d) * np.convolve(
        pulses, np.ones(60) / 60, "same"
    )
    return gated(rng, song, rng.uniform(0.15, 0.9), rng.uniform(0.1, 0.6))


def bee(rng: Rng, d: float) -> Any:
    return buzz(rng.uniform(130, 380) * slow(rng, d, 3, 0.9, 1.15), d, 0.7) * slow(rng, d, 2, 0.25, 1)


def frog(rng: Rng, d: float) -> Any:
    pitch, rate = rng.uniform(300, 1500), rng.uniform(20, 60)

    def croak() -> Any:
        length = rng.uniform(0.15, 0.5)
        pulses = np.maximum(0, np.sin(2 * np.pi * rate * seconds(length))) ** 3
        return formants(buzz(pitch / 4, length, 0.3), (pitch, pitch * 2.1)) * pulses

    return scatter(d, beats(rng, d, rng.uniform(0.5, 1.2), 0.3), croak)


def owl(rng: Rng, d: float) -> Any:
    pitch = rng.uniform(280, 650)

    def hoot() -> Any:
        length = rng.uniform(0.25, 0.8)
        x = seconds(length) / length
        return (
            tone(pitch * (1 + 0.08 * np.sin(np.pi * x)), length) + 0.05 * noise(rng, length, 1)[: len(x)]
        ) * np.sin(np.pi * x)

    return scatter(d, beats(rng, d, rng.uniform(0.7, 1.6), 0.4), hoot)


# weather and nature
def rain_steady(rng: Rng, d: float) -> Any:
    bed = band(noise(rng, d, rng.uniform(0, 0.7)), rng.uniform(300, 900), rng.uniform(5000, 7800))
    drops = scatter(
        d, random_starts(rng, d, rng.uniform(40, 150)), bank(rng, lambda: hit(rng, 1500, 7000, 0.003))
    )
    return bed + drops * rng.uniform(0.5, 3)


def rain_roof(rng: Rng, d: float) -> Any:
    pitch = rng.uniform(300, 1200)
    return scatter(
        d,
        random_starts(rng, d, rng.uniform(60, 180)),
        bank(rng, lambda: hit(rng, pitch * 0.6, pitch * rng.uniform(1.5, 4), 0.006) * rng.uniform(0.2, 1)),
    ) + 0.15 * noise(rng, d, 0.7)


def rain_heavy(rng: Rng, d: float) -> Any:
    return band(noise(rng, d, rng.uniform(0, 0.5)), 200, 7800) * slow(rng, d, 2, 0.8, 1) + 0.4 * rain_steady(
        rng, d
    )


def rain_light(rng: Rng, d: float) -> Any:
    drops = scatter(
        d, random_starts(rng, d, rng.uniform(20, 60)), bank(rng, lambda: hit(rng, 1000, 7500, 0.004))
    )
    return drops + 0.1 * band(noise(rng, d), 1500, 7500)


def wind_plain(rng: Rng, d: float) -> Any:
    return (
        band(noise(rng, d, 1.5), 80, rng.uniform(500, 1200))
        * slow(rng, d, rng.uniform(0.4, 1.2), 0.15, 1) ** 1.5
    )


def wind_howl(rng: Rng, d: float) -> Any:
    pieces, count = [], int(d / 0.1) + 1
    centre = slow(rng, count * 0.1, 0.6, rng.uniform(250, 500), rng.uniform(600, 1100))
    source = noise(rng, count * 0.1, 0.5)
    for number in range(count):
        cut = slice(int(number * 0.1 * RATE), int((number + 1) * 0.1 * RATE) + 400)
        middle = centre[min(cut.start, len(centre) - 1)]
        window = np.minimum(1, np.minimum(np.arange(2000) / 400, np.arange(2000)[::-1] / 400))
        piece = np.resize(source[cut], 2000)
        pieces.append(
            band(np.concatenate([piece[:200][::-1], piece]), middle * 0.85, middle * 1.15)[200:] * window
        )
    joined = iter(pieces)
    howl = scatter(d, np.arange(count) * 0.1, lambda: next(joined))
    return howl * slow(rng, d, 0.7, 0.2, 1) + 0.2 * wind_plain(rng, d)


def wind_gusts(rng: Rng, d: float) -> Any:
    gust = np.maximum(0, slow(rng, d, 0.9, -0.4, 1)) ** 2
    return band(noise(rng, d, 1.2), 60, 900) * (0.1 + gust) + band(noise(rng, d, 0.5), 900, 3000) * gust * 0.2


def _bubble(rng: Rng, low: float, high: float) -> Any:
    length, start = rng.uniform(0.02, 0.12), rng.uniform(low, high)
    time = seconds(length)
    return tone(start * (1 + rng.uniform(0.1, 0.8) * time / length), length) * np.exp(-time / length * 4)


def stream(rng: Rng, d: float) -> Any:
    bubbles = scatter(
        d, random_starts(rng, d, rng.uniform(60, 200)), bank(rng, lambda: _bubble(rng, 400, 2500), 60)
    )
    return bubbles + rng.uniform(0.05, 0.3) * band(noise(rng, d, 0.5), 400, 5000)


def drip(rng: Rng, d: float) -> Any:
    pitch = rng.uniform(600, 1800)
    return scatter(d, beats(rng, d, rng.uniform(0.3, 1.2), 0.3), lambda: _bubble(rng, pitch, pitch * 1.4))


def waves(rng: Rng, d: float) -> Any:
    swell = (0.5 - 0.5 * np.cos(2 * np.pi * seconds(d) / rng.uniform(3, 7) + rng.uniform(0, 6))) ** 2
    return band(noise(rng, d, 0.8), 150, 6000) * (0.1 + swell)


def flush(rng: Rng, d: float) -> Any:
    swell = np.minimum(1, seconds(d) / rng.uniform(0.1, 0.8)) * np.exp(-seconds(d) / rng.uniform(1.5, 6))
    gurgle = tone(slow(rng, d, 18, 150, rng.uniform(400, 900)), d) * slow(rng, d, 14, 0, 1)
    return (band(noise(rng, d, 0.5), 200, rng.uniform(3000, 7000)) + rng.uniform(0.2, 1) * gurgle) * (
        0.1 + swell
    )


def pouring(rng: Rng, d: float) -> Any:
    rise = np.linspace(1, rng.uniform(1.5, 3), int(d * RATE))
    glug = tone(rng.uniform(250, 600) * rise * slow(rng, d, 14, 0.9, 1.1), d) * slow(rng, d, 16, 0, 1)
    return glug * 0.5 + 0.6 * stream(rng, d)


def fire_small(rng: Rng, d: float) -> Any:
    crackle = scatter(
        d,
        random_starts(rng, d, rng.uniform(8, 30)),
        bank(rng, lambda: hit(rng, 1000, 7500, 0.002) * rng.exponential(0.7)),
    )
    return crackle * 2 + rng.uniform(0.05, 0.2) * band(noise(rng, d, 1.5), 60, 900) * slow(rng, d, 4, 0.4, 1)


def fire_big(rng: Rng, d: float) -> Any:
    crackle = scatter(
        d,
        random_starts(rng, d, rng.uniform(25, 80)),
        bank(rng, lambda: hit(rng, 500, 6000, 0.003) * rng.exponential(0.5)),
    )
    return crackle + rng.uniform(0.3, 0.9) * band(noise(rng, d, 1.3), 50, 1200) * slow(rng, d, 7, 0.3, 1)


def furnace(rng: Rng, d: float) -> Any:
    roar = band(noise(rng, d, rng.uniform(0.8, 1.8)), 40, rng.uniform(600, 3000)) * slow(rng, d, 9, 0.6, 1)
    return roar + rng.uniform(0.02, 0.3) * fire_small(rng, d)


def fire_sparks(rng: Rng, d: float) -> Any:
    spark = bank(rng, lambda: hit(rng, 2000, 7800, 0.0015) * rng.exponential(0.8))

    def burst() -> Any:
        length = rng.uniform(0.1, 0.5)
        return scatter(length, random_starts(rng, length, 70), spark)

    return scatter(d, random_starts(rng, d, 2.5), burst) + 0.15 * fire_big(rng, d)


def thunder_roll(rng: Rng, d: float) -> Any:
    rumble = band(noise(rng, d, 2), 25, rng.uniform(150, 400)) * np.exp(-seconds(d) / rng.uniform(1, 3))
    return rumble * slow(rng, d, 6, 0.3, 1)


def thunder_crack(rng: Rng, d: float) -> Any:
    crack = scatter(
        d, np.sort(rng.exponential(0.08, 15)), lambda: hit(rng, 100, 5000, 0.02) * rng.exponential(1)
    )
    return crack + 1.5 * thunder_roll(rng, d)


def explosion(rng: Rng, d: float) -> Any:
    def boom() -> Any:
        length = 2.0
        return band(noise(rng, length, 1.7), 25, rng.uniform(300, 900)) * np.exp(
            -seconds(length) / rng.uniform(0.2, 0.6)
        )

    return scatter(d, beats(rng, d, rng.uniform(1, 2.5), 0.5), boom)


def hiss(rng: Rng, d: float) -> Any:
    return noise(rng, d, rng.uniform(-0.3, 0.3))


def static(rng: Rng, d: float) -> Any:
    clicks = scatter(
        d, random_starts(rng, d, rng.uniform(5, 60)), bank(rng, lambda: hit(rng, 500, 7500, 0.0008))
    )
    return clicks + rng.uniform(0.1, 0.5) * noise(rng, d, rng.uniform(0, 0.5))


def hum(rng: Rng, d: float) -> Any:
    return buzz(rng.choice([50, 60, 100, 120]), d, rng.uniform(0.8, 1.5)) + rng.uniform(0.1, 0.6) * noise(
        rng, d, 0.5
    )


def pink(rng: Rng, d: float) -> Any:
    return noise(rng, d, rng.uniform(0.8, 1.3))
