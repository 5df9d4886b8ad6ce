"""The options of `generate`: their names and types, where a value comes from, and what it may be.

A value passed by the caller wins over one in `generation_config=`, which wins over the model's own
`generation_config`; None stands for "not passed". The defaults live in
`audioflamingo.config.GenerationConfig`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor

from audioflamingo.config import GenerationConfig
from audioflamingo.engine.beam_search import BeamOptions
from audioflamingo.engine.constraints import compile_constraint
from audioflamingo.engine.request import SamplingParams
from audioflamingo.engine.sampling import LogitsRules
from audioflamingo.engine.stopping import Decodes, StopRules
from audioflamingo.errors import ArgumentError, unknown_arguments, warn
from audioflamingo.network.kv import KVCache

CONFIG_FIELDS = tuple(f.name for f in dataclasses.fields(GenerationConfig) if f.name != "extra")
SPECIAL_IDS = ("bos_token_id", "pad_token_id", "eos_token_id")
DEFAULT_MAX_NEW_TOKENS = GenerationConfig.max_new_tokens

# Options of a generation_config.json that change answers and that this package does not have, with the value
# at which they do nothing.
NOT_IMPLEMENTED = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "penalty_alpha": None,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
    "sequence_bias": None,
    "bad_words_ids": None,
    "force_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "renormalize_logits": False,
    "token_healing": False,
    "max_time": None,
    "watermarking_config": None,
}
# More keywords of transformers' `generate` that are not here, likewise.
NOT_IMPLEMENTED_KEYWORDS = {
    **NOT_IMPLEMENTED,
    "assistant_model": None,
    "cache_implementation": None,
    "custom_generate": None,
    "logits_processor": None,
    "negative_prompt_ids": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "prefix_allowed_tokens_fn": None,
    "prompt_lookup_num_tokens": None,
    "stopping_criteria": None,
    "synced_gpus": False,
}


class GenerateOptions(TypedDict, total=False):
    """Keywords that `generate` and `stream` share. None, for any of them, means the default.

    The first group are the fields of `GenerationConfig`, which documents them and holds their defaults.
    """

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    no_repeat_ngram_size: int | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    num_return_sequences: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None

    generation_config: GenerationConfig | Mapping[str, Any] | None
    tokenizer: Decodes | None
    adapter: str | Sequence[str | None] | None
    seed: int | Sequence[int] | None
    generator: torch.Generator | None
    past_key_values: KVCache | None
    use_cache: bool | None
    constraint: Mapping[str, Any] | None
    logit_bias: Mapping[int, float] | None
    output_scores: bool | None
    output_logits: bool | None
    output_logprobs: bool | None


class GenerateInputs(GenerateOptions, total=False):
    """`GenerateOptions` and the model's inputs besides `input_ids`."""

    attention_mask: Tensor | None
    input_features: Tensor | None
    input_features_mask: Tensor | None
    audio_embeds: Tensor | None


OPTION_NAMES = frozenset(GenerateOptions.__annotations__)
INPUT_NAMES = frozenset(GenerateInputs.__annotations__) | {"input_ids", "streamer", "return_dict_in_generate"}


def sampling_options(temperature: float | None) -> dict[str, Any]:
    """Keywords of `generate` for a door that knows a temperature only.

    Above 0 tokens are drawn one by one, whatever the checkpoint's beams; at 0 the likeliest are taken; None leaves it
    to the checkpoint.
    """
    if temperature is None:
        return {}
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, "num_beams": 1}
    return {"do_sample": False}


def resolve_options(
    model_defaults: GenerationConfig,
    options: Mapping[str, Any],
) -> GenerationConfig:
    """Merges what the caller passed with the defaults, and checks every value.

    Args:
        model_defaults: the model's `generation_config`.
        options: the caller's keywords.

    Returns:
        The values to use. Exactly one of `max_new_tokens` and `max_length` is set.

    Raises:
        ArgumentError: an unknown keyword, or a value that is not allowed.
    """
    _check_names(options)
    passed = {name: options[name] for name in CONFIG_FIELDS if options.get(name) is not None}
    defaults = _defaults(model_defaults, options.get("generation_config"))
    config = dataclasses.replace(defaults, **{**passed, **_length_limit(defaults, passed)})
    for name, (is_allowed, allowed) in CHECKS.items():
        value = getattr(config, name)
        if value is not None and not is_allowed(value):
            raise ArgumentError(f"{name} must be {allowed}, got {value!r}.")
    _check_together(config)
    _warn_without_effect(config, passed)
    return config


