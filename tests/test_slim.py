"""Split masks, slim networks and resets of whole networks: the evolution spec's section 12."""

import copy
import math

import pytest
import torch
from torch import nn

from kdfast.errors import UsageError
from kdfast.models import create_model, extract_slim, masked_dense, reset, split_masks
from kdfast.models.channel_graph import ChannelGraph
from kdfast.ops import Key, SplitMask

RATES = (0.3, 0.5, 0.8)
KEY = Key(0, "split")
PLAIN = {"aux_logits": False, "init_weights": False}
NETWORKS = {
    "torchvision.models:resnet18": {},
    "torchvision.models:resnet50": {},
    "torchvision.models:densenet121": {},
    "torchvision.models:googlenet": PLAIN,
    "wide_resnet50_2": {},
    "mobilenetv2_100": {},
    "efficientnet_b0": {},
    "regnety_002": {},
    "vgg11_bn": {},
    "convnext_atto": {},
}
# One more of every kind of block, at one rate.
OTHERS = {
    "mobilenetv3_small_050": {},
    "ghostnet_050": {},
    "resnext26ts": {},
    "seresnet18": {},
    "hrnet_w18_small": {},
    "cifar_resnet20": {},
    "cifar_wrn16_2": {},
    "cifar_vgg8": {},
    "cifar_mobilenetv2_half": {},
}


def network(name: str, classes: int = 100, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, classes, **NETWORKS.get(name, {}), **kwargs).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def images(model: nn.Module, dtype=torch.float32) -> torch.Tensor:
    side = min(model.pretrained_cfg["input_size"][-1], 96)
    if "vgg" in model.pretrained_cfg["architecture"]:
        side = model.pretrained_cfg["input_size"][-1]
    return torch.randn(2, 3, side, side, dtype=dtype)


