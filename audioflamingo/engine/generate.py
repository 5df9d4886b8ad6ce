"""`generate` and `stream`: a batch of prompts through the engine, with transformers' interface.

Semantics of options, of padding behind the end of an answer and of beam search are transformers' (5.23.0).
What differs on purpose: padding may stand on either side and never changes an answer, rows that have finished
leave the batch, and nothing ends or is ignored silently (finish reasons, errors for unknown keywords,
warnings).

Left out on purpose: assisted and contrastive decoding, custom logits processors, decoding without a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Unpack, overload

import torch
from torch import Tensor, nn

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.engine import Engine
from audioflamingo.engine.finish_reason import FinishReason
from audioflamingo.engine.generate_call import GenerateCall, ModelInputs, prepare_call
from audioflamingo.engine.generate_options import GenerateInputs, GenerateOptions
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.sequence import Sequence as Row
from audioflamingo.engine.sequence import SequenceGroup
from audioflamingo.errors import warn
from audioflamingo.kernels.host import to_host
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.network.kv import KVCache
from audioflamingo.network.outputs import ModelOutput


class Streamer(Protocol):
    """What `generate(streamer=)` takes: called with the prompt, then with the new ids of every step."""

    def put(self, value: Tensor) -> None:
        """Takes the prompt `(R, S)` first, then ids `(R,)` step by step; on the CPU."""
        ...

    def end(self) -> None:
        """Called once when generation is over, for whatever reason."""
        ...


@dataclass(frozen=True)
class GenerationStep:
    """One step of `stream`: at most one new token for each of the R output rows.

    Attributes:
        token_ids: int64 `(R,)` on the CPU; the padding id in rows that had finished before.
        is_new: for each row whether `token_ids` holds a new token of it.
        finish_reasons: for each row `"stop"` or `"length"` once it has finished, None before.
        logprobs: float32 `(R,)`, log-probabilities of the new tokens under the model's own distribution; 0 in
            rows that had finished. None unless `output_logprobs`.
        scores: float32 `(R, V)`, what the tokens were chosen by; NaN in finished rows. None unless
            `output_scores`.
        logits: float32 `(R, V)`, the model's logits; NaN in finished rows. None unless `output_logits`.
    """

    token_ids: Tensor
    is_new: list[bool]
    finish_reasons: list[FinishReason | None]
    logprobs: Tensor | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """Result of `generate(return_dict_in_generate=True)` for R rows: first prompt's answers first.

    Attributes:
        sequences: int64 `(R, S + T)`: the prompt as it was given, then the answer, then padding ids.
        finish_reasons: for each row `"stop"` (an end-of-sequence token or a stop string) or `"length"`.
        num_new_tokens: for each row the length of its answer in tokens, the end-of-sequence token included.
        logprobs: float32 `(R, T)`, log-probabilities of the answers' tokens under the model's own
            distribution, 0 in the padding. With `output_logprobs`.
        scores: for each step what tokens were chosen by, float32 `(R, V)`; in beam search log-probabilities
            `(B * num_beams, V)`. NaN in rows that had finished. With `output_scores`.
        logits: the same before any rule was applied. With `output_logits`.
        sequences_scores: float32 `(R,)`, the score of each answer in beam search.
        beam_indices: int64 `(R, T)`, the row of `scores` that each token was chosen from in beam search, -1
            in the padding.
        past_key_values: the cache that the caller passed.
    """

    sequences: Tensor
    finish_reasons: list[FinishReason]
    num_new_tokens: list[int]
    logprobs: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None
    past_key_values: KVCache | None = None


@overload
def generate(
    model: AudioFlamingo3WithHead,
    input_ids: Tensor | None = ...,
    *,
    streamer: Streamer | None = ...,
    return_dict_in_generate: Literal[True],
    **inputs: Unpack[GenerateInputs],
) -> GenerateOutput: ...


@overload
def generate(
    model: AudioFlamingo3WithHead,
    input_ids: Tensor | None = ...,
    *,
    streamer: Streamer | None = ...,
    return_dict_in_generate: Literal[False] | None = ...,
    **inputs: Unpack[GenerateInputs],
) -> Tensor: ...


def generate(
    model: AudioFlamingo3WithHead,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    input_features: Tensor | None = None,
    input_features_mask: Tensor | None = None,
    audio_embeds: Tensor | None = None,
    streamer: Streamer | None = None,
    return_dict_in_generate: bool | None = None,
    **options: Unpack[GenerateOptions],
) -> Tensor | GenerateOutput:
    """Answers each prompt.

    The prompts of a batch do not influence one another. With `seed=`, row r draws from its own generator,
    seeded with `sampling.row_seed(seed, r)`, so any row can be repeated alone; `seed=[...]` gives each row its
    seed (in beam sampling: each prompt). With `generator=` or neither, the rows draw
    in order.

    Args:
        model: what answers.
        input_ids: `(B, S)` prompts, padded on either side.
        attention_mask: `(B, S)`, 0 on padding. Without it, ids equal to the padding id are taken as
            padding, unless that id also ends answers.
        input_features: `(W, M, T)` log-mel windows of all clips, from the processor.
        input_features_mask: `(W, T)`, 1 on valid frames.
        audio_embeds: projected audio tokens `(A, D)` in place of windows.
        streamer: gets the prompt, then each step's ids `(R,)`, then `end()`. An answer of a beam search comes when
            the search ends.
        return_dict_in_generate: return a `GenerateOutput` in place of the ids.
        **options: see `GenerateOptions` and `GenerationConfig`; None takes the default. `adapter` names a loaded
            adapter, for all prompts or (a list) one for each, None for the model itself. `constraint` (with
            `tokenizer`) is what answers must be: `{"json_schema": ...}`, `{"json_object": True}`, `{"choices": [...]}`
            or `{"regex": ...}`, see `compile_constraint`; `logit_bias` is added to the
            logits of token ids. `past_key_values`
            is a cache to continue, without beams: `input_ids` are then the new tokens only, rules that look at
            earlier tokens do not see what is in it, and afterwards it holds all but the last token of each
            answer.

    Returns:
        The prompts followed by the answers, int64 `(B * num_return_sequences, S + T)` on the device of
        `input_ids`, padded behind the end of each answer; or a `GenerateOutput`.

    Raises:
        ArgumentError: an unknown keyword, or a value that is not allowed.
        ContextLengthError: a prompt leaves no room for an answer.
        PromptError: `<sound>` ids and audio do not fit each other.
        AudioFlamingoError: the model gives NaN, or the options forbid every token.
    """
    inputs = ModelInputs(input_ids, attention_mask, input_features, input_features_mask, audio_embeds)
    call = prepare_call(model, inputs, options)
    if not return_dict_in_generate and call.outputs:
        warn(
            f"generate(): no effect of {', '.join(sorted(call.outputs))} without return_dict_in_generate=True."
        )
    output = _generate(model, call, streamer)
    prompt_rows = call.input_ids.repeat_interleave(call.config.num_return_sequences, dim=0)
    output.sequences = torch.cat([prompt_rows, output.sequences.to(prompt_rows)], dim=1)
    output.past_key_values = call.cache
    return output if return_dict_in_generate else output.sequences


def stream(
    model: AudioFlamingo3WithHead,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    input_features: Tensor | None = None,
    input_features_mask: Tensor | None = None,
    audio_embeds: Tensor | None = None,
    **options: Unpack[GenerateOptions],
) -> Iterator[GenerationStep]:
    """Answers each prompt token by token.

    Takes what `generate` takes except `streamer` and `return_dict_in_generate`, and gives its tokens; those of a beam
    search when the search ends. Values are checked at once; the model runs as the iterator is consumed. Closing
    the iterator, or dropping it, ends the generation and frees its cache.

    Yields:
        One `GenerationStep` for each column of the answers.

    Raises:
        AudioFlamingoError: as `generate`.
    """
    inputs = ModelInputs(input_ids, attention_mask, input_features, input_features_mask, audio_embeds)
    return _stream(model, prepare_call(model, inputs, options))


def _engine(model: AudioFlamingo3WithHead, call: GenerateCall) -> tuple[Engine, list[SequenceGroup]]:
    """An engine of the size of a call, which waits to begin."""
    num_rows = sum(request.params.num_sequences for request in call.requests)
    no_audio_kept = ClipCache(max_bytes=0)
    engine = Engine(model, None, EngineOptions.alone(num_rows), no_audio_kept, call.cache)
    return engine, [engine.submit(request) for request in call.requests]


def _stream(model: AudioFlamingo3WithHead, call: GenerateCall) -> Generator[GenerationStep, None, None]:
    """The columns of the answers, one after the other."""
    with evaluation_mode(model):
        engine, groups = _engine(model, call)
        rows = _answers(groups)
        column = 0
        while engine.has_work:
            _step(engine, groups)
            if call.config.num_beams == 1:
                yield _column(call, rows, column)
                column += 1
        engine.close()
        for rest in range(column, max(len(row.new_ids) for row in rows)):
            yield _column(call, rows, rest)


def _step(engine: Engine, groups: Sequence[SequenceGroup]) -> None:
    engine.step()
    for index, group in enumerate(groups):
        if group.error is not None:
            raise type(group.error)(f"prompt {index}: {group.error}") from group.error


def _answers(groups: Sequence[SequenceGroup]) -> list[Row]:
    """The rows of the output: the answers to the first prompt, then the next."""
    return [row for group in groups for row in group.sequences[: group.request.params.num_answers]]


def _column(call: GenerateCall, rows: Sequence[Row], column: int) -> GenerationStep:
    """What a step gave each row; a row that had finished before has padding there."""
    is_new = [len(row.new_ids) > column for row in rows]
    pairs = list(zip(rows, is_new, strict=True))
    ids = [row.new_ids[column] if new else call.pad_id for row, new in pairs]
    is_search = call.config.num_beams > 1
    logprobs = None
    if "output_logprobs" in call.outputs:
        logprobs = torch.tensor(
            [row.logprobs[column].logprob if new else 0.0 for row, new in pairs], device="cpu"
        )
    return GenerationStep(
        token_ids=torch.tensor(ids, device="cpu"),
        is_new=is_new,
        finish_reasons=[row.finish_reason if len(row.new_ids) <= column + 1 else None for row in rows],
        logprobs=logprobs,
        scores=None if is_search else _stack([row.scores.pop() if row.scores else None for row in rows]),
        logits=None if is_search else _stack([row.logits.pop() if row.logits else None for row in rows]),
    )


def _stack(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Values `(V,)` of the rows that have some as `(R, V)`, NaN in the others; None if none has."""
    known = next((row for row in rows if row is not None), None)
    if known is None:
        return None
    empty = torch.full_like(known, torch.nan)
    return torch.stack([empty if row is None else row for row in rows])


