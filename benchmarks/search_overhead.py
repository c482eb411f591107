"""What the database and the sampler add to a search: the share of its wall time that is not spent in the model.

Usage: python benchmarks/search_overhead.py --checkpoint DIR --dataset DATA [--trials 500]

Prints one JSON line. The baseline is the time that the same run spent evaluating configs in the model.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import optuna
import torch

from hpo.search_lengths import search_lengths
from hpo.workload import Workload, library_versions
from model.data import DataSpec
from studies.loader import load_lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="trained encoder, as `hpo tune` keeps it")
    parser.add_argument("--dataset", required=True, help="as for `hpo search-lengths`")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--study", default="lengths", help="study file")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    workload = Workload(model=str(arguments.checkpoint), data=DataSpec(dataset=arguments.dataset))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        search = search_lengths(
            load_lengths(arguments.study),
            workload,
            arguments.checkpoint,
            trials=arguments.trials,
            storage=f"sqlite:///{folder}/hpo.db",
            runs=Path(folder),
        )
        wall = time.perf_counter() - start
    times = search.times
    line = {
        "benchmark": "search_overhead",
        "trials": arguments.trials,
        "evaluated": search.evaluated,
        "reused": search.reused,
        "command_s": round(wall, 2),
        "search_s": round(times.total, 2),
        "model_s": round(times.model, 2),
        "storage_and_sampler_s": round(times.storage, 2),
        "storage_and_sampler_share": round(times.storage / times.total, 4),
        "ratio_to_model_time": round(times.total / times.model, 4),
        "baseline": "the same run's time in the model",
        "hardware": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": library_versions(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
