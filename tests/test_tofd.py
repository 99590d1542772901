"""Task-oriented features: published numbers, exact links and norms, what learns, processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.methods import Outputs, Pairing, find_method
from kdfast.methods.tofd import orthogonality
from kdfast.models import DeepHead, InputAdapter, Taps, create_model, default_stages
from kdfast.training.objective import Objective, plan_taps
from kdfast.training.teacher import Teacher


def task_oriented(ours, theirs=None, *, mounted=None, widths=None, smoothing=0.0, **options):
    """The method set up for student and teacher shapes without the batch, the pooled ones last.

    `mounted` are the positions of the teacher's layers that have heads, by default all stages but
    the last; their features are as wide as the teacher's pooled one.
    """
    method, theirs = find_method("tofd")(**options), theirs or ours
    layers = [f"layer{i + 1}" for i in range(len(ours) - 1)]
    mounted = range(len(ours) - 2) if mounted is None else mounted
    torch.manual_seed(0)
    method.setup(
        Pairing(
            (*layers, "fc:in"),
            (*layers, "fc:in"),
            tuple(torch.Size([2, *shape]) for shape in ours),
            tuple(torch.Size([2, *shape]) for shape in theirs),
            classes=2,
            head_layers=("elsewhere", *(layers[i] for i in mounted)),
            head_widths=(1, *(widths or theirs[-1] * len(mounted))),
            label_smoothing=smoothing,
        )
    )
    return method


RESNET = ((16, 32, 32), (32, 16, 16), (64, 8, 8), (64,))


# Acceptance check 7 of the intermediate heads.


@pytest.mark.parametrize(
    ("weight", "value"),
    [
        (torch.eye(5), 0.0),
        (2 * torch.eye(2), 8.485281),
        (torch.eye(512, 64), 21.166010),
        (torch.eye(64, 512), 21.166010),
        (torch.zeros(3, 2), math.sqrt(3) + math.sqrt(2)),
    ],
)
def test_distance_from_orthogonal(weight, value):
    weight.requires_grad_()
    got = orthogonality(weight)
    assert got.item() == pytest.approx(value, abs=1e-5)
    got.backward()
    assert weight.grad.isfinite().all()
    if value == 0 or weight.shape[0] != weight.shape[1]:
        assert weight.grad.abs().sum() == 0, "a minimum, or a saddle at 0"


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5), (9, 8)])
def test_either_gram_gives_the_distance(shape):
    """The value and gradient of both residuals, of which one is formed; and the identity."""
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows, columns = w @ w.T - torch.eye(shape[0]), w.T @ w - torch.eye(shape[1])
    wanted = rows.norm() + columns.norm()
    got = orthogonality(w)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    identity = (w.T @ w).square().sum() - 2 * w.square().sum() + shape[0]
    assert rows.square().sum().item() == pytest.approx(identity.item(), rel=1e-12)
    (mine,), (formula,) = torch.autograd.grad(got, w), torch.autograd.grad(wanted, w)
    assert torch.allclose(mine, formula, rtol=1e-10, atol=1e-12)
    closed = 2 * rows @ w / rows.norm() + 2 * w @ columns / columns.norm()
    assert torch.allclose(mine, closed, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(orthogonality, w)


def test_distance_near_orthogonal_is_not_cancelled():
    """In float32, where the expanded identity has nothing left."""
    w = torch.eye(64) + 1e-5 * torch.randn(64, 64)
    exact = 2 * (w.double() @ w.double().T - torch.eye(64)).norm()
    assert orthogonality(w).item() == pytest.approx(exact.item(), rel=0.02)


# Acceptance check 8.


class Says(nn.Module):
    """A head, or a network without tapped layers, of given feature and logits."""

    def __init__(self, feature, logits):
        super().__init__()
        self.feature, self.logits = nn.Parameter(feature), nn.Parameter(logits)
        self.width = feature.shape[1]

    def forward(self, x):
        return self.feature, self.logits


@pytest.mark.parametrize(("scale", "bound"), [(1.0, 0.0), (2.0, 0.254558)])
def test_terms_by_hand(scale, bound):
    """Through an objective: a norm of 2, CE and H of one classifier, links of scale * I."""
    method = task_oriented(((2, 4, 4), (2,)), mounted=[])
    assert (method.gamma, method.heads, method.default_weight) == (1.0, "deep", 1.0)
    assert (method.feature, method.orthogonal, method.growth) == (0.05, 0.03, 3.0)
    (link,) = method.links
    link.weight.data = scale * torch.eye(2)
    student = nn.Module()
    student.forward = lambda x: (torch.zeros(2, 2), (torch.zeros(2, 2, 4, 4), torch.ones(2, 2)))
    objective = Objective(student, [method], {"tofd": 1.0}, 1.0, {"tofd": ([0, 1], [0, 1])})
    taught = torch.zeros(2, 2, 4, 4), torch.full((2, 2), scale - 1)
    total, terms, _ = objective(
        torch.zeros(2, 3, 1, 1), torch.tensor([0, 1]), torch.zeros(2, 2), taught
    )
    assert total.item() == pytest.approx(1.486294 + bound, abs=1e-5)
    assert terms[0].item() == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradients_by_formula(smoothing):
    """Three classifiers, unequal widths, a teacher whose heads are listed in another order."""
    torch.manual_seed(0)
    d_s, d_t, tau, a, b = (3, 4, 5), (6, 4, 2), 1 + 2.0 / 250 * 8, 0.2, 0.3
    method = find_method("tofd")(feature=a, orthogonal=b, growth=2.0)
    shapes = [torch.Size([2, 4, 8 // 2**i, 8]) for i in range(3)]
    method.setup(
        Pairing(
            ("s1", "s2", "s3", "fc:in"),
            ("t1", "t2", "t3", "fc:in"),
            (*shapes, torch.Size([2, 5])),
            (*shapes, torch.Size([2, 2])),
            classes=7,
            head_layers=("t2", "other", "t1"),
            head_widths=(4, 9, 6),
            label_smoothing=smoothing,
        )
    )
    method.start_epoch(7)
    method.tau = method.tau.double().fill_(tau)
    f_s, f_t = ([torch.randn(4, d).double() for d in widths] for widths in (d_s, d_t))
    z_s, z_t = ([torch.randn(4, 7).double() for _ in range(3)] for _ in range(2))
    links = [torch.randn(t, s).double() for s, t in zip(d_s, d_t, strict=True)]
    labels = torch.tensor([0, 3, 6, 1])

    leaves = [x.clone().requires_grad_() for x in (*f_s, *z_s, *links)]
    features, logits, weights = leaves[:3], leaves[3:6], leaves[6:]
    wanted = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        wanted = wanted + a * (features[i] @ weights[i].T - f_t[i]).norm()
        soft = -((z_t[i] / tau).softmax(1) * (logits[i] / tau).log_softmax(1)).sum(1).mean()
        wanted = wanted + soft
        if i < 2:  # the deepest one's is the objective's
            wanted = wanted + F.cross_entropy(logits[i], labels, label_smoothing=smoothing)
        gram, other = weights[i].T @ weights[i], weights[i] @ weights[i].T
        wanted = wanted + b * (
            (gram - torch.eye(d_s[i])).norm() + (other - torch.eye(d_t[i])).norm()
        )
    wanted.backward()

    method.student_heads = nn.ModuleList(Says(f_s[i], z_s[i]) for i in range(2))
    for link, weight in zip(method.links, links, strict=True):
        link.weight = nn.Parameter(weight)
    last, deepest = f_s[2].clone().requires_grad_(), z_s[2].clone().requires_grad_()
    student = Outputs(deepest, (*(None,) * 3, last))
    heads = (f_t[1], z_t[1]), (torch.zeros(4, 9), torch.zeros(4, 7)), (f_t[0], z_t[0])
    loss = method(student, Outputs(z_t[2], (*(None,) * 3, f_t[2]), heads=heads), labels)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    got = [head.feature for head in method.student_heads] + [last]
    got += [head.logits for head in method.student_heads] + [deepest]
    got += [link.weight for link in method.links]
    for own, leaf in zip(got, leaves, strict=True):
        assert torch.allclose(own.grad, leaf.grad, rtol=1e-9, atol=1e-12)


def test_equal_features_have_a_finite_gradient():
    """The norm at 0, through a link that changes nothing."""
    method = task_oriented(((2, 4, 4), (2,)), mounted=[])
    method.links[0].weight.data = torch.eye(2)
    feature = torch.randn(3, 2, requires_grad=True)
    student = Outputs(torch.zeros(3, 2), (torch.zeros(3, 2, 4, 4), feature))
    method(student, student, torch.tensor([0, 1, 1])).backward()
    assert feature.grad.abs().sum() == 0 and method.links[0].weight.grad.abs().sum() == 0


@pytest.mark.parametrize(("epoch", "tau"), [(0, 1.012), (99, 2.2), (199, 3.4)])
def test_temperature_of_an_epoch(epoch, tau):
    method = find_method("tofd")()
    kept = method.tau
    method.start_epoch(epoch)
    assert method.tau is kept and kept.item() == pytest.approx(tau, abs=1e-6)
    assert "tau" not in method.state_dict()


def test_published_heads():
    """4,992 and 3,840 parameters on a CIFAR ResNet; 268,800, 254,976, 202,752 on ResNet-18."""
    wide = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512,))
    for shapes, counts in ((RESNET, [4_992, 3_840]), (wide, [268_800, 254_976, 202_752])):
        method = task_oriented(shapes)
        assert [
            sum(p.numel() for p in h.convs.parameters()) for h in method.student_heads
        ] == counts
        assert [head.width for head in method.student_heads] == [shapes[-1][0]] * len(counts)
        assert len(method.links) == len(counts) + 1, "one a classifier, also between equal widths"
        assert all(link.bias is None for link in method.links)
        assert f"{counts[0] + 2 * shapes[-1][0] + 2:,}" in method.notes()[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "widths", "links"),
    [
        # a pooled vector wider than the last stage: the heads lead to the stage
        (((24, 8, 8), (96, 4, 4), (160, 2, 2), (1280,)), RESNET, (64, 64), [160, 160, 1280]),
        # tokens of one size, down to a single position
        (((8, 3, 3),) * 6 + ((8,),), None, (8,) * 5, [8] * 6),
        (((8, 1, 1),) * 3 + ((8,),), None, (8, 8), [8] * 3),
    ],
)
def test_other_layouts(ours, theirs, widths, links):
    method = task_oriented(ours, theirs, mounted=range(len(widths)), widths=widths)
    assert [link.in_features for link in method.links] == links
    assert [link.out_features for link in method.links] == [*widths, (theirs or ours)[-1][0]]
    maps = tuple(torch.randn(3, *shape) for shape in ours)
    heads = tuple((torch.randn(3, d), torch.randn(3, 2)) for d in (1, *widths))
    taught = Outputs(
        torch.randn(3, 2), tuple(torch.randn(3, *s) for s in theirs or ours), heads=heads
    )
    loss = method(Outputs(torch.randn(3, 2), maps), taught, torch.tensor([0, 1, 1]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in method.parameters())


def test_named_layers_without_the_last():
    """The heads then lead to the pooled vector."""
    method = task_oriented(((16, 8, 8), (32, 4, 4), (48,)), mounted=[0, 1], widths=(48, 48))
    assert [head.width for head in method.student_heads] == [48, 48]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ("cifar_resnet8", "cifar_resnet14", [("layer1", "layer1"), ("layer2", "layer2")]),
        ("cifar_resnet8", "resnet18", [("layer2", "layer1"), ("layer3", "layer2")]),
        ("resnet18", "cifar_resnet8", [("layer1", "layer2"), ("layer2", "layer3")]),
    ],
)
def test_last_stages_are_partners(student, teacher, pairs):
    """Heads on all stages but the last leave nobody in the last one's place."""
    nets = create_model(student, 10), create_model(teacher, 10)
    layers = default_stages(nets[1])
    plan = plan_taps([find_method("tofd")()], *nets, head_layers=layers[:-1])
    ours, theirs = plan.views["tofd"]
    found = [
        (plan.teacher_layers[j], plan.student_layers[i]) for i, j in zip(ours, theirs, strict=True)
    ]
    assert found == [*pairs, (layers[-1], default_stages(nets[0])[-1]), ("fc:in", "fc:in")]


