"""Studies arrive in another database with everything they had, or not at all; old tables are brought up to date."""

import logging
import os
import random
import subprocess
import sys
import textwrap
import uuid
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages._rdb import models
from optuna.trial import TrialState, create_trial

import hpo.storage_admin
from hpo.errors import HpoError, StorageError, StudyNotFound
from hpo.storage import display_url, open_storage
from hpo.storage_admin import CopiedStudy, copy_studies, copy_study, upgrade

INF, NAN = float("inf"), float("nan")
SPACE = {
    "rate": FloatDistribution(1e-7, 1.0, log=True),
    "share": FloatDistribution(-0.3, 0.9, step=0.1),
    "wide": FloatDistribution(-1.7976931348623157e308, 1.7976931348623157e308),
    "layers": IntDistribution(1, 12),
    "width": IntDistribution(1, 4096, log=True),
    "heads": IntDistribution(2, 16, step=2),
    "mixed": CategoricalDistribution([None, True, False, 3, 0.1, "gelu", "\u4e2d\u6587 \U0001f600 'quoted' \\ %s"]),
}
NOON = datetime(2026, 1, 2, 12, 0, 0, 123456)
ODD_NAMES = [
    "a/b\\c/../d",
    """it's "half" `done""" + "`",
    "Robert'); DROP TABLE studies;--",
    "100 % %s %(x)s {name} :name ?",
    "\u00e9t\u00e9 \u4e2d\u6587 \U0001f600\nnext line",
    "x" * 500,
    "\U0001f600" * 500,
]
PASSWORD = "p@ss/w:rd%{2}'\"\\ #?&=+;"


@pytest.fixture
def new_url(new_database, tmp_path):
    """Makes a new database of a kind, which the test's end drops."""

    def make(kind="sqlite"):
        return f"sqlite:///{tmp_path}/{uuid.uuid4().hex}.db" if kind == "sqlite" else new_database(kind)

    return make


@contextmanager
def opened(url):
    storage = open_storage(url)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def a_finished_trial(number, state, values=None, **fields):
    params = {
        "rate": 10 ** -(number + 1) / 3,
        "share": -0.3 + 0.1 * number,
        "wide": [1.7976931348623157e308, -2.2250738585072014e-308, 0.1, 1 / 3, 123456789.12345679, 5e-5][number % 6],
        "layers": number + 1,
        "width": 4096,
        "heads": 2 * (number + 1),
        "mixed": SPACE["mixed"].choices[number % 7],
    }
    trial = create_trial(
        state=state,
        values=values,
        params=params,
        distributions=SPACE,
        user_attrs={
            "shares": [0.1, [0.2, {"deep": [None, True, "x"]}]],
            "\u00fcber'; --": '50 % \u2013 "half"\x00',
            "nan": NAN,
            "empty": {},
        },
        system_attrs={"NSGAIISampler:generation": number, "constraints": [-0.1, 0.0, 1e-300]},
        **fields,
    )
    trial.datetime_start = NOON + timedelta(hours=number, microseconds=number)
    trial.datetime_complete = NOON + timedelta(hours=number, seconds=59, microseconds=876543 - number)
    return trial


def fill(storage, name="lengths", directions=("maximize", "minimize")):
    """A study with trials of every state, and every kind of fact."""
    study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names([f"metric \u00e4 {number}" for number in range(len(directions))])
    study.set_user_attr("identity", {"model": "m1", "nested": [1, 2.5, None, {"a": "\u4e2d"}]})
    study.set_user_attr("text", "long " * 2000)
    values = [0.1 + 0.2, 1e9 / 7][: len(directions)]
    study.add_trial(a_finished_trial(0, TrialState.COMPLETE, values))
    study.add_trial(a_finished_trial(1, TrialState.COMPLETE, [INF, -INF][: len(directions)]))
    study.add_trial(
        a_finished_trial(2, TrialState.PRUNED, intermediate_values={0: 0.1, 7: INF, 3: -INF, 100: NAN, 5: 1 / 3})
    )
    study.add_trial(a_finished_trial(3, TrialState.FAIL))
    running = study.ask({name: SPACE[name] for name in ("rate", "layers", "mixed")})
    running.set_user_attr("late", [1])
    storage.record_heartbeat(running._trial_id)
    study.enqueue_trial({"rate": 0.01, "mixed": None}, user_attrs={"why": "asked for"})
    study.enqueue_trial({"rate": 0.02})
    return study


