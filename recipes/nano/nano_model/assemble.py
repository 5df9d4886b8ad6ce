"""The whole model: states of Whisper on some clips, the layers, embeddings, output rows, projector, and the folder."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import answers, attention, counting, masks, mlp, positions, vocabulary
from .layout import (
    AUDIO,
    AUDIO_FLAG,
    AUDIO_RMS,
    CLOSE,
    CONST,
    EPS,
    FLAG,
    HEAD,
    HEADER,
    HEADS,
    INNER,
    MARK,
    NUM_LAYERS,
    QUOTE,
    SINK,
    SINK_SIZE,
    START,
    STATE,
    SYSTEM,
    THETA,
    WIDTH,
    Layer,
    centred,
    rms_norm,
)
from .whisper import END, NO_TIMESTAMPS, Whisper
from .whisper import START as WHISPER_START

SCALE = math.sqrt(STATE / WIDTH)  # LayerNorm's length over RMSNorm's
CONST_SHARE = 0.1  # of the state's length: CONST grows with it
STRAIGHT = 4.0  # from here on GELU is the identity to 1e-4
SPACE_SCORE, QUOTE_SCORE, CLOSED_SCORE, NEVER = 6.0, -8.0, 40.0, -12.0
SPECIAL = ("<|endoftext|>", "<|im_start|>", vocabulary.TURN_END, "<sound>")
COPIED = ("chat_template.jinja", "processor_config.json", "tokenizer_config.json")


class Tokens:
    """Numbers of the tokens that have a part in the construction."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad, self.im_start, self.im_end, self.sound = map(tokenizer.token_to_id, SPECIAL)
        self.quote, self.close, self.assistant, self.system = map(
            tokenizer.token_to_id,
            (vocabulary.QUOTE, vocabulary.CLOSE, vocabulary.START, vocabulary.SYSTEM),
        )
        self.names = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
        framing = tokenizer.encode(vocabulary.ANSWER).ids
        self.quote_distance = len(framing) - 1


def constants(states: Sequence[Tensor]) -> list[float]:
    """The flag CONST at each of the 13 states: a tenth of the state, at least as in the embeddings."""
    sizes = [float(state.pow(2).mean(1).sqrt().median()) for state in states]
    return [FLAG, *(max(FLAG, CONST_SHARE * math.sqrt(STATE) * size) for size in sizes[1:])]


def marks_normed(states: Sequence[Tensor], const: Sequence[float]) -> list[float]:
    """HEADER, OPEN and ANSWER behind RMSNorm, at each of the 13 states, for a token that has all three."""
    energies = [
        STATE * float(s.pow(2).mean(1).median()) + c**2 + 3 * MARK**2
        for s, c in zip(states, const, strict=True)
    ]
    return [MARK / math.sqrt(energy / WIDTH) for energy in energies]


def start_normed(states: Tensor) -> float:
    """START of `assistant` behind RMSNorm, at the least: its own state, Whisper's first, is by far the longest."""
    return FLAG * math.sqrt(WIDTH) / float(states.norm(dim=1).max())


def stream(states: Tensor, const: float) -> Tensor:
    """States (N, STATE) as they lie in the model's stream, behind RMSNorm, (N, WIDTH)."""
    x = torch.zeros(len(states), WIDTH)
    x[:, :STATE], x[:, CONST] = states, const
    return rms_norm(x)


