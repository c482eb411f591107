"""Optuna samplers for per-layer retention, chosen by name in a lengths study file.

All of them draw from static ranges and read what they know from the study's trials, so a search resumes from its
database. Two of them know what a length config is: the share of a sequence that a layer leaves is the product of the
retentions up to it, and it is shares, not retentions, that are mixed, mutated and modelled here. Where a layer is
skipped, its retention counts for nothing.

Whether a layer is skipped is a categorical parameter: Optuna's crossovers take it from either parent and its mutation
draws it anew, where a whole number of 0 or 1 would be averaged with others by some of them.

Shape letters: C candidates, N layers, T trials.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, nsgaii
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.early_stopping import ESTIMATE, ESTIMATE_ERROR, Bits
from hpo.front import RETENTION, SKIP
from hpo.staircase import Array, Frontier, convex_hull, frontier_of, members
from studies.loader import LengthsStudy

if TYPE_CHECKING:
    from hpo.surrogate import Surrogate

Key = tuple[bytes, bytes]
"""What configs have in common that keep the same counts: what tells them apart, and the layers they skip."""
CostOf = Callable[["Configs"], Array]
"""The cost of each config as a share of full length's, (C,), or its two costs, (C, 2)."""
Identify = Callable[["Configs"], NDArray[Any]]
"""Numbers that are equal for configs that keep the same counts, (C, ..)."""

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
    full_cost: Sequence[float] | None = None,
    identify: Identify | None = None,
) -> BaseSampler:
    """The sampler that a study file names.

    Args:
        definition: The study file.
        space: The search space, `retention_0 ..` in order of the layers, and `skip_i` of those that may be skipped.
        cost_of: Exact cost of configs; the surrogate predicts quality alone.
        seed: Of all draws.
        reads_first: Whether the head reads the first token alone, so that quality does not depend on what the last
            layer keeps.
        alone: Whether one worker asks for all trials; where several do, the surrogate chooses a generation's children
            together as ever, though other trials are finished while they are asked one part after the other.
        full_cost: What full length costs, by each measure; None where there is one and nothing costs more.
        identify: What tells configs apart that keep other counts; None where their costs do.
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
                    full_cost=full_cost,
                    identify=identify,
                )
                return optuna.samplers.NSGAIISampler(
                    population_size=definition.population_size, child_generation_strategy=screening, seed=seed
                )


@dataclass(frozen=True)
class Configs:
    """Many length configs.

    Attributes:
        shares_CN: Shares left after each layer, never rising; what is written at a skipped layer counts for nothing.
        skipped_CN: Which layers each skips.
    """

    shares_CN: Array
    skipped_CN: Bits

    @classmethod
    def whole(cls, shares_CN: Array) -> "Configs":
        """Without skipped layers."""
        return cls(shares_CN, np.zeros(shares_CN.shape, dtype=np.bool_))

    @classmethod
    def joined(cls, *parts: "Configs") -> "Configs":
        """One after the other."""
        return cls(
            np.concatenate([part.shares_CN for part in parts]), np.concatenate([part.skipped_CN for part in parts])
        )

    def __len__(self) -> int:
        return len(self.shares_CN)

    def __getitem__(self, which: Any) -> "Configs":
        return Configs(self.shares_CN[which], self.skipped_CN[which])

    def last_computed(self) -> NDArray[np.int64]:
        """The last layer of each that is not skipped, (C,)."""
        last_C: NDArray[np.int64] = self.skipped_CN.shape[1] - 1 - self.skipped_CN[:, ::-1].argmin(axis=1)
        return last_C


@dataclass(frozen=True)
class RetentionSpace:
    """The static range of every layer's retention, the layers that may be skipped, and the way to shares and back.

    Attributes:
        names: Retention parameters in order of the layers.
        low: Least retention.
        high: Greatest retention, 1.
        step: Grid of the retentions; None for any.
        skippable: Layers that have a parameter `skip_i`.
    """

    names: tuple[str, ...]
    low: float
    high: float
    step: float | None
    skippable: tuple[int, ...] = ()

    @classmethod
    def of(cls, space: Mapping[str, BaseDistribution]) -> "RetentionSpace":
        names = tuple(name for name in space if name.startswith(RETENTION))
        skippable = tuple(int(name.removeprefix(SKIP)) for name in space if name.startswith(SKIP))
        first = space[names[0]]
        assert isinstance(first, FloatDistribution)
        return cls(names, first.low, first.high, first.step, skippable)

    def configs_of(self, trials: Sequence[FrozenTrial]) -> Configs:
        """The length config of each trial."""
        retention_TN = np.array([[trial.params[name] for name in self.names] for trial in trials], dtype=np.float64)
        skipped_TN = np.zeros((len(trials), len(self.names)), dtype=np.bool_)
        for layer in self.skippable:
            skipped_TN[:, layer] = [trial.params[f"{SKIP}{layer}"] for trial in trials]
        return self.configs(retention_TN.reshape(skipped_TN.shape), skipped_TN)

    def configs(self, retention_CN: Array, skipped_CN: Bits) -> Configs:
        """The configs that retentions and skips stand for."""
        kept_CN: Array = np.where(skipped_CN, 1.0, retention_CN)
        return Configs(np.cumprod(kept_CN, axis=1), skipped_CN)

    def to_retention(self, configs: Configs) -> Array:
        """The retentions whose products come nearest to shares, layer by layer, within range and on the grid.

        Each layer aims at its own share given what the rounded layers before it leave, so rounding does not add up.
        A skipped layer gets 1.
        """
        retention_CN = np.empty_like(configs.shares_CN)
        left_C = np.ones(len(configs))
        for layer in range(retention_CN.shape[1]):
            wanted_C = np.clip(configs.shares_CN[:, layer] / left_C, self.low, self.high)
            if self.step is not None:
                steps_C = np.round((wanted_C - self.low) / self.step)
                wanted_C = np.minimum(self.low + steps_C * self.step, self.high)
            wanted_C = np.where(configs.skipped_CN[:, layer], 1.0, wanted_C)
            retention_CN[:, layer] = wanted_C
            left_C = left_C * wanted_C
        return retention_CN

    def params(self, retention_N: Array, skipped_N: Bits | None = None) -> dict[str, Any]:
        """As Optuna stores them; None skips no layer."""
        decimals = [round(float(retention), 10) for retention in retention_N]
        skips = {f"{SKIP}{layer}": skipped_N is not None and bool(skipped_N[layer]) for layer in self.skippable}
        return {**dict(zip(self.names, decimals, strict=True)), **skips}

    def breed_skips(self, first_CN: Bits, second_CN: Bits, flips_C: Array, generator: np.random.Generator) -> Bits:
        """Which layers children skip: each as either parent does, and then now and then the other way.

        Args:
            first_CN: Layers that one parent skips.
            second_CN: Layers that the other skips.
            flips_C: How many layers of each child change their mind, on average.
            generator: Source of randomness.
        """
        layers, size = list(self.skippable), (len(first_CN), len(self.skippable))
        as_first_CS = generator.random(size) < 0.5
        flipped_CS = generator.random(size) < flips_C[:, None] / max(1, len(layers))
        child_CN = first_CN.copy()
        child_CN[:, layers] = np.where(as_first_CS, first_CN[:, layers], second_CN[:, layers]) ^ flipped_CS
        return child_CN


class LatSampler(BaseSampler):
    """The Length-Adaptive Transformer's evolution of lengths, one child at a time.

    Parents come from the convex hull of the front. Every other child is a mutation, in which each layer's share is
    redrawn with probability 0.5 between its neighbours'; the others are the mean of two parents. The paper alternates
    30 of each per round; asked in generations of an even size, so does this. Which layers are skipped, of which the
    paper knows nothing, a mutation flips for one layer on average, and a mean takes from either parent.

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
        parents, generator = scored.configs[convex_hull(scored.cost_T, scored.quality_T)], self._generator
        if trial.number % 2:
            pair = parents[generator.integers(len(parents), size=2)]
            skipped_1N = self._retentions.breed_skips(pair.skipped_CN[:1], pair.skipped_CN[1:], np.zeros(1), generator)
            child = Configs(pair.shares_CN.mean(axis=0, keepdims=True), skipped_1N)
        else:
            parent = parents[generator.integers(len(parents), size=1)]
            skipped_1N = self._retentions.breed_skips(parent.skipped_CN, parent.skipped_CN, np.ones(1), generator)
            bred = Configs(parent.shares_CN, skipped_1N)
            child = mutate_between_neighbours(bred, np.array([LAT_MUTATION_PROB]), generator)
        return self._retentions.params(self._retentions.to_retention(child)[0], child.skipped_CN[0])

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _surrogate() -> "Surrogate":
    from hpo.surrogate import Surrogate  # brings scikit-learn, which commands that search nothing need not wait for

    return Surrogate()


