"""Foregrounds of images, boxes with a margin, and the mammals of ILSVRC."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import boxed_folders as made
import mask_folders as masks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdfast.data import keep_decoded, open_data
from kdfast.data.foreground import INK, cell_map, foreground_candidates, foreground_of
from kdfast.data.ilsvrc import MAMMALS
from kdfast.data.sources import FirstOf, half_of
from kdfast.errors import UsageError, UserError

CLASSIFIER, CROP = "train/classifier.py", "kdfast/training/crop.py"
# Of VOC's training images two were segmented.
SEGMENTED = {"2008_000008": 201, "2008_000015": 203}


@pytest.fixture
def cub(tmp_path) -> Path:
    root = made.write_cub(tmp_path)
    masks.write_cub_masks(root)
    return root


@pytest.fixture
def voc(tmp_path) -> Path:
    root = made.write_voc(tmp_path)
    masks.write_voc_masks(root, SEGMENTED)
    return root


def resized(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize(size, Image.BILINEAR))


# Cells.


def test_the_centre_of_mammals(tmp_path):
    """Spec check 8: 144 and 112 cells, rows and columns 2 to 13."""
    masks.write_ilsvrc(tmp_path)
    data = open_data("ilsvrc-mammals", tmp_path)
    for size in (224, 227, 32):
        cells = cell_map(foreground_of(data, 0, size))
        assert (cells.dtype, cells.shape, cells.sum(), (~cells).sum()) == (bool, (16, 16), 144, 112)
        assert np.flatnonzero(cells.any(1)).tolist() == [*range(2, 14)]
        assert np.flatnonzero(cells.any(0)).tolist() == [*range(2, 14)]
    assert cell_map(foreground_of(data, 0, (224, 227))).sum() == 144


def test_cells_are_their_top_left_pixels():
    mask = np.zeros((227, 224), np.uint8)
    mask[227 * 5 // 16, 224 * 9 // 16] = 1
    cells = cell_map(mask)
    assert np.argwhere(cells).tolist() == [[5, 9]]
    moved = np.roll(mask, 1, axis=0)
    assert not cell_map(moved).any(), "a pixel within a cell is not looked at"
    assert cell_map(mask.astype(np.float32) * 1e-6).any(), "the weakest blur is foreground"


@given(st.integers(16, 64), st.integers(16, 64), st.integers(1, 16), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_foreground_and_background_are_all_cells(height, width, grid, seed):
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), np.uint8)
    cells, rest = cell_map(mask, grid), cell_map(1 - mask, grid)
    assert (cells ^ rest).all() and cells.shape == (grid, grid)
    for i in range(grid):
        for j in range(grid):
            assert cells[i, j] == (mask[int(i * height / grid), int(j * width / grid)] > 0)


def test_expand_takes_the_middle_of_a_larger_grid():
    mask = np.zeros((224, 224), np.uint8)
    mask[56:168, 56:168] = 255
    plain, wide = cell_map(mask), cell_map(mask, expand=True)
    assert plain.shape == wide.shape == (16, 16)
    rows = [int(i * 224 / 18) for i in range(1, 17)]
    np.testing.assert_array_equal(wide, mask[np.ix_(rows, rows)] > 0)
    assert wide.sum() > plain.sum() == 64


# Masks.


@pytest.mark.parametrize("where", ["CUB_200_2011", ""])
def test_cub(cub, where):
    """Cropped and resized as the image is, to 8 bits; in the set's folder or beside it."""
    if not where:
        (cub / "segmentations").rename(cub.parent / "segmentations")
    data = open_data("cub200", cub)
    assert foreground_candidates(data) == [*range(6)]
    for index, number in enumerate(made.CUB_TRAIN):
        left, top, right, bottom = made.CUB_BOXES[number]
        found = foreground_of(data, index, (40, 48))
        crop = masks.ellipse(number)[top:bottom, left:right]
        np.testing.assert_array_equal(found, resized(crop, (48, 40)))
        assert (found.dtype, found.shape) == (np.uint8, (40, 48))


def test_cub_with_a_margin(cub):
    data = open_data("cub200", cub, box_margin=1.5)
    index = made.CUB_TRAIN.index(2)  # the whole image, 30 x 24
    canvas = np.zeros((36, 45), np.uint8)
    canvas[6:30, 7:37] = masks.ellipse(2)
    np.testing.assert_array_equal(foreground_of(data, index, 64), resized(canvas, (64, 64)))


def test_masks_of_several_modes(cub):
    """Some of the archive's masks have an alpha channel."""
    data = open_data("cub200", cub)
    before = foreground_of(data, 0, 32)
    path = next((cub / "segmentations").rglob("Albatross_0002_55.png"))
    with Image.open(path) as image:
        grey = image.copy()
    grey.convert("LA").save(path)
    np.testing.assert_array_equal(foreground_of(data, 0, 32), before)


