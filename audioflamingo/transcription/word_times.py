"""When each word was said, from where the model looks in the audio while it writes.

Some heads of the language model look at the place that they are writing down. They are found by measuring: a head is as
good as the share of its attention that lies on the best path through the audio which only goes forward. The path
through the mean of the best heads gives each token its time. Where nobody knows the heads of a checkpoint
(`alignment_heads`), they are found in the first window that is timed; the share says how sure the times are.

The method (alignment heads, dynamic time warping) is that of Whisper's authors, arXiv 2212.04356, for cross-attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.audio.vad import VAD_FRAME, frame_levels
from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.audio_encoder import AudioEncoder
from audioflamingo.errors import warn
from audioflamingo.network.adapters import routed
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.network.audio_attention import audio_attention
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription.alignment_heads import (
    REACH,
    AlignmentHeads,
    choose_heads,
    keep_heads,
    known_heads,
    path_shares,
)
from audioflamingo.transcription.segments import Segment, Word
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.windows import Window

AUDIO_TOKEN_S = 0.04
LAG_S = 0.08  # the model begins to look at a word so long before it is said (benchmarks/word_times.py)
QUIET = 0.05  # of the loudest frames' level: not part of a word at its ends
MIN_TOKENS, TOKENS_TO_KEEP = 4, 12  # fewer say nothing about a head; too little to go by for ever

Look = Callable[[Collection[int]], Iterator[tuple[int, np.ndarray]]]  # attention (H, T, A) of layers


class WordTimer:
    """Gives segments the times of their words.

    Args:
        model: wrote them.
        processor: its processor.
        clip_cache: encoded audio, so that a window is not encoded twice.

    Attributes:
        heads: of the model, once they are found.
    """

    def __init__(
        self,
        model: AudioFlamingo3WithHead,
        processor: AudioFlamingo3Processor,
        clip_cache: ClipCache,
    ) -> None:
        self._model = model
        self._processor = processor
        self._encoder = AudioEncoder(model, clip_cache)
        self.heads: AlignmentHeads | None = None

    def time(self, segment: Segment, options: TranscriptionOptions) -> Segment:
        """The segment with its words, given the options that it was written with; its audio is let go."""
        window = segment.window
        spans = word_spans(self._processor, segment)
        if window is None or not spans:
            return dataclasses.replace(segment, words=(), window=None)
        first, last = spans[0].first, spans[-1].end
        matrix = self._look(segment, window, first, last, options)
        path, share = best_path(matrix)
        levels = frame_levels(window.model_input)
        words = []
        for span in spans:
            start = int(np.searchsorted(path, span.first - first))
            end = int(np.searchsorted(path, span.end - first))
            start_s, end_s = trim(
                levels, start * AUDIO_TOKEN_S + LAG_S, max(end, start + 1) * AUDIO_TOKEN_S + LAG_S
            )
            logprobs = segment.logprobs[span.first : span.end]
            words.append(
                Word(
                    span.text,
                    min(window.start_s + start_s, segment.end_s),
                    min(window.start_s + end_s, segment.end_s),
                    math.exp(sum(logprobs) / len(logprobs)) if logprobs else None,
                )
            )
        return dataclasses.replace(segment, words=tuple(words), words_certainty=share, window=None)

    def _look(
        self, segment: Segment, window: Window, first: int, last: int, options: TranscriptionOptions
    ) -> np.ndarray:
        """Where the answer's tokens from `first` to `last` look, `(T, A)`; finds the heads if nobody has yet."""
        model = self._model
        prompt = self._processor.transcription_prompt(window.model_input, options.prompt)
        ids = [*prompt.token_ids, *segment.tokens[:last]]
        audio = slice(prompt.windows[0].start, prompt.windows[-1].end)
        query = len(prompt.token_ids) + first - 1  # the token before is the one that looks for the next
        with routed([options.adapter]), torch.no_grad():
            x = model.embed(torch.tensor(ids, device=model.device))
            encoded = self._encoder.encode(prompt.windows, options.adapter)
            for part, tokens in zip(prompt.windows, encoded, strict=True):
                x[part.start : part.end] = tokens.to(x.device, x.dtype)

            def look(layers: Collection[int]) -> Iterator[tuple[int, np.ndarray]]:
                found = audio_attention(model.model.language_model, x, audio, query, layers)
                return ((layer, weights[:, : last - first].cpu().numpy()) for layer, weights in found)

            self.heads = self.heads or known_heads(model)
            heads = self.heads or self._find_heads(look, last - first)
            chosen = [
                weights[[head for own, head in heads.heads if own == layer]]
                for layer, weights in look({layer for layer, _ in heads.heads})
            ]
        mean: np.ndarray = np.concatenate(chosen).mean(0)
        return mean

    def _find_heads(self, look: Look, num_tokens: int) -> AlignmentHeads:
        """The heads of the model, from one answer; kept if it was long enough to tell."""
        shares: dict[tuple[int, int], float] = {}
        for layer, weights in look(range(self._model.config.text_config.num_hidden_layers)):
            shares |= {(layer, head): share for head, share in enumerate(path_shares(weights).tolist())}
        heads = choose_heads(shares)
        if num_tokens >= MIN_TOKENS:
            self.heads = heads
            if not heads.is_sure:
                warn(
                    f"no head of this model looks clearly at what it writes down (share {heads.share:.2f} of its "
                    "attention): the times of words are rough."
                )
            elif num_tokens >= TOKENS_TO_KEEP:
                keep_heads(self._model, heads)
        return heads


