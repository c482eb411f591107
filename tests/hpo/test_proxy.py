"""A database behind `hpo storage serve` answers as the database itself."""

import signal
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import NSGAIISampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

pytest.importorskip("grpc", reason="gRPC is an extra")

from hpo.bulk import (
    KEY,
    Batch,
    Known,
    Outcome,
    Stale,
    beat,
    claim_trials,
    enter_trials,
    finish_trials,
    look,
)
from hpo.errors import StorageError
from hpo.heartbeats import Heartbeats
from hpo.mirror import MirroredStudy, Told
from hpo.outage import DatabaseAway
from hpo.proxy import RemoteStorage, address, connect, parse_address
from hpo.proxy_server import STALE_S, Together, run_joined, served
from hpo.sharing import complete_study
from hpo.spool import Replayed, ResultsKept, Spool
from hpo.storage import close, open_database, open_storage
from hpo.transactions import FUNCTIONS
from hpo.wire import decode, encode

SPACE = {name: FloatDistribution(0.0, 1.0) for name in ("x", "y")}


@pytest.fixture
def served_at(request, storage, new_database):
    """The database that is served: SQLite, or one on a server of the kind that the test asks for."""
    kind = getattr(request, "param", "sqlite")
    return storage if kind == "sqlite" else new_database(kind)


@pytest.fixture
def server(served_at):
    """A server's URL, and that of its database."""
    with served(served_at, "127.0.0.1", 0) as port:
        yield f"grpc://127.0.0.1:{port}", served_at


@pytest.fixture
def remote(server):
    storage = open_storage(server[0])
    yield storage
    close(storage)


@pytest.fixture
def direct(server):
    storage = open_database(server[1])
    yield storage
    close(storage)


on_any_database = pytest.mark.parametrize("served_at", ["sqlite", "postgresql", "mariadb"], indirect=True)


def running(number=0, **system_attrs) -> FrozenTrial:
    return create_trial(
        state=TrialState.RUNNING,
        params={"x": number / 10, "y": 0.5},
        distributions=SPACE,
        system_attrs=system_attrs,
        user_attrs={"shares": [0.5, number], "quote": 'it\'s "half" \u2013 $kind'},
    )


def search(storage, name, seed=3):
    """Three generations of a seeded search."""
    study = optuna.create_study(storage=storage, study_name=name, directions=["maximize", "minimize"])
    mirror = MirroredStudy(study, storage, NSGAIISampler(population_size=6, seed=seed), SPACE)
    for _ in range(3):
        asked = mirror.ask(6, lambda params: {"sum": params["x"] + params["y"]})
        mirror.tell([Told(trial=one, values=(one.params["x"], one.params["y"])) for one in asked])
    return study


def mirrored(study, storage, heartbeats=None) -> MirroredStudy:
    return MirroredStudy(study, storage, RandomSampler(seed=0), SPACE, heartbeats=heartbeats)


def told(asked) -> list[Told]:
    return [Told(trial=one, values=(one.params["x"], one.params["y"])) for one in asked]


class IdlePlan:
    """Trials whose values are their parameters, two at a time."""

    def learn(self, trials):
        pass

    def first(self):
        return []

    def part(self, done):
        return 2

    def attributes_of(self, params):
        return {}

    def key_of(self, params):
        return None

    def evaluate(self, asked):
        return told(asked)

    def passes(self, error):
        return False

    def resumes(self, error):
        return False


def facts(study):
    return [
        (trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.user_attrs)
        for trial in study.get_trials(deepcopy=False)
    ]


@on_any_database
def test_a_search_through_the_server_leaves_what_a_direct_one_leaves(remote, direct):
    through, itself = search(remote, "through"), search(direct, "itself")
    there = optuna.load_study(study_name="through", storage=direct)
    assert facts(through) == facts(there) == facts(itself)
    assert len(facts(there)) == 18


