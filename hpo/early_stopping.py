"""Giving up on a length config before it has seen the whole search split.

Optuna's pruners serve one objective. With several, a config is hopeless once some front point that costs no more, by
any measure, is also better: then it cannot enter the front. Costs are known exactly beforehand; quality is compared on
the same examples, so that what is hard for both does not blur the comparison.

Shape letters: F front points, K costs, T trials, N examples of the split, M examples seen.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpo.staircase import members

Bits = NDArray[np.bool_]

STOPPED_BY, SEEN = "stopped_by", "examples_seen"
"""Attributes of a trial that was stopped early: the trial that beats it, and how many examples that took."""
PARTIAL_METRIC, ESTIMATE, ESTIMATE_ERROR = "partial_metric", "estimated_metric", "estimated_metric_error"
"""Its metric on those examples, and what they say of the metric on all, with the standard error."""
PARTIAL_FIGURES = (STOPPED_BY, SEEN, PARTIAL_METRIC, ESTIMATE, ESTIMATE_ERROR)


@dataclass(frozen=True)
class Defeat:
    """Why a config need not go on.

    Attributes:
        by: The trial that beats it.
        behind: How far it trails that trial's metric, estimated for all examples.
        error: Standard error of `behind`.
    """

    by: int
    behind: float
    error: float


@dataclass(frozen=True)
class Rivals:
    """The front so far.

    Attributes:
        trial_F: Trial numbers.
        costs_FK: What each costs, by one or more measures.
        correct_FN: Which examples each gets right.
    """

    trial_F: NDArray[np.int64]
    costs_FK: NDArray[np.float64]
    correct_FN: Bits

    @classmethod
    def of(cls, trials: NDArray[np.int64], costs: NDArray[np.float64], correct: Bits) -> "Rivals":
        """The non-dominated among scored trials, whose costs are (T,) or (T, K)."""
        costs_TK = costs if costs.ndim == 2 else costs[:, None]
        front = members(costs_TK, correct.mean(axis=1)) if len(trials) else np.empty(0, dtype=np.int64)
        return cls(trials[front], costs_TK[front], correct[front])

    def accuracy(self, trial: int) -> float:
        """Of a trial of the front."""
        return float(self.correct_FN[np.flatnonzero(self.trial_F == trial)[0]].mean())

    def beats(
        self, costs: float | Sequence[float], correct_M: Bits, seen_M: NDArray[np.int64], confidence: float
    ) -> Defeat | None:
        """How a config is beaten, for certain or nearly so; None where it is not.

        The seen examples are a random sample, without replacement, of the N. The difference of the two accuracies over
        all N is therefore within `confidence` standard errors of the one seen, a standard error being
        sqrt(s^2 / M * (1 - M / N)) with s^2 the mean square of one example's difference, no less than its variance; two
        differing examples are added to it, so that a handful of equal answers proves nothing.

        Args:
            costs: What the config costs, by each measure; a rival costs no more by any.
            correct_M: Which of the seen examples it gets right.
            seen_M: Their numbers.
            confidence: Standard errors by which it must trail.
        """
        cheaper = np.flatnonzero((self.costs_FK <= np.reshape(costs, (1, -1))).all(axis=1))
        if not len(cheaper) or not len(seen_M):
            return None
        seen, total = len(seen_M), self.correct_FN.shape[1]
        difference_FM = correct_M.astype(np.int8) - self.correct_FN[np.ix_(cheaper, seen_M)].astype(np.int8)
        mean_F = difference_FM.mean(axis=1)
        square_F = ((difference_FM != 0).sum(axis=1) + 2) / (seen + 2)
        error_F = np.sqrt(square_F / seen * (1 - seen / total))
        bound_F = mean_F + confidence * error_F
        worst = int(bound_F.argmin())
        if bound_F[worst] >= 0:
            return None
        return Defeat(int(self.trial_F[cheaper[worst]]), float(-mean_F[worst]), float(error_F[worst]))


def bits_to_text(correct_N: Bits) -> str:
    """Which examples are right, short enough for a database attribute: 8 per byte, base64."""
    return base64.b64encode(np.packbits(correct_N).tobytes()).decode("ascii")


def bits_from_text(text: str, count: int) -> Bits:
    """The inverse of `bits_to_text` for `count` examples."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(packed, count=count).astype(np.bool_)
