"""The sandwich step, LengthDrop's draws, distillation direction, seeds and failures."""

import copy
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, TrainingArguments, set_seed

from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.evaluate import score
from model.length_config import LengthConfig
from model.tasks import CLASS_METRICS, choose_metric
from model.train import LengthDropTrainer, TrainingSettings, sample_sandwich, train
from model.training import TrainingDiverged, as_dataset

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(30))]


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizerFast:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY))
    return BertTokenizerFast(vocab=str(path))


@pytest.fixture
def model() -> LengthAdaptiveModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return LengthAdaptiveModel(BertForSequenceClassification(config))


@pytest.fixture
def split() -> EncodedSplit:
    """The label is whether the word 5 stands in the sentence."""
    generator = np.random.default_rng(0)
    labels = np.arange(64) % 2
    rows = [
        [2, *generator.integers(6, 35, size=length), 5 if label else 6, 3]
        for length, label in zip(generator.integers(2, 12, size=64), labels, strict=True)
    ]
    ids = [[int(token) for token in row] for row in rows]
    return EncodedSplit(input_ids=ids, token_type_ids=[[0] * len(row) for row in ids], labels=labels, num_truncated=0)


SETTINGS = TrainingSettings(
    learning_rate=5e-3, batch_size=16, plain_epochs=1, epochs=2, length_drop=0.3, layer_drop=0.1, precision="fp32"
)


def test_training_learns_the_task_at_full_and_at_reduced_length(model, split, tokenizer):
    report = train(model, split, tokenizer, dataclasses.replace(SETTINGS, epochs=12))
    configs = [LengthConfig.full(3), LengthConfig.from_retention((0.8, 0.8, 0.8))]
    assert min(score(model, split, configs, choose_metric(CLASS_METRICS, "accuracy"))) > 0.9
    assert (report.steps, report.precision) == (4 * 13, "fp32")


def test_a_process_trains_on_one_gpu_where_there_are_more(model, split, tokenizer, monkeypatch):
    """With two the Trainer would take batches twice the size, and run them on both."""
    seen = property(lambda arguments: 1 if (arguments.device and arguments._n_gpu) == 1 else 2)
    monkeypatch.setattr(TrainingArguments, "n_gpu", seen)
    assert train(model, split, tokenizer, SETTINGS).steps == 4 * 3


def test_first_pass_of_each_step_is_full_and_the_second_the_smallest(model, split, tokenizer, monkeypatch):
    calls = []
    forward = LengthAdaptiveModel.forward

    @functools.wraps(forward)  # the Trainer reads its columns off the signature
    def spy(self, *args, length_config=None, **kwargs):
        calls.append(length_config)
        return forward(self, *args, length_config=length_config, **kwargs)

    monkeypatch.setattr(LengthAdaptiveModel, "forward", spy)
    train(model, split, tokenizer, dataclasses.replace(SETTINGS, layer_drop=0.5))
    assert calls[:4] == [None] * 4  # the plain epoch: four batches
    steps = [calls[start : start + 4] for start in range(4, len(calls), 4)]
    assert len(steps) == 8
    for step in steps:
        assert step[0] is None  # LayerDrop never touches the teacher
        assert step[1] == LengthConfig.from_retention((0.7, 0.7, 0.7), step[1].skipped)
        assert all(config is not None for config in step[1:])
    assert any(config.skipped for step in steps for config in step[1:])


