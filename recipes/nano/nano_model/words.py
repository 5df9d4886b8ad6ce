"""Whole words added to a cut vocabulary, where they save most: a word in one token is heard, one in pieces spelled.

Whisper knows how most words sound as one token. Cut to fewer tokens it has to spell the others, which nothing taught
it, so the built-in model gets the words that are frequent in its text, or in English at large, back.
"""

from __future__ import annotations

import copy
import heapq
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from .vocabulary import Merge

TEXT_SHARE = 0.6  # of a word's score: how often it stands in the text; the rest: Whisper's rank of its token
LAST_RANK = 25_000  # tokens behind are rare everywhere
RANK_WEIGHT = {False: 0.028, True: 0.0096}  # of a frequent word by rank, lower-case and capitalised
RANK_OFFSET = 100
MOST_PIECES = 4
OPENING_SHARE = 0.6  # of sentences that open a transcript; the others follow one
_WORD = re.compile(r"[A-Za-z']+")
_FREQUENT = re.compile(r"Ġ([a-z]{3,}|[A-Z][a-z]{2,})")


def add_words(
    content: dict[str, Any], source: dict[str, Any], sentences: Iterable[str], count: int
) -> tuple[dict[str, Any], list[int]]:
    """Adds words to a vocabulary, by merges behind all others, so that text without a new token stays as it was.

    Args:
        content: tokenizer.json of the cut vocabulary.
        source: Whisper's tokenizer.json; only its tokens are added.
        sentences: text whose words count.
        count: tokens to add, steps on the way to a word among them.

    Returns:
        tokenizer.json with the added tokens at its end as before, and Whisper's number of each new token.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(content))
    old: dict[str, int] = content["model"]["vocab"]
    ranks: dict[str, int] = source["model"]["vocab"]
    chains = {}
    for word, score in _scores(sentences, ranks).items():
        pieces = tokenizer.encode(word.replace("Ġ", " "), add_special_tokens=False).tokens
        if word not in old and 1 < len(pieces) <= MOST_PIECES:
            chains[word] = (score * len(pieces), pieces)
    new: set[str] = set()
    merges: list[Merge] = []
    queue = [(-gain, word) for word, (gain, _) in chains.items()]
    heapq.heapify(queue)
    while queue and len(new) < count:
        value, word = heapq.heappop(queue)
        gain, pieces = chains[word]
        steps = _cheapest(pieces, old.keys() | new, ranks)
        added = [step for step in map("".join, steps) if step not in old and step not in new]
        if any(token not in ranks for token in added) or len(new) + len(added) > count:
            continue
        if added and -gain / len(added) > value:  # dearer than thought: its turn comes later
            heapq.heappush(queue, (-gain / len(added), word))
            continue
        new.update(added)
        merges += [step for step in steps if step not in merges]
    names = sorted(new, key=ranks.__getitem__)
    return _reaching(content, names, merges), [ranks[name] for name in names]


def _reaching(content: dict[str, Any], names: list[str], merges: list[Merge]) -> dict[str, Any]:
    """A tokenizer with more tokens, and merges until each is reached: those of one word cross another's way."""
    from tokenizers import Tokenizer

    while True:
        out = _with_tokens(content, names, merges)
        known, tokenizer = out["model"]["vocab"], Tokenizer.from_str(json.dumps(out))
        missing: list[Merge] = []
        for name in names:
            pieces = tokenizer.encode(name.replace("Ġ", " "), add_special_tokens=False).tokens
            steps = [step for step in pairwise(pieces) if "".join(step) in known and step not in merges]
            missing += steps[:1]
        if not missing:
            return out
        merges = list(dict.fromkeys([*merges, *missing]))


def _with_tokens(content: dict[str, Any], names: list[str], merges: list[Merge]) -> dict[str, Any]:
    out = copy.deepcopy(content)
    number = len(out["model"]["vocab"])
    out["model"]["vocab"] |= {name: number + place for place, name in enumerate(names)}
    out["model"]["merges"] += [list(step) for step in sorted(merges, key=lambda step: len("".join(step)))]
    for added_token in out["added_tokens"]:
        added_token["id"] += len(names)
    return out


def _scores(sentences: Iterable[str], ranks: dict[str, int]) -> dict[str, float]:
    """How often a word of Whisper's vocabulary is expected, as a share of all words."""
    counts: defaultdict[str, float] = defaultdict(float)
    for text in sentences:
        words = _WORD.findall(text)
        for word in words[1:]:
            counts[f"Ġ{word}"] += 1
        for opening in words[:1]:  # without a space where it opens a transcript
            counts[opening] += OPENING_SHARE
            counts[f"Ġ{opening}"] += 1 - OPENING_SHARE
    total = sum(counts.values())
    scores = {word: TEXT_SHARE * number / total for word, number in counts.items() if word in ranks}
    for word, rank in ranks.items():
        if rank < LAST_RANK and _FREQUENT.fullmatch(word):
            weight = (1 - TEXT_SHARE) * RANK_WEIGHT[word[1].isupper()]
            scores[word] = scores.get(word, 0.0) + weight / (rank + RANK_OFFSET)
    return scores


def _cheapest(pieces: list[str], known: Any, ranks: dict[str, int]) -> list[Merge]:
    """The merges that make a word of its pieces with the fewest new tokens, Whisper's before others."""

    def ways(parts: list[str]) -> Iterable[list[Merge]]:
        if len(parts) == 1:
            yield []
        for place, step in enumerate(pairwise(parts)):
            for rest in ways([*parts[:place], "".join(step), *parts[place + 2 :]]):
                yield [step, *rest]

    def cost(steps: list[Merge]) -> float:
        made = [token for token in map("".join, steps) if token not in known]
        return len(made) + 0.5 * sum(token not in ranks for token in made)

    return min(ways(pieces), key=cost)
