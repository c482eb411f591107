"""Tasks about whole texts and pairs of texts: one class each, any number of classes, or a value."""

import logging
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import BatchEncoding, PreTrainedTokenizerBase

from model.encoded import EncodedSplit, MultiLabelSplit, ValueSplit
from model.rows import (
    LABEL_FLAG,
    ROWS_AT_ONCE,
    TASK_FLAG,
    TEXT_FLAG,
    Columns,
    DataError,
    Rows,
    TaskData,
    check_max_length,
    column_of,
    is_text,
    label_value,
    listed,
    number_labels,
    read_texts,
    refuse_rows,
    require_columns,
)
from model.tasks import CLASS_METRICS, LABEL_SET_METRICS, VALUE_METRICS, Metric

logger = logging.getLogger(__name__)

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
LABEL_LIST_NAMES = (*LABEL_NAMES, "classes", "categories", "tags", "topics", "emotions")
VALUE_NAMES = ("label", "labels", "score", "similarity", "similarity_score", "value", "target", "rating", "relatedness")
ID_NAME = re.compile(r"(^|_)(id|idx|index|uid|uuid|guid|key)$|^unnamed|^__index_level")


class ClassData(TaskData):
    """Texts of one class each."""

    metrics: ClassVar[tuple[Metric, ...]] = CLASS_METRICS

    def find_columns(self, train: datasets.Dataset, texts: tuple[str, ...] | None, label: str | None) -> Columns:
        require_columns(train, "train", [*(texts or ()), *([label] if label else [])])
        label = label or self.find_label(train, texts or ())
        return Columns(texts=texts or _find_texts(train, label), label=label)

    def find_label(self, train: datasets.Dataset, text_columns: Sequence[str]) -> str:
        """The column of the label, told by its features and name."""
        return _find_class_label(train, text_columns)

    def check(self, split: datasets.Dataset, name: str, columns: Columns) -> Rows:
        require_columns(split, name, (*columns.texts, columns.label))
        texts = read_texts(split, name, dict(zip(("text", "text_pair"), columns.texts, strict=False)), TEXT_FLAG)
        return self.with_labels(split, name, columns.label, texts)

    def with_labels(
        self, split: datasets.Dataset, name: str, label_column: str, texts: dict[str, pa.ChunkedArray]
    ) -> Rows:
        """The rows of these texts with their labels, checked."""
        label_names, labels_N = _read_classes(split, name, label_column)
        refuse_rows(labels_N < 0, f"no label in column {label_column!r}", name)
        refuse_rows(labels_N >= len(label_names), _beyond(label_names, label_column), name)
        table = pa.table({**texts, "label": labels_N})
        return Rows(split=name, table=table, label_names=label_names, stratum_N=labels_N)

    def has_labels(self, split: datasets.Dataset, columns: Columns) -> bool:
        column = column_of(split, columns.label)
        if not isinstance(split.features[columns.label], datasets.Value | datasets.ClassLabel):
            return _holds_anything(column)
        return any(label_value(value) not in (None, -1, "-1") for value in pc.unique(column).to_pylist())

    def check_train(self, train: Rows, columns: Columns) -> None:
        num_rows, num_classes = len(train), len(np.unique(train.stratum_N))
        if num_classes < 2:
            raise DataError(
                f"Every train row has the label {train.label_names[train.stratum_N[0]]!r}; a classification needs two "
                f"or more: choose another column with {LABEL_FLAG}."
            )
        if num_classes > num_rows / 2:
            raise DataError(
                f"The label column {columns.label!r} has {num_classes} different values in {num_rows} train rows: this "
                f"is probably an id; choose the label with {LABEL_FLAG}."
            )

    def count_as(self, train: Rows, other: Rows) -> Rows:
        in_train = {train.label_names[label]: label for label in np.unique(train.stratum_N)}
        used = np.unique(other.stratum_N)
        position = np.full(len(other.label_names), -1, dtype=np.int64)
        position[used] = _positions(in_train, [other.label_names[label] for label in used], other.split)
        labels_N = position[other.stratum_N]
        table = other.table.set_column(other.table.column_names.index("label"), "label", pa.array(labels_N))
        return Rows(split=other.split, table=table, label_names=train.label_names, stratum_N=labels_N)

    def encode(self, split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
        labels = np.asarray(split["label"], dtype=np.int64)
        return EncodedSplit(labels=labels, **encode_texts(split, tokenizer, max_length))


class LabelSetData(ClassData):
    """Texts that any number of classes apply to, named in a list."""

    metrics: ClassVar[tuple[Metric, ...]] = LABEL_SET_METRICS
    shown: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1")

    def find_label(self, train: datasets.Dataset, text_columns: Sequence[str]) -> str:
        columns: list[str] = train.column_names
        lists = [name for name in columns if name not in text_columns and is_list(train.features[name])]
        usual = [name for name in lists if name.lower() in LABEL_LIST_NAMES]
        candidates = usual or lists
        if len(candidates) != 1:
            problem = f"{', '.join(candidates)} could each be" if candidates else "none is"
            raise DataError(f"Of the columns {listed(train)} {problem} the list of labels; name it with {LABEL_FLAG}.")
        return candidates[0]

    def with_labels(
        self, split: datasets.Dataset, name: str, label_column: str, texts: dict[str, pa.ChunkedArray]
    ) -> Rows:
        feature = split.features[label_column]
        if not is_list(feature):
            raise DataError(f"Column {label_column!r} of the {name} split holds no lists; choose with {LABEL_FLAG}.")
        lists = column_of(split, label_column).combine_chunks()
        refuse_rows(np.asarray(pc.is_null(lists)), f"no list in column {label_column!r}", name)
        row_M = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
        values = pc.list_flatten(lists)
        if isinstance(feature.feature, datasets.ClassLabel):
            names = tuple(feature.feature.names)
            label_M = np.asarray(pc.fill_null(values, -1), dtype=np.int64)
        elif problem := _no_classes(feature.feature, values):
            raise DataError(
                f"Column {label_column!r} of the {name} split holds lists of {problem}, which are no classes; choose "
                f"another with {LABEL_FLAG}."
            )
        elif _is_mask(lists):
            raise DataError(
                f"Column {label_column!r} of the {name} split holds a zero or a one for each class; list the names of "
                f"the classes that apply instead, or choose another column with {LABEL_FLAG}."
            )
        else:
            names, label_M = number_labels(values)
        if not names:
            raise DataError(
                f"No {name} row has a label in column {label_column!r}; choose another column with {LABEL_FLAG}."
            )
        for bad_M, problem in (
            (label_M < 0, f"an empty label in column {label_column!r}"),
            (label_M >= len(names), _beyond(names, label_column)),
        ):
            refuse_rows(np.isin(np.arange(len(lists)), row_M[bad_M]), problem, name)
        applies_NC = np.zeros((len(lists), len(names)), dtype=np.int64)
        applies_NC[row_M, label_M] = 1
        return _label_sets(name, pa.table(texts), names, applies_NC)

    def has_labels(self, split: datasets.Dataset, columns: Columns) -> bool:
        column = column_of(split, columns.label)
        if not is_list(split.features[columns.label]):
            return _holds_anything(column)
        return bool(pc.any(pc.greater(pc.list_value_length(column), 0)).as_py())

    def check_train(self, train: Rows, columns: Columns) -> None:
        num_classes = int(_applies(train).any(axis=0).sum())
        if not num_classes:
            raise DataError(
                f"No train row has a label in column {columns.label!r}; choose another column with {LABEL_FLAG}."
            )
        if num_classes > len(train) / 2:
            raise DataError(
                f"The label column {columns.label!r} has {num_classes} different labels in {len(train)} train rows: "
                f"these are probably keywords; choose the labels with {LABEL_FLAG}."
            )

    def count_as(self, train: Rows, other: Rows) -> Rows:
        trained_C, applies_NC = _applies(train).sum(axis=0), _applies(other)
        in_train = {name: place for place, name in enumerate(train.label_names) if trained_C[place]}
        used = np.flatnonzero(applies_NC.sum(axis=0))
        counted_NC = np.zeros((len(other), len(train.label_names)), dtype=np.int64)
        counted_NC[:, _positions(in_train, [other.label_names[label] for label in used], other.split)] = applies_NC[
            :, used
        ]
        return _label_sets(other.split, other.table.drop_columns(["label"]), train.label_names, counted_NC)

    def encode(self, split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
        labels = np.asarray(split["label"], dtype=np.float32)
        return MultiLabelSplit(labels=labels, **encode_texts(split, tokenizer, max_length))


class ValueData(ClassData):
    """Texts with a number each."""

    metrics: ClassVar[tuple[Metric, ...]] = VALUE_METRICS
    shown: ClassVar[tuple[str, ...]] = ("pearson", "spearman")

    def find_label(self, train: datasets.Dataset, text_columns: Sequence[str]) -> str:
        columns: list[str] = train.column_names
        numbers = [
            name
            for name in columns
            if name not in text_columns and isnumber_labels(train.features[name]) and not ID_NAME.search(name.lower())
        ]
        usual = sorted(
            (name for name in numbers if name.lower() in VALUE_NAMES), key=lambda name: VALUE_NAMES.index(name.lower())
        )
        candidates = usual[:1] or numbers
        if len(candidates) != 1:
            problem = f"{', '.join(candidates)} could each be" if candidates else "none is"
            raise DataError(f"Of the columns {listed(train)} {problem} the value; name it with {LABEL_FLAG}.")
        return candidates[0]

    def with_labels(
        self, split: datasets.Dataset, name: str, label_column: str, texts: dict[str, pa.ChunkedArray]
    ) -> Rows:
        if not isnumber_labels(split.features[label_column]):
            raise DataError(
                f"Column {label_column!r} of the {name} split holds no numbers, which a regression needs; choose with "
                f"{LABEL_FLAG}, or another task with {TASK_FLAG}."
            )
        values_N = np.asarray(pc.fill_null(column_of(split, label_column).cast(pa.float32(), safe=False), np.nan))
        refuse_rows(~np.isfinite(values_N), f"no number in column {label_column!r}", name)
        table = pa.table({**texts, "label": values_N})
        return Rows(split=name, table=table, label_names=(), stratum_N=np.zeros(len(values_N), dtype=np.int64))

    def has_labels(self, split: datasets.Dataset, columns: Columns) -> bool:
        column = column_of(split, columns.label)
        if not isnumber_labels(split.features[columns.label]):
            return _holds_anything(column)
        return any(label_value(value) not in (None, -1) for value in pc.unique(column).to_pylist())

    def check_train(self, train: Rows, columns: Columns) -> None:
        values_N = np.asarray(train.table.column("label"))
        if np.ptp(values_N) == 0:
            raise DataError(
                f"Every train row has the value {values_N[0]:g}; a regression needs different ones: choose another "
                f"column with {LABEL_FLAG}."
            )

    def count_as(self, train: Rows, other: Rows) -> Rows:
        return other

    def encode(self, split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
        labels = np.asarray(split["label"], dtype=np.float32)
        return ValueSplit(labels=labels, **encode_texts(split, tokenizer, max_length))


def encode_texts(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """The fields of an `EncodedSplit` but for its labels; of a pair the longer text is shortened first.

    Raises:
        DataError: `max_length` leaves no room for text, or is more than the tokenizer's model takes.
    """
    columns = split[:]
    texts, pairs = columns["text"], columns.get("text_pair")
    check_max_length(max_length, tokenizer, pair=pairs is not None)
    input_ids: list[list[int]] = []
    token_type_ids: list[list[int]] = []
    num_truncated = 0
    for first in range(0, len(texts), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        some = texts[rows], None if pairs is None else pairs[rows]
        encoding = tokenizer(*some, truncation=True, max_length=max_length, verbose=False)
        input_ids += encoding["input_ids"]
        token_type_ids += encoding.get("token_type_ids") or [[0] * len(ids) for ids in encoding["input_ids"]]
        num_truncated += _count_truncated(encoding, *some, tokenizer, max_length)
    if num_truncated:
        logger.info("%d of %d rows are truncated to %d tokens.", num_truncated, len(texts), max_length)
    return {"input_ids": input_ids, "token_type_ids": token_type_ids, "num_truncated": num_truncated}


def _is_mask(lists: pa.Array) -> bool:
    """Whether label lists are of one length, two or more, and of zeros and ones alone."""
    lengths, values = pc.unique(pc.list_value_length(lists)).to_pylist(), pc.unique(pc.list_flatten(lists)).to_pylist()
    return len(lengths) == 1 and lengths[0] > 1 and all(isinstance(value, int) and value in (0, 1) for value in values)


def is_list(feature: object) -> bool:
    """Whether a feature holds lists."""
    return isinstance(feature, datasets.List | datasets.LargeList)


def isnumber_labels(feature: object) -> bool:
    """Whether a feature holds integers or fractions."""
    return isinstance(feature, datasets.Value) and bool(re.match(r"u?int|float", feature.dtype))


def _find_class_label(train: datasets.Dataset, text_columns: Sequence[str]) -> str:
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
    numbers = [name for name in few if not is_text(features[name])]
    candidates = classes or numbers or few
    beside_text = bool(text_columns) or any(is_text(features[name]) and name not in few for name in features)
    if len(candidates) == 1 and (beside_text or candidates == numbers):
        return candidates[0]
    problem = f"{', '.join(candidates)} could each be the label" if len(candidates) > 1 else "none is clearly the label"
    raise DataError(f"Of the columns {listed(train)} {problem}; name it with {LABEL_FLAG}.")


def _find_texts(train: datasets.Dataset, label: str) -> tuple[str, ...]:
    """A known pair of string columns, else the only string column, else the only one of many values or usual name."""
    strings: dict[str, str] = {
        name.lower(): name
        for name, feature in train.features.items()
        if is_text(feature) and name != label and not ID_NAME.search(name.lower())
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
    raise DataError(f"Of the columns {listed(train)} {problem}; name one, or two for pairs, with {TEXT_FLAG}.")


def _has_few_values(split: datasets.Dataset, column: str, at_least: int = 0) -> bool:
    """Whether a column of integers, bools or strings has so few different values that they look like classes."""
    feature = split.features[column]
    if not isinstance(feature, datasets.Value) or not re.match(r"u?int|bool|(large_)?string", feature.dtype):
        return False
    distinct = int(pc.count_distinct(column_of(split, column)).as_py())
    return at_least <= distinct <= min(100, max(2, len(split) // 4))


def _read_classes(split: datasets.Dataset, name: str, label_column: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The label names of one split and each row's position among them, (N,), -1 where a label is missing."""
    feature, column = split.features[label_column], column_of(split, label_column)
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names), np.asarray(pc.fill_null(column, -1), dtype=np.int64)
    if not _may_name_classes(feature):
        raise DataError(
            f"The label column {label_column!r} holds {getattr(feature, 'dtype', type(feature).__name__)}; one class "
            f"per row is supported: choose another with {LABEL_FLAG}."
        )
    if fractions := _fractions(column):
        raise DataError(
            f"The label column {label_column!r} of the {name} split holds fractions such as {fractions[0]}, which are "
            f"no classes; choose --task regression, or a column of classes with {LABEL_FLAG}."
        )
    return number_labels(column.combine_chunks())


def _may_name_classes(feature: object) -> bool:
    """Whether a feature holds words, integers, bools or floats, all of which may turn out to be missing."""
    return isinstance(feature, datasets.Value) and bool(
        re.match(r"u?int|bool|float|(large_)?string|null", feature.dtype)
    )


def _fractions(values: pa.Array | pa.ChunkedArray) -> list[float]:
    """The different values that are no whole numbers."""
    return [value for value in pc.unique(values).to_pylist() if isinstance(label_value(value), float)]


def _no_classes(feature: object, values: pa.Array) -> str | None:
    """What label lists are of, by their elements' feature and values, where that cannot be classes; else None."""
    if not _may_name_classes(feature):
        return str(getattr(feature, "dtype", type(feature).__name__))
    fractions = _fractions(values)
    return f"fractions such as {fractions[0]}" if fractions else None


def _holds_anything(column: pa.ChunkedArray) -> bool:
    """Whether any row has something, be it of a type that `check` refuses."""
    return bool(column.null_count < len(column))


def _beyond(label_names: Sequence[str], column: str) -> str:
    """What is wrong with a row whose class has no name, as a damaged file may have."""
    return f"a class number beyond the {len(label_names)} names of column {column!r}"


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


def _positions(in_train: dict[str, int], names: Sequence[str], split: str) -> list[int]:
    """Where train counts labels of these names.

    Raises:
        DataError: No train row has one of them.
    """
    if unknown := [name for name in names if name not in in_train]:
        raise DataError(
            f"Label {unknown[0]!r} stands in the {split} split but not in train, whose labels are "
            f"{', '.join(map(repr, list(in_train)[:10]))}; make the two agree."
        )
    return [in_train[name] for name in names]


def _label_sets(split: str, texts: pa.Table, names: tuple[str, ...], applies_NC: NDArray[np.int64]) -> Rows:
    """Rows whose label says of each class whether it applies."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(applies_NC.ravel()), max(1, applies_NC.shape[1]))
    table = texts.append_column("label", lists.cast(pa.list_(pa.int64())))
    return Rows(split=split, table=table, label_names=names, stratum_N=np.zeros(len(applies_NC), dtype=np.int64))


def _applies(rows: Rows) -> NDArray[np.int64]:
    """Which classes apply to each row, (N, C) of zeros and ones."""
    flat = np.asarray(pc.list_flatten(rows.table.column("label").combine_chunks()), dtype=np.int64)
    return flat.reshape(len(rows), -1)
