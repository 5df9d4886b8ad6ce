"""A conversation about audio that keeps what the model has already read.

Each turn the whole conversation is rendered; the engine's prefix cache finds what lies there already, so that only what
is new goes through the model, and the audio of earlier turns is encoded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Unpack

from audioflamingo.audio.loading import SAMPLING_RATE, check_waveform, load_audio
from audioflamingo.audio.reading import Reading
from audioflamingo.engine.answer_many import answer_many
from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.engine import Engine
from audioflamingo.engine.generate import evaluation_mode
from audioflamingo.engine.generate_call import prepare_one
from audioflamingo.engine.generate_options import GenerateOptions
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.request import Output, Request
from audioflamingo.errors import ArgumentError
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.processor.processor import AudioFlamingo3Processor
from audioflamingo.processor.stretches import Stretch, long_question

WINDOWS = "windows"
ON_LONG = ("truncate", "error", WINDOWS)  # what may be done with a clip that is too long


class Chat:
    """One conversation.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration`.
        processor: its processor.
        system: system message; None leaves it to the chat template.
        on_long: what to do with clips that are longer than the model takes: `"truncate"`, `"error"`, or `"windows"`,
            which asks each stretch of the clip and then, with the answers as text, once more (`processor.stretches`
            says what that can and cannot know).
        clip_cache: encoded audio to look up and add to, to be shared by conversations with the same model; by default
            one of its own.
        adapter: name of the adapter that answers, unless a question says otherwise; None for the model itself.
        on_stretch: called with each stretch of a long clip once it is answered.

    Attributes:
        messages: the conversation so far, as `apply_chat_template` takes it.
        num_reused: tokens of the last prompt that were in the cache already.
        finish_reason: why the last answer ended: "stop", "length", or None if it was broken off.
        stretches: parts of long clips, with their answers, from which the last answer was made; empty if the model
            heard all at once.

    Raises:
        ArgumentError: another value of `on_long`.
    """

    def __init__(
        self,
        model: AudioFlamingo3WithHead,
        processor: AudioFlamingo3Processor,
        system: str | None = None,
        on_long: str = "truncate",
        clip_cache: ClipCache | None = None,
        adapter: str | None = None,
        on_stretch: Callable[[Stretch], None] | None = None,
    ) -> None:
        if on_long not in ON_LONG:
            raise ArgumentError(f"on_long={on_long!r}: it must be one of {', '.join(map(repr, ON_LONG))}.")
        self._on_stretch = on_stretch
        self.stretches: list[Stretch] = []
        self._model = model
        self._adapter = adapter
        self._processor = processor
        self._on_long = on_long
        self._clip_cache = clip_cache or ClipCache()
        self._engine = self._new_engine()
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

    def add_audio(self, source: Any, reading: Reading | None = None) -> float:
        """Adds a clip to the next question, and returns its length in seconds.

        Args:
            source: what `load_audio` takes.
            reading: track, channel, and whether damage is allowed.

        Raises:
            AudioError: it cannot be read, or is too short.
        """
        waveform = load_audio(source, **dataclasses.asdict(reading or Reading()))
        check_waveform(waveform, source if isinstance(source, str) else "audio")
        self._waveforms.append(waveform)
        self._pending.append({"type": "audio", "audio": waveform})
        return len(waveform) / SAMPLING_RATE

    def ask(self, question: str, **options: Unpack[GenerateOptions]) -> Iterator[str]:
        """Asks, and yields the answer piece by piece; the pieces joined are the answer.

        An answer that is broken off (by closing the iterator) stays in the conversation as far as it went. A
        question that fails leaves the conversation as it was.

        Args:
            question: the text of the turn. The clips added since the last one stand before it.
            **options: keywords of `model.stream`. The answer of a beam search comes in one piece.

        Raises:
            AudioFlamingoError: as `model.stream` and `processor.prompt`.
        """
        content: Any = [*self._pending, {"type": "text", "text": question}] if self._pending else question
        messages = [*self.messages, {"role": "user", "content": content}]
        outputs: list[Output] = []
        request = self._request(self._heard(messages, options), options, outputs.append)
        pending, self._pending = self._pending, []
        text = ""
        self.finish_reason = None
        is_kept = True
        try:
            for output in self._answer(request, outputs):
                if output.error is not None:
                    raise output.error
                self.num_reused, self.finish_reason = output.num_reused, output.finish_reason
                if output.text:
                    text += output.text
                    yield output.text
        except GeneratorExit:
            raise
        except BaseException as error:
            is_kept = isinstance(error, KeyboardInterrupt)
            raise
        finally:
            if is_kept:
                request.cancel()
                self._engine.tidy()
                self.messages = [*messages, {"role": "assistant", "content": text}]
            else:
                self._engine = self._new_engine()
                self._pending = pending

    def _new_engine(self) -> Engine:
        """An engine that remembers what the conversation has read, and nothing yet."""
        options = EngineOptions.alone(max_rows=1, keeps_prefixes=True)
        return Engine(self._model, self._processor.tokenizer, options, self._clip_cache)

    def _heard(self, messages: list[dict[str, Any]], options: GenerateOptions) -> list[dict[str, Any]]:
        """The conversation as the model takes it: where a clip is too long, its stretches are asked here."""
        self.stretches = []
        longest_s = self._processor.max_clip_s
        question = long_question(messages, longest_s) if self._on_long == WINDOWS else None
        if question is None:
            return messages
        # One at a time, and nothing of it is kept: the keys and values of a stretch are large.
        requests = ((i, self._request(asked, options)) for i, asked in enumerate(question.conversations()))
        for index, output in answer_many(
            self._model, self._processor.tokenizer, requests, num_together=1, clip_cache=self._clip_cache
        ):
            self.stretches.append(question.stretch(index, output.text))
            if self._on_stretch is not None:
                self._on_stretch(self.stretches[-1])
        return question.final(self.stretches)

    def _request(
        self,
        messages: list[dict[str, Any]],
        options: GenerateOptions,
        on_output: Callable[[Output], None] | None = None,
    ) -> Request:
        """What the engine is asked for."""
        on_long = "error" if self._on_long == WINDOWS else self._on_long
        prompt = self._processor.prompt(messages, on_long=on_long)
        options = {"tokenizer": self._processor.tokenizer, "adapter": self._adapter, **options}
        return prepare_one(self._model, prompt, options, on_output)

    def _answer(self, request: Request, outputs: list[Output]) -> Iterator[Output]:
        """Runs the engine until the request is answered."""
        with evaluation_mode(self._model):
            self._engine.submit(request)
            while self._engine.has_work:
                self._engine.step()
                news, outputs[:] = list(outputs), []
                yield from news

    def transcript(self) -> list[dict[str, Any]]:
        """The conversation for a file: audio is named by its number and length."""

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
