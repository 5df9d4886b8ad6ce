"""A conversation about audio that keeps what the model has already read.

Each turn the whole conversation is rendered, and only what lies beyond the tokens in the cache goes through
the model: the audio of earlier turns is encoded once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.errors import PromptError
from audioflamingo.processor.tokenizer import StreamDecoder

INITIAL_CACHE = 2048  # slots; they double when they run out


class Chat:
    """One conversation.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration`.
        processor: its processor.
        system: system message; None leaves it to the chat template.
        on_long: what to do with clips of more than 10 minutes, `"truncate"` or `"error"`.
        clip_cache: encoded audio to look up and add to, to be shared by conversations with the same model; by default
            one of its own.

    Attributes:
        messages: the conversation so far, as `apply_chat_template` takes it.
        num_reused: tokens of the last prompt that were in the cache already.
        finish_reason: why the last answer ended: "stop", "length", or None if it was broken off.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        system: str | None = None,
        on_long: str = "truncate",
        clip_cache: ClipCache | None = None,
    ) -> None:
        self._model = model
        self._processor = processor
        self._on_long = on_long
        self._clip_cache = ClipCache(model) if clip_cache is None else clip_cache
        self._cache: Any = None
        self._cached_ids: list[int] = []
        self._num_cached_windows = 0
        self._pending: list[dict[str, Any]] = []
        self._waveforms: list[Any] = []
        self.messages: list[dict[str, Any]] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.num_reused = 0
        self.finish_reason: str | None = None

    @property
    def num_clips(self) -> int:
        """Clips in the conversation, those for the next question included."""
        return len(self._waveforms)

    def add_audio(self, source: Any) -> float:
        """Adds a clip to the next question, and returns its length in seconds.

        Raises:
            AudioError: it cannot be read, or is too short.
        """
        from audioflamingo.audio.loading import SAMPLING_RATE, check_waveform, load_audio

        waveform = load_audio(source)
        check_waveform(waveform, source if isinstance(source, str) else "audio")
        self._waveforms.append(waveform)
        self._pending.append({"type": "audio", "audio": waveform})
        return len(waveform) / SAMPLING_RATE

    def ask(self, question: str, **options: Any) -> Iterator[str]:
        """Asks, and yields the answer piece by piece; the pieces joined are the answer.

        An answer that is broken off (by closing the iterator) stays in the conversation as far as it went. A
        question that fails leaves the conversation as it was.

        Args:
            question: the text of the turn. The clips added since the last one stand before it.
            **options: keywords of `model.stream`.

        Raises:
            AudioFlamingoError: as `model.stream` and `processor.apply_chat_template`.
        """
        content: Any = [*self._pending, {"type": "text", "text": question}] if self._pending else question
        messages = [*self.messages, {"role": "user", "content": content}]
        steps, prompt_ids = self._start(messages, options)
        pending, self._pending = self._pending, []
        answer_ids: list[int] = []
        text = ""
        decoder = StreamDecoder(self._processor.tokenizer)
        self.finish_reason = None
        is_kept = True
        try:
            with contextlib.closing(steps):
                for step in steps:
                    token_ids = step.token_ids.tolist()
                    answer_ids += token_ids
                    self.finish_reason = step.finish_reasons[0]
                    if piece := decoder.put(token_ids):
                        text += piece
                        yield piece
            if piece := decoder.end():
                text += piece
                yield piece
        except GeneratorExit:
            raise
        except BaseException as error:
            is_kept = isinstance(error, KeyboardInterrupt)
            raise
        finally:
            if is_kept:
                self._cached_ids = [*prompt_ids, *answer_ids][: self._cache.lengths[0]]
                self.messages = [*messages, {"role": "assistant", "content": text}]
            else:
                self._forget()
                self._pending = pending

    def _start(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> tuple[Any, list[int]]:
        """Prepares the prompt, finds what of it the cache holds, and starts the generation of the rest."""
        inputs = self._processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, on_long=self._on_long
        )
        prompt_ids: list[int] = inputs.input_ids[0].tolist()
        num_windows = len(inputs.input_features) if "input_features" in inputs else 0
        kept = self._common_prefix(prompt_ids)
        if self._cache is None or not kept:
            self._forget()
            kept = 0
            self._cache = self._model.new_cache(1, initial_length=INITIAL_CACHE)
        self._cache.crop([kept])
        self.num_reused = kept
        new: dict[str, Any] = {
            "input_ids": inputs.input_ids[:, kept:],
            "attention_mask": inputs.attention_mask[:, kept:],
        }
        windows = slice(self._num_cached_windows, num_windows)
        self._num_cached_windows = num_windows
        try:
            if windows.start < num_windows:
                new["audio_embeds"] = self._clip_cache.embed(
                    inputs.input_features[windows], inputs.input_features_mask[windows]
                )
            return self._model.stream(**new, **options, past_key_values=self._cache), prompt_ids
        except Exception:
            self._forget()
            raise

    def _common_prefix(self, prompt_ids: list[int]) -> int:
        """Tokens of the prompt that the cache holds: less than all; with all earlier audio, or none."""
        limit = min(len(prompt_ids) - 1, len(self._cached_ids))
        pairs = zip(prompt_ids[:limit], self._cached_ids[:limit], strict=True)
        kept = next((i for i, (new, old) in enumerate(pairs) if new != old), limit)
        is_audio_kept = self._processor.audio_token_id not in self._cached_ids[kept:]
        return kept if is_audio_kept else 0

    def _forget(self) -> None:
        self._cache, self._cached_ids, self._num_cached_windows = None, [], 0

    def transcript(self) -> list[dict[str, Any]]:
        """The conversation for a file: audio is named by its number and length."""
        from audioflamingo.audio.loading import SAMPLING_RATE

        def plain(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] != "audio":
                return part
            index = next(i for i, waveform in enumerate(self._waveforms) if waveform is part["audio"])
            return {
                "type": "audio",
                "clip": index + 1,
                "duration_s": round(len(part["audio"]) / SAMPLING_RATE, 3),
            }

        return [
            message
            if isinstance(message["content"], str)
            else {**message, "content": list(map(plain, message["content"]))}
            for message in self.messages
        ]

    def drop_pending(self) -> None:
        """Takes back the clips that no question was asked about yet.

        Raises:
            PromptError: there are none.
        """
        if not self._pending:
            raise PromptError("no clip is waiting for a question.")
        del self._waveforms[len(self._waveforms) - len(self._pending) :]
        self._pending = []
