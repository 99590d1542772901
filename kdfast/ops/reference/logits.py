"""Soft targets, soft targets with cross-entropy, and a cohort of teachers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdfast.ops._checks import compute_dtype


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * mean_b sum_c p_t (log p_t - log p_s), p = softmax(z / T); see `kdfast.ops`."""
    dtype = compute_dtype(student_logits, teacher_logits)
    log_s = (student_logits.to(dtype) / temperature).log_softmax(1)
    log_t = (teacher_logits.to(dtype) / temperature).log_softmax(1)
    p = log_t.exp()
    # A class that the teacher excludes has no share, whatever the student says; not 0 * inf.
    difference = (log_t - log_s).masked_fill(p == 0, 0)
    return temperature * temperature * (p * difference).sum(1).mean()


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    temperature: float,
    gamma: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """gamma * CE + alpha * soft target; a term of weight 0 is left out. See `kdfast.ops`."""
    gamma = 1 - alpha if gamma is None else gamma
    terms = []
    if gamma != 0:
        dtype = compute_dtype(student_logits, teacher_logits)
        terms.append(gamma * _cross_entropy(student_logits.to(dtype), labels, label_smoothing))
    if alpha != 0:
        terms.append(alpha * soft_target_loss(student_logits, teacher_logits, temperature))
    return sum(terms) if terms else (student_logits * 0).sum()


def cohort_loss(
    student_logits: Tensor,
    cohort_logits: Tensor,
    labels: Tensor,
    alpha: float | Sequence[float] | Tensor,
    temperature: float,
    reduction: str = "sum",
) -> Tensor:
    """Sum or mean over members of (1 - alpha_j) CE + alpha_j soft target; see `kdfast.ops`."""
    members = cohort_logits.shape[0]
    alphas = [alpha] * members if isinstance(alpha, int | float) else list(map(float, alpha))
    losses = [
        distillation_loss(student_logits, logits, labels, a, temperature)
        for a, logits in zip(alphas, cohort_logits, strict=True)
        if a != 0
    ]
    return sum(losses) / (len(losses) if reduction == "mean" else 1)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    log_p = logits.log_softmax(1)
    if labels.dtype.is_floating_point:
        labels = labels.to(logits.dtype)
        along = (labels * log_p.masked_fill(labels == 0, 0)).sum(1)
    else:
        along = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    if smoothing:
        along = (1 - smoothing) * along + smoothing * log_p.mean(1)
    return -along.mean()
