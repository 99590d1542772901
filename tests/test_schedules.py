"""Learning rates: published values, exact ends, and where drops fall."""

from __future__ import annotations

import itertools
from argparse import Namespace

import pytest
import torch

from kdfast.training.schedules import SCHEDULES, Schedule

DEFAULTS = {
    "epochs": 10, "decades": 2.0, "decay_milestones": [3, 6], "decay_rate": 0.1, "warmup_epochs": 0,
    "decay_epochs": 4, "min_lr": 0.0, "warmup_lr": 1e-5, "sched_on_updates": False,
}  # fmt: skip


def rates(lr=1.0, steps=5, **settings):
    options = Namespace(**DEFAULTS | settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = Schedule(optimizer, options, steps)
    found = []
    for epoch in range(options.epochs):
        schedule.start_epoch(epoch)
        if options.sched_on_updates:
            for step in range(steps):
                schedule.start_step(epoch * steps + step)
                found.append(optimizer.param_groups[0]["lr"])
        else:
            found.append(optimizer.param_groups[0]["lr"])
    return found


def test_log_has_exact_ends_and_a_constant_ratio():
    found = rates(1e-4, sched="log", decades=2, epochs=1000)
    assert found[0] == 1e-4 and found[-1] == pytest.approx(1e-6, rel=1e-14)
    ratios = [b / a for a, b in itertools.pairwise(found)]
    assert max(ratios) - min(ratios) < 1e-12
    assert rates(1e-4, sched="log", epochs=1) == [1e-4]


def test_multistep_drops_after_the_milestone():
    """After epoch k: epochs 1..k at the old rate. timm's own schedule drops one epoch sooner."""
    found = rates(sched="multistep", epochs=240, decay_milestones=[150, 180, 210])
    assert found[149] == 1.0 and found[150] == pytest.approx(0.1)
    assert found[179] == pytest.approx(0.1) and found[180] == pytest.approx(0.01)
    assert found[209] == pytest.approx(0.01) and found[239] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0.0512), (1, 0.1024), (4, 0.256), (5, 0.256), (50, 0.2238094), (102, 0.1290311),
     (150, 0.0393313), (199, 1.66112e-5)],
)  # fmt: skip
def test_knowledge_evolution_cosine(epoch, rate):
    found = rates(0.256, sched="evolution-cosine", epochs=200, warmup_epochs=5)
    assert found[epoch] == pytest.approx(rate, rel=1e-5)


def test_knowledge_evolution_step():
    found = rates(sched="evolution-step", epochs=8)
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_then_constant():
    assert rates(sched="constant", warmup_epochs=4, epochs=6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine_on_updates_falls_at_every_step():
    found = rates(sched="cosine", sched_on_updates=True, epochs=4)
    assert len(found) == 20 and found[0] == 1.0
    assert all(a > b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("sched", SCHEDULES)
def test_a_rate_depends_on_the_epoch_alone(sched):
    """A resumed run starts in the middle and gets the same rates."""
    options = Namespace(**DEFAULTS | {"sched": sched, "warmup_epochs": 2})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = Schedule(optimizer, options, 5)
    expected = rates(0.3, sched=sched, warmup_epochs=2)
    for epoch in (7, 2, 9, 0):
        schedule.start_epoch(epoch)
        assert optimizer.param_groups[0]["lr"] == expected[epoch]
