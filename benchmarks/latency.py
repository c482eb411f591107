"""How far the cost table of `hpo search-lengths --cost latency` is off, on this machine's processor.

Usage: python benchmarks/latency.py --checkpoint DIR --dataset DATA [--max-length 256] [--batches 1,8,32] [--bf16]

For each size of batch a table is fitted to a checkpoint over a dataset's search split, as a search does it, and a JSON
line printed: its errors on full length and other configs that it was not fitted to, timed whole between the rounds of
the fitting, and the time that all of it took. With `--race N`, N further configs and full length are then timed as `hpo
bench` does, in turns with pauses, some time after the fitting: `race` has the errors of what was predicted for them,
and `order`, how often of two configs the one predicted to be faster was.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpo.workload import Workload, library_versions, load_encoder, load_workload
from model.data import DataSpec
from model.hardware import processor_name
from model.latency import calibrate, lengths_of, random_configs
from model.length_config import LengthConfig
from model.packed import PackedNetwork
from model.timing import in_batches, ours, race, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--search-size", type=int, default=2000)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--race", type=int, default=0)
    arguments = parser.parse_args()
    workload = Workload(
        model=str(arguments.checkpoint),
        data=DataSpec(dataset=arguments.dataset, search_size=arguments.search_size),
        max_length=arguments.max_length,
    )
    loaded = load_workload(workload, arguments.checkpoint)
    model = load_encoder(arguments.checkpoint, loaded.corpus).eval()
    precision = "bf16" if arguments.bf16 else "fp32"
    split = sample(loaded.search)
    for size in map(int, arguments.batches.split(",")):
        table = calibrate(model, loaded.search, batch_size=size, precision=precision)
        line: dict[str, Any] = {
            "part": "latency",
            "dataset": Path(arguments.dataset).name,
            "mean_tokens": round(float(split.num_tokens.mean()), 1),
            "batch": size,
            "precision": precision,
            "median_error": round(table.median_error, 4),
            "worst_error": round(table.worst_error, 4),
            "full_length_ms": round(table.held_out[0].measured_ms, 3),
            "held_out": [[round(one.predicted_ms, 3), round(one.measured_ms, 3)] for one in table.held_out],
            "fitted_in_s": table.took_s,
        }
        if arguments.race:
            others = random_configs(model.num_layers, arguments.race, np.random.default_rng(1))
            configs = [LengthConfig.full(model.num_layers), *others]
            batches, network = in_batches(len(split), size), PackedNetwork(model, precision)
            runs = {number: ours(network, split, batches, config) for number, config in enumerate(configs)}
            measured = [1e3 * timing.median_s / len(split) for timing in race(runs, 3).values()]
            predicted = [table.ms_of(lengths_of(split.num_tokens, size), config) for config in configs]
            errors = np.abs(np.array(predicted) / measured - 1.0)
            pairs = itertools.combinations(zip(predicted, measured, strict=True), 2)
            order = np.mean([(one[0] < other[0]) == (one[1] < other[1]) for one, other in pairs])
            line["race"] = {
                "median_error": round(float(np.median(errors)), 4),
                "worst_error": round(float(errors.max()), 4),
                "order": round(float(order), 3),
                "configs": [[round(a, 3), round(b, 3)] for a, b in zip(predicted, measured, strict=True)],
            }
        line |= {"processor": processor_name(), "threads": torch.get_num_threads(), "versions": library_versions()}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
