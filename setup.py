"""Builds `kdfast._C` (schemas, CPU kernels) and, with nvcc, `kdfast._cuda` (CUDA kernels).

KDFAST_CUDA            unset: CUDA if it can be built; 0: never; 1: stop if it cannot be built
TORCH_CUDA_ARCH_LIST   GPU architectures; default the visible GPU's, or 8.0;9.0+PTX without one
CXX, CUDA_HOME, MAX_JOBS   compiler, toolkit and parallel jobs, as for any torch extension

Both libraries use torch's stable ABI (target 2.11) and no Python API, so one build serves every
later torch and Python. A missing compiler skips the extension and kdfast then computes with plain
torch; a failing compiler fails the install. What was built, and why something was not, is written
to `kdfast/_build.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "kdfast"
STABLE_TARGET = "0x020b000000000000"  # torch 2.11
DEFAULT_ARCHS = "8.0;9.0+PTX"  # Ampere, Hopper, and anything later through PTX


def find_nvcc() -> tuple[str | None, str | None]:
    """(toolkit folder, release), or (None, None). CUDA_HOME, if set, is the only place looked at.

    nvcc on PATH may be a wrapper script or a link, so nvcc itself is asked where it lives: torch
    would take the wrapper's folder and then fail to link libcudart.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None, None

    def ask(*arguments: str) -> str:
        answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        return answer.stdout + answer.stderr

    top = re.search(r"TOP=(\S+)", ask("--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull))
    release = re.search(r"release (\d+\.\d+)", ask("--version"))
    if top is None or release is None:
        return None, None
    return os.path.realpath(top[1]), release[1]


CUDA_HOME, NVCC_RELEASE = find_nvcc()
if CUDA_HOME:
    os.environ["CUDA_HOME"] = CUDA_HOME  # read when torch.utils.cpp_extension is first imported

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402


def cuda_off_reason() -> str | None:
    """Why CUDA is not built; None when it is. KDFAST_CUDA=1 turns a reason into an error."""
    wish = os.environ.get("KDFAST_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"KDFAST_CUDA must be unset, 0 or 1, got {wish!r}")
    if wish == "0":
        return "KDFAST_CUDA=0"
    reason = None
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU build"
    if NVCC_RELEASE is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        reason = f"nvcc was not found in CUDA_HOME={home}" if home else "nvcc was not found"
    elif torch.version.cuda and torch.version.cuda.split(".")[0] != NVCC_RELEASE.split(".")[0]:
        reason = f"nvcc {NVCC_RELEASE} does not match torch's CUDA {torch.version.cuda}"
    if wish == "1" and reason:
        sys.exit(f"KDFAST_CUDA=1, but {reason}")
    return reason


def extensions(record: dict) -> list[Extension]:
    """The libraries to build; `record` receives what `_build.json` will say about them."""
    compiler = cpp_extension.get_cxx_compiler()
    record["compiler"] = shutil.which(compiler)
    record["cuda_off"] = cuda_off_reason()
    if record["compiler"] is None:
        record["extension_off"] = f"no C++ compiler: {compiler!r} was not found"
        record["cuda_off"] = record["cuda_off"] or record["extension_off"]
        return []

    define = f"-DTORCH_TARGET_VERSION={STABLE_TARGET}"
    # -ffp-contract=off: the vector widths chosen at run time must agree to the last bit.
    cxx = [define, "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"]
    libraries = [
        cpp_extension.CppExtension(
            "kdfast._C",
            sources("csrc/schemas/*.cpp", "csrc/cpu/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx},
            py_limited_api=True,
        )
    ]
    if record["cuda_off"] is None:
        if "TORCH_CUDA_ARCH_LIST" not in os.environ and torch.cuda.device_count() == 0:
            os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHS
        record["nvcc"] = NVCC_RELEASE
        record["archs"] = os.environ.get("TORCH_CUDA_ARCH_LIST", "visible GPUs")
        # USE_CUDA unlocks the current-stream call of the stable ABI.
        nvcc = [define, "-O3", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]
        libraries.append(
            cpp_extension.CUDAExtension(
                "kdfast._cuda",
                sources("csrc/cuda/*.cu"),
                include_dirs=[str(ROOT / "csrc")],
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                py_limited_api=True,
            )
        )
    return libraries


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p))


class BuildExtension(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace or self.editable_mode:
            # pip builds in a throw-away folder; a lasting one makes rebuilds incremental.
            self.build_temp = str(ROOT / "build" / f"temp.{sys.implementation.cache_tag}")

    def run(self) -> None:
        write_record()
        super().run()


class BuildPy(build_py):
    def run(self) -> None:
        write_record()  # before the package data is collected
        super().run()


def write_record() -> None:
    """Write `_build.json` and drop libraries of an earlier build that this one does not make."""
    (PACKAGE / "_build.json").write_text(json.dumps(RECORD, indent=1) + "\n")
    kept = {library.name.rpartition(".")[2] for library in LIBRARIES}
    for name in {"_C", "_cuda"} - kept:
        for stale in PACKAGE.glob(f"{name}.*so"):
            stale.unlink()


RECORD = {
    "torch": torch.__version__,
    "compiler": None,
    "extension_off": None,
    "cuda_off": None,
    "nvcc": None,
    "archs": None,
}
LIBRARIES = extensions(RECORD)

setup(
    ext_modules=LIBRARIES,
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
