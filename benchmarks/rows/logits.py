"""distillation_loss and cohort_loss, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast import ops
from rows import Row, size

ALPHA, TEMPERATURE = 0.9, 4.0
SMALL = (
    "of 160 us at 64x10 the kernels take 30; a Python autograd function that does nothing takes 60"
)
SHAPES = {
    "cpu": [(64, 10), (64, 100), (128, 100), (256, 100), (256, 1000), (64, 21841)],
    "cuda": [(n, c) for c in (10, 100, 1000, 21841) for n in (64, 256, 4096)],
}


def natural(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss as it is written with torch's functions."""
    log_student = F.log_softmax(student / TEMPERATURE, 1)
    log_teacher = F.log_softmax(teacher / TEMPERATURE, 1)
    soft = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    hard = F.cross_entropy(student, labels)
    return (1 - ALPHA) * hard + ALPHA * TEMPERATURE * TEMPERATURE * soft


def natural_cohort(student: Tensor, cohort: Tensor, labels: Tensor) -> Tensor:
    """A sum over members; what they share, the student's side, is computed once."""
    log_student = F.log_softmax(student / TEMPERATURE, 1)
    hard = F.cross_entropy(student, labels)
    total = torch.zeros((), device=student.device)
    for logits in cohort:
        log_teacher = F.log_softmax(logits / TEMPERATURE, 1)
        soft = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        total = total + (1 - ALPHA) * hard + ALPHA * TEMPERATURE * TEMPERATURE * soft
    return total


def _rows(device: str, op: str, members: int | None) -> Iterator[Row]:
    fused = {
        "distillation_loss": lambda s, t, y: ops.distillation_loss(s, t, y, ALPHA, TEMPERATURE),
        "cohort_loss": lambda s, t, y: ops.cohort_loss(s, t, y, ALPHA, TEMPERATURE),
    }[op]
    eager = natural if members is None else natural_cohort
    dtypes = [torch.float32, torch.bfloat16] if device == "cuda" else [torch.float32]
    for dtype in dtypes:
        for n, c in SHAPES[device]:
            student = torch.randn(n, c, device=device).mul(2).to(dtype).requires_grad_()
            shape = (n, c) if members is None else (members, n, c)
            teacher = torch.randn(shape, device=device).mul(2).to(dtype)
            labels = torch.randint(c, (n,), device=device)

            def step(
                loss: Callable, student=student, teacher=teacher, labels=labels
            ) -> tuple[Tensor, ...]:
                return torch.autograd.grad(loss(student, teacher, labels), student)

            def compiled(step: Callable = step) -> Callable[[], object]:
                loss = torch.compile(eager, dynamic=False)
                return lambda: step(loss)

            if device == "cuda":
                goals = {"eager": 4, "compile": 1.3} if members is None else {"eager": 6}
            else:
                goals = {"eager": 3 if n * c >= 25600 else 2}
            yield Row(
                op,
                f"{n}x{c}" if members is None else f"{members} members, {n}x{c}",
                dtype,
                {
                    "fused": lambda step=step: step(fused),
                    "eager": lambda step=step: step(eager),
                },
                "rows",
                compiled,
                # Read all logits, write the gradient; it is read and written again when scaled.
                bytes=size(student, teacher) + 3 * size(student),
                goals=goals if dtype == torch.float32 else {},
                why=SMALL if n * c <= 25600 else "",
            )


def distillation_loss(device: str) -> Iterator[Row]:
    return _rows(device, "distillation_loss", None)


def cohort_loss(device: str) -> Iterator[Row]:
    return _rows(device, "cohort_loss", 4)


ROWS = {"distillation_loss": distillation_loss, "cohort_loss": cohort_loss}
