"""Predictions of an exported model, at any budget that its front serves.

Shape letters: N sequences, B of a batch, L tokens, C outputs of the head.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from model.data import encode
from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.front_file import FRONT_FILE, ExportError, Graph, ServedFront
from model.hardware import compute_device, gains_from_bf16
from model.length_config import LengthConfig
from model.onnx_export import input_names, padded
from model.packed import PackedNetwork
from model.precision import Precision, snapshot
from model.question_answering import WindowSplit
from model.rows import DataError
from model.tasks import Metric
from model.token_classification import TagSplit
from model.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096
"""Tokens of a batch, padding included; a single longer sequence is a batch of its own."""
Prediction = dict[str, Any]
Logits = NDArray[np.float32]
FIELDS = {
    "classification": ("text", "text_pair"),
    "multi-label": ("text", "text_pair"),
    "regression": ("text", "text_pair"),
    "question-answering": ("question", "context"),
    "token-classification": ("tokens",),
}
"""What a prediction of each kind starts from, as a `model.data.Corpus` calls it."""


class LengthAdaptivePipeline:
    """Texts in, predictions out. A call leaves nothing behind, so threads may share a pipeline.

    ```python
    pipeline = LengthAdaptivePipeline("served")
    pipeline(["a fine film", "a poor one"], budget=0.5)  # [{"label": "1", "score": 0.98}, ...]
    ```

    Attributes:
        front: What the folder serves; a call picks one of its points.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        precision: Precision = "fp32",
    ) -> None:
        """Load an export of either format.

        Args:
            folder: What `hpo export` wrote.
            device: Where a transformers model computes; None takes a GPU where there is one. An ONNX graph computes on
                the CPU.
            tokens_per_batch: Most tokens of a batch, padding included.
            precision: "bf16" rounds the factors of a transformers model's large products: faster where the processor or
                GPU is quicker at bf16 products, and probabilities differ in the third digit. A warning says where a
                processor is not.
        Raises:
            ExportError: It is no export, one of a later version, a graph that the installed runtime cannot read, or one
                that is asked for bf16.
            ValueError: The precision is unknown.
            CheckpointError: Weights or tokenizer are damaged.
        """
        if precision not in get_args(Precision):
            raise ValueError(f"precision={precision!r}; choose one of {', '.join(get_args(Precision))}.")
        self.front = ServedFront.read(folder)
        if self.front.kind not in FIELDS:
            raise ExportError(
                f"{folder} predicts {self.front.kind!r}, not one of {', '.join(FIELDS)}; export it again."
            )
        if not self.front.label_names and self.front.kind not in ("regression", "question-answering"):
            raise ExportError(f"{folder} does not say what its labels are called; export the model again.")
        self._tokenizer = load_tokenizer(folder)
        self._tokenizer_lock = threading.Lock()  # it keeps its settings for cutting texts in itself
        self._tokens_per_batch = tokens_per_batch
        pad = self._tokenizer.pad_token_id or 0
        self._network: _Network
        device = torch.device(device or compute_device())
        if self.front.graph is None:
            model = LengthAdaptiveModel.from_pretrained(folder).eval()
            on_processor = device.type == "cpu"
            if precision != "fp32" and on_processor and not gains_from_bf16():
                logger.warning("Products are no quicker in bf16 on this processor; leave it out.")
            self._network = _Packed(model, precision) if on_processor else _Padded(model, precision, device, pad)
        elif precision != "fp32":
            raise ExportError(
                f"{folder} holds an ONNX graph of {self.front.graph.precision}, which cannot run in {precision}; leave "
                "the precision out, or export with --format hf."
            )
        else:
            self._network = _OnnxNetwork(Path(folder), self.front.graph, pad)

    def __call__(
        self,
        inputs: Sequence[Any],
        *,
        budget: float | None = None,
        max_drop: float | None = None,
        max_latency_ms: float | None = None,
    ) -> list[Prediction]:
        """Predict, in the order of the inputs.

        Args:
            inputs: One for each prediction: a text; two texts, or a question and its context, as a tuple or list; or a
                mapping with the columns that the model was trained on. Of token classification, a list of words.
            budget: Run under the best point that costs at most this share of full length.
            max_drop: Run under the cheapest point that loses at most this much of full length's metric, as measured on
                the search split.
            max_latency_ms: Run under the best point that `hpo bench` saw take at most this long for a sequence, before
                the export and where it ran. With none of the three, the point is the one that was exported.
        Returns:
            Of a classification `label` and `score`, its probability; of label sets `labels` and the `scores` of all; of
            a regression `value`; of a question `answer`, its `start` and `end` in the context, in characters, and
            `score`, its probability among the likeliest 20; of words `tags`, one for each.
        Raises:
            NothingFits: Every point exceeds the budget or takes longer.
            DataError: An input is not what the task needs; its number is in the message.
        """
        point = self.front.choose(max_drop=max_drop, budget=budget, max_latency_ms=max_latency_ms)
        if isinstance(inputs, str | Mapping) or not isinstance(inputs, Iterable):
            raise DataError("Predictions are asked for as a list; put the one input into a list.")
        if getattr(inputs, "ndim", 1) != 1:  # a table of pandas gives the names of its columns
            raise DataError("Predictions are asked for as a list; make one of the table's rows.")
        rows = []
        for number, given in enumerate(inputs):
            try:
                rows.append(self.read(given))
            except DataError as error:
                raise DataError(f"Input {number} (the first is 0) {error}") from error
        return self.predict(rows, point.length_config)

    def read(self, given: Any) -> tuple[Any, ...]:
        """What a prediction starts from, one entry for each of the kind's `FIELDS` that the model was trained on.

        Raises:
            DataError: It is something else; the message goes on after the input's name.
        """
        columns = self.front.text_columns
        if isinstance(given, Mapping):
            if not given:
                raise DataError("is an empty object.")
            if missing := [name for name in columns if name not in given]:
                raise DataError(f"has no {' and no '.join(map(repr, missing))}, only {', '.join(map(repr, given))}.")
            values = tuple(given[name] for name in columns)
        elif self.front.kind == "token-classification" or isinstance(given, str):
            values = (given,)
        else:
            values = tuple(given) if isinstance(given, Sequence) else (given,)
        if len(values) != len(columns):
            raise DataError(f"holds {len(values)} texts, but {len(columns)} are needed: {', '.join(columns)}.")
        for name, value in zip(columns, values, strict=True):
            if self.front.kind == "token-classification":
                if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
                    raise DataError(f"has no list of words in {name!r}.")
                if not all(isinstance(word, str) and word.strip() for word in value):
                    raise DataError(f"has a word in {name!r} that is no text or blank.")
            elif not isinstance(value, str) or not value.strip():
                raise DataError(f"has no text in {name!r}.")
            if not all(map(_is_unicode, [value] if isinstance(value, str) else value)):
                raise DataError(f"has half a character in {name!r}, a lone surrogate as of an emoji that was cut.")
        if self.front.kind == "question-answering" and self.front.stride is None:
            self._refuse_longer(*values)
        if not self._tokenizer.num_special_tokens_to_add():
            self._refuse_nothing(values)
        return values

    def _refuse_nothing(self, values: Sequence[Any]) -> None:
        """Refuse that of which a tokenizer that adds no tokens leaves none."""
        texts = [text for value in values for text in ([value] if isinstance(value, str) else value)]
        with self._tokenizer_lock:
            if not any(map(self._tokenizer.tokenize, texts)):
                raise DataError("has no tokens: the tokenizer drops all of its text and adds none.")

    def _refuse_longer(self, question: str, context: str) -> None:
        """Refuse what does not fit where the model knows no windows."""
        with self._tokenizer_lock:
            length = len(self._tokenizer(question.strip(), context, verbose=False)["input_ids"])
        if length > self.front.max_length:
            raise DataError(f"has {length} tokens, but the model reads no more than {self.front.max_length}.")

    def predict(self, rows: Sequence[tuple[Any, ...]], length_config: LengthConfig) -> list[Prediction]:
        """Predict for what `read` returned, under one length config of the model's."""
        if not rows:
            return []
        split = self._encode(rows)
        logits: list[Any] = [None] * len(split)
        for sequences in batches(split.num_tokens, self._tokens_per_batch):
            for sequence, own in zip(sequences, self._network.logits(split, sequences, length_config), strict=True):
                logits[sequence] = own
        return self._said(split, logits)

    def quality(self, split: EncodedSplit, metric: Metric) -> float:
        """The metric of the exported point's answers to a split, tokenised by the same tokenizer."""
        answers_X = np.empty(split.answer_starts[-1], dtype=split.answer_type)
        for sequences in batches(split.num_tokens, self._tokens_per_batch):
            every = self._network.logits(split, sequences, self.front.chosen.length_config)
            for sequence, own in zip(sequences, every, strict=True):
                start, end = split.answer_starts[sequence : sequence + 2]
                answers_X[start:end] = split.answer(torch.from_numpy(own)[None], np.array([sequence])).ravel()
        return split.quality(metric, answers_X)

    def _encode(self, rows: Sequence[tuple[Any, ...]]) -> EncodedSplit:
        """The rows as token ids; what is to be predicted is filled in with anything."""
        front = self.front
        columns: dict[str, Any] = dict(zip(FIELDS[front.kind], map(list, zip(*rows, strict=True)), strict=False))
        features = None
        if front.kind == "question-answering":
            columns["answers"] = [{"text": [""], "answer_start": [0]}] * len(rows)
        elif front.kind == "token-classification":
            columns["tags"] = [[0] * len(words) for words in columns["tokens"]]
            features = datasets.Features(
                tokens=datasets.List(datasets.Value("string")),
                tags=datasets.List(datasets.ClassLabel(names=list(front.label_names))),
            )
        else:
            columns["label"] = [[0]] * len(rows) if front.kind == "multi-label" else [0] * len(rows)
        table = pa.table(columns) if features is None else pa.table(columns, schema=features.arrow_schema)
        with self._tokenizer_lock:
            return encode(datasets.Dataset(table), self._tokenizer, front.max_length, front.kind, front.stride)

    def _said(self, split: EncodedSplit, logits: Sequence[Logits]) -> list[Prediction]:
        """What the logits of each sequence, (C,) or (L, C), mean."""
        names, everything = self.front.label_names, np.arange(len(split))
        if names and len(names) != (outputs := logits[0].shape[-1]):
            raise ExportError(f"{FRONT_FILE} names {len(names)} labels, but the model tells {outputs} apart.")
        if isinstance(split, WindowSplit):
            best = split.n_best([torch.from_numpy(own) for own in logits], everything)
            nothing = {"answer": "", "start": 0, "end": 0, "score": 0.0}
            return [
                {"answer": likeliest[0].text, "start": likeliest[0].start, "end": likeliest[0].end,
                 "score": likeliest[0].probability} if likeliest else nothing
                for likeliest in best
            ]  # fmt: skip
        if isinstance(split, TagSplit):
            tags = np.concatenate([own.argmax(axis=-1) for own in logits])
            return [{"tags": own} for own in split.predictions(tags, everything)]
        logits_NC = np.stack(logits).astype(np.float64)
        if self.front.kind == "regression":
            return [{"value": float(value)} for value in logits_NC[:, 0]]
        if self.front.kind == "multi-label":
            return [
                {
                    "labels": [name for name, logit in zip(names, own, strict=True) if logit > 0],
                    "scores": dict(zip(names, (1 / (1 + np.exp(-own))).tolist(), strict=True)),
                }
                for own in logits_NC
            ]
        weights_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
        scores_NC = weights_NC / weights_NC.sum(axis=1, keepdims=True)
        return [{"label": names[own.argmax()], "score": float(own.max())} for own in scores_NC]


