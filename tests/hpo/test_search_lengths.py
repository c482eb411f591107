"""The length study: its first generation, reuse, resuming, and what ends up in the database."""

import copy
import dataclasses
import itertools
import logging
import math
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from transformers import AutoTokenizer, BertForSequenceClassification

import hpo.mirror
import hpo.search_lengths
from hpo.early_stopping import Defeat, Rivals, bits_from_text
from hpo.errors import HpoError, StudyChanged, StudyNotFound
from hpo.front import compute_front
from hpo.samplers import RetentionSpace
from hpo.search_lengths import (
    config_of,
    constant_rates,
    open_search,
    search_lengths,
    shallow_networks,
    stopped_and_reused,
)
from hpo.storage import finished_trials, open_storage
from hpo.workload import load_encoder, load_workload
from model.data import SEED_LIMIT
from model.encoder import CheckpointError, LengthAdaptiveModel
from model.evaluate import Evaluator, predict, score, stratified_blocks
from model.length_config import LengthConfig
from model.macs import mean_macs
from model.training import TrainingDiverged
from studies.loader import SAMPLERS, Range


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Scores as one pass per example gives them, whatever this machine computes in."""
    monkeypatch.setattr(hpo.search_lengths, "choose_precision", lambda *_: "fp32")


@pytest.fixture
def run(lengths, workload, tiny_encoder, storage, tmp_path):
    """Run or complete the study with `trials` in all."""

    def call(trials, definition=lengths, **changes):
        arguments = {"trials": trials, "storage": storage, "runs": tmp_path / "runs", **changes}
        given, checkpoint = arguments.pop("workload", workload), arguments.pop("checkpoint", tiny_encoder)
        return search_lengths(definition, given, Path(checkpoint), **arguments)

    return call


def test_study_has_exactly_the_trials_asked_for(run):
    study = run(23).study
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 23


def test_complete_study_gains_nothing(run):
    run(12)
    again = run(12)
    assert (len(again.study.trials), again.evaluated, again.reused) == (12, 0, 0)


def test_resumed_study_runs_only_missing_trials(run):
    before = run(12).study.get_trials()
    after = run(25).study.get_trials()
    assert len(after) == 25
    assert [(t.number, t.params, t.values) for t in after[:12]] == [(t.number, t.params, t.values) for t in before]


def test_what_a_user_queued_records_its_length_config_and_key(run, storage):
    study = run(8).study
    study.enqueue_trial({"retention_0": 0.8, "retention_1": 0.7, "retention_2": 0.5})
    study.enqueue_trial({"retention_0": 0.9})
    study = run(12).study
    for trial in study.trials[8:10]:
        assert trial.user_attrs["shares"] == list(config_of(trial.params).shares)
        assert trial.system_attrs["hpo:key"]
    assert compute_front(study, storage).trials == 12


@pytest.mark.parametrize(
    "queued",
    [{"retention_0": 1.5, "retention_1": 0.5, "retention_2": 0.5}, {"retention_0": 0.3}, {"retention_1": "most"}],
    ids=["above", "below", "no number"],
)
def test_what_a_user_queued_outside_the_search_space_fails_alone(run, caplog, queued):
    study = run(8).study
    study.enqueue_trial(queued)
    study.enqueue_trial({"retention_0": 0.9})
    with caplog.at_level(logging.WARNING):
        states = [trial.state.name for trial in run(10).study.trials]
    assert states == ["COMPLETE"] * 8 + ["FAIL"] + ["COMPLETE"] * 2
    name, value = next(iter(queued.items()))
    (told,) = [record.message for record in caplog.records if "Trial 8 failed" in record.message]
    assert f"queued with {name}={value!r}" in told
    assert f"{name}={value!r}" in study.trials[8].user_attrs["failure"]


@pytest.mark.parametrize("missing", [("retention_1",), ("retention_0", "retention_1", "retention_2")])
def test_a_trial_that_a_user_added_without_a_retention_is_named(run, missing):
    study = run(8).study
    whole = study.trials[0]
    there = [name for name in whole.params if name not in missing]
    params, spaces = ({name: of[name] for name in there} for of in (whole.params, whole.distributions))
    study.add_trial(optuna.create_trial(params=params, distributions=spaces, values=whole.values))
    with pytest.raises(HpoError, match=f"Trial 8 of study 'lengths' .* {missing[0]}.*another name"):
        run(12)


def test_first_generation_holds_every_constant_rate_then_random_ones(run, lengths):
    study = run(10).study
    rates = constant_rates(lengths)
    assert rates[:2] == [1.0, 0.4]
    assert set(rates) == {0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0}
    constant = [trial.params["retention_0"] for trial in study.trials if len(set(trial.params.values())) == 1]
    assert constant[: len(rates)] == rates
    assert len(study.trials[len(rates)].params) == 3


def test_values_equal_scoring_each_config_alone(run, workload, tiny_encoder):
    study = run(15).study
    loaded = load_workload(workload, tiny_encoder)
    model = load_encoder(tiny_encoder, loaded.corpus)
    model.load_state_dict(model.state_dict())
    for trial in study.trials[:6]:
        config = config_of(trial.params)
        assert trial.values[1] == pytest.approx(mean_macs(model.shape, loaded.search.num_tokens, config))
        assert trial.user_attrs["shares"] == list(config.shares)
    # the tiny folder holds a full classifier, so its scores can be computed again from scratch
    metrics = score(model, loaded.search, [config_of(trial.params) for trial in study.trials], loaded.metric)
    assert [trial.values[0] for trial in study.trials] == pytest.approx(metrics)


def test_lengths_scored_before_are_reused_and_say_so(run, monkeypatch):
    scored = []

    predict_block = Evaluator.predict_block

    def spy(self, number, configs, **kwargs):
        scored.extend(configs)
        return predict_block(self, number, configs, **kwargs)

    monkeypatch.setattr(Evaluator, "predict_block", spy)
    search = run(60)
    trials = search.study.get_trials()
    reusing = [trial for trial in trials if "reused_from" in trial.user_attrs]
    assert search.reused == len(reusing) > 0
    assert search.evaluated == 60 - len(reusing)
    by_number = {trial.number: trial for trial in trials}
    for trial in reusing:
        assert trial.values == by_number[trial.user_attrs["reused_from"]].values
    tables = {config.count_table(np.arange(3, 33)).tobytes() for config in scored[: search.evaluated]}
    assert len(tables) == search.evaluated
    again = run(60)
    assert (again.reused, stopped_and_reused(again.study)) == (0, (0, len(reusing))), "the study's, not this run's"


def test_precision_is_chosen_once_and_recorded(run, monkeypatch):
    used = []
    monkeypatch.setattr(hpo.search_lengths, "choose_precision", lambda *_: used.append("asked") or "bf16")
    study = run(10).study
    assert study.user_attrs["precision"] == "bf16"
    run(20)
    assert used == ["asked"]


def test_orphans_of_a_killed_process_are_finished_not_lost(run, storage, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    run(10)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "predict_block", die)
        patch.setattr(hpo.mirror.MirroredStudy, "fail", lambda *args: None)  # a killed process tells nothing
        with pytest.raises(Killed):
            run(30)
    study = optuna.load_study(study_name="lengths", storage=open_storage(storage))
    orphans = [trial.number for trial in study.trials if trial.state == TrialState.RUNNING]
    assert len(orphans) == 10
    study = run(30).study
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30
    assert orphans == list(range(10, 20))


def test_half_asked_trial_of_a_killed_process_fails_with_its_reason(run, storage):
    run(10)
    study = optuna.load_study(study_name="lengths", storage=open_storage(storage))
    study.ask()  # a trial without any parameter
    study = run(20).study
    assert len(finished_trials(study)) == 20
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert [trial.number for trial in failed] == [10]
    assert "while asking" in failed[0].user_attrs["failure"]


def test_interrupt_fails_the_running_generation_and_a_rerun_completes(run, storage, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "predict_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(20)
    study = optuna.load_study(study_name="lengths", storage=open_storage(storage))
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 10
    assert {trial.user_attrs["failure"] for trial in study.trials} == {"interrupted"}
    study = run(20).study
    finished = finished_trials(study)
    assert len(finished) == 20
    assert {1.0} in [set(trial.params.values()) for trial in finished]
    assert {0.4} in [set(trial.params.values()) for trial in finished]


def test_generations_breed_from_the_population_before(run):
    study = run(40).study
    generations = [trial.system_attrs["NSGAIISampler:generation"] for trial in study.trials]
    assert generations == [number // 10 for number in range(40)]


def test_front_and_full_length_are_scored_on_the_report_split_once(run, workload, tiny_encoder, monkeypatch):
    study = run(20).study
    wanted = {trial.number for trial in study.best_trials} | {0}
    scored = {int(key.split(":")[1]) for key in study.user_attrs if key.startswith("report_metric:")}
    assert scored == wanted
    loaded = load_workload(workload, tiny_encoder)
    model = load_encoder(tiny_encoder, loaded.corpus)
    for trial in study.best_trials:
        metric = score(model, loaded.report, [config_of(trial.params)], loaded.metric)[0]
        assert study.user_attrs[f"report_metric:{trial.number}"] == pytest.approx(metric)

    def never(*args, **kwargs):
        raise AssertionError("scored again")

    monkeypatch.setattr(Evaluator, "predict_block", never)
    run(20)


def test_of_equal_trials_the_first_alone_is_scored_on_the_report_split(run, lengths, storage):
    coarse = dataclasses.replace(lengths, retention=Range(low=0.5, high=1.0, step=0.5))
    study = run(40, definition=coarse).study
    front = compute_front(study, storage)
    scored = {int(key.split(":")[1]) for key in study.user_attrs if key.startswith("report_metric:")}
    assert len(study.best_trials) > len(front.points)
    assert scored == {front.full.trial, *(point.trial for point in front.points)}


def test_changed_workload_space_or_model_is_refused(run, workload, lengths, tiny_encoder, tmp_path, storage):
    run(4)
    other_data = dataclasses.replace(workload, data=dataclasses.replace(workload.data, seed=5))
    with pytest.raises(StudyChanged, match=r"another --seed \(0\), so"):
        search_lengths(lengths, other_data, tiny_encoder, trials=5, storage=storage, runs=tmp_path / "runs")
    other_metric = dataclasses.replace(workload, metric="f1")
    with pytest.raises(StudyChanged, match="another metric"):
        search_lengths(lengths, other_metric, tiny_encoder, trials=5, storage=storage, runs=tmp_path / "runs")
    space = dataclasses.replace(lengths.retention, low=0.5)
    with pytest.raises(StudyChanged, match="another search space"):
        run(5, definition=dataclasses.replace(lengths, retention=space))
    other_model = tmp_path / "other"
    loaded = load_workload(workload, tiny_encoder)
    model = load_encoder(tiny_encoder, loaded.corpus)
    model.network.bert.embeddings.word_embeddings.weight.data.mul_(2)
    model.save_pretrained(other_model)
    loaded.tokenizer.save_pretrained(other_model)
    with pytest.raises(StudyChanged, match="another model"):
        search_lengths(lengths, workload, other_model, trials=5, storage=storage, runs=tmp_path / "runs")


def test_a_relative_checkpoint_is_recorded_whole_and_a_hub_id_as_it_is(
    workload, lengths, tiny_encoder, storage, monkeypatch
):
    loaded = load_workload(workload, tiny_encoder)
    model = load_encoder(tiny_encoder, loaded.corpus)
    monkeypatch.chdir(tiny_encoder.parent)
    for given, recorded in ((tiny_encoder.name, str(tiny_encoder.resolve())), ("owner/name", "owner/name")):
        definition = dataclasses.replace(lengths, name=f"of-{Path(given).name}")
        study = open_search(definition, loaded, Path(given), model, open_storage(storage))
        assert study.user_attrs["checkpoint"] == recorded


def test_study_that_is_deleted_while_it_runs_is_a_sentence(run, storage, monkeypatch):
    def delete(self, number, configs, **_):
        optuna.delete_study(study_name="lengths", storage=open_storage(storage))
        return predict_block(self, number, configs)

    predict_block = Evaluator.predict_block
    monkeypatch.setattr(Evaluator, "predict_block", delete)
    with pytest.raises(StudyNotFound, match="was deleted"):
        run(1)


def test_no_trials_is_refused(run):
    with pytest.raises(HpoError, match="--trials 0"):
        run(0)


def test_dashboard_can_label_its_axes(run):
    assert run(3).study.metric_names == ["accuracy", "macs"]


def test_times_account_for_the_search(run):
    times = run(10).times
    assert 0 < times.model + times.storage <= times.total


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_fills_and_resumes_a_study(run, lengths, sampler):
    definition = dataclasses.replace(lengths, sampler=sampler)
    run(14, definition=definition)
    trials = run(72, definition=definition).study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 72
    bred = [tuple(trial.params.values()) for trial in trials[20:]]
    assert len(set(bred)) > 6
    assert all(0.4 <= retention <= 1.0 for params in bred for retention in params)


@pytest.fixture
def stopping(lengths, monkeypatch):
    """A study in which whatever costs more than half of full length is stopped after the first of four blocks."""

    def beats(self, costs, *_):
        return Defeat(by=int(self.trial_F[0]), behind=0.1, error=0.03) if costs[0] > self.costs_FK.max() / 2 else None

    monkeypatch.setattr(Rivals, "beats", beats)
    return dataclasses.replace(lengths, blocks=4)


def test_stopped_configs_are_pruned_trials_with_partial_figures(run, stopping, workload, tiny_encoder):
    search = run(40, definition=stopping)
    trials = search.study.get_trials()
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert search.stopped == sum("reused_from" not in trial.user_attrs for trial in pruned) > 3
    assert stopped_and_reused(search.study) == (search.stopped, search.reused)
    assert len(finished_trials(search.study)) == 40
    assert all(len(set(trial.params.values())) > 1 for trial in pruned), "constant rates are never stopped"
    assert all(trial.number >= 10 for trial in pruned), "the first generation has nothing to be compared with"
    loaded = load_workload(workload, tiny_encoder)
    model = load_encoder(tiny_encoder, loaded.corpus)
    block = stratified_blocks(loaded.search.num_tokens, 4, seed=0)[0]
    for trial in pruned:
        right = predict(model, loaded.search, [config_of(trial.params)])[0] == loaded.search.labels
        assert trial.values is None
        assert trial.user_attrs["partial_metric"] == pytest.approx(right[block].mean())
        assert trial.user_attrs["examples_seen"] == len(block)
        rival = trials[trial.user_attrs["stopped_by"]]
        assert trial.user_attrs["estimated_metric"] == pytest.approx(rival.values[0] - 0.1)
        assert trial.user_attrs["estimated_metric_error"] == 0.03
    recorded = {trial.number for trial in trials if "correct" in trial.user_attrs}
    assert {trial.number for trial in search.study.best_trials if "reused_from" not in trial.user_attrs} <= recorded
    for trial in trials:
        if trial.number in recorded:
            right = predict(model, loaded.search, [config_of(trial.params)])[0] == loaded.search.labels
            np.testing.assert_array_equal(bits_from_text(trial.user_attrs["correct"], len(right)), right)
    front = compute_front(search.study, "sqlite:///hpo.db")
    assert not {point.trial for point in (*front.points, *front.dominated)} & {trial.number for trial in pruned}


def test_a_resumed_study_knows_what_was_stopped(run, stopping, monkeypatch):
    before = run(40, definition=stopping).study.get_trials()
    stopped = {
        config_of(trial.params).count_table(np.arange(3, 33)).tobytes()
        for trial in before
        if trial.state == TrialState.PRUNED
    }
    predict_block = Evaluator.predict_block

    def spy(self, number, configs, **kwargs):
        assert not {config.count_table(np.arange(3, 33)).tobytes() for config in configs} & stopped
        return predict_block(self, number, configs, **kwargs)

    monkeypatch.setattr(Evaluator, "predict_block", spy)
    after = run(60, definition=dataclasses.replace(stopping, sampler="random")).study.get_trials()
    assert [trial.state for trial in after[:40]] == [trial.state for trial in before]
    assert len(after) == 60


def test_full_length_is_scored_whole_where_what_keeps_as_much_was_stopped(run, stopping, lengths, monkeypatch, storage):
    fine = dataclasses.replace(stopping, retention=Range(low=0.4, high=1.0, step=0.01))
    with monkeypatch.context() as patch:  # as where another worker has these, and is interrupted
        patch.setattr(hpo.search_lengths._Run, "first", lambda self: [])
        study = run(8, definition=fine).study
        study.enqueue_trial({"retention_0": 0.99, "retention_1": 1.0, "retention_2": 1.0})
        study = run(9, definition=fine).study
        assert study.trials[8].state == TrialState.PRUNED
    for trials in (12, 30):
        front = compute_front(run(trials, definition=fine).study, storage)
    full = front.full
    assert full.shares == (1.0, 1.0, 1.0)
    assert "reused_from" not in study.trials[full.trial].user_attrs


def test_only_a_share_of_examples_is_stopped_early(run, stopping, workload):
    by_f1 = dataclasses.replace(workload, metric="f1")
    study = run(30, definition=stopping, workload=by_f1).study
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert not any("correct" in trial.user_attrs for trial in study.trials)


# Depth


@pytest.fixture
def deep(lengths):
    """A study in which the last two of three layers may be skipped."""
    return dataclasses.replace(lengths, skippable=(2, 1))


@pytest.fixture
def decided_encoder(workload, tiny_encoder, tmp_path):
    """An encoder, trained with LayerDrop by its own account, whose layers and tokens decide its answers."""
    loaded = load_workload(workload, tiny_encoder)
    model = load_encoder(tiny_encoder, loaded.corpus)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.network.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.5, generator=generator)
    model.layer_drop = 0.1
    model.save_pretrained(tmp_path / "decided")
    loaded.tokenizer.save_pretrained(tmp_path / "decided")
    return tmp_path / "decided"


def test_the_first_generation_of_a_search_in_depth_holds_shallow_networks(run, deep):
    study = run(len(constant_rates(deep)) + 3, definition=deep).study
    rates, shallow = study.trials[:-3], study.trials[-3:]
    assert [trial.params["retention_0"] for trial in rates] == constant_rates(deep)
    assert all(trial.user_attrs["skipped"] == [] for trial in rates)
    assert [trial.user_attrs["skipped"] for trial in shallow] == [[1, 2], [1], [2]]
    assert [trial.user_attrs["shares"] for trial in shallow] == [[1.0] * 3] * 3
    assert list(rates[0].params) == ["retention_0", "retention_1", "retention_2", "skip_1", "skip_2"]
    front = compute_front(study, "sqlite:///hpo.db")
    assert front.full.trial == 0
    assert len(front.constant_rate) == len(rates)


def test_of_many_layers_some_are_skipped_alone():
    names = tuple(f"retention_{layer}" for layer in range(24))
    skips = [
        [layer for layer in range(24) if params.get(f"skip_{layer}")]
        for params in shallow_networks(RetentionSpace(names, 0.4, 1.0, 0.1, tuple(range(1, 24))))
    ]
    assert skips == [list(range(1, 24)), [1], [7], [12], [17], [23]]
    assert shallow_networks(RetentionSpace(names, 0.4, 1.0, 0.1)) == []


def test_values_in_depth_equal_those_of_networks_without_the_layers(run, deep, workload, decided_encoder):
    study = run(25, definition=deep, checkpoint=decided_encoder).study
    loaded = load_workload(workload, decided_encoder)
    network = load_encoder(decided_encoder, loaded.corpus).network
    skipping = [trial for trial in study.trials if trial.user_attrs["skipped"]]
    assert len({trial.values[0] for trial in skipping}) > 3
    for trial in skipping:
        left = [layer for layer in range(3) if not trial.params.get(f"skip_{layer}")]
        rest = copy.deepcopy(network)
        rest.bert.encoder.layer = torch.nn.ModuleList(rest.bert.encoder.layer[layer] for layer in left)
        rest.config.num_hidden_layers = len(left)
        shallow = LengthAdaptiveModel(rest).eval()
        config = LengthConfig.from_retention([trial.params[f"retention_{layer}"] for layer in left])
        metric = score(shallow, loaded.search, [config], loaded.metric)[0]
        assert trial.values == pytest.approx([metric, mean_macs(shallow.shape, loaded.search.num_tokens, config)])
        if f"report_metric:{trial.number}" in study.user_attrs:
            reported = study.user_attrs[f"report_metric:{trial.number}"]
            assert reported == pytest.approx(score(shallow, loaded.report, [config], loaded.metric)[0])


def test_the_front_in_depth_is_that_of_all_configs(run, lengths, workload, decided_encoder):
    """Of two retentions for each layer and one layer to skip, random trials meet them all."""
    coarse = dataclasses.replace(
        lengths, retention=Range(low=0.5, high=1.0, step=0.5), skippable=(1,), sampler="random", population_size=100
    )
    search = run(100, definition=coarse, checkpoint=decided_encoder)
    assert search.evaluated == 2**3 + 2**2, "where a layer is skipped, its retention makes no other config"
    loaded = load_workload(workload, decided_encoder)
    model = load_encoder(decided_encoder, loaded.corpus).eval()
    points = set()
    for retention, skipped in itertools.product(itertools.product((0.5, 1.0), repeat=3), ((), (1,))):
        config = LengthConfig.from_retention(retention, skipped)
        metric = score(model, loaded.search, [config], loaded.metric)[0]
        points.add((mean_macs(model.shape, loaded.search.num_tokens, config), metric))
    best = sorted(a for a in points if not any(b != a and b[0] <= a[0] and b[1] >= a[1] for b in points))
    found = compute_front(search.study, "sqlite:///hpo.db").points
    np.testing.assert_allclose([(point.macs, point.metric) for point in found], best)
    assert [point.skipped for point in found] == [(1,), ()], "one of each kind, so that both count"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_resumes_a_search_in_depth(run, deep, sampler):
    definition = dataclasses.replace(deep, sampler=sampler)
    before = run(14, definition=definition).study.get_trials()
    after = run(45, definition=definition).study.get_trials()
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 45
    assert [(t.params, t.values) for t in after[:14]] == [(t.params, t.values) for t in before]
    assert len({tuple(trial.user_attrs["skipped"]) for trial in after[20:]}) > 1


def test_a_study_does_not_go_on_in_other_depths(run, lengths, deep):
    run(4)
    with pytest.raises(StudyChanged, match="another search space"):
        run(5, definition=deep)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 3), r"\[depth\] layers names layer 3, but the encoder's 3 are 0 to 2; leave it out\.$"),
        ((0, 1, 2), r"\[depth\] layers names all 3 layers of the encoder; let at least one always stay\.$"),
    ],
)
def test_layers_that_the_encoder_cannot_skip_are_refused_before_a_study_is_made(run, lengths, storage, layers, message):
    with pytest.raises(HpoError, match=message):
        run(4, definition=dataclasses.replace(lengths, skippable=layers))
    assert optuna.get_all_study_names(open_storage(storage)) == []


def test_depth_over_an_encoder_that_never_dropped_a_layer_is_warned_of(run, deep, tiny_encoder, caplog):
    run(3)
    assert "LayerDrop" not in caplog.text
    run(3, definition=dataclasses.replace(deep, name="deep"))
    assert f"{tiny_encoder} records no training with LayerDrop" in caplog.text


def test_depth_over_an_encoder_trained_with_layer_drop_is_not(run, deep, decided_encoder, caplog):
    run(3, definition=deep, checkpoint=decided_encoder)
    assert "LayerDrop" not in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
def test_the_largest_seed_searches_and_goes_on(run, workload, workers):
    data = dataclasses.replace(workload.data, seed=SEED_LIMIT - 1)
    changes = {"workload": dataclasses.replace(workload, data=data), "seed": SEED_LIMIT - 1, "workers": workers}
    run(4, **changes)
    assert len(run(6, **changes).study.trials) == 6


def test_a_head_that_nobody_trained_is_warned_of(run, tiny_encoder, tmp_path, caplog):
    run(2)
    assert "head" not in caplog.text
    headless = tmp_path / "headless"
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(headless)
    BertForSequenceClassification.from_pretrained(tiny_encoder).bert.save_pretrained(headless)
    caplog.clear()
    run(2, checkpoint=headless, storage=f"sqlite:///{tmp_path / 'other.db'}")
    assert f"{headless} has no trained head for classification" in caplog.text


# Seeds of another method


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_no_finite_numbers_are_refused_before_a_study_is_made(
    run, tiny_encoder, tmp_path, storage, value
):
    network = BertForSequenceClassification.from_pretrained(tiny_encoder)
    name = "bert.encoder.layer.1.output.dense.weight"
    network.get_parameter(name).data[3, 5] = value
    network.save_pretrained(tmp_path / "diverged")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "diverged")
    with pytest.raises(CheckpointError, match=f"The weight {name} of .*diverged holds what is no finite number"):
        run(5, checkpoint=tmp_path / "diverged")
    assert not optuna.get_all_study_names(open_storage(storage))


@pytest.fixture
def seeded(run, monkeypatch):
    """Run a search whose seeds are three given configs, and count how often they are learned."""
    calls = []

    def learned(another, split, tokenizer, settings, penalties):
        calls.append(settings)
        another()
        shares = [(0.87, 0.61, 0.33), (0.87, 0.62, 0.31), (0.99, 0.97, 0.05)]
        return [LengthConfig.from_shares(share) for share in shares]

    monkeypatch.setattr("hpo.seeds.learn_family", learned)
    return calls, lambda trials: run(trials, seed_with="power-bert").study


def test_seeds_join_the_first_trials_on_the_searchs_own_grid(seeded, lengths):
    calls, search = seeded
    study = search(12)
    found = [trial for trial in study.trials if trial.user_attrs.get("origin") == "power-bert"]
    assert [trial.number for trial in found] == [len(constant_rates(lengths)), len(constant_rates(lengths)) + 1]
    # 0.87 is nearest to 0.9 of all; 0.61 then to 0.7 of that, and so on; the first two configs are one on this grid
    assert [list(trial.params.values()) for trial in found] == [[0.9, 0.7, 0.5], [1.0, 1.0, 0.4]]
    front = compute_front(study, "sqlite:///hpo.db")
    assert {point.trial for point in front.seeds} == {trial.number for trial in found}
    search(14)
    assert len(calls) == 1, "what was learned is kept with the study"


def test_seeds_are_learned_from_the_train_split_alone(run, workload, tiny_encoder, monkeypatch):
    loaded = load_workload(workload, tiny_encoder)
    given = []
    monkeypatch.setattr("hpo.seeds.learn_family", lambda another, split, *rest: given.append(split) or [])
    run(3, seed_with="power-bert")
    assert given[0].input_ids == loaded.train.input_ids


def test_seeds_are_learned_for_no_fewer_steps_than_it_takes(seeded, workload, tiny_encoder, monkeypatch):
    calls, search = seeded
    monkeypatch.setattr("hpo.seeds.UPDATES", 38)
    search(3)
    per_epoch = math.ceil(len(load_workload(workload, tiny_encoder).train) / calls[0].batch_size)
    assert per_epoch * (calls[0].epochs - 1) < 38 <= per_epoch * calls[0].epochs


def test_power_bert_seeds_a_search_for_real(run, monkeypatch):
    monkeypatch.setattr("hpo.seeds.UPDATES", 40)
    monkeypatch.setattr("hpo.seeds.MASK_LEARNING_RATE", 0.1)
    monkeypatch.setattr("hpo.seeds.PENALTIES", (0.0, 3.0))
    study = run(12, seed_with="power-bert").study
    learned = study.user_attrs["seeds"]["shares"]
    assert len(learned) == 2
    assert sum(learned[1]) < sum(learned[0]) == 3
    assert any("origin" in trial.user_attrs for trial in study.trials)


def test_seeds_that_cannot_be_learned_end_in_a_sentence(run, monkeypatch):
    def diverges(*_):
        raise TrainingDiverged("The loss is nan at step 3; lower the learning rate.")

    monkeypatch.setattr("hpo.seeds.learn_family", diverges)
    with pytest.raises(HpoError, match=r"The loss is nan at step 3\); search without --seed-with\.$"):
        run(3, seed_with="power-bert")
