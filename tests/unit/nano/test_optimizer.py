"""The trainer's optimizer: Adam in a basis of each matrix's gradients."""

from __future__ import annotations

import pytest
import torch

from recipes.nano.nano_model.layout import STATE, WIDTH
from recipes.nano.nano_model.training.optimizer import EigenAdam


def inputs(rows: int, spread: float, seed: int = 0) -> torch.Tensor:
    """(rows, WIDTH) whose directions differ in size by up to `spread`, in no axis of their own."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(STATE, STATE, generator=generator)).Q
    sizes = torch.logspace(0, -torch.log10(torch.tensor(spread)).item(), STATE)
    x = torch.randn(rows, WIDTH, generator=generator)
    x[:, :STATE] = x[:, :STATE] * sizes @ turn
    return x


def fit(optimizer_of, x: torch.Tensor, wanted: torch.Tensor, steps: int = 200) -> tuple[float, torch.Tensor]:
    """How far (N, WIDTH) weights get in least squares."""
    weight = torch.nn.Parameter(torch.zeros(len(wanted), WIDTH))
    optimizer = optimizer_of([weight])
    target = x @ wanted.T
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (x @ weight.T - target).pow(2).mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach()), weight.detach()


def test_small_directions_are_learned_sooner_than_by_adam():
    x = inputs(1024, spread=100.0)
    wanted = 0.1 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    ours, ours_weight = fit(lambda p: EigenAdam([{"params": p}], lr=0.01), x, wanted)
    adam, adam_weight = fit(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.98)), x, wanted)
    assert ours < 0.2 * adam
    assert (ours_weight - wanted).norm() < 0.5 * (adam_weight - wanted).norm()


def test_flags_and_biases_are_stepped_as_by_adam():
    weight = torch.randn(6, WIDTH).sign() * (1 + torch.rand(6, WIDTH))
    for shape, part in (((6,), slice(None)), ((6, WIDTH), (slice(None), slice(STATE, None)))):
        ours, adam = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        optimizers = [EigenAdam([ours], lr=0.1), torch.optim.Adam([adam], lr=0.1, betas=(0.9, 0.98))]
        for step in range(5):
            gradient = (weight[:, 0] if len(shape) == 1 else weight) * (1 + step)
            for parameter, optimizer in zip((ours, adam), optimizers, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        torch.testing.assert_close(ours[part], adam[part], rtol=0.03, atol=1e-3)


def test_what_writes_into_the_stream_is_turned_on_its_other_side():
    gradient = torch.randn(5, WIDTH)
    read, write = torch.nn.Parameter(torch.zeros(5, WIDTH)), torch.nn.Parameter(torch.zeros(WIDTH, 5))
    for parameter, given in ((read, gradient), (write, gradient.T)):
        optimizer = EigenAdam([parameter], lr=0.1)
        parameter.grad = given.clone()
        optimizer.step()
    torch.testing.assert_close(read.detach(), write.detach().T)


def test_rows_without_gradients_stay_as_they_are():
    weight = torch.nn.Parameter(torch.randn(4, WIDTH))
    before = weight.detach().clone()
    optimizer = EigenAdam([weight], lr=0.1, turn_steps=3)
    for _ in range(7):
        weight.grad = torch.randn(4, WIDTH)
        weight.grad[1] = 0
        optimizer.step()
    assert torch.equal(weight[1], before[1])
    assert not torch.equal(weight[0], before[0])


@pytest.mark.parametrize("stop", [1, 20, 33])
def test_training_goes_on_as_if_it_had_not_stopped(stop: int):
    torch.manual_seed(0)
    gradients = [torch.randn(4, WIDTH) for _ in range(45)]

    def run(parameter: torch.nn.Parameter, optimizer: EigenAdam, part: list[torch.Tensor]) -> None:
        for gradient in part:
            parameter.grad = gradient.clone()
            optimizer.step()

    whole, first = (torch.nn.Parameter(torch.zeros(4, WIDTH)) for _ in range(2))
    run(whole, EigenAdam([whole], lr=0.1), gradients)
    optimizer = EigenAdam([first], lr=0.1)
    run(first, optimizer, gradients[:stop])
    second = torch.nn.Parameter(first.detach().clone())
    resumed = EigenAdam([second], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, gradients[stop:])
    torch.testing.assert_close(second, whole, rtol=1e-4, atol=1e-5)
