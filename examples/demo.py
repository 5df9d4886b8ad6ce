"""What `make demo` runs: what the model sees of real recordings, then the whole path from audio to text.

With AF3_MODEL set to a hub id or a checkpoint folder the answers are that model's. Without it a small model in the same
architecture is made, with random weights: every step is the real one, and the words mean nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / ".demo"
RECORDINGS = {
    "a woman reading a telephone prompt": ROOT / "tests" / "data" / "directory_prompt.flac",
    "monkeys": ROOT / "tests" / "data" / "monkeys.ogg",
}
QUESTION = "What is the sound in this audio?"


def af3(*arguments: str) -> None:
    """Runs the command as a user would, showing it."""
    print(
        "\n$ af3",
        *[f'"{a}"' if " " in a else os.path.relpath(a) if os.path.exists(a) else a for a in arguments],
    )
    subprocess.run([sys.executable, "-m", "audioflamingo.cli", *arguments], check=True)


def make_random_model(folder: Path) -> Path:
    """Writes a small checkpoint with random weights, once."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch

    from audioflamingo import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration
    from audioflamingo.audio import AudioFlamingo3FeatureExtractor
    from audioflamingo.processor import AudioFlamingo3Processor
    from audioflamingo.training.new_model import NewModelConfig, build_tokenizer

    tokenizer = build_tokenizer(
        [(ROOT / "README.md").read_text(encoding="utf-8")], NewModelConfig(vocab_size=500)
    )
    config = AudioFlamingo3Config(
        audio_config={
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 512,
        },
        text_config={
            "vocab_size": 512,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
        },
        audio_token_id=tokenizer.control_tokens["<sound>"],
    )
    torch.manual_seed(0)
    model = AudioFlamingo3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.control_tokens["<|im_end|>"]
    model.generation_config.pad_token_id = tokenizer.control_tokens["<|endoftext|>"]
    AudioFlamingo3Processor(AudioFlamingo3FeatureExtractor(), tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    for what, path in RECORDINGS.items():
        print(f"\n== What the model sees of {what}")
        af3("inspect", str(path), "--png", str(OUTPUT / f"{path.stem}.png"), "--overwrite")
    model = os.environ.get("AF3_MODEL") or str(make_random_model(OUTPUT / "random-model"))
    speech, monkeys = map(str, RECORDINGS.values())
    print("\n== From audio to text")
    if not os.environ.get("AF3_MODEL"):
        print("No AF3_MODEL is set: this model's weights are RANDOM. The path is real, the words are noise.")
    af3("info", model)
    af3("ask", speech, "Transcribe the input speech.", "--model", model, "--max-new-tokens", "20")
    af3("ask", speech, monkeys, QUESTION, "--model", model, "--max-new-tokens", "20")
    print(f"\nPictures are in {os.path.relpath(OUTPUT)}/. For real answers:")
    print("  AF3_MODEL=nvidia/audio-flamingo-3-hf make demo   # 16.5 GB, see its licence")


if __name__ == "__main__":
    main()
