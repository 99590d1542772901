"""CRD: draws, loss, bank update: hand values, the float64 twin, statistics, torch's machinery."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from cases import DEVICES, TOLERANCE, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdfast import ops
from kdfast.ops import Key, reference

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])
KEY = Key(7, "negatives", 3)


@pytest.fixture(autouse=True)
def fused():
    """The fused path or an error: a missing library must not pass as the twin."""
    with ops.use("fused"):
        yield


@dataclass(frozen=True)
class Case:
    """A batch against two banks. `scale` 1 gives unit embeddings, more gives larger scores."""

    batch: int = 5
    samples: int = 41
    negatives: int = 13
    dim: int = 8
    dtype: torch.dtype = torch.float32
    bank_dtype: torch.dtype = torch.float32
    temperature: float = 0.07
    z: float = 0.0  # 0: as many as there are samples
    scale: float = 1.0

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.samples}x{self.negatives}x{self.dim}"
        words = [sizes, *(str(x).removeprefix("torch.") for x in (self.dtype, self.bank_dtype))]
        return "-".join([*words, f"t{self.temperature:g}", f"z{self.z:g}", f"s{self.scale:g}"])

    def make(self, device: str = "cpu", seed: int = 0) -> tuple:
        """The arguments of contrastive_loss; both embeddings require gradients."""
        generator = torch.Generator().manual_seed(seed)

        def unit(rows: int) -> Tensor:
            x = torch.randn(rows, self.dim, generator=generator, dtype=torch.float64)
            return F.normalize(x) * self.scale

        embeddings = [unit(self.batch).to(device, self.dtype).requires_grad_() for _ in range(2)]
        banks = [unit(self.samples).to(device, self.bank_dtype) for _ in range(2)]
        shape = (self.batch, self.negatives + 1)
        indices = torch.randint(self.samples, shape, generator=generator).to(device)
        z = torch.tensor(self.z or float(self.samples), device=device, dtype=self.bank_dtype)
        return *embeddings, *banks, indices, z, z * 1.5, self.temperature


def in_double(arguments: tuple) -> tuple:
    """The same arguments as float64 leaves."""
    return tuple(
        x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in arguments
    )


CASES = [
    Case(),
    Case(batch=1, samples=2, negatives=1, dim=1),
    Case(batch=2, samples=3, negatives=1, dim=3),
    Case(batch=3, samples=5, negatives=600, dim=5),  # more than one tile of the CUDA kernels
    Case(batch=3, samples=9001, negatives=2000, dim=128),  # several blocks of the bank
    Case(batch=2, samples=4000, negatives=777, dim=132),
    Case(batch=2, samples=300, negatives=64, dim=700),
    Case(batch=7, samples=70, negatives=65, dim=20),
    Case(batch=3, samples=50000, negatives=40, dim=4),  # blocks larger than the cache
    Case(scale=3.0, dim=16),
    Case(temperature=5.0),
    Case(z=1e-3),
    Case(z=1e12),
    Case(temperature=0.02, z=1e20, scale=1.2),
    Case(temperature=0.01, z=1e-20, scale=0.4),
    *(Case(dtype=dtype, dim=12) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    Case(dtype=torch.float64, bank_dtype=torch.float64, samples=999, negatives=170, dim=33),
    Case(bank_dtype=torch.float64),
]


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_matches_double_twin(case, device):
    arguments = case.make(device)
    exact = in_double(arguments)
    loss, want = ops.contrastive_loss(*arguments), reference.contrastive_loss(*exact)
    double = torch.float64 in (case.dtype, case.bank_dtype)
    assert loss.dtype == (torch.float64 if double else torch.float32) and loss.shape == ()
    # Scores of float32 products are off by some 1e-7 and divided by the temperature.
    sharp = max(1.0, 0.05 * case.scale**2 / case.temperature)
    assert error(loss, want) <= TOLERANCE[loss.dtype][0] * sharp
    gradients = torch.autograd.grad(loss, arguments[:2])
    exact_gradients = torch.autograd.grad(want, exact[:2])
    for got, want, embedding in zip(gradients, exact_gradients, arguments[:2], strict=True):
        assert got.dtype == embedding.dtype and got.is_contiguous()
        limit = TOLERANCE[torch.float32 if case.bank_dtype == torch.float64 else case.dtype][1]
        assert error(got, want) <= limit * sharp

    constants = ops.contrastive_constants(*arguments[:5], case.temperature)
    wanted = reference.contrastive_constants(*exact[:5], case.temperature)
    for got, want in zip(constants, wanted, strict=True):
        assert got.dtype == loss.dtype and not got.requires_grad
        assert error(got, want) <= 2e-5 * sharp


@devices
@both_paths
def test_closed_form(device, path):
    """Check 7 of the loss specification: all scores equal, so x = 1/n."""

    def start(samples: int, negatives: int, dim: int = 2) -> float:
        anchor = torch.zeros(3, dim, device=device)
        bank = torch.zeros(samples, dim, device=device)
        indices = torch.arange(negatives + 1, device=device).expand(3, -1)
        with ops.use(path):
            z = ops.contrastive_constants(anchor, anchor, bank, bank, indices, 0.07)
            assert [x.item() for x in z] == [samples] * 2
            loss = ops.contrastive_loss(anchor, anchor, bank, bank, indices, *z, 0.07)
            return loss.item()

    closed = 2 * (math.log(3) + 2 * math.log(1.5))
    assert closed == pytest.approx(3.819085, abs=1e-6)
    # eps is in the loss but not in the closed form: 2 * (2 * 4/3 + ...) * 1e-7
    assert start(4, 2) == pytest.approx(closed, abs=1e-6)
    assert start(50000, 16384) == pytest.approx(21.418182, rel=1e-6)
    assert start(50000, 16384) / 2 == pytest.approx(10.7091, abs=1e-4)


@devices
@both_paths
def test_student_meets_the_teachers_bank(device, path):
    """Check 8: with both banks of one sample each, swapping them changes the loss."""
    e = torch.tensor([[1.0, 0.0]], device=device)
    t = torch.tensor([[0.0, 1.0]], device=device)
    student_bank = torch.tensor([[0.0, 1.0], [0.0, -1.0]], device=device)
    teacher_bank = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device)
    indices = torch.tensor([[0, 1]], device=device)
    z = torch.tensor(2.0, device=device)
    with ops.use(path):
        near = ops.contrastive_loss(e, t, student_bank, teacher_bank, indices, z, z, 1.0)
        far = ops.contrastive_loss(e, t, -student_bank, -teacher_bank, indices, z, z, 1.0)
    c, high, low = 0.5, math.e / 2, math.exp(-1) / 2

    def loss(positive: float, negative: float) -> float:
        eps = 1e-7
        return -2 * math.log(positive / (positive + c + eps) * c / (negative + c + eps))

    assert near.item() == pytest.approx(loss(high, low), rel=1e-6)
    assert far.item() == pytest.approx(loss(low, high), rel=1e-6)


@devices
def test_analytic_slopes(device):
    """The gradient with respect to scores of section 4.6, float64, 1e-12."""
    case = Case(dtype=torch.float64, bank_dtype=torch.float64)
    arguments = case.make(device)
    student, _, _, bank, indices, z, *_ = (
        x.detach() if isinstance(x, Tensor) else x for x in arguments
    )
    got = torch.autograd.grad(ops.contrastive_loss(*arguments), arguments[0])[0]
    rows = bank[indices]
    x = ((rows * student.unsqueeze(1)).sum(2) / case.temperature).exp() / z
    shifted = case.negatives / case.samples + 1e-7
    slope = x / (x + shifted)
    slope[:, 0] = -shifted / (x[:, 0] + shifted)
    want = (slope.unsqueeze(2) * rows).sum(1) / case.temperature / case.batch
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@devices
def test_extreme_scores_stay_finite(device):
    """x far under and over everything: log-space positives, no overflow of products."""
    for scale in (-60.0, 60.0):
        e = torch.full((1, 1), scale, device=device, requires_grad=True)
        bank = torch.ones(20, 1, device=device)
        indices = torch.arange(20, device=device).unsqueeze(0)
        one = torch.ones((), device=device)
        loss = ops.contrastive_loss(e, e.detach(), bank, bank, indices, one, one, 1.0)
        x, c = math.exp(scale), 19 / 20
        want = -scale + math.log(x + c + 1e-7) + 19 * math.log1p((x + 1e-7) / c)
        assert loss.item() == pytest.approx(2 * want, rel=1e-6)
        assert torch.autograd.grad(loss, e)[0].isfinite().all()


@devices
@both_paths
def test_not_a_number_is_not_hidden(device, path):
    student, teacher, student_bank, teacher_bank, indices, z, *_ = Case().make(device)
    rest = (student_bank, teacher_bank, indices)

    def loss(student: Tensor, z: Tensor) -> float:
        with ops.use(path):
            return ops.contrastive_loss(student, teacher, *rest, z, z, 0.07).item()

    broken = student.detach().clone()
    broken[2, 3] = math.nan
    assert math.isnan(loss(broken, z))
    broken[2, 3] = math.inf
    assert not math.isfinite(loss(broken, z))
    assert math.isnan(loss(student, torch.full_like(z, -1.0)))
    assert math.isnan(loss(student, torch.full_like(z, math.nan)))


@devices
def test_scores_are_full_float32(device):
    """Neither autocast nor the precision of matrix products reaches them."""
    arguments = Case(dim=128, samples=200, negatives=100).make(device)
    want = ops.contrastive_loss(*arguments)
    gradient = torch.autograd.grad(want, arguments[0])[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device, torch.bfloat16):
            loss = ops.contrastive_loss(*arguments)
            twin = reference.contrastive_loss(*arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(loss, want)
    assert torch.equal(torch.autograd.grad(loss, arguments[0])[0], gradient)
    assert twin.dtype == torch.float32


@devices
def test_banks_may_change_before_the_backward(device):
    """And get no gradient, nor do the embeddings of a bank row."""
    arguments = Case().make(device)
    student, teacher, student_bank, teacher_bank = arguments[:4]
    want = torch.autograd.grad(ops.contrastive_loss(*arguments), (student, teacher))
    for bank in (student_bank, teacher_bank):
        bank.requires_grad_()
    loss = ops.contrastive_loss(*arguments)
    with torch.no_grad():
        ops.contrastive_update_(
            student_bank, teacher_bank, student, teacher, torch.arange(5, device=device), 0.5
        )
    loss.backward()
    assert torch.equal(student.grad, want[0]) and torch.equal(teacher.grad, want[1])
    assert student_bank.grad is None and teacher_bank.grad is None


@devices
def test_no_slopes_are_made_without_need(device):
    arguments = Case().make(device)
    library = torch.ops.kdfast.contrastive_loss
    with torch.no_grad():
        loss = ops.contrastive_loss(*arguments)
    constants = tuple(x.detach() for x in arguments[5:7])
    detached = tuple(x.detach() for x in arguments[:4])
    out = library(*detached, arguments[4], *constants, 0.07, False)
    assert torch.equal(loss, out[0]) and out[2].shape == (0, 8) and out[3].shape == (0, 8)


# ---- The bank update


@devices
@both_paths
def test_update(device, path):
    """Check 8: norms 1, (1, 0) with (0, 1) at 0.5, other rows bit-identical, both banks."""
    generator = torch.Generator().manual_seed(0)
    banks = [torch.randn(9, 2, generator=generator).to(device) for _ in range(2)]
    for bank in banks:
        bank[3] = torch.tensor([1.0, 0.0])
    before = [bank.clone() for bank in banks]
    student = torch.tensor([[0.0, 1.0], [0.6, 0.8]], device=device)
    index = torch.tensor([3, 7], device=device)
    with ops.use(path):
        ops.contrastive_update_(*banks, student, -student, index, 0.5)
    half = 0.5**0.5
    assert banks[0][3].tolist() == pytest.approx([half, half], abs=1e-7)
    assert banks[1][3].tolist() == pytest.approx([half, -half], abs=1e-7)
    for bank, old in zip(banks, before, strict=True):
        assert bank[index].norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)
        others = [i for i in range(9) if i not in (3, 7)]
        assert torch.equal(bank[others], old[others])


@devices
@both_paths
def test_of_equal_rows_the_last_counts(device, path):
    embeddings = F.normalize(torch.arange(1.0, 13).view(4, 3)).to(device)
    with ops.use(path):
        many, one = (torch.ones(6, 3, device=device) for _ in range(2))
        index = torch.tensor([2, 5, 2, 2], device=device)
        ops.contrastive_update_(many, many.clone(), embeddings, embeddings, index, 0.3)
        rows = torch.tensor([1, 3], device=device)
        ops.contrastive_update_(
            one, one.clone(), embeddings[rows], embeddings[rows], index[rows], 0.3
        )
    assert torch.equal(many, one)


@devices
@pytest.mark.parametrize("dim", [1, 7, 128, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_update_matches_double_twin(dim, dtype, device):
    arguments = Case(dim=dim, dtype=dtype).make(device)
    student, teacher, *banks = (x.detach() for x in arguments[:4])
    index = torch.tensor([40, 0, 17, 3, 5], device=device)
    exact = [bank.double() for bank in banks]
    ops.contrastive_update_(*banks, student, teacher, index, 0.9)
    reference.contrastive_update_(*exact, student.double(), teacher.double(), index, 0.9)
    assert error(banks[0], exact[0]) < 5e-7 and error(banks[1], exact[1]) < 5e-7


@devices
@both_paths
def test_a_row_that_vanishes_becomes_zero(device, path):
    with ops.use(path):
        bank, other = torch.ones(2, 2, device=device), torch.ones(2, 2, device=device)
        e = torch.full((1, 2), -1.0, device=device)
        ops.contrastive_update_(bank, other, e, e, torch.tensor([1], device=device), 0.5)
    assert bank.tolist() == [[1, 1], [0, 0]]


# ---- Draws


def dataset(counts: list[int], batch: int, seed: int = 0) -> tuple:
    """(labels, class_offsets, ids, order, class of each sample) of a shuffled data set."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    targets = targets[torch.randperm(len(targets), generator=generator)]
    ids = torch.randint(len(targets), (batch,), generator=generator)
    offsets = F.pad(torch.tensor(counts).cumsum(0), (1, 0))
    return targets[ids], offsets, ids, targets.argsort(stable=True), targets


