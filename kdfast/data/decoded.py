"""Sets of image files that are small enough: decoded once, then read from memory."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from kdfast.data.sources import ImageData, Source

_SAMPLE = 256


def keep_decoded(data: ImageData, budget: int) -> ImageData:
    """`data` with its training images, then its evaluation images, decoded once and kept.

    A split is kept whole where its images, as uint8 RGB, take no more than what is left of `budget`
    bytes; `data` itself comes back when that is none. Test images are read too seldom. Sizes are
    those in the files' headers: nothing is decoded before it is read.
    """
    kept = {}
    for key in () if data.in_memory else ("train", "eval"):
        source = getattr(data, key)
        sizes = _sizes(source, budget)
        if sizes is None:
            break
        try:
            kept[key] = Decoded(source, sizes)
        except (OSError, OverflowError, ValueError):  # the system has no such memory
            break
        budget -= kept[key].nbytes
    return replace(data, **kept) if kept else data


def _sizes(source: Source, budget: int) -> list[tuple[int, int]] | None:
    """Width and height of every image; None where they are not told or exceed `budget` bytes."""
    count = len(source)
    sizes: list[tuple[int, int]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, which come again when the image is read
        sample = [source.size(i) for i in range(0, count, max(1, count // _SAMPLE))]
        told = [size for size in sample if size is not None]
        # Spares counting a set that is far too large.
        if len(told) < len(sample) or _bytes(told) / len(told) * count > 2 * budget:
            return None
        for i in range(count):
            sizes.append(source.size(i) or (0, 0))
            budget -= _bytes(sizes[-1:])
            if budget < 0:
                return None
    return sizes


def _bytes(sizes: Sequence[tuple[int, int]]) -> int:
    return sum(3 * width * height for width, height in sizes)


class Decoded:
    """`source` with the pixels of every image kept from its first reading on, as uint8 RGB.

    They are in anonymous shared memory: loader processes forked from this one fill and read one
    copy, memory is taken only as it fills, and it goes with the last process that has it. An image
    counts as there once it is whole, and no two processes read the same one at a time, since none
    comes twice in an epoch. A process that is started otherwise gets `source` itself. `sizes` are
    [width, height] by the headers; an image of another size is read from its file every time.
    """

    def __init__(self, source: Source, sizes: Sequence[tuple[int, int]]):
        self.source, self.sizes = source, sizes
        self._labels = source.labels()
        self._starts = np.cumsum([0, *(_bytes([size]) for size in sizes)]).tolist()
        self.nbytes = self._starts[-1]
        self._store = mmap.mmap(-1, self.nbytes + len(sizes))
        self._pixels = np.frombuffer(self._store, np.uint8, self.nbytes)
        self._whole = np.frombuffer(self._store, np.uint8, offset=self.nbytes)

    def __len__(self) -> int:
        return len(self.source)

    def __reduce__(self):
        return _itself, (self.source,)

    def read(self, index: int) -> tuple[Image.Image, int]:
        width, height = self.sizes[index]
        place = self._pixels[self._starts[index] : self._starts[index + 1]]
        place = place.reshape(height, width, 3)
        if self._whole[index]:
            return Image.fromarray(place), self._labels[index]
        image, label = self.source.read(index)
        if image.size == (width, height):
            image = image.convert("RGB")
            place[:] = np.asarray(image)
            self._whole[index] = 1
        return image, label

    def labels(self) -> list[int]:
        return list(self._labels)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]


def _itself(source: Source) -> Source:
    return source
