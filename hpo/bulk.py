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
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Integer,
    String,
    cast,
    delete,
    exists,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.orm import Session, selectinload

from hpo.transactions import FUNCTIONS, in_one_transaction, reading
from hpo.wire import distribution_of, record

WORK = "hpo:work"
"""System attribute of a trial: its worker, the batch it came with and its place in it, and which attempt it is."""
KEY = "hpo:key"
"""System attribute of a trial: equal for trials that one evaluation answers."""
FAILURE = "failure"
"""User attribute of a failed trial: why."""
UNSEEN = object()
"""The state of a trial that a worker has not seen."""
MAX_ATTEMPTS = 3
"""How often a trial is begun whose processes die, or that fails for a reason that passes."""

LOADED_TOGETHER = 500
"""Trials that are read with one query; databases limit a query's variables."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States that count towards a study's total."""

# Statements on tables, not on Optuna's classes: to load objects costs a server of many workers more than the database.
STUDIES, TRIALS = models.StudyModel.__table__, models.TrialModel.__table__
USER_ATTRIBUTES = models.TrialUserAttributeModel.__table__
SYSTEM_ATTRIBUTES = models.TrialSystemAttributeModel.__table__


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
        number: The number of the study's last trial up to there; None where it is not known.
        ended: How many of those count towards the total.
        unfinished: Ids of those that were waiting or running.
    """

    newest: int = 0
    number: int | None = None
    ended: int = 0
    unfinished: Collection[int] = ()

    def others(self) -> ColumnElement[bool]:
        """The trials of which it does not know how they end."""
        newer: ColumnElement[bool] = TRIALS.c.trial_id > self.newest
        return or_(newer, TRIALS.c.trial_id.in_(self.unfinished)) if self.unfinished else newer


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


@record
@dataclass(frozen=True, kw_only=True)
class Entry:
    """Trials that a worker enters; see `enter_trials`."""

    trials: Sequence[FrozenTrial]
    limit: int | None = None
    known: Known = Known()
    batch: Batch | None = None


Entered = list[tuple[int, int] | None]
"""Number in the study and id in the database of trials that were entered; None for those left out."""


@in_one_transaction
def enter_trials(
    session: Session,
    study_id: int,
    trials: Sequence[FrozenTrial],
    *,
    limit: int | None = None,
    known: Known = Known(),
    batch: Batch | None = None,
    outcomes: Sequence[Outcome] = (),
) -> Entered:
    """Enter running trials with their parameters and attributes: all that may be, or none where the database fails.

    Args:
        session: A transaction; callers give the storage.
        study_id: The study's id in it.
        trials: Their parameters, distributions, attributes and starts.
        limit: Most trials that may count or be under way in all; None for any number.
        known: Counts, so that only later trials are read.
        batch: Marks the trials as a worker's, with a first heartbeat each; a batch that is there already is found, not
            entered again. A trial whose `KEY` another has that came after `known` is left out.
        outcomes: Trials that are finished first; see `finish_trials`.
    Returns:
        Number in the study and id in the database of each, in order; None for those left out.
    Raises:
        KeyError: There is no such study.
        UpdateFinishedTrialError: One of the outcomes is of a trial that is finished already, in another way.
        SQLAlchemyError: The database failed.
    """
    entry = Entry(trials=trials, limit=limit, known=known, batch=batch)
    return finish_and_enter(session, outcomes, {study_id: [entry]})[study_id][0]


def finish_and_enter(
    session: Session, outcomes: Sequence[Outcome], entries: Mapping[int, Sequence[Entry]]
) -> dict[int, list[Entered]]:
    """`finish_trials` and `enter_trials` for several workers, one after the other, with as many statements as for one.

    Args:
        session: A transaction.
        outcomes: Of different trials.
        entries: By the id of the study.
    Returns:
        What `enter_trials` says of each entry, by study.
    """
    details = _Details()
    _finish_all(session, outcomes, details)
    entered = {study_id: _enter_all(session, study_id, given, details) for study_id, given in entries.items()}
    details.insert(session)
    return entered


def _enter_all(session: Session, study_id: int, entries: Sequence[Entry], details: "_Details") -> list[Entered]:
    """Enter rows of trials; what else is to be written about them is noted."""
    _take_turn(session, study_id)
    known = _least([entry.known for entry in entries])
    counts = any(entry.batch is not None or entry.limit is not None for entry in entries)
    others = _others(session, study_id, known, (WORK, KEY)) if counts or known.number is not None else []
    entered: list[Entered] = []
    rows: list[dict[str, Any]] = []
    keys: set[str] = set()
    places: list[tuple[int, int]] = []
    for entry in entries:
        entered.append([None] * len(entry.trials))
        taken = set(keys)
        if entry.batch is not None:
            new = [other for other in others if other.trial_id > entry.known.newest and not other.failed]
            if there := _find_batch(new, entry.batch):
                entered[-1] = [there.get(place) for place in range(len(entry.trials))]
                continue
            taken |= {other.attributes[KEY] for other in new if KEY in other.attributes}
        room = len(entry.trials)
        if entry.limit is not None:
            room = entry.limit - _count(others, entry.known) - len(rows)
        before = len(rows)
        for place, trial in enumerate(entry.trials):
            key = trial.system_attrs.get(KEY)
            if len(rows) - before >= room or key in taken:
                continue
            places.append((len(entered) - 1, place))
            rows.append(
                {"study_id": study_id, "state": TrialState.RUNNING, "datetime_start": _stored(trial.datetime_start)}
            )
            if key is not None:
                keys.add(key)
    if not rows:
        return entered
    for number, row in enumerate(rows, start=1 + _last_number(session, study_id, others, known)):
        row["number"] = number
    for (turn, place), row, trial_id in zip(places, rows, _insert_trials(session, rows), strict=True):
        entered[turn][place] = (row["number"], trial_id)
        details.add_trial(trial_id, entries[turn].trials[place])
        batch = entries[turn].batch
        if batch is not None:
            work = {"worker": batch.worker, "batch": batch.token, "place": place, "attempt": 1}
            details.add_attribute(models.TrialSystemAttributeModel, trial_id, WORK, work)
            details.add(models.TrialHeartbeatModel, trial_id=trial_id)
    return entered


@in_one_transaction
def finish_trials(session: Session, outcomes: Sequence[Outcome]) -> None:
    """Finish running trials: all of them, or none where the database fails.

    Raises:
        UpdateFinishedTrialError: One of them is finished already, in another way.
        SQLAlchemyError: The database failed.
    """
    details = _Details()
    _finish_all(session, outcomes, details)
    details.insert(session)


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
        room = limit - _count(_others(session, study_id, known, (WORK,)), known)
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
def look(
    session: Session, study_id: int, known: Known, seen: Mapping[int, TrialState | None]
) -> tuple[list[tuple[int, int, TrialState]], list[FrozenTrial]]:
    """What became of a study's trials since a worker knew them.

    Args:
        session: A transaction; callers give the storage.
        study_id: The study's id in it.
        known: What the worker knows.
        seen: States of unfinished trials as it has them; None for its own, of which it wants to know no more.
    Returns:
        Id, number and state of the trials that are new, or were unfinished, ascending; and those of them whole that are
        not as they were seen.
    """
    others = _others(session, study_id, known)
    changed = [other.trial_id for other in others if seen.get(other.trial_id, UNSEEN) not in (None, other.state)]
    return [(other.trial_id, other.number, other.state) for other in others], _load(session, changed)


@in_one_transaction
def finish_and_look(
    session: Session, outcomes: Sequence[Outcome], study_id: int, known: Known, seen: Mapping[int, TrialState | None]
) -> tuple[list[tuple[int, int, TrialState]], list[FrozenTrial]]:
    """`finish_trials`, and then `look`, for who goes on with the study at once.

    Raises:
        UpdateFinishedTrialError: One of them is finished already, in another way.
        SQLAlchemyError: The database failed.
    """
    FUNCTIONS[finish_trials.__name__](session, outcomes)
    found: tuple[list[tuple[int, int, TrialState]], list[FrozenTrial]]
    found = FUNCTIONS[look.__name__](session, study_id, known, seen)
    return found


@reading
def states_of(session: Session, trial_ids: Collection[int]) -> dict[int, TrialState]:
    """The states of some trials."""
    query = select(models.TrialModel.trial_id, models.TrialModel.state)
    query = query.where(models.TrialModel.trial_id.in_(trial_ids))
    return {trial_id: state for trial_id, state in session.execute(query)}


def _load(session: Session, ascending: Sequence[int]) -> list[FrozenTrial]:
    """Whole trials by their ids."""
    table = models.TrialModel.__table__
    trials: list[FrozenTrial] = []
    for start in range(0, len(ascending), LOADED_TOGETHER):
        part = ascending[start : start + LOADED_TOGETHER]
        rows = session.execute(select(table).where(table.c.trial_id.in_(part)).order_by(table.c.trial_id)).all()
        parts: dict[int, _Parts] = {row.trial_id: _Parts() for row in rows}
        for kind, trial_id, place, key, number, text in session.execute(_details_of(part)):
            parts[trial_id].add(kind, place, key, number, text)
        trials += [_frozen(row, parts[row.trial_id]) for row in rows]
    return trials


def _details_of(trial_ids: Sequence[int]) -> CompoundSelect[Any]:
    """All that is stored about trials beside their rows, with one query: the database is asked for each table in turn.

    Columns: which table; the trial; the row's own id, the objective or the step; key; number; text.
    """
    params, user, system = models.TrialParamModel, models.TrialUserAttributeModel, models.TrialSystemAttributeModel
    values, steps = models.TrialValueModel, models.TrialIntermediateValueModel
    nothing = null()
    columns: tuple[tuple[Any, ...], ...] = (
        (params, params.param_id, params.param_name, params.param_value, params.distribution_json),
        (user, user.trial_user_attribute_id, user.key, nothing, user.value_json),
        (system, system.trial_system_attribute_id, system.key, nothing, system.value_json),
        (values, values.objective, nothing, values.value, cast(values.value_type, String(10))),
        (steps, steps.step, nothing, steps.intermediate_value, cast(steps.intermediate_value_type, String(10))),
    )
    queries: list[Any] = [
        select(literal(kind, Integer), table.trial_id, *others).where(table.trial_id.in_(trial_ids))
        for kind, (table, *others) in enumerate(columns)
    ]
    return union_all(*queries)


class _Parts:
    """What the rows of `_details_of` say of one trial."""

    def __init__(self) -> None:
        self._rows: tuple[list[tuple[int, str, float, str]], ...] = ([], [], [], [], [])

    def add(self, kind: int, place: int, key: str, number: float, text: str) -> None:
        """Take in a row."""
        self._rows[kind].append((place, key, number, text))

    def build(self) -> dict[str, Any]:
        """Arguments of a `FrozenTrial`, each in the order in which it was written."""
        params, user, system, values, steps = map(sorted, self._rows)
        distributions = {key: distribution_of(text) for _, key, _, text in params}
        value_type, step_type = (
            models.TrialValueModel.TrialValueType,
            models.TrialIntermediateValueModel.TrialIntermediateValueType,
        )
        value_of = models.TrialValueModel.stored_repr_to_value
        step_of = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
        return {
            "params": {key: distributions[key].to_external_repr(number) for _, key, number, _ in params},
            "distributions": distributions,
            "user_attrs": {key: json.loads(text) for _, key, _, text in user},
            "system_attrs": {key: json.loads(text) for _, key, _, text in system},
            "values": [value_of(number, value_type[text]) for _, _, number, text in values] or None,
            "intermediate_values": {step: step_of(number, step_type[text]) for step, _, number, text in steps},
        }


def _frozen(row: Any, parts: _Parts) -> FrozenTrial:
    """A trial as Optuna builds it."""
    return FrozenTrial(
        trial_id=row.trial_id,
        number=row.number,
        state=row.state,
        value=None,
        datetime_start=_local(row.datetime_start),
        datetime_complete=_local(row.datetime_complete),
        **parts.build(),
    )


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
    """Hold the study's row until the transaction ends.

    Raises:
        KeyError: There is no such study.
    """
    row = select(STUDIES.c.study_id).where(STUDIES.c.study_id == study_id).with_for_update()
    if session.connection().scalar(row) is None:
        raise KeyError(models.NOT_FOUND_MSG)


def _last_number(session: Session, study_id: int, others: Sequence["_Other"], known: Known) -> int:
    """The number of the study's last trial, -1 where there is none; the caller holds the study's row.

    What the worker knows spares the database the search for it, which a planner may do by reading every trial.
    """
    if known.number is not None:
        return max([known.number, *(other.number for other in others)])
    last = select(models.TrialModel.number).where(models.TrialModel.study_id == study_id)
    newest = session.scalar(last.order_by(models.TrialModel.trial_id.desc()).limit(1))
    return -1 if newest is None else int(newest)


def _insert_trials(session: Session, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Enter rows of trials; returns their ids in order."""
    table = models.TrialModel.__table__
    if len(rows) > 1 and session.get_bind().dialect.insert_executemany_returning_sort_by_parameter_order:
        inserted = insert(table).returning(table.c.trial_id, sort_by_parameter_order=True)
        return [int(trial_id) for trial_id in session.scalars(inserted, rows)]
    connection = session.connection()
    keys: list[Any] = [connection.execute(insert(table), row).inserted_primary_key for row in rows]
    return [int(key[0]) for key in keys]


