"""What several workers do to the trials of one study in the database, a transaction each.

Optuna's storage enters a trial parameter by parameter, each with queries of its own, and commits every attribute: for a
generation of trials that takes longer than evaluating a small model on them. What is written here is what Optuna would
have written, in its own tables, a statement per table.

Workers that enter, queue or claim trials take turns by the study's row (SQLite: by its one write lock), so that what
one has checked still holds when it writes. Each function may be called again after a connection was lost, not knowing
whether its transaction was committed: a second call finds what the first did and adds nothing.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session, selectinload

from hpo.transactions import in_one_transaction, reading
from hpo.wire import record

WORK = "hpo:work"
"""System attribute of a trial: its worker, the batch it came with and its place in it, and which attempt it is."""
KEY = "hpo:key"
"""System attribute of a trial: equal for trials that one evaluation answers."""
FAILURE = "failure"
"""User attribute of a failed trial: why."""
MAX_ATTEMPTS = 3
"""How often a trial is begun whose processes die, or that fails for a reason that passes."""

LOADED_TOGETHER = 500
"""Trials that are read with one query; databases limit a query's variables."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States that count towards a study's total."""


@record
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


@record
@dataclass(frozen=True, kw_only=True)
class Known:
    """What a worker knows of a study's trials, so that the database need not count them all again.

    Attributes:
        newest: Id up to which it knows every trial.
        ended: How many of those count towards the total.
        unfinished: Ids of those that were waiting or running.
    """

    newest: int = 0
    ended: int = 0
    unfinished: Collection[int] = ()

    def others(self) -> ColumnElement[bool]:
        """The trials of which it does not know how they end."""
        newer = models.TrialModel.trial_id > self.newest
        return or_(newer, models.TrialModel.trial_id.in_(self.unfinished)) if self.unfinished else newer


@record
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Who enters trials, and for which time.

    Attributes:
        worker: Name of the worker.
        token: Drawn anew for every batch, and kept when entering it is tried again.
    """

    worker: str
    token: str


@record
@dataclass(frozen=True, kw_only=True)
class Stale:
    """A trial whose worker is thought to be dead.

    Attributes:
        trial_id: Its id in the database.
        worker: The worker; None where the trial names none.
        heartbeat: The worker's last sign of life; None where it is known to be dead otherwise.
    """

    trial_id: int
    worker: str | None
    heartbeat: datetime | None = None


@in_one_transaction
def enter_trials(
    session: Session,
    study_id: int,
    trials: Sequence[FrozenTrial],
    *,
    limit: int | None = None,
    known: Known = Known(),
    batch: Batch | None = None,
) -> list[tuple[int, int] | None]:
    """Enter running trials with their parameters and attributes: all that may be, or none where the database fails.

    Args:
        session: A transaction; callers give the storage.
        study_id: The study's id in it.
        trials: Their parameters, distributions, attributes and starts.
        limit: Most trials that may count or be under way in all; None for any number.
        known: Counts, so that only later trials are read.
        batch: Marks the trials as a worker's, with a first heartbeat each; a batch that is there already is found, not
            entered again. A trial whose `KEY` another has that came after `known` is left out.
    Returns:
        Number in the study and id in the database of each, in order; None for those left out.
    Raises:
        KeyError: There is no such study.
        SQLAlchemyError: The database failed.
    """
    _take_turn(session, study_id)
    others = [] if batch is None and limit is None else _others(session, study_id, known)
    taken: set[str] = set()
    if batch is not None:
        new = {other.trial_id: other for other in others if other.trial_id > known.newest and not other.failed}
        attributes = _system_attributes(session, list(new), (WORK, KEY))
        if there := _find_batch(new, attributes, batch):
            return [there.get(place) for place in range(len(trials))]
        taken = {found[KEY] for found in attributes.values() if KEY in found}
    room = len(trials) if limit is None else limit - _count(session, others, known)
    chosen: list[int] = []
    for place, trial in enumerate(trials):
        if len(chosen) < room and trial.system_attrs.get(KEY) not in taken:
            chosen.append(place)
    last = select(models.TrialModel.number).where(models.TrialModel.study_id == study_id)
    newest = session.scalar(last.order_by(models.TrialModel.trial_id.desc()).limit(1))
    first = 0 if newest is None else newest + 1
    rows = [
        models.TrialModel(
            study_id=study_id,
            number=number,
            state=TrialState.RUNNING,
            datetime_start=trials[place].datetime_start,
        )
        for number, place in enumerate(chosen, start=first)
    ]
    session.add_all(rows)
    session.flush()
    entered: list[tuple[int, int] | None] = [None] * len(trials)
    details = _Details()
    for place, row in zip(chosen, rows, strict=True):
        trial_id = int(row.trial_id)
        entered[place] = (int(row.number), trial_id)
        details.add_trial(trial_id, trials[place])
        if batch is not None:
            work = {"worker": batch.worker, "batch": batch.token, "place": place, "attempt": 1}
            details.add_attribute(models.TrialSystemAttributeModel, trial_id, WORK, work)
            details.add(models.TrialHeartbeatModel, trial_id=trial_id)
    details.insert(session)
    return entered


