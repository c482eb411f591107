import gc
import signal
import sqlite3
import sys
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState, create_trial

from hpo.early_stopping import bits_to_text
from hpo.errors import StorageError, StudyChanged, StudyNotFound
from hpo.interrupts import uninterrupted
from hpo.rehearsal import cut_connections
from hpo.storage import (
    BUSY_TIMEOUT_S,
    DEFAULT_URL,
    IDENTITY,
    close,
    count_finished,
    describe_studies,
    display_url,
    explain_database_error,
    find_study,
    finished_trials,
    open_storage,
    open_study,
    storage_url,
    while_it_is_there,
)

SECRET = "hunter2"


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/hpo.db"


@pytest.fixture
def opened(url):
    storage = open_storage(url)
    yield storage
    close(storage)


def make_study(storage, name="lengths", *, identity=None, attributes=None, directions=("maximize", "minimize")):
    return open_study(
        storage,
        name,
        directions=directions,
        metric_names=("accuracy", "macs")[: len(directions)],
        identity={"model": "m1", "dataset": "d1", "search space": "s1"} | (identity or {}),
        attributes={"kind": "lengths", "runs_folder": "lengths-1"} | (attributes or {}),
    )


def add_trial(study, state, values=None):
    study.add_trial(create_trial(state=state, values=values))


