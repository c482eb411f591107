"""`hpo search-lengths`: a multi-objective study over how many tokens each layer keeps."""

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from hpo.bench import covers, time_points
from hpo.bulk import record_once
from hpo.costs import Costs, cost_table, threads
from hpo.early_stopping import (
    ESTIMATE,
    ESTIMATE_ERROR,
    PARTIAL_FIGURES,
    PARTIAL_METRIC,
    SEEN,
    STOPPED_BY,
    Bits,
    Defeat,
    Rivals,
    bits_from_text,
    bits_to_text,
)
from hpo.errors import HpoError
from hpo.front import ORIGIN, PREDICTION, RETENTION, SKIP, Front, compute_front, config_of, constant_rate, non_dominated
from hpo.heartbeats import Heartbeats
from hpo.mirror import AskedTrial, MirroredStudy, Told
from hpo.outage import DEFAULT_TIMEOUT_S
from hpo.runs import FOLDER_ATTRIBUTE, StudyRuns, new_folder_name
from hpo.samplers import Configs, RetentionSpace, make_sampler
from hpo.seeds import learn_seeds
from hpo.sharing import SearchTimes, complete_study, part_of, worker_seed
from hpo.spool import Spool
from hpo.storage import Storage, finished_trials, open_storage, open_study, while_it_is_there
from hpo.workload import (
    LoadedWorkload,
    Progress,
    ProgressHook,
    Workload,
    library_versions,
    load_encoder,
    load_trained_encoder,
    load_workload,
    require_trials,
)
from model.encoded import Answers, EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.evaluate import Evaluator, choose_precision
from model.hardware import compute_device, is_out_of_memory, processor_name
from model.latency import LatencyTable
from model.length_config import LengthConfig
from model.macs import mean_macs
from model.timing import sample
from studies.loader import LengthsStudy

logger = logging.getLogger(__name__)

COST_DIRECTION: Literal["minimize"] = "minimize"
CORRECT = "correct"
"""Attribute of a trial on the front: which examples it gets right."""
METRICS = "metrics"
"""Attribute of a completed trial: every metric that is reported, by name."""
REPORTED_TOGETHER = 25
"""Points that are scored on the report split at a time; what is scored is kept if the run ends in between."""
FRONT_ROUNDS = 3
"""Rounds in which the front is timed in the end, at least."""
SEEDS = "seeds"
"""Attribute of a study: the length configs of another method that joined its first generation."""
NEVER_DROPPED = (
    "%s records no training with LayerDrop, so that each layer it leaves out may cost much quality; "
    "train it with layer_drop above 0, or search without [depth]."
)
REUSED_FROM = "reused_from"
"""Attribute of a trial whose lengths had been scored before: the trial that asked for them first."""


