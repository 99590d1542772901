"""Evolved generations: what is inherited, what is drawn anew, and the slim network that comes out.

Numbers in parentheses are those of the acceptance checks in the method's specification.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from kdfast.analysis.evolution import draw_generations, read_generations
from kdfast.data import eval_transform, open_data
from kdfast.errors import UserError
from kdfast.models import (
    checksum,
    create_model,
    extract_slim,
    load_weights,
    read_weights,
    reset,
    save_weights,
)
from kdfast.ops import Key
from kdfast.training import checkpoint
from kdfast.training.evolution import build_network, seed_of
from kdfast.training.objective import Objective
from kdfast.training.split_files import read_split

from conftest import ROOT, load_script  # isort: skip

SCRIPT, CLASSIFIER, REPORT = "train/evolve.py", "train/classifier.py", "analysis/report.py"
SMALL = ("--model", "cifar_resnet8", "--train-limit", 64, "--eval-limit", 64, "-b", 32)
FLAGS = (*SMALL, "--epochs", 3, "--lr", 0.1, "--sched", "evolution-cosine", "--warmup-epochs", 1,
         "--smoothing", 0.1, "--weight-decay", 5e-4, "--val-interval", 2, "--seed", 3)  # fmt: skip
RUN = ("--experiment", "run", "--output", ".")
EVOLVED = (*FLAGS, "--init", "model")  # which train/classifier.py has alone
AGAIN = (*EVOLVED, "--generations", 3, *RUN, "--resume", "auto")
# Nothing moves: the last weights of a generation are those it began with.
STILL = (*SMALL, "--epochs", 1, "--lr", 0, "--warmup-epochs", 0, "--weight-decay", 0,
         "--freeze-bn", "--no-aug")  # fmt: skip
PUBLISHED = [
    "Date Finished", "Name", "Split Rate", "Bias Split Rate", "Current Val Top 1",
    "Current Val Top 5", "Best Val Top 1", "Best Val Top 5", "Current Tst Top 1",
    "Current Tst Top 5", "Best Tst Top 1", "Best Tst Top 5", "Best Trn Top 1", "Best Trn Top 5",
]  # fmt: skip


def make(folder: Path, *flags: object) -> Path:
    """The run folder of `flags`, whose output is in `said.txt` beside it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = load_script(SCRIPT).main([str(f) for f in (*flags, "--output", folder)])
    assert code == 0
    (folder / "said.txt").write_text(said.getvalue())
    return folder / "run"


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    flags = (*EVOLVED, "--generations", 3, "--experiment", "run")
    return make(tmp_path_factory.mktemp("evolve"), *flags)


@pytest.fixture(scope="session")
def still_run(tmp_path_factory) -> Path:
    flags = (*STILL, "--generations", 2, "--experiment", "run", "--save-epochs", 0)
    return make(tmp_path_factory.mktemp("still"), *flags)


