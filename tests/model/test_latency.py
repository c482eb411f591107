"""The cost table: a device whose law is known is predicted exactly, and what is kept says the same again."""

import itertools
import json

import numpy as np
import pytest

from model.latency import LatencyTable, Law, PackedDevice, fit, lengths_of, random_configs, steps
from model.length_config import LengthConfig, counts_of_shares
from model.packed import PackedNetwork, _groups, filled

NUM_LAYERS = 4
GENERATOR = np.random.default_rng(7)
TOKENS = GENERATOR.integers(5, 130, size=24)


class Synthetic:
    """A device that takes its time by a law of its own, written out for one sequence after the other."""

    def __init__(self, num_tokens, batch_size, *, reads_first=True, noise=0.0):
        self.batches = [
            np.sort(num_tokens[start : start + batch_size]) for start in range(0, len(num_tokens), batch_size)
        ]
        self.reads_first, self.noise = reads_first, noise
        self.generator = np.random.default_rng(1)
        self.now = 0.0

    def clock(self):
        return self.now

    def steps(self, batch, config):
        exact = self.exact(batch, config)
        seconds = [step * (1 + self.noise * self.generator.standard_normal()) for step in exact]
        self.now += sum(seconds)
        return seconds

    def whole(self, batches, config):
        return sum(sum(self.steps(batch, config)) for batch in range(batches))

    def exact(self, batch, config):
        arriving = self.batches[batch]
        whole = arriving.sum()
        seconds = [3e-4 + 2e-7 * whole + 1e-5 * len(arriving)]
        for layer in config.computed:
            keep = counts_of_shares(np.array(config.shares[layer]), self.batches[batch])
            last = layer == config.computed[-1]
            if last and self.reads_first:
                step = 4e-4 + 3e-6 * rows_of(arriving) + 2e-5 * len(arriving)
                seconds.append(
                    step + sum(3e-5 + 1e-7 * group.count_B[-1] * len(group.count_B) for group in groups(arriving))
                )
                continue
            step = 1e-3 + bent(rows_of(arriving)) + 5e-6 * rows_of(keep)
            if (keep < arriving).any():
                step += 1e-4 + 4e-7 * keep.sum() + (0 if self.reads_first else 1e-7 * whole)
            for group in groups(arriving, keep):
                size, longest = len(group.count_B), group.count_B[-1]
                each, pair = (2e-4, 3e-8) if group.keep_B is None else (5e-4, 9e-8)
                each += 0.0 if group.mask_BL is None else 1e-4
                step += each + 2e-7 * size * longest + pair * size * longest**2
            seconds.append(step + (2e-4 + 1e-6 * whole if last else 0.0))
            arriving = keep
        return seconds


def rows_of(counts):
    """Rows of a product over sequences of so many tokens, fillers included."""
    return filled(counts.sum(), "fp32")


def groups(arriving, keep=None):
    return list(_groups(arriving, arriving if keep is None else keep))


def bent(rows):
    """Rows that cost less each where there are many, by the edges of the law."""
    return 1e-5 * min(rows, 64) + 4e-6 * max(rows - 64, 0)


def table_of(device, *, batch_size, num_tokens=TOKENS):
    lengths_MB = lengths_of(num_tokens, batch_size)
    law = Law.of(lengths_MB, device.reads_first, "fp32")
    table = fit(
        device,
        lengths_MB,
        law,
        num_layers=NUM_LAYERS,
        batch_size=batch_size,
        processor="made up",
        threads=2,
        clock=device.clock,
    )
    return table, lengths_MB


def exact_ms(device, config):
    return 1e3 * sum(sum(device.exact(batch, config)) for batch in range(len(device.batches))) / len(TOKENS)


@pytest.mark.parametrize(("batch_size", "reads_first"), [*itertools.product((1, 5, 8, 32), (True, False))])
def test_a_device_whose_law_is_known_is_predicted_exactly(batch_size, reads_first):
    device = Synthetic(TOKENS, batch_size, reads_first=reads_first)
    table, lengths_MB = table_of(device, batch_size=batch_size)
    configs = [
        *random_configs(NUM_LAYERS, 20, np.random.default_rng(3)),
        LengthConfig.from_retention((0.8, 1.0, 0.5, 0.7), skipped=(1,)),
        LengthConfig.from_retention((0.8, 1.0, 0.5, 0.7), skipped=(2, 3)),
    ]
    for config in configs:
        assert table.ms_of(lengths_MB, config) == pytest.approx(exact_ms(device, config), rel=2e-2), (
            config
        )  # some edges have no data
    assert table.worst_error < (1e-6 if batch_size < 32 else 5e-3)  # one batch of all leaves an edge without data
    assert len(table.held_out) == 7
    assert table.held_out[0].shares == (1.0,) * NUM_LAYERS


def test_a_slow_device_is_fitted_in_about_a_minute_all_the_same():
    class Slow(Synthetic):
        def exact(self, batch, config):
            return [100 * step for step in super().exact(batch, config)]

    device = Slow(TOKENS, 8)
    table, lengths_MB = table_of(device, batch_size=8)
    assert sum(device.exact(0, LengthConfig.full(NUM_LAYERS))) > 3
    assert table.took_s == pytest.approx(device.now, abs=0.1)
    assert table.took_s < 75
    assert len(table.held_out) == 3
    config = LengthConfig.from_shares((0.7, 0.6, 0.5, 0.4))
    expected = 1e3 * sum(device.exact(0, config)) / 8
    assert table.ms_of(lengths_MB[:1], config) == pytest.approx(expected, rel=0.1), "of the one batch that was timed"


