"""A classification dataset, read, checked and cut into its three splits: train, search and report."""

import contextlib
import errno
import glob
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from numpy.typing import NDArray
from transformers import BatchEncoding, PreTrainedTokenizerBase

from model.hub import hub_answers

logger = logging.getLogger(__name__)

TRAIN_SPLIT = "train"
REPORT_SPLITS = ("validation", "validation_matched", "dev", "valid", "val", "eval", "test")  # in order of preference
CARVED = "carved from train"
MAX_CARVED_ROWS = 2_000
CARVED_PART = 10  # one row in ten, where that is fewer

CSV_OPTIONS = {"keep_default_na": False, "na_values": [""]}  # else the words "None", "NA" and "null" read as missing
FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", CSV_OPTIONS),
    ".tsv": ("csv", {**CSV_OPTIONS, "sep": "\t"}),
}
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("query", "passage"),
)
TEXT_NAMES = ("text", "sentence")
LABEL_NAMES = (
    *("label", "labels", "target", "class", "category", "sentiment", "gold_label", "polarity", "topic", "intent"),
    *("emotion", "stance"),
)
ID_NAME = re.compile(r"(^|_)(id|idx|index|uid|uuid|guid|key)$|^unnamed|^__index_level")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

TEXT_FLAG, LABEL_FLAG = "--text-columns a[,b]", "--label-column NAME"


