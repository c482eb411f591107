"""Scoring many configs in one walk against running each alone, and how much computation the walk shares."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.encoder import LengthAdaptiveModel
from model.evaluate import Evaluator, choose_precision, predict, score, stratified_blocks
from model.length_config import LengthConfig
from model.tasks import CLASS_METRICS, choose_metric

LENGTHS = [9, 4, 9, 21, 2, 9, 21, 1, 4, 9, 33, 9]


def random_configs(count, seed, skip=0.0):
    """Random configs that skip a layer with this probability, but not every layer."""
    generator = np.random.default_rng(seed)
    retentions = generator.choice([0.4, 0.7, 0.9, 1.0], (count, 4))
    skips = generator.random((count, 4)) < skip
    skips[skips.all(axis=1)] = False
    return [LengthConfig.from_retention(row, np.flatnonzero(skip)) for row, skip in zip(retentions, skips, strict=True)]


@pytest.fixture
def model(make_network):
    """An encoder with so many classes that dropping tokens changes its answers."""
    return LengthAdaptiveModel(make_network(num_labels=200)).eval()


@pytest.fixture
def configs():
    """Shares and caps, the full length, some that skip layers, and two that are equal."""
    random = [*random_configs(12, seed=0), *random_configs(12, seed=1, skip=0.4)]
    caps = LengthConfig.from_lengths((20, 20, 8, 3), max_length=64)
    return [random[3], LengthConfig.full(4), *random, caps, random[3]]


@pytest.fixture
def split(make_batch, unpadded):
    return unpadded(make_batch(LENGTHS), np.arange(len(LENGTHS)) % 5)


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


class Rows:
    """A family that computes as `inner` does and counts the rows that go through each part."""

    def __init__(self, inner):
        self.inner, self.projected, self.mixed, self.scored, self.fed = inner, [], 0, 0, []
        self.read_first = 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def project(self, network, layer, hidden):
        self.projected.append(hidden.size(0))
        return self.inner.project(network, layer, hidden)

    def mix(self, network, layer, projected, positions, mask, with_scores):
        assert mask is None, "nothing is padded"
        rows = projected.size(0) * projected.size(1)
        self.mixed += rows
        self.scored += rows * with_scores
        return self.inner.mix(network, layer, projected, positions, mask, with_scores)

    def project_for_first(self, network, layer, hidden):
        self.projected.append(hidden.size(0))
        return self.inner.project_for_first(network, layer, hidden)

    def mix_first(self, network, layer, first, projected, positions):
        self.read_first += projected.size(0) * projected.size(1)
        return self.inner.mix_first(network, layer, first, projected, positions)

    def feed_forward(self, network, layer, attended):
        self.fed.append(attended.size(0))
        return self.inner.feed_forward(network, layer, attended)


@pytest.fixture
def rows(model, monkeypatch):
    """Counts rows, of which none are fillers."""
    monkeypatch.setattr("model.evaluate.ROW_STEP", 1)
    model.family = Rows(model.family)
    return model.family


@pytest.mark.parametrize("rows_per_chunk", [1, 18, 30, 2048])
@pytest.mark.parametrize("num_blocks", [1, 5])
def test_predictions_equal_one_pass_per_config_and_example(model, split, configs, rows_per_chunk, num_blocks):
    evaluator = Evaluator(model, split, rows_per_chunk=rows_per_chunk, num_blocks=num_blocks)
    predictions = evaluator.predict(configs)
    assert predictions.dtype == np.int32
    assert predictions.tolist() == predict_one_by_one(model, split, configs)
    assert len({tuple(row) for row in predictions.tolist()}) > 3, "the configs should not all agree"


def test_the_engine_ranks_tokens_as_the_checkpoint_says(model, split, configs):
    by_attention = predict(model, split, configs)
    model.token_score = "value_norm"
    predictions = predict(model, split, configs)
    assert predictions.tolist() == predict_one_by_one(model, split, configs)
    assert (predictions != by_attention).any()


def test_a_block_is_predicted_in_its_own_order(model, split, configs):
    evaluator = Evaluator(model, split, num_blocks=3)
    expected = np.array(predict_one_by_one(model, split, configs))
    for number, block in enumerate(evaluator.blocks):
        np.testing.assert_array_equal(evaluator.predict_block(number, configs), expected[:, block])


def test_the_order_of_configs_does_not_matter(model, split, configs):
    predictions = predict(model, split, configs)
    np.testing.assert_array_equal(predict(model, split, configs[::-1]), predictions[::-1])


def test_no_configs_and_no_examples_give_empty_arrays(model, split, configs):
    assert predict(model, split, []).shape == (0, len(LENGTHS))
    assert predict(model, split.take([]), configs).shape == (len(configs), 0)


def test_configs_of_another_number_of_layers_are_refused(model, split):
    with pytest.raises(ValueError, match="length config has 3 layers, the model 4"):
        predict(model, split, [LengthConfig.full(4), LengthConfig.full(3)])


def test_configs_with_a_common_beginning_share_its_computation(model, rows, make_batch, unpadded):
    split = unpadded(make_batch([10, 10]))
    caps = [(8, 6, 6, 2), (8, 6, 3, 3), (8, 8, 8, 8), (8, 6, 6, 2), (10, 10, 10, 10)]
    predict(model, split, [LengthConfig.from_lengths(lengths, max_length=10) for lengths in caps])
    # attention: layer 0 once, then after 8 and 10, then after 8-6, 8-8 and 10-10
    assert rows.mixed == 2 * (10 + (8 + 10) + (6 + 8 + 10))
    # the last layer: after 8-6-6, 8-6-3, 8-8-8 and 10-10-10, whatever it would keep, and for the first token only
    assert rows.read_first == 2 * (6 + 3 + 8 + 10)
    # row by row: at each node once for the most that is kept of it, 10; 8 and 10; 6 and not 3, 8, 10
    assert sum(rows.fed) == 2 * (10 + (8 + 10) + (6 + 8 + 10) + 4 * 1)
    assert sum(rows.projected) == 2 * (10 + 10 + (8 + 10) + (6 + 8 + 10))
    assert rows.scored == 2 * (10 + 8 + 6)  # where a config drops: at the root, after 8, after 8-6


def path_of(config, num_tokens):
    """The length, then what each layer keeps that is computed and 0 for the others; of the last one the first token."""
    counts = [0 if layer in config.skipped else kept for layer, kept in enumerate(config.lengths(num_tokens))]
    counts[config.computed[-1]] = 1
    return (num_tokens, *counts)


@pytest.mark.parametrize("rows_per_chunk", [18, 2048])
def test_a_skipped_layer_is_not_computed(model, rows, split, rows_per_chunk):
    """And of the other layers each distinct beginning is, once per example."""
    configs = random_configs(40, seed=1, skip=0.4)
    Evaluator(model, split, rows_per_chunk=rows_per_chunk, cache_bytes=0).predict(configs)
    attended = fed = read_first = 0
    for num_tokens in LENGTHS:
        for layer in range(4):
            children = {}
            for config in configs:
                path = path_of(config, num_tokens)
                children.setdefault(path[: layer + 1], set()).add(path[layer + 1])
            for prefix, kept in children.items():
                arriving = [count for count in prefix if count][-1] * (max(kept) > 0)
                attended += arriving * (layer < 3)
                read_first += arriving * (layer == 3)
                fed += max(kept)
    assert (rows.mixed, rows.read_first, sum(rows.fed)) == (attended, read_first, fed)
    # of the queries, keys and values none is computed that no layer asks for
    assert sum(rows.projected) <= attended + read_first


def test_one_config_asks_each_layer_for_what_arrives_there(model, rows, make_batch, unpadded):
    split = unpadded(make_batch([10, 10]))
    skipping = LengthConfig.from_lengths((8, 8, 8, 3), max_length=10, skipped=(1, 2))
    Evaluator(model, split, cache_bytes=0).predict([skipping])
    assert (rows.projected, rows.mixed, rows.read_first, rows.fed) == ([20, 16], 20, 16, [16, 2])
    rows.projected.clear()
    Evaluator(model, split, cache_bytes=0).predict([LengthConfig.full(4, (1, 2, 3))])
    assert rows.projected == [20]


def test_configs_of_one_effect_share_one_answer(model, rows, split):
    evaluator = Evaluator(model, split)
    first, second = (LengthConfig.from_retention((0.7, 0.9, last, 0.5), skipped=(0, 3)) for last in (0.2, 0.8))
    answers = evaluator.predict([first])
    computed = evaluator.rows_computed
    np.testing.assert_array_equal(evaluator.predict([second]), answers)
    assert evaluator.rows_computed == computed, "what the last layer keeps decides nothing, whichever is the last"


@pytest.mark.parametrize("rows_per_chunk", [18, 2048])
def test_what_is_remembered_serves_configs_that_skip_other_layers(model, split, rows_per_chunk):
    evaluator = Evaluator(model, split, rows_per_chunk=rows_per_chunk, num_blocks=2)
    for seed in range(5):
        configs = [*random_configs(6, seed, skip=0.5), *random_configs(2, seed)]
        expected = predict(model, split, configs)
        np.testing.assert_array_equal(evaluator.predict(configs), expected)
        np.testing.assert_array_equal(evaluator.predict(configs[::2]), expected[::2])


@pytest.mark.parametrize("rows_per_chunk", [18, 2048])
def test_each_distinct_prefix_of_counts_is_computed_once_per_example(model, rows, split, rows_per_chunk):
    configs = random_configs(40, seed=1)
    Evaluator(model, split, rows_per_chunk=rows_per_chunk, cache_bytes=0).predict(configs)
    attended = fed = read_first = 0
    for num_tokens in LENGTHS:
        for layers in range(4):
            children = {}
            for config in configs:
                counts = (num_tokens, *config.lengths(num_tokens))
                children.setdefault(counts[: layers + 1], set()).add(counts[layers + 1])
            if layers < 3:
                attended += sum(prefix[-1] for prefix in children)
                fed += sum(max(kept) for kept in children.values())
            else:
                read_first += sum(prefix[-1] for prefix in children)
                fed += len(children)
    assert (rows.mixed, rows.read_first, sum(rows.fed)) == (attended, read_first, fed)


def test_chunks_hold_about_as_many_rows_as_asked(model, rows, split):
    Evaluator(model, split, rows_per_chunk=40).predict(random_configs(40, seed=1))
    assert max(rows.projected) <= 40 + max(LENGTHS)
    assert np.mean(rows.projected) > 20, "much of a chunk is used"


def test_the_few_rows_that_a_config_leaves_of_a_chunk_wait_for_more(model, rows, split):
    Evaluator(model, split, rows_per_chunk=40, cache_bytes=0).predict([LengthConfig.from_retention((0.5,) * 4)])
    lengths = np.array(LENGTHS)
    left = [int(np.ceil(lengths * 0.5**layer).sum()) for layer in range(1, 4)]
    fewest = sum(-(-count // 40) for count in left) + 1  # in the last layer, a row per sequence
    assert len(rows.fed) <= fewest + 4, "each layer may have a chunk that is not full"


def test_the_full_length_needs_no_scores(model, rows, split):
    predict(model, split, [LengthConfig.full(4)])
    assert (rows.scored, rows.mixed, rows.read_first) == (0, 3 * sum(LENGTHS), sum(LENGTHS))


def test_what_the_last_layer_keeps_decides_nothing(model, split):
    configs = [LengthConfig.from_shares((0.8, 0.6, 0.5, last)) for last in (0.5, 0.3, 0.1)]
    predictions = predict(model, split, configs)
    np.testing.assert_array_equal(predictions[1:], predictions[[0, 0]])
    assert predictions.tolist() == predict_one_by_one(model, split, configs)


def test_fillers_bring_chunks_to_few_sizes_and_change_nothing(model, split, configs, monkeypatch):
    model.family = counted = Rows(model.family)
    monkeypatch.setattr("model.evaluate.ROW_STEP", 16)
    filled = Evaluator(model, split, rows_per_chunk=40).predict(configs)
    assert {rows % 16 for rows in (*counted.projected, *counted.fed)} == {0}
    assert filled.tolist() == predict_one_by_one(model, split, configs)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_what_was_answered_once_is_not_computed_again(model, rows, split, num_blocks):
    evaluator = Evaluator(model, split, num_blocks=num_blocks)
    configs = random_configs(20, seed=1)
    predictions = evaluator.predict(configs)
    computed = evaluator.rows_computed
    shares = []
    np.testing.assert_array_equal(evaluator.predict(configs[::-1], on_progress=shares.append), predictions[::-1])
    assert evaluator.rows_computed == computed
    assert shares[-1] == 1.0


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_later_call_reuses_the_first_layers_of_earlier_ones(model, rows, split, num_blocks):
    evaluator = Evaluator(model, split, num_blocks=num_blocks)
    first = random_configs(20, seed=1)
    evaluator.predict(first)
    computed = evaluator.rows_computed
    second = [LengthConfig.from_shares((*config.shares[:2], config.shares[1] / 2, 0.01)) for config in first]
    np.testing.assert_array_equal(evaluator.predict(second), predict(model, split, second))
    counts = dict(zip(*np.unique(LENGTHS, return_counts=True), strict=True))
    known, wanted = (
        {(num_tokens, *config.lengths(num_tokens)[:3]) for num_tokens in counts for config in configs}
        for configs in (first, second)
    )
    third_layer = {}
    for path in wanted - known:
        third_layer.setdefault(path[:3], set()).add(path[3])
    expected = sum(max(kept) * counts[prefix[0]] for prefix, kept in third_layer.items())
    expected += sum(counts[path[0]] for path in wanted - known)
    assert 0 < len(wanted - known) < len(wanted)
    assert evaluator.rows_computed - computed == expected, "two of four layers are remembered"


def after_one_layer(model, split):
    """Bytes of all tokens' vectors, queries, keys and values, in float32."""
    return int(split.num_tokens.sum()) * 4 * 4 * model.shape.hidden_size


