"""Scores, batched answers, resuming, and the files that an evaluation leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from audioflamingo.datasets.conversations import read_dataset
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import ArgumentError, DataError, OutputError
from audioflamingo.evaluation import ItemResult, compare_runs, evaluate, normalize
from audioflamingo.evaluation.compare import mcnemar_p
from audioflamingo.evaluation.confusion_plot import confusion
from audioflamingo.evaluation.run_folder import RunFolder
from audioflamingo.evaluation.scoring import chosen_option, options_of, score, summarize
from audioflamingo.files import FileWatch
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.cli_runs import af3
from tests.support.tiny_training import conversation, write_clip, write_dataset, write_model, write_rows

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
        ("A cat or a dog. It is a cat.", "B"),
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
    assert whole.groups["task"]["transcription"].wer is not None
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
    with pytest.raises(ArgumentError, match="another run: other model_sha256"):
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


class Interrupted(BaseException):
    """What a signal raises."""


def load(folder: Path) -> tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor]:
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
    return model, AudioFlamingo3Processor.from_pretrained(folder)


def test_the_files_of_a_run(checkpoint, tmp_path: Path) -> None:
    folder, data = checkpoint
    result = evaluate(*load(folder), data, output_dir=tmp_path, max_new_tokens=3)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert sorted(item["id"] for item in items) == sorted(item.id for item in result.items)
    assert all({"prompt", "answer", "found", "parsed_by", "is_correct"} <= item.keys() for item in items)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["decoding"] == {"do_sample": False, "max_new_tokens": 3, "num_beams": 1}
    assert (
        manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
        or "+" in manifest["versions"]["torch"]
    )
    assert len(manifest["model_sha256"]) == 64
    assert manifest["num_questions"] == 6
    scores = json.loads((tmp_path / "summary.json").read_text())
    assert scores["unparsed"] == [item.id for item in result.items if item.is_unparsed]
    assert result.summary.rtfx is not None
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2
    assert manifest["model_sha256"] in report
    assert "http" not in report.replace("http-equiv", "")


def test_a_killed_run_loses_and_doubles_nothing(checkpoint, tmp_path: Path) -> None:
    """Killed by the system (no handler runs) once three answers are there."""
    folder, data = checkpoint
    program = (
        "import os, signal, sys; from audioflamingo import AutoModelForConditionalGeneration, AutoProcessor;"
        "from audioflamingo.evaluation import evaluate; model, data, out = sys.argv[1:];"
        "stop = lambda done, total: done == 3 and os.kill(os.getpid(), signal.SIGKILL);"
        "evaluate(AutoModelForConditionalGeneration.from_pretrained(model), AutoProcessor.from_pretrained(model), data,"
        "         output_dir=out, max_new_tokens=3, batch_size=2, progress=stop)"
    )
    killed = subprocess.run([sys.executable, "-c", program, folder, data, tmp_path / "out"], check=False)
    assert killed.returncode == -signal.SIGKILL
    items = tmp_path / "out" / "items.jsonl"
    assert len(items.read_text().splitlines()) == 3
    result = evaluate(*load(folder), data, output_dir=tmp_path / "out", max_new_tokens=3)
    ids = [json.loads(line)["id"] for line in items.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 6
    assert result == evaluate(*load(folder), data, max_new_tokens=3)


def test_two_runs_do_not_share_a_folder(checkpoint, tmp_path: Path) -> None:
    folder, data = checkpoint
    loaded = load(folder)

    def again(done: int, total: int) -> None:
        with pytest.raises(ArgumentError, match="another evaluation is writing"):
            evaluate(*loaded, data, output_dir=tmp_path, max_new_tokens=2)
        raise Interrupted

    with pytest.raises(Interrupted):
        evaluate(*loaded, data, output_dir=tmp_path, max_new_tokens=2, progress=again)
    evaluate(*loaded, data, output_dir=tmp_path, max_new_tokens=2)


def test_a_changed_file_or_setting_is_found(checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint
    data = write_dataset(tmp_path / "data", 4)
    loaded = load(folder)
    how = {"output_dir": tmp_path / "out", "max_new_tokens": 2}
    evaluate(*loaded, data, **how)
    with pytest.raises(ArgumentError, match="other decoding"):
        evaluate(*loaded, data, **how, num_beams=2)
    clip = next(path for path in sorted((tmp_path / "data").rglob("*.wav")))
    content = clip.read_bytes()
    clip.write_bytes(content[:-2] + b"ab")  # of the same size
    with pytest.raises(DataError, match=r"\.wav has changed since '.*' was answered in"):
        evaluate(*loaded, data, **how)
    clip.write_bytes(content)  # a copy is the same file
    evaluate(*loaded, data, **how)


def test_a_broken_file_that_was_mended_is_asked_about_again(checkpoint, tmp_path: Path) -> None:
    """Its size is another one then: the run was refused."""
    folder, _ = checkpoint
    data = write_dataset(tmp_path / "data", 3)
    loaded, how = load(folder), {"output_dir": tmp_path / "out", "max_new_tokens": 2}
    clip = next(path for path in sorted((tmp_path / "data").rglob("*.wav")))
    content = clip.read_bytes()
    clip.write_bytes(b"no audio")
    assert sum(item.error is not None for item in evaluate(*loaded, data, **how).items) == 1
    clip.write_bytes(content)
    assert all(item.error is None for item in evaluate(*loaded, data, **how).items)


def test_audio_that_is_only_touched_is_the_same(tmp_path: Path) -> None:
    """A clip that several questions are about: its content is known from the first of them on."""
    clip = tmp_path / "a.wav"
    clip.write_bytes(bytes(range(200)) * 10_000)
    watch = FileWatch([str(clip)])
    os.utime(clip, (1, 1))
    with pytest.raises(DataError, match=r"a\.wav has changed"):
        watch.check([str(clip)])  # nobody knows what it was
    watch = FileWatch([str(clip)])
    watch.fingerprint(str(clip))
    os.utime(clip, (2, 2))
    watch.check([str(clip)])
    changed = bytearray(clip.read_bytes())
    changed[100_000] ^= 1  # one byte of two million: samples of a file's pieces missed it
    clip.write_bytes(changed)
    with pytest.raises(DataError, match=r"a\.wav has changed"):
        watch.check([str(clip)])


def test_audio_that_changes_while_it_is_asked_about(checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint
    data = write_dataset(tmp_path / "data", 4)
    clips = sorted((tmp_path / "data").rglob("*.wav"))

    def change(done: int, total: int) -> None:
        for clip in clips:
            clip.write_bytes(clip.read_bytes()[:-2] + b"ab")

    how = {"output_dir": tmp_path / "out", "max_new_tokens": 2, "batch_size": 1}
    with pytest.raises(DataError, match=r"\.wav has changed since the run began"):
        evaluate(*load(folder), data, progress=change, **how)
    assert len((tmp_path / "out/items.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_is_one_line_and_keeps_what_is_there(checkpoint, tmp_path: Path, monkeypatch) -> None:
    folder, data = checkpoint
    loaded = load(folder)
    add = RunFolder.add

    def full(run: RunFolder, key: str, item: ItemResult) -> None:
        if len(run.done) == 2:
            run._file.close()
            run._file = open("/dev/full", "w")  # noqa: SIM115
        add(run, key, item)

    monkeypatch.setattr(RunFolder, "add", full)
    with pytest.raises(OutputError, match=r"No space left on device\. 2 answers are kept"):
        evaluate(*loaded, data, output_dir=tmp_path, max_new_tokens=2)
    monkeypatch.undo()
    seen: list[int] = []
    result = evaluate(
        *loaded, data, output_dir=tmp_path, max_new_tokens=2, progress=lambda done, _: seen.append(done)
    )
    assert seen == [3, 4, 5, 6]
    assert result.summary.num_items == 6


def test_questions_that_cannot_be_asked_are_wrong_and_asked_again(checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint
    data = write_dataset(tmp_path / "data", 4)
    clip = next(path for path in sorted((tmp_path / "data").rglob("*.wav")))
    content = clip.read_bytes()
    clip.write_bytes(b"x" * len(content))
    loaded = load(folder)
    rows = read_dataset(DatasetConfig(str(data))).rows if data.suffix else []
    how = {"output_dir": tmp_path / "out", "max_new_tokens": 2}
    broken = evaluate(*loaded, rows, **how)
    assert broken.summary.num_failed >= 1
    assert all(not item.is_correct for item in broken.items if item.error)
    clip.write_bytes(content)
    assert evaluate(*loaded, rows, **how).summary.num_failed == 0


def test_a_row_longer_than_the_context_is_wrong_and_named(tmp_path: Path) -> None:
    write_model(tmp_path / "model", max_position_embeddings=200)
    long = conversation("long", "hello", 0.3)
    long["messages"][0]["content"][0]["text"] = "hello " * 500
    for name in ("long", "short"):
        write_clip(tmp_path / f"{name}.wav", 0.3, 1)
    data = write_rows(tmp_path / "rows.jsonl", [long, conversation("short", "hello", 0.3)])
    result = evaluate(*load(tmp_path / "model"), data, max_new_tokens=2)
    assert [item.error is None for item in result.items] == [False, True]
    assert result.items[0].error is not None
    assert "context" in result.items[0].error
    assert result.summary.wer is not None
    assert result.items[0].num_errors == 1  # its one word counts as missing


def test_options_by_likelihood(checkpoint, tmp_path: Path) -> None:
    folder, data = checkpoint
    model, processor = load(folder)
    question = {"type": "text", "text": "What is it? (A) a dog (B) a cat (C) a dog barking"}
    rows = [
        replace(
            row,
            messages=[
                {
                    "role": "user",
                    "content": [*({"type": "audio", "path": path} for path in row.audio), question],
                },
                {"role": "assistant", "content": "a cat"},
            ],
        )
        for row in read_dataset(DatasetConfig(str(data))).rows
    ]
    result = evaluate(model, processor, rows, by="likelihood", output_dir=tmp_path)
    for row, item in zip(rows, result.items, strict=True):
        options = list(options_of(item.prompt).values())
        scores = model.score(processor, row.messages[:-1], options)
        assert item.option_logprobs == pytest.approx([score.logprob for score in scores], abs=1e-4)
        best = max(scores, key=lambda score: score.logprob / score.num_tokens)
        assert (item.found, item.parsed_by) == (best.text, "likelihood")
    assert evaluate(model, processor, rows, by="likelihood", output_dir=tmp_path) == result
    with pytest.raises(ArgumentError, match="needs questions with options"):
        evaluate(model, processor, data, by="likelihood")


def test_the_chance_of_a_difference() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(5, 5) == 1.0
    assert mcnemar_p(10, 0) == pytest.approx(2 / 2**10)
    assert mcnemar_p(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)


def test_two_runs_are_compared(checkpoint, tmp_path: Path) -> None:
    folder, data = checkpoint
    evaluate(*load(folder), data, output_dir=tmp_path / "a", max_new_tokens=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    same = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (same.changed_settings, same.gained, same.lost) == ("the same", [], [])
    assert same.wer_difference == (0.0, 0.0, 0.0)
    assert same.wer_p == 1.0
    lines = [json.loads(line) for line in (tmp_path / "b" / "items.jsonl").read_text().splitlines()]
    for line in lines:
        line["is_correct"], line["num_errors"] = True, 0
    (tmp_path / "b" / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    changed = compare_runs(tmp_path / "a", tmp_path / "b")
    assert changed.num_left_out == 1
    assert changed.wer_difference is not None
    assert changed.wer_difference[0] < 0
    assert changed.lost == []
    shown = af3("evaluate", "--compare", tmp_path / "a", tmp_path / "b")
    assert (shown.exit_code, shown.stdout) == (0, str(changed))
    empty = af3("evaluate", "--compare", tmp_path / "a", tmp_path)
    assert (empty.exit_code, empty.stderr.count("\n")) == (1, 1)
    assert "holds no evaluation" in empty.stderr


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
