"""Conversations and audio -> the inputs of the model, and generated ids -> text.

Each clip is cut into 30-second windows whose log-mel features go to the encoder; its one `<sound>` in the
prompt is repeated once for each audio token, so that fusion never changes the length of a prompt. Beyond what
transformers' processor does, a conversation may hold several clips and a batch may mix text with audio; what
it silently ignores (unknown keywords, lost clips, clips that are too short) is an error here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.audio.forms import as_sources
from audioflamingo.config import AudioFlamingo3Config
from audioflamingo.errors import ArgumentError, CheckpointError, unknown_arguments
from audioflamingo.files import read_json, to_json, write_text
from audioflamingo.hub import PROCESSOR_FILES, resolve_folder
from audioflamingo.processor.clips import Clip
from audioflamingo.processor.collate import BatchFeature, collate
from audioflamingo.processor.conversation import (
    clips_of,
    parse_conversations,
    strip_framing,
    transcription_conversations,
)
from audioflamingo.processor.folders import (
    is_original_layout,
    read_chat_template,
    read_feature_settings,
    read_processor_config,
)
from audioflamingo.processor.processor_options import collect_options
from audioflamingo.processor.prompt import PromptText
from audioflamingo.processor.prompt_maker import PromptMaker, apply_preset
from audioflamingo.processor.tokenizer import TokenIds, Tokenizer

_TEMPLATE_OPTIONS = (
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "output_labels",
    "preset",
)


class AudioFlamingo3Processor(PromptMaker):
    """Prepares everything that `AudioFlamingo3ForConditionalGeneration` reads, and decodes what it writes.

    See `PromptMaker` for its arguments and attributes, and for prompts one by one; here are batches, files and text.
    """

    config_class: ClassVar[type[AudioFlamingo3Config]] = AudioFlamingo3Config  # of its model
    aliases: ClassVar[tuple[str, ...]] = ()  # other names of this class in files
    settings: ClassVar[tuple[str, ...]] = (
        "chat_template",
        "audio_token",
        "default_transcription_prompt",
        "max_audio_len",
    )
    _unknown_config: Mapping[str, Any] = {}

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """Loads the processor of a checkpoint.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id.
            revision: branch, tag or commit on the hub.
            token: hub token, True for the stored one.
            cache_dir: where downloads are kept.
            local_files_only: never use the network.
            **options: `chat_template`, `audio_token`, `default_transcription_prompt` or `max_audio_len`, in
                place of the checkpoint's.

        Raises:
            CheckpointError: files are absent, damaged, or another model's.
            ArgumentError: an unknown option.
        """
        if unknown := [name for name in options if name not in cls.settings]:
            allowed = ("revision", "token", "cache_dir", "local_files_only", *cls.settings)
            raise unknown_arguments("from_pretrained()", unknown, allowed)
        folder = resolve_folder(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=PROCESSOR_FILES,
        )
        config = read_processor_config(folder)
        if config["processor_class"] not in (cls.__name__, *cls.aliases, None):
            raise CheckpointError(
                f"the processor in {folder} is a {config['processor_class']}, not a {cls.__name__}; AutoProcessor "
                "takes the right one of the family."
            )
        tokenizer = Tokenizer.from_folder(folder)
        feature_extractor = AudioFlamingo3FeatureExtractor.from_dict(read_feature_settings(folder, config))
        settings = {name: config[name] for name in cls.settings if config.get(name) is not None}
        settings.setdefault("chat_template", read_chat_template(folder, {}))
        if settings["chat_template"] is None and is_original_layout(folder):
            settings["chat_template"] = cls.published_template  # the language model's own is another
        processor = cls(feature_extractor, tokenizer, **(settings | options))
        known = (*cls.settings, "feature_extractor", "processor_class")
        processor._unknown_config = {key: value for key, value in config.items() if key not in known}
        processor._check_token_ids(folder)
        return processor

    def _check_token_ids(self, folder: Path) -> None:
        """Compares the ids in the model's `config.json`, if there is one, with the tokenizer's."""
        values = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        for name in self.config_class.token_of:
            token = getattr(self, name.removesuffix("_id"))
            stated, found = values.get(name), self.tokenizer.control_tokens[token]
            if stated not in (None, found):
                raise CheckpointError(
                    f"{folder}: {name} is {stated!r} in config.json, but the tokenizer gives {token} the id {found}; "
                    "one of the two files is another model's."
                )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes a folder that `from_pretrained` loads, here and in transformers, each file whole."""
        folder = Path(save_directory)
        self.tokenizer.save(folder, self.chat_template)
        config = {
            **self._unknown_config,
            "processor_class": type(self).__name__,
            "feature_extractor": self.feature_extractor.to_dict(),
            **self._settings_to_save(),
        }
        write_text(folder / "processor_config.json", to_json(config))

    def _settings_to_save(self) -> dict[str, Any]:
        """What goes into `processor_config.json` besides the feature extractor; the template has its own file."""
        return {name: getattr(self, name) for name in self.settings if name != "chat_template"}

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the model reads."""
        return ["input_features", "input_ids", "attention_mask", "input_features_mask"]

    # Prompts to batches

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Any = None,
        output_labels: bool = False,
        *,
        text_kwargs: Mapping[str, Any] | None = None,
        audio_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepares prompts that are rendered already; control tokens in them are read as such.

        Args:
            text: one prompt or several, each with one `<sound>` for every clip it is about.
            audio: the clips of all prompts in order: one source or a list. See `load_audio` for what a source
                is.
            output_labels: add `labels`, equal to the ids, with audio and padding positions set to -100.
            text_kwargs: see `TextOptions`; its fields can also be given as keywords.
            audio_kwargs: see `AudioOptions`; likewise.
            **options: those fields.

        Returns:
            `input_ids` and `attention_mask`, int64 (B, S); with audio `input_features`, float32 (W, M, T),
            and `input_features_mask`, int32 (W, T), W windows of all clips in order; `labels` (B, S) where
            asked for.

        Raises:
            PromptError: the prompts hold more or fewer `<sound>` than there are clips, or cannot be padded.
            AudioError: a clip that cannot be read, or is too short.
            ArgumentError: an unknown keyword or a wrong value.
        """
        text_options, audio_options = collect_options(
            "processor()", options, text_kwargs, audio_kwargs, ("text", "audio", "output_labels")
        )
        if output_labels not in (True, False):
            raise ArgumentError(
                f"output_labels={output_labels!r}: it must be True or False here. Only apply_chat_template() "
                "knows which text is the assistant's, and takes output_labels='assistant'."
            )
        prompts = [text] if isinstance(text, str) else text
        if not isinstance(prompts, list | tuple) or not prompts:
            raise ArgumentError("text must be a prompt or a list of at least one prompt.")
        texts = []
        for prompt in prompts:
            ids = np.array(self.tokenizer.encode_prompt(prompt), dtype=np.int32)
            labels = ids if output_labels else None
            texts.append(PromptText(ids, self.audio_token_id, labels, self.marks))
        clips = [Clip(source) for source in as_sources(audio)]
        return collate(self.complete(texts, clips, audio_options), self.tokenizer.pad_token_id, text_options)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        output_labels: bool | str = False,
        preset: str | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        audio_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Renders conversations and, with `tokenize=True`, loads their audio and prepares the batch.

        What the messages say never becomes a control token, whatever they say.

        Args:
            conversation: one conversation or a list of them. Messages are `{"role", "content"}`; content is a
                string or a list of `{"type": "text", "text"}` and
                `{"type": "audio", "path" | "url" | "audio"}`, the latter with an optional `"sampling_rate"`
                for arrays.
            chat_template: Jinja source, or the name of one of the checkpoint's templates; None takes its
                default.
            add_generation_prompt: end with the head of the assistant's answer.
            continue_final_message: end inside the last message, for the model to go on with.
            tokenize: prepare the batch; otherwise return the rendered text.
            return_dict: return the whole batch; otherwise only `input_ids`.
            output_labels: True labels everything but audio and padding. "assistant" labels only what the
                assistant says and the control token that ends it, which is what the model was trained on.
            preset: "nvidia" sets clips off from the text with line feeds, as NVIDIA's own scripts do, and puts them
                where the text has `<sound>` or `<sound-k>`; None leaves it to the template.
            text_kwargs: see `TextOptions`; its fields can also be given as keywords.
            audio_kwargs: see `AudioOptions`; likewise.
            **options: those fields.

        Returns:
            See `__call__`. With `tokenize=False` the text of the conversation, or a list of texts for a
            batch.

        Raises:
            PromptError: a conversation of the wrong form, a template that fails, rows that cannot be padded.
            AudioError: a clip that cannot be read, or is too short.
            ArgumentError: an unknown keyword, a wrong value, or options that exclude each other.
        """
        text_options, audio_options = collect_options(
            "apply_chat_template()", options, text_kwargs, audio_kwargs, _TEMPLATE_OPTIONS
        )
        if output_labels not in (True, False, "assistant"):
            raise ArgumentError(f"output_labels={output_labels!r}: it must be True, False or 'assistant'.")
        if continue_final_message and (add_generation_prompt or output_labels == "assistant"):
            raise ArgumentError(
                "continue_final_message ends the prompt inside a message: it excludes add_generation_prompt "
                "and output_labels='assistant'."
            )
        if not tokenize and output_labels:
            raise ArgumentError("output_labels needs tokenize=True.")
        conversations, is_batch = parse_conversations(conversation)
        conversations = apply_preset(conversations, preset)
        rendered = self.render(
            conversations,
            chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            mark_answers=output_labels == "assistant",
        )
        if not tokenize:
            return [prompt.text for prompt in rendered] if is_batch else rendered[0].text
        texts = [self.prompt_text(prompt, output_labels) for prompt in rendered]
        clips = [clip for turns in conversations for clip in clips_of(turns)]
        prompts = self.complete(texts, clips, audio_options)
        batch = collate(prompts, self.tokenizer.pad_token_id, text_options)
        return batch if return_dict else batch["input_ids"]

    def apply_transcription_request(
        self,
        audio: Any,
        prompt: str | Sequence[str | None] | None = None,
        tokenize: bool = True,
        **options: Any,
    ) -> Any:
        """Prepares requests to transcribe clips.

        Args:
            audio: one source or a list of them; see `load_audio` for what a source is.
            prompt: the instruction, for all clips or one for each; None stands for the default instruction.
            tokenize: prepare the batch; otherwise return the rendered prompts without loading the audio.
            **options: further keywords of `apply_chat_template`.

        Returns:
            The batch, or with `tokenize=False` one prompt for each clip.

        Raises:
            PromptError: no clip, or another number of prompts than of clips.
            AudioError: a clip that cannot be read, or is too short.
            ArgumentError: an unknown keyword or a wrong value.
        """
        for name in ("add_generation_prompt", "continue_final_message", "return_dict"):
            if name in options:
                raise ArgumentError(f"apply_transcription_request() sets {name} itself.")
        conversations = transcription_conversations(
            as_sources(audio), prompt, self.default_transcription_prompt
        )
        return self.apply_chat_template(
            conversations, tokenize=tokenize, add_generation_prompt=True, return_dict=True, **options
        )

    # Ids to text

    def decode(
        self,
        token_ids: TokenIds,
        skip_special_tokens: bool = False,
        strip_prefix: bool = False,
        **unknown: Any,
    ) -> str | list[str]:
        """Turns generated ids into text.

        Args:
            token_ids: one row, or a batch.
            skip_special_tokens: leave out end, padding and the like.
            strip_prefix: reduce an answer such as `The spoken content of the audio is "...".` to the
                transcript.
            **unknown: refused.

        Returns:
            The text of the row, or a list with one text a row.
        """
        if unknown:
            raise unknown_arguments("decode()", unknown, ("token_ids", "skip_special_tokens", "strip_prefix"))
        text = self.tokenizer.decode(token_ids, skip_special_tokens)
        if not strip_prefix:
            return text
        return strip_framing(text) if isinstance(text, str) else [strip_framing(row) for row in text]

    def batch_decode(self, token_ids: TokenIds, *args: Any, **options: Any) -> str | list[str]:
        """The same as `decode`."""
        return self.decode(token_ids, *args, **options)
