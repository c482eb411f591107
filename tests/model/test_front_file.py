import dataclasses
import json
import re

import pytest

from model.front_file import FRONT_FILE, ExportError, Graph, NothingFits, ServedFront, ServedPoint
from model.length_config import LengthConfig


def point(trial, metric, relative_macs, config=None):
    return ServedPoint(
        trial=trial,
        length_config=config or LengthConfig.from_shares((0.5, 0.25)),
        metric=metric,
        report_metric=None,
        macs=1e6 * relative_macs,
        relative_macs=relative_macs,
    )


@pytest.fixture
def front():
    points = (point(4, 0.70, 0.2345678), point(7, 0.85, 0.4), point(2, 0.91, 0.6))
    return ServedFront(
        task="classification",
        kind="classification",
        label_names=("no", "ja"),
        text_columns=("sentence",),
        max_length=64,
        stride=None,
        metric="accuracy",
        full=point(0, 0.90, 1.0, LengthConfig.full(2)),
        points=points,
        chosen=point(9, 0.8, 0.5, LengthConfig.from_retention((0.5, 0.5), skipped=(0,))),
        versions={"hpo": "1"},
        graph=Graph(file="model.onnx", opset=18, precision="float32", fixed_length=None, token_types=True),
    )


def test_what_is_read_is_what_was_written(front, tmp_path):
    front.write(tmp_path)
    assert ServedFront.read(tmp_path) == front
    without = dataclasses.replace(front, graph=None)
    without.write(tmp_path)
    assert ServedFront.read(tmp_path) == without


def test_points_are_plain_json_with_shares_and_skipped_layers(front, tmp_path):
    front.write(tmp_path)
    document = json.loads((tmp_path / FRONT_FILE).read_text())
    assert document["format"] == 1
    assert document["points"][1] == {
        "trial": 7, "skipped": [], "shares": [0.5, 0.25],
        "metric": 0.85, "report_metric": None, "macs": 4e5, "relative_macs": 0.4, "latency_ms": None,
    }  # fmt: skip
    assert document["chosen"]["skipped"] == [0]


@pytest.mark.parametrize(
    ("wish", "trial"),
    [({}, 9), ({"budget": 0.6}, 2), ({"budget": 0.59}, 7), ({"max_drop": 0.05}, 7), ({"max_drop": 0.0}, 2)],
)
def test_a_wish_chooses_the_point_that_serves_it(front, wish, trial):
    assert front.choose(**wish).trial == trial


def test_a_budget_below_every_point_names_the_smallest(front):
    with pytest.raises(NothingFits, match=r"budget of 0\.2346 or more"):
        front.choose(budget=0.2)
    assert front.choose(budget=0.2346).trial == 4


@pytest.mark.parametrize(("ms", "shown"), [(1234.5611, "1234.562"), (10.3, "10.3"), (100.0, "100")])
def test_a_time_below_every_point_names_the_least_that_one_takes(front, ms, shown):
    timed = dataclasses.replace(front, points=(dataclasses.replace(front.points[0], latency_ms=ms),))
    with pytest.raises(NothingFits, match=rf"ask for {re.escape(shown)} ms or more"):
        timed.choose(max_latency_ms=5.0)
    assert timed.choose(max_latency_ms=float(shown)).trial == 4


@pytest.mark.parametrize("wish", [{"budget": 0.5, "max_drop": 0.1}, {"budget": 1.5}, {"max_drop": -1.0}])
def test_impossible_wishes_are_refused(front, wish):
    with pytest.raises(ExportError, match=r"give exactly one|choose"):
        front.choose(**wish)


@pytest.mark.parametrize("wish", [{"budget": "0.5"}, {"max_drop": "0"}, {"max_latency_ms": [20]}])
def test_a_wish_that_is_no_number_is_refused(front, wish):
    ((name, value),) = wish.items()
    with pytest.raises(ExportError, match=re.escape(f"{name}={value!r}; choose a number")):
        front.choose(**wish)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no export.*hpo export"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        ('{"format": 2, "points": []}', r"format 2, this version of hpo reads 1"),
    ],
)
def test_other_folders_are_refused_in_a_sentence(tmp_path, text, message):
    if text is not None:
        (tmp_path / FRONT_FILE).write_text(text)
    with pytest.raises(ExportError, match=message):
        ServedFront.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": ()}, "no points"),
        ({"text_columns": ()}, "no text columns"),
        ({"max_length": "64"}, "no whole numbers"),
        ({"chosen": point(9, 0.8, 0.5, LengthConfig.full(3))}, "configs of 2 and 3 layers"),
        ({"points": (point(4, None, 0.2), point(7, 0.85, 0.4))}, "no number"),
        ({"points": (dataclasses.replace(point(4, 0.7, 0.2), relative_macs="0.2"),)}, "no number"),
        ({"full": point(0, "0.9", 1.0)}, "no number"),
        ({"chosen": dataclasses.replace(point(9, 0.8, 0.5), latency_ms="20")}, "no number"),
    ],
)
def test_values_that_serve_nobody_are_refused(front, tmp_path, change, message):
    dataclasses.replace(front, **change).write(tmp_path)
    with pytest.raises(ExportError, match=message):
        ServedFront.read(tmp_path)
