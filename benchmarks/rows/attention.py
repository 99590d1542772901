"""attention_loss, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdfast import ops
from kdfast.ops import reference
from rows import Row, feature, size

SMALL = "eager takes 9 ms and the bytes alone 2 ms at the copy speed, so 4.4x is the limit"


def attention_loss(device: str) -> Iterator[Row]:
    """Read F_s and F_t; read F_s, write dF_s."""
    pair, stages = [(128, 64, 32, 32)], [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)]
    large = [(512, 256, 32, 32)]
    goals = {"eager": 10, "compile": 2, "floor": 0.6}
    layers = [
        (pair, torch.float32, "nchw", goals, ""),
        (pair, torch.float32, "channels_last", goals, ""),
        (pair, torch.bfloat16, "nchw", {}, ""),
        (pair, torch.bfloat16, "channels_last", {}, ""),
        (stages, torch.float32, "nchw", {"eager": 6, "compile": 1}, SMALL),
        (stages, torch.float32, "channels_last", {"eager": 6, "compile": 1}, SMALL),
    ]
    if device == "cuda":
        goals = {"eager": 5, "compile": 1.5, "floor": 0.75}
        layers = [(shapes, dtype, format, {}, "") for shapes, dtype, format, _, _ in layers]
        layers += [
            (large, torch.bfloat16, format, goals, "") for format in ("nchw", "channels_last")
        ]
    for shapes, dtype, format, goal, why in layers:
        student, teacher = (
            [feature(shape, dtype, format, device) for shape in shapes] for _ in range(2)
        )
        for tensor in student:
            tensor.requires_grad_()

        def step(loss: Callable, student=student, teacher=teacher) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(student, teacher), student)

        def compiled(step: Callable = step) -> Callable[[], object]:
            loss = torch.compile(reference.attention_loss, dynamic=False)
            return lambda: step(loss)

        yield Row(
            "attention_loss",
            " ".join("x".join(map(str, shape)) for shape in shapes),
            dtype,
            {
                "fused": lambda step=step: step(ops.attention_loss),
                "eager": lambda step=step: step(reference.attention_loss),
            },
            format,
            compiled,
            bytes=4 * size(*student),
            goals=goal,
            memory=shapes == pair and dtype == torch.float32,
            why=why,
        )


ROWS = {"attention_loss": attention_loss}
