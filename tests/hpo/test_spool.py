"""Results outlive a database that stays away, and are told once."""

import json

import optuna
import pytest
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from hpo.bulk import Outcome, finish_trials
from hpo.errors import HpoError
from hpo.heartbeats import Heartbeats
from hpo.mirror import MirroredStudy, Told
from hpo.runs import FOLDER_ATTRIBUTE, SPOOL
from hpo.spool import Replayed, Result, ResultsKept, Spool, replay_all
from hpo.storage import close, open_storage

SPACE = {"x": FloatDistribution(0.0, 1.0)}
FOLDER = "s-0123abcd"


@pytest.fixture
def database(storage):
    opened = open_storage(storage)
    yield opened
    close(opened)


@pytest.fixture
def study(database):
    made = optuna.create_study(storage=database, study_name="s", directions=["maximize", "minimize"])
    made.set_user_attr(FOLDER_ATTRIBUTE, FOLDER)
    return made


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "runs" / FOLDER, "s")


@pytest.fixture
def asked(study, database, spool):
    """A worker with three trials running, and these."""
    with Heartbeats(database) as heartbeats:
        mirror = MirroredStudy(study, database, RandomSampler(seed=0), SPACE, heartbeats=heartbeats, spool=spool)
        yield mirror, mirror.ask(3)


def told(asked):
    return [Told(trial=one, values=(one.params["x"], float("inf")), attributes={"shares": [0.5]}) for one in asked]


def fail(*_):
    error = sqlalchemy.exc.OperationalError("COMMIT", {}, OSError("cable"), connection_invalidated=True)
    raise optuna.exceptions.StorageInternalError from error


def kept(spool):
    return sorted(spool.folder.glob("*.json"))


def test_nothing_is_kept_of_what_was_told(asked, spool, study):
    mirror, trials = asked
    mirror.tell(told(trials))
    assert list(spool.folder.iterdir()) == []
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3


def lose(asked, monkeypatch):
    """Tell while the database is away, and tidy up as a run that ends does."""
    mirror, trials = asked
    with monkeypatch.context() as patch:
        patch.setattr("hpo.storage.PatientStorage.run_together", fail)
        with pytest.raises(ResultsKept) as caught:
            mirror.tell(told(trials))
    mirror.fail(trials, "interrupted")
    mirror.put_back(trials, "interrupted")
    return str(caught.value)


def test_results_that_were_not_taken_are_kept_and_the_error_says_where(asked, spool, study, monkeypatch):
    sentence = lose(asked, monkeypatch)
    (file,) = kept(spool)
    assert f"the results of 3 trials are kept in {file}" in sentence
    assert f"`hpo storage replay --runs {spool.folder.parent.parent}`" in sentence
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING] * 3, "they are not given up"


def test_kept_results_are_told_once(asked, spool, study, database, monkeypatch):
    _, trials = asked
    lose(asked, monkeypatch)
    copy = kept(spool)[0].read_text()
    assert spool.replay(database, study) == Replayed(told=3)
    assert [trial.values for trial in study.trials] == [[one.params["x"], float("inf")] for one in trials]
    assert {tuple(trial.user_attrs["shares"]) for trial in study.trials} == {(0.5,)}
    assert kept(spool) == []
    (spool.folder / "again.json").write_text(copy)
    assert spool.replay(database, study) == Replayed(known=3)
    assert kept(spool) == []


def test_a_result_of_a_trial_that_was_given_up_is_not_told(asked, spool, study, database, monkeypatch):
    _, trials = asked
    lose(asked, monkeypatch)
    finish_trials(database, [Outcome(trial_id=trials[1].trial_id, state=TrialState.FAIL)])
    assert spool.replay(database, study) == Replayed(told=2, lost=1)
    assert study.trials[1].state == TrialState.FAIL
    assert kept(spool) == []


