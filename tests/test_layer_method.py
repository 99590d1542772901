"""A layer matched without labels, the classifier behind it, and the networks made for it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from test_methods import choice_of, options_of
from torch import nn
from torch.nn import functional as F

from kdfast.analysis.runs import find_runs
from kdfast.data.transforms import Augmentation, train_transform
from kdfast.errors import UsageError, UserError
from kdfast.methods import Outputs, Pairing, find_method
from kdfast.models import Taps, checksum, create_model, find_layer
from kdfast.seeding import derive_seed
from kdfast.training.label_phase import check_rates
from kdfast.training.loop import Trainer
from kdfast.training.schedules import plateau
from kdfast.training.setup import build_model
from kdfast.training.snapshots import LONGER, PUBLISHED, _published

DISTILL, CLASSIFIER = "train/distill.py", "train/classifier.py"
FEW = ("--train-limit", 64, "--eval-limit", 32, "-b", 32, "--epochs", 2, "--model", "cifar_resnet8",
       "--teacher", "cifar_resnet8", "--no-baseline", "--output", ".", "--method", "layer",
       "--experiment", "run")  # fmt: skip
TAIL = ("--classifier-epochs", 2, "--classifier-lr", 0.05)
BEHIND = ("layer3.", "fc.")  # of the default layer, layer2.0.act2:in


def behind(name: str) -> bool:
    return name.startswith(BEHIND)


@pytest.fixture(scope="module")
def matched(teacher_run, tmp_path_factory) -> Path:
    """A run with its baseline and classifier."""
    from conftest import load_script

    folder = tmp_path_factory.mktemp("layer")
    flags = [*FEW, "--output", folder, *TAIL]
    flags.remove("--no-baseline")
    flags += ["--teacher-checkpoint", teacher_run, "--save-epochs", 0, 1]
    assert load_script(DISTILL).main([str(flag) for flag in flags]) == 0
    return folder / "run"


# The term.


def test_the_term():
    """The mean over all elements of both maps, as they are."""
    torch.manual_seed(0)
    ours, theirs = (torch.randn(3, 4, 5, 5, dtype=torch.float64) for _ in range(2))
    method = find_method("layer")()
    logits = torch.zeros(3, 2, dtype=torch.float64)
    answers = (Outputs(logits, (x,)) for x in (ours, theirs))
    expected = ((ours - theirs) ** 2).sum() / ours.numel()
    assert method(*answers, torch.zeros(3)).item() == pytest.approx(expected.item(), rel=1e-12)
    assert (method.default_weight, method.gamma) == (1, 0)


def test_unequal_shapes_are_refused():
    shapes = torch.Size([2, 32, 16, 16]), torch.Size([2, 64, 16, 16])
    pairing = Pairing(("a",), ("b",), *((shape,) for shape in shapes), 10)
    with pytest.raises(UsageError, match=r"student layer a has \[32, 16, 16\] and teacher layer b"):
        find_method("layer")().setup(pairing)


def test_labels_take_no_part():
    assert (choice_of("--method", "layer").gamma, choice_of("--method", "layer").weights) == (
        0, {"layer": 1},
    )  # fmt: skip
    assert choice_of("--method", "layer", "--beta", 3).weights == {"layer": 3}
    assert choice_of("--method", "layer", "--gamma", 0.5).gamma == 0.5
    assert choice_of("--method", "layer", "--recipe", "crd").gamma == 0


# A run.


def test_what_lies_behind_the_layer_stays_as_it_begins(matched):
    """No gradient, no weight decay, no new statistics there; all before it moves."""
    begun, last = (
        load_file(matched / "weights/epoch-0000.safetensors"),
        load_file(matched / "last.safetensors"),
    )
    torch.manual_seed(derive_seed(0, "student"))
    fresh = create_model("cifar_resnet8", 10).state_dict()
    assert checksum(begun) == checksum(fresh)
    for name, value in last.items():
        assert torch.equal(value, begun[name]) == behind(name), name
    paths = (matched / "path_length.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in paths[1:]] == [
        [str(epoch), "layer2.0.conv2"] for epoch in (0, 1, 2)
    ]
    assert float(paths[-1].split(",")[2]) > 0


def test_the_baseline_begins_alike_and_walks_beside(matched):
    """One seed, the same snapshots and the same layer, for the two are compared."""
    one, two = (load_file(matched / p / "weights/epoch-0000.safetensors") for p in ("", "baseline"))
    assert checksum(one) == checksum(two)
    assert (matched / "baseline/weights/epoch-0001.safetensors").exists()
    lines = [(matched / p / "path_length.csv").read_text().splitlines() for p in ("", "baseline")]
    assert [x.split(",")[:2] for x in lines[0]] == [x.split(",")[:2] for x in lines[1]]
    assert lines[0][-1] != lines[1][-1]


def test_the_classifier_trains_what_was_left(matched):
    """All up to the layer is frozen, running statistics included; the rest is trained."""
    last, after = (load_file(matched / p / "last.safetensors") for p in ("", "classifier"))
    trained = {name for name, value in after.items() if not torch.equal(value, last[name])}
    assert trained == {name for name in last if behind(name)}
    record = yaml.safe_load((matched / "classifier/args.yaml").read_text())["options"]
    assert {
        "opt": "momentum",
        "momentum": 0.9,
        "weight-decay": 1e-4,
        "lr": 0.05,
        "epochs": 2,
        "sched": "plateau",
        "decay-rate": 0.3,
        "patience-epochs": 10,
    }.items() <= record.items()
    assert record["parent-checksum"] == checksum(last)
    assert not (matched / "classifier/weights").exists()
    results = json.loads((matched / "results.json").read_text())
    own = json.loads((matched / "classifier/results.json").read_text())
    assert results["classifier"]["last"] == own["last"]
    assert results["classifier"]["checksum"] == checksum(last)
    assert find_runs([matched]) == [matched, matched / "baseline"], "reports pass it over"


def test_one_step_of_the_classifier_against_plain_sgd(run_script, teacher_run, tmp_path):
    """Its first step is that of SGD with frozen running statistics before the layer."""
    flags = (*FEW, "--epochs", 1, "-b", 64, "--no-aug", "--classifier-epochs", 1)
    flags += ("--classifier-lr", 0.1, "--teacher-checkpoint", teacher_run)
    code, _, err = run_script(DISTILL, *flags)
    assert code == 0, err
    model = create_model("cifar_resnet8", 10)
    model.load_state_dict(load_file(tmp_path / "run/last.safetensors"))
    from kdfast.data import open_data

    data = open_data("digits", None, train_limit=64, eval_limit=32)
    record = yaml.safe_load((tmp_path / "run/args.yaml").read_text())["options"]
    assert record["batch-size"] == 64
    images = torch.stack([_pixels(data.train.read(i)) for i in range(64)])
    labels = torch.tensor(list(data.train.labels()))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (data.mean, data.std))
    x = (images / 255 - mean) / std
    for name, module in model.named_modules():
        module.training = behind(f"{name}.")
    F.cross_entropy(model(x), labels).backward()
    after = load_file(tmp_path / "run/classifier/last.safetensors")
    for name, parameter in model.named_parameters():
        if behind(name):
            step = parameter.grad + 1e-4 * parameter
            expected = parameter - 0.1 * step
            assert torch.allclose(after[name], expected, rtol=1e-3, atol=1e-5), name


def _pixels(sample) -> torch.Tensor:
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(sample[0].convert("RGB")).float()


def test_a_classifier_may_come_later_and_is_taken_where_it_is_done(
    run_script, teacher_run, tmp_path, monkeypatch
):
    flags = (*FEW, "--teacher-checkpoint", teacher_run)
    code, _, err = run_script(DISTILL, *flags)
    assert code == 0, err
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.safetensors")}
    fit = Trainer.fit

    def stopped(self):
        if self.run.path.name == "classifier" and self.progress.position.epoch == 0:
            self.options.epochs = 1  # as if it had ended after one epoch
            fit(self)
            raise UserError("stopped")
        return fit(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", stopped)
        code, _, err = run_script(DISTILL, *flags, *TAIL, "--resume", "auto")
        assert code == 1 and "stopped" in err
    code, out, err = run_script(DISTILL, *flags, *TAIL, "--resume", "auto")
    assert code == 0, err
    assert "classifier behind" in out
    assert json.loads(out.splitlines()[-1])["classifier"]["epochs"] == 2
    code, out, err = run_script(DISTILL, *flags, *TAIL, "--resume", "auto")
    assert code == 0 and "classifier behind" not in out, "it is done"
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.safetensors")}
    assert before == after, "the weights of the run are as they were"
    code, _, err = run_script(DISTILL, *flags, *TAIL, "--epochs", 3, "--resume", "auto")
    assert code == 2 and "weights after epoch 2" in err and "--epochs 3" in err


# What is refused.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset fashion-mnist --method layer", ["--lr", "1e-4 to 10", "--recipe knowledge"]),
        ("--dataset cifar10 --recipe knowledge --method layer", ["learning rate", "--lr"]),
        ("--dataset cifar10 --recipe digits --method layer kd", ["learning rate", "--lr"]),
        ("--method layer --student-layers layer2 --teacher-layers layer3",
         ["student layer layer2 has [32, 16, 16]", "teacher layer layer3 [64, 8, 8]"]),
        ("--method layer --student-layers layer9", ["unknown layer 'layer9'"]),
        ("--method layer at --student-layers layer2", ["given together"]),
        ("--method layer --student cifar_resnet8x4", ["equal shapes", "layer2.0.act2:in"]),
        ("--method kd --classifier-epochs 2", ["--classifier-epochs", "method layer"]),
        ("--method layer --gamma 1 --classifier-epochs 2", ["--classifier-epochs", "--gamma 0"]),
        ("--method layer kd --classifier-epochs 2", ["no weights lie behind"]),
        ("--method layer --classifier-lr 2", ["--classifier-lr", "no --classifier-epochs"]),
        ("--method layer --recipe crd --classifier-epochs 2", ["--classifier-lr", "1e-3"]),
        ("--method layer --student-layers fc --classifier-epochs 2",
         ["no weights lie behind fc", "earlier"]),
    ],
)  # fmt: skip
def test_refused(refused, flags, words):
    base = ("--teacher", "cifar_resnet8", "--model", "cifar_resnet8")
    refused(2, DISTILL, *base, *flags.split(), words=words)


VISION = "torchvision.models:"
RESNETS = ("headed_resnet18", "headed_resnet50", "headed_resnet101", "headed_resnet152")
KNOWLEDGE = ("--dataset", "cub200", "--recipe", "knowledge")
# By network: the layers called fc1, fc2 and fc3, and those whose paths are measured.
HIDDEN = {
    **{f"{VISION}{name}": ("classifier.0", "classifier.3", "classifier.6")
       for name in ("vgg11", "vgg16", "vgg19")},
    **{name: ("pre_logits.fc1", "pre_logits.fc2", "head.fc")
       for name in ("vgg11", "vgg16", "vgg19")},
    f"{VISION}alexnet": ("classifier.1", "classifier.4", "classifier.6"),
    **dict.fromkeys(RESNETS, ("hidden.fc1", "hidden.fc2", "fc")),
}  # fmt: skip
CONV = {"alexnet": "features.10", "vgg11": "features.18", "vgg16": "features.28",
        "vgg19": "features.34", **dict.fromkeys(RESNETS, "added.conv2")}  # fmt: skip


@pytest.mark.parametrize("model", HIDDEN)
def test_published_rates_of_students(model):
    """2.4: first rate and powers of ten, by network and layer; one a network for the classifier."""
    resnet = model in RESNETS
    expected = [(10, 2), (0.1, 1), (0.1, 1)] if resnet else [(1e-4, 1), (1e-3, 1), (1e-3, 1)]
    for layer, (lr, decades) in zip(HIDDEN[model], expected, strict=True):
        flags = (*KNOWLEDGE, "--model", model, "--student-layers", layer)
        options = options_of(*flags)
        check_rates(options, choice_of(*flags))
        assert (options.lr, options.decades, options.sched) == (lr, decades, "log"), layer
        assert (options.epochs, options.global_batch_size) == (150, 64)
        assert (options.opt, options.momentum, options.weight_decay) == ("momentum", 0.9, 1e-4)
        assert options.classifier_lr == (1e-2 if resnet else 1e-3)
        assert options.teacher == model, "teacher and student share an architecture"


@pytest.mark.parametrize("model", ["torchvision.models:vgg16", "vgg16", "headed_resnet50"])
def test_of_a_convolution_no_rate_is_published(model):
    layer = "added.bn2" if model in RESNETS else "features.28"
    flags = (*KNOWLEDGE, "--model", model, "--student-layers", layer)
    with pytest.raises(UsageError, match="no learning rate fits"):
        check_rates(options_of(*flags), choice_of(*flags))
    flags += ("--lr", 0.5)
    check_rates(options_of(*flags), choice_of(*flags))
    assert options_of(*flags).lr == 0.5


@pytest.mark.parametrize("model", HIDDEN)
def test_published_rates_of_teachers_and_baselines(model):
    """2.3: from published weights and from scratch; what is measured, drawn anew and kept."""
    flags = (*KNOWLEDGE, "--method", "none", "--model", model)
    scratch, pretrained = options_of(*flags), options_of(*flags, "--pretrained")
    rates = (0.1, 0.01) if model in RESNETS else (0.01, 0.001)
    assert (scratch.lr, pretrained.lr) == rates
    new = {f"{VISION}": ["classifier"], "": ["pre_logits", "head.fc"]}
    vision = VISION * model.startswith(VISION)
    # The trunk of a headed ResNet is all that published weights are of.
    assert pretrained.reset_layers == (None if model in RESNETS else new[vision])
    weights = [CONV[model.removeprefix(VISION)], *HIDDEN[model]]
    for options in (scratch, pretrained):
        assert (options.epochs, options.global_batch_size, options.weight_decay) == (150, 64, 1e-4)
        assert (options.opt, options.momentum) == ("momentum", 0.9)
        assert (options.sched, options.decades, options.init) == ("log", 1, "vgg")
        assert options.path_length == weights
        assert options.save_epochs == list(PUBLISHED)
        assert options.img_size == (227 if model.endswith("alexnet") else 224)
    assert scratch.reset_layers is None


def test_the_measured_layers_are_there():
    for model in HIDDEN.keys() - set(RESNETS[2:]):
        with torch.device("meta"):
            network = create_model(model, 12)
        for layer in options_of(*KNOWLEDGE, "--model", model).path_length:
            assert find_layer(network, layer).weight.ndim > 1, (model, layer)
        for layer in options_of(*KNOWLEDGE, "--model", model, "--pretrained").reset_layers or ():
            find_layer(network, layer)


def test_the_last_epoch_is_kept():
    """2.3, 2.4: however long the run is, but not where the user has named the epochs."""
    flags = (*KNOWLEDGE, "--method", "none", "--epochs")
    assert options_of(*flags, 12).save_epochs == [0, 2, 5, 10, 12]
    assert options_of(*flags, 10).save_epochs == [0, 2, 5, 10]
    assert options_of(*flags, 160).save_epochs == [*PUBLISHED, 160]
    assert options_of(*flags, 12, "--save-epochs", 3).save_epochs == [3]
    assert options_of("--dataset", "cifar100").save_epochs == []


def test_students_keep_more(tmp_path):
    """2.4: epochs 0 to 10, every fifth and the last; those that are examined are the published."""
    expected = sorted({*range(11), *range(0, 151, 5)})
    assert options_of(*KNOWLEDGE).save_epochs == expected
    assert options_of(*KNOWLEDGE, "--epochs", 23).save_epochs == [*range(11), 15, 20, 23]
    for epoch in expected:
        (tmp_path / f"epoch-{epoch:04d}.safetensors").touch()
    found = {epoch: tmp_path / f"epoch-{epoch:04d}.safetensors" for epoch in expected}
    assert _published(found) == list(PUBLISHED)


@pytest.mark.parametrize(
    ("dataset", "margin", "augmented"),
    [
        ("cub200", None, False),
        ("voc", 1.2, True),
        ("voc-animal", 1.2, True),
        ("ilsvrc-mammals", None, True),
    ],
)
def test_published_crops_and_augmentation(dataset, margin, augmented):
    """2.1; the margin of mammals, 1.5, is their data set's own."""
    options = options_of("--recipe", "knowledge", "--dataset", dataset)
    assert (options.box_margin, options.aug) == (margin, augmented)
    assert (options.train_crop_mode, options.train_resize, options.hflip) == ("crop", 256, 0.5)
    assert (options.crop_pct, options.crop_mode) == (1, "squash")
    assert not (options.vflip or options.rotation or options.color_jitter or options.hue_jitter)
    assert options_of("--recipe", "knowledge", "--dataset", dataset, "--box-margin", 1).box_margin