def plain(value):
    """NaN as a word, so that equal facts compare equal; containers keep their kinds."""
    match value:
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(map(plain, value))
        case float() if value != value:
            return "NaN"
        case _:
            return value


def facts(url, name="lengths"):
    """All that Optuna tells of a study, but for ids, which are each database's own."""
    with opened(url) as storage:
        study = optuna.load_study(storage=storage, study_name=name)
        trials = [
            {key: plain(value) for key, value in vars(trial).items() if key != "_trial_id"}
            | {"order of parameters": list(trial.params)}
            for trial in study.get_trials()
        ]
        return {
            "directions": study.directions,
            "metric names": study.metric_names,
            "user": plain(study.user_attrs),
            "system": plain(storage.get_study_system_attrs(study._study_id)),
            "trials": trials,
        }


def study_names(url):
    with opened(url) as storage:
        return [study.study_name for study in storage.get_all_studies()]


def rows_left(url):
    """Rows in all of Optuna's tables but the version's."""
    with opened(url) as storage, storage.engine.connect() as connection:
        return sum(
            connection.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(table))
            for table in models.BaseModel.metadata.sorted_tables
            if table.name != "version_info"
        )


# Copies are equal


def test_a_study_goes_round_all_databases_unchanged(new_url):
    stations = [new_url(), new_url("postgresql"), new_url("mariadb"), new_url()]
    with opened(stations[0]) as storage:
        fill(storage)
        fill(storage, "single", directions=("minimize",))
    expected = [facts(stations[0]), facts(stations[0], "single")]
    assert {trial["state"] for trial in expected[0]["trials"]} == set(TrialState)
    assert expected[0]["trials"][0]["_datetime_start"] == NOON
    for before, after in pairwise(stations):
        copied = copy_studies(before, after)
        assert copied == [CopiedStudy(name="lengths", trials=7), CopiedStudy(name="single", trials=7)]
        assert [facts(after), facts(after, "single")] == expected, display_url(after)
        assert study_names(after) == ["lengths", "single"]


def test_a_copy_goes_on_as_the_study_would(any_url, new_url):
    source = new_url()
    with opened(source) as storage:
        fill(storage)
    copy_studies(source, any_url)
    with opened(any_url) as storage:
        study = optuna.load_study(storage=storage, study_name="lengths")
        waiting = study.ask()
        assert (waiting.number, waiting.suggest_float("rate", 1e-7, 1.0, log=True)) == (5, 0.01)
        assert [study.ask().number, study.ask().number] == [6, 7]
        study.tell(waiting, [1.0, 2.0])
        assert study.trials[5].state == TrialState.COMPLETE
    assert facts(source)["trials"][5]["state"] == TrialState.WAITING


def test_studies_are_copied_next_to_others_and_only_those_that_are_named(any_url, new_url):
    source = new_url()
    with opened(any_url) as storage:
        fill(storage, "other", directions=("minimize",))
    other = facts(any_url, "other")
    with opened(source) as storage:
        for name in ("first", "second", "third"):
            fill(storage, name)
    assert [study.name for study in copy_studies(source, any_url, ["third", "first", "third"])] == ["third", "first"]
    assert study_names(any_url) == ["other", "third", "first"]
    assert [facts(any_url, name) for name in ("first", "third")] == [facts(source, name) for name in ("first", "third")]
    assert facts(any_url, "other") == other


def test_every_table_of_optunas_is_copied():
    ours = (
        hpo.storage_admin._details_of(hpo.storage_admin.STUDIES),
        hpo.storage_admin._details_of(hpo.storage_admin.TRIALS),
    )
    assert {table.name for tables in ours for table in tables} | {"studies", "trials", "version_info"} == set(
        models.BaseModel.metadata.tables
    )


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_arrive_as_they_are(new_url, name):
    source, target = new_url(), new_url()
    with opened(source) as storage:
        fill(storage, name)
    assert copy_studies(source, target, [name]) == [CopiedStudy(name=name, trials=7)]
    assert study_names(target) == [name]
    assert facts(target, name) == facts(source, name)


