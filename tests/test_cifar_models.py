"""The CIFAR networks of the benchmarks: counts, features, initialisation, timm's rules."""

import pytest
import timm
import torch
from torch import nn

from kdfast.errors import UsageError
from kdfast.models import (
    Taps,
    aliases,
    classifier_name,
    create_model,
    default_stages,
    input_size,
    penultimate,
    resolve_name,
    split_at,
)

DIH = {"form": "dih"}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


COUNTS = [
    ("cifar_wrn16_1", {}, 100, 180_916),
    ("cifar_wrn16_2", {}, 100, 703_284),
    ("cifar_wrn28_2", {}, 100, 1_479_220),
    ("cifar_wrn28_2", DIH, 100, 1_481_252),
    ("cifar_wrn40_1", {}, 100, 569_780),
    ("cifar_wrn40_2", {}, 100, 2_255_156),
    ("cifar_vgg8", {}, 100, 3_965_028),
    ("cifar_vgg11", {}, 100, 9_277_284),
    ("cifar_vgg11", DIH, 100, 9_277_284),
    ("cifar_vgg13", {}, 100, 9_462_180),
    ("cifar_vgg13", DIH, 100, 9_462_180),
    ("cifar_resnet18", {}, 10, 11_173_962),
    ("cifar_resnet18", {}, 100, 11_220_132),
    ("cifar_resnet18", {}, 200, 11_271_432),
    ("cifar_resnet34", {}, 10, 21_282_122),
    ("cifar_resnet34", {}, 100, 21_328_292),
    ("cifar_resnet34", {}, 200, 21_379_592),
    ("cifar_resnet50", {}, 100, 23_705_252),
    ("cifar_mobilenetv2_half", {}, 100, 812_836),
    ("cifar_shufflenetv1", {}, 100, 949_258),
    ("cifar_shufflenetv2", {}, 100, 1_355_528),
]


@pytest.mark.parametrize(("name", "kwargs", "classes", "count"), COUNTS)
def test_parameters(name, kwargs, classes, count):
    with torch.device("meta"):
        assert parameters(create_model(name, classes, **kwargs)) == count


# Channels and, at 32 pixels, height of f0, f1, ...; the width of the pooled vector.
RESNET_SIDES = (32, 32, 16, 8)
FEATURES = {
    "cifar_wrn16_1": ((16, 16, 32, 64), RESNET_SIDES, 64),
    "cifar_wrn40_2": ((16, 32, 64, 128), RESNET_SIDES, 128),
    "cifar_wrn28_2 dih": ((16, 32, 64, 128), RESNET_SIDES, 128),
    "cifar_vgg8": ((64, 128, 256, 512, 512), (32, 16, 8, 4, 4), 512),
    "cifar_vgg13": ((64, 128, 256, 512, 512), (32, 16, 8, 4, 4), 512),
    "cifar_vgg11 dih": ((64, 64, 128, 256, 512), (32, 16, 8, 4, 2), 512),
    "cifar_vgg13 dih": ((64, 64, 128, 256, 512), (32, 16, 8, 4, 2), 512),
    "cifar_resnet18": ((64, 64, 128, 256, 512), (32, 32, 16, 8, 4), 512),
    "cifar_resnet50": ((64, 256, 512, 1024, 2048), (32, 32, 16, 8, 4), 2048),
    "cifar_mobilenetv2_half": ((16, 12, 16, 48, 160), (16, 16, 8, 4, 2), 1280),
    "cifar_shufflenetv1": ((24, 240, 480, 960), (32, 16, 8, 4), 960),
    "cifar_shufflenetv2": ((24, 116, 232, 464), (32, 16, 8, 4), 1024),
}


def build(case, classes=10, **kwargs):
    name, _, form = case.partition(" ")
    return create_model(name, classes, **({"form": form} if form else {}), **kwargs)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("case", FEATURES)
