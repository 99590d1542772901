"""The CUDA kernels, executed on the CPU: against the CPU ops, and under the sanitisers.

The cases are the `EMULATED` tables of the tests/test_ops_*.py: name -> a function that runs public
ops on small CPU tensors and returns the results, or (function, tolerance).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import emulator
import pytest
import torch
from torch import Tensor

from kdfast import ops

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# Largest difference between both devices' results, relative to the largest entry.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def cases() -> dict[str, tuple[Callable[[], list[Tensor]], float | None]]:
    """Every entry of every table; the tolerance is None where the dtype's serves."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_ops_*.py")):
        table = getattr(importlib.import_module(path.stem), "EMULATED", {})
        for name, entry in table.items():
            assert name not in found, name
            found[name] = entry if isinstance(entry, tuple) else (entry, None)
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_cpu_ops_under_every_schedule(name):
    function, tolerance = CASES[name]
    with ops.use("fused"):
        native = function()
        before = emulator.launches().total()
        results = {}
        for schedule, (order, seed) in emulator.SCHEDULES.items():
            with emulator.run(order, seed):
                results[schedule] = function()
    assert emulator.launches().total() > before, "no kernel ran"
    assert native and len(native) == len(results["forward"])
    for i, (want, got) in enumerate(zip(native, results["forward"], strict=True)):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        assert difference(got, want) <= (tolerance or TOLERANCE.get(got.dtype, 0)), f"result {i}"
        for schedule, other in results.items():
            assert same_bits(got, other[i]), (
                f"result {i} depends on the order of threads: {schedule}"
            )


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest entry; infinite where NaN or infinity differ."""
    got, want = got.detach().double(), want.detach().double()
    if not got.numel():
        return 0.0
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(nan=0.5), want[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    if not torch.equal(got.isfinite(), finite):
        return float("inf")
    got, want = got[finite], want[finite]
    if not got.numel() or torch.equal(got, want):
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5))