def test_odd_names_arrive_on_servers_and_back(server_url, new_url):
    source, back = new_url(), new_url()
    with opened(source) as storage:
        for name in ODD_NAMES:
            study = optuna.create_study(storage=storage, study_name=name)
            study.set_user_attr(name, name)
            study.add_trial(create_trial(value=1.0, user_attrs={name: name}))
    copy_studies(source, server_url)
    copy_studies(server_url, back)
    assert study_names(back) == study_names(server_url) == ODD_NAMES
    assert [facts(back, name) for name in ODD_NAMES] == [facts(source, name) for name in ODD_NAMES]


def test_long_attributes_arrive_whole(any_url, new_url):
    source = new_url()
    with opened(source) as storage:
        study = optuna.create_study(storage=storage, study_name="lengths")
        study.set_user_attr("history", "\u00e9" * 30_000)
        study.add_trial(create_trial(value=1.0, user_attrs={"logits": list(range(50_000))}))
    copy_studies(source, any_url)
    assert facts(any_url) == facts(source)


def test_floats_arrive_to_the_last_bit(any_url, new_url):
    generator = random.Random(0)
    values = [generator.uniform(-1, 1) * 10.0 ** generator.randint(-300, 300) for _ in range(300)]
    values += [5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1, 1e16 + 2, -1 / 3]
    source = new_url()
    with opened(source) as storage:
        study = optuna.create_study(storage=storage, study_name="lengths")
        study.add_trial(create_trial(value=1.0, intermediate_values=dict(enumerate(values))))
    copy_studies(source, any_url)
    assert list(facts(any_url)["trials"][0]["intermediate_values"].values()) == values


def test_heartbeats_stay_the_same_instants(new_url):
    source, target = new_url(), new_url("postgresql")
    admin = sqlalchemy.create_engine(target, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:  # a server whose clock shows another time of day
        database = admin.url.database
        connection.exec_driver_sql(f"ALTER DATABASE {database} SET timezone TO 'Asia/Kathmandu'")
    admin.dispose()
    with opened(source) as storage:
        fill(storage)
    copy_studies(source, target)
    beats = []
    for url in (source, target):
        with opened(url) as storage, storage.engine.connect() as connection:
            beats.append(connection.execute(sqlalchemy.select(models.TrialHeartbeatModel.heartbeat)).scalar_one())
    assert beats[1] - beats[0] == timedelta(hours=5, minutes=45)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        storage = optuna.storages.RDBStorage(target, heartbeat_interval=60)
    study_id = storage.get_study_id_from_name("lengths")
    assert storage._get_stale_trial_ids(study_id) == [], "its worker beat a moment ago"
    storage.remove_session()
    storage.engine.dispose()


def test_what_names_trials_by_id_names_the_same_trials_in_the_copy(new_url):
    source, target = new_url(), new_url()
    with opened(target) as storage:
        fill(storage, "other")
    with opened(source) as storage:
        study = optuna.create_study(
            storage=storage,
            study_name="lengths",
            directions=["maximize", "minimize"],
            sampler=optuna.samplers.NSGAIISampler(population_size=4, seed=1),
        )
        study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)), n_trials=14)
        ids = [trial._trial_id for trial in study.trials]
        notes = {f"dashboard:{ids[3]}:note_ver": 2, f"dashboard:{ids[3]}:note_str:0": "good", "dashboard:note_ver": 1}
        marks = {
            f"dashboard:artifacts:{ids[4]}:0a-1b": "{}",
            f"preference:skip_trial:{ids[5]}": True,
            "a:parent:1": [[1]],
        }
        for key, value in {**notes, **marks}.items():
            storage.set_study_system_attr(study._study_id, key, value)

        def parents(study, generation):
            return [trial.number for trial in study.sampler.get_parent_population(study, generation)]

        expected = [parents(study, generation) for generation in (1, 2)]
    assert all(len(numbers) == 4 for numbers in expected)
    copy_studies(source, target)
    with opened(target) as storage:
        copy = optuna.load_study(
            storage=storage, study_name="lengths", sampler=optuna.samplers.NSGAIISampler(population_size=4, seed=1)
        )
        theirs = [trial._trial_id for trial in copy.trials]
        assert not set(ids) <= set(theirs)
        assert [parents(copy, generation) for generation in (1, 2)] == expected
        attributes = storage.get_study_system_attrs(copy._study_id)
    assert attributes[f"dashboard:{theirs[3]}:note_ver"] == 2
    assert attributes[f"dashboard:{theirs[3]}:note_str:0"] == "good"
    assert attributes["dashboard:note_ver"] == 1
    assert attributes[f"dashboard:artifacts:{theirs[4]}:0a-1b"] == "{}"
    assert attributes[f"preference:skip_trial:{theirs[5]}"] is True
    assert attributes["a:parent:1"] == [[1]]


