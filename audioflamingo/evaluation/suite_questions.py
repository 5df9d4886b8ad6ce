"""From a benchmark's files to its questions, with everything checked before the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from audioflamingo.audio.stored import StoredAudio
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.datasets.row_files import AUDIO_SUFFIXES
from audioflamingo.errors import ArgumentError, DataError, warn
from audioflamingo.evaluation.columns import LETTERS, Fields, merge_votes
from audioflamingo.evaluation.published import Record, read_records
from audioflamingo.evaluation.questions import Question
from audioflamingo.evaluation.scoring import ItemResult, choose, normalize, word_errors
from audioflamingo.evaluation.speech import normalize_english
from audioflamingo.evaluation.suites import (
    SUITES,
    Suite,
    missing_columns,
    nvidia_choice_prompt,
    suites_with,
)
from audioflamingo.processor.conversation import strip_framing
from audioflamingo.processor.thoughts import split_thoughts
from audioflamingo.tasks import TASKS


def read_suite(name: str, data: DatasetConfig, prompts: str = "nvidia", seed: int = 0) -> list[Question]:
    """Reads a benchmark.

    Args:
        name: of the benchmark.
        data: its file, folder or hub id; `audio_dir` and `max_rows` apply.
        prompts: `"nvidia"` or `"official"`.
        seed: draws the rows where `max_rows` takes only some.

    Raises:
        DataError: these are the files of something else, audio is missing, an id occurs twice, some rows have no key.
        ArgumentError: the benchmark publishes no prompt.
    """
    suite = SUITES[name]
    if prompts == "official" and suite.official_prompt is None:
        raise ArgumentError(f"prompts='official': {name} publishes no prompt; use prompts='nvidia'.")
    rows = list(_rows(name, suite, data.path))
    if suite.kind == "word":
        rows = _merge(rows)
    if not rows:
        raise DataError(f"{data.path} has no rows to ask about.")
    _check_rows(rows)
    if data.max_rows is not None and data.max_rows < len(rows):
        chosen = np.random.default_rng([seed, 7]).permutation(len(rows))[: data.max_rows]
        rows = [rows[i] for i in sorted(chosen.tolist())]
    rows = _find_audio(rows, data.audio_dir)
    return [_question(suite, record, fields, prompts) for record, fields in rows]


Row = tuple[Record, Fields]


def _rows(name: str, suite: Suite, path: str) -> Iterator[Row]:
    num_left_out = 0
    for record in read_records(path, suite.prefers):
        if wrong := missing_columns(suite, record.values):
            fitting = suites_with(record.values)
            hint = f" It looks like {' or '.join(fitting)}." if fitting else ""
            raise DataError(f"{record.place} is not a row of {name}: {', '.join(wrong)}.{hint}")
        try:
            fields = suite.read(record)
        except (DataError, KeyError, ValueError, IndexError, TypeError) as error:
            reason = f"the column {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{record.place}: {reason.rstrip('.')}.") from error
        if fields is None:
            num_left_out += 1
        else:
            yield record, fields
    if num_left_out:
        warn(f"{num_left_out} rows of {path} are left out, as {name} does: nothing in them is to be scored.")


def _merge(rows: Sequence[Row]) -> list[Row]:
    """One row for the answers of several people to the same question."""
    groups: dict[str, list[Row]] = {}
    for record, fields in rows:
        groups.setdefault(fields.id, []).append((record, fields))
    return [(group[0][0], merge_votes([fields for _, fields in group])) for group in groups.values()]


def _check_rows(rows: Sequence[Row]) -> None:
    """Ids occur once; keys are there for all questions that can be scored, or for none."""
    seen: dict[str, str] = {}
    for record, fields in rows:
        if fields.id in seen:
            raise DataError(f"{record.place}: the id {fields.id!r} is that of {seen[fields.id]} too.")
        seen[fields.id] = record.place
    scored = [row for row in rows if row[1].is_scored]
    without = [record.place for record, fields in scored if not fields.answer]
    if without and len(without) < len(scored):
        raise DataError(f"{without[0]}: no answer to score by; so have {len(without)} of {len(scored)} rows.")


def _find_audio(rows: Sequence[Row], audio_dir: str | None) -> list[Row]:
    """The rows with absolute paths of their audio.

    Raises:
        DataError: some are not there; the message counts them.
    """
    missing: list[str] = []
    found: list[Row] = []
    for record, fields in rows:
        folder = Path(audio_dir).expanduser() if audio_dir else record.folder
        clips: list[str | StoredAudio] = []
        for clip in fields.audio:
            path = clip if isinstance(clip, StoredAudio) else _locate(folder, clip)
            if path is None:
                missing.append(f"{record.place}: {clip!r}")
            else:
                clips.append(path)
        if not fields.audio:
            missing.append(f"{record.place}: no audio named")
        found.append((record, replace(fields, audio=clips)))
    if missing:
        raise DataError(
            f"{len(missing)} audio files are missing, the first of {missing[0]} (looked in {folder}). Put them there, "
            "or name their folder with --audio-dir."
        )
    return found


def _locate(folder: Path, name: str) -> str | None:
    """An audio file by its path in the folder, or anywhere below by its name or by what its name begins with."""
    if (folder / name).is_file():
        return str((folder / name).resolve())
    index = _audio_below(folder)
    base = Path(name).name
    return index.get(base) or index.get(Path(base).stem) or index.get(base.split(".")[0])


@lru_cache(maxsize=8)
def _audio_below(folder: Path) -> dict[str, str]:
    """Audio files below a folder: by name, by name without suffix, by the id in MusicCaps' `[id]-[0-10].wav`."""
    index: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in AUDIO_SUFFIXES:
            stem = path.stem
            for key in (path.name, stem, stem.split(".")[0], stem.partition("]-[")[0].removeprefix("[")):
                index.setdefault(key, str(path.resolve()))
    return index


