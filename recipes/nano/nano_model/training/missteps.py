"""Transcripts to go on with behind words that are wrong: the model's own, and ones that are said again and again.

Trained behind right words alone, the model does not know what to do behind a wrong one: of some three hundred clips one
had no end ("the p p p p" for "the Psalmist"). Here the words so far are what it says itself, and the label behind each
of them is the token that leads to the fewest errors in all (optimal completion distillation, arXiv 1810.01398).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from audioflamingo.config import IGNORED_LABEL
from audioflamingo.datasets.conversations import DataRow
from audioflamingo.training.batches import Batch

from .answering import answer
from .forward import FastModel
from .teacher import quoted_words

STUTTERS = 0.5  # share of the transcripts in which a token is said again
REPEATS = 8  # at most, of that token
MARGIN = 10  # tokens that the model may say beyond as many as are right


@dataclasses.dataclass(frozen=True)
class Marks:
    """Numbers of tokens: the opening quote, the closing one, and what ends a turn."""

    quote: int
    close: int
    end: int


def completions(said: Sequence[int], right: Sequence[int]) -> list[int]:
    """The best next token behind each beginning of what was said (len(said) + 1), nothing included.

    It is the token of `right` behind the place that is reached with the fewest edits; of several places the last, but
    behind a token that is said again the place stays where it was.
    """
    edits = list(range(len(right)))  # of nothing said, up to each place
    place, found = 0, [right[0]]
    for number, token in enumerate(said):
        before, edits = edits, [number + 1]
        for target in range(1, len(right)):
            changed = before[target - 1] + (right[target - 1] != token)
            edits.append(min(changed, before[target] + 1, edits[target - 1] + 1))
        fewest = min(edits)
        is_again = number > 0 and said[number - 1] == token
        if not (is_again and edits[place] == fewest):
            place = max(n for n, count in enumerate(edits) if count == fewest)
        found.append(right[place])
    return found


def stutter(said: Sequence[int], right: Sequence[int], rng: np.random.Generator) -> list[int]:
    """What was said with one of its tokens said again up to `REPEATS` times; rather a wrong one, if there are any."""
    known = set(right)
    wrong = [place for place, token in enumerate(said) if token not in known]
    place = int(rng.choice(wrong if wrong and rng.random() < 0.5 else len(said)))
    return [*said[:place], *[said[place]] * (1 + int(rng.integers(1, REPEATS + 1))), *said[place + 1 :]]


def part_of(batch: Batch, rows: Sequence[int], lengths: Sequence[int], audio_token: int) -> Batch:
    """Some rows of a batch up to some lengths, with their audio and without labels."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    ids = batch.input_ids[list(rows), : max(lengths)]
    is_audio = (batch.input_ids == audio_token) & batch.attention_mask.bool()
    owners = is_audio.nonzero()[:, 0]
    audio_rows = None
    if batch.audio_rows is not None:
        audio_rows = torch.cat([batch.audio_rows[owners == row] for row in rows])
    mask = (torch.arange(ids.shape[1]) < torch.tensor(list(lengths))[:, None]).long()
    return Batch([], 0.0, input_ids=ids, attention_mask=mask, audio_rows=audio_rows)


def labels_behind(said: Sequence[int], right: Sequence[int], marks: Marks) -> list[int]:
    """Labels for what was said and its end: none behind a closing quote that came too early."""
    labels = completions(said, right)
    for place, token in enumerate(said):
        if token == marks.close and labels[place] != marks.close:
            return labels[: place + 1] + [IGNORED_LABEL] * (len(labels) - place - 1)
    return labels


def with_own_words(
    fast: FastModel, batch: Batch, rows: Sequence[DataRow], marks: Marks, rng: np.random.Generator
) -> tuple[Batch, set[int]]:
    """A batch whose transcripts are as the model says them now, with `labels_behind` them.

    Args:
        fast: the model.
        batch: with labels, padded on the right.
        rows: of the batch.
        marks: tokens of the vocabulary.
        rng: of stutters.

    Returns:
        The batch, and the numbers of the rows that differ from what they were.
    """
    assert batch.input_ids is not None
    assert batch.labels is not None
    found: dict[int, int] = {}  # where the words start, by row
    for number, conversation in enumerate(rows):
        quotes = (batch.labels[number] == marks.quote).nonzero()[:, 0]
        if quoted_words(conversation) is not None and len(quotes):
            found[number] = int(quotes[-1]) + 1
    if not found:
        return batch, set()
    starts = list(found.values())
    right = {row: _labelled(batch.labels[row, start:]) for row, start in found.items()}
    prompts = part_of(batch, list(found), starts, fast.model.config.audio_token_id)
    answers = answer(fast, prompts, max(map(len, right.values())) + MARGIN, (marks.end,))
    new = {}
    for (row, start), said in zip(found.items(), answers, strict=True):
        if said and rng.random() < STUTTERS:
            said = stutter(said, right[row], rng)
        if said != right[row][:-1]:
            new[row] = (start, said, labels_behind(said, right[row], marks))
    return _put(batch, new, marks.end), set(new)


def _labelled(labels: Tensor) -> list[int]:
    return [label for label in labels.tolist() if label != IGNORED_LABEL]


def _put(batch: Batch, new: dict[int, tuple[int, list[int], list[int]]], end: int) -> Batch:
    """A batch with other tokens and labels from places on, by row."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    assert batch.labels is not None
    length = max([batch.input_ids.shape[1], *(start + len(labels) for start, _, labels in new.values())])
    more = (0, length - batch.input_ids.shape[1])
    ids, mask = (torch.nn.functional.pad(tensor, more) for tensor in (batch.input_ids, batch.attention_mask))
    wanted = torch.nn.functional.pad(batch.labels, more, value=IGNORED_LABEL)
    for row, (start, said, labels) in new.items():
        stop = start + len(labels)
        ids[row, start:stop] = torch.tensor([*said, end])
        mask[row, start:], wanted[row, start:] = 0, IGNORED_LABEL
        mask[row, start:stop] = 1
        wanted[row, start:stop] = torch.tensor(labels)
    return dataclasses.replace(batch, input_ids=ids, attention_mask=mask, labels=wanted)
