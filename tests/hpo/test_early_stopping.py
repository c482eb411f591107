"""Stopping configs early: what is certain enough, and that the front stays what it would have been."""

import numpy as np
import pytest

from hpo.early_stopping import Rivals, bits_from_text, bits_to_text
from hpo.front import hypervolume
from model.evaluate import stratified_blocks
from studies.loader import load_lengths

EXAMPLES = 872
SHIPPED = load_lengths("lengths")


def bits(share, seed, count=EXAMPLES):
    return np.random.default_rng(seed).random(count) < share


def rivals(*shares_and_costs):
    trials = np.arange(len(shares_and_costs))
    correct = np.array([bits(share, seed) for seed, (share, _) in enumerate(shares_and_costs)])
    return Rivals.of(trials, np.array([cost for _, cost in shares_and_costs], dtype=np.float64), correct)


def test_a_config_that_trails_clearly_is_beaten_by_the_trial_that_shows_it():
    seen = np.arange(200)
    front = rivals((0.6, 10.0), (0.9, 20.0), (0.95, 30.0))
    trailing = bits(0.6, 9)
    defeat = front.beats(25.0, trailing[seen], seen, confidence=3.0)
    assert defeat.by == 1
    assert defeat.behind == pytest.approx(front.correct_FN[1][seen].mean() - trailing[seen].mean())
    assert 0.02 < defeat.error < 0.06
    assert front.accuracy(1) - defeat.behind == pytest.approx(trailing.mean(), abs=3 * defeat.error)
    assert front.beats(35.0, trailing[seen], seen, confidence=3.0).by == 2


def test_a_cheaper_config_is_never_beaten():
    seen = np.arange(200)
    assert rivals((0.9, 20.0)).beats(19.9, np.zeros(200, dtype=np.bool_), seen, confidence=3.0) is None


def test_a_config_as_good_as_the_front_goes_on():
    front = rivals((0.9, 20.0))
    for count in (1, 5, 50, 400, 871):
        seen = np.random.default_rng(count).permutation(EXAMPLES)[:count]
        assert front.beats(20.0, bits(0.9, 0)[seen], seen, confidence=3.0) is None
        assert front.beats(20.0, bits(0.9, 77)[seen], seen, confidence=3.0) is None


def test_a_handful_of_examples_proves_nothing():
    seen = np.arange(4)
    assert rivals((1.0, 20.0)).beats(20.0, np.zeros(4, dtype=np.bool_), seen, confidence=3.0) is None


def test_rivals_are_the_non_dominated_alone():
    front = rivals((0.9, 20.0), (0.5, 25.0), (0.95, 30.0), (0.2, 5.0))
    assert front.trial_F.tolist() == [3, 0, 2]
    assert front.costs_FK.tolist() == [[5.0], [20.0], [30.0]]
    assert Rivals.of(np.array([], dtype=np.int64), np.array([]), np.zeros((0, 0), dtype=np.bool_)).trial_F.size == 0


def test_a_rival_must_cost_no_more_by_any_measure():
    good = bits(0.9, 0)
    front = Rivals.of(np.array([3]), np.array([[20.0, 5.0]]), good[None])
    seen, bad = np.arange(200), np.zeros(200, dtype=np.bool_)
    assert front.beats((20.0, 5.0), bad, seen, confidence=3.0).by == 3
    assert front.beats((30.0, 6.0), bad, seen, confidence=3.0).by == 3
    assert front.beats((19.0, 6.0), bad, seen, confidence=3.0) is None
    assert front.beats((21.0, 4.9), bad, seen, confidence=3.0) is None


def test_rivals_are_the_non_dominated_by_all_costs():
    correct = np.array([bits(share, seed) for seed, share in enumerate((0.9, 0.9, 0.5, 0.2))])
    costs = np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [0.5, 0.5]])
    assert sorted(Rivals.of(np.arange(4), costs, correct).trial_F.tolist()) == [0, 1, 3]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 872])
def test_bits_survive_the_database(count):
    given = bits(0.5, count, count)
    np.testing.assert_array_equal(bits_from_text(bits_to_text(given), count), given)


def simulate(seed, stop):
    """Hypervolume, trials stopped and examples seen of 12 generations of made-up configs that agree as real ones do."""
    generator = np.random.default_rng(seed)
    ease = generator.normal(1.2, 1.0, EXAMPLES)
    blocks = stratified_blocks(generator.integers(5, 40, EXAMPLES), SHIPPED.blocks, seed)
    cost = generator.uniform(0.2, 1.0, 300)
    loss = 0.15 / cost + generator.exponential(0.4, 300)
    correct = ease + generator.normal(0, 0.5, (300, EXAMPLES)) > loss[:, None]
    done, seen_examples = [], 0
    for start in range(0, 300, 25):
        scored = np.array(done, dtype=np.int64)
        front = Rivals.of(scored, cost[scored], correct[scored])
        for config in range(start, start + 25):
            seen = np.empty(0, dtype=np.int64)
            for number, block in enumerate(blocks):
                seen = np.concatenate([seen, block])
                last = number + 1 == len(blocks)
                if last:
                    break
                if stop and start and front.beats(cost[config], correct[config, seen], seen, SHIPPED.confidence):
                    break
            seen_examples += len(seen)
            if len(seen) == EXAMPLES:
                done.append(config)
    return hypervolume(cost[done], correct[done].mean(axis=1)), 300 - len(done), seen_examples


def test_the_front_is_the_one_without_early_stopping_but_for_less_than_the_splits_noise():
    noise = np.sqrt(0.2 * 0.8 / EXAMPLES)
    stopped = []
    for seed in range(20):
        whole, _, everything = simulate(seed, stop=False)
        early, count, seen = simulate(seed, stop=True)
        assert early <= whole + 1e-12
        assert whole - early < noise / 4
        stopped.append(count)
        assert seen < 0.9 * everything
    assert np.mean(stopped) > 60, "most of the hopeless are found out"
