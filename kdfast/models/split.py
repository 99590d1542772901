"""Cutting a model in two at a layer, by tracing the few modules that contain the cut."""

from __future__ import annotations

import torch
from torch import fx, nn

from kdfast.errors import UsageError
from kdfast.models.taps import find_layer


class _Whole(nn.Module):
    """Calls the model with one argument, so that the others keep their defaults in a trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Looks inside the modules that contain `layer` and takes every other one as a single step."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.inside = f"model.{layer}"

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return not self.inside.startswith(f"{qualified_name}.")


class _Part(nn.Module):
    """One side of a cut, in two versions of the code around it; the layers in both are the model's.

    Layers follow their own train/eval mode. What the modules around the cut do by themselves (a
    functional dropout before the classifier) is traced per mode, and the model's mode chooses.
    """

    def __init__(
        self,
        model: nn.Module,
        training: fx.GraphModule,
        evaluating: fx.GraphModule,
        protect: bool,
    ) -> None:
        super().__init__()
        self.when_training = training
        self.when_evaluating = evaluating
        self._model = [model]  # in a list, so that it is no submodule of the part
        self._protect = protect

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = self.when_training if self._model[0].training else self.when_evaluating
        # The first layer after the cut may work in place; the caller's tensor must not change.
        return run(x.clone() if self._protect else x)


def split_at(model: nn.Module, layer: str) -> tuple[nn.Module, nn.Module]:
    """(head, tail) such that `tail(head(x))` is bitwise `model(x)`.

    head: [N,C,H,W] -> the tensor at the cut, in the layout the model uses there; it runs nothing
    beyond the cut. tail: such a tensor -> what the model returns; it runs nothing before the cut,
    leaves its argument as it is, and passes gradients to it. Both share the model's parameters and
    buffers; a layer replaced later (`reset_classifier`) is not seen. If a layer runs several times,
    the cut is at its last call.

    Modes: call `model.train()` or `model.eval()`; on a part, they reach only its own layers.

    Args:
        model: a plain model, not compiled and not wrapped.
        layer: dotted name; `name` cuts after the layer, `name:in` before it.

    Raises:
        UsageError: unknown layer; a layer that is not called; a cut that some value bypasses (the
            shortcut around a layer inside a residual block); modules around the layer whose
            control flow depends on the data.
    """
    find_layer(model, layer)
    around = _around(model, layer.removesuffix(":in"))
    modes = [module.training for module in around]
    halves = []
    try:
        for training in (True, False):
            for module in around:
                module.training = training
            halves.append(_halves(model, layer))
    finally:
        for module, mode in zip(around, modes, strict=True):
            module.training = mode
    heads, tails = zip(*halves, strict=True)
    return _Part(model, *heads, protect=False), _Part(model, *tails, protect=True)


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that contain the named one, the model first: those whose code is traced."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def _halves(model: nn.Module, layer: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    name = layer.removesuffix(":in")
    whole = _Whole(model)
    try:
        graph = _Tracer(name).trace(whole)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"cannot split {type(model).__name__} at '{layer}': the code around it depends on the "
            f"data ({reason}); choose a layer that lies less deep"
        ) from error
    calls = [node for node in graph.nodes if node.op == "call_module"]
    calls = [node for node in calls if node.target == f"model.{name}"]
    if not calls:
        raise UsageError(f"layer '{name}' is not called by {type(model).__name__}; choose another")
    cut = calls[-1].all_input_nodes[0] if layer.endswith(":in") else calls[-1]
    nodes = list(graph.nodes)
    end = nodes.index(cut) + 1
    head = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[:end]:
        copies[node] = head.node_copy(node, copies.__getitem__)
    head.output(copies[cut])
    tail = fx.Graph()
    copies = {cut: tail.placeholder("feature")}
    for node in nodes[end:]:
        for value in node.all_input_nodes:
            if value in copies:
                continue
            if value.op != "get_attr":  # parameters are at hand on both sides
                raise UsageError(
                    f"cannot split {type(model).__name__} at '{layer}': {_describe(value)} is "
                    f"used again behind it, by {_describe(node)}; cut where a block ends"
                )
            copies[value] = tail.node_copy(value)
        copies[node] = tail.node_copy(node, copies.__getitem__)
    return fx.GraphModule(whole, head), fx.GraphModule(whole, tail)


def _describe(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the input"
    if node.op == "output":
        return "the result"
    if node.op == "call_module":
        return f"'{node.target.removeprefix('model.')}'"
    return f"the {getattr(node.target, '__name__', node.target)} in the forward pass"