@in_one_transaction
def finish_trials(session: Session, outcomes: Sequence[Outcome]) -> None:
    """Finish running trials: all of them, or none where the database fails.

    Raises:
        UpdateFinishedTrialError: One of them is finished already, in another way.
        SQLAlchemyError: The database failed.
    """
    if not outcomes:
        return
    outcome_of = {outcome.trial_id: outcome for outcome in outcomes}
    columns = models.TrialModel.trial_id, models.TrialModel.state
    query = select(*columns).where(models.TrialModel.trial_id.in_(outcome_of)).order_by(models.TrialModel.trial_id)
    state_of = {int(trial_id): state for trial_id, state in session.execute(query.with_for_update())}
    ended = [trial_id for trial_id in outcome_of if state_of[trial_id].is_finished()]
    for row in _locked_rows(session, ended, models.TrialModel.user_attributes, models.TrialModel.values):
        if not _ended_so(row, outcome_of[int(row.trial_id)]):
            raise UpdateFinishedTrialError(f"Trial {row.number} is finished already.")
    _finish_running(session, [outcome for outcome in outcome_of.values() if outcome.trial_id not in ended])


@in_one_transaction
def queue_again(session: Session, study_id: int, stale: Sequence[Stale], reason: str, *, counts: bool = True) -> None:
    """Put running trials of dead workers back into the queue with their parameters, where nobody did so before.

    A trial that was begun `MAX_ATTEMPTS` times fails instead, and so does one whose process ended while it was asked.

    Args:
        session: A transaction; callers give the storage.
        study_id: The study's id in it.
        stale: The trials, and what they were when they were found to be stale; those that changed since are left alone.
        reason: Why they ended, for those that fail.
        counts: Whether this was one of a trial's attempts.
    """
    if not stale:
        return
    _take_turn(session, study_id)
    rows = {
        int(row.trial_id): row
        for row in _locked_rows(
            session,
            [one.trial_id for one in stale],
            models.TrialModel.user_attributes,
            models.TrialModel.system_attributes,
            models.TrialModel.params,
            models.TrialModel.heartbeats,
        )
    }
    for one in stale:
        row = rows.get(one.trial_id)
        if row is None or row.state != TrialState.RUNNING:
            continue
        attribute = next((attribute for attribute in row.system_attributes if attribute.key == WORK), None)
        work = {} if attribute is None else json.loads(attribute.value_json)
        beats = [beat.heartbeat for beat in row.heartbeats]
        if work.get("worker") != one.worker or (one.heartbeat is not None and beats != [one.heartbeat]):
            continue
        attempt = int(work.get("attempt", 1))
        if counts and attempt >= MAX_ATTEMPTS:
            why = {FAILURE: f"{reason}, at attempt {attempt} of {MAX_ATTEMPTS}"}
            _finish(session, row, Outcome(trial_id=one.trial_id, state=TrialState.FAIL, attributes=why))
            continue
        if not row.params:
            why = {FAILURE: "the process ended while asking"}
            _finish(session, row, Outcome(trial_id=one.trial_id, state=TrialState.FAIL, attributes=why))
            continue
        row.state = TrialState.WAITING
        _set_work(session, one.trial_id, attribute, {**work, "worker": None, "attempt": attempt + counts})
        session.execute(
            delete(models.TrialIntermediateValueModel).where(
                models.TrialIntermediateValueModel.trial_id == one.trial_id
            )
        )


