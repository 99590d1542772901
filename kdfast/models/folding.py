"""Batch normalisation and ReLU folded into the layers before them, for evaluation alone."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, SyncBatchNormAct
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdfast.models.activated_conv import ActivatedConv2d, can_fuse
from kdfast.models.folded_norm import FoldedNorm
from kdfast.models.taps import find_layer

# Layers are known by the code they run: a subclass may do something else with its weights.
_LINEAR = {
    layer.forward for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Conv2dSame, TimmLinear)
}
_NORMS = {layer.forward for layer in (_BatchNorm, nn.SyncBatchNorm, BatchNormAct2d)}
_NORMS.add(SyncBatchNormAct.forward)


def fold_batch_norms(
    network: nn.Module,
    example: Tensor | tuple,
    keep: Iterable[str] = (),
    *,
    activations: bool = False,
) -> nn.Module:
    """A copy of `network` for evaluation, its batch normalisations folded into what is before them.

    A normalisation y = (x - mean) * s + bias, s = weight / sqrt(variance + eps), of what one
    convolution or linear layer puts out becomes part of that layer: its weights times s by output
    channel, its bias (bias - mean) * s + bias; computed in float64, kept in the dtype of the
    weights. So the copy computes what `network` does, to rounding, forwards and backwards, with
    two passes over memory less for each. Dropout and activation that belong to the normalisation
    (timm's `BatchNormAct2d`) stay under their names, and all other layers keep theirs.

    One evaluation pass over `example` shows what may be folded. Left as they are: a normalisation
    or a layer that runs twice or shares or lends its weights; one with another input than the
    whole output of a convolution or linear layer, or where that output is used by anything else,
    handed out, kept by the network or seen by a hook; batch statistics (no running ones);
    weights that are computed (spectral norm, pruning, standardisation); transposed convolutions;
    numbers that would not be finite.

    Args:
        network: plain, not compiled, in evaluation mode; not changed. Its path through its layers
            must be that of `example` for all inputs.
        example: what `network` is called with, of any batch size; a tuple of several arguments.
        keep: layer specs as of `Taps` (`name`, or `name:in` for its input) whose values must stay
            what they are.
        activations: a convolution applies a ReLU that is alone in using its output, too, where
            nothing else sees what it was before; the same to rounding.

    Returns:
        A copy that shares nothing with `network`. Weights that were folded are new parameters,
        which ask for gradients if the old ones did; its `state_dict` is not that of `network`.

    Raises:
        ValueError: part of `network` is in training mode, or it is compiled.
        UsageError: a layer in `keep` does not exist.
    """
    for name, module in network.named_modules():
        if module.training:
            where = f"its layer '{name}'" if name else "the network"
            raise ValueError(f"fold_batch_norms: {where} is in training mode; call eval() first")
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl:
            raise ValueError("fold_batch_norms: fold the plain network, then compile it")
    with torch.inference_mode(False), torch.no_grad():
        folded, keep = _copy(network), list(keep)
        example = example if isinstance(example, tuple) else (example,)
        uses = _Uses(folded, keep, _is_layer, _is_norm)
        uses.watch(example)
        for layer, norm in list(uses.pairs()):
            _fold(layer, norm)
        if activations:
            uses = _Uses(folded, keep, can_fuse, _is_relu)
            uses.watch(example)
            for conv, relu in list(uses.pairs()):
                conv.__class__, relu.__class__ = ActivatedConv2d, nn.Identity
    return folded


def _copy(network: nn.Module) -> nn.Module:
    """Deep; of tensors that came out of a graph (pruned weights), which refuse, their values."""
    made = {
        id(value): value.detach().clone()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(network, made)


class _Uses(TorchDispatchMode):
    """Who runs on which tensors in one pass: every operation, not only what modules pass on.

    `layers` put out what `followers` may take over; both are told by functions of a module.
    """

    def __init__(
        self,
        network: nn.Module,
        keep: Iterable[str],
        is_layer: Callable[[nn.Module], bool],
        is_follower: Callable[[nn.Module], bool],
    ) -> None:
        super().__init__()
        self.network = network
        self.layers = [m for m in network.modules() if is_layer(m)]
        self.followers = [m for m in network.modules() if is_follower(m)]
        self.calls: Counter[nn.Module] = Counter()
        self.running: list[nn.Module] = []
        # Storage of a weight or of a layer's output -> those in which operations read or wrote it.
        self.users: dict[int, set[nn.Module | None]] = {
            _storage(tensor): set() for m in (*self.layers, *self.followers) for tensor in _state(m)
        }
        self.made: dict[nn.Module, Tensor] = {}  # outputs, kept so that no other takes their place
        self.outputs: dict[nn.Module, int] = {}
        # Follower -> the layer whose output it was given, untouched and unseen until then.
        self.given: dict[nn.Module, nn.Module | None] = {}
        self.seen: set[int] = set()  # storages that a tap or a hook sees
        self.shown: list[object] = []  # those, kept as `made` are
        self.held: set[nn.Module] = set()  # layers whose output somebody has kept
        self.keep = [(find_layer(network, spec), spec.endswith(":in")) for spec in keep]

    def watch(self, example: tuple) -> None:
        with self._hooks(), self:
            result = self.network(*example)
        self.outputs = {layer: _storage(output) for layer, output in self.made.items()}
        alive = {layer: weakref.ref(output) for layer, output in self.made.items()}
        self.made.clear()
        self.shown.clear()
        # Handed out in `result`, or kept in an attribute.
        self.held = {layer for layer, output in alive.items() if output() is not None}
        del result

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The layers and what can be folded into them."""
        for follower in self.followers:
            layer = self.given.get(follower)
            if (
                layer is not None
                and self.calls[layer] == self.calls[follower] == 1
                and (_works_in_place(follower) or self._is_alone(layer, follower))
                and all(self._is_private(module) for module in (layer, follower))
            ):
                yield layer, follower

    def _is_alone(self, layer: nn.Module, follower: nn.Module) -> bool:
        """Whether nobody else ever has the output of `layer`; in place, it is `follower`'s too."""
        place = self.outputs[layer]
        return layer not in self.held and place not in self.seen and self.users[place] == {follower}

    def _is_private(self, module: nn.Module) -> bool:
        return all(self.users[_storage(tensor)] <= {module} for tensor in _state(module))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        user = self.running[-1] if self.running else None
        for value in tree_leaves((args, kwargs)):
            place = _storage(value)
            if place in self.users:
                self.users[place].add(user)
        return func(*args, **kwargs)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Hooks while the pass runs; what others see is noted of those that were there before."""
        handles = []

        def note(module: nn.Module, *, inputs: bool, outputs: bool) -> None:
            if inputs:
                handles.append(module.register_forward_pre_hook(self._note_in, with_kwargs=True))
            if outputs:
                handles.append(module.register_forward_hook(self._note_out))

        for module in self.network.modules():
            both = bool(
                module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
            )
            note(module, inputs=both or bool(module._forward_pre_hooks), outputs=both)
        for module, takes_input in self.keep:
            note(module, inputs=takes_input, outputs=not takes_input)
        for module in self.layers:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave_layer))
        for module in self.followers:
            handles.append(module.register_forward_pre_hook(self._enter_follower))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.running.clear()

    def _note_in(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._see(tree_leaves((args, kwargs)))

    def _note_out(self, module: nn.Module, args: tuple, output: object) -> None:
        self._see(tree_leaves(output))

    def _see(self, values: list[object]) -> None:
        self.seen.update(map(_storage, values))
        self.shown += values

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self.calls[module] += 1
        self.running.append(module)

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self.running.pop()

    def _leave_layer(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.running.pop()
        # Of a linear layer on [N, L, C], of a convolution without batch dimension, the channels are
        # not where a normalisation has them.
        if output.dim() == module.weight.dim():
            self.made[module] = output
            self.users.setdefault(_storage(output), set())

    def _enter_follower(self, module: nn.Module, args: tuple) -> None:
        self._enter(module, args)
        layer = next((m for m, output in self.made.items() if args and output is args[0]), None)
        if layer is not None:
            place = _storage(self.made[layer])
            untouched = place not in self.seen and not self.users[place]
            self.given[module] = layer if untouched else None


def _is_layer(module: nn.Module) -> bool:
    return type(module).forward in _LINEAR and _has_plain_weights(module)


def _has_plain_weights(module: nn.Module) -> bool:
    """Parameters, not what some hook or parametrization computes of them at every call."""
    return {"weight", "bias"} <= module._parameters.keys()


def _is_norm(module: nn.Module) -> bool:
    return (
        type(module).forward in _NORMS
        and _has_plain_weights(module)
        and module._buffers.get("running_mean") is not None
        and module._buffers.get("running_var") is not None
    )


def _is_relu(module: nn.Module) -> bool:
    return type(module).forward is nn.ReLU.forward


def _works_in_place(module: nn.Module) -> bool:
    return _is_relu(module) and module.inplace


def _state(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and statistics, but for the counter of batches."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(value := getattr(module, name, None), Tensor):
            yield value


def _storage(value: object) -> int:
    """What tells a tensor's memory from another's as long as both live; 0 of anything else."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return value.untyped_storage()._cdata
    return 0


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Change `layer` to do what both did, and `norm` to pass on, if that can be said in numbers."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    old = layer.weight
    weight = (old.double() * scale.view(-1, *[1] * (old.dim() - 1))).to(old.dtype)
    bias = shift.to(old.dtype)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return
    new = partial(nn.Parameter, requires_grad=old.requires_grad)
    layer.weight, layer.bias = new(weight), new(bias)
    # The object itself, so that whoever holds it, not only its parent, calls what is left of it.
    norm.__class__ = FoldedNorm
    norm._parameters.clear()
    norm._buffers.clear()
