"""Concepts, learning speed, stability, and the report on two networks."""

from __future__ import annotations

import csv
import io
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sigma_folders as made
import yaml
from conftest import load_script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdfast.analysis.knowledge import measure_all, stability_csv
from kdfast.analysis.knowledge_pictures import draw_curves, draw_maps, evenly, wrapped
from kdfast.analysis.picture import new_figure
from kdfast.analysis.sigma_runs import Shared, share
from kdfast.metrics.knowledge import (
    count_concepts,
    learning_speed,
    measure_knowledge,
    stability,
    survey_thresholds,
)
from kdfast.training.sigma_files import (
    image_folder,
    read_image,
    read_npz,
    read_sigma,
    result_path,
    write_npz,
)

REGIONS = ("fg", "bg", "all")


def entropies(seed=0, images=5, checkpoints=4, grid=6) -> tuple[np.ndarray, np.ndarray]:
    """Of nobody's sigmas, the foreground's lower; each image has both regions."""
    rng = np.random.default_rng(seed)
    foreground = rng.random((images, grid, grid)) < 0.4
    foreground[:, 0, 0], foreground[:, -1, -1] = True, False
    entropy = rng.normal(-2.8, 0.4, (images, checkpoints, grid, grid))
    return entropy - 0.3 * foreground[:, None], foreground


def slowly(entropy, foreground, threshold):
    """The formulas of spec 3.7, cell by cell."""
    images, checkpoints, grid, _ = entropy.shape
    found = {"fg": np.zeros((images, checkpoints), int), "bg": np.zeros((images, checkpoints), int)}
    limits, shares = [], np.zeros((images, checkpoints))
    for m in range(checkpoints):
        means = [entropy[i, m][~foreground[i]].mean() for i in range(images)]
        limits.append(sum(means) / images)
        for i in range(images):
            for y in range(grid):
                for x in range(grid):
                    if limits[m] - entropy[i, m, y, x] > threshold:
                        found["fg" if foreground[i, y, x] else "bg"][i, m] += 1
            total = found["fg"][i, m] + found["bg"][i, m]
            shares[i, m] = found["fg"][i, m] / total if total else 0.0
    return found, np.array(limits), shares


@pytest.mark.parametrize("threshold", [-0.1, 0.2, 0.5])
def test_counts_are_those_of_the_formulas(threshold):
    entropy, foreground = entropies()
    counts, limits, shares = slowly(entropy, foreground, threshold)
    found = count_concepts(entropy, foreground, threshold)
    np.testing.assert_allclose(found["background_entropy"], limits, rtol=1e-12)
    for region in ("fg", "bg"):
        np.testing.assert_array_equal(found[region], counts[region])
        np.testing.assert_allclose(found[f"N_{region}"], counts[region].mean(0))
    np.testing.assert_allclose(found["share"], shares)
    np.testing.assert_allclose(found["fg_share"], shares.mean(0))


@given(st.integers(0, 2**32 - 1), st.floats(-1, 1))
@settings(max_examples=20, deadline=None)
def test_laws_of_counts(seed, shift):
    """Spec check 9."""
    entropy, foreground = entropies(seed)
    found = count_concepts(entropy, foreground)
    limit = found["background_entropy"][None, :, None, None]
    np.testing.assert_array_equal(
        found["fg"] + found["bg"], (limit - entropy > 0.2).sum(axis=(2, 3))
    )
    np.testing.assert_array_equal(found["all"], found["fg"] + found["bg"])
    moved = count_concepts(entropy + shift, foreground)
    np.testing.assert_array_equal(moved["all"], found["all"])
    nothing = count_concepts(entropy, foreground, math.inf)
    assert not nothing["all"].any() and (nothing["fg_share"] == 0).all()
    assert ((found["share"] >= 0) & (found["share"] <= 1)).all()
    before = found["all"]
    for threshold in (0.3, 0.5, 1.0, 2.0):
        now = count_concepts(entropy, foreground, threshold)["all"]
        assert (now <= before).all()
        before = now


def test_many_images_are_counted_in_little_memory():
    rng = np.random.default_rng(1)
    foreground = rng.random((1000, 16, 16)) < rng.uniform(0.1, 0.6, (1000, 1, 1))
    entropy = rng.normal(-2.8, 0.3, (1000, 20, 16, 16)) - 0.2 * foreground[:, None]
    tracemalloc.start()
    found = count_concepts(entropy, foreground)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * entropy.nbytes
    outside = [~cells for cells in foreground]
    for m in (0, 7, 19):
        means = [entropy[i, m][outside[i]].mean() for i in range(1000)]
        limit = sum(means) / 1000
        assert found["background_entropy"][m] == pytest.approx(limit, rel=1e-12)
        for i in (0, 1, 499, 998, 999):
            counted = {True: 0, False: 0}
            for y in range(16):
                for x in range(16):
                    if limit - entropy[i, m, y, x] > 0.2:
                        counted[bool(foreground[i, y, x])] += 1
            assert (found["fg"][i, m], found["bg"][i, m]) == (counted[True], counted[False])
            share = counted[True] / (counted[True] + counted[False])
            assert found["share"][i, m] == pytest.approx(share)


