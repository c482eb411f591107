"""What workers of one study see of each other: nothing is lost, run twice or waited for in vain."""

import signal
import threading
import time

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.trial import TrialState, create_trial

from hpo.bulk import (
    MAX_ATTEMPTS,
    Batch,
    Known,
    Outcome,
    Stale,
    claim_trials,
    enter_trials,
    finish_trials,
    queue_again,
    read_heartbeats,
)
from hpo.errors import HpoError
from hpo.heartbeats import Heartbeats, WorkerName, is_dead
from hpo.mirror import MirroredStudy, Told, TrialLost
from hpo.rehearsal import LAYERS, RehearsalJob, objectives
from hpo.rehearsal import SPACE as REHEARSED
from hpo.sharing import complete_study
from hpo.storage import close, open_storage
from hpo.transactions import FUNCTIONS
from studies.loader import LengthsStudy

SPACE = {name: FloatDistribution(0.0, 1.0) for name in ("x", "y")}


@pytest.fixture
def database(any_url):
    storage = open_storage(any_url)
    yield storage
    close(storage)


@pytest.fixture
def study(database):
    return optuna.create_study(storage=database, study_name="s", directions=["maximize", "minimize"])


def key_of(params) -> str:
    return f"{params['x']:.3f} {params['y']:.3f}"


def told(asked) -> Told:
    return Told(trial=asked, values=(asked.params["x"], asked.params["y"]))


@pytest.fixture
def worker(study, database):
    """Makes workers, each with a view of its own; an odd seed is another's."""
    entered = []

    def make(seed=0):
        heartbeats = Heartbeats(database, interval_s=0.05, grace_s=0.3)
        heartbeats.__enter__()
        entered.append(heartbeats)
        return MirroredStudy(study, database, RandomSampler(seed=seed), SPACE, heartbeats=heartbeats)

    yield make
    for heartbeats in entered:
        heartbeats.__exit__(None, None, None)


def drawn(study, count, seed=0):
    mirror = MirroredStudy(study, study._storage._backend, RandomSampler(seed=seed), SPACE)
    return mirror._draw_distinct(count, lambda params: {}, key_of)


# Taking turns


def test_a_batch_that_was_entered_before_the_connection_was_lost_is_found(study, database):
    trials, batch = drawn(study, 3), Batch(worker="w", token="t")
    first = enter_trials(database, study._study_id, trials, batch=batch, limit=3)
    assert enter_trials(database, study._study_id, trials, batch=batch, limit=3) == first
    assert len(study.trials) == 3


def test_finishing_again_in_the_same_way_is_no_error_and_in_another_way_is_one(study, database):
    ((_, trial_id),) = enter_trials(database, study._study_id, drawn(study, 1))
    done = Outcome(trial_id=trial_id, state=TrialState.COMPLETE, values=(0.1, float("inf")), attributes={"a": [1, "b"]})
    finish_trials(database, [done])
    finish_trials(database, [done])
    for changed in ({"values": (0.2, float("inf"))}, {"attributes": {"a": 2}}, {"state": TrialState.PRUNED}):
        with pytest.raises(UpdateFinishedTrialError):
            finish_trials(database, [Outcome(**{**vars(done), **changed})])


def test_no_more_trials_enter_than_the_limit_leaves_room_for(study, database):
    entered = enter_trials(database, study._study_id, drawn(study, 5), limit=4)
    assert [place is None for place in entered] == [False] * 4 + [True]
    finish_trials(database, [Outcome(trial_id=entered[0][1], state=TrialState.FAIL)])
    finish_trials(database, [Outcome(trial_id=entered[1][1], state=TrialState.PRUNED)])
    known = Known(newest=entered[1][1], ended=1)
    again = enter_trials(database, study._study_id, drawn(study, 3, seed=1), limit=4, known=known)
    assert [place is None for place in again] == [False, True, True], "a failed trial makes room for one"


