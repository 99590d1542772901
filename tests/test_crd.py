"""Method crd: checks 7 and 8 of the loss specification, its draws, and a step of training."""

from __future__ import annotations

import copy
import csv
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast.errors import UsageError, UserError
from kdfast.methods import Outputs, Pairing, find_method
from kdfast.models import InputAdapter, Taps
from kdfast.training import checkpoint
from kdfast.training.objective import Objective, plan_taps
from kdfast.training.teacher import Teacher

DISTILL = "train/distill.py"
CLASSES, SIZE = 4, 24
LABELS = [i % CLASSES for i in range(SIZE)]
SMALL = {"dim": 8, "negatives": 7}


def ready(labels=LABELS, classes=CLASSES, widths=(6, 10), seed=0, **options):
    """The method, set up for features of these widths and in its first epoch."""
    torch.manual_seed(0)
    method = find_method("crd")(**options)
    shapes = [(torch.Size([2, width]),) for width in widths]
    labels = list(labels)
    method.setup(
        Pairing(("fc:in",), ("fc:in",), *shapes, classes, training_labels=lambda: labels, seed=seed)
    )
    method.start_epoch(0)
    return method


def networks():
    """A small student and a small teacher of [B, 3, 2, 2] images, penultimate widths 6 and 10."""
    torch.manual_seed(1)
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, CLASSES))
        for width in (6, 10)
    ]


def trained(**options):
    """(objective, teacher, method): all that a training step is made of; only crd counts."""
    student, model = networks()
    method = find_method("crd")(**SMALL | options)
    plan = plan_taps([method], student, model)
    same = InputAdapter((0.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0,) * 3)
    teacher, taps = Teacher(model, plan.teacher_layers, same), Taps(student, plan.student_layers)
    objective = Objective(taps, [method], {"crd": 1.0}, 0.0, plan.views)
    shapes = taps.calibrate(images(2)), teacher.calibrate(images(2))
    objective.setup(plan, *shapes, CLASSES, training_labels=lambda: LABELS, epochs=2)
    objective.start_epoch(0)
    return objective, teacher, method


