"""Philox, standard_normal and sigma_noise: published vectors, the double twin, splits, moments."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DEVICES, LAYOUTS, TOLERANCE, Calls, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kdfast import ops
from kdfast.ops import Key, reference
from kdfast.ops.reference.philox import counter_of, philox, uniform

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])
KEY = Key(7, "test")
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def fused():
    """The fused path or an error: a missing library must not pass as the twin."""
    with ops.use("fused"):
        yield


class RawKey(Key):
    """A key of chosen bits."""

    def __init__(self, value: int):
        super().__init__(0)
        self.value = value


# (counter, key, words): the known-answer vectors of the paper's library for Philox4x32-10.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), VECTORS)
def test_philox_known_answers(counter, key, want):
    words = [torch.tensor([word]) for word in counter]
    value = key[0] | key[1] << 32
    for signed in (value, value - (1 << 64) if value >> 63 else value):
        assert [int(word) for word in philox(signed, tuple(words))] == list(want)
    block, low, high, sample = counter
    id = low | high << 32
    id -= 1 << 64 if id >> 63 else 0
    again = counter_of(*(torch.tensor([x]) for x in (block, id, sample)))
    assert [int(word) for word in philox(value, again)] == list(want)


def double_normals(key: Key, block: int, id: int, sample: int) -> list[float]:
    """The four normals of a counter, in Python's floats."""
    counter = counter_of(*(torch.tensor([x]) for x in (block, id, sample)))
    words = [int(word) for word in philox(key.value, counter)]
    normals = []
    for radius, angle in (words[:2], words[2:]):
        u = float(torch.tensor(radius >> 1).float() + 0.5) * 2.0**-31
        f = (angle & 0x3FFFFFFF) / 2**30
        f = f - 1 if f >= 0.5 else f
        r = math.sqrt(-2 * math.log(u))
        c, s = r * math.cos(math.pi / 2 * f), r * math.sin(math.pi / 2 * f)
        c = -c if angle >> 31 else c
        normals += [s, c] if angle >> 30 & 1 else [c, s]
    return normals


@devices
@both_paths
@pytest.mark.parametrize(("counter", "key", "_want"), VECTORS)
def test_normals_of_the_known_answers(counter, key, _want, path, device):
    """The first block of a row has counter (0, id, sample); the two other words are free."""
    _, low, high, sample = counter
    id = low | high << 32
    id -= 1 << 64 if id >> 63 else 0
    with ops.use(path):
        raw, ids = RawKey(key[0] | key[1] << 32), torch.tensor([id], device=device)
        got = ops.standard_normal(raw, (1, 1, 4), ids, first_sample=sample)
    assert got.flatten().tolist() == pytest.approx(double_normals(raw, 0, id, sample), abs=1e-6)


SHAPES = [(1, 1), (3, 2, 1), (2, 5, 3), (1, 3, 4, 65), (4, 2, 3, 17, 19), (2, 3, 2049)]


@devices
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normals_match_the_double_twin(shape, device):
    got = ops.standard_normal(KEY, shape, device=device)
    want = reference.standard_normal(KEY, shape, device=device, dtype=torch.float64)
    assert got.shape == shape and got.dtype == torch.float32 and got.device.type == device
    assert (got - want).abs().max() <= 1e-6
    assert torch.equal(got.cpu(), ops.standard_normal(KEY, shape))
    ids = torch.tensor([2**40 + 5, -3, 0, 9][: shape[0]], device=device)
    got = ops.standard_normal(KEY, shape, ids, first_sample=2**32 - shape[1])
    want = reference.standard_normal(KEY, shape, ids, first_sample=2**32 - shape[1])
    assert (got - want).abs().max() <= 1e-6
    for dtype in (torch.float64, *HALF):
        other = ops.standard_normal(KEY, shape, ids, 2**32 - shape[1], dtype=dtype)
        assert other.dtype == dtype and torch.equal(other, got.to(dtype))


