"""Auxiliary classifiers that are mounted on a feature map inside a network.

Every head maps a feature map [B, C, H, W] to (feature [B, d], logits [B, classes]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def parameter_count(module: nn.Module) -> int:
    """How many numbers `module` has as parameters, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())


class LinearHead(nn.Module):
    """One linear layer on the flattened feature map, in C, H, W order; d = C * H * W.

    Args:
        shape: C, H, W of the feature map.
        pool: average pool the map to this height and width first; None leaves it.

    Asadian and Salehi-Abari, "Distilling Knowledge via Intermediate Classifiers", 2021,
    arXiv 2103.00497.
    """

    def __init__(self, shape: Sequence[int], classes: int, pool: tuple[int, int] | None = None):
        super().__init__()
        self.pool = pool
        channels, *size = shape
        self.width = channels * math.prod(pool or size)
        self.fc = nn.Linear(self.width, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pool is not None:
            x = F.adaptive_avg_pool2d(x, self.pool)
        feature = x.flatten(1)
        return feature, self.fc(feature)


class ConvHead(nn.Module):
    """Two 3x3 convolutions with BN and ReLU, pooling, a hidden layer, a classifier; d = `width`.

    The convolutions are not padded, but for maps too small for that: the first where a side is
    below 5, the second where what is left of it is below 3.

    Wang, Lohit, Jones, Fu, "Multi-head Knowledge Distillation for Model Compression", 2020,
    arXiv 2012.02911, in the form of a public code.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int = 256):
        super().__init__()
        channels, *size = shape
        first = int(min(size) < 5)
        second = int(min(size) - 2 + 2 * first < 3)
        self.width = width
        self.convs = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=first, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=second, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.hidden = nn.Linear(width, width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feature = F.relu(self.hidden(self.convs(x).mean((2, 3))))
        return feature, self.fc(feature)


class SeparableConv(nn.Sequential):
    """Depthwise 3x3 of stride 2, 1x1, BN, ReLU, depthwise 3x3, 1x1, BN, ReLU: half the size."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__(
            nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, in_channels, 1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, in_channels, 3, 1, 1, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class DeepHead(nn.Module):
    """A separable convolution per stage that is still to come, pooling, a classifier.

    Args:
        widths: channels of the stage it is mounted on and of every later one; d is the last.

    Zhang, Shi, Shi, Ma, Bao, "Task-Oriented Feature Distillation", NeurIPS 2020, public code.
    """

    def __init__(self, widths: Sequence[int], classes: int):
        super().__init__()
        self.width = widths[-1]
        self.convs = nn.Sequential(*(SeparableConv(a, b) for a, b in pairwise(widths)))
        self.fc = nn.Linear(self.width, classes)
        for module in self.convs.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feature = self.convs(x).mean((2, 3))
        return feature, self.fc(feature)
