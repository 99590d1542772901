"""Trans-classifiers: the spliced network, what is trained of it, and `train/transclassifier.py`.

Numbers in parentheses are those of the acceptance checks in the method's specification.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from test_resume import records_of
from torch.nn import functional as F

from kdfast.analysis.runs import read_runs
from kdfast.analysis.tails import draw_accuracies, read_accuracies
from kdfast.data import eval_transform, open_data
from kdfast.errors import UsageError, UserError
from kdfast.models import (
    Splice,
    TransNet,
    checksum,
    create_model,
    load_weights,
    read_weights,
    save_weights,
    split_at,
)
from kdfast.training import checkpoint
from kdfast.training.setup import Inputs
from kdfast.training.tail import Tail, check_tail
from kdfast.training.tapped import Tapped
from kdfast.training.transclassifier import choose_orders

from conftest import ROOT, load_script  # isort: skip

SCRIPT, CLASSIFIER, TRANSNET = (
    "train/transclassifier.py",
    "train/classifier.py",
    "train/transnet.py",
)
FEW = ("--train-limit", 64, "--eval-limit", 64, "-b", 32)
LAYER_A, LAYER_B = "layer2.0.act2:in", "layer2.1.act2:in"
# Trained anew from what it has, so that a single epoch shows.
FLAGS = ("-b", 32, "--epochs", 2, "--lr", 1e-3, "--seed", 3)
RUN = ("--experiment", "run", "--output", ".")


def call(name: str, *flags: object) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert load_script(name).main([str(flag) for flag in flags]) == 0
    return said.getvalue()


@pytest.fixture(scope="session")
def trained(teacher_run, tmp_path_factory) -> Path:
    """A folder with b/, a cifar_resnet14, and transnet/, K = 2, from the teacher's run to it."""
    folder = tmp_path_factory.mktemp("transnet")
    out = ("--output", folder)
    flags = ("--model", "cifar_resnet14", "--epochs", 1, "--train-limit", 256, "--seed", 1)
    call(CLASSIFIER, *flags, *out, "--experiment", "b")
    flags = ("--checkpoint-a", teacher_run, "--checkpoint-b", folder / "b", "--layers", 2)
    call(TRANSNET, *flags, *FEW, "--epochs", 2, "--lr", 1e-3, *out, "--experiment", "transnet")
    return folder


@pytest.fixture(scope="session")
def whole_run(trained, tmp_path_factory) -> Path:
    """All sub-runs of `trained`; what the script said is in said.txt beside it."""
    folder = tmp_path_factory.mktemp("tails")
    said = call(SCRIPT, trained / "transnet", *FLAGS, "--output", folder, "--experiment", "run")
    (folder / "said.txt").write_text(said)
    return folder / "run"


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    return shutil.copytree(whole_run, tmp_path / "run")


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def options_of(run: Path) -> dict:
    return yaml.safe_load((run / "args.yaml").read_text())["options"]


def network_at(path: Path) -> torch.nn.Module:
    record = read_weights(path)[1]
    model = create_model(record["architecture"], record["classes"])
    load_weights(model, path)
    return model.eval()


def transnet_at(run: Path) -> TransNet:
    state, record = read_weights(run / "best.safetensors")
    net = TransNet(record["channels"], record["layers"], record["kernel_size"])
    net.load_state_dict(state)
    return net


# The spliced network.


MLP = torch.nn.Sequential(
    torch.nn.Flatten(), torch.nn.Linear(768, 24), torch.nn.ReLU(inplace=True),
    torch.nn.Dropout(), torch.nn.Linear(24, 7),
)  # fmt: skip


