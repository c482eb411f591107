"""Length configs learned by gradient descent, one for each price of a token, as PoWER-BERT does.

Nothing is dropped while a config is learned. Between the two halves of each layer, tokens are ranked by the attention
that they receive and multiplied by a learned factor of their rank, and every layer's factors cost a penalty. What a
layer's factors add up to is the share of tokens that it passes on; the encoder is then re-trained with those shares.

Shape letters: B sequences, L tokens, D hidden size, N layers, P rank positions.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel, real_tokens, significance_order
from model.families import attend
from model.length_config import LengthConfig
from model.train import TrainingSettings, train
from model.training import (
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

SHARE_UNITS = 10_000
"""A share that is read off is a multiple of one in so many."""


@dataclass(frozen=True, kw_only=True)
class PowerBertSettings(Schedule):
    """How one length config is learned; checks itself.

    Attributes:
        penalty: The loss that passing on all tokens adds in the first layer; the second layer's adds twice that, and
            so on. It is the paper's lambda times the number of its rank positions, the padded length, so that it
            does not depend on `positions`: the authors' 1e-4 to 7e-3 would be 0.013 to 0.9 at 128 tokens.
            At 0 nothing speaks for passing on fewer tokens, and all are.
        mask_learning_rate: Peak of the linear schedule for the factors, which start at 1 and have far to go; over
            few steps take more. The authors use 1e-4 to 3e-3.
        learning_rate: Peak of the linear schedule for the encoder.
        epochs: Over the training split.
        warmup_ratio: Share of all steps over which the learning rates rise.
        weight_decay: AdamW's decay on the encoder's weights, not on biases, LayerNorms and factors.
        seed: Of dropout and batch order.
        positions: Factors of each layer, at equal distances over the ranks of any sequence.
    Raises:
        ValueError: A value is out of its range.
    """

    penalty: float = 0.1
    mask_learning_rate: float = 3e-3
    learning_rate: float = 3e-5
    epochs: int = 3
    positions: int = 64

    def ranges(self) -> Ranges:
        return {
            **super().ranges(),
            "penalty": (0 <= self.penalty < math.inf, "at least 0"),
            "mask_learning_rate": (0 < self.mask_learning_rate < math.inf, "above 0"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "positions": (self.positions >= 1, "at least 1"),
        }


class SoftExtract(nn.Module):
    """What tokens of each layer and rank are multiplied by: the soft-extract layers of all layers together.

    The paper has a factor for each rank of a padded sequence. Our sequences have lengths of their own, so a layer's
    factors are a step function over [0, 1], where the tokens of a sequence other than [CLS] lie side by side in order
    of rank, each as wide as the others; a token's factor is the mean over its place. So every sequence sees all of the
    factors, whatever its length, and its own factors always average to the layer's. [CLS] is never touched.

    Attributes:
        factors_NP: The step functions, in [0, 1]; all start at 1.
    Source: Goyal et al. 2020, soft-extract layer.
    """

    def __init__(self, num_layers: int, positions: int) -> None:
        super().__init__()
        self.factors_NP = nn.Parameter(torch.ones(num_layers, positions))

    def forward(self, layer: int, score_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """What each token is multiplied by, (B, L): 1 for [CLS] and padding.

        The gradient reaches the factors; it does not reach the scores, which only rank.

        Args:
            layer: Index of the layer.
            score_BL: Attention each token received there.
            mask_BL: True at real tokens; None where all are real.
        """
        length, positions = score_BL.size(1), self.factors_NP.size(1)
        others_B = torch.full((len(score_BL),), length - 1, device=score_BL.device)
        if mask_BL is not None:
            score_BL = score_BL.masked_fill(~mask_BL, -torch.inf)
            others_B = mask_BL.sum(dim=1) - 1
        rank_BL = significance_order(score_BL).argsort(dim=1)
        # In whole numbers, of which a step is as wide as there are tokens, and a token as there are steps.
        ends_BL1 = (rank_BL * positions)[:, :, None]
        step_P = torch.arange(positions, device=score_BL.device)
        starts_B1P, stops_B1P = ((step_P + past) * others_B[:, None] for past in (0, 1))
        covered_BLP = torch.minimum(ends_BL1, stops_B1P[:, None]) - torch.maximum(
            ends_BL1 - positions, starts_B1P[:, None]
        )
        factors_P = self.factors_NP[layer]
        lost_BL = (covered_BLP.clamp(min=0).to(factors_P.dtype) / positions) @ (1.0 - factors_P)
        return 1.0 - lost_BL  # exactly 1 where nothing is lost

    def shares(self) -> Tensor:
        """The share of tokens other than [CLS] that each layer passes on: the paper's mass, per position; (N,)."""
        return self.factors_NP.mean(dim=1)

    def penalty(self) -> Tensor:
        """What all tokens cost: the sum over layers, counted from 1, of the layer's number times its share.

        A token is dearer the later the layer, as in the authors' code. It could not be there had not all layers before
        passed it on; and with depth, what tokens know has spread to others, so that they are missed less.

        Source: Goyal et al. 2020, configuration search.
        """
        number_N = torch.arange(1, len(self.factors_NP) + 1, device=self.factors_NP.device)
        return (number_N * self.shares()).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the factors back into [0, 1], where they may have left it."""
        self.factors_NP.clamp_(0.0, 1.0)

    def length_config(self, mean_tokens: float) -> LengthConfig:
        """The tokens left after each layer: the mass of its factors and that of all layers before.

        [CLS] adds its own share. Rounding up to whole tokens is left to the config, which knows the sequence; shares
        themselves are rounded down, so that nothing but what they are of adds a token.

        Args:
            mean_tokens: Real tokens of a sequence, [CLS] included, on the average.
        Source: Goyal et al. 2020, configuration search; the authors' code rounds down instead.
        """
        shares, least = [], 1.0
        for share in self.shares().detach().double().cpu().tolist():
            kept = 1.0 - (1.0 - 1.0 / mean_tokens) * (1.0 - share)  # exactly 1 where all are
            in_units = max(1, math.floor(kept * SHARE_UNITS + 0.01))  # the hundredth is for what float32 loses
            least = min(least, in_units / SHARE_UNITS)
            shares.append(least)
        return LengthConfig.from_shares(shares)


class SoftExtractModel(nn.Module):
    """A length-adaptive encoder that fades tokens where it would drop them; for training only.

    Attributes:
        encoder: The wrapped encoder, whose weights are learned along.
        extract: The factors.
    """

    def __init__(self, encoder: LengthAdaptiveModel, positions: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.extract = SoftExtract(encoder.num_layers, positions)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Run a batch with every token, faded between the two halves of each layer by its rank there.

        The paper knows no heads that read every token. Such a head reads of each token a mixture, as far as the token
        passed a layer and all before it the layer's vector, else the one from before: with factors of 0 and 1 that
        is drop-and-restore.

        Args: as `LengthAdaptiveModel.forward` has them; the loss is the task's alone.
        """
        model, network, family = self.encoder, self.encoder.network, self.encoder.family
        mask_BL, _ = real_tokens(input_ids, attention_mask)
        positions_BL = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
        hidden = family.embed(network, input_ids, token_type_ids, positions_BL)
        read_BLD, passed_BL1 = hidden, hidden.new_ones(())
        for layer in range(model.num_layers):
            attended, score = attend(family, network, layer, hidden, positions_BL, mask_BL, with_scores=True)
            assert score is not None
            factor_BL1 = self.extract(layer, score, mask_BL)[:, :, None]
            hidden = family.feed_forward(network, layer, (attended * factor_BL1).to(attended.dtype))
            if not model.reads_first:
                passed_BL1 = torch.minimum(passed_BL1, factor_BL1)
                read_BLD = torch.lerp(read_BLD, hidden.to(read_BLD.dtype), passed_BL1.to(read_BLD.dtype))
        logits = family.classify(network, hidden) if model.reads_first else family.read_tokens(network, read_BLD)
        return SequenceClassifierOutput(loss=None if labels is None else model.loss(logits, labels), logits=logits)