@on_any_database
def test_a_trial_asked_and_told_with_optuna_goes_through_the_server(remote, direct):
    study = optuna.create_study(storage=remote, study_name="s", direction="maximize")
    study.enqueue_trial({"x": 0.25})
    for _ in range(2):
        trial = study.ask()
        trial.suggest_float("x", 0.0, 1.0)
        trial.suggest_categorical("c", ["a", "b"])
        trial.report(0.5, 0)
        trial.set_user_attr("seed", 1)
        study.tell(trial, trial.params["x"])
    there = optuna.load_study(study_name="s", storage=direct)
    assert facts(there) == facts(study)
    assert there.trials[0].params["x"] == 0.25
    assert [trial.state for trial in there.trials] == [TrialState.COMPLETE] * 2


def test_a_trial_outlives_the_server_it_was_begun_with(storage):
    with served(storage, "127.0.0.1", 0) as port:
        remote = open_storage(f"grpc://127.0.0.1:{port}", timeout_s=30)
        study = optuna.create_study(storage=remote, study_name="s", direction="maximize")
        trial = study.ask()
    with served(storage, "127.0.0.1", port):
        trial.suggest_float("x", 0.0, 1.0)
        study.tell(trial, 0.5)
        assert [one.state for one in study.trials] == [TrialState.COMPLETE]
    close(remote)


def test_a_call_waits_while_its_server_is_away(storage):
    with served(storage, "127.0.0.1", 0) as port:
        remote = open_storage(f"grpc://127.0.0.1:{port}", timeout_s=30)
        study = optuna.create_study(storage=remote, study_name="s", direction="maximize")
    with ThreadPoolExecutor(1) as pool:
        entering = pool.submit(enter_trials, remote, study._study_id, [running()])
        while not remote.patience.is_away:
            threading.Event().wait(0.01)
        with served(storage, "127.0.0.1", port):
            ((number, _),) = entering.result(30)
            assert number == 0
            assert len(study.trials) == 1
    close(remote)


def test_a_server_that_hangs_is_waited_for_no_longer_than_the_timeout(server, monkeypatch):
    answers = threading.Event()
    remote = open_storage(server[0], timeout_s=0.2)
    monkeypatch.setitem(FUNCTIONS, "beat", lambda session, trial_ids: answers.wait(8))
    monkeypatch.setattr("hpo.proxy.CONNECT_TIMEOUT_S", 0.4)
    monkeypatch.setattr("hpo.proxy.GIVEN_UP_TIMEOUT_S", 0.1)
    started = time.monotonic()
    for _ in range(4):
        with pytest.raises(DatabaseAway):
            beat(remote, [1])
    assert time.monotonic() - started < 5
    answers.set()
    beat(remote, [1])
    close(remote)


def test_errors_of_a_function_come_back_as_they_are(remote):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    ((_, trial_id),) = enter_trials(remote, study._study_id, [running()])
    finish_trials(remote, [Outcome(trial_id=trial_id, state=TrialState.FAIL)])
    with pytest.raises(UpdateFinishedTrialError, match="Trial 0 is finished already"):
        finish_trials(remote, [Outcome(trial_id=trial_id, state=TrialState.COMPLETE, values=(1, 2))])
    with pytest.raises(KeyError):
        enter_trials(remote, 12345, [running()])


def test_what_a_worker_knows_of_others_goes_through_the_server(remote):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    batch = Batch(worker="w", token="t")
    entered = enter_trials(remote, study._study_id, [running(0), running(1)], limit=1, known=Known(), batch=batch)
    assert entered[1] is None
    assert enter_trials(remote, study._study_id, [running(0), running(1)], limit=1, batch=batch) == entered
    _, trial_id = entered[0]
    rows, (trial,) = look(remote, study._study_id, Known(), {})
    assert rows == [(trial_id, 0, TrialState.RUNNING)]
    assert study.trials == [trial]
    assert (trial.params, trial.user_attrs) == (running().params, running().user_attrs)


@on_any_database
def test_many_who_enter_trials_at_once_get_distinct_numbers(remote):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    with ThreadPoolExecutor(8) as pool:
        entered = list(pool.map(lambda _: enter_trials(remote, study._study_id, [running(), running()]), range(24)))
    assert sorted(number for pair in entered for number, _ in pair) == list(range(48))
    assert all(first + 1 == second for (first, _), (second, _) in entered), "a generation's numbers follow each other"


