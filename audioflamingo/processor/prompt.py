"""What the model reads: token ids and the audio windows behind them. The one noun of processor, engine and training.

`PromptText` is a prompt before its audio is known, with one `<sound>` for each clip; `Prompt` has one for each audio
token. Neither knows padding: that is `collate`'s, and `unbatch` takes it away again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from audioflamingo.audio.loading import conv_length, num_audio_tokens
from audioflamingo.config import IGNORED_LABEL
from audioflamingo.errors import PromptError

Features = tuple[Tensor, int]  # log-mel (M, T) of one window, and how many of its frames are valid


@dataclass(frozen=True, eq=False)
class AudioWindow:
    """At most 30 s of a clip, ready for the encoder.

    Attributes:
        features: log-mel `(M, T)`, the whole window as the feature extractor makes it.
        num_frames: valid ones among its frames; they come first.
        start: position of its first audio token in the prompt.
        index: which window of its clip it is, for models that hear the time; None for others, to which all are alike.
    """

    features: Tensor
    num_frames: int
    start: int
    index: int | None = None

    @property
    def num_tokens(self) -> int:
        """Its audio tokens; none where the tail of a clip has less than 30 ms."""
        return num_audio_tokens(self.num_frames)

    @property
    def end(self) -> int:
        """Position behind its last audio token."""
        return self.start + self.num_tokens

    @property
    def seen(self) -> Tensor:
        """The features that the encoder looks at, `(M, <= T)`: what lies behind changes nothing. A view."""
        return _seen(self.features, self.num_frames)

    @cached_property
    def key(self) -> bytes:
        """Digest of what the encoder sees: windows with equal keys give equal audio tokens."""
        key = window_key(self.features, self.num_frames)
        if not self.index:
            return key
        return hashlib.blake2b(key + self.index.to_bytes(4, "little"), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row that the model reads.

    Attributes:
        token_ids: with `<sound>` repeated for each audio token.
        windows: in order.
        labels: what training learns at each position, `IGNORED_LABEL` for nothing; None where nobody trains.
    """

    token_ids: list[int]
    windows: tuple[AudioWindow, ...] = ()
    labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_audio_tokens(self) -> int:
        """Audio tokens among the `token_ids`."""
        return sum(window.num_tokens for window in self.windows)

    @cached_property
    def identity(self) -> np.ndarray:
        """What makes each token unique, int64 `(S,)`: equal beginnings mean equal keys and values.

        The id of a text token; a negative number that stands for the window of an audio token, the same for all of
        its tokens: equal beginnings align them. Computed once, which reads every window: about a millisecond each.
        """
        identity = np.array(self.token_ids, dtype=np.int64)
        for window in self.windows:
            identity[window.start : window.end] = -1 - (int.from_bytes(window.key[:8], "big") >> 1)
        return identity


@dataclass(frozen=True, eq=False)
class PromptText:
    """A prompt in which one `<sound>` stands for each clip.

    Attributes:
        token_ids: whole numbers `(S,)`.
        audio_token_id: the id of `<sound>`.
        labels: `(S,)`, or None.
        marks: ids that stand before and behind the audio tokens of each clip, for models that hear the time; None for
            Audio Flamingo 3.
    """

    token_ids: np.ndarray
    audio_token_id: int
    labels: np.ndarray | None = None
    marks: tuple[int, int] | None = None

    @property
    def num_clips(self) -> int:
        """Clips that it is about."""
        return int((self.token_ids == self.audio_token_id).sum())

    def expand(self, num_audio_tokens: Sequence[int]) -> Prompt:
        """Repeats each `<sound>` once for each audio token of its clip, between the marks if there are any.

        Args:
            num_audio_tokens: of each clip, in order.

        Returns:
            The prompt, without windows: for whoever has the audio in another form. Labels of audio positions are
            `IGNORED_LABEL`.

        Raises:
            PromptError: there are more or fewer clips than `<sound>`.
        """
        if len(num_audio_tokens) != self.num_clips:
            raise PromptError(f"the text has {self.num_clips} <sound> for {len(num_audio_tokens)} clip(s).")
        is_audio = self.token_ids == self.audio_token_id
        ids, labels = self.token_ids, self.labels
        if labels is not None:
            labels = np.where(is_audio, IGNORED_LABEL, labels)
        if self.marks is not None:
            places = np.flatnonzero(is_audio)
            around = np.stack([places, places + 1], axis=1).ravel()
            ids = np.insert(ids, around, np.tile(self.marks, len(places)))
            is_audio = np.insert(is_audio, around, False)
            labels = None if labels is None else np.insert(labels, around, IGNORED_LABEL)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[is_audio] = num_audio_tokens
        token_ids = np.repeat(ids, repeats).tolist()
        return Prompt(token_ids, labels=None if labels is None else np.repeat(labels, repeats).tolist())

    def with_audio(self, clips: Sequence[Sequence[Features]]) -> Prompt:
        """The prompt with the windows of its clips.

        Args:
            clips: for each clip its windows.

        Raises:
            PromptError: there are more or fewer clips than `<sound>`.
        """
        prompt = self.expand([sum(num_audio_tokens(count) for _, count in windows) for windows in clips])
        windows = [window for clip in clips for window in clip]
        indices = None if self.marks is None else [index for clip in clips for index in range(len(clip))]
        placed = place_windows(prompt.token_ids, self.audio_token_id, windows, indices)
        return Prompt(prompt.token_ids, placed, prompt.labels)


def place_windows(
    token_ids: Sequence[int],
    audio_token_id: int,
    windows: Sequence[Features],
    indices: Sequence[int] | None = None,
) -> tuple[AudioWindow, ...]:
    """Gives each window of a prompt its place: the next audio tokens, as many as it has.

    Args:
        token_ids: the prompt.
        audio_token_id: the id of `<sound>`.
        windows: in order.
        indices: which window of its clip each one is; None for a model to which it does not matter.

    Raises:
        PromptError: the windows have more or fewer audio tokens than there are, or one of them would be torn apart.
    """
    positions = np.flatnonzero(np.asarray(token_ids, dtype=np.int64) == audio_token_id)
    counts = [num_audio_tokens(num_frames) for _, num_frames in windows]
    if sum(counts) != len(positions):
        raise PromptError(
            f"a prompt has {len(positions)} audio tokens, its audio gives {sum(counts)}; both must come from one call "
            "of the processor."
        )
    placed = []
    numbers = [None] * len(windows) if indices is None else indices
    for (features, num_frames), index, end, count in zip(
        windows, numbers, np.cumsum(counts), counts, strict=True
    ):
        # The tail of a clip can be too short for an audio token: such a window lies, empty, behind the one before.
        last = positions[end - 1] if end else -1
        first = positions[end - count] if count else last + 1
        if last - first != count - 1:
            raise PromptError(
                f"the {count} audio tokens of a window must stand together; in the prompt they lie between "
                f"positions {first} and {last}."
            )
        placed.append(AudioWindow(features, num_frames, int(first), index))
    return tuple(placed)


def window_key(features: Tensor, num_frames: int) -> bytes:
    """Digest of what the encoder sees of a window `(M, T)` with `num_frames` valid frames."""
    seen = _seen(features, num_frames).float().cpu().contiguous()
    header = f"{num_frames} {tuple(seen.shape)}".encode()
    return hashlib.blake2b(header + seen.numpy().tobytes(), digest_size=16).digest()


def _seen(features: Tensor, num_frames: int) -> Tensor:
    """The valid frames, and those that the strided convolutions reach beyond them."""
    return features[:, : 2 * conv_length(num_frames) + 1]
