"""Named image sets: where they are looked for, how one image is read, what their numbers are.

Every source answers `len(source)`, `source.read(index) -> (PIL image, label)` and
`source.describe(index)`, the words an error uses for that image.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from kdfast.errors import UsageError, UserError, unknown

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


def _digits(data_dir: Path | None, download: bool, splits: tuple[str, str]) -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = np.stack(
        [np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR)) for image in small]
    )
    rows = train_test_split(
        np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0
    )
    train, held_out = (ArraySource(images[r], digits.target[r], "digits") for r in rows)
    mean, std = (0.3057,) * 3, (0.3235,) * 3
    return ImageData("digits", train, held_out, 10, 32, mean, std, flip=False, in_memory=True)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file (http://yann.lecun.com/exdb/mnist), gzipped or not."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; fetch the file again") from None
    header = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:header].ljust(4 * dimensions, b"\0"))
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + math.prod(shape):
        raise UserError(f"{path} is not a complete idx file of bytes; fetch the file again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _fashion_mnist(data_dir: Path | None, download: bool, splits: tuple[str, str]) -> ImageData:
    if download:
        from torchvision.datasets import FashionMNIST

        root = data_dir or Path("data")
        for train in (True, False):
            _fetch(lambda train=train: FashionMNIST(root, train=train, download=True), root)
    places = [data_dir] if data_dir else [Path("data"), Path("/usr/share/datasets/fashion-mnist")]
    folders = [place / inner for place in places for inner in ("", "FashionMNIST/raw")]

    def find(stem: str) -> Path:
        for folder in folders:
            for path in (folder / stem, folder / f"{stem}.gz"):
                if path.is_file():
                    return path
        raise UserError(
            f"no fashion-mnist file {stem}[.gz] in {', '.join(map(str, folders))}; give --data-dir "
            "its folder, add --download, or install the Debian package dataset-fashion-mnist"
        )

    def split(stem: str) -> ArraySource:
        images, labels = find(f"{stem}-images-idx3-ubyte"), find(f"{stem}-labels-idx1-ubyte")
        pixels, targets = _read_idx(images, 3), _read_idx(labels, 1)
        if len(pixels) != len(targets):
            raise UserError(
                f"{images} has {len(pixels)} images but {labels} {len(targets)} labels; "
                "fetch both again"
            )
        if pixels.shape[1:] != (28, 28):
            raise UserError(f"{images} does not hold 28x28 images; fetch the file again")
        if targets.max(initial=0) > 9:
            raise UserError(f"{labels} has a label above 9; fetch the file again")
        return ArraySource(np.pad(pixels, ((0, 0), (2, 2), (2, 2))), targets, "fashion-mnist")

    train, held_out = split("train"), split("t10k")
    mean, std = (0.2190,) * 3, (0.3318,) * 3
    return ImageData("fashion-mnist", train, held_out, 10, 32, mean, std, in_memory=True)


def _fetch(open_set: Callable, root: Path | None):
    """Open a torchvision set; every way in which that fails becomes one line.

    torchvision checks the archive's published checksum before it reads a pickled batch.
    """
    try:
        return open_set()
    except (RuntimeError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot open the data set in {root}: {reason}; "
            "give --data-dir its folder or add --download"
        ) from None


def _cifar(name: str, classes: int, mean, std) -> Callable[..., ImageData]:
    def open_set(data_dir: Path | None, download: bool, splits: tuple[str, str]) -> ImageData:
        import torchvision

        root = data_dir or Path("data")
        factory = getattr(torchvision.datasets, name.upper())
        train, held_out = (
            _fetch(lambda train=train: factory(root, train=train, download=download), root)
            for train in (True, False)
        )
        sources = (ArraySource(part.data, part.targets, name) for part in (train, held_out))
        return ImageData(name, *sources, classes, 32, mean, std, in_memory=True)

    return open_set


def _folder(data_dir: Path | None, download: bool, splits: tuple[str, str]) -> ImageData:
    if data_dir is None:
        raise UsageError("--dataset folder needs --data-dir, a folder with train/ and val/")
    train = FolderSource(data_dir / (splits[0] or "train"))
    usual = [data_dir / split for split in ("val", "validation", "test")]
    named = data_dir / splits[1] if splits[1] else next(filter(Path.is_dir, usual), usual[0])
    held_out = FolderSource(named)
    if train.class_names != held_out.class_names:
        odd = sorted(set(train.class_names) ^ set(held_out.class_names))
        raise UserError(
            f"the classes of the two splits in {data_dir} differ: {', '.join(odd[:5])} "
            "are in one of them only"
        )
    return ImageData("folder", train, held_out, len(train.class_names))


# An AssertionError is timm's word for an unknown name; the others come from the set's reader.
_UNKNOWN_TO_TIMM = (
    AssertionError, RuntimeError, ValueError, TypeError, OSError, LookupError, ImportError
)  # fmt: skip


def _from_timm(
    name: str, data_dir: Path | None, download: bool, splits: tuple[str, str], classes: int | None
) -> ImageData:
    from timm.data import create_dataset

    if name.startswith("torch/") and data_dir is None:
        data_dir = Path("data")

    def open_split(split: str) -> TimmSource:
        try:
            dataset = create_dataset(
                name, root=data_dir and str(data_dir), split=split, download=download
            )
        except _UNKNOWN_TO_TIMM as error:
            reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
            kind = UsageError if isinstance(error, AssertionError) else UserError
            raise kind(f"timm cannot open {name} split '{split}': {reason}") from None
        return TimmSource(dataset, name)

    train = open_split(splits[0] or "train")
    held_out = open_split(splits[1] or "validation")
    names = getattr(train.reader or train.dataset, "class_to_idx", None)
    found = classes or (len(names) if names else None)
    if not found:
        raise UsageError(f"{name} does not say how many classes it has; give --num-classes")
    return ImageData(name, train, held_out, found)


_NAMED: dict[str, Callable[..., ImageData]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar("cifar10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _cifar("cifar100", 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "folder": _folder,
}


def dataset_names() -> list[str]:
    """The names `open_data` knows beside timm's `prefix/name` forms."""
    return sorted(_NAMED)


