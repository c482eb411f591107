"""What a study works on: an encoder, a dataset and a metric, and the same loaded and tokenised."""

import dataclasses
import logging
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hpo.errors import HpoError
from model.data import KINDS, Corpus, DataSpec, encode, load_corpus
from model.encoded import EncodedSplit
from model.encoder import CheckpointError, LengthAdaptiveModel, check_task, given_labels, max_tokens, read_config
from model.question_answering import DEFAULT_STRIDE
from model.rows import DataError
from model.tasks import Metric, choose_metric
from model.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512
SHARED_PART = 3
"""Windows share a part in so many of their tokens at most, unless a user says how many."""
RANDOM_HEAD = (
    "%s has no trained head for %s. A random one is searched, another each time it is loaded, so that its answers mean "
    "nothing and the study cannot be gone on with; train the encoder with `hpo tune` first."
)

ProgressHook = Callable[[float, int, str], None]
"""Called with what is done, of how much in all, and a remark; trials that run count in part."""


class Progress:
    """A progress hook, or none, that also shows remarks from elsewhere, such as that the database is away."""

    def __init__(self, hook: ProgressHook | None) -> None:
        self._hook = hook
        self._last: tuple[float, int] | None = None

    def __call__(self, done: float, total: int, remark: str) -> None:
        """As `ProgressHook`."""
        self._last = done, total
        if self._hook is not None:
            self._hook(done, total, remark)

    def remark(self, remark: str) -> None:
        """Show a remark beside the last progress, once there is any."""
        if self._hook is not None and self._last is not None:
            self._hook(*self._last, remark)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a study works on, as recorded with it.

    Attributes:
        model: Folder or hub id of the encoder.
        data: Which dataset, and how it is split.
        task: What the head predicts; None lets the dataset's columns tell.
        metric: Name of the quality that trials are scored by; None takes the task's usual one.
        max_length: Tokens after which a text is cut, or a window of a question's context; the encoder's own limit where
            that is lower.
        stride: Tokens that neighbouring windows of a context share; None refuses contexts that are too long.
    """

    model: str
    data: DataSpec
    task: str | None = None
    metric: str | None = None
    max_length: int = DEFAULT_MAX_LENGTH
    stride: int | None = DEFAULT_STRIDE

    def __post_init__(self) -> None:
        if self.task is not None:
            check_task(self.task)
        if self.metric is not None and all(self.metric not in _names(data.metrics) for data in KINDS.values()):
            raise ValueError(f"metric={self.metric!r} is unknown; choose one of {', '.join(_all_metrics())}.")
        if self.max_length < 4:
            raise ValueError(f"max_length={self.max_length}; choose at least 4 tokens.")
        if self.stride is not None and self.stride < 0:
            raise ValueError(f"stride={self.stride}; choose 0 tokens or more.")

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
        workload: What was loaded; its task and metric are no longer None.
        corpus: The three splits as text, with their fingerprint.
        tokenizer: Belongs to the encoder.
        train: Tokenised training split.
        search: Tokenised search split, on which trials are scored.
        report: Tokenised report split, touched once per final front point.
        metric: The quality that trials are scored by.
        metrics: All that are reported, the one above among them.
    """

    workload: Workload
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    train: EncodedSplit
    search: EncodedSplit
    report: EncodedSplit
    metric: Metric
    metrics: tuple[Metric, ...]

    @property
    def dataset_identity(self) -> str:
        """Fingerprint of the texts, the labels and how they are cut."""
        windows = f"/{self.workload.stride}" * (self.workload.task == "question-answering")
        return f"{self.corpus.fingerprint}/{self.workload.max_length}{windows}"


def load_workload(workload: Workload, encoder: str | Path) -> LoadedWorkload:
    """Load and tokenise the splits for one encoder.

    Args:
        workload: What to load.
        encoder: Folder or hub id whose tokenizer and length limit apply: the workload's model, or a checkpoint of it.
    Raises:
        DataError: The dataset cannot be used.
        CheckpointError: The encoder has no tokenizer, or another encoder's.
    """
    corpus = load_corpus(workload.data, workload.task)
    data = KINDS[corpus.kind]
    metrics = [metric.over(len(corpus.label_names)) for metric in data.metrics]
    try:
        metric = choose_metric(metrics, workload.metric)
    except ValueError as error:
        raise DataError(f"The dataset is for {corpus.kind}: {error}") from error
    tokenizer = load_tokenizer(encoder)
    max_length, stride = lengths_of(workload, tokenizer, encoder)
    train, search, report = (
        encode(split, tokenizer, max_length, corpus.kind, stride)
        for split in (corpus.train, corpus.search, corpus.report)
    )
    _check_tokens({"train": train, "search": search, "report": report}, encoder)
    return LoadedWorkload(
        workload=dataclasses.replace(workload, task=corpus.task, metric=metric.name),
        corpus=corpus,
        tokenizer=tokenizer,
        train=train,
        search=search,
        report=report,
        metric=metric,
        metrics=(metric, *(other for other in metrics if other.name in data.shown and other is not metric)),
    )


