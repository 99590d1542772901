"""Flow of solution procedure, Gram matrices and their loss: public functions, fakes, autograd.

Yim, Joo, Bae and Kim, "A Gift from Knowledge Distillation", CVPR 2017.
"""

from __future__ import annotations

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

POOLS = ("avg", "max")
# The most channels of either map that the kernels take; above, torch's batched product is faster.
MOST_CHANNELS = {"cpu": 64, "cuda": 64}
MOST_PAIRS = 8  # of one call of the op: what the CUDA kernels' tables hold

Pair = tuple[Tensor, Tensor]


def fsp_matrix(first: Tensor, second: Tensor, pool: str = "avg") -> Tensor:
    """G[n, i, j] = 1 / (h * w) * sum over positions of F1[n, i] * F2[n, j].

    Args:
        first: [N, M, H, W], float32, float64, float16 or bfloat16, NCHW or channels_last (other
            strides are copied), brought to the size of `second` by torch's adaptive pooling.
        second: [N, K, h, w], likewise.
        pool: "avg" or "max".

    Returns:
        [N, M, K], float32 (float64 if either map is), accumulated in that type.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank, size or pool.
        NotImplementedError: when differentiated twice, by the fused path (up to 64 channels).

    Source: the paper's equation 1; its pooling is by maximum, that of the public code by average.
    """
    _check_pair("fsp_matrix", "first", first, "second", second)
    _check_pool("fsp_matrix", pool)
    if not _library.fused("fsp_matrix", first.device) or not _small(first, second):
        return reference.fsp_matrix(first, second, pool)
    first, second = _ready((first, second), pool, compute_dtype(first, second))
    return torch.ops.kdfast.fsp_matrix(first, second, pool == "max")


def fsp_loss(
    student_pairs: Sequence[Pair], teacher_pairs: Sequence[Pair], pool: str = "avg"
) -> Tensor:
    """Sum over pairs of the mean over (n, i, j) of (G_s - G_t)^2, G as in `fsp_matrix`.

    Args:
        student_pairs, teacher_pairs: sequences of (first, second), equally many, of one batch and
            device. The channels of both networks must agree pair by pair; dtypes, memory formats,
            heights and widths may differ. A feature map that appears in several pairs is best
            given as the same tensor: it is then read, and its gradient written, once.
        pool: "avg" or "max": how `first` is brought to the size of its `second`.

    Returns:
        A scalar, float32 (float64 if any feature map is). Gradients reach all feature maps that
        need one; a network that needs none costs nothing in the backward.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank, size, number of pairs or pool.
        NotImplementedError: when differentiated twice, by the fused path (up to 64 channels).

    Source: the paper's equation 2, as a mean over matrix entries and a sum over pairs.
    """
    students, teachers = _check_networks(student_pairs, teacher_pairs)
    _check_pool("fsp_loss", pool)
    if not _library.fused("fsp_loss", students[0][0].device):
        return reference.fsp_loss(students, teachers, pool)
    dtype = compute_dtype(*(f for pairs in (students, teachers) for pair in pairs for f in pair))
    terms, fused = [], []
    for pair in zip(students, teachers, strict=True):
        if _small(*pair[0]):
            fused.append(pair)
        else:
            pair = [[f.to(dtype) for f in features] for features in pair]
            terms.append(reference.fsp_loss([pair[0]], [pair[1]], pool))
    for start in range(0, len(fused), MOST_PAIRS):
        terms.append(_fused_loss(fused[start : start + MOST_PAIRS], pool, dtype))
    return sum(terms[1:], terms[0])


def _fused_loss(pairs: list[tuple[Pair, Pair]], pool: str, dtype: torch.dtype) -> Tensor:
    student: list[Tensor] = []
    teacher: list[Tensor] = []
    places = []
    for of_student, of_teacher in pairs:
        ready = (_ready(of_student, pool, dtype), _ready(of_teacher, pool, dtype))
        for s, t in zip(*ready, strict=True):
            for place in range(len(student)):
                if student[place] is s and teacher[place] is t:
                    break
            else:
                place = len(student)
                student.append(s)
                teacher.append(t)
            places.append(place)
    return torch.ops.kdfast.fsp_loss(student, teacher, places, pool == "max")[0]


def _small(first: Tensor, second: Tensor) -> bool:
    most = MOST_CHANNELS[first.device.type]
    return first.shape[1] <= most and second.shape[1] <= most


def _ready(pair: Pair, pool: str, dtype: torch.dtype) -> Pair:
    """The pair as the kernels take it: windows of equal size, all or no map float64."""
    first, second = pair
    if first.shape[2] % second.shape[2] or first.shape[3] % second.shape[3]:
        first = reference.pool_to(first.to(dtype), second, pool)
    if dtype == torch.float64:
        first, second = first.double(), second.double()
    return first, second


