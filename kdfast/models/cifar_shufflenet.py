"""ShuffleNet V1 (three groups) and V2 (width 1) for 32x32 images, registered with timm.

Zhang et al., "ShuffleNet", CVPR 2018, and Ma et al., "ShuffleNet V2", ECCV 2018, with a 1x1 stem of
stride 1 and no pooling behind it. Module names agree with the checkpoints of the CRD benchmark
(`layer1.0.conv1`, `linear`), so those load by name. Weights are drawn as the library draws them.
"""

from __future__ import annotations

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from kdfast.models.cifar_base import CifarNetwork, default_cfg

_STEM = 24


class ShuffleUnit(nn.Module):
    """Unit of V1: grouped 1x1 conv, shuffle, depthwise 3x3 conv, grouped 1x1 conv; shortcut; ReLU.

    [N,in_chs,H,W] -> [N,chs,H/stride,W/stride]. With stride 2 the branch has chs - in_chs channels
    and is concatenated with the averaged input; else it is added to the input. `act3:in` is what
    the final ReLU takes.
    """

    def __init__(self, in_chs: int, chs: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        own = chs - in_chs if stride == 2 else chs
        mid = own // 4
        self.conv1 = nn.Conv2d(in_chs, mid, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.act1 = nn.ReLU(inplace=True)
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=stride, padding=1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(mid, own, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(own)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.shuffle(self.act1(self.bn1(self.conv1(x))))
        own = self.act2(self.bn2(self.conv2(own)))
        own = self.bn3(self.conv3(own))
        own = own + x if self.pool is None else torch.cat([own, self.pool(x)], 1)
        return self.act3(own)


class SplitUnit(nn.Module):
    """Unit of V2: half of the channels pass, half go through 1x1, depthwise 3x3, 1x1; shuffle.

    [N,chs,H,W] -> [N,chs,H,W].
    """

    def __init__(self, chs: int) -> None:
        super().__init__()
        half = chs // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.act3 = nn.ReLU(inplace=True)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passing, own = x.chunk(2, 1)
        own = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(own)))))
        own = self.act3(self.bn3(self.conv3(own)))
        return self.shuffle(torch.cat([passing, own], 1))


class DownUnit(nn.Module):
    """Unit of V2 that halves the size: two branches, each of half the channels; shuffle.

    [N,in_chs,H,W] -> [N,chs,H/2,W/2]: depthwise 3x3 and 1x1 convs; 1x1, depthwise 3x3, 1x1 convs.
    """

    def __init__(self, in_chs: int, chs: int) -> None:
        super().__init__()
        half = chs // 2
        self.conv1 = nn.Conv2d(in_chs, in_chs, 3, stride=2, padding=1, groups=in_chs, bias=False)
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv2 = nn.Conv2d(in_chs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(in_chs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.act3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.act5 = nn.ReLU(inplace=True)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.act2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.act3(self.bn3(self.conv3(x)))))
        right = self.act5(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat([left, right], 1))


class _ShuffleNet(CifarNetwork):
    """1x1 stem of 24 at full size and three stages at 1/2, 1/4 and 1/8; any H, W will do."""

    head = "linear"
    widths: tuple[int, int, int]
    depths: tuple[int, int, int]

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": _STEM, "reduction": 1, "module": "act1"}]
        in_chs = _STEM
        for i, (chs, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            name = f"layer{i + 1}"
            self.add_module(name, self.stage(in_chs, chs, depth))
            self.feature_info.append({"num_chs": chs, "reduction": 2 ** (i + 1), "module": name})
            in_chs = chs
        self.add_head(self.add_last(in_chs), num_classes, global_pool, drop_rate)

    def add_last(self, chs: int) -> int:
        """Register what lies between the last stage and the pool; returns its channels."""
        return chs

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


class CifarShuffleNetV1(_ShuffleNet):
    """Stages of 240, 480 and 960 channels in 4, 8 and 4 units of three groups.

    The 1x1 conv behind the stem has one group.
    """

    widths, depths = (240, 480, 960), (4, 8, 4)

    def stage(self, in_chs: int, chs: int, depth: int) -> nn.Sequential:
        units = [ShuffleUnit(in_chs, chs, 2, 3, 1 if in_chs == _STEM else 3)]
        units += [ShuffleUnit(chs, chs, 1, 3, 3) for _ in range(depth - 1)]
        return nn.Sequential(*units)


class CifarShuffleNetV2(_ShuffleNet):
    """Stages of 116, 232 and 464 channels in 4, 8 and 4 units; 1x1 conv to 1024."""

    widths, depths = (116, 232, 464), (4, 8, 4)

    def stage(self, in_chs: int, chs: int, depth: int) -> nn.Sequential:
        return nn.Sequential(DownUnit(in_chs, chs), *(SplitUnit(chs) for _ in range(depth - 1)))

    def add_last(self, chs: int) -> int:
        self.conv2 = nn.Conv2d(chs, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.act2 = nn.ReLU(inplace=True)
        return 1024

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.act2(self.bn2(self.conv2(super().forward_features(x))))


_CLASSES = {"cifar_shufflenetv1": CifarShuffleNetV1, "cifar_shufflenetv2": CifarShuffleNetV2}
default_cfgs = generate_default_cfgs({name: default_cfg("linear", 4) for name in _CLASSES})


def _create(variant: str, pretrained: bool, **kwargs) -> _ShuffleNet:
    return build_model_with_cfg(
        _CLASSES[variant],
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **kwargs,
    )


@register_model
def cifar_shufflenetv1(pretrained: bool = False, **kwargs) -> CifarShuffleNetV1:
    return _create("cifar_shufflenetv1", pretrained, **kwargs)


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **kwargs) -> CifarShuffleNetV2:
    return _create("cifar_shufflenetv2", pretrained, **kwargs)
