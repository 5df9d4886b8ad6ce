"""`af3 transcribe`: what is written, what is printed, what it exits with."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audioflamingo.audio.loading import SAMPLING_RATE, load_audio
from audioflamingo.cli import inputs, transcribe_job
from audioflamingo.engine.likelihood import OptionScore
from audioflamingo.transcription import hot_words, windows
from tests.support.cli_runs import af3, af3_process, write_tiny_model
from tests.support.scripted_model import ScriptedModel, framed, tiny_processor

DATA = Path(__file__).parents[2] / "data"
TEXT = "hello world. It is me."


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> ScriptedModel:
    processor = tiny_processor(tmp_path_factory.mktemp("processor"))
    model = ScriptedModel(processor, lambda seconds, attempt: framed(TEXT))
    monkeypatch.setattr(transcribe_job, "load_with_adapter", lambda *_: (model, processor, None))
    return model


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_audio(DATA / "directory_prompt.flac")[: 3 * SAMPLING_RATE]


@pytest.fixture
def folder(tmp_path: Path, speech: np.ndarray) -> Path:
    """Three good files and a broken one, at two levels, and a file that is no audio."""
    folder = tmp_path / "in"
    (folder / "deep er").mkdir(parents=True)
    for name in ("a.wav", "c.flac", "deep er/ä.wav"):
        soundfile.write(folder / name, speech, SAMPLING_RATE)
    (folder / "b.wav").write_bytes(b"RIFF----WAVEnothing")
    (folder / "notes.txt").write_text("no audio")
    (folder / ".hidden.wav").write_bytes(b"")
    return folder


def test_a_file_is_printed(model: ScriptedModel) -> None:
    result = af3("transcribe", DATA / "directory_prompt.flac")
    assert (result.exit_code, result.stdout) == (0, TEXT + "\n")


@pytest.mark.parametrize(
    ("name", "start"),
    [("srt", "1\n00:00:00,"), ("vtt", "WEBVTT\n\n00:"), ("tsv", "start_ms\t"), ("json", "{"), ("jsonl", "{")],
)
def test_every_format_can_be_printed(name: str, start: str, model: ScriptedModel) -> None:
    result = af3("transcribe", DATA / "directory_prompt.flac", "--format", name)
    assert result.exit_code == 0
    assert result.stdout.startswith(start)
    assert TEXT in result.stdout


def test_a_broken_file_among_good_ones(folder: Path, tmp_path: Path, model: ScriptedModel) -> None:
    out = tmp_path / "out"
    result = af3("transcribe", folder, "--output-dir", out, "-f", "jsonl")
    assert result.exit_code == 1
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.*")) == [
        "a.jsonl",
        "c.jsonl",
        "deep er/ä.jsonl",
    ]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "b.wav" in errors[0]
    assert "3 transcribed, 1 failed." in result.stderr
    assert json.loads((out / "a.jsonl").read_text())["text"] == TEXT
    assert len(model.calls) == 1  # the three files run together


def test_what_is_done_is_not_done_again(folder: Path, tmp_path: Path, model: ScriptedModel) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("mine\n")
    result = af3("transcribe", folder, "-o", out)
    assert (out / "a.txt").read_text() == "mine\n"
    assert "1 already transcribed" in result.stderr
    assert "2 transcribed, 1 skipped, 1 failed." in result.stderr
    af3("transcribe", folder, "-o", out, "--overwrite")
    assert (out / "a.txt").read_text() == TEXT + "\n"


def test_nothing_left_to_do_loads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcribe_job, "load_with_adapter", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "directory_prompt.txt").write_text("done")
    assert af3("transcribe", DATA / "directory_prompt.flac", "-o", tmp_path).exit_code == 0


def test_quiet_prints_results_only(folder: Path, tmp_path: Path, model: ScriptedModel) -> None:
    result = af3("transcribe", folder / "a.wav", "-o", tmp_path / "out", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


def test_quiet_with_several_files(folder: Path, tmp_path: Path, model: ScriptedModel) -> None:
    """The place on the bar was looked up where no bar was: the second file ended the command."""
    names = [folder / "a.wav", folder / "c.flac"]
    result = af3("transcribe", "-q", *names)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "".join(f"==> {name} <==\n{TEXT}\n" for name in names)
    for name in ("txt", "srt", "json"):  # one piece by piece, two whole
        result = af3("transcribe", "-q", *names, "-o", tmp_path / name, "-f", name)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [f"a.{name}", f"c.{name}"]
    (folder / "b.wav").unlink()
    result = af3("transcribe", folder, "-q", "-f", "jsonl")
    assert (result.exit_code, result.stdout.count(TEXT)) == (0, 3)


def test_several_files_on_one_output(folder: Path, model: ScriptedModel) -> None:
    names = [folder / "a.wav", folder / "c.flac"]
    result = af3("transcribe", *names)
    assert result.stdout == "".join(f"==> {name} <==\n{TEXT}\n" for name in names)
    lines = [json.loads(line) for line in af3("transcribe", *names, "-f", "jsonl").stdout.splitlines()]
    assert [line["source"] for line in lines] == list(map(str, names))
    result = af3("transcribe", *names, "-f", "srt")
    assert result.exit_code == 2
    assert "--output-dir" in result.stderr


def test_an_empty_folder_and_a_pattern_that_matches_nothing(tmp_path: Path, model: ScriptedModel) -> None:
    result = af3("transcribe", tmp_path, tmp_path / "*.wav")
    assert result.exit_code == 1
    assert "no audio files in this folder" in result.stderr
    assert "no file matches this pattern" in result.stderr


def test_patterns_and_doubles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inputs.find_inputs(
        [f"{folder}/**/*.wav", str(folder / "a.wav"), str(folder / "c.flac"), str(folder)]
    )
    assert [Path(i.name).name for i in found] == ["a.wav", "b.wav", "ä.wav", "c.flac"]
    assert [str(i.output_stem) for i in found] == ["a", "b", "ä", "c"]


def test_outputs_never_share_a_name(tmp_path: Path) -> None:
    for name in ("x.wav", "x.mp3", "X.flac", "sub/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = inputs.find_inputs([str(tmp_path / n) for n in ("x.wav", "x.mp3", "X.flac", "sub/x.wav")])
    stems = [str(item.output_stem).casefold() for item in found]
    assert stems == ["x.wav", "x.mp3", "x.flac", "x.wav-2"]


def test_lists_with_a_byte_order_mark_and_by_the_name_of_json(folder: Path) -> None:
    """The first was no JSON to us, the second was taken for audio."""
    lines = '{"audio_filepath": "a.wav", "duration": 2.96, "text": ""}\n{"path": "c.flac", "offset": 0}\n'
    for name in ("bom.jsonl", "nemo.json"):
        (folder / name).write_text(lines, encoding="utf-8-sig")
        found = inputs.find_inputs([str(folder / name)])
        assert [(item.path, item.error) for item in found] == [
            (folder / "a.wav", None),
            (folder / "c.flac", None),
        ]


def test_rows_about_parts_of_a_file(folder: Path, tmp_path: Path, model: ScriptedModel) -> None:
    """The whole file was transcribed, once, without a word; later they were refused."""
    rows = [
        {"offset": 1.0, "duration": 1.0},
        {"offset": 0, "duration": 1.0},
        {"duration": 3.0},
        {"offset": 2.5},
    ]
    lines = [json.dumps({"audio_filepath": "a.wav", **row}) for row in rows]
    (folder / "list.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    result = af3("transcribe", folder / "list.jsonl", "-f", "json", "-o", out, "--no-vad")
    assert result.exit_code == 0, result.stderr
    lengths = {path.stem: json.loads(path.read_text())["duration_s"] for path in out.iterdir()}
    assert lengths == {
        "a": 3.0,
        "a_000000000-000001000": 1.0,
        "a_000001000-000002000": 1.0,
        "a_000002500": 0.5,
    }
    heard = sorted(seconds for call in model.calls for seconds in call)
    assert heard == pytest.approx([0.5, 1.0, 1.0, 3.0], abs=0.05)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"offset": 9.0}, "the recording lasts 3.00 s only"),
        ({"offset": -1}, "begins at 0 s or later"),
        ({"offset": "soon"}, "offset must be a number of seconds"),
        ({"duration": 0}, "lasts more than 0 s"),
    ],
)
def test_parts_that_are_not_there(
    folder: Path, model: ScriptedModel, row: dict[str, Any], message: str
) -> None:
    (folder / "list.jsonl").write_text(json.dumps({"path": "a.wav", **row}))
    result = af3("transcribe", folder / "list.jsonl")
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", '[{"audio": "a.wav", "text": "x"}, {"path": "c.flac", "offset": 1, "duration": 1}]'),
        ("list.csv", "file_name,transcription,offset,duration\na.wav,x,,\nc.flac,,1,1\n"),
        ("list.tsv", "wav\toffset\tduration\na.wav\t0\t\nc.flac\t1.0\t1.0\n"),
    ],
)
def test_other_kinds_of_lists(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8-sig")
    whole, part = inputs.find_inputs([str(folder / name)])
    assert (whole.path, whole.stretch) == (folder / "a.wav", None)
    assert part.stretch is not None
    assert (part.stretch.start_s, part.stretch.duration_s) == (1.0, 1.0)
    assert part.name == f"{folder / 'c.flac'} from 1 s for 1 s"


def test_a_part_on_a_cluster_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "list.jsonl").write_text('{"path": "a.wav", "offset": 1}')
    result = af3("transcribe", folder / "list.jsonl", "--engine", "ray", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "the workers hear files whole" in result.stderr


class TestStartAndEnd:
    def test_what_is_no_time(self, folder: Path) -> None:
        result = af3("transcribe", folder / "a.wav", "--start", "1:75")
        assert result.exit_code == 2
        assert "seconds, or as in 1:02:03.5 or 2m30s" in result.stderr

    def test_times_are_those_of_the_recording(self, folder: Path, model: ScriptedModel) -> None:
        result = af3(
            "transcribe", folder / "a.wav", "-f", "json", "--start", "0:01", "--end", "2.5s", "--no-vad"
        )
        content = json.loads(result.stdout)
        assert content["duration_s"] == 1.5
        (segment,) = content["segments"]
        assert (segment["start_s"], segment["end_s"]) == pytest.approx((1.0, 2.5), abs=0.001)

    def test_what_is_heard(self, speech: np.ndarray, model: ScriptedModel) -> None:
        """Reads no further than the end; the samples are those between."""
        blocks = [speech[None, :20000], speech[None, 20000:40000], np.full((1, 1), np.nan, np.float32)]
        (first, second) = windows.between(iter(blocks), 1.0, 2.5)
        assert np.array_equal(np.concatenate([first[0], second[0]]), speech[16000:40000])

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--start", 5), "the recording lasts 3.00 s, and was to begin at 5 s"),
            (("--start", 2, "--end", 1), "end_s must be above start_s=2"),
        ],
    )
    def test_nothing_between(
        self, folder: Path, model: ScriptedModel, flags: tuple[Any, ...], message: str
    ) -> None:
        result = af3("transcribe", folder / "a.wav", *flags)
        assert result.exit_code == 1
        assert message in result.stderr

    def test_an_end_behind_the_end(self, folder: Path, model: ScriptedModel) -> None:
        result = af3("transcribe", folder / "a.wav", "--end", 100)
        assert (result.exit_code, result.stdout) == (0, TEXT + "\n")


class TestSeveralFormats:
    @pytest.mark.parametrize("flags", [("-f", "srt", "-f", "json"), ("-f", "srt,JSON")])
    def test_one_run_writes_them_all(
        self, folder: Path, tmp_path: Path, model: ScriptedModel, flags: tuple[str, ...]
    ) -> None:
        out = tmp_path / "out"
        assert af3("transcribe", folder / "a.wav", "-o", out, *flags).exit_code == 0
        assert sorted(path.name for path in out.iterdir()) == ["a.json", "a.srt"]
        assert len(model.calls) == 1
        (out / "a.srt").unlink()
        assert af3("transcribe", folder / "a.wav", "-o", out, *flags).exit_code == 0
        assert (out / "a.srt").exists()

    def test_they_need_a_folder(self, folder: Path, model: ScriptedModel) -> None:
        result = af3("transcribe", folder / "a.wav", "-f", "srt", "-f", "json")
        assert result.exit_code == 2
        assert "several formats need --output-dir" in result.stderr

    def test_one_that_there_is_not(self, folder: Path, model: ScriptedModel) -> None:
        result = af3("transcribe", folder / "a.wav", "-f", "docx")
        assert result.exit_code == 2
        assert "'docx' is not one of txt, json" in result.stderr


def test_urls_and_stdin_have_names() -> None:
    found = inputs.find_inputs(["https://example.org/talks/first%20talk.mp3?x=1", "https://example.org", "-"])
    assert [str(i.output_stem) for i in found] == ["first talk", "example", "stdin"]


def test_a_file_that_vanishes_in_the_middle(folder: Path, tmp_path: Path, model: ScriptedModel) -> None:
    embed = model.embed

    def remove_then_embed(token_ids: Any) -> Any:
        (folder / "c.flac").unlink(missing_ok=True)
        return embed(token_ids)

    model.embed = remove_then_embed  # type: ignore[method-assign]
    result = af3("transcribe", folder, "-o", tmp_path / "out", "--batch-size", "1")
    assert result.exit_code == 1
    assert "c.flac': there is no such file" in result.stderr
    assert (tmp_path / "out/deep er/ä.txt").exists()


def test_no_space_left_stops_and_keeps_what_is_done(
    folder: Path, tmp_path: Path, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fsync, count = tmp_path / "out", os.fsync, iter(range(9))

    def full_at_the_second(descriptor: int) -> None:
        if next(count) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    result = af3("transcribe", folder, "-o", out, "--batch-size", "1")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "stopped: 1 transcribed" in result.stderr
    assert [p.name for p in out.rglob("*") if p.is_file()] == ["a.txt"]


def test_an_output_folder_that_cannot_be_written_to(
    folder: Path, tmp_path: Path, model: ScriptedModel
) -> None:
    (tmp_path / "file").write_text("")
    result = af3("transcribe", folder, "-o", tmp_path / "file")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot write to the folder")
    assert model.calls == []
    read_only = Path("/proc/af3")  # nobody can write there, not even root
    result = af3("transcribe", folder, "-o", read_only)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_a_recording_whose_header_was_never_finished(
    tmp_path: Path, speech: np.ndarray, model: ScriptedModel
) -> None:
    """A microphone that was unplugged leaves sizes of 0 or 0xFFFFFFFF in the header."""
    samples = (speech * 32767).astype("<i2").tobytes()
    for name, size in (("zero.wav", 0), ("most.wav", 0xFFFFFFFF)):
        head = struct.pack(
            "<4sI4s4sIHHIIHH4sI",
            b"RIFF",
            size,
            b"WAVE",
            b"fmt ",
            16,
            1,
            1,
            16000,
            32000,
            2,
            16,
            b"data",
            size,
        )
        (tmp_path / name).write_bytes(head + samples)
    result = af3("transcribe", tmp_path)
    assert result.exit_code == 0
    assert result.stdout.count(TEXT) == 2


def test_standard_input(speech: np.ndarray, model: ScriptedModel, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", speech, SAMPLING_RATE)
    result = af3("transcribe", "-", "-f", "json", input=(tmp_path / "a.wav").read_bytes())
    assert result.exit_code == 0
    assert json.loads(result.stdout)["source"] == "stdin"
    result = af3("transcribe", "-", input=b"")
    assert result.exit_code == 1
    assert "empty" in result.stderr


def test_silence_is_an_empty_transcript(tmp_path: Path, model: ScriptedModel) -> None:
    soundfile.write(tmp_path / "s.wav", np.zeros(32000), SAMPLING_RATE)
    result = af3("transcribe", tmp_path / "s.wav", "-o", tmp_path)
    assert result.exit_code == 0
    assert (tmp_path / "s.txt").read_text() == ""


def test_a_loop_is_not_silent(tmp_path: Path, model: ScriptedModel, speech: np.ndarray) -> None:
    soundfile.write(tmp_path / "s.wav", speech, SAMPLING_RATE)
    model._script = lambda seconds, attempt: "hello " * 600
    result = af3("transcribe", tmp_path / "s.wav")
    assert result.stdout == "hello hello\n"  # the first of them has a token of its own
    assert "the model repeated itself" in result.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["a.wav", "--format", "doc"], ["a.wav", "--batch-size", "0"], ["a.wav", "--nope"]]
)
def test_a_wrong_command_line(arguments: list[str]) -> None:
    assert af3("transcribe", *arguments).exit_code == 2


def test_a_value_that_is_refused_later_is_one_line() -> None:
    result = af3("transcribe", "a.wav", "--max-window-s", "99")
    assert (result.exit_code, result.stderr) == (1, "error: max_window_s must be in [1, 30] s, got 99.0.\n")


def test_hot_words_come_from_a_file(
    tmp_path: Path, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(_: Any, __: Any, ___: Any, options: list[str], adapter: Any) -> list[OptionScore]:
        return [OptionScore(option, -3.0, 10, False) for option in options]

    monkeypatch.setattr(hot_words, "score", score)
    (tmp_path / "names.txt").write_text("# names\nWorlde\n")
    result = af3("transcribe", DATA / "directory_prompt.flac", "--hotwords", tmp_path / "names.txt")
    assert (result.exit_code, result.stdout) == (0, TEXT.replace("world", "Worlde") + "\n")
    result = af3("transcribe", DATA / "directory_prompt.flac", "--hotwords", tmp_path / "name.txt")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "there is no file of hot words" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "gone.yaml"),
        ("ask", DATA / "directory_prompt.flac", "What?", "--schema", "gone.json"),
        ("transcribe", DATA / "directory_prompt.flac", "--hotwords", DATA),
    ],
)
def test_files_that_cannot_be_read_are_named_once(arguments: tuple[object, ...]) -> None:
    """Messages had "[Errno 2]" and the name a second time."""
    message = af3(*arguments).stderr
    assert "Errno" not in message
    assert "No such file or directory." in message or "Is a directory." in message


def test_context_is_never_heard_in_silence(tmp_path: Path, model: ScriptedModel) -> None:
    """Nothing is asked about it, whatever the words and the instruction are."""
    noise = 1e-4 * np.random.default_rng(0).standard_normal(5 * SAMPLING_RATE)
    for name, sound in (("silence", np.zeros(32000)), ("noise", noise)):
        soundfile.write(tmp_path / f"{name}.wav", sound, SAMPLING_RATE)
        words = ["--hotwords", "hello, world,", "--prompt", "Transcribe. Context: hello world"]
        result = af3("transcribe", tmp_path / f"{name}.wav", *words)
        assert (result.exit_code, result.stdout) == (0, "")
    assert model.calls == []


def test_debug_shows_where(tmp_path: Path) -> None:
    arguments = ["transcribe", DATA / "directory_prompt.flac", "--model", tmp_path / "nowhere"]
    result = af3(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "nowhere" in result.stderr
    assert "Traceback" in af3(*arguments, "--debug").stderr


def test_ctrl_c_then_the_same_command_again(tmp_path: Path, speech: np.ndarray) -> None:
    """A real process, a real signal: what is written is whole, and the second run does the rest."""
    model = write_tiny_model(tmp_path / "model")
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    soundfile.write(source / "000.wav", speech, SAMPLING_RATE)
    for number in range(1, 40):
        shutil.copy(source / "000.wav", source / f"{number:03d}.wav")
    command = ["transcribe", source, "-o", out, "-f", "json", "--model", model, "--max-new-tokens", 60]
    process = af3_process(*command, "--batch-size", 2)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    done = sorted(out.glob("*"))
    assert process.returncode == 130, errors.decode()
    assert b"The same command goes on with the rest." in errors
    assert 0 < len(done) < 40
    assert all(json.loads(path.read_text())["segments"] for path in done)
    times = {path: path.stat().st_mtime_ns for path in done}
    process = af3_process(*command, "--batch-size", 16)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert len(list(out.glob("*"))) == 40
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items())
