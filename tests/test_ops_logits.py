"""soft_target_loss, distillation_loss, cohort_loss: hand values, the float64 twin, extremes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from cases import DEVICES, TOLERANCE, Calls, as_double, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kdfast import ops
from kdfast.ops import reference

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def fused():
    """The fused path or an error: a missing library must not pass as the twin."""
    with ops.use("fused"):
        yield


@dataclass(frozen=True)
class Rows:
    """Logits of a student and a teacher; `members` of None is one teacher without its dimension."""

    n: int
    c: int
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None
    temperature: float = 4.0
    members: int | None = None
    scale: float = 2.0
    layout: str = "dense"

    def __str__(self) -> str:
        words = [f"{self.n}x{self.c}", str(self.dtype).removeprefix("torch.")]
        if self.teacher_dtype:
            words.append(str(self.teacher_dtype).removeprefix("torch."))
        if self.members:
            words.append(f"{self.members}members")
        return "-".join([*words, f"T{self.temperature:g}", f"x{self.scale:g}", self.layout])

    def make(self, device: str = "cpu", seed: int = 0) -> tuple:
        """(student, teacher, labels); both logits require gradients."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.n, self.c)
        student = torch.randn(shape, generator=generator, dtype=torch.float64) * self.scale
        many = shape if self.members is None else (self.members, *shape)
        teacher = torch.randn(many, generator=generator, dtype=torch.float64) * self.scale
        labels = torch.randint(self.c, (self.n,), generator=generator)
        student = student.to(device, self.dtype)
        teacher = teacher.to(device, self.teacher_dtype or self.dtype)
        if self.layout == "transposed":
            student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
        elif self.layout == "sliced":
            student, teacher = (torch.cat([x, x], -1)[..., : self.c] for x in (student, teacher))
        elif self.layout == "unaligned":
            student, teacher = (
                torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
                for x in (student, teacher)
            )
        student, teacher = (x.detach().requires_grad_() for x in (student, teacher))
        return student, teacher, labels.to(device)


SIZES = [(1, 1), (1, 7), (3, 10), (2, 16), (5, 33), (64, 100), (3, 257), (2, 1000), (2, 4101)]
CASES = [
    *(Rows(n, c) for n, c in SIZES),
    *(Rows(n, c, torch.float64, temperature=5) for n, c in SIZES),
    *(
        Rows(n, c, dtype)
        for dtype in (torch.float16, torch.bfloat16)
        for n, c in ((1, 7), (3, 10), (2, 1000), (2, 4104))
    ),
    Rows(2, 21841),
    *(Rows(3, 10, temperature=t) for t in (1, 2, 3, 5, 2.5, 0.5, 20)),
    *(Rows(3, 300, temperature=t) for t in (1, 2, 3, 5, 2.5, 0.5, 20)),
    *(Rows(4, 12, layout=layout) for layout in ("transposed", "sliced", "unaligned")),
    *(Rows(3, 11, scale=scale) for scale in (1e4, 0.3, 30)),
    Rows(3, 9, torch.float16, torch.bfloat16),
    Rows(3, 9, torch.float32, torch.bfloat16),
    Rows(3, 9, torch.float32, torch.float64),
]
COHORTS = [
    Rows(3, 10, members=4, temperature=5),
    Rows(1, 7, members=1),
    Rows(2, 1000, members=3),
    Rows(2, 33, torch.float64, members=5),
    Rows(2, 33, torch.bfloat16, members=2),
    Rows(2, 33, torch.float16, torch.float32, members=2),
    Rows(2, 4100, torch.float16, members=2, layout="sliced"),
]


def soft(module):
    return lambda s, t, y, case: module.soft_target_loss(s, t, case.temperature)


def mixed(module):
    return lambda s, t, y, case: module.distillation_loss(s, t, y, 0.7, case.temperature)


def smoothed(module):
    return lambda s, t, y, case: module.distillation_loss(
        s, t, y, 0.9, case.temperature, 1.5, label_smoothing=0.1
    )


def probabilities(module):
    def loss(s, t, y, case):
        y = torch.nn.functional.one_hot(y, case.c).double() * 0.7 + 0.3 / case.c
        return module.distillation_loss(s, t, y, 0.4, case.temperature, label_smoothing=0.2)

    return loss


