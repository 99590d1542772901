"""What sets one run apart from another: its options, less those that no result depends on."""

from __future__ import annotations

import re
from typing import Any

from kdfast.analysis.runs import Run
from kdfast.training.layout import FREE

# What a resumed run may change, its length apart. Every seed may have a teacher of its own.
_INCIDENTAL = FREE - {"epochs"} | {
    "seed", "teacher-checksum", "heads-checksum", "masks-checksum", "parent-checksum", "method",
    "methods",
}  # fmt: skip
# What a network trained on labels alone does not depend on.
_DISTILLING = {
    "teacher", "teacher-pretrained", "teacher-kwargs", "teacher-bn", "fold-teacher", "method",
    "methods", "alpha", "beta", "gamma", "student-layers", "teacher-layers", "teacher-checksum",
    "assistants", "assistant-epochs", "init-epochs", "init-lr", "init-decay-milestones", "init-opt",
    "init-weight-decay", "init-momentum", "generation", "assistant",
}  # fmt: skip


def identity(run: Run, *, alone: bool = False) -> dict[str, Any]:
    """What sets a run apart beside data set, networks and methods, as `key: value`.

    `alone`: of the same student trained on labels alone.
    """
    options, omitted = run.options, set(_INCIDENTAL)
    if options["dataset"].endswith("folder"):
        omitted.discard("data-dir")  # there the folder is the data set
    if alone or not run.methods:
        omitted |= _DISTILLING
    if "split-rate" in options:
        omitted.discard("generation")  # evolved ones learn from labels, but inherit
    found = {key: value for key, value in options.items() if key not in omitted}
    if alone:
        return found
    for name, chosen in run.methods.items():
        prefix = f"{name} " if len(run.methods) > 1 else ""
        found |= {f"{prefix}{key}": value for key, value in chosen.items()}
    if "methods" in options and not run.methods and options.get("gamma", 1) != 1:
        found["gamma"] = options["gamma"]  # it scales the rate of a student alone
    return found


def frozen(options: dict[str, Any]) -> frozenset[str]:
    """The same as something to look up by."""
    return frozenset(said(key, value) for key, value in options.items())


def said(key: str, value: Any) -> str:
    """An option as a label says it, one text a value: `temperature 4`, `no-aug`."""
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    if value is None:
        return f"{key} unset"
    if isinstance(value, list | tuple):
        return " ".join([key, *(said("", item).strip() for item in value)])
    if isinstance(value, dict):
        return " ".join([key, *(said(f"{k}", value[k]) for k in sorted(value, key=str))])
    return f"{key} {value:.12g}" if isinstance(value, float) else f"{key} {value}"


def natural(label: str) -> list[tuple[bool, float, str]]:
    """A key that sorts `temperature 10` after `temperature 4`."""
    parts = re.split(r"(\d+(?:\.\d+)?)", label)
    return [(i % 2 == 1, float(p) if i % 2 else 0.0, p) for i, p in enumerate(parts)]
