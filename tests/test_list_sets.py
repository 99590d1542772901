"""Sets with a third split: three list files, folders, Flowers-102 and FGVC-Aircraft."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image

from kdfast.data import IMAGENET_MEAN, IMAGENET_STD, ImageData, open_data, oxford
from kdfast.errors import UsageError, UserError
from kdfast.models import read_weights

CLASSIFIER = "train/classifier.py"


def draw(path: Path, grey: int = 0, size: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, 255 - grey)).save(path)


def rows(source) -> list[tuple[str, int]]:
    """File name and class index of every image, read and told alike."""
    labels = [source.read(i)[1] for i in range(len(source))]
    assert source.labels() == labels
    return [(Path(source.describe(i)).name, label) for i, label in enumerate(labels)]


def refusal(kind: type[UserError], words, *args, **kwargs) -> None:
    with pytest.raises(UserError) as caught:
        open_data(*args, **kwargs)
    line = str(caught.value)
    assert type(caught.value) is kind and "\n" not in line and len(line) < 400, line
    assert [word for word in words if str(word) not in line] == [], line


# Three lists.

LISTS = {
    "train": "a.png sparrow\nb.png albatross\n\nc.png wren\nd.png sparrow\n",
    "val": "e.png wren\nf.png albatross\n",
    "test": "g.png sparrow\nh.png wren\ni.png albatross\n",
}


def write_lists(root: Path, suffix: str = ".txt", **texts: str) -> Path:
    for name, text in (LISTS | texts).items():
        (root / f"{name}{suffix}").write_text(text, encoding="utf-8")
    for i, letter in enumerate("abcdefghi"):
        draw(root / "images" / f"{letter}.png", 20 * i)
    return root


@pytest.fixture
def listed(tmp_path) -> Path:
    (tmp_path / "birds").mkdir()
    return write_lists(tmp_path / "birds")


def test_lists(listed):
    data = open_data("lists", listed)
    assert (data.name, data.classes, data.image_size) == ("lists", 3, None)
    assert (data.mean, data.std, data.flip, data.in_memory) == (
        IMAGENET_MEAN, IMAGENET_STD, True, False,
    )  # fmt: skip
    assert rows(data.train) == [("a.png", 1), ("b.png", 0), ("c.png", 2), ("d.png", 1)]
    assert rows(data.eval) == [("e.png", 2), ("f.png", 0)]
    assert rows(data.test) == [("g.png", 1), ("h.png", 2), ("i.png", 0)]
    assert data.test.read(0)[0].getpixel((0, 0)) == (120, 120, 135)


def test_limits_of_all_three(listed):
    data = open_data("lists", listed, train_limit=3, eval_limit=1)
    assert [len(data.train), len(data.eval), len(data.test)] == [3, 1, 1]


FORMS = {
    "commas": (".txt", "{}, {}\n"),
    "tabs": (".txt", "{}\t{}\n"),
    "spaces": (".txt", "{}   {}  \r\n"),
    "csv": (".csv", "{},{}\n"),
    "quoted csv": (".csv", '"{}","{}"\n'),
    "tsv": (".tsv", "{}\t{}\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_row(listed, form):
    expected = [rows(getattr(open_data("lists", listed), k)) for k in ("train", "eval", "test")]
    suffix, row = FORMS[form]
    for name, text in LISTS.items():
        (listed / f"{name}.txt").unlink()
        lines = (line.split() for line in text.splitlines() if line)
        text = "".join(row.format(*line) for line in lines)
        (listed / f"{name}{suffix}").write_text(text, newline="")
    data = open_data("lists", listed)
    assert [rows(getattr(data, k)) for k in ("train", "eval", "test")] == expected


def test_a_header_and_a_byte_order_mark(listed):
    for name in LISTS:
        text = (listed / f"{name}.txt").read_text().replace(" ", ",")
        (listed / f"{name}.csv").write_text(f"\ufeffFilename,Label\n{text}", encoding="utf-8")
        (listed / f"{name}.txt").unlink()
    data = open_data("lists", listed)
    assert [len(data.train), len(data.eval), len(data.test)] == [4, 2, 3]


def test_names_and_labels_with_spaces(listed):
    draw(listed / "my birds" / "no. 1, grey.png")
    (listed / "train.txt").write_text("my birds/no. 1, grey.png\tgrey wren\na.png\twren\n")
    (listed / "val.txt").write_text('"b.png",grey wren\n')
    (listed / "test.txt").unlink()
    data = open_data("lists", listed)
    assert rows(data.train) == [("no. 1, grey.png", 0), ("a.png", 1)]
    assert rows(data.eval) == [("b.png", 0)] and data.test is None


def test_integer_labels_are_sorted_as_numbers(listed):
    (listed / "train.txt").write_text("a.png 10\nb.png 9\nc.png 100\n")
    (listed / "val.txt").write_text("e.png 100\nf.png 09\n")
    (listed / "test.txt").write_text("g.png 10\n")
    data = open_data("lists", listed)
    assert [data.train.labels(), data.eval.labels(), data.test.labels()] == [[1, 0, 2], [2, 0], [1]]
    (listed / "train.txt").write_text("a.png 10\nb.png 9\nc.png 100\nd.png nine\n")
    (listed / "val.txt").write_text("e.png 100\nf.png 9\n")
    assert open_data("lists", listed).train.labels() == [0, 2, 1, 3]


def test_where_images_are(listed, tmp_path):
    draw(listed / "near.png")
    draw(tmp_path / "elsewhere" / "far.png")
    names = ["near.png", "a.png", "images/b.png", tmp_path / "elsewhere" / "far.png"]
    (listed / "train.txt").write_text("".join(f"{name} wren\n" for name in names))
    (listed / "val.txt").write_text("e.png wren\n")
    (listed / "test.txt").unlink()
    train = open_data("lists", listed).train
    assert [Path(train.describe(i)) for i in range(4)] == [
        listed / "near.png", listed / "images/a.png", listed / "images/b.png", names[3],
    ]  # fmt: skip
    assert all(train.read(i)[0].size == (40, 36) for i in range(4))


def test_named_lists(listed):
    for old, new in (("train", "fit.lst"), ("val", "tune.txt"), ("test", "held.csv")):
        (listed / f"{old}.txt").rename(listed / new)
    names = {"train_split": "fit.lst", "eval_split": "tune", "test_split": "held.csv"}
    data = open_data("lists", listed, **names)
    assert [len(data.train), len(data.eval), len(data.test)] == [4, 2, 3]
    assert open_data("lists", listed, train_split="fit.lst", eval_split="tune").test is None


def test_a_list_that_selects_does_not_test(listed):
    data = open_data("lists", listed, eval_split="test.txt")
    assert len(data.eval) == 3 and data.test is None


def appended(name: str, text: str):
    def change(root: Path) -> None:
        with (root / f"{name}.txt").open("a") as file:
            file.write(text)

    return change


WRONG = {
    "no lists": (
        lambda root: [(root / f"{name}.txt").unlink() for name in LISTS],
        ["birds", "train.txt", "train.csv", "--train-split"],
    ),
    "no val": (
        lambda root: (root / "val.txt").unlink(), ["birds", "val.txt", "--val-split"]
    ),
    "two lists": (
        lambda root: shutil.copy(root / "test.txt", root / "test.csv"),
        ["test.txt", "test.csv", "--test-split"],
    ),
    "empty list": (lambda root: (root / "train.txt").write_text("\n"), ["train.txt", "no image"]),
    "empty test": (lambda root: (root / "test.txt").write_text(""), ["test.txt", "no image"]),
    "not text": (lambda root: (root / "val.txt").write_bytes(b"\xff\xfe\0"), ["val.txt", "text"]),
    "unknown label": (
        lambda root: (root / "val.txt").write_text("e.png wren\nf.png crow\n"),
        ["val.txt line 2", "crow", "train.txt"],
    ),
    "unknown label in test": (appended("test", "\nj.png crow\n"), ["test.txt line 5", "j.png"]),
    "missing file": (appended("train", "z.png wren\n"), ["train.txt line 6", "z.png", "images"]),
    "a folder": (appended("train", "../birds wren\n"), ["train.txt line 6", "../birds"]),
    "twice": (appended("train", "images/a.png wren\n"), ["train.txt line 6", "a.png", "line 1"]),
    "no label": (appended("train", "z.png\n"), ["train.txt line 6", "label"]),
    "empty label": (appended("train", "z.png,\n"), ["train.txt line 6", "label"]),
    "no name": (appended("train", ",wren\n"), ["train.txt line 6", "label"]),
    "three columns": (appended("train", "z.png,wren,1\n"), ["train.txt line 6", "3 columns"]),
    "strange header": (
        lambda root: (root / "train.txt").write_text("what,which\na.png,wren\n"),
        ["train.txt line 1", "what"],
    ),
    "tested on training images": (
        appended("test", "images/b.png albatross\n"),
        ["test.txt line 4", "b.png", "train.txt line 2"],
    ),
    "selected on training images": (
        appended("val", "b.png albatross\n"), ["val.txt line 3", "b.png", "train.txt line 2"]
    ),
    "tested on selecting images": (
        appended("test", "e.png wren\n"), ["test.txt line 4", "e.png", "val.txt line 1"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_wrong_lists(listed, how):
    damage, words = WRONG[how]
    damage(listed)
    refusal(UserError, words, "lists", listed)


def test_wrong_list_flags(refused, listed):
    flags = ("--dataset", "lists")
    refused(2, CLASSIFIER, *flags, words=["lists", "--data-dir", "train.txt"])
    flags += ("--data-dir", listed)
    refused(1, CLASSIFIER, *flags, "--test-split", "tests", words=["tests", "--test-split"])
    refused(2, CLASSIFIER, *flags, "--num-classes", 4, words=["--num-classes 4", "3 classes"])
    refused(2, CLASSIFIER, "--test-split", "test", words=["digits", "--test-split"])


def test_lists_train(run_script, listed):
    flags = ["--dataset", "lists", "--data-dir", listed, "--model", "cifar_resnet8"]
    flags += ["--img-size", 32, "--epochs", 1, "-b", 4, "-j", 0, "--experiment", "mine"]
    code, _, err = run_script(CLASSIFIER, *flags)
    assert code == 0, err
    _, known = read_weights(Path("output/mine/last.safetensors"))
    assert (known["classes"], known["dataset"]) == (3, "lists")
    assert known["mean"] == pytest.approx(IMAGENET_MEAN)


# Folders and other sets.


def test_folders_with_three_splits(image_folder):
    assert open_data("folder", image_folder).test is None
    shutil.copytree(image_folder / "val", image_folder / "test")
    (image_folder / "test" / "cat" / "1.png").unlink()
    data = open_data("folder", image_folder, eval_limit=2)
    assert [len(data.train), len(data.eval), len(data.test)] == [6, 2, 2]
    assert rows(open_data("folder", image_folder).test) == [
        ("0.png", 0),
        ("0.png", 1),
        ("1.png", 1),
    ]
    assert open_data("folder", image_folder, eval_split="test").test is None
    shutil.move(image_folder / "test", image_folder / "held")
    assert len(open_data("folder", image_folder, test_split="held").test) == 3
    refusal(UserError, [image_folder / "test"], "folder", image_folder, test_split="test")


def test_folders_whose_test_images_have_no_classes(image_folder):
    draw(image_folder / "test" / "0001.png")
    assert open_data("folder", image_folder).test is None
    refusal(UserError, ["test"], "folder", image_folder, test_split="test")


def test_folder_that_only_has_a_test(image_folder):
    (image_folder / "val").rename(image_folder / "test")
    data = open_data("folder", image_folder)
    assert len(data.eval) == 4 and data.test is None


def test_other_sets(image_folder):
    assert open_data("digits").test is None
    splits = {"train_split": "train", "eval_split": "val"}
    assert open_data("torch/image_folder", image_folder, **splits).test is None
    data = open_data("torch/image_folder", image_folder, **splits, test_split="val")
    assert len(data.test) == 4
    refusal(UsageError, ["digits", "--test-split"], "digits", test_split="test")


def test_a_test_split_is_not_empty(image_folder, monkeypatch):
    from kdfast.data import named
    from kdfast.data.sources import ArraySource

    some, none = (ArraySource(np.zeros((n, 4, 4), np.uint8), [0] * n, "own") for n in (2, 0))
    made = ImageData("own", some, some, 1, test=none)
    monkeypatch.setitem(named._NAMED, "own", lambda *args: made)
    refusal(UserError, ["test split", "own", "empty"], "own")


# Flowers-102.

SPLITS = {"trnid": [5, 1], "valid": [3, 6], "tstid": [7, 2, 4]}
LABELS = [77, 1, 102, 1, 2, 77, 102]


@pytest.fixture
def flowers(tmp_path, monkeypatch) -> Path:
    """Seven images in the layout of the official archives."""
    root = write_flowers(tmp_path / "flowers-102")
    publish(monkeypatch, root)
    return root


def publish(monkeypatch, root: Path) -> None:
    """Make these the published files."""
    sums = {name: hashlib.md5((root / name).read_bytes()).hexdigest() for name in oxford._FLOWERS}
    monkeypatch.setattr(oxford, "_FLOWERS", sums)


def test_published_files_are_those_of_torchvision():
    known = dict(torchvision.datasets.Flowers102._file_dict.values())
    assert oxford._FLOWERS.items() <= known.items() and len(oxford._FLOWERS) == 2


def write_flowers(root: Path) -> Path:
    for i in range(1, 8):
        draw(root / "jpg" / f"image_{i:05d}.jpg", 30 * i)
    # As stored there: uint8 and uint16 rows.
    scipy.io.savemat(root / "imagelabels.mat", {"labels": np.array([LABELS], np.uint8)})
    ids = {name: np.array([row], np.uint16) for name, row in SPLITS.items()}
    scipy.io.savemat(root / "setid.mat", ids)
    return root


@pytest.mark.parametrize("above", [False, True])
def test_flowers(flowers, above):
    data = open_data("flowers102", flowers.parent if above else flowers)
    assert (data.name, data.classes, data.image_size) == ("flowers102", 102, None)
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert rows(data.train) == [("image_00005.jpg", 1), ("image_00001.jpg", 76)]
    assert rows(data.eval) == [("image_00003.jpg", 101), ("image_00006.jpg", 76)]
    assert [name for name, _ in rows(data.test)] == [f"image_0000{i}.jpg" for i in (7, 2, 4)]
    assert data.test.labels() == [101, 0, 0]


def test_flowers_are_those_of_torchvision(flowers, monkeypatch):
    theirs = torchvision.datasets.Flowers102
    monkeypatch.setattr(theirs, "_check_integrity", lambda self: True)
    data = open_data("flowers102", flowers)
    for ours, split in ((data.train, "train"), (data.eval, "val"), (data.test, "test")):
        known = theirs(flowers.parent, split)
        assert ours.samples == [
            (str(f), label) for f, label in zip(known._image_files, known._labels, strict=True)
        ]


BROKEN_FLOWERS = {
    "nothing": (shutil.rmtree, ["flowers-102", "--data-dir", "--download"]),
    "no images": (lambda root: shutil.rmtree(root / "jpg"), ["flowers-102", "jpg", "--download"]),
    "no splits": (lambda root: (root / "setid.mat").unlink(), ["flowers-102", "setid.mat"]),
    "an image lost": (
        lambda root: (root / "jpg" / "image_00004.jpg").unlink(), ["jpg/image_00004.jpg"]
    ),
    "half a file": (
        lambda root: (root / "setid.mat").write_bytes((root / "setid.mat").read_bytes()[:200]),
        ["setid.mat", "published", "again"],
    ),
    "other splits": (
        lambda root: scipy.io.savemat(root / "setid.mat", SPLITS),
        ["setid.mat", "published", "--dataset lists"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN_FLOWERS)
def test_broken_flowers(flowers, how):
    damage, words = BROKEN_FLOWERS[how]
    damage(flowers)
    refusal(UserError, words, "flowers102", flowers.parent)


@pytest.mark.parametrize("inner", ["", "flowers-102"])
def test_flowers_are_fetched_where_they_are_missing(tmp_path, monkeypatch, inner):
    asked = []

    def fetch(root, split, download):
        asked.append((Path(root), split, download))
        publish(monkeypatch, write_flowers(Path(root) / "flowers-102"))

    monkeypatch.setattr(torchvision.datasets, "Flowers102", fetch)
    for _ in range(2):
        assert open_data("flowers102", tmp_path / inner, download=True).classes == 102
    assert asked == [(tmp_path, "train", True)]


def test_flowers_that_cannot_be_fetched(refused, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torchvision.datasets, "Flowers102", fail)
    words = ["data", "no network"]
    refused(1, CLASSIFIER, "--dataset", "flowers102", "--download", words=words)


# FGVC-Aircraft.

VARIANTS = ["Boeing 737-700", "707-320", "F/A-18"]  # the file's order, whatever it is
PLANES = {
    "train": ["0000003 707-320", "0000001 F/A-18"],
    "val": ["0000002 Boeing 737-700"],
    "test": ["0000005 F/A-18", "0000004 Boeing 737-700"],
}


@pytest.fixture
def planes(tmp_path) -> Path:
    root = tmp_path / "fgvc-aircraft-2013b"
    for i in range(1, 6):
        draw(root / "data" / "images" / f"{i:07d}.jpg", 40 * i)
    (root / "data" / "variants.txt").write_text("".join(f"{name}\n" for name in VARIANTS))
    for split, lines in PLANES.items():
        text = "".join(f"{line}\n" for line in lines)
        (root / "data" / f"images_variant_{split}.txt").write_text(text)
    return root


@pytest.mark.parametrize("above", [False, True])
def test_aircraft(planes, above):
    data = open_data("aircraft", planes.parent if above else planes)
    assert (data.name, data.classes, data.image_size) == ("aircraft", 3, None)
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert rows(data.train) == [("0000003.jpg", 1), ("0000001.jpg", 2)]
    assert rows(data.eval) == [("0000002.jpg", 0)]
    assert rows(data.test) == [("0000005.jpg", 2), ("0000004.jpg", 0)]


def test_aircraft_are_those_of_torchvision(planes):
    data = open_data("aircraft", planes)
    for ours, split in ((data.train, "train"), (data.eval, "val"), (data.test, "test")):
        theirs = torchvision.datasets.FGVCAircraft(planes.parent, split)
        expected = list(zip(theirs._image_files, theirs._labels, strict=True))
        assert ours.samples == expected


TRAIN_PLANES = "data/images_variant_train.txt"


def text(name: str, content: str):
    return lambda root: (root / name).write_text(content)


BROKEN_PLANES = {
    "nothing": (shutil.rmtree, ["fgvc-aircraft-2013b", "--data-dir", "--download"]),
    "no images": (lambda root: shutil.rmtree(root / "data/images"), ["data/images", "--download"]),
    "no test": (lambda root: (root / "data/images_variant_test.txt").unlink(), ["variant_test"]),
    "an image lost": (
        lambda root: (root / "data/images/0000004.jpg").unlink(), ["images/0000004.jpg"]
    ),
    "no variants": (text("data/variants.txt", "\n"), ["variants.txt", "no variant"]),
    "a variant twice": (text("data/variants.txt", "a\nb\na\n"), ["variants.txt", "a twice"]),
    "unknown variant": (
        text(TRAIN_PLANES, "0000003 707-320\n\n0000001 Zeppelin\n"),
        ["train.txt line 3", "Zeppelin"],
    ),
    "half a line": (text(TRAIN_PLANES, "0000003\n"), ["train.txt line 1"]),
    "twice": (text(TRAIN_PLANES, "0000003 F/A-18\n0000003 F/A-18\n"), ["line 2", "0000003"]),
    "in two splits": (text(TRAIN_PLANES, "0000004 F/A-18\n"), ["test.txt line 2", "0000004"]),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN_PLANES)
def test_broken_aircraft(planes, how):
    damage, words = BROKEN_PLANES[how]
    damage(planes)
    refusal(UserError, words, "aircraft", planes)


@pytest.mark.parametrize("name", ["flowers102", "aircraft"])
def test_published_sets_have_splits_of_their_own(refused, name):
    refused(2, CLASSIFIER, "--dataset", name, "--val-split", "test", words=[name, "--val-split"])
