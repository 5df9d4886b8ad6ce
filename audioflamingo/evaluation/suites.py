"""The benchmarks that are known by name: what their columns mean, what is asked, and by which rule they score.

`--prompts nvidia` asks as NVIDIA's published runs do (their `static/` examples and scripts): wording alone is worth
nine points on MMAR. `--prompts official` asks as the benchmark does, where it says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from audioflamingo.evaluation.columns import (
    Fields,
    read_choices,
    read_clotho,
    read_mmsu,
    read_muchomusic,
    read_speech,
)
from audioflamingo.evaluation.published import Record
from audioflamingo.evaluation.rules import chosen_letter, contained_option, matches_tokens, same_word

Options = Mapping[str, str]
Kind = Literal["choice", "word", "speech"]


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        kind: choice among options, an answer of a word, or a transcript.
        source: where data and rules are published.
        columns: its rows have one of each of these.
        foreign: columns that only another benchmark's rows have.
        read: makes sense of a row; None for one that the benchmark leaves out.
        official_prompt: the question as the benchmark asks it, of question and options; None where it does not say.
        rule: whether the benchmark takes an answer, of answer, right option's text and options; None where its rule
            needs another model, or where there is only the word error rate.
        prefers: names of its table, where a folder holds several.
        answer_columns: where its submission or its own script looks for the answer; if anybody does.
    """

    kind: Kind
    source: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Record], Fields | None]
    official_prompt: Callable[[str, Options], str] | None = None
    rule: Callable[[str, str, Options], bool] | None = None
    foreign: tuple[str, ...] = ()
    prefers: tuple[str, ...] = ()
    answer_columns: tuple[str, ...] = ()


def nvidia_choice_prompt(question: str, options: Options) -> str:
    """A question with options as in NVIDIA's `static/mmar.json`."""
    listed = "\n".join(f"({letter}) {text}" for letter, text in options.items())
    return f"{question} Choose the correct option from the following options:\n{listed}"


def _lettered(options: Options) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def _mmau_prompt(question: str, options: Options) -> str:
    return (
        f"{question}\n{_lettered(options)}\nAnswer with the option's letter from the given choices directly."
    )


def _mmar_prompt(question: str, options: Options) -> str:
    return f"{question}\nSelect one option from the provided choices:\n" + "\n".join(options.values())


def _mmsu_prompt(question: str, options: Options) -> str:
    task = (
        "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, **you "
        "should only choose A or B or C or D.** Do not provide any additional explanations or content."
    )
    return f"{task}\n\nQuestion: {question}\n\n{_lettered(options)}"


def _muchomusic_prompt(question: str, options: Options) -> str:
    listed = "".join(f"({letter}) {text} " for letter, text in options.items())
    return f"Question: {question}\n Options: {listed}\n The correct answer is: "


def _clotho_prompt(question: str, options: Options) -> str:
    return f"{question}\nAnswer the question using a single word only. "


def _speech_prompt(question: str, options: Options) -> str:
    return "Please recognize the speech and only output the recognized content:"


def _mmsu_rule(answer: str, reference: str, options: Options) -> bool:
    letter = chosen_letter(answer)
    return letter in options and options[letter or ""] == reference


def _muchomusic_rule(answer: str, reference: str, options: Options) -> bool:
    letter = contained_option(answer, options)
    return letter in options and options[letter or ""] == reference


def _clotho_rule(answer: str, reference: str, options: Options) -> bool:
    return same_word(answer, reference.split(" | "))


SUITES: dict[str, Suite] = {
    "mmau": Suite(
        "choice",
        "github.com/Sakshi113/MMAU, v05.15.25; it publishes no prompt: `official` is that of lmms-eval's task",
        (("question", "instruction"), ("choices",), ("task",), ("audio_id", "audio", "context")),
        read_choices,
        _mmau_prompt,
        matches_tokens,
        prefers=("mmau-test-mini.json", "mmau-test.json"),
        answer_columns=("model_prediction", "model_output"),
    ),
    "mmau-pro": Suite(
        "choice",
        "huggingface.co/datasets/gamma-lab-umd/MMAU-Pro; its own score of choices is by the nearest embedding of a "
        "model of 7 B, its open questions are judged by a language model and its instructions by a script, none of "
        "which is here",
        (("question",), ("choices",), ("category",), ("audio_path",)),
        read_choices,
        foreign=("modality", "difficulty", "choice_a"),
        prefers=("test.parquet",),
        answer_columns=("model_output",),
    ),
    "mmar": Suite(
        "choice",
        "github.com/ddlBoJack/MMAR",
        (("question",), ("choices",), ("modality",), ("audio_path", "audio")),
        read_choices,
        _mmar_prompt,
        matches_tokens,
        prefers=("MMAR-meta.jsonl", "MMAR-meta.json"),
        answer_columns=("answer_prediction",),
    ),
    "mmsu": Suite(
        "choice",
        "github.com/dingdongwang/MMSU_Bench",
        (("question",), ("choice_a",), ("choice_b",), ("answer_gt",), ("audio_path", "audio")),
        read_mmsu,
        _mmsu_prompt,
        _mmsu_rule,
        answer_columns=("response",),
    ),
    "muchomusic": Suite(
        "choice",
        "github.com/mulab-mir/muchomusic; the order of its options is drawn by each run, here from the question's text",
        (("distractor_1_answer", "answer_orders", "choices"), ("dataset", "instruction")),
        read_muchomusic,
        _muchomusic_prompt,
        _muchomusic_rule,
        prefers=("muchomusic.csv",),
        answer_columns=("model_output",),
    ),
    "clotho-aqa": Suite(
        "word",
        "zenodo.org/records/6473207; three answers to each question: those with most votes are right",
        (("QuestionText", "question"), ("answer",), ("file_name", "audio")),
        read_clotho,
        _clotho_prompt,
        _clotho_rule,
        foreign=("choices", "choice_a"),
        prefers=("clotho_aqa_test.csv",),
    ),
    "librispeech": Suite(
        "speech",
        "openslr.org/12; `official` is the prompt of lmms-eval's task",
        (("text",), ("audio", "file"), ("id",)),
        read_speech,
        _speech_prompt,
        foreign=("dataset",),
    ),
    "open-asr": Suite(
        "speech",
        "huggingface.co/spaces/hf-audio/open_asr_leaderboard; `official` is the prompt of lmms-eval's task",
        (("text",), ("audio",), ("dataset",)),
        read_speech,
        _speech_prompt,
    ),
}


def suites_with(values: Mapping[str, Any]) -> list[str]:
    """The benchmarks whose columns a row has."""
    return [name for name, suite in SUITES.items() if not missing_columns(suite, values)]


def missing_columns(suite: Suite, values: Mapping[str, Any]) -> list[str]:
    """What a row lacks to be one of the benchmark's, or has that it should not."""
    missing = [" or ".join(names) for names in suite.columns if not any(name in values for name in names)]
    return [f"no column {name}" for name in missing] + [f"a column {n}" for n in suite.foreign if n in values]
