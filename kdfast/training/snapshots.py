"""The snapshots of one training run: the same network at several epochs."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from kdfast.data import ImageData
from kdfast.errors import UsageError, UserError
from kdfast.models import (
    Taps,
    architecture,
    checksum,
    default_tap,
    find_layer,
    fold_batch_norms,
    load_weights,
    read_weights,
    split_at,
)
from kdfast.training.parser import Parser
from kdfast.training.setup import Inputs, recorded_inputs
from kdfast.training.trained import load_trained

# Cheng et al.: those of 150 epochs, and those that 400 epochs add.
PUBLISHED = (0, 2, 5, 10, 15, 20, 25, 30, 40, 50, 70, 90, 110, 130, 150)
LONGER = (170, 190, 240, 280, 320, 360, 400)
ACCEPT_FROM = 40


@dataclass(frozen=True)
class Snapshots:
    """Weights files by epoch, ascending, of one network that is called `name`.

    `run` is the run folder they come from with its `options`; None and {} for a bare folder.
    """

    name: str
    files: dict[int, Path]
    run: Path | None
    options: dict[str, Any]

    @property
    def epochs(self) -> list[int]:
        return list(self.files)

    @property
    def file(self) -> Path:
        """The last one."""
        return self.files[max(self.files)]

    @property
    def record(self) -> dict[str, Any]:
        """What the last one records of the network, its training data and its input."""
        return read_weights(self.file)[1]


def find_snapshots(path: str | Path, wanted: Sequence[int] | None, *, bare: bool) -> Snapshots:
    """The snapshots in run folder `path`, or in the folder itself where `bare`.

    Args:
        wanted: epochs; None takes the published ones up to the last snapshot, and that, where
            training took more than 40 epochs and all of them exist, else every snapshot.

    Raises:
        UserError: no snapshots, one that is missing, damaged, renamed, or of another architecture
            or other classes than the rest.
    """
    path = Path(path)
    folder = path if bare else path / "weights"
    found = {
        int(match[1]): file
        for file in (folder.glob("epoch-*.safetensors") if folder.is_dir() else ())
        if (match := re.fullmatch(r"epoch-(\d+)\.safetensors", file.name))
    }
    options = {} if bare else _options(path)
    if not found:
        raise UserError(
            f"no snapshots in {folder}: train with --save-epochs 0 2 5 ... to keep "
            "weights/epoch-NNNN.safetensors"
        )
    promised = options.get("save-epochs") or []
    _require(folder, found, promised if wanted is None else wanted)
    chosen = sorted(set(_published(found) if wanted is None else wanted))
    snapshots = Snapshots(
        _named(path), {e: found[e] for e in chosen}, None if bare else path, options
    )
    _check_alike(snapshots)
    return snapshots


def _named(path: Path) -> str:
    """What to call the run: of a baseline also whose."""
    path = path.absolute()
    return f"{path.parent.name}-baseline" if path.name == "baseline" else path.name


def _options(run: Path) -> dict[str, Any]:
    path = run / "args.yaml"
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))["options"]
        if not isinstance(options, dict):
            raise TypeError
    except FileNotFoundError:
        raise UserError(
            f"no run at {run}: it holds no args.yaml; give a run folder of train/classifier.py or "
            "train/distill.py, or a folder of weights as --weights-dir"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, LookupError):
        raise UserError(f"{path} is damaged; put it back as it was") from None
    return options


def _require(folder: Path, found: dict[int, Path], wanted: Sequence[int]) -> None:
    missing = [str(epoch) for epoch in sorted(set(wanted)) if epoch not in found]
    if missing:
        there = " ".join(map(str, sorted(found)))
        raise UserError(
            f"{folder} lacks the snapshots of epochs {' '.join(missing)}; there are {there}: name "
            "those to examine with --checkpoints"
        )


def _published(found: dict[int, Path]) -> list[int]:
    last = max(found)
    expected = [*(epoch for epoch in (*PUBLISHED, *LONGER) if epoch < last), last]
    long = last > ACCEPT_FROM and set(expected) <= found.keys()
    return expected if long else sorted(found)


def _check_alike(snapshots: Snapshots) -> None:
    known: dict[str, Any] = {}
    for epoch, file in snapshots.files.items():
        record = read_weights(file)[1]
        if not isinstance(record.get("architecture"), str):
            raise UserError(
                f"{file} does not say of which network it is; it is no snapshot of ours"
            )
        if record.get("epoch", epoch) != epoch:
            raise UserError(
                f"{file} was renamed: its record says epoch {record['epoch']}; give its name back"
            )
        keys = ("architecture", "model_kwargs", "classes", "dataset", "input_size", "mean", "std")
        own = {key: record.get(key) for key in keys}
        for key in keys:
            if known and own[key] != known[key]:
                first = next(iter(snapshots.files.values()))
                raise UserError(
                    f"{file} is of another network than {first.name}: its {key} is {own[key]}, not "
                    f"{known[key]}; keep the snapshots of one run in a folder"
                )
        known = own


# The flags of data that say which images there are, and which pixels they have as they are read;
# the others tell how networks were trained on them.
_IMAGES = (
    "dataset", "train-split", "val-split", "test-split", "train-half", "train-limit", "eval-limit",
    "num-classes", "box-margin",
)  # fmt: skip


def adopt_data(options: argparse.Namespace, parser: Parser, found: Sequence[Snapshots]) -> None:
    """Take over from the runs which images they were trained on, where no flag says otherwise.

    That includes the margin of boxes, without which a set has its own. A bare folder of weights
    says which data set it is of. Raises `UsageError` where runs differ in any of it, and for flags
    of what networks are fed where the snapshots record it.
    """
    _refuse_idle(options, found)
    actions = parser.actions()
    for key in (*_IMAGES, "data-dir"):
        dest = actions[key].dest
        said = {str(s.run): s.options.get(key) for s in found if s.run is not None}
        if key == "dataset":
            said |= {str(s.file.parent): s.record.get(key) for s in found if s.run is None}
        if dest in options.given or not said:
            continue
        values = list(said.values())
        if key != "data-dir" and any(value != values[0] for value in values):
            differing = ", ".join(
                f"{name} has {'none' if value is None else value}" for name, value in said.items()
            )
            raise UsageError(f"the runs were trained on other images: --{key}: {differing}")
        if values[0] is not None:
            where = found[0].file if found[0].run is None else f"{found[0].run}/args.yaml"
            setattr(options, dest, parser.converted(key, values[0], where, key))


def leave_to_runs(options: argparse.Namespace, parser: Parser) -> None:
    """Take out of `options` what `adopt_data` would fill in, so that printed ones do not pin it."""
    if options.runs or options.weights_dir:
        actions = parser.actions()
        for dest in {actions[key].dest for key in (*_IMAGES, "data-dir")} - options.given:
            delattr(options, dest)


def _refuse_idle(options: argparse.Namespace, found: Sequence[Snapshots]) -> None:
    typed = [key for key in ("img_size", "mean", "std") if key in options.given]
    # Networks that are yet to be trained record it, too.
    if typed and all(recorded_inputs(s.file, s.record) is not None for s in found):
        raise UsageError(
            f"--{typed[0].replace('_', '-')} has no effect: the snapshots record what their "
            "network was trained on, and it is fed that; leave it out"
        )


def distilled_layers(snapshots: Snapshots) -> list[str] | None:
    """The layers that the run was distilled at by method layer, [] where none was named.

    None where it was not distilled, or by other methods.
    """
    options = snapshots.options
    methods = options.get("methods")
    if not isinstance(methods, dict) or "layer" not in methods:
        return None
    # Those of the teacher hold for both where they are given alone.
    return [
        str(layer) for layer in options.get("student-layers") or options.get("teacher-layers") or ()
    ]


def choose_layer(options: argparse.Namespace, data: ImageData, found: Sequence[Snapshots]) -> str:
    """--layer, else the one that the runs were distilled at, else the first network's default.

    Raises `UsageError` where they were distilled at several.
    """
    if options.layer:
        return options.layer

    def default(snapshots: Snapshots) -> str:
        network, inputs = open_network(snapshots, options, data)
        return default_tap(network, inputs.size)

    named = [(s, distilled_layers(s)) for s in found]
    named = [(s, layers or [default(s)]) for s, layers in named if layers is not None]
    if len({layer for _, layers in named for layer in layers}) > 1:
        places = ", ".join(f"{s.run} at {' and '.join(layers)}" for s, layers in named)
        raise UsageError(
            f"the runs were distilled at different layers: {places}; name the one to examine with "
            "--layer"
        )
    return named[0][1][0] if named else default(found[0])


def accept_from(epochs: Sequence[int], asked: int | None) -> int:
    """The first checkpoint at which images are accepted: 40, or 2/3 of a shorter training."""
    if asked is not None:
        if asked > max(epochs):
            raise UsageError(
                f"--accept-from {asked} is after the last checkpoint, {max(epochs)}: every image "
                "would be accepted"
            )
        return asked
    return min(ACCEPT_FROM, math.ceil(2 * max(epochs) / 3))


class Watched:
    """One network whose weights are exchanged for those of a snapshot, watched at `layer`.

    `feature` is phi: [N,C,H,W] float32, normalised -> ReLU of the layer's feature; it runs nothing
    behind the layer where the network can be cut there, and has batch normalisation folded into
    the layers before it. Frozen and in evaluation mode; `network` is as the snapshot was saved.

    Memory is laid out as `options.channels_last` says; None is NHWC on a CPU, whose convolutions
    are faster so, and NCHW elsewhere.

    Raises `UsageError` for an unknown layer, with the closest names.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        layer: str,
        options: argparse.Namespace,
        data: ImageData,
        device: torch.device,
    ):
        self.snapshots, self.layer = snapshots, layer
        self.network, self.inputs = open_network(snapshots, options, data)
        find_layer(self.network, layer)
        self.network.requires_grad_(False).eval()
        last = options.channels_last
        if last is None:
            last = device.type == "cpu"
        layout = torch.channels_last if last else torch.preserve_format
        self.network.to(device, memory_format=layout)
        self._example = torch.zeros(1, 3, *self.inputs.size, device=device)
        self.shape, self._reach = reach(self.network, layer, self._example)

    @property
    def architecture(self) -> str:
        return architecture(self.network)

    def feature(self, images: Tensor) -> Tensor:
        return F.relu(self._reach(images))

    def load(self, epoch: int) -> None:
        load_weights(self.network, self.snapshots.files[epoch])
        _, self._reach = reach(self.network, self.layer, self._example)

    def checksums(self) -> list[str]:
        """The first 16 hex digits of each snapshot's checksum."""
        files = self.snapshots.files.values()
        return [checksum(read_weights(file)[0])[:16] for file in files]


def open_network(
    snapshots: Snapshots, options: argparse.Namespace, data: ImageData
) -> tuple[nn.Module, Inputs]:
    """The network with the last snapshot's weights, on the CPU, and what it is fed."""
    name = snapshots.record["architecture"]
    network, inputs, _ = load_trained(name, snapshots.file, None, options, data)
    return network, inputs


@torch.no_grad()
def reach(
    network: nn.Module, layer: str, example: Tensor
) -> tuple[tuple[int, ...], Callable[[Tensor], Tensor]]:
    """(shape of an image's feature, [N,C,H,W] -> feature at `layer`), with the least work.

    Batch normalisation is folded with the numbers it has now, in a copy; nothing behind the layer
    runs where `network`, frozen and in evaluation mode, can be cut there. example: [1,C,H,W].
    """
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        network = fold_batch_norms(network, example, keep=[layer])
    taps = Taps(network, [layer])
    shape = taps.calibrate(example)[0][1:]
    try:
        head, _ = split_at(network, layer)
        # Tokens, and the maps of channels-last models, are put into order by Taps alone.
        if head(example).shape[1:] == shape:
            taps.close()
            return tuple(shape), head
    except UsageError:
        pass
    return tuple(shape), lambda images: taps(images)[1][0]
