"""Trans-classifiers: B's tail, fine-tuned on orders of what a Trans-Net finds in A's feature.

Liang, Li, Li, Wang, Zhang, "Knowledge Consistency between Neural Networks and Beyond", ICLR 2020,
arXiv 1908.01581: the experiment on refined features.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import UsageError, UserError
from kdfast.models import checksum, load_weights, read_weights
from kdfast.models.splice import check_mask, sum_of_orders
from kdfast.training.classifier import describe
from kdfast.training.consistency_flags import refuse_augmentation
from kdfast.training.features import Features
from kdfast.training.inherited import refuse_idle
from kdfast.training.journal import say
from kdfast.training.keeper import StudentKeeper
from kdfast.training.layout import FREE
from kdfast.training.links import Chain
from kdfast.training.loop import Trainer
from kdfast.training.objective import Objective
from kdfast.training.run_folder import RunFolder, on_main, write_atomic
from kdfast.training.setup import arguments_of, metadata
from kdfast.training.spliced_scores import Examiner
from kdfast.training.tail import Tail, check_tail
from kdfast.training.tails_table import OWN, as_csv, as_markdown, as_text
from kdfast.training.transnet_runs import TransNetRun

# Where networks and caches lie; what they are is known by their checksums.
_PLACES = {"transnet", "checkpoint-a", "checkpoint-b", "feature-dir"}


class Refinement(Chain):
    """The folder of all sub-runs, made when the first of them begins."""

    free = frozenset(FREE - {"epochs"} | {"orders", "own"} | _PLACES)

    def __init__(self, path: Path, record: dict[str, Any]):
        super().__init__(path, record)
        self.table, self.picture = path / "transclassifier.csv", path / "transclassifier.png"


class Part(RunFolder):
    """The sub-run of a mask such as "110", or of B's own feature: `orders-110/`, `own/`."""

    free = frozenset(FREE - {"epochs"} | _PLACES)

    def __init__(self, whole: Refinement, subset: str):
        super().__init__(whole.path / (subset if subset == OWN else f"orders-{subset}"))
        self.whole, self.subset = whole, subset

    @property
    def mask(self) -> tuple[int, ...] | None:
        """The orders that are kept; None of B's own feature."""
        return None if self.subset == OWN else tuple(map(int, self.subset))

    def begin(self, arguments: dict[str, Any]) -> None:
        self.whole.enter()
        super().begin(arguments)


@dataclass
class Spliced:
    """What all sub-runs share; `before` are scores by subset, and of `a` and `b` as they are."""

    options: argparse.Namespace
    accelerator: Accelerator
    data: ImageData
    opened: TransNetRun
    examiner: Examiner
    before: dict[str, dict[str, float]] = field(default_factory=dict)

    @cached_property
    def recorded(self) -> dict[str, str]:
        """What the runs' records know the three networks by."""
        net, a, b = self.opened.net, self.opened.a, self.opened.b
        return {
            "transnet-checksum": checksum(net.state_dict()),
            "a-checksum": a.checksum,
            "b-checksum": b.checksum,
        }


def check_flags(options: argparse.Namespace) -> None:
    """Refuse flags that contradict what the script does."""
    if options.eval_only:
        raise UsageError(
            "--eval-only scores one network; the table of train/transclassifier.py is made after "
            "fine-tuning"
        )
    if options.orders and len(set(options.orders)) < len(options.orders):
        raise UsageError(f"--orders {' '.join(options.orders)} repeats a mask")
    if options.transnet is None and (
        options.pair == "generations" or len(options.checkpoint_b or ()) > 1
    ):
        raise UsageError(
            "several networks B have a Trans-Net each, and a tail is fine-tuned behind one of "
            "them: give its run folder"
        )
    if options.transnet is not None:
        refuse_idle(options, [Path(options.transnet)], {"pair", "shuffle_pairs"})
    refuse_augmentation(options, "a tail learns from features of images as they are")


def choose_orders(given: Sequence[str] | None, layers: int) -> list[str]:
    """The masks of `--orders`, else all prefixes: 100 110 111 for K = `layers` = 3.

    Raises `UsageError` for a mask that does not fit the Trans-Net.
    """
    if not given:
        return ["1" * n + "0" * (layers - n) for n in range(1, layers + 1)]
    for mask in given:
        try:
            check_mask([int(digit) for digit in mask], layers)
        except UsageError as error:
            raise UsageError(f"--orders: {error}") from None
    return list(given)