def multiplied(model: nn.Module, masks: dict[str, SplitMask]) -> nn.Module:
    """Every convolution's and linear layer's weight times its mask, everything else untouched."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask.dense())
    return model


@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
@torch.no_grad()
def test_slim_is_masked_dense(name):
    model = network(name)
    graph = ChannelGraph(model)
    x = images(model)
    for rate in RATES if name in NETWORKS else (0.3,):
        masks = split_masks(model, rate, graph=graph)
        slim = extract_slim(model, masks, graph=graph)
        logits = slim(x)
        references = [masked_dense(model, masks, graph=graph)(x)]
        if name != "convnext_atto":  # LayerNorm runs over what is kept
            references.append(multiplied(model, masks)(x))
        for reference in references:
            bound = 1e-5 * max(1, reference.abs().max())
            assert (logits - reference).abs().max() < bound, rate
        assert (logits - model(x)).abs().max() > 100 * bound


@pytest.mark.parametrize("name", [*list(NETWORKS)[:4], "convnext_atto", "regnety_002"])
@torch.no_grad()
def test_slim_is_masked_dense_in_float64(name):
    model = network(name).double()
    graph = ChannelGraph(model)
    masks = split_masks(model, 0.3, graph=graph)
    x = images(model, torch.float64)
    reference = masked_dense(model, masks, graph=graph)(x)
    difference = extract_slim(model, masks, graph=graph)(x) - reference
    assert difference.abs().max() < 1e-12 * max(1, reference.abs().max())


@torch.no_grad()
def test_slim_is_masked_dense_in_training_mode_too():
    model = network("cifar_resnet20").double().train()
    masks = split_masks(model, 0.5)
    slim = extract_slim(model, masks)
    assert model.training and slim.training
    x = images(model, torch.float64)
    assert torch.allclose(slim(x), multiplied(model, masks)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["torchvision.models:resnet18", "regnety_002", "vgg11_bn"])
@torch.no_grad()
def test_reset_weights_are_not_read(name):
    model = network(name)
    graph = ChannelGraph(model)
    masks = split_masks(model, 0.5, graph=graph)
    x = images(model)
    slim = extract_slim(model, masks, graph=graph)
    logits, masked = slim(x), masked_dense(model, masks, graph=graph)(x)
    for key, mask in masks.items():
        model.get_parameter(key).masked_fill_(~mask.dense(), math.nan)
    again = extract_slim(model, masks, graph=graph)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, slim.state_dict()[key]), key
    assert torch.equal(again(x), logits)
    assert torch.equal(masked_dense(model, masks, graph=graph)(x), masked)


def test_mask_sums_of_resnet18():
    masks = split_masks(network("torchvision.models:resnet18"), 0.5)
    sums = {name.removesuffix(".weight"): mask.sum() for name, mask in masks.items()}
    assert (sums["conv1"], sums["fc"]) == (4704, 25600)
    for stage, first, others, projection in (
        (1, 9216, 9216, None),
        (2, 18432, 36864, 2048),
        (3, 73728, 147456, 8192),
        (4, 294912, 589824, 32768),
    ):
        convolutions = [f"layer{stage}.{b}.conv{c}" for b in (0, 1) for c in (1, 2)]
        found = [sums[name] for name in convolutions]
        assert found == [first, others, others, others]
        assert sums.get(f"layer{stage}.0.downsample.0") == projection


def kept_parameters(graph: ChannelGraph, rate: float) -> int:
    kept = graph.keep_rate(rate)
    sizes = []
    for name, _ in graph.model.named_parameters():
        runs = graph.runs(name, kept)
        sizes.append(math.prod(sum(length for _, length in own) for own in runs))
    return sum(sizes)


def test_masks_and_counts_of_densenet():
    graph = ChannelGraph(network("torchvision.models:densenet121"))
    masks = split_masks(graph.model, 0.5, graph=graph)
    columns = masks["features.transition1.conv.weight"].columns
    assert columns == ((0, 32), *((start, 16) for start in range(64, 256, 32)))
    # The published slim network rounds its bottlenecks otherwise: 719,981 and 4,660,525.
    assert kept_parameters(graph, 0.3) == 704975
    assert kept_parameters(graph, 0.8) == 4621407


def test_masks_of_googlenet():
    graph = ChannelGraph(network("torchvision.models:googlenet"))
    for rate, kept in ((0.5, (32, 64, 16, 16)), (0.8, (52, 103, 26, 26))):
        columns = split_masks(graph.model, rate, graph=graph)[
            "inception3b.branch1.conv.weight"
        ].columns
        expected = tuple(zip((0, 64, 192, 224), kept, strict=True))
        assert columns == expected and sum(kept) == {0.5: 128, 0.8: 207}[rate]


@pytest.mark.parametrize(
    ("name", "slim"),
    [
        ("torchvision.models:resnet18", 2825094),
        ("torchvision.models:resnet34", 5353990),
        ("torchvision.models:resnet50", 5997190),
        ("torchvision.models:densenet121", 1814054),
        ("torchvision.models:googlenet", 1458294),
    ],
)
def test_parameters_of_slim_networks(name, slim):
    assert kept_parameters(ChannelGraph(network(name, 102)), 0.5) == slim


def test_parameters_of_slim_densenet169():
    graph = ChannelGraph(network("torchvision.models:densenet169", 102))
    assert kept_parameters(graph, 0.5) == 3248038


def test_slim_cifar_resnet20():
    model = network("cifar_resnet20", 10)
    slim = extract_slim(model, split_masks(model, 0.5))
    assert sum(p.numel() for p in model.parameters()) == 272474
    assert sum(p.numel() for p in slim.parameters()) == 68786
    assert slim.state_dict().keys() == model.state_dict().keys()
    logits = slim.train()(torch.randn(4, 3, 32, 32))
    logits.sum().backward()
    assert all(p.grad is not None for p in slim.parameters())


class Small(nn.Module):
    """`body` on [N, 3, 8, 8] and a classifier of what it puts out."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        width = body(torch.zeros(1, 3, 8, 8)).shape[1]
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class Branches(nn.Module):
    """A concatenation added to a plain convolution, then cut in halves and joined crosswise."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.c, self.d = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 1) + self.c(x)
        y = self.d(y) * self.scale.view(-1, 1, 1) + y
        first, second = y.split([10, 6], 1)
        return torch.cat([second.relu(), first.sigmoid()], 1)


class Crosswise(nn.Module):
    """Halves by chunk, each with a layer of its own, joined the other way round."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 1)
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        a, b = self.first(x).chunk(2, 1)
        return torch.cat([self.b(b), a - self.a(a)], 1)


class Restore(nn.Module):
    def forward(self, x):
        return x[:, :, None, None]


class Shared(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 10, 1)
        self.a, self.b = nn.Conv2d(10, 10, 3, padding=1), nn.Conv2d(10, 10, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(self.b(self.first(x)).relu())


class Gate(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.reduce, self.expand = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x):
        gate = self.expand(self.reduce(x.mean((2, 3))).relu()).sigmoid()
        return x * gate[:, :, None, None]


BODIES = {
    "groups": lambda: nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.PReLU(24), nn.Conv2d(24, 24, 3, groups=3), nn.Conv2d(24, 8, 1)
    ),
    "depthwise, twice as wide": lambda: nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.Conv2d(10, 20, 3, groups=10), nn.BatchNorm2d(20), nn.ReLU()
    ),
    "cut groups of a normalisation": lambda: nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.GroupNorm(4, 24), nn.ReLU(), nn.Conv2d(24, 8, 1)
    ),
    "squeeze-excitation": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), Gate(12), nn.Hardswish()
    ),
    "flattened": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.Flatten(), nn.Linear(54, 12), nn.ReLU(),
        Restore(),
    ),
    "without affine": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12, affine=False), nn.InstanceNorm2d(12), nn.GELU()
    ),
    "shared weight": Shared,
    "cut and joined crosswise": Crosswise,
    "one dimension": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Flatten(2), nn.Conv1d(12, 8, 3), nn.Unflatten(2, (2, 17))
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BODIES)
@torch.no_grad()
def test_slim_small_networks(kind):
    torch.manual_seed(1)
    model = Small(BODIES[kind]()).double().eval()
    graph = ChannelGraph(model, (3, 8, 8))
    for rate in (0.2, 0.35, 0.5, 0.9):
        masks = split_masks(model, rate, graph=graph)
        slim = extract_slim(model, masks, graph=graph)
        x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        references = [masked_dense(model, masks, graph=graph)(x)]
        if "normalisation" not in kind:
            references.append(multiplied(model, masks)(x))
        for reference in references:
            assert torch.allclose(slim(x), reference, rtol=0, atol=1e-12), rate


