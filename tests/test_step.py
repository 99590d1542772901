"""A training step keeps the machine busy: it never waits for a number, and computes little else."""

from __future__ import annotations

import csv
import math
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from test_resume import DISTILL
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast import ops
from kdfast.data import Batch, Loader, ResidentLoader
from kdfast.data.loader import Portion
from kdfast.models import checksum
from kdfast.training import loop
from kdfast.training.ahead import Ready, made_ready
from kdfast.training.tally import Tally

FEW = ("--train-limit", 203, "--eval-limit", 90, "--output", "out", "--epochs", 2,
       "--student", "cifar_resnet8", "--no-baseline", "--teacher", "cifar_resnet8")  # fmt: skip
# Operations whose result's shape or value the host has to know.
READING = (
    "_local_scalar_dense", "item", "nonzero", "argwhere", "equal", "is_nonzero", "masked_select",
    "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "allclose", "repeat_interleave", "masked_scatter",
)  # fmt: skip
TELLING = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__",
           "__array__", "__repr__", "__format__")  # fmt: skip


class Waits:
    """Notes what makes the host wait for the device, or would if there were one."""

    def __init__(self):
        self.found: list[str] = []
        self.steps, self.watching = 0, False

    def note(self, name: str) -> None:
        if self.watching:
            self.found.append(name)

    @contextmanager
    def looking_away(self):
        before, self.watching = self.watching, False
        yield
        self.watching = before

    @contextmanager
    def watch(self):
        waits = self

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function.overloadpacket.__name__
                indices = args[1] if name in ("index", "index_put", "index_put_") else ()
                masks = [x for x in indices if x is not None and x.dtype == torch.bool]
                if name in READING or masks:
                    waits.note(f"aten.{name}" + " by a mask" * bool(masks))
                return function(*args, **(kwargs or {}))

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                name = getattr(function, "__name__", "")
                if name in TELLING or (name == "to" and isinstance(args[1], str)):
                    waits.note(f"Tensor.{name}")
                return function(*args, **(kwargs or {}))

        with Operations(), Functions():
            self.watching = True
            yield
            self.watching = False


@pytest.fixture
def waits(monkeypatch) -> Waits:
    """Watches all training steps of all runs, but not how workers come by the images.

    Images on the device are drawn at the beginning of an epoch; `crop_flip` checks its indices on
    CPUs alone.
    """
    found = Waits()
    train, update = loop.Trainer._train_epoch, loop.Trainer._update
    epoch, resident, crop_flip = Loader.epoch, ResidentLoader.epoch, ops.crop_flip

    def watched(self, started):
        with found.watch():
            return train(self, started)

    def loaded(self, *args, **more):
        batches = epoch(self, *args, **more)
        while True:
            with found.looking_away():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def begun(self, *args, **more):
        batches = resident(self, *args, **more)
        with found.looking_away():
            first = next(batches)
        yield first
        yield from batches

    def cropped(*args, **more):
        with found.looking_away():
            return crop_flip(*args, **more)

    def counted(self):
        found.steps += found.watching
        update(self)

    monkeypatch.setattr(loop.Trainer, "_train_epoch", watched)
    monkeypatch.setattr(loop.Trainer, "_update", counted)
    monkeypatch.setattr(Loader, "epoch", loaded)
    monkeypatch.setattr(ResidentLoader, "epoch", begun)
    monkeypatch.setattr(ops, "crop_flip", cropped)
    return found


STEPS = {
    "kd+at": ("--method", "kd", "at"),
    "crd": ("--method", "crd", "kd", "--crd-negatives", 50),
    "fsp": ("--method", "fsp", "--recipe", "self", "--model-kwargs", "init=default"),
    "fitnet": ("--method", "fitnet"),
    "logits": ("--method", "logits"),
    "clipped": ("--method", "kd", "at", "--clip-grad", 1),
    "averaged": ("--method", "kd", "--model-ema"),
    "accumulated": ("--method", "kd", "crd", "--crd-negatives", 50, "--grad-accum-steps", 2),
    "path": ("--method", "kd", "--path-length", "layer1.0.conv1", "fc"),
    "smoothed": ("--method", "kd", "at", "--smoothing", 0.1),
    "frozen": ("--method", "kd", "--freeze-bn", "--channels-last", "--amp"),
    "adamw": ("--method", "kd", "--opt", "adamw"),
    "nesterov": ("--method", "kd", "--opt", "sgd", "--sched", "cosine", "--sched-on-updates"),
}


@pytest.mark.parametrize("flags", STEPS.values(), ids=STEPS)
def test_a_step_waits_for_nothing(run_script, teacher_run, waits, flags):
    """Not between readings at the log interval; CRD's Z is checked in its first step alone."""
    teacher = ("--teacher-checkpoint", teacher_run, "--log-interval", 1000)
    code, _, err = run_script(DISTILL, *FEW, "-b", 32, *flags, *teacher)
    assert code == 0, err
    assert waits.steps >= 2 * (3 if "--grad-accum-steps" in flags else 6)
    assert waits.found == []