@pytest.mark.parametrize(
    "name, layer, size",
    [
        ("cifar_resnet8", "layer2.0.act2:in", 32),
        ("cifar_vgg8", "block3.0", 32),
        ("test_resnet", "layer3.0.act3:in", 64),
        ("vectors", "1", 16),
    ],
)
def test_the_tail_on_the_raw_feature_is_the_network(name, layer, size):
    """(10) Bitwise; before an activation, before a normalisation, and of vectors."""
    torch.manual_seed(0)
    network, images = (
        MLP if name == "vectors" else create_model(name, 7),
        torch.randn(3, 3, size, size),
    )
    network.eval()
    head, tail = split_at(network, layer)
    feature = head(images)
    assert torch.equal(tail(feature), network(images))
    trainable = Tail(network, layer).eval()
    assert torch.equal(trainable(feature)[0], network(images))
    assert torch.equal(trainable.model(images), network(images))


class Passing(torch.nn.Module):
    """A Trans-Net that gives the feature back, in two orders."""

    convs = (None, None)

    def forward(self, x):
        return x

    def orders(self, x):
        return torch.stack([0.25 * x, 0.75 * x])


@torch.no_grad()
def test_splice():
    torch.manual_seed(0)
    a, b = create_model("cifar_resnet8", 10).eval(), create_model("cifar_resnet14", 10).eval()
    net, images = TransNet(32), torch.randn(4, 3, 32, 32)
    net.gate_logits.copy_(torch.tensor([1.0, -1.0]))
    head, tail = split_at(a, LAYER_A)[0], split_at(b, LAYER_B)[1]
    orders = net.orders(head(images))
    for mask in ((1, 0, 0), (0, 1, 0), (1, 0, 1), (True, True, False)):
        expected = tail(sum(order for order, keep in zip(orders, mask, strict=True) if keep))
        found = Splice(head, net, tail, mask)(images)
        assert found.shape == (4, 10) and torch.allclose(found, expected, atol=1e-5)
    whole = Splice(head, net, tail, (1, 1, 1))(images)
    assert torch.equal(whole, tail(net(head(images))))
    assert not torch.allclose(whole, expected, atol=1e-2)
    own = split_at(b, LAYER_B)
    assert torch.equal(Splice(own[0], Passing(), own[1], (1, 1))(images), b(images)), "(10)"
    state = Splice(head, net, tail, (1, 1, 1)).state_dict()
    assert any(key.startswith("transnet.convs") for key in state)


@pytest.mark.parametrize(
    "mask, words",
    [
        ((1, 0), "order mask 10 .* K = 3 .*as many"),
        ((1, 0, 0, 0), "order mask 1000 .* K = 3"),
        ((), "K = 3"),
        ((0, 0, 0), "000 keeps no order.* K = 3"),
        ((1, 2, 0), "120 .* 0s and 1s"),
    ],
)
def test_masks_that_do_not_fit(mask, words):
    with pytest.raises(UsageError, match=words):
        Splice(torch.nn.Identity(), TransNet(4), torch.nn.Identity(), mask)


def test_default_orders():
    assert choose_orders(None, 3) == ["100", "110", "111"]
    assert choose_orders(None, 1) == ["1"]
    assert choose_orders(["011"], 3) == ["011"]


# What is trained.


def test_only_the_tail_trains():
    torch.manual_seed(0)
    network = create_model("cifar_resnet8", 10).eval()
    before = checksum(network.state_dict())
    tail = Tail(network, LAYER_A)
    own = {f"layers.model.{name}" for name in network.state_dict()
           if name.startswith(("layer3", "fc"))}  # fmt: skip
    assert set(tail.state_dict()) == own
    trained = {name for name, p in tail.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in network.named_parameters()
                       if name.startswith(("layer3", "fc"))}  # fmt: skip
    tail.train()
    logits, _ = tail(torch.randn(4, 32, 16, 16))
    logits.sum().backward()
    assert all(p.grad is not None for p in tail.parameters())
    assert checksum(network.state_dict()) == before, "the tail is of a copy"
    started, found = network.state_dict(), tail.model.state_dict()
    moved = {name for name in found if not torch.equal(found[name], started[name])}
    assert moved == {n for n in found if n.startswith("layer3") and ("running" in n or "num_" in n)}
    assert not tail.model.layer1.training and tail.model.layer3.training