def _locked_rows(session: Session, trial_ids: Sequence[int], *details: Any) -> list[models.TrialModel]:
    """Trials in the order of their ids, in which everybody locks them."""
    if not trial_ids:
        return []
    query = select(models.TrialModel).where(models.TrialModel.trial_id.in_(trial_ids))
    query = query.order_by(models.TrialModel.trial_id).options(*map(selectinload, details)).with_for_update()
    return list(session.scalars(query))


@dataclass(frozen=True)
class _Other:
    """A trial of which a worker does not know how it ends.

    Attributes:
        trial_id: Its id in the database.
        number: Its number in the study.
        state: What it is now.
        attributes: Those of its system attributes that were asked for.
    """

    trial_id: int
    number: int
    state: TrialState
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.state == TrialState.FAIL


def _others(session: Session, study_id: int, known: Known, keys: Sequence[str] = ()) -> list[_Other]:
    """The trials of which `known` does not say how they end, ascending by id.

    Those that came later or wait have those of their system attributes that are asked for.
    """
    study = TRIALS.c.study_id
    # PostgreSQL's index of studies is not ordered by trial within one: by it, every trial of the study would be read.
    is_of_study = study + 0 == study_id if session.get_bind().dialect.name == "postgresql" else study == study_id
    query = select(TRIALS.c.trial_id, TRIALS.c.number, TRIALS.c.state).where(is_of_study, known.others())
    rows = session.connection().execute(query.order_by(TRIALS.c.trial_id))
    others = {int(trial_id): _Other(int(trial_id), int(number), state) for trial_id, number, state in rows}
    # By their ids, and not joined: a plan made for any ids would read the attributes of all trials there are.
    asked = [one for one, other in others.items() if one > known.newest or other.state == TrialState.WAITING]
    for start in range(0, len(asked) if keys else 0, LOADED_TOGETHER):
        part = SYSTEM_ATTRIBUTES.c.trial_id.in_(asked[start : start + LOADED_TOGETHER])
        found = select(SYSTEM_ATTRIBUTES.c.trial_id, SYSTEM_ATTRIBUTES.c.key, SYSTEM_ATTRIBUTES.c.value_json)
        for trial_id, key, value in session.connection().execute(found.where(part, SYSTEM_ATTRIBUTES.c.key.in_(keys))):
            others[int(trial_id)].attributes[key] = json.loads(value)
    return list(others.values())


