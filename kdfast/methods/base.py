"""What a distillation method is: a loss term between a student's and a teacher's outputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from kdfast.errors import UsageError, unknown
from kdfast.models.stages import pair_stages


@dataclass(frozen=True)
class Option:
    """A number or word of a method that the user may set: flag, help and recipe key come from it.

    The default () stands for a list of numbers. `flag` defaults to `--METHOD-NAME`; one flag of
    several methods sets all of them that are used. `positive` refuses values up to 0, `least` those
    below it. `kind` is the type of an option whose default is None: unset, which its help explains.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    flag: str | None = None
    positive: bool = False
    least: float | None = None
    kind: type | None = None

    def flag_of(self, method: str, key: str) -> str:
        """Its flag as option `key` of `method`."""
        return self.flag or f"--{method}-{key}".replace("_", "-")

    def shown(self, form: str) -> str:
        """The default in the place of {} in `form`; empty where there is none."""
        return "" if self.default in (None, ()) else form.format(self.default)

    def checked(self, what: str, value: Any) -> Any:
        """`value` in the option's type; raises `UsageError` about `what` when it cannot be."""
        if value is None and self.default is None:
            return None
        kind = self.kind or type(self.default)
        if self.choices:
            if isinstance(value, bool):  # YAML's reading of on and off
                value = "on" if value else "off"
            if value not in self.choices:
                raise unknown(f"value of {what}", str(value), self.choices)
            return value
        if isinstance(self.default, tuple):
            if not isinstance(value, list | tuple):
                raise UsageError(f"{what} must be a list of numbers, got {value!r}")
            return [replace(self, default=0.0).checked(what, item) for item in value]
        if kind is bool and not isinstance(value, bool):
            raise UsageError(f"{what} must be true or false, got {value!r}")
        if kind not in (int, float):
            return value
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"{what} must be a number, got {value!r}") from None
        if not math.isfinite(number) or isinstance(value, bool):
            raise UsageError(f"{what} must be a finite number, got {value!r}")
        if isinstance(value, float) and number != value:
            raise UsageError(f"{what} must be a whole number, got {value!r}")
        if self.positive and number <= 0:
            raise UsageError(f"{what} must be above 0, got {value}")
        if self.least is not None and number < self.least:
            raise UsageError(f"{what} must be {self.least:g} or more, got {value}")
        return number


@dataclass(frozen=True)
class Outputs:
    """One network's answer to a batch of B images.

    `logits` [B, C]; `features` the tapped layers the method asked for, shallow to deep; `indices`
    [B] int64, the data set indices of the images; `heads`, of a teacher with auxiliary classifiers,
    the (feature [B, d], logits [B, C]) of each.
    """

    logits: torch.Tensor
    features: tuple[torch.Tensor, ...] = ()
    indices: torch.Tensor | None = None
    heads: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


@dataclass(frozen=True)
class Pairing:
    """What a method may know before training: tapped layers, their shapes, the classes, the run.

    Shapes include the batch dimension. Layer i of the student is paired with layer i of the
    teacher. `head_layers` are the teacher's layers that its auxiliary classifiers are mounted on,
    in the order of `Outputs.heads`, and `head_widths` the d of their features. `training_labels()`
    gives the class of every training image in the order of their indices. `label_smoothing` is that
    of the objective's cross-entropy, and of any that a method adds. `step_images` is how many
    images a process has in an optimizer step at most, the same on all, None where nobody knows.
    """

    student_layers: tuple[str, ...]
    teacher_layers: tuple[str, ...]
    student_shapes: tuple[torch.Size, ...]
    teacher_shapes: tuple[torch.Size, ...]
    classes: int
    head_layers: tuple[str, ...] = ()
    head_widths: tuple[int, ...] = ()
    training_labels: Callable[[], Sequence[int]] = list
    epochs: int = 1
    seed: int = 0
    label_smoothing: float = 0.0
    step_images: int | None = None


