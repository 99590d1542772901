"""Tiny ImageNet and ImageNet from their files, and the labels of every kind of source."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder

from kdfast.data import IMAGENET_MEAN, IMAGENET_STD, open_data
from kdfast.data.sources import FirstOf, TimmSource
from kdfast.errors import UserError
from kdfast.models import read_weights

from test_data import write_fashion  # isort: skip

CLASSIFIER = "train/classifier.py"
WNIDS = ["n02124075", "n01443537", "n04067472"]  # not sorted, as in the archive
CLASSES = sorted(WNIDS)
LISTED = "tiny-imagenet-200/val/val_annotations.txt"


def save(path: Path, wnid: str, mode: str = "RGB", side: int = 64) -> None:
    """One JPEG whose brightness tells its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = 40 + 80 * CLASSES.index(wnid)
    Image.new("L", (side, side), grey).convert(mode).save(path, "JPEG")


def brightness(image: Image.Image) -> int:
    return round((np.asarray(image.convert("L")).mean() - 40) / 80)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Three classes of Tiny ImageNet as the archive unpacks, 4 + 2 images each, one grey."""
    root = tmp_path / "tiny-imagenet-200"
    for wnid in WNIDS:
        for i in range(4):
            mode = "L" if (wnid, i) == (WNIDS[0], 1) else "RGB"
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", wnid, mode)
        boxes = "".join(f"{wnid}_{i}.JPEG\t0\t10\t63\t58\n" for i in range(4))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    listed = [WNIDS[i] for i in (2, 0, 1, 1, 2, 0)]
    for i, wnid in enumerate(listed):
        save(root / "val" / "images" / f"val_{i}.JPEG", wnid)
        save(root / "test" / "images" / f"test_{i}.JPEG", wnid)
    rows = (f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(listed))
    (root / "val" / "val_annotations.txt").write_text("".join(rows) + "\n")
    (root / "val" / "images" / ".DS_Store").write_bytes(b"a file manager's")
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\tsome words\n" for wnid in WNIDS))
    return root


def sort_val(root: Path, *, inner: str = "", copy: bool = False, leave: bool = False) -> None:
    """Images of val/ into a folder a class, as many scripts do."""
    val = root / "val"
    for line in (val / "val_annotations.txt").read_text().strip().splitlines():
        name, wnid = line.split("\t")[:2]
        (val / wnid / inner).mkdir(parents=True, exist_ok=True)
        (shutil.copy if copy else shutil.move)(val / "images" / name, val / wnid / inner / name)
    if not copy and not leave:
        shutil.rmtree(val / "images")
        (val / "val_annotations.txt").unlink()


@pytest.mark.parametrize("above", [False, True])
def test_tiny_imagenet_as_it_unpacks(tiny, above):
    data = open_data("tiny_imagenet", tiny.parent if above else tiny)
    assert (data.name, data.classes, data.image_size) == ("tiny-imagenet", 3, 64)
    assert (len(data.train), len(data.eval)) == (12, 6)
    assert data.mean == (0.4802, 0.4481, 0.3975) and data.std == (0.2770, 0.2691, 0.2821)
    assert data.flip and not data.in_memory
    for source in (data.train, data.eval):
        for i in range(len(source)):
            image, label = source.read(i)
            assert image.size == (64, 64) and brightness(image) == label, source.describe(i)
    assert {data.train.read(i)[0].mode for i in range(12)} == {"L", "RGB"}
    theirs = [(str(path), label) for path, label in ImageFolder(tiny / "train").samples]
    assert theirs == [
        (data.train.describe(i), label) for i, label in enumerate(data.train.labels())
    ]


def test_tiny_imagenet_is_looked_for_in_data(tiny, monkeypatch):
    (tiny.parent / "data").mkdir()
    shutil.move(tiny, tiny.parent / "data")
    monkeypatch.chdir(tiny.parent)
    assert open_data("tiny-imagenet").classes == 3


@pytest.mark.parametrize("how", [{}, {"inner": "images"}, {"leave": True}, {"copy": True}], ids=str)
def test_tiny_imagenet_sorted_by_a_script_has_the_same_indices(tiny, how):
    def rows():
        held_out = open_data("tiny-imagenet", tiny).eval
        return [(Path(held_out.describe(i)).name, held_out.read(i)[1]) for i in range(6)]

    unpacked = rows()
    sort_val(tiny, **how)
    assert rows() == unpacked and [label for _, label in unpacked] == [0, 0, 1, 1, 2, 2]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES = {
    "nothing there": (
        lambda root: shutil.rmtree(root),
        ["tiny-imagenet-200", "wnids.txt", "--data-dir", "tiny-imagenet-200.zip"],
    ),
    "no wnids": (lambda root: (root / "wnids.txt").unlink(), ["wnids.txt", "--dataset folder"]),
    "empty wnids": (lambda root: (root / "wnids.txt").write_text("\n"), ["wnids.txt", "no class"]),
    "binary wnids": (
        lambda root: (root / "wnids.txt").write_bytes(b"\xff\xfen\x00"),
        ["wnids.txt", "unpack"],
    ),
    "a class twice in wnids": (
        lambda root: edit(root / "wnids.txt", WNIDS[1], WNIDS[0]),
        ["wnids.txt", WNIDS[0], "twice"],
    ),
    "a class without folder": (
        lambda root: shutil.rmtree(root / "train" / WNIDS[1]),
        ["tiny-imagenet-200/train", WNIDS[1], "wnids.txt"],
    ),
    "a folder without class": (
        lambda root: (root / "train" / "wolf").mkdir(),
        ["tiny-imagenet-200/train", "wolf", "wnids.txt"],
    ),
    "an empty class": (
        lambda root: shutil.rmtree(root / "train" / WNIDS[1] / "images"),
        ["tiny-imagenet-200/train", WNIDS[1]],
    ),
    "no train": (lambda root: shutil.rmtree(root / "train"), ["tiny-imagenet-200/train"]),
    "no val": (lambda root: shutil.rmtree(root / "val"), ["tiny-imagenet-200/val"]),
    "no annotations": (
        lambda root: (root / "val" / "val_annotations.txt").unlink(),
        [LISTED, "unpack"],
    ),
    "unknown wnid": (lambda root: edit(root / LISTED[18:], WNIDS[2], "n99"), [LISTED, "n99"]),
    "half a line": (
        lambda root: edit(root / LISTED[18:], f"val_2.JPEG\t{WNIDS[1]}\t0\t32\t44\t62", "val_2"),
        [LISTED, "line 3"],
    ),
    "listed twice": (
        lambda root: edit(root / LISTED[18:], "val_2.JPEG", "val_1.JPEG"),
        [LISTED, "val_1.JPEG", "twice"],
    ),
    "listed and missing": (
        lambda root: (root / "val" / "images" / "val_3.JPEG").unlink(),
        [LISTED, "val_3.JPEG"],
    ),
    "there and not listed": (
        lambda root: save(root / "val" / "images" / "val_9.JPEG", WNIDS[0]),
        [LISTED, "val_9.JPEG"],
    ),
    "a class without held-out image": (
        lambda root: edit(root / LISTED[18:], WNIDS[2], WNIDS[1]),
        ["tiny-imagenet-200/val", WNIDS[2]],
    ),
    "half sorted": (
        lambda root: (
            (root / "val" / WNIDS[0]).mkdir(),
            shutil.move(root / "val" / "images" / "val_1.JPEG", root / "val" / WNIDS[0]),
        ),
        [LISTED, "val_1.JPEG"],
    ),
    "sorted, a class empty": (
        lambda root: (sort_val(root), [p.unlink() for p in (root / "val" / WNIDS[0]).iterdir()]),
        ["tiny-imagenet-200/val", WNIDS[0]],
    ),
    "sorted, a class too many": (
        lambda root: (sort_val(root), (root / "val" / "wolf").mkdir()),
        ["tiny-imagenet-200/val", "wolf"],
    ),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_tiny_imagenet(refused, tiny, how):
    damage, words = DAMAGES[how]
    damage(tiny)
    refused(1, CLASSIFIER, "--dataset", "tiny-imagenet", "--data-dir", tiny, words=words)


@pytest.mark.parametrize("split", ["train", "val"])
def test_tiny_imagenet_of_another_size(refused, tiny, split):
    (path,) = tiny.glob(f"{split}/**/*_2.JPEG") if split == "val" else [
        tiny / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_2.JPEG"
    ]  # fmt: skip
    save(path, WNIDS[0], side=32)
    started = ["output", "output/mine", "output/mine/*", "output/mine/tensorboard/*"]
    flags = ["--data-dir", tiny, "--model", "cifar_resnet8", "-b", 6, "--epochs", 1, "-j", 0]
    flags += ["--dataset", "tiny-imagenet", "--experiment", "mine"]
    words = [str(path), "32x32", "64x64", "--dataset folder"]
    refused(1, CLASSIFIER, *flags, words=words, leaves=started)


def test_tiny_imagenet_trains(run_script, tiny):
    flags = ["--dataset", "tiny-imagenet", "--data-dir", tiny.parent, "--model", "cifar_resnet8"]
    code, _, err = run_script(
        CLASSIFIER, *flags, "--epochs", 1, "-b", 6, "-j", 0, "--experiment", "mine"
    )
    assert code == 0, err
    _, known = read_weights(Path("output/mine/last.safetensors"))
    assert (known["classes"], known["dataset"]) == (3, "tiny-imagenet")
    assert known["input_size"] == [3, 64, 64] and known["mean"] == [0.4802, 0.4481, 0.3975]


# ImageNet.


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    """ImageNet's folders with one image of 24x20 pixels each in train/ and val/."""
    root = tmp_path_factory.mktemp("imagenet")
    file = io.BytesIO()
    Image.new("RGB", (24, 20), "teal").save(file, "JPEG")
    for split in ("train", "val"):
        for wnid in ImageNetInfo().label_names():
            (root / split / wnid).mkdir(parents=True)
            (root / split / wnid / f"{wnid}_1.JPEG").write_bytes(file.getvalue())
    (root / "meta.bin").write_bytes(b"torchvision's, of no use here")
    return root


