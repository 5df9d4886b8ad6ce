"""Families of things and people: alarms, machines, steps, bells, telephones; see `events`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .synth import (
    RATE,
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


# alarm
def siren_wail(rng: Rng, d: float) -> Any:
    sweep = 0.5 - 0.5 * np.cos(2 * np.pi * seconds(d) / rng.uniform(1.5, 6) + rng.uniform(0, 6))
    low = rng.uniform(350, 700)
    return buzz(low + sweep * rng.uniform(400, 900), d, tilt=rng.uniform(0.8, 2))


def siren_yelp(rng: Rng, d: float) -> Any:
    phase = (seconds(d) * rng.uniform(2, 6)) % 1
    return buzz(rng.uniform(500, 800) + phase * rng.uniform(300, 1000), d, tilt=rng.uniform(0.8, 2))


def smoke_alarm(rng: Rng, d: float) -> Any:
    sound = buzz(rng.uniform(2200, 3800), d, tilt=2)
    beep, gap = rng.uniform(0.08, 0.5), rng.uniform(0.05, 0.5)
    groups = gated(rng, np.ones_like(sound), 3 * (beep + gap), rng.choice([0, 0.8, 1.4]))
    return gated(rng, sound, beep, gap) * groups


def buzzer(rng: Rng, d: float) -> Any:
    return gated(rng, buzz(rng.uniform(150, 600), d, tilt=0.3), rng.uniform(0.25, 1.2), rng.uniform(0.1, 0.6))


def alarm_clock(rng: Rng, d: float) -> Any:
    beep, gap, count = rng.uniform(0.04, 0.12), rng.uniform(0.04, 0.1), rng.integers(1, 6)
    sound = buzz(rng.uniform(700, 3000), d, tilt=rng.uniform(1, 4))
    groups = gated(rng, np.ones_like(sound), count * (beep + gap), rng.uniform(0.25, 0.9))
    return gated(rng, sound, beep, gap) * groups


def horn(rng: Rng, d: float) -> Any:
    base = rng.uniform(180, 520)
    parts = [base * factor for factor in (1, rng.uniform(1.15, 1.35), rng.uniform(1.4, 1.7))]
    sound = sum(buzz(part, d, tilt=rng.uniform(0.3, 1.2)) for part in parts[: rng.integers(1, 4)])
    return gated(rng, sound, rng.uniform(0.4, 2.5), rng.uniform(0.2, 1.0))


def siren_two_tone(rng: Rng, d: float) -> Any:
    low = rng.uniform(380, 600)
    high = low * rng.uniform(1.2, 1.5)
    chosen = np.where((seconds(d) / rng.uniform(0.4, 0.8)).astype(int) % 2, low, high)
    return buzz(chosen, d, tilt=rng.uniform(0.6, 1.6))


# people
def _claps(rng: Rng, d: float, rate: float) -> Any:
    centre = rng.uniform(900, 2200)

    def clap() -> Any:
        return hit(
            rng, centre * rng.uniform(0.5, 0.9), centre * rng.uniform(1.3, 2.5), rng.uniform(0.003, 0.012)
        ) * (rng.uniform(0.2, 1))

    return scatter(d, random_starts(rng, d, rate), bank(rng, clap))


def applause_big(rng: Rng, d: float) -> Any:
    return _claps(rng, d, rng.uniform(120, 350)) * slow(rng, d, 0.6, 0.5, 1)


def applause_swelling(rng: Rng, d: float) -> Any:
    return _claps(rng, d, rng.uniform(90, 250)) * np.linspace(
        rng.uniform(0, 1.5), rng.uniform(0, 1.5), int(d * RATE)
    )


def applause_small(rng: Rng, d: float) -> Any:
    return _claps(rng, d, rng.uniform(25, 80))


def footsteps(rng: Rng, d: float, low: float, high: float, decay: float) -> Any:
    def step() -> Any:
        heel = hit(rng, low, high, decay) * rng.uniform(0.7, 1)
        toe = hit(rng, low * 1.3, high * 1.3, decay * 0.8) * rng.uniform(0.2, 0.6)
        gap = np.zeros(int(rng.uniform(0.05, 0.11) * RATE))
        both = np.concatenate([gap, toe])
        both[: len(heel)] += heel[: len(both)]
        return both

    return scatter(d, beats(rng, d, rng.uniform(0.28, 0.75), 0.08), step)


def steps_hard(rng: Rng, d: float) -> Any:
    return footsteps(rng, d, rng.uniform(600, 1500), rng.uniform(2500, 5000), rng.uniform(0.006, 0.015))


def steps_wood(rng: Rng, d: float) -> Any:
    return footsteps(rng, d, rng.uniform(80, 200), rng.uniform(500, 1100), rng.uniform(0.02, 0.05))


def steps_gravel(rng: Rng, d: float) -> Any:
    grain = bank(rng, lambda: hit(rng, 1500, 6000, 0.004))

    def crunch() -> Any:
        length = rng.uniform(0.12, 0.3)
        grains = scatter(length, random_starts(rng, length, 160), grain)
        return grains * np.hanning(len(grains)) ** 0.5

    return scatter(d, beats(rng, d, rng.uniform(0.35, 0.75), 0.1), crunch)


def steps_snow(rng: Rng, d: float) -> Any:
    def crunch() -> Any:
        length = rng.uniform(0.15, 0.3)
        return (
            band(noise(rng, length, 0.5), 700, 3500) * np.hanning(int(length * RATE)) * slow(rng, length, 60)
        )

    return scatter(d, beats(rng, d, rng.uniform(0.4, 0.8), 0.1), crunch)


def _knocks(rng: Rng, d: float, modes: Any, decay: float) -> Any:
    def knock() -> Any:
        body = ring(rng, modes, decay, decay * 6)
        return body * rng.uniform(0.6, 1) + 0.5 * np.resize(hit(rng, 300, 2500, 0.004), len(body)) * (
            np.arange(len(body)) < 0.02 * RATE
        )

    period, starts, now = rng.uniform(0.12, 0.32), [], rng.uniform(0, 0.4)
    while now < d:
        for _ in range(rng.integers(2, 6)):
            starts.append(now)
            now += period * rng.uniform(0.9, 1.1)
        now += rng.uniform(0.5, 1.4)
    return scatter(d, starts, knock)


def knock_door(rng: Rng, d: float) -> Any:
    return _knocks(rng, d, rng.uniform(90, 700, 5), rng.uniform(0.02, 0.06))


def knock_table(rng: Rng, d: float) -> Any:
    return _knocks(rng, d, rng.uniform(200, 1500, 4), rng.uniform(0.01, 0.03))


def knock_hollow(rng: Rng, d: float) -> Any:
    return _knocks(rng, d, np.array([1, 2.3, 3.9]) * rng.uniform(130, 330), rng.uniform(0.04, 0.09))


# machines
def _engine(rng: Rng, d: float, firing: Any, rough: float, low: float, high: float) -> Any:
    firing = firing * slow(rng, d, 25, 1 - 0.03 * rough, 1 + 0.03 * rough)
    beat = buzz(firing, d, tilt=rng.uniform(0.2, 0.8), top_hz=3000) * (1 + rough * 0.3 * tone(firing / 4, d))
    return band(beat, low, high) / 2 + rng.uniform(0.1, 0.5) * band(noise(rng, d, 1), 100, 4000)


def car(rng: Rng, d: float) -> Any:
    return _engine(rng, d, slow(rng, d, 0.5, 45, rng.uniform(60, 140)), 1, 40, rng.uniform(700, 2500))


def motorcycle(rng: Rng, d: float) -> Any:
    rise = slow(rng, d, 0.7, rng.uniform(50, 90), rng.uniform(120, 260))
    return _engine(rng, d, rise, 1.5, 60, rng.uniform(1500, 4000))


def propeller(rng: Rng, d: float) -> Any:
    blade = rng.uniform(60, 130)
    return _engine(rng, d, blade + 2 * slow(rng, d, 1), 0.4, 50, 3000) * (
        1 + 0.4 * tone(rng.uniform(1, 14), d)
    )


def _passing(rng: Rng, d: float) -> tuple[Any, Any]:
    """How loud something is that flies by (N,), and how its pitch falls meanwhile."""
    away = (seconds(d) - rng.uniform(0.2, 0.8) * d) * rng.uniform(0.4, 1.5)
    return 1 / (1 + away**2), 1 - rng.uniform(0.03, 0.15) * away / np.sqrt(1 + away**2)


def aeroplane(rng: Rng, d: float) -> Any:
    loud, pitch = _passing(rng, d)
    drone = buzz(rng.uniform(70, 180) * pitch * slow(rng, d, 4, 0.99, 1.01), d, rng.uniform(0.3, 1), 4000)
    return (
        band(drone, 60, rng.uniform(1000, 4000)) + rng.uniform(0.2, 1) * band(noise(rng, d, 1), 60, 3000)
    ) * loud


def jet(rng: Rng, d: float) -> Any:
    loud, pitch = _passing(rng, d)
    whine = tone(rng.uniform(900, 4000) * pitch, d) * rng.uniform(0, 0.3)
    return (whine + band(noise(rng, d, rng.uniform(0.6, 1.4)), 40, rng.uniform(2000, 7000))) * loud


def machine(rng: Rng, d: float) -> Any:
    hum = buzz(rng.uniform(80, 400) * slow(rng, d, 0.5, 0.98, 1.02), d, rng.uniform(0.5, 1.2))
    return hum + rng.uniform(0.5, 2) * band(noise(rng, d, 0.5), 500, 6000)


def diesel(rng: Rng, d: float) -> Any:
    rate = rng.uniform(18, 38)
    clatter = scatter(
        d, beats(rng, d, 1 / rate, 0.05), bank(rng, lambda: hit(rng, 80, rng.uniform(700, 1600), 0.012))
    )
    return clatter + 0.3 * band(noise(rng, d, 1), 60, 2000)


def ticking(rng: Rng, d: float, low: float, high: float, period: float) -> Any:
    partials = [rng.uniform(low, high, 4), rng.uniform(low, high, 4) * rng.uniform(0.7, 0.95)]
    state = [0]

    def tick() -> Any:
        state[0] ^= 1
        return ring(rng, partials[state[0]], rng.uniform(0.006, 0.014), 0.08) * rng.uniform(0.8, 1)

    return scatter(d, beats(rng, d, period, 0.01), tick)


def clock_wall(rng: Rng, d: float) -> Any:
    return ticking(rng, d, 1500, 5000, rng.choice([0.5, 1.0]))


def clock_watch(rng: Rng, d: float) -> Any:
    return ticking(rng, d, 3000, 7000, rng.uniform(0.18, 0.26))


def clock_tall(rng: Rng, d: float) -> Any:
    return ticking(rng, d, 700, 2500, rng.uniform(0.7, 1.1))


# struck things
def church_bell(rng: Rng, d: float) -> Any:
    base = rng.uniform(160, 520)
    partials = base * np.array([0.5, 1, 1.2, 1.5, 2, 2.5, 3, 4.1]) * rng.uniform(0.995, 1.005, 8)
    return scatter(
        d, beats(rng, d, rng.uniform(1.0, 2.5), 0.05), lambda: ring(rng, partials, rng.uniform(1.5, 4), 5)
    )


def hand_bell(rng: Rng, d: float) -> Any:
    base = rng.uniform(900, 2600)
    partials = base * np.array([1, 2.0, 2.76, 3.9, 5.4])
    return scatter(
        d, beats(rng, d, rng.uniform(0.15, 0.6), 0.25), lambda: ring(rng, partials, rng.uniform(0.3, 1), 2)
    )


def door_bell(rng: Rng, d: float) -> Any:
    first = rng.uniform(500, 900)
    notes = iter([first, first * rng.uniform(0.7, 0.85)] * 20)

    def strike() -> Any:
        note = next(notes)
        return ring(rng, note * np.array([1, 2.01, 3.03, 5.1]), rng.uniform(0.6, 1.2), 2.5)

    return scatter(d, beats(rng, d, rng.uniform(0.5, 0.8), 0.03), strike)


def ding(rng: Rng, d: float) -> Any:
    partials = (
        rng.uniform(700, 3200) * np.array([1, rng.uniform(2, 3), rng.uniform(3.5, 5.5)])[: rng.integers(1, 4)]
    )
    decay = rng.uniform(0.08, 0.8)
    return scatter(d, beats(rng, d, rng.uniform(0.8, 2.5), 0.1), lambda: ring(rng, partials, decay, 2.5))


def wind_chime(rng: Rng, d: float) -> Any:
    notes = rng.uniform(1000, 3500, 6)
    return scatter(
        d,
        random_starts(rng, d, rng.uniform(2, 6)),
        lambda: ring(rng, rng.choice(notes) * np.array([1, 2.76, 5.4]), 1.0, 3) * rng.uniform(0.3, 1),
    )


def ship_bell(rng: Rng, d: float) -> Any:
    partials = rng.uniform(550, 1100) * np.array([1, 1.19, 1.56, 2.0, 2.5, 3.1, 4.2])
    starts = [start + extra for start in beats(rng, d, rng.uniform(1.0, 1.6), 0.02) for extra in (0, 0.28)]
    return scatter(d, starts, lambda: ring(rng, partials, rng.uniform(0.8, 2), 3))


def glass_break(rng: Rng, d: float) -> Any:
    def crash() -> Any:
        length = rng.uniform(0.6, 1.4)
        starts = np.sort(rng.exponential(length / 5, rng.integers(25, 80)))
        shards = scatter(
            length, starts, lambda: ring(rng, rng.uniform(2000, 7500, 4), rng.uniform(0.02, 0.12), 0.5)
        )
        burst = hit(rng, 2500, 7500, 0.05) * 3
        shards[: len(burst)] += burst[: len(shards)]
        return shards

    return scatter(d, beats(rng, d, rng.uniform(1.5, 3), 0.3), crash)


def glass_clink(rng: Rng, d: float) -> Any:
    partials = rng.uniform(1800, 4000) * np.array([1, 2.3, 2.9, 4.1])
    return scatter(
        d, beats(rng, d, rng.uniform(0.3, 1.0), 0.4), lambda: ring(rng, partials, rng.uniform(0.1, 0.4), 1)
    )


def glass_bottles(rng: Rng, d: float) -> Any:
    return scatter(
        d,
        random_starts(rng, d, rng.uniform(3, 9)),
        lambda: ring(rng, rng.uniform(1400, 6000, 3), rng.uniform(0.04, 0.2), 0.6) * rng.uniform(0.3, 1),
    )


def hammer(rng: Rng, d: float) -> Any:
    partials = rng.uniform(400, 1400) * np.array([1, 1.62, 2.41, 3.3, 4.6, 6.1])
    return scatter(
        d, beats(rng, d, rng.uniform(0.35, 1.0), 0.1), lambda: ring(rng, partials, rng.uniform(0.1, 0.5), 1.5)
    )


def metal_clang(rng: Rng, d: float) -> Any:
    return scatter(
        d,
        random_starts(rng, d, rng.uniform(1, 3)),
        lambda: (
            ring(rng, rng.uniform(300, 5000, 9), rng.uniform(0.2, 0.8), 2)
            + np.resize(hit(rng, 800, 6000, 0.02), 32000) * (np.arange(32000) < 1500)
        ),
    )


def metal_rattle(rng: Rng, d: float) -> Any:
    modes = rng.uniform(900, 6500, 10)
    chain = scatter(
        d,
        random_starts(rng, d, rng.uniform(18, 45)),
        bank(rng, lambda: ring(rng, rng.choice(modes, 3), rng.uniform(0.01, 0.05), 0.2)),
    )
    return chain * slow(rng, d, 3, 0.2, 1)


# telephone
def keypad(rng: Rng, d: float) -> Any:
    rows, columns = (697, 770, 852, 941), (1209, 1336, 1477)
    length = rng.uniform(0.07, 0.25)

    def key() -> Any:
        return tone(rng.choice(rows), length) + tone(rng.choice(columns), length)

    return scatter(d, beats(rng, d, length + rng.uniform(0.05, 0.3), 0.2), key)


def dial_tone(rng: Rng, d: float) -> Any:
    first, second = ((350, 440), (425, 425), (400, 450))[rng.integers(3)]
    return tone(first * rng.uniform(0.99, 1.01), d) + tone(second, d)


def line_busy(rng: Rng, d: float) -> Any:
    first, second = ((480, 620), (425, 425), (400, 400))[rng.integers(3)]
    return gated(
        rng, tone(first, d) + tone(second, d), *((0.5, 0.5), (0.25, 0.25), (0.375, 0.375))[rng.integers(3)]
    )


def ringing_old(rng: Rng, d: float) -> Any:
    partials = rng.uniform(900, 1700) * np.array([1, 1.18, 2.1, 2.9, 4.0])
    clapper = scatter(d, beats(rng, d, 1 / rng.uniform(18, 28), 0.02), lambda: ring(rng, partials, 0.12, 0.5))
    return gated(rng, clapper, rng.uniform(0.8, 2), rng.uniform(0.6, 3))


def ringing_electronic(rng: Rng, d: float) -> Any:
    low = rng.uniform(600, 1300)
    warble = np.where((seconds(d) * rng.uniform(14, 30)).astype(int) % 2, low, low * rng.uniform(1.15, 1.4))
    return gated(rng, buzz(warble, d, 1.5), rng.uniform(0.5, 1.5), rng.uniform(0.3, 2))


def ringback(rng: Rng, d: float) -> Any:
    return gated(
        rng, tone(440 * rng.uniform(0.97, 1.03), d) + tone(480, d), rng.uniform(0.8, 2), rng.uniform(0.8, 3)
    )
