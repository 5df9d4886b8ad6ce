"""A new, small model in Audio Flamingo 3's architecture: a given encoder, a tokenizer of its own, the rest random.

`python -m audioflamingo.training.new_model FOLDER --encoder FILE --texts train.jsonl ...` writes a folder that
`from_pretrained` loads, here and in transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.config import (
    AUDIO_TOKEN,
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    GenerationConfig,
    Qwen2Config,
)
from audioflamingo.datasets.conversations import text_of
from audioflamingo.errors import AudioFlamingoError, CheckpointError, ConfigError, DataError
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.network.encoder import AudioFlamingo3EncoderLayer
from audioflamingo.processor.chat_template import DEFAULT_CHAT_TEMPLATE
from audioflamingo.processor.conversation import TRANSCRIPTION_PREFIXES
from audioflamingo.processor.folders import QWEN2_SPLIT_PATTERN
from audioflamingo.processor.processor import AudioFlamingo3Processor
from audioflamingo.processor.prompt_maker import DEFAULT_TRANSCRIPTION_PROMPT
from audioflamingo.processor.tokenizer import Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, AUDIO_TOKEN)
FIXED_PHRASES = (
    "You are a helpful assistant.",
    "system\n",
    "user\n",
    "assistant\n",
    DEFAULT_TRANSCRIPTION_PROMPT,
    *(f'{prefix} "' for prefix in TRANSCRIPTION_PREFIXES),
    '".',
)
MODEL_MAX_LENGTH = 32768


@dataclass(frozen=True)
class NewModelConfig:
    """Shape of the new model.

    Attributes:
        vocab_size: tokens, control tokens included.
        hidden_size, num_layers, num_heads, num_key_value_heads, intermediate_size: of the language model.
        max_position_embeddings: its context: 600 s of audio are 15,000 tokens.
        extra_encoder_layers: layers after the given encoder's, which change nothing until they are trained.
        fixed_phrase_weight: how often the fixed phrases count, as a share of the texts: they are in every prompt, so
            each of their words should be one token.
        seed: of the random weights.
    """

    vocab_size: int = 2000
    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_key_value_heads: int = 2
    intermediate_size: int = 1024
    max_position_embeddings: int = 16384
    extra_encoder_layers: int = 0
    fixed_phrase_weight: float = 1.0
    seed: int = 0


def new_model(
    folder: str | Path, encoder: str | Path, texts: Iterable[str], config: NewModelConfig | None = None
) -> AudioFlamingo3ForConditionalGeneration:
    """Builds a model and its processor and saves both.

    Args:
        folder: where to.
        encoder: safetensors file of the encoder, AF3's names with or without `audio_tower.` in front.
        texts: what the tokenizer is trained on.
        config: shape of the rest.

    Returns:
        The model, float32.

    Raises:
        CheckpointError: the encoder's file is not an encoder.
        ConfigError: an impossible shape.
    """
    config = config or NewModelConfig()
    tensors = read_encoder(Path(encoder))
    tokenizer = build_tokenizer(texts, config)
    audio_config = encoder_config(tensors)
    text_config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
    )
    text_config.extra = {"tie_word_embeddings": False}
    torch.manual_seed(config.seed)
    model = AudioFlamingo3ForConditionalGeneration(
        AudioFlamingo3Config(audio_config, text_config, audio_token_id=tokenizer.control_tokens[AUDIO_TOKEN])
    )
    try:
        model.model.audio_tower.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{encoder} does not hold a whole encoder: {error}") from error
    if config.extra_encoder_layers:
        add_encoder_layers(model, config.extra_encoder_layers)
    model.generation_config = GenerationConfig(
        max_new_tokens=1024,
        eos_token_id=[tokenizer.control_tokens[TURN_END], tokenizer.control_tokens[END_OF_TEXT]],
        pad_token_id=tokenizer.control_tokens[END_OF_TEXT],
    )
    features = AudioFlamingo3FeatureExtractor(feature_size=audio_config.num_mel_bins)
    model.save_pretrained(folder)
    AudioFlamingo3Processor(
        features, tokenizer, DEFAULT_CHAT_TEMPLATE.replace("audio_token", f"'{AUDIO_TOKEN}'")
    ).save_pretrained(folder)
    return model


def add_encoder_layers(model: AudioFlamingo3ForConditionalGeneration, num_layers: int) -> None:
    """Appends layers to the encoder, in place, that pass on what they get until they are trained."""
    tower = model.model.audio_tower
    for _ in range(num_layers):
        layer = AudioFlamingo3EncoderLayer(tower.config)
        for linear in (layer.self_attn.out_proj, layer.fc2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        tower.layers.append(layer)
    tower.config.num_hidden_layers += num_layers


def read_encoder(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of an encoder by their names within it, float32.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name.removeprefix("audio_tower."): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the encoder {path}: {error}") from error


def encoder_config(tensors: dict[str, torch.Tensor], head_dim: int = 64) -> AudioFlamingo3EncoderConfig:
    """Shape of an encoder, read off its tensors; Whisper's heads all have 64 dimensions."""
    try:
        width, num_mel_bins, _ = tensors["conv1.weight"].shape
        layers = {int(name.split(".")[1]) for name in tensors if name.startswith("layers.")}
        return AudioFlamingo3EncoderConfig(
            num_mel_bins=num_mel_bins,
            hidden_size=width,
            num_hidden_layers=len(layers),
            num_attention_heads=width // head_dim,
            intermediate_size=tensors["layers.0.fc1.weight"].shape[0],
            max_source_positions=tensors["embed_positions.weight"].shape[0],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"these tensors are not an audio encoder's: {error} is missing or odd."
        ) from error


