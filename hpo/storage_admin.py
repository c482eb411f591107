"""Moving studies from one database to another, and bringing a database's tables up to the installed Optuna.

`optuna.copy_study` commits trial by trial, so that a copy cut short stays behind as half a study; it drops heartbeats,
loses fractions of seconds in MySQL, and leaves ids of the old database in what genetic samplers and optuna-dashboard
note about trials. Here rows go from table to table as they stand, a study in one transaction, and are read back before
it is committed.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from sqlalchemy import Connection, DateTime, Table, Text, func, select
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from hpo.errors import HpoError, StorageError, StudyNotFound
from hpo.interrupts import uninterrupted
from hpo.outage import database_reason
from hpo.storage import BUSY_TIMEOUT_S, display_url, open_database

logger = logging.getLogger(__name__)

CHUNK_ROWS = 5000
"""Rows that are held in memory, and that a Ctrl-C waits for."""

STUDIES: Table = models.StudyModel.__table__
TRIALS: Table = models.TrialModel.__table__

MYSQL = ("mysql", "mariadb")
MYSQL_TEXT_BYTES = 65_535
MYSQL_UTF8_BYTES = 4

PARENTS_KEY = re.compile(r"\w+:parent:\d+")
"""Study attribute under which Optuna's genetic samplers keep the ids of a generation's parents."""

TRIAL_KEY = re.compile(r"(dashboard:|dashboard:artifacts:|preference:skip_trial:)(\d+)((?::.*)?)", re.DOTALL)
"""Study attributes of optuna-dashboard about one trial, such as a note: its id stands in the key."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CopiedStudy:
    """A study that is now in the database it was to be copied to.

    Attributes:
        name: Its name.
        trials: How many trials it has, in any state.
        found: Whether it was there already, equal in every row, from a copy of several studies that was cut short.
    """

    name: str
    trials: int
    found: bool = False


def copy_studies(from_url: str, to_url: str, names: Sequence[str] | None = None) -> list[CopiedStudy]:
    """Copy studies from one database to another, each whole or not at all.

    Where an earlier copy of the same studies was cut short, those that it finished are left as they are.

    Args:
        from_url: The database to read, which may be written meanwhile: each study is copied as it is at one moment.
        to_url: The database to write; a SQLite file may be new.
        names: The studies to copy; None copies all.
    Returns:
        The studies, in the order of `names` or of the source.
    Raises:
        StudyNotFound: The source has no study of a name; nothing is copied.
        HpoError: A study of a name is in the target already; nothing is copied.
        StorageError: A database cannot be used or failed, cannot hold what a study has, or both are the same one.
    """
    with _opened(from_url, create=False) as source:
        there = _study_names(source)
        wanted = list(dict.fromkeys(there if names is None else names))
        for name in wanted:
            if name not in there:
                raise _not_found(source, name, there)
        with _opened(to_url, create=True) as target:
            _refuse_same(source, target)
            taken = set(_study_names(target))
            found = [name for name in wanted if name in taken]
            for name in found:
                if len(found) == len(wanted) or not _is_copied(source, target, name):
                    raise _exists(target, name)
            copied = []
            for name in wanted:
                if name in taken:
                    with _snapshot(target) as connection:
                        trials = len(_Study.find(target, connection, name).trial_ids())
                    logger.info("Study %r is in %s already.", name, display_url(to_url))
                else:
                    trials = copy_study(source, target, name)
                copied.append(CopiedStudy(name=name, trials=trials, found=name in taken))
            return copied


def copy_study(source: RDBStorage, target: RDBStorage, name: str) -> int:
    """Copy a study in one transaction: every row of it, or none.

    Trials keep their order, number, state, parameters, values, attributes and times to the microsecond. Their ids
    become the target's own, also in study attributes that name trials by id. Heartbeats stay the same instants, in the
    target's clock. In MySQL and MariaDB the columns that hold times are made DATETIME(6) first, and those that hold
    text LONGTEXT where the study needs it; Optuna reads and writes them as before.

    Args:
        source: The database to read; others may write to it.
        target: The database to write.
        name: The study's name, exactly.
    Returns:
        How many trials it has, in any state.
    Raises:
        StudyNotFound: The source has no such study.
        HpoError: The target has a study of that name.
        StorageError: A database failed, cannot hold what the study has, or both are the same one.
    """
    _refuse_same(source, target)
    with _snapshot(source) as reading:
        original = _Study.find(source, reading, name)
        if name in _study_names(target):
            raise _exists(target, name)
        with _failing(target, f"Study {name!r} was not copied"):
            _widen_columns(target, original)
            with target.engine.begin() as writing:
                study_id, ahead = _enter_study(target, writing, name), _ahead_of_utc(writing)
                copy = _Study(storage=target, connection=writing, study_id=study_id, ahead=ahead)
                translated = _write(original, copy, name)
                if difference := _difference(original, copy, translated):
                    raise StorageError(
                        f"Study {name!r} was not copied: {display_url(target.url)} does not give back what was written "
                        f"to its table {difference}; choose a database of another kind."
                    )
    return len(translated.ids)