def batches(num_tokens_N: NDArray[np.int64], tokens_per_batch: int) -> Iterator[NDArray[np.int64]]:
    """The numbers of sequences that go through a model together: of near equal length, shortest first.

    Args:
        num_tokens_N: Tokens of each sequence.
        tokens_per_batch: Most tokens of a batch, padding included; a longer sequence comes alone.
    """
    order_N = np.argsort(num_tokens_N, kind="stable")
    start = 0
    for end in range(1, len(order_N) + 1):
        is_last = end == len(order_N)
        if is_last or (end + 1 - start) * num_tokens_N[order_N[end]] > tokens_per_batch:
            yield order_N[start:end]
            start = end


class _Network(Protocol):
    """What computes logits."""

    def logits(self, split: EncodedSplit, sequences: NDArray[np.int64], length_config: LengthConfig) -> list[Logits]:
        """Of some sequences, (C,) or (L, C) each."""


class _Packed:
    """A transformers network on a processor, without padding."""

    def __init__(self, model: LengthAdaptiveModel, precision: Precision) -> None:
        self.network = PackedNetwork(model, precision)

    def logits(self, split: EncodedSplit, sequences: NDArray[np.int64], length_config: LengthConfig) -> list[Logits]:
        ids, types = ([part[number] for number in sequences] for part in (split.input_ids, split.token_type_ids))
        return [own.numpy() for own in self.network.logits(ids, types, length_config)]


