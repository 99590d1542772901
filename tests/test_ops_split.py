"""SplitMask and split_conv2d: hand values, the float64 twin, masks' laws, torch's machinery."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from cases import DEVICES, LAYOUTS, Calls, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdfast import ops
from kdfast.ops import Key, SplitMask, reference, split_conv2d
from kdfast.ops.reference.philox import counter_of, philox, uniform

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])

# Sums of up to a few thousand products; half results are rounded once, gradients from half ones.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 1e-5),
    torch.float16: (1e-3, 3e-3),
    torch.bfloat16: (8e-3, 2e-2),
}


@pytest.fixture(autouse=True)
def fused():
    """The fused path or an error: a missing library must not pass as the twin."""
    with ops.use("fused"):
        yield


@dataclass(frozen=True)
class Case:
    """x [batch, mask columns * groups, *size], a weight of the mask's shape, perhaps a bias."""

    name: str
    mask: SplitMask
    size: tuple[int, int] = (5, 6)
    batch: int = 3
    groups: int = 1
    bias: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    weight_layout: str = "nchw"
    options: dict = field(default_factory=lambda: {"padding": 1})

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}-{dtype}-{self.layout}-{self.weight_layout}"

    def make(self, device: str, seed: int = 0) -> list[Tensor]:
        """[x, weight] or [x, weight, bias]; all require gradients."""
        generator = torch.Generator().manual_seed(seed)
        out, into = self.mask.shape[:2]
        shapes = [(self.batch, into * self.groups, *self.size), self.mask.shape]
        layouts = [LAYOUTS[self.layout], LAYOUTS[self.weight_layout]]
        if self.bias:
            shapes.append((out,))
            layouts.append(lambda b: b)
        tensors = []
        for shape, layout in zip(shapes, layouts, strict=True):
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
            tensors.append(layout(tensor.to(device, self.dtype)).detach().requires_grad_())
        return tensors

    def run(self, conv, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        mask = self.mask.to(x.device)
        return conv(x, weight, mask, bias, groups=self.groups, **self.options)


def output_and_gradients(case: Case, conv, tensors: list[Tensor]) -> list[Tensor]:
    y = case.run(conv, *tensors)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    upstream = upstream.to(torch.bfloat16)  # exact in every dtype but float16, where it is close
    return [y, *torch.autograd.grad(y, tensors, upstream.to(y))]


ONE = SplitMask.kels((6, 10, 3, 3), 0.5)
SEGMENTS = SplitMask.kels((6, 10, 3, 3), 0.5, segments=[4, 3, 3])
MIDDLE = SplitMask((6, 10, 3, 3), [(1, 3)], [(2, 5)])
SCATTERED = SplitMask((9, 8, 3, 2), [(0, 2), (3, 1), (6, 2)], [(1, 2), (4, 4)])
EVEN = SplitMask((16, 16, 1, 1), [(0, 4), (8, 4)], [(4, 4), (12, 4)])
BITS = SplitMask.wels((6, 10, 3, 3), 0.4, Key(1))
SPARSE = SplitMask.wels((30, 3, 1, 1), 0.3, Key(2))  # rows without a weight
MASKS = [
    Case("one run", ONE),
    Case("segments", SEGMENTS),
    Case("middle", MIDDLE),
    Case("scattered", SCATTERED, options={"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    Case("stem", SplitMask.kels((9, 3, 3, 3), 0.5, first=True), options={"stride": 2}),
    Case("all rows", SplitMask.kels((7, 9, 1, 1), 0.5, last=True), options={}),
    Case("everything", SplitMask.kels((5, 4, 3, 3), 1.0)),
    Case("same", SEGMENTS, options={"padding": "same"}),
    Case("bits", BITS),
    Case("bits, empty rows", SPARSE, options={}),
    Case("grouped", SplitMask((8, 3, 3, 3), [(1, 2), (5, 2)], [(1, 2)]), groups=2),
    Case("grouped, one group", SplitMask((8, 3, 3, 3), [(0, 4)], [(0, 3)]), groups=2),
    Case("grouped, uneven", SplitMask((8, 3, 3, 3), [(1, 2), (4, 3)], [(1, 2)]), groups=2),
    Case("first groups", SplitMask.kels((9, 8, 3, 3), 0.5, groups=3), groups=3),
    Case("depthwise", SplitMask.kels((10, 1, 3, 3), 0.5, groups=10), groups=10),
    Case("depthwise, multiplier", SplitMask((10, 1, 3, 3), [(0, 2), (4, 4)], [(0, 1)]), groups=5),
    Case("one channel left", SplitMask((4, 4, 3, 3), [(1, 1)], [(2, 1)])),
    Case("grouped bits", SplitMask.wels((8, 3, 3, 3), 0.5, Key(3)), groups=2),
]
CASES = [
    *MASKS,
    *(
        Case(
            case.name, case.mask, groups=case.groups, options=case.options, layout="channels_last",
            weight_layout=layout, bias=False,
        )
        for case in MASKS
        for layout in ("channels_last", "nchw")
    ),
    *(
        Case(name, mask, dtype=dtype, layout=layout, weight_layout=layout)
        for name, mask in (("segments", SEGMENTS), ("bits", BITS), ("middle", MIDDLE))
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
        for layout in ("nchw", "channels_last")
    ),
    *(
        Case(name, mask, layout=layout, weight_layout="unaligned")
        for name, mask in (("segments", SEGMENTS), ("bits", BITS))
        for layout in LAYOUTS
    ),
    *(
        Case(f"bits of {size}", SplitMask.wels((5, width, *size), 0.5, Key(4)), options={})
        for width, size in ((150, (3, 3)), (13, (2, 5)), (1, (1, 1)))
    ),
    *(
        Case(f"bits of {size}", SplitMask.wels((5, width, *size), 0.5, Key(4)), options={},
             weight_layout="channels_last")
        for width, size in ((150, (3, 3)), (13, (2, 5)), (7, (3, 3)))
    ),
    Case("bits of a slice", BITS, weight_layout="batch_slice"),
    Case("bits of a slice", BITS, weight_layout="channels_last_slice"),
    Case("segments of a slice", SEGMENTS, weight_layout="batch_slice"),
    Case("long lines", SEGMENTS, size=(61, 67), batch=2, dtype=torch.float64),
    Case("vectors", SplitMask.kels((32, 64, 3, 3), 0.5, segments=[32, 32]), layout="channels_last"),
]  # fmt: skip


@devices
@both_paths
def test_hand_values(device, path):
    """Check 9 of the specification: a 1x1 convolution by hand."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device).view(2, 2, 1, 1)
    x = torch.tensor([5.0, 7.0], device=device).view(1, 2, 1, 1)
    mask = SplitMask.kels(weight.shape, 0.5)
    assert mask.dense().view(2, 2).tolist() == [[True, False], [False, False]]
    bits = SplitMask((2, 2, 1, 1), bits=torch.tensor([0b1001], dtype=torch.uint8, device=device))
    bias = torch.tensor([0.5, 0.25], device=device)
    with ops.use(path):
        assert split_conv2d(x, weight, mask).flatten().tolist() == [5, 0]
        assert split_conv2d(x, weight, mask, bias).flatten().tolist() == [5.5, 0]
        assert split_conv2d(x, weight, bits, bias).flatten().tolist() == [5.5, 28.25]
    slim = F.conv2d(x[:, :1], weight[:1, :1])
    assert slim.flatten().tolist() == [5]


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_double_twin(case, device):
    tensors = case.make(device)
    got = output_and_gradients(case, split_conv2d, tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    want = output_and_gradients(case, reference.split_conv2d, exact)
    forward, backward = TOLERANCE[case.dtype]
    for i, (result, twin) in enumerate(zip(got, want, strict=True)):
        like = got[0] if i == 0 else tensors[i - 1]
        assert result.dtype == case.dtype and result.shape == like.shape
        assert error(result, twin) <= (backward if i else forward)
    y, dx, dw = got[:3]
    mask = case.mask
    assert not y[:, ~mask.row_mask(y.device)].any()
    assert not dw[~mask.dense(device=dw.device)].any()
    if case.groups == 1 and mask.rows is not None:
        assert not dx[:, ~mask.column_mask(dx.device)].any()
    if case.layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        if mask.shape[1] > 1 and case.groups == 1:
            assert dx.is_contiguous(memory_format=torch.channels_last)
        if case.weight_layout == "channels_last" and mask.shape[1] > 1:
            assert dw.is_contiguous(memory_format=torch.channels_last)


@devices
@pytest.mark.parametrize("case", [case for case in MASKS if "bits" not in case.name], ids=str)
def test_what_the_mask_leaves_out_is_not_read(case, device):
    tensors = case.make(device)
    clean = output_and_gradients(case, split_conv2d, tensors)
    with torch.no_grad():
        tensors[1][~case.mask.dense(device=device)] = math.nan
        tensors[2][~case.mask.row_mask(device)] = math.nan
        if case.groups == 1:
            tensors[0][:, ~case.mask.column_mask(device)] = math.nan
    for got, want in zip(
        output_and_gradients(case, split_conv2d, tensors), clean, strict=True
    ):  # fmt: skip
        assert torch.equal(got, want)


@devices
def test_bits_leave_nan_out(device):
    case = Case("bits", BITS)
    tensors = case.make(device)
    clean = output_and_gradients(case, split_conv2d, tensors)
    with torch.no_grad():
        tensors[1][~BITS.dense(device=device)] = math.nan
    got = output_and_gradients(case, split_conv2d, tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@devices
@pytest.mark.parametrize("mask", [ONE, SEGMENTS, SCATTERED], ids=["one", "segments", "scattered"])
def test_is_the_slim_convolution(mask, device):
    """Section 6: W[rows, columns] on x[:, columns], bit for bit, zeros elsewhere."""
    x, weight, bias = Case("", mask).make(device)
    rows, columns = mask.row_mask(device), mask.column_mask(device)
    slim = F.conv2d(x[:, columns], weight[rows][:, columns], bias[rows], padding=1)
    with Calls() as calls:
        y = split_conv2d(x, weight, mask, bias, padding=1)
    assert torch.equal(y[:, rows], slim) and not y[:, ~rows].any()
    convolved = [result for name, result in calls if "convolution" in name]
    assert [result.shape[1] for result in convolved] == [int(rows.sum())]


# Masks.


def test_kels_widths():
    """Sections 4.1 and 10.7: ceil of n * rate, forgiving the error of a float product."""

    def a(width, rate):
        return SplitMask.kels((width, 1), rate).rows[0][1]

    assert [a(3, 0.5), a(64, 0.8), a(1, 0.01), a(100, 0.55), a(200, 0.55)] == [2, 52, 1, 55, 110]
    assert all(
        a(n, s / 10) == -(-n * s // 10) for n in (10, 16, 33, 64, 2048) for s in range(1, 11)
    )


def test_kels_worked_examples():
    """Section 4.2: DenseNet-121 transition 1 and GoogLeNet 3b."""
    mask = SplitMask.kels((128, 256, 1, 1), 0.5, segments=[64, *[32] * 6])
    starts = [64, 96, 128, 160, 192, 224]
    assert mask.columns == ((0, 32), *((start, 16) for start in starts))
    assert int(mask.column_mask().sum()) == 128 and mask.rows == ((0, 64),)
    widths = [64, 128, 32, 32]
    mask = SplitMask.kels((128, 256, 1, 1), 0.5, segments=widths)
    assert mask.columns == ((0, 32), (64, 64), (192, 16), (224, 16))
    assert int(mask.column_mask().sum()) == 128
    mask = SplitMask.kels((128, 256, 1, 1), 0.8, segments=widths)
    assert [length for _, length in mask.columns] == [52, 103, 26, 26]
    assert int(mask.column_mask().sum()) == 207
    assert SplitMask.kels((8, 12), 1.0, segments=[4, 4, 4]).columns == ((0, 12),)
    classifier = SplitMask.kels((102, 1024), 0.5, last=True, segments=[512, *[32] * 16])
    assert classifier.rows == ((0, 102),) and classifier.sum() == 102 * 512


def test_kels_sums_of_resnet18():
    """Section 9's mask sums at rate 0.5, 100 classes; grouped convolutions of section 10.14."""
    sums = {
        (64, 3, 7, 7): 4704, (64, 64, 3, 3): 9216, (128, 64, 3, 3): 18432,
        (128, 128, 3, 3): 36864, (128, 64, 1, 1): 2048, (256, 128, 3, 3): 73728,
        (256, 256, 3, 3): 147456, (256, 128, 1, 1): 8192, (512, 256, 3, 3): 294912,
        (512, 512, 3, 3): 589824, (512, 256, 1, 1): 32768, (100, 512): 25600,
    }  # fmt: skip
    for shape, total in sums.items():
        mask = SplitMask.kels(shape, 0.5, first=shape[1] == 3, last=len(shape) == 2)
        assert mask.sum() == total == int(mask.dense().sum())
    assert SplitMask.kels((24, 8, 3, 3), 0.5, groups=3).rows == ((0, 16),)
    assert SplitMask.kels((512, 512, 3, 3), 0.5).keep == 0.25


@devices
def test_wels_bits(device):
    """M = [u >= 1 - s], u by element of the contiguous weight; the twin's bits."""
    shape, key = (5, 7, 3, 3), Key(7, "mask", "layer1.0.conv1")
    count = math.prod(shape)
    mask = SplitMask.wels(shape, 0.8, key, device)
    element = torch.arange(count)
    words = torch.stack(philox(key.value, counter_of(element // 4, element * 0, element * 0)), 1)
    u = uniform(words.gather(1, (element % 4).unsqueeze(1)).squeeze(1))
    assert torch.equal(mask.dense(device="cpu").flatten(), u >= 1 - 0.8)
    assert mask.bits.shape == ((count + 7) // 8,) and mask.bits[-1] < 1 << count % 8
    with ops.use("reference"):
        assert SplitMask.wels(shape, 0.8, key, device) == mask
    assert SplitMask.wels(shape, 0.8, Key(7, "mask"), device) != mask
    assert SplitMask.wels(shape, 1.0, key, device).sum() == count


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_wels_density(rate):
    """Check 6: within four standard deviations of the rate."""
    shape = (64, 64, 3, 3)
    keep = SplitMask.wels(shape, rate, Key(0, "density")).keep
    assert abs(keep - rate) < 4 * math.sqrt(rate * (1 - rate) / math.prod(shape))


def test_bits_of_large_masks_do_not_depend_on_threads():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(SplitMask.wels((130, 129, 3, 3), 0.5, Key(5)))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def runs(size: int):
    """Ascending, disjoint runs within `size`, at least one."""

    def cut(edges: set[int]) -> list[tuple[int, int]]:
        order = sorted(edges)
        return [(a, b - a) for a, b in zip(order[::2], order[1::2], strict=False)]

    return st.sets(st.integers(0, size), min_size=2, max_size=8).map(cut)


@st.composite
def masks(draw) -> SplitMask:
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    if draw(st.booleans()):
        bits = draw(st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape)))
        return SplitMask.from_dense(torch.tensor(bits).view(shape))
    return SplitMask(shape, draw(runs(shape[0])), draw(runs(shape[1])))


@settings(max_examples=100, deadline=None)
@given(masks())
def test_mask_laws(mask):
    """dense() is what the runs or bits say; sums, fractions, states and copies agree with it."""
    dense = mask.dense()
    assert dense.shape == mask.shape and dense.dtype == torch.bool
    if mask.bits is None:
        want = torch.zeros(mask.shape, dtype=torch.bool)
        for row, rows in mask.rows:
            for column, columns in mask.columns:
                want[row : row + rows, column : column + columns] = True
        assert torch.equal(dense, want)
        assert all(a + n < b for (a, n), (b, _) in zip(mask.rows, mask.rows[1:], strict=False))
    assert mask.sum() == int(dense.sum()) and mask.keep == mask.sum() / dense.numel()
    flat = dense.flatten(2) if dense.dim() > 2 else dense.unsqueeze(2)
    assert torch.equal(mask.row_mask(), flat.any(2).any(1))
    assert torch.equal(mask.column_mask(), flat.any(2).any(0))
    assert mask.row_keep == mask.row_mask().double().mean()
    assert mask.column_keep == pytest.approx(mask.column_mask().double().mean())
    assert torch.equal(mask.dense(torch.float32), dense.float())
    assert mask.to("cpu") is mask and mask == SplitMask.from_state(mask.state())
    assert SplitMask.from_dense(dense).sum() == mask.sum()
    assert hash(mask) == hash(SplitMask.from_state(mask.state()))


def test_state_is_json_and_one_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    state = json.loads(json.dumps(SEGMENTS.state()))
    assert SplitMask.from_state(state) == SEGMENTS
    save_file({"bits": BITS.state()["bits"]}, tmp_path / "mask.safetensors")
    loaded = load_file(tmp_path / "mask.safetensors")
    assert SplitMask.from_state({"shape": [6, 10, 3, 3], **loaded}) == BITS
    assert BITS != SEGMENTS and BITS != "bits" and SplitMask.kels((6, 10, 3, 3), 0.6) != ONE
    assert "rows=((0, 3),)" in repr(ONE) and "bits" in repr(BITS)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: SplitMask((3,), [(0, 1)], [(0, 1)]), ValueError, ["shape", "[3]"]),
        (lambda: SplitMask((3, 0), [(0, 1)], [(0, 1)]), ValueError, ["shape", "[3, 0]"]),
        (lambda: SplitMask((3, 3)), ValueError, ["rows and columns, or bits"]),
        (lambda: SplitMask((3, 3), [(0, 1)]), ValueError, ["rows and columns, or bits"]),
        (lambda: SplitMask((3, 3), [(0, 4)], [(0, 1)]), ValueError, ["rows", "3", "(0, 4)"]),
        (lambda: SplitMask((3, 3), [(0, 1)], [(1, 1), (0, 1)]), ValueError, ["columns", "(0, 1)"]),
        (lambda: SplitMask((3, 3), [(0, 0)], [(1, 1)]), ValueError, ["rows", "(0, 0)"]),
        (lambda: SplitMask((3, 3), [], [(1, 1)]), ValueError, ["rows", "none"]),
        (lambda: SplitMask((3, 3), [(0, 1.5)], [(1, 1)]), TypeError, ["rows", "1.5"]),
        (lambda: SplitMask((3, 3), bits=torch.zeros(2)), TypeError, ["bits", "float32"]),
        (lambda: SplitMask((3, 3), bits=b"ab"), TypeError, ["bits", "bytes"]),
        (
            lambda: SplitMask((3, 3), bits=torch.zeros(3, dtype=torch.uint8)),
            ValueError,
            ["bits", "[2]", "[3]"],
        ),
        (lambda: SplitMask.kels((4, 4), 0), ValueError, ["rate", "(0, 1]", "0"]),
        (lambda: SplitMask.kels((4, 4), 1.5), ValueError, ["rate", "1.5"]),
        (lambda: SplitMask.kels((4, 4), float("nan")), ValueError, ["rate", "nan"]),
        (lambda: SplitMask.wels((4, 4), -1, Key(0)), ValueError, ["rate", "-1"]),
        (lambda: SplitMask.wels((4, 4), 0.5, 3), TypeError, ["Key", "int"]),
        (lambda: SplitMask.kels((4, 4), 0.5, segments=[1, 2]), ValueError, ["segments", "[1, 2]"]),
        (lambda: SplitMask.kels((4, 4), 0.5, groups=3), ValueError, ["groups", "3"]),
        (lambda: SplitMask.kels((4, 4), 0.5, True, segments=[4]), ValueError, ["segments"]),
    ],
)
def test_mask_errors(make, kind, words):
    with pytest.raises(kind) as caught:
        make()
    assert all(word in str(caught.value) for word in ["SplitMask", *words]), caught.value


X, W = torch.ones(2, 10, 5, 5), torch.ones(6, 10, 3, 3)


@both_paths
@pytest.mark.parametrize(
    ("arguments", "options", "kind", "words"),
    [
        ((X[0], W, ONE), {}, ValueError, ["x", "[N, C, H, W]", "[10, 5, 5]"]),
        ((X[:0], W, ONE), {}, ValueError, ["x", "non-empty"]),
        ((X.long(), W, ONE), {}, TypeError, ["x", "int64"]),
        ((X, W[0], ONE), {}, ValueError, ["weight", "[10, 3, 3]"]),
        ((X, W.int(), ONE), {}, TypeError, ["weight", "int32"]),
        ((X, W, W), {}, TypeError, ["mask", "Tensor"]),
        ((X, W[:5], ONE), {}, ValueError, ["mask", "[5, 10, 3, 3]", "[6, 10, 3, 3]"]),
        ((X[:, :9], W, ONE), {}, ValueError, ["x", "10 channels", "9"]),
        ((X, W, ONE), {"groups": 4}, ValueError, ["groups", "4"]),
        ((X, W, ONE), {"groups": 2}, ValueError, ["20 channels", "10"]),
        ((X, W.double(), ONE), {}, TypeError, ["weight", "float32", "float64"]),
        ((X, W, ONE, torch.ones(5)), {}, ValueError, ["bias", "[6]", "[5]"]),
        ((X, W, ONE, torch.ones(6).double()), {}, TypeError, ["bias", "float64"]),
        ((X, W.to("meta"), ONE), {}, ValueError, ["one device", "weight"]),
        ((X.to("meta"), W.to("meta"), BITS), {}, ValueError, ["one device", "mask.bits"]),
        ((X, W, ONE), {"stride": 0}, ValueError, ["stride", "0"]),
        ((X, W, ONE), {"padding": -1}, ValueError, ["padding", "-1"]),
        ((X, W, ONE), {"padding": "full"}, ValueError, ["padding", "full"]),
        ((X, W, ONE), {"padding": "same", "stride": 2}, ValueError, ["padding", "same"]),
        ((X, W, ONE), {"dilation": (1, 3)}, ValueError, ["width", "5", "7"]),
    ],
)
def test_errors_name_op_argument_and_value(path, arguments, options, kind, words):
    with ops.use(path), pytest.raises(kind) as caught:
        split_conv2d(*arguments, **options)
    assert all(word in str(caught.value) for word in ["split_conv2d", *words]), caught.value


# Torch's machinery.

SECOND = [case for case in MASKS if case.name in ("middle", "scattered", "grouped, uneven", "bits")]


@devices
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", SECOND, ids=str)
def test_gradcheck_first_and_second(case, layout, device):
    small = Case(
        case.name, case.mask, (3, 3), 1, case.groups, dtype=torch.float64, layout=layout,
        options={"padding": 1},
    )  # fmt: skip
    tensors = small.make(device)

    def op(*tensors):
        return small.run(split_conv2d, *tensors)

    assert torch.autograd.gradcheck(op, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, tensors, fast_mode=True)


@devices
@pytest.mark.parametrize(
    ("dtype", "layout", "channels_last"),
    [
        (torch.float32, "nchw", True),
        (torch.float64, "column_slice", False),
        (torch.float16, "channels_last", False),
        (torch.bfloat16, "channels_last", True),
    ],
)
def test_opcheck(dtype, layout, channels_last, device):
    x = LAYOUTS[layout](torch.randn(3, 8, 5, 6).to(device, dtype)).requires_grad_()
    library = torch.ops.kdfast
    moves = [0, 1, 1, 2, 2, 1], [1, 0, 2, 4, 5, 4], 4, 11, channels_last
    torch.library.opcheck(library.split_copy.default, (x, *moves))
    torch.library.opcheck(library.split_copy.default, (x, [], moves[1], 0, *moves[3:]))
    bits = torch.randint(256, (x.numel() // 8,), dtype=torch.uint8, device=device)
    to = torch.float64 if dtype == torch.float64 else torch.bfloat16
    torch.library.opcheck(library.split_mask.default, (x, bits, to))
    torch.library.opcheck(library.split_draw.default, (bits, -5, 77, 1 << 23))


@devices
def test_compile_fullgraph_with_dynamic_batch(device):
    masks = [ONE, SEGMENTS, BITS.to(device)]

    def step(x, weight, bias):
        maps = [split_conv2d(x.relu(), weight, mask, bias, padding=1) for mask in masks]
        return maps[0] * 2 + maps[1] * maps[2]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            tensors = Case("", ONE, batch=batch, layout="channels_last").make(device)
            torch._dynamo.mark_dynamic(tensors[0], 0)
            y, want = compiled(*tensors), step(*tensors)
            torch.testing.assert_close(y, want)
            grads = [torch.autograd.grad(z.square().mean(), tensors) for z in (y, want)]
            for got, exact in zip(*grads, strict=True):
                assert error(got, exact) < 1e-5


@devices
@pytest.mark.parametrize(
    "case", [case for case in MASKS if case.groups > 1 and case.mask.bits is None], ids=str
)
def test_dynamo_traces_grouped_convolutions(case, device):
    torch._dynamo.reset()
    tensors = case.make(device)
    traced = torch.compile(
        lambda *tensors: case.run(split_conv2d, *tensors), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(traced(*tensors), case.run(split_conv2d, *tensors))


@devices
@both_paths
@pytest.mark.parametrize("mask", [ONE, SEGMENTS, BITS], ids=["one run", "segments", "bits"])
def test_autocast_casts_as_conv2d_does(mask, path, device):
    x, weight, bias = Case("", mask).make(device)
    mask = mask.to(device)
    dense = mask.dense(torch.float32, device)
    with ops.use(path), torch.autocast(device, torch.bfloat16):
        y = split_conv2d(x, weight, mask, bias, padding=1)
        want = F.conv2d(x, weight * dense, bias * mask.row_mask(device), padding=1)
    assert y.dtype == want.dtype == torch.bfloat16
    assert error(y, want) <= 8e-3
    grads = (torch.autograd.grad(z.float().square().sum(), (x, weight, bias)) for z in (y, want))
    for got, exact in zip(*grads, strict=True):
        assert got.dtype == torch.float32 and error(got, exact) <= 2e-2


@devices
def test_inference_mode(device):
    for mask in (ONE, SEGMENTS, BITS):
        x, weight, bias = Case("", mask).make(device)
        want = split_conv2d(x, weight, mask.to(device), bias).detach()
        with torch.inference_mode():
            y = split_conv2d(x, weight, mask.to(device), bias)
            assert torch.equal(y, want) and y.is_inference()


@devices
def test_only_needed_gradients(device):
    x, weight, bias = Case("", SEGMENTS).make(device)
    for wanted in ([x], [weight], [bias]):
        tensors = [t if t is wanted[0] else t.detach() for t in (x, weight, bias)]
        y = split_conv2d(tensors[0], tensors[1], SEGMENTS, tensors[2])
        assert torch.autograd.grad(y.sum(), wanted)[0].shape == wanted[0].shape


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_thread_count_does_not_change_a_bit_of_a_copy(layout):
    x = LAYOUTS[layout](torch.randn(2, 24, 64, 65))
    weight = LAYOUTS[layout](torch.randn(96, 65, 3, 3))
    bits = SplitMask.wels(weight.shape, 0.5, Key(1)).bits
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            copy = torch.ops.kdfast.split_copy(x, [], [0, 1, 3, 7, 9, 11], 0, 40, layout != "nchw")
            masked = torch.ops.kdfast.split_mask(weight, bits, torch.bfloat16)
            results.append((copy, masked))
    finally:
        torch.set_num_threads(threads)
    want = torch.zeros(2, 40, 64, 65)
    want[:, 1:4], want[:, 9:20] = x[:, :3], x[:, 7:18]
    assert torch.equal(results[0][0], want)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _emulated(case: Case, autocast: torch.dtype | None = None):
    def run() -> list[Tensor]:
        tensors = case.make("cpu")
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return output_and_gradients(case, split_conv2d, tensors)

    return run


def _copied(shape, dtype, layout, rows, columns, sizes, channels_last):
    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype)).requires_grad_()
        y = torch.ops.kdfast.split_copy(x, rows, columns, *sizes, channels_last)
        upstream = torch.randn(y.shape, generator=generator).to(dtype)
        return [y, *torch.autograd.grad(y, x, upstream)]

    return run


def _masked(dtype, to, layout):
    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(7, 5, 3, 3, generator=generator)
        weight = LAYOUTS[layout](weight.to(dtype)).requires_grad_()
        bits = torch.randint(256, (40,), generator=generator, dtype=torch.uint8)
        y = torch.ops.kdfast.split_mask(weight, bits, to)
        return [y, *torch.autograd.grad(y, weight, torch.ones_like(y))]

    return run


def _has_kernels(case: Case) -> bool:
    """Blocks of one run are composed of torch's ops alone."""
    return "bits" in case.name or case.name in (
        "segments", "scattered", "same", "grouped", "grouped, uneven",
    )  # fmt: skip


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MANY = [n for i in range(70) for n in (2 * i, i, 1)]  # more runs than one launch holds
EMULATED = {
    **{f"split_conv2d {case}": _emulated(case) for case in MASKS if _has_kernels(case)},
    **{
        f"split_conv2d {dtype} {layout}": _emulated(
            Case("", EVEN, dtype=dtype, layout=layout, weight_layout=layout, options={})
        )
        for dtype in (torch.float64, *_FLOATS)
        for layout in ("nchw", "channels_last")
    },
    **{
        f"split_conv2d {case.name} autocast": _emulated(case, torch.bfloat16)
        for case in (Case("segments", SEGMENTS), Case("bits", BITS))
    },
    **{
        f"split_copy {dtype} {layout}": _copied(
            (3, 7, 2, 3), dtype, layout, [0, 1, 2], [1, 0, 2, 4, 5, 3], (5, 9), last
        )
        for dtype in (torch.float64, *_FLOATS)
        for layout, last in (("nchw", False), ("channels_last", True), ("nchw", True))
    },
    "split_copy many columns": _copied(
        (2, 140, 1, 3), torch.float32, "nchw", [], _MANY, (0, 75), False
    ),
    "split_copy many rows": _copied(
        (140, 3, 1, 2), torch.float32, "nchw", _MANY, [0, 0, 3], (75, 3), False
    ),
    "split_copy long lines": _copied(
        (1, 9, 30, 7), torch.float16, "nchw", [], [0, 1, 7], (0, 9), False
    ),
    **{
        f"split_mask {dtype} {to} {layout}": _masked(dtype, to, layout)
        for dtype, to in [
            (torch.float64, torch.float64),
            *((dtype, to) for dtype in _FLOATS for to in _FLOATS),
        ]
        for layout in ("nchw", "channels_last", "batch_slice")
    },
    "split_draw": lambda: [
        SplitMask.wels(shape, rate, Key(1)).bits
        for shape, rate in (((5, 7, 3, 3), 0.5), ((33, 70), 0.1), ((1, 1), 1.0))
    ],
}