def test_a_teacher_without_its_heads_is_refused():
    shapes = (torch.Size([2, 8, 4, 4]), torch.Size([2, 8]))
    pairing = (("layer1", "fc:in"), ("layer1", "fc:in"), shapes, shapes, 10)
    with pytest.raises(UsageError, match=r"train/heads.py --kind deep .* --heads"):
        find_method("tofd")().setup(Pairing(*pairing))
    both = (("a", "b", "fc:in"),) * 2 + ((shapes[0], *shapes),) * 2
    with pytest.raises(UsageError, match=r"no head on layer a; choose --teacher-layers among b"):
        find_method("tofd")().setup(Pairing(*both, 10, head_layers=("b",), head_widths=(8,)))


def on_networks(autocast=False):
    """Student, teacher heads and method after one backward pass, and total and terms."""
    torch.manual_seed(0)
    student, net = create_model("cifar_resnet8", 10), create_model("cifar_resnet14", 10)
    method, layers = find_method("tofd")(), default_stages(net)[:-1]
    heads = [DeepHead([16, 32, 64], 10), DeepHead([32, 64], 10)]
    plan = plan_taps([method], student, net, head_layers=layers)
    same = InputAdapter((0,) * 3, (1,) * 3, (0,) * 3, (1,) * 3)
    teacher = Teacher(
        net, plan.teacher_layers, same, heads=heads, head_positions=plan.head_positions
    )
    taps = Taps(student, plan.student_layers)
    objective = Objective(taps, [method], {"tofd": 1.0}, method.gamma, plan.views)
    images = torch.randn(4, 3, 32, 32)
    shapes = taps.calibrate(images[:2]), teacher.calibrate(images[:2])
    objective.setup(plan, *shapes, 10, head_layers=tuple(layers), head_widths=(64, 64))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, terms, _ = objective(images, torch.arange(4), *teacher(images))
    total.backward()
    return student, teacher, method, total.detach(), terms


