"""Trainers of the built-in model that meet: no trainer is started."""

from __future__ import annotations

import threading

import pytest
import torch

from recipes.nano.nano_model.training import peers
from recipes.nano.nano_model.training.peers import Peers


def test_two_that_meet_leave_with_the_mean(tmp_path):
    weights = [[torch.full((3,), value)] for value in (1.0, 3.0)]
    trainers = [Peers(tmp_path, rank, 2, every_s=1e6) for rank in range(2)]
    came = {}
    threads = [
        threading.Thread(target=lambda rank=rank: came.update({rank: trainers[rank].meet(weights[rank])}))
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert came == {0: 2, 1: 2}
    assert [weight.tolist() for (weight,) in weights] == [[2.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("every_s", [60.0, 3600.0])
def test_who_waits_in_vain_goes_on_before_the_next_meeting(monkeypatch, tmp_path, every_s):
    clock = [3600.0]
    monkeypatch.setattr(peers.time, "time", lambda: clock[0])
    monkeypatch.setattr(peers.time, "sleep", lambda pause_s: clock.__setitem__(0, clock[0] + pause_s))
    trainer = Peers(tmp_path, 0, 2, every_s=every_s)
    weights = [torch.ones(2)]
    assert trainer.meet(weights) == 1
    assert clock[0] - 3600.0 <= min(peers.WAIT_S, every_s / 4) + peers.PAUSE_S
    assert not trainer.is_due()
    assert weights[0].tolist() == [1.0, 1.0]
