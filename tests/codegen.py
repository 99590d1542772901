"""What the CUDA compiler makes of the kernels: registers, spills, vector loads, double arithmetic.

    python tests/codegen.py            compare with tests/codegen_budget.json
    python tests/codegen.py --update   write it anew
    python tests/codegen.py --all      assemble for every architecture that nvcc knows

Two sources, so that little is compiled twice. The architectures that `pip install` builds are read
from the built library with cuobjdump. For the others every csrc/cuda/*.cu is compiled once to PTX
for compute_75, the oldest, with warnings as errors, and assembled by ptxas for an architecture of
each later generation.

A budget is the measured number rounded up to a multiple of 8, the step in which registers are
given out: staying within it keeps the number of resident warps.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from toolkit import (
    JOBS,
    ROOT,
    STABLE_TARGET,
    cuda_home,
    kernel_lines,
    locked,
    make,
    reached,
    tool,
    torch_include,
)

BUDGET = Path(__file__).with_name("codegen_budget.json")
OLDEST = "compute_75"
ASSEMBLED = ("sm_75", "sm_100", "sm_120")
BUILT = ("sm_80", "sm_90")  # setup.py's default
# Bytes of spills or stack that are accepted: kernel -> architecture -> bytes.
# The slopes of attention: four blocks of 256 threads a multiprocessor leave 64 registers, which on
# sm_120 are a few short; three blocks would cost sm_80 and sm_90, which fit, a quarter of theirs.
SPILLS = {
    "attention_loss_gradient": {"sm_120": 24},
    "attention_map_gradient": {"sm_120": 44},
    # A few bytes once a row, outside the loops.
    "contrast_tiles": {"sm_120": 32},
    "gate_rows": {"sm_120": 8},
}
FOLDER = ROOT / "build" / "codegen"
FLAGS = f"-std=c++17 -O3 -Werror all-warnings {STABLE_TARGET} -DUSE_CUDA".split()
VECTOR_LOAD = re.compile(r"\bld\.global(\.nc)?[.\w]*\.(v4\.[fub]32|v2\.[fub]64)\b")

DOUBLE = re.compile(r"\s*(@\S+\s+)?\S+\.f64")


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture."""

    registers: int
    stack: int  # bytes; spills included
    spills: int  # bytes stored and loaded; 0 where the library is read, which has only the stack


@dataclass(frozen=True)
class Kernel:
    """Of one kernel's PTX."""

    vector_loads: int
    double: tuple[str, ...]  # instructions on float64, the first few


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def ptx_of(source: Path) -> Path:
    target = FOLDER / f"{source.stem}.ptx"
    command = [tool("nvcc"), "-ptx", f"-arch={OLDEST}", *FLAGS, f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(torch_include()), str(source)]
    make(command, target, reached(source, [ROOT / "csrc"]))
    return target


def assemble(ptx: Path, arch: str) -> dict[str, Usage]:
    """Symbol -> usage; what `ptxas -v` says."""
    command = [tool("ptxas"), "-v", f"-arch={arch}", str(ptx)]
    printed = make(command, ptx.with_suffix(f".{arch}.cubin"), [ptx])
    found: dict[str, Usage] = {}
    for part in printed.split("Compiling entry function '")[1:]:
        symbol = part.partition("'")[0]
        # Functions that are called and not inlined have lines of their own.
        stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", part)]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", part)]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", part)]
        found[symbol] = Usage(max(registers), max(stack), max(spills))
    return found


def compile_all(archs: Iterable[str] = ASSEMBLED) -> dict[str, dict[str, Usage]]:
    """Architecture -> symbol -> usage, for all sources; those that nvcc does not know are left."""
    archs = [arch for arch in archs if arch in known_archs()]
    found: dict[str, dict[str, Usage]] = {arch: {} for arch in archs}
    with locked(FOLDER), ThreadPoolExecutor(JOBS) as pool:
        largest = sorted(sources(), key=lambda path: -path.with_suffix(".cuh").stat().st_size)
        files = list(pool.map(ptx_of, largest))
        tasks = [(arch, pool.submit(assemble, file, arch)) for file in files for arch in archs]
        for arch, task in tasks:
            found[arch].update(task.result())
    return found


