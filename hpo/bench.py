"""`hpo bench`: what the points of a front take in time on this machine, beside what else one would run.

Times are measured on the search split's own sequences, in the batches that one asks for, and kept with the study as
one record for each machine, number of threads, precision, size of batch and number of sequences: figures of different
ones are never mixed.
"""

import hashlib
import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from hpo.errors import HpoError
from hpo.export import checkpoint_of, served_point
from hpo.front import BASELINE, LATENCY, Front, FrontPoint, compute_front, ms_text
from hpo.storage import IDENTITY
from hpo.workload import ProgressHook, Workload, library_versions, load_encoder, load_workload
from model.apart import EngineDied, Run
from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.hardware import computes_in_bf16, processor_name
from model.macs import mean_macs
from model.packed import PackedNetwork
from model.precision import Precision
from model.timing import BASELINES, SEQUENCES, Batches, CannotRun, Timing, baseline, in_batches, ours, race, sample

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 8, 32)
POINTS, ROUNDS = 10, 5
TITLES = {
    "eager": "transformers, eager",
    "sdpa": "transformers, SDPA",
    "compile": "transformers, torch.compile",
    "onnx-fp32": "ONNX Runtime, fp32",
    "onnx-int8": "ONNX Runtime, int8",
}
"""What the baselines are called where people look; all at full length, padded to the longest of each batch."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One engine's time per sequence, in milliseconds.

    Attributes:
        engine: "ours", or one of `model.timing.BASELINES`.
        trial: Whose length config ran; None for full length.
        ms: Median of the rounds.
        least_ms: Of all rounds.
        most_ms: Of all rounds.
        relative_macs: MACs of the sequences that were timed, as a share of full length without padding.
    """

    engine: str
    trial: int | None
    ms: float
    least_ms: float
    most_ms: float
    relative_macs: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured on one machine with one size of batch.

    Attributes:
        processor: Its name.
        threads: That computed.
        precision: Of our engine's products.
        batch_size: Sequences that were run together.
        sequences: How many were timed.
        mean_tokens: Of them.
        rounds: That were timed.
        measured_at: Local time, ISO 8601.
        full: Our engine at full length, with which all is compared.
        points: Our engine at points of the front, by rising cost.
        baselines: The others.
        left_out: Baselines that do not work here, each with the reason.
        versions: Of the libraries.
    """

    processor: str
    threads: int
    precision: Precision
    batch_size: int
    sequences: int
    mean_tokens: float
    rounds: int
    measured_at: str
    full: Measured
    points: tuple[Measured, ...]
    baselines: tuple[Measured, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The study attribute that holds it."""
        return record_key(self.processor, self.threads, self.precision, self.batch_size, self.sequences)

    def realised(self, point: Measured) -> float:
        """The share of the MACs saved that became time saved: speed-up over full length by the fall of the MACs."""
        return self.full.ms / point.ms * point.relative_macs


def record_key(processor: str, threads: int, precision: Precision, batch_size: int, sequences: int) -> str:
    """The study attribute that holds what was measured so."""
    place = f"{processor}|{threads}|{precision}|{batch_size}|{sequences}"
    return f"{LATENCY}{hashlib.sha256(place.encode()).hexdigest()[:12]}"


