"""Weights that other programs saved, under their own names: matched by order, or refused."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from kdfast.errors import UserError
from kdfast.models import checksum, create_model, load_weights

CLASSIFIER, DISTILL = "train/classifier.py", "train/distill.py"


# --- networks of another program, registered as the CRD benchmark registers them -----------------


def conv(in_chs, chs, kernel=3, stride=1, bias=False):
    return nn.Conv2d(in_chs, chs, kernel, stride, kernel // 2, bias=bias)


class Residual(nn.Module):
    """A ResNet block: conv, norm, conv, norm, then the projection."""

    def __init__(self, in_chs, chs, stride):
        super().__init__()
        self.first, self.first_norm = conv(in_chs, chs, stride=stride), nn.BatchNorm2d(chs)
        self.second, self.second_norm = conv(chs, chs), nn.BatchNorm2d(chs)
        self.projects = stride != 1 or in_chs != chs
        if self.projects:
            self.project = nn.Sequential(conv(in_chs, chs, 1, stride), nn.BatchNorm2d(chs))

    def forward(self, x):
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return F.relu(y + (self.project(x) if self.projects else x))


class Wide(nn.Module):
    """A WRN block: norm, conv, norm, conv, then the shortcut of the activated input."""

    def __init__(self, in_chs, chs, stride):
        super().__init__()
        self.norm_a, self.conv_a = nn.BatchNorm2d(in_chs), conv(in_chs, chs, stride=stride)
        self.norm_b, self.conv_b = nn.BatchNorm2d(chs), conv(chs, chs)
        self.skip = conv(in_chs, chs, 1, stride) if in_chs != chs else None

    def forward(self, x):
        y = F.relu(self.norm_a(x))
        shortcut = x if self.skip is None else self.skip(y)
        return self.conv_b(F.relu(self.norm_b(self.conv_a(y)))) + shortcut


class Biased(nn.Module):
    """A WRN block of the intermediate-classifier study, dropout aside."""

    def __init__(self, in_chs, chs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_chs), conv(in_chs, chs, bias=True)
        self.bn2, self.conv2 = nn.BatchNorm2d(chs), conv(chs, chs, stride=stride, bias=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_chs != chs:
            self.shortcut = nn.Sequential(conv(in_chs, chs, 1, stride, bias=True))

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + self.shortcut(x)


def stages(block, widths, depth):
    layers = []
    for i, (in_chs, chs) in enumerate(pairwise(widths)):
        for j in range(depth):
            layers.append(block(chs if j else in_chs, chs, 2 if i and not j else 1))
    return nn.Sequential(*layers)


class ForeignResNet(nn.Module):
    def __init__(self, widths, depth, classes):
        super().__init__()
        self.stem, self.norm = conv(3, widths[0]), nn.BatchNorm2d(widths[0])
        self.trunk = stages(Residual, widths, depth)
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = self.trunk(F.relu(self.norm(self.stem(x))))
        return self.out(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ForeignWide(nn.Module):
    """`conv1` and `bn1` are names of ours as well, the others are not."""

    def __init__(self, block, width, depth, classes):
        super().__init__()
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = conv(3, 16, bias=block is Biased)
        self.trunk = stages(block, widths, depth)
        self.bn1, self.out = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.trunk(self.conv1(x))))
        return self.out(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ForeignVGG(nn.Module):
    """`plan`: widths of convs, "M" for a pool."""

    def __init__(self, plan, classes):
        super().__init__()
        layers, chs = [], 3
        for entry in plan:
            if entry == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [conv(chs, entry, bias=True), nn.BatchNorm2d(entry), nn.ReLU()]
                chs = entry
        self.features, self.out = nn.Sequential(*layers), nn.Linear(chs, classes)

    def forward(self, x):
        return self.out(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class Plain(nn.Module):
    """Convs with their norms one after another: `layers` are (in, out, kernel, stride, groups)."""

    def __init__(self, *layers):
        super().__init__()
        self.pairs = nn.ModuleList()
        for in_chs, chs, kernel, stride, groups in layers:
            layer = nn.Conv2d(in_chs, chs, kernel, stride, kernel // 2, groups=groups, bias=False)
            self.pairs.append(nn.Sequential(layer, nn.BatchNorm2d(chs)))


def interleave(x, groups):
    """Channel (group, member) goes to (member, group)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class Narrowing(Plain):
    """The bottleneck of a ResNet-50."""

    def __init__(self, in_chs, chs, stride):
        mid = chs // 4
        layers = [(in_chs, mid, 1, 1, 1), (mid, mid, 3, stride, 1), (mid, chs, 1, 1, 1)]
        super().__init__(*layers, *([(in_chs, chs, 1, stride, 1)] if in_chs != chs else []))

    def forward(self, x):
        first, second, third, *projection = self.pairs
        y = third(F.relu(second(F.relu(first(x)))))
        return F.relu(y + (projection[0](x) if projection else x))


