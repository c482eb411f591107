import dataclasses
import io
import itertools
import json
import math
import re
import time
import warnings

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from rich.console import Console

from hpo.errors import EmptyFront, HpoError
from hpo.front import (
    Front,
    FrontPoint,
    LatencySource,
    NothingFits,
    NotLengthStudy,
    choose,
    compute_front,
    constant_rate,
    flops_text,
    front_table,
    front_to_json,
    hypervolume,
    hypervolume_history,
    ms_text,
    non_dominated,
    percents,
)

FULL_MACS = 1000.0
STORAGE = "sqlite:///hpo.db"

# A coarse grid, so that ties in one respect and duplicates in both are common.
grid_points = st.lists(st.tuples(st.integers(0, 6), st.integers(-2, 6)), max_size=25)
eighths = st.lists(st.tuples(st.integers(0, 10), st.integers(-2, 8)), max_size=25)
unit_floats = st.floats(0.0, 1.0, allow_subnormal=False)
float_points = st.lists(st.tuples(unit_floats, unit_floats), max_size=12)


def beats(one, other):
    """Whether the (cost, quality) pair `one` dominates `other`."""
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def brute_force_front(points):
    return sorted(
        (point, index)
        for index, point in enumerate(points)
        if not any(beats(other, point) for other in points) and point not in points[:index]
    )


def brute_force_area(points):
    """Sum of the cells between neighbouring coordinates whose worst corner some point dominates."""
    costs = sorted({1.0, *(cost for cost, _ in points if cost <= 1.0)})
    qualities = sorted({0.0, *(quality for _, quality in points if quality >= 0.0)})
    return math.fsum(
        (right - left) * (top - bottom)
        for left, right in itertools.pairwise(costs)
        for bottom, top in itertools.pairwise(qualities)
        if any(cost <= left and quality >= top for cost, quality in points)
    )


def make_study(trials, *, name="lengths", directions=("maximize", "minimize"), **attrs):
    """A length study holding (retentions, metric, macs) for completed trials, None for trials stopped early."""
    study = optuna.create_study(directions=directions, study_name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["accuracy", "macs"])
    study.set_user_attr("full_macs", FULL_MACS)
    for trial in trials:
        if trial is None:
            study.add_trial(create_trial(state=TrialState.PRUNED))
            continue
        retentions, metric, macs = trial
        names = [f"retention_{layer}" for layer in range(len(retentions))]
        study.add_trial(
            create_trial(
                values=[metric, macs],
                params=dict(zip(names, retentions, strict=True)),
                distributions=dict.fromkeys(names, FloatDistribution(0.1, 1.0)),
                user_attrs={"shares": [float(share) for share in np.cumprod(retentions)]},
            )
        )
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    return study


def make_front(scores, full=(0.9, 1.0)):
    """A front of the given (metric, relative cost) pairs, cheapest first; the last trial is the full length."""

    def point(trial, metric, cost):
        return FrontPoint(
            trial=trial,
            shares=(cost, cost),
            metric=metric,
            report_metric=None,
            macs=cost * FULL_MACS,
            relative_macs=cost,
        )

    points = tuple(point(trial, *score) for trial, score in enumerate(scores))
    return Front(
        study="lengths",
        storage=STORAGE,
        trials=len(scores),
        metric="accuracy",
        direction="maximize",
        cost="macs",
        unit="MAC",
        full=point(len(scores), *full),
        hypervolume=0.5,
        points=points,
    )


@pytest.fixture
def study():
    """Full length (0), two constant rates (1, 2), a better mixed one (3), its duplicate (4), a dominated one (6)."""
    return make_study(
        [
            ((1.0, 1.0), 0.90, 1000.0),
            ((0.8, 0.8), 0.85, 700.0),
            ((0.5, 0.5), 0.70, 400.0),
            ((0.9, 0.6), 0.88, 600.0),
            ((0.9, 0.61), 0.88, 600.0),
            None,
            ((0.7, 0.9), 0.80, 650.0),
        ],
        **{
            "report_metric:0": 0.89,
            "report_metric:3": 0.86,
            "report_macs:3": 610.0,
            "report_full_macs": 1220.0,
            "median_tokens": 20,
            "workload": {"model": "tiny", "data": {"dataset": "demo"}},
        },
    )


@given(grid_points)
def test_non_dominated_points_equal_brute_force_with_ties_and_duplicates(points):
    indices = non_dominated([cost for cost, _ in points], [quality for _, quality in points])
    assert [(points[index], index) for index in indices] == brute_force_front(points)


