"""docs/old_commands.md: its commands run, its old words train, and what it calls planned is not yet
there."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass

import pytest
import torch
import yaml

from kdfast.data import dataset_names
from kdfast.methods.base import _METHODS
from kdfast.training.parser import Parser
from kdfast.training.sigma_flags import sigma_flags
from kdfast.training.transfer_flags import generation_flags
from kdfast.training.transnet_runs import transnet_parser

from conftest import ROOT, load_script  # isort: skip
from test_methods import full_parser  # isort: skip

DOCUMENT = (ROOT / "docs/old_commands.md").read_text()
PLANNED = r"planned: issue (\d+), `([^`]+)`"
# Heading of a project, shortened -> its word in the table of flags.
PROJECTS = {
    "Knowledge Distillation": "ResNet-20/110",
    "Distilling Knowledge": "DIH",
    "Knowledge Consistency": "Consistency",
    "Explaining Knowledge": "Quantifying",
    "Knowledge Evolution": "Evolution",
}


@dataclass(frozen=True)
class Row:
    project: str
    what: str
    old: tuple[str, ...]
    new: str

    @property
    def planned(self) -> tuple[int, str] | None:
        """The issue, and the script, method or set that it brings."""
        found = re.match(PLANNED, self.new)
        return (int(found[1]), found[2]) if found else None

    @property
    def command(self) -> list[str]:
        return shlex.split(re.match("`([^`]+)`", self.new)[1])

    @property
    def script(self) -> tuple[str, list[str]] | None:
        """Path and flags of the script that the command starts."""
        places = [i for i, word in enumerate(self.command) if word.endswith(".py")]
        return (self.command[places[0]], self.command[places[0] + 1 :]) if places else None


def sections() -> dict[str, list[list[str]]]:
    """The cells of every table by its heading, without the first two lines."""
    found = {}
    for part in DOCUMENT.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert len({len(row) for row in cells}) == 1, "a cell holds a |"
        found[part.splitlines()[0]] = cells[2:]
    return found


def word(heading: str) -> str:
    (name,) = (name for start, name in PROJECTS.items() if heading.startswith(start))
    return name


def spans(cell: str) -> tuple[str, ...]:
    return tuple(re.findall("`([^`]+)`", cell)) or (cell,)


FLAGS = sections()["Flags"]
ROWS = [
    Row(word(heading), what, spans(old), new)
    for heading, rows in sections().items()
    if heading != "Flags"
    for what, old, new in rows
]
COMMANDS = [row for row in ROWS if row.planned is None]
SCRIPTS = [row for row in COMMANDS if row.script]


def row_of(what: str) -> Row:
    (row,) = (row for row in ROWS if row.what == what)
    return row


def is_there(thing: str) -> bool:
    """Whether kdfast has a script, or `--method` or `--dataset` and its name."""
    kind, _, name = thing.partition(" ")
    if kind == "--method":
        return name in _METHODS
    if kind == "--dataset":
        return name in dataset_names()
    assert kind.endswith(".py") and not name, thing
    return (ROOT / kind).exists()


def names(rows: list[Row]) -> list[str]:
    return [f"{row.project}: {row.what}" for row in rows]


# The document.


def test_every_project_and_every_row_is_read():
    assert {row.project for row in ROWS} == set(PROJECTS.values()) == {row[0] for row in FLAGS}
    assert len(ROWS) >= 40 and len(SCRIPTS) >= 12
    lines = [line for line in DOCUMENT.splitlines() if line.startswith("| ")]
    assert len(lines) == len(ROWS) + len(FLAGS) + len(sections()), "one head a table"


@pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
def test_every_row_has_a_command_or_an_issue(row):
    assert row.what and row.old[0]
    if row.planned:
        assert row.planned[0] in (5, 6, 7, 8) and not is_there(row.planned[1]), (
            f"{row.planned[1]} has arrived: give its command"
        )
    elif row.script:
        assert (ROOT / row.script[0]).exists()
    elif row.command[:2] == ["python", "-m"]:
        assert row.command[2] == "kdfast.training.crop" and row.command[3] == "--dataset"
        assert row.command[4] in dataset_names()
    else:
        assert " ".join(row.command) == "pip install -e ."


@pytest.mark.parametrize("flag", FLAGS, ids=[" ".join(row[:2]) for row in FLAGS])
def test_every_flag_is_ours_or_planned(flag):
    _, old, new, _ = flag
    assert spans(old)[0] != old, "old flags are code"
    if found := re.fullmatch(PLANNED, new):
        assert not is_there(found[2]), f"{found[2]} has arrived: give its flag"
    elif new == "none":
        assert flag[3], "why there is none"
    else:
        chain, sigma = Parser(), Parser()
        generation_flags(chain)
        sigma_flags(sigma)
        knowledge = load_script("analysis/knowledge.py").knowledge_parser()
        parsers = (full_parser(), chain, transnet_parser("train/transnet.py"), sigma, knowledge)
        actions = [action for parser in parsers for action in parser._actions]
        ours = [option for action in actions for option in action.option_strings]
        assert new in [f"`{name}`" for name in (*ours, "CUDA_VISIBLE_DEVICES", "RUN")]


def test_every_flag_of_an_old_command_is_in_the_table():
    """The flags of other people's tools aside."""
    known = {(project, flag) for project, old, _, _ in FLAGS for flag in spans(old)}
    used = {
        (row.project, flag)
        for row in ROWS
        for command in row.old
        if not command.startswith("pip3 ")
        for flag in re.findall(r"(?<=\s)--?[a-z]\S*", command)
    }
    assert used - known == set()


