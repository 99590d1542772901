"""ContrastMemory: check 8 of the loss specification, state dicts, several processes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICES
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast import ops
from kdfast.methods.crd import ContrastMemory

devices = pytest.mark.parametrize("device", DEVICES)
both_paths = pytest.mark.parametrize("path", ["fused", "reference"])
SIZE, DIM, NEGATIVES = 60, 8, 13


def batch(first: int, count: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """(student, teacher, index, negatives) of samples first, first + 1, ..."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (F.normalize(torch.randn(SIZE, DIM, generator=generator)) for _ in range(2))
    indices = torch.randint(SIZE, (SIZE, NEGATIVES + 1), generator=generator)
    index = torch.arange(first, first + count)
    indices[:, 0] = torch.arange(SIZE)
    return tuple(x.to(device) for x in (student[index], teacher[index], index, indices[index]))


def memory(device: str = "cpu", seed: int = 1) -> ContrastMemory:
    torch.manual_seed(seed)
    return ContrastMemory(SIZE, DIM, NEGATIVES).to(device)


def test_initial_rows_have_expected_length_one():
    own = ContrastMemory(2000, 128, 5)
    assert set(own.state_dict()) == {"student_bank", "teacher_bank", "z_student", "z_teacher"}
    for bank in (own.student_bank, own.teacher_bank):
        assert bank.abs().max() <= (3 / 128) ** 0.5
        assert bank.square().sum(1).mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(own.student_bank, own.teacher_bank)
    assert not list(own.parameters())


@devices
@both_paths
def test_two_steps(device, path):
    own, (student, teacher, index, negatives) = memory(device), batch(3, 5, device)
    before = {name: x.clone() for name, x in own.state_dict().items()}
    with ops.use(path):
        loss = own(student, teacher, index, negatives)
        z = own.z_student.clone(), own.z_teacher.clone()
        banks = before["student_bank"], before["teacher_bank"]
        want = ops.contrastive_constants(student, teacher, *banks, negatives, 0.07)
        torch.testing.assert_close(z, want)
        assert torch.equal(own.student_bank, banks[0])  # the update has not come yet
        torch.testing.assert_close(
            loss, ops.contrastive_loss(student, teacher, *banks, negatives, *z, 0.07)
        )
        own.update()
        others = torch.ones(SIZE, dtype=torch.bool, device=device)
        others[index] = False
        for now, old in ((own.student_bank, banks[0]), (own.teacher_bank, banks[1])):
            assert torch.equal(now[others], old[others])
            torch.testing.assert_close(now[index].norm(dim=1), torch.ones(5, device=device))
        own(*batch(20, 4, device))
        assert torch.equal(own.z_student, z[0]) and torch.equal(own.z_teacher, z[1])


@both_paths
@pytest.mark.parametrize("update_first", [False, True])
def test_gradients_reach_the_heads_and_the_student_only(path, update_first):
    torch.manual_seed(0)
    backbone, teacher = nn.Linear(6, 10), nn.Linear(6, 12).requires_grad_(False)
    heads = nn.ModuleList([nn.Linear(10, DIM), nn.Linear(12, DIM)])
    own, x = memory(), torch.randn(5, 6)
    with ops.use(path):
        e_s, e_t = F.normalize(heads[0](backbone(x))), F.normalize(heads[1](teacher(x)))
        loss = own(e_s, e_t, *batch(3, 5)[2:])
        if update_first:
            own.update()
        loss.backward()
    for parameter in (*backbone.parameters(), *heads.parameters()):
        assert parameter.grad is not None and parameter.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert own.student_bank.grad is None and own.teacher_bank.grad is None


@both_paths
def test_checkpoints_carry_banks_and_constants(path):
    with ops.use(path):
        own = memory()
        first = own(*batch(3, 5))
        own.update()
        saved = io.BytesIO()
        torch.save(own.state_dict(), saved)
        saved.seek(0)
        other = memory(seed=9)
        other.load_state_dict(torch.load(saved, weights_only=True))
        assert torch.equal(own(*batch(20, 4)), other(*batch(20, 4)))
        own.update()
        other.update()
        for name, value in own.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name

        # A state from before the first batch is still unset, also in a memory that was set.
        other.load_state_dict(memory().state_dict())
        assert torch.equal(other(*batch(3, 5)), first)


