"""Engines in processes of their own, for a comparison of their speed.

In one process they slow each other down, the quickest most; where a model is served it has a process to itself.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from model.children import how_it_ended, live_and_die_with_caller, portable

GRACE_S = 10.0
"""How long a process that is told to end may take; what it holds of the system's is given back then."""

Run = Callable[[], float | None]
"""What is timed. One that keeps its own time, as in another process, returns the seconds."""
Maker = Callable[[Any], Run]
"""Makes an engine's runs over batches of any form."""


class EngineDied(Exception):
    """The process of an engine was killed, or ended without a word; the message says how."""


@dataclass(frozen=True)
class Engine:
    """What another process makes an engine by.

    Attributes:
        make: Found by its module and name there; makes the engine.
        arguments: Of `make`; sent to the process.
    """

    make: Callable[..., Maker]
    arguments: tuple[Any, ...]


@contextmanager
def apart(engine: Engine, name: str) -> Iterator[Maker]:
    """An engine in a process of its own, until the block ends; it computes with as many threads as the caller's.

    One run at a time: what is made for other batches replaces what was made before.

    Args:
        engine: What it is made by.
        name: Where people read of it.
    Raises:
        EngineDied: The process ended, while it was made or in a run.
        Exception: Whatever making the engine raised there.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(engine, torch.get_num_threads(), theirs), daemon=True)
    process.start()
    theirs.close()

    def ask(*question: Any) -> float | None:
        try:
            ours.send(question)
            answer = ours.recv()
        except (EOFError, OSError) as error:
            raise EngineDied(
                f"the process of {name} {how_it_ended(process)}; see that the machine has memory enough"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        seconds: float | None = answer
        return seconds

    def make(batches: Any) -> Run:
        ask("take", batches)
        return lambda: ask("run")

    try:
        ask("make")
        yield make
    except BaseException:
        process.kill()  # it may be at work
        raise
    finally:
        ours.close()
        process.join(GRACE_S)
        process.kill()
        process.join()


def _serve(engine: Engine, threads: int, caller: Connection) -> None:
    """Answer what the caller asks."""
    live_and_die_with_caller()
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made: Maker | None = None
    run: Run | None = None
    with suppress(EOFError, ConnectionError):  # the caller is gone
        while True:
            question = caller.recv()
            answer: float | Exception | None = None
            try:
                match question:
                    case ("make",):
                        made = engine.make(*engine.arguments)
                    case ("take", batches) if made is not None:
                        run = made(batches)
                    case ("run",) if run is not None:
                        answer = _seconds(run)
            except Exception as error:
                answer = portable(error)
            caller.send(answer)


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