def test_everything_of_the_student_learns_and_nothing_of_the_teacher():
    student, teacher, method, total, terms = on_networks()
    assert total.item() == pytest.approx(terms.sum().item(), rel=1e-6)
    for module in (student, method):
        silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []
    for head in method.student_heads:
        assert head.fc.weight.grad.any() and all(c[0].weight.grad.any() for c in head.convs)
    frozen = [*teacher.model.parameters(), *(p for h in teacher.heads for p in h.parameters())]
    assert all(p.grad is None for p in frozen)


def test_reduced_precision():
    exact, rough = (on_networks(autocast)[3] for autocast in (False, True))
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, rtol=0.02)


BATCH = ((8, 4, 4), (6, 2, 2), (6,))  # shapes of the student, and of the teacher
ROWS = {5: (slice(0, 3), slice(3, 5)), 1: (slice(0, 1), slice(0, 1))}  # of process 0 and 1


def shared_batch(rows, size):
    """The method, without batch statistics, and its term on some of `size` images."""
    method = task_oriented(BATCH)
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(size)
    ours, theirs = (tuple(torch.randn(size, *s)[rows] for s in BATCH) for _ in range(2))
    z_s, z_t, elsewhere, z_h = (torch.randn(size, 2)[rows] for _ in range(4))
    heads = (elsewhere, z_h), (torch.randn(size, 6)[rows], z_h)
    labels, indices = (torch.arange(size) % 2)[rows], (70_000_001 + torch.arange(size))[rows]
    return method, method(Outputs(z_s, ours, indices), Outputs(z_t, theirs, heads=heads), labels)


