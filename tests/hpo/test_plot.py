import dataclasses
import json
import logging
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from hpo.front import Front, FrontPoint
from hpo.plot import draw_front, draw_hypervolume, write_image, write_page

HISTORY = [0.2, 0.3, 0.3, 0.45]


def point(trial, shares, metric, cost, report=None, report_cost=None):
    return FrontPoint(
        trial=trial,
        shares=shares,
        metric=metric,
        report_metric=report,
        macs=cost * 1e9,
        relative_macs=cost,
        report_relative_macs=report_cost,
    )


@pytest.fixture
def front():
    full = point(0, (1.0, 1.0), 0.9, 1.0, 0.89, 1.0)
    constant = point(1, (0.5, 0.25), 0.7, 0.4, 0.68, 0.42)
    best = point(3, (0.9, 0.54), 0.88, 0.6, 0.86, 0.61)
    return Front(
        study="lengths",
        storage="sqlite:///hpo.db",
        trials=5,
        metric="accuracy",
        direction="maximize",
        cost="macs",
        unit="MAC",
        full=full,
        hypervolume=0.45,
        points=(constant, best, full),
        dominated=(point(2, (0.9, 0.8), 0.8, 0.8), point(4, (0.6, 0.6), 0.6, 0.65)),
        constant_rate=(constant, full),
        median_tokens=20,
        workload={"model": "tiny", "data": {"dataset": "demo"}},
    )


def traces(figure):
    return {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}


def test_figure_has_a_trace_for_each_role_with_the_right_numbers(front):
    assert traces(draw_front(front, front.points[1])) == {
        "other trials": ([0.8, 0.65], [0.8, 0.6]),
        "same retention in every layer": ([0.4, 1.0], [0.7, 0.9]),
        "front, search split": ([0.4, 0.6, 1.0], [0.7, 0.88, 0.9]),
        "front, report split": ([0.42, 0.61, 1.0], [0.68, 0.86, 0.89]),
        "full length": ([1.0], [0.9]),
        "chosen": ([0.6], [0.88]),
    }


def test_figure_leaves_out_what_a_front_lacks(front):
    points = tuple(dataclasses.replace(p, report_metric=None) for p in front.points)
    bare = dataclasses.replace(front, points=points, dominated=(), constant_rate=())
    assert set(traces(draw_front(bare))) == {"front, search split", "full length"}


def test_report_split_draws_only_points_scored_there_at_the_search_cost_where_no_other_is_known(front):
    cheap, best, full = front.points
    best = dataclasses.replace(best, report_metric=None)
    cheap = dataclasses.replace(cheap, report_relative_macs=None)
    figure = draw_front(dataclasses.replace(front, points=(cheap, best, full)))
    assert traces(figure)["front, report split"] == ([0.4, 1.0], [0.68, 0.89])


def test_axes_name_quantity_and_unit_and_the_title_names_the_baseline(front):
    layout = draw_front(front).layout
    assert layout.xaxis.title.text == "FLOPs per sequence, share of full length"
    assert layout.xaxis.tickformat == ".0%"
    assert layout.yaxis.title.text == "accuracy"
    assert "the same model at full length without padding" in layout.title.subtitle.text
    assert "2.00 GFLOPs" in layout.title.subtitle.text


def test_hovering_shows_trial_both_splits_cost_shares_and_lengths_of_a_median_sequence(front):
    trace = next(trace for trace in draw_front(front).data if trace.name == "front, search split")
    assert trace.hovertext[1].split("<br>") == [
        "<b>trial 3</b>",
        "accuracy, search split: 0.8800",
        "accuracy, report split: 0.8600 at 61.0% of FLOPs",
        "FLOPs: 60.0% of full length (1.20 GFLOPs)",
        "left after each layer, %:",
        "90 54",
        "of 20 tokens, the median:",
        "18 11",
    ]


def test_tiny_shares_are_text_not_the_start_of_a_tag(front, tmp_path):
    tiny = dataclasses.replace(front.points[0], shares=(0.5, 0.001))
    front = dataclasses.replace(front, points=(tiny, *front.points[1:]))
    trace = next(trace for trace in draw_front(front).data if trace.name == "front, search split")
    assert "<br>50 &lt;1<br>" in trace.hovertext[0]
    write_page(front, HISTORY, tmp_path / "front.html")
    source = (tmp_path / "front.html").read_text(encoding="utf-8")
    assert "<td>50 &lt;1</td>" in source


def test_hovering_says_nothing_of_lengths_where_the_median_is_unknown(front):
    unknown = dataclasses.replace(front, median_tokens=None)
    assert all("median" not in text for trace in draw_front(unknown).data for text in trace.hovertext)


def test_metric_name_is_text_in_the_figure_not_markup(front):
    figure = draw_front(dataclasses.replace(front, metric="<a href='x'>f1</a>"))
    assert "<a" not in figure.to_json().replace("\\u003c", "<")
    assert figure.layout.yaxis.title.text == "&lt;a href='x'&gt;f1&lt;/a&gt;"


