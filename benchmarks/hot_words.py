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
    rows = []
    for row in lines(options.data):
        answer = row["messages"][-1]["content"][0]["text"]
        said = answer[answer.index('"') + 1 : answer.rindex('"')]
        rows.append({"audio": str(options.data.parent / row["audio"][0]), "said": said})
        rows[-1]["named"] = named_words(said, counts)
    rows = [row for row in rows if row["named"]][options.skip :][: options.rows]
    phrases = list(dict.fromkeys(word for row in rows for word in row["named"]))
    once = collections.Counter(
        word for row in lines(options.others) for word in re.findall(r"[A-Za-z]{5,}", row["original"])
    )
    rest = sorted(word for word, count in once.items() if count == 1 and word not in phrases)
    phrases += random.Random(0).sample(rest, min(len(rest), len(phrases)))
    model = AutoModelForConditionalGeneration.from_pretrained(options.model, dtype="float32")
    processor = AutoProcessor.from_pretrained(options.model)
    result: dict[str, Any] = {"sentences": len(rows), "phrases": len(phrases)}
    for name, hot_words in (("without", ()), ("with", tuple(phrases))):
        chosen = TranscriptionOptions(hot_words=hot_words)
        start = time.process_time()
        answers = [
            " ".join(
                segment.text
                for segment in transcribe(
                    model, processor, row["audio"], use_vad=False, num_beams=1, options=chosen
                )
            )
            for row in rows
        ]
        result[name] = errors(rows, answers) | {"processor_s": round(time.process_time() - start, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
