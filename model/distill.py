"""Distillation: the losses by which one forward pass teaches another, and training a student by a teacher's passes.

What a teacher says of a fixed split never changes, so it can be computed once and kept on disk. It is rounded to bf16
wherever it comes from, and on a processor each sequence passes the teacher alone, so that nothing depends on batch
mates: training with the cache and training with the teacher running along give the same weights.

Where several processes share a batch, each loss is a process's part of the batch's (`model.shards`).

Shape letters: B sequences, L tokens, D hidden size, H heads, d size of a head, C outputs of the task's head.
"""

import abc
import copy
import fcntl
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel, given_labels
from model.families import Places
from model.hardware import compute_device
from model.precision import snapshot
from model.shards import share_of
from model.training import (
    BatchSharingTrainer,
    EpochHook,
    ProgressHook,
    Ranges,
    Schedule,
    TrainingReport,
    fit,
    halving_batches,
    require_finite,
    unwrapped,
    uses_bf16,
    with_dropout,
)

logger = logging.getLogger(__name__)

Divergence = Literal["forward", "reverse"]
Kind = Literal["hidden", "scores", "probabilities", "values", "logits"]
UNLIKELY = -1e4
"""The logit of what cannot be."""
CACHE_LIMIT_BYTES = 8 * 2**30
"""What a teacher's outputs may take on disk unless the caller says otherwise."""


def distillation_loss(
    student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0, divergence: Divergence = "forward"
) -> Tensor:
    """Mean Kullback-Leibler divergence between two batches of logits, times the temperature squared.

    Args:
        student_BC: Logits that learn.
        teacher_BC: Logits to learn from; detach them.
        temperature: Divides both logits; the square restores the size of the gradient.
        divergence: "forward" is KL(teacher‖student), the expectation under the teacher; "reverse" is
            KL(student‖teacher), as the code of Kim & Cho 2021 has it.
    Raises:
        ValueError: The temperature is not positive and finite, or the divergence unknown.
    Source: Hinton et al. 2015, "Distillation"; Kim & Cho 2021, "LengthDrop" (in-place distillation).
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}; choose a positive number.")
    student = (student_BC.float() / temperature).log_softmax(dim=-1)
    teacher = (teacher_BC.float() / temperature).log_softmax(dim=-1)
    if divergence == "forward":
        target, estimate = teacher, student
    elif divergence == "reverse":
        target, estimate = student, teacher
    else:
        raise ValueError(f"divergence={divergence!r}; choose 'forward' or 'reverse'.")
    divergence_mean = F.kl_div(estimate, target, reduction="batchmean", log_target=True)
    return divergence_mean * temperature**2 * share_of(len(student), student.device)


def imitation_loss(
    model: LengthAdaptiveModel,
    student: Tensor,
    teacher: Tensor,
    attention_mask_BL: Tensor,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
) -> Tensor:
    """How far one pass's logits are from another's, as the model's task sees it.

    Classes and tags are one distribution per text or token, and so are the starts and the ends of answers over a
    text's tokens; each class of several that may apply is one of its own, whose divergences add up. Values have the
    mean squared difference. Padding takes no part.

    Args:
        model: Tells what its head predicts.
        student: Logits that learn, (B, C) or (B, L, C).
        teacher: Logits to learn from; detach them.
        attention_mask_BL: 1 at real tokens.
        temperature: See `distillation_loss`.
        divergence: See `distillation_loss`.
    """
    if model.task == "regression":
        return F.mse_loss(student.float(), teacher.float()) * share_of(len(student), student.device)
    real_BL = attention_mask_BL.bool()
    if model.task == "token-classification":
        return distillation_loss(student[real_BL], teacher[real_BL], temperature, divergence)
    if model.task == "question-answering":
        # -inf times a probability of 0 would be no number.
        student, teacher = (
            logits.float().masked_fill(~real_BL[:, :, None], UNLIKELY).transpose(1, 2).flatten(0, 1)
            for logits in (student, teacher)
        )
        return distillation_loss(student, teacher, temperature, divergence)
    if model.is_multi_label:
        student, teacher = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (student, teacher))
        per_class = distillation_loss(student.flatten(0, 1), teacher.flatten(0, 1), temperature, divergence)
        return per_class * student.size(1)
    return distillation_loss(student, teacher, temperature, divergence)


# Losses inside the network


def hidden_loss(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean squared difference of two passes' token vectors, over real tokens and dimensions.

    Args:
        student_BLD: Vectors that learn, as wide as the teacher's.
        teacher_BLD: Vectors to learn from.
        mask_BL: True at real tokens.
    Source: Jiao et al. 2020 (TinyBERT), "Hidden States Based Distillation" and "Embedding-layer Distillation".
    """
    return _mean((student_BLD.float() - teacher_BLD.float()).square()[mask_BL])


