"""Further families of sounds, for training only: what the others lack of their class; see `events`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .events_nature import fire_small
from .synth import (
    Family,
    band,
    bank,
    beats,
    buzz,
    gated,
    hit,
    noise,
    random_starts,
    ring,
    scatter,
    seconds,
    slow,
    tone,
)

Rng = np.random.Generator


def in_turn(events: Sequence[Any]) -> Callable[[], Any]:
    """Gives one after the other, for `scatter`."""
    following = iter(events)
    return lambda: next(following)


# alarm
def alarm_chime(rng: Rng, d: float) -> Any:
    """Groups of soft struck tones, again and again."""
    base, decay = rng.uniform(500, 2600), rng.uniform(0.03, 0.3)
    steps = rng.choice([1, 1, 1.25, 1.5, 2], rng.integers(1, 5))
    gap, pause = rng.uniform(0.07, 0.25), rng.uniform(0.2, 1.0)

    def group() -> Any:
        notes = [ring(rng, [base * step * k for k in (1, 2, 3.01)], decay, 6 * decay) for step in steps]
        starts = [gap * number for number in range(len(steps))]
        return scatter(gap * len(steps) + 6 * decay, starts, in_turn(notes))

    return scatter(d, beats(rng, d, gap * len(steps) + pause, 0.0), group)


def watch_beep(rng: Rng, d: float) -> Any:
    """Pure high pips in pairs or fours."""
    pip, count = rng.uniform(0.03, 0.09), rng.integers(1, 5)
    sound = gated(rng, tone(rng.uniform(2000, 4200), d), pip, pip * rng.uniform(0.7, 1.5))
    time = seconds(d) + rng.uniform(0, 1)
    return sound * ((time % 1.0) < 2 * pip * count)


def reversing_beep(rng: Rng, d: float) -> Any:
    """A lorry that goes backwards."""
    on = rng.uniform(0.3, 0.7)
    sound = gated(
        rng, buzz(rng.uniform(800, 1500), d, tilt=rng.uniform(1.5, 4)), on, on * rng.uniform(0.8, 1.3)
    )
    return sound + rng.uniform(0, 0.15) * band(noise(rng, d, 1.5), 40, 800)


def car_alarm(rng: Rng, d: float) -> Any:
    """Sweeps, yelps and pulses in turn."""
    time = seconds(d)
    turn = (time / rng.uniform(0.8, 1.6)).astype(int) % 3
    sweep = (time * rng.uniform(1.5, 6)) % 1
    yelp = 0.5 + 0.5 * np.sin(2 * np.pi * time * rng.uniform(3, 9))
    pulse = (time * rng.uniform(4, 10)).astype(int) % 2
    pitch = rng.uniform(600, 1100) * (1 + np.choose(turn, [sweep, yelp, pulse]))
    return buzz(pitch, d, tilt=rng.uniform(0.6, 1.6))


def klaxon(rng: Rng, d: float) -> Any:
    """A rough horn whose pitch rises and falls at each blow."""
    period = rng.uniform(0.8, 2.2)
    time = (seconds(d) + rng.uniform(0, period)) % period / period
    shape = np.clip(np.sin(np.pi * time) * 1.6, 0, 1)
    pitch = rng.uniform(120, 380) * (0.7 + 0.5 * shape)
    return buzz(pitch, d, tilt=rng.uniform(0.2, 0.9)) * shape * slow(rng, d, 40, 0.7, 1)


# machines
def sewing_machine(rng: Rng, d: float) -> Any:
    """Fast strokes over the hum of a motor."""
    stroke = bank(rng, lambda: hit(rng, rng.uniform(300, 1500), rng.uniform(2000, 6000), 0.008))
    strokes = scatter(d, beats(rng, d, 1 / rng.uniform(8, 24), 0.03), stroke)
    return strokes + rng.uniform(0.05, 0.4) * buzz(rng.uniform(60, 240), d, rng.uniform(0.5, 1.5))


def drill(rng: Rng, d: float) -> Any:
    """A small electric motor under changing load."""
    pitch = rng.uniform(150, 700) * slow(rng, d, rng.uniform(0.5, 3), 0.6, 1.2)
    return buzz(pitch, d, rng.uniform(0.2, 1.0)) + rng.uniform(0.1, 1) * band(noise(rng, d), 800, 7000)


def fan(rng: Rng, d: float) -> Any:
    """Moving air with the tone of blades or of a vacuum cleaner's motor."""
    air = band(noise(rng, d, rng.uniform(0.3, 1.8)), 40, rng.uniform(1500, 7000))
    return air + rng.uniform(0.2, 1.2) * buzz(rng.uniform(50, 400), d, rng.uniform(0.5, 1.5))


