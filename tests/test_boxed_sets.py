"""Sets cut to boxes from small folders in their archives' real layouts; crops, halves, parts."""

from __future__ import annotations

import csv
import json
import shutil
import struct
import zlib
from argparse import Namespace
from pathlib import Path

import boxed_folders as made
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.io import loadmat
from test_resume import TORCHRUN, command, finish

from kdfast.data import BatchPlan, Loader, eval_transform, keep_decoded, open_data
from kdfast.data.boxes import Box
from kdfast.data.decoded import Decoded
from kdfast.data.matlab import cell_strings
from kdfast.data.sources import ArraySource, Subset, half_of
from kdfast.data.voc import CLASSES
from kdfast.errors import UserError
from kdfast.training.evaluate import evaluate
from kdfast.training.parser import read_recipe
from kdfast.training.schedules import Schedule

from conftest import ROOT  # isort: skip

CLASSIFIER, CROP = "train/classifier.py", "kdfast/training/crop.py"
SETS = {
    "cub200": made.write_cub,
    "dogs120": made.write_dogs,
    "voc": made.write_voc,
    "voc-animal": made.write_voc,
    "mix320": lambda root: (made.write_cub(root), made.write_dogs(root)),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """All three archives in one folder."""
    for write in (made.write_cub, made.write_dogs, made.write_voc):
        write(tmp_path / "sets")
    return tmp_path / "sets"


def seen(source) -> list[tuple[int, int, tuple[int, int, int, int]]]:
    """Image number, label and box of every crop, from its pixels; none of them is anything else."""
    found = []
    for i in range(len(source)):
        image, label = source.read(i)
        array = np.asarray(image)
        (left, top, number), (right, bottom, _) = array[0, 0].tolist(), array[-1, -1].tolist()
        box = (left, top, right + 1, bottom + 1)
        np.testing.assert_array_equal(
            array, made.pixels(number)[top : bottom + 1, left : right + 1]
        )
        assert source.size(i) == image.size == (box[2] - box[0], box[3] - box[1])
        found.append((number, label, box))
    assert [label for _, label, _ in found] == source.labels()
    return found


def cub_rows(numbers: list[int]) -> list:
    labels = {row[0]: row[1] for row in made.CUB_ROWS}
    return [(number, labels[number], made.CUB_BOXES[number]) for number in numbers]


def dog_rows(rows: list[int], shift: int = 0) -> list:
    """In the order of class and file; one sample a box."""
    found = []
    for label, _, number, boxes in sorted(
        (made.DOG_ROWS[row] for row in rows), key=lambda r: r[:2]
    ):
        found += [(number, label + shift, tuple(map(int, box.split()))) for box in boxes]
    return found


# The sets.


@pytest.mark.parametrize("inner", ["", "CUB_200_2011"])
def test_cub(folder, inner):
    data = open_data("cub200", folder / inner)
    assert (data.name, data.classes, data.image_size, data.test) == ("cub200", 3, None, None)
    assert seen(data.train) == cub_rows(made.CUB_TRAIN)
    assert seen(data.eval) == cub_rows(made.CUB_TEST)
    assert data.train.class_names == list(made.BIRDS)
    assert "Albatross_0002_55.jpg" in data.train.describe(0) and "5,6,9,9" in data.train.describe(0)


@pytest.mark.parametrize("lists", [".", "lists"])
@pytest.mark.parametrize("compressed", [False, True])
def test_dogs(tmp_path, lists, compressed):
    made.write_dogs(tmp_path, lists=lists, compressed=compressed)
    data = open_data("dogs120", tmp_path)
    assert data.classes == 2 and data.train.class_names == list(made.DOGS)
    assert seen(data.train) == dog_rows(made.DOG_TRAIN)
    assert seen(data.eval) == dog_rows(made.DOG_TEST)
    assert (len(data.train), len(data.eval)) == (4, 4), "a sample a box"


PUBLISHED = (
    "cow, aeroplane, cat, bicycle, tvmonitor, horse, bird, dog, bottle, boat, person, train, "
    "motorbike, sheep, sofa, bus, pottedplant, diningtable, chair, car"
)


@pytest.mark.parametrize("inner", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc(folder, inner):
    assert ", ".join(CLASSES) == PUBLISHED
    data = open_data("voc", folder / inner)
    assert (data.classes, data.train.class_names) == (20, PUBLISHED.split(", "))
    # By class; [xmin, xmax) as if counted from 0; fractions cut off; the rest outside left out.
    assert seen(data.train) == [
        (203, 0, (2, 2, 6, 6)),
        (202, 4, (3, 3, 7, 24)),
        (201, 5, (5, 4, 9, 24)),
        (201, 10, (1, 1, 30, 24)),
        (203, 10, (2, 2, 6, 6)),
        (204, 13, (9, 9, 20, 20)),
    ]
    assert [(number, label) for number, label, _ in seen(data.eval)] == [
        (206, 2), (205, 6), (206, 7), (206, 19)
    ]  # fmt: skip


def test_voc_animal_keeps_the_indices(folder):
    data, whole = open_data("voc-animal", folder), open_data("voc", folder)
    assert data.classes == 20
    for split in ("train", "eval"):
        rows = seen(getattr(whole, split))
        assert seen(getattr(data, split)) == [r for r in rows if r[1] in {0, 2, 5, 6, 7, 13}]
    assert (len(data.train), len(data.eval)) == (3, 3)


def test_mix(folder):
    data = open_data("mix320", folder)
    birds, dogs = (len(names) for names in (made.BIRDS, made.DOGS))
    assert data.classes == birds + dogs
    assert seen(data.train) == cub_rows(made.CUB_TRAIN) + dog_rows(made.DOG_TRAIN, shift=birds)
    assert seen(data.eval) == cub_rows(made.CUB_TEST) + dog_rows(made.DOG_TEST, shift=birds)
    assert data.parts == {"cub200": range(3), "dogs120": range(3, 7)}
    assert open_data("mix320", folder, eval_limit=5).parts["dogs120"] == range(3, 5)
    assert open_data("mix320", folder, eval_limit=3).parts == {"cub200": range(3)}


def test_dogs_have_a_folder_of_their_own(tmp_path):
    made.write_cub(tmp_path)
    (tmp_path / "stanford-dogs").mkdir()
    made.write_dogs(tmp_path / "stanford-dogs")
    assert open_data("mix320", tmp_path).classes == 5


@pytest.mark.parametrize("name", SETS)
def test_crops_are_kept_decoded(folder, name):
    data = open_data(name, folder)
    size = sum(w * h * 3 for w, h in map(data.train.size, range(len(data.train))))
    kept = keep_decoded(data, budget=size + 10**6)
    assert isinstance(kept.train, Decoded) and kept.train.nbytes == size
    assert seen(kept.train) == seen(kept.train) == seen(data.train)


def test_download_is_torchvisions(folder, tmp_path, monkeypatch):
    calls = []

    def download(root, year, image_set, download):
        calls.append((root, year, image_set, download))
        shutil.move(folder / "VOCdevkit", root)

    monkeypatch.setattr("torchvision.datasets.VOCDetection", download)
    (tmp_path / "data").mkdir()
    for _ in range(2):  # the second finds what the first has fetched
        assert len(open_data("voc", tmp_path / "data", download=True).train) == 6
    assert calls == [(tmp_path / "data", "2012", "train", True)]


# Halves.


def test_halves_of_cub():
    """Spec check 12: 194 classes of 30 training images, 6 of 29."""
    short = {106, 125, 134, 140, 189, 195}
    labels = [label for label in range(200) for _ in range(30 - (label in short))]
    whole = ArraySource(np.zeros((len(labels), 1, 1), np.uint8), labels, "cub200")
    a, b = (half_of(whole, half) for half in "ab")
    assert (len(whole), len(a), len(b)) == (5994, 2994, 3000)
    assert sorted([*a.indices, *b.indices]) == list(range(5994)), "disjoint and complete"
    assert a.indices[:16] == [*range(15), 30] and b.indices[:16] == [*range(15, 30), 45]
    assert [a.labels().count(label) for label in (0, 106)] == [15, 14]
    assert [b.labels().count(label) for label in (0, 106)] == [15, 15]


def test_halves_of_classes_that_are_mixed(folder):
    whole = ArraySource(np.arange(7, dtype=np.uint8)[:, None, None], [0, 1, 0, 1, 1, 0, 2], "any")
    assert [half_of(whole, half).indices for half in "ab"] == [[0, 1], [2, 3, 4, 5, 6]]
    half = half_of(whole, "b")
    assert [half.read(i)[0].getpixel((0, 0)) for i in range(5)] == half.indices
    assert half.labels() == [0, 1, 1, 0, 2] and half.describe(0) == "any image 2"
    rows = seen(open_data("cub200", folder).train)
    for name, kept in (("a", [0, 2]), ("b", [1, 3, 4, 5])):
        data = open_data("cub200", folder, train_half=name)
        assert seen(data.train) == [rows[i] for i in kept]
        assert len(data.eval) == 3 and data.train.describe(0).count("jpg")
    limited = open_data("cub200", folder, train_half="b", train_limit=2).train
    assert isinstance(limited, Subset) and seen(limited) == [rows[1], rows[3]]


# How images are resized.


def test_crop_modes():
    image = Image.fromarray(made.pixels(7, width=60, height=20))
    squash = eval_transform((32, 32), 1.0, "bilinear", None, "squash")(image)
    due = np.asarray(image.resize((32, 32), Image.BILINEAR))
    np.testing.assert_array_equal(squash.permute(1, 2, 0).numpy(), due)
    center = eval_transform((32, 32), 1.0, "bilinear", None)(image)
    assert squash[0].max() - squash[0].min() > 55 and center[0].max() - center[0].min() < 25
    border = eval_transform((32, 32), 1.0, "bilinear", None, "border")(image)
    assert border[2, 16, 0] == 7 and border[2, 0, 0] != 7 and border[2, -1, 0] != 7
    cut = eval_transform((32, 32), 0.5, "bilinear", None, "squash")(image)
    due = np.asarray(image.resize((64, 64), Image.BILINEAR))[16:48, 16:48]
    np.testing.assert_array_equal(cut.permute(1, 2, 0).numpy(), due)


@pytest.mark.parametrize(("name", "batch", "epochs"), [
    ("cub200", 128, 300), ("mix320", 64, 300), ("voc-animal", 128, 150)
])  # fmt: skip
def test_recipes(run_script, name, batch, epochs):
    flags = ("--dataset", name, "--recipe", name, "--print-config")
    code, said, _ = run_script(CLASSIFIER, *flags)
    assert code == 0
    for line in (
        f"global-batch-size: {batch}", f"epochs: {epochs}", "aug: false", "crop-mode: squash",
        "crop-pct: 1.0", "img-size: 224", "opt: momentum", "lr: 0.01", "momentum: 0.9",
        "weight-decay: 0.0001", "val-interval: 5", "warmup-epochs: 0",
    ):  # fmt: skip
        assert f"\n{line}\n" in said, line
    recipe = {key.replace("-", "_"): value for key, value in read_recipe(name).items()}
    options = Namespace(**recipe, sched_on_updates=False, warmup_epochs=0, warmup_lr=0, min_lr=0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.lr)
    schedule = Schedule(optimizer, options, 1)
    for epoch in (0, 59, 60, 119, 120, epochs - 1):
        schedule.start_epoch(epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.3 ** (epoch // 60))


# Scores of the parts of a set.


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_parts_are_scored_apart(folder, batch):
    data = open_data("mix320", folder)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    answers = {(number, box): torch.randn(5) for number, _, box in seen(data.eval)}

    def network(images):
        rows = [(i[2, 0, 0].item(), *i[:2, 0, 0].tolist(), *i[:2, -1, -1].tolist()) for i in images]
        boxes = [(n, (left, top, right + 1, bottom + 1)) for n, left, top, right, bottom in rows]
        return torch.stack([answers[key] for key in boxes])

    class Whole(torch.nn.Module):
        """Batches of one size only can be stacked."""

        def forward(self, image):
            array = torch.zeros(3, made.HEIGHT, made.WIDTH, dtype=torch.uint8)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            array[:, : pixels.shape[1], : pixels.shape[2]] = pixels
            array[:, -1, -1] = pixels[:, -1, -1]
            return array

    loader = Loader(data.eval, Whole(), BatchPlan(7, batch), classes=5)
    scores = evaluate(network, loader, accelerator, lambda x: x, parts=data.parts)
    right = [answers[n, box].argmax().item() == label for n, label, box in seen(data.eval)]
    assert 0 < sum(right) < 7
    assert scores["top1"] == pytest.approx(100 * sum(right) / 7)
    assert scores["top1_cub200"] == pytest.approx(100 * sum(right[:3]) / 3)
    assert scores["top1_dogs120"] == pytest.approx(100 * sum(right[3:]) / 4)
    plain = evaluate(network, loader, accelerator, lambda x: x)
    assert plain == {key: scores[key] for key in ("loss", "top1", "top5", "images")}


TINY = ("--dataset", "mix320", "--recipe", "mix320", "--model", "cifar_resnet8", "--img-size", 32,
        "--epochs", 2, "--val-interval", 2, "--freeze-bn", "--global-batch-size", 6, "-j", 0,
        "--experiment", "mine")  # fmt: skip


def columns(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_mix_trains(run_script, folder, tmp_path):
    """One process and two: the same scores, of all images and of each part."""
    flags = (*TINY, "--data-dir", folder)
    code, out, err = run_script(CLASSIFIER, *flags)
    assert code == 0, err
    first, last = columns(Path("output/mine"))
    names = ["eval_loss", "eval_top1", "eval_top5", "eval_top1_cub200", "eval_top1_dogs120"]
    assert [name for name in last if name.startswith("eval_")] == names
    assert [first[name] for name in names] == [""] * 5
    results = json.loads(out.splitlines()[-1])
    for kind in ("last", "best"):
        for name in names:
            assert results[kind][name[5:]] == float(last[name])
    pooled = (3 * float(last[names[3]]) + 4 * float(last[names[4]])) / 7
    assert float(last["eval_top1"]) == pytest.approx(pooled)

    finish(command(*TORCHRUN, ROOT / CLASSIFIER, *flags, "--output", "two", cwd=tmp_path))
    for row, other in zip((first, last), columns(Path("two/mine")), strict=True):
        for name in ("train_loss", *names):
            assert row[name] == other[name] or float(row[name]) == pytest.approx(
                float(other[name]), abs=1e-4
            )

    weights = ("--initial-checkpoint", "output/mine", "--eval-only")
    code, out, err = run_script(CLASSIFIER, *flags, *weights)
    assert code == 0, err
    assert json.loads(out)["top1_dogs120"] == float(last["eval_top1_dogs120"])
    code, _, err = run_script("analysis/report.py", "output/mine", "--output", "report")
    assert code == 0, err


def test_half_is_recorded_and_named(run_script):
    few = ("--model", "cifar_resnet8", "--epochs", 1, "--train-limit", 64, "--eval-limit", 64)
    code, _, err = run_script(CLASSIFIER, *few, "--train-half", "b")
    assert code == 0, err
    run = Path("output/classifier-digits-half-b-cifar_resnet8-s0")
    assert "train-half: b" in (run / "args.yaml").read_text()
    (row,) = columns(run)
    assert [name for name in row if name.startswith("eval_")] == [
        "eval_loss", "eval_top1", "eval_top5"
    ]  # fmt: skip


# Crops in a folder.


# As voc needs an image of every class in both splits, to be a folder.
ALL_CLASSES = {
    split: {
        f"{year}_{i:06d}": [(name, f"{i} 1 {i + 3} 9", ""), (CLASSES[19 - i], "2 2 20 12", "")]
        for i, name in enumerate(CLASSES)
    }
    for split, year in (("train", 2008), ("val", 2009))
}


@pytest.mark.parametrize("name", ["cub200", "dogs120", "voc", "mix320"])
def test_crops_in_a_folder(run_script, folder, name):
    if name == "voc":
        shutil.rmtree(folder / "VOCdevkit")
        made.write_voc(folder, ALL_CLASSES)
    code, out, err = run_script(CROP, "--dataset", name, "--data-dir", folder, "-j", 3, "crops")
    assert (code, err) == (0, "")
    data, copied = open_data(name, folder), open_data("folder", "crops")
    assert copied.classes == data.classes
    for split, folder_name in (("train", "train"), ("eval", "val")):
        ours, theirs = getattr(data, split), getattr(copied, split)
        assert seen(theirs) == seen(ours), "order, labels and pixels"
        assert f"crops/{folder_name}: {len(ours)} images of {data.classes} classes" in out
        stems = [Path(theirs.describe(i)).stem for i in range(len(theirs))]
        assert stems == sorted(stems)
    assert [path.name for path in Path().iterdir() if path.name.startswith(".crops")] == []


def test_folder_names_of_voc(run_script, folder):
    shutil.rmtree(folder / "VOCdevkit")
    made.write_voc(folder, ALL_CLASSES)
    assert run_script(CROP, "--dataset", "voc", "--data-dir", folder, "crops")[0] == 0
    names = sorted(path.name for path in Path("crops/train").iterdir())
    assert names == [f"{i:02d}-{name}" for i, name in enumerate(CLASSES)]


def test_crops_of_images_that_png_cannot_hold(run_script, folder):
    path = next((folder / "CUB_200_2011/images" / made.BIRDS[0]).glob("*0002_55.jpg"))
    image = Image.fromarray(made.pixels(3)).convert("CMYK")
    image.save(path, "JPEG")
    assert run_script(CROP, "--dataset", "cub200", "--data-dir", folder, "crops")[0] == 0
    ours, theirs = (open_data(*which).train for which in (("cub200", folder), ("folder", "crops")))
    np.testing.assert_array_equal(
        np.asarray(theirs.read(0)[0]), np.asarray(ours.read(0)[0].convert("RGB"))
    )


@pytest.mark.parametrize(
    "code, flags, words",
    [
        (2, "--dataset voc-animal crops", ["voc-animal", "aeroplane", "--dataset voc-animal"]),
        (2, "--dataset cub200 sets", ["sets", "exists"]),
        (2, "--dataset digits crops", ["digits", "boxes"]),
        (2, "--dataset cub20 crops", ["did you mean cub200"]),
        (2, "--dataset cub200", ["OUT"]),
        (2, "crops", ["--dataset", "mix320"]),
        (2, "--dataset cub200 crops --work 3", ["--work"]),
        (1, "--dataset cub200 crops --data-dir nowhere", ["nowhere", "CUB_200_2011"]),
    ],
)
def test_crops_that_are_refused(refused, folder, code, flags, words):
    flags = flags.split() if "--data-dir" in flags else ["--data-dir", folder, *flags.split()]
    refused(code, CROP, *flags, words=words)


def test_damaged_image_leaves_no_crops(refused, folder):
    (folder / "CUB_200_2011/images" / made.BIRDS[2] / "Sooty_0048_1130.jpg").write_bytes(b"none")
    flags = ("--dataset", "cub200", "--data-dir", folder, "crops")
    refused(1, CROP, *flags, words=["Sooty_0048_1130.jpg", "box 9,8,16,14"])


# Bad input.


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, path
    path.write_text(text.replace(old, new))


def relist(root: Path, name: str, change) -> None:
    path = root / f"{name}_list.mat"
    made.write_mat(path, change(cell_strings(path, "file_list", "")))


BILLION = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]><a>&c;</a>'
CHIHUAHUA = f"Annotation/{made.DOGS[0]}/n02085620_1"
IN_TRAIN = f"{made.DOGS[1]}/n02085782_7.jpg"
XML = "VOCdevkit/VOC2012/Annotations/2008_000015.xml"
CUB = "CUB_200_2011/"
DAMAGES = {
    "cub200: nothing there": (
        lambda root: shutil.rmtree(root),
        ["sets or sets/CUB_200_2011", "CUB_200_2011.tgz", "data.caltech.edu", "--data-dir"],
    ),
    "cub200: no boxes": (
        lambda root: (root / CUB / "bounding_boxes.txt").unlink(),
        ["no bounding_boxes.txt in sets/CUB_200_2011", "CUB_200_2011.tgz"],
    ),
    "cub200: no split": (
        lambda root: (root / CUB / "train_test_split.txt").unlink(),
        ["no train_test_split.txt"],
    ),
    "cub200: box without numbers": (
        lambda root: edit(root / CUB / "bounding_boxes.txt", "5.0 6.0 4.0", "5.0 six 4.0"),
        ["bounding_boxes.txt line 3", "numbers"],
    ),
    "cub200: box of nothing": (
        lambda root: edit(root / CUB / "bounding_boxes.txt", "5.0 6.0 4.0", "5.0 6.0 0.0"),
        ["bounding_boxes.txt line 3", "without a pixel", "5 6 5 9"],
    ),
    "cub200: infinite box": (
        lambda root: edit(root / CUB / "bounding_boxes.txt", "5.0 6.0 4.0", "5.0 inf 4.0"),
        ["bounding_boxes.txt line 3", "not finite"],
    ),
    "cub200: box left of the image": (
        lambda root: edit(root / CUB / "bounding_boxes.txt", "5.0 6.0 4.0", "-9.0 6.0 4.0"),
        ["bounding_boxes.txt line 3", "without a pixel"],
    ),
    "cub200: half a row": (
        lambda root: edit(root / CUB / "bounding_boxes.txt", "5.0 6.0 4.0 3.0", "5.0 6.0"),
        ["bounding_boxes.txt line 3", "2 values", "not 4"],
    ),
    "cub200: image without a box": (
        lambda root: edit(root / CUB / "bounding_boxes.txt", "3 5.0 6.0 4.0 3.0\n", ""),
        ["bounding_boxes.txt", "no image 3"],
    ),
    "cub200: box without an image": (
        lambda root: edit(root / CUB / "bounding_boxes.txt", "3 5.0", "33 1 1 1 1\n3 5.0"),
        ["bounding_boxes.txt", "33", "images.txt does not"],
    ),
    "cub200: image twice": (
        lambda root: edit(root / CUB / "images.txt", "3 001", "2 001"),
        ["images.txt line 3", "image 2 again, after line 2"],
    ),
    "cub200: image missing": (
        lambda root: (root / CUB / "images" / made.BIRDS[1] / "Laysan_0033_658.jpg").unlink(),
        ["images.txt", "Laysan_0033_658.jpg", "missing"],
    ),
    "cub200: image without a class": (
        lambda root: edit(root / CUB / "images.txt", f"4 {made.BIRDS[1]}/", "4 "),
        ["images.txt line 4", "Laysan_0033_658.jpg", "class folder"],
    ),
    "cub200: third split": (
        lambda root: edit(root / CUB / "train_test_split.txt", "4 1", "4 2"),
        ["train_test_split.txt line 4", "not 0 or 1"],
    ),
    "cub200: another class": (
        lambda root: edit(root / CUB / "image_class_labels.txt", "4 2", "4 3"),
        ["image_class_labels.txt line 4", "class 3", "Laysan_0033_658.jpg"],
    ),
    "dogs120: nothing there": (
        lambda root: shutil.rmtree(root),
        ["sets or sets/stanford-dogs", "annotation.tar", "vision.stanford.edu"],
    ),
    "dogs120: no boxes": (
        lambda root: shutil.rmtree(root / "Annotation"),
        ["no Annotation in sets", "annotation.tar"],
    ),
    "dogs120: no list": (
        lambda root: (root / "test_list.mat").unlink(),
        ["no test_list.mat in sets or sets/lists", "lists.tar"],
    ),
    "dogs120: damaged list": (
        lambda root: (root / "train_list.mat").write_bytes(b"MATLAB 5.0" + bytes(300)),
        ["train_list.mat", "damaged", "lists.tar"],
    ),
    "dogs120: other variable": (
        lambda root: made.savemat(root / "train_list.mat", {"files": [1, 2]}),
        ["train_list.mat", "file_list"],
    ),
    "dogs120: numbers for names": (
        lambda root: made.savemat(root / "train_list.mat", {"file_list": [1, 2]}),
        ["train_list.mat", "file_list"],
    ),
    "dogs120: in both lists": (
        lambda root: relist(root, "test", lambda files: [*files, IN_TRAIN]),
        ["n02085782_7.jpg", "train_list.mat", "test_list.mat"],
    ),
    "dogs120: listed twice": (
        lambda root: relist(root, "train", lambda files: files + files[:1]),
        ["train_list.mat", "twice"],
    ),
    "dogs120: new class": (
        lambda root: relist(root, "test", lambda files: [*files, "n1-Wolf/n1_1.jpg"]),
        ["test_list.mat", "n1-Wolf/n1_1.jpg", "train_list.mat"],
    ),
    "dogs120: no folder": (
        lambda root: relist(root, "test", lambda files: [*files, "n1_1.jpg"]),
        ["test_list.mat entry 3", "n1_1.jpg"],
    ),
    "dogs120: no annotation": (
        lambda root: (root / CHIHUAHUA).unlink(),
        [CHIHUAHUA, "cannot read", "annotation.tar"],
    ),
    "dogs120: entities": (
        lambda root: (root / CHIHUAHUA).write_text(BILLION),
        [CHIHUAHUA, "document type"],
    ),
    "dogs120: hidden entities": (
        lambda root: (root / CHIHUAHUA).write_text(BILLION, encoding="utf-16"),
        [CHIHUAHUA, "not a text file"],
    ),
    "voc: nothing there": (
        lambda root: shutil.rmtree(root),
        ["sets/VOCdevkit/VOC2012", "--download", "host.robots.ox.ac.uk"],
    ),
    "voc: no list": (
        lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Main/val.txt").unlink(),
        ["no ImageSets/Main/val.txt in sets/VOCdevkit/VOC2012"],
    ),
    "voc: no boxes": (
        lambda root: shutil.rmtree(root / "VOCdevkit/VOC2012/Annotations"),
        ["no Annotations in sets/VOCdevkit/VOC2012"],
    ),
    "voc: no XML": (lambda root: (root / XML).write_text("<a><b>"), [XML, "not valid XML"]),
    "voc: too long": (
        lambda root: (root / XML).write_text("<annotation>" + " " * 2**20 + "</annotation>"),
        [XML, "too long"],
    ),
    "voc: no object": (lambda root: (root / XML).write_text("<annotation/>"), [XML, "no object"]),
    "voc: no box": (
        lambda root: (root / XML).write_text("<a><object><name>cow</name></object></a>"),
        [XML, "without a name or a box"],
    ),
    "voc: no numbers": (lambda root: edit(root / XML, ">2.9<", ">few<"), [XML, "numbers"]),
    "voc: turned box": (lambda root: edit(root / XML, ">6.9<", ">1<"), [XML, "2.9 2.2 1 6.1"]),
    "voc: a body part": (lambda root: edit(root / XML, ">person<", ">foot<"), [XML, "'foot'"]),
    "voc: image twice": (
        lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Main/val.txt").write_text("a\n" * 2),
        ["JPEGImages/a.jpg", "missing"],
    ),
    "voc-animal: no animal": (
        lambda root: made.write_voc(root, {"val": {"1": [("car", "1 1 2 2", "")]}}),
        ["voc-animal", "evaluation split", "empty"],
    ),
    "mix320: no dogs": (lambda root: shutil.rmtree(root / "Images"), ["no Images in sets"]),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_sets(refused, folder, how):
    damage, words = DAMAGES[how]
    damage(folder)
    name = how.split(":")[0]
    refused(1, CLASSIFIER, "--dataset", name, "--data-dir", "sets", words=words)


def test_list_with_an_image_twice(refused, folder):
    path = folder / "VOCdevkit/VOC2012/ImageSets/Main/val.txt"
    path.write_text("2008_000003\n\n2008_000003\n")
    words = ["val.txt line 3", "2008_000003"]
    refused(1, CLASSIFIER, "--dataset", "voc", "--data-dir", "sets", words=words)


@pytest.mark.parametrize("kept", ["never", "always"])
def test_box_outside_of_its_image(refused, folder, kept):
    edit(folder / CUB / "bounding_boxes.txt", "5.0 6.0 4.0", "30.0 6.0 4.0")
    flags = ("--dataset", "cub200", "--data-dir", "sets", "--model", "cifar_resnet8")
    flags += ("--img-size", 32, "-b", 2, "-j", 0, "--cache-images", kept, "--experiment", "mine")
    words = ["Albatross_0002_55.jpg", "outside of its 30x24 pixels"]
    started = ["output", "output/mine", "output/mine/*", "output/mine/tensorboard/*"]
    refused(1, CLASSIFIER, *flags, "--no-aug", words=words, leaves=started)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--dataset cub", ["did you mean cub200"]),
        ("--train-half c", ["--train-half", "'c'"]),
        ("--crop-mode squeeze", ["--crop-mode", "'squeeze'", "squash"]),
        ("--dataset voc --data-dir sets --num-classes 6", ["--num-classes 6", "20 classes"]),
        ("--dataset cub200 --data-dir sets --val-split val", ["--val-split"]),
        (
            "--dataset mix320 --data-dir sets --model cifar_resnet8 --img-size 32 -b 4 "
            "--eval-drop-last --train-half a --eval-limit 5",
            ["global batch 4", "training images"],
        ),
        (
            "--dataset mix320 --data-dir sets --model cifar_resnet8 --img-size 32 -b 3 "
            "--eval-drop-last --eval-limit 5",
            ["--eval-drop-last", "dogs120", "--batch-size"],
        ),
    ],
)
def test_flags_that_are_refused(refused, folder, flags, words):
    refused(2, CLASSIFIER, *flags.split(), words=words)


def test_boxes():
    assert Box.of(["2.9", "2.2", "6.9", "6.1"]) == (2, 2, 6, 6)
    assert Box.of([-3, -0.5, 4, 4]).within(9, 3) == (0, 0, 4, 3)
    for sides in (["a", 1, 2, 3], [1, 1, 1.5, 3], ["nan", 1, 2, 3], [-5, 1, 0, 3]):
        with pytest.raises(ValueError):
            Box.of(sides)


# MATLAB's files.


@pytest.mark.parametrize("compressed", [False, True])
def test_cells_of_strings(tmp_path, compressed):
    words = ["n02085620-Chihuahua/n02085620_5927.jpg", "a", "abcd", "abcdefgh", "Ä/ß.jpg"]
    made.write_mat(tmp_path / "list.mat", words, compressed=compressed)
    assert cell_strings(tmp_path / "list.mat", "file_list", "") == words


@pytest.mark.parametrize("order", "<>")
def test_cells_as_matlab_writes_them(tmp_path, order):
    """Characters of 16 bits, short elements in one tag, either byte order."""

    def element(kind: int, data: bytes) -> bytes:
        if len(data) <= 4 and kind != 14:
            return struct.pack(f"{order}I4s", len(data) << 16 | kind, data)
        return struct.pack(f"{order}2I", kind, len(data)) + data + bytes(-len(data) % 8)

    def matrix(kind: int, columns: int, name: bytes, content: bytes) -> bytes:
        flags = element(6, struct.pack(f"{order}2I", kind, 0))
        shape = element(5, struct.pack(f"{order}2i", 1, columns))
        return element(14, flags + shape + element(1, name) + content)

    names = ["n02085620-Chihuahua/n02085620_5927.jpg", "ab", "\u00e4\u4e16"]
    utf16 = {"<": "utf-16-le", ">": "utf-16-be"}[order]
    cells = [matrix(4, len(name), b"", element(4, name.encode(utf16))) for name in names]
    other = matrix(6, 1, b"labels", element(9, struct.pack(f"{order}d", 1)))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + {"<": b"\x00\x01IM", ">": b"\x01\x00MI"}[order]
    content = header + other + matrix(1, len(names), b"file_list", b"".join(cells))
    (tmp_path / "list.mat").write_bytes(content)
    assert cell_strings(tmp_path / "list.mat", "file_list", "") == names
    if order == "<":
        read = loadmat(tmp_path / "list.mat", uint16_codec="utf-16-le")["file_list"]
        assert [cell.item() for cell in read.ravel()] == names


def test_no_damage_does_more_than_fail(tmp_path):
    path = tmp_path / "list.mat"
    for compressed in (False, True):
        made.write_mat(path, ["one/1.jpg", "two/2.jpg"], compressed=compressed)
        whole = path.read_bytes()
        generator = np.random.default_rng(0)
        versions = [whole[:n] for n in range(0, len(whole), 7)]
        for _ in range(300):
            changed = bytearray(whole)
            changed[generator.integers(126, len(whole))] = generator.integers(256)
            versions.append(bytes(changed))
        refusals = 0
        for version in versions:
            path.write_bytes(version)
            try:
                assert all(isinstance(name, str) for name in cell_strings(path, "file_list", "x"))
            except UserError as error:
                assert str(error).startswith(str(path))
                refusals += 1
        assert refusals > 60


def test_archive_of_matlab_that_unpacks_to_too_much(tmp_path):
    bomb = zlib.compress(bytes(2**27))
    content = bytes(124) + b"\x00\x01IM" + struct.pack("<2I", 15, len(bomb)) + bomb
    (tmp_path / "list.mat").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        cell_strings(tmp_path / "list.mat", "file_list", "fetch it again")
