"""The masks of an evolved network on disk: runs as text, bits as bytes, never dense."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from kdfast.errors import UserError
from kdfast.models import architecture
from kdfast.ops import SplitMask


@dataclass(frozen=True)
class Split:
    """Masks by weight name, in the network's order, with the rate and mode they were made with."""

    masks: dict[str, SplitMask]
    rate: float
    mode: str

    @property
    def checksum(self) -> str:
        """SHA-256 (hex) over the masks in order: JSON [name, shape, rows, columns], then bits."""
        digest = hashlib.sha256()
        for name, mask in self.masks.items():
            head = [name, mask.shape, mask.rows, mask.columns]
            digest.update(json.dumps(head, separators=(",", ":")).encode())
            if mask.bits is not None:
                digest.update(mask.bits.cpu().numpy())
        return digest.hexdigest()

    def sums(self) -> dict[str, tuple[int, int]]:
        """Of each weight: kept entries, all entries."""
        sizes = {name: mask.sum() for name, mask in self.masks.items()}
        return {name: (kept, _entries(self.masks[name])) for name, kept in sizes.items()}


def _entries(mask: SplitMask) -> int:
    count = 1
    for side in mask.shape:
        count *= side
    return count


def write_split(path: Path, split: Split) -> None:
    """Write `split` as safetensors, atomically: bits are tensors, all else is in the metadata.

    Raises `UserError` when it cannot be written.
    """
    states = {name: mask.state() for name, mask in split.masks.items()}
    tensors = {
        name: bits for name, s in states.items() if (bits := s.pop("bits", None)) is not None
    }
    record = {"rate": split.rate, "mode": split.mode, "masks": states}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(serialize(tensors, {key: json.dumps(v) for key, v in record.items()}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def read_split(path: Path) -> Split:
    """What `write_split` wrote; raises `UserError` when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            record = {key: json.loads(value) for key, value in file.metadata().items()}
            bits: Mapping[str, Tensor] = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        masks = {
            name: SplitMask.from_state(state | ({"bits": bits[name]} if name in bits else {}))
            for name, state in record["masks"].items()
        }
        return Split(masks, float(record["rate"]), str(record["mode"]))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError):
        raise UserError(f"{path} is damaged; put it back as it was") from None


def check_split(path: Path, split: Split, model: nn.Module, rate: float, mode: str) -> None:
    """Raise `UserError` unless `split`, read from `path`, is one of `model` at `rate`."""
    if (split.rate, split.mode) != (rate, mode):
        raise UserError(
            f"{path} holds {split.mode} masks of rate {split.rate:g}, the run has {mode} at "
            f"{rate:g}; put it back as it was"
        )
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    wrong = [name for name, mask in split.masks.items() if shapes.get(name) != mask.shape]
    if wrong:
        raise UserError(
            f"{path} does not fit {architecture(model)}: {wrong[0]} is "
            f"{list(split.masks[wrong[0]].shape)} there; put it back as it was"
        )
