"""Extractive question answering as in SQuAD 1.1: every question is answered by a span of its context.

A context may be longer than the model reads. Its question is then asked of several windows, which are the sequences
that a model sees; the question gets the best answer of all its windows.

Shape letters: N windows, Q questions, B windows of a batch, L tokens, E ends that a start may have.
Source: Rajpurkar et al. 2016 (SQuAD); windows and spans as in Devlin et al. 2019 (BERT), "SQuAD v1.1", and their code.
"""

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.encoded import Answers, EncodedSplit, Ints
from model.rows import (
    ROWS_AT_ONCE,
    Columns,
    DataError,
    Rows,
    TaskData,
    check_max_length,
    column_of,
    listed,
    read_texts,
    refuse_rows,
    require_columns,
)
from model.tasks import Metric

logger = logging.getLogger(__name__)

DEFAULT_STRIDE = 128
MAX_ANSWER_TOKENS = 30  # as in BERT's own SQuAD code
TEXTS_FLAG, ANSWERS_FLAG = "--text-columns QUESTION,CONTEXT", "--label-column ANSWERS"
ANSWERS_TYPE = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int64()))])

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# Metrics ------------------------------------------------------------------------------------------------------------


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over questions of the best word F1 with one of its gold answers, in [0, 1].

    Texts are compared as `normalized`. A text of which nothing is left has an F1 of 0, even with itself.

    Source: the official evaluation of SQuAD 1.1; that of 2.0 differs in the last point.
    """
    return _mean_of_best(_word_f1, predictions, references)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of questions whose prediction equals one of the gold answers, `normalized`; in [0, 1].

    Source: the official evaluation of SQuAD 1.1.
    """
    return _mean_of_best(lambda prediction, gold: float(prediction == gold), predictions, references)


