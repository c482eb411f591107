"""Asking a sampler in memory and keeping its trials in the database, a transaction per generation.

Optuna's `ask` commits once per parameter and attribute and re-reads the running trials in between, which for a whole
generation costs more than evaluating a small model. Here the sampler works on an in-memory copy of the study, and
trials enter the database whole: running, with their parameters and attributes. What stands in the database is the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseGASampler, BaseSampler
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.bulk import Outcome, enter_trials, finish_trials
from hpo.storage import FINISHED

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AskedTrial:
    """A trial that is in the database, running, with its parameters.

    Attributes:
        number: Its number in the study.
        trial_id: Its id in the database.
        params: What the sampler chose.
        system_attrs: What the sampler remembers about it, such as its generation.
        copy_id: Its id in the sampler's copy of the study; None where another process asked for it.
    """

    number: int
    trial_id: int
    params: Mapping[str, Any]
    system_attrs: Mapping[str, Any]
    copy_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Told:
    """What became of a trial.

    Attributes:
        trial: The trial.
        values: Its objectives; None where it was stopped early.
        attributes: User attributes to add.
    """

    trial: AskedTrial
    values: Sequence[float] | None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> TrialState:
        """As Optuna calls it."""
        return TrialState.PRUNED if self.values is None else TrialState.COMPLETE


class MirroredStudy:
    """A study in a database and its copy in memory, from which the sampler draws.

    Attributes:
        study: The study in the database.
        storage: The database.
        distributions: The search space, the same for all trials.
        memory: Where the copy is.
        copy: The study that the sampler sees.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: RDBStorage,
        sampler: BaseSampler,
        distributions: Mapping[str, BaseDistribution],
    ) -> None:
        self.study = study
        self.storage = storage
        self.distributions = dict(distributions)
        self.memory = InMemoryStorage()
        self.copy = optuna.create_study(storage=self.memory, directions=study.directions, sampler=sampler)
        self.copy.add_trials(study.get_trials(deepcopy=False, states=FINISHED))

    def enqueue(self, params: Mapping[str, Any]) -> None:
        """Have the next ask return these parameters."""
        self.copy.enqueue_trial(dict(params))

    def ask(
        self, count: int, attributes_of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda params: {}
    ) -> list[AskedTrial]:
        """Draw the parameters of several trials and put them into the database, running.

        Args:
            count: Trials to draw.
            attributes_of: Gives a trial's user attributes for its parameters.
        """
        drawn = [self._draw(attributes_of) for _ in range(count)]
        entered = enter_trials(self.storage, self.study._study_id, drawn)
        return [
            AskedTrial(
                number=number,
                trial_id=trial_id,
                params=trial.params,
                system_attrs=trial.system_attrs,
                copy_id=trial._trial_id,
            )
            for (number, trial_id), trial in zip(entered, drawn, strict=True)
        ]

    def tell(self, told: Sequence[Told]) -> None:
        """Finish trials in the database and let the sampler learn from them."""
        finish_trials(
            self.storage,
            [
                Outcome(trial_id=one.trial.trial_id, state=one.state, values=one.values, attributes=one.attributes)
                for one in told
            ],
        )
        for one in told:
            self._learn(one)

    def fail(self, asked: Sequence[AskedTrial], reason: str) -> None:
        """Fail trials that are still running, and record why; those that are finished stay as they are."""
        running = self.running()
        finish_trials(
            self.storage,
            [
                Outcome(trial_id=trial.trial_id, state=TrialState.FAIL, attributes={"failure": reason})
                for trial in asked
                if trial.number in running
            ],
        )

    def orphans(self) -> list[AskedTrial]:
        """Running trials of a process that died, with all their parameters; any other running trial is failed."""
        running = [
            AskedTrial(
                number=trial.number, trial_id=trial._trial_id, params=trial.params, system_attrs=trial.system_attrs
            )
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        ]
        whole = [trial for trial in running if set(trial.params) == set(self.distributions)]
        self.fail([trial for trial in running if trial not in whole], "the process ended while asking")
        return whole

    def running(self) -> set[int]:
        """Numbers of the trials that are running."""
        return {trial.number for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}

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
        trial = told.trial
        if trial.copy_id is None:
            self.copy.add_trial(
                create_trial(
                    state=told.state,
                    params=dict(trial.params),
                    distributions=self.distributions,
                    values=None if told.values is None else list(told.values),
                    user_attrs=dict(told.attributes),
                    system_attrs=dict(trial.system_attrs),
                )
            )
            return
        for key, value in told.attributes.items():
            self.memory.set_trial_user_attr(trial.copy_id, key, value)
        self.memory.set_trial_state_values(trial.copy_id, told.state, told.values)
