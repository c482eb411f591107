"""Whether a study survives its database: a server that is away for a while, connections that are cut.

Usage: python benchmarks/outage.py --storage URL --stop COMMAND --start COMMAND [--away 30] [--cut 60]

The database must be empty, and its server stop and start by the shell commands that are given. Prints one JSON line for
each part, and exits 1 where one did not survive. Trials are those of `hpo.rehearsal`, half a second each.

- `away`: the server is stopped in mid-run for so many seconds.
- `cut`: every second, for so many seconds, all connections to the database are cut.
"""

import argparse
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import optuna

from hpo.rehearsal import RehearsalJob, cut_connections, survivors
from hpo.storage import display_url
from hpo.workers import run_workers

TRIAL_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", metavar="URL", required=True)
    parser.add_argument("--stop", required=True, help="shell command that stops the server")
    parser.add_argument("--start", required=True, help="shell command that starts it, and returns once it answers")
    parser.add_argument("--away", type=float, default=30.0, help="seconds that the server is away")
    parser.add_argument("--cut", type=float, default=60.0, help="seconds in which connections are cut")
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.basicConfig(format="%(message)s")
    lines = [away(arguments), cut(arguments)]
    for line in lines:
        print(json.dumps({"benchmark": f"outage/{line['part']}", "storage": display_url(arguments.storage), **line}))
    sys.exit(0 if all(line["survived"] for line in lines) else 1)


def away(arguments: argparse.Namespace) -> dict[str, Any]:
    """The server stopped in mid-run."""

    def disturb(_ended: threading.Event) -> dict[str, Any]:
        start = time.perf_counter()
        subprocess.run(arguments.stop, shell=True, check=True, stdout=subprocess.DEVNULL)
        time.sleep(arguments.away)
        subprocess.run(arguments.start, shell=True, check=True, stdout=subprocess.DEVNULL)
        return {"away_s": round(time.perf_counter() - start, 1)}

    return disturbed("away", arguments, 20.0, disturb)


def cut(arguments: argparse.Namespace) -> dict[str, Any]:
    """All connections cut every second."""

    def disturb(ended: threading.Event) -> dict[str, Any]:
        start, rounds, cuts = time.perf_counter(), 0, 0
        while time.perf_counter() - start < arguments.cut and not ended.wait(1.0):
            cuts += cut_connections(arguments.storage)
            rounds += 1
        return {"rounds": rounds, "cuts": cuts, "cut_for_s": round(time.perf_counter() - start, 1)}

    return disturbed("cut", arguments, arguments.cut + 15.0, disturb)


def disturbed(
    part: str, arguments: argparse.Namespace, least_s: float, disturb: Callable[[threading.Event], dict[str, Any]]
) -> dict[str, Any]:
    """A study that takes so many seconds at least, disturbed once its first trials are finished."""
    trials = int(least_s / TRIAL_S) * arguments.workers
    job = RehearsalJob(
        storage=arguments.storage,
        trials=trials,
        study=part,
        workers=arguments.workers,
        trial_s=TRIAL_S,
        storage_timeout_s=600.0,
    )
    facts: dict[str, Any] = {}
    begun, ended = threading.Event(), threading.Event()

    def on_progress(done: float, _total: int, _remark: str) -> None:
        if done >= arguments.workers:
            begun.set()

    def disturbing() -> None:
        begun.wait()
        facts.update(disturb(ended))

    thread = threading.Thread(target=disturbing)
    thread.start()
    start, error = time.perf_counter(), ""
    try:
        run_workers(job, arguments.workers, on_progress=on_progress)
    except Exception as raised:
        error = str(raised)
    finally:
        ended.set()
        begun.set()
        thread.join()
    left = survivors(job)
    nothing = ("unfinished", "evaluated_twice", "wrong_numbers")
    return {
        "part": part,
        "workers": arguments.workers,
        "trials": trials,
        "wall_s": round(time.perf_counter() - start, 1),
        **facts,
        **left,
        "error": error,
        "survived": not error and left["finished"] == trials and not any(left[name] for name in nothing),
    }


if __name__ == "__main__":
    main()
