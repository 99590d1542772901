"""What single operations of an exported graph do with channels.

A rule takes the graph and a node, ties the channel sets of its arguments, and answers with the
layouts of what the node puts out. What has no rule must keep all of its channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from kdfast.models.channel_graph import ChannelGraph, Dims, Weight, module_of, sizes
from kdfast.models.channel_sets import (
    Layout,
    Mismatch,
    coarsen,
    cut,
    fix,
    new_layout,
    produce,
    scaled,
    tie,
)

Rule = Callable[[ChannelGraph, fx.Node], Dims | list[Dims]]
_RULES: dict[str, Rule] = {}
# Elementwise ones that carry no such tag.
_ELEMENTWISE = {
    "alias", "alpha_dropout", "clone", "contiguous", "detach", "dropout", "feature_alpha_dropout",
    "feature_dropout", "floor_divide", "hardswish", "lift_fresh", "lift_fresh_copy", "mish",
    "relu6", "rsub", "to", "_to_copy", "type_as", "where",
}  # fmt: skip


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_of(node: fx.Node) -> Rule:
    name = _name(node)
    if name in _RULES:
        return _RULES[name]
    pointwise = _is_tensor(node) and (name in _ELEMENTWISE or _is_pointwise(node.target, name))
    return _elementwise if pointwise else _unknown


def _is_pointwise(target: Any, name: str) -> bool:
    """Whether an overload, or for one that works in place its functional twin, is tagged so."""
    plain = getattr(torch.ops.aten, name, None)
    twin = getattr(plain, getattr(target, "_overloadname", ""), None)
    return any(torch.Tag.pointwise in getattr(op, "tags", ()) for op in (target, twin))


def _name(node: fx.Node) -> str:
    """Of the operation, without overload and without the underscore of in-place ones."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", str(packet))
    return name if name.startswith("__") else name.rstrip("_")


