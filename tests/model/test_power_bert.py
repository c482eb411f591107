"""Soft extraction against loops and hard dropping, what a penalty buys, and re-training at what was learned."""

import copy
import dataclasses
import functools
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
)

from model.encoded import EncodedSplit
from model.encoder import HEADS, LengthAdaptiveModel
from model.evaluate import score
from model.length_config import LengthConfig
from model.macs import mean_macs
from model.power_bert import PowerBertSettings, SoftExtract, SoftExtractModel, learn_family, learn_retention, retrain
from model.tasks import CLASS_METRICS, choose_metric
from model.train import TrainingSettings, train
from model.training import TrainingDiverged

LENGTHS = (19, 30, 3, 30, 12, 2, 1)
ACCURACY = choose_metric(CLASS_METRICS, "accuracy")
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(30))]
PLAIN = TrainingSettings(
    learning_rate=5e-3, batch_size=16, plain_epochs=8, epochs=0, token_score="attention", precision="fp32"
)
SETTINGS = PowerBertSettings(
    penalty=0.1, mask_learning_rate=5e-2, learning_rate=1e-3, batch_size=16, epochs=12, positions=16, precision="fp32"
)


def random_factors(extract: SoftExtract, seed: int = 0) -> None:
    with torch.no_grad():
        extract.factors_NP.uniform_(0.1, 1.0, generator=torch.Generator().manual_seed(seed))


def steps(shares, positions) -> torch.Tensor:
    """Factors of 1 up to each layer's share of the positions, and 0 behind."""
    place = (torch.arange(positions) + 0.5) / positions
    return (place < torch.tensor(shares)[:, None]).float()


# What tokens are multiplied by


def test_every_token_has_the_mean_of_its_place_on_a_fine_grid():
    extract = SoftExtract(1, 5)
    random_factors(extract)
    score = torch.rand(1, 8, generator=torch.Generator().manual_seed(1))
    others = sorted(range(1, 8), key=lambda token: -score[0, token].item())
    grid = torch.repeat_interleave(extract.factors_NP[0].detach(), 7)  # 35 cells: 7 per factor, 5 per token
    expected = torch.ones(8)
    for place, token in enumerate(others):
        expected[token] = grid[5 * place : 5 * place + 5].mean()
    torch.testing.assert_close(extract(0, score)[0], expected)


def test_with_one_position_per_token_the_factor_of_a_rank_is_its_own():
    extract = SoftExtract(2, 4)
    random_factors(extract)
    score = torch.tensor([[0.1, 0.2, 0.9, 0.5, 0.3]])  # [CLS], then ranks 4, 1, 2, 3
    first, second, third, fourth = extract.factors_NP[1].tolist()
    torch.testing.assert_close(extract(1, score), torch.tensor([[1.0, fourth, first, second, third]]))


@pytest.mark.parametrize("count", [2, 3, 7, 16, 40])
def test_factors_of_a_sequence_average_to_the_share_of_the_layer(count):
    extract = SoftExtract(3, 12)
    random_factors(extract)
    factors = extract(2, torch.rand(1, count))[0]
    assert factors[1:].mean().item() == pytest.approx(extract.shares()[2].item(), abs=1e-6)
    assert factors[0] == 1.0


