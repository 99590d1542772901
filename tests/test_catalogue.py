"""Every method from the command line, on pairs of networks of one family and of two."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import load_script

from kdfast.methods import find_method, method_names
from kdfast.models import create_model, save_weights

FEW = ("--train-limit", 32, "--eval-limit", 16, "-b", 16, "--epochs", 1, "--lr", 0.01)


@dataclass(frozen=True)
class Pair:
    """Teacher and student, the side of the teacher's images, and the methods that are refused."""

    teacher: str
    student: str
    side: int
    refused: dict[str, tuple[str, ...]]


# What a refusal says: the reason, and what to do instead.
UNEQUAL = {
    "fsp": ("equal channels", "use method at"),
    "layer": ("equal shapes", "--method fitnet"),
}
PAIRS = {
    "resnets": Pair("cifar_resnet20", "cifar_resnet8", 32, {}),
    "vit to resnet": Pair("vit_tiny_patch16_224", "resnet10t", 224, UNEQUAL),
    "wrn to mobilenet": Pair("cifar_wrn40_2", "cifar_mobilenetv2_half", 32, UNEQUAL),
}
CASES = [(pair, name) for pair in PAIRS for name in method_names()]


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Weights of each pair's teacher, and its heads of each kind, made once when asked for."""
    folder: Path = tmp_path_factory.mktemp("catalogue")

    def weights(pair: Pair) -> Path:
        path = folder / f"{pair.teacher}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            model = create_model(pair.teacher, 10, img_size=pair.side)
            record = {"architecture": pair.teacher, "input_size": [3, pair.side, pair.side]}
            save_weights(path, model, record | {"mean": [0.3] * 3, "std": [0.3] * 3})
        return path

    def heads(pair: Pair, kind: str) -> Path:
        run = folder / f"{pair.teacher}-{kind}"
        if not run.exists():
            flags = ("--kind", kind, "--teacher", pair.teacher, *FEW, "--output", folder)
            if kind == "linear":
                flags += ("--teacher-checkpoint", weights(pair))
            flags += ("--experiment", run.name)
            assert load_script("train/heads.py").main([str(flag) for flag in flags]) == 0
        return run

    def flags_of(pair: Pair, kind: str | None) -> tuple:
        if kind is None:
            return ("--teacher-checkpoint", weights(pair))
        run = heads(pair, kind)
        return ("--heads", run, "--teacher-checkpoint", weights(pair) if kind == "linear" else run)

    return flags_of


@pytest.mark.parametrize(("pair", "name"), CASES, ids=[f"{p}-{n}" for p, n in CASES])
def test_every_method_on_every_pair(run_script, teachers, tmp_path, pair, name):
    """A few steps end with finite terms and scores; what cannot apply is refused with a reason."""
    networks = PAIRS[pair]
    flags = teachers(networks, find_method(name).heads)
    flags += ("--teacher", networks.teacher, "--student", networks.student, "--method", name)
    code, _, err = run_script(
        "train/distill.py", *flags, *FEW, "--no-baseline", "--experiment", "x"
    )
    if words := networks.refused.get(name):
        assert code == 2 and all(word in err for word in words), err
        assert not (tmp_path / "output").exists()
        return
    assert code == 0, err
    with (tmp_path / "output/x/summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert math.isfinite(float(row[f"train_{name}"])) and float(row[f"train_{name}"]) > 0
    results = json.loads((tmp_path / "output/x/results.json").read_text())
    parameters = sum(p.numel() for p in create_model(networks.student, 10).parameters())
    assert results["parameters"] == parameters, "nothing is added to the student"