# The commands.


def options_of(row: Row, run_script) -> dict:
    script, flags = row.script
    if "TRANSNET" in flags:
        one = {"linearLayers_conv.0.weight": torch.zeros(2, 2, 3, 3)}
        torch.save(one | {"nonLinearLayers_p_pre": torch.zeros(0)}, "TRANSNET")
    if script == "analysis/knowledge.py":  # of flags alone
        parser = load_script(script).knowledge_parser()
        return {key: str(value) for key, value in parser.given(flags).items()}
    code, out, err = run_script(script, *flags, "--print-config")
    assert code == 0, err
    return yaml.safe_load(out)


@pytest.mark.parametrize("row", SCRIPTS, ids=names(SCRIPTS))
def test_commands_are_understood(row, run_script):
    if "--help" in row.command:
        with pytest.raises(SystemExit, match=r"^0$"):
            run_script(row.script[0], "--help")
        return
    options = options_of(row, run_script)
    # Both have it from the runs that they are given.
    if row.script[0] not in ("analysis/knowledge.py", "train/sigma.py"):
        assert options["dataset"] in (*dataset_names(), "folder")


@pytest.mark.parametrize("row", SCRIPTS, ids=names(SCRIPTS))
def test_numbers_of_the_old_command_are_kept(row, run_script):
    """Every number on the old command line is the option's value that the table of flags names."""
    ours = {
        (project, flag): spans(new)[0].lstrip("-")
        for project, old, new, _ in FLAGS
        for flag in spans(old)
        if not new.startswith(("planned", "none"))
    }
    short = {"b": "batch-size", "j": "workers"}
    other = {"CUDA_VISIBLE_DEVICES", "save-epochs"}  # a variable; a list for an interval
    for command in row.old:
        for flag, value in re.findall(r"(--?[a-z]\S*)((?: [0-9.]+)+)(?= |$)", command):
            key = ours[row.project, flag]
            if key in other:
                continue
            if "had no such" in row.new and key in ("alpha", "beta", "temperature"):
                continue
            options = options_of(row, run_script)
            if key == "decades" and float(value) == 0:
                assert options["sched"] == "step"
                continue
            if key == "layer":
                assert options["layer"] == f"features.{value.strip()}"
                continue
            loss = {k: v for m in options.get("methods", {}).values() for k, v in m.items()}
            init = options.get("methods", {}).get("fitnet", {}).get("init", {})
            inside = {"lambda": "lambda_start", "lambda-end": "lambda_end"}.get(key, key)
            if inside in loss:
                got = loss[inside]
            elif key.startswith("init-"):
                got = init[key.removeprefix("init-")]
            else:
                got = options[short.get(key, key)]
            numbers = [float(number) for number in value.split()]
            assert (got if isinstance(got, list) else [got]) == numbers, flag


