"""The dense network with masked weights, which the slim network must equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.models.channel_graph import ChannelGraph
from kdfast.models.channel_rules import arguments_of
from kdfast.models.channel_sets import Kept, kept_runs, length
from kdfast.ops import SplitMask, split_conv2d
from kdfast.ops.split_mask import Runs, total


class MaskedDense(nn.Module):
    """`model` in evaluation mode with every convolution's and linear layer's weight masked.

    [N, C, H, W] -> logits; 2-d convolutions run through `ops.split_conv2d`, everything else as
    exported. Reset weights are not read. What normalises across channels (LayerNorm, GroupNorm
    whose group is cut) runs over the kept ones. The weights are the model's, and follow it.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, SplitMask], graph: ChannelGraph):
        super().__init__()
        if masks.keys() != graph.weights.keys():
            raise UsageError(f"the masks are not those of {graph.name}")
        self.model, self.masks, self.graph = model, dict(masks), graph
        block = all(mask.bits is None for mask in masks.values())
        self.kept = graph.keep_masks(masks) if block else None

    def forward(self, x: Tensor) -> Tensor:
        tensors = dict(self.model.named_parameters())
        # By every name, for the graph may have another one of a shared buffer.
        tensors |= self.model.named_buffers(remove_duplicate=False)
        self.masks = {name: mask.to(x.device) for name, mask in self.masks.items()}
        return _Masking(self.graph, self.masks, self.kept, tensors).run(x)[0]


_ACROSS = {torch.ops.aten.layer_norm, torch.ops.aten.rms_norm}


class _Masking(fx.Interpreter):
    def __init__(
        self,
        graph: ChannelGraph,
        masks: Mapping[str, SplitMask],
        kept: Kept | None,
        tensors: Mapping[str, Tensor],
    ):
        super().__init__(graph.program.graph_module)
        self.of, self.masks, self.kept, self.tensors = graph, masks, kept, tensors
        self.image: Tensor | None = None

    def run(self, x: Tensor) -> Any:
        self.image = x
        return super().run()

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "call_function":
            values = self.fetch_args_kwargs_from_env(node)
            given = arguments_of(node, *values) if hasattr(node.target, "_schema") else {}
            weight = node.args[1] if len(node.args) > 1 else None
            name = self.of.name_of(weight) if isinstance(weight, fx.Node) else None
            if name in self.masks and "weight" in given:
                return self._layer(node, self.masks[name], given)
            packet = getattr(node.target, "overloadpacket", None)
            if self.kept is not None and packet in _ACROSS:
                return self._across(node, given)
            if self.kept is not None and packet is torch.ops.aten.group_norm:
                return self._group_norm(node, given)
        return super().run_node(node)

    def _placeholder(self, node: fx.Node) -> Any:
        if not self.of.is_named(node):
            return self.image
        name = self.of.name_of(node)
        if name is not None:
            return self.tensors[name]
        return self.of.constant(node).to(self.image.device)

    def _layer(self, node: fx.Node, mask: SplitMask, given: dict[str, Any]) -> Tensor:
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if node.target.overloadpacket is torch.ops.aten.conv2d:
            settings = [given[key] for key in ("stride", "padding", "dilation")]
            settings = [s if isinstance(s, str) else tuple(s) for s in settings]
            return split_conv2d(x, weight, mask, bias, *settings, given["groups"])
        masked = torch.where(mask.dense(device=weight.device), weight, 0)
        return node.target(**(given | {"weight": masked}))

    def _runs(self, node: fx.Node, dim: int) -> Runs | None:
        """The kept channels of the node's first argument, None where all of them are."""
        layout = self.of.dims(node.args[0]).get(dim)
        if layout is None:
            return None
        runs = kept_runs(layout, self.kept)
        return None if total(runs) == length(layout) else runs

    def _across(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x = given["input"]
        runs = self._runs(node, x.dim() - 1) if len(given["normalized_shape"]) == 1 else None
        if runs is None:
            return super().run_node(node)
        kept = _indices(runs, x.device)
        own = {"input": x[..., kept], "normalized_shape": [len(kept)]}
        own |= {k: v[kept] for k in ("weight", "bias") if (v := given.get(k)) is not None}
        return torch.zeros_like(x).index_copy(-1, kept, node.target(**(given | own)))

    def _group_norm(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x, groups = given["input"], given["num_groups"]
        runs = self._runs(node, 1)
        if runs is None:
            return super().run_node(node)
        every, size = _indices(runs, x.device), x.shape[1] // groups
        result = torch.zeros_like(x)
        for g in range(groups):
            kept = every[(every // size) == g]
            if not len(kept):
                continue
            weight, bias = (
                None if given[key] is None else given[key][kept] for key in ("weight", "bias")
            )
            part = F.group_norm(x[:, kept], 1, weight, bias, given["eps"])
            result = result.index_copy(1, kept, part)
        return result


def _indices(runs: Runs, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, start + n, device=device) for start, n in runs])


def masked_dense(
    model: nn.Module,
    masks: Mapping[str, SplitMask],
    input_size: tuple[int, int, int] | None = None,
    *,
    graph: ChannelGraph | None = None,
) -> MaskedDense:
    """`MaskedDense` of a model that torch.export can trace; masks of blocks or single weights.

    Raises:
        UsageError: masks that do not fit, a model that cannot be traced.
    """
    return MaskedDense(model, masks, graph or ChannelGraph(model, input_size))
