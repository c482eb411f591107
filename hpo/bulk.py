"""Entering and finishing many trials of a study in one transaction.

Optuna's storage enters a trial parameter by parameter, each with queries of its own, and commits every attribute: for a
generation of trials that takes longer than evaluating a small model on them. What is written here is what Optuna would
have written, in its own tables, a statement per table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session, selectinload


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a running trial ends.

    Attributes:
        trial_id: Its id in the database.
        state: A finished state.
        values: Its objectives; None where it has none.
        attributes: User attributes to add.
    """

    trial_id: int
    state: TrialState
    values: Sequence[float] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


def enter_trials(storage: RDBStorage, study_id: int, trials: Sequence[FrozenTrial]) -> list[tuple[int, int]]:
    """Enter running trials with their parameters and attributes: all of them, or none where the database fails.

    Args:
        storage: The database.
        study_id: The study's id in it.
        trials: Their parameters, distributions, attributes and starts count.
    Returns:
        Number in the study and id in the database of each, in order.
    Raises:
        KeyError: There is no such study.
        SQLAlchemyError: The database failed.
    """
    with Session(storage.engine) as session, session.begin():
        # Numbers are counted, so those who enter trials take turns: by this row, or in SQLite by the first insertion.
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        rows = [
            models.TrialModel(study_id=study_id, state=TrialState.RUNNING, datetime_start=trial.datetime_start)
            for trial in trials
        ]
        session.add_all(rows)
        session.flush()
        first = rows[0].count_past_trials(session) if rows else 0
        entered = [(number, int(row.trial_id)) for number, row in enumerate(rows, start=first)]
        for (number, trial_id), row, trial in zip(entered, rows, trials, strict=True):
            row.number = number
            session.add_all(_details_of(trial, trial_id))
        return entered


def finish_trials(storage: RDBStorage, outcomes: Sequence[Outcome]) -> None:
    """Finish running trials: all of them, or none where the database fails.

    Raises:
        UpdateFinishedTrialError: One of them is finished already.
        SQLAlchemyError: The database failed.
    """
    with Session(storage.engine) as session, session.begin():
        query = session.query(models.TrialModel).filter(
            models.TrialModel.trial_id.in_([outcome.trial_id for outcome in outcomes])
        )
        loaded = query.options(selectinload(models.TrialModel.user_attributes)).with_for_update().all()
        row_of = {int(row.trial_id): row for row in loaded}
        for outcome in outcomes:
            row = row_of[outcome.trial_id]
            if row.state.is_finished():
                raise UpdateFinishedTrialError(f"Trial {row.number} is finished already.")
            there = {attribute.key: attribute for attribute in row.user_attributes}
            for key, value in outcome.attributes.items():
                if key in there:
                    there[key].value_json = json.dumps(value)
                else:
                    session.add(_attribute(models.TrialUserAttributeModel, outcome.trial_id, key, value))
            for objective, value in enumerate(outcome.values or ()):
                session.add(_value(outcome.trial_id, objective, value))
            row.state = outcome.state
            row.datetime_complete = datetime.now()


def _details_of(trial: FrozenTrial, trial_id: int) -> list[models.BaseModel]:
    """A row per parameter and attribute."""
    parameters = [
        models.TrialParamModel(
            trial_id=trial_id,
            param_name=name,
            param_value=trial.distributions[name].to_internal_repr(value),
            distribution_json=distribution_to_json(trial.distributions[name]),
        )
        for name, value in trial.params.items()
    ]
    user = [_attribute(models.TrialUserAttributeModel, trial_id, *item) for item in trial.user_attrs.items()]
    system = [_attribute(models.TrialSystemAttributeModel, trial_id, *item) for item in trial.system_attrs.items()]
    return [*parameters, *user, *system]


def _attribute(
    kind: type[models.TrialUserAttributeModel] | type[models.TrialSystemAttributeModel],
    trial_id: int,
    key: str,
    value: Any,
) -> models.BaseModel:
    return kind(trial_id=trial_id, key=key, value_json=json.dumps(value))


def _value(trial_id: int, objective: int, value: float) -> models.BaseModel:
    stored, kind = models.TrialValueModel.value_to_stored_repr(value)
    return models.TrialValueModel(trial_id=trial_id, objective=objective, value=stored, value_type=kind)