def upgrade(url: str) -> tuple[str, str]:
    """Bring the tables of a database up to the installed Optuna; nothing is done where they are.

    Args:
        url: An existing database; nobody else may use it meanwhile.
    Returns:
        The version of its schema before and after.
    Raises:
        StorageError: The database cannot be used, its schema is newer than the installed Optuna, or a step failed.
    """
    try:
        with _opened(url, create=False) as storage:
            version = storage.get_current_version()
            return version, version
    except StorageError as error:
        if "table schema" not in str(error.__cause__):
            raise
    timeout = {"connect_args": {"timeout": BUSY_TIMEOUT_S}} if url.startswith("sqlite") else {}
    storage = RDBStorage(url, engine_kwargs=timeout, skip_compatibility_check=True)
    with _closed_after(storage):
        before, newest = storage.get_current_version(), storage.get_head_version()
        if before not in storage.get_all_versions():
            raise StorageError(
                f"The tables of {display_url(url)} are of version {before}, which optuna {optuna.__version__} does not "
                f"know (its newest is {newest}); install a newer optuna."
            )
        try:
            with uninterrupted(), _logging_left_alone():
                storage.upgrade()
        except Exception as error:  # a migration is a script, which raises what it likes
            raise StorageError(
                f"The tables of {display_url(url)} were not upgraded from version {before}: {database_reason(error)}; "
                "put it right, or restore a backup, and run the same command again."
            ) from error
        return before, storage.get_current_version()


# One study in one database


@dataclass(frozen=True, kw_only=True)
class _Study:
    """A study as an open transaction sees it.

    Attributes:
        storage: Its database.
        connection: The transaction.
        study_id: Its id there.
        ahead: What the database's clock, which heartbeats are in, is ahead of UTC.
    """

    storage: RDBStorage
    connection: Connection
    study_id: int
    ahead: timedelta

    @classmethod
    def find(cls, storage: RDBStorage, connection: Connection, name: str) -> "_Study":
        """The study of exactly this name; MySQL finds others too, such as in lower case."""
        with _failing(storage, f"Study {name!r} cannot be read"):
            rows = connection.execute(select(STUDIES).where(STUDIES.c.study_name == name)).all()
            ahead = _ahead_of_utc(connection)
        for row in rows:
            if row.study_name == name:
                return cls(storage=storage, connection=connection, study_id=row.study_id, ahead=ahead)
        raise _not_found(storage, name, _study_names(storage))

    def trial_ids(self) -> list[int]:
        """Ids of its trials, in their order."""
        query = select(TRIALS.c.trial_id).where(TRIALS.c.study_id == self.study_id).order_by(TRIALS.c.trial_id)
        with _failing(self.storage, "A study cannot be read"), uninterrupted():
            return list(self.connection.scalars(query))

    def chunks(self, table: Table) -> Iterator[list[Row]]:
        """The rows of a table that belong to the study, in the order they were made; ids of details are left out."""
        query = self.of(table, select(*_copied_columns(table))).order_by(*table.primary_key)
        with _failing(self.storage, "A study cannot be read"):
            result = self.connection.execute(query, execution_options={"yield_per": CHUNK_ROWS})
            with closing(result):
                while rows := _uninterrupted(result.fetchmany, CHUNK_ROWS):
                    yield [dict(row._mapping) for row in rows]

    def of(self, table: Table, query: sqlalchemy.Select[Any]) -> sqlalchemy.Select[Any]:
        """The query, about this study's rows only."""
        link = _link(table)
        if link.references(STUDIES.c.study_id):
            return query.where(link == self.study_id)
        return query.join(TRIALS, link == TRIALS.c.trial_id).where(TRIALS.c.study_id == self.study_id)