def _find_batch(new: Sequence[_Other], batch: Batch) -> dict[int, tuple[int, int]]:
    """Number and id of a batch's trials by their places in it."""
    found = {}
    for other in new:
        work = other.attributes.get(WORK, {})
        if work.get("batch") == batch.token:
            found[int(work["place"])] = (other.number, other.trial_id)
    return found


def _count(others: Sequence[_Other], known: Known) -> int:
    """Trials that count, are running, or wait to be begun again; a user's own queue does not count.

    Args:
        others: At least the trials of which the worker does not know how they end, with what is their `WORK`.
        known: What the worker knows.
    """
    unfinished = set(known.unfinished)
    counting = (*ENDED, TrialState.RUNNING)
    return known.ended + sum(
        other.trial_id > known.newest or other.trial_id in unfinished
        for other in others
        if other.state in counting or (other.state == TrialState.WAITING and WORK in other.attributes)
    )


def _least(knowledge: Sequence[Known]) -> Known:
    """What several workers all know."""
    if len(knowledge) == 1:
        return knowledge[0]
    oldest = min(knowledge, key=lambda known: known.newest)
    unfinished = {trial_id for known in knowledge for trial_id in known.unfinished if trial_id <= oldest.newest}
    return Known(newest=oldest.newest, number=oldest.number, unfinished=sorted(unfinished))


