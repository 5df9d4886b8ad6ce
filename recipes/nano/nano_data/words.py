"""Single words and scraps of two or three: a word alone sounds unlike the same word in a sentence."""

from __future__ import annotations

import random
import string
from collections import Counter
from typing import Any

from .normalise import normalise, number_words, ordinal_words
from .splits import seed_for
from .templates import read_lists

TIMES = (
    "today tomorrow yesterday morning noon afternoon evening night midnight second minute hour day week month year "
    "seconds minutes hours days weeks months years"
)
SIGNS = "plus minus equals dot dash comma colon slash star pound hash point dollar dollars cent cents percent"
FREQUENT = 2500  # words of the sentences
SOURCE_WEIGHTS = {"spoken": 0.4, "frequent": 0.3, "scrap": 0.3}


def spoken_words() -> list[str]:
    """Words that people say alone: numbers, letters, names of days and months, the spelling alphabet."""
    numbers = [number_words(n) for n in (*range(1, 101), *range(200, 1000, 100), 1000, 1000000)]
    ordinals = [ordinal_words(n) for n in range(1, 101)]
    lists = read_lists()
    named = [*lists["nato"], *lists["weekday"], *lists["month"]]
    alone = [*string.ascii_lowercase, "zero", "oh", *named, *TIMES.split(), *SIGNS.split()]
    return [*numbers[:31], *ordinals[:31], *alone * 2, *numbers, *ordinals]


def word_rows(sentences: list[dict[str, str]], count: int) -> list[dict[str, Any]]:
    """Rows as those of the text files, one word or scrap each.

    Args:
        sentences: rows of the training text.
        count: rows wanted; the same word may come many times, in other voices.
    """
    rng = random.Random(seed_for("words"))
    texts = [row["text"] for row in sentences if row["source"] != "wordnet-definition"]
    counts = Counter(word for text in texts for word in text.split() if word.isalpha() and len(word) > 1)
    frequent = [word for word, _ in counts.most_common(FREQUENT)]
    spoken = spoken_words()
    rows = []
    for number in range(count):
        source = rng.choices(list(SOURCE_WEIGHTS), list(SOURCE_WEIGHTS.values()))[0]
        text = rng.choice(spoken if source == "spoken" else frequent)
        if source == "scrap":
            words = rng.choice(texts).split()
            start = rng.randrange(max(1, len(words) - 1))
            text = " ".join(words[start : start + rng.choice((2, 2, 3))])
        row = {"split": "train", "source": "word", "original": text, "text": normalise(text)}
        rows.append({"id": f"word-{number:06d}", **row})
    return rows
