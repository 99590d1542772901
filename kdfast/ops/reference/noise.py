"""Twins of the noise ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops._checks import compute_dtype
from kdfast.ops._key import Key
from kdfast.ops.reference.philox import counter_of, philox


def standard_normal(
    key: Key,
    shape: Sequence[int],
    ids: Tensor | None = None,
    first_sample: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Counter-based normals [N, S, ...]; see `kdfast.ops`."""
    images, samples, elements = shape[0], shape[1], math.prod(shape[2:])
    if ids is None:
        ids = torch.arange(images, device=device)
    block = torch.arange(-(-elements // 4), device=ids.device)
    sample = first_sample + torch.arange(samples, device=ids.device)
    words = philox(key.value, counter_of(block, ids.view(-1, 1, 1), sample.view(-1, 1)))
    normal = torch.stack([*_pair(*words[:2]), *_pair(*words[2:])], -1)  # [N, S, blocks, 4]
    return normal.flatten(2)[..., :elements].float().to(dtype).reshape(*shape)


def sigma_noise(
    image: Tensor,
    sigma: Tensor,
    samples: int,
    key: Key,
    ids: Tensor | None = None,
    first_sample: int = 0,
) -> Tensor:
    """image + up(sigma) * eps, [N, samples, C, H, W]; see `kdfast.ops`."""
    dtype = compute_dtype(image, sigma)
    out = torch.float64 if dtype == torch.float64 else image.dtype
    n, c, h, w = image.shape
    noise = standard_normal(key, (n, samples, c, h, w), ids, first_sample, image.device, dtype)
    scale = up_sample(sigma.to(dtype), h, w).unsqueeze(1)
    return (image.to(dtype).unsqueeze(1) + scale * noise).to(out)


def up_sample(sigma: Tensor, height: int, width: int) -> Tensor:
    """[N, 1, G, G] -> [N, 1, height, width]: pixel i of n takes cell floor(i * G / n)."""
    grid = sigma.shape[-1]
    y, x = (torch.arange(n, device=sigma.device) * grid // n for n in (height, width))
    return sigma[:, :, y[:, None], x]


def _pair(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Box and Muller from two words: 31 bits of radius, 30 of a quarter of the circle."""
    uniform = ((radius >> 1).float() + 0.5).double() * 2.0**-31
    r = (-2 * uniform.log()).sqrt()
    quarter = (angle << 2) & 0xFFFFFFFF
    quarter = torch.where(quarter >= 1 << 31, quarter - (1 << 32), quarter)
    arc = quarter.float().double() * (2.0**-32 * math.pi / 2)
    cosine, sine = r * arc.cos() * (1 - 2 * (angle >> 31)), r * arc.sin()
    exchange = (angle >> 30) & 1 == 1
    return torch.where(exchange, sine, cosine), torch.where(exchange, cosine, sine)
