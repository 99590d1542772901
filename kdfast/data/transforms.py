"""Image pipelines: PIL image in, uint8 tensor [3, H, W] out; normalisation is the device's work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from kdfast.errors import UsageError


@dataclass(frozen=True)
class Augmentation:
    """Training-time augmentation.

    `crop` is `pad` (pad by `padding`, cut the image size back out, as on 32-pixel sets), `rrc` or
    `rkrc` (timm's random resized crop, and the one that keeps the ratio) or `none` (resize only).
    """

    crop: str = "pad"
    padding: int = 4
    padding_mode: str = "constant"
    hflip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    color_jitter: float = 0.0
    auto_augment: str | None = None


def train_transform(
    size: tuple[int, int], augmentation: Augmentation, interpolation: str, native: int | None
) -> Callable[[Image.Image], torch.Tensor]:
    """The training pipeline to height and width `size`; `native` is the set's own side or None."""
    from timm.data import create_transform
    from timm.data.transforms import str_to_interp_mode
    from torchvision.transforms import v2

    if augmentation.crop in ("rrc", "rkrc"):
        try:
            pipeline = create_transform(
                (3, *size),
                is_training=True,
                train_crop_mode=augmentation.crop,
                scale=augmentation.scale,
                ratio=augmentation.ratio,
                hflip=augmentation.hflip,
                color_jitter=augmentation.color_jitter or None,
                auto_augment=augmentation.auto_augment,
                interpolation=interpolation,
                normalize=False,
            )
        except (AssertionError, ValueError) as error:
            raise UsageError(f"--aa {augmentation.auto_augment}: {error}") from None
        return _Pipeline(pipeline)
    if augmentation.auto_augment or augmentation.color_jitter:
        raise UsageError("--aa and --color-jitter need --train-crop-mode rrc or rkrc")
    steps: list[Callable] = []
    if size != (native, native):
        steps.append(v2.Resize(size, str_to_interp_mode(interpolation)))
    if augmentation.crop == "pad" and augmentation.padding:
        mode = augmentation.padding_mode
        steps.append(v2.RandomCrop(size, augmentation.padding, padding_mode=mode))
    if augmentation.hflip:
        steps.append(v2.RandomHorizontalFlip(augmentation.hflip))
    return _Pipeline(v2.Compose(steps) if steps else None)


def eval_transform(
    size: tuple[int, int],
    crop_pct: float,
    interpolation: str,
    native: int | None,
    crop_mode: str = "center",
) -> Callable[[Image.Image], torch.Tensor]:
    """The evaluation pipeline: as is at the native size, else resized to 1 / `crop_pct` and cut.

    `crop_mode` is timm's: `center` keeps the ratio and resizes the shorter side, `squash` resizes
    both sides without keeping it, `border` keeps it, resizes the longer side and fills up.
    """
    from timm.data import create_transform

    if size == (native, native):
        return _Pipeline(None)
    if native is not None:
        crop_pct = 1.0
    pipeline = create_transform(
        (3, *size),
        is_training=False,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=interpolation,
        normalize=False,
    )
    return _Pipeline(pipeline)


class _Pipeline:
    """RGB, then the steps, then uint8 [3, H, W]."""

    def __init__(self, steps: Callable | None):
        self.steps = steps

    def __call__(self, image: Image.Image) -> torch.Tensor:
        from torchvision.transforms.v2.functional import pil_to_tensor

        image = image.convert("RGB")
        if self.steps is not None:
            image = self.steps(image)
        return image if isinstance(image, torch.Tensor) else pil_to_tensor(image)


def to_float(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(images / 255 - mean) / std for uint8 [N, 3, H, W]; mean and std are [1, 3, 1, 1]."""
    return (images.float() - 255 * mean) * (1 / (255 * std))
