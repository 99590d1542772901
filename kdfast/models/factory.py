"""`create_model`: every timm name, the published spellings, and `module.path:function`."""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Callable

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from kdfast.errors import UsageError, UserError, unknown
from kdfast.models import (  # noqa: F401  (they register their models with timm)
    cifar_mobilenetv2,
    cifar_resnet,
    cifar_resnet18,
    cifar_shufflenet,
    cifar_vgg,
    cifar_wrn,
    headed_resnet,
)

_TORCHVISION = "torchvision.models:"
_DEPTHS = ("8", "14", "20", "32", "44", "56", "110")
# Published spelling -> registered name. An entry counts only while timm has no model so called; no
# entry differs from a timm name in case alone (`ResNet50`), which would be taken for that model.
_PUBLISHED = {
    **{f"resnet{depth}": f"cifar_resnet{depth}" for depth in (*_DEPTHS, "8x4", "32x4")},
    **{f"res{depth}": f"cifar_resnet{depth}" for depth in _DEPTHS},
    **{f"resnet_32_{depth}": f"cifar_resnet{depth}" for depth in ("20", "110")},
    **{f"wrn_{size}": f"cifar_wrn{size}" for size in ("16_1", "16_2", "28_2", "40_1", "40_2")},
    "vgg8": "cifar_vgg8",
    "MobileNetV2": "cifar_mobilenetv2_half",
    "ShuffleV1": "cifar_shufflenetv1",
    "ShuffleV2": "cifar_shufflenetv2",
}


def aliases() -> dict[str, str]:
    """Published spelling -> registered name, without those that are timm models of their own."""
    return {
        alias: name
        for alias, name in _PUBLISHED.items()
        if timm.is_model(name) and not timm.is_model(alias)
    }


def resolve_name(name: str) -> str:
    """The canonical form of a model name: aliases replaced, timm names and paths as they are.

    `module.path:function` is checked for its form only; nothing is imported.

    Raises:
        UsageError: unknown name, or unknown pretrained tag after a dot.
    """
    name = name.strip()
    if ":" in name:
        module, _, function = name.partition(":")
        if not (module and function.isidentifier()):
            raise UsageError(f"model '{name}' is not of the form module.path:function")
        return name
    name = aliases().get(name, name)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise unknown("model", name, [*timm.list_models(), *aliases()])
    if tag:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        if tag not in tags:
            raise unknown(f"pretrained tag of {architecture}", tag, tags)
    return name


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    **kwargs,
) -> nn.Module:
    """Build a classifier: [N,in_chans,H,W] -> [N,num_classes].

    Args:
        name: a timm name (`resnet18`, `resnet18.a1_in1k`), a published spelling (`resnet8x4`) or
            `module.path:function` (`torchvision.models:alexnet`), called with `num_classes=`.
        num_classes: None keeps the model's own number.
        pretrained: load timm's weights, or torchvision's of `torchvision.models:NAME`, its first
            for ImageNet (download or cache). A classifier for other than their classes is new.
        img_size: input size, handed on only to models that are built for one size.
        **kwargs: handed on to the model; an argument it does not take is an error.

    Raises:
        UsageError: unknown name, or an argument that the model does not take.
        UserError: pretrained weights that do not exist or cannot be fetched.
    """
    name = resolve_name(name)
    given = dict(kwargs)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if ":" in name:
        return _create_from_path(name, pretrained, in_chans, size, kwargs, given)
    cfg = get_pretrained_cfg(name)
    if pretrained and not cfg.has_weights:
        raise UserError(f"no pretrained weights exist for {name}: train it first, then load those")
    if size is not None and cfg.fixed_input_size:
        kwargs["img_size"] = size
    try:
        model = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, **kwargs)
    except _REJECTIONS as error:
        raise _rejected(name, error, given) from error
    except OSError as error:
        if not pretrained:
            raise
        raise _unfetched(name, error) from error
    height, width = size or cfg.input_size[1:]
    model.pretrained_cfg["input_size"] = (in_chans, height, width)
    return model


