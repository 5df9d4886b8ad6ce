"""AdamW's step in a basis of its own for each matrix: that of the gradients' second moments on the stream's side.

Whisper's states have a few directions that are hundreds of times as large as most, and what tells one instrument from
another lies in small ones: element by element, Adam gets there last. In the basis in which a matrix's gradients are
uncorrelated each direction gets a step of its own size. This is SOAP (Vyas et al., 2024) on one of the two sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layout import STATE, WIDTH

BETAS, EPS = (0.9, 0.98), 1e-9  # of the trainer's other optimizer, too
DAMPING = 1e-6  # of the moments' trace: where there is nothing the basis stays as it is
FLOOR = 0.01  # of a row's root mean square: directions in which there is nothing are not blown up


class EigenAdam(torch.optim.Optimizer):
    """Adam whose moments live in the eigenbasis of the gradients.

    A matrix that reads the stream (N, WIDTH) or writes into it (WIDTH, N) is turned in the first STATE of WIDTH; flags
    and biases are stepped as they are.

    Args:
        groups: parameters, as every optimizer takes them.
        lr: learning rate.
        betas: of the mean, of the mean square.
        eps: added to the root of the mean square.
        basis_beta: of the second moments.
        basis_steps: between two looks at the second moments.
        turn_steps: between two bases.
    """

    def __init__(
        self,
        groups: Any,
        lr: float = 0.0,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        basis_beta: float = 0.95,
        basis_steps: int = 2,
        turn_steps: int = 20,
    ) -> None:
        self.basis_beta, self.basis_steps, self.turn_steps = basis_beta, basis_steps, turn_steps
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, on_stream(parameter.grad), group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        if gradient.ndim == 2:
            self._look(state, gradient)
            gradient = turned(gradient, state["basis"])
        state["step"] += 1
        first, second = group["betas"]
        mean, square = state["mean"], state["square"]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = square.sqrt()
        size += FLOOR * square.mean(-1, keepdim=True).sqrt() + group["eps"]
        rate = group["lr"] * (1 - second ** state["step"]) ** 0.5 / (1 - first ** state["step"])
        change = mean / size
        if change.ndim == 2:
            change = turned(change, state["basis"].T)
        on_stream(parameter).sub_(change, alpha=rate)

    def _look(self, state: dict[str, Any], gradient: Tensor) -> None:
        """Keeps the second moments and now and then turns the basis, and the mean with it."""
        if state["step"] % self.basis_steps == 0:
            part = gradient[:, :STATE]
            moments = part.T @ part
            if "moments" not in state:
                state["moments"] = moments
                state["basis"] = torch.linalg.eigh(moments).eigenvectors.flip(1).contiguous()
            else:
                state["moments"].lerp_(moments, 1 - self.basis_beta)
        if state["step"] and state["step"] % self.turn_steps == 0:
            old = state["basis"]
            moments = state["moments"]
            new = torch.linalg.qr(torch.addmm(old, moments, old, beta=DAMPING * float(moments.trace()))).Q
            state["mean"] = turned(state["mean"], old.T @ new)
            state["basis"] = new


def on_stream(x: Tensor) -> Tensor:
    """A view of a matrix with the stream's WIDTH last; anything else as it is."""
    return x.T if x.ndim == 2 and x.shape[1] != WIDTH else x


def turned(x: Tensor, basis: Tensor) -> Tensor:
    """(N, WIDTH) with the first STATE multiplied by a basis (STATE, STATE)."""
    return torch.cat([x[:, :STATE] @ basis, x[:, STATE:]], 1)