def test_a_cell_at_the_threshold_is_no_concept():
    entropy = np.full((1, 1, 2, 2), 1.0)
    foreground = np.array([[[True, True], [False, False]]])
    entropy[0, 0, 0] = 0.75, 0.75 - 2**-50
    found = count_concepts(entropy, foreground, threshold=0.25)
    assert found["background_entropy"].tolist() == [1.0]
    assert found["concepts"].tolist() == [[[[False, True], [False, False]]]]
    assert (found["fg"].tolist(), found["share"].tolist()) == ([[1]], [[1.0]])


def test_images_count_alike_whatever_their_background():
    """Hbar is a mean of means: an image of little background weighs as much as another."""
    foreground = np.zeros((2, 2, 2), bool)
    foreground[0, 0, 0], foreground[1] = True, [[True, True], [True, False]]
    entropy = np.zeros((2, 1, 2, 2))
    entropy[1] = 4.0
    assert count_concepts(entropy, foreground)["background_entropy"].tolist() == [2.0]


def test_the_share_is_a_mean_of_shares():
    entropy = np.zeros((2, 1, 2, 2))
    foreground = np.array([[[True, True], [False, False]]] * 2)
    entropy[0, 0] = [[-9, -9], [0, 0]]
    entropy[1, 0] = [[-9, 0], [-9, 0]]
    found = count_concepts(entropy, foreground)
    assert found["share"].tolist() == [[1.0], [0.5]] and found["fg_share"].tolist() == [0.75]
    assert (found["N_fg"].tolist(), found["N_bg"].tolist()) == ([1.5], [0.5])


TIMES = [0, 0.5, 0.9, 1.2]
COUNTS = [[0, 2, 5, 4], [1, 3, 3, 2]]


def test_learning_speed_of_the_toy_case():
    """Spec check 10."""
    found = learning_speed(np.array(COUNTS), np.array(TIMES))
    assert found["best"].tolist() == [2, 1]
    assert found["D_mean"] == pytest.approx(0.7)
    assert found["D_var"] == pytest.approx(0.04)
    assert found["D_std"] == pytest.approx(0.2)
    assert found["slope"] == pytest.approx(5.777778, abs=1e-6)
    assert found["slope_skipped"] == 0


def test_an_image_known_best_at_the_start_has_no_slope():
    counts = np.array([[9, 2, 5, 4], COUNTS[1]])
    found = learning_speed(counts, np.array(TIMES))
    assert found["best"].tolist() == [0, 1]
    assert found["D_mean"] == pytest.approx(0.25), "kept in D"
    assert (found["slope"], found["slope_skipped"]) == (pytest.approx(6.0), 1)
    without = learning_speed(counts, np.array(TIMES), first=1)
    assert without["best"].tolist() == [2, 1], "positions among all checkpoints"
    assert without["time"].tolist() == [0.9, 0.5]
    assert without["slope"] == pytest.approx((5 / 0.9 + 3 / 0.5) / 2)
    still = learning_speed(np.array(COUNTS), np.zeros(4))
    assert math.isnan(still["slope"]) and still["slope_skipped"] == 2


def sets(*names: str) -> np.ndarray:
    """[1, M, 2, 2] of sets of the letters a to d."""
    cells = [[letter in name for letter in "abcd"] for name in names]
    return np.array(cells).reshape(1, len(names), 2, 2)


def test_stability_of_the_toy_case():
    """Spec check 10."""
    assert stability(sets("ab", "bc", "b"))["rho"] == pytest.approx(1 / 3)
    assert stability(sets("a", "b", "abc"))["rho"] == 1
    assert stability(sets("", "", ""))["rho"] == 0
    assert stability(sets("ad", "b", "b"), first=1)["rho"] == 1
    both = np.concatenate([sets("ab", "bc", "b"), sets("a", "b", "abc")])
    found = stability(both)
    assert found["by_image"].tolist() == pytest.approx([1 / 3, 1])
    assert (found["last"].tolist(), found["union"].tolist()) == ([1, 3], [3, 3])
    assert found["rho"] == pytest.approx(2 / 3)


