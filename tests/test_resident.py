"""Images on the training device: the batches of loader processes, to the bit, without them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import (
    BORN_AGAIN,
    CLASSIFIER,
    DISTILL,
    HEADS,
    ROOT,
    TORCHRUN,
    command,
    finish,
    record_of,
)

from kdfast import ops
from kdfast.data import (
    Augmentation,
    BatchPlan,
    CropFlip,
    Loader,
    Normalise,
    ResidentImages,
    ResidentLoader,
    train_transform,
)
from kdfast.data.sources import ArraySource, FileSource, FirstOf, Subset
from kdfast.errors import UserError
from kdfast.ops import Key
from kdfast.ops.reference.augment import draw, draw_one
from kdfast.training import on_device

CPU = torch.device("cpu")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FEW = ("--model", "cifar_resnet8", "--train-limit", 203, "--eval-limit", 90, "--epochs", 2,
       "--output", ".", "-j", 2)  # fmt: skip


def source_of(count=37, height=32, width=32, *, grey=False, classes=4):
    shape = (count, height, width) if grey else (count, height, width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return ArraySource(pixels, np.arange(count) % classes, "made-up")


def both(source, crop, plan, *, layout=torch.contiguous_format, classes=4, workers=0):
    size = crop.size
    resident = ResidentLoader(
        ResidentImages(source, size, CPU, classes=classes),
        crop,
        plan,
        mean=MEAN,
        std=STD,
        memory_format=layout,
    )
    return resident, Loader(source, crop, plan, classes=classes, workers=workers)


def check_same(resident, loader, epoch, first_step, layout=torch.contiguous_format):
    normalise = Normalise(MEAN, STD, CPU)
    pairs = list(
        zip(resident.epoch(epoch, first_step), loader.epoch(epoch, first_step), strict=True)
    )
    for ours, theirs in pairs:
        want = normalise(theirs.images).contiguous(memory_format=layout)
        assert ours.images.dtype == torch.float32 and ours.images.stride() == want.stride()
        assert torch.equal(ours.images, want)
        assert torch.equal(ours.labels, theirs.labels) and ours.labels.dtype == torch.int64
        assert torch.equal(ours.indices, theirs.indices) and ours.indices.dtype == torch.int64
        assert ours.portion == theirs.portion
    return len(pairs)


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("padding", "reflect", "flip"),
    [(4, False, True), (3, True, True), (40, False, False), (0, False, True), (0, False, False)],
)
def test_the_batches_of_the_worker_path(padding, reflect, flip, layout, grey, path):
    crop = CropFlip((32, 32), padding, reflect=reflect, flip=flip)
    plan = BatchPlan(37, 5, processes=2, rank=1, accumulation=2, seed=7, shuffle=True)
    resident, loader = both(source_of(grey=grey), crop, plan, layout=layout)
    with ops.use(path):
        assert check_same(resident, loader, 3, 0, layout) == 4
        assert check_same(resident, loader, 1, 1, layout) == 2
        assert check_same(resident, loader, 1, 2) == 0, "nothing is left of the epoch"


def test_images_that_are_not_square():
    crop = CropFlip((24, 40), 5, reflect=True, flip=True)
    plan = BatchPlan(9, 4, shuffle=True, seed=1)
    assert check_same(*both(source_of(9, 24, 40), crop, plan, workers=2), 0, 0) == 3


@pytest.mark.parametrize("indices", [range(11), [3, 0, 30, 30, 7], range(4, 20)])
def test_subsets_of_arrays(indices):
    source = FirstOf(Subset(source_of(), indices), 16)
    plan = BatchPlan(len(source), 4, shuffle=True)
    assert check_same(*both(source, CropFlip((32, 32), 4, flip=True), plan), 0, 0)


def test_a_single_draw_is_one_of_many():
    key, indices = Key(3, "augment", 8), torch.tensor([0, 1, 5, 2**31 + 9, 2**40 + 3])
    for padding, flip in ((4, True), (0, True), (70, False)):
        found = draw(indices, key, padding, flip)
        many = [tuple(map(int, drawn)) for drawn in zip(*found, strict=True)]
        assert [draw_one(int(i), key, padding, flip) for i in indices] == many


def test_what_the_device_can_draw_is_drawn_by_index():
    """All other augmentation stays what the libraries draw."""

    def of(size=(32, 32), native=32, **settings):
        return train_transform(size, Augmentation(**settings), "bilinear", native)

    for settings in ({}, {"hflip": 0.0}, {"crop": "none"}, {"padding_mode": "reflect"}):
        assert isinstance(of(**settings), CropFlip)
    others = ({"hflip": 0.3}, {"vflip": 0.5}, {"rotation": 5.0}, {"color_jitter": 0.1},
              {"hue_jitter": 0.1}, {"crop": "rrc"}, {"crop": "crop"},
              {"padding_mode": "reflect", "padding": 32})  # fmt: skip
    for settings in others:
        assert not isinstance(of(**settings), CropFlip)
    grown = of((48, 48), 32, hflip=0.0, padding=0)(Image.new("RGB", (32, 32)), Key(0), 0)
    assert grown.shape == (3, 48, 48)


def test_arrays_serve_where_they_lie():
    source = source_of()
    images = ResidentImages(FirstOf(source, 20), (32, 32), CPU, classes=4)
    assert images.missing == 0 and images.nbytes == 20 * 32 * 32 * 3
    assert images.load()[0].data_ptr() == source.images.ctypes.data
    fixed = source_of()
    fixed.images.flags.writeable = False
    images = ResidentImages(fixed, (32, 32), CPU, classes=4)
    assert images.missing == images.nbytes and images.load()[0].sum() == fixed.images.sum()


def test_loaders_share_what_was_copied():
    source = source_of(grey=True)
    images = [ResidentImages(source, (32, 32), CPU, classes=4) for _ in range(2)]
    assert images[1].missing == images[1].nbytes == 37 * 32 * 32 * 3
    pixels, _ = images[0].load()
    assert images[1].missing == 0 and images[1].load()[0] is pixels


def test_labels_outside_the_classes():
    crop, plan = CropFlip((32, 32)), BatchPlan(37, 8)
    said = []
    for loader in both(source_of(classes=5), crop, plan):
        with pytest.raises(UserError) as caught:
            list(loader.epoch(0))
        said.append(str(caught.value))
    assert said == ["made-up image 4 has label 4, outside the 4 classes"] * 2


@pytest.fixture
def folder(tmp_path) -> Path:
    """Image folder of 16x16 pixels in several modes: 12 to train on, 4 to evaluate."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(("RGB", "L", "P")[i % 3]).save(place / f"{i}.png")
    return tmp_path / "images"


