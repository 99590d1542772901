"""What the main process says: to stdout, and with the time to the `train.log` of its run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_logs: list[Path] = []
_early: list[str] = []


def start() -> None:
    """Begin a script: nothing is open and nothing has been said."""
    _logs.clear()
    _early.clear()


def is_main() -> bool:
    """Whether this process is the one that speaks: the first, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print `text` and log it; other processes than the main one are silent."""
    if is_main():
        print(text, flush=True)
        note(text)


def note(text: str) -> None:
    """Log `text` without printing it; what is said before a log is open goes to the first one."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = [f"{now}  {line}\n" for line in text.splitlines()]
    if _logs:
        _append(_logs[-1], lines)
    else:
        _early.extend(lines)


def depth() -> int:
    """How many logs are open."""
    return len(_logs)


def open_log(path: Path) -> None:
    """Send lines to `path` until `close_log`; logs nest."""
    _append(path, _early)
    _early.clear()
    _logs.append(path)


def close_log() -> None:
    _logs.pop()


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Send lines to `path` within `with`, where several logs are open."""
    open_log(path)
    try:
        yield
    finally:
        close_log()


def _append(path: Path, lines: list[str]) -> None:
    if lines:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
