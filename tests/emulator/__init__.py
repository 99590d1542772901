"""Runs the CUDA kernels of csrc/cuda on the CPU, behind the public functions.

`with emulator.run("shuffled", seed=1): ...` sends every `kdfast::<op>` that is called on CPU
tensors, in forward and backward, to `kdfast_emulated::<op>`: the same glue and kernels, compiled
by g++ with emulator.h beside them. What that finds, and what not, is said there.

The library is built at first use into build/emulator, file by file where sources have changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from toolkit import (
    JOBS,
    ROOT,
    STABLE_TARGET,
    cuda_home,
    kernel_names,
    locked,
    make,
    reached,
    torch_include,
)
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
NAMESPACE = "kdfast_emulated"
SCHEDULES = {
    "forward": ("forward", 0),
    "reversed": ("reversed", 0),
    "shuffled 1": ("shuffled", 1),
    "shuffled 2": ("shuffled", 2),
}
ORDERS = ("forward", "reversed", "shuffled")
FLAGS = (
    # -fno-gnu-unique: statics of templates belong to one library, not to the process.
    "-std=c++17 -fPIC -O1 -g1 -ffp-contract=off -fno-math-errno -fno-gnu-unique "
    f"-Wno-unknown-pragmas {STABLE_TARGET} -DUSE_CUDA -DKD_NAMESPACE={NAMESPACE}"
).split()
SANITISE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


@functools.cache
def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if shutil.which(compiler()) is None:
        return f"no C++ compiler: {compiler()!r} was not found"
    if cuda_home() is None:
        return "the CUDA headers are missing: nvcc was not found"
    return None


def compiler() -> str:
    return os.environ.get("CXX") or "g++"


def kernel_sources() -> list[Path]:
    csrc = ROOT / "csrc"
    return sorted([*csrc.glob("cuda/*.cu"), *csrc.glob("schemas/*.cpp")])


def build(name: str, sources: list[Path], *, sanitise: bool = False) -> Path:
    """Compile and link `sources` and the scheduler into build/emulator/<name>.so."""
    folder = ROOT / "build" / "emulator" / (name + "-sanitised" * sanitise)
    flags = [*FLAGS, *(SANITISE if sanitise else [])]
    include = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    for path in (torch_include(), cuda_home() / "include"):
        include += ["-isystem", str(path)]

    def compile(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.name}.o"
        command = [compiler(), "-x", "c++", *flags, *include, "-c", str(source)]
        make(command, target, reached(source, [ROOT / "csrc", HERE]))
        return target

    with locked(folder):
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(compile, [*sources, HERE / "emulator.cpp"]))
        libraries = Path(torch.__file__).parent / "lib"
        link = ["-shared", "-Wl,-Bsymbolic", "-Wl,--as-needed", *map(str, objects)]
        link += [f"-L{libraries}", "-ltorch_cpu", "-ltorch", "-ldl"]
        library = folder / f"{name}.so"
        make([compiler(), *flags, *link], library, objects)
    return library


@functools.cache
def library(sanitise: bool = False) -> ctypes.CDLL:
    """The emulated kernels, built and loaded: torch.ops.kdfast_emulated.*."""
    path = build("kernels", kernel_sources(), sanitise=sanitise)
    torch.ops.load_library(str(path))
    return bind(ctypes.CDLL(str(path)))


def bind(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.kd_emulator_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
    loaded.kd_emulator_launches.restype = ctypes.c_char_p
    loaded.kd_emulator_name.argtypes = [ctypes.c_char_p]
    loaded.kd_emulator_name.restype = ctypes.c_char_p
    return loaded


def launches(sanitise: bool = False) -> Counter[str]:
    """How often each kernel has run so far, by name with its template arguments."""
    counts: Counter[str] = Counter()
    for line in library(sanitise).kd_emulator_launches().decode().splitlines():
        count, _, name = line.partition(" ")
        counts[name] = int(count)
    return counts


def instances(sanitise: bool = False) -> set[str]:
    """Every kernel of the library, by the names that `launches` has."""
    loaded, names = library(sanitise), kernel_names()
    table = subprocess.run(
        ["nm", "--dynamic", "--defined-only", loaded._name],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = [line.split()[-1] for line in table.splitlines() if " W " in line or " T " in line]
    shown = {loaded.kd_emulator_name(symbol.encode()).decode() for symbol in symbols}
    return {name for name in shown if name.partition("<")[0] in names}


def sanitised_environment() -> dict[str, str]:
    """The environment of a Python process that loads a sanitised library."""
    preload = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # libstdc++: AddressSanitizer looks for __cxa_throw when the process starts.
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


class Route(TorchDispatchMode):
    """Sends kdfast ops to their emulated kernels."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kdfast":
            name = func._schema.name.partition("::")[2]
            func = getattr(getattr(torch.ops, NAMESPACE), name).default
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def run(schedule: str = "forward", seed: int = 0, sanitise: bool = False) -> Iterator[None]:
    """kdfast ops in this block run their CUDA kernels, threads in the order of `schedule`."""
    library(sanitise).kd_emulator_schedule(ORDERS.index(schedule), seed)
    with Route():
        yield
