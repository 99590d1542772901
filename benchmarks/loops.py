"""Training as the scripts do it against the loops of published.py, epoch by epoch in turn."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import where
from common import markdown, peak_from_now, summary
from published import LOOPS, Loop

from kdfast.data import Batch, BatchPlan, ImageData, Loader
from kdfast.data.sources import ArraySource
from kdfast.models import default_stages
from kdfast.training.distillation import Assembly, assemble, ready_teacher
from kdfast.training.flags import data_flags, model_flags, run_flags, training_flags
from kdfast.training.keeper import StudentKeeper
from kdfast.training.loop import Trainer
from kdfast.training.objective import choose_methods
from kdfast.training.options import parse
from kdfast.training.parser import Parser
from kdfast.training.run_folder import RunFolder
from kdfast.training.setup import arguments_of, metadata, start
from kdfast.training.transfer_flags import distill_flags

BATCH, CLASSES, IMAGES = 64, 100, 50_000
OURS, THEIRS = "kdfast", "published loop"


@dataclass(frozen=True)
class Pair:
    """What is trained in both ways: networks, the flags of ours, the goal for their ratio."""

    teacher: str
    student: str
    flags: tuple[str, ...]
    goal: dict[str, float]

    @property
    def what(self) -> str:
        return f"{self.teacher} -> {self.student}"


PAIRS = {
    "at+kd": Pair(
        "cifar_resnet110",
        "cifar_resnet20",
        ("--recipe", "self", "--method", "kd", "at"),
        {"cpu": 2.0, "cuda": 3.0},
    ),
    "crd": Pair(
        "cifar_resnet110",
        "cifar_resnet20",
        ("--recipe", "crd", "--method", "crd"),
        {"cpu": 2.0, "cuda": 10.0},
    ),
    "wrn kd": Pair("cifar_wrn40_2", "cifar_wrn16_2", ("--recipe", "crd", "--method", "kd"), {}),
    "dih loop": Pair(
        "cifar_resnet110", "cifar_resnet8", ("--recipe", "dih", "--method", "dih"), {}
    ),
}


def images() -> ImageData:
    """As many random images, sizes and classes as CIFAR-100 has, normalised as those are."""
    draw = np.random.default_rng(0)

    def source(count: int) -> ArraySource:
        pixels = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return ArraySource(pixels, draw.integers(0, CLASSES, count), "noise")

    figures = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    return ImageData("noise", source(IMAGES), source(BATCH), CLASSES, 32, *figures, in_memory=True)


class Few(BatchPlan):
    """The first `steps` steps of every epoch of another plan."""

    def __init__(self, plan: BatchPlan, steps: int):
        vars(self).update(vars(plan))
        self.few = steps

    @property
    def steps(self) -> int:
        return self.few


class Clocked:
    """`loader` cut to a few steps, timed from the first wait for a batch to the end of the last.

    `seconds` and `waits` have a number an epoch, of which `waits` are for batches. `before` is
    called before each, `after` after it.
    """

    def __init__(
        self,
        loader: Loader,
        steps: int,
        before: Callable[[], None],
        after: Callable[[], None] = lambda: None,
    ):
        self.loader, self.plan = loader, Few(loader.plan, steps)
        self.before, self.after = before, after
        self.seconds: list[float] = []
        self.waits: list[float] = []

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self.before()
        begin, waited = time.perf_counter(), 0.0
        batches = islice(self.loader.epoch(epoch, first_step), self.plan.steps)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            yield batch
        _finish()
        self.seconds.append(time.perf_counter() - begin)
        self.waits.append(waited)
        self.after()

    def close(self) -> None:
        self.loader.close()


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Ours:
    """A distillation as train/distill.py makes it, up to its first step, in a folder of its own."""

    def __init__(self, pair: Pair, folder: Path, epochs: int, compiled: bool):
        parser = Parser(prog="benchmarks/training.py")
        for flags in (data_flags, distill_flags):
            flags(parser)
        model_flags(parser, student=True)
        training_flags(parser)
        run_flags(parser)
        flags = [
            "--dataset", "cifar100", *pair.flags, "-b", BATCH, "--epochs", epochs,
            "--teacher", pair.teacher, "--student", pair.student, "--no-baseline",
            "--channels-last", "--val-interval", epochs, "--output", folder,
            *["--torchcompile"] * compiled,
        ]  # fmt: skip
        self.options = parse(parser, [str(flag) for flag in flags])
        self.choice = choose_methods(self.options)
        self.accelerator = start(self.options)
        self.data = images()
        self.run = RunFolder(folder / "run")
        self.made: Assembly = assemble(self.options, self.choice, self.accelerator, self.data)
        settle(self.made.network)
        ready_teacher(self.options, self.accelerator, self.made)

    def fit(self, train: Clocked) -> None:
        made, options = self.made, self.options
        arguments = arguments_of(options, self.accelerator, self.data, **self.choice.as_yaml())
        known = metadata(made.student, {}, self.data, made.inputs, made.parent)
        with self.run.claimed(self.accelerator, arguments, resume=False):
            Trainer(
                self.accelerator, made.main.objective, train, made.held_out, made.prepare, self.run,
                options, StudentKeeper(self.run, known), arguments, teacher=made.main.teacher,
            ).fit()  # fmt: skip


def settle(network: torch.nn.Module) -> None:
    """Statistics that fit random weights: features neither vanish nor grow with depth."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    device = next(network.parameters()).device
    with torch.no_grad():
        network.train()(torch.randn(BATCH, 3, 32, 32, device=device))
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def loop_of(name: str, ours: Ours, device: str) -> Loop:
    made = ours.made
    student, teacher = made.student, made.network
    layers = default_stages(student), default_stages(teacher)
    more = {}
    if name == "crd":
        layers = layers[0][-1:], layers[1][-1:]
    if name == "dih loop":
        layers, more = ([], list(made.heads.layers)), {"heads": list(made.heads.modules)}
    return LOOPS[name](student, teacher, ours.data, layers, device, BATCH, **more)