@pytest.fixture(scope="session")
def wels_run(tmp_path_factory) -> Path:
    flags = (*STILL, "--generations", 2, "--split-mode", "wels", "--split-rate", 0.3)
    flags += ("--reset-init", "construction", "--init", "kaiming-normal", "--experiment", "run")
    return make(tmp_path_factory.mktemp("wels"), *flags)


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    return shutil.copytree(whole_run, tmp_path / "run")


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def options_of(run: Path) -> dict:
    return yaml.safe_load((run / "args.yaml").read_text())["options"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def state_of(run: Path, generation: int, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / f"generation-{generation}" / f"{name}.safetensors")


def network_of(run: Path, generation: int) -> torch.nn.Module:
    model = create_model("cifar_resnet8", 10)
    model.load_state_dict(state_of(run, generation))
    return model.eval()


# Generations.


def test_generation_0_is_the_ordinary_training(run_script, whole_run):
    code, _, err = run_script(CLASSIFIER, *FLAGS, "--output", ".", "--experiment", "plain")
    assert code == 0, err
    for name in ("last", "best"):
        plain = load_file(f"plain/{name}.safetensors")
        assert checksum(plain) == checksum(state_of(whole_run, 0, name))
    ours, theirs = (rows_of(path / "summary.csv") for path in
                    (whole_run / "generation-0", Path("plain")))  # fmt: skip
    assert ours[0].keys() - theirs[0].keys() == {"train_top1", "train_top5"}
    for mine, other in zip(ours, theirs, strict=True):
        assert all(mine[k] == other[k] for k in other.keys() - {"seconds", "images_per_second"})


def test_generation_1_is_a_training_from_what_it_inherits(run_script, whole_run, tmp_path):
    """(7) Optimizer and schedule are new: an ordinary run from those weights ends with its bits."""
    split = read_split(whole_run / "masks.safetensors")
    model = network_of(whole_run, 0)
    reset(model, split.masks, Key(3, "reset", 1))
    _, metadata = read_weights(whole_run / "generation-0/last.safetensors")
    save_weights(tmp_path / "begun.safetensors", model, metadata)
    flags = (*FLAGS, "--seed", seed_of(3, 1), "--initial-checkpoint", "begun.safetensors")
    code, _, err = run_script(CLASSIFIER, *flags, "--output", ".", "--experiment", "plain")
    assert code == 0, err
    assert checksum(load_file("plain/last.safetensors")) == checksum(state_of(whole_run, 1))


def test_the_schedule_starts_anew(whole_run):
    """(7) Warm-up (e + 1) / W, then 0.5 (1 + cos(pi (e - W) / (E - W))), every time."""
    expected = [0.1, 0.1, 0.1 * 0.5 * (1 + math.cos(math.pi / 2))]
    for g in range(3):
        rows = rows_of(whole_run / f"generation-{g}/summary.csv")
        assert [float(row["lr"]) for row in rows] == pytest.approx(expected)


def test_seeds():
    assert seed_of(7, 0) == 7
    found = [seed_of(s, g) for s in range(3) for g in range(1, 40)]
    assert len(set(found)) == len(found) and all(0 <= seed < 2**31 for seed in found)
    assert seed_of(0, 1) == 739506510, "the same for ever"


def test_entries(whole_run):
    results, parent = results_of(whole_run), None
    split = read_split(whole_run / "masks.safetensors")
    assert [e["generation"] for e in results["generations"]] == [0, 1, 2]
    for g, entry in enumerate(results["generations"]):
        run = whole_run / f"generation-{g}"
        own, options = results_of(run), options_of(run)
        assert own["evolution"] == entry
        assert (entry["run"], entry["seed"]) == (str(run), seed_of(3, g))
        assert entry["checksum"] == checksum(state_of(whole_run, g))
        assert entry["parent"] == parent == options.get("parent-checksum")
        assert read_weights(run / "last.safetensors")[1]["parent"] == parent
        assert entry["masks"] == options["masks-checksum"] == split.checksum
        assert (entry["last"], entry["best"]) == (own["last"], own["best"])
        assert options["generation"] == g and "generations" not in options
        assert entry["dense"]["top1"] == entry["last"]["top1"], "digits has no test split"
        assert (entry["dense"]["parameters"], entry["slim"]["parameters"]) == (78042, 19954)
        assert entry["slim"]["operations"] < 0.3 * entry["dense"]["operations"]
        assert entry["slim"]["published_operations"] < 0.3 * entry["dense"]["published_operations"]
        for key in ("top1", "top5"):
            assert entry["masked"][key] == entry["slim"][key]
        assert entry["masked"]["loss"] == pytest.approx(entry["slim"]["loss"], rel=1e-5)
        assert entry["dense"]["images"] == entry["slim"]["images"] == 64
        parent = entry["checksum"]
    assert (results["run"], results["seed"]) == (str(whole_run), 3)
    assert results["last"] == results["generations"][-1]["last"]
    assert results["parameters"] == 78042 and results["tested_on"] == "evaluation"
    assert "evolution" not in results


def test_what_is_said(whole_run):
    lines = (whole_run.parent / "said.txt").read_text().strip().splitlines()
    results = results_of(whole_run)
    assert json.loads(lines[-1]) == results
    for line, entry in zip(lines[-4:-1], results["generations"], strict=True):
        tops = [f"{entry[kind]['top1']:.2f}" for kind in ("dense", "slim", "masked")]
        assert line.split()[:5] == [str(entry["generation"]), str(entry["seed"]), *tops]
    assert sum("digits has no test split" in line for line in lines) == 1
    log = (whole_run / "train.log").read_text()
    assert "generation 1: layer1.0.conv2.weight keeps 576 of 2,304" in log
    assert "generation 2: fc.weight keeps 320 of 640" in log


def test_generations_csv(whole_run):
    rows, entries = rows_of(whole_run / "generations.csv"), results_of(whole_run)["generations"]
    assert list(rows[0])[:14] == PUBLISHED
    assert [row["Split Rate"] for row in rows] == ["0.5", "slim"] * 3
    assert [row["kind"] for row in rows] == ["dense", "slim"] * 3
    for dense, slim, entry in zip(rows[::2], rows[1::2], entries, strict=True):
        summary = rows_of(whole_run / dense["Name"].split("/")[1] / "summary.csv")
        scored = [row for row in summary if row["eval_top1"]]
        assert len(scored) == 2
        for kind, column in (("Val", "eval_top"), ("Trn", "train_top")):
            for top in "15":
                best = max(float(row[column + top]) for row in scored)
                assert dense[f"Best {kind} Top {top}"] == f"{best:.2f}"
        for top in "15":
            assert dense[f"Current Val Top {top}"] == f"{entry['last'][f'top{top}']:.2f}"
            assert dense[f"Current Tst Top {top}"] == f"{entry['dense'][f'top{top}']:.2f}"
            assert slim[f"Current Tst Top {top}"] == f"{entry['slim'][f'top{top}']:.2f}"
            assert dense[f"Best Tst Top {top}"] == "0.00", "the test split selects nothing"
        assert slim["Bias Split Rate"] == "slim" and dense["Bias Split Rate"] == "0.5"
        filled = {key for key in PUBLISHED if slim[key]}
        assert filled == {"Date Finished", "Name", "Split Rate", "Bias Split Rate",
                          "Current Tst Top 1", "Current Tst Top 5"}  # fmt: skip
        assert float(slim["masked_loss"]) == entry["masked"]["loss"]
        assert slim["parameters"] == "19954" and dense["checksum"] == entry["checksum"]


def test_training_accuracy(still_run):
    """Means over the images of an epoch: of a network that stands still, its accuracy on them."""
    data, model = open_data("digits", train_limit=64), network_of(still_run, 1)
    _, record = read_weights(still_run / "generation-1/last.safetensors")
    transform = eval_transform((32, 32), 1.0, "bilinear", 32)
    samples = [data.train.read(i) for i in range(64)]
    images = torch.stack([transform(image) for image, _ in samples]) / 255
    labels = torch.tensor([label for _, label in samples])
    with torch.no_grad():
        logits = model((images - record["mean"][0]) / record["std"][0])
    ranked = logits.topk(5).indices == labels[:, None]
    (row,) = rows_of(still_run / "generation-1/summary.csv")
    assert float(row["train_top1"]) == pytest.approx(100 * ranked[:, 0].float().mean().item())
    assert float(row["train_top5"]) == pytest.approx(100 * ranked.any(1).float().mean().item())


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.7])
def test_label_smoothing_by_hand(eps):
    """(8)"""

    class Fixed(torch.nn.Module):
        def forward(self, logits):
            return logits, ()

    objective = Objective(Fixed(), label_smoothing=eps)
    total, *_ = objective(torch.zeros(4, 102), torch.arange(4))
    assert total.item() == pytest.approx(math.log(102), abs=1e-6)
    logits = torch.tensor([[0.25, 0.75]]).log()
    total, *_ = objective(logits, torch.tensor([1]))
    own, mean = -math.log(0.75), -(math.log(0.25) + math.log(0.75)) / 2
    assert total.item() == pytest.approx((1 - eps) * own + eps * mean, abs=1e-6)
    if eps == 0.1:
        assert total.item() == pytest.approx(0.342613, abs=1e-6)


