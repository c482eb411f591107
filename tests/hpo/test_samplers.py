"""Samplers of length configs: their operators, the surrogate's arithmetic, and whole searches on a made-up quality."""

import itertools
import warnings

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from hpo.front import hypervolume
from hpo.samplers import (
    LEAST_EFFORT,
    Configs,
    LatSampler,
    RetentionSpace,
    SharedEffort,
    SurrogateScreening,
    _Scored,
    _Stopped,
    choose_batch,
    make_sampler,
    mutate_between_neighbours,
)
from hpo.staircase import Staircase, convex_hull
from studies.loader import SAMPLERS, LengthsStudy, Range

LAYERS = 4
SPACE = {f"retention_{layer}": FloatDistribution(0.2, 1.0, step=0.05) for layer in range(LAYERS)}
GRID = RetentionSpace.of(SPACE)
DEPTH_SPACE = {**SPACE, **{f"skip_{layer}": CategoricalDistribution((False, True)) for layer in (1, 3)}}
DEPTH = RetentionSpace.of(DEPTH_SPACE)
ANY = RetentionSpace(tuple(SPACE), 0.1, 1.0, None)


def random_shares(count, seed=0):
    return np.cumprod(np.random.default_rng(seed).uniform(0.3, 1.0, (count, LAYERS)), axis=1)


def random_points(seed, count=12):
    """Costs and qualities with ties, none of them on a line."""
    generator = np.random.default_rng(seed)
    return generator.integers(1, 12, count) / 12, generator.integers(0, 30, count) / 30


def dominates(a, b):
    return a[0] <= b[0] and a[1] >= b[1] and a != b


# Operators


def test_shares_on_the_grid_come_back_unchanged():
    retention = np.random.default_rng(0).integers(4, 21, (50, LAYERS)) * 0.05
    configs = Configs.whole(np.cumprod(retention, axis=1))
    np.testing.assert_allclose(GRID.to_retention(configs), retention, atol=1e-9)


@pytest.mark.parametrize("space", [GRID, ANY], ids=["grid", "any"])
def test_retentions_stay_in_range_and_follow_the_shares(space):
    shares = np.minimum.accumulate(np.random.default_rng(1).uniform(0.0, 1.0, (200, LAYERS)), axis=1)
    retention = space.to_retention(Configs.whole(shares))
    assert retention.min() >= space.low
    assert retention.max() <= 1.0
    reachable = (shares[:, 0] >= space.low) & (shares[:, 1:] >= space.low * shares[:, :-1] + 0.05).all(axis=1)
    left = np.cumprod(retention, axis=1)[reachable]
    assert reachable.sum() > 20
    np.testing.assert_allclose(left, shares[reachable], atol=1e-9 if space.step is None else 0.026)
    for row in retention if space.step is not None else ():
        assert all(
            SPACE[name]._contains(SPACE[name].to_internal_repr(value)) for name, value in GRID.params(row).items()
        )


def test_a_mutation_moves_each_share_between_its_neighbours_only():
    shares, probability = random_shares(1200), np.tile([0.0, 0.25, 0.5, 1.0], 300)
    children = mutate_between_neighbours(Configs.whole(shares), probability, np.random.default_rng(0)).shares_CN
    assert (np.diff(children, prepend=1.0, append=0.0) <= 0).all()
    for share in (0.0, 0.25, 0.5, 1.0):
        moved = (children != shares)[probability == share].mean()
        assert moved == pytest.approx(share, abs=0.04 if 0 < share < 1 else 0)


def random_skips(count, seed=0):
    """Of layers 1 and 3 alone."""
    skipped = np.random.default_rng(seed).random((count, LAYERS)) < 0.5
    skipped[:, [0, 2]] = False
    return skipped


def test_a_config_of_a_trial_drops_nothing_where_it_skips():
    params = {"retention_0": 0.5, "retention_1": 0.3, "retention_2": 0.8, "retention_3": 0.5}
    trials = [
        optuna.trial.create_trial(values=[0.0], params={**params, **skips}, distributions=DEPTH_SPACE)
        for skips in ({"skip_1": True, "skip_3": False}, {"skip_1": False, "skip_3": True})
    ]
    configs = DEPTH.configs_of(trials)
    np.testing.assert_allclose(configs.shares_CN, [[0.5, 0.5, 0.4, 0.2], [0.5, 0.15, 0.12, 0.12]])
    assert configs.skipped_CN.tolist() == [[False, True, False, False], [False, False, False, True]]
    assert configs.last_computed().tolist() == [3, 2]
    again = [DEPTH.params(*row) for row in zip(DEPTH.to_retention(configs), configs.skipped_CN, strict=True)]
    assert again == [
        {**params, "retention_1": 1.0, "skip_1": True, "skip_3": False},
        {**params, "retention_3": 1.0, "skip_1": False, "skip_3": True},
    ]
    assert DEPTH.params(np.ones(LAYERS)) == {**dict.fromkeys(SPACE, 1.0), "skip_1": False, "skip_3": False}


