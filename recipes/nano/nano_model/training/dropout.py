"""Dropout of what is heard, for rows that quote no words: sounds are to be known by many channels, not by a few.

A channel is dropped for all of a row's audio: what an answer reads is a mean over many audio tokens, and dropping each
token's on its own would average out (dropout: Srivastava et al., 2014; by channels as in arXiv 1411.4280).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import STATE


def channel_gains(input_ids: Tensor, quote: int, share: float) -> Tensor:
    """Factors of the audio's channels by row (B, STATE): 0 for a share of them, the others made up for it.

    All are 1 in rows with the quote of a transcript's words: hearing stays as it is.

    Args:
        input_ids: (B, S).
        quote: number of the opening quote.
        share: of the channels, below 1.
    """
    is_kept = torch.rand(len(input_ids), STATE) >= share
    is_quoting = (input_ids == quote).any(1, keepdim=True)
    return torch.where(is_quoting, 1.0, is_kept / (1 - share))
