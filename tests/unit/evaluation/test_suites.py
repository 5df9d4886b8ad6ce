"""Benchmarks as they are published: read, asked, scored by their own rules and ours, with what may be wrong in them."""

from __future__ import annotations

import csv
import json
import wave
from pathlib import Path
from typing import Any, get_args

import pytest

from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import ArgumentError, DataError
from audioflamingo.evaluation.evaluate_dataset import make_manifest, read_questions
from audioflamingo.evaluation.evaluation_options import EvaluationOptions, SuiteName
from audioflamingo.evaluation.questions import Question
from audioflamingo.evaluation.rules import chosen_letter, contained_option, matches_tokens, same_word
from audioflamingo.evaluation.scoring import bootstrap_interval, choose
from audioflamingo.evaluation.speech import normalize_english
from audioflamingo.evaluation.suite_questions import read_suite
from audioflamingo.evaluation.suites import SUITES

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
pytest.importorskip("whisper_normalizer", reason="needs whisper-normalizer")
OPTIONS = {"A": "Man", "B": "Woman", "C": "A small child", "D": "Child"}


def write_clip(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(2 * 1600))
    return path


def mmau_row(name: str = "m1", **changed: Any) -> dict[str, Any]:
    row = {
        "id": name, "audio_id": f"./test-mini-audios/{name}.wav", "question": "Who speaks?",
        "choices": ["Man", "Woman", "Child", "Robot"], "answer": "Man", "task": "speech", "split": "test-mini",
        "category": "Reasoning", "sub-category": "Source", "difficulty": "easy",
    }  # fmt: skip
    return {**row, **changed}


def write_mmau(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for row in rows:
        write_clip(folder / row["audio_id"])
    (folder / "mmau-test-mini.json").write_text(json.dumps(rows))
    return folder


def read(name: str, path: Path, **how: Any) -> list[Question]:
    return read_suite(name, DatasetConfig(str(path)), **how)


def verdict(question: Question, answer: str) -> tuple[bool, bool | None, str | None]:
    item = question.score(question, answer)
    return item.is_correct, item.official, item.parsed_by


def test_names_are_those_of_the_options() -> None:
    assert list(SUITES) == list(get_args(SuiteName))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("(B) Woman", ("B", "letter")), ("B", ("B", "letter")), ("man.", ("A", "text")),
        ("It is a small child.", ("C", "text")), ("a child", ("D", "text")),
        ("It may be a man or a woman. I think it is the woman.", ("B", "text")),
        ("<think>(A) or man</think>\nWoman", ("B", "text")), ("The answer is C", ("C", "letter")),
        ("man or woman", (None, None)), ("nobody", (None, None)), ("", (None, None)), ("<think>Man", (None, None)),
    ],
)  # fmt: skip
def test_our_rule_takes_the_text_then_the_letter(answer: str, found: tuple[str | None, str | None]) -> None:
    assert choose(answer, OPTIONS) == found


@pytest.mark.parametrize(
    ("answer", "taken"),
    [("The man speaks", True), ("MAN", True), ("man, not woman", False), ("(A)", False), ("", False)],
)
def test_mmau_compares_sets_of_words(answer: str, taken: bool) -> None:
    assert matches_tokens(answer, "Man", {"A": "Man", "B": "Woman"}) is taken


def test_mmau_shared_words_of_wrong_options_do_no_harm() -> None:
    options = {"A": "a red car", "B": "a blue car"}
    assert matches_tokens("a red car", "a red car", options)
    assert not matches_tokens("a red and blue car", "a red car", options)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B. woman", "B"), ("The answer is C.", "C"), ("\nA", "A"), ("woman", None), ("", None)],
)
def test_mmsu_looks_at_the_ends(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("The correct answer is: (D) x", "D"),
        ("a woman, I say", "A"),
        ("A or B: man", "A"),
        ("x", None),
    ],
)
def test_muchomusic_looks_for_one_capital_letter(answer: str, letter: str | None) -> None:
    assert contained_option(answer, {"A": "Man", "B": "Woman"}) == letter


def test_single_words_are_compared_without_case_and_points() -> None:
    assert same_word("Yes.", ["yes"])
    assert not same_word("yes it is", ["yes"])


def test_whispers_normaliser() -> None:
    assert normalize_english("Mr. Smith's colour, uh, TWENTY-ONE!") == "mister smith is color 21"


def test_transcripts_of_ones_own_by_whispers_normaliser(tmp_path: Path) -> None:
    """Spelling and numbers counted as errors, and only benchmarks could be compared as the leaderboard does."""
    said = 'The spoken content of the audio is "{}".'
    content = [{"type": "audio", "path": "a.wav"}, {"type": "text", "text": "Transcribe the input speech."}]
    answer = {"role": "assistant", "content": said.format("The colour costs $5.")}
    row = {"id": "a", "messages": [{"role": "user", "content": content}, answer]}
    write_clip(tmp_path / "a.wav")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    found = {}
    for settings in (EvaluationOptions(), EvaluationOptions(normalizer="whisper")):
        (question,) = read_questions(str(tmp_path / "rows.jsonl"), settings)
        item = question.score(question, said.format("the color costs five dollars"))
        found[settings.normalizer] = item.num_errors
        assert make_manifest([question], settings, {}, {})["normalizer"] == settings.normalizer
    assert found == {"plain": 3, "whisper": 0}
    with pytest.raises(ArgumentError, match="beside a suite, which has its own"):
        EvaluationOptions(suite="librispeech", normalizer="whisper")


