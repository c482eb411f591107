"""What a good model is: the metrics of tasks about whole texts, computed by scikit-learn and SciPy."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Values = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number that says how well predictions match what would have been right.

    Attributes:
        name: The name a user gives and a database records.
        direction: `maximize` or `minimize`, as Optuna writes it.
        compute: Predictions and references, in the form of the task, to the metric. It raises ValueError where the
            two differ in length or hold nothing.
        per_example: Whether the metric is the share of examples whose answer equals the label, so that a part of a
            split tells of the whole.
        compute_many: What is computed in its place where there are more than two classes; None where nothing else is.
    """

    name: str
    direction: Literal["maximize", "minimize"] = "maximize"
    compute: Callable[[Any, Any], float]
    per_example: bool = False
    compute_many: Callable[[Any, Any], float] | None = None

    def over(self, classes: int) -> "Metric":
        """The metric of a dataset with so many classes, which need not all occur where it is computed."""
        if classes <= 2 or self.compute_many is None:
            return self
        return replace(self, compute=self.compute_many)


def accuracy(predictions: Labels, labels: Labels) -> float:
    """Share of predictions that equal their label, in [0, 1]."""
    _check_aligned(predictions, labels)
    return float(_scikit_learn().accuracy_score(labels, predictions))


def f1(predictions: Labels, labels: Labels) -> float:
    """F1 of class 1 of two, in [0, 1]; 0 where it is never predicted, or never right.

    Source: Wang et al. 2018 (GLUE) score MRPC and QQP by the F1 of the positive class.
    """
    return _f1_of_classes(predictions, labels, [1])


def mean_f1(predictions: Labels, labels: Labels) -> float:
    """Unweighted mean of the F1 of each class that is predicted or right anywhere, in [0, 1].

    A class that is never predicted, or never right, has an F1 of 0.
    """
    return _f1_of_classes(predictions, labels, None)


def _f1_of_classes(predictions: Labels, labels: Labels, classes: list[int] | None) -> float:
    _check_aligned(predictions, labels)
    mean = _scikit_learn().f1_score(labels, predictions, labels=classes, average="macro", zero_division=0.0)
    return float(mean)


def matthews_correlation(predictions: Labels, labels: Labels) -> float:
    """Correlation of predictions and labels, in [-1, 1]; 0 where either side is constant.

    Source: Matthews 1975; for more than two classes Gorodkin 2004, "Comparing two K-category assignments".
    """
    _check_aligned(predictions, labels)
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0  # the quotient is 0 / 0 there; scikit-learn's answer depends on its version
    return float(_scikit_learn().matthews_corrcoef(labels, predictions))


def micro_f1(predictions: Labels, labels: Labels) -> float:
    """F1 over all pairs of an example and a class that applies to it, in [0, 1].

    Args:
        predictions: Ones where a class is said to apply, (N, C).
        labels: Ones where it does, (N, C).
    """
    return _f1_of_label_sets(predictions, labels, "micro")


def macro_f1(predictions: Labels, labels: Labels) -> float:
    """Mean over classes of each one's F1, in [0, 1]; the arguments are those of `micro_f1`.

    A class that is never predicted, or never right, has an F1 of 0.
    """
    return _f1_of_label_sets(predictions, labels, "macro")


def _f1_of_label_sets(predictions: Labels, labels: Labels, average: str) -> float:
    _check_aligned(predictions, labels, dimensions=2)
    if labels.shape[1] == 1:  # which scikit-learn takes for two classes, and averages over both
        predictions, labels, average = predictions.ravel(), labels.ravel(), "binary"
    return float(_scikit_learn().f1_score(labels, predictions, average=average, zero_division=0.0))


def subset_accuracy(predictions: Labels, labels: Labels) -> float:
    """Share of examples whose every class is right, in [0, 1]; the arguments are those of `micro_f1`."""
    _check_aligned(predictions, labels, dimensions=2)
    return float(_scikit_learn().accuracy_score(labels, predictions))


def pearson(predictions: Values, labels: Values) -> float:
    """Linear correlation of predicted and true values, in [-1, 1]; 0 where either side is constant."""
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions: Values, labels: Values) -> float:
    """Correlation of the ranks of predicted and true values, in [-1, 1]; 0 where either side is constant."""
    return _correlation("spearmanr", predictions, labels)


CLASS_METRICS = (
    Metric(name="accuracy", compute=accuracy, per_example=True),
    Metric(name="f1", compute=f1, compute_many=mean_f1),
    Metric(name="matthews_correlation", compute=matthews_correlation),
)
LABEL_SET_METRICS = (
    Metric(name="micro_f1", compute=micro_f1),
    Metric(name="macro_f1", compute=macro_f1),
    Metric(name="subset_accuracy", compute=subset_accuracy),
)
VALUE_METRICS = (Metric(name="pearson", compute=pearson), Metric(name="spearman", compute=spearman))


def choose_metric(metrics: Sequence[Metric], name: str | None = None) -> Metric:
    """The metric of that name, or the first, which is the task's usual one.

    Raises:
        ValueError: There is none; the message lists the known names.
    """
    by_name = {metric.name: metric for metric in metrics}
    if name is not None and name not in by_name:
        raise ValueError(f"metric={name!r} is not one of this task; choose one of {', '.join(by_name)}.")
    return metrics[0] if name is None else by_name[name]


def _scikit_learn() -> Any:
    """Its metrics, loaded where one is computed: that takes a tenth and more of what a command takes to start."""
    import sklearn.metrics

    return sklearn.metrics


def _correlation(name: str, predictions: Values, labels: Values) -> float:
    from scipy import stats

    _check_aligned(predictions, labels)
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # of values that differ by rounding alone
        correlation = float(getattr(stats, name)(predictions.astype(np.float64), labels.astype(np.float64)).statistic)
    return correlation if np.isfinite(correlation) else 0.0


def _check_aligned(predictions: NDArray[Any], labels: NDArray[Any], dimensions: int = 1) -> None:
    if predictions.shape != labels.shape or labels.ndim != dimensions or not labels.size:
        raise ValueError(f"Got {predictions.size} predictions for {labels.size} labels; give one of each per row.")