def test_dropout_is_live_in_training():
    """Also that of the network's own code, which is no layer."""
    torch.manual_seed(0)
    network = create_model("test_resnet", 10, drop_rate=0.5)
    feature = split_at(network, "layer3")[0](torch.randn(2, 3, 64, 64))
    for tail, x in ((Tail(network, "layer3"), feature), (Tail(MLP, "1"), torch.randn(2, 24))):
        x = x.detach()
        assert not torch.equal(tail.train()(x)[0], tail(x)[0])
        assert torch.equal(tail.eval()(x)[0], tail(x)[0])


def test_a_layer_with_nothing_behind_it():
    with pytest.raises(UsageError, match="no weights behind layer 'fc'"):
        Tail(create_model("cifar_resnet8", 10), "fc")


class ChannelsLast(torch.nn.Module):
    """Maps [N,H,W,C] between its layers, as timm's `output_fmt` says."""

    output_fmt = "NHWC"

    def __init__(self):
        super().__init__()
        self.stem, self.block = torch.nn.Conv2d(3, 6, 1), torch.nn.Linear(6, 6)
        self.fc = torch.nn.Linear(6, 10)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        return self.fc(self.block(x).mean((1, 2)))


def test_what_is_watched_is_not_always_what_the_tail_takes():
    inputs = Inputs((8, 8), (0.5,) * 3, (0.5,) * 3)
    tapped = Tapped("b", ChannelsLast(), "block", inputs, (6, 8, 8), "", None, 10)
    with pytest.raises(UsageError, match=r"'block' of B .* 6x8x8.* another --layer-b"):
        check_tail(tapped)
    check_tail(Tapped("b", ChannelsLast(), "stem", inputs, (6, 8, 8), "", None, 10))


# A run.


def test_subruns(whole_run, trained, teacher_run):
    results = results_of(whole_run)
    assert [entry["orders"] for entry in results["subsets"]] == ["10", "11", "own"]
    names = ["orders-10", "orders-11", "own"]
    assert sorted(path.name for path in whole_run.iterdir() if path.is_dir()) == names
    for name, entry in zip(names, results["subsets"], strict=True):
        part = whole_run / name
        own, options = results_of(part), options_of(part)
        assert entry["run"] == str(part) == own["run"]
        assert own["tested"]["last"] == entry["last"]
        assert options["orders"] == [entry["orders"]] and "own" not in options
        assert options["model"] == "cifar_resnet14"
        assert entry["checksum"] == checksum(load_file(part / "last.safetensors"))
        for kind in ("last", "best"):
            assert entry[kind]["epoch"] == own[kind]["epoch"]
            # digits has no test split: what is scored from images is what the cache gives, rounded.
            assert entry[kind]["loss"] == pytest.approx(own[kind]["loss"], rel=1e-2)
    last = results_of(whole_run / "orders-11")
    assert (results["last"], results["best"]) == (last["last"], last["best"])
    assert results["run"] == str(whole_run) and results["tested_on"] == "evaluation"
    assert results["subsets"][-1]["before"] == {
        key: results["b"][key] for key in ("top1", "top5", "loss", "images")
    }
    assert results["parameters"] > results["trained_parameters"] > 0
    recorded = options_of(whole_run)
    assert recorded["transnet-checksum"] == checksum(transnet_at(trained / "transnet").state_dict())
    assert recorded["a-checksum"] == results["a"]["checksum"]
    assert recorded["a-checksum"] == checksum(load_file(teacher_run / "best.safetensors"))
    assert recorded["b-checksum"] == checksum(load_file(trained / "b/best.safetensors"))
    assert recorded["images"] == {"train": 64, "eval": 64, "classes": 10}, "those of RUN"


