"""Attention maps and the attention transfer loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.ops._checks import compute_dtype

EPS = 1e-12  # smallest norm an attention map is divided by


def attention_map(feature: Tensor, power: float = 2.0) -> Tensor:
    """Q = A / max(||A||_2, 1e-12), A = mean over channels of |F|^p; see `kdfast.ops`."""
    feature = feature.to(compute_dtype(feature))
    if power == 2:
        energy = feature.square()  # [N, C, H, W]
    elif power == 1:
        energy = feature.abs()
    else:
        # |F|^p has slope 0 at F = 0 here also for p < 1, where autograd would give inf * 0.
        zero = feature == 0
        energy = feature.masked_fill(zero, 1).abs().pow(power).masked_fill(zero, 0)
    mean = energy.mean(1).flatten(1)  # [N, H*W]
    return mean / torch.linalg.vector_norm(mean, dim=1, keepdim=True).clamp_min(EPS)


def attention_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    power: float = 2.0,
) -> Tensor:
    """Sum over pairs of mean((Q_s - Q_t)^2); see `kdfast.ops`."""
    if isinstance(student, Tensor):
        student, teacher = [student], [teacher]
    terms = []
    for s, t in zip(student, teacher, strict=True):
        s, t = match_size(s, t)
        terms.append((attention_map(s, power) - attention_map(t, power)).square().mean())
    return sum(terms[1:], terms[0])


def match_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger feature map to the smaller, height and width each."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return _pool(student, size), _pool(teacher, size)


def _pool(feature: Tensor, size: list[int]) -> Tensor:
    return feature if list(feature.shape[2:]) == size else F.adaptive_avg_pool2d(feature, size)
