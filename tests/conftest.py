"""Shared pieces of the tests: scripts as functions, a fresh accelerate state, small folders."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent

# Test processes share the cores, and so do the commands they start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1 and "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts with accelerate unset and kdfast's own methods, as every command does."""
    from accelerate.state import AcceleratorState, PartialState

    from kdfast.methods.base import _METHODS

    for state in (AcceleratorState, PartialState):
        state._shared_state.clear()
    known = dict(_METHODS)
    yield
    _METHODS.clear()
    _METHODS.update(known)


def load_script(name: str):
    """The module of a script under train/ or benchmarks/, by its path from the root."""
    key = "script_" + name.replace("/", "_").removesuffix(".py")
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, ROOT / name)
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


@pytest.fixture
def run_script(tmp_path, monkeypatch, capsys):
    """Call `run_script("train/distill.py", *flags)`; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *flags: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = load_script(name).main([str(flag) for flag in flags])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(run_script, tmp_path):
    """Check that a command is refused: its exit code, one line of stderr, and nothing written.

    `refused(code, script, *flags, words=[...], leaves=())` returns the line; `leaves` are patterns
    of what the command may write or change.
    """

    def check(code: int, name: str, *flags: object, words=(), leaves=()) -> str:
        before = _contents(tmp_path)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            got, _, err = run_script(name, *flags)
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith(f"{Path(name).name}: error: "), err
        missing = [word for word in words if word not in lines[0]]
        assert (got, missing) == (code, []), lines[0]
        assert [str(w.message) for w in warned if w.category is not DeprecationWarning] == []
        after = _contents(tmp_path)
        changed = [p for p in before.keys() | after.keys() if before.get(p, 0) != after.get(p, 0)]
        assert [str(p) for p in changed if not any(map(p.match, leaves))] == []
        return lines[0]

    return check


def _contents(folder: Path) -> dict[Path, bytes | None]:
    """Everything below `folder` by relative path: the bytes of a file, None for a folder."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """ImageFolder with train/ and val/, two classes, 6 + 4 colour images of odd sizes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 128, (40 + 7 * i, 52 - 5 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels + np.uint8(100 * label)).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory) -> Path:
    """Run folder of a cifar_resnet8 trained a little on digits."""
    folder = tmp_path_factory.mktemp("teacher")
    flags = [
        "--model",
        "cifar_resnet8",
        "--epochs",
        "1",
        "--train-limit",
        "256",
        "--output",
        str(folder),
    ]
    assert load_script("train/classifier.py").main([*flags, "--experiment", "teacher"]) == 0
    return folder / "teacher"


@pytest.fixture
def double():
    """float64 as torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
