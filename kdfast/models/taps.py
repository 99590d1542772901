"""Reading the features of any model while it runs, without touching its code."""

from __future__ import annotations

import torch
from torch import nn

from kdfast.errors import UsageError, unknown
from kdfast.models.folded_norm import FoldedNorm

_PLANAR = (
    nn.Conv2d,
    nn.BatchNorm2d,
    FoldedNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)


class _Tap:
    """One watched layer. A plain object, so that deep-copying the model copies its taps along."""

    def __init__(self, layer: str, planar: bool) -> None:
        self.layer = layer
        self.planar = planar  # NCHW even inside a channels-last model
        self.clone = True
        self.active = False
        self.value: torch.Tensor | None = None
        self.version = 0

    def on_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.active:
            self._keep(args[0] if args else next(iter(kwargs.values()), None))

    def on_output(self, module: nn.Module, args: tuple, output: object) -> None:
        if self.active:
            self._keep(output)

    def _keep(self, value: object) -> None:
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"layer '{self.layer}' passes a {type(value).__name__}, not a tensor; "
                "choose a layer inside or after it"
            )
        self.value = value.clone() if self.clone else value
        if not torch.compiler.is_compiling() and not self.value.is_inference():
            self.version = self.value._version

    def overwritten(self) -> bool:
        """Whether the kept tensor was changed in place since it was kept (eager mode only)."""
        return not self.value.is_inference() and self.value._version != self.version

    def __getstate__(self) -> dict:
        # A feature belongs to one forward pass; as a non-leaf tensor it could not be copied either.
        return {**self.__dict__, "value": None, "active": False}


class Taps(nn.Module):
    """Wraps a model so that a forward pass also returns the features of some layers.

    `forward(x)`: [N,C,H,W] -> (what the model returns, tuple of features in the order of
    `layers`). A feature is the tensor the layer passed, in its dtype (autocast's, where active),
    part of the graph, and safe from being overwritten in place later in the model. Token tensors
    [N,L,C] come as maps [N,C,h,w] without their prefix tokens, and the maps of timm's channels-last
    models (`output_fmt` "NHWC") as [N,C,h,w]; everything else comes as it is.

    The hooks are set here, once, so that `torch.compile(Taps(...))` sees them; a compiled model
    would ignore them and is refused. Calling `taps.model` directly runs without recording. The
    weights to save are `taps.model.state_dict()`. A layer that runs several times in a forward
    pass (a shared ReLU) gives its last call.

    Args:
        model: an uncompiled model.
        layers: dotted module names; `name` is the layer's output, `name:in` its first input.

    Raises:
        UsageError: unknown layer, or a compiled model; from `forward`, a layer that did not run,
            passed something other than a tensor, or tokens that do not fill a grid.
    """

    def __init__(self, model: nn.Module, layers: list[str] | tuple[str, ...]) -> None:
        super().__init__()
        for module in model.modules():
            if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl:
                raise UsageError(
                    "taps must be set before compilation: build Taps from the plain model, "
                    "then compile the Taps"
                )
        self.model = model
        self.layers = tuple(layers)
        self._taps: list[_Tap] = []
        self._handles = []
        for layer in self.layers:
            module = find_layer(model, layer)
            tap = _Tap(layer, planar=isinstance(module, _PLANAR))
            if layer.endswith(":in"):
                handle = module.register_forward_pre_hook(tap.on_input, with_kwargs=True)
            else:
                handle = module.register_forward_hook(tap.on_output)
            self._taps.append(tap)
            self._handles.append(handle)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        self._arm(True)
        try:
            logits = self.model(x)
            features = tuple(self._take(tap, x) for tap in self._taps)
        finally:
            self._arm(False)
        return logits, features

    def calibrate(self, example: torch.Tensor) -> tuple[torch.Size, ...]:
        """Feature shapes for a batch like `example`; afterwards only taps that need it are cloned.

        Runs one forward pass in eval mode and finds, from the version counters of the tensors,
        which taps the model overwrites in place. In-place dropout counts as if it were training,
        when it writes. Leaves train/eval modes, BN buffers and the random state as they were.
        """
        modes = {module: module.training for module in self.modules()}
        clones = [True] * len(self._taps)
        devices = [] if example.device.type == "cpu" else [example.device]
        kind = "cuda" if example.device.type == "cpu" else example.device.type
        try:
            self.eval()
            for module in self.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd) and module.inplace:
                    module.training = True
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.random.fork_rng(devices, device_type=kind),
            ):
                for tap in self._taps:
                    tap.clone = False
                x = example.clone()  # a normal tensor even if the example is an inference tensor
                self._arm(True)
                self.model(x)
                shapes = tuple(self._take(tap, x, check=False).shape for tap in self._taps)
                clones = [tap.overwritten() for tap in self._taps]
                return shapes
        finally:
            self._arm(False)
            for tap, clone in zip(self._taps, clones, strict=True):
                tap.clone = clone
            for module, training in modes.items():
                module.training = training

    def close(self) -> None:
        """Removes the hooks; the model is as before and this object is of no further use."""
        for handle in self._handles:
            handle.remove()

    def _arm(self, active: bool) -> None:
        for tap in self._taps:
            tap.active = active
            tap.value = None

    def _take(self, tap: _Tap, x: torch.Tensor, check: bool = True) -> torch.Tensor:
        if tap.value is None:
            raise UsageError(
                f"layer '{tap.layer}' did not run in the forward pass of "
                f"{type(self.model).__name__}; choose a layer that is called"
            )
        if check and not torch.compiler.is_compiling() and tap.overwritten():
            raise RuntimeError(
                f"layer '{tap.layer}' was overwritten in place although calibrate() found it safe; "
                "build the Taps anew without calibrating"
            )
        return self._as_map(tap, x)

    def _as_map(self, tap: _Tap, x: torch.Tensor) -> torch.Tensor:
        value = tap.value
        if value.ndim == 4 and not tap.planar and _channels_last(self.model):
            return value.permute(0, 3, 1, 2)
        if value.ndim != 3 or x.ndim != 4:
            return value
        height, width = _grid(self.model, value.shape[1], x)
        prefix = value.shape[1] - height * width
        if value.shape[0] != x.shape[0] or prefix not in (0, _prefix_tokens(self.model)):
            raise UsageError(
                f"layer '{tap.layer}' passes {list(value.shape)}, which is no map for a batch "
                f"{list(x.shape)}: tokens must fill the {height}x{width} grid; choose another layer"
            )
        return value[:, prefix:].transpose(1, 2).unflatten(2, (height, width))