@devices
def test_any_split_gives_the_same_bits(device):
    shape = (4, 6, 3, 5, 7)
    whole = ops.standard_normal(KEY, shape, device=device)
    ids = torch.tensor([2, 0, 3], device=device)
    part = ops.standard_normal(KEY, (3, 2, 3, 5, 7), ids, first_sample=3)
    assert torch.equal(part, whole[ids, 3:5])
    longer = ops.standard_normal(KEY, (4, 6, 11, 13), device=device)
    assert torch.equal(longer.flatten(2)[..., :105], whole.flatten(2))
    strided = torch.tensor([[2, 9], [0, 9], [3, 9]], device=device)[:, 0]
    assert torch.equal(ops.standard_normal(KEY, (3, 2, 3, 5, 7), strided, 3), part)


@pytest.mark.parametrize("elements", [1, 255, 256, 257, 4099])
@pytest.mark.parametrize("loop", ["default", "avx2", "avx512f"])
def test_vector_widths_give_the_same_bits(loop, elements):
    like = torch.empty(0)
    got = torch.ops.kdfast.standard_normal_loop(like, loop, elements, 2**35 + 1, 3, KEY.signed)
    if not got.numel():
        pytest.skip(f"this CPU has no {loop}")
    ids = torch.tensor([2**35 + 1])
    want = ops.standard_normal(KEY, (1, 1, elements), ids, first_sample=3).flatten()
    assert torch.equal(got, want)


def test_extreme_words():
    """The ends of the radius; what is drawn stays within them."""
    u = torch.tensor([0, 2**31 - 1]).float() + 0.5
    assert (-2 * (u.double() * 2.0**-31).log()).sqrt().tolist() == pytest.approx([6.66044, 0])
    assert ops.standard_normal(KEY, (1, 64, 65536)).abs().max() < 6.67