def _check_networks(
    student_pairs: Sequence[Pair], teacher_pairs: Sequence[Pair]
) -> tuple[list[Pair], list[Pair]]:
    op = "fsp_loss"
    networks = []
    for name, pairs in (("student_pairs", student_pairs), ("teacher_pairs", teacher_pairs)):
        if not isinstance(pairs, list | tuple) or any(
            not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs
        ):
            raise TypeError(f"{op}: {name} must be a sequence of (first, second) pairs")
        networks.append([tuple(pair) for pair in pairs])
    students, teachers = networks
    if not students or len(students) != len(teachers):
        raise ValueError(
            f"{op}: student_pairs and teacher_pairs must have equally many pairs, at least one, "
            f"got {len(students)} and {len(teachers)}"
        )
    origin = students[0][0]
    for name, pairs in (("student_pairs", students), ("teacher_pairs", teachers)):
        for i, (first, second) in enumerate(pairs):
            names = f"{name}[{i}][0]", f"{name}[{i}][1]"
            _check_pair(op, names[0], first, names[1], second)
            if first.shape[0] != origin.shape[0]:
                raise ValueError(
                    f"{op}: all feature maps must have one batch size, got {origin.shape[0]} "
                    f"for student_pairs[0][0] and {first.shape[0]} for {names[0]}"
                )
            check_device(op, names[0], first, "student_pairs[0][0]", origin)
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        for side, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"{op}: student and teacher must have equal channels in every pair, got "
                    f"{s.shape[1]} for student_pairs[{i}][{side}] and {t.shape[1]} for "
                    f"teacher_pairs[{i}][{side}]"
                )
    return students, teachers


def _check_pair(op: str, first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    for name, feature in ((first_name, first), (second_name, second)):
        check_floating(op, name, feature)
        check_shape(op, name, feature, 4, "[N, C, H, W] feature map")
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"{op}: both maps of a pair must have one batch size, got {first.shape[0]} for "
            f"{first_name} and {second.shape[0]} for {second_name}"
        )
    check_device(op, second_name, second, first_name, first)


def _check_pool(op: str, pool: str) -> None:
    if pool not in POOLS:
        raise ValueError(f"{op}: pool must be one of {POOLS}, got {pool!r}")


# Fakes: sizes, dtypes and layouts of what csrc returns.


def _matrix_fake(first: Tensor, second: Tensor, maximum: bool) -> Tensor:
    torch._check(first.shape[0] == second.shape[0])
    size = (first.shape[0], first.shape[1], second.shape[1])
    return first.new_empty(size, dtype=compute_dtype(first))


def _matrix_backward_fake(
    grad: Tensor, first: Tensor, second: Tensor, maximum: bool, wanted: list[int]
) -> list[Tensor]:
    return [gradient_like((first, second)[i]) for i in wanted]


def _loss_fake(
    student: list[Tensor], teacher: list[Tensor], pairs: list[int], maximum: bool
) -> tuple[Tensor, list[Tensor]]:
    differences = [
        _matrix_fake(student[first], student[second], maximum)
        for first, second in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    return student[0].new_empty((), dtype=compute_dtype(student[0])), differences


def _loss_backward_fake(
    grad: Tensor,
    features: list[Tensor],
    differences: list[Tensor],
    pairs: list[int],
    maximum: bool,
    wanted: list[int],
    sign: float,
) -> list[Tensor]:
    return [gradient_like(features[i]) for i in wanted]


# Autograd. Of each network only the pairs in which a gradient is wanted are kept.


def _matrix_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    first, second, ctx.maximum = inputs
    ctx.wanted = [i for i, feature in enumerate((first, second)) if feature.requires_grad]
    ctx.save_for_backward(first, second)


def _matrix_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    grads: list[Tensor | None] = [None, None]
    results = torch.ops.kdfast.fsp_matrix_backward(
        grad, *ctx.saved_tensors, ctx.maximum, ctx.wanted
    )
    for i, result in zip(ctx.wanted, results, strict=True):
        grads[i] = result
    return grads[0], grads[1], None


def _loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    student, teacher, pairs, ctx.maximum = inputs
    _, differences = output
    ctx.count, ctx.networks, saved = len(student), [], []
    for features in (student, teacher):
        wanted = [i for i, feature in enumerate(features) if feature.requires_grad]
        kept = [
            pair
            for pair in range(len(pairs) // 2)
            if pairs[2 * pair] in wanted or pairs[2 * pair + 1] in wanted
        ]
        # Places in the list of the features that are kept.
        members = sorted({pairs[2 * pair + side] for pair in kept for side in (0, 1)})
        places = [members.index(pairs[2 * pair + side]) for pair in kept for side in (0, 1)]
        ctx.networks.append((wanted, kept, members, places))
        saved += [features[i] for i in members]
    ctx.save_for_backward(*saved, *differences)
    ctx.set_materialize_grads(False)


def _loss_backward(
    ctx: Any, grad: Tensor | None, _grad_differences: Any
) -> tuple[list[Tensor | None], list[Tensor | None], None, None]:
    grads: list[list[Tensor | None]] = [[None] * ctx.count, [None] * ctx.count]
    if grad is not None:
        saved = list(ctx.saved_tensors)
        differences = saved[sum(len(members) for _, _, members, _ in ctx.networks) :]
        for side, (wanted, kept, members, places) in enumerate(ctx.networks):
            features, saved = saved[: len(members)], saved[len(members) :]
            if not wanted:
                continue
            results = torch.ops.kdfast.fsp_loss_backward(
                grad,
                features,
                [differences[pair] for pair in kept],
                places,
                ctx.maximum,
                [members.index(i) for i in wanted],
                1.0 if side == 0 else -1.0,
            )
            for i, result in zip(wanted, results, strict=True):
                grads[side][i] = result
    return grads[0], grads[1], None, None


register("fsp_matrix", _matrix_fake, _matrix_backward, _matrix_setup)
register("fsp_matrix_backward", _matrix_backward_fake, once("fsp_matrix"))
register("fsp_loss", _loss_fake, _loss_backward, _loss_setup)
register("fsp_loss_backward", _loss_backward_fake, once("fsp_loss"))
