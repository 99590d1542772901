"""What surrounds a script's `main`: an exit code, and one line for what a user can cause."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps

import torch

from kdfast.errors import UserError
from kdfast.training import journal, processes
from kdfast.training.interrupt import Stopped


def script(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str] | None], int]:
    """Turn `main(argv)` into an entry point that returns the process's exit code.

    2 for usage, 1 for whatever else the user can cause, 128 + its number for a signal; anything
    unforeseen keeps its traceback. Of many processes the first that fails is named by all.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        name = os.path.basename(main.__code__.co_filename)
        journal.start()
        try:
            main(sys.argv[1:] if argv is None else list(argv))
        except Stopped as stopped:
            if reason := processes.why(stopped):
                _tell(name, f"error: {reason}")
                return 1
            if journal.is_main():
                _tell(name, str(stopped))
            return stopped.exit_code
        except UserError as error:
            return _fail(name, str(error), error.exit_code)
        except OSError as error:
            return _fail(name, f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            return _fail(name, f"{reason}; lower --batch-size or raise --grad-accum-steps", 1)
        except KeyboardInterrupt:
            return _fail(name, "stopped", 130)
        except Exception as error:
            if "does not have a deterministic implementation" in str(error):
                operation = str(error).split()[0]
                return _fail(
                    name, f"{operation} has no deterministic form; drop --deterministic", 1
                )
            if reason := processes.why(error):
                _tell(name, f"error: {reason}")
                return 1
            processes.failed(f"{type(error).__name__}: {error}")
            raise
        finally:
            processes.stop()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return 0

    return run


def _fail(name: str, message: str, code: int) -> int:
    processes.failed(message)
    _tell(name, f"error: {message}")
    return code


def _tell(name: str, message: str) -> None:
    rank = os.environ.get("RANK", "0")
    where = name if rank == "0" else f"{name} (process {rank})"
    # One write, so that the lines of several processes do not run into each other.
    sys.stderr.write(f"{where}: {' '.join(message.split())}\n")
    sys.stderr.flush()