def decoder_layers(
    whisper: Whisper, states: Sequence[Tensor], frames: Tensor, fit_seconds: float
) -> list[Layer]:
    """Layers 1 to 8: self-attention and cross-attention with MLP of each of Whisper's layers.

    Args:
        whisper: the decoder.
        states: its 13 states on some texts, (N, STATE) each.
        frames: rows of the encoder, (A, STATE).
        fit_seconds: for each MLP.
    """
    const, marks = constants(states), marks_normed(states, constants(states))
    heard = torch.zeros(len(frames), WIDTH)
    heard[:, :STATE], heard[:, AUDIO] = frames, AUDIO_FLAG
    heard = rms_norm(heard)
    result = []
    for number, part in enumerate(whisper.layers):
        at = 3 * number
        own, cross = Layer(), Layer()
        text = stream(states[at], const[at])
        folded = attention.fold(part.attention, part.norms[0], part.norms[0], SCALE, SCALE)
        seen = attention.Seen(text, text)
        left_out = [attention.put_attention(own, folded, seen, const[at + 1] - const[at], False)]
        masks.mask_self(own, marks[at], start_normed(states[at]))
        answers.order_words(own, marks[at])
        answers.free_neurons(own, marks[at], _const_normed(states[at], const[at]))
        text = stream(states[at + 1], const[at + 1])
        folded = attention.fold(part.cross, part.norms[1], whisper.encoder_norm, AUDIO_RMS, SCALE)
        seen = attention.Seen(text, heard)
        left_out.append(attention.put_attention(cross, folded, seen, const[at + 2] - const[at + 1], True))
        masks.mask_cross(cross)
        answers.order_clips(cross, marks[at + 1])
        counting.prefer_clips(cross, marks[at + 1])
        mlp.put_neurons(cross, part, states[at + 2], const[at + 2])
        error = mlp.fit(cross, states[at + 2], states[at + 3], const[at + 2], fit_seconds)
        for layer in (own, cross):
            masks.keep_audio(layer)
        print(
            f"  layer {number}: left out of scores {left_out[0]:.1e}, {left_out[1]:.1e}; MLP's error {error:.4f}"
        )
        result += [own, cross]
    return result


def _const_normed(states: Tensor, const: float) -> float:
    return const / math.sqrt((STATE * float(states.pow(2).mean(1).median()) + const**2) / WIDTH)


def embeddings(whisper: Whisper, rows: Sequence[int], tokens: Tokens) -> Tensor:
    """Embeddings (V, WIDTH): Whisper's, centred, and flags. `rows`: Whisper's number of each ordinary token."""
    out = torch.zeros(len(rows) + len(SPECIAL), WIDTH)
    out[:, CONST] = FLAG
    taken = dict(enumerate(rows)) | {tokens.assistant: WHISPER_START, tokens.quote: NO_TIMESTAMPS}
    taken |= {tokens.close: END, tokens.pad: END, tokens.im_end: whisper.embeddings.shape[0] - 1}
    for token, row in taken.items():
        out[token, :STATE] = centred(whisper.embeddings[row])
    out[tokens.quote, QUOTE] = out[tokens.close, CLOSE] = out[tokens.assistant, START] = FLAG
    for token in (tokens.im_start, tokens.sound):
        out[token] = 0
        out[token, SINK] = SINK_SIZE
    out[tokens.system, SYSTEM] = FLAG
    for token, flag in ((tokens.assistant, START), (tokens.quote, QUOTE), (tokens.system, SYSTEM)):
        out[token] = at_exact_length(out[token], flag)
    return out


def at_exact_length(row: Tensor, flag: int) -> Tensor:
    """An embedding (WIDTH,) whose state is as long as makes a flag behind RMSNorm exact in bfloat16."""
    state, rest = row.clone(), row.clone()
    state[STATE:], rest[:STATE] = 0, 0
    normed = float(rms_norm(row)[flag].bfloat16())
    energy = WIDTH * (float(row[flag]) ** 2 / normed**2 - EPS) - float(rest.pow(2).sum())
    return state * math.sqrt(energy) / state.norm() + rest


def output_rows(whisper: Whisper, rows: Sequence[int], tokens: Tokens, size: float, const: float) -> Tensor:
    """The output layer (V, WIDTH).

    A sentence opens right behind the quote, without a space: there capitalised tokens without one are raised and
    tokens with one are lowered, by the quote's flag, and elsewhere the other way round.

    Args:
        whisper, rows, tokens: as for `embeddings`.
        size: of the state at the end (root mean square).
        const: the flag CONST there.
    """
    const_normed, flag = const / size * SCALE, FLAG / size * SCALE
    gain, bias = whisper.norm
    matrix = whisper.output[list(rows)].clone()
    matrix[tokens.close] = whisper.output[END]
    out = torch.zeros(len(rows) + len(SPECIAL), WIDTH)
    out[: len(rows), :STATE] = matrix * gain * SCALE
    out[: len(rows), CONST] = matrix @ bias / const_normed
    opening = openings(tokens.names)
    out[opening, CONST] -= SPACE_SCORE / const_normed
    out[opening, QUOTE] = 2 * SPACE_SCORE / flag
    out[[number for number, name in enumerate(tokens.names) if name.startswith("Ġ")], QUOTE] = (
        -SPACE_SCORE / flag
    )
    out[tokens.quote, :STATE] *= 0.5
    out[tokens.quote, CONST] += QUOTE_SCORE / const_normed
    for token in (tokens.assistant, tokens.pad, tokens.im_start, tokens.im_end, tokens.sound):
        out[token] = 0
        out[token, CONST] = NEVER / const_normed
    out[tokens.im_end, CLOSE] = CLOSED_SCORE / flag
    return out