@dataclass(frozen=True, kw_only=True)
class LengthSearch:
    """A finished search.

    Attributes:
        study: The study, its front scored on the report split.
        evaluated: Configs that went through the model in this run.
        stopped: Those of them that were stopped early.
        reused: Trials of this run whose lengths had been scored before.
        times: Where this run's time went.
        table: What predicted times, where they are a cost.
        prediction: How far it was off at the front's points, where these were measured.
    """

    study: optuna.Study
    evaluated: int
    stopped: int
    reused: int
    times: SearchTimes
    table: LatencyTable | None = None
    prediction: "Prediction | None" = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted times of the front's points beside those measured in the end.

    Attributes:
        points: How many points.
        median_error: Of them, as a share of what was measured.
        worst_error: Of them.
        full_error: Of full length, with its sign.
    """

    points: int
    median_error: float
    worst_error: float
    full_error: float


def search_lengths(
    definition: LengthsStudy,
    workload: Workload,
    checkpoint: Path,
    *,
    trials: int,
    storage: str,
    runs: Path,
    seed: int = 0,
    seed_with: str | None = None,
    workers: int = 1,
    on_progress: ProgressHook | None = None,
    storage_timeout_s: float = DEFAULT_TIMEOUT_S,
) -> LengthSearch:
    """Run or complete a study over per-layer token retention of one checkpoint, alone or as one of several workers.

    Args:
        definition: Range and sampler.
        workload: Dataset and metric.
        checkpoint: Folder of the trained encoder with its tokenizer.
        trials: Finished trials that the study shall have in all; none is added to a complete one.
        storage: SQLAlchemy URL of the database.
        runs: Folder for what belongs to the study.
        seed: Of the sampler; with several workers, whose order is left to chance, results differ all the same.
        seed_with: A method of `hpo.seeds` whose length configs join the first generation.
        workers: How many are started together, each of which asks for its part of a generation.
        on_progress: Told about each batch.
        storage_timeout_s: How long the database is waited for if it goes away in between.
    Raises:
        HpoError: The study was made with something else or cannot be stored.
        DataError: The dataset cannot be used.
        CheckpointError: The encoder cannot be loaded.
    """
    require_trials(trials)
    progress = Progress(on_progress)
    rdb = open_storage(storage, timeout_s=storage_timeout_s, on_state=progress.remark)
    loaded = load_workload(workload, checkpoint)
    return search_loaded(
        definition, loaded, checkpoint, trials, rdb, runs, seed, progress, seed_with=seed_with, workers=workers
    )


def search_loaded(
    definition: LengthsStudy,
    loaded: LoadedWorkload,
    checkpoint: Path,
    trials: int,
    rdb: Storage,
    runs: Path,
    seed: int = 0,
    on_progress: ProgressHook | None = None,
    evaluator: Evaluator | None = None,
    seed_with: str | None = None,
    workers: int = 1,
) -> LengthSearch:
    """`search_lengths` over splits and a storage that are open already.

    An `evaluator` over the search split, in the blocks that the definition asks for, lets several searches share what
    it remembers; without one, the search has its own.
    """
    model = load_trained_encoder(checkpoint, loaded.corpus).eval()
    space = search_space(definition, model.num_layers)
    if definition.skippable and not model.layer_drop:
        logger.warning(NEVER_DROPPED, checkpoint)
    study = open_search(definition, loaded, checkpoint, model, rdb, seed)
    study_runs = StudyRuns(runs, study)
    study_runs.prepare()
    spool = Spool(study_runs.folder, study.study_name)
    spool.replay(rdb, study)
    table = fitted_table(study, rdb, definition, model, loaded, trials, on_progress)
    model = model.to(compute_device())
    costs = Costs.of(definition, model, loaded.search, table)
    with while_it_is_there(study, rdb), Heartbeats(rdb) as heartbeats:
        sampler_seed = worker_seed(study, seed, workers)
        sampler = make_sampler(
            definition,
            space,
            costs.shares,
            sampler_seed,
            reads_first=model.reads_first,
            alone=workers == 1,
            full_cost=None if table is None else costs.full,
            identify=costs.tokens_left,
        )
        mirror = MirroredStudy(study, rdb, sampler, space, heartbeats=heartbeats, spool=spool)
        if evaluator is None:
            precision = study.user_attrs.get("precision") or choose_precision(model, loaded.search, loaded.metric)
            precision = record_once(rdb, study._study_id, {"precision": precision})["precision"]
            blocks = definition.blocks if loaded.metric.per_example else 1
            evaluator = Evaluator(model, loaded.search, precision=precision, num_blocks=blocks, seed=seed)
        else:
            record_once(rdb, study._study_id, {"precision": evaluator.precision})
        seeds = _seeds(study, rdb, seed_with, checkpoint, loaded, RetentionSpace.of(space), seed, on_progress)
        run = _Run(study, mirror, definition, model, loaded, evaluator, trials, costs, on_progress, seeds, workers)
        complete_study(mirror, run, trials, run.times)
        run.score_front_on_report_split()
    prediction = None
    if table is not None and workers == 1:  # after several workers one looks whether all is done, alone
        prediction = measure_front(study, rdb.url, table, checkpoint, loaded, trials, on_progress)
    return LengthSearch(
        study=study,
        evaluated=run.evaluated,
        stopped=run.stopped,
        reused=run.reused,
        times=run.times,
        table=table,
        prediction=prediction,
    )


def stopped_and_reused(study: optuna.Study) -> tuple[int, int]:
    """Trials of a search that were stopped early, and those whose lengths had been scored before; in whichever run, and
    by whichever worker."""
    attributes = [trial.user_attrs for trial in finished_trials(study)]
    reused = sum(REUSED_FROM in own for own in attributes)
    return sum(STOPPED_BY in own and REUSED_FROM not in own for own in attributes), reused


def fitted_table(
    study: optuna.Study,
    rdb: Storage,
    definition: LengthsStudy,
    model: LengthAdaptiveModel,
    loaded: LoadedWorkload,
    trials: int,
    on_progress: ProgressHook | None = None,
) -> LatencyTable | None:
    """`hpo.costs.cost_table`, telling how far the fitting is."""

    def report(share: float, what: str) -> None:
        if on_progress is not None:
            on_progress(0, trials, f"{what}: {share:.0%}")

    return cost_table(study, rdb, definition, model, loaded.search, report)


def measure_front(
    study: optuna.Study,
    url: str,
    table: LatencyTable,
    checkpoint: Path,
    loaded: LoadedWorkload,
    trials: int,
    on_progress: ProgressHook | None = None,
) -> Prediction | None:
    """Time the points of a finished front as `hpo bench` does, and record how far the table was off.

    What was measured on this machine before is not measured again. None where the table is another processor's.
    """
    front, timed = compute_front(study, url), sample(loaded.search)

    def report(done: float, total: float, what: str) -> None:
        if on_progress is not None:
            on_progress(trials, trials, f"timing the front: {done / total:.0%}")

    with threads(table.threads):
        if not covers(study, front, table.precision, table.batch_size, len(timed)):
            model = load_encoder(checkpoint, loaded.corpus).eval()
            time_points(
                study,
                front,
                model,
                timed,
                batch_sizes=(table.batch_size,),
                points=len(front.points),
                rounds=FRONT_ROUNDS,
                precision=table.precision,
                on_progress=report,
            )
    if table.processor != processor_name():
        return None
    prediction = compare(compute_front(study, url))
    study.set_user_attr(PREDICTION, asdict(prediction))
    return prediction


def compare(front: Front) -> Prediction:
    """The predicted times of a front's points beside the measured ones."""
    pairs = [(point.predicted_ms, point.latency_ms) for point in (front.full, *front.points)]
    errors = [predicted / measured - 1.0 for predicted, measured in pairs if predicted and measured]
    sizes = np.abs(errors[1:])
    return Prediction(
        points=len(sizes),
        median_error=float(np.median(sizes)),
        worst_error=float(sizes.max()),
        full_error=float(errors[0]),
    )