def bench(
    study: optuna.Study,
    storage: str,
    runs: Path,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    sequences: int = SEQUENCES,
    points: int | None = None,
    rounds: int = ROUNDS,
    baselines: Sequence[str] = BASELINES,
    precision: Precision = "fp32",
    on_progress: ProgressHook | None = None,
) -> list[Record]:
    """Time points of a lengths study's front on this machine's processor, and keep the times with the study.

    Each baseline has a process of its own, which imports the script that calls this, as `multiprocessing` does.

    Args:
        study: What `hpo search-lengths` made.
        storage: URL of its database.
        runs: Folder of the checkpoints.
        batch_sizes: Sequences to run together; a record is made for each size.
        sequences: Of the search split, drawn by a fixed seed, as they come.
        points: Points of the front to time at most, evenly chosen, its ends among them; None for `POINTS`, or for all
            that an earlier measurement holds which this one takes the place of, where those are more.
        rounds: Least number of rounds; all take turns in each.
        baselines: Of `model.timing.BASELINES`; what does not work here is left out, with the reason in the record.
        precision: "bf16" rounds the factors of our engine's large products.
        on_progress: Told how much is done, of how much, and what is being timed.
    Raises:
        HpoError: The study has no front, or its checkpoint is gone or another one.
        ValueError: A number is below 1, or a baseline is unknown.
    """
    _check(batch_sizes=batch_sizes, sequences=[sequences], points=[1 if points is None else points], rounds=[rounds])
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise ValueError(f"baseline {unknown[0]!r} is unknown; choose among {', '.join(BASELINES)}.")
    if precision == "bf16" and not computes_in_bf16():
        raise HpoError("This processor has no bf16 products; leave --bf16 out.")
    if on_progress is not None:
        on_progress(0, len(batch_sizes), "loading the model and its sequences")
    front = compute_front(study, storage)
    checkpoint = checkpoint_of(study, runs)
    loaded = load_workload(Workload.from_attribute(front.workload), checkpoint)
    model = load_encoder(checkpoint, loaded.corpus).eval().to("cpu")
    if model.fingerprint() != study.user_attrs.get(IDENTITY, {}).get("model"):
        raise HpoError(f"The model in {checkpoint} is not the one that study {front.study!r} searched; restore it.")
    return time_points(
        study,
        front,
        model,
        sample(loaded.search, sequences),
        batch_sizes=batch_sizes,
        points=points,
        rounds=rounds,
        precision=precision,
        make=lambda name, split, folder: baseline(
            name, checkpoint, model, split, loaded.tokenizer.pad_token_id or 0, folder
        ),
        baselines=baselines,
        on_progress=on_progress,
    )


Baseline = AbstractContextManager[Callable[[Batches], Run]]


def no_baseline(name: str, split: EncodedSplit, folder: Path) -> Baseline:
    """Makes none."""
    raise CannotRun(f"{name} is not made here")


def time_points(
    study: optuna.Study,
    front: Front,
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    *,
    batch_sizes: Sequence[int],
    points: int | None = None,
    rounds: int = ROUNDS,
    precision: Precision = "fp32",
    make: Callable[[str, EncodedSplit, Path], Baseline] = no_baseline,
    baselines: Sequence[str] = (),
    on_progress: ProgressHook | None = None,
) -> list[Record]:
    """`bench` of what is loaded already.

    Args:
        study: Keeps the times.
        front: Its points are timed.
        model: The encoder, on the processor.
        split: All its sequences are run.
        batch_sizes: As for `bench`.
        points: As for `bench`.
        rounds: As for `bench`.
        precision: As for `bench`.
        make: Makes a baseline for the while, by its name.
        baselines: As for `bench`.
        on_progress: As for `bench`.
    """
    timed_of = {size: _to_time(study, front, precision, size, len(split), points) for size in batch_sizes}
    network = PackedNetwork(model, precision)
    full_macs = mean_macs(model.shape, split.num_tokens)
    timed = itertools.chain(*timed_of.values(), [front.full])
    configs = {point.trial: served_point(point).length_config for point in timed}
    shares = {trial: mean_macs(model.shape, split.num_tokens, config) / full_macs for trial, config in configs.items()}
    left_out: dict[str, str] = {}
    made = {}
    records = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as engines:
        for name in baselines:
            logger.info("Making %s.", TITLES[name])
            if on_progress is not None:
                on_progress(0, len(batch_sizes), f"making {TITLES[name]}")
            try:
                made[name] = engines.enter_context(make(name, split, Path(folder)))
            except (CannotRun, EngineDied) as error:
                left_out[name] = str(error)
        for number, size in enumerate(batch_sizes):
            batches = in_batches(len(split), size)
            contenders: dict[tuple[str, int | None], Run] = {
                ("ours", None): ours(network, split, batches, configs[front.full.trial])
            }
            for point in timed_of[size]:
                if point.trial != front.full.trial:
                    contenders["ours", point.trial] = ours(network, split, batches, configs[point.trial])
            contenders |= {(name, None): runs(batches) for name, runs in made.items()}

            def report(done: int, total: int, number: int = number, size: int = size) -> None:
                if on_progress is not None:
                    on_progress(number + done / total, len(batch_sizes), f"batches of {size}")

            report(0, 1)  # rounds that do not count come first
            try:
                timings = race(contenders, rounds, on_round=report)
            except EngineDied as error:
                raise HpoError(f"Not all was timed: {error}, or leave it out of --baselines.") from error
            measured = {
                key: _measured(*key, timing, len(split), 1.0 if key[1] is None else shares[key[1]])
                for key, timing in timings.items()
            }
            measured["ours", front.full.trial] = replace(measured["ours", None], trial=front.full.trial)
            record = Record(
                processor=processor_name(),
                threads=torch.get_num_threads(),
                precision=precision,
                batch_size=size,
                sequences=len(split),
                mean_tokens=float(split.num_tokens.mean()),
                rounds=timings["ours", None].rounds,
                measured_at=datetime.now().isoformat(timespec="seconds"),
                full=measured["ours", None],
                points=tuple(measured["ours", point.trial] for point in timed_of[size]),
                baselines=tuple(measured[name, None] for name in made),
                left_out=left_out,
                versions=library_versions(),
            )
            study.set_user_attr(record.key, to_attribute(record))
            records.append(record)
    return records


