"""What the emulator and the codegen tests compile with: the CUDA toolkit, results kept in build/.

No GPU is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STABLE_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as setup.py builds
JOBS = int(os.environ.get("MAX_JOBS") or 2)


@functools.cache
def cuda_home() -> Path | None:
    """Folder of the toolkit, or None. nvcc on PATH may be a wrapper, so nvcc is asked."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin")] if home else [None, "/usr/local/cuda/bin"]
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    top = re.search(r"TOP=(\S+)", subprocess.run(command, capture_output=True, text=True).stderr)
    return Path(top[1]).resolve() if top else None


def tool(name: str) -> str:
    """A program of the toolkit: nvcc, ptxas."""
    home = cuda_home()
    assert home is not None
    return str(home / "bin" / name)


def torch_include() -> Path:
    import torch

    return Path(torch.__file__).parent / "include"


def kernel_names() -> set[str]:
    """The names of all `__global__` functions of csrc/cuda."""
    return set(kernel_lines())


@functools.cache
def kernel_lines() -> dict[str, str]:
    """Kernel -> "file:line" of its definition."""
    places = {}
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        # Comments and launch bounds go, line ends stay.
        text = re.sub(r"//[^\n]*", "", path.read_text())
        text = re.sub(
            r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)",
            lambda match: "\n" * match[0].count("\n"),
            text,
        )
        for match in re.finditer(r"__global__[\w\s]*?(\w+)\s*\(", text):
            line = text[: match.start(1)].count("\n") + 1
            places[match[1]] = f"{path.relative_to(ROOT)}:{line}"
    return places


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """`folder`, made if need be, for this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def reached(source: Path, folders: Iterable[Path]) -> list[Path]:
    """`source` and the headers in `folders`, or beside it, that it includes."""
    found: dict[Path, None] = {}

    def visit(path: Path) -> None:
        if path in found:
            return
        found[path] = None
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            for folder in (path.parent, *folders):
                if (folder / name).is_file():
                    visit((folder / name).resolve())
                    break

    visit(source)
    return list(found)


def make(command: list[str], target: Path, inputs: Iterable[Path]) -> str:
    """Run `command -o target` unless it has been, with these inputs; returns what it printed.

    A file is replaced, not written to: a process that has it loaded keeps the old one.
    """
    digest = hashlib.sha256("\0".join([*command, metadata.version("torch")]).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    note = target.with_suffix(target.suffix + ".log")
    if target.exists() and note.exists():
        key, _, printed = note.read_text().partition("\n")
        if key == digest.hexdigest():
            return printed
    fresh = target.with_suffix(target.suffix + ".new")
    done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
    printed = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{printed}")
    fresh.replace(target)
    note.write_text(f"{digest.hexdigest()}\n{printed}")
    return printed
