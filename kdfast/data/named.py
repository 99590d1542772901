"""Image sets by name: our own and those of timm's `create_dataset`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdfast.data.arrays import cifar, digits, fashion_mnist
from kdfast.data.boxes import with_margin
from kdfast.data.cub import cub200
from kdfast.data.dogs import dogs120
from kdfast.data.folders import folder, imagenet
from kdfast.data.ilsvrc import ilsvrc_mammals
from kdfast.data.lists import lists
from kdfast.data.mix320 import mix320
from kdfast.data.oxford import aircraft, flowers102
from kdfast.data.sources import FirstOf, ImageData, Splits, TimmSource, half_of
from kdfast.data.tiny_imagenet import tiny_imagenet
from kdfast.data.voc import voc, voc_animal
from kdfast.errors import UsageError, UserError, unknown

_NAMED: dict[str, Callable[..., ImageData]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar("cifar10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": cifar("cifar100", 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny-imagenet": tiny_imagenet,
    "imagenet": imagenet,
    "folder": folder,
    "lists": lists,
    "flowers102": flowers102,
    "aircraft": aircraft,
    "cub200": cub200,
    "dogs120": dogs120,
    "voc": voc,
    "voc-animal": voc_animal,
    "mix320": mix320,
    "ilsvrc-mammals": ilsvrc_mammals,
}
# Those whose splits are where the user says.
_ANY_SPLITS = ("folder", "lists")


# An AssertionError is timm's word for an unknown name; the others come from the set's reader.
_UNKNOWN_TO_TIMM = (
    AssertionError, RuntimeError, ValueError, TypeError, OSError, LookupError, ImportError
)  # fmt: skip


def _from_timm(
    name: str, data_dir: Path | None, download: bool, splits: Splits, classes: int | None
) -> ImageData:
    from timm.data import create_dataset

    if name.startswith("torch/") and data_dir is None:
        data_dir = Path("data")

    def open_split(split: str) -> TimmSource:
        try:
            dataset = create_dataset(
                name, root=data_dir and str(data_dir), split=split, download=download
            )
        except _UNKNOWN_TO_TIMM as error:
            reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
            kind = UsageError if isinstance(error, AssertionError) else UserError
            raise kind(f"timm cannot open {name} split '{split}': {reason}") from None
        if getattr(dataset, "reader", None) is not None:
            _check_label_column(dataset.reader, f"{name} split '{split}'")
        return TimmSource(dataset, name)

    train = open_split(splits[0] or "train")
    held_out = open_split(splits[1] or "validation")
    test = open_split(splits[2]) if splits[2] else None
    names = getattr(train.reader or train.dataset, "class_to_idx", None)
    found = classes or (len(names) if names else None)
    if not found:
        raise UsageError(f"{name} does not say how many classes it has; give --num-classes")
    return ImageData(name, train, held_out, found, test=test)


def _check_label_column(reader, where: str) -> None:
    """Refuse a Hugging Face set whose rows do not all have a class index."""
    table, key = reader.dataset, reader.label_key
    remedy = (
        "kdfast reads class indices from there; prepare a copy of the set, or a --dataset folder"
    )
    if key not in table.column_names:
        names = ", ".join(table.column_names)
        raise UserError(f"{where} has no column '{key}' among {names}; {remedy}")
    kind = getattr(table.features[key], "dtype", type(table.features[key]).__name__)
    if not kind.startswith(("int", "uint", "bool")):
        raise UserError(f"{where}: column '{key}' holds {kind} values; {remedy}")
    labels = table[key][:]
    if None in labels:
        row = labels.index(None)
        raise UserError(f"{where}: column '{key}' has no value for image {row}; {remedy}")


def dataset_names() -> list[str]:
    """The names `open_data` knows beside timm's `prefix/name` forms."""
    return sorted(_NAMED)


def dataset_name(name: str) -> str:
    """The canonical form of `name`; raises `UsageError` with the closest when there is none."""
    prefix, slash, _ = name.partition("/")
    if prefix in ("wds", "tfds", "hfids") and slash:
        raise UsageError(
            f"{name} is a stream; its images have no index, which the loaders need. "
            "Use its random-access form (hfds/ for hfids/) or unpack it to a folder"
        )
    if name in ("torch/cifar10", "torch/cifar100"):
        return name.removeprefix("torch/")  # the same files; by this name their size is known
    if prefix in ("torch", "hfds") and slash:
        return name
    if name.replace("_", "-") not in _NAMED:
        raise unknown("data set", name, [*_NAMED, "torch/cifar10", "hfds/owner/name"])
    return name.replace("_", "-")


def open_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    train_split: str | None = None,
    eval_split: str | None = None,
    test_split: str | None = None,
    classes: int | None = None,
    box_margin: float | None = None,
    train_half: str | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
) -> ImageData:
    """Open image set `name`: one of `dataset_names()` or a name of `timm.data.create_dataset`.

    `box_margin` is the factor by which boxes are enlarged, the set's own where None. `train_half`
    is `a` or `b` of `half_of`. The limits keep the first images of a split only, of
    the half where there is one; `eval_limit` is for testing too.

    Raises `UsageError` for an unknown name or a set without a class count, `UserError` when files
    are missing or damaged.
    """
    data_dir = Path(data_dir) if data_dir is not None else None
    splits = (train_split, eval_split, test_split)
    name = dataset_name(name)
    if name in _NAMED and name not in _ANY_SPLITS and any(splits):
        raise UsageError(
            f"{name} has splits of its own; drop --train-split, --val-split and --test-split"
        )
    if name in _NAMED:
        data = _NAMED[name](data_dir, download, splits)
    else:
        data = _from_timm(name, data_dir, download, splits, classes)
    if classes and classes != data.classes:
        raise UsageError(f"--num-classes {classes}, but {name} has {data.classes} classes")
    if box_margin is not None:
        data = with_margin(data, box_margin)
    changed: dict[str, Any] = {}
    if train_half:
        data = replace(data, train=half_of(data.train, train_half))
    if eval_limit:
        kept = {
            name: range(part.start, min(part.stop, eval_limit)) for name, part in data.parts.items()
        }
        changed["parts"] = {name: part for name, part in kept.items() if part}
    for key, split, limit in (
        ("train", "training", train_limit),
        ("eval", "evaluation", eval_limit),
        ("test", "test", eval_limit),
    ):
        source = getattr(data, key)
        if source is not None and len(source) == 0:
            raise UserError(f"the {split} split of {name} is empty")
        if source is not None and limit:
            changed[key] = FirstOf(source, limit)
    return replace(data, **changed)
