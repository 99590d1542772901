"""A script that ends by SIGKILL: `python tests/killed.py r:N SCRIPT FLAGS...`, or under torchrun.

Process r is killed at its Nth event; 0 kills none, `r:N:TERM` sends SIGTERM. An event is the
moment after an optimizer step, or before the disk is made to hold a file or a name is changed,
so that a kill lands between steps as well as in the middle of saving.
"""

import os
import signal
import sys
from pathlib import Path

from conftest import load_script
from torch.optim.optimizer import register_optimizer_step_post_hook

count = 0


def event(*_) -> None:
    global count
    count += 1
    if count == limit:
        os.kill(os.getpid(), number)


def before(owner, name: str) -> None:
    genuine = getattr(owner, name)

    def wrapped(*args, **kwargs):
        event()
        return genuine(*args, **kwargs)

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    who, when, *kind = sys.argv[1].split(":")
    number = signal.SIGTERM if kind else signal.SIGKILL
    limit = int(when) if who == os.environ.get("RANK", "0") else 0
    if limit:
        register_optimizer_step_post_hook(event)
        before(os, "fsync")
        before(Path, "rename")
        before(Path, "replace")
    sys.exit(load_script(sys.argv[2]).main(sys.argv[3:]))
