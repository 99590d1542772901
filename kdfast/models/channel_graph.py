"""Which channels of a network belong together, read from its exported graph.

The rules for single operations are in channel_rules.py. Extends the split of Taha et al.,
"Knowledge Evolution in Neural Networks", CVPR 2021, to what torch.export can trace.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from kdfast.errors import UsageError
from kdfast.models.channel_sets import (
    ChannelSet,
    Kept,
    Layout,
    Mismatch,
    fix,
    kept_runs,
    length,
    new_layout,
    resolve,
)
from kdfast.models.factory import architecture
from kdfast.models.factory import input_size as size_of
from kdfast.ops.split_mask import Runs, SplitMask, active, joined_runs

Dims = dict[int, Layout]  # the dimensions of a tensor that carry channels


@dataclass(frozen=True)
class Weight:
    """A convolution's or linear layer's: `groups` of the dense layer, `node` that uses it."""

    node: fx.Node
    groups: int


@dataclass(frozen=True)
class Demand:
    """`layout` must keep all of its channels, because of what `node` does."""

    layout: Layout
    node: fx.Node
    reason: str


@dataclass
class ChannelGraph:
    """Channel sets of `model` in evaluation mode, and where they lie.

    Attributes:
        program: the exported program of one image tensor.
        values: node -> layouts of its tensor's dimensions, a list of them where there are several.
        parameters: name -> layouts of the dimensions of a parameter or buffer.
        weights: name -> `Weight`, in the order of the graph.
        modules: name of a module that normalises or convolves -> layout of its input channels.

    Args:
        input_size: (channels, height, width); by default what the model was made for.
        any_batch: let the program take any number of images, which takes longer to trace; else two.

    Raises:
        UsageError: torch.export cannot trace the model, it does not answer with one tensor, or an
            operation of it ties channels in a way that no layout has.
    """

    model: nn.Module
    input_size: tuple[int, int, int] | None = None
    any_batch: bool = True
    values: dict[fx.Node, Dims | list[Dims]] = field(default_factory=dict, init=False)
    parameters: dict[str, Dims] = field(default_factory=dict, init=False)
    weights: dict[str, Weight] = field(default_factory=dict, init=False)
    modules: dict[str, Layout] = field(default_factory=dict, init=False)
    demands: list[Demand] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.name = architecture(self.model)
        self.input_size = tuple(self.input_size or size_of(self.model))
        self.program = export(self.model, self.input_size, self.any_batch)
        self._names = names = self._placeholders()
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._entry(node, names.get(node))
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._answer(node)
        first = first_names(self.model)
        for name, module in self.model.named_modules():
            weight = f"{name}.weight" if name else "weight"
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                raise UsageError(
                    f"cannot split {self.name}: layer '{name}' is a transposed convolution, for "
                    "which there is no rule"
                )
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and (
                first.get(weight) not in self.weights
            ):
                raise UsageError(
                    f"cannot split {self.name}: layer '{name}' is not used in evaluation; build "
                    "the model without it (an auxiliary classifier, say --model-kwargs "
                    "aux_logits=False)"
                )

    def _placeholders(self) -> dict[fx.Node, str | None]:
        """Placeholder -> name of a parameter or buffer, None for a constant; images have none."""
        signature = self.program.graph_signature
        named = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
        constants = dict.fromkeys(signature.inputs_to_lifted_tensor_constants)
        nodes = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        first = first_names(self.model)
        return {
            nodes[name]: first.get(target, target) for name, target in (named | constants).items()
        }

    def name_of(self, node: Any) -> str | None:
        """The parameter or buffer that `node` is."""
        return self._names.get(node)

    def is_parameter(self, name: str) -> bool:
        return any(name == other for other, _ in self.model.named_parameters())

    def is_named(self, node: fx.Node) -> bool:
        """Whether placeholder `node` is a parameter, buffer or constant, not the images."""
        return node in self._names

    def constant(self, node: fx.Node) -> torch.Tensor:
        """The tensor written into the model's code that placeholder `node` is."""
        name = self.program.graph_signature.inputs_to_lifted_tensor_constants[node.name]
        return self.program.constants[name]

    def _entry(self, node: fx.Node, name: str | None) -> Dims:
        shape = sizes(node)
        if node not in self._names:
            # The input: image channels all stay.
            return {1: new_layout(shape[1], fixed=True)}
        if name in self.parameters:
            return dict(self.parameters[name])
        free = {d: new_layout(size, fixed=name is None) for d, size in enumerate(shape)}
        if name is not None:
            self.parameters[name] = free
        return dict(free)

    def _call(self, node: fx.Node) -> None:
        from kdfast.models.channel_rules import rule_of  # it builds on this module

        try:
            self.values[node] = rule_of(node)(self, node)
        except Mismatch as mismatch:
            raise UsageError(self.refusal(node, str(mismatch))) from None

    def _answer(self, node: fx.Node) -> None:
        answers = node.args[0]
        if len(answers) != 1 or not isinstance(answers[0], fx.Node):
            raise UsageError(
                f"cannot split {self.name}: it answers with {len(answers)} values in evaluation, "
                "not with logits alone"
            )
        for layout in self.dims(answers[0]).values():
            fix(layout)

    def dims(self, node: Any) -> Dims:
        """Of an argument; {} of what is no tensor, or of one without channels."""
        value = self.values.get(node, {}) if isinstance(node, fx.Node) else {}
        return value if isinstance(value, dict) else {}

    def require_all(self, dims: Mapping[int, Layout], node: fx.Node, reason: str) -> None:
        """Remember that these dimensions cannot lose channels."""
        for layout in dims.values():
            self.demands.append(Demand(layout, node, reason))

    def refusal(self, node: fx.Node, reason: str) -> str:
        path = module_of(node)
        where = f"layer '{path}'" if path else "the forward pass"
        return f"cannot split {self.name} at {node.name} of {where}: {reason}"

    # What is kept.

    def keep_rate(self, rate: float) -> Kept:
        """Of every set that can lose channels the first ceil(units * rate)."""

        def kept(channels: ChannelSet) -> Runs:
            free = channels.produced and not channels.fixed
            return ((0, active(channels.units, rate) if free else channels.units),)

        self.check(kept)
        return kept

    def keep_masks(self, masks: Mapping[str, SplitMask]) -> Kept:
        """What block masks of all weights keep.

        Raises:
            UsageError: masks of other weights or shapes, masks of single weights, masks that
                disagree on a set of channels.
        """
        if masks.keys() != self.weights.keys():
            odd = sorted(masks.keys() ^ self.weights.keys())
            raise UsageError(
                f"the masks are not those of {self.name}: {', '.join(odd[:3])} "
                f"{'is' if len(odd) == 1 else 'are'} on one side only"
            )
        chosen: dict[ChannelSet, Runs] = {}
        for name, mask in masks.items():
            shape = tuple(length(self.parameters[name][d]) for d in (0, 1))
            if mask.rows is None:
                raise UsageError("masks of single weights (wels) have no slim network; use kels")
            if mask.shape[:2] != shape:
                raise UsageError(
                    f"mask of {name} is for {list(mask.shape[:2])} channels, {self.name} has "
                    f"{list(shape)}"
                )
            self._read(name, self.parameters[name][0], mask.rows, chosen)

        def kept(channels: ChannelSet) -> Runs:
            return chosen.get(channels, ((0, channels.units),))

        for name, mask in masks.items():
            if self.runs(name, kept)[:2] != (mask.rows, mask.columns):
                raise UsageError(
                    f"mask of {name} keeps other channels than the layers it is tied to; make "
                    "masks with split_masks"
                )
        self.check(kept)
        return kept

    def _read(self, name: str, layout: Layout, rows: Runs, chosen: dict[ChannelSet, Runs]) -> None:
        start = 0
        for segment in resolve(layout):
            end, units = start + segment.length, []
            for first, count in rows:
                low, high = max(first, start) - start, min(first + count, end) - start
                if low < high:
                    units.append((low, high - low))
            channels, inner = segment
            fits = units and all(n % inner == 0 for run in units for n in run)
            runs = joined_runs((low // inner, count // inner) for low, count in units)
            if channels.fixed and runs != ((0, channels.units),):
                fits = False
            if not fits or chosen.setdefault(channels, runs) != runs:
                raise UsageError(
                    f"mask of {name} keeps other channels than the layers it is tied to; make "
                    "masks with split_masks"
                )
            start = end

    def check(self, kept: Kept) -> None:
        """Raise `UsageError` where an operation needs channels that `kept` drops."""
        for demand in self.demands:
            size = length(demand.layout)
            if kept_runs(demand.layout, kept) != ((0, size),):
                raise UsageError(self.refusal(demand.node, demand.reason))

    def runs(self, name: str, kept: Kept) -> tuple[Runs, ...]:
        """What stays of each dimension of parameter or buffer `name`."""
        dims = self.parameters[name]
        return tuple(kept_runs(dims[d], kept) for d in sorted(dims))


@contextmanager
def tracing() -> Iterator[None]:
    """What torch.export is to run in: no gradients, and nothing that torch says about itself."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # It prints the graph that it fails on.
        with torch.no_grad(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def export(
    model: nn.Module, input_size: tuple[int, int, int], any_batch: bool = True
) -> torch.export.ExportedProgram:
    """The program of `model` in evaluation mode, for any batch or one of 2; raises `UsageError`."""
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), torch.zeros(()))
    shapes = ({0: Dim.AUTO},) if any_batch else None
    image = torch.zeros(2, *input_size, device=parameter.device, dtype=parameter.dtype)
    try:
        model.eval()
        with tracing():
            return torch.export.export(model, (image,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises of every kind what a model's code provokes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(
            f"cannot split {architecture(model)}: torch.export cannot trace it ({reason})"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def first_names(model: nn.Module) -> dict[str, str]:
    """Name of a parameter -> the first one of the same parameter, which layers may share."""
    names: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return {name: names.setdefault(id(parameter), name) for name, parameter in every}


def sizes(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor, with the batch size it was traced with."""
    shape = node.meta["val"].shape
    return tuple(n if isinstance(n, int) else n.node.hint for n in shape)


def module_of(node: fx.Node) -> str:
    """The dotted name of the module whose code `node` is, '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""
