"""Distilling via intermediate classifiers: its numbers, its options, and the command line."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load_script
from safetensors.torch import load_file
from test_bad_input import DISTILL, HEADS
from test_methods import choice_of, objective_on
from torch.nn import functional as F

from kdfast import ops
from kdfast.errors import UsageError
from kdfast.methods import Outputs, Pairing, find_method
from kdfast.models import create_model

LOG3 = math.log(3)
FEW = ("--train-limit", 64, "--eval-limit", 64, "--epochs", 1)


def total(student, teacher, heads, labels, *flags):
    """The total loss that `flags` choose, of logits [N, C] through the objective."""
    objective = objective_on(choice_of("--recipe", "crd", "--method", "dih", *flags), student)
    answers = tuple((logits, logits) for logits in heads)
    images = torch.zeros(len(labels), 3, 1, 1)
    return objective(images, torch.as_tensor(labels), teacher, (), answers)[:2]


# Acceptance checks 1 to 4 of the intermediate classifiers.

SHARP, FLAT = torch.tensor([[5 * LOG3, 0.0]]), torch.zeros(1, 2)


def test_without_heads_it_is_kd():
    loss, _ = total(torch.zeros(1, 2), SHARP, [], [0])
    assert loss.item() == pytest.approx(0.950863, abs=1e-6)


@pytest.mark.parametrize("reduction, expected", [("sum", 2.822360), ("mean", 0.705590)])
def test_by_hand(reduction, expected):
    student = torch.zeros(1, 2)
    choice = choice_of("--recipe", "crd", "--method", "dih", "--dih-reduction", reduction)
    objective = objective_on(choice, student)
    heads = ((FLAT, FLAT),) * 3
    loss, terms, _ = objective(torch.zeros(1, 3, 1, 1), torch.tensor([0]), SHARP, (), heads)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert terms.tolist() == pytest.approx([math.log(2), expected], abs=1e-6), "ce counts once"
    share = 1 if reduction == "sum" else 0.25
    (gradient,) = objective.student.logits.grad.tolist()
    assert gradient == pytest.approx([-1.925 * share, 1.925 * share], abs=1e-6)


@pytest.fixture
def cohort():
    """Student, teacher, three heads and labels: random float64 logits of 5 images, 7 classes."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, *heads = torch.randn(5, 5, 7, generator=generator, dtype=torch.float64) * 3
    return student, teacher, heads, torch.tensor([0, 1, 2, 3, 6])


def term(student, teacher, heads, labels, **options):
    answers = tuple((logits, logits) for logits in heads)
    return find_method("dih")(**options)(Outputs(student), Outputs(teacher, heads=answers), labels)


def test_gradient_is_that_of_kd_against_the_mean(cohort):
    student, teacher, heads, labels = cohort
    student.requires_grad_()
    (ours,) = torch.autograd.grad(term(*cohort), student)
    mean = torch.stack([F.softmax(z / 5, 1) for z in (teacher, *heads)]).mean(0)
    kd = 0.9 * F.cross_entropy(student, labels) + 0.1 * 25 * F.kl_div(
        F.log_softmax(student / 5, 1), mean, reduction="batchmean"
    )
    (theirs,) = torch.autograd.grad(4 * kd, student)
    assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


def test_members_have_no_order_and_may_be_removed(cohort):
    student, teacher, heads, labels = cohort
    whole = term(student, teacher, heads, labels)
    assert torch.allclose(term(student, heads[1], [heads[2], teacher, heads[0]], labels), whole)
    for reduction in ("sum", "mean"):
        options = {"alphas": [0.1, 0.3, 0.0, 0.2], "reduction": reduction}
        less = {"alphas": [0.1, 0.3, 0.2], "reduction": reduction}
        without = term(student, teacher, [heads[0], heads[2]], labels, **less)
        assert torch.allclose(term(student, teacher, heads, labels, **options), without)
    assert not torch.allclose(term(student, teacher, heads, labels, alphas=[0.1] * 4), without)


def test_identical_members(cohort):
    student, teacher, _, labels = cohort
    alone = term(student, teacher, [], labels)
    assert torch.allclose(term(student, teacher, [teacher] * 3, labels), 4 * alone)
    own = term(student, student, [student] * 3, labels)
    assert torch.allclose(own, 4 * 0.9 * F.cross_entropy(student, labels))