def test_calls_made_together_fail_alone(direct):
    study = optuna.create_study(storage=direct, study_name="s", directions=["maximize", "minimize"])
    together = Together(direct)
    with ThreadPoolExecutor(3) as pool:
        together._turn.acquire()  # as while a transaction is being made
        good = [pool.submit(together.run, "enter_trials", [study._study_id, [running()]], {}) for _ in range(2)]
        bad = pool.submit(together.run, "enter_trials", [12345, [running()]], {})
        while len(together._waiting) < 3:
            threading.Event().wait(0.001)
        together._turn.release()
        assert sorted(entering.result(10)[0][0] for entering in good) == [0, 1]
        with pytest.raises(KeyError):
            bad.result(10)
    assert len(study.trials) == 2


@on_any_database
def test_trials_that_several_enter_together_have_one_limit_and_no_key_twice(direct):
    study = optuna.create_study(storage=direct, study_name="s", directions=["maximize", "minimize"])
    ((_, first),) = enter_trials(direct, study._study_id, [running(0)])
    known = Known(newest=first, number=0, unfinished=[first])
    calls = [
        ("enter_trials", [study._study_id, [running(1, **{KEY: key})]], {"limit": 3, "known": known, "batch": batch})
        for key, batch in (("a", Batch(worker=worker, token=worker)) for worker in "uv")
    ]
    calls.append(("enter_trials", [study._study_id, [running(2), running(3)]], {"limit": 3, "known": Known()}))
    calls.append(("finish_trials", [[Outcome(trial_id=first, state=TrialState.FAIL)]], {}))
    entered, twice, others, _ = run_joined(direct, calls)
    assert [place and place[0] for place in (*entered, *twice, *others)] == [1, None, 2, 3], "a failed one makes room"
    assert run_joined(direct, calls[:2]) == [entered, twice], "where the connection was lost, what was done is found"
    assert [trial.number for trial in study.trials] == [0, 1, 2, 3]


def test_of_two_who_finish_a_trial_together_the_second_hears_of_the_first(direct):
    study = optuna.create_study(storage=direct, study_name="s", directions=["maximize", "minimize"])
    ((_, trial_id),) = enter_trials(direct, study._study_id, [running()])
    done = [Outcome(trial_id=trial_id, state=TrialState.COMPLETE, values=(value, 0.0)) for value in (1.0, 2.0)]
    with pytest.raises(UpdateFinishedTrialError):
        run_joined(direct, [("finish_trials", [[one]], {}) for one in done])
    assert study.trials[0].state == TrialState.RUNNING, "each is tried alone then"


@on_any_database
def test_who_enters_trials_finishes_others_in_the_same_breath(direct):
    study = optuna.create_study(storage=direct, study_name="s", directions=["maximize", "minimize"])
    ids = [trial_id for _, trial_id in enter_trials(direct, study._study_id, [running(), running()])]
    calls = [
        (
            "enter_trials",
            [study._study_id, [running()]],
            {"outcomes": [Outcome(trial_id=trial_id, state=TrialState.COMPLETE, values=(1.0, 2.0))]},
        )
        for trial_id in ids
    ]
    entered = run_joined(direct, calls)
    assert [place[0] for (place,) in entered] == [2, 3]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    with pytest.raises(UpdateFinishedTrialError):
        enter_trials(direct, study._study_id, [running()], outcomes=[Outcome(trial_id=ids[0], state=TrialState.FAIL)])
    assert len(study.trials) == 4


def test_results_reach_the_database_with_the_trials_that_follow(remote):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    mirror, other = mirrored(study, remote), mirrored(study, remote)
    asked = mirror.ask(2)
    mirror.tell(told(asked), asks=True)
    assert mirror.ended == 2
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "RUNNING"]
    mirror.sync()
    assert len(mirror.ask(1, limit=3)) == 1, "those told count once"
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert [trial.values for trial in study.trials[:2]] == [[one.params["x"], one.params["y"]] for one in asked]
    time.sleep(1.1 * STALE_S)
    other.sync()
    assert (mirror.ended, other.ended) == (2, 2)
    assert mirror.ask(1, limit=3) == []


