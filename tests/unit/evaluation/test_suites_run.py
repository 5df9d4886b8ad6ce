"""Every benchmark through `af3 evaluate --suite`, in the form in which it is published: scores by hand, submissions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from audioflamingo.cli import evaluate_command
from audioflamingo.engine.likelihood import OptionScore
from audioflamingo.evaluation.evaluation_options import SuiteName
from tests.support.cli_runs import af3
from tests.support.scripted_model import ScriptedModel, framed, tiny_processor
from tests.support.tiny_training import write_clip, write_rows

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
pytest.importorskip("whisper_normalizer", reason="needs whisper-normalizer")
CLIP_S = 0.4  # the n-th clip is n times as long, so what a scripted model hears says which question it is


def clip(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_clip(path, CLIP_S * number, number)


def inside(folder: Path, number: int) -> dict[str, Any]:
    """A clip as Hugging Face's parquet files hold it."""
    path = clip(folder / "unpacked.wav", number)
    content = path.read_bytes()
    path.unlink()
    return {"bytes": content, "path": f"{number}.wav"}


def mmau(folder: Path) -> Path:
    choices = ["Man", "Woman", "Child", "Robot"]
    rows = [
        {
            "id": f"m{n}", "audio_id": f"./test-mini-audios/m{n}.wav", "question": "Who speaks?", "choices": choices,
            "answer": answer, "task": task, "split": "test-mini", "category": "Reasoning", "difficulty": "easy",
        }
        for n, (answer, task) in enumerate(
            [("Man", "speech"), ("Woman", "speech"), ("Man", "sound"), ("Child", "music")], start=1
        )
    ]  # fmt: skip
    for n in range(1, 5):
        clip(folder / f"test-mini-audios/m{n}.wav", n)
    (folder / "mmau-test-mini.json").write_text(json.dumps(rows))
    return folder


