"""The processor of Music Flamingo and Audio Flamingo Next: marks around clips, longer audio, another system text."""

from __future__ import annotations

from typing import Any, ClassVar

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.config import (
    AUDIO_BOS_TOKEN,
    AUDIO_EOS_TOKEN,
    AUDIO_TOKEN,
    DEFAULT_TRANSCRIPTION_PROMPT,
    AudioFlamingo3Config,
    MusicFlamingoConfig,
)
from audioflamingo.processor.chat_template import DEFAULT_CHAT_TEMPLATE
from audioflamingo.processor.processor import AudioFlamingo3Processor
from audioflamingo.processor.prompt_maker import check_control_token
from audioflamingo.processor.tokenizer import Tokenizer
from audioflamingo.tasks import AF3_SYSTEM_PROMPT, MUSIC_FLAMINGO_SYSTEM_PROMPT


class MusicFlamingoProcessor(AudioFlamingo3Processor):
    """Prepares everything that `MusicFlamingoForConditionalGeneration` reads, and decodes what it writes.

    Args:
        feature_extractor: see `PromptMaker`, as for the next four.
        tokenizer: of the checkpoint.
        chat_template: likewise.
        audio_token: likewise.
        default_transcription_prompt: likewise.
        audio_bos_token: the control token that stands before the audio of a clip.
        audio_eos_token: the one behind it.
        max_audio_len: longest clip in seconds; Audio Flamingo Next takes 1800.
    """

    config_class: ClassVar[type[AudioFlamingo3Config]] = MusicFlamingoConfig
    aliases: ClassVar[tuple[str, ...]] = ("AudioFlamingoNextProcessor",)
    published_template = DEFAULT_CHAT_TEMPLATE.replace(AF3_SYSTEM_PROMPT, MUSIC_FLAMINGO_SYSTEM_PROMPT)
    settings: ClassVar[tuple[str, ...]] = (
        *AudioFlamingo3Processor.settings,
        "audio_bos_token",
        "audio_eos_token",
    )

    def __init__(
        self,
        feature_extractor: AudioFlamingo3FeatureExtractor,
        tokenizer: Tokenizer,
        chat_template: str | dict[str, str] | None = None,
        audio_token: str = AUDIO_TOKEN,
        audio_bos_token: str = AUDIO_BOS_TOKEN,
        audio_eos_token: str = AUDIO_EOS_TOKEN,
        max_audio_len: float = 1200,
        default_transcription_prompt: str = DEFAULT_TRANSCRIPTION_PROMPT,
    ) -> None:
        super().__init__(
            feature_extractor,
            tokenizer,
            chat_template,
            audio_token,
            default_transcription_prompt,
            max_audio_len,
        )
        for token in (audio_bos_token, audio_eos_token):
            check_control_token(tokenizer, token)
        self.audio_bos_token = audio_bos_token
        self.audio_eos_token = audio_eos_token
        self.audio_bos_token_id = tokenizer.control_tokens[audio_bos_token]
        self.audio_eos_token_id = tokenizer.control_tokens[audio_eos_token]
        self.marks = (self.audio_bos_token_id, self.audio_eos_token_id)

    @property
    def audio_token_ids(self) -> list[int]:
        """Ids of everything that stands for audio in a prompt."""
        return [self.audio_token_id, self.audio_bos_token_id, self.audio_eos_token_id]

    def _settings_to_save(self) -> dict[str, Any]:
        """The published files know no transcription prompt: it is written where it is another than the usual one."""
        settings = super()._settings_to_save()
        if self.default_transcription_prompt == DEFAULT_TRANSCRIPTION_PROMPT:
            del settings["default_transcription_prompt"]
        return settings
