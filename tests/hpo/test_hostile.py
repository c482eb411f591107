"""Hostile URLs and names, and a password that must be seen nowhere."""

import gc
import json
import signal
import sys
from subprocess import PIPE
from urllib.parse import quote

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage

import hpo.search_lengths
from hpo.runs import SPOOL
from hpo.storage import close, open_storage

SECRET = "s3cr&t#p/w:d@%{}'\" \u00e9?="
HINTS = ("s3cr", quote("#p/w:d@%", safe=""), "p/w:d")
"""Parts of it that would tell, as it is and as a URL has it."""
AWAY = "127.0.0.1:1"

LENGTHS = """
kind = "lengths"
name = "lengths"
[retention]
low = 0.4
high = 1.0
step = 0.1
[sampler]
population_size = 5
"""


FINETUNE = """
kind = "finetune"
name = "finetune"
[space]
learning_rate = { low = 1e-3, high = 1e-2, log = true }
[fixed]
plain_epochs = 1
epochs = 0
precision = "fp32"
[[first]]
learning_rate = 5e-3
"""


def with_secret(url: str) -> str:
    """The URL with a password that has every special character."""
    user, at, rest = url.partition("@")
    return f"{user}:{quote(SECRET, safe='')}{at}{rest}"


def assert_secret_free(*texts):
    for text in texts:
        for hint in HINTS:
            assert hint not in text


def all_rows(url: str) -> str:
    """Everything that stands in a database."""
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        tables = sqlalchemy.inspect(engine).get_table_names()
        rows = [connection.execute(sqlalchemy.text(f"SELECT * FROM {table}")).all() for table in tables]
    engine.dispose()
    return repr(rows)


pytestmark = pytest.mark.filterwarnings("ignore:.*deleted while still open:ResourceWarning")


@pytest.fixture(autouse=True)
def collected():
    """A command leaves its connections to the end of its process; here they end with the test, not in a later one."""
    yield
    gc.collect()


@pytest.fixture
def study_file(tmp_path) -> str:
    (tmp_path / "lengths.toml").write_text(LENGTHS)
    return str(tmp_path / "lengths.toml")