@dataclass(frozen=True, kw_only=True)
class _Translated:
    """Rows of the source as they are to be in the target.

    Attributes:
        study_id: The study's id in the target.
        ids: The trials' ids in the target by those in the source.
        later: What the target's clock is ahead of the source's.
    """

    study_id: int
    ids: Mapping[int, int]
    later: timedelta

    def __call__(self, table: Table, row: Row) -> Row:
        if "trial_id" in row:
            row["trial_id"] = self.ids[row["trial_id"]]
        if "study_id" in row:
            row["study_id"] = self.study_id
        if "heartbeat" in row:
            row["heartbeat"] += self.later
        if table is models.StudySystemAttributeModel.__table__:
            row["key"], row["value_json"] = self._attribute(row["key"], row["value_json"])
        return row

    def _attribute(self, key: str, value: str) -> tuple[str, str]:
        if PARENTS_KEY.fullmatch(key):
            parents = json.loads(value)
            if isinstance(parents, list) and all(isinstance(one, int) and one in self.ids for one in parents):
                return key, json.dumps([self.ids[parent] for parent in parents])
        elif (named := TRIAL_KEY.fullmatch(key)) and int(named[2]) in self.ids:
            return f"{named[1]}{self.ids[int(named[2])]}{named[3]}", value
        return key, value


def _write(original: _Study, copy: _Study, name: str) -> _Translated:
    for rows in original.chunks(TRIALS):
        for row in rows:
            del row["trial_id"]
            row["study_id"] = copy.study_id
        _insert(copy.connection, TRIALS, rows)
    translated = _translation(original, copy)
    try:
        for table in (*_details_of(STUDIES), *_details_of(TRIALS)):
            for rows in original.chunks(table):
                _insert(copy.connection, table, [translated(table, row) for row in rows])
    except IntegrityError as error:
        raise StorageError(
            f"Study {name!r} was not copied: two of its parameters or attributes differ only in what "
            f"{display_url(copy.storage.url)} does not tell apart, such as case, accents or blanks at the end "
            f"({database_reason(error)}); create that database with COLLATE utf8mb4_bin, or choose another."
        ) from error
    return translated


def _insert(connection: Connection, table: Table, rows: list[Row]) -> None:
    with uninterrupted():
        connection.execute(sqlalchemy.insert(table), rows)


def _enter_study(target: RDBStorage, connection: Connection, name: str) -> int:
    try:
        result = connection.execute(sqlalchemy.insert(STUDIES).values(study_name=name))
    except IntegrityError as error:
        if name in _study_names(target):  # made at this moment
            raise _exists(target, name) from error
        raise HpoError(
            f"{display_url(target.url)} holds a study whose name it does not tell from {name!r}; choose another "
            "database, or one created with COLLATE utf8mb4_bin."
        ) from error
    key = result.inserted_primary_key
    assert key is not None
    return int(key[0])


def _translation(original: _Study, copy: _Study) -> _Translated:
    return _Translated(
        study_id=copy.study_id,
        ids=dict(zip(original.trial_ids(), copy.trial_ids(), strict=True)),
        later=copy.ahead - original.ahead,
    )


def _difference(original: _Study, copy: _Study, translated: _Translated) -> str | None:
    """The first table in which a copy is not equal; None where it is."""
    for table in (TRIALS, *_details_of(STUDIES), *_details_of(TRIALS)):
        expected = (translated(table, row) for rows in original.chunks(table) for row in rows)
        written = (row for rows in copy.chunks(table) for row in rows)
        if any(one != other for one, other in zip_longest(expected, written)):
            return table.name
    return None


def _is_copied(source: RDBStorage, target: RDBStorage, name: str) -> bool:
    with _snapshot(source) as reading, _snapshot(target) as there:
        original, copy = _Study.find(source, reading, name), _Study.find(target, there, name)
        if len(original.trial_ids()) != len(copy.trial_ids()):
            return False
        return _difference(original, copy, _translation(original, copy)) is None


# Optuna's tables


def _details_of(parent: Table) -> list[Table]:
    """Optuna's tables whose rows belong to a study, or to a trial."""
    return [
        table
        for table in models.BaseModel.metadata.sorted_tables
        if table is not TRIALS and any(key.column.table is parent for key in table.foreign_keys)
    ]


def _link(table: Table) -> sqlalchemy.Column[Any]:
    """The column that tells whose a row is."""
    (key,) = table.foreign_keys
    return key.parent


def _copied_columns(table: Table) -> list[sqlalchemy.Column[Any]]:
    return [column for column in table.columns if table is TRIALS or not column.primary_key]


def _widen_columns(target: RDBStorage, study: _Study) -> None:
    """Let MySQL keep microseconds, and text beyond 64 KiB where the study has such; it commits each change at once."""
    if target.engine.dialect.name not in MYSQL:
        return
    with target.engine.connect() as connection:
        connection.detach()  # closed, not given back with a setting of its own
        connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {BUSY_TIMEOUT_S}")
        inspector = sqlalchemy.inspect(connection)
        for table in (TRIALS, *_details_of(STUDIES), *_details_of(TRIALS)):
            types = {column["name"]: column["type"] for column in inspector.get_columns(table.name)}
            wider = {
                column: _wider(column, types[column.name], study)
                for column in table.columns
                if isinstance(column.type, DateTime | Text)
            }
            changes = [
                f"MODIFY {column.name} {type_} {'NULL' if column.nullable else 'NOT NULL'}"
                for column, type_ in wider.items()
                if type_ is not None
            ]
            if changes:
                logger.info("In table %s of %s: %s.", table.name, display_url(target.url), ", ".join(changes))
                with uninterrupted():
                    connection.exec_driver_sql(f"ALTER TABLE {table.name} {', '.join(changes)}")


