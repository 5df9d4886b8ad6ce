"""The model interface of lmms-eval, for its tasks with audio.

Copy it into `lmms_eval/models/simple/` under this name, and name it in `AVAILABLE_SIMPLE_MODELS` of
`lmms_eval/models/__init__.py`: `"lmms_eval_model": "AudioFlamingo"`. Then

    python -m lmms_eval --model lmms_eval_model --model_args pretrained=nvidia/audio-flamingo-3-hf --tasks mmau

It is asked one or more questions at a time, or how likely answers are; many rounds are not there. What it answers to
`Transcribe ...` comes without the sentence around it, which that harness would count as errors.
"""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor

MAX_NEW_TOKENS = 256


@register_model("lmms_eval_model")
class AudioFlamingo(lmms):  # type: ignore[misc]
    """Audio Flamingo 3 as lmms-eval asks it.

    Args:
        pretrained: a hub id, a folder, or "nano".
        device: "auto", "cpu", "cuda:1", ...
        batch_size: questions that run together.
    """

    def __init__(
        self, pretrained: str = "nano", device: str = "auto", batch_size: int | str = 1, **_: Any
    ) -> None:
        super().__init__()
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.model = AudioFlamingo3ForConditionalGeneration.from_pretrained(pretrained, device_map=device)
        self.batch_size_per_gpu = int(batch_size)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each answer, and whether the model would give it."""
        results = []
        for context, doc_to_target, doc_to_visual, doc_id, task, split in (r.args for r in requests):
            doc = self.task_dict[task][split][doc_id]
            answer = doc_to_target(doc) if callable(doc_to_target) else doc_to_target
            messages = conversation(context, doc_to_visual(doc))
            (score,) = self.model.score(self.processor, messages, [answer])
            results.append((score.logprob, score.is_greedy))
        return results

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each question, in their order."""
        answers = [""] * len(requests)

        def options_of(number: int) -> str:
            return json.dumps(requests[number].args[1], sort_keys=True)

        for options, group in groupby(sorted(range(len(requests)), key=options_of), key=options_of):
            members = list(group)
            for start in range(0, len(members), self.batch_size_per_gpu):
                numbers = members[start : start + self.batch_size_per_gpu]
                texts = self._answer([requests[number] for number in numbers], json.loads(options))
                for number, text in zip(numbers, texts, strict=True):
                    answers[number] = text
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there."""
        raise NotImplementedError("Audio Flamingo 3 is asked one question at a time here.")

    def _answer(self, requests: list[Instance], options: dict[str, Any]) -> list[str]:
        conversations = []
        for context, _, doc_to_visual, doc_id, task, split in (request.args for request in requests):
            conversations.append(conversation(context, doc_to_visual(self.task_dict[task][split][doc_id])))
        inputs = self.processor.apply_chat_template(
            conversations, tokenize=True, add_generation_prompt=True, return_dict=True
        ).to(self.model.device, dtype=self.model.dtype)
        is_sampled = bool(options.get("do_sample")) and options.get("temperature", 0) > 0
        sampling = (
            {"do_sample": True, "temperature": options["temperature"]} if is_sampled else {"do_sample": False}
        )
        outputs = self.model.generate(
            **inputs, max_new_tokens=options.get("max_new_tokens", MAX_NEW_TOKENS), **sampling
        )
        new = outputs[:, inputs.input_ids.shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True, strip_prefix=True)
        until = options.get("until") or []
        return [cut(text, [until] if isinstance(until, str) else until) for text in texts]


def conversation(context: str, clips: Any) -> list[dict[str, Any]]:
    """A question about clips: each `{"array", "sampling_rate"}`, as the harness's tasks hand them over."""
    clips = clips if isinstance(clips, list) else [clips]
    parts = [{"type": "audio", "path": clip} for clip in clips if clip is not None]
    return [
        {
            "role": "user",
            "content": [*parts, {"type": "text", "text": context.replace("<audio>", "").strip()}],
        }
    ]


def cut(text: str, ends: list[str]) -> str:
    """A text up to the first of some marks."""
    for end in ends:
        text = text.split(end)[0] if end else text
    return text.strip()