def score_loss(student_BHLL: Tensor, teacher_BHLL: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean squared difference of attention scores before the softmax, over heads and pairs of real tokens.

    Pairs that one of the two hides by a window take no part. The published code counts padding too.

    Args:
        student_BHLL: Scores that learn; what a window hides is `UNLIKELY`.
        teacher_BHLL: Scores to learn from.
        mask_BL: True at real tokens.
    Source: Jiao et al. 2020 (TinyBERT), "Attention Based Distillation".
    """
    student, teacher = student_BHLL.float(), teacher_BHLL.float()
    seen = _seen(student, mask_BL) & _seen(teacher, mask_BL)
    return _mean((student - teacher)[seen].square())


def probability_loss(student_BHLL: Tensor, teacher_BHLL: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean squared difference of attention probabilities, over heads and pairs of real tokens.

    Args:
        student_BHLL: Scores before the softmax that learn; what a window hides is `UNLIKELY` and takes no part.
        teacher_BHLL: Probabilities to learn from.
        mask_BL: True at real tokens.
    Source: Jiao et al. 2020 (TinyBERT), "Attention Based Distillation", which found scores to work better.
    """
    estimate, target, seen = _distributions(student_BHLL, teacher_BHLL, mask_BL)
    return _mean((estimate.exp() - target)[seen].square())


def attention_divergence(student_BHLL: Tensor, teacher_BHLL: Tensor, mask_BL: Tensor) -> Tensor:
    """KL(teacher‖student) of what each real token attends to, mean over heads and real tokens.

    Args:
        student_BHLL: Scores before the softmax that learn; what a window hides is `UNLIKELY` and takes no part.
        teacher_BHLL: Probabilities to learn from.
        mask_BL: True at real tokens.
    Source: Wang et al. 2020 (MiniLM), "Self-Attention Distribution Transfer".
    """
    estimate, target, _ = _distributions(student_BHLL, teacher_BHLL, mask_BL)
    divergence_BHL: Tensor = (torch.xlogy(target, target) - target * estimate).sum(-1)
    return _mean(divergence_BHL.transpose(1, 2)[mask_BL])


def relation_loss(
    student_BHLL: Tensor, teacher_BHLL: Tensor, student_BHLd: Tensor, teacher_BHLd: Tensor, mask_BL: Tensor
) -> Tensor:
    """MiniLM's loss of one layer: KL(teacher‖student) of attention, plus that of the relations between values.

    Relations are the softmax over the scaled products of a head's value vectors, so heads may differ in size.

    Args:
        student_BHLL: Attention scores before the softmax that learn.
        teacher_BHLL: Attention probabilities to learn from.
        student_BHLd: Value vectors that learn.
        teacher_BHLd: Value vectors to learn from.
        mask_BL: True at real tokens.
    Source: Wang et al. 2020 (MiniLM), "Self-Attention Distribution Transfer" and "Self-Attention Value-Relation
        Transfer".
    """
    student, teacher = (_relations(values.float()) for values in (student_BHLd, teacher_BHLd))
    teacher = teacher.masked_fill(~mask_BL[:, None, None, :], UNLIKELY).softmax(-1)
    return attention_divergence(student_BHLL, teacher_BHLL, mask_BL) + attention_divergence(student, teacher, mask_BL)


def _mean(parts: Tensor) -> Tensor:
    """Their mean; of a shared batch, this process's part of it."""
    return parts.mean() * share_of(parts.numel(), parts.device)


def _relations(values_BHLd: Tensor) -> Tensor:
    """Scaled products of value vectors, (B, H, L, L)."""
    return values_BHLd @ values_BHLd.transpose(-1, -2) / math.sqrt(values_BHLd.size(-1))


def _seen(scores_BHLL: Tensor, mask_BL: Tensor) -> Tensor:
    """Pairs of real tokens that no window hides, (B, H, L, L)."""
    real_B1LL = mask_BL[:, None, :, None] & mask_BL[:, None, None, :]
    return real_B1LL & (scores_BHLL > UNLIKELY / 2)  # half, since rounding to bf16 may raise it


def _distributions(student_BHLL: Tensor, teacher_BHLL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student's log-probabilities and the teacher's probabilities over pairs that count, and which those are."""
    student = student_BHLL.float()
    seen = _seen(student, mask_BL)
    estimate = student.masked_fill(~seen, UNLIKELY).log_softmax(-1)
    target = teacher_BHLL.float().masked_fill(~seen, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    return estimate, target, seen


# How to distil


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Schedule):
    """How a student learns from its teacher; checks itself.

    The loss is the sum of its parts, each times its weight; a part of weight 0 costs nothing. A stage of a recipe is a
    choice of weights: the defaults are TinyBERT's intermediate stage.

    Attributes:
        epochs: Times that every sequence is read.
        seed: Of dropout, batch order and the projection between widths.
        embedding_weight: Of the vectors that enter the first layer, see `hidden_loss`.
        hidden_weight: Of the vectors that leave each layer, see `hidden_loss`; the layers' losses add up.
        attention_weight: Of each layer's attention, as `attention_of` and `attention_loss` say; they add up.
        relation_weight: Of the last layer's attention and value relations, see `relation_loss`.
        logit_weight: Of the head's logits, see `imitation_loss`.
        label_weight: Of the labels.
        attention_of: "scores" before the softmax, or "probabilities" after it.
        attention_loss: "mse", or of probabilities also "kl".
        temperature: Divides the logits of both sides.
        layer_map: The layer of the teacher, from 1, that each layer of the student learns from; None spreads the
            student's layers evenly, see `uniform_layer_map`.
    Raises:
        ValueError: A value is out of its range.
    """

    epochs: int = 3
    embedding_weight: float = 1.0
    hidden_weight: float = 1.0
    attention_weight: float = 1.0
    relation_weight: float = 0.0
    logit_weight: float = 0.0
    label_weight: float = 0.0
    attention_of: Literal["scores", "probabilities"] = "scores"
    attention_loss: Literal["mse", "kl"] = "mse"
    temperature: float = 1.0
    layer_map: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, name) for name in self._weights()):
            names = ", ".join(self._weights())
            raise ValueError(f"Every weight is 0, so there is nothing to learn; raise one of {names}.")

    def ranges(self) -> Ranges:
        kinds = ("mse", "kl") if self.attention_of == "probabilities" else ("mse",)
        return {
            **super().ranges(),
            **{name: (0 <= getattr(self, name) < math.inf, "at least 0") for name in self._weights()},
            "epochs": (self.epochs >= 1, "at least 1"),
            "attention_of": (self.attention_of in ("scores", "probabilities"), "'scores' or 'probabilities'"),
            "attention_loss": (self.attention_loss in kinds, "'mse', or 'kl' with attention_of='probabilities'"),
            "temperature": (0 < self.temperature < math.inf, "above 0"),
            "layer_map": (
                self.layer_map is None or _names_layers(self.layer_map),
                "that names a layer of the teacher, from 1, for each layer of the student",
            ),
        }

    def _weights(self) -> list[str]:
        return [name for name in self.__dataclass_fields__ if name.endswith("_weight")]


def _names_layers(layer_map: object) -> bool:
    """Whether it is a list of layers counted from 1; study files may hold anything."""
    if not isinstance(layer_map, tuple | list) or not layer_map:
        return False
    return all(type(layer) is int and layer >= 1 for layer in layer_map)


class DistillError(RuntimeError):
    """The teacher's outputs cannot be kept; the message says what to change."""


def uniform_layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layer, from 1, that each of the student's learns from: layer i of S from i * T / S, rounded.

    The last learns from the last. Halves are rounded up, and no layer learns from the embeddings.

    Raises:
        ValueError: A number of layers is below 1.
    Source: Jiao et al. 2020 (TinyBERT), "Experiment Setup", for T a multiple of S.
    """
    if min(student_layers, teacher_layers) < 1:
        raise ValueError(f"{student_layers} student and {teacher_layers} teacher layers; give at least 1 of each.")
    shares = (2 * layer * teacher_layers + student_layers for layer in range(1, student_layers + 1))
    return tuple(max(1, share // (2 * student_layers)) for share in shares)


def checked_layer_map(layer_map: Sequence[int] | None, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """A given layer map that fits the two encoders, or without one the uniform map.

    Raises:
        ValueError: It has another length, or names a layer that the teacher has not.
    """
    if layer_map is None:
        return uniform_layer_map(student_layers, teacher_layers)
    if len(layer_map) != student_layers or not all(1 <= layer <= teacher_layers for layer in layer_map):
        raise ValueError(
            f"layer_map={tuple(layer_map)}, but the student has {student_layers} layers and the teacher "
            f"{teacher_layers}; name one layer of 1..{teacher_layers} for each of the student's, as in "
            f"{uniform_layer_map(student_layers, teacher_layers)}."
        )
    return tuple(layer_map)


# What passes are compared by


class Piece(NamedTuple):
    """One part of what a forward pass computes.

    Attributes:
        kind: "hidden" vectors (B, L, D) that leave a layer; attention "scores" or "probabilities" (B, H, L, L);
            "values" (B, H, L, d); "logits" (B, C) or (B, L, C).
        layer: From 1; 0 for the vectors that enter the first layer and for the logits.
    """

    kind: Kind
    layer: int


Outputs = Mapping[Piece, Tensor]
TeacherOutputs = Outputs
"""What the teacher says of a batch, bf16, or of one sequence without the first dimension."""
EMBEDDINGS, LOGITS = Piece("hidden", 0), Piece("logits", 0)


def student_pieces(settings: DistillSettings, num_layers: int) -> frozenset[Piece]:
    """What a student's pass has to give for the losses chosen; probabilities are made of its scores."""
    pieces = _inner_pieces(settings, range(1, num_layers + 1), "scores", "scores")
    return frozenset(pieces | ({LOGITS} if settings.logit_weight or settings.label_weight else set()))


def teacher_pieces(settings: DistillSettings, layer_map: Sequence[int]) -> frozenset[Piece]:
    """What a teacher's pass has to give for the losses chosen."""
    pieces = _inner_pieces(settings, layer_map, settings.attention_of, "probabilities")
    return frozenset(pieces | ({LOGITS} if settings.logit_weight else set()))


def _inner_pieces(settings: DistillSettings, layers: Sequence[int], attention: Kind, related: Kind) -> set[Piece]:
    pieces = {EMBEDDINGS} if settings.embedding_weight else set()
    if settings.hidden_weight:
        pieces |= {Piece("hidden", layer) for layer in layers}
    if settings.attention_weight:
        pieces |= {Piece(attention, layer) for layer in layers}
    if settings.relation_weight:
        pieces |= {Piece(related, layers[-1]), Piece("values", layers[-1])}
    return pieces


def record(model: LengthAdaptiveModel, batch: Mapping[str, Tensor], pieces: Collection[Piece]) -> dict[Piece, Tensor]:
    """Run a batch at full length and give the parts of the pass that are asked for.

    Layers that no part needs are not run. Scores and probabilities are float32, and scores that a window hides
    `UNLIKELY`; dropout on the attention weights shows in neither. At padding everything is meaningless.

    Args:
        model: Any encoder of ours; its mode decides about dropout.
        batch: `input_ids`, `attention_mask` and, where the tokenizer knows them, `token_type_ids`, all (B, L).
        pieces: What to give.
    """
    family, network = model.family, model.network
    input_ids, mask_BL = batch["input_ids"], batch["attention_mask"].bool()
    mask = None if bool(mask_BL.all()) else mask_BL
    positions_BL = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
    hidden = family.embed(network, input_ids, batch.get("token_type_ids"), positions_BL)
    found = {EMBEDDINGS: hidden}
    last = model.num_layers if LOGITS in pieces else max(piece.layer for piece in pieces)
    for layer in range(last):
        projected_BLP = family.project(network, layer, hidden).float()
        found |= _attention_pieces(model, layer, projected_BLP, positions_BL, mask, pieces)
        context_BLD, _ = family.mix(network, layer, projected_BLP, positions_BL, mask, with_scores=False)
        hidden = family.feed_forward(network, layer, family.merge(network, layer, context_BLD, hidden))
        found[Piece("hidden", layer + 1)] = hidden
    if LOGITS in pieces:
        found[LOGITS] = (family.classify if model.reads_first else family.read_tokens)(network, hidden)
    return {piece: found[piece] for piece in sorted(pieces)}


def _attention_pieces(
    model: LengthAdaptiveModel,
    layer: int,
    projected_BLP: Tensor,
    positions_BL: Tensor,
    mask_BL: Tensor | None,
    pieces: Collection[Piece],
) -> dict[Piece, Tensor]:
    """Those of a layer's self-attention, worked out again where torch's fused attention keeps them to itself."""
    scores, probabilities, values = (Piece(kind, layer + 1) for kind in ("scores", "probabilities", "values"))
    if not {scores, probabilities, values} & set(pieces):
        return {}
    query, key, value = model.family.heads(model.network, projected_BLP)
    found = {values: value}
    if scores in pieces or probabilities in pieces:
        places = Places(positions_BL, positions_BL)
        query, key, bias = model.family.prepare(model.network, layer, query, key, places)
        found[scores] = ((query * query.size(-1) ** -0.5) @ key.transpose(-1, -2)).float()
        if bias is not None:
            found[scores] = (found[scores] + bias).clamp(min=UNLIKELY)
    if probabilities in pieces:
        asked = found[scores] if mask_BL is None else found[scores].masked_fill(~mask_BL[:, None, None, :], UNLIKELY)
        found[probabilities] = asked.softmax(-1)
    return found


# What the teacher says


class TeacherSource(abc.ABC):
    """What a teacher without dropout says of the sequences of a split, rounded to bf16.

    Attributes:
        teacher: What says it.
        split: The sequences; labels are not read.
        pieces: What is asked of it, in a fixed order.
    """

    def __init__(self, teacher: LengthAdaptiveModel, split: EncodedSplit, pieces: Collection[Piece]) -> None:
        self.teacher = teacher
        self.split = split
        self.pieces = sorted(pieces)

    @abc.abstractmethod
    def sequences(self, numbers: Sequence[int]) -> list[TeacherOutputs]:
        """What is said of each of these sequences, without padding."""

    def batch(self, numbers: Sequence[int], length: int, device: torch.device | str = "cpu") -> TeacherOutputs:
        """What is said of these sequences, padded with zeros on the right to `length` tokens."""
        outputs = self.sequences(numbers) if self.pieces else []
        together = {}
        for piece in self.pieces:
            shape = piece_shape(self.teacher, piece, length)
            padded = torch.zeros(len(numbers), *shape, dtype=torch.bfloat16, device=outputs[0][piece].device)
            for row, output in zip(padded, outputs, strict=True):
                row[tuple(map(slice, output[piece].shape))] = output[piece]
            together[piece] = padded.to(device)
        return together


class LiveTeacher(TeacherSource):
    """A snapshot of a teacher, without dropout, that runs whenever it is asked.

    Args:
        teacher: The teacher; neither it nor its mode changes.
        split: The sequences.
        pieces: What is asked of it.
        bf16: Whether its large products have bf16 factors, see `model.precision`.
        device: Where it runs; None is where the teacher is.
        alone: Whether each sequence passes by itself, so that the last bit of what is said of it does not depend on
            others; None does so on a processor, where it costs little, and not on a GPU.
    """

    def __init__(
        self,
        teacher: LengthAdaptiveModel,
        split: EncodedSplit,
        pieces: Collection[Piece],
        *,
        bf16: bool = False,
        device: torch.device | None = None,
        alone: bool | None = None,
    ) -> None:
        frozen = LengthAdaptiveModel(snapshot(teacher.network, "bf16" if bf16 else "fp32"), teacher.task).eval()
        super().__init__(frozen.to(device or teacher.device), split, pieces)
        self.bf16 = bf16
        self.alone = self.teacher.device.type == "cpu" if alone is None else alone

    def sequences(self, numbers: Sequence[int]) -> list[TeacherOutputs]:
        groups = [[number] for number in numbers] if self.alone else [numbers]
        return [output for group in groups for output in self._together(group)]

    @torch.no_grad()
    def _together(self, numbers: Sequence[int]) -> Iterator[TeacherOutputs]:
        device = self.teacher.device
        counts = [len(self.split.input_ids[number]) for number in numbers]

        def padded(rows: list[list[int]]) -> Tensor:
            return torch.tensor([row + [0] * (max(counts) - len(row)) for row in rows], device=device)

        batch = {
            "input_ids": padded([self.split.input_ids[number] for number in numbers]),
            "token_type_ids": padded([self.split.token_type_ids[number] for number in numbers]),
            "attention_mask": padded([[1] * count for count in counts]),
        }
        outputs = record(self.teacher, batch, self.pieces)
        for row, count in enumerate(counts):
            shapes = {piece: piece_shape(self.teacher, piece, count) for piece in self.pieces}
            yield {piece: outputs[piece][row][tuple(map(slice, shape))].bfloat16() for piece, shape in shapes.items()}


class TeacherCache(TeacherSource):
    """What a teacher said of a split, on disk: a flat file of bf16 numbers per piece, sequence after sequence.

    The files lie in a folder that is named by the teacher's weights and configuration, the split's tokens and the
    precision, so that what another teacher said, or of other sequences, is never read.

    Args:
        live: The teacher to keep the outputs of.
        cache_dir: Where such folders lie.
    """

    def __init__(self, live: LiveTeacher, cache_dir: str | Path) -> None:
        super().__init__(live.teacher, live.split, live.pieces)
        self.live = live
        self.folder = Path(cache_dir) / f"teacher-{_fingerprint(live)[:24]}"
        self.starts = {
            piece: np.cumsum([0, *(math.prod(piece_shape(self.teacher, piece, n)) for n in self.split.num_tokens)])
            for piece in self.pieces
        }

    @property
    def size_bytes(self) -> int:
        """What all pieces take on disk."""
        return sum(map(self._size, self.pieces))

    def path(self, piece: Piece) -> Path:
        """The file of one piece."""
        return self.folder / f"{piece.kind}-{piece.layer}.bf16"

    def missing(self) -> list[Piece]:
        """Pieces that no complete file is there for."""
        paths = {piece: self.path(piece) for piece in self.pieces}
        return [p for p, path in paths.items() if not path.is_file() or path.stat().st_size != self._size(p)]

    def fill(self) -> None:
        """Run the teacher over the split for the pieces that are missing; another process that does so is waited for.

        The size is logged, and compared with what the disk has free, before anything is written.

        Raises:
            DistillError: The disk has too little room, or cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if missing := self.missing():
                    self._write(missing)
        except OSError as error:
            raise DistillError(
                f"The teacher's outputs cannot be kept in {self.folder} ({error.strerror or error}); free some space, "
                "or give another cache_dir."
            ) from error

    def sequences(self, numbers: Sequence[int]) -> list[TeacherOutputs]:
        return [{piece: self._read(piece, number) for piece in self.pieces} for number in numbers]

    def _write(self, pieces: list[Piece]) -> None:
        partials = {piece: self.path(piece).with_suffix(".partial") for piece in pieces}
        for left_behind in partials.values():
            left_behind.unlink(missing_ok=True)
        size, free = sum(map(self._size, pieces)), shutil.disk_usage(self.folder).free
        logger.info(
            "The teacher's outputs of %d sequences take %s in %s.", len(self.split), _readable(size), self.folder
        )
        if size > free:
            raise DistillError(
                f"The teacher's outputs take {_readable(size)}, but {self.folder} has {_readable(free)} free; free "
                "some space, give another cache_dir, or lower cache_limit_bytes so that the teacher runs along."
            )
        live = copy.copy(self.live)
        live.pieces = pieces
        try:
            with ExitStack() as files:
                handles = {piece: files.enter_context(path.open("wb")) for piece, path in partials.items()}
                for start in range(0, len(self.split), 32):
                    for output in live.sequences(range(start, min(start + 32, len(self.split)))):
                        for piece, handle in handles.items():
                            handle.write(output[piece].contiguous().view(torch.int16).cpu().numpy().tobytes())
            for piece, path in partials.items():
                path.rename(self.path(piece))
        finally:
            for path in partials.values():
                path.unlink(missing_ok=True)

    def _read(self, piece: Piece, number: int) -> Tensor:
        start, end = self.starts[piece][number : number + 2]
        numbers = torch.from_numpy(np.array(self._maps[piece][start:end])).view(torch.bfloat16)
        return numbers.view(piece_shape(self.teacher, piece, len(self.split.input_ids[number])))

    @cached_property
    def _maps(self) -> dict[Piece, NDArray[np.int16]]:
        return {piece: np.memmap(self.path(piece), dtype=np.int16, mode="r") for piece in self.pieces}

    def _size(self, piece: Piece) -> int:
        return int(self.starts[piece][-1]) * 2


def piece_shape(model: LengthAdaptiveModel, piece: Piece, num_tokens: int) -> tuple[int, ...]:
    """The shape of what a model's pass gives for one sequence, without the first dimension."""
    config: Any = model.network.config
    match piece.kind:
        case "hidden":
            return num_tokens, config.hidden_size
        case "values":
            return config.num_attention_heads, num_tokens, config.hidden_size // config.num_attention_heads
        case "scores" | "probabilities":
            return config.num_attention_heads, num_tokens, num_tokens
        case "logits":
            return (config.num_labels,) if model.reads_first else (num_tokens, config.num_labels)


def _fingerprint(live: LiveTeacher) -> str:
    """SHA-256 of all that decides what a teacher says of a split."""
    config = live.teacher.network.config.to_dict()
    config.pop("_name_or_path", None)
    how = {"config": config, "task": live.teacher.task, "bf16": live.bf16, "alone": live.alone}
    digest = hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode())
    digest.update(live.teacher.fingerprint().encode())
    digest.update(live.split.num_tokens.tobytes())
    for rows in (live.split.input_ids, live.split.token_type_ids):
        digest.update(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]).tobytes())
    return digest.hexdigest()


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