COUNTS = [
    ([3, 4, 5], 4),
    ([3, 4, 5], 9),
    ([1, 1], 3),
    ([1, 2, 1], 2),
    ([0, 7, 0, 9], 7),
    ([40, 2, 3], 43),
    ([500] * 100, 700),
    ([5, 100000, 3], 1500),
    ([30, 20, 10], 20),
]


@devices
@both_paths
@pytest.mark.parametrize(("counts", "negatives"), COUNTS, ids=str)
def test_draws(counts, negatives, path, device):
    labels, offsets, ids, order, targets = dataset(counts, 11)
    on = [x.to(device) for x in (labels, offsets, ids, order)]
    with ops.use(path):
        drawn = ops.draw_negatives(on[0], on[1], negatives, on[2], KEY, on[3]).cpu()
    assert drawn.dtype == torch.int64 and drawn.shape == (11, negatives + 1)
    assert torch.equal(drawn[:, 0], ids)
    assert not (targets[drawn[:, 1:]] == labels.unsqueeze(1)).any()
    for label, row in zip(labels.tolist(), drawn[:, 1:].tolist(), strict=True):
        if negatives <= len(targets) - counts[label]:
            assert len(set(row)) == negatives
    want = reference.draw_negatives(labels, offsets, negatives, ids, KEY, order)
    assert torch.equal(drawn, want)