def test_hypervolume_is_drawn_against_the_count_of_finished_trials():
    assert traces(draw_hypervolume(HISTORY)) == {"hypervolume": ([1, 2, 3, 4], HISTORY)}


def test_long_history_shows_the_slow_part_rather_than_the_first_climb():
    history = [0.0, 0.5, 0.6] + [0.6 + trial / 10_000 for trial in range(97)]
    low, high = draw_hypervolume(history).layout.yaxis.range
    assert 0.59 < low <= history[5]
    assert high > history[-1]


@pytest.mark.parametrize("history", [[], [0.3], [0.3, 0.3]])
def test_flat_or_short_history_leaves_the_range_to_plotly(history):
    assert draw_hypervolume(history).layout.yaxis.range is None


class Page(HTMLParser):
    """What a browser would fetch for a page, the tags it has, the text outside scripts, and the table's cells."""

    def __init__(self, source):
        super().__init__()
        self.fetched, self.tags, self.text, self.scripts, self.rows = [], [], "", [], []
        self.inside = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside == "td":
            self.rows[-1].append(data)
        if self.inside not in ("script", "style"):
            self.text += data


@pytest.fixture
def page(front, tmp_path):
    path = tmp_path / "new" / "front.html"
    write_page(front, HISTORY, path, front.points[1])
    return Page(path.read_text(encoding="utf-8"))


def test_page_fetches_nothing_and_carries_plotly_once(page):
    assert page.fetched == []
    assert not {"link", "iframe", "img", "object"} & set(page.tags)
    assert sum(get_plotlyjs()[:200] in script for script in page.scripts) == 1
    assert sum("Plotly.newPlot" in script for script in page.scripts if len(script) < 100_000) == 2


def test_page_offers_no_upload(page):
    drawn = [script for script in page.scripts if "Plotly.newPlot" in script and len(script) < 100_000]
    configs = [json.loads(re.findall(r'\{"[^{}]*"showSendToCloud"[^{}]*\}', script)[-1]) for script in drawn]
    assert [config["showSendToCloud"] for config in configs] == [False, False]
    assert all("plotlyServerURL" not in config for config in configs)


def test_page_names_study_model_dataset_metric_baseline_and_choice(page):
    text = " ".join(page.text.split())
    assert "Study lengths: accuracy against compute" in text
    for fact in ("tiny", "demo", "the same model at full length without padding: 2.00 GFLOPs", "5 finished"):
        assert fact in text
    assert "trial 3 at 60.0% of the FLOPs (1.20 GFLOPs): 0.8800 on the search split, 0.8600 on the report" in text


def test_page_has_titles_as_text_that_a_narrow_screen_breaks(page):
    assert page.tags.count("h2") == 3
    text = " ".join(page.text.split())
    for title in ("accuracy against compute", "100% is the same model at full length", "Progress of the search"):
        assert title in text
    assert not any('"title":{"text":"' + "accuracy against" in script for script in page.scripts)


def test_page_table_lists_the_front_and_full_length(page):
    assert [row for row in page.rows if row] == [
        ["1", "0.7000", "0.6800", "40.0%", "800 MFLOPs", "50 25", "10 5"],
        ["3 (chosen)", "0.8800", "0.8600", "60.0%", "1.20 GFLOPs", "90 54", "18 11"],
        ["0", "0.9000", "0.8900", "100.0%", "2.00 GFLOPs", "100 100", "20 20"],
        ["0 (full length)", "0.9000", "0.8900", "100.0%", "2.00 GFLOPs", "100 100", "20 20"],
    ]


def test_page_shows_names_as_they_stand_and_runs_none_of_them(front, tmp_path):
    attack = "<script>alert('x')</script><img src=http://evil/>"
    path = tmp_path / "front.html"
    named = dataclasses.replace(
        front, study=attack, metric=attack, workload={"model": attack, "data": {"dataset": attack}}
    )
    write_page(dataclasses.replace(named, storage=attack), HISTORY, path)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert "<script>alert" not in source
    assert (page.fetched, "img" in page.tags) == ([], False)
    assert page.tags.count("script") == len(page.scripts)
    assert page.text.count(attack) >= 5


def test_page_of_an_unknown_workload_and_median_says_so(front, tmp_path):
    path = tmp_path / "front.html"
    write_page(dataclasses.replace(front, workload={}, median_tokens=None), HISTORY, path)
    text = Page(path.read_text(encoding="utf-8")).text
    assert text.count("not recorded") == 2
    assert "median" not in text


def test_page_that_cannot_be_written_leaves_the_older_one(front, tmp_path, monkeypatch):
    path = tmp_path / "front.html"
    path.write_text("older")

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_page(front, HISTORY, path)
    assert [file.name for file in tmp_path.iterdir()] == ["front.html"]
    assert path.read_text() == "older"