def learn_retention(
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    tokenizer: PreTrainedTokenizerBase,
    settings: PowerBertSettings,
    *,
    on_epoch: EpochHook | None = None,
    on_progress: ProgressHook | None = None,
) -> LengthConfig:
    """Learn how many tokens each layer should pass on, together with the encoder, which is trained in place.

    The loss is the task's plus the penalty of `SoftExtract` times `settings.penalty`. Tokens are ranked by the model's
    `token_score`. As in the paper, start from an encoder that is fine-tuned already and `retrain` it afterwards.

    Args:
        model: The encoder; a GPU is used where there is one. Give a copy where its weights are needed as they are.
        split: Tokenised training examples.
        tokenizer: Pads the batches.
        settings: How to learn, and how dear tokens are.
        on_epoch: Called after each epoch with the number of epochs done; what it raises ends the training.
        on_progress: Called after each step with the steps done and the steps in all.
    Raises:
        TrainingDiverged: A loss is not finite.
        ValueError: The split is empty.
    Source: Goyal et al. 2020, configuration search.
    """
    softened = SoftExtractModel(model, settings.positions)
    with with_dropout(model.network, settings.dropout):
        fit(
            partial(_RetentionTrainer, settings, model=softened),
            settings,
            split,
            tokenizer,
            model.task,
            epochs=settings.epochs,
            callbacks=[_Clamp(softened.extract)],
            on_epoch=on_epoch,
            on_progress=on_progress,
        )
    config = softened.extract.length_config(float(split.num_tokens.mean()))
    logger.info("A penalty of %g leaves the shares %s.", settings.penalty, config)
    return config