def test_a_study_that_is_being_written_is_copied_as_it_was_at_one_moment(any_url, new_url, monkeypatch):
    target = new_url()
    with opened(any_url) as source, opened(target) as there:
        study = fill(source)
        before = facts(any_url)
        insert = hpo.storage_admin._insert

        def insert_and_write(connection, table, rows):
            study.add_trial(a_finished_trial(4, TrialState.COMPLETE, [1.0, 2.0]))
            study.set_user_attr("identity", "changed")
            insert(connection, table, rows)

        monkeypatch.setattr(hpo.storage_admin, "_insert", insert_and_write)
        assert copy_study(source, there, "lengths") == 7
    assert facts(target) == before
    assert len(facts(any_url)["trials"]) > 7


# Copies that are cut short


def fail_at(monkeypatch, number, error):
    insert, calls = hpo.storage_admin._insert, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise error
        insert(*arguments)

    monkeypatch.setattr(hpo.storage_admin, "_insert", failing)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (1, KeyboardInterrupt()),
        (2, sqlalchemy.exc.OperationalError("INSERT", {}, Exception("disk full"))),
        (9, sqlalchemy.exc.OperationalError("INSERT", {}, Exception("disk full"))),
    ],
    ids=["interrupted at the first table", "failed at the second", "failed at the last"],
)
def test_a_copy_that_is_cut_short_leaves_nothing_and_can_be_repeated(any_url, new_url, monkeypatch, number, error):
    source = new_url()
    with opened(source) as storage:
        fill(storage)
    with monkeypatch.context() as patch:
        fail_at(patch, number, error)
        with pytest.raises((KeyboardInterrupt, StorageError)) as caught:
            copy_studies(source, any_url)
    if isinstance(caught.value, StorageError):
        assert "disk full" in str(caught.value)
        assert "'lengths' was not copied" in str(caught.value)
    assert rows_left(any_url) == 0
    assert copy_studies(source, any_url) == [CopiedStudy(name="lengths", trials=7)]
    assert facts(any_url) == facts(source)


def test_a_copy_of_many_goes_on_after_those_that_were_finished(any_url, new_url, monkeypatch):
    source = new_url()
    with opened(source) as storage:
        for name in ("first", "second", "third"):
            fill(storage, name)
    with monkeypatch.context() as patch:
        fail_at(patch, 12, KeyboardInterrupt())  # ten tables a study
        with pytest.raises(KeyboardInterrupt):
            copy_studies(source, any_url)
    assert study_names(any_url) == ["first"]
    assert copy_studies(source, any_url) == [
        CopiedStudy(name="first", trials=7, found=True),
        CopiedStudy(name="second", trials=7),
        CopiedStudy(name="third", trials=7),
    ]
    for name in ("first", "second", "third"):
        assert facts(any_url, name) == facts(source, name)