def settled(options: argparse.Namespace, opened: TransNetRun) -> argparse.Namespace:
    """`options` as they are recorded: of the networks that `opened` has, every order named."""
    own, a, b = copy.copy(options), opened.a, opened.b
    own.orders = choose_orders(options.orders, len(opened.net.convs))
    own.transnet = str(opened.path)
    own.model = own.model_b = b.record()["architecture"]
    own.model_a, own.model_kwargs = a.record()["architecture"], b.model_kwargs
    own.checkpoint_a, own.checkpoint_b = (str(net.path) for net in (a, b))
    own.layer, own.layer_a, own.layer_b = None, a.layer, b.layer
    # How the Trans-Net was trained; a tail learns the labels of the images that A sees.
    own.pair, own.shuffle_pairs = None, False
    return own


def train_tails(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    opened: TransNetRun,
    path: Path,
) -> dict[str, Any]:
    """Fine-tune B's tail on every subset of orders, or what is left of them, into folder `path`.

    Returns the results, already written: those of the last subset of orders on the evaluation
    split; `a` and `b`, the networks and their scores; and `subsets`, a list of {orders, run,
    checksum, before, last, best}. The scores of those three are of the test split.

    Raises:
        UsageError: a mask that does not fit; a tail that cannot be cut off or trained; a folder
            made with other options or networks, or with more subsets than are asked for.
        UserError: weights that are not what a sub-run ended with.
    """
    options = settled(options, opened)
    check_tail(opened.b)
    run = Spliced(options, accelerator, data, opened, Examiner(options, accelerator, data, opened))
    record = arguments_of(options, accelerator, data, **run.recorded)
    whole = Refinement(path, record)
    parts = [Part(whole, subset) for subset in [*options.orders, *[OWN] * options.own]]
    with whole.claimed(accelerator, record, resume=options.resume is not None):
        on_main(accelerator, lambda: _check_parts(whole, parts))
        say(
            f"B's tail behind {opened.b.layer} of {options.model}, fine-tuned on orders "
            f"{' '.join(options.orders)}{' and its own feature' * options.own}, into {path}"
        )
        run.examiner.say_split(data)
        run.before = run.examiner.before(options.orders)
        entries: list[dict[str, Any]] = []
        for part in parts:
            trained = _train(run, part)
            entries.append(_examined(run, part, trained))
            if part.subset == options.orders[-1]:
                results = trained
            on_main(accelerator, lambda: _write_table(run, whole, entries, of=len(parts)))
        results = {key: value for key, value in results.items() if key != "tested"}
        results |= {"run": str(path)} | _summary(run, entries)
        on_main(accelerator, lambda: whole.write_results(results))
        say(as_text(results))
    return results


def _check_parts(whole: Refinement, parts: Sequence[Part]) -> None:
    """Refuse a folder with sub-runs that are not asked for: they would be lost to its table."""
    asked = {part.path for part in parts}
    for path in sorted([*whole.path.glob("orders-*"), *whole.path.glob(OWN)]):
        if path not in asked:
            flag = "drop --no-own" if path.name == OWN else f"add it to --orders: {path.name[7:]}"
            raise UsageError(
                f"{whole.path} has {path.name} too; {flag}, or give another --experiment"
            )


def _options_of(run: Spliced, part: Part) -> argparse.Namespace:
    """The options of one sub-run, whose `orders` may be its `own`."""
    own = copy.copy(run.options)
    own.orders = [part.subset]
    del own.own
    own.output, own.experiment = str(part.path.parent), part.path.name
    # The caches of all sub-runs are the same.
    own.feature_dir = own.feature_dir or str(Path(run.options.output) / "features")
    return own


def _train(run: Spliced, part: Part) -> dict[str, Any]:
    """The results of one sub-run: trained, or read where it is finished."""
    accelerator, data, b = run.accelerator, run.data, run.opened.b
    own = _options_of(run, part)
    arguments = arguments_of(own, accelerator, data, kind="tail", **run.recorded)
    begun, done = on_main(accelerator, lambda: (part.path.exists(), part.results.exists()))
    with part.claimed(accelerator, arguments, resume=begun):
        if done:
            say(f"{part.path.name}: finished before, {part.path}")
            return on_main(accelerator, part.read_results)
        say(f"{part.path.name}: B's tail, {own.epochs} epochs, into {part.path}")
        features = Features(own, accelerator, data, [b if part.mask is None else run.opened.a])
        train, held_out = features.loader("train", shuffle=True), features.loader("val")
        student = Tail(b.network, b.layer, sync_bn=own.sync_bn)
        trainer = Trainer(
            accelerator,
            Objective(student, label_smoothing=own.smoothing),
            train,
            held_out,
            preparer(features, run.opened.net, part.mask),
            part,
            own,
            StudentKeeper(part, _record(run, part, student), own.save_epochs),
            arguments,
            resume=begun,
        )
        scores = trainer.fit()
        batch = train.plan.global_batch
        results = describe(part, own, accelerator, batch, student.model, b.inputs, scores)
        results["trained_parameters"] = sum(p.numel() for p in student.parameters())
        on_main(accelerator, lambda: part.write_results(results))
    return results