# Training


def distil(
    student: LengthAdaptiveModel,
    teacher: LengthAdaptiveModel,
    split: EncodedSplit,
    tokenizer: PreTrainedTokenizerBase,
    settings: DistillSettings,
    *,
    cache_dir: str | Path | None = None,
    cache_limit_bytes: int = CACHE_LIMIT_BYTES,
    on_epoch: EpochHook | None = None,
    on_progress: ProgressHook | None = None,
) -> TrainingReport:
    """Train a student in place on what a teacher says of the same sequences.

    The teacher does not change, and has no dropout. Its outputs are kept on disk where that pays: they
    are there already, or every sequence is read more than once; and they stay below the limit. Elsewhere it runs along.
    On a processor both give the same weights, on a GPU up to rounding.

    Args:
        student: The encoder that learns; a GPU is used where there is one.
        teacher: An encoder with the same vocabulary, task and labels; for attention also as many heads.
        split: Tokenised training examples.
        tokenizer: Pads the batches.
        settings: How to train.
        cache_dir: Where the teacher's outputs may be kept, for later runs too; None keeps none.
        cache_limit_bytes: What they may take there.
        on_epoch: Called after each epoch with the number of epochs done; what it raises ends the training.
        on_progress: Called after each step with the steps done and the steps in all.
    Raises:
        DistillError: The disk has no room for the teacher's outputs.
        TrainingDiverged: A loss is not finite.
        ValueError: The split is empty or has a sequence that is too long for the teacher, the two encoders do not fit
            each other, or the layer map does not fit them.
    """
    if not len(split):
        raise ValueError("The training split is empty; give at least one example.")
    check_pair(student, teacher, settings)
    layer_map = checked_layer_map(settings.layer_map, student.num_layers, teacher.num_layers)
    longest, most = int(split.num_tokens.max()), teacher.family.max_tokens(teacher.network.config)
    if longest > most:
        raise ValueError(f"A sequence has {longest} tokens, but the teacher takes {most}; lower the maximum length.")
    bf16 = uses_bf16(settings.precision)
    live = LiveTeacher(teacher, split, teacher_pieces(settings, layer_map), bf16=bf16, device=compute_device())
    source = _source(live, cache_dir, cache_limit_bytes, settings.epochs)
    learner = Learner(student, teacher, settings)
    with with_dropout(student.network, settings.dropout):
        return fit(
            partial(DistillTrainer, settings, layer_map, source, model=learner),
            settings,
            split,
            tokenizer,
            student.task,
            epochs=settings.epochs,
            numbered=True,  # for the teacher
            on_epoch=on_epoch,
            on_progress=on_progress,
        )


