"""Conversations and clips -> prompts, one by one: what the engine and training take, and what batches are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.config import AUDIO_TOKEN, DEFAULT_TRANSCRIPTION_PROMPT
from audioflamingo.errors import ArgumentError, CheckpointError, ConfigError, PromptError
from audioflamingo.processor.chat_template import (
    DEFAULT_CHAT_TEMPLATE,
    RenderedPrompt,
    choose_template,
    render_conversation,
)
from audioflamingo.processor.clips import Clip, check_window, encode_windows, load_windows
from audioflamingo.processor.conversation import (
    Conversation,
    Turn,
    clips_of,
    parse_conversations,
    with_newlines,
)
from audioflamingo.processor.processor_options import AudioOptions
from audioflamingo.processor.prompt import Prompt, PromptText
from audioflamingo.processor.tokenizer import Tokenizer


class PromptMaker:
    """The half of a processor that makes prompts.

    Args:
        feature_extractor: waveform windows to log-mel features.
        tokenizer: text to ids and back.
        chat_template: Jinja source, or a dict of named ones. None takes the tokenizer's, or else the
            published one.
        audio_token: the control token that stands for audio.
        default_transcription_prompt: what `apply_transcription_request` asks where no prompt is given.
        max_audio_len: longest clip in seconds; `on_long` says what happens to longer ones.

    Attributes:
        audio_token_id: id of `audio_token`.
        marks: ids of the tokens that stand before and behind the audio of each clip; None where there are none.

    Raises:
        CheckpointError: the tokenizer does not treat `audio_token` as a control token.
        ConfigError: `max_audio_len` is shorter than a window.
    """

    published_template: ClassVar[str] = DEFAULT_CHAT_TEMPLATE

    def __init__(
        self,
        feature_extractor: AudioFlamingo3FeatureExtractor,
        tokenizer: Tokenizer,
        chat_template: str | dict[str, str] | None = None,
        audio_token: str = AUDIO_TOKEN,
        default_transcription_prompt: str = DEFAULT_TRANSCRIPTION_PROMPT,
        max_audio_len: float = 600,
    ) -> None:
        for name, value, kind in (
            ("feature_extractor", feature_extractor, AudioFlamingo3FeatureExtractor),
            ("tokenizer", tokenizer, Tokenizer),
        ):
            if not isinstance(value, kind):
                raise ArgumentError(
                    f"{name} must be a {kind.__name__} of this package, got {type(value).__name__}."
                )
        check_control_token(tokenizer, audio_token)
        if max_audio_len < feature_extractor.chunk_length:
            raise ConfigError(
                f"max_audio_len={max_audio_len} is less than one window ({feature_extractor.chunk_length} s)."
            )
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        self.chat_template = chat_template or tokenizer.chat_template or self.published_template
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.control_tokens[audio_token]
        self.marks: tuple[int, int] | None = None
        self.default_transcription_prompt = default_transcription_prompt
        self.max_audio_len = max_audio_len

    @property
    def max_clip_s(self) -> float:
        """Seconds of the longest clip that the model takes: whole windows."""
        window_s = self.feature_extractor.chunk_length
        return self.max_audio_len // window_s * window_s

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        on_long: str = "error",
        labels: bool = False,
        preset: str | None = None,
    ) -> Prompt:
        """Renders one conversation and loads its audio.

        Args:
            messages: one conversation, as `apply_chat_template` takes it.
            add_generation_prompt: end with the head of the assistant's answer.
            continue_final_message: end inside the last message, for the model to go on with.
            on_long: see `AudioOptions`.
            labels: label what the assistant says, for training.
            preset: see `apply_chat_template`.

        Raises:
            PromptError: a conversation of the wrong form, or a template that fails.
            AudioError: a clip that cannot be read, is too short, or too long where that is refused.
            ArgumentError: options that exclude each other.
        """
        if continue_final_message and (add_generation_prompt or labels):
            raise ArgumentError("continue_final_message excludes add_generation_prompt and labels.")
        (turns,) = apply_preset([_one_conversation(messages)], preset)
        (rendered,) = self.render(
            [turns],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            mark_answers=labels,
        )
        text = self.prompt_text(rendered, "assistant" if labels else False)
        return self.add_audio(text, clips_of(turns), on_long)

    def transcription_prompt(self, waveform: np.ndarray, prompt: str | None = None) -> Prompt:
        """The request to transcribe one window, as `apply_transcription_request` makes it, without detours.

        Args:
            waveform: mono, 16 kHz, float32 (samples,), at most 30 s.
            prompt: the instruction; None stands for the default one.

        Raises:
            AudioError: it is too short for an audio token or too long for a window, or not finite.
            ArgumentError: another type.
        """
        check_window(waveform)
        instruction = self.default_transcription_prompt if prompt is None else prompt
        turn = Turn("user", (instruction, Clip(waveform)), is_string=False)
        (rendered,) = self.render([[turn]], add_generation_prompt=True)
        text = self.prompt_text(rendered)
        return text.with_audio([encode_windows([waveform], self.feature_extractor)])

    def training_text(self, messages: Sequence[Mapping[str, Any]]) -> PromptText:
        """Renders one conversation with labels on what the assistant says, and leaves its audio alone.

        Raises:
            PromptError: a conversation of the wrong form, without an answer, or a template that fails.
        """
        (rendered,) = self.render([_one_conversation(messages)], mark_answers=True)
        return self.prompt_text(rendered, "assistant")

    def add_audio(self, text: PromptText, clips: Sequence[Clip], on_long: str = "error") -> Prompt:
        """Loads clips and puts their windows into a text that has one `<sound>` for each.

        Args:
            text: of `training_text`.
            clips: in order.
            on_long: see `AudioOptions`.

        Raises:
            PromptError: the text has more or fewer `<sound>` than there are clips.
            AudioError: a clip that cannot be read, is too short, or too long where that is refused.
        """
        return self.complete([text], clips, AudioOptions(on_long=on_long))[0]

    def render(
        self,
        conversations: Sequence[Conversation],
        chat_template: str | None = None,
        *,
        mark_answers: bool = False,
        **how: bool,
    ) -> list[RenderedPrompt]:
        """Renders conversations; see `render_conversation` for the keywords.

        Raises:
            PromptError: a template that fails, or a conversation without an answer where answers are marked.
        """
        template = choose_template(self.chat_template, chat_template)
        for index, turns in enumerate(conversations):
            if mark_answers and not any(turn.role == "assistant" for turn in turns):
                raise PromptError(f"conversation {index} has no assistant message to label.")
        return [
            render_conversation(
                turns, template, self.tokenizer, self.audio_token, mark_answers=mark_answers, **how
            )
            for turns in conversations
        ]

    def prompt_text(self, rendered: RenderedPrompt, labels: bool | str = False) -> PromptText:
        """Encodes a rendered conversation; see `RenderedPrompt.prompt_text` for `labels`."""
        return replace(rendered.prompt_text(self.tokenizer, self.audio_token_id, labels), marks=self.marks)

    def complete(
        self, texts: Sequence[PromptText], clips: Sequence[Clip], options: AudioOptions
    ) -> list[Prompt]:
        """Loads the clips of all texts and puts their windows in: every prompt whose audio is not at hand is made here.

        Args:
            texts: with one `<sound>` for each clip.
            clips: of all texts in order; each source is loaded once.
            options: how clips become features.

        Raises:
            PromptError: the texts have more or fewer `<sound>` than there are clips.
            AudioError: a clip that cannot be read, is too short, or too long where that is refused.
        """
        num_slots = sum(text.num_clips for text in texts)
        if num_slots != len(clips):
            raise PromptError(
                f"the text has {num_slots} {self.audio_token} for {len(clips)} clip(s); it needs as many."
            )
        windows = iter(load_windows(clips, self.feature_extractor, self.max_audio_len, options))
        return [text.with_audio(list(islice(windows, text.num_clips))) for text in texts]


def apply_preset(conversations: list[Conversation], preset: str | None) -> list[Conversation]:
    """Conversations in the form that somebody's own scripts give them: `"nvidia"`, or None for the template's.

    Raises:
        ArgumentError: no such preset.
    """
    if preset not in (None, "nvidia"):
        raise ArgumentError(f"preset={preset!r}: it must be 'nvidia' or None.")
    return conversations if preset is None else list(map(with_newlines, conversations))


def check_control_token(tokenizer: Tokenizer, token: str) -> None:
    """Raises CheckpointError unless the tokenizer treats `token` as a control token."""
    if token not in tokenizer.control_tokens:
        raise CheckpointError(f"the tokenizer has no control token {token!r}: is it this model's?")


def _one_conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    conversations, is_batch = parse_conversations(messages)
    if is_batch:
        raise PromptError(f"this takes one conversation at a time, got a batch of {len(conversations)}.")
    return conversations[0]
