"""Ctrl-C where libraries would lose it."""

import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from hpo.interrupts import heard, interruptible, uninterrupted

pytestmark = pytest.mark.usefixtures("ctrl_c")


def test_what_a_library_swallowed_is_raised_at_the_next_check():
    with heard() as check:
        check()
        with suppress(KeyboardInterrupt):  # as a destructor does
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


class Held:
    """Something that a weak reference may be to."""


def drop(error):
    """Raise an error, or a Ctrl-C, where Python drops it."""

    def end(_reference: object) -> None:
        if error is None:
            signal.raise_signal(signal.SIGINT)
        else:
            raise error

    held = Held()
    reference = weakref.ref(held, end)
    del held
    assert reference() is None


@pytest.mark.parametrize("error", [None, OSError])
def test_what_python_drops_leaves_no_traceback_and_other_errors_theirs(error, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: shown.append(dropped.exc_type))
    monkeypatch.setattr("hpo.interrupts.PRESSED_AGAIN_AFTER_S", 60)
    with heard() as check:
        drop(error)
        with pytest.raises(KeyboardInterrupt) if error is None else nullcontext():
            check()
    assert shown == ([] if error is None else [error])


def test_what_python_drops_is_raised_again_in_work_that_never_checks():
    steps = []

    def work() -> None:
        drop(None)
        steps.append("goes on")
        time.sleep(60)
        steps.append("never")

    with pytest.raises(KeyboardInterrupt), heard():
        work()
    assert steps == ["goes on"]


def test_it_is_not_raised_again_once_the_block_is_left(monkeypatch):
    monkeypatch.setattr("hpo.interrupts.PRESSED_AGAIN_AFTER_S", 0.5)
    with heard():
        drop(None)
    time.sleep(1)


def test_it_is_raised_at_once_where_nobody_swallows_it():
    with pytest.raises(KeyboardInterrupt), heard():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_transactions_are_finished_first_all_the_same():
    steps = []

    def work() -> None:
        with heard() as check:
            with suppress(KeyboardInterrupt), uninterrupted():
                signal.raise_signal(signal.SIGINT)
                steps.append("told")
            signal.raise_signal(signal.SIGINT)
            steps.append("never")
            check()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["told"]


def test_a_second_one_does_not_wait_for_transactions_that_hang():
    steps = []

    def hang() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            steps.append("waits")
            signal.raise_signal(signal.SIGINT)
            steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        hang()
    assert steps == ["waits"]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("in_a_wait", [False, True])
def test_what_waited_for_transactions_and_was_swallowed_then_is_not_lost_either(in_a_wait):
    steps = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            steps.append("told")
            with interruptible() if in_a_wait else nullcontext():
                steps.append("waited")

    with heard() as check:
        with suppress(KeyboardInterrupt):  # as a destructor does
            work()
            steps.append("never")
        with pytest.raises(KeyboardInterrupt):
            check()
    assert steps == (["told"] if in_a_wait else ["told", "waited"])


def test_a_handler_that_only_takes_note_is_told_after_the_transactions():
    notes = []
    signal.signal(signal.SIGINT, lambda *_: notes.append("pressed"))
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
        notes.append("done")
    assert notes == ["done", "pressed"]


def test_it_stays_ignored_where_it_is():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with heard() as check:
        signal.raise_signal(signal.SIGINT)
        check()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


IN_TEXT = """
import signal, sys
from hpo.interrupts import heard
signal.signal(signal.SIGINT, signal.default_int_handler)
with heard():
    try:
        exec("signal.raise_signal(signal.SIGINT)")
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_text_that_is_run_does_not_change_the_exit_code(tmp_path):
    (tmp_path / "in_text.py").write_text(IN_TEXT)
    places = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    ended = subprocess.run([sys.executable, "-m", "in_text"], env={**os.environ, "PYTHONPATH": places}, timeout=60)
    assert ended.returncode == 130
