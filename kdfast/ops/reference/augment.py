"""Twin of crop_flip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops._key import Key
from kdfast.ops.reference.philox import counter_of, philox, rounds


def crop_flip(
    images_u8: Tensor,
    indices: Tensor,
    key: Key,
    mean: Sequence[float],
    std: Sequence[float],
    padding: int = 4,
    mode: str = "zeros",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    flip: bool = True,
) -> Tensor:
    """A random crop and flip, normalised; see `kdfast.ops`."""
    _, h, w, _ = images_u8.shape
    top, left, flipped = draw(indices, key, padding, flip)
    y = torch.arange(h, device=indices.device) + top.unsqueeze(1)  # [B, H]
    x = torch.arange(w, device=indices.device).expand(len(indices), w)
    x = torch.where(flipped.unsqueeze(1), w - 1 - x, x) + left.unsqueeze(1)  # [B, W]
    (y, y_inside), (x, x_inside) = _source(y, h, mode), _source(x, w, mode)
    outside = (indices < 0) | (indices >= len(images_u8))
    rows = indices.masked_fill(outside, 0).view(-1, 1, 1)
    pixels = images_u8[rows, y.unsqueeze(2), x.unsqueeze(1)]  # [B, H, W, 3]
    inside = y_inside.unsqueeze(2) & x_inside.unsqueeze(1)
    pixels = (pixels * inside.unsqueeze(3)).float()
    shift, scale = (
        torch.tensor(v, dtype=torch.float64).float().to(pixels.device)
        for v in ([255 * m for m in mean], [1 / (255 * s) for s in std])
    )
    result = (pixels - shift) * scale
    result = result.masked_fill(outside.view(-1, 1, 1, 1), float("nan")).to(dtype)
    return result.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


def draw(
    indices: Tensor, key: Key, padding: int = 4, flip: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the crops start in the image, down and to the right, and whether they are flipped."""
    zero = torch.zeros_like(indices)
    words = philox(key.value, counter_of(zero, indices, zero))
    top, left = ((word * (2 * padding + 1) >> 32) - padding for word in words[:2])
    return top, left, (words[2] >> 31 == 1) if flip else zero.bool()


def draw_one(index: int, key: Key, padding: int = 4, flip: bool = True) -> tuple[int, int, bool]:
    """`draw` for one image, in Python's integers: a tensor of one costs ten times as much."""
    words = rounds(key.value, *counter_of(0, index, 0))
    top, left = ((word * (2 * padding + 1) >> 32) - padding for word in words[:2])
    return top, left, flip and words[2] >> 31 == 1


def _source(at: Tensor, size: int, mode: str) -> tuple[Tensor, Tensor]:
    """The pixel each position takes, and whether it takes one."""
    inside = (at >= 0) & (at < size)
    if mode == "zeros":
        return at.clamp(0, size - 1), inside
    mirrored = torch.where(at < 0, -at, 2 * size - 2 - at)
    return torch.where(inside, at, mirrored), torch.ones_like(inside)
