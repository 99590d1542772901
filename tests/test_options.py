"""Flags, recipes, config files: who wins, what is printed, what a batch is."""

from __future__ import annotations

import pytest
import yaml

from kdfast.errors import UsageError
from kdfast.models import read_weights
from kdfast.training.objective import choose_methods
from kdfast.training.options import batch_size
from kdfast.training.parser import read_recipe, recipe_names

from test_methods import full_parser, options_of  # isort: skip


def test_later_wins(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("lr: 0.3\nepochs: 7\nmean: [0.1, 0.2, 0.3]\nchannels_last: true\n")
    options = options_of("-c", config, "--epochs", 9)
    assert (options.lr, options.epochs, options.momentum) == (0.3, 9, 0.9)
    assert options.mean == [0.1, 0.2, 0.3] and options.channels_last is True
    assert options.sched == "cosine", "the digits recipe, weaker than the config"


def test_recipe_follows_the_data_set():
    assert options_of().recipe == "digits"
    assert options_of("--dataset", "cifar100").recipe == "crd"
    assert options_of("--lr", "0.1").epochs == 6, "one flag keeps the other defaults"


@pytest.mark.parametrize("spelling", ["--batch-size", "--batch_size", "-b"])
def test_spellings(spelling):
    assert options_of(spelling, 16).batch_size == 16
    assert options_of("--global_batch_size=32").global_batch_size == 32


def test_student_is_the_model():
    assert options_of("--student", "resnet18").model == "resnet18"
    assert options_of("--model", "resnet18").model == "resnet18"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses(name):
    recipe = read_recipe(name)
    options = options_of("--recipe", name)
    parts = recipe.get("when", [])
    holds = [
        p for p in parts if p["if"].get("dataset") == "digits" or p["if"] == {"method": "layer"}
    ]
    shortened = {key for part in holds for key in part}
    if "epochs" in shortened:
        shortened.add("save-epochs")  # none after the last
    for key in recipe.keys() & full_parser().actions().keys():
        value = recipe[key]
        if key not in ("model-kwargs", "teacher-kwargs", *shortened):
            assert getattr(options, key.replace("-", "_")) == value, key


CONDITIONS = """
method: [at]
lr: 0.1
when:
  - if: {dataset: [cifar100, cifar10]}
    mean: [0.1, 0.2, 0.3]
  - if: {model: [resnet8x4, cifar_resnet20], method: at}
    lr: 0.01
    methods: {at: {beta: 7}}
  - if: {method: [fsp]}
    methods: {fsp: {beta: 3}}
"""


@pytest.mark.parametrize(
    ("flags", "lr", "mean", "beta"),
    [
        ((), 0.1, None, 1000),
        (("--dataset", "torch/cifar10", "--student", "cifar_resnet8x4"), 0.01, [0.1, 0.2, 0.3], 7),
        (("--model", "resnet20"), 0.01, None, 7),
        (("--model", "resnet20", "--lr", 0.5, "--beta", "at=9"), 0.5, None, 9),
        (("--model", "resnet20", "--method", "at_st"), 0.01, None, 7),
        (("--model", "cifar_resnet8x4", "--method", "kd"), 0.1, None, None),
    ],
)
def test_conditions_in_a_recipe(tmp_path, flags, lr, mean, beta):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(CONDITIONS)
    options = options_of("--recipe", recipe, *flags)
    assert (options.lr, options.mean) == (lr, mean)
    assert choose_methods(options).weights.get("at") == beta


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("[{if: {modell: x}, lr: 1}]", r"recipe .*: when: unknown key 'modell'.*model"),
        ("[{if: {method: crdd}, lr: 1}]", "unknown method 'crdd'"),
        ("[{if: {method: kd}, lrr: 1}]", r"unknown key 'lrr'"),
        ("[{lr: 1}]", "each entry of when must be a mapping with an `if` mapping"),
        ("3", "each entry of when"),
    ],
)
def test_bad_conditions_in_a_recipe(tmp_path, when, message):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"method: [kd]\nwhen: {when}\n")
    with pytest.raises(UsageError, match=message):
        options_of("--recipe", recipe)


def test_mean_of_a_recipe_is_that_of_its_set(run_script, tmp_path, teacher_run):
    """Weights that exist bring their own figures; a flag wins over both."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("mean: [0.5, 0.5, 0.5]\nstd: [0.2, 0.2, 0.2]\n")
    few = ("--train-limit", 64, "--eval-limit", 32, "--epochs", 1, "-b", 32, "--lr", 0.01)
    few += ("--model", "cifar_resnet8", "--recipe", recipe)
    found = []
    for number, more in enumerate(
        ((), ("--initial-checkpoint", teacher_run), ("--mean", 0.4, 0.4, 0.4))
    ):
        name = f"run{number}"
        assert run_script("train/classifier.py", *few, *more, "--experiment", name)[0] == 0
        found.append(read_weights(tmp_path / "output" / name / "last.safetensors")[1]["mean"][0])
    assert found == [0.5, pytest.approx(0.3057), 0.4]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            "self",
            {
                "epochs": 200,
                "lr": 0.1,
                "opt": "momentum",
                "weight_decay": 1e-4,
                "drop_last": True,
                "padding_mode": "reflect",
                "decay_milestones": [100, 150],
                "global_batch_size": 128,
            },
        ),
        (
            "crd",
            {
                "epochs": 240,
                "lr": 0.05,
                "opt": "momentum",
                "weight_decay": 5e-4,
                "drop_last": False,
                "padding_mode": "zeros",
                "decay_milestones": [150, 180, 210],
                "global_batch_size": 64,
            },
        ),
        (
            "zoo",
            {
                "epochs": 200,
                "lr": 0.1,
                "opt": "sgd",
                "weight_decay": 1e-4,
                "seed": 2,
                "padding_mode": "reflect",
                "decay_milestones": [100, 150],
                "global_batch_size": 128,
            },
        ),
        (
            "self-as-published",
            {
                "teacher_bn": "batch",
                "eval_drop_last": True,
                "model_kwargs": {"init": "xavier", "stem_kernel": 7},
            },
        ),
    ],
)
def test_presets_of_the_published_studies(recipe, expected):
    options = options_of("--recipe", recipe, "--dataset", "cifar100")
    assert {key: getattr(options, key) for key in expected} == expected


def test_sgd_is_nesterov_and_momentum_is_not():
    import torch
    from timm.optim import create_optimizer_v2

    model = torch.nn.Linear(1, 1)
    assert create_optimizer_v2(model, "sgd", lr=0.1).defaults["nesterov"]
    assert not create_optimizer_v2(model, "momentum", lr=0.1).defaults["nesterov"]


def test_print_config_gives_the_run_again(run_script, tmp_path):
    flags = [
        "--method",
        "kd",
        "at",
        "--beta",
        7,
        "--at-power",
        1,
        "--lr",
        0.25,
        "--save-epochs",
        1,
        3,
    ]
    code, first, _ = run_script("train/distill.py", "--print-config", *flags)
    assert code == 0
    printed = yaml.safe_load(first)
    assert printed["methods"]["at"] == {"beta": 7.0, "power": 1.0} and printed[
        "gamma"
    ] == pytest.approx(0.1)
    (tmp_path / "again.yaml").write_text(first)
    assert run_script("train/distill.py", "--print-config", "-c", "again.yaml")[1] == first
    assert list(tmp_path.iterdir()) == [tmp_path / "again.yaml"], "printing writes nothing"


def test_printed_constructor_arguments_are_read_again(run_script, tmp_path):
    first = run_script("train/distill.py", "--print-config", "--recipe", "self-as-published")[1]
    (tmp_path / "again.yaml").write_text(first)
    assert run_script("train/distill.py", "--print-config", "-c", "again.yaml")[1] == first


def test_method_flags_in_a_recipe_file(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: [kd]\ntemperature: 2\nalpha: 0.5\nat-power: 1\nepochs: 3\n")
    choice = choose_methods(options_of("--recipe", recipe))
    assert choice.methods == {"kd": {"temperature": 2.0}} and choice.weights == {"kd": 0.5}
    choice = choose_methods(options_of("--recipe", recipe, "--temperature", 7))
    assert choice.methods == {"kd": {"temperature": 7.0}}


def test_batch_is_per_process_and_recipes_are_global():
    assert batch_size(options_of(), 1) == 64
    assert batch_size(options_of(), 4) == 16
    assert batch_size(options_of("--grad-accum-steps", 4), 2) == 8
    assert batch_size(options_of("-b", 10), 3) == 10
    with pytest.raises(UsageError, match="64 does not divide by 3 processes"):
        batch_size(options_of(), 3)
    with pytest.raises(UsageError, match="is 40, not --global-batch-size 64"):
        batch_size(options_of("-b", 10, "--global-batch-size", 64), 4)


def test_help_names_every_method(run_script, capsys):
    from kdfast.methods import method_names

    with pytest.raises(SystemExit) as stopped:
        run_script("train/distill.py", "--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for name in method_names():
        assert f"  {name} " in text
    assert "--temperature" in text and "--at-power" in text and "--fsp-pool" in text


def test_every_switch_does_what_it_says():
    """argparse reads a switch whose own name begins with no- as false."""
    import argparse

    parser = full_parser()
    for action in parser.actions().values():
        if isinstance(action, argparse.BooleanOptionalAction):
            positive, negative = action.option_strings
            assert not positive.startswith("--no-") and negative == f"--no-{positive[2:]}"
            assert parser.given([positive]) == {action.dest: True}
            assert parser.given([negative]) == {action.dest: False}


def test_no_aug_trains_on_the_evaluation_pipeline(run_script, tmp_path):
    flags = (
        "train/classifier.py",
        "--model",
        "cifar_resnet8",
        "--epochs",
        1,
        "--train-limit",
        64,
        "--eval-limit",
        32,
        "--output",
        "out",
    )
    pads = tmp_path / "pads.yaml"
    pads.write_text("train-crop-mode: pad\n")
    losses = []
    for name, extra in {
        "plain": ["--train-crop-mode", "none"],
        "off": ["--no-aug", "-c", pads],
        "on": ["--train-crop-mode", "pad"],
    }.items():
        code, out, err = run_script(*flags, "--experiment", name, *extra)
        assert code == 0, err
        losses.append(out.splitlines()[1].split("ce")[1].split()[0])
    assert losses[0] == losses[1] != losses[2]