def cohort(module):
    def loss(s, t, y, case):
        alpha = [0.1 + 0.2 * j for j in range(case.members)]
        return module.cohort_loss(s, t, y, alpha, case.temperature)

    return loss


def cohort_mean(module):
    return lambda s, t, y, case: module.cohort_loss(s, t, y, 0.3, case.temperature, "mean")


def compare(form, case: Rows, device: str) -> None:
    student, teacher, labels = case.make(device)
    exact = as_double(student, teacher)
    got = form(ops)(student, teacher, labels, case)
    want = form(reference)(*exact, labels, case)
    any_double = torch.float64 in (student.dtype, teacher.dtype)
    value = TOLERANCE[torch.float64 if any_double else torch.float32][0]
    assert got.dtype == (torch.float64 if any_double else torch.float32)
    assert error(got, want) <= value or abs(got - want) < 1e-15
    # The gradient of the sum over rows: half gradients are then not subnormal.
    ours = torch.autograd.grad(got * case.n, (student, teacher))
    theirs = torch.autograd.grad(want * case.n, exact)
    for gradient, wanted, logits in zip(ours, theirs, (student, teacher), strict=True):
        assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
        if wanted.abs().max() > 1e-12:
            assert error(gradient, wanted) <= TOLERANCE[logits.dtype][1]
        else:
            assert gradient.abs().max() < 1e-6


@devices
@pytest.mark.parametrize("form", [soft, mixed, smoothed, probabilities])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_double_twin(case, form, device):
    compare(form, case, device)


@devices
@pytest.mark.parametrize("form", [cohort, cohort_mean])
@pytest.mark.parametrize("case", COHORTS, ids=str)
def test_cohort_matches_double_twin(case, form, device):
    compare(form, case, device)


def logits(values, device="cpu", dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, device=device)


LN3 = math.log(3)


@devices
@both_paths
def test_soft_targets_by_hand(path, device):
    """Check 1 of distillation_losses.md."""
    student = logits([[0, 0]], device).requires_grad_()
    with ops.use(path):
        loss = ops.soft_target_loss(student, logits([[4 * LN3, 0]], device), 4.0)
        assert loss.item() / 16 == pytest.approx(0.130812, abs=5e-7)
        assert loss.item() == pytest.approx(2.092993, abs=1e-5)
        gradient = torch.autograd.grad(loss, student)[0]
        torch.testing.assert_close(gradient.cpu(), logits([[-1, 1]]), atol=1e-12, rtol=0)
        z = torch.randn(3, 5, device=device)
        assert ops.soft_target_loss(z, z, 4.0).abs() < 1e-12
        assert ops.soft_target_loss(z, z.round() + 7, 4.0).item() == pytest.approx(
            ops.soft_target_loss(z, z.round(), 4.0).item(), rel=1e-6
        )


@devices
@both_paths
def test_mix_by_hand(path, device):
    """Check 2 of distillation_losses.md, check 1 of intermediate_heads.md."""
    student, teacher = logits([[0, 0]], device), logits([[5 * LN3, 0]], device)
    label = torch.tensor([0], device=device)
    with ops.use(path):
        loss = ops.distillation_loss(student, teacher, label, 0.1, 5.0)
        assert loss.item() == pytest.approx(0.950863, abs=1e-6)
        alone = ops.cohort_loss(student, teacher[None], label, 0.1, 5.0)
        assert alone.item() == pytest.approx(loss.item(), rel=1e-12)


@devices
@both_paths
def test_cohort_by_hand(path, device):
    """Check 2 of intermediate_heads.md."""
    student = logits([[0, 0]], device).requires_grad_()
    members = logits([[[5 * LN3, 0]], [[0, 0]], [[0, 0]], [[0, 0]]], device)
    label = torch.tensor([0], device=device)
    with ops.use(path):
        total = ops.cohort_loss(student, members, label, 0.1, 5.0)
        assert total.item() == pytest.approx(2.822360, abs=2e-6)
        mean = ops.cohort_loss(student, members, label, 0.1, 5.0, reduction="mean")
        assert mean.item() == pytest.approx(0.705590, abs=1e-6)
        gradient = torch.autograd.grad(total, student)[0].cpu()
        torch.testing.assert_close(gradient, logits([[-1.925, 1.925]]), atol=1e-12, rtol=0)


