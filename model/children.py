"""Processes that a caller starts and ends: they go when it goes, and say how they ended."""

import multiprocessing
import os
import pickle
import signal
import threading
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess


def live_and_die_with_caller() -> None:
    """In a new process: leave Ctrl-C to the caller, and leave nothing behind where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    wait([caller.sentinel])
    os._exit(1)


def portable(error: Exception) -> Exception:
    """The error, or one with its words where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def how_it_ended(process: BaseProcess) -> str:
    """How a process that is ending ended, as what follows "it"."""
    process.join()
    code = process.exitcode or 0
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
