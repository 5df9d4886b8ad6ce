"""Where an answer decides what it says: in front of its quote, or all of it where it has none.

Of most answers the quoted words are four fifths of the loss, and nearly all of its gradient; which answer a question
wants is a token or two. So these count more.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT = 3.0  # of a token in front of a quote, the quote included, against one behind it


def opening_weights(labels: Tensor, rows: Tensor, quote: int, end: int) -> Tensor:
    """The weight of each label in the loss.

    Args:
        labels: those that count, row by row (M,).
        rows: the row of each (M,).
        quote: number of the opening quote.
        end: number of the token that ends an answer.

    Returns:
        (M,) of `WEIGHT` and 1.
    """
    is_first = torch.ones_like(labels, dtype=torch.bool)
    is_first[1:] = (rows[1:] != rows[:-1]) | (labels[:-1] == end)
    is_quote = labels == quote
    before = is_quote.cumsum(0) - is_quote.long()  # quotes in front of a label
    of_answer = torch.where(is_first, before, 0).cummax(0).values  # quotes in front of its answer
    return torch.where(before > of_answer, 1.0, WEIGHT)