def test_results_reach_the_database_where_nothing_follows(remote):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    mirror = mirrored(study, remote)
    for enough in (lambda: mirror.has(1), lambda: not mirror.ask(1, limit=2), mirror.settle):
        mirror.tell(told(mirror.ask(1)), asks=True)
        enough()
        assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert len(study.trials) == 3


def test_a_result_that_waits_keeps_its_heartbeat(remote):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    with Heartbeats(remote) as heartbeats:
        mirror = mirrored(study, remote, heartbeats)
        (asked,) = mirror.ask(1)
        mirror.tell(told([asked]), asks=True)
        mirror.sync()
        assert heartbeats._own == {asked.trial_id}
        mirror.settle()
        mirror.sync()
        assert not heartbeats._own


def test_a_result_that_waits_is_on_disk_meanwhile(remote, tmp_path):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    spool = Spool(tmp_path, "s")
    mirror = MirroredStudy(study, remote, RandomSampler(seed=0), SPACE, spool=spool)
    for enter in (lambda: mirror.ask(1), mirror.settle):
        mirror.tell(told(mirror.ask(1)), asks=True)
        assert len(list(spool.folder.iterdir())) == 1
        enter()
        assert list(spool.folder.iterdir()) == []
    assert spool.replay(remote, study) == Replayed()


def test_where_the_server_goes_away_the_error_says_where_results_are(remote, tmp_path, monkeypatch):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    spool = Spool(tmp_path, "s")
    mirror = MirroredStudy(study, remote, RandomSampler(seed=0), SPACE, spool=spool)
    tell = MirroredStudy.tell

    def fail(*_):
        raise DatabaseAway("the server is away")

    def tell_and_lose_the_server(*arguments, **named):
        tell(*arguments, **named)
        patch.setattr(RemoteStorage, "run_transaction", fail)

    with monkeypatch.context() as patch:
        patch.setattr(MirroredStudy, "tell", tell_and_lose_the_server)
        with pytest.raises(ResultsKept, match=r"the results of 2 trials are kept in .*\.json"):
            complete_study(mirror, IdlePlan(), 6)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING] * 2
    assert spool.replay(remote, study) == Replayed(told=2)


@pytest.mark.parametrize("syncs", [False, True])
def test_a_result_that_waits_gives_way_to_one_that_somebody_else_told(remote, direct, syncs):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    mirror = mirrored(study, remote)
    (asked,) = mirror.ask(1)
    mirror.tell(told([asked]), asks=True)
    if syncs:
        mirror.sync()
    finish_trials(direct, [Outcome(trial_id=asked.trial_id, state=TrialState.COMPLETE, values=(7.0, 8.0))])
    assert len(mirror.ask(1, limit=2)) == 1
    assert mirror.ended == 0
    time.sleep(1.1 * STALE_S)
    mirror.sync()
    assert mirror.ended == 1
    assert [trial.values for trial in study.trials] == [[7.0, 8.0], None]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_between_telling_and_asking_loses_no_result(remote, monkeypatch):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    mirror = mirrored(study, remote)
    tell = MirroredStudy.tell

    def tell_and_be_interrupted(*arguments, **named):
        tell(*arguments, **named)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MirroredStudy, "tell", tell_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        complete_study(mirror, IdlePlan(), 6)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2


def test_several_workers_complete_a_study_through_the_server(remote, server):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])

    def work(_):
        storage = open_storage(server[0])
        try:
            with Heartbeats(storage) as heartbeats:
                own = optuna.load_study(study_name="s", storage=storage)
                complete_study(mirrored(own, storage, heartbeats), IdlePlan(), 41)
        finally:
            close(storage)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 41
    assert all(trial.values == [trial.params["x"], trial.params["y"]] for trial in study.trials)