def normalized(text: str) -> str:
    """A text in lower case, without ASCII punctuation, articles and needless blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _word_f1(prediction: str, gold: str) -> float:
    predicted, true = prediction.split(), gold.split()
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true)) if common else 0.0


def _mean_of_best(
    score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    if len(predictions) != len(references) or not len(predictions) or not all(map(len, references)):
        raise ValueError(
            f"Got {len(predictions)} predictions for {len(references)} questions; give one prediction and at least one "
            "gold answer for each."
        )
    best = (
        max(score(prediction, normalized(gold)) for gold in golds)
        for prediction, golds in zip(map(normalized, predictions), references, strict=True)
    )
    return sum(best) / len(predictions)


_FUNCTIONS: tuple[Callable[..., float], ...] = (f1, exact_match)
METRICS = tuple(Metric(name=function.__name__, direction="maximize", compute=function) for function in _FUNCTIONS)


# Windows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One possible answer to a question.

    Attributes:
        text: What stands in the context at `start:end`, in characters.
        start: Its first character.
        end: The character after its last.
        probability: Softmax of its score over the question's candidates, in [0, 1].
    """

    text: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class WindowSplit(EncodedSplit):
    """Sequences of a question and a part of its context; an answer to one is the best span of that part.

    Attributes:
        labels: First and last token of the first gold answer, int64 (N, 2); 0, 0 where a window does not hold it whole.
        question_N: The number of each window's question, 0..Q-1.
        context_N2: Each window's first token of the context and the one after its last.
        offsets: First character of each of these tokens in the context and the one after its last, N arrays
            int32 (tokens, 2).
        contexts: The context of every question, Q texts.
        gold: The gold answers of every question, Q tuples of texts.
    """

    question_N: Ints
    context_N2: Ints
    offsets: list[NDArray[np.int32]]
    contexts: tuple[str, ...]
    gold: tuple[tuple[str, ...], ...]

    answer_type: ClassVar[type[np.generic]] = np.float32

    def answer_size(self, num_tokens: int) -> int:
        """Three numbers: first token, last token, score."""
        return 3

    def answer(self, logits: Tensor, sequences: Ints) -> Answers:
        """The best span of each window's context, (B, 3): first token, last token and score.

        The score is the first token's start logit and the last token's end logit, added. A span has at most
        `MAX_ANSWER_TOKENS` tokens; of equal ones the earliest counts, then the shortest.

        Args:
            logits: Start and end logits, (B, L, 2); no padding.
            sequences: The number of each window, (B,).
        """
        context_B2 = self.context_N2[sequences]
        start_BL, ends_BLE = _starts_and_ends(logits, context_B2)
        best_end_BL, width_BL = ends_BLE.max(dim=2)
        score_B, first_B = (start_BL + best_end_BL).max(dim=1)
        last_B = first_B + width_BL.take_along_dim(first_B[:, None], dim=1)[:, 0]
        spans = np.stack([first_B.cpu().numpy(), last_B.cpu().numpy()], axis=1)
        spans = np.maximum(spans, context_B2[:, :1])  # where each logit is -inf, the maximum is token 0
        answers_B3: Answers = np.column_stack([spans, score_B.cpu().numpy()]).astype(np.float32)
        return answers_B3

    def predictions(self, answers: Answers, sequences: Ints) -> list[str]:
        """One text per question that has a window among the sequences, by ascending number of the question.

        Args:
            answers: Those of `answer`, (B, 3) or flat.
            sequences: The number of each window, in any order.
        """
        windows, spans = np.asarray(sequences, dtype=np.int64), answers.reshape(-1, 3)
        question = self.question_N[windows]
        order = np.lexsort((windows, -spans[:, 2], question))  # by question, its best window first
        best = order[np.unique(question[order], return_index=True)[1]]
        texts = []
        for window, first, last in zip(windows[best], *spans[best, :2].T.astype(np.int64), strict=True):
            start, end = self._characters(window, first, last)
            texts.append(self.contexts[self.question_N[window]][start:end])
        return texts

    def references(self, sequences: Ints) -> list[list[str]]:
        """The gold answers of each question that `predictions` answers."""
        return [list(self.gold[question]) for question in np.unique(self.question_N[sequences])]

    def n_best(self, logits: Sequence[Tensor], sequences: Ints, count: int = 20) -> list[list[Candidate]]:
        """The best distinct answers of each question that has a window among the sequences, best first.

        Questions come by ascending number, as in `predictions`. A text that could be read in several places counts
        once, where its score is highest; spans of blanks alone, which some tokenizers have tokens for, are left out.
        There are fewer than `count` where the windows have fewer texts, and none where no logit of them is finite.

        Args:
            logits: Start and end logits of each window, (L, 2) each; no padding.
            sequences: The number of each window, in any order.
            count: Most answers of a question, 1 or more.
        Raises:
            ValueError: `count` is less than 1, or there is not one tensor for each window.
        """
        if count < 1:
            raise ValueError(f"count={count}; choose 1 or more.")
        windows = np.asarray(sequences, dtype=np.int64)
        if len(logits) != len(windows):
            raise ValueError(f"Got logits of {len(logits)} windows for {len(windows)} sequences; give one of each.")
        order = np.lexsort((windows, self.question_N[windows]))
        _, first_of_question = np.unique(self.question_N[windows][order], return_index=True)
        return [
            self._candidates([logits[row] for row in rows], windows[rows], count)
            for rows in np.split(order, first_of_question[1:])
            if len(rows)
        ]

    def take(self, sequences: Sequence[int] | Ints) -> Self:
        """The split of these windows; questions keep their numbers."""
        numbers = np.asarray(sequences, dtype=np.int64)
        taken = super().take(numbers)
        return replace(taken, question_N=self.question_N[numbers], context_N2=self.context_N2[numbers])

    def _candidates(self, logits: Sequence[Tensor], windows: Ints, count: int) -> list[Candidate]:
        """The best answers of one question, which all these windows belong to."""
        context = self.contexts[self.question_N[windows[0]]]
        scores, spans = [], []
        for window, logits_L2 in zip(windows, logits, strict=True):
            start_1L, ends_1LE = _starts_and_ends(logits_L2[None], self.context_N2[[window]])
            score_LE = (start_1L[:, :, None] + ends_1LE)[0].cpu().numpy()
            first, width = np.nonzero(np.isfinite(score_LE))
            scores.append(score_LE[first, width])
            spans.append(np.column_stack([np.full_like(first, window), first, first + width]))
        score, span = np.concatenate(scores), np.concatenate(spans)
        best: dict[str, tuple[int, int, float]] = {}
        for row in np.argsort(-score, kind="stable"):
            start, end = self._characters(*span[row])
            if start < end:
                best.setdefault(context[start:end], (start, end, float(score[row])))
            if len(best) == count:
                break
        weights = np.exp([value - max(score, default=0.0) for _, _, value in best.values()])
        return [
            Candidate(text=text, start=start, end=end, probability=float(weight / weights.sum()))
            for (text, (start, end, _)), weight in zip(best.items(), weights, strict=True)
        ]

    def _characters(self, window: int, first: int, last: int) -> tuple[int, int]:
        """Where the text from one token to another stands in the context, blanks around it left out."""
        offsets, begin = self.offsets[window], self.context_N2[window, 0]
        if not len(offsets):  # a context of characters that the tokenizer drops
            return 0, 0
        start, end = int(offsets[first - begin, 0]), int(offsets[last - begin, 1])
        text = self.contexts[self.question_N[window]][start:end]
        start += len(text) - len(text.lstrip())  # the tokens of some tokenizers begin with the blank before the word
        return start, start + len(text.strip())


