"""Asking a sampler in memory and keeping its trials in the database, a transaction per batch.

Optuna's `ask` commits once per parameter and attribute and re-reads the running trials in between, which for a whole
generation costs more than evaluating a small model. Here the sampler works on an in-memory copy of the study, and
trials enter the database whole: running, with their parameters and attributes. What stands in the database is the same.

Several workers share a study, each with a copy of its own. `sync` takes in what the others finished, and learns what
they have running; it reads new trials alone, so that it costs no more in a long study than in a short one.
"""

import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseGASampler, BaseSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.bulk import (
    ENDED,
    FAILURE,
    KEY,
    MAX_ATTEMPTS,
    WORK,
    Batch,
    Known,
    Outcome,
    Stale,
    claim_trials,
    enter_trials,
    finish_and_look,
    finish_trials,
    look,
    queue_again,
    states_of,
)
from hpo.heartbeats import Heartbeats, is_dead
from hpo.spool import Result, Spool
from hpo.staircase import Array, behind
from hpo.storage import Storage

logger = logging.getLogger(__name__)

MOST_TRIALS = 1000
"""Trials in the sampler's copy of the study at most; what it takes to ask grows with them."""
KEPT_TRIALS = 750
"""Trials that are left there when those that matter least are taken out."""
REDRAWS = 4
"""How many times as many trials are drawn as asked for, where others have those running that were drawn."""
DIED = "its process ended"


class TrialLost(Exception):
    """A trial of this worker was finished by another, and need not be gone on with."""