def test_features(case, scale):
    torch.manual_seed(0)
    widths, sides, pooled = FEATURES[case]
    model = build(case, 100).eval()
    stages = default_stages(model, stem=True)
    assert default_stages(model) == stages[1:]
    taps = Taps(model, [*stages, penultimate(model)])
    with torch.no_grad():
        logits, features = taps(torch.randn(2, 3, 32 * scale, 32 * scale))
    assert logits.shape == (2, 100)
    expected = [(2, c, s * scale, s * scale) for c, s in zip(widths, sides, strict=True)]
    if case in ("cifar_vgg8", "cifar_vgg13") and scale == 2:
        expected[4] = (2, 512, 4, 4)  # the fourth pool
    assert [tuple(feature.shape) for feature in features] == [*expected, (2, pooled)]
    # The stem of a WRN is raw, as its stages are; a MobileNetV2's stages end linearly.
    signed = {"cifar_wrn": range(len(stages)), "cifar_mob": range(1, len(stages))}
    for i, feature in enumerate(features[:-1]):
        assert bool((feature < 0).any()) == (i in signed.get(case[:9], ())), stages[i]


@pytest.mark.parametrize("case", [case for case in FEATURES if "50" not in case])
def test_timm_rules(case):
    name = case.partition(" ")[0]
    model = build(case, 7, in_chans=1, drop_rate=0.1)
    x = torch.randn(2, 1, 48, 32)
    y = model(x)  # in training mode; any size that survives the strides
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier() is model.get_submodule(classifier_name(model))
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    assert input_size(model) == (1, 32, 32)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert list(model.state_dict()) == list(build(case, 0).state_dict())
    form = {"form": "dih"} if "dih" in case else {}
    widths, sides, _ = FEATURES[case]
    backbone = timm.create_model(name, features_only=True, **form)
    assert backbone.feature_info.channels() == list(widths)
    assert backbone.feature_info.reduction() == [32 // side for side in sides]
    maps = backbone(torch.randn(1, 3, 32, 32))
    assert [(f.shape[1], f.shape[2]) for f in maps] == list(zip(widths, sides, strict=True))


@pytest.mark.parametrize("case", ["cifar_wrn16_1", "cifar_vgg8", "cifar_shufflenetv2"])
def test_cuts_at_stages(case):
    model = build(case).eval()
    x = torch.randn(2, 3, 32, 32)
    for layer in default_stages(model, stem=True):
        head, tail = split_at(model, layer)
        assert torch.equal(tail(head(x)), model(x))


def expect_normal(tensor, std):
    if tensor.numel() > 1000:
        assert tensor.std().item() == pytest.approx(std, rel=0.15)
        assert tensor.mean().abs().item() < 0.2 * std


@pytest.mark.parametrize(
    ("case", "head"),
    [
        ("cifar_wrn40_2", "library weight"),
        ("cifar_wrn28_2 dih", "library weight"),
        ("cifar_vgg11", "small"),
        ("cifar_resnet18", "library"),
        ("cifar_mobilenetv2_half", "small"),
    ],
)
def test_initialisation(case, head):
    torch.manual_seed(0)
    model = build(case, 100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            out, _, k, _ = module.weight.shape
            expect_normal(module.weight, (2 / (k * k * out)) ** 0.5)
            assert module.bias is None or (module.bias == 0).all()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    linear = model.get_classifier()
    if head == "small":
        expect_normal(linear.weight, 0.01)
    else:
        bound = linear.in_features**-0.5
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert (linear.bias == 0).all() == (head != "library")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cifar_resnet18", {"init": "library"}),
        ("cifar_shufflenetv1", {}),
        ("cifar_shufflenetv2", {}),
    ],
)
def test_library_initialisation(name, kwargs):
    torch.manual_seed(0)
    for module in create_model(name, 100, **kwargs).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            bound = module.weight[0].numel() ** -0.5
            assert module.weight.abs().max().item() == pytest.approx(bound, rel=0.02)


