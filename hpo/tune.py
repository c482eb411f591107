"""`hpo tune`: a TPE study over training hyperparameters, whose best model is kept."""

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from hpo.bulk import MAX_ATTEMPTS, record_once
from hpo.errors import HpoError
from hpo.heartbeats import Heartbeats
from hpo.mirror import AskedTrial, MirroredStudy, Told, TrialLost
from hpo.outage import DEFAULT_TIMEOUT_S, DatabaseAway
from hpo.recipe import Recipe, check_settings
from hpo.runs import FOLDER_ATTRIBUTE, StudyRuns, new_folder_name
from hpo.sharing import complete_study, worker_seed
from hpo.spool import Spool
from hpo.storage import FIXED, Storage, open_storage, open_study, while_it_is_there
from hpo.workload import (
    LoadedWorkload,
    Progress,
    ProgressHook,
    Workload,
    library_versions,
    load_workload,
    require_trials,
)
from model.data import SEED_LIMIT
from model.encoder import LengthAdaptiveModel
from model.evaluate import score
from model.hardware import computes_in_bf16, is_out_of_memory
from model.length_config import LengthConfig
from model.macs import constant_rate_config
from model.processes import TrainingProcessDied
from model.training import Precision, TrainingDiverged, uses_bf16
from studies.loader import STAGES, Choices, FinetuneStudy, Range

logger = logging.getLogger(__name__)

AREA_COSTS = (1.0, 0.7, 0.5, 0.35)
"""Relative MACs whose constant-rate configs the objective `area` averages over."""
TEACHER_METRIC = "teacher_metric"
"""Attribute of a study: its teacher's quality on the search split."""
CHECKPOINT = "checkpoint"
"""Attribute of a trial that was the best when it ended: its model's place in the runs folder."""
PRECISION = "precision"
"""Attribute of a study: what its trainings compute in where their settings leave it open; of a trial: what it did."""
STAGES_DONE = "stages"
"""Attribute of a trial that was begun again: stages of its distillation that were there already."""


def tune(
    definition: FinetuneStudy,
    workload: Workload,
    *,
    trials: int,
    storage: str,
    runs: Path,
    teacher: str | None = None,
    student_layers: Sequence[int] | None = None,
    seed: int = 0,
    workers: int = 1,
    processes: int = 1,
    on_progress: ProgressHook | None = None,
    storage_timeout_s: float = DEFAULT_TIMEOUT_S,
) -> optuna.Study:
    """Run or complete a study over training settings, alone or as one of several workers.

    Each trial trains the encoder anew and is scored on the search split. The best trial's checkpoint lies in the runs
    folder as a transformers folder; those it beats are removed.

    Args:
        definition: What is searched, and by which objective.
        workload: Encoder, dataset and metric.
        trials: Finished trials that the study shall have in all; none is added to a complete one.
        storage: SQLAlchemy URL of the database.
        runs: Folder for checkpoints.
        teacher: Folder or hub id of a fine-tuned encoder to learn from; a study of kind "distill" needs one.
        student_layers: Layers of the workload's encoder, from 0, that the student is made of; None takes all.
        seed: Of sampler, heads, dropout and batch order; the dataset's own seed is in `workload.data`.
        workers: How many are started together; the sampler of each has then a seed of its own.
        processes: How many train one model together, each with a GPU of its own where there are GPUs.
        on_progress: Told about each step.
        storage_timeout_s: How long the database is waited for if it goes away in between.
    Returns:
        The study; `best_checkpoint(study, runs)` is its model.
    Raises:
        HpoError: The study was made with something else, cannot be stored, or its trials keep failing.
        DataError: The dataset cannot be used.
        CheckpointError: The encoder cannot be loaded.
        StudyFileError: The definition searches a setting that does not exist.
    """
    require_trials(trials)
    check_settings(definition)
    progress = Progress(on_progress)
    rdb = open_storage(storage, timeout_s=storage_timeout_s, on_state=progress.remark)
    loaded = load_workload(workload, workload.model)
    recipe = Recipe.of(definition, loaded, teacher, student_layers, processes)
    study = open_tuning(recipe, rdb, seed)
    study_runs = StudyRuns(runs, study)
    study_runs.prepare()
    spool = Spool(study_runs.folder, study.study_name)
    spool.replay(rdb, study)
    if recipe.teacher is not None and TEACHER_METRIC not in study.user_attrs:
        record_once(rdb, study._study_id, {TEACHER_METRIC: recipe.score_teacher(recipe.teacher)})
    if recipe.chooses_precision:
        recipe = dataclasses.replace(recipe, precision=settle_precision(study, rdb))
    with while_it_is_there(study, rdb), Heartbeats(rdb) as heartbeats:
        mirror = MirroredStudy(
            study,
            rdb,
            _sampler(definition, worker_seed(study, seed, workers)),
            {name: _distribution(declared) for name, declared in definition.space.items()},
            pruner=_pruner(definition),
            heartbeats=heartbeats,
            spool=spool,
        )
        complete_study(mirror, _Trainings(mirror, recipe, study_runs, trials, seed, progress), trials)
    return study