@devices
def test_draws_depend_on_key_and_id_alone(device):
    labels, offsets, ids, order, _ = (x.to(device) for x in dataset([30] * 10, 12))
    ids = torch.arange(12, device=device) * 23
    labels = torch.zeros_like(labels)
    whole = ops.draw_negatives(labels, offsets, 50, ids, KEY, order)
    halves = [ops.draw_negatives(labels[h], offsets, 50, ids[h], KEY, order)
              for h in (slice(0, 5), slice(5, 12))]  # fmt: skip
    assert torch.equal(whole, torch.cat(halves))
    more = ops.draw_negatives(labels, offsets, 200, ids, KEY, order)
    assert torch.equal(more[:, :51], whole)
    assert torch.equal(whole, ops.draw_negatives(labels, offsets, 50, ids, Key(*KEY.words), order))
    other = ops.draw_negatives(labels, offsets, 50, ids, Key(8), order)
    assert (other[:, 1:] == whole[:, 1:]).float().mean() < 0.05
    assert all(len(set(column.tolist())) > 6 for column in whole.T)


def test_without_an_order_draws_are_places():
    labels, offsets, ids, order, _ = dataset([30, 20, 10], 8)
    places = ops.draw_negatives(labels, offsets, 25, ids, KEY)
    mapped = ops.draw_negatives(labels, offsets, 25, ids, KEY, order)
    assert torch.equal(order[places[:, 1:]], mapped[:, 1:])
    assert torch.equal(places[:, 0], mapped[:, 0])


