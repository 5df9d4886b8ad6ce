#!/usr/bin/env python3
"""Constructs the built-in model from Whisper tiny.en: `python recipes/nano/build_model.py --data-dir DIR`.

After the steps encoder, text and (for some 1,000 clips) speech of build_data.py. Writes DIR/model, which is trained
by train_model.py next.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nano_data.encoder import read_arrays
from nano_data.store import read_jsonl, read_shards
from nano_data.writing import written
from nano_model import assemble, vocabulary, words
from nano_model.whisper import NO_TIMESTAMPS, START, Whisper, stack
from torch import Tensor

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from audioflamingo.hub import BUILT_IN_FOLDER

ORDINARY_TOKENS, ADDED_WORDS = 21_000, 4_596
FRAMES_OF_A_CLIP = 40
OTHER_SETS, CLIPS_OF_A_SET = ("speech/train_words", "sound/train", "instrument/train", "silence/train"), 300
LONGEST_S = 20.0


def load_whisper(folder: Path) -> Whisper:
    """The decoder out of `model.bin` and `tokenizer.json`."""
    arrays = {}
    for name, array in read_arrays((folder / "model.bin").read_bytes()):
        arrays[name] = torch.from_numpy(array.astype("float32"))
    return Whisper(arrays, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))


def sentences(data_dir: Path) -> Iterator[str]:
    """Cased training sentences."""
    for row in read_jsonl(data_dir / "text" / "train.jsonl"):
        yield written(row["original"])


def clips(data_dir: Path, name: str, count: int) -> list[dict[str, Any]]:
    """Random training clips with `path`, of a set below `audio`."""
    rows = [row for row in read_shards(data_dir / "audio" / name, data_dir) if row["duration_s"] < LONGEST_S]
    return random.Random("construction").sample(rows, min(count, len(rows)))


def encoded(data_dir: Path, rows: list[dict[str, Any]], encoder: dict[str, Tensor]) -> Iterator[Tensor]:
    """The encoder's rows (A, D) of each clip, without gain and bias of its last LayerNorm."""
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano", dtype=torch.float32).eval()
    tower = model.model.audio_tower
    plain = {
        name.removeprefix("audio_tower."): tensor.float()
        for name, tensor in assemble.plain_norm(encoder).items()
    }
    tower.load_state_dict(plain)
    processor = AutoProcessor.from_pretrained("nano")
    for row in rows:
        inputs = processor.apply_transcription_request(audio=str(data_dir / row["path"]))
        yield tower(inputs.input_features, inputs.input_features_mask).audio_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that build_data.py filled")
    parser.add_argument("--clips", type=int, default=1000, help="to fit on (default: 1000)")
    parser.add_argument("--fit-seconds", type=float, default=35, help="for each of four MLPs (default: 35)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    data_dir: Path = arguments.data_dir
    whisper = load_whisper(data_dir / "whisper")
    template = json.loads((BUILT_IN_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    content, kept = vocabulary.prune(whisper.tokenizer, template, sentences(data_dir), ORDINARY_TOKENS)
    content, added = words.add_words(content, whisper.tokenizer, sentences(data_dir), ADDED_WORDS)
    kept += added
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokens = assemble.Tokens(tokenizer)
    rows = assemble.whisper_rows(kept, tokens, whisper.tokenizer["model"]["vocab"])
    encoder = load_file(data_dir / "encoder.safetensors")
    spoken = clips(data_dir, "speech/train", arguments.clips)
    others = [row for name in OTHER_SETS for row in clips(data_dir, name, CLIPS_OF_A_SET)]
    chosen = [*spoken, *others]
    states, beginnings, frames = [], [], []
    with torch.inference_mode():
        for number, (row, heard) in enumerate(zip(chosen, encoded(data_dir, chosen, encoder), strict=True)):
            beginnings.append(heard[0])
            frames.append(heard[1:][torch.randperm(len(heard) - 1)[:FRAMES_OF_A_CLIP]])
            if number < len(spoken):
                text = [kept[token] for token in tokenizer.encode(" " + written(row["original"])).ids]
                states.append(whisper.states(torch.tensor([START, NO_TIMESTAMPS, *text]), heard))
    together, first = [state.clone() for state in stack(states)], torch.stack(beginnings).clone()
    heard, later = torch.cat(frames[: len(spoken)]).clone(), torch.cat(frames).clone()
    embedding = assemble.embeddings(whisper, rows, tokens)
    layers = [assemble.position_layer(whisper, embedding, tokens)]
    layers += assemble.decoder_layers(whisper, together, heard, arguments.fit_seconds)
    size, const = float(together[-1].pow(2).mean(1).sqrt().median()), assemble.constants(together)[-1]
    head = assemble.output_rows(whisper, rows, tokens, size, const)
    tensors = assemble.plain_norm({name: tensor.float() for name, tensor in encoder.items()})
    tensors |= assemble.projector(later, first) | assemble.language_model(layers, embedding, head)
    count = assemble.write_folder(data_dir / "model", BUILT_IN_FOLDER, tensors, content, tokens)
    print(f"{count / 1e6:.1f} M parameters in {data_dir / 'model'} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
