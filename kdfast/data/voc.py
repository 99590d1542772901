"""The objects of PASCAL VOC 2012, as its archive unpacks, one image each."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from kdfast.data.arrays import fetch
from kdfast.data.boxes import Crop, annotated_objects, boxed_data, check_image
from kdfast.data.sources import ImageData, Splits, find_root, lines_of, missing_parts
from kdfast.errors import UserError

_PAGE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
_AGAIN = f"unpack VOCtrainval_11-May-2012.tar of {_PAGE} again"
_KIT, _YEAR = "VOCdevkit", "VOC2012"
_LISTS = ("ImageSets/Main/train.txt", "ImageSets/Main/val.txt")
_PARTS = [*_LISTS, "JPEGImages", "Annotations"]
# In the order of their indices, which is that of the published object lists (Liang et al., ICLR
# 2020, arXiv 1908.01581).
CLASSES = (
    "cow", "aeroplane", "cat", "bicycle", "tvmonitor", "horse", "bird", "dog", "bottle", "boat",
    "person", "train", "motorbike", "sheep", "sofa", "bus", "pottedplant", "diningtable", "chair",
    "car",
)  # fmt: skip
ANIMALS = ("cow", "cat", "horse", "bird", "dog", "sheep")


def voc(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """VOC 2012 (Everingham et al., IJCV 2010): 13,609 objects of train, 13,841 of val, 20 classes.

    In `data_dir`, or in VOCdevkit/VOC2012 or VOC2012 there. One sample an object, difficult and
    truncated ones too, cut to [xmin, xmax) x [ymin, ymax) without a margin. They are in the order
    of their classes, then of the list and of the annotation.
    """
    return _objects("voc", CLASSES, data_dir, download)


def voc_animal(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """The cows, cats, horses, birds, dogs and sheep of `voc`: 2,961 objects of train, 3,001 of val.

    Class indices and their count, 20, are those of `voc`.
    """
    return _objects("voc-animal", ANIMALS, data_dir, download)


def _objects(name: str, kept: Collection[str], data_dir: Path | None, download: bool) -> ImageData:
    root = _root(data_dir or Path("data"), download)
    train, held_out = (_crops(root, root / path, kept) for path in _LISTS)
    return boxed_data(name, train, held_out, CLASSES)


def _root(data_dir: Path, download: bool) -> Path:
    places = [data_dir, data_dir / _YEAR, data_dir / _KIT / _YEAR]
    if download and all(missing_parts(place, _PARTS) for place in places):
        from torchvision.datasets import VOCDetection

        above = data_dir.parent if data_dir.name == _KIT else data_dir
        fetch(lambda: VOCDetection(above, "2012", "train", download=True), above)
    remedy = (
        f"give --data-dir the folder {_KIT} or the one it is in, or add --download; it is "
        f"VOCtrainval_11-May-2012.tar of {_PAGE}"
    )
    return find_root(places, _PARTS, remedy)


def _crops(root: Path, lists: Path, kept: Collection[str]) -> list[Crop]:
    crops, seen = [], set()
    for number, line in enumerate(lines_of(lists, _AGAIN), 1):
        image = line.strip()
        if not image:
            continue
        if image in seen:
            raise UserError(f"{lists} line {number} lists {image} again; {_AGAIN}")
        seen.add(image)
        path = check_image(root / "JPEGImages" / f"{image}.jpg", lists, _AGAIN)
        annotation = root / "Annotations" / f"{image}.xml"
        for name, box in annotated_objects(annotation, _AGAIN):
            if name not in CLASSES:
                raise UserError(f"{annotation} has an object '{name}', no class of VOC; {_AGAIN}")
            if name in kept:
                crops.append(Crop(path, CLASSES.index(name), box))
    return crops