@pytest.fixture
def imagenet(thousand, tmp_path) -> Path:
    """The same, its classes to be renamed, removed and added at will."""
    for split in ("train", "val"):
        (tmp_path / "imagenet" / split).mkdir(parents=True)
        for folder in (thousand / split).iterdir():
            (tmp_path / "imagenet" / split / folder.name).symlink_to(folder)
    return tmp_path / "imagenet"


def test_imagenet(thousand):
    data = open_data("imagenet", thousand)
    assert (data.classes, len(data.train), len(data.eval)) == (1000, 1000, 1000)
    assert (data.image_size, data.mean, data.std) == (None, IMAGENET_MEAN, IMAGENET_STD)
    assert data.flip and not data.in_memory
    image, label = data.eval.read(7)
    assert image.size == (24, 20) and label == 7
    # The order that timm's published weights have.
    names = ImageNetInfo().label_names()
    assert [Path(data.train.describe(i)).parent.name for i in range(1000)] == names
    assert data.train.labels() == data.eval.labels() == list(range(1000))


def test_imagenet_trains(run_script, thousand):
    flags = ["--dataset", "imagenet", "--data-dir", thousand, "--model", "cifar_resnet8"]
    flags += ["--train-limit", 8, "--eval-limit", 8, "-b", 8, "--epochs", 1, "-j", 0]
    code, _, err = run_script(CLASSIFIER, *flags, "--experiment", "mine")
    assert code == 0, err
    tensors, known = read_weights(Path("output/mine/last.safetensors"))
    assert known["classes"] == 1000 and tensors["fc.weight"].shape[0] == 1000
    assert known["mean"] == pytest.approx(IMAGENET_MEAN)