def refusal(url, **options):
    """The one sentence a storage is refused with: no SQL, no password, no traceback."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(StorageError) as caught:
            open_storage(url, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert not any(word in sentence for word in (SECRET, "SELECT", "PRAGMA", "[SQL", "sqlalche.me"))
    return sentence


# Which storage


def test_a_given_url_comes_before_the_environment_and_the_default(monkeypatch):
    assert storage_url(None) == DEFAULT_URL
    monkeypatch.setenv("HPO_STORAGE", "sqlite:///from-environment.db")
    assert storage_url(None) == "sqlite:///from-environment.db"
    assert storage_url("sqlite:///given.db") == "sqlite:///given.db"
    monkeypatch.setenv("HPO_STORAGE", "")
    assert storage_url(None) == DEFAULT_URL


# What is shown of a URL


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///hpo.db", "sqlite:///hpo.db"),
        ("sqlite:////tmp/a/hpo.db", "sqlite:////tmp/a/hpo.db"),
        (f"postgresql+psycopg://me:{SECRET}@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        (f"postgresql+psycopg://me:{SECRET}%40%2F%3A@host/db", "postgresql+psycopg://me:***@host/db"),
        (f"postgresql+psycopg://me:a/b:c?{SECRET}@host/db", "postgresql+psycopg://me:***@host/db"),
        (f"postgresql+psycopg://me:a@{SECRET}@host/db", "postgresql+psycopg://me:***@host/db"),
        (f"postgresql+psycopg://me@host/db?password={SECRET}", "postgresql+psycopg://me@host/db?password=***"),
        (f"mysql+pymysql://host/db?passwd={SECRET}&charset=utf8", "mysql+pymysql://host/db?charset=utf8&passwd=***"),
        (f"postgresql://host/db?sslPassword={SECRET}", "postgresql://host/db?sslPassword=***"),
        (f"postgresql://host/db?password={SECRET}&password={SECRET}", "postgresql://host/db?password=***"),
        (f"mssql+pyodbc:///?odbc_connect=PWD%3D{SECRET}", "mssql+pyodbc:///?odbc_connect=***"),
        (f"nosuch://me:{SECRET}@host/db", "nosuch://me:***@host/db"),
        ("hpo.db", "hpo.db"),
        ("sqlite:/hpo.db", "sqlite:/hpo.db"),
        (f"postgresql://me:{SECRET}@host:port/db", "(a malformed URL)"),
        (f"postgresql:/me:{SECRET}@host/db", "(a malformed URL)"),
        (f"me:{SECRET}", "(a malformed URL)"),
        ("", "(a malformed URL)"),
    ],
)
def test_no_password_is_shown(url, shown):
    assert display_url(url) == shown


# Opening SQLite


def test_sqlite_runs_in_write_ahead_mode_with_a_busy_timeout(opened, url):
    for _ in range(2):  # a fresh connection each time
        with opened.engine.connect() as connection:
            pragmas = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "busy_timeout", "synchronous")
            }
        assert pragmas == {"journal_mode": "wal", "busy_timeout": BUSY_TIMEOUT_S * 1000, "synchronous": 1}  # 1: NORMAL
        opened.engine.dispose()


def test_sessions_of_the_storage_itself_use_the_same_settings(opened):
    make_study(opened)
    with opened.scoped_session() as session:
        assert session.execute(sqlalchemy.text("PRAGMA synchronous")).scalar() == 1


def test_a_reader_is_not_held_up_by_an_open_write(opened, url, tmp_path):
    study = make_study(opened)
    add_trial(study, TrialState.COMPLETE, [0.5, 10.0])
    with closing(sqlite3.connect(tmp_path / "hpo.db", timeout=1)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM trials")
        start = time.monotonic()
        reader = open_storage(url)
        assert len(find_study(reader, "lengths", "hpo tune").trials) == 1
        assert time.monotonic() - start < 5
        close(reader)
        writer.rollback()


def test_a_writer_waits_for_another_and_then_writes(opened, tmp_path):
    study = make_study(opened)
    writer = sqlite3.connect(tmp_path / "hpo.db", timeout=1, check_same_thread=False)
    writer.execute("BEGIN IMMEDIATE")
    with closing(writer):
        release = threading.Timer(0.5, writer.rollback)
        start = time.monotonic()
        release.start()
        study.set_user_attr("written", True)
        assert time.monotonic() - start >= 0.4
        release.join()
    assert study.user_attrs["written"] is True


@contextmanager
def limited_user(server_url):
    """The URL for a user of whom the server takes no connection besides those that it has."""
    url = sqlalchemy.engine.make_url(server_url)
    user = f"hpo_{uuid.uuid4().hex[:8]}"
    limited = url.set(username=user).render_as_string(hide_password=False)
    admin = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    with ExitStack() as stack:
        connection = stack.enter_context(admin.connect())
        if url.get_backend_name() == "postgresql":
            connection.execute(sqlalchemy.text(f"CREATE ROLE {user} LOGIN CONNECTION LIMIT 0"))
            stack.callback(connection.execute, sqlalchemy.text(f"DROP ROLE {user}"))
        else:
            connection.execute(sqlalchemy.text(f"CREATE USER {user}@'%' WITH MAX_USER_CONNECTIONS 1"))
            stack.callback(connection.execute, sqlalchemy.text(f"DROP USER {user}@'%'"))
            connection.execute(sqlalchemy.text(f"GRANT ALL ON {url.database}.* TO {user}@'%'"))
            only = sqlalchemy.create_engine(limited, poolclass=sqlalchemy.NullPool)
            stack.enter_context(only.connect())
        yield limited


def open_at_once(url, workers=4):
    """Open the storage from several threads at the same moment."""
    barrier = threading.Barrier(workers)

    def work(_):
        barrier.wait(10)
        return open_storage(url)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, range(workers)))


def test_several_may_open_a_new_file_at_the_same_moment(url):
    storages = open_at_once(url)
    assert [len(storage.get_all_studies()) for storage in storages] == [0] * 4
    for storage in storages:
        close(storage)


def test_a_storage_can_be_opened_again_and_read_with_optuna_alone(opened, url):
    make_study(opened)
    assert optuna.load_study(study_name="lengths", storage=url).metric_names == ["accuracy", "macs"]


def test_a_missing_file_is_made_only_where_asked(tmp_path, url):
    assert "There is no database" in refusal(url, create=False)
    assert list(tmp_path.iterdir()) == []
    close(open_storage(url))
    assert (tmp_path / "hpo.db").is_file()
    close(open_storage(url, create=False))


# Storages that cannot be used


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("hpo.db", "--storage hpo.db is not a database URL; write for example sqlite:///hpo.db"),
        ("sqlite:/hpo.db", "--storage sqlite:/hpo.db is not a database URL"),
        (f"postgresql://me:{SECRET}@host:port/db", "is not a database URL"),
        (f"nosuch://me:{SECRET}@host/db", "--storage nosuch://me:***@host/db is not a database URL"),
        (f"postgres://me:{SECRET}@host/db", "write for example sqlite:///hpo.db or postgresql+psycopg://"),
        (f"mysql+mysqldb://me:{SECRET}@host/db", "The driver for mysql+mysqldb://me:***@host/db is not installed"),
        ("sqlite://", "would be lost when the command ends"),
        ("sqlite:///:memory:", "would be lost when the command ends"),
        ("sqlite:///file:hpo.db?uri=true", "write the file's path"),
        ("sqlite:///hpo.db?timeout=soon", "could not convert string to float: 'soon'; name another file"),
        ("sqlite:///no/such/folder/hpo.db", "There is no folder no/such/folder for the database hpo.db"),
    ],
)
def test_a_url_that_names_no_usable_database_is_refused(url, says, tmp_path, monkeypatch):
    if "mysqldb" in url:
        monkeypatch.setitem(sys.modules, "MySQLdb", None)  # also where it is installed
    monkeypatch.chdir(tmp_path)
    assert says in refusal(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "module", "says"),
    [
        ("postgresql+psycopg://host/db", "psycopg", "run `pip install 'psycopg[binary]'`."),
        (
            "postgresql+psycopg2://host/db",
            "psycopg2",
            "begin it with postgresql+psycopg:// and run `pip install 'psycopg[bin",
        ),
        ("mysql+pymysql://host/db", "pymysql", "run `pip install pymysql`."),
        ("mariadb://host/db", "MySQLdb", "begin it with mariadb+pymysql:// and run `pip install pymysql`."),
    ],
)
def test_a_driver_that_is_missing_is_named_as_pip_knows_it(url, module, says, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert says in refusal(url)


def test_a_driver_without_its_library_is_one_sentence(monkeypatch):
    def fail():
        raise ImportError("no pq wrapper available.\nAttempts made:\n- couldn't import psycopg 'c' implementation")

    monkeypatch.setattr("sqlalchemy.dialects.postgresql.psycopg.PGDialect_psycopg.import_dbapi", fail)
    message = refusal("postgresql+psycopg://host/db")
    assert "\n" not in message
    assert "(no pq wrapper available); run `pip install 'psycopg[binary]'`." in message


def test_a_driver_that_is_missing_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiosqlite", None)
    assert "is not installed" in refusal(f"sqlite+aiosqlite:///{tmp_path}/hpo.db")
    assert list(tmp_path.iterdir()) == []


def test_a_password_with_an_unescaped_at_sign_is_explained_without_it():
    pytest.importorskip("psycopg")
    assert "write that one as %40" in refusal(f"postgresql+psycopg://me:a@{SECRET}@127.0.0.1:1/db")


def test_a_folder_is_not_a_database(tmp_path):
    assert "unable to open database file" in refusal(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize("text", ["hello", "a shopping list\n" * 500])
def test_a_text_file_is_refused_and_left_as_it_was(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    assert "file is not a database" in refusal(f"sqlite:///{tmp_path}/list.txt")
    assert (tmp_path / "list.txt").read_text() == text


@pytest.mark.parametrize("table", ["customers", "studies"])
def test_somebody_elses_database_is_refused_and_left_as_it_was(tmp_path, table):
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE {table} (id INTEGER)")
    before = path.read_bytes()
    assert f"holds somebody else's tables ({table}, ...)" in refusal(f"sqlite:///{path}")
    assert path.read_bytes() == before


@pytest.mark.parametrize("revision", [None, "v0.9.0.a", "v99.0.0.a"])
def test_tables_of_another_optuna_version_are_refused(opened, url, tmp_path, revision):
    close(opened)
    with closing(sqlite3.connect(tmp_path / "hpo.db")) as connection:
        if revision is None:  # as before Optuna used alembic
            connection.execute("UPDATE version_info SET schema_version = 3, library_version = '0.8.0'")
            connection.execute("DROP TABLE alembic_version")
        else:
            connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        connection.commit()
    assert "were made by another version of optuna" in refusal(url)


@pytest.mark.parametrize(
    ("driver", "url"),
    [
        ("psycopg", f"postgresql+psycopg://me:{SECRET}%40@127.0.0.1:1/db?connect_timeout=2"),
        ("psycopg", f"postgresql+psycopg://me@127.0.0.1:1/db?connect_timeout=2&password={SECRET}"),
        ("pymysql", f"mysql+pymysql://me:{SECRET}@127.0.0.1:1/db?connect_timeout=2"),
    ],
)
def test_a_server_that_does_not_answer_is_named_without_its_password(driver, url):
    pytest.importorskip(driver)
    sentence = refusal(url)
    assert "127.0.0.1" in sentence
    assert "refused" in sentence
    assert "check the URL and that its server answers" in sentence


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql+pymysql://me@127.0.0.1:1", "names no database"),
        (f"mysql+pymysql://me:{SECRET}@127.0.0.1:1/db?bogus=1", "unexpected keyword argument 'bogus'"),
    ],
)
def test_options_that_a_driver_does_not_take_are_refused(url, says):
    pytest.importorskip("pymysql")
    assert says in refusal(url)


# Making and resuming studies


def test_a_study_is_made_with_all_that_is_recorded_about_it(opened):
    study = make_study(opened)
    assert study.user_attrs[IDENTITY] == {"model": "m1", "dataset": "d1", "search space": "s1"}
    assert study.user_attrs["kind"] == "lengths"
    assert study.metric_names == ["accuracy", "macs"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_a_resumed_study_keeps_its_trials_and_its_first_attributes(opened, url):
    study = make_study(opened, attributes={"runs_folder": "lengths-first"})
    study.tell(study.ask(), (0.5, 10.0))
    again = open_storage(url)
    resumed = make_study(again, attributes={"runs_folder": "lengths-second"})
    assert [trial.values for trial in resumed.trials] == [[0.5, 10.0]]
    assert resumed.user_attrs["runs_folder"] == "lengths-first"
    close(again)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": "d2"}, "was made with another dataset, so"),
        ({"model": "m2", "search space": "s2"}, "was made with another model and another search space, so"),
    ],
)
def test_a_changed_study_is_refused_and_told_what_changed(opened, changes, says):
    make_study(opened)
    with pytest.raises(StudyChanged, match="Study 'lengths' ") as caught:
        make_study(opened, identity=changes)
    assert says in str(caught.value)
    assert make_study(opened).user_attrs[IDENTITY]["dataset"] == "d1"


@pytest.mark.parametrize(
    ("recorded", "given", "says"),
    [
        ({"fixed": {"epochs": [1]}}, {"fixed": {"epochs": (1,)}}, "another search space, so"),
        ({"fixed": {"epochs": 1}}, {"fixed": {}}, "another [fixed] epochs (1), so"),
        (
            {"objective": "area"},
            {"objective": "area", "fixed": {"epochs": 2}},
            "another search space or [fixed] value, so",
        ),
        ({"objective": "area"}, {"objective": "metric", "fixed": {"epochs": 2}}, "another --objective (area), so"),
        ({}, {}, "another search space, so"),
    ],
)
def test_what_makes_a_space_another_is_named_where_it_is_recorded(opened, recorded, given, says):
    make_study(opened, attributes=recorded)
    with pytest.raises(StudyChanged) as caught:
        make_study(opened, identity={"search space": "s2"}, attributes=given)
    assert says in str(caught.value)


def test_a_study_with_trials_of_another_tool_is_refused(opened):
    foreign = optuna.create_study(storage=opened, study_name="lengths", directions=("maximize", "minimize"))
    add_trial(foreign, TrialState.COMPLETE, [0.5, 10.0])
    with pytest.raises(StudyChanged, match="holds trials that this tool did not make"):
        make_study(opened)
    assert foreign.user_attrs == {}


def test_an_empty_study_for_other_objectives_is_refused(opened):
    foreign = optuna.create_study(storage=opened, study_name="lengths", direction="maximize")
    with pytest.raises(StudyChanged, match="for other objectives"):
        make_study(opened)
    assert foreign.user_attrs == {}


def test_a_study_that_an_older_version_cut_short_is_made_anew(opened):
    begun = optuna.create_study(storage=opened, study_name="lengths", directions=["maximize", "minimize"])
    begun.set_user_attr("runs_folder", "lengths-first")
    study = make_study(opened, identity={"model": "m2"}, attributes={"runs_folder": "lengths-second"})
    assert study.user_attrs[IDENTITY]["model"] == "m2"
    assert study.user_attrs["runs_folder"] == "lengths-second"
    assert len(optuna.get_all_study_names(opened)) == 1


def test_of_many_who_make_a_study_one_decides_what_it_is_made_with(any_url):
    storages = [open_storage(any_url) for _ in range(4)]

    def make(number):
        return make_study(storages[number % 4], attributes={"runs_folder": f"lengths-{number}"}).user_attrs

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(make, range(8)))
    assert len({attributes["runs_folder"] for attributes in made}) == 1
    assert optuna.get_all_study_names(storages[0]) == ["lengths"]
    for storage in storages:
        close(storage)


# Finding and describing studies


def test_a_study_that_is_missing_is_answered_with_those_that_are_there(opened, url):
    with pytest.raises(StudyNotFound, match=r"\(studies there: none\); start it with `hpo tune`"):
        find_study(opened, "lengths", "hpo tune")
    make_study(opened, "one")
    make_study(opened, "two")
    with pytest.raises(StudyNotFound, match=r"No study 'lengths' in .*\(studies there: 'one', 'two'\)") as caught:
        find_study(opened, "lengths", "hpo search-lengths")
    assert url in str(caught.value)
    assert find_study(opened, "two", "hpo tune").study_name == "two"


def test_a_study_that_is_deleted_meanwhile_is_said_to_be_gone(opened, url):
    study = make_study(opened)
    with pytest.raises(KeyError, match="ours"), while_it_is_there(study, opened):
        raise KeyError("ours")
    optuna.delete_study(study_name="lengths", storage=opened)
    make_study(opened, "another")  # which may get its id
    gone = f"Study 'lengths' was deleted from {url} meanwhile"
    with pytest.raises(StudyNotFound, match=gone), while_it_is_there(study, opened):
        raise KeyError("Record does not exist.")


def fill(study):
    """Two complete, one stopped early, one failed, one waiting, one running."""
    add_trial(study, TrialState.COMPLETE, [0.9, 80.0])
    add_trial(study, TrialState.FAIL)
    add_trial(study, TrialState.PRUNED)
    add_trial(study, TrialState.COMPLETE, [0.8, 40.0])
    study.enqueue_trial({})
    study.add_trial(create_trial(state=TrialState.RUNNING))


def test_complete_and_pruned_trials_alone_count_as_finished(opened, url):
    study = make_study(opened)
    fill(study)
    assert [trial.number for trial in finished_trials(study)] == [0, 2, 3]
    assert count_finished(url, "lengths") == 3


def test_counting_where_there_is_nothing_to_count_gives_zero_and_makes_no_file(tmp_path, opened, url):
    assert count_finished(url, "lengths") == 0
    assert count_finished(f"sqlite:///{tmp_path}/absent.db", "lengths") == 0
    assert count_finished("nonsense", "lengths") == 0
    assert count_finished("grpc://127.0.0.1:1", "lengths") is None
    assert not (tmp_path / "absent.db").exists()


def test_every_study_is_described_with_its_states_and_best_values(opened):
    fill(make_study(opened))
    make_study(opened, "empty", attributes={"kind": "finetune"}, directions=("maximize",))
    described = {entry["study"]: entry for entry in describe_studies(opened)}
    assert described["lengths"] == {
        "study": "lengths",
        "kind": "lengths",
        "finished": 3,
        "running": 1,
        "waiting": 1,
        "failed": 1,
        "best": [
            {"name": "accuracy", "direction": "maximize", "value": 0.9},
            {"name": "macs", "direction": "minimize", "value": 40.0},
        ],
        "best_text": "accuracy 0.9, macs 40",
    }
    assert (described["empty"]["kind"], described["empty"]["best"], described["empty"]["best_text"]) == (
        "finetune",
        [],
        "-",
    )


def test_a_study_of_another_tool_is_described_too(opened):
    study = optuna.create_study(storage=opened, study_name="foreign", direction="minimize")
    add_trial(study, TrialState.COMPLETE, [2.5])
    (entry,) = describe_studies(opened)
    assert (entry["kind"], entry["best_text"]) == ("other", "value 0 2.5")


def test_a_database_that_fails_in_mid_run_is_explained_without_sql(opened, tmp_path):
    study = make_study(opened)
    with closing(sqlite3.connect(tmp_path / "hpo.db")) as connection:
        connection.execute("ALTER TABLE trials RENAME TO lost")
        connection.commit()
    with pytest.raises(optuna.exceptions.StorageInternalError) as caught:
        study.ask()
    sentence = str(explain_database_error(caught.value, f"mysql+pymysql://me:{SECRET}@host/db"))
    assert sentence == (
        "The database mysql+pymysql://me:***@host/db failed (no such table: trials); finished trials are safe in it, "
        "so put it right and run the same command again to continue."
    )


# Servers


def test_a_study_runs_and_resumes_on_a_server(server_url):
    storage = open_storage(server_url)
    study = make_study(storage)
    study.tell(study.ask({"retention_0": optuna.distributions.FloatDistribution(0.4, 1.0, step=0.05)}), (0.75, 1e12))
    close(storage)

    again = open_storage(server_url, create=False)
    resumed = make_study(again)
    (trial,) = finished_trials(resumed)
    assert trial.values == [0.75, 1e12]
    assert set(trial.params) == {"retention_0"}
    assert resumed.metric_names == ["accuracy", "macs"]
    with pytest.raises(StudyChanged, match="another model"):
        make_study(again, identity={"model": "m2"})
    assert count_finished(server_url, "lengths") == 1
    close(again)


def test_a_server_that_takes_no_more_connections_is_told_how_to_do_with_fewer(server_url, monkeypatch):
    monkeypatch.setattr("hpo.storage.RACE_WAITS_S", (0.0,))
    with limited_user(server_url) as url, pytest.raises(StorageError, match=r"connections.*`hpo storage serve`"):
        open_storage(url)


@pytest.mark.filterwarnings("ignore:.*deleted while still open:ResourceWarning")
def test_several_may_open_a_new_database_of_a_server_at_the_same_moment(server_url):
    storages = open_at_once(server_url)
    assert [len(storage.get_all_studies()) for storage in storages] == [0] * 4
    for storage in storages:
        close(storage)
    gc.collect()  # Optuna does not close the connection of an attempt that failed; here and not in a later test


def test_a_connection_that_was_cut_while_it_rested_is_made_anew(server_url, monkeypatch):
    storage = open_storage(server_url)
    make_study(storage)
    storage.remove_session()
    monkeypatch.setattr("hpo.storage.RESTED_S", 0.0)
    assert cut_connections(server_url)
    assert [study.study_name for study in storage.get_all_studies()] == ["lengths"]
    close(storage)


def test_only_connections_that_rested_are_tested(server_url, monkeypatch):
    storage = open_storage(server_url)
    tested = []
    ping = storage.engine.dialect.do_ping
    monkeypatch.setattr(storage.engine.dialect, "do_ping", lambda one: tested.append(one) or ping(one))
    storage.remove_session()
    storage.engine.connect().close()
    for rested_s, pings in ((60.0, 0), (0.0, 1)):
        monkeypatch.setattr("hpo.storage.RESTED_S", rested_s)
        tested.clear()
        storage.engine.connect().close()
        assert len(tested) == pings
    close(storage)


def test_a_connection_that_has_just_been_made_is_not_tested(server_url, monkeypatch):
    storage = open_storage(server_url)
    storage.remove_session()
    storage.engine.connect().close()  # one that rests in the pool
    refused = []

    def refuse(_connection):
        refused.append(1)
        raise storage.engine.dialect.loaded_dbapi.OperationalError("cut again")

    monkeypatch.setattr(storage.engine.dialect, "do_ping", refuse)
    monkeypatch.setattr("hpo.storage.RESTED_S", 0.5)
    time.sleep(0.6)
    storage.engine.connect().close()
    assert len(refused) == 1
    close(storage)


def test_a_server_without_the_database_says_so(server_url):
    assert "nosuchdb" in refusal(server_url.rpartition("/")[0] + "/nosuchdb")


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_until_the_transactions_are_through():
    steps = []

    def tell() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            steps.append("told")

    with pytest.raises(KeyboardInterrupt):
        tell()
    assert steps == ["told"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_outermost_block():
    steps = []

    def ask_and_tell() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            steps.append("asked")
        steps.append("told")

    with pytest.raises(KeyboardInterrupt):
        ask_and_tell()
    assert steps == ["asked"]


def test_ctrl_c_stays_ignored_where_it_is(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_within_a_storage_call_comes_after_it(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path / 'hpo.db'}")
    study = make_study(storage)

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    sqlalchemy.event.listen(storage.engine, "before_cursor_execute", interrupt, once=True)
    with pytest.raises(KeyboardInterrupt):
        study.set_user_attr("note", "written")
    assert study.user_attrs["note"] == "written"


def test_a_database_in_a_folder_that_cannot_be_written_is_to_be_copied(tmp_path):
    place = f"sqlite:///{tmp_path}/hpo.db"
    close(open_storage(place))
    (tmp_path / "hpo.db-wal").mkdir()  # what SQLite cannot make there
    sentence = refusal(place, create=False)
    assert "unable to open database file; SQLite writes files beside a database even to read it" in sentence
    assert "copy it to a folder that can be written, or name another file with --storage" in sentence


def test_a_study_whose_name_differs_by_case_is_another(any_url):
    opened = open_storage(any_url)
    make_study(opened)
    with pytest.raises(StudyNotFound, match=r"No study 'Lengths' in .*studies there: 'lengths'"):
        find_study(opened, "Lengths", start_with="hpo tune")
    if opened.engine.dialect.name == "mysql":
        with pytest.raises(StudyChanged, match=r"takes the name 'Lengths' for that of its study 'lengths'; choose"):
            make_study(opened, name="Lengths")
    else:
        assert make_study(opened, name="Lengths").study_name == "Lengths"
    close(opened)


def test_a_trial_holds_what_a_split_of_half_a_million_examples_says_of_it(any_url):
    opened = open_storage(any_url)
    study = optuna.create_study(storage=opened)
    trial = study.ask()
    correct = bits_to_text(np.zeros(500_000, dtype=bool))
    trial.set_user_attr("correct", correct)
    assert study.trials[0].user_attrs["correct"] == correct
    close(opened)
