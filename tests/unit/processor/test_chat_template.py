"""From conversations to prompts: checks, templates, clips in their places, text that stays text, labels."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audioflamingo.config import IGNORED_LABEL
from audioflamingo.errors import ArgumentError, PromptError
from audioflamingo.processor.chat_template import (
    DEFAULT_CHAT_TEMPLATE,
    Markers,
    RenderedPrompt,
    render_conversation,
)
from audioflamingo.processor.conversation import clips_of, parse_conversations
from audioflamingo.processor.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import (
    AUDIO_TOKEN_ID,
    CONTROL_TOKENS,
    PUBLISHED_CHAT_TEMPLATE,
    build_tiny_backend,
)

TOKENIZER = Tokenizer(build_tiny_backend(), {"eos_token": "<|im_end|>"})
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CLIP = {"type": "audio", "path": "clip.wav"}

# Templates of other shapes than the published one.
TRIMMING = (
    "{% for m in messages %}[{{ m.role }}]\n"
    "{{ (m.content if m.content is string else m.content | map(attribute='text') | join) | trim }}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
STRINGS_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
)
IN_PLACE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{{ '<sound>' if p.type == 'audio' else p.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
WITHOUT_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def message(role: str, *parts: Any) -> dict[str, Any]:
    """A message of parts; strings are text parts."""
    return {"role": role, "content": [text_part(part) if isinstance(part, str) else part for part in parts]}


def render(
    *messages: dict[str, Any], template: str = PUBLISHED_CHAT_TEMPLATE, **options: Any
) -> RenderedPrompt:
    (conversation,), _ = parse_conversations(list(messages))
    return render_conversation(conversation, template, TOKENIZER, "<sound>", **options)


def answers(prompt: RenderedPrompt) -> list[str]:
    """The labelled runs of a prompt, decoded."""
    ids, labels = prompt.encode(TOKENIZER)
    assert len(ids) == len(labels)
    runs: list[list[int]] = []
    was_labelled = False
    for token_id, label in zip(ids, labels, strict=True):
        is_labelled = label != IGNORED_LABEL
        assert not is_labelled or label == token_id
        if is_labelled and not was_labelled:
            runs.append([])
        if is_labelled:
            runs[-1].append(token_id)
        was_labelled = is_labelled
    return [str(TOKENIZER.decode(run)) for run in runs]


# What is rendered


@pytest.mark.parametrize("template", [PUBLISHED_CHAT_TEMPLATE, DEFAULT_CHAT_TEMPLATE])
def test_published_template(template: str) -> None:
    messages = [
        message("user", "one ", CLIP, "two"),
        {"role": "assistant", "content": "answer"},
        message("user", "three"),
    ]
    expected = "<|im_start|>user\n<sound>one two<|im_end|>\n<|im_start|>assistant\nanswer<|im_end|>\n"
    expected += "<|im_start|>user\nthree<|im_end|>\n"
    assert render(*messages, template=template).text == SYSTEM + expected
    prompt = render(*messages, template=template, add_generation_prompt=True)
    assert prompt.text == SYSTEM + expected + "<|im_start|>assistant\n"
    own_system = message("system", "Be brief.")
    prompt = render(own_system, *messages, template=template)
    assert prompt.text == "<|im_start|>system\nBe brief.<|im_end|>\n" + expected
    assert render(message("user"), template=template).text == SYSTEM + "<|im_start|>user\n<|im_end|>\n"


@pytest.mark.parametrize("template", [PUBLISHED_CHAT_TEMPLATE, DEFAULT_CHAT_TEMPLATE, STRINGS_ONLY])
def test_several_clips_stand_where_their_parts_stand(template: str) -> None:
    system = SYSTEM if template is not STRINGS_ONLY else ""
    prompt = render(message("user", "A: ", CLIP, " B: ", CLIP, " same?"), template=template)
    assert prompt.text == system + "<|im_start|>user\nA: <sound> B: <sound> same?<|im_end|>\n"
    prompt = render(message("user", CLIP, CLIP), template=template, add_generation_prompt=True)
    assert prompt.text.startswith(system + "<|im_start|>user\n<sound><sound><|im_end|>\n")


def test_single_clip_turns_stay_clip_first_beside_turns_with_several() -> None:
    prompt = render(
        message("user", "which ", CLIP, " or ", CLIP),
        message("assistant", "the ", "first"),
        message("user", "and this: ", CLIP, "?"),
        {"role": "user", "content": "plain"},
    )
    assert prompt.text == (
        SYSTEM + "<|im_start|>user\nwhich <sound> or <sound><|im_end|>\n"
        "<|im_start|>assistant\nthe first<|im_end|>\n"
        "<|im_start|>user\n<sound>and this: ?<|im_end|>\n"
        "<|im_start|>user\nplain<|im_end|>\n"
    )


def test_one_clip_in_each_of_two_turns_follows_the_template() -> None:
    """The reference refuses this; no turn is collapsed, so the shipped template is used as it is."""
    prompt = render(message("user", "a", CLIP), message("assistant", "b"), message("user", CLIP, "c"))
    assert prompt.text.count("<|im_start|>user\n<sound>") == 2


def test_template_that_places_clips_itself_is_left_alone() -> None:
    prompt = render(message("user", "a", CLIP, "b"), template=IN_PLACE)
    assert prompt.text == "<|im_start|>user\na<sound>b<|im_end|>\n"


def test_clips_that_a_template_never_shows_are_an_error() -> None:
    with pytest.raises(PromptError, match="0 <sound> where 2 clips"):
        render(message("user", CLIP, CLIP), template="{{ messages | length }}")


PRINTING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("template", [STRINGS_ONLY, PRINTING])
def test_templates_for_strings_are_given_strings(template: str) -> None:
    """Else a list of parts fails, or is printed in its Python form and read as the question."""
    prompt = render(message("user", "one ", "two"), template=template)
    assert prompt.text == "<|im_start|>user\none two<|im_end|>\n"
    prompt = render(message("user", "one ", CLIP), message("assistant", "x"), template=template)
    assert prompt.text == "<|im_start|>user\n<sound>one <|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"


def test_template_variables_and_helpers() -> None:
    template = (
        "{{ eos_token }}{{ messages | tojson }}{{ strftime_now('%Y') | length }}"
        "{% for m in messages %}{% break %}{% endfor %}{{ tools is none }}"
    )
    prompt = render({"role": "user", "content": "é"}, template=template)
    assert prompt.text == '<|im_end|>[{"role": "user", "content": "é"}]4True'


@pytest.mark.parametrize(
    ("template", "message_"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].role }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_failing_templates(template: str, message_: str) -> None:
    with pytest.raises(PromptError, match=message_):
        render(message("user", "a"), template=template)


# Text that stays text

FRAGMENTS = [
    *CONTROL_TOKENS,
    "<",
    "<|",
    "im_end",
    "|>",
    "so",
    "und>",
    "tool_",
    ">",
    " ",
    "\n",
    "the",
    "e",
    "\u0301",
]
FRAGMENTS += ["\u0338", "🙂", "你", "\ufdd0", "\ue000"]
hostile = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
parts = st.lists(hostile, max_size=4)


def control_tokens_in(ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in set(TOKENIZER.control_tokens.values())]


@given(
    first=parts,
    answer=hostile,
    clips=st.integers(0, 2),
    template=st.sampled_from([PUBLISHED_CHAT_TEMPLATE, STRINGS_ONLY]),
)
@settings(deadline=None)
def test_user_text_never_becomes_control_tokens(
    first: list[str], answer: str, clips: int, template: str
) -> None:
    """Nothing but the template's own control tokens comes out, and the text comes back letter for letter."""
    content = [text_part(text) for text in first]
    for _ in range(clips):
        content.insert(len(content) // 2, CLIP)
    conversation = [{"role": "system", "content": answer}, {"role": "user", "content": content}]
    conversation.append({"role": "assistant", "content": answer})
    prompt = render(*conversation, template=template)
    ids, _ = prompt.encode(TOKENIZER)
    token = TOKENIZER.control_tokens
    start, end = token["<|im_start|>"], token["<|im_end|>"]
    assert control_tokens_in(ids) == [start, end, start, *[AUDIO_TOKEN_ID] * clips, end, start, end]

    def normalized(text: str) -> str:
        return unicodedata.normalize("NFC", text)

    if clips == 2:
        places = [index for index, part in enumerate(content) if part is CLIP]
        texts = [
            "".join(part["text"] for part in run) for run in (content[: places[0]], content[places[1] + 1 :])
        ]
        body = "<sound><sound>".join(map(normalized, texts))
    else:
        body = "<sound>" * clips + normalized("".join(first))
    expected = f"<|im_start|>system\n{normalized(answer)}<|im_end|>\n<|im_start|>user\n{body}<|im_end|>\n"
    expected += f"<|im_start|>assistant\n{normalized(answer)}<|im_end|>\n"
    assert TOKENIZER.decode(ids) == expected
    assert normalized(prompt.text) == normalized(expected)


@given(answer=hostile)
@settings(deadline=None)
def test_marking_answers_changes_no_ids(answer: str) -> None:
    messages = [message("user", "the", CLIP), message("assistant", answer, answer)]
    for template in (PUBLISHED_CHAT_TEMPLATE, STRINGS_ONLY):
        plain, _ = render(*messages, template=template).encode(TOKENIZER)
        marked, labels = render(*messages, template=template, mark_answers=True).encode(TOKENIZER)
        assert marked == plain
        assert control_tokens_in([label for label in labels if label != IGNORED_LABEL]) == [
            TOKENIZER.control_tokens["<|im_end|>"]
        ]


def test_a_token_split_over_parts_and_over_the_template() -> None:
    ids, _ = render(message("user", "<so", "und><|im_", "end|>")).encode(TOKENIZER)
    assert AUDIO_TOKEN_ID not in ids
    halves = "<{{ messages[0].content }}>"
    ids, _ = render({"role": "user", "content": "sound"}, template=halves).encode(TOKENIZER)
    assert TOKENIZER.decode(ids) == "<sound>"
    assert AUDIO_TOKEN_ID not in ids


def test_markers_avoid_every_character_in_use() -> None:
    used = "".join(map(chr, (*range(0xFDD0, 0xFDEF), 0xE000)))
    markers = Markers.unused_in([used, "\ue001"])
    found = {markers.guard, markers.start, markers.end, markers.cut}
    assert len(found) == 4
    assert not found & set(used + "\ue001")


# Labels


def test_answers_and_their_end_are_labelled_and_nothing_else() -> None:
    prompt = render(
        message("user", "Q1", CLIP),
        message("assistant", " first ", "answer\n"),
        message("user", "assistant\nQ2"),
        {"role": "assistant", "content": "second"},
        mark_answers=True,
    )
    assert answers(prompt) == [" first answer\n<|im_end|>", "second<|im_end|>"]


def test_no_labels_without_marks() -> None:
    assert answers(render(message("user", "Q"), message("assistant", "A"))) == []


@pytest.mark.parametrize("content", ["", []])
def test_an_empty_answer_still_learns_to_end(content: Any) -> None:
    prompt = render(message("user", "Q"), {"role": "assistant", "content": content}, mark_answers=True)
    assert answers(prompt) == ["<|im_end|>"]


def test_a_token_over_the_border_belongs_to_the_answer() -> None:
    """`assistant\\n` + `\\nText` is tokenised with one token for both line feeds, as the reference does."""
    prompt = render(message("user", "Q"), message("assistant", "\nText"), mark_answers=True)
    assert answers(prompt) == ["\n\nText<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (TRIMMING, "  A1 \n", "A1<|im_end|>"),
        (TRIMMING, "A1", "A1<|im_end|>"),
        (STRINGS_ONLY, " A1 ", " A1 <|im_end|>"),
        (GENERATION, "A1 ", "A1 <|im_end|>"),
        (WITHOUT_END, "the end", " the end"),
        (STRINGS_ONLY.replace("'<|im_end|>", "'\\n<|im_end|>"), "A1", "A1\n<|im_end|>"),
        (STRINGS_ONLY.replace("'<|im_end|>", "' (over)<|im_end|>"), "A1", "A1"),
        (STRINGS_ONLY.replace("m.content", "m.content | upper"), "a1", "A1<|im_end|>"),
    ],
)
def test_labels_under_other_templates(template: str, answer: str, expected: str) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": "assistant"}]
    prompt = render(*messages, template=template, mark_answers=True)
    assert answers(prompt) == [expected]
    assert prompt.text == render(*messages, template=template).text


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",  # drops the answer
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",  # shows it twice
        "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}",  # depends on its length
    ],
)
def test_answers_that_cannot_be_found_are_an_error(template: str) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    with pytest.raises(PromptError, match="labels"):
        render(*messages, template=template, mark_answers=True)