PLANTED = {
    "item": "student.logits.sum().item()",
    "branch": "bool(student.logits.sum() > 0)",
    "mask": "student.logits[student.logits > 0].sum()",
    "host": "student.logits.detach().cpu()",
    "moved": "student.logits.detach().to('cpu')",
    "nonzero": "(labels > 3).nonzero()",
    "print": "f'{student.logits.sum():.3f}'",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_wait_is_found(run_script, teacher_run, waits, tmp_path, name):
    (tmp_path / "planted.py").write_text(f'''
from kdfast.methods import Method, method

@method("planted")
class Planted(Method):
    """Waits for the device."""

    def taps(self):
        return "none"

    def forward(self, student, teacher, labels):
        {PLANTED[name]}
        return student.logits.sum() * 0
''')
    flags = ("--plugin", "planted.py", "--method", "planted", "--epochs", 1)
    flags += ("--teacher-checkpoint", teacher_run, "--log-interval", 1000)
    assert run_script(DISTILL, *FEW, *flags)[0] == 0
    assert len(waits.found) >= waits.steps > 0


# Numbers of an epoch.


@pytest.mark.parametrize("readings", [(), (1,), (3, 4, 100), tuple(range(300))])
def test_sums_do_not_depend_on_readings(readings):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 4, generator=generator) * 1e3
    begun = [0.1, 0.2, 0.3, 0.4, 17.0]
    tally, want = Tally(begun), torch.tensor(begun, dtype=torch.float64)
    for i, row in enumerate(rows):
        tally.add(row[0], row[1:], 5 + i % 3, i)
        want[:-1] += row.double() * (5 + i % 3)
        want[-1] += 5 + i % 3
        if i in readings:
            assert torch.equal(tally.sums, want)
    assert tally.sums.dtype == torch.float64 and torch.equal(tally.sums, want)
    assert tally.first_bad.tolist() == [math.inf] * 4


def test_results_of_compiled_code_may_be_overwritten():
    tally, total, terms = Tally([0.0] * 4), torch.tensor(2.0), torch.tensor([3.0, 4.0])
    tally.add(total, terms, 10, 1)
    total.zero_(), terms.zero_()
    assert tally.sums.tolist() == [20, 30, 40, 10]


def test_the_first_bad_step_of_each_term():
    tally = Tally([0.0] * 4)
    for step, total, term in ((7, 1.0, 1.0), (8, math.inf, 1.0), (9, math.nan, -math.inf)):
        tally.add(torch.tensor(total), torch.tensor([1.0, term]), 2, step)
        if step == 8:
            assert tally.first_bad.tolist() == [8, math.inf, math.inf]
    assert tally.first_bad.tolist() == [8, math.inf, 9]


# The teacher ahead.


class FakeSide:
    """A side stream as the loop uses it, that notes the order of calls."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.marks = 0

    def run(self, work):
        ready, self.marks = work(), self.marks + 1
        self.calls.append(("run", None if ready is None else ready.portion.indices))
        return ready, self.marks

    def hand_over(self, ready, mark):
        self.calls.append(("hand over", ready.portion.indices, mark))


def batches(count):
    for i in range(count):
        one = torch.tensor([i])
        yield Batch(one, one, one, Portion([i], 1, 1.0, True, True))


def ready(batch):
    return Ready(batch.portion, batch.images, batch.labels, batch.indices)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_batch_ahead(count):
    side = FakeSide()
    for batch in made_ready(batches(count), ready, side):
        side.calls.append(("train", batch.portion.indices))
    ends = [("run", [i]) for i in range(count)] + [("run", None)]
    wanted = ends[:1]
    for i in range(count):
        wanted += [ends[i + 1], ("hand over", [i], i + 1), ("train", [i])]
    assert side.calls == wanted
    plain = [batch.portion.indices for batch in made_ready(batches(count), ready)]
    assert plain == [[i] for i in range(count)]


def test_nothing_is_made_ready_early_without_a_side():
    made = []
    for _ in made_ready(batches(3), lambda batch: made.append(batch) or ready(batch)):
        made.append("train")
    assert made[1::2] == ["train"] * 3


def outcome(folder):
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["images_per_second"]
    return rows, checksum(load_file(folder / "last.safetensors"))


def test_a_teacher_ahead_changes_nothing(run_script, teacher_run, tmp_path, monkeypatch):
    """Bits of a network with dropout; also resumed within an epoch, where a batch was ready."""
    flags = (DISTILL, *FEW, "--method", "kd", "crd", "--crd-negatives", 50, "--hflip", 0.5, "-b",
             64, "--student", "resnet10t", "--model-kwargs", "drop_rate=0.3", "--img-size", 32,
             "--teacher-checkpoint", teacher_run, "--checkpoint-steps", 1)  # fmt: skip
    flags += ("--checkpoint-hist", 50)
    assert run_script(*flags, "--experiment", "plain")[0] == 0
    side = FakeSide()
    monkeypatch.setattr(loop.Trainer, "_side", lambda self: side)
    assert run_script(*flags, "--experiment", "ahead")[0] == 0
    wanted = outcome(tmp_path / "out" / "plain")
    assert outcome(tmp_path / "out" / "ahead") == wanted
    assert [name for name, *_ in side.calls].count("hand over") == 2 * 4
    for path in (tmp_path / "out" / "ahead" / "checkpoints").iterdir():
        if path.name > "epoch-0001-step-000002":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    again = run_script(*flags, "--experiment", "ahead", "--resume", "auto", "--no-teacher-ahead")
    assert again[0] == 0, again[2]
    assert outcome(tmp_path / "out" / "ahead") == wanted