@devices
def test_moments_and_independence(device):
    """Mean, variance and kurtosis within 4 standard errors; keys, samples, ids uncorrelated."""
    x = ops.standard_normal(KEY, (4, 8, 3, 128, 128), device=device).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(x.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((x.abs() < 1).double().mean() - 0.6826895) < 4 * (0.2166 / n) ** 0.5
    other = ops.standard_normal(Key(8, "test"), x.shape, device=device).double()
    pairs = [(x, other), (x[1:], x[:-1]), (x[:, 1:], x[:, :-1])]
    flat = x.flatten()
    pairs += [(flat[lag:], flat[:-lag]) for lag in (1, 2, 3, 4)]
    pairs += [(flat[1:].square() - 1, flat[:-1].square() - 1)]
    for a, b in pairs:
        spread = a.std() * b.std() / a.numel() ** 0.5
        assert abs((a * b).mean()) < 4.5 * spread


def test_uniform_is_exact():
    bits = torch.tensor([0, 255, 256, 2**32 - 1])
    assert uniform(bits).tolist() == [0, 0, 2.0**-24, 1 - 2.0**-24]


# sigma_noise.


def make(shape, grid, dtype=torch.float32, layout="nchw", device="cpu", sigma_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator, dtype=torch.float64)
    sigma = torch.rand((shape[0], 1, grid, grid), generator=generator, dtype=torch.float64) + 0.1
    image = LAYOUTS[layout](image.to(device, dtype)).detach().requires_grad_()
    return image, sigma.to(device, sigma_dtype or dtype).requires_grad_()


CASES = [
    ((1, 1, 1, 1), 1, 1, {}),
    ((2, 3, 5, 7), 5, 3, {}),
    ((2, 3, 16, 16), 16, 4, {}),
    ((1, 3, 37, 29), 8, 20, {}),
    ((3, 2, 9, 31), 2, 17, {}),
    ((1, 3, 32, 33), 16, 33, {}),
    *(((2, 3, 6, 10), 4, 3, {"layout": layout}) for layout in LAYOUTS if layout != "nchw"),
    *(((2, 3, 11, 6), 3, 5, {"dtype": dtype}) for dtype in (torch.float64, *HALF)),
    *(((2, 3, 8, 12), 4, 5, {"dtype": dtype}) for dtype in (torch.float64, *HALF)),
    ((2, 3, 8, 8), 4, 3, {"dtype": torch.bfloat16, "sigma_dtype": torch.float32}),
    ((2, 3, 8, 8), 4, 3, {"dtype": torch.float32, "sigma_dtype": torch.float64}),
    ((2, 3, 8, 8), 4, 3, {"dtype": torch.float32, "sigma_dtype": torch.float16}),
]


@devices
@pytest.mark.parametrize(("shape", "grid", "samples", "how"), CASES)
def test_sigma_noise_matches_the_double_twin(shape, grid, samples, how, device):
    image, sigma = make(shape, grid, device=device, **how)
    ids = torch.arange(shape[0], device=device) + 2**33
    got = ops.sigma_noise(image, sigma, samples, KEY, ids, 5)
    exact = [x.detach().double().requires_grad_() for x in (image, sigma)]
    want = reference.sigma_noise(*exact, samples, KEY, ids, 5)
    double = torch.float64 in (image.dtype, sigma.dtype)
    assert got.dtype == (torch.float64 if double else image.dtype)
    assert got.shape == (shape[0], samples, *shape[1:]) and got.is_contiguous()
    # The float64 twin's numbers are rounded to float32 as the op's are, but its polynomials' last
    # bits are not.
    assert error(got, want) <= max(1e-6, TOLERANCE[got.dtype][1] if got.dtype in HALF else 0)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(got)
    gradients = torch.autograd.grad(got, (image, sigma), upstream)
    wanted = torch.autograd.grad(want, exact, upstream.double())
    for gradient, exact_gradient, x in zip(gradients, wanted, (image, sigma), strict=True):
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
        assert error(gradient, exact_gradient) <= max(1e-5, TOLERANCE[x.dtype][1])


@devices
@both_paths
def test_check_6_eps_is_standard_normal_and_autograd_on_it_agrees(path, device):
    """Check 6 of the sigma specification: the dumped eps, 227 pixels on 16 cells."""
    image, sigma = make((1, 3, 227, 30), 16, device=device)
    samples = 3
    with ops.use(path):
        got = ops.sigma_noise(image, sigma, samples, KEY)
        eps = ops.standard_normal(KEY, (1, samples, 3, 227, 30), device=device)
    up = F.interpolate(sigma, size=(227, 30), mode="nearest").unsqueeze(1)
    want = image.unsqueeze(1) + up * eps
    assert error(got, want) <= 1e-6
    if path == "fused":
        assert torch.equal(got, want)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(device)
    for a, b in zip(
        torch.autograd.grad(got, (image, sigma), upstream),
        torch.autograd.grad(want, (image, sigma), upstream),
        strict=True,
    ):
        assert error(a, b) <= 1e-5

    # Cell widths at 227: 15 for cells 0, 5 and 10, else 14.
    steps = torch.arange(256.0, device=device).view(1, 1, 16, 16)
    flat = reference.up_sample(steps, 227, 227)[0, 0]
    widths = [15 if cell in (0, 5, 10) else 14 for cell in range(16)]
    assert flat[0].long().bincount().tolist() == widths
    assert (flat[:, 0].long() // 16).bincount().tolist() == widths
    ones = torch.ones(1, 1, 227, 227, device=device)
    with ops.use(path):
        zero = ops.sigma_noise(ones * 0, steps, 1, KEY)
        assert torch.equal(zero[0, 0, 0] == 0, flat == 0)
        # All channels of a pixel have one sigma and different eps.
        noise = ops.sigma_noise(torch.zeros(1, 2, 227, 227, device=device), steps, 1, KEY)[0, 0]
    assert torch.equal(noise[0] == 0, noise[1] == 0) and not torch.equal(noise[0], noise[1])


@devices
@pytest.mark.parametrize(("size", "grid"), [(227, 16), (224, 16), (32, 16), (33, 7), (64, 5)])
def test_cells_are_those_of_torchs_nearest(size, grid, device):
    sigma = torch.rand(1, 1, grid, grid, device=device)
    want = F.interpolate(sigma, size=(size, size + 1), mode="nearest")
    assert torch.equal(reference.up_sample(sigma, size, size + 1), want)
    eps = ops.standard_normal(KEY, (1, 1, 1, size, size + 1), device=device)
    image = torch.zeros(1, 1, size, size + 1, device=device)
    got = ops.sigma_noise(image, sigma, 1, KEY)
    assert torch.equal(got, 0 + want.unsqueeze(1) * eps)


@devices
def test_splits_of_images_and_samples(device):
    image, sigma = make((3, 3, 17, 20), 6, device=device)
    whole = ops.sigma_noise(image, sigma, 8, KEY)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(device)
    gradient = torch.autograd.grad(whole, sigma, upstream)[0]
    parts = torch.zeros_like(gradient)
    for n in range(3):
        ids = torch.tensor([n], device=device)
        for first, count in ((0, 5), (5, 3)):
            own = sigma[n : n + 1].detach().requires_grad_()
            part = ops.sigma_noise(image[n : n + 1].detach(), own, count, KEY, ids, first)
            assert torch.equal(part, whole[n : n + 1, first : first + count])
            piece = upstream[n : n + 1, first : first + count]
            parts[n : n + 1] += torch.autograd.grad(part, own, piece)[0]
    assert error(parts, gradient) <= 1e-6
    again = ops.sigma_noise(image, sigma, 8, KEY)
    assert torch.equal(again, whole)
    assert torch.equal(torch.autograd.grad(again, sigma, upstream)[0], gradient)


@devices
def test_only_needed_gradients_are_computed_and_nothing_large_is_kept(device):
    image, sigma = make((2, 3, 8, 8), 4, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        ops.sigma_noise(image, sigma, 4, KEY)
        ops.sigma_noise(image, sigma, 4, KEY, torch.arange(2, device=device))
    assert [x.dtype for x in kept] == [torch.int64]
    with Calls() as calls:
        ops.sigma_noise(image.detach(), sigma, 4, KEY).sum().backward()
    assert [result[0].numel() for name, result in calls if "noise_backward" in name] == [0]
    with Calls() as calls:
        ops.sigma_noise(image, sigma.detach(), 4, KEY).sum().backward()
    assert not [name for name, _ in calls if "noise_backward" in name]
    assert torch.equal(image.grad, torch.full_like(image, 4))


X, S = torch.ones(2, 3, 8, 8), torch.ones(2, 1, 4, 4)
IDS = torch.arange(2)


@both_paths
@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((X[0], S, 2, KEY), ValueError, ["image", "[N, C, H, W]", "[3, 8, 8]"]),
        ((X[:0], S, 2, KEY), ValueError, ["image", "non-empty"]),
        ((X.int(), S, 2, KEY), TypeError, ["image", "torch.int32"]),
        ((X, S.long(), 2, KEY), TypeError, ["sigma", "torch.int64"]),
        ((X, S[:1], 2, KEY), ValueError, ["sigma", "[N, 1, G, G]", "[1, 1, 4, 4]"]),
        ((X, S[..., :3], 2, KEY), ValueError, ["sigma", "[2, 1, 4, 3]"]),
        ((X, S.expand(2, 3, 4, 4), 2, KEY), ValueError, ["sigma", "[2, 3, 4, 4]"]),
        ((X, torch.ones(2, 1, 9, 9), 2, KEY), ValueError, ["sigma", "9 cells", "8x8"]),
        (
            (X[:1, :1, :1, :1].expand(1, 1, 1, 65536), S[:1, :, :1, :1], 2, KEY),
            ValueError,
            ["1x65536"],
        ),
        ((X, S.to("meta"), 2, KEY), ValueError, ["one device", "meta"]),
        ((X, S, 0, KEY), ValueError, ["samples", "0"]),
        ((X, S, 2, 5), TypeError, ["key", "int"]),
        ((X, S, 2, KEY, IDS[:1]), ValueError, ["ids", "N = 2", "[1]"]),
        ((X, S, 2, KEY, IDS.int()), TypeError, ["ids", "torch.int32"]),
        ((X, S, 2, KEY, [0, 1]), TypeError, ["ids", "list"]),
        ((X, S, 2, KEY, IDS, -1), ValueError, ["first_sample", "-1"]),
        ((X, S, 2, KEY, IDS, 2**32 - 1), ValueError, ["first_sample", "2 samples"]),
    ],
)
def test_sigma_noise_errors(path, arguments, kind, words):
    with ops.use(path), pytest.raises(kind) as caught:
        ops.sigma_noise(*arguments)
    assert all(word in str(caught.value) for word in ["sigma_noise", *words]), caught.value


@both_paths
@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((KEY, (3,)), ValueError, ["shape", "[3]"]),
        ((KEY, (3, 0, 2)), ValueError, ["shape", "[3, 0, 2]"]),
        ((5, (3, 2)), TypeError, ["key", "int"]),
        ((KEY, (2, 2), IDS[:1]), ValueError, ["ids", "[1]"]),
        ((KEY, (2, 2), IDS, 0, "meta"), ValueError, ["cpu", "meta"]),
        ((KEY, (2, 2), None, 0, None, torch.int32), TypeError, ["dtype", "torch.int32"]),
        ((KEY, (2, 2), None, -1), ValueError, ["first_sample", "-1"]),
        ((KEY, (1, 1, 2**34 + 1)), ValueError, ["2^34"]),
    ],
)
def test_standard_normal_errors(path, arguments, kind, words):
    with ops.use(path), pytest.raises(kind) as caught:
        ops.standard_normal(*arguments)
    assert all(word in str(caught.value) for word in ["standard_normal", *words]), caught.value


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype, device):
    library, ids = torch.ops.kdfast, torch.arange(2, device=device)
    torch.library.opcheck(library.standard_normal.default, (ids, 3, 10, 1, KEY.signed, dtype))
    image, sigma = make((2, 3, 5, 7), 3, dtype, device=device)
    if dtype == torch.bfloat16:
        sigma = sigma.detach().float().requires_grad_()
    for own in (None, ids):
        arguments = (image, sigma, own, 4, 1, KEY.signed)
        torch.library.opcheck(library.sigma_noise.default, arguments)
        grad = torch.ones(2, 4, 3, 5, 7, dtype=dtype, device=device)
        for want in (True, False):
            arguments = (grad, own, 1, KEY.signed, 3, want)
            torch.library.opcheck(library.sigma_noise_backward.default, arguments)