def test_what_another_entered_meanwhile_is_not_entered_again(study, worker):
    first, second = worker(seed=5), worker(seed=5)
    asked = first.ask(3, key_of=key_of)
    assert second.ask(3, key_of=key_of) == [], "both drew the same, and neither knew"
    second.sync()
    others = second.ask(3, key_of=key_of)
    assert len(others) == 3
    assert not {key_of(trial.params) for trial in asked} & {key_of(trial.params) for trial in others}


# Dead workers


def test_a_dead_workers_trials_are_gone_on_with_by_one_other(study, worker):
    dying, first, second = worker(0), worker(1), worker(2)
    asked = dying.ask(4)
    dying.heartbeats.__exit__(None, None, None)  # as if its process had ended
    assert is_dead(dying.heartbeats.worker)
    first.sync()
    second.sync()
    taken = [trial.number for mirror in (first, second) for trial in mirror.ask(4)][:4]
    assert taken == [trial.number for trial in asked]
    assert {trial.system_attrs["hpo:work"]["attempt"] for trial in study.trials[:4]} == {2}
    dying.heartbeats = Heartbeats(dying.storage)  # for the fixture to end
    dying.heartbeats.__enter__()


def test_a_live_workers_trials_are_left_alone(study, worker):
    alive, other = worker(0), worker(1)
    asked = alive.ask(2)
    other.sync()
    assert {trial.number for trial in other.ask(2)}.isdisjoint(trial.number for trial in asked)


def test_a_worker_elsewhere_is_dead_once_its_heartbeat_stood_still_for_the_grace(study, database, worker):
    elsewhere = str(WorkerName("far", "another machine", 1, "2", "x"))
    enter_trials(database, study._study_id, drawn(study, 1), batch=Batch(worker=elsewhere, token="t"))
    mirror = worker()
    assert mirror.ask(1)[0].number == 1, "it may be alive"
    deadline = time.monotonic() + 30
    while not mirror.heartbeats.stale():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    mirror.sync()
    assert mirror.ask(1)[0].number == 0


def test_a_heartbeat_since_it_was_looked_at_keeps_the_trial_its_workers(study, database):
    ((_, trial_id),) = enter_trials(database, study._study_id, drawn(study, 1), batch=Batch(worker="w", token="t"))
    seen = read_heartbeats(database, [trial_id])[trial_id]
    stale = Stale(trial_id=trial_id, worker="w", heartbeat=seen.replace(year=2020))
    queue_again(database, study._study_id, [stale], "died")
    assert study.trials[0].state == TrialState.RUNNING
    queue_again(database, study._study_id, [Stale(trial_id=trial_id, worker="w", heartbeat=seen)], "died")
    assert study.trials[0].state == TrialState.WAITING


def test_a_trial_fails_with_the_reason_at_its_last_attempt(study, database):
    ((_, trial_id),) = enter_trials(database, study._study_id, drawn(study, 1), batch=Batch(worker="0", token="t"))
    for attempt in range(MAX_ATTEMPTS):
        queue_again(database, study._study_id, [Stale(trial_id=trial_id, worker=str(attempt))], "its process ended")
        claimed = claim_trials(database, study._study_id, [trial_id], str(attempt + 1))
        assert claimed == ([trial_id] if attempt < MAX_ATTEMPTS - 1 else [])
    (trial,) = study.trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["failure"] == "its process ended, at attempt 3 of 3"


def test_a_result_that_comes_late_counts_once(study, worker):
    slow, other = worker(0), worker(1)
    (asked,) = slow.ask(1)
    queue_again(slow.storage, study._study_id, [Stale(trial_id=asked.trial_id, worker=slow.heartbeats.worker)], "")
    other.sync()
    (again,) = other.ask(1)
    slow.tell([told(asked)])
    other.tell([Told(trial=again, values=(0.0, 0.0))])  # another outcome: the first one stands
    assert [trial.values for trial in study.trials] == [[asked.params["x"], asked.params["y"]]]
    for mirror in (slow, other):
        mirror.sync()
        assert mirror.ended == 1


