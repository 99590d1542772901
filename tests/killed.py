"""A script that ends by SIGKILL: `python tests/killed.py r:N SCRIPT FLAGS...`, or under torchrun.

Process r is killed at its Nth event; 0 kills none, `r:N:TERM` sends SIGTERM. With `r:N:STALL` it
only holds still there, for longer than all groups of processes wait that are not told for how long.
An event is the moment after an optimizer step, or before the disk is made to hold a file or a name
is changed, so that a kill lands between steps as well as in the middle of saving.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from conftest import load_script
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

count = 0


def event(*_) -> None:
    global count
    count += 1
    if count != limit:
        return
    if kind == "STALL":
        time.sleep(7)
    else:
        os.kill(os.getpid(), signal.SIGTERM if kind == "TERM" else signal.SIGKILL)


def before(owner, name: str) -> None:
    genuine = getattr(owner, name)

    def wrapped(*args, **kwargs):
        event()
        return genuine(*args, **kwargs)

    setattr(owner, name, wrapped)


def hurry() -> None:
    genuine = distributed.new_group

    def new_group(*args, **kwargs):
        return genuine(*args, **{"timeout": timedelta(seconds=3), **kwargs})

    distributed.new_group = new_group


if __name__ == "__main__":
    who, when, *kinds = sys.argv[1].split(":")
    kind = kinds[0] if kinds else "KILL"
    if kind == "STALL":
        hurry()
    limit = int(when) if who == os.environ.get("RANK", "0") else 0
    if limit:
        register_optimizer_step_post_hook(event)
        before(os, "fsync")
        before(Path, "rename")
        before(Path, "replace")
    sys.exit(load_script(sys.argv[2]).main(sys.argv[3:]))
