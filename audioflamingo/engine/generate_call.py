"""One call of `generate` or `stream`: its inputs checked against the model, and turned into requests to the engine.

Everything that can be wrong with a call is found here, before the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioflamingo.config import GenerationConfig, MusicFlamingoConfig
from audioflamingo.engine.generate_options import (
    draws,
    eos_ids,
    pad_id,
    params_of,
    resolve_options,
    stop_texts,
)
from audioflamingo.engine.request import Output, Request, SamplingParams
from audioflamingo.engine.sampling import Uniforms
from audioflamingo.errors import ArgumentError, ContextLengthError, PromptError, warn
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.network.kv import KVCache
from audioflamingo.processor.collate import unbatch, unpad
from audioflamingo.processor.prompt import Prompt


@dataclass(frozen=True)
class ModelInputs:
    """What a call is about: tensors as the processor makes them.

    Attributes:
        input_ids: `(B, S)`.
        attention_mask: `(B, S)`, 0 on padding.
        input_features: `(W, M, T)` log-mel windows of all clips.
        input_features_mask: `(W, T)`, 1 on valid frames.
        audio_embeds: projected audio tokens `(A, D)` in place of windows.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None = None
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None
    audio_embeds: Tensor | None = None


@dataclass(frozen=True)
class GenerateCall:
    """One checked call.

    Attributes:
        input_ids: `(B, S)` as they were given.
        config: the options, every one decided.
        requests: one for each prompt.
        pad_id: fills rows behind their end.
        cache: the caller's cache; None when one is built.
        outputs: which of `output_scores`, `output_logits` and `output_logprobs` are asked for.
    """

    input_ids: Tensor
    config: GenerationConfig
    requests: list[Request]
    pad_id: int
    cache: KVCache | None
    outputs: frozenset[str]


def prepare_call(
    model: AudioFlamingo3WithHead, inputs: ModelInputs, options: Mapping[str, Any]
) -> GenerateCall:
    """Checks everything about one call that can be checked before the model runs.

    Raises:
        ArgumentError: an unknown keyword, or a value that is not allowed.
        ContextLengthError: a prompt leaves no room for an answer.
        PromptError: audio that does not fit the prompts.
    """
    config = resolve_options(model.generation_config, options)
    _check_special_ids(config, model.config.text_config.vocab_size)
    prompts, audio = _read_prompts(model, config, inputs)
    assert inputs.input_ids is not None
    batch_size, num_columns = inputs.input_ids.shape
    cache = options.get("past_key_values")
    config = _check_cache(cache, config, options, batch_size)
    num_columns += 0 if cache is None else max(cache.lengths)
    limits = _limits(config, prompts, cache, model.config.text_config.max_position_embeddings, num_columns)
    uniforms = _uniforms(config, options, batch_size)
    adapters = _adapters(model, options.get("adapter"), batch_size)
    outputs = frozenset(
        name for name in ("output_scores", "output_logits", "output_logprobs") if options.get(name)
    )
    params = _params(model, config, num_columns, max(limits), options)
    params = _with_outputs(params, outputs)
    if stop_texts(config) and pad_id(config) is None and batch_size * config.num_return_sequences > 1:
        raise ArgumentError("stop_strings with several rows need pad_token_id to fill the shorter ones.")
    rows_each = config.num_return_sequences if config.num_beams == 1 else 1
    requests = [
        Request(
            prompt,
            replace(params, max_new_tokens=limit),
            uniforms=uniforms,
            first_row=index * rows_each,
            audio=tuple(embeds),
            adapter=adapters[index],
        )
        for index, (prompt, limit, embeds) in enumerate(zip(prompts, limits, audio, strict=True))
    ]
    return GenerateCall(inputs.input_ids, config, requests, pad_id(config) or 0, cache, outputs)


