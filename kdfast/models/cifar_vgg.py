"""VGG with batch normalisation for 32x32 images, registered with timm.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, with one linear layer. Module names agree with the checkpoints of the CRD benchmark
(`block0.0`, `block0.1`, `classifier`), so those load by name.
"""

from __future__ import annotations

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from kdfast.models.cifar_base import (
    CifarNetwork,
    choose,
    default_cfg,
    init_kaiming,
    init_small_head,
)

# What "crd" networks pool after their fourth block: maps of 64x64 images, not those of 32x32 ones.
_LARGE = 8


class LargeMapPool(nn.MaxPool2d):
    """Halves [N,C,H,W] where H and W are at least `least`; hands smaller maps on as they are."""

    def __init__(self, least: int) -> None:
        super().__init__(2)
        self.least = least

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if min(x.shape[-2:]) >= self.least else x


def _block(in_chs: int, widths: tuple[int, ...]) -> nn.Sequential:
    """3x3 conv with bias, BN, ReLU for each width: [N,in_chs,H,W] -> [N,widths[-1],H,W]."""
    layers = []
    for chs in widths:
        layers += [nn.Conv2d(in_chs, chs, 3, padding=1), nn.BatchNorm2d(chs), nn.ReLU(inplace=True)]
        in_chs = chs
    return nn.Sequential(*layers)


class CifarVGG(CifarNetwork):
    """Five blocks of convs and one linear layer.

    Form "crd": 2x2 max-pooling after the first three blocks, and after the fourth where its maps
    are at least 8x8 (64x64 images). Its features are the blocks' outputs before pooling, `block0`
    (the stem) to `block4`; at 32x32: 32, 16, 8, 4, 4. Any H, W >= 8 will do.

    Form "dih", that of the intermediate-classifier study: a pool ends every block, and its features
    are the outputs of `block0` to `block3` after their pools; at 32x32: 16, 8, 4, 2. The stem is
    the first block before its pool. Any H, W >= 32 will do.

    Convolutions are drawn from N(0, 2 / (k^2 * out)), the linear layer from N(0, 0.01^2); biases
    are 0.

    Args:
        blocks: widths of the convs of each block.

    Raises:
        ValueError: another `form`.
    """

    head = "classifier"

    def __init__(
        self,
        blocks: tuple[tuple[int, ...], ...],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        form: str = "crd",
    ) -> None:
        super().__init__()
        self.pools_inside = choose("form", form, ("crd", "dih")) == "dih"
        in_chs = in_chans
        for i, widths in enumerate(blocks):
            block = _block(in_chs, widths)
            in_chs = widths[-1]
            self.add_module(f"block{i}", block)
            if self.pools_inside:
                block.append(nn.MaxPool2d(2))
            elif i < 4:
                self.add_module(f"pool{i}", LargeMapPool(_LARGE) if i == 3 else nn.MaxPool2d(2))
        self.feature_info = self._describe(blocks)
        self.add_head(in_chs, num_classes, global_pool, drop_rate)
        init_kaiming(self)

    def _describe(self, blocks: tuple[tuple[int, ...], ...]) -> list[dict[str, object]]:
        widths = [block[-1] for block in blocks]
        if self.pools_inside:
            stem = {
                "num_chs": widths[0],
                "reduction": 1,
                "module": f"block0.{len(self.block0) - 2}",
            }
            return [stem] + [
                {"num_chs": chs, "reduction": 2 ** (i + 1), "module": f"block{i}"}
                for i, chs in enumerate(widths[:-1])
            ]
        return [
            {"num_chs": chs, "reduction": 2 ** min(i, 3), "module": f"block{i}"}
            for i, chs in enumerate(widths)
        ]

    def init_head(self, linear: nn.Linear) -> None:
        init_small_head(linear)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if self.pools_inside:
            return self.block4(self.block3(self.block2(self.block1(self.block0(x)))))
        x = self.pool1(self.block1(self.pool0(self.block0(x))))
        return self.block4(self.pool3(self.block3(self.pool2(self.block2(x)))))


_VARIANTS = {
    "cifar_vgg8": ((64,), (128,), (256,), (512,), (512,)),
    "cifar_vgg11": ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    "cifar_vgg13": ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
}
default_cfgs = generate_default_cfgs(
    {name: default_cfg("classifier", 4, "block0.0") for name in _VARIANTS}
)


def _create(variant: str, pretrained: bool, **kwargs) -> CifarVGG:
    return build_model_with_cfg(
        CifarVGG,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": "hook"},
        **{"blocks": _VARIANTS[variant]} | kwargs,
    )


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs) -> CifarVGG:
    return _create("cifar_vgg8", pretrained, **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs) -> CifarVGG:
    return _create("cifar_vgg11", pretrained, **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs) -> CifarVGG:
    return _create("cifar_vgg13", pretrained, **kwargs)