def test_image_without_a_browser_is_one_log_line_and_no_file(front, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-such-browser"))
    monkeypatch.setattr("choreographer.browsers.chromium.get_chrome_download_path", lambda **_: None)
    monkeypatch.setattr("choreographer.browsers.chromium.get_old_chrome_download_path", lambda: None)
    with caplog.at_level(logging.INFO):
        assert write_image(draw_front(front), tmp_path / "front.png") is False
    assert [record.message for record in caplog.records if record.levelno >= logging.INFO] == [
        "front.png is not drawn: install Chrome or Chromium, or name one in BROWSER_PATH."
    ]
    assert list(tmp_path.iterdir()) == []


def test_browser_that_dies_is_one_log_line_and_no_file(front, tmp_path, monkeypatch, caplog, capfd):
    browser = tmp_path / "broken-browser"
    browser.write_text("#!/bin/sh\necho chatter >&2\nexit 3\n")
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("BROWSER_PATH", str(browser))
    monkeypatch.setattr("choreographer.browsers.chromium.get_chrome_download_path", lambda **_: None)
    monkeypatch.setattr("choreographer.browsers.chromium.get_old_chrome_download_path", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert write_image(draw_front(front), tmp_path / "front.svg") is False
    (record,) = caplog.records
    assert record.message.startswith("front.svg is not drawn: the browser failed (")
    assert list(tmp_path.iterdir()) == [browser]
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("browser")
@pytest.mark.parametrize(("name", "start"), [("front.png", b"\x89PNG\r\n"), ("front.svg", b"<svg")])
def test_image_is_drawn_where_a_browser_is_installed(front, tmp_path, name, start):
    path = tmp_path / "images" / name
    assert write_image(draw_front(front), path) is True
    assert path.read_bytes().startswith(start)
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_image_of_an_unknown_kind_is_a_value_error(front, tmp_path):
    with pytest.raises(ValueError, match=r"'front\.bmp'.*png"):
        write_image(draw_front(front), tmp_path / "front.bmp")


def test_page_and_hover_tell_the_metrics_beside_the_one_searched_for(front, tmp_path):
    def with_both(point):
        both = {"accuracy": point.metric, "exact_match": point.metric / 2}
        return dataclasses.replace(point, report_metric=point.metric, metrics=both, report_metrics=both)

    both = dataclasses.replace(front, full=with_both(front.full), points=tuple(map(with_both, front.points)))
    trace = next(trace for trace in draw_front(both).data if trace.name == "front, search split")
    halves = [f"exact_match, report split: {point.metric / 2:.4f}" for point in both.points]
    assert all(half in text for half, text in zip(halves, trace.hovertext, strict=True))
    write_page(both, [0.1, 0.2], tmp_path / "front.html")
    page = (tmp_path / "front.html").read_text(encoding="utf-8")
    assert page.count("<th>exact_match,<br>report split</th>") == 1
    assert all(f"<td>{point.metric / 2:.4f}</td>" in page for point in both.points)


def test_configs_of_another_method_are_marked(front):
    seed = dataclasses.replace(front.points[0], origin="power-bert")
    trace = next(
        trace for trace in draw_front(dataclasses.replace(front, seeds=(seed,))).data if "PoWER-BERT" in trace.name
    )
    assert list(trace.y) == [seed.metric]
    assert trace.marker.symbol == "star"


def test_the_name_of_an_unknown_method_is_text_in_the_legend(front):
    seed = dataclasses.replace(front.points[0], origin="<b>mine</b>")
    figure = draw_front(dataclasses.replace(front, seeds=(seed,)))
    assert [trace.name for trace in figure.data if "mine" in trace.name] == ["&lt;b&gt;mine&lt;/b&gt;"]


@pytest.mark.parametrize("place", [".", "/"])
def test_page_in_the_place_of_a_folder_is_an_error_that_names_it(front, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsADirectoryError) as raised:
        write_page(front, HISTORY, Path(place))
    assert raised.value.filename == place
    assert list(tmp_path.iterdir()) == []


def test_page_and_hover_mark_skipped_layers(front, tmp_path):
    cheap, best, full = (
        dataclasses.replace(point, skipped=skipped) for point, skipped in zip(front.points, ((), (1,), ()), strict=True)
    )
    best = dataclasses.replace(best, shares=(0.9, 0.9))
    deep = dataclasses.replace(front, points=(cheap, best, full), full=full)
    hover = next(trace for trace in draw_front(deep).data if trace.name == "front, search split").hovertext[1]
    assert "left after each layer, %:<br>90 -<br>" in hover
    assert "of 20 tokens, the median:<br>18 -" in hover
    write_page(deep, HISTORY, tmp_path / "front.html")
    page = (tmp_path / "front.html").read_text(encoding="utf-8")
    assert "<td>90 -</td><td>18 -</td>" in page
    assert "A hyphen stands for a layer that is skipped." in page
    write_page(front, HISTORY, tmp_path / "front.html")
    assert "hyphen" not in (tmp_path / "front.html").read_text(encoding="utf-8").split("<table>")[1]
