"""Runs that depend on one another, generation after generation: a folder of run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.errors import UsageError, UserError
from kdfast.training.layout import FREE
from kdfast.training.run_folder import RunFolder


class Chain(RunFolder):
    """The folder of a chain, `links` in it, made when the first of them begins.

    What is refused until then leaves nothing behind. `record` is the chain's `args.yaml`.
    """

    # With more epochs the links trained so far would change, and with them all that came of them.
    free = frozenset(FREE - {"epochs"} | {"generations"})

    def __init__(self, path: Path, record: dict[str, Any]):
        super().__init__(path)
        self.record, self.begun = record, False

    def enter(self) -> None:
        """Begin, unless that is done."""
        if not self.begun:
            self.begin(self.record)
            self.begun = True


class Link(RunFolder):
    """The run folder of generation `generation` of `chain`."""

    free = frozenset(FREE - {"epochs"})

    def __init__(self, chain: Chain, generation: int):
        super().__init__(chain.path / f"generation-{generation}")
        self.chain, self.generation = chain, generation

    def begin(self, arguments: dict[str, Any]) -> None:
        self.chain.enter()
        super().begin(arguments)


def check_links(chain: Chain, links: Sequence[Link], came: str) -> None:
    """Refuse a chain that has lost a link, or has more of them than are asked for.

    `came` is what a later generation did with the one before, such as "learnt from".
    """
    asked = links[-1].generation + 1
    beyond = Link(chain, asked).path
    if beyond.exists():
        raise UsageError(
            f"{chain.path} goes on to {beyond.name}; give --generations {asked + 1} or more, or "
            "another --experiment"
        )
    for i, link in enumerate(links):
        later = [after.path.name for after in links[i + 1 :] if after.path.exists()]
        if later and not link.results.exists():
            state = "is not finished" if link.path.exists() else "is missing"
            raise UserError(
                f"{link.path} {state}, yet {later[0]} is there, which {came} it; put it back "
                f"as it was, or remove {' '.join(later)} to train them anew"
            )
