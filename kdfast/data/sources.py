"""What an image set is made of: splits that read one image by its index.

Every source answers `len(source)`, `source.read(index) -> (PIL image, label)` and
`source.describe(index)`, the words an error uses for that image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from kdfast.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Source(Protocol):
    """One split of an image set."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image as stored (any mode) and its class index."""

    def describe(self, index: int) -> str:
        """What to call image `index` in an error."""


@dataclass(frozen=True)
class ImageData:
    """An opened image set.

    `image_size` is the native side in pixels, None when images vary; `mean` and `std` are per
    RGB channel in [0, 1], None when the set has no figures of its own.
    """

    name: str
    train: Source
    eval: Source
    classes: int
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    flip: bool = True
    in_memory: bool = False


class ArraySource:
    """Images held as uint8 [N, H, W] or [N, H, W, 3]."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], name: str):
        self.images, self.labels, self.name = images, [int(label) for label in labels], name

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"


class FolderSource:
    """torchvision's ImageFolder: one folder a class."""

    def __init__(self, root: Path):
        from torchvision.datasets import ImageFolder

        if not root.is_dir():
            raise UserError(
                f"no image folder at {root}; give --data-dir a folder with train/ and val/, "
                "each with one folder a class"
            )
        try:
            folder = ImageFolder(root)
        except FileNotFoundError as error:
            raise UserError(
                f"cannot use {root} as an image folder: {error}; it needs one folder a class with "
                "images inside"
            ) from None
        self.samples, self.class_names = folder.samples, folder.classes

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        with Image.open(path) as image:
            image.load()
        return image, label

    def describe(self, index: int) -> str:
        return self.samples[index][0]


class TimmSource:
    """A random-access set of `timm.data.create_dataset` (`torch/...`, `hfds/...`).

    timm's folder and Hugging Face sets are read through their reader: the set itself answers an
    unreadable image with the next one, which would train on the wrong label unseen.
    """

    def __init__(self, dataset, name: str):
        self.dataset, self.name = dataset, name
        self.reader = getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            return self.dataset[index]
        file, label = self.reader[index]
        with Image.open(file) as image:
            image.load()
        return image, label

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"


class FirstOf:
    """The first `count` images of a source, for trials."""

    def __init__(self, source: Source, count: int):
        self.source, self.count = source, count

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.source.read(index)

    def describe(self, index: int) -> str:
        return self.source.describe(index)
