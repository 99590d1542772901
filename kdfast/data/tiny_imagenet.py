"""Tiny ImageNet (200 classes of 64x64 pixels) from its files as the archive unpacks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from kdfast.data.sources import (
    FileSource,
    FolderSource,
    ImageData,
    Splits,
    folders_in,
    lines_of,
)
from kdfast.errors import UserError

_FOLDER, _SIDE = "tiny-imagenet-200", 64
_ARCHIVE = f"http://cs231n.stanford.edu/{_FOLDER}.zip"
_AGAIN = f"unpack {_ARCHIVE} again"


def tiny_imagenet(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """Tiny ImageNet in `data_dir` or its folder tiny-imagenet-200; val/ is the evaluation split.

    val/ may be as it unpacks (images/ and val_annotations.txt) or sorted into a folder a class;
    images have the same indices either way. Class indices are those of the sorted wnids.txt, as
    ImageFolder numbers train/.
    """
    root = _root(data_dir or Path("data"))
    wnids = _wnids(root / "wnids.txt")
    train = _folder_per_class(root / "train", wnids)
    held_out = _held_out(root / "val", wnids)
    mean, std = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
    return ImageData("tiny-imagenet", train, held_out, len(wnids), _SIDE, mean, std)


def _root(data_dir: Path) -> Path:
    places = [data_dir, data_dir / _FOLDER]
    for place in places:
        if (place / "wnids.txt").is_file():
            return place
    raise UserError(
        f"no wnids.txt in {' or '.join(map(str, places))}; unpack {_ARCHIVE} (--download does not "
        f"fetch it) and give --data-dir its folder {_FOLDER}; images without wnids.txt are a "
        "--dataset folder"
    )


def _wnids(path: Path) -> list[str]:
    wnids = sorted(line.strip() for line in lines_of(path, _AGAIN) if line.strip())
    if not wnids:
        raise UserError(f"{path} lists no class; {_AGAIN}")
    for first, second in pairwise(wnids):
        if first == second:
            raise UserError(f"{path} lists {first} twice; {_AGAIN}")
    return wnids


def _folder_per_class(root: Path, wnids: Sequence[str], ignored: str = "") -> FolderSource:
    found = set(folders_in(root)) - {ignored} if root.is_dir() else set()
    for name in sorted(set(wnids) - found):
        raise UserError(f"{root} has no folder {name}, a class of wnids.txt; {_AGAIN}")
    for name in sorted(found - set(wnids)):
        raise UserError(f"{root} has a folder {name}, no class of wnids.txt; remove it")
    return FolderSource(root, wnids, _SIDE)


def _held_out(root: Path, wnids: Sequence[str]) -> FileSource:
    if not root.is_dir():
        raise UserError(f"no folder {root}; {_AGAIN}")
    images, annotations = root / "images", root / "val_annotations.txt"
    left = _image_names(images)
    if any((root / wnid).is_dir() for wnid in wnids) and not (left and annotations.is_file()):
        return _folder_per_class(root, wnids, ignored="" if left else images.name)
    labels = _annotated(annotations, left, wnids)
    for name in sorted(left - labels.keys()):
        raise UserError(f"{annotations} does not list {name} of {images}; {_AGAIN}")
    for label in sorted(set(range(len(wnids))) - set(labels.values())):
        raise UserError(f"{annotations} lists no image of class {wnids[label]}; {_AGAIN}")
    by_class = sorted(labels, key=lambda name: (labels[name], name))
    return FileSource([(str(images / name), labels[name]) for name in by_class], _SIDE)


def _image_names(folder: Path) -> set[str]:
    from torchvision.datasets.folder import is_image_file

    files = folder.iterdir() if folder.is_dir() else ()
    return {path.name for path in files if is_image_file(path.name)}


def _annotated(path: Path, present: set[str], wnids: Sequence[str]) -> dict[str, int]:
    """Class index by image: the first two of the columns (image, wnid, and a box of four)."""
    indices = {wnid: i for i, wnid in enumerate(wnids)}
    labels: dict[str, int] = {}
    for number, line in enumerate(lines_of(path, _AGAIN), 1):
        if not line.strip():
            continue
        name, wnid = (*map(str.strip, line.split("\t")), "")[:2]
        if not wnid:
            problem = "does not name an image and its class"
        elif wnid not in indices:
            problem = f"has class {wnid}, which wnids.txt does not list"
        elif name not in present:
            problem = f"lists {name}, which is not in {path.parent / 'images'}"
        elif name in labels:
            problem = f"lists {name} twice"
        else:
            labels[name] = indices[wnid]
            continue
        raise UserError(f"{path} line {number} {problem}; {_AGAIN}")
    return labels
