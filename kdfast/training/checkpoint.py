"""Resumable checkpoints: tensors in safetensors, the rest in JSON, no pickle.

`checkpoints/epoch-0003/` holds `objective.safetensors` (student and what methods train),
`optimizer.safetensors`, `average.safetensors` when weights are averaged, and `state.json`. It is
written under another name and renamed when complete.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from kdfast.errors import UserError

VERSION = 1


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = sorted(folder.glob("epoch-[0-9]*")) if folder.is_dir() else []
    return found[-1] if found else None


def save(
    folder: Path,
    epoch: int,
    objective: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    *,
    average: nn.Module | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `epoch` finished epochs and remove all but the newest `keep`."""
    final = folder / f"epoch-{epoch:04d}"
    partial = folder / f".partial-{epoch:04d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(objective.state_dict(), partial / "objective.safetensors")
        if average is not None:
            _write(average.state_dict(), partial / "average.safetensors")
        tensors, plain = _split_optimizer(optimizer.state_dict())
        tensors["torch_rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["cuda_rng"] = torch.cuda.get_rng_state()
        _write(tensors, partial / "optimizer.safetensors")
        name, keys, *rest = np.random.get_state()
        content = {
            "version": VERSION,
            "epoch": epoch,
            "optimizer": plain,
            "python_rng": random.getstate(),
            "numpy_rng": [name, keys.tolist(), *rest],
            **state,
        }
        with (partial / "state.json").open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write checkpoint {final}: {reason}; what was saved before is intact"
        ) from None
    for old in sorted(folder.glob("epoch-[0-9]*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load(
    path: Path, objective: nn.Module, optimizer: Optimizer, *, average: nn.Module | None = None
) -> dict[str, Any]:
    """Restore everything `save` wrote, random states included; returns `state`.

    Raises `UserError` when a file is missing or damaged or belongs to other networks.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        if state["version"] > VERSION:
            raise UserError(f"checkpoint {path} was written by a newer kdfast; update kdfast")
        objective.load_state_dict(load_file(path / "objective.safetensors"))
        if average is not None:
            average.load_state_dict(load_file(path / "average.safetensors"))
        tensors = load_file(path / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("torch_rng"))
        if "cuda_rng" in tensors:
            cuda_rng = tensors.pop("cuda_rng")
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda_rng)
        optimizer.load_state_dict(_join_optimizer(tensors, state["optimizer"]))
        version, inner, gauss = state["python_rng"]
        random.setstate((version, tuple(inner), gauss))
        name, keys, *rest = state["numpy_rng"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"checkpoint {path} is damaged or of another run: {reason}; remove it to resume from "
            "the one before"
        ) from None
    return state


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            elif value is not None:
                values.setdefault(str(index), {})[key] = value
    groups = [
        {k: v for k, v in group.items() if not isinstance(v, torch.Tensor)}
        for group in state["param_groups"]
    ]
    return tensors, {"state": values, "param_groups": groups}


def _join_optimizer(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(i): dict(e) for i, e in plain["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()}
        for group in plain["param_groups"]
    ]
    return {"state": state, "param_groups": groups}