def test_intervals_hold_the_value_and_shrink() -> None:
    few = bootstrap_interval([1, 0] * 10, [1.0] * 20)
    many = bootstrap_interval([1, 0] * 1000, [1.0] * 2000)
    assert few is not None
    assert many is not None
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * (0.25 / 2000) ** 0.5, rel=0.2)
    assert bootstrap_interval([1], [1]) is None


def test_mmau(tmp_path: Path) -> None:
    data = write_mmau(tmp_path, [mmau_row(), mmau_row("m2", difficulty="hard", answer="Robot")])
    first, second = read("mmau", data)
    assert first.text == (
        "Who speaks? Choose the correct option from the following options:\n(A) Man\n(B) Woman\n(C) Child\n(D) Robot"
    )
    assert first.clips() == [str((data / "test-mini-audios/m1.wav").resolve())]
    assert (second.groups["task"], second.groups["difficulty"]) == ("speech", "hard")
    assert verdict(first, "Man") == (True, True, "text")
    assert verdict(first, "(A)") == (True, False, "letter")  # MMAU's own script wants the words
    assert verdict(first, "an android") == (False, False, None)
    assert first.score(first, "an android").is_unparsed
    (official, _) = read("mmau", data, prompts="official")
    assert official.text.startswith("Who speaks?\nA. Man\nB. Woman\n")


def test_the_test_split_without_keys_is_asked_and_not_scored(tmp_path: Path) -> None:
    rows = [{k: v for k, v in mmau_row(name).items() if k != "answer"} for name in ("m1", "m2")]
    question, _ = read("mmau", write_mmau(tmp_path, rows))
    assert question.score(question, "Man").scoring == "unscored"