@dataclass(kw_only=True)
class SurrogateScreening:
    """NSGA-II's child generation with a predictor in front of it.

    A brood many times the generation's size is bred from the front and NSGA-II's own parents. A Gaussian process fitted
    on the scored trials predicts the quality of each candidate, whose cost is known exactly, and those are asked that
    promise the greatest expected gain of hypervolume, each given those chosen before it.

    Attributes:
        retentions: The search space.
        cost_of: Exact cost of configs.
        generation: Children chosen at a time.
        brood: Candidates bred per child.
        reads_first: Whether the last layer's count costs without deciding anything; it is then the least possible. The
            last layer is that which is not skipped.
        generator: Source of randomness.
        patience: Trials that must have been finished since children were chosen for the rest of them to be given up.
        surrogate: The predictor.
        tried: Keys of the configs that were tried, also of trials that the study shows no more.
        waiting: Children chosen and not yet asked for.
        known: How many trials were finished when they were chosen.
        full_cost: What full length costs, by each measure; None where there is one and nothing costs more.
        identify: What tells configs apart that keep other counts; None where their costs do.
    """

    retentions: RetentionSpace
    cost_of: CostOf
    generation: int
    brood: int
    reads_first: bool
    generator: np.random.Generator
    patience: int = 1
    surrogate: "Surrogate" = field(default_factory=_surrogate)
    tried: set[Key] = field(default_factory=set)
    waiting: list[dict[str, Any]] = field(default_factory=list)
    known: int = -1
    full_cost: Sequence[float] | None = None
    identify: Identify | None = None

    def __call__(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution], parents: list[FrozenTrial]
    ) -> dict[str, Any]:
        """The parameters of one child."""
        count = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))
        if not self.waiting or abs(count - self.known) >= self.patience:
            self.known = count
            scored, stopped = _Scored.of(study, self.retentions, self.full_cost), _Stopped.of(study, self.retentions)
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            under_way = self.retentions.configs_of(
                [trial for trial in running if len(trial.params) == len(search_space)]
            )
            self.waiting = self._choose(scored, stopped, under_way, self.retentions.configs_of(parents))
        return self.waiting.pop(0)

    def _choose(
        self, scored: "_Scored", stopped: "_Stopped", under_way: Configs, parents: Configs
    ) -> list[dict[str, Any]]:
        front = frontier_of(scored.cost_T, scored.quality_T)
        tried = Configs.joined(scored.configs, stopped.configs)
        tried_cost_T = self.cost_of(tried)
        self._learn(front, scored, stopped, tried, tried_cost_T)
        self.tried.update(self._keys(tried, tried_cost_T))
        under_way_cost_T = self.cost_of(under_way) if len(under_way) else np.empty(0)
        retention_CN, bred, cost_C = self._breed(scored, set(self._keys(under_way, under_way_cost_T)), parents)
        front = self._expected(front, under_way, under_way_cost_T)
        mean_C, deviation_C = self.surrogate.predict(self._inputs(bred))
        prospects_C = front.expected_gain(cost_C, mean_C, deviation_C)
        best = np.argsort(-prospects_C, kind="stable")[: max(SCREENED, self.generation)]
        mean_C, covariance_CC = self.surrogate.predict_jointly(self._inputs(bred[best]))
        effort = SharedEffort.of(retention_CN[best], bred.skipped_CN[best])
        picked = best[choose_batch(front, cost_C[best], mean_C, covariance_CC, self.generation, effort)]
        return [self.retentions.params(retention_CN[number], bred.skipped_CN[number]) for number in picked]

    def _expected(self, front: Frontier, under_way: Configs, cost_T: Array) -> Frontier:
        """The front once the trials that other workers have running turn out as predicted."""
        if not len(cost_T):
            return front
        for cost, quality in zip(cost_T, self.surrogate.predict(self._inputs(under_way))[0], strict=True):
            front = front.with_point(cost, float(quality))
        return front

    def _breed(self, scored: "_Scored", under_way: set[Key], parents: Configs) -> tuple[Array, Configs, Array]:
        """Distinct retentions that nobody has tried or is trying, (C, N), their configs, and their costs."""
        cost_TK = scored.cost_T.reshape(len(scored.quality_T), -1)
        front = scored.configs[members(cost_TK, scored.quality_T)]
        pool = Configs.joined(front, front, parents)
        generator, count, layers = self.generator, self.brood * self.generation, pool.shares_CN.shape[1]
        first_C, second_C = generator.integers(len(pool), size=(2, count))
        first_CN, second_CN = pool.shares_CN[first_C], pool.shares_CN[second_C]
        weight_C1 = generator.random((count, 1))
        mixed_CN = weight_C1 * first_CN + (1 - weight_C1) * second_CN
        crossed_CN = np.minimum.accumulate(
            np.where(generator.random(first_CN.shape) < 0.5, first_CN, second_CN), axis=1
        )
        way_C = np.arange(count) % 4
        bred_CN = np.choose(way_C[:, None], [first_CN, first_CN, mixed_CN, crossed_CN])
        mutation_C = np.choose(way_C, [LAT_MUTATION_PROB, 1 / layers, 0.0, 1 / layers])
        other_C = np.where(way_C < 2, first_C, second_C)
        skipped_CN = self.retentions.breed_skips(
            pool.skipped_CN[first_C], pool.skipped_CN[other_C], np.where(way_C == 2, 0.0, 1.0), generator
        )
        children = mutate_between_neighbours(Configs(bred_CN, skipped_CN), mutation_C, generator)
        if self.reads_first:
            children.shares_CN[np.arange(count), children.last_computed()] = 0.0
        retention_CN = np.round(self.retentions.to_retention(children), 10)
        bred = self.retentions.configs(retention_CN, skipped_CN)
        cost_C = self.cost_of(bred)
        tried = self.tried | under_way
        distinct = {key: number for number, key in enumerate(self._keys(bred, cost_C)) if key not in tried}
        new = sorted(distinct.values()) or list(range(len(cost_C)))
        return retention_CN[new], bred[new], cost_C[new]

    def _keys(self, configs: Configs, cost_C: Array) -> list[Key]:
        """Equal for configs that skip the same layers and keep the same counts: whoever tried one tried the other."""
        told_C = np.round(cost_C, 12) if self.identify is None else self.identify(configs)
        pairs = zip(told_C, configs.skipped_CN, strict=True)
        return [(told.tobytes(), skipped_N.tobytes()) for told, skipped_N in pairs]

    def _inputs(self, configs: Configs) -> Array:
        """What quality depends on: shares that decide something, and which layers are skipped."""
        shares_CN, layers = configs.shares_CN, configs.shares_CN.shape[1]
        if self.reads_first and layers > 1:
            last_C1 = configs.last_computed()[:, None]
            arriving_C1 = np.take_along_axis(np.insert(shares_CN, 0, 1.0, axis=1), last_C1, axis=1)
            shares_CN = np.where(np.arange(layers) < last_C1, shares_CN, arriving_C1)[:, :-1]
        return np.hstack([shares_CN, configs.skipped_CN[:, list(self.retentions.skippable)]])

    def _learn(
        self, front: Frontier, scored: "_Scored", stopped: "_Stopped", tried: Configs, tried_cost_T: Array
    ) -> None:
        quality_T = np.concatenate([scored.quality_T, stopped.estimate_T])
        error_T = np.concatenate([np.zeros_like(scored.quality_T), stopped.error_T])
        self.surrogate.fit(self._inputs(tried), quality_T, error_T, front.height(tried_cost_T) - quality_T)


