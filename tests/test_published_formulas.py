"""The equivalences of docs/methods.md: each id there is a test here, the conventions side by side.

Plain torch writes what other code writes; kdfast's side is the method itself, or the total loss
that its flags choose.
"""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from kdfast.methods import Outputs, find_method, methods_table
from kdfast.models import create_model
from kdfast.ops import fsp_matrix
from kdfast.training.objective import Objective

from conftest import ROOT, load_script  # isort: skip
from test_methods import choice_of  # isort: skip

BATCH, CLASSES = 6, 11
LABELS = torch.arange(BATCH) % CLASSES
TESTED = []


def equivalence(test):
    """The test of the line whose id is the test's name."""
    TESTED.append(test.__name__.removeprefix("test_").replace("_", "-"))
    return test


def logits(seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of student and teacher, [BATCH, CLASSES], float64; the student's want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(
        2, BATCH, CLASSES, dtype=torch.float64, generator=generator
    ).mul_(scale)
    return student.requires_grad_(), teacher


def maps(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Feature maps of both signs, float64, that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [x.requires_grad_() for x in drawn]


def term(name, student, teacher, **options) -> torch.Tensor:
    """kdfast's term between logits, or between lists of features."""
    sides = []
    for side in (student, teacher):
        no_logits = torch.zeros(1, 2, dtype=torch.float64)
        is_logits = isinstance(side, torch.Tensor)
        sides.append(Outputs(side) if is_logits else Outputs(no_logits, tuple(side)))
    return find_method(name)(**options)(*sides, LABELS)


def total(student, teacher, *flags, recipe="crd") -> torch.Tensor:
    """kdfast's total loss on logits as `flags` choose it."""
    choice = choice_of("--recipe", recipe, *flags)
    loss = choice.gamma * F.cross_entropy(student, LABELS)
    for name, options in choice.methods.items():
        loss = loss + choice.weights[name] * term(name, student, teacher, **options)
    return loss


def same(ours: torch.Tensor, theirs: torch.Tensor, *inputs: torch.Tensor, rel: float = 1e-9):
    """Equal values, and equal gradients with respect to `inputs`."""
    assert ours.dtype == theirs.dtype == torch.float64
    assert ours.item() == pytest.approx(theirs.item(), rel=rel) and ours.item() > 0
    for a, b in zip(
        torch.autograd.grad(ours, inputs, retain_graph=True),
        torch.autograd.grad(theirs, inputs, retain_graph=True),
        strict=True,
    ):
        assert (a - b).abs().max() <= rel * b.abs().max() and b.abs().max() > 0


# The document.


def test_every_line_is_tested_and_every_test_has_a_line():
    document = (ROOT / "docs/methods.md").read_text()
    said = re.findall(r"^\* `([a-z0-9-]+)`:", document, re.M)
    assert sorted(said) == sorted(TESTED)
    assert len(set(said)) == len(said)


def test_the_document_is_current():
    document = (ROOT / "docs/methods.md").read_text()
    assert load_script("docs/methods.py").render() == document, "python docs/methods.py"
    for name in ("at", "fsp", "kd", "logits"):
        formula = find_method(name).formula
        assert formula and formula.replace("|", "\\|") in methods_table()


# kd.


def kl(student, teacher, temperature, reduction):
    """As most code writes it."""
    return F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.softmax(teacher / temperature, dim=1),
        reduction=reduction,
    )


@equivalence
@pytest.mark.parametrize("temperature", [1, 4, 7.5])
def test_kd_batchmean(temperature):
    z_s, z_t = logits(0)
    ours = term("kd", z_s, z_t, temperature=temperature)
    same(ours, temperature**2 * kl(z_s, z_t, temperature, "batchmean"), z_s)
    p_s, p_t = (F.softmax(z / temperature, 1) for z in (z_s, z_t))
    by_hand = sum((p_t[b] * (p_t[b].log() - p_s[b].log())).sum() for b in range(BATCH)) / BATCH
    same(ours, temperature**2 * by_hand, z_s)


@equivalence
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_kd_mean():
    z_s, z_t = logits(1)
    mean = 16 * kl(z_s, z_t, 4, "mean")
    same(term("kd", z_s, z_t, temperature=4), CLASSES * mean, z_s)
    by_numel = 16 * kl(z_s, z_t, 4, "sum") / z_s.numel()
    same(mean, by_numel, z_s)
    theirs = F.cross_entropy(z_s, LABELS) + 5 * mean
    same(total(z_s, z_t, "--method", "kd", "--alpha", 5 / CLASSES, "--gamma", 1), theirs, z_s)


