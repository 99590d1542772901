"""What `benchmarks/ops.py` measures: a module a family of ops, `ROWS` its ops' rows."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Row:
    """One line of the table.

    `steps` are what is timed side by side: "fused" and "eager", the eager twin, and any other form
    worth a column ("gather", "broadcast", "masked dense"). `compiled` makes the step of torch's
    compiler anew (None where it cannot compile the twin). `bytes` must move, each input read and
    each output written once; where arithmetic is the limit, `operations` are given instead and
    the floor is their time at the measured matrix product rate. `goals` are the least ratios: of
    a step's time to the fused one, and under "floor" of the floor's. `memory` asks for the peak
    memory of every step too; `why` says why a goal is missed.
    """

    op: str
    shape: str
    dtype: torch.dtype
    steps: dict[str, Callable[[], object]]
    format: str = "nchw"
    compiled: Callable[[], Callable[[], object]] | None = None
    bytes: int = 0
    operations: int = 0
    goals: dict[str, float] = field(default_factory=dict)
    memory: bool = False
    why: str = ""


def feature(shape: tuple[int, ...], dtype: torch.dtype, format: str, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype, memory_format=FORMATS[format])


def size(*tensors: Tensor) -> int:
    """Their bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def all_rows() -> dict[str, Callable[[str], Iterator[Row]]]:
    """op -> its rows on a device, of every module in this folder."""
    found: dict[str, Callable[[str], Iterator[Row]]] = {}
    for module in pkgutil.iter_modules(__path__):
        found.update(importlib.import_module(f"{__name__}.{module.name}").ROWS)
    return found
