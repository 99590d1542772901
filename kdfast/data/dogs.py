"""Stanford Dogs, as its archives unpack, cut to its boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdfast.data.boxes import Crop, annotated_objects, boxed_data, check_image
from kdfast.data.matlab import cell_strings
from kdfast.data.sources import ImageData, Splits, find_root
from kdfast.errors import UserError

_PAGE = "http://vision.stanford.edu/aditya86/ImageNetDogs"
_AGAIN = f"unpack images.tar, annotation.tar and lists.tar of {_PAGE} again"
_INNER = "stanford-dogs"


def dogs120(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """Stanford Dogs (Khosla et al., FGVC 2011): 120 breeds of ImageNet, 12,000 and 8,580 images.

    In `data_dir` or its folder stanford-dogs: Images/, Annotation/, train_list.mat and
    test_list.mat, which may be in lists/. An image with several boxes gives one sample each, all of
    its class. Class indices are those of the sorted class folders; images are in their order.
    """
    data_dir = data_dir or Path("data")
    root = find_root([data_dir, data_dir / _INNER], ["Images", "Annotation"], _remedy(data_dir))
    lists = [_list(root, name) for name in ("train_list.mat", "test_list.mat")]
    places = [_places(path) for path in lists]
    classes = sorted({folder for folder, _ in places[0]})
    indices = {name: i for i, name in enumerate(classes)}
    for folder, name in places[1]:
        if folder not in indices:
            raise UserError(
                f"{lists[1]} lists {folder}/{name}, of a class that {lists[0]} does not have; "
                f"{_AGAIN}"
            )
    for folder, name in sorted(set(places[0]) & set(places[1])):
        raise UserError(f"{folder}/{name} is in {lists[0]} and in {lists[1]}; {_AGAIN}")
    train, held_out = (
        _crops(root, path, sorted(names), indices)
        for path, names in zip(lists, places, strict=True)
    )
    return boxed_data("dogs120", train, held_out, classes)


def _remedy(data_dir: Path) -> str:
    return (
        f"unpack images.tar, annotation.tar and lists.tar of {_PAGE} (--download does not fetch "
        f"them) into {data_dir / _INNER} or another folder for --data-dir"
    )


def _list(root: Path, name: str) -> Path:
    for path in (root / name, root / "lists" / name):
        if path.is_file():
            return path
    raise UserError(f"no {name} in {root} or {root / 'lists'}; {_AGAIN}")


def _places(path: Path) -> list[tuple[str, str]]:
    """Folder and file of the images that a list names."""
    found: dict[tuple[str, str], None] = {}
    for number, name in enumerate(cell_strings(path, "file_list", _AGAIN), 1):
        folder, _, file = name.partition("/")
        if not folder or not file or "/" in file:
            raise UserError(f"{path} entry {number} is {name!r}, no folder and file; {_AGAIN}")
        if (folder, file) in found:
            raise UserError(f"{path} lists {name} twice; {_AGAIN}")
        found[folder, file] = None
    return list(found)


def _crops(
    root: Path, lists: Path, places: Sequence[tuple[str, str]], indices: dict[str, int]
) -> list[Crop]:
    crops = []
    for folder, name in places:
        image = check_image(root / "Images" / folder / name, lists, _AGAIN)
        annotation = root / "Annotation" / folder / Path(name).stem
        for _, box in annotated_objects(annotation, _AGAIN):
            crops.append(Crop(image, indices[folder], box))
    return crops