def test_the_test_split_is_scored_and_selects_nothing(run_script, tmp_path):
    """Three lists of 8, 4 and 6 images."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4), ("test", 6)):
        lines = []
        for i in range(count):
            name = f"{split}{i}.png"
            pixels = generator.integers(0, 255, (36, 40, 3), dtype=np.uint8)
            (tmp_path / "set").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "set" / name)
            lines.append(f"{name} {'cat' if i % 2 else 'dog'}")
        (tmp_path / "set" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    flags = ("--dataset", "lists", "--data-dir", "set", "--img-size", 32, "-b", 4, "--epochs", 1,
             "--model", "cifar_resnet8", "--generations", 2, "--warmup-epochs", 0)  # fmt: skip
    code, out, err = run_script(SCRIPT, *flags, *RUN)
    assert code == 0, err
    results = json.loads(out.splitlines()[-1])
    assert results["tested_on"] == "test" and "scored on the test split" in out
    options = options_of(tmp_path / "run")
    assert (options["recipe"], options["images"]["eval"]) == ("evolution", 4)
    for g, entry in enumerate(results["generations"]):
        assert {entry[kind]["images"] for kind in ("dense", "slim", "masked")} == {6}
        (row,) = rows_of(tmp_path / f"run/generation-{g}/summary.csv")
        assert float(row["eval_loss"]) == entry["last"]["loss"] != entry["dense"]["loss"]


# What is inherited.


def test_what_is_drawn_anew(still_run):
    """Fit weights, normalisation and biases stay bit by bit; the others are uniform in (-b, b)."""
    before, after = state_of(still_run, 0), state_of(still_run, 1)
    masks = read_split(still_run / "masks.safetensors").masks
    for name, value in after.items():
        if name not in masks:
            assert torch.equal(value, before[name]), name
            continue
        kept = masks[name].dense()
        bound = 1 / math.sqrt(value[0].numel())
        assert torch.equal(value[kept], before[name][kept]), name
        new = value[~kept]
        assert (new.abs() <= bound).all() and (new != before[name][~kept]).float().mean() > 0.99
        if len(new) > 5000:
            assert new.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert len(masks) == 10


def test_epoch_0_of_a_generation_is_what_it_begins_with(still_run):
    """Where nothing moves that is what it ends with."""
    for generation in (0, 1):
        folder = still_run / f"generation-{generation}"
        begun, record = read_weights(folder / "weights/epoch-0000.safetensors")
        last = read_weights(folder / "last.safetensors")[0]
        assert checksum(begun) == checksum(last) and record["epoch"] == 0
    assert checksum(begun) != checksum(read_weights(still_run / "generation-0/last.safetensors")[0])


def test_bits_are_drawn_once(wels_run):
    """(6)"""
    masks = read_split(wels_run / "masks.safetensors").masks
    entries = results_of(wels_run)["generations"]
    assert entries[0]["masks"] == entries[1]["masks"]
    for name, mask in masks.items():
        count = math.prod(mask.shape)
        assert abs(mask.keep - 0.3) < 4 * math.sqrt(0.3 * 0.7 / count), name
    size = sum(-(-math.prod(mask.shape) // 8) for mask in masks.values())
    assert (wels_run / "masks.safetensors").stat().st_size < size + 4096, "a bit a weight"


def test_single_weights_have_no_slim_network(wels_run):
    entry = results_of(wels_run)["generations"][1]
    assert entry["slim"] is None and entry["masked"]["images"] == 64
    rows = rows_of(wels_run / "generations.csv")
    assert [row["kind"] for row in rows] == ["dense", "slim"] * 2
    assert {row["Current Tst Top 1"] for row in rows[1::2]} == {"0.00"}
    assert float(rows[1]["masked_top1"]) == results_of(wels_run)["generations"][0]["masked"]["top1"]
    assert not list(wels_run.rglob("slim*"))
    assert read_generations(wels_run / "generations.csv")["slim"] == []


def test_reset_init_construction(wels_run):
    """The new weights are those that the generation's new network has."""
    before, after = state_of(wels_run, 0), state_of(wels_run, 1)
    own = argparse.Namespace(seed=seed_of(0, 1), model="cifar_resnet8", pretrained=False,
                             img_size=None, model_kwargs={}, initial_checkpoint=None,
                             sync_bn=False, generation=1, init="kaiming-normal")  # fmt: skip
    fresh = build_network(own, 10).state_dict()
    for name, mask in read_split(wels_run / "masks.safetensors").masks.items():
        expected = torch.where(mask.dense(), before[name], fresh[name])
        assert torch.equal(after[name], expected), name


