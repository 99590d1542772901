"""Twin of split_reset_."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops._checks import compute_dtype
from kdfast.ops._key import Key
from kdfast.ops.reference.philox import counter_of, philox, uniform


def split_reset_(weights: Sequence[Tensor], masks: Sequence[Any], key: Key) -> None:
    """W <- M * W + (1 - M) * R; see `kdfast.ops`."""
    for layer, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        kept, drawn = kept_entries(mask, weight.device), redraw(weight, layer, key)
        with torch.no_grad():
            weight.copy_(torch.where(kept, weight, drawn))


def redraw(weight: Tensor, layer: int, key: Key) -> Tensor:
    """R of one layer, for every entry."""
    block = torch.arange(-(-weight.numel() // 4), device=weight.device)
    zero = torch.zeros((), dtype=torch.int64, device=weight.device)
    bits = torch.stack(philox(key.value, counter_of(block, zero + layer, zero)), -1)
    width = 2 / math.sqrt(math.prod(weight.shape[1:]))
    dtype = compute_dtype(weight)
    drawn = (uniform(bits).flatten()[: weight.numel()].to(dtype) - 0.5) * torch.tensor(
        width, dtype=dtype, device=weight.device
    )
    return drawn.view(weight.shape).to(weight.dtype)


def kept_entries(mask: Any, device: torch.device) -> Tensor:
    """The mask as booleans."""
    shape = tuple(mask.shape)
    if mask.bits is not None:
        bit = torch.arange(8, device=device)
        bits = (mask.bits.unsqueeze(1) >> bit) & 1
        return bits.flatten()[: math.prod(shape)].view(shape).bool()
    kept = []
    for runs, size in ((mask.rows, shape[0]), (mask.columns, shape[1])):
        line = torch.zeros(size, dtype=torch.bool, device=device)
        for start, length in runs:
            line[int(start) : int(start) + int(length)] = True
        kept.append(line)
    block = kept[0].unsqueeze(1) & kept[1]
    return block.view(*shape[:2], *(1 for _ in shape[2:])).expand(shape)
