"""Which images sigma training takes over from the runs whose snapshots it examines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import boxed_folders as made
import mask_folders as masks
import numpy as np
import pytest
import yaml
from test_foreground import SEGMENTED

from kdfast.data import open_data
from kdfast.data.foreground import cell_map, foreground_of
from kdfast.training.sigma_files import read_sigma

CLASSIFIER, SIGMA = "train/classifier.py", "train/sigma.py"
TINY = ("--grid", 8, "--samples", 1, "--steps", 1, "--more-steps", 0, "--candidates", 2,
        "--images", 1, "--keep-rejected", "--accept-from", 1)  # fmt: skip


@pytest.fixture
def voc(tmp_path) -> Path:
    root = made.write_voc(tmp_path)
    masks.write_voc_masks(root, SEGMENTED)
    return root.parent.parent


@pytest.fixture
def run(run_script, voc, tmp_path) -> Path:
    flags = ("--recipe", "knowledge", "--dataset", "voc", "--data-dir", voc, "-b", 2)
    flags += ("--model", "cifar_resnet8", "--img-size", 32, "--epochs", 1, "--save-epochs", 0, 1)
    flags += ("--train-resize", 36, "--output", ".", "--experiment", "net")
    code, _, err = run_script(CLASSIFIER, *flags)
    assert code == 0, err
    return tmp_path / "net"


def with_option(run: Path, name: str, key: str, value: object) -> Path:
    """A copy of `run` whose record says something else of `key`."""
    other = shutil.copytree(run, run.parent / name)
    record = yaml.safe_load((other / "args.yaml").read_text())
    record["options"][key] = value
    if value is None:
        del record["options"][key]
    (other / "args.yaml").write_text(yaml.safe_dump(record))
    return other


def test_the_margin_of_boxes_comes_from_the_run(run_script, run, voc, tmp_path):
    """Recipe knowledge has 1.2 on VOC; images and foregrounds are those of that margin."""
    options = yaml.safe_load((run / "args.yaml").read_text())["options"]
    assert options["box-margin"] == 1.2
    code, out, err = run_script(SIGMA, run, *TINY, "--experiment", "s")
    assert code == 0 or "none of 2 candidates was accepted" in err
    if code == 0:
        assert json.loads(out.splitlines()[-1])["candidates"] == 2
    found = read_sigma(tmp_path / "output/s")
    assert found.record["box-margin"] == 1.2
    data = open_data("voc", voc, box_margin=1.2)
    tight = open_data("voc", voc)
    differs = False
    for i, index in enumerate(found.indices):
        expected = cell_map(foreground_of(data, index, 32), 8)
        assert np.array_equal(found.foreground[i], expected)
        differs |= not np.array_equal(expected, cell_map(foreground_of(tight, index, 32), 8))
    assert differs


@pytest.mark.parametrize(
    ("key", "value"), [("box-margin", 1.5), ("box-margin", None), ("train-half", "a")]
)
def test_runs_on_other_images_are_refused(refused, run, key, value):
    other = with_option(run, "other", key, value)
    words = ["other images", f"--{key}", "net has", "other has"]
    refused(2, SIGMA, run, other, *TINY, words=words)


def test_a_flag_wins_over_runs_that_differ(run_script, run, tmp_path):
    other = with_option(run, "other", "box-margin", 1.5)
    run_script(SIGMA, run, other, *TINY, "--box-margin", 1.3, "--experiment", "s")
    for name in ("net", "other"):
        assert read_sigma(tmp_path / f"output/s-{name}").record["box-margin"] == 1.3
