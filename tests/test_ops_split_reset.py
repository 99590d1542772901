"""split_reset_: the redraw of the specification, masks, layouts, dtypes, splits."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from cases import DEVICES
from torch import Tensor

from kdfast import ops
from kdfast.ops import Key, reference

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])
KEY = Key(3, "reset", 1)


@pytest.fixture(autouse=True)
def fused():
    """The fused path or an error: a missing library must not pass as the twin."""
    with ops.use("fused"):
        yield


class Mask(NamedTuple):
    """What the op reads of a split mask."""

    shape: tuple[int, ...]
    rows: list[tuple[int, int]] | Tensor | None = None
    columns: list[tuple[int, int]] | Tensor | None = None
    bits: Tensor | None = None


def block(shape, rate=0.5):
    rows, columns = (math.ceil(n * rate) for n in shape[:2])
    return Mask(shape, [(0, rows)], [(0, columns)])


def unstructured(shape, rate=0.5, device="cpu", seed=0):
    count = math.prod(shape)
    kept = torch.rand(count, generator=torch.Generator().manual_seed(seed)) >= 1 - rate
    kept = torch.cat([kept, kept.new_zeros(-count % 8)]).view(-1, 8)
    bits = (kept << torch.arange(8)).sum(1).to(torch.uint8)
    return Mask(shape, bits=bits.to(device))


def layers(device="cpu", dtype=torch.float32, seed=0):
    """Weights and masks of every form."""
    masks = [
        block((8, 3, 7, 7)),
        Mask((8, 3, 3, 3), [(0, 5)], [(0, 3)]),
        block((64, 64, 3, 3)),
        Mask((12, 30, 1, 1), [(0, 6)], [(0, 4), (10, 5), (20, 3), (29, 1)]),
        Mask((10, 33), [(0, 10)], [(0, 17)]),
        Mask((9, 20, 3), torch.tensor([[2, 3], [7, 2]]), torch.tensor([[0, 1], [5, 15]])),
        Mask((4, 6), [], []),
        Mask((4, 6, 2, 2), [(0, 4)], [(0, 6)]),
        Mask((1, 1), [], [(0, 1)]),
        unstructured((7, 5, 3, 3), device=device),
        unstructured((33, 41), 0.8, device),
    ]
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(mask.shape, generator=generator, dtype=torch.float64).to(device, dtype) + 9
        for mask in masks
    ]
    return weights, masks


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@devices
@both_paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_5_keeps_and_redraws(dtype, path, device):
    """Check 5 of the Knowledge Evolution specification."""
    weights, masks = layers(device, dtype)
    before = [weight.clone() for weight in weights]
    with ops.use(path):
        assert ops.split_reset_(weights, masks, KEY) is None
    for old, new, mask in zip(before, weights, masks, strict=True):
        kept = reference.split_reset.kept_entries(mask, torch.device(device))
        assert torch.equal(new[kept], old[kept])
        bound = 1 / math.sqrt(math.prod(mask.shape[1:]))
        drawn = new[~kept].double()
        if drawn.numel():
            assert drawn.abs().max() <= bound * (1 + torch.finfo(dtype).eps)
    redrawn = weights[2][32:].double()
    assert redrawn.std().item() == pytest.approx(0.024056, rel=0.02)
    assert abs(redrawn.mean()) < 4 * 0.024056 / redrawn.numel() ** 0.5


@devices
@pytest.mark.parametrize(
    ("shape", "bound", "std"),
    [
        ((64, 64, 3, 3), 0.0416667, 0.024056),
        ((64, 3, 7, 7), 0.082479, 0.082479 / 3**0.5),
        ((100, 512), 0.044194, 0.044194 / 3**0.5),
    ],
)
def test_check_5_bounds(shape, bound, std, device):
    weight = torch.zeros(shape, device=device)
    ops.split_reset_([weight], [Mask(shape, [], [])], KEY)
    assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert weight.abs().max() <= bound * 1.00001
    assert weight.std().item() == pytest.approx(std, rel=0.01)


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_twin(dtype, device):
    weights, masks = layers(device, dtype)
    twins = [weight.cpu() for weight in weights]
    ops.split_reset_(weights, masks, KEY)
    on_cpu = [m if m.bits is None else m._replace(bits=m.bits.cpu()) for m in masks]
    reference.split_reset_(twins, on_cpu, KEY)
    for got, want in zip(weights, twins, strict=True):
        assert torch.equal(got.cpu(), want)


@devices
def test_a_draw_depends_on_key_layer_and_element_alone(device):
    shape = (6, 5, 3, 3)
    none, half = Mask(shape, [], []), block(shape)
    a, b, c, d = (torch.zeros(shape, device=device) for _ in range(4))
    ops.split_reset_([a, b], [none, none], KEY)
    ops.split_reset_([c, d], [half, none], KEY)
    assert torch.equal(c[3:], a[3:]) and torch.equal(c[:, 3:], a[:, 3:]) and torch.equal(d, b)
    assert not c[:3, :3].any() and not torch.equal(a, b)
    ops.split_reset_([c], [none], Key(3, "reset", 2))
    assert not torch.equal(c, a)


@devices
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "slice", "unaligned"])
def test_layouts_are_written_by_their_elements(layout, device):
    shape = (6, 5, 3, 4)
    for mask in (block(shape), unstructured(shape, device=device)):
        want = torch.ones(shape, device=device)
        ops.split_reset_([want], [mask], KEY)
        weight = torch.ones(shape, device=device)
        if layout == "channels_last":
            weight = weight.to(memory_format=torch.channels_last)
        elif layout == "transposed":
            weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "slice":
            weight = torch.ones(6, 5, 3, 8, device=device)[..., ::2]
        else:
            weight = torch.ones(math.prod(shape) + 1, device=device)[1:].view(shape)
        strides, place = weight.stride(), weight.data_ptr()
        ops.split_reset_([weight], [mask], KEY)
        assert torch.equal(weight, want)
        assert (weight.stride(), weight.data_ptr()) == (strides, place)


@devices
def test_many_layers(device):
    """More than one launch takes."""
    shape = (3, 4, 2, 2)
    weights = [torch.zeros(shape, device=device) for _ in range(130)]
    twins = [torch.zeros(shape) for _ in range(130)]
    masks = [block(shape) for _ in range(130)]
    ops.split_reset_(weights, masks, KEY)
    reference.split_reset_(twins, masks, KEY)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(weights, twins, strict=True))


@devices
@both_paths
def test_parameters_and_versions(path, device):
    layer = torch.nn.Conv2d(4, 6, 3).to(device)
    bias, before = layer.bias.clone(), layer.weight._version
    with ops.use(path):
        ops.split_reset_([layer.weight], [block((6, 4, 3, 3))], KEY)
    assert layer.weight.requires_grad and layer.weight.is_leaf
    assert layer.weight._version > before and torch.equal(layer.bias, bias)
    layer(torch.ones(1, 4, 5, 5, device=device)).sum().backward()
    weight = torch.zeros(6, 4, 3, 3, device=device, requires_grad=True)
    value = weight.square().sum()
    with ops.use(path):
        ops.split_reset_([weight], [block((6, 4, 3, 3))], KEY)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    with torch.inference_mode(), ops.use(path):
        ops.split_reset_([layer.weight.detach()], [block((6, 4, 3, 3))], KEY)


W, M = torch.ones(4, 6), Mask((4, 6), [(0, 2)], [(0, 3)])
BITS = torch.zeros(3, dtype=torch.uint8)


@both_paths
@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (([W], [M], 3), TypeError, ["key", "int"]),
        (([], [], KEY), ValueError, ["at least one", "0 and 0"]),
        (([W, W], [M], KEY), ValueError, ["2 and 1"]),
        (([W.long()], [M], KEY), TypeError, ["weights[0]", "torch.int64"]),
        (([W[0]], [M], KEY), ValueError, ["weights[0]", "[6]"]),
        (([W[:0]], [M], KEY), ValueError, ["weights[0]", "[0, 6]"]),
        (([W[:3]], [M], KEY), ValueError, ["masks[0]", "[4, 6]", "[3, 6]"]),
        (([W, W.to("meta")], [M, M], KEY), ValueError, ["one device", "meta", "weights[1]"]),
        (([W], [M._replace(rows=None)], KEY), ValueError, ["masks[0].rows", "given"]),
        (([W], [M._replace(rows=[(0, 5)])], KEY), ValueError, ["masks[0].rows", "(0, 5)"]),
        (([W], [M._replace(columns=[(3, 2), (4, 1)])], KEY), ValueError, ["masks[0].columns"]),
        (([W], [M._replace(columns=[(-1, 2)])], KEY), ValueError, ["masks[0].columns"]),
        (([W], [M._replace(bits=BITS.long())], KEY), TypeError, ["bits", "torch.int64"]),
        (([W], [M._replace(bits=BITS[:2])], KEY), ValueError, ["bits", "3 bytes", "2"]),
        (([W], [M._replace(bits=BITS.to("meta"))], KEY), ValueError, ["one device", "meta"]),
    ],
)
def test_errors_name_op_argument_and_value(path, arguments, kind, words):
    with ops.use(path), pytest.raises(kind) as caught:
        ops.split_reset_(*arguments)
    assert all(word in str(caught.value) for word in ["split_reset_", *words]), caught.value
    assert torch.equal(W, torch.ones(4, 6))


@devices
def test_opcheck(device):
    weights = [torch.zeros(4, 6, device=device), torch.zeros(3, 2, 3, 3, device=device)]
    runs = torch.tensor([[0, 2], [0, 3]], device=device)
    bits = [torch.zeros(7, dtype=torch.uint8, device=device)]
    torch.library.opcheck(
        torch.ops.kdfast.split_reset_.default,
        (weights, runs, bits, [1, -1], [1, 0], KEY.signed),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_thread_count_does_not_change_a_bit():
    shape = (128, 130, 3, 3)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weights = [torch.ones(shape), torch.ones(5, 7), torch.ones(shape)]
            ops.split_reset_(weights, [block(w.shape) for w in weights], KEY)
            results.append(weights)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _emulated(dtype):
    def run():
        weights, masks = layers(dtype=dtype)
        del weights[2], masks[2]
        weights = [weight.contiguous() for weight in weights]
        weights[1] = weights[1].to(memory_format=torch.channels_last)
        ops.split_reset_(weights, masks, KEY)
        return weights

    return run


def _emulated_many():
    weights = [torch.zeros(2, 3) for _ in range(70)]
    ops.split_reset_(weights, [Mask((2, 3), [(0, 1)], [(1, 1)])] * 70, KEY)
    return weights


EMULATED = {
    **{f"split_reset-{dtype}".replace("torch.", ""): (_emulated(dtype), 1e-30) for dtype in DTYPES},
    "split_reset-many": (_emulated_many, 1e-30),
}
