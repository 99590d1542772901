"""gated_relu: hand values, the float64 twin, layouts, torch's machinery."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DEVICES, LAYOUTS, TOLERANCE, Calls, as_double, error
from torch import Tensor

from kdfast import ops
from kdfast.ops import reference

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])


@pytest.fixture(autouse=True)
def fused():
    """The fused path or an error: a missing library must not pass as the twin."""
    with ops.use("fused"):
        yield


def make(shape, dtype=torch.float32, layout="nchw", device="cpu", seed=0) -> list[Tensor]:
    """x, hidden and the gate; all require gradients."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(shape, generator=generator) + 0.3 for _ in range(2)]
    maps = [x.to(device, dtype) for x in maps]
    if len(shape) == 4:
        maps = [LAYOUTS[layout](x) for x in maps]
    gate = torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return [x.detach().requires_grad_() for x in (*maps, gate)]


def results(op, inputs: list[Tensor]) -> list[Tensor]:
    """The result and all gradients."""
    out = op(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    grad = grad.bfloat16().to(out)  # the same in every dtype
    return [out, *torch.autograd.grad(out, inputs, grad)]


CASES = [
    ((1, 1, 1, 1), torch.float32, "nchw"),
    ((1, 7, 5, 5), torch.float32, "nchw"),
    ((2, 5, 1, 2), torch.float32, "nchw"),
    ((3, 600), torch.float32, "nchw"),
    ((2, 9, 1, 1), torch.float32, "channels_last"),
    ((2, 64, 14, 14), torch.float32, "nchw"),
    ((2, 3, 56, 56), torch.float32, "nchw"),
    ((2, 200, 14, 14), torch.float32, "channels_last"),
    ((1, 3, 56, 56), torch.float32, "channels_last"),
    *(((3, 12, 6, 4), torch.float32, layout) for layout in LAYOUTS),
    *(
        (shape, dtype, layout)
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
        for shape, layout in (
            ((2, 7, 5, 5), "nchw"),
            ((2, 33, 8, 8), "channels_last"),
            ((2, 16, 4, 4), "nchw"),
            ((5, 9), "nchw"),
        )
    ),
]


@devices
@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES, ids=str)
def test_matches_double_twin(shape, dtype, layout, device):
    inputs = make(shape, dtype, layout, device)
    got, want = results(ops.gated_relu, inputs), results(reference.gated_relu, as_double(*inputs))
    assert got[0].dtype == dtype and got[0].shape == shape
    # Stored results are rounded once, like gradients.
    whole = dtype in (torch.float32, torch.float64)
    assert error(got[0], want[0]) <= TOLERANCE[dtype][0 if whole else 1]
    for gradient, exact, source in zip(got[1:3], want[1:3], inputs, strict=False):
        assert gradient.dtype == dtype and gradient.shape == source.shape
        assert error(gradient, exact) <= TOLERANCE[dtype][1]
    assert got[3].dtype == inputs[2].dtype and got[3].shape == ()
    assert error(got[3], want[3]) <= TOLERANCE[inputs[2].dtype][1]


@devices
@both_paths
def test_two_pixels(device, path):
    """Check 4 of the specification: order 1 of a Trans-Net whose convolutions are factors."""
    h = torch.tensor([-1.0, 1.0], device=device).view(1, 1, 1, 2)
    zero, p = torch.zeros_like(h), torch.tensor(0.5, device=device)
    with ops.use(path):
        x = h / (math.sqrt(2) + 1e-5)
        r = 1 / (math.sqrt(2) + 1e-5)
        got = ops.gated_relu(zero, x, p).flatten().tolist()
        assert got == pytest.approx([0, 0.5 * r / (math.sqrt(2) * r + 1e-5)], rel=1e-6)
        assert got[1] == pytest.approx(0.5 * 0.70710, rel=1e-4)


@devices
@both_paths
def test_one_position_has_scale_one(device, path):
    x, h, p = (tensor.detach() for tensor in make((5, 33), device=device))
    with ops.use(path):
        out = ops.gated_relu(x, h, p)
        assert torch.equal(out, x + p * h.relu())
        square = ops.gated_relu(x[:, :, None, None], h[:, :, None, None], p)
        assert torch.equal(square[:, :, 0, 0], out)
        closed = ops.gated_relu(x, h, torch.zeros(1, device=device))
        assert torch.equal(closed, x)


@devices
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_constant_channels_have_scale_epsilon(layout, device):
    h = torch.tensor([3.3, 1000.1, -0.7, 0.0], device=device).view(1, 4, 1, 1).expand(2, 4, 14, 14)
    h = LAYOUTS[layout](h.contiguous())
    out = ops.gated_relu(torch.zeros_like(h), h, torch.ones((), device=device))
    torch.testing.assert_close(
        out[0, :, 0, 0].cpu() * 1e-5, h[0, :, 0, 0].relu().cpu(), rtol=1e-4, atol=0
    )


@devices
def test_scale_blindness_of_the_hidden_map(device):
    x, h, p = (tensor.detach() for tensor in make((2, 6, 9, 9), torch.float64, device=device))
    factors = torch.rand(2, 6, 1, 1, dtype=torch.float64, device=device) + 0.5
    out = ops.gated_relu(x, h, p)
    assert error(ops.gated_relu(x, factors * h, p) - x, out - x) < 1e-4
    assert error(ops.gated_relu(x, h + 1, p), out) > 1e-2


