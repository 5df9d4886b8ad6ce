"""The scoring rules of the benchmarks, to the letter, each from the description or script that it names.

`scoring.choose` is our own rule, the same for all; these are beside it, so that a score can be held against the
published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from audioflamingo.evaluation.scoring import normalize

_WORD = re.compile(r"\b\w+\b")


def matches_tokens(answer: str, reference: str, options: Mapping[str, str]) -> bool:
    """MMAU's and MMAR's rule: the answer has all words of the right option, and none that only wrong ones have.

    Source: `evaluation.py` of Sakshi113/MMAU and `code/evaluation.py` of ddlBoJack/MMAR. Words are runs of letters,
    digits and underscores in lower case; their number and order do not matter. An option with the same words as the
    right one is not wrong.
    """
    said, right = _words(answer), _words(reference)
    wrong = [_words(text) for text in options.values()]
    forbidden = {word for words in wrong if words != right for word in words - right}
    return bool(said) and right <= said and not said & forbidden


def chosen_letter(answer: str) -> str | None:
    """MMSU's rule: the answer's first character if it is A to D, else its last but one.

    Source: `mmsu_evaluation.py` of dingdongwang/MMSU_Bench ("The answer is A." has its letter there). That script
    leaves answers without a letter out of the total; here they are wrong.
    """
    answer = answer.strip().replace("\n", "")
    for letter in (answer[:1], answer[-2:-1]):
        if letter and letter in "ABCD":
            return letter
    return None


def contained_option(answer: str, options: Mapping[str, str]) -> str | None:
    """MuChoMusic's rule: the one capital letter A to D that occurs, else the first option whose text does.

    Source: `muchomusic_eval/scoring.py` of mulab-mir/muchomusic. What precedes "The correct answer is:" is dropped; the
    letter counts wherever it stands, inside words too.
    """
    answer = answer.split("The correct answer is:")[-1].strip()
    letters = set("ABCD") & set(answer)
    if len(letters) == 1:
        return letters.pop()
    return next((letter for letter, text in options.items() if text.lower().strip() in answer.lower()), None)


def same_word(answer: str, accepted: list[str]) -> bool:
    """Clotho-AQA's measure: the answer is one of the accepted ones, case and punctuation aside.

    Source: Lipping et al., "Clotho-AQA: A crowdsourced dataset for audio question answering", 2022 (accuracy of single
    words), with the comparison of lmms-eval's task.
    """
    return normalize(answer) in {normalize(text) for text in accepted}


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
