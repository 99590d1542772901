"""Flowers-102 and FGVC-Aircraft of the University of Oxford, as their archives unpack."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kdfast.data.arrays import fetch
from kdfast.data.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FileSource,
    ImageData,
    Splits,
    find_root,
    lines_of,
    missing_parts,
)
from kdfast.errors import UserError

_AGAIN = "remove the set's folder and fetch it again with --download"
# Only the published files are opened: scipy may crash on damaged ones.
_FLOWERS = {
    "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
    "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
}


def flowers102(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """Flowers-102 (Nilsback and Zisserman, ICVGIP 2008) with its own 1,020/1,020/6,149 images.

    In `data_dir` or its folder flowers-102: jpg/, imagelabels.mat and setid.mat. Class indices are
    the labels less one.
    """
    from scipy.io import loadmat

    root = _root("Flowers102", data_dir, download, "flowers-102", [*_FLOWERS, "jpg"])
    labels, numbers = (
        loadmat(_published(root / name, checksum), squeeze_me=True)
        for name, checksum in _FLOWERS.items()
    )
    present = {path.name for path in (root / "jpg").iterdir()}
    sources = []
    for key in ("trnid", "valid", "tstid"):
        samples = []
        for number in numbers[key].tolist():
            image = root / "jpg" / f"image_{number:05d}.jpg"
            if image.name not in present:
                raise UserError(f"{image} is missing; {_AGAIN}")
            samples.append((str(image), int(labels["labels"][number - 1]) - 1))
        sources.append(FileSource(samples))
    return _data("flowers102", sources, 102)


def _published(path: Path, checksum: str) -> Path:
    if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != checksum:
        raise UserError(
            f"{path} is not the published file; {_AGAIN} (--dataset lists takes other splits)"
        )
    return path


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
    """Where `parts` are: `data_dir` or its folder `inner`; torchvision's `factory` fetches them.

    Parts without a suffix are folders.
    """
    data_dir = data_dir or Path("data")
    places = [data_dir, data_dir / inner]
    if download and all(missing_parts(place, parts) for place in places):
        import torchvision

        above = data_dir.parent if data_dir.name == inner else data_dir
        open_set = getattr(torchvision.datasets, factory)
        fetch(lambda: open_set(root=above, split="train", download=True), above)
    remedy = f"give --data-dir the folder {inner} or the one it is in, or add --download"
    return find_root(places, parts, remedy)


def _data(name: str, sources: Sequence[FileSource], classes: int) -> ImageData:
    train, held_out, test = sources
    figures = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return ImageData(name, train, held_out, classes, test=test, **figures)
