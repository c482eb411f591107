"""Training with LengthDrop: one encoder that works at any length config.

Each step follows the sandwich rule: the full model learns from the labels, the smallest and a few randomly
shortened passes of the same batch learn from the full pass.
"""

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from model.attention import TOKEN_SCORES
from model.distill import Divergence, imitation_loss
from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.hardware import compute_device
from model.length_config import LengthConfig
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
    with_dropout,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Schedule):
    """How one encoder is trained; checks itself.

    Attributes:
        plain_epochs: First epochs, at full length only.
        epochs: Epochs with LengthDrop after them.
        length_drop: p; each layer passes on a share of its tokens drawn from [1 - p, 1].
        layer_drop: Probability that a shortened pass skips a layer; the full pass never does.
        sandwich_size: Randomly shortened passes per step, beside the full and the smallest one.
        temperature: Divides the logits of both sides of the in-place distillation.
        distillation_weight: Share of the full pass's logits in a shortened pass's loss; the rest is the labels'.
        divergence: "forward" KL(full‖short), or "reverse" as in the reference code.
        teacher_weight: Share of a teacher's logits in the full pass's loss, where there is a teacher; the rest is the
            labels'.
        token_score: What tokens are ranked by, "attention" or "value_norm"; the checkpoint keeps it.
        seed: Of dropout, batch order and length configs.
    Raises:
        ValueError: A value is out of its range.
    """

    plain_epochs: int = 1
    epochs: int = 2
    length_drop: float = 0.2
    layer_drop: float = 0.0
    sandwich_size: int = 2
    temperature: float = 1.0
    distillation_weight: float = 1.0
    divergence: Divergence = "forward"
    teacher_weight: float = 0.9
    token_score: str = "value_norm"

    @property
    def all_epochs(self) -> int:
        """Epochs of both kinds."""
        return self.plain_epochs + self.epochs

    def ranges(self) -> Ranges:
        return {
            **super().ranges(),
            "plain_epochs": (self.plain_epochs >= 0, "at least 0"),
            "epochs": (self.epochs >= 0 and self.all_epochs >= 1, "at least 0, and one epoch in all"),
            "length_drop": (0 <= self.length_drop < 1, "in [0, 1)"),
            "layer_drop": (0 <= self.layer_drop < 1, "in [0, 1)"),
            "sandwich_size": (self.sandwich_size >= 0, "at least 0"),
            "temperature": (0 < self.temperature < math.inf, "above 0"),
            "distillation_weight": (0 <= self.distillation_weight <= 1, "in [0, 1]"),
            "teacher_weight": (0 <= self.teacher_weight <= 1, "in [0, 1]"),
            "divergence": (self.divergence in ("forward", "reverse"), "'forward' or 'reverse'"),
            "token_score": (self.token_score in TOKEN_SCORES, " or ".join(map(repr, TOKEN_SCORES))),
        }


def train(
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    *,
    teacher: LengthAdaptiveModel | None = None,
    on_epoch: EpochHook | None = None,
    on_progress: ProgressHook | None = None,
) -> TrainingReport:
    """Train the model in place: plain epochs at full length, then epochs with LengthDrop.

    Args:
        model: The encoder; a GPU is used where there is one.
        split: Tokenised training examples.
        tokenizer: Pads the batches.
        settings: How to train.
        teacher: A fine-tuned encoder of the same task and vocabulary, from whose logits the full passes learn.
        on_epoch: Called after each epoch with the number of epochs done; what it raises ends the training.
        on_progress: Called after each step with the steps done and the steps in all.
    Raises:
        TrainingDiverged: A loss is not finite.
        ValueError: The split is empty.
    """
    model.token_score, model.layer_drop = settings.token_score, settings.layer_drop
    with with_dropout(model.network, settings.dropout):
        return fit(
            partial(LengthDropTrainer, settings, _on_device(teacher), model=model),
            settings,
            split,
            tokenizer,
            model.task,
            epochs=settings.all_epochs,
            on_epoch=on_epoch,
            on_progress=on_progress,
        )


def _on_device(teacher: LengthAdaptiveModel | None) -> LengthAdaptiveModel | None:
    """The teacher where training runs, without dropout."""
    return None if teacher is None else teacher.to(compute_device()).eval()