def open_tuning(recipe: Recipe, rdb: Storage, seed: int = 0) -> optuna.Study:
    """Make the study of a recipe's trainings, or see that it may be gone on with.

    Raises:
        StudyChanged: It was made with something else.
    """
    definition, loaded = recipe.definition, recipe.loaded
    probe = recipe.new_student()
    recipe.check_student(probe)
    return open_study(
        rdb,
        definition.name,
        directions=[loaded.metric.direction],
        metric_names=[objective_name(definition, loaded)],
        identity={
            "model": encoder_fingerprint(probe),
            **recipe.identity(),
            "dataset": loaded.dataset_identity,
            "search space": definition.space_fingerprint(),
            "metric": loaded.metric.name,
        },
        attributes={
            "kind": definition.kind,
            **recipe.attributes(),
            "workload": loaded.workload.to_attribute(),
            "objective": definition.objective,
            FIXED: dict(definition.fixed),
            "seed": seed,
            "versions": library_versions(),
            FOLDER_ATTRIBUTE: new_folder_name(definition.name),
        },
    )


def settle_precision(study: optuna.Study, rdb: Storage) -> Precision:
    """What the study's trainings compute in here: what its first worker chose, or float32 where that cannot be had."""
    precision = study.user_attrs.get(PRECISION) or ("bf16" if uses_bf16("auto") else "fp32")
    settled: Precision = record_once(rdb, study._study_id, {PRECISION: precision})[PRECISION]
    if settled == "bf16" and not computes_in_bf16():
        logger.warning(
            "Study %r computes in bf16, which this machine lacks; its trials are trained in float32 here.",
            study.study_name,
        )
        return "fp32"
    return settled


def best_trial(study: optuna.Study) -> FrozenTrial:
    """The best of the trials that have a model; of equals the earliest, whatever the database says.

    Those without one were beaten when they ended, or somebody else has added them.

    Raises:
        HpoError: No completed trial has a model.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    kept = [trial for trial in trials if CHECKPOINT in trial.user_attrs]
    if not kept:
        raise HpoError(
            f"Study {study.study_name!r} has no model yet; run `hpo tune --study {study.study_name}` with more trials "
            "than it has."
        )
    return max(kept, key=lambda trial: (trial.value or 0.0, -trial.number))


def best_checkpoint(study: optuna.Study, runs: Path) -> Path:
    """The folder of the best trial's model.

    Raises:
        HpoError: No completed trial has a model, or that of the best is not in this runs folder.
    """
    folder = runs / str(best_trial(study).user_attrs[CHECKPOINT])
    if not folder.is_dir():
        raise HpoError(
            f"The best model of study {study.study_name!r} is not at {folder}; pass the runs folder it was trained "
            "into with --runs, or a model folder with --checkpoint."
        )
    return folder


def objective_name(definition: FinetuneStudy, loaded: LoadedWorkload) -> str:
    """The objective in words, for the dashboard's axis."""
    return f"mean {loaded.metric.name} over four costs" if definition.objective == "area" else loaded.metric.name


