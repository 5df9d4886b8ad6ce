"""Labels, rows, checkpoints and scores, as people report them; the sources stand in README.md beside this."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from audioflamingo.config import IGNORED_LABEL
from audioflamingo.datasets.conversations import read_dataset
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import ArgumentError, DataError
from audioflamingo.evaluation.scoring import score, summarize
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.training.reading_data import read_data
from audioflamingo.training.settings import build
from audioflamingo.training.training_config import TrainingConfig
from tests.support.adapter_folders import save_adapter
from tests.support.audio_files import tone
from tests.support.generation_models import lively_model
from tests.support.tiny_model import tiny_model, tiny_reference
from tests.support.tiny_tokenizer import write_tiny_processor
from tests.support.tiny_training import config_values, conversation, write_clip, write_rows

END = "<|im_end|>"
FRAME = 'The spoken content of the audio is "{}".'


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path_factory.mktemp("tiny")))


def rows(*answers: str) -> list[Any]:
    clip = tone(1.0, 16000)[:, 0]
    return [
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "why " * n}, {"type": "audio", "audio": clip}],
            },
            {"role": "assistant", "content": answer},
        ]
        for n, answer in enumerate(answers, start=1)
    ]


class TestLabels:
    def test_rows_of_unlike_length(self, processor: AudioFlamingo3Processor) -> None:
        """Padded on the left, the answer's place in a row is not the length of its question."""
        answers = ("hello world", "the capital of France", "hi")
        batch = processor.apply_chat_template(
            rows(*answers), tokenize=True, return_dict=True, output_labels="assistant"
        )
        for labels, ids, answer in zip(batch["labels"], batch["input_ids"], answers, strict=True):
            is_answer = labels != IGNORED_LABEL
            assert processor.decode(labels[is_answer]) == answer + END
            assert torch.equal(labels[is_answer], ids[is_answer])

    def test_a_pad_token_that_is_the_end_token(self, tmp_path: Path) -> None:
        """Who leaves out padding by its id leaves out the end too, and the model never learns to stop."""
        folder = write_tiny_processor(tmp_path)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": END}))
        processor = AudioFlamingo3Processor.from_pretrained(folder)
        assert processor.tokenizer.pad_token == processor.tokenizer.eos_token == END
        batch = processor.apply_chat_template(
            rows("hello", "hello world"), tokenize=True, return_dict=True, output_labels="assistant"
        )
        end = processor.tokenizer.pad_token_id
        for labels in batch["labels"]:
            assert labels[labels != IGNORED_LABEL].tolist().count(end) == 1

    def test_a_tokenizer_is_called(self, processor: AudioFlamingo3Processor) -> None:
        tokenizer = processor.tokenizer
        ids = tokenizer.encode_plain("hello world")
        assert tokenizer("hello world").input_ids == ids
        several = tokenizer(["hello world", f"why{END}"], add_special_tokens=False)
        assert several["input_ids"][0] == ids
        assert several["input_ids"][1][-1] == tokenizer.eos_token_id
        assert list(map(len, several["attention_mask"])) == list(map(len, several["input_ids"]))
        with pytest.raises(ArgumentError, match="a text or a list of texts"):
            tokenizer(5)

    def test_an_argument_of_another_library(self, processor: AudioFlamingo3Processor) -> None:
        """Elsewhere `audios` was left aside with a warning, and the model answered without having heard."""
        with pytest.raises(ArgumentError, match=r"'audios' \(did you mean 'audio'\?\)"):
            processor(text="<sound>why", audios=[tone(1.0)])

    def test_the_place_of_audio_within_a_text(self, processor: AudioFlamingo3Processor) -> None:
        """A user who writes the placeholder asks about it: no clip is missing for that."""
        message = {"role": "user", "content": [{"type": "text", "text": "<sound> why"}]}
        ids = processor.apply_chat_template([message], tokenize=True, return_dict=True)["input_ids"]
        assert processor.audio_token_id not in ids


class TestRows:
    def test_empty_lines(self, tmp_path: Path) -> None:
        write_clip(tmp_path / "a.wav", 0.3, 0)
        row = json.dumps(conversation("a", "hello", 0.3))
        path = write_rows(tmp_path / "set.jsonl", ["", row, "  ", ""])
        (read,) = read_dataset(DatasetConfig(str(path))).rows
        assert read.place.endswith(":2")

    def test_a_row_over_several_lines(self, tmp_path: Path) -> None:
        """The first line is named, and what a line must be."""
        row = json.dumps(conversation("a", "hello", 0.3), indent=2)
        path = write_rows(tmp_path / "set.jsonl", [row])
        with pytest.raises(DataError, match=r"set\.jsonl:1: .*each row stands on one line"):
            read_dataset(DatasetConfig(str(path)))

    def test_an_answer_longer_than_the_context(self, tmp_path: Path) -> None:
        """Said before the first step, with the place; elsewhere it is an error of shapes after hours."""
        values = config_values(tmp_path)
        write_clip(tmp_path / "long.wav", 0.3, 0)
        good = conversation("long", "hello", 0.3)
        config = tiny_model().config
        text = "hello " * config.text_config.max_position_embeddings
        long = {**conversation("long", text, 0.3), "id": "b"}
        path = write_rows(tmp_path / "long.jsonl", [good, long])
        values["data"] = {"train": [{"path": str(path)}], "on_bad_row": "error"}
        processor = AudioFlamingo3Processor.from_pretrained(values["model"])
        with pytest.raises(DataError, match=r"long\.jsonl:2: \d+ tokens, more than the \d+"):
            read_data(build(TrainingConfig, values), processor, config)
        values["data"]["on_bad_row"] = "skip"
        (dataset,), _ = read_data(build(TrainingConfig, values), processor, config)
        assert [row.id for row in dataset.rows] == ["long"]
        assert dataset.num_bad == 1


def test_a_merged_model_beside_its_adapter(tmp_path: Path) -> None:
    """peft leaves both in a folder: the weights hold the adapter already, it is not added once more."""
    pytest.importorskip("peft", reason="needs peft")
    save_adapter(tmp_path / "adapter", tiny_reference())
    model = lively_model()
    model.save_pretrained(tmp_path / "whole")
    for file in (tmp_path / "adapter").iterdir():
        if not (tmp_path / "whole" / file.name).exists():
            shutil.copy(file, tmp_path / "whole")
    loaded = AudioFlamingo3ForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    for (name, expected), (_, found) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(expected, found), name


class TestScores:
    def test_silence(self) -> None:
        """Words over silence are errors, nothing over silence is none; all of them empty is no division by zero."""

        def wer(*pairs: tuple[str, str]) -> float | None:
            return summarize(
                [
                    score(str(n), "Transcribe.", FRAME.format(expected), FRAME.format(found) if found else "")
                    for n, (expected, found) in enumerate(pairs)
                ]
            ).wer

        assert wer(("", "")) == 0
        assert wer(("", ""), ("one two", "one two")) == 0
        assert wer(("", "made up"), ("one two three four", "one two three four")) == 0.5
        assert wer(("one two", "")) == 1

    @pytest.mark.parametrize(
        ("options", "answer"),
        [("(A) yes (B) no (C) both", "(C) both"), ("(A) a (B) b (C) c (D) d (E) e", "E")],
    )
    def test_another_number_of_options_than_four(self, options: str, answer: str) -> None:
        letter = answer.strip("()")[0]
        expected = f"({letter}) " + options.split(f"({letter}) ")[1].split(" (")[0]
        item = score("1", f"Which? {options}", expected, answer)
        assert (item.scoring, item.is_correct) == ("choice", True)