def _check_tokens(splits: Mapping[str, EncodedSplit], encoder: str | Path) -> None:
    """Refuse sequences that the encoder cannot read: of no tokens, or of such as it has no vectors for."""
    vocabulary = int(read_config(encoder).vocab_size)
    for purpose, split in splits.items():
        if empty := int((split.num_tokens == 0).sum()):
            raise DataError(
                f"{empty} texts of the {purpose} split have no tokens: the tokenizer of {encoder} drops all that they "
                "hold and adds no [CLS]; remove them, or have it add one."
            )
        highest = max(map(max, split.input_ids), default=0)
        if highest >= vocabulary:
            raise CheckpointError(
                f"The tokenizer of {encoder} numbers a token {highest}, but config.json has a vocab_size of "
                f"{vocabulary}; give the encoder its own tokenizer, or resize its embeddings."
            )


def lengths_of(workload: Workload, tokenizer: PreTrainedTokenizerBase, encoder: str | Path) -> tuple[int, int | None]:
    """Most tokens of a sequence, and those that neighbouring windows share, as far as an encoder allows."""
    max_length = min(workload.max_length, tokenizer.model_max_length, max_tokens(encoder))
    stride = workload.stride
    return max_length, min(stride, max_length // SHARED_PART) if stride == DEFAULT_STRIDE else stride


def load_encoder(source: str | Path, corpus: Corpus) -> LengthAdaptiveModel:
    """The encoder with a head for the corpus's task and classes.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    names = corpus.label_names
    return LengthAdaptiveModel.from_pretrained(
        source,
        corpus.task,
        num_labels=len(names) or None,
        label_names=names or None,
        multi_label=corpus.kind == "multi-label",
    )


def load_trained_encoder(source: str | Path, corpus: Corpus) -> LengthAdaptiveModel:
    """`load_encoder` for what is not trained any further; a head that it has not learned is warned of.

    Raises:
        CheckpointError: It cannot be loaded, computes no numbers, or numbers the dataset's classes in another order.
    """
    model = load_encoder(source, corpus)
    for name, weight in model.network.named_parameters():
        if not all(map(isfinite, weight.detach().aminmax())):
            raise CheckpointError(
                f"The weight {name} of {source} holds what is no finite number, as after a training that diverged; "
                "give another checkpoint."
            )
    if model.has_new_head:
        logger.warning(RANDOM_HEAD, source, model.task)
    else:
        _check_classes(source, corpus.label_names)
    return model


def _check_classes(source: str | Path, names: Sequence[str]) -> None:
    """Refuse a head that numbers classes of these names otherwise; warn of one that calls them otherwise."""
    its_names = differing_labels(source, names)
    if not its_names:
        return
    ours, theirs = _folded(names), _folded(its_names)
    found, known = listed_labels(names), listed_labels(its_names)
    if any(name in theirs and theirs.index(name) != number for number, name in enumerate(ours)):
        raise CheckpointError(
            f"{source} numbers the classes {known}, the dataset {found}, so that each would be scored as another; "
            "give the dataset a ClassLabel column in the checkpoint's order, or train the encoder with `hpo tune`."
        )
    logger.warning("The study takes %s for the checkpoint's classes %s, in this order.", found, known)


def differing_labels(source: str | Path, names: Sequence[str]) -> tuple[str, ...]:
    """The labels of an encoder's head where they are not a dataset's, whatever their case; none where nobody named
    either."""
    theirs = given_labels(read_config(source))
    return theirs if names and _folded(names) != _folded(theirs) else ()


def listed_labels(names: Sequence[str]) -> str:
    """The first labels, as a sentence names them."""
    return ", ".join(names[:8])


def _folded(names: Sequence[str]) -> list[str]:
    return [name.casefold() for name in names]


def library_versions() -> dict[str, str]:
    """Versions that decide a result, for the record."""
    names = ("hpo", "torch", "transformers", "optuna", "datasets", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def with_paths(source: str, change: Callable[[str], str]) -> str:
    """A dataset's or model's name with other paths in it: a path, one with a config as in `folder:config`, or several
    as in `train=a.csv,validation=b.csv`; a path may hold such signs itself."""
    if (whole := change(source)) != source:
        return whole
    folder, colon, config = source.rpartition(":")
    if colon and (changed := change(folder)) != folder:
        return f"{changed}:{config}"
    if Path(source).is_absolute():
        return source
    parts = (part.partition("=") if "=" in part else ("", "", part) for part in source.split(","))
    return ",".join(f"{split}{equals}{change(path)}" for split, equals, path in parts)


def require_trials(trials: int) -> None:
    """Refuse a total that is not positive."""
    if trials < 1:
        raise HpoError(f"--trials {trials}; choose at least 1.")


def _names(metrics: Iterable[Metric]) -> list[str]:
    return [metric.name for metric in metrics]


def _all_metrics() -> list[str]:
    return list(dict.fromkeys(name for data in KINDS.values() for name in _names(data.metrics)))