@devices
def test_gradcheck(device):
    image, sigma = make((2, 2, 5, 4), 3, torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda x, s: ops.sigma_noise(x, s, 3, KEY), (image, sigma))


@devices
def test_second_derivative_is_refused(device):
    image, sigma = make((1, 2, 5, 4), 3, device=device)
    value = ops.sigma_noise(image, sigma, 3, KEY).square().sum()
    gradient = torch.autograd.grad(value, sigma, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="sigma_noise can be differentiated once"):
        gradient.sum().backward()


@devices
def test_compile_fullgraph_with_dynamic_batch(device):
    def step(image, sigma):
        noise = ops.standard_normal(KEY, (image.shape[0], 2, 5), device=image.device)
        return ops.sigma_noise(image, sigma, 4, KEY).square().sum() + noise.sum()

    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            image, sigma = make((batch, 3, 8, 8), 4, device=device)
            for x in (image, sigma):
                torch._dynamo.mark_dynamic(x, 0)
            loss, want = compiled(image, sigma), step(image, sigma)
            torch.testing.assert_close(loss, want)
            got, want = (torch.autograd.grad(x, sigma)[0] for x in (loss, want))
            torch.testing.assert_close(got, want)


@devices
def test_autocast_and_inference_mode(device):
    image, sigma = make((2, 3, 8, 8), 4, device=device)
    want = ops.sigma_noise(image, sigma, 4, KEY).detach()
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ops.sigma_noise(image, sigma, 4, KEY), want)
    with torch.inference_mode():
        got = ops.sigma_noise(image, sigma, 4, KEY)
    assert torch.equal(got, want) and got.is_inference() and not got.requires_grad


