"""Pictures of features: which channels, in which colours, and what `analysis/visualize.py` writes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from kdfast.analysis.panels import (
    draw_channel,
    draw_grid,
    grid_channels,
    map_images,
    panel_channels,
    pixels_of,
    shared_range,
)

WHITE = [255, 255, 255]


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