def test_it_is_the_fused_op(cohort):
    student, teacher, heads, labels = cohort
    members = torch.stack([teacher, *heads])
    got = term(student, teacher, heads, labels, alpha=0.4, temperature=2.0)
    assert got == ops.cohort_loss(student, members, labels, 0.4, 2.0)


def test_label_smoothing(cohort):
    """It acts on the term's own cross-entropy, as beside other methods."""
    student, teacher, heads, labels = cohort
    method = find_method("dih")()
    method.setup(Pairing((), (), (), (), 7, head_layers=("a", "b", "c"), label_smoothing=0.2))
    answers = tuple((logits, logits) for logits in heads)
    smoothed = method(Outputs(student), Outputs(teacher, heads=answers), labels)
    sharp, soft = (F.cross_entropy(student, labels, label_smoothing=s) for s in (0.0, 0.2))
    assert torch.allclose(smoothed - term(*cohort), 4 * 0.9 * (soft - sharp))


# Options.


def test_flags_and_recipe(tmp_path):
    choice = choice_of("--method", "dih")
    assert (choice.gamma, choice.weights, choice.methods) == (0.0, {"dih": 1.0}, {"dih": {}})
    assert vars(find_method("dih")())["alpha"] == 0.1
    choice = choice_of("--method", "dih", "--alpha", 0.3, "--temperature", 2)
    assert choice.methods == {"dih": {"alpha": 0.3, "temperature": 2.0}}
    (tmp_path / "mine.yaml").write_text(
        "method: dih\nmethods: {dih: {alphas: [0.1, 0, 0.2], reduction: mean}}"
    )
    choice = choice_of("--config", tmp_path / "mine.yaml")
    assert choice.methods["dih"] == {"alphas": [0.1, 0.0, 0.2], "reduction": "mean"}
    again = choice_of("--config", tmp_path / "mine.yaml", "--dih-alphas", 0.5, 0.25)
    assert again.methods["dih"]["alphas"] == [0.5, 0.25]
    assert yaml.safe_load(yaml.safe_dump(again.as_yaml())) == again.as_yaml()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"alphas": [0.1, 0.1]}, "2 weights for 3 members.*layer1, layer2"),
        ({"alphas": [0.1, 0.1, 1.5]}, r"alpha 1\.5.*negative"),
        ({"alpha": 1.5}, r"alpha 1\.5.*negative"),
        ({"alphas": [0, 0, 0]}, "removes every member"),
        ({"alpha": 0}, "removes every member"),
    ],
)
def test_weights_that_cannot_be(options, words):
    pairing = Pairing((), (), (), (), 10, head_layers=("layer1", "layer2"))
    with pytest.raises(UsageError, match=words):
        find_method("dih")(**options).setup(pairing)


@pytest.mark.parametrize("value", ["much", 0.1, [0.1, "x"], [-0.1, 1], [math.nan]])
def test_lists_of_numbers_are_checked(value):
    with pytest.raises(UsageError, match="dih alphas must be"):
        find_method("dih")(alphas=value)


# The command line.