def test_gradient_of_a_step_is_the_mean_over_its_passes(model, split, tokenizer):
    settings = dataclasses.replace(
        SETTINGS, plain_epochs=0, epochs=1, layer_drop=0.0, temperature=2.0, distillation_weight=0.7
    )
    reference = LengthAdaptiveModel(BertForSequenceClassification(model.network.config))
    reference.load_state_dict(model.state_dict())
    trainer = build_trainer(model, split, tokenizer, settings)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(model, dict(batch))

    reference.train()
    labels = batch.pop("labels")
    batch.pop("length", None)
    full = reference(**batch)
    loss = F.cross_entropy(full.logits, labels)
    target = (full.logits.detach() / 2).softmax(-1)
    for config in sample_sandwich(settings, 3, np.random.default_rng(settings.seed)):
        logits = reference(**batch, length_config=config).logits
        divergence = (target * (target.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
        loss = loss + 0.7 * 4 * divergence + 0.3 * F.cross_entropy(logits, labels)
    (loss / 4).backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def build_trainer(model, split, tokenizer, settings) -> LengthDropTrainer:
    from transformers import DataCollatorWithPadding, TrainingArguments

    arguments = TrainingArguments(per_device_train_batch_size=16, use_cpu=True, report_to=[], disable_tqdm=True)
    return LengthDropTrainer(
        settings,
        model=model,
        args=arguments,
        train_dataset=as_dataset(split),
        data_collator=DataCollatorWithPadding(tokenizer),
    )


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.cuda.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_memory_that_runs_out_halves_the_batch_and_leaves_the_result(
    model, split, tokenizer, monkeypatch, caplog, error
):
    whole = copy.deepcopy(model)
    train(whole, split, tokenizer, SETTINGS)
    forward, rows = LengthAdaptiveModel.forward, []

    @functools.wraps(forward)
    def small(self, input_ids, *args, length_config=None, **kwargs):
        if len(input_ids) > 5 and length_config is not None:  # after the full pass, whose gradient is there by then
            raise error
        rows.append(len(input_ids))
        return forward(self, input_ids, *args, length_config=length_config, **kwargs)

    monkeypatch.setattr(LengthAdaptiveModel, "forward", small)
    train(model, split, tokenizer, SETTINGS)
    assert max(rows[100:]) == 4
    assert "in 4 parts" in caplog.text
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4, msg=name)


def test_other_errors_of_a_step_end_the_training(model, split, tokenizer, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("model.train.LengthDropTrainer._learn", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(model, split, tokenizer, SETTINGS)


def test_sampled_retentions_fill_the_range_of_length_drop():
    generator = np.random.default_rng(0)
    settings = dataclasses.replace(SETTINGS, length_drop=0.25, sandwich_size=200, layer_drop=0.0)
    smallest, *sampled = sample_sandwich(settings, 4, generator)
    assert smallest == LengthConfig.from_retention((0.75,) * 4)
    shares = np.array([config.shares for config in sampled])
    retention = shares / np.hstack([np.ones((200, 1)), shares[:, :-1]])
    assert retention.min() >= 0.75 - 1e-12
    assert retention.max() <= 1.0 + 1e-12
    assert abs(retention.mean() - 0.875) < 0.01


def test_layer_drop_rate_is_the_one_asked_for():
    settings = dataclasses.replace(SETTINGS, layer_drop=0.2, sandwich_size=999)
    skipped = [len(config.skipped) for config in sample_sandwich(settings, 6, np.random.default_rng(0))]
    assert abs(np.mean(skipped) / 6 - 0.2) < 0.02


def test_layer_drop_leaves_a_layer_in_every_pass():
    settings = dataclasses.replace(SETTINGS, layer_drop=0.9, sandwich_size=99)
    computed = [len(config.computed) for config in sample_sandwich(settings, 2, np.random.default_rng(0))]
    assert min(computed) == 1
    assert max(computed) == 2


def test_a_checkpoint_records_the_layer_drop_it_was_trained_with(model, split, tokenizer, tmp_path):
    assert model.layer_drop == 0.0
    train(model, split, tokenizer, dataclasses.replace(SETTINGS, plain_epochs=0, epochs=1, layer_drop=0.25))
    model.save_pretrained(tmp_path)
    assert LengthAdaptiveModel.from_pretrained(tmp_path).layer_drop == 0.25
    train(model, split, tokenizer, dataclasses.replace(SETTINGS, plain_epochs=1, epochs=0, layer_drop=0.0))
    assert model.layer_drop == 0.0


def test_one_step_changes_every_parameter(model, split, tokenizer):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, split, tokenizer, dataclasses.replace(SETTINGS, plain_epochs=0, epochs=1, warmup_ratio=0.0))
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unchanged == []


def test_same_seed_trains_the_same_weights(model, split, tokenizer):
    weights = model.state_dict()
    start = {name: value.clone() for name, value in weights.items()}
    results = []
    for seed in (1, 1, 2):
        model.load_state_dict(start)
        set_seed(seed)
        train(model, split, tokenizer, dataclasses.replace(SETTINGS, seed=seed))
        results.append(model.fingerprint())
    assert results[0] == results[1] != results[2]


def test_loss_that_is_not_finite_ends_the_training(model, split, tokenizer):
    model.network.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="nan at step 1"):
        train(model, split, tokenizer, SETTINGS)


def test_hooks_see_every_step_and_epoch(model, split, tokenizer):
    steps, epochs = [], []
    train(model, split, tokenizer, SETTINGS, on_epoch=epochs.append, on_progress=lambda *step: steps.append(step))
    assert epochs == [1, 2, 3]
    assert steps == [(step, 12) for step in range(1, 13)]


def test_bf16_training_stays_close_to_fp32(model, split, tokenizer):

    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no bf16 products")
    report = train(model, split, tokenizer, dataclasses.replace(SETTINGS, epochs=12, precision="bf16"))
    assert report.precision == "bf16"
    assert score(model, split, [LengthConfig.full(3)], choose_metric(CLASS_METRICS, "accuracy"))[0] > 0.9


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("batch_size", 0),
        ("epochs", -1),
        ("warmup_ratio", 1.0),
        ("weight_decay", -0.1),
        ("length_drop", 1.0),
        ("layer_drop", -0.1),
        ("sandwich_size", -1),
        ("temperature", 0.0),
        ("distillation_weight", 1.1),
        ("divergence", "sideways"),
        ("token_score", "norm"),
        ("precision", "fp8"),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        dataclasses.replace(SETTINGS, **{name: value})


def test_empty_split_is_refused(model, tokenizer):
    empty = EncodedSplit(input_ids=[], token_type_ids=[], labels=np.array([], dtype=np.int64), num_truncated=0)
    with pytest.raises(ValueError, match="empty"):
        train(model, empty, tokenizer, SETTINGS)


@pytest.mark.parametrize("token_score", [None, "attention", "value_norm"])
def test_the_trained_model_ranks_tokens_as_it_was_trained_to(model, split, tokenizer, token_score):
    settings = SETTINGS if token_score is None else dataclasses.replace(SETTINGS, token_score=token_score)
    train(model, split, tokenizer, settings)
    assert model.token_score == (token_score or "value_norm")


def test_with_a_teacher_the_full_pass_learns_from_it_rather_than_from_wrong_labels(model, split, tokenizer):
    teacher = copy.deepcopy(model)
    train(teacher, split, tokenizer, dataclasses.replace(SETTINGS, epochs=12))
    before = teacher.fingerprint()
    wrong = dataclasses.replace(split, labels=1 - split.labels)
    settings = dataclasses.replace(SETTINGS, plain_epochs=13, epochs=0, teacher_weight=1.0)
    train(model, wrong, tokenizer, settings, teacher=teacher)
    full = [LengthConfig.full(3)]
    accuracy = choose_metric(CLASS_METRICS, "accuracy")
    assert score(model, split, full, accuracy)[0] > 0.9
    assert teacher.fingerprint() == before, "a teacher does not learn"


def test_a_teacher_of_no_weight_changes_nothing(model, split, tokenizer):
    alone, taught = copy.deepcopy(model), copy.deepcopy(model)
    settings = dataclasses.replace(SETTINGS, teacher_weight=0.0)
    train(alone, split, tokenizer, settings)
    train(taught, split, tokenizer, settings, teacher=copy.deepcopy(model))
    assert taught.fingerprint() == alone.fingerprint()
