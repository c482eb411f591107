"""How many trials a second workers get through a database, and what asking and telling one costs.

Usage: python benchmarks/storage.py [--parts throughput,cost] [--databases sqlite,postgresql,mariadb,grpc]

Prints JSON lines. The objective costs nothing, so that all time is the database's, the sampler's and ours:

- `throughput`: trials per second of 1, 4, 16 and 64 worker processes that complete one study, each asking for a trial
  at a time, as `hpo tune --workers` does; for `grpc`, through `hpo storage serve` in front of PostgreSQL, with
  the ratio to the direct connections of the same run. Runs of one worker count are made in turn, `--repeats` times.
- `cost`: milliseconds for asking and telling a trial of 12 parameters in a study of 100, 500, 1,000 and 10,000 trials,
  median of `--measured` trials, against `ask`, `suggest_float` and `tell` of Optuna on a database of the same kind.

Servers are given by URLs of databases that may be connected to; each run makes one of its own there and drops it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.samplers import NSGAIISampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.bulk import Outcome, enter_trials, finish_trials
from hpo.heartbeats import Heartbeats
from hpo.mirror import AskedTrial, MirroredStudy, Told
from hpo.sharing import complete_study
from hpo.storage import Storage, close, open_storage

SPACE = {f"retention_{layer}": FloatDistribution(0.3, 1.0, step=0.05) for layer in range(12)}
DIRECTIONS = ("maximize", "minimize")
FILLED_TOGETHER = 500
STUDY = "benchmark"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="throughput,cost")
    parser.add_argument("--databases", default="sqlite,postgresql,mariadb,grpc")
    parser.add_argument("--postgresql", default="postgresql+psycopg://postgres@127.0.0.1:5432/test")
    parser.add_argument("--mariadb", default="mysql+pymysql://root@127.0.0.1:3306/test")
    parser.add_argument("--workers", default="1,4,16,64")
    parser.add_argument("--trials", type=int, default=1000, help="of a study of `throughput`")
    parser.add_argument("--repeats", type=int, default=3, help="of each run of `throughput`; the median is told")
    parser.add_argument("--sizes", default="100,500,1000,10000")
    parser.add_argument("--measured", type=int, default=50, help="trials that `cost` measures")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for part in arguments.parts.split(","):
        for line in PARTS[part](arguments):
            print(json.dumps({"benchmark": f"storage/{part}", **line, **where()}), flush=True)


def throughput(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trials per second of several workers."""
    names = arguments.databases.split(",")
    for workers in map(int, arguments.workers.split(",")):
        rates: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(arguments.repeats):
            for name in names:
                with database(name, arguments) as url:
                    rates[name].append(arguments.trials / seconds_of(url, workers, arguments.trials))
        for name in names:
            rate = statistics.median(rates[name])
            line = {"database": name, "workers": workers, "trials": arguments.trials, "trials_per_s": round(rate, 1)}
            spread = [round(one, 1) for one in sorted(rates[name])]
            if name == "grpc" and "postgresql" in names:
                direct = statistics.median(rates["postgresql"])
                line |= {"ratio": round(rate / direct, 3), "baseline": "direct connections to PostgreSQL"}
            yield {**line, "all_trials_per_s": spread}


def seconds_of(url: str, workers: int, trials: int) -> float:
    """Wall time in which several processes complete a study, without starting and connecting."""
    storage = open_storage(url)
    optuna.create_study(storage=storage, study_name=STUDY, directions=DIRECTIONS)
    close(storage)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpo.sharing", "optuna.storages._grpc.servicer"])
    barrier = context.Barrier(workers + 1)
    processes = [context.Process(target=work, args=(url, trials, seed, barrier)) for seed in range(workers)]
    for process in processes:
        process.start()
    barrier.wait(600)
    start = time.perf_counter()
    barrier.wait(3600)
    wall = time.perf_counter() - start
    for process in processes:
        process.join()
        assert process.exitcode == 0
    check(url, trials)
    return wall


def check(url: str, trials: int) -> None:
    """A figure counts only if the study is what it should be."""
    storage = open_storage(url)
    states = [trial.state for trial in optuna.load_study(study_name=STUDY, storage=storage).get_trials(deepcopy=False)]
    close(storage)
    assert states == [TrialState.COMPLETE] * trials, f"{len(states)} trials, not {trials} finished ones"


def work(url: str, trials: int, seed: int, barrier: Barrier) -> None:
    """One worker."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = open_storage(url, timeout_s=60)
        study = optuna.load_study(study_name=STUDY, storage=storage)
        with Heartbeats(storage) as heartbeats:
            mirror = MirroredStudy(study, storage, RandomSampler(seed=seed), SPACE, heartbeats=heartbeats)
            barrier.wait(600)
            complete_study(mirror, Idle(), trials)
            barrier.wait(3600)
        close(storage)
    except BaseException:
        barrier.abort()  # the others and the main process would wait for this one
        raise


class Idle:
    """A plan whose trials cost nothing."""

    def learn(self, trials: Sequence[FrozenTrial]) -> None:
        """Nothing to learn."""

    def first(self) -> list[Mapping[str, Any]]:
        """No parameters in particular."""
        return []

    def part(self, done: int) -> int:
        """One at a time."""
        return 1

    def attributes_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """As many as a trial of `search-lengths` has."""
        return {"shares": list(params.values())}

    def key_of(self, params: Mapping[str, Any]) -> str | None:
        """Every trial is one of its own."""
        return None

    def evaluate(self, asked: Sequence[AskedTrial]) -> list[Told]:
        """Two formulas."""
        return [told(trial) for trial in asked]

    def passes(self, error: Exception) -> bool:
        """Nothing fails."""
        return False

    def resumes(self, error: BaseException) -> bool:
        """Nothing is kept."""
        return False


def told(trial: AskedTrial) -> Told:
    """A trial's end."""
    return Told(trial=trial, values=values_of(trial.params), attributes={"metrics": {"accuracy": 0.5}})


