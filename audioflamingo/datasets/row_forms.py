"""What a row may look like, each turned into the messages of the processor: NVIDIA's, ms-swift's, one of columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from audioflamingo.config import DEFAULT_TRANSCRIPTION_PROMPT
from audioflamingo.errors import DataError
from audioflamingo.processor.conversation import TRANSCRIPTION_PREFIXES

AUDIO_COLUMNS = ("audio_filepath", "audio", "audio_path", "file_name", "file", "path", "wav", "sound")
ANSWER_COLUMNS = (
    "answer", "text", "transcription", "transcript", "sentence", "response", "output", "caption", "label", "target",
)  # fmt: skip
QUESTION_COLUMNS = ("question", "prompt", "instruction", "query")
OPTION_COLUMNS = ("choices", "options")
_MARKER = re.compile(r"<sound(?:-(\d+))?>\n?")
_SWIFT_MARKER = re.compile(r"<audio>\n?")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def messages_of(value: Mapping[str, Any], form: str, prompt: str | None) -> list[dict[str, Any]]:
    """The messages of a row; audio parts hold under `path` whatever the row names its recordings by.

    Raises:
        DataError: the row is not of its form.
        KeyError: a key that the form needs is missing.
    """
    form = form_of(value) if form == "auto" else form
    if form == "nvidia":
        return _nvidia_messages(value)
    if form == "swift":
        return _swift_messages(value)
    if form == "columns":
        return _column_messages(value, prompt)
    return list(value["messages"])


def form_of(value: Mapping[str, Any]) -> str:
    """The form of a row, by its keys."""
    if "conversations" in value:
        return "nvidia"
    if "messages" in value:
        return "swift" if "audios" in value or _has_tag(value["messages"]) else "conversations"
    if "query" in value and "response" in value:
        return "swift"
    has_columns = any(name in value for name in (*AUDIO_COLUMNS, *ANSWER_COLUMNS))
    return "columns" if has_columns else "conversations"


def _has_tag(messages: Any) -> bool:
    return isinstance(messages, list) and any(
        isinstance(m, dict) and isinstance(m.get("content"), str) and "<audio>" in m["content"]
        for m in messages
    )


def _nvidia_messages(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turns `conversations` into messages: `<sound>` is the next clip, `<sound-2>` the second of the list.

    A row without markers has its clips in front of the first question, as NVIDIA's own loader does.
    """
    sound = value.get("sound")
    clips = list(sound) if isinstance(sound, list | tuple) else [] if sound is None else [sound]
    turns = []
    for turn in value["conversations"]:
        if turn["from"] not in _SPEAKERS:
            raise DataError(f"the speaker {turn['from']!r} is not one of {', '.join(_SPEAKERS)}")
        turns.append((_SPEAKERS[turn["from"]], turn["value"]))
    return _with_clips(turns, clips, _MARKER, "<sound>")


def _swift_messages(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ms-swift's rows: messages of text with `<audio>` for each of `audios`, or `query`, `response` and `history`."""
    audios = value.get("audios")
    clips = list(audios) if isinstance(audios, list | tuple) else [] if audios is None else [audios]
    clips = [clip["path"] if isinstance(clip, Mapping) else clip for clip in clips]
    if "messages" in value:
        turns = [(message["role"], message["content"]) for message in value["messages"]]
    else:
        pairs = [*(value.get("history") or []), (value["query"], value["response"])]
        system = [("system", value["system"])] if value.get("system") else []
        turns = system + [
            turn for query, answer in pairs for turn in (("user", query), ("assistant", answer))
        ]
    for role, text in turns:
        if role not in _SPEAKERS or not isinstance(text, str):
            raise DataError(f"a message of role {role!r} with {type(text).__name__} is not known; text is")
    return _with_clips([(_SPEAKERS[role], text) for role, text in turns], clips, _SWIFT_MARKER, "<audio>")


def _with_clips(
    turns: Sequence[tuple[str, str]], clips: Sequence[Any], marker: re.Pattern[str], name: str
) -> list[dict[str, Any]]:
    """Messages with clips where their markers stand; without markers in front of the first question."""
    has_markers = any(role == "user" and marker.search(text) for role, text in turns)
    used: set[int] = set()
    num_plain = 0
    messages: list[dict[str, Any]] = []
    for role, text in turns:
        if role != "user":
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
            continue
        parts: list[dict[str, Any]] = []
        if not has_markers and not any(message["role"] == "user" for message in messages):
            parts += [{"type": "audio", "path": clip} for clip in clips]
            used.update(range(len(clips)))
        end = 0
        for match in marker.finditer(text):
            parts.append({"type": "text", "text": text[end : match.start()]})
            end = match.end()
            number = match[1] if marker.groups else None
            index = int(number) - 1 if number else num_plain
            num_plain += not number
            if not 0 <= index < len(clips):
                raise DataError(
                    f"{match[0].strip()} is number {index + 1}, but the row has {len(clips)} clip(s)"
                )
            used.add(index)
            parts.append({"type": "audio", "path": clips[index]})
        parts.append({"type": "text", "text": text[end:].rstrip("\n") if end else text})
        messages.append({"role": role, "content": [part for part in parts if part.get("text") != ""]})
    if len(used) != len(clips):
        raise DataError(f"{len(clips)} clips, of which only {len(used)} are named by a {name} marker")
    return messages


def _column_messages(value: Mapping[str, Any], prompt: str | None) -> list[dict[str, Any]]:
    """A recording and its answer: to a question in the row, to `prompt`, or the transcript."""
    audio = _first(value, AUDIO_COLUMNS)
    answer = _first(value, ANSWER_COLUMNS)
    question = _first(value, QUESTION_COLUMNS) or prompt
    if audio is None or answer is None:
        missing, names = ("recording", AUDIO_COLUMNS) if audio is None else ("answer", ANSWER_COLUMNS)
        raise DataError(f"there is no {missing}: none of the columns {', '.join(names)}")
    if isinstance(audio, Mapping):
        audio = audio["path"]
    answer = str(answer).strip()
    if (options := _first(value, OPTION_COLUMNS)) is not None:
        question, answer = _as_choice(question, options, answer)
    elif question is None:
        question = DEFAULT_TRANSCRIPTION_PROMPT
        answer = answer and f'{TRANSCRIPTION_PREFIXES[0]} "{answer}".'
    content = [{"type": "text", "text": str(question)}, {"type": "audio", "path": audio}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _as_choice(question: Any, options: Any, answer: str) -> tuple[str, str]:
    """A question with its options as `(A) ...`, and the answer in that form."""
    if question is None:
        raise DataError("there are options, but no question")
    texts = [str(option).strip() for option in options] if isinstance(options, list | tuple) else []
    if len(texts) < 2:
        raise DataError(f"options must be a list of two or more, got {options!r}")
    labelled = [f"({chr(ord('A') + number)}) {text}" for number, text in enumerate(texts)]
    plain = answer.strip("() .")
    by_letter = ord(plain) - ord("A") if len(plain) == 1 and plain.isupper() else -1
    number = texts.index(answer) if answer in texts else by_letter
    if not 0 <= number < len(texts):
        raise DataError(f"the answer {answer!r} is none of the options {texts}")
    return "\n".join([str(question), *labelled]), labelled[number]


def _first(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), None)
