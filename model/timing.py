"""How long an encoder takes for sequences on this machine's processor: ours under a length config, and what else one
would run.

What is timed goes from token ids to logits, tokenising left out. Engines that are compared take turns, so that whatever
else the machine does meets all of them; what is not ours has a process of its own.
"""

import logging
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from model.apart import Engine, Run, apart
from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.front_file import ExportError
from model.length_config import LengthConfig
from model.onnx_export import Arrays, input_names, padded, quantise, require_onnx, write_graph
from model.packed import PackedNetwork

SEQUENCES = 64
"""Sequences of a split that are timed."""
SECONDS_AT_LEAST, MOST_ROUNDS = 3.0, 25
"""A comparison whose rounds are over soon has more of them, up to so many."""
PAUSE_S, WARMED_S, LONG_S = 0.05, 0.3, 3.0
"""Before each timed run: both libraries' threads wait busily for a while after theirs, which slows the next one down. A
run shorter than the second is made once untimed first, since another one has had the caches. One longer than the third
has one untimed round, not two."""
BASELINES = ("eager", "sdpa", "compile", "onnx-fp32", "onnx-int8")
"""The dense model at full length, padded to the longest of each batch: transformers with either attention, the second
compiled by torch, and a graph in ONNX Runtime."""

Name = TypeVar("Name", bound=Hashable)
Batches = Sequence[NDArray[np.int64]]
"""The sequence numbers of each batch."""


class CannotRun(Exception):
    """An engine does not work here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one round, in seconds.

    Attributes:
        median_s: Over the rounds.
        least_s: Of all rounds.
        most_s: Of all rounds.
        rounds: How many there were.
    """

    median_s: float
    least_s: float
    most_s: float
    rounds: int


