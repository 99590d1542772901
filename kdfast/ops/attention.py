"""Attention maps and the attention transfer loss: public functions, fakes, autograd.

Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _library, reference
from kdfast.ops._checks import (
    check_device,
    check_floating,
    check_shape,
    compute_dtype,
    once,
    register,
)
from kdfast.ops._layout import gradient_like


def attention_map(feature: Tensor, power: float = 2.0) -> Tensor:
    """Q = A / max(||A||_2, 1e-12) per sample, A = mean over channels of |F|^p.

    Args:
        feature: [N, C, H, W], float32, float64, float16 or bfloat16, NCHW or channels_last (other
            strides are copied).
        power: p > 0. 2 and 1 are fast paths. The slope of |F|^p at F = 0 is taken as 0.

    Returns:
        [N, H*W], float32 (float64 for float64 features), accumulated in that type. A zero feature
        has a zero map and a zero gradient.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank or size, or power <= 0.
        NotImplementedError: when differentiated twice.

    Source: the paper's F_sum^p, section 3.1, normalised as in its equation 2.
    """
    _check_feature("attention_map", "feature", feature)
    _check_power("attention_map", power)
    if not _library.fused("attention_map", feature.device):
        return reference.attention_map(feature, power)
    return torch.ops.kdfast.attention_map(feature, float(power))[0]


def attention_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    power: float = 2.0,
) -> Tensor:
    """Sum over pairs of the mean over samples and positions of (Q_s - Q_t)^2.

    Args:
        student, teacher: [N, C, H, W] each, or two equal-length sequences of them, of one batch and
            device. Channels, dtypes and memory formats may differ, and so may height and width:
            the larger feature map is average-pooled to the smaller (before |F|^p), each way.
        power: p of the attention map, see `attention_map`.

    Returns:
        A scalar, float32 (float64 if any feature is). At most 2 / (H*W) a pair. Gradients reach
        student and teacher; a teacher that needs none costs nothing in the backward.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank, size or number of features, or power <= 0.
        NotImplementedError: when differentiated twice.

    Source: the paper's activation-based loss (equation 2) in the mean-square form of its code,
    which its weight of 1000 belongs to.
    """
    students, teachers = _pairs(student, teacher)
    _check_power("attention_loss", power)
    if not _library.fused("attention_loss", students[0].device):
        return reference.attention_loss(students, teachers, power)
    for i, pair in enumerate(zip(students, teachers, strict=True)):
        students[i], teachers[i] = reference.match_size(*pair)
    if compute_dtype(*students, *teachers) == torch.float64:
        students = [feature.double() for feature in students]
        teachers = [feature.double() for feature in teachers]
    return torch.ops.kdfast.attention_loss(students, teachers, float(power))[0]


def _pairs(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    op = "attention_loss"
    if isinstance(student, Tensor) != isinstance(teacher, Tensor):
        raise TypeError(
            f"{op}: student and teacher must both be tensors or both be sequences, "
            f"got {type(student).__name__} and {type(teacher).__name__}"
        )
    if isinstance(student, Tensor):
        student, teacher = [student], [teacher]
    students, teachers = list(student), list(teacher)
    if not students or len(students) != len(teachers):
        raise ValueError(
            f"{op}: student and teacher must have equally many features, at least one, "
            f"got {len(students)} and {len(teachers)}"
        )
    for name, features in (("student", students), ("teacher", teachers)):
        for i, feature in enumerate(features):
            _check_feature(op, f"{name}[{i}]", feature)
            if feature.shape[0] != students[0].shape[0]:
                raise ValueError(
                    f"{op}: all features must have one batch size, got {students[0].shape[0]} "
                    f"for student[0] and {feature.shape[0]} for {name}[{i}]"
                )
            check_device(op, f"{name}[{i}]", feature, "student[0]", students[0])
    return students, teachers


def _check_feature(op: str, name: str, feature: Tensor) -> None:
    check_floating(op, name, feature)
    check_shape(op, name, feature, 4, "[N, C, H, W] feature map")


def _check_power(op: str, power: float) -> None:
    if not 0 < power < math.inf:
        raise ValueError(f"{op}: power must be positive and finite, got {power}")


# Fakes: sizes, dtypes and layouts of what csrc returns.


def _map_fake(feature: Tensor, power: float) -> tuple[Tensor, Tensor]:
    n, _, h, w = feature.shape
    dtype = compute_dtype(feature)
    return feature.new_empty((n, h * w), dtype=dtype), feature.new_empty((n,), dtype=dtype)


def _map_backward_fake(
    grad: Tensor, feature: Tensor, map: Tensor, norm: Tensor, power: float
) -> Tensor:
    return gradient_like(feature)


def _loss_fake(
    student: list[Tensor], teacher: list[Tensor], power: float
) -> tuple[Tensor, list[Tensor], Tensor]:
    dtype = compute_dtype(student[0])
    maps = []
    for s, t in zip(student, teacher, strict=True):
        torch._check(s.shape[0] == t.shape[0])
        torch._check(s.shape[2] * s.shape[3] == t.shape[2] * t.shape[3])
        maps.append(s.new_empty((2, s.shape[0], s.shape[2] * s.shape[3]), dtype=dtype))
    products = student[0].new_empty((len(student), student[0].shape[0], 3), dtype=torch.float64)
    return student[0].new_empty((), dtype=dtype), maps, products


def _loss_backward_fake(
    grad: Tensor,
    features: list[Tensor],
    maps: list[Tensor],
    products: Tensor,
    power: float,
    slots: list[int],
) -> list[Tensor]:
    return [gradient_like(feature) for feature in features]


# Autograd. Only features whose gradient is wanted are kept for the backward.


def _map_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    feature, ctx.power = inputs
    ctx.save_for_backward(feature, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _map_backward(ctx: Any, grad: Tensor | None, _grad_norm: None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return torch.ops.kdfast.attention_map_backward(grad, *ctx.saved_tensors, ctx.power), None


def _loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    student, teacher, ctx.power = inputs
    _, maps, products = output
    ctx.pairs = len(student)
    ctx.needed = [feature.requires_grad for feature in (*student, *teacher)]
    features = [feature for feature in (*student, *teacher) if feature.requires_grad]
    ctx.save_for_backward(*features, *maps, products)
    ctx.set_materialize_grads(False)


def _loss_backward(
    ctx: Any, grad: Tensor | None, _grad_maps: Any, _grad_products: Any
) -> tuple[list[Tensor | None], list[Tensor | None], None]:
    pairs, slots = ctx.pairs, [i for i, wanted in enumerate(ctx.needed) if wanted]
    grads: list[Tensor | None] = [None] * (2 * pairs)
    if grad is not None and slots:
        saved = ctx.saved_tensors
        features, maps, products = saved[: -pairs - 1], saved[-pairs - 1 : -1], saved[-1]
        # Slot 2*i is the student of pair i, 2*i + 1 its teacher.
        numbers = [2 * (i % pairs) + i // pairs for i in slots]
        results = torch.ops.kdfast.attention_loss_backward(
            grad, list(features), list(maps), products, ctx.power, numbers
        )
        for i, result in zip(slots, results, strict=True):
            grads[i] = result
    return grads[:pairs], grads[pairs:], None


register("attention_map", _map_fake, _map_backward, _map_setup)
register("attention_map_backward", _map_backward_fake, once("attention_map"))
register("attention_loss", _loss_fake, _loss_backward, _loss_setup)
register("attention_loss_backward", _loss_backward_fake, once("attention_loss"))
