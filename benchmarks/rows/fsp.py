"""fsp_loss on the pairs of a ResNet, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from kdfast import ops
from kdfast.ops import reference
from rows import Row, feature, size


def broadcast(student_pairs: list, teacher_pairs: list) -> Tensor:
    """The Gram matrices as means of [N, M, K, h, w] products, which public code forms."""

    def matrix(first: Tensor, second: Tensor) -> Tensor:
        first = reference.pool_to(first, second)
        return (first.unsqueeze(2) * second.unsqueeze(1)).mean((3, 4))

    return sum(
        (matrix(*s) - matrix(*t)).square().mean()
        for s, t in zip(student_pairs, teacher_pairs, strict=True)
    )


def fsp_loss(device: str) -> Iterator[Row]:
    """Read every feature map of both networks; read the student's again, write its gradients."""
    cifar = [(128, 16, 32, 32), (128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)]
    wide = [(64, 64, 56, 56), (64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14)]
    goals = {"eager": 1.5, "broadcast": 10} if device == "cpu" else {"eager": 2}
    layers = [
        (cifar, torch.float32, "nchw", goals),
        (cifar, torch.float32, "channels_last", goals),
        (cifar, torch.bfloat16, "nchw", {}),
        (cifar, torch.bfloat16, "channels_last", {}),
        (wide, torch.float32, "nchw", {}),
    ]
    for shapes, dtype, format, goal in layers:
        student, teacher = (
            [feature(shape, dtype, format, device) for shape in shapes] for _ in range(2)
        )
        for tensor in student:
            tensor.requires_grad_()

        def step(loss: Callable, student=student, teacher=teacher) -> tuple[Tensor, ...]:
            pairs = [list(pairwise(features)) for features in (student, teacher)]
            return torch.autograd.grad(loss(*pairs), student)

        def compiled(step: Callable = step) -> Callable[[], object]:
            loss = torch.compile(reference.fsp_loss, dynamic=False)
            return lambda: step(loss)

        steps = {"fused": ops.fsp_loss, "eager": reference.fsp_loss}
        if shapes is cifar and dtype == torch.float32:
            steps["broadcast"] = broadcast
        yield Row(
            "fsp_loss",
            " ".join("x".join(map(str, shape)) for shape in shapes),
            dtype,
            {name: lambda step=step, loss=loss: step(loss) for name, loss in steps.items()},
            format,
            compiled,
            bytes=4 * size(*student),
            goals=goal,
        )


ROWS = {"fsp_loss": fsp_loss}
