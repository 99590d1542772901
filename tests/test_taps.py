"""Features of a running model: values, in-place safety, compilation, copies."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdfast.errors import UsageError
from kdfast.models import Taps, create_model, default_stages, penultimate

# (model, image side): the models every feature of this file is tried on.
MODELS = [
    ("cifar_resnet8", 32),
    ("resnet18", 64),
    ("convnext_atto", 64),
    ("mobilenetv3_small_100", 64),
    ("vit_tiny_patch16_224", 64),
]


def build(name, side=32, **kwargs):
    torch.manual_seed(0)
    model = create_model(name, 10, img_size=side, **kwargs)
    return model, torch.randn(2, 3, side, side)


class Chain(nn.Module):
    """Three layers, of which the last two work in place; `relu` runs twice."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(dropout, inplace=True)
        self.unused = nn.Identity()
        self.pair = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        x = self.relu(self.drop(x) - 0.5)
        return self.pair(x)[0].mean((2, 3))


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18"])
def test_pre_activation_sum(name):
    model, x = build(name)
    model.eval()
    nn.init.ones_(model.layer1[0].bn2.weight)  # timm starts it at zero
    stem = [model.conv1, model.bn1, nn.ReLU(), getattr(model, "maxpool", nn.Identity())]
    stem = nn.Sequential(*stem)
    block = model.layer1[0]
    y = stem(x)
    by_hand = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(y))))) + y
    _, (before, after) = Taps(model, ["layer1.0.act2:in", "layer1.0"])(x)
    assert torch.equal(before, by_hand)
    assert (before < 0).any()
    assert torch.equal(after, by_hand.relu())


@pytest.mark.parametrize(("name", "side"), MODELS)
def test_logits_and_gradients_are_those_of_the_model(name, side):
    model, x = build(name, side)
    model.eval()
    taps = Taps(model, [*default_stages(model, stem=True), penultimate(model)])
    logits, features = taps(x)
    assert torch.equal(logits, model(x))
    sum(feature.square().mean() for feature in features).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    vector = features[-1].flatten(1)
    assert torch.equal(model.get_classifier()(vector), logits)


def test_features_follow_the_order_of_the_layers():
    model, x = build("cifar_resnet8")
    _, (deep, shallow, again) = Taps(model, ["layer3", "layer1", "layer3"])(x)
    assert deep.shape == (2, 64, 8, 8)
    assert shallow.shape == (2, 16, 32, 32)
    assert torch.equal(deep, again)


def test_tokens_become_maps():
    model, _ = build("vit_tiny_patch16_224", 64, dynamic_img_size=True)
    x = torch.randn(2, 3, 64, 96)
    taps = Taps(model.eval(), ["patch_embed.proj", "blocks.0:in", "blocks.11"])
    _, (grid, first, last) = taps(x)
    assert first.shape == last.shape == (2, 192, 4, 6)
    # Position (i, j) of the map is the token of patch (i, j).
    position = first - grid
    _, (grid2, first2, _) = taps(torch.randn(2, 3, 64, 96))
    torch.testing.assert_close(first2 - grid2, position, atol=1e-5, rtol=0)


def test_channels_last_models_give_planar_maps():
    model = create_model("swin_tiny_patch4_window7_224", 10, img_size=64, window_size=4)
    layers = ["patch_embed.proj", *default_stages(model), penultimate(model)]
    _, features = Taps(model.eval(), layers)(torch.randn(2, 3, 64, 64))
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (96, 16, 16), (96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2), (768,),
    ]  # fmt: skip


def test_last_call_wins():
    model, x = Chain().eval(), torch.randn(2, 3, 8, 8)
    _, (before, after) = Taps(model, ["relu:in", "relu"])(x)
    first = torch.relu(model.bn(model.conv(x)))
    assert torch.equal(before, first - 0.5)
    assert torch.equal(after, torch.relu(first - 0.5))


def test_autocast_features_keep_their_dtype():
    model, x = build("cifar_resnet8")
    with torch.autocast("cpu", torch.bfloat16):
        _, (feature, vector) = Taps(model, ["layer2", "fc:in"])(x)
    assert feature.dtype == vector.dtype == torch.bfloat16