class Inverted(Plain):
    """The block of MobileNetV2."""

    def __init__(self, in_chs, chs, stride, expansion):
        mid = expansion * in_chs
        super().__init__((in_chs, mid, 1, 1, 1), (mid, mid, 3, stride, mid), (mid, chs, 1, 1, 1))

    def forward(self, x):
        first, second, third = self.pairs
        y = third(F.relu(second(F.relu(first(x)))))
        return x + y if x.shape == y.shape else y


class Grouped(Plain):
    """The unit of ShuffleNet V1."""

    def __init__(self, in_chs, chs, stride):
        own = chs - in_chs if stride == 2 else chs
        mid, self.groups = own // 4, 1 if in_chs == 24 else 3
        super().__init__(
            (in_chs, mid, 1, 1, self.groups), (mid, mid, 3, stride, mid), (mid, own, 1, 1, 3)
        )

    def forward(self, x):
        first, second, third = self.pairs
        y = third(F.relu(second(interleave(F.relu(first(x)), self.groups))))
        if y.shape == x.shape:
            return F.relu(y + x)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


class Halves(Plain):
    """The units of ShuffleNet V2."""

    def __init__(self, in_chs, chs, stride):
        half = chs // 2
        deep = in_chs if stride == 2 else half
        branch = [(deep, half, 1, 1, 1), (half, half, 3, stride, half), (half, half, 1, 1, 1)]
        shallow = [(in_chs, in_chs, 3, 2, in_chs), (in_chs, half, 1, 1, 1)]
        super().__init__(*(shallow if stride == 2 else []), *branch)

    def forward(self, x):
        *shallow, first, second, third = self.pairs
        left, right = (x, x) if shallow else (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :])
        if shallow:
            left = F.relu(shallow[1](shallow[0](left)))
        right = F.relu(third(second(F.relu(first(right)))))
        return interleave(torch.cat([left, right], 1), 2)


class ForeignNet(nn.Module):
    """Stem, units, perhaps one more conv, linear; `stem` and `last` are those of `Plain`."""

    def __init__(self, stem, units, last, features):
        super().__init__()
        self.stem, self.units = Plain(stem), nn.Sequential(*units)
        self.last = Plain(last) if last else None
        self.out = nn.Linear(features, 10)

    def forward(self, x):
        x = self.units(F.relu(self.stem.pairs[0](x)))
        if self.last is not None:
            x = F.relu(self.last.pairs[0](x))
        return self.out(F.adaptive_avg_pool2d(x, 1).flatten(1))


def units(unit, widths, depths, strides, *more):
    """A unit with the stride for each stage, then those of stride 1."""
    rows = zip(pairwise(widths), depths, strides, *more, strict=True)
    return [
        unit(chs if j else in_chs, chs, 1 if j else stride, *rest)
        for (in_chs, chs), depth, stride, *rest in rows
        for j in range(depth)
    ]


def foreign_resnet50():
    stages = units(Narrowing, (64, 256, 512, 1024, 2048), (3, 4, 6, 3), (1, 2, 2, 2))
    return ForeignNet((3, 64, 3, 1, 1), stages, None, 2048)