@in_one_transaction
def claim_trials(
    session: Session,
    study_id: int,
    trial_ids: Sequence[int],
    worker: str | None,
    *,
    limit: int | None = None,
    known: Known = Known(),
) -> list[int]:
    """Take waiting trials out of the queue; returns the ids of those that this worker has now.

    Trials that were never begun, which a user has queued, are taken within the limit; the others count already.
    """
    if not trial_ids:
        return []
    _take_turn(session, study_id)
    claimed = []
    room = len(trial_ids)
    if limit is not None:
        room = limit - _count(session, _others(session, study_id, known), known)
    for row in _locked_rows(session, trial_ids, models.TrialModel.system_attributes, models.TrialModel.heartbeats):
        attribute = next((attribute for attribute in row.system_attributes if attribute.key == WORK), None)
        work = {} if attribute is None else json.loads(attribute.value_json)
        if row.state == TrialState.RUNNING and work.get("worker") == worker:
            claimed.append(int(row.trial_id))  # by this very call, before its connection was lost
        if row.state != TrialState.WAITING or (attribute is None and room < 1):
            continue
        room -= attribute is None
        row.state = TrialState.RUNNING
        row.datetime_start = datetime.now()
        _set_work(session, int(row.trial_id), attribute, {"attempt": 1, **work, "worker": worker})
        if not row.heartbeats:
            session.add(models.TrialHeartbeatModel(trial_id=row.trial_id))
        claimed.append(int(row.trial_id))
    session.flush()
    beat_rows = models.TrialHeartbeatModel.trial_id.in_(claimed)
    session.execute(update(models.TrialHeartbeatModel).where(beat_rows).values(heartbeat=_now()))
    return claimed


@reading
def glance(session: Session, study_id: int, known: Known) -> list[tuple[int, TrialState]]:
    """Ids and states of the trials that are new, or were unfinished, ascending."""
    return [(other.trial_id, other.state) for other in _others(session, study_id, known)]


@reading
def states_of(session: Session, trial_ids: Collection[int]) -> dict[int, TrialState]:
    """The states of some trials."""
    query = select(models.TrialModel.trial_id, models.TrialModel.state)
    query = query.where(models.TrialModel.trial_id.in_(trial_ids))
    return {trial_id: state for trial_id, state in session.execute(query)}


@reading
def load_trials(session: Session, trial_ids: Collection[int]) -> list[FrozenTrial]:
    """Whole trials by their ids, ascending."""
    details = (
        models.TrialModel.params,
        models.TrialModel.values,
        models.TrialModel.user_attributes,
        models.TrialModel.system_attributes,
        models.TrialModel.intermediate_values,
    )
    no_storage: Any = None  # building a trial looks at its row alone
    trials: list[FrozenTrial] = []
    ascending = sorted(trial_ids)
    for start in range(0, len(ascending), LOADED_TOGETHER):
        part = models.TrialModel.trial_id.in_(ascending[start : start + LOADED_TOGETHER])
        query = select(models.TrialModel).where(part).order_by(models.TrialModel.trial_id)
        rows = session.scalars(query.options(*map(selectinload, details)))
        trials += [RDBStorage._build_frozen_trial_from_trial_model(no_storage, row) for row in rows]
        session.expunge_all()
    return trials


@in_one_transaction
def beat(session: Session, trial_ids: Collection[int]) -> None:
    """Record a heartbeat of running trials, in one statement."""
    rows = models.TrialHeartbeatModel.trial_id.in_(trial_ids)
    session.execute(update(models.TrialHeartbeatModel).where(rows).values(heartbeat=_now()))


@reading
def read_heartbeats(session: Session, trial_ids: Collection[int]) -> dict[int, datetime]:
    """The last heartbeat of trials, by the clock of the database or of who wrote it: good for seeing it change."""
    columns = models.TrialHeartbeatModel.trial_id, models.TrialHeartbeatModel.heartbeat
    query = select(*columns).where(models.TrialHeartbeatModel.trial_id.in_(trial_ids))
    return {trial_id: heartbeat for trial_id, heartbeat in session.execute(query)}


