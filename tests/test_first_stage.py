"""A first stage of a method's term alone: what it trains, what it leaves, how the run goes on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_methods import choice_of, options_of
from test_resume import ROOT, TORCHRUN, command, finish
from torch import nn

from kdfast.analysis.runs import read_runs
from kdfast.methods import find_method
from kdfast.models import Taps, checksum, create_model, read_weights
from kdfast.seeding import derive_seed
from kdfast.training.first_stage import Hints, first_stage_options
from kdfast.training.objective import plan_taps

DISTILL = "train/distill.py"
FEW = ("--train-limit", 64, "--eval-limit", 32, "-b", 32, "--epochs", 1, "--model", "cifar_resnet8",
       "--teacher", "cifar_resnet8", "--no-baseline", "--output", ".")  # fmt: skip
# A hint at the first stage of the network.
EARLY = ("--student-layers", "act1", "layer1", "--teacher-layers", "act1", "layer1")
RECIPE = """
lr: 0.1
decay-rate: 0.2
methods:
  kd: {alpha: 0.3}
  fsp: {beta: 2, gamma: 5, init: {epochs: 50, lr: 0.01, decay_milestones: [30, 40]}}
"""


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "summary.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def initial(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(derive_seed(seed, "student"))
    return create_model("cifar_resnet8", 10).state_dict()


# Which stages there are.


def test_flags_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE)
    choice = choice_of("--recipe", recipe, "--method", "fsp", "--init-lr", 0.5)
    assert choice.init == {
        "epochs": 50, "lr": 0.5, "decay-milestones": [30, 40], "opt": "momentum",
        "weight-decay": 5e-4, "momentum": 0.9,
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text("methods: {fsp: {init: {epochs: 7}}}")
    choice = choice_of("--recipe", recipe, "-c", config, "--method", "fsp")
    assert (choice.init["epochs"], choice.init["lr"]) == (7, 0.01)
    none = choice_of("--recipe", recipe, "--method", "fsp", "--init-decay-milestones")
    assert none.init["decay-milestones"] == []


def test_the_main_stage_has_what_is_left(tmp_path):
    """fsp's own gamma is of its one-stage form; kd's rule holds where kd is what remains."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE)
    both = choice_of("--recipe", recipe, "--method", "fsp", "kd")
    first, main = both.first_stage(), both.main_stage()
    assert (list(first.methods), first.gamma, first.weights["fsp"]) == (["fsp"], 0, 2)
    assert (list(main.methods), main.gamma) == (["kd"], pytest.approx(0.7))
    alone = choice_of("--recipe", recipe, "--method", "fsp")
    assert (alone.main_stage().methods, alone.main_stage().gamma) == ({}, 1)
    one = choice_of("--recipe", recipe, "--method", "fsp", "--init-epochs", 0)
    assert not one.staged and list(one.main_stage().methods) == ["fsp"]
    assert one.gamma == 5
    assert not choice_of("--recipe", "self", "--method", "fsp").staged, "one stage is the default"
    assert not choice_of("--recipe", recipe, "--method", "kd").staged, "a recipe serves all methods"


@pytest.mark.parametrize("flags", [(), ("--init-epochs", 0), ("--init-lr", 0.5)])
def test_printed_config_gives_the_same_stages(run_script, tmp_path, flags):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    base = ("--recipe", tmp_path / "mine.yaml", "--method", "fsp", "kd")
    code, out, err = run_script(DISTILL, *base, *flags, "--print-config")
    assert code == 0, err
    (tmp_path / "printed.yaml").write_text(out)
    again = choice_of("-c", tmp_path / "printed.yaml")
    assert again == choice_of(*base, *flags)
    assert not any(key.startswith("init-") for key in yaml.safe_load(out))