def surprise(counts: Tensor, expected: Tensor | float, shrink: float = 1.0) -> float:
    """Chi-square of the counts in standard deviations; `shrink` scales their variance."""
    square = ((counts - expected) ** 2 / expected).sum().item() / shrink
    freedom = counts.numel() - 1
    return (square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(("pool", "negatives"), [(3, 2), (11, 4), (100, 30), (1437, 900)])
def test_every_place_is_drawn_equally_often(pool, negatives):
    """Chi-square over places, and over places at each of the first columns."""
    rows = 20000 if pool < 1000 else 2000
    offsets, ids = torch.tensor([0, 1, 1 + pool]), torch.arange(rows) * 3
    labels = torch.zeros_like(ids)
    for draws in (negatives, 5 * pool if pool < 1000 else 2 * pool):
        values = ops.draw_negatives(labels, offsets, draws, ids, KEY)[:, 1:] - 1
        counts = torch.bincount(values.flatten(), minlength=pool).double()
        # Rows without repetition vary less: a hypergeometric variance.
        shrink = (1 - draws / pool) * pool / (pool - 1) if draws < pool else 1.0
        assert abs(surprise(counts, rows * draws / pool, shrink)) < 5
        for column in (0, 1, negatives - 1):
            counts = torch.bincount(values[:, column], minlength=pool).double()
            assert surprise(counts, rows / pool) < 5


@pytest.mark.parametrize("pool", [101, 1437, 49500])
def test_draws_of_a_row_are_independent(pool):
    """Pairs of columns, of neighbouring ids, and their differences, in bins, against uniform."""
    rows = 3000
    offsets, ids = torch.tensor([0, 1, 1 + pool]), torch.arange(rows)
    values = ops.draw_negatives(torch.zeros_like(ids), offsets, 24, ids, KEY)[:, 1:] - 1
    bins = 20
    of = torch.arange(pool) * bins // pool
    size = torch.bincount(of).double()
    both = (size.unsqueeze(1) * size - torch.diag(size)) / (pool * (pool - 1))  # never equal
    free = size.unsqueeze(1) * size / pool**2
    columns = math.ceil(pool / math.ceil(math.sqrt(pool)))
    for lag in {1, 2, 3, columns} - set(range(24, pool)):
        a, b = values[:, :-lag].flatten(), values[:, lag:].flatten()
        pairs = torch.bincount(of[a] * bins + of[b], minlength=bins**2).view(bins, bins)
        assert surprise(pairs.double(), both * len(a)) < 5
        steps = torch.bincount(of[(b - a) % pool], minlength=bins).double()
        expected = (size - F.one_hot(torch.tensor(0), bins)) / (pool - 1)
        assert surprise(steps, expected * len(a)) < 5
    a, b = values[:-1].flatten(), values[1:].flatten()
    pairs = torch.bincount(of[a] * bins + of[b], minlength=bins**2).view(bins, bins)
    assert surprise(pairs.double(), free * len(a)) < 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_a_permutation_of_the_pool(pool, seed, id):
    offsets = torch.tensor([0, 2, 2 + pool])
    drawn = ops.draw_negatives(torch.tensor([0]), offsets, pool, torch.tensor([id]), Key(seed))
    assert drawn[0, 0] == id
    assert drawn[0, 1:].sort().values.tolist() == list(range(2, 2 + pool))


def test_known_draws():
    """The stream may never change silently: stored experiments would."""
    drawn = ops.draw_negatives(
        torch.tensor([0, 1]), torch.tensor([0, 500, 50000]), 5, torch.tensor([3, 41]), Key(1, "crd")
    )
    assert drawn.tolist() == KNOWN


KNOWN = [[3, 4524, 9932, 6086, 12207, 29157], [41, 343, 347, 60, 385, 345]]


# ---- Errors

E = torch.ones(2, 4)
M = torch.ones(5, 4)
I = torch.zeros(2, 3, dtype=torch.int64)  # noqa: E741
Z = torch.ones(())


@both_paths
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({0: E[0]}, ValueError, ["student", "[B, d]", "[4]"]),
        ({1: E[:1]}, ValueError, ["teacher", "batch size", "1 and 2"]),
        ({0: E[:0], 1: E[:0]}, ValueError, ["student", "non-empty"]),
        ({1: E.int()}, TypeError, ["teacher", "torch.int32"]),
        ({0: None}, TypeError, ["student", "NoneType"]),
        ({2: M.half()}, TypeError, ["student_bank", "float32 or float64", "float16"]),
        ({2: M[:4]}, ValueError, ["one shape", "[4, 4]", "[5, 4]"]),
        ({3: torch.ones(5, 3)}, ValueError, ["dimension", "4", "3", "teacher_bank"]),
        ({4: I.float()}, TypeError, ["indices", "int64", "float32"]),
        ({4: [[0, 1]]}, TypeError, ["indices", "list"]),
        ({4: I[:1]}, ValueError, ["indices", "batch size", "1 and 2"]),
        ({4: I[:, :1]}, ValueError, ["indices", "at least one negative"]),
        ({4: I[0]}, ValueError, ["indices", "[B, K + 1]"]),
        ({5: E}, ValueError, ["z_student", "scalar", "[2, 4]"]),
        ({6: Z.long()}, TypeError, ["z_teacher", "int64"]),
        ({7: 0.0}, ValueError, ["temperature", "0.0"]),
        ({7: math.inf}, ValueError, ["temperature", "inf"]),
        ({3: M.to("meta")}, ValueError, ["one device", "meta", "teacher_bank"]),
    ],
)
def test_loss_errors(path, change, kind, words):
    arguments = [E, E, M, M, I, Z, Z, 0.07]
    for place, value in change.items():
        arguments[place] = value
    with ops.use(path), pytest.raises(kind) as caught:
        ops.contrastive_loss(*arguments)
    assert all(word in str(caught.value) for word in ["contrastive_loss", *words]), caught.value
    if not {5, 6} & set(change):
        with ops.use(path), pytest.raises(kind, match="contrastive_constants: "):
            ops.contrastive_constants(*arguments[:5], arguments[7])


