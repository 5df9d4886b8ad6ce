"""Records some seconds and transcribes them: `pip install sounddevice`, then `python examples/microphone.py 5`."""

from __future__ import annotations

import os
import sys

import sounddevice

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, transcribe

MODEL = os.environ.get("AF3_MODEL", "nano")
SAMPLING_RATE = 16000

if __name__ == "__main__":
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")
    num_samples = int(float(sys.argv[1]) * SAMPLING_RATE)
    print("speak")
    recording = sounddevice.rec(
        num_samples, samplerate=SAMPLING_RATE, channels=1, dtype="float32", blocking=True
    )
    for segment in transcribe(model, processor, recording[:, 0], sampling_rate=SAMPLING_RATE):
        print(segment.text)
