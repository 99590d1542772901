"""How far the weights of a layer travel while they are trained.

Cheng, Rao, Chen, Zhang, "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR 2020
(arXiv 2003.03622): the path length of optimisation, in units of the norm the weights begin with.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from kdfast.errors import UsageError, unknown
from kdfast.models import find_layer

FIELDS = ("epoch", "layer", "iterations", "epochs")


class PathLength(nn.Module):
    """Path lengths of the weight tensors (biases aside) of some layers of `model`.

    Two a layer and epoch e, both divided by the Frobenius norm of the weights w_0 that training
    begins with: `iterations`, the sum of ||w_(t+1) - w_t|| over the optimizer steps of the epoch,
    and `epochs`, ||w_e - w_(e-1)||; of the weights that are trained, not of an average of them. A
    module with buffers alone: a part of what is trained, so that checkpoints hold it. Sums stay on
    the device; they are read once an epoch.

    `rows` are those of the epochs so far, epoch 0 with zeros first.

    Args:
        model: its weights are those that training begins with.
        layers: dotted names of modules with a weight of two or more dimensions.

    Raises:
        UsageError: no such layer, a layer without such a weight, or one whose weights are all 0.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]):
        super().__init__()
        self.layers = tuple(dict.fromkeys(layers))
        self._weights = [weight_of(model, layer) for layer in self.layers]
        for i, weight in enumerate(self._weights):
            self.register_buffer(f"begun_{i}", weight.detach().clone())
        norms = torch.stack([_norm(weight.detach()) for weight in self._weights])
        for layer, norm in zip(self.layers, norms.tolist(), strict=True):
            if not norm:
                raise UsageError(
                    f"--path-length {layer}: its weights begin at 0, and lengths are relative to "
                    "their beginning; name another layer"
                )
        self.register_buffer("norms", norms)
        self.register_buffer("sums", torch.zeros_like(norms))
        self.rows = self._rows(0, [[0.0] * len(self.layers)] * 2)

    def attach(self, optimizer: Optimizer, *, may_differ: bool = False) -> None:
        """Follow `optimizer` from the weights as they are; call it after a checkpoint was read.

        SGD with momentum and without Nesterov's steps by -lr * v, v its momentum buffer, whatever
        the weight decay, dampening and clipping, which all are in v. Any other optimizer's step is
        measured against a kept copy of the weights, and so is a step that `may_differ` from the
        optimizer's: gradient scaling may skip it, masks take part of it back.
        """
        self._optimizer = optimizer
        self._reached = [False] * len(self._weights)
        optimizer.register_step_pre_hook(self._note_reached)
        self._groups: list[int | None] = []
        self._kept: list[torch.Tensor | None] = []
        for weight in self._weights:
            groups = enumerate(optimizer.param_groups)
            has = (i for i, group in groups if any(p is weight for p in group["params"]))
            number = next(has, None) if weight.requires_grad else None
            group = optimizer.param_groups[number] if number is not None else {}
            buffered = type(optimizer) is SGD and group.get("momentum") and not group["nesterov"]
            kept = number is not None and (may_differ or not buffered)
            self._groups.append(number)
            self._kept.append(weight.detach().clone() if kept else None)

    def _note_reached(self, *_: Any) -> None:
        self._reached = [weight.grad is not None for weight in self._weights]

    @torch.no_grad()
    def after_step(self) -> None:
        """Add the step just made, whatever has moved the weights, at the rate its groups have."""
        self.sums += torch.stack([self._step(i) for i in range(len(self.layers))])

    def _step(self, i: int) -> torch.Tensor:
        weight, kept, number = self._weights[i], self._kept[i], self._groups[i]
        if kept is not None:
            length = _norm(weight - kept)
            kept.copy_(weight)
            return length
        if number is None or not self._reached[i]:  # SGD then leaves the weights, and v, alone
            return torch.zeros_like(self.sums[i])
        buffer = self._optimizer.state[weight]["momentum_buffer"]
        return self._optimizer.param_groups[number]["lr"] * _norm(buffer)

    @torch.no_grad()
    def close_epoch(self, epoch: int) -> None:
        """Add the rows of `epoch`, from 1, and begin the next one."""
        begun = [getattr(self, f"begun_{i}") for i in range(len(self.layers))]
        moved = [_norm(weight - old) for weight, old in zip(self._weights, begun, strict=True)]
        lengths = torch.stack([self.sums, torch.stack(moved)]) / self.norms
        self.rows += self._rows(epoch, lengths.tolist())
        for weight, old in zip(self._weights, begun, strict=True):
            old.copy_(weight)
        self.sums.zero_()

    def _rows(self, epoch: int, lengths: list[list[float]]) -> list[dict[str, Any]]:
        columns = zip(self.layers, *lengths, strict=True)
        return [dict(zip(FIELDS, (epoch, *column), strict=True)) for column in columns]

    def as_csv(self) -> str:
        """`rows` as the text of path_length.csv."""
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