@devices
@both_paths
def test_cohort_identity(path, device):
    """Check 3 of intermediate_heads.md."""
    by_hand = logits([[[5 * LN3, 0]], [[0, 0]], [[0, 0]], [[0, 0]]], device)
    mean = (by_hand / 5).softmax(2).mean(0)
    torch.testing.assert_close(mean.cpu(), logits([[0.5625, 0.4375]]))
    with ops.use(path):

        def kl(teacher, student):
            return ops.soft_target_loss(student, teacher, 5.0).item() / 25

        zero, against = logits([[0, 0]], device), 5 * mean.log()
        parts = [kl(member, against) for member in by_hand]
        assert kl(against, zero) == pytest.approx(0.0078330, abs=5e-8)
        assert parts == pytest.approx([0.075858, 0.0078742, 0.0078742, 0.0078742], abs=5e-7)
        assert 4 * kl(against, zero) + sum(parts) == pytest.approx(0.130812, abs=5e-7)

        student, members, labels = Rows(5, 7, torch.float64, members=4).make(device)
        alpha, temperature = 0.3, 5.0
        mean = temperature * (members / temperature).softmax(2).mean(0).log()
        gradients = [
            torch.autograd.grad(loss, student)[0]
            for loss in (
                ops.cohort_loss(student, members, labels, alpha, temperature),
                4 * ops.distillation_loss(student, mean.detach(), labels, alpha, temperature),
                ops.cohort_loss(student, members.flip(0), labels, alpha, temperature),
            )
        ]
        for other in gradients[1:]:
            torch.testing.assert_close(other, gradients[0], atol=1e-12, rtol=0)
        few = ops.cohort_loss(student, members[[0, 2, 3]], labels, [0.1, 0.3, 0.4], temperature)
        removed = ops.cohort_loss(student, members, labels, [0.1, 0, 0.3, 0.4], temperature)
        assert few.item() == pytest.approx(removed.item(), rel=1e-14)
        few = ops.cohort_loss(student, members[1:], labels, 0.1, temperature, "mean")
        alphas = torch.tensor([0, 0.1, 0.1, 0.1], dtype=torch.float64)
        removed = ops.cohort_loss(student, members, labels, alphas, temperature, "mean")
        assert few.item() == pytest.approx(removed.item(), rel=1e-14)
        assert not torch.autograd.grad(removed, members)[0][0].any()


@devices
@both_paths
def test_identical_cohort(path, device):
    """Check 4 of intermediate_heads.md."""
    student, teacher, labels = Rows(5, 7, torch.float64).make(device)
    with ops.use(path):
        members = torch.stack([teacher] * 4)
        total = ops.cohort_loss(student, members, labels, 0.2, 3.0)
        once = ops.distillation_loss(student, teacher, labels, 0.2, 3.0)
        assert total.item() == pytest.approx(4 * once.item(), rel=1e-12)
        own = ops.cohort_loss(student, torch.stack([student] * 4), labels, 0.2, 3.0)
        assert own.item() == pytest.approx(4 * 0.8 * F.cross_entropy(student, labels).item())


@devices
def test_equals_what_torch_computes(device):
    student, teacher, labels = Rows(6, 9, torch.float64).make(device)
    log_s, log_t = (F.log_softmax(x / 3, 1) for x in (student, teacher))
    soft = 9 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    mixed = F.softmax(torch.randn(6, 9, device=device, dtype=torch.float64), 1)
    for y in (labels, mixed):
        want = 0.4 * F.cross_entropy(student, y, label_smoothing=0.1) + 0.6 * soft
        got = ops.distillation_loss(student, teacher, y, 0.6, 3.0, label_smoothing=0.1)
        torch.testing.assert_close(got, want)
        pairs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (got, want))
        torch.testing.assert_close(*pairs)


@devices
@both_paths
def test_a_weight_of_zero_leaves_the_term_out(path, device):
    student, teacher, labels = Rows(3, 5).make(device)
    broken = torch.full_like(teacher, NAN)
    with ops.use(path):
        hard = ops.distillation_loss(student, broken, labels, 0.0, 4.0)
        torch.testing.assert_close(hard, F.cross_entropy(student, labels))
        soft = ops.distillation_loss(student, teacher, labels, 1.0, 4.0)
        torch.testing.assert_close(soft, ops.soft_target_loss(student, teacher, 4.0))
        none = ops.distillation_loss(student, broken, labels, 0.0, 4.0, gamma=0.0)
        assert none == 0 and not torch.autograd.grad(none, student)[0].any()


