"""fsp_matrix and fsp_loss: hand values, the float64 twin, layouts, torch's machinery."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from cases import DEVICES, LAYOUTS, TOLERANCE, Calls, as_double, error
from torch import Tensor

from kdfast import ops
from kdfast.ops import reference

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])
pools = pytest.mark.parametrize("pool", ["avg", "max"])


@pytest.fixture(autouse=True)
def fused():
    """The fused path or an error: a missing library must not pass as the twin."""
    with ops.use("fused"):
        yield


@dataclass(frozen=True)
class Maps:
    """A pair of feature maps of one network."""

    first: tuple[int, int, int, int]
    second: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    second_layout: str | None = None

    def __str__(self) -> str:
        words = ["x".join(map(str, shape)) for shape in (self.first, self.second)]
        words += [str(self.dtype).removeprefix("torch."), self.layout, self.second_layout or ""]
        return "-".join(filter(None, words))

    def make(self, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Both maps, rectified and shifted like features are; both require gradients."""
        generator = torch.Generator().manual_seed(seed)
        maps = []
        for shape, layout in (
            (self.first, self.layout),
            (self.second, self.second_layout or self.layout),
        ):
            x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
            x = LAYOUTS[layout](x.to(device, self.dtype))
            maps.append(x.detach().requires_grad_())
        return maps[0], maps[1]


MAPS = [
    Maps((1, 7, 5, 5), (1, 7, 5, 5)),
    Maps((1, 1, 1, 1), (1, 1, 1, 1)),
    Maps((3, 16, 8, 8), (3, 16, 8, 8)),
    Maps((2, 16, 32, 32), (2, 16, 32, 32)),
    Maps((2, 16, 32, 32), (2, 32, 16, 16)),
    Maps((2, 32, 16, 16), (2, 64, 8, 8)),
    Maps((2, 64, 7, 7), (2, 64, 7, 7)),
    Maps((2, 5, 6, 9), (2, 9, 2, 3)),  # windows of 3 x 3
    Maps((2, 5, 6, 8), (2, 9, 6, 4)),  # of 1 x 2
    Maps((2, 5, 12, 4), (2, 3, 3, 4)),  # of 4 x 1
    Maps((2, 5, 9, 7), (2, 6, 4, 4)),  # uneven windows that overlap
    Maps((2, 3, 2, 2), (2, 4, 5, 3)),  # the second is larger
    Maps((2, 3, 8, 2), (2, 4, 4, 3)),
    Maps((1, 3, 56, 56), (1, 2, 56, 56)),
    Maps((2, 80, 4, 4), (2, 3, 2, 2)),  # more channels than the kernels take
    *(
        Maps((3, 12, 6, 4), (3, 6, 3, 2), layout=first, second_layout=second)
        for first in LAYOUTS
        for second in ("nchw", "channels_last")
    ),
    Maps((2, 17, 40, 40), (2, 30, 20, 20), layout="channels_last"),
    Maps((2, 20, 9, 9), (2, 33, 9, 9), layout="channels_last", second_layout="nchw"),
    *(
        Maps((2, 9, 6, 6), shape, dtype=dtype, layout=layout)
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
        for shape in ((2, 13, 6, 6), (2, 13, 3, 3), (2, 13, 4, 4))
        for layout in ("nchw", "channels_last")
    ),
]


def check(got: list[Tensor], want: list[Tensor], inputs: list[Tensor]) -> None:
    """A result and the gradients of `inputs`, against those of the float64 twin."""
    double = inputs[0].dtype == torch.float64
    assert got[0].dtype == (torch.float64 if double else torch.float32)
    assert error(got[0], want[0]) <= TOLERANCE[torch.float64 if double else torch.float32][0]
    for gradient, exact, feature in zip(got[1:], want[1:], inputs, strict=True):
        assert gradient.dtype == feature.dtype and gradient.shape == feature.shape
        assert error(gradient, exact) <= TOLERANCE[feature.dtype][1]


