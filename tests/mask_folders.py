"""Segmentation masks beside the folders of `boxed_folders`, and ILSVRC's detection set."""

from __future__ import annotations

from pathlib import Path

import boxed_folders as made
import numpy as np
from PIL import Image

# VOC's palette: 0 black, 1 dark red, 255 nearly white.
_PALETTE = [0] * 768
_PALETTE[3:6], _PALETTE[765:768] = [128, 0, 0], [224, 224, 192]
ANTELOPE, BEAR, DOG = "n02419796", "n02131653", "n02084071"


def ellipse(number: int) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH]: an object somewhere, with grey borders, another one an image."""
    y, x = np.mgrid[: made.HEIGHT, : made.WIDTH]
    distance = ((x - 9 - number % 7) / 8) ** 2 + ((y - 8 - number % 5) / 6) ** 2
    return np.where(distance < 0.8, 255, np.where(distance < 1, 51, 0)).astype(np.uint8)


def write_cub_masks(root: Path) -> None:
    """segmentations/ in CUB_200_2011/ `root`."""
    for number, label, name, _, _ in made.CUB_ROWS:
        path = root / "segmentations" / made.BIRDS[label] / name.replace(".jpg", ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ellipse(number)).save(path)


def write_voc_masks(root: Path, images: dict[str, int]) -> None:
    """SegmentationClass/ in VOC2012/ `root`: palette masks with a void border, by image number."""
    (root / "SegmentationClass").mkdir()
    for name, number in images.items():
        grey = ellipse(number)
        mask = Image.fromarray(np.where(grey == 255, 1, np.where(grey, 255, 0)).astype(np.uint8))
        mask.putpalette(_PALETTE)
        mask.save(root / "SegmentationClass" / f"{name}.png")


# By split, folder and file: the objects, and the number of the image. WordNet IDs name them.
ILSVRC = {
    "train": {
        f"{ANTELOPE}/{ANTELOPE}_7": (401, [(ANTELOPE, "3 2 13 12")]),
        f"{ANTELOPE}/{ANTELOPE}_10": (402, [("n01503061", "0 0 5 5"), (DOG, "20 10 30 24")]),
        f"{DOG}/{DOG}_3": (403, [(DOG, "10 8 16 12"), (ANTELOPE, "12 6 22 10")]),
        f"{BEAR}/{BEAR}_1": (404, [(BEAR, "2 2 8 8")]),
    },
    "val": {
        "ILSVRC2012_val_00000002": (405, [(DOG, "4 4 10 10")]),
        "ILSVRC2012_val_00000001": (406, [(ANTELOPE, "4 4 10 10")]),
        "ILSVRC2012_val_00000003": (407, []),
    },
}
LAYOUTS = {
    "2013": "ILSVRC2013_DET_{split} ILSVRC2013_DET_bbox_{split}",
    "2017": "ILSVRC/Data/DET/{split} ILSVRC/Annotations/DET/{split}",
}


def write_ilsvrc(root: Path, layout: str = "2013") -> Path:
    """Both splits below `root`; mammals.txt has antelopes and dogs."""
    for split, images in ILSVRC.items():
        inner = "ILSVRC2013_train" if (layout, split) == ("2017", "train") else ""
        places = [root / part / inner for part in LAYOUTS[layout].format(split=split).split()]
        for name, (number, objects) in images.items():
            made.save(places[0] / f"{name}.JPEG", number)
            rows = [(wnid, box, "") for wnid, box in objects]
            made.write_annotation(places[1] / f"{name}.xml", rows)
    folder = root / "ILSVRC" if layout == "2017" else root
    (folder / "mammals.txt").write_text(f"{ANTELOPE}\n\n{DOG}\n")
    return folder
