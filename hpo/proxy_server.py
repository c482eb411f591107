"""The server of `hpo storage serve`: many workers reach one database through it.

It keeps finished trials in memory, and makes transactions that arrive while another is being made together, in one. A
database that is away is the clients' to wait for; they are told at once.
"""

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import grpc
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.servicer import OptunaStorageProxyService
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import select
from sqlalchemy.orm import Session

from hpo.bulk import (
    TRIALS,
    UNSEEN,
    Entry,
    Known,
    Outcome,
    beat,
    enter_trials,
    finish_and_enter,
    finish_and_look,
    finish_trials,
    look,
)
from hpo.errors import HpoError, StorageError
from hpo.outage import DatabaseAway, database_reason, is_passing
from hpo.proxy import FRESH_S, MOST_BYTES, SERVICE, address, description
from hpo.runs import FOLDER_ATTRIBUTE
from hpo.storage import PatientStorage, close, open_database
from hpo.transactions import FUNCTIONS, READERS, in_one_transaction, reading
from hpo.wire import Encoded, decode, encode

logger = logging.getLogger(__name__)

THREADS = 32
"""Calls that are answered at a time; each waits for the database most of its time."""
GRACE_S = 5.0
"""How long calls that are being answered may take when the server ends."""
GATHERED_FOR_S = 0.003
"""How long a transaction waits for calls that are likely to come."""
STALE_S = 0.5
"""How old the server's memory of a study may be where reading takes long, instead of `FRESH_S`."""
READING_SHARE = 0.1
"""Of the time that a server spends with reading at most, as long as its memory is not stale."""
PASSED_ON = (KeyError, UpdateFinishedTrialError)
"""Errors of a function that its caller gets as they are."""


@contextmanager
def served(url: str, host: str, port: int) -> Iterator[int]:
    """Serve a database to `grpc://host:port` while the block runs.

    Args:
        url: SQLAlchemy URL of an existing database, or of a new SQLite file.
        host: Address to listen on.
        port: Port to listen on; 0 lets the system choose.
    Returns:
        The port.
    Raises:
        StorageError: The database cannot be used, or the address not be listened on.
    """
    storage = open_database(url, connections=THREADS)
    changes = _Changes()
    try:
        server = grpc.server(
            ThreadPoolExecutor(THREADS),
            interceptors=[_Explains(changes)],
            options=[
                ("grpc.max_receive_message_length", MOST_BYTES),
                ("grpc.max_send_message_length", MOST_BYTES),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error
            ],
        )
        optunas = OptunaStorageProxyService(TrialCache(storage))
        api_pb2_grpc.add_StorageServiceServicer_to_server(optunas, server)  # type: ignore[no-untyped-call]
        server.add_generic_rpc_handlers((_Ours(storage, changes).handler(),))
        try:
            bound = server.add_insecure_port(address(host, port))
        except RuntimeError as error:
            raise StorageError(f"Cannot listen on {address(host, port)}; choose another --host or --port.") from error
        server.start()
        try:
            yield bound
        finally:
            server.stop(GRACE_S).wait()
    finally:
        close(storage)


class Landmarks:
    """What tells a study that was read from what the database has under its id by now.

    Studies are deleted, and databases restored from backups, beside a server too; SQLite gives their ids anew.
    """

    def __init__(self, storage: PatientStorage, study_id: int) -> None:
        self._storage = storage
        self._study_id = study_id
        self._seen: dict[int | None, dict[str, Any]] = {}

    def stand(self, trial_ids: Collection[int]) -> bool:
        """Whether what was seen before is still there; what is seen from now on are these trials.

        Args:
            trial_ids: The newest trial and the last that was finished: of those that are gone, one is among them.
        """
        asked = [*trial_ids, *(trial_id for trial_id in self._seen if trial_id is not None)]
        there = landmarks(self._storage, self._study_id, asked)
        stood = all(mark.items() <= there.get(key, {}).items() for key, mark in self._seen.items())
        self._seen = {key: mark for key, mark in there.items() if key is None or key in trial_ids}
        return stood