def test_a_copy_that_is_killed_leaves_nothing_and_can_be_repeated(any_url, new_url):
    source = new_url()
    with opened(source) as storage:
        fill(storage)
    script = f"""
        import os, signal
        import hpo.storage_admin as admin
        insert = admin._insert
        def killed(connection, table, rows):
            insert(connection, table, rows)
            if table.name == "trial_params":
                os.kill(os.getpid(), signal.SIGKILL)
        admin._insert = killed
        admin.copy_studies({source!r}, {any_url!r})
    """
    environment = os.environ | {"PYTHONPATH": str(Path(hpo.storage_admin.__file__).parent.parent)}
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=60)
    assert process.returncode == -9
    assert rows_left(any_url) == 0
    copy_studies(source, any_url)
    assert facts(any_url) == facts(source)


# Copies that are refused


def refused(kind, call, *arguments):
    with pytest.raises(kind) as caught:
        call(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert not any(word in sentence for word in ("INSERT", "SELECT", "sqlalche.me"))
    return sentence


def test_a_study_is_never_copied_over_one_of_its_name(any_url, new_url):
    source = new_url()
    with opened(source) as storage:
        fill(storage)
        fill(storage, "second")
    with opened(any_url) as storage:
        fill(storage, directions=("minimize",))
    there = facts(any_url)
    for names in (None, ["second", "lengths"], ["lengths"]):
        assert "'lengths' already" in refused(HpoError, copy_studies, source, any_url, names)
    assert facts(any_url) == there
    assert study_names(any_url) == ["lengths"], "names are checked before any study is copied"


def test_the_same_copy_again_is_refused_also_where_the_first_was_empty(any_url, new_url):
    source = new_url()
    with opened(source) as storage:
        optuna.create_study(storage=storage, study_name="empty")
    assert copy_studies(source, any_url) == [CopiedStudy(name="empty", trials=0)]
    assert "'empty' already" in refused(HpoError, copy_studies, source, any_url)


def test_an_unknown_study_is_named_with_those_that_are_there(new_url):
    source, target = new_url(), new_url()
    with opened(source) as storage:
        fill(storage)
    sentence = refused(StudyNotFound, copy_studies, source, target, ["lengths", "lenghts"])
    assert "'lenghts'" in sentence
    assert "studies there: 'lengths'" in sentence
    assert not Path(target.removeprefix("sqlite:///")).exists()


def test_a_database_is_not_copied_to_itself(new_url, tmp_path, monkeypatch):
    source = new_url()
    with opened(source) as storage:
        fill(storage)
    link = tmp_path / "link.db"
    link.symlink_to(source.removeprefix("sqlite:///"))
    monkeypatch.chdir(tmp_path)
    relative = f"sqlite:///{Path(source).name}"
    for same in (source, f"sqlite:///{link}", relative):
        assert "copied from" in refused(StorageError, copy_studies, source, same)


def test_a_server_is_not_copied_to_itself(server_url):
    with opened(server_url) as storage:
        fill(storage)
    for same in (server_url, server_url.replace("127.0.0.1", "localhost") + "?connect_timeout=9"):
        assert "copied from" in refused(StorageError, copy_studies, server_url, same)


def test_no_studies_to_copy_is_no_error(new_url):
    source = new_url()
    with opened(source):
        pass
    assert copy_studies(source, new_url()) == []


def test_a_source_that_does_not_exist_is_not_made(new_url):
    source = new_url()
    assert "no database" in refused(StorageError, copy_studies, source, new_url())
    assert not Path(source.removeprefix("sqlite:///")).exists()


def test_names_that_the_target_does_not_tell_apart_are_refused(new_url):
    source, target = new_url(), new_url("mariadb")
    with opened(source) as storage:
        optuna.create_study(storage=storage, study_name="Case")
        optuna.create_study(storage=storage, study_name="case").add_trial(create_trial(value=1.0))
        study = optuna.create_study(storage=storage, study_name="attributes")
        study.add_trial(create_trial(value=1.0, user_attrs={"Rate": 1, "rate": 2}))
    copy_studies(source, target, ["Case"])
    assert "does not tell from 'case'" in refused(HpoError, copy_studies, source, target, ["case"])
    assert "does not tell apart" in refused(StorageError, copy_studies, source, target, ["attributes"])
    assert study_names(target) == ["Case"]
    assert "'case'" in refused(StudyNotFound, copy_studies, target, new_url(), ["case"])


def test_what_the_target_does_not_keep_is_refused(new_url, monkeypatch):
    source, target = new_url(), new_url("mariadb")
    with opened(source) as storage:
        fill(storage)
    with monkeypatch.context() as patch:
        patch.setattr(hpo.storage_admin, "_widen_columns", lambda target, study: None)
        assert "does not give back what was written to its table trials" in refused(
            StorageError, copy_studies, source, target
        )
    assert rows_left(target) == 0


def test_a_name_too_long_for_the_target_is_refused(server_url, new_url):
    source = new_url()
    with opened(source) as storage:
        study = optuna.create_study(storage=storage, study_name="lengths")
        study.add_trial(create_trial(value=1.0, user_attrs={"k" * 600: 1}))
    assert "too long" in refused(StorageError, copy_studies, source, server_url)
    assert rows_left(server_url) == 0


# Passwords


@pytest.fixture
def secret_urls(new_url):
    """A PostgreSQL and a MariaDB database, each reached by a user of its own with a hostile password."""
    user = f"hpo_{uuid.uuid4().hex[:8]}"
    grants = {
        "postgresql": ("CREATE ROLE {0} LOGIN SUPERUSER PASSWORD '{1}'", "DROP OWNED BY {0}; DROP ROLE {0}"),
        "mariadb": ("GRANT ALL ON {2}.* TO {0}@'%' IDENTIFIED BY '{1}'", "DROP USER {0}@'%'"),
    }
    urls, engines = [], []
    for kind, (grant, revoke) in grants.items():
        url = sqlalchemy.make_url(new_url(kind))
        engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
        quoted = PASSWORD.replace("'", "''")
        if kind == "mariadb":
            quoted = quoted.replace("\\", "\\\\")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(grant.format(user, quoted.replace(":", "\\:"), url.database)))
        engines.append((engine, revoke.format(user)))
        urls.append(str(url).replace(f"{url.username}@", f"{user}:{quote(PASSWORD, safe='')}@"))
    yield urls
    for engine, revoke in engines:
        with engine.connect() as connection:
            for statement in revoke.split("; "):
                connection.execute(sqlalchemy.text(statement))
        engine.dispose()


