"""Feeding one batch to two models that expect different normalisation or image size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class InputAdapter(nn.Module):
    """(x * source_std + source_mean - target_mean) / target_std, resized: [N,C,H,W] -> [N,C,h,w].

    Resizing is bilinear with antialiasing and happens only when the batch is not of the target
    size. Returns `x` itself when nothing differs. The dtype of `x` is kept.

    Args:
        source_mean, source_std: what `x` was normalised with, one value per channel.
        target_mean, target_std: what the model was trained with.
        target_size: height and width, or one number for both; None leaves the size alone.
    """

    def __init__(
        self,
        source_mean: Sequence[float],
        source_std: Sequence[float],
        target_mean: Sequence[float],
        target_std: Sequence[float],
        target_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        source = torch.tensor([source_mean, source_std], dtype=torch.float64)
        target = torch.tensor([target_mean, target_std], dtype=torch.float64)
        scale = source[1] / target[1]
        shift = (source[0] - target[0]) / target[1]
        self.renormalises = not torch.equal(source, target)
        self.target_size = (target_size,) * 2 if isinstance(target_size, int) else target_size
        # Not weights: they follow the module to its device and stay out of checkpoints.
        self.register_buffer("scale", scale.float().view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(-1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        resizes = self.target_size is not None and x.shape[-2:] != self.target_size
        if not (self.renormalises or resizes):
            return x
        # In float32 at least: half types have no antialiased resize on every device.
        y = x.float() if x.dtype.itemsize < 4 else x
        if self.renormalises:
            y = y * self.scale + self.shift
        if resizes:
            y = F.interpolate(y, self.target_size, mode="bilinear", antialias=True)
        return y.to(x.dtype)
