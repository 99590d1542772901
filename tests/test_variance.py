"""Variance reports: the table, the files and the chart, and what `analysis/variance.py` measures."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.analysis.variance import (
    Measured,
    as_csv,
    as_markdown,
    as_text,
    draw_variances,
    per_channel_csv,
)
from kdfast.metrics import VarianceReport
from kdfast.models import TransNet


def measured(seed=0, label="run", *, layers=3, generation=None, constant=False) -> Measured:
    """A Trans-Net that nobody trained, on features that nobody saw."""
    torch.manual_seed(seed)
    net, x = TransNet(4, layers), torch.randn(5, 4, 6, 6)
    target = 1.5 * net(x) + 0.2 * torch.randn(5, 4, 6, 6)
    if constant:
        target[:, 1] = 3.0
    report = VarianceReport(layers)
    report.update(net.orders(x), target)
    facts = {"images": "5 of the test split"}
    return Measured(label, report.compute(), tuple(net.gates.tolist()), facts, generation)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_holds_every_quantity_in_full():
    one = measured()
    found = {row["quantity"]: row for row in rows(as_csv([one]))}
    names = ["order0", "order1", "order2", "residual", "target", "output"]
    assert [*found][:6] == names and len(found) == 6 + 6  # six pairs of four parts
    target = one.report["target"]
    for n in range(3):
        assert float(found[f"order{n}"]["variance"]) == one.report["orders"][n]
        assert float(found[f"order{n}"]["relative"]) == one.report["orders"][n] / target
    assert float(found["residual"]["relative"]) == one.report["residual"] / target
    assert float(found["cov(order0,order2)"]["variance"]) == (
        one.report["covariances"]["order0,order2"]
    )
    orders = sum(float(found[f"order{n}"]["variance"]) for n in range(3))
    pairs = ("order0,order1", "order0,order2", "order1,order2")
    between = sum(float(found[f"cov({pair})"]["variance"]) for pair in pairs)
    assert float(found["output"]["variance"]) == pytest.approx(orders + 2 * between, rel=1e-12)


def test_per_channel_csv_averages_to_the_report():
    one, other = measured(), measured(1, "two", layers=2)
    found = rows(per_channel_csv([one, other]))
    assert [(row["run"], row["channel"]) for row in found] == [
        (label, str(c)) for label in ("run", "two") for c in range(4)
    ]
    variances = [float(row["order0_variance"]) for row in found[:4]]
    assert np.mean(variances) == pytest.approx(one.report["orders"][0], rel=1e-12)
    assert [float(row["target_mean"]) for row in found[4:]] == other.report["means"]["target"]
    assert [row["order2_variance"] for row in found[4:]] == [""] * 4


def test_several_runs_are_a_row_each():
    runs = [measured(0, "a", layers=3), measured(1, "b", layers=1)]
    head, first, second, *_ = (line.split() for line in as_text(runs).splitlines())
    assert head[:6] == ["run", "order0", "order1", "order2", "residual", "output"]
    assert first[0] == "a" and first[4] == f"{runs[0].relative('residual'):.2%}"
    assert second[:2] == ["b", f"{runs[1].relative('order0'):.2%}"]
    assert second[2] == f"{runs[1].relative('residual'):.2%}", "one order, no others"
    page = as_markdown(runs, title="Seeds | halves", picture="variance.png")
    assert "# Seeds \\| halves" in page and "(variance.png)" in page
    assert "| a | " in page and "| b | " in page and "## b" in page
    assert {row["run"] for row in rows(as_csv(runs))} == {"a", "b"}


def test_one_run_has_its_facts_gates_and_scope():
    one = measured()
    text, page = as_text([one]), as_markdown([one], title="V", picture="v.png")
    for part in (text, page):
        assert "images: 5 of the test split" in part and "p_0 0.5, p_1 0.5" in part
        assert f"{one.report['residual']:.5g}" in part
    assert "about its own mean" in page
    assert "gates" not in as_text([measured(layers=1)])


def test_constant_channels_are_counted():
    assert measured().notes() == []
    (note,) = measured(constant=True).notes()
    assert note.startswith("1 of 4 target channels are constant")
    assert note in as_markdown([measured(constant=True)], title="V", picture="v.png")


def test_a_target_that_does_not_vary_has_no_shares():
    report = VarianceReport(1)
    report.update(torch.ones(1, 2, 3, 1, 1), torch.ones(2, 3, 1, 1))
    one = Measured("still", report.compute(), (), {})
    assert "does not vary" in one.notes()[0]
    assert math.isnan(one.relative("residual")) and "-" in as_text([one])
    assert size(draw_variances([one], "still"))[0] > 300


def size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


def test_chart_follows_the_numbers():
    one, other = measured(0), measured(1)
    assert draw_variances([one], "t") == draw_variances([one], "t")
    assert draw_variances([one], "t") != draw_variances([other], "t")
    many = [measured(i, f"run-{i}") for i in range(9)]
    assert size(draw_variances(many, "t"))[0] > size(draw_variances(many[:1], "t"))[0]


def test_chart_has_a_line_over_generations():
    """A second panel, only where every run is a generation."""
    chain = [measured(i, f"g{i}", generation=i) for i in range(3)]
    mixed = [*chain[:2], measured(2, "g2")]
    assert size(draw_variances(chain, "t"))[0] > size(draw_variances(mixed, "t"))[0]