@pytest.fixture(scope="module")
def linear_run(teacher_run, tmp_path_factory):
    """Run folder of linear heads on `teacher_run`."""
    folder = tmp_path_factory.mktemp("heads")
    flags = (HEADS, "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run, *FEW)
    flags += ("--output", folder, "--experiment", "linear")
    assert load_script(HEADS).main([str(flag) for flag in flags[1:]]) == 0
    return folder / "linear"


@pytest.fixture
def dih(teacher_run, linear_run):
    return (
        *(DISTILL, "--method", "dih", "--teacher", "cifar_resnet8", "--no-baseline", *FEW),
        *("--teacher-checkpoint", teacher_run, "--heads", linear_run, "--output", "."),
    )


def test_distils_from_heads(run_script, dih, linear_run, tmp_path):
    code, out, err = run_script(*dih, "--experiment", "run")
    assert code == 0, err
    assert "linear heads on layer1, layer2, layer3" in out and "0 * ce + 1 * dih" in out
    options = yaml.safe_load((tmp_path / "run/args.yaml").read_text())["options"]
    assert len(options["heads-checksum"]) == 64 and options["heads"] == str(linear_run)
    saved = load_file(tmp_path / "run/checkpoints/epoch-0001/objective.safetensors")
    student = {f"student.model.{name}" for name in create_model("cifar_resnet8", 10).state_dict()}
    assert saved.keys() == student, "the heads are the teacher's, not the run's"


def test_seeds_are_one_row_of_a_report_and_heads_none(run_script, dih, linear_run, tmp_path):
    """Every seed may have heads of its own; a frozen teacher's heads are no network to compare."""
    for seed in (0, 1):
        assert run_script(*dih, "--seed", seed, "--experiment", f"run{seed}")[0] == 0
        at = dih.index("--heads")
        plain = [*dih[:at], *dih[at + 2 :], "--method", "none"]
        assert run_script(*plain, "--seed", seed, "--experiment", f"alone{seed}")[0] == 0
    # What other heads would have left.
    record = tmp_path / "run1/args.yaml"
    content = yaml.safe_load(record.read_text())
    content["options"]["heads-checksum"] = "0" * 64
    record.write_text(yaml.safe_dump(content))
    shutil.copytree(linear_run, tmp_path / "heads")
    assert run_script("analysis/report.py", tmp_path, "--output", tmp_path / "report")[0] == 0
    with (tmp_path / "report/report.csv").open() as file:
        none, found = csv.DictReader(file)
    assert (none["method"], none["seeds"]) == ("none", "0 1")
    assert (found["method"], found["seeds"], found["gain_kind"]) == ("dih", "0 1", "paired")
    code, _, err = run_script("analysis/report.py", tmp_path / "heads")
    assert code == 1 and "holds heads of a frozen teacher" in err


def test_the_loss_is_the_summed_one(run_script, dih, monkeypatch):
    """What the run says of its first epoch is the cohort loss on the answers of the heads."""
    seen = []
    genuine = ops.cohort_loss

    def spy(student, cohort, labels, *rest):
        value = genuine(student, cohort, labels, *rest)
        seen.append((cohort.shape, rest, value.item()))
        return value

    monkeypatch.setattr(ops, "cohort_loss", spy)
    code, out, _ = run_script(*dih, "--alpha", 0.2, "--experiment", "run", "-b", 64)
    assert code == 0
    assert [s[:2] for s in seen] == [((4, 64, 10), (0.2, 5.0, "sum"))]
    assert f"dih {seen[0][2]:.4g}" in out


def test_resume_with_other_heads(run_script, refused, dih, tmp_path, teacher_run):
    assert run_script(*dih, "--experiment", "run")[0] == 0
    flags = (HEADS, "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run, *FEW)
    assert run_script(*flags, "--seed", 1, "--output", ".", "--experiment", "others")[0] == 0
    again = (*dih, "--experiment", "run", "--resume", "auto", "--epochs", 2)
    words = ["cannot resume", "heads-checksum"]
    refused(2, *again, "--heads", "others", words=words)
    (tmp_path / "others").rename(tmp_path / "moved")
    assert run_script(*again)[0] == 0, "the path may change, the heads may not"


def test_trains_and_reuses_heads_on_digits(run_script, teacher_run, tmp_path):
    flags = (DISTILL, "--method", "dih", "--teacher", "cifar_resnet8", "--no-baseline", *FEW)
    flags += ("--teacher-epochs", 1, "--teacher-checkpoint", teacher_run)
    code, out, err = run_script(*flags, "--experiment", "a")
    assert code == 0, err
    assert "linear heads of cifar_resnet8: training into" in out
    code, out, _ = run_script(*flags, "--experiment", "b", "--dih-alphas", 0.1, 0, 0.1, 0.2)
    assert code == 0 and "linear heads of cifar_resnet8: taken from" in out
    (folder,) = Path("output/teachers").iterdir()
    assert len(list((folder / "heads").iterdir())) == 3
    options = yaml.safe_load(Path("output/b/args.yaml").read_text())["options"]
    assert options["methods"]["dih"]["alphas"] == [0.1, 0.0, 0.1, 0.2]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--method kd --heads somewhere", ["--heads", "no method", "dih"]),
        ("--method dih --dataset fashion-mnist", ["train/heads.py --kind linear", "fashion-mnist"]),
        ("--method dih --dih-alphas 0.1 0.2", ["--dih-alphas", "2 weights for 4 members"]),
        ("--method dih --alpha 2", ["alpha 2", "negative"]),
        ("--method at --dih-alphas 0.1", ["--dih-alphas", "dih is not used"]),
        ("--method dih --dih-reduction max", ["--dih-reduction", "sum", "mean"]),
    ],
)
def test_refused(refused, monkeypatch, flags, words):
    monkeypatch.setattr("kdfast.training.loop.Trainer.fit", lambda self: pytest.fail("trains"))
    refused(2, DISTILL, *flags.split(), words=words)
