"""A teacher whose answers are kept answers as the live one does, and is not run again."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_methods import options_of
from test_resume import BORN_AGAIN, DISTILL, HEADS, ROOT, TORCHRUN, command, finish, records_of
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from kdfast.data import Augmentation, Loader
from kdfast.errors import UserError
from kdfast.models import InputAdapter, LinearHead, checksum, create_model
from kdfast.training import answer_rows, teacher_cache
from kdfast.training.answer_rows import DiskRows, Field
from kdfast.training.kept_answers import FixedAnswers, ReplayedAnswers
from kdfast.training.setup import (
    Inputs,
    load_data,
    preparer,
    train_plan,
    training_transform,
)
from kdfast.training.teacher import Teacher
from kdfast.training.teacher_cache import Lesson, cached

IMAGES = 150
LAYERS = ("layer1", "layer2", "layer3")
FEW = ("--train-limit", 203, "--eval-limit", 90, "--epochs", 2, "-b", 64, "--output", ".",
       "--model", "cifar_resnet8", "--teacher", "cifar_resnet8", "--no-baseline")  # fmt: skip
STEADY = ("--no-aug",)


# Answers.


class Counted:
    """How often the network of a teacher was run."""

    def __init__(self, model: torch.nn.Module):
        self.runs = 0
        model.register_forward_hook(self.count)

    def count(self, *_) -> None:
        self.runs += 1


class Taught:
    """A teacher with a linear head on its second tap, and all it is asked with."""

    def __init__(self, *flags: object, **reads):
        flags = ("--train-limit", IMAGES, "-b", 32, "--epochs", 3, *flags)
        self.options = options_of(*flags)
        self.accelerator = Accelerator(cpu=True, mixed_precision=self.options.mixed_precision)
        self.options.mixed_precision = self.options.mixed_precision or "no"
        self.data = load_data(self.options, self.accelerator)
        self.inputs = Inputs((32, 32), (0.3,) * 3, (0.3,) * 3)
        layout = self.options.channels_last
        self.prepare = preparer(self.inputs, self.accelerator, channels_last=layout)
        torch.manual_seed(0)
        model, head = create_model("cifar_resnet8", 10), LinearHead((32, 16, 16), 10)
        if layout:
            model = model.to(memory_format=torch.channels_last)
        self.network = Counted(model)
        adapter = InputAdapter((0.3,) * 3, (0.3,) * 3, (0.25,) * 3, (0.4,) * 3, (32, 32))
        self.live = Teacher(model, LAYERS, adapter, heads=[head], head_positions=[1])
        lesson = Lesson(
            self.options, self.accelerator, self.data, self.inputs,
            Inputs((32, 32), (0.25,) * 3, (0.4,) * 3), self.prepare, checksum(model.state_dict()),
        )  # fmt: skip
        self.cached = cached(self.live, lesson, **reads)
        self.plan = train_plan(self.options, self.data, self.data.train, self.accelerator)

    def batches(self, epoch: int = 0, first_step: int = 0):
        transform = training_transform(self.options, self.data, (32, 32))
        loader = Loader(self.data.train, transform, self.plan, classes=10)
        for batch in loader.epoch(epoch, first_step):
            yield self.prepare(batch.images), batch.indices

    def ask(self, teacher, *args):
        with self.accelerator.autocast():
            return teacher(*args)


def flat(answer) -> list[torch.Tensor]:
    logits, features, heads = answer
    return [logits, *features, *(part for head in heads for part in head)]


def assert_same(one, other, *, places: float = 0) -> None:
    for a, b in zip(flat(one), flat(other), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b) if not places else torch.allclose(a, b, rtol=places, atol=places)


@pytest.mark.parametrize("flags", [(), ("--channels-last",), ("--amp",)])
@pytest.mark.parametrize("place", ["memory", "folder"])
def test_kept_answers_are_the_live_ones(tmp_path, monkeypatch, flags, place):
    """Bit for bit where the batch is that of the pass, whose last is not a full one."""
    if place == "folder":
        monkeypatch.setattr(teacher_cache, "AUTO_LIMIT", 0)  # so it is not read into memory
        flags += ("--teacher-cache", tmp_path / "kept")
    made = Taught(*STEADY, *flags)
    teacher = made.cached
    assert isinstance(teacher, FixedAnswers)
    teacher.open()
    assert (teacher.memory is None) == (place == "folder")
    indices = torch.arange(IMAGES)
    images = torch.cat([x for x, _ in sorted_images(made)])
    for first in range(0, IMAGES, 32):
        batch = slice(first, first + 32)
        live = made.ask(made.live, images[batch])
        assert_same(made.ask(teacher, images[batch], indices[batch], 2), live)
    runs = made.network.runs
    for epoch in (0, 2):
        for batch, own in made.batches(epoch):
            answer = made.ask(teacher, batch, own, epoch)
            runs_now = made.network.runs
            assert runs_now == runs, "the network was run"
            tolerance = 2e-2 if "--amp" in flags else 1e-6
            assert_same(answer, made.ask(made.live, batch), places=tolerance)
            runs = made.network.runs
    teacher.close()


def sorted_images(made: Taught):
    made.plan.shuffle = False
    yield from made.batches()
    made.plan.shuffle = True


def test_without_indices_the_network_answers():
    """As in evaluation, whose images have indices of their own."""
    made = Taught(*STEADY)
    made.cached.open()
    images = torch.randn(4, 3, 32, 32)
    before = made.network.runs
    assert_same(made.cached(images), made.live(images))
    assert made.network.runs == before + 2


def test_only_what_methods_read_is_kept():
    made = Taught(*STEADY, read=[2], head_features=False)
    assert [field.name for field in made.cached.fields] == ["logits", "layer3", "logits of head 1"]
    made.cached.open()
    indices = torch.tensor([7, 3])
    logits, features, ((feature, head),) = made.cached(torch.zeros(2, 3, 32, 32), indices, 0)
    assert [tuple(f.shape) for f in features] == [(2, 0), (2, 0), (2, 64, 8, 8)]
    assert (tuple(feature.shape), tuple(head.shape)) == ((2, 0), (2, 10))
    images = {int(i): x for xs, own in made.batches() for x, i in zip(xs, own, strict=True)}
    live = made.live(torch.stack([images[7], images[3]]))
    torch.testing.assert_close(logits, live[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(features[2], live[1][2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head, live[2][0][1], rtol=1e-6, atol=1e-6)


def test_too_large_for_memory(monkeypatch, capsys):
    monkeypatch.setattr(teacher_cache, "AUTO_LIMIT", 2**20)
    made = Taught(*STEADY)
    assert made.cached is made.live
    assert "more than 0.000977 GiB" in capsys.readouterr().out
    rows = 4 * (10 + 10 + 2 * 32 * 16**2 + 16 * 32**2 + 64 * 8**2)
    monkeypatch.setattr(teacher_cache, "AUTO_LIMIT", IMAGES * rows - 1)
    assert Taught(*STEADY).cached is not made.cached
    monkeypatch.setattr(teacher_cache, "AUTO_LIMIT", IMAGES * rows)
    assert isinstance(Taught(*STEADY).cached, FixedAnswers)


@pytest.mark.parametrize(
    "flags",
    [(), ("--no-aug", "--epochs", 1), ("--no-aug", "--teacher-cache", "never"),
     ("--no-aug", "--teacher-bn", "batch")],
)  # fmt: skip
def test_when_nothing_is_kept(flags):
    made = Taught(*flags)
    assert made.cached is made.live


def test_what_is_random():
    """Digits are not flipped, so without padding nothing changes from epoch to epoch."""
    for flags in (("--crop-padding", 0, "--hflip", 1), ("--train-crop-mode", "none")):
        assert isinstance(Taught(*flags).cached, FixedAnswers)
    steady = {"crop": "none", "hflip": 1.0, "vflip": 0.0}
    assert not Augmentation(**steady).random
    for change in (
        {"hflip": 0.5}, {"vflip": 0.1}, {"rotation": 5.0}, {"color_jitter": 0.1},
        {"hue_jitter": 0.1}, {"crop": "pad"}, {"crop": "crop"}, {"crop": "rrc"}, {"crop": "rkrc"},
    ):  # fmt: skip
        assert Augmentation(**steady | change).random, change


@pytest.mark.parametrize("flags", [(), ("--channels-last", "--amp"), ("--drop-last",)])
def test_replayed_answers_are_the_live_ones(tmp_path, flags):
    """Bit for bit, of every epoch, by a run that comes later and runs no network."""
    flags += ("--teacher-cache", tmp_path / "kept", "--hflip", 0.5)
    first = Taught(*flags)
    assert isinstance(first.cached, ReplayedAnswers)
    first.cached.open()
    live = {}
    for epoch in (0, 1):
        for images, indices in first.batches(epoch):
            live[epoch, int(indices[0])] = answer = first.ask(first.live, images)
            assert_same(first.ask(first.cached, images, indices, epoch), answer)
    first.cached.close()
    assert not torch.equal(live[0, 3][0], live[1, 3][0]) if (1, 3) in live else True
    later = Taught(*flags)
    later.cached.open()
    before, seen = later.network.runs, 0
    for epoch in (1, 0):
        for images, indices in later.batches(epoch, first_step=epoch):
            answer = later.ask(later.cached, images, indices, epoch)
            assert_same(answer, live[epoch, int(indices[0])])
            seen += 1
    assert later.network.runs == before and seen == 2 * later.plan.steps - 1
    images, indices = next(iter(later.batches(2)))
    later.ask(later.cached, images, indices, 2)
    assert later.network.runs == before + 1, "an epoch that nobody has seen"
    later.cached.close()


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path):
    flags = ("--teacher-cache", tmp_path / "kept", "--epochs")
    runs = []
    for epochs in (1, 2, 1):
        made = Taught(*flags, epochs)
        made.cached.open()
        before = made.network.runs
        for epoch in range(epochs):
            for images, indices in made.batches(epoch):
                made.cached(images, indices, epoch)
        made.cached.close()
        runs.append(made.network.runs - before)
    assert runs == [5, 5, 0]


# Files.

FIELDS = [Field("a", (3,), torch.float32), Field("b", (2, 1, 2), torch.bfloat16, True)]


def disk(folder: Path, count: int = 6, **more) -> DiskRows:
    return DiskRows(folder, FIELDS, count, more.get("period", count), torch.device("cpu"))


def answer_of(first: int, count: int) -> list[torch.Tensor]:
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    return [
        numbers[:, None].expand(-1, 3),
        numbers[:, None, None, None].expand(-1, 2, 1, 2).bfloat16(),
    ]


def test_rows_count_when_the_disk_holds_them(tmp_path):
    """What a killed run had written, but not committed, is not there for the next one."""
    rows = disk(tmp_path)
    rows.create()
    rows.open(write=True)
    rows.write(0, answer_of(0, 2))
    rows.commit()
    rows.write(4, answer_of(4, 2))
    other = disk(tmp_path)
    other.create()
    other.open(write=False)
    assert other.done.tolist() == [1, 1, 0, 0, 0, 0]
    rows.close()
    other = disk(tmp_path)
    other.open(write=False)
    assert other.done.tolist() == [1, 1, 0, 0, 1, 1]
    for found, wanted in zip(other.read(np.array([5, 0])), answer_of(0, 6), strict=True):
        assert torch.equal(found, wanted[[5, 0]])


def test_data_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    events = []
    genuine, sync = os.pwrite, os.fsync
    names = lambda file: Path(os.readlink(f"/proc/self/fd/{file}")).name  # noqa: E731
    rows = disk(tmp_path)
    rows.create()
    rows.open(write=True)
    monkeypatch.setattr(os, "pwrite", lambda f, *a: (events.append(names(f)), genuine(f, *a))[1])
    monkeypatch.setattr(os, "fsync", lambda f: (events.append(f"sync {names(f)}"), sync(f))[1])
    rows.write(0, answer_of(0, 2))
    rows.commit()
    wanted = ["0.bin", "1.bin", "sync 0.bin", "sync 1.bin", "done.bin", "sync done.bin"]
    assert events == wanted
    monkeypatch.setattr(answer_rows, "_COMMIT_BYTES", 1)
    rows.write(2, answer_of(2, 1))
    assert events == 2 * wanted, "a long epoch does not keep all of it waiting"


def test_more_rows_of_the_same_files(tmp_path):
    rows = disk(tmp_path, 2, period=2)
    rows.create()
    rows.open(write=True)
    rows.write(0, answer_of(0, 2))
    rows.close()
    rows = disk(tmp_path, 6, period=2)
    rows.create()
    rows.open(write=True)
    assert rows.done.tolist() == [1, 1, 0, 0, 0, 0]
    assert torch.equal(rows.read(np.arange(2))[0], answer_of(0, 2)[0])
    disk(tmp_path, 4, period=2).open(write=False)  # of a shorter run


@pytest.mark.parametrize("name", ["0.bin", "1.bin", "done.bin"])
@pytest.mark.parametrize("how", ["short", "gone"])
def test_files_that_are_not_whole(tmp_path, name, how):
    rows = disk(tmp_path)
    rows.create()
    if how == "gone":
        (tmp_path / name).unlink()
    else:
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 1)
    with pytest.raises(UserError, match=f"{tmp_path}.*({name}|No such file)"):
        disk(tmp_path).open(write=False)
    if name != "done.bin":
        with pytest.raises(UserError, match=f"{name} is cut short"):
            disk(tmp_path).create()


def test_a_creation_that_was_cut_off(tmp_path):
    """Rows count from `done.bin` on, which comes last."""
    (tmp_path / "0.bin").write_bytes(b"half")
    rows = disk(tmp_path)
    rows.create()
    rows.open(write=False)
    assert rows.done.tolist() == [0] * 6


def test_no_room(tmp_path, monkeypatch):
    usage = answer_rows.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(answer_rows.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"GiB left; give --teacher-cache a larger disk"):
        disk(tmp_path / "kept").create()
    assert not list((tmp_path / "kept").iterdir())


# Runs.


@pytest.fixture
def distilled(run_script, teacher_run, tmp_path):
    """Call `distilled(name, *flags)`; returns the run folder."""

    def run(name: str, *flags: object) -> Path:
        flags = (*FEW, "--teacher-checkpoint", teacher_run, "--method", "kd", "at", *flags)
        code, out, err = run_script(DISTILL, *flags, "--experiment", name)
        assert code == 0, err
        run.said = out
        return tmp_path / name

    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


def losses(run: Path) -> list[dict[str, float]]:
    with (run / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    apart = ("seconds", "images_per_second")
    return [{k: float(v) for k, v in row.items() if k not in apart} for row in rows]


def assert_close(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-4, atol=1e-5)
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "kd", "at"),
        ("--method", "crd", "--crd-negatives", 40),
        # Heads trained so little answer with logits of 300, and large steps then magnify rounding.
        ("--method", "dih", "--teacher-epochs", 1, "--lr", 0.0005),
        ("--method", "fsp", "kd", "--init-epochs", 2, "--smoothing", 0.1),
        ("--method", "kd", "--grad-accum-steps", 3, "-b", 20, "--channels-last"),
    ],
    ids=["at", "crd", "dih", "two stages", "accumulated"],
)
def test_a_student_ends_as_with_the_live_teacher(distilled, tmp_path, flags):
    flags = (*STEADY, *flags)
    live = distilled("live", *flags, "--teacher-cache", "never")
    assert "answers to" not in distilled.said
    kept = distilled("kept", *flags)
    stages = 2 if "--init-epochs" in flags else 1
    assert distilled.said.count("answers to 203 training images are kept") == stages
    assert_close(kept, live)
    distilled("folder", *flags, "--teacher-cache", tmp_path / "cache")
    again = distilled("again", *flags, "--teacher-cache", tmp_path / "cache")
    assert_close(again, live)
    assert checksum(weights(again)) == checksum(weights(kept)), "the batches of the pass are equal"


def test_the_network_is_not_run_in_training_steps(distilled):
    """By every forward pass of the teacher's kind, of which the student is not."""
    passes = []
    kind = type(create_model("cifar_resnet8", 10))
    hook = register_module_forward_hook(
        lambda module, *_: passes.append(1) if type(module) is kind else None
    )
    seen = []
    steps = register_optimizer_step_post_hook(lambda *_: seen.append(len(passes)))
    flags = (*STEADY, "--model", "cifar_wrn16_1", "--epochs", 3)
    try:
        for name, cache in (("kept", "auto"), ("live", "never")):
            passes.clear(), seen.clear()
            distilled(name, *flags, "--teacher-cache", cache)
            wanted = [seen[0]] * 12 if name == "kept" else list(range(seen[0], seen[0] + 12))
            assert seen == wanted, name
    finally:
        hook.remove(), steps.remove()


