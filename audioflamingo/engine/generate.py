"""Generation: prefill, decode steps, and the loop that `generate` and `stream` share.

Semantics of options, of padding behind the end of an answer and of beam search are transformers' (5.23.0).
What differs on purpose: padding may stand on either side and never changes an answer, rows that have finished
leave the batch, and nothing ends or is ignored silently (finish reasons, errors for unknown keywords,
warnings).

Left out on purpose: assisted and contrastive decoding, custom logits processors, decoding without a cache.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Unpack, cast, overload

import torch
from torch import Tensor, nn

from audioflamingo.engine.beam_search import BeamOptions, BeamResult, BeamSearch, BeamState
from audioflamingo.engine.generate_call import CausalLM, Prompt, Request, prepare_request
from audioflamingo.engine.generate_options import (
    GenerateInputs,
    GenerateOptions,
    eos_ids,
    greedy_by_default,
)
from audioflamingo.engine.sampling import NO_TOKEN, choose_tokens, log_probabilities, pack_history
from audioflamingo.errors import ArgumentError, AudioFlamingoError, AudioFlamingoWarning
from audioflamingo.kernels.host import to_host
from audioflamingo.network.kv import KVCache
from audioflamingo.network.outputs import ModelOutput

FinishReason = Literal["stop", "length"]


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
    """Result of `generate(return_dict_in_generate=True)` for R rows: the answers to the first prompt, then
    the next.

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


@torch.no_grad()
def prefill(model: CausalLM, prompt: Prompt, cache: KVCache) -> Tensor:
    """Runs the prompt with its audio and fills the cache. Returns the logits of the next token, `(B, V)`."""
    is_padded = min(prompt.lengths) < prompt.input_ids.shape[1]
    return model.last_token_logits(
        input_ids=prompt.input_ids,
        attention_mask=prompt.is_real.long() if is_padded else None,
        input_features=prompt.input_features,
        input_features_mask=prompt.input_features_mask,
        audio_embeds=prompt.audio_embeds,
        cache=cache,
    )


@torch.no_grad()
def decode_step(model: CausalLM, token_ids: Tensor, cache: KVCache) -> Tensor:
    """Runs one new token a row, `(n, 1)`. Returns the logits of the next token, `(n, V)`."""
    return model.last_token_logits(input_ids=token_ids.to(model.device), cache=cache)


@overload
def generate(
    model: CausalLM,
    input_ids: Tensor | None = ...,
    *,
    streamer: Streamer | None = ...,
    return_dict_in_generate: Literal[True],
    **inputs: Unpack[GenerateInputs],
) -> GenerateOutput: ...


@overload
def generate(
    model: CausalLM,
    input_ids: Tensor | None = ...,
    *,
    streamer: Streamer | None = ...,
    return_dict_in_generate: Literal[False] | None = ...,
    **inputs: Unpack[GenerateInputs],
) -> Tensor: ...


