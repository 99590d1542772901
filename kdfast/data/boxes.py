"""Images cut to the box of one object each, when they are read.

A box is [left, right) x [top, bottom) in pixels from 0, coordinates as they are in the set's files:
fractions are cut off, and numbers counted from 1 are not shifted. What of a box lies outside of its
image is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os.path import isfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

from kdfast.data.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    UNREADABLE,
    FileSource,
    ImageData,
)
from kdfast.errors import UsageError, UserError

# The largest annotation of the sets here has a few kilobytes.
_MOST_BYTES = 2**20
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class Box(NamedTuple):
    """Whole pixels; `right` and `bottom` are the first that no longer belong to it."""

    left: int
    top: int
    right: int
    bottom: int

    @classmethod
    def of(cls, sides: Sequence[str | float]) -> Box:
        """Of left, top, right and bottom; raises `ValueError` where they enclose no pixel."""
        numbers = [float(side) for side in sides]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("has a box that is not finite")
        box = cls(*map(math.floor, numbers))
        if box.left >= box.right or box.top >= box.bottom or min(box.right, box.bottom) <= 0:
            shown = " ".join(f"{number:g}" for number in numbers)
            raise ValueError(f"has a box without a pixel, {shown}")
        return box

    def within(self, width: int, height: int) -> Box:
        """What of it lies in an image of that size; raises `ValueError` where nothing does."""
        if self.left >= width or self.top >= height:
            raise ValueError(f"its box {tuple(self)} is outside of its {width}x{height} pixels")
        return Box(
            max(0, self.left), max(0, self.top), min(width, self.right), min(height, self.bottom)
        )

    def enlarged(self, factor: float) -> Box:
        """With int(`factor` * side) pixels a side and the same centre, cut off to a whole pixel."""
        width, height = self.right - self.left, self.bottom - self.top
        wide, high = int(factor * width), int(factor * height)
        left, top = self.left - (wide - width) // 2, self.top - (high - height) // 2
        return Box(left, top, left + wide, top + high)


class Crop(NamedTuple):
    """One sample: an image file, its class index, and the box in it."""

    path: str
    label: int
    box: Box


class BoxSource(FileSource):
    """One image a box, enlarged by `margin`. `class_names` are in the order of their indices.

    What of an enlarged box lies outside of its image is black, so that the object stays in the
    middle; of the box itself it is left out.
    """

    def __init__(self, crops: Sequence[Crop], class_names: Sequence[str], margin: float = 1.0):
        super().__init__([(crop.path, crop.label) for crop in crops])
        self.crops, self.class_names, self.margin = crops, list(class_names), margin

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = super().read(index)
        box = self.crops[index].box.within(*image.size)
        if self.margin == 1:
            return image.crop(box), label
        # In every other mode 0 may be something else than black.
        return image.convert("RGB").crop(box.enlarged(self.margin)), label

    def describe(self, index: int) -> str:
        path, _, box = self.crops[index]
        return f"{path} box {box.left},{box.top},{box.right},{box.bottom}"

    def size(self, index: int) -> tuple[int, int]:
        try:
            box = self.crops[index].box.within(*super().size(index)).enlarged(self.margin)
        except UNREADABLE:
            return 0, 0
        return box.right - box.left, box.bottom - box.top


def boxed_data(
    name: str,
    train: Iterable[Crop],
    held_out: Iterable[Crop],
    class_names: Sequence[str],
    margin: float = 1.0,
) -> ImageData:
    """A set of crops, each split in the order of an image folder: by class, else as given."""
    splits = (sorted(crops, key=lambda crop: crop.label) for crops in (train, held_out))
    train, held_out = (BoxSource(crops, class_names, margin) for crops in splits)
    figures = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return ImageData(name, train, held_out, len(class_names), **figures)


def with_margin(data: ImageData, margin: float) -> ImageData:
    """`data` with its boxes enlarged by `margin`.

    Raises `UsageError` for a set that is not cut to boxes.
    """
    if not isinstance(data.train, BoxSource):
        raise UsageError(
            f"--box-margin enlarges the boxes of a set that is cut to boxes, not {data.name}"
        )
    splits = (
        BoxSource(source.crops, source.class_names, margin) for source in (data.train, data.eval)
    )
    return replace(data, **dict(zip(("train", "eval"), splits, strict=True)))


def check_image(path: Path, lists: Path, remedy: str) -> str:
    """`path`, which `lists` names, as a string; raises `UserError` where there is no such file."""
    if not isfile(path):
        raise UserError(f"{lists} lists {path}, which is missing; {remedy}")
    return str(path)


def annotated_objects(
    path: Path, remedy: str, *, any_number: bool = False
) -> list[tuple[str, Box]]:
    """The own name and box of each object in a PASCAL VOC annotation, in their order.

    There is at least one, or with `any_number` perhaps none.

    Raises `UserError`, ending in `remedy`, where the file is missing, damaged or longer than a
    mebibyte, or declares a document type or an entity, which no annotation needs.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError("is too long for an annotation")
        text = content.decode()
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise ValueError("declares a document type, as no annotation does")
        found = ElementTree.fromstring(text).findall("object")
        objects = [_object(entry) for entry in found]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; {remedy}") from None
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is not valid XML: {error}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} {error}; {remedy}") from None
    if not objects and not any_number:
        raise UserError(f"{path} has no object; {remedy}")
    return objects


def _object(entry: ElementTree.Element) -> tuple[str, Box]:
    # Children of the object itself: its parts have names and boxes, too.
    name = (entry.findtext("name") or "").strip()
    sides = [entry.findtext(f"bndbox/{side}") for side in _SIDES]
    if not name or None in sides:
        raise ValueError("has an object without a name or a box")
    try:
        return name, Box.of(sides)
    except ValueError as error:
        reason = str(error)
    raise ValueError(reason if reason.startswith("has") else "has a box that is not of numbers")
