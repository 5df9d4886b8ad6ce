"""Asks a question about a clip: `python examples/ask.py bird.wav "What is this?"`."""

from __future__ import annotations

import os
import sys

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor

MODEL = os.environ.get("AF3_MODEL", "nano")

if __name__ == "__main__":
    clip, question = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")
    content = [{"type": "text", "text": question}, {"type": "audio", "path": clip}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True
    ).to(model.device, dtype=model.dtype)
    outputs = model.generate(**inputs, max_new_tokens=200)
    print(processor.decode(outputs[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
