"""A Gaussian process that predicts the quality of length configs from those scored.

Quality falls steeply where few tokens are kept and is nearly flat near full length, and it scatters less the higher it
is. What is modelled is therefore the logarithm of its distance from a ceiling a little above the best, which scatters
alike everywhere; predictions come back as quality.

Shape letters: C candidates, T trials, N inputs.
"""

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

from hpo.staircase import Array

KNOWN_TRIALS = 500
"""Most trials that predictions rest on; the time to predict grows with their square."""
FITTED_TRIALS = 100
"""Most of them that the kernel is fitted on, which takes many times as long."""
FIT_STEPS = 20
"""Most steps that the kernel is improved by in a generation."""
HEADROOM = 0.15
"""How far the ceiling is above the best quality, in parts of the range of qualities seen."""


class Surrogate:
    """Predicts quality, to be maximised; each fit goes on from the kernel of the one before."""

    def __init__(self) -> None:
        self._kernel: Kernel | None = None
        self._ceiling = self._mean = self._scale = 1.0
        self._process = GaussianProcessRegressor()

    def fit(self, inputs_TN: Array, quality_T: Array, error_T: Array, behind_T: Array) -> None:
        """Learn from trials.

        Args:
            inputs_TN: What quality depends on.
            quality_T: The quality of each, or what is known of it.
            error_T: Standard error of each; 0 where it is exact.
            behind_T: How far each lies below the front: where there are too many trials, the nearest count.
        """
        nearest = np.argsort(behind_T, kind="stable")
        known, fitted = np.sort(nearest[:KNOWN_TRIALS]), np.sort(nearest[:FITTED_TRIALS])
        best, spread = float(quality_T.max()), float(np.ptp(quality_T))
        self._ceiling = best + HEADROOM * max(spread, 1e-9)
        distance_T = self._ceiling - quality_T
        warped_T = -np.log(distance_T)
        self._mean, self._scale = float(warped_T[known].mean()), max(float(warped_T[known].std()), 1e-9)
        scaled_T = (warped_T - self._mean) / self._scale
        noise_T = 1e-10 + (error_T / distance_T / self._scale) ** 2
        if self._kernel is None:
            # nu = 0.5, since quality is rugged on every scale: a nearby config answers a few examples differently
            rugged = Matern(np.full(inputs_TN.shape[1], 2.0), (5e-2, 1e2), nu=0.5)
            self._kernel = ConstantKernel(1.0, (1e-2, 1e2)) * rugged + WhiteKernel(1e-2, (1e-5, 1.0))
        process = GaussianProcessRegressor(self._kernel, alpha=noise_T[fitted], optimizer=_improve_from, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of scales at their bounds, as idle layers have
            process.fit(inputs_TN[fitted], scaled_T[fitted])
        self._kernel = process.kernel_
        self._process = GaussianProcessRegressor(self._kernel, alpha=noise_T[known], optimizer=None)
        self._process.fit(inputs_TN[known], scaled_T[known])

    def predict(self, inputs_CN: Array) -> tuple[Array, Array]:
        """The quality expected of each candidate and its standard deviation, (C,) each."""
        mean_C, deviation_C = self._process.predict(inputs_CN, return_std=True)
        quality_C, slope_C = self._unwarp(mean_C)
        return quality_C, deviation_C * slope_C

    def predict_jointly(self, inputs_CN: Array) -> tuple[Array, Array]:
        """The quality expected of each candidate, (C,), and how they vary together, (C, C)."""
        mean_C, covariance_CC = self._process.predict(inputs_CN, return_cov=True)
        quality_C, slope_C = self._unwarp(mean_C)
        return quality_C, covariance_CC * np.outer(slope_C, slope_C)

    def _unwarp(self, scaled_C: Array) -> tuple[Array, Array]:
        """Qualities, and how fast they grow with what is modelled."""
        distance_C = np.exp(-(self._mean + self._scale * scaled_C))
        return self._ceiling - distance_C, self._scale * distance_C


def _improve_from(
    loss: Callable[[Array], tuple[float, Array]], start: Array, bounds: NDArray[np.float64]
) -> tuple[Array, float]:
    """A few steps of L-BFGS."""
    found = minimize(loss, start, method="L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": FIT_STEPS})
    return found.x, float(found.fun)