def test_a_mutation_leaves_skipped_layers_out_of_account():
    shares, skipped = random_shares(2000), random_skips(2000)
    parents = DEPTH.configs(shares / np.insert(shares, 0, 1.0, axis=1)[:, :-1], skipped)
    children = mutate_between_neighbours(parents, np.tile([0.0, 1.0], 1000), np.random.default_rng(0))
    assert (children.skipped_CN == skipped).all()
    assert (children.shares_CN == parents.shares_CN)[::2].all()
    moved = np.abs(children.shares_CN / parents.shares_CN - 1) > 0.02
    mutants = (part[1::2] for part in (children.shares_CN, parents.shares_CN, skipped))
    for child, parent, skips in zip(*mutants, strict=True):
        computed = np.flatnonzero(~skips)
        above, below = np.append(1.0, child[computed][:-1]), np.append(parent[computed][1:], 0.0)
        assert ((below <= child[computed]) & (child[computed] <= above)).all()
        assert (child[skips] == np.append(1.0, child)[:-1][skips]).all()
    falling = (children.shares_CN < parents.shares_CN - 0.01)[1::2, 0][skipped[1::2, 1]]
    assert falling.mean() > 0.2, "a layer before a skipped one may keep less than before"
    assert moved[1::2][~skipped[1::2]].mean() > 0.7


def test_children_skip_what_a_parent_skips_and_change_their_mind_at_the_rate_asked_for():
    first, second = random_skips(4000, seed=1), random_skips(4000, seed=2)
    generator = np.random.default_rng(0)
    inherited = DEPTH.breed_skips(first, second, np.zeros(4000), generator)
    assert ((inherited == first) | (inherited == second)).all()
    differ = first != second
    assert (inherited == first)[differ].mean() == pytest.approx(0.5, abs=0.03)
    flipped = DEPTH.breed_skips(first, first, np.tile([0.0, 1.0], 2000), generator) != first
    assert not flipped[::2].any()
    assert not flipped[:, [0, 2]].any(), "the others have no say"
    assert flipped[1::2].sum(axis=1).mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_point_dominates(seed):
    cost, quality = random_points(seed)
    points = list(zip(cost, quality, strict=True))
    expected = {a for a in points if not any(dominates(b, a) for b in points)}
    found = Staircase.members(cost, quality)
    assert {points[index] for index in found} == expected
    assert len(found) == len(expected), "of equal points one is taken"
    assert list(cost[found]) == sorted(cost[found])


@pytest.mark.parametrize("seed", range(20))
def test_the_hull_is_what_no_chord_of_the_front_passes_above(seed):
    cost, quality = random_points(seed)
    front = [(cost[index], quality[index]) for index in Staircase.members(cost, quality)]

    def below_a_chord(point):
        return any(
            a[0] < point[0] < b[0] and a[1] + (b[1] - a[1]) * (point[0] - a[0]) / (b[0] - a[0]) >= point[1] - 1e-12
            for a, b in itertools.permutations(front, 2)
        )

    hull = convex_hull(cost, quality)
    assert [(cost[index], quality[index]) for index in hull] == [point for point in front if not below_a_chord(point)]


# The surrogate's arithmetic


@pytest.mark.parametrize("seed", range(5))
def test_expected_gain_is_the_mean_growth_of_the_hypervolume(seed):
    cost, quality = random_points(seed)
    front = Staircase.of(cost, quality)
    floor = quality.min()
    generator = np.random.default_rng(seed)
    costs, means, deviations = generator.uniform(0, 1, 6), generator.uniform(0, 1.2, 6), generator.uniform(0.01, 0.2, 6)
    gains = front.expected_gain(costs, means, deviations)

    def area(extra):
        points = [*zip(cost, quality, strict=True), *extra]
        return hypervolume([c for c, _ in points], [max(q - floor, 0.0) for _, q in points])

    before = area([])
    for candidate in range(6):
        drawn = generator.normal(means[candidate], deviations[candidate], 4000)
        grown = np.array([area([(costs[candidate], value)]) - before for value in drawn])
        assert gains[candidate] == pytest.approx(grown.mean(), abs=4 * grown.std() / np.sqrt(4000) + 1e-5)


