"""Sets held in memory: scikit-learn's digits, Fashion-MNIST from idx files, CIFAR."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from tarfile import TarError

import numpy as np
from PIL import Image

from kdfast.data.sources import ArraySource, ImageData, Splits
from kdfast.errors import UserError


def digits(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
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


def fashion_mnist(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    if download:
        from torchvision.datasets import FashionMNIST

        root = data_dir or Path("data")
        for train in (True, False):
            fetch(lambda train=train: FashionMNIST(root, train=train, download=True), root)
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


def fetch(open_set: Callable, root: Path | None):
    """Open a torchvision set; every way in which that fails becomes one line.

    torchvision checks the archive's published checksum before it reads a pickled batch.
    """
    try:
        return open_set()
    except (RuntimeError, OSError, EOFError, TarError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot open the data set in {root}: {reason}; "
            "give --data-dir its folder or add --download"
        ) from None


def cifar(name: str, classes: int, mean, std) -> Callable[..., ImageData]:
    def open_set(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
        import torchvision

        root = data_dir or Path("data")
        factory = getattr(torchvision.datasets, name.upper())
        train, held_out = (
            fetch(lambda train=train: factory(root, train=train, download=download), root)
            for train in (True, False)
        )
        sources = (ArraySource(part.data, part.targets, name) for part in (train, held_out))
        return ImageData(name, *sources, classes, 32, mean, std, in_memory=True)

    return open_set
