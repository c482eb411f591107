"""The best quality that each cost buys, as a staircase, or two costs, as terraces, and what another point would add.

Quality is to be maximised here, cost to be minimised.

Shape letters: T points, K costs, J and I steps of the staircase or edges of the terraces, H heights, C candidates.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.floating[Any]]


def convex_hull(cost_T: Array, quality_T: Array) -> NDArray[np.int64]:
    """Indices of the front's points on its upper left convex hull, by rising cost."""
    hull: list[int] = []
    for point in Staircase.members(cost_T, quality_T):
        while len(hull) >= 2:
            a, b = hull[-2:]
            turn = (cost_T[b] - cost_T[a]) * (quality_T[point] - quality_T[a]) - (quality_T[b] - quality_T[a]) * (
                cost_T[point] - cost_T[a]
            )
            if turn < 0:
                break
            hull.pop()
        hull.append(int(point))
    return np.array(hull, dtype=np.int64)


def members(costs_TK: Array, quality_T: Array) -> NDArray[np.int64]:
    """Indices of the points that no other beats, by rising costs, the first cost first; of equals the first.

    A point is beaten by one that is no worse in any respect and better in one.
    """
    if costs_TK.shape[1] == 1:
        return Staircase.members(costs_TK[:, 0], quality_T)
    order = np.lexsort((-quality_T, *costs_TK.T[::-1]))  # whoever beats a point comes before it, and so do its equals
    kept: list[int] = []
    for point in order:
        earlier = np.array(kept, dtype=np.int64)
        is_beaten = (costs_TK[earlier] <= costs_TK[point]).all(axis=1) & (quality_T[earlier] >= quality_T[point])
        if not is_beaten.any():
            kept.append(int(point))
    return np.array(kept, dtype=np.int64)


def behind(costs_TK: Array, quality_T: Array) -> Array:
    """How far the quality of each point is below the best of those that cost no more by any measure."""
    if costs_TK.shape[1] == 1:
        return Staircase.of(costs_TK[:, 0], quality_T).height(costs_TK[:, 0]) - quality_T
    front = members(costs_TK, quality_T)
    best_T = np.full(len(quality_T), -np.inf)
    for point in front:
        reached_T = (costs_TK[point] <= costs_TK).all(axis=1)
        best_T[reached_T] = np.maximum(best_T[reached_T], quality_T[point])
    behind_T: Array = best_T - quality_T
    return behind_T


@dataclass(frozen=True)
class Staircase:
    """The best quality at most at a cost, as a function of cost up to full length.

    Attributes:
        edge_J: Costs where a step begins, ascending, the first 0 and the end 1 left out.
        height_J: Quality from each edge on, rising; the first is that of the reference point.
    """

    edge_J: Array
    height_J: Array

    @staticmethod
    def members(cost_T: Array, quality_T: Array) -> NDArray[np.int64]:
        """Indices of the non-dominated points by rising cost; of equals the first."""
        order = np.lexsort((-quality_T, cost_T))
        best = np.maximum.accumulate(np.concatenate([[-np.inf], quality_T[order]]))[:-1]
        return order[quality_T[order] > best]

    @classmethod
    def of(cls, cost_T: Array, quality_T: Array) -> "Staircase":
        """The staircase of these points; below the cheapest of them quality counts from the worst one's."""
        on_front = cls.members(cost_T, quality_T)
        floor = quality_T.min()
        return cls(np.concatenate([[0.0], cost_T[on_front]]), np.concatenate([[floor], quality_T[on_front]]))

    def height(self, cost_C: Array) -> Array:
        """The best quality known at most at each cost."""
        heights: Array = self.height_J[np.searchsorted(self.edge_J, cost_C, side="right") - 1]
        return heights

    def with_point(self, cost: float, quality: float) -> "Staircase":
        """The staircase with one point more."""
        members = self.members(np.append(self.edge_J[1:], cost), np.append(self.height_J[1:], quality))
        edges, heights = np.append(self.edge_J[1:], cost)[members], np.append(self.height_J[1:], quality)[members]
        return Staircase(np.concatenate([[0.0], edges]), np.concatenate([self.height_J[:1], heights]))

    def expected_gain(self, cost_C: Array, mean_C: Array, deviation_C: Array) -> Array:
        """The hypervolume that each candidate is expected to add, its quality being normal and its cost known.

        The gain is the area between the candidate's quality and the staircase right of its cost, so its expectation is
        the sum over the steps of their widths times the expected improvement over their heights.
        """
        ends_J = np.append(self.edge_J[1:], max(1.0, self.edge_J[-1]))
        width_CJ = np.clip(ends_J - np.maximum(self.edge_J, cost_C[:, None]), 0.0, None)
        gain_C: Array = (width_CJ * _improvement(self.height_J, mean_C, deviation_C)).sum(axis=1)
        return gain_C


