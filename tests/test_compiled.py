"""The compiled step: one graph of student and terms, and how it is run."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from test_resume import DISTILL
from torch._dynamo.backends.debugging import aot_eager

from kdfast.errors import UsageError
from kdfast.methods import find_method
from kdfast.models import InputAdapter, Taps, create_model
from kdfast.training.compiled import Compiled
from kdfast.training.objective import Objective, plan_taps
from kdfast.training.teacher import Teacher


@pytest.mark.parametrize("names", [("kd", "at"), ("crd",), ("crd", "kd", "at")])
def test_all_terms_are_one_graph(names):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return aot_eager(graph, example)

    objective, teacher = pair(names)
    images, labels, indices = torch.randn(6, 3, 32, 32), torch.arange(6) % 3, torch.arange(6)
    answer = teacher(images, indices, 0)
    step = torch.compile(objective, fullgraph=True, backend=backend, dynamic=False)
    for _ in range(2):
        total, terms, _ = step(images, labels, *answer, indices=indices)
        total.backward()
        objective.after_step()
    report = torch._dynamo.explain(objective)(images, labels, *answer, indices=indices)
    torch.compiler.reset()
    assert len(graphs) == 1 and len(terms) == 1 + len(names)
    assert (report.graph_count, report.graph_break_count) == (1, 0)


def pair(names):
    """An objective of small networks, and what teaches it."""
    student, teacher = create_model("cifar_resnet8", 3), create_model("cifar_resnet8", 3)
    chosen = {"crd": {"negatives": 20}}
    methods = [find_method(name)(**chosen.get(name, {})) for name in names]
    plan = plan_taps(methods, student, teacher)
    taught = Teacher(teacher, plan.teacher_layers, InputAdapter((0,) * 3, (1,) * 3, (0,) * 3,
                     (1,) * 3, (32, 32)))  # fmt: skip
    objective = Objective(Taps(student, plan.student_layers), methods, dict.fromkeys(names, 1.0),
                          1.0, plan.views)  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    shapes = objective.student.calibrate(images), taught.calibrate(images)
    objective.setup(plan, *shapes, 3, training_labels=lambda: [0, 1, 2] * 20)
    return objective, taught


def test_compile_modes():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def mode(device, given=None, accumulation=1):
        compiled = Compiled(Namespace(compile_mode=given, grad_accum_steps=accumulation), device)
        return compiled.mode, compiled.replays

    assert mode(cpu) == ("default", False)
    assert mode(gpu) == ("reduce-overhead", True)
    assert mode(gpu, accumulation=2) == mode(gpu, "default", 2) == ("default", False)
    assert mode(cpu, "reduce-overhead", 2) == ("reduce-overhead", False)
    for given in ("reduce-overhead", "max-autotune"):
        with pytest.raises(UsageError, match=f"{given}.*--grad-accum-steps"):
            mode(gpu, given, 2)


def test_a_graph_is_marked_where_it_is_replayed(monkeypatch):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    for device in ("cpu", "cuda"):
        given = Namespace(compile_mode=None, grad_accum_steps=1)
        Compiled(given, torch.device(device)).begin_step()
        assert len(marks) == (device == "cuda")


def test_what_crd_keeps_is_never_replayed():
    """It is Python's work, which a replayed CUDA graph would leave out."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.kdfast.crd_observe.default.tags


def test_an_unknown_mode_is_refused(refused):
    refused(2, DISTILL, "--torchcompile", "--compile-mode", "fast", words=["fast", "max-autotune"])


def test_a_mode_of_what_is_not_compiled_is_refused(refused):
    refused(2, DISTILL, "--compile-mode", "default", words=["--compile-mode", "--torchcompile"])
