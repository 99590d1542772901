"""On-device augmentation: public function, fake."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops import _library, reference
from kdfast.ops._checks import check_device, register
from kdfast.ops._key import Key

MODES = ("zeros", "reflect")
OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = (torch.channels_last, torch.contiguous_format)


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
    """(x / 255 - mean) / std of a random crop of the padded images, flipped with probability 1/2.

    The words (w0, w1, w2) of the Philox counter of an image's index give the crop's place in the
    padded image, floor(w0 * (2 * padding + 1) / 2^32) down and likewise w1 to the right, and the
    flip, the upper bit of w2: a pure function of (key, index).

    Args:
        images_u8: [n, H, W, 3] uint8, contiguous: how image sets lie in memory.
        indices: [B] int64, which of them. The same index gives the same result twice.
        key: the stream of numbers, such as Key(seed, "augment", epoch).
        mean, std: three each, of pixels in [0, 1]; std positive.
        padding: pixels on every side; 0 crops nothing.
        mode: "zeros" pads with black (before normalisation), "reflect" mirrors without repeating
            the edge and needs padding < H, W.
        dtype: float32, float16 or bfloat16; rounded once from float32.
        memory_format: torch.channels_last or torch.contiguous_format.
        flip: whether to flip at all.

    Returns:
        [B, 3, H, W].

    Raises:
        TypeError, ValueError: for wrong types, shapes or values; on the CPU also for an index
            outside [0, n), which on CUDA gives NaN (to ask would stop the device's queue).
    """
    op = "crop_flip"
    if not isinstance(key, Key):
        raise TypeError(f"{op}: key must be a kdfast.ops.Key, got {type(key).__name__}")
    for name, tensor, want in (
        ("images_u8", images_u8, torch.uint8),
        ("indices", indices, torch.int64),
    ):
        if not isinstance(tensor, Tensor) or tensor.dtype != want:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be a {want} tensor, got {got}")
    shape = list(images_u8.shape)
    if len(shape) != 4 or shape[3] != 3 or images_u8.numel() == 0:
        raise ValueError(f"{op}: images_u8 must be a non-empty [n, H, W, 3], got shape {shape}")
    if not images_u8.is_contiguous():
        raise ValueError(f"{op}: images_u8 must be contiguous, got strides {images_u8.stride()}")
    if indices.dim() != 1 or indices.numel() == 0:
        raise ValueError(f"{op}: indices must be a non-empty [B], got {list(indices.shape)}")
    check_device(op, "indices", indices, "images_u8", images_u8)
    mean, std = [float(x) for x in mean], [float(x) for x in std]
    if len(mean) != 3 or len(std) != 3 or not all(x > 0 for x in std):
        raise ValueError(
            f"{op}: mean and std must be three numbers each, std positive, got {mean} and {std}"
        )
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {MODES}, got {mode!r}")
    if padding < 0 or (mode == "reflect" and padding >= min(shape[1:3])):
        raise ValueError(
            f"{op}: padding must not be negative, and with reflect smaller than the image, "
            f"got {padding} for {shape[1]}x{shape[2]}"
        )
    if dtype not in OUT_DTYPES:
        raise TypeError(f"{op}: dtype must be float32, float16 or bfloat16, got {dtype}")
    if memory_format not in FORMATS:
        raise ValueError(f"{op}: memory_format must be one of {FORMATS}, got {memory_format}")
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in torch.aminmax(indices))
        if low < 0 or high >= shape[0]:
            outside = low if low < 0 else high
            raise ValueError(f"{op}: indices must be in [0, {shape[0]}), got {outside}")
    if not _library.fused(op, images_u8.device):
        return reference.crop_flip(
            images_u8, indices, key, mean, std, padding, mode, dtype, memory_format, flip
        )
    return torch.ops.kdfast.crop_flip(
        images_u8,
        indices.contiguous(),
        mean,
        std,
        padding,
        mode == "reflect",
        flip,
        dtype,
        memory_format == torch.channels_last,
        key.signed,
    )


def _crop_flip_fake(
    images: Tensor,
    indices: Tensor,
    mean: list[float],
    std: list[float],
    padding: int,
    reflect: bool,
    flip: bool,
    dtype: torch.dtype,
    channels_last: bool,
    key: int,
) -> Tensor:
    _, h, w, _ = images.shape
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (indices.shape[0], 3, h, w), dtype=dtype, device=images.device, memory_format=format
    )


register("crop_flip", _crop_flip_fake)