@in_one_transaction
def record_once(session: Session, study_id: int, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Write study attributes that are not there, all or none; returns what stands there now for their keys.

    Of several processes that make a study at the same moment, one decides what it is made with.
    """
    _take_turn(session, study_id)
    table = models.StudyUserAttributeModel
    query = select(table.key, table.value_json).where(table.study_id == study_id, table.key.in_(attributes))
    there = {key: json.loads(value) for key, value in session.execute(query)}
    new = {key: value for key, value in attributes.items() if key not in there}
    if new:
        rows = [{"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in new.items()]
        session.execute(insert(table), rows)
    return {**there, **new}


@in_one_transaction
def found_study(
    session: Session, study_id: int, decisive: str, attributes: Mapping[str, Any], system: Mapping[str, Any]
) -> bool:
    """Write the attributes of a new study, unless another process has; returns whether this one did.

    Args:
        session: A transaction; callers give the storage.
        study_id: The study's id in it.
        decisive: User attribute that every study has; where it is missing, what else is there is written anew.
        attributes: User attributes, the decisive one among them.
        system: System attributes.
    """
    _take_turn(session, study_id)
    user_table, system_table = models.StudyUserAttributeModel, models.StudySystemAttributeModel
    there = select(user_table.key).where(user_table.study_id == study_id, user_table.key == decisive)
    if session.scalar(there) is not None:
        return False
    for table, given in ((user_table, attributes), (system_table, system)):
        session.execute(delete(table).where(table.study_id == study_id, table.key.in_(given)))
        rows = [{"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in given.items()]
        session.execute(insert(table), rows)
    return True


def _take_turn(session: Session, study_id: int) -> None:
    """Hold the study's row until the transaction ends."""
    models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)


def _locked_rows(session: Session, trial_ids: Sequence[int], *details: Any) -> list[models.TrialModel]:
    """Trials in the order of their ids, in which everybody locks them."""
    if not trial_ids:
        return []
    query = select(models.TrialModel).where(models.TrialModel.trial_id.in_(trial_ids))
    query = query.order_by(models.TrialModel.trial_id).options(*map(selectinload, details)).with_for_update()
    return list(session.scalars(query))


@dataclass(frozen=True)
class _Other:
    """A trial of which a worker does not know how it ends."""

    trial_id: int
    number: int
    state: TrialState

    @property
    def failed(self) -> bool:
        return self.state == TrialState.FAIL


def _others(session: Session, study_id: int, known: Known) -> list[_Other]:
    """The trials of which `known` does not say how they end, ascending by id."""
    columns = models.TrialModel.trial_id, models.TrialModel.number, models.TrialModel.state
    study = models.TrialModel.study_id
    # PostgreSQL's index of studies is not ordered by trial within one: by it, every trial of the study would be read.
    is_of_study = study + 0 == study_id if session.get_bind().dialect.name == "postgresql" else study == study_id
    query = select(*columns).where(is_of_study, known.others()).order_by(models.TrialModel.trial_id)
    return [_Other(int(trial_id), int(number), state) for trial_id, number, state in session.execute(query)]


def _system_attributes(session: Session, trial_ids: Sequence[int], keys: Collection[str]) -> dict[int, dict[str, Any]]:
    """Some system attributes of trials, given by id so that no database reads the others' to find them."""
    table = models.TrialSystemAttributeModel
    found: dict[int, dict[str, Any]] = {}
    for start in range(0, len(trial_ids), LOADED_TOGETHER):
        part = table.trial_id.in_(trial_ids[start : start + LOADED_TOGETHER])
        query = select(table.trial_id, table.key, table.value_json).where(part, table.key.in_(keys))
        for trial_id, key, value in session.execute(query):
            found.setdefault(int(trial_id), {})[key] = json.loads(value)
    return found


def _find_batch(
    new: Mapping[int, _Other], attributes: Mapping[int, Mapping[str, Any]], batch: Batch
) -> dict[int, tuple[int, int]]:
    """Number and id of a batch's trials by their places in it."""
    found = {}
    for trial_id, own in attributes.items():
        work = own.get(WORK, {})
        if work.get("batch") == batch.token:
            found[int(work["place"])] = (new[trial_id].number, trial_id)
    return found


