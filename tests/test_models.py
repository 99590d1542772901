"""Models by name, their stages, their arguments and their inputs."""

from urllib.error import URLError

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_bad_files import Bomb
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model_weights

from kdfast.errors import UsageError, UserError
from kdfast.models import (
    InputAdapter,
    Taps,
    aliases,
    create_model,
    default_stages,
    fixed_input_size,
    input_size,
    pair_stages,
    penultimate,
    published_classes,
    resolve_name,
)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# --- CIFAR ResNets -----------------------------------------------------------------------------

# depth: parameters with 10 and 100 classes, millions of multiply-adds with 100
TABLE = {
    8: (78_042, 83_892, 12.51),
    14: (175_258, 181_108, 26.66),
    20: (272_474, 278_324, 40.82),
    32: (466_906, 472_756, 69.13),
    44: (661_338, 667_188, 97.44),
    56: (855_770, 861_620, 125.75),
    110: (1_730_714, 1_736_564, 253.16),
}


@pytest.mark.parametrize("depth", TABLE)
def test_cifar_resnet_counts(depth):
    ten, hundred, macs = TABLE[depth]
    assert parameters(create_model(f"cifar_resnet{depth}", 10)) == ten
    model = create_model(f"cifar_resnet{depth}", 100).eval()
    assert parameters(model) == hundred
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert round(counter.get_total_flops() / 2e6, 2) == macs


@pytest.mark.parametrize(
    ("name", "classes", "kwargs", "count"),
    [
        ("cifar_resnet8x4", 100, {}, 1_233_540),
        ("cifar_resnet32x4", 100, {}, 7_433_860),
        ("cifar_resnet20", 10, {"stem_kernel": 7}, 274_394),
        ("cifar_resnet20", 100, {"stem_kernel": 7}, 280_244),
        ("cifar_resnet110", 10, {"stem_kernel": 7}, 1_732_634),
        ("cifar_resnet110", 100, {"stem_kernel": 7}, 1_738_484),
    ],
)
def test_cifar_resnet_variants(name, classes, kwargs, count):
    assert parameters(create_model(name, classes, **kwargs)) == count