def test_mmar_from_jsonl(tmp_path: Path) -> None:
    row = {
        "id": "r1", "audio_path": "./audio/r1.wav", "question": "What is it", "choices": ["Yes", "No"],
        "answer": "No", "modality": "mix-sound-music", "category": "Signal Layer", "sub-category": "Noise",
    }  # fmt: skip
    write_clip(tmp_path / "audio/r1.wav")
    (tmp_path / "MMAR-meta.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = read("mmar", tmp_path, prompts="official")
    assert question.text == "What is it\nSelect one option from the provided choices:\nYes\nNo"
    assert question.groups["modality"] == "mix-sound-music"
    assert verdict(question, "no") == (True, True, "text")


def test_mmsu_from_parquet_with_audio_inside(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "x.wav").read_bytes()
    rows = [
        {
            "id": f"s{n}", "question": "Which tone?", "choice_a": "flat", "choice_b": "rising", "choice_c": "",
            "choice_d": None, "answer_gt": "rising", "task_name": "tone", "category": "Perception",
            "audio": {"bytes": clip + bytes(n), "path": "s"},
        }
        for n in range(3)
    ]  # fmt: skip
    (tmp_path / "x.wav").unlink()
    pa.parquet = pytest.importorskip("pyarrow.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "test-00000.parquet", row_group_size=2)
    questions = read("mmsu", tmp_path, prompts="official")
    assert questions[2].text.endswith("Question: Which tone?\n\nA. flat\nB. rising")
    (audio,) = questions[2].clips()
    assert audio.source() == clip + bytes(2)
    assert verdict(questions[0], "B") == (True, True, "letter")
    assert verdict(questions[0], "rising") == (True, False, "text")


def test_muchomusic_from_its_table_and_from_its_prepared_file(tmp_path: Path) -> None:
    write_clip(tmp_path / "data/sdd/audio/00/415600.2min.wav")
    write_clip(tmp_path / "data/musiccaps/audio/[ab_c]-[30-40].wav")
    rows = [
        {
            "dataset_identifier": id, "dataset": dataset, "question": "Which genre?", "correct_answer": "Ska",
            "distractor_1_answer": "Pop", "distractor_2_answer": "Rock", "distractor_3_answer": "Jazz", "genre": "Ska",
            "music_knowledge": "['melody']", "music_reasoning": "[]",
        }
        for id, dataset in (("415600.json", "sdd"), ("ab_c_0.json", "musiccaps"))
    ]  # fmt: skip
    with (tmp_path / "muchomusic.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    first, second = read("muchomusic", tmp_path)
    assert first.clips()[0].endswith("415600.2min.wav")
    assert second.clips()[0].endswith("[ab_c]-[30-40].wav")
    assert sorted(first.options.values()) == ["Jazz", "Pop", "Rock", "Ska"]
    assert first.groups["skill"] == "knowledge"
    (letter,) = (letter for letter, text in first.options.items() if text == "Ska")
    assert verdict(first, letter) == (True, True, "letter")
    prepared = {
        "id": 415600, "prompt": "Question: Which genre?\n Options: (A) Pop (B) Ska \n The correct answer is: ",
        "answers": ["Pop", "Ska"], "answer_orders": [1, 0], "dataset": "sdd", "genre": "Ska", "reasoning": [],
        "knowledge": [], "audio_path": "data/sdd/audio/00/415600.2min.wav",
    }  # fmt: skip
    (tmp_path / "prepared.json").write_text(json.dumps([prepared]))
    (question,) = read("muchomusic", tmp_path / "prepared.json", prompts="official")
    assert question.text == prepared["prompt"]
    assert question.reference == "Ska"


def test_clotho_counts_votes(tmp_path: Path) -> None:
    write_clip(tmp_path / "audio_files/a.wav")
    lines = ["file_name,QuestionText,answer,confidence"]
    lines += [f"a.wav,Is it wet?,{answer},yes" for answer in ("yes", "yes", "no")]
    lines += [f"a.wav,What falls?,{answer},yes" for answer in ("rain", "Rain", "rain")]
    (tmp_path / "clotho_aqa_test.csv").write_text("\n".join(lines))
    wet, falls = read("clotho-aqa", tmp_path)
    assert (wet.groups, wet.reference) == ({"answer": "yes or no", "agreement": "most agree"}, "yes")
    assert falls.groups == {"answer": "word", "agreement": "all agree"}
    assert verdict(wet, "Yes, it is.") == (True, False, None)
    assert verdict(falls, "rain.") == (True, True, None)
    assert verdict(falls, "snow") == (False, False, None)


def test_librispeech_folders(tmp_path: Path) -> None:
    folder = tmp_path / "LibriSpeech/test-clean/84/121123"
    write_clip(folder / "84-121123-0000.wav")
    (folder / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR TWENTY\n")
    (question,) = read("librispeech", tmp_path)
    assert question.text == "Transcribe the input speech."
    assert question.groups == {"split": "test-clean"}
    item = question.score(question, 'The spoken content of the audio is "Go, do you hear 20?".')
    assert (item.num_errors, item.num_words, item.is_correct) == (0, 5, True)
    assert question.score(question, "go do you fear").num_errors == 2


def test_open_asr_leaves_out_what_the_leaderboard_does(tmp_path: Path) -> None:
    clip = {"bytes": write_clip(tmp_path / "x.wav").read_bytes(), "path": "x"}
    texts = ["hello there", "ignore time segment in scoring", "[noise]"]
    rows = [{"id": f"{n}", "dataset": "ami", "text": text, "audio": clip} for n, text in enumerate(texts)]
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), tmp_path / "ami.parquet")
    with pytest.warns(UserWarning, match="2 rows"):
        (question,) = read("open-asr", tmp_path / "ami.parquet")
    assert (question.id, question.groups) == ("ami/0", {"dataset": "ami"})


def test_mmau_pro_scores_choices_only(tmp_path: Path) -> None:
    for n in range(2):
        write_clip(tmp_path / f"data/{n}.wav")
    paths = ["data/0.wav", "data/1.wav"]
    multi = {"question": "Same?", "choices": ["Yes", "No"], "answer": "No", "category": "multi"}
    free = {"question": "Why?", "choices": None, "answer": "Because.", "category": "open"}
    rows = [{"id": "p1", "audio_path": paths, **multi}, {"id": "p2", "audio_path": paths[:1], **free}]
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    both, why = read("mmau-pro", tmp_path)
    assert len(both.clips()) == 2
    assert verdict(both, "No") == (True, None, "text")
    assert (why.text, why.score(why, "So.").scoring) == ("Why?", "unscored")
    with pytest.raises(ArgumentError, match="publishes no prompt"):
        read("mmau-pro", tmp_path, prompts="official")


BAD = {
    "duplicate": ([mmau_row(), mmau_row()], r":2: the id 'm1' is that of .*:1 too"),
    "no key": ([mmau_row(), mmau_row("m2", answer="")], r":2: no answer to score by; so have 1 of 2"),
    "other key": ([mmau_row(answer="Dog")], r":1: the answer 'Dog' is none of the options 'Man'"),
    "no list": ([mmau_row(choices="['Man'")], r":1: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name: str, tmp_path: Path) -> None:
    rows, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        read("mmau", write_mmau(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_another_suite_and_missing_audio_are_named(tmp_path: Path) -> None:
    data = write_mmau(tmp_path, [mmau_row(), mmau_row("m2")])
    with pytest.raises(DataError, match=r"is not a row of mmsu: no column choice_a.*It looks like mmau\."):
        read("mmsu", data)
    (data / "test-mini-audios/m2.wav").unlink()
    with pytest.raises(DataError, match=r"1 audio files are missing, the first of .*m2\.wav"):
        read("mmau", data)
    with pytest.raises(DataError, match="holds no table"):
        read("mmau", data / "test-mini-audios")
    with pytest.raises(DataError, match="there is no file or folder"):
        read("mmau", data / "nowhere")