@devices
@both_paths
def test_hand_values(device, path):
    """Check 5 of the loss specification."""

    def row(*values):
        return torch.tensor(values, device=device).view(1, -1, 1, 1)

    with ops.use(path):
        first, second, other = row(1.0, 2.0), row(3.0, 4.0), row(3.0, 5.0)
        assert ops.fsp_matrix(first, second)[0].tolist() == [[3, 4], [6, 8]]
        pairs = [(first, second)], [(first, other)]
        assert ops.fsp_loss(*pairs).item() == 1.25
        assert ops.fsp_loss(pairs[0] * 3, pairs[1] * 3).item() / 9 == pytest.approx(0.416667)
        assert ops.fsp_loss(pairs[0], pairs[0]).item() == 0
        ramp = torch.arange(16.0, device=device).view(1, 1, 4, 4)
        ones = torch.ones(1, 1, 2, 2, device=device)
        assert ops.fsp_matrix(ramp, ones, "avg").item() == 7.5
        assert ops.fsp_matrix(ramp, ones, "max").item() == 10
        for pool in ("avg", "max"):
            a, b = torch.full((2, 3, 4, 4), 1.5), torch.full((2, 5, 2, 2), -2.0)
            a, b = a.to(device), b.to(device)
            assert torch.equal(ops.fsp_matrix(a, b, pool).cpu(), torch.full((2, 3, 5), -3.0))
            assert ops.fsp_loss([(a, b)], [(2 * a, b)], pool).item() == 9


@devices
@pools
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_matrix_matches_double_twin(case, pool, device):
    maps = case.make(device)
    exact = as_double(*maps)
    got, want = ops.fsp_matrix(*maps, pool), reference.fsp_matrix(*exact, pool)
    assert got.is_contiguous()
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to(device)
    check(
        [got, *torch.autograd.grad(got, maps, grad.to(got.dtype))],
        [want, *torch.autograd.grad(want, exact, grad)],
        maps,
    )


@devices
@pools
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_loss_matches_double_twin(case, pool, device):
    student, teacher = case.make(device), case.make(device, seed=1)
    inputs, exact = [*student, *teacher], as_double(*student, *teacher)
    got = ops.fsp_loss([student], [teacher], pool)
    want = reference.fsp_loss([exact[:2]], [exact[2:]], pool)
    scale = 1000.0  # half gradients must not be subnormal
    check(
        [got, *torch.autograd.grad(got * scale, inputs)],
        [want, *torch.autograd.grad(want * scale, exact)],
        inputs,
    )
    same = ops.fsp_loss([student], [[x.detach() for x in student]], pool)
    assert same == 0 and not torch.autograd.grad(same, student[0])[0].any()


def chain(device: str, seed: int, layout: str = "nchw", dtype=torch.float32) -> list[Tensor]:
    shapes = [(3, 5, 8, 8), (3, 5, 8, 8), (3, 9, 4, 4), (3, 6, 2, 2)]
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [LAYOUTS[layout](x).detach().requires_grad_() for x in features]


@devices
@pools
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_consecutive_pairs_share_their_features(layout, pool, device):
    student, teacher = chain(device, 0, layout), chain(device, 1)
    pairs = [list(pairwise(features)) for features in (student, teacher)]
    with Calls() as calls:
        loss = ops.fsp_loss(*pairs, pool)
        gradients = torch.autograd.grad(loss, (*student, *teacher))
    backward = [result for name, result in calls if "fsp_loss_backward" in name]
    assert [len(result) for result in backward] == [4, 4]
    exact = as_double(*student, *teacher)
    want = reference.fsp_loss(*[list(pairwise(exact[i : i + 4])) for i in (0, 4)], pool)
    check([loss, *gradients], [want, *torch.autograd.grad(want, exact)], [*student, *teacher])
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert all(x.is_contiguous(memory_format=format) for x in gradients[:4])


@devices
def test_unequal_sizes_and_dtypes_of_both_networks(device):
    student = Maps((2, 5, 8, 8), (2, 6, 4, 4), dtype=torch.bfloat16).make(device)
    teacher = Maps((2, 5, 6, 6), (2, 6, 6, 6), layout="channels_last").make(device, 1)
    for dtype in (torch.float32, torch.float64):
        other = tuple(x.detach().to(dtype).requires_grad_() for x in teacher)
        loss = ops.fsp_loss([student], [other])
        assert loss.dtype == dtype
        want = reference.fsp_loss([as_double(*student)], [as_double(*other)])
        assert error(loss, want) <= 1e-6


@devices
def test_many_pairs_and_one_feature_in_all(device):
    student, teacher = chain(device, 0)[:2], chain(device, 1)[:2]
    loss = ops.fsp_loss([student] * 19, [teacher] * 19)
    alone = 19 * ops.fsp_loss([student], [teacher])
    torch.testing.assert_close(loss, alone)
    gradients = (torch.autograd.grad(x, student) for x in (loss, alone))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    itself = ops.fsp_loss([(student[0], student[0])], [(teacher[0], teacher[0])])
    exact, other = as_double(student[0], teacher[0])
    want = reference.fsp_loss([(exact, exact)], [(other, other)])
    got = torch.autograd.grad(itself, student[0])[0]
    assert error(got, torch.autograd.grad(want, exact)[0]) <= 1e-5


