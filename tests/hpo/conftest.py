"""A tiny encoder, a tiny dataset and small study definitions, all made here."""

import logging
import random
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import datasets
import pandas
import pytest
import sqlalchemy
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import hpo.cli
from hpo.workload import Workload
from model.data import DataSpec
from studies.loader import FinetuneStudy, LengthsStudy, Range

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
NEUTRAL = ("film", "plot", "scene", "music", "actor", "story", "the", "a", "was", "is", "and", "very", "not")
NUM_LAYERS = 3

SERVERS = {
    "postgresql": ("postgresql+psycopg://postgres@127.0.0.1:5432/", "test", "DROP DATABASE {} WITH (FORCE)"),
    "mariadb": ("mysql+pymysql://root@127.0.0.1:3306/", "test", "DROP DATABASE {}"),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def private_caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    monkeypatch.delenv("HPO_RUNS", raising=False)


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


@pytest.fixture
def workload(tiny_encoder, tiny_dataset) -> Workload:
    return Workload(model=str(tiny_encoder), data=DataSpec(dataset=str(tiny_dataset), search_size=60))


@pytest.fixture
def storage(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/hpo.db"


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
def finetune() -> FinetuneStudy:
    return FinetuneStudy(
        name="finetune",
        objective="area",
        space={"learning_rate": Range(low=1e-4, high=1e-2, log=True), "length_drop": Range(low=0.1, high=0.4)},
        fixed={"plain_epochs": 1, "epochs": 1, "batch_size": 32, "precision": "fp32"},
        first=({"learning_rate": 5e-3, "length_drop": 0.2},),
    )


@pytest.fixture
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
