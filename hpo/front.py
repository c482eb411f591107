"""The Pareto front of a length study: quality against cost, in plain numbers.

Everything here is recomputed from the study's database; `hpo.plot` draws it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import model.front_file
from hpo.errors import EmptyFront, HpoError
from hpo.staircase import members
from hpo.storage import display_url, finished_trials, printable
from model.front_file import choose_point, smallest_budget
from model.hardware import processor_name
from model.length_config import LengthConfig

BASELINE = "the same model at full length without padding"
FLOPS_PER_MAC = 2
RETENTION, SKIP = "retention_", "skip_"
"""What the names of a study's parameters begin with; then comes the layer."""
MACS, MS = "macs", "latency_ms"
"""The costs that a study may have, and the attributes of a trial that hold them where time is one."""
UNITS = {MACS: "MAC", MS: "ms"}
TABLE, FULL_MS, PREDICTION = "latency_table", "full_latency_ms", "latency_prediction"
"""Attributes of a study with time as a cost: what predicts it, what that says of full length, how far it was off."""
LATENCY = "latency:"
"""What the names of study attributes begin with that hold what `hpo bench` measured."""
ORIGIN = "origin"
"""Attribute of a trial whose length config another method found: that method."""
ORIGINS = {"power-bert": "PoWER-BERT's configs"}
"""What they are called where people look."""
DECIMALS = 9  # beyond these, retentions differ only in how a grid's step was added up
SHARES_PER_LINE, FEW_SHARES_PER_LINE = 6, 4
"""How many layers' shares are written on a line, and where there is little room."""
FLOPS, KEPT = "FLOPs", "tokens left after\neach layer, %"
"""Headers of the table."""
WIDEST = 10_000
"""Characters of a line that has room for any table."""


class NotLengthStudy(HpoError):
    """The study was not made by `hpo search-lengths`."""


class NothingFits(HpoError):
    """No point of the front keeps within the budget asked for."""


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One scored length config.

    Attributes:
        trial: Number of the trial in its study.
        shares: Share of the sequence's own tokens left after each layer.
        skipped: Layers, from 0, that are not computed; None where the study does not search depth.
        metric: Quality on the search split, on which trials are selected.
        report_metric: Quality on the report split; None where it was not scored there.
        macs: Mean MACs of the search split's real sequences.
        relative_macs: `macs` as a share of the same model at full length without padding.
        report_relative_macs: The same share on the report split; None where it was not scored there.
        latency_ms: Measured time of one sequence; None where it was not measured.
        metrics: Every metric that is reported, on the search split, by name; empty where only `metric` was recorded.
        report_metrics: The same on the report split.
        origin: The method that found it, where that was not this search.
        predicted_ms: Predicted time of one sequence, where time is a cost of the study.
        relative_ms: `predicted_ms` as a share of full length's.
    """

    trial: int
    shares: tuple[float, ...]
    metric: float
    report_metric: float | None
    macs: float
    relative_macs: float
    report_relative_macs: float | None = None
    latency_ms: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    report_metrics: Mapping[str, float] = field(default_factory=dict)
    origin: str | None = None
    skipped: tuple[int, ...] | None = None
    predicted_ms: float | None = None
    relative_ms: float | None = None

    def relative(self, cost: str) -> float:
        """One of the costs as a share of full length's."""
        return (self.relative_ms or 0.0) if cost == MS else self.relative_macs


@dataclass(frozen=True, kw_only=True)
class LatencySource:
    """Where the front's times were measured.

    Attributes:
        processor: The machine's.
        threads: That computed.
        precision: Of the products.
        batch_size: Sequences that were run together.
    """

    processor: str
    threads: int
    precision: str
    batch_size: int

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.threads} threads, {self.precision}, "
            f"{'one sequence at a time' if self.batch_size == 1 else f'batches of {self.batch_size}'}"
        )


