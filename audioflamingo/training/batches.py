"""Rows -> the tensors of a batch: labels on the assistant's text only, padding on the right.

With audio, the public path is taken: `processor.apply_chat_template(..., output_labels="assistant")`. With cached
encoder outputs only the text is prepared, each row's once, and the audio positions are counted off the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioflamingo.audio.loading import N_FRAMES, conv_length, load_audio, split_windows
from audioflamingo.config import IGNORED_LABEL
from audioflamingo.datasets.conversations import DataRow
from audioflamingo.network.encoder import POOL
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.processor.batch import Row, expand_audio, pad_rows
from audioflamingo.processor.chat_template import render_conversation
from audioflamingo.processor.clips import count_audio_tokens
from audioflamingo.processor.conversation import parse_conversations
from audioflamingo.processor.options import TextOptions
from audioflamingo.training.augmentation import augment_waveform, mask_features, mask_rows
from audioflamingo.training.batch_sampler import AUDIO_TOKENS_PER_S
from audioflamingo.training.config import CTC_ALPHABET, AugmentationConfig
from audioflamingo.training.feature_cache import FeatureCache

POSITIONS_PER_WINDOW = conv_length(N_FRAMES)

Batch = dict[str, Any]


class BatchEncoder:
    """Turns rows into batches.

    A batch holds `input_ids`, `attention_mask`, `labels` (B, S); `input_features` and `input_features_mask`, or
    `audio_rows` from the cache: (A, D_audio) or, if later layers of the encoder are trained, (P, D_audio) with
    `audio_lengths`, the positions of each window, and `audio_layers`, the number of layers behind them; for CTC
    `ctc_spans` (K, 2), start and number of each clip's audio rows, `ctc_targets` and `ctc_lengths`; `answer_weights`
    (B,), `num_labels` (by weight), `num_characters`, `num_rows`, `audio_s`; and `ids`.

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
        self._encoded: dict[str, tuple[np.ndarray, np.ndarray]] = {}

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
        batch: Batch = {"ids": [row.id for row in rows], "num_rows": len(rows)}
        batch["audio_s"] = sum(row.duration_s for row in rows)
        counts = self._add_cached(batch, rows, rngs) if self.cache else self._add_processed(batch, rows, rngs)
        if "labels" in batch:
            batch["answer_weights"] = torch.tensor([row.answer_weight for row in rows])
            num_labels = (batch["labels"][:, 1:] != IGNORED_LABEL).sum(dim=1)
            batch["num_labels"] = float((num_labels * batch["answer_weights"]).sum())
        if self.uses_ctc:
            _add_ctc(batch, rows, counts)
        return batch

    def _add_processed(
        self, batch: Batch, rows: Sequence[DataRow], rngs: Sequence[np.random.Generator | None]
    ) -> list[int]:
        """The public path. Returns the audio tokens of each clip."""
        conversations, counts, frames = [], [], []
        for row, rng in zip(rows, rngs, strict=True):
            waveforms = []
            for path in row.audio:
                waveform = load_audio(path)
                if rng is not None and self.augmentation is not None:
                    waveform = augment_waveform(waveform, self.augmentation, rng)
                windows = split_windows(waveform, on_long="error", name=repr(path))
                counts.append(count_audio_tokens(windows))
                frames.append((rng, [-(-len(window) // 160) for window in windows]))
                waveforms.append(waveform)
            conversations.append(_with_waveforms(row.messages, waveforms))
        inputs = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, output_labels="assistant", padding_side="right"
        )
        batch.update(inputs)
        spec = self.augmentation.spec if self.augmentation is not None else None
        if spec is not None and (spec.time_masks or spec.mel_masks):
            start = 0
            for rng, lengths in frames:
                if rng is not None:
                    mask_features(batch["input_features"][start : start + len(lengths)], lengths, spec, rng)
                start += len(lengths)
        return counts

    def _add_cached(
        self, batch: Batch, rows: Sequence[DataRow], rngs: Sequence[np.random.Generator | None]
    ) -> list[int]:
        """Text and cached encoder outputs. Returns the audio tokens of each clip."""
        assert self.cache is not None
        features: list[np.ndarray] = []
        rows_per_s = AUDIO_TOKENS_PER_S if self.cache.num_layers is None else POOL * AUDIO_TOKENS_PER_S
        for row, rng in zip(rows, rngs, strict=True):
            for path in row.audio:
                audio_rows = self.cache.get(path, self.cache.draw_variant(rng))
                if rng is not None and self.augmentation is not None and self.augmentation.spec.time_masks:
                    audio_rows = mask_rows(audio_rows, self.augmentation.spec, rng, rows_per_s)
                features.append(audio_rows)
        counts = [len(item) for item in features]
        if features:
            batch["audio_rows"] = torch.from_numpy(np.concatenate(features))  # (A or P, D_audio) float16
        if features and self.cache.num_layers is not None:
            windows = [_window_lengths(len(item)) for item in features]
            batch["audio_lengths"] = [length for lengths in windows for length in lengths]
            batch["audio_layers"] = self.cache.num_layers
            counts = [sum(length // POOL for length in lengths) for lengths in windows]
        if self.uses_answers:
            batch.update(self.encode_text(rows, counts))
        return counts

    def encode_text(self, rows: Sequence[DataRow], num_audio_tokens: Sequence[int]) -> dict[str, Tensor]:
        """Ids, mask and labels of rows whose clips give `num_audio_tokens` audio tokens each."""
        texts = [Row(ids.tolist(), labels.tolist()) for ids, labels in map(self._encode_row, rows)]
        expanded = expand_audio(texts, self.processor.audio_token_id, num_audio_tokens)
        options = TextOptions(padding_side="right")
        ids, mask = pad_rows([row.ids for row in expanded], self.processor.tokenizer.pad_token_id, options)
        labels, _ = pad_rows([row.labels or [] for row in expanded], IGNORED_LABEL, options)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _encode_row(self, row: DataRow) -> tuple[np.ndarray, np.ndarray]:
        """Ids with one `<sound>` a clip, and labels. Kept: rendering takes longer than all the rest."""
        if row.place not in self._encoded:
            ((turns,), _) = parse_conversations(row.messages)
            template = self.processor._resolve_template(None)
            prompt = render_conversation(
                turns, template, self.processor.tokenizer, self.processor.audio_token, mark_answers=True
            )
            ids, labels = prompt.encode(self.processor.tokenizer)
            self._encoded[row.place] = np.array(ids, np.int32), np.array(labels, np.int32)
        return self._encoded[row.place]


def _window_lengths(num_positions: int) -> list[int]:
    """Positions of each window of a clip: only the last one is not full."""
    whole, rest = divmod(num_positions, POSITIONS_PER_WINDOW)
    return [POSITIONS_PER_WINDOW] * whole + ([rest] if rest else [])


def _with_waveforms(
    messages: Sequence[dict[str, Any]], waveforms: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    remaining = iter(waveforms)
    replaced = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "audio", "audio": next(remaining)} if part["type"] == "audio" else part
                for part in content
            ]
        replaced.append({"role": message["role"], "content": content})
    return replaced


def ctc_targets(text: str) -> list[int]:
    """Character numbers of a transcript, 1 for the first letter of the alphabet; others are left out."""
    known = "".join(
        character for character in text.lower() if character in CTC_ALPHABET or character.isspace()
    )
    return [CTC_ALPHABET.index(character) + 1 for character in " ".join(known.split())]


def _add_ctc(batch: Batch, rows: Sequence[DataRow], counts: Sequence[int]) -> None:
    """CTC targets of the transcription rows: spans into the audio rows, characters and their number."""
    spans, targets, lengths = [], [], []
    start, clip = 0, 0
    for row in rows:
        transcript = row.transcript
        if transcript is not None and (characters := ctc_targets(transcript)) and counts[clip] > 0:
            spans.append((start, counts[clip]))
            targets += characters
            lengths.append(len(characters))
        for _ in row.audio:
            start += counts[clip]
            clip += 1
    batch["num_characters"] = sum(lengths)
    if spans:
        batch["ctc_spans"] = torch.tensor(spans)
        batch["ctc_targets"] = torch.tensor(targets)
        batch["ctc_lengths"] = torch.tensor(lengths)