def test_epoch_0_is_the_whole_network_b(run_script, trained, tmp_path):
    flags = (*FLAGS, *RUN, "--epochs", 1, "--orders", "11", "--save-epochs", 0, 1)
    code, _, err = run_script(SCRIPT, trained / "transnet", *flags)
    assert code == 0, err
    b = checksum(read_weights(trained / "b/best.safetensors")[0])
    for part in ("orders-11", "own"):
        state, record = read_weights(tmp_path / "run" / part / "weights/epoch-0000.safetensors")
        assert checksum(state) == b and (record["epoch"], record["top1"]) == (0, None)
        after = read_weights(tmp_path / "run" / part / "weights/epoch-0001.safetensors")[0]
        assert checksum(after) != b


def test_the_head_of_b_is_untouched_and_not_saved(whole_run, trained):
    b = load_file(trained / "b/best.safetensors")
    for name in ("orders-10", "own"):
        part = whole_run / name
        after = load_file(part / "last.safetensors")
        assert after.keys() == b.keys()
        behind = {key for key in b if key.startswith(("layer3", "fc"))}
        assert {key for key in b if not torch.equal(b[key], after[key])} == behind
        saved = checkpoint.latest(part / "checkpoints")
        state = load_file(saved / "objective.safetensors")
        assert {key.rpartition("model.")[2] for key in state} == behind
        moments = load_file(saved / "optimizer.safetensors")
        weights = [key for key in behind if "running" not in key and "num_" not in key]
        assert sum("exp_avg_sq" in key for key in moments) == len(weights)


def test_weights_say_what_they_are(whole_run, trained, teacher_run):
    path = whole_run / "orders-10" / "best.safetensors"
    model = timm.create_model("cifar_resnet14", num_classes=10, checkpoint_path=str(path))
    assert checksum(model.state_dict()) == checksum(load_file(path))
    record = read_weights(path)[1]
    net = transnet_at(trained / "transnet")
    assert record["kind"] == "tail" and record["orders"] == "10"
    assert record["transnet"]["checksum"] == checksum(net.state_dict())
    assert record["parent"] == record["b"]["checksum"]
    assert (record["a"]["layer"], record["layer"]) == (LAYER_A, LAYER_B)
    own = read_weights(whole_run / "own" / "best.safetensors")[1]
    assert own["orders"] == "own" and "transnet" not in own and "a" not in own


