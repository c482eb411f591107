"""Time as a cost: one table for a study, what its trials record, and what is measured in the end. Nothing is timed."""

import dataclasses
import itertools
import json
import logging
from types import SimpleNamespace

import numpy as np
import optuna
import pytest

import hpo.costs
import hpo.search_lengths
from hpo.bench import bench
from hpo.costs import Costs
from hpo.errors import HpoError, StudyChanged
from hpo.front import MACS, MS, TABLE, compute_front, front_table, front_to_json, hypervolume, hypervolume_history
from hpo.samplers import Configs
from hpo.search_lengths import config_of, search_lengths
from hpo.staircase import Terraces, members
from hpo.storage import open_storage
from hpo.workers import SearchJob
from model.latency import HeldOut, LatencyTable
from model.length_config import LengthConfig
from model.timing import Timing
from studies.loader import SEVERAL_COSTS, StudyFileError

SECONDS = {
    "call": 1e-4,
    "layer": 2e-4,
    "arriving from 0": 2e-6,
    "kept from 0": 4e-6,
    "score": 3e-4,
    "score padded": 3e-4,
    "last": 1e-4,
    "last, arriving from 0": 1e-6,
}
"""Scoring tokens costs much, so that dropping few of them is dearer than dropping none."""


def made_up(processor="made up", batch_size=8, precision="fp32", factor=1.0):
    return LatencyTable(
        processor=processor,
        threads=1,
        precision=precision,
        batch_size=batch_size,
        reads_first=True,
        edges=(),
        seconds={name: factor * value for name, value in SECONDS.items()},
        held_out=(HeldOut(shares=(1.0, 1.0, 1.0), predicted_ms=1.1, measured_ms=1.0),),
    )


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A machine that takes no time to be calibrated, and twice what was predicted to run."""
    calibrated = []

    def calibrate(model, split, *, batch_size, precision, on_progress=None):
        calibrated.append((batch_size, precision))
        if on_progress is not None:
            on_progress(0.5, "timing layers")
        return made_up(batch_size=batch_size, precision=precision, factor=float(len(calibrated)))

    races = []

    def race(runs, rounds, *, on_round=None):
        races.append(len(runs))
        on_round(1, 1)
        return {name: Timing(median_s=0.128, least_s=0.128, most_s=0.128, rounds=1) for name in runs}

    for module in ("hpo.costs", "hpo.bench", "hpo.search_lengths", "hpo.front"):
        monkeypatch.setattr(f"{module}.processor_name", lambda: "made up")
    monkeypatch.setattr("hpo.costs.calibrate", calibrate)
    monkeypatch.setattr("hpo.bench.race", race)
    monkeypatch.setattr("hpo.search_lengths.choose_precision", lambda *_: "fp32")
    return SimpleNamespace(tables=calibrated, races=races)


@pytest.fixture
def run(lengths, workload, tiny_encoder, storage, tmp_path):
    def call(trials=20, cost="latency", definition=lengths, **changes):
        definition = dataclasses.replace(definition, cost=cost, **changes)
        return search_lengths(
            definition, workload, tiny_encoder, trials=trials, storage=storage, runs=tmp_path / "runs"
        )

    return call


def test_predicted_time_is_the_second_objective(run, workload, tiny_encoder):
    study = run().study
    assert study.metric_names == ["accuracy", "latency_ms"]
    table = LatencyTable.from_attribute(study.user_attrs[TABLE])
    lengths_MB = costs_of(study, workload, tiny_encoder).lengths_MB
    for trial in study.trials:
        assert trial.values[1] == trial.user_attrs[MS] == table.ms_of(lengths_MB, config_of(trial.params))
        assert trial.user_attrs[MACS] > 0


def costs_of(study, workload, tiny_encoder):
    from hpo.workload import load_encoder, load_workload
    from model.latency import lengths_of
    from model.timing import sample

    loaded = load_workload(workload, tiny_encoder)
    model = load_encoder(tiny_encoder, loaded.corpus)
    table = LatencyTable.from_attribute(study.user_attrs[TABLE])
    lengths_MB = lengths_of(sample(loaded.search).num_tokens, table.batch_size)
    return Costs(tuple(study.metric_names[1:]), model.shape, loaded.search.num_tokens, table, lengths_MB)


def test_both_makes_three_objectives(run):
    study = run(cost="both", sampler="nsga2").study
    assert study.metric_names == ["accuracy", "macs", "latency_ms"]
    for trial in study.trials:
        assert trial.values[1:] == [trial.user_attrs[MACS], trial.user_attrs[MS]]


@pytest.mark.parametrize("sampler", ["surrogate", "nsga2", "lat", "tpe", "random"])
def test_every_sampler_minimises_time(run, lengths, sampler):
    study = run(40, sampler=sampler, definition=dataclasses.replace(lengths, blocks=4)).study
    assert len(study.trials) == 40
    assert len({tuple(trial.params.values()) for trial in study.trials}) > 10


@pytest.mark.parametrize("sampler", SEVERAL_COSTS)
def test_samplers_that_take_two_costs(run, lengths, sampler):
    study = run(40, "both", sampler=sampler, definition=dataclasses.replace(lengths, blocks=4)).study
    assert len(study.trials) == 40


def test_a_sampler_of_one_cost_names_those_that_take_two(lengths):
    with pytest.raises(StudyFileError, match="choose surrogate, nsga2, tpe or random"):
        dataclasses.replace(lengths, cost="both", sampler="lat")


def random_terraces(seed):
    generator = np.random.default_rng(seed)
    costs, quality = generator.random((12, 2)), generator.random(12)
    return generator, costs, quality, Terraces.of(costs, quality)


def volume(costs, quality, floor):
    return hypervolume(costs.tolist(), (quality - floor).tolist())


def test_what_a_certain_candidate_gains_is_the_volume_it_adds():
    for seed in range(20):
        generator, costs, quality, front = random_terraces(seed)
        candidates, mean = generator.random((30, 2)), generator.random(30) * 1.2
        gains = front.expected_gain(candidates, mean, np.zeros(30))
        before = volume(costs, quality, front.floor)
        for candidate, own, gain in zip(candidates, mean, gains, strict=True):
            after = volume(np.vstack([costs, candidate]), np.append(quality, own), front.floor)
            assert gain == pytest.approx(after - before, abs=1e-9)
            assert front.with_point(candidate, own).height(costs) == pytest.approx(
                np.maximum(front.height(costs), np.where((candidate <= costs).all(axis=1), own, -np.inf))
            )


def test_what_an_uncertain_candidate_gains_is_the_mean_over_its_qualities():
    generator, _, _, front = random_terraces(3)
    candidate, mean, deviation = np.array([[0.3, 0.4]]), np.array([0.7]), np.array([0.2])
    drawn = generator.normal(0.7, 0.2, 4000)
    gains = front.expected_gain(np.repeat(candidate, 4000, axis=0), drawn, np.zeros(4000))
    assert front.expected_gain(candidate, mean, deviation)[0] == pytest.approx(gains.mean(), rel=0.05)


def test_the_height_of_terraces_is_the_best_that_is_affordable():
    generator, costs, quality, front = random_terraces(5)
    for where in generator.random((50, 2)):
        affordable = quality[(costs <= where).all(axis=1)]
        assert front.height(where[None])[0] == affordable.max(initial=front.floor)


def test_the_table_is_fitted_once_and_kept(run, device):
    before = run(10).study
    table, values = before.user_attrs[TABLE], [trial.values for trial in before.trials]
    after = run(20).study
    assert device.tables == [(8, "fp32")]
    assert after.user_attrs[TABLE] == table
    assert [trial.values for trial in after.trials[:10]] == values
    assert after.user_attrs["full_latency_ms"] == values[0][1]


def test_a_worker_that_was_slower_takes_the_table_of_the_other(run, monkeypatch, storage):
    calibrate = hpo.costs.calibrate

    def meanwhile(*arguments, **named):
        table = calibrate(*arguments, **named)
        study = optuna.load_study(study_name="lengths", storage=open_storage(storage))
        study.set_user_attr(TABLE, made_up(factor=7.0).to_attribute())
        return table

    monkeypatch.setattr("hpo.costs.calibrate", meanwhile)
    search = run(10)
    assert search.table == made_up(factor=7.0)


def test_a_machine_that_joins_goes_by_the_same_table_and_says_so(run, monkeypatch, caplog, device):
    table = run(10).study.user_attrs[TABLE]
    for module in ("hpo.costs", "hpo.bench", "hpo.search_lengths", "hpo.front"):
        monkeypatch.setattr(f"{module}.processor_name", lambda: "another")
    with caplog.at_level(logging.WARNING):
        search = run(20)
    assert "predicted for made up, 1 threads, fp32, batches of 8" in caplog.text
    assert "another" in caplog.text
    assert len(device.tables) == 1
    assert search.study.user_attrs[TABLE] == table
    assert search.prediction is None, "its times are not those that were predicted"


def test_a_table_of_another_version_is_refused_in_a_sentence(run, storage):
    study = run(10).study
    study.set_user_attr(TABLE, {**study.user_attrs[TABLE], "law": 99})
    with pytest.raises(HpoError, match=r"another version of hpo \(the cost table is of law 99"):
        run(20)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"cost": "macs"}, {"cost": "latency"}),
        ({"cost": "latency"}, {"cost": "macs"}),
        ({"cost": "latency"}, {"cost": "both", "sampler": "random"}),
        ({"cost": "latency"}, {"cost": "latency", "latency_batch_size": 1}),
    ],
)
def test_a_study_is_not_gone_on_with_by_another_cost(run, first, then):
    run(5, **first)
    with pytest.raises(StudyChanged, match="another cost"):
        run(10, **then)


def test_a_study_of_macs_is_what_it_always_was(run, device):
    study = run(10, "macs").study
    assert "cost" not in study.user_attrs["identity"]
    assert not device.tables
    assert not device.races
    assert MACS not in study.trials[0].user_attrs


def test_bf16_needs_a_processor_that_has_it(run, monkeypatch):
    monkeypatch.setattr("hpo.costs.computes_in_bf16", lambda: False)
    with pytest.raises(HpoError, match="no bf16"):
        run(5, latency_precision="bf16")


def test_the_front_is_measured_in_the_end_and_only_once(run, device):
    search = run(20)
    front = compute_front(search.study, "sqlite:///x.db")
    others = [point for point in front.points if point.trial != front.full.trial]
    assert device.races == [len(others) + 1]
    assert [point.latency_ms for point in front.points] == [pytest.approx(128 / 60)] * len(front.points)
    errors = [abs(point.predicted_ms / (128 / 60) - 1) for point in front.points]
    assert search.prediction.points == len(front.points)
    assert search.prediction.median_error == pytest.approx(np.median(errors))
    assert search.prediction.worst_error == pytest.approx(max(errors))
    assert search.study.user_attrs["latency_prediction"] == dataclasses.asdict(search.prediction)
    assert run(20).prediction == search.prediction
    assert len(device.races) == 1


def test_times_of_fewer_sequences_are_kept_beside_those_that_predictions_are_of(run, storage, tmp_path, device):
    search = run(20)
    (few,) = bench(
        search.study, storage, tmp_path / "runs", batch_sizes=(8,), sequences=8, points=99, rounds=1, baselines=()
    )
    assert few.full.ms == pytest.approx(128 / 8)
    assert few.key in search.study.user_attrs
    front = compute_front(search.study, storage)
    assert [point.latency_ms for point in (front.full, *front.points)] == [pytest.approx(128 / 60)] * (
        1 + len(front.points)
    )
    races = len(device.races)
    assert run(20).prediction == search.prediction
    assert len(device.races) == races, "the front was timed before"


@pytest.mark.parametrize("cost", ["latency", "both"])
def test_the_front_is_that_of_brute_force(run, cost):
    study = run(60, cost, sampler="random").study
    front = compute_front(study, "sqlite:///x.db")
    scores = {trial.number: (-trial.values[0], *trial.values[1:]) for trial in study.trials if trial.values}

    def beats(one, other):
        return all(a <= b for a, b in zip(one, other, strict=True)) and one != other

    kept = [n for n, own in scores.items() if not any(beats(other, own) for other in scores.values())]
    firsts = {scores[number]: number for number in reversed(kept)}
    assert sorted(point.trial for point in front.points) == sorted(firsts.values())
    assert {point.trial for point in front.dominated} == set(scores) - set(kept)
    costs = [scores[point.trial][1:] for point in front.points]
    assert costs == sorted(costs)
    assert hypervolume_history(study)[-1] == pytest.approx(front.hypervolume)


def test_members_are_those_of_brute_force_in_any_number_of_costs():
    generator = np.random.default_rng(0)
    for count, kinds in itertools.product((1, 5, 30), (1, 2, 3)):
        for _ in range(20):
            costs, quality = generator.integers(0, 4, (count, kinds)).astype(float), generator.integers(0, 4, count)
            found = members(costs, quality.astype(float))
            points = [(*row, -value) for row, value in zip(costs.tolist(), quality.tolist(), strict=True)]
            expected = [
                index
                for index, own in enumerate(points)
                if own not in points[:index]
                and not any(all(a <= b for a, b in zip(o, own, strict=True)) and o != own for o in points)
            ]
            assert sorted(found.tolist()) == expected
            assert [points[index][:-1] for index in found] == sorted(points[index][:-1] for index in found)


def test_time_of_many_configs_is_that_of_each(run, workload, tiny_encoder):
    study = run(20).study
    costs = costs_of(study, workload, tiny_encoder)
    configs = [config_of(trial.params) for trial in study.trials]
    shares = costs.shares(Configs.whole(np.array([config.shares for config in configs])))
    full_ms = costs.ms(LengthConfig.full(3))
    assert shares.tolist() == pytest.approx([trial.values[1] / full_ms for trial in study.trials])


def test_table_json_and_page_show_predictions(run, command, tmp_path):
    study = run(20).study
    front = compute_front(study, "sqlite:///x.db")
    document = front_to_json(front, None)
    assert document["cost"] == {"name": "latency_ms", "unit": "ms"}
    assert document["predicted_for"]["processor"] == "made up"
    assert all(point["predicted_ms"] > 0 for point in document["points"])
    assert json.loads(json.dumps(document)) == document
    assert "pre-" in " ".join(str(column.header) for column in front_table(front, None).columns)
    code, _, err = command("pareto")
    assert code == 0, err
    page = next((tmp_path / "runs").rglob("front.html")).read_text()
    assert "predicted time per sequence, share of full length" in page
    assert "Predicted time" in page
    assert "<h1>Study lengths: accuracy against predicted time</h1>" in page


def test_both_costs_are_drawn_and_told(run, command, tmp_path):
    run(20, "both", sampler="random")
    code, out, err = command("pareto", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["cost"] == {"name": "macs", "unit": "MAC"}
    assert document["costs"] == ["macs", "latency_ms"]
    page = next((tmp_path / "runs").rglob("front.html")).read_text()
    assert "FLOPs per sequence, share of full length" in page
    assert "predicted time per sequence, share of full length" in page


def test_a_point_of_three_objectives_is_chosen_exported_and_served(run, command, tmp_path):
    study = run(40, "both", sampler="random").study
    front = compute_front(study, "sqlite:///x.db")
    code, out, err = command("pareto", "--budget", "0.8", "--json")
    assert code == 0, err
    fitting = [point for point in front.points if point.relative_macs <= 0.8]
    assert json.loads(out)["chosen"]["metric"] == max(point.metric for point in fitting)
    code, out, err = command("export", "--max-drop", "0.5", "--out", str(tmp_path / "served"), "--json")
    assert code == 0, err
    from model import LengthAdaptivePipeline

    pipeline = LengthAdaptivePipeline(tmp_path / "served")
    assert len(pipeline(["the film was good"], max_latency_ms=1e6)) == 1


def test_a_job_of_several_workers_is_calibrated_before_they_start(lengths, workload, tiny_encoder, storage, tmp_path):
    definition = dataclasses.replace(lengths, cost="latency")
    job = SearchJob(
        definition=definition,
        workload=workload,
        checkpoint=tiny_encoder,
        trials=10,
        storage=storage,
        runs=tmp_path / "runs",
        workers=2,
    )
    assert TABLE in job.open(open_storage(storage)).user_attrs


def test_the_command_says_what_predicts_and_how_well(run, command, workload, tiny_encoder, tiny_dataset):
    arguments = ["--checkpoint", str(tiny_encoder), "--dataset", str(tiny_dataset), "--search-size", "60"]
    code, _, err = command("search-lengths", "--trials", "12", "--cost", "latency", *arguments)
    assert code == 0, err
    said = " ".join(err.split())
    assert "predicted for made up, 1 threads, fp32, batches of 8: 10.0% off (median)" in said
    assert "were timed in the end: predictions are" in said


@pytest.mark.parametrize(
    ("cost", "code", "said"),
    [("time", 2, "choose macs, latency, both"), ("both", 1, "choose surrogate, nsga2, tpe or random")],
)
def test_a_wrong_cost_is_told(command, tiny_encoder, tiny_dataset, tmp_path, cost, code, said):
    (tmp_path / "lat.toml").write_text(
        'kind = "lengths"\n[retention]\nlow = 0.4\nhigh = 1.0\n[sampler]\nname = "lat"\n'
    )
    arguments = [
        "--checkpoint",
        str(tiny_encoder),
        "--dataset",
        str(tiny_dataset),
        "--study",
        str(tmp_path / "lat.toml"),
    ]
    found, _, err = command("search-lengths", "--cost", cost, *arguments)
    assert found == code
    assert said in " ".join(err.replace("│", " ").split())
