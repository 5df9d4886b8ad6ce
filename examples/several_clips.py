"""Asks one question about several clips, each named where it stands: `python examples/several_clips.py a.wav b.wav`."""

from __future__ import annotations

import os
import sys
from typing import Any

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor

MODEL = os.environ.get("AF3_MODEL", "nano")

if __name__ == "__main__":
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")
    content: list[dict[str, Any]] = []
    for number, clip in enumerate(sys.argv[1:], 1):
        content += [{"type": "text", "text": f"Recording {number}: "}, {"type": "audio", "path": clip}]
    content.append({"type": "text", "text": " In which recording does a person speak?"})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True
    ).to(model.device, dtype=model.dtype)
    outputs = model.generate(**inputs, max_new_tokens=50)
    print(processor.decode(outputs[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