def test_padding_and_batch_mates_do_not_change_a_sequence():
    extract = SoftExtract(1, 10)
    random_factors(extract)
    score = torch.rand(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    together = extract(0, score, mask)
    for row, count in enumerate(LENGTHS):
        torch.testing.assert_close(together[row, :count], extract(0, score[row : row + 1, :count])[0])
    assert (together[~mask] == 1.0).all()


def test_first_token_is_kept_however_little_it_is_attended_to():
    extract = SoftExtract(1, 4)
    torch.nn.init.zeros_(extract.factors_NP)
    assert extract(0, torch.tensor([[0.0, 3.0, 2.0]])).tolist() == [[1.0, 0.0, 0.0]]


def test_factors_of_one_are_exactly_one_for_every_length():
    extract = SoftExtract(1, 7)
    for count in range(1, 60):
        assert (extract(0, torch.rand(1, count)) == 1.0).all()


# The network with soft extraction


@pytest.mark.parametrize("lengths", [LENGTHS, (12, 12), (1,)])
@torch.no_grad()
def test_with_all_factors_at_one_it_is_the_plain_model(model, make_batch, lengths):
    batch = make_batch(lengths)
    labels = torch.arange(len(lengths)) % 5
    softened, plain = SoftExtractModel(model, 16).eval()(**batch, labels=labels), model(**batch, labels=labels)
    torch.testing.assert_close(softened.logits, plain.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(softened.loss, plain.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "albert", "modernbert", "deberta-v2"])
@pytest.mark.parametrize("task", HEADS)
@torch.no_grad()
def test_with_all_factors_at_one_every_family_and_task_is_the_plain_model(model_type, task, make_batch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if model_type == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    labels = {"regression": 1, "question-answering": 2}.get(task, 3)
    special = {name: 0 for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")}
    common = {"vocab_size": 60, "max_position_embeddings": 64, "num_labels": labels, "pad_token_id": 0, **special}
    torch.manual_seed(0)
    network = HEADS[task].from_config(AutoConfig.for_model(model_type, **common, **sizes))
    model = LengthAdaptiveModel(network, task).eval()
    batch = make_batch((9, 20, 4))
    del batch["token_type_ids"]
    softened, plain = SoftExtractModel(model, 8).eval()(**batch), model(**batch)
    real = batch["attention_mask"].bool() if plain.logits.dim() == 3 else slice(None)
    torch.testing.assert_close(softened.logits[real], plain.logits[real], rtol=0, atol=1e-5)


@torch.no_grad()
def test_soft_extraction_follows_attention_layer_by_layer(make_network, make_batch):
    network = make_network()
    softened = SoftExtractModel(LengthAdaptiveModel(network), 13).eval()
    random_factors(softened.extract)
    batch = make_batch((14,))
    tokens = batch["input_ids"].size(1)
    hidden = network.bert.embeddings(batch["input_ids"], batch["token_type_ids"])
    for layer, block in enumerate(network.bert.encoder.layer):
        part = block.attention.self
        query, key, value = (
            projection(hidden)[0].view(tokens, 4, 8).transpose(0, 1)
            for projection in (part.query, part.key, part.value)
        )
        weights = (query @ key.transpose(1, 2) / math.sqrt(8)).softmax(-1)
        context = (weights @ value).transpose(0, 1).reshape(1, tokens, 32)
        attended = block.attention.output(context, hidden)
        received = weights.sum(dim=(0, 1)).tolist()
        others = sorted(range(1, tokens), key=lambda token: -received[token])
        for rank, token in enumerate(others):  # as many positions as others: one factor each
            attended[0, token] *= softened.extract.factors_NP[layer, rank]
        hidden = block.output(block.intermediate(attended), attended)
    expected = network.classifier(network.bert.pooler(hidden))
    torch.testing.assert_close(softened(**batch).logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_result_of_a_sequence_does_not_depend_on_its_batch_mates(model, make_batch):
    softened = SoftExtractModel(model, 10).eval()
    random_factors(softened.extract)
    batch = make_batch(LENGTHS)
    together = softened(**batch).logits
    for row, count in enumerate(LENGTHS):
        alone = softened(**{name: part[row : row + 1, :count] for name, part in batch.items()}).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_factors_of_nought_and_one_in_the_last_layer_are_drop_and_restore(make_batch):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=5,
        initializer_range=0.4,
    )
    model = LengthAdaptiveModel(BertForTokenClassification(config), "token-classification").eval()
    batch = make_batch((17, 17))
    softened = SoftExtractModel(model, 16).eval()
    softened.extract.factors_NP.copy_(steps((1.0, 0.5), 16))
    learned = softened.extract.length_config(17)
    assert learned.lengths(17) == (17, 9)  # [CLS] and half of the others
    hard = model(**batch, length_config=learned).logits
    torch.testing.assert_close(softened(**batch).logits, hard, rtol=0, atol=1e-5)
    assert not torch.allclose(hard, model(**batch).logits, atol=1e-2)


@pytest.mark.parametrize("task", ["classification", "token-classification"])
def test_gradient_of_the_factors_is_that_of_finite_differences(make_network, make_batch, task):
    network = make_network()
    labels = torch.tensor([0, 3, 1])
    if task == "token-classification":
        torch.manual_seed(0)
        network = BertForTokenClassification(network.config).eval()
        labels = torch.randint(0, 5, (3, 12))
    softened = SoftExtractModel(LengthAdaptiveModel(network, task), 6).double().eval()
    random_factors(softened.extract)
    batch = make_batch((12, 7, 4))

    def loss():
        logits = softened(**batch).logits
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    loss().backward()
    gradient, factors = softened.extract.factors_NP.grad, softened.extract.factors_NP.data
    for place in [(0, 0), (1, 2), (2, 5), (3, 3)]:
        losses = []
        for change in (1e-6, -1e-6):  # a small one, which leaves ranks and the order of factors as they are
            factors[place] += change
            with torch.no_grad():
                losses.append(loss().item())
            factors[place] -= change
        assert gradient[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-3, abs=1e-7)


def test_a_classifier_has_no_use_for_other_tokens_of_the_last_layer(model, make_batch):
    softened = SoftExtractModel(model, 6).eval()
    softened(**make_batch((12, 7)), labels=torch.tensor([0, 1])).loss.backward()
    gradient = softened.extract.factors_NP.grad
    assert (gradient[-1] == 0).all()
    assert (gradient[:-1] != 0).all()


# Penalty and read-off


def test_penalty_weighs_each_layers_share_by_the_layers_number():
    extract = SoftExtract(3, 4)
    extract.factors_NP.data.copy_(steps((1.0, 0.5, 0.25), 4))
    assert extract.penalty().item() == pytest.approx(1 * 1.0 + 2 * 0.5 + 3 * 0.25)
    extract.penalty().backward()
    torch.testing.assert_close(extract.factors_NP.grad, torch.tensor([[0.25], [0.5], [0.75]]).expand(3, 4))


def test_read_off_never_rises_and_keeps_the_first_token():
    extract = SoftExtract(4, 10)
    extract.factors_NP.data.copy_(steps((0.8, 0.4, 0.6, 0.0), 10))
    config = extract.length_config(21)
    assert config.lengths(21) == (17, 9, 9, 2)  # 1 + 20 times the share, but never below LengthConfig's floor
    assert config.shares == pytest.approx((17 / 21, 9 / 21, 9 / 21, 1 / 21), abs=1e-4)
    assert extract.length_config(1e9).shares[-1] > 0


def test_untouched_factors_are_read_off_as_the_full_config():
    for mean_tokens in (1.0, 25.3, 511.7):
        assert SoftExtract(4, 13).length_config(mean_tokens) == LengthConfig.full(4)


def test_factors_are_brought_back_into_their_range():
    extract = SoftExtract(1, 3)
    extract.factors_NP.data = torch.tensor([[-0.2, 0.5, 1.1]])
    extract.clamp()
    assert extract.factors_NP.tolist() == [[0.0, 0.5, 1.0]]


# Learning


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizerFast:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY))
    return BertTokenizerFast(vocab=str(path))


@pytest.fixture(scope="module")
def split() -> EncodedSplit:
    """The label is whether the word 5 or the word 6 stands somewhere in the sentence."""
    generator = np.random.default_rng(0)
    labels = np.arange(128) % 2
    rows = []
    for label in labels:
        words = generator.integers(7, 35, size=generator.integers(6, 16)).tolist()
        words.insert(int(generator.integers(len(words))), 5 if label else 6)
        rows.append([2, *words, 3])
    return EncodedSplit(input_ids=rows, token_type_ids=[[0] * len(row) for row in rows], labels=labels, num_truncated=0)


@pytest.fixture(scope="module")
def tuned(split, tokenizer) -> LengthAdaptiveModel:
    """An encoder that has learned the task at full length; do not change it."""
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
    model = LengthAdaptiveModel(BertForSequenceClassification(config))
    train(model, split, tokenizer, PLAIN)
    return model


@pytest.fixture
def tuned_copy(tuned) -> LengthAdaptiveModel:
    return copy.deepcopy(tuned)


def accuracy(model, split, config) -> float:
    return score(model, split, [config], ACCURACY)[0]


def cost(model, split, config) -> float:
    return mean_macs(model.shape, split.num_tokens, config) / mean_macs(model.shape, split.num_tokens)


def test_learned_config_is_clearly_cheaper_and_the_task_is_still_solved(tuned_copy, split, tokenizer):
    assert accuracy(tuned_copy, split, LengthConfig.full(3)) > 0.95
    config = learn_retention(tuned_copy, split, tokenizer, SETTINGS)
    assert cost(tuned_copy, split, config) < 0.5
    before = accuracy(tuned_copy, split, config)
    retrain(tuned_copy, split, tokenizer, dataclasses.replace(PLAIN, learning_rate=2e-3, plain_epochs=6), config)
    after = accuracy(tuned_copy, split, config)
    assert after >= max(before, 0.95)


def test_dearer_tokens_leave_fewer_of_them(split, tokenizer):
    """An encoder that learns no more and is right with every token: each one that goes is missed."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.4,
        num_labels=1,
    )
    model = LengthAdaptiveModel(BertForSequenceClassification(config), "regression").eval()
    with torch.no_grad():
        values = [model(torch.tensor([ids])).logits.item() for ids in split.input_ids]
    own = dataclasses.replace(split, labels=np.array(values, dtype=np.float32))
    fixed = dataclasses.replace(SETTINGS, learning_rate=1e-9)
    shares = []
    for penalty in (1e-3, 1e-2, 1e-1, 1.0):
        config = learn_retention(copy.deepcopy(model), own, tokenizer, dataclasses.replace(fixed, penalty=penalty))
        assert all(earlier >= later > 0 for earlier, later in pairwise(config.shares))
        shares.append(float(np.mean(config.shares[:3])))  # nobody reads what the last layer passes on
    assert all(cheap > dear + 0.1 for cheap, dear in pairwise(shares))
    assert shares[0] > 0.9


def test_what_costs_nothing_is_kept(tuned_copy, split, tokenizer):
    free = dataclasses.replace(SETTINGS, penalty=0.0, epochs=2)
    before = tuned_copy.fingerprint()
    assert learn_retention(tuned_copy, split, tokenizer, free) == LengthConfig.full(3)
    assert tuned_copy.fingerprint() != before  # the encoder is trained all the same


def test_without_a_task_to_learn_from_the_penalty_alone_takes_every_token(split, tokenizer, tuned_copy):
    dear = dataclasses.replace(SETTINGS, penalty=1e6, epochs=6, warmup_ratio=0.0)
    config = learn_retention(tuned_copy, split, tokenizer, dear)
    assert config.shares == pytest.approx((1 / split.num_tokens.mean(),) * 3, abs=1e-4)


def test_encoder_and_factors_have_learning_rates_of_their_own(tuned_copy, split, tokenizer, monkeypatch):
    groups = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        groups.append(
            [(group["initial_lr"], group["weight_decay"], len(group["params"])) for group in self.param_groups]
        )
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    learn_retention(tuned_copy, split, tokenizer, dataclasses.replace(SETTINGS, epochs=1, weight_decay=0.2))
    (decayed, plain, factors) = groups[0]
    assert (decayed[:2], plain[:2], factors) == ((1e-3, 0.2), (1e-3, 0.0), (5e-2, 0.0, 1))
    assert decayed[2] + plain[2] == len(list(tuned_copy.parameters()))


def test_same_seed_learns_the_same_config_and_weights(tuned, split, tokenizer):
    results = []
    for seed in (1, 1, 2):
        model = copy.deepcopy(tuned)
        config = learn_retention(model, split, tokenizer, dataclasses.replace(SETTINGS, epochs=3, seed=seed))
        results.append((config, model.fingerprint()))
    assert results[0] == results[1] != results[2]


def test_every_task_learns_a_config(split, tokenizer):
    generator = np.random.default_rng(0)
    labels = {
        "regression": generator.normal(size=32).astype(np.float32),
        "question-answering": np.array([[1, 2]] * 32),
        "token-classification": [generator.integers(0, 3, size=count).tolist() for count in split.num_tokens[:32]],
    }
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    for task, wanted in labels.items():
        config = BertConfig(**sizes, intermediate_size=32, num_labels=1 if task == "regression" else 3)
        config.num_labels = 2 if task == "question-answering" else config.num_labels
        model = LengthAdaptiveModel(HEADS[task].from_config(config), task)
        some = dataclasses.replace(split.take(range(32)), labels=wanted)
        learned = learn_retention(model, some, tokenizer, dataclasses.replace(SETTINGS, epochs=2))
        assert learned.num_layers == 2
        assert learned.shares[-1] < 1.0


def test_bf16_training_learns_about_the_same_shares(tuned, split, tokenizer):
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no bf16 products")
    shares = [
        learn_retention(
            copy.deepcopy(tuned), split, tokenizer, dataclasses.replace(SETTINGS, precision=precision)
        ).shares
        for precision in ("fp32", "bf16")
    ]
    assert np.mean(shares[0]) == pytest.approx(np.mean(shares[1]), abs=0.15)


def test_hooks_see_every_step_and_epoch(tuned_copy, split, tokenizer):
    seen, epochs = [], []
    settings = dataclasses.replace(SETTINGS, epochs=2)
    hooks = {"on_epoch": epochs.append, "on_progress": lambda *step: seen.append(step)}
    learn_retention(tuned_copy, split, tokenizer, settings, **hooks)
    assert epochs == [1, 2]
    assert seen == [(step, 16) for step in range(1, 17)]


def test_memory_that_runs_out_halves_the_batch_and_leaves_the_result(tuned, split, tokenizer, monkeypatch):
    settings = dataclasses.replace(SETTINGS, epochs=2)
    whole, halved = copy.deepcopy(tuned), copy.deepcopy(tuned)
    expected = learn_retention(whole, split, tokenizer, settings)
    forward, rows = SoftExtractModel.forward, []

    @functools.wraps(forward)
    def small(self, input_ids, *args, **kwargs):
        if len(input_ids) > 5:
            raise MemoryError
        rows.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(SoftExtractModel, "forward", small)
    config = learn_retention(halved, split, tokenizer, settings)
    assert max(rows) == 4
    assert config.shares == pytest.approx(expected.shares, abs=1e-3)
    for (name, ours), theirs in zip(halved.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4, msg=name)


def test_loss_that_is_not_finite_ends_the_training(tuned_copy, split, tokenizer):
    tuned_copy.network.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="nan at step 1"):
        learn_retention(tuned_copy, split, tokenizer, SETTINGS)


def test_empty_split_is_refused(tuned_copy, split, tokenizer):
    with pytest.raises(ValueError, match="empty"):
        learn_retention(tuned_copy, split.take([]), tokenizer, SETTINGS)


# Families of configs


def test_family_has_one_config_per_penalty_without_repetitions(tuned, split, tokenizer):
    built = []

    def factory():
        built.append(copy.deepcopy(tuned))
        return built[-1]

    settings = dataclasses.replace(SETTINGS, epochs=3)
    configs = learn_family(factory, split, tokenizer, settings, (0.0, 0.3, 0.0))
    alone = learn_retention(copy.deepcopy(tuned), split, tokenizer, dataclasses.replace(settings, penalty=0.3))
    assert configs == [LengthConfig.full(3), alone]
    assert len(built) == 3


def test_family_is_refused_before_anything_is_trained(split, tokenizer):
    def factory():
        raise AssertionError("built a model")

    with pytest.raises(ValueError, match="No penalties"):
        learn_family(factory, split, tokenizer, SETTINGS, ())
    with pytest.raises(ValueError, match=r"penalty=-1\.0"):
        learn_family(factory, split, tokenizer, SETTINGS, (0.1, -1.0))


# Re-training


def test_retraining_runs_every_step_at_the_config_and_learns_from_the_labels(tuned, split, tokenizer):
    config = LengthConfig.from_shares((0.8, 0.5, 0.3))
    settings = dataclasses.replace(PLAIN, batch_size=128, plain_epochs=0, epochs=1, warmup_ratio=0.0, weight_decay=0.0)
    reference, retrained = copy.deepcopy(tuned), copy.deepcopy(tuned)
    report = retrain(retrained, split, tokenizer, settings, config)
    batch = tokenizer.pad({"input_ids": split.input_ids}, return_tensors="pt")
    optimizer = torch.optim.AdamW(reference.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    reference.train()
    loss = F.cross_entropy(reference(**batch, length_config=config).logits, torch.from_numpy(split.labels))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), settings.max_grad_norm)
    optimizer.step()
    assert report.steps == 1
    large = 0.1 * settings.learning_rate  # Adam's first step is the gradient's sign, which noise decides near 0
    for (name, one), other in zip(retrained.named_parameters(), reference.parameters(), strict=True):
        assert ((one - other).abs() < large).float().mean() > 0.98, name
    assert retrained.fingerprint() != tuned.fingerprint()


def test_retraining_recovers_what_a_short_config_loses(tuned_copy, split, tokenizer):
    config = LengthConfig.from_shares((0.3, 0.2, 0.1))
    before = accuracy(tuned_copy, split, config)
    seen, epochs = [], []
    hooks = {"on_epoch": epochs.append, "on_progress": lambda *step: seen.append(step)}
    retrain(tuned_copy, split, tokenizer, PLAIN, config, **hooks)
    assert accuracy(tuned_copy, split, config) >= before
    assert epochs == list(range(1, 9))
    assert seen == [(step, 64) for step in range(1, 65)]


def test_retraining_leaves_the_model_as_free_of_a_config_as_before(tuned_copy, split, tokenizer, make_batch):
    retrain(tuned_copy, split, tokenizer, PLAIN, LengthConfig.from_shares((0.5, 0.4, 0.3)))
    tuned_copy.eval()
    ids = torch.tensor([[2, 9, 5, 12, 8, 3]])
    with torch.no_grad():
        torch.testing.assert_close(tuned_copy(ids).logits, tuned_copy.network(ids).logits, rtol=0, atol=1e-5)


def test_config_of_another_depth_is_refused(tuned_copy, split, tokenizer):
    with pytest.raises(ValueError, match="2 layers, the model 3"):
        retrain(tuned_copy, split, tokenizer, PLAIN, LengthConfig.full(2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("penalty", -0.1),
        ("penalty", float("nan")),
        ("mask_learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("batch_size", 0),
        ("epochs", 0),
        ("warmup_ratio", 1.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("precision", "fp8"),
        ("positions", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        dataclasses.replace(SETTINGS, **{name: value})