def foreign_mobilenet():
    widths, depths = (16, 8, 12, 16, 32, 48, 80, 160), (1, 2, 3, 4, 3, 3, 1)
    stages = units(Inverted, widths, depths, (1, 1, 2, 2, 1, 2, 1), (1, 6, 6, 6, 6, 6, 6))
    return ForeignNet((3, 16, 3, 2, 1), stages, (160, 1280, 1, 1, 1), 1280)


def foreign_shufflenet1():
    stages = units(Grouped, (24, 240, 480, 960), (4, 8, 4), (2, 2, 2))
    return ForeignNet((3, 24, 1, 1, 1), stages, None, 960)


def foreign_shufflenet2():
    stages = units(Halves, (24, 116, 232, 464), (4, 8, 4), (2, 2, 2))
    return ForeignNet((3, 24, 1, 1, 1), stages, (464, 1024, 1, 1, 1), 1024)


def randomise(network, side):
    """Scales of a trained network, statistics of some images: no two layers may be exchanged."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(4, 3, side, side, generator=generator))
    return network.eval()


VGG8 = [64, "M", 128, "M", 256, "M", 512, 512]
VGG11 = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]
FOREIGN = {
    "resnet": ("cifar_resnet20", {}, lambda: ForeignResNet((16, 16, 32, 64), 3, 10)),
    "resnet8x4": ("cifar_resnet8x4", {}, lambda: ForeignResNet((32, 64, 128, 256), 1, 10)),
    "resnet18": ("cifar_resnet18", {}, lambda: ForeignResNet((64, 64, 128, 256, 512), 2, 10)),
    "resnet50": ("cifar_resnet50", {}, foreign_resnet50),
    "mobilenet": ("cifar_mobilenetv2_half", {}, foreign_mobilenet),
    "shufflenet 1": ("cifar_shufflenetv1", {}, foreign_shufflenet1),
    "shufflenet 2": ("cifar_shufflenetv2", {}, foreign_shufflenet2),
    "wrn": ("cifar_wrn16_2", {}, lambda: ForeignWide(Wide, 2, 2, 10)),
    "wrn narrow": ("cifar_wrn16_1", {}, lambda: ForeignWide(Wide, 1, 2, 10)),
    "wrn dih": ("cifar_wrn28_2", {"form": "dih"}, lambda: ForeignWide(Biased, 2, 4, 10)),
    "vgg": ("cifar_vgg8", {}, lambda: ForeignVGG(VGG8, 10)),
    "vgg dih": ("cifar_vgg11", {"form": "dih"}, lambda: ForeignVGG(VGG11, 10)),
}


@pytest.mark.parametrize("family", FOREIGN)
def test_foreign_names_load_by_order(family, tmp_path):
    torch.manual_seed(0)
    name, kwargs, build = FOREIGN[family]
    side = 32 if "vgg" in family else 16
    network = randomise(build(), side)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"epoch": 240, "model": state, "best_acc": torch.tensor(75.6)}, tmp_path / "a.pth")
    model = create_model(name, 10, **kwargs)
    assert load_weights(model, tmp_path / "a.pth") == {"matched_by_order": True}
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        logits = network(x)
        assert torch.equal(model.eval()(x), logits)
    assert (logits[0] - logits[1]).abs().max() > 0.01


# Names of the CRD benchmark's own files, first to last: those of these families are ours.
PUBLISHED_NAMES = {
    "cifar_resnet8": """conv1.weight bn1.weight bn1.bias bn1.running_mean bn1.running_var
        bn1.num_batches_tracked layer1.0.conv1.weight layer1.0.bn1.weight layer1.0.conv2.weight
        layer2.0.bn2.weight layer2.0.downsample.0.weight layer2.0.downsample.1.running_var
        layer3.0.conv1.weight fc.weight fc.bias""",
    "cifar_wrn16_2": """conv1.weight block1.layer.0.bn1.weight block1.layer.0.conv1.weight
        block1.layer.0.bn2.weight block1.layer.0.conv2.weight block1.layer.0.convShortcut.weight
        block1.layer.1.bn1.weight block2.layer.0.bn1.weight block3.layer.1.conv2.weight bn1.weight
        fc.weight fc.bias""",
    "cifar_vgg13": """block0.0.weight block0.0.bias block0.1.weight block0.3.weight
        block0.4.running_mean block1.0.weight block4.4.weight classifier.weight classifier.bias""",
    "cifar_resnet50": """conv1.weight bn1.weight layer1.0.conv1.weight layer1.0.bn1.weight
        layer1.0.conv2.weight layer1.0.conv3.weight layer1.0.bn3.weight layer1.0.shortcut.0.weight
        layer1.0.shortcut.1.weight layer1.1.conv1.weight layer4.2.bn3.weight linear.weight
        linear.bias""",
    "cifar_mobilenetv2_half": """conv1.0.weight conv1.1.weight blocks.0.0.conv.0.weight
        blocks.0.0.conv.1.weight blocks.0.0.conv.3.weight blocks.0.0.conv.6.weight
        blocks.0.0.conv.7.bias blocks.1.1.conv.0.weight blocks.6.0.conv.7.weight conv2.0.weight
        conv2.1.weight""",
    "cifar_shufflenetv1": """conv1.weight bn1.weight layer1.0.conv1.weight layer1.0.bn1.weight
        layer1.0.conv2.weight layer1.0.conv3.weight layer1.0.bn3.weight layer1.3.bn3.weight
        layer2.7.conv1.weight layer3.3.bn3.weight linear.weight linear.bias""",
    "cifar_shufflenetv2": """conv1.weight bn1.weight layer1.0.conv1.weight layer1.0.conv2.weight
        layer1.0.conv3.weight layer1.0.conv4.weight layer1.0.conv5.weight layer1.0.bn5.weight
        layer1.1.conv1.weight layer1.3.bn3.weight layer2.7.conv3.weight layer3.3.bn3.weight
        conv2.weight bn2.weight linear.weight linear.bias""",
}


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_published_names_are_ours_and_in_their_order(name):
    own = list(create_model(name, 100).state_dict())
    places = [own.index(entry) for entry in PUBLISHED_NAMES[name].split()]
    assert places == sorted(places)
    assert places[0] == 0
    if name != "cifar_mobilenetv2_half":  # its linear layer is called classifier.0 there
        assert places[-1] == len(own) - 1


def test_one_foreign_name_is_enough(tmp_path):
    model = create_model("cifar_mobilenetv2_half", 10)
    state = {k.replace("classifier", "classifier.0"): v for k, v in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    other = create_model("cifar_mobilenetv2_half", 10)
    assert load_weights(other, tmp_path / "a.pth") == {"matched_by_order": True}
    assert checksum(other.state_dict()) == checksum(model.state_dict())


def test_names_that_fit_need_no_order(tmp_path):
    model = create_model("cifar_wrn16_1", 10)
    torch.save({"model": dict(reversed(model.state_dict().items()))}, tmp_path / "a.pth")
    other = create_model("cifar_wrn16_1", 10)
    assert load_weights(other, tmp_path / "a.pth") == {}
    assert checksum(other.state_dict()) == checksum(model.state_dict())


# --- refusals ------------------------------------------------------------------------------------


def foreign_state(depth=1, classes=10):
    return dict(ForeignResNet((16, 16, 32, 64), depth, classes).state_dict())


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def exchanged(state, first, second):
    """The two entries in each other's place."""
    names = [{first: second, second: first}.get(name, name) for name in state]
    return {name: state[name] for name in names}


