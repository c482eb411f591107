"""Ctrl-C and the database: transactions finish first, waits end at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Waiting:
    """A handler for Ctrl-C that only remembers it, but for waits in between."""

    def __init__(self) -> None:
        self.pressed = False
        self.at_once = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.pressed = True
        if self.at_once:
            raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait until the block, a few transactions, is through; a driver cut short leaves a broken connection.

    Blocks may be nested: it is raised at the end of the outermost. Outside the main thread, which alone receives
    signals, and where Ctrl-C is ignored, as in a job that a shell put into the background, this does nothing.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if not in_main_thread or handler in (signal.SIG_IGN, None) or isinstance(handler, _Waiting):
        yield
        return
    waiting = _Waiting()
    before = signal.signal(signal.SIGINT, waiting)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting.pressed:
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Within `uninterrupted`, a block that changes nothing: Ctrl-C before or in it is raised at once."""
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, _Waiting) or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler.at_once = True
    try:
        if handler.pressed:
            raise KeyboardInterrupt
        yield
    finally:
        handler.at_once = False