def test_the_supplementary_settings():
    """2.1: a teacher from scratch, heavily augmented; baseline and students are not."""
    base = ("--dataset", "ilsvrc-mammals", "--recipe", "supplement")
    flags = (*base, "--method", "none")
    teacher, baseline = options_of(*flags), options_of(*flags, "--no-aug")
    for options, epochs in ((teacher, 800), (baseline, 400)):
        assert (options.lr, options.sched, options.decades) == (0.01, "log", 1)
        assert (options.global_batch_size, options.weight_decay) == (64, 5e-4)
        assert options.model == f"{VISION}vgg19" and not options.pretrained
        assert options.epochs == epochs
    assert teacher.save_epochs == [*PUBLISHED, *LONGER, 800]
    assert baseline.save_epochs == [*PUBLISHED, *LONGER]
    assert (teacher.aug, baseline.aug) == (True, False)
    assert (teacher.train_resize, teacher.hflip, teacher.vflip) == (256, 0.5, 0.5)
    assert (teacher.rotation, teacher.color_jitter, teacher.hue_jitter) == (30, 1, 0.5)
    for layer in ("features.34", "classifier.0", "classifier.3", "classifier.6"):
        flags = (*base, "--student-layers", layer)
        options = options_of(*flags)
        check_rates(options, choice_of(*flags))
        assert not options.aug and options.save_epochs == [*PUBLISHED, *LONGER]
        assert (options.epochs, options.lr, options.sched) == (400, 1e-3, "constant")
        assert (options.weight_decay, options.global_batch_size) == (5e-4, 64)