def images(count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.get_default_dtype()
    return torch.randn(SIZE, 3, 2, 2, generator=generator, dtype=dtype)[:count]


def stepped(objective, teacher, index):
    """Loss of the images `index`; the bank update has yet to come."""
    x = images(SIZE)[index]
    return objective(x, torch.tensor(LABELS)[index], *teacher(x), indices=index)[0]


def state(method):
    return {name: value.clone() for name, value in method.memory.state_dict().items()}


def embedded(method, features):
    """Unit embeddings of (student features, teacher features), by the formula."""
    layers = (method.embed_student, method.embed_teacher)
    raw = [x @ layer.weight.T + layer.bias for x, layer in zip(features, layers, strict=True)]
    return [x / x.square().sum(1, keepdim=True).sqrt() for x in raw]


def by_formula(method, embeddings, banks, negatives, z):
    """Both sides as the specification writes them, from the gathered rows."""
    c, total = method.negatives / len(banks[0]), 0.0
    for anchor, bank, constant in zip(embeddings, reversed(banks), z, strict=True):
        u = (torch.einsum("bjd,bd->bj", bank[negatives], anchor) / method.temperature).exp()
        x = u / constant
        log_positive = (x[:, 0] / (x[:, 0] + c + 1e-7)).log()
        log_negative = (c / (x[:, 1:] + c + 1e-7)).log().sum(1)
        total = total - (log_positive + log_negative).mean()
    return total


# Check 7: the closed form.


@pytest.mark.parametrize(
    ("size", "negatives", "expected", "accuracy"),
    [(4, 2, 3.819085, 1e-6), (50_000, 16_384, 21.418182, 1e-5)],
)
def test_closed_form(size, negatives, expected, accuracy):
    """All embeddings at right angles to all rows: scores 0, u = 1, Z = n."""
    classes = 2 if size == 4 else 100
    labels = [i % classes for i in range(size)]
    method = ready(labels, classes, (3, 3), dim=2, negatives=negatives)
    row = torch.tensor([1.0, 0.0])
    for bank in (method.memory.student_bank, method.memory.teacher_bank):
        bank.copy_(row.expand_as(bank))
    for layer in (method.embed_student, method.embed_teacher):
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor([0.0, 3.0])
    outputs = Outputs(torch.zeros(2, classes), (torch.randn(2, 3),), torch.tensor([0, 3]))
    loss = method(outputs, outputs, torch.tensor([labels[0], labels[3]]))
    assert loss.item() == pytest.approx(expected, abs=accuracy)
    assert method.memory.z_student.item() == pytest.approx(size, rel=1e-6)
    method.after_step()  # (1, 0) with (0, 1), momentum one half
    half = torch.full((2,), math.sqrt(0.5))
    torch.testing.assert_close(method.memory.student_bank[3], half)
    assert torch.equal(method.memory.student_bank[1], row)


# Check 8: the mechanics, through the objective that training runs.


def test_a_step_by_the_formula(double):
    """Loss and gradients are those of the formula, on the banks as they were before the step."""
    objective, teacher, method = trained()
    index = torch.tensor([3, 17, 8, 0, 22])
    before = state(method)
    loss = stepped(objective, teacher, index)
    loss.backward()
    got = {name: p.grad for name, p in objective.named_parameters()}
    objective.zero_grad(set_to_none=True)

    x = images(SIZE)[index]
    features = objective.student(x)[1][0], teacher(x)[1][0]
    embeddings = embedded(method, features)
    banks = before["student_bank"], before["teacher_bank"]
    negatives = method.draw(torch.tensor(LABELS)[index], index)
    z = []
    for anchor, bank in zip(embeddings, reversed(banks), strict=True):
        scores = torch.einsum("bjd,bd->bj", bank[negatives], anchor.detach())
        z.append(SIZE * (scores / 0.07).exp().mean())
    wanted = by_formula(method, embeddings, banks, negatives, z)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(method.memory.z_student, z[0])
    torch.testing.assert_close(method.memory.z_teacher, z[1])
    wanted.backward()
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:  # not of the classifier, behind the features
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-15)

    swapped = by_formula(method, embeddings, banks[::-1], negatives, z)
    assert abs(swapped.item() - wanted.item()) > 1e-3

    for name, bank in zip(("student_bank", "teacher_bank"), banks, strict=True):
        assert torch.equal(getattr(method.memory, name), bank), "written after the step only"
    objective.after_step()
    for name, bank, own in zip(("student_bank", "teacher_bank"), banks, embeddings, strict=True):
        now, others = getattr(method.memory, name), torch.ones(SIZE, dtype=torch.bool)
        others[index] = False
        assert torch.equal(now[others], bank[others])
        blended = 0.5 * bank[index] + 0.5 * own.detach()
        torch.testing.assert_close(now[index], F.normalize(blended))
        assert not torch.equal(now[index], bank[index])


def test_constants_are_those_of_the_first_step():
    objective, teacher, method = trained()
    stepped(objective, teacher, torch.arange(5))
    first = state(method)
    objective.after_step()
    stepped(objective, teacher, torch.arange(9, 14))
    for name in ("z_student", "z_teacher"):
        assert first[name] > 0 and torch.equal(first[name], state(method)[name])


def test_gradients_reach_what_is_trained_only():
    objective, teacher, method = trained()
    stepped(objective, teacher, torch.arange(5)).backward()
    for layer in (method.embed_student, method.embed_teacher):
        assert layer.weight.grad.abs().sum() > 0 and layer.bias.grad.abs().sum() > 0
    assert objective.student.model[1].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(b.grad is None and not b.requires_grad for b in method.buffers())
    names = {name for name, _ in method.named_parameters()}
    assert names == {
        f"embed_{net}.{p}" for net in ("student", "teacher") for p in ("weight", "bias")
    }
    saved = {name for name in objective.state_dict() if name.startswith("methods.")}
    memory = {"student_bank", "teacher_bank", "z_student", "z_teacher"}
    assert saved == {f"methods.0.{n}" for n in names | {f"memory.{m}" for m in memory}}