def idling(rng: Rng, d: float) -> Any:
    """Slow dull strokes of a big engine, heard from outside or from a cabin."""
    rate = rng.uniform(9, 28)
    stroke = bank(rng, lambda: hit(rng, 30, rng.uniform(120, 900), rng.uniform(0.01, 0.03)))
    strokes = scatter(d, beats(rng, d, 1 / rate, rng.uniform(0.02, 0.12)), stroke)
    return strokes + rng.uniform(0.02, 0.2) * noise(rng, d, rng.uniform(0.8, 2))


def railway(rng: Rng, d: float) -> Any:
    """Wheels over joints, two and two, on a rumble."""
    period, gap = rng.uniform(0.45, 1.3), rng.uniform(0.12, 0.22)

    def pair() -> Any:
        knocks = [hit(rng, rng.uniform(80, 300), rng.uniform(600, 3000), 0.02) for _ in range(2)]
        return scatter(gap + 0.2, [0, gap], in_turn(knocks))

    rumble = band(noise(rng, d, 1.5), 30, rng.uniform(300, 1500)) * slow(rng, d, 5, 0.5, 1)
    return scatter(d, beats(rng, d, period, 0.03), pair) + rng.uniform(0.1, 0.6) * rumble


# nature
def fire_roar(rng: Rng, d: float) -> Any:
    """Flames that flutter, with few cracks in them."""
    flutter = slow(rng, d, rng.uniform(6, 18), 0.25, 1) * slow(rng, d, 1.5, 0.6, 1)
    roar = band(noise(rng, d, rng.uniform(1.2, 2.2)), 30, rng.uniform(200, 1500)) * flutter
    return roar + rng.uniform(0.0, 0.15) * fire_small(rng, d)


def fire_muffled(rng: Rng, d: float) -> Any:
    """A stove: cracks through its door."""
    crack = bank(rng, lambda: hit(rng, 200, rng.uniform(1200, 3000), 0.006) * rng.exponential(0.6))
    cracks = scatter(d, random_starts(rng, d, rng.uniform(3, 18)), crack)
    return cracks + rng.uniform(0.1, 0.5) * band(noise(rng, d, 1.8), 30, 600) * slow(rng, d, 8, 0.4, 1)


def bubbles(rng: Rng, d: float) -> Any:
    """Short tones that rise: bubbles, a brook at close range."""

    def bubble() -> Any:
        length = rng.uniform(0.02, 0.1)
        time = seconds(length)
        pitch = rng.uniform(250, 1800) * (1 + rng.uniform(0.1, 1) * time / length)
        return tone(pitch, length) * np.exp(-time / length * 3) * rng.exponential(0.6)

    plain = scatter(d, random_starts(rng, d, rng.uniform(4, 50)), bank(rng, bubble, 40))
    return plain + rng.uniform(0, 0.15) * band(noise(rng, d, 0.5), 300, 6000)


def splash(rng: Rng, d: float) -> Any:
    """Something falls into water, or walks in it."""

    def one() -> Any:
        length = rng.uniform(0.3, 0.9)
        shape = np.exp(-seconds(length) / rng.uniform(0.06, 0.25))
        spray = (
            band(noise(rng, length, rng.uniform(0, 1)), rng.uniform(150, 500), rng.uniform(2500, 7500))
            * shape
        )
        return spray + 0.7 * bubbles(rng, length)[: len(spray)]

    return scatter(d, beats(rng, d, rng.uniform(0.6, 2.5), 0.5), one)


def waterfall(rng: Rng, d: float) -> Any:
    """A steady rush with a little babble."""
    rush = band(noise(rng, d, rng.uniform(0.2, 1.2)), rng.uniform(100, 400), 7500) * slow(rng, d, 12, 0.75, 1)
    return rush + rng.uniform(0.2, 0.8) * bubbles(rng, d)


def wind_far(rng: Rng, d: float) -> Any:
    """Dull wind, as from inside."""
    return band(noise(rng, d, rng.uniform(1, 2)), 40, rng.uniform(250, 1000)) * slow(rng, d, 0.8, 0.25, 1)


