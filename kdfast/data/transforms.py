"""Image pipelines: PIL image in, uint8 tensor [3, H, W] out; normalisation is the device's work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from kdfast.errors import UsageError
from kdfast.ops import Key
from kdfast.ops.reference.augment import draw_one


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

    @property
    def random(self) -> bool:
        """Whether an image may come out differently in another epoch."""
        return (
            self.crop in ("rrc", "rkrc", "crop")
            or (self.crop == "pad" and self.padding > 0)
            or any(0 < flip < 1 for flip in (self.hflip, self.vflip))
            or bool(self.rotation or self.color_jitter or self.hue_jitter or self.auto_augment)
        )


def train_transform(
    size: tuple[int, int], augmentation: Augmentation, interpolation: str, native: int | None
) -> Transform:
    """The training pipeline to height and width `size`; `native` is the set's own side or None."""
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
        from timm.data import create_transform

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
        return Pipeline(pipeline)
    if augmentation.auto_augment:
        raise UsageError("--aa needs --train-crop-mode rrc or rkrc")
    if _is_crop_flip(size, augmentation):
        padding = augmentation.padding if augmentation.crop == "pad" else 0
        resize = None if size == (native, native) else _resize(size, interpolation)
        reflect = augmentation.padding_mode == "reflect"
        return CropFlip(size, padding, reflect=reflect, flip=augmentation.hflip > 0, resize=resize)
    from timm.data.transforms import str_to_interp_mode
    from torchvision.transforms import v2

    steps: list[Callable] = []
    mode = str_to_interp_mode(interpolation)
    if augmentation.crop == "crop":
        steps += _resize_and_cut(size, augmentation.resize, mode)
    elif size != (native, native):
        steps.append(_resize(size, interpolation))
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
    return Pipeline(v2.Compose(steps) if steps else None)


def _is_crop_flip(size: tuple[int, int], augmentation: Augmentation) -> bool:
    """Whether `CropFlip` does all of `augmentation`, which is not timm's."""
    colours = augmentation.color_jitter or augmentation.hue_jitter
    mirrors = augmentation.crop == "pad" and augmentation.padding_mode == "reflect"
    return (
        augmentation.crop in ("pad", "none")
        and augmentation.hflip in (0, 0.5)
        and not (colours or augmentation.vflip or augmentation.rotation)
        and not (mirrors and augmentation.padding >= min(size))
    )


def _resize(size: tuple[int, int], interpolation: str) -> Callable[[Image.Image], Image.Image]:
    from timm.data.transforms import str_to_interp_mode
    from torchvision.transforms import v2

    return v2.Resize(size, str_to_interp_mode(interpolation))


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
) -> Pipeline:
    """The evaluation pipeline: as is at the native size, else resized to 1 / `crop_pct` and cut.

    `crop_mode` is timm's: `center` keeps the ratio and resizes the shorter side, `squash` resizes
    both sides without keeping it, `border` keeps it, resizes the longer side and fills up.
    """
    if size == (native, native):
        return Pipeline(None)
    if native is not None:
        crop_pct = 1.0
    from timm.data import create_transform

    pipeline = create_transform(
        (3, *size),
        is_training=False,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=interpolation,
        normalize=False,
    )
    return Pipeline(pipeline)


class Pipeline:
    """RGB, then the steps, then uint8 [3, H, W]; what is drawn comes from global generators."""

    def __init__(self, steps: Callable | None):
        self.steps = steps

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB")
        if self.steps is not None:
            image = self.steps(image)
        return image if isinstance(image, torch.Tensor) else _tensor(np.asarray(image))

    def leaves_alone(self, size: tuple[int, int]) -> bool:
        """Whether images of height and width `size` come out as they are; for fixed steps."""
        if self.steps is None:
            return True
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        return torch.equal(self(Image.fromarray(noise)), _tensor(noise))


class CropFlip:
    """RGB, then `kdfast.ops.crop_flip` without its normalisation: uint8 [3, H, W].

    Called with an image, the key of the epoch and the image's index, of which what is drawn is a
    pure function. `size` is height and width; images of another one go through `resize` first.
    With `reflect` the padding mirrors, and is smaller than the image; else it is black.
    """

    def __init__(
        self,
        size: tuple[int, int],
        padding: int = 0,
        *,
        reflect: bool = False,
        flip: bool = False,
        resize: Callable[[Image.Image], Image.Image] | None = None,
    ):
        self.size, self.padding, self.resize = size, padding, resize
        self.mode, self.flip = "reflect" if reflect else "zeros", flip

    def __call__(self, image: Image.Image, key: Key, index: int) -> torch.Tensor:
        image = image.convert("RGB")
        if self.resize is not None:
            image = self.resize(image)
        pixels, padding = np.asarray(image), self.padding
        height, width, _ = pixels.shape
        top, left, flipped = draw_one(index, key, padding, self.flip)
        if padding:
            mode = "reflect" if self.mode == "reflect" else "constant"
            pixels = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)), mode)
            top, left = top + padding, left + padding
            pixels = pixels[top : top + height, left : left + width]
        return _tensor(pixels[:, ::-1] if flipped else pixels)


# What a loader takes: a pipeline of its own randomness, or one that is keyed.
Transform = Callable[[Image.Image], torch.Tensor] | CropFlip


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [3, H, W] of pixels [H, W, 3]."""
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)


def to_float(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(images / 255 - mean) / std for uint8 [N, 3, H, W]; mean and std are [1, 3, 1, 1]."""
    return (images.float() - 255 * mean) * (1 / (255 * std))


class Normalise:
    """(images / 255 - mean) / std for uint8 [N, 3, H, W] on `device`, to the bit of `crop_flip`.

    mean and std are three each, std positive. Constants are rounded once, from float64.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.shift, self.scale = (
            torch.tensor(values, dtype=torch.float64).float().view(1, 3, 1, 1).to(device)
            for values in ([255 * m for m in mean], [1 / (255 * s) for s in std])
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.shift) * self.scale
