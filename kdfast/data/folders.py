"""Sets of image files, one folder a class."""

from __future__ import annotations

from pathlib import Path

from kdfast.data.sources import FolderSource, ImageData
from kdfast.errors import UsageError, UserError


def folder(data_dir: Path | None, download: bool, splits: tuple[str, str]) -> ImageData:
    if data_dir is None:
        raise UsageError("--dataset folder needs --data-dir, a folder with train/ and val/")
    train = FolderSource(data_dir / (splits[0] or "train"))
    usual = [data_dir / split for split in ("val", "validation", "test")]
    named = data_dir / splits[1] if splits[1] else next(filter(Path.is_dir, usual), usual[0])
    held_out = FolderSource(named)
    if train.class_names != held_out.class_names:
        odd = sorted(set(train.class_names) ^ set(held_out.class_names))
        raise UserError(
            f"the classes of the two splits in {data_dir} differ: {', '.join(odd[:5])} "
            "are in one of them only"
        )
    return ImageData("folder", train, held_out, len(train.class_names))