def _create_from_path(
    name: str,
    pretrained: bool,
    in_chans: int,
    size: tuple[int, int] | None,
    kwargs: dict,
    given: dict,
) -> nn.Module:
    if pretrained and not name.startswith(_TORCHVISION):
        raise UsageError(
            f"pretrained weights are known for models of timm and torchvision only, not for {name}"
        )
    function = _import(name)
    if in_chans != 3:
        kwargs["in_chans"] = in_chans
    try:
        signature = inspect.signature(function)
    except ValueError:  # compiled functions may have none; calling them tells
        signature = None
    if size is not None and signature is not None and "img_size" in signature.parameters:
        kwargs["img_size"] = size
    try:
        if signature is not None:
            signature.bind(**kwargs)
        model = function(**kwargs)
    except _REJECTIONS as error:
        raise _rejected(name, error, given) from error
    if pretrained:
        _load_torchvision(model, name)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} returned {type(model).__name__}, not a torch module")
    if not hasattr(model, "pretrained_cfg"):
        model.pretrained_cfg = {
            "architecture": name,
            "input_size": (in_chans, *(size or (224, 224))),
            "fixed_input_size": "img_size" in kwargs,
        }
    return model


def published_classes(name: str) -> int | None:
    """How many classes the published weights of model `name` tell apart; None without any."""
    name = resolve_name(name)
    if name.startswith(_TORCHVISION):
        return 1000
    published = None if ":" in name else get_pretrained_cfg(name)
    return published and published.num_classes


def _load_torchvision(model: nn.Module, name: str) -> None:
    """ImageNet weights of `name` into `model`, but for a classifier of another class count."""
    from torchvision.models import get_model_weights

    try:
        published = get_model_weights(name.removeprefix(_TORCHVISION)).IMAGENET1K_V1
    except (ValueError, AttributeError):
        raise UserError(
            f"no pretrained weights exist for {name}: train it first, then load those"
        ) from None
    try:
        state = published.get_state_dict(check_hash=True, weights_only=True)
    except OSError as error:
        raise _unfetched(name, error) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError):  # another hash, a damaged cache
        raise UserError(
            f"the cached pretrained weights of {name}, {published.url.rpartition('/')[2]}, are "
            "damaged or hold more than weights; remove that file from torch's hub cache"
        ) from None
    classes, own = len(published.meta["categories"]), model.state_dict()
    for key in own.keys() & state.keys():
        if state[key].shape[:1] == (classes,) != own[key].shape[:1]:
            state[key] = own[key]
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise UsageError(
            f"the pretrained weights of {name} do not fit it as it is built; drop --model-kwargs"
        ) from None


def _unfetched(name: str, error: OSError) -> UserError:
    return UserError(
        f"cannot fetch the pretrained weights of {name} ({type(error).__name__}): connect to "
        "the network once so that they are cached, or load a checkpoint file instead"
    )


# What constructors raise for an argument they do not take or cannot work with.
_REJECTIONS = (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError)


def _import(name: str) -> Callable[..., nn.Module]:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"model '{name}': cannot import {module_name} ({error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        choices = [key for key, value in vars(module).items() if callable(value)]
        raise unknown(f"function of {module_name}", function_name, choices)
    return function


def _rejected(name: str, error: Exception, given: dict) -> Exception:
    """The one-line form of a constructor's refusal of `given`; without those it is a bug."""
    message = str(error) or type(error).__name__
    foreign = "unexpected keyword argument" in message or "missing a required" in message
    if not (given or foreign):
        return error
    shown = ", ".join(f"{key}={value}" for key, value in given.items())
    shown = f" (given {shown})" if given else ""
    return UsageError(f"model {name} cannot be built so: {message}{shown}")


def architecture(model: nn.Module) -> str:
    """The name that rebuilds `model`, or its class name when it was not built from a name."""
    return getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that `model` was built for, from its `pretrained_cfg`.

    Raises:
        UsageError: the model has no such record (it was not made by `create_model`).
    """
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    if size is None:
        raise UsageError(f"{type(model).__name__} does not say its input size; give it explicitly")
    return tuple(size)


def fixed_input_size(model: nn.Module) -> bool:
    """Whether `model` takes images of `input_size(model)` only (position embeddings, windows)."""
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
    return bool(fixed) and not getattr(model, "dynamic_img_size", False)