@dataclass(frozen=True, kw_only=True)
class Front:
    """What a length study found.

    Attributes:
        study: Name of the study.
        storage: URL of its database, any password hidden.
        trials: Finished trials, completed or stopped early.
        metric: Name of the quality metric.
        direction: Of the metric: "maximize".
        cost: Name of the cost, the first where there are two.
        unit: Its unit.
        full: The full-length config, which costs are compared with.
        hypervolume: See `hypervolume`.
        points: The non-dominated trials by rising cost, and where there is one cost, quality; of equals the earliest.
        dominated: The other completed trials, by number.
        seeds: Completed trials that another method found, by rising cost.
        constant_rate: Trials with one retention for all layers, none skipped, by rising cost; of equals the earliest.
        median_tokens: Median number of real tokens per sequence of the search split, where known.
        workload: What was searched, as `hpo.workload.Workload` records it; empty where unknown.
        latency: Where the points' `latency_ms` were measured; None where they were not.
        costs: Names of all costs.
        predicted_for: What the predicted times are of; None where there are none.
        prediction: How far they were off, as `hpo.search_lengths.Prediction` has it; empty where that is not known.
    """

    study: str
    storage: str
    trials: int
    metric: str
    direction: str
    cost: str
    unit: str
    full: FrontPoint
    hypervolume: float
    points: tuple[FrontPoint, ...]
    dominated: tuple[FrontPoint, ...] = ()
    constant_rate: tuple[FrontPoint, ...] = ()
    seeds: tuple[FrontPoint, ...] = ()
    median_tokens: int | None = None
    workload: Mapping[str, Any] = field(default_factory=dict)
    latency: LatencySource | None = None
    costs: tuple[str, ...] = (MACS,)
    predicted_for: LatencySource | None = None
    prediction: Mapping[str, float] = field(default_factory=dict)

    @property
    def beside(self) -> list[str]:
        """Names of the metrics that are reported beside the one that was searched for."""
        return [name for name in self.full.report_metrics if name != self.metric]


def compute_front(study: optuna.Study, storage: str) -> Front:
    """The front of a length study, with what a reader compares it with.

    Only completed trials can be points; those stopped early have no score of their own. One that does not record its
    length config has the one that its parameters stand for; one whose MACs are not known is left out.

    Args:
        study: A study that `hpo search-lengths` filled.
        storage: URL of its database; a password in it is hidden.
    Raises:
        EmptyFront: No trial completed, or none at full length.
        NotLengthStudy: The study has other objectives, or its trials have no length configs.
    """
    _check_objectives(study)
    finished = finished_trials(study)
    costs = _cost_names(study)
    completed = [
        trial
        for trial in finished
        if trial.state is TrialState.COMPLETE and (MACS in trial.user_attrs or tuple(costs) != (MS,))
    ]
    if not completed:
        raise EmptyFront(f"Study {study.study_name!r} has no completed trial yet; start it with `hpo search-lengths`.")
    attrs = study.user_attrs
    source, full_ms, ms_of_trial = _latencies(attrs)
    points = [_front_point(trial, study.study_name, attrs, costs, ms_of_trial.get(trial.number)) for trial in completed]
    rates = {trial.number: constant_rate(trial.params) for trial in completed}
    full = next((point for point in points if rates[point.trial] == 1.0), None)
    if full is None:
        raise EmptyFront(
            f"Study {study.study_name!r} has no completed trial at full length to compare with; "
            "run `hpo search-lengths` again to complete the study."
        )
    full = replace(full, latency_ms=full_ms)
    scores = [_scores(point, costs) for point in points]
    on_front = non_dominated([score[1:] for score in scores], [score[0] for score in scores])
    scores_on_front = {scores[index] for index in on_front}
    return Front(
        study=study.study_name,
        storage=display_url(storage),
        trials=len(finished),
        metric=(study.metric_names or ["metric"])[0],
        direction=study.directions[0].name.lower(),
        cost=costs[0],
        unit=UNITS.get(costs[0], "MAC"),
        full=full,
        hypervolume=hypervolume(
            [[point.relative(cost) for cost in costs] for point in points], [point.metric for point in points]
        ),
        points=tuple(points[index] for index in on_front),
        dominated=tuple(point for point, score in zip(points, scores, strict=True) if score not in scores_on_front),
        constant_rate=_distinct_by_cost([point for point in points if rates[point.trial] is not None], costs),
        seeds=_distinct_by_cost([point for point in points if point.origin is not None], costs),
        median_tokens=attrs.get("median_tokens"),
        workload=attrs.get("workload") or {},
        latency=source,
        costs=costs,
        predicted_for=_source(attrs[TABLE]) if TABLE in attrs else None,
        prediction=attrs.get(PREDICTION) or {},
    )