def test_a_worker_hears_soon_of_what_was_done_beside_the_server(remote, direct):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    assert look(remote, study._study_id, Known(), {}) == ([], [])
    ((number, trial_id),) = enter_trials(direct, study._study_id, [running()])
    time.sleep(1.1 * STALE_S)
    for state in (TrialState.RUNNING, TrialState.FAIL):
        rows, whole = look(remote, study._study_id, Known(newest=trial_id, unfinished=[trial_id]), {})
        assert (rows, [trial.state for trial in whole]) == ([(trial_id, number, state)], [state])
        finish_trials(direct, [Outcome(trial_id=trial_id, state=TrialState.FAIL)])
        time.sleep(1.1 * STALE_S)
    assert look(remote, study._study_id, Known(newest=trial_id), {}) == ([], [])


def test_what_was_done_through_the_server_is_heard_of_at_once(remote):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    look(remote, study._study_id, Known(), {})
    study.enqueue_trial({"x": 0.5})
    ((trial_id, _, state),), _ = look(remote, study._study_id, Known(), {})
    assert state == TrialState.WAITING
    assert claim_trials(remote, study._study_id, [trial_id], "w") == [trial_id]
    (row,), _ = look(remote, study._study_id, Known(), {})
    assert row == (trial_id, 0, TrialState.RUNNING)


def test_a_deleted_study_is_forgotten_since_its_id_may_come_back(remote):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    enter_trials(remote, study._study_id, [running()])
    assert len(look(remote, study._study_id, Known(), {})[0]) == 1
    optuna.delete_study(study_name="s", storage=remote)
    again = optuna.create_study(storage=remote, study_name="t", directions=["maximize", "minimize"])
    assert look(remote, again._study_id, Known(), {}) == ([], [])


@pytest.mark.parametrize("made_with", ["server", "database"])
def test_a_study_that_was_deleted_beside_the_server_is_forgotten_since_its_id_may_come_back(
    remote, direct, server, made_with
):
    directions = {"directions": ["maximize", "minimize"]}
    study = optuna.create_study(storage=remote, study_name="s", **directions)
    ended = Outcome(trial_id=enter_trials(remote, study._study_id, [running()])[0][1], state=TrialState.FAIL)
    finish_trials(remote, [ended])
    assert len(look(remote, study._study_id, Known(), {})[0]) == len(study.trials) == 1
    optuna.delete_study(study_name="s", storage=direct)
    again = optuna.create_study(storage=remote if made_with == "server" else direct, study_name="t", **directions)
    ((_, trial_id),) = enter_trials(direct, again._study_id, [running(3)])
    assert (again._study_id, trial_id) == (study._study_id, ended.trial_id)
    time.sleep(1.1 * STALE_S)
    ((_, _, state),), (trial,) = look(remote, again._study_id, Known(), {})
    assert (state, trial.params) == (TrialState.RUNNING, running(3).params)
    other = open_storage(server[0])
    (trial,) = optuna.load_study(study_name="t", storage=other).trials
    assert (trial.state, trial.params) == (TrialState.RUNNING, running(3).params)
    assert other.get_study_name_from_id(study._study_id) == "t"
    close(other)


def test_a_study_that_is_gone_has_no_trials(remote, direct):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    enter_trials(remote, study._study_id, [running()])
    assert len(look(remote, study._study_id, Known(), {})[0]) == 1
    optuna.delete_study(study_name="s", storage=direct)
    time.sleep(1.1 * STALE_S)
    assert look(remote, study._study_id, Known(), {}) == ([], [])


