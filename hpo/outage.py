"""Waiting for a database that is away: which errors pass, how long calls are repeated, what is said meanwhile."""

import functools
import logging
import random
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hpo.errors import StorageError
from hpo.interrupts import interruptible

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DEFAULT_TIMEOUT_S = 600.0
FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 5.0
SAID_AFTER_S = 1.0
"""A deadlock or one lost connection is over before; nobody needs to hear of it."""

PASSING_SQLSTATES = re.compile(r"08...|57P0[123]|57014|40001|40P01|55P03|53300|25P03")
"""PostgreSQL: connection lost, server stopping or starting, statement cancelled, serialisation failure, deadlock, lock
timeout, too many connections, transaction idle for too long."""

LASTING_WORDS = re.compile(
    r"authentication|password|pg_hba|does not exist|permission|not permitted|certificate|SSL|invalid", re.IGNORECASE
)
"""What PostgreSQL says of a connection that no waiting makes; before there is one, its errors have no number."""

PASSING_MYSQL_NUMBERS = frozenset({1020, 1040, 1053, 1205, 1213, 1317, 1927, 2002, 2003, 2006, 2013, 2014, 2055, 4031})
"""MySQL and MariaDB: changed since it was read, too many connections, stopping, lock timeout, deadlock, interrupted,
killed, not reachable, lost."""

LOST_TURNS = frozenset({"40001", "40P01", 1020, 1213})
"""Of these, what a database says that is there and has let another's transaction go first."""
LOST_TURN_S = 10.0
"""Seconds for which such a call is tried again even where nobody waits for a database that is away."""

PASSING_SQLITE_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})


class DatabaseAway(StorageError):
    """The database did not come back in time."""


DATABASE_ERRORS = (SQLAlchemyError, StorageInternalError, DatabaseAway)
"""What a call to a database that is open raises where that fails."""


class Patience:
    """How long calls to one database are tried again while it is away; all threads that use it share one.

    Attributes:
        shown: The database, as it may be shown.
        timeout_s: Seconds that a call waits at most; 0 for none.
        on_state: Told in one sentence that the database is away, and "" when it is back.
    """

    def __init__(self, shown: str, timeout_s: float = 0.0, on_state: Callable[[str], None] | None = None) -> None:
        self.shown = shown
        self.timeout_s = timeout_s
        self.on_state = on_state
        self._lock = threading.Lock()
        self._away_since: datetime | None = None
        self._said = False
        self._gave_up = threading.Event()
        self._within = threading.local()

    @property
    def is_away(self) -> bool:
        """Whether the last call found the database away."""
        return self._away_since is not None

    @property
    def has_given_up(self) -> bool:
        """Whether a call has waited in vain or `stop` was called, and none has succeeded since."""
        return self._gave_up.is_set()

    def stop(self) -> None:
        """Have calls be tried once, until one succeeds."""
        self._gave_up.set()

    def through(self, call: Callable[[], Result], probe: Callable[[], object] | None = None) -> Result:
        """Call, again and again while the database is away.

        The call must be one that may be repeated: where a connection is lost during a commit, nobody knows whether it
        was made. Calls may be nested; the outermost is repeated. A Ctrl-C ends a wait at once. After a call has waited
        in vain, or was interrupted, the next ones are tried once, until one succeeds.

        Args:
            call: Does the work.
            probe: Raises while the database is away and changes nothing, so that Ctrl-C may interrupt it.
        Raises:
            DatabaseAway: The database did not come back in time.
        """
        if getattr(self._within, "call", False):
            return call()
        started = time.monotonic()
        wait_s = FIRST_WAIT_S
        while True:
            try:
                with self._outermost():
                    result = call()
            except Exception as error:
                if not is_passing(error):
                    raise
                failure = error
            else:
                self._come_back()
                return result
            while True:
                timeout_s = max(self.timeout_s, LOST_TURN_S) if _is_lost_turn(failure) else self.timeout_s
                left_s = 0.0 if self._gave_up.is_set() else started + timeout_s - time.monotonic()
                self._go_away(time.monotonic() - started, failure)
                if left_s <= 0:
                    raise self._give_up(failure) from failure
                try:
                    with interruptible():
                        self._gave_up.wait(min(left_s, wait_s * random.uniform(0.5, 1.0)))  # not all at once
                        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                        if probe is not None:
                            probe()
                    break
                except KeyboardInterrupt:
                    self.stop()
                    raise
                except Exception as error:
                    if not is_passing(error):
                        raise
                    failure = error

    @contextmanager
    def _outermost(self) -> Iterator[None]:
        self._within.call = True
        try:
            yield
        finally:
            self._within.call = False

    def _go_away(self, waited_s: float, error: Exception) -> None:
        with self._lock:
            if self._away_since is None:
                self._away_since = datetime.now()
            since, said = self._away_since, self._said
            self._said = said or (waited_s >= SAID_AFTER_S and not self._gave_up.is_set())
            if said or not self._said:
                return
        logger.warning(
            "The database %s is away (%s); waiting for it, for %g s at most.",
            self.shown,
            database_reason(error),
            self.timeout_s,
        )
        if self.on_state is not None:
            self.on_state(f"the database is away since {since:%H:%M:%S}")

    def _come_back(self) -> None:
        if self._away_since is None and not self._gave_up.is_set():
            return
        with self._lock:
            since, said = self._away_since, self._said
            self._away_since, self._said = None, False
            self._gave_up.clear()
        if said and since is not None:
            away_s = (datetime.now() - since).total_seconds()
            logger.warning("The database %s is back, after %d s.", self.shown, away_s)
            if self.on_state is not None:
                self.on_state("")

    def _give_up(self, error: Exception) -> DatabaseAway:
        self.stop()
        since = self._away_since or datetime.now()
        return DatabaseAway(
            f"The database {self.shown} is away since {since:%H:%M:%S} ({database_reason(error)}), longer than "
            f"--storage-timeout {self.timeout_s:g} allows; finished trials are safe in it, so put it right and run the "
            "same command again to continue."
        )


