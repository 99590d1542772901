"""The gated nonlinearity of a Trans-Net."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops._checks import compute_dtype

SCALE_EPS = 1e-5  # added to a standard deviation


def gated_relu(x: Tensor, hidden: Tensor, gate: Tensor) -> Tensor:
    """x + gate * relu(hidden / std(hidden)); see `kdfast.ops`."""
    dtype = compute_dtype(x, hidden)
    result = torch.promote_types(x.dtype, hidden.dtype)
    x, hidden, gate = x.to(dtype), hidden.to(dtype), gate.to(dtype)
    if hidden[0, 0].numel() > 1:
        deviation = hidden.detach().flatten(2).std(2).view(*hidden.shape[:2], 1, 1)
        hidden = hidden / (deviation + SCALE_EPS)
    return (x + gate.reshape(()) * hidden.relu()).to(result)
