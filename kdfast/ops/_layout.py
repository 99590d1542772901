"""Memory formats, as csrc/check.h tells them apart."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_like(feature: Tensor) -> Tensor:
    """A gradient is dense: channels_last if the feature's samples are, else NCHW."""
    format = torch.channels_last if is_channels_last(feature) else torch.contiguous_format
    return torch.empty_like(feature, memory_format=format)


def is_channels_last(feature: Tensor) -> bool:
    """Whether samples of [N, C, H, W] are dense in channels_last and not in NCHW."""
    return not dense_in_order(feature, (1, 2, 3)) and dense_in_order(feature, (2, 3, 1))


def dense_in_order(feature: Tensor, order: tuple[int, int, int]) -> bool:
    """Whether the last three dimensions lie in memory in this order without gaps.

    A dimension of size 1 has no meaningful stride.
    """
    expected = 1
    for dim in reversed(order):
        if feature.shape[dim] != 1 and feature.stride(dim) != expected:
            return False
        expected = expected * feature.shape[dim]
    return True