def test_features_of_any_shape_and_precision():
    """Pooled maps [B, C, 1, 1] and bfloat16 features of autocast; embeddings are float32."""
    method = ready(widths=(6, 10), **SMALL)
    student = Outputs(torch.zeros(3, CLASSES), (torch.randn(3, 6).bfloat16(),), torch.arange(3))
    teacher = Outputs(torch.zeros(3, CLASSES), (torch.randn(3, 10),))
    loss = method(student, teacher, torch.tensor(LABELS[:3]))
    maps = Outputs(student.logits, (student.features[0][..., None, None],), student.indices)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert torch.equal(loss, method(maps, teacher, torch.tensor(LABELS[:3])))


def test_accumulated_micro_batches_are_one_step(double):
    """Scored against the same banks, written together: rows and loss of one large batch."""
    objective, teacher, method = trained()
    stepped(objective, teacher, torch.arange(20, 24))
    objective.after_step()  # Z is set
    start = state(method)
    whole = stepped(objective, teacher, torch.arange(3, 15))
    objective.after_step()
    after_whole = state(method)
    method.memory.load_state_dict(start)
    parts = [stepped(objective, teacher, torch.arange(i, i + 4)) for i in (3, 7, 11)]
    assert all(torch.equal(state(method)[name], start[name]) for name in start)
    objective.after_step()
    assert sum(parts).item() / 3 == pytest.approx(whole.item(), rel=1e-6)
    for name, value in after_whole.items():
        torch.testing.assert_close(state(method)[name], value, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="a forward before"):
        objective.after_step()


def test_a_step_asks_the_device_nothing():
    """After the first step no number is read back from the device."""
    objective, teacher, _ = trained()
    read = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(word in str(function) for word in ("_local_scalar_dense", "nonzero")):
                read.append(str(function))
            return function(*args, **(kwargs or {}))

    def step(start):
        stepped(objective, teacher, torch.arange(start, start + 5)).backward()
        objective.after_step()

    step(0)
    with Watch():
        step(5)
    assert read == []


def compiled_step(objective, teacher, index, module):
    x = images(SIZE)[index]
    total, terms, _ = module(x, torch.tensor(LABELS)[index], *teacher(x), indices=index)
    total.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters()}
    objective.zero_grad(set_to_none=True)
    objective.after_step()
    return total.detach(), terms, gradients