def test_what_the_cpu_sees_in_the_values():
    bad = I.clone()
    bad[1, 2] = 5
    words = r"must be in \[0, 5\), got 5"
    with pytest.raises(ValueError, match=f"^contrastive_loss: indices {words}"):
        ops.contrastive_loss(E, E, M, M, bad, Z, Z, 0.07)
    with pytest.raises(ValueError, match=f"^contrastive_constants: indices {words}"):
        ops.contrastive_constants(E, E, M, M, bad, 0.07)
    before = M.clone()
    with pytest.raises(ValueError, match=r"^contrastive_update_: index must be in .*got -1"):
        ops.contrastive_update_(before, M.clone(), E, E, torch.tensor([1, -1]), 0.1)
    assert torch.equal(before, M)

    labels, offsets, ids = torch.tensor([0, 1]), torch.tensor([0, 2, 5]), torch.tensor([0, 3])
    for arguments, match in (
        ((labels + 1, offsets, 2, ids, KEY), r"labels must be in \[0, 2\), got 2"),
        ((labels, torch.tensor([0, 5, 5]), 2, ids, KEY), "class 0 has all samples"),
        ((labels, torch.tensor([0, 6, 5]), 2, ids, KEY), "must not decrease, got 6 before 5"),
        ((labels, offsets + 1, 2, ids, KEY), "must go from 0"),
        ((labels, offsets, 2, ids, KEY, torch.arange(4)), "order must have 5 entries.*got 4"),
    ):
        with pytest.raises(ValueError, match=f"^draw_negatives: .*{match}"):
            ops.draw_negatives(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
def test_what_cuda_does_not_ask_becomes_nan():
    labels, offsets = torch.tensor([0, 2]).cuda(), torch.tensor([0, 2, 5]).cuda()
    drawn = ops.draw_negatives(labels, offsets, 2, torch.tensor([0, 3]).cuda(), KEY)
    assert (drawn[1] == -1).all() and (drawn[0] >= 0).all()
    loss = ops.contrastive_loss(*(x.cuda() for x in (E, E, M, M)), drawn, Z.cuda(), Z.cuda(), 0.07)
    assert loss.isnan()


@both_paths
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"labels": torch.zeros(2)}, TypeError, ["labels", "int64", "float32"]),
        ({"labels": torch.zeros(2, 1).long()}, ValueError, ["labels", "[B]"]),
        ({"ids": torch.zeros(3).long()}, ValueError, ["ids", "batch size", "3 and 2"]),
        ({"class_offsets": torch.tensor([0])}, ValueError, ["class_offsets", "classes + 1"]),
        ({"negatives": 0}, ValueError, ["negatives", "0"]),
        ({"negatives": 2.0}, TypeError, ["negatives", "float"]),
        ({"key": 3}, TypeError, ["key", "Key", "int"]),
        ({"order": torch.zeros(5)}, TypeError, ["order", "int64"]),
        ({"ids": torch.zeros(2).long().to("meta")}, ValueError, ["one device", "meta"]),
    ],
)
def test_draw_errors(path, change, kind, words):
    zeros = torch.zeros(2).long()
    offsets = torch.tensor([0, 2, 5])
    good = {"labels": zeros, "class_offsets": offsets, "negatives": 2, "ids": zeros, "key": KEY}
    with ops.use(path), pytest.raises(kind) as caught:
        ops.draw_negatives(**{**good, **change})
    assert all(word in str(caught.value) for word in ["draw_negatives", *words]), caught.value


