"""One engine in a process of its own, told over standard input what to do; see `inference.py`.

Each line is a JSON object `{"task": name}`; the answer is a line with the seconds it took and the peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch

AUDIO_TOKENS_30_S = 750
PROMPT_TOKENS = 11  # around the audio: 761 in all
NEW_TOKENS = 12
FOLLOW_UP_TOKENS = 20
BATCH = 8


def audio_inputs(seconds: int, audio_token_id: int) -> dict[str, torch.Tensor]:
    """A prompt with one clip of noise."""
    num_frames = 100 * seconds
    ids = [1] * 6 + [audio_token_id] * (25 * seconds) + [2] * (PROMPT_TOKENS - 6)
    return {
        "input_ids": torch.tensor([ids]),
        "input_features": torch.randn(1, 128, 3000, generator=torch.Generator().manual_seed(0)),
        "input_features_mask": (torch.arange(3000) < num_frames)[None].int(),
    }


class TorchEngine:
    """What the two torch libraries have in common."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.tasks = {
            "encode_5": lambda: self.encode(5),
            "encode_30": lambda: self.encode(30),
            "first_token": self.first_token,
            "first_token_5": lambda: self.first_token(5),
            "prefill": self.prefill,
            "decode": lambda: self.decode(1),
            "decode_batch": lambda: self.decode(BATCH),
            "second_question": self.first_token,
        }

    def inputs(self, seconds: int = 30) -> dict[str, torch.Tensor]:
        inputs = audio_inputs(seconds, self.model.config.audio_token_id)
        inputs["input_features"] = inputs["input_features"].to(torch.bfloat16)
        return inputs

    def run_encoder(self, features: torch.Tensor, mask: torch.Tensor) -> None:
        raise NotImplementedError

    def encode(self, seconds: int) -> float:
        inputs = self.inputs(seconds)
        start = time.perf_counter()
        self.run_encoder(inputs["input_features"], inputs["input_features_mask"])
        return time.perf_counter() - start

    def first_token(self, seconds: int = 30) -> float:
        inputs = self.inputs(seconds)
        start = time.perf_counter()
        self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return time.perf_counter() - start

    def prefill(self) -> float:
        ids = torch.randint(10, 1000, (1, AUDIO_TOKENS_30_S + PROMPT_TOKENS))
        start = time.perf_counter()
        self.model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
        return time.perf_counter() - start

    def decode(self, batch: int) -> float:
        """Seconds of a step with `batch` rows: many new tokens less one new token."""
        ids = torch.randint(10, 1000, (batch, 64))
        seconds = []
        for num_tokens in (1, 1 + NEW_TOKENS):
            start = time.perf_counter()
            self.model.generate(
                input_ids=ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
            )
            seconds.append(time.perf_counter() - start)
        return (seconds[1] - seconds[0]) / NEW_TOKENS


class TransformersEngine(TorchEngine):
    """transformers in bfloat16; a second question goes through everything again, as its pipeline does."""

    def __init__(self, folder: str) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        super().__init__(
            transformers.AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        )

    def run_encoder(self, features: torch.Tensor, mask: torch.Tensor) -> None:
        self.model.get_audio_features(features, mask)


class OurEngine(TorchEngine):
    """This package: the dtype or scheme is the folder's."""

    def __init__(self, folder: str) -> None:
        from audioflamingo import AudioFlamingo3ForConditionalGeneration

        super().__init__(AudioFlamingo3ForConditionalGeneration.from_pretrained(folder))
        self.tasks["second_question"] = self.second_question

    def run_encoder(self, features: torch.Tensor, mask: torch.Tensor) -> None:
        self.model.get_audio_features(features, mask)

    def second_question(self) -> float:
        """The first token of a question behind a clip that the cache holds, as `Chat` asks it."""
        inputs = self.inputs()
        cache = self.model.new_cache(1, 2048)
        self.model(**inputs, past_key_values=cache, logits_to_keep=1)
        question = torch.randint(10, 1000, (1, FOLLOW_UP_TOKENS))
        start = time.perf_counter()
        self.model(question, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - start


class LlamaCppEngine:
    """llama.cpp with the same language model's shape."""

    def __init__(self, file: str) -> None:
        import llama_cpp

        threads = torch.get_num_threads()  # as many as the other engines
        self.llama = llama_cpp.Llama(
            file,
            n_ctx=1024,
            n_batch=1024,
            n_ubatch=1024,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.tasks = {"prefill": self.prefill, "decode": self.decode}

    def prefill(self) -> float:
        self.llama.reset()
        ids = torch.randint(10, 1000, (AUDIO_TOKENS_30_S + PROMPT_TOKENS,)).tolist()
        start = time.perf_counter()
        self.llama.eval(ids)
        return time.perf_counter() - start

    def decode(self) -> float:
        self.llama.reset()
        self.llama.eval(list(range(10, 74)))
        start = time.perf_counter()
        for token in range(100, 100 + NEW_TOKENS):
            self.llama.eval([token])
        return (time.perf_counter() - start) / NEW_TOKENS


ENGINES: dict[str, Any] = {
    "transformers": TransformersEngine,
    "audioflamingo": OurEngine,
    "llama.cpp": LlamaCppEngine,
}


def main() -> None:
    kind, path = sys.argv[1:3]
    torch.manual_seed(0)
    start = time.perf_counter()
    engine = ENGINES[kind](path)
    print(json.dumps({"load_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        with torch.inference_mode():
            seconds = engine.tasks[json.loads(line)["task"]]()
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "peak_gb": peak_gb}), flush=True)


if __name__ == "__main__":
    main()
