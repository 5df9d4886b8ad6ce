"""How a file is read: which of its tracks, which of its channels, and what becomes of a damaged one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from audioflamingo.errors import ArgumentError
from audioflamingo.fields import check_fields, check_value, option

ChannelChoice = Literal["mix", "left", "right", "each"]
CHANNELS = get_args(ChannelChoice)
_AUDIO = "Audio"


@dataclass(frozen=True)
class Reading:
    """What is taken of an audio file. Every door has these fields, from here."""

    track: int | None = option(
        None,
        "Audio track to take, counted from 1. By default the one that the file marks as its default.",
        at_least=1,
        group=_AUDIO,
    )
    channel: ChannelChoice = option(
        "mix",
        "Channels to take: their mean, one side, or each for itself (one speaker a channel).",
        group=_AUDIO,
    )
    allow_damaged: bool = option(
        False,
        "Take what is left of a file that is cut short or damaged; a warning states what was lost.",
        group=_AUDIO,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        is_bool = isinstance(self.allow_damaged, bool)
        check_value(is_bool, "allow_damaged", self.allow_damaged, "True or False")
        check_value(self.channel in CHANNELS, "channel", self.channel, f"one of {', '.join(CHANNELS)}")

    def check_one(self) -> None:
        """Checks that one waveform comes out of it.

        Raises:
            ArgumentError: `channel` is "each".
        """
        if self.channel == "each":
            raise ArgumentError(
                "channel='each' gives one transcript a channel; a waveform is one: pass 'mix', 'left' or 'right'."
            )


def channel_names(num_channels: int) -> list[str | None]:
    """What channels that are heard each for itself are called; one alone has no name."""
    if num_channels == 1:
        return [None]
    if num_channels == 2:
        return ["left", "right"]
    return [f"channel {number}" for number in range(1, num_channels + 1)]
