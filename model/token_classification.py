"""Entity recognition: texts in words, one BIO tag for each, scored by whole entities through seqeval."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from model.encoded import IGNORED, Answers, EncodedSplit, Ints
from model.rows import (
    LABEL_FLAG,
    ROWS_AT_ONCE,
    TEXT_FLAG,
    Columns,
    DataError,
    Rows,
    TaskData,
    check_max_length,
    column_of,
    is_text,
    listed,
    number_labels,
    refuse_rows,
    require_columns,
)
from model.tasks import Metric

logger = logging.getLogger(__name__)

WORD_NAMES = ("tokens", "words")
TAG_NAMES = ("ner_tags", "tags", "labels", "ner", "tag", "ner_tag", "ner_labels", "label", "bio_tags", "token_labels")
OUTSIDE = "O"
"""The tag of words that belong to no entity."""
LOST = -1
"""The first token of words that have none."""

TagNames = list[list[str]]
"""One tag for each word of each sequence."""


# Metrics ------------------------------------------------------------------------------------------------------------


def f1(predictions: TagNames, references: TagNames) -> float:
    """Harmonic mean of precision and recall over all entities, in [0, 1]; 0 where neither side has one.

    An entity is right where its type, its first and its last word are. An I-x that follows no B-x or I-x begins an
    entity.

    Source: Tjong Kim Sang & De Meulder 2003 (CoNLL-2003), "Evaluation".
    """
    return _entity_score("f1_score", predictions, references)


def precision(predictions: TagNames, references: TagNames) -> float:
    """Share of predicted entities that are right, in [0, 1]; 0 where none is predicted."""
    return _entity_score("precision_score", predictions, references)


def recall(predictions: TagNames, references: TagNames) -> float:
    """Share of true entities that are predicted, in [0, 1]; 0 where there is none."""
    return _entity_score("recall_score", predictions, references)


def accuracy(predictions: TagNames, references: TagNames) -> float:
    """Share of words whose tag is right, in [0, 1]."""
    _check_aligned(predictions, references)
    return float(_seqeval().accuracy_score(references, predictions))


def _entity_score(name: str, predictions: TagNames, references: TagNames) -> float:
    _check_aligned(predictions, references)
    score = getattr(_seqeval(), name)
    return float(score(references, predictions, average="micro", zero_division=0))  # 0 keeps it from warning


def _seqeval() -> Any:
    """Its metrics, loaded where one is computed: it brings scikit-learn."""
    import seqeval.metrics

    return seqeval.metrics


def _check_aligned(predictions: TagNames, references: TagNames) -> None:
    predicted, expected = [len(tags) for tags in predictions], [len(tags) for tags in references]
    if predicted != expected or not sum(expected):
        raise ValueError(f"Got {sum(predicted)} tags for {sum(expected)} words; give one for each word of each row.")


METRICS = (
    Metric(name="f1", compute=f1),
    Metric(name="precision", compute=precision),
    Metric(name="recall", compute=recall),
    Metric(name="accuracy", compute=accuracy),
)
"""The first is the usual one."""


class TagData(TaskData):
    """Lists of words with one BIO tag each."""

    metrics: ClassVar[tuple[Metric, ...]] = METRICS

    def find_columns(self, train: datasets.Dataset, texts: tuple[str, ...] | None, label: str | None) -> Columns:
        require_columns(train, "train", [*(texts or ()), *([label] if label else [])])
        if texts and len(texts) > 1:
            raise DataError(
                f"{', '.join(texts)} are two columns; token classification reads one of words: {TEXT_FLAG}."
            )
        strings = [name for name, feature in train.features.items() if is_text(_element(feature))]
        words = texts[0] if texts else _first_usual(strings, WORD_NAMES, but=label)
        label = label or _find_tags(train, words)
        if words is None:
            others = [name for name in strings if name != label]
            if len(others) != 1:
                problem = f"{', '.join(others)} could each be" if others else "none is"
                raise DataError(
                    f"Of the columns {listed(train)} {problem} the list of words; name it with {TEXT_FLAG}."
                )
            words = others[0]
        return Columns(texts=(words,), label=label)

    def check(self, split: datasets.Dataset, name: str, columns: Columns) -> Rows:
        """Read the words and tags of one split.

        An I-x that no B-x stands before is let through: seqeval begins an entity there.

        Returns:
            Rows of `tokens`, list<string>, and `tags`, list<int64> of positions in `label_names`; the names stand in
            the table's features too.
        Raises:
            DataError: A row lacks a word or a tag, or a tag is not BIO.
        """
        (words_column,) = columns.texts
        require_columns(split, name, (words_column, columns.label))
        if not is_text(_element(split.features[words_column])):
            raise DataError(
                f"Column {words_column!r} of the {name} split holds {_kind(split, words_column)}, not lists of words; "
                f"choose with {TEXT_FLAG}."
            )
        words = column_of(split, words_column).cast(pa.list_(pa.string())).combine_chunks()
        refuse_rows(_sizes(words) == 0, f"no words in column {words_column!r}", name)
        blank_M = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(pc.list_flatten(words)), ""), True)
        refuse_rows(_rows_of(words, np.asarray(blank_M)), f"a blank word in column {words_column!r}", name)

        label_names, tags = _read_tags(split, name, columns.label)
        refuse_rows(np.asarray(pc.is_null(tags)), f"no tags in column {columns.label!r}", name)
        _refuse_uneven(_sizes(words), _sizes(tags), columns, name)
        values_M = _values(tags)
        refuse_rows(_rows_of(tags, values_M < 0), f"a word without a tag in column {columns.label!r}", name)
        problem = f"a tag number beyond the {len(label_names)} names of column {columns.label!r}"
        refuse_rows(_rows_of(tags, values_M >= len(label_names)), problem, name)
        return _tagged(name, words, tags, label_names)

    def has_labels(self, split: datasets.Dataset, columns: Columns) -> bool:
        """Whether any word is tagged as part of an entity; hidden tags are published as nothing, -1 or all O."""
        element = _element(split.features[columns.label])
        if element is None:
            return False
        values = pc.unique(_flatten(column_of(split, columns.label))).to_pylist()
        if isinstance(element, datasets.ClassLabel):
            values = [_name_of(element, value) for value in values if value is not None and value >= 0]
        return any(value not in (None, "", OUTSIDE, -1) for value in values)

    def check_train(self, train: Rows, columns: Columns) -> None:
        used = np.unique(_values(train.table.column("tags")))
        if all(train.label_names[tag] == OUTSIDE for tag in used):
            raise DataError(
                f"Every tag of column {columns.label!r} in train is {OUTSIDE!r}, so there is no entity to learn from; "
                f"choose another column with {LABEL_FLAG}."
            )

    def count_as(self, train: Rows, other: Rows) -> Rows:
        """`other` with its tags numbered as train numbers them.

        Raises:
            DataError: It has a tag that is none of train's names.
        """
        in_train = {name: position for position, name in enumerate(train.label_names)}
        tags = other.table.column("tags").combine_chunks()
        values_M = _values(tags)
        position_C = np.full(len(other.label_names), -1, dtype=np.int64)
        for tag in np.unique(values_M):
            name = other.label_names[tag]
            if name not in in_train:
                raise DataError(
                    f"Tag {name!r} stands in the {other.split} split but not in train, whose tags are "
                    f"{', '.join(map(repr, train.label_names[:10]))}; make the two agree."
                )
            position_C[tag] = in_train[name]
        counted = _as_lists(_sizes(tags), position_C[values_M])
        return _tagged(other.split, other.table.column("tokens").combine_chunks(), counted, train.label_names)

    def encode(self, split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> "TagSplit":
        """Turn words into tokens; each word's tag stands at its first token.

        Args:
            split: Columns `tokens` and `tags` with their features, as `check` makes them.
            tokenizer: The model's own.
            max_length: Most tokens of a row, special tokens included; words beyond are lost.
        Raises:
            DataError: `max_length` leaves no room for text, or the tokenizer cannot tell words apart.
        """
        check_max_length(max_length, tokenizer, pair=False)
        tags = column_of(split, "tags").combine_chunks()
        word_tags = _cut(_values(tags), _sizes(tags))
        input_ids: list[list[int]] = []
        token_type_ids: list[list[int]] = []
        labels: list[list[int]] = []
        first_tokens: list[list[int]] = []
        num_truncated = num_lost = 0
        for start in range(0, len(split), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            encoding = tokenize_words(tokenizer, split[rows]["tokens"], max_length)
            input_ids += encoding["input_ids"]
            token_type_ids += encoding.get("token_type_ids") or [[0] * len(ids) for ids in encoding["input_ids"]]
            first, labelled = _align(encoding, word_tags[rows])
            first_tokens += first
            labels += labelled
            cut = [bool(row.overflowing) for row in encoding.encodings or ()]
            num_truncated += sum(cut)
            num_lost += sum(places.count(LOST) for places, is_cut in zip(first, cut, strict=True) if is_cut)
        if num_truncated:
            logger.info(
                "%d of %d rows are truncated to %d tokens; %d of their words are lost and count as predicted %r.",
                num_truncated, len(split), max_length, num_lost, OUTSIDE,
            )  # fmt: skip
        return TagSplit(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            labels=labels,
            num_truncated=num_truncated,
            first_tokens=first_tokens,
            word_tags=word_tags,
            tag_names=tuple(split.features["tags"].feature.names),
        )


@dataclass(frozen=True, kw_only=True)
class TagSplit(EncodedSplit):
    """Sequences of tagged words; `labels` is one list per sequence, with a tag or `IGNORED` for each token.

    Attributes:
        first_tokens: Of each sequence's words, the position of its first token; `LOST` where no token is left of it.
        word_tags: Of each sequence's words, its tag.
        tag_names: Names of the tags.
    """

    first_tokens: list[list[int]]
    word_tags: list[list[int]]
    tag_names: tuple[str, ...]

    def answer_size(self, num_tokens: int) -> int:
        """One tag for each token."""
        return num_tokens

    def answer(self, logits: Tensor, sequences: Ints) -> Answers:
        """The likeliest tag of each token, (B, L).

        Args:
            logits: (B, L, C); no padding.
            sequences: The number of each, (B,).
        """
        return logits.argmax(dim=-1).cpu().numpy()

    def predictions(self, answers: Answers, sequences: Ints) -> TagNames:
        """The tag names of each word: that of its first token, "O" where it has none.

        Args:
            answers: One tag for each token of the sequences, one after the other.
            sequences: Their numbers, ascending or not.
        """
        num_tokens = self.num_tokens[sequences]
        words_M = self._words_of(sequences)
        starts_M = np.repeat(np.cumsum(num_tokens) - num_tokens, self._num_words[sequences])
        first_M = self._flat_first_tokens[words_M]
        tags_M = np.where(
            first_M == LOST, len(self.tag_names), np.reshape(answers, -1)[starts_M + np.maximum(first_M, 0)]
        )
        return self._named(tags_M, sequences)

    def references(self, sequences: Ints) -> TagNames:
        """The true tag names of each word."""
        return self._named(self._flat_word_tags[self._words_of(sequences)], sequences)

    def _named(self, tags_M: Ints, sequences: Ints) -> TagNames:
        names = np.array([*self.tag_names, OUTSIDE], dtype=object)  # the last is that of lost words
        return _cut(names[tags_M], self._num_words[sequences])

    def _words_of(self, sequences: Ints) -> Ints:
        """The numbers of these sequences' words among all, (M,)."""
        sizes, starts = self._num_words[sequences], (np.cumsum(self._num_words) - self._num_words)[sequences]
        before = np.cumsum(sizes) - sizes
        numbers: Ints = np.arange(sizes.sum()) + np.repeat(starts - before, sizes)
        return numbers

    @cached_property
    def _num_words(self) -> Ints:
        return np.fromiter((len(tags) for tags in self.word_tags), dtype=np.int64, count=len(self))

    @cached_property
    def _flat_first_tokens(self) -> Ints:
        return _joined(self.first_tokens)

    @cached_property
    def _flat_word_tags(self) -> Ints:
        return _joined(self.word_tags)