def test_init_kaiming_normal(wels_run):
    """Standard deviation sqrt(2 / fan-in), of the linear layer as well."""
    state = state_of(wels_run, 0)
    for name in ("layer3.0.conv2.weight", "layer3.0.downsample.0.weight", "fc.weight"):
        weight = state[name]
        std = math.sqrt(2 / weight[0].numel())
        assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))


# The slim network.

ALONE = """
import sys, torch
network = torch.export.load(sys.argv[1]).module()
torch.manual_seed(0)
torch.save([network(torch.randn(n, 3, 32, 32)) for n in (1, 3)], sys.argv[2])
assert not {"kdfast", "timm", "torchvision"} & set(sys.modules)
"""


def test_the_program_needs_torch_alone(whole_run, tmp_path):
    path, answers = whole_run / "generation-2/slim.pt2", tmp_path / "answers.pt"
    command = [sys.executable, "-I", "-c", ALONE, str(path), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    slim = extract_slim(
        network_of(whole_run, 2), read_split(whole_run / "masks.safetensors").masks, (3, 32, 32)
    ).eval()
    saved = load_file(whole_run / "generation-2/slim.safetensors")
    assert checksum(saved) == checksum(slim.state_dict())
    assert saved.keys() == state_of(whole_run, 2).keys()
    torch.manual_seed(0)
    for answer in torch.load(answers, weights_only=True):
        with torch.no_grad():
            expected = slim(torch.randn(len(answer), 3, 32, 32))
        assert torch.allclose(answer, expected, atol=1e-5)


def test_slim_json(whole_run):
    for g in range(3):
        known = json.loads((whole_run / f"generation-{g}/slim.json").read_text())
        saved = load_file(whole_run / f"generation-{g}/slim.safetensors")
        assert known["architecture"] == "cifar_resnet8" and known["split_rate"] == 0.5
        assert known["parent"] == checksum(state_of(whole_run, g)) and known["generation"] == g
        assert (known["classes"], known["input_size"]) == (10, [3, 32, 32])
        assert len(known["mean"]) == len(known["std"]) == 3
        assert known["parameters"] == 19954 and known["operations"] > 0
        assert known["layers"]["conv1"] == {"dense": [16, 3, 3, 3], "slim": [8, 3, 3, 3]}
        assert known["layers"]["fc"] == {"dense": [10, 64], "slim": [10, 32]}
        for name, widths in known["layers"].items():
            assert list(saved[f"{name}.weight"].shape) == widths["slim"]


# Going on.


def record_of(run: Path) -> dict:
    """All that must agree of two runs, wherever they lie and whenever they were made."""
    results = results_of(run)
    del results["run"]
    for entry in results["generations"]:
        del entry["run"], entry["finished"]
    found: dict = {"results": results}
    table = rows_of(run / "generations.csv")
    found["table"] = [{k: v for k, v in row.items() if k != "Date Finished"} for row in table]
    timing = {"seconds", "images_per_second"}
    for link in sorted(run.glob("generation-*")):
        rows = rows_of(link / "summary.csv")
        found[link.name] = [{k: v for k, v in row.items() if k not in timing} for row in rows]
        weights = [*link.glob("*.safetensors")]
        weights += checkpoint.latest(link / "checkpoints").glob("*.safetensors")
        found |= {f"{link.name} {p.name}": checksum(load_file(p)) for p in weights}
        assert (link / "slim.pt2").exists()
    return found


def test_a_finished_run_is_not_repeated(run_script, run):
    before = {p: p.read_bytes() for p in run.rglob("*.*") if p.suffix in (".csv", ".safetensors")}
    shutil.rmtree(run / "generation-1" / "checkpoints")  # a user makes room
    (run / "generations.csv").unlink()
    code, out, err = run_script(SCRIPT, *AGAIN)
    assert code == 0, err
    gone = {p for p in before if "generation-1/checkpoints" in str(p)}
    assert {p: p.read_bytes() for p in before.keys() - gone} == {
        p: content for p, content in before.items() if p not in gone
    }, "generations.csv is written again with the dates it had"
    assert "trains the whole network" not in out


def test_stopped_between_training_and_scoring(run_script, run, whole_run):
    (run / "results.json").unlink()
    (run / "generations.csv").unlink()
    shutil.rmtree(run / "generation-2")
    link = run / "generation-1"
    results = results_of(link)
    del results["evolution"]
    (link / "results.json").write_text(json.dumps(results))
    for path in link.glob("slim.*"):
        path.unlink()
    code, _, err = run_script(SCRIPT, *AGAIN)
    assert code == 0, err
    assert record_of(run) == record_of(whole_run)


def test_stopped_within_a_generation(run_script, run, whole_run):
    (run / "results.json").unlink()
    shutil.rmtree(run / "generation-2")
    link = run / "generation-1"
    (link / "results.json").unlink()
    shutil.rmtree(link / "checkpoints" / "epoch-0003")
    (link / "last.safetensors").unlink()
    code, _, err = run_script(SCRIPT, *AGAIN)
    assert code == 0, err
    assert record_of(run) == record_of(whole_run)


def test_killed_anywhere(whole_run, tmp_path):
    """Before the masks are written; in generation 0; and while generation 1 is being scored."""
    flags = [str(flag) for flag in (*AGAIN, "--checkpoint-steps", 1)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    run, left = tmp_path / "run", []
    for moment in (2, 60, 0):
        command = [sys.executable, ROOT / "tests/killed.py", f"0:{moment}", SCRIPT, *flags]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == (-9 if moment else 0), done.stderr[-2000:]
        left.append((
            (run / "masks.safetensors").exists(),
            [(link / "results.json").exists() for link in sorted(run.glob("generation-*"))],
        ))  # fmt: skip
    assert left[0] == (False, []) and left[1][0] and 0 < len(left[1][1]) < 3, left
    assert record_of(run) == record_of(whole_run)


def test_more_generations(run_script, run, whole_run):
    """From one, which is plain training, to three: the end is that of three at once."""
    for g in (1, 2):
        shutil.rmtree(run / f"generation-{g}")
    link = run / "generation-0"
    for path in (*link.glob("slim.*"), link / "results.json", run / "generations.csv",
                 run / "results.json"):  # fmt: skip
        path.unlink()
    flags = (*EVOLVED, *RUN, "--resume", "auto")
    code, out, err = run_script(SCRIPT, *flags, "--generations", 1)
    assert code == 0, err
    rows = rows_of(run / "generations.csv")
    assert [row["kind"] for row in rows] == ["dense"], "no slim row"
    entry = json.loads(out.splitlines()[-1])["generations"][0]
    assert entry["slim"] is entry["masked"] is None and not list(run.rglob("slim.*"))
    code, _, err = run_script(SCRIPT, *flags, "--generations", 3)
    assert code == 0, err
    assert record_of(run) == record_of(whole_run)
    assert rows_of(run / "generations.csv")[0]["Date Finished"] == rows[0]["Date Finished"]


def test_two_processes_equal_one(tmp_path):
    flags = ("--epochs", 1, "--generations", 2, "--freeze-bn", "--lr", 0.05)
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--nproc_per_node", 2, ROOT / SCRIPT, *SMALL[:-1], 16, *flags]
    command += ["--experiment", "two"]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout.splitlines()[-1])
    one = make(tmp_path, *SMALL, *flags, "--experiment", "run")
    assert (two["processes"], two["global_batch"]) == (2, 32)
    for mine, other in zip(two["generations"], results_of(one)["generations"], strict=True):
        assert mine["masks"] == other["masks"]
        for kind in ("dense", "slim", "masked"):
            assert mine[kind]["images"] == 64
            assert mine[kind]["loss"] == pytest.approx(other[kind]["loss"], rel=1e-3)
    run = tmp_path / "output" / "two"
    for name, value in state_of(one, 1).items():
        assert torch.allclose(value, state_of(run, 1)[name], atol=1e-4), name
    assert {p.name for p in run.iterdir()} >= {"generations.csv", "generations.png", "args.yaml"}


@pytest.mark.parametrize("mode", ["kels", "wels"])
def test_no_mask_in_a_checkpoint(run_script, mode):
    """No more than weights and optimizer and 1 %; with the bits of single weights and 2 %."""
    flags = ("--model", "cifar_resnet8x4", *SMALL[2:], "--epochs", 1, "--generations", 1)
    code, _, err = run_script(SCRIPT, *flags, "--split-mode", mode, *RUN)
    assert code == 0, err
    (saved,) = Path("run/generation-0/checkpoints").iterdir()
    state = load_file("run/generation-0/last.safetensors")
    weights = sum(value.nbytes for value in state.values())
    momentum = sum(value.nbytes for value in load_file(saved / "optimizer.safetensors").values())
    assert momentum < weights
    size = sum(path.stat().st_size for path in saved.iterdir())
    assert size < 1.01 * (weights + momentum)
    masks = Path("run/masks.safetensors").stat().st_size
    assert size + masks < {"kels": 1.01, "wels": 1.025}[mode] * (weights + momentum)


# What is refused.


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--split-rate", 0), ["--split-rate", "between 0 and 1"]),
        (("--split-rate", 1), ["--split-rate", "between 0 and 1"]),
        (("--split-rate", "nan"), ["--split-rate", "between 0 and 1"]),
        (("--split-mode", "kel"), ["--split-mode", "kels"]),
        (("--reset-init", "zero"), ["--reset-init", "uniform"]),
        (("--init", "normal"), ["--init", "kaiming-normal"]),
        (("--init", "kaiming-normal", "--pretrained"), ["--init", "--pretrained"]),
        (("--init", "kaiming-normal", "--initial-checkpoint", "x"), ["--initial-checkpoint"]),
        (("--generations", 0), ["--generations", "at least 1"]),
        (("--val-interval", 0), ["--val-interval", "at least 1"]),
        (("--warmup-epochs", 9), ["--warmup-epochs 9", "--epochs"]),
        (("--eval-only",), ["--eval-only", "train/classifier.py"]),
        (("--method", "kd"), ["--method"]),
        (("--split-rat", 0.5), ["--split-rat", "--split-rate"]),
        (("-b", 2000), ["2000", "--batch-size"]),
        (("--opt", "sgd", "--momentum", 0), ["--opt sgd", "momentum"]),
        (("--start-generation", 1), ["--start-generation"]),
        (("--resume", "nowhere"), ["nowhere"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)  # fmt: skip
def test_impossible_flags(refused, flags, words):
    code = 1 if "nowhere" in flags else 2
    refused(code, SCRIPT, "--train-limit", 64, "--eval-limit", 64, *flags, words=words)


DYNAMIC = """
import torch
class Choosy(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = torch.nn.Linear(3072, num_classes)
    def forward(self, x):
        return self.fc(x.flatten(1)) * (1 if x.sum() > 0 else 2)
def choosy(num_classes=10):
    return Choosy(num_classes)
"""


def test_a_network_that_cannot_be_exported(refused, tmp_path, monkeypatch):
    (tmp_path / "choosy_networks.py").write_text(DYNAMIC)
    monkeypatch.syspath_prepend(tmp_path)
    refused(2, SCRIPT, "--model", "choosy_networks:choosy", *SMALL[2:], words=["choosy"],
            leaves=["__pycache__", "*.pyc"])  # fmt: skip


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--split-rate", 0.8), ["run", "split-rate 0.5", "split-rate 0.8"]),
        (("--split-mode", "wels"), ["run", "split-mode kels", "split-mode wels"]),
        (("--reset-init", "construction"), ["reset-init uniform", "reset-init construction"]),
        (("--init", "kaiming-normal"), ["init model", "init kaiming-normal"]),
        (("--val-interval", 1), ["val-interval 2", "val-interval 1"]),
        (("--model", "cifar_resnet14"), ["model cifar_resnet8", "model cifar_resnet14"]),
        (("--epochs", 4), ["epochs 3", "epochs 4"]),
        (("--seed", 4), ["seed 3", "seed 4"]),
        (("--generations", 2), ["run goes on to generation-2", "--generations 3"]),
    ],
    ids=lambda value: str(value[0]),
)
def test_other_options_are_refused(refused, run, flags, words):
    refused(2, SCRIPT, *AGAIN, *flags, words=words)


