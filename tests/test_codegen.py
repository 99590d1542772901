"""The CUDA kernels compile without warnings, spill nothing and keep to their registers.

tests/codegen.py says what is compiled, for which architectures, and how the budget is renewed.
"""

from __future__ import annotations

import re

import codegen
import pytest
from toolkit import cuda_home, kernel_names

pytestmark = pytest.mark.skipif(cuda_home() is None, reason="nvcc was not found")

# Kernels with float64 arithmetic for float32 data, and why.
MAPS = "products of maps are kept in double: csrc/arithmetic.h, MapPair"
DOUBLE_ON_PURPOSE = {
    "attention_maps": MAPS,
    "attention_loss_sum": MAPS,
    "attention_map_normalise": MAPS,
    "attention_loss_gradient": MAPS,
    "attention_map_gradient": MAPS,
    "logits_rows": "a few numbers a row: T, weights and the row's sums over threads",
    "logits_mean": "the sum over rows, once",
    "logits_scale": "one product a thread, of the upstream gradient and the terms' weight",
    "negatives_drawn": "a square root of the pool, once a thread",
    "split_reset": "one launch takes layers of every dtype, double among them",
}

# Files that take packs from shared memory alone, and why that serves.
SHARED_PACKS = {"fsp.cu": "a tile is loaded by 4 bytes a lane, whole sectors, and read many times"}
# Instances that take less than 16 bytes a load, and why.
NARROW = {
    r"logits_rows<.*, 32>": "a warp a row of up to 256 classes: neighbouring lanes, whole sectors",
    r"split_copy_units<(uint2|unsigned \w+)>": "for runs that 16 bytes do not divide",
}


@pytest.fixture(scope="module")
def assembled() -> dict[str, dict[str, codegen.Usage]]:
    return codegen.named(codegen.compile_all())


@pytest.fixture(scope="module")
def ptx() -> dict[str, codegen.Kernel]:
    kernels = codegen.read_ptx()
    known = codegen.names(kernels)
    return {known[symbol]: kernel for symbol, kernel in kernels.items()}


def test_every_generation_within_budget(assembled):
    assert assembled and all(assembled.values())
    lines = codegen.over_budget(assembled, codegen.read_budget())
    assert not lines, "\n".join(lines)


def test_built_library_within_budget():
    reason = codegen.built_is_stale()
    if reason is not None:
        pytest.skip(reason)
    usages = codegen.named(codegen.read_library(codegen.library()))
    usages = {arch: kernels for arch, kernels in usages.items() if arch in codegen.BUILT}
    if not usages:
        pytest.skip(f"kdfast/_cuda is built for none of {codegen.BUILT}")
    lines = codegen.over_budget(usages, codegen.read_budget())
    assert not lines, "\n".join(lines)


def test_budget_has_the_kernels_that_are(ptx):
    assert set(codegen.read_budget()) == set(ptx), "run `python tests/codegen.py --update`"
    assert {name.partition("<")[0] for name in ptx} == kernel_names()


def test_packs_are_one_load_of_16_bytes(ptx):
    """In every file whose kernels load packs, and in every instance of a kernel that has one."""
    for source in codegen.sources():
        text = source.with_suffix(".cuh").read_text()
        here = {
            name: kernel
            for name, kernel in ptx.items()
            if re.search(rf"\b{name.partition('<')[0]}\b", text)
        }
        packed = {name.partition("<")[0] for name, kernel in here.items() if kernel.vector_loads}
        promised = "load_pack<" in text and source.name not in SHARED_PACKS
        assert packed or not promised, f"{source.name}: no 16-byte load"
        for name, kernel in here.items():
            narrow = any(re.fullmatch(pattern, name) for pattern in NARROW)
            if name.partition("<")[0] in packed and not narrow:
                assert kernel.vector_loads, f"{codegen.place_of(name)}: no 16-byte load"


def test_float_kernels_compute_in_float(ptx):
    """No instruction on float64 outside the instances for double, but for the list above."""
    found = {
        name: kernel.double
        for name, kernel in ptx.items()
        if "double" not in name.partition("<")[2] and kernel.double
    }
    surprising = [
        f"{codegen.place_of(name)}: {', '.join(lines)}"
        for name, lines in found.items()
        if name.partition("<")[0] not in DOUBLE_ON_PURPOSE
    ]
    assert not surprising, "\n".join(surprising)
    assert set(DOUBLE_ON_PURPOSE) == {name.partition("<")[0] for name in found}


def test_budget_finds_what_it_is_for():
    usage = codegen.Usage
    budget = {"attention_maps<float, 2>": {"sm_90": 64}}
    kernel = next(iter(budget))

    def lines(found, name=kernel):
        return codegen.over_budget({"sm_90": {name: found}}, budget)

    assert lines(usage(64, 0, 0)) == []
    place = r"csrc/cuda/attention.cuh:\d+ attention_maps<float, 2> on sm_90: "
    for found, words in (
        (usage(65, 0, 0), "65 registers, budget 64"),
        (usage(64, 8, 4), "8 bytes of stack, 4 of spills"),
    ):
        (line,) = lines(found)
        assert re.fullmatch(place + words, line)
    (line,) = lines(usage(1, 0, 0), "new<float>")
    assert "no budget" in line


def test_parsers(tmp_path, monkeypatch):
    """A kernel made to spill is seen to, and its double arithmetic and vector load as well."""
    source = tmp_path / "spill.cu"
    source.write_text(
        """
        template <typename T>
        __global__ void __launch_bounds__(1024, 2) spill(T* x, const float4* y) {
          T a[64];
          for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 64; ++i) x[threadIdx.x] += a[i] * a[(i * 7) % 64];
          x[0] = T(x[1] * 0.1) + T(y->x + y->y + y->z + y->w);
        }
        template __global__ void spill(float*, const float4*);
        """
    )
    monkeypatch.setattr(codegen, "FOLDER", tmp_path)
    monkeypatch.setattr(codegen, "sources", lambda: [source])
    (usage,) = codegen.assemble(codegen.ptx_of(source), "sm_75").values()
    assert usage.stack > 0 and usage.spills > 0 and usage.registers <= 64
    ((symbol, kernel),) = codegen.read_ptx().items()
    assert kernel.vector_loads == 1 and any("mul" in line for line in kernel.double)
    assert codegen.names([symbol]) == {symbol: "spill<float>"}


def test_warnings_are_errors(tmp_path, monkeypatch):
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void f(float* x) { int unused; *x = 1; }\n")
    monkeypatch.setattr(codegen, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=r"warns\.cu.*unused"):
        codegen.ptx_of(source)
