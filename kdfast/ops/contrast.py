"""Contrastive representation distillation (CRD): draws, loss, bank update.

Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699.

Every training sample has a row in two banks [n, d], one of student and one of teacher embeddings.
The student's embedding of a sample should resemble the teacher's row of the same sample and none of
K rows of samples of other classes, and the other way round.
"""

from __future__ import annotations

import math
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
from kdfast.ops._key import Key


def draw_negatives(
    labels: Tensor,
    class_offsets: Tensor,
    negatives: int,
    ids: Tensor,
    key: Key,
    order: Tensor | None = None,
) -> Tensor:
    """For each sample of the batch its own index and K indices of samples of other classes.

    Think of the data set sorted by class: class c has the places class_offsets[c] to
    class_offsets[c + 1] - 1. K places are drawn uniformly from the n - n_c places of the other
    classes: without replacement where there are so many, else with. `order` turns places into
    data set indices, which is what the columns 1..K are then; without it they are places, so the
    data set must be sorted by class, or `ids` be places as well.

    Draws without replacement are the first K values of a permutation of the pool, a Feistel network
    under Philox(key, id): no table, every value alone, the same on every device and for any split
    of the batch. Draws depend on (key, id) and the pool, so take a key of the epoch or step. Each
    draw is uniform; several of one row are so together only for pools of some fifty or more.

    Args:
        labels: [B] int64, the class of each sample of the batch.
        class_offsets: [classes + 1] int64, from 0 to n < 2^31.
        negatives: K >= 1.
        ids: [B] int64, the data set index of each sample: column 0, and its random stream.
        key: of the draws.
        order: [n] int64, data set index of each place, `argsort(targets)`, or None.

    Returns:
        [B, K + 1] int64.

    Raises:
        TypeError, ValueError: for a wrong dtype or shape, negatives < 1; on the CPU also for a
            label outside the classes or a class that has all samples. On CUDA, where asking would
            wait for the device, such rows are -1, whose loss is NaN.
    """
    op = "draw_negatives"
    for name, tensor, meaning in (
        ("labels", labels, "[B] vector"),
        ("class_offsets", class_offsets, "[classes + 1] vector"),
        ("ids", ids, "[B] vector"),
        ("order", order, "[n] vector"),
    ):
        if tensor is not None:
            _check_integers(op, name, tensor, 1, meaning)
            check_device(op, name, tensor, "labels", labels)
    if class_offsets.numel() < 2:
        raise ValueError(f"{op}: class_offsets must have classes + 1 entries, got 1")
    _check_batch(op, "ids", ids, "labels", labels)
    if isinstance(negatives, bool) or not isinstance(negatives, int):
        raise TypeError(f"{op}: negatives must be an integer, got {type(negatives).__name__}")
    if negatives < 1:
        raise ValueError(f"{op}: negatives must be at least 1, got {negatives}")
    if not isinstance(key, Key):
        raise TypeError(f"{op}: key must be a Key, got {type(key).__name__}")
    if not _library.fused(op, labels.device):
        return reference.draw_negatives(labels, class_offsets, negatives, ids, key, order)
    order = None if order is None else order.contiguous()
    tensors = (labels.contiguous(), class_offsets.contiguous(), order, ids.contiguous())
    return _call(op, torch.ops.kdfast.draw_negatives, *tensors, negatives, key.signed)


def contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    indices: Tensor,
    z_student: Tensor,
    z_teacher: Tensor,
    temperature: float,
) -> Tensor:
    """L(student against the teacher's bank) + L(teacher against the student's bank), where

    L = -mean over b of [ log(x_b0 / (x_b0 + c + eps)) + sum over j of log(c / (x_bj + c + eps)) ],

    x_bj = exp(<M[I_bj], e_b> / temperature) / Z, c = K / n, eps = 1e-7: the sum, not the mean, over
    the K negatives.

    Args:
        student, teacher: [B, d] embeddings of length 1, floating. Lengths are not checked.
        student_bank, teacher_bank: [n, d] float32 or float64, constants: they get no gradient, and
            may change (`contrastive_update_`) before the backward, which does not read them.
        indices: [B, K + 1] int64 rows of the banks, column 0 the positive (`draw_negatives`).
        z_student, z_teacher: scalars Z > 0 of the two sides (`contrastive_constants`).
        temperature: > 0.

    Returns:
        A scalar, float32 (float64 if an embedding or bank is). Scores are full float32 whatever
        torch's matrix product precision or autocast say, and [B, K + 1, d] is never stored.

    Raises:
        TypeError, ValueError: for a wrong dtype or shape, temperature <= 0; on the CPU also for an
            index outside the banks. On CUDA such an index makes the loss NaN.
        NotImplementedError: when differentiated twice.

    Source: the paper's equations 14 to 18 in the form of its published code, which has the eps.
    """
    op = "contrastive_loss"
    embeddings, banks = _check_sides(op, student, teacher, student_bank, teacher_bank, indices)
    _check_temperature(op, temperature)
    for name, z in (("z_student", z_student), ("z_teacher", z_teacher)):
        check_floating(op, name, z)
        if z.numel() != 1:
            raise ValueError(f"{op}: {name} must be a scalar, got shape {list(z.shape)}")
        check_device(op, name, z, "student", student)
    z_student, z_teacher = z_student.detach().reshape(()), z_teacher.detach().reshape(())
    if not _library.fused(op, student.device):
        return reference.contrastive_loss(
            *embeddings, *banks, indices, z_student, z_teacher, temperature
        )
    slopes = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
    constants = (z_student.to(banks[0].dtype), z_teacher.to(banks[0].dtype))
    arguments = (*embeddings, *banks, indices.contiguous(), *constants, float(temperature), slopes)
    return _call(op, torch.ops.kdfast.contrastive_loss, *arguments)[0]