@pytest.mark.parametrize(("patience", "rate"), [(10, 0.3), (2, 0.5), (1, 0.7)])
def test_plateau_is_the_rule_of_pytorch(patience, rate):
    options = argparse.Namespace(patience_epochs=patience, decay_rate=rate)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=rate, patience=patience)
    losses = [3.0, 2.0, *[2.0] * 12, 1.99999, *[1.9999] * 12, 1.0, *[1.5] * 25]
    for i, loss in enumerate(losses):
        rule.step(loss)
        found = plateau(losses[: i + 1], options)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), i


# Networks.


@pytest.mark.parametrize(
    ("depth", "conv", "width"), [(18, 512, 4096), (50, 2048, 2048), (101, 2048, 2048)]
)
def test_resnets_with_the_added_head(depth, conv, width):
    """2.2: what is compared, its shape, and that it lies before a ReLU."""
    with torch.device("meta"):
        model = create_model(f"headed_resnet{depth}", 12).eval()
        layers = ["added.bn2", "hidden.fc1", "hidden.fc2", "fc"]
        _, features = Taps(model, layers)(torch.zeros(2, 3, 224, 224))
    shapes = [tuple(feature.shape) for feature in features]
    assert shapes == [(2, conv, 7, 7), (2, width), (2, width), (2, 12)]
    convs = [m for m in model.added if isinstance(m, nn.Conv2d)]
    assert [(c.kernel_size, c.padding, c.bias is not None) for c in convs] == [
        ((3, 3), (1, 1), True)
    ] * 2
    kinds = [type(m) for m in (*model.added, *model.hidden)]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2 + [nn.Linear, nn.ReLU, nn.Dropout] * 2
    assert {m.p for m in model.hidden if isinstance(m, nn.Dropout)} == {0.5}