class _Padded:
    """A transformers network on a GPU, which likes one large batch better than many small ones."""

    def __init__(self, model: LengthAdaptiveModel, precision: Precision, device: torch.device, pad: int) -> None:
        self.names, self.pad = input_names(model), pad
        model.network = snapshot(model.network, precision)
        self.model = model.to(device)

    def logits(self, split: EncodedSplit, sequences: NDArray[np.int64], length_config: LengthConfig) -> list[Logits]:
        counts = split.num_tokens[sequences].tolist()
        arrays = padded(split, sequences, self.pad)
        batch = {name: torch.from_numpy(arrays[name]).to(self.model.device) for name in self.names}
        if min(counts) == batch["input_ids"].size(1):
            del batch["attention_mask"]  # nothing is padded, so nothing has to be hidden
        with torch.inference_mode():
            logits = self.model(**batch, length_config=length_config).logits
        return _own(logits.float().cpu().numpy(), counts)


class _OnnxNetwork:
    """An ONNX graph, which knows one length config."""

    def __init__(self, folder: Path, graph: Graph, pad: int) -> None:
        try:
            from onnxruntime import __version__

            from model.onnx_runner import SplitSession
        except ImportError as error:
            raise ExportError(
                f"{folder} holds an ONNX graph, which needs onnxruntime; install it by `pip install onnxruntime`."
            ) from error
        try:
            self.session = SplitSession(
                folder / graph.file, fixed_length=graph.fixed_length, threads=torch.get_num_threads()
            )
        except Exception as error:  # the library has a class of its own for every code
            raise ExportError(
                f"onnxruntime {__version__} cannot read {folder / graph.file} ({str(error).splitlines()[0]}); copy the "
                f"whole folder again, or, where opset {graph.opset} is too new for it, install a newer onnxruntime or "
                "export again with a lower --opset."
            ) from error
        self.pad, self.fixed_length = pad, graph.fixed_length

    def logits(self, split: EncodedSplit, sequences: NDArray[np.int64], length_config: LengthConfig) -> list[Logits]:
        arrays = padded(split, sequences, self.pad, self.fixed_length)
        logits = self.session.run({name: arrays[name] for name in self.session.names})
        return _own(logits, split.num_tokens[sequences].tolist())


def _is_unicode(text: str) -> bool:
    """Whether a text has no halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _own(logits: Iterable[Logits], counts: Sequence[int]) -> list[Logits]:
    """The logits of each sequence alone, those of its padding left out."""
    return [row[:count] if row.ndim == 2 else row for row, count in zip(logits, counts, strict=True)]
