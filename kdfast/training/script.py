"""What surrounds a script's `main`: an exit code, and one line for what a user can cause."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from types import ModuleType

from kdfast.errors import Stopped, UserError
from kdfast.training import journal


def script(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str] | None], int]:
    """Turn `main(argv)` into an entry point that returns the process's exit code.

    2 for usage, 1 for whatever else the user can cause, 128 + its number for a signal; anything
    unforeseen keeps its traceback. Of many processes the first that fails is named by all.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        name = os.path.basename(main.__code__.co_filename)
        others = _others()
        journal.start()
        try:
            main(sys.argv[1:] if argv is None else list(argv))
        except KeyboardInterrupt:
            return _end(name, "error: stopped", 130, others)
        except Exception as error:
            if others and (reason := others.why(error)):
                return _end(name, f"error: {reason}", 1, others)
            if isinstance(error, Stopped):
                return _end(name, str(error) if journal.is_main() else "", error.exit_code, None)
            if said := _said(error):
                code = getattr(error, "exit_code", 1)
                return _end(name, f"error: {said}", code, others, said)
            if others:
                others.failed(f"{type(error).__name__}: {error}")
                traceback.print_exc()
                others.leave(1)
            raise
        finally:
            if others:
                others.stop()
        torch = sys.modules.get("torch")  # not every script needs it
        if torch and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return 0

    return run


def _others() -> ModuleType | None:
    """What watches the other processes, where a launcher has started some."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return importlib.import_module("kdfast.training.processes")


def _said(error: Exception) -> str | None:
    """The line for an error that a user can cause; None for what is nobody's but ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'input/output'}: {error.strerror or error}"
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.split('. ')[0]}; lower --batch-size or raise --grad-accum-steps"
    if "does not have a deterministic implementation" in text:
        return f"{text.split()[0]} has no deterministic form; drop --deterministic"
    return None


def _end(name: str, message: str, code: int, others: ModuleType | None, told: str = "") -> int:
    """Write the last line, having told the other processes why; returns `code`."""
    if others:
        others.failed(told or message)
    if message:
        rank = os.environ.get("RANK", "0")
        where = name if rank == "0" else f"{name} (process {rank})"
        # One write, so that the lines of several processes do not run into each other.
        sys.stderr.write(f"{where}: {' '.join(message.split())}\n")
        sys.stderr.flush()
    if others:
        others.leave(code)
    return code