def non_dominated(costs: Sequence[float] | Sequence[Sequence[float]], qualities: Sequence[float]) -> NDArray[np.int64]:
    """Indices of the points that no other point beats, by rising cost.

    A point is beaten by one that is no worse in all respects and better in one. Of points equal in all, the first is
    listed.

    Args:
        costs: Cost of each of N points, or its several costs; less is better.
        qualities: Quality of each point; more is better.
    """
    quality_N = np.asarray(qualities, dtype=np.float64)
    return members(np.asarray(costs, dtype=np.float64).reshape(len(quality_N), -1 if len(quality_N) else 1), quality_N)


def hypervolume(relative_costs: Sequence[float] | Sequence[Sequence[float]], qualities: Sequence[float]) -> float:
    """Area, or volume of two costs, that the points dominate up to quality 0 at full cost.

    In units of the metric times the share of the full cost: in [0, 1] for a metric in [0, 1]. Points that cost
    more than full length, or whose quality is below 0, add nothing.

    Args:
        relative_costs: Cost of each point as a share of full length's, or its one or two costs.
        qualities: Quality of each point; more is better.
    """
    quality_N = np.maximum(np.asarray(qualities, dtype=np.float64), 0.0)
    costs = np.asarray(relative_costs, dtype=np.float64).reshape(len(quality_N), -1 if len(quality_N) else 1)
    cost_NK = np.minimum(costs, 1.0)
    if cost_NK.shape[1] == 1:
        return _area(cost_NK[:, 0], quality_N)
    order_N = np.argsort(cost_NK[:, 0], kind="stable")
    width_N = np.diff(cost_NK[order_N, 0], append=1.0)
    slices = (_area(cost_NK[order_N[: last + 1], 1], quality_N[order_N[: last + 1]]) for last in range(len(order_N)))
    return float(sum(width * area for width, area in zip(width_N, slices, strict=True) if width))


def _area(cost_N: NDArray[np.float64], quality_N: NDArray[np.float64]) -> float:
    order_N = np.argsort(cost_N)
    width_N = np.diff(cost_N[order_N], append=1.0)
    return float(width_N @ np.maximum.accumulate(quality_N[order_N]))


def hypervolume_history(study: optuna.Study) -> list[float]:
    """The hypervolume after each finished trial of a length study, in order of trial number.

    A trial stopped early leaves it as it was.

    Raises:
        NotLengthStudy: The study has other objectives, or does not know the cost of full length.
    """
    _check_objectives(study)
    finished = finished_trials(study)
    if not finished:
        return []
    fulls = [_full_cost(study.study_name, study.user_attrs, cost) for cost in _cost_names(study)]
    nothing = (0.0, *fulls)  # the reference point itself
    scores_NK = np.array([trial.values if trial.state is TrialState.COMPLETE else nothing for trial in finished])
    relative_NK = scores_NK[:, 1:] / fulls
    if len(fulls) == 1:
        return _growing_areas(relative_NK[:, 0], scores_NK[:, 0])
    return _growing_volumes(relative_NK, scores_NK[:, 0])