def process(rank, folder):
    """One of two: each has some rows; of a single one process 1 repeats it at weight 0."""
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for size, rows in ROWS.items():
        count = {5: (3, 2), 1: (1, 0)}[size][rank]
        method, term = shared_batch(rows[rank], size)
        (term * (2 * count / size)).backward()
        grads = [p.grad for p in method.parameters()]
        for grad in grads:
            distributed.all_reduce(grad)
        torch.save([grad / 2 for grad in grads], f"{folder}/{size}-{rank}.pt")
    distributed.destroy_process_group()


def test_processes_share_their_norms(tmp_path):
    """Two with uneven rows, or one idle, train as one with all rows does."""
    code = "import sys, test_tofd; test_tofd.process(int(sys.argv[1]), sys.argv[2])"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    own = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], env=own)
        for rank in range(2)
    ]
    assert [run.wait(timeout=600) for run in runs] == [0, 0]
    for size in ROWS:
        method, term = shared_batch(slice(None), size)
        term.backward()
        found = torch.load(tmp_path / f"{size}-1.pt", weights_only=True)
        for (name, parameter), grad in zip(method.named_parameters(), found, strict=True):
            assert torch.allclose(parameter.grad, grad, rtol=1e-4, atol=1e-6), (size, name)


def test_a_compiled_step_serves_all_epochs():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    method, _ = shared_batch(slice(None), 5)
    maps = tuple(torch.randn(5, *shape) for shape in BATCH)
    heads = ((torch.randn(5, 6), torch.randn(5, 2)),) * 2
    ours, theirs = Outputs(torch.randn(5, 2), maps), Outputs(torch.randn(5, 2), maps, heads=heads)
    step, labels = torch.compile(method, backend=backend, fullgraph=True), torch.arange(5) % 2
    for epoch in (0, 1, 50):
        method.start_epoch(epoch)
        with torch.no_grad():
            assert step(ours, theirs, labels).item() == method(ours, theirs, labels).item()
    assert len(compiled) == 1
    torch.compiler.reset()