def of_folder(folder: Path, *more: object) -> list[object]:
    start = ["--dataset", "folder", "--data-dir", folder, "--model", "cifar_resnet8", "-b", 4]
    start += ["--img-size", 16, "--train-crop-mode", "pad", "--epochs", 2, "--output", "."]
    return [*start, *more]


def test_image_files_of_one_size(run_script, folder, tmp_path):
    flags = of_folder(folder, "--crop-pct", 1, "--hflip", 0.5, "-j", 2)
    for how in ("always", "never"):
        code, _, err = run_script(CLASSIFIER, *flags, "--on-device", how, "--experiment", how)
        assert code == 0, err
    assert record_of(tmp_path / "always") == record_of(tmp_path / "never")


def test_each_split_where_it_can_be(run_script, refused, folder, tmp_path):
    """The evaluation pipeline cuts 7/8 out, which is not for the device."""
    flags = of_folder(folder, "-j", 0)
    assert run_script(CLASSIFIER, *flags, "--experiment", "auto")[0] == 0
    log = (tmp_path / "auto" / "train.log").read_text()
    assert "12 training images are kept on the device (cpu)" in log
    assert "evaluation images come through the host" in log and "--crop-pct 1" in log
    words = ["--on-device always", "evaluation images of 16x16", "--crop-pct 1"]
    refused(2, CLASSIFIER, *flags, "--on-device", "always", words=words)
    assert run_script(CLASSIFIER, *flags, "--on-device", "never", "--experiment", "never")[0] == 0
    assert record_of(tmp_path / "auto") == record_of(tmp_path / "never")