def arguments_of(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`args` and `kwargs` by the names of the operation's schema, defaults included."""
    found = {}
    for i, argument in enumerate(node.target._schema.arguments):
        value = args[i] if i < len(args) else argument.default_value
        found[argument.name] = kwargs.get(argument.name, value)
    return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    return arguments_of(node, node.args, node.kwargs)


def _without(dims: Dims, *dropped: int) -> Dims:
    return {d: layout for d, layout in dims.items() if d not in dropped}


def _unknown(graph: ChannelGraph, node: fx.Node) -> Dims:
    for argument in node.all_input_nodes:
        reason = f"kdfast knows no rule for {_name(node)} on channels"
        graph.require_all(graph.dims(argument), node, reason)
    return {}


def _aligned(graph: ChannelGraph, node: fx.Node, arguments: Sequence[fx.Node]) -> Dims:
    """Broadcast tensors of which position p of a dimension is the same channel in all."""
    shape, result = sizes(node), {}
    for d, size in enumerate(shape):
        met: list[Layout | None] = []
        for argument in arguments:
            own = d - len(shape) + len(sizes(argument))
            if own >= 0 and sizes(argument)[own] == size:
                met.append(graph.dims(argument).get(own))
        layouts = [layout for layout in met if layout is not None]
        if not layouts:
            continue
        result[d] = layouts[0]
        for layout in layouts[1:]:
            tie(layouts[0], layout)
        if None in met and size != 1:
            fix(layouts[0])
    return result


def _elementwise(graph: ChannelGraph, node: fx.Node) -> Dims:
    return _aligned(graph, node, [n for n in node.all_input_nodes if _is_tensor(n)])


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


@_rule("prelu")
def _prelu(graph: ChannelGraph, node: fx.Node) -> Dims:
    x, weight = node.args
    if sizes(weight) != (1,):
        tie(_channels(graph, x, 1), graph.dims(weight)[0])
    return graph.dims(x)


def _channels(graph: ChannelGraph, node: fx.Node, dim: int) -> Layout:
    """The layout of a dimension, all of which stays where nothing is known of it."""
    return graph.dims(node).get(dim) or new_layout(sizes(node)[dim], fixed=True)


def _weight(graph: ChannelGraph, node: fx.Node, weight: fx.Node, groups: int) -> Dims:
    """The layouts of a layer's weight, whose rows it puts out."""
    name = graph.name_of(weight)
    if name is None or not graph.is_parameter(name):
        raise Mismatch(f"its weight ({weight.name}) is no parameter of the model")
    if graph.weights.setdefault(name, Weight(node, groups)).groups != groups:
        raise Mismatch(f"{name} is used with other groups elsewhere")
    dims = graph.parameters[name]
    produce(dims[0])
    for d in range(2, len(dims)):
        fix(dims[d])
    return dims


@_rule("conv1d", "conv2d", "conv3d")
def _convolution(graph: ChannelGraph, node: fx.Node) -> Dims:
    given = _arguments(node)
    x, weight, bias, groups = (given[key] for key in ("input", "weight", "bias", "groups"))
    dims, layout = _weight(graph, node, weight, groups), _channels(graph, x, 1)
    graph.require_all(_without(graph.dims(x), 1), node, "it slides over channels")
    if groups == 1:
        tie(dims[1], layout)
    else:
        fix(dims[1])
        width = sizes(weight)[1]
        tie(dims[0], scaled(coarsen(layout, width), sizes(weight)[0] // groups, width))
    graph.modules[module_of(node)] = layout
    if bias is not None:
        tie(dims[0], graph.dims(bias)[0])
    return {1: dims[0]}


@_rule("linear")
def _linear(graph: ChannelGraph, node: fx.Node) -> Dims:
    given = _arguments(node)
    x, weight, bias = (given[key] for key in ("input", "weight", "bias"))
    dims, last = _weight(graph, node, weight, 1), len(sizes(x)) - 1
    tie(dims[1], _channels(graph, x, last))
    if bias is not None:
        tie(dims[0], graph.dims(bias)[0])
    return _without(graph.dims(x), last) | {last: dims[0]}


@_rule("batch_norm", "instance_norm", "group_norm")
def _normalise_planes(graph: ChannelGraph, node: fx.Node) -> Dims:
    given = _arguments(node)
    x = given["input"]
    layout = _channels(graph, x, 1)
    for key in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(given.get(key), fx.Node):
            tie(layout, _channels(graph, given[key], 0))
    graph.require_all(_without(graph.dims(x), 1), node, "it normalises over channels")
    graph.modules[module_of(node)] = layout
    return graph.dims(x)


@_rule("layer_norm", "rms_norm")
def _normalise_channels(graph: ChannelGraph, node: fx.Node) -> Dims:
    given = _arguments(node)
    x, count = given["input"], len(given["normalized_shape"])
    first = len(sizes(x)) - count
    for key in ("weight", "bias"):
        if isinstance(given.get(key), fx.Node):
            for d in range(count):
                tie(_channels(graph, x, first + d), _channels(graph, given[key], d))
    if count == 1:
        graph.modules[module_of(node)] = _channels(graph, x, first)
    else:
        beyond = {d: layout for d, layout in graph.dims(x).items() if d >= first}
        graph.require_all(beyond, node, "it normalises over channels and positions at once")
    return graph.dims(x)


@_rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "lp_pool2d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "max_pool2d_with_indices",
)  # fmt: skip
def _pool(graph: ChannelGraph, node: fx.Node) -> Dims | list[Dims]:
    x = node.args[0]
    dims = graph.dims(x)
    planes = {d: layout for d, layout in dims.items() if d >= 2}
    graph.require_all(planes, node, "it pools over channels")
    kept = {d: layout for d, layout in dims.items() if d < 2}
    return kept if _is_tensor(node) else [kept, kept]


def _reduced(node: fx.Node, rank: int) -> set[int]:
    dim = _arguments(node).get("dim")
    dim = [dim] if isinstance(dim, int) else dim
    return {d % rank for d in dim} if dim else set(range(rank))


@_rule("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "prod", "linalg_vector_norm")
def _reduce(graph: ChannelGraph, node: fx.Node) -> Dims:
    x = node.args[0]
    dims, rank = graph.dims(x), len(sizes(x))
    gone = _reduced(node, rank)
    over = {d: dims[d] for d in gone if d in dims}
    graph.require_all(over, node, f"its {_name(node)} runs over channels")
    if _arguments(node).get("keepdim"):
        return _without(dims, *gone)
    left = [d for d in range(rank) if d not in gone]
    return {i: dims[d] for i, d in enumerate(left) if d in dims}


@_rule("softmax", "log_softmax", "_softmax", "cumsum", "flip", "roll", "sort")
def _along(graph: ChannelGraph, node: fx.Node) -> Dims:
    x = node.args[0]
    dims = graph.dims(x)
    given = _arguments(node)
    where = given.get("dim", given.get("dims"))
    rank = len(sizes(x))
    # Without dimensions, roll works on all of them.
    touched = {d % rank for d in ([where] if isinstance(where, int) else where or range(rank))}
    over = {d: dims[d] for d in touched if d in dims}
    graph.require_all(over, node, f"its {_name(node)} runs along channels")
    return dims


@_rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def _pad(graph: ChannelGraph, node: fx.Node) -> Dims:
    x = node.args[0]
    given = _arguments(node)
    pad, rank, dims = given.get("pad", given.get("padding")), len(sizes(x)), graph.dims(x)
    grown = {rank - 1 - i // 2 for i, n in enumerate(pad) if n}
    over = {d: dims[d] for d in grown if d in dims}
    graph.require_all(over, node, "it pads channels")
    return dims


@_rule("permute", "transpose", "t", "swapaxes", "movedim", "numpy_T")
def _permute(graph: ChannelGraph, node: fx.Node) -> Dims:
    x = node.args[0]
    rank = len(sizes(x))
    # What goes where, seen on a tensor whose sizes are all different.
    marked = torch.empty(*range(2, rank + 2), device="meta")
    moved = node.target(marked, *node.args[1:], **node.kwargs).shape
    dims = graph.dims(x)
    return {i: dims[size - 2] for i, size in enumerate(moved) if size - 2 in dims}


@_rule(
    "flatten", "reshape", "view", "_unsafe_view", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as",
)  # fmt: skip
def _reshape(graph: ChannelGraph, node: fx.Node) -> Dims:
    x = node.args[0]
    dims, result = graph.dims(x), {}
    for old, new in _matching(sizes(x), sizes(node)):
        carried = {d: dims[d] for d in old if d in dims}
        if not carried:
            continue
        first, rest = old[0], math.prod(sizes(x)[d] for d in old[1:])
        after = math.prod(sizes(node)[d] for d in new[1:])
        inner = [d for d in carried if d != first]
        graph.require_all(
            {d: carried[d] for d in inner}, node, "it merges channels into other dimensions"
        )
        if first not in carried or inner:
            graph.require_all(carried, node, "it merges channels into other dimensions")
            continue
        try:
            result[new[0]] = scaled(carried[first], rest, after)
        except Mismatch:
            graph.require_all(
                carried, node, f"it arranges channels as {list(sizes(node))[new[0] : new[-1] + 1]}"
            )
    return result


def _matching(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Shortest groups of dimensions with equal products, those of size 1 left out."""
    pairs, start, end = [], 0, 0
    old_dims = [d for d, size in enumerate(old) if size != 1]
    new_dims = [d for d, size in enumerate(new) if size != 1]
    while start < len(old_dims) and end < len(new_dims):
        ours, theirs = [old_dims[start]], [new_dims[end]]
        start, end = start + 1, end + 1
        while (left := math.prod(old[d] for d in ours)) != (
            right := math.prod(new[d] for d in theirs)
        ):
            if left < right:
                ours.append(old_dims[start])
                start += 1
            else:
                theirs.append(new_dims[end])
                end += 1
        pairs.append((ours, theirs))
    return pairs


@_rule("cat", "concat", "concatenate")
def _concatenate(graph: ChannelGraph, node: fx.Node) -> Dims:
    given = _arguments(node)
    tensors, rank = list(given["tensors"]), len(sizes(node))
    dim, result = given["dim"] % rank, {}
    for d in range(rank):
        met = [graph.dims(tensor).get(d) for tensor in tensors]
        if all(layout is None for layout in met):
            continue
        layouts = [_channels(graph, tensor, d) for tensor in tensors]
        if d == dim:
            result[d] = tuple(s for layout in layouts for s in layout)
            continue
        for layout in layouts[1:]:
            tie(layouts[0], layout)
        result[d] = layouts[0]
    return result


@_rule("stack")
def _stack(graph: ChannelGraph, node: fx.Node) -> Dims:
    given = _arguments(node)
    tensors, rank = list(given["tensors"]), len(sizes(node))
    dim, result = given["dim"] % rank, {}
    for d in range(rank - 1):
        if any(d in graph.dims(tensor) for tensor in tensors):
            layouts = [_channels(graph, tensor, d) for tensor in tensors]
            for layout in layouts[1:]:
                tie(layouts[0], layout)
            result[d + (d >= dim)] = layouts[0]
    return result


@_rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
def _split(graph: ChannelGraph, node: fx.Node) -> list[Dims]:
    x, rank = node.args[0], len(sizes(node.args[0]))
    dims, dim = graph.dims(x), _arguments(node)["dim"] % rank
    if _name(node) == "unbind":
        graph.require_all({d: v for d, v in dims.items() if d == dim}, node, "it unbinds channels")
        part = {d - (d > dim): layout for d, layout in dims.items() if d != dim}
        return [part] * len(node.meta["val"])
    if dim not in dims:
        return [dims] * len(node.meta["val"])
    found, rest = [], dims[dim]
    for value in node.meta["val"]:
        part, rest = cut(rest, int(value.shape[dim]))
        found.append(dims | {dim: part})
    return found


@_rule("slice", "narrow")
def _slice(graph: ChannelGraph, node: fx.Node) -> Dims:
    given = _arguments(node)
    x, before, after = node.args[0], sizes(node.args[0]), sizes(node)
    dims, dim = graph.dims(x), given["dim"] % len(before)
    if dim not in dims or before[dim] == after[dim]:
        return dims
    if given.get("step", 1) != 1:
        graph.require_all({dim: dims[dim]}, node, "it takes every other channel")
        return _without(dims, dim)
    start = given["start"] or 0
    if not isinstance(start, int):
        raise Mismatch("it cuts channels at a place that is computed")
    _, rest = cut(dims[dim], start % before[dim])
    part, _ = cut(rest, after[dim])
    return dims | {dim: part}


@_rule("select")
def _select(graph: ChannelGraph, node: fx.Node) -> Dims:
    x = node.args[0]
    dims, dim = graph.dims(x), _arguments(node)["dim"] % len(sizes(x))
    graph.require_all({d: v for d, v in dims.items() if d == dim}, node, "it selects a channel")
    return {d - (d > dim): layout for d, layout in dims.items() if d != dim}


@_rule("expand", "expand_as")
def _expand(graph: ChannelGraph, node: fx.Node) -> Dims:
    x = node.args[0]
    old, new = sizes(x), sizes(node)
    shift = len(new) - len(old)
    dims = graph.dims(x)
    return {d + shift: v for d, v in dims.items() if old[d] == new[d + shift]}


@_rule("getitem", "<built-in function getitem>")
def _item(graph: ChannelGraph, node: fx.Node) -> Dims:
    values = graph.values[node.args[0]]
    return values[node.args[1]] if isinstance(values, list) else {}