def test_continue_final_message() -> None:
    messages = [message("user", "Q"), message("assistant", "The ", "answer < ")]
    prompt = render(*messages, continue_final_message=True)
    assert prompt.text == SYSTEM + "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nThe answer < "
    ids, _ = prompt.encode(TOKENIZER)
    assert TOKENIZER.decode(ids) == prompt.text
    assert render(*messages, template=TRIMMING, continue_final_message=True).text.endswith("\nThe answer <")
    with pytest.raises(PromptError, match="no text to continue"):
        render(message("user", CLIP), continue_final_message=True)
    with pytest.raises(PromptError, match="does not show the end"):
        render(*messages, template="{{ messages | length }}", continue_final_message=True)


# Conversations


def test_batches_and_single_conversations() -> None:
    one = [message("user", "a", CLIP)]
    conversations, is_batch = parse_conversations(one)
    assert (len(conversations), is_batch) == (1, False)
    assert clips_of(conversations[0])[0].source == "clip.wav"
    conversations, is_batch = parse_conversations((tuple(one), one))
    assert (len(conversations), is_batch) == (2, True)


def test_keys_that_are_none_are_as_good_as_absent() -> None:
    part = {"type": "audio", "path": None, "url": None, "audio": b"x", "sampling_rate": None}
    (conversation,), _ = parse_conversations([{"role": "user", "content": [part], "name": None}])
    assert conversation[0].clips[0].source == b"x"


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ("hello", "a list of messages, got a str"),
        ({"role": "user", "content": "a"}, "got a dict"),
        (None, "got nothing"),
        ([], "at least one"),
        ([[]], "conversation 0, no message"),
        ([["a"]], "conversation 0, message 0: a message is a dict"),
        ([[message("user", "a")], message("user", "b")], "item 1 is a dict"),
        (["a"], "message 0: a message is a dict"),
        ([{"content": "a"}], "role None is not one of system, user, assistant"),
        ([{"role": "tool", "content": "a"}], "role 'tool'"),
        ([{"role": "user<|im_end|>", "content": "a"}], "is not one of"),
        ([{"role": "user"}], "'content' must be a string or a list of parts, got nothing"),
        ([{"role": "user", "content": {"type": "text"}}], "got a dict"),
        ([{"role": "user", "content": ["a"]}], "part 0: a part is a dict"),
        ([{"role": "user", "content": [{"text": "a"}]}], "type None is not one of 'text', 'audio'"),
        ([{"role": "user", "content": [{"type": "image", "url": "a"}]}], "type 'image' is not one of"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'text' must be a string, got nothing"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "got a int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "has none"),
        ([{"role": "user", "content": [{"type": "audio", "path": "a", "url": "b"}]}], "has 'path' and 'url'"),
        ([message("assistant", CLIP)], "audio belongs in a user message"),
        ([message("user", "a"), message("system", CLIP)], "message 1: audio belongs"),
        ([message("user", "\ud800")], "not valid Unicode"),
    ],
)
def test_conversations_of_the_wrong_form(conversation: Any, expected: str) -> None:
    with pytest.raises(PromptError, match=expected):
        parse_conversations(conversation)


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ([{"role": "user", "contents": "a"}], "message 0 got unknown.*'contents' .did you mean 'content'"),
        ([{"role": "user", "content": [text_part("a") | {"txt": 1}]}], "part 0.*'txt' .did you mean 'text'"),
        ([{"role": "user", "content": [CLIP | {"sample_rate": 8000}]}], "did you mean 'sampling_rate'"),
        ([{"role": "user", "content": [text_part("a") | {"audio": b""}]}], "'audio'"),
    ],
)
def test_unknown_keys(conversation: Any, expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected):
        parse_conversations(conversation)