def test_how_new_networks_are_drawn():
    """2.2: convolutions Kaiming normal with fan-out, linear N(0, 0.01^2), BN 1 and 0, biases 0."""
    torch.manual_seed(0)
    model = create_model("headed_resnet18", 5)
    _check_drawn(model)


def _check_drawn(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            fan_out = weight[:, 0].numel()
            std = (2 / fan_out) ** 0.5 if isinstance(module, nn.Conv2d) else 0.01
            off = 5 / (2 * weight.numel()) ** 0.5
            assert weight.std().item() == pytest.approx(std, rel=off), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any(), name


def test_a_published_trunk_has_a_fresh_head(tmp_path):
    torch.manual_seed(1)
    trunk = timm.create_model("resnet18").state_dict()
    save_file(trunk, tmp_path / "trunk.safetensors")
    model = timm.create_model(
        "headed_resnet18", pretrained=True, num_classes=7,
        pretrained_cfg_overlay={"file": str(tmp_path / "trunk.safetensors")},
    )  # fmt: skip
    own = model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in trunk.items() if not k.startswith("fc."))
    head = model.hidden.fc1.weight
    assert head.std().item() == pytest.approx(0.01, rel=0.01)
    assert own["fc.weight"].shape == (7, 4096)


@pytest.mark.parametrize(
    ("name", "conv", "hidden"),
    [("vgg11", 18, (0, 3)), ("vgg16", 28, (0, 3)), ("vgg19", 34, (0, 3)), ("alexnet", 10, (1, 4))],
)
def test_layers_of_vgg_and_alexnet(name, conv, hidden):
    """2.2: the last convolution and the hidden layers, each before its ReLU, which is in place."""
    side, shape = (227, (1, 256, 13, 13)) if name == "alexnet" else (224, (1, 512, 14, 14))
    with torch.device("meta"):
        model = create_model(f"torchvision.models:{name}", 20).eval()
        layers = [f"features.{conv}", *(f"classifier.{i}" for i in hidden), "classifier.6"]
        _, features = Taps(model, layers)(torch.zeros(1, 3, side, side))
    assert [tuple(f.shape) for f in features] == [shape, (1, 4096), (1, 4096), (1, 20)]
    convs = [i for i, m in enumerate(model.features) if isinstance(m, nn.Conv2d)]
    assert convs[-1] == conv
    for layer in layers[:-1]:
        stem, _, i = layer.partition(".")
        assert isinstance(find_layer(model, f"{stem}.{int(i) + 1}"), nn.ReLU)


