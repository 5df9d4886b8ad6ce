"""Standard MIDI files, format 0: just enough to play notes at given times."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_SECOND = 1000


@dataclass(frozen=True)
class Note:
    """A note: MIDI channel 0-15 (9 is drums), key 0-127, start and length in seconds, velocity 1-127."""

    channel: int
    key: int
    start_s: float
    length_s: float
    velocity: int


@dataclass(frozen=True)
class Program:
    """A change of instrument."""

    channel: int
    program: int
    start_s: float


def _variable_length(value: int) -> bytes:
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(0x80 | value & 0x7F)
    return bytes(reversed(groups))


def midi_bytes(programs: list[Program], notes: list[Note], end_s: float) -> bytes:
    """The file's bytes; a tick is a millisecond."""
    events: list[tuple[int, int, bytes]] = []
    for program in programs:
        message = bytes([0xC0 | program.channel, program.program])
        events.append((round(program.start_s * TICKS_PER_SECOND), 0, message))
    for note in notes:
        on, off = (
            round(note.start_s * TICKS_PER_SECOND),
            round((note.start_s + note.length_s) * TICKS_PER_SECOND),
        )
        events.append((on, 2, bytes([0x90 | note.channel, note.key, note.velocity])))
        events.append((max(off, on + 1), 1, bytes([0x80 | note.channel, note.key, 0])))
    events.sort(key=lambda event: event[:2])
    track = bytearray(b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big"))  # one second a quarter note
    now = 0
    for tick, _, message in events:
        track += _variable_length(tick - now) + message
        now = tick
    track += _variable_length(max(0, round(end_s * TICKS_PER_SECOND) - now)) + b"\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS_PER_SECOND)
    return header + b"MTrk" + struct.pack(">I", len(track)) + bytes(track)


def write_midi(path: Path, programs: list[Program], notes: list[Note], end_s: float) -> None:
    """Writes a MIDI file."""
    path.write_bytes(midi_bytes(programs, notes, end_s))
