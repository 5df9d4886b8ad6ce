"""Talks about a clip, which is encoded once: `python examples/chat.py song.mp3 < questions.txt`."""

from __future__ import annotations

import os
import sys

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, Chat

MODEL = os.environ.get("AF3_MODEL", "nano")

if __name__ == "__main__":
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")
    chat = Chat(model, processor)
    chat.add_audio(sys.argv[1])
    for question in filter(None, map(str.strip, sys.stdin)):
        for piece in chat.ask(question, max_new_tokens=200):
            print(piece, end="", flush=True)
        print(f"   [{chat.num_reused} tokens were read before]")
