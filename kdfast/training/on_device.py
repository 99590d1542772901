"""Whether a set's images are kept on the training device and augmented there, or by workers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdfast.data import (
    BatchPlan,
    CropFlip,
    ImageData,
    Loader,
    ResidentImages,
    ResidentLoader,
    Source,
    has_size,
)
from kdfast.data.transforms import Transform
from kdfast.errors import UsageError, UserError
from kdfast.training.image_cache import free_memory
from kdfast.training.journal import note

_MIB = 2**20
AnyLoader = Loader | ResidentLoader


@dataclass(frozen=True)
class Part:
    """The images of a split, which is called `split`, and how they become batches.

    An `augmented` split goes through a transform that may draw, another through a fixed one.
    """

    split: str
    source: Source
    transform: Transform
    plan: BatchPlan
    augmented: bool

    def crop(self, size: tuple[int, int]) -> CropFlip | None:
        """What the transform does to images of `size`, where a crop and a flip are all of it."""
        if isinstance(self.transform, CropFlip):
            return self.transform
        fixed = not self.augmented and self.transform.leaves_alone(size)
        return CropFlip(size) if fixed else None


def loaders(
    options: argparse.Namespace,
    data: ImageData,
    parts: Sequence[Part],
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    **settings: Any,
) -> list[AnyLoader]:
    """A loader for each of `parts`, on the device as far as --on-device has it.

    The network is fed images of height and width `size`, normalised by `mean` and `std`.
    `settings` are those of `Loader`. Every process has a copy and its share of the memory. Raises
    `UsageError` for images that the device cannot do, `UserError` for those that do not fit, where
    they have to.
    """
    always = options.on_device == "always"
    budget = device_memory(device) // (1 if always else 4)
    made: list[AnyLoader] = []
    for part in parts:
        workers = Loader(part.source, part.transform, part.plan, **settings)
        if options.on_device == "never":
            made.append(workers)
            continue
        images = ResidentImages(
            part.source, size, device, classes=data.classes, workers=settings["workers"]
        )
        obstacle = _obstacle(part, images, data, budget)
        if obstacle and always:
            raise type(obstacle)(f"--on-device always: {obstacle}")
        if obstacle:
            note(f"{part.split} images come through the host ({obstacle})")
            made.append(workers)
            continue
        budget -= images.missing
        note(
            f"{len(part.source)} {part.split} images are kept on the device ({device}), "
            f"{images.nbytes / _MIB:.1f} MiB"
        )
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        made.append(
            ResidentLoader(
                images, part.crop(size), part.plan, mean=mean, std=std, memory_format=layout
            )
        )
    return made


def _obstacle(part: Part, images: ResidentImages, data: ImageData, budget: int) -> UserError | None:
    """What keeps `images` from the device."""
    height, width = images.size
    if part.augmented and part.crop(images.size) is None:
        return UsageError(
            "only crops and flips are done there: --train-crop-mode pad or none, --hflip 0 or 0.5 "
            "and, with --padding-mode reflect, less --crop-padding than the image has pixels"
        )
    if images.missing > budget:
        return UserError(
            f"the {part.split} images of {data.name} take {images.missing / _MIB:.1f} MiB, more "
            f"than the {max(0, budget) / _MIB:.1f} MiB there for them; give --on-device never"
        )
    fits = has_size(part.source, images.size)
    if fits is None:
        return UsageError(f"{data.name} is read by its library, not from image files")
    if not fits:
        return UsageError(
            f"the {part.split} images of {data.name} are not all of {width}x{height} pixels"
        )
    # Last: to see it, an image is made and sent through the pipeline.
    if part.crop(images.size) is None:
        return UsageError(
            f"{part.split} images of {width}x{height} pixels would be resized or cut; "
            "--crop-pct 1 leaves them as they are"
        )
    return None


def device_memory(device: torch.device) -> int:
    """Bytes of the device that this process may count on: the free ones, shared with the others."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda":
        return free_memory() // local
    free, _ = torch.cuda.mem_get_info(device)
    return free // -(-local // torch.cuda.device_count())
