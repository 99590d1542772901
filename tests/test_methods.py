"""The distillation terms: numbers of the published formulas, and the total-loss rule."""

from __future__ import annotations

import itertools
import math
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from kdfast import ops
from kdfast.errors import UsageError
from kdfast.methods import (
    Method,
    Option,
    Outputs,
    Pairing,
    find_method,
    method,
    method_names,
    methods_table,
)
from kdfast.models import (
    DeepHead,
    InputAdapter,
    LinearHead,
    Taps,
    create_model,
    default_stages,
)
from kdfast.training.flags import data_flags, model_flags, run_flags, training_flags
from kdfast.training.objective import Objective, choose_methods, plan_taps
from kdfast.training.options import parse
from kdfast.training.parser import Parser
from kdfast.training.teacher import Teacher
from kdfast.training.transfer_flags import distill_flags

LOG3 = math.log(3)


def term(name, student, teacher, **options):
    """The term of method `name` between two (logits, features) pairs."""
    as_outputs = (
        Outputs(t if t is not None else torch.zeros(1, 2), f) for t, f in (student, teacher)
    )
    return find_method(name)(**options)(*as_outputs, torch.tensor([0]))


def full_parser():
    parser = Parser()
    for add in (data_flags, distill_flags, training_flags, run_flags):
        add(parser)
    model_flags(parser, student=True)
    return parser


def options_of(*flags):
    return parse(full_parser(), list(map(str, flags)))


def choice_of(*flags):
    return choose_methods(options_of(*flags))


# Acceptance checks 1 to 5 of the distillation losses.


