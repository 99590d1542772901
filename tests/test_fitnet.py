"""FitNets' hints: regressors for all sizes, the published weights, and the flags."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.methods import Outputs, Pairing, find_method
from kdfast.models import Taps, create_model
from kdfast.training.objective import Objective, plan_taps

DISTILL = "train/distill.py"
FEW = ("--train-limit", 64, "--eval-limit", 64, "--epochs", 1, "--no-baseline")


def hints(student, teacher, **options):
    """The method set up for one pair of [C, H, W] shapes."""
    method = find_method("fitnet")(**options)
    shapes = [(torch.Size([2, *shape]),) for shape in (student, teacher)]
    torch.manual_seed(0)
    method.setup(Pairing(("ours",), ("theirs",), *shapes, 10))
    return method


def outputs(*features, dtype=torch.float32):
    return Outputs(torch.zeros(len(features[0]), 10, dtype=dtype), features)


# Acceptance check 6 of the distillation losses.


def test_equal_maps_without_a_regressor():
    feature, method = torch.randn(3, 8, 5, 5), hints((8, 5, 5), (8, 5, 5), regressor="off")
    assert method(outputs(feature), outputs(feature), None).item() == 0
    assert method(outputs(feature), outputs(feature + 2), None).item() == pytest.approx(4)
    assert list(method.parameters()) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "kernel", "stride", "transposed"),
    [
        ((16, 16), (8, 8), (3, 3), (2, 2), False),
        ((8, 8), (8, 8), (1, 1), (1, 1), False),
        ((8, 8), (16, 16), (4, 4), (2, 2), True),
        ((32, 32), (8, 8), (25, 25), (1, 1), False),
        ((14, 14), (8, 8), (7, 7), (1, 1), False),
        ((9, 9), (3, 3), (7, 7), (1, 1), False),
        ((2, 2), (1, 1), (3, 3), (2, 2), False),
        ((16, 10), (8, 7), (3, 4), (2, 1), False),
        ((8, 7), (16, 7), (4, 1), (2, 1), True),
    ],
)
def test_published_regressors(ours, theirs, kernel, stride, transposed):
    method = hints((6, *ours), (10, *theirs))
    convolution, norm, relu = method.regressors[0]
    assert isinstance(convolution, nn.ConvTranspose2d) == transposed
    assert (convolution.kernel_size, convolution.stride) == (kernel, stride)
    assert convolution.bias is not None
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(relu, nn.ReLU)
    assert method.regressors[0](torch.randn(2, 6, *ours)).shape == (2, 10, *theirs)
    count = 60 * kernel[0] * kernel[1] + 10 + 20
    assert sum(p.numel() for p in method.parameters()) == count
    assert f"{count:,} parameters" in method.notes()[0] and "ours" in method.notes()[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [
        ((7, 7), (8, 8), (7, 7)),
        ((8, 8), (14, 14), (8, 8)),
        ((4, 4), (16, 16), (4, 4)),
        ((16, 4), (8, 8), (8, 4)),  # no convolution halves one side and doubles the other
        ((1, 1), (7, 5), (1, 1)),
    ],
)
def test_other_sizes_are_pooled_to_the_smaller(ours, theirs, common):
    method = hints((6, *ours), (10, *theirs))
    student, teacher = torch.randn(4, 6, *ours, requires_grad=True), torch.randn(4, 10, *theirs)
    loss = method(outputs(student), outputs(teacher), None)
    convolution = next(m for m in method.modules() if isinstance(m, nn.Conv2d))
    norm = next(m for m in method.modules() if isinstance(m, nn.BatchNorm2d))
    answer = F.conv2d(F.adaptive_avg_pool2d(student, common), convolution.weight, convolution.bias)
    answer = F.batch_norm(answer, None, None, norm.weight, norm.bias, training=True).relu()
    wanted = (answer - F.adaptive_avg_pool2d(teacher, common)).square().mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert f"1x1 convolution on maps pooled to {common[0]}x{common[1]}" in method.notes()[0]
    loss.backward()
    assert student.grad.abs().sum() > 0


def test_value_and_gradient_by_formula():
    method = hints((3, 6, 6), (4, 6, 6)).double()
    student, teacher = (torch.randn(5, c, 6, 6, dtype=torch.float64) for c in (3, 4))
    convolution, norm, _ = method.regressors[0]
    for parameter in norm.parameters():
        nn.init.uniform_(parameter)
    inputs = [student.requires_grad_(), convolution.weight, convolution.bias, norm.weight]
    loss = method(outputs(student, dtype=torch.float64), outputs(teacher), None)
    mixed = torch.einsum("oc,bcxy->boxy", convolution.weight[..., 0, 0], student)
    mixed = mixed + convolution.bias[:, None, None]
    mean, var = mixed.mean((0, 2, 3), True), mixed.var((0, 2, 3), unbiased=False, keepdim=True)
    scaled = norm.weight[:, None, None] * (mixed - mean) / (var + norm.eps).sqrt()
    answer = (scaled + norm.bias[:, None, None]).clamp(min=0)
    wanted = (answer - teacher).square().sum() / (5 * 4 * 6 * 6)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for got, grad in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        assert torch.allclose(got, grad, rtol=1e-9, atol=1e-12)


def test_auto_has_a_regressor_where_shapes_differ():
    assert list(hints((8, 5, 5), (8, 5, 5), regressor="auto").parameters()) == []
    assert hints((8, 5, 5), (8, 5, 4), regressor="auto").notes()[0].count("parameters") == 1
    assert "as it is" in hints((8, 5, 5), (8, 5, 5), regressor="auto").notes()[0]
    with pytest.raises(UsageError, match=r"8x5x5.*9x5x5.*--fitnet-regressor auto"):
        hints((8, 5, 5), (9, 5, 5), regressor="off")


@pytest.mark.parametrize(("value", "word"), [(False, "off"), (True, "on")])
def test_words_that_yaml_reads_as_truth(value, word):
    assert find_method("fitnet")(regressor=value).regressor == word


def test_stages_count_from_either_end():
    pairs = [("a", "x"), ("b", "y"), ("c", "z")]
    stages = list("abc"), list("xyz")
    for stage, pair in ((1, 0), (2, 1), (3, 2), (-1, 2), (-3, 0)):
        assert find_method("fitnet")(stage=stage).pair(*stages) == [pairs[pair]]
    assert find_method("fitnet")().pair(*stages) == [pairs[1]], "the second stage"
    for stage in (4, -4):
        with pytest.raises(UsageError, match=f"fitnet stage {stage}: .* 3 stages.*-1 for the last"):
            find_method("fitnet")(stage=stage).pair(*stages)
    with pytest.raises(UsageError, match="counts from 1"):
        find_method("fitnet")(stage=0)
    with pytest.raises(UsageError, match="whole number"):
        find_method("fitnet")(stage=1.5)


def trained(method, student, teacher, layers=(None, None)):
    """An objective of `method` alone on two networks, and what the teacher answers."""
    plan = plan_taps([method], student, teacher, *layers)
    ours, theirs = Taps(student, plan.student_layers), Taps(teacher, plan.teacher_layers)
    objective = Objective(ours, [method], {"fitnet": method.default_weight}, 1.0, plan.views)
    images = torch.randn(4, 3, 32, 32)
    objective.setup(plan, ours.calibrate(images[:2]), theirs.calibrate(images[:2]), 10)
    with torch.no_grad():
        return objective, images, theirs(images)


def test_hint_reaches_the_layers_below_it_alone():
    """The second stage by default; everything above it learns from cross-entropy only."""
    torch.manual_seed(0)
    nets = create_model("cifar_resnet8", 10), create_model("cifar_resnet14", 10).eval()
    objective, images, taught = trained(find_method("fitnet")(), *nets)
    total, terms, _ = objective(images, torch.arange(4), *taught)
    assert total.item() == pytest.approx((terms[0] + 100 * terms[1]).item(), rel=1e-6)
    objective.gamma = 0.0
    objective.zero_grad()
    objective(images, torch.arange(4), *taught)[0].backward()
    reached = {
        name.split(".")[0]
        for name, p in nets[0].named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached == {"conv1", "bn1", "layer1", "layer2"}
    assert all(p.grad is not None for p in objective.methods.parameters())
    assert all(p.grad is None for p in nets[1].parameters())


def test_named_layers_are_summed():
    torch.manual_seed(0)
    nets = create_model("cifar_resnet8", 10), create_model("cifar_resnet14", 10).eval()
    layers = ["layer1", "layer3"], ["layer1", "layer3"]
    method = find_method("fitnet")(regressor="auto")
    objective, images, taught = trained(method, *nets, layers)
    _, terms, _ = objective(images, torch.arange(4), *taught)
    with torch.no_grad():
        features = Taps(nets[0].train(), layers[0])(images)[1]
    wanted = sum(F.mse_loss(a, b) for a, b in zip(features, taught[1], strict=True))
    assert terms[1].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_reduced_precision():
    """Under autocast the regressor runs in bfloat16, the comparison in float32."""
    torch.manual_seed(0)
    nets = create_model("cifar_resnet8", 10), create_model("cifar_resnet14", 10).eval()
    objective, images, taught = trained(find_method("fitnet")(), *nets)
    exact = objective(images, torch.arange(4), *taught)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(images, torch.arange(4), *taught)[1]
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, rtol=0.05)


def test_command_line(run_script, teacher_run):
    flags = (DISTILL, *FEW, "--amp", "--method", "hint", "--student", "cifar_resnet14",
             "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run)  # fmt: skip
    code, out, err = run_script(*flags)
    assert code == 0, err
    assert "1 * fitnet" in out and "fitnet: layer2 -> layer2" in out
    said = "fitnet: layer2 through 1x1 convolution, 32x16x16 -> 32x16x16, 1,120 parameters"
    assert said in out
    assert json.loads(out.splitlines()[-1])["last"]["loss"] > 0
    code, out, err = run_script(*flags, "--fitnet-stage", -1, "--fitnet-regressor", "off",
                                "--beta", 0.1, "--experiment", "zoo")  # fmt: skip
    assert code == 0, err
    assert "0.1 * fitnet" in out and "fitnet: layer3 -> layer3" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--fitnet-stage 0", ["fitnet stage counts from 1", "-1, the last"]),
        ("--fitnet-stage 4", ["fitnet stage 4", "3 stages"]),
        ("--fitnet-stage last", ["--fitnet-stage", "'last'"]),
        ("--fitnet-regressor maybe", ["--fitnet-regressor", "'maybe'"]),
        (
            "--fitnet-regressor off --student cifar_resnet8x4",
            ["equal shapes", "128x16x16", "32x16x16", "--fitnet-regressor auto"],
        ),
        ("--student-layers layer3 --teacher-layers fc", ["teacher layer fc", "[2, 10]"]),
    ],
)
def test_what_is_refused(refused, teacher_run, flags, words):
    refused(2, DISTILL, *FEW, "--method", "fitnet", "--teacher", "cifar_resnet8",
            "--teacher-checkpoint", teacher_run, *flags.split(), words=words)  # fmt: skip
