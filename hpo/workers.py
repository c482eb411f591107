"""Jobs that workers share, and running several workers on this machine.

A job is all that a worker needs to know. It can be pickled, so it may be sent to another process or machine; `run`
works on it as one worker until its study is complete, and any number of workers may run the same job at the same
time, wherever they reach the database. What `run` returns holds a connection and stays in its process.
"""

import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from hpo.errors import HpoError
from hpo.outage import DEFAULT_TIMEOUT_S
from model.children import how_it_ended
from studies.loader import FinetuneStudy, LengthsStudy

if TYPE_CHECKING:  # a worker imports torch once it knows how many threads it may have
    import optuna

    from hpo.ray_engine import RayCluster
    from hpo.search_lengths import LengthSearch
    from hpo.storage import Storage
    from hpo.workload import ProgressHook, Workload

logger = logging.getLogger(__name__)

MOST_DEATHS = 5
"""Workers that may die, one after the other, without a trial being finished in between."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
ENDING_S = 10.0
"""Time that workers have for putting their trials in order before they are killed."""


class Job(Protocol):
    """What a worker works on."""

    def run(self, on_progress: "ProgressHook | None" = None) -> Any:
        """Work as one worker until the study is complete."""


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """A search of length configs; the arguments of `hpo.search_lengths.search_lengths`.

    Attributes:
        workers: How many were started together, so that each asks for its part of a generation.
    """

    definition: LengthsStudy
    workload: "Workload"
    checkpoint: Path
    trials: int
    storage: str
    runs: Path
    seed: int = 0
    seed_with: str | None = None
    workers: int = 1
    storage_timeout_s: float = DEFAULT_TIMEOUT_S

    def open(self, rdb: "Storage", on_progress: "ProgressHook | None" = None) -> "optuna.Study":
        """The study, made where there is none; it records this process's paths, whoever works on it.

        Where time is a cost, this process's machine is timed, before any worker computes beside it.
        """
        from hpo.search_lengths import fitted_table, open_search
        from hpo.workload import load_trained_encoder, load_workload

        loaded = load_workload(self.workload, self.checkpoint)
        model = load_trained_encoder(self.checkpoint, loaded.corpus).eval()
        study = open_search(self.definition, loaded, self.checkpoint, model, rdb, self.seed)
        fitted_table(study, rdb, self.definition, model, loaded, self.trials, on_progress)
        return study

    def run(self, on_progress: "ProgressHook | None" = None) -> "LengthSearch":
        """Work as one worker until the study has its trials."""
        from hpo.search_lengths import search_lengths

        return search_lengths(
            self.definition,
            self.workload,
            self.checkpoint,
            trials=self.trials,
            storage=self.storage,
            runs=self.runs,
            seed=self.seed,
            seed_with=self.seed_with,
            workers=self.workers,
            storage_timeout_s=self.storage_timeout_s,
            on_progress=on_progress,
        )


@dataclass(frozen=True, kw_only=True)
class TuneJob:
    """A study over training settings; the arguments of `hpo.tune.tune`.

    Attributes:
        workers: How many were started together.
        processes: How many train one model together.
    """

    definition: FinetuneStudy
    workload: "Workload"
    trials: int
    storage: str
    runs: Path
    teacher: str | None = None
    student_layers: Sequence[int] | None = None
    seed: int = 0
    workers: int = 1
    processes: int = 1
    storage_timeout_s: float = DEFAULT_TIMEOUT_S

    def open(self, rdb: "Storage") -> "optuna.Study":
        """The study, made where there is none; it records this process's paths, whoever works on it."""
        from hpo.recipe import Recipe
        from hpo.tune import open_tuning
        from hpo.workload import load_workload

        loaded = load_workload(self.workload, self.workload.model)
        recipe = Recipe.of(self.definition, loaded, self.teacher, self.student_layers)
        return open_tuning(recipe, rdb, self.seed)

    def run(self, on_progress: "ProgressHook | None" = None) -> "optuna.Study":
        """Work as one worker until the study has its trials."""
        from hpo.tune import tune

        return tune(
            self.definition,
            self.workload,
            trials=self.trials,
            storage=self.storage,
            runs=self.runs,
            teacher=self.teacher,
            student_layers=self.student_layers,
            seed=self.seed,
            workers=self.workers,
            processes=self.processes,
            storage_timeout_s=self.storage_timeout_s,
            on_progress=on_progress,
        )


def complete(
    job: "SearchJob | TuneJob",
    *,
    on_progress: "ProgressHook | None" = None,
    prepare: Callable[[], None] | None = None,
    cluster: "RayCluster | None" = None,
) -> Any:
    """Complete a job's study with as many workers as it says, here or on a cluster; returns what `run` does.

    Args:
        job: What to work on.
        on_progress: Told what the workers report.
        prepare: Called first in each worker.
        cluster: A Ray cluster that the workers run on; None for this machine.
    Raises:
        HpoError: As `run_workers` or `run_on_ray`, or as the job.
    """
    if cluster is not None:
        from hpo.ray_engine import run_on_ray

        run_on_ray(job, cluster, on_progress=on_progress, prepare=prepare)
    elif job.workers > 1:
        if isinstance(job, SearchJob) and job.definition.cost != "macs":
            from hpo.storage import open_storage

            job.open(open_storage(job.storage, timeout_s=job.storage_timeout_s), on_progress)
        run_workers(job, job.workers, on_progress=on_progress, prepare=prepare)
    return dataclasses.replace(job, workers=1).run(on_progress)  # after several workers, nothing is left to be done