@dataclass(frozen=True)
class _Scored:
    """The completed trials of a study, quality to be maximised.

    Attributes:
        configs: Their length configs.
        quality_T: First objective, negated where it is minimised.
        cost_T: Second objective as a share of full length's; (T, 2) where there are three.
    """

    configs: Configs
    quality_T: Array
    cost_T: Array

    @classmethod
    def of(cls, study: optuna.Study, retentions: RetentionSpace, full_cost: Sequence[float] | None = None) -> "_Scored":
        """Where full length's cost is not given, it is the greatest."""
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        shape = len(trials), len(study.directions)
        values_TO = np.array([trial.values for trial in trials], dtype=np.float64).reshape(shape)
        cost_TK = values_TO[:, 1:]
        cost_TK = cost_TK / (cost_TK.max(axis=0, initial=1e-300) if full_cost is None else full_cost)
        cost_T = cost_TK[:, 0] if cost_TK.shape[1] == 1 else cost_TK
        return cls(retentions.configs_of(trials), _sign(study) * values_TO[:, 0], cost_T)


@dataclass(frozen=True)
class _Stopped:
    """The trials of a study that were stopped early, quality to be maximised.

    Attributes:
        configs: Their length configs.
        estimate_T: What the part they have seen says of their quality.
        error_T: Its standard error.
    """

    configs: Configs
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
        return cls(retentions.configs_of(trials), _sign(study) * estimate_T, error_T)


