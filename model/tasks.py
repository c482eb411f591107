"""What a good model is: the metrics of a classification task, computed by scikit-learn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number that says how well predictions match labels.

    Attributes:
        name: The name a user gives and a database records.
        direction: `maximize` or `minimize`, as Optuna writes it.
        compute: Predicted classes (N,) and true classes (N,) to the metric. It raises ValueError where
            the two differ in length or hold nothing.
        per_example: Whether the metric is the share of examples that are right, so that a part of a split tells of
            the whole.
    """

    name: str
    direction: Literal["maximize", "minimize"]
    compute: Callable[[Labels, Labels], float]
    per_example: bool = False


def accuracy(predictions: Labels, labels: Labels) -> float:
    """Share of predictions that equal their label, in [0, 1]."""
    _check_aligned(predictions, labels)
    return float(accuracy_score(labels, predictions))


def f1(predictions: Labels, labels: Labels) -> float:
    """F1 of class 1 where only the classes 0 and 1 occur, else the unweighted mean over classes; in [0, 1].

    A class that is never predicted, or never right, has an F1 of 0.

    Source: Wang et al. 2018 (GLUE) score MRPC and QQP by the F1 of the positive class.
    """
    _check_aligned(predictions, labels)
    two_classes = max(predictions.max(), labels.max()) <= 1
    average = "binary" if two_classes else "macro"
    return float(f1_score(labels, predictions, average=average, zero_division=0.0))


def matthews_correlation(predictions: Labels, labels: Labels) -> float:
    """Correlation of predictions and labels, in [-1, 1]; 0 where either side is constant.

    Source: Matthews 1975; for more than two classes Gorodkin 2004, "Comparing two K-category assignments".
    """
    _check_aligned(predictions, labels)
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0  # the quotient is 0 / 0 there; scikit-learn's answer depends on its version
    return float(matthews_corrcoef(labels, predictions))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        function.__name__: Metric(
            name=function.__name__, direction="maximize", compute=function, per_example=function is accuracy
        )
        for function in (accuracy, f1, matthews_correlation)
    }
)


def get_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: There is none; the message lists the known names.
    """
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is unknown; choose one of {', '.join(METRICS)}.")
    return METRICS[name]


def _check_aligned(predictions: Labels, labels: Labels) -> None:
    if predictions.shape != labels.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(f"Got {predictions.size} predictions for {labels.size} labels; give one of each per row.")
