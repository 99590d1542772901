"""What scripts that look at finished Trans-Nets share: their flags, and opening the runs."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from kdfast.data import ImageData, dataset_name
from kdfast.errors import UserError
from kdfast.training.consistency_flags import pair_flags, transnet_flags
from kdfast.training.flags import data_flags, run_flags, training_flags
from kdfast.training.layout import LAYOUT
from kdfast.training.parser import Parser
from kdfast.training.run_folder import on_main
from kdfast.training.setup import load_data
from kdfast.training.transnet_runs import TransNetRun, find_or_train, open_transnet

SPLITS = ("test", "val", "train")


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

    def split_words(self, split: str) -> str:
        """How many images of which split these are, and which serves for a third one."""
        if split == "test" and self.data.test is None:
            count, words = len(self.data.eval), "val split, for the set has no third one"
        else:
            source = {"test": self.data.test, "val": self.data.eval, "train": self.data.train}
            count, words = len(source[split]), f"{split} split"
        return f"{count:,} of {self.data.name}, {words}"


def transnet_parser(prog: str, description: str | None, *, runs: str, output: str) -> Parser:
    """A parser of all flags of train/transnet.py, for what is to be trained when no run is given.

    `runs` is the `nargs` of the positional RUN, `output` the help of --output, which here is the
    folder of the results.
    """
    parser = Parser(prog=prog, description=description)
    parser.add_argument(
        "runs",
        nargs=runs,
        metavar="RUN",
        help="run folder of train/transnet.py, or weights of a Trans-Net with flags for the rest; "
        "without one, on digits, what the flags say is trained into output/ unless it is there",
    )
    data_flags(parser)
    pair_flags(parser)
    transnet_flags(parser)
    training_flags(parser)
    run_flags(parser, recipe="consistency")
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


def open_finished(
    parser: Parser, options: argparse.Namespace, accelerator: Accelerator, runs: Sequence[str]
) -> Iterator[Finished]:
    """The Trans-Nets at `runs`, one after the other; without any, those the options stand for.

    On digits these are trained when absent. Raises `UserError` for a path that holds none.
    """
    loaded: dict[str, ImageData] = {}

    def data_of(own: argparse.Namespace) -> ImageData:
        key = repr([getattr(own, dest) for dest in _dests(data_flags)])
        if key not in loaded:
            loaded.clear()  # one set in memory at a time
            loaded[key] = load_data(own, accelerator)
        return loaded[key]

    paths = [Path(run) for run in runs]
    if not paths:
        training = copy.copy(options)
        training.output = parser.fallbacks["output"]
        paths = find_or_train(training, accelerator, data_of(training))
    for path in paths:
        own = on_main(accelerator, lambda path=path: options_of_run(parser, options, path))
        data = data_of(own)
        yield Finished(own, data, open_transnet(path, own, accelerator, data))


def options_of_run(
    parser: Parser, options: argparse.Namespace, path: Path
) -> argparse.Namespace:
    """`options` with data and pair of the run at `path`, but for flags that were given.

    Those of a weights file beside an args.yaml are its run's. Raises `UserError` where there is
    neither a run nor a file, or the record is damaged.
    """
    folder = path if path.is_dir() else path.parent
    record_file = folder / "args.yaml"
    if path.is_dir() and not record_file.is_file():
        raise UserError(
            f"no Trans-Net at {path}: it holds no args.yaml; give a run folder of "
            "train/transnet.py, or a weights file"
        )
    if not path.exists():
        raise UserError(
            f"no Trans-Net at {path}; give a run folder of train/transnet.py, or a weights file"
        )
    own = copy.copy(options)
    own.output = parser.fallbacks["output"]
    if record_file.is_file() and (path.is_dir() or path.suffix == ".safetensors"):
        recorded, where = _recorded(record_file), str(record_file)
        theirs = {*_dests(data_flags, pair_flags), "seed"} - options.given
        # Of the run, whose caches lie there: --output is of the results.
        own.output = str(recorded.get("output", own.output))
        for dest in theirs:
            setattr(own, dest, parser.fallbacks[dest])
        for key, value in recorded.items():
            action = parser.actions().get(key)
            if action and action.dest in theirs:
                setattr(own, action.dest, parser.converted(key, value, where, key))
        own.model_kwargs = dict(own.model_kwargs or ())
        own.dataset = dataset_name(own.dataset)
    if "features" not in options.given:
        own.features = "cache" if own.shuffle_pairs else "live"
    return own


def _dests(*groups: Any) -> set[str]:
    """What the flags of these groups are called in a namespace."""
    scratch = Parser()
    for add in groups:
        add(scratch)
    return set(scratch.fallbacks)


def _recorded(path: Path) -> dict[str, Any]:
    """The options in an args.yaml."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        options, layout = dict(content["options"]), int(content.get("layout", 1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError, LookupError):
        raise UserError(f"{path} is damaged; put it back as it was") from None
    if layout > LAYOUT:
        raise UserError(
            f"{path} was written by a newer kdfast (folder layout {layout}, this one knows "
            f"{LAYOUT}); update kdfast"
        )
    return options
