"""Trans-Net training: the loss, gates, whole runs, opening them again, published weights."""

from __future__ import annotations

import argparse
import csv
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, load_script
from safetensors.torch import load_file, save_file
from test_resume import TORCHRUN, command, finish, record_of

from kdfast.analysis.runs import read_runs
from kdfast.data import to_float
from kdfast.errors import UsageError, UserError
from kdfast.metrics import VarianceReport
from kdfast.models import Taps, TransNet, create_model, default_tap, read_weights, save_weights
from kdfast.training.features import Features
from kdfast.training.options import parse
from kdfast.training.setup import load_data, start
from kdfast.training.tapped import open_tapped
from kdfast.training.transnet import TransNetObjective, build_transnet, warn_of_saturation
from kdfast.training.transnet_runs import find_or_train, open_transnet, transnet_parser

SCRIPT = "train/transnet.py"
TINY = ("--train-limit", 64, "--eval-limit", 64, "--epochs", 1)


def options_of(*flags: object) -> argparse.Namespace:
    return parse(transnet_parser("test"), [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def networks(tmp_path_factory, teacher_run):
    """Flags for a pair of networks, and for where their features are kept."""
    folder = tmp_path_factory.mktemp("networks")
    flags = ["--model", "cifar_resnet8", "--epochs", "1", "--train-limit", "256", "--seed", "1"]
    classifier = load_script("train/classifier.py")
    assert classifier.main([*flags, "--output", str(folder), "--experiment", "b"]) == 0
    return (
        *("--checkpoint-a", teacher_run, "--checkpoint-b", folder / "b"),
        *("--feature-dir", folder / "features"),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, networks):
    """Run folder of a Trans-Net, tiny."""
    folder = tmp_path_factory.mktemp("transnet")
    flags = (*TINY, *networks, "--output", folder, "--experiment", "run", "--epochs", 2)
    assert load_script(SCRIPT).main([str(flag) for flag in flags]) == 0
    return folder / "run"


def rows_of(run) -> list[dict]:
    with (run / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_epoch_0_is_the_fresh_trans_net(run_script, networks, tmp_path):
    flags = (*TINY, *networks, "--seed", 3, "--output", ".", "--experiment", "run")
    code, _, err = run_script(SCRIPT, *flags, "--save-epochs", 0, 1)
    assert code == 0, err
    folder = tmp_path / "run/weights"
    assert sorted(p.name for p in folder.iterdir()) == [
        f"epoch-000{epoch}.safetensors" for epoch in (0, 1)
    ]
    state, record = read_weights(folder / "epoch-0000.safetensors")
    assert (record["epoch"], record["loss"], record["kind"]) == (0, None, "transnet")
    expected = build_transnet(options_of("--seed", 3), (record["channels"], 8, 8)).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    after = load_file(folder / "epoch-0001.safetensors")
    assert not any(torch.equal(after[name], value) for name, value in expected.items())


# The loss.


def test_loss_is_mean_squared_error_plus_alpha_times_squared_gates():
    torch.manual_seed(0)
    net = TransNet(4)
    with torch.no_grad():
        net.gate_logits.copy_(torch.tensor([0.3, -1.0]))
    x, t = torch.randn(2, 5, 4, 6, 6)
    total, terms, output = TransNetObjective(net, [0.5, 2.0])((x, t))
    p = 1 / (1 + torch.exp(-net.gate_logits.detach()))
    mse = ((net(x) - t) ** 2).sum() / (5 * 4 * 6 * 6)
    penalty = 0.5 * p[0] ** 2 + 2 * p[1] ** 2
    torch.testing.assert_close(terms, torch.stack([mse.detach(), penalty]))
    torch.testing.assert_close(total, mse + penalty)
    assert torch.equal(output, net(x).detach())


def test_penalty_and_its_gradient_at_the_start():
    """Check 8: 0.05 in all, and 0.025 for each logit."""
    net = TransNet(3)
    objective = TransNetObjective(net, [0.1, 0.1])
    x = torch.randn(2, 3, 4, 4)
    total, terms, _ = objective((x, net(x).detach()))
    total.backward()
    assert terms.tolist() == pytest.approx([0, 0.05])
    assert net.gate_logits.grad.tolist() == pytest.approx([0.025, 0.025])


def test_both_terms_are_float32_under_autocast():
    net = TransNet(4)
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
        total, terms, _ = TransNetObjective(net, [0.1, 0.1])((x, 300 + x))
    assert total.dtype == terms.dtype == torch.float32
    want = (net(x) - (300 + x)).square().mean().item()
    assert terms[0].item() == pytest.approx(want, rel=1e-3)
    assert terms[1].item() == pytest.approx(0.05)


def test_a_linear_target_leaves_no_variance_to_higher_orders():
    """Check 8: with t = W* xt and without weight decay the minimum is at p = 0, W_K-1 = W*."""
    torch.manual_seed(1)
    net, teacher = TransNet(3), TransNet(3, layers=1)
    objective = TransNetObjective(net, [0.1, 0.1])
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    x = torch.randn(16, 3, 5, 5)
    t = teacher(x).detach()

    def higher() -> float:
        report = VarianceReport(3)
        report.update(net.orders(x).detach(), t)
        return sum(report.compute()["relative"]["orders"][1:])

    before = higher()
    for _ in range(1200):
        optimizer.zero_grad()
        total, (mse, penalty), _ = objective((x, t))
        total.backward()
        optimizer.step()
    assert higher() < before / 100
    assert mse < 1e-3 * t.var() and penalty < 0.05 / 10
    wrong = (net.convs[-1].weight - teacher.convs[0].weight).norm() / teacher.convs[0].weight.norm()
    assert wrong < 0.1


def test_slopes_of_gates_are_those_of_the_loss_and_of_its_error():
    torch.manual_seed(0)
    net = TransNet(3)
    with torch.no_grad():
        net.gate_logits.copy_(torch.tensor([0.5, -0.7]))
    alpha = [0.1, 0.3]
    objective = TransNetObjective(net, alpha)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0)
    objective.watch(optimizer)
    batches = torch.randn(2, 2, 4, 3, 5, 5)
    gates = net.gates.tolist()
    expected = torch.zeros(2)
    for x, t in batches:
        optimizer.zero_grad()
        objective((x, t))[0].backward()
        optimizer.step()
        error = (net(x) - t).square().mean()
        (mse,) = torch.autograd.grad(error, net.gate_logits)
        p = net.gates.detach()
        expected += mse / (p * (1 - p)) / 2
    found = objective.gauges()
    for i, p in enumerate(gates):
        assert found[f"gate{i}"] == pytest.approx(p)
        assert found[f"dmse_dgate{i}"] == pytest.approx(expected[i].item(), rel=1e-4)
        slope = expected[i].item() + 2 * alpha[i] * p
        assert found[f"dloss_dgate{i}"] == pytest.approx(slope, rel=1e-4)
    assert objective.gauges()["dloss_dgate0"] == 0  # of an epoch that has no step yet


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers(layers, run_script, networks, tmp_path):
    flags = (*TINY, *networks, "--layers", layers, "--output", tmp_path, "--experiment", "few")
    assert run_script(SCRIPT, *flags)[0] == 0
    results = json.loads((tmp_path / "few/results.json").read_text())
    assert len(results["gates"]) == layers - 1


# Networks that are watched.


def test_default_tap_is_before_the_last_activation_of_the_last_but_one_stage():
    expected = {
        "cifar_resnet20": "layer2.2.act2:in",
        "cifar_vgg8": "block3.2:in",
        "resnet18": "layer3.1.act2:in",
        "vgg11": "features.14:in",
        "mobilenetv2_100": "blocks.4",
    }
    taps = {name: default_tap(create_model(name, 10).train(), (32, 32)) for name in expected}
    assert taps == expected


def test_default_tap_leaves_modes_and_needs_stages():
    model = create_model("cifar_resnet8", 10).train()
    model.layer1.eval()
    default_tap(model, (32, 32))
    assert model.training and model.layer2.training and not model.layer1.training
    with pytest.raises(UsageError, match="--layer"):
        default_tap(torch.nn.Linear(2, 2), (32, 32))


@pytest.mark.parametrize("layer", [None, "layer2.0.conv1", "fc:in"])
def test_features_are_those_of_the_whole_network(networks, layer):
    """Outside the cut (inside a block) as well as at it; normalised and resized as recorded."""
    options, accelerator = options_of(*networks), Accelerator(cpu=True)
    data = load_data(options, accelerator)
    tapped = open_tapped("a", networks[1], layer, options, data, accelerator)
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tapped.inputs.mean, tapped.inputs.std))
    resized = torch.nn.functional.interpolate(
        to_float(images, mean, std), (32, 32), mode="bilinear", antialias=True
    )
    logits, (feature,) = Taps(tapped.network, [tapped.layer])(resized)
    with torch.autocast("cpu", torch.bfloat16):  # of the Trans-Net, not of what it is trained on
        found, answer = tapped.features(images, logits=True)
        alone = tapped.features(images)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found, feature) and torch.equal(answer, logits) and torch.equal(alone, found)
    assert tapped.shape == tuple(feature.shape[1:])
    if layer is None:
        assert tapped.layer == "layer2.0.act2:in"
        assert json.loads(json.dumps(tapped.record())) == tapped.record()
        assert tapped.record()["checksum"] == tapped.checksum


