"""The CUDA kernels, executed on the CPU: against the CPU ops, and under the sanitisers.

The cases are the `EMULATED` tables of the tests/test_ops_*.py: name -> a function that runs public
ops on small CPU tensors and returns the results, or (function, tolerance).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import emulator
import pytest
import torch
from toolkit import kernel_names
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


@pytest.fixture(scope="session")
def sanitised() -> subprocess.CompletedProcess[str]:
    """Every case once under AddressSanitizer and UndefinedBehaviorSanitizer."""
    emulator.build("kernels", emulator.kernel_sources(), sanitise=True)
    return subprocess.run(
        [sys.executable, str(Path(emulator.__file__).parent / "sanitised.py")],
        capture_output=True,
        text=True,
        env=emulator.sanitised_environment(),
    )


def test_sanitisers_find_nothing(sanitised):
    assert sanitised.returncode == 0, sanitised.stdout[-300:] + sanitised.stderr[-6000:]


def test_every_kernel_runs_in_some_case(sanitised):
    """Every instance of every template: a kernel that no case reaches is not tested at all."""
    assert kernel_names() == {name.partition("<")[0] for name in emulator.instances()}
    assert json.loads(sanitised.stdout.splitlines()[-1]) == {"never": []}


# The emulator itself: mistakes planted in tests/emulator/planted.cu are found, and their correct
# twins pass.

PLANTED = Path(emulator.__file__).parent / "planted.cu"
SIZE = 64 * 2 * 3


@pytest.fixture(scope="module")
def planted():
    """Runs a kernel under a schedule: (what the emulator says, the output)."""
    path = emulator.build("planted", [PLANTED])
    library = emulator.bind(ctypes.CDLL(str(path)))
    library.planted.restype = ctypes.c_char_p

    def run(name: str, schedule: str) -> tuple[str, list[float]]:
        order, seed = emulator.SCHEDULES[schedule]
        library.kd_emulator_schedule(emulator.ORDERS.index(order), seed)
        x = (ctypes.c_float * SIZE)(*range(SIZE))
        out = (ctypes.c_float * SIZE)(*[-1.0] * SIZE)
        words = library.planted(name.encode(), x, out, SIZE).decode()
        return words, list(out)

    return run


def sums() -> list[float]:
    return [float(sum(range(at - at % 64, at - at % 64 + 64))) for at in range(SIZE)]


CORRECT = {
    "sums": sums(),
    "convergent barrier": [1.0] * 64,
    "convergent shuffle": [32.0] * 64,
    "neighbours": [float(i ^ 1) for i in range(64)],
    "copy": [float(i) for i in range(SIZE)],
    "fixed array": [float(63 - i) for i in range(64)],
    "dynamic array": [float(63 - i) for i in range(64)],
    "initialised, dynamic": [1.0] * 64,
    "initialised, static": [1.0] * 64,
    "packs": [float(i) for i in range(SIZE)],
}


@pytest.mark.parametrize("schedule", emulator.SCHEDULES)
@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_pass(planted, name, schedule):
    words, out = planted(name, schedule)
    want = CORRECT[name]
    assert (words, out) == ("", want + [-1.0] * (SIZE - len(want)))


@pytest.mark.parametrize(
    ("name", "correct"),
    [
        ("sums, no barrier before the read", "sums"),
        ("sums, no barrier before the re-use", "sums"),
        ("neighbours, no __syncwarp", "neighbours"),
        ("uninitialised, dynamic", "initialised, dynamic"),
        ("uninitialised, static", "initialised, static"),
    ],
)
def test_a_race_or_an_uninitialised_read_changes_results(planted, name, correct):
    """Some schedule gives something else; NaN differs from everything."""
    want = CORRECT[correct]
    results = [planted(name, schedule)[1][: len(want)] for schedule in emulator.SCHEDULES]
    assert any(result != want for result in results)


def test_an_order_of_blocks_is_not_relied_on(planted):
    results = {tuple(planted("blocks in order", s)[1][:5]) for s in emulator.SCHEDULES}
    assert len(results) > 1


@pytest.mark.parametrize("schedule", emulator.SCHEDULES)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "divergent barrier",
            ["divergent", "block 0 of 1", "__syncthreads at planted.cu:", "ended"],
        ),
        ("two barriers", ["two_barriers", "a part of the block", "planted.cu:"]),
        ("divergent shuffle", ["__shfl_xor_sync", "__syncwarp", "a part of the warp"]),
        ("narrow mask", ["narrow_mask", "the mask leaves out lane 16"]),
        ("no blocks", ["copy", "blocks must be from 1 to", "got 0"]),
        ("too many threads", ["copy", "from 1 to 1024, got 1056"]),
        ("too much shared memory", ["copy", "shared memory", "got 50000"]),
    ],
)
def test_misuse_is_an_error_by_name(planted, name, words, schedule):
    said, _ = planted(name, schedule)
    assert all(word in said for word in words), said


PLANTED_MAIN = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.planted.restype = ctypes.c_char_p
size = int(sys.argv[2])
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
x, out = (ctypes.c_void_p(libc.malloc(4 * size)) for _ in range(2))
ctypes.memset(x, 0, 4 * size)
for name in sys.argv[3:]:
    print(library.planted(name.encode(), x, out, size).decode())
"""


def run_sanitised(*names: str) -> subprocess.CompletedProcess[str]:
    path = emulator.build("planted", [PLANTED], sanitise=True)
    return subprocess.run(
        [sys.executable, "-c", PLANTED_MAIN, str(path), str(SIZE), *names],
        capture_output=True,
        text=True,
        env=emulator.sanitised_environment(),
    )


def test_correct_kernels_pass_the_sanitisers():
    done = run_sanitised(*CORRECT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("copy, one too many", ["heap-buffer-overflow", "planted.cu"]),
        ("dynamic array too small", ["heap-buffer-overflow", "planted.cu"]),
        ("fixed array too small", ["planted.cu", "out of bounds for type 'float [63]'"]),
        ("unaligned packs", ["misaligned address", "device.cuh"]),
    ],
)
def test_sanitisers_find_planted_mistakes(name, words):
    done = run_sanitised(name)
    assert done.returncode != 0 and all(word in done.stderr for word in words), done.stderr