def test_a_staircase_with_a_point_more_is_that_of_all_points():
    cost, quality = random_points(3)
    grown = Staircase.of(cost, quality).with_point(0.4, 0.9)
    expected = Staircase.of(np.append(cost, 0.4), np.append(quality, 0.9))
    np.testing.assert_allclose(grown.edge_J, expected.edge_J)
    np.testing.assert_allclose(grown.height_J, expected.height_J)


def test_a_batch_holds_no_two_candidates_of_one_promise():
    front = Staircase.of(np.array([0.5, 1.0]), np.array([0.5, 0.8]))
    cost = np.array([0.3, 0.3, 0.7])
    mean = np.array([0.6, 0.6, 0.79])
    twins = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) * 1e-2
    assert sorted(choose_batch(front, cost, mean, twins, 2)) == [0, 2]
    assert sorted(choose_batch(front, cost, mean, twins, 5)) == [0, 1, 2]


# Whole searches


def quality_of(shares):
    """Falls smoothly with each share, early layers first, as an encoder's does."""
    weights = np.array([0.4, 0.25, 0.1, 0.02])
    return 0.9 - (weights * (1 - shares) ** 2).sum(axis=-1)


def cost_of(shares):
    return (0.4 + np.asarray(shares) @ np.array([1.0, 1.0, 1.0, 0.5])) / 3.9


def cost_in_depth(configs):
    """Skipped layers cost nothing."""
    arriving = np.insert(configs.shares_CN, 0, 1.0, axis=1)[:, :-1]
    return 0.05 + 0.95 * ((arriving + configs.shares_CN) * ~configs.skipped_CN).sum(axis=1) / (2 * LAYERS)


def quality_in_depth(configs):
    """Layer 1 does nothing, layer 3 matters."""
    return quality_of(configs.shares_CN) - 0.3 * configs.skipped_CN[:, 3]


def search_in_depth(sampler, trials, seed, reads_first=False):
    definition = LengthsStudy(
        name="lengths", retention=Range(low=0.2, high=1.0, step=0.05), sampler=sampler, population_size=20
    )
    sampler = make_sampler(definition, DEPTH_SPACE, cost_in_depth, seed, reads_first)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for rate in (1.0, 0.2, 0.5, 0.8):
        study.enqueue_trial(DEPTH.params(np.full(LAYERS, rate)))
    while len(study.trials) < trials:
        asked = [study.ask(DEPTH_SPACE) for _ in range(20)]
        configs = DEPTH.configs_of(asked)
        for trial, *values in zip(asked, quality_in_depth(configs), cost_in_depth(configs), strict=True):
            study.tell(trial, [float(value) for value in values])
    return study


def search(sampler, trials, seed, generation=20, reads_first=False, cost=cost_of, stop=lambda shares: False):
    definition = LengthsStudy(
        name="lengths", retention=Range(low=0.2, high=1.0, step=0.05), sampler=sampler, population_size=generation
    )
    sampler = make_sampler(definition, SPACE, lambda configs: cost(configs.shares_CN), seed, reads_first)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for rate in (1.0, 0.2, 0.5, 0.8):
        study.enqueue_trial(dict.fromkeys(SPACE, rate))
    while len(study.trials) < trials:
        for trial in [study.ask(SPACE) for _ in range(generation)]:
            shares = np.cumprod([trial.params[name] for name in SPACE])
            if stop(shares):
                trial.set_user_attr("estimated_metric", float(quality_of(shares)))
                trial.set_user_attr("estimated_metric_error", 0.02)
                study.tell(trial, state=TrialState.PRUNED)
            else:
                study.tell(trial, [float(quality_of(shares)), float(cost(shares))])
    return study


def found(study):
    return hypervolume([trial.values[1] for trial in study.trials], [trial.values[0] for trial in study.trials])


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_stays_in_the_space_and_repeats_itself(sampler):
    first, again, other = (search(sampler, 60, seed) for seed in (0, 0, 1))
    assert [trial.params for trial in first.trials] == [trial.params for trial in again.trials]
    assert [trial.params for trial in first.trials] != [trial.params for trial in other.trials]
    for trial in first.trials:
        assert list(trial.params) == list(SPACE)
        assert all(SPACE[name]._contains(value) for name, value in trial.params.items())


def test_the_surrogate_finds_more_in_as_many_trials_than_the_others():
    mean = {name: np.mean([found(search(name, 100, seed)) for seed in range(3)]) for name in SAMPLERS}
    assert mean.pop("surrogate") > max(mean.values()) + 0.003, mean


def test_the_surrogate_asks_for_nothing_twice():
    study = search("surrogate", 100, seed=0)
    bred = [tuple(trial.params.values()) for trial in study.trials[20:]]
    assert len(set(bred)) == len(bred)


