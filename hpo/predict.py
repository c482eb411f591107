"""`hpo predict`: JSON lines in, predictions out, a part at a time."""

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from model.front_file import ServedPoint
from model.pipeline import LengthAdaptivePipeline
from model.rows import DataError

LINES_AT_ONCE = 1024
"""Lines that are held in memory together: enough to find others of the same length, few enough to wait for."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one line.

    Attributes:
        number: Of the line, from 1.
        prediction: What is said of it; None where it could not be read.
        problem: Why it could not be read; None where it could.
    """

    number: int
    prediction: dict[str, Any] | None = None
    problem: str | None = None

    def to_json(self) -> str:
        """The line to write: the prediction, or the problem as `error`."""
        return json.dumps(self.prediction or {"error": self.problem}, ensure_ascii=False)


def predict_lines(
    pipeline: LengthAdaptivePipeline, lines: Iterable[bytes], point: ServedPoint, lines_at_once: int = LINES_AT_ONCE
) -> Iterator[Answer]:
    """One answer for each line, in their order; lines that cannot be read are answered with what is wrong with them.

    Args:
        pipeline: What predicts.
        lines: JSON in UTF-8, one value each: an object with the columns that the model was trained on, or what
            `LengthAdaptivePipeline` takes.
        point: What it runs under.
        lines_at_once: Lines that are read before their answers come.
    """
    numbered = enumerate(lines, start=1)
    while part := list(itertools.islice(numbered, lines_at_once)):
        rows, problems = {}, {}
        for number, line in part:
            try:
                rows[number] = pipeline.read(_value(line))
            except DataError as error:
                problems[number] = str(error)
        said = dict(zip(rows, pipeline.predict(list(rows.values()), point.length_config), strict=True))
        for number, _ in part:
            yield Answer(number=number, prediction=said.get(number), problem=problems.get(number))


def _value(line: bytes) -> Any:
    """The JSON value of a line, which some programs begin with a byte order mark.

    Raises:
        DataError: It is none; the message goes on after the line's number.
    """
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        raise DataError("is empty.")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.start + 1}).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON ({error.msg} at character {error.pos + 1}).") from error
    except RecursionError as error:
        raise DataError("is nested too deeply.") from error
    except ValueError as error:  # Python refuses to read numbers of thousands of digits
        raise DataError("holds a number that is too long.") from error
