"""The total loss: gamma * cross-entropy + the sum over methods of weight * term."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.errors import UsageError, unknown
from kdfast.methods import Method, Option, Outputs, Pairing, find_method
from kdfast.models import Taps, default_stages, pair_stages, penultimate


@dataclass
class Choice:
    """The methods of a run with their options and weights, and the weight of cross-entropy."""

    methods: dict[str, dict[str, Any]]
    weights: dict[str, float]
    gamma: float

    def as_yaml(self) -> dict[str, Any]:
        """The `method`, `methods` and `gamma` keys that give this choice again."""
        named = {
            name: {find_method(name).weight_flag: self.weights[name], **options}
            for name, options in self.methods.items()
        }
        return {"method": list(named) or ["none"], "methods": named, "gamma": self.gamma}


def choose_methods(options: argparse.Namespace) -> Choice:
    """Resolve methods, options and weights: class defaults, recipe, config, then flags.

    In a file's `methods`, a key `at+kd` holds for exactly that combination and may give `alpha`,
    `beta`, `gamma`; a single method's gamma holds in combinations too. `refuse` is the reason for
    which a recipe cannot serve a method.
    """
    words: list[str] = []
    for word in options.method or ["none"]:
        words += {"none": [], "base": [], "at_st": ["at", "kd"]}.get(word, [word])
    names = list(dict.fromkeys(find_method(word).name for word in words))
    weights = {name: find_method(name).default_weight for name in names}
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    gamma = None
    for where, layer in options.layers_of_methods:
        found = _checked(where, layer)
        gammas = {}
        for name in names:
            entry = found.get(frozenset([name]), {})
            if "refuse" in entry:
                raise UsageError(entry["refuse"])
            if "gamma" in entry:
                gammas[name] = entry.pop("gamma")
            weights[name] = entry.pop(find_method(name).weight_flag, weights[name])
            chosen[name] |= entry
        together = found.get(frozenset(names), {}) if len(names) > 1 else {}
        if "gamma" in together:
            gamma = together["gamma"]
        elif len(set(gammas.values())) > 1 and options.gamma is None:
            said = ", ".join(f"{name} {value:g}" for name, value in gammas.items())
            raise UsageError(f"{where} gives different gammas ({said}); give --gamma")
        elif gammas:
            gamma = next(iter(gammas.values()))
        if together:
            for name in names:
                weights[name] = together.get(find_method(name).weight_flag, weights[name])
    for dest, value in vars(options).items():
        name, dot, key = dest.partition(".")
        if not dot or value is None:
            continue
        if name in chosen:
            chosen[name][key] = value
        elif dest in options.given:
            raise UsageError(f"--{name}-{key} is given, but method {name} is not used")
    _apply_weight_flags(options, weights)
    if options.gamma is not None:
        gamma = options.gamma
    if gamma is None:
        own = [cls.gamma for cls in map(find_method, names) if cls.gamma is not None]
        gamma = own[0] if own else 1 - weights["kd"] if "kd" in names else 1.0
    if gamma < 0:
        raise UsageError(f"--alpha {weights['kd']} makes gamma negative; give --gamma")
    return Choice(chosen, weights, gamma)


_WEIGHT = Option(1.0, "weight of a term", least=0.0)


def _checked(where: str, layer: dict) -> dict[frozenset, dict]:
    """A file's `methods` by the names they hold for, unused ones checked as well."""
    found = {}
    for key, entry in layer.items():
        try:
            classes = [find_method(part) for part in str(key).split("+")]
        except UsageError as error:
            raise UsageError(f"{where}: methods: {error}") from None
        options: dict[str, Option] = {"gamma": _WEIGHT}
        options |= {cls.weight_flag: _WEIGHT for cls in classes}
        if len(classes) == 1:
            options |= classes[0].options() | {"refuse": Option("", "why it is not served")}
        for option in entry.keys() - options.keys():
            raise unknown(f"option in {where}: methods: {key}:", str(option), options)
        found[frozenset(cls.name for cls in classes)] = {
            option: options[option].checked(f"{where}: methods: {key}: {option}", value)
            for option, value in entry.items()
        }
    return found


def _apply_weight_flags(options: argparse.Namespace, weights: dict[str, float]) -> None:
    betas = [name for name in weights if find_method(name).weight_flag == "beta"]
    if options.alpha is not None:
        if "kd" not in weights:
            raise UsageError("--alpha is the weight of kd, which is not used")
        weights["kd"] = options.alpha
    for text in options.beta or ():
        name, equals, value = text.rpartition("=")
        if not equals and len(betas) != 1:
            names = f"--beta {betas[0]}=... {betas[1]}=..." if betas else "no method with a beta"
            raise UsageError(f"--beta {text} does not say of which method: {names}")
        name = find_method(name).name if equals else betas[0]
        if name not in betas:
            raise UsageError(f"--beta {text}: {name} is not used or has no beta")
        weights[name] = _WEIGHT.checked(f"--beta {text}", value)


