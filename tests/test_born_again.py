"""Born-again chains: the loss and its schedule, and generations that learn from one another."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.methods import Outputs, Pairing, find_method
from kdfast.models import checksum, read_weights

from conftest import load_script  # isort: skip
from test_methods import choice_of  # isort: skip

SCRIPT, DISTILL, CLASSIFIER = "train/born_again.py", "train/distill.py", "train/classifier.py"
REPORT = "analysis/report.py"
FEW = ("--train-limit", 64, "--eval-limit", 64, "--epochs", 1)
CHAIN = (*FEW, "--experiment", "chain", "--output", ".")


def born(epochs: int = 1, epoch: int = 0, **options):
    """The method at 0-based `epoch` of `epochs`."""
    method = find_method("born_again")(**options)
    method.setup(Pairing((), (), (), (), 10, epochs=epochs))
    method.start_epoch(epoch)
    return method


def plainly(student, teacher, tau):
    """The formula as it is written."""
    p, log_q = F.softmax(teacher / tau, 1), F.log_softmax(student / tau, 1)
    return -(tau**2) * (p * log_q).sum(1).mean()


# The loss.


@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("classes", [2, 10, 137])
def test_the_formula_in_float64(tau, classes):
    student, teacher = torch.randn(2, 7, classes, dtype=torch.float64).mul(3)
    student.requires_grad_()
    loss = born(lambda_start=0.3, tau=tau)(Outputs(student), Outputs(teacher), None)
    (got,) = torch.autograd.grad(loss, student)
    expected = 0.3 * plainly(student, teacher, tau)
    (slope,) = torch.autograd.grad(expected, student)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(got, slope, rtol=1e-10, atol=1e-14)
    p, q = (F.softmax(x.detach() / tau, 1) for x in (teacher, student))
    assert torch.allclose(got, 0.3 * tau * (q - p) / len(q), rtol=1e-10, atol=1e-14)


def test_equal_logits_leave_the_teachers_entropy():
    """Acceptance check 11: no gradient, and tau^2 times the entropy."""
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = born(lambda_start=1, tau=3)(Outputs(logits), Outputs(logits.detach()), None)
    loss.backward()
    assert loss.item() == pytest.approx(9 * torch.tensor(2.0).log().item(), rel=1e-6)
    assert logits.grad.abs().max() < 1e-7


def test_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): ln 2, and a gradient of -+1/4."""
    student = torch.zeros(1, 2, requires_grad=True)
    teacher = torch.tensor([[3.0, 1.0]]).log()
    loss = born(lambda_start=0.5)(Outputs(student), Outputs(teacher), None)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 0.6931472, rel=1e-6)
    assert student.grad.tolist()[0] == pytest.approx([-0.125, 0.125])


def test_coefficients_are_a_plain_sum():
    choice = choice_of("--method", "born_again", "--lambda", 0.25, "--tau", 2)
    assert (choice.gamma, choice.weights) == (1.0, {"born_again": 1.0})
    assert choice.methods == {"born_again": {"lambda_start": 0.25, "tau": 2.0}}


def lambdas(epochs: int, *args) -> list[float]:
    names = ("lambda_start", "lambda_end")
    options = dict(zip(names, args, strict=False))
    return [born(epochs, e, **options).gauges()["lambda"] for e in range(epochs)]


def test_lambda_is_geometric():
    found = lambdas(7, 0.7, 0.01)
    assert (found[0], found[-1]) == (0.7, 0.01), "both ends exact"
    ratios = [b / a for a, b in itertools.pairwise(found)]
    assert ratios == pytest.approx([(0.01 / 0.7) ** (1 / 6)] * 6, rel=1e-12)