EXTREME = {
    "nan in the student": ([[NAN, 1, 2], [0, 1, 2]], [[0, 1, 2]] * 2),
    "nan in the teacher": ([[0, 1, 2]] * 2, [[0, NAN, 2], [0, 1, 2]]),
    "inf in the student": ([[INF, 1, 2], [0, 1, 2]], [[0, 1, 2]] * 2),
    "inf in the teacher": ([[0, 1, 2]] * 2, [[0, INF, 2], [0, 1, 2]]),
    "student excludes": ([[-INF, 1, 2], [0, 1, 2]], [[0, 1, 2]] * 2),
    "teacher excludes": ([[3, 1, 2], [0, 1, 2]], [[-INF, 1, 2]] * 2),
    "both exclude": ([[-INF, 1, 2]] * 2, [[-INF, 2, 1]] * 2),
    "student excludes all": ([[-INF] * 3, [0, 1, 2]], [[0, 1, 2]] * 2),
    "teacher excludes all": ([[0, 1, 2]] * 2, [[-INF] * 3, [0, 1, 2]]),
    "large": ([[1e4, -1e4, 0], [0, 1e4, 1e4]], [[-1e4, 1e4, 0], [0, 1e4, 9.99e3]]),
    "offset": ([[1e4, 1e4 + 1, 1e4 + 3]] * 2, [[-1e4, 2 - 1e4, 1 - 1e4]] * 2),
}


@devices
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits_do_as_the_twin(name, wide, device):
    student, teacher = (logits(x, device, torch.float32) for x in EXTREME[name])
    if wide:  # more classes than one pass of the vector code and than a warp
        rest = torch.linspace(-3, 2, 300, device=device).expand(2, -1)
        student, teacher = torch.cat([student, rest], 1), torch.cat([teacher, -rest], 1)
    labels = torch.tensor([1, 2], device=device)
    results = []
    for module in (ops, reference):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = module.distillation_loss(s, t, labels, 0.5, 4.0)
        results.append(
            (
                loss,
                torch.autograd.grad(loss, s)[0],
                torch.autograd.grad(module.distillation_loss(s, t, labels, 0.5, 4.0), t)[0],
            )
        )
    ours, twin = results
    for got, want in zip(ours[:2] if twin[0].isinf() else ours, twin, strict=False):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=2e-5)


@devices
@pytest.mark.parametrize("temperature", [4.0, 20.0])
def test_close_logits_keep_their_digits(temperature, device):
    """The sums of exp differ little; KL, of second order, keeps its digits."""
    student, _, _ = Rows(2, 7).make(device)
    teacher = student.detach() + torch.linspace(-1, 1, 7, device=device) * 2**-8
    got = ops.soft_target_loss(student, teacher, temperature)
    want = reference.soft_target_loss(student.double(), teacher.double(), temperature)
    assert error(got, want) < 1e-4


@devices
def test_label_smoothing_and_excluded_classes(device):
    """A label of probability 0 has no share, whatever the student says."""
    student = logits([[-INF, 1, 2]], device)
    soft = logits([[0, 0.5, 0.5]], device)
    for path in ("fused", "reference"):
        with ops.use(path):
            loss = ops.distillation_loss(student, student, soft, 0.0, 1.0)
            assert loss.item() == pytest.approx(math.log(1 + math.e) - 0.5)
            smoothed = ops.distillation_loss(
                student, student, torch.tensor([1], device=device), 0.0, 1.0, label_smoothing=0.1
            )
            assert smoothed.item() == INF