@dataclass(frozen=True, kw_only=True)
class AskedTrial:
    """A trial that is in the database, running, with its parameters.

    Attributes:
        number: Its number in the study.
        trial_id: Its id in the database.
        params: What the sampler chose.
        system_attrs: What the sampler remembers about it, such as its generation.
        user_attrs: What is recorded with it.
    """

    number: int
    trial_id: int
    params: Mapping[str, Any]
    system_attrs: Mapping[str, Any] = field(default_factory=dict)
    user_attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What became of a trial.

    Attributes:
        trial: The trial.
        values: Its objectives; None where it was stopped early and has none.
        attributes: User attributes to add.
        stopped: Whether it was stopped early.
    """

    trial: AskedTrial
    values: Sequence[float] | None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    stopped: bool = False

    @property
    def state(self) -> TrialState:
        """As Optuna calls it."""
        return TrialState.PRUNED if self.stopped or self.values is None else TrialState.COMPLETE


@dataclass(frozen=True)
class _Elsewhere:
    """A trial that another worker has running: its worker, and the key of what it evaluates."""

    number: int
    worker: str | None
    key: str | None
    params: Mapping[str, Any]


class MirroredStudy:
    """A study in a database and its copy in memory, from which the sampler draws.

    Attributes:
        study: The study in the database.
        storage: The database.
        distributions: The search space, the same for all trials.
        memory: Where the copy is.
        copy: The study that the sampler sees: all trials of a short study, and of a long one those that matter to it.
        heartbeats: This worker's; None where the process is the only one.
        newest_number: The greatest number of a trial that it knows; -1 where there is none.
        lost: Numbers of trials of this worker that others have finished, as far as the database was told of them.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: Storage,
        sampler: BaseSampler,
        distributions: Mapping[str, BaseDistribution],
        *,
        pruner: optuna.pruners.BasePruner | None = None,
        heartbeats: Heartbeats | None = None,
        spool: Spool | None = None,
    ) -> None:
        self.study = study
        self.storage = storage
        self.distributions = dict(distributions)
        self.heartbeats = heartbeats
        self.spool = spool
        self._kept: set[int] = set()
        self._make_copy(sampler, pruner or optuna.pruners.NopPruner())
        self.newest_number = -1
        self.lost: set[int] = set()
        self._newest = 0
        self._last_number = -1
        self._ended = 0
        self._copy_of: dict[int, int] = {}
        self._mine: dict[int, AskedTrial] = {}
        self._told: set[int] = set()
        self._unsettled: list[Told] = []
        self._unsettled_file: Path | None = None
        self._elsewhere: dict[int, _Elsewhere] = {}
        self._waiting: dict[int, FrozenTrial] = {}
        self._news: list[FrozenTrial] = []
        self._read_at = float("-inf")
        self._looked: tuple[list[tuple[int, int, TrialState]], list[FrozenTrial]] | None = None
        self.sync()
        if isinstance(sampler, BaseGASampler):
            self._find_parents(sampler)

    @property
    def ended(self) -> int:
        """Trials that were completed or stopped early, as far as this worker knows."""
        return self._ended + len(self._told)

    @property
    def workers(self) -> int:
        """Workers that have trials running, this one counted."""
        return 1 + len({trial.worker for trial in self._elsewhere.values()})

    @property
    def unfinished(self) -> list[int]:
        """Ids of the trials that are running or waiting."""
        return [*self._mine, *self._elsewhere, *self._waiting]

    def unfinished_numbers(self) -> list[int]:
        """Numbers of the trials that are running or waiting."""
        return [trial.number for trials in (self._mine, self._elsewhere, self._waiting) for trial in trials.values()]

    def under_way(self) -> list[Mapping[str, Any]]:
        """The parameters of the trials that others have running or that wait to be begun again."""
        running = [trial.params for trial in self._elsewhere.values()]
        return running + [trial.params for trial in self._waiting.values()]

    def take_news(self) -> list[FrozenTrial]:
        """Trials that others finished, and that have not been taken before."""
        news, self._news = self._news, []
        return news

    def sync(self) -> None:
        """Take in what others did, and put trials of dead workers back into the queue.

        A server's answer may be a moment old; so old an answer is not asked for anew.
        """
        if time.monotonic() - self._read_at > self.storage.fresh_s:
            self._read()
        dead = [
            Stale(trial_id=trial_id, worker=trial.worker)
            for trial_id, trial in self._elsewhere.items()
            if trial.worker is None or is_dead(trial.worker)
        ]
        if self.heartbeats is not None:
            dead += [one for one in self.heartbeats.stale() if one.trial_id in self._elsewhere]
        if dead:
            queue_again(self.storage, self.study._study_id, dead, DIED)
            for one in dead:
                self._forget(one.trial_id)  # whoever has it now is read anew
            self._read(reread={one.trial_id for one in dead})
        self._watch()

    def has(self, trials: int) -> bool:
        """Whether so many trials were completed or stopped early, and the database has them all."""
        if self.ended >= trials:
            self.settle()
        return self.ended >= trials

    def enqueue(self, params: Mapping[str, Any]) -> None:
        """Have the next ask return these parameters."""
        self.copy.enqueue_trial(dict(params))

    def ask(
        self,
        count: int,
        attributes_of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda params: {},
        *,
        key_of: Callable[[Mapping[str, Any]], str | None] = lambda params: None,
        first: Sequence[Mapping[str, Any]] = (),
        limit: int | None = None,
    ) -> list[AskedTrial]:
        """Put several trials into the database, running: those that dead workers left, else newly drawn ones.

        Args:
            count: Trials wanted. Fewer are returned where the limit is reached or others have the same running.
            attributes_of: Gives a trial's user attributes for its parameters.
            key_of: Equal for parameters that one evaluation answers; None where there is no such thing.
            first: Parameters that come before any that the sampler chooses, as many as are wanted.
            limit: Finished and running trials that the study shall have in all.
        """
        asked = self._claim(count, limit, attributes_of, key_of)
        drawn = []
        if not asked:
            for params in first[:count]:
                self.enqueue(params)
            drawn = self._draw_distinct(count, attributes_of, key_of)
        if drawn:
            worker = None if self.heartbeats is None else self.heartbeats.worker
            batch = None if worker is None else Batch(worker=worker, token=uuid.uuid4().hex)
            entered = self._enter(drawn, limit, batch)
            for place, trial in zip(entered, drawn, strict=True):
                if place is None:
                    self.memory.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                    continue
                number, trial_id = place
                asked.append(_asked(trial, number, trial_id))
                self._copy_of[trial_id] = trial._trial_id
        self._mine.update({trial.trial_id: trial for trial in asked})
        self.newest_number = max([self.newest_number, *(trial.number for trial in asked)])
        self.settle()
        self._watch()
        self._thin_out()
        return asked

    def _enter(
        self, drawn: Sequence[FrozenTrial], limit: int | None, batch: Batch | None
    ) -> list[tuple[int, int] | None]:
        """Enter trials, and with them what is not settled; returns their places."""

        def enter(outcomes: Sequence[Outcome]) -> list[tuple[int, int] | None]:
            return enter_trials(
                self.storage,
                self.study._study_id,
                drawn,
                limit=limit,
                known=self._known(),
                batch=batch,
                outcomes=outcomes,
            )

        try:
            with self._settling():
                entered = enter([_outcome(one) for one in self._unsettled])
        except UpdateFinishedTrialError:
            self.settle()
            return enter([])
        self._unsettled = []
        return entered

    def tell(self, told: Sequence[Told], *, asks: bool = False) -> None:
        """Finish trials in the database and let the sampler learn from them.

        One that somebody else has finished meanwhile, having taken this worker for dead, stays as it is. Until the
        database has them, the results are on disk.

        Args:
            told: What became of trials of this worker.
            asks: Whether `sync` and `ask` come next, which then share a call of the database with this: what the others
                did is read along, or, where calls are dear, results are entered with the trials that are asked for. A
                caller that does not come to ask must `settle`.
        Raises:
            ResultsKept: The database did not take them.
        """
        results = [
            Result(
                number=one.trial.number,
                state=one.state,
                values=one.values,
                attributes=one.attributes,
                params=one.trial.params,
            )
            for one in told
        ]
        lost: set[int] = set()
        if asks and told and self.storage.joins_calls:
            self._unsettled_file = None if self.spool is None else self.spool.put(results)
            self._unsettled = list(told)
        else:
            self._kept.update(one.trial.trial_id for one in told if self.spool is not None)
            with nullcontext() if self.spool is None else self.spool.kept(results, self.storage.patience):
                lost = self._finish(told, looks=asks)
            self._kept.clear()
        for one in told:
            del self._mine[one.trial.trial_id]
            if one.trial.trial_id in lost:
                self._lose(one.trial)
            else:
                self._learn(one)
                self._told.add(one.trial.trial_id)

    def settle(self) -> None:
        """Finish in the database what `tell` has left to `ask`.

        The sampler has learned from it, also from what somebody else has finished meanwhile.
        """
        if not self._unsettled:
            return
        with self._settling():
            lost = self._finish(self._unsettled, looks=False)
        for one in self._unsettled:
            if one.trial.trial_id not in lost:
                continue
            if one.trial.trial_id in self._told:
                self._told.remove(one.trial.trial_id)
            else:  # `sync` has counted it
                self._ended -= 1
            self._lose(one.trial)
        self._unsettled = []

    def _settling(self) -> AbstractContextManager[None]:
        """While the database is told what is not settled."""
        if self.spool is None or self._unsettled_file is None or not self._unsettled:
            return nullcontext()
        return self.spool.telling(self._unsettled_file, len(self._unsettled), self.storage.patience)

    def _lose(self, trial: AskedTrial) -> None:
        """A trial that somebody else has finished; what became of it is read with the next `sync`."""
        logger.warning("Trial %d was finished by another worker.", trial.number)
        self.lost.add(trial.number)
        self._elsewhere[trial.trial_id] = _Elsewhere(trial.number, None, None, trial.params)

    @contextmanager
    def _may_be_lost(self, trial: AskedTrial) -> Iterator[None]:
        """Give a trial up that turns out to be finished by somebody else."""
        try:
            yield
        except UpdateFinishedTrialError as error:
            del self._mine[trial.trial_id]
            self._lose(trial)
            raise TrialLost(f"Trial {trial.number} was finished by another worker.") from error

    def _watch(self) -> None:
        """Say whose heartbeats are to be recorded and watched."""
        if self.heartbeats is None:
            return
        others = {number: trial.worker for number, trial in self._elsewhere.items() if trial.worker is not None}
        self.heartbeats.watch([*self._mine, *(one.trial.trial_id for one in self._unsettled)], others)

    def _finish(self, told: Sequence[Told], looks: bool) -> set[int]:
        """Finish trials in the database; returns the ids of those that somebody else has finished."""
        outcomes = [_outcome(one) for one in told]
        if looks:
            known = Known(newest=self._newest, unfinished=self._unfinished_up_to_newest())
            try:
                self._looked = finish_and_look(self.storage, outcomes, self.study._study_id, known, self._seen())
                return set()
            except UpdateFinishedTrialError:
                logger.debug("Some of the trials were finished by another worker.")
        lost: set[int] = set()
        while True:
            try:
                finish_trials(self.storage, [outcome for outcome in outcomes if outcome.trial_id not in lost])
                return lost
            except UpdateFinishedTrialError:
                before = len(lost)
                states = states_of(self.storage, [outcome.trial_id for outcome in outcomes])
                lost |= {trial_id for trial_id, state in states.items() if state.is_finished()}
                if len(lost) == before:
                    raise

    def fail(self, asked: Sequence[AskedTrial], reason: str) -> None:
        """Fail trials that are still running, and record why; those that are finished stay as they are."""
        states = states_of(self.storage, [trial.trial_id for trial in asked])
        running = [
            trial.trial_id
            for trial in asked
            if self._may_give_up(trial) and states.get(trial.trial_id) == TrialState.RUNNING
        ]
        self._end_failed(running, reason)
        for trial_id in running:
            del self._mine[trial_id]
            self._forget(trial_id)

    def put_back(self, asked: Sequence[AskedTrial], reason: str, *, counts: bool = True) -> None:
        """Put trials of this worker back into the queue, for any worker to begin again; see `queue_again`."""
        worker = None if self.heartbeats is None else self.heartbeats.worker
        mine = [trial.trial_id for trial in asked if self._may_give_up(trial)]
        stale = [Stale(trial_id=trial_id, worker=worker) for trial_id in mine]
        queue_again(self.storage, self.study._study_id, stale, reason, counts=counts)
        for trial_id in mine:
            del self._mine[trial_id]
            self._forget(trial_id)
        self._read(reread=set(mine))

    def _may_give_up(self, trial: AskedTrial) -> bool:
        """Whether it is this worker's, and has no result that waits on disk for the database."""
        return trial.trial_id in self._mine and trial.trial_id not in self._kept

    def count_anew(self, trial: AskedTrial, attributes: Mapping[str, Any]) -> None:
        """Count the attempts at a trial from this one on, since those before have got somewhere; say where to.

        Raises:
            TrialLost: Another worker has finished it.
        """
        with self._may_be_lost(trial):
            for key, value in attributes.items():
                self.storage.set_trial_user_attr(trial.trial_id, key, value)
            work = self.storage.get_trial_system_attrs(trial.trial_id).get(WORK, {})
            self.storage.set_trial_system_attr(trial.trial_id, WORK, {**work, "attempt": 1})

    def clear_queue(self, reason: str) -> None:
        """Fail trials that wait to be begun again; what a user has queued stays."""
        begun = [trial_id for trial_id, trial in self._waiting.items() if WORK in trial.system_attrs]
        self._end_failed(begun, reason)

    def _end_failed(self, trial_ids: Sequence[int], reason: str) -> None:
        """Fail trials in the database, and record why."""
        fail = {FAILURE: reason}
        finish_trials(
            self.storage,
            [Outcome(trial_id=trial_id, state=TrialState.FAIL, attributes=fail) for trial_id in trial_ids],
        )

    def report(self, trial: AskedTrial, value: float, step: int) -> bool:
        """Record an intermediate value; returns whether the pruner would stop the trial.

        Raises:
            TrialLost: Another worker has finished the trial, having taken this one for dead.
        """
        with self._may_be_lost(trial):
            self.storage.set_trial_intermediate_value(trial.trial_id, step, value)
        copy_id = self._copy_of[trial.trial_id]
        self.memory.set_trial_intermediate_value(copy_id, step, value)
        return self.copy.pruner.prune(self.copy, self.memory.get_trial(copy_id))

    def _known(self) -> Known:
        return Known(
            newest=self._newest,
            number=self._last_number,
            ended=self._ended,
            unfinished=self._unfinished_up_to_newest(),
        )

    def _unfinished_up_to_newest(self) -> list[int]:
        unfinished = [*self.unfinished, *self._told]
        return [trial_id for trial_id in unfinished if trial_id <= self._newest]

    def _read(self, reread: Collection[int] = ()) -> None:
        """Look at new trials and those that were unfinished."""
        self._read_at = time.monotonic()
        looked, self._looked = self._looked, None
        if looked is None or reread:
            known = Known(newest=self._newest, unfinished=[*self._unfinished_up_to_newest(), *reread])
            looked = look(self.storage, self.study._study_id, known, self._seen())
        rows, changed = looked
        whole = {trial._trial_id: trial for trial in changed}
        for trial_id, number, _ in rows:
            if trial_id > self._newest:
                self._newest, self._last_number = trial_id, number
            if trial_id in self._told:
                self._told.remove(trial_id)
                self._ended += 1
            elif trial_id in whole:
                self._take_in(whole[trial_id])

    def _seen(self) -> dict[int, TrialState | None]:
        """The unfinished trials as this worker has them; of its own it wants to know no more."""
        return {
            **dict.fromkeys(self._elsewhere, TrialState.RUNNING),
            **dict.fromkeys(self._waiting, TrialState.WAITING),
            **dict.fromkeys((*self._mine, *self._told), None),
        }

    def _take_in(self, trial: FrozenTrial) -> None:
        """A trial of another worker, as it stands in the database now."""
        trial_id = trial._trial_id
        self._waiting.pop(trial_id, None)
        self._elsewhere.pop(trial_id, None)
        self.newest_number = max(self.newest_number, trial.number)
        if trial.state in ENDED:
            self._ended += 1
            self._news.append(trial)
            if trial_id in self._copy_of:
                copy_id = self._copy_of.pop(trial_id)
                for step, value in trial.intermediate_values.items():
                    self.memory.set_trial_intermediate_value(copy_id, step, value)
                for key, value in trial.user_attrs.items():
                    self.memory.set_trial_user_attr(copy_id, key, value)
                self.memory.set_trial_state_values(copy_id, trial.state, trial.values)
            elif set(trial.params) == set(self.distributions):
                self._add(trial)
            return
        self._forget(trial_id)
        if trial.state == TrialState.WAITING:
            self._waiting[trial_id] = trial
        elif trial.state == TrialState.RUNNING:
            attrs = trial.system_attrs
            worker = attrs.get(WORK, {}).get("worker")
            self._elsewhere[trial_id] = _Elsewhere(trial.number, worker, attrs.get(KEY), trial.params)
            if set(trial.params) == set(self.distributions):
                self._copy_of[trial_id] = self._add(trial)

    def _forget(self, trial_id: int) -> None:
        """A trial that does not run any more, and may run again."""
        self._elsewhere.pop(trial_id, None)
        self._waiting.pop(trial_id, None)
        copy_id = self._copy_of.pop(trial_id, None)
        if copy_id is not None:
            self.memory.set_trial_state_values(copy_id, TrialState.FAIL)

    def _add(self, trial: FrozenTrial) -> int:
        """Put a trial into the copy; returns its id there."""
        copy_id: int = self.memory.create_new_trial(self.copy._study_id, template_trial=trial)
        return copy_id

    def _claim(
        self,
        count: int,
        limit: int | None,
        attributes_of: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        key_of: Callable[[Mapping[str, Any]], str | None],
    ) -> list[AskedTrial]:
        """Trials out of the queue; one alone that has its last attempt, lest it take others with it once more."""
        if not self._waiting:
            return []
        chosen = sorted(self._waiting)[:count]
        last = [
            number
            for number in chosen
            if self._waiting[number].system_attrs.get(WORK, {}).get("attempt") == MAX_ATTEMPTS
        ]
        worker = None if self.heartbeats is None else self.heartbeats.worker
        claimed = claim_trials(
            self.storage, self.study._study_id, last[:1] or chosen, worker, limit=limit, known=self._known()
        )
        asked = []
        for trial_id in claimed:
            trial = self._waiting.pop(trial_id)
            if (problem := self._outside(trial)) is not None:
                self._end_failed([trial_id], problem)
                logger.warning("Trial %d failed: %s.", trial.number, problem)
                continue
            if set(trial.params) != set(self.distributions):
                trial = self._complete(trial)
            else:
                self._copy_of[trial_id] = self._add(_running(trial))
            self._describe(trial, attributes_of(trial.params), key_of(trial.params))
            asked.append(_asked(trial, trial.number, trial_id))
        return asked

    def _outside(self, trial: FrozenTrial) -> str | None:
        """Which of a user's queued parameters the search space does not hold; None where it holds them all."""
        queued = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        for name, distribution in self.distributions.items():
            if name in queued and not _holds(distribution, queued[name]):
                return f"it was queued with {name}={queued[name]!r}, outside the range in the study file"
        return None

    def _complete(self, trial: FrozenTrial) -> FrozenTrial:
        """Draw the parameters that a user's queued trial leaves open."""
        self.enqueue({**trial.system_attrs.get("fixed_params", {}), **trial.params})
        drawn = self._draw(lambda params: trial.user_attrs)
        for name, distribution in self.distributions.items():
            if name in trial.params:
                continue
            internal = distribution.to_internal_repr(drawn.params[name])
            self.storage.set_trial_param(trial._trial_id, name, internal, distribution)
        self._copy_of[trial._trial_id] = drawn._trial_id
        trial.params, trial.distributions = drawn.params, drawn.distributions
        return trial

    def _describe(self, trial: FrozenTrial, attributes: Mapping[str, Any], key: str | None) -> None:
        """Record the attributes and the key that a user's queued trial lacks."""
        trial_id, copy_id = trial._trial_id, self._copy_of[trial._trial_id]
        for name, value in attributes.items():
            if name not in trial.user_attrs:
                self.storage.set_trial_user_attr(trial_id, name, value)
                self.memory.set_trial_user_attr(copy_id, name, value)
        if key is not None and KEY not in trial.system_attrs:
            self.storage.set_trial_system_attr(trial_id, KEY, key)
            self.memory.set_trial_system_attr(copy_id, KEY, key)
            trial.system_attrs = {**trial.system_attrs, KEY: key}
        trial.user_attrs = {**attributes, **trial.user_attrs}

    def _draw_distinct(
        self,
        count: int,
        attributes_of: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        key_of: Callable[[Mapping[str, Any]], str | None],
    ) -> list[FrozenTrial]:
        """Trials that nobody else has running."""
        taken = {trial.key for trial in self._elsewhere.values()} - {None}
        drawn: list[FrozenTrial] = []
        for _ in range(REDRAWS * count):
            if len(drawn) == count:
                break
            trial = self._draw(attributes_of)
            key = key_of(trial.params)
            if key in taken:
                self.memory.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                continue
            if key is not None:
                self.memory.set_trial_system_attr(trial._trial_id, KEY, key)
                trial = self.memory.get_trial(trial._trial_id)
            drawn.append(trial)
        return drawn

    def _draw(self, attributes_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> FrozenTrial:
        """A trial that runs in the copy and is not in the database yet."""
        trial = self.copy.ask(self.distributions)
        if isinstance(self.copy.sampler, BaseGASampler):
            # Optuna gives no generation to a trial whose parameters were all enqueued, so it would never be a parent.
            self.copy.sampler.get_trial_generation(self.copy, self.memory.get_trial(trial._trial_id))
        for key, value in attributes_of(trial.params).items():
            trial.set_user_attr(key, value)
        return self.memory.get_trial(trial._trial_id)

    def _learn(self, told: Told) -> None:
        """Finish the trial in the sampler's copy."""
        copy_id = self._copy_of.pop(told.trial.trial_id)
        for key, value in told.attributes.items():
            self.memory.set_trial_user_attr(copy_id, key, value)
        self.memory.set_trial_state_values(copy_id, told.state, told.values)

    # The copy of a long study

    def _make_copy(self, sampler: BaseSampler, pruner: optuna.pruners.BasePruner) -> None:
        self.memory = InMemoryStorage()
        self.copy = optuna.create_study(
            storage=self.memory, directions=self.study.directions, sampler=sampler, pruner=pruner
        )

    def _find_parents(self, sampler: BaseGASampler) -> None:
        """Choose the parents of each generation, the first first: Optuna would recurse from the last."""
        trials = self.memory.get_all_trials(self.copy._study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        generations = [trial.system_attrs.get(sampler._get_generation_key(), 0) for trial in trials]
        for generation in range(1, max(generations, default=0) + 1):
            sampler.get_parent_population(self.copy, generation)

    def _thin_out(self) -> None:
        """Take those trials out of the copy that matter least, once it has grown long.

        This follows an ask, so a sampler has seen each trial at least once.
        """
        trials = self.memory.get_all_trials(self.copy._study_id, deepcopy=False)
        if len(trials) <= MOST_TRIALS:
            return
        sampler, before = self.copy.sampler, self.memory.get_study_system_attrs(self.copy._study_id)
        parents: dict[str, list[int]] = {}
        if isinstance(sampler, BaseGASampler):
            prefix = sampler._get_parent_cache_key_prefix()
            named = [key for key in before if key.startswith(prefix)]
            last = sorted(named, key=lambda key: int(key.removeprefix(prefix)))[-2:]
            parents = {key: before[key] for key in last}
        needed = {copy_id for ids in parents.values() for copy_id in ids} | set(self._copy_of.values())
        kept = _that_matter(trials, needed, sampler, self.study.directions)
        self._make_copy(sampler, self.copy.pruner)
        new_id_of = {trial._trial_id: self._add(trial) for trial in kept}
        self._copy_of = {trial_id: new_id_of[copy_id] for trial_id, copy_id in self._copy_of.items()}
        for key, ids in parents.items():
            self.memory.set_study_system_attr(self.copy._study_id, key, [new_id_of[copy_id] for copy_id in ids])


def _that_matter(
    trials: Sequence[FrozenTrial], needed: set[int], sampler: BaseSampler, directions: Sequence[StudyDirection]
) -> list[FrozenTrial]:
    """`KEPT_TRIALS` or a few more: the unfinished, the last generations, the best and the latest."""
    key = sampler._get_generation_key() if isinstance(sampler, BaseGASampler) else ""
    newest = max((trial.system_attrs.get(key, 0) for trial in trials), default=0)
    kept = {
        trial.number
        for trial in trials
        if trial._trial_id in needed
        or trial.state in (TrialState.RUNNING, TrialState.WAITING)
        or (key and trial.system_attrs.get(key, -1) >= newest - 1)
    }
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    behind_T = _behind(complete, directions)
    best = [complete[place].number for place in np.argsort(behind_T, kind="stable")]
    latest = [trial.number for trial in reversed(trials) if trial.state in ENDED]
    for numbers, most in ((best, (KEPT_TRIALS + len(kept)) // 2), (latest, KEPT_TRIALS)):
        for number in numbers:
            if len(kept) >= most:
                break
            kept.add(number)
    return [trial for trial in trials if trial.number in kept]


def _behind(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> Array:
    """How far each trial is from the best of one objective, or from the front of several."""
    signs = np.array([1.0 if direction == StudyDirection.MAXIMIZE else -1.0 for direction in directions])
    values_TO = np.array([trial.values for trial in trials], dtype=np.float64).reshape(len(trials), len(signs)) * signs
    if len(signs) == 1:
        best_first_T: Array = -values_TO[:, 0]
        return best_first_T
    return behind(-values_TO[:, 1:], values_TO[:, 0])


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):  # of another type
        return False


def _running(trial: FrozenTrial) -> FrozenTrial:
    return create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
    )


def _outcome(told: Told) -> Outcome:
    return Outcome(trial_id=told.trial.trial_id, state=told.state, values=told.values, attributes=told.attributes)


def _asked(trial: FrozenTrial, number: int, trial_id: int) -> AskedTrial:
    return AskedTrial(
        number=number,
        trial_id=trial_id,
        params=trial.params,
        system_attrs=trial.system_attrs,
        user_attrs=trial.user_attrs,
    )
