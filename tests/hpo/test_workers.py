"""Several workers on one study: shared out, killed, replaced, and never in each other's way."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tqdm import tqdm

from hpo.errors import HpoError
from hpo.rehearsal import RehearsalJob, survivors
from hpo.workers import MOST_DEATHS, SearchJob, TuneJob, run_workers


def workers_of_this_process() -> list[int]:
    """Ids of the workers that run, without the helper process that Python itself starts."""
    children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.filterwarnings("ignore:.*is being started anew")
def test_killed_workers_lose_no_trial_and_none_is_evaluated_twice(any_url):
    killed: set[int] = set()

    def kill_now_and_then(done, total, remark):
        alive = [pid for pid in workers_of_this_process() if pid not in killed]
        if done > 15 * (1 + len(killed)) and len(killed) < 3 and alive:
            os.kill(alive[0], signal.SIGKILL)
            killed.add(alive[0])

    job = RehearsalJob(storage=any_url, trials=80, workers=3, trial_s=0.03)
    run_workers(job, 3, on_progress=kill_now_and_then)
    assert len(killed) == 3
    facts = survivors(job)
    assert (facts["finished"], facts["unfinished"]) == (80, 0)
    assert (facts["evaluated_twice"], facts["wrong_numbers"], facts["studies"]) == (0, 0, 1)
    assert workers_of_this_process() == []


@dataclass(frozen=True)
class DiesJob:
    """A job that kills whoever works on it, once what it loads was drawn."""

    def run(self, on_progress=None):
        list(tqdm(range(2)))
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class FailsJob:
    """A job that no worker can do."""

    error: Exception

    def run(self, on_progress=None):
        raise self.error


@dataclass(frozen=True)
class SaysJob:
    """A job that writes down what its worker may use."""

    folder: Path

    def run(self, on_progress=None):
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        (self.folder / str(os.getpid())).write_text(" ".join(os.environ.get(name, "-") for name in names))


@dataclass(frozen=True)
class HangsJob:
    """A job that never ends."""

    folder: Path

    def run(self, on_progress=None):
        (self.folder / str(os.getpid())).write_text("")
        on_progress(0, 1, "")
        while True:
            time.sleep(1)


def test_workers_that_die_one_after_the_other_end_in_a_sentence():
    with pytest.raises(HpoError, match=rf"^{MOST_DEATHS + 1} workers died .* was killed by SIGKILL; .* --workers\.$"):
        run_workers(DiesJob(), 1)


def test_a_worker_that_fails_ends_the_others_with_its_own_words():
    with pytest.raises(HpoError, match=r"^There is no such dataset\.$"):
        run_workers(FailsJob(HpoError("There is no such dataset.")), 2)
    with pytest.raises(HpoError, match=r"ended with ZeroDivisionError: oh \(test_workers.py, line \d+\)"):
        run_workers(FailsJob(ZeroDivisionError("oh")), 1)
    assert workers_of_this_process() == []


def test_cores_are_shared_out_and_gpus_dealt_out(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))
    run_workers(SaysJob(tmp_path), 3)
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["2 4", "2 4", "2 7"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"
    assert "OMP_NUM_THREADS" not in os.environ


def test_ctrl_c_ends_the_workers(tmp_path):
    def press(done, total, remark):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_workers(HangsJob(tmp_path), 2, on_progress=press)
    assert workers_of_this_process() == []


def start(job, *arguments, **streams):
    """A process that runs a job of this file with two workers."""
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = (
        "import sys; from pathlib import Path; from hpo.workers import run_workers; from test_workers import *;"
        f"run_workers({job}, 2)"
    )
    environment = {**os.environ, "PYTHONPATH": places}
    return subprocess.Popen([sys.executable, "-c", command, *arguments], env=environment, **streams)


def test_killed_workers_leave_nothing_behind_that_python_complains_of():
    with start("DiesJob()", stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        words = parent.stderr.read()
    assert "workers died one after the other" in words
    assert "leaked" not in words


def test_no_worker_outlives_a_killed_parent(tmp_path):
    parent = start("HangsJob(Path(sys.argv[1]))", tmp_path)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_jobs_can_be_sent_elsewhere(lengths, finetune, workload, tiny_encoder, tmp_path):
    common = {"workload": workload, "trials": 3, "storage": "sqlite:///x.db", "runs": tmp_path, "workers": 4}
    for job in (
        SearchJob(definition=lengths, checkpoint=tiny_encoder, **common),
        TuneJob(definition=finetune, **common),
    ):
        assert pickle.loads(pickle.dumps(job)) == job