# --- in-place safety ---------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [False, True])
def test_features_are_safe_from_in_place_layers(calibrated):
    model, x = build("resnet18", zero_init_last=False)
    model.eval()
    layers = ["bn1", "act1:in", "act1", "layer1.0.bn2", "layer1.0.act2:in", "layer1"]
    taps = Taps(model, layers)
    if calibrated:
        taps.calibrate(x)
    _, (bn, act_in, act, bn2, total, _) = taps(x)
    expected = model.bn1(model.conv1(x))
    assert torch.equal(bn, expected)
    assert torch.equal(act_in, expected)
    assert torch.equal(act, expected.relu())
    shortcut = model.maxpool(act)
    torch.testing.assert_close(bn2 + shortcut, total)  # timm adds in place into bn2's output
    assert not torch.equal(bn2, total)


def test_calibrate_clones_only_what_is_overwritten():
    model, x = build("resnet18")
    model.eval()
    taps = Taps(model, ["conv1", "bn1", "layer1", "layer1.0.act2:in"])
    shapes = taps.calibrate(x)
    kept = {}
    for name in ("conv1", "bn1", "layer1", "layer1.0.act2"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept.update({name: output})
        )
    _, features = taps(x)
    assert shapes == tuple(feature.shape for feature in features)
    passed = [kept[name] for name in ("conv1", "bn1", "layer1", "layer1.0.act2")]
    same = [feature is tensor for feature, tensor in zip(features, passed, strict=True)]
    assert same == [True, False, True, False]


def test_calibrate_leaves_no_trace():
    model, x = build("resnet18", drop_rate=0.5)
    model.train()
    model.layer2.eval()
    taps = Taps(model, default_stages(model))
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    taps.calibrate(x)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.inference_mode():
        assert taps.calibrate(x.clone())[0] == (2, 64, 8, 8)


def test_inference_mode():
    model, x = build("resnet18")
    taps = Taps(model.eval(), ["conv1:in", "bn1"])
    expected = taps(x)[1]
    for _ in range(2):
        with torch.inference_mode():
            assert all(map(torch.equal, taps(x)[1], expected))
        taps.calibrate(x)


def test_a_failed_calibration_keeps_cloning():
    model, x = build("resnet18")
    taps = Taps(model.eval(), ["bn1", "layer1"])
    with pytest.raises(RuntimeError):
        taps.calibrate(x[:, :1])
    assert torch.equal(taps(x)[1][0], model.bn1(model.conv1(x)))


def test_calibrate_sees_in_place_dropout():
    model, x = Chain(dropout=0.5), torch.randn(2, 3, 8, 8)
    taps = Taps(model, ["drop:in"])
    state = torch.random.get_rng_state()
    taps.calibrate(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    model.train()
    _, (feature,) = taps(x)
    assert torch.equal(feature, torch.relu(model.bn(model.conv(x))))


def test_a_calibration_that_no_longer_holds_is_noticed():
    model, x = Chain(), torch.randn(2, 3, 8, 8)
    model.relu.inplace = False
    taps = Taps(model, ["bn"])
    taps.calibrate(x)
    model.relu.inplace = True
    with pytest.raises(RuntimeError, match="'bn' was overwritten in place"):
        taps(x)


# --- compilation, copies, wrappers -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "options", "calibrated"),
    [
        ("cifar_resnet8", 32, {}, False),
        ("cifar_resnet8", 32, {}, True),
        ("mobilenetv3_small_100", 64, {}, True),
        ("vit_tiny_patch16_224", 64, {"depth": 3}, False),
    ],
)
def test_compiles_in_one_graph(name, side, options, calibrated):
    model, x = build(name, side, **options)
    stages = default_stages(model)
    taps = Taps(model, [*stages[-2:], f"{stages[0]}:in", penultimate(model)]).eval()
    if calibrated:
        taps.calibrate(x)
    compiled = torch.compile(taps, fullgraph=True, backend="eager")
    for scale in (1, 2, 3):  # later calls must not give the features of an earlier one
        logits, features = taps(scale * x)
        compiled_logits, compiled_features = compiled(scale * x)
        torch.testing.assert_close(compiled_logits, logits)
        torch.testing.assert_close(compiled_features, features)


