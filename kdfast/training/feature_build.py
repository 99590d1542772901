"""Making feature caches: one pass over the images, whatever processes there are."""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from kdfast.data import Batch, BatchPlan, ImageData, Loader, Source
from kdfast.errors import UserError
from kdfast.training import journal
from kdfast.training.evaluate import hits
from kdfast.training.feature_cache import (
    COLUMNS,
    DTYPES,
    as_integers,
    bytes_of,
    channel_scale,
    encode,
    row_checksums,
    sync,
)
from kdfast.training.options import batch_size
from kdfast.training.run_folder import on_main, write_at
from kdfast.training.setup import evaluation_transform, loader_settings
from kdfast.training.tapped import Tapped

# The scales are fixed by so many.
FIRST_IMAGES = 64
_GIB = 2**30


def data_fingerprint(source: Source, *, in_memory: bool) -> str:
    """SHA-256 (hex) of which images `source` has, with which labels.

    Of images in memory it is over their pixels; of files over their names, with the folder each is
    in, and their sizes: a set may move, and no file is read.
    """
    digest = hashlib.sha256(np.asarray(source.labels(), "<i8"))
    if in_memory:
        for index in range(len(source)):
            image, _ = source.read(index)
            digest.update(f"{image.mode} {image.size}".encode())
            digest.update(image.tobytes())
        return digest.hexdigest()
    for index in range(len(source)):
        name = source.describe(index)
        digest.update(f"{name.rsplit('/', 2)[-2:]} {_size_of(name)}".encode())
    return digest.hexdigest()


def _size_of(name: str) -> int | None:
    """Bytes of the file that `name` is, or starts with before a box in it; None where none is."""
    for path in (name, name.rpartition(" box ")[0]):
        with suppress(OSError, ValueError):
            return os.stat(path).st_size
    return None