def values_of(params: Mapping[str, Any]) -> tuple[float, float]:
    """Two objectives that pull against each other."""
    total = sum(params.values())
    return total - sum(value**2 for value in params.values()), total


def cost(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds per trial against the size of the study."""
    for name in arguments.databases.split(","):
        for size in map(int, arguments.sizes.split(",")):
            with database(name, arguments) as url:
                ours_ms = ours(url, size, arguments.measured)
            with database("postgresql" if name == "grpc" else name, arguments) as url:
                optunas_ms = optunas(url, size, arguments.measured)
            yield {
                "database": name,
                "study_trials": size,
                "parameters": len(SPACE),
                "ask_and_tell_ms": round(ours_ms, 2),
                "optuna_ms": round(optunas_ms, 2),
                "ratio": round(ours_ms / optunas_ms, 3),
                "baseline": "optuna's ask, suggest_float and tell" + (" without a proxy" if name == "grpc" else ""),
            }


def ours(url: str, size: int, measured: int) -> float:
    """Milliseconds that a worker takes to ask for a trial and tell it."""
    storage = open_storage(url, timeout_s=60)
    study = filled(storage, size)
    with Heartbeats(storage) as heartbeats:
        mirror = MirroredStudy(study, storage, sampler(), SPACE, heartbeats=heartbeats)
        times = []
        for _ in range(measured):
            start = time.perf_counter()
            mirror.sync()
            mirror.take_news()
            mirror.tell([told(trial) for trial in mirror.ask(1, Idle().attributes_of)], asks=True)
            times.append(time.perf_counter() - start)
        mirror.settle()
    close(storage)
    return 1000 * statistics.median(times)


def optunas(url: str, size: int, measured: int) -> float:
    """The same with Optuna alone."""
    storage = open_storage(url)
    filled(storage, size)
    close(storage)
    study = optuna.load_study(study_name=STUDY, storage=url, sampler=sampler())
    times = []
    for _ in range(measured):
        start = time.perf_counter()
        trial = study.ask()
        params = {name: trial.suggest_float(name, 0.3, 1.0, step=0.05) for name in SPACE}
        trial.set_user_attr("shares", list(params.values()))
        trial.set_user_attr("metrics", {"accuracy": 0.5})
        study.tell(trial, values_of(params))
        times.append(time.perf_counter() - start)
    study._storage._backend.engine.dispose()
    return 1000 * statistics.median(times)


def sampler() -> NSGAIISampler:
    """What both draw from."""
    return NSGAIISampler(population_size=50, seed=0)


def filled(storage: Storage, size: int) -> optuna.Study:
    """A study that has so many finished trials, in generations as its sampler would have made them."""
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=DIRECTIONS)
    draws = np.random.default_rng(1)
    for start in range(0, size, FILLED_TOGETHER):
        trials = []
        for number in range(start, min(start + FILLED_TOGETHER, size)):
            params = {
                name: round(0.3 + 0.05 * int(step), 2)
                for name, step in zip(SPACE, draws.integers(15, size=12), strict=True)
            }
            trials.append(
                create_trial(
                    state=TrialState.RUNNING,
                    params=params,
                    distributions=SPACE,
                    user_attrs={"shares": list(params.values())},
                    system_attrs={"NSGAIISampler:generation": number // 50},
                )
            )
        entered = [place for place in enter_trials(storage, study._study_id, trials) if place is not None]
        outcomes = [
            Outcome(trial_id=trial_id, state=TrialState.COMPLETE, values=values_of(trial.params))
            for (_, trial_id), trial in zip(entered, trials, strict=True)
        ]
        finish_trials(storage, outcomes)
    return study


@contextmanager
def database(name: str, arguments: argparse.Namespace) -> Iterator[str]:
    """The URL of a new database of a kind, or of a server in front of one."""
    if name == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{folder}/hpo.db"
        return
    if name == "grpc":
        with database("postgresql", arguments) as url, proxy(url) as address:
            yield address
        return
    existing = sqlalchemy.make_url(getattr(arguments, name))
    engine = sqlalchemy.create_engine(existing, isolation_level="AUTOCOMMIT")
    own = f"hpo_benchmark_{uuid.uuid4().hex}"
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {own}"))
    try:
        yield existing.set(database=own).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f"DROP DATABASE {own}"))
        engine.dispose()


@contextmanager
def proxy(url: str) -> Iterator[str]:
    """A server of `hpo storage serve`."""
    command = [sys.executable, "-m", "hpo.cli", "storage", "serve", "--port", "0"]
    environment = {**os.environ, "HPO_STORAGE": url}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        yield next(word for word in line.split() if word.startswith("grpc://"))
    finally:
        process.terminate()
        process.communicate()


def where() -> dict[str, Any]:
    """The hardware and the libraries that a figure belongs to."""
    processor = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {
        "hardware": {"processor": processor, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
        "versions": {"optuna": optuna.__version__, "sqlalchemy": sqlalchemy.__version__},
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


PARTS = {"throughput": throughput, "cost": cost}

if __name__ == "__main__":
    main()