@pytest.mark.parametrize("wrong", [7, -1, -100])
@both_paths
def test_label_that_is_no_class(path, wrong):
    student, teacher, labels = Rows(3, 7).make()
    labels[1] = wrong
    said = f"must be below 7 classes and not negative, got {wrong} at index 1"
    with ops.use(path):
        with pytest.raises(ValueError, match=f"distillation_loss: labels {said}"):
            ops.distillation_loss(student, teacher, labels, 0.5, 4.0)
        with pytest.raises(ValueError, match=f"cohort_loss: labels {said}"):
            ops.cohort_loss(student, teacher[None], labels, 0.5, 4.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
def test_label_that_is_no_class_on_cuda():
    student, teacher, labels = Rows(3, 7).make("cuda")
    labels[1] = 7
    loss = ops.distillation_loss(student, teacher, labels, 0.5, 4.0)
    gradient = torch.autograd.grad(loss, student)[0]
    assert loss.isnan() and gradient[1].isnan().all() and gradient[0].isfinite().all()


X, Y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
BAD = [
    ((X[0], X, Y, 0.5, 4), ValueError, ["student_logits", "[N, C]", "[3]"]),
    ((X[:0], X[:0], Y[:0], 0.5, 4), ValueError, ["student_logits", "non-empty", "[0, 3]"]),
    ((X, X[:1], Y, 0.5, 4), ValueError, ["batch and classes", "[1, 3]", "[2, 3]"]),
    ((X, X[:, :2], Y, 0.5, 4), ValueError, ["batch and classes", "[2, 2]"]),
    ((X.int(), X, Y, 0.5, 4), TypeError, ["student_logits", "torch.int32"]),
    ((X, None, Y, 0.5, 4), TypeError, ["NoneType"]),
    ((X, X.to("meta"), Y, 0.5, 4), ValueError, ["one device", "meta"]),
    ((X, X, Y.to("meta"), 0.5, 4), ValueError, ["one device", "labels", "meta"]),
    ((X, X, None, 0.5, 4), TypeError, ["labels", "NoneType"]),
    ((X, X, Y.int(), 0.5, 4), TypeError, ["labels", "int64", "torch.int32"]),
    ((X, X, Y[:1], 0.5, 4), ValueError, ["labels", "[N]", "[1]"]),
    ((X, X, X[:, :2], 0.5, 4), ValueError, ["labels", "[N, C]", "[2, 2]"]),
    ((X, X, X.clone().requires_grad_(), 0.5, 4), ValueError, ["labels", "gradient"]),
    ((X, X, Y, 0.5, 0), ValueError, ["temperature", "0"]),
    ((X, X, Y, 0.5, INF), ValueError, ["temperature", "inf"]),
    ((X, X, Y, 0.5, NAN), ValueError, ["temperature", "nan"]),
    ((X, X, Y, NAN, 4), ValueError, ["alpha", "nan"]),
    ((X, X, Y, 0.5, 4, INF), ValueError, ["gamma", "inf"]),
    ((X, X, Y, 0.5, 4, None, 1.5), ValueError, ["label_smoothing", "1.5"]),
]


@both_paths
@pytest.mark.parametrize(("arguments", "kind", "words"), BAD)
def test_errors_name_op_argument_and_value(path, arguments, kind, words):
    with ops.use(path), pytest.raises(kind) as caught:
        ops.distillation_loss(*arguments)
    assert all(word in str(caught.value) for word in ["distillation_loss", *words]), caught.value


@both_paths
def test_errors_of_the_others(path):
    with ops.use(path):
        with pytest.raises(ValueError, match=r"soft_target_loss: teacher_logits must .* \[1, 3\]"):
            ops.soft_target_loss(X, X[:1], 4.0)
        for arguments, message in (
            ((X, X, Y, 0.5, 4), r"cohort_logits must be .* \[M, N, C\]"),
            ((X, X[None], Y, [0.5, 0.5], 4), "alpha must have 1 members' weights, got 2"),
            ((X, X[None], Y, 0.0, 4), "alpha must be .* not 0 for all members"),
            ((X, X[None], Y, [NAN], 4), "alpha must be finite"),
            ((X, X[None], Y, torch.ones(1, device="meta"), 4), "alpha must be on the CPU"),
            ((X, X[None], Y, torch.ones(1, requires_grad=True), 4), "alpha must not require"),
            ((X, X.expand(129, 2, 3), Y, 0.1, 4), "at most 128 members, got 129"),
            ((X, X[None], Y, 0.5, 4, "none"), "reduction must be 'sum' or 'mean', got 'none'"),
        ):
            with pytest.raises(ValueError, match=f"cohort_loss: {message}"):
                ops.cohort_loss(*arguments)


def test_only_what_is_needed_is_computed_and_kept():
    student, teacher, labels = Rows(4, 9).make()

    def forward(s, t):
        kept = []
        with (
            Calls() as calls,
            torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
        ):
            loss = ops.distillation_loss(s, t, labels, 0.5, 4.0)
        slopes = [r[1:] for name, r in calls if "distillation_loss" in name]
        return loss, [x.numel() for x in slopes[0]], len(kept)

    assert forward(student.detach(), teacher.detach())[1:] == ([0, 0], 0)
    with torch.no_grad():
        assert forward(student, teacher)[1:] == ([0, 0], 0)
    loss, slopes, kept = forward(student, teacher.detach())
    assert slopes == [36, 0] and kept == 2
    loss.backward()
    assert student.grad is not None
    assert forward(student.detach(), teacher)[1:] == ([0, 36], 2)
    assert forward(student, teacher)[1:] == ([36, 36], 4)


CHECKED = [
    Rows(3, 10),
    Rows(1, 7, torch.float64, temperature=2.5),
    Rows(2, 300, torch.bfloat16),
    Rows(2, 5, torch.float16, members=3),
]


@devices
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_opcheck(case, device):
    student, teacher, labels = case.make(device)
    library = torch.ops.kdfast
    weights = ([0.5] * (case.members or 1), 0.5, case.temperature, 0.1, 0.25)
    soft = F.one_hot(labels, case.c).to(
        torch.float64 if case.dtype == torch.float64 else torch.float32
    )
    for y, wanted in ((labels, (True, True)), (soft, (True, False))):
        teacher_ = teacher if wanted[1] else teacher.detach()
        torch.library.opcheck(
            library.distillation_loss.default, (student, teacher_, y, *weights, *wanted)
        )
    student, teacher = student.detach(), teacher.detach()
    torch.library.opcheck(
        library.distillation_loss.default, (student, teacher, labels, *weights, False, False)
    )
    loss, slope, _ = library.distillation_loss(student, teacher, labels, *weights, True, False)
    arguments = (torch.ones_like(loss), slope, student, 0.25)
    torch.library.opcheck(library.distillation_loss_backward.default, arguments)


@devices
def test_gradcheck(device):
    student, teacher, labels = Rows(3, 5, torch.float64).make(device)
    members = torch.stack([teacher.detach(), -teacher.detach()]).requires_grad_()
    soft = torch.rand(3, 5, dtype=torch.float64, device=device)
    for loss, inputs in (
        (lambda s, t: ops.soft_target_loss(s, t, 2.5), (student, teacher)),
        (lambda s, t: ops.distillation_loss(s, t, labels, 0.3, 4.0, 2.0, 0.1), (student, teacher)),
        (lambda s, t: ops.distillation_loss(s, t, soft, 0.3, 4.0), (student, teacher)),
        (lambda s, t: ops.cohort_loss(s, t, labels, [0.3, -0.2], 5.0), (student, members)),
    ):
        assert torch.autograd.gradcheck(loss, inputs)


@devices
def test_second_derivative_is_refused(device):
    student, teacher, _ = Rows(3, 5).make(device)
    for wanted in (student, teacher):
        loss = ops.soft_target_loss(student, teacher, 4.0)
        gradient = torch.autograd.grad(loss, wanted, create_graph=True)[0]
        with pytest.raises(
            NotImplementedError, match=r"soft_target_loss.*can be differentiated once"
        ):
            (gradient.square().sum() + wanted.sum()).backward()


@devices
def test_compile_fullgraph_with_dynamic_batch(device):
    def step(student, teacher, members, labels):
        return (
            ops.distillation_loss(student, teacher, labels, 0.9, 4.0, label_smoothing=0.1)
            + ops.soft_target_loss(student, teacher, 2.0)
            + ops.cohort_loss(student, members, labels, [0.1, 0.2], 5.0)
        )

    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (3, 5):
            student, teacher, labels = Rows(n, 9).make(device)
            teacher = teacher.detach()
            members = torch.stack([teacher, -teacher])
            torch._dynamo.mark_dynamic(members, 1)
            for tensor in (student, teacher, labels):
                torch._dynamo.mark_dynamic(tensor, 0)
            results = [f(student, teacher, members, labels) for f in (compiled, step)]
            torch.testing.assert_close(*results)
            torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in results))