def open_search(
    definition: LengthsStudy,
    loaded: LoadedWorkload,
    checkpoint: Path,
    model: LengthAdaptiveModel,
    rdb: Storage,
    seed: int = 0,
) -> optuna.Study:
    """Make the study of a search, or see that it may be gone on with.

    Raises:
        StudyChanged: It was made with something else.
    """
    return open_study(
        rdb,
        definition.name,
        directions=[loaded.metric.direction, *[COST_DIRECTION] * len(definition.costs)],
        metric_names=[loaded.metric.name, *definition.costs],
        identity={
            "model": model.fingerprint(),
            "dataset": loaded.dataset_identity,
            "search space": definition.space_fingerprint(),
            "metric": loaded.metric.name,
            **definition.cost_identity(),
        },
        attributes={
            "kind": "lengths",
            "workload": loaded.workload.to_attribute(),
            "text_columns": list(loaded.corpus.columns.texts),
            "label_names": list(loaded.corpus.label_names),
            "checkpoint": str(checkpoint.resolve() if checkpoint.exists() else checkpoint),  # or a hub id
            "seed": seed,
            "versions": library_versions(),
            "full_macs": mean_macs(model.shape, loaded.search.num_tokens),
            "report_full_macs": mean_macs(model.shape, loaded.report.num_tokens),
            "median_tokens": int(np.median(loaded.search.num_tokens)),
            FOLDER_ATTRIBUTE: new_folder_name(definition.name),
        },
    )


