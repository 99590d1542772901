"""The install and the loader: what is built, what is said when something is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast
from kdfast import ops
from kdfast.about import report
from kdfast.ops import _library

ROOT = Path(__file__).parent.parent
PACKAGE = Path(kdfast.__file__).parent


def python(*arguments, cwd=ROOT, **environment):
    """Run this Python; an environment value of None removes the variable."""
    merged = {**os.environ, **environment}
    merged = {name: str(value) for name, value in merged.items() if value is not None}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads, without anything built."""
    root = tmp_path / "checkout"
    unbuilt = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for folder in ("kdfast", "csrc", "build_backend"):
        shutil.copytree(ROOT / folder, root / folder, ignore=unbuilt)
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, root)
    for file in ROOT.glob("*.md"):
        shutil.copy(file, root)
    return root


def test_libraries_are_stable_abi():
    """abi3 in the name, and no C++ symbol of torch wanted: any torch from 2.11 on can load them."""
    assert _library.NO_EXTENSION is None
    libraries = sorted(PACKAGE.glob("*.so"))
    assert all(library.name.endswith(".abi3.so") for library in libraries)
    names = {library.name.partition(".")[0] for library in libraries}
    assert names == ({"_C"} if _library.BUILD["cuda_off"] else {"_C", "_cuda"})
    for library in libraries:
        listing = ["nm", "--dynamic", "--undefined-only", library]
        symbols = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
        wanted = [line.split()[-1] for line in symbols.splitlines()]
        assert "aoti_torch_library_init_impl" in wanted
        torch_cxx = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch", "Py")
        assert [name for name in wanted if name.startswith(torch_cxx)] == []


def test_cuda_library_or_the_reason():
    reason = _library.BUILD["cuda_off"]
    if reason:
        assert reason == _library.NO_CUDA and reason in report()
        return
    if torch.version.cuda:
        assert _library.NO_CUDA is None
    places = [os.environ.get("PATH", ""), *(f"{p}/triton/backends/nvidia/bin" for p in sys.path)]
    cuobjdump = shutil.which("cuobjdump", path=os.pathsep.join(places))
    archs = _library.BUILD["archs"]
    if cuobjdump is None or archs != "8.0;9.0+PTX":
        assert archs
        return
    library = next(PACKAGE.glob("_cuda.*so"))
    found = "".join(
        subprocess.run([cuobjdump, flag, library], capture_output=True, text=True).stdout
        for flag in ("--list-elf", "--list-ptx")
    )
    for name in ("sm_80.cubin", "sm_90.cubin", "sm_90.ptx"):
        assert name in found


def test_report_tells_versions_build_and_path():
    result = python("-m", "kdfast", KDFAST_OPS="reference")
    assert result.returncode == 0, result.stderr
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts["kdfast"] == kdfast.__version__
    assert torch.__version__.startswith(facts["torch"])
    assert facts["ops"] == "reference (KDFAST_OPS=reference)"
    assert f"built with torch {_library.BUILD['torch']}" in result.stdout


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"auto.*fused.*reference.*'fast'"):
        ops.use("fast")
    result = python("-c", "import kdfast.ops", KDFAST_OPS="fast")
    assert result.returncode == 1 and "KDFAST_OPS" in result.stderr and "'fast'" in result.stderr


def test_use_is_a_call_and_a_context():
    with ops.use("auto"):
        assert ops.active() == "fused"
        with ops.use("reference"):
            assert ops.active() == "reference"
            ops.use("fused")
            assert ops.active() == "fused"
        assert ops.active() == "fused" and _library.mode() == "auto"


def test_each_mode_takes_its_path(monkeypatch):
    feature, took = torch.rand(2, 3, 4, 4), []
    twin = ops.reference.attention_map
    monkeypatch.setattr(ops.reference, "attention_map", lambda *a: took.append(1) or twin(*a))
    for mode, calls in (("fused", 0), ("auto", 0), ("reference", 1)):
        with ops.use(mode):
            ops.attention_map(feature)
        assert len(took) == calls


def test_missing_cuda_library_is_said_once_or_refused(monkeypatch):
    monkeypatch.setattr(_library, "NO_CUDA", "nvcc was not found")
    monkeypatch.setattr(_library, "_said", set())
    device = torch.device("cuda")
    with ops.use("auto"):
        with pytest.warns(RuntimeWarning, match=r"cuda tensors.*plain-torch.*nvcc was not found"):
            assert not _library.fused("attention_map", device)
        assert not _library.fused("attention_map", device)
    with ops.use("fused"), pytest.raises(RuntimeError, match=r"attention_map.*nvcc was not found"):
        _library.fused("attention_map", device)


def test_without_compiler_the_twins_serve(checkout):
    """A missing compiler skips the extension; the reason reaches the user."""
    built = python("setup.py", "build", cwd=checkout, CXX="no-such-compiler", KDFAST_CUDA=None)
    assert built.returncode == 0, built.stderr
    record = json.loads((checkout / "kdfast" / "_build.json").read_text())
    reason = "no C++ compiler: 'no-such-compiler' was not found"
    assert record["extension_off"] == reason
    assert [path for path in checkout.rglob("*.so")] == []

    script = """
import torch, warnings
from kdfast import ops
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        assert ops.attention_map(torch.ones(1, 2, 2, 2)).tolist() == [[0.5] * 4]
print(ops.active(), len(said), said[0].message)
try:
    ops.use("fused")
except RuntimeError as error:
    print(error)
"""
    path = [str(checkout), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    result = python("-c", script, cwd=checkout, PYTHONPATH=os.pathsep.join(path), KDFAST_OPS=None)
    assert result.returncode == 0, result.stderr
    said, refused = result.stdout.splitlines()
    assert said.startswith("reference 1 ") and reason in said and reason in refused


def test_failing_compiler_fails_the_build(checkout):
    for source in (checkout / "csrc").rglob("*.cpp"):
        source.unlink()
    (checkout / "csrc" / "schemas" / "attention.cpp").write_text("#error broken on purpose\n")
    built = python("setup.py", "build", cwd=checkout, KDFAST_CUDA=0)
    assert built.returncode != 0 and "broken on purpose" in built.stdout + built.stderr


def test_demanding_cuda_without_nvcc_stops(tmp_path):
    built = python("setup.py", "--name", KDFAST_CUDA=1, CUDA_HOME=tmp_path)
    assert built.returncode != 0
    assert f"KDFAST_CUDA=1, but nvcc was not found in CUDA_HOME={tmp_path}" in built.stderr


def test_bad_cuda_wish_stops():
    built = python("setup.py", "--name", KDFAST_CUDA="yes")
    assert built.returncode != 0
    assert "KDFAST_CUDA must be unset, 0 or 1, got 'yes'" in built.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import kdfast, timm",
        "import timm, kdfast",
        "import kdfast.models, timm",
        "import kdfast, importlib.util; importlib.util.find_spec('timm'); import timm",
        "import kdfast; from timm.models import registry; import timm",
    ],
)
def test_models_are_registered_in_any_order(imports):
    result = python("-c", f"{imports}; assert timm.is_model('cifar_resnet20')")
    assert result.returncode == 0, result.stderr


def test_importing_kdfast_or_reading_runs_needs_no_torch():
    result = python("-c", "import kdfast.analysis, sys; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr
