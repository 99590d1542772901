"""The published comparisons of two networks: which networks they are, and their recipes."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from kdfast.errors import UsageError, UserError
from kdfast.models import checksum, read_weights
from kdfast.training import pair_networks
from kdfast.training.consistency_flags import pair_flags, transnet_flags
from kdfast.training.flags import data_flags, run_flags, training_flags
from kdfast.training.options import parse
from kdfast.training.pair_networks import pair_checkpoints, weights_of
from kdfast.training.parser import Parser, read_recipe
from kdfast.training.setup import load_data, start

FEW = ("--train-limit", 64, "--eval-limit", 64)
EXPERIMENTS = {
    "diagnosis": "weak",
    "stability": "seeds",
    "stability-halves": "halves",
    "compression": "pruned",
    "generations": "generations",
}


@pytest.fixture
def short(monkeypatch):
    """Digits networks of one epoch."""
    monkeypatch.setattr(pair_networks, "EPOCHS", 1)
    monkeypatch.setattr(pair_networks, "PRUNED_EPOCHS", 1)


def options_of(*flags: object) -> argparse.Namespace:
    parser = Parser(prog="test")
    for add in (data_flags, pair_flags, transnet_flags, training_flags):
        add(parser)
    run_flags(parser, recipe="consistency")
    return parse(parser, [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all tests of this file keep the networks they train."""
    return tmp_path_factory.mktemp("networks")


@pytest.fixture
def pairs(short, folder):
    """`pair_checkpoints` of flags, on a few digits."""

    def make(*flags: object) -> list[tuple[Path, Path]]:
        options = options_of("--model", "cifar_resnet8", *FEW, "--output", folder, *flags)
        accelerator = start(options)
        return pair_checkpoints(options, accelerator, load_data(options, accelerator))

    return make


def recorded(weights: Path) -> dict:
    """The options that the network at `weights` was trained with."""
    return yaml.safe_load((weights.parent / "args.yaml").read_text())["options"]


# The networks.


def test_two_seeds(pairs, folder, capsys):
    ((a, b),) = pairs("--pair", "seeds", "--seed", 3, "--epochs", 5, "--lr", 7)
    assert a.parent.parent == folder / "networks"
    assert [recorded(path)["seed"] for path in (a, b)] == [3, 4]
    for path in (a, b):
        options = recorded(path)
        told = {key: options[key] for key in ("model", "opt", "lr", "sched", "epochs")}
        # Of train/classifier.py on digits, whatever the Trans-Net has.
        assert told == {
            "model": "cifar_resnet8", "opt": "momentum", "lr": 0.05, "sched": "cosine", "epochs": 1,
        }  # fmt: skip
        assert options["images"]["train"] == 64
        assert read_weights(path)[1]["architecture"] == "cifar_resnet8"
    before = a.stat().st_mtime_ns, b.stat().st_mtime_ns
    capsys.readouterr()
    assert pairs("--pair", "seeds", "--seed", 3) == [(a, b)]
    assert (a.stat().st_mtime_ns, b.stat().st_mtime_ns) == before, "taken, not trained"
    assert capsys.readouterr().out.count("taken from") == 2
    ((c, _),) = pairs("--pair", "seeds", "--seed", 3, "--train-limit", 48)
    assert c != a, "other images"
    assert recorded(c)["global-batch-size"] == 48


def test_two_halves(pairs):
    ((a, b),) = pairs("--pair", "halves")
    assert [recorded(path)["train-half"] for path in (a, b)] == ["a", "b"]
    assert [recorded(path)["seed"] for path in (a, b)] == [0, 0], "nothing else differs"
    assert checksum(load_file(a)) != checksum(load_file(b))


def test_weak_and_strong(short, folder):
    options = options_of("--pair", "weak", *FEW, "--output", folder)
    accelerator = start(options)
    ((a, b),) = pair_checkpoints(options, accelerator, load_data(options, accelerator))
    assert [recorded(path)["model"] for path in (a, b)] == ["cifar_resnet8", "cifar_resnet20"]


def test_roles_are_swapped_by_name(pairs):
    ((a, b),) = pairs("--pair", "weak", "--model-a", "cifar_resnet14")
    assert [recorded(path)["model"] for path in (a, b)] == ["cifar_resnet14", "cifar_resnet8"]