@given(float_points)
def test_non_dominated_points_equal_brute_force_on_arbitrary_numbers(points):
    indices = non_dominated([cost for cost, _ in points], [quality for _, quality in points])
    assert [(points[index], index) for index in indices] == brute_force_front(points)


@given(eighths)
def test_hypervolume_equals_counted_cells_even_with_points_beyond_the_reference(points):
    cells = sum(
        any(cost <= column and quality > row for cost, quality in points) for column in range(8) for row in range(8)
    )
    area = hypervolume([cost / 8 for cost, _ in points], [quality / 8 for _, quality in points])
    assert area == pytest.approx(cells / 64, abs=1e-12)


@given(float_points)
def test_hypervolume_equals_brute_force_on_arbitrary_numbers(points):
    area = hypervolume([cost for cost, _ in points], [quality for _, quality in points])
    assert area == pytest.approx(brute_force_area(points), abs=1e-12)


def test_front_of_a_random_study_equals_optuna_and_brute_force():
    rng = np.random.default_rng(0)
    trials = [((1.0, 1.0), 0.8, FULL_MACS)]
    trials += [
        ((0.9, 0.5 + step / 1000), float(quality) / 20, 50.0 * float(cost))
        for step, (quality, cost) in enumerate(rng.integers(1, 20, (300, 2)))
    ]
    study = make_study(trials)
    front = compute_front(study, STORAGE)
    scores = [(macs / FULL_MACS, metric) for _, metric, macs in trials]
    assert [point.trial for point in front.points] == [number for _, number in brute_force_front(scores)]
    assert {(p.metric, p.macs) for p in front.points} == {tuple(trial.values) for trial in study.best_trials}
    assert front.hypervolume == pytest.approx(brute_force_area(scores), abs=1e-12)
    listed = {(point.metric, point.macs) for point in front.points}
    expected = [number for number, (_, metric, macs) in enumerate(trials) if (metric, macs) not in listed]
    assert [point.trial for point in front.dominated] == expected


def test_history_equals_recomputation_on_every_prefix():
    rng = np.random.default_rng(1)
    trials = [((0.9, 0.8), *map(float, (rng.integers(-2, 20) / 20, rng.integers(1, 22) * 50))) for _ in range(120)]
    for number in (0, 17, 60):
        trials[number] = None
    history = hypervolume_history(make_study(trials))
    assert len(history) == len(trials)
    for count, area in enumerate(history, start=1):
        scores = [(trial[2] / FULL_MACS, trial[1]) for trial in trials[:count] if trial is not None]
        assert area == pytest.approx(brute_force_area(scores), abs=1e-12)


def test_history_ends_at_the_hypervolume_of_the_front(study):
    history = hypervolume_history(study)
    assert len(history) == 7
    assert history[-1] == pytest.approx(compute_front(study, STORAGE).hypervolume, abs=1e-12)


def test_history_of_an_empty_study_is_empty():
    assert hypervolume_history(make_study([])) == []


def test_history_skips_failed_and_running_trials():
    study = make_study([((0.5, 0.5), 0.5, 500.0)])
    study.add_trial(create_trial(state=TrialState.FAIL))
    study.ask()
    assert hypervolume_history(study) == [pytest.approx(0.25)]


def test_history_of_five_thousand_trials_takes_seconds_at_most():
    rng = np.random.default_rng(2)
    study = make_study([])
    study.add_trials(
        create_trial(values=[float(cost) + float(rng.normal(0, 0.01)), 1000 * float(cost)])
        for cost in rng.uniform(0.1, 1.0, 5000)
    )
    start = time.process_time()
    history = hypervolume_history(study)
    assert time.process_time() - start < 2.0
    assert len(history) == 5000


def test_front_separates_full_length_constant_rates_and_dominated_trials(study):
    front = compute_front(study, STORAGE)
    assert (front.study, front.metric, front.direction, front.cost, front.unit) == (
        "lengths",
        "accuracy",
        "maximize",
        "macs",
        "MAC",
    )
    assert [point.trial for point in front.points] == [2, 3, 0]  # 4 equals 3 and came later
    assert [point.trial for point in front.dominated] == [1, 6]
    assert [point.trial for point in front.constant_rate] == [2, 1, 0]
    assert front.full.trial == 0
    assert (front.median_tokens, front.workload) == (20, {"model": "tiny", "data": {"dataset": "demo"}})


