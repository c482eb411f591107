"""Asking a sampler in memory and keeping its trials in the database, one transaction per ask and one per tell.

Optuna's `ask` commits once per parameter and attribute and re-reads the running trials in between, which for a whole
generation costs more than evaluating a small model. Here the sampler works on an in-memory copy of the study, and a
trial enters the database whole: running, with its parameters and attributes. What stands in the database is the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseGASampler, BaseSampler
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

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
    """

    number: int
    trial_id: int
    params: Mapping[str, Any]
    system_attrs: Mapping[str, Any]


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

    def ask(self, attributes_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> AskedTrial:
        """Draw parameters and put the running trial into the database.

        Args:
            attributes_of: Gives the trial's user attributes for its parameters.
        """
        trial = self.copy.ask(self.distributions)
        if isinstance(self.copy.sampler, BaseGASampler):
            # Optuna gives no generation to a trial whose parameters were all enqueued, so it would never be a parent.
            self.copy.sampler.get_trial_generation(self.copy, self.memory.get_trial(trial._trial_id))
        drawn = self.memory.get_trial(trial._trial_id)
        self.copy.tell(trial, state=TrialState.FAIL)  # the sampler learns from the finished trial that `tell` adds
        template = FrozenTrial(
            number=-1,
            trial_id=-1,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=drawn.datetime_start,
            datetime_complete=None,
            params=drawn.params,
            distributions=drawn.distributions,
            user_attrs=dict(attributes_of(drawn.params)),
            system_attrs=drawn.system_attrs,
            intermediate_values={},
        )
        trial_id = self.storage.create_new_trial(self.study._study_id, template)
        number = self.storage.get_trial_number_from_id(trial_id)
        return AskedTrial(number=number, trial_id=trial_id, params=drawn.params, system_attrs=drawn.system_attrs)

    def tell(
        self, asked: AskedTrial, values: Sequence[float] | None, attributes: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Finish a trial in the database and let the sampler learn from it.

        Args:
            asked: The trial.
            values: Its objectives; None where it was stopped early.
            attributes: User attributes to add.
        """
        state = TrialState.PRUNED if values is None else TrialState.COMPLETE
        for key, value in attributes.items():
            self.storage.set_trial_user_attr(asked.trial_id, key, value)
        self.storage.set_trial_state_values(asked.trial_id, state, values)
        self.copy.add_trial(
            create_trial(
                state=state,
                params=dict(asked.params),
                distributions=self.distributions,
                values=None if values is None else list(values),
                user_attrs=dict(attributes),
                system_attrs=dict(asked.system_attrs),
            )
        )

    def fail(self, asked: AskedTrial, reason: str) -> None:
        """Fail a trial that is still running, and record why."""
        self.storage.set_trial_user_attr(asked.trial_id, "failure", reason)
        self.storage.set_trial_state_values(asked.trial_id, TrialState.FAIL)

    def orphans(self) -> list[AskedTrial]:
        """Running trials of a process that died, with all their parameters; any other running trial is failed."""
        orphans = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            asked = AskedTrial(
                number=trial.number, trial_id=trial._trial_id, params=trial.params, system_attrs=trial.system_attrs
            )
            if set(trial.params) == set(self.distributions):
                orphans.append(asked)
            else:
                self.fail(asked, "the process ended while asking")
        return orphans

    def running(self) -> set[int]:
        """Numbers of the trials that are running."""
        return {trial.number for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}
