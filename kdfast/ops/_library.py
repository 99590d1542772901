"""Loads the compiled libraries and decides, op by op, between them and the plain-torch twins.

`KDFAST_OPS` (at import) and `use(...)` (any time) choose:

auto        fused where the library serves the tensors' device, else the twin, said once
fused       fused, or an error that says why not
reference   always the twins
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch

MODES = ("auto", "fused", "reference")
PACKAGE = Path(__file__).resolve().parents[1]


def _build_record() -> dict:
    try:
        return json.loads((PACKAGE / "_build.json").read_text())
    except FileNotFoundError:
        return {}


def _load(name: str) -> str | None:
    """Load `kdfast/<name>.*so`; None, or the reason why it is not there."""
    found = sorted(PACKAGE.glob(f"{name}.*so"))
    if not found:
        return BUILD.get({"_C": "extension_off", "_cuda": "cuda_off"}[name]) or (
            f"kdfast/{name} was not built: run `pip install -e .`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load: {error.__cause__ or error}"
    return None


BUILD = _build_record()  # what the install built; see setup.py
# Why a library is absent, None when it is loaded. The schemas live in _C, so it comes first.
NO_EXTENSION = _load("_C")
NO_CUDA = _load("_cuda") if NO_EXTENSION is None else NO_EXTENSION

_mode = os.environ.get("KDFAST_OPS") or "auto"
_said: set[str] = set()


class use:
    """Choose the op path: `use("reference")` from here on, `with use("reference"):` for a block.

    Args:
        mode: "auto", "fused" or "reference" (module docstring).

    Raises:
        ValueError: for another mode.
        RuntimeError: for "fused" when the compiled library is absent, with the reason.
    """

    def __init__(self, mode: str):
        self._before = _mode
        _set_mode(mode)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_exception: object) -> None:
        _set_mode(self._before)


def mode() -> str:
    """The chosen mode: "auto", "fused" or "reference"."""
    return _mode


def active() -> str:
    """The path that ops on CPU tensors take now: "fused" or "reference"."""
    return "fused" if _mode != "reference" and NO_EXTENSION is None else "reference"


def fused(op: str, device: torch.device) -> bool:
    """Whether `op` on `device` runs fused; says once why not, or raises under mode "fused"."""
    if _mode == "reference":
        return False
    if device.type == "cpu":
        missing = NO_EXTENSION
    elif device.type == "cuda":
        missing = NO_CUDA
    else:
        missing = f"there are kernels for cpu and cuda, not for {device.type}"
    if missing is None:
        return True
    if _mode == "fused":
        raise RuntimeError(f"{op}: no fused op for {device.type} tensors: {missing}")
    _say_once(device.type, missing)
    return False


def _set_mode(mode: str) -> None:
    global _mode
    if mode not in MODES:
        raise ValueError(f"KDFAST_OPS and kdfast.ops.use: expected one of {MODES}, got {mode!r}")
    if mode == "fused" and NO_EXTENSION is not None:
        raise RuntimeError(f"the fused ops are not available: {NO_EXTENSION}")
    _mode = mode


def _say_once(device: str, reason: str) -> None:
    if device in _said or torch.compiler.is_compiling():
        return
    _said.add(device)
    message = f"kdfast ops on {device} tensors use the slower plain-torch twins: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


_set_mode(_mode)
