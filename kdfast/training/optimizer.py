"""The optimizer that options name, in one kernel a step where torch has one."""

from __future__ import annotations

import argparse

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from kdfast.errors import UsageError

_FUSED = (SGD, Adam, AdamW)


def create_optimizer(objective: nn.Module, options: argparse.Namespace) -> Optimizer:
    """The optimizer that `options` name, of the parameters of `objective` that ask for a gradient.

    torch's SGD, Adam and AdamW run fused; the states they keep are those of the plain ones. Raises
    `UsageError` when the optimizer refuses its settings.
    """
    optimizer = _create(objective, options)
    if type(optimizer) in _FUSED:
        optimizer = _create(objective, options, fused=True)
        _begin_momentum(optimizer)
    return optimizer


def _create(objective: nn.Module, options: argparse.Namespace, **more: bool) -> Optimizer:
    try:
        return create_optimizer_v2(
            objective,
            opt=options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            filter_bias_and_bn=options.filter_bias_and_bn,
            **more,
        )
    except (ValueError, AssertionError) as error:
        raise UsageError(f"--opt {options.opt}: {error}") from None


def _begin_momentum(optimizer: Optimizer) -> None:
    """Give SGD its buffers, at 0: m * 0 + g is the g that it begins with.

    Left to itself the fused step makes them of memory as it lies, which it leaves so when gradient
    scaling skips the first step, and it takes no parameter whose first gradient comes later.
    """
    for group in optimizer.param_groups if type(optimizer) is SGD else ():
        for parameter in group["params"] if group["momentum"] else ():
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter]["momentum_buffer"] = buffer