def run_workers(
    job: Job,
    count: int,
    *,
    on_progress: "ProgressHook | None" = None,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Run a job in several processes of this machine until its study is complete.

    The cores are shared out, and so are the GPUs. A worker that dies is replaced; none outlives this process.

    Args:
        job: What to work on; it is pickled, and so is `prepare`.
        count: Workers.
        on_progress: Told what the workers report.
        prepare: Called first in each worker.
    Raises:
        HpoError: A worker failed, or they die one after the other; the message has the last one's last words.
        KeyboardInterrupt: Ctrl-C; the workers have ended by then.
    """
    crew = _Crew(job, count, on_progress, prepare)
    try:
        for number in range(count):
            crew.start(number)
        crew.attend()
    finally:
        crew.end()


@dataclass
class _Place:
    """A worker's place: the process that has it now, and where its messages come from."""

    process: multiprocessing.process.BaseProcess
    messages: Connection
    lifeline: Connection
    failure: str | None = None


@dataclass
class _Crew:
    job: Job
    count: int
    on_progress: "ProgressHook | None"
    prepare: Callable[[], None] | None
    places: dict[int, _Place] = field(default_factory=dict)
    deaths: int = 0
    most_done: int = -1

    def start(self, number: int) -> None:
        """Start the worker of a place."""
        context = multiprocessing.get_context("spawn")
        messages, sender = context.Pipe(duplex=False)
        held, lifeline = context.Pipe(duplex=False)  # whose other end closes when this process ends, however it does
        arguments = (self.job, sender, held, self.prepare, logging.getLogger("hpo").level, number)
        process = context.Process(target=_work, args=arguments, name=f"worker {number}")
        with _environment(_settings_of(number, self.count)), _ctrl_c_ignored():
            process.start()
        sender.close()
        held.close()
        self.places[number] = _Place(process, messages, lifeline)

    def attend(self) -> None:
        """Pass on what workers say, and replace those that die, until all have finished."""
        while self.places:
            wait([place.messages for place in self.places.values()])
            for number, place in list(self.places.items()):
                if self._listen(place):
                    continue
                place.process.join()
                place.messages.close()
                place.lifeline.close()
                del self.places[number]
                if place.failure is not None:
                    raise HpoError(place.failure)
                if place.process.exitcode:
                    self._mourn(place.process)
                    self.start(number)

    def _listen(self, place: _Place) -> bool:
        """Take in what a worker has said; False once it will say no more."""
        try:
            while place.messages.poll():
                match place.messages.recv():
                    case ("progress", (done, total, remark)):
                        if int(done) > self.most_done:
                            self.most_done, self.deaths = int(done), 0
                        if self.on_progress is not None:
                            self.on_progress(done, total, remark)
                    case ("failure", str(words)):
                        place.failure = words
        except (EOFError, OSError):
            return False
        return True

    def _mourn(self, process: multiprocessing.process.BaseProcess) -> None:
        self.deaths += 1
        if self.deaths > MOST_DEATHS:
            raise HpoError(
                f"{self.deaths} workers died one after the other, the last of which {how_it_ended(process)}; where "
                "memory is short, start fewer with --workers."
            )
        logger.warning("A worker %s and is started anew.", how_it_ended(process))

    def end(self) -> None:
        """Have all workers that still run put their trials in order and end."""
        for place in self.places.values():
            place.process.terminate()
        deadline = time.monotonic() + ENDING_S
        for place in self.places.values():
            place.process.join(max(0.0, deadline - time.monotonic()))
            if place.process.is_alive():
                place.process.kill()
                place.process.join()
            place.messages.close()
            place.lifeline.close()


def _work(
    job: Job, sender: Connection, held: Connection, prepare: Callable[[], None] | None, log_level: int, number: int
) -> None:
    """A worker's process: Ctrl-C reaches it from the process that started it, as a signal to end."""
    os.setsid()
    tqdm.set_lock(threading.RLock())  # its own is one between processes, which a worker that is killed leaves behind
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    threading.Thread(target=_end_with, args=(held,), name="lifeline", daemon=True).start()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"worker {number}: %(message)s"))
    for name in ("hpo", "model", "studies"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(log_level)
    last_s = 0.0

    def report(done: float, total: int, remark: str) -> None:
        nonlocal last_s
        if time.monotonic() - last_s > 0.1 or done >= total:
            last_s = time.monotonic()
            sender.send(("progress", (done, total, remark)))

    try:
        if prepare is not None:
            prepare()
        job.run(report)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        sender.send(("failure", last_words(error)))


def last_words(error: Exception) -> str:
    """The sentence of an error that a user can put right; where another ended the worker, in the end of its trace."""
    if isinstance(error, HpoError) or type(error).__module__.partition(".")[0] in ("model", "studies"):
        return str(error)
    trace = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"A worker ended with {type(error).__name__}: {error} ({Path(trace.filename).name}, line {trace.lineno}); run "
        "the same command with --workers 1 to see more."
    )


def _end_with(held: Connection) -> None:
    """End this process at once when the one that started it has ended."""
    try:
        held.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _settings_of(number: int, count: int) -> dict[str, str]:
    """The environment of a worker: its threads, and its GPU where there are any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // count))
    settings = {name: os.environ.get(name, threads) for name in THREAD_VARIABLES}
    gpus = _gpus()
    return settings | ({GPU_VARIABLE: gpus[number % len(gpus)]} if gpus else {})


def _gpus() -> Sequence[str]:
    """The names of the GPUs that this process may use."""
    if (visible := os.environ.get(GPU_VARIABLE)) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]  # does not start CUDA in this process


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables for processes that are started in the block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes that are started in the block ignore Ctrl-C until they say otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
