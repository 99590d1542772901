"""Magnitude pruning: which weights go, and that they stay zero however the rest is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from kdfast.errors import UsageError
from kdfast.models import checksum, create_model, load_weights, read_weights
from kdfast.models.pruning import BelowSensitivity, prune_magnitude

from conftest import ROOT  # isort: skip

SCRIPT = "train/classifier.py"
FEW = ("--model", "cifar_resnet8", "--train-limit", 64, "--eval-limit", 64, "-b", 16)


def prunable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of convolutions and linear layers by name."""
    return {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def by_rule(state: dict[str, torch.Tensor], conv: float, fc: float) -> dict[str, torch.Tensor]:
    """Which weights the rule keeps, written out: |w| >= sensitivity * population std."""
    kept = {}
    for name in prunable(create_model("cifar_resnet8", 10)):
        weight = state[name].double()
        std = (weight - weight.mean()).square().mean().sqrt()
        kept[name] = weight.abs() >= (fc if weight.dim() == 2 else conv) * std
    return kept


def require_pruned(path: Path, kept: dict[str, torch.Tensor]) -> None:
    """The zeros of a weights file are those of `kept`, and no others."""
    state = load_file(path)
    for name, mask in kept.items():
        assert torch.equal(state[name] != 0, mask), name


@pytest.fixture(scope="module")
def dense(teacher_run) -> dict[str, torch.Tensor]:
    return load_file(teacher_run / "best.safetensors")


@pytest.fixture(scope="module")
def kept(dense) -> dict[str, torch.Tensor]:
    return by_rule(dense, 0.5, 1.0)


@pytest.fixture
def prune(run_script, teacher_run):
    """Run the script on the network of `teacher_run`; returns its results."""

    def run(name: str, *flags: object) -> dict:
        start = ("--initial-checkpoint", teacher_run, "--prune", 0.5, 1.0, "--output", ".")
        code, out, err = run_script(SCRIPT, *FEW, *start, "--experiment", name, *flags)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    return run


# The rule.


def test_the_threshold_by_hand():
    """(2, -2, 1, -1): mean 0, population std sqrt(2.5) = 1.581, the sample's 1.826."""
    weight = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    masks = [
        BelowSensitivity(s).compute_mask(weight, torch.ones_like(weight)).tolist()[0]
        for s in (0.63, 0.64, 1.2, 1.27)
    ]
    assert masks == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_what_is_pruned(dense, teacher_run):
    model = create_model("cifar_resnet8", 10)
    load_weights(model, teacher_run / "best.safetensors")
    names = [name for name, _ in model.named_parameters()]
    masks = prune_magnitude(model, 0.2, 1.0)
    assert [name for name, _ in model.named_parameters()] == names, "plain names, in their order"
    assert not any("mask" in name for name in model.state_dict())
    kept = by_rule(dense, 0.2, 1.0)
    assert masks.masks().keys() == kept.keys()
    for name, value in model.state_dict().items():
        expected = dense[name] * kept[name] if name in kept else dense[name]
        assert torch.equal(value, expected), name
    total = sum(mask.numel() for mask in kept.values())
    gone = sum(int((~mask).sum()) for mask in kept.values())
    assert masks.zero_share() == pytest.approx(gone / total, rel=1e-12)
    assert 0.1 < masks.zero_share() < 0.3


def test_nothing_is_pruned_at_zero():
    model = create_model("cifar_resnet8", 10)
    before = checksum(model.state_dict())
    assert prune_magnitude(model, 0, 0).zero_share() == 0
    assert checksum(model.state_dict()) == before


def test_networks_that_cannot_be_pruned():
    with pytest.raises(UsageError, match="BatchNorm2d has no convolution"):
        prune_magnitude(nn.BatchNorm2d(3), 0.2, 1.0)
    model = create_model("cifar_resnet8", 10)
    before = checksum(model.state_dict())
    with pytest.raises(UsageError, match="1000 of linear layers prunes every weight of fc"):
        prune_magnitude(model, 0.2, 1000)
    assert checksum(model.state_dict()) == before


# Training.


@pytest.mark.parametrize(
    "flags",
    [
        ("--opt", "momentum", "--momentum", 0.9, "--weight-decay", 1e-2, "--lr", 0.1),
        ("--opt", "adamw", "--lr", 0.01, "--model-ema", "--model-ema-decay", 0.5),
        ("--amp", "--grad-accum-steps", 2, "-b", 8, "--clip-grad", 1, "--channels-last"),
    ],
    ids=["momentum", "adamw-ema", "amp"],
)
def test_zeros_stay_zero(prune, tmp_path, dense, kept, flags):
    results = prune("run", "--epochs", 2, "--save-epochs", 1, 2, *flags)
    run = tmp_path / "run"
    for name in ("last", "best", "weights/epoch-0001", "weights/epoch-0002"):
        require_pruned(run / f"{name}.safetensors", kept)
    trained = load_file(run / "last.safetensors")
    for name, mask in kept.items():
        moved = trained[name][mask] != dense[name][mask]
        assert moved.float().mean() > 0.9, f"{name} is trained"
    zeros = sum(int((~mask).sum()) for mask in kept.values())
    share = zeros / sum(mask.numel() for mask in kept.values())
    assert results["zero_share"] == pytest.approx(share, rel=1e-12)


def test_what_the_weights_say(prune, tmp_path, dense):
    results = prune("run", "--epochs", 1)
    state, record = read_weights(tmp_path / "run/best.safetensors")
    assert record["prune"] == [0.5, 1.0] and record["zero_share"] == results["zero_share"]
    assert record["architecture"] == "cifar_resnet8" and record["parent"] == checksum(dense)
    assert state.keys() == dense.keys()
    path = str(tmp_path / "run/best.safetensors")
    model = timm.create_model("cifar_resnet8", num_classes=10, checkpoint_path=path)
    assert checksum(model.state_dict()) == checksum(state)
    options = yaml.safe_load((tmp_path / "run/args.yaml").read_text())["options"]
    assert options["prune"] == [0.5, 1.0] and options["parent-checksum"] == checksum(dense)


def test_resumed_as_if_never_stopped(prune, tmp_path, kept):
    prune("whole", "--epochs", 2, "--sched", "constant")
    prune("parts", "--epochs", 1, "--sched", "constant")
    prune("parts", "--epochs", 2, "--sched", "constant", "--resume", "auto")
    require_pruned(tmp_path / "parts/last.safetensors", kept)
    whole, parts = (load_file(tmp_path / f"{n}/last.safetensors") for n in ("whole", "parts"))
    assert checksum(whole) == checksum(parts)


def test_no_other_network_is_resumed(prune, refused, tmp_path, teacher_run):
    prune("run", "--epochs", 1)
    other = ("--initial-checkpoint", teacher_run / "last.safetensors", "--prune", 0.4, 1.0)
    flags = (*FEW, *other, "--output", ".", "--experiment", "run", "--epochs", 2)
    refused(2, SCRIPT, *flags, "--resume", "auto", words=["cannot resume", "run"])


def test_two_processes(tmp_path, teacher_run, kept):
    torchrun = Path(sys.executable).parent / "torchrun"
    flags = [*FEW[:-2], "-b", 8, "--initial-checkpoint", teacher_run, "--prune", 0.5, 1.0]
    flags += ["--epochs", 1, "--output", tmp_path, "--experiment", "run", "--model-ema"]
    words = [torchrun, "--nproc_per_node", 2, ROOT / SCRIPT, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(word) for word in words], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["processes"] == 2
    require_pruned(tmp_path / "run/last.safetensors", kept)


def test_run_folders_of_their_own(run_script, teacher_run, tmp_path):
    few = (*FEW, "--epochs", 1, "--output", ".")
    start = ("--initial-checkpoint", teacher_run)
    assert run_script(SCRIPT, *few, *start)[0] == 0
    assert run_script(SCRIPT, *few, *start, "--prune", 0.2, 1.0)[0] == 0
    name = "classifier-digits-cifar_resnet8-s0"
    assert {p.name for p in tmp_path.iterdir()} >= {name, f"{name}-pruned"}


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--prune", 0.2, 1.0), ["--prune", "--initial-checkpoint", "--pretrained"]),
        (("--prune", 0.2), ["--prune", "expected 2 arguments"]),
        (("--prune", 0.2, -1), ["--prune", "from 0 up"]),
        (("--prune", 0.2, "much"), ["--prune", "much"]),
        (("--prune", 0.2, 1.0, "--eval-only"), ["--eval-only", "--prune"]),
    ],
)
def test_usage(refused, flags, words):
    refused(2, SCRIPT, *FEW, *flags, words=words)


def test_too_much(refused, teacher_run):
    flags = ("--initial-checkpoint", teacher_run, "--prune", 100, 1.0)
    refused(2, SCRIPT, *FEW, *flags, words=["100 of convolutions", "conv1", "lower"])