SELF = {
    "recipe": "self",
    "dataset": "cifar10",
    "model": "cifar_resnet20",
    "model-kwargs": {"init": "xavier"},
    "epochs": 200,
    "global-batch-size": 128,
    "opt": "momentum",
    "lr": 0.1,
    "momentum": 0.9,
    "weight-decay": 1e-4,
    "sched": "multistep",
    "decay-milestones": [100, 150],
    "decay-rate": 0.1,
    "crop-padding": 4,
    "drop-last": True,
}
DISTILLED = SELF | {
    "teacher": "cifar_resnet20",
    "teacher-checkpoint": "output/classifier-cifar10-cifar_resnet20-s0",
    "gamma": 1.0,
}
KD = {"alpha": 1.0, "temperature": 4.0}
AT = {"beta": 1000.0}
DIH = {
    "dataset": "cifar100",
    "epochs": 200,
    "batch-size": 64,
    "opt": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight-decay": 5e-4,
    "sched": "multistep",
    "decay-milestones": [60, 120, 180],
    "decay-rate": 0.2,
    "crop-padding": 4,
    "padding-mode": "reflect",
    "seed": 3,
}
TAUGHT = {
    "model": "cifar_resnet8",
    "teacher": "cifar_resnet110",
    "teacher-checkpoint": "output/teacher",
}
CONSISTENT = {
    "dataset": "cub200",
    "model": "torchvision.models:vgg16_bn",
    "global-batch-size": 128,
    "opt": "momentum",
    "lr": 0.01,
    "momentum": 0.9,
    "weight-decay": 1e-4,
    "sched": "step",
    "decay-epochs": 60,
    "decay-rate": 0.3,
    "val-interval": 5,
    "img-size": 224,
    "crop-mode": "squash",
    "crop-pct": 1.0,
    "aug": False,
}
TRANSNET = {
    "dataset": "cub200",
    "model": "torchvision.models:vgg16_bn",
    "checkpoint-a": "NET_A",
    "checkpoint-b": ["NET_B"],
    "layer": "features.30",
    "crop-mode": "squash",
    "crop-pct": 1.0,
    "aug": False,
}
QUANTIFYING = {
    "dataset": "ilsvrc-mammals",
    "epochs": 150,
    "global-batch-size": 64,
    "opt": "momentum",
    "momentum": 0.9,
    "weight-decay": 1e-4,
    "sched": "log",
    "decades": 1.0,
    "model": "torchvision.models:vgg16",
    "init": "vgg",
    "img-size": 224,
    "train-crop-mode": "crop",
    "train-resize": 256,
    "hflip": 0.5,
    "aug": True,
    "path-length": ["features.28", "classifier.0", "classifier.3", "classifier.6"],
    "save-epochs": [0, 2, 5, 10, 15, 20, 25, 30, 40, 50, 70, 90, 110, 130, 150],
    "seed": 0,
}
MATCHED = {
    "teacher": "torchvision.models:vgg16",
    "teacher-checkpoint": "output/teacher",
    "student-layers": ["classifier.0"],
    "methods": {"layer": {"beta": 1.0}},
    "gamma": 0.0,
    "lr": 1e-4,
    "save-epochs": [*range(11), *range(15, 151, 5)],
}
LATER = [170, 190, 240, 280, 320, 360, 400]
SUPPLEMENT = QUANTIFYING | {
    "model": "torchvision.models:vgg19",
    "epochs": 800,
    "lr": 1e-2,
    "weight-decay": 5e-4,
    "path-length": ["features.34", "classifier.0", "classifier.3", "classifier.6"],
    "save-epochs": QUANTIFYING["save-epochs"] + LATER,
}
# Of teachers; what is not augmented is trained for 400 epochs.
LONGEST = {"save-epochs": SUPPLEMENT["save-epochs"] + [800]}
EVOLUTION = {
    "dataset": "flowers102",
    "model": "resnet18",
    "generations": 5,
    "split-mode": "kels",
    "split-rate": 0.5,
    "init": "kaiming-normal",
    "epochs": 200,
    "global-batch-size": 32,
    "opt": "momentum",
    "lr": 0.256,
    "momentum": 0.9,
    "weight-decay": 1e-4,
    "sched": "evolution-cosine",
    "warmup-epochs": 5,
    "smoothing": 0.1,
    "val-interval": 10,
}
PUBLISHED = {
    "says where data and checkpoints are": EVOLUTION | {"data-dir": "DIR", "output": "RUNS"},
    "evolves a network over generations": EVOLUTION,
    "the same under a name": EVOLUTION | {"experiment": "exp_name"},
    "cuts the slim network out": EVOLUTION,
    "reads Flowers-102 and its lists": EVOLUTION | {"download": True},
    "reads Aircraft and its lists": EVOLUTION | {"dataset": "aircraft", "download": True},
    "trains the teacher": SELF,
    "trains without a teacher": SELF,
    "fetches CIFAR-10 and CIFAR-100": SELF | {"download": True},
    "distils into a student by attention": DISTILLED | {"methods": {"at": AT}},
    "matches logits": DISTILLED | {"methods": {"logits": {"beta": 1.0, "compare": "feature"}}},
    "soft targets": DISTILLED | {"methods": {"kd": KD}},
    "attention and soft targets": DISTILLED | {"methods": {"at": AT, "kd": KD | {"alpha": 0.9}}},
    "flow of solution, one stage": DISTILLED
    | {"methods": {"fsp": {"beta": pytest.approx(1 / 9), "pool": "avg"}}},
    "trains the teacher with cross-entropy": DIH | {"model": "cifar_resnet110"},
    "KD: soft targets": DIH
    | {
        "model": "cifar_resnet8",
        "teacher": "cifar_resnet110",
        "methods": {"kd": {"alpha": 0.1, "temperature": 5.0}},
        "gamma": 0.9,
    },
    "fine-tunes the teacher's heads": DIH
    | {"teacher": "cifar_resnet110", "teacher-checkpoint": "output/teacher", "kind": "linear"},
    "FitNets, then soft targets": DIH
    | TAUGHT
    | {
        "methods": {
            "fitnet": {
                "beta": 1.0,
                "stage": 1,
                "regressor": "auto",
                "init": {
                    "epochs": 40,
                    "lr": 0.1,
                    "decay-milestones": [],
                    "opt": "sgd",
                    "weight-decay": 5e-4,
                    "momentum": 0.9,
                },
            },
            "kd": {"alpha": 0.1, "temperature": 5.0},
        },
        "gamma": 0.9,
    },
    "CRD": DIH
    | TAUGHT
    | {
        "batch-size": 128,
        "opt": "momentum",
        "methods": {"crd": {"beta": 0.8}, "kd": {"alpha": 0.9, "temperature": 4.0}},
        "gamma": 1.0,
    },
    "TOFD": DIH
    | {
        "batch-size": 128,
        "opt": "momentum",
        "model": "cifar_resnet8",
        "teacher": "cifar_resnet110",
        "heads": "output/tofd_teacher",
        "methods": {"tofd": {"beta": 1.0, "feature": 0.05, "orthogonal": 0.03, "growth": 3.0}},
        "gamma": 1.0,
    },
    "MHKD": DIH
    | TAUGHT
    | {
        "batch-size": 128,
        "methods": {
            "mhkd": {
                "beta": 1.0,
                "alpha": 0.1,
                "temperature": 4.0,
                "share": 0.5,
                "stages": 2,
                "width": 256,
            }
        },
        "gamma": 0.0,
    },
    "DIH": DIH
    | TAUGHT
    | {
        "heads": "output/heads",
        "methods": {"dih": {"beta": 1.0, "alpha": 0.1, "temperature": 5.0, "reduction": "sum"}},
        "gamma": 0.0,
    },
    "trains Born-Again networks": {
        "model": "vgg16_bn",
        "epochs": 300,
        "global-batch-size": 128,
        "opt": "momentum",
        "lr": 0.01,
        "momentum": 0.9,
        "weight-decay": 1e-4,
        "sched": "step",
        "decay-epochs": 60,
        "decay-rate": 0.3,
        "aug": False,
        "generations": 5,
        "methods": {
            "born_again": {"beta": 1.0, "lambda_start": 0.5, "lambda_end": 0.5, "tau": 1.0}
        },
        "gamma": 1.0,
        "seed": 10,
    },
    "fetches trained networks into `model_checkpoints/`": CONSISTENT
    | {"initial-checkpoint": "model_checkpoints/NET.pth.tar"},
    "trains a classifier on the cropped folders": CONSISTENT
    | {"epochs": 300, "save-epochs": [50, 100, 150, 200, 250, 300], "seed": 0},
    "the same on MIX320, 300 epochs, seeds 0 and 16": CONSISTENT
    | {"dataset": "mix320", "model": "vgg16_bn", "epochs": 300, "global-batch-size": 64},
    "the same on VOC animals, 150 epochs, seeds 0 and 5": CONSISTENT
    | {"dataset": "voc-animal", "model": "vgg16_bn", "epochs": 150},
    "writes the features of two networks": TRANSNET | {"features": "cache"},
    "trains a Trans-Net from A's features to B's": TRANSNET
    | {
        "epochs": 1000,
        "global-batch-size": 64,
        "opt": "adam",
        "lr": 1e-4,
        "weight-decay": 1e-4,
        "sched": "log",
        "decades": 2.0,
        "layers": 3,
        "alpha": [0.1, 0.1],
    },
    "fine-tunes B's remaining layers behind it": TRANSNET
    | {
        "epochs": 100,
        "global-batch-size": 64,
        "opt": "adam",
        "lr": 1e-5,
        "weight-decay": 1e-4,
        "sched": "log",
        "decades": 2.0,
        "val-interval": 10,
    },
    "shows images, features and their orders": TRANSNET | {"images": [0, 1], "save-maps": True},
    "computes the variances of the paper": TRANSNET | {"split": "test"},
    "trains the teacher, from ImageNet weights": QUANTIFYING
    | {"lr": 1e-3, "pretrained": True, "reset-layers": ["classifier"]},
    "trains the baseline, from scratch": QUANTIFYING | {"lr": 1e-2, "pretrained": False},
    "distils the teacher's layer into the student": QUANTIFYING | MATCHED,
    "tunes the classifier behind the matched layer": QUANTIFYING
    | MATCHED
    | {"classifier-epochs": 100, "classifier-lr": 1e-3},
    "computes the information a layer discards": {
        "runs": ["output/student", "output/baseline"],
        "candidates": 500,
        "images": 50,
        "grid": 16,
        "samples": 96,
        "initial-sigma": 0.01,
        "sigma-range": [1e-3, 1.0],
        "sigma-lr": 1e-4,
        "steps": 60,
        "more-steps": 20,
        "escalation": 1.5,
        "threshold": -2.8,
        "seed": 0,
    },
    "computes the three metrics, from paths written into the file": {
        "student": "output/sigma-student-classifier.0-s0",
        "baseline": "output/sigma-baseline-classifier.0-s0",
    },
    "trains a teacher from scratch": SUPPLEMENT
    | LONGEST
    | {"vflip": 0.5, "rotation": 30.0, "color-jitter": 1.0, "hue-jitter": 0.5},
    "trains its baseline, without augmentation": SUPPLEMENT | {"aug": False, "epochs": 400},
    "distils its student, without augmentation": SUPPLEMENT
    | MATCHED
    | {
        "save-epochs": SUPPLEMENT["save-epochs"],
        "aug": False,
        "teacher": "torchvision.models:vgg19",
        "teacher-checkpoint": "output/teacher/last.safetensors",
        "epochs": 400,
        "lr": 1e-3,
        "sched": "constant",
    },
}


