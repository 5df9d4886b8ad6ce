"""Conversations as callers write them, checked once and turned into plain data.

A conversation is a list of messages `{"role", "content"}`; the content is a string or a list of parts
`{"type": "text", "text"}` and `{"type": "audio", "path" | "url" | "audio"}`. Nothing is guessed: a key or a
part that means nothing here is an error, because a prompt that silently lost its audio gives a plausible
wrong answer. `strip_framing` takes away the sentence that the model writes around a transcript.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from audioflamingo.errors import ArgumentError, PromptError, unknown_arguments
from audioflamingo.processor.clips import Clip
from audioflamingo.processor.thoughts import split_thoughts

ROLES = ("system", "user", "assistant")
AUDIO_SOURCE_KEYS = ("path", "url", "audio", "audio_url")  # the last in Qwen2-Audio's conversations
TRANSCRIPTION_PREFIXES = (
    "The spoken content of the audio is",
    "The transcription of the audio is",
    "The content of the input audio is",
)
PLACEHOLDER = re.compile(r"<sound(?:-(\d{1,3}))?>")
QUOTES = ("'", '"')
_ALLOWED_KEYS = {"text": ("type", "text"), "audio": ("type", *AUDIO_SOURCE_KEYS, "sampling_rate")}


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: who says it.
        parts: in order.
        is_string: whether its content was a string, not a list.
        is_placed: whether its text says where clips stand: then even a single one stands there, whatever the template.
    """

    role: str
    parts: tuple[str | Clip, ...]
    is_string: bool
    is_placed: bool = False

    @property
    def clips(self) -> list[Clip]:
        """The audio parts in order."""
        return [part for part in self.parts if isinstance(part, Clip)]

    @property
    def texts(self) -> list[str]:
        """The text parts in order."""
        return [part for part in self.parts if isinstance(part, str)]


Conversation = list[Turn]


def clips_of(conversation: Conversation) -> list[Clip]:
    """All audio of a conversation, in order."""
    return [clip for turn in conversation for clip in turn.clips]


def texts_of(conversation: Conversation) -> list[str]:
    """All text of a conversation, in order."""
    return [text for turn in conversation for text in turn.texts]


def with_newlines(conversation: Conversation) -> Conversation:
    """Sets runs of clips off from the text around them as NVIDIA's own scripts do.

    A line feed stands between clips and text, none at the end, and no spaces beside it. Clips stand where the text of
    their message has `<sound>` (the next one) or `<sound-k>` (its k-th); without those, where they were put, a single
    one first.

    Raises:
        PromptError: a placeholder without a clip, or a clip without one.
    """
    return [_spread(turn) if turn.clips else turn for turn in conversation]


def _spread(turn: Turn) -> Turn:
    parts: list[str | Clip] = list(turn.parts)
    is_placed = any(PLACEHOLDER.search(text) for text in turn.texts)
    if is_placed:
        parts = _placed(turn)
    elif len(turn.clips) == 1:
        parts = [*turn.clips, "".join(turn.texts)]
    spread: list[str | Clip] = []
    for part in parts:
        if isinstance(part, str) and not (part := part.strip()):
            continue
        if spread and isinstance(part, Clip) != isinstance(spread[-1], Clip):
            spread.append("\n")
        elif spread and isinstance(part, str):
            spread.append(" ")
        spread.append(part)
    return Turn(turn.role, tuple(spread), turn.is_string, is_placed)


def _placed(turn: Turn) -> list[str | Clip]:
    """Text with clips where its placeholders stand: `<sound>` is the next clip, `<sound-2>` the second of the message.

    Raises:
        PromptError: a placeholder without a clip, or a clip without one.
    """
    clips, unused = turn.clips, list(range(len(turn.clips)))
    parts: list[str | Clip] = []
    end, text = 0, "".join(turn.texts)
    for found in PLACEHOLDER.finditer(text):
        index = int(found[1]) - 1 if found[1] else next(iter(unused), len(clips))
        if not 0 <= index < len(clips):
            raise PromptError(f"{found[0]} names no clip: the message has {len(clips)}.")
        unused = [other for other in unused if other != index]
        parts += [text[end : found.start()], clips[index]]
        end = found.end()
    if unused:
        named = ", ".join(f"<sound-{index + 1}>" for index in unused)
        raise PromptError(
            f"the text says where clips stand, but not where {named}; add it, or leave all out."
        )
    return [*parts, text[end:]]