def choose(
    front: Front,
    *,
    max_drop: float | None = None,
    budget: float | None = None,
    max_latency_ms: float | None = None,
) -> FrontPoint:
    """The point of the front that serves a wish; exactly one wish is given.

    The report split is never looked at: it stays an honest check of the choice.

    Args:
        front: Where to choose.
        max_drop: The cheapest point whose metric is at most this far below full length's, in the metric's units.
        budget: The best point that costs at most this share of full length's MACs, in (0, 1].
        max_latency_ms: The best of the points that were timed which takes at most this long per sequence.
    Raises:
        NothingFits: Every point exceeds the budget or takes longer, or none was timed.
        ValueError: Several wishes or none are given, or a value is out of range.
    """
    try:
        return choose_point(
            front.points, front.full.metric, max_drop=max_drop, budget=budget, max_latency_ms=max_latency_ms
        )
    except model.front_file.NothingFits as error:
        if budget is None:
            raise NothingFits(f"Study {front.study!r}: {error}") from error
        cheapest = min(front.points, key=lambda point: point.relative_macs)
        raise NothingFits(
            f"No point of study {front.study!r} costs {budget:g} of full length or less; the cheapest is trial "
            f"{cheapest.trial}: ask for a budget of {smallest_budget(front.points):g} or more."
        ) from error


def front_to_json(front: Front, chosen: FrontPoint | None) -> dict[str, Any]:
    """The document of `hpo pareto --json`, made of plain numbers, strings, lists and dicts."""
    return {
        "study": front.study,
        "storage": front.storage,
        "trials": front.trials,
        "metric": {"name": front.metric, "direction": front.direction},
        "cost": {"name": front.cost, "unit": front.unit},
        **({"costs": list(front.costs)} if len(front.costs) > 1 else {}),
        "full": _point_to_json(front.full),
        "hypervolume": front.hypervolume,
        **({} if front.latency is None else {"latency": asdict(front.latency)}),
        **({} if front.predicted_for is None else {"predicted_for": asdict(front.predicted_for)}),
        **({"prediction": dict(front.prediction)} if front.prediction else {}),
        "points": [_point_to_json(point) for point in front.points],
        "chosen": None if chosen is None else _point_to_json(chosen),
    }


class _Column(NamedTuple):
    """A column of the table: what stands above it and in it, and whether the header may be folded at its spaces."""

    header: str
    cells: Sequence[str]
    folds: bool = False

    @property
    def least_width(self) -> int:
        words = self.header.split() if self.folds else self.header.splitlines()
        return max(len(text) for cell in (*words, *self.cells) for text in cell.splitlines())


def front_table(front: Front, chosen: FrontPoint | None, width: int | None = None) -> Table:
    """The front for a terminal: one row per point, then full length for comparison.

    What `width` has no room for is left out, which the caption says: FLOPs, whose share of full length's stays, the
    metrics beside the one that is searched, or both.
    """
    every, flops = tuple(front.beside), front.predicted_for is None
    kinds = [(every, flops, SHARES_PER_LINE)]
    kinds += [(every, flops, FEW_SHARES_PER_LINE), (every, False, FEW_SHARES_PER_LINE)]
    kinds += [((), flops, FEW_SHARES_PER_LINE), ((), False, FEW_SHARES_PER_LINE)]
    ruler = Console(width=WIDEST)
    for beside, with_flops, per_line in kinds:
        left_out = [printable(name) for name in every if name not in beside] + [FLOPS] * (flops and not with_flops)
        table = _table(front, chosen, _columns(front, beside, with_flops, per_line), left_out)
        if width is None or ruler.measure(table).minimum <= width:
            break
    return table