def test_one_network(pairs, teacher_run):
    ((a, b),) = pairs("--pair", "same")
    assert a == b and recorded(a)["seed"] == 0
    best = teacher_run / "best.safetensors"
    assert pairs("--pair", "same", "--checkpoint-a", teacher_run) == [(best, best)]
    assert pairs("--pair", "same", "--checkpoint-b", teacher_run) == [(best, best)]


def test_pruned(pairs):
    ((a, b),) = pairs("--pair", "pruned")
    state, record = read_weights(a)
    assert record["parent"] == checksum(load_file(b)) and record["prune"] == [0.2, 1.0]
    fc = (state["fc.weight"] == 0).double().mean()
    conv = (state["layer1.0.conv1.weight"] == 0).double().mean()
    assert 0.5 < fc < 0.8 and 0.1 < conv < 0.2
    ((c, d),) = pairs("--pair", "pruned", "--checkpoint-b", b)
    assert (c, d) == (a, b), "by the weights, wherever they lie"


def test_generations(pairs, folder):
    found = pairs("--pair", "generations")
    assert len(found) == 3 and len({a for a, _ in found}) == 1
    a, chain = found[0][0], [b for _, b in found]
    assert recorded(a)["seed"] == 0
    assert [recorded(b)["seed"] for b in chain] == [1, 11, 21]
    assert all(b.name == "last.safetensors" for b in chain), "the next one learns from those"
    for before, after in itertools.pairwise(chain):
        assert read_weights(after)[1]["parent"] == checksum(load_file(before))
    assert pairs("--pair", "generations") == found


def test_several_networks(pairs, teacher_run):
    files = [teacher_run / "best.safetensors", teacher_run / "last.safetensors"]
    given = ("--checkpoint-a", files[1], "--checkpoint-b")
    assert pairs(*given, teacher_run, files[1]) == [(files[1], file) for file in files]
    found = pairs("--pair", "seeds", "--checkpoint-b", *files)
    assert [b for _, b in found] == files and len({a for a, _ in found}) == 1


def test_what_is_missing_is_like_what_is_given(short, folder, teacher_run):
    flags = ("--checkpoint-a", teacher_run, *FEW, "--output", folder)
    options = options_of(*flags)
    accelerator = start(options)
    ((_, b),) = pair_checkpoints(options, accelerator, load_data(options, accelerator))
    assert recorded(b)["model"] == "cifar_resnet8" and recorded(b)["seed"] == 1


def test_generations_in_their_order(tmp_path, teacher_run):
    for number in (10, 0, 9, 1):
        link = tmp_path / "chain" / f"generation-{number}"
        link.mkdir(parents=True)
        (link / "last.safetensors").write_bytes((teacher_run / "last.safetensors").read_bytes())
    names = [path.parent.name for path in weights_of(tmp_path / "chain")]
    assert names == [f"generation-{number}" for number in (0, 1, 9, 10)]
    (link / "last.safetensors").unlink()
    with pytest.raises(UserError, match=r"generation-1 has no last\.safetensors"):
        weights_of(tmp_path / "chain")


# Refusals.

CLASSIFIER = "train/classifier.py --dataset cifar100 --data-dir 'my data' --model resnet18"
CHAIN = CLASSIFIER.replace("classifier.py", "born_again.py")
INSTRUCTIONS = {
    "seeds": (f"make A with {CLASSIFIER} --seed 5,", f"make B with {CLASSIFIER} --seed 6;"),
    "halves": (f"{CLASSIFIER} --seed 5 --train-half a,", f"{CLASSIFIER} --seed 5 --train-half b;"),
    "weak": (f"make A with {CLASSIFIER} --seed 5,", f"make B with {CLASSIFIER} --seed 6;"),
    "pruned": (
        f"make B with {CLASSIFIER} --seed 6, make A with {CLASSIFIER} --seed 5 "
        "--initial-checkpoint RUN-OF-B --prune 0.2 1;",
    ),
    "generations": (f"make A with {CLASSIFIER} --seed 5,", f"make B with {CHAIN} --seed 6;"),
    "same": (f"make A with {CLASSIFIER} --seed 5;",),
}