@dataclass(frozen=True)
class TapPlan:
    """Which layers of both networks are tapped, and which positions each method reads."""

    student_layers: list[str]
    teacher_layers: list[str]
    views: dict[str, tuple[list[int], list[int]]]


def plan_taps(
    methods: Sequence[Method],
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
) -> TapPlan:
    """Union of the layers that `methods` watch; the two lists override stages, pair by pair."""
    if (student_layers is None) != (teacher_layers is None):
        raise UsageError("--student-layers and --teacher-layers are given together or not at all")
    if student_layers is not None and len(student_layers) != len(teacher_layers):
        raise UsageError(
            f"{len(student_layers)} --student-layers but {len(teacher_layers)} --teacher-layers"
        )
    ours: list[str] = []
    theirs: list[str] = []
    views = {}
    for method in methods:
        pairs = _pairs(method.taps(), student, teacher, student_layers, teacher_layers)
        views[method.name] = (
            [_position(ours, layer) for _, layer in pairs],
            [_position(theirs, layer) for layer, _ in pairs],
        )
    return TapPlan(ours, theirs, views)


def _position(layers: list[str], layer: str) -> int:
    if layer not in layers:
        layers.append(layer)
    return layers.index(layer)


def _pairs(taps: str, student, teacher, student_layers, teacher_layers) -> list[tuple[str, str]]:
    if taps == "none":
        return []
    if taps == "penultimate":
        return [(penultimate(teacher), penultimate(student))]
    if student_layers is not None:
        return list(zip(teacher_layers, student_layers, strict=True))
    pairs = pair_stages(default_stages(teacher), default_stages(student))
    if taps == "stem+stages":
        stems = default_stages(teacher, stem=True)[0], default_stages(student, stem=True)[0]
        pairs = [*([stems] if stems != pairs[0] else []), *pairs]
    return pairs


def _require_maps(method: Method, whose: str, layers: Sequence[str], shapes: Sequence) -> None:
    for layer, shape in zip(layers, shapes, strict=True):
        if len(shape) != 4:
            raise UsageError(
                f"method {method.name} needs feature maps, but {whose} layer {layer} passes "
                f"{list(shape)}; choose a layer before the pooling"
            )


class Objective(nn.Module):
    """Student and methods as one module, so that one wrapper (DDP, compile) holds all that trains.

    `forward(images, labels, teacher_logits, teacher_features)` returns the total (float32 scalar),
    the unweighted terms [len(term_names)] without gradient, and the student's logits [B, C].
    """

    def __init__(
        self,
        student: Taps,
        methods: Sequence[Method] = (),
        weights: dict[str, float] | None = None,
        gamma: float = 1.0,
        views: dict[str, tuple[list[int], list[int]]] | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.student = student
        self.methods = nn.ModuleList(methods)
        self.weights, self.gamma = dict(weights or {}), gamma
        self.views, self.label_smoothing = dict(views or {}), label_smoothing
        self.term_names = ["ce", *(method.name for method in methods)]

    def setup(
        self,
        plan: TapPlan,
        student_shapes: Sequence[torch.Size],
        teacher_shapes: Sequence[torch.Size],
        classes: int,
    ) -> None:
        """Let every method check its pair of networks and create what it trains."""
        for method in self.methods:
            ours, theirs = self.views[method.name]
            pairing = Pairing(
                tuple(plan.student_layers[i] for i in ours),
                tuple(plan.teacher_layers[i] for i in theirs),
                tuple(student_shapes[i] for i in ours),
                tuple(teacher_shapes[i] for i in theirs),
                classes,
            )
            if method.taps() in ("stages", "stem+stages"):
                _require_maps(method, "student", pairing.student_layers, pairing.student_shapes)
                _require_maps(method, "teacher", pairing.teacher_layers, pairing.teacher_shapes)
            method.setup(pairing)

    def forward(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        teacher_logits: torch.Tensor | None = None,
        teacher_features: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, features = self.student(images)
        # Losses accumulate in float32 whatever the networks ran in.
        with torch.autocast(images.device.type, enabled=False):
            logits = logits.float()
            ce = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            total, terms = self.gamma * ce, [ce]
            for method in self.methods:
                ours, theirs = self.views[method.name]
                term = method(
                    Outputs(logits, tuple(features[i] for i in ours)),
                    Outputs(teacher_logits.float(), tuple(teacher_features[i] for i in theirs)),
                    labels,
                )
                total = total + self.weights[method.name] * term
                terms.append(term)
        return total, torch.stack([term.detach().float() for term in terms]), logits.detach()