@devices
def test_autocast_takes_what_the_network_gives(device):
    linear = torch.nn.Linear(6, 5).to(device)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(4, device=device)
    with torch.autocast(device, torch.bfloat16):
        student = linear(x)
        loss = ops.distillation_loss(student, torch.ones(4, 5, device=device), labels, 0.5, 4.0)
    assert student.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.any()


@devices
def test_inference_mode(device):
    student, teacher, labels = Rows(3, 5).make(device)
    want = ops.distillation_loss(student, teacher, labels, 0.5, 4.0).detach()
    with torch.inference_mode():
        loss = ops.distillation_loss(student, teacher, labels, 0.5, 4.0)
        assert torch.equal(loss, want) and not loss.requires_grad


def test_gradients_of_two_backward_passes_do_not_share_memory():
    student, teacher, labels = Rows(3, 5).make()
    loss = ops.distillation_loss(student, teacher, labels, 0.5, 4.0)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss * 2, student)[0]
    assert torch.equal(first, kept) and torch.equal(second, 2 * kept)


def test_half_gradients_survive_large_weights_and_many_classes():
    """float16: a weight of 1e6 must not overflow before 1 / N, a probability of 1e-5 not vanish."""
    student, teacher, labels = Rows(16, 4000, torch.float16).make()
    for alpha, factor in ((1e6, 1e-6), (0.5, 100.0)):
        exact = as_double(student, teacher)
        got = ops.distillation_loss(student, teacher, labels, alpha, 4.0, 0.0) * factor * 16
        want = reference.distillation_loss(*exact, labels, alpha, 4.0, 0.0) * factor * 16
        gradient = torch.autograd.grad(got, student)[0]
        assert error(gradient, torch.autograd.grad(want, exact[0])[0]) < 1e-3


