"""A tiny encoder, a tiny dataset and small study definitions, all made here."""

import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import datasets
import optuna
import pandas
import pytest
import sqlalchemy
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import hpo.cli
from hpo.search_lengths import search_lengths
from hpo.storage import open_storage
from hpo.workload import Workload
from model.data import DataSpec
from studies.loader import FinetuneStudy, LengthsStudy, Range

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
NEUTRAL = ("film", "plot", "scene", "music", "actor", "story", "the", "a", "was", "is", "and", "very", "not")
NUM_LAYERS = 3
BROWSERS = ("chrome", "google-chrome", "google-chrome-stable", "chromium", "chromium-browser")

SERVERS = {
    "postgresql": ("postgresql+psycopg://postgres@127.0.0.1:5432/", "test", "DROP DATABASE {} WITH (FORCE)"),
    "mariadb": ("mysql+pymysql://root@127.0.0.1:3306/", "test", "DROP DATABASE {}"),
}


@pytest.fixture(scope="session", autouse=True)
def private_caches(tmp_path_factory) -> Iterator[None]:
    """What all tests read is converted for the first of them; nothing of the user's is read or written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("HPO_STORAGE", raising=False)
        patch.delenv("HPO_RUNS", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_browser(tmp_path_factory) -> Iterator[None]:
    """Commands draw no images, which takes a browser for each; so it is in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER_PATH", str(tmp_path_factory.getbasetemp() / "no-browser"))
        yield


@pytest.fixture
def browser(monkeypatch) -> None:
    """Images are drawn after all."""
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no Chrome or Chromium is installed")
    monkeypatch.delenv("BROWSER_PATH")


@pytest.fixture
def time_zone() -> Iterator[Callable[[str], None]]:
    """Sets the zone of this process's clock until the test ends."""
    with pytest.MonkeyPatch.context() as patch:

        def set_zone(name: str) -> None:
            patch.setenv("TZ", name)
            time.tzset()

        yield set_zone
    time.tzset()


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """A transformers folder: random BERT of three layers with its own vocabulary."""
    folder = tmp_path_factory.mktemp("encoder")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: index for index, token in enumerate([*specials, *GOOD, *BAD, *NEUTRAL])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_reviews(path: Path, rows: int, seed: int) -> None:
    """Reviews whose label is whether a good or a bad word stands in them."""
    generator = random.Random(seed)
    texts, labels = [], []
    for row in range(rows):
        label = row % 2
        words = generator.choices(NEUTRAL, k=generator.randint(3, 16))
        words.insert(generator.randrange(len(words)), generator.choice(GOOD if label else BAD))
        texts.append(" ".join(words))
        labels.append(label)
    pandas.DataFrame({"text": texts, "label": labels}).to_parquet(path)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_reviews(folder / "train.parquet", 240, seed=1)
    write_reviews(folder / "validation.parquet", 60, seed=2)
    return folder


@pytest.fixture(scope="session")
def workload(tiny_encoder, tiny_dataset) -> Workload:
    return Workload(model=str(tiny_encoder), data=DataSpec(dataset=str(tiny_dataset), search_size=60))


