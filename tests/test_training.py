"""The loop: what it leaves in the run folder, and what it must not touch."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast.data import BatchPlan, Loader, eval_transform, open_data
from kdfast.methods import find_method
from kdfast.models import InputAdapter, Taps, checksum, create_model, read_weights
from kdfast.training.objective import Objective, plan_taps
from kdfast.training.teacher import Teacher

FEW = ("--train-limit", 203, "--eval-limit", 90, "--output", "out", "--log-interval", 2)
FAST = (*FEW, "--epochs", 1, "--experiment", "run")


def weights(folder):
    return load_file(folder / "last.safetensors")


def rows(folder):
    with (folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_distillation_run(run_script, teacher_run, tmp_path):
    before = (teacher_run / "best.safetensors").read_bytes()
    code, out, err = run_script(
        "train/distill.py",
        *FAST,
        "--epochs",
        2,
        "--teacher",
        "cifar_resnet8",
        "--teacher-checkpoint",
        teacher_run,
        "--method",
        "kd",
        "at",
        "fsp",
        "logits",
        "--recipe",
        "self",
        "--no-drop-last",
        "--save-epochs",
        1,
        "--student",
        "resnet8",
        "--model-kwargs",
        "init=default",
    )
    assert code == 0, err
    run = tmp_path / "out" / "run"
    results = json.loads(out.splitlines()[-1])
    assert results == json.loads((run / "results.json").read_text())
    assert results["processes"] == 1 and results["global_batch"] == 128 and results["seed"] == 0
    assert results["parameters"] == 78042 and results["last"]["epoch"] == 2
    assert results["baseline_top1"] is not None and (run / "baseline" / "results.json").exists()
    assert 0 <= results["teacher_top1"] <= 100
    table = rows(run)
    assert list(table[0]) == [
        "epoch",
        "train_loss",
        "train_ce",
        "train_kd",
        "train_at",
        "train_fsp",
        "train_logits",
        "eval_loss",
        "eval_top1",
        "eval_top5",
        "lr",
        "images_per_second",
        "seconds",
    ]
    total = {k: float(v) for k, v in table[1].items()}
    args = yaml.safe_load((run / "args.yaml").read_text())["options"]
    weight = {n: m.get("beta", m.get("alpha")) for n, m in args["methods"].items()}
    parts = sum(weight[name] * total[f"train_{name}"] for name in weight)
    assert total["train_loss"] == pytest.approx(args["gamma"] * total["train_ce"] + parts, rel=1e-5)
    best = max(table, key=lambda row: float(row["eval_top1"]))
    assert results["best"]["top1"] == pytest.approx(float(best["eval_top1"]))
    assert (run / "weights" / "epoch-0001.safetensors").exists()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["epoch-0001", "epoch-0002"]
    assert (teacher_run / "best.safetensors").read_bytes() == before


def test_best_weights_load_with_timm(run_script, tmp_path):
    code, out, err = run_script("train/classifier.py", *FAST, "--model", "cifar_resnet8")
    assert code == 0, err
    path = tmp_path / "out" / "run" / "best.safetensors"
    model = timm.create_model("cifar_resnet8", num_classes=10, checkpoint_path=str(path)).eval()
    state, metadata = read_weights(path)
    assert checksum(model.state_dict()) == checksum(state)
    assert metadata["architecture"] == "cifar_resnet8" and metadata["dataset"] == "digits"
    assert metadata["classes"] == 10 and metadata["input_size"] == [3, 32, 32]
    data = open_data("digits")
    images = [
        eval_transform((32, 32), 1.0, "bilinear", 32)(data.eval.read(i)[0]) for i in range(90)
    ]
    x = (torch.stack(images) / 255 - metadata["mean"][0]) / metadata["std"][0]
    with torch.no_grad():
        right = model(x).argmax(1) == torch.tensor(data.eval.labels()[:90])
    assert 100 * right.double().mean() == pytest.approx(
        json.loads(out.splitlines()[-1])["best"]["top1"]
    )


def test_tensorboard_shows_every_term(run_script, teacher_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = run_script(
        "train/distill.py",
        *FAST,
        "--teacher",
        "cifar_resnet8",
        "--teacher-checkpoint",
        teacher_run,
        "--method",
        "kd",
        "at",
        "--no-baseline",
    )
    assert code == 0, err
    events = EventAccumulator(str(tmp_path / "out" / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {
        "train/loss",
        "train/ce",
        "train/kd",
        "train/at",
        "train/lr",
        "eval/top1",
        "eval/top5",
        "eval/loss",
        "train/images_per_second",
    }


@pytest.mark.parametrize(
    "extra", [(), ("--model-ema",), ("--opt", "adamw", "--lr", "0.001", "--grad-accum-steps", "2")]
)
def test_resumed_equals_uninterrupted(run_script, tmp_path, monkeypatch, extra):
    """Stopped after epoch 1 of 3 and resumed: weights, scores and CSV but for timing are equal."""
    flags = (
        "--model",
        "cifar_resnet8",
        *FEW,
        "--epochs",
        3,
        "--sched",
        "constant",
        "--no-sched-on-updates",
        *extra,
    )
    assert run_script("train/classifier.py", *flags, "--experiment", "whole")[0] == 0
    stop = run_script("train/classifier.py", *flags, "--epochs", 1, "--experiment", "cut")
    assert stop[0] == 0
    code, _out, err = run_script(
        "train/classifier.py", *flags, "--experiment", "cut", "--resume", "auto"
    )
    assert code == 0, err
    whole, cut = tmp_path / "out" / "whole", tmp_path / "out" / "cut"
    assert checksum(weights(whole)) == checksum(weights(cut))
    assert checksum(load_file(whole / "best.safetensors")) == checksum(
        load_file(cut / "best.safetensors")
    )
    timing = ("images_per_second", "seconds")
    trim = [
        [{k: v for k, v in row.items() if k not in timing} for row in rows(r)] for r in (whole, cut)
    ]
    assert trim[0] == trim[1] and len(trim[0]) == 3
    first, second = (json.loads((r / "results.json").read_text()) for r in (whole, cut))
    assert first["best"] == second["best"] and first["last"] == second["last"]


def test_resuming_before_the_first_checkpoint(run_script, tmp_path):
    """The row of an epoch whose checkpoint was never finished is written anew, not twice."""
    flags = ("train/classifier.py", *FEW, "--model", "cifar_resnet8", "--experiment", "run")
    assert run_script(*flags, "--epochs", 1)[0] == 0
    run = tmp_path / "out" / "run"
    shutil.rmtree(run / "checkpoints")
    assert run_script(*flags, "--epochs", 2, "--resume", "auto")[0] == 0
    assert [row["epoch"] for row in rows(run)] == ["1", "2"]


@pytest.mark.parametrize("change", [("--weight-decay", 0.1), ("--smoothing", 0.2), ("-b", 32)])
def test_a_resumed_run_keeps_its_options(run_script, change):
    flags = ("train/classifier.py", *FAST, "--model", "cifar_resnet8")
    assert run_script(*flags)[0] == 0
    code, _, err = run_script(*flags, *change, "--resume", "auto")
    assert code == 2 and "cannot resume" in err


def test_accumulation_equals_one_large_batch(run_script, tmp_path):
    flags = (
        *FEW,
        "--epochs",
        1,
        "--model",
        "cifar_resnet8",
        "--freeze-bn",
        "--global-batch-size",
        60,
    )
    for name, steps in (("one", 1), ("three", 3)):
        code, _, err = run_script(
            "train/classifier.py", *flags, "--experiment", name, "--grad-accum-steps", steps
        )
        assert code == 0, err
    one, three = (weights(tmp_path / "out" / name) for name in ("one", "three"))
    for name, value in one.items():
        assert torch.allclose(value, three[name], atol=2e-5), name


def test_frozen_bn_keeps_its_statistics(run_script, tmp_path):
    run_script("train/classifier.py", *FAST, "--model", "cifar_resnet8", "--freeze-bn")
    state = weights(tmp_path / "out" / "run")
    assert (state["bn1.running_mean"] == 0).all() and (state["bn1.running_var"] == 1).all()


def test_averaged_weights_are_what_is_saved(run_script, tmp_path):
    flags = ("train/classifier.py", *FEW, "--epochs", 1, "--model", "cifar_resnet8")
    run_script(*flags, "--experiment", "plain")
    run_script(*flags, "--experiment", "still", "--model-ema", "--model-ema-decay", 1)
    run_script(*flags, "--experiment", "same", "--model-ema", "--model-ema-decay", 0)
    plain, still, same = (weights(tmp_path / "out" / n) for n in ("plain", "still", "same"))
    assert checksum(same) == checksum(plain) and checksum(still) != checksum(plain)
    assert (still["bn1.running_mean"] == 0).all()


@pytest.mark.parametrize(
    "flags",
    [
        ("--channels-last",),
        ("--amp", "--train-limit", 64),
        ("--clip-grad", "1"),
        ("--smoothing", "0.1"),
        ("--opt", "adamw", "--lr", "0.003", "--epochs", "4"),
    ],
)
def test_switches_train(run_script, flags):
    code, out, err = run_script("train/classifier.py", *FAST, "--model", "cifar_resnet8", *flags)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["last"]["top5"] >= 40


def pair(names=("kd", "at"), **kwargs):
    torch.manual_seed(0)
    student, model = create_model("cifar_resnet8", 10), create_model("cifar_resnet20", 10)
    methods = [find_method(name)() for name in names]
    plan = plan_taps(methods, student, model)
    same = InputAdapter((0.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0,) * 3, (32, 32))
    teacher = Teacher(model, plan.teacher_layers, same, **kwargs)
    objective = Objective(
        Taps(student, plan.student_layers), methods, dict.fromkeys(names, 1.0), 1.0, plan.views
    )
    return objective, teacher, model


def test_teacher_contract(run_script, teacher_run, tmp_path):
    """After training, parameters and BN buffers of the teacher are bit-identical, without grad."""
    objective, teacher, model = pair()
    before = checksum(model.state_dict())
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for step in range(3):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        total, _, _ = objective(images, torch.arange(8), *teacher(images))
        total.backward()
        optimizer.step()
    assert checksum(model.state_dict()) == before
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    trained = {id(p) for p in objective.parameters()}
    assert not any(id(p) in trained for p in model.parameters())


@pytest.mark.parametrize("names", [("kd", "at"), ("crd",), ("fsp",)])
def test_folded_teacher_answers_alike(names):
    _, teacher, model = pair(names)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1, generator=draw)
                module.running_var.uniform_(0.5, 2, generator=draw)
    images = torch.randn(8, 3, 32, 32, generator=draw)
    before, live = checksum(model.state_dict()), teacher(images)
    teacher.fold(images[:2])
    assert teacher.model is not model and checksum(model.state_dict()) == before
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.model.modules())
    logits, features, heads = teacher(images)
    assert heads == ()
    for ours, theirs in zip((logits, *features), (live[0], *live[1]), strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_batch_statistics_are_not_folded():
    _, teacher, model = pair(bn="batch")
    teacher.fold(torch.randn(2, 3, 32, 32))
    assert teacher.model is model


def test_fold_teacher_changes_rounding_only(run_script, teacher_run, tmp_path):
    scores = {}
    for switch in ("--fold-teacher", "--no-fold-teacher"):
        teacher = ("--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run)
        flags = (*teacher, "--no-baseline", "--experiment", switch[2:])
        code, out, err = run_script("train/distill.py", *FAST, *flags, switch)
        assert code == 0, err
        scores[switch] = json.loads(out.splitlines()[-1])
    folded, plain = scores.values()
    assert folded["teacher_top1"] == plain["teacher_top1"]
    assert folded["last"]["loss"] == pytest.approx(plain["last"]["loss"], rel=0.02)
    assert folded["last"]["loss"] != plain["last"]["loss"]


def test_teacher_graph_changes_no_student_gradient():
    grads = []
    for keep_graph in (False, True):
        objective, teacher, model = pair()
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        if keep_graph:
            model.requires_grad_(True)
            answer = teacher.taps(images)
        else:
            answer = teacher(images)
        objective(images, torch.arange(4), *answer)[0].backward()
        grads.append([p.grad for p in objective.student.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_published_teacher_in_training_mode_drifts():
    _, teacher, model = pair(bn="batch")
    before = checksum(model.state_dict())
    teacher(torch.randn(4, 3, 32, 32))
    assert checksum(model.state_dict()) != before


def test_no_host_synchronisation_in_a_step():
    """Nothing in forward, loss and backward reads a number back from the device."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(function) or "nonzero" in str(function):
                Reads.count += 1
            return function(*args, **(kwargs or {}))

    objective, teacher, _ = pair(("kd", "at", "fsp", "logits"))
    images = torch.randn(4, 3, 32, 32)
    objective.student.calibrate(images), teacher.calibrate(images)
    with Reads():
        total, _terms, _ = objective(images, torch.arange(4), *teacher(images))
        total.backward()
    assert Reads.count == 0


