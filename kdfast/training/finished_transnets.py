"""What scripts that look at finished Trans-Nets share: their flags, and opening the runs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from kdfast.data import ImageData, Source
from kdfast.data.sources import UNREADABLE, unreadable
from kdfast.models import architecture, checksum, parameter_count
from kdfast.seeding import derive_seed
from kdfast.training.consistency_flags import transnet_flags
from kdfast.training.features import derangement
from kdfast.training.flags import data_flags, training_flags
from kdfast.training.inherited import (
    dests,
    flags_of_run,
    recorded_options,
    refuse_idle,
    with_flags,
)
from kdfast.training.parser import Parser
from kdfast.training.run_folder import on_main
from kdfast.training.setup import evaluation_transform, load_data, print_config
from kdfast.training.tapped import Tapped
from kdfast.training.transnet_runs import (
    TransNetRun,
    find_or_train,
    open_transnet,
    transnet_parser,
)

SPLITS = ("test", "val", "train")
# Flags of training that a pass over the images has, too: its batches, and the machine.
_OF_PASSES = {
    "batch_size", "global_batch_size", "grad_accum_steps", "eval_drop_last", "mixed_precision",
    "threads", "amp", "deterministic", "channels_last", "torchcompile", "compile_mode", "ops",
}  # fmt: skip
_OF_RUNS = {"experiment", "resume", "seeds", "save_epochs", "eval_only"}


@dataclass(frozen=True)
class Finished:
    """A Trans-Net with its networks, the data and the options it was trained with.

    `features` in its options is how they are to be computed now.
    """

    options: argparse.Namespace
    data: ImageData
    run: TransNetRun

    @property
    def folder(self) -> Path:
        """The run folder, or the folder that the weights file lies in."""
        return self.run.path if self.run.path.is_dir() else self.run.path.parent

    def serving(self, split: str) -> str:
        """The split itself, or `val` for `test` where the set has no third one."""
        return "val" if split == "test" and self.data.test is None else split

    def source(self, split: str) -> Source:
        """The images of a split."""
        data = self.data
        return {"test": data.test, "val": data.eval, "train": data.train}[self.serving(split)]

    def split_words(self, split: str) -> str:
        """How many images of which split these are, and whether it serves for a third one."""
        served = self.serving(split)
        why = "" if served == split else ", for the set has no third one"
        return f"{len(self.source(split)):,} images of {self.data.name}, {served} split{why}"

    def read(self, split: str, index: int, net: Tapped) -> tuple[torch.Tensor, int]:
        """uint8 [3, H, W] as `net` is fed it, and the class of image `index` of a split.

        Raises `UserError` where it cannot be read.
        """
        source = self.source(split)
        try:
            image, label = source.read(index)
            pixels = evaluation_transform(self.options, self.data, net.inputs.size)(image)
        except UNREADABLE as error:
            raise unreadable(source, index, error) from None
        return pixels, label

    def partner(self, split: str, index: int) -> int:
        """The image whose feature in B the Trans-Net is to give for image `index` in A."""
        if not self.options.shuffle_pairs:
            return index
        count, served = len(self.source(split)), self.serving(split)
        order = derangement(count, derive_seed(self.options.seed, "pairs", served))
        return int(order[index])

    def facts(self, split: str) -> dict[str, str]:
        """What is looked at, by name: images, networks, layers, the Trans-Net, the features."""
        net, options = self.run.net, self.options
        cached = f"from caches of {options.feature_dtype}"
        how = "computed in float32" if options.features == "live" else cached
        if options.shuffle_pairs:
            how += "; those of B are of other images, the control"
        layers = "1 layer" if len(net.convs) == 1 else f"{len(net.convs)} layers"
        digest = checksum(net.state_dict())[:8]
        return {
            "images": self.split_words(split),
            "network A": network_words(self.run.a),
            "network B": network_words(self.run.b),
            "Trans-Net": f"{layers}, {parameter_count(net):,} parameters, weights {digest}",
            "features": how,
        }

    def generation(self) -> int | None:
        """Which generation of a chain network B is; None where it is of none."""
        folder = self.run.b.path and self.run.b.path.absolute().parent.name
        if found := re.fullmatch(r"generation-(\d+)", folder or ""):
            return int(found[1])
        # The first one of --pair generations is an ordinary classifier, trained before the chain.
        return 0 if self.options.pair == "generations" else None


def network_words(net: Tapped) -> str:
    """Architecture, layer, shape of its feature, and the beginning of the weights' checksum."""
    shape = "x".join(map(str, net.shape))
    name = architecture(net.network)
    return f"{name}, layer {net.layer}, {shape}, weights {net.checksum[:8]}"


