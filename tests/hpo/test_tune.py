"""The finetune study: objective, checkpoints kept and removed, failures, resuming."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState, create_trial
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hpo.recipe
import hpo.tune
from hpo.bulk import Outcome, finish_trials
from hpo.errors import HpoError, StudyChanged, StudyNotFound
from hpo.heartbeats import Heartbeats
from hpo.mirror import MirroredStudy, Told
from hpo.runs import SPOOL, StudyRuns
from hpo.storage import open_storage
from hpo.tune import _Trainings, best_checkpoint, best_trial, check_settings, tune
from hpo.workload import load_encoder, load_workload
from model.data import SEED_LIMIT
from model.evaluate import score
from model.macs import constant_rate_config
from model.training import TrainingDiverged
from studies.loader import Choices, Range, StudyFileError


@pytest.fixture
def run(finetune, workload, storage, tmp_path):
    """Run or complete the study with `trials` in all."""

    def call(trials, definition=finetune, **changes):
        arguments = {"trials": trials, "storage": storage, "runs": tmp_path / "runs", **changes}
        return tune(definition, arguments.pop("workload", workload), **arguments)

    return call


def study_at(url: str) -> optuna.Study:
    return optuna.load_study(study_name="finetune", storage=open_storage(url))


@contextmanager
def served_at(url: str) -> Iterator[str]:
    pytest.importorskip("grpc", reason="gRPC is an extra")
    from hpo.proxy_server import served

    with served(url, "127.0.0.1", 0) as port:
        yield f"grpc://127.0.0.1:{port}"


def checkpoints(runs: Path) -> list[str]:
    return sorted(folder.name for folder in runs.glob("finetune-*/*/") if folder.name != SPOOL)


def test_best_checkpoint_is_a_transformers_folder_and_the_only_one(run, tmp_path):
    study = run(3)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    folder = best_checkpoint(study, tmp_path / "runs")
    assert checkpoints(tmp_path / "runs") == [folder.name] == [f"trial-{study.best_trial.number}"]
    assert (folder / "model.safetensors").is_file()
    network = AutoModelForSequenceClassification.from_pretrained(folder)
    assert network.config.num_labels == 2
    assert AutoTokenizer.from_pretrained(folder)("good film")["input_ids"][0] == 2


def test_area_is_the_mean_over_four_costs_of_the_kept_model(run, workload, tmp_path):
    study = run(1)
    folder = best_checkpoint(study, tmp_path / "runs")
    loaded = load_workload(workload, folder)
    model = load_encoder(folder, loaded.corpus)
    lengths = loaded.search.num_tokens
    configs = [constant_rate_config(model.shape, lengths, cost) for cost in (1.0, 0.7, 0.5, 0.35)]
    assert study.best_value == pytest.approx(sum(score(model, loaded.search, configs, loaded.metric)) / 4)
    assert study.best_trial.user_attrs["checkpoint_sha256"] == model.fingerprint()
    assert study.best_trial.intermediate_values.keys() == {1, 2}


def test_metric_objective_scores_full_length_only(run, finetune):
    study = run(1, definition=dataclasses.replace(finetune, objective="metric"))
    assert study.best_value == study.best_trial.user_attrs["metric_at_full_length"]
    assert study.metric_names == ["accuracy"]


def test_known_good_settings_are_tried_first(run):
    assert run(1).trials[0].params == {"learning_rate": 5e-3, "length_drop": 0.2}


def test_resumed_study_runs_only_missing_trials(run, monkeypatch):
    run(2)
    trained = []
    train = hpo.recipe.train
    monkeypatch.setattr(hpo.recipe, "train", lambda *args, **kwargs: (trained.append(1), train(*args, **kwargs))[1])
    assert len(run(3).trials) == 3
    assert len(trained) == 1
    assert len(run(3).trials) == 3
    assert len(trained) == 1


def test_same_seed_gives_the_same_study(run, tmp_path):
    first = run(2)
    second = run(2, storage=f"sqlite:///{tmp_path}/second.db")
    assert [trial.value for trial in first.trials] == [trial.value for trial in second.trials]
    assert [trial.params for trial in first.trials] == [trial.params for trial in second.trials]


def test_trials_of_the_largest_seed_have_seeds_too(run, workload):
    data = dataclasses.replace(workload.data, seed=SEED_LIMIT - 1)
    study = run(2, workload=dataclasses.replace(workload, data=data), seed=SEED_LIMIT - 1)
    assert [trial.user_attrs["seed"] for trial in study.trials] == [SEED_LIMIT - 1, 0]


def test_diverged_trial_fails_with_its_reason_and_the_study_goes_on(run, monkeypatch):
    train, calls = hpo.recipe.train, []

    def diverge_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise TrainingDiverged("The loss is nan at step 3; lower the learning rate.")
        return train(*args, **kwargs)

    monkeypatch.setattr(hpo.recipe, "train", diverge_once)
    study = run(2)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert "nan at step 3" in study.trials[0].user_attrs["failure"]


@pytest.fixture
def undecided(finetune):
    """The study without a precision, which the machine chooses."""
    fixed = {name: value for name, value in finetune.fixed.items() if name != "precision"}
    return dataclasses.replace(finetune, fixed=fixed)


def precisions(study: optuna.Study) -> list[str]:
    return [trial.user_attrs["precision"] for trial in study.trials]


def test_precision_is_chosen_once_for_all_trials_of_a_study(run, undecided, monkeypatch):
    monkeypatch.setattr("hpo.tune.computes_in_bf16", lambda: True)
    for trials, gains in ((1, True), (2, False)):
        monkeypatch.setattr("model.training.gains_from_bf16", lambda gains=gains: gains)
        study = run(trials, definition=undecided)
    assert precisions(study) == ["bf16", "bf16"]
    assert study.user_attrs["precision"] == "bf16"


def test_worker_without_bf16_trains_its_trials_in_float32(run, undecided, monkeypatch, caplog):
    for trials, has_bf16 in ((1, True), (2, False)):
        monkeypatch.setattr("hpo.tune.computes_in_bf16", lambda has_bf16=has_bf16: has_bf16)
        monkeypatch.setattr("model.training.gains_from_bf16", lambda has_bf16=has_bf16: has_bf16)
        study = run(trials, definition=undecided)
    assert precisions(study) == ["bf16", "fp32"]
    assert study.user_attrs["precision"] == "bf16"
    assert "computes in bf16, which this machine lacks" in caplog.text


def test_study_whose_file_names_the_precision_leaves_nothing_to_be_chosen(run, monkeypatch):
    monkeypatch.setattr("model.training.gains_from_bf16", lambda: pytest.fail("timed"))
    study = run(1)
    assert precisions(study) == ["fp32"]
    assert "precision" not in study.user_attrs


def test_workers_that_start_together_try_known_good_settings_once(storage, monkeypatch):
    monkeypatch.setattr(_Trainings, "_train_and_score", lambda _, trial, *__: Told(trial=trial, values=[0.5]))
    database = open_storage(storage)
    study = optuna.create_study(storage=database, study_name="finetune", direction="maximize")
    study.add_trial(create_trial(state=TrialState.FAIL))
    recipe = SimpleNamespace(definition=SimpleNamespace(first=({"rate": 0.25}, {"rate": 0.75})))
    runs = SimpleNamespace(keep_only=lambda *_, **__: None)
    rates = []
    with ExitStack() as stack:
        plans = []
        for seed in range(3):
            heartbeats = stack.enter_context(Heartbeats(database))
            space = {"rate": FloatDistribution(0.0, 1.0)}
            mirror = MirroredStudy(study, database, RandomSampler(seed=seed), space, heartbeats=heartbeats)
            plans.append(_Trainings(mirror, recipe, runs, trials=9, seed=0, on_progress=None))
        for plan in (*plans, *plans):
            asked = plan.mirror.ask(1, key_of=plan.key_of, first=plan.first())
            rates += [trial.params["rate"] for trial in asked]
            for trial in asked:
                plan.evaluate([trial])
            plan.mirror.sync()
    assert (rates.count(0.25), rates.count(0.75)) == (1, 1)


def test_trial_that_another_worker_finished_meanwhile_is_given_up(run, monkeypatch):
    report = MirroredStudy.report

    def taken_over(mirror, trial, value, step):
        if trial.number == 0:
            finish_trials(mirror.storage, [Outcome(trial_id=trial.trial_id, state=TrialState.COMPLETE, values=[0.9])])
        return report(mirror, trial, value, step)

    monkeypatch.setattr(MirroredStudy, "report", taken_over)
    study = run(2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert study.trials[0].value == 0.9


@pytest.mark.parametrize("behind_server", [False, True])
def test_better_trial_that_another_worker_ended_meanwhile_costs_the_best_nothing(
    run, storage, tmp_path, monkeypatch, behind_server
):
    write_model, values = StudyRuns.write_model, iter([0.7, 0.7, 0.9, 0.9, 0.6, 0.6, 0.8, 0.8])

    def write_and_be_taken_for_dead(runs, name, *arguments):
        place = write_model(runs, name, *arguments)
        if name == "trial-1":
            (taken,) = [trial for trial in study_at(storage).trials if trial.number == 1]
            finish_trials(open_storage(storage), [Outcome(trial_id=taken._trial_id, state=TrialState.FAIL)])
        return place

    monkeypatch.setattr(StudyRuns, "write_model", write_and_be_taken_for_dead)
    monkeypatch.setattr(hpo.tune, "score", lambda *args, **kwargs: [next(values)])
    with served_at(storage) if behind_server else nullcontext(storage) as url:
        for trials, best in ((2, 0), (3, 3)):
            run(trials, storage=url)
            folder = best_checkpoint(study_at(storage), tmp_path / "runs")
            assert checkpoints(tmp_path / "runs") == [folder.name] == [f"trial-{best}"]


def test_study_whose_trials_keep_failing_stops(run, monkeypatch):
    def diverge(*args, **kwargs):
        raise TrainingDiverged("The loss is inf at step 1; lower the learning rate.")

    monkeypatch.setattr(hpo.recipe, "train", diverge)
    with pytest.raises(HpoError, match=r"3 trials .* failed in a row"):
        run(10)


def test_interrupted_trial_fails_and_a_rerun_completes(run, storage, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hpo.recipe, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(2)
    study = optuna.load_study(study_name="finetune", storage=open_storage(storage))
    assert [(t.state, t.user_attrs["failure"]) for t in study.trials] == [(TrialState.FAIL, "interrupted")]
    study = run(3)
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) == 3
    known_good = [trial.number for trial in study.trials if trial.params == study.trials[0].params]
    assert known_good == [0, 1], "known good settings that were interrupted are tried again, once"


def test_study_that_is_deleted_while_it_runs_is_a_sentence(run, storage, monkeypatch):
    def delete(*args, **kwargs):
        optuna.delete_study(study_name="finetune", storage=open_storage(storage))
        return train(*args, **kwargs)

    train = hpo.recipe.train
    monkeypatch.setattr(hpo.recipe, "train", delete)
    with pytest.raises(StudyNotFound, match="was deleted"):
        run(1)


def test_trial_of_a_killed_process_is_tried_again_with_its_parameters(run, storage):
    run(1)
    study = optuna.load_study(study_name="finetune", storage=open_storage(storage))
    killed = study.ask()
    killed.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
    killed.suggest_float("length_drop", 0.1, 0.4)
    study = run(2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.COMPLETE]
    assert study.trials[1].params == killed.params
    assert study.trials[1].system_attrs["hpo:work"]["attempt"] == 2


def test_leftover_checkpoint_of_a_trial_that_is_through_is_removed(run, tmp_path):
    beaten = 1 - run(2).best_trial.number
    study_folder = next((tmp_path / "runs").glob("finetune-*"))
    (study_folder / f"trial-{beaten}").mkdir()
    (study_folder / f".trial-{beaten}.partial").mkdir()
    (study_folder / "trial-77.after-logits").mkdir()  # another worker may have begun it just now
    run(2)
    assert checkpoints(tmp_path / "runs") == sorted([f"trial-{1 - beaten}", "trial-77.after-logits"])


def test_better_trial_that_somebody_added_has_no_model_and_costs_no_other_its_own(run, tmp_path):
    study = run(1)
    space = {"learning_rate": FloatDistribution(1e-4, 1e-2, log=True), "length_drop": FloatDistribution(0.1, 0.4)}
    params = {"learning_rate": 1e-3, "length_drop": 0.2}
    study.add_trial(create_trial(value=2.0, params=params, distributions=space))
    study = run(3)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    best = best_trial(study)
    assert best.value == max(trial.value for trial in study.trials if trial.number != 1)
    folder = best_checkpoint(study, tmp_path / "runs")
    assert checkpoints(tmp_path / "runs") == [folder.name] == [f"trial-{best.number}"]


def test_best_of_equal_trials_is_the_earliest_whichever_the_database_names(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hpo.tune, "score", lambda *args, **kwargs: [0.5])
    study = run(2)
    monkeypatch.setattr(optuna.Study, "best_trial", study.trials[1])
    assert best_trial(study).number == 0
    assert best_checkpoint(study, tmp_path / "runs").name == "trial-0"


def test_study_without_a_model_says_what_to_run(tmp_path):
    study = optuna.create_study(study_name="finetune", direction="maximize")
    study.add_trial(create_trial(value=1.0))
    with pytest.raises(HpoError, match="hpo tune --study finetune"):
        best_checkpoint(study, tmp_path)


def test_hopeless_trial_is_pruned_and_leaves_no_checkpoint(run, finetune, tmp_path, monkeypatch):
    values = iter([0.9, 0.9] * 2 + [0.1, 0.1])
    monkeypatch.setattr(hpo.tune, "score", lambda *args, **kwargs: [next(values)])
    definition = dataclasses.replace(finetune, objective="metric", pruner_startup_trials=2, pruner_warmup_epochs=0)
    study = run(3, definition=definition)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert checkpoints(tmp_path / "runs") == ["trial-0"]


def test_trial_is_not_stopped_at_its_last_epoch(run, finetune, monkeypatch):
    values = iter([0.1, 0.1, 0.9] * 2 + [0.1, 0.1, 0.2])
    monkeypatch.setattr(hpo.tune, "score", lambda *args, **kwargs: [next(values)])
    definition = dataclasses.replace(
        finetune,
        objective="metric",
        space={**finetune.space, "epochs": Range(low=2, high=2)},
        fixed={name: value for name, value in finetune.fixed.items() if name != "epochs"},
        first=(),
        pruner_startup_trials=2,
        pruner_warmup_epochs=0,
    )
    study = run(3, definition=definition)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert study.trials[2].value == 0.2


def test_changed_study_is_refused_by_name(run, finetune, workload):
    run(1)
    with pytest.raises(StudyChanged, match=r"another --objective \(area\), so"):
        run(2, definition=dataclasses.replace(finetune, objective="metric"))
    with pytest.raises(
        StudyChanged, match=r"another \[fixed\] epochs \(1\) and another \[fixed\] dropout \(not given\), so"
    ):
        run(2, definition=dataclasses.replace(finetune, fixed={**finetune.fixed, "epochs": 2, "dropout": 0.1}))
    with pytest.raises(StudyChanged, match="another search space, so"):
        run(
            2,
            definition=dataclasses.replace(finetune, space={**finetune.space, "length_drop": Range(low=0.1, high=0.3)}),
        )
    with pytest.raises(StudyChanged, match=r"another --train-limit \(not given\), so"):
        run(2, workload=dataclasses.replace(workload, data=dataclasses.replace(workload.data, train_limit=50)))
    with pytest.raises(StudyChanged, match=r"another --seed \(0\), so"):
        run(2, workload=dataclasses.replace(workload, data=dataclasses.replace(workload.data, seed=3)))


def test_full_disk_says_so_and_fails_the_trial(run, storage, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.encoder.LengthAdaptiveModel.save_pretrained", full)
    with pytest.raises(HpoError, match="No space left on device"):
        run(1)
    study = optuna.load_study(study_name="finetune", storage=open_storage(storage))
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_best_checkpoint_elsewhere_says_where_it_looked(run, tmp_path):
    study = run(1)
    with pytest.raises(HpoError, match="--runs"):
        best_checkpoint(study, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"space": {"learning_speed": Range(low=0, high=1)}}, "learning_speed"),
        ({"space": {"length_drop": Range(low=0.1, high=1.5)}}, "length_drop=1.5"),
        ({"fixed": {"batch_size": 0}}, "batch_size=0"),
        ({"fixed": {"seed": 3}}, "seed"),
        ({"fixed": {"sandwich_size": 1.5}}, "sandwich_size=1.5; choose a whole number"),
        ({"fixed": {"batch_size": 16.0}}, "batch_size=16.0; choose a whole number"),
        ({"fixed": {"batch_size": True}}, "batch_size=True; choose a whole number"),
        ({"fixed": {"dropout": "a"}}, "dropout='a'; choose a number"),
        ({"fixed": {"weight_decay": False}}, "weight_decay=False; choose a number"),
        ({"space": {"sandwich_size": Choices(choices=(1, 1.5))}}, "sandwich_size=1.5; choose a whole number"),
        ({"space": {"sandwich_size": Range(low=1, high=2.5)}}, "sandwich_size=2.5; choose a whole number"),
        ({"space": {"sandwich_size": Range(low=1, high=3, step=0.5)}}, "sandwich_size=1.5; choose a whole number"),
    ],
)
def test_impossible_definition_is_refused_before_any_training(finetune, changes, word):
    with pytest.raises(StudyFileError, match=word):
        check_settings(dataclasses.replace(finetune, first=(), **changes))


def test_trial_that_several_processes_train_keeps_its_model(run, workload, tmp_path):
    study = run(1, processes=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]
    assert study.best_trial.intermediate_values.keys() == {1, 2}
    folder = best_checkpoint(study, tmp_path / "runs")
    model = load_encoder(folder, load_workload(workload, folder).corpus)
    assert study.best_trial.user_attrs["checkpoint_sha256"] == model.fingerprint()
