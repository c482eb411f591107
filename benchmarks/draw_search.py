"""Draws what `benchmarks/search.py --parts samplers` printed.

Usage: python benchmarks/draw_search.py RESULTS.jsonl IMAGE

Left the hypervolume after so many trials, right that of the final front's points on the report split; each the mean
over the seeds with one standard deviation to either side.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.plot import BLUE, GREEN, GREY, ORANGE, SKY, lay_out, write_image

STYLE = {
    "surrogate": (BLUE, "circle", "surrogate-assisted NSGA-II (default)"),
    "lat": (ORANGE, "triangle-up", "Length-Adaptive Transformer's evolution"),
    "nsga2": (GREEN, "square", "NSGA-II as Optuna gives it"),
    "tpe": (SKY, "diamond", "TPE"),
    "random": (GREY, "x", "random"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("image", type=Path, help="its ending decides the format: .svg, .png, ...")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    drawn = write_image(draw([line for line in lines if line["benchmark"] == "search/samplers"]), arguments.image)
    raise SystemExit(0 if drawn else 1)


def draw(lines: list[dict[str, Any]]) -> go.Figure:
    """The figure of these result lines."""
    figure = make_subplots(
        cols=2,
        column_widths=[0.68, 0.32],
        horizontal_spacing=0.1,
        subplot_titles=("search split, after so many trials", "report split, at the end"),
    )
    for name, (colour, symbol, title) in STYLE.items():
        of_sampler = [line for line in lines if line["sampler"] == name]
        if not of_sampler:
            continue
        reached = defaultdict(list)
        for line in of_sampler:
            for trials, value in line["hypervolume"].items():
                reached[int(trials)].append(value)
        marks = sorted(reached)
        marker = {"color": colour, "symbol": symbol, "size": 9}
        figure.add_trace(
            go.Scatter(
                x=marks,
                y=[np.mean(reached[mark]) for mark in marks],
                error_y={"array": [np.std(reached[mark]) for mark in marks], "thickness": 1.2},
                mode="lines+markers",
                marker=marker,
                line={"color": colour, "width": 2},
                name=f"{title}, {len(of_sampler)} seeds",
            ),
            row=1,
            col=1,
        )
        on_report = [line["hypervolume_on_report"] for line in of_sampler]
        figure.add_trace(
            go.Scatter(
                x=[name],
                y=[np.mean(on_report)],
                error_y={"array": [np.std(on_report)], "thickness": 1.2},
                marker=marker,
                showlegend=False,
            ),
            row=1,
            col=2,
        )
    lay_out(figure, "How good a front each sampler finds", "hypervolume of quality above 0.5 against the share of MACs")
    figure.update_layout(margin_b=130)
    figure.update_xaxes(title="trials", type="log", tickvals=[100, 250, 500, 1000, 1822], row=1, col=1)
    figure.update_yaxes(title="hypervolume", row=1, col=1)
    return figure


if __name__ == "__main__":
    main()
