"""Batch normalisation folded into convolutions: equal outputs, what is left alone, refusals."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune

from kdfast.errors import UsageError
from kdfast.models import Taps, create_model, find_layer, fold_batch_norms, split_at
from kdfast.models.activated_conv import ActivatedConv2d


def trained(network: nn.Module, seed: int = 0) -> nn.Module:
    """`network` for evaluation with normalisations that do something."""
    draw = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.3, generator=draw)
                module.running_var.uniform_(0.5, 2, generator=draw)
            if module.weight is not None:
                module.weight.data.uniform_(-1, 1.5, generator=draw)
                module.bias.data.normal_(0, 0.3, generator=draw)
    return network.eval().requires_grad_(False)


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def images(side: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def results(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the gradient of their squares with respect to the input."""
    x = x.clone().requires_grad_()
    logits = network(x)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


def assert_same(a: nn.Module, b: nn.Module, x: torch.Tensor, tolerance: float) -> None:
    for one, other in zip(results(a, x), results(b, x), strict=True):
        assert one.abs().max() > 0
        assert float((one - other).abs().max()) <= tolerance * float(one.abs().max())


NETWORKS = [
    ("cifar_resnet8", 0),
    ("cifar_vgg8", 0),
    ("cifar_shufflenetv2", 0),
    ("headed_resnet18", 0),
    ("resnet18", 0),
    ("mobilenetv2_100", 0),
    ("efficientnet_b0", 0),
    ("densenet121", 62),  # the first of two in each layer, of transitions, and the last
    ("vgg11_bn", 0),
    ("repvgg_a0", 17),  # beside convolutions, of the input itself
]


@pytest.mark.parametrize("name, left", NETWORKS)
def test_outputs_and_gradients_are_those_of_the_network(name, left):
    torch.manual_seed(0)
    kwargs = {"width": 16} if name == "headed_resnet18" else {}
    if name == "vgg11_bn":
        network = timm.create_model(name, num_classes=3)
        network.pre_logits, network.head = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    else:
        network = create_model(name, 3, **kwargs)
    network = trained(network)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    modules = [type(module) for module in network.modules()]
    folded = fold_batch_norms(network, images(count=1))
    assert norms(network) > 0 and norms(folded) == left
    assert_same(network, folded, images(), 1e-5)
    # The network is as it was and shares nothing with its copy.
    assert [type(module) for module in network.modules()] == modules
    now = network.state_dict()
    assert state.keys() == now.keys() and all(torch.equal(state[k], now[k]) for k in state)
    own = {value.data_ptr() for value in now.values()}
    assert not own & {value.data_ptr() for value in folded.state_dict().values()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in
                   [*network.modules(), *folded.modules()])  # fmt: skip
    network.double()
    assert_same(network, fold_batch_norms(network, images().double()), images().double(), 1e-12)


def test_networks_of_torchvision():
    network = trained(torchvision.models.mobilenet_v3_small(num_classes=3))
    folded = fold_batch_norms(network, images())
    assert norms(folded) == 0
    assert_same(network, folded, images(), 1e-5)