def contrastive_constants(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    indices: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(Z_student, Z_teacher), Z = n * mean over b and j of exp(<M[I_bj], e_b> / temperature).

    CRD sets them so from its first batch and never again. Arguments and errors as in
    `contrastive_loss`; scalars in its dtype, without gradient.
    """
    op = "contrastive_constants"
    embeddings, banks = _check_sides(op, student, teacher, student_bank, teacher_bank, indices)
    _check_temperature(op, temperature)
    embeddings, banks = [x.detach() for x in embeddings], [x.detach() for x in banks]
    if not _library.fused(op, student.device):
        return reference.contrastive_constants(*embeddings, *banks, indices, temperature)
    one = torch.ones((), dtype=banks[0].dtype, device=student.device)
    arguments = (*embeddings, *banks, indices.contiguous(), one, one, float(temperature), False)
    mean = _call(op, torch.ops.kdfast.contrastive_loss, *arguments)[1]
    return mean[0] * student_bank.shape[0], mean[1] * student_bank.shape[0]


def contrastive_update_(
    student_bank: Tensor,
    teacher_bank: Tensor,
    student: Tensor,
    teacher: Tensor,
    index: Tensor,
    momentum: float,
) -> None:
    """M[i] <- v / max(||v||, 1e-12), v = momentum * M[i] + (1 - momentum) * e[i], in both banks.

    Args:
        student_bank, teacher_bank: [n, d] float32 or float64, changed in place; other rows keep
            their bits.
        student, teacher: [B, d] embeddings, floating; no gradient passes.
        index: [B] int64 rows. Of equal ones the last counts, as if the others were not there.
        momentum: in [0, 1].

    Raises:
        TypeError, ValueError: for a wrong dtype or shape, a bank that is not contiguous, a momentum
            outside [0, 1]; on the CPU also for an index outside the banks, before anything is
            written. On CUDA such an index is passed over.

    Source: the memory buffer of the paper's section 3.3; momentum 0.5 in its code.
    """
    op = "contrastive_update_"
    _check_embeddings(op, student, teacher, student_bank, teacher_bank)
    _check_integers(op, "index", index, 1, "[B] vector")
    _check_batch(op, "index", index, "student", student)
    check_device(op, "index", index, "student", student)
    for name, bank in (("student_bank", student_bank), ("teacher_bank", teacher_bank)):
        if not bank.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {bank.stride()}")
    if student_bank.dtype != teacher_bank.dtype:
        raise TypeError(
            f"{op}: the banks must have one dtype, got {student_bank.dtype} for student_bank and "
            f"{teacher_bank.dtype} for teacher_bank"
        )
    if not 0 <= momentum <= 1:
        raise ValueError(f"{op}: momentum must be in [0, 1], got {momentum}")
    arguments = (student_bank, teacher_bank, student.detach(), teacher.detach(), index)
    if not _library.fused(op, student.device):
        return reference.contrastive_update_(*arguments, momentum)
    student, teacher = (x.detach().to(student_bank.dtype).contiguous() for x in (student, teacher))
    arguments = (student_bank, teacher_bank, student, teacher, index.contiguous())
    return _call(op, torch.ops.kdfast.contrastive_update_, *arguments, float(momentum))


def _call(op: str, function: Any, *arguments: Any) -> Any:
    """What the CPU kernels find wrong in the values of integers becomes a `ValueError`."""
    if torch.compiler.is_compiling():
        return function(*arguments)
    try:
        return function(*arguments)
    except RuntimeError as error:
        name = function.__name__
        _, found, reason = str(error).partition(f"{name}: ")
        if not found or isinstance(error, NotImplementedError):
            raise
        raise ValueError(f"{op}: {reason.splitlines()[0]}") from None


def _check_integers(op: str, name: str, tensor: Tensor, dimensions: int, meaning: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {tensor.dtype}")
    check_shape(op, name, tensor, dimensions, meaning)


def _check_batch(op: str, name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    if tensor.shape[0] != first.shape[0]:
        raise ValueError(
            f"{op}: {name} must have the batch size of {first_name}, "
            f"got {tensor.shape[0]} and {first.shape[0]}"
        )


def _check_temperature(op: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")


def _check_embeddings(
    op: str, student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor
) -> None:
    for name, tensor, meaning in (
        ("student", student, "[B, d] batch of embeddings"),
        ("teacher", teacher, "[B, d] batch of embeddings"),
        ("student_bank", student_bank, "[n, d] bank"),
        ("teacher_bank", teacher_bank, "[n, d] bank"),
    ):
        check_floating(op, name, tensor)
        check_shape(op, name, tensor, 2, meaning)
        check_device(op, name, tensor, "student", student)
        if name.endswith("bank") and tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} must be float32 or float64, got {tensor.dtype}")
        if tensor.shape[1] != student.shape[1]:
            raise ValueError(
                f"{op}: all embeddings and banks must have one dimension d, "
                f"got {student.shape[1]} for student and {tensor.shape[1]} for {name}"
            )
    _check_batch(op, "teacher", teacher, "student", student)
    if student_bank.shape != teacher_bank.shape:
        raise ValueError(
            f"{op}: the banks must have one shape, got {list(student_bank.shape)} "
            f"and {list(teacher_bank.shape)}"
        )


def _check_sides(
    op: str,
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    indices: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Embeddings and banks in the dtype that is computed in, dense, the banks as constants."""
    _check_embeddings(op, student, teacher, student_bank, teacher_bank)
    _check_integers(op, "indices", indices, 2, "[B, K + 1] matrix of bank rows")
    _check_batch(op, "indices", indices, "student", student)
    check_device(op, "indices", indices, "student", student)
    if indices.shape[1] < 2:
        raise ValueError(f"{op}: indices must have a positive and at least one negative a row")
    dtype = compute_dtype(student, teacher, student_bank, teacher_bank)
    return (
        [x.to(dtype).contiguous() for x in (student, teacher)],
        [x.detach().to(dtype).contiguous() for x in (student_bank, teacher_bank)],
    )


def _draw_fake(
    labels: Tensor,
    class_offsets: Tensor,
    order: Tensor | None,
    ids: Tensor,
    negatives: int,
    key: int,
) -> Tensor:
    torch._check(labels.shape[0] == ids.shape[0])
    return labels.new_empty((labels.shape[0], negatives + 1))


def _loss_fake(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    indices: Tensor,
    z_student: Tensor,
    z_teacher: Tensor,
    temperature: float,
    slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, dim = student.shape
    torch._check(indices.shape[0] == batch)
    rows = batch if slopes else 0
    return (
        student.new_empty(()),
        student.new_empty((2,)),
        student.new_empty((rows, dim)),
        student.new_empty((rows, dim)),
    )


def _backward_fake(
    grad: Tensor, student: Tensor, teacher: Tensor, student_slope: Tensor, teacher_slope: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(student_slope), torch.empty_like(teacher_slope)


def _update_fake(
    student_bank: Tensor,
    teacher_bank: Tensor,
    student: Tensor,
    teacher: Tensor,
    index: Tensor,
    momentum: float,
) -> None:
    torch._check(index.shape[0] == student.shape[0])


def _loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:2], *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, grad: Tensor | None, *_grads: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    student, teacher = torch.ops.kdfast.contrastive_loss_backward(grad, *ctx.saved_tensors)
    return student, teacher, *(None,) * 7


register("draw_negatives", _draw_fake)
register("contrastive_loss", _loss_fake, _loss_backward, _loss_setup)
register("contrastive_loss_backward", _backward_fake, once("contrastive_loss"))
register("contrastive_update_", _update_fake)
