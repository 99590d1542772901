"""MobileNetV2 of half width for 32x32 images, registered with timm.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, with stride 1
in its second stage: 32x32 images are halved four times, to 2x2. Modules are registered in the order
of the CRD benchmark's checkpoints, which load by it.
"""

from __future__ import annotations

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from kdfast.models.cifar_base import CifarNetwork, default_cfg, init_kaiming, init_small_head

# Expansion, width before halving, blocks, stride of the first: a row a stage.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# Stages whose outputs are features: the second, and the last at each further resolution.
_FEATURES = (1, 2, 4, 6)


class InvertedResidual(nn.Module):
    """1x1 conv, BN, ReLU, depthwise 3x3 conv, BN, ReLU, 1x1 conv, BN, plus shortcut; linear end.

    [N,in_chs,H,W] -> [N,chs,H/stride,W/stride], in_chs * expansion within; the shortcut is there
    where shapes allow it.
    """

    def __init__(self, in_chs: int, chs: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid = in_chs * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(in_chs, mid, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, mid, 3, stride=stride, padding=1, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, chs, 1, bias=False),
            nn.BatchNorm2d(chs),
        )
        self.residual = stride == 1 and in_chs == chs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class CifarMobileNetV2(CifarNetwork):
    """Stem of stride 2, seven stages of inverted residuals, 1x1 conv to 1280, pool, linear.

    Features: the stem after its ReLU (16 channels at 1/2), then the signed outputs of `blocks.1`
    (12 at 1/2), `blocks.2` (16 at 1/4), `blocks.4` (48 at 1/8) and `blocks.6` (160 at 1/16). Any
    H, W will do. Convolutions are drawn from N(0, 2 / (k^2 * out)), the linear layer from
    N(0, 0.01^2), bias 0.
    """

    head = "classifier"

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        in_chs = 16
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, in_chs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(in_chs),
            nn.ReLU(inplace=True),
        )
        self.feature_info = [{"num_chs": in_chs, "reduction": 2, "module": "conv1"}]
        self.blocks = nn.Sequential()
        reduction = 2
        for i, (expansion, width, depth, stride) in enumerate(_STAGES):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(
                    InvertedResidual(in_chs, width // 2, stride if j == 0 else 1, expansion)
                )
                in_chs = width // 2
            self.blocks.append(stage)
            reduction *= stride
            if i in _FEATURES:
                entry = {"num_chs": in_chs, "reduction": reduction, "module": f"blocks.{i}"}
                self.feature_info.append(entry)
        self.conv2 = nn.Sequential(
            nn.Conv2d(in_chs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU(inplace=True)
        )
        self.add_head(1280, num_classes, global_pool, drop_rate)
        init_kaiming(self)

    def init_head(self, linear: nn.Linear) -> None:
        init_small_head(linear)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.blocks(self.conv1(x)))


default_cfgs = generate_default_cfgs(
    {"cifar_mobilenetv2_half": default_cfg("classifier", 2, "conv1.0")}
)


@register_model
def cifar_mobilenetv2_half(pretrained: bool = False, **kwargs) -> CifarMobileNetV2:
    return build_model_with_cfg(
        CifarMobileNetV2,
        "cifar_mobilenetv2_half",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": "hook"},
        **kwargs,
    )