class Net(nn.Module):
    """conv, norm and what `run(net, x)` does with them."""

    def __init__(self, run=None, conv=None, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv or nn.Conv2d(3, 4, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.run = run or (lambda net, x: net.norm(net.conv(x)))

    def forward(self, x):
        return self.run(self, x)


def keep_it(net, x):
    net.kept = net.conv(x)
    return net.norm(net.kept)


def twice(net, x):
    return net.norm(net.conv(x)) + net.norm(net.conv(x.flip(3)))


def second_norm(net, x):
    made = net.conv(x)
    return net.norm(made) + net.other(net.norm(made * 2))


class HiddenSum(torch.autograd.Function):
    """What is used below the level of torch's Python functions."""

    @staticmethod
    def forward(ctx, a, b):
        return torch.ops.aten.add.Tensor(a, b)


ALONE = {
    "output added": lambda net, x: net.norm(made := net.conv(x)) + made,
    "output used by an operator": lambda net, x: HiddenSum.apply(
        made := net.conv(x), net.norm(made)
    ),
    "output handed out": lambda net, x: (made := net.conv(x), net.norm(made)),
    "output kept": keep_it,
    "output changed in place": lambda net, x: net.norm(net.conv(x).relu_()),
    "part of the output": lambda net, x: net.norm(net.conv(x)[:, :, ::2]),
    "view of the output": lambda net, x: net.norm(net.conv(x).transpose(2, 3)),
    "output before an activation": lambda net, x: net.norm(net.conv(x).relu()),
    "run twice": twice,
    "norm run twice": second_norm,
    "convolution run twice": lambda net, x: net.conv(x) + net.norm(net.conv(x)),
    "weights used elsewhere": lambda net, x: net.norm(net.conv(x)) + net.conv.weight.mean(),
    "statistics used elsewhere": lambda net, x: net.norm(net.conv(x)) + net.norm.running_var.mean(),
    "norm before convolution": lambda net, x: net.other(net.norm(x[:, :1].expand(-1, 4, -1, -1))),
}


def first(value):
    return value[0] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("case", ALONE)
def test_what_cannot_be_folded_is_left_alone(case):
    network = trained(Net(ALONE[case]))
    folded = fold_batch_norms(network, images())
    assert norms(folded) == 1
    assert torch.equal(first(folded(images())), first(network(images())))


def observed() -> nn.Module:
    network = Net()
    network.norm.register_forward_pre_hook(lambda *_: None)
    return network


def tied() -> nn.Module:
    network = Net(lambda net, x: net.norm(net.conv(x)) + net.other(x))
    network.other = nn.Conv2d(3, 4, 3, padding=1)
    network.other.weight = network.conv.weight
    return network


def pruned() -> nn.Module:
    network = Net()
    prune.l1_unstructured(network.conv, "weight", amount=0.5)
    return network


def huge() -> nn.Module:
    network = Net(norm=nn.BatchNorm2d(4, eps=0.0))
    network.conv.weight.data.fill_(1e38)
    network.norm.register_buffer("running_var", torch.full((4,), 1e-38))
    return network


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


BUILT = {
    "hook": observed,
    "tied weights": tied,
    "pruned": pruned,
    "batch statistics": lambda: Net(norm=nn.BatchNorm2d(4, track_running_stats=False)),
    "spectral norm": lambda: Net(conv=parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))),
    "computed weights": lambda: Net(conv=Standardised(3, 4, 3)),
    "transposed": lambda: Net(conv=nn.ConvTranspose2d(3, 4, 3)),
    "instance norm": lambda: Net(norm=nn.InstanceNorm2d(4, track_running_stats=True)),
    "tokens": lambda: Net(
        lambda net, x: net.norm(net.conv(x[:, 0, :5, :6])), nn.Linear(6, 7), nn.BatchNorm1d(5)
    ),
}


@pytest.mark.parametrize("case", BUILT)
def test_layers_that_cannot_be_folded_are_left_alone(case):
    network = trained(BUILT[case]())
    folded = fold_batch_norms(network, images())
    assert [type(m) for m in folded.modules()] == [type(m) for m in network.modules()]
    assert torch.equal(folded(images()), network(images()))


def test_numbers_that_would_not_be_finite_are_left_alone():
    network = huge().eval()
    assert norms(fold_batch_norms(network, images())) == 1