def test_sets_that_groups_and_cuts_make():
    masks = split_masks(Small(BODIES["groups"]()), 0.5, input_size=(3, 8, 8))
    first, grouped, last, _ = masks.values()
    assert first.rows == grouped.rows == last.columns == ((0, 16),)
    assert grouped.columns == ((0, 8),)
    masks = split_masks(Small(Branches()), 0.5, input_size=(3, 8, 8))
    assert masks["body.c.weight"].rows == ((0, 5), (10, 3))
    assert masks["fc.weight"].columns == ((0, 3), (6, 5))


def test_small_split_by_hand():
    layers = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1, bias=False))
    inner = split_masks(Small(layers), 0.5, input_size=(3, 8, 8))["body.1.weight"]
    assert (inner.rows, inner.columns) == (((0, 1),), ((0, 1),))


# Redrawing.


def biased() -> nn.Module:
    torch.manual_seed(2)
    return Small(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3)))


@pytest.mark.parametrize("mode", ["kels", "wels"])
def test_reset(mode):
    model = network("torchvision.models:resnet18").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = split_masks(model, 0.5, mode, KEY)
    reset(model, masks, Key(0, "reset", 1))
    for name, tensor in model.state_dict().items():
        if name not in masks:
            assert torch.equal(tensor, before[name]), name
            continue
        kept = masks[name].dense()
        bound = 1 / math.sqrt(tensor[0].numel())
        drawn = tensor[~kept]
        assert torch.equal(tensor[kept], before[name][kept])
        assert drawn.abs().max() <= bound and (drawn != before[name][~kept]).float().mean() > 0.99
    for name, bound in (
        ("layer1.0.conv1.weight", 1 / 24),
        ("conv1.weight", 0.082479),
        ("fc.weight", 0.044194),
    ):
        drawn = model.get_parameter(name)[~masks[name].dense()]
        assert drawn.abs().max().item() == pytest.approx(bound, rel=2e-3)
        assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=1e-2)
    again = network("torchvision.models:resnet18")
    reset(again, masks, Key(0, "reset", 1))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_reset_biases():
    model = biased()
    before = copy.deepcopy(model)
    masks = split_masks(model, 0.5, input_size=(3, 8, 8))
    reset(model, masks, KEY)
    for name, bound in (("body.0", 27**-0.5), ("body.2", 576**-0.5)):
        new, old = (m.get_submodule(name).bias for m in (model, before))
        assert torch.equal(new[:32], old[:32])
        assert not torch.isclose(new[32:], old[32:], rtol=0, atol=1e-7).any()
        assert 0.5 * bound < new[32:].abs().max() <= bound
    assert torch.equal(model.fc.bias, before.fc.bias)


def test_reset_as_constructed():
    model, fresh = biased(), biased()
    for parameter in fresh.parameters():
        nn.init.constant_(parameter, 7)
    masks = split_masks(model, 0.5, input_size=(3, 8, 8))
    reset(model, masks, KEY, fresh)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) == 7, ~mask.dense())
    assert (model.body[0].bias == 7).tolist() == [False] * 32 + [True] * 32


def test_weight_level_masks():
    model = network("cifar_resnet20")
    masks = split_masks(model, 0.7, "wels", KEY)
    assert masks == split_masks(model, 0.7, "wels", KEY)
    assert masks != split_masks(model, 0.7, "wels", Key(1, "split"))
    count = sum(math.prod(mask.shape) for mask in masks.values())
    density = sum(mask.sum() for mask in masks.values()) / count
    assert abs(density - 0.7) < 4 * math.sqrt(0.7 * 0.3 / count)
    assert {len(mask.shape) for mask in masks.values()} == {2, 4} and len(masks) == 22
    x = images(model)
    with torch.no_grad():
        assert torch.allclose(
            masked_dense(model, masks)(x), multiplied(model, masks)(x), rtol=0, atol=1e-5
        )
    with pytest.raises(UsageError, match="no slim network"):
        extract_slim(model, masks)


