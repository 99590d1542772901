"""Sigma training at the command line: runs, resuming, networks, flags, bad input."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT, load_script
from safetensors import safe_open

from kdfast.errors import UserError
from kdfast.models import Taps, create_model, load_weights, read_weights, save_weights
from kdfast.training import sigma_training
from kdfast.training import snapshots as snapshot_module
from kdfast.training.parser import Parser
from kdfast.training.setup import load_data
from kdfast.training.sigma_files import (
    read_candidates,
    read_options,
    read_path_length,
    read_result,
    read_sigma,
    result_path,
)
from kdfast.training.sigma_flags import parse_sigma, sigma_flags
from kdfast.training.sigma_training import SigmaTrainer, accepts, candidates_of
from kdfast.training.snapshots import (
    LONGER,
    PUBLISHED,
    Watched,
    accept_from,
    adopt_data,
    distilled_layers,
    find_snapshots,
)

SIGMA = "train/sigma.py"
SHORT = [
    "--grid", 8, "--samples", 2, "--steps", 3, "--more-steps", 1, "--candidates", 12,
    "--images", 3, "--image-batch", 2, "--sigma-lr", 4e-4,
]  # fmt: skip
# One image at a time, at the last checkpoint.
SINGLE = [
    "--grid", 8, "--samples", 2, "--steps", 1, "--more-steps", 0, "--candidates", 12,
    "--images", 3, "--image-batch", 1, "--checkpoints", 2,
]  # fmt: skip


def call(script: str, *flags: object) -> str:
    """What a command prints that has to succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = load_script(script).main([str(flag) for flag in flags])
    assert code == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Run folder of a cifar_resnet8 with snapshots 0, 1, 2 and path length."""
    folder = tmp_path_factory.mktemp("sigma-networks")
    flags = ["--model", "cifar_resnet8", "--epochs", 2, "--train-limit", 256, "--eval-limit", 32]
    flags += ["--save-epochs", 0, 1, 2, "--path-length", "layer2.0.conv2"]
    call("train/classifier.py", *flags, "--output", folder, "--experiment", "net")
    return folder / "net"


@pytest.fixture(scope="module")
def other(trained) -> Path:
    """The same network with weights that are a little different."""
    run = trained.parent / "other"
    shutil.copytree(trained, run)
    generator = torch.Generator().manual_seed(1)
    for path in run.glob("weights/*.safetensors"):
        weights, record = read_weights(path)
        for value in weights.values():
            if value.ndim > 1:
                value *= 1 + 0.3 * torch.randn(value.shape, generator=generator)
        network = create_model("cifar_resnet8", 10)
        network.load_state_dict(weights)
        save_weights(path, network, record)
    return run


@pytest.fixture(scope="module")
def student(trained, tmp_path_factory) -> Path:
    """A student distilled at fc, which only --teacher-layers names, with its baseline."""
    folder = tmp_path_factory.mktemp("sigma-student")
    flags = ["--student", "cifar_resnet8", "--teacher", "cifar_resnet8", "--epochs", 1, "--lr", 0.1]
    flags += ["--teacher-checkpoint", trained, "--train-limit", 256, "--eval-limit", 32]
    flags += ["--method", "layer", "--teacher-layers", "fc", "--save-epochs", 0, 1]
    call("train/distill.py", *flags, "--output", folder, "--experiment", "student")
    return folder / "student"


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> tuple[Path, str]:
    """A finished run that nothing interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("sigma")
    out = call(SIGMA, trained, *SHORT, "--output", folder, "--experiment", "whole")
    return folder / "whole", out