class DataError(ValueError):
    """A dataset that cannot be used as it is; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Everything that decides the three splits.

    Attributes:
        dataset: A hub id with an optional config (`nyu-mll/glue:sst2`), a local folder, one file, or files by
            split (`train=a.csv,validation=b.csv`); files are Parquet, JSON, JSONL, CSV or TSV.
        text_columns: One column, or two for sentence pairs; None finds them by their features.
        label_column: None finds it by its feature.
        train_limit: Most rows of the train split; the search and report splits never depend on it.
        search_size: Rows of the search split; None takes a tenth of the dataset's train rows, at most 2,000.
        seed: Decides which rows are carved out, 0..2**32 - 1.
    Raises:
        DataError: A value is out of its range.
    """

    dataset: str
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    train_limit: int | None = None
    search_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.dataset.strip():
            raise DataError("dataset is empty; give a hub id, a local folder or a file.")
        if self.text_columns is not None:
            if len(self.text_columns) not in (1, 2) or not all(self.text_columns):
                raise DataError(f"text_columns={self.text_columns!r}; name one column, or two for sentence pairs.")
            if len({*self.text_columns, self.label_column}) <= len(self.text_columns):
                raise DataError(
                    f"text_columns={self.text_columns!r} and label_column={self.label_column!r} name a column twice; "
                    "name each once."
                )
        if self.train_limit is not None and self.train_limit < 2:
            raise DataError(f"train_limit={self.train_limit}; choose 2 rows or more, or leave it out.")
        if self.search_size is not None and self.search_size < 1:
            raise DataError(f"search_size={self.search_size}; choose 1 row or more, or leave it out.")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"seed={self.seed}; choose 0..{2**32 - 1}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold; `from_dict` is the inverse."""
        texts = None if self.text_columns is None else list(self.text_columns)
        return {**asdict(self), "text_columns": texts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataSpec":
        """The inverse of `to_dict`.

        Raises:
            DataError: A field is unknown, missing or out of range.
        """
        known = {field.name for field in fields(cls)}
        if "dataset" not in values or not values.keys() <= known:
            raise DataError(f"Cannot read a data spec with the fields {sorted(values)}; it has {sorted(known)}.")
        texts = values.get("text_columns")
        return cls(**{**values, "text_columns": None if texts is None else tuple(texts)})


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The three splits; no row of the dataset is in two of them.

    Attributes:
        train: What the model learns from. Each split has the columns `text`, `text_pair` where the task has
            sentence pairs, and `label`, an int64 in 0..C-1. Rows keep the dataset's order.
        search: Carved out of the dataset's train rows; trials are scored on it.
        report: The validation split, or carved out of train where the dataset has none.
        label_names: C names; label i is called `label_names[i]`.
        text_columns: The dataset's names of `text` and `text_pair`.
        label_column: The dataset's name of `label`.
        report_split: The dataset's name of the report split, or "carved from train".
        fingerprint: SHA-256 (hex) over the label names and every text and label in order: content alone, so
            it is the same on every machine and for every file format.
    """

    train: datasets.Dataset
    search: datasets.Dataset
    report: datasets.Dataset
    label_names: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_column: str
    report_split: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """A split as token ids, one unpadded list per row, truncated to the encoder's maximum.

    Attributes:
        input_ids: N lists of token ids, special tokens included.
        token_type_ids: N lists alike; zeros where the tokenizer knows no token types.
        labels: Classes, (N,).
        num_truncated: Rows that lost tokens to the maximum length.
    """

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    labels: NDArray[np.int64]
    num_truncated: int

    @cached_property
    def num_tokens(self) -> NDArray[np.int64]:
        """Real tokens of each row, special tokens included, (N,)."""
        return np.fromiter((len(ids) for ids in self.input_ids), dtype=np.int64, count=len(self.input_ids))


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """One split of the dataset, checked: every row has its texts and a label."""

    split: str
    texts: pa.Table  # text[, text_pair]
    labels: NDArray[np.int64]  # positions in `label_names`
    label_names: tuple[str, ...]

    def take(self, rows: NDArray[np.int64]) -> "_Rows":
        return _Rows(
            split=self.split, texts=self.texts.take(rows), labels=self.labels[rows], label_names=self.label_names
        )


def load_corpus(spec: DataSpec) -> Corpus:
    """Read the dataset and cut it into train, search and report split.

    The search split is carved out of the dataset's train rows first, then a report split where the dataset has no
    labelled one of its own, both stratified by label; `train_limit` then takes a stratified part of the rest. The
    same spec and data give the same splits on every machine.

    Raises:
        DataError: The dataset cannot be read, its columns are not clear, a row lacks its text or label, or the
            labels do not suit a classification.
    """
    splits = _read_splits(spec.dataset)
    if TRAIN_SPLIT not in splits:
        raise DataError(
            f"{spec.dataset!r} has no train split, only {', '.join(splits)}; name the files as in "
            "--dataset train=a.csv,validation=b.csv."
        )
    text_columns, label_column = _find_columns(splits[TRAIN_SPLIT], spec)
    rows = _check_rows(splits[TRAIN_SPLIT], TRAIN_SPLIT, text_columns, label_column)
    _check_classes(rows, label_column)
    own_report = _find_report(splits, text_columns, label_column)

    size = max(1, min(MAX_CARVED_ROWS, len(rows.labels) // CARVED_PART))
    rest, search = _carve(rows, spec.search_size or size, "search", spec.seed)
    if own_report is None:
        logger.info("The dataset has no labelled validation split: %d train rows become the report split.", size)
        rest, report = _carve(rest, size, "report", spec.seed)
    else:
        report = _with_labels_of(rows, own_report)
    train = _limit(rest, spec.train_limit, spec.seed)

    _log_splits(train, search, report, text_columns, label_column)
    return Corpus(
        train=_as_dataset(train),
        search=_as_dataset(search),
        report=_as_dataset(report),
        label_names=rows.label_names,
        text_columns=text_columns,
        label_column=label_column,
        report_split=own_report.split if own_report else CARVED,
        fingerprint=_fingerprint((train, search, report)),
    )


def encode(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
    """Turn a split of a `Corpus` into token ids, truncated to `max_length` and not padded.

    Args:
        split: Columns `text`, perhaps `text_pair`, and `label`.
        tokenizer: The model's own.
        max_length: Most tokens of a row, special tokens included; of a pair the longer text is shortened first.
    Raises:
        DataError: `max_length` leaves no room for text, or is more than the tokenizer's model takes.
    """
    columns = split[:]
    texts, pairs, labels = columns["text"], columns.get("text_pair"), columns["label"]
    special = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if not special < max_length <= tokenizer.model_max_length:
        raise DataError(f"max_length={max_length}; choose {special + 1}..{tokenizer.model_max_length} tokens.")
    encoding = tokenizer(texts, pairs, truncation=True, max_length=max_length, verbose=False)
    input_ids = encoding["input_ids"]

    num_truncated = _count_truncated(encoding, texts, pairs, tokenizer, max_length)
    if num_truncated:
        logger.info("%d of %d rows are truncated to %d tokens.", num_truncated, len(texts), max_length)
    return EncodedSplit(
        input_ids=input_ids,
        token_type_ids=encoding.get("token_type_ids") or [[0] * len(ids) for ids in input_ids],
        labels=np.asarray(labels, dtype=np.int64),
        num_truncated=num_truncated,
    )


def _count_truncated(
    encoding: BatchEncoding,
    texts: list[str],
    pairs: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> int:
    if encoding.encodings is not None:  # tokenizers written in Rust tell what they cut off
        return sum(bool(row.overflowing) for row in encoding.encodings)
    whole = tokenizer(texts, pairs, verbose=False)["input_ids"]
    return sum(len(ids) > max_length for ids in whole)


# Reading ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_network() -> Iterator[None]:
    """Let `datasets` read its cache and local files alone; it would report each load of a file to a counter, too."""
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _read_splits(dataset: str) -> dict[str, datasets.Dataset]:
    """Every split of `dataset` by its name, none of them empty."""
    with _quiet_libraries(), _explained_errors(dataset):
        path = Path(dataset).expanduser()
        folder, _, config = dataset.rpartition(":")
        if path.is_dir():
            splits = _read_folder(path, None)
        elif path.is_file():
            splits = {TRAIN_SPLIT: _read_file(path, TRAIN_SPLIT)}
        elif "=" in dataset:
            splits = _read_named_files(dataset)
        elif folder and Path(folder).expanduser().is_dir():
            splits = _read_folder(Path(folder).expanduser(), config)
        elif _looks_like_path(dataset):
            raise DataError(f"There is no file or folder {dataset!r}; check the path given as --dataset.")
        else:
            splits = _read_hub(dataset)
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"The {name} split of {dataset!r} has no rows; fill it or leave it out.")
    return splits


def _looks_like_path(dataset: str) -> bool:
    return (
        dataset.startswith((".", "/", "~"))
        or "\\" in dataset
        or dataset.count("/") > 1
        or Path(dataset).suffix.lower() in FORMATS
    )


def _read_named_files(dataset: str) -> dict[str, datasets.Dataset]:
    """The splits of `train=a.csv,validation=b.csv`, each read alone, so their columns need not all agree."""
    allowed = (TRAIN_SPLIT, *REPORT_SPLITS)
    splits: dict[str, datasets.Dataset] = {}
    for part in dataset.split(","):
        name, _, file = (piece.strip() for piece in part.partition("="))
        if name not in allowed or name in splits or not file:
            raise DataError(
                f"Cannot read {part!r} in --dataset {dataset!r}; write train=FILE,validation=FILE, each split once, "
                f"with split names from {', '.join(allowed)}."
            )
        path = Path(file).expanduser()
        if not path.is_file():
            raise DataError(f"There is no file {file!r} for the {name} split; check the path given as --dataset.")
        splits[name] = _read_file(path, name)
    return splits


@_without_network()
def _read_file(path: Path, split: str) -> datasets.Dataset:
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{str(path)!r} has none of the known endings {', '.join(FORMATS)}; convert or rename it.")
    if not path.stat().st_size:
        raise DataError(f"{str(path)!r} is an empty file; give one with rows.")
    builder, options = FORMATS[path.suffix.lower()]
    with _explained_errors(str(path)):
        pattern = glob.escape(str(path.resolve()))
        return datasets.load_dataset(builder, data_files={split: pattern}, split=split, **options)


@_without_network()
def _read_folder(path: Path, config: str | None) -> dict[str, datasets.Dataset]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # saved with save_to_disk
        saved = datasets.load_from_disk(str(path))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {TRAIN_SPLIT: saved}
    if set("*?[") & set(str(path.resolve())):
        raise DataError(f"The folder {str(path)!r} has one of * ? [ in its path; rename it.")  # read as patterns
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in FORMATS and file.is_file()]
    if not files:
        raise DataError(f"The folder {str(path)!r} holds no data; it needs files ending in {', '.join(FORMATS)}.")
    try:
        return dict(_load_dataset(str(path.resolve()), config))
    except Exception as error:
        if config is None and "Config name is missing" not in str(error):
            for file in files:
                _read_file(file, TRAIN_SPLIT)  # where one file is at fault, this names it
        raise


def _read_hub(dataset: str) -> dict[str, datasets.Dataset]:
    name, _, config = dataset.partition(":")
    if not HUB_ID.fullmatch(name) or name in {builder for builder, _ in FORMATS.values()}:
        raise DataError(
            f"{dataset!r} is neither an existing folder or file nor a hub id; give a path, or an id as in "
            "nyu-mll/glue:sst2."
        )
    reached = not datasets.config.HF_HUB_OFFLINE and hub_answers()
    try:
        with contextlib.nullcontext() if reached else _without_network():
            return dict(_load_dataset(name, config or None))
    except ConnectionError as error:
        reason = "offline mode is set" if datasets.config.HF_HUB_OFFLINE else "no connection to the hub"
        raise DataError(
            f"{dataset!r} is no local path and could not be fetched from {datasets.config.HF_ENDPOINT} ({reason}); "
            "give a local folder, or connect and run it again."
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"The hub has no dataset {name!r} that you may read; check its spelling, log in with `hf auth login`, or "
            "give a local folder."
        ) from error


def _load_dataset(path: str, config: str | None) -> datasets.DatasetDict:
    builder = datasets.load_dataset_builder(path, config)
    is_csv = type(builder.config).__name__ == "CsvConfig"
    return datasets.load_dataset(path, config, **(CSV_OPTIONS if is_csv else {}))


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep progress bars, log lines and warnings of the loading libraries from the user; our errors say it all."""
    with warnings.catch_warnings(), contextlib.ExitStack() as restore:
        warnings.simplefilter("ignore")
        for library in map(logging.getLogger, ("datasets", "huggingface_hub")):
            restore.callback(library.setLevel, library.level)
            library.setLevel(logging.CRITICAL + 1)
        if datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not datasets.are_progress_bars_disabled():
            restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        if HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled():
            restore.callback(enable_progress_bars)
            disable_progress_bars()
        yield


@contextlib.contextmanager
def _explained_errors(source: str) -> Iterator[None]:
    """Turn whatever reading `source` raises into one sentence: the libraries below raise errors of many families."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(_explain(error, source)) from error


def _explain(error: Exception, source: str) -> str:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, OSError) and _is_about_cache(cause):
            return (
                f"The dataset cache {str(datasets.config.HF_DATASETS_CACHE)!r} cannot be written "
                f"({cause.strerror or _first_line(cause)}); make room there, or set HF_DATASETS_CACHE to a folder "
                "that can be written."
            )
        if isinstance(cause, PermissionError):
            return f"{cause.filename or source!r} may not be read (permission denied); change its permissions."
        if isinstance(cause, datasets.table.CastError):
            return (
                f"The files of {source!r} do not have the same columns ({cause.details().strip()}); make them "
                "agree, or name one file per split as in --dataset train=a.csv,validation=b.csv."
            )
    message = str(error)
    if match := re.search(r'Instruction "(\w+)" corresponds to no data', message):
        return f"The {match[1]} split of {source!r} has no rows; fill it or leave it out."
    if match := re.search(r"[Aa]vailable(?: configs(?: in the cache)?)?: \[(.*?)\]", message):
        return f"Name one config of {source!r} after a colon, as in `name:config`; it has {match[1]}."
    if isinstance(causes[-1], StopIteration) or "BatchSize must be greater than 0" in str(causes[-1]):
        return f"{source!r} has no rows; give a file with rows."
    return f"{source!r} cannot be read as a dataset ({_first_line(causes[-1])}); repair or replace it."


def _is_about_cache(error: OSError) -> bool:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS) or "Not enough disk space" in str(error):
        return True
    if not isinstance(error.filename, str):
        return False
    cache, path = Path(datasets.config.HF_DATASETS_CACHE).absolute(), Path(error.filename).absolute()
    return path.is_relative_to(cache) or cache.is_relative_to(path)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:200]


# Columns ------------------------------------------------------------------------------------------------------------


def _find_columns(train: datasets.Dataset, spec: DataSpec) -> tuple[tuple[str, ...], str]:
    """The text columns and the label column, as named in `spec` or found by their features."""
    named = [*(spec.text_columns or ()), *([spec.label_column] if spec.label_column else [])]
    _require_columns(train, TRAIN_SPLIT, named)
    label = spec.label_column or _find_label(train, spec.text_columns or ())
    texts = spec.text_columns or _find_texts(train, label)
    return texts, label


def _require_columns(split: datasets.Dataset, name: str, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in split.column_names:
            raise DataError(
                f"The {name} split has no column {column!r}, only {_listed(split)}; name columns that it has with "
                f"{TEXT_FLAG} and {LABEL_FLAG}."
            )


def _find_label(train: datasets.Dataset, text_columns: Sequence[str]) -> str:
    """The class-label column, else one of a usual name, else the only column of few integers, bools or words."""
    features: dict[str, Any] = {name: kind for name, kind in train.features.items() if name not in text_columns}
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    usual = sorted(
        (name for name in classes or features if name.lower() in LABEL_NAMES),
        key=lambda name: LABEL_NAMES.index(name.lower()),
    )
    if usual:
        return usual[0]
    few = [name for name in features if not ID_NAME.search(name.lower()) and _has_few_values(train, name, at_least=2)]
    numbers = [name for name in few if not _is_text(features[name])]
    candidates = classes or numbers or few
    beside_text = bool(text_columns) or any(_is_text(features[name]) and name not in few for name in features)
    if len(candidates) == 1 and (beside_text or candidates == numbers):
        return candidates[0]
    problem = f"{', '.join(candidates)} could each be the label" if len(candidates) > 1 else "none is clearly the label"
    raise DataError(f"Of the columns {_listed(train)} {problem}; name it with {LABEL_FLAG}.")


def _find_texts(train: datasets.Dataset, label: str) -> tuple[str, ...]:
    """A known pair of string columns, else the only string column, else the only one of many values or usual name."""
    strings: dict[str, str] = {
        name.lower(): name
        for name, feature in train.features.items()
        if _is_text(feature) and name != label and not ID_NAME.search(name.lower())
    }
    for first, second in TEXT_PAIRS:
        if first in strings and second in strings:
            return strings[first], strings[second]
    varied = [name for name in strings.values() if not _has_few_values(train, name)]
    usual = [strings[name] for name in TEXT_NAMES if name in strings]
    for candidates in (list(strings.values()), varied, usual):
        if len(candidates) == 1:
            return (candidates[0],)
    problem = "several could be the text" if strings else "none holds text"
    raise DataError(f"Of the columns {_listed(train)} {problem}; name one, or two for pairs, with {TEXT_FLAG}.")


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _has_few_values(split: datasets.Dataset, column: str, at_least: int = 0) -> bool:
    """Whether a column of integers, bools or strings has so few different values that they look like classes."""
    feature = split.features[column]
    if not isinstance(feature, datasets.Value) or not re.match(r"u?int|bool|(large_)?string", feature.dtype):
        return False
    distinct = int(pc.count_distinct(_column(split, column)).as_py())
    return at_least <= distinct <= min(100, max(2, len(split) // 4))


def _listed(split: datasets.Dataset) -> str:
    kinds = {name: getattr(feature, "dtype", type(feature).__name__) for name, feature in split.features.items()}
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def _column(split: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return split.with_format("arrow").select_columns([name])[:].column(name)


# Rows ---------------------------------------------------------------------------------------------------------------


def _check_rows(split: datasets.Dataset, name: str, text_columns: tuple[str, ...], label_column: str) -> _Rows:
    """Read the columns of one split and see that no row lacks its text or label."""
    _require_columns(split, name, (*text_columns, label_column))
    texts = {}
    for target, column in zip(("text", "text_pair"), text_columns, strict=False):
        if not _is_text(split.features[column]):
            kind = getattr(split.features[column], "dtype", type(split.features[column]).__name__)
            raise DataError(f"Column {column!r} of the {name} split holds {kind}, not text; choose with {TEXT_FLAG}.")
        texts[target] = _column(split, column).cast(pa.string())
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts[target]), ""), True)
        _refuse_rows(blank.to_numpy(), f"no text in column {column!r}", name)
    label_names, labels = _read_labels(split, name, label_column)
    _refuse_rows(labels < 0, f"no label in column {label_column!r}", name)
    return _Rows(split=name, texts=pa.table(texts), labels=labels, label_names=label_names)


def _refuse_rows(bad_N: NDArray[np.bool_], problem: str, split: str) -> None:
    if bad_N.any():
        others = int(bad_N.sum()) - 1
        raise DataError(
            f"Row {int(bad_N.argmax())} of the {split} split (the first is row 0) has {problem}"
            f"{f', and {others} more are like it' if others else ''}; complete or remove what lacks it."
        )


def _read_labels(split: datasets.Dataset, name: str, label_column: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The label names of one split and each row's position among them, (N,), -1 where a label is missing."""
    feature, column = split.features[label_column], _column(split, label_column)
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names), np.asarray(pc.fill_null(column, -1), dtype=np.int64)
    if not isinstance(feature, datasets.Value) or not re.match(r"u?int|bool|float|(large_)?string|null", feature.dtype):
        raise DataError(
            f"The label column {label_column!r} holds {getattr(feature, 'dtype', type(feature).__name__)}; one class "
            f"per row is supported: choose another with {LABEL_FLAG}."
        )
    encoded = pc.dictionary_encode(column.combine_chunks())
    codes = np.asarray(pc.fill_null(encoded.indices, -1), dtype=np.int64)
    values = [_label_value(value) for value in encoded.dictionary.to_pylist()]
    if any(isinstance(value, float) for value in values):
        raise DataError(
            f"The label column {label_column!r} of the {name} split holds fractions such as "
            f"{next(value for value in values if isinstance(value, float))}: this looks like regression, which is "
            f"not supported yet; choose a column of classes with {LABEL_FLAG}."
        )
    names = tuple(sorted({value for value in values if value is not None}))
    rank = {value: position for position, value in enumerate(names)}
    position_of_code = np.array([*(rank.get(value, -1) for value in values), -1], dtype=np.int64)  # [-1] is missing
    return tuple(str(value) for value in names), position_of_code[codes]