# Tokens -------------------------------------------------------------------------------------------------------------


def tokenize_words(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[Sequence[str]], max_length: int | None = None
) -> BatchEncoding:
    """Token ids of texts in words, with `word_ids` for each; not padded.

    A tokenizer that hears the space before a word, such as RoBERTa's byte-level one, gets to hear it before each: as
    it comes, transformers would let it read one long word, without a warning, and where its class is the generic one
    (ModernBERT), asking for `add_prefix_space` has no effect either.

    Args:
        tokenizer: One that is backed by the tokenizers library.
        words: At least one text, of at least one word each.
        max_length: Most tokens of a text, special tokens included; None leaves texts whole.
    Raises:
        DataError: The tokenizer does not say which word a token is from.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not say which word a token is from; choose a model whose folder has a "
            "tokenizer.json."
        )
    texts = [list(text) for text in words]
    if _hears_spaces(tokenizer):
        texts = [[word if word.startswith(" ") else f" {word}" for word in text] for text in texts]
    encoding: BatchEncoding = tokenizer(
        texts, is_split_into_words=True, truncation=max_length is not None, max_length=max_length, verbose=False
    )
    return encoding


def _hears_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word's tokens depend on the space before it, and the tokenizer does not put one there itself."""
    return bool(tokenizer.tokenize("a") != tokenizer.tokenize(" a"))