@pytest.mark.parametrize("margin", [1.0, 1.2, 1.5])
def test_voc(voc, margin):
    """The tight mask in the middle of a canvas of int(margin * side), resized as floats."""
    data = open_data("voc", voc, box_margin=margin)
    assert foreground_candidates(data) == [0, 2, 3, 4], "those of segmented images"
    boxes = {0: (203, (2, 2, 6, 6)), 2: (201, (5, 4, 9, 24)), 3: (201, (1, 1, 30, 24))}
    for index, (number, (left, top, right, bottom)) in boxes.items():
        grey = masks.ellipse(number)[top:bottom, left:right].astype(np.float32)
        colours = {255.0: 0.299 * 128, 51.0: 0.299 * 224 + 0.587 * 224 + 0.114 * 192, 0.0: 0.0}
        for value, colour in colours.items():
            grey[grey == value] = -round(colour)
        height, width = -(top - bottom), right - left
        high, wide = int(margin * height), int(margin * width)
        canvas = np.zeros((high, wide), np.float32)
        y, x = (high - height) // 2, (wide - width) // 2
        canvas[y : y + height, x : x + width] = -grey
        found = foreground_of(data, index, (64, 50))
        assert (found.dtype, found.shape) == (np.float32, (64, 50))
        np.testing.assert_allclose(found, resized(canvas, (50, 64)), atol=1e-4)
        assert data.train.size(index) == (wide, high)


def test_voc_keeps_the_weakest_blur(voc):
    """Unlike CUB's, its masks are not rounded after resizing."""
    data = open_data("voc", voc)
    found = np.concatenate([foreground_of(data, i, 512).ravel() for i in (0, 2, 3)])
    assert ((found > 0) & (found < 0.5)).any()


def test_void_and_other_objects_are_foreground(voc):
    data = open_data("voc", voc)
    found = foreground_of(data, 3, (23, 29))  # at its own size
    np.testing.assert_array_equal(found > 0, masks.ellipse(201)[1:24, 1:30] > 0)
    assert np.unique(found).tolist() == [0, 38, 220]


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_ink(name):
    data = open_data(name, train_limit=20)
    assert foreground_candidates(data) == [*range(20)]
    for index in (0, 7):
        pixels = np.asarray(data.train.read(index)[0])
        assert pixels.shape == (32, 32)
        found = foreground_of(data, index, 32)
        np.testing.assert_array_equal(found > 0, pixels > INK)
        share = cell_map(found).mean()
        assert 0.1 < share < 0.8
        larger = foreground_of(data, index, 64)
        np.testing.assert_array_equal(larger > 0, resized(pixels, (64, 64)) > INK)


def test_a_part_or_copy_of_the_set_has_the_same_foreground(cub):
    data = open_data("cub200", cub)
    whole = [foreground_of(data, i, 32) for i in range(6)]
    kept = keep_decoded(data, 10**7)
    assert type(kept.train).__name__ == "Decoded"
    half = replace(data, train=FirstOf(half_of(data.train, "b"), 2))
    indices = half_of(data.train, "b").indices[:2]
    np.testing.assert_array_equal(foreground_of(kept, 4, 32), whole[4])
    for i, index in enumerate(indices):
        np.testing.assert_array_equal(foreground_of(half, i, 32), whole[index])


def test_voc_candidates_of_a_part(voc):
    data = open_data("voc", voc, train_limit=3)
    assert foreground_candidates(data) == [0, 2]


# Boxes with a margin.


def test_a_margin_shows_more_of_the_image_and_then_black(tmp_path):
    data = open_data("voc", made.write_voc(tmp_path), box_margin=1.2)
    assert data.train.margin == data.eval.margin == 1.2
    image = np.asarray(data.train.read(2)[0])  # 5 4 9 24: 4 x 20 pixels become 4 x 24
    assert image.shape == (24, 4, 3)
    np.testing.assert_array_equal(image[:22], made.pixels(201)[2:24, 5:9])
    assert not image[22:].any()
    tight = open_data("voc", tmp_path)
    assert tight.train.size(2) == (4, 20) and tight.train.margin == 1


def test_a_margin_at_the_command_line(tmp_path, run_script, cub):
    few = (
        "--data-dir",
        cub,
        "--dataset",
        "cub200",
        "--epochs",
        1,
        "--img-size",
        32,
        "-j",
        0,
        "-b",
        2,
    )
    flags = (*few, "--model", "cifar_resnet8", "--box-margin", 1.2, "--experiment", "run")
    code, _, err = run_script(CLASSIFIER, *flags)
    assert code == 0, err
    assert "box-margin: 1.2" in (tmp_path / "output/run/args.yaml").read_text()
    code, _, err = run_script(
        CROP, "--dataset", "cub200", "--data-dir", cub, "--box-margin", 1.2, "crops"
    )
    assert code == 0, err
    first = next((tmp_path / "crops/train").rglob("0-*.png"))
    assert Image.open(first).size == (int(1.2 * 4), int(1.2 * 3))


# Mammals.