@pytest.mark.parametrize(
    "epochs, args, expected",
    [
        (4, (0.3,), [0.3] * 4),
        (3, (0.3, 0.3), [0.3] * 3),
        (1, (0.3, 0.1), [0.3]),
        (2, (0.3, 0.1), [0.3, 0.1]),
        (5, (1.0, 0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (5, (0.0, 1.0), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (3, (0.0,), [0.0] * 3),
        (3, (), [0.5] * 3),
    ],
)
def test_lambda_by_hand(epochs, args, expected):
    assert lambdas(epochs, *args) == expected


def test_lambda_of_a_later_epoch_needs_no_compilation():
    method = born(4, 0, lambda_start=1.0, lambda_end=0.125)
    assert method.state_dict() == {}, "a function of the epoch is no state"
    student, teacher = torch.randn(2, 5, 10)
    plain = plainly(student, teacher, 1.0)
    compiled = torch.compile(method, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch, factor in enumerate([1.0, 0.5, 0.25, 0.125]):
            method.start_epoch(epoch)
            got = compiled(Outputs(student), Outputs(teacher), None)
            assert got.item() == pytest.approx(factor * plain.item(), rel=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("bad", [{"tau": 0}, {"lambda_start": -0.1}, {"lambda_end": -1}])
def test_impossible_options(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        find_method("born_again")(**bad)


def test_in_distill(run_script, teacher_run, tmp_path):
    """tau and lambda reach the loss, and the schedule has as many epochs as the run."""
    flags = ("--method", "born_again", "--train-limit", 64, "--eval-limit", 64, "--output", ".",
             "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run,
             "--no-baseline", "--lr", 0)  # fmt: skip
    rows = {}
    for name, more in {
        "one": ("--lambda", 0.5, "--lambda-end", 0.125, "--epochs", 3),
        "tau": ("--lambda", 0.5, "--tau", 3, "--epochs", 1),
    }.items():
        code, _, err = run_script(DISTILL, *flags, *more, "--experiment", name)
        assert code == 0, err
        with (tmp_path / name / "summary.csv").open() as file:
            rows[name] = list(csv.DictReader(file))
    assert [float(row["born_again_lambda"]) for row in rows["one"]] == [0.5, 0.25, 0.125]
    first, second, third = (float(row["train_born_again"]) for row in rows["one"])
    assert [second, third] == pytest.approx([first / 2, first / 4], rel=0.05)
    assert float(rows["tau"][0]["train_born_again"]) > 3 * first
    total = float(rows["one"][0]["train_ce"]) + first
    assert float(rows["one"][0]["train_loss"]) == pytest.approx(total, rel=1e-5)


# The chain.


@pytest.fixture(scope="session")
def whole_chain(tmp_path_factory) -> Path:
    """A chain of three generations, base seed 10, and what it said, in `said.txt`."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("born")
    said = io.StringIO()
    flags = (*FEW, "--generations", 3, "--seed", 10, "--epochs", 2, "--experiment", "chain")
    with contextlib.redirect_stdout(said):
        code = load_script(SCRIPT).main([str(f) for f in (*flags, "--output", folder)])
    assert code == 0
    (folder / "said.txt").write_text(said.getvalue())
    return folder / "chain"


@pytest.fixture
def chain(whole_chain, tmp_path) -> Path:
    return shutil.copytree(whole_chain, tmp_path / "chain")


SAME = ("--train-limit", 64, "--eval-limit", 64, "--generations", 3, "--seed", 10, "--epochs", 2,
        "--experiment", "chain", "--output", ".", "--resume", "auto")  # fmt: skip


def options_of(run: Path) -> dict:
    return yaml.safe_load((run / "args.yaml").read_text())["options"]


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def test_generations_teach_one_another(whole_chain):
    results, parent = results_of(whole_chain), None
    assert [g["generation"] for g in results["generations"]] == [0, 1, 2]
    for g, entry in enumerate(results["generations"]):
        run = whole_chain / f"generation-{g}"
        assert entry["run"] == str(run) and entry["seed"] == 10 + 10 * g
        state, metadata = read_weights(run / "last.safetensors")
        assert entry["checksum"] == checksum(state) and metadata["epoch"] == 2
        assert entry["parent"] == metadata["parent"] == parent
        options, own = options_of(run), results_of(run)
        assert options.get("teacher-checksum") == parent and options["seed"] == entry["seed"]
        assert options["generation"] == g and "generations" not in options
        assert (entry["last"], entry["best"]) == (own["last"], own["best"])
        names = {p.name for p in run.iterdir()}
        assert {"args.yaml", "summary.csv", "best.safetensors", "checkpoints"} <= names
        parent = entry["checksum"]
    assert (results["run"], results["seed"]) == (str(whole_chain), 10)
    assert results["last"] == results["generations"][-1]["last"]
    assert (whole_chain / "train.log").exists() and options_of(whole_chain)["generations"] == 3


def test_generation_0_knows_labels_alone(whole_chain):
    heads = [
        (whole_chain / f"generation-{g}" / "summary.csv").read_text().splitlines()[0].split(",")
        for g in range(2)
    ]
    assert "train_born_again" not in heads[0] and "train_born_again" in heads[1]
    assert "born_again_lambda" in heads[1]
    assert "methods" not in options_of(whole_chain / "generation-0")
    recorded = options_of(whole_chain / "generation-1")["methods"]["born_again"]
    assert recorded == {"beta": 1.0, "lambda_start": 0.5, "lambda_end": 0.5, "tau": 1.0}


def test_what_is_said_at_the_end(whole_chain):
    lines = (whole_chain.parent / "said.txt").read_text().strip().splitlines()
    results = results_of(whole_chain)
    assert json.loads(lines[-1]) == results
    for line, entry in zip(lines[-4:-1], results["generations"], strict=True):
        words = line.split()
        assert words[0] == str(entry["generation"]) and words[1] == str(entry["seed"])
        scores = [f"{entry[kind]['top1']:.2f}" for kind in ("last", "best")]
        assert words[-2:] == scores


def test_start_1_goes_on_as_start_0_did(run_script, whole_chain, tmp_path):
    """The given generation 0 has the same student: same seed, same teacher, same weights."""
    teacher = whole_chain / "generation-0"
    flags = ("--train-limit", 64, "--eval-limit", 64, "--generations", 2, "--seed", 10,
             "--epochs", 2, "--start-generation", 1, "--output", ".")  # fmt: skip
    code, out, err = run_script(SCRIPT, *flags, "--teacher-checkpoint", teacher)
    assert code == 0, err
    results = json.loads(out.splitlines()[-1])
    (only,) = results["generations"]
    whole = results_of(whole_chain)["generations"]
    assert only["seed"] == 20 and only["parent"] == whole[0]["checksum"]
    assert only["checksum"] == whole[1]["checksum"]
    assert results["teacher_top1"] == whole[0]["last"]["top1"]
    assert f"{whole[0]['last']['top1']:.2f}" in out.splitlines()[-3], "the teacher is in the table"
    assert (tmp_path / results["run"] / "generation-1").is_dir()


def test_another_architecture_teaches_the_first(run_script, teacher_run):
    flags = ("--start-generation", 1, "--generations", 3, "--teacher-checkpoint", teacher_run,
             "--teacher", "cifar_resnet8", "--model", "cifar_resnet14")  # fmt: skip
    code, out, err = run_script(SCRIPT, *CHAIN, *flags)
    assert code == 0, err
    first, second = json.loads(out.splitlines()[-1])["generations"]
    assert options_of(Path(first["run"]))["teacher"] == "cifar_resnet8"
    assert options_of(Path(second["run"]))["teacher"] == "cifar_resnet14"
    assert second["parent"] == first["checksum"]


def test_seeds_are_several_chains(run_script, tmp_path):
    code, out, err = run_script(SCRIPT, *CHAIN, "--generations", 1, "--seeds", 3, 4)
    assert code == 0, err
    *_, first, second, last = map(json.loads, [li for li in out.splitlines() if li[0] == "{"])
    assert [first["seed"], second["seed"]] == last["seeds"] == [3, 4]
    assert last["runs"] == ["chain-s3", "chain-s4"]
    assert first["generations"][0]["seed"] == 3


# Going on.


def contents(run: Path) -> dict:
    return {
        str(p.relative_to(run)): p.read_bytes()
        for p in run.rglob("*")
        if p.suffix in (".safetensors", ".csv")
    }


def test_a_finished_chain_is_not_repeated(run_script, chain):
    before = contents(chain)
    shutil.rmtree(chain / "generation-1" / "checkpoints")  # a user makes room
    code, out, err = run_script(SCRIPT, *SAME)
    assert code == 0, err
    now = contents(chain)
    assert now == {k: v for k, v in before.items() if not k.startswith("generation-1/checkpoints")}
    assert json.loads(out.splitlines()[-1])["generations"][2]["generation"] == 2


def test_more_generations(run_script, chain, tmp_path):
    whole = results_of(chain)
    shutil.rmtree(chain / "generation-2")
    (chain / "results.json").unlink()
    code, out, err = run_script(SCRIPT, *SAME)
    assert code == 0, err
    again = json.loads(out.splitlines()[-1])["generations"]
    assert [g["checksum"] for g in again] == [g["checksum"] for g in whole["generations"]]
    code, out, err = run_script(SCRIPT, *SAME, "--generations", 4)
    assert code == 0, err
    more = json.loads(out.splitlines()[-1])["generations"]
    assert more[:3] == again and more[3]["seed"] == 40


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--tau", 2), ["chain", "'tau': 1.0", "'tau': 2.0"]),
        (("--lambda", 1), ["chain", "'lambda_start': 0.5", "'lambda_start': 1.0"]),
        (("--epochs", 3), ["chain", "epochs 2", "epochs 3"]),
        (("--seed", 0), ["chain", "seed 10", "seed 0"]),
        (("--lr", 0.5), ["chain", "lr 0.05", "lr 0.5"]),
        (("--generations", 2), ["chain", "generation-2", "--generations"]),
    ],
    ids=lambda value: str(value[0]),
)
def test_other_options_are_refused(refused, chain, flags, words):
    refused(2, SCRIPT, *SAME, *flags, words=words)


def test_another_teacher_is_refused(refused, run_script, whole_chain, teacher_run):
    flags = (*CHAIN, "--generations", 2, "--start-generation", 1, "--teacher-checkpoint")
    assert run_script(SCRIPT, *flags, whole_chain / "generation-0")[0] == 0
    line = refused(2, SCRIPT, *flags, teacher_run, "--resume", "auto", words=["teacher-checksum"])
    assert results_of(whole_chain)["generations"][0]["checksum"] in line


def test_a_missing_link_is_refused(refused, chain):
    shutil.rmtree(chain / "generation-1")
    words = ["generation-1 is missing", "generation-2", "put it back"]
    refused(1, SCRIPT, *SAME, words=words)


def test_an_unfinished_link_is_refused(refused, chain):
    (chain / "generation-0" / "results.json").unlink()
    refused(1, SCRIPT, *SAME, words=["generation-0 is not finished", "generation-1"])


def test_a_link_of_another_chain_is_refused(refused, run_script, chain):
    """Of the same options, by name, but with other weights."""
    flags = (*CHAIN[:-4], "--epochs", 2, "--generations", 1, "--seed", 10, "--experiment", "other")
    assert run_script(SCRIPT, *flags, "--lr", 0.01, "--output", ".")[0] == 0
    shutil.copy("other/generation-0/last.safetensors", chain / "generation-0")
    refused(2, SCRIPT, *SAME, words=["generation-1", "teacher-checksum"])
    shutil.rmtree(chain / "generation-0")
    shutil.copytree("other/generation-0", chain / "generation-0")
    refused(2, SCRIPT, *SAME, words=["generation-0", "lr 0.01", "lr 0.05"])


def test_damaged_results_of_a_link(refused, chain):
    (chain / "generation-1" / "results.json").write_text('{"last":')
    refused(1, SCRIPT, *SAME, words=["generation-1/results.json", "damaged"])


# What is refused before anything is written.


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--generations", 0), ["--generations", "at least 1"]),
        (("--start-generation", 2), ["--start-generation", "0", "1"]),
        (("--start-generation", 1), ["--start-generation 1", "--teacher-checkpoint"]),
        (("--start-generation", 1, "--generations", 1, "--teacher-checkpoint", "x"),
         ["--generations 1", "--start-generation 1"]),
        (("--teacher-checkpoint", "x"), ["--teacher-checkpoint", "--start-generation 1"]),
        (("--teacher", "cifar_resnet14"), ["--teacher", "--start-generation 1"]),
        (("--lambda", -1), ["lambda", "0 or more"]),
        (("--lambda-end", -1), ["lambda_end", "0 or more"]),
        (("--lambda", "much"), ["--lambda", "much"]),
        (("--tau", 0), ["tau", "above 0"]),
        (("--eval-only",), ["--eval-only", "train/classifier.py"]),
        (("--method", "kd"), ["--method"]),
        (("--model", "cifar_resnet9"), ["cifar_resnet9", "cifar_resnet8"]),
        (("-b", 2000), ["2000", "--batch-size"]),
        (("--opt", "sgd", "--momentum", 0), ["--opt sgd", "momentum"]),
        (("--seeds", 0, "--seed", 1), ["--seeds"]),
    ],
    ids=lambda value: str(value[0]),
)  # fmt: skip
def test_impossible_flags(refused, flags, words):
    refused(2, SCRIPT, "--train-limit", 64, "--eval-limit", 64, *flags, words=words)


def test_teachers_that_cannot_teach(refused, image_folder, teacher_run, tmp_path):
    start = ("--start-generation", 1, "--teacher-checkpoint")
    refused(1, SCRIPT, *CHAIN, *start, "nothing.pt", words=["nothing.pt"])
    refused(1, SCRIPT, *CHAIN, *start, tmp_path, words=[str(tmp_path), "last.safetensors"])
    folder = ("--dataset", "folder", "--data-dir", image_folder, "--img-size", 32, "-b", 4)
    refused(1, SCRIPT, *CHAIN, *folder, *start, teacher_run, words=["10 classes", "2"])
    other = ("--teacher", "cifar_resnet14")
    refused(1, SCRIPT, *CHAIN, *start, teacher_run, *other, words=["does not fit", "resnet14"])


def test_config_goes_round(run_script, tmp_path):
    flags = ("--tau", 2, "--lambda-end", 0.25, "--generations", 2)
    code, printed, err = run_script(SCRIPT, "--print-config", *flags)
    assert code == 0, err
    assert yaml.safe_load(printed)["methods"]["born_again"]["tau"] == 2.0
    (tmp_path / "own.yaml").write_text(printed)
    assert run_script(SCRIPT, "--print-config", "-c", "own.yaml")[1] == printed
    assert list(tmp_path.iterdir()) == [tmp_path / "own.yaml"]
    assert run_script(DISTILL, "--print-config", "-c", "own.yaml")[0] == 0, "keys of other scripts"
    assert run_script(CLASSIFIER, "--print-config", "-c", "own.yaml")[0] == 0


def test_old_words_train(run_script):
    """The published run's flags."""
    flags = ("--dataset", "cifar10", "--start-generation", 1, "--seed", 10, "--model", "vgg16_bn",
             "--teacher-checkpoint", "x", "--epochs", 300, "--lr", 0.01, "--sched", "step",
             "--decay-epochs", 60, "--decay-rate", 0.3, "--tau", 1, "--lambda", 0.5,
             "--lambda-end", 0.5)  # fmt: skip
    code, out, err = run_script(SCRIPT, "--print-config", *flags)
    assert code == 0, err
    config = yaml.safe_load(out)
    assert (config["generations"], config["start-generation"], config["seed"]) == (5, 1, 10)


# Reports.


@pytest.mark.parametrize("paths", [["chain"], ["."], "inner"])
def test_report_on_generations(run_script, chain, tmp_path, paths):
    found = sorted(chain.iterdir()) if paths == "inner" else paths  # as the shell gives chain/*
    code, out, err = run_script(REPORT, *found)
    assert code == 0, err
    assert out.startswith("3 runs") and err == ""
    with (tmp_path / "report" / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = [next(v for v in row.values() if "born_again" in v or v == "none") for row in rows]
    assert labels == ["none", "born_again (generation 1)", "born_again (generation 2)"]
