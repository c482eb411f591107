"""A dataset, read, checked and cut into its three splits: train, search and report."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from model.dataset_files import REPORT_SPLITS, TRAIN_SPLIT, read_splits
from model.encoded import EncodedSplit
from model.question_answering import DEFAULT_STRIDE, QuestionData, unfold
from model.rows import Columns, DataError, Rows, TaskData, column_of, require_columns
from model.sentences import VALUE_NAMES, ClassData, LabelSetData, ValueData, is_list
from model.token_classification import TagData

logger = logging.getLogger(__name__)

SEED_LIMIT = 2**32
"""Seeds are below, as numpy takes them."""
CARVED = "carved from train"
MAX_CARVED_ROWS = 2_000
CARVED_PART = 10  # one row in ten, where that is fewer
QUESTION_COLUMNS = ("question", "context", "answers")
WORD_COLUMNS = ("tokens", "words")
LABELS = ("label", "answers", "tags")
"""What a split calls what is to be predicted."""


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
        seed: Decides which rows are carved out, 0..SEED_LIMIT - 1.
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
        if not 0 <= self.seed < SEED_LIMIT:
            raise DataError(f"seed={self.seed}; choose 0..{SEED_LIMIT - 1}.")

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
    """The three splits; no row of the dataset, nor the context of a question, is in two of them.

    Attributes:
        kind: What is predicted, one of `KINDS`.
        train: What the model learns from; rows keep the dataset's order. Texts are the columns `text` and, of pairs,
            `text_pair`, with a `label`: an int64 in 0..C-1, a list of C zeros and ones, or a float32. Questions are
            `question`, `context` and `answers`; sentences with tags are `tokens` and `tags`.
        search: Carved out of the dataset's train rows; trials are scored on it.
        report: The validation split, or carved out of train where the dataset has none.
        label_names: C names; label i is called `label_names[i]`. Empty where there are no classes.
        columns: The dataset's names of the columns.
        report_split: The dataset's name of the report split, or "carved from train".
        fingerprint: SHA-256 (hex) over the label names and every text and label in order: content alone, so
            it is the same on every machine and for every file format.
    """

    kind: str
    train: datasets.Dataset
    search: datasets.Dataset
    report: datasets.Dataset
    label_names: tuple[str, ...]
    columns: Columns
    report_split: str
    fingerprint: str

    @property
    def task(self) -> str:
        """What the head predicts, as `--task` names it."""
        return TASK_OF_KIND.get(self.kind, self.kind)


def load_corpus(spec: DataSpec, task: str | None = None) -> Corpus:
    """Read the dataset and cut it into train, search and report split.

    The search split is carved out of the dataset's train rows first, then a report split where the dataset has no
    labelled one of its own, both stratified by label where there are classes; `train_limit` then takes a stratified
    part of the rest. The same spec and data give the same splits on every machine.

    Args:
        spec: Which dataset, and how it is split.
        task: What is to be predicted; None lets the columns tell.
    Raises:
        DataError: The dataset cannot be read, its columns are not clear, a row lacks its text or label, or the
            labels do not suit the task.
    """
    splits = {name: unfold(split) for name, split in read_splits(spec.dataset).items()}
    if TRAIN_SPLIT not in splits:
        raise DataError(
            f"{spec.dataset!r} has no train split, only {', '.join(splits)}; name the files as in "
            "--dataset train=a.csv,validation=b.csv."
        )
    kind = kind_of(splits[TRAIN_SPLIT], spec.text_columns, spec.label_column, task)
    data = KINDS[kind]
    columns = data.find_columns(splits[TRAIN_SPLIT], spec.text_columns, spec.label_column)
    rows = data.check(splits[TRAIN_SPLIT], TRAIN_SPLIT, columns)
    data.check_train(rows, columns)
    own_report = _find_report(data, splits, columns)

    size = max(1, min(MAX_CARVED_ROWS, len(rows) // CARVED_PART))
    rest, search = _carve(rows, spec.search_size or size, "search", spec.seed)
    if own_report is None:
        logger.info("The dataset has no labelled validation split: %d train rows become the report split.", size)
        rest, report = _carve(rest, size, "report", spec.seed)
    else:
        report = data.count_as(rows, own_report)
    train = _limit(rest, spec.train_limit, spec.seed)

    _log_splits(train, search, report, columns)
    return Corpus(
        kind=kind,
        train=datasets.Dataset(train.table),
        search=datasets.Dataset(search.table),
        report=datasets.Dataset(report.table),
        label_names=rows.label_names,
        columns=columns,
        report_split=own_report.split if own_report else CARVED,
        fingerprint=_fingerprint((train, search, report)),
    )


def kind_of(
    train: datasets.Dataset, texts: tuple[str, ...] | None = None, label: str | None = None, task: str | None = None
) -> str:
    """Which of `KINDS` a dataset is of, told by the names and features of its columns.

    Args:
        train: Its train split.
        texts: The text columns, where a user named them.
        label: The label column, where a user named it.
        task: The task, where a user named it; a classification may still be of one class or of several.
    Raises:
        DataError: The columns do not tell, or a named one is not there.
    """
    require_columns(train, TRAIN_SPLIT, [*(texts or ()), *([label] if label else [])])
    task = task or _told_task(train, texts, label)
    if task != "classification":
        return task
    lists = [name for name in train.column_names if is_list(train.features[name])]
    if lists and (label in lists or (label is None and _find_label(ClassData(), train, texts) in (None, *lists))):
        return "multi-label"
    return task


def _told_task(train: datasets.Dataset, texts: tuple[str, ...] | None, label: str | None) -> str:
    names = {name.lower() for name in train.column_names}
    if names.issuperset(QUESTION_COLUMNS) and (label is None or label.lower() == "answers"):
        return "question-answering"
    words = texts or tuple(name for name in train.column_names if name.lower() in WORD_COLUMNS)
    if len(words) == 1 and is_list(train.features[words[0]]):
        return "token-classification"
    label = label or _find_label(ClassData(), train, texts)
    if label is None:
        value = _find_label(ValueData(), train, texts)
        return "regression" if value is not None and value.lower() in VALUE_NAMES else "classification"
    return "regression" if _holds_fractions(train, label) else "classification"


def _find_label(data: ClassData, train: datasets.Dataset, texts: tuple[str, ...] | None) -> str | None:
    try:
        return data.find_label(train, texts or ())
    except DataError:
        return None


def _holds_fractions(train: datasets.Dataset, column: str) -> bool:
    feature = train.features[column]
    if not isinstance(feature, datasets.Value) or not feature.dtype.startswith("float"):
        return False
    values = np.asarray(pc.drop_null(column_of(train, column)), dtype=np.float64)
    return bool((values[np.isfinite(values)] % 1).any())


def encode(
    split: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    kind: str = "classification",
    stride: int | None = DEFAULT_STRIDE,
) -> EncodedSplit:
    """Turn a split of a `Corpus` into token ids, none of them more than `max_length`, not padded.

    Args:
        split: The columns of its kind.
        tokenizer: The model's own.
        max_length: Most tokens of a sequence, special tokens included; of a pair of texts the longer is shortened
            first, and a question's context is cut into windows.
        kind: One of `KINDS`.
        stride: Tokens that neighbouring windows share; None refuses contexts that are too long.
    Raises:
        DataError: `max_length` leaves no room for text, or is more than the tokenizer's model takes.
    """
    data = QuestionData(stride=stride) if kind == "question-answering" else KINDS[kind]
    return data.encode(split, tokenizer, max_length)


def _find_report(data: TaskData, splits: Mapping[str, datasets.Dataset], columns: Columns) -> Rows | None:
    """The first split made for validation whose labels are real; test sets are often published without."""
    for name in REPORT_SPLITS:
        if name not in splits or (name == "test" and columns.label not in splits[name].column_names):
            continue
        require_columns(splits[name], name, (columns.label,))
        if not data.has_labels(splits[name], columns):
            logger.info("The %s split has no labels, so nothing is reported on it.", name)
            continue
        return data.check(splits[name], name, columns)
    return None


KINDS: Mapping[str, TaskData] = {
    "classification": ClassData(),
    "multi-label": LabelSetData(),
    "regression": ValueData(),
    "question-answering": QuestionData(),
    "token-classification": TagData(),
}
"""What a dataset may be about; `--task` names them too, but for multi-label, which is a classification."""
TASK_OF_KIND = {"multi-label": "classification"}


# Splitting ----------------------------------------------------------------------------------------------------------


def _carve(rows: Rows, size: int, purpose: str, seed: int) -> tuple[Rows, Rows]:
    """Split `rows` into the rest and `size` stratified rows; at least one row of each class stays in the rest.

    Where rows stand in groups, whole groups are drawn; what the last one has too many of goes nowhere.
    """
    if rows.group_N is not None:
        return _carve_groups(rows, rows.group_N, size, purpose, seed)
    counts = np.bincount(rows.stratum_N, minlength=len(rows.label_names))
    highest = np.maximum(counts - 1, 0)
    if size > highest.sum():
        raise DataError(
            f"The {purpose} split should have {size} rows, but only {highest.sum()} of {len(rows)} train rows "
            "can leave it with one of each label; give more data or a smaller search_size."
        )
    chosen = _draw(rows.stratum_N, _share_out(counts, size, np.zeros_like(counts), highest), purpose, seed)
    return rows.take(np.flatnonzero(~chosen)), rows.take(np.flatnonzero(chosen))


def _carve_groups(rows: Rows, group_N: NDArray[np.int64], size: int, purpose: str, seed: int) -> tuple[Rows, Rows]:
    place_of_group = _random_order(int(group_N.max()) + 1, purpose, seed)
    drawn = np.argsort(place_of_group[group_N], kind="stable")[:size]
    rest_N = ~np.isin(group_N, group_N[drawn])
    if len(drawn) < size or not rest_N.any():
        raise DataError(
            f"The {purpose} split should have {size} rows with contexts of their own, which {len(rows)} train rows "
            "cannot give; give more data or a smaller search_size."
        )
    return rows.take(np.flatnonzero(rest_N)), rows.take(np.sort(drawn))


def _limit(rows: Rows, limit: int | None, seed: int) -> Rows:
    """At most `limit` rows, stratified, at least one of each class."""
    if limit is None or limit >= len(rows):
        return rows
    counts = np.bincount(rows.stratum_N, minlength=len(rows.label_names))
    lowest = np.minimum(counts, 1)
    if limit < lowest.sum():
        raise DataError(f"train_limit={limit}, but train has {lowest.sum()} labels; choose at least one row for each.")
    return rows.take(np.flatnonzero(_draw(rows.stratum_N, _share_out(counts, limit, lowest, counts), "limit", seed)))


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
    """Mark `shares_C` random rows of each class, (N,)."""
    order = _random_order(len(labels_N), purpose, seed)
    order = order[np.argsort(labels_N[order], kind="stable")]  # shuffled within each class
    first_of_class = np.searchsorted(labels_N[order], np.arange(len(shares_C)))
    rank_in_class = np.arange(len(order)) - first_of_class[labels_N[order]]
    chosen = np.zeros(len(labels_N), dtype=np.bool_)
    chosen[order[rank_in_class < shares_C[labels_N[order]]]] = True
    return chosen


def _random_order(size: int, purpose: str, seed: int) -> NDArray[np.int64]:
    """The numbers below `size`, shuffled.

    NumPy promises never to change the stream of `RandomState`, unlike that of its newer generators.
    """
    salt = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    return np.random.RandomState([seed, salt]).permutation(size)


def _fingerprint(splits: Sequence[Rows]) -> str:
    digest = hashlib.sha256()

    def add(text: str) -> None:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)  # the length keeps neighbours apart

    for name in splits[0].label_names:
        add(name)
    for rows in splits:
        add(f"{len(rows)} rows")
        for name in rows.table.column_names:
            column = rows.table.column(name)
            if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
                digest.update(np.asarray(column, dtype="<i8" if pa.types.is_integer(column.type) else "<f4").tobytes())
                continue
            add(name)
            for value in column.to_pylist():
                add(value if isinstance(value, str) else json.dumps(value))
    return digest.hexdigest()


def _log_splits(train: Rows, search: Rows, report: Rows, columns: Columns) -> None:
    logger.info(
        "Text from %s, labels from %s; %d rows to train on, %d to search on, %d to report on.",
        " and ".join(columns.texts), columns.label, len(train), len(search), len(report),
    )  # fmt: skip
    in_train = set(_texts_of(train))
    for purpose, rows in (("search", search), ("report", report)):
        absent = sorted(set(train.stratum_N.tolist()) - set(rows.stratum_N.tolist()))
        if absent:
            names = ", ".join(repr(train.label_names[label]) for label in absent[:5])
            logger.warning("%d labels of train are not in the %s split: %s.", len(absent), purpose, names)
        repeats = sum(texts in in_train for texts in _texts_of(rows))
        if repeats:
            logger.info("%d texts of the %s split stand in train too.", repeats, purpose)


def _texts_of(rows: Rows) -> Iterator[tuple[str, ...]]:
    """What each row's prediction starts from."""
    columns = [rows.table.column(name).to_pylist() for name in rows.table.column_names if name not in LABELS]
    as_texts = [[" ".join(value) if isinstance(value, list) else value for value in column] for column in columns]
    return zip(*as_texts, strict=True)