def test_the_rate_of_the_first_stage():
    options = options_of("--recipe", "crd", "--warmup-epochs", 3, "--model-ema", "--init-lr", 0.5)
    init = {"epochs": 4, "lr": 0.5, "decay-milestones": []}
    own = first_stage_options(options, init)
    assert (own.sched, own.warmup_epochs, own.epochs, own.lr) == ("constant", 0, 4, 0.5)
    assert not own.model_ema, "the main stage begins with the last weights"
    own = first_stage_options(options, init | {"decay-milestones": [2]})
    assert (own.sched, own.decay_milestones, own.decay_rate) == ("multistep", [2], 0.1)
    assert options.epochs == 240 and options.sched == "multistep"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method kd --init-epochs 3", ["--init-epochs", "fsp", "none of them is used"]),
        ("--method none --init-lr 3", ["--init-lr", "none of them is used"]),
        ("--method fsp --init-lr 0.1", ["--init-lr", "--init-epochs N"]),
        ("--method fsp --init-epochs -1", ["--init-epochs", "not be negative"]),
        ("--method fsp --init-epochs 1 --init-opt sgdd", ["--init-opt", "'sgdd'", "sgd"]),
        ("--method fsp --init-epochs 1 --init-opt sgd --init-momentum 0", ["sgd", "momentum"]),
        ("--method fsp kd --init-epochs 1 --opt sgd --momentum 0 --init-opt adamw", ["--opt sgd"]),
        ("--method fsp --init-epochs 1 --student cifar_resnet8x4", ["equal channels"]),
    ],
)
def test_bad_flags(refused, flags, words):
    few = ("--teacher", "cifar_resnet8", "--recipe", "digits")
    refused(2, DISTILL, *few, *flags.split(), words=words)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("{fsp: {init: 3}}", ["methods: fsp: init must map", "3"]),
        ("{fsp: {init: {epoch: 3}}}", ["init:", "'epoch'", "epochs"]),
        ("{fsp: {init: {epochs: three}}}", ["fsp: init: epochs", "'three'"]),
        ("{fsp: {init: {lr: -1}}}", ["fsp: init: lr", "from 0 up"]),
        ("{kd: {init: {epochs: 3}}}", ["kd", "'init'"]),
    ],
)
def test_bad_settings_in_a_file(refused, tmp_path, methods, words):
    (tmp_path / "c.yaml").write_text(f"methods: {methods}\nmethod: [fsp]\n")
    refused(2, DISTILL, "-c", "c.yaml", words=words)


# What is trained.


@pytest.fixture
def staged(run_script, teacher_run, tmp_path):
    """Runs with a first stage of fsp at the first stage of the network; returns its folder."""

    def run(name: str, *flags: object) -> Path:
        flags = (*FEW, *EARLY, "--method", "fsp", "--init-epochs", 2, *flags)
        flags += ("--teacher-checkpoint", teacher_run, "--experiment", name)
        code, _, err = run_script(DISTILL, *flags)
        assert code == 0, err
        return tmp_path / name

    return run