@reading
def landmarks(session: Session, study_id: int, trial_ids: Collection[int]) -> dict[int | None, dict[str, Any]]:
    """What is known of some trials and does not change any more, by their ids, and by None of their study."""
    folder = models.StudyUserAttributeModel
    is_folder = (folder.study_id == models.StudyModel.study_id) & (folder.key == FOLDER_ATTRIBUTE)
    query = select(models.StudyModel.study_name, folder.value_json).outerjoin(folder, is_folder)
    marks: dict[int | None, dict[str, Any]] = {}
    for name, value in session.execute(query.where(models.StudyModel.study_id == study_id)):
        marks[None] = {"name": name} | ({} if value is None else {"folder": value})
    trial, param = TRIALS.c, models.TrialParamModel
    columns = (trial.trial_id, trial.number, trial.state, trial.datetime_complete, param.param_name, param.param_value)
    rows = select(*columns).outerjoin(param, param.trial_id == trial.trial_id).where(trial.study_id == study_id)
    for trial_id, number, state, ended, name, value in session.execute(rows.where(trial.trial_id.in_(trial_ids))):
        mark = marks.setdefault(trial_id, {"number": number})
        mark |= {"ended": (state, ended)} if state.is_finished() else {}
        mark |= {} if name is None else {f"param {name}": value}
    return marks


class TrialCache(_CachedStorage):
    """Optuna's cache, of trials alone, and only as long as the database has them."""

    _backend: PatientStorage

    def __init__(self, backend: PatientStorage) -> None:
        super().__init__(backend)
        self._landmarks: dict[int, Landmarks] = {}

    def get_study_name_from_id(self, study_id: int) -> str:
        """As Optuna's."""
        return self._backend.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """As Optuna's."""
        return self._backend.get_study_directions(study_id)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """As Optuna's."""
        return self._backend.get_trial_id_from_study_id_trial_number(study_id, trial_number)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As Optuna's."""
        return self._backend.get_trial(trial_id)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """As Optuna's."""
        self._backend.set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        super()._read_trials_from_remote_storage(study_id)
        if self._stands(study_id):
            return
        with self._lock:
            self._studies[study_id] = _StudyInfo()
        super()._read_trials_from_remote_storage(study_id)
        self._stands(study_id)

    def _stands(self, study_id: int) -> bool:
        with self._lock:
            trials = self._studies[study_id].trials.values()
            newest = sorted(trial._trial_id for trial in trials)[-1:]
            last_ended = [trial_id for _, trial_id in sorted(_ends(trials))[-1:]]
            return self._landmarks.setdefault(study_id, Landmarks(self._backend, study_id)).stand(newest + last_ended)


def _ends(trials: Iterable[FrozenTrial]) -> list[tuple[datetime, int]]:
    """When trials ended, and their ids."""
    return [(trial.datetime_complete, trial._trial_id) for trial in trials if trial.datetime_complete is not None]


