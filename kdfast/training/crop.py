"""Write the crops of a set with boxes to a folder that `--dataset folder` reads.

    python -m kdfast.training.crop --dataset cub200 --data-dir data crops

gives crops/train/CLASS/NUMBER-NAME.png and crops/val/CLASS/NUMBER-NAME.png. Read as a folder they
have the order, class indices and pixels of the set itself.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from kdfast.data.boxes import BoxSource
from kdfast.data.named import dataset_name, open_data
from kdfast.data.sources import UNREADABLE, unreadable
from kdfast.errors import UsageError, unknown
from kdfast.training.parser import Parser
from kdfast.training.script import script
from kdfast.training.values import factor, positive

BOXED = ("cub200", "dogs120", "voc", "voc-animal", "mix320", "ilsvrc-mammals")


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m kdfast.training.crop", description=__doc__)
    group = parser.add_argument_group("crops")
    parser.flag(group, "--dataset", metavar="NAME", help=", ".join(BOXED))
    parser.flag(group, "--data-dir", metavar="PATH", help="where the set's files are")
    parser.switch(group, "--download", help="fetch the set first where the library can")
    parser.flag(
        group, "--box-margin", type=factor, metavar="FACTOR", help="enlarge boxes so many times"
    )
    parser.flag(
        group, "-j", "--workers", type=positive, default=os.cpu_count() or 1, help="threads"
    )
    group.add_argument("out", metavar="OUT", help="the folder to make")
    options = parser.fallbacks | parser.given(argv)
    if options["dataset"] is None:
        raise UsageError(f"give --dataset, one of {', '.join(BOXED)}")
    name = dataset_name(options["dataset"])
    if name not in BOXED:
        raise unknown("data set with boxes", name, BOXED)
    out = Path(options["out"])
    if out.exists():
        raise UsageError(f"{out} exists; remove it or name another folder")
    data = open_data(
        name, options["data_dir"], download=options["download"], box_margin=options["box_margin"]
    )
    splits = {"train": data.train, "val": data.eval}
    for split, source in splits.items():
        check_classes(name, split, source)
    write_splits(splits, out, options["workers"])
    for split, source in splits.items():
        print(f"{out / split}: {len(source)} images of {data.classes} classes")


def check_classes(name: str, split: str, source: BoxSource) -> None:
    """Refuse a split without an image of some class: as a folder it would be numbered anew."""
    present = set(source.labels())
    for label, class_name in enumerate(source.class_names):
        if label not in present:
            hint = "crop voc, or train" if name == "voc-animal" else "train"
            raise UsageError(
                f"the {split} split of {name} has no image of class {label} ({class_name}), and a "
                f"folder of images has no indices but those of its classes; {hint} with --dataset "
                f"{name} itself, which needs no copy"
            )


def write_splits(splits: dict[str, BoxSource], out: Path, workers: int) -> None:
    """Make folder `out` of the images of `splits`; it is there when it is whole.

    Raises `UserError` for an image that cannot be read, `OSError` where nothing can be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    pool = ThreadPoolExecutor(workers)
    try:
        for split, source in splits.items():
            folders = [unfinished / split / name for name in folder_names(source.class_names)]
            for folder in folders:
                folder.mkdir(parents=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of what it then raises or repairs
                for _ in pool.map(partial(_write, source, folders), range(len(source))):
                    pass
        unfinished.chmod(0o777 & ~_umask())  # not private, as temporary folders are
        unfinished.rename(out)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(unfinished, ignore_errors=True)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """The class names; with their indices in front where these are not the sorted names'."""
    if sorted(class_names) == list(class_names):
        return list(class_names)
    width = len(str(len(class_names) - 1))
    return [f"{label:0{width}d}-{name}" for label, name in enumerate(class_names)]


def _write(source: BoxSource, folders: Sequence[Path], index: int) -> None:
    try:
        image, label = source.read(index)
        # As the pipelines convert it; PNG does not have every mode.
        image = image.convert("RGB")
    except UNREADABLE as error:
        raise unreadable(source, index, error) from None
    width = len(str(len(source) - 1))
    stem = Path(source.crops[index].path).stem
    image.save(folders[label] / f"{index:0{width}d}-{stem}.png")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


if __name__ == "__main__":
    sys.exit(main())