@pytest.mark.parametrize("entered_since", [False, True])
def test_trials_are_as_a_restored_backup_has_them(remote, direct, storage, tmp_path, entered_since):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    (_, first), (_, second) = enter_trials(remote, study._study_id, [running(0), running(1)])
    finish_trials(remote, [Outcome(trial_id=first, state=TrialState.COMPLETE, values=(0.0, 0.5))])
    file = storage.removeprefix("sqlite:///")
    with closing(sqlite3.connect(file)) as live, closing(sqlite3.connect(tmp_path / "backup.db")) as backup:
        live.backup(backup)
        if entered_since:
            enter_trials(remote, study._study_id, [running(2)])
        else:
            finish_trials(remote, [Outcome(trial_id=second, state=TrialState.COMPLETE, values=(0.1, 0.5))])
        assert len(look(remote, study._study_id, Known(), {})[0]) == len(study.trials)
        backup.backup(live)
    if entered_since:
        enter_trials(direct, study._study_id, [running(3)])
    time.sleep(1.1 * STALE_S)
    there = [(trial._trial_id, trial.state, trial.params) for trial in direct.get_all_trials(study._study_id)]
    _, seen = look(remote, study._study_id, Known(), {})
    assert [(trial._trial_id, trial.state, trial.params) for trial in seen] == there


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_calls_made_together_see_what_others_entered_meanwhile(new_database, kind, monkeypatch):
    """A server's transaction has read something when one of its calls comes to wait for its turn."""
    url = new_database(kind)
    served, direct = open_database(url), open_database(url)
    study = optuna.create_study(storage=direct, study_name="s", directions=["maximize", "minimize"])

    def another_enters(session):
        enter_trials(direct, study._study_id, [running()])

    monkeypatch.setitem(FUNCTIONS, "another_enters", another_enters)
    *_, entered = served.run_together(
        [
            ("look", [study._study_id, Known(), {}], {}),
            ("another_enters", [], {}),
            ("enter_trials", [study._study_id, [running(), running()]], {"limit": 2, "known": Known()}),
        ]
    )
    assert [place and place[0] for place in entered] == [1, None]
    close(served)
    close(direct)


def test_a_large_generation_fits_into_a_message(remote):
    study = optuna.create_study(storage=remote, study_name="s", directions=["maximize", "minimize"])
    big = running()
    big.user_attrs = {"correct": "x" * 6_000_000}  # gRPC itself takes 4 MiB
    ((_, trial_id),) = enter_trials(remote, study._study_id, [big])
    assert len(remote.get_trial(trial_id).user_attrs["correct"]) == 6_000_000


def test_a_malformed_message_is_refused_and_the_server_goes_on(remote):
    import grpc

    for message in (b"", b"[]", b"{}", b'{"$kind": "state", "name": "GONE"}', encode(["no such function", [], {}])):
        with pytest.raises(grpc.RpcError) as caught:
            remote._run(message)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert remote.get_all_studies() == []


def test_what_no_waiting_mends_is_told_at_once(remote):
    study = optuna.create_study(storage=remote, study_name="s", direction="maximize")
    with pytest.raises(StorageError, match="its server says"):
        remote.run_transaction("enter_trials", [study._study_id, "nonsense"], {})


# Connecting


@pytest.mark.parametrize(
    ("url", "host_and_port"),
    [
        ("grpc://127.0.0.1:13000", ("127.0.0.1", 13000)),
        ("grpc://db.example.org", ("db.example.org", 13000)),
        ("grpc://localhost:65535/", ("localhost", 65535)),
        ("grpc://[::1]:9", ("[::1]", 9)),
    ],
)
def test_an_address_is_read(url, host_and_port):
    assert parse_address(url) == host_and_port


