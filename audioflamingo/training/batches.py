"""Rows -> the tensors of a batch: labels on the assistant's text only, padding on the right.

Each row's text is encoded once; its audio is then put in, or with cached encoder outputs only the number of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioflamingo.audio.loading import N_FRAMES, conv_length, load_audio
from audioflamingo.config import AUDIO_TOKENS_PER_S, IGNORED_LABEL
from audioflamingo.datasets.conversations import DataRow
from audioflamingo.network.encoder import POOL
from audioflamingo.processor import AudioFlamingo3Processor, Prompt, PromptText, collate
from audioflamingo.processor.clips import Clip
from audioflamingo.processor.processor_options import TextOptions
from audioflamingo.training.augmentation import augment_waveform, mask_features, mask_rows
from audioflamingo.training.feature_cache import FeatureCache
from audioflamingo.training.training_config import CTC_ALPHABET, AugmentationConfig

POSITIONS_PER_WINDOW = conv_length(N_FRAMES)


@dataclass(frozen=True)
class CtcTargets:
    """What CTC learns of K clips.

    Attributes:
        spans: (K, 2), start and number of each clip's audio tokens.
        characters: of all clips in order.
        lengths: (K,), characters of each clip.
    """

    spans: Tensor
    characters: Tensor
    lengths: Tensor


@dataclass
class Batch:
    """What one forward pass trains on. Tensors that a batch has no use for are None.

    Attributes:
        ids: of its rows.
        audio_s: seconds of audio in all.
        input_ids, attention_mask, labels: (B, S), padded on the right.
        answer_weights: (B,), of the rows.
        num_labels: labelled tokens, by weight.
        input_features, input_features_mask: windows (W, M, T) and their valid frames (W, T).
        audio_rows: in place of windows, from the cache: (A, D_audio), or (P, D_audio) if later layers are trained.
        audio_layers: in the latter case the number of layers behind them.
        audio_lengths, window_index: beside `audio_rows` the rows of each window, and its number in its clip.
        ctc: the clips for CTC, if there are any.
        num_characters: of these clips.
    """

    ids: list[str]
    audio_s: float
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    answer_weights: Tensor | None = None
    num_labels: float = 0.0
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None
    audio_rows: Tensor | None = None
    audio_layers: int | None = None
    audio_lengths: list[int] = field(default_factory=list)
    window_index: list[int] = field(default_factory=list)
    ctc: CtcTargets | None = None
    num_characters: int = 0

    def to(self, device: torch.device) -> Batch:
        """A copy with its tensors on a device."""
        return Batch(**{name: _on(device, value) for name, value in vars(self).items()})


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, CtcTargets):
        return CtcTargets(**{name: _on(device, tensor) for name, tensor in vars(value).items()})
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


class BatchEncoder:
    """Turns rows into batches.

    Args:
        processor: of the model.
        augmentation: what is drawn for training batches.
        cache: encoder outputs; None encodes audio in the model.
        uses_ctc: prepare CTC targets.
        uses_answers: prepare ids and labels; without them only the CTC part is there.
    """

    def __init__(
        self,
        processor: AudioFlamingo3Processor,
        augmentation: AugmentationConfig | None = None,
        cache: FeatureCache | None = None,
        uses_ctc: bool = False,
        uses_answers: bool = True,
    ) -> None:
        self.processor = processor
        self.augmentation = augmentation
        self.cache = cache
        self.uses_ctc = uses_ctc
        self.uses_answers = uses_answers
        self._texts: dict[str, PromptText] = {}

    def __call__(self, rows: Sequence[DataRow], seed: Sequence[int] | None = None) -> Batch:
        """Builds a batch.

        Args:
            rows: at least one.
            seed: numbers that all chance of this batch comes from; None prepares the rows as they are.

        Raises:
            AudioError: a clip that cannot be read.
            PromptError: a conversation that the chat template refuses.
        """
        rngs = [None if seed is None else np.random.default_rng([*seed, i]) for i in range(len(rows))]
        batch = Batch([row.id for row in rows], sum(row.duration_s for row in rows))
        if self.cache is None:
            counts = self._add_prompts(batch, rows, rngs)
        else:
            counts = self._add_cached(batch, self.cache, rows, rngs)
        if batch.labels is not None:
            batch.answer_weights = torch.tensor([row.answer_weight for row in rows])
            num_labels = (batch.labels[:, 1:] != IGNORED_LABEL).sum(dim=1)
            batch.num_labels = float((num_labels * batch.answer_weights).sum())
        if self.uses_ctc:
            _add_ctc(batch, rows, counts)
        return batch

    def _add_prompts(
        self, batch: Batch, rows: Sequence[DataRow], rngs: Sequence[np.random.Generator | None]
    ) -> list[int]:
        """Prompts with their audio. Returns the audio tokens of each row."""
        prompts = [self._prompt(row, rng) for row, rng in zip(rows, rngs, strict=True)]
        self._collate(batch, prompts)
        spec = self.augmentation.spec if self.augmentation is not None else None
        if batch.input_features is not None and spec is not None and (spec.time_masks or spec.mel_masks):
            start = 0
            for prompt, rng in zip(prompts, rngs, strict=True):
                end = start + len(prompt.windows)
                if rng is not None:
                    lengths = [window.num_frames for window in prompt.windows]
                    mask_features(batch.input_features[start:end], lengths, spec, rng)
                start = end
        return [prompt.num_audio_tokens for prompt in prompts]

    def _prompt(self, row: DataRow, rng: np.random.Generator | None) -> Prompt:
        clips = []
        for path in row.audio:
            waveform = load_audio(path)
            if rng is not None and self.augmentation is not None:
                waveform = augment_waveform(waveform, self.augmentation, rng)
            clips.append(Clip(waveform, name=repr(str(path))))
        return self.processor.add_audio(self._text(row), clips)

    def _add_cached(
        self,
        batch: Batch,
        cache: FeatureCache,
        rows: Sequence[DataRow],
        rngs: Sequence[np.random.Generator | None],
    ) -> list[int]:
        """Text and cached encoder outputs. Returns the audio tokens of each row."""
        spec = None if self.augmentation is None else self.augmentation.spec
        rows_per_s = AUDIO_TOKENS_PER_S if cache.num_layers is None else POOL * AUDIO_TOKENS_PER_S
        clips: list[np.ndarray] = []
        for row, rng in zip(rows, rngs, strict=True):
            for path in row.audio:
                audio_rows = cache.get(path, cache.draw_variant(rng))
                if rng is not None and spec is not None and spec.time_masks:
                    audio_rows = mask_rows(audio_rows, spec, rng, rows_per_s)
                clips.append(audio_rows)
        counts = [len(clip) for clip in clips]  # audio tokens of each clip
        if clips:
            batch.audio_rows = torch.from_numpy(np.concatenate(clips))  # (A or P, D_audio) float16
        is_pooled = cache.num_layers is None
        windows = [
            _window_lengths(len(clip), POSITIONS_PER_WINDOW // (POOL if is_pooled else 1)) for clip in clips
        ]
        batch.audio_lengths, batch.audio_layers = list(chain(*windows)), cache.num_layers
        batch.window_index = [index for lengths in windows for index in range(len(lengths))]
        if not is_pooled:
            counts = [sum(length // POOL for length in lengths) for lengths in windows]
        remaining = iter(counts)
        by_row = [list(islice(remaining, len(row.audio))) for row in rows]
        if self.uses_answers:
            texts = zip(map(self._text, rows), by_row, strict=True)
            self._collate(batch, [text.expand(num_tokens) for text, num_tokens in texts])
        return list(map(sum, by_row))

    def _collate(self, batch: Batch, prompts: Sequence[Prompt]) -> None:
        options = TextOptions(padding_side="right")
        for name, tensor in collate(prompts, self.processor.tokenizer.pad_token_id, options).items():
            setattr(batch, name, tensor)

    def _text(self, row: DataRow) -> PromptText:
        """The row's text and labels. Kept: rendering takes longer than all the rest."""
        if row.place not in self._texts:
            self._texts[row.place] = self.processor.training_text(row.messages)
        return self._texts[row.place]


def _window_lengths(num_rows: int, num_full: int) -> list[int]:
    """Rows of each window of a clip: only the last one is not full."""
    whole, rest = divmod(num_rows, num_full)
    return [num_full] * whole + ([rest] if rest else [])


def ctc_targets(text: str) -> list[int]:
    """Character numbers of a transcript, 1 for the first letter of the alphabet; others are left out."""
    known = "".join(
        character for character in text.lower() if character in CTC_ALPHABET or character.isspace()
    )
    return [CTC_ALPHABET.index(character) + 1 for character in " ".join(known.split())]


def _add_ctc(batch: Batch, rows: Sequence[DataRow], counts: Sequence[int]) -> None:
    """CTC targets of the transcription rows: spans into the audio rows, characters and their number."""
    spans, targets, lengths = [], [], []
    start = 0
    for row, count in zip(rows, counts, strict=True):
        transcript = row.transcript
        if transcript is not None and (characters := ctc_targets(transcript)) and count > 0:
            spans.append((start, count))
            targets += characters
            lengths.append(len(characters))
        start += count
    batch.num_characters = sum(lengths)
    if spans:
        batch.ctc = CtcTargets(torch.tensor(spans), torch.tensor(targets), torch.tensor(lengths))
