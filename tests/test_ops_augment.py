"""crop_flip: torchvision's padding and flipping under the same draws, its distribution."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICES, error
from torchvision.transforms.v2 import functional as V

from kdfast import ops
from kdfast.data.transforms import to_float
from kdfast.ops import Key, reference
from kdfast.ops.reference.augment import draw

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])
KEY = Key(5, "augment", 2)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


@pytest.fixture(autouse=True)
def fused():
    """The fused path or an error: a missing library must not pass as the twin."""
    with ops.use("fused"):
        yield


def images(count=12, height=8, width=8, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shape = (count, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def one_by_one(data, indices, key, padding, mode, flip):
    """torchvision's pad, crop, flip and our normalisation, an image at a time, in float64."""
    tops, lefts, flips = draw(indices.cpu(), key, padding, flip)
    _, h, w, _ = data.shape
    results = []
    for i, top, left, flipped in zip(
        indices.tolist(), tops.tolist(), lefts.tolist(), flips.tolist(), strict=True
    ):
        image = data[i].cpu().permute(2, 0, 1)
        image = V.pad(image, [padding] * 4, padding_mode=mode.replace("zeros", "constant"))
        image = V.crop(image, top + padding, left + padding, h, w)
        results.append(V.horizontal_flip(image) if flipped else image)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (torch.stack(results).double() / 255 - mean) / std


@devices
@both_paths
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("height", "width", "padding"), [(8, 8, 4), (5, 9, 0), (7, 5, 3), (33, 35, 4)]
)
def test_matches_torchvision(height, width, padding, mode, flip, path, device):
    data = images(12, height, width, device)
    indices = torch.tensor([3, 0, 11, 3, 7, 1, 2, 10], device=device)
    want = one_by_one(data, indices, KEY, padding, mode, flip)
    with ops.use(path):
        got = ops.crop_flip(data, indices, KEY, MEAN, STD, padding, mode, flip=flip)
    assert got.shape == (8, 3, height, width) and got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, want) <= 1e-6
    assert torch.equal(got[0], got[3])


@devices
def test_padding_larger_than_the_image(device):
    data, indices = images(6, 3, 2, device), torch.arange(6, device=device)
    got = ops.crop_flip(data, indices, KEY, MEAN, STD, 9)
    assert error(got, one_by_one(data, indices, KEY, 9, "zeros", True)) <= 1e-6


@devices
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_formats(dtype, format, device):
    data, indices = images(9, 7, 11, device), torch.arange(9, device=device)
    got = ops.crop_flip(data, indices, KEY, MEAN, STD, 2, dtype=dtype, memory_format=format)
    want = reference.crop_flip(data.cpu(), indices.cpu(), KEY, MEAN, STD, 2, dtype=dtype)
    assert got.dtype == dtype and got.is_contiguous(memory_format=format)
    assert torch.equal(got.cpu(), want)


@devices
def test_a_pure_function_of_key_and_index(device):
    data = images(20, device=device)
    indices = torch.randperm(20, generator=torch.Generator().manual_seed(0)).to(device)
    whole = ops.crop_flip(data, indices, KEY, MEAN, STD)
    parts = [ops.crop_flip(data, part, KEY, MEAN, STD) for part in indices.split(7)]
    assert torch.equal(torch.cat(parts), whole)
    strided = torch.stack([indices, indices], 1)[:, 0]
    assert torch.equal(ops.crop_flip(data, strided, KEY, MEAN, STD), whole)
    assert not torch.equal(ops.crop_flip(data, indices, Key(6), MEAN, STD), whole)


@devices
def test_without_crop_and_flip_it_is_the_loaders_normalisation(device):
    data, indices = images(4, device=device), torch.arange(4, device=device)
    got = ops.crop_flip(data, indices, KEY, MEAN, STD, 0, flip=False)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    assert error(got, to_float(data.permute(0, 3, 1, 2), mean, std)) <= 1e-6


def test_draws_are_uniform():
    """Every shift and both flips, within 5 standard errors; shifts and flip independent."""
    n = 90_000
    top, left, flipped = draw(torch.arange(n), KEY)
    for shift in (top, left):
        counts = (shift + 4).bincount(minlength=9).double()
        assert len(counts) == 9
        assert (counts - n / 9).abs().max() < 5 * (n * 8 / 81) ** 0.5
    assert abs(flipped.double().mean() - 0.5) < 2.5 / n**0.5
    both = ((top + 4) * 18 + (left + 4) * 2 + flipped.long()).bincount(minlength=162).double()
    assert ((both - n / 162).square() / (n / 162)).sum() < 161 + 5 * (2 * 161) ** 0.5