def test_noise_shows_in_the_stated_error():
    device = Synthetic(TOKENS, 8, noise=0.2)
    table, lengths_MB = table_of(device, batch_size=8)
    assert 0.0 < table.median_error <= table.worst_error < 0.2
    config = LengthConfig.from_shares((0.7, 0.6, 0.5, 0.4))
    assert table.ms_of(lengths_MB, config) == pytest.approx(exact_ms(device, config), rel=0.05)


def test_many_configs_at_once_are_predicted_as_each_alone():
    device = Synthetic(TOKENS, 8)
    table, lengths_MB = table_of(device, batch_size=8)
    configs = random_configs(NUM_LAYERS, 700, np.random.default_rng(5))
    shares_CN = np.array([config.shares for config in configs])
    together = table.ms(lengths_MB, shares_CN, np.zeros(shares_CN.shape, dtype=np.bool_))
    assert together.tolist() == pytest.approx([table.ms_of(lengths_MB, config) for config in configs], rel=1e-9)
    assert table.ms(lengths_MB, shares_CN[:0], np.zeros((0, NUM_LAYERS), dtype=np.bool_)).shape == (0,)


def test_a_layer_that_drops_never_costs_more_for_dropping_more():
    lengths = np.full(16, 120)
    device = Synthetic(lengths, 8, noise=0.3)
    table, lengths_MB = table_of(device, batch_size=8, num_tokens=lengths)
    grid = np.arange(0.4, 1.0, 0.1)  # so that every layer drops something
    for first, second in itertools.product(grid, grid):
        here = table.ms_of(lengths_MB, LengthConfig.from_retention((first, second, 0.9, 0.9)))
        less = table.ms_of(lengths_MB, LengthConfig.from_retention((first - 0.05, second, 0.9, 0.9)))
        assert less <= here


def test_skipping_a_layer_never_costs_more():
    table, lengths_MB = table_of(Synthetic(TOKENS, 8, noise=0.1), batch_size=8)
    for skipped in range(NUM_LAYERS):
        config = LengthConfig.full(NUM_LAYERS, skipped=(skipped,))
        assert table.ms_of(lengths_MB, config) < table.ms_of(lengths_MB, LengthConfig.full(NUM_LAYERS))


def test_what_stands_at_a_skipped_layer_counts_for_nothing():
    table, lengths_MB = table_of(Synthetic(TOKENS, 8), batch_size=8)
    skipped = np.array([[False, True, False, False]])
    shares = [np.array([[0.8, written, 0.4, 0.2]]) for written in (0.8, 0.0)]
    assert table.ms(lengths_MB, shares[0], skipped) == table.ms(lengths_MB, shares[1], skipped)


def test_a_table_comes_back_from_the_database_as_it_was():
    table, lengths_MB = table_of(Synthetic(TOKENS, 8, noise=0.1), batch_size=8)
    again = LatencyTable.from_attribute(json.loads(json.dumps(table.to_attribute())))
    assert again == table
    config = LengthConfig.from_shares((0.7, 0.6, 0.5, 0.4))
    assert again.ms_of(lengths_MB, config) == table.ms_of(lengths_MB, config)
    assert str(again) == "made up, 2 threads, fp32, batches of 8"
    with pytest.raises(ValueError, match="law 0"):
        LatencyTable.from_attribute({**table.to_attribute(), "law": 0})


def test_groups_are_those_of_the_packed_network():
    law = Law(reads_first=False, edges=(), precision="fp32")
    for seed in range(40):
        generator = np.random.default_rng(seed)
        lengths = np.sort(generator.integers(2, 140, size=(1, 9)), axis=1)
        share = generator.choice([1.0, 0.7, 0.3])
        shares = np.array([[share, share]])
        _, terms, _ = steps(law, lengths, shares, np.zeros((1, 2), dtype=np.bool_))
        keep = counts_of_shares(np.array(share), lengths[0])
        expected = dict.fromkeys(("attend", "attend padded", "score", "score padded"), (0, 0, 0))
        for group in groups(lengths[0], keep):
            kind = "attend" if group.keep_B is None else "score"
            kind += "" if group.mask_BL is None else " padded"
            size, longest = len(group.count_B), int(group.count_B[-1])
            before = expected[kind]
            expected[kind] = (before[0] + 1, before[1] + size * longest, before[2] + size * longest**2)
        for kind, numbers in expected.items():
            assert tuple(terms[f"{kind}{what}"].item() for what in ("", ", tokens", ", pairs")) == numbers


def test_rows_in_bf16_are_counted_with_their_fillers():
    law = Law(reads_first=False, edges=(), precision="bf16")
    for rows in (1, 16, 17, 511, 512, 513, 700):
        _, terms = steps(law, np.array([[rows]]), np.ones((1, 1)), np.zeros((1, 1), dtype=np.bool_))
        assert terms["arriving from 0"].item() == filled(rows, "bf16")


def test_lengths_lie_in_batches_by_rising_length():
    assert lengths_of(np.array([5, 3, 9, 4, 7]), 2).tolist() == [[3, 5], [4, 9], [0, 7]]
    assert lengths_of(np.array([5, 3]), 8).tolist() == [[3, 5]]


def test_one_step_is_timed_for_each_layer_that_is_computed(model, make_batch, unpadded):
    ticks = itertools.count()
    split = unpadded(make_batch((9, 4, 12)))
    device = PackedDevice(PackedNetwork(model), split, [np.arange(3)], clock=lambda: float(next(ticks)))
    full = LengthConfig.full(NUM_LAYERS)
    assert device.steps(0, full) == [1.0] * (1 + NUM_LAYERS)
    assert device.steps(0, LengthConfig.full(NUM_LAYERS, skipped=(0,))) == [1.0] * NUM_LAYERS
    assert device.whole(1, full) == 1.0
