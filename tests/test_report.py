"""Reports: what run folders are read as, grouped to, compared with, and what pages say of it."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
import yaml

from kdfast.analysis import Unfinished, read_run, read_runs, tabulate, write_report
from kdfast.errors import UserError
from kdfast.training import layout

REPORT = "analysis/report.py"
FILES = ["curves.png", "report.csv", "report.html", "report.md"]


def write_run(
    folder: Path,
    top1=(50.0, 80.0),
    *,
    methods=None,
    finished=True,
    layout=1,
    teacher_top1=95.0,
    drop=(),
    **options,
) -> Path:
    """A run folder as training leaves it; `top1` an epoch, `methods` None: a classifier run."""
    epochs = len(top1)
    options = {
        "dataset": "digits", "model": "small", "seed": 0, "epochs": epochs, "lr": 0.05,
        "output": str(folder.parent),
    } | options  # fmt: skip
    if methods is not None:
        options = {"teacher": "large", "teacher-checksum": "c0ffee", "gamma": 1.0} | options
        options |= {"method": list(methods) or ["none"], "methods": methods}
    options = {key: value for key, value in options.items() if key not in drop}
    record = {"layout": layout, "options": options, "environment": {"kdfast": "0.1.0"}}
    if layout is None:
        del record["layout"]
    folder.mkdir(parents=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    lines = ["epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,images_per_second,seconds"]
    scores = []
    for epoch, score in enumerate(top1, start=1):
        loss, top5 = 3 / epoch, min(score + 10, 100.0)
        scores.append({"epoch": epoch, "top1": score, "top5": top5, "loss": loss})
        lines.append(f"{epoch},{loss},{loss},{score},{top5},0.05,300.1,1.5")
    (folder / "summary.csv").write_text("\n".join(lines) + "\n")
    results = {
        "run": str(folder), "seed": options.get("seed"), "last": scores[-1],
        "best": max(scores, key=lambda s: s["top1"]), "parameters": 1234,
    }  # fmt: skip
    if methods is not None:
        results |= {"teacher_top1": teacher_top1, "baseline_top1": None}
    if finished:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return folder


KD = {"kd": {"alpha": 0.9, "temperature": 4.0}}


def distilled(folder: Path, last: float, alone: float | None = None, **options) -> Path:
    """A run of kd that ends at `last`, with the student alone beside it."""
    methods = options.pop("methods", KD)
    run = write_run(folder, (10.0, last), methods=methods, **options)
    if alone is not None:
        # Written from the same options, the method resolved in the one and not in the other.
        options.pop("gamma", None)
        write_run(run / "baseline", (10.0, alone), teacher="large", method=["kd"], **options)
    return run


def table_of(tmp_path: Path, metric="top1"):
    return tabulate(read_runs([tmp_path])[0], metric)


def rows_of(table) -> dict[str, object]:
    (block,) = [block for block in table.blocks if block.teacher]
    return {row.label: row for row in block.rows}


def test_numbers_by_hand(tmp_path):
    for seed, last, alone in ((0, 82.0, 80.0), (1, 85.0, 80.0), (2, 85.0, 83.0)):
        checksum = f"teacher {seed}"  # a teacher of its own, as digits runs have
        distilled(tmp_path / f"s{seed}", last, alone, seed=seed, **{"teacher-checksum": checksum})
    rows = rows_of(table_of(tmp_path))
    assert list(rows) == ["none", "kd"]
    kd, none = rows["kd"], rows["none"]
    assert kd.seeds == none.seeds == [0, 1, 2]
    assert (kd.last.mean, kd.last.std) == (84.0, pytest.approx(3**0.5))
    assert (none.last.mean, none.last.std) == (81.0, pytest.approx(3**0.5))
    # 2, 5, 2: mean 3, squared deviations 1 + 4 + 1 over n - 1 = 2.
    assert (kd.gain.mean, kd.gain.std, kd.paired) == (3.0, pytest.approx(3**0.5), True)
    assert (none.gain, none.paired, none.teacher_top1) == (None, None, None)
    assert (kd.teacher_top1.mean, kd.teacher_top1.std) == (95.0, 0.0)
    assert (kd.leads, none.leads) == (True, False)


def test_one_run_has_no_deviation(tmp_path):
    distilled(tmp_path / "a", 82.0, 80.0)
    row = rows_of(table_of(tmp_path))["kd"]
    assert (row.last.std, row.gain.std, row.paired) == (None, None, True)
    assert row.gain.text(sign=True) == "+2.00"


def test_last_and_best_and_top5(tmp_path):
    write_run(tmp_path / "a", (60.0, 90.0, 70.0))
    ((row,),) = [block.rows for block in table_of(tmp_path).blocks]
    assert (row.last.mean, row.best.mean) == (70.0, 90.0)
    ((row,),) = [block.rows for block in table_of(tmp_path, "top5").blocks]
    assert (row.last.mean, row.best.mean) == (80.0, 100.0)


def test_unpaired_gain(tmp_path):
    for seed, last in ((3, 86.0), (4, 88.0)):
        distilled(tmp_path / f"kd{seed}", last, seed=seed)
    for seed, alone in ((0, 80.0), (1, 84.0)):
        write_run(tmp_path / f"none{seed}", (10.0, alone), methods={}, seed=seed)
    row = rows_of(table_of(tmp_path))["kd"]
    assert (row.gain.mean, row.paired) == (5.0, False)
    assert row.gain.std == pytest.approx((2 + 8) ** 0.5)


def test_gain_pairs_the_seeds_that_both_have(tmp_path):
    distilled(tmp_path / "kd", 86.0, seed=1)
    for seed, alone in ((0, 60.0), (1, 84.0)):
        write_run(tmp_path / f"none{seed}", (10.0, alone), methods={}, seed=seed)
    row = rows_of(table_of(tmp_path))["kd"]
    assert (row.gain.mean, row.paired) == (2.0, True)


@pytest.mark.parametrize(
    "other", [{"lr": 0.1}, {"epochs": 2, "dataset": "cifar10"}, {"model": "other"}], ids=str
)
def test_another_student_alone_is_no_baseline(tmp_path, other):
    distilled(tmp_path / "kd", 86.0)
    write_run(tmp_path / "alone", (10.0, 80.0), **other)
    table = table_of(tmp_path)
    assert rows_of(table)["kd"].gain is None
    assert [block.teacher for block in table.blocks].count(None) == 1


def test_whatever_trained_alone_is_a_baseline(tmp_path):
    """A classifier run knows none of the flags of distillation."""
    distilled(tmp_path / "kd", 86.0, **{"teacher-bn": "batch", "workers": 3, "recipe": "crd"})
    write_run(tmp_path / "alone", (10.0, 80.0), workers=1)
    table = table_of(tmp_path)
    assert len(table.blocks) == 1
    assert rows_of(table)["kd"].gain.mean == 6.0


def test_a_scaled_loss_is_another_student_alone(tmp_path):
    distilled(tmp_path / "kd", 86.0)
    write_run(tmp_path / "none", (10.0, 80.0), methods={}, gamma=0.5)
    assert rows_of(table_of(tmp_path))["kd"].gain is None


def test_groups_with_other_options_stay_apart(tmp_path):
    for temperature in (4.0, 10):
        methods = {"kd": {"alpha": 0.9, "temperature": temperature}}
        distilled(tmp_path / f"t{temperature}", 80.0 + temperature, methods=methods)
    methods = {"kd": {"alpha": 0.9, "temperature": 4.0}, "at": {"beta": 50.0}}
    distilled(tmp_path / "both", 80.0, methods=methods)
    assert list(rows_of(table_of(tmp_path))) == [
        "kd (temperature 4)",
        "kd (temperature 10)",
        "kd+at",
    ]


def test_labels_of_flags_and_combinations(tmp_path):
    for beta, smooth in ((50.0, False), (60.0, True)):
        methods = KD | {"at": {"beta": beta}}
        distilled(tmp_path / f"b{beta}", 80.0, methods=methods, **{"model-ema": smooth})
    assert list(rows_of(table_of(tmp_path))) == [
        "kd+at (at beta 50, no-model-ema)", "kd+at (at beta 60, model-ema)"
    ]  # fmt: skip


def test_order_of_methods_does_not_matter(tmp_path):
    ours = KD | {"at": {"beta": 50.0}}
    distilled(tmp_path / "a", 80.0, methods=ours)
    distilled(tmp_path / "b", 81.0, methods=dict(reversed(ours.items())), seed=1)
    (row,) = rows_of(table_of(tmp_path)).values()
    assert (row.label, row.seeds) == ("kd+at", [0, 1])


def test_what_results_do_not_depend_on_does_not_split(tmp_path):
    free = sorted(layout.FREE - {"epochs"})
    for seed in (0, 1):
        distilled(tmp_path / f"s{seed}", 80.0, seed=seed, **{key: f"{key} {seed}" for key in free})
    (row,) = rows_of(table_of(tmp_path)).values()
    assert row.seeds == [0, 1]


def test_a_folder_is_its_own_data_set(tmp_path):
    for i, place in enumerate(("birds", "cars")):
        write_run(tmp_path / place, dataset="folder", seed=i, **{"data-dir": f"/data/{place}"})
    assert [b.dataset for b in table_of(tmp_path).blocks] == ["folder (birds)", "folder (cars)"]


def test_teachers_and_found_once(tmp_path):
    distilled(tmp_path / "out/s0", 86.0, 80.0)
    write_run(tmp_path / "out/teachers/digits-large-abc", (90.0, 95.0), model="large")
    (tmp_path / "out/s0/checkpoints/epoch-2").mkdir(parents=True)
    runs, unfinished = read_runs([tmp_path / "out", tmp_path / "out/s0"])
    assert (len(runs), unfinished) == (3, [])
    blocks = tabulate(runs).blocks
    assert [block.networks for block in blocks] == ["large >> small", "large alone"]


def test_two_runs_of_a_seed(refused, tmp_path):
    distilled(tmp_path / "one", 86.0)
    distilled(tmp_path / "two", 86.0)
    refused(1, REPORT, ".", words=["seed 0", "one and two", "same options"])


def test_two_teachers_of_a_name(refused, tmp_path):
    distilled(tmp_path / "one", 86.0)
    distilled(tmp_path / "two", 87.0, **{"teacher-checksum": "beef"})
    refused(1, REPORT, ".", words=["seed 0", "one and two", "teacher"])


def test_two_students_alone_of_a_seed(refused, tmp_path):
    write_run(tmp_path / "one", (10.0, 80.0))
    write_run(tmp_path / "two", (10.0, 81.0))
    refused(1, REPORT, ".", words=["seed 0", "one and two"])


def test_the_same_student_beside_two_methods(tmp_path, run_script):
    distilled(tmp_path / "runs/kd", 86.0, 80.0)
    distilled(tmp_path / "runs/at", 85.0, 80.0, methods={"at": {"beta": 1.0}})
    table = table_of(tmp_path)
    assert table.notes == ()
    assert {r.label: r.gain and r.gain.mean for r in table.blocks[0].rows} == {
        "none": None, "at": 5.0, "kd": 6.0
    }  # fmt: skip
    # On another device it may end elsewhere: one counts, and the report says so.
    distilled(tmp_path / "runs/fsp", 84.0, 81.0, methods={"fsp": {"beta": 1.0}})
    code, _, err = run_script(REPORT, "runs")
    assert (code, err.count("note:")) == (0, 1)
    assert "fsp/baseline repeats runs/at/baseline" in err and "81.00, not 80.00" in err
    assert "fsp/baseline repeats" in (tmp_path / "report/report.md").read_text()


def test_unfinished_runs_are_listed(run_script, tmp_path):
    distilled(tmp_path / "runs/done", 86.0)
    write_run(tmp_path / "runs/half", (10.0, 20.0), finished=False, epochs=5, seed=1)
    with (tmp_path / "runs/half/summary.csv").open("a") as file:
        file.write("3,0.5,0.")  # being written
    write_run(tmp_path / "runs/new", finished=False, epochs=5, seed=2)
    (tmp_path / "runs/new/summary.csv").unlink()
    # Gone on with for longer than its results are of.
    write_run(tmp_path / "runs/longer", (10.0, 20.0, 30.0), epochs=5, seed=3)
    code, out, err = run_script(REPORT, "runs")
    assert (code, out.count("1 runs")) == (0, 1)
    states = {"half": "2 of 5", "new": "0 of 5", "longer": "3 of 5"}
    assert len(err.splitlines()) == 3
    for name, state in states.items():
        assert f"report.py: note: runs/{name} is unfinished ({state} epochs), left out" in err
        assert f"* runs/{name}: {state} epochs" in (tmp_path / "report/report.md").read_text()
        assert (
            f"<li>runs/{name}: {state} epochs</li>" in (tmp_path / "report/report.html").read_text()
        )


def test_none_finished(refused, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"s{seed}", finished=False, epochs=5, seed=seed)
    refused(1, REPORT, ".", words=["no finished run", "s0 has 2 of 5", "1 more"])


def test_wrong_requests(refused, tmp_path):
    refused(1, REPORT, "nowhere", words=["nowhere does not exist"])
    (tmp_path / "foreign/inner").mkdir(parents=True)
    (tmp_path / "foreign/inner/file.txt").write_text("x")
    refused(1, REPORT, "foreign", words=["no run at or below foreign"])
    refused(1, REPORT, "foreign/inner/file.txt", words=["is a file"])
    refused(2, REPORT, words=["RUN"])
    refused(2, REPORT, ".", "--metric", "top3", words=["top3"])
    refused(2, REPORT, ".", "--titel", "x", words=["did you mean --title"])
    write_run(tmp_path / "run")
    refused(1, REPORT, "run", "--output", "foreign/inner/file.txt", words=["cannot write"])


def edit(name: str, before: str, after: str):
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert before in text
        (run / name).write_text(text.replace(before, after, 1))

    return change


def remove(name: str):
    return lambda run: (run / name).unlink()


DAMAGE = {
    "no args.yaml": (remove("args.yaml"), "args.yaml is missing"),
    "no summary": (remove("summary.csv"), "summary.csv is missing"),
    "yaml": (edit("args.yaml", "seed: 0", "seed: [0"), r"args.yaml, line \d+: .*valid YAML"),
    "yaml object": (
        edit("args.yaml", "seed: 0", "seed: !!python/object/apply:os.getcwd []"),
        r"args.yaml, line \d+: expected valid YAML: could not determine a constructor",
    ),
    "yaml list": (lambda run: (run / "args.yaml").write_text("- 1\n"), "args.yaml: .*mapping"),
    "not text": (lambda run: (run / "args.yaml").write_bytes(b"\xff\xfe"), "args.yaml: not text"),
    "no options": (edit("args.yaml", "options:", "choices:"), "args.yaml: expected options"),
    "environment": (edit("args.yaml", "kdfast: 0.1.0", "- x"), "line .*expected environment"),
    "seed": (edit("args.yaml", "seed: 0", "seed: x"), r"args.yaml, line 8: expected seed .*'x'"),
    "epochs": (edit("args.yaml", "epochs: 2", "epochs: 0"), r"args.yaml, line 9: expected epochs"),
    "model": (edit("args.yaml", "model: small", "model: 3"), r"args.yaml, line 7: expected model"),
    "date": (edit("args.yaml", "lr: 0.05", "lr: 2020-01-01"), "args.yaml, line 10: expected lr"),
    "methods": (edit("args.yaml", "temperature: 4.0", "4.0"), r"args.yaml, line \d+: .*valid YAML"),
    "methods list": (
        edit("args.yaml", "\n      alpha: 0.9\n      temperature: 4.0", " 1"), "expected methods to"
    ),
    "layout": (edit("args.yaml", "layout: 1", "layout: one"), "args.yaml, line 1: expected layout"),
    "newer": (edit("args.yaml", "layout: 1", "layout: 7"), "newer kdfast .*7.*; update kdfast"),
    "fewer epochs": (edit("args.yaml", "epochs: 2", "epochs: 1"), "json, line 5: .*epoch 1"),
    "json": (edit("results.json", '"seed": 0,', '"seed": 0'), "results.json, line 4: .*valid JSON"),
    "json list": (lambda run: (run / "results.json").write_text("[]"), "results.json: expected an"),
    "json deep": (lambda run: (run / "results.json").write_text("[" * 10**5), "valid JSON"),
    "no last": (edit("results.json", '"last"', '"first"'), "results.json: expected last"),
    "last text": (edit("results.json", '"top1": 86.0', '"top1": "86"'), "line 4: .*last top1"),
    "parameters": (edit("results.json", "1234", "-1"), r"line \d+: expected parameters"),
    "no teacher_top1": (edit("results.json", "95.0", "null"), r"line \d+: expected teacher_top1"),
    "teacher_top1": (edit("results.json", "95.0", "950"), r"line \d+: .*teacher_top1 .*\[0, 100\]"),
    "other seed": (edit("results.json", '"seed": 0', '"seed": 1'), "line 3: expected seed 0"),
    "last score": (edit("results.json", '"top1": 86.0', '"top1": 87.0'), "line 4: .*top1 86.0"),
    "other best": (
        edit("results.json", '"best": {\n    "epoch": 2', '"best": {\n    "epoch": 1'),
        "line 10: expected best epoch 2",
    ),
    "epoch": (edit("results.json", '"epoch": 2', '"epoch": 4'), "line 5: expected last epoch 2"),
    "no column": (edit("summary.csv", "eval_top1", "top1"), "summary.csv, line 1: .*eval_top1"),
    "column twice": (edit("summary.csv", "seconds", "lr"), "summary.csv, line 1: .*one column lr"),
    "empty": (lambda run: (run / "summary.csv").write_text(""), "summary.csv, line 1: expected"),
    "header alone": (
        lambda run: (run / "summary.csv").write_text("epoch,eval_loss,eval_top1,eval_top5\n"),
        "summary.csv, line 2: expected epoch 1",
    ),
    "word": (edit("summary.csv", ",86.0,", ",high,"), "summary.csv, line 3: expected eval_top1"),
    "nan": (edit("summary.csv", ",86.0,", ",nan,"), r"line 3: expected eval_top1 in \[0, 100\]"),
    "percent": (edit("summary.csv", ",86.0,", ",860,"), r"line 3: .*eval_top1 in \[0, 100\]"),
    "short row": (edit("summary.csv", ",300.1,1.5", ""), "line 2: expected 8 values, got 6"),
    "row lost": (edit("summary.csv", "1,3.0", "2,3.0"), "line 2: expected epoch 1, got 2"),
    "row more": (edit("summary.csv", "\n2,", "\n2,1,1,50,60,1,1,1\n3,"), "line 5: .*last epoch 3"),
    "quote": (edit("summary.csv", ",86.0,", ',"86.0" 1,'), "summary.csv, line 3: expected CSV"),
    "edited": (edit("summary.csv", ",86.0,", ",86.5,"), "results.json, line 4: .*last top1 86.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged(refused, tmp_path, case):
    damage, expected = DAMAGE[case]
    run = distilled(tmp_path / "runs/bad", 86.0)
    distilled(tmp_path / "runs/good", 86.0, seed=1)
    damage(run)
    line = refused(1, REPORT, "runs")
    assert "runs/bad/" in line and re.search(expected, line), line


def test_layouts(tmp_path, monkeypatch):
    for number in (None, 1):
        assert read_run(write_run(tmp_path / f"of {number}", layout=number)).seed == 0
    newer = write_run(tmp_path / "newer", layout=layout.LAYOUT + 1, finished=False)
    with pytest.raises(UserError, match="newer kdfast"):
        read_run(newer)


def test_a_diverged_score_is_no_damage(tmp_path):
    """Cross-entropy of the evaluation may overflow in a run that went on."""
    run = write_run(tmp_path / "run")
    edit("summary.csv", "2,1.5,1.5", "2,1.5,nan")(run)
    edit("results.json", '"loss": 1.5', '"loss": NaN')(run)
    edit("results.json", '"loss": 1.5', '"loss": NaN')(run)
    assert not isinstance(read_run(run), Unfinished)


def test_files_and_pivot(run_script, tmp_path):
    for seed, last, alone in ((0, 90.06, 90.0), (1, 90.06, 90.0)):
        distilled(tmp_path / f"runs/a{seed}", last, alone, seed=seed)
        distilled(tmp_path / f"runs/b{seed}", 70.0, 72.0, seed=seed, dataset="cifar10")
    distilled(tmp_path / "runs/at", 80.0, methods={"at": {"beta": 1.0}})
    code, out, err = run_script(
        REPORT, "runs", "--output", "deep/report", "--title", "Ours | *all*"
    )
    assert (code, err) == (0, "") and "9 runs" in out
    assert sorted(path.name for path in (tmp_path / "deep/report").iterdir()) == FILES
    text = (tmp_path / "deep/report/report.md").read_text()
    assert text.startswith("# Ours \\| \\*all\\*\n")
    for line in (
        "| method | cifar10 large >> small | digits large >> small | avg |",
        "| none | **72.0** | 90.0 | **81.0** |",
        "| kd | 70.0 (-2.0) | **90.1 (+0.1)** | 80.0 (-1.0) |",
        "| at |  | 80.0 (-10.0) |  |",
        "| **kd** | 2: 0-1 | **90.06 +- 0.00** | 90.06 +- 0.00 | +0.06 +- 0.00 paired "
        "| 95.00 +- 0.00 | 1,234 | 2 |",
        "| at | 1: 0 | 80.00 | 80.00 | -10.00 paired | 95.00 | 1,234 | 2 |",
        "![top1 over epochs](curves.png)",
        "* kdfast 0.1.0 (commit unknown), torch None",
    ):
        assert line in text.splitlines()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "deep/report/report.csv").read_text())))
    assert [f"{r['dataset']} {r['method']}" for r in rows] == [
        "cifar10 none", "cifar10 kd", "digits none", "digits at", "digits kd"
    ]  # fmt: skip
    assert (rows[4]["seeds"], rows[4]["last_by_seed"]) == ("0 1", "90.06 90.06")
    assert (rows[3]["last_mean"], rows[3]["last_std"], rows[3]["gain_kind"]) == (
        "80.0",
        "",
        "paired",
    )
    assert (tmp_path / "deep/report/curves.png").read_bytes().startswith(b"\x89PNG")
    # Once more, over what is there.
    (tmp_path / "deep/report/own.txt").write_text("kept")
    assert run_script(REPORT, "runs/a0", "--output", "deep/report", "--metric", "top5")[0] == 0
    assert "last top5" in (tmp_path / "deep/report/report.md").read_text()
    assert sorted(p.name for p in (tmp_path / "deep/report").iterdir()) == sorted(
        [*FILES, "own.txt"]
    )


def test_html_is_safe_and_needs_nothing(tmp_path):
    nasty = "<script>alert('$x$')</script>|*a*"
    run = distilled(
        tmp_path / "a", 86.0, dataset=nasty, model=nasty, teacher=nasty, methods={nasty: {}}
    )
    edit("args.yaml", "kdfast: 0.1.0", 'kdfast: "<b>&"')(run)
    half = write_run(tmp_path / "<i>half", finished=False, epochs=5)
    runs, unfinished = read_runs([tmp_path])
    assert [state.path for state in unfinished] == [half]
    write_report(tmp_path / "out", tabulate(runs), unfinished, title=nasty)
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page and "<i>" not in page and "<b>&" not in page
    assert "&lt;script&gt;alert" in page and "&lt;i&gt;half" in page
    assert not re.search(r"https?://|@import|url\(|<link|<iframe", page)
    assert re.findall(r'src="(.{5})', page) == ["data:"]
    text = (tmp_path / "out/report.md").read_text()
    assert "<script" not in text and "<i>" not in text
    heading = next(line for line in text.splitlines() if line.startswith("| method"))
    assert len(re.findall(r"(?<!\\)\|", heading)) == 3  # a column of methods, one of scores


@pytest.mark.parametrize("count", [1, 10, 25])
def test_curves_of_many_methods(tmp_path, count):
    for i in range(count):
        distilled(tmp_path / f"m{i}", 60.0 + i, methods={f"_method {i}": {}})
    (path,) = [p for p in write_report(tmp_path / "out", table_of(tmp_path)) if p.suffix == ".png"]
    assert path.stat().st_size > 10_000


def test_real_runs(run_script, teacher_run, tmp_path):
    few = ("--train-limit", 128, "--eval-limit", 64, "--epochs", 1, "--output", "out")
    teach = ("--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run)
    for seed in (0, 1):
        code, _, err = run_script(
            "train/distill.py", *few, *teach, "--method", "kd", "--seed", seed, "--baseline"
        )
        assert code == 0, err
    code, _, err = run_script("train/classifier.py", *few, "--model", "cifar_resnet14")
    assert code == 0, err
    code, out, err = run_script(REPORT, "out")
    assert code == 0 and out.startswith("5 runs"), err
    with (tmp_path / "report/report.csv").open() as file:
        none, kd, other = csv.DictReader(file)
    folders = [tmp_path / f"out/distill-digits-kd-cifar_resnet8-cifar_resnet8-s{s}" for s in (0, 1)]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    last = [result["last"]["top1"] for result in results]
    gain = sum(r["last"]["top1"] - r["baseline_top1"] for r in results) / 2
    assert [float(score) for score in kd["last_by_seed"].split()] == last
    assert float(kd["gain_mean"]) == pytest.approx(gain) and kd["gain_kind"] == "paired"
    assert (none["method"], none["seeds"], kd["seeds"]) == ("none", "0 1", "0 1")
    assert (other["student"], other["teacher"], other["method"]) == ("cifar_resnet14", "-", "none")


def test_benchmark_of_accuracy(run_script, tmp_path):
    """From finished runs: nothing is trained again."""
    out = tmp_path / "output/accuracy/fashion-mnist"
    for name in ("teacher", "heads", "deep"):
        write_run(out / name, dataset="fashion-mnist")
    ways = {"none": {}, "kd+at": KD | {"at": {"beta": 1.0}}, "at": {"at": {"beta": 1.0}}}
    for i, (name, methods) in enumerate(ways.items()):
        for seed in (0, 1, 2):
            place = out / f"{name}-s{seed}"
            distilled(place, 80.0 + i + seed, methods=methods, seed=seed, dataset="fashion-mnist")
    benchmark = "benchmarks/accuracy.py"
    flags = ("--students", *ways, "--results", "results")
    code, _, err = run_script(benchmark, "fashion-mnist", *flags)
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == [f"accuracy-fashion-mnist.{kind}" for kind in ("csv", "md", "png")]
    text = (tmp_path / "results/accuracy-fashion-mnist.md").read_text()
    assert "| kd+at | 81.00 | 82.00 | 83.00 |" in text
    assert "--method kd at --seed SEED" in text and "![top1 over epochs](accuracy-" in text
    code, _, err = run_script(benchmark, "fashion-mist", "--results", "results")
    assert code == 2 and "unknown experiment" in err and "fashion-mnist" in err