def test_front_point_carries_both_splits(study):
    cheapest, point, full = compute_front(study, STORAGE).points
    assert point == FrontPoint(
        trial=3,
        shares=(0.9, pytest.approx(0.54)),
        metric=0.88,
        report_metric=0.86,
        macs=600.0,
        relative_macs=0.6,
        report_relative_macs=0.5,
    )
    assert (cheapest.report_metric, cheapest.report_relative_macs) == (None, None)
    assert (full.report_metric, full.report_relative_macs) == (0.89, None)


def test_trials_stopped_early_count_as_finished_but_never_enter_the_front(study):
    study.add_trial(
        create_trial(
            state=TrialState.PRUNED,
            values=[1.0, 1.0],  # would beat everything
            params={"retention_0": 0.1, "retention_1": 0.1},
            distributions=dict.fromkeys(["retention_0", "retention_1"], FloatDistribution(0.1, 1.0)),
            user_attrs={"shares": [0.1, 0.01]},
        )
    )
    front = compute_front(study, STORAGE)
    assert front.trials == 8
    numbers = {point.trial for point in (*front.points, *front.dominated, *front.constant_rate)}
    assert numbers == {0, 1, 2, 3, 6}
    assert hypervolume_history(study)[-1] == pytest.approx(front.hypervolume, abs=1e-12)


def test_failed_and_running_trials_are_not_counted(study):
    study.add_trial(create_trial(state=TrialState.FAIL))
    study.ask()
    assert compute_front(study, STORAGE).trials == 7


def test_retentions_that_a_grid_step_rounded_differently_are_one_rate():
    study = make_study([((1.0, 1.0), 0.9, 1000.0), ((0.65, 0.4 + 5 * 0.05), 0.8, 500.0)])
    assert [point.trial for point in compute_front(study, STORAGE).constant_rate] == [1, 0]


def test_password_of_the_storage_is_hidden(study):
    front = compute_front(study, "postgresql://ada:secret@host/hpo")
    assert front.storage == "postgresql://ada:***@host/hpo"


@pytest.mark.parametrize("trials", [[], [None, None], [((0.5, 0.5), 0.5, 500.0)]])
def test_front_without_a_completed_full_length_trial_says_what_to_run(trials):
    with pytest.raises(EmptyFront, match=r"'lengths'.*`hpo search-lengths`"):
        compute_front(make_study(trials), STORAGE)


def test_a_trial_without_its_length_config_has_the_one_of_its_parameters(study, study_in_depth):
    for whole in (study, study_in_depth):
        bare = optuna.create_study(directions=whole.directions, study_name="lengths")
        bare.set_user_attr("full_macs", FULL_MACS)
        for trial in whole.get_trials():
            for name in ("shares", "skipped"):
                trial.user_attrs.pop(name, None)
            bare.add_trial(trial)
        (front, expected) = (compute_front(one, STORAGE) for one in (bare, whole))
        assert [(p.trial, p.skipped) for p in front.points] == [(p.trial, p.skipped) for p in expected.points]
        assert [p.shares for p in front.points] == [pytest.approx(p.shares) for p in expected.points]


def test_a_trial_whose_macs_are_not_known_is_no_point_where_time_is_the_cost():
    study = make_study([((1.0, 1.0), 0.9, 10.0), ((0.5, 0.5), 0.8, 5.0)])
    timed = optuna.create_study(directions=study.directions, study_name="lengths")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        timed.set_metric_names(["accuracy", "latency_ms"])
    for key, value in {"full_macs": FULL_MACS, "full_latency_ms": 10.0}.items():
        timed.set_user_attr(key, value)
    full, short = study.get_trials()
    full.user_attrs = {**full.user_attrs, "macs": FULL_MACS}
    timed.add_trials([full, short])
    front = compute_front(timed, STORAGE)
    assert (front.trials, [point.trial for point in front.points]) == (2, [0])


def test_a_trial_that_skips_a_layer_is_no_constant_rate_nor_full_length():
    assert constant_rate({"retention_0": 0.5, "retention_1": 0.5}) == 0.5
    assert constant_rate({"retention_0": 0.5, "retention_1": 0.6}) is None
    assert constant_rate({"retention_0": 1.0, "retention_1": 1.0, "skip_1": False}) == 1.0
    assert constant_rate({"retention_0": 1.0, "retention_1": 1.0, "skip_1": True}) is None


