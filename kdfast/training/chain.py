"""A teacher that reaches its student through assistants, each taught by the one before.

Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020. The best
weights of a link teach the next one.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import Stopped, UsageError, UserError
from kdfast.methods import find_method
from kdfast.models import resolve_name
from kdfast.training.distillation import assemble, distill, prepare_teacher, score_teacher
from kdfast.training.objective import Choice
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import arguments_of
from kdfast.training.teaching import load_teacher


@dataclass(frozen=True)
class Assistant:
    """Link `number`, from 1, of a chain: a network to train, or `given` as weights file or run."""

    number: int
    name: str
    given: str | None

    def __str__(self) -> str:
        return f"link {self.number}, assistant {self.name}"

    def run(self, outer: RunFolder) -> RunFolder:
        """Where it is trained, inside the student's run."""
        name = self.name.replace("/", "_").replace(":", ".")
        return RunFolder(outer.path / "assistants" / f"{self.number}-{name}")

    def weights(self, outer: RunFolder) -> str:
        """What teaches the next link."""
        return self.given or str(self.run(outer).path)


def choose_assistants(options: argparse.Namespace, choice: Choice) -> list[Assistant]:
    """The assistants of `--assistants`; raises `UsageError` where they cannot be served."""
    if not options.assistants:
        if options.assistant_epochs is not None:
            raise UsageError("--assistant-epochs is given, but no --assistants")
        return []
    found = []
    for number, text in enumerate(options.assistants, start=1):
        name, equals, path = text.partition("=")
        if not name or (equals and not path):
            raise UsageError(f"--assistants {text}: expected NAME or NAME=PATH")
        found.append(Assistant(number, name, path or None))
        if path and number > 1 and found[-2].given is None:
            raise UsageError(
                f"{found[-1]} is given trained, so {found[-2].name} before it would teach nobody; "
                "drop it, or give its weights as well"
            )
    if not choice.methods:
        raise UsageError("--assistants need a --method by which they learn")
    for name in choice.methods:
        if find_method(name).heads:
            raise UsageError(
                f"method {name} needs a teacher with heads, and assistants have none; drop "
                "--assistants"
            )
    if options.student_layers or options.teacher_layers:
        raise UsageError(
            "--student-layers and --teacher-layers are of one pair of networks, but with "
            "--assistants there are several; drop them"
        )
    epochs = options.assistant_epochs or options.epochs
    if options.warmup_epochs > epochs:
        raise UsageError(
            f"--warmup-epochs {options.warmup_epochs} is longer than --assistant-epochs {epochs}"
        )
    return found


def distill_through(
    assistants: Sequence[Assistant],
    options: argparse.Namespace,
    choice: Choice,
    accelerator: Accelerator,
    data: ImageData,
    run: RunFolder,
) -> dict[str, Any]:
    """Train what is not given of `assistants`, then the student into `run`; returns its results.

    Without assistants the teacher's own student. Raises `UserError`, naming the link, for one that
    cannot be trained or loaded, and for one that is gone although another has learnt from it.
    """
    if not assistants:
        return distill(options, choice, accelerator, data, run)
    links = _links(assistants, options, run)
    # What would only be raised once the links before are trained.
    for assistant, own in zip(assistants, links, strict=False):
        with _named(assistant):
            if assistant.given:
                load_teacher(links[assistant.number], data)
                continue
            before = assistants[assistant.number - 2] if assistant.number > 1 else None
            assemble(_untaught(own, before), choice, accelerator, data)
    assemble(_untaught(links[-1], assistants[-1]), choice, accelerator, data)
    recorded = copy.copy(options)
    recorded.assistants = [assistant.name for assistant in assistants]
    recorded.assistant_epochs = options.assistant_epochs or options.epochs
    arguments = arguments_of(recorded, accelerator, data, **choice.as_yaml())
    resume = options.resume is not None
    # Whose student the run is only shows when the last assistant is trained.
    with run.claimed(accelerator, arguments, resume=resume, later={"teacher-checksum"}):
        on_main(accelerator, lambda: _require_links(assistants, arguments, run))
        on_main(accelerator, lambda: run.begin(arguments))
        chain: list[dict[str, Any]] = []
        for assistant, own in zip(assistants, links, strict=False):
            with _named(assistant):
                if assistant.given:
                    chain.append(_score(own, options, accelerator, data))
                    continue
                begun = on_main(accelerator, assistant.run(run).path.exists)
                own.resume = "auto" if begun else None
                results = distill(
                    own, choice, accelerator, data, assistant.run(run),
                    seed_name=f"assistant {assistant.number}", chain=chain, keep=True,
                )  # fmt: skip
                chain = results["chain"]
        return distill(links[-1], choice, accelerator, data, run, chain=chain, recorded=recorded)


def _links(
    assistants: Sequence[Assistant], options: argparse.Namespace, run: RunFolder
) -> list[argparse.Namespace]:
    """The options of every link and, at the end, of the student."""
    links = []
    for number in range(len(assistants) + 1):
        own = copy.copy(options)
        own.assistants = own.assistant_epochs = None
        if number:
            before = assistants[number - 1]
            own.teacher, own.teacher_checkpoint = before.name, before.weights(run)
            own.teacher_pretrained, own.teacher_kwargs = False, None
        if number < len(assistants):
            own.model, own.assistant = assistants[number].name, assistants[number].number
            own.epochs = options.assistant_epochs or options.epochs
            own.pretrained, own.initial_checkpoint = False, None
            with _named(assistants[number]):
                same = resolve_name(own.model) == resolve_name(options.model)
            own.model_kwargs = options.model_kwargs if same else {}
            own.baseline, own.save_epochs, own.profile = False, [], None
            own.path_length, own.classifier_epochs, own.reset_layers = None, 0, None
        links.append(own)
    return links


def _untaught(own: argparse.Namespace, before: Assistant | None) -> argparse.Namespace:
    """The same options while `before`, the assistant that is to teach, may not be trained yet."""
    if before is None or before.given:
        return own
    own = copy.copy(own)
    own.teacher_checkpoint = None
    return own


def _score(
    link: argparse.Namespace, options: argparse.Namespace, accelerator: Accelerator, data: ImageData
) -> dict[str, Any]:
    """What the chain says of the teacher of a link that is given, scored as the student's."""
    own = copy.copy(options)
    own.baseline, own.teacher, own.teacher_checkpoint = False, link.teacher, link.teacher_checkpoint
    own.teacher_pretrained, own.teacher_kwargs = link.teacher_pretrained, link.teacher_kwargs
    made = assemble(own, Choice({}, {}, 1.0), accelerator, data)
    prepare_teacher(own, accelerator, data, made)
    return score_teacher(own, accelerator, made)


def _require_links(
    assistants: Sequence[Assistant], arguments: dict[str, Any], run: RunFolder
) -> None:
    """Raise `UserError` for a link that is not whole although a later one has begun."""
    later = "teacher-checksum" in arguments  # the student's stage has begun
    for assistant in reversed(assistants):
        own = assistant.run(run)
        wanted = (own.results, own.weights("best"))
        missing = [path for path in wanted if not path.is_file()]
        if later and missing and not assistant.given:
            raise UserError(
                f"{assistant}: {missing[0]} is missing, yet what it has taught is there; put it "
                f"back, or remove {run.path} to start anew"
            )
        later = later or own.path.exists()


@contextmanager
def _named(assistant: Assistant) -> Iterator[None]:
    """Have errors say of which link they are."""
    try:
        yield
    except Stopped:
        raise
    except UserError as error:
        raise type(error)(f"{assistant}: {error}") from None
