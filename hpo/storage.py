"""The SQL database: opening it safely, and finding, making and resuming studies in it.

Optuna's own tables hold everything, so optuna-dashboard and `optuna.load_study` see all of it.
"""

import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote_plus

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.study.study import _SYSTEM_ATTR_METRIC_NAMES
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InvalidatePoolError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from hpo.bulk import ENDED, found_study
from hpo.errors import HpoError, StorageError, StudyChanged, StudyNotFound
from hpo.interrupts import uninterrupted
from hpo.once import TOKEN, claim_trial, finish_once, new_token, trial_of_token, with_token
from hpo.outage import DATABASE_ERRORS, DatabaseAway, Patience, database_reason, is_passing, patiently
from hpo.proxy import GRPC_SCHEME, RemoteStorage, connect
from hpo.transactions import FUNCTIONS, READERS

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DEFAULT_URL = "sqlite:///hpo.db"
SERVER_EXAMPLE = "postgresql+psycopg://user@host/database"
DRIVERS = {
    "postgresql": ("psycopg", "pip install 'psycopg[binary]'"),
    "mysql": ("pymysql", "pip install pymysql"),
    "mariadb": ("pymysql", "pip install pymysql"),
}
"""By kind of server: the driver that this package is tested with, and how it is installed."""
BUSY_TIMEOUT_S = 60
PATIENT_BUSY_TIMEOUT_S = 2
"""Where a call is repeated anyway: SQLite's own wait for a lock heeds no Ctrl-C."""
CONNECT_TIMEOUT_S = 10
RESTED_S, USED_AT = 1.0, "hpo:used_at"
"""A connection to a server that was not used for so long is tested first; and where it is noted when it was."""
CONNECT_OPTIONS: dict[str, dict[str, int]] = {
    "psycopg": {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
    },
    "pymysql": {"connect_timeout": CONNECT_TIMEOUT_S},
}
"""By driver: so that a server whose machine vanished is found to be away. A URL's own options come first."""
STATEMENT_OPTIONS: dict[str, dict[str, int]] = {
    "pymysql": {"read_timeout": 120, "write_timeout": 120},  # more than MySQL waits for a lock
}
"""By driver: so that a statement that hangs is given up."""
POSTGRESQL_LIMITS = {"lock_timeout": "30s", "idle_in_transaction_session_timeout": "60s"}
"""So that a statement that hangs is given up, and who stands still in a transaction holds others up for a minute."""
RACE_WAITS_S = (0.1, 0.2, 0.4, 0.8, 1.6)
MADE_MEANWHILE = re.compile(r"already exists|unique constraint|duplicate", re.IGNORECASE)
"""What SQLite, PostgreSQL and MySQL say where Optuna's tables appear between its look and its CREATE TABLE."""
TOO_MANY_CONNECTIONS = re.compile(r"too many (clients|connections)|connection slots|max_user_connections", re.I)
"""What PostgreSQL and MySQL say where they take no more connections, of anyone or of this user."""
NOT_WRITABLE = re.compile(r"unable to open|readonly", re.IGNORECASE)
"""What SQLite says where it cannot make its files or write to them."""

# MySQL's own text is of 64 KiB, which is less than what 400,000 examples say of a trial; this is how tables are made.
LONG_TEXT = sqlalchemy.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
models.TrialUserAttributeModel.__table__.c.value_json.type = LONG_TEXT

FINISHED = ENDED
IDENTITY = "identity"
"""Study attribute: fingerprints of what a study may not change while it runs."""
FIXED = "fixed"
"""Study attribute: settings that are not searched, where there are any."""

HIDDEN = "***"
SECRET_OPTIONS = re.compile(r"pass|pwd|secret|token|odbc_connect", re.IGNORECASE)
"""Options after a URL's `?` whose values are hidden; odbc_connect holds a whole connection string."""

OPTUNA_COLUMNS = {
    "studies": {"study_id", "study_name"},
    "trials": {"trial_id", "study_id"},
    "version_info": {"schema_version"},
}
"""Columns that tell Optuna's tables from others of the same names."""


BEHIND_CACHE = ("_get_trials", "_set_trial_param", "_get_best_trial_id")
"""What the cache that Optuna puts before a database calls of it, besides the public methods."""
BESIDE = ("record_heartbeat", "get_trial_param", "get_trial_user_attrs", "get_trial_system_attrs")
"""Public methods that need not be written for every storage, and are for databases."""