def _align(encoding: BatchEncoding, word_tags: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Of each row, the first token of each word, and the tag or `IGNORED` of each token."""
    rows = [row.word_ids for row in encoding.encodings or ()]
    num_tokens = np.array([len(row) for row in rows])
    num_words = np.array([len(tags) for tags in word_tags])
    word_T = np.array([word for row in rows for word in row], dtype=np.float64)  # NaN at special tokens
    is_real_T = ~np.isnan(word_T)
    row_T = np.repeat(np.arange(len(rows)), num_tokens)
    position_T = np.arange(len(word_T)) - np.repeat(np.cumsum(num_tokens) - num_tokens, num_tokens)
    flat_T = np.where(is_real_T, word_T, LOST).astype(np.int64) + (np.cumsum(num_words) - num_words)[row_T]
    is_first_T = is_real_T & (np.diff(flat_T, prepend=-2) != 0)  # no word has the number -2

    first_M = np.full(num_words.sum(), LOST, dtype=np.int64)
    first_M[flat_T[is_first_T]] = position_T[is_first_T]
    label_T = np.full(len(word_T), IGNORED, dtype=np.int64)
    label_T[is_first_T] = _joined(word_tags)[flat_T[is_first_T]]
    return _cut(first_M, num_words), _cut(label_T, num_tokens)


# Reading ------------------------------------------------------------------------------------------------------------


def _find_tags(train: datasets.Dataset, words: str | None) -> str:
    """A list of named classes, or of strings, with a usual name; else the only list of classes, strings or numbers."""
    elements = {name: _element(feature) for name, feature in train.features.items() if name != words}
    classes = [name for name, element in elements.items() if isinstance(element, datasets.ClassLabel)]
    strings = [name for name, element in elements.items() if is_text(element)]
    numbers = [name for name, element in elements.items() if name not in strings and _is_integer(element)]
    for group in (classes, strings):
        if usual := _first_usual(group, TAG_NAMES):
            return usual
    candidates = classes or (strings if words else []) or numbers
    usual = _first_usual(candidates, TAG_NAMES)
    if usual is None and len(candidates) != 1:
        problem = f"{', '.join(candidates)} could each be" if candidates else "none is clearly"
        raise DataError(f"Of the columns {listed(train)} {problem} the list of tags; name it with {LABEL_FLAG}.")
    return usual or candidates[0]


def _read_tags(split: datasets.Dataset, name: str, column: str) -> tuple[tuple[str, ...], pa.ListArray]:
    """The tag names of one split, and lists of positions among them; a missing tag is below 0, or null.

    Raises:
        DataError: The column does not hold lists of named tags, or one is not BIO.
    """
    element, lists = _element(split.features[column]), column_of(split, column)
    if isinstance(element, datasets.ClassLabel):
        names, tags = tuple(element.names), lists.cast(pa.list_(pa.int64())).combine_chunks()
    elif is_text(element):
        strings = lists.cast(pa.list_(pa.string())).combine_chunks()
        names, codes_M = number_labels(pc.list_flatten(strings), order=lambda tag: (tag != OUTSIDE, tag))
        tags = _as_lists(_sizes(strings), codes_M, missing=np.asarray(pc.is_null(strings)))
    elif _is_integer(element):
        raise DataError(
            f"Column {column!r} of the {name} split holds tag numbers without their names; give the tags as strings, "
            "or the column's features as a list of ClassLabel with names."
        )
    else:
        raise DataError(
            f"Column {column!r} of the {name} split holds {_kind(split, column)}, not lists of tags; choose with "
            f"{LABEL_FLAG}."
        )
    for tag in names:
        if tag != OUTSIDE and not (tag[:2] in ("B-", "I-") and tag[2:]):
            raise DataError(
                f"Column {column!r} of the {name} split has the tag {tag!r}, which is not O, B-x or I-x; convert the "
                f"tags to BIO, for example from BIOES or BILOU, or choose another column with {LABEL_FLAG}."
            )
    return names, tags


def _refuse_uneven(words_N: Ints, tags_N: Ints, columns: Columns, split: str) -> None:
    """Refuse rows that have not as many tags as words, by a `DataError` with both counts of the first."""
    uneven_N = words_N != tags_N
    row = int(uneven_N.argmax()) if len(uneven_N) else 0
    if uneven_N.any():
        problem = (
            f"{words_N[row]} words in column {columns.texts[0]!r} but {tags_N[row]} tags in column {columns.label!r}"
        )
        refuse_rows(uneven_N, problem, split)


def _tagged(split: str, words: pa.ListArray, tags: pa.ListArray, label_names: tuple[str, ...]) -> Rows:
    """Rows of words and tags, whose features name the tags."""
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")), tags=datasets.List(datasets.ClassLabel(names=list(label_names)))
    )
    table = pa.table({"tokens": words, "tags": tags}, schema=features.arrow_schema)
    return Rows(split=split, table=table, label_names=label_names, stratum_N=np.zeros(len(table), dtype=np.int64))


def _first_usual(names: Sequence[str], usual: Sequence[str], but: str | None = None) -> str | None:
    """The column whose name is the most usual one."""
    found = [name for name in names if name.lower() in usual and name != but]
    return min(found, key=lambda name: usual.index(name.lower()), default=None)


def _element(feature: object) -> Any:
    """What a feature of lists has in them; None of any other feature."""
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else None


def _is_integer(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.lstrip("u").startswith("int")


def _kind(split: datasets.Dataset, column: str) -> str:
    """What a column holds, for a message."""
    feature = split.features[column]
    element = _element(feature)
    name = getattr(element or feature, "dtype", type(element or feature).__name__)
    return f"lists of {name}" if element is not None else str(name)


def _name_of(tags: datasets.ClassLabel, value: int) -> str:
    return str(tags.names[value]) if value < len(tags.names) else str(value)


# Lists as flat arrays -----------------------------------------------------------------------------------------------


def _flatten(lists: pa.ChunkedArray | pa.ListArray) -> pa.Array:
    """The elements of all lists."""
    flat = pc.list_flatten(lists)
    return flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat


def _values(tags: pa.ChunkedArray | pa.ListArray) -> Ints:
    """The elements of lists of integers, (M,), -1 where one is missing."""
    return np.asarray(pc.fill_null(_flatten(tags), -1), dtype=np.int64)


def _sizes(lists: pa.ListArray) -> Ints:
    """How many elements each list has, (N,); 0 of a missing list."""
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0), dtype=np.int64)


def _rows_of(lists: pa.ListArray, is_bad_M: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which lists have a marked element, (N,)."""
    is_bad_N = np.zeros(len(lists), dtype=np.bool_)
    is_bad_N[np.repeat(np.arange(len(lists)), _sizes(lists))[is_bad_M]] = True
    return is_bad_N


def _as_lists(sizes_N: Ints, values_M: Ints, missing: NDArray[np.bool_] | None = None) -> pa.ListArray:
    """Lists of these sizes, of the values in order; the marked ones are null."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes_N)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values_M), mask=None if missing is None else pa.array(missing))


def _cut(values_M: NDArray[Any], sizes_N: Ints) -> list[list[Any]]:
    """The values as lists of these sizes."""
    values, ends = values_M.tolist(), np.cumsum(sizes_N)
    return [values[start:end] for start, end in zip((ends - sizes_N).tolist(), ends.tolist(), strict=True)]


def _joined(lists: list[list[int]]) -> Ints:
    return np.array([value for values in lists for value in values], dtype=np.int64)