@pytest.fixture(scope="module")
def single(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sigma-single")
    call(SIGMA, trained, *SINGLE, "--output", folder, "--experiment", "f", "--memory", 1e-5)
    return folder / "f"


@pytest.fixture
def finished(single, tmp_path) -> Path:
    """A finished run to be changed, in the place of experiment f."""
    (tmp_path / "output").mkdir()
    return Path(shutil.copytree(single, tmp_path / "output/f"))


RESUMED = [*SINGLE, "--experiment", "f", "--resume", "auto"]


def edited(run: Path, path: Path, **options: object) -> Path:
    """A copy of `run` in `path` whose record says something else; None removes an option."""
    shutil.copytree(run, path)
    edit(path, **options)
    return path


def edit(run: Path, **options: object) -> None:
    record = yaml.safe_load((run / "args.yaml").read_text())
    for key, value in options.items():
        record["options"][key.replace("_", "-")] = value
    record["options"] = {k: v for k, v in record["options"].items() if v is not None}
    (run / "args.yaml").write_text(yaml.safe_dump(record))


def contents(run: Path) -> dict[str, bytes]:
    kept = [*run.glob("results/**/*.*"), *run.glob("candidates.csv")]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def statuses(run: Path) -> list[str]:
    return [row["status"] for row in read_candidates(run)]


def accepted(run: Path) -> list[int]:
    return [row["id"] for row in read_candidates(run) if row["status"] == "accepted"]


def reject(monkeypatch, rejected: dict[str, set[int]]) -> None:
    """Have the images `rejected[name]` rejected by network `name`, and no others."""

    def judge(self, row, epoch):
        if row["id"] in rejected[self.watched.snapshots.name]:
            row["status"] = "rejected"

    monkeypatch.setattr(SigmaTrainer, "_judge", judge)


# Runs.


def test_candidates_and_acceptance():
    random.seed(0)
    assert candidates_of(range(1437), 500, 0) == random.sample(range(1437), 500)
    assert len(candidates_of(range(7), 500, 0)) == 7
    cells = np.zeros((4, 4), bool)
    cells[:2] = True
    even = np.zeros((4, 4))
    assert accepts(even, cells)
    assert not accepts(np.where(cells, 1e-9, 0), cells)
    assert not accepts(np.where(cells, np.nan, 0), cells)
    assert not accepts(even, np.zeros((4, 4), bool)) and not accepts(even, ~np.zeros((4, 4), bool))
    # Means 0.75 and 0; of the lowest quarter, two cells of eight, -1 and 0.
    rough = np.where(cells, 1.0, 0)
    rough[0, :2] = -1, -1
    rough[1, 0] = 2.0
    assert not accepts(rough, cells) and not accepts(rough, cells, 0.9)
    assert accepts(rough, cells, 0.25) and accepts(rough, cells, 0.01)
    rough[1, 1] = np.nan
    assert not accepts(rough, cells, 0.25)


def test_a_run_from_end_to_end(whole, run_script, trained, tmp_path):
    run, out = whole
    results = json.loads(out.splitlines()[-1])
    assert results["layer"] == "layer2.0.act2:in" and results["checkpoints"] == [0, 1, 2]
    assert results == json.loads((run / "results.json").read_text())
    rows = list(csv.DictReader((run / "candidates.csv").open()))
    assert [int(row["index"]) for row in rows] == candidates_of(range(256), 12, 0)
    accepted = [i for i, row in enumerate(rows) if row["status"] == "accepted"]
    assert len(accepted) == results["accepted"] == 3
    assert "unfinished" not in {row["status"] for row in rows[: accepted[-1] + 1]}
    read = read_sigma(run)
    assert read.entropy.shape == (len(read.ids), 3, 8, 8) and read.entropy.dtype == np.float64
    assert np.isfinite(read.entropy[read.accepted]).all() and read.accepted.sum() == 3
    assert [i for i, a in zip(read.ids, read.accepted, strict=True) if a] == accepted
    for maps, cells in zip(
        read.entropy[read.accepted], read.foreground[read.accepted], strict=True
    ):
        assert accepts(maps[2], cells)  # of 2 epochs the last is examined
    for maps, cells in zip(
        read.entropy[~read.accepted], read.foreground[~read.accepted], strict=True
    ):
        assert not accepts(maps[2], cells)
    assert read.epochs == [0, 1, 2] and read.path_length[0] == 0
    assert (np.diff(read.path_length) > 0).all()
    assert (run / f"results/image-{accepted[0]:05d}/epoch-0002.png").is_file()
    assert read.record["finished"] and not list(run.rglob("*.tmp"))
    pixels = np.load(run / f"results/image-{accepted[0]:05d}/image.npz")["image"]
    assert read.record["inputs"]["size"] == [*pixels.shape[:2]]
    with safe_open(trained / "last.safetensors", "pt") as file:
        trained_on = file.metadata()
    for name in ("mean", "std"):
        assert read.record["inputs"][name] == json.loads(trained_on[name])
    # Again, with other batches: the same images, the same sigmas.
    code, *_ = run_script(SIGMA, trained, *SHORT, "--image-batch", 1, "--chunk", 1,
                          "--experiment", "t")  # fmt: skip
    again = read_sigma(tmp_path / "output/t")
    assert code == 0 and again.ids == read.ids
    assert np.allclose(again.entropy, read.entropy, atol=1e-5, equal_nan=True)


def test_rejected_images_can_be_kept(run_script, trained, tmp_path, monkeypatch):
    verdicts = iter([True, False, False, True])
    monkeypatch.setattr(sigma_training, "accepts", lambda *_: next(verdicts))
    flags = [*SHORT, "--candidates", 4, "--images", 2, "--experiment", "k", "--keep-rejected"]
    assert run_script(SIGMA, trained, *flags)[0] == 0
    read = read_sigma(tmp_path / "output/k")
    assert np.isfinite(read.entropy).all() and read.accepted.tolist() == [True, False, False, True]


def test_no_image_accepted(run_script, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sigma_training, "accepts", lambda *_: False)
    flags = [*SINGLE, "--candidates", 2, "--images", 1, "--experiment", "n"]
    code, _, err = run_script(SIGMA, trained, *flags)
    assert code == 1 and "none of 2 candidates was accepted" in err
    read = read_sigma(tmp_path / "output/n")
    assert len(read.ids) == 2 and not read.accepted.any()


def test_an_image_that_the_layer_does_not_react_to_is_rejected(
    run_script, trained, tmp_path, monkeypatch
):
    feature, solve, solved = Watched.feature, sigma_training.solve_sigma, []

    def counted(*args, **kwargs):
        solved.append(1)
        return solve(*args, **kwargs)

    def dead_for_the_first(self, images):
        return feature(self, images) * float(len(solved) > 1)

    monkeypatch.setattr(Watched, "feature", dead_for_the_first)
    monkeypatch.setattr(sigma_training, "solve_sigma", counted)
    code, out, err = run_script(SIGMA, trained, *SINGLE, "--images", 1, "--experiment", "d")
    assert code == 0, err
    row = read_candidates(tmp_path / "output/d")[0]
    assert row["status"] == "rejected" and "delta2 is 0" in row["reason"]
    assert "checkpoint 2" in row["reason"]
    result = json.loads(out.splitlines()[-1])
    assert result["accepted"] == 1 and result["tried"] == result["rejected"] + 1


# Several networks.


def test_networks_of_their_own_and_in_common(run_script, trained, other, tmp_path, monkeypatch):
    reject(monkeypatch, {"net": {0, 3}, "other": {1, 3}})
    flags = [trained, other, *SINGLE, "--candidates", 8, "--images", 2]
    code, out, err = run_script(SIGMA, *flags, "--experiment", "own")
    assert code == 0, err
    first, second = (tmp_path / f"output/own-{name}" for name in ("net", "other"))
    assert (accepted(first), accepted(second)) == ([1, 2], [0, 2])
    assert statuses(first)[3:] == ["unfinished"] * 5
    results = [json.loads(line) for line in out.splitlines()[-2:]]
    assert [result["network"] for result in results] == ["net", "other"]
    assert [result["accepted"] for result in results] == [2, 2]
    assert not any("accepted_in_common" in result for result in results)

    flags += ["--in-common"]
    code, out, err = run_script(SIGMA, *flags, "--experiment", "both")
    assert code == 0, err
    pairs = [tmp_path / f"output/both-{name}" for name in ("net", "other")]
    assert list(map(accepted, pairs)) == [[1, 2, 4], [0, 2, 4]]
    assert [statuses(run)[5:] for run in pairs] == [["unfinished"] * 3] * 2
    for line, run in zip(out.splitlines()[-2:], pairs, strict=True):
        result = json.loads(line)
        assert (result["accepted"], result["rejected"], result["tried"]) == (3, 2, 5)
        assert result["accepted_in_common"] == 2
        assert json.loads((run / "results.json").read_text()) == result
        assert read_sigma(run).accepted.sum() == 3

    # What each accepted by itself goes on to be accepted by all.
    code, _, err = run_script(SIGMA, *flags, "--experiment", "own", "--resume", "auto")
    assert code == 0, err
    for run, alone in zip(pairs, (first, second), strict=True):
        assert contents(alone) == contents(run)
        assert read_options(alone)["in-common"] is True


def test_one_that_cannot_be_resumed_leaves_the_others_as_they_are(
    run_script, refused, trained, other, tmp_path, monkeypatch
):
    reject(monkeypatch, {"net": set(), "other": set()})
    flags = [*SINGLE, "--images", 1, "--in-common", "--experiment", "e"]
    assert run_script(SIGMA, trained, other, *flags)[0] == 0
    edit(tmp_path / "output/e-other", **{"sigma-lr": 1.0})
    runs = [tmp_path / f"output/e-{name}" for name in ("net", "other")]
    before = [path.read_bytes() for run in runs for path in sorted(run.glob("*.*"))]
    flags = [trained, other, *flags, "--resume", "auto"]
    refused(2, SIGMA, *flags, words=["e-other", "sigma-lr"])
    refused(2, SIGMA, *[f for f in flags if f != "--in-common"], words=["e-other", "sigma-lr"])
    assert [path.read_bytes() for run in runs for path in sorted(run.glob("*.*"))] == before


def test_a_signal_at_the_end_stops_before_the_next(
    run_script, trained, other, tmp_path, monkeypatch
):
    genuine = SigmaTrainer.finish

    def finish(self, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return genuine(self, **more)

    reject(monkeypatch, {"net": set(), "other": set()})
    monkeypatch.setattr(SigmaTrainer, "finish", finish)
    flags = [*SINGLE, "--images", 1, "--experiment", "e"]
    code, _, err = run_script(SIGMA, trained, other, *flags)
    assert code == 143 and "SIGTERM" in err
    assert (tmp_path / "output/e-net/results.json").is_file()
    assert not (tmp_path / "output/e-other").exists()


def test_the_default_lambda_may_be_named(run_script, finished, trained):
    assert run_script(SIGMA, trained, *RESUMED, "--memory", 1e-5, "--lambda", 6)[0] == 0


def test_out_of_memory(run_script, trained, monkeypatch):
    def solve(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(sigma_training, "solve_sigma", solve)
    code, _, err = run_script(SIGMA, trained, *SINGLE, "--experiment", "m")
    assert code == 1 and "CUDA out of memory; " in err and "--image-batch" in err


def test_none_in_common(run_script, trained, other, tmp_path, monkeypatch):
    reject(monkeypatch, {"net": {0}, "other": {1}})
    flags = [*SINGLE, "--candidates", 2, "--images", 1, "--in-common", "--experiment", "n"]
    code, _, err = run_script(SIGMA, trained, other, *flags)
    assert code == 1 and "none of 2 candidates was accepted by all networks" in err
    assert accepted(tmp_path / "output/n-net") == [1]


def test_equal_names_cannot_share_a_folder(refused, trained, other, tmp_path):
    """They are known by the last part of their paths."""
    for name, run in (("a", trained), ("b", other)):
        shutil.copytree(run, tmp_path / name / "net")
    runs = [tmp_path / "a/net", tmp_path / "b/net"]
    for more in ((), ("--experiment", "x"), ("--resume", "auto")):
        refused(2, SIGMA, *runs, *SINGLE, *more, words=["a/net", "b/net", "same folder"])
    edit(runs[1], train_half="a")
    refused(2, SIGMA, *runs, *SINGLE, words=["other images", "--train-half", "b/net has a"])


# Stopping and resuming.


def killed(event: str, *flags: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/killed.py"), event, SIGMA, *map(str, flags)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def test_stopped_and_resumed_gives_the_same_bits(whole, trained, tmp_path, run_script):
    flags = [trained, *SHORT, "--experiment", "cut", "--resume", "auto"]
    run = tmp_path / "output/cut"
    for event, code in (("0:9", -9), ("0:14:TERM", 143)):
        done = killed(event, *flags, "--output", tmp_path / "output")
        assert done.returncode == code, done.stderr
        assert not (run / "results.json").exists()
    expected = contents(whole[0])
    assert contents(run) != expected
    assert run_script(SIGMA, *flags)[0] == 0
    assert contents(run) == expected
    victim = next(run.glob("results/*/epoch-0001.npz"))
    victim.unlink()  # one of a batch
    assert run_script(SIGMA, *flags)[0] == 0
    assert contents(run) == expected


def test_killed_and_resumed_in_common(trained, other, tmp_path, run_script):
    flags = [trained, other, *SHORT, "--images", 2, "--checkpoints", 0, 2, "--in-common"]
    code, out, err = run_script(SIGMA, *flags, "--experiment", "whole")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["accepted_in_common"] == 2
    flags += ["--experiment", "cut", "--resume", "auto"]
    done = killed("0:35", *flags, "--output", tmp_path / "output")
    assert done.returncode == -9, done.stderr
    runs = [[tmp_path / f"output/{e}-{n}" for n in ("net", "other")] for e in ("whole", "cut")]
    for run in runs[1]:
        assert list(run.glob("results/*/epoch-*.npz"))  # both had begun
    assert any(contents(a) != contents(b) for a, b in zip(*runs, strict=True))
    assert run_script(SIGMA, *flags)[0] == 0
    for a, b in zip(*runs, strict=True):
        assert contents(a) == contents(b)
        results = [json.loads((run / "results.json").read_text()) for run in (a, b)]
        assert results[0] | {"run": ""} == results[1] | {"run": ""}


def test_two_processes_stop_together_wait_long_and_agree_with_one(whole, trained, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                "--master_port", "29731", str(ROOT / "tests/killed.py")]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    flags = [SIGMA, str(trained), *map(str, SHORT), "--output", str(tmp_path), "--resume", "auto"]
    run = tmp_path / "two"

    def together(event: str) -> subprocess.CompletedProcess:
        command = [*torchrun, event, *flags, "--experiment", "two"]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    # A signal to the one that writes nothing common.
    done = together("1:5:TERM")
    assert done.returncode != 0
    assert done.stderr.count("goes on from there") == 1, done.stderr[-2000:]
    assert "SIGTERM" in done.stderr and "Traceback (most recent call last):\n  File \"" + str(
        ROOT) not in done.stderr  # fmt: skip
    assert not (run / "results.json").exists() and not list(run.rglob("*.tmp"))
    # One waits for the other for longer than collective operations otherwise do.
    done = together("1:1:STALL")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["processes"] == 2
    one, two = read_sigma(whole[0]), read_sigma(run)
    assert [n for n, a in zip(one.ids, one.accepted, strict=True) if a] == [
        n for n, a in zip(two.ids, two.accepted, strict=True) if a
    ]
    both = [i for i in one.ids if i in two.ids]
    for image, epoch in itertools.product(both, one.epochs):
        paths = [result_path(path, image, epoch) for path in (whole[0], run)]
        if all(path.exists() for path in paths):
            a, b = (dict(np.load(path)) for path in paths)
            assert a["selected"] == b["selected"]
            assert np.allclose(a["sigma"], b["sigma"], rtol=1e-5, atol=0)


def test_more_images_go_on_and_are_recorded(finished, trained, run_script):
    options = read_options(finished)
    assert options["wanted-images"] == 3 and options["images"]["train"] == 256
    before = accepted(finished)
    code, _, err = run_script(SIGMA, trained, *RESUMED, "--images", 4)
    assert code == 0, err
    assert accepted(finished)[:3] == before and len(accepted(finished)) == 4
    assert read_options(finished)["wanted-images"] == 4


def test_a_set_that_has_grown_cannot_go_on(finished, trained, refused):
    edit(finished, images={"train": 250, "eval": 32, "classes": 10})
    words = ["cannot resume", "images", "250", "256"]
    refused(2, SIGMA, trained, *RESUMED, words=words)


def test_a_run_that_is_made_longer_is_unfinished_meanwhile(
    finished, trained, run_script, monkeypatch
):
    """And what was found out before it was stopped stays known."""
    before = statuses(finished)
    tried = [i for i, status in enumerate(before) if status != "unfinished"]
    assert len(tried) > 2
    result_path(finished, tried[1], 2).unlink()  # the first has its verdict anew, then
    solve = sigma_training.solve_sigma

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return solve(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sigma_training, "solve_sigma", stopped)
        assert run_script(SIGMA, trained, *RESUMED, "--images", 4)[0] == 143
    assert not (finished / "results.json").exists()
    assert statuses(finished) == before
    code, _, err = run_script(SIGMA, trained, *RESUMED, "--images", 4)
    assert code == 0, err
    read = read_sigma(finished)
    assert read.record["finished"] and read.accepted.sum() == 4


def test_memory_does_not_keep_a_run_from_going_on(finished, single, trained, run_script):
    """It was made with so little that a pass has one sample; unasked there would be two."""
    assert read_options(finished)["chunk"] == 1
    next(finished.glob("results/*/epoch-0002.npz")).unlink()
    code, _, err = run_script(SIGMA, trained, *RESUMED, "--memory", 4)
    assert code == 0, err
    assert contents(finished) == contents(single)
    assert "--memory 4" in (finished / "train.log").read_text()
    assert run_script(SIGMA, trained, *RESUMED)[0] == 0


def test_another_network_cannot_resume(refused, finished, trained, other):
    refused(2, SIGMA, other, *RESUMED, words=["cannot resume", "checksums"])
    refused(
        2, SIGMA, trained, *RESUMED, "--checkpoints", 1, 2, words=["cannot resume", "checkpoints"]
    )
    refused(2, SIGMA, trained, *RESUMED, "--chunk", 2, words=["cannot resume", "chunk 1"])
    refused(2, SIGMA, trained, *RESUMED[:-2], words=["exists", "--resume auto"])


# Networks.


@pytest.mark.parametrize(
    "layer, left", [("layer2.0.act2:in", 0), ("layer1.0.bn2", 0), ("layer1.0.conv2", 1)]
)
def test_snapshots_are_folded_one_by_one(trained, layer, left):
    """Each with its own statistics, and what the layer means stays."""
    parser = Parser()
    sigma_flags(parser)
    options = parse_sigma(parser, [str(trained)])
    snapshots = find_snapshots(trained, None, bare=False)
    adopt_data(options, parser, [snapshots])
    data = load_data(options, Accelerator(cpu=True))
    watched = Watched(snapshots, layer, options, data, torch.device("cpu"))
    images = torch.randn(2, 3, *watched.inputs.size, generator=torch.Generator().manual_seed(1))
    plain = create_model("cifar_resnet8", data.classes).eval()
    found = []
    for epoch in (2, 0, 1):
        watched.load(epoch)
        found.append(watched.feature(images))
        load_weights(plain, snapshots.files[epoch])
        there = Taps(plain, [layer])(images)[1][0].relu()
        assert there.shape[1:] == watched.shape and there.max() > 0
        assert torch.allclose(there, found[-1], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in
                   zip(plain.parameters(), watched.network.parameters(), strict=True))  # fmt: skip
    assert not torch.allclose(found[0], found[2], rtol=1e-2)
    folded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_module, "Taps", lambda *args: folded.append(args[0]) or Taps(*args))
        watched.load(0)
    norms = [m for m in folded[0].modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == left
    assert folded[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_layer_is_the_distilled_one(run_script, student, tmp_path):
    """Known from --teacher-layers alone, which hold for both; of the baseline, too."""
    flags = [*SINGLE[:-2], "--candidates", 2, "--images", 1, "--keep-rejected"]
    run_script(SIGMA, student / "baseline", student, *flags, "--experiment", "s")
    for name in ("student", "student-baseline"):
        assert read_sigma(tmp_path / f"output/s-{name}").record["layer"] == "fc"


def test_runs_of_different_layers(refused, student, tmp_path):
    inner = edited(student, tmp_path / "inner", student_layers=["layer3"])
    two = edited(student, tmp_path / "two", student_layers=["layer2", "fc"])
    unnamed = edited(student, tmp_path / "unnamed", teacher_layers=None)
    same = edited(student, tmp_path / "same", student_layers=["fc"])
    assert distilled_layers(find_snapshots(inner, None, bare=False)) == ["layer3"]
    assert distilled_layers(find_snapshots(unnamed, None, bare=False)) == []
    assert distilled_layers(find_snapshots(student / "baseline", None, bare=False)) is None
    words = ["student at fc", "inner at layer3", "--layer"]
    refused(2, SIGMA, student, inner, *SINGLE[:-2], words=words)
    refused(2, SIGMA, two, *SINGLE[:-2], words=["two at layer2 and fc", "--layer"])
    words = ["student at fc", "unnamed at layer2.0.act2:in"]
    refused(2, SIGMA, student, unnamed, *SINGLE[:-2], words=words)
    # All agree: what is refused is another thing.
    words = ["--accept-from 7"]
    refused(2, SIGMA, same, student, *SINGLE[:-2], "--accept-from", 7, words=words)
    flags = [*SINGLE[:-2], "--layer", "layer3", "--accept-from", 7]
    refused(2, SIGMA, student, inner, two, unnamed, *flags, words=words)


def test_a_folder_of_weights(run_script, refused, trained, single, tmp_path):
    flags = ["--weights-dir", trained / "weights", *SINGLE, "--train-limit", 256, "--memory", 1e-5]
    code, _, err = run_script(SIGMA, *flags, "--experiment", "bare")
    assert code == 0, err
    assert contents(tmp_path / "output/bare") == contents(single)
    # Its files say of which images it is.
    weights, record = read_weights(trained / "weights/epoch-0002.safetensors")
    network = create_model("cifar_resnet8", 10)
    network.load_state_dict(weights)
    (tmp_path / "fashion").mkdir()
    save_weights(tmp_path / "fashion/epoch-0002.safetensors", network,
                 record | {"dataset": "fashion-mnist"})  # fmt: skip
    flags[1] = tmp_path / "fashion"
    refused(1, SIGMA, *flags, "--data-dir", tmp_path / "nowhere", words=["fashion-mnist"])
    code, _, err = run_script(SIGMA, *flags, "--dataset", "digits", "--experiment", "asked")
    assert code == 0, err
    assert contents(tmp_path / "output/asked") == contents(single)


@pytest.mark.parametrize(
    "there, chosen",
    [
        ([*PUBLISHED, 3], PUBLISHED),
        ([*PUBLISHED, *LONGER, 3], [*PUBLISHED, *LONGER]),
        ([0, 1, 2, 3, 5, 6], [0, 1, 2, 3, 5, 6]),
        ([*PUBLISHED[:12], 3, 100], [*PUBLISHED[:12], 100]),
        ([*PUBLISHED, *LONGER, 500, 800], [*PUBLISHED, *LONGER, 800]),
        ([0, 1, 3, 6], [0, 1, 3, 6]),
        ([0, 2, 3, 150], [0, 2, 3, 150]),
    ],
)
def test_default_checkpoints(tmp_path, there, chosen):
    record = {"architecture": "x"}
    for epoch in there:
        path = tmp_path / f"epoch-{epoch:04d}.safetensors"
        save_weights(path, torch.nn.Linear(1, 1), record | {"epoch": epoch})
    assert find_snapshots(tmp_path, None, bare=True).epochs == list(chosen)
    assert accept_from(chosen, None) == (40 if max(chosen) > 60 else 4)


def test_mixed_and_missing_snapshots(refused, trained, tmp_path):
    run = tmp_path / "net"
    shutil.copytree(trained, run)
    kept = run / "weights/epoch-0001.safetensors"
    kept.unlink()
    refused(1, SIGMA, run, words=["lacks", "epochs 1", "--checkpoints"])
    shutil.copy(run / "weights/epoch-0002.safetensors", kept)
    refused(1, SIGMA, run, words=["epoch-0001.safetensors", "renamed"])
    record = read_weights(run / "weights/epoch-0002.safetensors")[1]
    save_weights(kept, create_model("cifar_resnet14", 10),
                 record | {"architecture": "cifar_resnet14", "epoch": 1})  # fmt: skip
    refused(1, SIGMA, run, words=["another network", "cifar_resnet14"])
    shutil.rmtree(run / "weights")
    refused(1, SIGMA, run, words=["no snapshots", "--save-epochs"])


# Flags.


def test_printed_options_can_be_read_back(run_script, trained, tmp_path):
    flags = [trained, *SINGLE, "--lambda", 5, "--accept-from", 1, "--no-tf32"]
    code, printed, err = run_script(SIGMA, *flags, "--print-config")
    assert code == 0, err
    known = yaml.safe_load(printed)
    assert (known["lambda"], known["runs"], known["images"]) == (5.0, [str(trained)], 3)
    # Which images there are is left to the run; read back, a word on them would win over it.
    assert not known.keys() & {"dataset", "data-dir", "train-limit", "box-margin"}
    assert "channels-last" not in known or known["channels-last"] is None
    (tmp_path / "c.yaml").write_text(printed)
    code, again, err = run_script(SIGMA, "-c", "c.yaml", "--print-config")
    assert (code, again) == (0, printed), err
    code, _, err = run_script(SIGMA, "-c", "c.yaml", "--experiment", "c", "--lambda", 7)
    assert code == 0, err
    record = read_options(tmp_path / "output/c")
    assert record["settings"]["weight"] == record["lambda"] == 7 and record["accept-from"] == 1
    for more in ((), ("--dataset", "digits", "--threshold", -2.5)):
        code, printed, err = run_script(SIGMA, *more, "--print-config")
        assert code == 0, err
        (tmp_path / "d.yaml").write_text(printed)
        assert run_script(SIGMA, "-c", "d.yaml", "--print-config")[:2] == (0, printed)


def test_flags_without_effect_are_refused(refused, trained):
    for flag, *values in (("--hflip", 0.5), ("--aa", "x"), ("--crop-pct", 1), ("--no-aug",)):
        refused(2, SIGMA, trained, flag, *values, words=["unknown flag", flag])
    for flag, *values in (("--img-size", 64), ("--mean", 0, 0, 0), ("--std", 1, 1, 1)):
        refused(2, SIGMA, trained, flag, *values, words=[flag, "snapshots"])
        refused(2, SIGMA, flag, *values, words=[flag])
    folder = trained / "weights"
    refused(2, SIGMA, "--weights-dir", folder, "--img-size", 64, words=["--img-size", "snapshots"])


def test_bad_requests(refused, trained):
    refused(2, SIGMA, "--dataset", "cifar10", words=["no networks", "--save-epochs"])
    refused(2, SIGMA, trained, "--mixed-precision", "bf16", words=["bf16", "float32"])
    refused(2, SIGMA, trained, "--layer", "layer2.0.act", words=["unknown layer", "layer2.0.act"])
    refused(2, SIGMA, trained, trained, words=["twice"])
    refused(2, SIGMA, trained, "--weights-dir", trained / "weights", words=["not both"])
    refused(2, SIGMA, trained, "--images", 9, "--candidates", 4, words=["--images 9"])
    refused(2, SIGMA, trained, "--grid", 64, words=["grid 64"])
    refused(2, SIGMA, trained, "--accept-from", 7, words=["--accept-from 7", "2"])
    refused(2, SIGMA, trained, "--tf32", words=["--tf32"])
    refused(2, SIGMA, trained, "--in-common", words=["--in-common", "two RUNs"])
    refused(2, SIGMA, "--weights-dir", trained / "weights", "--in-common", words=["two RUNs"])
    refused(1, SIGMA, trained, "--checkpoints", 0, 5, words=["epochs 5", "0 1 2"])
    refused(1, SIGMA, trained / "weights", words=["args.yaml"])
    refused(1, SIGMA, "nowhere", words=["nowhere"])


# Files.


def test_damaged_and_foreign_results(finished):
    read = read_sigma(finished)
    image = next(i for i, a in zip(read.ids, read.accepted, strict=True) if a)
    path = result_path(finished, image, 2)
    content = path.read_bytes()
    for damage in (b"", content[: len(content) // 2], b"nonsense" * 50):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"epoch-0002\.npz is damaged"):
            read_sigma(finished)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        read_sigma(finished)
    arrays = dict(np.load(finished / f"results/image-{image:05d}/image.npz"))
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="no result of sigma training"):
        read_sigma(finished)
    np.savez(path, sigma=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        read_sigma(finished)
    path.write_bytes(content)
    about = json.loads(str(np.load(path)["made_of"]))
    for key, value in (("layer", "fc"), ("weights", "0" * 16)):
        with pytest.raises(UserError, match=f"of another run: its {key}"):
            read_result(finished, image, 2, about | {key: value})
    with pytest.raises(UserError, match="no sigma run"):
        read_sigma(finished / "results")
    (finished / "candidates.csv").write_text("id,index\n0,1\n")
    with pytest.raises(UserError, match=r"candidates\.csv, line 2"):
        read_sigma(finished)


def test_path_length_sums_epochs(tmp_path):
    assert read_path_length(tmp_path, "fc", [0], "iterations") is None
    text = "epoch,layer,iterations,epochs\n0,fc,0,0\n1,fc,0.5,0.25\n1,x,9,9\n2,fc,0.5,0.5\n"
    (tmp_path / "path_length.csv").write_text(text)
    assert read_path_length(tmp_path, "fc", [0, 2], "iterations").tolist() == [0, 1]
    assert read_path_length(tmp_path, "fc", [1, 2], "epochs").tolist() == [0.25, 0.75]
    assert read_path_length(tmp_path, "gone", [0], "iterations") is None
    with pytest.raises(UserError, match=r"path_length\.csv"):
        read_path_length(tmp_path, "fc", [3], "iterations")