@devices
def test_ties_of_the_maximum_and_nan_are_torchs(device):
    first = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]], device=device)
    first = first.view(1, 1, 2, 4).requires_grad_()
    second = torch.ones(1, 1, 1, 2, device=device)
    for values in (first, (first.detach() * torch.tensor([1, 1, torch.nan, 1.0], device=device))):
        values = values.detach().requires_grad_()
        results = []
        for matrix in (ops.fsp_matrix, reference.fsp_matrix):
            value = matrix(values, second, "max")
            results.append((value.detach(), torch.autograd.grad(value.sum(), values)[0]))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0)


@devices
def test_only_needed_gradients_are_computed_and_kept(device):
    student, teacher = chain(device, 0), [x.detach() for x in chain(device, 1)]
    student = [x.detach() for x in student[:3]] + [student[3]]
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = ops.fsp_loss(*[list(pairwise(x)) for x in (student, teacher)])
    assert [x.data_ptr() in kept for x in student] == [False, False, True, True]
    assert not any(x.data_ptr() in kept for x in teacher)
    with Calls() as calls:
        loss.backward()
    assert [len(grads) for name, grads in calls if "fsp_loss_backward" in name] == [1]
    first, second = Maps((2, 3, 4, 4), (2, 3, 4, 4)).make(device)
    with Calls() as calls:
        ops.fsp_matrix(first.detach(), second).sum().backward()
    assert [len(grads) for name, grads in calls if "fsp_matrix_backward" in name] == [1]


X = torch.ones(2, 3, 4, 4)


@both_paths
@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((X, X), TypeError, ["student_pairs", "sequence"]),
        (([(X, X, X)], [(X, X)]), TypeError, ["student_pairs", "pairs"]),
        (([], []), ValueError, ["at least one", "0 and 0"]),
        (([(X, X)], []), ValueError, ["1 and 0"]),
        (([(X[0], X)], [(X, X)]), ValueError, ["student_pairs[0][0]", "[3, 4, 4]"]),
        (([(X, X)], [(X, X[:0])]), ValueError, ["teacher_pairs[0][1]", "non-empty"]),
        (([(X, X.long())], [(X, X)]), TypeError, ["student_pairs[0][1]", "int64"]),
        (([(X, X)], [(X, None)]), TypeError, ["teacher_pairs[0][1]", "NoneType"]),
        (([(X, X[:1])], [(X, X)]), ValueError, ["batch size", "2", "1", "student_pairs[0][1]"]),
        (([(X, X)], [(X[:1], X[:1])]), ValueError, ["one batch size", "teacher_pairs[0][0]"]),
        (([(X, X)], [(X, X[:, :2])]), ValueError, ["channels", "3", "2", "teacher_pairs[0][1]"]),
        (([(X, X)], [(X.to("meta"), X)]), ValueError, ["one device", "meta"]),
        (([(X, X)], [(X, X)], "mean"), ValueError, ["pool", "'mean'", "avg"]),
    ],
)
def test_errors_name_op_argument_and_value(path, arguments, kind, words):
    with ops.use(path), pytest.raises(kind) as caught:
        ops.fsp_loss(*arguments)
    assert all(word in str(caught.value) for word in ["fsp_loss", *words]), caught.value


@both_paths
def test_matrix_errors(path):
    with ops.use(path):
        with pytest.raises(ValueError, match=r"fsp_matrix: second must be .* \[2, 3\]"):
            ops.fsp_matrix(X, torch.ones(2, 3))
        with pytest.raises(ValueError, match="fsp_matrix: pool"):
            ops.fsp_matrix(X, X, "sum")


CHECKED = [
    Maps((1, 7, 5, 5), (1, 7, 5, 5)),
    Maps((2, 4, 4, 6), (2, 5, 2, 3), layout="channels_last"),
    Maps((2, 4, 4, 6), (2, 5, 4, 3), layout="column_slice", dtype=torch.float64),
    Maps((3, 12, 6, 4), (3, 4, 6, 4), layout="batch_slice", dtype=torch.bfloat16),
]


@devices
@pools
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_opcheck(case, pool, device):
    student, teacher = list(case.make(device)), [x.detach() for x in case.make(device, 1)]
    library, maximum = torch.ops.kdfast, pool == "max"
    torch.library.opcheck(library.fsp_matrix.default, (*student, maximum))
    torch.library.opcheck(library.fsp_loss.default, (student, teacher, [0, 1], maximum))
    matrix = library.fsp_matrix(*teacher, maximum)
    arguments = (matrix, *teacher, maximum, [1, 0])
    torch.library.opcheck(library.fsp_matrix_backward.default, arguments)
    loss, differences = library.fsp_loss(teacher, teacher, [0, 1], maximum)
    arguments = (loss, teacher, differences, [0, 1], maximum, [1], -1.0)
    torch.library.opcheck(library.fsp_loss_backward.default, arguments)


