"""The file that a benchmark's own script or server takes: its rows with the answers in the column that it looks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from audioflamingo.evaluation.questions import Question
from audioflamingo.evaluation.scoring import ItemResult
from audioflamingo.evaluation.suites import Suite
from audioflamingo.files import write_whole
from audioflamingo.processor.thoughts import split_thoughts

JSON_FILE = "submission.json"
JSONL_FILE = "submission.jsonl"
LINE_COLUMNS = ("answer_prediction", "response")  # MMAR's and MMSU's scripts read a row a line


def write_submission(
    folder: Path, suite: Suite, questions: Sequence[Question], items: Sequence[ItemResult]
) -> Path | None:
    """Writes the file, where the benchmark has one.

    The answer is what the model said, without thoughts in `<think>`; where options were compared, the likeliest one.
    MMAR's also takes the thoughts (`thinking_prediction`).

    Returns:
        Its path; None where nobody takes such a file.

    Raises:
        OutputError: it cannot be written.
    """
    if not suite.answer_columns:
        return None
    rows = []
    for question, item in zip(questions, items, strict=True):
        thoughts, answer = split_thoughts(item.answer)
        row = {**question.record, **dict.fromkeys(suite.answer_columns, answer)}
        if "answer_prediction" in row and thoughts is not None:
            row["thinking_prediction"] = thoughts
        rows.append(row)
    if set(suite.answer_columns) & set(LINE_COLUMNS):
        path = folder / JSONL_FILE
        write_whole(path, (f"{json.dumps(row, ensure_ascii=False, default=str)}\n".encode() for row in rows))
    else:
        path = folder / JSON_FILE
        write_whole(path, (json.dumps(rows, indent=1, ensure_ascii=False, default=str) + "\n").encode())
    return path
