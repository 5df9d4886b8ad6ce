"""One call of `generate` or `stream`: its inputs checked against the model, and its options turned into
rules.

Everything that can be wrong with a call is found here, before the model runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from audioflamingo.config import AudioFlamingo3Config, GenerationConfig
from audioflamingo.engine.generate_options import draws, eos_ids, pad_id, resolve_options, stop_texts
from audioflamingo.engine.sampling import LogitsRules, Uniforms
from audioflamingo.engine.stopping import StopRules
from audioflamingo.errors import ArgumentError, AudioFlamingoWarning, ContextLengthError
from audioflamingo.kernels.host import to_host
from audioflamingo.network.kv import KVCache


class CausalLM(Protocol):
    """A model, as far as generation needs one."""

    config: AudioFlamingo3Config
    generation_config: GenerationConfig

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        ...

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """Builds an empty cache."""
        ...

    def last_token_logits(
        self,
        input_ids: Tensor,
        cache: KVCache,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        audio_embeds: Tensor | None = None,
    ) -> Tensor:
        """Runs new tokens, appends them to the cache, returns the logits of each row's last one."""
        ...


@dataclass(frozen=True)
class Prompt:
    """The checked inputs of one call, on the model's device.

    Attributes:
        input_ids: int64 `(B, S)`, 0 on padding.
        is_real: bool `(B, S)`, False on padding.
        lengths: real tokens of each row.
        input_features: log-mel windows of all clips.
        input_features_mask: their valid frames.
        audio_embeds: projected audio tokens `(A, D)`, in place of windows.
    """

    input_ids: Tensor
    is_real: Tensor
    lengths: list[int]
    input_features: Tensor | None
    input_features_mask: Tensor | None
    audio_embeds: Tensor | None


@dataclass(frozen=True)
class Request:
    """One checked call of `generate` or `stream`.

    Attributes:
        prompt: the inputs.
        config: the options, every one decided.
        rules: what is done to the logits.
        stop: what ends an answer besides its length.
        limits: most new tokens for each prompt.
        pad_id: fills rows behind their end.
        uniforms: random numbers; None when nothing is drawn.
        cache: the caller's cache; None when one is built.
        output_scores, output_logits, output_logprobs: what to report beside the tokens.
    """

    prompt: Prompt
    config: GenerationConfig
    rules: LogitsRules
    stop: StopRules
    limits: list[int]
    pad_id: int
    uniforms: Uniforms | None
    cache: KVCache | None
    output_scores: bool
    output_logits: bool
    output_logprobs: bool

    @property
    def num_rows(self) -> int:
        """Rows of the output."""
        return len(self.limits) * self.config.num_return_sequences


def prepare_request(
    where: str,
    model: CausalLM,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    audio: Mapping[str, Tensor | None],
    options: Mapping[str, Any],
) -> Request:
    """Checks everything about one call that can be checked before the model runs.

    `audio` holds what `Prompt` keeps of the clips, by name.

    Raises:
        ArgumentError: an unknown keyword, or a value that is not allowed.
        ContextLengthError: a prompt leaves no room for an answer.
    """
    others = ["input_ids", "attention_mask", *audio]
    if where == "generate()":
        others += ["streamer", "return_dict_in_generate"]
    config = resolve_options(where, model.generation_config, options, others)
    _check_special_ids(where, config, model.config.text_config.vocab_size)
    prompt = _build_prompt(where, model, config, input_ids, attention_mask, audio)
    cache = options.get("past_key_values")
    batch_size, num_columns = prompt.input_ids.shape
    _check_cache(where, cache, config, batch_size)
    num_columns += 0 if cache is None else max(cache.lengths)
    return Request(
        prompt=prompt,
        config=config,
        rules=logits_rules(config, num_columns),
        stop=_stop_rules(where, config, options.get("tokenizer"), batch_size),
        limits=_limits(
            where, config, prompt, cache, model.config.text_config.max_position_embeddings, num_columns
        ),
        pad_id=pad_id(config) or 0,
        uniforms=_uniforms(where, config, options.get("seed"), options.get("generator"), batch_size),
        cache=cache,
        output_scores=bool(options.get("output_scores")),
        output_logits=bool(options.get("output_logits")),
        output_logprobs=bool(options.get("output_logprobs")),
    )


