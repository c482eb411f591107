"""What `hpo bench` measures, keeps and chooses by."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from statistics import median

import numpy as np
import optuna
import pytest
from transformers import BertForSequenceClassification

import model.timing
from hpo.bench import bench, spread
from hpo.errors import HpoError
from hpo.front import LATENCY, NothingFits, choose, compute_front
from hpo.storage import open_storage
from model import LengthAdaptivePipeline
from model.apart import Engine, apart
from model.encoded import EncodedSplit
from model.front_file import ExportError, ServedFront, choose_point
from model.length_config import LengthConfig
from model.timing import CannotRun, baseline, dense, in_batches, race

QUICK = {"sequences": 8, "points": 3, "rounds": 1, "baselines": ()}


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr("model.timing.SECONDS_AT_LEAST", 0.0)
    monkeypatch.setattr("model.timing.PAUSE_S", 0.001)


@pytest.fixture(scope="module")
def searched(search_once, tiny_encoder):
    return search_once(tiny_encoder)


@pytest.fixture
def study(searched, copied):
    return copied(searched)


class Clock:
    """Stands still but for runs that take a known time."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def run(self, name, seconds):
        durations = iter(seconds)

        def run():
            self.order.append(name)
            self.now += next(durations)

        return run


def test_runs_take_turns_and_untimed_ones_do_not_count():
    clock = Clock()
    slow, fast = [90.0, 3.0, 9.0, 4.0], [70.0, 1.0, 2.0, 8.0]
    timings = race({"slow": clock.run("slow", slow), "fast": clock.run("fast", fast)}, 3, clock=clock)
    assert clock.order == ["slow", "fast"] * 4
    for name, seconds in (("slow", slow[1:]), ("fast", fast[1:])):
        timing = timings[name]
        assert (timing.median_s, timing.least_s, timing.most_s) == (median(seconds), min(seconds), max(seconds))
        assert timing.rounds == 3


def test_what_runs_elsewhere_says_itself_how_long_it_took():
    seconds = iter([9.0, 1.0, 7.0, 2.0])
    timings = race({"there": lambda: next(seconds)}, 3)
    assert (timings["there"].median_s, timings["there"].least_s, timings["there"].most_s) == (2.0, 1.0, 7.0)


def test_a_short_run_is_made_once_untimed_before_each_timed_one():
    clock = Clock()
    timings = race({"short": clock.run("short", [2.0, 0.1, 9.0, 0.2, 9.0, 0.4, 9.0, 0.3])}, 3, clock=clock)
    assert (timings["short"].median_s, timings["short"].most_s) == (pytest.approx(0.3), pytest.approx(0.4))


def test_rounds_that_are_over_soon_are_more(monkeypatch):
    monkeypatch.setattr("model.timing.SECONDS_AT_LEAST", 3.0)
    monkeypatch.setattr("model.timing.PAUSE_S", 0.0)
    clock = Clock()
    assert race({"a": clock.run("a", [0.5] * 8)}, 2, clock=clock)["a"].rounds == 6
    assert race({"a": clock.run("a", [0.01] * 52)}, 2, clock=clock)["a"].rounds == 25, "but no more than enough"


def test_timed_points_are_spread_over_the_front_with_both_its_ends():
    assert [spread(range(10), most) for most in (1, 2, 4, 10, 99)] == [
        [0],
        [0, 9],
        [0, 3, 6, 9],
        list(range(10)),
        list(range(10)),
    ]


def test_times_are_kept_with_the_study_and_measured_again_replace_themselves(study, storage, tmp_path):
    first = bench(study, storage, tmp_path / "runs", batch_sizes=(1, 4), **QUICK)
    again = bench(study, storage, tmp_path / "runs", batch_sizes=(4,), **QUICK)
    loaded = optuna.load_study(study_name=study.study_name, storage=open_storage(storage))
    kept = {name: value for name, value in loaded.user_attrs.items() if name.startswith(LATENCY)}
    assert len(kept) == 2
    assert kept[again[0].key]["full"]["ms"] == again[0].full.ms != first[1].full.ms
    front = compute_front(loaded, storage)
    assert front.latency.batch_size == 1
    timed = {point.trial: point.ms for point in first[0].points}
    assert {point.trial: point.latency_ms for point in front.points if point.latency_ms is not None} == timed
    assert front.full.latency_ms == first[0].full.ms