def test_nothing_runs_behind_the_layer(networks):
    options, accelerator = options_of(*networks), Accelerator(cpu=True)
    data = load_data(options, accelerator)
    tapped = open_tapped("a", networks[1], None, options, data, accelerator)
    ran = []
    for part in (tapped.network.layer2, tapped.network.layer3, tapped.network.fc):
        part.register_forward_hook(lambda module, *_: ran.append(module))
    tapped.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert tapped.network.layer3 not in ran and tapped.network.fc not in ran


# Whole runs.


def test_run_folder(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["last"].keys() == {"epoch", "loss", "residual_share"}
    rows = rows_of(trained)
    assert {"train_mse", "train_penalty", "eval_loss", "gate0", "dloss_dgate1"} <= rows[0].keys()
    losses = [float(row["eval_loss"]) for row in rows]
    assert results["best"]["loss"] == min(losses) and results["last"]["loss"] == losses[-1]
    _, record = read_weights(trained / "best.safetensors")
    assert (record["kind"], record["layers"], record["channels"]) == ("transnet", 3, 32)
    assert record["a"]["layer"] == record["b"]["layer"] == "layer2.0.act2:in"
    assert record["a"]["checksum"] != record["b"]["checksum"] and not record["shuffled"]
    log = (trained / "train.log").read_text()
    assert "residual share" in log


def test_scores_are_those_of_the_weights_on_the_held_out_images(trained, networks):
    options, accelerator = options_of(*networks, *TINY), Accelerator(cpu=True)
    data = load_data(options, accelerator)
    run = open_transnet(trained, options, accelerator, data)
    assert not run.net.training and run.path == trained
    features = Features(options, accelerator, data, [run.a, run.b])
    errors, targets = [], []
    for batch in features.loader("test").epoch(0):
        x, t = features.prepare(batch.images)
        errors.append(t - run.net(x))
        targets.append(t)
    error, target = torch.cat(errors).double(), torch.cat(targets).double()
    best = json.loads((trained / "results.json").read_text())["best"]
    assert len(error) == 64
    assert best["loss"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    share = error.var((0, 2, 3), correction=0).mean() / target.var((0, 2, 3), correction=0).mean()
    assert best["residual_share"] == pytest.approx(share.item(), rel=1e-5)


def test_reports_pass_trans_nets_over(trained, networks):
    runs, unfinished = read_runs([trained, networks[1]])
    assert [run.path for run in runs] == [networks[1]] and not unfinished
    with pytest.raises(UserError, match="holds a Trans-Net"):
        read_runs([trained])


def test_several_seeds_and_several_networks(run_script, networks, tmp_path):
    """A run for each network B, in a folder of the seed's."""
    two = (*networks[:3], networks[1], *networks[3:])
    flags = (*TINY, *two, "--seeds", 0, 1, "--experiment", "many", "--output", tmp_path)
    code, out, _ = run_script(SCRIPT, *flags)
    assert code == 0
    summary = json.loads(out.splitlines()[-1])
    assert summary["seeds"] == [0, 1] and summary["best_residual_share"]["std"] is not None
    for seed in (0, 1):
        parts = [
            read_weights(tmp_path / f"many-s{seed}/pair-{i}/best.safetensors")[1] for i in (0, 1)
        ]
        assert parts[0]["b"]["checksum"] == parts[0]["a"]["checksum"]
        assert parts[1]["b"]["checksum"] != parts[1]["a"]["checksum"]
    code, out, _ = run_script(SCRIPT, *flags, "--resume", "auto")
    assert code == 0 and json.loads(out.splitlines()[-1]) == summary


def test_several_networks_go_on(run_script, refused, networks, tmp_path):
    """Where they were stopped, also with more of them; with fewer the results would lack some."""
    shutil.copytree(networks[3], tmp_path / "moved")
    flags = (*TINY, *networks[:2], *networks[4:], "--output", tmp_path, "--experiment", "many")

    def two(last, *more) -> dict:
        code, out, err = run_script(SCRIPT, *flags, "--checkpoint-b", networks[1], last, *more)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    whole = tmp_path / "many"
    found = two(networks[3])
    assert json.loads((whole / "results.json").read_text()) == found
    with pytest.raises(UserError, match="holds a Trans-Net"):
        read_runs([whole])
    assert [run.path for run in read_runs([whole, networks[1]])[0]] == [networks[1]]
    shutil.rmtree(whole / "pair-1")
    (whole / "results.json").unlink()
    again = two(tmp_path / "moved", "--resume", whole)
    assert again["best"] == found["best"] and (whole / "results.json").exists()
    assert two(networks[3], networks[1], "--resume", "auto")["pairs"][:2] == found["pairs"]
    fewer = (*flags, "--resume", whole, "--checkpoint-b", networks[1])
    refused(2, SCRIPT, *fewer, networks[3], words=["many has pair-2 too", "networks B"])
    refused(2, SCRIPT, *fewer, words=["many has pair-0 too"])
    three = (*fewer, networks[3], networks[1])
    refused(2, SCRIPT, *three, "--alpha", 2, words=["alpha [0.1, 0.1]", "alpha [2.0, 2.0]"])
    others = (*fewer, networks[1], networks[1])
    leaves = ("many/*", "many/pair-0/*")
    refused(2, SCRIPT, *others, words=["pair-1", "made with b"], leaves=leaves)


def test_frozen_gates_stay(run_script, networks, tmp_path):
    flags = (*TINY, *networks, "--freeze-gates", "--output", tmp_path, "--experiment", "frozen")
    assert run_script(SCRIPT, *flags)[0] == 0
    row = rows_of(tmp_path / "frozen")[0]
    assert row["gate0"] == row["gate1"] == "0.5" and "dloss_dgate0" not in row


def test_vectors(run_script, networks, tmp_path):
    flags = (*TINY, *networks, "--layer", "fc:in", "--output", tmp_path, "--experiment", "fc")
    assert run_script(SCRIPT, *flags)[0] == 0
    assert load_file(tmp_path / "fc/best.safetensors")["convs.0.weight"].shape == (64, 64, 1, 1)


@pytest.mark.parametrize("layer", [(), ("--layer", "fc:in")], ids=["maps", "vectors"])
def test_more_is_explained_the_more_is_shared(layer, networks, run_script):
    """Of one network with itself, of two seeds, and of other images: there nothing of vectors.

    What maps have in common, whatever the image, is a function of position.
    """
    same, seeds = ("--checkpoint-b", networks[1]), ("--checkpoint-b", networks[3])
    shares = []
    for number, other in enumerate((same, seeds, (*seeds, "--shuffle-pairs"))):
        flags = (*networks[:2], *other, *networks[4:], *layer, "--experiment", number)
        code, out, err = run_script(
            SCRIPT, *flags, "--train-limit", 256, "--eval-limit", 64, "--epochs", 4
        )
        assert code == 0, err
        shares.append(json.loads(out.splitlines()[-1])["best"]["residual_share"])
    assert shares[0] < shares[1] < shares[2]
    assert not layer or shares[2] >= 0.9


def test_print_config_shows_digits_settings(run_script):
    code, out, _ = run_script(SCRIPT, "--print-config", "--alpha", "0.5", "8")
    assert code == 0
    for line in ("opt: adam", "sched: log", "pair: seeds", "layers: 3", "- 8.0"):
        assert line in out


# Warnings.


def test_constant_channels_are_counted(run_script, networks, tmp_path):
    """A bias alone makes channels constant: here two of 32."""
    weights = tmp_path / "constant.safetensors"
    state, record = read_weights(networks[1] / "best.safetensors")
    for name in ("layer2.0.bn2.weight", "layer2.0.bn2.bias"):
        state[name][:2] = 0.0 if name.endswith("weight") else 5.0
    state["layer2.0.conv2.weight"][:2] = 0
    model = create_model("cifar_resnet8", 10)
    model.load_state_dict(state)
    save_weights(weights, model, record)
    flags = ("--checkpoint-a", weights, *networks[2:4], "--layer", "layer2.0.bn2", *TINY)
    flags += ("--output", tmp_path, "--experiment", "run", "--resume", "auto")
    code, out, err = run_script(SCRIPT, *flags)
    assert code == 0, err
    warned = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "2 of 32 channels" in warned[0] and "of 64 images" in warned[0]
    code, out, err = run_script(SCRIPT, *flags)
    assert code == 0 and "warning: " not in out, "said again when resumed"


def test_saturated_gates_are_counted(capsys):
    warn_of_saturation([0.5, 0.0099, 0.991])
    said = capsys.readouterr().out
    assert "2 of 3 gates" in said and "p1 = 0.0099" in said and "p2 = 0.99" in said
    warn_of_saturation([0.02, 0.98])
    assert capsys.readouterr().out == ""


# Opening and finding again.


def test_found_again_or_trained_anew(trained, networks, tmp_path, monkeypatch, capsys):
    """Trained once for equal options; the usual folder's run counts where its options agree."""
    monkeypatch.chdir(tmp_path)
    flags = (*TINY, *networks, "--output", tmp_path / "out")
    options = options_of(*flags)
    accelerator = start(options)
    data = load_data(options, accelerator)
    (first,) = find_or_train(options, accelerator, data)
    assert (first / "best.safetensors").is_file() and "taken from" not in capsys.readouterr().out
    assert find_or_train(options, accelerator, data) == [first]
    assert "taken from" in capsys.readouterr().out
    # Trained by the script with another option, into its usual folder.
    flags = (*flags, "--alpha", 2)
    assert load_script(SCRIPT).main([str(flag) for flag in flags]) == 0
    options = options_of(*flags)
    options.mixed_precision = "no"  # as `start` settles it
    (found,) = find_or_train(options, accelerator, data)
    assert found == tmp_path / "out/transnet-digits-teacher-b-s0" and found != first


def test_find_or_train_names_the_command_elsewhere():
    options = options_of("--dataset", "cifar10")
    with pytest.raises(UsageError, match=r"train/transnet.py --dataset .*cifar10"):
        find_or_train(options, Accelerator(cpu=True), None)


def test_other_weights_of_a_network_are_refused(trained, networks):
    options = options_of("--checkpoint-a", networks[3], *networks[2:])
    accelerator = Accelerator(cpu=True)
    data = load_data(options, accelerator)
    _, record = read_weights(trained / "best.safetensors")
    with pytest.raises(UserError) as refusal:
        open_transnet(trained, options, accelerator, data)
    said = str(refusal.value)
    assert record["a"]["checksum"][:8] in said and record["b"]["checksum"][:8] in said
    assert "--checkpoint-a" in said


def test_a_moved_network_is_found_by_its_flag(trained, networks, tmp_path):
    copy = tmp_path / "moved.safetensors"
    shutil.copy(networks[1] / "best.safetensors", copy)
    state, record = read_weights(trained / "best.safetensors")
    record["a"]["path"] = str(tmp_path / "gone")
    net = TransNet(32)
    net.load_state_dict(state)
    save_weights(tmp_path / "net.safetensors", net, record)
    accelerator = Accelerator(cpu=True)
    data = load_data(options_of(), accelerator)
    with pytest.raises(UserError, match=r"no longer at .*gone.*--checkpoint-a"):
        open_transnet(tmp_path / "net.safetensors", options_of(), accelerator, data)
    options = options_of("--checkpoint-a", copy)
    opened = open_transnet(tmp_path / "net.safetensors", options, accelerator, data)
    assert opened.a.path == copy and opened.a.checksum == record["a"]["checksum"]


def test_published_weights(networks, tmp_path):
    """The authors' names, with the entries that only their code has."""
    torch.manual_seed(0)
    state = {f"module.linearLayers_conv.{i}.weight": torch.randn(32, 32, 3, 3) for i in range(3)}
    state["module.nonLinearLayers_p_pre"] = torch.tensor([0.2, -0.4])
    state["module.instance_norm_layers.0.running_var"] = torch.ones(32)
    path = tmp_path / "published.pth.tar"
    torch.save({"epoch": 3, "state_dict": state}, path)
    options, accelerator = options_of(*networks), Accelerator(cpu=True)
    data = load_data(options, accelerator)
    run = open_transnet(path, options, accelerator, data)
    assert torch.equal(run.net.convs[1].weight, state["module.linearLayers_conv.1.weight"])
    assert run.a.layer == "layer2.0.act2:in" and run.record["kind"] == "transnet"
    with pytest.raises(UsageError, match="--checkpoint-a and --checkpoint-b"):
        open_transnet(path, options_of(), accelerator, data)
    with pytest.raises(UsageError, match=r"32 channels.*has 64"):
        open_transnet(path, options_of(*networks, "--layer", "layer3"), accelerator, data)


@pytest.mark.parametrize("what", ["classifier", "record"])
def test_what_is_no_transnet_is_refused(what, networks, trained, tmp_path):
    options, accelerator = options_of(*networks), Accelerator(cpu=True)
    path = networks[1]
    if what == "record":
        path = tmp_path / "bad.safetensors"
        save_file(load_file(trained / "best.safetensors"), path, {"kind": json.dumps("transnet")})
    with pytest.raises(UserError, match="Trans-Net"):
        open_transnet(path, options, accelerator, load_data(options, accelerator))


# Bad input.


@pytest.mark.parametrize(
    "code, flags, words",
    [
        (2, ("--alpha", 0.1, 0.2, 0.3), ["--alpha has 3 values", "2 gates"]),
        (2, ("--layers", 0), ["--layers"]),
        (2, ("--layers", 1, "--alpha", 0.1, 0.2), ["--layers 1 has no gates", "drop --alpha"]),
        (2, ("--layer", "layr2"), ["unknown layer 'layr2'", "layer2"]),
        (2, ("--layer-b", "layer3"), ["layer2.0.act2:in", "32x16x16", "layer3", "64x8x8"]),
        (2, ("--pair", "twins"), ["--pair"]),
        (2, ("--shuffle-pairs", "--features", "live"), ["--shuffle-pairs", "--features"]),
        (2, ("--hflip", 0.5), ["--hflip", "as they are"]),
        (2, ("--scale", 0.5, 1), ["--scale", "as they are"]),
        (2, ("--smoothing", 0.1), ["--smoothing"]),
        (2, ("--eval-only",), ["analysis/variance.py"]),
        (1, ("--model-a", "cifar_resnet14"), ["does not fit cifar_resnet14"]),
        (1, ("--checkpoint-a", "nowhere"), ["nowhere"]),
    ],
)
def test_bad_flags(refused, networks, code, flags, words):
    refused(code, SCRIPT, *TINY, *networks, *flags, words=words)


def test_missing_networks_elsewhere(refused, image_folder):
    flags = ("--dataset", "folder", "--data-dir", image_folder)
    refused(2, SCRIPT, *flags, words=["train/classifier.py", "--checkpoint-a"])


def test_wrong_class_count(refused, networks, image_folder):
    flags = ("--dataset", "folder", "--data-dir", image_folder, *networks, "-b", 2)
    refused(1, SCRIPT, *flags, words=["10 classes", "2"])


# Several processes, and interruption.

FEW = ("--train-limit", 203, "--eval-limit", 90, "--epochs", 2, "--checkpoint-steps", 1)


def test_killed_and_resumed(networks, tmp_path):
    """Bit for bit, gauges within an interrupted epoch included."""
    killed = (*TORCHRUN, ROOT / "tests/killed.py")
    flags = (*FEW, *networks, "-b", 16, "--output", tmp_path)
    finish(command(*killed, "0:0", SCRIPT, *flags, "--experiment", "whole", cwd=tmp_path))
    again = (*flags, "--experiment", "cut", "--resume", "auto")
    ended = command(*killed, "0:37", SCRIPT, *again, cwd=tmp_path)
    ended.communicate(timeout=600)
    assert ended.returncode != 0 and any((tmp_path / "cut/checkpoints").glob("*-step-*"))
    finish(command(*killed, "0:0", SCRIPT, *again, cwd=tmp_path))
    assert record_of(tmp_path / "whole") == record_of(tmp_path / "cut")
    # Two processes are one, but for rounding.
    one = (*FEW, *networks, "-b", 32, "--output", tmp_path, "--experiment", "one")
    assert load_script(SCRIPT).main([str(flag) for flag in one]) == 0
    for mine, other in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "whole"), strict=True):
        for key in ("train_loss", "eval_loss", "eval_residual_share", "gate0", "dmse_dgate1"):
            assert float(mine[key]) == pytest.approx(float(other[key]), rel=1e-4), key
