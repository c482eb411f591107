"""How fast length configs are scored, and how good a front each sampler finds.

Usage: python benchmarks/search.py --checkpoint DIR --dataset DATA [--parts speed,samplers,single]

Searches on the dataset's validation split, reports on training rows that the checkpoint has not seen, drawn to be as
long as those searched on, and prints JSON lines, of these parts by default all:

- `speed`: seconds per config of a whole search, everything included, against two plain loops over configs of that
  search, one example batch of 32 after the other in float32: padded to the longest of each batch, and to 128 tokens;
  each once through the dense transformers model and once through the length-adaptive one at the config itself. Also
  where the search's time went.
- `samplers`: hypervolume (quality above 0.5 against the share of full cost) after 100, 250, 500 and more trials, and of
  the final front's points as the report split scores them.
- `single`: what a config saves when it is scored alone: its speed-up over full length against its share of the
  multiplications, over texts of at least `--min-tokens` tokens cut at `--max-length`.
- `scaling`: seconds per trial that go to the sampler and the database in each stretch of 500 trials of a long study,
  whose configs a formula answers at once.
- `rounding`: how far each precision moves the metric of full length and of 50 random configs from float32, in points.
- `memory`: peak resident memory of 50 configs over as many and as long examples as SQuAD 1.1's validation split has.
"""

import argparse
import dataclasses
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from hpo.front import hypervolume
from hpo.search_lengths import LengthSearch, config_of, search_loaded
from hpo.storage import finished_trials, open_storage
from hpo.workload import LoadedWorkload, Workload, library_versions, load_encoder, load_workload
from model.data import DataSpec, load_corpus
from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.evaluate import Evaluator, choose_precision, predict
from model.hardware import gains_from_bf16, processor_name
from model.length_config import LengthConfig
from model.macs import EncoderShape, layer_macs, mean_macs
from model.precision import Precision
from studies.loader import SAMPLERS, LengthsStudy, Range, load_lengths

BATCH = 32
MARKS = (100, 250, 500, 1000, 1822)
LAT_TRIALS = 1822  # 22 to begin with and 30 rounds of 60, as published
LAT_RETENTION = Range(low=0.02, high=1.0)  # continuous, as published
SINGLE_REPEATS = 7
STRETCH = 500
FEW = 8
REPORTED_PER_SEARCHED = 2
NEVER = 1e9  # standard errors by which a config must trail to be stopped
ENGINE_BYTES = 4 * 2**30
SQUAD_EXAMPLES, SQUAD_MEAN_TOKENS, SQUAD_MOST_TOKENS = 10_570, 170, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="trained encoder, as `hpo tune` keeps it")
    parser.add_argument("--dataset", required=True, help="as for `hpo search-lengths`")
    parser.add_argument("--parts", default="speed,samplers,single,scaling,memory,rounding")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--long-trials", type=int, default=5000, help="of `scaling`")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="that the checkpoint was tuned with")
    parser.add_argument("--train-limit", type=int, help="that the checkpoint was tuned with")
    parser.add_argument("--min-tokens", type=int, default=1, help="shorter texts are left out of `single`")
    parser.add_argument("--examples", type=int, default=872, help="texts that `single` takes at most")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = DataSpec(dataset=arguments.dataset, seed=arguments.seed)
    workload = Workload(model=str(arguments.checkpoint), data=spec, max_length=arguments.max_length)
    loaded = load_workload(workload, arguments.checkpoint)
    limited = load_corpus(dataclasses.replace(spec, train_limit=arguments.train_limit))
    unseen = rows_not_in(loaded.corpus.train, limited.train) if arguments.train_limit else np.empty(0, dtype=np.int64)
    held_out = loaded.train.take(unseen) if len(unseen) else loaded.search
    loaded = dataclasses.replace(loaded, search=loaded.report, report=of_like_lengths(held_out, loaded.report))
    for part in arguments.parts.split(","):
        for line in PARTS[part](loaded, arguments):
            print(json.dumps({"benchmark": f"search/{part}", **line, **where()}), flush=True)


