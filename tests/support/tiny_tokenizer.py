"""A tiny processor folder for tests: byte-level BPE with ChatML control tokens and `<sound>`.

It is Qwen2's pipeline (NFC, split pattern, byte level) with a few hundred tokens, written by hand so that it
is the same on every run, and it loads in transformers too. The chat template says in Jinja what the published
one does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from audioflamingo.processor.folders import QWEN2_SPLIT_PATTERN

PUBLISHED_CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- set body = namespace(audio='', text='') -%}
{%- for part in message.content -%}
{%- if part.type == 'audio' -%}{%- set body.audio = '<sound>' -%}
{%- else -%}{%- set body.text = body.text + part.text -%}
{%- endif -%}
{%- endfor -%}
{{ body.audio + body.text }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

# Words that get a token of their own, with and without a space before them; the rest is spelt out in bytes.
_SENTENCES = (
    "the system user assistant You are a helpful Transcribe input speech What is capital of France and sound "
    "audio end start im tool call The content spoken transcription Why do you think so hello world"
)
WORDS = _SENTENCES.split()
# So many that `<sound>` gets the id of the tiny model's audio token, within its vocabulary of 512.
NUM_PLAIN_TOKENS = 495
LINE_ENDS = ("\n\n", ">\n", ".\n")
# Control token -> whether `skip_special_tokens` leaves it out.
CONTROL_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<sound>": True,
}


def byte_characters() -> dict[int, str]:
    """The character by which byte-level BPE writes each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """All 256 bytes, then prefixes of the words, each merged from the prefix before it and one byte."""
    characters = byte_characters()
    vocabulary = {character: token_id for token_id, (_, character) in enumerate(sorted(characters.items()))}
    merges = []
    for word in (
        *LINE_ENDS,
        *(" " + word for word in WORDS),
        *WORDS,
    ):  # so that "Ġ" and "t" merge before "th"
        symbols = [characters[byte] for byte in word.encode()]
        prefix = symbols[0]
        for symbol in symbols[1:]:
            if prefix + symbol not in vocabulary:
                if len(vocabulary) == NUM_PLAIN_TOKENS:
                    return vocabulary, merges
                vocabulary[prefix + symbol] = len(vocabulary)
                merges.append((prefix, symbol))
            prefix += symbol
    return vocabulary, merges


def qwen2_backend(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken]
) -> Tokenizer:
    """Qwen2's pipeline over a vocabulary, as an object of the `tokenizers` library."""
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    return backend


def build_tiny_backend() -> Tokenizer:
    """The tiny tokenizer."""
    added = [
        AddedToken(token, special=special, normalized=False) for token, special in CONTROL_TOKENS.items()
    ]
    return qwen2_backend(*vocabulary_and_merges(), added)


TINY_VOCABULARY_SIZE = NUM_PLAIN_TOKENS + len(CONTROL_TOKENS)
AUDIO_TOKEN_ID = 500


def write_tiny_processor(
    folder: Path,
    *,
    chat_template: str | None = PUBLISHED_CHAT_TEMPLATE,
    feature_size: int = 128,
    tokenizer_config: dict[str, Any] | None = None,
) -> Path:
    """Writes a processor folder and returns it.

    Args:
        folder: made if it is not there.
        chat_template: contents of `chat_template.jinja`; None writes no such file.
        feature_size: mel bins.
        tokenizer_config: keys to set or, with the value None, to store as null in `tokenizer_config.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    build_tiny_backend().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config | (tokenizer_config or {}))
    write_processor_config(folder, feature_size=feature_size)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return folder


def add_control_tokens(folder: Path, tokens: list[str]) -> None:
    """Adds control tokens to the tokenizer of a folder, behind those that are there."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    backend.save(str(folder / "tokenizer.json"))


def write_processor_config(folder: Path, *, feature_size: int = 128) -> None:
    """Writes `processor_config.json` as transformers does."""
    feature_extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": feature_size,
        "sampling_rate": 16000,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "dither": 0.0,
    }
    content = {
        "processor_class": "AudioFlamingo3Processor",
        "audio_token": "<sound>",
        "default_transcription_prompt": "Transcribe the input speech.",
        "max_audio_len": 600,
        "feature_extractor": feature_extractor,
    }
    write_json(folder / "processor_config.json", content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
