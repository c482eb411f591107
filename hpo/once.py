"""Optuna's calls that would do something twice where they are repeated after a lost connection, made to do it once.

Who loses the connection during a commit does not know whether it was made. So what enters or claims a trial leaves a
token with it, by which a repetition finds its own work done.
"""

import copy
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from hpo.transactions import in_one_transaction

TOKEN = "hpo:token"
"""System attribute of a trial: drawn by whoever entered it, or claimed it when it was waiting."""
REACH = 10_000
"""How many trials others may enter between a lost connection and the repetition."""


def new_token() -> str:
    """A token that nobody else has."""
    return uuid.uuid4().hex


def with_token(template: FrozenTrial | None) -> FrozenTrial:
    """A trial to be entered, with a token, a new one unless it has one; without a template a running one."""
    if template is None:
        template = create_trial(state=TrialState.RUNNING)
    if TOKEN in template.system_attrs:
        return template
    marked = copy.copy(template)
    marked.system_attrs = {**template.system_attrs, TOKEN: new_token()}
    return marked


def trial_of_token(session: Session, study_id: int, token: str) -> models.TrialModel | None:
    """The trial of a study that was entered with this token; the caller holds the study's row."""
    attributes = models.TrialSystemAttributeModel
    newest = session.scalar(select(func.max(models.TrialModel.trial_id))) or 0
    query = (
        select(models.TrialModel)
        .join(attributes, attributes.trial_id == models.TrialModel.trial_id)
        .where(
            models.TrialModel.study_id == study_id,
            attributes.trial_id > newest - REACH,
            attributes.key == TOKEN,
            attributes.value_json == f'"{token}"',
        )
    )
    return session.scalars(query).first()


@in_one_transaction
def claim_trial(session: Session, trial_id: int, token: str) -> bool:
    """Start a waiting trial; whether it was waiting, or was started with this very token."""
    trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
    if trial.state.is_finished():
        raise UpdateFinishedTrialError(f"Trial {trial.number} is finished already.")
    mark = models.TrialSystemAttributeModel.find_by_trial_and_key(trial, TOKEN, session)
    if trial.state != TrialState.WAITING:
        return mark is not None and bool(mark.value_json == f'"{token}"')
    if mark is None:
        mark = models.TrialSystemAttributeModel(trial_id=trial_id, key=TOKEN)
        session.add(mark)
    mark.value_json = f'"{token}"'
    trial.state = TrialState.RUNNING
    trial.datetime_start = datetime.now()
    return True


class Repeats(Protocol):
    """A storage that repeats calls while the database is away."""

    def through(self, call: Callable[[], bool]) -> bool:
        """Call, again and again while the database is away."""

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As Optuna's storages have it."""


def finish_once(
    storage: Repeats,
    trial_id: int,
    state: TrialState,
    values: Sequence[float] | None,
    finish: Callable[[Any, int, TrialState, Sequence[float] | None], bool],
) -> bool:
    """Finish a trial with `finish`; a repetition that finds it finished with the same values is content.

    Raises:
        UpdateFinishedTrialError: It was finished otherwise.
    """
    repeated = False

    def call() -> bool:
        nonlocal repeated
        try:
            return finish(storage, trial_id, state, values)
        except UpdateFinishedTrialError:
            if not repeated:
                raise
            there = storage.get_trial(trial_id)
            if there.state != state or (values is not None and there.values != list(values)):
                raise
            return True
        finally:
            repeated = True

    return storage.through(call)