def _prefix_tokens(model: nn.Module) -> int:
    return getattr(model, "num_prefix_tokens", 0)


def _channels_last(model: nn.Module) -> bool:
    return getattr(model, "output_fmt", "NCHW") == "NHWC"


def _grid(model: nn.Module, tokens: int, x: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a token sequence for input x [N,C,H,W].

    The patch embedding knows them; staged models (several embeddings, none called `patch_embed`,
    or tokens fewer than its grid) shrink both sides alike.
    """
    height, width = x.shape[-2:]
    embed = getattr(model, "patch_embed", None)
    if hasattr(embed, "dynamic_feat_size"):
        rows, columns = embed.dynamic_feat_size((height, width))
        if rows * columns in (tokens, tokens - _prefix_tokens(model)):
            return rows, columns
    rows = round((tokens * height / width) ** 0.5)
    return rows, round(rows * width / height)


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """The module that a layer spec (`name` or `name:in`) speaks of.

    Raises:
        UsageError: no such module; names the closest.
    """
    name = layer.removesuffix(":in")
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise unknown("layer", name, [key for key in modules if key])
    return modules[name]


def classifier_name(model: nn.Module) -> str:
    """Dotted name of the final layer: timm's record of it, else the last linear layer.

    Raises:
        UsageError: neither is there.
    """
    name = getattr(model, "pretrained_cfg", {}).get("classifier")
    if isinstance(name, (tuple, list)):  # several heads, as in distilled transformers
        name = name[0]
    if name:
        find_layer(model, name)
        return name
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError(f"{type(model).__name__} has no linear classifier; name the layers")
    return linear[-1]


def penultimate(model: nn.Module) -> str:
    """Layer spec of the pooled feature vector: the input of the classifier, `<name>:in`."""
    return f"{classifier_name(model)}:in"
