"""The scripts as a user starts them: launchers, real processes, foreign images, a plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from kdfast.data import eval_transform, open_data
from kdfast.models import create_model, read_weights, save_weights

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
FEW = ("--train-limit", 192, "--eval-limit", 90, "--epochs", 1)


def launch(*command: object, cwd: Path, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        check=False,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout if code == 0 else done.stderr


def results_of(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])


def test_accelerate_launch_with_bf16(teacher_run, tmp_path):
    output = launch(
        BIN / "accelerate",
        "launch",
        "--num_processes",
        1,
        "--mixed_precision",
        "bf16",
        ROOT / "train/distill.py",
        "--train-limit",
        64,
        "--eval-limit",
        32,
        "--epochs",
        1,
        "--teacher",
        "cifar_resnet8",
        "--teacher-checkpoint",
        teacher_run,
        "--no-baseline",
        cwd=tmp_path,
    )
    results = results_of(output)
    assert results["processes"] == 1 and results["last"]["loss"] > 0
    cores = len(os.sched_getaffinity(0))
    record = yaml.safe_load((tmp_path / results["run"] / "args.yaml").read_text())["environment"]
    assert f" {cores} of " in record["cpu"], "the launcher's thread count is not the user's"
    state = load_file(tmp_path / results["run"] / "last.safetensors")
    assert all(v.dtype != torch.bfloat16 for v in state.values()), "weights stay float32"


def test_two_processes_equal_one(teacher_run, tmp_path):
    """The same global batches of all 1,437 images, an uneven last one included."""
    flags = (
        "--epochs",
        1,
        "--freeze-bn",
        "--no-baseline",
        "--teacher",
        "cifar_resnet8",
        "--teacher-checkpoint",
        teacher_run,
    )
    one = results_of(
        launch(
            sys.executable, ROOT / "train/distill.py", *flags, "--experiment", "one", cwd=tmp_path
        )
    )
    two = results_of(
        launch(
            BIN / "torchrun",
            "--nproc_per_node",
            2,
            ROOT / "train/distill.py",
            *flags,
            "--experiment",
            "two",
            cwd=tmp_path,
        )
    )
    assert one["processes"] == 1 and two["processes"] == 2
    assert one["global_batch"] == two["global_batch"] == 64
    assert one["teacher_top1"] == two["teacher_top1"], "every evaluation image counts once"
    assert two["last"]["loss"] == pytest.approx(one["last"]["loss"], rel=1e-3)
    first, second = (load_file(tmp_path / r["run"] / "last.safetensors") for r in (one, two))
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-4), name


def test_two_processes_score_the_network_they_save(tmp_path):
    """Batch normalisation differs between processes; the saved statistics are the scored ones."""
    flags = ("--model", "cifar_resnet8", *FEW, "--model-ema", "--model-ema-decay", 0.5)
    output = launch(
        BIN / "torchrun",
        "--nproc_per_node",
        2,
        ROOT / "train/classifier.py",
        *flags,
        cwd=tmp_path,
    )
    results = results_of(output)
    saved, record = read_weights(tmp_path / results["run"] / "last.safetensors")
    model = create_model("cifar_resnet8", 10)
    model.load_state_dict(saved)
    data = open_data("digits", eval_limit=90)
    transform = eval_transform((32, 32), 1.0, "bilinear", 32)
    samples = [data.eval.read(i) for i in range(90)]
    images = torch.stack([transform(image) for image, _ in samples]) / 255
    labels = torch.tensor([label for _, label in samples])
    with torch.no_grad():
        logits = model.eval()((images - record["mean"][0]) / record["std"][0])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert results["last"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_published_teacher_of_other_classes_is_refused(run_script, image_folder):
    code, _, err = run_script(
        "train/distill.py",
        "--dataset",
        "folder",
        "--data-dir",
        image_folder,
        "-b",
        3,
        "--teacher",
        "resnet18",
        "--teacher-pretrained",
        "--student",
        "resnet18",
    )
    assert code == 2 and "1000 classes" in err and "--teacher-checkpoint" in err


def test_two_processes_one_error_line_each(tmp_path):
    error = launch(
        BIN / "torchrun",
        "--nproc_per_node",
        2,
        ROOT / "train/distill.py",
        "--global-batch-size",
        63,
        cwd=tmp_path,
        code=1,
    )
    assert "distill.py: error: global batch 63 does not divide by 2 processes" in error
    assert "distill.py (process 1): error:" in error and 'File "' not in error.split("error:")[0]


def test_fashion_mnist_pair(run_script, tmp_path, monkeypatch):
    """cifar_resnet20 -> cifar_resnet8 on Fashion-MNIST's file layout, teacher from its own run."""
    from test_data import write_fashion

    images = np.random.default_rng(0).integers(0, 255, (64, 28, 28), dtype=np.uint8)
    write_fashion(tmp_path / "fashion", images, np.arange(64, dtype=np.uint8) % 10)
    common = ("--dataset", "fashion-mnist", "--data-dir", "fashion", "--epochs", 1, "-b", 16)
    code, out, err = run_script("train/classifier.py", *common, "--model", "cifar_resnet20")
    assert code == 0, err
    code, out, err = run_script(
        "train/distill.py",
        *common,
        "--teacher-checkpoint",
        results_of(out)["run"],
        "--student",
        "cifar_resnet8",
        "--method",
        "kd",
        "at",
    )
    assert code == 0, err
    assert results_of(out)["baseline_top1"] is None


