"""A database that is away for a while costs time and nothing else."""

import gc
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import optuna
import psycopg
import pymysql
import pytest
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState

import hpo.outage
from hpo.heartbeats import Heartbeats
from hpo.interrupts import uninterrupted
from hpo.mirror import MirroredStudy, Told
from hpo.once import TOKEN
from hpo.outage import DatabaseAway, Patience, is_passing
from hpo.rehearsal import cut_connections
from hpo.storage import POSTGRESQL_LIMITS, STATEMENT_OPTIONS, close, open_database, open_storage

SPACE = {name: FloatDistribution(0.0, 1.0) for name in ("x", "y")}
AWAY = sqlite3.OperationalError("database is locked")
AWAY.sqlite_errorcode = sqlite3.SQLITE_BUSY


def sqlite_error(code, words="it is so"):
    error = sqlite3.OperationalError(words)
    error.sqlite_errorcode = code
    return error


def wrapped(error, *, invalidated=False):
    """As SQLAlchemy and Optuna hand a driver's error on."""
    outer = sqlalchemy.exc.OperationalError("SELECT 1", {}, error, connection_invalidated=invalidated)
    internal = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    internal.__cause__ = outer
    return internal


# Which errors pass


@pytest.mark.parametrize(
    "error",
    [
        psycopg.errors.AdminShutdown("terminating connection due to administrator command"),
        psycopg.errors.CannotConnectNow("the database system is starting up"),
        psycopg.errors.DeadlockDetected("deadlock detected"),
        psycopg.errors.LockNotAvailable("canceling statement due to lock timeout"),
        psycopg.errors.TooManyConnections("sorry, too many clients already"),
        psycopg.OperationalError("connection failed: Connection refused"),
        psycopg.OperationalError("connection failed: FATAL:  the database system is in recovery mode"),
        psycopg.OperationalError("server closed the connection unexpectedly"),
        pymysql.err.OperationalError(2003, "Can't connect to MySQL server"),
        pymysql.err.OperationalError(2006, "MySQL server has gone away"),
        pymysql.err.OperationalError(2013, "Lost connection to MySQL server during query"),
        pymysql.err.OperationalError(1205, "Lock wait timeout exceeded"),
        pymysql.err.OperationalError(1213, "Deadlock found when trying to get lock"),
        sqlite_error(sqlite3.SQLITE_BUSY),
        sqlite_error(sqlite3.SQLITE_BUSY_SNAPSHOT),
        sqlite_error(sqlite3.SQLITE_LOCKED),
        sqlalchemy.exc.PendingRollbackError("Can't reconnect until invalid transaction is rolled back."),
    ],
    ids=str,
)
def test_waiting_mends(error):
    assert is_passing(error)
    if not isinstance(error, sqlalchemy.exc.SQLAlchemyError):
        assert is_passing(wrapped(error))


@pytest.mark.parametrize(
    "error",
    [
        psycopg.OperationalError('connection failed: FATAL:  password authentication failed for user "me"'),
        psycopg.OperationalError('connection failed: FATAL:  database "nodb" does not exist'),
        psycopg.OperationalError("connection failed: FATAL:  no pg_hba.conf entry for host"),
        psycopg.errors.DiskFull("could not extend file: No space left on device"),
        psycopg.errors.UniqueViolation("duplicate key value violates unique constraint"),
        psycopg.errors.UndefinedTable("relation does not exist"),
        pymysql.err.OperationalError(1045, "Access denied for user"),
        pymysql.err.OperationalError(1049, "Unknown database"),
        pymysql.err.OperationalError(1114, "The table is full"),
        pymysql.err.IntegrityError(1062, "Duplicate entry"),
        sqlite_error(sqlite3.SQLITE_FULL, "database or disk is full"),
        sqlite_error(sqlite3.SQLITE_IOERR, "disk I/O error"),
        sqlite_error(sqlite3.SQLITE_ERROR, "no such table: trials"),
        KeyError("no such study"),
        DatabaseAway("it was waited for already"),
    ],
    ids=str,
)
def test_no_waiting_mends(error):
    assert not is_passing(error)
    assert not is_passing(wrapped(error))


