"""Heads on disk: one safetensors file each, with a record of what it is mounted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdfast.errors import UsageError, UserError
from kdfast.models.factory import architecture
from kdfast.models.heads import DeepHead, LinearHead
from kdfast.models.taps import Taps, find_layer
from kdfast.models.weights import checksum, read_weights, save_weights

KINDS = ("linear", "deep")
_MADE_BY = "train/heads.py --kind"


@dataclass(frozen=True)
class MountedHeads:
    """Heads of one kind, shallow to deep, and the layers of their network they are mounted on.

    `parent` is the checksum of that network's weights, None where it is still to be trained.
    """

    kind: str
    layers: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    parent: str | None = None
    where: Path | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(module.width for module in self.modules)

    def checksum(self) -> str:
        """SHA-256 over all weights by layer and name."""
        return checksum(
            {
                f"{layer}.{name}": value
                for layer, module in zip(self.layers, self.modules, strict=True)
                for name, value in module.state_dict().items()
            }
        )

    def require_parent(self, network: str) -> None:
        """Raise `UserError` unless the weights of checksum `network` are those of the parent."""
        if self.parent != network:
            raise UserError(
                f"{self.where}: these heads are not this teacher's: they belong to weights "
                f"{str(self.parent)[:8]}, the teacher has {network[:8]}; give that network as "
                f"--teacher-checkpoint, or train heads with {_MADE_BY} {self.kind}"
            )


def head_name(index: int, layer: str) -> str:
    return f"{index}-{layer.replace('/', '_').replace(':', '.')}.safetensors"


def save_head(folder: Path, head: nn.Module, record: Mapping[str, Any]) -> None:
    """Write `head` into `folder`, atomically, under a name made of its index and layer.

    Args:
        record: kind, index (from 1, shallow to deep), heads (how many there are), layer, shape
            (C, H, W), classes, parent; pool of a linear head, widths of a deep one; and what else
            is worth knowing. Values are JSON.

    Raises:
        UserError: a weight is not finite, or the file cannot be written.
    """
    save_weights(folder / head_name(record["index"], record["layer"]), head, record)


def load_heads(
    path: str | Path,
    network: nn.Module,
    size: tuple[int, int],
    classes: int,
    *,
    kind: str | None = None,
    parent: str | None = None,
) -> MountedHeads:
    """The heads in run folder `path`, or in the folder itself, in the order of their indices.

    Args:
        network: what they are mounted on, an uncompiled model fed images of `size` pixels.
        classes: how many classes are told apart.
        kind: `linear` or `deep`; None takes either.
        parent: checksum of the network's weights; None leaves that to `require_parent`.

    Raises:
        UserError: no heads there; a file that is damaged, renamed or missing; heads of another
            kind, for other classes, for a layer the network does not have or whose features have
            another shape, or of other weights.
    """
    path = Path(path)
    folder = path / "heads" if (path / "heads").is_dir() else path
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    heads = [(file, *_read(file)) for file in files if file.name[:1].isdigit()]
    if not heads:
        raise UserError(
            f"no heads at {path}; give a run folder of train/heads.py, or train heads with "
            f"{_MADE_BY} {kind or 'linear'}"
        )
    heads.sort(key=lambda head: head[2]["index"])
    _check_complete(folder, [(file, record) for file, _, record in heads])
    kinds = {record["kind"] for *_, record in heads}
    if kind is not None and kinds != {kind}:
        raise UserError(
            f"{folder}: the heads are {' and '.join(sorted(kinds))}, the method needs {kind} ones; "
            f"make them with {_MADE_BY} {kind}"
        )
    for file, _, record in heads:
        if record["classes"] != classes:
            raise UserError(
                f"{file}: the head tells {record['classes']} classes apart, the data has {classes}"
            )
    _check_shapes([(file, record) for file, _, record in heads], network, size)
    modules = tuple(_build(file, state, record) for file, state, record in heads)
    parents = {record["parent"] for *_, record in heads}
    if len(parents) > 1:
        raise UserError(f"{folder}: the heads belong to different networks; take one run's")
    layers = tuple(record["layer"] for *_, record in heads)
    mounted = MountedHeads(kinds.pop(), layers, modules, parents.pop(), folder)
    if parent is not None:
        mounted.require_parent(parent)
    return mounted


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state, record = read_weights(file)
    wanted = {"index": int, "heads": int, "classes": int, "kind": str, "layer": str, "parent": str}
    pool, widths = record.get("pool"), record.get("widths", [1])
    sound = (
        all(type(record.get(key)) is kind for key, kind in wanted.items())
        and record["kind"] in KINDS
        and _counts(record.get("shape"), 3)
        and (pool is None or _counts(pool, 2))
        and _counts(widths, len(widths) if isinstance(widths, list) else 0)
    )
    if not sound:
        raise UserError(f"{file} is no head: its record is missing or damaged; train heads anew")
    return state, record


def _counts(value: Any, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length > 0
        and all(type(item) is int and item > 0 for item in value)
    )


def _check_complete(folder: Path, heads: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    for file, record in heads:
        name = head_name(record["index"], record["layer"])
        if file.name != name:
            raise UserError(f"{file} was renamed: its record says {name}; give its name back")
    found = [record["index"] for _, record in heads]
    count = max(record["heads"] for _, record in heads)
    if len(set(found)) < len(found):
        raise UserError(f"{folder} holds heads of several runs: an index is there twice")
    lacking = sorted(set(range(1, count + 1)) - set(found))
    if lacking or len(found) != count:
        raise UserError(
            f"{folder} holds {len(found)} of {count} heads, number "
            f"{', '.join(map(str, lacking)) or 'above the last'} is wrong; take a whole run"
        )


def _check_shapes(
    heads: Sequence[tuple[Path, dict[str, Any]]], network: nn.Module, size: tuple[int, int]
) -> None:
    for file, record in heads:
        try:
            find_layer(network, record["layer"])
        except UsageError:
            raise UserError(
                f"{file}: the head is for layer {record['layer']}, which {architecture(network)} "
                "does not have; give the network it was trained on"
            ) from None
    shapes = shapes_of(network, [record["layer"] for _, record in heads], size)
    for (file, record), shape in zip(heads, shapes, strict=True):
        if record["shape"] != list(shape):
            raise UserError(
                f"{file}: the head is for features {record['shape']}, but {record['layer']} of "
                f"{architecture(network)} passes {list(shape)} for {size[0]}x{size[1]} images"
            )


def shapes_of(network: nn.Module, layers: Sequence[str], size: tuple[int, int]) -> list[torch.Size]:
    """Shapes of the features of `layers`, without the batch, for images of `size` pixels."""
    parameter = next(network.parameters(), torch.zeros(()))
    taps = Taps(network, list(layers))
    try:
        example = torch.zeros(2, 3, *size, device=parameter.device, dtype=parameter.dtype)
        return [shape[1:] for shape in taps.calibrate(example)]
    finally:
        taps.close()


def _build(file: Path, state: dict[str, torch.Tensor], record: dict[str, Any]) -> nn.Module:
    """The head in `file`; nothing is allocated before its tensors are known to fit."""
    with torch.device("meta"):
        if record["kind"] == "linear":
            pool = record.get("pool")
            head = LinearHead(record["shape"], record["classes"], pool and tuple(pool))
        else:
            head = DeepHead(record.get("widths", [1]), record["classes"])
    own, theirs = (
        {name: (value.shape, value.dtype) for name, value in tensors.items()}
        for tensors in (head.state_dict(), state)
    )
    if own != theirs:
        raise UserError(
            f"{file}: its weights are not those of a {record['kind']} head for {record['shape']} "
            f"features and {record['classes']} classes, as its record says; train heads anew"
        )
    head.load_state_dict(state, assign=True)
    return head