def test_image_files_of_other_sizes(run_script, refused, folder, tmp_path):
    Image.new("RGB", (16, 17)).save(folder / "train" / "dog" / "5.png")
    flags = of_folder(folder, "--crop-pct", 1, "-j", 0)
    words = ["--on-device always", "training images", "not all of 16x16 pixels"]
    refused(2, CLASSIFIER, *flags, "--on-device", "always", words=words)
    assert run_script(CLASSIFIER, *flags, "--experiment", "auto")[0] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named(folder, workers):
    samples = [(str(path), 0) for path in sorted((folder / "train" / "cat").iterdir())]
    images = ResidentImages(FileSource(samples), (16, 16), CPU, classes=1, workers=workers)
    assert images.load()[0].shape == (6, 16, 16, 3)
    Path(samples[4][0]).write_bytes(b"no image")
    images = ResidentImages(FileSource(samples), (16, 16), CPU, classes=1, workers=workers)
    with pytest.raises(UserError, match=re.escape(f"cannot read {samples[4][0]}")):
        images.load()
    Image.new("RGB", (15, 16)).save(samples[4][0])
    with pytest.raises(UserError, match=r"4\.png: it has 15x16 pixels, not 16x16"):
        images.load()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--vflip", 0.5), ["crops and flips", "--hflip 0 or 0.5"]),
        (("--hflip", 0.3), ["crops and flips", "--hflip 0 or 0.5"]),
        (("--train-crop-mode", "rrc"), ["crops and flips", "--train-crop-mode"]),
        (("--padding-mode", "reflect", "--crop-padding", 32), ["--crop-padding", "reflect"]),
        (("--img-size", 40), ["training images", "40x40"]),
        (("--img-size", 40, "--no-aug"), ["training images", "40x40"]),
    ],
)
def test_always_says_what_prevents_it(refused, flags, words):
    words = ["--on-device always", *words]
    refused(2, CLASSIFIER, *FEW, *flags, "--on-device", "always", words=words)


def test_always_is_not_for_sets_of_libraries(refused, image_folder):
    flags = ("--dataset", "torch/image_folder", "--data-dir", image_folder, "--img-size", 32,
             "--train-split", "train", "--val-split", "val", "--train-crop-mode", "none", "-b", 2,
             "--crop-pct", 1, "--epochs", 1, "--on-device", "always")  # fmt: skip
    refused(2, CLASSIFIER, *flags, words=["--on-device always", "read by its library"])


def test_always_is_not_for_feature_maps(refused):
    flags = ("--epochs", 1, "--train-limit", 64, "--eval-limit", 64, "--on-device", "always")
    words = ["--on-device", "training classifiers", "features", "drop it"]
    for script in ("train/transnet.py", "train/transclassifier.py"):
        refused(2, script, *flags, words=words)


def test_memory_is_not_exceeded(run_script, refused, tmp_path, monkeypatch):
    """Digits are grey: in RGB they are copied, 203 images to train on and 90 to evaluate."""
    training, both = (count * 32 * 32 * 3 for count in (203, 293))

    def kept(name: str, free: int) -> list[str]:
        monkeypatch.setattr(on_device, "free_memory", lambda: free)
        code, _, err = run_script(CLASSIFIER, *FEW, "--epochs", 1, "--experiment", name)
        assert code == 0, err
        log = (tmp_path / name / "train.log").read_text()
        assert log.count("through the host (the") == 2 - log.count("are kept on the device")
        return re.findall(r"(\w+) images are kept on the device", log)

    assert kept("both", 4 * both) == ["training", "evaluation"]
    assert kept("one", 4 * both - 4) == ["training"]
    assert kept("none", 4 * training - 4) == ["evaluation"]
    assert kept("nothing", 0) == []
    monkeypatch.setattr(on_device, "free_memory", lambda: both - 1)
    words = ["--on-device always", "evaluation images of digits", "MiB", "--on-device never"]
    refused(1, CLASSIFIER, *FEW, "--on-device", "always", words=words)
    monkeypatch.setattr(on_device, "free_memory", lambda: both)
    assert run_script(CLASSIFIER, *FEW, "--on-device", "always", "--epochs", 1)[0] == 0


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(on_device, "free_memory", lambda: 1000)
    assert on_device.device_memory(CPU) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert on_device.device_memory(CPU) == 333