@equivalence
def test_kd_no_t2():
    z_s, z_t = logits(2)
    theirs = 0.5 * F.cross_entropy(z_s, LABELS) + 3 * kl(z_s, z_t, 4, "batchmean")
    flags = ("--method", "kd", "--temperature", 4, "--alpha", 3 / 16, "--gamma", 0.5)
    same(total(z_s, z_t, *flags), theirs, z_s)


@equivalence
@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_soft_cross_entropy(temperature):
    z_s, z_t = logits(3)
    p_t = F.softmax(z_t / temperature, 1)
    soft = -(p_t * F.log_softmax(z_s / temperature, 1)).sum(1).mean() * temperature**2
    entropy = -(p_t * p_t.log()).sum(1).mean() * temperature**2
    ours = term("kd", z_s, z_t, temperature=temperature)
    same(ours + entropy, soft, z_s)
    (a,), (b,) = (torch.autograd.grad(loss, z_s) for loss in (ours, soft))
    assert torch.allclose(a, b, rtol=0, atol=1e-14)


@equivalence
@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_gradient(temperature):
    z_s, z_t = logits(4)
    (gradient,) = torch.autograd.grad(term("kd", z_s, z_t, temperature=temperature), z_s)
    p_s, p_t = (F.softmax(z.detach() / temperature, 1) for z in (z_s, z_t))
    assert torch.allclose(gradient, temperature / BATCH * (p_s - p_t), rtol=0, atol=1e-14)


@equivalence
def test_kd_high_temperature():
    z_s, z_t = logits(5, scale=1.0)
    c_s, c_t = (z - z.mean(1, keepdim=True) for z in (z_s, z_t))
    limit = (c_s - c_t).square().sum(1).mean() / (2 * CLASSES)
    same(limit, term("logits", c_s, c_t) / 2, z_s)
    for temperature in (100, 1000):
        same(term("kd", z_s, z_t, temperature=temperature), limit, z_s, rel=10 / temperature)


@equivalence
def test_kd_complement():
    z_s, z_t = logits(6)
    theirs = (1 - 0.3) * F.cross_entropy(z_s, LABELS) + 0.3 * 16 * kl(z_s, z_t, 4, "batchmean")
    same(total(z_s, z_t, "--method", "kd", "--alpha", 0.3), theirs, z_s)


@equivalence
def test_kd_reversed():
    z_s, z_t = logits(7)
    theirs = 0.3 * F.cross_entropy(z_s, LABELS) + (1 - 0.3) * 16 * kl(z_s, z_t, 4, "batchmean")
    same(total(z_s, z_t, "--method", "kd", "--alpha", 1 - 0.3), theirs, z_s)


@equivalence
def test_kd_gamma():
    z_s, z_t = logits(8)
    gamma, alpha = 1.0, 0.8
    theirs = gamma * F.cross_entropy(z_s, LABELS) + alpha * 16 * kl(z_s, z_t, 4, "batchmean")
    same(total(z_s, z_t, "--method", "kd", "--gamma", gamma, "--alpha", alpha), theirs, z_s)
    complement = total(z_s, z_t, "--method", "kd", "--alpha", alpha / (gamma + alpha))
    same((gamma + alpha) * complement, theirs, z_s)


@equivalence
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_kd_alpha_t_t():
    (z_s, z_t), a, t = logits(9), 0.9, 5

    def written(criterion):
        soft = criterion(F.log_softmax(z_s / t, dim=1), F.softmax(z_t / t, dim=1))
        return soft * (a * t * t) + F.cross_entropy(z_s, LABELS) * (1.0 - a)

    flags = ("--method", "kd", "--temperature", t)
    ours = total(z_s, z_t, *flags, "--alpha", a)
    same(ours, written(nn.KLDivLoss(reduction="batchmean")), z_s)
    ours = total(z_s, z_t, *flags, "--alpha", a / CLASSES, "--gamma", 1 - a)
    same(ours, written(nn.KLDivLoss()), z_s)


@equivalence
def test_kd_tutorial():
    (z_s, z_t), t = logits(10), 2
    soft_targets, soft_prob = F.softmax(z_t / t, dim=-1), F.log_softmax(z_s / t, dim=-1)
    soft = torch.sum(soft_targets * (soft_targets.log() - soft_prob)) / BATCH * t**2
    theirs = 0.25 * soft + 0.75 * F.cross_entropy(z_s, LABELS)
    same(total(z_s, z_t, "--method", "kd", "--alpha", 0.25, "--temperature", 2), theirs, z_s)


