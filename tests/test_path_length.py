"""Path lengths of layers: what a step's length is, what the file says, and that a resume keeps it.

Numbers in parentheses are those of the acceptance checks of the method's specification.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_resume import ROOT, TORCHRUN, command, finish
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from kdfast.errors import UsageError, UserError
from kdfast.models import create_model
from kdfast.seeding import derive_seed
from kdfast.training import checkpoint
from kdfast.training.loop import Trainer
from kdfast.training.path_length import PathLength, weighted_before

CLASSIFIER = "train/classifier.py"
LAYERS = ("layer3.0.conv2", "fc")
FEW = ("--model", "cifar_resnet8", "--train-limit", 96, "--eval-limit", 32, "-b", 32,
       "--output", ".", "--path-length", *LAYERS)  # fmt: skip


def rows_of(run: Path) -> dict[tuple[int, str], tuple[float, float]]:
    with (run / "path_length.csv").open() as file:
        return {
            (int(row["epoch"]), row["layer"]): (float(row["iterations"]), float(row["epochs"]))
            for row in csv.DictReader(file)
        }


def network(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    return model


def walk(path: PathLength, model: nn.Module, optimizer, scale: float = 1.0) -> list[list[float]]:
    """Two epochs of three steps with made-up gradients; the sum of cloned differences of each."""
    weights = [model[int(layer)].weight for layer in path.layers]
    generator = torch.Generator().manual_seed(1)
    initial = [weight.detach().double().norm() for weight in weights]
    sums = []
    for epoch in range(2):
        sums.append([0.0] * len(weights))
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + epoch + step)
            before = [weight.detach().clone() for weight in weights]
            for parameter in model[:3].parameters():
                parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()
            path.after_step()
            for i, (old, weight) in enumerate(zip(before, weights, strict=True)):
                sums[-1][i] += ((weight - old).double().norm() / initial[i]).item()
        path.close_epoch(epoch + 1)
    return sums


OPTIMIZERS = {
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "dampened": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "plain": (torch.optim.SGD, {"weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("may_differ", [False, True])
def test_the_length_of_a_step(name, may_differ):
    """(10) It is that of the cloned difference; with momentum no copy is kept to know it."""
    kind, settings = OPTIMIZERS[name]
    model = network()
    path = PathLength(model, ["0", "2", "3"])
    optimizer = kind(model.parameters(), lr=0.1, **settings)
    path.attach(optimizer, may_differ=may_differ)
    copied = any(kept is not None for kept in path._kept)
    assert copied == (may_differ or name not in ("momentum", "dampened"))
    begun = [model[i].weight.detach().clone() for i in (0, 2)]
    sums = walk(path, model, optimizer)
    found = [[row["iterations"] for row in path.rows if row["epoch"] == e] for e in (1, 2)]
    assert found[0] == pytest.approx(sums[0], rel=1e-5, abs=0)
    assert found[1] == pytest.approx(sums[1], rel=1e-5, abs=0)
    assert found[0][2] == found[1][2] == 0, "no gradient reaches the last layer"
    assert [row["iterations"] for row in path.rows[:3]] == [0, 0, 0]
    for i, (old, at) in enumerate(zip(begun, (0, 2), strict=True)):
        moved = (model[at].weight - old).double().norm() / old.double().norm()
        steps = [row["epochs"] for row in path.rows if row["layer"] == str(at)]
        assert moved.item() <= sum(steps) * (1 + 1e-6), i
        assert sum(steps) <= sum(sums[e][i] for e in (0, 1)) * (1 + 1e-6)


def test_a_frozen_layer_does_not_move():
    model = network()
    model[0].weight.requires_grad_(False)
    path = PathLength(model, ["0", "2"])
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    path.attach(optimizer)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    optimizer.step()
    path.after_step()
    assert path.sums[0] == 0 and path.sums[1] > 0 and path._kept[0] is None


def test_a_layer_that_a_step_does_not_reach_stays():
    """SGD passes it over, whatever its momentum."""
    model = network()
    path = PathLength(model, ["0", "2"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    path.attach(optimizer)
    for reached in ((0, 2), (2,), (0, 2)):
        for i in reached:
            model[i].weight.grad = torch.ones_like(model[i].weight)
        before = path.sums.clone()
        old = model[0].weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        path.after_step()
        moved = (model[0].weight - old).double().norm().item()
        assert (path.sums - before)[0].item() == pytest.approx(moved, rel=1e-5, abs=0)
        assert (path.sums - before)[1] > 0 and (moved > 0) == (0 in reached)


def test_steps_that_are_skipped_or_taken_back():
    """As gradient scaling and masks do."""
    model = network()
    weight = model[2].weight
    path = PathLength(model, ["2"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    path.attach(optimizer, may_differ=True)
    lengths = []
    for skipped, masked in ((False, False), (True, False), (False, True)):
        before, old = path.sums.clone(), weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        if not skipped:
            optimizer.step()
        if masked:
            with torch.no_grad():
                weight[:, ::2] = old[:, ::2]
        path.after_step()
        moved = (weight - old).double().norm().item()
        lengths.append((path.sums - before).item())
        assert lengths[-1] == pytest.approx(moved, rel=1e-5, abs=0)
    assert lengths[1] == 0 and lengths[2] > 0


@pytest.mark.parametrize("name", ["momentum", "plain", "nesterov"])
def test_scale_cancels(name):
    """(10) Weights and updates scaled by one number have the same path, bit for bit."""
    kind, settings = OPTIMIZERS[name]
    rows = []
    for scale in (1.0, 8.0):
        model = network(scale)
        path = PathLength(model, ["0", "2"])
        optimizer = kind(model.parameters(), lr=0.1, **settings)
        path.attach(optimizer)
        walk(path, model, optimizer, scale)
        rows.append(path.rows)
    assert rows[0] == rows[1] and rows[0][-1]["iterations"] > 0


def test_large_sums_are_exact():
    """Two million equal entries: a running float32 sum would be off by more than 1e-5."""
    layer = nn.Linear(2000, 1000, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.1)
    path = PathLength(nn.Sequential(layer), ["0"])
    expected = layer.weight.detach().double().square().sum().sqrt().item()
    assert path.norms.item() == pytest.approx(expected, rel=1e-6)


def test_weights_that_begin_at_zero_have_no_relative_path():
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(UsageError, match="--path-length 0: its weights begin at 0"):
        PathLength(nn.Sequential(layer), ["0"])


@pytest.mark.parametrize(
    ("tap", "layer"),
    [
        ("layer2.2.act2:in", "layer2.2.conv2"),
        ("layer3", "layer3.2.conv2"),
        ("bn1", "conv1"),
        ("conv1", "conv1"),
        ("conv1:in", None),
        ("fc:in", "layer3.2.conv2"),
        ("fc", "fc"),
    ],
)
def test_the_layer_whose_weights_are_meant(tap, layer):
    model = create_model("cifar_resnet20", 10).train()
    assert weighted_before(model, tap, torch.zeros(1, 3, 32, 32)) == layer
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "tap", "layer"),
    [
        ("resnet10t", "layer3.0.act2:in", "layer3.0.conv2"),
        ("resnet10t", "layer3.0", "layer3.0.conv2"),
        ("resnet10t", "layer3.0.downsample.1", "layer3.0.downsample.1"),
        ("resnet10t", "layer3.0.conv2:in", "layer3.0.conv1"),
        ("convnext_atto", "stages.1.blocks.0:in", "stages.1.downsample.1"),
    ],
)
def test_a_shortcut_is_not_meant(name, tap, layer):
    """timm runs it last; what lies on the way of all features counts, whatever its name."""
    model = create_model(name, 10).requires_grad_(False)
    assert weighted_before(model, tap, torch.zeros(1, 3, 64, 64)) == layer


# In a run.

STOPPED = (*FEW, "--epochs", 2, "--checkpoint-steps", 1, "--save-epochs", 0)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> Path:
    """Runs that were not stopped, by optimizer, once they are asked for."""
    return tmp_path_factory.mktemp("wholes")


@pytest.mark.parametrize("opt", ["momentum", "sgd"])
def test_the_file_of_a_run(run_script, tmp_path, opt):
    """Against weights cloned around every step, and against the snapshots of the epochs."""
    seen: list[float] = []
    before: list[torch.Tensor] = []

    def weight(optimizer) -> torch.Tensor:
        return optimizer.param_groups[0]["params"][-2].detach()  # that of fc

    hooks = [
        register_optimizer_step_pre_hook(lambda o, *_: before.append(weight(o).clone())),
        register_optimizer_step_post_hook(
            lambda o, *_: seen.append((weight(o) - before[-1]).double().norm().item())
        ),
    ]
    flags = (*FEW, "--epochs", 2, "--opt", opt, "--save-epochs", 0, 1, 2, "--experiment", "run")
    try:
        code, _, err = run_script(CLASSIFIER, *flags)
    finally:
        for hook in hooks:
            hook.remove()
    assert code == 0, err
    rows, saved = rows_of(tmp_path / "run"), {}
    assert list(rows) == [(epoch, layer) for epoch in (0, 1, 2) for layer in LAYERS]
    for epoch in (0, 1, 2):
        saved[epoch] = load_file(tmp_path / f"run/weights/epoch-{epoch:04d}.safetensors")
    norm = before[0].double().norm().item()
    assert (len(seen), norm) == (6, saved[0]["fc.weight"].double().norm().item())
    for epoch in (1, 2):
        steps = sum(seen[3 * epoch - 3 : 3 * epoch]) / norm
        assert rows[epoch, "fc"][0] == pytest.approx(steps, rel=1e-5)
        for layer in LAYERS:
            old, new = (saved[e][f"{layer}.weight"].double() for e in (epoch - 1, epoch))
            moved = (new - old).norm() / saved[0][f"{layer}.weight"].double().norm()
            assert rows[epoch, layer][1] == pytest.approx(moved.item(), rel=1e-5)
            assert rows[epoch, layer][0] >= rows[epoch, layer][1] > 0


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--clip-grad", 0.1, "--grad-accum-steps", 2, "-b", 16),
        ("--prune", 0.5, 1.0),
        ("--prune", 0.5, 1.0, "--clip-grad", 0.1, "--grad-accum-steps", 2, "-b", 16),
    ],
    ids=["plain", "clipped", "pruned", "pruned-clipped"],
)
def test_what_a_step_consists_of(run_script, teacher_run, tmp_path, monkeypatch, more):
    """(10) Clipped, accumulated, masked afterwards: the length is that of cloned weights."""
    sums, by_momentum, norms = [0.0] * 2, [0.0] * 2, []
    update = Trainer._update

    def measured(trainer: Trainer) -> None:
        weights = [trainer.objective.student.model.get_submodule(n).weight for n in LAYERS]
        old = [weight.detach().clone() for weight in weights]
        if not norms:
            norms.extend(weight.double().norm().item() for weight in old)
        update(trainer)
        for i, weight in enumerate(weights):
            sums[i] += (weight.detach() - old[i]).double().norm().item()
            v = trainer.optimizer.state[weight]["momentum_buffer"]
            by_momentum[i] += trainer.optimizer.param_groups[0]["lr"] * v.double().norm().item()

    monkeypatch.setattr(Trainer, "_update", measured)
    flags = (*FEW, "--epochs", 1, "--lr", 0.1, "--initial-checkpoint", teacher_run, *more)
    code, _, err = run_script(CLASSIFIER, *flags, "--sched", "constant", "--experiment", "run")
    assert code == 0, err
    rows = rows_of(tmp_path / "run")
    for i, layer in enumerate(LAYERS):
        assert rows[1, layer][0] == pytest.approx(sums[i] / norms[i], rel=1e-5)
        pruned = "--prune" in more
        assert (by_momentum[i] > 1.01 * sums[i]) == pruned, "masks take a part back"


def test_epoch_0_is_the_network_as_training_begins(run_script, tmp_path):
    flags = (*FEW[:-3], "--epochs", 1, "--seed", 3, "--save-epochs", 0, "--experiment", "run")
    code, _, err = run_script(CLASSIFIER, *flags)
    assert code == 0, err
    torch.manual_seed(derive_seed(3, "network"))
    expected = create_model("cifar_resnet8", 10).state_dict()
    path = tmp_path / "run/weights/epoch-0000.safetensors"
    saved = load_file(path)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    with safe_open(path, "pt") as file:
        record = file.metadata()
    assert (record["epoch"], record["top1"]) == ("0", "null")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert not (tmp_path / "run/path_length.csv").exists(), "nobody asked"


@pytest.mark.parametrize(
    ("opt", "when"),
    [
        ("momentum", "within an epoch"),
        ("adamw", "within an epoch"),
        ("momentum", "before its checkpoint"),
    ],
)
def test_a_resumed_run_has_the_same_path(run_script, tmp_path, monkeypatch, wholes, opt, when):
    flags = (*STOPPED, "--opt", opt)
    whole = wholes / opt
    if not whole.exists():
        code, _, err = run_script(CLASSIFIER, *flags, "--output", wholes, "--experiment", opt)
        assert code == 0, err
    with monkeypatch.context() as patch:
        saved, genuine = [], checkpoint.save

        def save(folder, position, *more, **others):
            stop = (1, 2) if when == "within an epoch" else (1, 0)
            if position == stop:
                raise UserError("stopped")
            saved.append(position)
            return genuine(folder, position, *more, **others)

        patch.setattr(checkpoint, "save", save)
        code, _, err = run_script(CLASSIFIER, *flags, "--experiment", "run")
    assert code == 1 and "stopped" in err and saved
    left = len(rows_of(tmp_path / "run"))
    assert left == 4  # epoch 1 is closed; in one case no checkpoint knows it
    code, _, err = run_script(CLASSIFIER, *flags, "--experiment", "run", "--resume", "auto")
    assert code == 0, err
    run = tmp_path / "run"
    lines = [(path / "path_length.csv").read_bytes() for path in (whole, run)]
    assert lines[0] == lines[1]
    beginnings = [load_file(path / "weights/epoch-0000.safetensors") for path in (whole, run)]
    assert all(torch.equal(value, beginnings[1][name]) for name, value in beginnings[0].items())


def test_two_processes_walk_one_path(run_script, tmp_path):
    flags = (*FEW, "--freeze-bn", "--threads", 1, "--epochs", 1)
    code, _, err = run_script(CLASSIFIER, *flags, "--experiment", "one")
    assert code == 0, err
    flags = (*flags, "--batch-size", 16, "--experiment", "two")
    finish(command(*TORCHRUN, ROOT / CLASSIFIER, *flags, cwd=tmp_path))
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, lengths in one.items():
        assert two[key] == pytest.approx(lengths, rel=1e-4), key


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("layer9.conv", ["unknown layer 'layer9.conv'"]),
        ("bn1", ["--path-length: layer with a weight matrix", "'bn1'"]),
        ("layer3", ["--path-length", "'layer3'"]),
        ("fc:in", ["--path-length fc:in", "not of its input"]),
    ],
)
@pytest.mark.parametrize("script", [CLASSIFIER, "train/distill.py"])
def test_bad_layers(refused, script, layer, words):
    teacher = ("--teacher", "cifar_resnet8") if script != CLASSIFIER else ()
    flags = ("--model", "cifar_resnet8", *teacher, "--path-length", layer)
    refused(2, script, *flags, words=words)


@pytest.mark.parametrize("script", [CLASSIFIER, "train/distill.py"])
def test_an_average_of_weights_has_no_path(refused, script):
    """Snapshots would be of the average, and lengths of the weights behind it."""
    flags = ("--model", "cifar_resnet8", "--model-ema", "--path-length", "fc")
    refused(2, script, *flags, words=["--path-length", "--model-ema", "average"])
    flags = ("--recipe", "knowledge", "--dataset", "cifar10", "--model-ema")
    refused(2, script, *flags, words=["--path-length", "recipe", "--model-ema"])


@pytest.mark.parametrize("average", [True, False])
def test_method_layer_measures_no_path_of_an_average(run_script, teacher_run, tmp_path, average):
    flags = ("--model", "cifar_resnet8", "--teacher", "cifar_resnet8", "--method", "layer")
    flags += ("--teacher-checkpoint", teacher_run, "--train-limit", 64, "--eval-limit", 32)
    flags += ("-b", 32, "--epochs", 1, "--baseline", "--output", ".", "--experiment", "run")
    flags += ("--model-ema",) * average
    code, _, err = run_script("train/distill.py", *flags)
    assert code == 0, err
    for folder in ("run", "run/baseline"):
        assert (tmp_path / folder / "last.safetensors").exists()
        assert (tmp_path / folder / "path_length.csv").exists() != average


@pytest.mark.parametrize("script", [CLASSIFIER, "train/distill.py"])
def test_patience_is_of_plateau(refused, script):
    flags = ("--model", "cifar_resnet8", "--sched", "cosine", "--patience-epochs", 3)
    refused(2, script, *flags, words=["--patience-epochs", "--sched plateau"])