REFUSED = {
    "unknown entry": (
        lambda: foreign_state() | {"mean": torch.zeros(3)},
        "1 entry of the file is left over (mean [3])",
    ),
    "unknown entry in front": (
        lambda: {"mean": torch.zeros(3)} | foreign_state(),
        "1 entry of the file is left over (mean [3])",
    ),
    "missing entry": (
        lambda: without(foreign_state(), "trunk.1.second.weight"),
        "1 of the model (layer2.0.conv2.weight [32, 32, 3, 3])",
    ),
    "old statistics": (
        lambda: {k: v for k, v in foreign_state().items() if "tracked" not in k},
        "9 of the model (first bn1.num_batches_tracked [])",
    ),
    "other classes": (lambda: foreign_state(classes=7), "the checkpoint has 7 classes, the model"),
    "another depth": (
        lambda: foreign_state(depth=2),
        "36 entries of the file are left over (first trunk.1.first.weight [16, 16, 3, 3])",
    ),
    "exchanged": (
        lambda: exchanged(
            foreign_state(), "trunk.0.first_norm.weight", "trunk.0.first_norm.running_var"
        ),
        "left over (first trunk.0.first_norm.",
    ),
    "integers": (
        lambda: {
            k: v.long() if k == "stem.weight" else v for k, v in foreign_state().items()
        },
        "(stem.weight [16, 3, 3, 3])",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_what_does_not_fit_by_order(tmp_path, row):
    state, words = REFUSED[row]
    torch.save({"model": state()}, tmp_path / "a.pth")
    model = create_model("cifar_resnet8", 10)
    before = checksum(model.state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "a.pth")
    assert words in str(caught.value)
    assert f"{tmp_path / 'a.pth'} does not fit cifar_resnet8: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checksum(model.state_dict()) == before


def test_names_must_not_contradict_the_order(tmp_path):
    state = foreign_state(depth=2)
    names = {"trunk.0.first.weight": "layer1.1.conv1.weight"}  # of the right shape, elsewhere
    torch.save({"model": {names.get(k, k): v for k, v in state.items()}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"layer1.1.conv1.weight.* where .*layer1.0.conv1.weight"):
        load_weights(create_model("cifar_resnet14", 10), tmp_path / "a.pth")


def test_safetensors_keep_no_order(tmp_path):
    save_file(foreign_state(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"keeps no order.* give the torch file"):
        load_weights(create_model("cifar_resnet8", 10), tmp_path / "a.safetensors")


def test_only_our_families_are_matched_by_order(tmp_path):
    model = create_model("test_resnet", 10)
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"missing, .*unexpected;"):
        load_weights(model, tmp_path / "a.pth")


def test_numpy_numbers_are_not_unpickled(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": foreign_state(), "best_acc": np.float64(75.6)}, path)
    model = create_model("cifar_resnet8", 10)
    with pytest.raises(UserError, match=r"numpy.*runs no pickled code.*torch\.save") as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value)
    # The advice, followed.
    torch.save(torch.load(path, weights_only=False)["model"], tmp_path / "b.pth")
    assert load_weights(model, tmp_path / "b.pth") == {"matched_by_order": True}


# --- scripts -------------------------------------------------------------------------------------

SMALL = ("--train-limit", 64, "--eval-limit", 64, "--epochs", 1, "--output", "out")
TEACHER = ("--teacher", "cifar_resnet8", "--no-baseline", "--teacher-checkpoint", "a.pth")
START = ("--model", "cifar_resnet8", "--initial-checkpoint", "a.pth")


def test_scripts_say_that_they_matched_by_order(run_script, tmp_path):
    torch.save({"model": foreign_state(), "epoch": 240}, tmp_path / "a.pth")
    student = ("--student", "cifar_resnet8", "--experiment", "d")
    code, out, err = run_script(DISTILL, *TEACHER, *student, *SMALL)
    assert code == 0, err
    assert "a.pth: foreign names, matched with cifar_resnet8 by order" in out
    assert "matched with cifar_resnet8 by order" in (tmp_path / "out/d/train.log").read_text()
    code, out, err = run_script(CLASSIFIER, *START, *SMALL, "--eval-only")
    assert code == 0, err
    assert "a.pth: foreign names, matched with cifar_resnet8 by order" in out


@pytest.mark.parametrize("script, flags", [(DISTILL, TEACHER), (CLASSIFIER, START)])
@pytest.mark.parametrize(
    "row", ["unknown entry", "missing entry", "other classes", "another depth"]
)
def test_scripts_refuse_what_does_not_fit(refused, tmp_path, script, flags, row):
    state, words = REFUSED[row]
    torch.save({"model": state()}, tmp_path / "a.pth")
    refused(1, script, *flags, *SMALL, words=["a.pth", words])