def generate(
    model: CausalLM,
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
        input_ids: `(B, S)` prompts, padded on either side.
        attention_mask: `(B, S)`, 0 on padding. Without it, ids equal to the padding id are taken as
            padding, unless that id also ends answers.
        input_features: `(W, M, T)` log-mel windows of all clips, from the processor.
        input_features_mask: `(W, T)`, 1 on valid frames.
        audio_embeds: projected audio tokens `(A, D)` in place of windows (`ClipCache` keeps them).
        streamer: gets the prompt, then each step's ids `(R,)`, then `end()`; not with beams. Where the
            checkpoint's default is beam search, an answer that is streamed, or that goes on in a cache, is
            greedy.
        return_dict_in_generate: return a `GenerateOutput` in place of the ids.
        **options: see `GenerateOptions` and `GenerationConfig`; None takes the default. `past_key_values`
            is a cache to continue: `input_ids` are then the new tokens only, rules that look at earlier
            tokens do not see what is in it, and afterwards it holds all but the last token of each
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
    audio = {
        "input_features": input_features,
        "input_features_mask": input_features_mask,
        "audio_embeds": audio_embeds,
    }
    is_followed = streamer is not None or options.get("past_key_values") is not None
    given = greedy_by_default(options) if is_followed else options
    request = prepare_request("generate()", model, input_ids, attention_mask, audio, given)
    assert input_ids is not None
    is_beam_search = request.config.num_beams > 1
    if streamer is not None and is_beam_search:
        raise ArgumentError(
            "generate(): a streamer cannot follow beam search, whose answers change until the end."
        )
    if not return_dict_in_generate:
        _warn_unreturned(request)
    with _evaluation_mode(model):
        output = (
            _search_beams(model, request)
            if is_beam_search
            else _generate(model, request, input_ids, streamer)
        )
    prompt_rows = input_ids.repeat_interleave(request.config.num_return_sequences, dim=0)
    output.sequences = torch.cat([prompt_rows, output.sequences.to(prompt_rows)], dim=1)
    output.past_key_values = request.cache
    return output if return_dict_in_generate else output.sequences


def stream(
    model: CausalLM,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    input_features: Tensor | None = None,
    input_features_mask: Tensor | None = None,
    audio_embeds: Tensor | None = None,
    **options: Unpack[GenerateOptions],
) -> Iterator[GenerationStep]:
    """Answers each prompt token by token.

    Takes what `generate` takes except `streamer`, `return_dict_in_generate` and beams, and gives the tokens of
    `generate(num_beams=1)`. Values are checked at once; the model runs as the iterator is consumed. Closing
    the iterator, or dropping it, ends the generation and frees its cache.

    Yields:
        One `GenerationStep` for each column of the answers.

    Raises:
        AudioFlamingoError: as `generate`.
    """
    audio = {
        "input_features": input_features,
        "input_features_mask": input_features_mask,
        "audio_embeds": audio_embeds,
    }
    given = greedy_by_default(options)
    request = prepare_request("stream()", model, input_ids, attention_mask, audio, given)
    if request.config.num_beams > 1:
        raise ArgumentError(
            "stream() cannot follow beam search, whose answers change until the end; use generate()."
        )
    return _stream(model, request)


def _stream(model: CausalLM, request: Request) -> Generator[GenerationStep, None, None]:
    """The loop: one step after the other until every row has finished."""
    with _evaluation_mode(model):
        decoder = Decoder(model, request)
        while not decoder.is_done:
            yield decoder.step()


class Decoder:
    """The rows of one request while they are generated.

    A *slot* is a row of the cache, a *row* one of the output. Rows that have finished leave the cache, unless
    it is the caller's: there they stay, and what the idle slot is fed is forgotten again.
    """

    def __init__(self, model: CausalLM, request: Request) -> None:
        self._model = model
        self._request = request
        self._slots = list(range(request.num_rows))  # the row in each slot
        self._new_ids: list[list[int]] = [[] for _ in self._slots]
        self._finish_reasons: list[FinishReason | None] = [None] * request.num_rows
        self._cache: KVCache | None = None
        self._history: Tensor | None = None
        self._tokens: Tensor | None = None  # the last token of each slot, (n,)

    @property
    def is_done(self) -> bool:
        """Whether every row has finished."""
        return None not in self._finish_reasons

    @torch.no_grad()
    def step(self) -> GenerationStep:
        """Runs the model once and adds one token to every row that has not finished."""
        request = self._request
        logits = self._start() if self._tokens is None else self._continue(self._tokens)  # (n, V)
        num_new_tokens = max(len(ids) for ids in self._new_ids)
        scores = request.rules(logits, self._history, num_new_tokens)
        numbers = None if request.uniforms is None else request.uniforms.draw(self._slots)[:, 0]
        tokens = choose_tokens(scores, None if numbers is None else numbers.to(scores.device))
        is_new = [reason is None for reason in self._finish_reasons]
        token_ids = self._record(to_host(tokens))
        tokens = tokens.clamp(min=0)  # an idle slot may hold NO_TOKEN
        logprobs = log_probabilities(logits, tokens) if request.output_logprobs else None
        report = GenerationStep(
            token_ids=torch.tensor(token_ids, device="cpu"),
            is_new=is_new,
            finish_reasons=list(self._finish_reasons),
            logprobs=None if logprobs is None else self._spread(logprobs, is_new, 0),
            scores=self._spread(scores, is_new, torch.nan) if request.output_scores else None,
            logits=self._spread(logits, is_new, torch.nan) if request.output_logits else None,
        )
        self._advance(tokens)
        return report

    def _start(self) -> Tensor:
        """Prefills once for each prompt and copies the result for its further answers."""
        request = self._request
        prompt, copies = request.prompt, request.config.num_return_sequences
        self._cache = _new_cache(self._model, request) if request.cache is None else request.cache
        logits = prefill(self._model, prompt, self._cache)
        if request.rules.needs_history:
            self._history = pack_history(prompt.input_ids, prompt.is_real).to(logits.device)
        if copies > 1:
            self._keep_slots([row // copies for row in self._slots])
            logits = logits.repeat_interleave(copies, dim=0)
        return logits

    def _continue(self, tokens: Tensor) -> Tensor:
        assert self._cache is not None
        lengths = list(self._cache.lengths)
        logits = decode_step(self._model, tokens[:, None], self._cache)
        is_idle = [self._finish_reasons[row] is not None for row in self._slots]
        if any(is_idle):
            self._cache.crop([n if idle else n + 1 for n, idle in zip(lengths, is_idle, strict=True)])
        return logits

    def _record(self, slot_tokens: list[int]) -> list[int]:
        """Adds the slots' tokens to their rows. Returns an id for each row, padding where it had finished."""
        row_tokens = [self._request.pad_id] * len(self._finish_reasons)
        for row, token in zip(self._slots, slot_tokens, strict=True):
            if self._finish_reasons[row] is not None:
                continue
            if token == NO_TOKEN:
                raise AudioFlamingoError(
                    f"row {row}: no token can be chosen. Either the model's logits are not finite (NaN in "
                    "weights or input, an overflow of float16), or no_repeat_ngram_size forbids all tokens."
                )
            row_tokens[row] = token
            new_ids = self._new_ids[row]
            new_ids.append(token)
            if self._request.stop.is_complete(new_ids):
                self._finish_reasons[row] = "stop"
            elif len(new_ids) >= self._request.limits[row // self._request.config.num_return_sequences]:
                self._finish_reasons[row] = "length"
        return row_tokens

    def _spread(self, values: Tensor, is_new: list[bool], fill: float) -> Tensor:
        """Values of the slots `(n, ...)` as those of the rows `(R, ...)`."""
        full = values.new_full((len(is_new), *values.shape[1:]), fill)
        kept = [slot for slot, row in enumerate(self._slots) if is_new[row]]
        rows = torch.tensor([self._slots[slot] for slot in kept], device=values.device)
        return full.index_copy(0, rows, values.index_select(0, torch.tensor(kept, device=values.device)))

    def _advance(self, tokens: Tensor) -> None:
        """Hands the chosen tokens on to the next step and lets finished rows go."""
        if self._history is not None:
            self._history = torch.cat([self._history, tokens[:, None]], dim=1)
        running = [slot for slot, row in enumerate(self._slots) if self._finish_reasons[row] is None]
        if running and len(running) < len(self._slots) and self._request.cache is None:
            tokens = tokens[torch.tensor(running, device=tokens.device)]
            self._slots = [self._slots[slot] for slot in running]
            self._keep_slots(running)
        self._tokens = tokens

    def _keep_slots(self, slots: list[int]) -> None:
        assert self._cache is not None
        self._cache.select(slots)
        if self._history is not None:
            self._history = self._history[torch.tensor(slots, device=self._history.device)]


def _generate(
    model: CausalLM, request: Request, input_ids: Tensor, streamer: Streamer | None
) -> GenerateOutput:
    """Runs the loop to its end. The output's sequences are the answers only."""
    steps: list[GenerationStep] = []
    copies = request.config.num_return_sequences
    try:
        if streamer is not None:
            rows = [row for row in to_host(input_ids) for _ in range(copies)]
            streamer.put(torch.tensor(rows, device="cpu"))
        with contextlib.closing(_stream(model, request)) as stream:
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
        finish_reasons=cast(list[FinishReason], steps[-1].finish_reasons),
        num_new_tokens=[sum(column) for column in zip(*(step.is_new for step in steps), strict=True)],
        logprobs=torch.stack(logprobs, dim=1) if logprobs else None,
        scores=tuple(s.scores for s in steps if s.scores is not None) or None,
        logits=tuple(s.logits for s in steps if s.logits is not None) or None,
    )


@torch.no_grad()
def _search_beams(model: CausalLM, request: Request) -> GenerateOutput:
    """Runs beam search. The output's sequences are the answers only."""
    config, prompt = request.config, request.prompt
    options = BeamOptions(
        num_beams=config.num_beams,
        num_return_sequences=config.num_return_sequences,
        length_penalty=config.length_penalty,
        early_stopping=cast("bool | Literal['never']", config.early_stopping),
        do_sample=request.uniforms is not None,
        num_candidates=max(2, 1 + len(eos_ids(config))) * config.num_beams,
    )
    states = [BeamState(options, limit, request.stop) for limit in request.limits]
    search = BeamSearch(
        options, request.rules, states, request.uniforms, request.output_scores, request.output_logits
    )
    cache = _new_cache(model, request)
    logits = prefill(model, prompt, cache)
    history = None
    if request.rules.needs_history:
        history = pack_history(prompt.input_ids, prompt.is_real).to(logits.device)
    result = search.run(logits, history, cache, lambda token_ids: decode_step(model, token_ids, cache))
    return _beam_output(result, request)


def _beam_output(result: BeamResult, request: Request) -> GenerateOutput:
    answers = [beam for beams in result.answers for beam in beams]
    prompts = [prompt for prompt, beams in enumerate(result.answers) for _ in beams]
    origins = [
        [prompt * request.config.num_beams + origin for origin in beam.origins]
        for prompt, beam in zip(prompts, answers, strict=True)
    ]
    return GenerateOutput(
        sequences=_pad_rows([beam.token_ids for beam in answers], request.pad_id),
        finish_reasons=["stop" if beam.is_stopped else "length" for beam in answers],
        num_new_tokens=[len(beam.token_ids) for beam in answers],
        logprobs=_pad_rows([beam.logprobs for beam in answers], 0.0) if request.output_logprobs else None,
        scores=tuple(result.scores) if request.output_scores else None,
        logits=tuple(result.logits) if request.output_logits else None,
        sequences_scores=torch.tensor([float(beam.score) for beam in answers], device="cpu"),
        beam_indices=_pad_rows(origins, -1),
    )


def _pad_rows(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    """Rows of unequal length as one tensor `(R, longest)`."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device="cpu")


def _new_cache(model: CausalLM, request: Request) -> KVCache:
    longest = max(
        length + limit for length, limit in zip(request.prompt.lengths, request.limits, strict=True)
    )
    return model.new_cache(len(request.limits), longest)


@contextlib.contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Switches the modules that are in training mode to evaluation (no dropout), and back."""
    trained = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _warn_unreturned(request: Request) -> None:
    names = [name for name in ("output_scores", "output_logits", "output_logprobs") if getattr(request, name)]
    if names:
        warnings.warn(
            f"generate(): no effect of {', '.join(names)} without return_dict_in_generate=True.",
            AudioFlamingoWarning,
            stacklevel=3,
        )