def test_every_training_command_has_its_published_numbers():
    assert {row.what for row in SCRIPTS if "--help" not in row.command} == set(PUBLISHED)


@pytest.mark.parametrize("what", PUBLISHED)
def test_published_numbers(what, run_script):
    options = options_of(row_of(what), run_script)
    assert {key: options.get(key) for key in PUBLISHED[what]} == PUBLISHED[what]


# The old words, trained.


@pytest.mark.parametrize(
    ("old", "methods"),
    [
        ("base", ["none"]),
        ("logit", ["logits"]),
        ("st", ["kd"]),
        ("at", ["at"]),
        ("at_st", ["at", "kd"]),
        ("fsp", ["fsp"]),
    ],
)
def test_old_words_train(old, methods, run_script, teacher_run, tmp_path):
    code, out, err = run_script(
        "train/distill.py",
        *("--train-limit", 64, "--eval-limit", 32, "--epochs", 1, "--no-baseline"),
        *("--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run, "--method", old),
    )
    assert code == 0, err
    results = json.loads(out.strip().splitlines()[-1])
    assert results["last"]["epoch"] == 1
    run = tmp_path / results["run"]
    options = yaml.safe_load((run / "args.yaml").read_text())["options"]
    assert options["method"] == methods
    terms = (run / "summary.csv").read_text().splitlines()[0]
    assert all(f"train_{name}" in terms for name in methods if name != "none")