class PatientStorage(RDBStorage):
    """Optuna's SQL storage, each of whose calls a Ctrl-C waits for, and which repeats them while the database is away.

    Attributes:
        patience: How long they wait.
        joins_calls: Whether a call waits for those of other workers, so that two are better made as one.
        fresh_s: How old what was read may be that needs not be read anew, in seconds.
    """

    patience = Patience("the database")
    joins_calls = False
    fresh_s = 0.0

    def through(self, call: Callable[[], Result]) -> Result:
        """Run what may be repeated: again while the database is away, and to its end where Ctrl-C is pressed."""
        with uninterrupted():
            return self.patience.through(call, self._probe)

    def run_transaction(self, name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Run a function of `hpo.transactions` in a transaction."""
        (result,) = self.run_together([(name, arguments, named)])
        return result

    def run_together(self, calls: Sequence[tuple[str, Sequence[Any], Mapping[str, Any]]]) -> list[Any]:
        """Run several functions, given by name and arguments, in one transaction: all of them or none."""

        begins_writing = self.engine.dialect.name == "sqlite" and any(name not in READERS for name, _, _ in calls)

        def call() -> list[Any]:
            with Session(self.engine) as session, session.begin():
                if begins_writing:  # one that began as a reader may not become a writer any more
                    session.execute(sqlalchemy.text("BEGIN IMMEDIATE"))
                return [FUNCTIONS[name](session, *arguments, **named) for name, arguments, named in calls]

        return self.through(call)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Enter a trial; entering it again, where a connection was lost, gives the same one."""
        return self._create_new_trial(study_id, template_trial)._trial_id

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        marked = with_token(template_trial)
        return self.through(lambda: RDBStorage._create_new_trial(self, study_id, marked))

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> models.TrialModel:
        """Optuna calls this within the transaction, once it is this process's turn to enter trials."""
        assert template_trial is not None
        there = trial_of_token(session, study_id, template_trial.system_attrs[TOKEN])
        return there or super()._get_prepared_new_trial(study_id, template_trial, session)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Start a waiting trial or finish a running one; again, where a connection was lost, with the same answer."""
        if state == TrialState.RUNNING:
            return claim_trial(self, trial_id, new_token())
        return finish_once(self, trial_id, state, values, RDBStorage.set_trial_state_values)

    def _probe(self) -> None:
        self.engine.connect().close()


for _name in (*BaseStorage.__abstractmethods__, *BEHIND_CACHE, *BESIDE):
    if _name not in vars(PatientStorage):
        setattr(PatientStorage, _name, patiently(getattr(RDBStorage, _name)))


Storage = PatientStorage | RemoteStorage
"""A database, or a server in front of one."""


def close(storage: Storage) -> None:
    """Close the connections that a storage holds."""
    if isinstance(storage, RemoteStorage):
        storage.close()
        return
    storage.remove_session()
    storage.engine.dispose()


def storage_url(given: str | None) -> str:
    """The storage to use: the given URL, else `HPO_STORAGE`, else `sqlite:///hpo.db`."""
    return given or os.environ.get("HPO_STORAGE") or DEFAULT_URL


def display_url(url: str) -> str:
    """The URL with its passwords hidden, safe to print, log and store."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Only what is plainly a path can be shown: where a malformed URL has its password, nobody knows.
        return url if re.fullmatch(r"(sqlite:)?[\w./-]+", url) else "(a malformed URL)"
    if parsed.host is not None:
        parsed = parsed.set(host=parsed.host.rpartition("@")[2])  # a password's "@" that was not written %40
    secrets = {option: HIDDEN for option in parsed.query if SECRET_OPTIONS.search(option)}
    shown = parsed.update_query_dict(secrets).render_as_string(hide_password=True)
    return shown.replace(quote_plus(HIDDEN), HIDDEN)


def printable(text: str) -> str:
    """What others wrote into a database, without what would steer the terminal."""
    return text if text.isprintable() else repr(text)


def open_storage(
    url: str, *, create: bool = True, timeout_s: float = 0.0, on_state: Callable[[str], None] | None = None
) -> Storage:
    """Open the database, and create Optuna's tables where it is empty; or reach one through `hpo storage serve`.

    SQLite runs in write-ahead mode with a busy timeout, so that optuna-dashboard may read while a study writes.

    Args:
        url: An SQLAlchemy URL, or grpc://host:port.
        create: Whether a SQLite file that does not exist may be made; other servers' databases must exist.
        timeout_s: How long calls are repeated if the database goes away once it is open; 0 for not at all.
        on_state: Told in words that the database is away, and "" when it is back.
    Raises:
        StorageError: The URL is malformed, the database cannot be reached, or it is somebody else's.
    """
    if url.startswith(GRPC_SCHEME):
        return connect(url, timeout_s, on_state)
    return open_database(url, create=create, timeout_s=timeout_s, on_state=on_state)


def open_database(
    url: str,
    *,
    create: bool = True,
    timeout_s: float = 0.0,
    on_state: Callable[[str], None] | None = None,
    connections: int = 5,
    gives_up: bool = True,
) -> PatientStorage:
    """`open_storage` for what needs the SQL database itself.

    Args:
        url: An SQLAlchemy URL.
        create: As `open_storage`, and so are the next two.
        timeout_s: See there.
        on_state: See there.
        connections: To a server, as many as threads need.
        gives_up: Whether a statement that takes minutes counts as one that hangs.
    Raises:
        StorageError: As `open_storage`, or the URL is that of a server of `hpo storage serve`.
    """
    if url.startswith(GRPC_SCHEME):
        raise StorageError(
            f"{display_url(url)} is a server of `hpo storage serve`, and this needs the SQL database behind it; pass "
            "that one's URL."
        )
    parsed = _parse(url)
    shown = display_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite:
        _check_sqlite_file(parsed, shown, create)
    engine_kwargs = _engine_options(parsed, is_sqlite, timeout_s, connections, gives_up)
    try:
        _refuse_foreign_tables(parsed, shown, engine_kwargs)
        if is_sqlite:
            _switch_to_write_ahead(Path(str(parsed.database)))
        storage = _make_storage(url, engine_kwargs)
    except StorageError:
        raise
    except Exception as error:  # drivers raise whatever the parsers of their options do
        raise StorageError(_why_not_opened(error, shown, is_sqlite)) from error
    if is_sqlite:
        sqlalchemy.event.listen(storage.engine, "connect", _relax_sqlite_sync)
        storage.engine.dispose()  # connections made before the listener
    else:
        if gives_up and parsed.get_driver_name() == "psycopg" and "options" not in parsed.query:
            sqlalchemy.event.listen(storage.engine, "connect", _limit_waits)
            storage.engine.dispose()
        _test_rested_connections(storage.engine)
    storage.patience = Patience(shown, timeout_s, on_state)
    return storage


def _test_rested_connections(engine: sqlalchemy.Engine) -> None:
    """Have connections to a server tested before they are used again, unless they were in use just now."""

    def note(_connection: Any, record: ConnectionPoolEntry) -> None:
        record.info[USED_AT] = time.monotonic()

    def test(connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        if time.monotonic() - record.info.get(USED_AT, float("-inf")) < RESTED_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error  # and connect anew

    sqlalchemy.event.listen(engine, "connect", note)
    sqlalchemy.event.listen(engine, "checkin", note)
    sqlalchemy.event.listen(engine, "checkout", test)


def _engine_options(url: URL, is_sqlite: bool, timeout_s: float, connections: int, gives_up: bool) -> dict[str, Any]:
    if is_sqlite:
        timeout = PATIENT_BUSY_TIMEOUT_S if timeout_s else BUSY_TIMEOUT_S
        return {"pool_size": connections, "connect_args": {"timeout": timeout}}
    driver = url.get_driver_name()
    ours = {**CONNECT_OPTIONS.get(driver, {}), **(STATEMENT_OPTIONS.get(driver, {}) if gives_up else {})}
    return {
        "pool_size": connections,
        "pool_pre_ping": False,  # which Optuna would choose for MySQL
        "pool_use_lifo": True,  # one that was used just now need not be tested, and knows the statements already
        # Who has waited for a turn must see what was written meanwhile; MariaDB shows a transaction its beginning.
        "isolation_level": "READ COMMITTED",
        "connect_args": {option: value for option, value in ours.items() if option not in url.query},
    }


def open_study(
    storage: Storage,
    name: str,
    *,
    directions: Sequence[Literal["maximize", "minimize"]],
    metric_names: Sequence[str],
    identity: Mapping[str, str],
    attributes: Mapping[str, Any],
) -> optuna.Study:
    """Create the study, or resume the one of that name if it is the same one; the caller sets sampler and pruner.

    Args:
        storage: An open storage.
        name: The study's name in the database.
        directions: "maximize" or "minimize" per objective.
        metric_names: A name per objective, which optuna-dashboard shows on its axes.
        identity: What a study may not change, such as its model's fingerprint, by the word the user knows it by.
        attributes: Further facts, written once when the study is made. Of those that decide the identity, the message
            below names the ones that differ.
    Raises:
        StudyChanged: A study of that name has another identity, and the message names what differs; or the database
            has one of a name that it does not tell from this one.
    """
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    if study.study_name != name:
        raise StudyChanged(
            f"{display_url(storage.url)} takes the name {name!r} for that of its study {study.study_name!r}; choose "
            "another name."
        )
    if IDENTITY not in study.user_attrs:
        if study.get_trials(deepcopy=False) and IDENTITY not in study.user_attrs:  # nobody else made it meanwhile
            raise StudyChanged(f"Study {name!r} holds trials that this tool did not make; choose another name.")
        if [direction.name.lower() for direction in study.directions] != list(directions):
            raise StudyChanged(f"Study {name!r} was made by another tool, for other objectives; choose another name.")
        named = {_SYSTEM_ATTR_METRIC_NAMES: list(metric_names)}
        found_study(storage, study._study_id, IDENTITY, {**attributes, IDENTITY: dict(identity)}, named)
    recorded = study.user_attrs[IDENTITY]
    if changed := [key for key in {**identity, **recorded} if recorded.get(key) != identity.get(key)]:
        words = [word for key in changed for word in _what_changed(key, study.user_attrs, attributes)]
        raise StudyChanged(
            f"Study {name!r} was made with another {' and another '.join(words)}, so its trials cannot be compared "
            "with new ones. Go back to what it was made with, or start a new study: copy its .toml file, change `name` "
            "and pass it as --study."
        )
    return study


def _what_changed(key: str, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The flags and settings that make a part of the identity another, with what they were; else the part's own word.

    Args:
        key: The part.
        recorded: The study's attributes.
        given: Those that it would be made with now.
    """
    if key not in ("search space", "dataset"):
        return [key]
    settings_of = _settings_of_space if key == "search space" else _settings_of_data
    before, now = settings_of(recorded), settings_of(json.loads(json.dumps(given)))
    if key == "search space" and FIXED in given and FIXED not in recorded:  # made by an earlier version
        key, now = "search space or [fixed] value", {name: now[name] for name in before}
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} ({'not given' if before.get(name) is None else before[name]})" for name in changed] or [key]


def _settings_of_space(attributes: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {f"[fixed] {name}": value for name, value in attributes.get(FIXED, {}).items()}
    return {"--objective": attributes.get("objective"), **fixed}


def _settings_of_data(attributes: Mapping[str, Any]) -> dict[str, Any]:
    workload = attributes.get("workload", {})
    flags = {**workload.get("data", {}), **{name: workload.get(name) for name in ("max_length", "stride")}}
    return {f"--{name.replace('_', '-')}": value for name, value in flags.items()}


def find_study(storage: Storage, name: str, start_with: str) -> optuna.Study:
    """Load an existing study.

    Args:
        storage: An open storage.
        name: The study's name.
        start_with: The command that would make it, for the error's text.
    Raises:
        StudyNotFound: There is none; the message lists those that are.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage)
        if storage.get_study_name_from_id(study._study_id) != name:  # MySQL finds others too, such as in lower case
            raise KeyError(name)
        return study
    except (KeyError, UnicodeError) as error:  # what is no text is no study's name
        there = ", ".join(repr(summary.study_name) for summary in optuna.get_all_study_summaries(storage)) or "none"
        raise StudyNotFound(
            f"No study {name!r} in {display_url(storage.url)} (studies there: {there}); start it with `{start_with}`."
        ) from error


@contextmanager
def while_it_is_there(study: optuna.Study, storage: Storage) -> Iterator[None]:
    """Say in a sentence that a study is gone, where somebody deletes it while the block works on it.

    Raises:
        StudyNotFound: It was deleted.
    """
    try:
        yield
    except KeyError as error:  # of a study or a trial that is not found, or a mistake of ours
        if _is_there(study, storage):
            raise
        raise StudyNotFound(
            f"Study {study.study_name!r} was deleted from {display_url(storage.url)} meanwhile; run the same command "
            "again to start it anew."
        ) from error


def _is_there(study: optuna.Study, storage: Storage) -> bool:
    try:
        return storage.get_study_name_from_id(study._study_id) == study.study_name
    except KeyError:
        return False


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were completed or stopped early, by number; these count towards `--trials`."""
    return study.get_trials(deepcopy=False, states=FINISHED)


def explain_database_error(error: BaseException, url: str) -> HpoError:
    """One sentence for a database that fails in the middle of a run."""
    if isinstance(error, DatabaseAway):
        return error
    return StorageError(
        f"The database {display_url(url)} failed ({database_reason(error)}); finished trials are safe in it, so put it "
        "right and run the same command again to continue."
    )


def _parse(url: str) -> URL:
    if not url.isprintable():
        raise StorageError(
            "--storage has a line break or another character in it that cannot be shown; write for example "
            f"{DEFAULT_URL} or {SERVER_EXAMPLE}."
        )
    try:
        parsed = make_url(url)
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise StorageError(
            f"--storage {display_url(url)} is not a database URL; write for example {DEFAULT_URL} or {SERVER_EXAMPLE}."
        ) from error
    except ImportError as error:
        raise StorageError(_why_no_driver(error, parsed, display_url(url))) from error
    if re.search("[{}]", url):  # Optuna takes the URL for a template
        raise StorageError(f"--storage {display_url(url)} has braces in it; write {{ as %7B and }} as %7D.")
    if parsed.host is not None and "@" in parsed.host:
        raise StorageError(f"--storage {display_url(url)} has a password with an '@' in it; write that one as %40.")
    if parsed.get_backend_name() in ("mysql", "mariadb") and not parsed.database:
        raise StorageError(f"--storage {display_url(url)} names no database; add it, as in {SERVER_EXAMPLE}.")
    return parsed


def _why_no_driver(error: ImportError, url: URL, shown: str) -> str:
    """pip knows most drivers by another name than Python, and some lack a library of the system's."""
    reason = (str(error).splitlines() or ["ImportError"])[0].rstrip(".")
    kind = url.get_backend_name()
    if kind not in DRIVERS:
        return f"The driver for {shown} is not installed ({reason}); install it with pip."
    driver, install = DRIVERS[kind]
    other = "" if url.get_driver_name() == driver else f"begin it with {kind}+{driver}:// and "
    return f"The driver for {shown} is not installed ({reason}); {other}run `{install}`."


def _check_sqlite_file(url: URL, shown: str, create: bool) -> None:
    if url.database in (None, "", ":memory:"):
        raise StorageError(f"{shown} would be lost when the command ends; name a file, as in sqlite:///hpo.db.")
    if str(url.database).startswith("file:"):
        raise StorageError(f"{shown} is a SQLite URI; write the file's path, as in sqlite:///hpo.db.")
    path = Path(str(url.database))
    if not path.parent.is_dir():
        raise StorageError(
            f"There is no folder {path.parent} for the database {path.name}; make it, or pass another --storage."
        )
    if not path.exists() and not create:
        raise StorageError(f"There is no database {path}; `hpo tune` makes one, or pass another --storage.")


def _switch_to_write_ahead(path: Path) -> None:
    """Set the file's journal mode, which it then keeps."""
    with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _make_storage(url: str, engine_kwargs: dict[str, Any]) -> PatientStorage:
    """Optuna's storage; where another process makes the same new tables at this moment, it is given time to finish."""
    for wait_s in RACE_WAITS_S:
        try:
            return _checked_storage(url, engine_kwargs)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if not MADE_MEANWHILE.search(str(error)) and not is_passing(error):
                raise
            logger.debug("Another process is making the tables, or the connection is lost: %s", database_reason(error))
        time.sleep(wait_s)
    return _checked_storage(url, engine_kwargs)


def _checked_storage(url: str, engine_kwargs: dict[str, Any]) -> PatientStorage:
    """Optuna's storage, which leaves no connection open where it refuses the tables' version."""
    storage = PatientStorage(url, engine_kwargs=engine_kwargs, skip_compatibility_check=True)
    try:
        storage._version_manager.check_table_schema_compatibility()
    except BaseException:
        storage.engine.dispose()
        raise
    return storage


def _relax_sqlite_sync(connection: Any, _record: Any) -> None:
    """In write-ahead mode NORMAL keeps the file consistent; only a power cut may lose the last commits."""
    connection.execute("PRAGMA synchronous=NORMAL")


def _limit_waits(connection: Any, _record: Any) -> None:
    """Not by a parameter of the connection, which PgBouncer refuses."""
    connection.autocommit = True
    for limit, value in POSTGRESQL_LIMITS.items():
        connection.execute(f"SET {limit} = '{value}'")
    connection.autocommit = False


def _refuse_foreign_tables(url: URL, shown: str, engine_kwargs: Mapping[str, Any]) -> None:
    engine = sqlalchemy.create_engine(url, **engine_kwargs)
    try:
        inspector = sqlalchemy.inspect(engine)
        tables = set(inspector.get_table_names())
        named_alike = tables & OPTUNA_COLUMNS.keys()
        foreign = {
            table
            for table in named_alike
            if not OPTUNA_COLUMNS[table] <= {column["name"] for column in inspector.get_columns(table)}
        }
    finally:
        engine.dispose()
    if foreign or (tables and not named_alike):
        raise StorageError(
            f"{shown} holds somebody else's tables ({', '.join(sorted(foreign or tables)[:3])}, ...); "
            "use a database of its own."
        )


def _why_not_opened(error: Exception, shown: str, is_sqlite: bool) -> str:
    if isinstance(error, RuntimeError) and "table schema" in str(error):
        return (
            f"The tables of {shown} were made by another version of optuna than {optuna.__version__}; upgrade them "
            "with `hpo storage upgrade --storage URL`, or pass another --storage."
        )
    reason = database_reason(error)
    if TOO_MANY_CONNECTIONS.search(reason):
        return (
            f"Cannot use the storage {shown}: {reason}; let it take more, or have workers share those of one "
            "`hpo storage serve`."
        )
    if is_sqlite and NOT_WRITABLE.search(reason):
        return (
            f"Cannot use the storage {shown}: {reason}; SQLite writes files beside a database even to read it, so copy "
            "it to a folder that can be written, or name another file with --storage."
        )
    remedy = "name another file" if is_sqlite else "check the URL and that its server answers, or name another database"
    return f"Cannot use the storage {shown}: {reason}; {remedy} with --storage."


def count_finished(url: str, name: str) -> int | None:
    """Finished trials of a study; 0 where there is none, and None where the database does not answer."""
    try:
        storage = open_storage(url, create=False)
    except StorageError as error:
        return None if is_passing(error) else 0
    try:
        return len(finished_trials(find_study(storage, name, start_with="hpo tune")))
    except StudyNotFound:
        return 0
    except DATABASE_ERRORS:
        return None
    finally:
        close(storage)


def describe_studies(storage: Storage) -> list[dict[str, Any]]:
    """Every study of the database: its kind, the states of its trials, and its best values in words."""
    return [
        _describe(optuna.load_study(study_name=summary.study_name, storage=storage))
        for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)
    ]


def _describe(study: optuna.Study) -> dict[str, Any]:
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    names = study.metric_names or [f"value {number}" for number in range(len(study.directions))]
    best = [
        {"name": name, "direction": direction.name.lower(), "value": _best_value(complete, objective, direction)}
        for objective, (name, direction) in enumerate(zip(names, study.directions, strict=True))
    ]
    return {
        "study": study.study_name,
        "kind": study.user_attrs.get("kind", "other"),
        "finished": sum(state in FINISHED for state in states),
        "running": states.count(TrialState.RUNNING),
        "waiting": states.count(TrialState.WAITING),
        "failed": states.count(TrialState.FAIL),
        "best": best if complete else [],
        "best_text": ", ".join(f"{entry['name']} {entry['value']:.4g}" for entry in best) if complete else "-",
    }


def _best_value(trials: Sequence[FrozenTrial], objective: int, direction: optuna.study.StudyDirection) -> float | None:
    values = [trial.values[objective] for trial in trials]
    if not values:
        return None
    return float(max(values) if direction == optuna.study.StudyDirection.MAXIMIZE else min(values))