def _label_value(value: Any) -> Any:
    """A label as it is sorted and named: whole floats as integers, blank strings and NaN as missing."""
    if isinstance(value, float):
        return None if np.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, str):
        return value if value.strip() else None
    return value


def _check_classes(rows: _Rows, label_column: str) -> None:
    num_rows, num_classes = len(rows.labels), len(np.unique(rows.labels))
    if num_classes < 2:
        raise DataError(
            f"Every train row has the label {rows.label_names[rows.labels[0]]!r}; a classification needs two or more: "
            f"choose another column with {LABEL_FLAG}."
        )
    if num_classes > num_rows / 2:
        raise DataError(
            f"The label column {label_column!r} has {num_classes} different values in {num_rows} train rows: this is "
            f"probably an id; choose the label with {LABEL_FLAG}."
        )


def _find_report(
    splits: Mapping[str, datasets.Dataset], text_columns: tuple[str, ...], label_column: str
) -> _Rows | None:
    """The first split made for validation whose labels are real; test sets are often published without."""
    for name in REPORT_SPLITS:
        if name not in splits or (name == "test" and label_column not in splits[name].column_names):
            continue
        _require_columns(splits[name], name, (label_column,))
        if _is_unlabelled(_column(splits[name], label_column)):
            logger.info("The %s split has no labels, so nothing is reported on it.", name)
            continue
        return _check_rows(splits[name], name, text_columns, label_column)
    return None


