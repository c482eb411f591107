"""How long a length config takes on this machine's processor, predicted from times of a few.

`PackedNetwork` does one thing after another: it embeds a batch, goes through each layer, and reads. What a step takes
follows from how many tokens arrive, how many the layer keeps, and which sequences attend together, with or without
scores: all of that is known beforehand. So the steps of some configs are timed where they stand, between the others of
a real run, a law with coefficients of 0 or more is fitted to them, and from then on the law answers for every config,
at once and always alike. How far it is off is measured on configs that it was not fitted to, run as a whole.

Shape letters: C configs, N layers, M batches, B sequences of a batch by rising length, 0 where a batch has fewer.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.hardware import processor_name
from model.length_config import LengthConfig, counts_of_shares
from model.packed import SHORT, SPREAD, PackedNetwork, filled
from model.precision import Precision
from model.timing import Batches, in_batches, ours, sample

logger = logging.getLogger(__name__)

FITTED, HELD_OUT = 20, 6
"""Configs whose steps are timed, and those beside full length that the law is checked on."""
FEWEST = 5
"""Of the former, where a large model takes long."""
FIT_S, MOST_S, LEAST_ROUNDS, MOST_ROUNDS = 20.0, 30.0, 3, 15
"""Rounds over all of them go on until so many seconds are over, or there are so many; the second bounds the least."""
WARMED_S = 1.0
"""Where full length takes longer, a first round that does not count would take too long, and change less."""
PASS_S = 0.25
"""Batches are left out of the timing, not of what is predicted, once full length takes longer for those before them."""
LAW = 1
"""What the terms mean; a table of another law is not used."""
FIRST_EDGE = 16
CONFIGS_TOGETHER = 256
DECIMALS = 9
"""Of milliseconds: beyond these, processors differ in how a sum is rounded."""

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Terms = dict[str, NDArray[Any]]
"""By name, what a step's time grows with, one number for each call."""
Hook = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A config that the law was not fitted to.

    Attributes:
        shares: Left after each layer.
        predicted_ms: Of one sequence.
        measured_ms: The same, as a whole.
    """

    shares: tuple[float, ...]
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of what was measured."""
        return abs(self.predicted_ms / self.measured_ms - 1.0)


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Predicts the milliseconds of a sequence under a length config.

    Attributes:
        processor: Where it was fitted.
        threads: That computed.
        precision: Of the products.
        batch_size: Sequences that are run together.
        reads_first: Whether the head reads the first token alone.
        edges: Rows from which on another row may take another time.
        seconds: Of each term of the law.
        held_out: What it was checked on.
        took_s: Time that all of this took.
        law: Which law.
    """

    processor: str
    threads: int
    precision: Precision
    batch_size: int
    reads_first: bool
    edges: tuple[int, ...]
    seconds: Mapping[str, float]
    held_out: tuple[HeldOut, ...] = ()
    took_s: float = 0.0
    law: int = LAW

    @property
    def median_error(self) -> float:
        """Of the configs held out."""
        return float(np.median([one.error for one in self.held_out]))

    @property
    def worst_error(self) -> float:
        """Of the configs held out."""
        return max(one.error for one in self.held_out)

    def __str__(self) -> str:
        together = "one sequence at a time" if self.batch_size == 1 else f"batches of {self.batch_size}"
        return f"{self.processor}, {self.threads} threads, {self.precision}, {together}"

    def ms(self, lengths_MB: Ints, shares_CN: NDArray[np.floating[Any]], skipped_CN: NDArray[np.bool_]) -> Array:
        """Milliseconds of a sequence, over batches, under each of many configs, (C,).

        Args:
            lengths_MB: As `lengths_of` gives them.
            shares_CN: Shares left after the layers of each config; what stands at a skipped layer counts for nothing.
            skipped_CN: Which layers each config skips.
        """
        batches_MB, repeats_M = np.unique(lengths_MB, axis=0, return_counts=True)
        seconds = []
        for start in range(0, len(shares_CN), CONFIGS_TOGETHER):
            own = slice(start, start + CONFIGS_TOGETHER)
            seconds_CM = np.zeros((len(shares_CN[own]), len(batches_MB)))
            for step in steps(self, batches_MB, shares_CN[own], skipped_CN[own]):
                for name, term_CM in step.items():
                    if coefficient := self.seconds.get(name, 0.0):
                        seconds_CM += coefficient * term_CM
            seconds.append(seconds_CM @ repeats_M)
        return np.round(1e3 * np.concatenate([*seconds, np.zeros(0)]) / np.count_nonzero(lengths_MB), DECIMALS)

    def ms_of(self, lengths_MB: Ints, config: LengthConfig) -> float:
        """The same for one config of shares."""
        return float(self.ms(lengths_MB, *_arrays(config))[0])

    def to_attribute(self) -> dict[str, Any]:
        """A JSON-able form for the database."""
        fields = {**asdict(self), "edges": list(self.edges)}
        fields["held_out"] = [{**asdict(one), "shares": list(one.shares)} for one in self.held_out]
        return fields

    @classmethod
    def from_attribute(cls, fields: Mapping[str, Any]) -> "LatencyTable":
        """The inverse of `to_attribute`.

        Raises:
            ValueError: Another version of this tool fitted it.
        """
        if fields.get("law") != LAW:
            raise ValueError(f"the cost table is of law {fields.get('law')!r}, this version of hpo reads {LAW}")
        held_out = tuple(HeldOut(**{**one, "shares": tuple(one["shares"])}) for one in fields["held_out"])
        return cls(**{**fields, "edges": tuple(fields["edges"]), "held_out": held_out})


class Reading(Protocol):
    """What of a table decides its terms."""

    @property
    def reads_first(self) -> bool:
        """Whether the head reads the first token alone."""

    @property
    def edges(self) -> tuple[int, ...]:
        """Rows from which on another row may take another time."""

    @property
    def precision(self) -> Precision:
        """Of the products."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """A law before it is fitted; see `LatencyTable`."""

    reads_first: bool
    edges: tuple[int, ...]
    precision: Precision

    @classmethod
    def of(cls, lengths_MB: Ints, reads_first: bool, precision: Precision) -> "Law":
        """With edges up to what the batches hold, each twice the one before."""
        most = int(lengths_MB.sum(axis=1).max())
        edges = [edge for edge in (FIRST_EDGE << power for power in range(40)) if edge < most]
        return cls(reads_first=reads_first, edges=tuple(edges), precision=precision)


class Device(Protocol):
    """What can be timed."""

    def steps(self, batch: int, config: LengthConfig) -> Sequence[float]:
        """Seconds of each step of one call: what is before the layers, and each layer that is computed.

        What comes after the last layer counts as its part.
        """

    def whole(self, batches: int, config: LengthConfig) -> float:
        """Seconds that the first batches take one after the other."""


class PackedDevice:
    """This machine's processor."""

    def __init__(
        self,
        network: PackedNetwork,
        split: EncodedSplit,
        batches: Batches,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._network, self._split, self._batches, self._clock = network, split, batches, clock
        self._fed = [
            ([split.input_ids[number] for number in batch], [split.token_type_ids[number] for number in batch])
            for batch in batches
        ]

    def steps(self, batch: int, config: LengthConfig) -> Sequence[float]:
        marks = [self._clock()]
        self._network.logits(*self._fed[batch], config, on_layer=lambda: marks.append(self._clock()))
        marks.append(self._clock())
        return [end - start for start, end in itertools.pairwise(marks)]

    def whole(self, batches: int, config: LengthConfig) -> float:
        run = ours(self._network, self._split, self._batches[:batches], config)
        start = self._clock()
        run()
        return self._clock() - start


def calibrate(
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    *,
    batch_size: int,
    precision: Precision = "fp32",
    on_progress: Hook | None = None,
) -> LatencyTable:
    """Fit a table for a model by timing it on this machine's processor, which takes about half a minute.

    Args:
        model: The encoder, on the processor.
        split: Its sequences are run, as `model.timing.sample` draws them.
        batch_size: Sequences to run together.
        precision: "bf16" rounds the factors of the large products.
        on_progress: Told the share that is done, and of what.
    """
    drawn = sample(split)
    batches = in_batches(len(drawn), batch_size)
    device = PackedDevice(PackedNetwork(model, precision), drawn, batches)
    lengths_MB = lengths_of(drawn.num_tokens, batch_size)
    law = Law.of(lengths_MB, model.reads_first, precision)
    return fit(
        device,
        lengths_MB,
        law,
        num_layers=model.num_layers,
        batch_size=batch_size,
        processor=processor_name(),
        threads=torch.get_num_threads(),
        on_progress=on_progress,
    )


def fit(
    device: Device,
    lengths_MB: Ints,
    law: Law,
    *,
    num_layers: int,
    batch_size: int,
    processor: str,
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Hook | None = None,
) -> LatencyTable:
    """Time a device, fit the law, and check it.

    Args:
        device: What is timed.
        lengths_MB: Of its batches.
        law: What time may depend on.
        num_layers: Of the network.
        batch_size: Sequences that are run together.
        processor: The device's name.
        threads: That compute.
        clock: Seconds.
        on_progress: Told the share that is done, and of what.
    """
    start = clock()
    generator = np.random.default_rng(0)
    full = LengthConfig.full(num_layers)
    used, pass_s = _batches_in_time(device, len(lengths_MB), full)
    count = max(FEWEST, min(FITTED, int(MOST_S / (2 * max(pass_s, 1e-9)))))
    configs = random_configs(num_layers, count + min(HELD_OUT, count // 2), generator)
    fitted, held_out = configs[:count], [full, *configs[count:]]
    logger.info("Timing the layers of %d configs over %d batches of %d.", count, used, batch_size)
    seconds, wholes = _timed(device, used, fitted, held_out, pass_s < WARMED_S, clock, on_progress)
    coefficients = _fitted(law, lengths_MB[:used], fitted, seconds)
    table = LatencyTable(
        processor=processor,
        threads=threads,
        precision=law.precision,
        batch_size=batch_size,
        reads_first=law.reads_first,
        edges=law.edges,
        seconds=coefficients,
    )
    sequences = np.count_nonzero(lengths_MB[:used])
    checked = tuple(
        HeldOut(
            shares=config.shares or (),
            predicted_ms=table.ms_of(lengths_MB[:used], config),
            measured_ms=1e3 * whole_s / sequences,
        )
        for config, whole_s in zip(held_out, wholes, strict=True)
    )
    return replace(table, held_out=checked, took_s=round(clock() - start, 1))


def lengths_of(num_tokens_N: Ints, batch_size: int) -> Ints:
    """The lengths of consecutive sequences in batches, each by rising length, (M, B)."""
    batches = in_batches(len(num_tokens_N), batch_size)
    lengths_MB = np.zeros((len(batches), min(batch_size, len(num_tokens_N))), dtype=np.int64)
    for row, batch in enumerate(batches):
        lengths_MB[row, lengths_MB.shape[1] - len(batch) :] = np.sort(num_tokens_N[batch])
    return lengths_MB


def random_configs(num_layers: int, count: int, generator: np.random.Generator) -> list[LengthConfig]:
    """Configs from gentle to so strong that the first layer leaves few tokens, in turn; a third of layers drop none."""
    configs = []
    for number in range(count):
        shares_N = np.sort(generator.random(num_layers))[::-1] ** (0.5, 1.0, 2.0, 8.0)[number % 4]
        share, shares = 1.0, []
        for wanted, keeps_all in zip(shares_N, generator.random(num_layers) < 1 / 3, strict=True):
            share = share if keeps_all else max(0.02, float(wanted))
            shares.append(share)
        configs.append(LengthConfig.from_shares(np.minimum.accumulate(shares).tolist()))
    return configs


def steps(
    law: Reading, lengths_MB: Ints, shares_CN: NDArray[np.floating[Any]], skipped_CN: NDArray[np.bool_]
) -> Iterator[Terms]:
    """The terms of each step of calls, one (C, M) array each: what is before the layers, and every layer.

    A layer that a config skips has terms of 0 there.

    Args:
        law: Which terms there are.
        lengths_MB: Of the batches.
        shares_CN: Shares left after the layers of each config.
        skipped_CN: Which layers each config skips.
    """
    count, layers = skipped_CN.shape
    arriving_CMB = np.broadcast_to(lengths_MB, (count, *lengths_MB.shape))
    sequences_CM = (arriving_CMB > 0).sum(axis=2)
    tokens_CM = arriving_CMB.sum(axis=2)
    last_C = layers - 1 - (~skipped_CN)[:, ::-1].argmax(axis=1)
    yield {"call": np.ones_like(tokens_CM), "call, tokens": tokens_CM, "call, sequences": sequences_CM}
    for layer in range(layers):
        computed_C11, is_last_C = ~skipped_CN[:, layer, None, None], last_C == layer
        keep_CMB = counts_of_shares(shares_CN[:, layer, None, None], lengths_MB)
        keep_CMB = np.where(computed_C11, np.minimum(keep_CMB, arriving_CMB), arriving_CMB)
        terms: Terms = {}
        computed_C = computed_C11[:, 0, 0]
        if law.reads_first:
            own = _last_layer(law, arriving_CMB, sequences_CM) if is_last_C.any() else {}
            terms |= {name: term_CM * is_last_C[:, None] for name, term_CM in own.items()}
            computed_C = computed_C & ~is_last_C
        else:
            finish = {"end": np.ones_like(tokens_CM), "end, tokens": tokens_CM, "end, sequences": sequences_CM}
            terms |= {name: term_CM * is_last_C[:, None] for name, term_CM in finish.items()}
        if computed_C.any():
            own = _layer(law, arriving_CMB, keep_CMB, tokens_CM)
            terms |= {name: term_CM * computed_C[:, None] for name, term_CM in own.items()}
        yield terms
        arriving_CMB = keep_CMB


def _layer(law: Reading, arriving_CMB: Ints, keep_CMB: Ints, tokens_CM: Ints) -> Terms:
    arriving_CM, kept_CM = arriving_CMB.sum(axis=2), keep_CMB.sum(axis=2)
    drops_CM = kept_CM < arriving_CM
    return {
        "layer": np.ones_like(arriving_CM),
        **_ramps("arriving", _rows(law, arriving_CM), law.edges),
        **_ramps("kept", _rows(law, kept_CM), law.edges),
        "drop": drops_CM,
        "drop, kept": drops_CM * kept_CM,
        "drop, tokens": drops_CM * tokens_CM,  # which are put back where the head reads all
        **_groups(arriving_CMB, keep_CMB),
    }


def _last_layer(law: Reading, arriving_CMB: Ints, sequences_CM: Ints) -> Terms:
    """The terms of a layer that is computed for each sequence's first token alone, and of its head."""
    groups = {
        f"last, {name}": term for name, term in _groups(arriving_CMB, arriving_CMB).items() if "score" not in name
    }
    return {
        "last": np.ones_like(sequences_CM),
        "last, sequences": sequences_CM,
        **_ramps("last, arriving", _rows(law, arriving_CMB.sum(axis=2)), law.edges),
        **groups,
    }


def _ramps(name: str, rows_CM: Ints, edges: Sequence[int]) -> Terms:
    """The rows between one edge and the next, so that a row may take another time from each edge on."""
    return {
        f"{name} from {low}": np.clip(rows_CM - low, 0, None if high is None else high - low)
        for low, high in zip((0, *edges), (*edges, None), strict=True)
    }


def _rows(law: Reading, rows_CM: Ints) -> Ints:
    """Rows that a product has, fillers included."""
    return filled(rows_CM, law.precision)


def _groups(arriving_CMB: Ints, keep_CMB: Ints) -> Terms:
    """How sequences attend: calls, their tokens, padding included, and pairs of tokens, by the kind of call.

    Sequences form groups as in `model.packed`.
    """
    shape = arriving_CMB.shape[:2]
    kinds = ("attend", "attend padded", "score", "score padded")
    terms = {f"{kind}{what}": np.zeros(shape) for kind in kinds for what in ("", ", tokens", ", pairs")}
    first_CM, first_keep_CM, longest_CM, size_CM = (np.zeros(shape, dtype=np.int64) for _ in range(4))
    drops_CM = np.zeros(shape, dtype=np.bool_)
    for place in range(arriving_CMB.shape[2] + 1):
        goes_on_CM = np.zeros(shape, dtype=np.bool_)
        if place < arriving_CMB.shape[2]:
            count_CM, keep_CM = arriving_CMB[:, :, place], keep_CMB[:, :, place]
            is_like_CM = (count_CM == first_CM) & (keep_CM == first_keep_CM)
            is_near_CM = (count_CM <= SHORT) & (count_CM - first_CM <= SPREAD)
            goes_on_CM = (size_CM > 0) & (is_like_CM | is_near_CM)
        ends_CM = (size_CM > 0) & ~goes_on_CM
        padded_CM = first_CM < longest_CM
        for kind in kinds if ends_CM.any() else ():
            own_CM = ends_CM & (drops_CM == kind.startswith("score")) & (padded_CM == kind.endswith("padded"))
            terms[kind] += own_CM
            terms[f"{kind}, tokens"] += own_CM * size_CM * longest_CM
            terms[f"{kind}, pairs"] += own_CM * size_CM * longest_CM**2
        if place == arriving_CMB.shape[2]:
            break
        begins_CM = ~goes_on_CM & (count_CM > 0)
        first_CM, first_keep_CM = np.where(begins_CM, count_CM, first_CM), np.where(begins_CM, keep_CM, first_keep_CM)
        drops_CM = np.where(begins_CM, False, drops_CM) | (keep_CM < count_CM)
        size_CM = np.where(begins_CM, 1, size_CM + goes_on_CM)
        longest_CM = count_CM
    return terms


def _batches_in_time(device: Device, batches: int, full: LengthConfig) -> tuple[int, float]:
    """How many batches are timed, and the seconds that full length takes for them; the first run warms up."""
    device.steps(0, full)
    spent = 0.0
    for batch in range(batches):
        spent += sum(device.steps(batch, full))
        if spent > PASS_S:
            return batch + 1, spent
    return batches, spent


def _timed(
    device: Device,
    batches: int,
    fitted: Sequence[LengthConfig],
    held_out: Sequence[LengthConfig],
    warms_up: bool,
    clock: Callable[[], float],
    on_progress: Hook | None,
) -> tuple[list[list[Array]], list[float]]:
    """Median seconds of each step, for each config to fit and batch, and of whole runs of those held out.

    All take turns, so that whatever else the machine does meets all of them. A first round to warm up does not count.
    """
    rounds: list[list[list[Sequence[float]]]] = []
    wholes: list[list[float]] = []
    start, first = clock(), -1 if warms_up else 0
    for number in range(first, MOST_ROUNDS):
        if number > 0 and clock() - start > (MOST_S if number < LEAST_ROUNDS else FIT_S):
            break
        own: list[list[Sequence[float]]] = []
        for config in fitted:
            own.append([device.steps(batch, config) for batch in range(batches)])
            if on_progress is not None:
                by_rounds = (number - first + len(own) / len(fitted)) / (LEAST_ROUNDS - first)
                on_progress(min(1.0, by_rounds, max(0.05, (clock() - start) / FIT_S)), "timing layers")
        whole = [device.whole(batches, config) for config in held_out]
        if number >= 0:
            rounds.append(own)
            wholes.append(whole)
    steps_of = [
        [np.median([own[config][batch] for own in rounds], axis=0) for batch in range(batches)]
        for config in range(len(fitted))
    ]
    return steps_of, np.median(wholes, axis=0).tolist()


def _fitted(
    law: Law, lengths_MB: Ints, configs: Sequence[LengthConfig], seconds: Sequence[Sequence[Array]]
) -> dict[str, float]:
    """Seconds of each term, 0 or more, by least squares of errors as shares of a call's whole time."""
    rows: list[dict[str, float]] = []
    times, calls = [], []
    for config, of_batches in zip(configs, seconds, strict=True):
        terms_of = list(steps(law, lengths_MB, *_arrays(config)))
        for batch, step_seconds in enumerate(of_batches):
            for terms, one_s in zip(terms_of, step_seconds, strict=True):
                rows.append({name: float(term_CM[0, batch]) for name, term_CM in terms.items()})
                times.append(one_s)
                calls.append(step_seconds.sum())
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    matrix = np.array([[row.get(name, 0.0) for name in names] for row in rows]) / np.array(calls)[:, None]
    scale = np.maximum(np.sqrt((matrix**2).sum(axis=0)), 1e-300)
    solved, _ = nnls(matrix / scale, np.array(times) / np.array(calls), maxiter=100 * len(names))
    return {name: float(one) for name, one in zip(names, solved / scale, strict=True) if one > 0}


def _arrays(config: LengthConfig) -> tuple[Array, NDArray[np.bool_]]:
    skipped_1N = np.isin(np.arange(config.num_layers), config.skipped)[None]
    return np.array([config.shares], dtype=np.float64), skipped_1N