def build_tokenizer(texts: Iterable[str], config: NewModelConfig) -> Tokenizer:
    """Trains a byte-level BPE in Qwen2's pipeline, with ChatML's control tokens and `<sound>` at the end.

    Raises:
        ConfigError: `vocab_size` has no room for bytes and control tokens, or there are no texts.
    """
    num_learned = config.vocab_size - len(CONTROL_TOKENS)
    if num_learned <= 256:
        raise ConfigError(f"vocab_size {config.vocab_size} must be above {256 + len(CONTROL_TOKENS)}.")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_learned, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_with_fixed_phrases(texts, config.fixed_phrase_weight), trainer)
    if backend.get_vocab_size() <= 256:
        raise ConfigError("there are no texts to train a tokenizer on.")
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS]
    )
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
    }
    return Tokenizer(backend, settings)


def _with_fixed_phrases(texts: Iterable[str], weight: float) -> Iterator[str]:
    due = 0.0
    for text in texts:
        yield text
        due += weight
        while due >= 1:
            yield from FIXED_PHRASES
            due -= 1


def read_texts(paths: Sequence[str | Path]) -> Iterator[str]:
    """Texts of conversations in JSONL files, and the lines of all other files.

    Raises:
        DataError: a file that cannot be read or a line that is no conversation.
    """
    for path in map(Path, paths):
        try:
            with path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, start=1):
                    if path.suffix != ".jsonl":
                        yield line.strip()
                        continue
                    try:
                        yield from map(text_of, json.loads(line)["messages"])
                    except (ValueError, KeyError, TypeError) as error:
                        raise DataError(f"{path}:{number}: not a conversation ({error!r}).") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}.") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and builds the model."""
    defaults = NewModelConfig()
    parser = argparse.ArgumentParser(prog="python -m audioflamingo.training.new_model", description=__doc__)
    parser.add_argument("folder", help="where the model goes")
    parser.add_argument("--encoder", required=True, help="safetensors file of the encoder")
    parser.add_argument("--texts", nargs="+", required=True, help="JSONL of conversations, or text files")
    for name, value in vars(defaults).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s"
        )
    options = vars(parser.parse_args(arguments))
    folder, encoder, texts = (options.pop(name) for name in ("folder", "encoder", "texts"))
    try:
        model = new_model(folder, encoder, read_texts(texts), NewModelConfig(**options))
    except AudioFlamingoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, part in (
        ("encoder", model.model.audio_tower),
        ("projector", model.model.multi_modal_projector),
        ("language model", model.model.language_model),
        ("output layer", model.lm_head),
    ):
        print(f"{name:15} {sum(p.numel() for p in part.parameters()) / 1e6:7.2f} M parameters")
    total = sum(p.numel() for p in model.parameters())
    vocab_size = model.config.text_config.vocab_size
    print(f"{'all':15} {total / 1e6:7.2f} M, {2 * total / 1e6:.1f} MB in float16, vocabulary {vocab_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
