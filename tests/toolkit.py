"""The CUDA toolkit that the emulator and the codegen tests compile with. No GPU is needed."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
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


def nvcc() -> str:
    home = cuda_home()
    assert home is not None
    return str(home / "bin" / "nvcc")


def torch_include() -> Path:
    import torch

    return Path(torch.__file__).parent / "include"
