"""Knowledge evolution: every generation inherits part of the one before, the rest is drawn anew.

Taha, Shrivastava, Davis, "Knowledge Evolution in Neural Networks", CVPR 2021, arXiv 2103.05152.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from kdfast.data import ImageData
from kdfast.errors import UsageError, UserError
from kdfast.models import (
    checksum,
    extract_slim,
    load_weights,
    masked_dense,
    read_weights,
    reset,
    split_masks,
)
from kdfast.models.channel_graph import ChannelGraph
from kdfast.ops import Key
from kdfast.seeding import derive_seed
from kdfast.training import journal
from kdfast.training.classifier import train_classifier
from kdfast.training.generations_csv import as_csv, as_text, best_scores
from kdfast.training.journal import say
from kdfast.training.links import Chain, Link, check_links
from kdfast.training.run_folder import on_main, write_atomic
from kdfast.training.setup import (
    Inputs,
    arguments_of,
    build_model,
    choose_inputs,
    metadata,
    try_out,
)
from kdfast.training.slim import Examiner, counts_of, program_of, write_slim
from kdfast.training.split_files import Split, check_split, read_split, write_split


def check_flags(options: argparse.Namespace) -> None:
    """Refuse flags that contradict one another."""
    if options.eval_only:
        raise UsageError(
            "--eval-only scores one network: use train/classifier.py --eval-only "
            "--initial-checkpoint RUN/generation-N/last.safetensors"
        )
    if options.init != "model" and (options.pretrained or options.initial_checkpoint):
        flag = "--pretrained" if options.pretrained else "--initial-checkpoint"
        raise UsageError(f"--init {options.init} draws the weights that {flag} brings; drop one")


def seed_of(base: int, generation: int) -> int:
    """Generation 0 has `base` itself; the others numbers below 2^31 that follow from both."""
    return derive_seed(base, "generation", generation) % 2**31 if generation else base


class EvolvedChain(Chain):
    """The folder of all generations, with the masks they share, made with the first of them."""

    def __init__(self, path: Path, record: dict[str, Any]):
        super().__init__(path, record)
        self.masks, self.table = path / "masks.safetensors", path / "generations.csv"
        self.split: Split | None = None

    def begin(self, arguments: dict[str, Any]) -> None:
        super().begin(arguments)
        if not self.masks.exists():
            write_split(self.masks, self.split)


@dataclass
class Evolution:
    """What all generations of a run share; `model` is a network like theirs."""

    options: argparse.Namespace
    accelerator: Accelerator
    data: ImageData
    chain: EvolvedChain
    model: nn.Module
    inputs: Inputs
    examiner: Examiner

    @property
    def split(self) -> Split:
        return self.chain.split

    @property
    def slims(self) -> bool:
        """Whether there is more than plain training, and so a slim row a generation."""
        return self.options.generations > 1

    @cached_property
    def graph(self) -> ChannelGraph:
        """Of every generation's network: tracing one takes seconds."""
        return ChannelGraph(self.model, (3, *self.inputs.size))

    def networks(self, dense: nn.Module) -> dict[str, nn.Module]:
        """`dense`, `slim` and `masked`, as far as there are such."""
        found = {"dense": dense}
        if self.slims and self.split.mode == "kels":
            found["slim"] = extract_slim(dense, self.split.masks, graph=self.graph).eval()
        if self.slims:
            found["masked"] = masked_dense(dense, self.split.masks, graph=self.graph)
        return found


