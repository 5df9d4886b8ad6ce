"""Questions' and answers' states are kept about as long as a transcript's.

Nothing but the loss holds back what the free MLPs write. Left alone they make a state of length 3 one of 100 to 800:
behind the next norm the words that a head gathered, what was heard and the marks are a hundredth of it, and the later
layers learn little. Transcripts are not touched.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from ..layout import MARK, OPEN, STATE

LONGEST = (9.0, 3.0, 4.0, 6.0, 7.0, 8.0, 11.0, 14.0, 24.0)  # behind each layer, free of charge
WEIGHT = 0.1  # of what is too long, in the loss


def excess(x: Tensor, number: int) -> Tensor:
    """Mean square of how often (in powers of e) the OPEN states (N, WIDTH) behind a layer are longer than allowed."""
    is_open = x[:, OPEN] > MARK / 2
    if not is_open.any():
        return x.new_zeros(())
    squares = x[is_open, :STATE].pow(2).sum(1)
    too_long = F.relu(squares.clamp(min=1e-6).log() / 2 - math.log(LONGEST[number]))
    return too_long.pow(2).mean()