@equivalence
@pytest.mark.parametrize(
    ("weights", "flags"),
    [
        (
            {"distill_loss_weight": 0.7, "task_loss_weight": 0.4},
            ("--alpha", 0.7, "--gamma", 0.4),
        ),
        ({"task_loss_weight": 0.3}, ("--alpha", 1 - 0.3)),
        ({}, ("--alpha", 1, "--gamma", 1)),
    ],
)
def test_kd_timm(weights, flags):
    """timm's own class on two small networks, against the total loss on their logits."""
    task = pytest.importorskip("timm.task", reason="this timm has no distillation tasks")
    torch.manual_seed(0)
    student, teacher = (create_model(f"cifar_resnet{d}", CLASSES).double() for d in (8, 14))
    theirs = task.LogitDistillationTask(
        student,
        task.DistillationTeacher(teacher, dtype=torch.float64),
        nn.CrossEntropyLoss(),
        temperature=4.0,
        device=torch.device("cpu"),
        dtype=torch.float64,
        verbose=False,
        **weights,
    ).eval()
    images = torch.randn(BATCH, 3, 32, 32, dtype=torch.float64)
    weight = student.get_classifier().weight
    ours = total(
        student(images), teacher(images).detach(), "--method", "kd", "--temperature", 4, *flags
    )
    same(ours, theirs(images, LABELS)["loss"], weight)


# at.


def attention(feature, reduce=torch.mean, epsilon=0.0):
    """Q [B, N] of a feature map, with `epsilon` on the norm."""
    energy = reduce(feature.square(), 1).flatten(1)
    return energy / (energy.norm(dim=1, keepdim=True) + epsilon)


@equivalence
def test_at_channel_sum():
    f_s, f_t = maps(0, (BATCH, 5, 4, 6), (BATCH, 9, 4, 6))
    ours = term("at", [f_s], [f_t])
    for reduce in (torch.sum, torch.mean):
        theirs = (attention(f_s, reduce) - attention(f_t, reduce)).square().mean()
        same(ours, theirs, f_s, f_t)


@equivalence
def test_at_squared_norm():
    w, found = 3.0, []
    for side in (32, 16, 8):
        f_s, f_t = maps(side, (2, 4, side, side), (2, 4, side, side))
        theirs = w / 2 * (attention(f_s) - attention(f_t)).norm(dim=1).square().mean()
        beta = w * side**2 / 2
        same(beta * term("at", [f_s], [f_t]), theirs, f_s)
        found.append(1000 * w / beta)
    assert found == pytest.approx([1.953125, 7.8125, 31.25])
    line = find_method("at").equivalences["at-squared-norm"]
    assert "w = 1.95, 7.8 and 31 at 32, 16 and 8 pixels" in line


@equivalence
def test_at_cosine():
    f_s, f_t = maps(1, (BATCH, 5, 4, 6), (BATCH, 9, 4, 6))
    cosine = F.cosine_similarity(attention(f_s), attention(f_t), dim=1)
    ours = term("at", [f_s], [f_t])
    same(ours, 2 / 24 * (1 - cosine).mean(), f_s, f_t)
    assert ours <= 2 / 24
    apart = [torch.eye(24, dtype=torch.float64).view(24, 1, 4, 6) for _ in range(2)]
    assert term("at", [apart[0]], [apart[1].roll(1, 0)]).item() == pytest.approx(2 / 24)


@equivalence
def test_at_gradient():
    channels, positions = 5, 24
    f_s, f_t = maps(2, (BATCH, channels, 4, 6), (BATCH, 9, 4, 6))
    q_s, q_t = attention(f_s.detach()), attention(f_t.detach())
    norm = f_s.detach().square().mean(1).flatten(1).norm(dim=1, keepdim=True)
    cosine = (q_s * q_t).sum(1, keepdim=True)
    on_map = 2 / (BATCH * positions * norm) * (cosine * q_s - q_t)

    energy = f_s.detach().square().mean(1).flatten(1).requires_grad_()
    one_channel = energy.sqrt().view(BATCH, 1, 4, 6)  # its |F|^2 is `energy`
    (gradient,) = torch.autograd.grad(term("at", [one_channel], [f_t.detach()]), energy)
    assert torch.allclose(gradient, on_map, rtol=1e-10, atol=1e-15)

    (gradient,) = torch.autograd.grad(term("at", [f_s], [f_t.detach()]), f_s)
    on_feature = 2 / channels * f_s.detach() * on_map.view(BATCH, 1, 4, 6)
    assert torch.allclose(gradient, on_feature, rtol=1e-10, atol=1e-15)


