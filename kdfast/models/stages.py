"""Which layers of two models are compared when the user names none."""

from __future__ import annotations

import re

from torch import nn

from kdfast.errors import UsageError

# The part of a name that marks a leading feature entry as the stem: `act1`, `bn1`, `conv_stem`,
# `stem.conv1`, `features.norm0`.
_STEM = re.compile(r"(stem|conv|bn|norm|act|relu)", re.IGNORECASE)
# Where the stem is when `feature_info` starts after it; the activation comes before its parts.
_STEM_MODULES = ("stem", "act1", "bn1", "patch_embed")
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
# Resolution can halve five times between 1/1 and 1/32, so a longer list is a stack of like blocks.
_MOST_STAGES = 6


def default_stages(model: nn.Module, stem: bool = False) -> list[str]:
    """Stage outputs of a timm model, shallow to deep, from its `feature_info`.

    The first entry is the stem, and left out, when it has the input's resolution (VGG's first
    block, DLA's first level) or is named like a stem (`act1`, `bn1`, `stem.conv1`, ...). An entry
    that merely pools the one before it, or names no module, is left out too. With `stem`, the
    stem's output (after its activation where it has one) comes first, listed or not.

    Raises:
        UsageError: the model has no `feature_info`, or no stem where one is wanted.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    entries = [
        entry
        for entry in getattr(model, "feature_info", None) or []
        if entry["module"] in modules and not isinstance(modules[entry["module"]], _POOLS)
    ]
    if not entries:
        raise UsageError(
            f"{type(model).__name__} does not list its stages: "
            "name them with --student-layers / --teacher-layers"
        )
    names = [entry["module"] for entry in entries]
    listed = entries[0]["reduction"] == 1 or _named_like_stem(names[0])
    if not stem:
        return names[1:] if listed else names
    if listed:
        return names
    for name in _STEM_MODULES:
        if name in modules:
            return [name, *names]
    raise UsageError(
        f"{type(model).__name__} has no stem that is known by name: "
        "name the layers with --student-layers / --teacher-layers"
    )


def _named_like_stem(name: str) -> bool:
    parts = name.split(".")  # deeper names are parts of blocks
    return len(parts) <= 2 and any(_STEM.match(part) for part in parts)


def pair_stages(
    teacher_layers: list[str], student_layers: list[str], *, shallow: bool = False
) -> list[tuple[str, str]]:
    """(teacher layer, student layer) pairs, shallow to deep; both lists are shallow to deep.

    Lists of one length pair in order. Otherwise the shorter list sets the number of pairs, and of
    the longer one are taken: its deepest layers if it has up to six (a pyramid of resolutions:
    four stages against three drop the shallowest; with `shallow` its first ones, so that stage i
    meets stage i), else layers at even distances ending at the last (a stack of like blocks: of a
    ViT's twelve against four stages, the 3rd, 6th, 9th, 12th).

    Raises:
        UsageError: an empty list.
    """
    if not teacher_layers or not student_layers:
        raise UsageError("both models need at least one layer to compare")
    count = min(len(teacher_layers), len(student_layers))
    lists = (_spread(layers, count, shallow) for layers in (teacher_layers, student_layers))
    return list(zip(*lists, strict=True))


def _spread(layers: list[str], count: int, shallow: bool) -> list[str]:
    if len(layers) <= _MOST_STAGES:
        return list(layers[:count] if shallow else layers[-count:])
    return [layers[(i + 1) * len(layers) // count - 1] for i in range(count)]
