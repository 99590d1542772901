"""CUB-200-2011 of Caltech, as its archive unpacks, cut to its boxes."""

from __future__ import annotations

from pathlib import Path

from kdfast.data.boxes import Box, Crop, boxed_data, check_image
from kdfast.data.sources import ImageData, Splits, find_root, lines_of
from kdfast.errors import UserError

_INNER = "CUB_200_2011"
_PAGE = "https://data.caltech.edu/records/65de6-vp158"
_AGAIN = f"unpack {_INNER}.tgz of {_PAGE} again"
# The values of a row, after the number of its image.
_TABLES = {
    "images.txt": 1,
    "image_class_labels.txt": 1,
    "train_test_split.txt": 1,
    "bounding_boxes.txt": 4,
}


def cub200(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """CUB-200-2011 (Wah et al., CNS-TR-2011-001): 200 birds, 5,994 images and 5,794 to evaluate on.

    In `data_dir` or its folder CUB_200_2011. Images are in the order of the sorted image folder,
    cut to [x, x + width) x [y, y + height); class indices are those of the sorted class folders.
    """
    data_dir = data_dir or Path("data")
    remedy = (
        f"unpack {_INNER}.tgz of {_PAGE} (--download does not fetch it) and give --data-dir its "
        f"folder {_INNER} or the one it is in"
    )
    root = find_root([data_dir, data_dir / _INNER], [*_TABLES, "images"], remedy)
    files, labels, training, boxes = (_table(root / name, n) for name, n in _TABLES.items())
    for name, table in zip(_TABLES, (files, labels, training, boxes), strict=True):
        for image in sorted(files.keys() ^ table.keys()):
            has = "an image" if image in table else "no image"
            other = "does" if image in files else "does not"
            raise UserError(f"{root / name} has {has} {image}, images.txt {other}; {_AGAIN}")
    # Images sorted as the folder would be.
    places = {image: tuple(row[0].split("/")) for image, (_, row) in files.items()}
    classes = sorted({place[0] for place in places.values()})
    indices = {name: i for i, name in enumerate(classes)}
    crops: dict[str, list[Crop]] = {"1": [], "0": []}
    for image in sorted(places, key=places.__getitem__):
        number, (name,) = files[image]
        if len(places[image]) != 2:
            raise UserError(
                f"{root / 'images.txt'} line {number} names {name}, not a class folder and a file; "
                f"{_AGAIN}"
            )
        label = indices[places[image][0]]
        path = check_image(root / "images" / name, root / "images.txt", _AGAIN)
        number, (split,) = training[image]
        if split not in crops:
            raise UserError(
                f"{root / 'train_test_split.txt'} line {number} has {split}, not 0 or 1; {_AGAIN}"
            )
        number, (said,) = labels[image]
        if said != str(label + 1):
            raise UserError(
                f"{root / 'image_class_labels.txt'} line {number} has class {said} for {name}, "
                f"whose folder is the {label + 1}. of {len(classes)}; {_AGAIN}"
            )
        crops[split].append(Crop(path, label, _box(root, *boxes[image])))
    return boxed_data("cub200", crops["1"], crops["0"], classes)


def _table(path: Path, values: int) -> dict[str, tuple[int, list[str]]]:
    """Line number and values by image number."""
    table: dict[str, tuple[int, list[str]]] = {}
    for number, line in enumerate(lines_of(path, _AGAIN), 1):
        if not line.strip():
            continue
        image, *rest = line.split()
        if len(rest) != values:
            problem = f"has {len(rest)} values after the image's number, not {values}"
        elif image in table:
            problem = f"has image {image} again, after line {table[image][0]}"
        else:
            table[image] = number, rest
            continue
        raise UserError(f"{path} line {number} {problem}; {_AGAIN}")
    return table


def _box(root: Path, number: int, values: list[str]) -> Box:
    where = f"{root / 'bounding_boxes.txt'} line {number}"
    try:
        x, y, width, height = map(float, values)
    except ValueError:
        raise UserError(f"{where} is not of numbers; {_AGAIN}") from None
    try:
        return Box.of([x, y, x + width, y + height])
    except ValueError as error:
        raise UserError(f"{where} {error}; {_AGAIN}") from None
