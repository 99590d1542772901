"""Features of a frozen network on disk: 16 bits a value, one row an image, mapped into memory.

A cache is a folder. `data.bin` holds [N, *shape] in float16 or bfloat16, row = dataset index, and a
value is what is stored times the scale of its channel; `scale.npy` holds these, float32 [C];
`columns.npy` what else there is of each image; `meta.json` what the features are of. It is written
under another name and renamed when complete.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.errors import UserError

LAYOUT = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Of each image: its label, whether that is the network's first class or among its first three,
# and a checksum of its row.
COLUMNS = np.dtype([("label", "<i4"), ("top1", "?"), ("top3", "?"), ("crc32", "<u4")])
# Told first when several things differ.
_TELLING = ("checksum", "architecture", "layer", "data", "images", "input_size", "shape")
_WORDS = {"checksum": "other weights", "data": "other images or labels"}
_REMEDY = "remove that folder, or give another --feature-dir"


def channel_scale(features: torch.Tensor) -> torch.Tensor:
    """Powers of two, float32 [C], by which the channels of `features` [N, C, ...] are divided.

    1, which costs nothing to undo, where the largest of a channel is 1/8 or more and that of all
    no more than 256; else it lies between 8 and 16 then. So float16, which ends at 65504, has room
    for 255 times what was there. A channel counts for no less than a 64th of the largest one: what
    is silent in these images may not be in others.
    """
    others = [axis for axis in range(features.dim()) if axis != 1]
    largest = features.abs().amax(others).double().cpu().numpy()
    largest = np.maximum(largest, max(largest.max() / 64, 2.0**-100))
    powers = np.ldexp(np.float32(1), np.frexp(largest)[1] - 4)
    usual = (largest >= 1 / 8) & (largest.max() <= 256)
    return torch.from_numpy(np.where(usual, np.float32(1), powers))


def encode(features: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`features` [N, C, ...] as they are stored, with `scale` [C]; infinite where they overflow."""
    return (features / along_channels(scale, features)).to(dtype)


def decode(stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """float32 features [N, C, ...] from what is stored of them.

    `scale` [C] is on its device; None where all of it is 1.
    """
    features = stored.float()
    return features if scale is None else features.mul_(along_channels(scale, stored))


def along_channels(scale: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, *[1] * (features.dim() - 2))


def row_checksums(stored: np.ndarray) -> list[int]:
    """CRC-32 of each row of `stored`, integers [N, values]."""
    return [zlib.crc32(row) for row in stored]


def as_integers(stored: torch.Tensor) -> np.ndarray:
    """16-bit values [N, ...] on the CPU as int16 [N, values], the memory shared."""
    return stored.view(torch.int16).view(len(stored), -1).numpy()


def bytes_of(record: Mapping[str, Any]) -> int:
    """What a cache of that record takes on disk, its small files aside."""
    return record["images"] * (2 * math.prod(record["shape"]) + COLUMNS.itemsize)


class FeatureCache:
    """A complete cache, read row by row; `record` is what its `meta.json` says.

    Each row's checksum is compared when it is read for the first time.

    Raises `UserError` when a file is missing, damaged or cut short.
    """

    def __init__(self, path: Path):
        self.path = path
        self.record = record = self._read_record()
        try:
            self.images, self.shape = int(record["images"]), tuple(map(int, record["shape"]))
            self.dtype = DTYPES[record["dtype"]]
        except (KeyError, TypeError, ValueError):
            raise self._damaged("meta.json") from None
        self.scale = torch.from_numpy(self._read_array("scale.npy", np.float32, self.shape[:1]))
        if not (self.scale.isfinite() & (self.scale > 0)).all():
            raise self._damaged("scale.npy")
        self.columns = self._read_array("columns.npy", COLUMNS, (self.images,))
        data, values = path / "data.bin", math.prod(self.shape)
        if not data.is_file() or data.stat().st_size != 2 * self.images * values:
            raise self._damaged("data.bin")
        self._rows = np.memmap(data, np.int16, "r", shape=(self.images, values))
        self._read_before = np.zeros(self.images, bool)

    def rows(self, indices: Sequence[int], *, pin: bool = False) -> torch.Tensor:
        """The stored rows [B, *shape] of images `indices`, in their order; pinned on request."""
        wanted = np.asarray(indices)
        if wanted.min() < 0 or wanted.max() >= self.images:
            raise IndexError(f"{self.path} has {self.images} rows")
        stored = torch.empty(len(wanted), *self.shape, dtype=self.dtype, pin_memory=pin)
        found = as_integers(stored)
        # Any mode but `raise` spares a buffer between.
        np.take(self._rows, wanted, axis=0, out=found, mode="clip")
        fresh = np.flatnonzero(~self._read_before[wanted])
        if len(fresh):
            sums = row_checksums(found[fresh])
            bad = wanted[fresh][self.columns["crc32"][wanted[fresh]] != sums]
            if len(bad):
                raise self._damaged(f"row {bad[0]} of data.bin")
            self._read_before[wanted[fresh]] = True
        return stored

    def require(self, record: Mapping[str, Any]) -> None:
        """Raise `UserError`, naming what differs first, unless the cache is of that `record`."""
        keys = [*_TELLING, *sorted(self.record.keys() | record.keys())]
        for key in keys:
            before, now = self.record.get(key), record.get(key)
            if before == now:
                continue
            if key in _WORDS:
                reason = f"{_WORDS[key]} ({_short(before)}, not {_short(now)})"
            else:
                reason = f"another {key} ({_short(before)}, not {_short(now)})"
            raise UserError(f"feature cache {self.path} is of {reason}; {_REMEDY}")

    def require_like(self, features: torch.Tensor, tolerance: float = 0.01) -> None:
        """Raise `UserError` unless the first rows are `features` [n, *shape].

        By the norm of each image's difference, relative to its own: 16 bits cost 0.003 at most and
        the arithmetic of another device 0.001 or so, while another image or network is far off.
        """
        stored = decode(self.rows(range(len(features))), self.scale).flatten(1).double()
        live = features.cpu().flatten(1).double()
        near = (stored - live).norm(dim=1) <= tolerance * live.norm(dim=1)
        far = (~near).nonzero()
        if len(far):
            raise UserError(
                f"feature cache {self.path} does not hold what the network answers to image "
                f"{far[0].item()}: other weights, other images or another preprocessing; {_REMEDY}"
            )

    def _read_record(self) -> dict[str, Any]:
        meta = self.path / "meta.json"
        if not meta.is_file():
            raise UserError(f"{self.path} is no feature cache: it has no meta.json; {_REMEDY}")
        try:
            record = json.loads(meta.read_text())
            version = record["layout"]
        except (OSError, ValueError, KeyError, TypeError):
            raise self._damaged("meta.json") from None
        if version != LAYOUT:
            raise UserError(
                f"feature cache {self.path} has layout {version}, not {LAYOUT}: another version of "
                f"kdfast made it; {_REMEDY}"
            )
        return record

    def _read_array(self, name: str, dtype: np.dtype | type, shape: tuple) -> np.ndarray:
        try:
            found = np.load(self.path / name, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise self._damaged(name) from None
        if found.dtype != dtype or found.shape != shape:
            raise self._damaged(name)
        return found

    def _damaged(self, what: str) -> UserError:
        return UserError(f"feature cache {self.path}: {what} is missing or damaged; {_REMEDY}")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def sync(path: Path) -> None:
    """Have the disk hold `path`, a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