@both_paths
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({4: I}, ValueError, ["index", "[B] vector"]),
        ({4: torch.zeros(3).long()}, ValueError, ["index", "3 and 2"]),
        ({5: 1.5}, ValueError, ["momentum", "1.5"]),
        ({5: math.nan}, ValueError, ["momentum", "nan"]),
        ({0: torch.ones(4, 5).T}, ValueError, ["student_bank", "contiguous"]),
        ({1: M.double()}, TypeError, ["one dtype", "float32", "float64"]),
    ],
)
def test_update_errors(path, change, kind, words):
    arguments = [M.clone(), M.clone(), E, E, torch.tensor([0, 1]), 0.5]
    for place, value in change.items():
        arguments[place] = value
    with ops.use(path), pytest.raises(kind) as caught:
        ops.contrastive_update_(*arguments)
    assert all(word in str(caught.value) for word in ["contrastive_update_", *words]), caught.value


# ---- torch's machinery


@devices
def test_opcheck(device):
    library = torch.ops.kdfast
    for case in (Case(), Case(dim=5, dtype=torch.float64, bank_dtype=torch.float64)):
        *tensors, temperature = case.make(device)
        torch.library.opcheck(library.contrastive_loss.default, (*tensors, temperature, True))
        tensors = [x.detach() for x in tensors]
        torch.library.opcheck(library.contrastive_loss.default, (*tensors, temperature, False))
        student, teacher, student_bank, teacher_bank = tensors[:4]
        arguments = (tensors[5] * 0 + 2, student, teacher, student.clone(), teacher.clone())
        torch.library.opcheck(library.contrastive_loss_backward.default, arguments)
        index = torch.arange(5, device=device)
        arguments = (student_bank, teacher_bank, student, teacher, index, 0.5)
        torch.library.opcheck(library.contrastive_update_.default, arguments)
    labels, offsets, ids, order, _ = (x.to(device) for x in dataset([3, 4, 5], 6))
    for places in (order, None):
        arguments = (labels, offsets, places, ids, 6, -5)
        torch.library.opcheck(library.draw_negatives.default, arguments)