def check_pair(student: LengthAdaptiveModel, teacher: LengthAdaptiveModel, settings: DistillSettings) -> None:
    """Refuse two encoders that cannot be compared as the settings ask.

    Raises:
        ValueError: They are one, or differ in task, labels, vocabulary or, where it matters, attention heads.
    """
    if student is teacher:
        raise ValueError("Student and teacher are one model; load the student, or cut it from the teacher.")
    ours: Any = student.network.config
    its: Any = teacher.network.config
    for what, left, right in (
        ("task", student.task, teacher.task),
        ("number of labels", ours.num_labels, its.num_labels),
        ("choice of classes", *("any number" if model.is_multi_label else "one" for model in (student, teacher))),
        ("vocabulary size", ours.vocab_size, its.vocab_size),
    ):
        if left != right:
            raise ValueError(f"The student's {what} is {left}, the teacher's {right}; use two that agree.")
    names, its_names = (list(given_labels(config)) for config in (ours, its))
    if names and its_names and names != its_names:
        raise ValueError(f"The student's labels are {names}, the teacher's {its_names}; use two that agree.")
    for setting in ("attention_weight", "relation_weight"):
        if getattr(settings, setting) and ours.num_attention_heads != its.num_attention_heads:
            raise ValueError(
                f"The student has {ours.num_attention_heads} attention heads, the teacher {its.num_attention_heads}, "
                f"so that their attention cannot be compared; set {setting}=0."
            )