def _is_unlabelled(labels: pa.ChunkedArray) -> bool:
    values = pc.unique(labels).to_pylist()
    return all(value in (None, "", -1, "-1") for value in values)


def _with_labels_of(train: _Rows, other: _Rows) -> _Rows:
    """`other` with its labels counted as train counts them.

    Raises:
        DataError: It has a label that no train row has.
    """
    in_train = {train.label_names[label]: label for label in np.unique(train.labels)}
    used = np.unique(other.labels)
    if unknown := [other.label_names[label] for label in used if other.label_names[label] not in in_train]:
        raise DataError(
            f"Label {unknown[0]!r} stands in the {other.split} split but not in train, whose labels are "
            f"{', '.join(map(repr, list(in_train)[:10]))}; make the two agree."
        )
    position = np.full(len(other.label_names), -1, dtype=np.int64)
    position[used] = [in_train[other.label_names[label]] for label in used]
    return _Rows(split=other.split, texts=other.texts, labels=position[other.labels], label_names=train.label_names)


# Splitting ----------------------------------------------------------------------------------------------------------


def _carve(rows: _Rows, size: int, purpose: str, seed: int) -> tuple[_Rows, _Rows]:
    """Split `rows` into the rest and `size` stratified rows; at least one row of each class stays in the rest."""
    counts = np.bincount(rows.labels, minlength=len(rows.label_names))
    highest = np.maximum(counts - 1, 0)
    if size > highest.sum():
        raise DataError(
            f"The {purpose} split should have {size} rows, but only {highest.sum()} of {len(rows.labels)} train rows "
            "can leave it with one of each label; give more data or a smaller search_size."
        )
    chosen = _draw(rows.labels, _share_out(counts, size, np.zeros_like(counts), highest), purpose, seed)
    return rows.take(np.flatnonzero(~chosen)), rows.take(np.flatnonzero(chosen))


