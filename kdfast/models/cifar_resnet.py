"""ResNets for 32x32 images: 6n+2 layers in three stages, registered with timm.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, with projection
shortcuts. Module names agree with the checkpoints of the CRD benchmark (`conv1`, `bn1`,
`layer1.0.downsample.0`, `fc`), so those load by name.
"""

from __future__ import annotations

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


class BasicBlock(nn.Module):
    """3x3 conv, BN, ReLU, 3x3 conv, BN, plus shortcut, ReLU.

    [N,in_chs,H,W] -> [N,chs,H/stride,W/stride]; `act2:in` is the sum before the final ReLU.
    """

    def __init__(self, in_chs: int, chs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, chs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(chs, chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(chs)
        self.downsample = None
        if stride != 1 or in_chs != chs:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_chs, chs, 1, stride=stride, bias=False), nn.BatchNorm2d(chs)
            )
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut
        return self.act2(x)


class CifarResNet(nn.Module):
    """ResNet-(6n+2), n = `blocks`: stem at full size, stages at 1, 1/2 and 1/4; pool; linear.

    `forward`: [N,in_chans,H,W] -> [N,num_classes]; `forward_features`: -> [N,widths[3],H/4,W/4].
    Pooling is adaptive, so any H, W >= 4 will do.

    Args:
        blocks: basic blocks per stage.
        widths: channels of the stem and of the three stages.
        init: "default" leaves the linear layer as the library draws it, "xavier" draws its weight
            Xavier-uniform (preset `self`). Convolutions are Kaiming normal, fan-out, either way.
        stem_kernel: 3, or 7 for the published 7x7 stem, whose padding of 1 shrinks 32x32 inputs
            to 28x28; only good for reproducing the numbers that came from it.

    Raises:
        ValueError: `init` or `stem_kernel` is neither of its two values.
    """

    def __init__(
        self,
        blocks: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        init: str = "default",
        stem_kernel: int = 3,
    ) -> None:
        super().__init__()
        if init not in ("default", "xavier"):
            raise ValueError(f"init must be 'default' or 'xavier', got '{init}'")
        if stem_kernel not in (3, 7):
            raise ValueError(f"stem_kernel must be 3 or 7, got {stem_kernel}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.init = init

        self.conv1 = nn.Conv2d(in_chans, widths[0], stem_kernel, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": widths[0], "reduction": 1, "module": "act1"}]
        for i, stride in enumerate((1, 2, 2)):
            in_chs, chs = widths[i], widths[i + 1]
            stage = [BasicBlock(in_chs, chs, stride)]
            stage += [BasicBlock(chs, chs) for _ in range(blocks - 1)]
            name = f"layer{i + 1}"
            self.add_module(name, nn.Sequential(*stage))
            self.feature_info.append({"num_chs": chs, "reduction": 2**i, "module": name})
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool
        )
        if self.init == "xavier" and num_classes > 0:
            nn.init.xavier_uniform_(self.fc.weight)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


_CFG = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}
_X4 = (32, 64, 128, 256)
_VARIANTS = {
    **{f"cifar_resnet{6 * n + 2}": {"blocks": n} for n in (1, 2, 3, 5, 7, 9, 18)},
    "cifar_resnet8x4": {"blocks": 1, "widths": _X4},
    "cifar_resnet32x4": {"blocks": 5, "widths": _X4},
}
default_cfgs = generate_default_cfgs({name: dict(_CFG) for name in _VARIANTS})


def _create(variant: str, pretrained: bool = False, **kwargs) -> CifarResNet:
    return build_model_with_cfg(
        CifarResNet,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **_VARIANTS[variant] | kwargs,
    )


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create("cifar_resnet8", pretrained, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create("cifar_resnet14", pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create("cifar_resnet20", pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create("cifar_resnet32", pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create("cifar_resnet44", pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create("cifar_resnet56", pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create("cifar_resnet110", pretrained, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create("cifar_resnet8x4", pretrained, **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create("cifar_resnet32x4", pretrained, **kwargs)
