"""The front of an exported model: which length configs it may run under, how good each is and what it costs.

It lies as JSON beside the weights, so that a folder can be served without the study it came from.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, TypeVar

from model.length_config import LengthConfig

FRONT_FILE = "length_front.json"
POINT_FIELDS = ("trial", "metric", "report_metric", "macs", "relative_macs", "latency_ms")
FORMAT = 1
"""Of the file; a reader refuses what a later version wrote."""
SLACK = 1e-9  # lets a metric of 0.89 pass a bound of 0.9 - 0.01, however the two were rounded


class ExportError(ValueError):
    """A folder that is no usable export, or a wish it cannot serve; the message says what to do."""


class NothingFits(ExportError):
    """Every point of the front exceeds the budget asked for."""


class Scored(Protocol):
    """What a choice among points looks at."""

    @property
    def metric(self) -> float:
        """Quality on the search split."""

    @property
    def relative_macs(self) -> float:
        """Cost as a share of full length."""

    @property
    def latency_ms(self) -> float | None:
        """Measured time of one sequence; None where it was not measured."""


Point = TypeVar("Point", bound=Scored)


@dataclass(frozen=True, kw_only=True)
class ServedPoint:
    """One length config that a model may run under.

    Attributes:
        trial: Number of the trial that found it.
        length_config: Tokens left after each layer, and layers that are skipped.
        metric: Quality on the search split, on which it was selected.
        report_metric: Quality on the report split; None where it was not scored there.
        macs: Mean MACs of the search split's real sequences.
        relative_macs: `macs` as a share of the same model at full length without padding.
        latency_ms: Time of one sequence where `hpo bench` measured it; None where it did not.
    """

    trial: int
    length_config: LengthConfig
    metric: float
    report_metric: float | None
    macs: float
    relative_macs: float
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An ONNX graph beside the file; it runs under the chosen config alone.

    Attributes:
        file: Its name.
        opset: ONNX's.
        precision: "float32", "int8-dynamic" or "int8-static".
        fixed_length: Tokens that every sequence is padded to; None where the length is free.
        token_types: Whether the tokenizer tells the texts of a pair apart; else all tokens are of type 0.
        report_metric: The graph's own quality on the report split; None where it was not measured.
    """

    file: str
    opset: int
    precision: str
    fixed_length: int | None
    token_types: bool
    report_metric: float | None = None


@dataclass(frozen=True, kw_only=True)
class ServedFront:
    """All that serving a folder needs beside weights and tokenizer.

    Attributes:
        task: What the head predicts.
        kind: What is predicted, one of `model.data.KINDS`.
        label_names: Names of the classes or tags, in order of their ids; empty where there are none.
        text_columns: The dataset's names of what a prediction starts from.
        max_length: Tokens after which a text is cut, or a window of a question's context.
        stride: Tokens that neighbouring windows of a context share; None where there are no windows.
        metric: Name of the quality.
        full: The full length.
        points: The front by rising cost.
        chosen: The point that the folder was exported for; it may lie off the front.
        versions: Libraries it was made with.
        graph: An ONNX graph; None where the folder holds a transformers model.
        scored_length: What `max_length` was where the points were scored; None in folders that do not tell.
        files: Names of all that `hpo export` put into the folder; empty in folders that do not tell.
    """

    task: str
    kind: str
    label_names: tuple[str, ...]
    text_columns: tuple[str, ...]
    max_length: int
    stride: int | None
    metric: str
    full: ServedPoint
    points: tuple[ServedPoint, ...]
    chosen: ServedPoint
    versions: Mapping[str, str] = field(default_factory=dict)
    graph: Graph | None = None
    scored_length: int | None = None
    files: tuple[str, ...] = ()

    def choose(
        self, *, max_drop: float | None = None, budget: float | None = None, max_latency_ms: float | None = None
    ) -> ServedPoint:
        """The point that serves a wish, as `choose_point` says; without one the point it was exported for.

        Raises:
            NothingFits: Every point exceeds the budget or takes longer.
            ExportError: Several are given, or a value is out of range.
        """
        if max_drop is None and budget is None and max_latency_ms is None:
            return self.chosen
        return choose_point(
            self.points, self.full.metric, max_drop=max_drop, budget=budget, max_latency_ms=max_latency_ms
        )

    def _problem(self) -> str | None:
        """What is wrong with values that a file may hold; None if nothing."""
        every = (self.full, self.chosen, *self.points)
        layers = {point.length_config.num_layers for point in every}
        numbers = [number for point in every for number in (point.metric, point.relative_macs, point.latency_ms or 0.0)]
        lengths = (self.max_length, 0 if self.stride is None else self.stride)
        for is_wrong, problem in (
            (not self.points, "no points"),
            (len(layers) > 1, f"length configs of {' and '.join(map(str, sorted(layers)))} layers"),
            (not all(isinstance(length, int) for length in lengths), "lengths that are no whole numbers"),
            (not all(isinstance(number, Real) for number in numbers), "points whose quality or cost is no number"),
            (not self.text_columns, "no text columns"),
        ):
            if is_wrong:
                return problem
        return None

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        fields = asdict(self)
        for name in ("full", "chosen"):
            fields[name] = _point_to_json(getattr(self, name))
        fields["points"] = [_point_to_json(point) for point in self.points]
        document = {"format": FORMAT, **fields}
        (folder / FRONT_FILE).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "ServedFront":
        """Read the file of a folder.

        Raises:
            ExportError: There is none, it is damaged, or a later version of this tool wrote it.
        """
        path = Path(folder) / FRONT_FILE
        if not path.is_file():
            raise ExportError(f"{folder} is no export: it has no {FRONT_FILE}; make one with `hpo export`.")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            written = fields.pop("format")
            if written != FORMAT:
                raise ExportError(
                    f"{path} has the format {written!r}, this version of hpo reads {FORMAT}; use the version that "
                    "wrote it, or export again with this one."
                )
            for name in ("full", "chosen"):
                fields[name] = _point_from_json(fields[name])
            fields["points"] = tuple(_point_from_json(point) for point in fields["points"])
            fields["graph"] = None if fields["graph"] is None else Graph(**fields["graph"])
            for name in ("label_names", "text_columns", "files"):
                fields[name] = tuple(fields.get(name, ()))
            front = cls(**fields)
            if problem := front._problem():
                raise ValueError(problem)
            return front
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ExportError):
                raise
            raise ExportError(f"{path} cannot be read ({error!r}); export the model again.") from error