def test_wide_resnet_forms():
    plain, dih = create_model("cifar_wrn28_2"), create_model("cifar_wrn28_2", form="dih")
    assert not any(isinstance(module, nn.Dropout) and module.p for module in plain.modules())
    assert [m.p for m in dih.modules() if isinstance(m, nn.Dropout) and m.p] == [0.3] * 12
    assert (plain.bn1.momentum, dih.bn1.momentum) == (0.1, 0.9)
    assert {m.momentum for m in dih.block1.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    for model, strides in ((plain, (2, 1)), (dih, (1, 2))):
        block = model.block2.layer[0]
        assert (block.conv1.stride[0], block.conv2.stride[0]) == strides
    other = create_model("cifar_wrn28_2", form="dih", block_drop_rate=0.1)
    assert [m.p for m in other.modules() if isinstance(m, nn.Dropout) and m.p] == [0.1] * 12


@pytest.mark.parametrize(("form", "activated"), [("crd", True), ("dih", False)])
def test_wide_resnet_shortcut_takes(form, activated):
    block = create_model("cifar_wrn16_2", form=form).eval().block2.layer[0]
    x = torch.randn(2, 32, 8, 8)
    nn.init.zeros_(block.conv2.weight)
    shortcut = block.convShortcut if activated else block.shortcut
    taken = torch.relu(block.bn1(x)) if activated else x
    assert torch.equal(block(x), shortcut(taken))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cifar_wrn16_1", {"form": "wide"}, "form must be 'crd' or 'dih', got 'wide'"),
        ("cifar_wrn16_1", {"block_drop_rate": 0.3}, "block_drop_rate needs form 'dih'"),
        ("cifar_vgg8", {"form": "tofd"}, "form must be 'crd' or 'dih', got 'tofd'"),
        ("cifar_resnet18", {"init": "he"}, "init must be 'kaiming' or 'library', got 'he'"),
        ("cifar_shufflenetv1", {"form": "dih"}, "form"),
    ],
)
def test_other_arguments_are_refused(name, kwargs, message):
    with pytest.raises(UsageError, match=message) as caught:
        create_model(name, **kwargs)
    assert "\n" not in str(caught.value)


ALIASES = {
    "wrn_16_1": "cifar_wrn16_1",
    "wrn_40_2": "cifar_wrn40_2",
    "vgg8": "cifar_vgg8",
    "MobileNetV2": "cifar_mobilenetv2_half",
    "ShuffleV1": "cifar_shufflenetv1",
    "ShuffleV2": "cifar_shufflenetv2",
    "res8": "cifar_resnet8",
    "res110": "cifar_resnet110",
    "resnet_32_20": "cifar_resnet20",
    "resnet_32_110": "cifar_resnet110",
}


def test_published_spellings():
    assert {alias: resolve_name(alias) for alias in ALIASES} == ALIASES
    for name in ("vgg11", "vgg13", "resnet18", "resnet34", "resnet50"):
        assert resolve_name(name) == name  # timm's own
    own = {name.lower() for name in timm.list_models()}
    assert not {alias.lower() for alias in aliases()} & own
    with pytest.raises(UsageError, match="unknown model 'ResNet50'; did you mean"):
        resolve_name("ResNet50")


@pytest.mark.parametrize("case", ["cifar_vgg8", "cifar_vgg8 dih", "cifar_wrn16_1"])
def test_distillation_pairs(run_script, tmp_path, case):
    name, _, form = case.partition(" ")
    kwargs = [f"form={form}"] if form else []
    torch.save(build(case).state_dict(), tmp_path / "t.pth")
    flags = ["--teacher", name, "--teacher-checkpoint", "t.pth", "--student", name]
    for flag in ("--teacher-kwargs", "--model-kwargs"):
        flags += [flag, *kwargs] if kwargs else []
    flags += ["--method", "at", "fsp", "--epochs", 1, "--train-limit", 64, "--eval-limit", 10]
    code, out, err = run_script("train/distill.py", *flags, "--no-baseline", "--output", "out")
    assert code == 0, err
    stages = {
        "cifar_vgg8": ["block0", "block1", "block2", "block3", "block4"],
        "cifar_vgg8 dih": ["block0.2", "block0", "block1", "block2", "block3"],
        "cifar_wrn16_1": ["conv1", "block1", "block2", "block3"],
    }[case]
    pairs = [f"{stage} -> {stage}" for stage in stages]
    assert f"at: {', '.join(pairs[1:])}\n" in out
    assert f"fsp: {', '.join(pairs)}\n" in out
