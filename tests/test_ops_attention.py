"""attention_map and attention_loss: hand values, the float64 twin, layouts, torch's machinery."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DEVICES,
    MISMATCHED,
    ODD,
    PAIRS,
    TOLERANCE,
    Calls,
    Case,
    as_double,
    error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kdfast import ops
from kdfast.ops import reference

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])


@pytest.fixture(autouse=True)
def fused():
    """The fused path or an error: a missing library must not pass as the twin."""
    with ops.use("fused"):
        yield


def loss_and_gradients(loss_of, student, teacher, power):
    """Loss and both gradients, the loss scaled so that half gradients are not subnormal."""
    loss = loss_of(student, teacher, power)
    scale = student.shape[0] * student.shape[2] * student.shape[3] * 8
    return loss, *torch.autograd.grad(loss, (student, teacher), torch.full_like(loss, scale))


@devices
@both_paths
def test_hand_values(device, path):
    def loss(student, teacher):
        shape = (1, -1, 1, 2)
        s, t = (torch.tensor(x, device=device).view(shape) for x in (student, teacher))
        with ops.use(path):
            return ops.attention_loss(s, t).item()

    assert loss([1.0, 0.0], [0.0, 1.0]) == 1
    # Student energies (1, 4) + (1, 0), teacher (4, 1) + (0, 1): A = (1, 2) and (2, 1), cos 0.8.
    assert loss([1.0, 2.0, 1.0, 0.0], [2.0, 1.0, 0.0, 1.0]) == pytest.approx(0.2, rel=1e-6)
    assert loss([3.0, 4.0], [3.0, 4.0]) == 0
    with ops.use(path):
        zero = torch.zeros(1, 2, 1, 2, device=device)
        assert ops.attention_map(zero).tolist() == [[0, 0]]
        mapped = ops.attention_map(torch.tensor([[[[1.0, 2.0]]]], device=device), power=1)
        torch.testing.assert_close(mapped.cpu(), torch.tensor([[1.0, 2.0]]) / 5**0.5)


@devices
@both_paths
def test_closed_form_and_analytic_gradient(device, path):
    """Check 4 of the loss specification, float64, 1e-12."""
    student, teacher = Case((4, 6, 3, 5), dtype=torch.float64).make(device)
    with ops.use(path):
        loss = ops.attention_loss(student, teacher)
        gradient = torch.autograd.grad(loss, student)[0]
    batch, channels, positions = 4, 6, 15
    with torch.no_grad():
        a_s, a_t = (x.square().mean(1).flatten(1) for x in (student, teacher))
        norm = a_s.norm(dim=1, keepdim=True)
        q_s, q_t = a_s / norm, a_t / a_t.norm(dim=1, keepdim=True)
        cosine = (q_s * q_t).sum(1, keepdim=True)
        slope = 2 / (batch * positions * norm) * (cosine * q_s - q_t)
        want = 2 / channels * student * slope.view(batch, 1, 3, 5)
        assert abs(loss - 2 / positions * (1 - cosine).mean()) < 1e-12
        assert (gradient - want).abs().max() < 1e-12
        assert loss <= 2 / positions


@devices
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_loss_matches_double_twin(case, device):
    student, teacher = case.make(device)
    got = loss_and_gradients(ops.attention_loss, student, teacher, case.power)
    want = loss_and_gradients(reference.attention_loss, *as_double(student, teacher), case.power)

    any_double = torch.float64 in (student.dtype, teacher.dtype)
    assert got[0].dtype == (torch.float64 if any_double else torch.float32)
    value = TOLERANCE[torch.float32][0] if not any_double else TOLERANCE[torch.float64][0]
    # Tiny maps fall under the epsilon, and identical ones have nothing to be relative to.
    assert error(got[0], want[0]) <= value or abs(got[0] - want[0]) < 1e-15
    for gradient, exact, feature in zip(got[1:], want[1:], (student, teacher), strict=True):
        assert gradient.dtype == feature.dtype and gradient.shape == feature.shape
        if case.values in ("zero", "identical"):
            assert not gradient.any()
        elif feature[0, 0].numel() == 1:  # the map is 1 whatever the feature
            assert gradient.abs().max() < 1e-5
        else:
            assert error(gradient, exact) <= TOLERANCE[feature.dtype][1]


@devices
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_map_matches_double_twin(case, device):
    feature, _ = case.make(device)
    got = ops.attention_map(feature, case.power)
    exact = feature.detach().double().requires_grad_()
    want = reference.attention_map(exact, case.power)
    assert got.dtype == (torch.float64 if feature.dtype == torch.float64 else torch.float32)
    assert got.is_contiguous()
    assert error(got, want) <= TOLERANCE[feature.dtype][0]

    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(got)
    gradient = torch.autograd.grad(got, feature, upstream)[0]
    want = torch.autograd.grad(want, exact, upstream.double())[0]
    # One position: the map is 1 whatever the feature, and both gradients are rounding errors.
    if got.shape[1] > 1:
        assert error(gradient, want) <= TOLERANCE[feature.dtype][1]


@devices
@pytest.mark.parametrize("case", MISMATCHED, ids=str)
def test_sizes_are_matched_by_pooling_the_feature(case, device):
    student, teacher = case.make(device)
    got = loss_and_gradients(ops.attention_loss, student, teacher, case.power)
    s, t = as_double(student, teacher)
    size = [min(s.shape[i], t.shape[i]) for i in (2, 3)]

    def pooled_loss(s, t, power):
        s, t = (F.adaptive_avg_pool2d(x, size) for x in (s, t))
        maps = [F.normalize(x.square().mean(1).flatten(1)) for x in (s, t)]
        return (maps[0] - maps[1]).square().mean()

    for result, want in zip(got, loss_and_gradients(pooled_loss, s, t, 2.0), strict=True):
        assert error(result, want) <= TOLERANCE[student.dtype][1]


@devices
def test_sequences_sum_over_pairs(device):
    cases = [
        Case((3, 4, 8, 8)),
        Case((3, 8, 4, 4), layout="channels_last", dtype=torch.bfloat16),
        Case((3, 16, 2, 2), teacher_shape=(3, 5, 4, 4)),
    ]
    pairs = [case.make(device, seed) for seed, case in enumerate(cases)]
    students, teachers = zip(*pairs, strict=True)
    total = ops.attention_loss(students, list(teachers))
    alone = sum(ops.attention_loss(s, t) for s, t in pairs)
    torch.testing.assert_close(total, alone)
    gradients = (torch.autograd.grad(loss, (*students, *teachers)) for loss in (total, alone))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@devices
def test_many_pairs(device):
    pairs = [Case((2, 3, 2, 2)).make(device, seed) for seed in range(35)]
    students, teachers = zip(*pairs, strict=True)
    total = ops.attention_loss(students, teachers)
    want = sum(reference.attention_loss(s.double(), t.double()) for s, t in pairs)
    assert error(total, want) <= 1e-6
    for s, gradient in zip(students, torch.autograd.grad(total, students), strict=True):
        assert gradient.shape == s.shape and gradient.any()


@devices
@pytest.mark.parametrize(
    ("layout", "channels_last"),
    [("nchw", False), ("channels_last", True), ("channel_slice", False), ("transposed", False)],
)
def test_gradient_keeps_the_memory_format(layout, channels_last, device):
    student, teacher = Case((2, 4, 3, 5), layout=layout).make(device)
    gradient = torch.autograd.grad(ops.attention_loss(student, teacher), student)[0]
    format = torch.channels_last if channels_last else torch.contiguous_format
    assert gradient.is_contiguous(memory_format=format)


@devices
def test_only_needed_gradients_are_computed_and_kept(device):
    student, teacher = Case((2, 4, 8, 8)).make(device)
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = ops.attention_loss([student, student], [teacher.detach()] * 2)
    assert student.data_ptr() in kept and teacher.data_ptr() not in kept

    with Calls() as calls:
        loss.backward()
    assert [len(grads) for name, grads in calls if "attention_loss_backward" in name] == [2]
    assert teacher.grad is None

    with Calls() as calls:
        torch.autograd.grad(ops.attention_loss(student.detach(), teacher), teacher)
    assert [len(grads) for name, grads in calls if "attention_loss_backward" in name] == [1]


X = torch.ones(2, 3, 4, 4)


@both_paths
@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((X[0], X), ValueError, ["student[0]", "[N, C, H, W]", "[3, 4, 4]"]),
        ((X, X[:0]), ValueError, ["teacher[0]", "non-empty", "[0, 3, 4, 4]"]),
        ((X.int(), X), TypeError, ["student[0]", "torch.int32"]),
        ((3, X), TypeError, ["sequence", "int"]),
        ((X, [X]), TypeError, ["Tensor and list"]),
        (([], []), ValueError, ["at least one", "0 and 0"]),
        (([X, X], [X]), ValueError, ["2 and 1"]),
        (([None], [None]), TypeError, ["student[0]", "NoneType"]),
        ((X, X[:1]), ValueError, ["batch size", "2", "1", "teacher[0]"]),
        ((X, X.to("meta")), ValueError, ["one device", "meta"]),
        ((X, X, 0), ValueError, ["power", "0"]),
        ((X, X, float("nan")), ValueError, ["power", "nan"]),
    ],
)
def test_errors_name_op_argument_and_value(path, arguments, kind, words):
    with ops.use(path), pytest.raises(kind) as caught:
        ops.attention_loss(*arguments)
    assert all(word in str(caught.value) for word in ["attention_loss", *words]), caught.value


@both_paths
def test_map_errors(path):
    with ops.use(path):
        with pytest.raises(ValueError, match=r"attention_map: feature must be .* \[2, 3\]"):
            ops.attention_map(torch.ones(2, 3))
        with pytest.raises(TypeError, match=r"attention_map: feature must be float32.*int64"):
            ops.attention_map(X.long())


CHECKED = [
    Case(ODD),
    Case((2, 4, 4, 6), layout="channels_last", power=1.0),
    Case((2, 4, 4, 6), layout="column_slice", dtype=torch.float64, power=3.0),
    Case((3, 12, 6, 4), layout="batch_slice", dtype=torch.bfloat16),
    Case((3, 5, 6, 4), layout="transposed", dtype=torch.float16),
]


@devices
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_opcheck(case, device):
    student, teacher = case.make(device)
    library = torch.ops.kdfast
    torch.library.opcheck(library.attention_map.default, (student, case.power))
    pairs = ([student, teacher], [teacher, student.detach()], case.power)
    torch.library.opcheck(library.attention_loss.default, pairs)

    student, teacher = student.detach(), teacher.detach()
    map, norm = library.attention_map(student, case.power)
    arguments = (torch.ones_like(map), student, map, norm, case.power)
    torch.library.opcheck(library.attention_map_backward.default, arguments)
    loss, maps, products = library.attention_loss([student], [teacher], case.power)
    arguments = (torch.ones_like(loss), [teacher, student], maps, products, case.power, [1, 0])
    torch.library.opcheck(library.attention_loss_backward.default, arguments)


@devices
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("power", [2.0, 1.0, 0.5, 3.0])
def test_gradcheck(power, layout, device):
    case = Case((2, 3, 2, 3), teacher_shape=(2, 2, 2, 3), dtype=torch.float64, layout=layout)
    student, teacher = case.make(device)
    assert torch.autograd.gradcheck(lambda x: ops.attention_map(x, power), student)
    assert torch.autograd.gradcheck(
        lambda s, t: ops.attention_loss([s, t], [t, s], power), (student, teacher)
    )


@devices
def test_second_derivative_is_refused(device):
    student, teacher = Case(ODD).make(device)
    for op, value in (
        ("attention_loss", ops.attention_loss(student, teacher)),
        ("attention_map", ops.attention_map(student).square().sum()),
    ):
        gradient = torch.autograd.grad(value, student, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match=f"{op} can be differentiated once"):
            gradient.sum().backward()


@devices
def test_compile_fullgraph_with_dynamic_batch(device):
    def step(student, teacher):
        maps = ops.attention_map(student)
        return ops.attention_loss([student, student * 2], [teacher, teacher]) + maps.mean()

    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            case = Case((batch, 4, 8, 8), teacher_shape=(batch, 6, 4, 4))
            student, teacher = case.make(device)
            teacher = teacher.detach()
            for feature in (student, teacher):
                torch._dynamo.mark_dynamic(feature, 0)
            loss, want = compiled(student, teacher), step(student, teacher)
            torch.testing.assert_close(loss, want)
            got, want = (torch.autograd.grad(x, student)[0] for x in (loss, want))
            torch.testing.assert_close(got, want)


@devices
def test_autocast_takes_what_the_network_gives(device):
    conv = torch.nn.Conv2d(3, 4, 3).to(device)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device, torch.bfloat16):
        feature = conv(x)
        loss = ops.attention_loss(feature, torch.ones(2, 5, 6, 6, device=device))
    assert feature.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert conv.weight.grad.dtype == torch.float32 and conv.weight.grad.any()


@devices
def test_inference_mode(device):
    student, teacher = Case(ODD).make(device)
    want = ops.attention_loss(student, teacher).detach()
    with torch.inference_mode():
        loss = ops.attention_loss(student, teacher)
        assert torch.equal(loss, want) and not loss.requires_grad
        assert ops.attention_map(student).is_inference()


def test_thread_count_does_not_change_a_bit():
    student, teacher = Case((5, 40, 32, 32)).make("cpu")
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(ops.attention_loss, student, teacher, 2.0))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 32, 256, 256), (2, 33, 257, 259)])
def test_large_gradients_reuse_memory_but_never_share_it(shape, layout):
    """Large enough for streaming stores and for the list of released buffers."""
    student, teacher = Case(shape, layout=layout).make("cpu")
    loss = ops.attention_loss(student, teacher)
    first, second = torch.autograd.grad(loss, (student, teacher))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    exact = as_double(student, teacher)
    want = torch.autograd.grad(reference.attention_loss(*exact), exact)
    assert error(first, want[0]) < 1e-5 and error(second, want[1]) < 1e-5

    kept, place = first.clone(), second.untyped_storage().data_ptr()
    del second
    third = torch.autograd.grad(ops.attention_loss(student, teacher) * 2, student)[0]
    assert third.untyped_storage().data_ptr() == place
    assert torch.equal(first, kept) and error(third, 2 * kept) < 1e-6


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(*(st.integers(1, 6) for _ in range(4))),
    st.floats(1e-3, 1e3),
    st.sampled_from([1.0, 2.0, 2.5]),
    st.integers(0, 2**31),
)
def test_laws(shape, factor, power, seed):
    """0 <= L <= 2/N; L(F, F) = 0; L(k F, G) = L(F, G); L(F, G) = L(G, F)."""
    student, teacher = (x.detach() for x in Case(shape, dtype=torch.float64).make("cpu", seed))
    loss = ops.attention_loss(student, teacher, power)
    assert 0 <= loss <= 2 / (shape[2] * shape[3])
    assert ops.attention_loss(student, student, power) == 0
    for s, t in ((student * factor, teacher), (teacher, student)):
        other = ops.attention_loss(s, t, power)
        torch.testing.assert_close(other, loss, atol=1e-14, rtol=1e-10)


def _emulated_loss(*cases: Case):
    def run() -> list[torch.Tensor]:
        pairs = [case.make("cpu", seed) for seed, case in enumerate(cases)]
        students, teachers = zip(*pairs, strict=True)
        features = (*students, *teachers)
        loss = ops.attention_loss(students, teachers, cases[0].power)
        # Scaled so that half gradients are not subnormal.
        scale = torch.full_like(loss, 1000)
        return [loss, *torch.autograd.grad(loss, features, scale)]

    return run


def _emulated_map(case: Case):
    def run() -> list[torch.Tensor]:
        feature, _ = case.make("cpu")
        map = ops.attention_map(feature, case.power)
        upstream = torch.randn(map.shape, generator=torch.Generator().manual_seed(1)).to(map)
        return [map, *torch.autograd.grad(map, feature, upstream)]

    return run


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Packs of 16 bytes and single elements, both layouts, tiles of 128 positions cut short, every
# specialised power; then launches of several pairs, more than one table (16) of them.
_SINGLE = [
    *(
        Case(shape, dtype=dtype, layout=layout)
        for dtype in FLOATS
        for shape, layout in (
            (ODD, "nchw"),
            (ODD, "channels_last"),
            ((2, 24, 4, 6), "nchw"),
            ((2, 24, 4, 6), "channels_last"),
        )
    ),
    Case((1, 9, 13, 11)),
    Case((1, 8, 16, 9), layout="channels_last"),
    Case((2, 300, 2, 2), layout="channels_last"),
    Case((1, 70, 2, 2)),
    Case((2, 8, 4, 4), layout="unaligned"),
    Case((2, 8, 4, 4), layout="channel_slice"),
    Case((2, 8, 4, 4), layout="transposed"),
    Case((2, 3, 1, 1)),
    *(
        Case((2, 8, 3, 4), dtype=dtype, layout=layout, values="relu", power=power)
        for dtype, layout in (
            (torch.float32, "nchw"),
            (torch.float64, "channels_last"),
            (torch.bfloat16, "channels_last"),
        )
        for power in (1.0, 2.5)
    ),
]
EMULATED = {
    **{f"attention_map {case}": _emulated_map(case) for case in _SINGLE},
    **{f"attention_loss {case}": _emulated_loss(case) for case in _SINGLE},
    "attention_loss zero": _emulated_loss(Case((2, 8, 4, 4), values="zero_sample")),
    "attention_map zero": _emulated_map(Case((2, 8, 4, 4), values="zero_sample")),
    "attention_loss dtypes": _emulated_loss(
        Case((2, 8, 4, 4), dtype=torch.float16, teacher_dtype=torch.bfloat16),
        Case((2, 5, 3, 7), teacher_shape=(2, 12, 3, 7), teacher_layout="channels_last"),
        Case((2, 5, 12, 12), teacher_dtype=torch.bfloat16),
    ),
    "attention_loss 17 pairs": _emulated_loss(*[Case((1, 2, 2, 3))] * 17),
}