@dataclass
class _Call:
    """A function that a client has called, and what came of it."""

    name: str
    arguments: list[Any]
    named: dict[str, Any]
    done: bool = False
    result: Any = None
    error: Exception | None = None

    def answer(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


@dataclass
class Together:
    """Runs calls in one transaction with those that arrived while the one before was being made.

    Workers that enter trials take turns anyway, so that one commit serves all who wait for it; trials that several
    enter, or finish, are written with as many statements as those of one. Where calls come in numbers, a transaction
    waits a moment for as many as came with the last two: the fewer there are, the more all of them get done.
    """

    storage: PatientStorage
    _waiting: list[_Call] = field(default_factory=list)
    _entrance: threading.Condition = field(default_factory=threading.Condition)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _sizes: tuple[int, int] = (1, 1)

    def run(self, name: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Run a function of `hpo.transactions`; returns when its transaction was made."""
        call = _Call(name, arguments, named)
        if name in READERS:
            self._run([call])
            return call.answer()
        with self._entrance:
            self._waiting.append(call)
            self._entrance.notify()
        with self._turn:
            if not call.done:
                with self._entrance:
                    if max(self._sizes) > 1:
                        self._entrance.wait_for(lambda: len(self._waiting) >= sum(self._sizes), GATHERED_FOR_S)
                    calls, self._waiting = self._waiting, []
                    self._sizes = (self._sizes[1], len(calls))
                self._run(calls)
        return call.answer()

    def _run(self, calls: list[_Call]) -> None:
        try:
            if len(calls) == 1:
                results = self.storage.run_together([(calls[0].name, calls[0].arguments, calls[0].named)])
            else:
                results = run_joined(self.storage, [(call.name, call.arguments, call.named) for call in calls])
        except Exception as error:
            if len(calls) > 1 and not isinstance(error, DatabaseAway):
                for call in calls:  # one of them is at fault, and the others are not to suffer for it
                    self._run([call])
                return
            results = [None] * len(calls)
            for call in calls:
                call.error = error
        for call, result in zip(calls, results, strict=True):
            call.result, call.done = result, True


@in_one_transaction
def run_joined(session: Session, calls: list[tuple[str, list[Any], dict[str, Any]]]) -> list[Any]:
    """Run functions by name, first those that finish trials, as one, then those that enter trials of a study, as one.

    None of them has been answered, so none of their callers knows in which order they come.
    """
    results: list[Any] = [None] * len(calls)
    entering: dict[int, list[int]] = {}
    finishing: list[Outcome] = []
    others: list[int] = []
    for place, (name, arguments, named) in enumerate(calls):
        enters = name == enter_trials.__name__ and len(arguments) == 2
        if enters:
            outcomes = named.get("outcomes", [])
        elif name == finish_trials.__name__ and len(arguments) == 1 and not named:
            (outcomes,) = arguments
        else:
            others.append(place)
            continue
        finished = {outcome.trial_id for outcome in finishing}
        if not finished.isdisjoint(outcome.trial_id for outcome in outcomes):
            others.append(place)  # of two that finish a trial, the second is to hear of the first
            continue
        finishing += outcomes
        if enters:
            entering.setdefault(arguments[0], []).append(place)
    entries = {
        study_id: [
            Entry(trials=trials, **{name: value for name, value in named.items() if name != "outcomes"})
            for _, (_, trials), named in (calls[place] for place in places)
        ]
        for study_id, places in entering.items()
    }
    for study_id, all_entered in finish_and_enter(session, finishing, entries).items():
        for place, entered in zip(entering[study_id], all_entered, strict=True):
            results[place] = entered
    for place in others:
        name, arguments, named = calls[place]
        results[place] = FUNCTIONS[name](session, *arguments, **named)
    return results


@dataclass
class _Trial:
    """A trial as a server has seen it, and what it told a client of it: the same text for all."""

    number: int
    state: TrialState
    whole: Encoded


class Watched:
    """The trials of a study in memory, so that what one worker did is read once for all the others.

    All that is here was read from the database, in the order in which it came there, so that who knows a trial knows
    those before it. It is read anew before an answer that would be older than it may be, or than a change made
    through this server other than by entering and finishing trials, such as another turn of a dead worker's.
    """

    def __init__(self, storage: PatientStorage, study_id: int) -> None:
        self._storage = storage
        self._study_id = study_id
        self._lock = threading.Lock()
        self._landmarks = Landmarks(storage, study_id)
        self._read_at = float("-inf")
        self._fresh_s = FRESH_S
        self._changes = -1
        self._forget()

    def _forget(self) -> None:
        self._trials: dict[int, _Trial] = {}
        self._ids: list[int] = []
        self._unfinished: set[int] = set()
        self._last_ended: list[tuple[datetime, int]] = []

    def look(self, known: Known, seen: Mapping[int, TrialState | None], changes: int) -> Encoded:
        """What `hpo.bulk.look` answers; `changes` counts those that an answer must know of."""
        with self._lock:
            if changes > self._changes or time.monotonic() - self._read_at > self._fresh_s:
                self._read()
                self._changes = changes
            newer = self._ids[bisect_right(self._ids, known.newest) :]
            again = (trial_id for trial_id in known.unfinished if trial_id <= known.newest and trial_id in self._trials)
            ids = [*sorted(again), *newer]
            rows = [(trial_id, self._trials[trial_id].number, self._trials[trial_id].state) for trial_id in ids]
            changed = [
                self._trials[trial_id].whole
                for trial_id, _, state in rows
                if seen.get(trial_id, UNSEEN) not in (None, state)
            ]
        return Encoded.of((Encoded.of(rows), Encoded.of(changed)))

    def _read(self) -> None:
        started = time.monotonic()
        self._take_in_news()
        if not self._stands():
            self._forget()
            self._take_in_news()
            self._stands()
        self._read_at = started
        self._fresh_s = min(max(FRESH_S, (time.monotonic() - started) / READING_SHARE), STALE_S)

    def _stands(self) -> bool:
        return self._landmarks.stand([*self._ids[-1:], *(trial_id for _, trial_id in self._last_ended)])

    def _take_in_news(self) -> None:
        newest = self._ids[-1] if self._ids else 0
        seen = {trial_id: self._trials[trial_id].state for trial_id in self._unfinished}
        known = Known(newest=newest, unfinished=sorted(self._unfinished))
        rows, changed = look(self._storage, self._study_id, known, seen)
        self._last_ended = sorted([*self._last_ended, *_ends(changed)])[-1:]
        whole = {trial._trial_id: trial for trial in changed}
        for trial_id, number, state in rows:
            if trial_id in whole:
                self._trials[trial_id] = _Trial(number, state, Encoded.of(whole[trial_id]))
            if trial_id not in self._trials:  # its study was deleted just now
                continue
            if trial_id > newest:
                self._ids.append(trial_id)
            if state.is_finished():
                self._unfinished.discard(trial_id)
            else:
                self._unfinished.add(trial_id)


class _Ours:
    """The second service: functions of `hpo.transactions` by name, arguments and answers in JSON."""

    def __init__(self, storage: PatientStorage, changes: "_Changes") -> None:
        self._storage = storage
        self._together = Together(storage)
        self._changes = changes
        self._watched: dict[int, Watched] = {}
        self._lock = threading.Lock()

    def handler(self) -> Any:
        methods = {"Run": self._run, "Greet": self._greet}
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
        )

    def _greet(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        return encode(description())

    def _run(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            name, arguments, named = decode(request)
            known = name in FUNCTIONS
        except (ValueError, TypeError, KeyError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the message is malformed ({error})")
        if not known:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the message asks for a function that there is not")
        try:
            return encode([self._answer(name, arguments, named), None])
        except PASSED_ON as error:
            return encode([None, [type(error).__name__, str(error.args[0]) if error.args else ""]])

    def _answer(self, name: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        if name == finish_and_look.__name__ and not named:
            outcomes, *arguments = arguments
            self._together.run(finish_trials.__name__, [outcomes], {})
            name = look.__name__
        if name == look.__name__ and not named:
            study_id, known, seen = arguments
            with self._lock:
                watched = self._watched.setdefault(study_id, Watched(self._storage, study_id))
            return watched.look(known, seen, self._changes.made)
        result = self._together.run(name, arguments, named)
        if name not in READERS and name not in (enter_trials.__name__, finish_trials.__name__, beat.__name__):
            self._changes.made += 1
        return result


@dataclass
class _Changes:
    """Counts what was done through the server that its answers must know of, but for entering and finishing trials."""

    made: int = 0


class _Explains(grpc.ServerInterceptor):  # type: ignore[misc]
    """Tells clients why a call failed: a database that is away apart from what no waiting mends; and counts changes."""

    def __init__(self, changes: _Changes) -> None:
        self._changes = changes

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        *_, service, method = details.method.split("/")
        reads = service == SERVICE or method.startswith("Get")  # what our own calls change is counted elsewhere

        def explained(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                answer = handler.unary_unary(request, context)
                if not reads:
                    self._changes.made += 1
                return answer
            except Exception as error:
                if context.code() is not None:  # the handler has said why
                    raise
                reason = str(error) if isinstance(error, HpoError) else database_reason(error)
                if isinstance(error, DatabaseAway) or is_passing(error):
                    context.abort(grpc.StatusCode.UNAVAILABLE, database_reason(error))
                logger.warning("A call of %s failed: %s.", details.method, reason.rstrip("."))
                context.abort(grpc.StatusCode.INTERNAL, reason)

        return grpc.unary_unary_rpc_method_handler(
            explained,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