def _count(session: Session, others: Sequence[_Other], known: Known) -> int:
    """Trials that count, are running, or wait to be begun again; a user's own queue does not count."""
    waiting = [other.trial_id for other in others if other.state == TrialState.WAITING]
    begun = _system_attributes(session, waiting, (WORK,))
    counted = sum(other.state in (*ENDED, TrialState.RUNNING) for other in others)
    return known.ended + counted + len(begun)


def _finish_running(session: Session, outcomes: Sequence[Outcome]) -> None:
    """`_finish` for many, whose rows are locked, with a few statements for all."""
    attributes = models.TrialUserAttributeModel
    ids = [outcome.trial_id for outcome in outcomes if outcome.attributes]
    query = select(attributes.trial_id, attributes.key).where(attributes.trial_id.in_(ids))
    there = {(trial_id, key) for trial_id, key in session.execute(query)} if ids else set()
    details = _Details()
    for outcome in outcomes:
        for key, value in outcome.attributes.items():
            if (outcome.trial_id, key) in there:
                written = (attributes.trial_id == outcome.trial_id) & (attributes.key == key)
                session.execute(update(attributes.__table__).where(written).values(value_json=json.dumps(value)))
            else:
                details.add_attribute(attributes, outcome.trial_id, key, value)
        for objective, value in enumerate(outcome.values or ()):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            details.add(
                models.TrialValueModel, trial_id=outcome.trial_id, objective=objective, value=stored, value_type=kind
            )
    details.insert(session)
    for state in {outcome.state for outcome in outcomes}:
        so = models.TrialModel.trial_id.in_([outcome.trial_id for outcome in outcomes if outcome.state == state])
        ending = update(models.TrialModel.__table__).where(so)
        session.execute(ending.values(state=state, datetime_complete=_stored(datetime.now())))


def _finish(session: Session, row: models.TrialModel, outcome: Outcome) -> None:
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


def _ended_so(row: models.TrialModel, outcome: Outcome) -> bool:
    """Whether a finished trial has this outcome."""
    stored = models.TrialValueModel.value_to_stored_repr
    values = {value.objective: (value.value, value.value_type) for value in row.values}
    attributes = {attribute.key: json.loads(attribute.value_json) for attribute in row.user_attributes}
    return bool(
        row.state == outcome.state
        and values == {objective: stored(value) for objective, value in enumerate(outcome.values or ())}
        and json.loads(json.dumps(dict(outcome.attributes))).items() <= attributes.items()
    )


def _set_work(session: Session, trial_id: int, attribute: Any, work: Mapping[str, Any]) -> None:
    if attribute is None:
        session.add(_attribute(models.TrialSystemAttributeModel, trial_id, WORK, work))
    else:
        attribute.value_json = json.dumps(work)


def _now() -> Any:
    return func.current_timestamp()


def _stored(local: datetime) -> datetime:
    """A time as Optuna's tables have it, which knows no zones: UTC."""
    return local.astimezone(UTC).replace(tzinfo=None)


class _Details:
    """Rows of tables that tell more about trials, to be written with a statement per table."""

    def __init__(self) -> None:
        self._rows: dict[type[models.BaseModel], list[dict[str, Any]]] = {}

    def add(self, table: type[models.BaseModel], **row: Any) -> None:
        """Note a row."""
        self._rows.setdefault(table, []).append(row)

    def add_attribute(self, table: type[models.BaseModel], trial_id: int, key: str, value: Any) -> None:
        """Note an attribute."""
        self.add(table, trial_id=trial_id, key=key, value_json=json.dumps(value))

    def add_trial(self, trial_id: int, trial: FrozenTrial) -> None:
        """Note a trial's parameters and attributes."""
        for name, value in trial.params.items():
            distribution = trial.distributions[name]
            self.add(
                models.TrialParamModel,
                trial_id=trial_id,
                param_name=name,
                param_value=distribution.to_internal_repr(value),
                distribution_json=distribution_to_json(distribution),
            )
        for key, value in trial.user_attrs.items():
            self.add_attribute(models.TrialUserAttributeModel, trial_id, key, value)
        for key, value in trial.system_attrs.items():
            self.add_attribute(models.TrialSystemAttributeModel, trial_id, key, value)

    def insert(self, session: Session) -> None:
        """Write all that was noted."""
        for table, rows in self._rows.items():
            session.execute(insert(table.__table__), rows)


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