def test_autocast_and_half_embeddings():
    own = memory()
    student, teacher, *rest = batch(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = own(student.bfloat16(), teacher.half(), *rest)
    own.update()
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_misuse_is_refused():
    own = memory()
    with pytest.raises(RuntimeError, match="a forward before"):
        own.update()
    student, teacher, index, negatives = batch(3, 5)
    with pytest.raises(ValueError, match=r"\[B, 14\].*\[5, 13\]"):
        own(student, teacher, index, negatives[:, 1:])
    own(student, teacher, index, negatives)
    own.update()
    with pytest.raises(RuntimeError, match="a forward before"):
        own.update()
    for arguments, word in (
        ((0, 8, 3), "size"),
        ((5, 8, 0), "negatives"),
        ((5, 8, 3, 0.0), "temperature"),
        ((5, 8, 3, 0.07, 1.1), "momentum"),
    ):
        with pytest.raises(ValueError, match=f"ContrastMemory: {word}"):
            ContrastMemory(*arguments)


@both_paths
def test_forwards_before_an_update_are_one_step(path):
    """Micro-batches are scored against the same banks; of a sample seen twice the last counts."""
    with ops.use(path):
        own, whole = memory(), memory()
        for x in (own, whole):
            x(*batch(20, 4))
            x.update()
        before = own.student_bank.clone()
        parts = [own(*batch(start, 3)) for start in (3, 6)]
        assert torch.equal(own.student_bank, before)
        own.update()
        torch.testing.assert_close(sum(parts) / 2, whole(*batch(3, 6)))
        whole.update()
        torch.testing.assert_close(own.state_dict(), whole.state_dict())

        own(*batch(3, 4, seed=5))
        own(*batch(5, 2))
        own.update()
        whole(*batch(3, 2, seed=5))
        whole.update()
        whole(*batch(5, 2))
        whole.update()
        torch.testing.assert_close(own.state_dict(), whole.state_dict())


def steps(plan: list[list[tuple[int, int, int]]]) -> dict[str, Tensor]:
    """A memory after steps of micro-batches (first sample, count, seed of the embeddings)."""
    own = memory().double()
    for step in plan:
        for first, count, seed in step:
            student, teacher, *rest = batch(first, count, seed=seed)
            rest[1] = batch(first, count)[3]
            loss = own(student.double(), teacher.double(), *rest)
        own.update()
    return {**own.state_dict(), "loss": loss.detach()}


# Uneven slices 7 = 4 + 3; then micro-batches of 6 and of the sample 40 alone, which process 1
# repeats without having one, with an embedding of its own; then 6 = 3 + 3.
ONE = [[(3, 7, 0)], [(30, 6, 0), (40, 1, 0)], [(20, 6, 0)]]
MANY = (
    [[(3, 4, 0)], [(30, 3, 0), (40, 1, 0)], [(20, 3, 0)]],
    [[(7, 3, 0)], [(33, 3, 0), (40, 1, 9)], [(23, 3, 0)]],
)
WORKER = """
import sys, torch
from torch import distributed
sys.path.insert(0, sys.argv[1])
from test_contrast_memory import MANY, steps
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.save(steps(MANY[rank]), sys.argv[2] + str(rank))
distributed.destroy_process_group()
"""


def test_two_processes_keep_the_banks_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(script), str(Path(__file__).parent), str(tmp_path / "rank")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one = steps(ONE)
    zero, other = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    for name in ("student_bank", "teacher_bank", "z_student", "z_teacher"):
        assert torch.equal(zero[name], other[name]), name
        torch.testing.assert_close(zero[name], one[name], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close((zero["loss"] + other["loss"]) / 2, one["loss"])
