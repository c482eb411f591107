"""What a study works on: an encoder, a dataset and a metric, and the same loaded and tokenised."""

import dataclasses
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hpo.errors import HpoError
from model.data import Corpus, DataSpec, EncodedSplit, encode, load_corpus
from model.encoder import CheckpointError, LengthAdaptiveModel, check_task, explain_load_failure, max_tokens
from model.hub import only_local_files
from model.tasks import Metric, get_metric

DEFAULT_MAX_LENGTH = 512

ProgressHook = Callable[[float, int, str], None]
"""Called with the trials done (running ones count in part), the trials in all, and a remark."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a study works on, as recorded with it.

    Attributes:
        model: Folder or hub id of the encoder.
        data: Which dataset, and how it is split.
        task: What the head predicts.
        metric: Name of the quality that trials are scored by.
        max_length: Tokens after which a text is cut; the encoder's own limit where that is lower.
    """

    model: str
    data: DataSpec
    task: str = "classification"
    metric: str = "accuracy"
    max_length: int = DEFAULT_MAX_LENGTH

    def __post_init__(self) -> None:
        check_task(self.task)
        if self.task != "classification":
            raise ValueError(f"task={self.task!r} cannot be studied yet; choose classification.")
        get_metric(self.metric)
        if self.max_length < 4:
            raise ValueError(f"max_length={self.max_length}; choose at least 4 tokens.")

    def to_attribute(self) -> dict[str, Any]:
        """A JSON-able form for the database."""
        return {**dataclasses.asdict(self), "data": self.data.to_dict()}

    @classmethod
    def from_attribute(cls, attribute: Mapping[str, Any]) -> "Workload":
        """The inverse of `to_attribute`."""
        return cls(**{**attribute, "data": DataSpec.from_dict(attribute["data"])})


@dataclass(frozen=True, kw_only=True)
class LoadedWorkload:
    """A workload with its data in memory, tokenised.

    Attributes:
        workload: What was loaded.
        corpus: The three splits as text, with their fingerprint.
        tokenizer: Belongs to the encoder.
        train: Tokenised training split.
        search: Tokenised search split, on which trials are scored.
        report: Tokenised report split, touched once per final front point.
        metric: The quality that trials are scored by.
    """

    workload: Workload
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    train: EncodedSplit
    search: EncodedSplit
    report: EncodedSplit
    metric: Metric

    @property
    def dataset_identity(self) -> str:
        """Fingerprint of the texts, the labels and how they are cut."""
        return f"{self.corpus.fingerprint}/{self.workload.max_length}"


def load_workload(workload: Workload, encoder: str | Path) -> LoadedWorkload:
    """Load and tokenise the splits for one encoder.

    Args:
        workload: What to load.
        encoder: Folder or hub id whose tokenizer and length limit apply: the workload's model, or a checkpoint of it.
    Raises:
        DataError: The dataset cannot be used.
        CheckpointError: The encoder has no tokenizer.
    """
    corpus = load_corpus(workload.data)
    tokenizer = load_tokenizer(encoder)
    max_length = min(workload.max_length, tokenizer.model_max_length, max_tokens(encoder))
    return LoadedWorkload(
        workload=workload,
        corpus=corpus,
        tokenizer=tokenizer,
        train=encode(corpus.train, tokenizer, max_length),
        search=encode(corpus.search, tokenizer, max_length),
        report=encode(corpus.report, tokenizer, max_length),
        metric=get_metric(workload.metric),
    )


def load_tokenizer(encoder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            encoder, local_files_only=only_local_files(encoder)
        )
    except Exception as error:  # the library raises whatever its parsers do
        if not Path(encoder).is_dir():
            raise CheckpointError(explain_load_failure(encoder, error)) from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"Cannot load a tokenizer from {encoder} ({first_line}); the folder needs tokenizer.json or vocab.txt."
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one up where there are no files
        raise CheckpointError(f"{encoder} holds no tokenizer; the folder needs tokenizer.json or vocab.txt.")
    return tokenizer


def load_encoder(source: str | Path, corpus: Corpus) -> LengthAdaptiveModel:
    """The encoder with a head for the corpus's classes.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    return LengthAdaptiveModel.from_pretrained(
        source, num_labels=len(corpus.label_names), label_names=corpus.label_names
    )


def library_versions() -> dict[str, str]:
    """Versions that decide a result, for the record."""
    names = ("hpo", "torch", "transformers", "optuna", "datasets", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def require_trials(trials: int) -> None:
    """Refuse a total that is not positive."""
    if trials < 1:
        raise HpoError(f"--trials {trials}; choose at least 1.")