def encoder_fingerprint(model: LengthAdaptiveModel) -> str:
    """Hash of the encoder's weights without the task head, which each trial draws anew."""
    return model.fingerprint(encoder_only=True)


@dataclass
class _Trainings:
    """One worker's part in the study: the plan of its trials, and the best of all.

    Attributes:
        best: The best of the trials that the database has as complete.
        better: One of this worker's that beats it, until it is known whether the database has taken it.
    """

    mirror: MirroredStudy
    recipe: Recipe
    runs: StudyRuns
    trials: int
    seed: int
    on_progress: ProgressHook | None
    best: "_Best | None" = None
    better: "_Best | None" = None
    failures: int = 0

    def __post_init__(self) -> None:
        self._untried = list(self.recipe.definition.first)

    def learn(self, trials: Sequence[FrozenTrial]) -> None:
        """Remember the best of what others trained and this worker told, and remove the checkpoints it beats."""
        self._leave_out([trial.params for trial in trials])
        complete = [
            _Best(float(trial.value or 0.0), trial.number, trial.user_attrs[CHECKPOINT])
            for trial in trials
            if trial.state == TrialState.COMPLETE and CHECKPOINT in trial.user_attrs
        ]
        if self.better is not None:
            self.mirror.settle()
            complete += [self.better] * (self.better.number not in self.mirror.lost)
            self.better = None
        for one in complete:
            if self._beats(one.value, one.number):
                self.best = one
        begun = {f"trial-{number}" for number in self.mirror.unfinished_numbers()}
        place = None if self.best is None else self.best.place
        self.runs.keep_only(place, begun, newer=self.mirror.newest_number + 1)

    def first(self) -> list[Mapping[str, Any]]:
        """Known good settings, without those that are finished or under way, or have failed since this run began."""
        self._leave_out(self.mirror.under_way())
        return self._untried

    def _leave_out(self, tried: Sequence[Mapping[str, Any]]) -> None:
        self._untried = [
            known for known in self._untried if not any(known.items() <= params.items() for params in tried)
        ]

    def part(self, done: int) -> int:
        """One at a time."""
        return 1

    def attributes_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """None before it is trained."""
        return {}

    def key_of(self, params: Mapping[str, Any]) -> str | None:
        """Known good settings are tried once; what the sampler chooses twice is trained twice, from other seeds."""
        for known in self._untried:
            if known.items() <= params.items():
                return _key(known)
        return None

    def passes(self, error: Exception) -> bool:
        """Whether memory ran out, which other processes may have taken."""
        return is_out_of_memory(error)

    def resumes(self, error: BaseException) -> bool:
        """Whether a distillation was interrupted or met with what can be put right; its finished stages are kept."""
        return self.recipe.definition.kind == "distill" and isinstance(error, KeyboardInterrupt | OSError | HpoError)

    def evaluate(self, asked: Sequence[AskedTrial]) -> list[Told]:
        """Train and score one trial; a few failures in a row end the study."""
        (trial,) = asked
        self._leave_out([trial.params])
        done = self.mirror.ended

        def report_share(share: float) -> None:
            if self.on_progress is not None:
                self.on_progress(done + share, self.trials, "" if self.best is None else f"best {self.best.value:.4f}")

        report_share(0.0)
        try:
            told = self._train_and_score(trial, report_share)
        except (TrainingDiverged, TrainingProcessDied) as error:
            self._fail(trial, str(error))
            report_share(0.0)
            return []
        except TrialLost:  # what the other made of it is learned with the next look
            return []
        self.failures = 0
        logger.info("Trial %d is trained: %s.", trial.number, told.values)
        report_share(1.0)
        return [told]

    def _fail(self, trial: AskedTrial, reason: str) -> None:
        self.mirror.fail([trial], reason)
        self.failures += 1
        logger.warning("Trial %d failed: %s", trial.number, reason)
        if self.failures == MAX_ATTEMPTS:
            raise HpoError(
                f"{self.failures} trials of study {self.mirror.study.study_name!r} failed in a row, the last because: "
                f"{reason} Narrow the ranges in a copy of its .toml file."
            )

    def _train_and_score(self, trial: AskedTrial, report_share: Callable[[float], None]) -> Told:
        """What became of a trial: the objective after its last epoch, or the one it was stopped at."""
        loaded, name = self.recipe.loaded, f"trial-{trial.number}"
        if self._stages(name) != trial.user_attrs.get(STAGES_DONE, 0):
            self.mirror.count_anew(trial, {STAGES_DONE: self._stages(name)})
        seed = (self.seed + trial.number) % SEED_LIMIT
        last_epoch = self.recipe.last_settings(trial.params, seed).all_epochs
        values: list[float] = []
        attributes: dict[str, Any] = {"seed": seed}

        def on_epoch(model: LengthAdaptiveModel, epoch: int) -> None:
            configs = _scored_configs(self.recipe.definition, model, loaded)
            scores = score(model, loaded.search, configs, loaded.metric)
            values.append(sum(scores) / len(scores))
            attributes["metric_at_full_length"] = scores[0]
            if self.mirror.report(trial, values[-1], epoch) and epoch < last_epoch:
                raise optuna.TrialPruned

        try:
            model, report = self.recipe.train(
                trial.params, seed, self.runs, name, on_epoch=on_epoch, on_progress=report_share
            )
        except optuna.TrialPruned:
            return Told(trial=trial, values=values[-1:], attributes=attributes, stopped=True)
        attributes |= {"steps": report.steps, PRECISION: report.precision}
        return Told(
            trial=trial, values=values[-1:], attributes=attributes | self._keep_if_best(trial, values[-1], model)
        )

    def _keep_if_best(self, trial: AskedTrial, value: float, model: LengthAdaptiveModel) -> dict[str, str]:
        """Write the checkpoint of a trial that beats all before it; returns its place and hash, to be recorded."""
        with suppress(DatabaseAway):  # what is not known to be worse is kept
            self.mirror.sync()
            self.learn(self.mirror.take_news())
        if not self._beats(value, trial.number):
            return {}
        place = self.runs.write_model(f"trial-{trial.number}", model, self.recipe.loaded.tokenizer)
        kept = {CHECKPOINT: place, "checkpoint_sha256": model.fingerprint()}
        self.better = _Best(value, trial.number, place)
        return kept

    def _beats(self, value: float, number: int) -> bool:
        """Whether a trial is better than the best so far: of equals, the first is."""
        return self.best is None or (value, -number) > (self.best.value, -self.best.number)

    def _stages(self, name: str) -> int:
        """Stages of a distillation that a trial's earlier attempts are through with."""
        return sum(self.runs.stage_place(name, stage).is_dir() for stage in STAGES)