@pytest.fixture
def study_in_depth():
    """Full length (0), full length without its second layer (1), and both layers short (2)."""
    study = make_study([((1.0, 1.0), 0.90, 1000.0), ((1.0, 1.0), 0.85, 520.0), ((0.5, 0.5), 0.70, 400.0)])
    deep = optuna.create_study(directions=("maximize", "minimize"), study_name="lengths")
    deep.set_user_attr("full_macs", FULL_MACS)
    for trial, skipped in zip(study.trials, ([], [1], []), strict=True):
        deep.add_trial(
            create_trial(
                values=trial.values,
                params={**trial.params, "skip_1": bool(skipped)},
                distributions={**trial.distributions, "skip_1": CategoricalDistribution((False, True))},
                user_attrs={**trial.user_attrs, "skipped": skipped},
            )
        )
    return deep


def test_a_study_that_searches_depth_tells_which_layers_a_point_skips(study_in_depth):
    front = compute_front(study_in_depth, STORAGE)
    assert [(point.trial, point.skipped) for point in front.points] == [(2, ()), (1, (1,)), (0, ())]
    assert front.full.trial == 0
    assert [point.trial for point in front.constant_rate] == [2, 0]
    document = front_to_json(front, front.points[1])
    assert [point["skipped"] for point in document["points"]] == [[], [1], []]
    assert list(document["chosen"])[:3] == ["trial", "shares", "skipped"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(front_table(front, None))
    text = console.export_text()
    assert re.search(r"\b1 +100 +- +0\.8500", text)
    assert "- marks a skipped layer." in " ".join(text.split())


def test_study_with_other_objectives_is_refused():
    study = optuna.create_study(direction="maximize", study_name="finetune")
    with pytest.raises(NotLengthStudy, match=r"'finetune' has the objectives \(maximize\).*`hpo search-lengths`"):
        compute_front(study, STORAGE)
    with pytest.raises(NotLengthStudy, match="'finetune'"):
        hypervolume_history(study)


def test_foreign_study_with_the_same_objectives_is_refused():
    study = optuna.create_study(directions=["maximize", "minimize"], study_name="foreign")
    study.add_trial(create_trial(values=[0.5, 100.0]))
    with pytest.raises(NotLengthStudy, match="Trial 0 of study 'foreign' records no length config"):
        compute_front(study, STORAGE)
    with pytest.raises(NotLengthStudy, match="'foreign' does not record the cost of full length"):
        hypervolume_history(study)


@given(grid_points.filter(bool), st.integers(0, 8))
def test_max_drop_gives_the_cheapest_point_that_keeps_the_metric(points, drop):
    points = [(cost + 1, quality) for cost, quality in points] + [(8, 4)]
    best = [point for point, _ in brute_force_front(points)]
    front = make_front([(quality / 10, cost / 8) for cost, quality in best], full=(0.4, 1.0))
    expected = min(cost for cost, quality in points if quality >= 4 - drop)
    chosen = choose(front, max_drop=drop / 10)
    assert chosen in front.points
    assert chosen.relative_macs == expected / 8


@given(grid_points.filter(bool), st.integers(1, 8))
def test_budget_gives_the_best_point_within_it(points, budget):
    points = [(cost + 1, quality) for cost, quality in points]
    best = [point for point, _ in brute_force_front(points)]
    front = make_front([(quality / 10, cost / 8) for cost, quality in best])
    affordable = [quality for cost, quality in points if cost <= budget]
    if not affordable:
        with pytest.raises(NothingFits):
            choose(front, budget=budget / 8)
    else:
        chosen = choose(front, budget=budget / 8)
        assert chosen.metric == max(affordable) / 10
        assert chosen.relative_macs <= budget / 8


def test_drop_that_is_met_exactly_is_accepted_despite_rounding():
    front = make_front([(0.83, 0.5), (0.93, 1.0)], full=(0.93, 1.0))
    assert 0.93 - 0.1 > 0.83  # what rounding makes of it
    assert choose(front, max_drop=0.1).metric == 0.83


def test_no_drop_gives_the_cheapest_point_as_good_as_full_length():
    front = make_front([(0.7, 0.3), (0.9, 0.6), (0.95, 0.8)], full=(0.9, 1.0))
    assert choose(front, max_drop=0.0).relative_macs == 0.6


def test_choice_ignores_the_report_split(study):
    before = compute_front(study, STORAGE)
    study.set_user_attr("report_metric:3", 0.0)
    after = compute_front(study, STORAGE)
    for wish in ({"max_drop": 0.03}, {"budget": 0.7}):
        assert choose(before, **wish).trial == choose(after, **wish).trial == 3


def test_budget_below_the_cheapest_point_names_the_smallest_one_that_fits():
    front = make_front([(0.5, 0.23121), (0.9, 1.0)])
    with pytest.raises(NothingFits, match=r"costs 0\.1 of full length.*trial 0.*0\.2313 or more") as failure:
        choose(front, budget=0.1)
    assert isinstance(failure.value, HpoError)
    assert choose(front, budget=0.2313).trial == 0


@pytest.mark.parametrize(
    ("wish", "shown"),
    [
        ({}, "exactly one"),
        ({"max_drop": 0.1, "budget": 0.5}, "exactly one"),
        ({"max_drop": -0.1}, r"max_drop=-0\.1"),
        ({"max_drop": math.nan}, "max_drop=nan"),
        ({"budget": 0.0}, r"budget=0\.0"),
        ({"budget": 1.5}, r"budget=1\.5"),
        ({"budget": math.nan}, "budget=nan"),
    ],
)
def test_wish_out_of_range_is_a_value_error(wish, shown):
    with pytest.raises(ValueError, match=shown):
        choose(make_front([(0.9, 1.0)]), **wish)


def test_json_has_exactly_the_promised_keys(study):
    front = compute_front(study, STORAGE)
    document = json.loads(json.dumps(front_to_json(front, choose(front, budget=0.7)), allow_nan=False))
    point = {
        "trial": 3,
        "shares": [0.9, pytest.approx(0.54)],
        "metric": 0.88,
        "report_metric": 0.86,
        "macs": 600.0,
        "relative_macs": 0.6,
        "latency_ms": None,
    }
    assert document == {
        "study": "lengths",
        "storage": STORAGE,
        "trials": 7,
        "metric": {"name": "accuracy", "direction": "maximize"},
        "cost": {"name": "macs", "unit": "MAC"},
        "full": document["points"][2],
        "hypervolume": pytest.approx((0.6 - 0.4) * 0.70 + (1.0 - 0.6) * 0.88),
        "points": [
            point
            | {"trial": 2, "shares": [0.5, 0.25], "metric": 0.7, "report_metric": None}
            | {"macs": 400.0, "relative_macs": 0.4},
            point,
            point
            | {"trial": 0, "shares": [1.0, 1.0], "metric": 0.9, "report_metric": 0.89}
            | {"macs": 1000.0, "relative_macs": 1.0},
        ],
        "chosen": point,
    }


def test_json_without_a_choice_says_null(study):
    assert front_to_json(compute_front(study, STORAGE), None)["chosen"] is None


def rendered(front, chosen, width):
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(front_table(front, chosen, width))
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_table_shows_every_point_marks_the_choice_and_ends_with_full_length(study, width):
    front = compute_front(study, STORAGE)
    lines = rendered(front, choose(front, budget=0.7), width)
    rows = [line.split() for line in lines if "FLOPs" in line and "%" in line and "per MAC" not in line]
    assert [row for row in rows if row[0] != "trial"] == [
        ["2", "50", "25", "0.7000", "-", "40.0%", "800", "FLOPs"],
        ["*", "3", "90", "54", "0.8800", "0.8600", "60.0%", "1.20", "kFLOPs"],
        ["0", "100", "100", "0.9000", "0.8900", "100.0%", "2.00", "kFLOPs"],
        ["0", "full", "length", "0.9000", "0.8900", "100.0%", "2.00", "kFLOPs"],
    ]
    assert any("hypervolume 0.4920" in line for line in lines)
    assert "the same model at full length without padding" in " ".join(lines)


def test_table_of_twelve_layers_fits_eighty_columns_uncut():
    retentions = (0.95,) * 12
    study = make_study([((1.0,) * 12, 0.9123, 7.5e8), (retentions, 0.8987, 5.125e8)])
    study.set_user_attr("full_macs", 7.5e8)
    study.set_user_attr("report_metric:1", 0.8876)
    front = compute_front(study, STORAGE)
    lines = rendered(front, front.points[0], 80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    first, second = (line.split() for line in lines[lines.index(next(ln for ln in lines if "*" in ln)) :][:2])
    shares = [f"{100 * 0.95**layer:.0f}" for layer in range(1, 13)]
    assert first == ["*", "1", *shares[:6], "0.8987", "0.8876", "68.3%", "1.02", "GFLOPs"]
    assert second == shares[6:]


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("metric", ["f1", "subset_accuracy", "pearson"])
def test_whatever_the_table_shows_is_whole(metric, width):
    front = busy_front(metric)
    lines = rendered(front, front.points[0], width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    first, full = (next(line for line in lines if mark in line) for mark in ("1479", "full length"))
    assert [first.split()[index] for index in (0, 1, -1)] == ["*", "1479", "10.3"]
    assert full.split()[-1] == "123"
    assert "-0.1234" in first and "-0.0567" in first and "68.3%" in first  # noqa: PT018
    caption = " ".join(" ".join(lines).split())
    for name, shown in (("FLOPs", "1.02 GFLOPs" in first), ("exact_match", "0.7777" in first)):
        assert shown != bool(re.search(rf"No room here for [^.]*{name}", caption))
    if width == 140:
        assert "No room" not in caption


def test_times_of_seconds_are_whole_in_eighty_columns():
    front = busy_front("matthews_correlation")
    full, *points = (
        dataclasses.replace(point, latency_ms=ms, predicted_ms=ms, relative_ms=1.0)
        for point, ms in zip((front.full, *front.points), (1234.5, 999.7, 1234.5), strict=True)
    )
    front = dataclasses.replace(front, full=full, points=tuple(points), predicted_for=front.latency)
    lines = rendered(front, None, 80)
    first, last = (next(line.split() for line in lines if mark in line) for mark in ("1479", "full length"))
    assert first[-2:] == ["1000", "1000"]
    assert last[-2:] == ["1234", "1234"]


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0.01234, "0.0123"), (9.5, "9.5"), (123.4, "123"), (999.4, "999"), (999.5, "1000"), (23456.7, "23457")],
)
def test_milliseconds_are_digits_never_powers_of_ten(ms, text):
    assert ms_text(ms) == text