def growl(rng: Rng, d: float) -> Any:
    """A large animal: a rough low voice in breaths."""

    def breath() -> Any:
        length = rng.uniform(0.5, 1.6)
        pitch = rng.uniform(45, 160) * slow(rng, length, 4, 0.8, 1.2)
        voice = buzz(pitch, length, 0.6) * slow(rng, length, rng.uniform(20, 45), 0.2, 1)
        throat = band(voice + noise(rng, length, 1) * 0.6, rng.uniform(100, 300), rng.uniform(700, 2200))
        return throat * np.sin(np.pi * np.linspace(0, 1, len(throat))) ** 0.5

    return scatter(d, beats(rng, d, rng.uniform(1.2, 2.5), 0.3), breath)


def birds(rng: Rng, d: float) -> Any:
    """Many birds at once, near and far."""

    def chirp() -> Any:
        length = rng.uniform(0.04, 0.25)
        bend = rng.uniform(-0.3, 0.3) * np.linspace(-1, 1, int(length * 16000)) ** rng.integers(1, 3)
        pitch = rng.uniform(1800, 6000) * (1 + bend)
        return tone(pitch, length) * np.hanning(len(pitch)) * rng.exponential(0.5)

    return scatter(d, random_starts(rng, d, rng.uniform(3, 15)), bank(rng, chirp, 30)) + 0.03 * noise(
        rng, d, 1
    )


# people and things
def steps_soft(rng: Rng, d: float) -> Any:
    """Heel and toe on a carpet, earth or a soft sole: dull, each in two parts."""
    top, gap = rng.uniform(200, 1200), rng.uniform(0.05, 0.13)

    def step() -> Any:
        heel, toe = hit(rng, 30, top, 0.02), rng.uniform(0.2, 0.7) * hit(rng, 60, top * 2, 0.012)
        return scatter(0.4, [0, gap], in_turn([heel, toe])) * rng.uniform(0.5, 1)

    scuff = band(noise(rng, d, 0.5), 500, 5000) * slow(rng, d, 4, 0, 1) ** 4
    return scatter(d, beats(rng, d, rng.uniform(0.28, 0.8), 0.08), step) + rng.uniform(0, 0.1) * scuff


def coins(rng: Rng, d: float) -> Any:
    """Coins, keys or small metal things that jingle."""
    pitches = rng.uniform(2200, 7000, 8)
    tinkle = bank(rng, lambda: ring(rng, rng.choice(pitches, 3), rng.uniform(0.02, 0.12), 0.3))
    starts = np.concatenate(
        [
            start + rng.exponential(0.08, rng.integers(2, 12))
            for start in beats(rng, d, rng.uniform(0.4, 1.5), 0.4)
        ]
    )
    return scatter(d, np.sort(starts), tinkle)


def vibration(rng: Rng, d: float) -> Any:
    """A telephone that vibrates on a table."""
    motor = buzz(rng.uniform(120, 220), d, rng.uniform(0.2, 0.8)) * slow(rng, d, 60, 0.7, 1)
    return gated(rng, band(motor, 80, rng.uniform(900, 3000)), rng.uniform(0.3, 1.2), rng.uniform(0.2, 1))


def ringtone(rng: Rng, d: float) -> Any:
    """A short tune of electronic notes, again and again."""
    note, count = rng.uniform(0.07, 0.18), int(rng.integers(4, 12))
    scale = rng.uniform(500, 1300) * 2 ** (rng.choice([0, 2, 4, 5, 7, 9, 12, 14], count) / 12)
    place = (seconds(d) / note).astype(int) % (count + int(rng.integers(0, 6)))
    sound = buzz(np.append(scale, scale[0])[np.minimum(place, count)], d, tilt=rng.uniform(1, 4))
    phase = (seconds(d) / note) % 1
    return sound * (place < count) * np.clip(6 * (1 - phase), 0, 1)


FAMILIES: dict[str, tuple[Family, ...]] = {
    "alarm": (alarm_chime, watch_beep, reversing_beep, car_alarm, klaxon),
    "animal": (growl, birds),
    "engine": (sewing_machine, drill, fan, idling, railway),
    "fire": (fire_roar, fire_muffled),
    "footsteps": (steps_soft,),
    "metal": (coins,),
    "telephone": (vibration, ringtone),
    "water": (bubbles, splash, waterfall),
    "wind": (wind_far,),
}
