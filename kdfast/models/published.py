"""Weights of the CIFAR families under the names of another program, matched by order.

Names differ from program to program; the order in which modules are registered hardly does, and a
torch file keeps it. The convention, which the networks in `cifar_*.py` are registered by, is that
of the CRD benchmark:

    ResNet-6n+2, -18, -34, -50   conv, BN; a block: conv, BN, conv, BN (, conv, BN), projection
                                 conv, BN; linear
    WRN                          conv; a block: BN, conv, BN, conv, shortcut conv; BN; linear
    VGG                          conv, BN for each conv; linear
    MobileNetV2                  conv, BN; a block: conv, BN three times; conv, BN; linear
    ShuffleNet V1                conv, BN; a unit: conv, BN three times; linear
    ShuffleNet V2                conv, BN; halving unit: conv, BN twice on the left, three times on
                                 the right; other units: conv, BN three times; conv, BN; linear

Two lists of tensors agree when each pair is of one kind (the last part of the name: weight, bias,
running_mean, ...), one shape, integer or not alike, and belongs to a module that begins at the same
place. Nothing may be left over on either side, and a name that both sides know must not meet
another one. What no tensor shows, such as where a VGG pools, is for whoever names the model and its
`form` to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher

import torch
from torch import nn

from kdfast.models.cifar_base import CifarNetwork
from kdfast.models.cifar_resnet import CifarResNet

State = Mapping[str, torch.Tensor]


def matches_by_order(model: nn.Module) -> bool:
    """Whether `model` is of a family whose order of modules is the published one."""
    return isinstance(model, (CifarResNet, CifarNetwork))


def misfit(own: State, theirs: State) -> str | None:
    """Why the entries of `theirs` are not those of `own` in order; None when they are."""
    ours, others = _signatures(own), _signatures(theirs)
    if ours != others:
        return _class_counts(ours, others) or _left_over(own, theirs, ours, others)
    for name, other in zip(own, theirs, strict=True):
        if name != other and (other in own or name in theirs):
            return f"the file has {other} in the place where the model has {name}"
    return None


def renamed(own: State, theirs: State) -> dict[str, torch.Tensor]:
    """`theirs` under the names of `own`, in order; for lists that `misfit` finds to agree."""
    return dict(zip(own, theirs.values(), strict=True))


def _signatures(state: State) -> list[tuple]:
    """Kind, shape, whether it is a float, and whether a module begins, of each entry."""
    found, previous = [], None
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        begins = module != previous
        found.append((kind, tuple(value.shape), value.is_floating_point(), begins))
        previous = module
    return found


def _class_counts(ours: list[tuple], others: list[tuple]) -> str | None:
    """The refusal of lists that differ in the number of classes alone."""
    widths = [entries[-1][1] for entries in (ours, others)]  # the shapes of the last biases
    if any(len(width) != 1 for width in widths) or _without_classes(ours) != _without_classes(
        others
    ):
        return None
    return f"the checkpoint has {widths[1][0]} classes, the model {widths[0][0]}"


def _without_classes(entries: list[tuple]) -> list[tuple]:
    last = [(kind, shape[1:], *rest) for kind, shape, *rest in entries[-2:]]
    return [*entries[:-2], *last]


def _left_over(own: State, theirs: State, ours: list[tuple], others: list[tuple]) -> str:
    start = _common(ours, others)
    behind = _common(ours[start:][::-1], others[start:][::-1])
    middle = slice(start, -behind or None)
    matcher = SequenceMatcher(None, ours[middle], others[middle], autojunk=False)
    changes = [change[1:] for change in matcher.get_opcodes() if change[0] != "equal"]
    unmet = [name for low, high, _, _ in changes for name in list(own)[middle][low:high]]
    unused = [name for _, _, low, high in changes for name in list(theirs)[middle][low:high]]
    parts = []
    if unused:
        entries = "entry of the file is" if len(unused) == 1 else "entries of the file are"
        parts.append(f"{len(unused)} {entries} left over {_first(unused, theirs)}")
    if unmet:
        verb = "has" if len(unmet) == 1 else "have"
        parts.append(f"{len(unmet)} of the model {_first(unmet, own)} {verb} no counterpart")
    return "by order, " + ", ".join(parts) + "; choose the model that it was saved from"


def _common(first: list[tuple], second: list[tuple]) -> int:
    """How many entries the two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _first(names: list[str], state: State) -> str:
    first = "first " if len(names) > 1 else ""
    return f"({first}{names[0]} {list(state[names[0]].shape)})"
