"""Answers that must have a form: JSON, JSON of a schema, one of some texts, or what a regular expression matches.

A `Grammar` says which tokens may come next. The grammars themselves are llguidance's, an optional package (extra
`structured`); what is left to it, and to the Rust dialect of regular expressions, is what they can say.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from audioflamingo.errors import ArgumentError, require
from audioflamingo.processor.tokenizer import Tokenizer

KINDS = ("json_object", "json_schema", "choices", "regex")
# JSON is written as Python's `json.dumps` writes it: a model that may add white space anywhere may never end.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """Where an answer stands in its grammar.

    Args:
        matcher: llguidance's, which this one owns.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fork(self) -> Grammar:
        """Another answer that has got as far."""
        return Grammar(self._matcher.deep_copy())

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool `(n,)` with n the vocabulary of the tokenizer.

        None may where an answer has left the grammar, or has become too complex for it.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little").view(bool)
        return np.zeros_like(mask) if self._matcher.is_error() else mask

    def accept(self, token: int) -> None:
        """Takes the next token of the answer."""
        self._matcher.try_consume_tokens([token])


def compile_constraint(
    constraint: Mapping[str, Any], tokenizer: object, eos_token_ids: tuple[int, ...]
) -> Grammar:
    """The grammar of a constraint, at its beginning.

    Args:
        constraint: one of `{"json_object": True}`, `{"json_schema": dict or pydantic model}`, `{"choices": [texts]}`
            and `{"regex": text}`.
        tokenizer: the checkpoint's.
        eos_token_ids: tokens that end an answer.

    Raises:
        ArgumentError: it is none of these, is not understood, or no answer can meet it.
        MissingDependencyError: llguidance is not installed.
    """
    if not isinstance(constraint, Mapping) or len(constraint) != 1 or next(iter(constraint)) not in KINDS:
        raise ArgumentError(
            f"constraint must be a dict with one of the keys {', '.join(KINDS)}, got {constraint!r:.200}."
        )
    if not isinstance(tokenizer, Tokenizer):
        raise ArgumentError(f"constraint needs tokenizer=processor.tokenizer, got {tokenizer!r:.80}.")
    if not eos_token_ids:
        raise ArgumentError("constraint needs eos_token_id: nothing else could end the answer.")
    ((kind, value),) = constraint.items()
    llguidance = require("llguidance", "structured")
    source = _source(llguidance.LLMatcher, kind, value)
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(_tokens(tokenizer, eos_token_ids), source, log_level=0, limits=limits)
    grammar = Grammar(matcher)
    allowed = grammar.allowed()
    if matcher.is_error():
        raise ArgumentError(f"constraint {kind!r}: {_reason(matcher.get_error())}.")
    allowed[list(eos_token_ids)] = False
    if not allowed.any():
        raise ArgumentError(f"constraint {kind!r} allows nothing but an empty answer.")
    return grammar


@functools.lru_cache(maxsize=2)
def _tokens(tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> Any:
    """The vocabulary as llguidance takes it; about a second for the 151,000 tokens of a published checkpoint."""
    return require("llguidance", "structured").LLTokenizer(
        tokenizer.to_json(), n_vocab=max(len(tokenizer), *eos_token_ids) + 1, eos_token=list(eos_token_ids)
    )


def _source(matcher: Any, kind: str, value: Any) -> str:
    """The grammar in llguidance's own language."""

    def check(is_right: bool, wanted: str) -> None:
        if not is_right:
            raise ArgumentError(f"constraint {kind!r} must be {wanted}, got {value!r:.200}.")

    if kind == "regex":
        check(isinstance(value, str) and value != "", "a regular expression")
        return matcher.grammar_from_regex(value)
    if kind == "choices":
        are_texts = isinstance(value, list | tuple) and all(isinstance(text, str) and text for text in value)
        check(are_texts and len(value) > 0, "a list of texts, none of them empty")
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in value))
    if kind == "json_object":
        check(value is True, "True")
        return matcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_FORM)
    schema = value.model_json_schema() if hasattr(value, "model_json_schema") else value
    check(isinstance(schema, Mapping), "a JSON schema (a dict) or a pydantic model")
    if not _ends(dict(schema), schema, frozenset()):
        raise ArgumentError(f"constraint {kind!r}: the schema requires itself, so that no answer could end.")
    try:
        return matcher.grammar_from_json_schema(dict(schema), overrides=JSON_FORM)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"constraint {kind!r}: {_reason(str(error))}.") from error


def _reason(error: str) -> str:
    """What llguidance says is wrong, without its picture of the place."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    marked = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (marked or lines or ["it is too complex"])[0].rstrip(".")


def _ends(schema: Any, root: Mapping[str, Any], inside: frozenset[str]) -> bool:
    """Whether an answer to a schema can be finite: references that require themselves cannot.

    Args:
        schema: a part of `root`.
        root: the whole, in which references are looked up.
        inside: references that lead here.
    """
    if not isinstance(schema, Mapping):
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in inside:
            return False
        if not _ends(_look_up(reference, root), root, inside | {reference}):
            return False
    for name in ("anyOf", "oneOf"):
        branches = schema.get(name)
        if isinstance(branches, list) and branches and not any(_ends(b, root, inside) for b in branches):
            return False
    needed = list(schema["allOf"]) if isinstance(schema.get("allOf"), list) else []
    properties, names = schema.get("properties"), schema.get("required")
    if isinstance(properties, Mapping) and isinstance(names, list):
        needed += [properties.get(name) for name in names if isinstance(name, str)]
    least = schema.get("minItems")
    if isinstance(least, int) and least > 0:
        first = schema.get("prefixItems")
        needed += first[:least] if isinstance(first, list) else [schema.get("items")]
    return all(_ends(part, root, inside) for part in needed)


def _look_up(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference such as `#/$defs/Name` stands for; None where it leads nowhere, which llguidance reports."""
    found: Any = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        if name:
            found = (
                found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
            )
    return found if reference.startswith("#") else None