def test_no_password_is_in_messages_or_logs(secret_urls, new_url, caplog):
    source = new_url()
    with opened(source) as storage:
        fill(storage)
        fill(storage, "second")
    caplog.set_level(logging.DEBUG)
    said = []
    postgresql, mariadb = secret_urls
    copy_studies(source, postgresql)
    copy_studies(postgresql, mariadb)
    for url in secret_urls:
        assert facts(url) == facts(source)
        said.append(refused(HpoError, copy_studies, source, url))
        said.append(refused(StorageError, copy_studies, url, url))
        said.append(refused(StudyNotFound, copy_studies, url, new_url(), ["nosuch"]))
        said.append(refused(StorageError, copy_studies, source, url.replace("p%40ss", "wr%40ng") + "_nosuch"))
        said.append(refused(StorageError, copy_studies, source, url.replace("127.0.0.1:", "127.0.0.1:9")))
        stamp(url, "v99.0.0.a")
        said.append(refused(StorageError, upgrade, url))
        stamp(url, "v3.0.0.d")
        said.append(refused(StorageError, copy_studies, url, new_url()))
        assert upgrade(url)[0] == "v3.0.0.d"
    for text in (*said, caplog.text):
        for secret in (PASSWORD, quote(PASSWORD, safe=""), PASSWORD[:6], quote(PASSWORD[:6], safe="")):
            assert secret not in text


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://postgres:{hunter2}@127.0.0.1:5432/test",
        "postgresql+psycopg://me:hunter2@host:port/db",
        "nosuch://me:hunter2@host/db",
        "me:hunter2",
        "mysql+pymysql://me:a@hunter2@127.0.0.1/db",
        "postgresql+psycopg://me@127.0.0.1:1/db?password=hunter2",
        "",
    ],
)
def test_hostile_urls_are_refused_without_their_passwords(new_url, url):
    source = new_url()
    with opened(source) as storage:
        fill(storage)
    for call, arguments in ((copy_studies, (source, url)), (copy_studies, (url, source)), (upgrade, (url,))):
        assert "hunter2" not in refused(StorageError, call, *arguments)


