"""Flags that a script takes over from a run that another script made."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from kdfast.errors import UserError
from kdfast.training.flags import data_flags
from kdfast.training.parser import Parser, read_yaml


def data_keys() -> set[str]:
    """The keys of the flags that say which images a run has."""
    parser = Parser()
    data_flags(parser)
    return set(parser.actions()) - {"download"}


def inherit_flags(parser: Parser, run: str | Path, keys: Collection[str]) -> None:
    """What the run at `run` was made with under `keys` becomes the default of `parser`'s flags.

    Recipes, configs and flags win over it. A weights file counts as of the folder it lies in;
    where that is no run folder, nothing changes. Caches of features beside the run are found again.

    Raises:
        UserError: the run's args.yaml is damaged.
    """
    run = Path(run) if Path(run).is_dir() else Path(run).parent
    record = run / "args.yaml"
    if not record.is_file():
        return
    options = read_yaml(record).get("options")
    if not isinstance(options, dict):
        raise UserError(f"{record} is damaged: expected options to be a mapping")
    actions = parser.actions()
    for key in sorted(options.keys() & actions.keys() & set(keys)):
        value = parser.converted(key, options[key], str(record), key)
        parser.fallbacks[actions[key].dest] = value
    caches = run.parent / "features"
    if "feature-dir" in keys and "feature-dir" not in options and caches.is_dir():
        parser.fallbacks["feature_dir"] = str(caches)