def test_reporting_on_a_trial_that_another_has_finished_gives_it_up(study, worker):
    slow, other = worker(0), worker(1)
    for say in (lambda asked: slow.report(asked, 0.5, 1), lambda asked: slow.count_anew(asked, {"stages": 1})):
        (asked,) = slow.ask(1)
        queue_again(slow.storage, study._study_id, [Stale(trial_id=asked.trial_id, worker=slow.heartbeats.worker)], "")
        other.sync()
        other.tell([told(one) for one in other.ask(1)])
        with pytest.raises(TrialLost, match=f"Trial {asked.number} was finished by another worker"):
            say(asked)
        slow.sync()
        assert (slow.ended, slow.unfinished) == (asked.number + 1, [])


# A worker's loop


class Plan:
    """Trials that fail as told."""

    def __init__(self, errors):
        self.errors = list(errors)
        self.evaluated = []

    def learn(self, trials):
        pass

    def first(self):
        return []

    def part(self, done):
        return 2

    def attributes_of(self, params):
        return {}

    def key_of(self, params):
        return key_of(params)

    def evaluate(self, asked):
        self.evaluated.append([trial.number for trial in asked])
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        return [told(trial) for trial in asked]

    def passes(self, error):
        return isinstance(error, MemoryError)

    def resumes(self, error):
        return isinstance(error, InterruptedError)


def test_an_error_that_passes_is_tried_again_with_the_same_trials(study, worker):
    plan = Plan([MemoryError("no room"), None, MemoryError("no room")])
    complete_study(worker(), plan, 6)
    assert plan.evaluated[:2] == [[0, 1], [0, 1]]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 6


def test_an_error_that_keeps_coming_ends_the_worker_and_fails_its_trials(study, worker):
    with pytest.raises(HpoError, match="3 evaluations failed in a row, the last because of MemoryError: no room"):
        complete_study(worker(), Plan([MemoryError("no room")] * 9), 6)
    assert "MemoryError: no room, at attempt 3 of 3" in {trial.user_attrs.get("failure") for trial in study.trials}


def test_other_errors_are_not_tried_again(study, worker):
    plan = Plan([ZeroDivisionError("oh")])
    with pytest.raises(ZeroDivisionError):
        complete_study(worker(), plan, 6)
    assert plan.evaluated == [[0, 1]]
    assert {trial.user_attrs["failure"] for trial in study.trials} == {"ZeroDivisionError: oh"}


def test_trials_that_left_what_they_got_to_wait_for_the_next_run(study, worker):
    first, second = Plan([InterruptedError("disk full")]), Plan([])
    with pytest.raises(InterruptedError):
        complete_study(worker(), first, 2)
    assert [trial.state for trial in study.trials] == [TrialState.WAITING] * 2
    complete_study(worker(), second, 2)
    assert first.evaluated == second.evaluated == [[0, 1]]
    assert {trial.system_attrs["hpo:work"]["attempt"] for trial in study.trials} == {1}


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_trials_are_asked_for_leaves_none_running(study, worker, monkeypatch):
    plan, pressed = Plan([]), []

    def press_once(params):
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return {}

    monkeypatch.setattr(plan, "attributes_of", press_once)
    with pytest.raises(KeyboardInterrupt):
        complete_study(worker(), plan, 6)
    assert not plan.evaluated
    assert {(trial.state, trial.user_attrs["failure"]) for trial in study.trials} == {(TrialState.FAIL, "interrupted")}


def test_ctrl_c_while_the_database_is_away_does_not_wait_for_it(study, worker, monkeypatch):
    def be_away(*_):
        raise sqlalchemy.exc.PendingRollbackError("the connection is lost")

    monkeypatch.setitem(FUNCTIONS, "states_of", be_away)
    mirror = worker()
    monkeypatch.setattr(mirror.storage.patience, "timeout_s", 8.0)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        complete_study(mirror, Plan([KeyboardInterrupt()]), 6)
    assert time.monotonic() - started < 5


def test_a_heartbeat_that_hangs_does_not_hold_up_the_end(database, monkeypatch):
    answers, hangs = threading.Event(), threading.Event()
    monkeypatch.setattr("hpo.heartbeats.ENDING_S", 0.1)
    monkeypatch.setattr("hpo.heartbeats.beat", lambda *_: hangs.set() or answers.wait(8))
    with Heartbeats(database, interval_s=0.01) as heartbeats:
        heartbeats.watch([1], {})
        assert hangs.wait(30)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    answers.set()