def test_the_password_is_seen_nowhere(
    command, new_database, tiny_encoder, tiny_dataset, study_file, tmp_path, monkeypatch
):
    url = with_secret(new_database("postgresql"))
    monkeypatch.setenv("HPO_STORAGE", url)
    monkeypatch.delenv("PGPASSWORD", raising=False)
    given = ("--checkpoint", str(tiny_encoder), "--dataset", str(tiny_dataset))
    (tmp_path / "finetune.toml").write_text(FINETUNE)
    trained = ("--model", str(tiny_encoder), "--dataset", str(tiny_dataset), "--study", str(tmp_path / "finetune.toml"))
    said = []
    for arguments in (
        ("-v", "tune", "--trials", "2", "--workers", "2", *trained),
        ("-v", "search-lengths", "--study", study_file, "--trials", "6", *given),
        ("-v", "pareto"),
        ("pareto", "--json"),
        ("-v", "export", "--max-drop", "1", "--out", str(tmp_path / "exported")),
        ("pareto", "--study", "no such study"),
        ("-v", "studies"),
        ("studies", "--json"),
        ("-v", "storage", "copy", url, f"sqlite:///{tmp_path}/copy.db"),
        ("storage", "copy", url, url),
        ("-v", "storage", "upgrade"),
        ("-v", "storage", "replay"),
    ):
        code, out, err = command(*arguments)
        assert code == (1 if "no such study" in arguments or arguments[-2:] == (url, url) else 0), err
        said += [out, err]
    assert_secret_free(*said, all_rows(url), all_rows(f"sqlite:///{tmp_path}/copy.db"))
    written = [file for place in ("runs", "exported") for file in (tmp_path / place).rglob("*") if file.is_file()]
    assert {"front.html", "README.md"} <= {file.name for file in written}
    assert_secret_free(*(file.read_bytes().decode(errors="replace") for file in written))


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql"])
def test_the_password_is_not_in_what_is_said_of_a_server_that_is_away(
    command, driver, tiny_encoder, tiny_dataset, study_file, tmp_path
):
    url = f"{driver}://me:{quote(SECRET, safe='')}@{AWAY}/db?connect_timeout=2"
    given = ("--checkpoint", str(tiny_encoder), "--dataset", str(tiny_dataset))
    for arguments in (
        ("search-lengths", "--study", study_file, *given, "--storage", url),
        ("pareto", "--storage", url),
        ("studies", "--storage", url),
        ("storage", "copy", url, f"sqlite:///{tmp_path}/copy.db"),
        ("storage", "upgrade", "--storage", url),
        ("storage", "replay", "--storage", url),
        ("storage", "serve", "--port", "0", "--storage", url),
        ("dashboard", "--storage", url),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert err.startswith("hpo: ")
        assert_secret_free(err)


def test_results_and_the_password_when_the_server_goes_away_for_good(
    command, own_server_of, tiny_encoder, tiny_dataset, study_file, tmp_path, monkeypatch
):
    """From the evaluation on the database does not answer: exit 1, a spool, and a replay once it is back."""
    server = own_server_of("postgresql")
    url = with_secret(server.url)
    monkeypatch.setenv("HPO_STORAGE", url)
    arguments = ("search-lengths", "--study", study_file, "--trials", "6", "--storage-timeout", "0.5")
    arguments += ("--checkpoint", str(tiny_encoder), "--dataset", str(tiny_dataset))
    evaluate = hpo.search_lengths._Run.evaluate

    def go_away(run, asked):
        told = evaluate(run, asked)
        server.stop()
        return told

    with monkeypatch.context() as patch:
        patch.setattr(hpo.search_lengths._Run, "evaluate", go_away)
        code, _, err = command(*arguments)
    (file,) = (tmp_path / "runs").glob(f"lengths-*/{SPOOL}/*.json")
    kept = json.loads(file.read_text())["results"]
    assert code == 1, err
    assert f"the results of {len(kept)} trials are kept in {file}" in err
    assert "hpo storage replay" in err
    assert_secret_free(err, file.read_text())
    assert "Traceback" not in err

    server.start()
    code, out, err = command("storage", "replay")
    assert f"the results of {len(kept)} trials" in " ".join(out.split()), err
    assert_secret_free(out, err)
    code, _, err = command(*arguments)
    assert code == 0, err
    storage = RDBStorage(server.url)
    trials = optuna.load_study(study_name="lengths", storage=storage).trials
    close(storage)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 6
    assert [trials[one["number"]].values for one in kept] == [one["values"] for one in kept]


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///hpo.db\nrm -rf",
        "postgresql+psycopg://me:hunter2@host/db\n",
        "postgresql+psycopg://me:hunter2@127.0.0.1:99999/db",
        "postgresql+psycopg://me:hunter2@127.0.0.1:-1/db",
        "postgresql+psycopg://me:hunter2@[::1/db",
        "postgresql+psycopg://me:hunter2@127.0.0.1:1/{db}",
        "postgresql+psycopg://me@127.0.0.1:1/db?passfile=/hunter2&connect_timeout=1",
        "postgresql+psycopg://me@127.0.0.1:1/db?no_such_option=hunter2",
        "mysql+pymysql://me:hunter2@127.0.0.1:1/db?ssl_key_password=hunter2&connect_timeout=1",
        "mysql+nonsense://me:hunter2@host/db",
        "javascript:hunter2",
        "file:///etc/passwd?hunter2",
        "://hunter2",
        "\u202epostgresql://me:hunter2@host/db",
        "postgresql+psycopg://" + "h" * 5000 + ":1/db?connect_timeout=1",
        "grpc://me:hunter2@127.0.0.1:13000",
        "grpc://127.0.0.1:99999",
        "\x1b[31mhunter2",
        "",
    ],
    ids=range(19),
)
def test_a_hostile_url_is_one_sentence(command, url, monkeypatch):
    monkeypatch.delenv("HPO_STORAGE")
    monkeypatch.setattr("hpo.storage.DEFAULT_URL", "nonsense")
    code, out, err = command("studies", "--storage", url)
    assert (code, out) == (1, ""), err
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert "Traceback" not in err
    if "no_such_option" not in url:  # the driver repeats it; nobody could know that it is a secret
        assert "hunter2" not in err