def _table(front: Front, chosen: FrontPoint | None, columns: Sequence[_Column], left_out: Sequence[str]) -> Table:
    table = Table(
        title=Text(
            f"{printable(front.study)}: {len(front.points)} best of {front.trials} trials, "
            f"hypervolume {front.hypervolume:.4f}"
        ),
        caption=Text(
            f"{printable(front.metric)} on the search split, which selects, and on the report split. FLOPs: mean per "
            f"sequence of the search split, {FLOPS_PER_MAC} per MAC; shares are of {BASELINE}."
            + ("" if front.latency is None else f" ms: per sequence, on {printable(str(front.latency))}.")
            + ("" if (law := front.predicted_for) is None else f" Predicted: the same, for {printable(str(law))}.")
            + ("" if chosen is None else " * marks the choice.")
            + ("" if front.full.skipped is None else " - marks a skipped layer.")
            + (f" No room here for {' and '.join(left_out)}." if left_out else "")
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", width=1)
    for column in columns:
        table.add_column(
            Text(column.header),
            justify="left" if column.header == KEPT else "right",
            no_wrap=not column.folds,
            min_width=column.least_width,
        )
    *points, full = zip(*(column.cells for column in columns), strict=True)
    for point, cells in zip(front.points, points, strict=True):
        is_chosen = chosen is not None and point.trial == chosen.trial
        table.add_row("*" if is_chosen else "", *cells, style="bold" if is_chosen else None)
    table.add_section()
    table.add_row("", *full)
    return table


def _columns(front: Front, beside: Sequence[str], flops: bool, shares_per_line: int) -> list[_Column]:
    """What the table has, with these metrics beside the one that is searched, and with FLOPs or without."""
    rows = (*front.points, front.full)
    kept = [percents(point.shares, point.skipped, shares_per_line) for point in front.points]
    columns = [
        _Column("trial", [str(point.trial) for point in rows]),
        _Column(KEPT, [*kept, "full length"]),
        _Column(f"{_spaced(front.metric)}\nsearch", [f"{point.metric:.4f}" for point in rows], folds=True),
        _Column(f"{_spaced(front.metric)}\nreport", [quality_text(point.report_metric) for point in rows], folds=True),
    ]
    for name in beside:
        cells = [quality_text(point.report_metrics.get(name)) for point in rows]
        columns.append(_Column(f"{_spaced(name)}\nreport", cells, folds=True))
    columns.append(_Column("share\nof full", [f"{point.relative_macs:.1%}" for point in rows]))
    if front.predicted_for is not None:
        columns.append(_Column("ms, pre-\ndicted", [predicted_text(point) for point in rows]))
    if flops:
        columns.append(_Column(FLOPS, [flops_text(point.macs) for point in rows]))
    if front.latency is not None:
        columns.append(_Column("ms", [latency_text(point) for point in rows]))
    return columns


def _spaced(name: str) -> str:
    return printable(name).replace("_", " ")


def constant_rate(params: Mapping[str, Any]) -> float | None:
    """The retention that all layers of a trial share; None where they differ or one is skipped."""
    rates = {round(value, DECIMALS) for name, value in params.items() if name.startswith(RETENTION)}
    skips = any(value for name, value in params.items() if name.startswith(SKIP))
    return rates.pop() if len(rates) == 1 and not skips else None


def config_of(parameters: Mapping[str, Any]) -> LengthConfig:
    """The length config that a trial's `retention_0 .. retention_{L-1}` and any `skip_i` stand for."""
    layers = range(sum(name.startswith(RETENTION) for name in parameters))
    skipped = [layer for layer in layers if parameters.get(f"{SKIP}{layer}")]
    return LengthConfig.from_retention([parameters[f"{RETENTION}{layer}"] for layer in layers], skipped)


def percents(shares: Sequence[float], skipped: Collection[int] | None = None, per_line: int = SHARES_PER_LINE) -> str:
    """Shares in whole percent, aligned: `(0.9, 0.81)` -> `' 90  81'`; skipped layers are hyphens."""
    numbers = [f"{share:.0%}".rstrip("%") if share >= 0.005 else "<1" for share in shares]
    numbers = ["-" if layer in (skipped or ()) else number for layer, number in enumerate(numbers)]
    lines = [numbers[start : start + per_line] for start in range(0, len(numbers), per_line)]
    return "\n".join(" ".join(f"{number:>3}" for number in line) for line in lines)


def flops_text(macs: float) -> str:
    """Floating-point operations of `macs` multiply-accumulates, e.g. `'1.23 GFLOPs'`."""
    flops = FLOPS_PER_MAC * macs
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= 0.9995 * size:  # 999,500 and more read as mega
            number = f"{flops / size:#.3g}".rstrip(".")
            return f"{number} {prefix}FLOPs"
    return f"{flops:.0f} FLOPs"


def quality_text(value: float | None) -> str:
    """A metric, or a hyphen where it was not computed."""
    return "-" if value is None else f"{value:.4f}"


def latency_text(point: FrontPoint) -> str:
    """Milliseconds per sequence, or a hyphen."""
    return "-" if point.latency_ms is None else ms_text(point.latency_ms)


def predicted_text(point: FrontPoint) -> str:
    """Predicted milliseconds per sequence, or a hyphen."""
    return "-" if point.predicted_ms is None else ms_text(point.predicted_ms)


def ms_text(ms: float) -> str:
    """Milliseconds with three digits, or in whole ones, never as powers of ten: `'10.3'`, `'1235'`."""
    return f"{ms:.0f}" if ms >= 999.5 else f"{ms:.3g}"


def _check_objectives(study: optuna.Study) -> None:
    maximize, minimize = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    if study.directions not in ([maximize, minimize], [maximize, minimize, minimize]):
        directions = ", ".join(direction.name.lower() for direction in study.directions)
        raise NotLengthStudy(
            f"Study {study.study_name!r} has the objectives ({directions}), a front needs (maximize, minimize); "
            "name a study made with `hpo search-lengths`."
        )


def _cost_names(study: optuna.Study) -> tuple[str, ...]:
    """What the objectives beside quality are, where they are named; else MACs."""
    return tuple((study.metric_names or ["metric", MACS])[1:])


def _scores(point: FrontPoint, costs: Sequence[str]) -> tuple[float, ...]:
    """Quality and costs."""
    return point.metric, *((point.predicted_ms or 0.0) if cost == MS else point.macs for cost in costs)


def _full_cost(name: str, attrs: Mapping[str, Any], cost: str) -> float:
    """Of full length, as the study records it."""
    if cost != MS:
        return _full_macs(name, attrs)
    if FULL_MS not in attrs:
        raise NotLengthStudy(
            f"Study {name!r} does not record the time of full length; name a study made with `hpo search-lengths`."
        )
    return float(attrs[FULL_MS])


def _full_macs(name: str, attrs: Mapping[str, Any]) -> float:
    if "full_macs" not in attrs:
        raise NotLengthStudy(
            f"Study {name!r} does not record the cost of full length; name a study made with `hpo search-lengths`."
        )
    return float(attrs["full_macs"])


def _latencies(attrs: Mapping[str, Any]) -> tuple[LatencySource | None, float | None, dict[int, float]]:
    """One record of `hpo bench`: where it was measured, full length's milliseconds, and those of each trial.

    This machine's records come before others', then those of what a study's times are predicted for, over as many
    sequences, those over fewer than usual last, single sequences before batches, and the newest before older ones.
    """
    records = [value for name, value in attrs.items() if name.startswith(LATENCY)]
    if not records:
        return None, None, {}
    from model.timing import SEQUENCES  # brings transformers with it, which a front without times does without

    own = processor_name()
    records.sort(key=lambda record: str(record["measured_at"]), reverse=True)
    wanted = _source(attrs[TABLE]) if TABLE in attrs else None

    def rank(one: Mapping[str, Any]) -> tuple[Any, ...]:
        is_wanted = _source(one) == wanted
        fewer = SEQUENCES - one["sequences"]  # a smaller split has all its sequences timed
        apart = abs(fewer) if is_wanted else max(0, fewer)
        return one["processor"] != own, not is_wanted, apart, one["batch_size"]

    record = min(records, key=rank)
    return _source(record), record["full"]["ms"], {point["trial"]: point["ms"] for point in record["points"]}


def _source(record: Mapping[str, Any]) -> LatencySource:
    return LatencySource(**{name: record[name] for name in ("processor", "threads", "precision", "batch_size")})


def _front_point(
    trial: FrozenTrial, study: str, attrs: Mapping[str, Any], costs: Sequence[str], latency_ms: float | None
) -> FrontPoint:
    shares, skipped = trial.user_attrs.get("shares"), trial.user_attrs.get("skipped")
    if shares is None:
        try:
            config = config_of(trial.params)
        except (KeyError, ValueError) as error:
            raise NotLengthStudy(
                f"Trial {trial.number} of study {study!r} records no length config; "
                "name a study made with `hpo search-lengths`."
            ) from error
        shares = config.shares or ()
        if any(name.startswith(SKIP) for name in trial.params):
            skipped = config.skipped
    metric, values = trial.values[0], dict(zip(costs, trial.values[1:], strict=True))
    predicted_ms = values.pop(MS, None)
    macs = next(iter(values.values())) if values else trial.user_attrs[MACS]
    report_macs, report_full_macs = attrs.get(f"report_macs:{trial.number}"), attrs.get("report_full_macs")
    return FrontPoint(
        trial=trial.number,
        shares=tuple(float(share) for share in shares),
        metric=metric,
        report_metric=attrs.get(f"report_metric:{trial.number}"),
        macs=macs,
        relative_macs=macs / _full_macs(study, attrs),
        report_relative_macs=report_macs / report_full_macs if report_macs and report_full_macs else None,
        latency_ms=latency_ms,
        metrics=trial.user_attrs.get("metrics") or {},
        report_metrics=attrs.get(f"report_metrics:{trial.number}") or {},
        origin=trial.user_attrs.get(ORIGIN),
        skipped=None if skipped is None else tuple(skipped),
        predicted_ms=predicted_ms,
        relative_ms=None if predicted_ms is None else predicted_ms / _full_cost(study, attrs, MS),
    )


def _growing_areas(relative_cost_N: NDArray[np.float64], quality_N: NDArray[np.float64]) -> list[float]:
    """`hypervolume` of the first point, of the first two, and so on to all N; each point costs O(N) at most."""
    cost_N = np.minimum(relative_cost_N, 1.0)
    order_N = np.argsort(cost_N)
    rank_N = np.argsort(order_N)
    width_N = np.diff(cost_N[order_N], append=1.0)
    best_N = np.zeros_like(cost_N)  # the best quality so far at each cost or below, cheapest first
    areas = []
    for rank, quality in zip(rank_N, quality_N, strict=True):
        np.maximum(best_N[rank:], quality, out=best_N[rank:])
        areas.append(float(width_N @ best_N))
    return areas


def _growing_volumes(relative_costs_NK: NDArray[np.float64], quality_N: NDArray[np.float64]) -> list[float]:
    """`hypervolume` of the first point, of the first two, and so on; computed anew where the front changes."""
    volumes: list[float] = []
    front: list[int] = []
    for number in range(len(quality_N)):
        reached = (relative_costs_NK[front] <= relative_costs_NK[number]).all(axis=1)
        if (reached & (quality_N[front] >= quality_N[number])).any():
            volumes.append(volumes[-1])
            continue
        candidates = [*front, number]
        front = [candidates[index] for index in members(relative_costs_NK[candidates], quality_N[candidates])]
        volumes.append(hypervolume(relative_costs_NK[front].tolist(), quality_N[front].tolist()))
    return volumes


def _distinct_by_cost(points: Sequence[FrontPoint], costs: Sequence[str]) -> tuple[FrontPoint, ...]:
    earliest: dict[tuple[float, ...], FrontPoint] = {}
    for point in points:
        quality, *own = _scores(point, costs)
        earliest.setdefault((*own, quality), point)
    return tuple(earliest[score] for score in sorted(earliest))


def _point_to_json(point: FrontPoint) -> dict[str, Any]:
    names = ["trial", "shares", "metric", "report_metric", "macs", "relative_macs", "latency_ms"]
    if point.skipped is not None:
        names.insert(2, "skipped")
    if len(point.metrics) > 1:
        names += ["metrics", "report_metrics"]
    if point.predicted_ms is not None:
        names += ["predicted_ms", "relative_ms"]
    fields = asdict(point)
    return {name: list(fields[name]) if name in ("shares", "skipped") else fields[name] for name in names}