def _generate(model: AudioFlamingo3WithHead, call: GenerateCall, streamer: Streamer | None) -> GenerateOutput:
    """Runs the engine to the end of the call. The output's sequences are the answers only."""
    steps: list[GenerationStep] = []
    try:
        if streamer is not None:
            copies = call.config.num_return_sequences
            prompts = [row for row in to_host(call.input_ids) for _ in range(copies)]
            streamer.put(torch.tensor(prompts, device="cpu"))
        if call.config.num_beams > 1:
            return _search(model, call, streamer)
        with contextlib.closing(_stream(model, call)) as stream:
            for step in stream:
                steps.append(step)
                if streamer is not None:
                    streamer.put(step.token_ids)
    finally:
        if streamer is not None:
            streamer.end()
    logprobs = [step.logprobs for step in steps if step.logprobs is not None]
    return GenerateOutput(
        sequences=torch.stack([step.token_ids for step in steps], dim=1),
        finish_reasons=[reason for reason in steps[-1].finish_reasons if reason is not None],
        num_new_tokens=[sum(column) for column in zip(*(step.is_new for step in steps), strict=True)],
        logprobs=torch.stack(logprobs, dim=1) if logprobs else None,
        scores=tuple(step.scores for step in steps if step.scores is not None) or None,
        logits=tuple(step.logits for step in steps if step.logits is not None) or None,
    )


