"""Born-again chains: every generation learns from the last weights of the one before."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import UsageError, UserError
from kdfast.methods import find_method
from kdfast.models import checksum, read_weights
from kdfast.training.classifier import train_classifier
from kdfast.training.distillation import describe_loss, distill
from kdfast.training.journal import say
from kdfast.training.links import Chain, Link, check_links
from kdfast.training.objective import Choice, choose_methods
from kdfast.training.parser import Parser
from kdfast.training.run_folder import on_main
from kdfast.training.setup import arguments_of, build_model, choose_inputs
from kdfast.training.teaching import load_teacher
from kdfast.training.transfer_flags import distill_flags

METHOD = "born_again"
SEED_STEP = 10


def check_chain_flags(options: argparse.Namespace) -> None:
    """Refuse flags that contradict one another, and complete those that others decide."""
    start, given = options.start_generation, options.given
    if options.generations is None:
        options.generations = 3 if options.dataset == "digits" else 5
    if options.eval_only:
        raise UsageError(
            "--eval-only scores one network: use train/classifier.py --eval-only "
            "--initial-checkpoint CHAIN/generation-N"
        )
    if options.generations <= start:
        raise UsageError(
            f"--generations {options.generations} ends before --start-generation {start}; "
            "generation 0 counts, so give 2 or more"
        )
    if start and not options.teacher_checkpoint:
        raise UsageError(
            "--start-generation 1 needs generation 0: give a weights file or a run folder as "
            "--teacher-checkpoint"
        )
    for name in ("teacher", "teacher_checkpoint", "teacher_kwargs"):
        if not start and name in given:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is of a given generation 0; add --start-generation 1")
        if not start:
            setattr(options, name, None)  # a recipe's, for scripts that have one
    if start and options.teacher is None:
        options.teacher = options.model


def choose_loss(options: argparse.Namespace) -> Choice:
    """The loss of generations 1 and up, every option of it resolved and checked."""
    own = copy.copy(options)
    own.method, own.alpha, own.beta, own.gamma = [METHOD], None, None, None
    choice = choose_methods(own)
    method = find_method(METHOD)(**choice.methods[METHOD])
    resolved = {key: getattr(method, key) for key in method.options()}
    return dataclasses.replace(choice, methods={METHOD: resolved})


def seed_of(base: int, generation: int) -> int:
    """`base` grows by 10 a generation: generation 0 has it, the first student 10 more.

    So a student has the same seed whether generation 0 was trained in this chain or given to it.
    """
    return base + SEED_STEP * generation


def train_chain(
    options: argparse.Namespace,
    choice: Choice,
    accelerator: Accelerator,
    data: ImageData,
    path: Path,
) -> dict[str, Any]:
    """Train every generation, or what is left of them, into run folders in `path`.

    Returns the chain's results, already written: those of the last generation, and `generations`,
    a list of {generation, seed, run, checksum, parent, last, best}.

    Raises:
        UsageError: the chain, or a link of it, was made with other options or another teacher.
        UserError: a link is missing or unfinished, yet later ones are there.
    """
    start, teacher, parent = options.start_generation, None, None
    record = arguments_of(options, accelerator, data, **choice.as_yaml())
    if start:
        teacher = last_weights(options.teacher_checkpoint)
        parent = record["teacher-checksum"] = _checksum_of_given(options, data, teacher)
    chain = Chain(path, record)
    links = [Link(chain, g) for g in range(start, options.generations)]
    with chain.claimed(accelerator, record, resume=options.resume is not None):
        on_main(accelerator, lambda: check_links(chain, links, "learnt from"))
        say(
            f"generations {start} to {options.generations - 1} of {options.model} on {data.name}, "
            f"loss {describe_loss(choice)}, into {path}"
        )
        entries, results = [], {}
        for link in links:
            own = options_of(options, link, teacher)
            own.resume = "auto" if on_main(accelerator, link.path.exists) else None
            results = _train(own, choice, accelerator, data, link, parent)
            teacher = link.weights("last")
            parent, taught_by = on_main(accelerator, lambda file=teacher: _identify(file))
            entries.append(
                {
                    "generation": link.generation,
                    "seed": own.seed,
                    "run": str(link.path),
                    "checksum": parent,
                    "parent": taught_by,
                    "last": results["last"],
                    "best": results["best"],
                }
            )
            if link is links[0]:
                first_teacher = results.get("teacher_top1")
        results = results | {
            "run": str(path),
            "seed": options.seed,
            "teacher_top1": first_teacher,
            "generations": entries,
        }
        results.pop("baseline_top1", None)
        on_main(accelerator, lambda: chain.write_results(results))
        say(table(results))
    return results


def options_of(options: argparse.Namespace, link: Link, teacher: Path | None) -> argparse.Namespace:
    """The options of one generation, as train/distill.py or train/classifier.py has them."""
    own = argparse.Namespace(**vars(options))
    del own.generations, own.start_generation
    own.generation, own.seed = link.generation, seed_of(options.seed, link.generation)
    own.output, own.experiment = str(link.path.parent), link.path.name
    if teacher is None:
        return own
    distilling = Parser()
    distill_flags(distilling)
    own = argparse.Namespace(**(distilling.fallbacks | vars(own)))
    own.baseline, own.teacher_checkpoint = False, str(teacher)
    if link.generation > 1 or not options.start_generation:
        own.teacher, own.teacher_kwargs = options.model, options.model_kwargs
    return own


def last_weights(path: str | Path) -> Path:
    """A weights file, or the last weights of a run folder: a generation learns from those."""
    path = Path(path)
    last = path / "last.safetensors"
    if path.is_dir() and not last.exists():
        raise UserError(f"{path} has no last.safetensors; give a finished run folder or a file")
    return last if path.is_dir() else path


def _checksum_of_given(options: argparse.Namespace, data: ImageData, teacher: Path) -> str:
    """Of the given generation 0, which must be able to teach."""
    own = argparse.Namespace(**vars(options))
    own.teacher_checkpoint, own.teacher_pretrained = str(teacher), False
    return checksum(load_teacher(own, data)[0].state_dict())


def _train(
    options: argparse.Namespace,
    choice: Choice,
    accelerator: Accelerator,
    data: ImageData,
    link: Link,
    parent: str | None,
) -> dict[str, Any]:
    """The results of one generation: trained, or read where it is finished."""
    said = f"generation {link.generation}, seed {options.seed}"
    if on_main(accelerator, link.results.exists):
        resolved = {} if parent is None else choice.as_yaml()
        arguments = arguments_of(options, accelerator, data, **resolved)
        if parent is not None:
            arguments["teacher-checksum"] = parent
        with link.claimed(accelerator, arguments, resume=True):
            results = on_main(accelerator, link.read_results)
        say(f"{said}: finished before, {link.path}")
        return results
    if parent is not None:
        say(f"{said}: learns from {options.teacher_checkpoint}")
        return distill(options, choice, accelerator, data, link)
    say(f"{said}: learns from labels alone")
    model = build_model(options, data.classes, seed_name="network")
    inputs = choose_inputs(options, data, model)
    resume = options.resume is not None
    return train_classifier(options, accelerator, data, model, inputs, link, resume=resume)


def _identify(weights: Path) -> tuple[str, str | None]:
    """The checksum of weights and that of their teacher's."""
    state, metadata = read_weights(weights)
    return checksum(state), metadata.get("parent")


def table(results: dict[str, Any]) -> str:
    """Top-1 by generation, of the last epoch and of the best."""
    lines = [f"{'generation':>10} {'seed':>6} {'last':>7} {'best':>7}"]
    if results["teacher_top1"] is not None:
        lines.append(f"{0:>10} {'given':>6} {results['teacher_top1']:7.2f}")
    for entry in results["generations"]:
        last, best = (f"{entry[kind]['top1']:7.2f}" for kind in ("last", "best"))
        lines.append(f"{entry['generation']:>10} {entry['seed']:>6} {last} {best}")
    return "\n".join(lines)