@pytest.mark.parametrize(("shape", "samples"), [((1, 3, 40, 40), 37), ((2, 3, 200, 200), 40)])
def test_thread_count_does_not_change_a_bit(shape, samples):
    """The larger one is written past the caches and its memory used again."""
    image, sigma = make(shape, 16)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            noisy = ops.sigma_noise(image, sigma, samples, KEY)
            normal = ops.standard_normal(KEY, noisy.shape)
            gradients = torch.autograd.grad(noisy, (image, sigma), normal)
            results.append([noisy.detach(), normal, *gradients])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    up = reference.up_sample(sigma, *shape[2:]).unsqueeze(1)
    assert torch.equal(results[0][0], (image.unsqueeze(1) + up * results[0][1]).detach())


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(*(st.integers(1, 9) for _ in range(4))),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 5),
)
def test_laws(shape, grid, samples, id, first):
    """Linear in (image, sigma); the gradient is the adjoint: <dx, g_x> + <ds, g_s> = <dout, g>."""
    grid = min(grid, *shape[2:])
    ids = torch.full((shape[0],), id)
    image, sigma = make(shape, grid, torch.float64)

    def noisy(image, sigma):
        return ops.sigma_noise(image, sigma, samples, KEY, ids, first)

    out = noisy(image, sigma)
    torch.testing.assert_close(noisy(image * 2, sigma * 2), out * 2, rtol=0, atol=0)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    d_image, d_sigma = torch.autograd.grad(out, (image, sigma), grad)
    both = (d_image * image).sum() + (d_sigma * sigma).sum()
    torch.testing.assert_close(both, (out * grad).sum(), rtol=1e-9, atol=1e-9)


