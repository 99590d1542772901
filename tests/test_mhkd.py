"""Multi-head distillation: published numbers and heads, who learns from whom, the flags."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from kdfast import ops
from kdfast.errors import UsageError
from kdfast.methods import Outputs, Pairing, find_method
from kdfast.models import Taps, create_model
from kdfast.training.objective import Objective, plan_taps

DISTILL = "train/distill.py"
FEW = ("--train-limit", 64, "--eval-limit", 64, "--epochs", 1, "--no-baseline")


def multi_head(*shapes, classes=2, smoothing=0.0, teacher=None, **options):
    """The method set up for student maps of `shapes` [C, H, W] and the same of the teacher."""
    method = find_method("mhkd")(**options)
    ours, theirs = (
        tuple(torch.Size([2, *shape]) for shape in maps) for maps in (shapes, teacher or shapes)
    )
    layers = tuple(f"layer{i}" for i in range(len(shapes)))
    torch.manual_seed(0)
    method.setup(Pairing(layers, layers, ours, theirs, classes, label_smoothing=smoothing))
    return method


class Says(nn.Module):
    """A head or network with given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits, self.logits


def on_batch(method, *, teacher=None, batch=1, classes=2, dtype=torch.float32):
    """Student and teacher outputs for heads that ignore their features, and the labels."""
    features = tuple(torch.zeros(batch, 1, 5, 5) for _ in method.student_heads)
    zeros = torch.zeros(batch, classes, dtype=dtype)
    return (
        Outputs(zeros, features),
        Outputs(zeros if teacher is None else teacher, features),
        torch.zeros(batch, dtype=torch.int64),
    )


# Acceptance check 6 of the intermediate heads.


def test_by_hand():
    """Through the method and an objective: gamma 0, beta 1, alpha 0.1, T 4, share 0.5."""
    method = multi_head((3, 9, 9))
    assert (method.gamma, method.default_weight) == (0.0, 1.0)
    assert (method.alpha, method.temperature, method.share, method.stages) == (0.1, 4.0, 0.5, 2)
    method.student_heads[0] = Says(torch.zeros(1, 2))
    method.teacher_heads[0] = Says(torch.zeros(1, 2))
    taught = torch.tensor([[4 * math.log(3), 0.0]])
    student = nn.Module()
    student.forward = lambda x: (torch.zeros(1, 2), (torch.zeros(1, 3, 9, 9),))
    objective = Objective(student, [method], {"mhkd": 1.0}, method.gamma, {"mhkd": ([0], [0])})
    total, terms, _ = objective(
        torch.zeros(1, 3, 1, 1), torch.tensor([0]), taught, (torch.zeros(1, 3, 9, 9),)
    )
    parts = 0.623832 + 0.209299 + 0.693147 + 0.311916
    assert total.item() == pytest.approx(1.838195, abs=1e-5) == pytest.approx(parts, abs=1e-5)
    assert terms.tolist() == pytest.approx([0.693147, 1.838195], abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "after_convs", "count"),
    [
        ((16, 32, 32), 28, 719_204),
        ((32, 16, 16), 12, 756_068),
        ((64, 8, 8), 4, 829_796),
        ((512, 4, 4), 2, 1_861_988),
        ((128, 6, 9), (2, 5), 977_252),
        ((256, 1, 1), 1, 1_272_164),
    ],
)
def test_published_heads(shape, after_convs, count):
    method = multi_head(shape, classes=100)
    for head in (*method.student_heads, *method.teacher_heads):
        assert sum(p.numel() for p in head.parameters()) == count
        size = (after_convs,) * 2 if isinstance(after_convs, int) else after_convs
        assert head.convs(torch.randn(2, *shape)).shape[2:] == size
        feature, logits = head(torch.randn(2, *shape))
        assert feature.shape == (2, 256) and logits.shape == (2, 100)
    assert f"{count:,}" in method.notes()[0]


def test_detached_targets_do_not_move_the_teachers_heads():
    """With detach a teacher head has the gradient of its own cross-entropy, and no other."""
    torch.manual_seed(0)
    for detach in (True, False):
        method = multi_head((3, 9, 9), classes=7, detach=detach)
        z_s, z_t = (torch.randn(4, 7, dtype=torch.float64) for _ in range(2))
        method.student_heads[0], method.teacher_heads[0] = Says(z_s), Says(z_t)
        student, teacher, labels = on_batch(method, batch=4, classes=7, dtype=torch.float64)
        method(student, teacher, labels).backward()
        got = method.teacher_heads[0].logits.grad
        own = (z_t.softmax(1) - F.one_hot(labels, 7)) / 4
        assert torch.allclose(got, own, atol=1e-12) == detach


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("path", ["fused", "reference"])
def test_value_and_gradients_by_formula(detach, smoothing, path):
    if path == "fused" and ops.active() != "fused":
        pytest.skip("the compiled extension is not built")
    alpha, t, share = 0.3, 3.0, 0.7
    options = {"alpha": alpha, "temperature": t, "share": share, "detach": detach}
    torch.manual_seed(1)
    draw = [torch.randn(5, 6, dtype=torch.float64) for _ in range(6)]
    labels = torch.tensor([0, 3, 5, 1, 1])

    def both(z_s, z_t):
        log_s, p = (z_s / t).log_softmax(1), (z_t / t).softmax(1)
        kl = (p * (p.log() - log_s)).sum(1).mean()
        ce = F.cross_entropy(z_s, labels, label_smoothing=smoothing)
        return (1 - alpha) * ce + alpha * t * t * kl

    z = [x.clone().requires_grad_() for x in draw]
    wanted = both(z[0], draw[1])
    for z_s, z_t in ((z[2], z[3]), (z[4], z[5])):
        wanted = wanted + F.cross_entropy(z_t, labels, label_smoothing=smoothing)
        wanted = wanted + share * both(z_s, z_t.detach() if detach else z_t)
    wanted.backward()

    method = multi_head((3, 9, 9), (3, 9, 9), classes=6, smoothing=smoothing, **options)
    for i in range(2):
        method.student_heads[i], method.teacher_heads[i] = (
            Says(draw[2 + 2 * i]),
            Says(draw[3 + 2 * i]),
        )
    logits = draw[0].clone().requires_grad_()
    features = (torch.zeros(5, 3, 9, 9),) * 2
    with ops.use(path):
        loss = method(Outputs(logits, features), Outputs(draw[1], features), labels)
        loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    heads = [
        h for pair in zip(method.student_heads, method.teacher_heads, strict=True) for h in pair
    ]
    got = [logits.grad, *(head.logits.grad for head in heads)]
    right = [z[i].grad for i in (0, 2, 3, 4, 5)]
    for own, expected in zip(got, right, strict=True):
        assert torch.allclose(own, expected, rtol=1e-9, atol=1e-12)


