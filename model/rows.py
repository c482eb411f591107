"""Checked rows of a dataset, and what each task has to say about them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from model.encoded import EncodedSplit
from model.tasks import Metric

ROWS_AT_ONCE = 4_096
"""Rows that are tokenised together: what a tokenizer returns of a row takes far more memory than its ids."""
TEXT_FLAG, LABEL_FLAG, TASK_FLAG = "--text-columns a[,b]", "--label-column NAME", "--task NAME"


class DataError(ValueError):
    """A dataset that cannot be used as it is; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The dataset's names of what a task reads.

    Attributes:
        texts: One text, a pair, a question and its context, or a list of words.
        label: The class, the value, the answers or the tags.
    """

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One split of the dataset, checked: every row has what its task needs.

    Attributes:
        split: Its name in the dataset.
        table: The columns as a `Corpus` has them, in the dataset's order.
        label_names: Names of the classes or tags; empty where the task has none.
        stratum_N: Rows are carved out in proportion to these, 0..C-1; all 0 where rows are alike.
        group_N: Rows of one group are never parted by a split; None where each stands alone.
    """

    split: str
    table: pa.Table
    label_names: tuple[str, ...]
    stratum_N: NDArray[np.int64]
    group_N: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.stratum_N)

    def take(self, rows: NDArray[np.int64]) -> "Rows":
        """Those of these numbers."""
        group_N = None if self.group_N is None else self.group_N[rows]
        return Rows(
            split=self.split,
            table=self.table.take(rows),
            label_names=self.label_names,
            stratum_N=self.stratum_N[rows],
            group_N=group_N,
        )


class TaskData(ABC):
    """What a task needs of a dataset, how it turns into tokens, and what is measured.

    Attributes:
        metrics: What may be measured, the usual one first.
        shown: Names of those that are reported whichever of them is searched for.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    shown: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def find_columns(self, train: datasets.Dataset, texts: tuple[str, ...] | None, label: str | None) -> Columns:
        """The columns that a user named, or those that their features tell.

        Raises:
            DataError: A named column is not there, or it is not clear which are meant.
        """

    @abstractmethod
    def check(self, split: datasets.Dataset, name: str, columns: Columns) -> Rows:
        """Read the columns of one split.

        Raises:
            DataError: A row lacks its text or label, or has one that does not suit the task.
        """

    @abstractmethod
    def has_labels(self, split: datasets.Dataset, columns: Columns) -> bool:
        """Whether a split's labels are real; test sets are often published without."""

    @abstractmethod
    def check_train(self, train: Rows, columns: Columns) -> None:
        """Refuse train rows that nothing can be learned from, by a `DataError`."""

    @abstractmethod
    def count_as(self, train: Rows, other: Rows) -> Rows:
        """`other` with its labels counted as train counts them.

        Raises:
            DataError: It has a label that no train row has.
        """

    @abstractmethod
    def encode(self, split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
        """Turn a split of a `Corpus` into token ids, not padded, none longer than `max_length`.

        Raises:
            DataError: `max_length` leaves no room for text, or is more than the tokenizer's model takes.
        """


def require_columns(split: datasets.Dataset, name: str, columns: Sequence[str]) -> None:
    """Refuse a split that lacks one of these columns, by a `DataError` that lists those it has."""
    for column in columns:
        if column not in split.column_names:
            raise DataError(
                f"The {name} split has no column {column!r}, only {listed(split)}; name columns that it has with "
                f"{TEXT_FLAG} and {LABEL_FLAG}."
            )


def refuse_rows(bad_N: NDArray[np.bool_], problem: str, split: str) -> None:
    """Raise a `DataError` that names the first bad row and counts the others, if there is one."""
    if bad_N.any():
        others = int(bad_N.sum()) - 1
        raise DataError(
            f"Row {int(bad_N.argmax())} of the {split} split (the first is row 0) has {problem}"
            f"{f', and {others} more are like it' if others else ''}; complete or remove what lacks it."
        )


def is_text(feature: object) -> bool:
    """Whether a feature holds strings."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def listed(split: datasets.Dataset) -> str:
    """The columns of a split and what they hold, for a message."""
    kinds = {name: getattr(feature, "dtype", type(feature).__name__) for name, feature in split.features.items()}
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def column_of(split: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column as Arrow holds it."""
    return split.with_format("arrow").select_columns([name])[:].column(name)


def read_texts(
    split: datasets.Dataset, name: str, column_of_text: Mapping[str, str], flag: str
) -> dict[str, pa.ChunkedArray]:
    """Columns of texts, by what a `Corpus` calls them.

    Args:
        split: The dataset's split.
        name: What it is called there.
        column_of_text: The dataset's name of each column.
        flag: What names another column on the command line.
    Raises:
        DataError: A column holds something else, or a row has no text there.
    """
    texts = {}
    for target, column in column_of_text.items():
        if not is_text(split.features[column]):
            kind = getattr(split.features[column], "dtype", type(split.features[column]).__name__)
            raise DataError(f"Column {column!r} of the {name} split holds {kind}, not text; choose with {flag}.")
        texts[target] = column_of(split, column).cast(pa.string())
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts[target]), ""), True)
        refuse_rows(blank.to_numpy(), f"no text in column {column!r}", name)
    return texts


def check_max_length(max_length: int, tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> None:
    """Refuse a length without room for text, or that the tokenizer's model does not take, by a `DataError`."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if not special < max_length <= tokenizer.model_max_length:
        raise DataError(f"max_length={max_length}; choose {special + 1}..{tokenizer.model_max_length} tokens.")


def number_labels(
    values: pa.Array, order: Callable[[Any], Any] | None = None
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The names of labels, sorted or in another order, and each one's position among them, (M,), -1 where missing."""
    encoded = pc.dictionary_encode(values)
    codes = np.asarray(pc.fill_null(encoded.indices, -1), dtype=np.int64)
    found = [label_value(value) for value in encoded.dictionary.to_pylist()]
    names = tuple(sorted({value for value in found if value is not None}, key=order))
    rank = {value: position for position, value in enumerate(names)}
    position_of_code = np.array([*(rank.get(value, -1) for value in found), -1], dtype=np.int64)  # [-1] is missing
    return tuple(str(value) for value in names), position_of_code[codes]


def label_value(value: Any) -> Any:
    """A label as it is sorted and named: whole floats as integers, blank strings and NaN as missing."""
    if isinstance(value, float):
        return None if np.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, str):
        return value if value.strip() else None
    return value
