"""SIGTERM and SIGINT as a decision that all processes take at the same step."""

from __future__ import annotations

import signal
import threading
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import distributed

# Launchers pass a Ctrl-C on to processes that the terminal has told already.
_ECHO_SECONDS = 2.0
# In practice for ever; a process that died is noticed by its beats (`processes`).
_PATIENCE = timedelta(days=365)


class Interrupt:
    """Between `with` and its end the two signals are noted instead of obeyed.

    All processes call `agreed` equally often; it gives all of them the same answer, the signal any
    of them got before its last call, or None. The answer travels while the step runs, on the host,
    so that no device waits for it. A second Ctrl-C stops at once. With `patient` they wait for one
    another however long it takes, else as long as collective operations do.
    """

    def __init__(self, accelerator: Accelerator, *, patient: bool = False):
        self.many = accelerator.num_processes > 1
        self.waiting = {"timeout": _PATIENCE} if patient else {}
        self.noted = 0
        self.since = 0.0

    def __enter__(self) -> Interrupt:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        self.group = None
        if self.many:
            self.group = distributed.new_group(backend="gloo", **self.waiting)
        self.box = torch.zeros(1, dtype=torch.int64)
        self.work = None
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.group is not None and kind is None:
            if self.work is not None:
                self.work.wait()
            distributed.destroy_process_group(self.group)

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.noted and number == signal.SIGINT and now - self.since > _ECHO_SECONDS:
            raise KeyboardInterrupt
        self.noted, self.since = self.noted or number, self.since or now

    def at_last(self) -> int | None:
        """`agreed` once more, after the last step, with all processes' last word."""
        if self.group is None:
            return self.noted or None
        if self.work is not None:
            self.work.wait()
            self.work = None
        self.box.fill_(self.noted)
        distributed.all_reduce(self.box, distributed.ReduceOp.MAX, group=self.group)
        return int(self.box) or None

    def agreed(self) -> int | None:
        """The signal all processes are to stop for, or None."""
        if self.group is None:
            return self.noted or None
        if self.work is not None:
            self.work.wait()
            if self.box.item():
                return int(self.box)
        self.box.fill_(self.noted)
        self.work = distributed.all_reduce(
            self.box, distributed.ReduceOp.MAX, group=self.group, async_op=True
        )
        return None