def test_the_surrogate_asks_for_no_two_configs_of_one_cost():
    study = search("surrogate", 100, seed=0, cost=lambda shares: np.round(cost_of(shares), 3))
    generation = {trial.number: trial.system_attrs.get("NSGAIISampler:generation", 0) for trial in study.trials}
    first = [trial.values[1] for trial in study.trials if not generation[trial.number]]
    bred = [trial.values[1] for trial in study.trials if generation[trial.number]]
    assert len(set(bred)) == len(bred) >= 40
    assert not set(bred) & set(first)


def test_the_surrogate_asks_for_configs_of_one_cost_that_keep_other_counts():
    screening = SurrogateScreening(
        retentions=GRID,
        cost_of=lambda configs: np.full(len(configs), 0.5),
        generation=20,
        brood=40,
        reads_first=False,
        generator=np.random.default_rng(0),
        identify=lambda configs: np.round(configs.shares_CN * 100),
    )
    study = search("random", 40, seed=0)
    bred = screening._breed(_Scored.of(study, GRID), set(), GRID.configs_of(study.trials))[1]
    kept = {shares.tobytes() for shares in np.round(bred.shares_CN * 100)}
    assert len(bred) == len(kept) > 100


def test_what_a_stopped_trial_has_shown_tells_the_surrogate_as_much_as_its_error_allows():
    def predicted(*errors):
        """Quality predicted at a config that trials with these errors say is 0.3."""
        study = search("random", 40, seed=0)
        for error in errors:
            params = dict.fromkeys(SPACE, 0.9)
            figures = {"estimated_metric": 0.3, "estimated_metric_error": error}
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.PRUNED, params=params, distributions=SPACE, user_attrs=figures
                )
            )
        screening = SurrogateScreening(
            retentions=GRID,
            cost_of=lambda configs: cost_of(configs.shares_CN),
            generation=20,
            brood=40,
            reads_first=False,
            generator=np.random.default_rng(0),
        )
        scored, stopped = _Scored.of(study, GRID), _Stopped.of(study, GRID)
        tried = Configs.joined(scored.configs, stopped.configs)
        front = Staircase.of(scored.cost_T, scored.quality_T)
        screening._learn(front, scored, stopped, tried, cost_of(tried.shares_CN))
        return screening.surrogate.predict(np.cumprod(np.full((1, LAYERS), 0.9), axis=1))[0][0]

    assert predicted() == pytest.approx(quality_of(np.cumprod(np.full(LAYERS, 0.9))), abs=0.02)
    assert predicted(0.01) < predicted(0.03) - 0.01 < predicted(0.1) - 0.01 < predicted() - 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_searches_depth_too(sampler):
    study = search_in_depth(sampler, 80, seed=0)
    assert [trial.params for trial in search_in_depth(sampler, 80, seed=0).trials] == [t.params for t in study.trials]
    assert all(set(trial.params) == set(DEPTH_SPACE) for trial in study.trials)
    for name in ("skip_1", "skip_3"):
        assert {trial.params[name] for trial in study.trials[4:]} == {False, True}


@pytest.mark.parametrize("sampler", ["surrogate", "lat"])
def test_a_sampler_finds_the_layer_that_does_nothing(sampler):
    study = search_in_depth(sampler, 160, seed=1)
    late = [trial.params["skip_1"] for trial in study.trials[100:]]
    assert np.mean(late) > 0.6
    best = max(study.best_trials, key=lambda trial: trial.values[0])
    assert best.params["skip_1"]
    assert not best.params["skip_3"]


def test_the_surrogate_asks_for_no_config_twice_however_its_skipped_layers_retain():
    study = search_in_depth("surrogate", 120, seed=0)
    configs = DEPTH.configs_of(study.trials[20:])
    rows = {
        (shares.round(9).tobytes(), skips.tobytes())
        for shares, skips in zip(configs.shares_CN, configs.skipped_CN, strict=True)
    }
    assert len(rows) == 100


def test_the_last_layer_that_is_computed_keeps_the_least_where_the_head_reads_the_first_token():
    study = search_in_depth("surrogate", 80, seed=0, reads_first=True)
    bred = DEPTH.configs_of(study.trials[40:])
    retention = bred.shares_CN / np.insert(bred.shares_CN, 0, 1.0, axis=1)[:, :-1]
    last = bred.last_computed()
    np.testing.assert_allclose(retention[np.arange(len(bred)), last], 0.2)
    assert set(last.tolist()) == {2, 3}


