"""Fields of requests that are not ours: those that change nothing are left aside, the others are refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from audioflamingo.server.error_replies import bad_request

# Fields of known clients that change no answer: OpenAI's, Open WebUI's, OpenRouter's, llama.cpp's, vLLM's.
HARMLESS = (
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    *("service_tier", "store", "user", "max_tool_calls"),
    *("background_tasks", "chat_id", "features", "filter_ids", "id", "model_item", "session_id", "variables"),
    *("provider", "route", "transforms", "usage"),
    *("cache_prompt", "id_slot", "keep_alive", "return_progress", "slot_id", "timings_per_token"),
    *("priority", "request_id", "cache_salt"),
)
# Fields that would, with the values at which they do not.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # vLLM's and llama.cpp's
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "grammar": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "mm_processor_kwargs": ({},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "stop_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}


def check_extra(
    fields: Mapping[str, Any], known: Iterable[str], also: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    """Checks the fields that a request's schema does not have.

    Args:
        fields: them.
        known: fields of the schema, for suggestions.
        also: the route's own additions to `UNSUPPORTED`.

    Returns:
        The names of those that are left aside.

    Raises:
        ApiError: 400 for a field that would change the answer, or that nobody knows.
    """
    unsupported = {**UNSUPPORTED, **also}
    for name, value in fields.items():
        if value is None or name in HARMLESS:
            continue
        if name not in unsupported:
            close = difflib.get_close_matches(name[:100], [*known, *HARMLESS], n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise bad_request(f"there is no field {name[:100]!r}{hint}.", name[:100], "unknown_parameter")
        if value not in unsupported[name]:
            raise bad_request(f"{name} is not supported; leave it out.", name, "unsupported_parameter")
    return sorted(name for name, value in fields.items() if value is not None)
