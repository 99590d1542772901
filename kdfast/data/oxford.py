"""Flowers-102 and FGVC-Aircraft of the University of Oxford, as their archives unpack."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdfast.data.arrays import fetch
from kdfast.data.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FileSource,
    ImageData,
    Splits,
    lines_of,
)
from kdfast.errors import UserError

_AGAIN = "remove the set's folder and fetch it again with --download"
# What scipy raises for damaged .mat files; its own MatReadError aside.
_DAMAGED = (
    OSError, ValueError, TypeError, LookupError, NotImplementedError, AttributeError, MemoryError,
    ArithmeticError, struct.error, zlib.error,
)  # fmt: skip


def flowers102(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """Flowers-102 (Nilsback and Zisserman, ICVGIP 2008) with its own 1,020/1,020/6,149 images.

    In `data_dir` or its folder flowers-102: jpg/, imagelabels.mat and setid.mat. Class indices are
    the labels less one.
    """
    root = _root(
        "Flowers102", data_dir, download, "flowers-102", ["imagelabels.mat", "setid.mat", "jpg"]
    )
    labels = _integers(root / "imagelabels.mat", "labels", 102)
    present = {path.name for path in (root / "jpg").iterdir()}
    seen: set[int] = set()
    sources = []
    for key in ("trnid", "valid", "tstid"):
        samples = []
        for number in _integers(root / "setid.mat", key, len(labels)):
            name = f"image_{number:05d}.jpg"
            if number in seen:
                raise UserError(f"{root / 'setid.mat'} has image {number} twice; {_AGAIN}")
            if name not in present:
                raise UserError(f"{root / 'jpg' / name} is missing; {_AGAIN}")
            seen.add(number)
            samples.append((str(root / "jpg" / name), labels[number - 1] - 1))
        sources.append(FileSource(samples))
    return _data("flowers102", sources, 102)


def _integers(path: Path, key: str, highest: int) -> list[int]:
    """Row `key` of a MATLAB file: integers from 1 to `highest`."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        values = np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=[key])[key])
    except KeyError:
        raise UserError(f"{path} holds no {key}; {_AGAIN}") from None
    except (*_DAMAGED, MatReadError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {path}: {reason[:200]}; {_AGAIN}") from None
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.number):
        raise UserError(f"{path}: {key} is no row of numbers; {_AGAIN}")
    for value in values.tolist():
        if value not in range(1, highest + 1):
            raise UserError(f"{path}: {key} has {value}, not 1 to {highest}; {_AGAIN}")
    return [int(value) for value in values.tolist()]


def aircraft(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """FGVC-Aircraft (Maji et al., arXiv 1306.5151): 100 variants, 3,334/3,333/3,333 images.

    In `data_dir` or its folder fgvc-aircraft-2013b. Class indices are by line of variants.txt;
    images are whole, with their line of copyright.
    """
    lists = {split: f"data/images_variant_{split}.txt" for split in ("train", "val", "test")}
    parts = ["data/variants.txt", *lists.values(), "data/images"]
    root = _root("FGVCAircraft", data_dir, download, "fgvc-aircraft-2013b", parts)
    classes = _variants(root / "data" / "variants.txt")
    present = {path.name for path in (root / "data" / "images").iterdir()}
    seen: set[str] = set()
    sources = []
    for path in (root / part for part in lists.values()):
        samples = []
        for number, line in enumerate(lines_of(path, _AGAIN), 1):
            name, _, variant = line.strip().partition(" ")
            image = root / "data" / "images" / f"{name}.jpg"
            if not name:
                continue
            if variant not in classes:
                problem = f"has variant '{variant}', which variants.txt does not list"
            elif name in seen:
                problem = f"lists {name}, which was listed before"
            elif image.name not in present:
                problem = f"lists {image}, which is missing"
            else:
                seen.add(name)
                samples.append((str(image), classes[variant]))
                continue
            raise UserError(f"{path} line {number} {problem}; {_AGAIN}")
        sources.append(FileSource(samples))
    return _data("aircraft", sources, len(classes))


def _variants(path: Path) -> dict[str, int]:
    names = [line.strip() for line in lines_of(path, _AGAIN) if line.strip()]
    classes = {name: i for i, name in enumerate(names)}
    if not names:
        raise UserError(f"{path} lists no variant; {_AGAIN}")
    for i, name in enumerate(names):
        if classes[name] != i:
            raise UserError(f"{path} lists {name} twice; {_AGAIN}")
    return classes


def _root(
    factory: str, data_dir: Path | None, download: bool, inner: str, parts: Sequence[str]
) -> Path:
    """Where `parts` are: `data_dir` or its folder `inner`; torchvision's `factory` fetches them."""
    data_dir = data_dir or Path("data")
    places = [data_dir, data_dir / inner]

    def missing(place: Path) -> list[str]:
        return [part for part in parts if not (place / part).exists()]

    if download and all(map(missing, places)):
        import torchvision

        above = data_dir.parent if data_dir.name == inner else data_dir
        open_set = getattr(torchvision.datasets, factory)
        fetch(lambda: open_set(root=above, split="train", download=True), above)
    best = min(places, key=lambda place: len(missing(place)))
    if not missing(best):
        return best
    where = best if len(missing(best)) < len(parts) else " or ".join(map(str, places))
    raise UserError(
        f"no {missing(best)[0]} in {where}; give --data-dir the folder {inner} or the one it is "
        "in, or add --download"
    )


def _data(name: str, sources: Sequence[FileSource], classes: int) -> ImageData:
    train, held_out, test = sources
    figures = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return ImageData(name, train, held_out, classes, test=test, **figures)
