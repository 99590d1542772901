"""Split masks, slim networks and resets of whole networks: the evolution spec's section 12."""

import copy

import pytest
import torch
from torch import nn

from kdfast.models import create_model, extract_slim, masked_dense, split_masks
from kdfast.models.channel_graph import ChannelGraph
from kdfast.ops import SplitMask

RATES = (0.3, 0.5, 0.8)
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


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_slim_is_masked_dense(name):
    model = network(name)
    graph = ChannelGraph(model)
    x = images(model)
    for rate in RATES:
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
