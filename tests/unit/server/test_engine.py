"""The engine: answers equal those of `model.generate`, whoever else is being answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo.engine.engine import Engine
from audioflamingo.engine.generate_call import prepare_one
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.prefix_cache import MIN_REUSED
from audioflamingo.engine.request import Request, SamplingParams, Share
from audioflamingo.engine.sampling import LogitsRules
from audioflamingo.engine.worker import EngineWorker
from audioflamingo.errors import ContextLengthError, EngineStoppedError
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.processor.prompt import Prompt
from tests.support.audio_files import tone
from tests.support.engine_runs import greedy, seeded, submit

OPTIONS = EngineOptions(cache_tokens=6000, max_prefill_tokens=100)


@pytest.fixture
def engine(model: Any, processor: AudioFlamingo3Processor) -> Iterator[EngineWorker]:
    engine = EngineWorker(Engine(model, processor.tokenizer, OPTIONS))
    engine.start()
    yield engine
    engine.stop()


def test_the_thread_works_on_the_device_of_the_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's current device is the first one, where streams and events of another would say nothing."""
    chosen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread().name, device))
    )
    worker = EngineWorker(Engine(model, None, OPTIONS))
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 1))
    worker._thread.start()
    worker.stop()
    assert chosen == [("engine", torch.device("cuda", 1))]


