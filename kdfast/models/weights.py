"""Weights on disk: safetensors with a record of what they are, and a reader that trusts no file."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from kdfast.errors import UserError
from kdfast.models import published
from kdfast.models.factory import architecture
from kdfast.models.taps import Taps

# Where training programs keep the weights inside a checkpoint; averaged weights first.
_WRAPPERS = ("state_dict_ema", "state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")
_UNORDERED = (
    "its names are another program's, and a safetensors file keeps no order to match them by: give "
    "the torch file that it was made from"
)
# What torch.load lets through when the bytes make no sense.
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside `torch.compile`, DistributedDataParallel and `Taps`, in any order."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, Taps):
            model = model.model
        else:
            return model


def checksum(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over the entries sorted by name: JSON [name, dtype, shape], then the bytes.

    Independent of device, memory format and order of the entries.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        head = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(head, separators=(",", ":")).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_weights(path: str | Path, model: nn.Module, metadata: Mapping[str, object]) -> None:
    """Write the weights of the plain model as safetensors, atomically, with a JSON record.

    A reader sees the old file or the new one, whole. `timm.create_model(..., checkpoint_path=path)`
    loads it.

    Args:
        metadata: what the weights are; the usual keys are architecture, classes, dataset, mean,
            std, input_size and parent (checksum of the weights they came from). Values are JSON.

    Raises:
        UserError: a weight is not finite, or the file cannot be written.
    """
    path = Path(path)
    # Copies: safetensors refuses tensors that share memory, and channels-last ones.
    tensors = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in unwrap(model).state_dict().items()
    }
    _check_finite(tensors, f"{path} not written")
    record = {key: json.dumps(value) for key, value in metadata.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(serialize(tensors, record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """(state dict on the CPU, metadata) of a .safetensors file or a torch checkpoint.

    Torch files are read with `weights_only=True`: no pickled code runs. Weights may lie under
    `state_dict_ema`, `state_dict`, `model` or `net`; `module.` and `_orig_mod.` before names go
    away. Entries of a torch file are in the order they were saved in. Metadata is {} where the file
    has none; of a torch checkpoint, its `arch`.

    Raises:
        UserError: no such file, damaged file, pickled code, no weights in it, weights not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file at {path}; check the path")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    try:
        state_dict, metadata = read(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    state_dict = {_plain_name(name): value for name, value in state_dict.items()}
    _check_finite(state_dict, f"{path} is of no use")
    return state_dict, metadata


def load_weights(model: nn.Module, path: str | Path) -> dict[str, object]:
    """Load the weights at `path` into `model`, all of them, and return their metadata.

    By name; where the names of a torch file are another program's and the model is one of our
    CIFAR networks, by order (kdfast/models/published.py), and the metadata then have
    `matched_by_order`: True.

    Raises:
        UserError: what `read_weights` raises; another architecture; another number of classes.
    """
    model = unwrap(model)
    state_dict, metadata = read_weights(path)
    own = model.state_dict()
    reason = None
    if state_dict.keys() != own.keys() and published.matches_by_order(model):
        ordered = Path(path).suffix != ".safetensors"
        reason = published.misfit(own, state_dict) if ordered else _UNORDERED
        if reason is None:
            model.load_state_dict(published.renamed(own, state_dict))
            return {**metadata, "matched_by_order": True}
        shared = own.keys() & state_dict.keys()
        if 2 * len(shared) >= min(len(own), len(state_dict)):
            reason = None  # the names are ours, and tell more
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    reshaped = [
        name
        for name, value in own.items()
        if name in state_dict and state_dict[name].shape != value.shape
    ]
    if missing or unexpected or reshaped:
        if reason is None:
            reason = _reason(model, metadata, state_dict, missing, unexpected, reshaped)
        raise UserError(f"{path} does not fit {architecture(model)}: {reason}")
    model.load_state_dict(state_dict)
    return metadata


def _read_safetensors(path: Path) -> tuple[dict, dict]:
    try:
        with safe_open(path, framework="pt") as file:
            # A handle is no mapping: it has keys() and nothing to iterate over.
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = {key: _decode(value) for key, value in (file.metadata() or {}).items()}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file ({_line(error)})") from error
    return state_dict, metadata


def _read_torch(path: Path) -> tuple[dict, dict]:
    try:
        # timm's training script stores its flags, a plain record, beside the weights.
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of a damaged file: nothing but the error is of use
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message is a page long and recommends running the code.
        if "GLOBAL" in str(error):
            raise UserError(
                f"{path} holds Python objects besides tensors, and kdfast runs no pickled code: "
                + _conversion(path, str(error))
            ) from error
        raise UserError(f"{path} is damaged or no torch checkpoint; fetch it again") from error
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged or no torch checkpoint ({_line(error)})") from error
    content = content if isinstance(content, Mapping) else {}
    metadata = {"architecture": content["arch"]} if isinstance(content.get("arch"), str) else {}
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict: looked at its top and at {list(_WRAPPERS)}")
    return dict(content), metadata


def _conversion(path: Path, message: str) -> str:
    """What to do about a file in which torch met the object that `message` names."""
    found = re.search(r"GLOBAL (numpy\S*)", message)
    if found is None:
        return "save its state dict alone, best as safetensors"
    return (
        f"it has numbers of {found[1]} beside the weights; save its state dict alone, where you "
        f"trust the file by torch.save(torch.load('{path}', weights_only=False)['model'], NEW)"
    )


def _decode(value: str) -> object:
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # written by someone else, as plain text
        return value


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def _plain_name(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _check_finite(state_dict: Mapping[str, torch.Tensor], consequence: str) -> None:
    bad = [
        name
        for name, value in state_dict.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise UserError(f"{consequence}: {_some(bad)} not finite (NaN or infinity)")


def _some(names: list[str], limit: int = 3) -> str:
    more = ", ..." if len(names) > limit else ""
    return f"{len(names)} ({', '.join(names[:limit])}{more})"


def _reason(
    model: nn.Module,
    metadata: Mapping[str, object],
    state_dict: Mapping[str, torch.Tensor],
    missing: list[str],
    unexpected: list[str],
    reshaped: list[str],
) -> str:
    own = model.state_dict()
    shapes = [(state_dict[name].shape, own[name].shape) for name in reshaped]
    # Only a classifier's width is its own affair: another layer's is the next one's input as well.
    widths = {(a[0], b[0]) if a and b and a[1:] == b[1:] else None for a, b in shapes}
    if len(widths) == 1 and None not in widths and not (missing or unexpected):
        theirs, ours = widths.pop()
        return f"the checkpoint has {theirs} classes, the model {ours}"
    parts = [f"it holds {metadata['architecture']}"] if metadata.get("architecture") else []
    for what, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", reshaped),
    ):
        if names:
            parts.append(f"{_some(names)} {what}")
    return ", ".join(parts) + "; choose the model that it was saved from"
