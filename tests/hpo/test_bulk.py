"""Trials entered and finished together stand in the database as Optuna itself puts them, one by one."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hpo.bulk import Batch, Known, Outcome, enter_trials, finish_trials, look
from hpo.once import TOKEN
from hpo.storage import close, open_storage

SPACE = {
    "retention_0": FloatDistribution(0.05, 1.0, step=0.05),
    "learning_rate": FloatDistribution(1e-5, 1e-3, log=True),
    "epochs": IntDistribution(1, 3),
    "batch_size": CategoricalDistribution([16, 32]),
}


@pytest.fixture
def database(any_url):
    storage = open_storage(any_url)
    yield storage
    close(storage)


def study_in(database, name="bulk"):
    return optuna.create_study(storage=database, study_name=name, directions=["maximize", "minimize"])


def running(number: int) -> FrozenTrial:
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime(2026, 1, 2, 3, 4, number),
        datetime_complete=None,
        params={"retention_0": 0.35, "learning_rate": 3e-4, "epochs": 1 + number % 3, "batch_size": 32},
        distributions=SPACE,
        user_attrs={"shares": [0.35, 0.1 + number / 100], "quote": 'it\'s 50 % \u2013 "half"'},
        system_attrs={"NSGAIISampler:generation": number},
        intermediate_values={},
    )


def facts(study):
    return [
        (
            trial.number,
            trial.state,
            trial.values,
            trial.params,
            list(trial.params),
            trial.distributions,
            trial.user_attrs,
            {key: value for key, value in trial.system_attrs.items() if key != TOKEN},
            trial.datetime_start,
            trial.datetime_complete is None,
        )
        for trial in study.get_trials()
    ]


def in_order(trial) -> str:
    """All of a trial, in which nan equals itself; Optuna gives attributes in no order in particular."""
    fields = {
        name: sorted(map(repr, one.items())) if isinstance(one, dict) else one for name, one in vars(trial).items()
    }
    return repr(fields)


def test_entered_trials_equal_those_that_optuna_enters(database):
    ours, theirs = study_in(database), study_in(database, "optuna's own")
    theirs_ids = [database.create_new_trial(theirs._study_id, running(number)) for number in range(3)]
    entered = enter_trials(database, ours._study_id, [running(number) for number in range(3)])
    entered += enter_trials(database, ours._study_id, [running(3)])
    theirs_ids.append(database.create_new_trial(theirs._study_id, running(3)))
    assert [number for number, _ in entered] == [0, 1, 2, 3]
    assert facts(ours) == facts(theirs)
    for (number, trial_id), their_id in zip(entered, theirs_ids, strict=True):
        assert database.get_trial(trial_id).number == number == database.get_trial(their_id).number


def test_finished_trials_equal_those_that_optuna_finishes(database):
    ours, theirs = study_in(database), study_in(database, "optuna's own")
    outcomes = [
        (TrialState.COMPLETE, (0.9, 1e9), {"correct": "abc", "quote": "replaced"}),
        (TrialState.COMPLETE, (float("inf"), float("-inf")), {}),
        (TrialState.PRUNED, None, {"stopped_by": 0}),
        (TrialState.FAIL, None, {"failure": "it rained"}),
    ]
    entered = enter_trials(database, ours._study_id, [running(number) for number in range(4)])
    finish_trials(
        database,
        [
            Outcome(trial_id=trial_id, state=state, values=values, attributes=attributes)
            for (_, trial_id), (state, values, attributes) in zip(entered, outcomes, strict=True)
        ],
    )
    for number, (state, values, attributes) in enumerate(outcomes):
        their_id = database.create_new_trial(theirs._study_id, running(number))
        for key, value in attributes.items():
            database.set_trial_user_attr(their_id, key, value)
        database.set_trial_state_values(their_id, state, values)
    assert facts(ours) == facts(theirs)
    assert [trial.state for trial in ours.trials] == [state for state, _, _ in outcomes]


def test_an_attribute_that_a_trial_has_is_written_anew_when_it_finishes(database):
    study = study_in(database)
    places = enter_trials(database, study._study_id, [running(0), running(1), running(2)])
    ids = [trial_id for _, trial_id in places]
    database.set_trial_user_attr(ids[1], "metrics", "before")
    outcomes = [
        Outcome(trial_id=trial_id, state=TrialState.PRUNED, attributes={"metrics": trial_id, "quote": "another"})
        for trial_id in ids[:2]
    ]
    finish_trials(database, [*outcomes, Outcome(trial_id=ids[2], state=TrialState.FAIL)])
    attributes = [trial.user_attrs for trial in study.get_trials()]
    assert [one.get("metrics") for one in attributes] == [ids[0], ids[1], None]
    assert [one["quote"] for one in attributes] == ["another", "another", running(0).user_attrs["quote"]]
    assert [one["shares"] for one in attributes] == [running(number).user_attrs["shares"] for number in range(3)]


def test_times_are_those_of_the_clock_wherever_the_machine_stands(database, time_zone):
    time_zone("Asia/Tokyo")
    study = study_in(database)
    ((_, trial_id),) = enter_trials(database, study._study_id, [running(0)])
    finish_trials(database, [Outcome(trial_id=trial_id, state=TrialState.FAIL)])
    (trial,) = study.trials
    assert trial.datetime_start == running(0).datetime_start
    assert abs(trial.datetime_complete - datetime.now()) < timedelta(minutes=1)


def test_trials_are_read_as_optuna_reads_them(database):
    study = study_in(database)
    enter_trials(database, study._study_id, [running(number) for number in range(3)])
    for trial_id, step, value in ((1, 1, 0.5), (1, 2, float("nan")), (2, 1, float("-inf"))):
        database.set_trial_intermediate_value(trial_id, step, value)
    finish_trials(database, [Outcome(trial_id=2, state=TrialState.COMPLETE, values=(float("inf"), -1e300))])
    database.create_new_trial(study._study_id)
    study.enqueue_trial({"epochs": 2})
    _, ours = look(database, study._study_id, Known(), {})
    theirs = study.get_trials(deepcopy=False)
    assert list(map(in_order, ours)) == list(map(in_order, theirs))
    assert [list(trial.params) for trial in ours] == [list(trial.params) for trial in theirs]


def test_of_a_workers_own_trials_and_those_it_has_seen_so_nothing_more_is_read(database):
    study = study_in(database)
    _, (_, own), (_, seen), (_, changed) = enter_trials(database, study._study_id, [running(n) for n in range(4)])
    finish_trials(database, [Outcome(trial_id=changed, state=TrialState.FAIL)])
    there = {own: None, seen: TrialState.RUNNING, changed: TrialState.RUNNING}
    rows, whole = look(database, study._study_id, Known(newest=own - 1, number=0), there)
    assert rows == [(own, 1, TrialState.RUNNING), (seen, 2, TrialState.RUNNING), (changed, 3, TrialState.FAIL)]
    assert [trial._trial_id for trial in whole] == [changed]


def test_numbers_follow_each_other_whatever_their_workers_know(database):
    study, other = study_in(database), study_in(database, "another")
    ((_, first),) = enter_trials(database, study._study_id, [running(0)], known=Known(number=-1))
    known = Known(newest=first, number=0)
    enter_trials(database, other._study_id, [running(1)])
    for batch in (None, Batch(worker="w", token="t")):
        enter_trials(database, study._study_id, [running(1), running(2)], known=known, batch=batch)
    assert [trial.number for trial in study.trials] == list(range(5))


def test_a_generation_enters_whole_or_not_at_all(database):
    study = study_in(database)
    broken = running(1)
    broken.user_attrs = {"unstorable": object()}
    with pytest.raises(TypeError):
        enter_trials(database, study._study_id, [running(0), broken])
    assert study.trials == []


def test_trials_finish_all_or_none(database):
    study = study_in(database)
    (_, first), (_, second) = enter_trials(database, study._study_id, [running(0), running(1)])
    finish_trials(database, [Outcome(trial_id=second, state=TrialState.FAIL)])
    with pytest.raises(UpdateFinishedTrialError, match="Trial 1 is finished"):
        finish_trials(
            database, [Outcome(trial_id=number, state=TrialState.COMPLETE, values=(1, 2)) for number in (first, second)]
        )
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.FAIL]
    assert [trial.values for trial in study.trials] == [None, None]


def test_an_unknown_study_is_an_error(database):
    study_in(database)
    with pytest.raises(KeyError):
        enter_trials(database, 12345, [running(0)])


def test_nothing_to_enter_and_nothing_to_finish(database):
    study = study_in(database)
    assert enter_trials(database, study._study_id, []) == []
    finish_trials(database, [])
    assert study.trials == []


def test_many_who_enter_trials_at_once_get_distinct_numbers(database):
    study = study_in(database)
    with ThreadPoolExecutor(4) as pool:
        entered = list(pool.map(lambda _: enter_trials(database, study._study_id, [running(0), running(1)]), range(12)))
    numbers = [number for pair in entered for number, _ in pair]
    assert sorted(numbers) == list(range(24))
    assert all(first + 1 == second for (first, _), (second, _) in entered), "a generation's numbers follow each other"
    assert sorted(trial.number for trial in study.trials) == list(range(24))
