"""What an image set is made of: splits that read one image by its index.

Every source answers `len(source)`, `source.read(index) -> (PIL image, label)`, `source.labels()`,
`source.describe(index)`, the words an error uses for that image, and `source.size(index)`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from kdfast.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What Pillow raises for damaged files of one format or another; `UnidentifiedImageError` is an
# OSError.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


# The names a user gave the splits for training, evaluation and testing.
Splits = tuple[str | None, str | None, str | None]


class Source(Protocol):
    """One split of an image set."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image as stored (any mode) and its class index.

        Raises one of `UNREADABLE` for a missing or damaged image.
        """

    def labels(self) -> list[int]:
        """The class indices of all images in order, a list of the caller's own.

        Decodes no image unless nothing else tells; raises `UserError` where that one is damaged.
        """

    def describe(self, index: int) -> str:
        """What to call image `index` in an error."""

    def size(self, index: int) -> tuple[int, int] | None:
        """Width and height by the header of an image file, 0 where it is damaged.

        None for images that are in memory already or read by a library.
        """


@dataclass(frozen=True)
class ImageData:
    """An opened image set.

    `eval` is the split that selects, among epochs for one; `test` never does, None when the set
    has no third split. `image_size` is the native side in pixels, None when images vary; `mean`
    and `std` are per RGB channel in [0, 1], None when the set has no figures of its own. `parts`
    are the indices of those images of `eval` that are scored apart, too, by the part's name.
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
    test: Source | None = None
    parts: Mapping[str, range] = field(default_factory=dict)


def lines_of(path: Path, remedy: str) -> list[str]:
    """The lines of text file `path`; where it cannot be read, a `UserError` ending in `remedy`."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"cannot read {path}: {reason}; {remedy}") from None


def missing_parts(place: Path, parts: Sequence[str]) -> list[str]:
    """Those of `parts` that are not in `place`; parts without a suffix are folders."""

    def there(path: Path) -> bool:
        return path.is_file() if path.suffix else path.is_dir()

    return [part for part in parts if not there(place / part)]


def find_root(places: Sequence[Path], parts: Sequence[str], remedy: str) -> Path:
    """The first of `places` that has all `parts`, which are those of `missing_parts`.

    Raises `UserError` naming what is missing, and where, ending in `remedy`.
    """
    best = min(places, key=lambda place: len(missing_parts(place, parts)))
    missing = missing_parts(best, parts)
    if not missing:
        return best
    where = best if len(missing) < len(parts) else " or ".join(map(str, places))
    raise UserError(f"no {missing[0]} in {where}; {remedy}")


def unreadable(source: Source, index: int, error: Exception) -> UserError:
    """The line for an image that `source.read(index)` failed on with `error`."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"cannot read {source.describe(index)}: {reason}; replace or remove the file")


class ArraySource:
    """Images held as uint8 [N, H, W] or [N, H, W, 3]."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], name: str):
        self.images, self.targets, self.name = images, [int(label) for label in labels], name

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]

    def labels(self) -> list[int]:
        return list(self.targets)

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"

    def size(self, index: int) -> None:
        return None


class FileSource:
    """Image files and their class indices; with `side`, every image must have side x side pixels.

    Files are decoded at every reading, by the loader's workers: a large set needs no memory
    (`keep_decoded` is for small ones).
    """

    def __init__(self, samples: Sequence[tuple[str, int]], side: int | None = None):
        self.samples, self.side = samples, side

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        with Image.open(path) as image:
            image.load()
        if self.side and image.size != (self.side, self.side):
            found, due = f"{image.width}x{image.height}", f"{self.side}x{self.side}"
            raise ValueError(f"it has {found} pixels, not {due} (--dataset folder takes any size)")
        return image, label

    def labels(self) -> list[int]:
        return [label for _, label in self.samples]

    def describe(self, index: int) -> str:
        return self.samples[index][0]

    def size(self, index: int) -> tuple[int, int]:
        if self.side:
            return self.side, self.side
        try:
            with Image.open(self.samples[index][0]) as image:
                return image.size
        except UNREADABLE:
            return 0, 0


class FolderSource(FileSource):
    """One folder a class, in the order of torchvision's ImageFolder: classes sorted, files too.

    `classes` are the folders to read, in the order of their indices; by default all.

    Raises `UserError` when there is no such folder, no class in it or no image in a class.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None, side: int | None = None):
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        if not root.is_dir():
            raise UserError(
                f"no image folder at {root}; give --data-dir a folder with train/ and val/, "
                "each with one folder a class"
            )
        self.class_names = list(classes or folders_in(root))
        if not self.class_names:
            raise UserError(
                f"{root} has no folders; it needs one folder a class with images inside"
            )
        indices = {name: i for i, name in enumerate(self.class_names)}
        super().__init__(make_dataset(root, indices, IMG_EXTENSIONS, allow_empty=True), side)
        full = set(self.labels())
        empty = [name for name, i in indices.items() if i not in full]
        if empty:
            others = f" and {len(empty) - 1} other classes" if len(empty) > 1 else ""
            raise UserError(
                f"no image in {root / empty[0]}{others}; every class needs a folder with images "
                f"inside ({' '.join(IMG_EXTENSIONS)})"
            )


def folders_in(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


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

    def labels(self) -> list[int]:
        return list(self._labels)

    @cached_property
    def _labels(self) -> list[int]:
        if self.reader is not None:
            return [int(label) for label in self.reader.dataset[self.reader.label_key][:]]
        targets = np.asarray(getattr(self.dataset, "targets", None))
        # QMNIST's have more columns than the label.
        if targets.shape == (len(self),) and np.issubdtype(targets.dtype, np.integer):
            return targets.tolist()
        return self._labels_by_reading()

    def _labels_by_reading(self) -> list[int]:
        """From every sample; torchvision's sets of files are spared the decoding."""
        dataset = copy.copy(self.dataset)
        if hasattr(dataset, "loader"):
            blank = Image.new("RGB", (1, 1))
            dataset.loader = lambda path: blank
        labels = []
        for index in range(len(self)):
            try:
                labels.append(int(dataset[index][1]))
            except UNREADABLE as error:
                raise unreadable(self, index, error) from None
        return labels

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"

    def size(self, index: int) -> None:
        return None


class Subset:
    """The images of `source` at `indices`, in that order; they are numbered anew from 0."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.source.read(self.indices[index])

    def labels(self) -> list[int]:
        labels = self.source.labels()
        return [labels[i] for i in self.indices]

    def describe(self, index: int) -> str:
        return self.source.describe(self.indices[index])

    def size(self, index: int) -> tuple[int, int] | None:
        return self.source.size(self.indices[index])


class FirstOf(Subset):
    """The first `count` images of a source, for trials."""

    def __init__(self, source: Source, count: int):
        super().__init__(source, range(min(count, len(source))))


def half_of(source: Source, half: str) -> Subset:
    """Half `a` or `b` of the images of every class, in the order of `source`.

    Of n images of a class the first floor(n / 2) are in `a`, the others in `b`.
    """
    labels = source.labels()
    total, seen = Counter(labels), Counter()
    indices = []
    for index, label in enumerate(labels):
        if (seen[label] < total[label] // 2) == (half == "a"):
            indices.append(index)
        seen[label] += 1
    return Subset(source, indices)
