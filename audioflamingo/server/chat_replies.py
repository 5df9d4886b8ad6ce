"""What chat requests are answered with: whole, or chunk by chunk."""

from __future__ import annotations

import secrets
import time
from typing import Any

from audioflamingo.engine.request import Output, TokenLogprob
from audioflamingo.processor.prompt import Prompt
from audioflamingo.processor.tokenizer import Tokenizer
from audioflamingo.server.schemas import ChatRequest


class ChatReply:
    """The reply to one request.

    Args:
        chat: the request.
        prompt: what its answers continue.
        model_name: what the model is called.
        tokenizer: turns ids into text, for log-probabilities.

    Attributes:
        num_choices: answers that are asked for.
        is_usage_wanted: whether a stream ends with the usage.
    """

    def __init__(self, chat: ChatRequest, prompt: Prompt, model_name: str, tokenizer: Tokenizer) -> None:
        self.num_choices = chat.n or 1
        self.is_usage_wanted = chat.stream_options is not None and chat.stream_options.include_usage
        self._has_logprobs = bool(chat.logprobs)
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model_name,
        }
        self._num_completion_tokens = 0
        self._num_reused: list[int | None] = [None] * self.num_choices

    def add(self, index: int, output: Output) -> None:
        """Counts an output of an answer."""
        self._num_completion_tokens += len(output.token_ids)
        self._num_reused[index] = output.num_reused

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of prompt and answers."""
        num_prompt = len(self._prompt.token_ids)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": num_prompt + self._num_completion_tokens,
            "prompt_tokens_details": {
                "audio_tokens": self._prompt.num_audio_tokens,
                "cached_tokens": min((n for n in self._num_reused if n is not None), default=0),
            },
        }

    def whole(self, outputs: list[Output]) -> dict[str, Any]:
        """The reply in one piece."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": output.text, "refusal": None},
                "logprobs": self._logprobs(output),
                "finish_reason": output.finish_reason,
            }
            for index, output in enumerate(outputs)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Opens an answer."""
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""})])

    def chunk(self, index: int, output: Output) -> dict[str, Any]:
        """What an answer has grown by."""
        delta = {"content": output.text} if output.text else {}
        choice = self._choice(index, delta, output.finish_reason)
        choice["logprobs"] = self._logprobs(output)
        return self._chunk([choice])

    def usage_chunk(self) -> dict[str, Any]:
        """Ends a stream."""
        return {**self._chunk([]), "usage": self.usage}

    def _choice(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.is_usage_wanted else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **usage}

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in output.logprobs
            if not self._is_end(entry)
        ]
        return {"content": content, "refusal": None}

    def _is_end(self, entry: TokenLogprob) -> bool:
        """Tokens that leave no text, such as the one that ends an answer, are not reported."""
        return not self._tokenizer.token_bytes(entry.token_id, skip_special_tokens=True)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        # -inf is no JSON number; OpenAI writes such a one as -9999.
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(data),
        }
