"""Asks a running server (`af3 serve`) through the `openai` package: `python examples/client.py talk.wav`.

`OPENAI_BASE_URL` says where it is, `OPENAI_API_KEY` is its key.
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

if __name__ == "__main__":
    clip = Path(sys.argv[1])
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id
    with clip.open("rb") as file:
        print(client.audio.transcriptions.create(model=model, file=file).text)
    audio = {"data": base64.b64encode(clip.read_bytes()).decode(), "format": "wav"}
    question = {"type": "text", "text": "Is someone speaking?"}
    messages: Any = [{"role": "user", "content": [question, {"type": "input_audio", "input_audio": audio}]}]
    answer = client.chat.completions.create(model=model, messages=messages, stream=True)
    for chunk in answer:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
