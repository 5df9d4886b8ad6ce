"""Transcribes a short clip and prints words as they come: `python examples/stream.py talk.wav`."""

from __future__ import annotations

import os
import sys

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, StreamDecoder

MODEL = os.environ.get("AF3_MODEL", "nano")

if __name__ == "__main__":
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")
    inputs = processor.apply_transcription_request(audio=sys.argv[1]).to(model.device, dtype=model.dtype)
    decoder = StreamDecoder(processor.tokenizer)
    # One beam: the answer of a search is known only when the search ends.
    for step in model.stream(**inputs, max_new_tokens=500, num_beams=1):
        print(decoder.put(step.token_ids), end="", flush=True)
    print(decoder.end())