def _sign(study: optuna.Study) -> float:
    return 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0


def mutate_between_neighbours(configs: Configs, probability_C: Array, generator: np.random.Generator) -> Configs:
    """Redraw some layers' shares, each between what the computed layers beside it leave.

    Args:
        configs: Shares and skipped layers, which stay.
        probability_C: Of each layer of a candidate.
        generator: Source of randomness.
    Source: Kim & Cho 2021, "Evolutionary Search of Length Configurations".
    """
    child_CN, skipped_CN = configs.shares_CN.copy(), configs.skipped_CN
    redrawn_CN = generator.random(child_CN.shape) < probability_C[:, None]
    place_CN = generator.random(child_CN.shape)
    below_CN, below_C = np.empty_like(child_CN), np.zeros(len(child_CN))
    for layer in reversed(range(child_CN.shape[1])):
        below_CN[:, layer] = below_C
        below_C = np.where(skipped_CN[:, layer], below_C, child_CN[:, layer])
    above_C = np.ones(len(child_CN))
    for layer in range(child_CN.shape[1]):
        drawn_C = below_CN[:, layer] + place_CN[:, layer] * (above_C - below_CN[:, layer])
        share_C = np.where(redrawn_CN[:, layer], drawn_C, child_CN[:, layer])
        above_C = np.where(skipped_CN[:, layer], above_C, share_C)
        child_CN[:, layer] = above_C
    return Configs(child_CN, skipped_CN)


