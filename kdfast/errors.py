"""The errors a user can cause, and the "did you mean" line they carry.

Scripts print the message as one line and exit with `exit_code`; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """Something outside kdfast is wrong: a file, a checkpoint, the disk, a diverging loss."""

    exit_code = 1


class UsageError(UserError):
    """The request itself is wrong: an unknown name, flags that contradict each other."""

    exit_code = 2


class Stopped(UserError):
    """The run was asked to stop, and did; the exit code is the shell's for that signal."""

    def __init__(self, number: int, message: str):
        super().__init__(f"stopped by {signal.Signals(number).name}{message}")
        self.exit_code = 128 + number


def unknown(kind: str, name: str, choices: Iterable[str], *, limit: int = 3) -> UsageError:
    """A `UsageError` for an unknown `name` that lists the closest of `choices`."""
    choices = sorted(set(choices))
    close = difflib.get_close_matches(name, choices, n=limit, cutoff=0.5)
    if len(choices) <= (limit if close else 12):
        close = choices
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return UsageError(f"unknown {kind} '{name}'{hint}")