def rows_not_in(rows: datasets.Dataset, others: datasets.Dataset) -> NDArray[np.int64]:
    """The numbers of the rows whose texts stand in none of the others."""
    texts = [name for name in rows.column_names if name != "label"]
    taken = set(zip(*(others[name] for name in texts), strict=True))
    return np.flatnonzero([row not in taken for row in zip(*(rows[name] for name in texts), strict=True)])


def of_like_lengths(split: EncodedSplit, model_of: EncodedSplit) -> EncodedSplit:
    """Two examples of `split` for each of the other split, of the same number of tokens or as near as there are."""
    free = np.random.default_rng(0).permutation(len(split))
    free = free[np.argsort(split.num_tokens[free], kind="stable")].tolist()
    drawn = []
    for wanted in sorted(model_of.num_tokens.tolist() * REPORTED_PER_SEARCHED, reverse=True):
        if not free:
            break
        place = int(np.searchsorted(split.num_tokens[free], wanted))
        drawn.append(free.pop(min(place, len(free) - 1)))
    return split.take(sorted(drawn))


def speed(loaded: LoadedWorkload, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One search, and the plain loops over a few of its configs."""
    start = time.perf_counter()
    search, trials = run_search(load_lengths("lengths"), loaded, arguments.checkpoint, arguments.trials, seed=0)
    all_in_s = (time.perf_counter() - start) / arguments.trials
    times = search.times
    yield {
        "sampler": "surrogate",
        "trials": arguments.trials,
        "s_per_trial": round(all_in_s, 4),
        "s_per_trial_in_generations": round(times.total / arguments.trials, 4),
        "outside_model_share": round(times.storage / times.total, 4),
        "evaluated": search.evaluated,
        "stopped": search.stopped,
        "reused": search.reused,
        "precision": search.study.user_attrs["precision"],
        "peak_memory_gib": peak_memory_gib(),
    }
    model = load_encoder(arguments.checkpoint, loaded.corpus).eval()
    configs = [config_of(trial.params) for trial in trials[:: len(trials) // 4]][:4]
    for padded_to in (None, 128):
        dense_s = plain_loop(model, loaded.search, None, padded_to)
        adaptive_s = float(np.mean([plain_loop(model, loaded.search, config, padded_to) for config in configs]))
        yield {
            "baseline": "plain loop, float32, batches of 32",
            "padded_to": padded_to or "the longest of each batch",
            "dense_transformers_s": round(dense_s, 3),
            "length_adaptive_s": round(adaptive_s, 3),
            "dense_over_ours": round(dense_s / all_in_s, 1),
            "dense_over_ours_in_generations": round(dense_s * arguments.trials / times.total, 1),
            "length_adaptive_over_ours": round(adaptive_s / all_in_s, 1),
        }


def plain_loop(
    model: LengthAdaptiveModel, split: EncodedSplit, config: LengthConfig | None, padded_to: int | None
) -> float:
    """Seconds to score one config batch by batch with padding; without a config the dense transformers model runs."""
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(split.labels), BATCH):
            rows = range(first, min(first + BATCH, len(split.labels)))
            longest = padded_to or max(len(split.input_ids[row]) for row in rows)
            ids, types, mask = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(3))
            for place, row in enumerate(rows):
                tokens = split.input_ids[row][:longest]
                ids[place, : len(tokens)] = torch.tensor(tokens)
                types[place, : len(tokens)] = torch.tensor(split.token_type_ids[row][:longest])
                mask[place, : len(tokens)] = 1
            if config is None:
                model.network(input_ids=ids, token_type_ids=types, attention_mask=mask)
            else:
                model(ids, mask, types, length_config=config)
    return time.perf_counter() - start


def samplers(loaded: LoadedWorkload, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The hypervolume that each sampler reaches, a line per sampler and seed.

    All share one engine, so that what one sampler asked costs the next nothing; this decides how long the benchmark
    takes and none of its figures.
    """
    model = load_encoder(arguments.checkpoint, loaded.corpus)
    precision = choose_precision(model, loaded.search, loaded.metric)
    blocks = load_lengths("lengths").blocks
    engine = Evaluator(model, loaded.search, precision=precision, num_blocks=blocks, cache_bytes=ENGINE_BYTES)
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.samplers.split(","):
            trials = max(arguments.trials, LAT_TRIALS) if name == "lat" else arguments.trials
            start = time.perf_counter()
            search, finished = run_search(study_of(name), loaded, arguments.checkpoint, trials, seed, engine)
            attrs = search.study.user_attrs
            front = sorted(search.study.best_trials, key=lambda trial: trial.values[1])
            points = [(trial.values[1] / attrs["full_macs"], trial.values[0]) for trial in front]
            reported = [
                (
                    attrs[f"report_macs:{trial.number}"] / attrs["report_full_macs"],
                    attrs[f"report_metric:{trial.number}"],
                )
                for trial in front
            ]
            yield {
                "sampler": name,
                "seed": seed,
                "hypervolume": {
                    mark: round(above_half(_points_of(finished[:mark], attrs["full_macs"])), 5)
                    for mark in MARKS
                    if mark <= trials
                },
                "hypervolume_on_report": round(above_half(reported), 5),
                "retentions": [list(trial.params.values()) for trial in front],
                "front": [(round(cost, 5), round(quality, 5)) for cost, quality in points],
                "front_on_report": [(round(cost, 5), round(quality, 5)) for cost, quality in reported],
                "precision": precision,
                "evaluated": search.evaluated,
                "stopped": search.stopped,
                "s": round(time.perf_counter() - start, 1),
            }


def study_of(sampler: str) -> LengthsStudy:
    """The study each sampler runs: ours as it comes; the others never stop early, on the same grid, `lat` as published.

    They are asked in generations that suit them: 50 for NSGA-II (Optuna's own default), 60 for `lat` (the paper's 30
    mutations and 30 crossovers), 25 for TPE.
    """
    ours = load_lengths("lengths")
    if sampler == ours.sampler:
        return ours
    sizes = {"nsga2": 50, "lat": 60, "tpe": 25, "random": 50}
    retention = LAT_RETENTION if sampler == "lat" else ours.retention
    return dataclasses.replace(
        ours, sampler=sampler, retention=retention, population_size=sizes[sampler], confidence=NEVER
    )


def _points_of(trials: Sequence[FrozenTrial], full_macs: float) -> list[tuple[float, float]]:
    """Share of full cost and quality of those trials that were scored."""
    scored = [trial.values for trial in trials if trial.state == TrialState.COMPLETE]
    return [(macs / full_macs, quality) for quality, macs in scored]


def above_half(points: Sequence[tuple[float, float]]) -> float:
    """Hypervolume of quality above 0.5 against the share of full cost."""
    return hypervolume([cost for cost, _ in points], [max(quality - 0.5, 0.0) for _, quality in points])


def single(loaded: LoadedWorkload, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One config alone against full length, in turns, each the median of its repeats.

    `realised` divides by the fall of the model's MACs, which count the last layer whole; `realised_of_run` by the fall
    of those that the engine runs, which computes the last layer for the first token alone, at full length too.
    """
    model = load_encoder(arguments.checkpoint, loaded.corpus)
    chosen = np.flatnonzero(loaded.search.num_tokens >= arguments.min_tokens)[: arguments.examples]
    split = loaded.search.take(chosen)
    precision = choose_precision(model, split, loaded.metric)
    engine = Evaluator(model, split, precision=precision, cache_bytes=0)
    timed = {"full": LengthConfig.full(model.num_layers)}
    for rate in (0.98, 0.95, 0.9, 0.8, 0.7, 0.5):
        timed[f"retention {rate:g}"] = LengthConfig.from_retention([rate] * model.num_layers)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(1 + SINGLE_REPEATS):
        for name, config in timed.items():
            start = time.perf_counter()
            engine.predict([config])
            times[name].append(time.perf_counter() - start)
    seconds = {name: float(np.median(measured[1:])) for name, measured in times.items()}
    full_macs = mean_macs(model.shape, split.num_tokens)
    full_run = macs_run(model.shape, split.num_tokens, timed["full"])
    for name, config in timed.items():
        macs, run = mean_macs(model.shape, split.num_tokens, config), macs_run(model.shape, split.num_tokens, config)
        less_time = seconds["full"] / seconds[name]
        yield {
            "config": name,
            "examples": len(chosen),
            "mean_tokens": round(float(split.num_tokens.mean()), 1),
            "precision": precision,
            "s": round(seconds[name], 4),
            "fewer_macs": round(full_macs / macs, 3),
            "fewer_macs_run": round(full_run / run, 3),
            "less_time": round(less_time, 3),
            "realised": round(less_time * macs / full_macs, 3),
            "realised_of_run": round(less_time * run / full_run, 3),
        }


def macs_run(shape: EncoderShape, num_tokens_N: NDArray[np.int64], config: LengthConfig) -> float:
    """Mean MACs without what the last layer would do for tokens that the head does not read."""
    d, f = shape.hidden_size, shape.feed_forward_size
    kept_NL = config.count_table(num_tokens_N)
    n, m = kept_NL[:, -2], kept_NL[:, -1]
    whole = layer_macs(shape, n, m)
    first_alone = 2 * n * d * d + 2 * d * d + 2 * n * d + 2 * d * f + 2 * d
    return mean_macs(shape, num_tokens_N, config) - float((whole - first_alone).mean())


class Instant(Evaluator):
    """An engine that answers at once: the fewer tokens, the more examples are wrong, the same ones for like configs."""

    def predict_block(
        self, number: int, configs: Sequence[LengthConfig], *, on_progress: Callable[[float], None] | None = None
    ) -> NDArray[np.int64]:
        if on_progress is not None:
            on_progress(1.0)
        block = self.blocks[number]
        difficulty_M = np.random.default_rng(0).random(len(self.split.labels))[block]
        kept_C = np.array([np.mean(config.shares or ()) for config in configs])
        right_CM = difficulty_M < 0.5 + 0.4 * (1 - np.exp(-4 * kept_C))[:, None]
        labels_M = self.split.labels[block]
        return np.where(right_CM, labels_M, labels_M + 1)


def scaling(loaded: LoadedWorkload, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How the time outside the model grows with the study."""
    model = load_encoder(arguments.checkpoint, loaded.corpus)
    definition = load_lengths("lengths")
    loaded = dataclasses.replace(loaded, report=loaded.report.take(range(FEW)))  # the front is scored there
    engine = Instant(model, loaded.search, num_blocks=definition.blocks, cache_bytes=0)
    reached: list[tuple[int, float]] = []

    def note(done: float, trials: int, remark: str) -> None:
        if done >= len(reached) * STRETCH:
            reached.append((int(done), time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(f"sqlite:///{folder}/hpo.db")
        trials = arguments.long_trials
        search_loaded(definition, loaded, arguments.checkpoint, trials, storage, Path(folder), 0, note, engine)
    if reached[-1][0] < trials:
        reached.append((trials, time.perf_counter()))
    for (first, start), (last, end) in itertools.pairwise(reached):
        yield {"trials": [first, last], "s_per_trial": round((end - start) / (last - first), 4)}


def memory(loaded: LoadedWorkload, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """50 configs over random token ids of SQuAD's lengths."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(8.0, SQUAD_MEAN_TOKENS / 8, SQUAD_EXAMPLES), 20, SQUAD_MOST_TOKENS).astype(int)
    split = EncodedSplit(
        input_ids=[generator.integers(1000, 2000, count).tolist() for count in lengths],
        token_type_ids=[[0] * count for count in lengths],
        labels=np.zeros(SQUAD_EXAMPLES, dtype=np.int64),
        num_truncated=0,
    )
    model = load_encoder(arguments.checkpoint, loaded.corpus)
    configs = [
        LengthConfig.from_retention(generator.choice(np.arange(10, 21) / 20, model.num_layers).tolist())
        for _ in range(50)
    ]
    before, start = peak_memory_gib(), time.perf_counter()
    Evaluator(model, split, precision="bf16" if gains_from_bf16() else "fp32").predict(configs)
    yield {
        "examples": SQUAD_EXAMPLES,
        "tokens": int(lengths.sum()),
        "configs": len(configs),
        "s_per_config": round((time.perf_counter() - start) / len(configs), 2),
        "peak_memory_before_gib": before,
        "peak_memory_gib": peak_memory_gib(),
    }


def rounding(loaded: LoadedWorkload, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same configs in each precision, quickest last."""
    model = load_encoder(arguments.checkpoint, loaded.corpus)
    generator = np.random.default_rng(0)
    configs = [LengthConfig.full(model.num_layers)]
    configs += [
        LengthConfig.from_retention(generator.choice(np.arange(3, 11) / 10, model.num_layers).tolist())
        for _ in range(50)
    ]
    exact_CX = predict(model, loaded.search, configs)
    exact_C = np.array([loaded.search.quality(loaded.metric, answers_X) for answers_X in exact_CX])
    for precision in get_args(Precision):
        start = time.perf_counter()
        answers_CX = predict(model, loaded.search, configs, precision=precision)
        seconds = time.perf_counter() - start
        points_C = 100 * np.array([loaded.search.quality(loaded.metric, answers_X) for answers_X in answers_CX])
        moved_C = np.abs(points_C - 100 * exact_C)
        yield {
            "precision": precision,
            "examples": len(loaded.search),
            "configs": len(configs),
            "s_per_config": round(seconds / len(configs), 3),
            "full_length_moved": round(float(moved_C[0]), 3),
            "mean_moved": round(float(moved_C.mean()), 3),
            "most_moved": round(float(moved_C.max()), 3),
            "moved_over_0.2": int((moved_C > 0.2).sum()),
            "answers_changed": round(float((answers_CX != exact_CX).mean()), 5),
        }


def run_search(
    definition: LengthsStudy,
    loaded: LoadedWorkload,
    checkpoint: Path,
    trials: int,
    seed: int,
    engine: Evaluator | None = None,
) -> tuple[LengthSearch, list[FrozenTrial]]:
    """A search in a database of its own, and its finished trials."""
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(f"sqlite:///{folder}/hpo.db")
        search = search_loaded(definition, loaded, checkpoint, trials, storage, Path(folder), seed, evaluator=engine)
        finished = finished_trials(search.study)
        in_memory = optuna.create_study(directions=search.study.directions)
        in_memory.add_trials(finished)
        for key, value in search.study.user_attrs.items():
            in_memory.set_user_attr(key, value)
        return dataclasses.replace(search, study=in_memory), finished


def peak_memory_gib() -> float:
    """Most memory that this process has had."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def where() -> dict[str, Any]:
    """The hardware and the versions."""
    amx = torch.cpu._is_amx_tile_supported()
    hardware = {"processor": processor_name(), "threads": torch.get_num_threads(), "amx": amx}
    return {"hardware": hardware, "versions": library_versions()}


PARTS = {
    "speed": speed,
    "samplers": samplers,
    "single": single,
    "scaling": scaling,
    "memory": memory,
    "rounding": rounding,
}

if __name__ == "__main__":
    main()
