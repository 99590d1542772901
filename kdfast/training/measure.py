"""A Trans-Net's variance report over a split of an image set."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator

from kdfast.metrics import VarianceReport
from kdfast.models import TransNet
from kdfast.ops.reference.transnet import SCALE_EPS
from kdfast.training.features import CachedLoader, Features, LiveLoader
from kdfast.training.tapped import exact_convolutions


@torch.no_grad()
def measure(
    net: TransNet,
    features: Features,
    loader: CachedLoader | LiveLoader,
    accelerator: Accelerator,
    mean_scope: str = "channel",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """What `VarianceReport.compute` returns, of all images of `loader`, in one pass of them.

    `features` gives those of networks A and B. Orders are computed in `dtype`: what float32 rounds
    depends on how many images a batch has. Every process gets the report of all. There is also
    `blown_channels`: how many channels of A's maps are constant but not 0 in some image, so
    that dividing by their scale of 1e-5 blows them up.
    """
    net = copy.deepcopy(net).to(dtype)
    report = VarianceReport(len(net.convs), mean_scope)
    blown = torch.zeros(net.channels, dtype=torch.int64, device=accelerator.device)
    with exact_convolutions():
        for batch in loader.epoch(0):
            if batch.portion.count:
                source, target = features.prepare(batch.images)
                report.update(net.orders(source.to(dtype)), target)
                blown += _blown_up(source).sum(0)
    report.reduce(accelerator)
    found = int((accelerator.reduce(blown, "sum") > 0).sum())
    return report.compute() | {"blown_channels": found}


def _blown_up(maps: torch.Tensor) -> torch.Tensor:
    """[N, C] booleans: whether a channel of an image is constant, but not 0."""
    if maps.ndim < 3 or maps.shape[2:].numel() == 1:
        return torch.zeros(maps.shape[:2], dtype=torch.bool, device=maps.device)
    rows = maps.flatten(2)
    return (rows.std(2) < SCALE_EPS) & (rows.mean(2).abs() > 100 * SCALE_EPS)
