"""How likely a model finds each of several answers: the prompt is read once, and each answer behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.audio_encoder import AudioEncoder
from audioflamingo.engine.generate import evaluation_mode
from audioflamingo.engine.generate_options import eos_ids
from audioflamingo.engine.kv_pool import KVPool
from audioflamingo.errors import ArgumentError, ContextLengthError
from audioflamingo.network.adapters import routed
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.processor.processor import AudioFlamingo3Processor
from audioflamingo.processor.prompt import Prompt


@dataclass(frozen=True)
class OptionScore:
    """How likely one answer is.

    Attributes:
        text: the answer.
        logprob: natural logarithm of its probability, the end of the answer included where that was asked for.
        num_tokens: tokens that it is the product of: `logprob / num_tokens` compares answers of unlike length.
        is_greedy: whether each of them is the most likely one in its place: greedy decoding gives this answer.
    """

    text: str
    logprob: float
    num_tokens: int
    is_greedy: bool


@torch.no_grad()
def score(
    self: AudioFlamingo3WithHead,
    processor: AudioFlamingo3Processor,
    conversation: Sequence[Mapping[str, Any]] | Prompt,
    options: Sequence[str],
    *,
    is_whole: bool = True,
    adapter: str | None = None,
) -> list[OptionScore]:
    """Log-likelihood of each of several answers to a conversation.

    Args:
        self: an `AudioFlamingo3ForConditionalGeneration`.
        processor: its processor.
        conversation: messages as `apply_chat_template` takes them, ending with the user's; or a prompt.
        options: the answers, as the model would write them.
        is_whole: the answer ends there: the probability that nothing follows counts too, so that "a dog" is not
            favoured over "a dog barking" for being shorter. False for the beginnings of answers.
        adapter: name of the adapter that is asked.

    Returns:
        One for each option, in their order.

    Raises:
        ArgumentError: there is no option, or an empty one.
        ContextLengthError: prompt and longest option do not fit.
        AudioFlamingoError: as `processor.prompt`.
    """
    prompt = conversation if isinstance(conversation, Prompt) else processor.prompt(conversation)
    if isinstance(options, str) or not options:
        raise ArgumentError(f"options must be a list of at least one text, got {options!r}.")
    ends = [_end_id(self, processor)] if is_whole else []
    rows = [processor.tokenizer.encode_plain(text) + ends for text in options]
    if not all(rows):
        raise ArgumentError("options must not be empty.")
    num_slots = len(prompt) + max(map(len, rows))
    context = self.config.text_config.max_position_embeddings
    if num_slots > context:
        raise ContextLengthError(
            f"prompt and longest option have {num_slots} tokens, the context holds {context}. Shorten the audio (25 "
            "tokens a second) or the conversation."
        )
    pool = KVPool(self.config.text_config.num_hidden_layers, num_slots)
    span = pool.allocate(num_slots)
    assert span is not None
    with evaluation_mode(self), routed([adapter]):
        x = _embed(self, prompt, adapter)
        last = torch.tensor([len(prompt) - 1], device=x.device)
        first = self.packed_logits(x, pool.view([span], [len(prompt)], x.device), last)  # (1, V)
        scores = []
        for text, ids in zip(options, rows, strict=True):
            span.length = len(prompt)
            logits = first
            if len(ids) > 1:
                y = self.embed(torch.tensor(ids[:-1], device=self.device))
                rest = self.packed_logits(y, pool.view([span], [len(ids) - 1], y.device))
                logits = torch.cat([first, rest.to(first.device)])  # (len(ids), V)
            scores.append(_score_tokens(text, ids, logits))
    return scores


def _end_id(model: AudioFlamingo3WithHead, processor: AudioFlamingo3Processor) -> int:
    """The token that ends an answer."""
    ids = (*eos_ids(model.generation_config), processor.tokenizer.eos_token_id)
    if ids[0] is None:
        raise ArgumentError(
            "neither generation_config nor the tokenizer says what ends an answer; pass is_whole=False."
        )
    return ids[0]


def _embed(model: AudioFlamingo3WithHead, prompt: Prompt, adapter: str | None) -> Tensor:
    """Embeddings of a prompt with its audio, `(S, D)`."""
    x = model.embed(torch.tensor(prompt.token_ids, device=model.device))
    windows = [window for window in prompt.windows if window.num_tokens]
    if windows:
        encoded = AudioEncoder(model, ClipCache(max_bytes=0)).encode(windows, adapter)
        for window, tokens in zip(windows, encoded, strict=True):
            x[window.start : window.end] = tokens.to(x.device, x.dtype)
    return x


def _score_tokens(text: str, ids: list[int], logits: Tensor) -> OptionScore:
    logprobs = logits.log_softmax(-1)
    wanted = torch.tensor(ids, device=logits.device)
    own = logprobs.gather(1, wanted[:, None]).sum()
    is_greedy = bool((logprobs.argmax(-1) == wanted).all())
    return OptionScore(text, float(own), len(ids), is_greedy)
