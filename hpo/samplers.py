"""Optuna samplers for per-layer retention, chosen by name in a lengths study file.

All of them draw from static ranges and read what they know from the study's trials, so a search resumes from its
database. Two of them know what a length config is: the share of a sequence that a layer leaves is the product of the
retentions up to it, and it is shares, not retentions, that are mixed, mutated and modelled here.

Shape letters: C candidates, N layers, T trials.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, nsgaii
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.early_stopping import ESTIMATE, ESTIMATE_ERROR
from hpo.staircase import Array, Staircase, convex_hull
from hpo.surrogate import Surrogate
from studies.loader import LengthsStudy

CostOf = Callable[[Array], Array]
"""Shares (C, N) to the cost of each as a share of full length, (C,)."""

CROSSOVERS: dict[str, Callable[[], nsgaii.BaseCrossover]] = {
    "uniform": nsgaii.UniformCrossover,
    "blxalpha": nsgaii.BLXAlphaCrossover,
    "sbx": nsgaii.SBXCrossover,
    "vsbx": nsgaii.VSBXCrossover,
    "spx": nsgaii.SPXCrossover,
    "undx": nsgaii.UNDXCrossover,
}

LAT_MUTATION_PROB = 0.5
REMEMBERED_LAYERS = 2
"""Layers whose results the evaluation engine keeps from generation to generation."""
LEAST_EFFORT = 0.3
"""What evaluating any config takes, in layers at full length."""
EFFORT_POWER = 0.5
"""How much effort counts against gain: 0 is gain alone, 1 gain per time, more asks for the cheap first."""
SCREENED = 250
"""Candidates of a brood whose joint uncertainty is computed; the others are screened out by their own prospects."""


def make_sampler(
    definition: LengthsStudy,
    space: Mapping[str, BaseDistribution],
    cost_of: CostOf,
    seed: int,
    reads_first: bool,
    alone: bool = True,
) -> BaseSampler:
    """The sampler that a study file names.

    Args:
        definition: The study file.
        space: The search space, `retention_0 ..` in order of the layers.
        cost_of: Exact cost of shares; the surrogate predicts quality alone.
        seed: Of all draws.
        reads_first: Whether the head reads the first token alone, so that quality does not depend on what the last
            layer keeps.
        alone: Whether one worker asks for all trials; where several do, the surrogate chooses a generation's children
            together as ever, though other trials are finished while they are asked one part after the other.
    """
    retentions = RetentionSpace.of(space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match definition.sampler:
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)
            case "tpe":
                return optuna.samplers.TPESampler(multivariate=True, seed=seed)
            case "lat":
                return LatSampler(retentions, dict(space), seed)
            case "nsga2":
                return optuna.samplers.NSGAIISampler(
                    population_size=definition.population_size,
                    mutation_prob=definition.mutation_prob,
                    crossover=CROSSOVERS[definition.crossover](),
                    crossover_prob=definition.crossover_prob,
                    swapping_prob=definition.swapping_prob,
                    seed=seed,
                )
            case _:
                screening = SurrogateScreening(
                    retentions=retentions,
                    cost_of=cost_of,
                    generation=definition.population_size,
                    brood=definition.brood,
                    reads_first=reads_first,
                    generator=np.random.default_rng(seed),
                    patience=1 if alone else definition.population_size,
                )
                return optuna.samplers.NSGAIISampler(
                    population_size=definition.population_size, child_generation_strategy=screening, seed=seed
                )


@dataclass(frozen=True)
class RetentionSpace:
    """The static range of every layer's retention, and the way between retentions and shares.

    Attributes:
        names: Parameters in order of the layers.
        low: Least retention.
        high: Greatest retention, 1.
        step: Grid of the retentions; None for any.
    """

    names: tuple[str, ...]
    low: float
    high: float
    step: float | None

    @classmethod
    def of(cls, space: Mapping[str, BaseDistribution]) -> "RetentionSpace":
        first = next(iter(space.values()))
        assert isinstance(first, FloatDistribution)
        return cls(tuple(space), first.low, first.high, first.step)

    def shares_of(self, trials: Sequence[FrozenTrial]) -> Array:
        """The shares that each trial leaves after each layer, (T, N)."""
        retention_TN = [[trial.params[name] for name in self.names] for trial in trials]
        shares_TN: Array = np.cumprod(
            np.array(retention_TN, dtype=np.float64).reshape(len(trials), len(self.names)), axis=1
        )
        return shares_TN

    def to_retention(self, shares_CN: Array) -> Array:
        """The retentions whose products come nearest to shares, layer by layer, within range and on the grid.

        Each layer aims at its own share given what the rounded layers before it leave, so rounding does not add up.
        """
        retention_CN = np.empty_like(shares_CN)
        left_C = np.ones(len(shares_CN))
        for layer in range(shares_CN.shape[1]):
            wanted_C = np.clip(shares_CN[:, layer] / left_C, self.low, self.high)
            if self.step is not None:
                steps_C = np.round((wanted_C - self.low) / self.step)
                wanted_C = np.minimum(self.low + steps_C * self.step, self.high)
            retention_CN[:, layer] = wanted_C
            left_C = left_C * wanted_C
        return retention_CN

    def params(self, retention_N: Array) -> dict[str, float]:
        """As Optuna stores them."""
        decimals = [round(float(retention), 10) for retention in retention_N]
        return dict(zip(self.names, decimals, strict=True))


class LatSampler(BaseSampler):
    """The Length-Adaptive Transformer's evolution of lengths, one child at a time.

    Parents come from the convex hull of the front. Every other child is a mutation, in which each layer's share is
    redrawn with probability 0.5 between its neighbours'; the others are the mean of two parents. The paper alternates
    30 of each per round; asked in generations of an even size, so does this.

    Source: Kim & Cho 2021, "Evolutionary Search of Length Configurations", and its code.
    """

    def __init__(self, retentions: RetentionSpace, space: dict[str, BaseDistribution], seed: int) -> None:
        self._retentions = retentions
        self._space = space
        self._generator = np.random.default_rng(seed)
        self._random = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        scored = _Scored.of(study, self._retentions)
        if not len(scored.quality_T):
            return {}
        parents_TN = scored.shares_TN[convex_hull(scored.cost_T, scored.quality_T)]
        if trial.number % 2:
            pair = self._generator.integers(len(parents_TN), size=2)
            child_N = parents_TN[pair].mean(axis=0)
        else:
            parent_1N = parents_TN[self._generator.integers(len(parents_TN), size=1)]
            child_N = mutate_between_neighbours(parent_1N, np.array([LAT_MUTATION_PROB]), self._generator)[0]
        return self._retentions.params(self._retentions.to_retention(child_N[None])[0])

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


@dataclass(kw_only=True)
class SurrogateScreening:
    """NSGA-II's child generation with a predictor in front of it.

    A brood many times the generation's size is bred from the front and NSGA-II's own parents. A Gaussian process fitted
    on the scored trials predicts the quality of each candidate, whose cost is known exactly, and those are asked that
    promise the greatest expected gain of hypervolume, each given those chosen before it.

    Attributes:
        retentions: The search space.
        cost_of: Exact cost of shares.
        generation: Children chosen at a time.
        brood: Candidates bred per child.
        reads_first: Whether the last layer's count costs without deciding anything; it is then the least possible.
        generator: Source of randomness.
        patience: Trials that must have been finished since children were chosen for the rest of them to be given up.
        surrogate: The predictor.
        tried: Keys of the costs that were tried, also of trials that the study shows no more.
        waiting: Children chosen and not yet asked for.
        known: How many trials were finished when they were chosen.
    """

    retentions: RetentionSpace
    cost_of: CostOf
    generation: int
    brood: int
    reads_first: bool
    generator: np.random.Generator
    patience: int = 1
    surrogate: Surrogate = field(default_factory=Surrogate)
    tried: set[float] = field(default_factory=set)
    waiting: list[dict[str, float]] = field(default_factory=list)
    known: int = -1

    def __call__(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution], parents: list[FrozenTrial]
    ) -> dict[str, Any]:
        """The parameters of one child."""
        count = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))
        if not self.waiting or abs(count - self.known) >= self.patience:
            self.known = count
            scored, stopped = _Scored.of(study, self.retentions), _Stopped.of(study, self.retentions)
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            under_way_TN = self.retentions.shares_of(
                [trial for trial in running if len(trial.params) == len(search_space)]
            )
            self.waiting = self._choose(scored, stopped, under_way_TN, self.retentions.shares_of(parents))
        return self.waiting.pop(0)

    def _choose(
        self, scored: "_Scored", stopped: "_Stopped", under_way_TN: Array, parents_TN: Array
    ) -> list[dict[str, float]]:
        front = Staircase.of(scored.cost_T, scored.quality_T)
        tried_TN = np.concatenate([scored.shares_TN, stopped.shares_TN])
        tried_cost_T = self.cost_of(tried_TN)
        self._learn(front, scored, stopped, tried_TN, tried_cost_T)
        self.tried.update(_keys(tried_cost_T))
        under_way_cost_T = self.cost_of(under_way_TN) if len(under_way_TN) else np.empty(0)
        retention_CN, cost_C = self._breed(scored, set(_keys(under_way_cost_T)), parents_TN)
        front = self._expected(front, under_way_TN, under_way_cost_T)
        shares_CN = np.cumprod(retention_CN, axis=1)
        mean_C, deviation_C = self.surrogate.predict(self._inputs(shares_CN))
        prospects_C = front.expected_gain(cost_C, mean_C, deviation_C)
        best = np.argsort(-prospects_C, kind="stable")[: max(SCREENED, self.generation)]
        mean_C, covariance_CC = self.surrogate.predict_jointly(self._inputs(shares_CN[best]))
        effort = SharedEffort.of(retention_CN[best])
        picked = choose_batch(front, cost_C[best], mean_C, covariance_CC, self.generation, effort)
        return [self.retentions.params(retention_CN[best[number]]) for number in picked]

    def _expected(self, front: Staircase, under_way_TN: Array, cost_T: Array) -> Staircase:
        """The front once the trials that other workers have running turn out as predicted."""
        if not len(cost_T):
            return front
        for cost, quality in zip(cost_T, self.surrogate.predict(self._inputs(under_way_TN))[0], strict=True):
            front = front.with_point(float(cost), float(quality))
        return front

    def _breed(self, scored: "_Scored", under_way: set[float], parents_TN: Array) -> tuple[Array, Array]:
        """Distinct retentions that nobody has tried or is trying, (C, N), and their costs.

        Retentions of one cost keep the same counts, as good as always: such a candidate was tried too.
        """
        front_TN = scored.shares_TN[Staircase.members(scored.cost_T, scored.quality_T)]
        pool_TN = np.concatenate([front_TN, front_TN, parents_TN])
        generator, count, layers = self.generator, self.brood * self.generation, pool_TN.shape[1]
        first_CN, second_CN = pool_TN[generator.integers(len(pool_TN), size=(2, count))]
        weight_C1 = generator.random((count, 1))
        mixed_CN = weight_C1 * first_CN + (1 - weight_C1) * second_CN
        crossed_CN = np.minimum.accumulate(
            np.where(generator.random(first_CN.shape) < 0.5, first_CN, second_CN), axis=1
        )
        way_C = np.arange(count) % 4
        bred_CN = np.choose(way_C[:, None], [first_CN, first_CN, mixed_CN, crossed_CN])
        mutation_C = np.choose(way_C, [LAT_MUTATION_PROB, 1 / layers, 0.0, 1 / layers])
        shares_CN = mutate_between_neighbours(bred_CN, mutation_C, generator)
        if self.reads_first:
            shares_CN[:, -1] = 0.0
        retention_CN = np.round(self.retentions.to_retention(shares_CN), 10)
        cost_C = self.cost_of(np.cumprod(retention_CN, axis=1))
        tried = self.tried | under_way
        distinct = {key: number for number, key in enumerate(_keys(cost_C)) if key not in tried}
        new = sorted(distinct.values()) or list(range(len(cost_C)))
        return retention_CN[new], cost_C[new]

    def _inputs(self, shares_CN: Array) -> Array:
        """What quality depends on."""
        return shares_CN[:, :-1] if self.reads_first and shares_CN.shape[1] > 1 else shares_CN

    def _learn(
        self, front: Staircase, scored: "_Scored", stopped: "_Stopped", tried_TN: Array, tried_cost_T: Array
    ) -> None:
        quality_T = np.concatenate([scored.quality_T, stopped.estimate_T])
        error_T = np.concatenate([np.zeros_like(scored.quality_T), stopped.error_T])
        self.surrogate.fit(self._inputs(tried_TN), quality_T, error_T, front.height(tried_cost_T) - quality_T)


@dataclass(frozen=True)
class _Scored:
    """The completed trials of a study, quality to be maximised.

    Attributes:
        shares_TN: Shares left after each layer.
        quality_T: First objective, negated where it is minimised.
        cost_T: Second objective as a share of the greatest, which is full length.
    """

    shares_TN: Array
    quality_T: Array
    cost_T: Array

    @classmethod
    def of(cls, study: optuna.Study, retentions: RetentionSpace) -> "_Scored":
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values_T2 = np.array([trial.values for trial in trials], dtype=np.float64).reshape(len(trials), 2)
        cost_T = values_T2[:, 1] / values_T2[:, 1].max(initial=1e-300)
        return cls(retentions.shares_of(trials), _sign(study) * values_T2[:, 0], cost_T)


@dataclass(frozen=True)
class _Stopped:
    """The trials of a study that were stopped early, quality to be maximised.

    Attributes:
        shares_TN: Shares left after each layer.
        estimate_T: What the part they have seen says of their quality.
        error_T: Its standard error.
    """

    shares_TN: Array
    estimate_T: Array
    error_T: Array

    @classmethod
    def of(cls, study: optuna.Study, retentions: RetentionSpace) -> "_Stopped":
        pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        trials = [trial for trial in pruned if ESTIMATE in trial.user_attrs]
        estimate_T, error_T = (
            np.array([trial.user_attrs[name] for trial in trials], dtype=np.float64)
            for name in (ESTIMATE, ESTIMATE_ERROR)
        )
        return cls(retentions.shares_of(trials), _sign(study) * estimate_T, error_T)


def _sign(study: optuna.Study) -> float:
    return 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0


def _keys(cost_C: Array) -> list[float]:
    """Costs that are equal but for rounding have equal keys."""
    keys: list[float] = np.round(cost_C, 12).tolist()
    return keys


def mutate_between_neighbours(shares_CN: Array, probability_C: Array, generator: np.random.Generator) -> Array:
    """Redraw some layers' shares, each between what the layers beside it leave.

    Args:
        shares_CN: Shares left after each layer, never rising.
        probability_C: Of each layer of a candidate.
        generator: Source of randomness.
    Source: Kim & Cho 2021, "Evolutionary Search of Length Configurations".
    """
    child_CN = shares_CN.copy()
    layers = child_CN.shape[1]
    redrawn_CN = generator.random(child_CN.shape) < probability_C[:, None]
    place_CN = generator.random(child_CN.shape)
    for layer in range(layers):
        above_C = child_CN[:, layer - 1] if layer else np.ones(len(child_CN))
        below_C = child_CN[:, layer + 1] if layer + 1 < layers else np.zeros(len(child_CN))
        drawn_C = below_C + place_CN[:, layer] * (above_C - below_C)
        child_CN[:, layer] = np.where(redrawn_CN[:, layer], drawn_C, child_CN[:, layer])
    return child_CN


@dataclass
class SharedEffort:
    """What evaluating a candidate takes, given that those picked with it are evaluated in one walk.

    Configs that begin with the same retentions share those layers' computation. The first layers are remembered from
    generation to generation and the last is computed for one token only, so that the layers between decide.

    Attributes:
        beginning_NC: For each layer that decides, which distinct beginning each candidate has there.
        tokens_NC: Share of the tokens that arrive there.
        done_NC: Whether a picked candidate has the same beginning.
    """

    beginning_NC: NDArray[np.int64]
    tokens_NC: Array
    done_NC: NDArray[np.bool_]

    @classmethod
    def of(cls, retention_CN: Array) -> "SharedEffort":
        """Nothing is picked yet."""
        layers = range(REMEMBERED_LAYERS, retention_CN.shape[1] - 1)
        beginnings = [
            np.unique(retention_CN[:, :layer], axis=0, return_inverse=True)[1].reshape(-1) for layer in layers
        ]
        shares_CN = np.cumprod(retention_CN, axis=1)
        tokens = [shares_CN[:, layer - 1] for layer in layers]
        shape = (len(beginnings), len(retention_CN))
        return cls(
            np.array(beginnings, dtype=np.int64).reshape(shape),
            np.array(tokens, dtype=np.float64).reshape(shape),
            np.zeros(shape, dtype=np.bool_),
        )

    def of_each(self) -> Array:
        """Effort of each candidate, in layers at full length."""
        effort_C: Array = LEAST_EFFORT + (self.tokens_NC * ~self.done_NC).sum(axis=0)
        return effort_C

    def pick(self, candidate: int) -> None:
        """Those with the same beginnings get cheaper."""
        self.done_NC |= self.beginning_NC == self.beginning_NC[:, candidate, None]


def choose_batch(
    front: Staircase,
    cost_C: Array,
    mean_C: Array,
    covariance_CC: Array,
    size: int,
    effort: "SharedEffort | None" = None,
) -> list[int]:
    """Pick candidates one after the other by expected gain, as if those picked had turned out as predicted.

    Args:
        front: What is known.
        cost_C: Exact costs.
        mean_C: Predicted qualities.
        covariance_CC: Of the predictions; a pick takes away the uncertainty that others share with it.
        size: Picks; fewer where there are fewer candidates.
        effort: What each takes, by which its gain is divided; None where all take the same.
    """
    mean_C = np.asarray(mean_C, dtype=np.float64)
    variance_C = np.diag(covariance_CC).copy()
    noise = 1e-3 * float(variance_C.max(initial=1e-12)) + 1e-15
    explained: list[Array] = []
    picked: list[int] = []
    for _ in range(min(size, len(cost_C))):
        gain_C = front.expected_gain(cost_C, mean_C, np.sqrt(np.maximum(variance_C, 0.0)))
        if effort is not None:
            gain_C = gain_C / effort.of_each() ** EFFORT_POWER
        gain_C[picked] = -1.0
        best = int(gain_C.argmax())
        picked.append(best)
        if effort is not None:
            effort.pick(best)
        front = front.with_point(float(cost_C[best]), float(mean_C[best]))
        shared_C = covariance_CC[:, best] - sum((part * part[best] for part in explained), np.zeros(len(cost_C)))
        part = shared_C / np.sqrt(max(float(shared_C[best]), 0.0) + noise)
        explained.append(part)
        variance_C -= part**2
    return picked