def _emulated(shape, grid, samples, **how):
    def run():
        image, sigma = make(shape, grid, **how)
        ids = torch.arange(shape[0]) * 2**33 - 5
        out = ops.sigma_noise(image, sigma, samples, KEY, ids, 3)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        both = torch.autograd.grad(out, (image, sigma), grad)
        alone = ops.sigma_noise(image.detach(), sigma, samples, KEY)
        return [*both, *torch.autograd.grad(alone, sigma, grad)]

    return run


def _emulated_exact(dtype, shape=(2, 11, 3, 5, 7)):
    def run():
        ids = torch.tensor([2**40, -9])
        image, sigma = make((2, *shape[2:]), 4, dtype)
        return [
            ops.standard_normal(KEY, shape, ids, 2, dtype=dtype),
            ops.sigma_noise(image, sigma, shape[1], KEY, ids).detach(),
        ]

    return run


EMULATED = {
    **{
        f"noise-bits-{dtype}".replace("torch.", ""): (_emulated_exact(dtype), 1e-30)
        for dtype in (torch.float32, torch.float64, *HALF)
    },
    "noise-bits-packs": (_emulated_exact(torch.float32, (2, 9, 3, 6, 10)), 1e-30),
    "sigma_noise-float32": _emulated((2, 3, 6, 7), 4, 11),
    "sigma_noise-float64": _emulated((1, 3, 8, 6), 5, 5, dtype=torch.float64),
    "sigma_noise-float16": _emulated((2, 2, 6, 6), 3, 5, dtype=torch.float16),
    "sigma_noise-bfloat16": _emulated((1, 3, 5, 9), 5, 5, dtype=torch.bfloat16),
}