def clip(duration_s: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(round(duration_s * 16000)) * 0.05
    return (tone(duration_s)[:, 0] + noise).astype(np.float32)


def user(text: str, *clips: np.ndarray) -> list[dict[str, Any]]:
    audio = [{"type": "audio", "audio": waveform} for waveform in clips]
    return [{"role": "user", "content": [*audio, {"type": "text", "text": text}]}]


def conversations() -> list[list[dict[str, Any]]]:
    return [
        user("hello world"),
        user("What is the sound", clip(0.7)),
        user("Transcribe the input speech.", clip(31.3, seed=1)),
        user("two of them", clip(1.1, seed=2), clip(2.3, seed=3)),
        # A window without audio tokens, where the next clip begins: such a clip was an error of the server.
        user("a tail of 5 ms", clip(30.005, seed=4), clip(0.7)),
        user("Why do you think so? " * 40),
        [*user("and", clip(0.7)), {"role": "assistant", "content": "the sound"}, *user("is it the end?")],
    ]


def alone(model: Any, processor: AudioFlamingo3Processor, messages: Any, **options: Any) -> list[int]:
    batch = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    output = model.generate(**batch, **options)
    return output[0, batch["input_ids"].shape[1] :].tolist()


def test_concurrent_greedy_answers_equal_generate(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    prompts = [processor.prompt(messages) for messages in conversations()]
    answers = [submit(engine, prompt, greedy(8 + 4 * i)) for i, prompt in enumerate(prompts)]
    for i, (messages, answer) in enumerate(zip(conversations(), answers, strict=True)):
        expected = alone(model, processor, messages, max_new_tokens=8 + 4 * i, do_sample=False)
        assert answer.token_ids == expected
        assert answer.text == processor.tokenizer.decode(expected, skip_special_tokens=True)


def test_concurrent_seeded_answers_equal_generate(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    rules = [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 40},
        {"repetition_penalty": 1.5},
    ]
    prompts = [processor.prompt(messages) for messages in conversations()]
    answers = [submit(engine, prompt, seeded(10, **rules[i % 3]), seed=i) for i, prompt in enumerate(prompts)]
    for i, (messages, answer) in enumerate(zip(conversations(), answers, strict=True)):
        options: Any = {"top_k": 0, **rules[i % 3]}
        expected = alone(model, processor, messages, max_new_tokens=10, do_sample=True, seed=i, **options)
        assert answer.token_ids == expected


def test_requests_join_and_leave_a_running_batch(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    long = submit(engine, processor.prompt(user("tool call")), greedy(60))
    while not long.outputs:
        time.sleep(0.001)
    others = [submit(engine, processor.prompt(user(f"the {i}")), greedy(5)) for i in range(6)]
    assert [len(other.token_ids) <= 5 for other in others] == [True] * 6
    expected = alone(model, processor, user("tool call"), max_new_tokens=60, do_sample=False)
    assert long.token_ids == expected


def test_the_same_clip_and_conversation_are_not_read_again(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    first = user("What is the sound", clip(3.0))
    answer = submit(engine, processor.prompt(first), greedy()).text
    assert (engine.engine.clip_cache.num_misses, engine.engine.scheduler.num_reused_tokens) == (1, 0)
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "Why"}]
    prompt = processor.prompt(second)
    again = submit(engine, prompt, greedy())
    assert again.token_ids == alone(model, processor, second, max_new_tokens=12, do_sample=False)
    assert again.result.num_reused >= 75
    assert engine.engine.clip_cache.num_misses == 1
    # Another question about the clip starts behind the clip.
    other = submit(engine, processor.prompt(user("is it the end", clip(3.0))), greedy())
    expected = alone(model, processor, user("is it the end", clip(3.0)), max_new_tokens=12, do_sample=False)
    assert other.token_ids == expected
    assert other.result.num_reused >= 75


def test_equal_prompts_at_the_same_time_are_read_once(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    prompt = processor.prompt(user("What is the sound", clip(5.0)))
    answers = [submit(engine, prompt, seeded(), seed=i) for i in range(4)]
    for i, answer in enumerate(answers):
        expected = alone(
            model,
            processor,
            user("What is the sound", clip(5.0)),
            max_new_tokens=12,
            do_sample=True,
            seed=i,
            top_k=0,
        )
        assert answer.token_ids == expected
    # Whoever comes while fewer than MIN_REUSED tokens are left to read does not wait for them.
    most = 3 * (len(prompt.token_ids) - 1)
    assert most - 3 * MIN_REUSED < engine.engine.scheduler.num_reused_tokens <= most


def test_a_full_pool_makes_requests_wait_and_forgets_the_oldest(
    model: Any, processor: AudioFlamingo3Processor
) -> None:
    engine = EngineWorker(Engine(model, processor.tokenizer, EngineOptions(cache_tokens=200)))
    engine.start()
    texts = [f"the {i} and {i} and {i}" for i in range(12)]
    answers = [submit(engine, processor.prompt(user(text)), greedy(30)) for text in texts]
    for text, answer in zip(texts, answers, strict=True):
        assert answer.token_ids == alone(model, processor, user(text), max_new_tokens=30, do_sample=False)
    assert engine.engine.scheduler.prefixes.num_slots + engine.engine.pool.num_free == 200
    engine.stop()


def test_a_prompt_that_can_never_fit_is_refused(
    processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    prompt = processor.prompt(user("the " * 7000))
    with pytest.raises(ContextLengthError, match="at most 5999 fit"):
        submit(engine, prompt, greedy())


def test_the_answer_is_cut_where_the_context_ends(model: Any, processor: AudioFlamingo3Processor) -> None:
    engine = EngineWorker(Engine(model, processor.tokenizer, EngineOptions(cache_tokens=64)))
    engine.start()
    prompt = processor.prompt(user("hello"))
    answer = submit(engine, prompt, SamplingParams(max_new_tokens=10_000))
    assert len(answer.token_ids) <= 64 - len(prompt.token_ids)
    engine.stop()


def test_a_cancelled_request_leaves_and_its_slots_come_back(
    processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    running = submit(engine, processor.prompt(user("tool call")), greedy(5000))
    while not running.outputs:
        time.sleep(0.001)
    running.request.cancel()
    deadline = time.monotonic() + 10
    while engine.engine.scheduler.groups and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.engine.scheduler.groups == []
    assert engine.engine.scheduler.prefixes.num_slots + engine.engine.pool.num_free == OPTIONS.cache_tokens
    count = len(running.outputs)
    submit(engine, processor.prompt(user("the end")), greedy()).result  # noqa: B018
    assert len(running.outputs) == count


def test_stop_fails_what_is_not_complete(model: Any, processor: AudioFlamingo3Processor) -> None:
    engine = EngineWorker(Engine(model, processor.tokenizer, OPTIONS))
    engine.start()
    running = submit(engine, processor.prompt(user("tool call")), greedy(5000))
    while not running.outputs:
        time.sleep(0.001)
    engine.stop()
    assert isinstance(running.result.error, EngineStoppedError)
    assert not engine.is_alive
    with pytest.raises(EngineStoppedError):
        submit(engine, processor.prompt(user("the end")), greedy())


def test_a_step_that_fails_ends_its_answers_and_no_others(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.language_model, "forward_packed", broken)
        failed = submit(engine, processor.prompt(user("hello")), greedy())
        assert "the device is gone" in str(failed.result.error)
    good = submit(engine, processor.prompt(user("hello")), greedy())
    assert good.token_ids == alone(model, processor, user("hello"), max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("failing", [1, 2, 3, 5], ids=lambda number: f"call {number}")
def test_a_step_that_failed_can_be_run_again(
    model: Any, processor: AudioFlamingo3Processor, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Nothing counts as computed before it is: neither a piece of a prompt, nor its audio, nor a token."""
    asked = [user("What is the sound", clip(5.3)), user("hello")]
    prompts = [processor.prompt(messages) for messages in asked]
    expected = [alone(model, processor, messages, max_new_tokens=12) for messages in asked]
    original, num_calls = model.packed_logits, 0

    def fail_once(*arguments: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == failing:
            raise torch.OutOfMemoryError("out of memory")
        return original(*arguments)

    monkeypatch.setattr(model, "packed_logits", fail_once)
    engine = Engine(model, processor.tokenizer, EngineOptions(cache_tokens=6000, max_prefill_tokens=64))
    groups = [engine.submit(prepare_one(model, prompt, {"max_new_tokens": 12})) for prompt in prompts]
    num_failed = 0
    while engine.has_work:
        try:
            engine.step()
        except torch.OutOfMemoryError:
            num_failed += 1
    assert num_failed == 1
    assert [group.sequences[0].new_ids for group in groups] == expected


def test_nan_logits_fail_the_answer(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.lm_head, "forward", lambda x: torch.full((len(x), 512), torch.nan))
    failed = submit(engine, processor.prompt(user("hello")), greedy())
    assert "not finite" in str(failed.result.error)


def test_stop_texts_end_an_answer_and_are_left_out(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    prompt = processor.prompt(user("tool call"))
    text = submit(engine, prompt, greedy(40)).text
    stop = text[7:10]
    answer = submit(engine, prompt, greedy(40, stop=(stop, "never said")))
    assert answer.text == text[: text.index(stop)]
    assert answer.result.finish_reason == "stop"


def test_log_probabilities_are_the_models_own(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    messages = user("What is the sound", clip(0.7))
    batch = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    expected = model.generate(
        **batch, max_new_tokens=8, do_sample=False, output_logprobs=True, return_dict_in_generate=True
    )
    answer = submit(engine, processor.prompt(messages), greedy(8, num_top_logprobs=3), is_streamed=False)
    found = answer.result.logprobs
    assert [logprob.logprob for logprob in found] == pytest.approx(expected.logprobs[0].tolist(), abs=1e-4)
    assert all(
        len(logprob.top) == 3 and logprob.top[0] == (logprob.token_id, logprob.logprob) for logprob in found
    )
    assert len(answer.outputs) == 1


def test_rows_with_a_least_length_share_a_batch_with_others(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    rules = LogitsRules(min_new_tokens=15, eos_token_ids=(10, 11, 12, 497))
    answers = [
        submit(
            engine,
            processor.prompt(user(f"the {i}")),
            greedy(20, rules=rules if i % 2 else LogitsRules()),
        )
        for i in range(6)
    ]
    for i, answer in enumerate(answers):
        options = {"min_new_tokens": 15} if i % 2 else {}
        expected = alone(model, processor, user(f"the {i}"), max_new_tokens=20, do_sample=False, **options)
        assert answer.token_ids == expected


def test_penalties_lower_what_was_said(
    model: Any, processor: AudioFlamingo3Processor, engine: EngineWorker
) -> None:
    prompt = processor.prompt(user("tool call"))
    plain = submit(engine, prompt, greedy(40)).token_ids
    rules = LogitsRules(frequency_penalty=100.0, presence_penalty=100.0)
    penalized = submit(engine, prompt, greedy(40, rules=rules)).token_ids
    assert len(set(plain)) < len(plain)
    assert len(set(penalized)) == len(penalized)


def test_whoever_had_least_goes_first(model: Any, processor: AudioFlamingo3Processor) -> None:
    engine = EngineWorker(Engine(model, processor.tokenizer, EngineOptions(cache_tokens=6000, max_rows=1)))
    rich, poor = Share(service_s=100.0), Share()
    order: list[str] = []
    lock = threading.Lock()

    def note(name: str) -> Any:
        def collect(output: Any) -> None:
            if output.is_last:
                with lock:
                    order.append(name)

        return collect

    prompt = Prompt([1, 2, 3])
    for name, share in (("rich", rich), ("poor 1", poor), ("poor 2", poor)):
        engine.submit(Request(prompt, greedy(3), note(name), share))
    engine.start()
    deadline = time.monotonic() + 20
    while len(order) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    engine.stop()
    assert order == ["poor 1", "poor 2", "rich"]


def test_so_many_client_requests_are_worked_for_at_once(
    model: Any, processor: AudioFlamingo3Processor
) -> None:
    engine = Engine(model, processor.tokenizer, EngineOptions(cache_tokens=6000, max_rows=4, max_requests=2))
    prompt, shares = Prompt([1, 2, 3]), [Share() for _ in range(4)]
    for share in (*shares, *shares):
        engine.submit(Request(prompt, greedy(5), share=share))
    counts = []
    while engine.has_work:
        engine.step()
        counts.append(len({group.request.share for group in engine.scheduler.active}))
    assert max(counts) == 2
    assert all(share.service_s > 0 for share in shares)
