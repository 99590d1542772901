"""Flags that a script takes over from the Trans-Net run that it is given."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from kdfast.data import dataset_name
from kdfast.errors import UsageError, UserError
from kdfast.models import read_weights
from kdfast.training.consistency_flags import pair_flags
from kdfast.training.flags import data_flags
from kdfast.training.layout import LAYOUT
from kdfast.training.parser import Parser
from kdfast.training.setup import weights_path

# What a Trans-Net's own weights file knows of its networks. --checkpoint-a and -b say where they
# lie now.
NETWORKS = frozenset(
    {"model", "model_a", "model_b", "model_kwargs", "layer", "layer_a", "layer_b", "pair"}
)


def dests(*groups: Callable[[Parser], None]) -> set[str]:
    """What the flags of these groups are called in a namespace."""
    scratch = Parser()
    for add in groups:
        add(scratch)
    return set(scratch.fallbacks)


def flags_of_run(parser: Parser, run: str | Path, more: Collection[str] = ()) -> dict[str, Any]:
    """What the run at `run` was made with, by dest: data, pair, features, and `more` dests.

    A flag that its args.yaml is silent on has the default of `parser`. A weights file counts as of
    the run folder it lies in, or of the one above its weights/; of one elsewhere, and of published
    weights, nothing is known. What the networks are is in the weights file. Caches of features
    beside the run are found again wherever both were moved.

    Raises:
        UserError: there is neither a run nor a file; the record is damaged or of a newer kdfast.
    """
    run = Path(run)
    recorded = recorded_options(run)
    if recorded is None:
        return {}
    folder = folder_of(run)
    where = str(folder / "args.yaml")
    theirs = dests(data_flags, pair_flags) | set(more)
    theirs -= {"model", "model_a", "model_b", "model_kwargs", "download"}
    found = {dest: parser.fallbacks[dest] for dest in theirs}
    for key, value in recorded.items():
        action = parser.actions().get(key)
        if action and action.dest in theirs:
            found[action.dest] = parser.converted(key, value, where, key)
    found["dataset"] = dataset_name(found["dataset"])
    if found["feature_dir"] is None and (caches := _caches(folder)):
        found["feature_dir"] = str(caches)
    return found


def with_flags(options: argparse.Namespace, flags: Mapping[str, Any]) -> argparse.Namespace:
    """A copy of `options` with `flags` of a run, which win over recipes but not over given ones."""
    own = copy.copy(options)
    for dest in flags.keys() - options.given:
        setattr(own, dest, flags[dest])
    return own


def folder_of(run: Path) -> Path:
    """The run folder that a path is of: itself, or that of a weights file."""
    if run.is_dir():
        return run
    above = run.parent.parent
    epochs = run.parent.name == "weights" and not (run.parent / "args.yaml").is_file()
    return above if epochs and (above / "args.yaml").is_file() else run.parent


def recorded_options(run: Path) -> dict[str, Any] | None:
    """The options in the args.yaml of the run at `run`; None of a weights file without one."""
    record = folder_of(run) / "args.yaml"
    if run.is_dir() and not record.is_file():
        raise UserError(
            f"no Trans-Net at {run}: it holds no args.yaml; give a run folder of "
            "train/transnet.py, or a weights file"
        )
    if not run.exists():
        raise UserError(
            f"no Trans-Net at {run}; give a run folder of train/transnet.py, or a weights file"
        )
    if record.is_file() and (run.is_dir() or run.suffix == ".safetensors"):
        return _read(record)
    return None


def _read(path: Path) -> dict[str, Any]:
    """The options in an args.yaml."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        options, layout = dict(content["options"]), int(content.get("layout", 1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError, LookupError):
        raise UserError(f"{path} is damaged; put it back as it was") from None
    if layout > LAYOUT:
        raise UserError(
            f"{path} was written by a newer kdfast (folder layout {layout}, this one knows "
            f"{LAYOUT}); update kdfast"
        )
    return options


def _caches(folder: Path) -> Path | None:
    """The features/ beside a run, or beside the folder of several runs that it is a part of."""
    holder = folder.absolute().parent
    if folder.absolute().name.startswith("pair-"):
        holders = [holder, holder.parent, holder.parent.parent]
        holders = holders[: 3 if holder.parent.name == "transnets" else 2]
    else:
        holders = [holder, *[holder.parent] * (holder.name == "transnets")]
    return next((one / "features" for one in holders if (one / "features").is_dir()), None)


def refuse_idle(options: argparse.Namespace, runs: Collection[Path], idle: Collection[str]) -> None:
    """Refuse flags on the command line that do nothing because there is a RUN.

    Those are `idle`, and where a run knows its networks, as all but published weights do, those
    that name networks and layers. A config may be shared among scripts and say more.

    Raises `UsageError`.
    """
    for run in runs:
        found = options.typed & set(idle)
        if not found and options.typed & NETWORKS:
            known = read_weights(weights_path(run))[1].get("kind") == "transnet"
            found = options.typed & NETWORKS if known else set()
        if found:
            flag = "--" + min(found).replace("_", "-")
            raise UsageError(
                f"{flag} has no effect on {run}, which is trained, between networks and layers "
                "that it knows; drop one of them"
            )