@pytest.mark.parametrize(
    "url",
    [
        "grpc://",
        "grpc://:13000",
        "grpc://host:0",
        "grpc://host:65536",
        "grpc://host:port",
        "grpc://host:1:2",
        "grpc://me:hunter2@host:13000",
        "grpc://host:13000/hunter2",
        "grpc://host:13000?password=hunter2",
        "grpc://ho st:13000",
        "grpc://host\n:13000",
        "grpc://{host}:13000",
        "grpc://unix:/tmp/x",
    ],
)
def test_a_malformed_address_is_refused_without_repeating_it(url):
    with pytest.raises(StorageError, match=r"is written grpc://host:port") as caught:
        open_storage(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_server_is_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(StorageError, match=r"check that `hpo storage serve` runs there\.$") as caught:
        open_storage(f"grpc://127.0.0.1:{port}", timeout_s=600)
    assert "\n" not in str(caught.value)


def test_optunas_own_server_is_told_apart(storage):
    from concurrent.futures import ThreadPoolExecutor as Pool

    from optuna.storages._grpc.server import make_server

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = make_server(optuna.storages.RDBStorage(storage), "127.0.0.1", port, Pool(1))
    server.start()
    try:
        with pytest.raises(StorageError, match="no server of `hpo storage serve`"):
            open_storage(f"grpc://127.0.0.1:{port}")
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize(("entry", "what"), [({"protocol": 0, "hpo": "0.0.1"}, "hpo"), ({"optuna": "4.9.0"}, "optuna")])
def test_a_server_of_another_version_is_refused(server, monkeypatch, entry, what):
    from hpo import proxy

    here = proxy.description()
    monkeypatch.setattr("hpo.proxy_server.description", lambda: {**here, **entry})
    with pytest.raises(StorageError, match=rf"runs {what} {entry[what]}, this is {what} .*install the same"):
        connect(server[0])


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_database_is_served_over_ipv6(storage, host):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here ({error})")
    with served(storage, host, 0) as port:
        remote = open_storage(f"grpc://{address(host, port)}")
        assert remote.get_all_studies() == []
        close(remote)
    assert address(host, port) == f"[::1]:{port}"
    assert address("127.0.0.1", port) == f"127.0.0.1:{port}"


def test_a_port_is_served_once(server):
    port = int(server[0].rpartition(":")[2])
    with pytest.raises(StorageError, match="Cannot listen on"), served(server[1], "127.0.0.1", port):
        pass


# What goes over the wire


def test_every_argument_comes_back_equal():
    distributions = {"f": FloatDistribution(1e-5, 1.0, log=True), "c": CategoricalDistribution([1, "a", None, 2.5])}
    trial = create_trial(
        params={"f": 0.5, "c": None}, distributions=distributions, values=[1.0, float("inf")], system_attrs={"a": [1]}
    )
    arguments = [
        trial,
        Outcome(trial_id=1, state=TrialState.COMPLETE, values=[1.0], attributes={"$kind": "state", "n": {"1": [None]}}),
        Known(newest=3, ended=2, unfinished=[1]),
        Stale(trial_id=1, worker=None, heartbeat=datetime(2026, 1, 2, 3, 4, 5, 6)),
        {1: TrialState.WAITING, "k": {"$kind": "x"}},
        IntDistribution(1, 9, step=2),
        "text \u2013 \x00",
        True,
        None,
    ]
    assert decode(encode(arguments)) == arguments


def test_functions_of_several_workers_can_be_called():
    assert {"enter_trials", "finish_trials", "queue_again", "claim_trials", "beat"} <= FUNCTIONS.keys()


def test_a_trials_times_are_the_same_instants_in_another_time_zone(time_zone):
    time_zone("Asia/Tokyo")
    trial = running()
    message = encode(trial)
    time_zone("America/Bogota")
    assert decode(message).datetime_start == trial.datetime_start - timedelta(hours=14)


def test_what_was_read_a_moment_ago_is_not_asked_for_anew(remote, direct, monkeypatch):
    study = optuna.create_study(storage=direct, study_name="fresh", directions=["maximize", "minimize"])
    looks = []
    monkeypatch.setattr("hpo.mirror.look", lambda *arguments: looks.append(1) or look(*arguments))
    monkeypatch.setattr(remote, "fresh_s", 60.0)
    for storage, asked in ((remote, 1), (direct, 3)):
        looks.clear()
        mirror = mirrored(optuna.load_study(study_name="fresh", storage=storage), storage)
        mirror.sync()
        mirror.sync()
        assert len(looks) == asked
    mirror = mirrored(optuna.load_study(study_name="fresh", storage=remote), remote)
    enter_trials(direct, study._study_id, [running()])
    time.sleep(1.1 * STALE_S)
    mirror.sync()
    assert mirror.unfinished == []
    monkeypatch.setattr(remote, "fresh_s", STALE_S)
    mirror.sync()
    assert len(mirror.unfinished) == 1