def test_epochs_compile_nothing_anew():
    """One graph without a break serves every epoch, and does what eager code does."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return aot_eager(graph, example)

    found = []
    for compile in (False, True):
        objective, teacher, method = trained()
        module = objective
        if compile:
            module = torch.compile(objective, fullgraph=True, backend=backend)
        steps = []
        for epoch in range(12):  # more than torch compiles one function for
            objective.start_epoch(epoch)
            index = torch.arange(epoch, epoch + 5)
            steps.append(compiled_step(objective, teacher, index, module))
        found.append((steps, state(method)))
    torch.compiler.reset()
    assert len(graphs) == 1
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_compiled_code_equals_eager_code():
    """torch.compile as --torchcompile has it, two micro-batches of a step and the next step."""
    found = []
    for compile in (False, True):
        objective, teacher, method = trained()
        module = torch.compile(objective, dynamic=False) if compile else objective
        x, labels = images(SIZE), torch.tensor(LABELS)
        for index in (torch.arange(5), torch.arange(9, 14)):
            module(x[index], labels[index], *teacher(x[index]), indices=index)[0].backward()
        objective.after_step()
        found.append((compiled_step(objective, teacher, torch.arange(3, 8), module), state(method)))
    torch.compiler.reset()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_copy_keeps_a_memory_of_its_own():
    objective, teacher, method = trained()
    before = state(method)
    other = copy.deepcopy(objective)
    module = torch.compile(other, fullgraph=True, backend="aot_eager")
    compiled_step(other, teacher, torch.arange(5), module)
    torch.compiler.reset()
    assert all(torch.equal(value, before[name]) for name, value in state(method).items())
    assert not torch.equal(state(other.methods[0])["student_bank"], before["student_bank"])


# What is drawn.


@pytest.mark.parametrize("negatives", [7, 18, 50])
def test_negatives_are_of_other_classes(negatives):
    """18 images are of another class: up to there none comes twice in a row, then it must."""
    method, labels = ready(dim=8, negatives=negatives), torch.tensor(LABELS)
    for epoch in range(3):
        method.start_epoch(epoch)
        drawn = method.draw(labels, torch.arange(SIZE))
        assert drawn.shape == (SIZE, negatives + 1)
        assert torch.equal(drawn[:, 0], torch.arange(SIZE))
        assert (labels[drawn[:, 1:]] != labels[:, None]).all()
        distinct = [len(row[1:].unique()) for row in drawn]
        assert set(distinct) == {negatives} if negatives <= 18 else max(distinct) <= 18
    (note,) = method.notes() or [None]
    if negatives <= 18:
        assert note is None
    else:
        assert "with replacement" in note and "50" in note and "--crd-negatives 18" in note


def test_order_of_images_does_not_matter_to_classes():
    labels = [2, 0, 0, 3, 1, 1, 2, 0, 3, 0, 0, 2]
    method, targets = ready(labels, 5, **SMALL), torch.tensor(labels)  # class 4 has no images
    drawn = method.draw(targets, torch.arange(len(labels)))
    assert (targets[drawn[:, 1:]] != targets[:, None]).all()
    assert drawn[:, 1:].unique().tolist() == list(range(len(labels)))


@pytest.mark.parametrize("positives", ["exact", "relax"])
def test_draws_are_of_seed_epoch_and_image(positives):
    labels = torch.tensor(LABELS)
    method, same, other = (ready(seed=seed, positives=positives, **SMALL) for seed in (3, 3, 4))
    index = torch.randperm(SIZE)
    rows = method.draw(labels, torch.arange(SIZE))
    assert torch.equal(rows[index[:9]], same.draw(labels[index[:9]], index[:9]))
    assert not torch.equal(rows, other.draw(labels, torch.arange(SIZE)))
    method.start_epoch(1)
    later = method.draw(labels, torch.arange(SIZE))
    assert not torch.equal(rows[:, 1:], later[:, 1:])
    same.start_epoch(5)
    same.start_epoch(1)
    assert torch.equal(later, same.draw(labels, torch.arange(SIZE)))


def test_relaxed_positives():
    """Column 0 is any image of the class, each as often; the image's own rows are updated."""
    method = ready(positives="relax", **SMALL)
    labels, index = torch.tensor(LABELS), torch.arange(SIZE)
    counts = torch.zeros(SIZE, SIZE)
    for epoch in range(400):
        method.start_epoch(epoch)
        counts[index, method.draw(labels, index)[:, 0]] += 1
    own = labels[:, None] == labels[None]
    assert (counts[~own] == 0).all()
    expected = 400 / own.sum(1, keepdim=True)  # six of a class
    chi = ((counts - expected).square() / expected)[own].view(SIZE, -1).sum(1)
    assert chi.mean() == pytest.approx(5, abs=1.5) and chi.max() < 30

    before = state(method)
    outputs = Outputs(torch.zeros(2, CLASSES), (torch.randn(2, 6),), torch.tensor([5, 10]))
    theirs = Outputs(torch.zeros(2, CLASSES), (torch.randn(2, 10),))
    method(outputs, theirs, labels[[5, 10]])
    method.after_step()
    changed = (state(method)["student_bank"] != before["student_bank"]).any(1)
    assert changed.nonzero().flatten().tolist() == [5, 10]


# What it cannot be used on.


