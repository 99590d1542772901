"""The gated nonlinearity of a Trans-Net: public function, fakes, autograd.

Liang, Li, Ma, Sun and Zhang, "Knowledge Consistency between Neural Networks and Beyond", ICLR 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _library, reference
from kdfast.ops._checks import check_device, check_floating, compute_dtype, once, register
from kdfast.ops._layout import dense_in_order, gradient_like


def gated_relu(x: Tensor, hidden: Tensor, gate: Tensor) -> Tensor:
    """z = x + p * relu(h / s), s = std(h) + 1e-5 per sample and channel.

    The standard deviation is the unbiased one over positions and a constant for the gradient: dx
    = dz, dh = p * [h > 0] / s * dz, dp = sum of dz * relu(h / s). At one position s is exactly 1.

    Args:
        x, hidden: [N, C, H, W] or [N, C] of one shape, float32, float64, float16 or bfloat16, NCHW
            or channels_last (other strides are copied).
        gate: p, a tensor of one element, already between 0 and 1.

    Returns:
        The shape of `x`, in the dtype that both maps promote to, computed in float32 (float64 if
        either map is), in the memory format of `hidden`.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank, size or gate.
        NotImplementedError: when differentiated twice, by the fused path.

    Source: the paper's equation 3, with the scale of its code.
    """
    op = "gated_relu"
    for name, tensor in (("x", x), ("hidden", hidden), ("gate", gate)):
        check_floating(op, name, tensor)
        check_device(op, name, tensor, "x", x)
    if x.dim() not in (2, 4) or x.numel() == 0:
        raise ValueError(
            f"{op}: x must be a non-empty [N, C, H, W] or [N, C] map, got shape {list(x.shape)}"
        )
    if hidden.shape != x.shape:
        raise ValueError(
            f"{op}: x and hidden must have one shape, got {list(x.shape)} and {list(hidden.shape)}"
        )
    if gate.numel() != 1:
        raise ValueError(f"{op}: gate must have one element, got shape {list(gate.shape)}")
    if not _library.fused(op, x.device):
        return reference.gated_relu(x, hidden, gate)
    dtype = torch.promote_types(x.dtype, hidden.dtype)
    gate = gate.reshape(()).to(compute_dtype(x, hidden))
    x, hidden, shape = x.to(dtype), hidden.to(dtype), x.shape
    if len(shape) == 2:
        x, hidden = x[:, :, None, None], hidden[:, :, None, None]
    out = torch.ops.kdfast.gated_relu(_ordered_like(x, hidden), hidden, gate)[0]
    return out.view(shape)


def _ordered_like(tensor: Tensor, hidden: Tensor) -> Tensor:
    """`tensor` in the memory format that the kernels read `hidden` in."""
    for order in ((1, 2, 3), (2, 3, 1)):
        if dense_in_order(hidden, order):
            if dense_in_order(tensor, order):
                return tensor
            channels_last = order == (2, 3, 1)
            format = torch.channels_last if channels_last else torch.contiguous_format
            return tensor.contiguous(memory_format=format)
    return tensor.contiguous()


# Fakes: sizes, dtypes and layouts of what csrc returns.


def _fake(x: Tensor, hidden: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(x.shape == hidden.shape)
    return gradient_like(hidden), hidden.new_empty(hidden.shape[:2], dtype=compute_dtype(hidden))


def _backward_fake(
    grad: Tensor, hidden: Tensor, gate: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return gradient_like(hidden), hidden.new_empty((1,), dtype=compute_dtype(hidden))


# Autograd. The gradient of x is the incoming one.


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, hidden, gate = inputs
    ctx.save_for_backward(hidden, gate, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, _grad_scale: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad is None:
        return None, None, None
    grad_hidden = grad_gate = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        hidden, gate, scale = ctx.saved_tensors
        grad_hidden, grad_gate = torch.ops.kdfast.gated_relu_backward(
            _ordered_like(grad, hidden), hidden, gate, scale
        )
        grad_gate = grad_gate.view(gate.shape)
    return grad, grad_hidden, grad_gate


register("gated_relu", _fake, _backward, _setup)
register("gated_relu_backward", _backward_fake, once("gated_relu"))