def test_objective_compiles_whole():
    objective, teacher, _ = pair(("kd", "at", "fsp", "logits"))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    objective.student.calibrate(images), teacher.calibrate(images)
    answer = teacher(images)
    expected = objective.eval()(images, labels, *answer)
    got = torch.compile(objective, fullgraph=True, backend="aot_eager")(images, labels, *answer)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_evaluation_counts_every_image_once():
    from accelerate import Accelerator

    from kdfast.training.evaluate import evaluate

    data = open_data("digits")
    plan = BatchPlan(len(data.eval), 64)
    loader = Loader(data.eval, eval_transform((32, 32), 1.0, "bilinear", 32), plan, classes=10)
    labels = torch.tensor(data.eval.labels())
    calls = []

    def network(x):
        calls.append(len(x))
        start = sum(calls[:-1])
        return torch.nn.functional.one_hot(labels[start : start + len(x)], 10).float()

    scores = evaluate(network, loader, Accelerator(cpu=True), lambda x: x)
    assert scores["top1"] == 100 and sum(calls) == 360


def test_starting_from_weights_keeps_their_normalisation(run_script, tmp_path):
    flags = ("train/classifier.py", *FEW, "--epochs", 1, "--model", "cifar_resnet8")
    assert run_script(*flags, "--experiment", "a", "--mean", 0.5, 0.4, 0.3)[0] == 0
    code, _, err = run_script(
        *flags, "--experiment", "b", "--initial-checkpoint", "out/a", "--lr", 0
    )
    assert code == 0, err
    first, second = (read_weights(tmp_path / "out" / n / "last.safetensors") for n in "ab")
    assert second[1]["mean"] == first[1]["mean"] == [0.5, 0.4, 0.3]
    assert torch.equal(first[0]["fc.weight"], second[0]["fc.weight"])