def test_imagenet_without_a_place(refused):
    refused(2, CLASSIFIER, "--dataset", "imagenet", words=["--dataset imagenet", "--data-dir"])


def flatten(folder: Path) -> None:
    """The validation images as their archive unpacks: no classes."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")


STRANGE = {
    "no val": (lambda root: shutil.rmtree(root / "val"), ["imagenet/val", "--data-dir"]),
    "unsorted val": (lambda root: flatten(root / "val"), ["imagenet/val", "torchvision"]),
    "999 classes": (
        lambda root: [(root / split / "n01440764").unlink() for split in ("train", "val")],
        ["imagenet/train", "999 classes", "--dataset folder"],
    ),
    "999 classes in val": (
        lambda root: (root / "val" / "n01440764").unlink(),
        ["imagenet/val", "999 classes", "n01440764"],
    ),
    "1001 classes": (
        lambda root: (root / "train" / "wolf").symlink_to(root / "train" / "n01440764"),
        ["imagenet/train", "1001 classes", "wolf", "--dataset folder"],
    ),
    "other classes": (
        lambda root: (root / "train" / "n01440764").rename(root / "train" / "tench"),
        ["imagenet/train", "tench", "n01440764", "--dataset folder"],
    ),
}


@pytest.mark.parametrize("how", STRANGE)
def test_not_imagenet(imagenet, how):
    damage, words = STRANGE[how]
    damage(imagenet)
    with pytest.raises(UserError) as refusal:
        open_data("imagenet", imagenet)
    line = str(refusal.value)
    assert [word for word in words if word not in line] == [] and "\n" not in line
    assert refusal.value.exit_code == 1 and len(line) < 500


def test_a_small_set_is_not_imagenet(refused, image_folder):
    flags = ("--dataset", "imagenet", "--data-dir", image_folder)
    refused(1, CLASSIFIER, *flags, words=["images/train", "2 classes", "--dataset folder"])


# Labels.


def write_mnist_of_torchvision(root: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8)[::-1] % 10
    write_fashion(root / "FashionMNIST" / "raw", images, labels, compress=False)


class WithoutTargets:
    """What a torchvision set that keeps no list of labels looks like: iNaturalist, for one."""

    def __init__(self, files: list[str], loader=None):
        self.files, self.loader = files, loader or Image.open

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.loader(self.files[index]), (index * 7) % 3


@pytest.fixture
def source(request, tmp_path, image_folder, tiny, thousand):
    kind = request.param
    if kind == "digits":
        return open_data("digits").eval
    if kind in ("fashion-mnist", "torch/fashion_mnist"):
        write_mnist_of_torchvision(tmp_path)
        return open_data(kind, tmp_path, classes=10).train
    if kind == "folder":
        return open_data(kind, image_folder).train
    if kind.startswith("tiny-imagenet"):
        if "sorted" in kind:
            sort_val(tiny)
        data = open_data("tiny-imagenet", tiny)
        return data.train if "train" in kind else data.eval
    if kind == "imagenet":
        return open_data(kind, thousand).eval
    if kind == "torch/image_folder":
        return open_data(kind, image_folder, train_split="train", eval_split="val").train
    if kind == "hfds":
        cache = tmp_path / "cache"
        return open_data(f"hfds/{image_folder}", cache, train_split="train").train
    assert kind == "without targets"
    files = sorted(map(str, image_folder.glob("train/*/*.png")))
    return TimmSource(WithoutTargets(files), "torch/inaturalist")


KINDS = ["digits", "fashion-mnist", "folder", "tiny-imagenet train", "tiny-imagenet val",
         "tiny-imagenet sorted", "imagenet", "torch/image_folder", "torch/fashion_mnist",
         "hfds", "without targets"]  # fmt: skip


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_labels_are_those_of_the_images(source, monkeypatch):
    expected = [source.read(i)[1] for i in range(len(source))]
    assert len(set(expected)) > 1
    with monkeypatch.context() as patch:
        for name in ("open", "fromarray"):
            patch.setattr(Image, name, lambda *args, **kwargs: pytest.fail("decodes"))
        if isinstance(source, TimmSource) and hasattr(source.dataset, "loader"):
            patch.setattr(source.dataset, "loader", lambda path: pytest.fail("decodes"))
        labels = source.labels()
        first = FirstOf(source, 4).labels()
    assert labels == expected and first == expected[:4]
    assert {type(label) for label in labels} == {int}
    assert FirstOf(source, 10**6).labels() == expected


def test_labels_are_the_callers_to_change(image_folder):
    train = open_data("folder", image_folder).train
    train.labels().clear()
    assert len(train.labels()) == 6


class OnlyReads:
    """Neither a list of labels nor a loader to leave out."""

    def __init__(self):
        self.reads = []

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.reads.append(index)
        return Image.new("L", (4, 4)), torch.tensor(index % 2)


def test_labels_that_only_reading_tells_are_read_once():
    dataset = OnlyReads()
    source = TimmSource(dataset, "torch/new")
    assert [source.labels(), FirstOf(source, 2).labels()] == [[0, 1, 0, 1, 0], [0, 1]]
    assert dataset.reads == [0, 1, 2, 3, 4]


def test_labels_behind_an_unreadable_image():
    class Damaged(OnlyReads):
        def __getitem__(self, index):
            raise OSError("no\nsuch image")

    with pytest.raises(UserError, match="cannot read torch/new image 0: no such image"):
        TimmSource(Damaged(), "torch/new").labels()


def hub_folder(root: Path, columns: dict[str, list]) -> Path:
    """A Hugging Face set of six images with these columns beside them."""
    import datasets

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    images = {"image": [{"bytes": file.getvalue(), "path": None}] * 6}
    made = datasets.Dataset.from_dict(images | columns).cast_column("image", datasets.Image())
    (root / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        made.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize(
    "columns, words",
    [
        ({}, ["no column 'label'", "image"]),
        ({"fine_label": [0, 1, 2] * 2}, ["no column 'label'", "fine_label"]),
        ({"label": ["cat", "dog"] * 3}, ["'label'", "string"]),
        ({"label": [[0, 1]] * 6}, ["'label'", "List"]),
        ({"label": [0, None, 1] * 2}, ["'label'", "image 1"]),
    ],
    ids=["none", "other name", "words", "lists", "holes"],
)
def test_hugging_face_sets_without_class_indices(tmp_path, columns, words):
    folder = hub_folder(tmp_path / "hub", columns)
    with pytest.raises(UserError) as refusal:
        open_data(f"hfds/{folder}", tmp_path / "cache", classes=3)
    line = str(refusal.value)
    assert [word for word in (str(folder), *words) if word not in line] == [], line


def test_hugging_face_sets_with_plain_numbers(tmp_path):
    folder = hub_folder(tmp_path / "hub", {"label": [0, 2, 1] * 2})
    data = open_data(f"hfds/{folder}", tmp_path / "cache", classes=3)
    assert data.eval.labels() == [data.eval.read(i)[1] for i in range(6)] == [0, 2, 1] * 2
