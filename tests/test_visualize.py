"""Pictures of features: channels, colours, and what `analysis/visualize.py` writes."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import CLASSIFIER

from kdfast.analysis.panels import (
    draw_channel,
    draw_grid,
    grid_channels,
    map_images,
    panel_channels,
    pixels_of,
    shared_range,
)
from kdfast.data import open_data
from kdfast.training.features import Features
from kdfast.training.finished_transnets import analysis_parser, open_finished
from kdfast.training.options import parse
from kdfast.training.setup import start

VISUALIZE, TRANSNET = "analysis/visualize.py", "train/transnet.py"


def test_channels_are_the_published_ones_where_there_are_so_many():
    assert grid_channels(512) == list(range(0, 69, 2)) and len(grid_channels(512)) == 35
    assert panel_channels(512) == [0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500]
    assert panel_channels(501)[-1] == 500 and panel_channels(500)[-1] < 500


@pytest.mark.parametrize("channels", [1, 3, 11, 12, 35, 36, 64, 68, 69, 500])
def test_other_channels_are_evenly_spaced(channels):
    for found, wanted in ((grid_channels(channels), 35), (panel_channels(channels), 11)):
        assert len(found) == min(channels, wanted) and found[0] == 0
        steps = np.diff(found)
        assert max(found) < channels
        assert len(steps) == 0 or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def maps(*values: float) -> np.ndarray:
    """[len, 2, 2], each map of one value."""
    return np.array([np.full((2, 2), value) for value in values])


def colour(png: bytes) -> list[int]:
    """Of a picture that has only one."""
    pixels = pixels_of(png).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return pixels[0].tolist()


def test_maps_share_the_colours_of_the_target_and_the_input_has_its_own():
    source, target, *orders = maps(100.0, 4.0, 4.0, -4.0, 2.0)
    found = map_images(source, target, np.array(orders))
    assert [*found] == ["input", "target", "output", "order0", "order1", "order2", "residual"]
    red, blue = colour(found["target"]), colour(found["order1"])
    assert red[0] > red[2] and blue[2] > blue[0] and max(red[1], blue[1]) == 0
    assert colour(found["order0"]) == colour(found["input"]) == red
    assert colour(found["residual"]) == colour(found["output"]) != red  # 4 - 2 = 2
    assert colour(map_images(target, target, np.array([target]))["residual"])[1] > 250, "white: 0"


def test_maps_alone_are_enlarged_without_smoothing():
    values = np.array([[[-1.0, 1.0, 0.0], [0.0, 0.5, -0.5]]])
    pixels = pixels_of(map_images(values[0], values[0], values)["target"])
    assert pixels.shape == (128, 192, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 5


def test_still_maps_are_drawn():
    image = np.zeros((8, 8, 3), np.uint8)
    zeros = np.zeros((3, 2, 2))
    for png in (
        draw_grid(image, zeros, [0, 1, 2], shared_range([zeros]), "still"),
        draw_channel(image, zeros[0], zeros[0], zeros[:1], [], "still"),
    ):
        assert Image.open(io.BytesIO(png)).format == "PNG"


def test_grids_of_one_range_can_be_compared():
    """The same map is the same picture in two grids, whatever else the features hold."""
    image = np.zeros((8, 8, 3), np.uint8)
    one, other = maps(1.0, 0.0), maps(1.0, 9.0)
    limits = shared_range([one, other])
    assert limits == (0.0, 9.0)
    first, second = (draw_grid(image, m, [0], limits, "t") for m in (one, other))
    assert first == second
    assert first != draw_grid(image, one, [0], shared_range([one]), "t")


def test_channel_pictures_follow_every_map():
    image = np.zeros((8, 8, 3), np.uint8)
    rng = np.random.default_rng(0)
    source, target, *orders = rng.normal(size=(5, 4, 4))
    plain = draw_channel(image, source, target, np.array(orders), [0.1, 0.3], "t")
    assert plain == draw_channel(image, source, target, np.array(orders), [0.1, 0.3], "t")
    others = [
        (-source, target, orders, [0.1, 0.3]),
        (source, -target, orders, [0.1, 0.3]),
        (source, target, [orders[0], orders[2], orders[1]], [0.1, 0.3]),
        (source, target, orders, [0.3, 0.1]),
    ]
    for own in others:
        assert plain != draw_channel(image, *own[:2], np.array(own[2]), own[3], "t")


# What the script draws.


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Run folder of a Trans-Net from a small network to itself, trained a little on digits."""
    folder = tmp_path_factory.mktemp("transnet")
    few = ("--train-limit", 64, "--eval-limit", 30, "--epochs", 1, "--output", folder)
    call(CLASSIFIER, "--model", "cifar_resnet8", *few, "--experiment", "net")
    pair = ("--checkpoint-a", folder / "net", "--checkpoint-b", folder / "net")
    call(TRANSNET, *pair, *few, "--experiment", "run")
    return folder / "run"


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of the run; its networks stay where they are."""
    return shutil.copytree(run, tmp_path / "run")


def call(script: str, *flags: object) -> None:
    assert load_script(script).main([str(flag) for flag in flags]) == 0


def shown(board: Path) -> list[str]:
    """The tags of all images that TensorBoard finds in a folder."""
    events = EventAccumulator(str(board), size_guidance={"images": 0})
    return sorted(events.Reload().Tags()["images"])


def test_pictures_of_a_run(run_script, copied):
    few = ("--images", 0, 29, "--channels", 3, "--grid-channels", 0, 1, 2, "--save-maps")
    code, out, err = run_script(VISUALIZE, copied, *few)
    assert code == 0, err
    assert "30 images of digits, val split, for the set has no third one" in out
    kinds = [(i, part) for i in (0, 29) for part in ("a", "b", "channel-0003", "g")]
    names = [f"image-{i:05d}-{part}.png" for i, part in kinds]
    folder = copied / "visualize"
    assert sorted(path.name for path in folder.iterdir()) == [*names, "maps"]
    maps = {path.name for path in (folder / "maps").iterdir()}
    parts = ("input", "target", "output", "order0", "order1", "order2", "residual")
    assert maps == {f"image-{i:05d}.png" for i in (0, 29)} | {
        f"image-{i:05d}-channel-0003-{part}.png" for i in (0, 29) for part in parts
    }
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(set(pictures.values())) == len(pictures)
    tags = [f"test/image-{i:05d}/{part}" for i, part in kinds]
    assert shown(copied / "tensorboard") == tags
    one, other = (
        (folder / f"maps/image-00000-channel-0003-{part}.png").read_bytes()
        for part in ("input", "target")
    )
    assert one == other, "A is B here"
    pixels = np.array(open_data("digits", None).eval.read(29)[0].convert("RGB"))
    assert (pixels_of((folder / "maps/image-00029.png").read_bytes()) == pixels).all()


def test_pictures_replace_those_of_before(run_script, copied, tmp_path):
    few = ("--images", 1, "--grid-channels", 0, "--split", "train", "--output", tmp_path / "here")
    for channel in (0, 5):
        assert run_script(VISUALIZE, copied, *few, "--channels", channel)[0] == 0
    assert len(list((tmp_path / "here").iterdir())) == 3 + 2
    assert shown(copied / "tensorboard") == [
        f"train/image-00001/{part}" for part in ("a", "b", "channel-0005", "g")
    ]


def test_maps_are_those_of_the_networks(copied, tmp_path):
    """A shuffled run's target is of another image; orders add up to what the net gives."""
    parser = analysis_parser("visualize.py", None, runs="?", output="")
    for flags, shuffled in (([], False), (["--shuffle-pairs"], True)):
        options = parse(parser, [str(copied), *flags])
        accelerator = start(options)
        (finished,) = open_finished(parser, options, accelerator, [options.runs])
        maps = load_script(VISUALIZE).features_of(finished, "test", 4)
        partner = finished.partner("test", 4)
        assert (partner != 4) == shuffled
        own, other = (torch.from_numpy(read(finished, i)) for i in (4, partner))
        source, target = (finished.run.a.features(image[None])[0] for image in (own, other))
        assert np.array_equal(maps.source, source) and np.array_equal(maps.target, target)
        assert np.array_equal(maps.pixels, own.permute(1, 2, 0))
        output = finished.run.net(source[None])[0]
        assert np.allclose(maps.orders.sum(0), output.detach(), rtol=1e-4, atol=1e-5)
    features = Features(finished.options, accelerator, finished.data, [finished.run.a] * 2)
    finished.options.output = str(tmp_path)
    finished.options.features = "cache"
    batch = next(iter(features.loader("test").epoch(0)))
    cached = features.prepare(batch.images)[1][4]
    assert np.allclose(cached, maps.target, rtol=1e-2, atol=1e-2), "the partner of the caches"


