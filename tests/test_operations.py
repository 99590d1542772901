"""Operation and parameter counts: torch's own, and those of the published convention."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdfast.metrics import count_operations, published_operations, published_parameters
from kdfast.models import create_model

SIZE = (224, 224)


def network(name: str, classes: int, library=torchvision.models.get_model) -> nn.Module:
    """Without memory or arithmetic: counts need shapes only."""
    more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        return library(name, num_classes=classes, **more)


def narrowed(model: nn.Module, rate: float) -> nn.Module:
    """A residual network with ceil(n * rate) channels for n, by hand."""

    def width(n: int) -> int:
        return math.ceil(n * rate)

    for name, module in list(model.named_modules()):
        options = {"device": "meta"}
        if isinstance(module, nn.Conv2d):
            inputs = module.in_channels
            options |= {key: getattr(module, key) for key in ("kernel_size", "stride", "padding")}
            inputs = 3 if inputs == 3 else width(inputs)
            new = nn.Conv2d(inputs, width(module.out_channels), bias=False, **options)
        elif isinstance(module, nn.BatchNorm2d):
            new = nn.BatchNorm2d(width(module.num_features), **options)
        elif isinstance(module, nn.Linear):
            new = nn.Linear(width(module.in_features), module.out_features, **options)
        else:
            continue
        model.set_submodule(name, new)
    return model.eval()


@pytest.mark.parametrize("library", [torchvision.models.get_model, timm.create_model])
def test_published_operations_of_resnet18(library):
    # Knowledge Evolution, section 9 of the specification.
    assert published_operations(network("resnet18", 100, library), SIZE) == 3_632_418_204


@pytest.mark.parametrize(
    ("rate", "operations", "parameters"),
    [(0.5, 968_435_356, 2_824_580), (0.8, 2_394_450_338, 7_218_816)],
)
def test_published_counts_of_a_slim_resnet18(rate, operations, parameters):
    slim = narrowed(network("resnet18", 100), rate)
    assert published_operations(slim, SIZE) == operations
    assert published_parameters(slim, split=False) == parameters


def test_published_parameters_count_masks():
    dense = network("resnet18", 100)
    assert published_parameters(dense, split=False) == 11_227_812
    assert published_parameters(dense) == 22_445_924
    assert published_parameters(narrowed(dense, 0.5)) == 5_644_260


@pytest.mark.parametrize("library", [torchvision.models.get_model, timm.create_model])
def test_published_parameters_of_a_densenet_count_masks_of_concatenations(library):
    model = network("densenet121", 102, library)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    # Per block the inputs of its layers and of what follows: a transition, or the last norm.
    norms = 0
    for first, layers in ((64, 6), (128, 12), (256, 24), (512, 16)):
        norms += sum(first + 32 * i for i in range(layers + 1))
    assert published_parameters(model) == 7_058_406 + weights + norms


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", (11_228_838, 11_689_512)),
        ("resnet34", (21_336_998, 21_797_672)),
        ("resnet50", (23_717_030, 25_557_032)),
        ("resnet101", (42_709_158, 44_549_160)),
        ("densenet121", (7_058_406, 7_978_856)),
        ("densenet169", (12_654_310, 14_149_480)),
        ("googlenet", (5_704_454, 6_624_904)),
    ],
)
def test_parameters_without_masks_are_the_true_ones(name, parameters):
    got = tuple(published_parameters(network(name, classes), False) for classes in (102, 1000))
    assert got == parameters


def test_published_operations_of_pools():
    dense_net = network("densenet121", 102)
    whole = published_operations(dense_net, SIZE)
    for i in (1, 2, 3):
        pool = dense_net.get_submodule(f"features.transition{i}.pool")
        dense_net.set_submodule(f"features.transition{i}.pool", _Unseen(pool))
    assert whole - published_operations(dense_net, SIZE) == 351_232
    # A kernel given as one number counts by its side, one given as a pair by its area.
    for kernel, largest, average in ((2, 1, 2), ((2, 2), 3, 4)):
        for pool, operations in ((nn.MaxPool2d, largest), (nn.AvgPool2d, average)):
            model = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), pool(kernel))
            assert published_operations(model, (8, 8)) == 64 * 5 + 16 * operations


class _Unseen(nn.Module):
    """An average pool that is no average-pool module."""

    def __init__(self, pool: nn.AvgPool2d):
        super().__init__()
        self.arguments = pool.kernel_size, pool.stride

    def forward(self, x):
        return nn.functional.avg_pool2d(x, *self.arguments)


def test_published_operations_by_hand():
    # A ReLU called twice counts twice; groups divide a convolution's inputs; only a convolution's
    # bias counts; SiLU, adaptive pools and sums do not.
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)
            self.relu, self.silu = nn.ReLU(), nn.SiLU()
            self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

        def forward(self, x):
            x = self.relu(self.norm(self.conv(x)))
            return self.linear(self.pool(self.silu(x) + self.relu(x)).flatten(1))

    elements = 6 * 8 * 9
    assert published_operations(Net(), (10, 11)) == elements * (18 + 2 + 2) + 5 * 11


def test_true_count_is_torchs_own():
    model = create_model("cifar_resnet8", 10).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    assert count_operations(model, (32, 32)) == counter.get_total_flops() > 0


@pytest.mark.parametrize("count", [count_operations, published_operations])
def test_counting_leaves_no_trace(count):
    model = create_model("cifar_resnet8", 10)
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][2:]
    for module in frozen:
        module.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    first = count(model, (32, 32))
    model.requires_grad_(False).double()
    assert count(model, (32, 32)) == first
    with pytest.raises(RuntimeError):
        count(_Bad(model), (32, 32))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    after = model.float().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class _Bad(nn.Module):
    """A network whose last layer does not fit."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.last = model, nn.Linear(9, 9).double()

    def forward(self, x):
        return self.last(self.model(x))