def test_only_what_the_term_reaches_changes(staged):
    run = staged("run", "--init-lr", 0.1)
    before, after = initial(), load_file(run / "first-stage/last.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    early = {n for n in before if n.startswith(("conv1", "bn1", "layer1"))}
    assert changed == early, "statistics of later layers are bit-identical, too"
    (main,) = rows(run)
    assert len(rows(run / "first-stage")) == 2 and "train_fsp" not in main
    first = rows(run / "first-stage")[0]
    assert first["train_loss"] == pytest.approx(0.1 * first["train_fsp"]), "recipe digits' weight"
    assert first["train_ce"] > 0
    assert [row["lr"] for row in rows(run / "first-stage")] == [0.1, 0.1]
    results = json.loads((run / "results.json").read_text())
    assert results["first_stage"] == {
        "epochs": 2, "methods": ["fsp"], "checksum": checksum(after), "run": "run/first-stage",
    }  # fmt: skip
    assert checksum(after) in (run / "train.log").read_text()
    record = read_weights(run / "first-stage/last.safetensors")[1]
    assert record["parent"] == read_weights(run / "last.safetensors")[1]["parent"]


def test_the_main_stage_is_a_run_from_the_last_weights(staged, run_script, tmp_path):
    """Bit for bit that of labels alone; the baseline begins with the untouched weights."""
    run = staged("run", "--baseline", "--init-lr", 0.1, "--model-ema", "--model-ema-decay", 0.5)
    alone = ("--method", "none", "--teacher-checkpoint", run / "best.safetensors")
    alone += ("--model-ema", "--model-ema-decay", 0.5)
    last = ("--initial-checkpoint", run / "first-stage/last.safetensors")
    assert run_script(DISTILL, *FEW, *alone, *last, "--experiment", "on")[0] == 0
    assert run_script(DISTILL, *FEW, *alone, "--experiment", "anew")[0] == 0
    for mine, other in ((run, "on"), (run / "baseline", "anew")):
        one, two = (load_file(p / "last.safetensors") for p in (mine, tmp_path / other))
        assert checksum(one) == checksum(two)
    tensors = load_file(run / "checkpoints/epoch-0001/objective.safetensors")
    assert not any(name.startswith("methods.") for name in tensors)


def test_no_loss_where_student_and_teacher_agree(staged, teacher_run):
    same = ("--initial-checkpoint", teacher_run, "--freeze-bn", "--no-fold-teacher")
    run = staged("run", *same, "--init-weight-decay", 0)
    assert [row["train_fsp"] for row in rows(run / "first-stage")] == [0, 0]


HINT = '''
from typing import ClassVar
import torch
from torch import nn
from kdfast.methods import Method, method

@method("middle")
class Hint(Method):
    """The middle layer through a regressor."""

    initialises: ClassVar[bool] = True

    def taps(self):
        return "stages"

    def pair(self, teacher, student):
        return super().pair(teacher, student)[1:2]

    def setup(self, pairing):
        self.regressor = nn.Conv2d(pairing.student_shapes[0][1], pairing.teacher_shapes[0][1], 1)

    def forward(self, student, teacher, labels):
        return (self.regressor(student.features[0]) - teacher.features[0]).square().mean()
'''


def test_what_the_first_stage_trains_beside_the_student_is_dropped(
    run_script, teacher_run, tmp_path
):
    (tmp_path / "hint.py").write_text(HINT)
    flags = (*FEW, "--plugin", "hint.py", "--method", "middle", "kd", "--init-epochs", 1)
    code, out, err = run_script(DISTILL, *flags, "--teacher-checkpoint", teacher_run,
                                "--experiment", "run")  # fmt: skip
    assert code == 0, err
    assert "middle: layer2 -> layer2" in out
    first = load_file("run/first-stage/checkpoints/epoch-0001/objective.safetensors")
    main = load_file("run/checkpoints/epoch-0001/objective.safetensors")
    assert "methods.0.regressor.weight" in first and "methods.0.regressor.weight" not in main
    before, after = initial(), load_file("run/first-stage/last.safetensors")
    for name, value in before.items():
        late = name.startswith(("layer3", "fc"))
        assert torch.equal(value, after[name]) == late or "num_batches" in name, name
    assert "train_kd" in rows(Path("run"))[0]


class Tail(nn.Sequential):
    """Layers without parameters after the hint."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10),
        )  # fmt: skip


def test_modules_after_the_hint_rest():
    """By what the term depends on, so also those without parameters; cross-entropy is only read."""
    torch.manual_seed(0)
    net = Tail()
    methods = [find_method("fsp")()]
    plan = plan_taps(methods, net, Tail(), ["0", "2"], ["0", "2"])
    hints = Hints(Taps(net, plan.student_layers), methods, {"fsp": 3.0}, 0.0, plan.views)
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    taught = (torch.randn(4, 10), (torch.randn(4, 4, 6, 6), torch.randn(4, 4, 6, 6)))
    total, terms, _ = hints(images, labels, *taught)
    assert total.item() == pytest.approx(3 * terms[1].item()) and terms[0] > 0
    total.backward()
    assert net[3].weight.grad is None and net[0].weight.grad is not None
    hints.rest(images, labels, *taught)
    hints.train()
    assert [module.training for module in net] == [True, True, True] + [False] * 6
    assert [p.requires_grad for p in net.parameters()] == [True, True] + [False] * 4
    assert net[1].num_batches_tracked == 1, "the example is not in the statistics"


# How it goes on.


def test_two_processes_equal_one(run_script, teacher_run, tmp_path):
    flags = (*FEW, *EARLY, "--method", "fsp", "--init-epochs", 2, "--init-lr", 0.1, "--freeze-bn",
             "--teacher-checkpoint", teacher_run)  # fmt: skip
    code, _, err = run_script(DISTILL, *flags, "--experiment", "one")
    assert code == 0, err
    flags += ("-b", 16, "--experiment", "two")
    finish(command(*TORCHRUN, ROOT / DISTILL, *flags, cwd=tmp_path))
    for part in (".", "first-stage"):
        one, two = (tmp_path / name / part for name in ("one", "two"))
        records = [json.loads((run / "results.json").read_text()) for run in (one, two)]
        assert [r["processes"] for r in records] == [1, 2]
        assert records[0]["global_batch"] == records[1]["global_batch"] == 32
        first, second = (load_file(run / "last.safetensors") for run in (one, two))
        for name, value in first.items():
            assert torch.allclose(value, second[name], atol=1e-5), name
    assert not torch.equal(initial()["conv1.weight"], first["conv1.weight"])


@pytest.fixture(scope="session")
def finished_run(teacher_run, tmp_path_factory):
    from conftest import load_script

    folder = tmp_path_factory.mktemp("staged")
    flags = (*FEW, *GOING, "--output", folder, "--teacher-checkpoint", teacher_run)
    assert load_script(DISTILL).main([str(flag) for flag in flags]) == 0
    return folder / "mine"


GOING = ("--method", "fsp", "--init-epochs", 1, "--experiment", "mine")


@pytest.fixture
def finished(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "mine")


def test_a_finished_first_stage_stays(run_script, finished, teacher_run):
    """Also when the main stage is made longer."""
    before = (finished / "first-stage/train.log").read_bytes()
    flags = (*FEW, *GOING, "--teacher-checkpoint", teacher_run, "--resume", "auto")
    assert run_script(DISTILL, *flags, "--epochs", 2)[0] == 0
    assert (finished / "first-stage/train.log").read_bytes() == before
    assert len(rows(finished)) == 2


def test_a_report_counts_a_run_in_its_first_stage(finished):
    for name in ("summary.csv", "results.json"):
        (finished / name).unlink()
    runs, (unfinished,) = read_runs([finished])
    assert not runs and (unfinished.path, unfinished.done, unfinished.epochs) == (finished, 0, 1)


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        ("removed", 1, ["first-stage", "missing", "put the first stage back", "remove mine"]),
        ("weights", 1, ["first-stage/last.safetensors", "damaged"]),
        ("record", 2, ["cannot resume mine/first-stage", "lr 0.05", "lr 0.7"]),
        ("flag", 2, ["cannot resume mine", "epochs"]),
    ],
)
def test_damaged_first_stage(refused, finished, teacher_run, damage, code, words):
    first, more = finished / "first-stage", ()
    if damage == "removed":
        shutil.rmtree(first)
    elif damage == "weights":
        path = first / "last.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "record":
        text = (first / "args.yaml").read_text()
        (first / "args.yaml").write_text(text.replace("  lr: 0.05", "  lr: 0.7"))
        words = [words[0], words[2], words[1]]
    else:
        more = ("--init-epochs", 2)
    flags = (*FEW, *GOING, "--teacher-checkpoint", teacher_run, "--resume", "auto", *more)
    leaves = ["mine/train.log", "mine/args.yaml", "mine/first-stage/train.log"]
    refused(code, DISTILL, *flags, words=words, leaves=leaves)
