"""The total loss: gamma * cross-entropy + the sum over methods of weight * term."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.errors import UsageError, unknown
from kdfast.methods import (
    Method,
    Option,
    Outputs,
    Pairing,
    expand,
    find_method,
    method_names,
)
from kdfast.models import Taps, default_stages, default_tap, input_size, penultimate
from kdfast.models.pruning import WeightMasks
from kdfast.seeding import derive_seed, local_randomness
from kdfast.training.evaluate import hits
from kdfast.training.staging import choose_init, read_init


@dataclass
class Choice:
    """The methods of a run with their options and weights, and the weight of cross-entropy.

    `init` are the settings of a first stage, as a method's `init` in a recipe has them; the run is
    of one stage where its `epochs` are 0 or missing.
    """

    methods: dict[str, dict[str, Any]]
    weights: dict[str, float]
    gamma: float
    init: dict[str, Any] = field(default_factory=dict)

    @property
    def staged(self) -> bool:
        """Whether some methods have a stage of their own before the main one."""
        return bool(self.init.get("epochs"))

    def first_stage(self) -> Choice:
        """The methods that train first, without cross-entropy."""
        return self._of(True, gamma=0.0)

    def main_stage(self) -> Choice:
        """All that a run of one stage has; else what remains after the first."""
        return replace(self, init={}) if not self.staged else self._of(False, gamma=self.gamma)

    def _of(self, first: bool, gamma: float) -> Choice:
        methods = {n: o for n, o in self.methods.items() if find_method(n).initialises == first}
        return Choice(methods, self.weights, gamma)

    def as_yaml(self) -> dict[str, Any]:
        """The `method`, `methods` and `gamma` keys that give this choice again."""
        named = {
            name: {find_method(name).weight_flag: self.weights[name], **options}
            for name, options in self.methods.items()
        }
        for name in named if self.init else ():
            if find_method(name).initialises:
                named[name]["init"] = self.init
        return {"method": list(named) or ["none"], "methods": named, "gamma": self.gamma}


def choose_methods(options: argparse.Namespace) -> Choice:
    """Resolve methods, options and weights: class defaults, recipe, config, then flags.

    In a file's `methods`, a key `at+kd` holds for exactly that combination and may give `alpha`,
    `beta`, `gamma`; a single method's gamma holds in combinations too. `init` are the settings of a
    method's first stage; methods that have one do not bear on the gamma of the main stage.
    """
    names = list(dict.fromkeys(name for word in options.method or () for name in expand(word)))
    weights = {name: find_method(name).default_weight for name in names}
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    gamma = None
    layers = [(where, *_checked(where, layer)) for where, layer in options.layers_of_methods]
    init = choose_init(options, names, [(where, inits) for where, _, inits in layers])
    main = [name for name in names if not (init.get("epochs") and find_method(name).initialises)]
    for where, found, _ in layers:
        gammas = {}
        for name in names:
            entry = found.get(frozenset([name]), {})
            own_gamma = entry.pop("gamma", None)
            if own_gamma is not None and name in main:
                gammas[name] = own_gamma
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
        if dest.startswith("method:") and value is not None:
            flag = [tuple(use.split(".")) for use in dest.removeprefix("method:").split(",")]
            used = [(name, key) for name, key in flag if name in chosen]
            for name, key in used:
                chosen[name][key] = value
            if not used and dest in options.given:
                name, key = flag[0]
                said = find_method(name).options()[key].flag_of(name, key)
                methods = " or ".join(name for name, _ in flag)
                raise UsageError(f"{said} is given, but method {methods} is not used")
    _apply_weight_flags(options, weights, chosen)
    if options.gamma is not None:
        gamma = options.gamma
    if gamma is None:
        own = {name: cls.gamma for name in main if (cls := find_method(name)).gamma is not None}
        if len(set(own.values())) > 1:
            said = ", ".join(f"{name} {value:g}" for name, value in own.items())
            raise UsageError(f"methods of different gammas ({said}); give --gamma")
        gamma = next(iter(own.values())) if own else 1 - weights["kd"] if "kd" in names else 1.0
    if gamma < 0:
        raise UsageError(f"--alpha {weights['kd']} makes gamma negative; give --gamma")
    return Choice(chosen, weights, gamma, init)


_WEIGHT = Option(1.0, "weight of a term", least=0.0)


def _checked(where: str, layer: dict) -> tuple[dict[frozenset, dict], dict[str, dict]]:
    """A file's `methods` by the names they hold for, and their `init` by name; all are checked."""
    found, inits = {}, {}
    for key, entry in layer.items():
        try:
            classes = [find_method(part) for part in str(key).split("+")]
        except UsageError as error:
            raise UsageError(f"{where}: methods: {error}") from None
        options: dict[str, Option] = {"gamma": _WEIGHT}
        options |= {cls.weight_flag: _WEIGHT for cls in classes}
        if len(classes) == 1:
            options |= classes[0].options()
            if classes[0].initialises and "init" in entry:
                own, entry = entry["init"], {k: v for k, v in entry.items() if k != "init"}
                inits[classes[0].name] = read_init(f"{where}: methods: {key}", own)
        for option in entry.keys() - options.keys():
            raise unknown(f"option in {where}: methods: {key}:", str(option), options)
        found[frozenset(cls.name for cls in classes)] = {
            option: options[option].checked(f"{where}: methods: {key}: {option}", value)
            for option, value in entry.items()
        }
    return found, inits


