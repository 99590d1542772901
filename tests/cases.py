"""Op cases shared by the tests: shapes, layouts, values; and the tolerance of each dtype."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
    ),
]

# dtype -> largest error of (float32 or float64 results, results stored in that dtype), relative to
# the largest entry of the float64 twin on the same inputs. Stored half gradients round once.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 1e-5),
    torch.float16: (1e-6, 1e-3),
    torch.bfloat16: (1e-6, 8e-3),
}

LAYOUTS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_slice": lambda x: torch.stack([x, x.flip(0)], 1).flatten(0, 1)[::2],
    "channel_slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "column_slice": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "channels_last_slice": lambda x: torch.cat([x, x]).contiguous(
        memory_format=torch.channels_last
    )[: x.shape[0]],
}


@dataclass(frozen=True)
class Case:
    """One student-teacher pair; a teacher field of None repeats the student's."""

    shape: tuple[int, int, int, int]
    teacher_shape: tuple[int, int, int, int] | None = None
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None
    layout: str = "nchw"
    teacher_layout: str | None = None
    values: str = "normal"
    power: float = 2.0

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape))]
        if self.teacher_shape:
            words.append("x".join(map(str, self.teacher_shape)))
        words.append(str(self.dtype).removeprefix("torch."))
        if self.teacher_dtype:
            words.append(str(self.teacher_dtype).removeprefix("torch."))
        words += [self.layout, self.values, f"p{self.power:g}"]
        return "-".join(words)

    def make(self, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(student, teacher); both require gradients."""
        generator = torch.Generator().manual_seed(seed)
        student = values(self.shape, self.values, generator)
        teacher = values(self.teacher_shape or self.shape, self.values, generator)
        if self.values == "identical":
            teacher = student.clone()
        student = LAYOUTS[self.layout](student.to(device, self.dtype))
        teacher = teacher.to(device, self.teacher_dtype or self.dtype)
        teacher = LAYOUTS[self.teacher_layout or self.layout](teacher)
        return student.detach().requires_grad_(), teacher.detach().requires_grad_()


def values(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    """Normal numbers with a spatial structure, as features have; without one all maps are alike."""
    n, _, h, w = shape
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= torch.randn((n, 1, h, w), generator=generator, dtype=torch.float64).exp()
    if kind == "zero":
        x.zero_()
    elif kind == "zero_sample":
        x[0] = 0
    elif kind == "relu":
        x.relu_()
    elif kind == "huge":
        x *= 1e10  # the square of the map leaves float32
    elif kind == "tiny":
        x *= 1e-5
    return x


ODD = (1, 7, 5, 5)
EVEN = (3, 24, 8, 8)
PAIRS = [
    Case(ODD),
    Case((1, 1, 1, 1)),
    Case((2, 3, 1, 7)),
    Case((3, 16, 8, 8)),
    Case((2, 33, 16, 17)),
    Case((5, 256, 4, 4)),
    Case((2, 9, 33, 32)),  # more positions than one tile of the CPU loops
    Case((2, 1030, 2, 2)),
    *(Case((3, 12, 6, 4), layout=layout) for layout in LAYOUTS if layout != "nchw"),
    *(Case(ODD, layout=layout) for layout in ("channels_last", "transposed", "unaligned")),
    Case((2, 33, 16, 17), layout="channels_last"),
    Case((1, 1030, 2, 3), layout="channels_last"),
    Case((3, 40, 9, 9), layout="channels_last", teacher_layout="nchw"),
    Case((3, 12, 6, 4), teacher_shape=(3, 5, 6, 4)),
    *(
        Case(shape, dtype=dtype, layout=layout)
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
        for shape, layout in ((ODD, "nchw"), (EVEN, "nchw"), (EVEN, "channels_last"))
    ),
    Case((2, 8, 4, 4), teacher_dtype=torch.bfloat16),
    Case((2, 8, 4, 4), dtype=torch.float16, teacher_dtype=torch.bfloat16),
    Case((2, 8, 4, 4), teacher_dtype=torch.float64),
    *(
        Case((3, 12, 6, 4), values=kind, power=power)
        for kind in ("zero", "zero_sample", "relu", "huge", "tiny", "identical")
        for power in (2.0, 1.0)
    ),
    *(
        Case((3, 12, 5, 4), layout=layout, values="relu", power=power)
        for layout in ("nchw", "channels_last")
        for power in (1.0, 0.5, 1.5, 3.0)
    ),
    Case((3, 12, 5, 4), dtype=torch.bfloat16, layout="channels_last", power=1.0),
    Case((3, 12, 5, 4), dtype=torch.float16, power=4.0),
]

# Different heights and widths: the student larger, the teacher larger, each in one direction.
MISMATCHED = [
    Case((2, 6, 8, 8), teacher_shape=(2, 4, 4, 4)),
    Case((2, 4, 4, 4), teacher_shape=(2, 6, 9, 7)),
    Case((2, 4, 4, 9), teacher_shape=(2, 6, 7, 5)),
    Case((2, 4, 4, 9), teacher_shape=(2, 6, 7, 5), dtype=torch.float64),
    Case((2, 6, 8, 8), teacher_shape=(2, 4, 4, 4), layout="channels_last"),
]


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest entry of `want`."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()


def as_double(*tensors: Tensor) -> list[Tensor]:
    """Leaves in float64 with the same values."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


class Calls(TorchDispatchMode):
    """`with Calls() as calls:` collects (name, result) of every op that runs."""

    def __enter__(self) -> list[tuple[str, object]]:
        self.calls: list[tuple[str, object]] = []
        super().__enter__()
        return self.calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((str(func), result))
        return result
