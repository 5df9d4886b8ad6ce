"""Writes a model in 4 bits and answers with it: `python examples/quantize.py out/ clip.wav`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, quantize

MODEL = os.environ.get("AF3_MODEL", "nano")

if __name__ == "__main__":
    folder, clip = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL)
    quantize(model, "int4")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    print(f"{folder}: {size / 1e6:.1f} MB of weights")

    small = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
    inputs = processor.apply_transcription_request(audio=clip)
    outputs = small.generate(**inputs, max_new_tokens=100)
    print(
        processor.decode(outputs[0, inputs.input_ids.shape[1] :], skip_special_tokens=True, strip_prefix=True)
    )
