"""CUB-200-2011 and Stanford Dogs as one set."""

from __future__ import annotations

from pathlib import Path

from kdfast.data.boxes import BoxSource, Crop
from kdfast.data.cub import cub200
from kdfast.data.dogs import dogs120
from kdfast.data.sources import IMAGENET_MEAN, IMAGENET_STD, ImageData, Splits


def mix320(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """The birds of `cub200`, classes 0 to 199, then the dogs of `dogs120`, classes 200 to 319.

    Both are looked for in `data_dir` as by their own names. Evaluated together and each apart
    (Liang et al., ICLR 2020, arXiv 1908.01581).
    """
    birds, dogs = (open_set(data_dir, download, splits) for open_set in (cub200, dogs120))
    names = [*birds.train.class_names, *dogs.train.class_names]
    train, held_out = (
        BoxSource(
            [
                *getattr(birds, split).crops,
                *(
                    Crop(p, label + birds.classes, box)
                    for p, label, box in getattr(dogs, split).crops
                ),
            ],
            names,
        )
        for split in ("train", "eval")
    )
    count = len(birds.eval)
    parts = {birds.name: range(count), dogs.name: range(count, len(held_out))}
    figures = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "parts": parts}
    return ImageData("mix320", train, held_out, len(names), **figures)