class LengthDropTrainer(BatchSharingTrainer):
    """transformers' Trainer whose step is the sandwich of Kim & Cho 2021."""

    def __init__(
        self, settings: TrainingSettings, teacher: LengthAdaptiveModel | None = None, **trainer_arguments: Any
    ) -> None:
        super().__init__(**trainer_arguments)
        self.settings = settings
        self.teacher = teacher
        self.generator = np.random.default_rng(settings.seed)
        self._drawn: tuple[int, list[LengthConfig]] = (-1, [])

    @halving_batches
    def training_step(self, model: nn.Module, inputs: dict[str, Any], share: float) -> Tensor:
        """One batch: the full pass learns from the labels and any teacher, each shortened pass from the full one.

        Every pass is run backward before the next starts, so that one graph is in memory at a time.
        """
        model.train()
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        encoder = unwrapped(model)
        assert isinstance(encoder, LengthAdaptiveModel)
        sandwich = self._sandwich(encoder.num_layers)
        scale = share / ((1 + len(sandwich)) * self.current_gradient_accumulation_steps)

        with self.compute_loss_context_manager():
            full = model(**inputs, labels=labels)
            loss = self._full_loss(full, inputs)
        total = self._learn(loss * scale)
        taught = full.logits.detach()
        for length_config in sandwich:
            with self.compute_loss_context_manager():
                short = model(**inputs, labels=labels, length_config=length_config)
                loss = self._short_loss(encoder, short, taught, inputs["attention_mask"])
            total = total + self._learn(loss * scale)
        return total

    def _sandwich(self, num_layers: int) -> list[LengthConfig]:
        """The shortened passes of this step, the same for all parts of its batch."""
        if self._drawn[0] != self.state.global_step:
            plain = (self.state.epoch or 0.0) < self.settings.plain_epochs
            drawn = [] if plain else sample_sandwich(self.settings, num_layers, self.generator)
            self._drawn = (self.state.global_step, drawn)
        return self._drawn[1]

    def _full_loss(self, full: SequenceClassifierOutput, inputs: dict[str, Any]) -> Tensor:
        assert full.logits is not None
        assert full.loss is not None
        if self.teacher is None or not self.settings.teacher_weight:
            return full.loss
        settings, weight = self.settings, self.settings.teacher_weight
        with torch.no_grad():
            wanted = self.teacher(**inputs).logits
        how = (settings.temperature, settings.divergence)
        imitation = imitation_loss(self.teacher, full.logits, wanted, inputs["attention_mask"], *how)
        return weight * imitation + (1 - weight) * full.loss

    def _short_loss(
        self, model: LengthAdaptiveModel, short: SequenceClassifierOutput, teacher: Tensor, attention_mask_BL: Tensor
    ) -> Tensor:
        settings, weight = self.settings, self.settings.distillation_weight
        assert short.logits is not None
        assert short.loss is not None
        loss = short.logits.new_zeros(())
        if weight > 0:
            how = (settings.temperature, settings.divergence)
            loss = loss + weight * imitation_loss(model, short.logits, teacher, attention_mask_BL, *how)
        if weight < 1:
            loss = loss + (1 - weight) * short.loss
        return loss

    def _learn(self, loss: Tensor) -> Tensor:
        require_finite(loss, self.state.global_step)
        self.accelerator.backward(loss)
        return loss.detach()


def sample_sandwich(settings: TrainingSettings, num_layers: int, generator: np.random.Generator) -> list[LengthConfig]:
    """The shortened passes of one step: the smallest config first, then `sandwich_size` random ones.

    Retentions are drawn from the continuous range [1 - p, 1] and shared by the batch, each sequence keeping its
    own share; the paper draws whole lengths of the padded batch instead. LayerDrop skips layers of each; where it would
    skip all of them, it skips none.

    Source: Kim & Cho 2021, "LengthDrop"; the sandwich rule is from Yu & Huang 2019.
    """
    smallest = np.full(num_layers, 1.0 - settings.length_drop)
    drawn = generator.uniform(1.0 - settings.length_drop, 1.0, size=(settings.sandwich_size, num_layers))
    skipped = generator.random((1 + settings.sandwich_size, num_layers)) < settings.layer_drop
    skipped[skipped.all(axis=1)] = False
    return [
        LengthConfig.from_retention(retention.tolist(), np.flatnonzero(skip))
        for retention, skip in zip((smallest, *drawn), skipped, strict=True)
    ]
