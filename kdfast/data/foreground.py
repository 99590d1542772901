"""Where the object is in an image, in pixels and in the cells of a grid.

Cheng, Rao, Chen, Zhang, "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR
2020, as in the authors' code: segmentation masks of CUB-200-2011 and VOC 2012, and the centre of
the mammals of ILSVRC 2013, whose boxes are enlarged by half. The ink of `digits` and
`fashion-mnist` is our own addition.
"""

from __future__ import annotations

from collections.abc import Callable
from os.path import isfile
from pathlib import Path

import numpy as np
from PIL import Image

from kdfast.data.boxes import Box, BoxSource
from kdfast.data.decoded import Decoded
from kdfast.data.sources import (
    UNREADABLE,
    FileSource,
    ImageData,
    Source,
    Subset,
    unreadable,
)
from kdfast.errors import UsageError, UserError

# Of 255: a quarter of full ink.
INK = 63
_CUB_REMEDY = (
    "unpack segmentations.tgz of https://data.caltech.edu/records/65de6-vp158 in CUB_200_2011 or "
    "beside it"
)
_VOC_REMEDY = (
    "unpack VOCtrainval_11-May-2012.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ again"
)


def foreground_candidates(data: ImageData) -> list[int]:
    """Indices of the training images that have a foreground, ascending.

    All of them but of VOC, where few images were segmented.

    Raises:
        UsageError: the set has no foreground.
        UserError: the set's masks are not where they are looked for.
    """
    _rule(data)
    indices = range(len(data.train))
    if data.name not in ("voc", "voc-animal"):
        return list(indices)
    return _voc_candidates(data)


def foreground_of(data: ImageData, index: int, size: int | tuple[int, int]) -> np.ndarray:
    """The foreground of training image `index`, resized as the whole image is to `size`.

    Args:
        size: side, or height and width, in pixels; the ratio is not kept.

    Returns:
        [H, W], 0 for background and positive for foreground. uint8, but float32 for VOC, whose
        masks are not rounded after resizing, so that the weakest blur is foreground too.

    Raises:
        UsageError: the set has no foreground.
        UserError: the mask is missing, damaged or of another size than its image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    rule = _rule(data)
    source, index = _original(data.train, index)
    return rule(source, index, (width, height))


def cell_map(mask: np.ndarray, grid: int = 16, expand: bool = False) -> np.ndarray:
    """The cells of `mask` [H, W] that are foreground: bool [grid, grid].

    A cell is what its top left pixel (floor(i * H / grid), floor(j * W / grid)) is, foreground
    where positive. `expand` enlarges the object by about an eighth: of a grid with two more rows
    and columns the central part.
    """
    count = grid + 2 * expand
    rows, columns = (np.arange(count) * side // count for side in mask.shape)
    cells = mask[np.ix_(rows, columns)] > 0
    return cells[1:-1, 1:-1] if expand else cells


def _original(source: Source, index: int) -> tuple[Source, int]:
    """The source that `source` is a part or a copy of, and the index there."""
    while True:
        if isinstance(source, Subset):
            source, index = source.source, source.indices[index]
        elif isinstance(source, Decoded):
            source = source.source
        else:
            return source, index


def _centre(source: Source, index: int, size: tuple[int, int]) -> np.ndarray:
    """Cells 16/6 to 16*5/6 of 16, cut off, of each side: 2 to 13."""
    width, height = size
    first, end = 16 // 6, 16 * 5 // 6 + 1
    mask = np.zeros((height, width), np.uint8)
    mask[height * first // 16 : height * end // 16, width * first // 16 : width * end // 16] = 255
    return mask


def _ink(source: Source, index: int, size: tuple[int, int]) -> np.ndarray:
    """255 where the resized grey image is above `INK`."""
    image = source.read(index)[0].convert("L")
    if image.size != size:
        image = image.resize(size, Image.BILINEAR)
    return (np.asarray(image) > INK).astype(np.uint8) * 255


def _cub(source: BoxSource, index: int, size: tuple[int, int]) -> np.ndarray:
    """The mask, cut as the image is, resized with rounding to 8 bits."""
    mask, box = _mask(source, index, _cub_path(source, index), _CUB_REMEDY)
    return np.asarray(mask.crop(box.enlarged(source.margin)).resize(size, Image.BILINEAR))


def _cub_path(source: BoxSource, index: int) -> Path:
    path = Path(source.crops[index].path)
    root, inner = path.parents[2], Path(path.parent.name, f"{path.stem}.png")
    places = [root / "segmentations", root.parent / "segmentations"]
    return next(filter(Path.is_dir, places), places[0]) / inner


def _voc(source: BoxSource, index: int, size: tuple[int, int]) -> np.ndarray:
    """The mask within the box itself, in the middle of the enlarged one, resized as floats.

    Its grey values are those of the palette's colours, of which only the background's is 0: other
    objects in the box and the void around objects are foreground. That is the same for masks of
    classes and of objects.
    """
    mask, box = _mask(source, index, _voc_path(source, index), _VOC_REMEDY)
    larger = box.enlarged(source.margin)
    canvas = Image.new("F", (larger.right - larger.left, larger.bottom - larger.top))
    canvas.paste(mask.crop(box).convert("F"), (box.left - larger.left, box.top - larger.top))
    return np.asarray(canvas.resize(size, Image.BILINEAR))


def _voc_path(source: BoxSource, index: int) -> Path:
    path = Path(source.crops[index].path)
    return path.parents[1] / "SegmentationClass" / f"{path.stem}.png"


def _voc_candidates(data: ImageData) -> list[int]:
    found = [
        index
        for index in range(len(data.train))
        if isfile(_voc_path(*_original(data.train, index)))
    ]
    if not found:
        folder = _voc_path(*_original(data.train, 0)).parent
        raise UserError(f"no mask of a training image in {folder}; {_VOC_REMEDY}")
    return found


def _mask(source: BoxSource, index: int, path: Path, remedy: str) -> tuple[Image.Image, Box]:
    """The grey mask of the whole image at `path`, and the box in it."""
    try:
        with Image.open(path) as file:
            mask = file.convert("L")
    except FileNotFoundError:
        raise UserError(
            f"{source.describe(index)} has no mask: {path} is missing; {remedy}"
        ) from None
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read mask {path}: {reason}; {remedy}") from None
    due = FileSource.size(source, index)
    if mask.size != due:
        found, due = (f"{width}x{height}" for width, height in (mask.size, due))
        raise UserError(f"mask {path} has {found} pixels, its image {due}; {remedy}")
    try:
        return mask, source.crops[index].box.within(*mask.size)
    except ValueError as error:
        raise unreadable(source, index, error) from None


_RULES: dict[str, Callable[..., np.ndarray]] = {
    "cub200": _cub,
    "voc": _voc,
    "voc-animal": _voc,
    "ilsvrc-mammals": _centre,
    "digits": _ink,
    "fashion-mnist": _ink,
}


def _rule(data: ImageData) -> Callable[..., np.ndarray]:
    if data.name not in _RULES:
        raise UsageError(
            f"{data.name} has no foreground, which sigma training needs; these have: "
            f"{', '.join(_RULES)}"
        )
    return _RULES[data.name]