def test_everything_together():
    entropy, foreground = entropies()
    times = np.array([0.0, 1.0, 1.5, 3.0])
    found = measure_knowledge(entropy, foreground, times)
    counted = count_concepts(entropy, foreground)
    regions = {
        "fg": foreground[:, None], "bg": ~foreground[:, None], "all": np.True_
    }  # fmt: skip
    for region in REGIONS:
        np.testing.assert_array_equal(found["counts"][region], counted[region])
        speed = learning_speed(counted[region], times)
        for name in ("D_mean", "D_var", "D_std", "slope", "slope_skipped"):
            assert found["speed"][region][name] == speed[name]
        rho = stability(counted["concepts"] & regions[region])["rho"]
        assert found["stability"][region]["rho"] == rho
    assert measure_knowledge(entropy, foreground, None)["speed"] is None
    later = measure_knowledge(entropy, foreground, times, best_from=1, union_from=2)
    concepts = counted["concepts"] & foreground[:, None]
    assert later["stability"]["fg"]["rho"] == stability(concepts, first=2)["rho"]
    assert (later["speed"]["all"]["best"] >= 1).all()


def test_survey_of_thresholds():
    entropy, foreground = entropies()
    found = survey_thresholds(entropy, foreground)
    limit = count_concepts(entropy, foreground)["background_entropy"]
    for m in range(4):
        differences = limit[m] - entropy[:, m][foreground]
        assert found["mean"][m] == pytest.approx(differences.mean())
        for name, q in (("upper_10", 0.9), ("upper_5", 0.95), ("upper_1", 0.99)):
            assert found[name][m] == pytest.approx(np.quantile(differences, q))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e, f: (e[0], f), "entropy must be"),
        (lambda e, f: (e, f[:, :3]), "foreground must be"),
        (lambda e, f: (e, f | True), "image 0 has no background"),
        (lambda e, f: (e, f & False), "image 0 has no foreground"),
        (lambda e, f: (np.where(e > -2, np.nan, e), f), "finite"),
        (lambda e, f: (e[:0], f[:0]), "no image"),
    ],
)
def test_what_cannot_be_counted(change, words):
    with pytest.raises(ValueError, match=words):
        count_concepts(*change(*entropies()))


def test_speed_and_stability_check_their_input():
    with pytest.raises(ValueError, match="path_length"):
        learning_speed(np.array(COUNTS), np.array(TIMES[:3]))
    with pytest.raises(ValueError, match="first"):
        learning_speed(np.array(COUNTS), np.array(TIMES), first=4)
    with pytest.raises(ValueError, match="first"):
        stability(sets("a"), first=1)


# The report.

KNOWLEDGE = "analysis/knowledge.py"
FILES = [
    "counts.csv", "curves.csv", "curves.png", "heatmaps.png", "knowledge.csv", "knowledge.md",
    "stability.csv", "unselected.csv",
]  # fmt: skip