def evolve(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, path: Path
) -> dict[str, Any]:
    """Train every generation, or what is left of them, into run folders in `path`.

    Returns the results, already written: those of the last generation, and `generations`, a list of
    {generation, seed, run, checksum, parent, masks, finished, last, best, best_top5,
    best_train_top1, best_train_top5, dense, slim, masked}.

    Raises:
        UsageError: the folder, or a generation in it, was made with other options; a network that
            cannot be split.
        UserError: a generation is missing or unfinished, yet later ones are there; weights or masks
            are not what a generation ended with.
    """
    record = arguments_of(options, accelerator, data)
    chain = EvolvedChain(path, record)
    links = [Link(chain, g) for g in range(options.generations)]
    with chain.claimed(accelerator, record, resume=options.resume is not None):
        on_main(accelerator, lambda: check_links(chain, links, "inherited from"))
        run = prepare(options, accelerator, data, chain, links[0])
        entries: list[dict[str, Any]] = []
        for link in links:
            parent = (links[len(entries) - 1], entries[-1]["checksum"]) if entries else None
            results = _train(run, link, parent)
            entries.append(_examined(run, link, results, parent and parent[1]))
            on_main(accelerator, lambda: _write_table(run, entries))
        del results["evolution"]
        results |= {"run": str(path), "seed": options.seed, "tested_on": run.examiner.split}
        results["generations"] = entries
        on_main(accelerator, lambda: chain.write_results(results))
        say(as_text(entries))
    return results


def prepare(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    chain: EvolvedChain,
    first: Link,
) -> Evolution:
    """Build the network once and split it, or read how it was split; writes nothing."""
    own = options_of(options, first)
    model = build_network(own, data.classes)
    inputs = choose_inputs(options, data, model)
    try_out(model, inputs, data.classes)
    examiner = Examiner(options, accelerator, data, inputs)
    run = Evolution(options, accelerator, data, chain, model, inputs, examiner)
    if on_main(accelerator, chain.masks.exists):
        split = read_split(chain.masks)
        check_split(chain.masks, split, model, options.split_rate, options.split_mode)
    elif on_main(accelerator, first.path.exists):
        raise UserError(f"{chain.masks} is missing; put it back, or start anew elsewhere")
    else:
        key, rate, mode = Key(options.seed, "split"), options.split_rate, options.split_mode
        split = Split(split_masks(model, rate, mode, key, graph=run.graph), rate, mode)
    chain.split = split
    slim = None if on_main(accelerator, first.path.exists) else run.networks(model).get("slim")
    if slim is not None:
        program_of(slim, inputs)  # before hours of training rather than after
    kept, entries = map(sum, zip(*split.sums().values(), strict=True))
    say(
        f"generations 0 to {options.generations - 1} of {options.model} on {data.name}, into "
        f"{chain.path}; {split.mode} at {split.rate:g}: each inherits {100 * kept / entries:.1f} % "
        f"of {entries:,} weights in {len(split.masks)} layers"
    )
    examiner.say_split(data)
    return run


def options_of(options: argparse.Namespace, link: Link) -> argparse.Namespace:
    """The options of one generation, as train/classifier.py has them."""
    own = copy.copy(options)
    del own.generations
    own.generation, own.seed = link.generation, seed_of(options.seed, link.generation)
    own.output, own.experiment = str(link.path.parent), link.path.name
    return own


def build_network(options: argparse.Namespace, classes: int, *, sync_bn: bool = False) -> nn.Module:
    """A new network of a generation; weights that were given are those of generation 0."""
    own = copy.copy(options)
    own.sync_bn = sync_bn
    if own.generation:
        own.pretrained, own.initial_checkpoint = False, None
    return build_model(own, classes, seed_name="network")


def inherit(run: Evolution, model: nn.Module, generation: int, parent: Link) -> nn.Module:
    """All of the last weights of `parent`, then new ones outside the masks.

    `model` is new. Normalisation and its statistics are inherited whole.
    """
    fresh = copy.deepcopy(model) if run.options.reset_init == "construction" else None
    load_weights(model, parent.weights("last"))
    reset(model, run.split.masks, Key(run.options.seed, "reset", generation), fresh=fresh)
    sums = run.split.sums()
    for name, (kept, entries) in sums.items():
        journal.note(f"generation {generation}: {name} keeps {kept:,} of {entries:,}")
    drawn = sum(entries - kept for kept, entries in sums.values())
    say(f"generation {generation}: inherits from {parent.path}, {drawn:,} weights drawn anew")
    return model