class Round:
    """`steps` steps of a loop whose workers are running already; `seconds` has a number a call."""

    def __init__(self, loop: Loop, steps: int):
        self.loop, self.steps = loop, steps
        self.seconds: list[float] = []
        self.waits: list[float] = []

    def __call__(self) -> None:
        batches = self.loop.batches()
        self.loop.step(*next(batches))
        _finish()
        begin, waited = time.perf_counter(), 0.0
        for _ in range(self.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.loop.step(*batch)
        _finish()
        self.seconds.append(time.perf_counter() - begin)
        self.waits.append(waited)


def measure(name: str, device: str, rounds: int, steps: int, *, compiled: bool) -> dict:
    """Both forms in turn, `rounds` times `steps` steps, after a round that does not count."""
    pair = PAIRS[name]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        ours = Ours(pair, Path(folder), rounds + 1, compiled)
        theirs = Round(loop_of(name, ours, device), steps)
        clock = Clocked(ours.made.train, steps, theirs)
        ours.fit(clock)
    forms = {THEIRS: theirs, OURS: clock}
    times = {form: [1e3 * s / steps for s in f.seconds[1:]] for form, f in forms.items()}
    waits = {form: sum(f.waits[1:]) / sum(f.seconds[1:]) for form, f in forms.items()}
    ratio = statistics.median(a / b for a, b in zip(times[THEIRS], times[OURS], strict=True))
    goal = pair.goal.get(device)
    return {
        "row": name,
        "what": pair.what,
        "times": {form: summary(samples) for form, samples in times.items()},
        "ratio": round(ratio, 3),
        "of": [THEIRS, OURS],
        "goal": goal,
        "met": goal is None or ratio >= goal,
        "rounds": rounds,
        "images_per_second": {
            form: round(1e3 * BATCH / statistics.median(samples), 1)
            for form, samples in times.items()
        },
        "data_wait": {form: round(share, 5) for form, share in waits.items()},
        "peak_mb": {form: _peak_apart(name, form, device) for form in forms},
    }


def _peak_apart(name: str, form: str, device: str) -> float:
    """`peak` in a process of its own: one that has trained before has memory to reuse."""
    script = Path(__file__).with_name("training.py")
    command = [sys.executable, str(script), "--peak", name, form, "--device", device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak(name: str, form: str, device: str, steps: int = 3) -> float:
    """Megabytes that a few steps hold beyond networks, data and what was imported."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        ours = Ours(PAIRS[name], Path(folder), 1, compiled=False)
        if form == THEIRS:
            batches = (loop := loop_of(name, ours, device)).batches()
            rise = peak_from_now(device)
            for _ in range(steps):
                loop.step(*next(batches))
            return round(rise() / 2**20, 1)
        rises: list[Callable[[], int]] = []
        found: list[int] = []
        ours.fit(
            Clocked(
                ours.made.train,
                steps,
                lambda: rises.append(peak_from_now(device)),
                lambda: found.append(rises[-1]()),
            )
        )
        return round(found[0] / 2**20, 1)


class Profiled(Clocked):
    """Clocked, and the operations of its last epoch counted into `spent`."""

    def __init__(self, loader: Loader, steps: int, last: int, device: str):
        super().__init__(loader, steps, lambda: None)
        self.last, self.device = last, device
        self.spent: list[dict[str, float]] = []

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        batches = super().epoch(epoch, first_step)
        if epoch < self.last:
            yield from batches
            return
        with where.watching(self.plan.steps, self.device, self.spent):
            yield from batches


def profiles(name: str, device: str, steps: int = 4) -> dict[str, dict[str, float]]:
    """Milliseconds a step of both forms by what operations are for, once they are warm."""
    spent: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        ours = Ours(PAIRS[name], Path(folder), 2, compiled=False)
        loop = loop_of(name, ours, device)
        batches = loop.batches()
        loop.step(*next(batches))
        with where.watching(steps, device, spent):
            for _ in range(steps):
                loop.step(*next(batches))
        del batches
        train = Profiled(ours.made.train, steps, 1, device)
        ours.fit(train)
    return {THEIRS: spent[0], OURS: train.spent[0]}


def details(results: list[dict]) -> str:
    """Images a second, waiting for data and memory, a row a form."""
    return markdown(
        [
            {
                "training": f"{result['row']}: {result['what']}",
                "form": form,
                "images/s": f"{result['images_per_second'][form]:.0f}",
                "waiting for data": f"{100 * result['data_wait'][form]:.2f} %",
                "peak memory": f"{result['peak_mb'][form]:.0f} MB",
            }
            for result in results
            for form in result["times"]
        ]
    )