def _build_prompt(
    where: str,
    model: CausalLM,
    config: GenerationConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    audio: Mapping[str, Tensor | None],
) -> Prompt:
    """Checks the inputs and moves them to the model's device."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        found = repr(input_ids)
        if isinstance(input_ids, Tensor):
            found = f"{input_ids.dtype} {tuple(input_ids.shape)}"
        raise ArgumentError(
            f"{where}: input_ids must be a tensor of whole numbers (batch, length), got {found}."
        )
    if 0 in input_ids.shape:
        raise ArgumentError(f"{where}: input_ids of shape {tuple(input_ids.shape)} hold no token.")
    for name, value in audio.items():
        if value is not None and not isinstance(value, Tensor):
            raise ArgumentError(f"{where}: {name} must be a tensor, got {type(value).__name__}.")
    input_ids = input_ids.to(model.device, torch.long)
    is_real = _real_tokens(where, input_ids, attention_mask, config)
    input_ids = input_ids.masked_fill(~is_real, 0)
    lengths = _read_lengths(where, input_ids, is_real, model.config.text_config.vocab_size)
    moved = {name: None if value is None else value.to(model.device) for name, value in audio.items()}
    return Prompt(input_ids, is_real, lengths, **moved)


def _real_tokens(
    where: str, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig
) -> Tensor:
    """Where `input_ids` `(B, S)` are not padding, bool."""
    if attention_mask is None:
        if config.pad_token_id is None or config.pad_token_id in eos_ids(config):
            return torch.ones_like(input_ids, dtype=torch.bool)
        return input_ids != config.pad_token_id
    batch_size, num_columns = input_ids.shape
    shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else ()
    if len(shape) != 2 or shape[0] != batch_size or shape[1] < num_columns:
        raise ArgumentError(
            f"{where}: attention_mask must be a tensor {(batch_size, num_columns)} as input_ids, got "
            f"{shape or type(attention_mask).__name__}."
        )
    return attention_mask[:, -num_columns:].to(input_ids.device) != 0


def _read_lengths(where: str, input_ids: Tensor, is_real: Tensor, vocab_size: int) -> list[int]:
    """Real tokens of each row; checks that there are some, and that the model knows them."""
    lengths, smallest, largest = to_host(torch.stack([is_real.sum(1), input_ids.amin(1), input_ids.amax(1)]))
    if 0 in lengths:
        raise ArgumentError(
            f"{where}: row {lengths.index(0)} of input_ids is all padding; pass attention_mask if it is not."
        )
    for token_id in (min(smallest), max(largest)):
        if not 0 <= token_id < vocab_size:
            raise ArgumentError(
                f"{where}: input_ids hold {token_id}; the vocabulary has {vocab_size} tokens."
            )
    return lengths


def _check_special_ids(where: str, config: GenerationConfig, vocab_size: int) -> None:
    for name, ids in (("eos_token_id", eos_ids(config)), ("pad_token_id", (config.pad_token_id or 0,))):
        for token_id in ids:
            if token_id >= vocab_size:
                raise ArgumentError(f"{where}: {name} {token_id} is outside the vocabulary of {vocab_size}.")


def _check_cache(where: str, cache: KVCache | None, config: GenerationConfig, batch_size: int) -> None:
    if cache is None:
        return
    if not isinstance(cache, KVCache):
        raise ArgumentError(
            f"{where}: past_key_values must be a KVCache (model.new_cache), got {type(cache).__name__}."
        )
    if cache.batch_size != batch_size:
        raise ArgumentError(f"{where}: past_key_values has {cache.batch_size} rows, input_ids {batch_size}.")
    if config.num_beams > 1 or config.num_return_sequences > 1:
        raise ArgumentError(f"{where}: past_key_values continues one answer a prompt, without num_beams.")


def logits_rules(config: GenerationConfig, num_columns: int) -> LogitsRules:
    """The rules; `num_columns` is the length of the prompt that `min_length` counts."""
    is_drawn, eos = draws(config), eos_ids(config)
    return LogitsRules(
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        min_new_tokens=config.min_new_tokens or max(0, config.min_length - num_columns),
        eos_token_ids=eos,
        do_sample=is_drawn,
        temperature=config.temperature,
        top_k=config.top_k or 0,
        top_p=config.top_p,
        min_p=config.min_p,
        min_tokens_to_keep=1 if config.num_beams == 1 else max(2, 1 + len(eos)),
    )


def _stop_rules(where: str, config: GenerationConfig, tokenizer: Any, batch_size: int) -> StopRules:
    texts = stop_texts(config)
    if texts and not hasattr(tokenizer, "decode"):
        raise ArgumentError(
            f"{where}: stop_strings need tokenizer=, an object with decode(ids), got {tokenizer!r}."
        )
    if texts and pad_id(config) is None and batch_size * config.num_return_sequences > 1:
        raise ArgumentError(
            f"{where}: stop_strings with several rows need pad_token_id to fill the shorter ones."
        )
    return StopRules(frozenset(eos_ids(config)), texts, tokenizer)


def _limits(
    where: str,
    config: GenerationConfig,
    prompt: Prompt,
    cache: KVCache | None,
    context: int,
    num_columns: int,
) -> list[int]:
    """Most new tokens for each prompt: what was asked for, within the model's context."""
    wanted = config.max_new_tokens
    if wanted is None:
        assert config.max_length is not None
        wanted = config.max_length - num_columns
        if wanted < 1:
            raise ArgumentError(
                f"{where}: max_length={config.max_length} leaves no room behind the prompt's {num_columns} "
                "tokens; set max_new_tokens."
            )
    past = [0] * len(prompt.lengths) if cache is None else cache.lengths
    space = context if cache is None else min(context, cache.max_length)
    place = "context" if space == context else "cache"
    longest = max(old + new for old, new in zip(past, prompt.lengths, strict=True))
    if longest >= space:
        raise ContextLengthError(
            f"the prompt has {longest} tokens, the {place} holds {space}: no room for an answer. Shorten the "
            "audio (25 tokens a second) or the conversation."
        )
    if longest + wanted > space:
        warnings.warn(
            f"{wanted} new tokens do not fit behind a prompt of {longest} tokens in the {place} of {space}; "
            f"the answer is limited to {space - longest}.",
            AudioFlamingoWarning,
            stacklevel=4,
        )
    return [min(wanted, space - old - new) for old, new in zip(past, prompt.lengths, strict=True)]


def _uniforms(
    where: str, config: GenerationConfig, seed: Any, generator: torch.Generator | None, batch_size: int
) -> Uniforms | None:
    num_rows = batch_size * (config.num_return_sequences if config.num_beams == 1 else 1)
    if seed is not None and generator is not None:
        raise ArgumentError(f"{where}: seed and generator exclude each other.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(f"{where}: generator must be a torch.Generator, got {type(generator).__name__}.")
    seeds = [] if seed is None else seed if isinstance(seed, list | tuple) else [seed]
    if any(not isinstance(s, int) or isinstance(s, bool) or not 0 <= s < 2**64 for s in seeds):
        raise ArgumentError(
            f"{where}: seed must be a whole number in [0, 2**64) or a list of them, got {seed!r}."
        )
    if not draws(config):
        return None
    if seeds and not isinstance(seed, int) and len(seeds) != num_rows:
        raise ArgumentError(f"{where}: seed has {len(seeds)} entries, {num_rows} are needed.")
    return Uniforms(num_rows, seed, generator)
