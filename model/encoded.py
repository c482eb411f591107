"""Splits as token ids, what a model's logits answer to them, and how good the answers are.

An answer is a few numbers per sequence: a class, a value, one tag per token, a span. A model's answers to a split are
one flat array, sequence after sequence, so that many configs' answers fit side by side.

Shape letters: N sequences of the split, B of a batch, L tokens, C outputs of the head, W numbers of an answer, X
numbers of all answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.tasks import Metric

IGNORED = -100
"""The label of a token that has none, as transformers writes it."""

Ints = NDArray[np.int64]
Answers = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """A split as token ids, one unpadded list per sequence; here each is of one class.

    Attributes:
        input_ids: N lists of token ids, special tokens included.
        token_type_ids: N lists alike; zeros where the tokenizer knows no token types.
        labels: What is to be learned, one entry per sequence: here its class, int64 (N,).
        num_truncated: Sequences that lost tokens to the maximum length.
    """

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    labels: Any
    num_truncated: int

    answer_type: ClassVar[type[np.generic]] = np.int32

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def num_tokens(self) -> Ints:
        """Real tokens of each sequence, special tokens included, (N,)."""
        return np.fromiter((len(ids) for ids in self.input_ids), dtype=np.int64, count=len(self.input_ids))

    def answer_size(self, num_tokens: int) -> int:
        """Numbers of an answer to a sequence of so many tokens."""
        return 1

    @cached_property
    def answer_starts(self) -> Ints:
        """Where each sequence's answer begins among all, and the end of the last, (N + 1,)."""
        sizes = [self.answer_size(count) for count in self.num_tokens.tolist()]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def answer(self, logits: Tensor, sequences: Ints) -> Answers:
        """What logits say of sequences, (B, W).

        Args:
            logits: (B, C), or (B, L, C) of heads that read every token; no padding.
            sequences: The number of each, (B,).
        """
        return logits.argmax(dim=-1, keepdim=True).cpu().numpy()

    def predictions(self, answers: Answers, sequences: Ints) -> Any:
        """Answers in the form that metrics read, which is that of `references`.

        Args:
            answers: Those of the sequences, one after the other.
            sequences: Their numbers, ascending or not.
        """
        return answers

    def references(self, sequences: Ints) -> Any:
        """What would have been right."""
        return self.labels[sequences]

    def quality(self, metric: Metric, answers_X: Answers) -> float:
        """The metric of a model's answers to the whole split."""
        everything = np.arange(len(self))
        return metric.compute(self.predictions(answers_X, everything), self.references(everything))

    def take(self, sequences: Sequence[int] | Ints) -> Self:
        """The split of these sequences."""
        taken: dict[str, Any] = {
            field.name: [getattr(self, field.name)[number] for number in sequences]
            for field in fields(self)
            if isinstance(getattr(self, field.name), list)
        }
        if isinstance(self.labels, np.ndarray):
            taken["labels"] = self.labels[np.asarray(sequences, dtype=np.int64)]
        return replace(self, **taken)


@dataclass(frozen=True, kw_only=True)
class MultiLabelSplit(EncodedSplit):
    """Sequences that any number of classes apply to; `labels` is float32 (N, C) of zeros and ones."""

    def answer_size(self, num_tokens: int) -> int:
        """One number for each class."""
        return int(self.labels.shape[1])

    def answer(self, logits: Tensor, sequences: Ints) -> Answers:
        """Which classes are more likely than not, (B, C)."""
        return (logits > 0).int().cpu().numpy()

    def predictions(self, answers: Answers, sequences: Ints) -> Any:
        return answers.reshape(len(sequences), -1)

    def references(self, sequences: Ints) -> Any:
        return self.labels[sequences].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class ValueSplit(EncodedSplit):
    """Sequences with a number each; `labels` is float32 (N,)."""

    answer_type: ClassVar[type[np.generic]] = np.float32

    def answer(self, logits: Tensor, sequences: Ints) -> Answers:
        """The value, (B, 1)."""
        return logits.float().cpu().numpy()
