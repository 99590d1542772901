"""Resumable checkpoints: tensors in safetensors, the rest in JSON, no pickle.

`checkpoints/epoch-0003/`, or `epoch-0003-step-000120/` within epoch 4, holds
`objective.safetensors` (student and what methods train), `optimizer.safetensors`,
`average.safetensors` when weights are averaged, `summary.csv` as it was, and `state.json` with a
SHA-256 of each of them. It is written under another name and renamed when complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from kdfast.errors import UserError

VERSION = 2


class Position(NamedTuple):
    """How far a run is: whole epochs trained and scored, and optimizer steps of the next one."""

    epoch: int
    step: int = 0

    def name(self) -> str:
        return f"epoch-{self.epoch:04d}" + (f"-step-{self.step:06d}" if self.step else "")


def all_positions(folder: Path) -> list[Position]:
    """The complete checkpoints in `folder`, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    matches = (re.fullmatch(r"epoch-(\d{4,})(?:-step-(\d{6,}))?", path.name) for path in found)
    return sorted(Position(int(m[1]), int(m[2] or 0)) for m in matches if m)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    positions = all_positions(folder)
    return folder / positions[-1].name() if positions else None


def random_state() -> dict[str, list]:
    """The states of this process's generators (Python, NumPy, torch, its GPU) as integers."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def set_random_state(state: dict[str, list]) -> None:
    """Put back what `random_state` returned."""
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def save(
    folder: Path,
    position: Position,
    objective: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    *,
    summary: Path,
    average: nn.Module | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `position` and remove all but the newest `keep`.

    `state` is JSON: what else the run must know. Raises `UserError` when the disk is full or cannot
    be written; every checkpoint that was there before is then still there, whole.
    """
    final = folder / position.name()
    partial = folder / f".partial-{position.name()}"
    try:
        sweep(folder)
        partial.mkdir(parents=True)
        tensors, plain = _split_optimizer(optimizer.state_dict())
        _write(objective.state_dict(), partial / "objective.safetensors")
        _write(tensors, partial / "optimizer.safetensors")
        if average is not None:
            _write(average.state_dict(), partial / "average.safetensors")
        rows = summary.read_bytes() if summary.exists() else b""
        (partial / "summary.csv").write_bytes(rows)
        files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        content = {"version": VERSION, **position._asdict(), "files": files}
        with (partial / "state.json").open("w") as file:
            json.dump(content | {"optimizer": plain} | state, file)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write checkpoint {final}: {reason}; what was saved before is intact"
        ) from None
    for old in all_positions(folder)[:-keep]:
        # Under a name that is no checkpoint's first: a kill must not leave half of one.
        gone = folder / f".partial-{old.name()}"
        with suppress(OSError):
            (folder / old.name()).rename(gone)
            shutil.rmtree(gone)
    return final


def sweep(folder: Path) -> None:
    """Remove what a run that was killed while saving left behind."""
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def load(
    path: Path, objective: nn.Module, optimizer: Optimizer, *, average: nn.Module | None = None
) -> tuple[Position, dict[str, Any]]:
    """Restore networks and optimizer; returns position and `state`.

    Raises `UserError` when a file is missing or damaged or belongs to other networks.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        if state["version"] != VERSION:
            age = "a newer" if state["version"] > VERSION else "an older"
            raise UserError(
                f"checkpoint {path} was written by {age} kdfast (checkpoint layout "
                f"{state['version']}, this one reads {VERSION}); resume it with that version"
            )
        for name, digest in state["files"].items():
            if _digest(path / name) != digest:
                raise ValueError(f"{name} is not what was written")
        objective.load_state_dict(load_file(path / "objective.safetensors"))
        if average is not None:
            average.load_state_dict(load_file(path / "average.safetensors"))
        tensors = load_file(path / "optimizer.safetensors")
        joined = _join_optimizer(tensors, state["optimizer"])
        for group, own in zip(joined["param_groups"], optimizer.param_groups, strict=True):
            # How an update is computed is this machine's; what it is, is the checkpoint's.
            group |= {key: own[key] for key in ("foreach", "fused") if key in own}
        optimizer.load_state_dict(joined)
        _lay_out_like_parameters(optimizer)
        position = Position(int(state["epoch"]), int(state["step"]))
    except (
        OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"checkpoint {path} is damaged or of another run: {reason}; remove it to resume from "
            "the one before"
        ) from None
    return position, state


def rows_of(path: Path, summary: Path) -> str:
    """What `summary` held when checkpoint `path` was written.

    Raises `UserError` when it no longer begins with that.
    """
    rows = (path / "summary.csv").read_bytes()
    there = summary.read_bytes() if summary.exists() else b""
    if not there.startswith(rows):
        raise UserError(
            f"{summary} is not what the run wrote; to go on, put its rows back: "
            f"cp {path / 'summary.csv'} {summary}"
        )
    return rows.decode()


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold `path`, a file or a folder, before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems know this for files only.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(handle)


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            elif value is not None:
                values.setdefault(str(index), {})[key] = value
    groups = []
    for number, group in enumerate(state["param_groups"]):
        groups.append({})
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                tensors[f"group{number}.{key}"] = value
            elif isinstance(value, torch.dtype):
                groups[-1][key] = {"dtype": str(value).removeprefix("torch.")}
            else:
                groups[-1][key] = value
    return tensors, {"state": values, "param_groups": groups}


def _join_optimizer(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(i): dict(e) for i, e in plain["state"].items()}
    groups = [{key: _value(v, key) for key, v in group.items()} for group in plain["param_groups"]]
    for name, tensor in tensors.items():
        owner, _, key = name.partition(".")
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][key] = tensor
        else:
            state.setdefault(int(owner), {})[key] = tensor
    return {"state": state, "param_groups": groups}


def _value(value: Any, key: str) -> Any:
    if isinstance(value, dict) and set(value) == {"dtype"}:
        return getattr(torch, value["dtype"])
    return tuple(value) if key == "betas" else value


def _lay_out_like_parameters(optimizer: Optimizer) -> None:
    """Files hold tensors contiguous; updates are fast where state and parameter agree."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                like = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                state[key] = like.copy_(value)