@dataclass(frozen=True)
class _Result:
    """What became of a config.

    Attributes:
        trial: The trial that first asked for these lengths.
        metric: Its quality on the search split; None where it was stopped early.
        costs: What it costs there, by each measure.
        correct_N: Which examples it gets right, where that is what is measured.
        attributes: What its trials record: its metrics, or how it was stopped early.
    """

    trial: int
    metric: float | None
    costs: tuple[float, ...]
    correct_N: Bits | None
    attributes: Mapping[str, Any]


@dataclass
class _Run:
    """One worker's part in the study: the plan of its trials, and what it knows of those that were scored."""

    study: optuna.Study
    mirror: MirroredStudy
    definition: LengthsStudy
    model: LengthAdaptiveModel
    loaded: LoadedWorkload
    evaluator: Evaluator
    trials: int
    costs: Costs
    on_progress: ProgressHook | None
    seeds: Sequence[Mapping[str, float]] = ()
    workers: int = 1
    evaluated: int = 0
    stopped: int = 0
    reused: int = 0
    times: SearchTimes = field(default_factory=SearchTimes)
    _result_of: dict[bytes, _Result] = field(default_factory=dict)
    _seen: set[tuple[Any, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._lengths_present: NDArray[np.int64] = np.unique(self.loaded.search.num_tokens)
        self._stops_early = self.loaded.metric.per_example and self.definition.blocks > 1

    def learn(self, trials: Sequence[FrozenTrial]) -> None:
        """Remember what others scored."""
        for trial in trials:
            if missing := self.mirror.distributions.keys() - trial.params.keys():
                raise HpoError(
                    f"Trial {trial.number} of study {self.study.study_name!r} was added without "
                    f"{', '.join(sorted(missing))}; a search cannot go on beside it, so begin one under another name."
                )
            self._seen.add(_frozen(trial.params))
            self._remember(trial)

    def first(self) -> list[Mapping[str, Any]]:
        """Constant rates over the whole range, shallow networks where depth is searched, and any seeds.

        Those that are in the study already are left out.
        """
        there = self._seen | {_frozen(params) for params in self.mirror.under_way()}
        space = RetentionSpace.of(self.mirror.distributions)
        rates = [space.params(np.full(len(space.names), rate)) for rate in constant_rates(self.definition)]
        missing: list[Mapping[str, Any]] = []
        for params in [*rates, *shallow_networks(space), *self.seeds][: self.trials]:
            if _frozen(params) not in there:
                there.add(_frozen(params))
                missing.append(params)
        return missing

    def part(self, done: int) -> int:
        """What is missing of a generation, or this worker's share of one."""
        size, workers = self.definition.population_size, max(self.workers, self.mirror.workers)
        return size - done % size if workers == 1 else part_of(size, workers)

    def evaluate(self, asked: Sequence[AskedTrial]) -> list[Told]:
        """Score trials, and say what became of each."""
        self._score_new(asked)
        return self._outcomes(asked)

    def passes(self, error: Exception) -> bool:
        """Whether memory ran out, which other processes may have taken."""
        return is_out_of_memory(error)

    def resumes(self, error: BaseException) -> bool:
        """Nothing is kept of a config that is half scored."""
        return False

    def score_front_on_report_split(self) -> None:
        """Score the front and the full length once on the report split, and record both metric and cost.

        Of trials that are equal in all, the first stands for the others, as in `compute_front`. Several workers begin
        at different points, and leave out what others have recorded meanwhile.
        """
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        full = [trial for trial in complete if constant_rate(trial.params) == 1.0][:1]
        on_front = non_dominated([trial.values[1:] for trial in complete], [trial.values[0] for trial in complete])
        wanted = {trial.number: config_of(trial.params) for trial in (*full, *(complete[index] for index in on_front))}
        alike = sorted(wanted, key=lambda number: wanted[number].shares or ())  # those scored together share layers
        numbers = self._not_reported(alike)
        if not numbers:
            return
        if self.workers > 1:
            first = random.SystemRandom().randrange(len(numbers))
            numbers = numbers[first:] + numbers[:first]
        engine = Evaluator(self.model, self.loaded.report, precision=self.evaluator.precision, cache_bytes=0)
        together = min(REPORTED_TOGETHER, part_of(len(numbers), self.workers))
        for done in range(0, len(numbers), together):
            part = self._not_reported(numbers[done : done + together])

            def report_share(share: float, done: int = done, size: int = len(part)) -> None:
                if self.on_progress is not None:
                    percent = (done + share * size) / len(numbers)
                    self.on_progress(self.trials, self.trials, f"scoring the front on the report split: {percent:.0%}")

            answers_CX = engine.predict([wanted[number] for number in part], on_progress=report_share)
            for number, answers_X in zip(part, answers_CX, strict=True):
                record_once(
                    self.mirror.storage, self.study._study_id, self._reported(number, wanted[number], answers_X)
                )

    def _not_reported(self, numbers: Iterable[int]) -> list[int]:
        """Those of some trials that nobody has scored on the report split yet."""
        known = self.study.user_attrs
        return [number for number in numbers if f"report_metric:{number}" not in known]

    def _reported(self, number: int, config: LengthConfig, answers_X: Answers) -> dict[str, Any]:
        """What is recorded of a trial that was scored on the report split."""
        qualities = self._qualities(self.loaded.report, answers_X)
        return {
            f"report_macs:{number}": mean_macs(self.model.shape, self.loaded.report.num_tokens, config),
            f"report_metrics:{number}": qualities,
            f"report_metric:{number}": qualities[self.loaded.metric.name],
        }

    def _qualities(self, split: EncodedSplit, answers_X: Answers) -> dict[str, float]:
        return {metric.name: split.quality(metric, answers_X) for metric in self.loaded.metrics}

    def _score_new(self, asked: Sequence[AskedTrial]) -> None:
        """Score the trials whose lengths were not scored before, each distinct one once.

        Constant rates, full length among them, are what a front is compared with: they are not stopped, not even where
        another trial of their lengths was.
        """
        done = self.mirror.ended
        new: dict[bytes, AskedTrial] = {}
        for trial in sorted(asked, key=lambda trial: constant_rate(trial.params) is None):
            key = self._key(config_of(trial.params))
            known = self._result_of.get(key)
            if known is None or (known.metric is None and constant_rate(trial.params) is not None):
                new.setdefault(key, trial)

        def report_share(share: float) -> None:
            if self.on_progress is not None:
                remark = f"{self.reused} reused, {self.stopped} stopped early"
                self.on_progress(done + share * len(asked), self.trials, remark)

        if new:
            with self.times.measure("model"):
                results = self._score(list(new.values()), report_share)
            self._result_of.update(zip(new, results, strict=True))
            self.stopped += sum(result.metric is None for result in results)
        self.evaluated += len(new)
        self.reused += len(asked) - len(new)

    def _score(self, asked: Sequence[AskedTrial], report_share: Callable[[float], None]) -> list[_Result]:
        """Score configs block by block, and leave out those that the front so far has beaten."""
        configs = [config_of(trial.params) for trial in asked]
        split, blocks = self.loaded.search, self.evaluator.blocks
        costs = [self.costs.values(config) for config in configs]
        answers_CX = np.zeros((len(configs), split.answer_starts[-1]), dtype=split.answer_type)
        rivals = self._rivals()
        defeat_of: dict[int, Defeat] = {}
        seen_of: dict[int, NDArray[np.int64]] = {}
        seen_M = np.empty(0, dtype=np.int64)
        for number, block in enumerate(blocks):
            alive = [index for index in range(len(configs)) if index not in defeat_of]
            if not alive:
                break

            def report(share: float, number: int = number) -> None:
                report_share((number + share) / len(blocks))

            alive_configs = [configs[index] for index in alive]
            answers = self.evaluator.predict_block(number, alive_configs, on_progress=report)
            answers_CX[np.array(alive)[:, None], self.evaluator.places_of(block)] = answers
            seen_M = np.concatenate([seen_M, block])
            if rivals is None or number + 1 == len(blocks):
                continue
            for index in alive:
                if constant_rate(asked[index].params) is not None:
                    continue
                correct_M = answers_CX[index, seen_M] == split.labels[seen_M]
                defeat = rivals.beats(costs[index], correct_M, seen_M, self.definition.confidence)
                if defeat is not None:
                    defeat_of[index], seen_of[index] = defeat, seen_M
        results = []
        for index, trial in enumerate(asked):
            correct_N = answers_CX[index] == split.labels if self._stops_early else None
            if index in defeat_of and rivals is not None:
                defeat, seen = defeat_of[index], seen_of[index]
                stop = {
                    STOPPED_BY: defeat.by,
                    SEEN: len(seen),
                    PARTIAL_METRIC: self.loaded.metric.compute(answers_CX[index, seen], split.labels[seen]),
                    ESTIMATE: rivals.accuracy(defeat.by) - defeat.behind,
                    ESTIMATE_ERROR: defeat.error,
                }
                results.append(_Result(trial.number, None, costs[index], None, stop))
                continue
            qualities = self._qualities(split, answers_CX[index])
            metric = qualities[self.loaded.metric.name]
            results.append(_Result(trial.number, metric, costs[index], correct_N, {METRICS: qualities}))
        return results

    def _rivals(self) -> Rivals | None:
        """The front so far, where configs may be stopped for its sake."""
        scored = [result for result in self._result_of.values() if result.correct_N is not None]
        if not self._stops_early or not scored:
            return None
        return Rivals.of(
            np.array([result.trial for result in scored]),
            np.array([result.costs for result in scored]),
            np.array([result.correct_N for result in scored]),
        )

    def _outcomes(self, asked: Sequence[AskedTrial]) -> list[Told]:
        rivals = self._rivals()
        on_front = set() if rivals is None else set(rivals.trial_F.tolist())
        told = []
        for trial in asked:
            result = self._result_of[self._key(config_of(trial.params))]
            values = None if result.metric is None else (result.metric, *result.costs)
            attributes = dict(result.attributes)
            if trial.number != result.trial:
                attributes[REUSED_FROM] = result.trial
            if trial.number in on_front and result.correct_N is not None:
                attributes[CORRECT] = bits_to_text(result.correct_N)  # later runs compare with the front alone
            told.append(Told(trial=trial, values=values, attributes=attributes))
        self._seen.update(_frozen(trial.params) for trial in asked)
        return told

    def attributes_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A new trial's user attributes: its length config, and the method that found it, if another did."""
        config = config_of(params)
        attributes: dict[str, Any] = {"shares": list(config.shares or ()), **self.costs.attributes(config)}
        if self.definition.skippable:
            attributes["skipped"] = list(config.skipped)
        if dict(params) in self.seeds:
            attributes[ORIGIN] = self.study.user_attrs[SEEDS]["method"]
        return attributes

    def _remember(self, trial: FrozenTrial) -> None:
        config = config_of(trial.params)
        key = self._key(config)
        known = self._result_of.get(key)
        if known is not None and (known.metric is not None or trial.state != TrialState.COMPLETE):
            return
        attrs = trial.user_attrs
        kept = {name: attrs[name] for name in (METRICS, *PARTIAL_FIGURES) if name in attrs}
        bits = bits_from_text(attrs[CORRECT], len(self.loaded.search)) if CORRECT in attrs else None
        metric = float(trial.values[0]) if trial.state == TrialState.COMPLETE else None
        self._result_of[key] = _Result(trial.number, metric, self.costs.values(config), bits, kept)

    def key_of(self, params: Mapping[str, Any]) -> str:
        """Equal for parameters that keep equal counts in every sequence of the search split."""
        return self._key(config_of(params)).hex()

    def _key(self, config: LengthConfig) -> bytes:
        """Equal for configs that skip the same layers and keep equal counts in every sequence of the search split."""
        counts = config.count_table(self._lengths_present).tobytes()
        return hashlib.blake2b(bytes(config.skipped) + counts, digest_size=16).digest()


def _frozen(params: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(params.items()))


def _seeds(
    study: optuna.Study,
    rdb: Storage,
    method: str | None,
    checkpoint: Path,
    loaded: LoadedWorkload,
    retentions: RetentionSpace,
    seed: int,
    on_progress: ProgressHook | None,
) -> list[dict[str, float]]:
    """The parameters nearest to what another method finds; learned once and kept with the study."""
    if method is not None and SEEDS not in study.user_attrs:
        configs = learn_seeds(method, checkpoint, loaded, seed, on_progress=on_progress)
        learned = {"method": method, "shares": [list(config.shares or ()) for config in configs]}
        record_once(rdb, study._study_id, {SEEDS: learned})
    shares_CL = np.array(study.user_attrs.get(SEEDS, {}).get("shares", []), dtype=np.float64)
    if not shares_CL.size:
        return []
    return [retentions.params(retention_L) for retention_L in retentions.to_retention(Configs.whole(shares_CL))]


def search_space(definition: LengthsStudy, num_layers: int) -> dict[str, BaseDistribution]:
    """`retention_0 .. retention_{L-1}`, each from the same fixed range, and `skip_i` of layers that may be skipped.

    Raises:
        HpoError: The definition speaks of layers that the encoder lacks, or lets none stay.
    """
    retention, skippable = definition.retention, sorted(definition.skippable)
    if skippable and skippable[-1] >= num_layers:
        raise HpoError(
            f"[depth] layers names layer {skippable[-1]}, but the encoder's {num_layers} are 0 to {num_layers - 1}; "
            "leave it out."
        )
    if len(skippable) == num_layers:
        raise HpoError(f"[depth] layers names all {num_layers} layers of the encoder; let at least one always stay.")
    distribution = FloatDistribution(retention.low, retention.high, step=retention.step)
    return {
        **{f"{RETENTION}{layer}": distribution for layer in range(num_layers)},
        **{f"{SKIP}{layer}": CategoricalDistribution((False, True)) for layer in skippable},
    }


def shallow_networks(space: RetentionSpace, most: int = 6) -> list[dict[str, Any]]:
    """Parameters of the first generation that keep every token, but skip layers: all that may be, and one at a time.

    Where there are many such layers, those that are skipped alone are evenly chosen.
    """
    if not space.skippable:
        return []
    chosen = np.unique(np.linspace(0, len(space.skippable) - 1, most - 1).round().astype(np.int64))
    alone = [[space.skippable[number]] for number in chosen]
    full_N, layers = np.ones(len(space.names)), np.arange(len(space.names))
    return [space.params(full_N, np.isin(layers, skipped)) for skipped in (list(space.skippable), *alone)]


def constant_rates(definition: LengthsStudy, most: int = 13) -> list[float]:
    """Retentions of the first generation's constant-rate configs: full length, the smallest, then those between."""
    low, high, step = definition.retention.low, definition.retention.high, definition.retention.step
    between = np.linspace(low, high, most)
    if step is not None:
        between = low + np.round((between - low) / step) * step
    rates = [float(high), float(low), *(round(float(rate), 10) for rate in between)]
    return list(dict.fromkeys(rates))
