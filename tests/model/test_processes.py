"""Training in several processes: the same weights as in one, and no process left whatever happens."""

import copy
import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast

from model.distill import DistillSettings, distil
from model.encoder import LengthAdaptiveModel
from model.hardware import gains_from_bf16
from model.processes import TrainingProcessDied, train_in_processes
from model.train import TrainingSettings, train

# 21 sequences in batches of 5: two processes have unequal parts of each, and the last batch has one row.
SETTINGS = TrainingSettings(
    learning_rate=1e-3,
    batch_size=5,
    plain_epochs=1,
    epochs=1,
    length_drop=0.4,
    layer_drop=0.3,
    teacher_weight=0.5,
    distillation_weight=0.7,
    precision="fp32",
    dropout=0.0,
)


class Pruned(Exception):
    """What a caller raises between epochs to end a training."""


@pytest.fixture
def tokenizer(tmp_path) -> BertTokenizerFast:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(55))]))
    return BertTokenizerFast(vocab=str(path))


@pytest.fixture
def split(make_batch, unpadded):
    generator = np.random.default_rng(0)
    return unpadded(make_batch(generator.integers(4, 20, size=21).tolist()), labels=generator.integers(0, 5, size=21))


def difference(ours: LengthAdaptiveModel, theirs: LengthAdaptiveModel, before: LengthAdaptiveModel) -> float:
    """How far two trained models are apart, as a share of how far training has moved them.

    Softmax takes no notice of the keys' biases: their gradient is rounding, which Adam makes as large as any.
    """
    apart, moved = 0.0, 0.0
    for (name, mine), other, old in zip(ours.named_parameters(), theirs.parameters(), before.parameters(), strict=True):
        if not name.endswith("key.bias"):
            apart += float((mine - other).detach().square().sum())
            moved += float((other - old).detach().square().sum())
    return (apart / moved) ** 0.5


def saved_config(model: LengthAdaptiveModel, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_length_drop_in_two_processes_gives_the_weights_of_one(model, split, tokenizer, tmp_path):
    alone, shared, teacher = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    expected_steps, steps, epochs = [], [], []
    expected = train(
        alone, split, tokenizer, SETTINGS, teacher=teacher, on_progress=lambda *step: expected_steps.append(step)
    )

    def on_epoch(epoch: int) -> None:
        epochs.append((epoch, shared.fingerprint()))

    report = train_in_processes(
        train, 2, shared, split, tokenizer, SETTINGS, teacher=teacher, on_epoch=on_epoch,
        on_progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert difference(shared, alone, model) < 1e-3
    assert saved_config(shared, tmp_path / "shared") == saved_config(alone, tmp_path / "alone")
    assert (report.steps, report.precision) == (expected.steps, expected.precision)
    assert report.final_loss == pytest.approx(expected.final_loss, rel=1e-4)
    assert steps == expected_steps
    assert [epoch for epoch, _ in epochs] == [1, 2]
    assert epochs[0][1] != epochs[1][1] == shared.fingerprint()
    assert not multiprocessing.active_children()


def test_processes_compute_in_what_the_first_of_all_decides(model, split, tokenizer, monkeypatch):
    """Each would time products while others keep it from the cores."""
    here = not gains_from_bf16()
    monkeypatch.setattr("model.training.gains_from_bf16", lambda: here)
    settings = dataclasses.replace(SETTINGS, teacher_weight=0.0, precision="auto")
    report = train_in_processes(train, 2, model, split, tokenizer, settings)
    assert report.precision == ("bf16" if here else "fp32")


def test_distillation_in_two_processes_gives_the_weights_of_one(model, split, tokenizer):
    """The losses are means over tokens and over pairs of them, of which processes have unequal numbers."""
    settings = DistillSettings(
        epochs=1, learning_rate=1e-3, batch_size=5, relation_weight=0.5, logit_weight=0.3, label_weight=0.2,
        precision="fp32", dropout=0.0,
    )  # fmt: skip
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(1.3)
    alone, shared = copy.deepcopy(model), copy.deepcopy(model)
    distil(alone, teacher, split, tokenizer, settings)
    train_in_processes(distil, 2, shared, teacher, split, tokenizer, settings)
    assert difference(shared, alone, model) < 1e-3


def test_killed_process_fails_the_training_and_takes_the_others_along(model, split, tokenizer):
    def kill_one(done: int, _total: int) -> None:
        if done == 2:
            os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)

    with pytest.raises(TrainingProcessDied, match="SIGKILL"):
        train_in_processes(train, 2, model, split, tokenizer, SETTINGS, on_progress=kill_one)
    assert not multiprocessing.active_children()


def test_process_killed_while_the_caller_looks_at_an_epoch_fails_the_training(model, split, tokenizer):
    def kill_all(_epoch: int) -> None:
        children = multiprocessing.active_children()
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        for child in children:
            child.join()

    with pytest.raises(TrainingProcessDied, match="SIGKILL"):
        train_in_processes(train, 2, model, split, tokenizer, SETTINGS, on_epoch=kill_all)


def test_caller_that_has_seen_enough_ends_the_training(model, split, tokenizer):
    def prune(epoch: int) -> None:
        raise Pruned(epoch)

    with pytest.raises(Pruned, match="1"):
        train_in_processes(train, 2, model, split, tokenizer, SETTINGS, on_epoch=prune)
    assert not multiprocessing.active_children()