def _apply_weight_flags(
    options: argparse.Namespace, weights: dict[str, float], chosen: dict[str, dict[str, Any]]
) -> None:
    betas = [name for name in weights if find_method(name).weight_flag == "beta"]
    if options.alpha is not None:
        takers = [
            (name, key)
            for name in weights
            for key, option in find_method(name).options().items()
            if option.flag == "--alpha"
        ]
        if "kd" not in weights and not takers:
            takers = [
                name
                for name in method_names()
                if any(option.flag == "--alpha" for option in find_method(name).options().values())
            ]
            raise UsageError(f"--alpha is of {', '.join(['kd', *takers])}; none of them is used")
        if "kd" in weights:
            weights["kd"] = options.alpha
        for name, key in takers:
            chosen[name][key] = options.alpha
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
    """Which layers of both networks are tapped, and which positions each method reads.

    `head_positions` are those of `teacher_layers` that the teacher's heads are mounted on.
    """

    student_layers: list[str]
    teacher_layers: list[str]
    views: dict[str, tuple[list[int], list[int]]]
    head_positions: list[int]


def plan_taps(
    methods: Sequence[Method],
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    head_layers: Sequence[str] = (),
) -> TapPlan:
    """Union of the layers that `methods` watch; the two lists override stages, pair by pair.

    `head_layers` are the layers of the teacher that its heads are mounted on. Where all `methods`
    match a layer as it is, one list holds for both networks.
    """
    if methods and all(method.taps() == "layer" for method in methods):
        student_layers = student_layers or teacher_layers
        teacher_layers = teacher_layers or student_layers
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
        mounted = list(head_layers) if method.heads else None
        pairs = _pairs(method, student, teacher, student_layers, teacher_layers, mounted)
        views[method.name] = (
            [_position(ours, layer) for _, layer in pairs],
            [_position(theirs, layer) for layer, _ in pairs],
        )
    return TapPlan(ours, theirs, views, [_position(theirs, layer) for layer in head_layers])


def _position(layers: list[str], layer: str) -> int:
    if layer not in layers:
        layers.append(layer)
    return layers.index(layer)


def _pairs(
    method: Method, student, teacher, student_layers, teacher_layers, mounted
) -> list[tuple[str, str]]:
    taps = method.taps()
    last = [(penultimate(teacher), penultimate(student))] if "penultimate" in taps else []
    if "stages" not in taps and "layer" not in taps:
        return last
    if student_layers is not None:
        return [*zip(teacher_layers, student_layers, strict=True), *last]
    if "layer" in taps:
        return [(_default_tap(teacher), _default_tap(student)), *last]
    theirs = default_stages(teacher)
    if mounted:
        # A head takes the place of its layer: the networks' last stages remain partners.
        theirs = mounted if theirs[-1] in mounted else [*mounted, theirs[-1]]
    pairs = method.pair(theirs, default_stages(student))
    if taps == "stem+stages":
        stems = default_stages(teacher, stem=True)[0], default_stages(student, stem=True)[0]
        pairs = [*([stems] if stems != pairs[0] else []), *pairs]
    return [*pairs, *last]


def _default_tap(model: nn.Module) -> str:
    try:
        return default_tap(model, input_size(model)[1:])
    except UsageError:
        raise UsageError(
            f"{type(model).__name__} does not list its stages; name the layer to match with "
            "--student-layers and --teacher-layers"
        ) from None


def _require_maps(method: Method, whose: str, layers: Sequence[str], shapes: Sequence) -> None:
    for layer, shape in zip(layers, shapes, strict=False):
        if len(shape) != 4:
            raise UsageError(
                f"method {method.name} needs feature maps, but {whose} layer {layer} passes "
                f"{list(shape)}; choose a layer before the pooling"
            )