FOLDABLE = {
    "plain": lambda: Net(),
    "without bias": lambda: Net(conv=nn.Conv2d(3, 4, 3, bias=False)),
    "without affine": lambda: Net(norm=nn.BatchNorm2d(4, affine=False)),
    "grouped, strided, dilated, reflected": lambda: Net(
        conv=nn.Conv2d(3, 6, 3, 2, 2, dilation=2, groups=3, padding_mode="reflect"),
        norm=nn.BatchNorm2d(6),
    ),
    "across replicas": lambda: Net(norm=nn.SyncBatchNorm(4)),
    "with activation": lambda: Net(
        norm=BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout)
    ),
    "in place behind": lambda: Net(lambda net, x: net.norm(net.conv(x)).relu_()),
    "linear": lambda: Net(
        lambda net, x: net.norm(net.conv(x.flatten(1)[:, :9])), nn.Linear(9, 5), nn.BatchNorm1d(5)
    ),
    "one dimension": lambda: Net(
        lambda net, x: net.norm(net.conv(x[:, 0])), nn.Conv1d(32, 5, 3), nn.BatchNorm1d(5)
    ),
    "three dimensions": lambda: Net(
        lambda net, x: net.norm(net.conv(x[:, None])), nn.Conv3d(1, 5, 2), nn.BatchNorm3d(5)
    ),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_kinds_of_layers(case):
    network = trained(FOLDABLE[case]())
    folded = fold_batch_norms(network, images(count=1))
    assert norms(folded) == 0
    assert_same(network, folded, images(), 1e-5)
    network.double()
    assert_same(network, fold_batch_norms(network, images().double()), images().double(), 1e-12)


def test_references_that_are_no_children_are_folded_too():
    network = Net(lambda net, x: net.also[1](net.also[0](x)))
    network.also = [network.conv, network.norm]
    network = trained(network)
    folded = fold_batch_norms(network, images())
    assert norms(folded) == 0
    assert_same(network, folded, images(), 1e-5)


def test_layout_dtype_and_gradient_wishes_stay():
    network = trained(Net()).to(memory_format=torch.channels_last)
    folded = fold_batch_norms(network, images())
    assert folded.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded.conv.weight.requires_grad and not folded.conv.bias.requires_grad
    network.requires_grad_(True).bfloat16()
    with torch.inference_mode():
        folded = fold_batch_norms(network, images().bfloat16())
    assert folded.conv.weight.dtype == torch.bfloat16 and folded.conv.weight.requires_grad
    assert not folded.conv.weight.is_inference()


KEPT = [
    ("conv", True),
    ("norm:in", True),
    ("norm", False),
    ("conv:in", False),
    ("norm.act:in", False),
    ("norm.act", False),
]


@pytest.mark.parametrize("layer, left", KEPT)
def test_a_tapped_layer_keeps_its_value(layer, left):
    network = trained(Net(norm=BatchNormAct2d(4)))
    folded = fold_batch_norms(network, images(), keep=[layer])
    assert norms(folded) == left
    there, here = (Taps(n, [layer])(images())[1][0] for n in (network, folded))
    assert torch.allclose(there, here, atol=1e-5)
    assert isinstance(find_layer(folded, layer), nn.Module)


