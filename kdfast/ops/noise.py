"""Counter-based normal noise: public functions, fakes, autograd.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10); Box and
Muller, "A note on the generation of random normal deviates", 1958; Ma et al., "Quantifying the
knowledge in a DNN to explain knowledge distillation for classification", CVPR 2020 (sigma_noise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _library, reference
from kdfast.ops._checks import (
    DTYPES,
    check_device,
    check_floating,
    check_shape,
    compute_dtype,
    once,
    register,
)
from kdfast.ops._key import Key

MOST_SAMPLES = 1 << 32
MOST_ELEMENTS = 1 << 34  # of a row: 32 bits of counter, four elements each
MOST_PIXELS = 65535  # of an image's height and width, whose cells are computed in 32 bits


def standard_normal(
    key: Key,
    shape: Sequence[int],
    ids: Tensor | None = None,
    first_sample: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals that depend on (key, id, sample, element) alone.

    Element e (its flat index in the trailing dimensions) of entry (n, s) comes from the Philox
    counter (e // 4, ids[n], first_sample + s), whose four words give four normals by Box-Muller.

    Args:
        key: the stream of numbers.
        shape: [N, S, ...].
        ids: [N] int64, any values (dataset indices). None is 0 .. N-1.
        first_sample: the sample of s = 0; first_sample + S is at most 2^32.
        device: where to draw, None torch's default device; with `ids` theirs.
        dtype: float32, or what these are converted to: float64 holds the same numbers, float16
            and bfloat16 round them.

    Returns:
        [N, S, ...], of magnitude at most 6.67. Any split of images and samples gives the same bits,
        and so do all CPUs and CUDA (no fused multiply-add in this arithmetic).

    Raises:
        TypeError, ValueError: for a wrong key, dtype, shape, device or range.
    """
    op = "standard_normal"
    _check_key(op, key)
    shape = tuple(shape)
    if len(shape) < 2 or any(size < 1 for size in shape):
        raise ValueError(f"{op}: shape must be [N, S, ...], all positive, got {list(shape)}")
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype must be float32, float64, float16 or bfloat16, got {dtype}")
    elements = math.prod(shape[2:])
    _check_range(op, first_sample, shape[1], elements)
    if ids is not None:
        _check_ids(op, ids, shape[0])
        if device is not None and _other_device(ids.device, torch.device(device)):
            raise ValueError(f"{op}: ids are on {ids.device}, device is {device}")
    else:
        ids = torch.arange(shape[0], device=device)
    if not _library.fused(op, ids.device):
        return reference.standard_normal(key, shape, ids, first_sample, ids.device, dtype)
    noise = torch.ops.kdfast.standard_normal(
        ids.contiguous(), shape[1], elements, first_sample, key.signed, dtype
    )
    return noise.view(shape)


def sigma_noise(
    image: Tensor,
    sigma: Tensor,
    samples: int,
    key: Key,
    ids: Tensor | None = None,
    first_sample: int = 0,
) -> Tensor:
    """image + up(sigma) * eps, eps = standard_normal(key, [N, samples, C, H, W], ids, ...).

    Pixel (y, x) takes the sigma of cell (floor(y*G/H), floor(x*G/W)), torch's nearest up-sampling;
    H and W need not be multiples of G. Channels of a pixel have one sigma and different eps.

    Args:
        image: [N, C, H, W], float32, float64, float16 or bfloat16, H and W up to 65535, C*H*W up to
            2^32. Other layouts than NCHW are copied.
        sigma: [N, 1, G, G], one of these dtypes, G at most H and W.
        samples: how many noisy copies of each image.
        key, ids, first_sample: see `standard_normal`. Fresh noise needs another key or
            first_sample.

    Returns:
        [N, samples, C, H, W] in image's dtype (float64 if image or sigma is), rounded once.
        The gradient of sigma is the sum over samples, channels and pixels of a cell of grad * eps,
        in an order that depends on the shape alone; that of image the sum over samples. eps is
        drawn anew in the backward: nothing of the result's size is kept for it.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or range, or a grid larger than the
            image.
        NotImplementedError: when differentiated twice.

    Source: Ma et al., section 3: x + sigma_i * delta with delta ~ N(0, I), sigma on a grid.
    """
    op = "sigma_noise"
    _check_key(op, key)
    check_floating(op, "image", image)
    check_shape(op, "image", image, 4, "[N, C, H, W] image")
    check_floating(op, "sigma", sigma)
    check_shape(op, "sigma", sigma, 4, "[N, 1, G, G] grid")
    n, c, h, w = image.shape
    if sigma.shape[0] != n or sigma.shape[1] != 1 or sigma.shape[2] != sigma.shape[3]:
        raise ValueError(
            f"{op}: sigma must be [N, 1, G, G] with N = {n} of image, got {list(sigma.shape)}"
        )
    if sigma.shape[2] > min(h, w):
        raise ValueError(
            f"{op}: sigma's grid must not be larger than the image, "
            f"got {sigma.shape[2]} cells for {h}x{w} pixels"
        )
    if max(h, w) > MOST_PIXELS or c * h * w > 1 << 32:
        raise ValueError(
            f"{op}: image must have sides of at most {MOST_PIXELS} and 2^32 elements, "
            f"got {c}x{h}x{w}"
        )
    check_device(op, "sigma", sigma, "image", image)
    if samples < 1:
        raise ValueError(f"{op}: samples must be positive, got {samples}")
    _check_range(op, first_sample, samples, c * h * w)
    if ids is not None:
        _check_ids(op, ids, n)
        check_device(op, "ids", ids, "image", image)
    if not _library.fused(op, image.device):
        return reference.sigma_noise(image, sigma, samples, key, ids, first_sample)
    dtype = compute_dtype(image, sigma)
    if dtype == torch.float64:
        image = image.double()
    return torch.ops.kdfast.sigma_noise(
        image, sigma.to(dtype), ids, samples, first_sample, key.signed
    )