def test_a_lost_connection_passes_whatever_its_driver_calls_it():
    assert is_passing(wrapped(RuntimeError("broken pipe"), invalidated=True))


# Waiting


class Database:
    """Fails a few times, and then answers."""

    def __init__(self, failures, error=AWAY):
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "answer"


@pytest.fixture
def said(monkeypatch, caplog):
    """Patience without waits says at once what it would say later."""
    monkeypatch.setattr(hpo.outage, "SAID_AFTER_S", 0.0)
    monkeypatch.setattr(hpo.outage, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(hpo.outage, "LONGEST_WAIT_S", 0.001)
    monkeypatch.setattr(logging.getLogger("hpo"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="hpo")
    return caplog


def test_a_call_is_repeated_until_the_database_answers_and_both_are_said_once(said):
    states = []
    patience = Patience("sqlite:///hpo.db", 60, states.append)
    database = Database(5)
    assert patience.through(database) == "answer"
    assert database.calls == 6
    away, back = said.messages
    assert away == "The database sqlite:///hpo.db is away (database is locked); waiting for it, for 60 s at most."
    assert back.startswith("The database sqlite:///hpo.db is back, after ")
    assert states[0].startswith("the database is away since ")
    assert states[1:] == [""]
    assert not patience.is_away


def test_a_database_that_was_away_for_days_says_so(said):
    patience, database = Patience("db", 60), Database(1)

    def probe():
        patience._away_since -= timedelta(days=2)

    patience.through(database, probe)
    assert said.messages[-1].startswith("The database db is back, after 1728")


def test_a_deadlock_is_repeated_without_a_word(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hpo"), "propagate", True)
    states = []
    assert Patience("db", 60, states.append).through(Database(1)) == "answer"
    assert (states, caplog.messages) == ([], [])


@pytest.mark.parametrize(
    "deadlock",
    [
        psycopg.errors.DeadlockDetected("deadlock detected"),
        psycopg.errors.SerializationFailure("could not serialize access"),
        pymysql.err.OperationalError(1213, "Deadlock found when trying to get lock"),
    ],
    ids=["postgresql", "serialization", "mysql"],
)
def test_a_turn_that_was_lost_to_another_is_taken_again_where_nobody_waits(deadlock):
    error = sqlalchemy.exc.OperationalError("UPDATE", {}, deadlock)
    assert Patience("db").through(Database(3, error)) == "answer"


def test_a_database_that_stays_away_ends_in_a_sentence_and_is_not_waited_for_again(said):
    patience = Patience("db", 0.02)
    with pytest.raises(
        DatabaseAway, match=r"^The database db is away since .* \(database is locked\), longer than "
    ) as e:
        patience.through(Database(10**9))
    assert "--storage-timeout 0.02" in str(e.value)
    again = Database(10**9)
    with pytest.raises(DatabaseAway):
        patience.through(again)
    assert again.calls == 1
    assert patience.through(Database(0)) == "answer"
    assert patience.through(Database(2)) == "answer", "once it has answered, it is waited for again"


def test_without_a_timeout_a_call_is_made_once():
    database = Database(1)
    with pytest.raises(DatabaseAway):
        Patience("db").through(database)
    assert database.calls == 1


def test_what_no_waiting_mends_is_raised_at_once():
    database = Database(1, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        Patience("db", 60).through(database)
    assert database.calls == 1


def test_a_call_within_a_call_is_repeated_with_it(said):
    patience, inner = Patience("db", 60), Database(1)
    outer = []

    def call():
        outer.append(1)
        return patience.through(inner)

    assert patience.through(call) == "answer"
    assert (len(outer), inner.calls) == (2, 2)


def test_the_wait_goes_on_while_a_probe_fails(said):
    database, probe = Database(1), Database(3)
    assert Patience("db", 60).through(database, probe) == "answer"
    assert (database.calls, probe.calls) == (2, 4)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("within_transaction", [False, True])
def test_ctrl_c_ends_a_wait_at_once(monkeypatch, within_transaction):
    monkeypatch.setattr(hpo.outage, "FIRST_WAIT_S", 600)
    patience = Patience("db", 600)
    press = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    press.start()

    def wait():
        if not within_transaction:
            return patience.through(Database(10**9))
        with uninterrupted():
            return patience.through(Database(10**9))

    with pytest.raises(KeyboardInterrupt):
        wait()
    press.join()
    with pytest.raises(DatabaseAway):  # what is tidied up on the way out does not wait
        patience.through(Database(10**9))


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_within_the_call_before_a_wait_ends_the_wait(monkeypatch):
    monkeypatch.setattr(hpo.outage, "FIRST_WAIT_S", 600)

    def call():
        signal.raise_signal(signal.SIGINT)
        raise AWAY

    with pytest.raises(KeyboardInterrupt), uninterrupted():
        Patience("db", 600).through(call)


# Optuna's own calls, where a connection is lost in the middle of a commit


@pytest.fixture
def study_of(any_url):
    storage = open_storage(any_url, timeout_s=60)
    yield optuna.create_study(storage=storage, study_name="s", direction="maximize"), storage
    close(storage)


def lose_connection_after_commit(storage, monkeypatch):
    """The next transaction is made, and nobody hears of it."""
    lost = []
    real = sqlalchemy.engine.Connection._commit_impl

    def commit(connection):
        real(connection)
        if not lost and connection.engine is storage.engine:
            lost.append(1)
            raise sqlalchemy.exc.OperationalError("COMMIT", {}, OSError("cable"), connection_invalidated=True)

    monkeypatch.setattr(sqlalchemy.engine.Connection, "_commit_impl", commit)
    return lost


@pytest.mark.parametrize("queued", [False, True])
def test_a_trial_entered_in_a_lost_commit_is_entered_once(study_of, monkeypatch, queued):
    study, storage = study_of
    lost = lose_connection_after_commit(storage, monkeypatch)
    monkeypatch.setattr("optuna.storages._rdb.storage.random.random", lambda: 0.0)
    if queued:
        study.enqueue_trial({"x": 0.5})
    trial = study.ask()
    trial.suggest_float("x", 0.0, 1.0)
    study.tell(trial, 0.5)
    assert lost
    assert [one.state for one in study.trials] == [TrialState.COMPLETE]


def test_a_waiting_trial_claimed_in_a_lost_commit_is_this_ones(study_of, monkeypatch):
    study, storage = study_of
    study.enqueue_trial({"x": 0.5})
    lost = lose_connection_after_commit(storage, monkeypatch)
    assert storage.set_trial_state_values(study.trials[0]._trial_id, TrialState.RUNNING)
    assert lost
    assert not storage.set_trial_state_values(study.trials[0]._trial_id, TrialState.RUNNING), "it is taken"
    assert TOKEN in study.trials[0].system_attrs


def test_a_trial_told_in_a_lost_commit_is_told(study_of, monkeypatch):
    study, storage = study_of
    trial = study.ask({"x": FloatDistribution(0.0, 1.0)})
    lost = lose_connection_after_commit(storage, monkeypatch)
    study.tell(trial, 0.25)
    assert lost
    assert study.trials[0].value == 0.25
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.25])


# Servers that go away in mid-run


def run_to(total, storage, part=5):
    """A worker whose objective costs nothing."""
    study = optuna.create_study(
        storage=storage, study_name="s", directions=["maximize", "minimize"], load_if_exists=True
    )
    with Heartbeats(storage, interval_s=0.2) as heartbeats:
        mirror = MirroredStudy(study, storage, RandomSampler(seed=0), SPACE, heartbeats=heartbeats)
        while mirror.ended < total:
            asked = mirror.ask(part, limit=total)
            mirror.tell([Told(trial=one, values=(one.params["x"], one.params["y"])) for one in asked])
    storage.remove_session()  # of this thread


def assert_complete(url, total):
    storage = RDBStorage(url)  # Optuna's own, without our patience
    trials = optuna.load_study(study_name="s", storage=storage).trials
    close(storage)
    assert [trial.number for trial in trials] == list(range(total))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert all(trial.values == [trial.params["x"], trial.params["y"]] for trial in trials)
    assert len({tuple(trial.params.values()) for trial in trials}) == total


def finished(url):
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return connection.scalar(sqlalchemy.text("SELECT count(*) FROM trials WHERE state = 'COMPLETE'"))


@pytest.mark.filterwarnings("ignore:.*deleted while still open:ResourceWarning")
def test_no_trial_is_lost_while_connections_are_cut(private_database):
    storage = open_storage(private_database.url, timeout_s=60)
    worker = threading.Thread(target=run_to, args=(60, storage, 2))
    worker.start()
    cut = 0
    while worker.is_alive():
        cut += cut_connections(private_database.url)
        worker.join(0.05)
    close(storage)
    gc.collect()  # SQLAlchemy does not close a connection that was cut while it was being made; here and not later
    assert cut > 3
    assert_complete(private_database.url, 60)


def test_no_trial_is_lost_while_the_server_restarts(private_database):
    storage = open_storage(private_database.url, timeout_s=60)
    worker = threading.Thread(target=run_to, args=(60, storage, 2))
    worker.start()
    while not finished(private_database.url):
        time.sleep(0.01)
    private_database.stop()
    private_database.start()
    worker.join(120)
    close(storage)
    assert_complete(private_database.url, 60)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_statement_that_hangs_counts_as_a_database_that_is_away(new_database, monkeypatch, kind):
    monkeypatch.setitem(POSTGRESQL_LIMITS, "lock_timeout", "200ms")
    monkeypatch.setitem(STATEMENT_OPTIONS, "pymysql", {"read_timeout": 1})
    storage = open_storage(new_database(kind))
    study = optuna.create_study(storage=storage, study_name="s", directions=["maximize", "minimize"])
    with storage.engine.connect() as frozen:
        frozen.execute(sqlalchemy.text("SELECT study_id FROM studies FOR UPDATE"))
        with pytest.raises(DatabaseAway):
            MirroredStudy(study, storage, RandomSampler(seed=0), SPACE).ask(1)
    assert len(MirroredStudy(study, storage, RandomSampler(seed=0), SPACE).ask(1)) == 1
    close(storage)


def test_a_process_that_stands_still_in_a_transaction_is_not_waited_for_without_end(new_database):
    url = new_database("postgresql")

    def limits(url, **options):
        storage = open_database(url, **options)
        with storage.engine.connect() as connection:
            found = [
                connection.scalar(sqlalchemy.text(f"SHOW {limit}"))
                for limit in ("lock_timeout", "idle_in_transaction_session_timeout")
            ]
        close(storage)
        return found

    assert limits(url) == ["30s", "1min"]
    assert limits(f"{url}?options=-c%20lock_timeout%3D7s") == ["7s", "0"]
    assert limits(url, gives_up=False) == ["0", "0"]


def test_a_locked_sqlite_file_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("hpo.storage.PATIENT_BUSY_TIMEOUT_S", 0.05)
    url = f"sqlite:///{tmp_path}/hpo.db"
    storage = open_storage(url, timeout_s=60)
    worker = threading.Thread(target=run_to, args=(30, storage))
    with closing(sqlite3.connect(tmp_path / "hpo.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        worker.start()
        worker.join(0.5)
        assert worker.is_alive()
        other.execute("ROLLBACK")
    worker.join(60)
    close(storage)
    assert_complete(url, 30)


def test_a_full_disk_ends_a_run_and_leaves_a_sound_database(tmp_path):
    """The limit on a file's size is what a full disk looks like to SQLite."""
    url = f"sqlite:///{tmp_path}/hpo.db"
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_outage import open_storage, run_to
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
from hpo.outage import database_reason
try:
    run_to(10_000, open_storage({url!r}, timeout_s=60), part=50)
except Exception as error:
    print(database_reason(error))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() in ("database or disk is full", "disk I/O error"), ended.stderr
    with closing(sqlite3.connect(tmp_path / "hpo.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    told = finished(url)
    assert told > 0
    assert told % 50 == 0, "a generation is told whole"
