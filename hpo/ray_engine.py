"""Workers on a Ray cluster: the jobs of `hpo.workers`, wherever the cluster has room for them.

The model, the teacher and the dataset travel through Ray's object store, so nodes need nothing but this package and the
database. Ray runs whatever a driver sends it: use a cluster that only trusted people reach.
"""

import dataclasses
import hashlib
import io
import logging
import math
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import patch_environment

from hpo.errors import HpoError
from hpo.storage import close, display_url, finished_trials, open_storage
from hpo.workers import ENDING_S, MOST_DEATHS, SearchJob, TuneJob, last_words
from hpo.workload import ProgressHook, with_paths

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

LOCAL = "local"
REACHED_WITHIN_S = 10.0
ROOM_WITHIN_S = 300.0
"""How long a first worker may wait for the cluster's other users, and for a cold node to read its libraries."""
LOOK_S = 1.0
"""Time between two looks at the study, or more where a look takes long."""

Job = SearchJob | TuneJob


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """Where workers run, and what each of them needs; checks itself.

    Attributes:
        address: "local" for one on this machine alone, that ends with the job; "auto" or host:port for one that runs
            and that this machine is a node of.
        cpus_per_worker: Cores, and threads, of each.
        gpus_per_worker: GPUs of each; a part of 1 shares one.
    Raises:
        HpoError: A value is out of its range.
    """

    address: str
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if self.address.startswith("ray://"):
            raise HpoError(f"--ray {self.address}: run the command on a node of the cluster, with --ray auto.")
        if self.address not in (LOCAL, "auto") and not _host_and_port(self.address)[1].isdecimal():
            raise HpoError(f"--ray {self.address}: write local, auto, or the address of a cluster as host:port.")
        if self.cpus_per_worker < 1:
            raise HpoError(f"--cpus-per-worker {self.cpus_per_worker}; choose at least 1.")
        if self.gpus_per_worker < 0 or (self.gpus_per_worker > 1 and self.gpus_per_worker % 1):
            raise HpoError(f"--gpus-per-worker {self.gpus_per_worker:g}; choose a whole number, or a part of 1.")

    @property
    def needs(self) -> dict[str, float]:
        """What Ray calls the resources of one worker."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}


def run_on_ray(
    job: Job,
    cluster: RayCluster,
    *,
    on_progress: ProgressHook | None = None,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Run a job's workers on a Ray cluster until its study is complete.

    A worker whose process or node dies is started anew, and its trials are taken over by the others.

    Args:
        job: What to work on, with the number of workers; its files are read on this machine.
        cluster: Where, and with what.
        on_progress: Told what the database holds.
        prepare: Called first in each worker.
    Raises:
        HpoError: The cluster cannot be reached or has no room, nodes do not reach what they need, a worker failed, or
            workers die one after the other.
    """
    if cluster.address != LOCAL and job.storage.startswith("sqlite"):
        raise HpoError(
            f"--storage {display_url(job.storage)} is a file, which the nodes of a Ray cluster cannot share; name a "
            "PostgreSQL or MariaDB server, or pass --ray local."
        )
    rdb = open_storage(job.storage, timeout_s=job.storage_timeout_s)
    try:
        study = job.open(rdb)
        if len(finished_trials(study)) < job.trials:
            with _connected(cluster) as ray, _shared_mark(job) as mark:
                _Crew(ray, job, cluster, mark, prepare).attend(study, on_progress)
    finally:
        close(rdb)


@contextmanager
def _connected(cluster: RayCluster) -> Iterator[Any]:
    """Ray itself, connected to the cluster and quiet."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0"}
    quiet["RAY_NUM_REDIS_GET_RETRIES"] = "1"  # of 40 s each, where something else listens at the address
    if cluster.address == LOCAL:
        quiet["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's word for: listen on the loopback interface alone
    elif cluster.address != "auto":
        _check_reachable(cluster.address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    with patch_environment(**quiet):
        try:
            import ray
        except ImportError as error:
            raise HpoError("--ray needs Ray, which is not installed; run `pip install ray`.") from error
        how: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        where = {"include_dashboard": False} if cluster.address == LOCAL else {"address": cluster.address}
        try:
            ray.init(**how, **where)
        except (Exception, SystemExit) as error:
            raise HpoError(
                f"Cannot use the Ray cluster {cluster.address} ({_first_line(error)}); start one with `ray start "
                "--head` and run the command on one of its nodes, or pass --ray local."
            ) from error
    try:
        with redirect_stdout(io.StringIO()):  # Ray prints there what becomes of its nodes; a warning of ours says it
            yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ask whether anybody listens there; Ray itself would try for a minute, and say so at length."""
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, int(port)), timeout=REACHED_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise HpoError(
            f"No Ray cluster answers at {address} ({getattr(error, 'strerror', None) or error}); start one with `ray "
            "start --head`, or pass --ray local."
        ) from error