class Learner(nn.Module):
    """A student and, where the teacher is wider or narrower, what makes its vectors as wide.

    The projections, one for the embeddings and one for all layers, learn along and are forgotten after the training.

    Source: Jiao et al. 2020 (TinyBERT), "Hidden States Based Distillation".
    """

    def __init__(self, student: LengthAdaptiveModel, teacher: LengthAdaptiveModel, settings: DistillSettings) -> None:
        super().__init__()
        self.student = student
        self.pieces = student_pieces(settings, student.num_layers)
        width, wanted = (model.shape.hidden_size for model in (student, teacher))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(settings.seed)
            self.embedding_projection, self.hidden_projection = (
                nn.Identity() if width == wanted or not weight else nn.Linear(width, wanted, bias=False)
                for weight in (settings.embedding_weight, settings.hidden_weight)
            )

    def forward(self, **batch: Tensor) -> dict[Piece, Tensor]:
        """What the losses need of the student's pass, hidden vectors as wide as the teacher's."""
        outputs = record(self.student, batch, self.pieces)
        for piece in outputs:
            if piece.kind == "hidden":
                projection = self.embedding_projection if piece == EMBEDDINGS else self.hidden_projection
                outputs[piece] = projection(outputs[piece])
        return outputs


class DistillTrainer(BatchSharingTrainer):
    """transformers' Trainer whose step compares the student's pass with what the teacher says of the same sequences."""

    def __init__(
        self,
        settings: DistillSettings,
        layer_map: tuple[int, ...],
        source: TeacherSource,
        **trainer_arguments: Any,
    ) -> None:
        super().__init__(**trainer_arguments)
        self.settings = settings
        self.layer_map = layer_map
        self.source = source

    @halving_batches
    def training_step(self, model: nn.Module, inputs: dict[str, Any], share: float) -> Tensor:
        """One batch; losses are computed in float32 whatever the passes are."""
        model.train()
        inputs = dict(inputs)
        labels, numbers = inputs.pop("labels"), inputs.pop("sequence").tolist()
        del inputs["length"]
        with self.compute_loss_context_manager():
            learned = model(**inputs)
        mask_BL = inputs["attention_mask"].bool()
        taught = self.source.batch(numbers, mask_BL.size(1), mask_BL.device)
        learner = unwrapped(model)
        assert isinstance(learner, Learner)
        loss = combined_loss(learner.student, self.settings, self.layer_map, learned, taught, mask_BL, labels)
        require_finite(loss, self.state.global_step)
        loss = share * loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


