"""The loops that ours are timed against do the same work: their losses are ours."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ROOT
from torch import nn


@pytest.fixture
def loops(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import loops

    return loops


@pytest.mark.parametrize("name", ["at+kd", "wrn kd", "dih loop"])
def test_losses_and_gradients(loops, name, tmp_path):
    """CRD's are drawn at random in both forms; tests/test_crd.py has them."""
    pair = loops.Pair("cifar_resnet20", "cifar_resnet8", loops.PAIRS[name].flags, {})
    ours = loops.Ours(pair, tmp_path, 1, compiled=False)
    theirs = loops.loop_of(name, ours, "cpu")
    if name == "at+kd":
        assert theirs.teacher.training
        theirs.teacher.eval()
    for network in (theirs.student, theirs.teacher):
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert all(m.weight.is_contiguous() for m in convolutions)

    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    answer = theirs.ask(images)
    assert answer.requires_grad == (name != "wrn kd"), "the others build their teacher's graph"
    their_loss = theirs.loss(theirs.student(images), answer, labels)
    their_loss.backward()

    objective = ours.made.main.objective.train()
    our_loss, _, _ = objective(images, labels, *ours.made.main.teacher(images))
    our_loss.backward()
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-4, atol=1e-4)
    students = ours.made.student, theirs.student
    for our, their in zip(*(s.parameters() for s in students), strict=True):
        assert (our.grad - their.grad).norm() <= 1e-3 * their.grad.norm() > 0


def test_each_loop_trains(loops, tmp_path):
    for name, pair in loops.PAIRS.items():
        pair = loops.Pair("cifar_resnet8", "cifar_resnet8", pair.flags, {})
        ours = loops.Ours(pair, tmp_path / name.replace(" ", "-"), 1, compiled=False)
        theirs = loops.loop_of(name, ours, "cpu")
        before = copy.deepcopy(theirs.student.state_dict())
        images, labels, *more = next(theirs.batches())
        theirs.step(images, labels, *more)
        after = theirs.student.state_dict()
        changed = [not torch.equal(before[key], value) for key, value in after.items()]
        assert all(changed), name
