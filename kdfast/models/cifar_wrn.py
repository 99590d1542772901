"""Wide residual networks for 32x32 images, WRN-d-k with d = 6n+4, registered with timm.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016. Module names of the "crd" form agree
with the checkpoints of the CRD benchmark (`block1.layer.0.convShortcut`), so those load by name.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from kdfast.models.cifar_base import CifarNetwork, choose, default_cfg, init_kaiming


class PreActBlock(nn.Module):
    """BN, ReLU, 3x3 conv, BN, ReLU, 3x3 conv, plus shortcut: the raw sum, which may be negative.

    [N,in_chs,H,W] -> [N,chs,H/stride,W/stride]. Where the width changes, the shortcut is a 1x1 conv
    of the activated input, without BN.
    """

    def __init__(self, in_chs: int, chs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chs, chs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(chs)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(chs, chs, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_chs != chs:
            self.convShortcut = nn.Conv2d(in_chs, chs, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.act1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        x = self.act2(self.bn2(self.conv1(activated)))
        return self.conv2(x) + shortcut


class DropoutBlock(nn.Module):
    """The block of the "dih" form: convs with bias, stride on the second, dropout after the first.

    [N,in_chs,H,W] -> [N,chs,H/stride,W/stride]. Where width or size changes, the shortcut is a 1x1
    conv of the raw input.
    """

    def __init__(self, in_chs: int, chs: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chs, chs, 3, padding=1)
        self.drop = nn.Dropout(drop_rate)
        self.bn2 = nn.BatchNorm2d(chs)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(chs, chs, 3, stride=stride, padding=1)
        self.shortcut = None
        if stride != 1 or in_chs != chs:
            self.shortcut = nn.Conv2d(in_chs, chs, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.drop(self.conv1(self.act1(self.bn1(x))))
        return self.conv2(self.act2(self.bn2(x))) + shortcut


class CifarWideResNet(CifarNetwork):
    """WRN-(6n+4)-k, n = `blocks`, k = `width`: raw stem of 16, stages of 16k, 32k, 64k; BN, ReLU.

    Stages are at 1, 1/2 and 1/4 of the size; any H, W >= 4 will do. Stage outputs are raw sums.
    Convolutions are drawn from N(0, 2 / (k^2 * out)); biases, that of the linear layer too, are 0.

    Args:
        blocks: residual blocks per stage.
        width: k.
        form: "crd", bias-free with the stride on a stage's first 3x3 conv, or "dih", that of the
            intermediate-classifier study: all convs with bias, the stride on the second one,
            dropout between them, 1x1 shortcuts of the raw input, momentum 0.9 in the final BN.
        block_drop_rate: dropout of the "dih" form's blocks.

    Raises:
        ValueError: another `form`; a drop rate for blocks without dropout.
    """

    def __init__(
        self,
        blocks: int,
        width: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        form: str = "crd",
        block_drop_rate: float | None = None,
    ) -> None:
        super().__init__()
        dih = choose("form", form, ("crd", "dih")) == "dih"
        if not dih and block_drop_rate:
            raise ValueError("block_drop_rate needs form 'dih': the blocks of 'crd' drop nothing")
        dropout = {"drop_rate": 0.3 if block_drop_rate is None else block_drop_rate}
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=dih)
        self.feature_info = [{"num_chs": 16, "reduction": 1, "module": "conv1"}]
        in_chs = 16
        for i, stride in enumerate((1, 2, 2)):
            chs = 16 * width * 2**i
            layer = nn.Sequential()
            for j in range(blocks):
                place = in_chs if j == 0 else chs, chs, stride if j == 0 else 1
                layer.append(DropoutBlock(*place, **dropout) if dih else PreActBlock(*place))
            name = f"block{i + 1}"
            self.add_module(name, nn.Sequential(OrderedDict(layer=layer)))
            self.feature_info.append({"num_chs": chs, "reduction": 2**i, "module": name})
            in_chs = chs
        self.bn1 = nn.BatchNorm2d(in_chs, momentum=0.9 if dih else 0.1)
        self.act1 = nn.ReLU(inplace=True)
        self.add_head(in_chs, num_classes, global_pool, drop_rate)
        init_kaiming(self)

    def init_head(self, linear: nn.Linear) -> None:
        nn.init.zeros_(linear.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.act1(self.bn1(x))


_VARIANTS = {
    f"cifar_wrn{depth}_{width}": {"blocks": (depth - 4) // 6, "width": width}
    for depth, width in ((16, 1), (16, 2), (28, 2), (40, 1), (40, 2))
}
default_cfgs = generate_default_cfgs({name: default_cfg("fc", 8) for name in _VARIANTS})


def _create(variant: str, pretrained: bool, **kwargs) -> CifarWideResNet:
    return build_model_with_cfg(
        CifarWideResNet,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **_VARIANTS[variant] | kwargs,
    )


@register_model
def cifar_wrn16_1(pretrained: bool = False, **kwargs) -> CifarWideResNet:
    return _create("cifar_wrn16_1", pretrained, **kwargs)


@register_model
def cifar_wrn16_2(pretrained: bool = False, **kwargs) -> CifarWideResNet:
    return _create("cifar_wrn16_2", pretrained, **kwargs)


@register_model
def cifar_wrn28_2(pretrained: bool = False, **kwargs) -> CifarWideResNet:
    return _create("cifar_wrn28_2", pretrained, **kwargs)


@register_model
def cifar_wrn40_1(pretrained: bool = False, **kwargs) -> CifarWideResNet:
    return _create("cifar_wrn40_1", pretrained, **kwargs)


@register_model
def cifar_wrn40_2(pretrained: bool = False, **kwargs) -> CifarWideResNet:
    return _create("cifar_wrn40_2", pretrained, **kwargs)