def test_vit_teaches_resnet_on_a_folder(run_script, image_folder, tmp_path):
    torch.manual_seed(0)
    teacher = create_model("vit_tiny_patch16_224", 2)
    save_weights(tmp_path / "vit.safetensors", teacher, {"architecture": "vit_tiny_patch16_224"})
    code, out, err = run_script(
        "train/distill.py",
        "--dataset",
        "folder",
        "--data-dir",
        image_folder,
        "-b",
        3,
        "--epochs",
        1,
        "--teacher",
        "vit_tiny_patch16_224",
        "--teacher-checkpoint",
        "vit.safetensors",
        "--student",
        "resnet18",
        "--method",
        "kd",
        "at",
    )
    assert code == 0, err
    assert (
        "at: blocks.2 -> layer1, blocks.5 -> layer2, blocks.8 -> layer3, blocks.11 -> layer4" in out
    )
    assert results_of(out)["last"]["epoch"] == 1


def test_teacher_of_another_size_and_normalisation(run_script, teacher_run, image_folder, tmp_path):
    """A 32-pixel cifar_resnet8 with its own figures teaches resnet18 at 48 pixels."""
    torch.manual_seed(0)
    record = {
        "architecture": "cifar_resnet8",
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    }
    save_weights(tmp_path / "t.safetensors", create_model("cifar_resnet8", 2), record)
    code, _out, err = run_script(
        "train/distill.py",
        "--dataset",
        "folder",
        "--data-dir",
        image_folder,
        "-b",
        3,
        "--epochs",
        1,
        "--teacher",
        "cifar_resnet8",
        "--teacher-checkpoint",
        "t.safetensors",
        "--student",
        "resnet18",
        "--img-size",
        48,
        "--method",
        "kd",
        "at",
    )
    assert code == 0, err


def test_own_method(run_script, teacher_run, tmp_path):
    code, out, err = run_script(
        "train/distill.py",
        *FEW,
        "--plugin",
        ROOT / "docs/own_method.py",
        "--method",
        "kd",
        "similarity",
        "--similarity-power",
        2,
        "--beta",
        3,
        "--teacher",
        "cifar_resnet8",
        "--teacher-checkpoint",
        teacher_run,
        "--no-baseline",
    )
    assert code == 0, err
    assert "3 * similarity" in out
    arguments = yaml.safe_load((tmp_path / results_of(out)["run"] / "args.yaml").read_text())
    assert arguments["options"]["methods"]["similarity"] == {"beta": 3.0, "power": 2.0}
    assert len((ROOT / "docs/own_method.py").read_text().splitlines()) <= 35


def test_a_config_cannot_name_a_plugin(run_script, tmp_path):
    (tmp_path / "c.yaml").write_text("plugin: evil.py\n")
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    code, _, err = run_script("train/distill.py", "-c", "c.yaml")
    assert code == 2 and "plugin" in err and not (tmp_path / "ran").exists()


def test_digits_teacher_is_trained_once(run_script, tmp_path):
    flags = (*FEW, "--teacher", "cifar_resnet8", "--teacher-epochs", 1, "--no-baseline")
    first = run_script("train/distill.py", *flags, "--experiment", "a")
    second = run_script("train/distill.py", *flags, "--experiment", "b", "--method", "kd")
    other = run_script("train/distill.py", *flags, "--experiment", "c", "--seed", 1)
    assert first[0] == second[0] == other[0] == 0
    assert "training into" in first[1] and "taken from" in second[1] and "training into" in other[1]
    tops = [results_of(r[1])["teacher_top1"] for r in (first, second)]
    assert tops[0] == tops[1]


def test_torchcompile(run_script, teacher_run):
    code, _out, err = run_script(
        "train/distill.py",
        *FEW,
        "--teacher",
        "cifar_resnet8",
        "--teacher-checkpoint",
        teacher_run,
        "--torchcompile",
        "--no-baseline",
        "--train-limit",
        64,
        "--eval-limit",
        32,
    )
    assert code == 0, err