@pytest.mark.parametrize(("side", "stem_kernel", "sides"), [(32, 3, 32), (32, 7, 28), (64, 3, 64)])
def test_cifar_resnet_features(side, stem_kernel, sides):
    model = create_model("resnet20", 100, stem_kernel=stem_kernel)
    taps = Taps(model, [*default_stages(model, stem=True), penultimate(model)])
    logits, features = taps(torch.randn(2, 3, side, side))
    assert logits.shape == (2, 100)
    assert [tuple(feature.shape) for feature in features] == [
        (2, 16, sides, sides), (2, 16, sides, sides), (2, 32, sides // 2, sides // 2),
        (2, 64, sides // 4, sides // 4), (2, 64),
    ]  # fmt: skip
    assert all((feature >= 0).all() for feature in features)


def test_cifar_resnet_initialisation():
    torch.manual_seed(0)
    model = create_model("cifar_resnet56", 100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            out, _, k, _ = module.weight.shape
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx((2 / (k * k * out)) ** 0.5, rel=0.15)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert model.fc.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    xavier = create_model("cifar_resnet56", 100, init="xavier")
    assert xavier.fc.weight.abs().max().item() == pytest.approx((6 / 164) ** 0.5, rel=0.01)


def test_cifar_resnet_is_a_timm_model():
    model = timm.create_model("cifar_resnet8", num_classes=7, in_chans=1, drop_rate=0.1)
    x = torch.randn(2, 1, 32, 32)
    model.eval()
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier() is model.fc
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    backbone = timm.create_model("cifar_resnet8", features_only=True)
    assert [f.shape[1] for f in backbone(torch.randn(1, 3, 32, 32))] == [16, 16, 32, 64]
    assert backbone.feature_info.reduction() == [1, 1, 2, 4]


@pytest.mark.parametrize("kwargs", [{"init": "he"}, {"stem_kernel": 5}])
def test_cifar_resnet_refuses_other_values(kwargs):
    with pytest.raises(UsageError, match=f"{next(iter(kwargs))} must be"):
        create_model("cifar_resnet8", **kwargs)


# --- names -------------------------------------------------------------------------------------


def test_aliases_never_hide_timm_names(monkeypatch):
    assert resolve_name("resnet20") == "cifar_resnet20"
    assert resolve_name("resnet8x4") == "cifar_resnet8x4"
    assert resolve_name("resnet18") == "resnet18"
    assert resolve_name("resnet18.a1_in1k") == "resnet18.a1_in1k"
    assert resolve_name("torchvision.models:alexnet") == "torchvision.models:alexnet"
    assert not any(timm.is_model(alias) for alias in aliases())
    assert all(timm.is_model(name) for name in aliases().values())
    is_model = timm.is_model
    monkeypatch.setattr(timm, "is_model", lambda name: name == "resnet20" or is_model(name))
    assert resolve_name("resnet20") == "resnet20"
    assert "resnet20" not in aliases()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", "unknown model 'resnet21'; did you mean .*resnet2"),
        ("resnet8x5", "unknown model 'resnet8x5'; did you mean .*resnet8x4"),
        ("cifar_resnet21", "did you mean .*cifar_resnet20"),
        (
            "resnet18.a9_in1k",
            "unknown pretrained tag of resnet18 'a9_in1k'; did you mean .*a1_in1k",
        ),
        ("qqqqqqqqqq", "unknown model 'qqqqqqqqqq'$"),
        ("torchvision.models:", "not of the form module.path:function"),
        ("torchvision.modles:alexnet", "cannot import torchvision.modles"),
        ("torchvision.models:alexnt", "unknown function of torchvision.models 'alexnt'.*alexnet"),
        ("math:sqrt", "model math:sqrt cannot be built so"),
        ("os:getcwd", "model os:getcwd cannot be built so"),
        ("argparse:Namespace", "argparse:Namespace returned Namespace, not a torch module"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UsageError, match=message) as caught:
        create_model(name, 10)
    assert "\n" not in str(caught.value)


def test_arguments_a_model_does_not_take():
    with pytest.raises(UsageError, match=r"model resnet18 cannot be built so: .*'wdith'"):
        create_model("resnet18", wdith=3)
    with pytest.raises(UsageError, match=r"alexnet cannot be built so: .*'in_chans'"):
        create_model("torchvision.models:alexnet", 10, in_chans=1)
    with pytest.raises(UsageError, match="timm and torchvision only"):
        create_model("torch.nn:Linear", 10, pretrained=True)


def test_model_from_a_path():
    model = create_model("torchvision.models:mobilenet_v3_small", 10, dropout=0.5)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert penultimate(model) == "classifier.3:in"
    assert input_size(model) == (3, 224, 224)
    with pytest.raises(UsageError, match="--student-layers / --teacher-layers"):
        default_stages(model)


def test_input_sizes():
    assert input_size(create_model("cifar_resnet8")) == (3, 32, 32)
    model = create_model("resnet18", 10, in_chans=1, img_size=64)
    assert input_size(model) == (1, 64, 64)
    assert not fixed_input_size(model)
    model = create_model("vit_tiny_patch16_224", 10, img_size=(32, 64))
    assert input_size(model) == (3, 32, 64)
    assert fixed_input_size(model)
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 10)
    assert not fixed_input_size(create_model("vit_tiny_patch16_224", dynamic_img_size=True))
    with pytest.raises(UsageError, match="Linear does not say its input size"):
        input_size(nn.Linear(2, 2))


def test_pretrained_weights_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="cannot fetch the pretrained weights of resnet18 "
    ) as error:
        create_model("resnet18", pretrained=True, cache_dir=tmp_path)
    assert error.value.exit_code == 1
    with pytest.raises(UserError, match="no pretrained weights exist for cifar_resnet20: train"):
        create_model("resnet20", pretrained=True)


def test_pretrained_weights_of_torchvision(monkeypatch):
    """A classifier for other classes is new; everything else is what was published."""
    name = "torchvision.models:squeezenet1_1"
    torch.manual_seed(0)
    published = create_model(name).state_dict()
    weights = get_model_weights("squeezenet1_1")
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: dict(published))
    whole = create_model(name, pretrained=True).state_dict()
    assert all(torch.equal(whole[key], value) for key, value in published.items())
    own = create_model(name, 7, pretrained=True).state_dict()
    new = {
        key
        for key, value in published.items()
        if own[key].shape != value.shape or not torch.equal(own[key], value)
    }
    assert new == {"classifier.1.weight", "classifier.1.bias"}
    assert own["classifier.1.bias"].shape == (7,)
    assert published_classes(name) == published_classes("resnet18") == 1000
    assert published_classes("torch.nn:Linear") is None


def test_pretrained_weights_of_torchvision_run_no_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = get_model_weights("alexnet").IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save({"x": Bomb()}, tmp_path / "hub/checkpoints" / file)
    with torch.device("meta"), pytest.raises(UserError, match=file):
        create_model("torchvision.models:alexnet", 10, pretrained=True)
    assert not (tmp_path / "ran").exists()


def test_pretrained_weights_of_torchvision_that_are_not_there(monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no network")

    weights = get_model_weights("alexnet")
    monkeypatch.setattr(weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match="cannot fetch the pretrained weights of torchvision"):
        create_model("torchvision.models:alexnet", 10, pretrained=True)
    with torch.device("meta"), pytest.raises(UserError, match="no pretrained weights exist for"):
        create_model("torchvision.models:vit_h_14", pretrained=True)
    with pytest.raises(UsageError, match="--model-kwargs"):
        monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: {"x": torch.ones(1)})
        create_model("torchvision.models:alexnet", 10, pretrained=True, dropout=0.1)


