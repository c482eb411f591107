"""The server of `hpo storage serve`: many workers reach one database through it.

It keeps finished trials in memory, and makes transactions that arrive while another is being made together, in one. A
database that is away is the clients' to wait for; they are told at once.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import _CachedStorage
from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.servicer import OptunaStorageProxyService
from optuna.storages._rdb import models
from sqlalchemy.orm import Session

import hpo.bulk  # noqa: F401  # its functions are what clients may call
from hpo.errors import HpoError, StorageError
from hpo.outage import DatabaseAway, database_reason, is_passing
from hpo.proxy import MOST_BYTES, SERVICE, description
from hpo.storage import PatientStorage, close, open_database
from hpo.transactions import FUNCTIONS, READERS, reading
from hpo.wire import decode, encode

logger = logging.getLogger(__name__)

THREADS = 32
"""Calls that are answered at a time; each waits for the database most of its time."""
GRACE_S = 5.0
"""How long calls that are being answered may take when the server ends."""
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
    try:
        server = grpc.server(
            ThreadPoolExecutor(THREADS),
            interceptors=[_Explains()],
            options=[
                ("grpc.max_receive_message_length", MOST_BYTES),
                ("grpc.max_send_message_length", MOST_BYTES),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error
            ],
        )
        optunas = OptunaStorageProxyService(LearningStorage(storage))
        api_pb2_grpc.add_StorageServiceServicer_to_server(optunas, server)  # type: ignore[no-untyped-call]
        server.add_generic_rpc_handlers((_Ours(storage).handler(),))
        try:
            bound = server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise StorageError(f"Cannot listen on {host}:{port}; choose another --host or --port.") from error
        server.start()
        try:
            yield bound
        finally:
            server.stop(GRACE_S).wait()
    finally:
        close(storage)


class LearningStorage(_CachedStorage):
    """Optuna's cache, which also takes parameters of trials that were entered before this server began."""

    _backend: PatientStorage

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """As Optuna's."""
        if trial_id not in self._trial_id_to_study_id_and_number:
            self._read_trials_from_remote_storage(study_of(self._backend, trial_id))
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)


@reading
def study_of(session: Session, trial_id: int) -> int:
    """Id of the study that a trial belongs to."""
    return int(models.TrialModel.find_or_raise_by_id(trial_id, session).study_id)


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

    Workers that enter trials take turns anyway, so that one commit serves all who wait for it.
    """

    storage: PatientStorage
    _waiting: list[_Call] = field(default_factory=list)
    _entrance: threading.Lock = field(default_factory=threading.Lock)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def run(self, name: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Run a function of `hpo.transactions`; returns when its transaction was made."""
        call = _Call(name, arguments, named)
        if name in READERS:
            self._run([call])
            return call.answer()
        with self._entrance:
            self._waiting.append(call)
        with self._turn:
            if not call.done:
                with self._entrance:
                    calls, self._waiting = self._waiting, []
                self._run(calls)
        return call.answer()

    def _run(self, calls: list[_Call]) -> None:
        try:
            results = self.storage.run_together([(call.name, call.arguments, call.named) for call in calls])
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


class _Ours:
    """The second service: functions of `hpo.transactions` by name, arguments and answers in JSON."""

    def __init__(self, storage: PatientStorage) -> None:
        self._together = Together(storage)

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
            return encode([self._together.run(name, arguments, named), None])
        except PASSED_ON as error:
            return encode([None, [type(error).__name__, str(error.args[0]) if error.args else ""]])


class _Explains(grpc.ServerInterceptor):  # type: ignore[misc]
    """Tells clients why a call failed: a database that is away apart from what no waiting mends."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler

        def explained(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                return handler.unary_unary(request, context)
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
