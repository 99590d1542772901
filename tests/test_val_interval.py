"""`--val-interval N`: which epochs are scored, what is saved, and what reads the gaps."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kdfast.analysis import read_run
from kdfast.models import checksum, read_weights

from conftest import load_script  # isort: skip

CLASSIFIER, HEADS, REPORT = "train/classifier.py", "train/heads.py", "analysis/report.py"
FEW = ("--model", "cifar_resnet8", "--train-limit", 64, "--eval-limit", 64, "-b", 32)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The same five epochs, all of them scored (`each`) and every second (`second`)."""
    folder = tmp_path_factory.mktemp("interval")
    for name, interval in (("each", 1), ("second", 2)):
        flags = (*FEW, "--epochs", 5, "--save-epochs", 1, "--val-interval", interval)
        flags += ("--output", folder, "--experiment", name)
        assert load_script(CLASSIFIER).main([str(f) for f in flags]) == 0
    return folder


def test_scored_epochs(runs):
    """Epochs that N divides, and the last although N does not."""
    each, second = rows_of(runs / "each"), rows_of(runs / "second")
    assert [row["epoch"] for row in second] == ["1", "2", "3", "4", "5"]
    assert list(second[0]) == list(each[0])
    for whole, row in zip(each, second, strict=True):
        scored = row["epoch"] in ("2", "4", "5")
        for name in whole.keys() - {"seconds", "images_per_second"}:
            expected = whole[name] if scored or not name.startswith("eval_") else ""
            assert row[name] == expected, (row["epoch"], name)


def test_weights_are_the_same(runs):
    """Scoring is no part of training; the first epoch is kept although it has no score."""
    for name in ("last.safetensors", "weights/epoch-0001.safetensors"):
        states = [load_file(runs / run / name) for run in ("each", "second")]
        assert checksum(states[0]) == checksum(states[1])
    assert read_weights(runs / "second/weights/epoch-0001.safetensors")[1]["top1"] is None
    assert read_weights(runs / "second/last.safetensors")[1]["epoch"] == 5


def test_best_is_one_of_the_scored(runs):
    results = json.loads((runs / "second/results.json").read_text())
    scored = [row for row in rows_of(runs / "second") if row["eval_top1"]]
    first = max(scored, key=lambda row: float(row["eval_top1"]))
    assert results["best"]["epoch"] == int(first["epoch"]) and results["last"]["epoch"] == 5
    assert read_weights(runs / "second/best.safetensors")[1]["epoch"] == int(first["epoch"])


def test_resumed_between_two_scores(run_script, tmp_path, runs):
    shutil.copytree(runs / "second", tmp_path / "second")
    cut = tmp_path / "second"
    (cut / "results.json").unlink()
    for later in ("epoch-0005",):
        shutil.rmtree(cut / "checkpoints" / later)
    flags = (*FEW, "--epochs", 5, "--save-epochs", 1, "--val-interval", 2, "--output", ".")
    code, _, err = run_script(CLASSIFIER, *flags, "--experiment", "second", "--resume", "auto")
    assert code == 0, err
    for name in ("last.safetensors", "best.safetensors"):
        assert checksum(load_file(cut / name)) == checksum(load_file(runs / "second" / name))
    timing = {"seconds", "images_per_second"}
    for a, b in zip(rows_of(cut), rows_of(runs / "second"), strict=True):
        assert all(a[key] == b[key] for key in a.keys() - timing)


def test_reports_read_gaps(run_script, runs):
    run = read_run(runs / "second")
    assert [s is None for s in run.curves["eval_top1"]] == [True, False, True, False, False]
    code, out, err = run_script(REPORT, runs)
    assert (code, err) == (0, ""), err
    assert out.startswith("2 runs")


def test_a_last_epoch_without_scores_is_damage(refused, runs, tmp_path):
    shutil.copytree(runs / "second", tmp_path / "run")
    path = tmp_path / "run" / "summary.csv"
    header, *rows = path.read_text().splitlines()
    names, cells = header.split(","), rows[-1].split(",")
    cells = [
        "" if name.startswith("eval_") else cell for name, cell in zip(names, cells, strict=True)
    ]
    path.write_text("\n".join([header, *rows[:-1], ",".join(cells)]) + "\n")
    refused(1, REPORT, "run", words=["summary.csv", "line 6", "last epoch"])


def test_heads_have_it_too(run_script, teacher_run, tmp_path):
    """A head's best epoch is one that was scored."""
    flags = (*FEW[2:], "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run)
    flags += ("--epochs", 3, "--val-interval", 2, "--save-epochs", 1, "--experiment", "heads")
    code, out, err = run_script(HEADS, *flags)
    assert code == 0, err
    results = json.loads(out.splitlines()[-1])
    assert {head["best"]["epoch"] for head in results["heads"]} <= {2, 3}
    assert list((tmp_path / results["run"] / "weights" / "epoch-0001").iterdir())


def test_nonsense_is_refused(refused):
    refused(2, CLASSIFIER, "--val-interval", 0, words=["--val-interval", "at least 1"])
