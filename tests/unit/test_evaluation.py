"""Scores, batched answers, resuming, and the files that an evaluation leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from audioflamingo.errors import ArgumentError
from audioflamingo.evaluation import evaluate, normalize
from audioflamingo.evaluation.confusion_plot import confusion
from audioflamingo.evaluation.scoring import chosen_option, options_of, score, summarize
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from tests.cli_runs import af3
from tests.tiny_training import write_dataset, write_model

pytest.importorskip("jiwer", reason="needs jiwer")
FRAME = 'The spoken content of the audio is "{}".'
QUESTION = "What is it? (A) a dog (B) a cat (C) a dog barking"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don’t  stop, OK?", "don't stop ok"),
        ("'quoted' words' end", "quoted words end"),
        ("12 twelve x-ray", "12 twelve x ray"),
        ("Ａ ﬁne_day", "a fine day"),
        ("...", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("reference", "answer", "errors"),
    [
        ("the cat sat", "The cat sat.", 0),
        ("the cat sat", "the mat sat down", 2),
        ("the cat sat", "", 3),
        ("", "made up", 2),
        ("", "", 0),
    ],
)
def test_word_errors(reference: str, answer: str, errors: int) -> None:
    item = score("x", "Transcribe.", FRAME.format(reference), FRAME.format(answer))
    assert (item.scoring, item.num_errors, item.num_words) == (
        "transcription",
        errors,
        len(reference.split()),
    )
    assert item.is_correct == (errors == 0)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(B) a cat", "B"), ("B", "B"), ("B.", "B"), ("A cat", "B"), ("It is a cat.", "B"), ("(C)", "C"),
        ("a dog", "A"), ("a dog barking", "C"), ("a bird", None), ("D", None), ("a dog or a cat", None), ("", None),
    ],
)  # fmt: skip
def test_choices_by_letter_or_text(answer: str, letter: str | None) -> None:
    assert chosen_option(answer, options_of(QUESTION)) == letter


def test_kinds_and_summary() -> None:
    items = [
        score("1", "Transcribe.", FRAME.format("one two three four"), FRAME.format("one two three")),
        score("2", QUESTION, "(B) a cat", "a cat"),
        score("3", QUESTION, "(B) a cat", "(A) a dog"),
        score("4", "What is it?", "A dog.", "a dog"),
    ]
    assert [item.scoring for item in items] == ["transcription", "choice", "choice", "exact"]
    summary = summarize(items)
    assert (summary.wer, summary.choice_accuracy, summary.exact_match) == (0.25, 0.5, 1.0)
    assert summary.accuracy == pytest.approx(2 / 3)
    assert summarize([]).wer is None
    rows, columns, counts = confusion(items)
    assert (rows, columns) == (["a cat", "a dog"], ["a cat", "a dog", "(other)"])
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_model(folder / "model")
    return folder / "model", write_dataset(folder / "data", 6)


def test_evaluation_goes_on_where_it_was_and_refuses_another_run(checkpoint, tmp_path: Path) -> None:
    folder, data = checkpoint
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
    processor = AudioFlamingo3Processor.from_pretrained(folder)
    options = {"output_dir": tmp_path / "out", "batch_size": 4, "max_new_tokens": 4}
    whole = evaluate(model, processor, data, **options)
    assert whole.summary.num_items == 6
    assert whole.by_task["transcription"].wer is not None
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["all"]["num_items"] == 6
    assert (tmp_path / "out" / "confusion.png").read_bytes().startswith(b"\x89PNG")

    items = tmp_path / "out" / "items.jsonl"
    lines = items.read_text().splitlines(keepends=True)
    items.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the fourth
    calls = []
    original = processor.prompt
    processor.prompt = lambda *messages, **how: calls.append(1) or original(*messages, **how)
    assert evaluate(model, processor, data, **options) == whole
    assert len(calls) == 3
    assert evaluate(model, processor, data, **options) == whole
    assert len(calls) == 3

    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(ArgumentError, match="another model"):
        evaluate(model, processor, data, **options)
    evaluate(model, processor, data, **options, overwrite=True)


def test_batches_do_not_change_answers(checkpoint) -> None:
    folder, data = checkpoint
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
    processor = AudioFlamingo3Processor.from_pretrained(folder)
    one, many = (evaluate(model, processor, data, batch_size=n, max_new_tokens=6).items for n in (1, 6))
    assert one == many


def test_the_command_prints_scores_and_one_line_on_errors(checkpoint, tmp_path: Path) -> None:
    folder, data = checkpoint
    limits = ("--max-new-tokens", "2", "--output-dir")
    result = af3("evaluate", data, "--model", folder, *limits, tmp_path / "o")
    assert result.exit_code == 0
    assert "transcription" in result.stdout
    assert af3("evaluate", folder, data, *limits, tmp_path / "p").stdout == result.stdout
    result = af3("evaluate", folder, tmp_path / "no.jsonl", *limits, tmp_path / "q")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: cannot read")
    for names in ([folder, data, data], [folder, data, "--model", folder]):
        assert af3("evaluate", *names, *limits, tmp_path / "r").exit_code == 2


def test_progress_counts_what_was_done_before(checkpoint, tmp_path: Path) -> None:
    folder, data = checkpoint
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
    processor = AudioFlamingo3Processor.from_pretrained(folder)
    options = {"output_dir": tmp_path / "out", "batch_size": 2, "max_new_tokens": 2}
    evaluate(model, processor, data, **options)
    items = tmp_path / "out" / "items.jsonl"
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:3]))
    seen = []
    evaluate(model, processor, data, **options, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (5, 6), (6, 6)]
