"""`constraint=`: answers that must have a form, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo.engine.constraints import compile_constraint
from audioflamingo.errors import ArgumentError, AudioFlamingoError, MissingDependencyError
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.processor.tokenizer import Tokenizer
from tests.support.cli_runs import af3, write_tiny_model
from tests.support.generation_models import END, stopping_model
from tests.support.tiny_tokenizer import write_tiny_processor

BIRD = {
    "type": "object",
    "properties": {
        "bird": {"enum": ["owl", "wren"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        "songs": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["bird", "count", "songs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return stopping_model()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tokenizer(processor: AudioFlamingo3Processor) -> Tokenizer:
    return processor.tokenizer


def answer(
    model: Any, tokenizer: Tokenizer, constraint: Any, question: str = "What is it", **options: Any
) -> list[str]:
    """The texts of the answers to one question."""
    ids = torch.tensor([tokenizer.encode_prompt(question)])
    output = model.generate(
        ids,
        constraint=constraint,
        tokenizer=tokenizer,
        max_new_tokens=200,
        return_dict_in_generate=True,
        **options,
    )
    assert set(output.finish_reasons) == {"stop"}
    return [str(t) for t in tokenizer.decode(output.sequences[:, ids.shape[1] :], skip_special_tokens=True)]


def is_bird(text: str) -> bool:
    """Whether a text is JSON that meets BIRD, by a check of its own."""
    value = json.loads(text)
    return (
        list(value) == ["bird", "count", "songs"]
        and value["bird"] in ("owl", "wren")
        and value["count"] in range(1, 10)
        and len(value["songs"]) in (1, 2)
        and all(type(song) is bool for song in value["songs"])
    )


HOW = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "answers of a search": {"num_beams": 4, "num_return_sequences": 3},
    "drawn": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 4, "seed": 1},
    "drawn beams": {"do_sample": True, "num_beams": 3, "seed": 2},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 1.0},
}


class TestEveryKind:
    @pytest.mark.parametrize("how", HOW.values(), ids=HOW)
    def test_a_schema(self, model: Any, tokenizer: Tokenizer, how: dict[str, Any]) -> None:
        texts = answer(model, tokenizer, {"json_schema": BIRD}, **how)
        assert all(map(is_bird, texts)), texts

    @pytest.mark.parametrize("how", HOW.values(), ids=HOW)
    def test_a_regular_expression(self, model: Any, tokenizer: Tokenizer, how: dict[str, Any]) -> None:
        texts = answer(model, tokenizer, {"regex": r"[A-F]{2}-\d{1,3}( ja| nein)?"}, **how)
        assert all(re.fullmatch(r"[A-F]{2}-\d{1,3}( ja| nein)?", text) for text in texts), texts

    @pytest.mark.parametrize("choice", ['a "quoted" one', "two\nlines", "\\back/slash", "漢字 é 😀", "end"])
    def test_choices_to_the_letter(self, model: Any, tokenizer: Tokenizer, choice: str) -> None:
        assert answer(model, tokenizer, {"choices": [choice]}) == [choice]
        assert answer(model, tokenizer, {"choices": ["sound", choice]})[0] in ("sound", choice)

    def test_a_choice_that_another_begins_with(self, model: Any, tokenizer: Tokenizer) -> None:
        """The search finds both, some of them spelt in several ways: the shorter one may end or go on."""
        options = {"num_beams": 12, "num_return_sequences": 5}
        assert set(answer(model, tokenizer, {"choices": ["the", "the end"]}, **options)) == {"the", "the end"}

    def test_the_search_takes_the_likelier_choice(self, model: Any, tokenizer: Tokenizer) -> None:
        """Against the model's own log-probabilities of each, teacher-forced and with the end token."""
        choices = ["hello", "world", "the capital", "sound of France"]
        prompt = tokenizer.encode_prompt("What is it")
        scores = {}
        for choice in choices:
            ids = [*prompt, *tokenizer.encode_plain(choice), END]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            new = range(len(prompt), len(ids))
            scores[choice] = float(sum(logits[i - 1, ids[i]] for i in new)) / len(new)
        output = model.generate(
            torch.tensor([prompt]),
            constraint={"choices": choices},
            tokenizer=tokenizer,
            num_beams=16,
            return_dict_in_generate=True,
        )
        assert tokenizer.decode(output.sequences[0, len(prompt) :], skip_special_tokens=True) in choices
        assert float(output.sequences_scores[0]) >= max(scores.values()) - 1e-4

    def test_any_json_object(self, tokenizer: Tokenizer) -> None:
        grammar = compile_constraint({"json_object": True}, tokenizer, (END,))
        good = tokenizer.encode_plain('{"a": [1, {"b": null}], "c": "the \\" sound"}')
        for token in good:
            assert grammar.allowed()[token]
            grammar.accept(token)
        assert grammar.allowed()[END]
        fresh = compile_constraint({"json_object": True}, tokenizer, (END,))
        assert not fresh.allowed()[tokenizer.encode_plain("[")[0]]
        assert not fresh.allowed()[END]

    def test_a_pydantic_model(self, model: Any, tokenizer: Tokenizer) -> None:
        from pydantic import BaseModel, Field

        class Inner(BaseModel, extra="forbid"):
            is_loud: bool

        class Sound(BaseModel, extra="forbid"):
            parts: tuple[Inner, Inner]
            level: int | None = Field(ge=0, le=9)

        Sound.model_validate_json(answer(model, tokenizer, {"json_schema": Sound}, do_sample=True, seed=3)[0])