@pytest.mark.parametrize("layout", masks.LAYOUTS)
def test_mammals(tmp_path, layout):
    """By class; objects of other classes and other folders are left out; boxes x 1.5."""
    folder = masks.write_ilsvrc(tmp_path, layout)
    for place in (tmp_path, folder):
        data = open_data("ilsvrc-mammals", place)
        assert (data.name, data.classes) == ("ilsvrc-mammals", 2)
        assert data.train.class_names == [masks.DOG, masks.ANTELOPE]
        found = [(Path(p).stem, label, tuple(box)) for p, label, box in data.train.crops]
        assert found == [
            (f"{masks.DOG}_3", 0, (10, 8, 16, 12)),
            (f"{masks.ANTELOPE}_10", 0, (20, 10, 30, 24)),
            (f"{masks.DOG}_3", 1, (12, 6, 22, 10)),
            (f"{masks.ANTELOPE}_7", 1, (3, 2, 13, 12)),
        ]
        assert data.eval.labels() == [0, 1]
    image = np.asarray(data.train.read(0)[0])  # 6 x 4 pixels become 9 x 6
    np.testing.assert_array_equal(image, made.pixels(403)[7:13, 9:18])
    tight = open_data("ilsvrc-mammals", tmp_path, box_margin=1)
    assert tight.train.size(0) == (6, 4)


def test_twelve_mammals_by_default(tmp_path):
    assert len(MAMMALS) == 12
    root = masks.write_ilsvrc(tmp_path)
    (root / "mammals.txt").unlink()
    with pytest.raises(UserError, match=r"no folder of class n02118333.*mammals.txt"):
        open_data("ilsvrc-mammals", root)
    for name in MAMMALS:
        (root / "ILSVRC2013_DET_bbox_train" / name).mkdir(exist_ok=True)
    data = open_data("ilsvrc-mammals", root)
    assert data.classes == 12 and data.train.class_names == sorted(MAMMALS)
    assert len(data.train) == 5


# Bad input.


def test_sets_without_a_foreground(image_folder):
    data = open_data("folder", image_folder)
    for ask in (foreground_candidates, lambda data: foreground_of(data, 0, 32)):
        with pytest.raises(UsageError) as error:
            ask(data)
        for name in ("folder", "cub200", "voc", "ilsvrc-mammals", "digits", "fashion-mnist"):
            assert name in str(error.value)
        assert "\n" not in str(error.value)


def broken_mask(root: Path) -> Path:
    return next((root / "segmentations").rglob("Albatross_0002_55.png"))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: path.unlink(), ["Albatross_0002_55.png", "missing", "segmentations.tgz"]),
        (lambda path: path.write_bytes(b"no image"), ["Albatross_0002_55.png", "cannot read"]),
        (
            lambda path: path.write_bytes(path.read_bytes()[:60]),
            ["Albatross_0002_55.png", "cannot read"],
        ),
        (
            lambda path: Image.new("L", (7, 5)).save(path),
            ["Albatross_0002_55.png", "7x5", "30x24"],
        ),
    ],
)
def test_bad_masks(cub, spoil, words):
    data = open_data("cub200", cub)
    spoil(broken_mask(cub))
    with pytest.raises(UserError) as error:
        foreground_of(data, 0, 32)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_voc_without_masks(tmp_path):
    data = open_data("voc", made.write_voc(tmp_path))
    with pytest.raises(UserError, match=r"no mask of a training image in .*SegmentationClass"):
        foreground_candidates(data)
    with pytest.raises(UserError, match=r"has no mask: .*2008_000015.png is missing"):
        foreground_of(data, 0, 32)


@pytest.mark.parametrize(
    "text, words",
    [
        ("n02084071\ndog\n", ["mammals.txt line 2", "'dog'", "WordNet ID"]),
        ("n02084071\n\nn02084071\n", ["mammals.txt line 3", "again", "line 1"]),
        ("\n", ["mammals.txt has no class"]),
        ("n02084071\nn02391049\n", ["no folder of class n02391049", "mammals.txt"]),
    ],
)
def test_bad_lists_of_mammals(tmp_path, text, words):
    masks.write_ilsvrc(tmp_path)
    (tmp_path / "mammals.txt").write_text(text)
    with pytest.raises(UserError) as error:
        open_data("ilsvrc-mammals", tmp_path)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    "spoil, words",
    [
        ("ILSVRC2013_DET_train/n02084071/n02084071_3.JPEG", ["n02084071_3", "missing", "unpack"]),
        ("ILSVRC2013_DET_bbox_val", ["no ILSVRC2013_DET_bbox_val", "ILSVRC2013_DET_train.tar"]),
    ],
)
def test_mammals_that_are_not_whole(tmp_path, spoil, words):
    masks.write_ilsvrc(tmp_path)
    (tmp_path / spoil).rename(tmp_path / "away")
    with pytest.raises(UserError) as error:
        open_data("ilsvrc-mammals", tmp_path)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--dataset digits --box-margin 1.2", ["--box-margin", "digits"]),
        ("--dataset cub200 --box-margin 0.5", ["--box-margin", "[1, 10]"]),
    ],
)
def test_margins_that_are_refused(refused, flags, words):
    refused(2, CLASSIFIER, *flags.split(), words=words)