@devices
@pytest.mark.parametrize("dim", [3, 8])
def test_gradcheck(dim, device):
    case = Case(dim=dim, dtype=torch.float64, bank_dtype=torch.float64, temperature=0.5)
    student, teacher, *rest = case.make(device)
    assert torch.autograd.gradcheck(
        lambda s, t: ops.contrastive_loss(s, t, *rest), (student, teacher)
    )


@devices
def test_second_derivative_is_refused(device):
    arguments = Case().make(device)
    loss = ops.contrastive_loss(*arguments)
    gradient = torch.autograd.grad(loss, arguments[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="contrastive_loss can be differentiated once"):
        gradient.sum().backward()


@devices
def test_compile_fullgraph_with_dynamic_batch(device):
    labels, offsets, ids, order, _ = (x.to(device) for x in dataset([30, 20, 10], 9))
    student, teacher, *banks = Case(batch=9, samples=60).make(device)[:4]
    z = torch.tensor(60.0, device=device)

    def step(student, teacher, labels, ids, student_bank, teacher_bank):
        indices = ops.draw_negatives(labels, offsets, 13, ids, KEY, order)
        loss = ops.contrastive_loss(
            student, teacher, student_bank, teacher_bank, indices, z, z, 0.07
        )
        ops.contrastive_update_(student_bank, teacher_bank, student, teacher, ids, 0.5)
        return loss

    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 7):
            results = []
            for function in (compiled, step):
                s, t = (x[:batch].detach().clone().requires_grad_() for x in (student, teacher))
                own = [bank.clone() for bank in banks]
                batched = (s, t, labels[:batch].clone(), ids[:batch].clone())
                for tensor in batched:
                    torch._dynamo.mark_dynamic(tensor, 0)
                loss = function(*batched, *own)
                results.append((loss.detach(), *torch.autograd.grad(loss, (s, t)), *own))
            for got, want in zip(*results, strict=True):
                assert torch.equal(got, want)


