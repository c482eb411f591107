"""One worker's part in a study that any number of workers complete together.

A worker asks for a few trials, evaluates them and tells what became of them, until the study has its total. What a
trial evaluates, a `Plan` knows; who works on what, the database.
"""

import logging
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial

from hpo.bulk import MAX_ATTEMPTS
from hpo.errors import HpoError
from hpo.interrupts import uninterrupted
from hpo.mirror import AskedTrial, MirroredStudy, Told
from hpo.outage import DATABASE_ERRORS, database_reason
from hpo.spool import ResultsKept
from model.data import SEED_LIMIT

logger = logging.getLogger(__name__)

SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.02, 1.0
"""Time between two looks at what the others do, where nothing is left to ask for; it doubles from look to look."""


@dataclass
class SearchTimes:
    """Where the wall time of a search went, in seconds.

    Attributes:
        total: Asking, evaluating and telling.
        model: In the encoder and its metric.
        storage: Asking and telling: the sampler and the database.
    """

    total: float = 0.0
    model: float = 0.0
    storage: float = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to one of the attributes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - start)


class Plan(Protocol):
    """What the trials of a study are."""

    def learn(self, trials: Sequence[FrozenTrial]) -> None:
        """Take in trials that others finished, or that were finished before."""

    def first(self) -> Sequence[Mapping[str, Any]]:
        """Parameters to be tried before the sampler chooses any, without those that are finished or under way."""

    def part(self, done: int) -> int:
        """How many trials to ask for together, given how many are finished."""

    def attributes_of(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """A new trial's user attributes."""

    def key_of(self, params: Mapping[str, Any]) -> str | None:
        """Equal for parameters that one evaluation answers; they are never evaluated by two workers."""

    def evaluate(self, asked: Sequence[AskedTrial]) -> list[Told]:
        """What becomes of trials; those that fail for good it has failed itself."""

    def passes(self, error: Exception) -> bool:
        """Whether an evaluation that failed so may succeed when it is tried again."""

    def resumes(self, error: BaseException) -> bool:
        """Whether the next run goes on with trials that this error ended, since they have left what they got to."""


def complete_study(mirror: MirroredStudy, plan: Plan, trials: int, times: SearchTimes | None = None) -> None:
    """Ask, evaluate and tell until the study has its trials; the last of them may be other workers'.

    Args:
        mirror: The study.
        plan: What its trials are.
        trials: Finished trials that the study shall have in all.
        times: Where the time that this takes is added up.
    Raises:
        HpoError: Trials fail again and again for a reason that should pass.
        ResultsKept: The database did not take results, which are on disk.
    """
    try:
        _complete(mirror, plan, trials, SearchTimes() if times is None else times)
    except BaseException as error:
        try:
            with uninterrupted():
                mirror.settle()
        except ResultsKept as kept:
            if isinstance(error, DATABASE_ERRORS):
                raise kept from error
            logger.warning("%s", kept)
        except DATABASE_ERRORS as database_error:
            logger.warning("Results could not be told (%s); their trials run again.", database_reason(database_error))
        raise


def _complete(mirror: MirroredStudy, plan: Plan, trials: int, times: SearchTimes) -> None:
    wait_s, failures = SHORTEST_WAIT_S, 0
    while True:
        asked: list[AskedTrial] = []  # outside the block at whose end a Ctrl-C is raised, so that none is forgotten
        with times.measure("total"):
            try:
                with times.measure("storage"), uninterrupted():
                    mirror.sync()
                    plan.learn(mirror.take_news())
                    if mirror.has(trials):
                        mirror.clear_queue("not needed: the study was complete without it")
                        return
                    asked = _ask(mirror, plan, trials)
                if not asked:
                    time.sleep(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                    continue
                wait_s = SHORTEST_WAIT_S
                told = plan.evaluate(asked)
                with times.measure("storage"), uninterrupted():
                    mirror.tell(told, asks=True)
                failures = 0
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                if not plan.passes(error):
                    _abandon(mirror, plan, asked, error)
                    raise
                failures += 1
                with uninterrupted():
                    mirror.put_back(asked, reason)
                logger.warning("Trials are tried again (%s).", reason)
                if failures == MAX_ATTEMPTS:
                    raise HpoError(f"{failures} evaluations failed in a row, the last because of {reason}") from error
            except BaseException as error:
                _abandon(mirror, plan, asked, error)
                raise


def part_of(size: int, workers: int) -> int:
    """Trials that each of several workers asks for, so that they have a generation of that size under way together."""
    return math.ceil(size / workers)


def worker_seed(study: optuna.Study, seed: int, workers: int) -> int:
    """A seed of the sampler: one that goes on where the study stands, and for one of several workers one of its own."""
    own = 0 if workers == 1 else random.SystemRandom().getrandbits(31)
    return (seed + len(study.get_trials(deepcopy=False)) + own) % SEED_LIMIT


def _ask(mirror: MirroredStudy, plan: Plan, trials: int) -> list[AskedTrial]:
    part = min(plan.part(mirror.ended), trials - mirror.ended)
    logger.info("%d of %d trials are done; asking for %d.", mirror.ended, trials, part)
    return mirror.ask(part, plan.attributes_of, key_of=plan.key_of, first=plan.first(), limit=trials)


def _abandon(mirror: MirroredStudy, plan: Plan, asked: Sequence[AskedTrial], error: BaseException) -> None:
    """Give up trials that this process asked for and will not tell, as far as the database still answers.

    After a Ctrl-C it is not waited for: neither here nor by what tidies up later.
    """
    if isinstance(error, KeyboardInterrupt):
        mirror.storage.patience.stop()
    if not asked:
        return
    reason = str(error) if isinstance(error, HpoError) else f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        reason = "interrupted"
    try:
        with uninterrupted():
            if plan.resumes(error):
                mirror.put_back(asked, reason, counts=False)
            else:
                mirror.fail(asked, reason)
    except DATABASE_ERRORS as database_error:
        why = database_reason(database_error)
        logger.warning("Running trials could not be given up (%s); the next run takes them over.", why)