def test_soft_targets_by_hand():
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[4 * LOG3, 0.0]], dtype=torch.float64)
    loss = term("kd", (student, ()), (teacher, ()), temperature=4)
    loss.backward()
    assert loss.item() == pytest.approx(2.092993, abs=1e-6)
    assert torch.allclose(student.grad, torch.tensor([[-1.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("shift", [0.0, 7.5])
def test_soft_targets_ignore_a_shift(shift):
    logits = torch.randn(5, 9, dtype=torch.float64)
    assert term("kd", (logits, ()), (logits + shift, ())).item() == pytest.approx(0, abs=1e-12)


def test_kd_mix_by_hand():
    """0.9 CE + 0.1 soft targets at T 5, through flags and the objective."""
    choice = choice_of("--method", "kd", "--alpha", 0.1, "--temperature", 5)
    total, terms, _ = objective_on(choice, torch.zeros(1, 2))(
        torch.zeros(1, 3, 1, 1), torch.tensor([0]), torch.tensor([[5 * LOG3, 0.0]])
    )
    assert total.item() == pytest.approx(0.950863, abs=1e-6)
    assert terms.tolist() == pytest.approx([0.693147, 25 * 0.130812], abs=1e-5)


def test_logits_by_hand():
    pair = (torch.tensor([[1.0, 2.0]]), ()), (torch.tensor([[0.0, 4.0]]), ())
    assert term("logits", *pair).item() == 2.5


def test_logits_on_features():
    pair = [(None, (torch.tensor([[1.0, 2.0, 3.0]]),)), (None, (torch.tensor([[0.0, 4.0, 3.0]]),))]
    assert term("logits", *pair, compare="feature").item() == pytest.approx(5 / 3)
    with pytest.raises(UsageError, match=r"equal widths.*--logits-compare logits"):
        find_method("logits")(compare="feature").setup(
            Pairing(("fc:in",), ("fc:in",), (torch.Size([2, 3]),), (torch.Size([2, 4]),), 2)
        )


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([[[1.0, 0.0]]], [[[0.0, 1.0]]], 1.0),
        ([[[1.0, 2.0]], [[1.0, 0.0]]], [[[2.0, 1.0]], [[0.0, 1.0]]], 0.2),
        ([[[3.0, 4.0]]], [[[3.0, 4.0]]], 0.0),
    ],
)
def test_attention_by_hand(student, teacher, expected):
    pair = ((None, (torch.tensor([maps]),)) for maps in (student, teacher))
    assert term("at", *pair).item() == pytest.approx(expected, abs=1e-6)


def test_attention_sums_over_stages():
    one = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    assert term("at", (None, (one[0],) * 3), (None, (one[1],) * 3)).item() == pytest.approx(3.0)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_fsp_of_constant_maps(pool):
    a, b = torch.full((2, 3, 8, 8), 1.5), torch.full((2, 5, 4, 4), -2.0)
    assert torch.allclose(ops.fsp_matrix(a, b, pool), torch.full((2, 3, 5), -3.0))
    loss = term("fsp", (None, (a, b)), (None, (2 * a, b)), pool=pool)
    assert loss.item() == pytest.approx((-3.0 + 6.0) ** 2)


def test_fsp_by_hand():
    first = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    second, other = (torch.tensor([3.0, x]).view(1, 2, 1, 1) for x in (4.0, 5.0))
    assert ops.fsp_matrix(first, second)[0].tolist() == [[3, 4], [6, 8]]
    assert term("fsp", (None, (first, second)), (None, (first, other))).item() == pytest.approx(
        1.25
    )
    ramp, ones = torch.arange(16.0).view(1, 1, 4, 4), torch.ones(1, 1, 2, 2)
    assert ops.fsp_matrix(ramp, ones, "avg").item() == 7.5
    assert ops.fsp_matrix(ramp, ones, "max").item() == 10.0


def test_fsp_against_the_broadcast_form():
    first, second = torch.randn(3, 4, 10, 6).double(), torch.randn(3, 7, 5, 3).double()
    pooled = F.adaptive_avg_pool2d(first, (5, 3))
    broadcast = (pooled[:, :, None] * second[:, None]).mean((-2, -1))
    assert torch.allclose(ops.fsp_matrix(first, second), broadcast, atol=1e-12)


def test_fsp_refuses_unequal_channels():
    pairing = Pairing(
        ("a", "b"),
        ("c", "d"),
        (torch.Size([2, 16, 8, 8]),) * 2,
        (torch.Size([2, 32, 8, 8]),) * 2,
        10,
    )
    with pytest.raises(UsageError, match=r"equal channels.*student layer a has 16.*use method at"):
        find_method("fsp")().setup(pairing)


# The total-loss rule.


class Fixed(torch.nn.Module):
    """A student whose logits are a parameter and whose features are given."""

    def __init__(self, logits, features=()):
        super().__init__()
        self.logits, self.features = torch.nn.Parameter(logits), features

    def forward(self, images):
        return self.logits, self.features


def objective_on(choice, logits, features=(), **kwargs):
    methods = [find_method(name)(**chosen) for name, chosen in choice.methods.items()]
    everything = list(range(len(features)))
    views = {m.name: (everything if m.taps() != "none" else [],) * 2 for m in methods}
    return Objective(
        Fixed(logits, features), methods, choice.weights, choice.gamma, views, **kwargs
    )


@pytest.mark.parametrize(
    ("flags", "gamma", "weights"),
    [
        (["--method", "kd"], 0.1, {"kd": 0.9}),
        (["--method", "kd", "--alpha", 0.3], 0.7, {"kd": 0.3}),
        (["--method", "at"], 1.0, {"at": 1000}),
        (["--method", "kd", "at", "--gamma", 0.5, "--beta", 7], 0.5, {"kd": 1.0, "at": 7}),
        (["--method", "at", "logits", "--beta", "at=2", "logits=3"], 1.0, {"at": 2, "logits": 3}),
        (["--method", "none"], 1.0, {}),
        (["--method", "base"], 1.0, {}),
        (["--method", "at_st"], 1.0, {"at": 1000, "kd": 1.0}),
        (["--recipe", "self", "--method", "st"], 1.0, {"kd": 1.0}),
        (["--recipe", "self", "--method", "logit"], 1.0, {"logits": 1.0}),
        (["--recipe", "self", "--method", "at"], 1.0, {"at": 1000}),
        (["--recipe", "self", "--method", "at", "st"], 1.0, {"at": 1000, "kd": 0.9}),
        (["--recipe", "self", "--method", "fsp"], 1.0, {"fsp": 1 / 9}),
        (["--recipe", "self-as-published", "--method", "fsp"], 1.0, {"fsp": 1 / 9}),
        (["--recipe", "self", "--method", "kd", "logits"], 1.0, {"kd": 1.0, "logits": 1.0}),
        (["--recipe", "zoo", "--method", "kd", "at"], 1.0, {"kd": 0.1, "at": 1000 / 3}),
        (["--recipe", "zoo", "--method", "kd"], 1.0, {"kd": 0.1}),
        (["--recipe", "zoo", "--method", "at"], 1.0, {"at": 1000 / 3}),
        (["--recipe", "zoo", "--method", "logits"], 1.0, {"logits": 0.1}),
        (["--recipe", "digits", "--method", "kd", "at"], 0.1, {"kd": 0.9, "at": 50}),
        (["--recipe", "crd", "--method", "fitnet"], 1.0, {"fitnet": 100}),
        (["--recipe", "crd", "--method", "crd"], 1.0, {"crd": 0.8}),
        (["--recipe", "crd", "--method", "crd", "kd"], 1.0, {"crd": 0.8, "kd": 1}),
        (["--recipe", "crd", "--method", "fsp"], 1.0, {"fsp": 1}),
        (["--recipe", "zoo", "--method", "fsp"], 1.0, {"fsp": 1 / 3}),
        (["--recipe", "zoo", "--method", "fitnet"], 1.0, {"fitnet": 0.1}),
        (["--recipe", "zoo", "--method", "crd", "--dataset", "cifar100"], 1.0, {"crd": 0.8}),
        (["--recipe", "zoo", "--method", "crd", "--dataset", "cifar10"], 1.0, {"crd": 0.2}),
    ],
)
def test_weights(flags, gamma, weights):
    recipe = () if "--recipe" in flags else ("--recipe", "crd")
    choice = choice_of(*flags, *recipe)
    assert choice.gamma == pytest.approx(gamma)
    assert choice.weights == pytest.approx(weights)


def test_published_options_of_the_presets():
    """Hyper-parameters beside the weights."""
    fsp = choice_of("--recipe", "crd", "--method", "fsp")
    assert (fsp.init["epochs"], fsp.init["lr"], fsp.init["decay-milestones"]) == (30, 0.05, [])
    fsp = choice_of("--recipe", "zoo", "--method", "fsp")
    assert (fsp.init["epochs"], fsp.init["lr"]) == (50, 0.01)
    assert fsp.init["decay-milestones"] == [30, 40], "0.01 x30, 1e-3 x10, 1e-4 x10"
    assert not choice_of("--recipe", "self", "--method", "fsp").staged
    fitnet = choice_of("--recipe", "zoo", "--method", "fitnet").methods["fitnet"]
    assert fitnet == {"stage": -1, "regressor": "off"}
    assert choice_of("--recipe", "crd", "--method", "fitnet").methods["fitnet"] == {"stage": 2}
    taus = [choice_of("--recipe", name, "--method", "crd").methods["crd"]["temperature"]
            for name in ("crd", "zoo")]  # fmt: skip
    assert taus == [0.07, 0.1]
    crd = options_of("--recipe", "crd", "--dataset", "cifar100", "--model", "MobileNetV2")
    assert (crd.lr, crd.mean, crd.std) == (0.01, [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])
    assert options_of("--recipe", "crd", "--model", "resnet8x4").lr == 0.05


def test_preset_self_reproduces_its_combination_rules():
    """CE + 1 MSE(pooled); CE + T^2 KL; CE + 1000 AT + 0.9 ST; CE + (1/9) FSP, numerically."""
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(4, 10), torch.randn(4, 10)
    labels = torch.tensor([1, 2, 3, 4])
    images = torch.zeros(4, 3, 1, 1)
    ce = F.cross_entropy(logits, labels)
    log_p, log_q = (F.log_softmax(z / 4, 1) for z in (teacher_logits, logits))
    soft = 16 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
    maps = [[torch.randn(4, 6, 5, 5).relu() for _ in range(4)] for _ in range(2)]
    pooled = [torch.randn(4, 64) for _ in range(2)]

    def attention(f):
        return F.normalize(f.square().mean(1).flatten(1))

    def gram(a, b):
        return torch.einsum("bixy,bjxy->bij", a, b) / 25

    at = sum((attention(s) - attention(t)).square().mean() for s, t in zip(*maps, strict=True))
    pairs = [[gram(a, b) for a, b in itertools.pairwise(m)] for m in maps]
    fsp = sum((s - t).square().mean() for s, t in zip(*pairs, strict=True))
    expected = {
        ("logits",): (ce + (pooled[0] - pooled[1]).square().mean(), [[p] for p in pooled]),
        ("kd",): (ce + soft, [[], []]),
        ("at",): (ce + 1000 * at, maps),
        ("at", "kd"): (ce + 1000 * at + 0.9 * soft, maps),
        ("fsp",): (ce + fsp / 9, maps),
    }
    for names, (total, features) in expected.items():
        choice = choice_of("--recipe", "self", "--method", *names)
        objective = objective_on(choice, logits, tuple(features[0]))
        got, terms, _ = objective(images, labels, teacher_logits, tuple(features[1]))
        assert got.item() == pytest.approx(total.item(), rel=1e-5), names
        assert terms[0].item() == pytest.approx(ce.item(), rel=1e-6), "cross-entropy counts once"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "kdd"], "unknown method 'kdd'; did you mean kd"),
        (["--method", "kd", "--beta", "3"], "no method with a beta"),
        (["--method", "at", "--alpha", "3"], "--alpha is of kd, dih, mhkd; none of them is used"),
        (
            ["--method", "at", "fsp", "--beta", "3", "--recipe", "self"],
            "does not say of which method",
        ),
        (["--method", "at", "--beta", "fsp=3"], "fsp is not used"),
        (["--method", "tofd", "mhkd"], "different gammas .tofd 1, mhkd 0.; give --gamma"),
        (["--method", "at", "--beta", "at=x"], "at=x must be a number, got 'x'"),
        (["--method", "kd", "--alpha", "1.5"], "makes gamma negative; give --gamma"),
        (["--method", "kd", "--temperature", "0"], "temperature must be above 0"),
        (["--method", "at", "--temperature", "3"], r"method .*\bkd\b.* is not used"),
    ],
)
def test_method_errors(flags, message):
    with pytest.raises(UsageError, match=message):
        choice = choice_of(*flags)
        [find_method(name)(**chosen) for name, chosen in choice.methods.items()]


