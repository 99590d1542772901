"""Rows of a teacher's answers, in memory or on disk; a row is what one image was answered with.

On disk every tensor of an answer is a file `NUMBER.bin` of equal rows, and `done.bin` has a byte a
row: 1 where the row is whole. That byte is written once the disk holds the row, so that whatever
ends a run, no row counts that is not whole.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdfast.errors import UserError
from kdfast.training.run_folder import write_at, write_atomic

_GIB = 2**30
# How much may be written before the disk is made to hold it.
_COMMIT_BYTES = 256 * 2**20
_REMEDY = "remove that folder, or give another --teacher-cache"


@dataclass(frozen=True)
class Field:
    """A tensor of an answer: a row has `shape` and `dtype`, kept in NHWC order if `channels_last`.

    So it comes back in the memory format it had, and what follows computes the same bits.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Field:
        """What the rows of `tensor` [B, ...] are."""
        last = (
            tensor.dim() == 4
            and tensor.is_contiguous(memory_format=torch.channels_last)
            and not tensor.is_contiguous()
        )
        return cls(name, tuple(tensor.shape[1:]), tensor.dtype, last)

    @property
    def nbytes(self) -> int:
        """Of a row."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of a row as it is kept."""
        return (*self.shape[1:], self.shape[0]) if self.channels_last else self.shape

    def kept(self, tensor: Tensor) -> Tensor:
        """`tensor` [B, *shape] as [B, *inner], contiguous."""
        if tuple(tensor.shape[1:]) != self.shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"{self.name} is {tensor.dtype} {list(tensor.shape[1:])} an image, not "
                f"{self.dtype} {list(self.shape)}"
            )
        return (tensor.permute(0, 2, 3, 1) if self.channels_last else tensor).contiguous()

    def given(self, rows: Tensor) -> Tensor:
        """Kept rows [B, *inner] as the teacher had them, [B, *shape]."""
        return rows.permute(0, 3, 1, 2) if self.channels_last else rows

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layout = " channels last" * self.channels_last
        return f"{self.name}: {dtype} {'x'.join(map(str, self.shape))}{layout}"


class MemoryRows:
    """`count` rows of `fields`, all of them in memory of `place`, handed out on `device`."""

    def __init__(
        self, fields: Sequence[Field], count: int, place: torch.device, device: torch.device
    ):
        self.fields, self.device = list(fields), device
        self.tensors = [
            torch.empty(count, *field.inner, dtype=field.dtype, device=place) for field in fields
        ]

    def write(self, first: int, answer: Sequence[Tensor]) -> None:
        """Set rows from `first` on to `answer`, a tensor a field."""
        for field, rows, tensor in zip(self.fields, self.tensors, answer, strict=True):
            rows[first : first + len(tensor)].copy_(field.kept(tensor))

    def read(self, indices: Tensor) -> list[Tensor]:
        """Rows `indices` [B], int64 on `device`."""
        found = []
        for field, rows in zip(self.fields, self.tensors, strict=True):
            if rows.device.type == self.device.type:
                picked = rows.index_select(0, indices)
            else:
                picked = _staging(field, len(indices))
                torch.index_select(rows, 0, indices.cpu(), out=picked)
                picked = picked.to(self.device, non_blocking=True)
            found.append(field.given(picked))
        return found


def _staging(field: Field, count: int) -> Tensor:
    """Pinned memory, which torch's allocator holds until a copy from it has ended."""
    return torch.empty(count, *field.inner, dtype=field.dtype, pin_memory=True)


