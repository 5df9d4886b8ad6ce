"""Asks the same about many clips, a batch at a time, one JSON line each: `python examples/batch.py *.wav`."""

from __future__ import annotations

import json
import os
import sys

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor

MODEL = os.environ.get("AF3_MODEL", "nano")
QUESTION = "What is the sound in this audio?"
BATCH_SIZE = 8

if __name__ == "__main__":
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")
    paths = sys.argv[1:]
    for first in range(0, len(paths), BATCH_SIZE):
        clips = paths[first : first + BATCH_SIZE]
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": QUESTION}, {"type": "audio", "path": clip}],
                }
            ]
            for clip in clips
        ]
        inputs = processor.apply_chat_template(
            conversations, tokenize=True, add_generation_prompt=True, return_dict=True
        ).to(model.device, dtype=model.dtype)
        outputs = model.generate(**inputs, max_new_tokens=50)
        answers = processor.decode(outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for clip, answer in zip(clips, answers, strict=True):
            print(json.dumps({"clip": clip, "answer": answer}))