@dataclass(frozen=True)
class _Best:
    """The best trial: its objective, its number, and its checkpoint's place in the runs folder."""

    value: float
    number: int
    place: str


def _scored_configs(
    definition: FinetuneStudy, model: LengthAdaptiveModel, loaded: LoadedWorkload
) -> list[LengthConfig]:
    """The configs whose mean score is the objective; full length first."""
    costs = AREA_COSTS if definition.objective == "area" else AREA_COSTS[:1]
    return [constant_rate_config(model.shape, loaded.search.num_tokens, cost) for cost in costs]


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True)


def _distribution(declared: Range | Choices) -> BaseDistribution:
    if isinstance(declared, Choices):
        return CategoricalDistribution(declared.choices)
    if declared.whole:
        low, high, step = int(declared.low), int(declared.high), int(declared.step or 1)
        return IntDistribution(low, high, step=step, log=declared.log)
    return FloatDistribution(declared.low, declared.high, step=declared.step, log=declared.log)


def _sampler(definition: FinetuneStudy, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.samplers.TPESampler(
            multivariate=definition.multivariate, n_startup_trials=definition.startup_trials, seed=seed
        )


def _pruner(definition: FinetuneStudy) -> optuna.pruners.BasePruner:
    return optuna.pruners.MedianPruner(
        n_startup_trials=definition.pruner_startup_trials, n_warmup_steps=definition.pruner_warmup_epochs
    )
