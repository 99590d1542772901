"""Trans-Nets as whole runs: trained for a pair of networks, found again, and opened."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import UsageError, UserError
from kdfast.models import TransNet, read_weights
from kdfast.training.consistency_flags import pair_flags, transnet_flags
from kdfast.training.features import Features
from kdfast.training.flags import data_flags, run_flags, training_flags
from kdfast.training.journal import say
from kdfast.training.layout import FREE
from kdfast.training.options import batch_size, parse
from kdfast.training.pair_networks import pair_checkpoints, weights_of
from kdfast.training.parser import Parser
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import Inputs, recorded_inputs, weights_path
from kdfast.training.tapped import Tapped, open_tapped, require_same_shape
from kdfast.training.transnet import describe_pair, train_transnet

# What the record of a run says besides what its weights depend on: where networks lie (they are
# known by their checksums), and how the batch is divided.
_INCIDENTAL = (FREE - {"epochs"}) | {
    "checkpoint-a", "checkpoint-b", "model-a", "model-b", "model-kwargs", "layer", "layer-a",
    "layer-b", "pair", "features", "feature-dir", "processes", "batch-size", "global-batch-size",
    "grad-accum-steps",
}  # fmt: skip
# What a Trans-Net shares with the script that needs it, besides data and pair.
_SHARED = (
    "seed", "output", "threads", "mixed_precision", "amp", "deterministic", "channels_last", "ops",
    "torchcompile", "compile_mode", "given",
)  # fmt: skip


def transnet_parser(prog: str, description: str | None = None) -> Parser:
    """The flags of train/transnet.py."""
    parser = Parser(prog=prog, description=description)
    data_flags(parser)
    pair_flags(parser)
    transnet_flags(parser)
    training_flags(parser)
    run_flags(parser, recipe="consistency")
    return parser


def run_name(options: argparse.Namespace, data: ImageData) -> str:
    """The name of a run's folder: set, networks, layers where they are given, and seed."""
    given = [path for path in (options.checkpoint_a, *(options.checkpoint_b or [])[:1]) if path]
    whose = [_short_name(Path(path)) for path in given] or [options.pair]
    layers = dict.fromkeys(
        layer for layer in (options.layer, options.layer_a, options.layer_b) if layer
    )
    parts = ["transnet", data.name, *whose, *layers, *["shuffled"] * options.shuffle_pairs]
    return "-".join([*parts, f"s{options.seed}"]).replace("/", "_").replace(":", ".")


def _short_name(path: Path) -> str:
    """A run folder's name, also where its best or last weights are given."""
    return path.parent.name if path.stem in ("best", "last") else path.stem