@dataclass(frozen=True)
class WordSpan:
    """A word and its tokens in the answer, from `first` to before `end`."""

    text: str
    first: int
    end: int


def word_spans(processor: AudioFlamingo3Processor, segment: Segment) -> list[WordSpan]:
    """The words of a segment between spaces, with their tokens; none if its text is not in these as it stands."""
    pieces = [processor.tokenizer.token_bytes(token, True) for token in segment.tokens]
    data = b"".join(pieces)
    text = segment.text.encode()
    at = data.rfind(text)
    if at < 0 or not text.strip():
        return []
    owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    spans, end = [], at
    for word in segment.text.split():
        start = data.index(word.encode(), end)
        end = start + len(word.encode())
        spans.append(WordSpan(word, int(owner[start]), int(owner[end - 1]) + 1))
    return spans


def best_path(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Dynamic time warping: which token each frame belongs to, never going back, and the attention along that path.

    Args:
        weights: `(T, A)`, where each token looks.

    Returns:
        Tokens of the frames, `(A,)`, rising from 0 to T - 1, and the share of attention within reach of each token's
        frames.
    """
    num_tokens, num_frames = weights.shape
    if num_tokens > num_frames:  # more tokens than audio: evenly
        return np.arange(num_frames) * num_tokens // num_frames, 0.0
    gain = np.log(weights + 1e-3)
    gain -= gain.mean(0, keepdims=True)  # frames that nobody looks at decide nothing
    total = np.full(num_tokens, -np.inf)
    total[0] = gain[0, 0]
    came = np.zeros((num_frames, num_tokens), dtype=bool)  # whether a token begins with this frame
    for frame in range(1, num_frames):
        step = np.concatenate([[-np.inf], total[:-1]])
        came[frame] = step > total
        total = np.maximum(step, total) + gain[:, frame]
    path = np.empty(num_frames, dtype=np.int64)
    token = num_tokens - 1
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = token
        token -= int(came[frame, token])
    on_path = [
        weights[t, max(0, frames[0] - REACH) : frames[-1] + REACH + 1].sum()
        for t in range(num_tokens)
        if len(frames := np.flatnonzero(path == t))
    ]
    return path, float(np.sum(on_path) / num_tokens)


def trim(levels: np.ndarray, start_s: float, end_s: float) -> tuple[float, float]:
    """Moves the ends of a word over frames of silence, of which one is kept on each side."""
    frame_s = VAD_FRAME / SAMPLING_RATE
    first, last = int(start_s / frame_s), min(len(levels), math.ceil(end_s / frame_s))
    if first >= last:
        return start_s, end_s
    loud = np.flatnonzero(levels[first:last] > QUIET * np.quantile(levels, 0.95))
    if not len(loud):
        return start_s, end_s
    return (
        max(start_s, (first + int(loud[0])) * frame_s),
        min(end_s, (first + int(loud[-1]) + 1) * frame_s),
    )