def test_augmented_answers_are_replayed(distilled, tmp_path):
    """Bit for bit: the run that writes, one that reads, and one without a cache."""
    live = distilled("live", "--hflip", 0.5)
    cache = ("--hflip", 0.5, "--teacher-cache", tmp_path / "cache")
    wrote = distilled("wrote", *cache)
    assert "0 of 406 are there" in distilled.said
    read = distilled("read", *cache)
    assert "406 of 406 are there" in distilled.said
    assert checksum(weights(live)) == checksum(weights(wrote)) == checksum(weights(read))
    assert losses(live) == losses(wrote) == losses(read)
    other = distilled("other", *cache, "--model", "cifar_resnet14", "--lr", 0.01)
    assert "406 of 406 are there" in distilled.said
    plain = distilled("plain", *cache[:2], "--model", "cifar_resnet14", "--lr", 0.01)
    assert checksum(weights(other)) == checksum(weights(plain))


def test_heads_and_generations(run_script, teacher_run, tmp_path):
    few = (*FEW[:6], "-b", 64, *STEADY, "--output", ".")
    heads = (HEADS, *few, "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run)
    chain = (BORN_AGAIN, *few, "--model", "cifar_resnet8", "--generations", 2)
    for script, number, weights_of in (
        (heads, 1, lambda run: [load_file(p) for p in sorted((run / "heads").iterdir())]),
        (chain, 1, lambda run: [weights(run / "generation-1")]),
    ):
        found = []
        for cache in ("auto", "never"):
            name = f"{Path(script[0]).stem}-{cache}"
            code, out, err = run_script(*script, "--teacher-cache", cache, "--experiment", name)
            assert code == 0, err
            kept = out.count("answers to 203 training images are kept")
            assert kept == (number if cache == "auto" else 0)
            found.append(weights_of(tmp_path / name))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_chain_of_assistants_in_one_folder(distilled, tmp_path):
    flags = ("--assistants", "cifar_resnet8", "--teacher-cache", tmp_path / "cache")
    one = distilled("one", *flags)
    two = distilled("two", *flags)
    assert distilled.said.count("406 of 406 are there") == 2
    assert checksum(weights(one)) == checksum(weights(two))
    assert (tmp_path / "cache/assistant-1/meta.json").exists()


@pytest.mark.parametrize("kind", ["steady", "replayed"])
def test_killed_and_resumed(teacher_run, tmp_path, kind):
    """While the cache is filled or written, too; the end is the same bit for bit."""
    flags = [DISTILL, *FEW, "--output", tmp_path, "--epochs", 3, "--checkpoint-steps", 1]
    flags += ["--method", "kd", "at", "--teacher-checkpoint", teacher_run]
    flags += STEADY if kind != "replayed" else ()
    killed = (sys.executable, ROOT / "tests/killed.py")

    def cache(name: str) -> tuple:
        return ("--teacher-cache", tmp_path / name) if kind != "steady" else ()

    plain = ("--experiment", "whole", *cache("of-whole"))
    finish(command(*killed, "0:0", *flags, *plain, cwd=tmp_path))
    flags += ["--experiment", "cut", "--resume", "auto", *cache("of-cut")]
    chance = random.Random(kind)
    moments = [chance.randint(2, 60)] if kind == "steady" else [chance.randint(3, 12), 25]
    for moment in moments:
        ended = command(*killed, f"0:{moment}", *flags, cwd=tmp_path)
        said = "".join(ended.communicate(timeout=600))
        assert ended.returncode == -signal.SIGKILL, said
    finish(command(*killed, "0:0", *flags, cwd=tmp_path))
    assert records_of(tmp_path / "whole") == records_of(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["steady", "replayed"])
def test_two_processes_are_one(run_script, teacher_run, tmp_path, kind):
    """An uneven share of the pass: 203 images, batches of 32 on each; the last step is of 11."""
    flags = (*FEW[:6], *FEW[8:], "--global-batch-size", 64, "--freeze-bn", "--threads", 1)
    flags += ("--teacher-checkpoint", teacher_run, "--method", "kd", "at")
    flags += STEADY if kind != "replayed" else ()
    code, _, err = run_script(DISTILL, *flags, "--experiment", "one", "--teacher-cache", "never")
    assert code == 0, err
    if kind != "steady":
        flags += ("--teacher-cache", tmp_path / "cache")
    for name in ("two", "again"):
        run = command(*TORCHRUN, ROOT / DISTILL, *flags, "--experiment", name, cwd=tmp_path)
        said = finish(run)
        assert '"processes": 2' in said
        assert "are kept" in said
        assert_close(tmp_path / "one", tmp_path / name)
    two, again = (weights(tmp_path / name) for name in ("two", "again"))
    assert checksum(two) == checksum(again)
    if kind == "replayed":
        done = [
            np.fromfile(tmp_path / f"cache/process-{rank}/done.bin", np.uint8) for rank in (0, 1)
        ]
        assert [(len(d), int(d.sum())) for d in done] == [(204, 204), (202, 202)]


def test_a_resumed_run_may_change_it(distilled, run_script, teacher_run, tmp_path):
    cut = ("--epochs", 1, *STEADY)
    distilled("run", *cut)
    run = distilled("run", *STEADY, "--resume", "auto", "--teacher-cache", tmp_path / "cache")
    assert len(losses(run)) == 2
    recorded = yaml.safe_load((run / "args.yaml").read_text())["options"]
    assert recorded["teacher-cache"] == str(tmp_path / "cache")
    code, out, _ = run_script(DISTILL, "--teacher-cache", "never", "--print-config")
    assert code == 0 and yaml.safe_load(out)["teacher-cache"] == "never"
    assert yaml.safe_load(run_script(DISTILL, "--print-config")[1])["teacher-cache"] == "auto"


def test_a_finished_run_is_not_asked_again(distilled):
    distilled("run", *STEADY)
    distilled("run", *STEADY, "--resume", "auto")
    assert "are kept" not in distilled.said


# What is refused.

SEEDED = ("--epochs", 1, "--train-limit", 64)


@pytest.fixture
def stale(distilled, refused, teacher_run, tmp_path):
    """A cache made by a run of `flags` is refused to one of `other`, for `words`."""

    def check(flags, other, words) -> None:
        base = (*SEEDED, *flags, "--teacher-cache", tmp_path / "cache")
        distilled("made", *base)
        AcceleratorState._reset_state(reset_partial_state=True)  # with its precision
        flags = (*FEW, "--teacher-checkpoint", teacher_run, "--method", "kd", "at", *base, *other)
        refused(1, DISTILL, *flags, "--experiment", "later", words=["stale", *words])

    return check


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("--method", "kd"), ["layers ['logits', 'layer1'", "['logits']"]),
        (("--mean", 0.5, 0.5, 0.5), ["mean [", "[0.5, 0.5, 0.5]"]),
        (("--train-limit", 65), ["images 64", "65"]),
        (("--train-half", "b"), ["data "]),
        (("--amp",), ["answers", "bfloat16"]),
        (("--aug",), ["augmentation False", "True"]),
        (("--no-channels-last",), ["answers", "channels last"]),
    ],
)
def test_stale(stale, other, words):
    stale(STEADY, other, words)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("--seed", 1), ["seed 0", "1"]),
        (("--hflip", 0.5), ["augmentation-hflip 0.0", "0.5"]),
        (("-b", 32), ["batch-size 64", "32"]),
        (("--drop-last",), ["drop-last False", "True"]),
    ],
)
def test_stale_where_images_are_augmented(stale, other, words):
    stale((), other, words)