def test_a_missing_parent_is_refused(refused, run):
    shutil.rmtree(run / "generation-1")
    words = ["generation-1 is missing", "generation-2", "inherited", "put it back"]
    refused(1, SCRIPT, *AGAIN, words=words)


def test_an_unfinished_parent_is_refused(refused, run):
    (run / "generation-0" / "results.json").unlink()
    refused(1, SCRIPT, *AGAIN, words=["generation-0 is not finished", "generation-1"])


def test_a_parent_without_weights_is_refused(refused, run):
    shutil.rmtree(run / "generation-2")
    (run / "results.json").unlink()
    (run / "generation-1" / "last.safetensors").unlink()
    refused(1, SCRIPT, *AGAIN, words=["generation-1/last.safetensors"])


def test_a_parent_of_other_weights_is_refused(refused, run):
    shutil.copy(run / "generation-1/last.safetensors", run / "generation-0/last.safetensors")
    refused(1, SCRIPT, *AGAIN, words=["generation-0/last.safetensors", "not what"])


def test_a_parent_of_another_architecture_is_refused(refused, run_script, run):
    flags = (*EVOLVED, "--epochs", 1, "--generations", 1, "--model", "cifar_resnet14")
    assert run_script(SCRIPT, *flags, "--experiment", "other", "--output", ".")[0] == 0
    for name in ("generation-1", "generation-2"):
        shutil.rmtree(run / name)
    shutil.rmtree(run / "generation-0")
    shutil.copytree("other/generation-0", run / "generation-0")
    refused(2, SCRIPT, *AGAIN, words=["generation-0", "cifar_resnet14", "cifar_resnet8"])
    shutil.copy("other/masks.safetensors", run / "masks.safetensors")
    refused(1, SCRIPT, *AGAIN, words=["masks.safetensors", "does not fit cifar_resnet8"])