def test_every_head_starts_from_its_own_weights():
    """Also heads of one shape, whose weights a common seed would make alike."""
    method = multi_head((8, 9, 9), (8, 9, 9), width=16)
    first = [h.convs[0].weight for h in (*method.student_heads, *method.teacher_heads)]
    last = [h.fc.weight for h in (*method.student_heads, *method.teacher_heads)]
    for weights in (first, last):
        for i, one in enumerate(weights):
            assert not any(torch.equal(one, other) for other in weights[i + 1 :])


def test_stage_i_has_stage_i():
    pairs = [("a", "x"), ("b", "y"), ("c", "z")]
    # Of four stages the first meet those of a network with three, as published.
    assert find_method("mhkd")().pair(list("abcd"), list("xyz")) == pairs[:2]
    assert find_method("mhkd")(stages=9).pair(list("abcd"), list("xyz")) == pairs
    for stages in (0, 1.5):
        with pytest.raises(UsageError, match="mhkd stages"):
            find_method("mhkd")(stages=stages)


def on_networks(autocast=False, **options):
    """The method on ResNet-8 and ResNet-14, after one backward pass."""
    torch.manual_seed(0)
    student, teacher = create_model("cifar_resnet8", 10), create_model("cifar_resnet14", 10).eval()
    method = find_method("mhkd")(width=32, **options)
    plan = plan_taps([method], student, teacher)
    ours, theirs = Taps(student, plan.student_layers), Taps(teacher, plan.teacher_layers)
    objective = Objective(ours, [method], {"mhkd": 1.0}, method.gamma, plan.views)
    images = torch.randn(4, 3, 32, 32)
    objective.setup(plan, ours.calibrate(images[:2]), theirs.calibrate(images[:2]), 10)
    with torch.no_grad():
        taught = theirs(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = objective(images, torch.arange(4), *taught)[0]
    total.backward()
    return method, student, teacher, total.detach()


def test_gradient_reaches_student_and_heads_alone():
    method, student, teacher, _ = on_networks()
    for module in (student, method):
        assert [n for n, p in module.named_parameters() if p.grad is None] == []
    assert all(h.fc.weight.grad.abs().sum() > 0 for h in method.teacher_heads)
    assert all(p.grad is None for p in teacher.parameters())


def test_reduced_precision():
    exact, rough = (on_networks(autocast)[-1] for autocast in (False, True))
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, rtol=0.02)


def test_command_line(run_script, teacher_run, tmp_path):
    flags = (DISTILL, *FEW, "--method", "mhkd", "--teacher", "cifar_resnet8", "--mhkd-width", 8,
             "--teacher-checkpoint", teacher_run, "--student", "cifar_resnet8",
             "--alpha", 0.2, "--temperature", 3, "--mhkd-beta", 0.25,
             "--output", ".", "--experiment", "run")  # fmt: skip
    before = load_file(teacher_run / "last.safetensors")
    code, out, err = run_script(*flags, "--no-mhkd-detach")
    assert code == 0, err
    assert "0 * ce + 1 * mhkd" in out and "mhkd: layer1 -> layer1, layer2 -> layer2" in out
    assert "parameters of teacher heads " in out
    saved = load_file(tmp_path / "run" / "last.safetensors")
    assert saved.keys() == before.keys(), "the student is saved without heads"
    with (tmp_path / "run" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_loss"]) == pytest.approx(float(row["train_mhkd"]))
    results = json.loads(out.splitlines()[-1])
    assert results["parameters"] == 78042


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--alpha 1.5", ["mhkd alpha must be at most 1", "1.5"]),
        ("--temperature 0", ["mhkd temperature must be above 0"]),
        ("--mhkd-stages 0", ["mhkd stages must be 1 or more"]),
        ("--mhkd-width 0", ["mhkd width must be 1 or more"]),
        ("--mhkd-beta -1", ["mhkd share must be 0 or more"]),
        ("--student-layers layer3 --teacher-layers fc", ["teacher layer fc", "[2, 10]"]),
    ],
)
def test_what_is_refused(refused, teacher_run, flags, words):
    refused(2, DISTILL, *FEW, "--method", "mhkd", "--teacher", "cifar_resnet8",
            "--teacher-checkpoint", teacher_run, *flags.split(), words=words)  # fmt: skip
