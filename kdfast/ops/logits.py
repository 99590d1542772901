"""Losses on logits: soft targets, cross-entropy with them, and a cohort of teachers.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
Asadian, Salehi-Abari, "Distilling Knowledge via Intermediate Classifiers", 2021, arXiv 2103.00497.
"""

from __future__ import annotations

import contextlib
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

MOST_MEMBERS = 128  # of a cohort; csrc/logits.h


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * mean_b sum_c p_t (log p_t - log p_s), p = softmax(z / T).

    Args:
        student_logits, teacher_logits: [N, C], float32, float64, float16 or bfloat16; two dtypes
            are promoted. Copied where a row is not contiguous.
        temperature: T > 0.

    Returns:
        A scalar, float32 (float64 if any input is), accumulated in that type. A class whose
        softened teacher probability is 0 has no share in it, also where the student has -inf.
        Gradients reach student and teacher; a teacher that needs none costs nothing.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank or size, or temperature <= 0.
        NotImplementedError: when differentiated twice.

    Source: the paper's section 2. d/dz_s = (T / N) (p_s - p_t); T^2 makes it comparable across T.
    """
    op = "soft_target_loss"
    _check(op, student_logits, "teacher_logits", teacher_logits, 2, temperature)
    if not _library.fused(op, student_logits.device):
        return reference.soft_target_loss(student_logits, teacher_logits, temperature)
    return _fused(student_logits, teacher_logits, None, [1.0], 0.0, temperature, 0.0)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    temperature: float,
    gamma: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """gamma * CE(z_s, y) + alpha * soft target, in one pass over the logits.

    Args:
        student_logits, teacher_logits, temperature: see `soft_target_loss`.
        labels: class indices, int64 [N], or probabilities, floating [N, C], without gradient.
        alpha, gamma: weights; gamma None is 1 - alpha. A term of weight 0 is left out, whatever
            its value.
        label_smoothing: s in [0, 1]; labels become (1 - s) y + s / C.

    Returns:
        A scalar, see `soft_target_loss`.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank or size, temperature <= 0, label_smoothing
            outside [0, 1], a weight that is not finite, or a label that is no class. On CUDA such
            a label, -100 as well, makes the loss NaN instead: to look at it would stall the device.
        NotImplementedError: when differentiated twice.
    """
    op = "distillation_loss"
    _check(op, student_logits, "teacher_logits", teacher_logits, 2, temperature)
    _check_labels(op, student_logits, labels)
    gamma = 1 - alpha if gamma is None else gamma
    if not (math.isfinite(alpha) and math.isfinite(gamma)):
        raise ValueError(f"{op}: alpha and gamma must be finite, got {alpha} and {gamma}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    try:
        if not _library.fused(op, student_logits.device):
            return reference.distillation_loss(
                student_logits, teacher_logits, labels, alpha, temperature, gamma, label_smoothing
            )
        return _fused(
            student_logits, teacher_logits, labels, [alpha], gamma, temperature, label_smoothing
        )
    except RuntimeError:
        _check_classes(op, student_logits, labels)
        raise


def cohort_loss(
    student_logits: Tensor,
    cohort_logits: Tensor,
    labels: Tensor,
    alpha: float | Sequence[float] | Tensor,
    temperature: float,
    reduction: str = "sum",
) -> Tensor:
    """Sum over members j of (1 - alpha_j) CE(z_s, y) + alpha_j soft target of member j.

    Args:
        student_logits: [N, C].
        cohort_logits: [M, N, C], the logits of M teachers, at most 128.
        labels, temperature: see `distillation_loss`.
        alpha: one weight for all, or M of them as a sequence or a tensor on the CPU. A member of
            weight 0 is removed, its share of CE too.
        reduction: "sum", or "mean" over the members that are not removed.

    Returns:
        A scalar, see `soft_target_loss`. Each logit is read once; nothing is kept per member.

    Raises:
        As `distillation_loss`; and ValueError where every member is removed.

    Source: Asadian and Salehi-Abari, in the summed form of their code. The gradient is that of M
    soft target losses against the members' mean softened distribution.
    """
    op = "cohort_loss"
    _check(op, student_logits, "cohort_logits", cohort_logits, 3, temperature)
    _check_labels(op, student_logits, labels)
    alphas = _alphas(op, alpha, cohort_logits.shape[0])
    if reduction not in ("sum", "mean"):
        raise ValueError(f"{op}: reduction must be 'sum' or 'mean', got {reduction!r}")
    kept = [a for a in alphas if a != 0]
    try:
        if not _library.fused(op, student_logits.device):
            return reference.cohort_loss(
                student_logits, cohort_logits, labels, alphas, temperature, reduction
            )
        share = 1 / len(kept) if reduction == "mean" else 1.0
        gamma = share * sum(1 - a for a in kept)
        weights = [share * a for a in alphas]
        return _fused(student_logits, cohort_logits, labels, weights, gamma, temperature, 0.0)
    except RuntimeError:
        _check_classes(op, student_logits, labels)
        raise


def _fused(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    alpha: list[float],
    gamma: float,
    temperature: float,
    label_smoothing: float,
) -> Tensor:
    if student.dtype != teacher.dtype:
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        student, teacher = student.to(dtype), teacher.to(dtype)
    if labels is not None and labels.dtype != torch.int64:
        labels = labels.to(compute_dtype(student))
    # Slopes of the student are at most 16 units: in float16 they neither overflow nor get lost.
    unit = (abs(gamma) + temperature * sum(abs(a) for a in alpha)) / 16 or 1.0
    weights = (alpha, gamma, temperature, label_smoothing, unit)
    grad = torch.is_grad_enabled()
    wanted = (grad and student.requires_grad, grad and teacher.requires_grad)
    if torch.compiler.is_compiling() or not any(wanted):
        return _FORWARD(student, teacher, labels, *weights, *wanted)[0]
    return _Loss.apply(student, teacher, labels, weights, wanted)


def _check(
    op: str, student: Tensor, name: str, teacher: Tensor, rank: int, temperature: float
) -> None:
    # One condition: on small batches, explained checks would be a good part of the time.
    if not (
        isinstance(student, Tensor)
        and isinstance(teacher, Tensor)
        and student.dtype in DTYPES
        and teacher.dtype in DTYPES
        and len(shape := teacher.shape) == rank
        and student.shape == (shape if rank == 2 else shape[1:])
        and 0 not in shape
        and student.device == teacher.device
    ):
        _explain(op, student, name, teacher, rank)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")


def _explain(op: str, student: Tensor, name: str, teacher: Tensor, rank: int) -> None:
    check_floating(op, "student_logits", student)
    check_floating(op, name, teacher)
    check_shape(op, "student_logits", student, 2, "[N, C] matrix of logits")
    wanted = "[N, C] matrix of logits" if rank == 2 else "[M, N, C] stack of logits"
    check_shape(op, name, teacher, rank, wanted)
    if student.shape != teacher.shape[rank - 2 :]:
        raise ValueError(
            f"{op}: {name} must have the student's batch and classes, got {list(teacher.shape)} "
            f"for {list(student.shape)}"
        )
    check_device(op, name, teacher, "student_logits", student)


def _check_labels(op: str, student: Tensor, labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype == torch.int64:
        if labels.dim() != 1 or labels.shape[0] != student.shape[0]:
            raise ValueError(
                f"{op}: labels must be [N] class indices, got shape {list(labels.shape)} "
                f"for {student.shape[0]} rows of logits"
            )
    elif not labels.dtype.is_floating_point:
        raise TypeError(
            f"{op}: labels must be int64 class indices or floating probabilities, "
            f"got {labels.dtype}"
        )
    elif labels.shape != student.shape:
        raise ValueError(
            f"{op}: labels given as probabilities must be [N, C], got shape {list(labels.shape)} "
            f"for logits {list(student.shape)}"
        )
    elif labels.requires_grad:
        raise ValueError(f"{op}: labels must not require a gradient, there is none for them")
    check_device(op, "labels", labels, "student_logits", student)


def _check_classes(op: str, student: Tensor, labels: Tensor) -> None:
    """Names the first label that is no class, if that was the failure."""
    if labels.is_cpu and labels.dtype == torch.int64:
        wrong = torch.nonzero((labels < 0) | (labels >= student.shape[1]))
        if len(wrong):
            row = wrong[0].item()
            raise ValueError(
                f"{op}: labels must be below {student.shape[1]} classes and not negative, "
                f"got {labels[row]} at index {row}"
            )


def _alphas(op: str, alpha: float | Sequence[float] | Tensor, members: int) -> list[float]:
    if members > MOST_MEMBERS:
        raise ValueError(f"{op}: at most {MOST_MEMBERS} members, got {members}")
    if isinstance(alpha, int | float):
        alphas = [float(alpha)] * members
    elif isinstance(alpha, Tensor) and not alpha.is_cpu:
        raise ValueError(f"{op}: alpha must be on the CPU, got a tensor on {alpha.device}")
    elif isinstance(alpha, Tensor) and alpha.requires_grad:
        raise ValueError(f"{op}: alpha must not require a gradient, there is none for it")
    else:
        values = alpha.flatten().tolist() if isinstance(alpha, Tensor) else alpha
        alphas = [float(value) for value in values]
    if len(alphas) != members:
        raise ValueError(f"{op}: alpha must have {members} members' weights, got {len(alphas)}")
    if not all(map(math.isfinite, alphas)) or not any(alphas):
        raise ValueError(f"{op}: alpha must be finite and not 0 for all members, got {alphas}")
    return alphas


def _fake(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    alpha: list[float],
    gamma: float,
    temperature: float,
    label_smoothing: float,
    unit: float,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(student_logits.shape == teacher_logits.shape[-2:])
    loss = student_logits.new_empty((), dtype=compute_dtype(student_logits))
    slopes = [
        logits.new_empty(logits.shape if wanted else (0,))
        for logits, wanted in (
            (student_logits, student_gradient),
            (teacher_logits, teacher_gradient),
        )
    ]
    return loss, *slopes


def _backward_fake(grad: Tensor, slope: Tensor, logits: Tensor, unit: float) -> Tensor:
    return slope.new_empty(slope.shape)


# Autograd. The forward has read all logits and taken every exp, and leaves the wanted gradients
# behind, but for a factor. Logits are kept for the graph only: a second derivative must be refused,
# and a slope alone would pass for a constant.


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    logits_and_slopes = iter(ctx.saved_tensors)
    return [
        _BACKWARD(grad, next(logits_and_slopes), next(logits_and_slopes), ctx.unit)
        if wanted
        else None
        for wanted in ctx.wanted
    ]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.unit, *ctx.wanted = inputs[-3:]
    kept = [(output[i + 1], inputs[i]) for i, wanted in enumerate(ctx.wanted) if wanted]
    ctx.save_for_backward(*(tensor for pair in kept for tensor in pair))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_slopes: None) -> tuple:
    gradients = [None, None] if grad is None else _gradients(ctx, grad)
    return *gradients, None, None, None, None, None, None, None, None


register("distillation_loss", _fake, _backward, _setup)
register(
    "distillation_loss_backward",
    _backward_fake,
    once("soft_target_loss, distillation_loss or cohort_loss"),
)
if _library.NO_EXTENSION is None:
    _FORWARD = torch.ops.kdfast.distillation_loss.default
    _BACKWARD = torch.ops.kdfast.distillation_loss_backward.default
# Skips autograd's part of a call, which would only find that there is nothing to do.
_BELOW_AUTOGRAD = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


class _Loss(torch.autograd.Function):
    """The registered formula without the wrapper around it, which doubles the time of a call."""

    @staticmethod
    def forward(ctx: Any, student, teacher, labels, weights: tuple, wanted: tuple) -> Tensor:
        with _BELOW_AUTOGRAD():
            loss, *slopes = _FORWARD(student, teacher, labels, *weights, *wanted)
        ctx.unit, ctx.wanted = weights[-1], wanted
        if wanted == (True, False):
            ctx.save_for_backward(slopes[0], student)
        elif wanted == (False, True):
            ctx.save_for_backward(slopes[1], teacher)
        else:
            ctx.save_for_backward(slopes[0], student, slopes[1], teacher)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if torch.is_grad_enabled():  # create_graph
            return *_gradients(ctx, grad), None, None, None
        with _BELOW_AUTOGRAD():
            return *_gradients(ctx, grad), None, None, None