def _check_names(options: Mapping[str, Any]) -> None:
    """Refuses keywords that are not known, and those of transformers that would change the answer."""
    unknown = [
        name
        for name, value in options.items()
        if name not in OPTION_NAMES and not _has_no_effect(name, value)
    ]
    missing = [name for name in unknown if name in NOT_IMPLEMENTED_KEYWORDS]
    if missing:
        raise ArgumentError(f"generate({missing[0]}=...) is not implemented here; leave it out.")
    if unknown:
        raise unknown_arguments("generate()", unknown, OPTION_NAMES | INPUT_NAMES)
    if options.get("use_cache") not in (None, True):
        raise ArgumentError(
            f"use_cache={options['use_cache']!r}: generate always keeps a cache, which changes no answer; leave it out."
        )


def _has_no_effect(name: str, value: Any) -> bool:
    """Whether a keyword that is not here has the value at which it does nothing in transformers either."""
    if name not in NOT_IMPLEMENTED_KEYWORDS:
        return False
    return value is None or (isinstance(value, int | float) and value == NOT_IMPLEMENTED_KEYWORDS[name])


def _defaults(
    model_defaults: GenerationConfig, given: GenerationConfig | Mapping[str, Any] | None
) -> GenerationConfig:
    """The defaults of a call: the model's, or those of `generation_config=` with the model's special ids."""
    if given is None:
        found = model_defaults
    elif isinstance(given, GenerationConfig):
        ids = {name: getattr(model_defaults, name) for name in SPECIAL_IDS if getattr(given, name) is None}
        found = dataclasses.replace(given, **ids)
    elif isinstance(given, Mapping):
        unknown = [name for name in given if name not in CONFIG_FIELDS]
        if unknown:
            raise unknown_arguments("generation_config", unknown, CONFIG_FIELDS)
        changes = {name: value for name, value in given.items() if value is not None}
        found = dataclasses.replace(model_defaults, **{**changes, **_length_limit(model_defaults, changes)})
    else:
        raise ArgumentError(
            f"generation_config must be a GenerationConfig or a dict, got {type(given).__name__}."
        )
    ignored = {
        name: found.extra[name]
        for name, neutral in NOT_IMPLEMENTED.items()
        if found.extra.get(name) is not None and found.extra[name] != neutral
    }
    if ignored:
        warn(
            f"the generation config asks for {ignored}, which this package does not implement; it has no "
            "effect.",
        )
    return found


def _length_limit(defaults: GenerationConfig, passed: Mapping[str, Any]) -> dict[str, int | None]:
    """The one length limit that holds: the caller's, else the defaults' (their own before our default)."""
    if passed.get("max_new_tokens") is not None:
        if passed.get("max_length") is not None:
            warn(
                f"max_length={passed['max_length']} has no effect beside "
                f"max_new_tokens={passed['max_new_tokens']}.",
            )
        return {"max_new_tokens": passed["max_new_tokens"], "max_length": None}
    if passed.get("max_length") is not None:
        return {"max_new_tokens": None, "max_length": passed["max_length"]}
    has_own_limit = defaults.max_new_tokens not in (None, DEFAULT_MAX_NEW_TOKENS)
    if defaults.max_length is not None and not has_own_limit:
        return {"max_new_tokens": None, "max_length": defaults.max_length}
    return {"max_new_tokens": defaults.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, "max_length": None}


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_eos(value: Any) -> bool:
    ids = [value] if isinstance(value, numbers.Integral) else value
    return isinstance(ids, list | tuple) and all(_is_whole(token_id, 0) for token_id in ids)


def _are_stop_strings(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list | tuple) and all(isinstance(text, str) and text for text in texts)


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: _is_whole(value, least)), f"a whole number of at least {least}"


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": _whole(1),
    "max_length": _whole(1),
    "min_new_tokens": _whole(0),
    "min_length": _whole(0),
    "do_sample": (lambda value: isinstance(value, bool), "True or False"),
    "temperature": (
        lambda value: _is_number(value) and value >= 0,
        "a number of at least 0 (0 takes the most likely token)",
    ),
    "top_k": (lambda value: _is_whole(value, -1), "a whole number of at least 1, or 0 or -1 for no limit"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number in (0, 1] (1 for no limit)"),
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number in [0, 1] (0 for no limit)"),
    "repetition_penalty": (
        lambda value: _is_number(value) and value > 0,
        "a number above 0 (1 for no penalty)",
    ),
    "frequency_penalty": (_is_number, "a number (0 for no penalty)"),
    "presence_penalty": (_is_number, "a number (0 for no penalty)"),
    "no_repeat_ngram_size": (
        lambda value: _is_whole(value, 0),
        "a whole number of at least 1, or 0 for no ban",
    ),
    "num_beams": _whole(1),
    "length_penalty": (_is_number, "a number"),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "True, False or 'never'"),
    "num_return_sequences": _whole(1),
    "pad_token_id": _whole(0),
    "eos_token_id": (_is_eos, "a token id or a list of them"),
    "stop_strings": (_are_stop_strings, "a text or a list of texts, none of them empty"),
}


