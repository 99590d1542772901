"""`--seeds`, `--eval-only`, `--profile`, `train.log`: what surrounds a training run."""

from __future__ import annotations

import json
import statistics

import pytest
import yaml
from safetensors.torch import load_file

from kdfast.models import checksum
from kdfast.training.tell import duration

CLASSIFIER, DISTILL = "train/classifier.py", "train/distill.py"
FEW = ("--train-limit", 128, "--eval-limit", 90, "--epochs", 1, "--output", ".")
STUDENT = (CLASSIFIER, "--model", "cifar_resnet8", *FEW)


def test_seeds_are_sibling_runs(run_script, tmp_path):
    code, out, err = run_script(*STUDENT, "--seeds", 3, 5)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    names = [f"classifier-digits-cifar_resnet8-s{seed}" for seed in (3, 5)]
    for seed, name, line in zip((3, 5), names, lines[:2], strict=True):
        assert line == json.loads((tmp_path / name / "results.json").read_text())
        options = yaml.safe_load((tmp_path / name / "args.yaml").read_text())["options"]
        assert options["seed"] == line["seed"] == seed and "seeds" not in options
    tops = [line["last"]["top1"] for line in lines[:2]]
    last = {"mean": statistics.mean(tops), "std": statistics.stdev(tops)}
    assert lines[2]["runs"] == names and lines[2]["seeds"] == [3, 5]
    assert lines[2]["last_top1"] == pytest.approx(last)
    assert run_script(*STUDENT, "--seed", 5, "--experiment", "alone")[0] == 0
    one, other = (load_file(tmp_path / n / "last.safetensors") for n in ("alone", names[1]))
    assert checksum(one) == checksum(other), "a seed means the same alone and among others"


def test_seeds_go_on_where_they_ended(run_script, tmp_path):
    flags = (*STUDENT, "--experiment", "mine")
    assert run_script(*flags, "--seeds", 0)[0] == 0
    before = (tmp_path / "mine-s0" / "summary.csv").read_bytes()
    code, out, err = run_script(*flags, "--seeds", 0, 1, "--resume", "auto")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["runs"] == ["mine-s0", "mine-s1"]
    assert (tmp_path / "mine-s0" / "summary.csv").read_bytes() == before


def test_seeds_are_refused_before_the_first_trains(refused, run_script, tmp_path):
    assert run_script(*STUDENT, "--experiment", "mine", "--seeds", 1)[0] == 0
    flags = (*STUDENT[1:], "--experiment", "mine", "--seeds", 0, 1)
    refused(2, CLASSIFIER, *flags, words=["mine-s1 exists", "--resume auto"])


@pytest.mark.parametrize("script", [CLASSIFIER, DISTILL])
@pytest.mark.parametrize(
    "flags, words",
    [
        (("--seeds", 0, "--seed", 1), ["--seed and --seeds"]),
        (("--seeds", 0, 1, 0), ["repeats a seed"]),
        (("--seeds", 0, "--resume", "there"), ["--resume auto"]),
        (("--seeds", 0, "--eval-only"), ["--eval-only"]),
        (("--seeds",), ["--seeds"]),
        (("--seeds", "x"), ["--seeds", "x"]),
        (("--checkpoint-steps", 0), ["--checkpoint-steps", "at least 1"]),
        (("--profile", 0), ["--profile", "at least 1"]),
        (("--eval-only",), ["needs weights", "--initial-checkpoint"]),
        (("--sync-bn", "--freeze-bn"), ["--sync-bn"]),
    ],
)
def test_impossible_flags(refused, script, flags, words):
    refused(2, script, *flags, words=words)


def test_distilled_seeds_have_their_own_teachers(run_script, tmp_path):
    flags = (DISTILL, *FEW, "--teacher", "cifar_resnet8", "--teacher-epochs", 1, "--no-baseline")
    code, _, err = run_script(*flags, "--seeds", 0, 1)
    assert code == 0, err
    assert len(list((tmp_path / "teachers").iterdir())) == 2
    runs = sorted(p.name for p in tmp_path.glob("distill-*"))
    assert [name[-2:] for name in runs] == ["s0", "s1"]


@pytest.mark.parametrize("script", [CLASSIFIER, DISTILL])
def test_scoring_alone(run_script, teacher_run, tmp_path, script):
    recorded = json.loads((teacher_run / "results.json").read_text())["best"]
    flags = (script, "--model", "cifar_resnet8", "--eval-only")
    for source in (("--initial-checkpoint", teacher_run), ("--resume", teacher_run)):
        code, out, err = run_script(*flags, *source)
        assert code == 0, err
        scores = json.loads(out)
        assert scores["top1"] == recorded["top1"] and scores["images"] == 360
        assert scores["loss"] == pytest.approx(recorded["loss"])
    assert list(tmp_path.iterdir()) == []


def test_scoring_what_is_not_there(refused):
    flags = ("--model", "cifar_resnet8", "--eval-only")
    refused(1, CLASSIFIER, *flags, "--initial-checkpoint", "no.pt", words=["no.pt"])
    refused(1, CLASSIFIER, *flags, "--resume", "auto", words=["cifar_resnet8-s0"])


def test_profile(run_script, tmp_path):
    flags = (*STUDENT, "--experiment", "run", "-b", 16, "--profile", 2)
    code, _, err = run_script(*flags)
    assert code == 0, err
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    steps = {
        e["name"] for e in trace["traceEvents"] if e.get("name", "").startswith("ProfilerStep")
    }
    assert len(steps) == 2
    assert "conv" in (tmp_path / "run" / "profile" / "operators.txt").read_text()


def test_log(run_script, tmp_path):
    """Everything said is in train.log with its time, the teacher's in the teacher's."""
    flags = (DISTILL, *FEW, "--epochs", 2, "--teacher", "cifar_resnet8", "--teacher-epochs", 1)
    code, out, err = run_script(*flags, "--experiment", "run")
    assert code == 0, err
    text = (tmp_path / "run" / "train.log").read_text()
    for line in out.splitlines():
        if line.startswith(("teacher cifar_resnet8 ->", "loss =", "teacher top1", "kd ")):
            assert line in text
    assert "left" in text and "gain" in text
    assert len([line for line in text.splitlines() if "epoch" in line and "images/s" in line]) == 2
    alone = (tmp_path / "run" / "baseline" / "train.log").read_text()
    assert alone.count("images/s") == 2
    (teacher,) = (tmp_path / "teachers").iterdir()
    assert (teacher / "train.log").read_text().count("images/s") == 1
    code, _, err = run_script(*flags, "--experiment", "run", "--epochs", 3, "--resume", "auto")
    assert code == 0, err
    longer = (tmp_path / "run" / "train.log").read_text()
    assert longer.startswith(text) and longer.count("images/s") == text.count("images/s") + 1


def test_errors_are_logged(run_script, tmp_path):
    code, _, err = run_script(*STUDENT, "--experiment", "run", "--lr", 1e30, "--log-interval", 1)
    assert code == 1
    last = (tmp_path / "run" / "train.log").read_text().splitlines()[-1]
    assert "error: loss term" in last and err.split("error: ")[1].strip() in last


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