@pytest.mark.parametrize("pair", INSTRUCTIONS)
def test_instructions_off_digits(pair):
    flags = ("--dataset", "cifar100", "--data-dir", "my data", "--model", "resnet18", "--seed", 5)
    with pytest.raises(UsageError) as refused:
        pair_checkpoints(options_of(*flags, "--pair", pair), None, None)
    said = str(refused.value)
    assert [part for part in INSTRUCTIONS[pair] if part not in said] == [], said
    assert "--checkpoint-a" in said and "\n" not in said


def test_instructions_for_one_network(teacher_run):
    flags = ("--dataset", "cub200", "--checkpoint-a", teacher_run)
    with pytest.raises(UsageError) as refused:
        pair_checkpoints(options_of(*flags), None, None)
    command = "train/classifier.py --dataset cub200 --recipe cub200 --model cifar_resnet8 --seed 1"
    assert f"make B with {command}; give the run folder as --checkpoint-b" in str(refused.value)


def test_pruned_network_without_its_original(teacher_run):
    options = options_of("--pair", "pruned", "--checkpoint-a", teacher_run)
    with pytest.raises(UsageError, match="--checkpoint-b"):
        pair_checkpoints(options, None, None)


def test_folders_without_weights(tmp_path):
    for flag in ("--checkpoint-a", "--checkpoint-b"):
        with pytest.raises(UserError, match=r"has no best\.safetensors"):
            pair_checkpoints(options_of(flag, tmp_path), None, None)


# The recipes.


def test_experiments_share_the_published_settings():
    published = read_recipe("consistency")
    assert {key: published[key] for key in ("epochs", "lr", "alpha", "layers")} == {
        "epochs": 1000, "lr": 1e-4, "alpha": 0.1, "layers": 3,
    }  # fmt: skip
    published.pop("when")
    for name, pair in EXPERIMENTS.items():
        recipe = read_recipe(name)
        recipe.pop("when")
        assert recipe == published | {"pair": pair}, name


@pytest.mark.parametrize("flag", ["--model", "--model-a"])
@pytest.mark.parametrize("name", ["stability", "stability-halves"])
def test_stability_of_alexnet(name, flag):
    flags = ("--dataset", "cub200", "--recipe", name)
    assert options_of(*flags).alpha == [0.1]
    options = options_of(*flags, flag, "torchvision.models:alexnet")
    assert options.alpha == [8.0] and options.crop_mode == "squash"
    assert options_of("--dataset", "cub200", "--recipe", "compression").alpha == [0.1]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_digits_are_short(name):
    """As long as train/transnet.py without flags."""
    theirs = options_of()
    keys = ("epochs", "lr", "opt", "sched", "decades", "global_batch_size", "weight_decay", "alpha",
            "channels_last", "val_interval")  # fmt: skip
    options = options_of("--recipe", name)
    assert {key: getattr(options, key) for key in keys} == {
        key: getattr(theirs, key) for key in keys
    }
    assert options_of("--recipe", name, "--dataset", "cub200").epochs == 1000


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment(short, run_script, folder, tmp_path, name):
    """train/transnet.py trains the networks and the Trans-Nets, analysis/variance.py compares."""
    flags = (*FEW, "--epochs", 1, "--output", folder, "--experiment", name)
    small = ("--model", "cifar_resnet8") if name != "diagnosis" else ()
    code, out, err = run_script("train/transnet.py", "--recipe", name, *flags, *small)
    assert code == 0, err
    results = json.loads(out.splitlines()[-1])
    assert results["run"] == str(folder / name)
    runs = [Path(one["run"]) for one in results.get("pairs", [results])]
    assert len(runs) == (3 if name == "generations" else 1)
    for run in runs:
        options = yaml.safe_load((run / "args.yaml").read_text())["options"]
        assert (options["pair"], options["alpha"]) == (EXPERIMENTS[name], [0.1, 0.1])
    code, out, err = run_script("analysis/variance.py", folder / name, "--output", tmp_path / "out")
    assert code == 0, err
    with (tmp_path / "out" / "variance.csv").open() as file:
        assert len(list(csv.DictReader(file))) >= len(runs)
    assert (tmp_path / "out" / "variance.png").stat().st_size > 0
