"""Scoring many configs in one walk against running each alone, and how much computation the walk shares."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.data import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.evaluate import predict, score
from model.length_config import LengthConfig
from model.tasks import get_metric

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [9, 4, 9, 21, 2, 9, 21, 1, 4, 9, 33, 9]


def random_configs(count, seed):
    generator = np.random.default_rng(seed)
    return [LengthConfig.from_retention(retention) for retention in generator.choice([0.4, 0.7, 0.9, 1.0], (count, 4))]


@pytest.fixture
def model(make_network):
    """An encoder with so many classes that dropping tokens changes its answers."""
    return LengthAdaptiveModel(make_network(num_labels=200)).eval()


@pytest.fixture
def configs():
    """Shares and caps, the full length, and two that are equal."""
    random = random_configs(12, seed=0)
    caps = LengthConfig.from_lengths((20, 20, 8, 3), max_length=64)
    return [random[3], LengthConfig.full(4), *random, caps, random[3]]


@pytest.fixture
def split(make_batch):
    return as_split(make_batch(LENGTHS), LENGTHS)


def as_split(batch, lengths):
    rows = [list(range(count)) for count in lengths]
    return EncodedSplit(
        input_ids=[batch["input_ids"][row, : len(ids)].tolist() for row, ids in enumerate(rows)],
        token_type_ids=[batch["token_type_ids"][row, : len(ids)].tolist() for row, ids in enumerate(rows)],
        labels=np.arange(len(lengths)) % 5,
        num_truncated=0,
    )


def predict_one_by_one(model, split, configs):
    """Each config and each example in a forward pass of its own."""
    with torch.no_grad():
        return [
            [
                int(
                    model(
                        torch.tensor([ids]), token_type_ids=torch.tensor([types]), length_config=config
                    ).logits.argmax()
                )
                for ids, types in zip(split.input_ids, split.token_type_ids, strict=True)
            ]
            for config in configs
        ]


class Calls:
    """A family that computes as `inner` does and counts."""

    def __init__(self, inner):
        self.inner, self.attended, self.scored, self.fed = inner, 0, 0, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def attend(self, network, layer, hidden, mask, with_scores):
        assert mask is None, "nothing is padded"
        self.attended += 1
        self.scored += with_scores
        return self.inner.attend(network, layer, hidden, mask, with_scores)

    def feed_forward(self, network, layer, attended):
        self.fed += 1
        return self.inner.feed_forward(network, layer, attended)


@pytest.fixture
def calls(model):
    model.family = Calls(model.family)
    return model.family


@pytest.mark.parametrize("tokens_per_batch", [1, 18, 30, 2048])
def test_predictions_equal_one_pass_per_config_and_example(model, split, configs, tokens_per_batch):
    predictions = predict(model, split, configs, tokens_per_batch=tokens_per_batch)
    assert predictions.dtype == np.int64
    assert predictions.tolist() == predict_one_by_one(model, split, configs)
    assert len({tuple(row) for row in predictions.tolist()}) > 3, "the configs should not all agree"


def test_the_order_of_configs_does_not_matter(model, split, configs):
    predictions = predict(model, split, configs)
    np.testing.assert_array_equal(predict(model, split, configs[::-1]), predictions[::-1])


def test_no_configs_and_no_examples_give_empty_arrays(model, split, configs, make_batch):
    assert predict(model, split, []).shape == (0, len(LENGTHS))
    assert predict(model, as_split({}, []), configs).shape == (len(configs), 0)


def test_configs_of_another_number_of_layers_are_refused(model, split):
    with pytest.raises(ValueError, match="length config has 3 layers, the model 4"):
        predict(model, split, [LengthConfig.full(4), LengthConfig.full(3)])


def test_configs_with_a_common_beginning_share_its_computation(model, calls, make_batch):
    split = as_split(make_batch([10, 10]), [10, 10])
    caps = [(8, 6, 6, 2), (8, 6, 3, 3), (8, 8, 8, 8), (8, 6, 6, 2), (10, 10, 10, 10)]
    predict(model, split, [LengthConfig.from_lengths(lengths, max_length=10) for lengths in caps])
    # layer 0 once; after it 8 or 10; after that 8-6, 8-8 or 10-10; then 8-6-6, 8-6-3, 8-8-8 or 10-10-10
    assert calls.attended == 1 + 2 + 3 + 4
    assert calls.fed == 2 + 3 + 4 + 4
    assert calls.scored == 1 + 1 + 1 + 1  # where a config drops: at the root, after 8, after 8-6, after 8-6-6


def test_each_distinct_prefix_of_counts_is_computed_once_per_batch(model, calls, split):
    configs = random_configs(40, seed=1)
    predict(model, split, configs)
    attended = fed = 0
    for num_tokens in set(LENGTHS):
        prefixes = {config.lengths(num_tokens)[:layers] for config in configs for layers in range(5)}
        attended += sum(len(prefix) < 4 for prefix in prefixes)
        fed += sum(len(prefix) > 0 for prefix in prefixes)
    assert (calls.attended, calls.fed) == (attended, fed)


def test_batches_hold_no_more_tokens_than_asked(model, calls, split):
    predict(model, split, [LengthConfig.full(4)], tokens_per_batch=18)
    # two rows of 9 fit, hence three batches for the five; the rows of 21 and 33 go alone
    batches = {1: 1, 2: 1, 4: 1, 9: 3, 21: 2, 33: 1}
    assert calls.attended == 4 * sum(batches.values())
    assert calls.scored == 0, "the full length needs no scores"


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_left_as_it_was(make_network, split, configs, training):
    network = make_network(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    expected = predict(LengthAdaptiveModel(network).eval(), split, configs)
    model = LengthAdaptiveModel(network).train(training)
    np.testing.assert_array_equal(predict(model, split, configs), expected)
    assert all(module.training == training for module in model.modules())


def test_the_mode_is_restored_after_an_interruption(model, split, configs):
    def interrupt(share):
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        predict(model, split, configs, on_progress=interrupt)
    assert model.training


def test_progress_is_the_share_of_tokens_done(model, split, configs):
    shares = []
    predict(model, split, configs, tokens_per_batch=18, on_progress=shares.append)
    total = sum(LENGTHS)
    done = np.cumsum([1, 2, 8, 18, 18, 9, 21, 21, 33])
    assert shares == pytest.approx((done / total).tolist())
    assert shares[-1] == 1.0


def test_scores_are_the_metric_of_each_configs_predictions(model, split, configs):
    shares = []
    labels = predict_one_by_one(model, split, [LengthConfig.full(4)])[0]
    labels[3] += 1  # all but one answer of the full length are right
    split = replace(split, labels=np.array(labels))
    scores = score(model, split, configs, get_metric("accuracy"), on_progress=shares.append)
    hits = [
        sum(guess == label for guess, label in zip(row, split.labels, strict=True))
        for row in predict_one_by_one(model, split, configs)
    ]
    assert scores == pytest.approx([count / len(LENGTHS) for count in hits])
    assert scores[configs.index(LengthConfig.full(4))] == pytest.approx(11 / 12)
    assert shares[-1] == 1.0