def _host_and_port(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


@contextmanager
def _shared_mark(job: Job) -> Iterator[Path | None]:
    """A file by which workers of `hpo tune` see that they have the same runs folder as this process."""
    if isinstance(job, SearchJob):
        yield None  # its workers keep nothing there
        return
    mark = job.runs.resolve() / f".shared-{uuid.uuid4().hex}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


class _Crew:
    """The workers of a job on a cluster."""

    def __init__(
        self, ray: Any, job: Job, cluster: RayCluster, mark: Path | None, prepare: Callable[[], None] | None
    ) -> None:
        self.ray = ray
        self.cluster = cluster
        self.count = job.workers
        self.trials = job.trials
        self.running: list[Any] = []
        if (room := self._check_room()) < self.count:
            logger.warning("The Ray cluster has room for %d of the %d workers at a time.", room, self.count)
        resources = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker, "max_retries": 0}
        self._check_start(ray.remote(_versions).options(**resources))
        self._work = ray.remote(_work).options(**resources, scheduling_strategy="SPREAD")
        files = {path: _put(ray, Path(path)) for path in _local_paths(job)}
        job = dataclasses.replace(job, runs=job.runs.resolve())
        self._task = ray.put((job, files, mark, cluster.cpus_per_worker, prepare))  # also the database's password

    def attend(self, study: "optuna.Study", on_progress: ProgressHook | None) -> None:
        """Start all workers, and those that die anew, until the study is complete."""
        look = _Look(study, self.trials, on_progress)
        deaths, leave_at_s = 0, math.inf
        try:
            self.running = [self._work.remote(self._task) for _ in range(self.count)]
            while self.running and time.monotonic() < leave_at_s:
                self._check_room()
                ended, self.running = self.ray.wait(self.running, timeout=LOOK_S)
                died = [reason for worker in ended if (reason := self._cause_of_death(worker)) is not None]
                if len(died) < len(ended):  # the study is complete: the others have a last look to take, or no room
                    leave_at_s = min(leave_at_s, time.monotonic() + ENDING_S)
                if look.sees_more(at_once=bool(died)):
                    deaths = 0
                for reason in died:
                    deaths += 1
                    if deaths > MOST_DEATHS:
                        raise HpoError(f"{deaths} workers on Ray died one after the other, the last because {reason}.")
                    logger.warning("A worker on Ray died (%s) and is started anew.", reason)
                    self.running.append(self._work.remote(self._task))
        finally:
            self._end()

    def _cause_of_death(self, worker: Any) -> str | None:
        """Why a worker that has ended did not come to its end; None where it did.

        Raises:
            HpoError: It failed for a reason that another would fail for too.
        """
        try:
            failure = self.ray.get(worker)
        except self.ray.exceptions.RayTaskError as error:
            raise HpoError(f"A worker on Ray could not start ({_last_line(error)}).") from error
        except self.ray.exceptions.RayError as error:
            return _first_line(error)
        if failure is not None:
            raise HpoError(failure)
        return None

    def _end(self) -> None:
        """Have all workers that still run put their trials in order and end."""
        for worker in self.running:
            self.ray.cancel(worker)
        if self.running:
            self.ray.wait(self.running, num_returns=len(self.running), timeout=ENDING_S)

    def _check_room(self) -> int:
        """How many workers have room; where none has, refuse to wait, and say what the cluster has."""
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        needs = {name: amount for name, amount in self.cluster.needs.items() if amount}
        room = sum(
            int(min(node["Resources"].get(name, 0.0) / amount for name, amount in needs.items())) for node in nodes
        )
        if not room:
            has = "; ".join(
                f"{node['NodeManagerAddress']} with {node['Resources'].get('CPU', 0):g} CPUs and "
                f"{node['Resources'].get('GPU', 0):g} GPUs"
                for node in nodes
            )
            raise HpoError(
                f"No node of the Ray cluster has room for a worker of {self.cluster.cpus_per_worker} CPUs and "
                f"{self.cluster.gpus_per_worker:g} GPUs; it has {has or 'no nodes'}. Ask for less with "
                "--cpus-per-worker and --gpus-per-worker, or add nodes."
            )
        return room

    def _check_start(self, probe: Any) -> None:
        """See that a worker can start, and has this version."""
        answer = probe.remote()
        ready, _ = self.ray.wait([answer], timeout=ROOM_WITHIN_S)
        if not ready:
            self.ray.cancel(answer)
            free = self.ray.available_resources()
            raise HpoError(
                f"The Ray cluster had no room for a first worker within {ROOM_WITHIN_S:.0f} s; free are "
                f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs. Wait for its other users, or add nodes."
            )
        try:
            theirs = self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            raise HpoError(
                f"A node of the Ray cluster cannot run this tool ({_last_line(error)}); install the same version of it "
                "on every node."
            ) from error
        if differing := sorted(name for name, ours in _versions().items() if theirs.get(name) != ours):
            raise HpoError(
                f"The nodes of the Ray cluster have other versions of {', '.join(differing)} than this machine; "
                "install the same on every node."
            )