def choose_point(
    points: Sequence[Point],
    full_metric: float,
    *,
    max_drop: float | None = None,
    budget: float | None = None,
    max_latency_ms: float | None = None,
) -> Point:
    """The point of a front that serves a wish; exactly one wish is given.

    Args:
        points: By rising cost; one is as good as full length, unless they are the choice of another.
        full_metric: Quality of full length.
        max_drop: The cheapest point whose metric is at most this far below full length's, in the metric's units.
        budget: The best point that costs at most this share of full length's MACs, in (0, 1].
        max_latency_ms: The best point whose measured time is at most this; points that were not timed do not count.
    Raises:
        NothingFits: Every point exceeds the budget, loses more or takes longer, or none was timed.
        ExportError: Several wishes or none are given, or a value is no number or out of range.
    """
    wishes: dict[str, Any] = {"max_drop": max_drop, "budget": budget, "max_latency_ms": max_latency_ms}
    if sum(wish is not None for wish in wishes.values()) != 1:
        given = " and ".join(f"{name}={wish}" for name, wish in wishes.items())
        raise ExportError(f"{given}; give exactly one of them.")
    for name, wish in wishes.items():
        if wish is not None and not isinstance(wish, Real):
            raise ExportError(f"{name}={wish!r}; choose a number.")
    if max_latency_ms is not None:
        return _within_time(points, max_latency_ms)
    if max_drop is not None:
        if not max_drop >= 0.0:
            raise ExportError(f"max_drop={max_drop}; choose 0 or more, in units of the metric.")
        good = [point for point in points if point.metric >= full_metric - max_drop - SLACK]
        if not good:
            lost = full_metric - max(point.metric for point in points)
            raise NothingFits(f"Every point loses more than {max_drop:g}; the least loss is {lost:.4g}: ask for more.")
        return good[0]
    if budget is None or not 0.0 < budget <= 1.0:
        raise ExportError(f"budget={budget}; choose a share of full length in (0, 1].")
    affordable = [point for point in points if point.relative_macs <= budget + SLACK]
    if not affordable:
        raise NothingFits(
            f"No point costs {budget:g} of full length or less; ask for a budget of {smallest_budget(points):g} or "
            "more, the smallest there is."
        )
    return max(affordable, key=lambda point: point.metric)


def _within_time(points: Sequence[Point], max_latency_ms: float) -> Point:
    """The best timed point that takes at most this long."""
    if not max_latency_ms > 0.0:
        raise ExportError(f"max_latency_ms={max_latency_ms}; choose more than 0 milliseconds.")
    timed = [(point.latency_ms, point) for point in points if point.latency_ms is not None]
    if not timed:
        raise NothingFits("No point was timed; run `hpo bench`, and export again what is served from a folder.")
    fast = [point for latency_ms, point in timed if latency_ms <= max_latency_ms]
    if not fast:
        least_ms = math.ceil(min(latency_ms for latency_ms, _ in timed) * 1e3) / 1e3
        shown = f"{least_ms:.3f}".rstrip("0").rstrip(".")  # digits left out might make it less
        raise NothingFits(
            f"No point that was timed takes {max_latency_ms:g} ms or less; ask for {shown} ms or more, the least "
            "there is."
        )
    return max(fast, key=lambda point: point.metric)


def smallest_budget(points: Sequence[Scored]) -> float:
    """The cost of the cheapest point, rounded up to what a person would write."""
    return math.ceil(min(point.relative_macs for point in points) * 1e4) / 1e4


def _point_to_json(point: ServedPoint) -> dict[str, Any]:
    fields = {name: getattr(point, name) for name in POINT_FIELDS}
    config: dict[str, Any] = json.loads(point.length_config.to_json())
    return {"trial": fields.pop("trial"), "skipped": [], **config, **fields}


def _point_from_json(fields: Mapping[str, Any]) -> ServedPoint:
    own = {"latency_ms": None, **{name: fields[name] for name in POINT_FIELDS if name in fields}}
    config = {name: value for name, value in fields.items() if name not in own}
    return ServedPoint(length_config=LengthConfig.from_json(json.dumps(config)), **own)
