"""split_reset_ over all weights of a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import nn
from torchvision.models import resnet50

from kdfast import ops
from kdfast.ops import Key
from rows import Row


def split_reset(device: str) -> Iterator[Row]:
    """Write what is redrawn: three quarters of a ResNet-50. Eager is a layer at a time."""
    with torch.device("meta"):
        network = resnet50(num_classes=100)
    shapes = [m.weight.shape for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = [torch.randn(shape, device=device) for shape in shapes]
    masks, dense = [], []
    for shape in shapes:
        rows, columns = (math.ceil(n / 2) for n in shape[:2])
        masks.append(
            SimpleNamespace(shape=shape, rows=[(0, rows)], columns=[(0, columns)], bits=None)
        )
        dense.append(torch.zeros(shape, device=device))
        dense[-1][:rows, :columns] = 1
    key = Key(0, "reset", 1)

    def eager() -> None:
        for weight, mask in zip(weights, dense, strict=True):
            bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
            drawn = torch.empty_like(weight).uniform_(-bound, bound)
            weight.copy_(mask * weight + (1 - mask) * drawn)

    written = sum(int(mask.numel() - mask.sum()) for mask in dense)
    yield Row(
        "split_reset_",
        "ResNet-50, rate 0.5",
        torch.float32,
        {"fused": lambda: ops.split_reset_(weights, masks, key), "eager": eager},
        bytes=4 * written,
        goals={"eager": 5 if device == "cpu" else 10},
    )


ROWS = {"split_reset_": split_reset}
