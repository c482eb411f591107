"""Ctrl-C: transactions finish first, waits end at once, and no library's code swallows it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PRESSED_AGAIN_AFTER_S = 0.05
"""After Python has dropped a Ctrl-C, it is out of the callback that it was raised in."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, of a class of its own: once Python's own has left an `exec` of text, as in the making of a dataclass, the
    process is ended by the signal instead of its exit code, although the exception was caught."""


def _is_heard_here() -> bool:
    """Whether Ctrl-C reaches this thread: it is the main one, and neither a shell nor a library has it ignored."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)


@contextmanager
def heard() -> Iterator[Callable[[], None]]:
    """A Ctrl-C within the block is not lost: what this yields raises it once more.

    Python drops what is raised in a destructor or in a callback of a weak reference, with a traceback; here it shows
    none, and is raised again a moment later. Libraries catch more than they should. Outside the main thread, and where
    Ctrl-C is ignored, this does nothing.
    """
    pressed = False
    show, presses = sys.unraisablehook, list[threading.Timer]()

    def press(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise Interrupted

    def check() -> None:
        if pressed:
            raise Interrupted

    def press_again_or_show(dropped: "sys.UnraisableHookArgs") -> None:
        if not issubclass(dropped.exc_type, Interrupted):
            show(dropped)
            return
        main = threading.main_thread().ident
        press_again = threading.Timer(PRESSED_AGAIN_AFTER_S, signal.pthread_kill, (main, signal.SIGINT))
        press_again.daemon = True
        press_again.start()
        presses.append(press_again)

    if not _is_heard_here():
        yield check
        return
    before = signal.signal(signal.SIGINT, press)
    sys.unraisablehook = press_again_or_show
    try:
        yield check
    finally:
        sys.unraisablehook = show
        for press_again in presses:
            press_again.cancel()
        signal.signal(signal.SIGINT, before)


@contextmanager
def pressed_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM, by which schedulers end a process, does what a Ctrl-C does, where one is heard."""
    if not _is_heard_here():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Waiting:
    """A handler for Ctrl-C that only remembers it for the one before, but for waits in between and a second one."""

    def __init__(self) -> None:
        self.before = signal.getsignal(signal.SIGINT)
        self.pressed = False
        self.at_once = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        again, self.pressed = self.pressed, True
        if self.at_once or again:
            self.hand_on()

    def hand_on(self) -> None:
        """What the Ctrl-C does without this handler; where nobody set another, it is raised."""
        if callable(self.before):
            self.before(signal.SIGINT, None)
        else:
            raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait until the block, a few transactions, is through; a driver cut short leaves a broken connection.

    Blocks may be nested: it is raised at the end of the outermost. A second one is raised at once: what is waited for
    may hang. Outside the main thread, which alone receives signals, and where Ctrl-C is ignored, as in a job that a
    shell put into the background, this does nothing.
    """
    if not _is_heard_here() or isinstance(signal.getsignal(signal.SIGINT), _Waiting):
        yield
        return
    waiting = _Waiting()
    signal.signal(signal.SIGINT, waiting)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, waiting.before)
    if waiting.pressed:
        waiting.hand_on()


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
            handler.hand_on()
        yield
    finally:
        handler.at_once = False