def combined_loss(
    student: LengthAdaptiveModel,
    settings: DistillSettings,
    layer_map: Sequence[int],
    learned: Outputs,
    taught: TeacherOutputs,
    mask_BL: Tensor,
    labels: Tensor,
) -> Tensor:
    """The weighted sum of the losses that the settings choose.

    Args:
        student: Tells what its head predicts.
        settings: Weights and kinds of losses.
        layer_map: The teacher's layer, from 1, that each of the student's learns from.
        learned: What `student_pieces` asks for.
        taught: What `teacher_pieces` asks for.
        mask_BL: True at real tokens.
        labels: As `LengthAdaptiveModel.forward` takes them.
    """
    attention_loss = {
        ("scores", "mse"): score_loss,
        ("probabilities", "mse"): probability_loss,
        ("probabilities", "kl"): attention_divergence,
    }[settings.attention_of, settings.attention_loss]
    parts = []
    if weight := settings.embedding_weight:
        parts.append(weight * hidden_loss(learned[EMBEDDINGS], taught[EMBEDDINGS], mask_BL))
    for mine, its in enumerate(layer_map, start=1):
        if weight := settings.hidden_weight:
            parts.append(weight * hidden_loss(learned[Piece("hidden", mine)], taught[Piece("hidden", its)], mask_BL))
        if weight := settings.attention_weight:
            attended, followed = learned[Piece("scores", mine)], taught[Piece(settings.attention_of, its)]
            parts.append(weight * attention_loss(attended, followed, mask_BL))
    if weight := settings.relation_weight:
        mine, its = len(layer_map), layer_map[-1]
        attention = learned[Piece("scores", mine)], taught[Piece("probabilities", its)]
        values = learned[Piece("values", mine)], taught[Piece("values", its)]
        parts.append(weight * relation_loss(*attention, *values, mask_BL))
    if weight := settings.logit_weight:
        parts.append(weight * imitation_loss(student, learned[LOGITS], taught[LOGITS], mask_BL, settings.temperature))
    if weight := settings.label_weight:
        parts.append(weight * student.loss(learned[LOGITS], labels))
    return torch.stack(parts).sum()


def _source(live: LiveTeacher, cache_dir: str | Path | None, limit_bytes: int, epochs: int) -> TeacherSource:
    """The cache where it pays and has room, else the teacher itself."""
    if cache_dir is None or not live.pieces:
        return live
    cache = TeacherCache(live, cache_dir)
    if not cache.missing():
        return cache
    if cache.size_bytes > limit_bytes:
        size, limit = _readable(cache.size_bytes), _readable(limit_bytes)
        logger.info("The teacher runs along: its outputs would take %s on disk, the limit is %s.", size, limit)
        return live
    if epochs == 1:
        return live
    cache.fill()
    return cache