def train_pair(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    path_a: Path,
    path_b: Path,
    run: RunFolder,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Train a Trans-Net from the network at `path_a` to that at `path_b` into `run`."""
    a, b = open_pair(options, accelerator, data, path_a, path_b)
    shape = "x".join(map(str, a.shape))
    say(
        f"Trans-Net on {data.name}, from {a.layer} of {a.path} to {b.layer} of {b.path}, {shape}"
        f"{', pairs shuffled' if options.shuffle_pairs else ''}, into {run.path}"
    )
    features = Features(options, accelerator, data, [a, b], options.feature_dump)
    return train_transnet(options, accelerator, data, a, b, features, run, resume=resume)


def open_pair(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    path_a: Path,
    path_b: Path,
) -> tuple[Tapped, Tapped]:
    """Networks A and B with the layers of the options; raises `UsageError` for unequal shapes."""
    a = open_tapped("a", path_a, options.layer_a or options.layer, options, data, accelerator)
    b = open_tapped("b", path_b, options.layer_b or options.layer, options, data, accelerator)
    require_same_shape(a, b)
    return a, b


def find_or_train(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData
) -> list[Path]:
    """Finished run folders of the Trans-Nets that the options stand for, one for each pair.

    On digits what is absent is trained; what train/transnet.py or this function made with the same
    options before is taken again. A script with the flags of train/transnet.py says by its own
    options how they are trained; of another script data, pair, seed and machine count, and the rest
    is as train/transnet.py has it without flags.

    Raises `UsageError` on other sets, naming the command that trains one.
    """
    if options.dataset != "digits":
        raise UsageError(
            f"no Trans-Net for {options.dataset}: train one with train/transnet.py --dataset "
            f"{options.dataset} --checkpoint-a RUN_A --checkpoint-b RUN_B and give its run folder"
        )
    own = _options_of_transnet(options)
    pairs = pair_checkpoints(own, accelerator, data)
    usual = Path(own.output) / run_name(own, data)
    if len(pairs) == 1:
        return [_found_or_trained(own, accelerator, data, *pairs[0], usual)]
    return [
        _found_or_trained(own, accelerator, data, *pair, usual / f"pair-{number}")
        for number, pair in enumerate(pairs)
    ]


def _options_of_transnet(options: argparse.Namespace) -> argparse.Namespace:
    """The options with which `options`, of whatever script, stand for a Trans-Net."""
    parser = transnet_parser("train/transnet.py")
    if hasattr(options, "freeze_gates"):
        known = (*parser.fallbacks, "given", "layers_of_methods")
        own = argparse.Namespace(
            **{k: copy.copy(v) for k, v in vars(options).items() if k in known}
        )
    else:
        own = parse(parser, ["--dataset", options.dataset])
        scratch = Parser()
        data_flags(scratch)
        pair_flags(scratch)
        for name in (*scratch.fallbacks, *_SHARED):
            if hasattr(options, name):
                setattr(own, name, copy.copy(getattr(options, name)))
    own.experiment = own.resume = own.profile = own.seeds = None
    own.save_epochs = []
    return own


def _found_or_trained(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    path_a: Path,
    path_b: Path,
    usual: Path,
) -> Path:
    """The run at `usual` if the same options made it, else the one that they alone have."""
    a, b = open_pair(options, accelerator, data, path_a, path_b)
    wanted = describe_pair(options, accelerator, data, a, b)
    processes = accelerator.num_processes
    batch = batch_size(options, processes) * processes * options.grad_accum_steps
    key = _identity(wanted, batch)
    aside = Path(options.output) / "transnets" / f"{usual.name}-{key}"

    def finished() -> Path | None:
        return next((path for path in (usual, aside) if _recorded_identity(path) == key), None)

    if path := on_main(accelerator, finished):
        say(f"Trans-Net: taken from {path}")
        return path
    begun = on_main(accelerator, aside.exists)
    run = RunFolder(aside)
    train_pair(options, accelerator, data, path_a, path_b, run, resume=begun)
    return aside


def _identity(arguments: Mapping[str, Any], global_batch: int) -> str:
    """Eight hex digits over what the weights of a run with these `arguments` depend on."""
    relevant = {k: v for k, v in arguments.items() if k not in _INCIDENTAL}
    text = json.dumps(relevant | {"global-batch": global_batch}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _recorded_identity(path: Path) -> str | None:
    """That of a run that is finished; None where there is none."""
    run = RunFolder(path)
    try:
        results = json.loads(run.results.read_text())
        options = yaml.safe_load(run.arguments.read_text())["options"]
        if not (path / "best.safetensors").is_file():
            return None
        return _identity(options, results["global_batch"])
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return None


@dataclass(frozen=True, eq=False)
class TransNetRun:
    """A trained Trans-Net `net`, in evaluation mode, and the networks it lies between.

    `record` is what its weights file says of it; `path` what was opened.
    """

    net: TransNet
    a: Tapped
    b: Tapped
    record: dict[str, Any]
    path: Path


def open_transnet(
    path: str | Path,
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
) -> TransNetRun:
    """A run folder (its best weights), a weights file of kdfast, or one with the authors' names.

    A and B are loaded from where the record says they lie, or from --checkpoint-a and
    --checkpoint-b where the user gave them. Weights with the authors' names say nothing of A and B:
    both flags, and their layers, are needed then.

    Raises:
        UsageError: published weights without both networks, or whose channels are not theirs; data
            of another number of classes, or of another set than recorded when none was given.
        UserError: no Trans-Net there, a damaged record, A or B gone or with other weights than
            recorded.
    """
    path = Path(path)
    state, record = read_weights(weights_path(path))
    if record.get("kind") == "transnet":
        if "dataset" not in options.given and record.get("dataset", data.name) != data.name:
            raise UsageError(
                f"the Trans-Net in {path} was trained on {record['dataset']}, but the images are "
                f"of {data.name}; give --dataset {record['dataset']} with its flags, or --dataset "
                f"{data.name} if these are meant"
            )
        net = _rebuilt(weights_path(path), state, record)
        a, b = (
            _reopened(name, record[name], options, data, accelerator, path) for name in ("a", "b")
        )
    else:
        net, a, b = _published(path, state, options, data, accelerator)
        record = {
            "kind": "transnet",
            "layers": len(net.convs),
            "channels": net.channels,
            "kernel_size": net.kernel_size,
            "a": a.record(),
            "b": b.record(),
            "dataset": data.name,
            "shuffled": False,
        }
    require_same_shape(a, b)
    if a.shape[0] != net.channels:
        raise UsageError(
            f"the Trans-Net in {path} takes {net.channels} channels, layer '{a.layer}' of A has "
            f"{a.shape[0]}; choose the layers it was trained between with --layer-a and --layer-b"
        )
    net = net.to(accelerator.device).eval().requires_grad_(False)
    return TransNetRun(net, a, b, record, path)


def _rebuilt(path: Path, state: Mapping[str, Any], record: Mapping[str, Any]) -> TransNet:
    """The Trans-Net of kdfast's own weights."""
    try:
        sizes = (int(record[key]) for key in ("channels", "layers", "kernel_size"))
        net = TransNet(*sizes)
        for name in ("a", "b"):
            kinds = {"architecture": str, "layer": str, "checksum": str, "classes": int}
            if not all(isinstance(record[name][key], kind) for key, kind in kinds.items()):
                raise TypeError(name)
        net.load_state_dict(state)
    except (LookupError, TypeError, ValueError, RuntimeError):
        raise UserError(
            f"{path}: its record and its weights are no Trans-Net's; train it anew"
        ) from None
    return net


def _reopened(
    name: str,
    known: Mapping[str, Any],
    options: argparse.Namespace,
    data: ImageData,
    accelerator: Accelerator,
    transnet: Path,
) -> Tapped:
    """Network `name` as it was when the Trans-Net was trained; only its weights may have moved."""
    flag, whose = f"--checkpoint-{name}", f"network {name.upper()} of {transnet}"
    if known["classes"] != data.classes:
        raise UsageError(
            f"{whose} tells {known['classes']} classes apart, {data.name} has {data.classes}; "
            "choose the --dataset it was trained on"
        )
    path = _given(name, options) or Path(known.get("path") or "")
    if not path.exists() or path == Path():
        raise UserError(f"{whose} is no longer at {known.get('path')}; say where with {flag}")
    fed = _recorded_inputs(known, transnet)
    own = copy.copy(options)
    setattr(own, f"model_{name}", known["architecture"])
    own.model_kwargs = dict(known.get("model_kwargs") or {})
    # What a file that does not say it is fed: as the Trans-Net met it.
    own.mean, own.std = list(fed.mean), list(fed.std)
    own.img_size = fed.size[0] if fed.size[0] == fed.size[1] else None
    own.given = {*options.given, "mean", "std"}
    found = open_tapped(name, path, known["layer"], own, data, accelerator)
    if found.checksum != known["checksum"]:
        raise UserError(
            f"{whose} had weights {known['checksum'][:8]}, {path} holds {found.checksum[:8]}; give "
            f"those it was trained with as {flag}, or train a Trans-Net anew"
        )
    return found if found.inputs == fed else replace(found, inputs=fed)


def _given(name: str, options: argparse.Namespace) -> Path | None:
    """The weights that the user, not a record, names for network `name`."""
    if f"checkpoint_{name}" not in options.given:
        return None
    return weights_path(options.checkpoint_a) if name == "a" else _single_b(options)


def _single_b(options: argparse.Namespace) -> Path:
    files = [file for path in options.checkpoint_b for file in weights_of(path)]
    if len(files) != 1:
        raise UsageError(f"a Trans-Net has one network B, but --checkpoint-b gives {len(files)}")
    return files[0]


def _recorded_inputs(known: Mapping[str, Any], transnet: Path) -> Inputs:
    fed = recorded_inputs(transnet, dict(known))
    if fed is None:
        raise UserError(f"{transnet}: its record does not say what its networks are fed")
    return fed


def _published(
    path: Path,
    state: Mapping[str, Any],
    options: argparse.Namespace,
    data: ImageData,
    accelerator: Accelerator,
) -> tuple[TransNet, Tapped, Tapped]:
    """A Trans-Net with the authors' names, between the networks that flags name."""
    try:
        TransNet.published(state)
    except UserError as error:
        raise UserError(f"{path}: {error}; give a run of train/transnet.py") from None
    if not (options.checkpoint_a and options.checkpoint_b):
        raise UsageError(
            f"{path} does not say between which networks it lies: give --checkpoint-a and "
            "--checkpoint-b, and the layer in both with --layer (or --layer-a and --layer-b)"
        )
    path_a, path_b = weights_path(options.checkpoint_a), _single_b(options)
    a, b = open_pair(options, accelerator, data, path_a, path_b)
    return TransNet.published(state, vectors=prod(a.shape[1:]) == 1), a, b