def scores_by_hand(network: torch.nn.Module, inputs: dict) -> dict[str, float]:
    data = open_data("digits", eval_limit=64)
    transform = eval_transform((32, 32), 1.0, "bilinear", 32)
    samples = [data.eval.read(i) for i in range(64)]
    images = torch.stack([transform(image) for image, _ in samples]) / 255
    mean, std = (torch.tensor(inputs[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    labels = torch.tensor([label for _, label in samples])
    with torch.no_grad():
        logits = network((images - mean) / std)
    ranked = logits.topk(5).indices == labels[:, None]
    return {
        "top1": 100 * ranked[:, 0].double().mean().item(),
        "top5": 100 * ranked.any(1).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }


def test_scores_equal_a_direct_computation(whole_run):
    """Before and after, from images on, with networks rebuilt from what the files record."""
    results = results_of(whole_run)
    for kind in ("a", "b"):
        path = Path(results[kind]["path"])
        found = scores_by_hand(network_at(path), read_weights(path)[1])
        assert {key: results[kind][key] for key in found} == pytest.approx(found, rel=1e-5)
    for entry in results["subsets"][:2]:
        weights = Path(entry["run"]) / "best.safetensors"
        record = read_weights(weights)[1]
        net = transnet_at(Path(record["transnet"]["path"]))
        head = split_at(network_at(Path(record["a"]["path"])), record["a"]["layer"])[0]
        mask = [int(digit) for digit in record["orders"]]
        for path, expected in ((record["b"]["path"], "before"), (weights, "best")):
            tail = split_at(network_at(Path(path)), record["layer"])[1]
            found = scores_by_hand(Splice(head, net, tail, mask), record["a"])
            assert {key: entry[expected][key] for key in found} == pytest.approx(found, rel=1e-4)
    before = [entry["before"]["loss"] for entry in results["subsets"]]
    assert len(set(before)) == 3
    assert all(entry["last"]["loss"] != entry["before"]["loss"] for entry in results["subsets"])


def test_frozen_parts_stay_bit_by_bit(run_script, trained, monkeypatch):
    """(10)"""
    script, kept = load_script(SCRIPT), []
    genuine = script.open_transnet

    def opening(*args):
        opened = genuine(*args)
        nets = {"a": opened.a.network, "b": opened.b.network, "g": opened.net}
        kept.append((nets, {name: checksum(net.state_dict()) for name, net in nets.items()}))
        return opened

    monkeypatch.setattr(script, "open_transnet", opening)
    flags = ("--orders", "11", "--epochs", 1, "--lr", 0.1, "--features", "live")
    code, _, err = run_script(SCRIPT, trained / "transnet", *FLAGS, *flags, *RUN)
    assert code == 0, err
    ((nets, before),) = kept
    for name, net in nets.items():
        assert checksum(net.state_dict()) == before[name]
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters()), name
        assert not any(module.training for module in net.modules()), name


def test_table_and_chart(whole_run):
    lines = (whole_run.parent / "said.txt").read_text().strip().splitlines()
    results = results_of(whole_run)
    assert json.loads(lines[-1]) == results
    assert sum("digits has no test split" in line for line in lines) == 1
    with (whole_run / "transclassifier.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["A raw", "B raw", "orders 10", "orders 11", "B own"]
    assert {row["split"] for row in rows} == {"evaluation"}
    for row, entry in zip(rows[2:], results["subsets"], strict=True):
        for state in ("before", "last", "best"):
            for key in ("top1", "top5", "loss"):
                assert float(row[f"{state}_{key}"]) == entry[state][key]
        shown = [f"{entry[s][t]:.2f}" for s in ("before", "last", "best") for t in ("top1", "top5")]
        (said,) = [line for line in lines if line.startswith(row["name"])]
        assert said.split()[2:8] == shown
    assert float(rows[0]["before_top1"]) == results["a"]["top1"] and rows[0]["last_top1"] == ""
    page = (whole_run / "transclassifier.md").read_text()
    assert f"| B raw | {results['b']['top1']:.2f} |" in page and "no test split" in page
    title = "cifar_resnet14 on digits, tail behind layer2.1.act2:in"
    drawn = draw_accuracies(whole_run / "transclassifier.csv", title)
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
    assert (whole_run / "transclassifier.png").read_bytes() == drawn
    assert (
        read_accuracies(whole_run / "transclassifier.csv")["B own"]["best"]
        == (results["subsets"][-1]["best"]["top1"])
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "line 1: expected columns"),
        ("name,before_top1,last_top1,best_top1\nA raw,1,,\n", "B raw"),
        ("name,before_top1,last_top1,best_top1\nA raw,1,,\nB raw,high,,\n", "line 3: .*'high'"),
        ("name,before_top1,last_top1,best_top1\nA raw,101,,\nB raw,1,,\n", "line 2: .*0, 100"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, text, words):
    (tmp_path / "transclassifier.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        draw_accuracies(tmp_path / "transclassifier.csv", "")


def test_averaged_weights_in_bfloat16(run_script, trained):
    flags = ("--orders", "10", "--no-own", "--epochs", 1, "--amp", "--model-ema")
    flags += ("--model-ema-decay", 0.5, "--val-interval", 5, "--features", "live")
    code, out, err = run_script(SCRIPT, trained / "transnet", *FLAGS, *flags, *RUN)
    assert code == 0, err
    assert [e["orders"] for e in json.loads(out.splitlines()[-1])["subsets"]] == ["10"]
    b, after = (load_file(p) for p in (trained / "b/best.safetensors",
                                       Path("run/orders-10/last.safetensors")))  # fmt: skip
    assert torch.equal(b["conv1.weight"], after["conv1.weight"])
    assert not torch.equal(b["fc.weight"], after["fc.weight"])


# Going on, and several processes.


def test_a_killed_run_ends_as_an_uninterrupted_one(run_script, whole_run, trained, tmp_path):
    """Killed in the second sub-run."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    flags = [trained / "transnet", *FLAGS, *RUN, "--resume", "auto"]
    command = [sys.executable, ROOT / "tests/killed.py", "0:55", SCRIPT, *flags]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr[-2000:]
    run = tmp_path / "run"
    left = [(run / name / "results.json").exists() for name in ("orders-10", "orders-11")]
    assert left == [True, False] and (run / "orders-11").exists(), list(run.rglob("*"))
    assert "orders 10" in (run / "transclassifier.csv").read_text()
    code, _, err = run_script(SCRIPT, *flags)
    assert code == 0, err
    # The folder of all has no rows of its own.
    assert parts_of(run) == parts_of(whole_run)
    assert [e["best"] for e in results_of(run)["subsets"]] == [
        e["best"] for e in results_of(whole_run)["subsets"]
    ]


def parts_of(run: Path) -> dict[str, dict]:
    return {path.name: records_of(path) for path in run.iterdir() if path.is_dir()}


def test_more_orders(run_script, run, trained):
    """A finished run is gone on with: nothing that is there is trained again."""
    weights = {path: path.read_bytes() for path in run.glob("*/last.safetensors")}
    flags = ("--orders", "10", "11", "01", "--resume", "auto")
    code, out, err = run_script(SCRIPT, trained / "transnet", *FLAGS, *RUN, *flags)
    assert code == 0, err
    entries = json.loads(out.splitlines()[-1])["subsets"]
    assert [entry["orders"] for entry in entries] == ["10", "11", "01", "own"]
    assert weights == {path: path.read_bytes() for path in weights}
    assert "finished before" in out and "orders 01" in (run / "transclassifier.csv").read_text()


def test_two_processes_equal_one(run_script, trained, tmp_path):
    flags = ("--epochs", 1, "--lr", 1e-3, "--freeze-bn", "--orders", "11", "--no-own", "--seed", 3)
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--nproc_per_node", 2, ROOT / SCRIPT, trained / "transnet", *flags]
    done = subprocess.run(
        [str(word) for word in (*command, "-b", 16, "--experiment", "two", "--output", ".")],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout.splitlines()[-1])
    code, out, err = run_script(SCRIPT, trained / "transnet", *flags, "-b", 32, *RUN)
    assert code == 0, err
    one = json.loads(out.splitlines()[-1])
    assert (two["processes"], two["global_batch"]) == (2, 32)
    for mine, other in zip(two["subsets"], one["subsets"], strict=True):
        for state in ("before", "last", "best"):
            assert mine[state]["images"] == 64
            assert mine[state]["loss"] == pytest.approx(other[state]["loss"], rel=1e-3)
    ours, theirs = (load_file(tmp_path / run / "orders-11/last.safetensors")
                    for run in ("run", "two"))  # fmt: skip
    for key, value in ours.items():
        assert torch.allclose(value, theirs[key], atol=1e-4), key


# Flags and recipes.


def printed(run_script, *flags: object) -> dict:
    code, out, err = run_script(SCRIPT, "--print-config", *flags)
    assert code == 0, err
    return yaml.safe_load(out)


def test_the_published_settings(run_script):
    published = {
        "epochs": 100, "opt": "adam", "lr": 1e-5, "weight-decay": 1e-4, "sched": "log",
        "decades": 2.0, "global-batch-size": 64, "val-interval": 10, "own": True,
    }  # fmt: skip
    found = printed(run_script, "--dataset", "folder")
    assert {key: found[key] for key in published} == published and "orders" not in found
    short = printed(run_script)
    assert short["recipe"] == "digits" and short["epochs"] < 10
    assert {key: short[key] for key in ("opt", "sched")} == {"opt": "adam", "sched": "log"}


def test_other_scripts_keep_their_settings_of_digits(run_script):
    code, out, _ = run_script(CLASSIFIER, "--print-config")
    assert code == 0 and yaml.safe_load(out)["opt"] == "momentum"


def test_config_goes_round(run_script, tmp_path):
    code, out, err = run_script(SCRIPT, "--print-config", "--orders", "011", "100", "--no-own")
    assert code == 0, err
    assert yaml.safe_load(out)["orders"] == ["011", "100"]
    (tmp_path / "own.yaml").write_text(out)
    assert run_script(SCRIPT, "--print-config", "-c", "own.yaml")[1] == out
    for other in (CLASSIFIER, TRANSNET, "train/distill.py"):
        assert run_script(other, "--print-config", "-c", "own.yaml")[0] == 0, "keys of others"


def test_flags_of_the_run_hold_unless_given(run_script, trained):
    net = trained / "transnet"
    for path in (net, net / "best.safetensors"):
        found = printed(run_script, path)
        assert (found["train-limit"], found["eval-limit"]) == (64, 64)
        assert found["feature-dir"] == str(trained / "features"), "its caches"
        assert found["lr"] == printed(run_script)["lr"], "not how it was trained"
    found = printed(run_script, net, "--train-limit", 32, "--feature-dir", "here")
    assert (found["train-limit"], found["feature-dir"]) == (32, "here")
    assert "train-limit" not in printed(run_script)


def test_data_flags_of_the_run_win_over_recipes(run_script, trained, tmp_path):
    """Recipe refinement squashes images of birds; g was trained on the middles of them."""
    net = shutil.copytree(trained / "transnet", tmp_path / "net")
    record = yaml.safe_load((net / "args.yaml").read_text())
    record["options"] |= {"dataset": "cub200", "crop-mode": "center", "crop-pct": 0.875}
    (net / "args.yaml").write_text(yaml.safe_dump(record))
    found = printed(run_script, net)
    assert (found["recipe"], found["lr"]) == ("refinement", 1e-5)
    assert (found["crop-mode"], found["crop-pct"]) == ("center", 0.875)
    assert printed(run_script, net, "--crop-mode", "border")["crop-mode"] == "border"
    (tmp_path / "own.yaml").write_text("crop-pct: 0.5\n")
    assert printed(run_script, net, "-c", "own.yaml")["crop-pct"] == 0.5
    (net / "args.yaml").write_text(yaml.safe_dump(record | {"layout": 99}))
    assert "newer kdfast" in run_script(SCRIPT, net, "--print-config")[2]


def test_weights_of_an_epoch_are_of_their_run(run_script, trained, tmp_path):
    net = shutil.copytree(trained / "transnet", tmp_path / "net")
    (net / "weights").mkdir(exist_ok=True)
    file = shutil.copy(net / "best.safetensors", net / "weights/epoch-0001.safetensors")
    assert printed(run_script, file)["train-limit"] == 64


def test_weights_of_another_set_are_refused(refused, trained, tmp_path):
    net, record = (
        transnet_at(trained / "transnet"),
        read_weights(trained / "transnet/best.safetensors")[1],
    )
    save_weights(tmp_path / "g.safetensors", net, record | {"dataset": "cifar10"})
    refused(2, SCRIPT, "g.safetensors", words=["cifar10", "digits", "--dataset cifar10"])


# What is refused.


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--orders", "100"), ["--orders", "100", "K = 2"]),
        (("--orders", "1"), ["--orders", "K = 2"]),
        (("--orders", "10", "00"), ["--orders", "00", "keeps no order"]),
        (("--orders", "11", "11"), ["--orders", "repeats"]),
        (("--eval-only",), ["--eval-only"]),
        (("--pair", "same"), ["--pair", "transnet"]),
        (("--hflip", 0.5), ["--hflip"]),
        (("--ratio", 1, 1), ["--ratio", "as they are"]),
        (("--crop-padding", 1), ["--crop-padding", "as they are"]),
        (("--layer-b", "layer1"), ["--layer-b", "no effect", "transnet"]),
        (("--model", "cifar_resnet8"), ["--model", "no effect"]),
        (("--order", "11"), ["--order", "--orders"]),
        (("-b", 2000), ["2000", "--batch-size"]),
        (("--epochs", 0), ["--epochs", "at least 1"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_impossible_flags(refused, trained, flags, words):
    refused(2, SCRIPT, trained / "transnet", "--features", "live", *flags, words=words)


@pytest.mark.parametrize("mask", ["12a", "x1", "00", ""])
def test_what_is_no_mask_is_refused_before_anything_is_trained(refused, tmp_path, mask):
    refused(2, SCRIPT, "--orders", "110", mask, "--print-config", words=["--orders", mask])


def test_reports_pass_tails_over(whole_run, teacher_run):
    runs, unfinished = read_runs([whole_run, teacher_run])
    assert [run.path for run in runs] == [teacher_run] and not unfinished
    with pytest.raises(UserError, match="holds a tail"):
        read_runs([whole_run])


def test_several_transnets(refused):
    refused(2, SCRIPT, "--pair", "generations", words=["several", "run folder"])
    refused(2, SCRIPT, "--checkpoint-b", "x", "y", words=["several", "run folder"])


def test_other_sets_need_a_run(refused, image_folder):
    flags = ("--dataset", "folder", "--data-dir", image_folder)
    refused(2, SCRIPT, *flags, words=["train/transnet.py", "--dataset folder"])


def test_what_is_no_transnet(refused, trained, tmp_path):
    refused(1, SCRIPT, "nowhere", words=["nowhere"])
    refused(1, SCRIPT, trained / "b", words=["b", "Trans-Net"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/args.yaml").write_text("options: 3\n")
    refused(1, SCRIPT, "broken", words=["broken/args.yaml", "damaged"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--orders", "10"), ["run has orders-11 too", "--orders", "11"]),
        (("--no-own",), ["run has own too", "--no-own"]),
        (("--epochs", 3), ["epochs 2", "epochs 3"]),
        (("--lr", 0.1), ["lr 0.001", "lr 0.1"]),
        (("--seed", 4), ["seed 3", "seed 4"]),
        (("--features", "live"), ["features cache", "features live"]),
    ],
    ids=lambda value: str(value[0]),
)
def test_other_options_are_refused(refused, run, trained, flags, words):
    flags = (*FLAGS, *RUN, "--resume", "auto", *flags)
    refused(2, SCRIPT, trained / "transnet", *flags, words=words)


def test_another_transnet_is_refused(refused, run, trained, tmp_path):
    other = shutil.copytree(trained / "transnet", tmp_path / "other")
    path = other / "best.safetensors"
    net, record = transnet_at(other), read_weights(path)[1]
    with torch.no_grad():
        net.gate_logits.add_(1)
    save_weights(path, net, record)
    flags = (*FLAGS, *RUN, "--resume", "auto", "--feature-dir", trained / "features")
    refused(2, SCRIPT, other, *flags, words=["run", "transnet-checksum"])


@pytest.mark.parametrize("kind", ["last", "best"])
def test_weights_that_were_swapped_are_refused(refused, run, trained, kind):
    shutil.copy(run / f"own/{kind}.safetensors", run / f"orders-10/{kind}.safetensors")
    flags = (*FLAGS, *RUN, "--resume", "auto")
    refused(1, SCRIPT, trained / "transnet", *flags, words=[f"orders-10/{kind}", "not what"])


def test_an_existing_folder_is_refused(refused, run, trained):
    words = ["run exists", "--resume auto"]
    refused(2, SCRIPT, trained / "transnet", *FLAGS, *RUN, words=words)