def _finish_all(session: Session, outcomes: Sequence[Outcome], details: "_Details") -> None:
    """`finish_trials`, for which what it adds to other tables is noted."""
    if not outcomes:
        return
    outcome_of = {outcome.trial_id: outcome for outcome in outcomes}
    keys = {key for outcome in outcomes for key in outcome.attributes}
    own = (USER_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id) & USER_ATTRIBUTES.c.key.in_(sorted(keys))
    has_some = exists().where(own).correlate(TRIALS) if keys else literal(False)
    query = select(TRIALS.c.trial_id, TRIALS.c.state, has_some).where(TRIALS.c.trial_id.in_(outcome_of))
    rows = session.connection().execute(query.order_by(TRIALS.c.trial_id).with_for_update()).all()
    state_of = {int(trial_id): state for trial_id, state, _ in rows}
    ended = [trial_id for trial_id in outcome_of if state_of[trial_id].is_finished()]
    for row in _locked_rows(session, ended, models.TrialModel.user_attributes, models.TrialModel.values):
        if not _ended_so(row, outcome_of[int(row.trial_id)]):
            raise UpdateFinishedTrialError(f"Trial {row.number} is finished already.")
    running = [outcome for trial_id, outcome in outcome_of.items() if trial_id not in ended]
    _finish_running(session, running, [int(trial_id) for trial_id, _, some in rows if some], details)