def read(finished, index: int) -> np.ndarray:
    image = finished.source("test").read(index)[0]
    return np.array(image.convert("RGB")).transpose(2, 0, 1)


BAD = [
    ("nowhere", 1, ["no Trans-Net at nowhere"]),
    ("run --images 3 30", 2, ["--images 30", "30 images", "0 to 29"]),
    ("run --images -1", 2, ["--images", "-1"]),
    ("run --channels 0 32", 2, ["--channels 32", "0 to 31"]),
    ("run --grid-channels 99", 2, ["--grid-channels 99", "0 to 31"]),
    ("run --chanels 1", 2, ["--chanels", "--channels"]),
    ("run run", 2, ["run"]),
]


@pytest.mark.parametrize("row", BAD, ids=lambda row: row[0])
def test_requests_that_cannot_be_served(refused, copied, row):
    flags, code, words = row
    refused(code, VISUALIZE, *flags.split(), words=words)


def test_damaged_weights_are_refused(refused, copied):
    path = copied / "best.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused(1, VISUALIZE, copied, words=["best.safetensors", "damaged"])


def test_vectors_cannot_be_drawn(refused, run, tmp_path):
    few = ("--train-limit", 64, "--eval-limit", 30, "--epochs", 1, "--output", tmp_path)
    pair = ("--checkpoint-a", run.parent / "net", "--checkpoint-b", run.parent / "net")
    call(TRANSNET, *pair, *few, "--layer", "fc:in", "--experiment", "vectors")
    refused(2, VISUALIZE, tmp_path / "vectors", words=["fc:in", "64", "maps"])


def test_one_trans_net_at_a_time(refused, run, tmp_path):
    few = ("--train-limit", 64, "--eval-limit", 30, "--epochs", 1, "--output", tmp_path)
    net = run.parent / "net"
    pair = ("--checkpoint-a", net, "--checkpoint-b", net, net)
    call(TRANSNET, *pair, *few, "--experiment", "several")
    refused(2, VISUALIZE, tmp_path / "several", words=["several Trans-Nets", "pair-1"])