def test_a_tap_before_a_relu_in_place():
    torch.manual_seed(0)
    model = create_model("torchvision.models:squeezenet1_0", 5).eval()
    _, (before, after) = Taps(model, ["features.3.squeeze", "features.3.squeeze_activation"])(
        torch.randn(1, 3, 64, 64)
    )
    assert before.min() < 0 <= after.min() and torch.equal(before.relu(), after)


# Weights of new networks, by flags.


def options_for(**more) -> argparse.Namespace:
    base = {"model": "cifar_resnet8", "pretrained": False, "img_size": None, "model_kwargs": {},
            "initial_checkpoint": None, "sync_bn": False, "seed": 3}  # fmt: skip
    return argparse.Namespace(**base | more)


def test_init_vgg_is_of_the_seed_alone():
    one, two, other = (
        build_model(options_for(init="vgg", seed=seed), 10, seed_name="network")
        for seed in (3, 3, 4)
    )
    _check_drawn(one)
    assert checksum(one.state_dict()) == checksum(two.state_dict())
    assert checksum(one.state_dict()) != checksum(other.state_dict())


def test_student_and_baseline_begin_alike_under_init(run_script, teacher_run, tmp_path):
    """train/classifier.py and train/distill.py draw the same network from one seed with --init."""
    few = ("--train-limit", 32, "--eval-limit", 32, "-b", 32, "--epochs", 1, "--model",
           "cifar_resnet8", "--init", "vgg", "--save-epochs", 0, "--output", ".")  # fmt: skip
    distilled = ("--method", "layer", "--teacher", "cifar_resnet8", "--no-baseline")
    distilled += ("--teacher-checkpoint", teacher_run)
    for script, name, more in ((CLASSIFIER, "one", ()), (DISTILL, "two", distilled)):
        code, _, err = run_script(script, *few, "--experiment", name, *more)
        assert code == 0, err
    one, two = (load_file(tmp_path / n / "weights/epoch-0000.safetensors") for n in ("one", "two"))
    weights = [name for name in one if name.endswith("weight")]
    assert all(torch.equal(one[name], two[name]) for name in weights if one[name].ndim > 1)