def prepare_one(
    model: AudioFlamingo3WithHead,
    prompt: Prompt,
    options: Mapping[str, Any],
    on_output: Callable[[Output], None] | None = None,
) -> Request:
    """A request for one answer to one prompt, with the keywords of `generate`.

    Raises:
        ArgumentError: an unknown keyword, a value that is not allowed, or several answers.
        ContextLengthError: the prompt leaves no room for an answer.
    """
    config = resolve_options(model.generation_config, options)
    if config.num_return_sequences > 1 or options.get("past_key_values") is not None:
        raise ArgumentError("one answer is given here: leave num_return_sequences and past_key_values out.")
    (limit,) = _limits(config, [prompt], None, model.config.text_config.max_position_embeddings, len(prompt))
    params = _params(model, config, len(prompt), limit, options)
    (adapter,) = _adapters(model, options.get("adapter"), 1)
    return Request(prompt, params, on_output, uniforms=_uniforms(config, options, 1), adapter=adapter)


def _params(
    model: AudioFlamingo3WithHead,
    config: GenerationConfig,
    num_columns: int,
    limit: int,
    options: Mapping[str, Any],
) -> SamplingParams:
    biases, vocab_size = options.get("logit_bias") or {}, model.config.text_config.vocab_size
    for token_id, bias in biases.items():
        if not (isinstance(token_id, int) and 0 <= token_id < vocab_size and isinstance(bias, int | float)):
            raise ArgumentError(
                f"logit_bias must be a dict of token ids below {vocab_size} and numbers, got {token_id!r}: {bias!r}."
            )
    return params_of(config, num_columns, limit, options.get("tokenizer"), options.get("constraint"), biases)


def _adapters(model: AudioFlamingo3WithHead, given: Any, batch_size: int) -> list[str | None]:
    """The adapter of each prompt: one name for all, or one for each, None for the model itself."""
    names = list(given) if isinstance(given, list | tuple) else [given] * batch_size
    if len(names) != batch_size:
        raise ArgumentError(
            f"adapter has {len(names)} entries for {batch_size} prompts; give one name, or one for each."
        )
    for name in names:
        if not isinstance(name, str | None):
            raise ArgumentError(
                f"adapter must be the name of an adapter, None, or a list of them, got {given!r}."
            )
        if name is not None:
            _ = model.adapters[name]
    return names


def _with_outputs(params: SamplingParams, outputs: frozenset[str]) -> SamplingParams:
    return replace(
        params,
        keeps_scores="output_scores" in outputs,
        keeps_logits="output_logits" in outputs,
        num_top_logprobs=0 if "output_logprobs" in outputs else None,
    )


def _read_prompts(
    model: AudioFlamingo3WithHead, config: GenerationConfig, inputs: ModelInputs
) -> tuple[list[Prompt], list[list[tuple[int, Tensor]]]]:
    """The prompts without their padding, and for each the audio that is encoded already."""
    for name in ("input_features", "input_features_mask", "audio_embeds"):
        value = getattr(inputs, name)
        if value is not None and not isinstance(value, Tensor):
            raise ArgumentError(f"{name} must be a tensor, got {type(value).__name__}.")
    if inputs.input_features is not None and inputs.audio_embeds is not None:
        raise ArgumentError("give either input_features or audio_embeds, not both.")
    padding = None if config.pad_token_id in eos_ids(config) else config.pad_token_id
    audio_token_id = model.config.audio_token_id
    input_ids: Any = inputs.input_ids
    if inputs.audio_embeds is None:
        prompts = unbatch(
            input_ids,
            audio_token_id,
            inputs.attention_mask,
            inputs.input_features,
            inputs.input_features_mask,
            padding,
            isinstance(model.config, MusicFlamingoConfig),
        )
        audio: list[list[tuple[int, Tensor]]] = [[] for _ in prompts]
    else:
        prompts = [Prompt(ids) for ids in unpad(input_ids, inputs.attention_mask, padding)]
        audio = _spread_audio(prompts, audio_token_id, inputs.audio_embeds)
    vocab_size = model.config.text_config.vocab_size
    for prompt in prompts:
        for token_id in (min(prompt.token_ids), max(prompt.token_ids)):
            if not 0 <= token_id < vocab_size:
                raise ArgumentError(f"input_ids hold {token_id}; the vocabulary has {vocab_size} tokens.")
    return prompts, audio


