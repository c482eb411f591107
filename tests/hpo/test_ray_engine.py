"""Workers on a Ray cluster of two nodes, one of which is lost; what the command says of clusters that will not do."""

import dataclasses
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from hpo.bulk import WORK
from hpo.errors import HpoError
from hpo.heartbeats import WorkerName
from hpo.storage import close, open_storage
from hpo.workers import SearchJob, TuneJob

ray = pytest.importorskip("ray", reason="Ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

from hpo.ray_engine import RayCluster, _work, run_on_ray  # noqa: E402

SECRET = "sesame-open-8841"
# Ray leaves the pipes and files of the processes it started to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on the loopback interface, each with room for one worker; the second may be killed."""
    patch = pytest.MonkeyPatch()
    patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)  # loopback addresses only
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_worker_niceness", "0")  # else other tests starve its workers
    level = logging.getLogger("ray").level
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()
    logging.getLogger("ray").setLevel(level)
    patch.undo()


@pytest.fixture
def search_job(lengths, workload, tiny_encoder, tmp_path, storage) -> SearchJob:
    return SearchJob(
        definition=lengths,
        workload=workload,
        checkpoint=tiny_encoder,
        trials=30,
        storage=storage,
        runs=tmp_path / "runs",
        workers=2,
    )


def parent_of(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return None


def test_study_outlives_a_node_that_is_killed(cluster, search_job, new_database, tmp_path):
    url = new_database("postgresql")
    job = dataclasses.replace(search_job, trials=200, storage=url.replace("postgres@", f"postgres:{SECRET}@"))
    (raylet,) = next(iter(cluster.worker_nodes)).all_processes["raylet"]
    meeting, over, done_when_killed = tmp_path / "meeting", threading.Event(), []
    meeting.mkdir()

    def wait_for_each_other() -> None:
        (meeting / str(os.getpid())).touch()
        while len(list(meeting.iterdir())) < 2:
            time.sleep(0.05)

    def kill_the_node_at_work() -> None:
        while len(list(meeting.iterdir())) < 2 and not over.is_set():
            time.sleep(0.01)
        workers = {int(file.name) for file in meeting.iterdir()}
        elsewhere = [worker for worker in workers if parent_of(worker) != raylet.process.pid]
        for worker in elsewhere:
            os.kill(worker, signal.SIGSTOP)  # it might have made all trials before the other has begun
        storage = open_storage(url)
        while not done_when_killed and not over.is_set():
            time.sleep(0.01)
            if not optuna.get_all_study_summaries(storage, include_best_trial=False):
                continue
            trials = optuna.load_study(study_name="lengths", storage=storage).trials
            running = [trial.system_attrs[WORK]["worker"] for trial in trials if trial.state == TrialState.RUNNING]
            if any(WorkerName.parse(worker).pid in workers.difference(elsewhere) for worker in running if worker):
                os.kill(raylet.process.pid, signal.SIGKILL)
                done_when_killed.append(sum(trial.state.is_finished() for trial in trials))
        for worker in elsewhere:
            os.kill(worker, signal.SIGCONT)
        close(storage)

    killer = threading.Thread(target=kill_the_node_at_work)
    killer.start()
    try:
        run_on_ray(job, RayCluster(address=cluster.address), prepare=wait_for_each_other)
    finally:
        over.set()
        killer.join()
    assert done_when_killed
    assert done_when_killed[0] < 200
    storage = open_storage(url)
    study = optuna.load_study(study_name="lengths", storage=storage)
    states, attributes = Counter(trial.state for trial in study.trials), study.user_attrs
    close(storage)
    assert states[TrialState.COMPLETE] == 200
    assert not states[TrialState.RUNNING]
    assert attributes["checkpoint"] == str(job.checkpoint)
    raylet.process.wait(timeout=30)
    assert raylet.process.returncode == -signal.SIGKILL
    logs = Path(cluster.head_node.get_session_dir_path())
    assert any(logs.rglob("*.log"))
    assert not [path for path in logs.rglob("*") if path.is_file() and SECRET in path.read_text(errors="replace")]


def test_more_than_the_cluster_has_is_refused_with_what_it_has(cluster, search_job, new_database):
    """Runs after a node was killed: neither Ray nor we wait for what never comes."""
    job = dataclasses.replace(search_job, storage=new_database("postgresql"))
    with pytest.raises(
        HpoError, match=r"room for a worker of 1 CPUs and 8 GPUs; it has 127\.0\.0\.1 with 1 CPUs and 0 GPUs"
    ):
        run_on_ray(job, RayCluster(address=cluster.address, gpus_per_worker=8))


def test_file_database_is_refused_for_a_cluster(search_job):
    with pytest.raises(HpoError, match=r"hpo\.db is a file, .* PostgreSQL"):
        run_on_ray(search_job, RayCluster(address="auto"))


def test_address_that_nobody_listens_at_is_refused_at_once(search_job, new_database):
    job = dataclasses.replace(search_job, storage=new_database("postgresql"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(HpoError, match=f"No Ray cluster answers at 127.0.0.1:{port} .*ray start"):
        run_on_ray(job, RayCluster(address=f"127.0.0.1:{port}"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"address": "ray://host:10001"}, "on a node of the cluster"),
        ({"address": "somewhere"}, "local, auto"),
        ({"cpus_per_worker": 0}, "cpus-per-worker 0"),
        ({"gpus_per_worker": 1.5}, "a part of 1"),
    ],
)
def test_impossible_cluster_is_refused(changes, words):
    with pytest.raises(HpoError, match=words):
        RayCluster(**{"address": "auto", **changes})


def test_missing_extra_says_what_to_install(search_job, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(HpoError, match=r"`pip install ray`"):
        run_on_ray(search_job, RayCluster(address="local"))


def test_node_without_the_runs_folder_says_so(finetune, workload, storage, tmp_path):
    job = TuneJob(definition=finetune, workload=workload, trials=1, storage=storage, runs=tmp_path / "runs")
    failure = _work((job, {}, tmp_path / "runs" / ".shared-1", 1, None))
    assert failure is not None
    assert "name a folder with --runs that all nodes share" in failure


def test_flags_that_need_another_are_wrong_usage(command):
    code, _, stderr = command("tune", "--cpus-per-worker", "2")
    assert (code, "go with --ray" in " ".join(stderr.split())) == (2, True)
    code, _, stderr = command("tune", "--processes", "2")
    assert (code, "goes with --launcher" in " ".join(stderr.split())) == (2, True)