def test_a_quick_look_at_few_sequences_does_not_hide_what_was_timed_before(study, storage, tmp_path):
    (record,) = bench(study, storage, tmp_path / "runs", batch_sizes=(1,), **QUICK)
    kept = compute_front(study, storage)
    for sequences, is_shown in ((4, False), (8, True), (100, True)):
        later = {**study.user_attrs[record.key], "sequences": sequences, "threads": 99, "points": []}
        study.set_user_attr(f"{LATENCY}quick", {**later, "measured_at": "9999-01-01T00:00:00"})
        front = compute_front(study, storage)
        assert front.latency.threads == (99 if is_shown else record.threads)
        assert is_shown or front.points == kept.points


def test_a_default_run_times_no_fewer_points_than_the_one_it_replaces(study, storage, tmp_path, monkeypatch):
    """A search by time has timed its whole front; what `--max-latency-ms` chooses among must not become less."""
    monkeypatch.setattr("hpo.bench.POINTS", 1)
    front = compute_front(study, storage)
    front = dataclasses.replace(front, points=(front.points[0], front.full))
    monkeypatch.setattr("hpo.bench.compute_front", lambda *_: front)
    few = {**QUICK, "points": None}

    def timed(sizes, options):
        records = bench(study, storage, tmp_path / "runs", batch_sizes=sizes, **options)
        return [[point.trial for point in record.points] for record in records]

    every = [point.trial for point in front.points]
    assert timed((1, 4), few) == [every[:1], every[:1]]
    assert timed((4,), {**QUICK, "points": len(every)}) == [every]
    assert timed((1, 4), few) == [every[:1], every]
    assert timed((4,), {**few, "sequences": 4}) == [every[:1]], "another measurement"
    assert timed((4,), {**QUICK, "points": 1}) == [every[:1]], "who asks for fewer gets fewer"


def test_shares_are_those_of_the_sequences_that_were_timed(study, storage, tmp_path, tiny_encoder):
    (record,) = bench(study, storage, tmp_path / "runs", batch_sizes=(4,), **QUICK)
    trial, point = study.trials[record.points[0].trial], record.points[0]
    assert record.sequences == 8
    assert 0.0 < point.relative_macs < 1.0
    assert point.least_ms <= point.ms <= point.most_ms
    assert record.realised(point) == pytest.approx(record.full.ms / point.ms * point.relative_macs)
    assert point.relative_macs == pytest.approx(trial.values[1] / study.user_attrs["full_macs"], rel=0.2), "near"


def test_figures_of_another_machine_are_never_mixed_with_ours(study, storage, tmp_path, monkeypatch):
    monkeypatch.setattr("hpo.bench.processor_name", lambda: "another")
    (other,) = bench(study, storage, tmp_path / "runs", batch_sizes=(1,), **QUICK)
    front = compute_front(study, storage)
    assert front.latency.processor == "another", "figures are better than none, and it is said whose they are"
    monkeypatch.undo()
    monkeypatch.setattr("model.timing.SECONDS_AT_LEAST", 0.0)
    ours = bench(study, storage, tmp_path / "runs", batch_sizes=(4,), **{**QUICK, "points": 2})[0]
    front = compute_front(study, storage)
    assert (front.latency.processor, front.latency.batch_size) == (ours.processor, 4)
    times = {point.latency_ms for point in front.points} - {None}
    assert times == {point.ms for point in ours.points}
    assert times.isdisjoint(point.ms for point in other.points)


def test_a_baseline_that_does_not_work_here_is_left_out_with_the_reason(study, storage, tmp_path, monkeypatch):
    def broken(name, *arguments):
        raise CannotRun(f"{name} needs a compiler")

    monkeypatch.setattr("hpo.bench.baseline", broken)
    (record,) = bench(study, storage, tmp_path / "runs", batch_sizes=(4,), **{**QUICK, "baselines": ["compile"]})
    assert record.left_out == {"compile": "compile needs a compiler"}
    assert record.baselines == ()


def test_full_length_on_the_front_is_timed_once(study, storage, tmp_path, monkeypatch):
    front = compute_front(study, storage)
    lone = dataclasses.replace(front, points=(front.points[0], front.full))
    monkeypatch.setattr("hpo.bench.compute_front", lambda *_: lone)
    raced = []

    def spy(runs, rounds, **given):
        raced.extend(runs)
        return race(runs, rounds, **given)

    monkeypatch.setattr("hpo.bench.race", spy)
    (record,) = bench(study, storage, tmp_path / "runs", batch_sizes=(4,), **QUICK)
    assert raced == [("ours", None), ("ours", front.points[0].trial)]
    assert [point.trial for point in record.points] == [front.points[0].trial, front.full.trial]
    assert record.points[1] == dataclasses.replace(record.full, trial=front.full.trial)
    assert record.realised(record.points[1]) == 1.0