@functools.cache
def known_archs() -> list[str]:
    listed = subprocess.run(
        [tool("nvcc"), "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    return [arch.replace("compute_", "sm_") for arch in listed]


def cuobjdump() -> str | None:
    """nvcc's own, or the one that comes with torch's triton."""
    home = cuda_home()
    found = shutil.which("cuobjdump", path=f"{home / 'bin'}:{os.environ['PATH']}") if home else None
    if found is None:
        from importlib.util import find_spec

        spec = find_spec("triton")
        if spec is not None:
            place = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
            found = str(place) if place.is_file() else None
    return found


def library() -> Path | None:
    return next(iter(sorted((ROOT / "kdfast").glob("_cuda.*so"))), None)


def read_library(path: Path) -> dict[str, dict[str, Usage]]:
    """Architecture -> symbol -> usage of a built library."""
    command = [cuobjdump(), "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, Usage]] = {}
    for part in text.split("Fatbin elf code:")[1:]:
        kernels = found.setdefault(re.search(r"arch = (\w+)", part)[1], {})
        for symbol, numbers in re.findall(r"Function (\S+):\s*([^\n]*)", part):
            usage = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", numbers)}
            if "kdfast" in symbol:
                kernels[symbol] = Usage(usage["REG"], usage["STACK"] + usage["LOCAL"], 0)
    return found


def read_ptx() -> dict[str, Kernel]:
    """Symbol -> what its PTX has."""
    found = {}
    with locked(FOLDER), ThreadPoolExecutor(JOBS) as pool:
        files = list(pool.map(ptx_of, sources()))
    for file in files:
        for body in file.read_text().split(".entry ")[1:]:
            symbol = re.match(r"\w+", body)[0]
            body = body.partition("\n}")[0]
            double = [line.strip() for line in body.splitlines() if DOUBLE.match(line)]
            found[symbol] = Kernel(len(VECTOR_LOAD.findall(body)), tuple(double[:3]))
    return found


def names(symbols: Iterable[str]) -> dict[str, str]:
    """Symbol -> "kernel<float, 2>"."""
    symbols = list(symbols)
    shown = subprocess.run(
        ["c++filt", "--no-params", *symbols], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [re.sub(r"^(void )?(\w+::|\(anonymous namespace\)::)*", "", name) for name in shown]
    return dict(zip(symbols, short, strict=True))


def named(usages: dict[str, dict[str, Usage]]) -> dict[str, dict[str, Usage]]:
    """The same by architecture and kernel."""
    known = names({symbol for kernels in usages.values() for symbol in kernels})
    return {
        arch: {known[symbol]: usage for symbol, usage in kernels.items()}
        for arch, kernels in usages.items()
    }


def place_of(kernel: str) -> str:
    """ "csrc/cuda/attention.cuh:198 attention_maps<float, 2>" """
    return f"{kernel_lines().get(kernel.partition('<')[0], 'csrc/cuda')} {kernel}"


def read_budget() -> dict[str, dict[str, int]]:
    """Kernel -> architecture -> registers."""
    return json.loads(BUDGET.read_text()) if BUDGET.exists() else {}


def over_budget(
    usages: dict[str, dict[str, Usage]], budget: dict[str, dict[str, int]]
) -> list[str]:
    """A line for everything that spills, has a stack, has no budget or is over it."""
    lines = []
    for arch, kernels in usages.items():
        for kernel, usage in kernels.items():
            where = f"{place_of(kernel)} on {arch}"
            accepted = SPILLS.get(kernel.partition("<")[0], {}).get(arch, 0)
            if max(usage.spills, usage.stack) > accepted:
                lines.append(f"{where}: {usage.stack} bytes of stack, {usage.spills} of spills")
            allowed = budget.get(kernel, {}).get(arch)
            if allowed is None:
                lines.append(f"{where}: no budget; run `python tests/codegen.py --update`")
            elif usage.registers > allowed:
                lines.append(f"{where}: {usage.registers} registers, budget {allowed}")
    return lines


def budget_of(usages: dict[str, dict[str, Usage]]) -> dict[str, dict[str, int]]:
    budget: dict[str, dict[str, int]] = {}
    for arch, kernels in usages.items():
        for kernel, usage in kernels.items():
            budget.setdefault(kernel, {})[arch] = -(-usage.registers // 8) * 8
    return budget


def write_budget(budget: dict[str, dict[str, int]]) -> None:
    """A line a kernel, in order, so that changes can be read and merged."""
    rows = [f"{json.dumps(kernel)}: {json.dumps(budget[kernel])}" for kernel in sorted(budget)]
    BUDGET.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def built_is_stale() -> str | None:
    """Why the built library cannot be read, or None."""
    path = library()
    if path is None:
        return "kdfast/_cuda is not built"
    if cuobjdump() is None:
        return "there is no cuobjdump, neither with nvcc nor with triton"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    if path.stat().st_mtime < newest:
        return f"{path.name} is older than csrc: build it first"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the budget")
    parser.add_argument("--all", action="store_true", help="every architecture; spills only")
    args = parser.parse_args(argv)
    if cuda_home() is None:
        parser.error("nvcc was not found")
    if args.all:
        usages = named(compile_all(known_archs()))
        lines = over_budget(
            usages, {k: dict.fromkeys(usages, 255) for u in usages.values() for k in u}
        )
        print(*lines or [f"{len(usages)} architectures, no spills"], sep="\n")
        return bool(lines)
    if built_is_stale():
        parser.error(built_is_stale())
    built = {arch: use for arch, use in read_library(library()).items() if arch in BUILT}
    if set(built) != set(BUILT):
        parser.error(f"kdfast/_cuda must be built for {' and '.join(BUILT)}")
    usages = named({**compile_all(), **built})
    if args.update:
        write_budget(budget_of(usages))
    lines = over_budget(usages, read_budget())
    print(*lines or ["within budget"], sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