# Every registered method, a user's too.


def heads_of(teacher, kind, images):
    """Untrained auxiliary classifiers of `kind` on the teacher's stages, and those layers."""
    layers = default_stages(teacher)
    shapes = [shape[1:] for shape in Taps(teacher, layers).calibrate(images)]
    if kind == "linear":
        return [LinearHead(shape, 10) for shape in shapes], layers
    widths = [shape[0] for shape in shapes]
    return [DeepHead(widths[i:], 10) for i in range(len(widths) - 1)], layers[:-1]


@pytest.mark.parametrize("name", method_names())
def test_every_method_runs_on_a_real_pair(name):
    """Finite term, gradient to the student and to all that the method trains, none elsewhere."""
    torch.manual_seed(0)
    student, net = create_model("cifar_resnet8", 10), create_model("cifar_resnet20", 10)
    instance = find_method(name)()
    images, labels, indices = torch.randn(4, 3, 32, 32), torch.arange(4), torch.arange(4)
    heads, mounted = heads_of(net, instance.heads, images) if instance.heads else ([], [])
    plan = plan_taps([instance], student, net, head_layers=mounted)
    watched = Taps(student, plan.student_layers)
    same = InputAdapter((0,) * 3, (1,) * 3, (0,) * 3, (1,) * 3)
    teacher = Teacher(
        net, plan.teacher_layers, same, heads=heads, head_positions=plan.head_positions
    )
    objective = Objective(watched, [instance], {name: 1.0}, 0.0, plan.views)
    objective.setup(
        plan,
        watched.calibrate(images[:2]),
        teacher.calibrate(images[:2]),
        classes=10,
        head_layers=tuple(mounted),
        head_widths=tuple(head.width for head in heads),
        training_labels=lambda: [i % 10 for i in range(40)],
        epochs=2,
    )
    objective.start_epoch(0)
    total, terms, _ = objective(images, labels, *teacher(images), indices=indices)
    total.backward()
    assert total.dtype == torch.float32 and total.isfinite() and total > 0
    assert terms[1] == total
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert [n for n, p in instance.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = itertools.chain(net.parameters(), *(head.parameters() for head in heads))
    assert all(p.grad is None for p in frozen)
    objective.after_step()


@pytest.mark.parametrize("name", ["at", "fsp", "kd", "logits"])
def test_no_term_where_both_networks_agree(name):
    instance, features = find_method(name)(), tuple(torch.rand(4, 6, 8, 8) for _ in range(3))
    ours = Outputs(torch.randn(4, 10), features)
    assert instance(ours, ours, torch.arange(4)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_and_twin_train_alike(layout):
    """The op inside its method: same loss and same gradients of every student weight."""
    if ops.active() != "fused":
        pytest.skip("the compiled extension is not built or not chosen")
    found = []
    for path in ("fused", "reference"):
        torch.manual_seed(0)
        student, teacher = create_model("cifar_resnet8", 10), create_model("cifar_resnet14", 10)
        student, teacher = (net.to(memory_format=layout) for net in (student, teacher.eval()))
        instance = find_method("at")()
        plan = plan_taps([instance], student, teacher)
        objective = Objective(
            Taps(student, plan.student_layers), [instance], {"at": 100.0}, 1.0, plan.views
        )
        images = torch.randn(5, 3, 32, 32).contiguous(memory_format=layout)
        with torch.no_grad():
            answer = Taps(teacher, plan.teacher_layers)(images)
        with ops.use(path):
            total, terms, _ = objective(images, torch.arange(5), *answer)
            total.backward()
        found.append([terms[1], *(p.grad for p in student.parameters())])
    for fused, twin in zip(*found, strict=True):
        assert torch.allclose(fused, twin, rtol=1e-4, atol=1e-6)


def test_registry_rejects_what_cannot_work():
    with pytest.raises(TypeError, match="docstring"):
        method("bare")(type("Bare", (Method,), {}))
    with pytest.raises(TypeError, match="subclass"):
        method("plain")(dict)
    with pytest.raises(UsageError, match="two methods are called 'kd'"):
        method("kd")(type("Other", (Method,), {"__doc__": "Other."}))
    with pytest.raises(
        UsageError, match=r"unknown value of logits compare 'logit'; did you mean feature, logits"
    ):
        find_method("logits")(compare="logit")
    with pytest.raises(UsageError, match="unknown option of method kd 'temp'"):
        find_method("kd")(temp=3)


def test_documented_table_is_current():
    documented = (Path(__file__).parent.parent / "docs/methods.md").read_text()
    assert methods_table() in documented, "python docs/methods.py writes it anew"


def test_option_defaults_are_class_attributes_read_on_instances():
    assert isinstance(find_method("at").power, Option)
    assert find_method("at")().power == 2.0
    assert textwrap.dedent(find_method("at").__doc__).startswith("Attention transfer")