# Upgrades


def stamp(url, version):
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = :version"), {"version": version})
    engine.dispose()


def recorded_version(url):
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    engine.dispose()
    return version


def head():
    storage = optuna.storages.RDBStorage("sqlite:///:memory:")
    version = storage.get_head_version()
    storage.engine.dispose()
    return version


def test_tables_of_an_older_version_are_brought_up_to_date(any_url):
    with opened(any_url) as storage:
        fill(storage)
    before = facts(any_url)
    stamp(any_url, "v3.0.0.d")  # the version after it adds an index
    assert "another version" in refused(StorageError, open_storage, any_url)
    assert upgrade(any_url) == ("v3.0.0.d", head())
    engine = sqlalchemy.create_engine(any_url)
    assert "trials_study_id_key" in {index["name"] for index in sqlalchemy.inspect(engine).get_indexes("trials")}
    engine.dispose()
    assert facts(any_url) == before
    assert upgrade(any_url) == (head(), head())


def test_an_upgrade_moves_columns_with_their_trials(new_url):
    url = new_url()
    with opened(url) as storage:
        study = optuna.create_study(storage=storage, study_name="lengths")
        study.add_trial(create_trial(value=0.25, params={"x": 1.5}, distributions={"x": FloatDistribution(0, 2)}))
        before = facts(url)
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:  # tables as they were before infinite values had a column
        connection.exec_driver_sql("ALTER TABLE trial_values RENAME TO newer")
        connection.exec_driver_sql(
            "CREATE TABLE trial_values (trial_value_id INTEGER NOT NULL PRIMARY KEY, trial_id INTEGER NOT NULL "
            "REFERENCES trials (trial_id), objective INTEGER NOT NULL, value FLOAT NOT NULL, "
            "UNIQUE (trial_id, objective))"
        )
        connection.exec_driver_sql(
            "INSERT INTO trial_values SELECT trial_value_id, trial_id, objective, value FROM newer"
        )
        connection.exec_driver_sql("DROP TABLE newer")
    engine.dispose()
    stamp(url, "v3.0.0.c")
    assert upgrade(url) == ("v3.0.0.c", head())
    assert facts(url) == before


def test_a_current_database_is_left_alone(any_url, monkeypatch):
    with opened(any_url) as storage:
        fill(storage)
    monkeypatch.setattr(optuna.storages.RDBStorage, "upgrade", lambda storage: pytest.fail("it was upgraded"))
    assert upgrade(any_url) == (head(), head())


def test_tables_newer_than_the_installed_optuna_are_left_alone(any_url):
    with opened(any_url) as storage:
        fill(storage)
    stamp(any_url, "v99.0.0.a")
    sentence = refused(StorageError, upgrade, any_url)
    assert "v99.0.0.a" in sentence
    assert "newer optuna" in sentence
    assert recorded_version(any_url) == "v99.0.0.a"


def test_an_upgrade_makes_no_database_and_touches_nobody_elses(new_url, tmp_path):
    url = new_url()
    assert "no database" in refused(StorageError, upgrade, url)
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE customers (id INTEGER)")
    engine.dispose()
    assert "somebody else's" in refused(StorageError, upgrade, url)


def test_an_upgrade_that_fails_says_why(new_url, monkeypatch):
    url = new_url()
    with opened(url):
        pass
    stamp(url, "v3.0.0.d")

    def fail(storage):
        raise sqlalchemy.exc.OperationalError("ALTER", {}, Exception("disk full"))

    monkeypatch.setattr(optuna.storages.RDBStorage, "upgrade", fail)
    assert "disk full" in refused(StorageError, upgrade, url)


def test_an_upgrade_leaves_logging_as_it_was(new_url, monkeypatch):
    url = new_url()
    with opened(url):
        pass
    stamp(url, "v3.0.0.d")
    root, ours = logging.getLogger(), logging.getLogger("hpo.storage")
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    upgrade(url)
    assert (root.handlers, root.level, ours.disabled) == ([], level, False)