def test_command_line(run_script, tmp_path):
    few = ("--train-limit", 64, "--eval-limit", 64, "--epochs", 1, "--output", ".")
    own = ("--teacher", "cifar_resnet8", "--experiment")
    code, _, err = run_script("train/heads.py", *few, "--kind", "deep", *own, "heads")
    assert code == 0, err
    before = {path.name: path.read_bytes() for path in (tmp_path / "heads").rglob("*.safetensors")}
    code, out, err = run_script(
        "train/distill.py", *few, "--method", "tofd", "--heads", "heads", "--no-baseline",
        "--student", "cifar_resnet14", *own, "run", "--tofd-growth", 5,
    )  # fmt: skip
    assert code == 0, err
    assert "1 * ce + 1 * tofd" in out
    assert "tofd: layer1 -> layer1, layer2 -> layer2, layer3 -> layer3, fc:in -> fc:in" in out
    assert "parameters of student heads 5,642 + 4,490, of links 4,096 + 4,096 + 4,096" in out
    saved = load_file(tmp_path / "run" / "last.safetensors")
    assert saved.keys() == create_model("cifar_resnet14", 10).state_dict().keys()
    after = {path.name: path.read_bytes() for path in (tmp_path / "heads").rglob("*.safetensors")}
    assert after == before and len(before) >= 3, "teacher and heads stay as they are"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tofd-growth -1", ["tofd growth must be 0 or more"]),
        ("--tofd-feature nan", ["tofd feature", "nan"]),
        ("--tofd-orthogonal -0.1", ["tofd orthogonal must be 0 or more"]),
        ("--teacher-checkpoint RUN", ["tofd", "train/heads.py --kind deep", "--heads"]),
    ],
)
def test_what_is_refused(refused, teacher_run, flags, words):
    flags = (teacher_run if flag == "RUN" else flag for flag in flags.split())
    refused(2, "train/distill.py", "--method", "tofd", "--teacher", "cifar_resnet8", *flags,
            "--train-limit", 64, "--eval-limit", 64, "--epochs", 1, words=words)  # fmt: skip