# --- stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stem", "stages"),
    [
        ("resnet18", "act1", "layer1 layer2 layer3 layer4"),
        ("cifar_resnet20", "act1", "layer1 layer2 layer3"),
        ("convnext_atto", "stem", "stages.0 stages.1 stages.2 stages.3"),
        ("mobilenetv3_small_100", "bn1", "blocks.0 blocks.1 blocks.3 blocks.5"),
        ("vit_tiny_patch16_224", "patch_embed", " ".join(f"blocks.{i}" for i in range(12))),
        ("vgg11_bn", "features.2", "features.6 features.13 features.20 features.27"),
        ("efficientnet_b0", "bn1", "blocks.0 blocks.1 blocks.2 blocks.4 blocks.6"),
        ("regnety_002", "stem", "s1 s2 s3 s4"),
        (
            "densenet121",
            "features.norm0",
            "features.denseblock1 features.denseblock2 features.denseblock3 features.norm5",
        ),
        ("swin_tiny_patch4_window7_224", "patch_embed", "layers.0 layers.1 layers.2 layers.3"),
        ("mobilenetv2_100", "bn1", "blocks.0 blocks.1 blocks.2 blocks.4 blocks.6"),
    ],
)
def test_default_stages(name, stem, stages):
    model = create_model(name, 10)
    assert default_stages(model) == stages.split()
    assert default_stages(model, stem=True) == [stem, *stages.split()]


def test_stages_and_stem_are_missing():
    model = create_model("test_vit", 10)
    del model.patch_embed
    with pytest.raises(UsageError, match="VisionTransformer has no stem that is known by name"):
        default_stages(model, stem=True)


def layers(prefix, *numbers):
    return [f"{prefix}{i}" for i in numbers]


@pytest.mark.parametrize(
    ("teacher", "student", "chosen_teacher", "chosen_student"),
    [
        (4, 4, (1, 2, 3, 4), (1, 2, 3, 4)),
        (4, 3, (2, 3, 4), (1, 2, 3)),  # two pyramids: from the deep end
        (3, 4, (1, 2, 3), (2, 3, 4)),
        (5, 4, (2, 3, 4, 5), (1, 2, 3, 4)),
        (12, 4, (3, 6, 9, 12), (1, 2, 3, 4)),  # a stack of like blocks: evenly, ending at the last
        (12, 3, (4, 8, 12), (1, 2, 3)),
        (4, 12, (1, 2, 3, 4), (3, 6, 9, 12)),
        (12, 5, (2, 4, 7, 9, 12), (1, 2, 3, 4, 5)),
        (24, 12, tuple(range(2, 25, 2)), tuple(range(1, 13))),
        (12, 1, (12,), (1,)),
    ],
)
def test_pairing_rule(teacher, student, chosen_teacher, chosen_student):
    pairs = pair_stages(layers("t", *range(1, teacher + 1)), layers("s", *range(1, student + 1)))
    assert pairs == list(
        zip(layers("t", *chosen_teacher), layers("s", *chosen_student), strict=True)
    )


@given(st.integers(1, 40), st.integers(1, 40))
def test_pairing_laws(m, n):
    pairs = pair_stages(list(range(m)), list(range(n)))
    assert len(pairs) == min(m, n)
    assert pairs[-1] == (m - 1, n - 1)
    for side in zip(*pairs, strict=True):
        assert list(side) == sorted(set(side))
    assert pair_stages(list(range(n)), list(range(m))) == [(b, a) for a, b in pairs]


def test_pairing_needs_layers():
    with pytest.raises(UsageError, match="at least one layer"):
        pair_stages([], ["layer1"])


# --- inputs ------------------------------------------------------------------------------------


def test_input_adapter_renormalises_and_resizes():
    image = torch.rand(2, 3, 32, 32)
    ours, theirs = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), ([0.1, 0.2, 0.3], [1.0, 0.5, 0.25])

    def normal(x, mean, std):
        return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    x = normal(image, *ours)
    torch.testing.assert_close(InputAdapter(*ours, *theirs)(x), normal(image, *theirs))
    resized = InputAdapter(*ours, *theirs, target_size=16)(x)
    expected = nn.functional.interpolate(image, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(resized, normal(expected, *theirs), atol=1e-5, rtol=1e-5)
    assert InputAdapter(*ours, *theirs, target_size=(48, 40))(x).shape == (2, 3, 48, 40)
    assert InputAdapter(*ours, *theirs, 16)(x.bfloat16()).dtype == torch.bfloat16
    same = InputAdapter(*ours, *ours, target_size=32)
    assert same(x) is x
    assert not same.state_dict()