def test_masks_that_do_not_belong_are_refused(refused, run, wels_run):
    path = run / "masks.safetensors"
    own = path.read_bytes()
    path.write_bytes(own[:40])
    refused(1, SCRIPT, *AGAIN, words=["masks.safetensors", "damaged"])
    shutil.copy(wels_run / "masks.safetensors", path)
    refused(1, SCRIPT, *AGAIN, words=["masks.safetensors", "wels", "0.3", "kels", "0.5"])
    path.unlink()
    refused(1, SCRIPT, *AGAIN, words=["masks.safetensors is missing"])
    path.write_bytes(own.replace(b"[0, 8]", b"[1, 8]", 1))
    assert path.read_bytes() != own
    refused(2, SCRIPT, *AGAIN, words=["generation-0", "masks-checksum"])


def test_damaged_results_of_a_generation(refused, run):
    (run / "generation-1" / "results.json").write_text('{"last":')
    refused(1, SCRIPT, *AGAIN, words=["generation-1/results.json", "damaged"])


# Recipes, pictures and reports.


def test_the_published_recipe(run_script):
    """Column "experiment" of the hyper-parameters; it is taken on every set but digits."""
    code, out, err = run_script(SCRIPT, "--dataset", "folder", "--print-config")
    assert code == 0, err
    published = {
        "epochs": 200, "generations": 5, "split-mode": "kels", "split-rate": 0.5,
        "opt": "momentum", "lr": 0.256, "global-batch-size": 32, "momentum": 0.9,
        "weight-decay": 1e-4, "sched": "evolution-cosine", "warmup-epochs": 5, "smoothing": 0.1,
        "init": "kaiming-normal", "reset-init": "uniform", "val-interval": 10,
        "model": "resnet18", "filter-bias-and-bn": False, "drop-last": False,
    }  # fmt: skip
    found = yaml.safe_load(out)
    assert {key: found[key] for key in published} == published
    _, out, _ = run_script(SCRIPT, "--dataset", "folder", "--print-config", "--model", "vgg11_bn")
    assert yaml.safe_load(out)["weight-decay"] == 5e-4


