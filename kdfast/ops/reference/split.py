"""Masked convolution and mask bits of split networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.ops._checks import compute_dtype
from kdfast.ops.reference.philox import counter_of, philox

if TYPE_CHECKING:
    from kdfast.ops.split_mask import SplitMask

HALF = (torch.float16, torch.bfloat16)


def split_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: SplitMask,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """conv2d(x, M * W, r * b); see `kdfast.ops`. Masked entries become 0 even if NaN."""
    weight = weight.masked_fill(~mask.dense(device=weight.device), 0)
    if bias is not None:
        bias = bias.masked_fill(~mask.row_mask(bias.device), 0)
    dtype = x.dtype
    if dtype in HALF and not torch.is_autocast_enabled(x.device.type):
        wide = compute_dtype(x)
        x, weight, bias = (t if t is None else t.to(wide) for t in (x, weight, bias))
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).to(dtype)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def draw_bits(key: int, count: int, threshold: int, device: torch.device | str = "cpu") -> Tensor:
    """Packed bits of `count` elements: bit i is set where 24 random bits reach `threshold`."""
    block = torch.arange((count + 3) // 4, device=device)
    zero = torch.zeros_like(block)
    words = torch.stack(philox(key, counter_of(block, zero, zero)), 1).flatten()[:count]
    return pack_bits((words >> 8) >= threshold)


def pack_bits(mask: Tensor) -> Tensor:
    """[count] booleans -> [ceil(count / 8)] uint8, least significant bit first."""
    padded = F.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(
        1, dtype=torch.uint8
    )


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits`: [count] booleans."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> places) & 1).flatten()[:count].bool()
