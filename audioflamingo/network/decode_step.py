"""One decode step from token ids to logits, a plain function of tensors, so that it compiles and captures alone.

    layout = PackedLayout.of_step(spans, window, device)
    view = KVView(store, layout)
    step = torch.compile(functools.partial(decode_step, model, view=view), fullgraph=True)
    with torch.no_grad():
        for _ in range(num_steps):
            tokens = step(tokens).argmax(-1)
            layout.advance()

The store must have been written before (a prompt was read), and each span needs room for the new tokens: nothing is
checked on the host in a step.
"""

from __future__ import annotations

from torch import Tensor

from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.network.kv import KVView


def decode_step(model: AudioFlamingo3WithHead, tokens: Tensor, view: KVView) -> Tensor:
    """Runs one new token a row.

    Args:
        model: in evaluation mode.
        tokens: the last token of each row, int64 `(R,)`.
        view: of as many rows, one new token each; written.

    Returns:
        Logits of the next token of each row, float32 `(R, V)`.
    """
    return model.packed_logits(model.embed(tokens), view)