def dataset_name(name: str) -> str:
    """The canonical form of `name`; raises `UsageError` with the closest when there is none."""
    prefix, slash, _ = name.partition("/")
    if prefix in ("wds", "tfds", "hfids") and slash:
        raise UsageError(
            f"{name} is a stream; its images have no index, which the loaders need. "
            "Use its random-access form (hfds/ for hfids/) or unpack it to a folder"
        )
    if name in ("torch/cifar10", "torch/cifar100"):
        return name.removeprefix("torch/")  # the same files; by this name their size is known
    if prefix in ("torch", "hfds") and slash:
        return name
    if name.replace("_", "-") not in _NAMED:
        raise unknown("data set", name, [*_NAMED, "torch/cifar10", "hfds/owner/name"])
    return name.replace("_", "-")


def open_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    train_split: str | None = None,
    eval_split: str | None = None,
    classes: int | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
) -> ImageData:
    """Open image set `name`: one of `dataset_names()` or a name of `timm.data.create_dataset`.

    The limits keep the first images of a split only.

    Raises `UsageError` for an unknown name or a set without a class count, `UserError` when files
    are missing or damaged.
    """
    data_dir = Path(data_dir) if data_dir is not None else None
    splits = (train_split, eval_split)
    name = dataset_name(name)
    if name in _NAMED and name != "folder" and any(splits):
        raise UsageError(f"{name} has its own two splits; drop --train-split and --val-split")
    if name in _NAMED:
        data = _NAMED[name](data_dir, download, splits)
    else:
        data = _from_timm(name, data_dir, download, splits, classes)
    if classes and classes != data.classes:
        raise UsageError(f"--num-classes {classes}, but {name} has {data.classes} classes")
    for split, source in (("training", data.train), ("evaluation", data.eval)):
        if len(source) == 0:
            raise UserError(f"the {split} split of {name} is empty")
    limits = {"train": train_limit, "eval": eval_limit}
    limited = {k: FirstOf(getattr(data, k), count) for k, count in limits.items() if count}
    return replace(data, **limited)
