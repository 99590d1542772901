"""Variance reports: table, files and chart, and what `analysis/variance.py` measures."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from PIL import Image
from test_resume import CLASSIFIER, TORCHRUN, command, finish

from kdfast.analysis.variance import (
    Measured,
    as_csv,
    as_markdown,
    as_text,
    draw_variances,
    per_channel_csv,
)
from kdfast.data import open_data
from kdfast.metrics import VarianceReport
from kdfast.models import (
    Taps,
    TransNet,
    checksum,
    create_model,
    load_weights,
    read_weights,
    save_weights,
)
from kdfast.training.finished_transnets import Finished

VARIANCE, TRANSNET = "analysis/variance.py", "train/transnet.py"
FILES = ["per_channel.csv", "variance.csv", "variance.md", "variance.png"]
TRAINED, HELD_OUT = 64, 45
FEW = ("--train-limit", TRAINED, "--eval-limit", HELD_OUT, "--epochs", 2)


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
    assert (
        float(found["cov(order0,order2)"]["variance"])
        == (one.report["covariances"]["order0,order2"])
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
    wide = size(draw_variances(chain, "t"))[0]
    other = dataclasses.replace(measured(2, "g2", generation=2), facts={"network A": "another"})
    for last in (measured(2, "g2"), measured(2, "g2", generation=1), other):
        assert size(draw_variances([*chain[:2], last], "t"))[0] < wide


@pytest.mark.parametrize(
    "pair, path, generation",
    [
        ("seeds", "chain/generation-12/last.safetensors", 12),
        ("generations", "chain/generation-1/last.safetensors", 1),
        ("generations", "networks/digits-s1/last.safetensors", 0),
        ("seeds", "networks/digits-s1/last.safetensors", None),
    ],
)
def test_generations_are_told_by_their_folders(pair, path, generation):
    run = SimpleNamespace(b=SimpleNamespace(path=Path(path)))
    assert Finished(Namespace(pair=pair), None, run).generation() == generation


# What the script measures.


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """Folder of two run folders, `a` and `b`, of small networks trained a little on digits."""
    folder = tmp_path_factory.mktemp("networks")
    for seed, name in enumerate("ab"):
        few = ("--model", "cifar_resnet8", "--epochs", 1, "--train-limit", 256, "--seed", seed)
        call(CLASSIFIER, *few, "--output", folder, "--experiment", name)
    return folder


@pytest.fixture(scope="module")
def run(networks, tmp_path_factory) -> Path:
    """Run folder of a Trans-Net between them that was trained a little."""
    return train(networks, tmp_path_factory.mktemp("transnet"), "run")


@pytest.fixture(scope="module")
def shuffled(networks, tmp_path_factory) -> Path:
    """The control: a run whose targets are of other images."""
    return train(networks, tmp_path_factory.mktemp("control"), "shuffled", "--shuffle-pairs")


def call(script: str, *flags: object) -> None:
    assert load_script(script).main([str(flag) for flag in flags]) == 0


def train(networks: Path, folder: Path, name: str, *flags: object, b: object = None) -> Path:
    pair = ("--checkpoint-a", networks / "a", "--checkpoint-b", b or networks / "b")
    call(TRANSNET, *pair, *FEW, "--output", folder, "--experiment", name, *flags)
    return folder / name


def quantities(folder: Path, run: str | None = None) -> dict[str, float]:
    found = rows((folder / "variance.csv").read_text())
    return {r["quantity"]: float(r["variance"]) for r in found if run in (None, r["run"])}


def features(folder: Path, layer: str) -> torch.Tensor:
    """What a network of `networks` has at `layer` for the held-out images of the runs."""
    net = create_model("cifar_resnet8", 10)
    record = load_weights(net, folder / "best.safetensors")
    mean, std = (torch.tensor(record[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    source = open_data("digits", None, eval_limit=HELD_OUT).eval
    images = np.stack([np.array(source.read(i)[0].convert("RGB")) for i in range(len(source))])
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        return Taps(net.eval(), [layer])((images - mean) / std)[1][0]


def transnet(path: Path) -> TransNet:
    weights, record = read_weights(path)
    net = TransNet(record["channels"], record["layers"], record["kernel_size"])
    net.load_state_dict(weights)
    return net


def variance(values: torch.Tensor) -> float:
    """Population variance of each channel of [N, C, H, W], averaged."""
    return values.double().numpy().var(axis=(0, 2, 3), ddof=0).mean()


def test_report_is_that_of_the_definition(run_script, run, networks, tmp_path):
    code, out, err = run_script(VARIANCE, run, "--output", "here")
    assert code == 0, err
    record = read_weights(run / "best.safetensors")[1]
    source, target = (features(networks / n, record[n]["layer"]) for n in "ab")
    with torch.no_grad():
        orders = transnet(run / "best.safetensors").orders(source)
    found, total = quantities(tmp_path / "here"), variance(target)
    expected = {f"order{n}": variance(part) for n, part in enumerate(orders)} | {
        "output": variance(orders.sum(0)),
        "residual": variance(target - orders.sum(0)),
        "target": total,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    shares = {
        r["quantity"]: r["relative"] for r in rows((tmp_path / "here/variance.csv").read_text())
    }
    assert float(shares["order1"]) == pytest.approx(expected["order1"] / total, rel=1e-5)
    for word in ("val split, for the set has no third one", f"{HELD_OUT} images of digits",
                 "cifar_resnet8", record["a"]["layer"], record["a"]["checksum"][:8]):  # fmt: skip
        assert word in out and word in (tmp_path / "here/variance.md").read_text()
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == FILES


def test_files_go_into_the_run_and_another_split_is_looked_at(run_script, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    code, out, err = run_script(VARIANCE, copy, "--split", "train", "--mean-scope", "global")
    assert code == 0, err
    assert f"{TRAINED} images of digits, train split" in out
    assert sorted(path.name for path in (copy / "variance").iterdir()) == FILES
    assert "about one mean" in (copy / "variance/variance.md").read_text()
    found = rows((copy / "variance/per_channel.csv").read_text())
    means, own = (
        np.array([float(r[f"target_{kind}"]) for r in found]) for kind in ("mean", "variance")
    )
    wanted = own.mean() + means.var()
    assert quantities(copy / "variance")["target"] == pytest.approx(wanted, rel=1e-12)


def test_batches_and_processes_do_not_matter(run_script, run, shuffled, tmp_path):
    """Acceptance check 6: within 1e-10 from equal features, within 1e-6 end to end.

    Of the two runs the shuffled one is read from caches.
    """
    for name, size in (("whole", HELD_OUT), ("parts", 7)):
        assert run_script(VARIANCE, run, shuffled, "-b", size, "--output", name)[0] == 0
    few = (run, shuffled, "-b", 11, "--output", "two")
    said = finish(command(*TORCHRUN, ROOT / VARIANCE, *few, cwd=tmp_path))
    assert said.count("\nrun ") == 2, "one process speaks, of one table's head and row"
    for name, bound in (("run", 1e-6), ("shuffled", 1e-10)):
        whole = quantities(tmp_path / "whole", name)
        for other in ("parts", "two"):
            found = quantities(tmp_path / other, name)
            assert found == pytest.approx(whole, rel=bound, abs=0)
    assert run_script(VARIANCE, run, "--orders-dtype", "float32", "--output", "fast")[0] == 0
    fast, whole = quantities(tmp_path / "fast"), quantities(tmp_path / "whole", "run")
    assert fast == pytest.approx(whole, rel=1e-4) and fast != whole


def test_shuffled_pairs_are_read_from_caches(run_script, refused, run, shuffled, tmp_path):
    code, out, err = run_script(VARIANCE, shuffled, "--output", "here")
    assert code == 0, err
    assert "of other images" in out
    assert run_script(VARIANCE, run, "--output", "plain")[0] == 0
    found, plain = (quantities(tmp_path / name) for name in ("here", "plain"))
    assert found["target"] == pytest.approx(plain["target"], rel=1e-3), "the same, elsewhere"
    assert found["residual"] > plain["residual"]
    refused(2, VARIANCE, shuffled, "--features", "live", words=["--shuffle-pairs", "live"])


def test_generations_are_a_row_each_with_a_line_over_them(run_script, networks, tmp_path):
    """A folder of several pairs stands for them all; what they are called sets them apart."""
    for generation, name in enumerate("ba"):
        link = tmp_path / "chain" / f"generation-{generation}"
        shutil.copytree(networks / name, link)
    several = train(networks, tmp_path, "several", "--layers", 2, b=tmp_path / "chain")
    code, out, err = run_script(VARIANCE, several)
    assert code == 0, err
    rows_of = [line.split() for line in out.splitlines() if line.startswith("pair-")]
    assert [line[0] for line in rows_of] == ["pair-0", "pair-1"]
    folder = several / "variance"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert quantities(folder, "pair-0") != quantities(folder, "pair-1")
    alone = run_script(VARIANCE, several / "pair-0", several / "pair-1", "--output", "listed")
    assert alone[0] == 0
    for name in FILES:
        assert (tmp_path / "listed" / name).read_bytes() == (folder / name).read_bytes()
    wide = size((folder / "variance.png").read_bytes())[0]
    assert run_script(VARIANCE, several / "pair-0", "--output", "one")[0] == 0
    assert size((tmp_path / "one/variance.png").read_bytes())[0] < wide


def test_weights_alone_are_enough(run_script, run, tmp_path):
    assert run_script(VARIANCE, run, "--output", "run")[0] == 0
    (tmp_path / "moved").mkdir()
    file = shutil.copy(run / "best.safetensors", tmp_path / "moved/g.safetensors")
    assert run_script(VARIANCE, file, "--eval-limit", HELD_OUT)[0] == 0
    assert quantities(tmp_path / "moved/variance") == quantities(tmp_path / "run")


def test_published_weights_with_flags_for_the_rest(run_script, run, networks, tmp_path):
    net, record = transnet(run / "best.safetensors"), read_weights(run / "best.safetensors")[1]
    names = {f"linearLayers_conv.{i}.weight": conv.weight for i, conv in enumerate(net.convs)}
    torch.save({**names, "nonLinearLayers_p_pre": net.gate_logits}, tmp_path / "g.pth")
    pair = ("--checkpoint-a", networks / "a", "--checkpoint-b", networks / "b")
    few = ("--eval-limit", HELD_OUT, "--layer", record["a"]["layer"])
    code, _, err = run_script(VARIANCE, "g.pth", *pair, *few, "--output", "theirs")
    assert code == 0, err
    assert run_script(VARIANCE, run, "--output", "ours")[0] == 0
    assert quantities(tmp_path / "theirs") == quantities(tmp_path / "ours")


def test_without_a_run_it_trains_what_is_absent_once(run_script, tmp_path):
    """What train/transnet.py made with the same flags is taken, as is what was made before."""
    few = ("--train-limit", 64, "--eval-limit", 30, "--epochs", 1, "--model", "cifar_resnet8")
    pair = ("--pair", "same", "--layer", "layer2")
    assert run_script(TRANSNET, *few, *pair)[0] == 0
    code, out, err = run_script(VARIANCE, *few, *pair, "--orders-dtype", "float32")
    assert code == 0, err
    assert "training into" not in out and "Trans-Net: taken from" in out
    assert (tmp_path / "output/transnet-digits-same-layer2-s0/variance/variance.csv").is_file()
    first = run_script(VARIANCE, *few, "--pair", "same")
    again = run_script(VARIANCE, *few, "--pair", "same")
    assert (first[0], again[0]) == (0, 0)
    assert "epoch 1/1" in first[1] and "epoch" not in again[1]
    table = [out[out.index("quantity") :] for _, out, _ in (first, again)]
    assert table[0] == table[1]


def test_printed_options_can_be_given_again(run_script, tmp_path):
    code, out, _ = run_script(VARIANCE, "RUN", "--mean-scope", "global", "--print-config")
    assert code == 0 and "RUN" not in out and "mean-scope: global" in out
    (tmp_path / "options.yaml").write_text(out)
    assert run_script(VARIANCE, "-c", "options.yaml", "--print-config")[:2] == (0, out)


def test_images_nobody_can_rebuild(run_script, run, networks, tmp_path):
    """Constant channels of B, and closed gates, are told."""
    weights, record = read_weights(run / "best.safetensors")
    weights["gate_logits"].fill_(-20.0)
    constant = shutil.copytree(networks / "b", tmp_path / "b")
    own, about = read_weights(constant / "best.safetensors")
    name = next(n for n in own if n.startswith("layer2") and n.endswith("bn2.weight"))
    assert own[name].ndim == 1
    own[name][:3], own[name.replace("weight", "bias")][:3] = 0, 1
    for key in [k for k in own if k.startswith("layer2") and "downsample" in k and "weight" in k]:
        own[key][:3] = 0
    module = create_model("cifar_resnet8", 10)
    module.load_state_dict(own)
    save_weights(constant / "best.safetensors", module, about)
    record["b"] |= {"checksum": checksum(own), "path": str(constant / "best.safetensors")}
    net = transnet(run / "best.safetensors")
    net.load_state_dict(weights)
    save_weights(tmp_path / "g.safetensors", net, record)
    code, _, err = run_script(VARIANCE, "g.safetensors", "--eval-limit", HELD_OUT)
    assert code == 0, err
    assert "3 of 32 target channels are constant" in err
    assert "saturated gates: p_0 2.1e-09, p_1 2.1e-09" in err


@pytest.fixture
def spoilt(run, networks, tmp_path) -> Path:
    """A copy of the run, and of its networks beside it, that may be spoilt."""
    for name in "ab":
        shutil.copytree(networks / name, tmp_path / name)
    return shutil.copytree(run, tmp_path / "spoilt")


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


BAD = [
    ("nowhere", 1, ["no Trans-Net at nowhere", "train/transnet.py"]),
    ("a", 1, ["a", "no Trans-Net"]),
    (".", 1, ["no args.yaml"]),
    ("spoilt --split validation", 2, ["--split", "validation", "test"]),
    ("spoilt --mean-scop global", 2, ["--mean-scope"]),
    ("spoilt --checkpoint-a b", 1, ["--checkpoint-a", "weights"]),
    ("--dataset fashion-mnist", 2, ["fashion-mnist", "train/transnet.py"]),
]


@pytest.mark.parametrize("row", BAD, ids=lambda row: row[0])
def test_requests_that_cannot_be_served(refused, spoilt, row):
    flags, code, words = row
    refused(code, VARIANCE, *flags.split(), words=words)


IDLE = ["--layer layer1", "--model-a cifar_resnet8", "--pair same", "--layers 2", "--alpha 1",
        "--freeze-gates", "--feature-dump x", "--lr 1", "--epochs 2", "--sched cosine",
        "--experiment x"]  # fmt: skip


@pytest.mark.parametrize("flags", IDLE)
def test_flags_without_effect_on_a_run(refused, spoilt, flags):
    flag = flags.split()[0]
    refused(2, VARIANCE, spoilt, *flags.split(), words=[flag, "no effect", "spoilt"])
    refused(2, "analysis/visualize.py", spoilt, *flags.split(), words=[flag, "no effect"])


def test_options_of_another_script_may_be_shared(run_script, run, tmp_path):
    """A config has more than a run needs: what is trained stays as it is."""
    text = run_script(VARIANCE, "--print-config", "--eval-limit", HELD_OUT)[1]
    (tmp_path / "options.yaml").write_text(text)
    code, _, err = run_script(VARIANCE, run, "-c", "options.yaml", "--output", "here")
    assert code == 0, err


def test_a_moved_run_finds_the_caches_beside_it(run_script, networks, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    train(networks, Path("output"), "run")
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "new/output/run"
    code, _, err = run_script(VARIANCE, run, "--features", "cache")
    assert code == 0, err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_weights_of_another_set(refused, run, tmp_path):
    """A file without its args.yaml has only its record to say what it was trained on."""
    net, record = transnet(run / "best.safetensors"), read_weights(run / "best.safetensors")[1]
    save_weights(tmp_path / "g.safetensors", net, record | {"dataset": "cifar10"})
    refused(2, VARIANCE, "g.safetensors", words=["cifar10", "digits", "--dataset cifar10"])


def test_damaged_runs_are_refused(refused, spoilt):
    damage(spoilt / "best.safetensors")
    refused(1, VARIANCE, spoilt, words=["best.safetensors", "damaged"])
    (spoilt / "args.yaml").write_text("options: [")
    refused(1, VARIANCE, spoilt, words=["args.yaml", "damaged"])
    (spoilt / "args.yaml").write_text("layout: 99\noptions: {dataset: digits}\n")
    refused(1, VARIANCE, spoilt, words=["newer kdfast"])
    (spoilt / "args.yaml").write_text("options: {dataset: digits, crop-pct: much}\n")
    refused(2, VARIANCE, spoilt, words=["args.yaml", "crop-pct", "much"])


def test_weights_that_changed_since_are_refused(refused, networks, run, tmp_path):
    """A's file holds another network now."""
    record = read_weights(run / "best.safetensors")[1]
    net = transnet(run / "best.safetensors")
    record["a"]["path"] = str(networks / "b/best.safetensors")
    save_weights(tmp_path / "g.safetensors", net, record)
    refused(1, VARIANCE, "g.safetensors", words=["network A", "weights", "--checkpoint-a"])
    record["a"]["path"] = str(tmp_path / "gone.safetensors")
    save_weights(tmp_path / "g.safetensors", net, record)
    refused(1, VARIANCE, "g.safetensors", words=["network A", "gone.safetensors", "--checkpoint-a"])