def _question(suite: Suite, record: Record, fields: Fields, prompts: str) -> Question:
    options = dict(zip(LETTERS, fields.options, strict=False))
    if prompts == "official":
        assert suite.official_prompt is not None
        text = suite.official_prompt(fields.question, options)
    elif suite.kind == "speech":
        text = TASKS["transcribe"].prompt
    else:
        text = nvidia_choice_prompt(fields.question, options) if options else fields.question
    parts: list[dict[str, Any]] = [{"type": "audio", "path": clip} for clip in fields.audio]
    content = [*parts, {"type": "text", "text": text}]
    return Question(
        fields.id,
        text,
        [{"role": "user", "content": content}],
        fields.answer,
        partial(score_answer, suite, fields.is_scored and bool(fields.answer)),
        options,
        fields.groups,
        record.place,
        record={k: v for k, v in record.values.items() if not isinstance(v, StoredAudio)},
    )


def score_answer(suite: Suite, has_key: bool, question: Question, answer: str) -> ItemResult:
    """Scores an answer by our rule and by the benchmark's; thoughts in `<think>` are left out."""
    _, said = split_thoughts(answer)
    item = partial(
        ItemResult, question.id, reference=question.reference, answer=answer, prompt=question.text,
        groups=question.groups,
    )  # fmt: skip
    if suite.kind == "speech":
        expected, found = normalize_english(question.reference), normalize_english(strip_framing(said))
        num_errors, num_words = word_errors(expected, found)
        return item(
            scoring="transcription",
            expected=expected,
            found=found,
            is_correct=expected == found,
            num_words=num_words,
            num_errors=num_errors,
        )
    letter, parsed_by = choose(answer, question.options) if question.options else (None, None)
    found = question.options[letter] if letter is not None else ("" if question.options else said)
    if not has_key:
        return item(scoring="unscored", expected="", found=found, is_correct=False, parsed_by=parsed_by)
    official = suite.rule(said, question.reference, question.options) if suite.rule is not None else None
    if suite.kind == "word":
        accepted = {normalize(text) for text in question.reference.split(" | ")}
        found = normalize(said)
        if accepted & {"yes", "no"} and found.split()[:1] in (["yes"], ["no"]):
            found = found.split()[0]
        is_right = found in accepted
    else:
        is_right = letter is not None and normalize(found) == normalize(question.reference)
    return item(
        scoring="exact" if suite.kind == "word" else "choice",
        expected=question.reference,
        found=found,
        is_correct=is_right,
        official=official,
        parsed_by=parsed_by,
    )