def patiently(method: Callable[..., Any]) -> Callable[..., Any]:
    """Have a storage's method be called by the storage's own `through`, so that it is repeated."""

    @functools.wraps(method)
    def through(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.through(lambda: method(self, *args, **kwargs))

    return through


def is_passing(error: BaseException) -> bool:
    """Whether waiting may mend what a call to a database failed with; a wrong password or a full disk stays."""
    if isinstance(error, DatabaseAway):
        return False
    return any(_passes(cause) for cause in _causes(error))


def _is_lost_turn(error: BaseException) -> bool:
    return any(
        getattr(cause, "sqlstate", None) in LOST_TURNS or (bool(cause.args) and cause.args[0] in LOST_TURNS)
        for cause in _causes(error)
        if type(cause).__module__.partition(".")[0] in ("psycopg", "psycopg2", "pymysql", "MySQLdb")
    )


def _passes(error: BaseException) -> bool:
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if isinstance(error, PendingRollbackError | PoolTimeout):  # a lost connection, met a second time; all are taken
        return True
    if isinstance(error, sqlite3.Error):
        code: int = getattr(error, "sqlite_errorcode", 0)
        return code & 0xFF in PASSING_SQLITE_CODES
    if (grpc := sys.modules.get("grpc")) is not None and isinstance(error, grpc.RpcError):
        return _status_of(error) in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    driver = type(error).__module__.partition(".")[0]
    if driver in ("psycopg", "psycopg2"):
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if state is not None:
            return PASSING_SQLSTATES.fullmatch(state) is not None
        return type(error).__name__ == "OperationalError" and not LASTING_WORDS.search(str(error))
    if driver in ("pymysql", "MySQLdb") and error.args:
        return error.args[0] in PASSING_MYSQL_NUMBERS
    return False


def _status_of(error: BaseException) -> str:
    """Name of a gRPC status."""
    code = getattr(error, "code", None)
    return "" if code is None else str(code().name)


def database_reason(error: BaseException) -> str:
    """The driver's own words, without SQL, parameters, links or a full stop."""
    *_, cause = _causes(error)
    details = getattr(cause, "details", None)
    match cause.args:
        case (int(), str(words)):  # MySQL's drivers give their number first
            pass
        case _:
            words = str(details() if callable(details) else cause)  # gRPC's own text is a page
    lines = words.strip().splitlines()
    return (lines[0] if lines else type(cause).__name__).rstrip(".")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from, outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = getattr(cause, "orig", None) or cause.__cause__
