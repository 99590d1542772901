"""Group normalisation over groups of different sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SplitGroupNorm(nn.Module):
    """`norm` with groups of `counts` channels: what is left of its groups in a slim network.

    Takes over weight, bias and eps, and what subclasses of `nn.GroupNorm` do after normalising
    (`drop`, `act`, as timm's have them). Input and output are [N, C, ...], C = sum(counts).
    """

    def __init__(self, norm: nn.GroupNorm, counts: Sequence[int]):
        super().__init__()
        self.counts, self.eps = list(counts), norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.group_norm(part, 1, eps=self.eps) for part in x.split(self.counts, 1)]
        x = torch.cat(parts, 1)
        if self.weight is not None:
            shape = (-1,) + (1,) * (x.dim() - 2)
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(x))