def openings(names: Sequence[str]) -> list[int]:
    """Capitalised tokens without a space that have a twin with one."""
    known = set(names)
    return [n for n, name in enumerate(names) if re.fullmatch("[A-Z][a-z]*", name) and f"Ġ{name}" in known]


def whisper_rows(kept: Sequence[int], tokens: Tokens, vocabulary_of_whisper: dict[str, int]) -> list[int]:
    """Whisper's number of each ordinary token; capitalised ones without a space take their twin's."""
    rows = list(kept)
    for number in openings(tokens.names):
        rows[number] = vocabulary_of_whisper[f"Ġ{tokens.names[number]}"]
    rows[tokens.assistant] = WHISPER_START
    return rows


def projector(frames: Tensor, beginnings: Tensor) -> dict[str, Tensor]:
    """The identity, on the straight part of GELU, the audio flag, and which rows are the first of a clip.

    Args:
        frames, beginnings: rows of the encoder, (A, STATE) and (C, STATE); `frames` holds no first ones.
    """
    far = torch.cat([frames, beginnings]).abs().amax(0) * 1.15 + STRAIGHT
    first, second = torch.eye(WIDTH, STATE), torch.zeros(WIDTH, WIDTH)
    second[:STATE, :STATE] = torch.eye(STATE)
    bias1, bias2 = torch.zeros(WIDTH), torch.zeros(WIDTH)
    bias1[:STATE], bias2[:STATE], bias2[AUDIO] = far, -far, AUDIO_FLAG
    named = {
        "linear_1.weight": first,
        "linear_1.bias": bias1,
        "linear_2.weight": second,
        "linear_2.bias": bias2,
    }
    counting.mark_beginnings(named, *counting.fit_direction(beginnings, frames))
    return {f"multi_modal_projector.{name}": tensor for name, tensor in named.items()}


def plain_norm(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder with a last LayerNorm that has no gain and bias: the cross layers take Whisper's."""
    plain = {
        "audio_tower.layer_norm.weight": torch.ones(STATE),
        "audio_tower.layer_norm.bias": torch.zeros(STATE),
    }
    return {**encoder, **plain}


def language_model(layers: Sequence[Layer], embedding: Tensor, head: Tensor) -> dict[str, Tensor]:
    """Tensors of the language model by their names in a folder."""
    root = "language_model.model."
    tensors = {f"{root}embed_tokens.weight": embedding, f"{root}norm.weight": torch.ones(WIDTH)}
    tensors["language_model.lm_head.weight"] = head
    for number, layer in enumerate(layers):
        tensors |= {f"{root}layers.{number}.{name}": tensor for name, tensor in layer.tensors().items()}
    return tensors


def write_folder(
    folder: Path, template: Path, tensors: dict[str, Tensor], tokenizer: dict[str, Any], tokens: Tokens
) -> int:
    """Writes the model in float16, with the other files of a template folder; returns the number of parameters."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    config, generation = (
        json.loads((template / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    config["audio_token_id"] = tokens.sound
    rope = {"rope_theta": THETA, "rope_type": "default"}
    config["text_config"] |= {
        "hidden_size": WIDTH, "head_dim": HEAD, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "num_hidden_layers": NUM_LAYERS, "intermediate_size": INNER, "vocab_size": len(tokens.names),
        "rope_parameters": rope, "tie_word_embeddings": False, "rms_norm_eps": EPS,
    }  # fmt: skip
    generation |= {"eos_token_id": [tokens.im_end, tokens.pad], "pad_token_id": tokens.pad, "num_beams": 1}
    for name, value in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    for name in COPIED:
        if (template / name).resolve() != (folder / name).resolve():
            shutil.copy(template / name, folder / name)
    return sum(tensor.numel() for tensor in tensors.values())


def position_layer(whisper: Whisper, embedding: Tensor, tokens: Tokens) -> Layer:
    """Layer 0."""
    layer = positions.position_layer(embedding, whisper.positions, tokens.assistant, tokens.quote_distance)
    counting.count_clips(layer, float(rms_norm(embedding[tokens.system])[SYSTEM]))
    return layer


__all__ = ["HEADER", "Tokens", "decoder_layers", "write_folder"]
