"""Trans-Net, its orders, and the variance report (specification of knowledge consistency, 7)."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdfast.errors import UserError
from kdfast.metrics import VarianceReport
from kdfast.models import TransNet

EPS = 1e-5


def make(channels=6, layers=3, kernel_size=3, dtype=torch.float64, gates=None, seed=0):
    torch.manual_seed(seed)
    net = TransNet(channels, layers, kernel_size).to(dtype)
    with torch.no_grad():
        net.gate_logits.copy_(torch.randn(layers - 1) if gates is None else torch.tensor(gates))
    return net


def scale(h):
    if h[0, 0].numel() == 1:
        return torch.ones_like(h[:, :, :1, :1])
    return h.detach().flatten(2).std(2)[..., None, None] + EPS


def textbook(net, x):
    """g(x) as the specification writes it, with the hidden maps on the way."""
    x = x if x.ndim == 4 else x[:, :, None, None]
    xt, gates = x / scale(x), net.gate_logits.sigmoid()
    hidden = [net.convs[0](xt)]
    for i, conv in enumerate(net.convs[1:]):
        h = hidden[-1]
        hidden.append(conv(xt + gates[i] * F.relu(h / scale(h))))
    return xt, gates, hidden


def chain(net, x, order):
    """x^(n) by the explicit product of matrices."""
    xt, gates, hidden = textbook(net, x)
    last = len(net.convs) - 1
    part = net.convs[last - order](xt)
    for i in range(last - order, last):
        mask = F.relu(hidden[i] / scale(hidden[i])) > 0
        part = net.convs[i + 1](gates[i] * mask * part / scale(hidden[i]))
    return part.view_as(x)


SHAPES = [(1, 6, 5, 7), (7, 6, 4, 4), (3, 6, 1, 1), (7, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_orders_add_up(shape, layers, dtype, bound):
    net = make(layers=layers, kernel_size=3 if len(shape) == 4 else 1, dtype=dtype)
    x, target = torch.randn(2, *shape, dtype=dtype)
    orders, whole = net.orders(x), net(x)
    assert orders.shape == (layers, *shape) and whole.dtype == dtype
    assert (orders.sum(0) - whole).abs().max() <= bound * whole.abs().max()
    residual = target - whole
    assert (orders.sum(0) + residual - target).abs().max() <= bound * target.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_single_pass_equals_the_chain_of_each_order(shape, layers, dtype, bound):
    net = make(layers=layers, kernel_size=3 if len(shape) == 4 else 1, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    for order, part in enumerate(net.orders(x)):
        wanted = chain(net, x, order)
        assert (part - wanted).abs().max() <= bound * wanted.abs().max().clamp_min(1e-3)


def test_one_pass_has_one_convolution_an_order_and_layer():
    net, ran = make(layers=3), []
    for conv in net.convs:
        conv.register_forward_hook(lambda module, args, out: ran.append(len(args[0])))
    net.orders(torch.randn(4, 6, 3, 3, dtype=torch.float64))
    assert ran == [4, 8, 12]  # 1, 2 and 3 convolutions of four images


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_textbook_formula_with_its_gradients(ops, shape):
    from kdfast import ops as kdops

    before = kdops.active()
    kdops.use(ops)
    try:
        net = make(kernel_size=3 if len(shape) == 4 else 1)
        twin = copy.deepcopy(net)
        x = torch.randn(shape, dtype=torch.float64)
        ours, theirs = net(x), textbook(twin, x)[2][-1].view(shape)
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)
        weight = torch.randn(shape, dtype=torch.float64)
        (ours * weight).sum().backward()
        (theirs * weight).sum().backward()
        for own, other in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(own.grad, other.grad, rtol=1e-9, atol=1e-12)
    finally:
        kdops.use("auto" if before == "fused" else before)


def test_initial_weights_and_gates():
    torch.manual_seed(3)
    for kernel in (3, 1):
        net = TransNet(64, 3, kernel)
        assert net.gates.tolist() == [0.5, 0.5]
        peak = max(conv.weight.abs().max().item() for conv in net.convs)
        assert 0.98 / math.sqrt(9 * 64) < peak <= 1 / math.sqrt(9 * 64)
        assert all(conv.bias is None for conv in net.convs)


def test_closed_gates_leave_the_linear_order_alone():
    net = make(layers=4, gates=[-math.inf] * 3)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    orders = net.orders(x)
    assert (orders[1:] == 0).all()
    wanted = net.convs[-1](x / scale(x))
    assert torch.equal(orders[0], wanted) and torch.equal(net(x), wanted)


def test_one_layer_has_no_gates():
    net = make(layers=1, gates=[])
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    assert net.gates.shape == (0,) and torch.equal(net.orders(x)[0], net(x))


def test_two_pixels():
    net = make(channels=1, layers=2, gates=[0.3])
    gate, w = net.gates.item(), 1.7
    with torch.no_grad():
        for conv, centre in zip(net.convs, (1.0, w), strict=True):
            conv.weight.zero_()
            conv.weight[0, 0, 1, 1] = centre
    r = 1 / (math.sqrt(2) + EPS)
    linear, first = net.orders(torch.tensor([-1.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2))
    assert torch.allclose(linear.flatten(), w * torch.tensor([-r, r], dtype=torch.float64))
    second = r / (math.sqrt(2) * r + EPS)
    wanted = w * gate * torch.tensor([0, second], dtype=torch.float64)
    assert torch.allclose(first.flatten(), wanted, rtol=1e-12)
    assert second == pytest.approx(0.70710, abs=1e-5)


def test_blind_to_scale_but_not_to_a_shift():
    net = make()
    x = torch.randn(5, 6, 6, 6, dtype=torch.float64)
    factors = torch.rand(5, 6, 1, 1, dtype=torch.float64) + 0.5
    same, shifted = net(factors * x), x.clone()
    assert (same - net(x)).abs().max() <= 1e-4 * net(x).abs().max()
    shifted[:, 0] += 1
    assert (net(shifted) - net(x)).abs().max() > 1e-2 * net(x).abs().max()


def test_no_image_depends_on_another():
    net = make()
    x = torch.randn(7, 6, 5, 5, dtype=torch.float64)
    for own in (net, net.orders):
        dim = 0 if own is net else 1
        parts = torch.cat([own(part) for part in x.split([2, 4, 1])], dim)
        assert torch.allclose(own(x), parts, rtol=1e-12, atol=1e-14)


def test_autocast_keeps_scales_and_gates_in_float32():
    net = make(dtype=torch.float32)
    x = 300 * torch.randn(2, 6, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        half, orders = net(x), net.orders(x)
    assert (half - net(x)).abs().max() < 0.05 * net(x).abs().max()
    assert (orders.sum(0) - net(x)).abs().max() < 0.05 * net(x).abs().max()


def test_published_weights_load_by_their_names():
    net = make(channels=4, dtype=torch.float32)
    published = {
        f"linearLayers_conv.{i}.weight": conv.weight.detach() for i, conv in enumerate(net.convs)
    } | {"nonLinearLayers_p_pre": net.gate_logits.detach()[:, None]}
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(TransNet.published(published)(x), net(x))
    vectors = TransNet.published(published, vectors=True)
    assert torch.allclose(vectors(x[:, :, 0, 0]), net(x[:, :, :1, :1])[:, :, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("linearLayers_conv.1.weight"),
        lambda d: d.pop("nonLinearLayers_p_pre"),
        lambda d: d.update({"linearLayers_conv.2.weight": torch.zeros(4, 3, 3, 3)}),
        lambda d: d.clear(),
    ],
)
def test_what_is_no_trans_net_is_refused(change):
    weights = {f"linearLayers_conv.{i}.weight": torch.zeros(4, 4, 3, 3) for i in range(3)}
    weights["nonLinearLayers_p_pre"] = torch.zeros(2)
    change(weights)
    with pytest.raises(UserError, match="no Trans-Net"):
        TransNet.published(weights)


def report_of(orders, target, batches, scope="channel"):
    report, start = VarianceReport(len(orders), scope), 0
    for size in batches:
        report.update(orders[:, start : start + size], target[start : start + size])
        start += size
    return report


@pytest.mark.parametrize("scope", ["channel", "global"])
def test_variances_are_numpys(scope):
    torch.manual_seed(0)
    orders = torch.randn(3, 11, 4, 3, 2) + torch.arange(4.0).view(4, 1, 1)
    target = 2 * torch.randn(11, 4, 3, 2) + 5
    found = report_of(orders, target, [4, 4, 3], scope).compute()
    values = {f"order{n}": part.double().numpy() for n, part in enumerate(orders)}
    values["target"] = target.double().numpy()
    values["output"] = sum(values[f"order{n}"] for n in range(3))
    values["residual"] = values["target"] - values["output"]
    for name, own in values.items():
        wanted = own.var(ddof=0) if scope == "global" else own.var((0, 2, 3)).mean()
        said = found["orders"][int(name[5:])] if name.startswith("order") else found[name]
        assert said == pytest.approx(wanted, rel=1e-10)
        assert np.allclose(found["per_channel"][name], own.var((0, 2, 3)), rtol=1e-10)
        assert np.allclose(found["means"][name], own.mean((0, 2, 3)), rtol=1e-10)
    assert found["relative"]["residual"] == pytest.approx(found["residual"] / found["target"])
    assert (found["images"], found["positions"], found["channels"]) == (11, 6, 4)
    crossed = sum(v for key, v in found["covariances"].items() if "residual" not in key)
    assert found["output"] == pytest.approx(sum(found["orders"]) + 2 * crossed, rel=1e-10)


def test_two_images_two_channels():
    target = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    nothing = torch.zeros(1, 2, 2)
    found = report_of(nothing, target, [2]).compute()
    assert (found["target"], found["residual"], found["constant_channels"]) == (0.5, 0.5, 1)
    assert report_of(nothing, target, [1, 1], "global").compute()["target"] == 16.5


def test_an_uneven_last_batch_counts_by_its_images():
    # Squared deviations 4, 4, 1 and batches of two: the mean of batch means would be 2.5.
    target = torch.tensor([[2.0, -2.0], [-2.0, 2.0], [1.0, -1.0]]).view(3, 1, 2)
    found = report_of(torch.zeros(1, 3, 1, 2), target, [2, 1]).compute()
    assert found["target"] == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize("batches", [[23], [1] * 23, [8, 8, 7], [20, 3]])
def test_batches_and_shards_do_not_change_the_report(batches):
    torch.manual_seed(1)
    orders = torch.randn(2, 23, 5, 4, 4) * 1e-3 + 100
    target = orders.sum(0) + 1e-3 * torch.randn(23, 5, 4, 4)
    wanted = report_of(orders, target, [10, 13]).compute()
    whole = report_of(orders, target, batches)
    shards = [report_of(orders[:, r::3], target[r::3], [4, 4]) for r in range(3)]
    merged = VarianceReport(2)
    for shard in [*shards, VarianceReport(2)]:
        merged.merge(shard)
    for found in (whole.compute(), merged.compute()):
        for name in ("residual", "target", "output"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-10)
        assert found["orders"] == pytest.approx(wanted["orders"], rel=1e-10)


def test_misuse_of_a_report_is_refused():
    report = VarianceReport(2)
    with pytest.raises(UserError, match="no image"):
        report.compute()
    with pytest.raises(ValueError, match="same sizes"):
        report.update(torch.zeros(3, 1, 2), torch.zeros(1, 2))
    report.update(torch.zeros(2, 1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="came after"):
        report.update(torch.zeros(2, 1, 3), torch.zeros(1, 3))
    assert math.isnan(report.compute()["relative"]["residual"])
    orders = torch.zeros(2, 1, 2)
    orders[1] = math.inf
    report.update(orders, torch.zeros(1, 2))
    with pytest.raises(UserError, match=r"^order1 .* not finite .*--lr.*layer of A"):
        report.compute()
    report = VarianceReport(2)
    report.update(torch.zeros(2, 1, 2), torch.full((1, 2), math.nan))
    with pytest.raises(UserError, match=r"^the target, B's feature, is not finite .*layer of B"):
        report.compute()
