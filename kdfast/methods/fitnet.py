"""FitNets: hints from a feature map of the teacher."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.methods.base import Method, Option, Outputs, Pairing, method


@method("fitnet", aliases=("fitnets", "hint"))
class Hints(Method):
    """FitNets' hints: match a feature map of the teacher through a regressor.

    The regressor, a convolution, BN and ReLU, brings the student's map [B, C, H, W] to the shape of
    the teacher's and is trained with the student. Its convolution is chosen for height and width
    apart: 3x3 of stride 2 to half the size, transposed 4x4 of stride 2 to twice the size, and
    without padding, 1 + H_s - H_t wide, to any other size up to the student's own. Where none of
    these serves (the student's map is smaller, but not by half), both maps are average pooled to
    the smaller height and width, and the convolution is 1x1. One stage, beside
    cross-entropy, or with --init-epochs the paper's two: the hint alone, then training without it.
    The stage counts among the pairs of stages; of several named layers the terms are summed.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550; the
    regressors and weight are those of the public code for CRD.
    """

    default_weight = 100.0
    initialises = True
    under_autocast = True
    stage = Option(2, "pair of stages to match: 1 is the shallowest, -1 the last")
    regressor = Option("on", "auto has none where shapes agree, off never", ("on", "off", "auto"))
    formula = "mean_(b,c,x,y) (r(F_s) - F_t)^2"

    def __init__(self, **options: object):
        super().__init__(**options)
        if self.stage == 0:
            raise UsageError("fitnet stage counts from 1, the shallowest, or -1, the last; got 0")

    def taps(self) -> str:
        return "stages"

    def pair(self, teacher: list[str], student: list[str]) -> list[tuple[str, str]]:
        pairs = super().pair(teacher, student)
        if abs(self.stage) > len(pairs):
            raise UsageError(
                f"fitnet stage {self.stage}: student and teacher have {len(pairs)} stages to pair; "
                f"give --fitnet-stage 1 to {len(pairs)}, or -1 for the last"
            )
        return [pairs[self.stage - (self.stage > 0)]]

    def setup(self, pairing: Pairing) -> None:
        self.layers = pairing.student_layers
        self.regressors = nn.ModuleList()
        shapes = zip(pairing.student_shapes, pairing.teacher_shapes, strict=True)
        for i, (student, teacher) in enumerate((ours[1:], theirs[1:]) for ours, theirs in shapes):
            if self.regressor == "on" or (self.regressor == "auto" and student != teacher):
                self.regressors.append(Regressor(student, teacher))
            elif student == teacher:
                self.regressors.append(nn.Identity())
            else:
                raise UsageError(
                    f"method fitnet without a regressor needs equal shapes, but student layer "
                    f"{pairing.student_layers[i]} has {_size(student)} and teacher layer "
                    f"{pairing.teacher_layers[i]} has {_size(teacher)}; use --fitnet-regressor "
                    "auto, or choose --student-layers and --teacher-layers that match"
                )

    def notes(self) -> list[str]:
        return [
            f"{layer} through {regressor.describe()}"
            if isinstance(regressor, Regressor)
            else f"{layer} as it is"
            for layer, regressor in zip(self.layers, self.regressors, strict=True)
        ]

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        dtype = student.logits.dtype
        terms = []
        for regressor, ours, hint in zip(
            self.regressors, student.features, teacher.features, strict=True
        ):
            answer = regressor(ours).to(dtype)
            hint = hint.to(dtype)
            if hint.shape != answer.shape:
                hint = F.adaptive_avg_pool2d(hint, answer.shape[2:])
            terms.append(F.mse_loss(answer, hint))
        return torch.stack(terms).sum()


class Regressor(nn.Sequential):
    """Maps [B, *student] to [B, *teacher], or to what `pooled` both come to; shapes are C, H, W.

    Convolution with bias, BN, ReLU; see `Hints` for the choice.
    """

    def __init__(self, student: torch.Size, teacher: torch.Size):
        super().__init__()
        self.shapes = student, teacher
        size = tuple(map(min, student[1:], teacher[1:]))
        convolution = _published(student, teacher)
        self.pooled = convolution is None
        if self.pooled:
            convolution = nn.Conv2d(student[0], teacher[0], 1)
            if size != tuple(student[1:]):
                self.append(nn.AdaptiveAvgPool2d(size))
        self.extend([convolution, nn.BatchNorm2d(teacher[0]), nn.ReLU(inplace=True)])

    def describe(self) -> str:
        """Its convolution, shapes and number of parameters."""
        convolution = next(m for m in self if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))
        words = ["transposed"] if convolution.transposed else []
        words += [_size(convolution.kernel_size), "convolution"]
        if convolution.stride != (1, 1):
            down, across = convolution.stride
            words += ["of stride", str(down) if down == across else _size((down, across))]
        if self.pooled:
            words += ["on maps pooled to", _size(map(min, *(shape[1:] for shape in self.shapes)))]
        student, teacher = map(_size, self.shapes)
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{' '.join(words)}, {student} -> {teacher}, {count:,} parameters"


def _published(student: torch.Size, teacher: torch.Size) -> nn.Module | None:
    """The convolution from [C, H, W] to [C', H', W'] by the published rule, None beyond it."""
    sizes = list(zip(student[1:], teacher[1:], strict=True))
    doubling = any(2 * ours == theirs for ours, theirs in sizes)
    steps = []  # kernel size, stride and padding of each dimension
    for ours, theirs in sizes:
        if 2 * ours == theirs:
            steps.append((4, 2, 1))
        elif ours == 2 * theirs and not doubling:
            steps.append((3, 2, 1))
        elif ours == theirs or (ours > theirs and not doubling):
            steps.append((1 + ours - theirs, 1, 0))
        else:
            return None
    kind = nn.ConvTranspose2d if doubling else nn.Conv2d
    return kind(student[0], teacher[0], *zip(*steps, strict=True))


def _size(numbers: Iterable[int]) -> str:
    return "x".join(map(str, numbers))
