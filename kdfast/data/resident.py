"""Image sets that fit: uint8 images once on the training device, cropped and flipped there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image

from kdfast import ops
from kdfast.data.decoded import Decoded
from kdfast.data.loader import Batch, BatchPlan, Loader, wrong_label
from kdfast.data.sources import ArraySource, Source, Subset
from kdfast.data.transforms import CropFlip
from kdfast.ops import Key

_READ_AT_ONCE = 64  # images
# Pixels and labels by source and device: networks trained one after the other share them.
_kept: WeakKeyDictionary[Source, dict[torch.device, tuple[torch.Tensor, torch.Tensor]]]
_kept = WeakKeyDictionary()


class ResidentImages:
    """All images of `source`, height and width `size`, on `device`; there once they are asked for.

    Images in files are read by so many `workers`. `classes` bounds the labels.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        device: torch.device,
        *,
        classes: int,
        workers: int = 0,
    ):
        self.source, self.size, self.device = source, size, device
        self.classes, self.workers = classes, workers

    @property
    def nbytes(self) -> int:
        """What they take as uint8 RGB."""
        return 3 * len(self.source) * self.size[0] * self.size[1]

    @property
    def missing(self) -> int:
        """Bytes that `load` has yet to take: none for what is there or can serve where it lies."""
        there = self.device in _kept.get(self.source, ())
        return 0 if there or self._in_place() is not None else self.nbytes

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [n, H, W, 3] and int64 labels [n], both on the device.

        Raises `UserError` naming an image that cannot be read or has a label outside the classes.
        """
        kept = _kept.setdefault(self.source, {})
        if self.device not in kept:
            array = _array_of(self.source)
            kept[self.device] = self._read() if array is None else self._moved(array)
        return kept[self.device]

    def _in_place(self) -> np.ndarray | None:
        """The pixels in the source's own memory, where that is the device's and they are RGB."""
        array = _array_of(self.source, copy=False) if self.device.type == "cpu" else None
        fits = array is not None and array.ndim == 4 and array.flags.c_contiguous
        return array if fits and array.flags.writeable else None

    def _moved(self, array: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        labels = self.source.labels()
        for index, label in enumerate(labels):
            if not 0 <= label < self.classes:
                raise wrong_label(self.source, index, label, self.classes)
        # torch takes no array that may not be written to.
        pixels = torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device)
        if pixels.dim() == 3:
            pixels = pixels.unsqueeze(3).expand(-1, -1, -1, 3)
        return pixels.contiguous(), torch.tensor(labels).to(self.device)

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        # What is decoded for the device need not be kept on the host as well.
        source = self.source.source if isinstance(self.source, Decoded) else self.source
        count = len(source)
        pixels = torch.empty((count, *self.size, 3), dtype=torch.uint8, device=self.device)
        labels = torch.empty(count, dtype=torch.int64, device=self.device)
        plan = BatchPlan(count, _READ_AT_ONCE)
        loader = Loader(source, _Whole(self.size), plan, classes=self.classes, workers=self.workers)
        try:
            start = 0
            for batch in loader.epoch(0):
                place = slice(start, start + len(batch.labels))
                pixels[place] = batch.images.permute(0, 2, 3, 1).to(self.device)
                labels[place] = batch.labels.to(self.device)
                start = place.stop
        finally:
            loader.close()
        return pixels, labels


class _Whole(CropFlip):
    """The image itself, which must have the size."""

    def __call__(self, image: Image.Image, key: Key, index: int) -> torch.Tensor:
        height, width = self.size
        if image.size != (width, height):
            raise ValueError(f"it has {image.width}x{image.height} pixels, not {width}x{height}")
        return super().__call__(image, key, index)


class ResidentLoader:
    """Batches of `images` as `plan` cuts them, with the interface of `Loader`.

    `Batch.images` are float32 on the device in `memory_format`, cropped and flipped as `crop` says
    and normalised by `mean` and `std`; labels and indices are there, too. They are, to the bit,
    what `Loader` with `crop` and `Normalise` give.
    """

    def __init__(
        self,
        images: ResidentImages,
        crop: CropFlip,
        plan: BatchPlan,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.images, self.crop, self.plan = images, crop, plan
        self.mean, self.std, self.memory_format = list(mean), list(std), memory_format

    def close(self) -> None:
        """Nothing to end: there are no worker processes, and other loaders share the images."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Epoch `epoch`, or what is left of it after `first_step` steps.

        Raises `UserError` as `ResidentImages.load` does.
        """
        pixels, labels = self.images.load()
        portions = self.plan.portions(epoch, first_step)
        sizes = [len(portion.indices) for portion in portions]
        # One copy an epoch: the device does not wait for the host in between.
        flat = [index for portion in portions for index in portion.indices]
        order = torch.tensor(flat, dtype=torch.int64, device=self.images.device)
        key = Key(self.plan.seed, "augment", epoch)
        parts = zip(portions, order.split(sizes), labels[order].split(sizes), strict=True)
        for portion, indices, its_labels in parts:
            images = ops.crop_flip(
                pixels,
                indices,
                key,
                self.mean,
                self.std,
                self.crop.padding,
                self.crop.mode,
                memory_format=self.memory_format,
                flip=self.crop.flip,
            )
            yield Batch(images, its_labels, indices, portion)


def has_size(source: Source, size: tuple[int, int]) -> bool | None:
    """Whether all images of `source` have height and width `size`.

    By the headers of image files; None where a library reads them, which does not tell.
    """
    whole = source
    while isinstance(whole, Subset):
        whole = whole.source
    if isinstance(whole, ArraySource):
        return whole.images.shape[1:3] == tuple(size)
    count, told = len(source), (size[1], size[0])
    if source.size(0) is None:
        return None
    # A few of all over the set first: most sets of other sizes end there.
    sample = range(0, count, max(1, count // 64))
    return all(source.size(i) == told for part in (sample, range(count)) for i in part)


def _array_of(source: Source, *, copy: bool = True) -> np.ndarray | None:
    """The images [n, H, W] or [n, H, W, 3] of sources in memory; None for others.

    Without `copy` also None for a subset that is not a stretch of its source.
    """
    if isinstance(source, ArraySource):
        return source.images
    if not isinstance(source, Subset):
        return None
    array, chosen = _array_of(source.source, copy=copy), source.indices
    if array is None:
        return None
    if isinstance(chosen, range) and chosen.step == 1:
        return array[chosen.start : chosen.stop]
    return array[list(chosen)] if copy else None
