"""From a conversation to the ids of its prompt.

The template that the checkpoint ships is rendered, in Jinja's sandbox. What the caller wrote never turns into
control tokens: markers are put into it before the template sees it, control tokens are looked for in the
marked text, and the markers are taken out of what is left (see `Tokenizer.guard`). A template that looks for
control tokens in the text of a message does not find them.

The published template gives a turn one audio token, in front, however many clips it has. Where a template
loses clips like that, turns are handed to it as strings in which each audio token stands where its clip
stands; everything around them stays the template's own. A turn with one clip keeps its audio token in front.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import Any, NoReturn

import numpy as np

from audioflamingo.config import IGNORED_LABEL
from audioflamingo.errors import ArgumentError, PromptError
from audioflamingo.processor.clips import Clip
from audioflamingo.processor.conversation import Conversation, Turn, clips_of, texts_of
from audioflamingo.processor.prompt import PromptText
from audioflamingo.processor.tokenizer import Tokenizer

DEFAULT_CHAT_TEMPLATE = """\
{% if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{% endif %}
{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' -}}
{% if message.content is string %}
{{- message.content -}}
{% else %}
{{- audio_token if message.content | selectattr('type', 'equalto', 'audio') | list else '' -}}
{{- message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -}}
{% endif %}
{{- '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""
"""Stands in where a checkpoint ships no template: the published one."""


# Where `RenderedPrompt.encode` is: in an answer, or after one with nothing but white space since.
_OUTSIDE, _INSIDE, _ENDING = "outside", "inside", "ending"


@dataclass(frozen=True)
class Markers:
    """Characters that occur nowhere else in a conversation, each with one meaning.

    Attributes:
        guard: keeps control tokens from being found.
        start: where the assistant begins to speak.
        end: where the assistant ends.
        cut: where the prompt ends, to be continued by the model.
    """

    guard: str
    start: str
    end: str
    cut: str

    @classmethod
    def unused_in(cls, texts: Iterable[str]) -> Markers:
        """Picks code points that mean nothing in Unicode: noncharacters first, then private use."""
        used = set().union(*texts)
        codes = chain(range(0xFDD0, 0xFDF0), range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
        free = (chr(code) for code in codes if chr(code) not in used)
        return cls(next(free), next(free), next(free), next(free))

    def remove(self, text: str, which: str | None = None) -> str:
        """Takes the markers out, all of them or those in `which`."""
        return text.translate(
            {ord(marker): None for marker in which or self.guard + self.start + self.end + self.cut}
        )


@dataclass(frozen=True)
class RenderedPrompt:
    """A rendered conversation.

    Attributes:
        text: the prompt as one string.
        pieces: the same, cut at the control tokens: (text, None), still with markers, and (token, id).
        markers: the markers.
    """

    text: str
    pieces: list[tuple[str, int | None]]
    markers: Markers

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Encodes the prompt.

        Returns:
            The ids, and as many labels: the id where the assistant speaks, `IGNORED_LABEL` elsewhere
            (everywhere if answers were not marked). The control token that ends an answer belongs to it, what
            follows does not. A token that lies half in an answer (the template's line feed merged with the
            answer's) belongs to it too.
        """
        ids: list[int] = []
        labels: list[int] = []
        state = _OUTSIDE
        for piece, token_id in self.pieces:
            if token_id is not None:
                ids.append(token_id)
                labels.append(token_id if state is not _OUTSIDE else IGNORED_LABEL)
                state = _OUTSIDE if state is _ENDING else state
                continue
            plain, spans, state = self._find_answers(piece, state)
            encoding = tokenizer.plain_encoding(plain)
            ids.extend(encoding.ids)
            for found, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                is_answer = any(start < span_end and end > span_start for span_start, span_end in spans)
                labels.append(found if is_answer else IGNORED_LABEL)
        return ids, labels

    def prompt_text(
        self, tokenizer: Tokenizer, audio_token_id: int, labels: bool | str = False
    ) -> PromptText:
        """Encodes the prompt with labels of everything (True), of answers ("assistant"), or none (False)."""
        ids, answers = (np.array(row, dtype=np.int32) for row in self.encode(tokenizer))
        return PromptText(
            ids, audio_token_id, (answers if labels == "assistant" else ids) if labels else None
        )

    def _find_answers(self, piece: str, state: str) -> tuple[str, list[tuple[int, int]], str]:
        """Takes the markers out of a piece.

        Returns:
            The plain text, the spans of it that belong to answers, and the state at its end.
        """
        plain = ""
        spans = []
        for run in re.split(f"([{self.markers.start}{self.markers.end}])", piece):
            if run == self.markers.start:
                state = _INSIDE
            elif run == self.markers.end:
                state = _ENDING
            elif text := self.markers.remove(run):
                if state is _ENDING and not text.isspace():
                    state = _OUTSIDE
                if state is not _OUTSIDE:
                    spans.append((len(plain), len(plain) + len(text)))
                plain += text
        return plain, spans, state


def render_conversation(
    conversation: Conversation,
    template: str,
    tokenizer: Tokenizer,
    audio_token: str,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    mark_answers: bool = False,
) -> RenderedPrompt:
    """Renders one conversation.

    Args:
        conversation: the checked turns.
        template: Jinja source.
        tokenizer: knows the control tokens.
        audio_token: the control token that stands for a clip.
        add_generation_prompt: end with the head of the assistant's next turn.
        continue_final_message: end inside the last message, for the model to go on with.
        mark_answers: let `encode` label what the assistant says.

    Raises:
        PromptError: the template fails, or does not carry the clips or answers of the conversation.
    """
    if continue_final_message and not conversation[-1].texts:
        raise PromptError("continue_final_message: the last message has no text to continue.")
    markers = Markers.unused_in([template, audio_token, *tokenizer.control_tokens, *texts_of(conversation)])
    renderer = _Renderer(conversation, template, tokenizer, audio_token, markers, add_generation_prompt)
    text = renderer.render_with_all_clips(continue_final_message)
    if mark_answers:
        text = renderer.mark_answers(text)
    return RenderedPrompt(markers.remove(text), list(tokenizer.split(text)), markers)


class _Parts(list[dict[str, str]]):
    """The parts of a message. A template for strings would print their Python form, which is never wanted."""

    def __repr__(self) -> str:
        raise TypeError("it prints a list of parts as if it were text")

    __str__ = __repr__


class _Renderer:
    """One conversation and the ways to hand it to a template."""

    def __init__(
        self,
        conversation: Conversation,
        template: str,
        tokenizer: Tokenizer,
        audio_token: str,
        markers: Markers,
        add_generation_prompt: bool,
    ) -> None:
        self.conversation = conversation
        self.template = compile_template(template)
        self.tokenizer = tokenizer
        self.audio_token = audio_token
        self.markers = markers
        self.variables = {
            **tokenizer.special_tokens_map,
            "audio_token": audio_token,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        self.as_strings = False

    def render_with_all_clips(self, is_cut: bool) -> str:
        """Renders with lists of parts; if the template then loses clips, or takes no lists, with strings."""
        num_clips = len(clips_of(self.conversation))
        audio_token_id = self.tokenizer.convert_tokens_to_ids(self.audio_token)
        num_found = -1
        is_placed = any(turn.is_placed for turn in self.conversation)
        for self.as_strings in (True,) if is_placed else (False, True):
            try:
                text = self.render(is_cut=is_cut)
            except PromptError:
                if self.as_strings or all(turn.is_string for turn in self.conversation):
                    raise
                continue
            num_found = sum(token_id == audio_token_id for _, token_id in self.tokenizer.split(text))
            if num_found == num_clips:
                return text
        raise PromptError(
            f"the chat template writes {num_found} {self.audio_token} where {num_clips} clips are."
        )

    def mark_answers(self, text: str) -> str:
        """Renders again with markers around the assistant's text; nothing else may change."""
        ends = (self.markers.start, self.markers.end)
        num_answers = sum(turn.role == "assistant" for turn in self.conversation)
        for inside_spaces in (False, True):  # a template that trims needs the markers inside the spaces
            marked = self.render(inside_spaces=inside_spaces)
            is_same = self.markers.remove(marked, "".join(ends)) == text
            if is_same and [marked.count(marker) for marker in ends] == [num_answers, num_answers]:
                return marked
        raise PromptError(
            "labels for the assistant's text: the chat template changes that text, so it cannot be found."
        )

    def render(self, *, is_cut: bool = False, inside_spaces: bool | None = None) -> str:
        """Renders, with a cut in the last message or with markers around answers where asked for."""
        messages = [self._message(turn, inside_spaces) for turn in self.conversation]
        if is_cut:
            self._add_cut(messages[-1])
        try:
            text = self.template.render(messages=messages, **self.variables)
        except Exception as error:  # a template can raise anything that an expression can
            raise PromptError(f"the chat template failed: {error}.") from error
        return self._cut(text) if is_cut else text

    def _message(self, turn: Turn, inside_spaces: bool | None) -> dict[str, Any]:
        texts = [self.tokenizer.guard(text, self.markers.guard) for text in turn.texts]
        if inside_spaces is not None and turn.role == "assistant":
            texts = texts or [""]
            end = len(texts[-1].rstrip()) if inside_spaces else len(texts[-1])
            texts[-1] = texts[-1][:end] + self.markers.end + texts[-1][end:]
            start = len(texts[0]) - len(texts[0].lstrip()) if inside_spaces else 0
            texts[0] = texts[0][:start] + self.markers.start + texts[0][start:]
        if turn.is_string:
            return {"role": turn.role, "content": texts[0]}
        if self.as_strings:
            return {"role": turn.role, "content": self._as_string(turn, texts)}
        remaining = iter(texts)
        parts = _Parts(
            {"type": "audio", part.key: "audio"}
            if isinstance(part, Clip)
            else {"type": "text", "text": next(remaining)}
            for part in turn.parts
        )
        parts.extend({"type": "text", "text": text} for text in remaining)
        return {"role": turn.role, "content": parts}

    def _as_string(self, turn: Turn, texts: list[str]) -> str:
        if len(turn.clips) == 1 and not turn.is_placed:
            return self.audio_token + "".join(texts)
        remaining = iter(texts)
        body = "".join(self.audio_token if isinstance(part, Clip) else next(remaining) for part in turn.parts)
        return body + "".join(remaining)

    def _add_cut(self, message: dict[str, Any]) -> None:
        """Marks the end of the last text. The space behind the marker shows whether the template trims."""
        if isinstance(message["content"], str):
            message["content"] += self.markers.cut + " "
            return
        last = [part for part in message["content"] if part["type"] == "text"][-1]
        last["text"] += self.markers.cut + " "

    def _cut(self, text: str) -> str:
        at = text.rfind(self.markers.cut)
        if at < 0:
            raise PromptError(
                "continue_final_message: the chat template does not show the end of the last message."
            )
        is_trimmed = text[at + 1 : at + 2] != " "
        return text[:at].rstrip() if is_trimmed else text[:at]


def choose_template(known: str | dict[str, str], wanted: str | None) -> str:
    """Source of the template to use: the given one, the one of the given name, or the default.

    Args:
        known: the processor's template, or several by name.
        wanted: Jinja source, or a name; None takes the default.

    Raises:
        PromptError: none is the default.
        ArgumentError: `wanted` is no text.
    """
    if not isinstance(wanted, str | None):
        raise ArgumentError(f"chat_template must be Jinja source or a name, got {type(wanted).__name__}.")
    named = known if isinstance(known, dict) else {"default": known}
    if wanted is None and "default" not in named:
        raise PromptError(
            f"none of the chat templates is the default: pass chat_template= one of {', '.join(named)}."
        )
    return named["default"] if wanted is None else named.get(wanted, wanted)


@lru_cache(maxsize=32)
def compile_template(source: str) -> Any:
    """Compiles a chat template for Jinja's sandbox, with the helpers that templates on the hub rely on.

    Raises:
        PromptError: the template is not valid Jinja.
    """
    import jinja2
    from jinja2 import ext, nodes, parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(ext.Extension):
        """`{% generation %}` marks the assistant's text for other tools; here it is only passed through."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise PromptError(f"the chat template is not valid Jinja: {error}.") from error
