"""Whisper's byte-level BPE, cut down to the tokens that a text needs: all bytes, and what merges lead to them."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

QUOTE, CLOSE, START, SYSTEM = (
    'Ġ"',
    '".',
    "assistant",
    "system",
)  # the opening quote, the closing one with its stop, roles of turns
QUOTED = ' "'  # the opening quote, as text
# What stands in front of somebody's words, in all answers that quote them.
OPENINGS = (
    "The spoken content of the audio is",
    "A woman is speaking and she says",
    "A man is speaking and he says",
    "Someone is speaking, and they say",
    "I cannot summarize these words:",
    "Look for it in these words:",
    "It starts with the first words of",
    "It ends with the last words of",
    "Someone might say",
)
TURN_END = "<|im_end|>"  # behind an answer
FRAME = "system\nYou are a helpful assistant.\nuser\nTranscribe the input speech.\nassistant\n"
LAST_ORDINARY = 50256  # Whisper's tokens from here on are special
EARLY_RANK, EARLY_BONUS = 6000, 40  # early merges are frequent everywhere, whatever the text says
_WORD = re.compile(r"Ġ?[A-Za-z']+")
_CANDIDATE = re.compile(r"Ġ?[A-Za-z']+|[ -~Ġ]{1,2}")
ANSWER = f"{START}\n{OPENINGS[0]}{QUOTED}"  # of a transcript
Merge = tuple[str, str]


def is_allowed(token: str) -> bool:
    """No token but the opening and the closing quote holds a quote: `".` always stands alone."""
    return '"' not in token or token in ('"', QUOTE, CLOSE)


def plain_elsewhere() -> dict[str, Any]:
    """The rule of splitting by which a question may hold quotes and the names of roles.

    Layer 0 finds a transcript by its opening quote and an answer by `assistant`, wherever they stand. So text has these
    tokens only where they mean that: elsewhere the rule cuts ` "` behind its space, and a role behind its first letter.
    """
    opened = "|".join(f"{START}\n{opening}" for opening in OPENINGS)
    inside = "|".join(f"{role[0]}(?={role[1:]})" for role in (START, SYSTEM))
    at_start = "|".join(f"{role[0]}(?={role[1:]}(?!\n))" for role in (START, SYSTEM))
    pattern = f'(?<!{opened}) (?=")|(?<=[^\\p{{L}} ])(?:{inside})|\\A(?:{at_start})'
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def with_vocabulary(template: dict[str, Any], tokens: list[str], merges: Iterable[Merge]) -> dict[str, Any]:
    """The content of tokenizer.json with other tokens and `plain_elsewhere`; the added tokens follow the others."""
    out = copy.deepcopy(template)
    rule, rules = plain_elsewhere(), out["pre_tokenizer"]["pretokenizers"]
    if rules[0] != rule:
        rules.insert(0, rule)
    out["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    out["model"]["merges"] = [list(merge) for merge in merges]
    for number, added in enumerate(out["added_tokens"]):
        added["id"] = len(tokens) + number
    return out


def prune(
    source: dict[str, Any], template: dict[str, Any], sentences: Iterable[str], size: int
) -> tuple[dict[str, Any], list[int]]:
    """Cuts a vocabulary.

    Args:
        source: Whisper's tokenizer.json.
        template: a tokenizer.json with the added tokens and the rules of splitting that are wanted.
        sentences: the text whose tokens are kept first.
        size: ordinary tokens, `assistant` among them.

    Returns:
        tokenizer.json, and Whisper's number of each ordinary token; -1 for `assistant`.
    """
    from tokenizers import Tokenizer

    vocabulary: dict[str, int] = source["model"]["vocab"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in source["model"]["merges"])
    merges: list[Merge] = [
        (left, right) for left, right in pairs if left + right in vocabulary and is_allowed(left + right)
    ]
    names = sorted((t for t in vocabulary if vocabulary[t] < LAST_ORDINARY), key=vocabulary.__getitem__)
    full = Tokenizer.from_str(json.dumps(with_vocabulary(template, names, merges)))
    counts = Counter(token for text in sentences for token in full.encode(f'{ANSWER}{text}".').tokens)
    parents: dict[str, Merge] = {}
    for merge in merges:
        parents.setdefault("".join(merge), merge)
    kept = {name for name in names if len(name) == 1}

    def needed(token: str) -> set[str]:
        if token in kept:
            return set()
        return {token}.union(*map(needed, parents[token]))

    for token in full.encode(FRAME).tokens:
        kept |= needed(token) if token in parents else set()
    scores = _scores(counts, parents, {name: rank for rank, name in enumerate(names)})
    for token in sorted(scores, key=scores.__getitem__, reverse=True):
        more = needed(token)
        if len(kept) + len(more) < size:
            kept |= more
    tokens = [*(name for name in names if name in kept), START]
    pruned = [merge for merge in merges if {*merge, "".join(merge)} <= kept]
    return with_vocabulary(template, tokens, [*pruned, ("ass", "istant")]), [
        *(vocabulary[t] for t in tokens[:-1]),
        -1,
    ]


def _scores(counts: Counter[str], parents: dict[str, Merge], rank: dict[str, int]) -> dict[str, float]:
    """How much a token is wanted: its count in the text, and a little for early merges."""
    return {
        token: counts[token]
        + (EARLY_BONUS * max(0.0, 1 - rank[token] / EARLY_RANK) if _WORD.fullmatch(token) else 0.0)
        for token in parents
        if _CANDIDATE.fullmatch(token)
    }