def preparer(
    features: Features, net: torch.nn.Module, mask: Sequence[int] | None
) -> Callable[[Any], torch.Tensor]:
    """What a tail is fed: the feature of `features`' one network, or its orders in `mask`.

    float32 whatever precision training runs in, without gradient.
    """

    @torch.no_grad()
    def prepare(images: Any) -> torch.Tensor:
        (feature,) = features.prepare(images)
        if mask is None:
            return feature
        with torch.autocast(feature.device.type, enabled=False):
            return sum_of_orders(net, feature, mask)

    return prepare


def _record(run: Spliced, part: Part, student: Tail) -> dict[str, Any]:
    """What the weights files of a sub-run say: a whole network, and what its tail is for."""
    a, b = run.opened.a, run.opened.b
    about = metadata(student.model, b.model_kwargs, run.data, b.inputs, b.checksum)
    about |= {"kind": "tail", "layer": b.layer, "orders": part.subset, "b": b.record()}
    if part.mask is None:
        return about
    about["a"] = a.record()
    about["transnet"] = {
        "checksum": run.recorded["transnet-checksum"],
        "layers": len(run.opened.net.convs),
        "path": str(Path(run.opened.path).absolute()),
    }
    return about


def _examined(run: Spliced, part: Part, results: dict[str, Any]) -> dict[str, Any]:
    """The entry of a trained sub-run, scored where that has not been done yet.

    Written into its results.json as `tested`.
    """
    files = {"checksum": part.weights("last"), "best_checksum": part.weights("best")}
    found = on_main(
        run.accelerator, lambda: {key: checksum(read_weights(f)[0]) for key, f in files.items()}
    )
    known = results.get("tested")
    for key, file in files.items():
        if known is not None and known[key] != found[key]:
            raise UserError(f"{file} is not what the sub-run ended with; put it back as it was")
    if known is None:
        tails = [_tail_of(run, part.weights(kind)) for kind in ("last", "best")]
        scores = run.examiner.score(tails, part.mask)
        known = {"split": run.examiner.split} | found
        known["before"] = run.before[part.subset]
        for kind, own in zip(("last", "best"), scores, strict=True):
            known[kind] = {"epoch": results[kind]["epoch"]} | own
        results["tested"] = known
        on_main(run.accelerator, lambda: part.write_results(results))
    entry = {"orders": part.subset, "run": str(part.path)}
    return entry | {key: known[key] for key in ("checksum", "before", "last", "best")}


def _tail_of(run: Spliced, weights: Path) -> torch.nn.Module:
    """B's tail with the weights of a sub-run, in evaluation mode."""
    tail = Tail(run.opened.b.network, run.opened.b.layer)
    load_weights(tail.model, weights)
    return tail.eval()


def _summary(run: Spliced, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What the whole folder's results say beside those of the last subset of orders."""
    net, a, b = run.opened.net, run.opened.a, run.opened.b

    def network(name: str) -> dict[str, Any]:
        tapped = {"a": a, "b": b}[name]
        keys = ("architecture", "layer", "checksum", "path")
        return {key: tapped.record()[key] for key in keys} | run.before[name]

    return {
        "dataset": run.data.name,
        "tested_on": run.examiner.split,
        "transnet": {
            "path": str(run.opened.path),
            "checksum": run.recorded["transnet-checksum"],
            "layers": len(net.convs),
            "shuffled": bool(run.opened.record.get("shuffled")),
        },
        "a": network("a"),
        "b": network("b"),
        "subsets": entries,
    }


def _write_table(
    run: Spliced, whole: Refinement, entries: list[dict[str, Any]], *, of: int
) -> None:
    """CSV and Markdown of the sub-runs that are done; of a finished run no row goes."""
    if len(entries) < of and whole.results.exists():
        return
    found = _summary(run, entries)
    write_atomic(whole.table, as_csv(found))
    page = as_markdown(found, picture=whole.picture.name)
    write_atomic(whole.path / "transclassifier.md", page)
