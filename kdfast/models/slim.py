"""Splitting a network in fit and reset weights, and the slim network that the fit weights are.

Taha, Shrivastava, Davis, "Knowledge Evolution in Neural Networks", CVPR 2021, arXiv 2103.05152. The
public code writes every split network by hand; here masks and widths follow from the graph.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdfast.errors import UsageError
from kdfast.models.channel_graph import ChannelGraph, first_names
from kdfast.models.channel_sets import Kept, kept_runs, length
from kdfast.models.group_norm import SplitGroupNorm
from kdfast.models.masked import MaskedDense
from kdfast.ops import Key, SplitMask, split_reset_
from kdfast.ops.split_mask import Runs, total

MODES = ("kels", "wels")
Size = tuple[int, int, int]


def split_masks(
    model: nn.Module,
    rate: float,
    mode: str = "kels",
    key: Key | None = None,
    input_size: Size | None = None,
    *,
    graph: ChannelGraph | None = None,
) -> dict[str, SplitMask]:
    """The masks of every convolution's and linear layer's weight, by parameter name.

    kels: of n channels that are tied to one another the first ceil(n * rate) are kept, of a
    concatenation those of each segment; image channels and classes all stay. wels: every weight by
    itself with probability `rate`, drawn from `key` and the weight's name.

    Args:
        model: an image classifier; kels needs one that torch.export can trace.
        rate: the split rate, in (0, 1).
        input_size: (channels, height, width); by default what the model was made for.
        graph: of `model`, where it is at hand (tracing takes seconds).

    Raises:
        UsageError: another rate or mode, wels without a key, a model that cannot be split (the
            line names the operation and the reason).

    Source: the paper's KELS and WELS; the rules for grouped convolutions, squeeze-excitation and
    flattening are ours.
    """
    if not 0 < rate < 1:
        raise UsageError(f"split rate {rate:g} is not between 0 and 1; give, say, 0.5")
    if mode not in MODES:
        raise UsageError(f"split mode '{mode}' is none of {', '.join(MODES)}")
    if mode == "wels":
        if key is None:
            raise UsageError("split mode wels draws weights: give a key")
        weights = _split_weights(model)
        return {
            name: SplitMask.wels(weight.shape, rate, Key(*key.words, name))
            for name, weight in weights.items()
        }
    graph = graph or ChannelGraph(model, input_size, any_batch=False)
    kept = graph.keep_rate(rate)
    parameters = dict(model.named_parameters())
    return {
        name: SplitMask(parameters[name].shape, *graph.runs(name, kept)[:2])
        for name in graph.weights
    }


def _split_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, shared ones once."""
    kinds = nn.modules.conv._ConvNd | nn.Linear
    names = [
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, seen = {}, set()
    for name in names:
        if name not in parameters:
            raise UsageError(f"cannot split {name}: it is computed, not a parameter")
        if id(parameters[name]) not in seen:
            found[name] = parameters[name]
            seen.add(id(parameters[name]))
    return found


def reset(
    model: nn.Module,
    masks: Mapping[str, SplitMask],
    key: Key,
    fresh: nn.Module | None = None,
) -> None:
    """Draw the reset weights of `model` anew, in place.

    Weights outside the masks, and the biases of convolutions in rows that keep no weight, become
    uniform on (-b, b), b = 1 / sqrt(fan_in) of the whole weight; with `fresh`, a network of the
    same architecture, they become that one's. Normalisation, its running statistics and the biases
    of linear layers stay.

    Raises:
        UsageError: masks of other weights or shapes.

    Source: the paper's public code.
    """
    parameters = dict(model.named_parameters())
    _check_masks(masks, parameters)
    if fresh is not None and _shapes(fresh) != _shapes(model):
        raise UsageError("the fresh network is of another architecture than the one to reset")
    names = list(masks)
    weights = [parameters[name] for name in names]
    own = [masks[name].to(w.device) for name, w in zip(names, weights, strict=True)]
    if fresh is None:
        split_reset_(weights, own, key)
    else:
        drawn = dict(fresh.named_parameters())
        with torch.no_grad():
            for name, weight, mask in zip(names, weights, own, strict=True):
                new = drawn[name].to(weight)
                weight.copy_(torch.where(mask.dense(device=weight.device), weight, new))
    for i, (name, weight, mask) in enumerate(zip(names, weights, own, strict=True)):
        owner = model.get_submodule(name.rpartition(".")[0])
        bias = getattr(owner, "bias", None)
        if not isinstance(owner, nn.modules.conv._ConvNd) or bias is None:
            continue
        if fresh is not None:
            new = dict(fresh.named_parameters())[f"{name.rpartition('.')[0]}.bias"].to(bias)
        else:
            # A single column draws from (-1, 1), whatever the mask.
            new = torch.zeros(len(bias), 1, dtype=bias.dtype, device=bias.device)
            nothing = SplitMask((len(bias), 1), bits=torch.zeros(-(-len(bias) // 8)).byte())
            split_reset_([new], [nothing.to(bias.device)], Key(*key.words, "bias", i))
            new = new.squeeze(1) / math.sqrt(weight[0].numel())
        with torch.no_grad():
            bias.copy_(torch.where(mask.row_mask(bias.device), bias, new))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _check_masks(masks: Mapping[str, SplitMask], parameters: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        if name not in parameters or tuple(parameters[name].shape) != mask.shape:
            found = list(parameters[name].shape) if name in parameters else "no such weight"
            raise UsageError(
                f"mask of {name} is for a weight {list(mask.shape)}, the model has {found}"
            )


def extract_slim(
    model: nn.Module,
    masks: Mapping[str, SplitMask],
    input_size: Size | None = None,
    *,
    graph: ChannelGraph | None = None,
) -> nn.Module:
    """The network that the kept channels are: the same classes and names, narrower layers.

    Its logits are those of the masked dense network (`masked_dense`), in evaluation and, without
    dropout, in training mode. Reset weights are not read. Both are compared on random images before
    it is handed out, so that a model whose code has widths written into it is refused.

    Args:
        model: stays as it is.
        masks: block masks (kels) of all of its weights.
        input_size, graph: as for `split_masks`.

    Raises:
        UsageError: masks that do not fit, masks of single weights, a model that cannot be split.

    Source: the paper's slim network; its widths are read from the masks.
    """
    graph = graph or ChannelGraph(model, input_size, any_batch=False)
    _check_masks(masks, dict(model.named_parameters()))
    kept = graph.keep_masks(masks)
    slim = copy.deepcopy(model)
    for name in graph.parameters:
        _cut_tensor(slim, name, graph.runs(name, kept))
    _tie_shared(model, slim)
    for name, module in list(slim.named_modules()):
        if name in graph.modules:
            module = _fit(graph, name, module, kept)
            _put(slim, name, module)
        if isinstance(module, nn.modules.conv._ConvNd):
            module.out_channels = len(module.weight)
            module.in_channels = module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    _compare(graph, model, slim, masks)
    return slim


def _cut_tensor(slim: nn.Module, name: str, runs: tuple[Runs, ...]) -> None:
    path, _, attribute = name.rpartition(".")
    owner = slim.get_submodule(path)
    old = getattr(owner, attribute)
    new = old.detach()
    for d, own in enumerate(runs):
        if own != ((0, new.shape[d]),):
            new = torch.cat([new.narrow(d, *run) for run in own], d)
    if new.shape == old.shape:
        return
    layout = torch.contiguous_format
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    new = new.contiguous(memory_format=layout)
    if isinstance(old, nn.Parameter):
        owner.register_parameter(attribute, nn.Parameter(new, old.requires_grad))
    else:
        owner.register_buffer(attribute, new, attribute not in owner._non_persistent_buffers_set)


def _tie_shared(model: nn.Module, slim: nn.Module) -> None:
    """Let the slim network share the parameters that the dense one shares."""
    for name, first in first_names(model).items():
        path, _, attribute = name.rpartition(".")
        setattr(slim.get_submodule(path), attribute, slim.get_parameter(first))


def _put(slim: nn.Module, name: str, module: nn.Module) -> None:
    path, _, attribute = name.rpartition(".")
    if path or attribute:
        setattr(slim.get_submodule(path), attribute, module)


def _fit(graph: ChannelGraph, name: str, module: nn.Module, kept: Kept) -> nn.Module:
    """`module` for the kept channels of its input."""
    layout = graph.modules[name]
    width, runs = length(layout), kept_runs(layout, kept)
    left = total(runs)
    if left == width:
        return module
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            module.groups = left * module.groups // width
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = left
    elif isinstance(module, nn.GroupNorm):
        size = width // module.num_groups
        counts = [
            total(part) for g in range(module.num_groups) if (part := _within(runs, g * size, size))
        ]
        if len(set(counts)) > 1:
            return SplitGroupNorm(module, counts)
        module.num_groups, module.num_channels = len(counts), left
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = (left,)
    return module


def _within(runs: Runs, start: int, size: int) -> Runs:
    """What of `runs` lies in `size` positions from `start` on."""
    cut = [(max(a, start), min(a + n, start + size)) for a, n in runs]
    return tuple((low, high - low) for low, high in cut if low < high)


@torch.no_grad()
def _compare(
    graph: ChannelGraph, model: nn.Module, slim: nn.Module, masks: Mapping[str, SplitMask]
) -> None:
    """Refuse a slim network that is not the masked dense one, on random images in float64."""
    dense = MaskedDense(copy.deepcopy(model).double(), masks, graph)
    narrow = copy.deepcopy(slim).double().eval()
    device = next(dense.parameters()).device
    images = torch.randn(
        2, *graph.input_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).to(device)
    expected = dense(images)
    scale = expected.nan_to_num(0, 0, 0).abs().max().item()
    try:
        found = narrow(images)
        # Kept weights may be NaN, and make the logits of both networks so.
        if torch.allclose(found, expected, rtol=0, atol=1e-6 * scale, equal_nan=True):
            return
        difference = (found - expected).abs().max().item()
        reason = f"logits of up to {scale:.3g} differ by {difference:.3g}"
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
    raise UsageError(
        f"cannot split {graph.name}: its code depends on widths in a way the slim network cannot "
        f"follow ({reason})"
    )
