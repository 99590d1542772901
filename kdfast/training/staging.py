"""The settings of a first stage: a method's `init` in recipe and config, `--init-...`, defaults."""

from __future__ import annotations

import argparse
from typing import Any

from kdfast.errors import UsageError, unknown
from kdfast.methods import find_method, method_names
from kdfast.training.options import check_optimizer
from kdfast.training.parser import Parser
from kdfast.training.transfer_flags import first_stage_flags


def read_init(where: str, content: Any) -> dict[str, Any]:
    """The `init` of a method in a file, keys without `init-`; raises `UsageError` at `where`."""
    if not isinstance(content, dict):
        raise UsageError(f"{where}: init must map settings to values, got {content!r}")
    parser = Parser()
    first_stage_flags(parser)
    known = {key.removeprefix("init-") for key in parser.actions()}
    found = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise unknown(f"option in {where}: init:", str(key), known)
        found[name] = parser.converted(f"init-{name}", value, f"{where}: init", name)
    return found


def choose_init(
    options: argparse.Namespace, names: list[str], layers: list[tuple[str, dict[str, dict]]]
) -> dict[str, Any]:
    """The settings of the first stage of methods `names`; {} where nobody speaks of one.

    `layers` are the `init` mappings by method of recipe and config, weakest first; flags win, and
    what nobody gives is the main stage's. Raises `UsageError` for flags without a first stage.
    """
    able = [name for name in names if find_method(name).initialises]
    flags = {
        key.removeprefix("init_").replace("_", "-"): value
        for key, value in vars(options).items()
        if key.startswith("init_") and value is not None
    }
    given = [key for key in flags if f"init_{key.replace('-', '_')}" in options.given]
    if not able:
        if given and flags.get("epochs", 1):
            able = [name for name in method_names() if find_method(name).initialises]
            raise UsageError(
                f"--init-{given[0]} is of a first stage, which only {', '.join(able)} can have, "
                "and none of them is used"
            )
        return {}
    said: dict[str, Any] = {}
    staged = False
    for where, inits in layers:
        here: dict[str, Any] = {}
        for name in able:
            for key, value in inits.get(name, {}).items():
                if here.setdefault(key, value) != value and key not in flags:
                    raise UsageError(
                        f"{where} gives {' and '.join(able)} a different init {key}; give "
                        f"--init-{key}"
                    )
        said |= here
        staged = staged or bool(here.get("epochs"))
    init = said | flags
    if not init.get("epochs"):
        if idle := [key for key in given if key != "epochs"]:
            raise UsageError(f"--init-{idle[0]} is given, but no first stage; add --init-epochs N")
        return {"epochs": 0} if staged else {}
    if "opt" in init:
        check_optimizer("--init-opt", init["opt"])
    main = {
        "lr": options.lr,
        "decay-milestones": [],
        "opt": options.opt,
        "weight-decay": options.weight_decay,
        "momentum": options.momentum,
    }
    return {"epochs": init["epochs"]} | main | init