def test_what_is_remembered_stays_within_its_limit(model, split):
    limit = int(1.5 * after_one_layer(model, split))
    evaluator = Evaluator(model, split, cache_bytes=limit)
    made = 0
    for seed in range(4):
        configs = random_configs(10, seed)
        np.testing.assert_array_equal(evaluator.predict(configs), predict(model, split, configs))
        states, answers = evaluator._states, evaluator._answers
        made += len({config.shares[:2] for config in configs}) * len(np.unique(LENGTHS))
        assert 0 < states.held <= limit * 7 / 8
        assert len(states._values) < made
        assert states.held == sum(
            part.nbytes
            for made in states._values.values()
            for part in (made.hidden_RD, made.projected_RP, made.position_R, made.rank_R)
        )
        assert 0 < answers.held <= limit / 8
        assert answers.held == sum(answer.nbytes + 256 for answer in answers._values.values())


def test_hidden_states_are_remembered_where_those_of_one_layer_have_room(model, split, configs):
    room = after_one_layer(model, split)
    for share, remembers in ((0.95, False), (1.05, True)):
        evaluator = Evaluator(model, split, cache_bytes=int(share * room * 8 / 7))
        np.testing.assert_array_equal(evaluator.predict(configs), predict(model, split, configs))
        assert (evaluator._states.held > 0) == remembers
        assert evaluator._answers.held > 0