def _search(model: AudioFlamingo3WithHead, call: GenerateCall, streamer: Streamer | None) -> GenerateOutput:
    """Runs a beam search. The output's sequences are the answers only."""
    with evaluation_mode(model):
        engine, groups = _engine(model, call)
        while engine.has_work:
            _step(engine, groups)
        engine.close()
    rows = _answers(groups)
    if streamer is not None:
        for column in range(max(len(row.new_ids) for row in rows)):
            streamer.put(_column(call, rows, column).token_ids)
    beams = [beam for group in groups if group.search is not None for beam in group.search.best()]
    origins = [
        [index * call.config.num_beams + origin for origin in beam.origins]
        for beam, index in zip(beams, (i for i, g in enumerate(groups) for _ in _answers([g])), strict=True)
    ]
    everything = [sequence for group in groups for sequence in group.sequences]
    return GenerateOutput(
        sequences=_pad_rows([row.new_ids for row in rows], call.pad_id),
        finish_reasons=[row.finish_reason for row in rows if row.finish_reason is not None],
        num_new_tokens=[len(row.new_ids) for row in rows],
        logprobs=_pad_rows([[entry.logprob for entry in row.logprobs] for row in rows], 0.0)
        if "output_logprobs" in call.outputs
        else None,
        scores=_by_step([sequence.scores for sequence in everything]),
        logits=_by_step([sequence.logits for sequence in everything]),
        sequences_scores=torch.tensor([float(beam.score) for beam in beams], device="cpu"),
        beam_indices=_pad_rows(origins, -1),
    )


def _by_step(kept: Sequence[list[Tensor]]) -> tuple[Tensor, ...] | None:
    """What rows kept, step by step: each `(rows, V)`, NaN in rows that had finished; None if nothing was kept."""
    steps = [
        _stack([values[step] if step < len(values) else None for values in kept])
        for step in range(max(map(len, kept)))
    ]
    return tuple(step for step in steps if step is not None) or None


def _pad_rows(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    """Rows of unequal length as one tensor `(R, longest)`."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device="cpu")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches the modules that are in training mode to evaluation (no dropout), and back."""
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True