def learn_family(
    model_factory: Callable[[], LengthAdaptiveModel],
    split: EncodedSplit,
    tokenizer: PreTrainedTokenizerBase,
    settings: PowerBertSettings,
    penalties: Sequence[float],
) -> list[LengthConfig]:
    """One length config for each penalty, in their order, without those that came out before.

    Args:
        model_factory: Gives the encoder that every penalty starts from; it is trained in place, so a new one each time.
        split: Tokenised training examples.
        tokenizer: Pads the batches.
        settings: How to learn; its own penalty is not used.
        penalties: How dear tokens are.
    Raises:
        TrainingDiverged: A loss is not finite.
        ValueError: No penalty is given, one is negative, or the split is empty.
    """
    if not penalties:
        raise ValueError("No penalties are given; give at least one, such as 0.1.")
    variants = [replace(settings, penalty=penalty) for penalty in penalties]  # refused before any is trained
    configs = [learn_retention(model_factory(), split, tokenizer, variant) for variant in variants]
    return list(dict.fromkeys(configs))


def retrain(
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    length_config: LengthConfig,
    *,
    on_epoch: EpochHook | None = None,
    on_progress: ProgressHook | None = None,
) -> TrainingReport:
    """Fine-tune the encoder in place at one fixed length config, from the labels alone.

    Args:
        model: The encoder; a GPU is used where there is one.
        split: Tokenised training examples.
        tokenizer: Pads the batches.
        settings: How to train, for as many epochs as it has of both kinds; what it says of LengthDrop, its sandwich
            and distillation is not used. Its `token_score` should be the one that the config was learned with.
        length_config: Tokens left after each layer, at every step.
        on_epoch: Called after each epoch with the number of epochs done; what it raises ends the training.
        on_progress: Called after each step with the steps done and the steps in all.
    Raises:
        TrainingDiverged: A loss is not finite.
        ValueError: The split is empty, or the config has another number of layers.
    Source: Goyal et al. 2020, re-training.
    """
    plain = replace(settings, plain_epochs=settings.all_epochs, epochs=0)
    shortened = _AtOneConfig(model, length_config)
    return train(shortened, split, tokenizer, plain, on_epoch=on_epoch, on_progress=on_progress)


class _AtOneConfig(LengthAdaptiveModel):
    """The same encoder, run under one config where none is given."""

    def __init__(self, model: LengthAdaptiveModel, length_config: LengthConfig) -> None:
        super().__init__(model.network, model.task)
        self.length_config = length_config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        length_config: LengthConfig | None = None,
    ) -> SequenceClassifierOutput:
        """See `LengthAdaptiveModel.forward`."""
        config = length_config or self.length_config
        return super().forward(input_ids, attention_mask, token_type_ids, labels, length_config=config)


class _RetentionTrainer(Trainer):
    """transformers' Trainer whose loss has the penalty, and whose factors have a learning rate of their own."""

    def __init__(self, settings: PowerBertSettings, **trainer_arguments: Any) -> None:
        super().__init__(**trainer_arguments)
        self.settings = settings

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as the Trainer builds it, and a group of parameters for the factors."""
        softened = _unwrapped(model or self.model)
        optimizer: torch.optim.Optimizer = super().create_optimizer(softened.encoder)
        if self.settings.penalty > 0:  # else the noise of the task's gradient alone would fade tokens
            rate = self.settings.mask_learning_rate
            factors = list(softened.extract.parameters())
            optimizer.add_param_group({"params": factors, "lr": rate, "weight_decay": 0.0})
        return optimizer

    @halving_batches
    def training_step(self, model: nn.Module, inputs: dict[str, Any], share: float) -> Tensor:
        """One batch: the task's loss and the penalty."""
        model.train()
        with self.compute_loss_context_manager():
            loss: Tensor = model(**inputs).loss + self.settings.penalty * _unwrapped(model).extract.penalty()
        require_finite(loss, self.state.global_step)
        loss = share * loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class _Clamp(TrainerCallback):
    """Keeps the factors in [0, 1]."""

    def __init__(self, extract: SoftExtract) -> None:
        self.extract = extract

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.extract.clamp()


def _unwrapped(model: nn.Module | None) -> SoftExtractModel:
    inner = unwrapped(model)
    assert isinstance(inner, SoftExtractModel)
    return inner