def test_another_teacher(run_script, stale, tmp_path):
    flags = ("--model", "cifar_resnet8", "--epochs", 1, "--train-limit", 64, "--seed", 3)
    assert run_script("train/classifier.py", *flags, "--output", ".", "--experiment", "b")[0] == 0
    stale(STEADY, ("--teacher-checkpoint", tmp_path / "b"), ["teacher-checksum"])


def test_other_heads(distilled, refused, teacher_run, run_script, tmp_path):
    base = (*SEEDED, *STEADY, "--method", "dih", "--teacher-cache", tmp_path / "cache")
    for seed in (0, 1):
        flags = (*FEW[:4], "--epochs", 1, "--output", ".", "--teacher", "cifar_resnet8")
        flags += ("--teacher-checkpoint", teacher_run, "--seed", seed, "--experiment", f"h{seed}")
        assert run_script(HEADS, *flags)[0] == 0
    distilled("made", *base, "--heads", tmp_path / "h0")
    flags = (*FEW, "--teacher-checkpoint", teacher_run, *base, "--heads", tmp_path / "h1")
    refused(1, DISTILL, *flags, "--experiment", "later", words=["stale", "heads-checksum"])


def test_damaged_folders(distilled, refused, teacher_run, tmp_path):
    base = (*SEEDED, *STEADY, "--teacher-cache", tmp_path / "cache")
    distilled("made", *base)
    flags = (*FEW, "--teacher-checkpoint", teacher_run, "--method", "kd", "at", *base)
    flags += ("--experiment", "later")
    cache = tmp_path / "cache"
    os.truncate(cache / "1.bin", 100)
    refused(1, DISTILL, *flags, words=[str(cache), "1.bin", "cut short", "remove that folder"])
    meta = (cache / "meta.json").read_text()
    (cache / "meta.json").write_text(meta[:50])
    refused(1, DISTILL, *flags, words=[str(cache), "meta.json is damaged"])
    (cache / "meta.json").write_text(json.dumps(json.loads(meta) | {"layout": 2}))
    refused(1, DISTILL, *flags, words=["stale", "layout 2"])
    (cache / "meta.json").unlink()
    refused(1, DISTILL, *flags, words=[str(cache), "no teacher cache"])