def test_a_tapped_container_keeps_the_value_of_the_layer_in_it():
    network = trained(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    assert norms(fold_batch_norms(network, images())) == 0
    assert norms(fold_batch_norms(network, images(), keep=("0",))) == 1


@pytest.mark.parametrize("layer", ["layer2.0.act2:in", "layer2.0.bn1", "layer2.0.downsample.0"])
def test_a_folded_network_can_be_cut(layer):
    network = trained(create_model("cifar_resnet8", 3))
    folded = fold_batch_norms(network, images(), keep=(layer,))
    assert norms(folded) == (layer == "layer2.0.downsample.0")
    taps = [Taps(n, [layer])(images())[1][0] for n in (network, folded)]
    assert torch.allclose(*taps, rtol=1e-4, atol=1e-5)
    if layer == "layer2.0.act2:in":
        head, _ = split_at(folded, layer)
        assert torch.equal(head(images()), taps[1])


def test_taps_that_were_set_before_are_those_of_the_copy():
    network = trained(create_model("cifar_resnet8", 3))
    Taps(network, ["conv1", "layer1.0.bn1"])
    folded = fold_batch_norms(network, images())
    assert norms(folded) == 2  # both see the output of a convolution
    assert copy.deepcopy(folded)(images()).shape == (2, 3)


def test_bad_requests():
    network = Net()
    with pytest.raises(ValueError, match="training mode"):
        fold_batch_norms(network, images())
    network.eval().norm.train()
    with pytest.raises(ValueError, match="'norm' is in training mode"):
        fold_batch_norms(network, images())
    network.eval()
    with pytest.raises(UsageError, match="unknown layer 'convv'"):
        fold_batch_norms(network, images(), keep=["convv"])
    with pytest.raises(ValueError, match="compile"):
        fold_batch_norms(torch.compile(network), images())


def test_memory_of_a_kept_layer_that_is_used_again_keeps_no_other():
    """Whose output would lie where the kept one was: every time the same is folded."""
    model = create_model("cifar_resnet8", 10).eval()
    for _ in range(8):
        folded = fold_batch_norms(model, torch.zeros(1, 3, 16, 16), keep=["layer1.0.bn2"])
        assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def activated(network: nn.Module) -> list[str]:
    return [n for n, module in network.named_modules() if isinstance(module, ActivatedConv2d)]


@pytest.mark.parametrize(
    "name, count",
    [("cifar_resnet8", 4), ("cifar_vgg8", 5), ("resnet18", 9), ("cifar_wrn16_1", 6), ("vgg11", 10)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_activations_change_no_more_than_rounding(name, count, layout):
    network = trained(create_model(name, 10)).to(memory_format=layout)
    x = images(64 if name == "vgg11" else 32, 5).contiguous(memory_format=layout)
    plain = fold_batch_norms(network, x[:2])
    fused = fold_batch_norms(network, x[:2], activations=True)
    assert len(activated(fused)) == count
    assert not activated(plain)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)
    assert_same(fused, plain, x, 1e-6)  # gradients, where two operations run
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(fused(x), plain(x))
    with torch.no_grad():
        assert torch.equal(fused.double()(x.double()), plain.double()(x.double()))


class Shown(nn.Module):
    """A convolution and a ReLU with something between or beside them."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, inplace = kind, kind.endswith("in place")
        self.conv, self.act = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=inplace)

    def forward(self, x):
        y = self.conv(x)
        if self.kind.startswith("read before"):
            scale = y.mean()
            return self.act(y) * scale
        if self.kind.startswith("changed before"):
            y += 1
            return self.act(y)
        if self.kind.startswith("twice"):
            return self.act(y) + self.act(-y)
        z = self.act(y)
        return z if self.kind.startswith("alone") else z + y


@pytest.mark.parametrize(
    "kind, fused",
    [
        ("alone", True),
        ("alone in place", True),
        ("read before", False),
        ("read before in place", False),
        ("changed before", False),
        ("changed before in place", False),
        ("twice", False),
        ("used after", False),
        ("used after in place", True),
    ],
)
def test_who_else_sees_what_a_relu_gets(kind, fused):
    network, x = trained(Shown(kind)), images()
    folded = fold_batch_norms(network, x, activations=True)
    assert bool(activated(folded)) == fused
    with torch.no_grad():
        assert torch.equal(folded(x), network(x))


@pytest.mark.parametrize(
    "layer, fused", [("conv1", False), ("act1:in", False), ("bn1", False), ("act1", True)]
)
def test_a_tapped_convolution_keeps_its_value(layer, fused):
    network, x = trained(create_model("cifar_resnet8", 10)), images()
    folded = fold_batch_norms(network, x, keep=[layer], activations=True)
    assert ("conv1" in activated(folded)) == fused
    with torch.no_grad():
        ours, theirs = (Taps(net, [layer])(x)[1][0] for net in (folded, network))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
