"""Small folders in the layout of each archive of images with boxes.

A pixel of an image says where it is, [x, y, number of the image], so that a crop can be told. The
files are lossless whatever they are called.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
WIDTH, HEIGHT = 30, 24


def pixels(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.full_like(x, number)], axis=2).astype(np.uint8)


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number)).save(path, "PNG")


# Number in images.txt, class index, file, training image or not, x, y, width and height. Neither
# the rows nor the files of a class are sorted.
CUB_ROWS = [
    (1, 0, "Albatross_0046_18.jpg", 0, "3.0 2.0 10.0 12.0"),
    (2, 0, "Albatross_0009_34.jpg", 1, "0.0 0.0 30.0 24.0"),
    (3, 0, "Albatross_0002_55.jpg", 1, "5.0 6.0 4.0 3.0"),
    (4, 1, "Laysan_0033_658.jpg", 1, "1.9 2.9 5.4 6.0"),
    (5, 1, "Laysan_0001_545.jpg", 0, "20.0 4.0 10.0 9.0"),
    (6, 1, "Laysan_0082_524.jpg", 1, "20.0 4.0 14.0 30.0"),
    (7, 1, "Laysan_0042_520.jpg", 1, "7.0 7.0 7.0 7.0"),
    (8, 2, "Sooty_0048_1130.jpg", 1, "9.0 8.0 7.0 6.0"),
    (9, 2, "Sooty_0071_796386.jpg", 0, "2.0 2.0 8.0 8.0"),
]
# What those are cut to: left, top, right, bottom.
CUB_BOXES = {
    1: (3, 2, 13, 14), 2: (0, 0, 30, 24), 3: (5, 6, 9, 9), 4: (1, 2, 7, 8), 5: (20, 4, 30, 13),
    6: (20, 4, 30, 24), 7: (7, 7, 14, 14), 8: (9, 8, 16, 14), 9: (2, 2, 10, 10),
}  # fmt: skip
CUB_TRAIN, CUB_TEST = [3, 2, 4, 7, 6, 8], [1, 5, 9]  # sorted by class and file


def write_cub(root: Path) -> Path:
    """CUB_200_2011/ below `root`."""
    root = root / "CUB_200_2011"
    tables = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    boxes = []
    for number, label, name, training, box in CUB_ROWS:
        save(root / "images" / BIRDS[label] / name, number)
        tables["images"].append(f"{number} {BIRDS[label]}/{name}")
        tables["image_class_labels"].append(f"{number} {label + 1}")
        tables["train_test_split"].append(f"{number} {training}")
        boxes.append(f"{number} {box}")
    for name, lines in (tables | {"bounding_boxes": boxes}).items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    classes = (f"{label + 1} {name}\n" for label, name in enumerate(BIRDS))
    (root / "classes.txt").write_text("".join(classes))
    return root


# By class index, file and number of its image: the boxes, as xmin ymin xmax ymax.
DOG_ROWS = [
    (0, "n02085620_10074.jpg", 101, ["1 1 12 13"]),
    (0, "n02085620_1.jpg", 102, ["4 5 20 21", "0 0 5 6"]),
    (1, "n02085782_7.jpg", 103, ["2 3 9 8"]),
    (0, "n02085620_99.jpg", 104, ["6 6 30 24"]),
    (1, "n02085782_8.jpg", 105, ["2 2 14 10", "10 8 30 22", "0 1 5 9"]),
]
DOG_TRAIN, DOG_TEST = [1, 0, 2], [3, 4]  # rows, in the order of the lists


def write_dogs(root: Path, *, lists: str = ".", compressed: bool = False) -> Path:
    """Images/, Annotation/ and the lists below `root`, as the three archives unpack."""
    for label, name, number, boxes in DOG_ROWS:
        save(root / "Images" / DOGS[label] / name, number)
        annotation = root / "Annotation" / DOGS[label] / name.removesuffix(".jpg")
        write_annotation(annotation, [(DOGS[label][10:], box, "") for box in boxes])
    (root / lists).mkdir(exist_ok=True)
    for name, rows in (("train", DOG_TRAIN), ("test", DOG_TEST)):
        files = [f"{DOGS[DOG_ROWS[row][0]]}/{DOG_ROWS[row][1]}" for row in rows]
        write_mat(root / lists / f"{name}_list.mat", files, compressed=compressed)
    return root


def cells(words: list[str]) -> np.ndarray:
    column = np.empty((len(words), 1), object)
    column[:, 0] = words
    return column


def write_mat(path: Path, files: list[str], *, compressed: bool = False) -> None:
    names = [file.removesuffix(".jpg") for file in files]
    labels = np.ones((len(files), 1))
    content = {"file_list": cells(files), "annotation_list": cells(names), "labels": labels}
    savemat(path, content, do_compression=compressed)


def write_annotation(path: Path, objects: list[tuple[str, str, str]]) -> None:
    """Name, box and further elements of each object; these come before its name, as may be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "<annotation>\n<filename>any</filename>\n<size><width>1</width></size>\n"
    for name, box, more in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True)
        inner = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        text += f"<object>{more}<name>{name}</name>\n<bndbox>{inner}</bndbox></object>\n"
    path.write_text(text + "</annotation>\n")


PART = "<part><name>hand</name><bndbox><xmin>8</xmin><ymin>8</ymin></bndbox></part>"
HARD = "<difficult>1</difficult><truncated>1</truncated>"
# By list and image: its objects.
VOC = {
    "train": {
        "2008_000008": [("person", "1 1 30 24", PART), ("horse", "5 4 9 24", HARD)],
        "2008_000002": [("tvmonitor", "3 3 7 45.7", "")],
        "2008_000015": [("cow", "2 2 6 6", ""), ("person", "2.9 2.2 6.9 6.1", "")],
        "2009_000001": [("sheep", "9 9 20 20", "")],
    },
    "val": {
        "2008_000003": [("bird", "1 2 3 4", "")],
        "2008_000007": [("cat", "1 1 2 2", ""), ("dog", "4 4 30 24", ""), ("car", "1 1 9 9", HARD)],
    },
}  # fmt: skip


def write_voc(root: Path, lists: dict = VOC) -> Path:
    """VOCdevkit/VOC2012/ below `root`; images are numbered from 201 in the order of the lists."""
    root = root / "VOCdevkit" / "VOC2012"
    number = 200
    for split, images in lists.items():
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{image}\n" for image in images))
        for image, objects in images.items():
            number += 1
            save(root / "JPEGImages" / f"{image}.jpg", number)
            write_annotation(root / "Annotations" / f"{image}.xml", objects)
    return root
