"""The mammals of ILSVRC 2013's detection set, as its archives unpack, one image each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kdfast.data.boxes import Crop, annotated_objects, boxed_data, check_image
from kdfast.data.sources import ImageData, Splits, find_root, lines_of
from kdfast.errors import UserError

_AGAIN = "unpack the archive of https://image-net.org/challenges/LSVRC/2013 again"
_LIST = "mammals.txt"
_WNID = re.compile(r"n\d{8}")
# Images and annotations of both splits: as the archives of 2013 unpack, and as that of 2017, which
# has the same images, does.
_LAYOUTS = (
    (
        ("ILSVRC2013_DET_train", "ILSVRC2013_DET_bbox_train"),
        ("ILSVRC2013_DET_val", "ILSVRC2013_DET_bbox_val"),
    ),
    (
        ("Data/DET/train/ILSVRC2013_train", "Annotations/DET/train/ILSVRC2013_train"),
        ("Data/DET/val", "Annotations/DET/val"),
    ),
)
# The publication does not name its twelve; these are ours.
MAMMALS = {
    "n02084071": "dog",
    "n02118333": "fox",
    "n02121808": "domestic cat",
    "n02129165": "lion",
    "n02131653": "bear",
    "n02324045": "rabbit",
    "n02374451": "horse",
    "n02402425": "cattle",
    "n02411705": "sheep",
    "n02419796": "antelope",
    "n02484322": "monkey",
    "n02503517": "elephant",
}


def ilsvrc_mammals(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """Mammals of ILSVRC-2013 DET (Russakovsky et al., IJCV 2015), 12 classes unless a list says so.

    In `data_dir`, or in ILSVRC there: ILSVRC2013_DET_train/, _bbox_train/, _val/ and _bbox_val/, or
    Data/DET/ and Annotations/DET/. `mammals.txt` there, one WordNet ID a line, replaces `MAMMALS`.
    One sample an object, cut to its box x 1.5; training objects are those of the folders of these
    classes. In the order of their classes, which is that of the IDs, then of folder, file and
    annotation.
    """
    data_dir = data_dir or Path("data")
    roots = [data_dir, data_dir / "ILSVRC"]
    remedy = (
        "give --data-dir the folder in which ILSVRC2013_DET_train.tar, _val.tar, _bbox_train.tgz "
        "and _bbox_val.tgz of https://image-net.org/challenges/LSVRC/2013 (--download does not "
        "fetch them) or ILSVRC2017_DET.tar.gz were unpacked"
    )
    layout = next(
        (parts for parts in _LAYOUTS if any((root / parts[0][0]).is_dir() for root in roots)),
        _LAYOUTS[0],
    )
    root = find_root(roots, [part for split in layout for part in split], remedy)
    classes = _classes(root / _LIST)
    train, held_out = (
        _crops(root / images, root / annotations, classes) for images, annotations in layout
    )
    return boxed_data("ilsvrc-mammals", train, held_out, classes, margin=1.5)


def _classes(path: Path) -> list[str]:
    """Sorted WordNet IDs."""
    if not path.exists():
        return sorted(MAMMALS)
    remedy = "write one WordNet ID a line, such as n02084071"
    found: dict[str, int] = {}
    for number, line in enumerate(lines_of(path, remedy), 1):
        name = line.strip()
        if not name:
            continue
        if not _WNID.fullmatch(name):
            raise UserError(f"{path} line {number} is {name!r}, no WordNet ID; {remedy}")
        if name in found:
            raise UserError(
                f"{path} line {number} has {name} again, after line {found[name]}; {remedy}"
            )
        found[name] = number
    if not found:
        raise UserError(f"{path} has no class; {remedy}")
    return sorted(found)


def _crops(images: Path, annotations: Path, classes: Sequence[str]) -> list[Crop]:
    indices = {name: i for i, name in enumerate(classes)}
    crops = []
    for path in _annotations(annotations, classes):
        image = images / path.relative_to(annotations).with_suffix(".JPEG")
        found = [
            Crop(str(image), indices[name], box)
            for name, box in annotated_objects(path, _AGAIN, any_number=True)
            if name in indices
        ]
        if found:
            check_image(image, path, _AGAIN)
        crops += found
    return crops


def _annotations(folder: Path, classes: Sequence[str]) -> list[Path]:
    """The annotations in the folders of the classes; in `folder` itself where it has no folders."""
    inner = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    if not inner:
        return sorted(folder.glob("*.xml"))
    for name in classes:
        if name not in inner:
            raise UserError(
                f"{folder} has no folder of class {name}; {_AGAIN}, or list other classes in "
                f"{_LIST}"
            )
    return [path for name in classes for path in sorted((folder / name).glob("*.xml"))]