@pytest.mark.parametrize("kind", ["folder", "replayed"])
def test_a_full_disk(refused, teacher_run, tmp_path, monkeypatch, kind):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(answer_rows.os, "pwrite", full)
    flags = (*FEW, *SEEDED, "--teacher-checkpoint", teacher_run, "--method", "kd", "at")
    flags += STEADY if kind == "folder" else ()
    words = [str(tmp_path / "cache"), "No space left on device"]
    leaves = ["cache", "cache/*", "cache/*/*", "run", "run/*", "run/*/*"]
    flags += ("--teacher-cache", tmp_path / "cache", "--experiment", "run")
    refused(1, DISTILL, *flags, words=words, leaves=leaves)


def test_no_place_to_write(refused, teacher_run, tmp_path):
    (tmp_path / "file").write_text("")
    flags = (*FEW, *SEEDED, "--teacher-checkpoint", teacher_run, "--method", "kd", *STEADY)
    refused(1, DISTILL, *flags, "--teacher-cache", tmp_path / "file", words=["no teacher cache"])
    words = ["cannot write teacher cache", "Not a directory"]
    refused(1, DISTILL, *flags, "--teacher-cache", tmp_path / "file/in", words=words)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (DISTILL, ("--teacher-bn", "batch"), ["--teacher-cache kept", "--teacher-bn batch"]),
        (DISTILL, ("--seeds", 0, 1), ["--teacher-cache kept", "one seed", "--no-aug"]),
        (BORN_AGAIN, ("--seeds", 0, 1), ["--teacher-cache kept", "one seed", "--no-aug"]),
        (HEADS, ("--kind", "deep"), ["--teacher-cache", "linear"]),
    ],
)
def test_flags_that_do_not_go_together(refused, script, flags, words):
    refused(2, script, *flags, "--teacher-cache", "kept", words=words)


def test_a_folder_that_another_run_writes(refused, teacher_run, tmp_path):
    """Of two runs that would compute the same answers one waits to be told."""
    cache = tmp_path / "cache"
    cache.mkdir()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); time.sleep(600)"
    holder = command(sys.executable, "-c", hold, cache / ".lock", cwd=tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
        flags = (*FEW, *SEEDED, "--teacher-checkpoint", teacher_run, "--method", "kd")
        flags += ("--teacher-cache", cache, "--experiment", "run")
        refused(1, DISTILL, *flags, words=["in use by another run", str(cache)])
    finally:
        holder.kill()
        holder.communicate()
