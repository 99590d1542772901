"""Features that the published code of knowledge consistency has dumped, a file an image."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdfast.data import ImageData, Loader
from kdfast.data.loader import BatchPlan
from kdfast.data.sources import Subset
from kdfast.errors import UserError
from kdfast.training import journal
from kdfast.training.feature_build import FIRST_IMAGES, Target, begin_all, writing
from kdfast.training.feature_cache import channel_scale
from kdfast.training.setup import evaluation_transform
from kdfast.training.tapped import Tapped

_KEYS = ("target", "pred1", "pred2", "convOut1", "convOut2")
_BATCH = 64


class Record(NamedTuple):
    """One image: its label; of A and B whether that is the first class or among the first three,
    [2, 2]; their features, float32."""

    label: int
    flags: torch.Tensor
    features: tuple[torch.Tensor, torch.Tensor]


class Dump:
    """A folder of torch files named by six-digit running numbers, each of one image.

    A file maps `target` to the label, `pred1` and `pred2` to two flags, `convOut1` and `convOut2`
    to the features of A and B, whose shapes are `shapes` (or, of a vector, [C, 1, 1]). It is read
    without running pickled code. Images were dumped in shuffled order: a number is no dataset
    index.

    Raises `UserError` when there are no such files or a number is missing.
    """

    def __init__(self, folder: str | Path, shapes: Sequence[tuple[int, ...]]):
        self.folder, self.shapes = Path(folder), shapes
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        self.files = sorted(path for path in found if re.fullmatch(r"\d{6}", path.stem))
        if not self.files:
            raise UserError(
                f"no feature dump at {folder}: it has no files named 000000.pt, 000001.pt, ..."
            )
        numbers = [int(path.stem) for path in self.files]
        for due, number in enumerate(numbers, start=numbers[0]):
            if number != due:
                raise UserError(
                    f"feature dump {folder} is not whole: record {due:06d} is missing or there "
                    "twice; dump it again"
                )

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names, sizes and contents of the files."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.name} {path.stat().st_size} {_contents(path)}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> Record:
        """Record `index`; raises `UserError` when it is damaged or of another shape."""
        path = self.files[index]
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            label, first, second, *features = (torch.as_tensor(content[key]) for key in _KEYS)
            flags = torch.stack([first.reshape(2), second.reshape(2)]) != 0
        except pickle.UnpicklingError as error:
            reason = "objects besides tensors" if "GLOBAL" in str(error) else "no whole torch file"
            raise UserError(f"{path} holds {reason}, and kdfast runs no pickled code") from None
        except (RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError) as error:
            line = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise UserError(
                f"{path} is no record of a feature dump, with {', '.join(_KEYS)} ({line})"
            ) from None
        for feature, shape, key in zip(features, self.shapes, _KEYS[3:], strict=True):
            pooled = (*shape, 1, 1) if len(shape) == 1 else shape
            if tuple(feature.shape) not in (shape, pooled):
                raise UserError(
                    f"{path}: {key} is {list(feature.shape)}, and the layer gives {list(shape)}; "
                    "choose the dumped layer with --layer"
                )
        a, b = (f.float().view(s) for f, s in zip(features, self.shapes, strict=True))
        return Record(int(label), flags, (a, b))


def _contents(path: Path) -> str:
    """What the file at `path` holds: the checksums of a zip archive's members, or its SHA-256.

    Torch files are such archives; their directory has a CRC-32 of each member, unless whoever wrote
    them turned that off, which leaves zeros.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(m.filename, m.file_size, m.CRC) for m in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        members = []
    if members and all(crc for _, size, crc in members if size):
        return repr(members)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def import_dump(
    dump: Dump, targets: Sequence[Target], options: argparse.Namespace, data: ImageData
) -> None:
    """Make caches of `dump`, row = record: of A's features and B's, by the main process alone.

    Raises `UserError` when a record cannot be read, or the features are not those of the networks.
    """
    _require_networks(dump, [target.net for target in targets], options, data)
    begun: list[Target] = []
    try:
        # Of one network twice there is one cache.
        single = {t.path: (i, t) for i, t in reversed(list(enumerate(targets)))}
        wanted = begin_all([target for _, target in single.values()], begun)
        due = [single[path] for path in single if wanted[path]]
        first = [dump.read(i) for i in range(min(FIRST_IMAGES, len(dump)))]
        for position, target in due:
            target.scale = channel_scale(torch.stack([r.features[position] for r in first]))
            target.open()
        for start in range(0, len(dump), _BATCH) if due else ():
            stop = min(start + _BATCH, len(dump))
            records = [dump.read(i) for i in range(start, stop)]
            labels = torch.tensor([record.label for record in records])
            for position, target in due:
                features = torch.stack([record.features[position] for record in records])
                flags = torch.stack([record.flags[position] for record in records])
                with writing(target.path.parent):
                    target.put(start, features, labels, flags)
        for _, target in due:
            with writing(target.path.parent):
                target.end()
                target.complete()
    finally:
        for target in begun:
            target.discard()
    journal.say(f"features of {len(dump)} records taken from {dump.folder}")


@torch.no_grad()
def _require_networks(
    dump: Dump, nets: Sequence[Tapped], options: argparse.Namespace, data: ImageData
) -> None:
    """Refuse a dump whose first record no training image of its class accounts for."""
    record = dump.read(0)
    images = [i for i, label in enumerate(data.train.labels()) if label == record.label]
    for net, feature in zip(nets, record.features, strict=True):
        transform = evaluation_transform(options, data, net.inputs.size)
        plan = BatchPlan(len(images), _BATCH)
        loader = Loader(Subset(data.train, images), transform, plan, classes=data.classes)
        batches: list[Any] = list(loader.epoch(0)) if images else []
        due = feature.flatten().double()
        if not any(
            ((net.features(b.images).cpu().flatten(1).double() - due).norm(dim=1)
             <= 0.01 * due.norm()).any()
            for b in batches
        ):  # fmt: skip
            raise UserError(
                f"{dump.files[0]} is of no training image of class {record.label} in network "
                f"{net.name.upper()} at '{net.layer}': another network, layer, image set or "
                "preprocessing"
            )