@dataclass
class SharedEffort:
    """What evaluating a candidate takes, given that those picked with it are evaluated in one walk.

    Configs that begin with the same retentions and skips share those layers' computation. The first layers are
    remembered from generation to generation and the last is computed for one token only, so that the layers between
    decide.

    Attributes:
        beginning_NC: For each layer that decides, which distinct beginning each candidate has there.
        tokens_NC: Share of the tokens that arrive there; 0 where the layer is skipped.
        done_NC: Whether a picked candidate has the same beginning.
    """

    beginning_NC: NDArray[np.int64]
    tokens_NC: Array
    done_NC: NDArray[np.bool_]

    @classmethod
    def of(cls, retention_CN: Array, skipped_CN: Bits) -> "SharedEffort":
        """Nothing is picked yet."""
        layers = range(REMEMBERED_LAYERS, retention_CN.shape[1] - 1)
        entry_CN = np.where(skipped_CN, 0.0, retention_CN)
        beginnings = [np.unique(entry_CN[:, :layer], axis=0, return_inverse=True)[1].reshape(-1) for layer in layers]
        shares_CN = np.cumprod(np.where(skipped_CN, 1.0, retention_CN), axis=1)
        tokens = [shares_CN[:, layer - 1] * ~skipped_CN[:, layer] for layer in layers]
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
    front: Frontier,
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
        front = front.with_point(cost_C[best], float(mean_C[best]))
        shared_C = covariance_CC[:, best] - sum((part * part[best] for part in explained), np.zeros(len(cost_C)))
        part = shared_C / np.sqrt(max(float(shared_C[best]), 0.0) + noise)
        explained.append(part)
        variance_C -= part**2
    return picked
