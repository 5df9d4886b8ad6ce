"""What the checkpoints of the family were trained to be asked, to the letter: system texts, tasks, ways to answer.

Imports nothing heavy, so that the command line can show its help at once.

Sources: the model cards of NVIDIA's checkpoints and the prompts in their repository. An odd spelling was trained with
and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from audioflamingo.config import DEFAULT_TRANSCRIPTION_PROMPT

AF3_SYSTEM_PROMPT = "You are a helpful assistant."
MUSIC_FLAMINGO_SYSTEM_PROMPT = (
    "You are Music Flamingo, a multimodal assistant for language and music. On each turn you receive an audio clip "
    "which contains music and optional text, you will receive at least one or both; use your world knowledge and "
    "reasoning to help the user with any task. Interpret the entirety of the content any input music--regardlenss of "
    "whether the user calls it audio, music, or sound."
)
AF_NEXT_SYSTEM_PROMPT = (
    "You are Audio Flamingo-Next, a multimodal assistant for language and audio. On each turn you receive an optional "
    "audio clip which may contain speech, music, or ambient sounds and optional text, you will receive at least one or "
    "both; use your world knowledge and reasoning to help the user with any task. Interpret the entirety of the "
    "content of any input audio\u2014regardless of whether the user calls it audio, speech, music, or sound."
)
SYSTEM_PROMPTS = {
    "audio-flamingo-3": AF3_SYSTEM_PROMPT,
    "music-flamingo": MUSIC_FLAMINGO_SYSTEM_PROMPT,
    "audio-flamingo-next": AF_NEXT_SYSTEM_PROMPT,
}
THINK_SUFFIX = "Please think and reason about the input audio before you respond."


@dataclass(frozen=True)
class Task:
    """A prompt that a checkpoint was trained with.

    Attributes:
        prompt: to be sent as it is, once the words in angle brackets are filled in.
        models: the checkpoints it is published for.
    """

    prompt: str
    models: str


_AF3, _NEXT = "audio-flamingo-3", "audio-flamingo-next"
_MUSIC = "music-flamingo"
TASKS = {
    "transcribe": Task(DEFAULT_TRANSCRIPTION_PROMPT, f"{_AF3}, {_NEXT}"),
    "translate": Task("Translate any speech you hear from <src_lang> into <tgt_lang>.", _NEXT),
    "caption": Task("Please describe the audio in detail.", _AF3),
    "caption-think": Task(
        "Generate a detailed caption for the input audio, describing all notable speech, sound, and musical events "
        "comprehensively. In the caption, transcribe all spoken content by all speakers in the audio precisely.",
        f"{_AF3} with its think adapter",
    ),
    "caption-short": Task("Generate a caption for the input audio.", f"{_NEXT} captioner, think"),
    "caption-long": Task(
        "Generate a detailed caption for the input audio. In the caption, transcribe all spoken content by all "
        "speakers in the audio precisely.",
        f"{_NEXT} captioner, think",
    ),
    "caption-music": Task(
        "Summarize the track with precision: mention its musical style, BPM, key, arrangement, production choices, and "
        "the emotions or story it conveys.",
        _NEXT,
    ),
    "lyrics": Task("Generate a lyrics transcription from the input song.", _NEXT),
    "speakers": Task(
        "Transcribe the input audio. If multiple speakers are present, provide diarized transcripts with speaker "
        "labels.\n[Speaker 1] ...\n[Speaker 2] ...",
        _NEXT,
    ),
    "reason": Task("Reason step by step with timestamps, then give the final answer.", f"{_NEXT} think"),
    "track": Task(
        "Describe this track in full detail - tell me the genre, tempo, and key, then dive into the instruments, "
        "production style, and overall mood it creates.",
        _MUSIC,
    ),
    "track-caption": Task(
        "Write a rich caption that blends the technical details (genre, BPM, key, chords, mix) with how the song feels "
        "emotionally and dynamically as it unfolds.",
        _MUSIC,
    ),
    "track-critic": Task(
        "Break the track down like a critic - list its tempo, key, and chordal motion, then explain the textures, "
        "dynamics, and emotional impact of the performance.",
        _MUSIC,
    ),
    "track-lens": Task(
        "Describe this song from both a technical and artistic lens: mention tempo, harmony, and instrumentation, but "
        "also mood, lyrical themes, and structure.",
        _MUSIC,
    ),
    "track-json": Task(
        "Describe this track. Output a JSON with keys and values about key aspects of the music.", _MUSIC
    ),
    "lyric-sheet": Task("Generate a structured lyric sheet from the input music.", _MUSIC),
    # Not published: plain questions.
    "sound": Task("What is the sound in this audio?", "any"),
    "music": Task("Which instrument is playing in this audio?", "any"),
    "emotion": Task("What is the emotion of the speaker?", "any"),
    "language": Task("Which language is spoken in this audio?", "any"),
}


GENERATION_PRESETS: dict[str, dict[str, Any]] = {
    "audio-flamingo-next": {"repetition_penalty": 1.2, "max_new_tokens": 1024},
    "audio-flamingo-next-think": {"repetition_penalty": 1.2, "max_new_tokens": 4096},
    "music-flamingo": {"max_new_tokens": 2048},
}
