"""Whether a study survives its workers: killed, cut off from power, racing each other to begin.

Usage: python benchmarks/survival.py [--storage URL] [--only killed|power|race] [--workers 8] [--trials 400]

The database must be empty; without one, a new SQLite file is used. Prints one JSON line for each part, and exits 1
where one did not survive. Trials are those of `hpo.rehearsal`: they cost a fixed time and no computation.
"""

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from storage import where

import hpo.samplers  # noqa: F401  # before processes are forked that need it
from hpo.rehearsal import RehearsalJob, survivors
from hpo.storage import close, display_url, open_storage
from hpo.workers import run_workers

POWER_CUTS, RACES, RACERS = 50, 50, 2


def killed(url: str, workers: int, trials: int, generator: random.Random) -> dict[str, Any]:
    """Workers killed with SIGKILL, one at random every 1 to 3 seconds or, on a slow machine, after every batch told."""
    job = RehearsalJob(storage=url, trials=trials, study="killed", workers=workers, trial_s=0.5)
    kills, ended, told = 0, threading.Event(), threading.Event()

    def kill() -> None:
        nonlocal kills
        while not ended.wait(generator.uniform(1.0, 3.0)):
            told.wait(60)
            if alive := _workers():
                told.clear()
                os.kill(generator.choice(alive), signal.SIGKILL)
                kills += 1

    killer = threading.Thread(target=kill)
    start = time.perf_counter()
    killer.start()
    try:
        run_workers(job, workers, on_progress=lambda *_: told.set())
    finally:
        ended.set()
        told.set()
        killer.join()
    facts = survivors(job)
    return {
        "part": "killed",
        "workers": workers,
        "kills": kills,
        "wall_s": round(time.perf_counter() - start, 1),
        **facts,
        "survived": _is_whole(facts, trials),
    }


def power(url: str, trials: int, generator: random.Random) -> dict[str, Any]:
    """The process tree, two workers, killed at random instants; then the study is completed."""
    job = RehearsalJob(storage=url, trials=trials, study="power", workers=2, trial_s=0.02)
    broken = 0
    for _ in range(POWER_CUTS):
        at_work, told = os.pipe()

        def run(told: int = told) -> None:
            job.run(lambda *_: os.write(told, b"."))

        pids = [_fork(run) for _ in range(2)]
        os.read(at_work, 1)
        time.sleep(generator.uniform(0.0, 0.3))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        os.close(at_work)
        os.close(told)
        broken += not _is_sound(url)
    before = survivors(job)
    job.run()
    facts = survivors(job)
    return {
        "part": "power",
        "cuts": POWER_CUTS,
        "broken_databases": broken,
        "finished_at_the_last_cut": before["finished"],
        "unfinished_at_the_last_cut": before["unfinished"],
        **facts,
        "survived": _is_whole(facts, trials) and not broken,
    }


def race(url: str) -> dict[str, Any]:
    """Processes that make the same study at the same moment, in a database that is new at first."""
    errors = 0
    names = []
    for number in range(RACES):
        job = RehearsalJob(storage=url, trials=2, study=f"race '{number}'/x")
        names.append(job.study)
        go = time.monotonic() + 0.3

        def begin(job: RehearsalJob = job, go: float = go) -> None:
            time.sleep(max(0.0, go - time.monotonic()))
            storage = open_storage(job.storage)
            job.open_study(storage)
            close(storage)

        pids = [_fork(begin) for _ in range(RACERS)]
        errors += sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    storage = open_storage(url)
    there = optuna.get_all_study_names(storage)
    close(storage)
    return {
        "part": "race",
        "races": RACES,
        "errors": errors,
        "studies": len(there),
        "survived": not errors and sorted(there) == sorted(names),
    }


def _is_whole(facts: dict[str, int], trials: int) -> bool:
    nothing = ("unfinished", "evaluated_twice", "wrong_numbers")
    return facts["finished"] == trials and not any(facts[name] for name in nothing)


def _workers() -> list[int]:
    """The workers of this process, without the helper that Python itself starts."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            try:
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
            except OSError:  # it ended just now
                continue
    return found


def _fork(work: Callable[[], object]) -> int:
    """A process that does the work and ends; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except Exception:
        logging.getLogger(__name__).exception("a process failed")
    finally:
        os._exit(code)


def _is_sound(url: str) -> bool:
    """What the database's own check says."""
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        match engine.dialect.name:
            case "sqlite":
                answers = [row[0] for row in connection.execute(sqlalchemy.text("PRAGMA integrity_check"))]
            case "postgresql":  # reads every row and index entry
                connection.execute(sqlalchemy.text("CREATE EXTENSION IF NOT EXISTS amcheck"))
                check = (
                    "SELECT bt_index_check(c.oid, true) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                    "WHERE c.relkind = 'i' AND n.nspname = 'public'"
                )
                connection.execute(sqlalchemy.text(check)).all()
                answers = ["ok"]
            case _:
                tables = ", ".join(sqlalchemy.inspect(engine).get_table_names())
                rows = connection.execute(sqlalchemy.text(f"CHECK TABLE {tables}")).all()
                answers = ["ok" if row[2] != "error" else row[3] for row in rows]
    engine.dispose()
    return set(answers) == {"ok"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", metavar="URL")
    parser.add_argument("--only", choices=("killed", "power", "race"))
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.storage or f"sqlite:///{folder}/hpo.db"
        generator = random.Random(arguments.seed)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "race": lambda: race(url),  # first, in a new database
            "power": lambda: power(url, 2 * arguments.trials, generator),
            "killed": lambda: killed(url, arguments.workers, arguments.trials, generator),
        }
        survived = True
        for name, part in parts.items():
            if arguments.only in (None, name):
                facts = part()
                survived &= facts["survived"]
                line = {"benchmark": "survival", "storage": display_url(url), **facts, **where()}
                print(json.dumps(line), flush=True)
    sys.exit(not survived)


if __name__ == "__main__":
    main()
