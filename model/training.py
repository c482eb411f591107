"""What every kind of training here shares: transformers' Trainer, set up for this project's encoders and splits."""

import dataclasses
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, Self

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from model.encoded import EncodedSplit
from model.hardware import gains_from_bf16, is_out_of_memory
from model.shards import ShardCollator

logger = logging.getLogger(__name__)

EpochHook = Callable[[int], None]
ProgressHook = Callable[[int, int], None]
Precision = Literal["auto", "bf16", "fp32"]
MakeTrainer = Callable[..., Trainer]
Ranges = dict[str, tuple[bool, str]]

LOGGED_STEPS = 10
NUMBERS: Mapping[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    float | None: (Real | None, "a number"),
}
"""What a setting declared so may be, and in words; True and False, which Python takes for numbers, are none."""
NO_LABEL = -100
"""What labels call a token that has none."""
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")
"""What configs call the dropout of attention weights, which the length-adaptive layers read there."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What all settings of a training have in common; checks itself.

    Attributes:
        learning_rate: Peak of the linear schedule.
        batch_size: Sequences per step.
        warmup_ratio: Share of all steps over which the learning rate rises.
        weight_decay: AdamW's decay, not on biases and LayerNorms.
        max_grad_norm: Clipping of the gradient's norm.
        precision: "auto" takes bf16 autocast where the processor or GPU is quicker in it; a study chooses once.
        dropout: Probability in all of the encoder's dropout; None leaves it as the checkpoint has it. Without any, a
            processor trains faster.
        seed: Of dropout, batch order and whatever else is drawn.
    Raises:
        ValueError: A value is out of its range, or no number where one is needed.
    """

    learning_rate: float = 5e-5
    batch_size: int = 32
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Precision = "auto"
    dropout: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            if setting.type in NUMBERS:
                value, (kind, wanted) = getattr(self, setting.name), NUMBERS[setting.type]
                if isinstance(value, bool) or not isinstance(value, kind):
                    raise ValueError(f"{setting.name}={value!r}; choose {wanted}.")
        for name, (holds, wanted) in self.ranges().items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose a value {wanted}.")

    def with_precision_settled(self, settled: Precision = "auto") -> Self:
        """The same with "bf16" or "fp32" for "auto": what was settled before, else what this process decides."""
        precision = settled if self.precision == "auto" else self.precision
        return dataclasses.replace(self, precision="bf16" if uses_bf16(precision) else "fp32")

    def ranges(self) -> Ranges:
        """Of each setting, whether its value is possible, and in words what is."""
        return {
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "warmup_ratio": (0 <= self.warmup_ratio < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "dropout": (self.dropout is None or 0 <= self.dropout < 1, "in [0, 1), or None"),
            "precision": (self.precision in ("auto", "bf16", "fp32"), "'auto', 'bf16' or 'fp32'"),
        }


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a finished training run says of itself.

    Attributes:
        steps: Optimizer steps.
        final_loss: Mean loss of the last steps that were logged, all passes of a step together; nan where fewer than
            ten were made.
        precision: "bf16" or "fp32".
    """

    steps: int
    final_loss: float
    precision: str


def uses_bf16(precision: Precision) -> bool:
    """Whether a training of that precision computes in bf16 on this machine."""
    return precision == "bf16" or (precision == "auto" and gains_from_bf16())


def fit(
    make_trainer: MakeTrainer,
    settings: Schedule,
    split: EncodedSplit,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    epochs: int,
    numbered: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_epoch: EpochHook | None = None,
    on_progress: ProgressHook | None = None,
) -> TrainingReport:
    """Train whatever `make_trainer` makes a Trainer of; a GPU is used where there is one.

    Args:
        make_trainer: Called with the Trainer's arguments but for the model.
        settings: Learning rate and what goes with it.
        split: Tokenised training examples.
        tokenizer: Pads the batches.
        task: What the labels are.
        epochs: How often the split is read.
        numbered: Whether batches carry each sequence's number in the split, as `sequence`, and its `length`.
        callbacks: The Trainer's, beside the two hooks.
        on_epoch: Called after each epoch with the number of epochs done; what it raises ends the training.
        on_progress: Called after each step with the steps done and the steps in all.
    Raises:
        TrainingDiverged: A loss is not finite.
        ValueError: The split is empty.
    """
    if not len(split):
        raise ValueError("The training split is empty; give at least one example.")
    use_cpu, bf16 = not torch.cuda.is_available(), uses_bf16(settings.precision)
    rows = as_dataset(split)
    if numbered:
        rows = rows.add_column("sequence", list(range(len(split))))
    with tempfile.TemporaryDirectory(prefix="hpo-trainer-") as unused_output:
        arguments = TrainingArguments(
            output_dir=unused_output,
            num_train_epochs=epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            remove_unused_columns=not numbered,
            bf16=bf16,
            use_cpu=use_cpu,
            seed=settings.seed,
            data_seed=settings.seed,
            save_strategy="no",
            logging_strategy="steps",
            logging_steps=LOGGED_STEPS,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=not use_cpu,
        )
        if arguments.n_gpu > 1:  # a process trains on one; with more, the Trainer would spread each batch over all
            arguments._n_gpu = 1
        collator = _collator(task, tokenizer)
        if arguments.world_size > 1:
            collator = ShardCollator(collator, arguments.process_index, arguments.world_size)
        trainer = make_trainer(
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
            callbacks=[*callbacks, _Hooks(on_epoch, on_progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return TrainingReport(
        steps=trainer.state.global_step,
        final_loss=float(losses[-1]) if losses else math.nan,
        precision="bf16" if bf16 else "fp32",
    )


class BatchSharingTrainer(Trainer):
    """transformers' Trainer, whose batches are one process's also where several processes share them.

    accelerate would hand a process whole batches, or parts of equal size filled up with rows that were read before.
    Here all processes read the same batches, of which `ShardCollator` gives each its rows.
    """

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every process's batches, in the first one's order."""
        loader: Any = super().get_train_dataloader()
        if self.args.world_size > 1:
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            loader.batch_sampler.even_batches = False
            loader.rng_types = ["torch"]  # dropout over different rows draws differently often; order must not
        return loader  # type: ignore[no-any-return]


def halving_batches(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Have a Trainer's training step go on with parts of a batch where memory does not hold it whole.

    Memory that ran out halves the parts, for this batch and those after it. The gradient stays the batch's: that of
    each part counts by the labels that it has. With dropout, other units are dropped; and where tokens are averaged
    over that have no label, parts count a little more or less than their tokens.

    Args:
        step: A method that learns from its `inputs` by `share` times their loss, and returns that; it draws nothing
            anew when it is called again before the Trainer's `state.global_step` has changed.
    """

    def training_step(
        self: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        inputs = dict(self._prepare_inputs(inputs))
        rows = len(inputs["input_ids"])
        while True:
            parts = getattr(self, "parts_per_batch", 1)
            try:
                losses = [step(self, model, part, share=share) for part, share in split_batch(inputs, parts)]
                return torch.stack(losses).sum()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or parts >= rows or self.args.world_size > 1:
                    raise
            model.zero_grad()
            torch.cuda.empty_cache()
            self.parts_per_batch = min(2 * parts, rows)
            logger.warning("Memory ran out: batches are learned from in %d parts.", self.parts_per_batch)

    return training_step


def split_batch(inputs: dict[str, Any], parts: int) -> list[tuple[dict[str, Any], float]]:
    """Cut a batch into parts of near equal size; the share of its labels that each has."""
    rows = len(inputs["input_ids"])
    if parts == 1:
        return [(inputs, 1.0)]
    labels = inputs["labels"]
    counted = (labels != NO_LABEL).sum().item() if labels.dtype == torch.int64 else labels.numel()
    split = []
    for chosen in torch.arange(rows).tensor_split(min(parts, rows)):
        part = {name: value[chosen.to(value.device)] for name, value in inputs.items()}
        own = (part["labels"] != NO_LABEL).sum().item() if labels.dtype == torch.int64 else part["labels"].numel()
        split.append((part, own / max(1, counted)))
    return split


@contextmanager
def with_dropout(network: PreTrainedModel, probability: float | None) -> Iterator[None]:
    """Give all of a network's dropout one probability while the block runs; None changes nothing."""
    if probability is None:
        yield
        return
    modules = {module: module.p for module in network.modules() if isinstance(module, nn.Dropout)}
    config = {name: getattr(network.config, name) for name in ATTENTION_DROPOUT if hasattr(network.config, name)}
    try:
        for module in modules:
            module.p = probability
        for name in config:
            setattr(network.config, name, probability)
        yield
    finally:
        for module, before in modules.items():
            module.p = before
        for name, value in config.items():
            setattr(network.config, name, value)


def require_finite(loss: Tensor, steps_done: int) -> None:
    """Refuse to learn from a loss that is no number.

    Raises:
        TrainingDiverged: The message names the step.
    """
    if not torch.isfinite(loss):
        raise TrainingDiverged(f"The loss is {loss.item()} at step {steps_done + 1}; lower the learning rate.")


def unwrapped(model: nn.Module | None) -> nn.Module | None:
    """The model itself, where a Trainer holds it in something that spreads it over devices."""
    return getattr(model, "module", model)


def as_dataset(split: EncodedSplit) -> datasets.Dataset:
    """A split as the Trainer reads it."""
    return datasets.Dataset.from_dict(
        {
            "input_ids": split.input_ids,
            "token_type_ids": split.token_type_ids,
            "attention_mask": [[1] * len(tokens) for tokens in split.input_ids],
            "labels": split.labels,
            "length": split.num_tokens,
        }
    )


class _Hooks(TrainerCallback):
    """Passes the Trainer's events on to the caller."""

    def __init__(self, on_epoch: EpochHook | None, on_progress: ProgressHook | None) -> None:
        self.on_epoch = on_epoch
        self.on_progress = on_progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.on_progress is not None:
            self.on_progress(state.global_step, state.max_steps)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.on_epoch is not None:
            self.on_epoch(round(state.epoch or 0.0))


def _collator(task: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Pads a batch, and its labels where each token has one."""
    if task == "token-classification":
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorWithPadding(tokenizer)