def _limit(rows: _Rows, limit: int | None, seed: int) -> _Rows:
    """At most `limit` rows, stratified, at least one of each class."""
    if limit is None or limit >= len(rows.labels):
        return rows
    counts = np.bincount(rows.labels, minlength=len(rows.label_names))
    lowest = np.minimum(counts, 1)
    if limit < lowest.sum():
        raise DataError(f"train_limit={limit}, but train has {lowest.sum()} labels; choose at least one row for each.")
    return rows.take(np.flatnonzero(_draw(rows.labels, _share_out(counts, limit, lowest, counts), "limit", seed)))


def _share_out(
    counts_C: NDArray[np.int64], size: int, lowest_C: NDArray[np.int64], highest_C: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows to draw of each class, (C,): in proportion to `counts_C` by largest remainder, within the two bounds."""
    quota = size * counts_C / counts_C.sum()
    shares: NDArray[np.int64] = np.clip(np.floor(quota).astype(np.int64), lowest_C, highest_C)
    while missing := size - int(shares.sum()):
        step = 1 if missing > 0 else -1
        movable = shares < highest_C if missing > 0 else shares > lowest_C
        shares[np.argmax(np.where(movable, (quota - shares) * step, -np.inf))] += step
    return shares


def _draw(labels_N: NDArray[np.int64], shares_C: NDArray[np.int64], purpose: str, seed: int) -> NDArray[np.bool_]:
    """Mark `shares_C` random rows of each class, (N,).

    NumPy promises never to change the stream of `RandomState`, unlike that of its newer generators.
    """
    salt = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    order = np.random.RandomState([seed, salt]).permutation(len(labels_N))
    order = order[np.argsort(labels_N[order], kind="stable")]  # shuffled within each class
    first_of_class = np.searchsorted(labels_N[order], np.arange(len(shares_C)))
    rank_in_class = np.arange(len(order)) - first_of_class[labels_N[order]]
    chosen = np.zeros(len(labels_N), dtype=np.bool_)
    chosen[order[rank_in_class < shares_C[labels_N[order]]]] = True
    return chosen


def _as_dataset(rows: _Rows) -> datasets.Dataset:
    return datasets.Dataset(rows.texts.append_column("label", pa.array(rows.labels)))


def _fingerprint(splits: Sequence[_Rows]) -> str:
    digest = hashlib.sha256()

    def add(text: str) -> None:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)  # the length keeps neighbours apart

    for name in splits[0].label_names:
        add(name)
    for rows in splits:
        add(f"{len(rows.labels)} rows")
        for column in rows.texts.column_names:
            add(column)
            for text in rows.texts.column(column).to_pylist():
                add(text)
        digest.update(rows.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _log_splits(train: _Rows, search: _Rows, report: _Rows, text_columns: Sequence[str], label_column: str) -> None:
    logger.info(
        "Text from %s, labels from %s; %d rows to train on, %d to search on, %d to report on.",
        " and ".join(text_columns), label_column, len(train.labels), len(search.labels), len(report.labels),
    )  # fmt: skip
    in_train = set(zip(*train.texts.to_pydict().values(), strict=True))
    for purpose, rows in (("search", search), ("report", report)):
        absent = sorted(set(train.labels.tolist()) - set(rows.labels.tolist()))
        if absent:
            names = ", ".join(repr(train.label_names[label]) for label in absent[:5])
            logger.warning("%d labels of train are not in the %s split: %s.", len(absent), purpose, names)
        repeats = sum(texts in in_train for texts in zip(*rows.texts.to_pydict().values(), strict=True))
        if repeats:
            logger.info("%d texts of the %s split stand in train too.", repeats, purpose)