def test_what_a_user_queued_is_run_within_the_total(study, worker):
    study.enqueue_trial({"x": 0.25})
    complete_study(worker(), Plan([]), 3)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert study.trials[0].params["x"] == 0.25


# Long studies


def fill(study, storage, count):
    """Finished trials of random parameters, in generations as NSGA-II makes them."""
    generator = np.random.default_rng(0)
    trials = [
        create_trial(
            state=TrialState.RUNNING,
            params=dict(zip(REHEARSED, np.round(generator.integers(1, 21, LAYERS) * 0.05, 10).tolist(), strict=True)),
            distributions=REHEARSED,
            system_attrs={"NSGAIISampler:generation": number // LengthsStudy.population_size},
        )
        for number in range(count)
    ]
    outcomes = [
        Outcome(
            trial_id=trial_id,
            state=TrialState.COMPLETE,
            values=objectives(trial.params)[: len(study.directions)],
        )
        for (_, trial_id), trial in zip(enter_trials(storage, study._study_id, trials), trials, strict=True)
    ]
    finish_trials(storage, outcomes)


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "surrogate"])
def test_the_samplers_copy_of_a_long_study_stays_short(storage, sampler, monkeypatch):
    monkeypatch.setattr("hpo.mirror.MOST_TRIALS", 120)
    monkeypatch.setattr("hpo.mirror.KEPT_TRIALS", 80)
    job = RehearsalJob(storage=storage, trials=1, sampler=sampler)
    opened = open_storage(storage)
    study = job.open_study(opened)
    fill(study, opened, 200)
    mirror = job.mirror(study, opened, None)
    best = study.best_trials[0].values
    for _ in range(3):
        asked = mirror.ask(30)
        mirror.tell([Told(trial=trial, values=[-9.0, 9.0][: len(study.directions)]) for trial in asked])
    kept = mirror.copy.get_trials(deepcopy=False)
    assert len(kept) <= 120 + 30
    assert best in [trial.values for trial in kept]
    assert mirror.ended == 290
    close(opened)


def test_asking_and_telling_reads_a_few_rows_of_a_long_study_on_postgresql(new_database):
    """PostgreSQL counts the rows that it reads, whichever way it finds them."""
    url = new_database("postgresql")
    job = RehearsalJob(storage=url, trials=1, sampler="random")
    filling = open_storage(url)
    study = job.open_study(filling)
    with filling.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO trials (study_id, number, state) SELECT study_id, number, 'COMPLETE' "
            "FROM studies, generate_series(0, 2999) AS number"
        )
        connection.exec_driver_sql(
            "INSERT INTO trial_system_attributes (trial_id, key, value_json) "
            "SELECT trial_id, 'generation', '1' FROM trials"
        )
    opened = open_storage(url)
    mirror = job.mirror(study, opened, Heartbeats(opened))

    def ask_and_tell():
        mirror.sync()
        asked = mirror.ask(1, key_of=lambda params: "".join(map(str, params.values())), limit=10**6)
        mirror.tell([Told(trial=trial, values=(0.1, 0.2)) for trial in asked])

    ask_and_tell()  # the first time, all connections of a storage look at its tables
    close(opened)
    before = _rows_read(filling)
    for _ in range(10):
        ask_and_tell()
    close(opened)
    assert _rows_read(filling) - before < 10 * 30, "a hundredth of the study's 3,000 trials each time"
    close(filling)


def _rows_read(storage) -> int:
    """Rows that connections which have ended have read of the tables of trials; they count as they end."""
    query = (
        "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_user_tables "
        "WHERE left(relname, 5) = 'trial'"
    )
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    )
    close(storage)
    with storage.engine.connect() as connection:
        while connection.exec_driver_sql(others).scalar_one():
            connection.rollback()
            time.sleep(0.01)
        connection.rollback()
        return int(connection.exec_driver_sql(query).scalar_one())