@dataclass
class Target:
    """A cache to be made at `path`: of what network, and its `record`."""

    net: Tapped
    path: Path
    record: dict[str, Any]
    scale: torch.Tensor | None = None
    lock: IO | None = None
    file: IO | None = None
    columns: IO | None = None
    columns_start: int = 0  # where in their file the rows begin

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    def begin(self) -> bool:
        """Take the folder under its other name; whether the cache is still to be made.

        While another command makes it, this waits. A folder that a killed one left is emptied.
        """
        while not self.path.exists():
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.partial.mkdir(exist_ok=True)
                self.lock = (self.partial / ".lock").open("a")
            except (FileNotFoundError, FileExistsError):
                # Renamed or removed by the command that has just made it.
                if os.path.lexists(self.partial) and not self.partial.is_dir():
                    raise
                continue
            _lock(self.lock, self.path)
            with suppress(FileNotFoundError):
                # Not so where the other one has removed the folder, or given it its name.
                if os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.lock.name)):
                    if not self.path.exists():
                        break
                    shutil.rmtree(self.partial)
            self.release()
        else:
            return False
        with (self.partial / "data.bin").open("wb") as file:
            file.truncate(2 * self.record["images"] * int(np.prod(self.record["shape"])))
        np.save(self.partial / "columns.npy", np.zeros(self.record["images"], COLUMNS))
        return True

    def open(self) -> None:
        """Open the files of the folder for this process's rows."""
        self.file = (self.partial / "data.bin").open("r+b", buffering=0)
        self.columns = (self.partial / "columns.npy").open("r+b", buffering=0)
        np.lib.format.read_magic(self.columns)
        np.lib.format.read_array_header_1_0(self.columns)
        self.columns_start = self.columns.tell()

    def write(self, batch: Batch, first: int) -> None:
        """Write the rows of `batch`, whose images follow each other from dataset index `first`."""
        features, logits = self.net.features(batch.images, logits=True)
        ranked = hits(logits, batch.labels.to(logits.device)).cpu()
        flags = torch.stack([ranked[:, 0], ranked[:, :3].any(1)], 1)
        self.put(first, features, batch.labels, flags)

    def put(
        self, first: int, features: torch.Tensor, labels: torch.Tensor, flags: torch.Tensor
    ) -> None:
        """Write `features` from row `first` on; `flags` [N, 2] are for the columns.

        Raises `UserError` for a feature that is not finite or does not fit the dtype.
        """
        if not features.isfinite().all():
            raise UserError(
                f"the feature of network {self.net.name.upper()} at '{self.net.layer}' is not "
                f"finite (NaN or infinity) for an image from {first} to {first + len(features) - 1}"
            )
        stored = encode(features, self.scale.to(features.device), DTYPES[self.record["dtype"]])
        over = (~stored.flatten(1).isfinite().all(1)).nonzero()
        if len(over):
            raise UserError(
                f"image {first + over[0].item()} has a feature of network {self.net.name.upper()} "
                f"at '{self.net.layer}' that is too large for float16 beside those of the first "
                f"{FIRST_IMAGES} images; add --feature-dtype bfloat16, or --features live"
            )
        rows = as_integers(stored.cpu().contiguous())
        write_at(self.file.fileno(), memoryview(rows).cast("B"), first * rows.strides[0])
        part = np.zeros(len(rows), COLUMNS)
        part["label"], part["top1"], part["top3"] = labels, flags[:, 0], flags[:, 1]
        part["crc32"] = row_checksums(rows)
        # By bytes, as the rows are: mapped pages that two nodes share would overwrite each other.
        start = self.columns_start + first * COLUMNS.itemsize
        write_at(self.columns.fileno(), memoryview(part.tobytes()), start)

    def end(self) -> None:
        """Have the disk hold what this process has written."""
        for file in (self.file, self.columns):
            os.fsync(file.fileno())
        self.close()

    def close(self) -> None:
        for file in (self.file, self.columns):
            if file is not None:
                file.close()

    def complete(self) -> None:
        """Give the folder, whose rows are all written, its name."""
        np.save(self.partial / "scale.npy", self.scale.numpy())
        with (self.partial / "meta.json").open("w") as file:
            json.dump(self.record, file, indent=2)
        # Without the lock file: closing it anywhere in this process would give the lock up.
        for path in (*self.partial.glob("[!.]*"), self.partial):
            sync(path)
        self.partial.rename(self.path)
        sync(self.path.parent)
        self.release()

    def release(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def discard(self) -> None:
        """Close the files; remove what is there of the folder, while it is held."""
        self.close()
        if self.lock is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.release()


def _lock(file: IO, path: Path) -> None:
    """Wait until `file` is this process's alone."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            journal.say(f"note: {file.name} cannot be locked here ({error.strerror})")
            return
        journal.say(f"feature cache {path} is being made by another process; waiting for it")
        fcntl.lockf(file, fcntl.LOCK_EX)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the remedy where caches in `folder` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write a feature cache in {folder}: {error.strerror or error}; give another "
            "--feature-dir, on a disk that all processes share, or --features live"
        ) from None


def build(
    targets: Sequence[Target],
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    source: Source,
) -> None:
    """Make the caches `targets` of all images of `source`, a split of `data`.

    Every process computes and writes its own rows; the main one does the rest. What fails leaves
    nothing that could be taken for a cache.

    Raises `UserError` when the disk is too small or cannot be written, an image cannot be read, or
    a feature is not finite or does not fit its dtype.
    """
    begun: list[Target] = []
    try:
        wanted = on_main(accelerator, lambda: begin_all(targets, begun), patient=True)
        targets = [target for target in targets if wanted[target.path]]
        for size in dict.fromkeys(target.net.inputs.size for target in targets):
            group = [target for target in targets if target.net.inputs.size == size]
            _fill(group, size, options, accelerator, data, source)
        accelerator.wait_for_everyone()
        on_main(accelerator, lambda: _complete(targets), patient=True)
    finally:
        # Of the main process, and files that all opened.
        for target in (*begun, *targets):
            target.discard()
    for target in targets:
        net, gib = target.net, bytes_of(target.record) / _GIB
        journal.say(
            f"features of {net.name.upper()} at {net.layer}: {target.record['images']} "
            f"{target.record['split']} images, {gib:.3f} GiB in {target.path}"
        )


def begin_all(targets: Sequence[Target], begun: list[Target]) -> dict[Path, bool]:
    """Which of `targets` are to be made; these are `begun`, each as soon as its folder is held."""
    wanted = {}
    with writing(targets[0].path.parent):
        _require_room(targets)
        # In one order: two commands that wait for each other's caches would wait forever.
        for target in sorted(targets, key=lambda target: target.path):
            begun.append(target)
            wanted[target.path] = target.begin()
    return wanted


def _complete(targets: Sequence[Target]) -> None:
    for target in targets:
        with writing(target.path.parent):
            target.complete()


def _require_room(targets: Sequence[Target]) -> None:
    folder = targets[0].path.parent
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    needed, free = sum(bytes_of(t.record) for t in targets), shutil.disk_usage(place).free
    # What a killed build left is written over.
    with suppress(OSError):
        free += sum((t.partial / "data.bin").stat().st_blocks * 512 for t in targets)
    if needed > free:
        raise UserError(
            f"the feature caches of {len(targets)} networks need {needed / _GIB:.3g} GiB, and "
            f"{folder} has {free / _GIB:.3g} GiB left; give --feature-dir a larger disk, or "
            "--features live"
        )


def first_images(
    count: int,
    options: argparse.Namespace,
    data: ImageData,
    source: Source,
    size: tuple[int, int],
) -> torch.Tensor:
    """The first `count` images of `source` as the evaluation pipeline gives them, uint8."""
    plan = BatchPlan(min(count, len(source)), count)
    loader = Loader(source, evaluation_transform(options, data, size), plan, classes=data.classes)
    return next(iter(loader.epoch(0))).images


def _fill(
    targets: Sequence[Target],
    size: tuple[int, int],
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    source: Source,
) -> None:
    """Write this process's rows of `targets`, whose networks take images of `size`."""

    def scales() -> list[list[float]]:
        images = first_images(FIRST_IMAGES, options, data, source, size)
        return [channel_scale(target.net.features(images)).tolist() for target in targets]

    # Of one process: others may round differently, just where the next power of two begins.
    for target, scale in zip(targets, on_main(accelerator, scales), strict=True):
        target.scale = torch.tensor(scale)
    processes = accelerator.num_processes
    plan = BatchPlan(
        len(source),
        batch_size(options, processes),
        processes=processes,
        rank=accelerator.process_index,
    )
    settings = loader_settings(options, data, accelerator)
    loader = Loader(source, evaluation_transform(options, data, size), plan, **settings)
    shown = accelerator.is_main_process and sys.stderr.isatty()
    bar = tqdm(total=plan.steps, desc="features", disable=not shown, leave=False)
    try:
        with writing(targets[0].path.parent), bar:
            for target in targets:
                target.open()
            for batch in loader.epoch(0):
                if batch.portion.count:
                    for target in targets:
                        target.write(batch, batch.portion.indices[0])
                bar.update()
            for target in targets:
                target.end()
    finally:
        loader.close()