def test_reset_layers(teacher_run):
    """Named modules are drawn anew once weights are loaded; the others are what was loaded."""
    given = options_for(initial_checkpoint=str(teacher_run), init="vgg")
    loaded = build_model(given, 10, seed_name="network").state_dict()
    assert checksum(loaded) == checksum(load_file(teacher_run / "best.safetensors"))
    given.reset_layers = ["layer3.0", "fc"]
    model = build_model(given, 10, seed_name="network")
    _check_drawn(model.layer3[0])
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.2)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, loaded[name])}
    anew = {n for n in loaded if n.startswith(("layer3.0.", "fc.")) and n.endswith("weight")}
    assert not same & {n for n in anew if loaded[n].ndim > 1}
    assert same >= {name for name in loaded if not name.startswith(("layer3.0.", "fc."))}
    given.reset_layers = ["layer9"]
    with pytest.raises(UsageError, match="unknown layer 'layer9'"):
        build_model(given, 10, seed_name="network")


@pytest.mark.parametrize("flag", [("--pretrained",), ("--initial-checkpoint", "x")])
@pytest.mark.parametrize("script", [CLASSIFIER, DISTILL])
def test_init_contradicts_weights_that_exist(refused, script, flag):
    refused(2, script, "--init", "vgg", *flag, words=["--init vgg", flag[0]])