X, INDICES = images(4), torch.arange(4)


@both_paths
@pytest.mark.parametrize(
    ("arguments", "how", "kind", "words"),
    [
        ((X.float(), INDICES, KEY), {}, TypeError, ["images_u8", "torch.float32"]),
        ((X, INDICES.int(), KEY), {}, TypeError, ["indices", "torch.int32"]),
        ((X, [1], KEY), {}, TypeError, ["indices", "list"]),
        ((X, INDICES, 3), {}, TypeError, ["key", "int"]),
        ((X[0], INDICES, KEY), {}, ValueError, ["images_u8", "[8, 8, 3]"]),
        ((X[..., :1], INDICES, KEY), {}, ValueError, ["images_u8", "[4, 8, 8, 1]"]),
        ((X[:0], INDICES, KEY), {}, ValueError, ["images_u8", "non-empty"]),
        ((X[:, ::2], INDICES, KEY), {}, ValueError, ["images_u8", "contiguous"]),
        ((X, INDICES[:0], KEY), {}, ValueError, ["indices", "[0]"]),
        ((X, INDICES.view(2, 2), KEY), {}, ValueError, ["indices", "[2, 2]"]),
        ((X, INDICES + 1, KEY), {}, ValueError, ["indices", "[0, 4)", "4"]),
        ((X, INDICES - 1, KEY), {}, ValueError, ["indices", "-1"]),
        ((X, INDICES.to("meta"), KEY), {}, ValueError, ["one device", "meta"]),
        ((X, INDICES, KEY), {"std": (1, 0, 1)}, ValueError, ["std"]),
        ((X, INDICES, KEY), {"mean": (1, 0)}, ValueError, ["mean"]),
        ((X, INDICES, KEY), {"padding": -1}, ValueError, ["padding", "-1"]),
        ((X, INDICES, KEY), {"padding": 8, "mode": "reflect"}, ValueError, ["padding", "8x8"]),
        ((X, INDICES, KEY), {"mode": "edge"}, ValueError, ["mode", "edge"]),
        ((X, INDICES, KEY), {"dtype": torch.float64}, TypeError, ["dtype", "torch.float64"]),
        (
            (X, INDICES, KEY),
            {"memory_format": torch.preserve_format},
            ValueError,
            ["memory_format", "preserve"],
        ),
    ],
)
def test_errors_name_op_argument_and_value(path, arguments, how, kind, words):
    how = {"mean": MEAN, "std": STD, **how}
    with ops.use(path), pytest.raises(kind) as caught:
        ops.crop_flip(*arguments, **how)
    assert all(word in str(caught.value) for word in ["crop_flip", *words]), caught.value


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
def test_index_outside_gives_nan_on_cuda():
    got = ops.crop_flip(X.cuda(), torch.tensor([0, 4, -1, 2]).cuda(), KEY, MEAN, STD)
    assert got.isnan().flatten(1).all(1).tolist() == [False, True, True, False]


@devices
def test_opcheck(device):
    data, indices = images(4, device=device), torch.arange(3, device=device)
    for channels_last in (True, False):
        torch.library.opcheck(
            torch.ops.kdfast.crop_flip.default,
            (data, indices, MEAN, STD, 2, False, True, torch.float16, channels_last, KEY.signed),
        )


@devices
def test_compile_fullgraph_with_dynamic_batch(device):
    data = images(device=device)

    def step(indices):
        return ops.crop_flip(data, indices, KEY, MEAN, STD).square()

    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            indices = torch.arange(batch, device=device)
            torch._dynamo.mark_dynamic(indices, 0)
            torch.testing.assert_close(compiled(indices), step(indices))


def test_thread_count_does_not_change_a_bit():
    data, indices = images(64, 32, 32), torch.arange(64)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.crop_flip(data, indices, KEY, MEAN, STD))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def _emulated(dtype, format, mode, height=7, width=11):
    def run():
        data, indices = images(6, height, width), torch.tensor([5, 0, 3, 3])
        return [
            ops.crop_flip(data, indices, KEY, MEAN, STD, 3, mode, dtype=dtype, memory_format=format)
        ]

    return run


EMULATED = {
    "crop_flip-float32": (_emulated(torch.float32, torch.channels_last, "zeros"), 1e-30),
    "crop_flip-float16": (_emulated(torch.float16, torch.contiguous_format, "reflect"), 1e-30),
    "crop_flip-bfloat16": (_emulated(torch.bfloat16, torch.channels_last, "reflect"), 1e-30),
    "crop_flip-tiles": (
        _emulated(torch.float32, torch.contiguous_format, "zeros", 33, 35),
        1e-30,
    ),
}
