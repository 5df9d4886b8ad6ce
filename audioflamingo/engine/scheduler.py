"""Which sequences run now: admission, chunked prefill, fairness. `Scheduler.schedule` is the whole decision.

Only whoever runs the engine calls it; other threads may look at the lengths of its lists.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from audioflamingo.engine.audio_encoder import AudioEncoder
from audioflamingo.engine.kv_pool import KVPool
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.prefix_cache import MIN_REUSED, PrefixCache, common_prefix
from audioflamingo.engine.sequence import Sequence, SequenceGroup
from audioflamingo.network.kv import Span
from audioflamingo.processor.prompt import AudioWindow

PATIENCE = 0.1  # a second of waiting weighs as much as so many seconds of the model: nobody waits for ever
SMOOTHING = 0.3  # weight of the latest measurement of a step
MIN_CHUNK = 16  # tokens
START_CHUNK = 128


@dataclass
class Step:
    """What the engine does next.

    Attributes:
        chunks: sequences with their next tokens: one of each answer, a piece of each prompt that is being read.
        windows: audio to encode first, with the group whose turn it is.
    """

    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    windows: list[tuple[SequenceGroup, AudioWindow]] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts among the chunks."""
        return sum(count for sequence, count in self.chunks if not sequence.new_ids)


class PrefillBudget:
    """How many prompt tokens a step may take on, so that the answers beside them go on flowing.

    A step that reads a prompt should last no longer than `piece_s` beyond the answers' own part of it, or twice as long
    as without the prompt where that is more.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._piece_s = options.piece_s
        self._max_tokens = options.max_prefill_tokens
        self._decode_s = 0.0
        self._token_s: float | None = None

    @property
    def num_tokens(self) -> int | None:
        """Tokens of prompts for the next step; None for no limit."""
        if self._max_tokens is None or self._piece_s is None:
            return self._max_tokens
        if self._token_s is None:
            return min(START_CHUNK, self._max_tokens)
        affordable = int(max(self._piece_s, self._decode_s) / self._token_s)
        return min(self._max_tokens, max(MIN_CHUNK, affordable))

    def note(self, num_prompt_tokens: int, step_s: float) -> None:
        """Takes the length of a step."""
        if not num_prompt_tokens:
            self._decode_s += SMOOTHING * (step_s - self._decode_s)
            return
        token_s = max(1e-7, (step_s - self._decode_s) / num_prompt_tokens)
        self._token_s = (
            token_s if self._token_s is None else self._token_s + SMOOTHING * (token_s - self._token_s)
        )


class Scheduler:
    """The sequences of the engine.

    Args:
        pool: where their keys and values go.
        audio: where encoded audio is looked up.
        options: how many may run, and how long a piece of work may be.

    Attributes:
        waiting: groups without slots, in the order of arrival.
        reading: groups whose prompt is not done.
        answering: groups that get a token every step.
        prefixes: finished sequences, for later ones to start from.
        budget: how long a chunk of a prompt may be.
        num_reused_tokens: tokens of prompts that did not need to be computed.
    """

    def __init__(self, pool: KVPool, audio: AudioEncoder, options: EngineOptions) -> None:
        self._pool = pool
        self._audio = audio
        self._options = options
        self.waiting: list[SequenceGroup] = []
        self.reading: list[SequenceGroup] = []
        self.answering: list[SequenceGroup] = []
        self.prefixes = PrefixCache(pool)
        self.budget = PrefillBudget(options)
        self.num_reused_tokens = 0

    def schedule(self) -> Step:
        """Decides what runs now.

        Who was cancelled goes. Who waits gets slots while there are any, least served first. Every answer that has
        begun gets its next token; what the budget leaves goes to prompts, least served first, as far as their audio is
        encoded. Whose turn it is but lacks audio has that encoded: its next window, or all at once where nobody waits.
        """
        self.drop_cancelled()
        self._admit()
        step = Step([(sequence, 1) for group in self.answering for sequence in group.running])
        budget = self.budget.num_tokens
        for group in least_served_first(self.reading):
            self._audio.look_up(group)
            if self._options.piece_s is None:
                step.windows += [(group, window) for window in group.missing_windows]
                num_ready = group.num_unread
            else:
                num_ready = group.num_ready
                if not num_ready and not step.num_prompt_tokens:
                    step.windows = [(group, group.missing_windows[0])]
                    break
            count = num_ready if budget is None else min(num_ready, budget)
            if count:
                step.chunks.append((group.reader, count))
                budget = None if budget is None else budget - count
            if budget == 0:
                break
        if self._options.piece_s is not None:
            self._audio.forget(
                [
                    (window, group.request.adapter)
                    for group in self.reading
                    for window in group.missing_windows[:1]
                ]
            )
        return step

    @property
    def active(self) -> list[SequenceGroup]:
        """Groups that have slots."""
        return self.answering + self.reading

    @property
    def groups(self) -> list[SequenceGroup]:
        """All of them."""
        return self.active + self.waiting

    def add(self, groups: Iterable[SequenceGroup]) -> None:
        """Takes new groups; one that has slots already, of a cache that is continued, is read at once."""
        for group in groups:
            (self.reading if group.reader.span is not None else self.waiting).append(group)

    def begin_answer(self, group: SequenceGroup) -> None:
        """Moves a group whose prompt is done; its other sequences begin as forks of the first."""
        self.reading.remove(group)
        self.answering.append(group)
        first = group.reader.span
        assert first is not None
        for sequence in group.sequences[1:]:
            assert sequence.span is not None
            self._pool.copy(first, sequence.span, first.length)

    def finish(self, group: SequenceGroup, is_kept: bool = True) -> None:
        """Lets a group go; what it computed stays for later ones, or its slots are free again."""
        for groups in (self.waiting, self.reading, self.answering):
            if group in groups:
                groups.remove(group)
        if group.is_continued:
            return
        for sequence in group.sequences:
            span, sequence.span = sequence.span, None
            if span is None:
                continue
            if is_kept and self._options.keeps_prefixes and sequence is group.reader:
                identity = group.kept_identity()
                span.length = min(span.length, len(identity))
                self.prefixes.keep(identity, span)
            else:
                self._pool.free(span, is_clean=is_kept)

    def release(self, sequence: Sequence) -> None:
        """Gives the slots of a complete sequence back while others of its group go on."""
        if (
            sequence is not sequence.group.reader
            and sequence.span is not None
            and not sequence.group.is_continued
        ):
            self._pool.free(sequence.span)
            sequence.span = None

    def drop_cancelled(self) -> None:
        """Lets go of what nobody waits for any more."""
        for group in [group for group in self.groups if group.request.is_cancelled]:
            self.finish(group)

    def _admit(self) -> None:
        """Gives slots to waiting groups while there are any.

        The first one that does not fit is waited for, so that a large request is not overtaken for ever.
        """
        num_rows = sum(len(group.sequences) for group in self.active)
        for group in least_served_first(self.waiting):
            num_rows += len(group.sequences)
            if self.active and num_rows > self._options.max_rows:
                break
            if not self._may_join(group) or self._is_being_read(group):
                num_rows -= len(group.sequences)
                continue
            if not self._give_slots(group):
                break
            self.waiting.remove(group)
            self.reading.append(group)

    def _may_join(self, group: SequenceGroup) -> bool:
        """Whether the number of client requests that are worked for allows for a group."""
        shares = {other.request.share for other in self.active}
        return group.request.share in shares or len(shares) < self._options.max_requests

    def _is_being_read(self, group: SequenceGroup) -> bool:
        """Whether another group is computing a beginning that this one shares: it is then worth waiting for."""
        if not self._options.keeps_prefixes:
            return False
        most = len(group.prompt.token_ids) - 1
        for other in self.reading:
            shared = min(most, common_prefix(other.identity, group.identity))
            if shared - other.reader.num_computed >= MIN_REUSED:
                return True
        return False

    def _give_slots(self, group: SequenceGroup) -> bool:
        """Allocates the spans of a group, the first one with what is known of its prompt. False if there is no room."""
        num_known = self._give_first(group)
        spans = [group.reader.span]
        for sequence in group.sequences[1:]:
            sequence.span = (
                None if spans[-1] is None else self.prefixes.allocate(group.num_slots, group.reader.span)
            )
            spans.append(sequence.span)
        if spans[-1] is None:
            for sequence in group.sequences:
                if sequence.span is not None:
                    self._pool.free(sequence.span)
                    sequence.span = None
            return False
        group.num_reused = num_known
        self.num_reused_tokens += num_known
        return True

    def _give_first(self, group: SequenceGroup) -> int:
        """Allocates the first span; returns how many tokens of the prompt it holds already."""
        if not self._options.keeps_prefixes:
            group.reader.span = self._pool.allocate(group.num_slots) or self._pool.allocate_new(
                group.num_slots
            )
            return 0
        most = len(group.prompt.token_ids) - 1
        span = self.prefixes.take_over(group.identity, group.num_slots)
        if span is not None:
            span.length = min(span.length, most)
            group.reader.span = span
            return span.length
        source, length = self._find_source(group)
        group.reader.span = self.prefixes.allocate(group.num_slots, source)
        if group.reader.span is None or source is None or source.length < length:  # dropped to make room
            return 0
        self._pool.copy(source, group.reader.span, length)
        return length

    def _find_source(self, group: SequenceGroup) -> tuple[Span | None, int]:
        """Where the longest beginning of a group's prompt lies already, and its length."""
        source, length = self.prefixes.find(group.identity)
        for other in self.active:
            span = other.reader.span
            assert span is not None
            shared = common_prefix(other.identity, group.identity)
            shared = min(shared, other.reader.num_computed)
            if shared > max(length, MIN_REUSED - 1):
                source, length = span, shared
        return source, min(length, len(group.prompt.token_ids) - 1)


def least_served_first(groups: list[SequenceGroup]) -> list[SequenceGroup]:
    """Groups in the order in which they go on: whoever has had least of the model first, waiting counted in."""
    now = time.monotonic()
    return sorted(groups, key=lambda group: group.request.share.service_s - PATIENCE * (now - group.arrived))