def transcription_conversations(sources: list[Any], prompt: Any, default_prompt: str) -> list[Any]:
    """Writes requests to transcribe clips as conversations of one message.

    Args:
        sources: at least one clip.
        prompt: the instruction: one for all clips or a list with one for each; None stands for the default.
        default_prompt: the default instruction.

    Raises:
        PromptError: no clip, or another number of prompts than of clips.
        ArgumentError: a prompt that is no string.
    """
    if not sources:
        raise PromptError("a transcription request needs at least one clip.")
    prompts = list(prompt) if _is_list(prompt) else [prompt] * len(sources)
    if len(prompts) != len(sources):
        raise PromptError(f"there are {len(prompts)} prompts for {len(sources)} clips; give one for each.")
    if not all(item is None or isinstance(item, str) for item in prompts):
        raise ArgumentError("prompt must be a string, a list of strings (None for the default), or None.")
    return [
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": default_prompt if text is None else text},
                    {"type": "audio", "audio": source},
                ],
            }
        ]
        for source, text in zip(sources, prompts, strict=True)
    ]


def parse_conversations(conversation: Any) -> tuple[list[Conversation], bool]:
    """Checks one conversation or a batch of them.

    Args:
        conversation: a list of messages, or a list of such lists.

    Returns:
        The conversations, and whether a batch was given.

    Raises:
        PromptError: something has the wrong form. The message says which conversation, message and part.
        ArgumentError: a message or a part has an unknown key.
    """
    if not _is_list(conversation):
        raise PromptError(f"a conversation is a list of messages, got {_kind(conversation)}.")
    if not conversation:
        raise PromptError("a conversation needs at least one message, and a batch at least one conversation.")
    if not any(_is_list(item) for item in conversation):
        return [_parse_conversation(conversation, "")], False
    for index, item in enumerate(conversation):
        if not _is_list(item):
            raise PromptError(
                f"a batch holds conversations (lists of messages); item {index} is {_kind(item)}."
            )
    return [_parse_conversation(item, f"conversation {i}, ") for i, item in enumerate(conversation)], True


def _parse_conversation(messages: Sequence[Any], where: str) -> Conversation:
    if not messages:
        raise PromptError(f"{where}no message: a conversation needs at least one.")
    return [_parse_message(message, f"{where}message {index}") for index, message in enumerate(messages)]


def _parse_message(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where}: a message is a dict with 'role' and 'content', got {_kind(message)}.")
    given = _without_none(message)
    unknown = [str(key) for key in given if key not in ("role", "content")]
    if unknown:
        raise unknown_arguments(where, unknown, ("role", "content"))
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise PromptError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        return Turn(role, (_checked_text(content, where),), is_string=True)
    if not _is_list(content):
        raise PromptError(f"{where}: 'content' must be a string or a list of parts, got {_kind(content)}.")
    parts = tuple(_parse_part(part, f"{where}, part {index}") for index, part in enumerate(content))
    turn = Turn(role, parts, is_string=False)
    if turn.clips and role != "user":
        raise PromptError(f"{where}: audio belongs in a user message, not in one of role {role!r}.")
    return turn


def _parse_part(part: Any, where: str) -> str | Clip:
    if not isinstance(part, Mapping):
        raise PromptError(f"{where}: a part is a dict with a 'type', got {_kind(part)}.")
    given = _without_none(part)
    kind = given.get("type")
    if kind not in _ALLOWED_KEYS:
        raise PromptError(f"{where}: type {kind!r} is not one of {', '.join(map(repr, _ALLOWED_KEYS))}.")
    unknown = [str(key) for key in given if key not in _ALLOWED_KEYS[kind]]
    if unknown:
        raise unknown_arguments(f"{where} ({kind})", unknown, _ALLOWED_KEYS[kind])
    if kind == "text":
        return _checked_text(given.get("text"), where)
    keys = [key for key in AUDIO_SOURCE_KEYS if key in given]
    if len(keys) != 1:
        found = f"has {' and '.join(map(repr, keys))}" if keys else "has none"
        raise PromptError(
            f"{where}: an audio part needs exactly one of 'path', 'url' and 'audio'; this one {found}."
        )
    return Clip(given[keys[0]], given.get("sampling_rate"), keys[0])


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise PromptError(f"{where}: 'text' must be a string, got {_kind(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where}: the text is not valid Unicode ({error}).") from error
    return str(text)


def _without_none(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """Clients often send keys that are not set as None."""
    return {key: value for key, value in mapping.items() if value is not None}


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def strip_framing(text: str) -> str:
    """Takes away thoughts, a known opening, the full stop behind the quotes, and one pair of matching quotes.

    A text with neither opening nor quotes keeps its full stop: it is the transcript's own.

    Args:
        text: a decoded answer.

    Returns:
        The transcript, without white space around it.
    """
    stripped = split_thoughts(text)[1].strip()
    prefix = next((prefix for prefix in TRANSCRIPTION_PREFIXES if stripped.startswith(prefix)), "")
    stripped = stripped[len(prefix) :].strip()
    body = stripped[:-1].strip() if stripped.endswith(".") else stripped
    if len(body) >= 2 and body[0] == body[-1] and body[0] in QUOTES:
        return body[1:-1].strip()
    return body if prefix else stripped