def test_without_memory_nothing_is_remembered(model, split, configs):
    evaluator = Evaluator(model, split, cache_bytes=0)
    np.testing.assert_array_equal(evaluator.predict(configs), evaluator.predict(configs))
    assert evaluator._states.held == evaluator._answers.held == 0


def test_blocks_are_samples_of_equal_size_and_like_lengths():
    lengths = np.random.default_rng(0).integers(3, 60, 872)
    blocks = stratified_blocks(lengths, 8, seed=0)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(872))
    assert {len(block) for block in blocks} == {109}
    assert np.ptp([lengths[block].mean() for block in blocks]) < 1
    assert not np.array_equal(blocks[0], stratified_blocks(lengths, 8, seed=1)[0])
    assert [len(block) for block in stratified_blocks(lengths[:3], 8, seed=0)] == [1, 1, 1]


def test_precision_is_the_quickest_that_the_machine_has_and_that_leaves_the_metric(
    model, make_batch, unpadded, monkeypatch
):
    split = unpadded(make_batch(LENGTHS * 100))
    labels = predict(model, split, [LengthConfig.full(4)])[0]
    metric = choose_metric(CLASS_METRICS, "accuracy")
    monkeypatch.setattr("model.evaluate.gains_from_bf16", lambda: False)
    assert choose_precision(model, replace(split, labels=labels), metric) == "fp32"
    monkeypatch.setattr("model.evaluate.gains_from_bf16", lambda: True)
    rounded, mixed = (
        predict(model, split, [LengthConfig.full(4)], precision=precision)[0] for precision in ("bf16", "mixed")
    )
    assert (rounded != labels).any(), "so many classes that rounding changes an answer"
    assert (mixed != labels).any()
    assert choose_precision(model, replace(split, labels=labels), metric) == "fp32"
    both_wrong = np.where(mixed == labels, labels, -1)
    assert choose_precision(model, replace(split, labels=both_wrong), metric) == "mixed"
    same = np.where(rounded == labels, labels, -1)  # both are wrong where they differ
    assert choose_precision(model, replace(split, labels=same), metric) == "bf16"
    mixed = predict(model, split, [LengthConfig.full(4)], precision="mixed")[0]
    assert ((mixed == labels) & (rounded != labels)).any(), "less is rounded"
    same = np.where(mixed == labels, labels, -1)
    assert choose_precision(model, replace(split, labels=same), metric) == "mixed"


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_model_is_left_as_it_was(make_network, split, configs, training):
    network = make_network(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    expected = predict(LengthAdaptiveModel(network).eval(), split, configs)
    model = LengthAdaptiveModel(network).train(training)
    before = model.fingerprint()
    np.testing.assert_array_equal(predict(model, split, configs), expected)
    predict(model, split, configs, precision="bf16")
    assert model.fingerprint() == before
    assert all(module.training == training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_progress_grows_to_one(model, split, configs, num_blocks):
    shares = []
    Evaluator(model, split, rows_per_chunk=18, num_blocks=num_blocks).predict(configs, on_progress=shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 5
    assert shares[-1] == 1.0


def test_scores_are_the_metric_of_each_configs_predictions(model, split, configs):
    shares = []
    labels = predict_one_by_one(model, split, [LengthConfig.full(4)])[0]
    labels[3] += 1  # all but one answer of the full length are right
    split = replace(split, labels=np.array(labels))
    scores = score(model, split, configs, choose_metric(CLASS_METRICS, "accuracy"), on_progress=shares.append)
    hits = [
        sum(guess == label for guess, label in zip(row, split.labels, strict=True))
        for row in predict_one_by_one(model, split, configs)
    ]
    assert scores == pytest.approx([count / len(LENGTHS) for count in hits])
    assert scores[configs.index(LengthConfig.full(4))] == pytest.approx(11 / 12)
    assert shares[-1] == 1.0


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_memory_that_runs_out_halves_the_rows_and_leaves_the_answers(model, split, monkeypatch, cache_bytes):
    configs = random_configs(12, seed=5)
    answers_CX = predict(model, split, configs)
    evaluator = Evaluator(model, split, rows_per_chunk=512, cache_bytes=cache_bytes)
    np.testing.assert_array_equal(evaluator.predict(configs[:4]), answers_CX[:4])
    feed_forward = type(model.family).feed_forward
    most = []

    def small(self, network, depth, attended_RD):
        if len(attended_RD) > 128:
            raise MemoryError
        most.append(len(attended_RD))
        return feed_forward(self, network, depth, attended_RD)

    monkeypatch.setattr(type(model.family), "feed_forward", small)
    np.testing.assert_array_equal(evaluator.predict(configs), answers_CX)
    assert max(most) <= 128


def test_memory_that_cannot_hold_the_least_is_an_error(model, split, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(type(model.family), "feed_forward", full)
    with pytest.raises(MemoryError):
        predict(model, split, random_configs(2, seed=5))