def test_config_goes_round(run_script, tmp_path):
    flags = ("--split-rate", 0.8, "--split-mode", "wels", "--reset-init", "construction")
    code, printed, err = run_script(SCRIPT, "--print-config", *flags)
    assert code == 0, err
    assert yaml.safe_load(printed)["generations"] == 3, "short on digits"
    (tmp_path / "own.yaml").write_text(printed)
    assert run_script(SCRIPT, "--print-config", "-c", "own.yaml")[1] == printed
    for other in (CLASSIFIER, "train/distill.py", "train/born_again.py"):
        assert run_script(other, "--print-config", "-c", "own.yaml")[0] == 0, "keys of others"


def test_the_picture_is_drawn_from_the_table_alone(whole_run, tmp_path):
    path = whole_run / "generations.csv"
    title = "cifar_resnet8 on digits, kels at 0.5"
    drawn = draw_generations(path, title)
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
    assert (whole_run / "generations.png").read_bytes() == drawn
    scores = read_generations(path)
    entries = results_of(whole_run)["generations"]
    for kind in ("dense", "slim"):
        assert scores[kind] == pytest.approx([e[kind]["top1"] for e in entries], abs=0.0051)
    published = [",".join(line.split(",")[:14]) for line in path.read_text().splitlines()]
    (tmp_path / "published.csv").write_text("\n".join(published) + "\n")
    assert draw_generations(tmp_path / "published.csv", title) == drawn


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "line 1"),
        ("Split Rate,Current Tst Top 1\n", "dense row"),
        ("Split Rate,Current Tst Top 1\n0.5,high\n", "line 2: .*'high'"),
        ("Split Rate,Current Tst Top 1\n0.5,101\n", "line 2: .*0, 100"),
        ("Split Rate,Current Tst Top 1\n0.5,nan\n", "line 2"),
        ("Split Rate,Current Tst Top 1\n0.5,10\nslim,9\n0.5,11\n", "as many slim"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, text, words):
    (tmp_path / "generations.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        draw_generations(tmp_path / "generations.csv", "")


def test_report_on_generations(run_script, run, tmp_path):
    """Each by itself: they are no repetitions of one another."""
    code, out, err = run_script(REPORT, "run")
    assert code == 0, err
    assert out.startswith("3 runs") and err == ""
    rows = rows_of(tmp_path / "report" / "report.csv")
    labels = [next(v for v in row.values() if v.startswith("none")) for row in rows]
    assert labels == [f"none (generation {g})" for g in range(3)]


def test_last_weights_serve_elsewhere(run_script, run):
    """As the refusal of --eval-only says."""
    flags = (*SMALL, "--eval-only", "--initial-checkpoint", run / "generation-2/last.safetensors")
    code, out, err = run_script(CLASSIFIER, *flags)
    assert code == 0, err
    expected = results_of(run)["generations"][2]["dense"]["top1"]
    assert json.loads(out.splitlines()[-1])["top1"] == expected
    load_weights(create_model("cifar_resnet8", 10), run / "generation-2/last.safetensors")
