"""A page to record or drop a clip and ask about it: `pip install gradio`, then `python examples/gradio_app.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import gradio

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, Chat

MODEL = os.environ.get("AF3_MODEL", "nano")


def main() -> None:
    """Serves the page."""
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")

    def answer(path: str, question: str) -> Iterator[str]:
        chat = Chat(model, processor)
        chat.add_audio(path)
        text = ""
        for piece in chat.ask(question, max_new_tokens=200):
            text += piece
            yield text

    clip = gradio.Audio(type="filepath", label="Clip")
    question = gradio.Textbox("What is the sound in this audio?", label="Question")
    gradio.Interface(
        answer, [clip, question], gradio.Textbox(label="Answer"), title="Audio Flamingo 3"
    ).launch()


if __name__ == "__main__":
    main()