# Images.


def picture() -> Image.Image:
    pixels = torch.arange(300 * 280 * 3, dtype=torch.int64).remainder(251).to(torch.uint8)
    return Image.fromarray(pixels.view(300, 280, 3).numpy())


def augmented(seed: int, **settings) -> torch.Tensor:
    steps = train_transform((224, 224), Augmentation(crop="crop", **settings), "bilinear", None)
    torch.manual_seed(seed)
    return steps(picture())


def test_crop_resizes_both_sides_and_cuts():
    from torchvision.transforms.v2.functional import pil_to_tensor

    whole = pil_to_tensor(picture().resize((256, 256), Image.Resampling.BILINEAR))
    for settings in ({"resize": 256}, {}):  # 8/7 of 224 is 256
        cut = augmented(0, hflip=0.0, **settings)
        assert cut.shape == (3, 224, 224)
        windows = whole.unfold(1, 224, 1).unfold(2, 224, 1)  # [3, 33, 33, 224, 224]
        assert (windows[:, :, :, 0, :] == cut[:, None, None, 0, :]).all(0).all(-1).any()


def test_heavy_augmentation():
    """2.1: both flips, rotation, colours; the seed of an image settles it."""
    plain = augmented(1, hflip=0.0)
    flipped = augmented(1, hflip=0.0, vflip=1.0)
    assert torch.equal(flipped, plain.flip(1))
    for settings in ({"rotation": 30.0}, {"color_jitter": 1.0}, {"hue_jitter": 0.5}):  # each alone
        changed = augmented(1, hflip=0.0, **settings)
        assert not torch.equal(changed, plain), settings
        assert torch.equal(changed, augmented(1, hflip=0.0, **settings)), settings