def race(
    runs: Mapping[Name, Run],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[Name, Timing]:
    """Time runs that take turns, after rounds that do not count.

    Args:
        runs: What to time; one that says how long it took is believed.
        rounds: Least number of rounds that count.
        clock: Seconds.
        on_round: Told after each round that counts its number and how many there will be.
    """

    def measure(run: Run) -> float:
        start = clock()
        seconds = run()
        return clock() - start if seconds is None else seconds

    took = {}
    for name, run in runs.items():
        took[name] = measure(run)
        if took[name] < LONG_S:
            took[name] = measure(run)
    rounds = max(rounds, min(MOST_ROUNDS, round(SECONDS_AT_LEAST / max(sum(took.values()), 1e-9))))
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            time.sleep(PAUSE_S)
            if took[name] < WARMED_S:
                run()
            seconds[name].append(measure(run))
        if on_round is not None:
            on_round(number + 1, rounds)
    return {
        name: Timing(median_s=statistics.median(own), least_s=min(own), most_s=max(own), rounds=rounds)
        for name, own in seconds.items()
    }


def sample(split: EncodedSplit, sequences: int = SEQUENCES) -> EncodedSplit:
    """Sequences of a split, drawn by a fixed seed, as they come."""
    return split.take(np.random.default_rng(0).permutation(len(split))[:sequences])


def in_batches(sequences: int, batch_size: int) -> list[NDArray[np.int64]]:
    """The numbers of consecutive sequences in batches, of which the last may be smaller."""
    return [np.arange(sequences)[start : start + batch_size] for start in range(0, sequences, batch_size)]


def ours(network: PackedNetwork, split: EncodedSplit, batches: Batches, length_config: LengthConfig) -> Run:
    """Predictions without padding under a length config, as `LengthAdaptivePipeline` makes them on a processor."""
    fed = [
        ([split.input_ids[number] for number in batch], [split.token_type_ids[number] for number in batch])
        for batch in batches
    ]

    def run() -> None:
        for ids, types in fed:
            network.logits(ids, types, length_config)

    return run


@contextmanager
def baseline(
    name: str, checkpoint: Path, model: LengthAdaptiveModel, split: EncodedSplit, pad: int, folder: Path
) -> Iterator[Callable[[Batches], Run]]:
    """One of `BASELINES` in a process of its own, until the block ends; makes its runs over batches.

    Args:
        name: Which.
        checkpoint: Folder of the encoder.
        model: The same, loaded.
        split: Whose sequences are run.
        pad: Token id that pads.
        folder: Where graphs may be kept for the while.
    Raises:
        CannotRun: It does not work here.
        EngineDied: Its process ended.
    """
    try:
        engine = _engine(name, checkpoint, model, split, pad, folder)
    except (ExportError, ImportError, OSError, ValueError) as error:
        raise CannotRun(_reason(error)) from error
    with apart(engine, name) as make:
        yield make


def _engine(
    name: str, checkpoint: Path, model: LengthAdaptiveModel, split: EncodedSplit, pad: int, folder: Path
) -> Engine:
    names = input_names(model)
    if not name.startswith("onnx"):
        return Engine(dense, (name, checkpoint, type(model.network), names, split, pad))
    require_onnx()
    path = folder / "full.onnx"
    if not path.is_file():
        write_graph(model, LengthConfig.full(model.num_layers), path, longest=int(split.num_tokens.max()))
    if name == "onnx-int8":
        exact, path = path, folder / "full-int8.onnx"
        quantise(exact, path)
    return Engine(of_graph, (path, names, split, pad))


def _reason(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def dense(
    name: str,
    checkpoint: Path,
    network_class: Any,
    names: Sequence[str],
    split: EncodedSplit,
    pad: int,
    dtype: torch.dtype = torch.float32,
) -> Callable[[Batches], Run]:
    """The encoder at full length in transformers.

    Args:
        name: Of `BASELINES`.
        checkpoint: Its folder.
        network_class: Of transformers.
        names: Of its inputs.
        split: Whose sequences are run.
        pad: Token id that pads.
        dtype: Of its weights.
    Raises:
        CannotRun: It does not work here.
    """
    try:
        network: Any = network_class.from_pretrained(
            checkpoint, attn_implementation="eager" if name == "eager" else "sdpa", dtype=dtype
        )
    except (ImportError, OSError, ValueError) as error:
        raise CannotRun(_reason(error)) from error
    network.train(False)
    if name == "compile":
        network = torch.compile(network, dynamic=True)
        _try(network, _tensors(split, np.arange(min(2, len(split))), pad, names))
    return run_dense(network, names, split, pad)


def run_dense(network: Any, names: Sequence[str], split: EncodedSplit, pad: int) -> Callable[[Batches], Run]:
    """Runs of a network of transformers over batches that are padded to their longest."""

    def make(batches: Batches) -> Run:
        fed = [_tensors(split, batch, pad, names) for batch in batches]

        def run() -> None:
            with torch.inference_mode():
                for batch in fed:
                    network(**batch)

        return run

    return make


def _try(network: Any, batch: Mapping[str, torch.Tensor]) -> None:
    """Compile for real.

    Raises:
        CannotRun: torch does not compile here, as without a C++ compiler.
    """
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch._inductor", "torch._dynamo"))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with torch.inference_mode():
            network(**batch)
    except Exception as error:  # compilers fail with whatever they like
        raise CannotRun(f"torch.compile failed: {_reason(error)}") from error
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def of_graph(path: Path, names: Sequence[str], split: EncodedSplit, pad: int) -> Callable[[Batches], Run]:
    """A graph in ONNX Runtime, over batches that are padded to their longest."""
    from model.onnx_runner import load

    session = load(path, torch.get_num_threads())
    return _over_arrays(lambda batch: session.run(None, batch), names, split, pad)


def of_export(path: Path, names: Sequence[str], split: EncodedSplit, pad: int) -> Callable[[Batches], Run]:
    """A graph as `LengthAdaptivePipeline` and an export's runner compute it, over batches that are cut up."""
    from model.onnx_runner import SplitSession

    return _over_arrays(SplitSession(path, threads=torch.get_num_threads()).run, names, split, pad)


def _over_arrays(
    compute: Callable[[Arrays], object], names: Sequence[str], split: EncodedSplit, pad: int
) -> Callable[[Batches], Run]:
    def make(batches: Batches) -> Run:
        arrays = [padded(split, batch, pad) for batch in batches]
        fed = [{name: batch[name] for name in names} for batch in arrays]

        def run() -> None:
            for batch in fed:
                compute(batch)

        return run

    return make


def _tensors(split: EncodedSplit, batch: NDArray[np.int64], pad: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    arrays = padded(split, batch, pad)
    return {name: torch.from_numpy(arrays[name]) for name in names}