class _Look:
    """How far the study is, looked up now and then."""

    def __init__(self, study: "optuna.Study", trials: int, on_progress: ProgressHook | None) -> None:
        self.study = study
        self.trials = trials
        self.on_progress = on_progress
        self.done = -1
        self.next_s = 0.0

    def sees_more(self, *, at_once: bool) -> bool:
        """Show what is done, where it is time; whether it is more than before."""
        begun_s = time.monotonic()
        if begun_s < self.next_s and not at_once:
            return False
        before, self.done = self.done, len(finished_trials(self.study))
        self.next_s = time.monotonic() + max(LOOK_S, 20 * (time.monotonic() - begun_s))
        if self.on_progress is not None:
            self.on_progress(self.done, self.trials, "")
        return self.done > before


# On the nodes


def _versions() -> dict[str, str]:
    """What has to be the same on all nodes."""
    return {name: version(name) for name in ("hpo", "optuna")}


def _work(
    task: tuple[Job, Mapping[str, "_Files"], Path | None, int, Callable[[], None] | None],
) -> str | None:
    """Work until the study is complete; returns what a user can put right where that fails."""
    import ray

    job, files, mark, threads, prepare = task
    torch.set_num_threads(threads)
    try:
        if prepare is not None:
            prepare()
        if mark is not None and not mark.is_file():
            raise HpoError(
                f"{job.runs} is not the same folder on node {socket.gethostname()}; `hpo tune` keeps each best model "
                "there, so name a folder with --runs that all nodes share."
            )
        places = {path: str(_unpack(ray, content)) for path, content in files.items()}
        _relocated(job, lambda path: places.get(path, path)).run()
    except Exception as error:
        return last_words(error)
    return None


# Files


def _relocated(job: Job, place_of: Callable[[str], str]) -> Job:
    """The job with other places of what it reads."""
    data = dataclasses.replace(job.workload.data, dataset=with_paths(job.workload.data.dataset, place_of))
    if isinstance(job, SearchJob):
        workload = dataclasses.replace(job.workload, data=data)
        return dataclasses.replace(job, workload=workload, checkpoint=Path(place_of(str(job.checkpoint))))
    workload = dataclasses.replace(job.workload, data=data, model=place_of(job.workload.model))
    return dataclasses.replace(job, workload=workload, teacher=None if job.teacher is None else place_of(job.teacher))


def _local_paths(job: Job) -> set[str]:
    """What the job reads from this machine's disk; the rest is on the hub."""
    paths: set[str] = set()

    def note(path: str) -> str:
        paths.add(path)
        return path

    _relocated(job, note)
    return {path for path in paths if Path(path).exists()}


@dataclass(frozen=True)
class _Files:
    """A file, or a folder with all that is in it, in the object store.

    Attributes:
        name: Its own name.
        digest: Of names and contents.
        parts: References to the files' bytes, by path from where it lies.
    """

    name: str
    digest: str
    parts: Mapping[str, Any]


def _put(ray: Any, source: Path) -> _Files:
    """Put a file or folder into the object store."""
    digest, parts = hashlib.sha256(), {}
    for path in [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file()):
        name, content = path.relative_to(source.parent).as_posix(), np.fromfile(path, dtype=np.uint8)
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content.data)
        parts[name] = ray.put(content)
    return _Files(source.name, digest.hexdigest(), parts)


def _unpack(ray: Any, files: _Files) -> Path:
    """Where the files lie on this node; the first worker that needs them writes them."""
    root = Path(tempfile.gettempdir()) / f"hpo-inputs-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.getuid():
        raise HpoError(f"{root} on node {socket.gethostname()} is another user's; remove it, or set TMPDIR.")
    place = root / files.digest
    if not place.is_dir():
        written = Path(tempfile.mkdtemp(dir=root))
        for name, part in files.parts.items():
            (written / name).parent.mkdir(parents=True, exist_ok=True)
            ray.get(part).tofile(written / name)
        try:
            written.rename(place)
        except OSError:  # another worker of this node was faster
            shutil.rmtree(written)
    return place / files.name


# Words


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _last_line(error: BaseException) -> str:
    """Of a remote error, whose text ends in what was raised."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
