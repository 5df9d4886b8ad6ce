"""Asks a model questions: answers that it writes, many at a time, or the option that it finds most likely."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from audioflamingo.audio.loading import HOP_LENGTH, SAMPLING_RATE
from audioflamingo.engine.answer_many import answer_many
from audioflamingo.engine.generate_call import prepare_one
from audioflamingo.engine.request import Request
from audioflamingo.errors import ArgumentError, AudioFlamingoError
from audioflamingo.evaluation.evaluation_options import EvaluationOptions
from audioflamingo.evaluation.questions import Question
from audioflamingo.evaluation.scoring import ItemResult
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.processor.prompt import Prompt


def answer_questions(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    questions: Sequence[Question],
    settings: EvaluationOptions,
    **options: Any,
) -> Iterator[tuple[Question, ItemResult]]:
    """Answers and scores questions; those known to be long first.

    A question that cannot be asked (damaged audio, longer than the context) is an item with an error, and wrong. One
    that has no options and is not scored is answered in writing in any case.

    Args:
        model: what is asked.
        processor: of the model.
        questions: what is asked about.
        settings: how, and how many at a time.
        **options: further keywords of `generate`.

    Yields:
        A question and its item, as answers are complete.
    """
    ordered = sorted(questions, key=lambda question: -question.duration_s)
    if settings.by == "likelihood":
        with_options = [question for question in ordered if question.options]
        others = [question for question in ordered if not question.options]
        if without := next((q for q in others if q.score(q, "").scoring != "unscored"), None):
            raise ArgumentError(f"by='likelihood' needs questions with options; {without.key} has none.")
        answers: Iterator[tuple[Question, ItemResult]] = chain(
            _by_likelihood(model, processor, with_options, options.get("adapter")),
            _by_generation(model, processor, others, settings, options),
        )
    else:
        answers = _by_generation(model, processor, ordered, settings, options)
    before = time.perf_counter()
    for question, item in answers:
        now = time.perf_counter()
        yield question, replace(item, elapsed_s=round(now - before, 4))
        before = now


def _by_generation(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    questions: Sequence[Question],
    settings: EvaluationOptions,
    options: dict[str, Any],
) -> Iterator[tuple[Question, ItemResult]]:
    failed: deque[tuple[Question, ItemResult]] = deque()
    lengths: dict[int, float] = {}

    def requests() -> Iterator[tuple[Question, Request]]:
        for question in questions:
            try:
                prompt = processor.prompt(question.messages, on_long="truncate")
                given = {
                    "tokenizer": processor.tokenizer,
                    "max_new_tokens": settings.max_new_tokens,
                    **options,
                }
                request = prepare_one(model, prompt, given)
            except ArgumentError:
                raise
            except AudioFlamingoError as error:
                failed.append((question, failed_item(question, error)))
                continue
            lengths[id(question)] = audio_seconds(prompt)
            yield question, request

    for question, output in answer_many(model, processor.tokenizer, requests(), settings.batch_size):
        while failed:
            yield failed.popleft()
        yield question, replace(question.score(question, output.text), duration_s=lengths.pop(id(question)))
    yield from failed


def _by_likelihood(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    questions: Sequence[Question],
    adapter: str | None,
) -> Iterator[tuple[Question, ItemResult]]:
    """The option whose text is the most likely answer: a token on average, so that length does not count."""
    for question in questions:
        try:
            prompt = processor.prompt(question.messages, on_long="truncate")
            scores = model.score(processor, prompt, list(question.options.values()), adapter=adapter)
        except AudioFlamingoError as error:
            yield question, failed_item(question, error)
            continue
        best = max(scores, key=lambda option: option.logprob / option.num_tokens)
        item = question.score(question, best.text)
        logprobs = tuple(round(option.logprob, 6) for option in scores)
        yield (
            question,
            replace(item, parsed_by="likelihood", option_logprobs=logprobs, duration_s=audio_seconds(prompt)),
        )


def failed_item(question: Question, error: Exception) -> ItemResult:
    """The item of a question that could not be asked: no answer, wrong; of a transcript all words are missing."""
    item = question.score(question, "")
    return replace(item, found="", is_correct=False, error=" ".join(str(error).split()))


def audio_seconds(prompt: Prompt) -> float:
    """Audio that the model hears."""
    return round(sum(window.num_frames for window in prompt.windows) * HOP_LENGTH / SAMPLING_RATE, 3)
