"""What hot words do: errors of the named words and of all others, without and with them.

Named are the names and rare words of the sentences, by counts in a training text; the list that the model gets holds
those of all sentences, and as many words of other sentences. Greedy, without voice activity.

    python benchmarks/hot_words.py DATA/test_sentences.jsonl DATA/text/train.jsonl DATA/text/test.jsonl --skip 70
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audioflamingo import AutoModelForConditionalGeneration, AutoProcessor
from audioflamingo.errors import require
from audioflamingo.evaluation import normalize
from audioflamingo.transcription import TranscriptionOptions, transcribe

RARE, NAME_AT_MOST = 12, 400  # times in the training text: of a rare word, and of a name
SHORTEST = 5


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def named_words(said: str, counts: collections.Counter[str]) -> list[str]:
    """Names and rare words of a sentence, as they are written inside one."""
    found = []
    for match in re.finditer(r"[A-Za-z][A-Za-z'-]*", said):
        word, low = match[0], match[0].lower()
        opens = bool(re.search(r"(^|[.?!:] )$", said[: match.start()]))
        is_name = word[0].isupper() and not opens
        if len(word) >= SHORTEST and word.isalpha() and counts[low] <= (NAME_AT_MOST if is_name else RARE):
            found.append(word if is_name else low)
    return list(dict.fromkeys(found))


def errors(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> dict[str, list[int]]:
    """(wrong, all) of the named words and of the others; insertions are the others'."""
    jiwer = require("jiwer", "evaluation")
    counts = {"named": [0, 0], "others": [0, 0]}
    for row, answer in zip(rows, answers, strict=True):
        named = {normalize(word) for word in row["named"]}
        words = normalize(row["said"]).split()
        kinds = ["named" if word in named else "others" for word in words]
        for kind in kinds:
            counts[kind][1] += 1
        aligned = jiwer.process_words(" ".join(words), normalize(answer) or "-")
        for chunk in aligned.alignments[0]:
            if chunk.type == "insert":
                counts["others"][0] += chunk.hyp_end_idx - chunk.hyp_start_idx
            elif chunk.type != "equal":
                for place in range(chunk.ref_start_idx, chunk.ref_end_idx):
                    counts[kinds[place]][0] += 1
    return counts


def sentences(data: Path, counts: collections.Counter[str]) -> list[dict[str, Any]]:
    """Clips with a named word: the file, what is said in it, the named words."""
    rows = []
    for row in lines(data):
        answer = row["messages"][-1]["content"][0]["text"]
        said = answer[answer.index('"') + 1 : answer.rindex('"')]
        rows.append(
            {"audio": str(data.parent / row["audio"][0]), "said": said, "named": named_words(said, counts)}
        )
    return [row for row in rows if row["named"]]


def phrases_of(rows: Sequence[dict[str, Any]], others: Path) -> list[str]:
    """The named words of all sentences, and as many words that other sentences have once."""
    phrases = list(dict.fromkeys(word for row in rows for word in row["named"]))
    seen = collections.Counter(
        word for row in lines(others) for word in re.findall(r"[A-Za-z]{5,}", row["original"])
    )
    rest = sorted(word for word, count in seen.items() if count == 1 and word not in phrases)
    return phrases + random.Random(0).sample(rest, min(len(rest), len(phrases)))


def answer_all(
    model: Any, processor: Any, rows: Sequence[dict[str, Any]], hot_words: Sequence[str]
) -> dict[str, Any]:
    """Errors of the transcripts, and the processor time that they took."""
    options = TranscriptionOptions(hot_words=tuple(hot_words))
    start = time.process_time()
    answers = []
    for row in rows:
        segments = transcribe(model, processor, row["audio"], use_vad=False, num_beams=1, options=options)
        answers.append(" ".join(segment.text for segment in segments))
    return {**errors(rows, answers), "processor_s": round(time.process_time() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="conversations of the recipe, transcripts in quotes")
    parser.add_argument("counted", type=Path, help="JSONL with the text that words are counted in")
    parser.add_argument("others", type=Path, help="JSONL with the text that further words come from")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--skip", type=int, default=0, help="sentences with named words to leave out")
    parser.add_argument("--rows", type=int, default=1000)
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    for row in lines(options.counted):
        counts.update(re.findall(r"[a-z']+", row["text"].lower()))
    rows = sentences(options.data, counts)[options.skip :][: options.rows]
    phrases = phrases_of(rows, options.others)
    model = AutoModelForConditionalGeneration.from_pretrained(options.model, dtype="float32")
    processor = AutoProcessor.from_pretrained(options.model)
    result: dict[str, Any] = {"sentences": len(rows), "phrases": len(phrases)}
    for name, hot_words in (("without", []), ("with", phrases)):
        result[name] = answer_all(model, processor, rows, hot_words)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