@devices
def test_layouts_and_dtypes_may_differ(device):
    x, h, p = make((2, 6, 4, 4), device=device)
    want = ops.gated_relu(x, h, p)
    other = h.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    got = ops.gated_relu(x, other, p)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(want.square().sum(), (x, h, p)),
        torch.autograd.grad(got.square().sum(), (x, other, p)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    half = h.detach().bfloat16().requires_grad_()
    out = ops.gated_relu(x, half, p)
    assert out.dtype == torch.float32
    assert torch.autograd.grad(out.sum(), half)[0].dtype == torch.bfloat16


@devices
def test_gradient_of_x_is_the_incoming_one(device):
    x, h, p = make((2, 6, 4, 4), device=device)
    with Calls() as calls:
        ops.gated_relu(x, h.detach(), p.detach()).sum().backward()
    assert not any("gated_relu_backward" in name for name, _ in calls)
    assert torch.equal(x.grad, torch.ones_like(x))


X, P = torch.ones(2, 3, 4, 4), torch.tensor(0.5)


@both_paths
@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((X[0], X[0], P), ValueError, ["x", "[3, 4, 4]"]),
        ((X[:0], X[:0], P), ValueError, ["non-empty"]),
        ((X, X[:1], P), ValueError, ["one shape", "[2, 3, 4, 4]", "[1, 3, 4, 4]"]),
        ((X, X.long(), P), TypeError, ["hidden", "int64"]),
        ((X, X, 0.5), TypeError, ["gate", "float"]),
        ((X, X, torch.ones(2)), ValueError, ["gate", "one element", "[2]"]),
        ((X, X.to("meta"), P), ValueError, ["one device", "meta"]),
    ],
)
def test_errors_name_op_argument_and_value(path, arguments, kind, words):
    with ops.use(path), pytest.raises(kind) as caught:
        ops.gated_relu(*arguments)
    assert all(word in str(caught.value) for word in ["gated_relu", *words]), caught.value


@devices
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((1, 7, 5, 5), torch.float32, "nchw"),
        ((2, 6, 4, 4), torch.float64, "channels_last"),
        ((2, 6, 1, 1), torch.bfloat16, "nchw"),
    ],
)
def test_opcheck(shape, dtype, layout, device):
    x, h, p = make(shape, dtype, layout, device)
    library = torch.ops.kdfast
    torch.library.opcheck(library.gated_relu.default, (x, h, p))
    out, scale = library.gated_relu(x.detach(), h.detach(), p.detach())
    arguments = (out, h.detach(), p.detach(), scale)
    torch.library.opcheck(library.gated_relu_backward.default, arguments)


@devices
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (3, 4)])
def test_gradcheck(shape, device):
    """At one position, where the scale is no function of the hidden map."""
    inputs = make(shape, torch.float64, device=device)
    assert torch.autograd.gradcheck(ops.gated_relu, inputs)


@devices
def test_second_derivative_is_refused(device):
    x, h, p = make((2, 3, 4, 4), device=device)
    out = ops.gated_relu(x, h, p).square().sum()
    gradient = torch.autograd.grad(out, h, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="gated_relu can be differentiated once"):
        gradient.sum().backward()


@devices
def test_compile_fullgraph_with_dynamic_batch(device):
    compiled = torch.compile(ops.gated_relu, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            inputs = make((batch, 4, 6, 6), device=device, seed=batch)
            for tensor in inputs[:2]:
                torch._dynamo.mark_dynamic(tensor, 0)
            for a, b in zip(
                results(compiled, inputs), results(ops.gated_relu, inputs), strict=True
            ):
                torch.testing.assert_close(a, b)


@devices
def test_autocast_and_inference_mode(device):
    conv = torch.nn.Conv2d(3, 3, 3, padding=1).to(device)
    x, _, p = make((2, 3, 8, 8), device=device)
    with torch.autocast(device, torch.bfloat16):
        out = ops.gated_relu(x, conv(x), p)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert conv.weight.grad.any() and p.grad != 0
    with torch.inference_mode():
        assert ops.gated_relu(x, x, p).is_inference()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_thread_count_does_not_change_a_bit(layout):
    inputs = make((9, 140, 14, 14), layout=layout)
    got, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got.append(results(ops.gated_relu, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in got[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got[0], other, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(16, 512, 24, 24), (8, 509, 37, 31)])
def test_large_maps_are_streamed(shape, layout):
    inputs = make(shape, layout=layout)
    got, want = results(ops.gated_relu, inputs), results(reference.gated_relu, inputs)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) <= 1e-5


def _emulated(shape, dtype=torch.float32, layout="nchw"):
    return lambda: results(ops.gated_relu, make(shape, dtype, layout))


EMULATED = {
    "gated_relu-rows": _emulated((2, 7, 5, 5)),
    "gated_relu-packs": _emulated((2, 9, 12, 12)),
    "gated_relu-channels": _emulated((2, 40, 5, 5), layout="channels_last"),
    "gated_relu-one-position": _emulated((3, 70)),
    "gated_relu-float64": _emulated((2, 7, 4, 4), torch.float64),
    "gated_relu-channels-float64": _emulated((2, 7, 4, 4), torch.float64, "channels_last"),
    "gated_relu-bfloat16": _emulated((2, 6, 4, 6), torch.bfloat16),
    "gated_relu-float16": _emulated((2, 33, 3, 3), torch.float16, "channels_last"),
}