def busy_front(metric):
    """Two points of an encoder of twelve layers, with another metric beside, both timed."""
    shares = tuple(0.95**layer for layer in range(1, 13))
    source = LatencySource(processor="a processor", threads=2, precision="fp32", batch_size=1)
    point = FrontPoint(
        trial=1479,
        shares=shares,
        metric=-0.1234,
        report_metric=-0.0567,
        macs=5.12e8,
        relative_macs=0.683,
        latency_ms=10.3,
        metrics={metric: -0.1234, "exact_match": 0.7},
        report_metrics={metric: -0.0567, "exact_match": 0.7777},
    )
    full = dataclasses.replace(point, trial=0, shares=(1.0,) * 12, relative_macs=1.0, macs=7.5e8, latency_ms=123.0)
    return dataclasses.replace(make_front([]), metric=metric, full=full, points=(point, full), latency=source)


def test_table_shows_a_study_name_as_it_stands():
    study = make_study([((1.0, 1.0), 0.9, 1000.0)], name="[bold]x[/bold]")
    assert any("[bold]x[/bold]" in line for line in rendered(compute_front(study, STORAGE), None, 80))


@pytest.mark.parametrize("width", [40, 200])
def test_table_shows_names_of_a_database_without_what_steers_the_terminal(width):
    front, steering = busy_front("f1\x1b[2J"), "\x1b]0;title\x07"
    source = dataclasses.replace(front.latency, processor=steering)
    full = dataclasses.replace(front.full, report_metrics={**front.full.report_metrics, steering: 0.5})
    front = dataclasses.replace(front, study=steering, full=full, latency=source, predicted_for=source)
    text = "\n".join(rendered(front, None, width))
    assert "\x1b" not in text
    assert "\x07" not in text


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ((1.0, 0.9, 0.545), "100  90  55"),
        ((0.004, 0.001), " <1  <1"),
        ((1.0,) * 7, "100 100 100 100 100 100\n100"),
    ],
)
def test_shares_are_written_in_aligned_percent(shares, text):
    assert percents(shares) == text


@pytest.mark.parametrize(
    ("macs", "text"),
    [
        (0.0, "0 FLOPs"),
        (400.0, "800 FLOPs"),
        (600.0, "1.20 kFLOPs"),
        (6.15e6, "12.3 MFLOPs"),
        (6.15e7, "123 MFLOPs"),
        (499.9e6, "1.00 GFLOPs"),
        (35_340_779_520, "70.7 GFLOPs"),
        (1e15, "2.00 PFLOPs"),
    ],
)
def test_flops_are_two_per_mac_with_three_digits(macs, text):
    assert flops_text(macs) == text
