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
    `rkrc` (timm's random resized crop, and the one that keeps the ratio), `crop` (resize to
    `resize` x `resize`, 8/7 of the image size where it is None, and cut the image size out) or
    `none` (resize only). The others than `rrc` and `rkrc` then flip, turn by up to `rotation`
    degrees and change colours, in this order.
    """

    crop: str = "pad"
    padding: int = 4
    padding_mode: str = "constant"
    hflip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    color_jitter: float = 0.0
    hue_jitter: float = 0.0
    vflip: float = 0.0
    rotation: float = 0.0
    resize: int | None = None
    auto_augment: str | None = None


def train_transform(
    size: tuple[int, int], augmentation: Augmentation, interpolation: str, native: int | None
) -> Callable[[Image.Image], torch.Tensor]:
    """The training pipeline to height and width `size`; `native` is the set's own side or None."""
    from timm.data import create_transform
    from timm.data.transforms import str_to_interp_mode
    from torchvision.transforms import v2

    jitter = augmentation.color_jitter
    if augmentation.hue_jitter > 0.5:
        raise UsageError(f"--hue-jitter goes up to 0.5, got {augmentation.hue_jitter:g}")
    if augmentation.resize and augmentation.crop != "crop":
        raise UsageError("--train-resize needs --train-crop-mode crop")
    if augmentation.crop in ("rrc", "rkrc"):
        if augmentation.hue_jitter and augmentation.auto_augment:
            raise UsageError("--hue-jitter has no effect with --aa, which changes colours itself")
        if augmentation.rotation:
            raise UsageError("--rotation needs --train-crop-mode crop, pad or none")
        if augmentation.hue_jitter:
            jitter = (jitter, jitter, jitter, augmentation.hue_jitter)
        try:
            pipeline = create_transform(
                (3, *size),
                is_training=True,
                train_crop_mode=augmentation.crop,
                scale=augmentation.scale,
                ratio=augmentation.ratio,
                hflip=augmentation.hflip,
                vflip=augmentation.vflip,
                color_jitter=jitter or None,
                auto_augment=augmentation.auto_augment,
                interpolation=interpolation,
                normalize=False,
            )
        except (AssertionError, ValueError) as error:
            raise UsageError(f"--aa {augmentation.auto_augment}: {error}") from None
        return _Pipeline(pipeline)
    if augmentation.auto_augment:
        raise UsageError("--aa needs --train-crop-mode rrc or rkrc")
    steps: list[Callable] = []
    mode = str_to_interp_mode(interpolation)
    if augmentation.crop == "crop":
        steps += _resize_and_cut(size, augmentation.resize, mode)
    elif size != (native, native):
        steps.append(v2.Resize(size, mode))
    if augmentation.crop == "pad" and augmentation.padding:
        fill = augmentation.padding_mode
        steps.append(v2.RandomCrop(size, augmentation.padding, padding_mode=fill))
    if augmentation.hflip:
        steps.append(v2.RandomHorizontalFlip(augmentation.hflip))
    if augmentation.vflip:
        steps.append(v2.RandomVerticalFlip(augmentation.vflip))
    if augmentation.rotation:
        steps.append(v2.RandomRotation(augmentation.rotation, mode))
    if jitter or augmentation.hue_jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter, augmentation.hue_jitter))
    return _Pipeline(v2.Compose(steps) if steps else None)


def _resize_and_cut(size: tuple[int, int], resize: int | None, mode: object) -> list[Callable]:
    """Both sides to `resize` pixels, 8/7 of `size` where it is None, and `size` cut out of it."""
    from torchvision.transforms import v2

    larger = (resize, resize) if resize else tuple(round(side * 8 / 7) for side in size)
    if min(larger) < max(size):
        raise UsageError(f"--train-resize {resize} is smaller than the {max(size)} pixels cut out")
    return [v2.Resize(larger, mode), v2.RandomCrop(size)]


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