def test_masks_of_the_same_rate_are_equal_and_small():
    model = network("cifar_resnet20")
    masks = split_masks(model, 0.5)
    assert masks == split_masks(network("cifar_resnet20"), 0.5)
    assert all(mask.bits is None for mask in masks.values())


# What is refused.


class Depends(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class Mixes(nn.Module):
    """Shuffles channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        return y.view(-1, 2, 4, *y.shape[2:]).transpose(1, 2).flatten(1, 2)


class Does(nn.Module):
    """`what` to the 8 channels of a convolution."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 8, 1), what

    def forward(self, x):
        return self.what(self.conv(x))


WIDTHS = {
    "cut at a number": lambda y: torch.cat([y[:, 5:], y[:, :5]], 1),
    "one channel by number": lambda y: y * y[:, 5:6],
    "divided by the width": lambda y: y / y.shape[1],
    "groups by number": lambda y: torch.nn.functional.group_norm(y, 4),
}
MIXED = {
    "rolled": lambda y: y.roll(1),
    "rolled along channels": lambda y: y.roll(1, 1),
    "largest of all": lambda y: y * y.max(1, keepdim=True).values,
    "softmax": lambda y: y.softmax(1),
    "mean over channels": lambda y: y * y.mean(1, keepdim=True),
    "sum over everything": lambda y: y * y.sum(),
    "every other channel": lambda y: torch.cat([y[:, ::2], y[:, ::2]], 1),
    "gated linear unit": lambda y: torch.nn.functional.glu(y, 1).repeat(1, 2, 1, 1),
}


@pytest.mark.parametrize("kind", WIDTHS)
def test_widths_written_into_the_code_are_refused(kind):
    torch.manual_seed(0)
    model, size = Small(Does(WIDTHS[kind])), (3, 8, 8)
    masks = split_masks(model, 0.8, input_size=size)
    with pytest.raises(UsageError, match="depends on widths"):
        extract_slim(model, masks, size)


@pytest.mark.parametrize("kind", MIXED)
def test_mixed_channels_are_refused(kind):
    with pytest.raises(UsageError, match=r"cannot split \w+ at \w+ of layer 'body': "):
        split_masks(Small(Does(MIXED[kind])), 0.5, input_size=(3, 8, 8))


def test_models_that_cannot_be_split():
    for body, rate, words in (
        (Depends, 0.5, "torch.export cannot trace it"),
        (Mixes, 0.5, r"layer 'body': it arranges channels as \[2, 4\]"),
    ):
        model = nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        if body is Mixes:
            model = Small(body())
        with pytest.raises(UsageError, match=words):
            split_masks(model, rate, input_size=(3, 8, 8))
    transposed = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2))
    with pytest.raises(UsageError, match=r"'body\.1' is a transposed convolution"):
        split_masks(Small(transposed), 0.5, input_size=(3, 8, 8))
    with pytest.raises(UsageError, match=r"cannot split vit_tiny_patch16_224 at \w+ of layer"):
        split_masks(create_model("vit_tiny_patch16_224"), 0.5)
    auxiliary = create_model("torchvision.models:googlenet", 10, init_weights=False)
    with pytest.raises(UsageError, match="not used in evaluation"):
        split_masks(auxiliary, 0.5)


@pytest.mark.parametrize("rate", [0, 1, -0.5, 1.5, math.nan])
def test_rates(rate):
    with pytest.raises(UsageError, match="not between 0 and 1"):
        split_masks(biased(), rate, input_size=(3, 8, 8))


def test_modes():
    with pytest.raises(UsageError, match="none of kels, wels"):
        split_masks(biased(), 0.5, "bits", input_size=(3, 8, 8))
    with pytest.raises(UsageError, match="give a key"):
        split_masks(biased(), 0.5, "wels")


def test_masks_that_do_not_fit():
    model, size = biased(), (3, 8, 8)
    masks = split_masks(model, 0.5, input_size=size)
    name = "body.2.weight"
    other = SplitMask(masks[name].shape, [(0, 20)], masks[name].columns)
    for changed, words in (
        ({key: mask for key, mask in masks.items() if key != name}, "body.2.weight is on one side"),
        (masks | {name: other}, "other channels than the layers it is tied to"),
        (masks | {name: SplitMask((64, 64, 1, 1), [(0, 32)], [(0, 32)])}, "the model has"),
    ):
        with pytest.raises(UsageError, match=words):
            extract_slim(model, changed, size)
    with pytest.raises(UsageError, match="another architecture"):
        reset(model, masks, KEY, network("cifar_resnet20"))
    with pytest.raises(UsageError, match="the model has no such weight"):
        reset(model, {"body.7.weight": masks[name]}, KEY)