@devices
@pools
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradcheck(layout, pool, device):
    case = Maps((2, 2, 4, 4), (2, 3, 2, 2), dtype=torch.float64, layout=layout)
    maps, others = case.make(device), case.make(device, 1)
    assert torch.autograd.gradcheck(lambda a, b: ops.fsp_matrix(a, b, pool), maps)
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: ops.fsp_loss([(a, b), (b, b)], [(c, d), (d, d)], pool), (*maps, *others)
    )


@devices
def test_second_derivative_is_refused(device):
    student, teacher = chain(device, 0)[:2], chain(device, 1)[:2]
    for op, value in (
        ("fsp_loss", ops.fsp_loss([student], [teacher])),
        ("fsp_matrix", ops.fsp_matrix(*student).square().sum()),
    ):
        gradient = torch.autograd.grad(value, student[0], create_graph=True)[0]
        with pytest.raises(NotImplementedError, match=f"{op} can be differentiated once"):
            gradient.sum().backward()


@devices
def test_compile_fullgraph_with_dynamic_batch(device):
    def step(*features):
        return ops.fsp_loss([features[:2], features[1:3]], [features[3:5], features[4:]])

    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            features = [
                torch.randn(batch, channels, size, size, device=device)
                for channels, size in ((4, 8), (5, 8), (6, 4)) * 2
            ]
            for feature in features:
                torch._dynamo.mark_dynamic(feature, 0)
            student = [feature.requires_grad_() for feature in features[:3]]
            loss, want = compiled(*features), step(*features)
            torch.testing.assert_close(loss, want)
            gradients = (torch.autograd.grad(x, student) for x in (loss, want))
            for got, want in zip(*gradients, strict=True):
                torch.testing.assert_close(got, want)


@devices
def test_autocast_and_inference_mode(device):
    conv = torch.nn.Conv2d(3, 4, 3).to(device)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device, torch.bfloat16):
        feature = conv(x)
        loss = ops.fsp_loss([(feature, feature)], [(torch.ones(2, 4, 6, 6, device=device),) * 2])
    assert feature.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert conv.weight.grad.dtype == torch.float32 and conv.weight.grad.any()
    with torch.inference_mode():
        again = ops.fsp_loss([(feature, feature)], [(torch.ones(2, 4, 6, 6, device=device),) * 2])
        assert torch.equal(again, loss.detach()) and not again.requires_grad


def test_thread_count_does_not_change_a_bit():
    student = Maps((9, 16, 32, 32), (9, 24, 16, 16)).make("cpu")
    teacher = Maps((9, 16, 32, 32), (9, 24, 16, 16)).make("cpu", 1)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss = ops.fsp_loss([student], [teacher])
            results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _emulated(pool: str, layout: str, dtype: torch.dtype):
    def run() -> list[Tensor]:
        student, teacher = chain("cpu", 0, layout, dtype), chain("cpu", 1)
        if dtype == torch.float64:
            teacher = [x.detach().double().requires_grad_() for x in teacher]
        pairs = [list(pairwise(features)) for features in (student, teacher)]
        loss = ops.fsp_loss(*pairs, pool)
        gradients = torch.autograd.grad(loss * 100, (*student, *teacher))
        matrix = ops.fsp_matrix(student[1], student[2], pool)
        return [loss, *gradients, matrix, *torch.autograd.grad(matrix.square().sum(), student[1:3])]

    return run


def _emulated_channels() -> list[Tensor]:
    maps = Maps((1, 64, 3, 3), (1, 35, 3, 3), second_layout="channels_last").make("cpu")
    matrix = ops.fsp_matrix(*maps)
    return [matrix, *torch.autograd.grad(matrix.square().sum(), maps)]


EMULATED = {
    f"fsp-{pool}-{layout}-{str(dtype).removeprefix('torch.')}": _emulated(pool, layout, dtype)
    for pool, layout, dtype in (
        ("avg", "nchw", torch.float32),
        ("max", "channels_last", torch.float32),
        ("max", "nchw", torch.float64),
        ("avg", "channels_last", torch.bfloat16),
        ("max", "nchw", torch.float16),
    )
} | {"fsp-64-channels": _emulated_channels}