@dataclass(frozen=True)
class Terraces:
    """The best quality at most at two costs, as a function of both up to full length.

    Attributes:
        costs_T2: Of the points.
        quality_T: Of the points.
        floor: Quality of the reference point.
    """

    costs_T2: Array
    quality_T: Array
    floor: float

    @classmethod
    def of(cls, costs_T2: Array, quality_T: Array) -> "Terraces":
        """The terraces of these points; where none is affordable, quality counts from the worst one's."""
        front = members(costs_T2, quality_T)
        return cls(costs_T2[front], quality_T[front], float(quality_T.min()))

    def height(self, costs_C2: Array) -> Array:
        """The best quality known at most at each pair of costs."""
        affordable_CT = (self.costs_T2 <= costs_C2[:, None]).all(axis=2)
        heights: Array = np.where(affordable_CT, self.quality_T, self.floor).max(axis=1, initial=self.floor)
        return heights

    def with_point(self, costs: Array, quality: float) -> "Terraces":
        """The terraces with one point more."""
        costs_T2, quality_T = np.vstack([self.costs_T2, costs]), np.append(self.quality_T, quality)
        front = members(costs_T2, quality_T)
        return Terraces(costs_T2[front], quality_T[front], self.floor)

    def expected_gain(self, costs_C2: Array, mean_C: Array, deviation_C: Array) -> Array:
        """The hypervolume that each candidate is expected to add, its quality being normal and its costs known.

        As for a staircase: the terraces beyond the candidate's costs, each by its area, which is added up by height.
        """
        edges = [np.unique(np.append(0.0, column_T)) for column_T in self.costs_T2.T]
        width_CI, width_CJ = (
            np.clip(np.append(edge[1:], max(1.0, edge[-1])) - np.maximum(edge, cost_C[:, None]), 0.0, None)
            for edge, cost_C in zip(edges, costs_C2.T, strict=True)
        )
        corners = np.stack(np.meshgrid(*edges, indexing="ij"), axis=-1)
        height_H, which_IJ = np.unique(self.height(corners.reshape(-1, 2)), return_inverse=True)
        area_CH = np.zeros((len(costs_C2), len(height_H)))
        for width_C, which_J in zip(width_CI.T, which_IJ.reshape(corners.shape[:2]), strict=True):
            area_CH += width_C[:, None] * (width_CJ @ (which_J[:, None] == np.arange(len(height_H))))
        gain_C: Array = (area_CH * _improvement(height_H, mean_C, deviation_C)).sum(axis=1)
        return gain_C


Frontier = Staircase | Terraces


def frontier_of(costs: Array, quality_T: Array) -> Frontier:
    """A staircase of costs (T,), terraces of costs (T, 2)."""
    return Staircase.of(costs, quality_T) if costs.ndim == 1 else Terraces.of(costs, quality_T)


def _improvement(height_H: Array, mean_C: Array, deviation_C: Array) -> Array:
    """How far each candidate's quality, which is normal, is expected to reach above each height, (C, H)."""
    deviation_C1 = np.maximum(deviation_C, 1e-12)[:, None]
    z_CH = (mean_C[:, None] - height_H) / deviation_C1
    density_CH = np.exp(-(z_CH**2) / 2) / math.sqrt(2 * math.pi)
    improvement_CH: Array = deviation_C1 * (z_CH * ndtr(z_CH) + density_CH)
    return improvement_CH
