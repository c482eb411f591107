"""Draws a front and its search: plotly figures, one offline HTML page, PNG and SVG."""

import asyncio
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go

from hpo.front import (
    BASELINE,
    FLOPS_PER_MAC,
    MS,
    ORIGINS,
    SHARES_PER_LINE,
    Front,
    FrontPoint,
    flops_text,
    latency_text,
    percents,
    predicted_text,
    quality_text,
)
from model.length_config import SKIPPED, LengthConfig

logger = logging.getLogger(__name__)

# Okabe & Ito's colours, told apart by colour-blind readers too; marker shapes say the same without colour.
BLUE, SKY, ORANGE, GREEN, BLACK, GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#222222", "#9A9A9A"
PURPLE = "#CC79A7"
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
STEP = "hv"  # what a budget buys stays the same until the next point is affordable
IMAGE_WIDTH, IMAGE_HEIGHT, IMAGE_SCALE = 1000, 620, 2
PAGE_CONFIG = {  # nothing on the page offers to send the chart elsewhere
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
}
IMAGE_KINDS = ("png", "svg", "pdf", "jpg", "jpeg", "webp")
IMAGE_TIMEOUT_S = 30
CLOSE_TIMEOUT_S = 2


def draw_front(front: Front, chosen: FrontPoint | None = None, cost: str | None = None) -> go.Figure:
    """Quality against cost: the front on both splits, and what to compare it with.

    Each point stands at the cost it has on the split it was scored on; predicted times are those of the search split.
    Where the study has two costs, the front is no line over either.

    Args:
        front: What to draw.
        chosen: The point to mark, if any.
        cost: Which of the front's costs; None for the first.
    """
    cost = cost or front.costs[0]
    line = "lines+markers" if len(front.costs) == 1 else "markers"
    figure = go.Figure()
    if front.dominated:
        marker = {"color": GREY, "size": 5, "opacity": 0.45}
        figure.add_trace(_search_trace(front, cost, front.dominated, "other trials", mode="markers", marker=marker))
    if front.constant_rate:
        marker = {"color": ORANGE, "size": 8, "symbol": "triangle-up"}
        style = {"marker": marker, "line": {"color": ORANGE, "width": 1.5, "dash": "dot", "shape": STEP}}
        name = "same retention in every layer"
        figure.add_trace(_search_trace(front, cost, front.constant_rate, name, mode="lines+markers", **style))
    style = {"marker": {"color": BLUE, "size": 8}, "line": {"color": BLUE, "width": 2, "shape": STEP}}
    figure.add_trace(_search_trace(front, cost, front.points, "front, search split", mode=line, **style))
    for origin in dict.fromkeys(point.origin for point in front.seeds):
        seeds = [point for point in front.seeds if point.origin == origin]
        marker = {"color": PURPLE, "size": 12, "symbol": "star", "line": {"color": "white", "width": 1}}
        name = _text(ORIGINS.get(str(origin), str(origin)))
        figure.add_trace(_search_trace(front, cost, seeds, name, mode="markers", marker=marker))
    reported = [point for point in front.points if point.report_metric is not None]
    if reported:
        figure.add_trace(_report_trace(front, cost, reported))
    marker = {"color": BLACK, "size": 12, "symbol": "diamond"}
    figure.add_trace(_search_trace(front, cost, [front.full], "full length", mode="markers", marker=marker))
    if chosen is not None:
        marker = {"color": GREEN, "size": 18, "symbol": "circle-open", "line": {"color": GREEN, "width": 3}}
        figure.add_trace(_search_trace(front, cost, [chosen], "chosen", mode="markers", marker=marker))
    absolute = f"{flops_text(front.full.macs)} per sequence of the search split"
    quantity = "FLOPs"
    if cost == MS:
        absolute = f"{predicted_text(front.full)} ms per sequence, for {_text(str(front.predicted_for))}"
        quantity = "predicted time"
    lay_out(figure, f"{_text(front.metric)} against {_against(cost)}", f"100% is {BASELINE},<br>{absolute}")
    title = f"{quantity} per sequence, share of full length"
    figure.update_xaxes(title_text=title, tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(title_text=_text(front.metric))
    return figure


def draw_hypervolume(history: Sequence[float]) -> go.Figure:
    """The dominated area after each finished trial: where it is flat, more trials found nothing better.

    The first trials rise so steeply that nothing else would be seen; the axis starts where a twentieth is done.

    Args:
        history: The hypervolume after each finished trial.
    """
    figure = go.Figure()
    figure.add_trace(
        go.Scatter(
            x=list(range(1, len(history) + 1)),
            y=list(history),
            name="hypervolume",
            mode="lines" if len(history) > 1 else "markers",
            line={"color": BLUE, "width": 2, "shape": STEP},
            hovertemplate="after %{x} trials: %{y:.4f}<extra></extra>",
        )
    )
    lay_out(
        figure,
        "Progress of the search",
        "what the front dominates up to quality 0 at full cost,<br>in units of the metric times the shares of costs",
    )
    figure.update_xaxes(title_text="finished trials", rangemode="tozero")
    figure.update_yaxes(title_text="hypervolume")
    if history and history[-1] > (low := history[len(history) // 20]):
        margin = (history[-1] - low) / 20
        figure.update_yaxes(range=[low - margin, history[-1] + margin])
    return figure


def write_page(front: Front, history: Sequence[float], path: Path, chosen: FrontPoint | None = None) -> None:
    """Write one HTML page with both figures and a table; it needs no network and no other file.

    Args:
        front: What to show.
        history: The hypervolume after each finished trial.
        path: Where the page goes; its folder is made where missing, an older page is replaced.
        chosen: The point to mark, if any.
    Raises:
        OSError: The page cannot be written there; an older page stays as it was.
    """
    figures = [*((draw_front(front, chosen, cost), 530) for cost in front.costs), (draw_hypervolume(history), 290)]
    against = " and ".join(map(_against, front.costs))
    page = _PAGE.substitute(
        title=escape(f"{front.study}: {front.metric} against {against}"),
        against=against,
        study=escape(front.study),
        facts=_facts(front, chosen),
        figures="\n".join(_figure(number, *figure) for number, figure in enumerate(figures)),
        rows=_rows(front, chosen),
        metric=escape(front.metric),
        beside="\n".join(f"<th>{escape(name)},<br>report split</th>" for name in front.beside),
        time=("" if front.predicted_for is None else "<th>ms,<br>predicted</th>")
        + ("" if front.latency is None else "<th>ms per<br>sequence</th>"),
        median="" if front.median_tokens is None else f"of {front.median_tokens} tokens, the median",
        flops_per_mac=FLOPS_PER_MAC,
        baseline=BASELINE,
        hyphen="" if front.full.skipped is None else " A hyphen stands for a layer that is skipped.",
        storage=escape(front.storage),
    )
    _replace(path, page.encode())


def _figure(number: int, figure: go.Figure, height: int) -> str:
    """A figure of the page, as HTML; its title stands above it, where the lines of a narrow screen are broken.

    Args:
        number: Of the figure; the first brings plotly with it.
        figure: What `lay_out` has laid out.
        height: Without the title, in pixels.
    """
    title = figure.layout.title  # escaped already, as plotly takes it
    heading = f'<h2>{title.text}</h2>\n<p class="note">{title.subtitle.text}</p>'
    bare = go.Figure(figure).update_layout(title=None, margin={"t": 34})
    drawn = bare.to_html(
        full_html=False,
        include_plotlyjs=number == 0,
        div_id=f"figure-{number}",
        default_height=f"{height}px",
        config=PAGE_CONFIG,
    )
    return f'{heading}\n<div class="figure">{drawn}</div>'


def image_kind(path: Path) -> str:
    """What a path's ending makes of an image.

    Raises:
        ValueError: It is none of `IMAGE_KINDS`.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind not in IMAGE_KINDS:
        raise ValueError(f"Cannot draw {path.name!r}; end its name with one of {', '.join(IMAGE_KINDS)}.")
    return kind


def write_image(figure: go.Figure, path: Path) -> bool:
    """Write a figure as PNG, SVG, PDF, JPEG or WebP, by the path's ending; True where that worked.

    kaleido draws with an installed Chrome or Chromium: the one named by `BROWSER_PATH`, else the first on the PATH.
    Where there is none, or it does not draw in time, nothing is written, the log says so and the caller goes on.

    Args:
        figure: What to draw.
        path: Where the image goes; its folder is made where missing, an older image is replaced.
    Raises:
        ValueError: The path has another ending.
        OSError: The image cannot be written there; an older one stays as it was.
    """
    kind = image_kind(path)
    # Imported only here, since the import replaces the process's logger class.
    from kaleido.errors import ChromeNotFoundError, KaleidoError

    try:
        # In a thread of its own, since the caller (a notebook, say) may be running an event loop.
        with _silent("choreographer", "kaleido"), ThreadPoolExecutor(1) as executor:
            image = executor.submit(asyncio.run, _render(figure, kind)).result()
    except ChromeNotFoundError:
        logger.warning("%s is not drawn: install Chrome or Chromium, or name one in BROWSER_PATH.", path.name)
        return False
    except (KaleidoError, RuntimeError, OSError) as error:  # the many ways in which a browser fails
        reason = str(error.args[0] if error.args else f"no image within {IMAGE_TIMEOUT_S} s").splitlines()[0]
        logger.warning("%s is not drawn: the browser failed (%s).", path.name, reason)
        return False
    _replace(path, image)
    return True


async def _render(figure: go.Figure, kind: str) -> bytes:
    from kaleido import Kaleido

    browser = Kaleido(mathjax=False, timeout=IMAGE_TIMEOUT_S)  # MathJax would come from the network
    options = {"format": kind, "width": IMAGE_WIDTH, "height": IMAGE_HEIGHT, "scale": IMAGE_SCALE}
    try:
        async with asyncio.timeout(IMAGE_TIMEOUT_S):
            await browser.open()
            image: bytes = await browser.calc_fig(figure.to_dict(), options)
            return image
    finally:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):  # a browser that does not answer is then killed
            await browser.close()


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Log nothing under `names` meanwhile: what matters of it arrives as an exception."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _replace(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename into it, so that no reader ever sees half of it."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _text(text: str) -> str:
    """Text that plotly shows as it stands, rather than reading tags in it."""
    return escape(text, quote=False)


def _search_trace(front: Front, cost: str, points: Sequence[FrontPoint], name: str, **style: Any) -> go.Scatter:
    return go.Scatter(
        x=[point.relative(cost) for point in points],
        y=[point.metric for point in points],
        hovertext=[_hover(front, point) for point in points],
        hoverinfo="text",
        name=name,
        **style,
    )


def _report_trace(front: Front, cost: str, points: Sequence[FrontPoint]) -> go.Scatter:
    return go.Scatter(
        x=[(cost != MS and point.report_relative_macs) or point.relative(cost) for point in points],
        y=[point.report_metric for point in points],
        hovertext=[_hover(front, point) for point in points],
        hoverinfo="text",
        name="front, report split",
        mode="markers",
        marker={"color": SKY, "size": 9, "symbol": "circle-open", "line": {"color": SKY, "width": 2}},
    )


def _against(cost: str) -> str:
    """What a quality is drawn against where this is the cost."""
    return "predicted time" if cost == MS else "compute"


def _hover(front: Front, point: FrontPoint) -> str:
    shares = "<br>".join(_text(" ".join(line.split())) for line in percents(point.shares, point.skipped).splitlines())
    lines = [
        f"<b>trial {point.trial}</b>",
        f"{_text(front.metric)}, search split: {point.metric:.4f}",
        f"FLOPs: {point.relative_macs:.1%} of full length ({flops_text(point.macs)})",
        f"left after each layer, %:<br>{shares}",
    ]
    if point.predicted_ms is not None and point.relative_ms is not None:
        lines.insert(3, f"predicted time: {predicted_text(point)} ms per sequence, {point.relative_ms:.1%}")
    if point.latency_ms is not None and front.latency is not None:
        lines.insert(3, f"time: {latency_text(point)} ms per sequence,<br>{_text(str(front.latency))}")
    if point.report_metric is not None:
        share = "" if point.report_relative_macs is None else f" at {point.report_relative_macs:.1%} of FLOPs"
        lines.insert(2, f"{_text(front.metric)}, report split: {point.report_metric:.4f}{share}")
        for name in (name for name in reversed(front.beside) if name in point.report_metrics):
            lines.insert(3, f"{_text(name)}, report split: {point.report_metrics[name]:.4f}")
    if front.median_tokens is not None:
        lengths = "<br>".join(_lines(_lengths(front, point)))
        lines.append(f"of {front.median_tokens} tokens, the median:<br>{lengths}")
    return "<br>".join(lines)


def _lengths(front: Front, point: FrontPoint) -> list[str]:
    """Tokens left after each layer of a sequence of median length; hyphens where layers are skipped."""
    if front.median_tokens is None:
        return []
    config = LengthConfig.from_shares(point.shares, point.skipped or ())
    counts = enumerate(config.lengths(front.median_tokens))
    return [SKIPPED if layer in config.skipped else str(count) for layer, count in counts]


def _lines(numbers: Sequence[str]) -> Iterator[str]:
    for start in range(0, len(numbers), SHARES_PER_LINE):
        yield " ".join(numbers[start : start + SHARES_PER_LINE])


def lay_out(figure: go.Figure, title: str, subtitle: str) -> None:
    """The look that all figures share: white ground, title above, legend below the axis title."""
    axis = {"showline": True, "linecolor": "#888888", "gridcolor": "#EBEBEB", "zeroline": False, "ticks": "outside"}
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 14, "color": BLACK},
        title={
            "text": title,
            "subtitle": {"text": subtitle, "font": {"size": 13, "color": "#555555"}},
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "font": {"size": 19},
        },
        margin={"l": 70, "r": 24, "t": 104, "b": 60},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"family": FONT, "size": 13, "color": BLACK}},
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    figure.update_xaxes(automargin=True, title_standoff=12, title_font_size=14, **axis)  # room on a narrow screen
    figure.update_yaxes(automargin=True, title_standoff=12, title_font_size=14, **axis)


def _facts(front: Front, chosen: FrontPoint | None) -> str:
    """The page's list of what was searched, as HTML."""
    facts = {
        "Model": str(front.workload.get("model", "not recorded")),
        "Dataset": str(front.workload.get("data", {}).get("dataset", "not recorded")),
        "Metric": f"{front.metric} ({front.direction}); full length: {_scores(front.full)}",
        "Baseline (100%)": f"{BASELINE}: {flops_text(front.full.macs)} per sequence of the search split",
        "Trials": f"{front.trials} finished, {len(front.points)} on the front, hypervolume {front.hypervolume:.4f}",
    }
    if front.predicted_for is not None:
        facts["Predicted time"] = (
            f"per sequence, for {front.predicted_for}; full length: {predicted_text(front.full)} ms"
        )
    if front.prediction:
        facts["Predictions"] = (
            f"{front.prediction['median_error']:.1%} off (median) and {front.prediction['worst_error']:.1%} at worst "
            f"where {front.prediction['points']:.0f} points were timed in the end"
        )
    if front.latency is not None:
        facts["Time"] = f"per sequence, on {front.latency}; full length: {latency_text(front.full)} ms"
    if chosen is not None:
        facts["Chosen"] = (
            f"trial {chosen.trial} at {chosen.relative_macs:.1%} of the FLOPs ({flops_text(chosen.macs)}): "
            f"{_scores(chosen)}"
        )
    return "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())


def _scores(point: FrontPoint) -> str:
    report = "" if point.report_metric is None else f", {point.report_metric:.4f} on the report split"
    return f"{point.metric:.4f} on the search split{report}"


def _rows(front: Front, chosen: FrontPoint | None) -> str:
    """The page's table body, as HTML: the front, then full length."""
    rows = [
        _row(front, point, "chosen" if chosen is not None and point.trial == chosen.trial else "")
        for point in front.points
    ]
    return "\n".join([*rows, _row(front, front.full, "full")])


def _row(front: Front, point: FrontPoint, role: str) -> str:
    label = {"chosen": f"{point.trial} (chosen)", "full": f"{point.trial} (full length)"}.get(role, str(point.trial))
    cells = (
        label,
        f"{point.metric:.4f}",
        quality_text(point.report_metric),
        *(quality_text(point.report_metrics.get(name)) for name in front.beside),
        f"{point.relative_macs:.1%}",
        flops_text(point.macs),
        *([] if front.predicted_for is None else [predicted_text(point)]),
        *([] if front.latency is None else [latency_text(point)]),
        " ".join(percents(point.shares, point.skipped).split()),
        " ".join(_lengths(front, point)),
    )
    return f'<tr class="{role}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 1100px; padding: 24px; color: #222; background: #fff;
       font: 16px/1.5 Inter, "Segoe UI", "Helvetica Neue", Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 32px 0 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0 0 24px; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
.figure { margin: 0 0 28px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { vertical-align: bottom; color: #555; font-weight: 600; }
td:nth-last-child(-n+2), th:nth-last-child(-n+2) { text-align: left; }
tr.chosen td { background: #e3f4ee; font-weight: 600; }
tr.full td { border-top: 2px solid #888; }
h2 + p.note { margin: 0; }
p.note { color: #555; font-size: 14px; max-width: 75ch; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  body { padding: 12px; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; }
}
</style>
</head>
<body>
<h1>Study $study: $metric against $against</h1>
<dl>
$facts
</dl>
$figures
<h2>The front</h2>
<div class="scroll">
<table>
<thead><tr>
<th>trial</th>
<th>$metric,<br>search split</th>
<th>$metric,<br>report split</th>
$beside
<th>share of<br>full length</th>
<th>FLOPs per<br>sequence</th>
$time
<th>left after each layer,<br>% of the sequence's tokens</th>
<th>left after each layer<br>$median</th>
</tr></thead>
<tbody>
$rows
</tbody>
</table>
</div>
<p class="note">Trials are selected on the search split, carved out of the training data; the report split only checks
them afterwards. FLOPs count $flops_per_mac per multiply-accumulate and are the mean over the search split's real
sequences; shares are of $baseline.$hyphen Computed from $storage.</p>
</body>
</html>
""")
