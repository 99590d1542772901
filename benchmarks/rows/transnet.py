"""gated_relu, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdfast import ops
from kdfast.ops import reference
from rows import Row, feature, size


def gated_relu(device: str) -> Iterator[Row]:
    """Read x and h, write z; read dz and h, write dh (dz itself is dx)."""
    goals = {"eager": 3} if device == "cpu" else {"eager": 3, "floor": 0.7}
    shape = (64, 512, 14, 14)
    for dtype, format, goal in (
        (torch.float32, "nchw", goals),
        (torch.float32, "channels_last", goals),
        (torch.bfloat16, "channels_last", {}),
    ):
        x, hidden, grad = (feature(shape, dtype, format, device) for _ in range(3))
        gate = torch.full((), 0.5, device=device, requires_grad=True)
        for tensor in (x, hidden):
            tensor.requires_grad_()
        inputs = (x, hidden, gate)

        def step(op: Callable, inputs=inputs, grad=grad) -> tuple[Tensor, ...]:
            return torch.autograd.grad(op(*inputs), inputs, grad)

        def compiled(step: Callable = step) -> Callable[[], object]:
            op = torch.compile(reference.gated_relu, dynamic=False)
            return lambda: step(op)

        yield Row(
            "gated_relu",
            "x".join(map(str, shape)),
            dtype,
            {
                "fused": lambda step=step: step(ops.gated_relu),
                "eager": lambda step=step: step(reference.gated_relu),
            },
            format,
            compiled,
            bytes=6 * size(x),
            goals=goal,
        )


ROWS = {"gated_relu": gated_relu}
