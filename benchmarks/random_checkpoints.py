"""Random weights in the published widths: a checkpoint folder, or the language model alone for llama.cpp.

python benchmarks/random_checkpoints.py FOLDER TEXT_LAYERS AUDIO_LAYERS
python benchmarks/random_checkpoints.py FILE.gguf TEXT_LAYERS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from audioflamingo import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration

SPREAD = 0.02
Q4_0_BLOCK, Q4_0_BYTES = 32, 18  # values of a block, and its bytes: a float16 scale and 16 pairs


def write_folder(folder: Path, num_text_layers: int, num_audio_layers: int) -> None:
    """A bfloat16 checkpoint with normally distributed weights."""
    config = AudioFlamingo3Config.from_dict(
        {
            "audio_config": {"num_hidden_layers": num_audio_layers},
            "text_config": {"num_hidden_layers": num_text_layers},
        }
    )
    with torch.device("meta"):
        model = AudioFlamingo3ForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, SPREAD)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.generation_config.eos_token_id = 151_645
    model.generation_config.pad_token_id = 151_643
    model.save_pretrained(folder)


def write_gguf(file: Path, num_layers: int) -> None:
    """The language model in GGUF with every matrix in Q4_0, for llama.cpp; needs the package `gguf`."""
    import gguf

    text = AudioFlamingo3Config().text_config
    assert text.head_dim is not None
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_block_count(num_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(text.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    rng = np.random.default_rng(0)

    def add_matrix(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows, columns // Q4_0_BLOCK, Q4_0_BYTES), np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(SPREAD / 4).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    width, inner = text.hidden_size, text.intermediate_size
    key_width = text.num_key_value_heads * text.head_dim
    add_matrix("token_embd.weight", text.vocab_size, width)
    add_matrix("output.weight", text.vocab_size, width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(num_layers):
        prefix = f"blk.{layer}."
        for name, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", key_width, width),
            ("attn_v", key_width, width),
            ("attn_output", width, width),
            ("ffn_gate", inner, width),
            ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            add_matrix(f"{prefix}{name}.weight", rows, columns)
        for name, size in (("attn_q", width), ("attn_k", key_width), ("attn_v", key_width)):
            writer.add_tensor(f"{prefix}{name}.bias", np.zeros(size, np.float32))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{prefix}{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    target, depths = Path(sys.argv[1]), [int(value) for value in sys.argv[2:]]
    if target.suffix == ".gguf":
        write_gguf(target, *depths)
    else:
        write_folder(target, *depths)