def test_thread_count_does_not_change_a_bit():
    student, teacher, labels = Rows(300, 130).make()
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss = ops.distillation_loss(student, teacher, labels, 0.5, 4.0)
            results.append([loss, *torch.autograd.grad(loss, (student, teacher))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.floats(0.3, 30),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_laws(n, c, temperature, alpha, seed):
    """KL >= 0 and 0 for equal logits; offsets of a row change nothing; gradients sum to 0."""
    student, teacher, labels = Rows(n, c, torch.float64).make(seed=seed)
    loss = ops.distillation_loss(student, teacher, labels, alpha, temperature)
    soft = ops.soft_target_loss(student, teacher, temperature)
    assert soft >= 0
    assert ops.soft_target_loss(student, student, temperature) == 0
    moved = ops.distillation_loss(student + 3, teacher - 5, labels, alpha, temperature)
    torch.testing.assert_close(moved, loss, rtol=1e-9, atol=1e-12)
    for gradient in torch.autograd.grad(loss, (student, teacher)):
        assert gradient.sum(1).abs().max() < 1e-12 * max(1, temperature * 10)


def _emulated(form, case: Rows):
    def run():
        student, teacher, labels = case.make()
        loss = form(ops)(student, teacher, labels, case)
        return [loss, *torch.autograd.grad(loss * case.n, (student, teacher))]

    return run


def _emulated_values():
    """No gradients; probabilities against NaN, infinities and excluded classes."""
    results = []
    for student, teacher in EXTREME.values():
        s, t = logits(student, dtype=torch.float32), logits(teacher, dtype=torch.float32)
        results.append(ops.soft_target_loss(s, t, 4.0))
        s.requires_grad_()
        loss = ops.distillation_loss(s, t, torch.tensor([1, 2]), 0.5, 4.0)
        results += [loss, *torch.autograd.grad(loss, s)]
    return results


_EMULATED = [
    *(
        Rows(n, c, dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        for n, c in ((9, 7), (2, 264), (1, 4104))
    ),
    Rows(3, 1),
    Rows(2, 257, temperature=20),
    Rows(2, 12, layout="unaligned"),
]
EMULATED = {
    **{f"distillation_loss {case}": _emulated(mixed, case) for case in _EMULATED},
    **{
        f"{name} {case}": _emulated(form, case)
        for name, form in (("smoothed", smoothed), ("probabilities", probabilities), ("soft", soft))
        for case in (Rows(9, 7), Rows(2, 264, torch.float16))
    },
    **{
        f"cohort_loss {case}": _emulated(cohort, case)
        for case in (Rows(9, 10, members=3), Rows(2, 264, torch.bfloat16, members=2))
    },
    "distillation_loss extremes": _emulated_values,
}
