"""Heads of a teacher: training them, their files, and all that is refused when they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_bad_input import DISTILL, HEADS
from test_resume import TORCHRUN, command, finish

from kdfast.errors import UserError
from kdfast.models import (
    DeepHead,
    LinearHead,
    checksum,
    create_model,
    default_stages,
    load_heads,
    load_weights,
    read_weights,
    save_head,
    shapes_of,
)

FEW = ("--train-limit", 64, "--eval-limit", 64, "--epochs", 1, "--output", ".")
SIZE = (32, 32)


def train(script, *flags) -> None:
    assert load_script(script).main([str(flag) for flag in flags]) == 0


def files(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted((run / "heads").iterdir())}


def record_of(path: Path) -> dict:
    return read_weights(path)[1]


@pytest.fixture(scope="module")
def runs(teacher_run, tmp_path_factory) -> Path:
    """Folder of the runs `linear`, of heads on `teacher_run`, and `deep`."""
    folder = tmp_path_factory.mktemp("runs")
    few = ("--teacher", "cifar_resnet8", *FEW[:-2], "--output", folder)
    train(HEADS, *few, "--teacher-checkpoint", teacher_run, "--epochs", 2, "--experiment", "linear")
    train(HEADS, *few, "--kind", "deep", "--epochs", 2, "--experiment", "deep")
    return folder


@pytest.fixture
def linear(runs, tmp_path) -> Path:
    """A copy of the linear run that may be spoilt."""
    return shutil.copytree(runs / "linear", tmp_path / "linear")


@pytest.fixture(scope="module")
def teacher(teacher_run):
    net = create_model("cifar_resnet8", 10)
    load_weights(net, teacher_run / "best.safetensors")
    return net


# Acceptance check 5.


@pytest.mark.parametrize(
    "name, kwargs, inputs, total",
    [
        ("cifar_resnet110", {}, [16384, 8192, 4096], 2_867_500),
        ("cifar_wrn28_2", {}, [32768, 16384, 8192], 5_734_700),
        ("cifar_resnet18", {}, [65536, 32768, 16384, 8192], 12_288_400),
        ("cifar_resnet34", {}, [65536, 32768, 16384, 8192], 12_288_400),
        ("cifar_vgg11", {"form": "dih"}, [16384, 8192, 4096, 2048], 3_072_400),
    ],
)
def test_parameter_counts(name, kwargs, inputs, total):
    with torch.device("meta"):
        net = create_model(name, 100, **kwargs)
    net = net.to_empty(device="cpu")
    heads = [LinearHead(shape, 100) for shape in shapes_of(net, default_stages(net), SIZE)]
    assert [head.width for head in heads] == inputs
    assert sum(p.numel() for head in heads for p in head.parameters()) == total


def test_parameter_counts_of_deep_heads():
    widths = [16, 32, 64]
    counts = [sum(p.numel() for p in DeepHead(widths[i:], 10).convs.parameters()) for i in (0, 1)]
    assert counts == [4992, 3840]


def test_trunk_is_frozen_and_heads_are_independent(run_script, teacher_run, monkeypatch, tmp_path):
    """Trunk bit-identical, BN buffers too; a head alone ends as the same head among others."""
    networks = []
    module = load_script(HEADS)
    genuine = module.train_linear

    def spy(options, accelerator, data, network, *rest, **more):
        networks.append(network)
        return genuine(options, accelerator, data, network, *rest, **more)

    monkeypatch.setattr(module, "train_linear", spy)
    few = (HEADS, "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run, *FEW)
    few += ("-b", 16)
    assert run_script(*few, "--experiment", "all")[0] == 0
    alone = ("--experiment", "alone", "--teacher-layers", "layer2")
    assert run_script(*few, *alone)[0] == 0
    assert run_script(*few, "--experiment", "nchw", "--no-channels-last")[0] == 0
    before = checksum(load_file(teacher_run / "best.safetensors"))
    assert {checksum(net.state_dict()) for net in networks} == {before}
    everything, one = files(tmp_path / "all"), files(tmp_path / "alone")
    assert list(one) == ["1-layer2.safetensors"]
    for name, value in one["1-layer2.safetensors"].items():
        assert torch.equal(value, everything["2-layer2.safetensors"][name])
    for name, head in files(tmp_path / "nchw").items():  # features are flattened C, H, W in both
        for key, value in head.items():
            assert torch.allclose(value, everything[name][key], rtol=1e-2, atol=1e-2)


def test_initial_weights_depend_on_seed_and_layer_alone(run_script, teacher_run, tmp_path):
    few = (HEADS, "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run, *FEW)
    few += ("--lr", 0)
    for name, *flags in (
        ("a",), ("b", "--teacher-layers", "layer3"), ("c", "--seed", 1),
        ("d", "--teacher-layers", "layer1.0", "layer1"),
    ):  # fmt: skip
        assert run_script(*few, *flags, "--experiment", name)[0] == 0
    a, b, c, d = (files(tmp_path / name) for name in "abcd")
    weight = "fc.weight"
    assert torch.equal(a["3-layer3.safetensors"][weight], b["1-layer3.safetensors"][weight])
    assert not torch.equal(a["3-layer3.safetensors"][weight], c["3-layer3.safetensors"][weight])
    pair = [head[weight] for head in d.values()]
    assert pair[0].shape == pair[1].shape and not torch.equal(*pair)


# What a run leaves behind.


def test_linear_run(runs, teacher_run, teacher):
    run = runs / "linear"
    results = json.loads((run / "results.json").read_text())
    header, *rows = (run / "summary.csv").read_text().splitlines()
    for column in ("train_ce_layer1", "train_ce_layer3", "eval_top5", "eval_top1_layer2"):
        assert column in header.split(",")
    assert [head["layer"] for head in results["heads"]] == ["layer1", "layer2", "layer3"]
    assert [head["parameters"] for head in results["heads"]] == [163850, 81930, 40970]
    deepest = results["heads"][-1]
    assert (results["last"], results["best"]) == (deepest["last"], deepest["best"])
    row = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    assert float(row["eval_top1"]) == float(row["eval_top1_layer3"]) == results["last"]["top1"]
    parts = [float(row[f"train_ce_layer{i}"]) for i in (1, 2, 3)]
    assert float(row["train_loss"]) == pytest.approx(sum(parts))
    parent = checksum(teacher.state_dict())
    for i, head in enumerate(results["heads"], 1):
        top1 = [float(r.split(",")[header.split(",").index(f"eval_top1_layer{i}")]) for r in rows]
        epoch = top1.index(max(top1)) + 1
        assert head["best"]["epoch"] == epoch, "its own best epoch, the first on ties"
        record = record_of(run / "heads" / f"{i}-layer{i}.safetensors")
        assert record["top1"] == head["best"]["top1"] and record["epoch"] == epoch
        assert (record["index"], record["heads"], record["kind"]) == (i, 3, "linear")
        assert record["parent"] == parent and record["architecture"] == "cifar_resnet8"
        assert record["dataset"] == "digits" and record["classes"] == 10
        assert record["input_size"] == [3, 32, 32] and record["pool"] is None
        assert len(record["mean"]) == len(record["std"]) == 3


def test_best_head_scores_what_its_file_says(runs, teacher):
    """The saved head on the teacher's own features gives the accuracy in its record."""
    from kdfast.data import eval_transform, open_data, to_float
    from kdfast.models import Taps

    data = open_data("digits", eval_limit=64)
    heads = load_heads(runs / "linear", teacher, SIZE, 10)
    path = runs / "linear/heads/1-layer1.safetensors"
    record = record_of(path)
    mean, std = (torch.tensor(record[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    see = eval_transform(SIZE, 0.875, "bilinear", 32)
    pairs = [data.eval.read(i) for i in range(64)]
    images = torch.stack([see(image.convert("RGB")) for image, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    with torch.no_grad():
        _, (feature,) = Taps(teacher.eval(), ["layer1"])(to_float(images, mean, std))
        right = (heads.modules[0](feature)[1].argmax(1) == labels).float().mean()
    assert 100 * right.item() == pytest.approx(record["top1"])


def test_deep_run(runs):
    """Trunk and heads come from one epoch, and the trunk is a teacher as any other."""
    run = runs / "deep"
    trunk, record = read_weights(run / "best.safetensors")
    net = create_model("cifar_resnet8", 10)
    load_weights(net, run / "best.safetensors")
    assert (run / "last.safetensors").exists()
    heads = load_heads(run, net, SIZE, 10, kind="deep", parent=checksum(trunk))
    assert heads.layers == ("layer1", "layer2") and heads.widths == (64, 64)
    for path in (run / "heads").iterdir():
        own = record_of(path)
        assert own["epoch"] == record["epoch"] and own["parent"] == checksum(trunk)
    header = (run / "summary.csv").read_text().splitlines()[0].split(",")
    assert {"train_ce_layer1", "train_ce_layer2", "train_ce"} <= set(header)
    assert not {"train_ce_layer3", "eval_top1_layer3"} & set(header), "no duplicate classifier"


def test_everything_of_a_deep_run_is_trained(runs):
    """The trunk gets gradients from the heads, every head from its own cross-entropy."""
    from kdfast.models import Taps
    from kdfast.training.heads import HeadedNetwork, HeadsObjective

    torch.manual_seed(0)
    net, heads = create_model("cifar_resnet8", 10), [DeepHead([16, 32, 64], 10)]
    objective = HeadsObjective(HeadedNetwork(Taps(net, ["layer1"]), heads), ["a", "b"])
    total, terms, _ = objective(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert total.item() == pytest.approx(terms.sum().item()) and len(terms) == 2
    gradients = torch.autograd.grad(total, list(objective.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_transformer_tokens_and_pooling(run_script, tmp_path):
    """Heads go on the maps that a ViT's tokens make; --head-pool shrinks larger ones only."""
    few = ("--dataset", "digits", "--img-size", 32, *FEW, "-b", 32)
    flags = (HEADS, *few, "--teacher", "vit_tiny_patch16_224", "--teacher-epochs", 1)
    flags += ("--teacher-layers", "blocks.0", "blocks.1", "--head-pool", 1, 2)
    flags += ("--teacher-kwargs", "depth=2", "embed_dim=24", "num_heads=2")
    code, _, err = run_script(*flags, "--experiment", "vit")
    assert code == 0, err
    record = record_of(tmp_path / "vit/heads/2-blocks.1.safetensors")
    assert record["shape"][0] == 24 and record["pool"] == [1, 2]
    assert load_file(tmp_path / "vit/heads/2-blocks.1.safetensors")["fc.weight"].shape == (10, 48)


def test_head_pool(run_script, teacher_run, tmp_path):
    few = (HEADS, "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run, *FEW)
    code, out, _ = run_script(*few, "--head-pool", 8, "--experiment", "run", "--save-epochs", 1)
    assert code == 0 and "16x32x32 pooled to 8x8, 10,250 parameters" in out
    assert "more parameters than the network" not in out
    heads = [tmp_path / f"run/heads/{i}-layer{i}.safetensors" for i in (1, 2, 3)]
    assert [record_of(path)["pool"] for path in heads] == [[8, 8], [8, 8], None]
    kept = load_heads(tmp_path / "run/weights/epoch-0001", create_model("cifar_resnet8"), SIZE, 10)
    assert kept.widths == (1024, 2048, 4096)


def test_digits_alone_reuses_the_teacher(run_script, tmp_path):
    few = (HEADS, "--teacher", "cifar_resnet8", "--teacher-epochs", 1, *FEW)
    code, out, _ = run_script(*few, "--experiment", "a")
    assert code == 0 and "teacher cifar_resnet8: training into" in out
    assert "more parameters than the network" in out
    code, out, _ = run_script(*few, "--experiment", "b")
    assert code == 0 and "teacher cifar_resnet8: taken from" in out
    assert {k: checksum(v) for k, v in files(tmp_path / "a").items()} == {
        k: checksum(v) for k, v in files(tmp_path / "b").items()
    }


def test_starts_from_weights(run_script, teacher_run, tmp_path):
    few = (HEADS, "--kind", "deep", "--teacher", "cifar_resnet8", *FEW, "--lr", 0, "--freeze-bn")
    code, _, err = run_script(*few, "--initial-checkpoint", teacher_run, "--experiment", "run")
    assert code == 0, err
    one, other = (load_file(r / "best.safetensors") for r in (teacher_run, tmp_path / "run"))
    assert checksum(one) == checksum(other)


def test_two_processes_are_one(teacher_run, tmp_path):
    flags = ("--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run, *FEW)
    flags += ("--global-batch-size", 16, "--output", tmp_path)
    finish(command(*TORCHRUN, ROOT / HEADS, *flags, "--experiment", "two", cwd=tmp_path))
    finish(command("python", ROOT / HEADS, *flags, "--experiment", "one", cwd=tmp_path))
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["last"]["loss"] == pytest.approx(one["last"]["loss"], rel=1e-4)
    for name, head in files(tmp_path / "one").items():
        for key, value in files(tmp_path / "two")[name].items():
            assert torch.allclose(value, head[key], rtol=1e-4, atol=1e-5)


# Loading, acceptance check 11.


def edit(path: Path, **changes) -> None:
    with safe_open(path, framework="pt") as file:
        record = file.metadata() | {key: json.dumps(value) for key, value in changes.items()}
    save_file(load_file(path), path, {k: v for k, v in record.items() if v != "null"})


def test_order_is_by_index(teacher, tmp_path):
    """Eleven heads: the tenth comes after the second, whatever the names sort like."""
    shapes = shapes_of(teacher, default_stages(teacher), SIZE)
    layers = [f"layer{i}" for i in (1, 2, 3)] * 4
    for i, layer in enumerate(layers[:11], 1):
        shape = shapes[int(layer[-1]) - 1]
        record = {"kind": "linear", "index": i, "heads": 11, "layer": layer, "shape": list(shape)}
        record |= {"classes": 10, "parent": "x", "pool": [1, 1]}
        save_head(tmp_path, LinearHead(shape, 10, (1, 1)), record)
    assert load_heads(tmp_path, teacher, SIZE, 10).layers == tuple(layers[:11])


FIRST, SECOND, THIRD = (f"heads/{i}-layer{i}.safetensors" for i in (1, 2, 3))


def truncated(run):
    content = (run / SECOND).read_bytes()
    (run / SECOND).write_bytes(content[: len(content) // 2])


def misfit(run):
    with safe_open(run / SECOND, framework="pt") as file:
        record = file.metadata()
    save_file({"fc.weight": torch.zeros(10, 7), "fc.bias": torch.zeros(10)}, run / SECOND, record)


SPOILT = {
    "none": (lambda run: shutil.rmtree(run / "heads"), "no heads at .*train/heads.py"),
    "truncated": (truncated, "2-layer2.*damaged"),
    "missing": (lambda run: (run / SECOND).unlink(), "2 of 3 heads, number 2"),
    "the last missing": (lambda run: (run / THIRD).unlink(), "2 of 3 heads, number 3"),
    "renamed": (lambda run: (run / THIRD).rename(run / "heads/4-layer3.safetensors"), "renamed"),
    "twice": (
        lambda run: (edit(run / THIRD, index=2), (run / THIRD).rename(
            run / "heads/2-layer3.safetensors")), "index is there twice"),
    "no record": (lambda run: save_file({"a": torch.zeros(1)}, run / FIRST), "is no head"),
    "a strange record": (lambda run: edit(run / FIRST, shape=[16, 32, "x"]), "is no head"),
    "a huge record": (lambda run: edit(run / FIRST, pool=[2**20, 2**20]), "not those of a linear"),
    "another stage": (lambda run: (edit(run / THIRD, layer="layer4"), (run / THIRD).rename(
        run / "heads/3-layer4.safetensors")), "layer layer4, which cifar_resnet8 does not have"),
    "another shape": (lambda run: edit(run / SECOND, shape=[32, 8, 8]), r"\[32, 8, 8\].*layer2"),
    "the wrong stage": (lambda run: (edit(run / SECOND, layer="layer1.0"), (run / SECOND).rename(
        run / "heads/2-layer1.0.safetensors")), r"\[32, 16, 16\].*layer1\.0.*\[16, 32, 32\]"),
    "other classes": (lambda run: edit(run / FIRST, classes=100), "100 classes.*has 10"),
    "mixed parents": (lambda run: edit(run / FIRST, parent="0" * 64), "different networks"),
    "other weights": (misfit, "not those of a linear head"),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_heads(linear, teacher, how):
    spoil, words = SPOILT[how]
    spoil(linear)
    with pytest.raises(UserError, match=words) as caught:
        load_heads(linear, teacher, SIZE, 10, kind="linear")
    assert "\n" not in str(caught.value)


def test_heads_of_another_teacher_or_kind(runs, teacher):
    with pytest.raises(UserError, match=r"not this teacher's.*--teacher-checkpoint"):
        load_heads(runs / "linear", teacher, SIZE, 10, parent="0" * 64)
    with pytest.raises(UserError, match=r"are deep.*needs linear.*train/heads.py --kind linear"):
        load_heads(runs / "deep", teacher, SIZE, 10, kind="linear")


PUPIL = (DISTILL, "--teacher", "cifar_resnet8", "--no-baseline", "--method", "dih")


@pytest.mark.parametrize(
    "spoil, flags, words",
    [
        (truncated, (), ["2-layer2", "damaged"]),
        (None, ("--heads", "nowhere"), ["no heads at nowhere"]),
        (None, ("--teacher-checkpoint", "DEEP"), ["not this teacher's"]),
        (None, ("--heads", "DEEP"), ["needs linear", "--kind linear"]),
        (None, ("--teacher", "cifar_resnet14"), ["cifar_resnet14"]),
    ],
)
def test_refused_by_distill(refused, runs, linear, teacher_run, spoil, flags, words):
    if spoil:
        spoil(linear)
    flags = [str(runs / "deep") if flag == "DEEP" else flag for flag in flags]
    given = ("--teacher-checkpoint", teacher_run, "--heads", linear)
    refused(1, *PUPIL, *given, *flags, words=words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--kind shallow", ["--kind", "deep"]),
        ("--kind deep --teacher-checkpoint x", ["--initial-checkpoint"]),
        ("--kind deep --head-pool 2", ["--head-pool", "linear"]),
        ("--kind deep --teacher-layers layer3", ["at least two layers"]),
        ("--initial-checkpoint x", ["--teacher-checkpoint"]),
        ("--head-pool 1 2 3", ["--head-pool", "height"]),
        ("--head-pool 0", ["--head-pool", "at least 1"]),
        ("--teacher-layers layer9", ["unknown layer 'layer9'", "layer3"]),
        ("--teacher-layers fc", ["layer fc", "[10]", "before the pooling"]),
        ("--teacher-layers layer1 layer1", ["twice"]),
        ("--dataset fashion-mnist", ["no teacher", "train/classifier.py"]),
        ("--eval-only", ["--eval-only"]),
        ("--method dih", ["unknown flag '--method'"]),
    ],
)
def test_refused(refused, monkeypatch, flags, words):
    monkeypatch.setattr("kdfast.training.loop.Trainer.fit", lambda self: pytest.fail("trains"))
    refused(2, HEADS, *flags.split(), words=words)