@devices
def test_inference_mode(device):
    arguments = Case().make(device)
    want = ops.contrastive_loss(*arguments).detach()
    with torch.inference_mode():
        loss = ops.contrastive_loss(*arguments)
        assert torch.equal(loss, want) and not loss.requires_grad


def test_thread_count_and_batch_split_do_not_change_a_bit():
    arguments = Case(batch=7, samples=9001, negatives=3000, dim=128).make()
    labels, offsets, ids, order, _ = dataset([300] * 30, 7)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss = ops.contrastive_loss(*arguments)
            drawn = ops.draw_negatives(labels, offsets, 5000, ids, KEY, order)
            results.append((loss, drawn, *torch.autograd.grad(loss, arguments[:2])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    part = tuple(x[2:5] if i in (0, 1, 4) else x for i, x in enumerate(arguments))
    gradient = torch.autograd.grad(ops.contrastive_loss(*part), arguments[0])[0]
    torch.testing.assert_close(gradient[2:5] * 3, results[0][2][2:5] * 7, rtol=1e-6, atol=0)


def test_strided_inputs():
    arguments = Case().make()
    want = ops.contrastive_loss(*arguments)
    strided = [
        torch.stack([x.detach(), x.detach()], -1)[..., 0] if x.dim() == 2 else x
        for x in arguments[:7]
    ]
    assert not strided[0].is_contiguous() and not strided[4].is_contiguous()
    assert torch.equal(ops.contrastive_loss(*strided, 0.07), want)


# ---- What tests/test_emulator.py runs


def _emulated_loss(*cases: Case):
    def run() -> list[Tensor]:
        results = []
        for case in cases:
            arguments = case.make()
            loss = ops.contrastive_loss(*arguments)
            results += [loss, *torch.autograd.grad(loss, arguments[:2])]
            with torch.no_grad():
                results.append(ops.contrastive_loss(*arguments))
            results += ops.contrastive_constants(*arguments[:5], case.temperature)
        return results

    return run


def _emulated_draw(counts: list[int], negatives: int):
    def run() -> list[Tensor]:
        labels, offsets, ids, order, _ = dataset(counts, 3)
        return [
            ops.draw_negatives(labels, offsets, negatives, ids, KEY, order),
            ops.draw_negatives(labels, offsets, negatives, ids, KEY),
        ]

    return run


def _emulated_update(case: Case):
    def run() -> list[Tensor]:
        student, teacher, *banks = (x.detach().clone() for x in case.make()[:4])
        index = torch.tensor([4, 0, 4, 7, 4])
        ops.contrastive_update_(*banks, student, teacher, index, 0.3)
        return banks

    return run


EMULATED = {
    "contrastive_loss": _emulated_loss(
        Case(batch=2), Case(batch=1, samples=7, negatives=1, dim=4), Case(scale=3.0, batch=1)
    ),
    "contrastive_loss tiles": _emulated_loss(Case(batch=1, negatives=530, dim=100)),
    "contrastive_loss any": _emulated_loss(
        Case(batch=2, dim=7), Case(batch=1, dim=530, negatives=9), Case(batch=1, dim=1)
    ),
    "contrastive_loss float64": _emulated_loss(
        Case(batch=2, dtype=torch.float64, bank_dtype=torch.float64),
        Case(batch=1, dim=520, negatives=10, dtype=torch.float64, bank_dtype=torch.float64),
    ),
    "contrastive_loss halves": _emulated_loss(
        Case(batch=1, dtype=torch.float16), Case(batch=1, dtype=torch.bfloat16, dim=130)
    ),
    **{
        f"draw_negatives {sum(counts)} {negatives}": _emulated_draw(counts, negatives)
        for counts, negatives in (
            ([30, 20, 10], 20),
            ([3, 4, 5], 21),
            ([2, 900, 700], 1100),
            ([1, 1], 1),
        )
    },
    "contrastive_update_": _emulated_update(Case()),
    "contrastive_update_ float64": _emulated_update(
        Case(dim=37, dtype=torch.float64, bank_dtype=torch.float64)
    ),
}