@pytest.mark.parametrize("crop", ["pad", "none", "crop"])
@pytest.mark.parametrize("padding", ["constant", "reflect"])
def test_rotation_with_other_crops(crop, padding):
    """Interpolated as all resizing is, whatever the padding is filled with."""
    settings = {"crop": crop, "padding_mode": padding, "hflip": 0.0}
    turned = []
    for interpolation in ("bilinear", "nearest"):
        for rotation in (10.0, 30.0):
            augmentation = Augmentation(**settings, rotation=rotation)
            torch.manual_seed(2)
            turned.append(train_transform((64, 64), augmentation, interpolation, 64)(small()))
    assert all(image.shape == (3, 64, 64) for image in turned)
    assert not torch.equal(turned[0], turned[1]) and not torch.equal(turned[1], turned[3])


def small() -> Image.Image:
    return picture().resize((64, 64))


def test_hue_alone_in_random_resized_crops():
    plain, turned = (
        train_transform((64, 64), Augmentation("rrc", hflip=0.0, hue_jitter=h), "bilinear", None)
        for h in (0.0, 0.5)
    )
    torch.manual_seed(0)
    expected = plain(picture())
    torch.manual_seed(0)
    assert not torch.equal(turned(picture()), expected)


def test_a_recipe_gives_its_resize_up_for_another_crop():
    options = options_of(*KNOWLEDGE, "--aug", "--train-crop-mode", "rrc")
    assert (options.train_crop_mode, options.train_resize) == ("rrc", None)
    with pytest.raises(UsageError, match=r"--train-crop-mode .* --no-aug of recipe knowledge"):
        options_of(*KNOWLEDGE, "--train-crop-mode", "rrc")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--train-resize 36", ["--train-resize", "--train-crop-mode crop"]),
        ("--hue-jitter 0.1 --train-crop-mode rrc --aa rand-m9", ["--hue-jitter", "--aa"]),
        ("--no-aug --train-crop-mode crop", ["--train-crop-mode", "--no-aug"]),
        ("--no-aug --vflip 0.5", ["--vflip", "--no-aug"]),
        ("--no-aug --rotation 30", ["--rotation", "--no-aug"]),
        ("--no-aug --hue-jitter 0.1", ["--hue-jitter", "--no-aug"]),
        ("--train-crop-mode crop --train-resize 16", ["--train-resize 16", "32"]),
        ("--train-crop-mode pad --train-resize 36", ["--train-resize", "crop"]),
        ("--train-crop-mode rrc --rotation 30", ["--rotation", "--train-crop-mode crop"]),
        ("--train-crop-mode crop --hue-jitter 0.6", ["--hue-jitter", "0.5"]),
        ("--train-crop-mode crop --aa rand-m9", ["--aa", "rrc"]),
        ("--vflip 2", ["--vflip", "[0, 1]"]),
    ],
)
def test_bad_augmentation(refused, flags, words):
    refused(2, CLASSIFIER, *flags.split(), words=words)