def weight_of(model: nn.Module, layer: str) -> nn.Parameter:
    """The weight tensor of module `layer`; raises `UsageError` where it has none to measure."""
    if layer.endswith(":in"):
        raise UsageError(
            f"--path-length {layer}: weights are those of a module, not of its input; name the "
            "module whose weights are meant"
        )
    weight = getattr(find_layer(model, layer), "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
        layers = [
            name
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim > 1
        ]
        raise unknown("--path-length: layer with a weight matrix", layer, layers)
    return weight


def weighted_before(model: nn.Module, tap: str, example: torch.Tensor) -> str | None:
    """The last layer of the longest chain of convolutions and linear layers up to `tap`, or None.

    So a projection in a shortcut is not meant, which is beside the layers that it goes around; of
    chains of one length the one that ran last counts. `tap` of `model` is a layer spec as of
    `Taps`; a layer that is itself such a one counts. Runs the model once, in evaluation mode, on
    `example` [N, C, H, W].
    """
    layers: list[str] = []
    made_by: dict[Any, int] = {}  # the place in `layers` of what made a value, by its graph node
    found: list[str | None] = [None]

    def ran(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            made_by[output.grad_fn] = len(layers)
            layers.append(name)

    def reached(_: nn.Module, inputs: tuple, output: Any = None) -> None:
        value = inputs[0] if tap.endswith(":in") else output
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            place = _end_of_longest(value.grad_fn, made_by)
            found[0] = None if place is None else layers[place]

    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    handles = [
        module.register_forward_hook(lambda m, i, output, name=name: ran(name, output))
        for name, module in model.named_modules()
        if isinstance(module, kinds) and isinstance(module.weight, nn.Parameter)
    ]
    module = find_layer(model, tap)
    hook = "register_forward_pre_hook" if tap.endswith(":in") else "register_forward_hook"
    handles.append(getattr(module, hook)(reached))
    modes = {part: part.training for part in model.modules()}
    try:
        with torch.enable_grad():
            # No leaf, which layers in place would refuse.
            model.eval()(example.detach().requires_grad_() * 1)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes.items():
            part.training = mode
    return found[0]


def _end_of_longest(root: Any, made_by: dict[Any, int]) -> int | None:
    """Of the chains of nodes in `made_by` that lead to graph node `root`, the longest one's end."""
    chains: dict[Any, tuple[int, int]] = {}  # by node: the length, and the place of the end
    stack = [root]
    while stack:
        node = stack[-1]
        before = [other for other, _ in node.next_functions if other is not None]
        unknown_yet = [other for other in before if other not in chains]
        if unknown_yet:
            stack += unknown_yet
            continue
        stack.pop()
        length, end = max((chains[other] for other in before), default=(0, -1))
        chains[node] = (length + 1, made_by[node]) if node in made_by else (length, end)
    length, end = chains[root]
    return end if length else None


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm, float64: rows in the tensor's precision, their squares added in double.

    A float32 sum over a hundred million entries would lose more than 1e-5 of it.
    """
    rows = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)))
    return torch.linalg.vector_norm(rows, dtype=torch.float64)
