"""Cutting a model in two: bitwise the same, each part only its share, clear refusals."""

import copy

import pytest
import torch
from torch import nn

from kdfast.errors import UsageError
from kdfast.models import Taps, create_model, split_at


def build(name, side=32, **kwargs):
    torch.manual_seed(0)
    model = create_model(name, 10, img_size=side, **kwargs)
    return model, torch.randn(2, 3, side, side)


CUTS = {
    "cifar_resnet8": ["conv1:in", "bn1", "layer1", "layer2.0.act2:in", "fc:in", "fc"],
    "resnet18": ["maxpool:in", "layer1.1", "layer2.1.act2:in", "global_pool", "fc:in"],
    "convnext_atto": ["stem", "stages.1:in", "stages.2.blocks.1", "head.fc:in"],
    "mobilenetv3_small_100": ["bn1", "blocks.1.0", "blocks.3:in", "blocks.0.0.se", "classifier:in"],
    "vit_tiny_patch16_224": ["patch_embed", "blocks.3", "blocks.3:in", "norm", "head:in"],
}


@pytest.mark.parametrize("name", CUTS)
def test_split_is_bitwise_and_each_part_does_its_share(name):
    model, x = build(name, 64, drop_rate=0.2)
    calls = []
    for key, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, key=key: calls.append(key))
    for layer in CUTS[name]:
        head, tail = split_at(model, layer)
        for training in (False, True):
            model.train(training)
            state = copy.deepcopy(model.state_dict())
            torch.manual_seed(1)
            calls.clear()
            expected = model(x)
            whole = list(calls)
            model.load_state_dict(state)
            torch.manual_seed(1)
            calls.clear()
            feature = head(x)
            head_calls, before = list(calls), feature.clone()
            calls.clear()
            assert torch.equal(tail(feature), expected), layer
            assert torch.equal(feature, before), layer
            assert head_calls + calls == whole, layer


def test_split_shares_weights_and_passes_gradients():
    model, x = build("cifar_resnet8")
    model.eval()
    head, tail = split_at(model, "layer2.0.act2:in")
    assert {id(p) for p in head.parameters()} | {id(p) for p in tail.parameters()} == {
        id(p) for p in model.parameters()
    }
    feature = head(x).detach().requires_grad_()
    tail(feature).square().sum().backward()
    _, (tapped,) = Taps(model, ["layer2.0.act2:in"])(x)
    assert torch.equal(feature, tapped)
    expected = torch.autograd.grad(model(x).square().sum(), model.fc.weight)
    assert torch.equal(model.fc.weight.grad, expected[0])
    assert feature.grad.abs().sum() > 0
    assert model.conv1.weight.grad is None
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert not torch.equal(head(x), tapped)


def test_split_keeps_modes():
    model, _ = build("resnet18")
    model.train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    split_at(model, "layer2.0")
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("resnet18", "layer1.0.conv2", "'maxpool' is used again behind it, by the add"),
        ("vit_tiny_patch16_224", "blocks.3.attn", "'blocks.2' is used again behind it"),
        ("resnet18", "layer9", "unknown layer 'layer9'"),
        ("cifar_resnet8", "head", "unknown layer 'head'"),
    ],
)
def test_split_refuses(name, layer, message):
    model, _ = build(name, 64)
    with pytest.raises(UsageError, match=message):
        split_at(model, layer)


def test_split_refuses_what_cannot_be_traced():
    class Choosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.unused = nn.Identity()
            self.careful = True

        def forward(self, x):
            y = self.conv(x)
            return y if self.careful and y.sum() > 0 else -y

    model = Choosy()
    with pytest.raises(UsageError, match=r"cannot split Choosy at 'conv': .* depends on the data"):
        split_at(model, "conv")
    model.careful = False
    head, tail = split_at(model, "conv")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(tail(head(x)), model(x))
    with pytest.raises(UsageError, match="'unused' is not called by Choosy"):
        split_at(model, "unused")