def _check_key(op: str, key: Key) -> None:
    if not isinstance(key, Key):
        raise TypeError(f"{op}: key must be a kdfast.ops.Key, got {type(key).__name__}")


def _check_ids(op: str, ids: Tensor, images: int) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{op}: ids must be an int64 tensor, got {got}")
    if ids.dim() != 1 or ids.shape[0] != images:
        raise ValueError(f"{op}: ids must be [N] with N = {images}, got {list(ids.shape)}")


def _check_range(op: str, first_sample: int, samples: int, elements: int) -> None:
    if first_sample < 0 or first_sample + samples > MOST_SAMPLES:
        raise ValueError(
            f"{op}: samples must be in [0, 2^32), got first_sample {first_sample} "
            f"and {samples} samples"
        )
    if elements > MOST_ELEMENTS:
        raise ValueError(f"{op}: a row may have 2^34 elements, got {elements}")


def _other_device(one: torch.device, other: torch.device) -> bool:
    return one.type != other.type or (other.index is not None and one.index != other.index)


# Fakes: sizes, dtypes and layouts of what csrc returns.


def _normal_fake(
    ids: Tensor, samples: int, elements: int, first_sample: int, key: int, dtype: torch.dtype
) -> Tensor:
    return ids.new_empty((ids.shape[0], samples, elements), dtype=dtype)


def _loop_fake(like: Tensor, loop: str, elements: int, id: int, sample: int, key: int) -> Tensor:
    able = torch.library.get_ctx().new_dynamic_size(max=elements)  # 0 or `elements`
    return like.new_empty((able,), dtype=torch.float32)


def _noise_fake(
    image: Tensor, sigma: Tensor, ids: Tensor | None, samples: int, first_sample: int, key: int
) -> Tensor:
    n, c, h, w = image.shape
    torch._check(sigma.shape[0] == n)
    return image.new_empty((n, samples, c, h, w))


def _noise_backward_fake(
    grad: Tensor, ids: Tensor | None, first_sample: int, key: int, grid: int, want_image: bool
) -> tuple[Tensor, Tensor]:
    n, _, c, h, w = grad.shape
    image = grad.new_empty((n, c, h, w) if want_image else (0,))
    return image, grad.new_empty((n, 1, grid, grid), dtype=compute_dtype(grad))


# Autograd. Neither image nor sigma is needed for the backward, nor eps.


def _noise_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, sigma, ids, _, ctx.first_sample, ctx.key = inputs
    ctx.grid = sigma.shape[-1]
    ctx.save_for_backward(ids)


def _noise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    want_image, want_sigma = ctx.needs_input_grad[:2]
    d_image = d_sigma = None
    if want_sigma:
        (ids,) = ctx.saved_tensors
        d_image, d_sigma = torch.ops.kdfast.sigma_noise_backward(
            grad, ids, ctx.first_sample, ctx.key, ctx.grid, want_image
        )
    elif want_image:
        d_image = grad.sum(1)
    return d_image if want_image else None, d_sigma, None, None, None, None


register("standard_normal", _normal_fake)
register("standard_normal_loop", _loop_fake)
register("sigma_noise", _noise_fake, _noise_backward, _noise_setup)
register("sigma_noise_backward", _noise_backward_fake, once("sigma_noise"))