def _starts_and_ends(logits_BL2: Tensor, context_B2: Ints) -> tuple[Tensor, Tensor]:
    """Start logits (B, L), and of each start the end logits of itself and the tokens after it, (B, L, E).

    Both are float32, and -inf at what is not in the window's context. The second is a view, E times smaller in memory.
    """
    token_L = torch.arange(logits_BL2.size(1), device=logits_BL2.device)
    bounds_B2 = torch.from_numpy(context_B2).to(logits_BL2.device)
    outside_BL = (token_L < bounds_B2[:, :1]) | (token_L >= bounds_B2[:, 1:])
    start_BL, end_BL = logits_BL2.detach().float().masked_fill(outside_BL[:, :, None], -torch.inf).unbind(dim=2)
    ends_BLE = F.pad(end_BL, (0, MAX_ANSWER_TOKENS - 1), value=-torch.inf).unfold(1, MAX_ANSWER_TOKENS, 1)
    return start_BL, ends_BLE


# Data ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class QuestionData(TaskData):
    """Questions, contexts, and answers that are spans of these.

    A table of checked rows has the columns `question`, `context` and `answers`; the last is a struct of the lists
    `text` and `answer_start`, one entry per gold answer. Its groups are the contexts.

    Attributes:
        stride: Tokens of the context that a window shares with the next one, 0 or more; None allows one window only.
    Raises:
        DataError: `stride` is negative.
    """

    metrics: ClassVar[tuple[Metric, ...]] = METRICS
    shown: ClassVar[tuple[str, ...]] = tuple(metric.name for metric in METRICS)

    stride: int | None = DEFAULT_STRIDE

    def __post_init__(self) -> None:
        if self.stride is not None and self.stride < 0:
            raise DataError(f"stride={self.stride}; choose 0 tokens or more, or None for no windows.")

    def find_columns(self, train: datasets.Dataset, texts: tuple[str, ...] | None, label: str | None) -> Columns:
        """The named columns, else `question`, `context` and `answers`, in lower or upper case."""
        if texts is not None and len(texts) != 2:
            raise DataError(
                f"text_columns={texts!r}, but a question and its context are two; name both with {TEXTS_FLAG}."
            )
        require_columns(train, "train", [*(texts or ()), *([label] if label else ())])
        known = {name.lower(): name for name in train.column_names} | {name: name for name in train.column_names}
        wanted = (*(texts or ("question", "context")), label or "answers")
        if missing := [name for name in wanted if name not in known]:
            raise DataError(
                f"The train split has no column {' and no column '.join(map(repr, missing))}, only {listed(train)}; "
                f"name the columns of questions, contexts and answers with {TEXTS_FLAG} and {ANSWERS_FLAG}."
            )
        question, context, answers = (known[name] for name in wanted)
        return Columns(texts=(question, context), label=answers)

    def check(self, split: datasets.Dataset, name: str, columns: Columns) -> Rows:
        """Read the columns of one split.

        Raises:
            DataError: A column is missing or holds something else; or a row has no question, context or answer, or
                an answer that does not stand in its place.
        """
        require_columns(split, name, (*columns.texts, columns.label))
        texts = read_texts(split, name, dict(zip(("question", "context"), columns.texts, strict=True)), TEXTS_FLAG)
        contexts = texts["context"].to_pylist()
        answers = _read_answers(split, name, columns.label)
        _refuse_unanswered(answers, name, columns.label)
        _refuse_misplaced(answers, contexts, name)
        number: dict[str, int] = {}
        group_N = np.array([number.setdefault(context, len(number)) for context in contexts], dtype=np.int64)
        as_structs = [{"text": text, "answer_start": start} for text, start in answers]
        return Rows(
            split=name,
            table=pa.table({**texts, "answers": pa.array(as_structs, type=ANSWERS_TYPE)}),
            label_names=(),
            stratum_N=np.zeros(len(contexts), dtype=np.int64),
            group_N=group_N,
        )

    def has_labels(self, split: datasets.Dataset, columns: Columns) -> bool:
        """Whether any question of a split is answered; those of a test set often are not.

        Raises:
            DataError: The column holds something else.
        """
        if columns.label not in split.column_names:
            return False
        return any(any(texts) for texts, _ in _read_answers(split, "given", columns.label))

    def check_train(self, train: Rows, columns: Columns) -> None:
        """Refuse a train split without questions."""
        if not len(train):
            raise DataError("The train split has no questions; give a dataset with rows.")

    def count_as(self, train: Rows, other: Rows) -> Rows:
        """`other` as it is: answers are spans of their own context, which nothing counts."""
        return other

    def encode(self, split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> WindowSplit:
        """Turn questions and contexts into windows, not padded, none longer than `max_length`.

        The question comes first and whole. With windows, one that takes more than half of the tokens left by special
        tokens and stride is cut to that half, so that every window brings new context; the log tells how many.

        Args:
            split: Columns `question`, `context` and `answers` as `check` makes them.
            tokenizer: The model's own; it has to know where in the text its tokens stand.
            max_length: Most tokens of a window, special tokens included.
        Raises:
            DataError: `max_length` leaves no room for question and context or is more than the tokenizer's model
                takes, a question and its context are longer where there are no windows, or the tokenizer does not
                know places.
        """
        check_max_length(max_length, tokenizer, pair=True)
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} cannot tell where in a text its tokens stand; use a model folder that has "
                "a tokenizer.json."
            )
        # One question of SQuAD is padded with 25,000 blanks.
        questions = [question.strip() for question in column_of(split, "question").to_pylist()]
        contexts = column_of(split, "context").to_pylist()
        answers = [_texts_and_starts(answers) for answers in column_of(split, "answers").to_pylist()]
        if self.stride is not None:
            questions = _cut_questions(questions, tokenizer, max_length, self.stride)
        windows = _Windows(contexts, [(texts[0], starts[0]) for texts, starts in answers])
        for first in range(0, len(questions), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            windows.add(first, questions[rows], contexts[rows], tokenizer, max_length, self.stride)
        if self.stride is None:
            _refuse_longer(windows.input_ids, max_length)
        encoded = windows.as_split(tuple(tuple(texts) for texts, _ in answers))
        unseen = len(questions) - len(np.unique(encoded.question_N[encoded.labels[:, 1] > 0]))
        logger.info("%d questions in %d windows of at most %d tokens.", len(questions), len(encoded), max_length)
        if unseen:
            logger.info("No window holds the whole answer of %d questions.", unseen)
        return encoded


class _Windows:
    """The windows of a split while they are made; `first_answers` are text and first character, one per question."""

    def __init__(self, contexts: list[str], first_answers: list[tuple[str, int]]) -> None:
        self.contexts, self.first_answers = contexts, first_answers
        self.input_ids: list[list[int]] = []
        self.token_type_ids: list[list[int]] = []
        self.offsets: list[NDArray[np.int32]] = []
        self.questions: list[int] = []
        self.ranges: list[tuple[int, int]] = []
        self.labels: list[tuple[int, int]] = []

    def add(
        self,
        first: int,
        questions: list[str],
        contexts: list[str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        stride: int | None,
    ) -> None:
        """The windows of some questions, the first of which has the number `first`."""
        windows = {} if stride is None else {"truncation": "only_second", "max_length": max_length, "stride": stride}
        encoding = tokenizer(
            questions,
            contexts,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            verbose=False,
            **windows,
        )
        self.input_ids += encoding["input_ids"]
        self.token_type_ids += encoding.get("token_type_ids") or [[0] * len(ids) for ids in encoding["input_ids"]]
        for window, row in enumerate(encoding["overflow_to_sample_mapping"]):
            side = encoding.sequence_ids(window)
            count = side.count(1)
            begin = side.index(1) if count else len(side)
            places = encoding.encodings[window].offsets[begin : begin + count]
            offsets = np.array(places, dtype=np.int32).reshape(-1, 2)
            self.offsets.append(offsets)
            self.questions.append(first + row)
            self.ranges.append((begin, begin + count))
            self.labels.append(_label(offsets, begin, *self.first_answers[first + row]))

    def as_split(self, gold: tuple[tuple[str, ...], ...]) -> WindowSplit:
        """All windows together."""
        return WindowSplit(
            input_ids=self.input_ids,
            token_type_ids=self.token_type_ids,
            labels=np.array(self.labels, dtype=np.int64).reshape(-1, 2),
            num_truncated=0,
            question_N=np.array(self.questions, dtype=np.int64),
            context_N2=np.array(self.ranges, dtype=np.int64).reshape(-1, 2),
            offsets=self.offsets,
            contexts=tuple(self.contexts),
            gold=gold,
        )


def _label(offsets: NDArray[np.int32], begin: int, text: str, start: int) -> tuple[int, int]:
    """First and last token of an answer in a window whose context begins with token `begin`; 0, 0 if not held whole."""
    start, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    if not len(offsets) or start < offsets[0, 0] or end > offsets[-1, 1]:
        return 0, 0
    held = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
    return (begin + int(held[0]), begin + int(held[-1])) if len(held) else (0, 0)


def least_length(tokenizer: PreTrainedTokenizerBase, stride: int) -> int:
    """Tokens of the shortest windows that have room for one of a question and a new one of its context."""
    return int(tokenizer.num_special_tokens_to_add(pair=True)) + stride + 2


def _cut_questions(questions: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> list[str]:
    """The questions, those too long for windows of this stride cut at the end."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    limit = (max_length - special - stride) // 2
    if limit < 1:
        raise DataError(
            f"max_length={max_length} leaves no room for a question and new context beside {special} special tokens "
            f"and stride={stride}; choose max_length={least_length(tokenizer, stride)} or more, or a smaller stride."
        )
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}

    def cut(question: str) -> str:
        offsets = tokenizer(question, return_offsets_mapping=True, **options)["offset_mapping"]
        for keep in range(limit, 0, -1):  # a word that is cut may become more tokens than it had
            shorter = question[: offsets[keep - 1][1]]
            if len(tokenizer(shorter, **options)["input_ids"]) <= limit:
                return shorter
        return ""

    kept, num_cut = [], 0
    for first in range(0, len(questions), ROWS_AT_ONCE):
        some = questions[first : first + ROWS_AT_ONCE]
        for question, ids in zip(some, tokenizer(some, **options)["input_ids"], strict=True):
            kept.append(cut(question) if len(ids) > limit else question)
            num_cut += len(ids) > limit
    if num_cut:
        logger.warning("%d questions are cut to their first %d tokens to leave room for the context.", num_cut, limit)
    return kept


def _refuse_longer(input_ids: list[list[int]], max_length: int) -> None:
    lengths = [len(ids) for ids in input_ids]
    if longer := sum(length > max_length for length in lengths):
        raise DataError(
            f"{longer} of {len(lengths)} questions are longer than max_length={max_length} tokens with their contexts, "
            f"the longest {max(lengths)}; allow windows by giving a stride, or raise --max-length."
        )


def unfold(split: datasets.Dataset) -> datasets.Dataset:
    """The official SQuAD file, which JSON readers take for one row, as one row per question.

    Args:
        split: A column `data` of articles (a title and paragraphs; these have a context and `qas`), perhaps `version`.
    Returns:
        Columns `id`, `title`, `context`, `question` and `answers`; any other dataset as it is.
    Raises:
        DataError: Something is missing in it, or is of another type.
    """
    if not _is_official(split):
        return split
    table: dict[str, list[Any]] = {name: [] for name in ("id", "title", "context", "question", "answers")}
    types = {"answers": ANSWERS_TYPE}
    try:
        for entry in column_of(split, "data").to_pylist():
            for article in map(_as_object, entry if isinstance(entry, list) else [entry]):
                for paragraph in map(_as_object, article["paragraphs"] or ()):
                    for question in map(_as_object, paragraph["qas"] or ()):
                        texts, starts = _texts_and_starts(_as_objects(question.get("answers")))
                        table["id"].append(_as_text(question.get("id")))
                        table["title"].append(_as_text(article.get("title")))
                        table["context"].append(paragraph["context"])
                        table["question"].append(question["question"])
                        table["answers"].append({"text": texts, "answer_start": starts})
        arrays = {name: pa.array(values, types.get(name, pa.string())) for name, values in table.items()}
    except (KeyError, TypeError, ValueError, AttributeError, pa.ArrowException) as error:
        raise DataError(
            f"The file looks like SQuAD's, but cannot be read as such ({error}); each paragraph needs a context and "
            "qas, each of these a question and answers, each answer a text and its answer_start."
        ) from error
    return datasets.Dataset(pa.table(arrays))


def _as_object(value: Any) -> Any:
    """What stands in a file; its reader leaves objects as JSON where they differ in their fields."""
    return json.loads(value) if isinstance(value, str) else value


def _as_objects(values: Any) -> Any:
    """A list of such."""
    return list(map(_as_object, values)) if isinstance(values, list) else values


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _is_official(split: datasets.Dataset) -> bool:
    if "data" not in split.column_names or not set(split.column_names) <= {"data", "version"}:
        return False
    article = getattr(split.features["data"], "feature", split.features["data"])
    differ = isinstance(article, getattr(datasets, "Json", ()))  # articles that do in their fields
    return differ or (isinstance(article, dict) and "paragraphs" in article)


# Answers of a row: the texts, and the first character of each.
_RowAnswers = tuple[list[Any], list[Any]]


def _texts_and_starts(answers: Any) -> _RowAnswers:
    """One row's answers in either form, as lists; both empty where there are none."""
    if isinstance(answers, dict):
        return answers["text"] or [], answers["answer_start"] or []
    present = [answer for answer in answers or () if answer is not None]
    return [answer["text"] for answer in present], [answer["answer_start"] for answer in present]


def _read_answers(split: datasets.Dataset, name: str, column: str) -> list[_RowAnswers]:
    """Every row's answers; what stands in them is not checked."""
    if not _holds_answers(split.features[column]):
        raise DataError(
            f"Column {column!r} of the {name} split holds {split.features[column]}, not answers, each with a text and "
            f"its answer_start; choose another with {ANSWERS_FLAG}."
        )
    return [_texts_and_starts(answers) for answers in column_of(split, column).to_pylist()]


def _holds_answers(feature: Any) -> bool:
    """Whether a column is a struct of the lists `text` and `answer_start`, a list of such structs, or all missing."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        fields = feature.feature
    elif isinstance(feature, dict):
        fields = {name: getattr(part, "feature", None) for name, part in feature.items()}
    else:
        fields = feature
    if not isinstance(fields, dict):
        return isinstance(fields, datasets.Value) and fields.dtype == "null"
    kinds = [str(getattr(fields.get(name), "dtype", "")) for name in ("text", "answer_start")]
    return bool(re.fullmatch(r"(large_)?string|null", kinds[0]) and re.fullmatch(r"u?int\d+|null", kinds[1]))


def _refuse_unanswered(answers: list[_RowAnswers], name: str, column: str) -> None:
    none = np.array([not texts for texts, _ in answers], dtype=np.bool_)
    refuse_rows(
        none,
        f"no answer in column {column!r} (only questions that their context answers are supported, so remove those of "
        "SQuAD 2.0 that it does not)",
        name,
    )
    partial = [
        len(texts) != len(starts) or None in starts or not all(text and text.strip() for text in texts)
        for texts, starts in answers
    ]
    refuse_rows(np.array(partial, dtype=np.bool_), f"an answer without text or answer_start in column {column!r}", name)


def _refuse_misplaced(answers: list[_RowAnswers], contexts: list[str], name: str) -> None:
    """Refuse answers that do not stand in their context where they say they do."""
    misplaced = [
        (row, text, start)
        for row, ((texts, starts), context) in enumerate(zip(answers, contexts, strict=True))
        for text, start in zip(texts, starts, strict=True)
        if start < 0 or not context.startswith(text, start)
    ]
    if misplaced:
        row, text, start = misplaced[0]
        there = contexts[row][start : start + len(text)] if start >= 0 else ""
        others = f", and {len(misplaced) - 1} more answers are like it" if len(misplaced) > 1 else ""
        raise DataError(
            f"Row {row} of the {name} split (the first is row 0) should have the answer {_short(text)} at "
            f"answer_start={start} of its context, but {_short(there)} stands there{others}; correct answer_start, "
            "which counts characters from 0, or remove the row."
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