class DiskRows:
    """At least `count` rows of `fields` in `folder`, handed out on `device`.

    `period` is what `count` is a multiple of; files of fewer periods grow, as a longer run needs.

    Raises `UserError` from `create` and `open` for files that are missing, damaged or cut short,
    and wherever the disk cannot be written.
    """

    def __init__(
        self, folder: Path, fields: Sequence[Field], count: int, period: int, device: torch.device
    ):
        self.folder, self.fields, self.device = folder, list(fields), device
        self.count, self.period = count, period
        self.done = np.zeros(0, np.uint8)
        self._files: list[int] = []
        self._maps: list[np.memmap] = []
        self._pending: list[tuple[int, int]] = []
        self._unsynced = 0

    @property
    def row_bytes(self) -> int:
        return sum(field.nbytes for field in self.fields)

    def create(self) -> None:
        """Make the files, or let them grow; those of a creation that was cut off are made anew."""
        flags = self.folder / "done.bin"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            before = flags.read_bytes() if flags.exists() else b""
            self._check(len(before))
            if len(before) >= self.count:
                return
            self._require_room(self.count - len(before))
            for number, field in enumerate(self.fields):
                with (self.folder / f"{number}.bin").open("r+b" if before else "wb") as file:
                    file.truncate(self.count * field.nbytes)
                    os.fsync(file.fileno())
            write_atomic(flags, before + bytes(self.count - len(before)))

    def open(self, *, write: bool) -> None:
        """Map what `create` has made, to `write` to it as well."""
        with writing(self.folder) if write else self._reading():
            self.done = np.frombuffer((self.folder / "done.bin").read_bytes(), np.uint8).copy()
            self._check(len(self.done))
            if len(self.done) < self.count:
                raise self._damaged("done.bin")
            for number, field in enumerate(self.fields):
                path, shape = self.folder / f"{number}.bin", (len(self.done), field.nbytes)
                self._maps.append(np.memmap(path, np.uint8, "r", shape=shape))
                if write:
                    self._files.append(os.open(path, os.O_WRONLY))
            if write:
                self._files.append(os.open(self.folder / "done.bin", os.O_WRONLY))

    def write(self, first: int, answer: Sequence[Tensor]) -> None:
        """Write rows from `first` on; they count from the next `commit` on, which may be this."""
        with writing(self.folder):
            for field, file, tensor in zip(self.fields, self._files, answer, strict=False):
                rows = field.kept(tensor).cpu().reshape(-1).view(torch.uint8).numpy()
                write_at(file, memoryview(rows), first * field.nbytes)
        self._pending.append((first, first + len(answer[0])))
        self._unsynced += len(answer[0]) * self.row_bytes
        if self._unsynced >= _COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Have the disk hold the rows written, then let them count."""
        if not self._pending:
            return
        *data, flags = self._files
        with writing(self.folder):
            for file in data:
                os.fsync(file)
            for first, end in self._pending:
                write_at(flags, memoryview(bytes([1]) * (end - first)), first)
                self.done[first:end] = 1
            os.fsync(flags)
        self._pending, self._unsynced = [], 0

    def read(self, indices: np.ndarray) -> list[Tensor]:
        """Rows `indices` [B], which count."""
        found = []
        for field, rows in zip(self.fields, self._maps, strict=True):
            pin = self.device.type == "cuda"
            raw = torch.empty(len(indices), field.nbytes, dtype=torch.uint8, pin_memory=pin)
            # Any mode but `raise` spares a buffer between.
            np.take(rows, indices, axis=0, out=raw.numpy(), mode="clip")
            picked = raw.view(field.dtype).view(len(indices), *field.inner)
            found.append(field.given(picked.to(self.device, non_blocking=True)))
        return found

    def close(self) -> None:
        """Commit, and let the files go."""
        try:
            self.commit()
        finally:
            for file in self._files:
                os.close(file)
            self._files, self._maps, self._pending = [], [], []

    def _check(self, rows: int) -> None:
        """Raise `UserError` unless files whose `done.bin` has so many rows are whole."""
        if rows % self.period:
            raise self._damaged("done.bin")
        for number, field in enumerate(self.fields) if rows else ():
            path = self.folder / f"{number}.bin"
            if not path.is_file() or path.stat().st_size < rows * field.nbytes:
                raise self._damaged(path.name)

    def _require_room(self, rows: int) -> None:
        needed, free = rows * self.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the teacher's answers need {needed / _GIB:.3g} GiB, and {self.folder} has "
                f"{free / _GIB:.3g} GiB left; give --teacher-cache a larger disk, or never"
            )

    def _damaged(self, name: str) -> UserError:
        return UserError(f"teacher cache {self.folder}: {name} is cut short or damaged; {_REMEDY}")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot read teacher cache {self.folder}: {error.strerror or error}; {_REMEDY}"
            ) from None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the remedy where a cache in `folder` cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        more = "; what was saved before is intact" if error.errno == errno.ENOSPC else ""
        raise UserError(
            f"cannot write teacher cache {folder}: {reason}{more}; give --teacher-cache another "
            "folder, on a disk that all processes share, or never"
        ) from None