FEW = "means over only 3 images, in one seed, order nothing"


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Sigma runs of a student, and of a baseline that accepted image 3 but not 1."""
    student = made.write_run(tmp_path / "student", knows=0.6, rejected=(3,))
    return student, made.write_run(tmp_path / "baseline", knows=0.1, rejected=(1,))


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """No curves, for commands of which they are not looked at."""
    monkeypatch.setattr(load_script(KNOWLEDGE), "draw_curves", lambda *_: b"")


def flags(pair) -> list:
    return ["--student", pair[0], "--baseline", pair[1]]


def shared_of(pair) -> Shared:
    paths = dict(zip(("student", "baseline"), pair, strict=True))
    return share({role: read_sigma(path) for role, path in paths.items()}, paths, None)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def quantities(folder: Path) -> dict[tuple[str, str], float]:
    return {
        (row["network"], row["quantity"]): float(row["value"])
        for row in table(folder / "knowledge.csv")
    }


def stacked(knows: float, ids, epochs=made.EPOCHS) -> np.ndarray:
    return np.array([[made.entropy(i, e, knows) for e in epochs] for i in ids])


@pytest.mark.parametrize("granularity", ["iterations", "epochs"])
def test_report(pair, run_script, tmp_path, granularity):
    more = ("--granularity", "epochs", "--pictures", 1) if granularity == "epochs" else ()
    code, out, err = run_script(KNOWLEDGE, *flags(pair), *more)
    assert code == 0 and len(err.splitlines()) == 1 and FEW in err, err
    folder = pair[0] / "knowledge"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    ids = [0, 2, 4]  # accepted in both
    foreground = np.array([made.circle(i) for i in ids])
    lengths = np.cumsum(made.LENGTHS)[made.EPOCHS] / (2 if granularity == "epochs" else 1)
    found = quantities(folder)
    for role, knows in (("student", 0.6), ("baseline", 0.1)):
        due = measure_knowledge(stacked(knows, ids), foreground, lengths)
        for name in ("N_fg", "N_bg", "N_all", "fg_share"):
            assert found[role, name] == due["counts"][name][-1]
        for region in REGIONS:
            for name in ("D_mean", "D_var", "D_std", "slope", "slope_skipped"):
                value = found[role, f"{name}_{region}"]
                assert value == pytest.approx(due["speed"][region][name], nan_ok=True)
            assert found[role, f"rho_{region}"] == due["stability"][region]["rho"]
        assert found[role, "acceptance_rate"] == 0.8
        curves = [row for row in table(folder / "curves.csv") if row["network"] == role]
        assert [int(row["checkpoint"]) for row in curves] == made.EPOCHS
        assert [float(row["path_length"]) for row in curves] == pytest.approx(lengths)
        assert [float(row["N_fg"]) for row in curves] == due["counts"]["N_fg"].tolist()
        assert [float(row["survey_upper_5"]) for row in curves] == pytest.approx(
            due["survey"]["upper_5"]
        )
        counts = [row for row in table(folder / "counts.csv") if row["network"] == role]
        assert [(int(r["id"]), int(r["index"])) for r in counts[::4]] == [
            (i, 10 + 3 * i) for i in ids
        ]
        np.testing.assert_array_equal(
            np.array([int(row["fg"]) for row in counts]).reshape(3, 4), due["counts"]["fg"]
        )
        sheet = [row for row in table(folder / "stability.csv") if row["network"] == role]
        for i, row in enumerate(sheet):
            assert float(row["rho_fg"]) == due["stability"]["fg"]["by_image"][i]
            assert int(row["union_bg"]) == due["stability"]["bg"]["union"][i]
            assert int(row["best_fg"]) == made.EPOCHS[due["speed"]["fg"]["best"][i]]
            assert float(row["D_fg"]) == pytest.approx(due["speed"]["fg"]["time"][i])
    assert found["student", "N_fg"] > found["baseline", "N_fg"], "as these were made"
    assert "higher: yes" in out and f"summed over {granularity}" in out
    page = (folder / "knowledge.md").read_text()
    assert "(curves.png)" in page and "(heatmaps.png)" in page and "higher: yes" in page


def test_counts_without_selection(pair, run_script, undrawn):
    """All images tried in both runs, at the checkpoint that all of them have."""
    run_script(KNOWLEDGE, *flags(pair), "--pictures", 0)
    rows = table(pair[0] / "knowledge" / "unselected.csv")
    assert [(row["network"], row["checkpoint"], row["images"]) for row in rows] == [
        ("student", "10", "5"), ("baseline", "10", "5")
    ]  # fmt: skip
    foreground = np.array([made.circle(i) for i in range(5)])
    due = count_concepts(stacked(0.6, range(5), [10]), foreground)
    assert float(rows[0]["N_fg"]) == due["N_fg"][0]
    assert float(rows[0]["fg_share"]) == due["fg_share"][0]


def unselected(folder: Path) -> list[tuple[str, ...]]:
    rows = table(folder / "unselected.csv")
    return [(row["network"], row["checkpoint"], row["images"]) for row in rows]


def test_the_selected_do_not_pass_for_all(pair, run_script, refused, undrawn):
    """At checkpoints without results of the rejected images nothing is without selection."""
    run_script(KNOWLEDGE, *flags(pair), "--pictures", 0, "--checkpoints", 0, 2)
    assert unselected(pair[0] / "knowledge") == []
    page = (pair[0] / "knowledge" / "knowledge.md").read_text()
    assert "at none of these checkpoints all 5 images" in page and "--keep-rejected" in page
    words = ["--all-images: 2 of the 5 images", "images 1 3", "--keep-rejected", "--checkpoints 10"]
    refused(1, KNOWLEDGE, *flags(pair), "--all-images", words=words)
    run_script(KNOWLEDGE, *flags(pair), "--pictures", 0, "--checkpoints", 2, 10)
    assert unselected(pair[0] / "knowledge") == [("student", "10", "5"), ("baseline", "10", "5")]


def test_one_network_has_a_later_checkpoint(tmp_path, run_script, undrawn):
    """Its rejected images have results there only, where the other has none."""
    student = made.write_run(tmp_path / "s", rejected=(3,))
    baseline = made.write_run(tmp_path / "b", rejected=(1,), epochs=[0, 2, 5])
    code, out, err = run_script(KNOWLEDGE, *flags((student, baseline)), "--pictures", 0)
    assert code == 0, err
    assert "3 of digits, accepted in all runs (5 were tried in all)" in out
    assert unselected(student / "knowledge") == []


def test_images_that_cannot_be_measured(tmp_path, run_script, undrawn):
    """Of one region, or of a layer that does not react: tried, but nowhere to be counted."""
    paths = [made.write_run(tmp_path / n, images=8, rejected=(3,), blank=(5,)) for n in "sb"]
    run = read_sigma(paths[1])
    assert run.tried == [*range(8)] and run.record["tried"] == 8
    assert run.made.shape == (7, 4) and run.made.sum(1).tolist() == [4, 4, 4, 1, 4, 4, 4]
    made.write_map(paths[1], run.record, {"id": 3, "index": 19}, 10, np.full((8, 8), np.nan))
    code, out, err = run_script(KNOWLEDGE, *flags(paths), "--pictures", 0)
    assert code == 0, err
    assert "6 of digits, accepted in all runs (8 were tried in all)" in out
    assert unselected(paths[0] / "knowledge")[0] == ("student", "0", "6")
    page = (paths[0] / "knowledge" / "knowledge.md").read_text()
    assert "of all 8 images" in page and "without images 3 5" in page
    code, out, err = run_script(
        KNOWLEDGE, *flags(paths), "--pictures", 0, "--all-images", "--checkpoints", 10
    )
    assert code == 0 and "6 of digits, accepted or not (8 were tried in all)" in out, err
    assert "left out, as they have no region or no finite entropy: images 3 5" in err


def test_all_images(tmp_path, run_script, refused):
    """Where selection leaves none, the last checkpoint still has all that were tried."""
    paths = [made.write_run(tmp_path / n, rejected=(0, 1, 2, 3, 4)) for n in "sb"]
    refused(1, KNOWLEDGE, *flags(paths), words=[f"{paths[0]} has no accepted", "--all-images"])
    words = ["5 of the 5 images", "checkpoints 0 2 5 10", "--keep-rejected", "--checkpoints 10"]
    refused(1, KNOWLEDGE, *flags(paths), "--all-images", words=words)
    more = ("--all-images", "--checkpoints", 10, "--pictures", 1)
    code, out, err = run_script(KNOWLEDGE, *flags(paths), *more)
    assert code == 0 and "5 of digits, accepted or not" in out, err
    due = count_concepts(stacked(0.3, range(5), [10]), np.array([*map(made.circle, range(5))]))
    assert quantities(paths[0] / "knowledge")["student", "N_fg"] == due["N_fg"][0]


def test_threshold_checkpoints_and_output(pair, run_script, tmp_path, undrawn):
    more = ("--threshold", 0.35, "--checkpoints", 10, 2, "--output", tmp_path / "out")
    code, _, err = run_script(KNOWLEDGE, *flags(pair), *more, "--pictures", 0)
    assert code == 0 and "checkpoints of the student that are left out: 0 5" in err
    found = quantities(tmp_path / "out")
    foreground = np.array([made.circle(i) for i in (0, 2, 4)])
    due = measure_knowledge(
        stacked(0.6, (0, 2, 4), [2, 10]), foreground, np.cumsum(made.LENGTHS)[[2, 10]], 0.35
    )
    assert found["student", "N_fg"] == due["counts"]["N_fg"][-1]
    assert found["student", "D_mean_fg"] == pytest.approx(due["speed"]["fg"]["D_mean"])
    assert not (tmp_path / "out" / "heatmaps.png").exists()
    assert not (pair[0] / "knowledge").exists()


@pytest.mark.parametrize(
    "model, exclude, best_from, union_from",
    [
        ("vgg11", None, 0, 0),
        ("resnet18", None, 1, 0),
        ("vgg11", True, 1, 1),
        ("resnet18", False, 0, 0),
    ],
)
def test_the_initial_network(pair, model, exclude, best_from, union_from):
    """Published: in resnets the initial network is never the best; it always counts in rho."""
    shared = shared_of(pair)
    for run in shared.runs.values():
        # At first all of the foreground is known.
        run.entropy[:, 0] -= run.foreground
        run.record["model"] = model
    report = measure_all(shared, 0.2, "iterations", exclude)
    entropy = shared.entropy("student", shared.ids, shared.epochs)
    lengths = shared.path_length("student")
    due = measure_knowledge(
        entropy, shared.foreground(shared.ids), lengths, 0.2, best_from, union_from
    )
    found = report.quantities("student")
    assert found["D_mean_fg"] == due["speed"]["fg"]["D_mean"]
    assert (found["D_mean_fg"] == 0) == (best_from == 0)
    assert found["rho_fg"] == due["stability"]["fg"]["rho"]
    sheet = list(csv.DictReader(io.StringIO(stability_csv(report))))
    assert (sheet[0]["best_fg"] == "0") == (best_from == 0)


def test_the_initial_network_at_the_command_line(pair, run_script, undrawn):
    code, out, _ = run_script(KNOWLEDGE, *flags(pair), "--exclude-initial", "--pictures", 0)
    assert code == 0 and "after the initial network" in out and "without the concepts of" in out


def test_a_teacher_beside_them(pair, run_script, tmp_path):
    teacher = made.write_run(tmp_path / "teacher", knows=2.0, rejected=(0,), lengths=False)
    code, out, err = run_script(KNOWLEDGE, *flags(pair), "--teacher", teacher, "--pictures", 1)
    assert code == 0, err
    found = quantities(pair[0] / "knowledge")
    foreground = np.array([made.circle(i) for i in (2, 4)])
    due = count_concepts(stacked(2.0, (2, 4)), foreground)
    assert found["teacher", "N_fg"] == due["N_fg"][-1]
    assert math.isnan(found["teacher", "D_mean_fg"])
    assert "no path length of the teacher" in err and "--path-length classifier.0" in err
    head = next(line for line in out.splitlines() if line.startswith("quantity"))
    assert head.split() == ["quantity", "student", "baseline", "teacher", "expected"]


def test_without_path_lengths(tmp_path, run_script):
    paths = [made.write_run(tmp_path / name, lengths=False) for name in ("s", "b")]
    code, out, err = run_script(KNOWLEDGE, *flags(paths), "--pictures", 0)
    assert code == 0 and len(err.splitlines()) == 3
    assert "D_mean_fg" in out and (paths[0] / "knowledge" / "curves.png").exists()


def test_equal_networks_are_said_to_be_equal(tmp_path, run_script, undrawn):
    """All of them, D_var of 0 and 0 too, are neither higher nor lower."""
    paths = [made.write_run(tmp_path / name, images=30, rejected=()) for name in "sb"]
    code, out, err = run_script(KNOWLEDGE, *flags(paths), "--pictures", 0)
    assert code == 0 and err == "", "as many images are no handful"
    verdicts = [line.split("  ")[-1] for line in out.splitlines() if "er: " in line]
    assert {*verdicts} == {"higher: equal", "lower: equal"} and len(verdicts) == 7


def test_an_unfinished_run_is_said(tmp_path, run_script, undrawn):
    paths = [made.write_run(tmp_path / n, finished=n == "b") for n in ("s", "b")]
    code, _, err = run_script(KNOWLEDGE, *flags(paths), "--pictures", 0)
    assert code == 0 and "the sigma run of the student is unfinished; 4 images" in err


def test_images_accepted_by_other_checkpoints_are_said(tmp_path, run_script, undrawn):
    paths = [
        made.write_run(tmp_path / n, images=30, rejected=(), change={"accept-from": epoch})
        for n, epoch in (("s", 4), ("b", 7))
    ]
    code, _, err = run_script(KNOWLEDGE, *flags(paths), "--pictures", 0)
    assert code == 0 and "from 4 of the student, 7 of the baseline on" in err
    assert len(err.splitlines()) == 1


def test_images_tried_for_all_networks_at_once(tmp_path, run_script, undrawn):
    """Of --in-common: each network has its own acceptance rate, of the same candidates."""
    rejected = {"s": (3,), "b": (1, 3, 4)}
    change = {"in-common": True, "accept-from": 4}
    paths = [
        made.write_run(tmp_path / n, images=6, rejected=own, change=change)
        for n, own in rejected.items()
    ]
    for path, accepted in zip(paths, (5, 3), strict=True):
        results = {"tried": 6, "accepted": accepted, "accepted_in_common": 3}
        (path / "results.json").write_text(json.dumps(results))
    code, out, err = run_script(KNOWLEDGE, *flags(paths), "--pictures", 0)
    assert code == 0 and len(err.splitlines()) == 1 and FEW in err
    assert "3 of digits, accepted in all runs (6 were tried in all)" in out
    found = quantities(paths[0] / "knowledge")
    for role, accepted in (("student", 5), ("baseline", 3)):
        assert (found[role, "accepted"], found[role, "tried"]) == (accepted, 6)
        assert found[role, "acceptance_rate"] == accepted / 6
    assert unselected(paths[0] / "knowledge")[0] == ("student", "10", "6")


def test_images_with_a_sigma_of_0_are_left_out(pair, run_script, undrawn):
    """Of both networks: the intersection comes after the filter."""
    run = read_sigma(pair[1])
    row = {"id": 2, "index": 16}
    made.write_map(pair[1], run.record, row, 5, np.full((8, 8), -np.inf))
    code, _, err = run_script(KNOWLEDGE, *flags(pair), "--pictures", 0)
    assert code == 0 and "left out for a sigma of 0: images 2" in err
    for role in ("student", "baseline"):
        rows = table(pair[0] / "knowledge" / "counts.csv")
        assert {row["id"] for row in rows if row["network"] == role} == {"0", "4"}


def test_without_flags_the_pair_in_output(tmp_path, run_script, undrawn):
    made.write_run(tmp_path / "output/s", change={"run": "output/networks/d"})
    made.write_run(tmp_path / "output/b", change={"run": "output/networks/d/baseline"})
    (tmp_path / "output/other").mkdir()
    (tmp_path / "output/other/args.yaml").write_text("options: {}")
    code, out, err = run_script(KNOWLEDGE, "--pictures", 0)
    assert code == 0, err
    assert "student: output/s" in out and "baseline: output/b" in out
    code, again, _ = run_script(KNOWLEDGE, "--pictures", 0)
    assert code == 0 and again == out, "its own files are not taken for runs"
    made.write_run(tmp_path / "output/s2", change={"run": "output/d2"})
    made.write_run(tmp_path / "output/b2", change={"run": "output/d2/baseline"})
    code, _, err = run_script(KNOWLEDGE)
    assert code == 2 and "2 pairs" in err and "--baseline" in err


def test_two_experiments_are_two_pairs(tmp_path, refused):
    """Sigma runs of the same networks with other settings; the pair named can be compared."""
    for role, run in (("s", "output/d"), ("b", "output/d/baseline")):
        for samples in (16, 96):
            change = {"run": run, "settings": made.SETTINGS | {"samples": samples}}
            name = f"{role}{samples if role == 's' else 112 - samples}"
            made.write_run(tmp_path / "output" / name, change=change)
    words = ["4 pairs", "--student output/s16 --baseline output/b96"]
    refused(2, KNOWLEDGE, words=words)


def test_pictures_follow_the_numbers(pair):
    shared = shared_of(pair)
    report, bare = (measure_all(shared, b, "iterations", None) for b in (0.2, 9.0))
    images = {i: read_image(pair[0], i, made.GRID)["image"] for i in shared.ids}
    first = dict(list(images.items())[:1])
    two = dict(list(images.items())[:2])
    tall, short = (draw_maps(report, own, "t") for own in (two, first))
    heights = [Image.open(io.BytesIO(png)).height for png in (tall, short)]
    assert heights[0] > 1.5 * heights[1]
    assert draw_maps(bare, first, "t") != short, "concepts are marked"
    assert draw_curves(report, "t") != draw_curves(bare, "t")


def test_long_names_have_room(pair):
    """A title takes as many lines as it needs, and the picture is the higher for it."""
    report = measure_all(shared_of(pair), 0.2, "iterations", None)
    name = "hf-hub:someone/a-long-network-name.with_tags_in21k_ft_in1k_MMWWMM"
    title = f"Quantified knowledge: {name}, layer blocks.11.mlp.fc1:in, a set of some name"
    for width in (3.9, 11.7):
        lines, more = wrapped(title, width)
        figure = new_figure(width, 3, layout=None)
        extent = figure.suptitle(lines, fontsize=9.5, parse_math=False).get_window_extent()
        single = figure.suptitle("Quantified", fontsize=9.5).get_window_extent()
        assert extent.width < width * figure.dpi
        assert extent.height <= single.height + more * figure.dpi
        assert lines.replace("\n", "").replace(" ", "") == title.replace(" ", "")
    images = {0: read_image(pair[0], 0, made.GRID)["image"]}
    for draw in (lambda t: draw_curves(report, t), lambda t: draw_maps(report, images, t)):
        short, long = (Image.open(io.BytesIO(draw(t))) for t in ("t", 2 * title))
        assert short.width == long.width and short.height < long.height


def test_at_most_six_checkpoints_are_drawn():
    assert evenly(4, 6) == [0, 1, 2, 3]
    assert evenly(15, 6) == [0, 3, 6, 8, 11, 14]


# Bad input.

INPUTS = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer": "classifier.3"}, ["layer", "classifier.0", "classifier.3"]),
        ({"model": "vgg16"}, ["network", "vgg11", "vgg16"]),
        ({"dataset": "fashion-mnist"}, ["data set", "digits", "fashion-mnist"]),
        ({"seed": 1}, ["--seed", "0", "1"]),
        ({"settings": made.SETTINGS | {"weight": 6.0}}, ["setting weight", "7.0", "6.0"]),
        ({"inputs": INPUTS | {"size": [48, 48]}}, ["input size", "[32, 32]", "[48, 48]"]),
        ({"inputs": INPUTS | {"std": [0.3] * 3}}, ["input std", "[0.2, 0.2, 0.2]", "[0.3, 0."]),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, refused, change, words):
    student = made.write_run(tmp_path / "one", change={"inputs": INPUTS})
    baseline = made.write_run(tmp_path / "two", change={"inputs": INPUTS} | change)
    both = [str(student), str(baseline), "cannot be compared"]
    refused(1, KNOWLEDGE, *flags((student, baseline)), words=[*both, *words])


def test_runs_of_other_grids(tmp_path, refused, monkeypatch):
    student = made.write_run(tmp_path / "one")
    monkeypatch.setattr(made, "GRID", 4)
    baseline = made.write_run(tmp_path / "two")
    words = [str(student), str(baseline), "the grid is 8 in the one and 4 in the other"]
    refused(1, KNOWLEDGE, *flags((student, baseline)), words=words)


def test_runs_of_other_lists_of_images(tmp_path, refused):
    paths = [made.write_run(tmp_path / f"s{shift}", shift=shift) for shift in (0, 1)]
    words = [*map(str, paths), "candidate 0 is image 10", "11"]
    refused(1, KNOWLEDGE, *flags(paths), words=words)


def test_runs_with_other_foregrounds(pair, refused):
    path = image_folder(pair[1], 2) / "image.npz"
    arrays = read_npz(path)
    write_npz(path, arrays | {"foreground": ~arrays["foreground"]})
    words = [str(pair[0]), str(pair[1]), "different foregrounds of candidate 2"]
    refused(1, KNOWLEDGE, *flags(pair), words=words)


def test_no_image_in_common(tmp_path, refused):
    student = made.write_run(tmp_path / "s", images=2, rejected=(0,))
    baseline = made.write_run(tmp_path / "b", images=2, rejected=(1,))
    words = ["no image was accepted in all of", str(student), str(baseline)]
    refused(1, KNOWLEDGE, *flags((student, baseline)), words=words)
    nothing = made.write_run(tmp_path / "n", images=2, rejected=(0, 1))
    words = [f"{nothing} has no accepted image"]
    refused(1, KNOWLEDGE, *flags((student, nothing)), words=words)


@pytest.mark.parametrize(
    "more, code, words",
    [
        ("--student s", 2, ["--baseline"]),
        ("--teacher s", 2, ["--student"]),
        ("--student student --baseline student", 2, ["--baseline", "the same run"]),
        ("--student student --baseline nowhere", 1, ["no sigma run at nowhere", "train/sigma.py"]),
        ("", 2, ["no sigma runs", "output", "train/sigma.py"]),
        ("--student student --baseline baseline --checkpoints 2 7", 2, ["7", "student", "0 2 5"]),
        ("--student student --baseline baseline --threshold nan", 2, ["--threshold", "finite"]),
        ("--student student --baseline baseline --granularity steps", 2, ["--granularity"]),
        ("--student student --baseline baseline --thresold 1", 2, ["--thresold", "--threshold"]),
        ("--student student --baseline baseline --output student/args.yaml", 1, ["args.yaml"]),
    ],
)
def test_bad_input(pair, refused, more, code, words, undrawn):
    refused(code, KNOWLEDGE, *more.split(), words=words)


def test_damaged_results_are_named(pair, refused):
    path = result_path(pair[0], 2, 5)
    path.write_bytes(path.read_bytes()[:100])
    refused(1, KNOWLEDGE, *flags(pair), words=[str(path), "damaged"])
    path.unlink()
    refused(1, KNOWLEDGE, *flags(pair), words=[str(path), "missing"])


def test_an_image_file_without_an_image_is_named(pair, refused):
    path = image_folder(pair[0], 2) / "image.npz"
    arrays = read_npz(path)
    for image in ({}, {"image": arrays["image"][..., 0]}, {"image": arrays["image"] / 255}):
        write_npz(path, {"foreground": arrays["foreground"]} | image)
        refused(1, KNOWLEDGE, *flags(pair), words=[str(path), "no image of 8-bit RGB"])


@pytest.mark.parametrize("name", ["dataset", "seed", "model", "layer", "settings"])
def test_options_that_are_missing_are_no_traceback(pair, refused, name):
    path = pair[1] / "args.yaml"
    record = yaml.safe_load(path.read_text())
    del record["options"][name]
    path.write_text(yaml.safe_dump(record))
    refused(1, KNOWLEDGE, *flags(pair), words=[str(path), "is damaged"])