def test_what_is_being_made_is_told(study, storage, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("hpo.bench.baseline", lambda *_: nullcontext(lambda batches: lambda: None))
    options = {**QUICK, "baselines": ["eager", "onnx-int8"]}
    bench(study, storage, tmp_path / "runs", batch_sizes=(4,), on_progress=lambda *a: told.append(a), **options)
    steps = list(dict.fromkeys(remark for *_, remark in told))
    assert steps == [
        "loading the model and its sequences",
        "making transformers, eager",
        "making ONNX Runtime, int8",
        "batches of 4",
    ]
    first_done = next(done for done, _, remark in told if remark == "batches of 4")
    assert first_done == 0, "rounds that do not count are said to be of the batches, too"


@pytest.mark.parametrize("step", ["making ONNX Runtime, fp32", "batches of 1"])
def test_ctrl_c_ends_any_step_with_a_line(study, storage, tmp_path, step, start_process):
    pytest.importorskip("onnxscript")
    flags = ["--batch-size", "1", "--baselines", "onnx-fp32", "--rounds", "100000"]
    process = start_process(
        [sys.executable, "-m", "hpo", "bench", *flags],
        env={**os.environ, "HPO_STORAGE": storage, "HPO_RUNS": str(tmp_path / "runs")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C reaches all processes of the job
    )
    said = next(line for line in process.stderr if line.startswith(step))
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert said.endswith(" ...\n")
    assert process.returncode == 130
    assert out == ""
    assert "Interrupted" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("said", "reason"), [("", "ValueError"), (" \n", "ValueError"), ("one\ntwo", "one")])
def test_a_baseline_that_fails_without_a_word_is_left_out_all_the_same(monkeypatch, said, reason):
    def fail(*_, **__):
        raise ValueError(said)

    monkeypatch.setattr("model.timing._engine", fail)
    with pytest.raises(CannotRun, match=f"^{reason}$"), baseline("onnx-fp32", None, None, None, 0, None):
        raise AssertionError("made")
    with pytest.raises(CannotRun, match=f"torch.compile failed: {reason}$"):
        model.timing._try(fail, {})


def test_baselines_run_the_dense_model(study, storage, tmp_path):
    pytest.importorskip("onnxruntime")
    names = ["eager", "sdpa", "onnx-fp32", "onnx-int8"]
    (record,) = bench(study, storage, tmp_path / "runs", batch_sizes=(4,), **{**QUICK, "baselines": names})
    assert [row.engine for row in record.baselines] == names
    assert all(row.ms > 0 and row.trial is None for row in record.baselines)
    assert not multiprocessing.active_children()


def test_batches_are_padded_to_the_longest_of_each(tiny_encoder, monkeypatch):
    shapes = []
    plain = BertForSequenceClassification.forward

    def spy(self, *arguments, **named):
        shapes.append((tuple(named["input_ids"].shape), named["attention_mask"].sum(dim=1).tolist()))
        return plain(self, *arguments, **named)

    monkeypatch.setattr(BertForSequenceClassification, "forward", spy)
    split = EncodedSplit(
        input_ids=[[5] * count for count in (3, 7, 4, 2)],
        token_type_ids=[[0] * count for count in (3, 7, 4, 2)],
        labels=np.zeros(4),
        num_truncated=0,
    )
    names = ["input_ids", "attention_mask", "token_type_ids"]
    dense("sdpa", tiny_encoder, BertForSequenceClassification, names, split, 0)(in_batches(4, 2))()
    assert shapes == [((2, 7), [3, 7]), ((2, 4), [4, 2])]


def test_processes_of_baselines_say_nothing_of_their_own(study, storage, tmp_path):
    flags = ["--batch-size", "4", "--sequences", "8", "--points", "1", "--rounds", "1", "--baselines", "eager,sdpa"]
    ended = subprocess.run(
        [sys.executable, "-m", "hpo", "bench", *flags],
        env={**os.environ, "HPO_STORAGE": storage, "HPO_RUNS": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    steps = ["loading the model and its sequences", "making transformers, eager", "making transformers, SDPA"]
    assert ended.stderr.splitlines() == [f"{step} ..." for step in [*steps, "batches of 4"]]


@pytest.mark.parametrize("when", ["made", "run"])
def test_a_baseline_whose_process_is_killed_is_named(study, storage, tmp_path, monkeypatch, when):
    def killed(name, *_):
        return apart(Engine(process_that_is_killed, (when,)), name)

    monkeypatch.setattr("hpo.bench.baseline", killed)
    options = {**QUICK, "baselines": ["eager"]}
    if when == "made":
        (record,) = bench(study, storage, tmp_path / "runs", batch_sizes=(4,), **options)
        assert record.left_out.keys() == {"eager"}
        assert "SIGKILL" in record.left_out["eager"]
        return
    with pytest.raises(HpoError, match=r"eager.*SIGKILL.*memory"):
        bench(study, storage, tmp_path / "runs", batch_sizes=(4,), **options)


def process_that_is_killed(when):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "made":
        die()
    return lambda _: die


class Point:
    def __init__(self, metric, relative_macs, latency_ms):
        self.metric, self.relative_macs, self.latency_ms = metric, relative_macs, latency_ms


def test_the_best_timed_point_within_a_time_is_chosen():
    generator = np.random.default_rng(0)
    for _ in range(50):
        metric, macs = np.sort(generator.random((2, 6)))
        points = [
            Point(*row, None if generator.random() < 0.3 else float(time))
            for *row, time in zip(metric, macs, generator.random(6), strict=True)
        ]
        fitting = [point for point in points if point.latency_ms is not None and point.latency_ms <= 0.5]
        if fitting:
            assert choose_point(points, 1.0, max_latency_ms=0.5) is max(fitting, key=lambda point: point.metric)


def test_a_time_that_nothing_keeps_within_says_the_least(study, storage, tmp_path):
    front = compute_front(study, storage)
    with pytest.raises(NothingFits, match="run `hpo bench`"):
        choose(front, max_latency_ms=5.0)
    (record,) = bench(study, storage, tmp_path / "runs", batch_sizes=(1,), **QUICK)
    front = compute_front(study, storage)
    with pytest.raises(NothingFits, match=r"ask for [0-9.]+ ms or more"):
        choose(front, max_latency_ms=1e-6)
    with pytest.raises(ExportError, match="more than 0"):
        choose(front, max_latency_ms=0.0)
    with pytest.raises(ExportError, match="exactly one"):
        choose(front, max_latency_ms=1.0, budget=0.5)
    assert choose(front, max_latency_ms=1e6).trial == record.points[-1].trial


def test_the_commands_measure_show_and_serve_a_time(study, command, tmp_path):
    flags = ["--sequences", "8", "--points", "3", "--rounds", "1", "--baselines", "none"]
    code, out, err = command("bench", "--batch-size", "1,4", *flags, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [record["batch_size"] for record in document["records"]] == [1, 4]
    assert all(point["realised"] > 0 for record in document["records"] for point in record["points"])
    slowest = max(point["ms"] for point in document["records"][0]["points"])
    code, out, err = command("pareto", "--max-latency-ms", str(slowest), "--json")
    assert code == 0, err
    pareto = json.loads(out)
    best = document["records"][0]["points"][-1]
    assert pareto["chosen"]["trial"] == best["trial"]
    assert pareto["chosen"]["latency_ms"] == best["ms"]
    assert pareto["latency"]["batch_size"] == 1
    page = next((tmp_path / "runs").rglob("front.html")).read_text()
    assert "ms per sequence" in page
    code, out, err = command("pareto")
    assert "one sequence at a time" in " ".join(out.split())
    folder = tmp_path / "served"
    code, _, err = command("export", "--max-latency-ms", str(slowest), "--out", str(folder))
    assert code == 0, err
    assert ServedFront.read(folder).chosen.latency_ms == best["ms"]
    pipeline = LengthAdaptivePipeline(folder)
    assert len(pipeline(["the film was good"], max_latency_ms=slowest)) == 1
    with pytest.raises(ExportError, match="ms or more"):
        pipeline(["the film was good"], max_latency_ms=1e-9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--batch-size", "1,x"], "--batch-size 1,x"),
        (["bench", "--batch-size", "0"], "1 or more"),
        (["bench", "--baselines", "tensorrt"], "tensorrt"),
        (["bench", "--threads", "100000"], "--threads 100000"),
        (["pareto", "--max-latency-ms", "0"], "above 0"),
        (["pareto", "--max-latency-ms", "3", "--budget", "0.5"], "not both"),
        (["export", "--out", "x"], "--max-latency-ms"),
    ],
)
def test_wrong_flags_are_wrong_usage(command, arguments, said):
    code, _, err = command(*arguments)
    assert code == 2
    assert said in " ".join(err.replace("│", " ").split())


def test_an_export_made_before_times_were_kept_is_read(study, command, tmp_path):
    folder = tmp_path / "served"
    code, _, err = command("export", "--budget", "1.0", "--out", str(folder))
    assert code == 0, err
    document = json.loads((folder / "length_front.json").read_text())
    for point in (*document["points"], document["full"], document["chosen"]):
        del point["latency_ms"]
    (folder / "length_front.json").write_text(json.dumps(document))
    front = ServedFront.read(folder)
    assert {point.latency_ms for point in front.points} == {None}
    assert isinstance(front.chosen.length_config, LengthConfig)
