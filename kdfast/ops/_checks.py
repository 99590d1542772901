"""Checks and registrations that all ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _library

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raises `TypeError` unless `tensor` is a tensor of one of the four floating dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}"
        )


def check_shape(op: str, name: str, tensor: Tensor, dimensions: int, meaning: str) -> None:
    """Raises `ValueError` unless `tensor` is non-empty and has so many dimensions.

    `meaning` says what they are: "[N, C, H, W] feature map".
    """
    if tensor.dim() != dimensions or tensor.numel() == 0:
        raise ValueError(
            f"{op}: {name} must be a non-empty {meaning}, got shape {list(tensor.shape)}"
        )


def check_device(op: str, name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """Raises `ValueError` unless `tensor` is on the device of `first`."""
    if tensor.device != first.device:
        raise ValueError(
            f"{op}: all tensors must be on one device, got {first.device} "
            f"for {first_name} and {tensor.device} for {name}"
        )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What kernels accumulate in: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def once(op: str) -> Callable[..., None]:
    """The gradient of a backward op that has none: raises `NotImplementedError`."""

    def backward(ctx: Any, *_grads: Any) -> None:
        raise NotImplementedError(f"{op} can be differentiated once")

    return backward


def register(
    op: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> None:
    """Give `torch.ops.kdfast.<op>` its fake kernel and autograd formula, where the library is."""
    if _library.NO_EXTENSION is not None:
        return
    torch.library.register_fake(f"kdfast::{op}", fake)
    if backward is not None:
        torch.library.register_autograd(f"kdfast::{op}", backward, setup_context=setup)
