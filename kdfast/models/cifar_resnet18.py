"""ResNet-18, 34 and 50 with a stem for 32x32 images, registered with timm.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016: the ImageNet networks with a
3x3 stem of stride 1 and no pooling behind it. Module names agree with the checkpoints of the CRD
benchmark (`layer1.0.shortcut.0`, `linear`), so those load by name.
"""

from __future__ import annotations

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from kdfast.models.cifar_base import CifarNetwork, choose, default_cfg, init_kaiming


def _shortcut(in_chs: int, chs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_chs == chs:
        return None
    return nn.Sequential(nn.Conv2d(in_chs, chs, 1, stride=stride, bias=False), nn.BatchNorm2d(chs))


class BasicBlock(nn.Module):
    """3x3 conv, BN, ReLU, 3x3 conv, BN, plus shortcut, ReLU.

    [N,in_chs,H,W] -> [N,chs,H/stride,W/stride]; `act2:in` is the sum before the final ReLU.
    """

    expansion = 1

    def __init__(self, in_chs: int, chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, chs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(chs, chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(chs)
        self.shortcut = _shortcut(in_chs, chs, stride)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.act2(x + shortcut)


class Bottleneck(nn.Module):
    """1x1 conv, BN, ReLU, 3x3 conv (stride), BN, ReLU, 1x1 conv, BN, plus shortcut, ReLU.

    [N,in_chs,H,W] -> [N,chs,H/stride,W/stride], chs / 4 within; `act3:in` is the sum before the
    final ReLU.
    """

    expansion = 4

    def __init__(self, in_chs: int, chs: int, stride: int) -> None:
        super().__init__()
        mid = chs // self.expansion
        self.conv1 = nn.Conv2d(in_chs, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(mid, chs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(chs)
        self.shortcut = _shortcut(in_chs, chs, stride)
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.act3(x + shortcut)


class CifarResNet18(CifarNetwork):
    """Stem of 64 at full size, four stages at 1, 1/2, 1/4 and 1/8; any H, W >= 8 will do.

    Args:
        block: `BasicBlock` (stages of 64 to 512) or `Bottleneck` (256 to 2048).
        depths: blocks per stage.
        init: "kaiming" draws convolutions from N(0, 2 / (k^2 * out)), "library" as the library
            does, which is how the intermediate-classifier study starts. The linear layer is the
            library's draw either way.

    Raises:
        ValueError: another `init`.
    """

    head = "linear"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        init: str = "kaiming",
    ) -> None:
        super().__init__()
        choose("init", init, ("kaiming", "library"))
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": 64, "reduction": 1, "module": "act1"}]
        in_chs = 64
        for i, depth in enumerate(depths):
            chs = 64 * 2**i * block.expansion
            stage = [block(in_chs, chs, 1 if i == 0 else 2)]
            stage += [block(chs, chs, 1) for _ in range(depth - 1)]
            name = f"layer{i + 1}"
            self.add_module(name, nn.Sequential(*stage))
            self.feature_info.append({"num_chs": chs, "reduction": 2**i, "module": name})
            in_chs = chs
        self.add_head(in_chs, num_classes, global_pool, drop_rate)
        if init == "kaiming":
            init_kaiming(self)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


_VARIANTS = {
    "cifar_resnet18": {"block": BasicBlock, "depths": (2, 2, 2, 2)},
    "cifar_resnet34": {"block": BasicBlock, "depths": (3, 4, 6, 3)},
    "cifar_resnet50": {"block": Bottleneck, "depths": (3, 4, 6, 3)},
}
default_cfgs = generate_default_cfgs({name: default_cfg("linear", 4) for name in _VARIANTS})


def _create(variant: str, pretrained: bool, **kwargs) -> CifarResNet18:
    return build_model_with_cfg(
        CifarResNet18,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4)},
        **_VARIANTS[variant] | kwargs,
    )


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs) -> CifarResNet18:
    return _create("cifar_resnet18", pretrained, **kwargs)


@register_model
def cifar_resnet34(pretrained: bool = False, **kwargs) -> CifarResNet18:
    return _create("cifar_resnet34", pretrained, **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs) -> CifarResNet18:
    return _create("cifar_resnet50", pretrained, **kwargs)