def test_rows_of_a_batch_and_streams_are_as_alone(model: Any, tokenizer: Tokenizer) -> None:
    questions = ["What is it", "the capital of France"]
    rows = [tokenizer.encode_prompt(question) for question in questions]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"constraint": {"json_schema": BIRD}, "tokenizer": tokenizer, "max_new_tokens": 200}
    whole = model.generate(ids, attention_mask=mask, **options)
    together = tokenizer.decode(whole[:, width:], skip_special_tokens=True)
    alone = [answer(model, tokenizer, {"json_schema": BIRD}, question)[0] for question in questions]
    assert together == alone
    steps = list(model.stream(ids, attention_mask=mask, **options))
    assert torch.stack([step.token_ids for step in steps], 1).tolist() == whole[:, width:].tolist()


def test_logprobs_and_logits_are_the_models_own(model: Any, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode_prompt("What is it")])
    output = model.generate(
        ids,
        constraint={"choices": ["world"]},
        tokenizer=tokenizer,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        output_logprobs=True,
    )
    token = int(output.sequences[0, ids.shape[1]])
    assert torch.isfinite(output.logits[0]).all()
    assert torch.isinf(output.scores[0]).sum() > output.scores[0].shape[1] - 10
    expected = output.logits[0][0].log_softmax(-1)[token]
    assert float(output.logprobs[0, 0]) == pytest.approx(float(expected), abs=1e-5)


def test_an_answer_that_is_cut_says_so(model: Any, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode_prompt("What is it")])
    output = model.generate(
        ids,
        constraint={"json_schema": BIRD},
        tokenizer=tokenizer,
        max_new_tokens=5,
        return_dict_in_generate=True,
    )
    assert output.finish_reasons == ["length"]


SELF = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
TREE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"left": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
            "required": ["left"],
            "additionalProperties": False,
        }
    },
}
WRONG: dict[str, tuple[Any, str]] = {
    "no dict": ("json", "one of the keys"),
    "two keys": ({"regex": "a", "choices": ["a"]}, "one of the keys"),
    "unknown": ({"grammar": "x"}, "one of the keys"),
    "lengths": ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "minLength"),
    "numbers": ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 4}}, "minimum"),
    "nothing": ({"json_schema": {"enum": []}}, "anyOf is empty"),
    "types": ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "incompatible"),
    "false": ({"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "'a'"),
    "keyword": ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "type": ({"json_schema": {"type": "text"}}, "Invalid type"),
    "reference": ({"json_schema": {"$ref": "#/$defs/Bird"}}, "/\\$defs/Bird"),
    "itself": ({"json_schema": SELF}, "requires itself"),
    "itself in a list": (
        {"json_schema": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}},
        "requires itself",
    ),
    "itself in all branches": ({"json_schema": {"anyOf": [SELF, {"$ref": "#"}]}}, "requires itself"),
    "no schema": ({"json_schema": ["a"]}, "a dict"),
    "no text": ({"choices": ["a", ""]}, "none of them empty"),
    "one text": ({"choices": "a"}, "a list of texts"),
    "no choice": ({"choices": []}, "a list of texts"),
    "no regex": ({"regex": "("}, "unclosed group"),
    "look-ahead": ({"regex": "a(?=b)"}, "look-around"),
    "empty regex": ({"regex": ""}, "a regular expression"),
    "matches nothing": ({"regex": "[^\\x00-\\U0010ffff]"}, "constraint 'regex'"),
    "matches the empty text only": ({"regex": "(?:)"}, "nothing but an empty answer"),
    "json_object false": ({"json_object": False}, "must be True"),
}