def _spread_audio(
    prompts: list[Prompt], audio_token_id: int, embeds: Tensor
) -> list[list[tuple[int, Tensor]]]:
    """Encoded audio tokens `(A, D)` at the places of the prompts' `<sound>` ids: first position and rows of each."""
    counts = [prompt.token_ids.count(audio_token_id) for prompt in prompts]
    if sum(counts) != len(embeds):
        raise PromptError(
            f"input_ids hold {sum(counts)} <sound> tokens, the audio gives {len(embeds)} vectors; both must come from "
            "one call of the processor."
        )
    spread = []
    for prompt, part in zip(prompts, embeds.split(counts), strict=True):
        places = np.flatnonzero(np.array(prompt.token_ids) == audio_token_id)
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []
        starts = [int(run[0]) for run in runs]
        spread.append(list(zip(starts, part.split([len(run) for run in runs]), strict=True)))
    return spread


def _check_special_ids(config: GenerationConfig, vocab_size: int) -> None:
    for name, ids in (("eos_token_id", eos_ids(config)), ("pad_token_id", (config.pad_token_id or 0,))):
        for token_id in ids:
            if token_id >= vocab_size:
                raise ArgumentError(f"{name} {token_id} is outside the vocabulary of {vocab_size}.")


def _check_cache(
    cache: KVCache | None, config: GenerationConfig, options: Mapping[str, Any], batch_size: int
) -> GenerationConfig:
    """Checks a cache that is continued; the options, greedy where beams are only the checkpoint's default."""
    if cache is None:
        return config
    if not isinstance(cache, KVCache):
        raise ArgumentError(
            f"past_key_values must be a KVCache (model.new_cache), got {type(cache).__name__}."
        )
    if cache.batch_size != batch_size:
        raise ArgumentError(f"past_key_values has {cache.batch_size} rows, input_ids {batch_size}.")
    if options.get("num_beams") is None and options.get("generation_config") is None:
        config = replace(config, num_beams=1)
    if config.num_beams > 1 or config.num_return_sequences > 1:
        raise ArgumentError("past_key_values continues one answer a prompt, without num_beams.")
    return config


def _limits(
    config: GenerationConfig, prompts: list[Prompt], cache: KVCache | None, context: int, num_columns: int
) -> list[int]:
    """Most new tokens for each prompt: what was asked for, within the model's context."""
    wanted = config.max_new_tokens
    if wanted is None:
        assert config.max_length is not None
        wanted = config.max_length - num_columns
        if wanted < 1:
            raise ArgumentError(
                f"max_length={config.max_length} leaves no room behind the prompt's {num_columns} tokens; set "
                "max_new_tokens."
            )
    past = [0] * len(prompts) if cache is None else cache.lengths
    space = context if cache is None else min(context, cache.max_length)
    place = "context" if space == context else "cache"
    longest = max(old + len(prompt) for old, prompt in zip(past, prompts, strict=True))
    if longest >= space:
        raise ContextLengthError(
            f"the prompt has {longest} tokens, the {place} holds {space}: no room for an answer. Shorten the "
            "audio (25 tokens a second) or the conversation."
        )
    if longest + wanted > space:
        warn(
            f"{wanted} new tokens do not fit behind a prompt of {longest} tokens in the {place} of {space}; "
            f"the answer is limited to {space - longest}."
        )
    return [min(wanted, space - old - len(prompt)) for old, prompt in zip(past, prompts, strict=True)]


def _uniforms(config: GenerationConfig, options: Mapping[str, Any], batch_size: int) -> Uniforms | None:
    """Where random numbers come from; None when nothing is drawn."""
    seed, generator = options.get("seed"), options.get("generator")
    if seed is not None and generator is not None:
        raise ArgumentError("seed and generator exclude each other.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    num_rows = batch_size * (config.num_return_sequences if config.num_beams == 1 else 1)
    seeds = [] if seed is None else seed if isinstance(seed, list | tuple) else [seed]
    if any(not isinstance(s, int) or isinstance(s, bool) or not 0 <= s < 2**64 for s in seeds):
        raise ArgumentError(f"seed must be a whole number in [0, 2**64) or a list of them, got {seed!r}.")
    if not draws(config):
        return None
    if seeds and not isinstance(seed, int) and len(seeds) != num_rows:
        raise ArgumentError(f"seed has {len(seeds)} entries, {num_rows} are needed.")
    return Uniforms(num_rows, seed, generator)