@equivalence
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_at_epsilon(scale):
    f_s, f_t = maps(3, (BATCH, 5, 4, 6), (BATCH, 9, 4, 6))
    f_s, f_t = f_s * scale, f_t * scale * 1.7
    theirs = (attention(f_s, epsilon=1e-6) - attention(f_t, epsilon=1e-6)).square().mean()
    smallest = min(f.square().mean(1).flatten(1).norm(dim=1).min() for f in (f_s, f_t))
    assert smallest >= 1e-4
    ours = term("at", [f_s], [f_t])
    assert 0 < abs(ours - theirs) < 6e-6 / (24 * smallest)


@equivalence
def test_at_mean_over_stages():
    shapes = [(BATCH, c, n, n) for c, n in ((4, 8), (6, 4), (8, 2))]
    student, teacher = maps(4, *shapes), maps(5, *shapes)
    terms = [
        (attention(s) - attention(t)).square().mean() for s, t in zip(student, teacher, strict=True)
    ]
    beta = choice_of("--recipe", "zoo", "--method", "at").weights["at"]
    assert beta == pytest.approx(1000 / 3)
    same(beta * term("at", student, teacher), 1000 * torch.stack(terms).mean(), *student)


# fsp.


FSP_SHAPES = [(BATCH, c, n, n) for c, n in ((3, 8), (3, 8), (5, 4), (7, 2))]


def gram(first, second):
    """Mean over positions of the broadcast product, the first map pooled to the second's size."""
    first = F.adaptive_avg_pool2d(first, second.shape[-2:])
    return (first[:, :, None] * second[:, None]).mean((-2, -1))


def pair_terms(student, teacher, of=gram):
    grams = ([of(a, b) for a, b in itertools.pairwise(side)] for side in (student, teacher))
    return torch.stack([(s - t).square().mean() for s, t in zip(*grams, strict=True)])


@equivalence
@pytest.mark.parametrize("recipe", ["self", "self-as-published"])
def test_fsp_ninth(recipe):
    student, teacher = maps(0, *FSP_SHAPES), maps(1, *FSP_SHAPES)
    beta = choice_of("--recipe", recipe, "--method", "fsp").weights["fsp"]
    theirs = pair_terms(student, teacher).mean() / 3
    same(beta * term("fsp", student, teacher), theirs, *student)


@equivalence
@pytest.mark.parametrize("layers", [3, 4])
def test_fsp_mean_over_pairs(layers):
    student, teacher = maps(2, *FSP_SHAPES[:layers]), maps(3, *FSP_SHAPES[:layers])
    theirs = 5 * pair_terms(student, teacher).mean()
    same(5 / (layers - 1) * term("fsp", student, teacher), theirs, *student)


@equivalence
def test_fsp_broadcast():
    first, second = maps(4, (BATCH, 3, 8, 8), (BATCH, 5, 4, 4))
    assert torch.allclose(fsp_matrix(first, second), gram(first, second), rtol=0, atol=1e-14)
    student, teacher = maps(4, *FSP_SHAPES), maps(5, *FSP_SHAPES)
    same(term("fsp", student, teacher), pair_terms(student, teacher).sum(), *student)


@equivalence
def test_fsp_no_area():
    shapes = [(BATCH, 3, 8, 8), (BATCH, 5, 4, 4)]
    student, teacher = maps(6, *shapes), maps(7, *shapes)

    def undivided(first, second):
        first = F.adaptive_avg_pool2d(first, second.shape[-2:])
        return torch.einsum("bixy,bjxy->bij", first, second)

    theirs = pair_terms(student, teacher, undivided).sum()
    same((4 * 4) ** 2 * term("fsp", student, teacher), theirs, *student)


@equivalence
def test_fsp_squared_norm():
    shapes = [(BATCH, 3, 8, 8), (BATCH, 5, 4, 4)]
    student, teacher = maps(8, *shapes), maps(9, *shapes)
    difference = gram(*student) - gram(*teacher)
    theirs = torch.linalg.matrix_norm(difference).square().mean()
    same(3 * 5 * term("fsp", student, teacher), theirs, *student)


@equivalence
def test_fsp_transpose():
    student, teacher = maps(10, *FSP_SHAPES), maps(11, *FSP_SHAPES)

    def exchanged(first, second):
        first = F.adaptive_avg_pool2d(first, second.shape[-2:])
        return (second[:, :, None] * first[:, None]).mean((-2, -1))

    first, second = student[1:3]
    assert torch.allclose(exchanged(first, second), fsp_matrix(first, second).mT, atol=1e-14)
    theirs = pair_terms(student, teacher, exchanged).sum()
    same(term("fsp", student, teacher), theirs, *student)


