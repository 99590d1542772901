"""The networks A and B of a comparison: as given, or trained on digits as `--pair` says."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.models import checksum, read_weights
from kdfast.training.flags import data_flags, model_flags, run_flags, training_flags
from kdfast.training.generations import check_chain_flags, choose_loss, last_weights, train_chain
from kdfast.training.journal import say
from kdfast.training.options import parse
from kdfast.training.parser import Parser, recipe_names
from kdfast.training.pruning import SENSITIVITIES, train_pruned
from kdfast.training.run_folder import on_main
from kdfast.training.setup import load_data, weights_path
from kdfast.training.shared_networks import classifier_options, shared_classifier, shared_run
from kdfast.training.transfer_flags import generation_flags

MODEL, SMALL_MODEL = "cifar_resnet20", "cifar_resnet8"
EPOCHS, GENERATIONS = 8, 3
# Of what is left of a pruned network.
PRUNED_EPOCHS, PRUNED_LR = 4, 0.01
_FOLDER = "networks"
# What the images are, whichever way they were named, and what the machine does; other flags of data
# hold for the networks where the user gave them, those of optimisation are the Trans-Net's.
_SHARED = {
    "dataset", "data_dir", "train_split", "val_split", "test_split", "train_limit", "eval_limit",
    "num_classes", "train_half", "workers", "cache_images", "on_device", "mixed_precision",
    "threads", "deterministic", "ops", "output", "checkpoint_hist", "log_interval",
}  # fmt: skip


def pair_checkpoints(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData
) -> list[tuple[Path, Path]]:
    """Weights files (A, B), a pair for each B.

    `options.checkpoint_a` and the list `options.checkpoint_b` win: a file, a run folder (its best
    weights) or, of B, a chain of generations (the last weights of each). What is missing is trained
    on digits, by the settings of train/classifier.py there, and taken again by all who ask with the
    same options. `options.pair` says what A and B then are, s being `options.seed`:

    - seeds: A of seed s, B of s + 1;
    - halves: both of seed s, on the first and the second half of every class;
    - weak: A a shallow network (cifar_resnet8) of seed s, B a deeper one (cifar_resnet20) of s + 1;
    - pruned: B of seed s + 1, A is B without its small weights, trained further (Han et al., "Deep
      Compression", ICLR 2016);
    - generations: A of seed s, B every generation of a born-again chain that begins with s + 1, all
      cifar_resnet8 as in train/born_again.py;
    - same: A and B are one network, of seed s.

    Raises:
        UsageError: a network is missing on another set than digits, and the commands that train it
            are named; a pruned A without the B that it came from.
        UserError: a folder that is given holds no weights.
    """
    a = options.checkpoint_a and weights_path(options.checkpoint_a)
    b = [file for path in options.checkpoint_b or () for file in weights_of(path)]
    if a and not b and options.pair == "pruned":
        raise UsageError(
            "--checkpoint-a is pruned, but of which network? give that one as --checkpoint-b"
        )
    missing = _missing(options, a, b)
    if missing and options.dataset != "digits":
        raise UsageError(_instructions(options, a, b, missing))
    maker = _Maker(options, accelerator, data, a or next(iter(b), None))
    return getattr(maker, options.pair)(a, b)


def weights_of(path: str | Path) -> list[Path]:
    """One weights file, or the last weights of each generation of a chain, in their order."""
    chain = Path(path).glob("generation-*")
    links = {int(n): p for p in chain if (n := p.name.partition("-")[2]).isdigit()}
    return [last_weights(links[n]) for n in sorted(links)] or [weights_path(path)]


class _Maker:
    """Trains the networks of one comparison, or takes them from whoever did before.

    What is not said about a network's architecture is that of the `known` one.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        accelerator: Accelerator,
        data: ImageData,
        known: Path | None,
    ):
        self.options, self.accelerator, self.data, self.known = options, accelerator, data, known

    def seeds(self, a: Path | None, b: list[Path]) -> list[tuple[Path, Path]]:
        seed = self.options.seed
        a = a or self._best("a", seed)
        return [(a, one) for one in b or [self._best("b", seed + 1)]]

    weak = seeds

    def halves(self, a: Path | None, b: list[Path]) -> list[tuple[Path, Path]]:
        seed = self.options.seed
        a = a or self._best("a", seed, half="a")
        return [(a, one) for one in b or [self._best("b", seed, half="b")]]

    def same(self, a: Path | None, b: list[Path]) -> list[tuple[Path, Path]]:
        if not a and not b:
            a = self._best("a", self.options.seed)
        return [(a or one, one) for one in b or [a]]

    def pruned(self, a: Path | None, b: list[Path]) -> list[tuple[Path, Path]]:
        b = b or [self._best("b", self.options.seed + 1)]
        return [(a or self._compressed(one), one) for one in b]

    def generations(self, a: Path | None, b: list[Path]) -> list[tuple[Path, Path]]:
        seed = self.options.seed
        a = a or self._best("a", seed)
        return [(a, one) for one in b or self._chain(self._network("b", seed + 1), seed + 1)]

    def _best(self, side: str, seed: int, half: str | None = None) -> Path:
        return weights_path(self._network(side, seed, half))

    def _network(self, side: str, seed: int, half: str | None = None) -> Path:
        """The run folder of a classifier."""
        name, kwargs = _architecture(self.options, side, self.known)
        own = self._taken_over(parse(_classifier_parser(), _DIGITS))
        own = classifier_options(own, name, kwargs, EPOCHS)
        own.seed, data = seed, self.data
        if half:
            own.train_half = half
            data = load_data(own, self.accelerator)
        self._fit_batch(own, len(data.train))
        run = shared_run(own, self.accelerator, _FOLDER, _named(own, half and f"half-{half}"))
        said = f"network {side.upper()}"
        return shared_classifier(own, self.accelerator, data, run, said).path

    def _compressed(self, original: Path) -> Path:
        """The best weights of the network at `original` after it was pruned and trained further."""
        name, kwargs = _architecture(self.options, "a", original)
        own = self._taken_over(parse(_classifier_parser(), _DIGITS))
        own = classifier_options(own, name, kwargs, PRUNED_EPOCHS)
        own.prune, own.lr, own.seed = list(SENSITIVITIES), PRUNED_LR, self.options.seed
        self._fit_batch(own, len(self.data.train))
        parent = on_main(self.accelerator, lambda: checksum(read_weights(original)[0]))
        amounts = " ".join(map(str, SENSITIVITIES))
        run = shared_run(own, self.accelerator, _FOLDER, _named(own, "pruned"), parent, amounts)
        # Not in the key: where the file lies says nothing about its weights.
        own.initial_checkpoint = str(original)
        shared_classifier(
            own, self.accelerator, self.data, run, "network A, pruned", train=train_pruned
        )
        return weights_path(run.path)

    def _chain(self, first: Path, seed: int) -> list[Path]:
        """The last weights of run folder `first` and of the generations that came of it."""
        parser = Parser()
        for add in (data_flags, generation_flags, training_flags, run_flags):
            add(parser)
        model_flags(parser, student=True)
        own = self._taken_over(parse(parser, _DIGITS))
        own.model, own.model_kwargs = _architecture(self.options, "b", self.known)
        own.epochs, own.seed, own.generations = EPOCHS, seed, GENERATIONS
        own.start_generation, own.teacher_checkpoint = 1, str(first)
        self._fit_batch(own, len(self.data.train))
        check_chain_flags(own)
        choice = choose_loss(own)
        parent = on_main(self.accelerator, lambda: checksum(read_weights(last_weights(first))[0]))
        loss = json.dumps([GENERATIONS, choice.as_yaml()], sort_keys=True)
        run = shared_run(own, self.accelerator, _FOLDER, _named(own, "born_again"), parent, loss)
        if on_main(self.accelerator, run.results.exists):
            say(f"generations of B: taken from {run.path}")
        else:
            own.resume = "auto" if on_main(self.accelerator, run.path.exists) else None
            train_chain(own, choice, self.accelerator, self.data, run.path)
        return [last_weights(first), *weights_of(run.path)]

    def _fit_batch(self, own: argparse.Namespace, images: int) -> None:
        """Lower the recipe's batch to what few images, or an odd number of processes, allow.

        The batch that the user may have given is the Trans-Net's.
        """
        processes = self.accelerator.num_processes
        most = min(own.global_batch_size, images)
        own.global_batch_size = max(most // processes, 1) * processes

    def _taken_over(self, own: argparse.Namespace) -> argparse.Namespace:
        """`own`, the options of a network, with what it shares with the Trans-Net's."""
        scratch = Parser()
        data_flags(scratch)
        shared = _SHARED | (scratch.fallbacks.keys() & self.options.given)
        taken = {key: value for key, value in vars(self.options).items() if key in shared}
        own = argparse.Namespace(**(vars(own) | taken))
        own.given = self.options.given & scratch.fallbacks.keys()
        return own


# Of what train/classifier.py and train/born_again.py do without flags.
_DIGITS = ("--dataset", "digits")


def _classifier_parser() -> Parser:
    parser = Parser()
    for add in (data_flags, training_flags, run_flags):
        add(parser)
    model_flags(parser, student=False)
    return parser


def _named(own: argparse.Namespace, what: str | None = None) -> str:
    parts = ["digits", own.model, f"s{own.seed}", *([what] if what else [])]
    return "-".join(parts).replace("/", "_").replace(":", ".")


def _architecture(
    options: argparse.Namespace, side: str, known: Path | None
) -> tuple[str, dict[str, Any]]:
    """Name and constructor arguments of a network to train; by default those of the `known` one."""
    named = getattr(options, f"model_{side}") or options.model
    if named is None and known is not None and options.pair != "weak":
        recorded = read_weights(known)[1]
        if isinstance(recorded.get("architecture"), str):
            kwargs = recorded.get("model_kwargs")
            return recorded["architecture"], kwargs if isinstance(kwargs, dict) else {}
    small = options.pair == "generations" or (options.pair == "weak" and side == "a")
    return named or (SMALL_MODEL if small else MODEL), dict(options.model_kwargs)


def _missing(options: argparse.Namespace, a: Path | None, b: list[Path]) -> list[str]:
    """The sides that are to be trained, in order; one network serves for both of `same`."""
    if options.pair == "same":
        return [] if a or b else ["a"]
    order = [("b", b), ("a", a)] if options.pair == "pruned" else [("a", a), ("b", b)]
    return [side for side, given in order if not given]


def _instructions(
    options: argparse.Namespace, a: Path | None, b: list[Path], missing: Sequence[str]
) -> str:
    """What to run for the networks that are missing."""
    pair, seed = options.pair, options.seed
    own = {"a": [f"--seed {seed}"], "b": [f"--seed {seed + 1}"]}
    if pair == "halves":
        own = {side: [f"--seed {seed}", f"--train-half {side}"] for side in "ab"}
    if pair == "pruned":
        source = shlex.quote(str(b[0])) if b else "RUN-OF-B"
        amounts = " ".join(f"{amount:g}" for amount in SENSITIVITIES)
        own["a"] += [f"--initial-checkpoint {source}", f"--prune {amounts}"]
    shared = [f"--dataset {options.dataset}"]
    if options.data_dir:
        shared.append(f"--data-dir {shlex.quote(str(options.data_dir))}")
    if options.dataset in recipe_names():
        shared.append(f"--recipe {options.dataset}")
    said = []
    for side in missing:
        chain = pair == "generations" and side == "b"
        script = "train/born_again.py" if chain else "train/classifier.py"
        name, kwargs = _architecture(options, side, a or next(iter(b), None))
        words = [script, *shared, f"--model {name}"]
        words += ["--model-kwargs", *(f"{k}={v}" for k, v in kwargs.items())] if kwargs else []
        said.append(f"make {side.upper()} with {' '.join([*words, *own[side]])}")
    flags = " and ".join(f"--checkpoint-{side}" for side in missing)
    folders = "run folder" if len(missing) == 1 else "run folders"
    return (
        f"networks are missing on {options.dataset}: {', '.join(said)}; give the {folders} as "
        f"{flags}"
    )
