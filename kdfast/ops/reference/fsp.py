"""Flow of solution procedure: Gram matrices of two feature maps and their loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from kdfast.ops._checks import compute_dtype


def fsp_matrix(first: Tensor, second: Tensor, pool: str = "avg") -> Tensor:
    """G[n, i, j] = mean over positions of F1[n, i] * F2[n, j]; see `kdfast.ops`."""
    dtype = compute_dtype(first, second)
    first, second = pool_to(first.to(dtype), second, pool), second.to(dtype)
    return first.flatten(2) @ second.flatten(2).mT / (second.shape[2] * second.shape[3])


def fsp_loss(
    student_pairs: Sequence[tuple[Tensor, Tensor]],
    teacher_pairs: Sequence[tuple[Tensor, Tensor]],
    pool: str = "avg",
) -> Tensor:
    """Sum over pairs of mean((G_s - G_t)^2); see `kdfast.ops`."""
    terms = [
        (fsp_matrix(*student, pool) - fsp_matrix(*teacher, pool)).square().mean()
        for student, teacher in zip(student_pairs, teacher_pairs, strict=True)
    ]
    return sum(terms[1:], terms[0])


def pool_to(first: Tensor, second: Tensor, pool: str = "avg") -> Tensor:
    """`first` at the height and width of `second`, by torch's adaptive pooling."""
    size = list(second.shape[2:])
    if list(first.shape[2:]) == size:
        return first
    return (F.adaptive_avg_pool2d if pool == "avg" else F.adaptive_max_pool2d)(first, size)