@pytest.fixture
def storage(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/hpo.db"


@pytest.fixture(scope="session")
def search_once(lengths, workload, tmp_path_factory) -> Callable[[Path], Path]:
    """Searches an encoder's lengths; returns the folder of the search's database and runs, for `copied`."""

    def search(encoder: Path) -> Path:
        folder = tmp_path_factory.mktemp("searched")
        storage = f"sqlite:///{folder}/hpo.db"
        search_lengths(lengths, workload, encoder, trials=15, storage=storage, runs=folder / "runs")
        return folder

    return search


@pytest.fixture
def copied(storage, tmp_path) -> Callable[[Path], optuna.Study]:
    """Copies the database and the runs of a lengths study to the test's own folder, and opens the study there."""

    def copy(folder: Path) -> optuna.Study:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        return optuna.load_study(study_name="lengths", storage=open_storage(storage))

    return copy


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Callable[[Path, Callable[[], None]], None]:
    """Fills a folder, by a copy of what the first test of the file that needs it has made there."""
    first = tmp_path_factory.mktemp("first") / "made"

    def fill(folder: Path, make: Callable[[], None]) -> None:
        if first.exists():
            shutil.copytree(first, folder, dirs_exist_ok=True)
        else:
            make()
            shutil.copytree(folder, first)

    return fill


@contextmanager
def throw_away_database(server: str) -> Iterator[str]:
    """The URL of a new database on a server of this machine."""
    address, existing, drop = SERVERS[server]
    pytest.importorskip({"postgresql": "psycopg", "mariadb": "pymysql"}[server])
    engine = sqlalchemy.create_engine(address + existing, isolation_level="AUTOCOMMIT")
    name = f"hpo_test_{uuid.uuid4().hex}"
    try:
        connection = engine.connect()
    except sqlalchemy.exc.OperationalError as error:
        engine.dispose()
        pytest.skip(f"no {server} server answers at {address} ({error.orig})")
    with connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        try:
            yield address + name
        finally:
            connection.execute(sqlalchemy.text(drop.format(name)))
    engine.dispose()


@pytest.fixture
def new_database() -> Iterator[Callable[[str], str]]:
    """Makes a new database on a server of a kind, which the test's end drops."""
    with ExitStack() as stack:
        yield lambda server: stack.enter_context(throw_away_database(server))


@pytest.fixture(params=SERVERS)
def server_url(request) -> Iterator[str]:
    with throw_away_database(request.param) as url:
        yield url


@pytest.fixture(params=["sqlite", *SERVERS])
def any_url(request, tmp_path) -> Iterator[str]:
    """A database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/hpo.db"
        return
    with throw_away_database(request.param) as url:
        yield url


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background and inherited that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def start_process(ctrl_c) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts processes as `subprocess.Popen` does; those that the test leaves running are killed, not waited for.

    They hear Ctrl-C without `preexec_fn`, which would run gRPC's threads in them until they write errors to stderr.
    """
    with ExitStack() as stack:

        def start(*arguments: object, **options: object) -> subprocess.Popen:
            process = stack.enter_context(subprocess.Popen(*arguments, **options))
            stack.callback(process.kill)
            return process

        yield start


STARTED_WITHIN_S = 60


def _program(name: str, *places: str) -> str:
    found = shutil.which(name) or next((str(file) for place in places for file in Path("/").glob(place)), None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class Server:
    """A database server on this machine.

    Attributes:
        url: Its one database.
        admin_url: The server itself.
        drop: SQL for dropping the database.
    """

    url: str
    admin_url: str
    drop: str

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def empty(self) -> None:
        """Make the database anew."""
        engine = sqlalchemy.create_engine(self.admin_url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(self.drop))
            connection.execute(sqlalchemy.text("CREATE DATABASE hpo"))


class PostgreSQL(Server):
    drop = "DROP DATABASE IF EXISTS hpo WITH (FORCE)"

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("psycopg")
        self._programs = "usr/lib/postgresql/*/bin/"
        initdb = _program("initdb", self._programs + "initdb")
        self._control = _program("pg_ctl", self._programs + "pg_ctl")
        self._folder = folder / "data"
        self._as_user: list[str] = []
        if os.geteuid() == 0:  # the server refuses to run as root
            self._as_user = [_program("setpriv"), "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
            shutil.chown(folder, "postgres", "postgres")
        self._run(initdb, "-D", str(self._folder), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")
        port = _free_port()
        self._options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        self.admin_url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/hpo"

    def _run(self, *command: str) -> None:
        subprocess.run([*self._as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        log = str(self._folder / "log")
        self._run(self._control, "-D", str(self._folder), "-o", self._options, "-l", log, "-w", "start")

    def stop(self) -> None:
        self._run(self._control, "-D", str(self._folder), "-m", "fast", "-w", "stop")


class MariaDB(Server):
    drop = "DROP DATABASE IF EXISTS hpo"

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("pymysql")
        temporary = folder / "tmp"  # starting, a server removes the temporary tables of all that share such a folder
        temporary.mkdir()
        user = "mysql" if os.geteuid() == 0 else None
        if user:
            shutil.chown(folder, user, user)
            shutil.chown(temporary, user, user)
        install = _program("mariadb-install-db")
        common = ["--no-defaults", f"--datadir={folder / 'data'}", f"--tmpdir={temporary}"]
        common += [f"--user={user}"] if user else []
        subprocess.run(
            [install, *common, "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self._port = _free_port()
        self._command = [
            _program("mariadbd", "usr/sbin/mariadbd"),
            *common,
            f"--port={self._port}",
            "--bind-address=127.0.0.1",
            f"--socket={folder}/socket",
            f"--pid-file={folder}/pid",
            "--innodb-flush-log-at-trx-commit=0",
        ]
        self._log = folder / "log"
        self.admin_url = f"mysql+pymysql://root@127.0.0.1:{self._port}/"
        self.url = self.admin_url + "hpo"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        server = sqlalchemy.create_engine(self.admin_url, poolclass=sqlalchemy.NullPool)
        deadline = time.monotonic() + STARTED_WITHIN_S
        while True:
            try:
                server.connect().close()
                return
            except sqlalchemy.exc.OperationalError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.05)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(STARTED_WITHIN_S)


KINDS = {"postgresql": PostgreSQL, "mariadb": MariaDB}


@contextmanager
def private_server(kind: str) -> Iterator[Server]:
    """A running server, which is stopped and removed in the end."""
    with tempfile.TemporaryDirectory(prefix="hpo-server-") as name:
        Path(name).chmod(0o755)
        server = KINDS[kind](Path(name))
        server.start()
        try:
            yield server
        finally:
            with suppress(subprocess.CalledProcessError):  # a test that failed had stopped it
                server.stop()


@pytest.fixture(scope="session")
def own_servers() -> Iterator[Callable[[str], Server]]:
    """Database servers of the tests' own, one of each kind, which they may stop and start."""
    running: dict[str, Server] = {}
    with ExitStack() as stack:

        def server_of(kind: str) -> Server:
            if kind not in running:
                running[kind] = stack.enter_context(private_server(kind))
            return running[kind]

        yield server_of


@pytest.fixture
def own_server_of(own_servers) -> Callable[[str], Server]:
    """The same, with an empty database each."""

    def emptied(kind: str) -> Server:
        server = own_servers(kind)
        server.empty()
        return server

    return emptied


@pytest.fixture(params=KINDS)
def private_database(request, own_server_of) -> Server:
    """A server of each kind."""
    return own_server_of(request.param)


@pytest.fixture(scope="session")
def finetune() -> FinetuneStudy:
    return FinetuneStudy(
        name="finetune",
        objective="area",
        space={"learning_rate": Range(low=1e-4, high=1e-2, log=True), "length_drop": Range(low=0.1, high=0.4)},
        fixed={"plain_epochs": 1, "epochs": 1, "batch_size": 32, "precision": "fp32"},
        first=({"learning_rate": 5e-3, "length_drop": 0.2},),
    )


@pytest.fixture(scope="session")
def lengths() -> LengthsStudy:
    return LengthsStudy(name="lengths", retention=Range(low=0.4, high=1.0, step=0.1), population_size=10, blocks=1)


@pytest.fixture
def restored_logging():
    """The command sets up logging for its whole process; other tests share this one."""
    names = ("hpo", "model", "studies", "huggingface_hub", "transformers", "datasets", "optuna")
    before = [
        (logger, list(logger.handlers), logger.propagate, logger.level) for logger in map(logging.getLogger, names)
    ]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def command(restored_logging, monkeypatch, capsys, storage, tmp_path):
    """Run `hpo ARGUMENTS` in this process; returns exit code, stdout and stderr."""
    monkeypatch.setenv("HPO_STORAGE", storage)
    monkeypatch.setenv("HPO_RUNS", str(tmp_path / "runs"))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            hpo.cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run