@equivalence
def test_fsp_pool():
    constants = [x[..., :1, :1].detach() for x in maps(12, *FSP_SHAPES, *FSP_SHAPES)]
    flat = [
        x.expand(shape).clone().requires_grad_()
        for x, shape in zip(constants, FSP_SHAPES * 2, strict=True)
    ]
    student, teacher = flat[:4], flat[4:]
    average, maximum = (term("fsp", student, teacher, pool=pool) for pool in ("avg", "max"))
    assert average.item() == pytest.approx(maximum.item(), rel=1e-12) and average > 0
    student, teacher = maps(12, *FSP_SHAPES), maps(13, *FSP_SHAPES)
    average, maximum = (term("fsp", student, teacher, pool=pool) for pool in ("avg", "max"))
    assert abs(average - maximum) > 1e-3 * average, "on other maps they differ"


# logits.


@equivalence
def test_logits_half_sum():
    z_s, z_t = logits(0)
    published = (z_s - z_t).square().sum(1).mean() / 2
    same(CLASSES / 2 * term("logits", z_s, z_t), published, z_s)
    theirs = F.cross_entropy(z_s, LABELS) + 0.2 * published
    same(total(z_s, z_t, "--method", "logits", "--beta", 0.2 * CLASSES / 2), theirs, z_s)


@equivalence
def test_logits_sum():
    z_s, z_t = logits(1)
    theirs = F.mse_loss(z_s, z_t, reduction="sum")
    same(BATCH * CLASSES * term("logits", z_s, z_t), theirs, z_s)


@equivalence
def test_logits_gradient():
    z_s, z_t = logits(2)
    (gradient,) = torch.autograd.grad(term("logits", z_s, z_t), z_s)
    expected = 2 * (z_s - z_t).detach() / (BATCH * CLASSES)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=0)


# The total loss.


@equivalence
@pytest.mark.parametrize(
    ("flags", "gamma"),
    [
        (("none",), 1.0),
        (("logits",), 1.0),
        (("kd",), 1 - 0.9),
        (("kd", "--alpha", 0.25), 0.75),
        (("kd", "logits"), 1 - 0.9),
        (("kd", "logits", "--gamma", 0.6), 0.6),
    ],
)
def test_gamma_default(flags, gamma):
    """The objective that trains, which is float32, has the same cross-entropy, once."""
    z_s, z_t = logits(3)
    choice = choice_of("--recipe", "crd", "--method", *flags)
    rest = sum(
        choice.weights[name] * term(name, z_s, z_t, **options)
        for name, options in choice.methods.items()
    )
    theirs = gamma * F.cross_entropy(z_s, LABELS) + rest
    same(total(z_s, z_t, "--method", *flags), theirs, z_s)

    methods = [find_method(name)(**options) for name, options in choice.methods.items()]
    views = {method.name: ([], []) for method in methods}
    student = Given(z_s.detach().float())
    objective = Objective(student, methods, choice.weights, choice.gamma, views)
    loss, _, _ = objective(torch.zeros(BATCH, 3, 1, 1), LABELS, z_t.float())
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)


class Given(nn.Module):
    """A student that answers with its one parameter."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, images):
        return self.answer, ()


@equivalence
def test_weight_decay(run_script, tmp_path):
    """One step with and without: the difference is lr * w * theta, the gradient of w/2 theta^2."""
    lr, decay = 0.1, 0.5
    found = {}
    for name, rate, weight in (("start", 0, 0), ("plain", lr, 0), ("decayed", lr, decay)):
        flags = {
            "--model": "cifar_resnet8",
            "--train-limit": 32,
            "--eval-limit": 8,
            "--batch-size": 32,
            "--epochs": 1,
            "--sched": "constant",
            "--momentum": 0,
            "--lr": rate,
            "--weight-decay": weight,
            "--experiment": name,
        }
        code, out, err = run_script("train/classifier.py", *itertools.chain(*flags.items()))
        assert code == 0, err
        folder = tmp_path / json.loads(out.strip().splitlines()[-1])["run"]
        found[name] = load_file(folder / "last.safetensors")
    model = create_model("cifar_resnet8", 10)
    for name, _ in model.named_parameters():
        start, plain, decayed = (found[key][name].double() for key in found)
        penalty = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(decay / 2 * penalty.square().sum(), penalty)
        assert torch.allclose(plain - decayed, lr * gradient, rtol=1e-4, atol=1e-6), name
