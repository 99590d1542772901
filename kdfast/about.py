"""What is installed here: versions, what was built and why not more, devices, op path."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import kdfast
from kdfast.ops import _library

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of kdfast, Python and the packages that results depend on."""
    found = {"kdfast": kdfast.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The commit of the checkout that kdfast runs from; None outside one."""
    root = Path(kdfast.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None


def built() -> dict[str, str]:
    """The two compiled libraries: what was built, or why there is none."""
    record = _library.BUILD
    cpu, cuda = _library.NO_EXTENSION, _library.NO_CUDA
    against = f"built with torch {record.get('torch')}"
    return {
        "cpu ops": f"no: {cpu}" if cpu else against,
        "cuda ops": f"no: {cuda}"
        if cuda
        else f"{against}, nvcc {record.get('nvcc')}, architectures {record.get('archs')}",
    }


def devices() -> dict[str, str]:
    """The CPU with its vector extensions and threads, and every visible GPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{capability}, {torch.get_num_threads()} of {os.cpu_count()} threads"}
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = (
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
        )
    if torch.cuda.device_count() == 0:
        found["cuda"] = (
            "no GPU visible" if torch.version.cuda else f"torch {torch.__version__} is a CPU build"
        )
    return found


def report() -> str:
    """All of it as aligned lines, one fact each."""
    facts = {**versions(), **built(), **devices()}
    facts["ops"] = f"{_library.active()} (KDFAST_OPS={_library.mode()})"
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {fact}" for name, fact in facts.items())