def test_images_of_one_class_are_refused():
    for labels in ([2] * 12, []):
        with pytest.raises(UsageError, match=r"crd.*two classes.*--train-limit"):
            ready(labels)


def test_labels_outside_the_classes_are_refused():
    for wrong in (4, -1):
        with pytest.raises(UserError, match=f"image 2 has label {wrong}, outside the 4 classes"):
            ready([0, 1, wrong, 3])


def test_indices_are_needed():
    outputs = Outputs(torch.zeros(1, 4), (torch.zeros(1, 6),))
    with pytest.raises(ValueError, match="crd needs the data set indices"):
        ready(widths=(6, 6), **SMALL)(outputs, outputs, torch.tensor([0]))


# Through the command line.

FEW = ("--train-limit", 64, "--eval-limit", 64, "--epochs", 1, "--no-baseline", "-b", 16)
FEW += ("--teacher", "cifar_resnet8", "--model", "cifar_resnet8")


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("dim", 0, ["crd dim must be above 0, got 0"]),
        ("negatives", -3, ["crd negatives must be above 0, got -3"]),
        ("negatives", "many", ["--crd-negatives", "many"]),
        ("temperature", 0, ["crd temperature must be above 0, got 0"]),
        ("temperature", "nan", ["crd temperature", "nan"]),
        ("momentum", -0.1, ["crd momentum must be 0 or more, got -0.1"]),
        ("momentum", 1.5, ["crd momentum must be 1 or less, got 1.5"]),
        ("positives", "relaxed", ["--crd-positives", "relaxed", "relax"]),
    ],
)
def test_bad_options_are_one_line(refused, teacher_run, flag, value, words):
    few = (*FEW, "--teacher-checkpoint", teacher_run)
    refused(2, DISTILL, *few, "--method", "crd", f"--crd-{flag}={value}", words=words)


def test_a_run_and_what_it_may_be_resumed_on(run_script, refused, teacher_run, tmp_path):
    """More negatives than images are said once. Other images are refused."""
    flags = (*FEW, "--teacher-checkpoint", teacher_run, "--experiment", "mine")
    code, out, err = run_script(DISTILL, *flags, "--method", "crd", "kd")
    assert code == 0, err
    assert out.count("with replacement") == 1 and "crd: fc:in -> fc:in\n" in out
    assert "0.1 * ce + 0.02 * crd + 0.9 * kd" in out, "the weights of recipe digits"
    run = tmp_path / "output" / "mine"
    with (run / "summary.csv").open() as file:
        row = next(csv.DictReader(file))
    assert 0 < float(row["train_crd"]) < math.inf
    saved = load_file(checkpoint.latest(run / "checkpoints") / "objective.safetensors")
    norms = saved["methods.0.memory.student_bank"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(64))  # every image was seen

    again = (*flags, "--method", "crd", "kd", "--resume", "auto")
    words = ["output/mine", "cannot resume"]
    refused(2, DISTILL, *again, "--train-limit", 65, words=[*words, "'train': 64", "'train': 65"])
    refused(2, DISTILL, *again, "--crd-negatives", 9, words=[*words, "'negatives': 9"])
    for split in ("train", "val"):
        for label in range(10):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(7):
                Image.new("RGB", (32, 32), (9 * i, 20 * label, 0)).save(folder / f"{i}.png")
    other = ("--dataset", "folder", "--data-dir", "images", "--img-size", 32)
    refused(2, DISTILL, *again, *other, words=[*words, "dataset digits", "dataset folder"])


def test_a_set_sorted_by_class_cut_within_the_first(refused, teacher_run, tmp_path):
    for split in ("train", "val"):
        for label in range(10):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (32, 32), (9 * i, 20 * label, 0)).save(folder / f"{i}.png")
    flags = (*FEW, "--teacher-checkpoint", teacher_run, "--method", "crd", "--dataset", "folder")
    flags += ("--data-dir", "images", "--img-size", 32, "-b", 2, "--train-limit", 4)
    refused(2, DISTILL, *flags, words=["crd", "two classes", "--train-limit"])
