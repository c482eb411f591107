"""Trials asked in memory stand in the database as Optuna itself would have put them."""

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import NSGAIISampler
from optuna.trial import TrialState

from hpo.mirror import MirroredStudy, Told
from hpo.once import TOKEN
from hpo.storage import open_storage

SPACE = {name: FloatDistribution(0.0, 1.0) for name in ("x", "y")}


@pytest.fixture
def database(storage):
    return open_storage(storage)


@pytest.fixture
def study(database):
    return optuna.create_study(storage=database, study_name="s", directions=["maximize", "minimize"])


def values(params) -> tuple[float, float]:
    return params["x"] - params["y"] ** 2, params["x"] + params["y"]


def told(asked, attributes=None) -> Told:
    return Told(trial=asked, values=values(asked.params), attributes=attributes or {})


def test_search_equals_the_one_that_optuna_runs_on_the_database(study, database):
    direct = optuna.create_study(
        storage=database,
        study_name="direct",
        directions=["maximize", "minimize"],
        sampler=NSGAIISampler(population_size=8, seed=3),
    )
    mirror = MirroredStudy(study, database, NSGAIISampler(population_size=8, seed=3), SPACE)
    for _ in range(4):
        mirror.tell([told(one) for one in mirror.ask(8)])
        trials = [direct.ask(dict(SPACE)) for _ in range(8)]
        for trial in trials:
            direct.tell(trial, values(trial.params))
    for one, other in zip(study.trials, direct.trials, strict=True):
        assert (one.number, one.state, one.params, one.values) == (
            other.number,
            other.state,
            other.params,
            other.values,
        )
        theirs = {key: value for key, value in other.system_attrs.items() if key != TOKEN}
        assert (one.system_attrs, one.distributions) == (theirs, other.distributions)
        assert one.datetime_start <= one.datetime_complete


def test_running_trial_is_in_the_database_whole(study, database):
    mirror = MirroredStudy(study, database, NSGAIISampler(seed=0), SPACE)
    (asked,) = mirror.ask(1, lambda params: {"sum": params["x"] + params["y"]})
    (trial,) = study.trials
    assert (trial.state, trial.params, trial.number) == (TrialState.RUNNING, asked.params, asked.number)
    assert trial.user_attrs == {"sum": trial.params["x"] + trial.params["y"]}


def test_enqueued_parameters_come_first_and_become_parents(study, database):
    mirror = MirroredStudy(study, database, NSGAIISampler(population_size=4, seed=0), SPACE)
    mirror.enqueue({"x": 1.0, "y": 0.0})
    asked = mirror.ask(4)
    assert asked[0].params == {"x": 1.0, "y": 0.0}
    assert [trial.system_attrs["NSGAIISampler:generation"] for trial in study.trials] == [0, 0, 0, 0]


def test_sampler_goes_on_where_the_database_stands(study, database):
    first = MirroredStudy(study, database, NSGAIISampler(population_size=4, seed=0), SPACE)
    for _ in range(4):
        first.tell([told(one) for one in first.ask(1)])
    again = MirroredStudy(study, database, NSGAIISampler(population_size=4, seed=1), SPACE)
    again.ask(1)
    assert study.trials[-1].system_attrs["NSGAIISampler:generation"] == 1


def test_a_trial_without_a_worker_is_gone_on_with_unless_it_was_half_asked(study, database):
    (whole,) = MirroredStudy(study, database, NSGAIISampler(seed=0), SPACE).ask(1)
    half = study.ask()
    mirror = MirroredStudy(study, database, NSGAIISampler(seed=0), SPACE)
    (again,) = mirror.ask(3)
    assert (again.number, again.params) == (whole.number, whole.params)
    mirror.tell([told(again)])
    assert study.trials[whole.number].state == TrialState.COMPLETE
    assert study.trials[half.number].state == TrialState.FAIL
    assert "while asking" in study.trials[half.number].user_attrs["failure"]


def test_failed_trial_says_why(study, database):
    mirror = MirroredStudy(study, database, NSGAIISampler(seed=0), SPACE)
    finished, running = mirror.ask(2)
    mirror.tell([told(finished)])
    assert mirror.unfinished_numbers() == [running.number]
    mirror.fail([finished, running], "interrupted")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert [trial.user_attrs for trial in study.trials] == [{}, {"failure": "interrupted"}]
    assert mirror.unfinished_numbers() == []


def test_trials_of_a_deleted_study_need_not_be_failed(study, database):
    mirror = MirroredStudy(study, database, NSGAIISampler(seed=0), SPACE)
    asked = mirror.ask(2)
    optuna.delete_study(study_name=study.study_name, storage=database)
    mirror.fail(asked, "interrupted")


def test_a_trial_stopped_early_is_pruned_in_the_database_and_for_the_sampler(study, database):
    mirror = MirroredStudy(study, database, NSGAIISampler(population_size=4, seed=0), SPACE)
    first, *others = mirror.ask(5)
    stopped = Told(trial=first, values=None, attributes={"stopped_by": 7})
    mirror.tell([stopped, *(told(one, {"correct": "abc"}) for one in others)])
    (pruned,) = study.get_trials(states=(TrialState.PRUNED,))
    assert (pruned.number, pruned.values, pruned.user_attrs) == (0, None, {"stopped_by": 7})
    assert [trial.state for trial in mirror.copy.trials if trial.state.is_finished()].count(TrialState.PRUNED) == 1
    assert {trial.user_attrs["correct"] for trial in study.get_trials(states=(TrialState.COMPLETE,))} == {"abc"}
    (child,) = mirror.ask(1)
    assert child.system_attrs["NSGAIISampler:generation"] == 1, "four trials were completed"