class Method(nn.Module):
    """Base of all methods; subclasses are decorated with `@method` and define `forward`.

    Class attributes:
        weight_flag: `alpha` or `beta`, the flag that holds the term's weight.
        default_weight: that weight when neither flag nor recipe gives one.
        gamma: weight of cross-entropy when this method is used and nobody gives one; None leaves
            the general rule (1, or 1 - alpha beside `kd`).
        heads: the kind of auxiliary classifiers the teacher must have, or None.
        head_features: whether `forward` reads the features of these, or their logits alone.
        initialises: whether the term can train the layers it reaches alone, in a first stage before
            a main one without it (`--init-epochs`).
        needs_rate: whether no learning rate fits all layers, so that one must be asked for.
        under_autocast: whether `forward` runs networks of its own, which may take the precision of
            the others; it must then bring what it compares to float32.
        formula: the term as docs/methods.md shows it; optional.
        equivalences: the same term in the conventions of other code, by a short id; optional.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    weight_flag: ClassVar[str] = "beta"
    default_weight: ClassVar[float] = 1.0
    gamma: ClassVar[float | None] = None
    heads: ClassVar[str | None] = None
    head_features: ClassVar[bool] = True
    initialises: ClassVar[bool] = False
    needs_rate: ClassVar[bool] = False
    under_autocast: ClassVar[bool] = False
    formula: ClassVar[str] = ""
    equivalences: ClassVar[dict[str, str]] = {}

    def __init__(self, **options: Any):
        super().__init__()
        for key, option in self.options().items():
            value = options.pop(key, option.default)
            setattr(self, key, option.checked(f"{self.name} {key}", value))
        if options:
            raise unknown(f"option of method {self.name}", next(iter(options)), self.options())

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The class's `Option` attributes by name."""
        found = {}
        for owner in reversed(cls.__mro__):
            found |= {k: v for k, v in vars(owner).items() if isinstance(v, Option)}
        return found

    def taps(self) -> str:
        """Which layers the method watches.

        `none`, `layer` (one, before its activation), `stages`, `stem+stages`, `penultimate` or
        `stages+penultimate`. Where `heads` are
        asked for, the stages of the teacher are those that its heads are mounted on, and its last.
        """
        return "none"

    def pair(self, teacher: list[str], student: list[str]) -> list[tuple[str, str]]:
        """The (teacher stage, student stage) pairs that the method compares, of all stages.

        Not asked where the user named the layers.
        """
        return pair_stages(teacher, student)

    def setup(self, pairing: Pairing) -> None:
        """Check that the method applies to this pair and create what it trains.

        Weights are drawn from torch's generator, which is seeded for this method alone. Raises
        `UsageError`, with the reason and an alternative, when the method does not apply.
        """

    def notes(self) -> list[str]:
        """What `setup` chose and the user should know before training, a line each."""
        return []

    def start_epoch(self, epoch: int) -> None:
        """Called before every 0-based epoch, and before what is left of one that is resumed.

        State set here is a function of the epoch; what must survive beyond it is a buffer.
        """

    def gauges(self) -> dict[str, float]:
        """Numbers of the epoch at hand for the summary, such as a scheduled weight, by name.

        Each is a column, the method's name before its own: `born_again_lambda`.
        """
        return {}

    def after_step(self) -> None:
        """Called after every optimizer step, on all processes."""

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        """The term: a float32 scalar, mean over the batch. Runs outside autocast."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


_METHODS: dict[str, type[Method]] = {}


def method(name: str, *, aliases: tuple[str, ...] = ()):
    """Class decorator that makes a `Method` known under `name` to flags, recipes and tests."""

    def register(cls: type[Method]) -> type[Method]:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise TypeError(f"@method('{name}') needs a subclass of kdfast.methods.Method")
        if not cls.__doc__:
            raise TypeError(f"method '{name}' needs a docstring: its first line is the help text")
        for key in (name, *aliases):
            if key in _METHODS and _METHODS[key].__qualname__ != cls.__qualname__:
                raise UsageError(f"two methods are called '{key}'")
        cls.name, cls.aliases = name, aliases
        for key in (name, *aliases):
            _METHODS[key] = cls
        return cls

    return register


def method_names() -> list[str]:
    """The registered names without aliases."""
    return sorted({cls.name for cls in _METHODS.values()})


def find_method(name: str) -> type[Method]:
    """The class registered under `name` or an alias; raises `UsageError` with the closest."""
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    return _METHODS[name]


def expand(word: str) -> list[str]:
    """The names of the methods that a word of `--method` stands for; none for `none`, `base`."""
    words = {"none": [], "base": [], "at_st": ["at", "kd"]}.get(word, [word])
    return [find_method(word).name for word in words]


def methods_table() -> str:
    """All methods as a Markdown table: name, term, formula, default weight, options, source."""
    rows = [
        "| method | what it does | term | weight | options | source |",
        "|---|---|---|---|---|---|",
    ]
    for name in method_names():
        cls = find_method(name)
        text = inspect.cleandoc(cls.__doc__)
        source = " ".join(text.partition("Source:")[2].split()) or "-"
        flags = [
            f"`{o.flag_of(name, key)}` {o.help}{o.shown(' ({})')}"
            for key, o in cls.options().items()
        ]
        names = ", ".join(f"`{word}`" for word in (name, *cls.aliases))
        weight = f"{cls.weight_flag} {cls.default_weight:g}"
        formula = f"`{cls.formula}`" if cls.formula else "-"
        cells = (names, text.splitlines()[0], formula, weight, "; ".join(flags) or "-", source)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"
