"""Sets of image files, one folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdfast.data.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FolderSource,
    ImageData,
    Splits,
    folders_in,
)
from kdfast.errors import UsageError, UserError


def folder(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """Any classes: train/, val/ and, where it has the same classes, test/.

    Evaluation takes validation/ or test/ where there is no val/.
    """
    if data_dir is None:
        raise UsageError("--dataset folder needs --data-dir, a folder with train/ and val/")
    train = FolderSource(data_dir / (splits[0] or "train"))
    usual = [data_dir / split for split in ("val", "validation", "test")]
    named = data_dir / splits[1] if splits[1] else next(filter(Path.is_dir, usual), usual[0])
    held_out = FolderSource(named)
    third = data_dir / (splits[2] or "test")
    test = None
    if splits[2] or (third != named and _has(third, train.class_names)):
        test = FolderSource(third)
    for other in filter(None, (held_out, test)):
        odd = sorted(set(train.class_names) ^ set(other.class_names))
        if odd:
            raise UserError(
                f"the classes of two splits in {data_dir} differ: {', '.join(odd[:5])} "
                "are in one of them only"
            )
    return ImageData("folder", train, held_out, len(train.class_names), test=test)


def _has(root: Path, classes: Sequence[str]) -> bool:
    """Whether `root` is a split of these classes; a test/ often holds images without any."""
    return root.is_dir() and folders_in(root) == list(classes)


def imagenet(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """ILSVRC 2012, sorted into train/ and val/ with a folder for each of the 1,000 WordNet IDs.

    Class indices are those of published weights: the sorted IDs.
    """
    from timm.data import ImageNetInfo

    if data_dir is None:
        raise UsageError(
            "--dataset imagenet needs --data-dir, the folder of its train/ and val/, each with "
            "one folder a WordNet ID"
        )
    wnids = sorted(ImageNetInfo().label_names())
    train, held_out = (_imagenet_split(data_dir / split, wnids) for split in ("train", "val"))
    return ImageData("imagenet", train, held_out, len(wnids), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _imagenet_split(root: Path, wnids: Sequence[str]) -> FolderSource:
    found = folders_in(root) if root.is_dir() else []
    if not found:
        raise UserError(
            f"no folders of classes in {root}; give --data-dir the folder of ImageNet's train/ and "
            f"val/, which torchvision.datasets.ImageNet(PATH, '{root.name}') makes of the archives "
            "from image-net.org in PATH"
        )
    missing, strange = sorted(set(wnids) - set(found)), sorted(set(found) - set(wnids))
    if missing or strange:
        reasons = [f"{name} is none of them" for name in strange[:1]]
        reasons += [f"{name} is missing" for name in missing[:1]]
        raise UserError(
            f"{root} has {len(found)} classes that are not ImageNet's 1,000: "
            f"{', '.join(reasons)}; --dataset folder takes any classes"
        )
    return FolderSource(root, wnids)
