"""`hpo search-lengths`: a multi-objective study over how many tokens each layer keeps."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import nsgaii
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from hpo.mirror import AskedTrial, MirroredStudy
from hpo.runs import FOLDER_ATTRIBUTE, StudyRuns, new_folder_name
from hpo.storage import database_reason, finished_trials, open_storage, open_study, uninterrupted
from hpo.workload import (
    LoadedWorkload,
    ProgressHook,
    Workload,
    library_versions,
    load_encoder,
    load_workload,
    require_trials,
)
from model.encoder import LengthAdaptiveModel
from model.evaluate import score
from model.hardware import compute_device
from model.length_config import LengthConfig
from model.macs import mean_macs
from studies.loader import LengthsStudy

logger = logging.getLogger(__name__)

COST_NAME = "macs"
COST_DIRECTION: Literal["minimize"] = "minimize"
CROSSOVERS: dict[str, Callable[[], nsgaii.BaseCrossover]] = {
    "uniform": nsgaii.UniformCrossover,
    "blxalpha": nsgaii.BLXAlphaCrossover,
    "sbx": nsgaii.SBXCrossover,
    "vsbx": nsgaii.VSBXCrossover,
    "spx": nsgaii.SPXCrossover,
    "undx": nsgaii.UNDXCrossover,
}


@dataclass
class SearchTimes:
    """Where the wall time of a search went, in seconds.

    Attributes:
        total: The generations: asking, evaluating and telling.
        model: In the encoder and its metric.
        storage: Asking and telling: the sampler and the database.
    """

    total: float = 0.0
    model: float = 0.0
    storage: float = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to one of the attributes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True)
class LengthSearch:
    """A finished search.

    Attributes:
        study: The study, its front scored on the report split.
        evaluated: Configs that went through the model in this run.
        reused: Trials of this run whose lengths had been scored before.
        times: Where this run's time went.
    """

    study: optuna.Study
    evaluated: int
    reused: int
    times: SearchTimes


def search_lengths(
    definition: LengthsStudy,
    workload: Workload,
    checkpoint: Path,
    *,
    trials: int,
    storage: str,
    runs: Path,
    seed: int = 0,
    on_progress: ProgressHook | None = None,
) -> LengthSearch:
    """Run or complete a study over per-layer token retention of one checkpoint.

    Args:
        definition: Range and sampler.
        workload: Dataset and metric.
        checkpoint: Folder of the trained encoder with its tokenizer.
        trials: Finished trials that the study shall have in all; none is added to a complete one.
        storage: SQLAlchemy URL of the database.
        runs: Folder whose lock keeps a second process off the study.
        seed: Of the sampler.
        on_progress: Told about each batch.
    Raises:
        HpoError: The study was made with something else or cannot be stored.
        DataError: The dataset cannot be used.
        CheckpointError: The encoder cannot be loaded.
    """
    require_trials(trials)
    rdb = open_storage(storage)
    loaded = load_workload(workload, checkpoint)
    model = load_encoder(checkpoint, loaded.corpus).to(compute_device())
    study = open_study(
        rdb,
        definition.name,
        directions=[loaded.metric.direction, COST_DIRECTION],
        metric_names=[loaded.metric.name, COST_NAME],
        identity={
            "model": model.fingerprint(),
            "dataset": loaded.dataset_identity,
            "search space": definition.space_fingerprint(),
            "metric": workload.metric,
        },
        attributes={
            "kind": "lengths",
            "workload": workload.to_attribute(),
            "checkpoint": str(checkpoint),
            "seed": seed,
            "versions": library_versions(),
            "full_macs": mean_macs(model.shape, loaded.search.num_tokens),
            "report_full_macs": mean_macs(model.shape, loaded.report.num_tokens),
            "median_tokens": int(np.median(loaded.search.num_tokens)),
            FOLDER_ATTRIBUTE: new_folder_name(definition.name),
        },
    )
    with StudyRuns(runs, study).locked():
        sampler = _sampler(definition, seed + len(study.get_trials(deepcopy=False)))
        mirror = MirroredStudy(study, rdb, sampler, search_space(definition, model.num_layers))
        run = _Run(study, mirror, definition, model, loaded, trials, on_progress)
        run.complete()
        run.score_front_on_report_split()
    return LengthSearch(study=study, evaluated=run.evaluated, reused=run.reused, times=run.times)


@dataclass
class _Run:
    """One process's work on the study."""

    study: optuna.Study
    mirror: MirroredStudy
    definition: LengthsStudy
    model: LengthAdaptiveModel
    loaded: LoadedWorkload
    trials: int
    on_progress: ProgressHook | None
    evaluated: int = 0
    reused: int = 0
    times: SearchTimes = field(default_factory=SearchTimes)
    _first_with: dict[bytes, int] = field(default_factory=dict)  # trial that first asked for these lengths
    _metric_of: dict[bytes, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lengths_present: NDArray[np.int64] = np.unique(self.loaded.search.num_tokens)

    def complete(self) -> None:
        """Ask, evaluate and tell generations until the study has its trials."""
        for trial in finished_trials(self.study):
            self._remember(trial.number, config_of(trial.params), float(trial.values[0]))
        adopted = self.mirror.orphans()
        self._enqueue_first_generation(adopted)
        while (done := self._count_finished()) < self.trials:
            size = self.definition.population_size
            wanted = min(size - done % size, self.trials - done)
            logger.info("%d of %d trials are done; the next generation is %d.", done, self.trials, wanted)
            asked, adopted = adopted[:wanted], adopted[wanted:]
            try:
                with self.times.measure("total"):
                    with self.times.measure("storage"), uninterrupted():
                        while len(asked) < wanted:
                            asked.append(self._ask())
                    metrics = self._evaluate(asked, done)
                    with self.times.measure("storage"), uninterrupted():
                        self._tell(asked, metrics)
            except BaseException as error:
                self._abandon([*asked, *adopted], "interrupted" if isinstance(error, KeyboardInterrupt) else str(error))
                raise
        self._abandon(adopted, "not needed: the study was complete without it")

    def score_front_on_report_split(self) -> None:
        """Score the front and the full length once on the report split, and record both metric and cost."""
        report = self.loaded.report
        known = self.study.user_attrs
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        full = [trial for trial in complete if set(trial.params.values()) == {1.0}][:1]
        wanted = {trial.number: config_of(trial.params) for trial in (*full, *self.study.best_trials)}
        missing = {number: config for number, config in wanted.items() if f"report_metric:{number}" not in known}
        if not missing:
            return
        values = score(self.model, report, list(missing.values()), self.loaded.metric)
        for (number, config), value in zip(missing.items(), values, strict=True):
            self.study.set_user_attr(f"report_macs:{number}", mean_macs(self.model.shape, report.num_tokens, config))
            self.study.set_user_attr(f"report_metric:{number}", value)

    def _count_finished(self) -> int:
        with uninterrupted():
            return len(finished_trials(self.study))

    def _ask(self) -> AskedTrial:
        asked = self.mirror.ask(self._attributes_of)
        self._first_with.setdefault(self._key(config_of(asked.params)), asked.number)
        return asked

    def _attributes_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The length config, and the trial whose score is reused where these lengths were asked for before."""
        config = config_of(params)
        earlier = self._first_with.get(self._key(config))
        return {"shares": list(config.shares or ()), **({} if earlier is None else {"reused_from": earlier})}

    def _evaluate(self, asked: Sequence[AskedTrial], done: int) -> list[float]:
        """The metric of each trial; those with lengths scored before, also within the generation, reuse it."""
        configs = {self._key(config): config for config in (config_of(trial.params) for trial in asked)}
        new = {key: config for key, config in configs.items() if key not in self._metric_of}

        def report_share(share: float) -> None:
            if self.on_progress is not None:
                self.on_progress(done + share * len(asked), self.trials, f"{self.reused} reused")

        if new:
            with self.times.measure("model"):
                search, metric = self.loaded.search, self.loaded.metric
                metrics = score(self.model, search, list(new.values()), metric, on_progress=report_share)
            self._metric_of.update(zip(new, metrics, strict=True))
        self.evaluated += len(new)
        self.reused += len(asked) - len(new)
        return [self._metric_of[self._key(config_of(trial.params))] for trial in asked]

    def _tell(self, asked: Sequence[AskedTrial], metrics: Sequence[float]) -> None:
        for trial, metric in zip(asked, metrics, strict=True):
            cost = mean_macs(self.model.shape, self.loaded.search.num_tokens, config_of(trial.params))
            self.mirror.tell(trial, (metric, cost))

    def _abandon(self, asked: Sequence[AskedTrial], reason: str) -> None:
        """Fail trials that this process asked for and will not tell, as far as the database still answers."""
        if not asked:
            return
        try:
            with uninterrupted():
                running = self.mirror.running()
                for trial in asked:
                    if trial.number in running:
                        self.mirror.fail(trial, reason)
        except (SQLAlchemyError, StorageInternalError) as error:
            reason = database_reason(error)
            logger.warning("Running trials could not be marked as failed (%s); the next run takes them over.", reason)

    def _enqueue_first_generation(self, adopted: Sequence[AskedTrial]) -> None:
        """Queue the constant-rate configs over the whole range, unless they are in the study already."""
        there = [dict(trial.params) for trial in adopted] + [trial.params for trial in finished_trials(self.study)]
        for rate in constant_rates(self.definition)[: self.trials]:
            params = dict.fromkeys(self.mirror.distributions, rate)
            if params not in there:
                self.mirror.enqueue(params)

    def _remember(self, number: int, config: LengthConfig, metric: float) -> None:
        self._first_with.setdefault(self._key(config), number)
        self._metric_of.setdefault(self._key(config), metric)

    def _key(self, config: LengthConfig) -> bytes:
        """Equal for configs that keep equal counts in every sequence of the search split."""
        return config.count_table(self._lengths_present).tobytes()


def search_space(definition: LengthsStudy, num_layers: int) -> dict[str, BaseDistribution]:
    """`retention_0 .. retention_{L-1}`, each from the same fixed range."""
    retention = definition.retention
    distribution = FloatDistribution(retention.low, retention.high, step=retention.step)
    return {f"retention_{layer}": distribution for layer in range(num_layers)}


def config_of(parameters: Mapping[str, Any]) -> LengthConfig:
    """The length config that a trial's `retention_0 .. retention_{L-1}` stand for."""
    return LengthConfig.from_retention([parameters[f"retention_{layer}"] for layer in range(len(parameters))])


def constant_rates(definition: LengthsStudy, most: int = 13) -> list[float]:
    """Retentions of the first generation's constant-rate configs: full length, the smallest, then those between."""
    low, high, step = definition.retention.low, definition.retention.high, definition.retention.step
    between = np.linspace(low, high, most)
    if step is not None:
        between = low + np.round((between - low) / step) * step
    rates = [float(high), float(low), *(round(float(rate), 10) for rate in between)]
    return list(dict.fromkeys(rates))


def _sampler(definition: LengthsStudy, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.samplers.NSGAIISampler(
            population_size=definition.population_size,
            mutation_prob=definition.mutation_prob,
            crossover=CROSSOVERS[definition.crossover](),
            crossover_prob=definition.crossover_prob,
            swapping_prob=definition.swapping_prob,
            seed=seed,
        )
