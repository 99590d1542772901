"""ResNets with two more convolutions and two hidden layers, registered with timm.

Cheng, Rao, Chen, Zhang, "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR
2020: ResNets whose layers can be compared with those of VGG. What is compared lies before a ReLU:

    added.bn2     the second added convolution, normalised     [N, 512 or 2048, H/32, W/32]
    hidden.fc1    first hidden layer                           [N, 4096 or 2048]
    hidden.fc2    second hidden layer                          [N, 4096 or 2048]
    fc            logits                                       [N, num_classes]

The first number is that of headed_resnet18. Their weights are added.conv2, hidden.fc1, hidden.fc2
and fc.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from timm.layers import create_classifier
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from kdfast.models.initial import init_vgg


class HeadedResNet(ResNet):
    """timm's ResNet up to stage 4; then as below: [N, 3, H, W] -> [N, num_classes].

    Two 3x3 convolutions with bias of the same width, each with BN and ReLU; global pool; two hidden
    layers of `width`, each with ReLU and dropout; linear classifier. New weights are drawn
    as `init_vgg` draws them, the trunk's as well.

    Args:
        block, layers: of the trunk.
        width: of the hidden layers.
        drop_rate: of the dropout behind the hidden layers.
        **trunk: further arguments of timm's ResNet.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        width: int = 2048,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.5,
        **trunk,
    ) -> None:
        super().__init__(block, layers, num_classes, global_pool=global_pool, **trunk)
        channels = self.num_features
        self.added = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, channels, 3, padding=1),
                bn1=nn.BatchNorm2d(channels),
                act1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(channels, channels, 3, padding=1),
                bn2=nn.BatchNorm2d(channels),
                act2=nn.ReLU(inplace=True),
            )
        )
        self.hidden = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(channels * self.global_pool.feat_mult(), width),
                act1=nn.ReLU(inplace=True),
                drop1=nn.Dropout(drop_rate),
                fc2=nn.Linear(width, width),
                act2=nn.ReLU(inplace=True),
                drop2=nn.Dropout(drop_rate),
            )
        )
        del self.fc
        self.width = self.head_hidden_size = width
        self.reset_classifier(num_classes)
        init_vgg(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer. Another pool must be as wide as the one before."""
        if global_pool is not None:
            pool, _ = create_classifier(self.num_features, 0, pool_type=global_pool)
            if pool.feat_mult() != self.global_pool.feat_mult():
                raise ValueError(f"global_pool {global_pool} does not fit the hidden layers")
            self.global_pool = pool
        self.num_classes = num_classes
        self.fc = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()
        init_vgg(self.fc)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.added(super().forward_features(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.hidden(self.global_pool(x))
        return x if pre_logits else self.fc(x)


_VARIANTS = {
    "headed_resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2), "width": 4096},
    "headed_resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "headed_resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "headed_resnet152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
}


def _trunk_cfg(variant: str) -> dict:
    """torchvision's ImageNet weights of the trunk, as timm has them."""
    trunk = get_pretrained_cfg(f"{variant.removeprefix('headed_')}.tv_in1k")
    keys = (
        "url", "hf_hub_id", "num_classes", "input_size", "pool_size", "crop_pct", "interpolation",
        "mean", "std", "first_conv", "classifier", "license", "origin_url",
    )  # fmt: skip
    return {key: getattr(trunk, key) for key in keys}


default_cfgs = generate_default_cfgs({name: _trunk_cfg(name) for name in _VARIANTS})


def _trunk_only(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Published weights without their classifier, beside the new head of `model`."""
    if "hidden.fc1.weight" in state:
        return state
    own = model.state_dict()
    head = {k: v for k, v in own.items() if k.startswith(("added.", "hidden.", "fc."))}
    return {k: v for k, v in state.items() if not k.startswith("fc.")} | head


def _create(variant: str, pretrained: bool, **kwargs) -> HeadedResNet:
    return build_model_with_cfg(
        HeadedResNet,
        variant,
        pretrained,
        pretrained_filter_fn=_trunk_only,
        **_VARIANTS[variant] | kwargs,
    )


@register_model
def headed_resnet18(pretrained: bool = False, **kwargs) -> HeadedResNet:
    return _create("headed_resnet18", pretrained, **kwargs)


@register_model
def headed_resnet50(pretrained: bool = False, **kwargs) -> HeadedResNet:
    return _create("headed_resnet50", pretrained, **kwargs)


@register_model
def headed_resnet101(pretrained: bool = False, **kwargs) -> HeadedResNet:
    return _create("headed_resnet101", pretrained, **kwargs)


@register_model
def headed_resnet152(pretrained: bool = False, **kwargs) -> HeadedResNet:
    return _create("headed_resnet152", pretrained, **kwargs)