def test_compiled_taps_train_and_are_safe_in_place():
    model, x = build("cifar_resnet8")
    taps = Taps(model, ["layer1.0.act2:in", "bn1"])
    compiled = torch.compile(taps, fullgraph=True, backend="aot_eager")
    before = copy.deepcopy(model.state_dict())

    def gradient(run):
        model.load_state_dict(before)
        model.zero_grad()
        logits, features = run(x)
        (logits.sum() + sum(feature.square().sum() for feature in features)).backward()
        return features, model.conv1.weight.grad

    (total, bn), weight = gradient(compiled)
    assert (total < 0).any() and (bn < 0).any()
    torch.testing.assert_close((total, bn), gradient(taps)[0])
    torch.testing.assert_close(weight, gradient(taps)[1], rtol=1e-4, atol=1e-3)


def test_inductor():
    model, x = Chain().eval(), torch.randn(2, 3, 8, 8)
    taps = Taps(model, ["bn", "relu"])
    torch.testing.assert_close(torch.compile(taps, fullgraph=True)(x), taps(x))


def test_refuses_compiled_models():
    model, _ = build("cifar_resnet8")
    for compiled in (torch.compile(model), nn.Sequential(torch.compile(model))):
        with pytest.raises(UsageError, match="before compilation"):
            Taps(compiled, ["layer1"])
    model.compile()
    with pytest.raises(UsageError, match="before compilation"):
        Taps(model, ["layer1"])


def test_copies_record_for_themselves():
    model, x = build("cifar_resnet8")
    taps = Taps(model.eval(), ["layer1", "layer3:in"])
    _, features = taps(x)
    twin = copy.deepcopy(taps)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    _, others = twin(x)
    assert not torch.equal(others[0], features[0])
    assert torch.equal(others[0], Taps(twin.model, ["layer1"])(x)[1][0])
    assert torch.equal(taps(x)[1][0], features[0])
    # A copy of the model alone runs as usual, and the original records nothing of it.
    average = copy.deepcopy(taps.model)
    assert torch.equal(average(x), taps(x)[0])


def test_the_model_inside_runs_and_saves_as_before():
    model, x = build("cifar_resnet8")
    names = list(model.state_dict())
    taps = Taps(model.eval(), ["layer1"])
    assert list(taps.model.state_dict()) == names
    calls = []
    model.layer1.register_forward_hook(lambda *_: calls.append(1))
    taps.close()
    model(x)
    assert len(calls) == 1
    with pytest.raises(UsageError, match="'layer1' did not run"):
        taps(x)


def test_inside_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = build("cifar_resnet8")
        taps = Taps(model, ["layer2"])
        logits, (feature,) = DistributedDataParallel(taps)(x)
        (logits.sum() + feature.sum()).backward()
        assert feature.shape == (2, 32, 16, 16)
        assert model.conv1.weight.grad is not None
    finally:
        dist.destroy_process_group()


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("layr1", "unknown layer 'layr1'; did you mean .*layer1"),
        ("layer1.0.act3:in", "unknown layer 'layer1.0.act3'; did you mean .*layer1.0.act1"),
        ("", "unknown layer ''"),
    ],
)
def test_unknown_layers(layer, message):
    with pytest.raises(UsageError, match=message):
        Taps(build("cifar_resnet8")[0], [layer])


def test_layers_that_give_no_feature():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(UsageError, match="'unused' did not run in the forward pass of Chain"):
        Taps(Chain(), ["unused"])(x)
    with pytest.raises(UsageError, match="'pair' passes a tuple, not a tensor"):
        Taps(Chain(), ["pair"])(x)
    model, x = build("vit_tiny_patch16_224", 64)
    model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0][:, :8],))
    with pytest.raises(UsageError, match="no map for a batch"):
        Taps(model, ["blocks.0"])(x)
