"""Task-oriented features: published numbers, exact links and norms, what learns, processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.methods import Outputs, Pairing, find_method
from kdfast.methods.tofd import global_norms, orthogonality
from kdfast.models import DeepHead, InputAdapter, Taps, create_model, default_stages
from kdfast.training.objective import Objective, plan_taps
from kdfast.training.teacher import Teacher


def task_oriented(ours, theirs=None, *, mounted=None, widths=None, smoothing=0.0, **options):
    """The method set up for student and teacher shapes without the batch, the pooled ones last.

    `mounted` are the positions of the teacher's layers that have heads, by default all stages but
    the last; their features are as wide as the teacher's pooled one.
    """
    method, theirs = find_method("tofd")(**options), theirs or ours
    layers = [f"layer{i + 1}" for i in range(len(ours) - 1)]
    mounted = range(len(ours) - 2) if mounted is None else mounted
    torch.manual_seed(0)
    method.setup(
        Pairing(
            (*layers, "fc:in"),
            (*layers, "fc:in"),
            tuple(torch.Size([2, *shape]) for shape in ours),
            tuple(torch.Size([2, *shape]) for shape in theirs),
            classes=2,
            head_layers=tuple(layers[i] for i in mounted),
            head_widths=widths or (theirs[-1][0],) * len(mounted),
            label_smoothing=smoothing,
        )
    )
    return method


RESNET = ((16, 32, 32), (32, 16, 16), (64, 8, 8), (64,))


# Acceptance check 7 of the intermediate heads.


@pytest.mark.parametrize(
    ("weight", "value"),
    [
        (torch.eye(5), 0.0),
        (2 * torch.eye(2), 8.485281),
        (torch.eye(512, 64), 21.166010),
        (torch.eye(64, 512), 21.166010),
        (torch.zeros(3, 2), math.sqrt(3) + math.sqrt(2)),
    ],
)
def test_distance_from_orthogonal(weight, value):
    weight.requires_grad_()
    got = orthogonality(weight)
    assert got.item() == pytest.approx(value, abs=1e-5)
    got.backward()
    assert weight.grad.isfinite().all()
    if value == 0 or weight.shape[0] != weight.shape[1]:
        assert weight.grad.abs().sum() == 0, "a minimum, or a saddle at 0"


def test_weighted_distance_by_hand():
    method = task_oriented(((2, 4, 4), (2,)), mounted=[0], feature=0.0)
    for link in method.links:
        link.weight.data = 2 * torch.eye(2)
    assert len(method.links) == 2
    with torch.no_grad():
        rest = 0.03 * sum(orthogonality(link.weight) for link in method.links)
    assert rest.item() == pytest.approx(2 * 0.254558, abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5), (9, 8)])
def test_either_gram_gives_the_distance(shape):
    """The value and gradient of both residuals, of which one is formed; and the identity."""
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows, columns = w @ w.T - torch.eye(shape[0]), w.T @ w - torch.eye(shape[1])
    wanted = rows.norm() + columns.norm()
    got = orthogonality(w)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    identity = (w.T @ w).square().sum() - 2 * w.square().sum() + shape[0]
    assert rows.square().sum().item() == pytest.approx(identity.item(), rel=1e-12)
    (mine,), (formula,) = torch.autograd.grad(got, w), torch.autograd.grad(wanted, w)
    assert torch.allclose(mine, formula, rtol=1e-10, atol=1e-12)
    closed = 2 * rows @ w / rows.norm() + 2 * w @ columns / columns.norm()
    assert torch.allclose(mine, closed, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(orthogonality, w)


def test_distance_near_orthogonal_is_not_cancelled():
    """In float32, where the expanded identity has nothing left."""
    w = torch.eye(64) + 1e-5 * torch.randn(64, 64)
    exact = 2 * (w.double() @ w.double().T - torch.eye(64)).norm()
    assert orthogonality(w).item() == pytest.approx(exact.item(), rel=0.02)


# Acceptance check 8.


def test_terms_by_hand():
    """Through an objective: 0.1 + CE + H of one classifier whose link is the identity."""
    method = task_oriented(((2, 4, 4), (2,)), mounted=[])  # refused below; here a head elsewhere
    assert (method.gamma, method.heads, method.default_weight) == (1.0, "deep", 1.0)
    assert (method.feature, method.orthogonal, method.growth) == (0.05, 0.03, 3.0)


@pytest.mark.parametrize(("epoch", "tau"), [(0, 1.012), (99, 2.2), (199, 3.4)])
def test_temperature_of_an_epoch(epoch, tau):
    method = find_method("tofd")()
    kept = method.tau
    method.start_epoch(epoch)
    assert method.tau is kept and kept.item() == pytest.approx(tau, abs=1e-6)
    assert "tau" not in method.state_dict()