def test_the_surrogate_reads_what_decides_quality():
    screening = SurrogateScreening(
        retentions=DEPTH, cost_of=cost_in_depth, generation=1, brood=1, reads_first=True, generator=None
    )
    retention = np.array([[0.5, 0.8, 0.6, 0.9], [0.5, 0.8, 0.3, 0.9], [0.5, 1.0, 0.6, 0.9], [0.5, 1.0, 0.6, 0.3]])
    skipped = np.zeros((4, LAYERS), dtype=bool)
    skipped[:2, 3] = skipped[2, 1] = True
    first, second, third, fourth = screening._inputs(DEPTH.configs(retention, skipped))
    np.testing.assert_allclose(first, second)  # they differ in what the last computed layer keeps, alone
    np.testing.assert_allclose(first, [0.5, 0.4, 0.4, 0, 1])
    np.testing.assert_allclose(third, [0.5, 0.5, 0.3, 1, 0])
    np.testing.assert_allclose(fourth, [0.5, 0.5, 0.3, 0, 0])


def test_stopped_trials_are_not_asked_for_again():
    study = search("surrogate", 100, seed=0, stop=lambda shares: 0.4 < cost_of(shares) < 0.9)
    stopped = {tuple(trial.params.values()) for trial in study.trials if trial.state == TrialState.PRUNED}
    bred = [tuple(trial.params.values()) for trial in study.trials[20:]]
    assert len(stopped) > 5
    assert len(set(bred)) == len(bred)


def test_where_the_head_reads_the_first_token_the_last_layer_keeps_the_least():
    study = search("surrogate", 60, seed=0, reads_first=True)
    assert {trial.params["retention_3"] for trial in study.trials[40:]} == {0.2}
    assert len({trial.params["retention_2"] for trial in study.trials[40:]}) > 3


def test_candidates_that_share_a_beginning_with_a_pick_take_less():
    retention = np.array([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.9], [0.5, 0.5, 1.0, 0.5], [0.5, 1.0, 0.5, 0.5]])
    effort = SharedEffort.of(retention, np.zeros(retention.shape, dtype=bool))
    # of four layers the first two are remembered and the last takes next to nothing, so the third decides
    np.testing.assert_allclose(effort.of_each() - LEAST_EFFORT, [0.25, 0.25, 0.25, 0.5])
    effort.pick(2)
    np.testing.assert_allclose(effort.of_each() - LEAST_EFFORT, [0.0, 0.0, 0.0, 0.5])
    deeper = SharedEffort.of(np.hstack([retention, np.ones((4, 1))]), np.zeros((4, 5), dtype=bool))
    np.testing.assert_allclose(deeper.of_each() - LEAST_EFFORT, [0.375, 0.375, 0.5, 0.75])
    deeper.pick(0)
    np.testing.assert_allclose(deeper.of_each() - LEAST_EFFORT, [0.0, 0.0, 0.25, 0.75])


def test_a_skipped_layer_takes_no_effort():
    retention = np.array([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.5, 1.0, 0.5, 0.5]])
    skipped = np.zeros((3, LAYERS), dtype=bool)
    skipped[1, 2] = skipped[2, 1] = True
    effort = SharedEffort.of(retention, skipped)
    np.testing.assert_allclose(effort.of_each() - LEAST_EFFORT, [0.25, 0.0, 0.5])
    effort.pick(0)
    np.testing.assert_allclose(effort.of_each() - LEAST_EFFORT, [0.0, 0.0, 0.5])


def test_lat_breeds_from_the_hull_in_turn_by_mutation_and_mean():
    study = search("lat", 20, seed=0)
    sampler = LatSampler(ANY, SPACE, seed=0)
    parents = np.cumprod([[study.trials[n].params[name] for name in SPACE] for n in range(20)], axis=1)
    values = np.array([trial.values for trial in study.trials])
    hull = parents[convex_hull(values[:, 1] / values[:, 1].max(), values[:, 0])]
    means = [(a + b) / 2 for a in hull for b in hull]
    for number in range(20, 60):
        trial = optuna.trial.create_trial(values=[0.0, 0.0])
        trial.number = number
        child = np.cumprod(list(sampler.sample_relative(study, trial, SPACE).values()))
        if number % 2:
            assert min(np.abs(child - mean).max() for mean in means) < 1e-6
        else:
            assert any(is_mutation(child, parent) for parent in hull)


def is_mutation(child, parent):
    """Each share is the parent's, or lies between the parent's next and the child's own last."""
    below, above = np.append(parent[1:], 0.0), np.append(1.0, child[:-1])
    return bool(((np.abs(child - parent) < 1e-6) | ((below - 1e-6 <= child) & (child <= above + 1e-6))).all())