def _check_together(config: GenerationConfig) -> None:
    def refuse_more(name: str, other: str) -> None:
        value, most = getattr(config, name), getattr(config, other)
        if most is not None and value > most:
            raise ArgumentError(f"{name}={value} is more than {other}={most}.")

    refuse_more("min_new_tokens", "max_new_tokens")
    refuse_more("min_length", "max_length")
    if config.num_beams > 1:
        refuse_more("num_return_sequences", "num_beams")
    elif config.num_return_sequences > 1 and not draws(config):
        raise ArgumentError(
            f"num_return_sequences={config.num_return_sequences} needs num_beams, or do_sample=True "
            "with a temperature above 0; otherwise all answers to a prompt are the same."
        )


def _warn_without_effect(config: GenerationConfig, passed: Mapping[str, Any]) -> None:
    idle: list[
        tuple[str, dict[str, tuple[Any, ...]]]
    ] = []  # what is needed, options with their neutral values
    if not config.do_sample:
        idle.append(
            ("do_sample=True", {"temperature": (0, 1), "top_k": (0, -1), "top_p": (1,), "min_p": (0,)})
        )
    if config.num_beams == 1:
        idle.append(("num_beams above 1", {"length_penalty": (1,), "early_stopping": (False,)}))
    for needed, neutral in idle:
        names = [name for name in neutral if name in passed and passed[name] not in neutral[name]]
        if names:
            listed = ", ".join(f"{name}={passed[name]!r}" for name in names)
            message = f"{listed} has no effect without {needed}."
            warn(message)


def draws(config: GenerationConfig) -> bool:
    """Whether tokens are drawn at random: asked for, at a temperature above 0."""
    return config.do_sample and config.temperature > 0


def eos_ids(config: GenerationConfig) -> tuple[int, ...]:
    """The end-of-sequence ids, in the order given."""
    ids = config.eos_token_id
    if ids is None:
        return ()
    return tuple(int(token_id) for token_id in ids) if isinstance(ids, list | tuple) else (int(ids),)


def pad_id(config: GenerationConfig) -> int | None:
    """The id that fills rows behind their end: `pad_token_id`, else the first end-of-sequence id."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return next(iter(eos_ids(config)), None)


def stop_texts(config: GenerationConfig) -> tuple[str, ...]:
    """The stop strings."""
    texts = config.stop_strings
    return () if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)


def params_of(
    config: GenerationConfig,
    num_columns: int,
    max_new_tokens: int,
    tokenizer: Decodes | None,
    constraint: Mapping[str, Any] | None = None,
    logit_bias: Mapping[int, float] | None = None,
) -> SamplingParams:
    """How the answers to a prompt are chosen and when they end, from options that are all decided.

    Args:
        config: see `resolve_options`.
        num_columns: the length of the prompt that `min_length` counts.
        max_new_tokens: longest answer.
        tokenizer: for stop strings and the constraint.
        constraint: what answers must be, see `compile_constraint`.
        logit_bias: what is added to the logits of tokens.

    Raises:
        ArgumentError: stop strings without a tokenizer, or a constraint that cannot be met.
    """
    eos, texts, is_drawn = eos_ids(config), stop_texts(config), draws(config)
    if texts and not hasattr(tokenizer, "decode"):
        raise ArgumentError(f"stop_strings need tokenizer=, an object with decode(ids), got {tokenizer!r}.")
    has_beams = config.num_beams > 1
    num_kept = 1 + len(eos)
    rules = LogitsRules(
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        min_new_tokens=config.min_new_tokens or max(0, config.min_length - num_columns),
        eos_token_ids=eos,
        do_sample=is_drawn,
        temperature=config.temperature,
        top_k=max(0, config.top_k or 0),
        top_p=config.top_p,
        min_p=config.min_p,
        min_tokens_to_keep=max(2, num_kept) if has_beams else 1,
        frequency_penalty=config.frequency_penalty,
        presence_penalty=config.presence_penalty,
        logit_bias=tuple(sorted((logit_bias or {}).items())),
    )
    beams = BeamOptions(
        num_beams=config.num_beams,
        num_return_sequences=config.num_return_sequences,
        length_penalty=config.length_penalty,
        early_stopping=cast("bool | Literal['never']", config.early_stopping),
        do_sample=is_drawn,
        num_candidates=max(2, num_kept) * config.num_beams,
    )
    return SamplingParams(
        rules=rules,
        stop=StopRules(frozenset(eos), texts, tokenizer),
        max_new_tokens=max_new_tokens,
        num_answers=config.num_return_sequences,
        beams=beams if has_beams else None,
        grammar=None if constraint is None else compile_constraint(constraint, tokenizer, eos),
    )