def analysis_parser(prog: str, description: str | None, *, runs: str, output: str) -> Parser:
    """A parser of all flags of train/transnet.py, for what is to be trained when no run is given.

    `runs` is the `nargs` of the positional RUN, `output` the help of --output, which here is the
    folder of the results.
    """
    parser = transnet_parser(prog, description)
    parser.add_argument(
        "runs",
        nargs=runs,
        metavar="RUN",
        help="run folder of train/transnet.py, or weights of a Trans-Net with flags for the rest; "
        "without one, on digits, what the flags say is trained into output/ unless it is there",
    )
    for action in parser._actions:
        if action.dest == "output":
            action.help = output
        elif action.dest == "features":
            action.help = (
                "live: run both networks, exact in float32; cache: read or make caches of 16 bits; "
                "shuffled pairs need them (default: live)"
            )
        elif action.dest == "dataset":
            action.help += "; with a RUN, its data flags hold unless given here"
    parser.flag(
        parser.add_argument_group("what is looked at"),
        "--split",
        choices=SPLITS,
        default="test",
        help="images; val serves as test where a set has no third split",
    )
    return parser


def print_options(options: argparse.Namespace) -> None:
    """All options but the runs as YAML, for --config."""
    named = {key: value for key, value in vars(options).items() if key != "runs"}
    print_config(argparse.Namespace(**named))


def open_finished(
    parser: Parser, options: argparse.Namespace, accelerator: Accelerator, runs: Sequence[str]
) -> Iterator[Finished]:
    """The Trans-Nets at `runs`, one after the other; without any, those the options stand for.

    On digits these are trained when absent. Raises `UserError` for a path that holds none.
    """
    loaded: dict[str, ImageData] = {}

    def data_of(own: argparse.Namespace) -> ImageData:
        key = repr([getattr(own, dest) for dest in dests(data_flags)])
        if key not in loaded:
            loaded.clear()  # one set in memory at a time
            loaded[key] = load_data(own, accelerator)
        return loaded[key]

    paths = [path for run in runs for path in _pairs_of(Path(run))]
    if not paths:
        training = _options_of_training(options)
        # Other sets are refused, and need not be there for that.
        data = data_of(training) if training.dataset == "digits" else None
        paths = find_or_train(training, accelerator, data)
    for path in paths:
        own = on_main(accelerator, lambda path=path: options_of_run(parser, options, path))
        data = data_of(own)
        run = open_transnet(path, own, accelerator, data)
        if "shuffle_pairs" not in options.given:
            own.shuffle_pairs = bool(run.record.get("shuffled"))
        if "features" not in options.given:
            own.features = "cache" if own.shuffle_pairs else "live"
        yield Finished(own, data, run)


def _options_of_training(options: argparse.Namespace) -> argparse.Namespace:
    """Those of train/transnet.py alone, so that its runs are found and the other way round."""
    flags = transnet_parser("train/transnet.py").fallbacks
    own = {k: v for k, v in vars(options).items() if k in flags or k == "layers_of_methods"}
    return argparse.Namespace(
        **own | {"output": flags["output"], "given": options.given & flags.keys()}
    )


def _pairs_of(path: Path) -> list[Path]:
    """The Trans-Nets of a run of several pairs, in their order; else `path` itself."""
    names = ((re.fullmatch(r"pair-(\d+)", part.name), part) for part in path.glob("pair-*"))
    parts = {int(match[1]): part for match, part in names if match}
    return [parts[number] for number in sorted(parts)] or [path]


def options_of_run(parser: Parser, options: argparse.Namespace, path: Path) -> argparse.Namespace:
    """`options` with data and pair of the run at `path`, but for flags that were given.

    Raises `UserError` where there is neither a run nor a file, or the record is damaged.
    """
    own = with_flags(options, flags_of_run(parser, path, {"seed"}))
    # Of the run, whose caches lie there: --output is of the results.
    own.output = str((recorded_options(path) or {}).get("output", parser.fallbacks["output"]))
    return own


def refuse_flags_of_training(options: argparse.Namespace, runs: Sequence[str]) -> None:
    """Refuse flags on the command line that say how to train what the runs have trained."""
    paths = [path for run in runs for path in _pairs_of(Path(run))]
    refuse_idle(options, paths, dests(transnet_flags, training_flags) - _OF_PASSES | _OF_RUNS)