def test_results_of_trials_that_a_restored_backup_lacks_are_put_aside(spool, study, database, caplog):
    study.ask()
    spool.put([Result(number=n, state=TrialState.COMPLETE, values=(0.5, n), attributes={}) for n in (0, 1)])
    text = kept(spool)[0].read_text()
    assert spool.replay(database, study) == Replayed(told=1, lost=1)
    (aside,) = spool.folder.iterdir()
    assert aside.read_text() == text
    assert "no trial 1 with these parameters any more, as after a restored backup" in caplog.text
    assert f"the results are put aside in {aside}" in caplog.text
    assert spool.replay(database, study) == Replayed()


def test_results_of_trials_whose_numbers_others_took_after_a_restored_backup_are_put_aside(
    asked, spool, study, database, monkeypatch, caplog
):
    lose(asked, monkeypatch)
    (file,) = kept(spool)
    document = json.loads(file.read_text())
    document["results"][1]["params"] = {"x": 2.0}
    del document["results"][2]["params"]  # as an earlier version wrote it
    file.write_text(json.dumps(document))
    assert spool.replay(database, study) == Replayed(told=2, lost=1)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING", "COMPLETE"]
    (aside,) = spool.folder.iterdir()
    assert json.loads(aside.read_text()) == document
    assert "no trial 1 with these parameters" in caplog.text


def test_a_broken_file_is_left_behind_without_harm(spool, study, database):
    spool.put([Result(number=0, state=TrialState.PRUNED, values=None, attributes={})])
    (file,) = kept(spool)
    for text in ("", "{", "[]", '{"results": [{}]}', '{"results": [{"state": "GONE"}]}'):
        file.write_text(text)
        assert spool.replay(database, study) == Replayed()


def test_a_spool_that_cannot_be_written_is_a_sentence(spool):
    spool.folder.parent.mkdir(parents=True)
    spool.folder.write_text("")
    with pytest.raises(HpoError, match="choose another folder with --runs"):
        spool.put([Result(number=0, state=TrialState.PRUNED, values=None, attributes={})])


def test_every_study_of_the_database_gets_its_own_results(asked, spool, database, study, tmp_path, monkeypatch):
    lose(asked, monkeypatch)
    others = Spool(tmp_path / "runs" / "s-of-another-database", "s")
    others.put([Result(number=0, state=TrialState.COMPLETE, values=(0.0, 0.0), attributes={})])
    assert replay_all(database, tmp_path / "runs") == (Replayed(told=3), ["s-of-another-database"])
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert len(kept(others)) == 1
    assert replay_all(database, tmp_path / "no such folder") == (Replayed(), [])


def test_replay_finds_trials_by_their_numbers(asked, spool, database, study, tmp_path, monkeypatch):
    """Ids are another database's own; numbers stay when a study is copied."""
    lose(asked, monkeypatch)
    elsewhere = open_storage(f"sqlite:///{tmp_path}/copy.db")
    optuna.create_study(storage=elsewhere, study_name="first").ask()
    optuna.copy_study(from_study_name="s", from_storage=database, to_storage=elsewhere)
    copy = optuna.load_study(study_name="s", storage=elsewhere)
    assert copy.trials[0]._trial_id != study.trials[0]._trial_id
    assert spool.replay(elsewhere, copy) == Replayed(told=3)
    assert [trial.values for trial in copy.trials] == [
        entry.values for entry in copy.trials if entry.state == TrialState.COMPLETE
    ]
    close(elsewhere)


def test_the_command_tells_what_is_kept(asked, spool, study, command, monkeypatch):
    lose(asked, monkeypatch)
    code, out, err = command("storage", "replay")
    assert code == 0, err
    assert "the results of 3 trials" in " ".join(out.split())
    assert "the results of 0 trials" in " ".join(command("storage", "replay")[1].split())
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3


def test_the_spool_holds_results_and_nothing_else(asked, spool, monkeypatch):
    lose(asked, monkeypatch)
    document = json.loads(kept(spool)[0].read_text())
    assert document.keys() == {"study", "results"}
    assert document["results"][0].keys() == {"number", "state", "values", "attributes", "params"}
    assert kept(spool)[0].parent.name == SPOOL