def mmau_pro(folder: Path) -> Path:
    for n in (1, 2):
        clip(folder / f"data/{n}.wav", n)
    both, first = ["data/1.wav", "data/2.wav"], ["data/1.wav"]
    rows = [
        {
            "id": "p1", "audio_path": both, "question": "Same?", "choices": ["Yes", "No"], "answer": "No",
            "category": "multi",
        },
        {"id": "p2", "audio_path": first, "question": "Why?", "choices": None, "answer": "So.", "category": "open"},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    return folder


def mmar(folder: Path) -> Path:
    rows = [
        {
            "id": f"r{n}", "audio_path": f"./audio/r{n}.wav", "question": "Does it hum?", "choices": ["Yes", "No"],
            "answer": "No", "modality": "sound", "category": "Signal Layer", "sub-category": "Noise",
        }
        for n in (1, 2)
    ]  # fmt: skip
    for n in (1, 2):
        clip(folder / f"audio/r{n}.wav", n)
    return write_rows(folder / "MMAR-meta.jsonl", rows).parent


def mmsu(folder: Path) -> Path:
    rows = [
        {
            "id": f"s{n}", "question": "Which tone?", "choice_a": "flat", "choice_b": "rising", "choice_c": "falling",
            "choice_d": "none", "answer_gt": "rising", "task_name": "tone", "category": "Perception",
            "audio": inside(folder, n),
        }
        for n in (1, 2, 3)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "test-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "test-00001-of-00002.parquet")
    return folder


def muchomusic(folder: Path) -> Path:
    columns = "dataset_identifier,dataset,question,correct_answer,distractor_1_answer,distractor_2_answer,"
    lines = [columns + "distractor_3_answer,genre,music_knowledge,music_reasoning"]
    for n, (name, dataset) in enumerate([("415600", "sdd"), ("ab_c_0", "musiccaps")], start=1):
        lines.append(f"{name}.json,{dataset},Which genre?,Ska,Pop,Rock,Jazz,Ska,['melody'],[]")
        clip(folder / ("data/sdd/415600.2min.wav" if n == 1 else "data/musiccaps/[ab_c]-[30-40].wav"), n)
    (folder / "muchomusic.csv").write_text("\n".join(lines) + "\n")
    return folder


def clotho(folder: Path) -> Path:
    for n, name in ((1, "wet.wav"), (2, "caf\xe9.wav")):
        clip(folder / "audio_files" / name, n)
    lines = ["file_name,QuestionText,answer,confidence"]
    lines += [f"wet.wav,Is it wet?,{answer},yes" for answer in ("yes", "yes", "no")]
    lines += [f"caf\xe9.wav,What is poured?,{answer},maybe" for answer in ("coffee", "tea", "coffee")]
    (folder / "clotho_aqa_test.csv").write_bytes("\n".join(lines).encode("latin-1"))
    return folder


def librispeech(folder: Path) -> Path:
    chapter = folder / "LibriSpeech/test-clean/84/121123"
    for n in (1, 2):
        clip(chapter / f"84-121123-{n:04d}.wav", n)
    (chapter / "84-121123.trans.txt").write_text(
        "84-121123-0001 GO DO YOU HEAR TWENTY\n84-121123-0002 MISTER SMITH CAME\n"
    )
    return folder


def open_asr(folder: Path) -> Path:
    texts = [("ami", "Okay, the colour."), ("ami", "Yes indeed"), ("earnings22", "We grew by ten percent")]
    rows = [
        {"id": f"{n}", "dataset": dataset, "text": text, "audio": inside(folder, n)}
        for n, (dataset, text) in enumerate(texts, start=1)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    return folder


CHOICE = ("choice_accuracy", "official_accuracy", "num_unparsed", "num_unscored")
# Data; answers by the clips' length; scores; column of the submission to its values.
SUITES: dict[str, tuple[Callable[[Path], Path], dict[int, str], dict[str, Any], dict[str, list[Any]]]] = {
    "mmau": (  # a letter alone is right by our rule, not by MMAU's own, which wants the words
        mmau,
        {1: "Man", 2: "(B) Woman", 3: "A", 4: "nobody"},
        dict(zip(CHOICE, (0.75, 0.5, 1, 0), strict=True)),
        {"model_prediction": ["Man", "(B) Woman", "A", "nobody"], "answer": ["Man", "Woman", "Man", "Child"]},
    ),
    "mmau-pro": (  # 3: the two clips of the first question together
        mmau_pro,
        {3: "(B) No", 1: "So it is."},
        dict(zip(CHOICE, (1.0, None, 0, 1), strict=True)),
        {"model_output": ["(B) No", "So it is."]},
    ),
    "mmar": (
        mmar,
        {1: "<think>It is quiet.</think>\nNo", 2: "Yes and no"},
        dict(zip(CHOICE, (0.5, 0.5, 1, 0), strict=True)),
        {"answer_prediction": ["No", "Yes and no"], "thinking_prediction": ["It is quiet.", None]},
    ),
    "mmsu": (  # MMSU's own rule looks for the letter at the ends
        mmsu,
        {1: "B", 2: "rising", 3: "The answer is C."},
        dict(zip(CHOICE, (2 / 3, 1 / 3, 0, 0), strict=True)),
        {"response": ["B", "rising", "The answer is C."]},
    ),
    "muchomusic": (
        muchomusic,
        {1: "Ska", 2: "Rock"},
        dict(zip(CHOICE, (0.5, 0.5, 0, 0), strict=True)),
        {"model_output": ["Ska", "Rock"]},
    ),
    "clotho-aqa": (
        clotho,
        {1: "Yes, it is.", 2: "coffee"},
        {"exact_match": 1.0, "official_accuracy": 0.5},
        {},
    ),
    "librispeech": (  # one word of eight is wrong once both are normalised
        librispeech,
        {1: framed("Go, do you fear 20?"), 2: "Mr. Smith came."},
        {"wer": 1 / 8, "accuracy": None},
        {},
    ),
    "open-asr": (  # "by" is left out of nine words
        open_asr,
        {1: framed("Okay, the color"), 2: framed("yes indeed"), 3: framed("we grew 10%")},
        {"wer": 1 / 9},
        {},
    ),
}


def answering(folder: Path, answers: dict[int, str]) -> tuple[ScriptedModel, Any, None]:
    """A model that tells questions apart by how long their audio is."""
    processor = tiny_processor(folder)
    model: Any = ScriptedModel(processor, lambda seconds, attempt: answers[round(seconds / CLIP_S)])
    model.config.to_dict = dict
    model.state_dict = dict
    return model, processor, None


@pytest.mark.parametrize("name", SuiteName.__args__)
def test_a_suite_from_its_files_to_its_scores(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, answers, scores, submitted = SUITES[name]
    (tmp_path / "data").mkdir()
    data, out = make(tmp_path / "data"), tmp_path / "out"
    loaded = answering(tmp_path / "processor", answers)
    monkeypatch.setattr(evaluate_command, "load_with_adapter", lambda options: loaded)
    result = af3("evaluate", "--suite", name, data, "-o", out)
    assert result.exit_code == 0, result.output + repr(result.exception)
    summary = json.loads((out / "summary.json").read_text())
    for key, value in scores.items():
        found = summary["all"][key]
        assert found == value or math.isclose(found, value), key
    assert summary["all"]["rtfx"] > 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["suite"] == name
    assert name in (out / "report.html").read_text()
    files = sorted(out.glob("submission.*"))
    if not submitted:
        assert files == []
        return
    text = files[0].read_text()
    lines = files[0].suffix == ".jsonl"
    rows = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    assert {column: [row.get(column) for row in rows] for column in submitted} == submitted


def test_open_questions_beside_likelihoods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MMAU-Pro has open questions, which are not scored here: the whole run was refused for them."""
    (tmp_path / "data").mkdir()
    loaded = answering(tmp_path / "processor", {1: "So it is."})
    loaded[0].score = lambda processor, prompt, options, adapter: [
        OptionScore(text, -float(len(text)), 1, False) for text in options
    ]
    monkeypatch.setattr(evaluate_command, "load_with_adapter", lambda options: loaded)
    out = tmp_path / "out"
    result = af3(
        "evaluate", "--suite", "mmau-pro", mmau_pro(tmp_path / "data"), "-o", out, "--by", "likelihood"
    )
    assert result.exit_code == 0, result.output
    scores = json.loads((out / "summary.json").read_text())["all"]
    assert (scores["choice_accuracy"], scores["num_unscored"]) == (1.0, 1)
    rows = json.loads((out / "submission.json").read_text())
    assert [row["model_output"] for row in rows] == ["No", "So it is."]


def test_groups_and_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    data = mmau(tmp_path / "data")
    loaded = answering(tmp_path / "processor", SUITES["mmau"][1])
    monkeypatch.setattr(evaluate_command, "load_with_adapter", lambda options: loaded)
    result = af3("evaluate", "--suite", "mmau", data, "-o", tmp_path / "out")
    by_task = json.loads((tmp_path / "out/summary.json").read_text())["groups"]["task"]
    assert {task: part["choice_accuracy"] for task, part in by_task.items()} == {
        "speech": 1,
        "sound": 1,
        "music": 0,
    }
    assert "1 answers name no option and count as wrong" in result.stderr
    sample = af3("evaluate", "--suite", "mmau", data, "-o", tmp_path / "sample", "--max-rows", 2)
    assert sample.exit_code == 0, sample.output
    assert json.loads((tmp_path / "sample/summary.json").read_text())["all"]["num_items"] == 2