def _wider(column: sqlalchemy.Column[Any], there: Any, study: _Study) -> str | None:
    """The type a MySQL column needs; None where it has it."""
    if isinstance(column.type, DateTime):
        return None if (getattr(there, "fsp", None) or 0) >= 6 else "DATETIME(6)"
    if isinstance(there, mysql.MEDIUMTEXT | mysql.LONGTEXT):
        return None
    with _failing(study.storage, "A study cannot be read"):
        longest = study.connection.scalar(study.of(column.table, select(func.max(func.length(column))))) or 0
    return "LONGTEXT" if longest * MYSQL_UTF8_BYTES > MYSQL_TEXT_BYTES else None


# Databases


@contextmanager
def _opened(url: str, *, create: bool) -> Iterator[RDBStorage]:
    with _closed_after(open_database(url, create=create, gives_up=False)) as storage:
        yield storage


@contextmanager
def _closed_after(storage: RDBStorage) -> Iterator[RDBStorage]:
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def _snapshot(storage: RDBStorage) -> Iterator[Connection]:
    """A connection that sees the database as it is now, whatever is written meanwhile."""
    with _failing(storage, "A study cannot be read"):
        connection = storage.engine.connect()
    with connection:
        with _failing(storage, "A study cannot be read"):
            if storage.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN")  # Python's driver begins transactions for writing alone
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
        yield connection


def _ahead_of_utc(connection: Connection) -> timedelta:
    """To a quarter of an hour, as time zones are; asked early, since PostgreSQL tells when the transaction began."""
    now = connection.execute(select(func.now())).scalar_one()
    ahead: timedelta = now.replace(tzinfo=None) - datetime.now(UTC).replace(tzinfo=None)
    return timedelta(minutes=15) * round(ahead / timedelta(minutes=15))


@contextmanager
def _failing(storage: RDBStorage, what: str) -> Iterator[None]:
    """Name the database that fails, in one sentence."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StorageError(
            f"{what}: the database {display_url(storage.url)} failed ({database_reason(error)}); put it right and run "
            "the same command again."
        ) from error


def _uninterrupted(call: Callable[..., Any], *arguments: Any) -> Any:
    with uninterrupted():
        return call(*arguments)


def _study_names(storage: RDBStorage) -> list[str]:
    with _failing(storage, "The studies cannot be listed"), storage.engine.connect() as connection:
        return list(connection.scalars(select(STUDIES.c.study_name).order_by(STUDIES.c.study_id)))


def _not_found(storage: RDBStorage, name: str, there: Sequence[str]) -> StudyNotFound:
    listed = ", ".join(map(repr, there)) or "none"
    return StudyNotFound(
        f"No study {name!r} in {display_url(storage.url)} (studies there: {listed}); copy one of those."
    )


def _exists(target: RDBStorage, name: str) -> HpoError:
    return HpoError(
        f"{display_url(target.url)} holds a study {name!r} already; copy to another database, or name other studies."
    )


def _refuse_same(source: RDBStorage, target: RDBStorage) -> None:
    if _place(source) == _place(target):
        raise StorageError(
            f"{display_url(target.url)} is the database that studies are copied from; name another to copy them to."
        )


def _place(storage: RDBStorage) -> tuple[Any, ...]:
    """Which database it is, whatever user, driver and options it is reached with."""
    url = storage.engine.url
    if storage.engine.dialect.name == "sqlite":
        try:
            file = Path(str(url.database)).stat()
        except OSError:  # in memory
            return ("sqlite", id(storage.engine))
        return ("sqlite", file.st_dev, file.st_ino)
    is_mysql = storage.engine.dialect.name in MYSQL
    host = {"localhost": "127.0.0.1", None: "127.0.0.1"}.get(url.host, url.host)
    elsewhere = tuple(url.query.get(option) for option in ("host", "port", "dbname", "unix_socket"))
    return (is_mysql, host, url.port or (3306 if is_mysql else 5432), url.database, elsewhere)


@contextmanager
def _logging_left_alone() -> Iterator[None]:
    """Optuna's migrations set up logging, and silence everybody else's, where the root logger has no handler."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