NAMES = (
    "a/b",
    "../../etc",
    "a'; DROP TABLE studies; --",
    'quote"',
    "line\nbreak",
    "\x1b[2J",
    "[/bold]",
    "n" * 500,
    "\u540d\u524d \U0001f600",
)


@pytest.mark.parametrize("name", [*NAMES, "\udcff", ""], ids=range(len(NAMES) + 2))
def test_a_study_of_a_hostile_name_that_is_not_there_is_one_sentence(command, storage, name):
    close(open_storage(storage))
    code, out, err = command("pareto", "--study", name)
    assert (code, out) == (1, ""), err
    assert err.startswith("hpo: ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()


def test_studies_of_hostile_names_are_listed_and_copied(command, storage, tmp_path):
    opened = open_storage(storage)
    for name in NAMES:
        optuna.create_study(storage=opened, study_name=name)
    close(opened)
    code, out, err = command("studies")
    assert code == 0, err
    assert "\x1b" not in out
    assert "[/bold]" in out
    code, out, _ = command("studies", "--json")
    assert [entry["study"] for entry in json.loads(out)["studies"]] == list(NAMES)
    code, _, err = command("storage", "copy", storage, f"sqlite:///{tmp_path}/copy.db")
    assert code == 0, err
    copied = open_storage(f"sqlite:///{tmp_path}/copy.db")
    assert [study.study_name for study in copied.get_all_studies()] == list(NAMES)
    close(copied)
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".db" and "-" not in file.name) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serving_says_where_and_ends_cleanly(storage, number, start_process):
    pytest.importorskip("grpc")
    process = start_process(
        [sys.executable, "-m", "hpo.cli", "storage", "serve", "--port", "0", "--storage", storage],
        stderr=PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert line.startswith(f"Serving {storage} on grpc://127.0.0.1:"), line
    remote = open_storage(next(word for word in line.split() if word.startswith("grpc://")))
    assert remote.get_all_studies() == []
    close(remote)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "Ended.\n")


HEARD_BY_ANOTHER = """
import signal, sys, threading, time
from hpo.cli import main
def tell():
    sys.stdin.readline()
    time.sleep(0.2)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=tell, daemon=True).start()
main()
"""


def test_serving_ends_though_another_thread_hears_the_signal(storage, start_process):
    pytest.importorskip("grpc")
    arguments = ["storage", "serve", "--port", "0", "--storage", storage]
    process = start_process([sys.executable, "-c", HEARD_BY_ANOTHER, *arguments], stdin=PIPE, stderr=PIPE, text=True)
    assert process.stderr.readline().startswith("Serving ")
    _, err = process.communicate("now\n", timeout=60)
    assert (process.returncode, err) == (0, "Ended.\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("dashboard", "--storage", "grpc://127.0.0.1:13000"),
        ("storage", "copy", "grpc://127.0.0.1:13000", "sqlite:///copy.db"),
        ("storage", "copy", "sqlite:///hpo.db", "grpc://127.0.0.1:13000"),
        ("storage", "upgrade", "--storage", "grpc://127.0.0.1:13000"),
        ("storage", "serve", "--storage", "grpc://127.0.0.1:13000", "--port", "0"),
        ("storage", "serve", "--host", "no such host", "--port", "0"),
    ],
    ids=" ".join,
)
def test_what_needs_the_database_itself_or_another_address_says_so(command, arguments, storage, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    close(open_storage("sqlite:///hpo.db"))
    code, out, err = command(*arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert ("the SQL database behind it" if "grpc" in str(arguments) else "Cannot listen on") in err