def _train(run: Evolution, link: Link, parent: tuple[Link, str] | None) -> dict[str, Any]:
    """The results of one generation: trained, or read where it is finished."""
    own = options_of(run.options, link)
    own.resume = "auto" if on_main(run.accelerator, link.path.exists) else None
    said = f"generation {link.generation}, seed {own.seed}"
    recorded = {"masks-checksum": run.split.checksum}
    if parent is not None:
        recorded["parent-checksum"] = parent[1]
    if on_main(run.accelerator, link.results.exists):
        arguments = arguments_of(own, run.accelerator, run.data, **recorded)
        with link.claimed(run.accelerator, arguments, resume=True):
            results = on_main(run.accelerator, link.read_results)
        say(f"{said}: finished before, {link.path}")
        return results
    model = build_network(own, run.data.classes, sync_bn=own.sync_bn)
    if parent is not None:
        model = inherit(run, model, link.generation, parent[0])
    say(f"{said}: trains the whole network")
    return train_classifier(
        own, run.accelerator, run.data, model, run.inputs, link,
        resume=own.resume is not None, accuracy=True, parent=parent and parent[1], **recorded,
    )  # fmt: skip


def _examined(
    run: Evolution, link: Link, results: dict[str, Any], parent: str | None
) -> dict[str, Any]:
    """The entry of a trained generation, scored where that has not been done yet.

    Written into its results.json as `evolution`, which `results` then have as well.
    """
    known = results.get("evolution")
    weights = link.weights("last")
    found = on_main(run.accelerator, lambda: checksum(read_weights(weights)[0]))
    if known is not None and known["checksum"] != found:
        raise UserError(f"{weights} is not what the generation ended with; put it back as it was")
    if known is not None and (known["masked"] is not None or not run.slims):
        results["evolution"] = known | {"run": str(link.path)}
        return results["evolution"]
    on_main(run.accelerator, run.chain.enter)
    own = options_of(run.options, link)
    dense = copy.deepcopy(run.model)
    load_weights(dense, weights)
    networks = run.networks(dense)
    counts = {k: counts_of(n, run.inputs.size) for k, n in networks.items() if k != "masked"}
    if "slim" in networks:
        about = metadata(dense, own.model_kwargs, run.data, run.inputs, found)
        about |= {"split_rate": run.split.rate, "generation": link.generation} | counts["slim"]
        slim = networks["slim"]
        on_main(run.accelerator, lambda: write_slim(link, slim, run.split, run.inputs, about))
    scores = run.examiner.score(networks)
    entry = {
        "generation": link.generation,
        "seed": own.seed,
        "run": str(link.path),
        "checksum": found,
        "parent": parent,
        "masks": run.split.checksum,
        "finished": known["finished"] if known else time.strftime("%Y-%m-%d %H:%M:%S"),
        "last": results["last"],
        "best": results["best"],
        **on_main(run.accelerator, lambda: best_scores(link.summary)),
        **dict.fromkeys(("dense", "slim", "masked")),
        **{name: own | counts.get(name, {}) for name, own in scores.items()},
    }
    results["evolution"] = on_main(run.accelerator, lambda: entry)  # its time of day
    on_main(run.accelerator, lambda: link.write_results(results))
    tops = ", ".join(f"{name} {own['top1']:.2f}" for name, own in scores.items())
    say(f"generation {link.generation}: {run.examiner.split} top1 {tops}")
    return results["evolution"]


def _write_table(run: Evolution, entries: list[dict[str, Any]]) -> None:
    """Of all generations that are there: of a finished run no row goes while it is read."""
    if Link(run.chain, len(entries)).path.exists():
        return
    text = as_csv(entries, run.chain.path.name, run.split.rate, slim=run.slims)
    if not run.chain.table.exists() or run.chain.table.read_text() != text:
        write_atomic(run.chain.table, text)