class Trained(nn.Module):
    """What the loop trains: `student`, a loss with terms `term_names`, and all that has weights.

    `forward` takes images, labels, what a teacher answers, and `indices`; it returns the total, the
    terms without gradient, and logits.
    """

    student: nn.Module
    term_names: list[str]
    moves_weights = False  # whether `after_step` changes weights of the student

    def start_epoch(self, epoch: int) -> None:
        """Called before every 0-based epoch, and before what is left of one that is resumed."""

    def after_step(self) -> None:
        """Called after every optimizer step, on all processes."""

    def gauges(self) -> dict[str, float]:
        """Numbers of the epoch at hand for the summary, by column."""
        return {}


class Objective(Trained):
    """Student and methods as one module, so that one wrapper (DDP, compile) holds all that trains.

    `forward(images, labels, teacher_logits, teacher_features, teacher_heads, indices)` returns the
    total (float32 scalar), the unweighted terms [len(term_names)] without gradient, and the
    student's logits [B, C]. With `accuracy`, top-1 and top-5 of the training images in percent are
    terms of no weight. What `masks` prune of the student is zero after every optimizer step.
    """

    def __init__(
        self,
        student: Taps,
        methods: Sequence[Method] = (),
        weights: dict[str, float] | None = None,
        gamma: float = 1.0,
        views: dict[str, tuple[list[int], list[int]]] | None = None,
        label_smoothing: float = 0.0,
        accuracy: bool = False,
        masks: WeightMasks | None = None,
    ):
        super().__init__()
        self.accuracy = accuracy
        self.student, self.learns_labels, self.masks = student, True, masks
        self.moves_weights = masks is not None
        self.methods = nn.ModuleList(methods)
        self.weights, self.gamma = dict(weights or {}), gamma
        self.views, self.label_smoothing = dict(views or {}), label_smoothing
        self.term_names = ["ce", *(method.name for method in methods)]
        self.term_names += ["top1", "top5"] * accuracy

    def setup(
        self,
        plan: TapPlan,
        student_shapes: Sequence[torch.Size],
        teacher_shapes: Sequence[torch.Size],
        classes: int,
        *,
        seed: int = 0,
        **run: Any,
    ) -> None:
        """Let every method check its pair of networks and create what it trains.

        `run` are further fields of `Pairing`. A method's weights depend on (seed, name) alone.
        """
        for method in self.methods:
            ours, theirs = self.views[method.name]
            pairing = Pairing(
                tuple(plan.student_layers[i] for i in ours),
                tuple(plan.teacher_layers[i] for i in theirs),
                tuple(student_shapes[i] for i in ours),
                tuple(teacher_shapes[i] for i in theirs),
                classes,
                seed=seed,
                label_smoothing=self.label_smoothing,
                **run,
            )
            if "stages" in method.taps():
                count = len(pairing.student_layers) - ("penultimate" in method.taps())
                for whose in ("student", "teacher"):
                    layers = getattr(pairing, f"{whose}_layers")[:count]
                    _require_maps(method, whose, layers, getattr(pairing, f"{whose}_shapes"))
            with local_randomness(derive_seed(seed, "method", method.name)):
                method.setup(pairing)

    def start_epoch(self, epoch: int) -> None:
        for method in self.methods:
            method.start_epoch(epoch)

    def gauges(self) -> dict[str, float]:
        return {
            f"{method.name}_{key}": value
            for method in self.methods
            for key, value in method.gauges().items()
        }

    def after_step(self) -> None:
        for method in self.methods:
            method.after_step()
        if self.masks is not None:
            self.masks.apply_to(self.student.model)

    def forward(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        teacher_logits: torch.Tensor | None = None,
        teacher_features: tuple[torch.Tensor, ...] = (),
        teacher_heads: tuple[tuple[torch.Tensor, torch.Tensor], ...] = (),
        indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, features = self.student(images)
        mixed = torch.is_autocast_enabled(images.device.type)
        # Losses accumulate in float32 whatever the networks ran in.
        with torch.autocast(images.device.type, enabled=False):
            logits = logits.float()
            ce = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            if not self.learns_labels:
                ce = ce.detach()
            total, terms = self.gamma * ce, [ce]
            for method in self.methods:
                ours, theirs = self.views[method.name]
                student = Outputs(logits, tuple(features[i] for i in ours), indices)
                taught = tuple(teacher_features[i] for i in theirs)
                teacher = Outputs(teacher_logits.float(), taught, indices, teacher_heads)
                with torch.autocast(images.device.type, enabled=mixed and method.under_autocast):
                    term = method(student, teacher, labels)
                total = total + self.weights[method.name] * term
                terms.append(term)
            if self.accuracy:
                ranked = hits(logits.detach(), labels).float()
                terms += [100 * ranked[:, 0].mean(), 100 * ranked.sum(1).mean()]
        return total, torch.stack([term.detach().float() for term in terms]), logits.detach()