class TestWhatIsRefusedBeforeTheModelRuns:
    @pytest.mark.parametrize(("constraint", "message"), WRONG.values(), ids=WRONG)
    def test_it_cannot_be_met(
        self, model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, constraint: Any, message: str
    ) -> None:
        monkeypatch.setattr(model, "packed_logits", None)
        with pytest.raises(ArgumentError, match=message) as caught:
            answer(model, tokenizer, constraint)
        assert "\n" not in str(caught.value)

    def test_without_a_tokenizer_or_an_end(self, model: Any, tokenizer: Tokenizer) -> None:
        ids = torch.tensor([[1, 2]])
        with pytest.raises(ArgumentError, match="tokenizer="):
            model.generate(ids, constraint={"choices": ["a"]})
        with pytest.raises(ArgumentError, match="eos_token_id"):
            model.generate(ids, constraint={"choices": ["a"]}, tokenizer=tokenizer, eos_token_id=[])

    def test_without_the_package(
        self, model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(MissingDependencyError, match="audioflamingo\\[structured\\]"):
            answer(model, tokenizer, {"choices": ["a"]})


def test_a_schema_that_may_hold_itself(model: Any, tokenizer: Tokenizer) -> None:
    value = json.loads(answer(model, tokenizer, {"json_schema": TREE}, do_sample=True, seed=1)[0])
    while value is not None:
        assert list(value) == ["left"]
        value = value["left"]


def test_rules_that_leave_nothing_to_say(model: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(AudioFlamingoError, match="constraint"):
        answer(model, tokenizer, {"choices": ["the"]}, min_new_tokens=20)


def test_logits_behind_the_last_token_are_never_said(model: Any, tokenizer: Tokenizer) -> None:
    """The vocabulary has 501 tokens, the model 512 rows of logits, as published checkpoints have more."""
    text = answer(model, tokenizer, {"regex": "[^c]{4}"}, do_sample=True, temperature=100.0, top_k=0, seed=4)[
        0
    ]
    assert len(text) == 4


def test_forks_go_their_own_ways(tokenizer: Tokenizer) -> None:
    first = compile_constraint({"choices": ["ab", "cd"]}, tokenizer, (END,))
    second = first.fork()
    a, c = tokenizer.encode_plain("a")[0], tokenizer.encode_plain("c")[0]
    first.accept(a)
    assert second.allowed()[c]
    assert not first.allowed()[c]
    first.accept(tokenizer.encode_plain("b")[0])
    assert np.flatnonzero(first.allowed()).tolist() == [END]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


class TestCommand:
    def test_schema(self, folder: Path, speech: Path, tmp_path: Path) -> None:
        schema = tmp_path / "bird.json"
        schema.write_text("\ufeff" + json.dumps(BIRD))
        result = af3(
            "ask", speech, "What is it", "--schema", schema, "--model", folder, "--max-new-tokens", 200
        )
        assert result.exit_code == 0, result.output
        assert is_bird(result.stdout)

    def test_an_answer_that_is_cut_fails(self, folder: Path, speech: Path, tmp_path: Path) -> None:
        schema = tmp_path / "bird.json"
        schema.write_text(json.dumps(BIRD))
        result = af3(
            "ask", speech, "What is it", "--schema", schema, "--model", folder, "--max-new-tokens", 4
        )
        assert result.exit_code == 1
        assert "raise --max-new-tokens" in result.stderr

    @pytest.mark.parametrize("content", ["{", None, '{"enum": []}'])
    def test_a_file_that_is_no_schema(
        self, folder: Path, speech: Path, tmp_path: Path, content: str | None
    ) -> None:
        schema = tmp_path / "bird.json"
        if content is not None:
            schema.write_text(content)
        result = af3("ask", speech, "What is it", "--schema", schema, "--model", folder)
        assert result.exit_code in (1, 2)
        assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.server_runs import wav

    path = tmp_path_factory.mktemp("audio") / "tone.wav"
    path.write_bytes(wav())
    return path