def covers(study: optuna.Study, front: Front, precision: Precision, batch_size: int, sequences: int) -> bool:
    """Whether all points of a front were timed over so many sequences on this machine as it is set up now."""
    timed = _timed_before(study, precision, batch_size, sequences)
    return timed >= {point.trial for point in front.points}


def _timed_before(study: optuna.Study, precision: Precision, batch_size: int, sequences: int) -> set[int]:
    """Trials of which this machine, as it is set up now, has timed so."""
    key = record_key(processor_name(), torch.get_num_threads(), precision, batch_size, sequences)
    return {point["trial"] for point in study.user_attrs.get(key, {"points": []})["points"]}


def _to_time(
    study: optuna.Study, front: Front, precision: Precision, batch_size: int, sequences: int, most: int | None
) -> list[FrontPoint]:
    """The points of a front to time with batches of one size; see `bench`."""
    chosen = spread(front.points, POINTS if most is None else most)
    before = _timed_before(study, precision, batch_size, sequences) if most is None else set()
    known = [point for point in front.points if point.trial in before]
    return known if len(known) > len(chosen) else chosen


def spread(points: Sequence[FrontPoint], most: int) -> list[FrontPoint]:
    """At most so many points, evenly chosen, the first and the last among them."""
    places = np.unique(np.linspace(0, len(points) - 1, min(most, len(points))).round().astype(np.int64))
    return [points[place] for place in places]


def to_attribute(record: Record) -> dict[str, Any]:
    """A JSON-able form for the database."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(record)))
    return document


def bench_to_json(front: Front, records: Sequence[Record]) -> dict[str, Any]:
    """The document of `hpo bench --json`."""
    return {
        "study": front.study,
        "storage": front.storage,
        "baseline": BASELINE,
        "records": [
            {
                **to_attribute(record),
                "points": [{**asdict(point), "realised": record.realised(point)} for point in record.points],
            }
            for record in records
        ],
    }


def bench_table(record: Record) -> Table:
    """One record for a terminal: full length, the points of the front, the baselines."""
    table = Table(
        title=Text(
            f"{record.processor}, {record.threads} threads, batches of {record.batch_size}: milliseconds per sequence"
        ),
        caption=Text(
            f"Medians of {record.rounds} rounds, least and most beside them, over {record.sequences} sequences of "
            f"{record.mean_tokens:.0f} tokens on average. Shares and speed-ups are of {BASELINE}, in "
            f"{record.precision}. Realised: speed-up times the share of FLOPs. Baselines run at full length, padded to "
            "the longest of each batch."
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("")
    for name in ("ms", "least", "most", "share\nof FLOPs", "speed-up", "realised"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in (record.full, *record.points):
        name = "full length" if row.trial is None else f"trial {row.trial}"
        realised = "" if row.trial is None else f"{record.realised(row):.2f}"
        table.add_row(name, *_cells(record, row), realised)
    if record.baselines:
        table.add_section()
    for row in record.baselines:
        table.add_row(TITLES[row.engine], *_cells(record, row), "")
    return table


def _cells(record: Record, row: Measured) -> tuple[str, ...]:
    share = "" if row.engine != "ours" else f"{row.relative_macs:.1%}"
    times = map(ms_text, (row.ms, row.least_ms, row.most_ms))
    return *times, share, f"{record.full.ms / row.ms:.2f}x"


def _measured(engine: str, trial: int | None, timing: Timing, sequences: int, relative_macs: float) -> Measured:
    ms, least_ms, most_ms = (1e3 * seconds / sequences for seconds in (timing.median_s, timing.least_s, timing.most_s))
    return Measured(engine=engine, trial=trial, ms=ms, least_ms=least_ms, most_ms=most_ms, relative_macs=relative_macs)


def _check(**numbers: Sequence[int] | NDArray[np.int64]) -> None:
    for name, values in numbers.items():
        if not len(values) or min(values) < 1:
            raise ValueError(f"{name}={list(values)}; choose 1 or more.")