def _finish_running(
    session: Session, outcomes: Sequence[Outcome], with_attributes: Sequence[int], details: "_Details"
) -> None:
    """`_finish` for many, whose rows are locked, with a few statements for all.

    Args:
        session: A transaction.
        outcomes: Of running trials.
        with_attributes: Ids of those that may have attributes already that the outcomes have too.
        details: Where rows are noted.
    """
    there: set[tuple[int, str]] = set()
    if with_attributes:
        query = select(USER_ATTRIBUTES.c.trial_id, USER_ATTRIBUTES.c.key)
        found = session.connection().execute(query.where(USER_ATTRIBUTES.c.trial_id.in_(with_attributes)))
        there = {(int(trial_id), key) for trial_id, key in found}
    for outcome in outcomes:
        for key, value in outcome.attributes.items():
            if (outcome.trial_id, key) in there:
                written = (USER_ATTRIBUTES.c.trial_id == outcome.trial_id) & (USER_ATTRIBUTES.c.key == key)
                session.connection().execute(
                    update(USER_ATTRIBUTES).where(written).values(value_json=json.dumps(value))
                )
            else:
                details.add_attribute(models.TrialUserAttributeModel, outcome.trial_id, key, value)
        for objective, value in enumerate(outcome.values or ()):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            details.add(
                models.TrialValueModel, trial_id=outcome.trial_id, objective=objective, value=stored, value_type=kind
            )
    for state in {outcome.state for outcome in outcomes}:
        so = TRIALS.c.trial_id.in_([outcome.trial_id for outcome in outcomes if outcome.state == state])
        ending = update(TRIALS).where(so).values(state=state, datetime_complete=_stored(datetime.now()))
        session.connection().execute(ending)


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


def _stored(local: datetime | None) -> datetime | None:
    """A time as Optuna's tables have it, which knows no zones: UTC."""
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)


def _local(stored: datetime | None) -> datetime | None:
    """The inverse of `_stored`."""
    return None if stored is None else stored.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


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
            session.connection().execute(insert(table.__table__), rows)


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
