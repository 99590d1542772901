"""Fused optimizers: the steps and states of the plain ones."""

from __future__ import annotations

import math
from argparse import Namespace

import pytest
import torch
from torch import nn

from kdfast.training import checkpoint
from kdfast.training.checkpoint import Position
from kdfast.training.optimizer import create_optimizer


def options(opt="momentum", **more):
    given = {"opt": opt, "lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9}
    return Namespace(**given, filter_bias_and_bn=False, **more)


def network(layout=torch.contiguous_format):
    torch.manual_seed(0)
    # No bias before a normalisation: its gradient is noise, of which Adam would make much.
    first = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 3)
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(20, 2)).to(memory_format=layout)


def trained(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


PLAIN = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=5e-4),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("opt", PLAIN)
def test_fused_steps_are_those_of_the_plain_optimizer(opt, layout):
    found, states = [], []
    for fused in (True, False):
        model = network(layout)
        if fused:
            optimizer = create_optimizer(model, options(opt))
            assert all(group["fused"] for group in optimizer.param_groups)
        else:
            optimizer = PLAIN[opt](model.parameters())
        found.append(trained(model, optimizer, 4))
        states.append(optimizer.state_dict()["state"])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert {i: set(x) for i, x in states[0].items()} == {i: set(x) for i, x in states[1].items()}


def test_other_optimizers_stay_as_they_are():
    for opt in ("lamb", "rmsprop"):
        optimizer = create_optimizer(network(), options(opt))
        assert not any(group.get("fused") for group in optimizer.param_groups)
        assert not optimizer.state


def test_a_skipped_first_step_leaves_no_trace():
    """As gradient scaling skips it: fused SGD would begin with buffers of memory as it lies."""
    model, same = network(), network()
    optimizer, plain = (create_optimizer(m, options()) for m in (model, same))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    begun = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    scaler.scale(torch.tensor(1.0))
    scaler.step(optimizer)
    scaler.update()
    after = list(model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(begun, after, strict=True))
    assert trained(model, optimizer, 2).keys() == trained(same, plain, 2).keys()
    torch.testing.assert_close(list(model.parameters()), list(same.parameters()), rtol=0, atol=0)


def test_a_parameter_whose_first_gradient_comes_later():
    model = network()
    optimizer = create_optimizer(model, options())
    model[-1].requires_grad_(False)
    trained(model, optimizer, 1)
    before = model[-1].weight.detach().clone()
    model[-1].requires_grad_(True)
    trained(model, optimizer, 1)
    assert not torch.equal(before, model[-1].weight)


@pytest.mark.parametrize("opt", ["momentum", "adamw"])
def test_a_checkpoint_of_a_plain_optimizer_goes_on_fused(tmp_path, opt):
    ends = []
    for plain in (True, False):
        model = network(torch.channels_last)
        kind = PLAIN[opt](model.parameters()) if plain else create_optimizer(model, options(opt))
        trained(model, kind, 2)
        folder, summary = tmp_path / f"{plain}", tmp_path / "summary.csv"
        folder.mkdir(), summary.write_text("epoch\n")
        kept = checkpoint.save(folder, Position(1), model, kind, {}, summary=summary, keep=1)
        other = network(torch.channels_last)
        optimizer = create_optimizer(other, options(opt))
        checkpoint.load(kept, other, optimizer)
        assert all(group["fused"] for group in optimizer.param_groups)
        ends.append(trained(other, optimizer, 2, seed=2))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
