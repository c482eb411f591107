"""MACs against published totals, against torch's own counter and against every product written out."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.encoder import LengthAdaptiveModel
from model.length_config import LengthConfig
from model.macs import EncoderShape, constant_rate_config, mean_macs, mean_macs_of_shares, sequence_macs, tokens_left

TINY = EncoderShape(num_layers=3, hidden_size=8, feed_forward_size=20, head_macs_per_sequence=88)
LENGTHS = np.array([3, 5, 5, 9, 14, 14, 14, 22, 31, 60])


def span_encoder(num_layers, hidden_size):
    """The shape of a published question-answering encoder: its head gives each token a start and an end logit."""
    return EncoderShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        feed_forward_size=4 * hidden_size,
        head_macs_per_token=2 * hidden_size,
    )


def layer_norm_macs(num_tokens, lengths, hidden_size):
    """One MAC per element of each LayerNorm: the embeddings', and each layer's before and after dropping."""
    arriving = (num_tokens, *lengths[:-1])
    return hidden_size * (num_tokens + sum(arriving) + sum(lengths))


def enumerated_macs(shape, num_tokens, lengths):
    """The sum of rows · inner · columns over every matrix product of one sequence."""
    d, f = shape.hidden_size, shape.feed_forward_size
    products = []
    arriving = num_tokens
    for kept in lengths:
        products += [(arriving, d, d)] * 3  # query, key, value
        products += [(arriving, d, arriving), (arriving, arriving, d)]  # scores and context, over all heads
        products += [(arriving, d, d)]  # attention's output
        products += [(kept, d, f), (kept, f, d)]
        arriving = kept
    total = sum(math.prod(product) for product in products) + layer_norm_macs(num_tokens, lengths, d)
    return total + shape.head_macs_per_sequence + shape.head_macs_per_token * num_tokens


def test_bert_base_at_384_costs_the_published_total():
    assert sequence_macs(span_encoder(12, 768), [384]).tolist() == [35_340_779_520]


@pytest.mark.parametrize(
    ("num_layers", "hidden_size", "lengths", "billions"),
    [
        (6, 768, None, 17.671),
        (6, 384, None, 4.759),
        (6, 384, (269, 253, 252, 202, 104, 34), 2.485),
        (6, 384, (315, 251, 242, 159, 142, 33), 2.547),
    ],
    ids=["TinyBERT", "MiniLM", "MiniLM shortened for fp32", "MiniLM shortened for int8"],
)
def test_published_encoders_cost_their_published_totals(num_layers, hidden_size, lengths, billions):
    config = None if lengths is None else LengthConfig.from_lengths(lengths, max_length=384)
    macs = int(sequence_macs(span_encoder(num_layers, hidden_size), [384], config)[0])
    assert f"{macs / 1e9:.3f}" == f"{billions:.3f}"


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 40])
@pytest.mark.parametrize(
    "config",
    [
        None,
        LengthConfig.full(4),
        LengthConfig.from_shares((0.9, 0.6, 0.6, 0.25)),
        LengthConfig.from_shares((1.0, 1.0, 1.0, 0.1)),
        LengthConfig.from_lengths((30, 12, 12, 2), max_length=64),
    ],
    ids=str,
)
def test_a_forward_pass_does_the_products_that_are_counted(model, make_batch, num_tokens, config):
    batch = make_batch([num_tokens])
    # torch does not count its fused attention on a processor, so the plain products run
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch, length_config=config)
    lengths = (config or LengthConfig.full(4)).lengths(num_tokens)
    products = model.macs(num_tokens, config) - layer_norm_macs(num_tokens, lengths, model.shape.hidden_size)
    assert counter.get_total_flops() == 2 * products


def test_the_cost_of_the_head_follows_its_classes(make_network):
    two, five = (LengthAdaptiveModel(make_network(num_labels=classes)) for classes in (2, 5))
    assert five.macs(20) - two.macs(20) == 3 * 32


@given(
    st.builds(
        EncoderShape,
        num_layers=st.just(3),
        hidden_size=st.integers(1, 1024),
        feed_forward_size=st.integers(1, 4096),
        head_macs_per_sequence=st.integers(0, 10**6),
        head_macs_per_token=st.integers(0, 10**4),
    ),
    st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3),
    st.lists(st.integers(1, 600), min_size=1, max_size=5),
)
def test_every_sequence_costs_the_sum_of_its_products(shape, retention, num_tokens):
    config = LengthConfig.from_retention(retention)
    expected = [enumerated_macs(shape, count, config.lengths(count)) for count in num_tokens]
    assert sequence_macs(shape, num_tokens, config).tolist() == expected
    assert mean_macs(shape, np.array(num_tokens), config) == pytest.approx(sum(expected) / len(expected), rel=1e-12)


@given(st.lists(st.tuples(st.floats(0.05, 1.0), st.booleans()), min_size=2, max_size=2), st.floats(0.05, 1.0))
def test_a_skipped_layer_costs_nothing(layers, last):
    retention, skips = [kept for kept, _ in layers] + [last], [skip for _, skip in layers] + [False]
    config = LengthConfig.from_retention(retention, np.flatnonzero(skips))
    computed = [layer for layer in range(3) if not skips[layer]]
    shallow = EncoderShape(num_layers=len(computed), hidden_size=8, feed_forward_size=20, head_macs_per_sequence=88)
    remaining = LengthConfig.from_retention([retention[layer] for layer in computed])
    expected = sequence_macs(shallow, LENGTHS, remaining)
    np.testing.assert_array_equal(sequence_macs(TINY, LENGTHS, config), expected)
    many = mean_macs_of_shares(TINY, LENGTHS, np.array([config.shares, (1.0,) * 3]), np.array([skips, [False] * 3]))
    assert many.tolist() == pytest.approx([expected.mean(), mean_macs(TINY, LENGTHS)])


def test_many_configs_are_counted_a_few_at_a_time(monkeypatch):
    shares_CL = np.cumprod(np.random.default_rng(0).uniform(0.5, 1.0, (7, 3)), axis=1)
    nothing_skipped = np.zeros((7, 3), dtype=bool)
    at_once = mean_macs_of_shares(TINY, LENGTHS, shares_CL, nothing_skipped)
    monkeypatch.setattr("model.macs.COUNTS_TOGETHER", 2 * 3 * len(np.unique(LENGTHS)))
    np.testing.assert_array_equal(mean_macs_of_shares(TINY, LENGTHS, shares_CL, nothing_skipped), at_once)
    alone = [mean_macs(TINY, LENGTHS, LengthConfig.from_shares(shares)) for shares in shares_CL.tolist()]
    np.testing.assert_allclose(at_once, alone)


def test_configs_of_equal_cost_are_told_apart_by_what_they_keep():
    shape = EncoderShape(num_layers=3, hidden_size=4, feed_forward_size=8)
    alike = np.arange(1, 25)[:, None] / 24
    shares_CL = np.array(
        [shares for shares in itertools.product(alike[:, 0], repeat=3) if list(shares) == sorted(shares)[::-1]]
    )
    one_length = np.full(5, 24)
    costs = mean_macs_of_shares(shape, one_length, shares_CL, np.zeros(shares_CL.shape, dtype=bool))
    kept = [LengthConfig.from_shares(shares).lengths(24) for shares in shares_CL.tolist()]
    left_CL = tokens_left(one_length, shares_CL)
    assert len(np.unique(costs)) < len(set(kept))
    assert left_CL.tolist() == [[5 * count for count in counts] for counts in kept]


def test_no_config_costs_the_full_length():
    np.testing.assert_array_equal(sequence_macs(TINY, LENGTHS), sequence_macs(TINY, LENGTHS, LengthConfig.full(3)))


def test_costs_beyond_32_bits_are_exact():
    shape = span_encoder(48, 8192)
    assert sequence_macs(shape, [100_000]).tolist() == [enumerated_macs(shape, 100_000, (100_000,) * 48)]


def test_a_config_for_another_number_of_layers_is_refused():
    with pytest.raises(ValueError, match="length config has 2 layers, the encoder 3"):
        sequence_macs(TINY, [10], LengthConfig.full(2))


@pytest.mark.parametrize("relative_macs", [0.3, 0.35, 0.5, 0.7, 0.9, 0.999])
def test_the_largest_constant_rate_within_the_budget_is_found(relative_macs):
    def cost(rate):
        return mean_macs(TINY, LENGTHS, LengthConfig.from_retention((rate,) * 3))

    step = 1 / 4000
    budget = relative_macs * mean_macs(TINY, LENGTHS)
    best = max(rate for rate in np.arange(step, 1.0, step) if cost(rate) <= budget)
    found = constant_rate_config(TINY, LENGTHS, relative_macs)
    rate = found.shares[0]
    assert found == LengthConfig.from_retention((rate,) * 3)
    assert mean_macs(TINY, LENGTHS, found) <= budget
    assert best - 1e-6 <= rate <= best + step
    assert rate > 1 - 2e-6 or cost(rate + 2e-6) > budget


def test_the_whole_budget_buys_the_full_length():
    assert constant_rate_config(TINY, LENGTHS, 1.0) == LengthConfig.full(3)


def test_a_budget_below_every_rate_gets_the_shortest_lengths():
    config = constant_rate_config(TINY, LENGTHS, 1e-6)
    assert config.lengths(60) == (2, 2, 2)


@pytest.mark.parametrize("relative_macs", [0.0, -0.5, 1.01, math.nan])
def test_a_budget_outside_its_range_is_refused(relative_macs):
    with pytest.raises(ValueError, match=rf"relative_macs={relative_macs}; choose a share in \(0, 1\]"):
        constant_rate_config(TINY, LENGTHS, relative_macs)