CASES = {
    "plain": (CLASSIFIER, ()),
    "flipped": (CLASSIFIER, ("--hflip", 0.5)),
    "mirrored": (CLASSIFIER, ("--padding-mode", "reflect", "--crop-padding", 7)),
    "fixed": (CLASSIFIER, ("--no-aug",)),
    "accumulated": (CLASSIFIER, ("--grad-accum-steps", 2, "--hflip", 0.5)),
    "averaged": (CLASSIFIER, ("--amp", "--channels-last", "--model-ema")),
    "reference": (CLASSIFIER, ("--ops", "reference", "--drop-last", "--eval-drop-last")),
    "distilled": (DISTILL, ("--method", "crd", "kd", "--crd-negatives", 40)),
    "two stages": (DISTILL, ("--method", "fsp", "kd", "--init-epochs", 1, "--baseline")),
    "classifier": (
        DISTILL,
        ("--method", "layer", "--classifier-epochs", 1, "--classifier-lr", 0.01),
    ),
    "born again": (BORN_AGAIN, ("--generations", 2)),
    "evolved": ("train/evolve.py", ("--generations", 2, "--epochs", 1)),
    "linear heads": (HEADS, ()),
    "deep heads": (HEADS, ("--kind", "deep")),
}


def flags_of(case, teacher_run):
    script, flags = CASES[case]
    flags = (*(FEW[2:] if script == HEADS else FEW), *flags)
    if script in (DISTILL, HEADS):
        flags += ("--teacher", "cifar_resnet8")
    if script == DISTILL and "--baseline" not in flags:
        flags += ("--no-baseline",)
    if script in (DISTILL, HEADS) and case != "deep heads":
        flags += ("--teacher-checkpoint", teacher_run)
    return script, flags


@pytest.mark.parametrize("case", CASES)
def test_runs_end_with_the_same_bits(run_script, teacher_run, tmp_path, case):
    """--on-device never has workers, and auto must not fall back to them."""
    script, flags = flags_of(case, teacher_run)
    for how in ("never", "auto"):
        code, _, err = run_script(script, *flags, "--on-device", how, "--experiment", how)
        ops.use("auto")
        assert code == 0, err
    records = []
    for how in ("never", "auto"):
        whole = tmp_path / how
        runs = [path.parent for path in whole.rglob("results.json")]
        trained = [run for run in runs if (run / "summary.csv").exists()]
        records.append({run.relative_to(whole): record_of(run) for run in trained})
        results = re.sub('"finished": .*', "", (whole / "results.json").read_text())
        records[-1] |= {"results": re.sub(rf"\b{how}\b", "RUN", results)}
    assert records[0] == records[1] and records[0]
    log = "".join(path.read_text() for path in (tmp_path / "auto").rglob("train.log"))
    assert "training images are kept" in log and "through the host" not in log


def test_scores_are_equal(run_script, teacher_run):
    flags = ("--eval-only", "--initial-checkpoint", teacher_run, "--eval-limit", 357, *FEW[:2])
    scores = []
    for how in ("never", "always"):
        code, out, err = run_script(CLASSIFIER, *flags, "--on-device", how)
        assert code == 0, err
        scores.append(json.loads(out.splitlines()[-1]))
    assert scores[0] == scores[1] and scores[0]["images"] == 357


def test_two_processes(tmp_path):
    for how in ("never", "always"):
        flags = (*FEW, "--hflip", 0.5, "--grad-accum-steps", 2, "-j", 1)
        flags += ("--on-device", how, "--experiment", how)
        said = finish(command(*TORCHRUN, ROOT / CLASSIFIER, *flags, cwd=tmp_path))
        assert '"processes": 2' in said
    assert record_of(tmp_path / "never") == record_of(tmp_path / "always")


@pytest.mark.parametrize("later", ["never", "always"])
def test_resumed_within_an_epoch(tmp_path, later):
    """On the device until it is killed; a resumed run may change that."""
    flags = (*FEW, "--hflip", 0.5, "--checkpoint-steps", 1)
    killed = (sys.executable, ROOT / "tests/killed.py")
    whole = (*flags, "--on-device", "never", "--experiment", "whole")
    finish(command(*killed, "0:0", CLASSIFIER, *whole, cwd=tmp_path))
    flags += ("--experiment", "cut", "--resume", "auto")
    cut = command(*killed, "0:40", CLASSIFIER, *flags, "--on-device", "always", cwd=tmp_path)
    cut.communicate(timeout=600)
    assert cut.returncode == -9
    kept = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert any("step" in name for name in kept), kept
    finish(command(*killed, "0:0", CLASSIFIER, *flags, "--on-device", later, cwd=tmp_path))
    assert record_of(tmp_path / "whole") == record_of(tmp_path / "cut")


def test_no_worker_is_started(run_script, monkeypatch):
    def refuse(*_):
        raise AssertionError("a worker loader was asked")

    monkeypatch.setattr(Loader, "epoch", refuse)
    assert run_script(CLASSIFIER, *FEW, "--epochs", 1)[0] == 0
