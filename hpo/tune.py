"""`hpo tune`: a TPE study over training hyperparameters, whose best model is kept."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, Trial, TrialState

from hpo.errors import HpoError
from hpo.recipe import Recipe, check_settings
from hpo.runs import FOLDER_ATTRIBUTE, StudyRuns, new_folder_name
from hpo.storage import finished_trials, open_storage, open_study
from hpo.workload import (
    LoadedWorkload,
    ProgressHook,
    Workload,
    library_versions,
    load_workload,
    require_trials,
)
from model.encoder import LengthAdaptiveModel
from model.evaluate import score
from model.length_config import LengthConfig
from model.macs import constant_rate_config
from model.training import TrainingDiverged
from studies.loader import STAGES, Choices, FinetuneStudy, Range

logger = logging.getLogger(__name__)

AREA_COSTS = (1.0, 0.7, 0.5, 0.35)
"""Relative MACs whose constant-rate configs the objective `area` averages over."""
TEACHER_METRIC = "teacher_metric"
"""Attribute of a study: its teacher's quality on the search split."""
FIRST_ATTEMPT = "first_attempt"
"""Attribute of a trial that goes on where another's process died: that other's number."""
MAX_ATTEMPTS = 3
"""How often the parameters of a trial whose process died are tried, and how many failures in a row end a study."""


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
    on_progress: ProgressHook | None = None,
) -> optuna.Study:
    """Run or complete a study over training settings.

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
        on_progress: Told about each step.
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
    rdb = open_storage(storage)
    loaded = load_workload(workload, workload.model)
    recipe = Recipe.of(definition, loaded, teacher, student_layers)
    probe = recipe.new_student()
    study = open_study(
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
            "seed": seed,
            "versions": library_versions(),
            FOLDER_ATTRIBUTE: new_folder_name(definition.name),
        },
    )
    study_runs = StudyRuns(runs, study)
    with study_runs.locked():
        if recipe.teacher is not None and TEACHER_METRIC not in study.user_attrs:
            study.set_user_attr(TEACHER_METRIC, recipe.score_teacher(recipe.teacher))
        _requeue_orphans(study, study_runs)
        study_runs.keep_only(_checkpoint_of_best(study), _begun(study))
        already = len(study.get_trials(deepcopy=False))
        study.sampler = _sampler(definition, seed + already)
        study.pruner = _pruner(definition)
        if not already:
            for parameters in definition.first:
                study.enqueue_trial(dict(parameters))
        _run_missing(study, recipe, study_runs, trials, seed, on_progress)
    return study


def best_checkpoint(study: optuna.Study, runs: Path) -> Path:
    """The folder of the best trial's model.

    Raises:
        HpoError: No trial was completed, or its checkpoint is not in this runs folder.
    """
    place = _checkpoint_of_best(study)
    if place is None:
        raise HpoError(
            f"Study {study.study_name!r} has no completed trial yet; run `hpo tune --study {study.study_name}` first."
        )
    folder = runs / place
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


def _run_missing(
    study: optuna.Study,
    recipe: Recipe,
    runs: StudyRuns,
    trials: int,
    seed: int,
    on_progress: ProgressHook | None,
) -> None:
    failures = 0
    while (done := len(finished_trials(study))) < trials:
        trial = study.ask()

        def report_share(share: float, done: int = done) -> None:
            if on_progress is not None:
                on_progress(done + share, trials, _best_in_words(study))

        report_share(0.0)
        failure = _run_trial(study, trial, recipe, runs, seed, report_share)
        failures = 0 if failure is None else failures + 1
        if failure is not None:
            logger.warning("Trial %d failed: %s", trial.number, failure)
        else:
            logger.info("Trial %d is done: %s of %d, %s.", trial.number, done + 1, trials, _best_in_words(study))
        if failures == MAX_ATTEMPTS:
            raise HpoError(
                f"{failures} trials of study {study.study_name!r} failed in a row, the last because: {failure} "
                "Narrow the ranges in a copy of its .toml file."
            )
        report_share(1.0 if failure is None else 0.0)


def _run_trial(
    study: optuna.Study,
    trial: Trial,
    recipe: Recipe,
    runs: StudyRuns,
    seed: int,
    report_share: Callable[[float], None],
) -> str | None:
    """Train, score and tell one trial; returns why it failed, if it did."""
    try:
        parameters = {name: _suggest(trial, name, declared) for name, declared in recipe.definition.space.items()}
        trial.set_user_attr("seed", seed + _first_attempt(trial))
        model, values = _train_and_score(trial, recipe, parameters, runs, report_share)
        _keep_if_best(study, trial, values[-1], model, recipe.loaded, runs)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except TrainingDiverged as error:
        _fail(study, trial, str(error))
        return str(error)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        _fail(study, trial, "interrupted" if interrupted else f"{type(error).__name__}: {error}")
        if interrupted and recipe.definition.kind == "distill":
            study.enqueue_trial(trial.params, user_attrs={FIRST_ATTEMPT: _first_attempt(trial)})
        raise
    else:
        study.tell(trial, values[-1])
    runs.keep_only(_checkpoint_of_best(study))
    return None


def _train_and_score(
    trial: Trial,
    recipe: Recipe,
    parameters: Mapping[str, Any],
    runs: StudyRuns,
    report_share: Callable[[float], None],
) -> tuple[LengthAdaptiveModel, list[float]]:
    """The trained model and the objective after each epoch."""
    loaded = recipe.loaded
    values: list[float] = []

    def on_epoch(model: LengthAdaptiveModel, epoch: int) -> None:
        configs = _scored_configs(recipe.definition, model, loaded)
        scores = score(model, loaded.search, configs, loaded.metric)
        values.append(sum(scores) / len(scores))
        trial.set_user_attr("metric_at_full_length", scores[0])
        trial.report(values[-1], epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    model, report = recipe.train(
        parameters,
        trial.user_attrs["seed"],
        runs,
        f"trial-{_first_attempt(trial)}",
        on_epoch=on_epoch,
        on_progress=report_share,
    )
    trial.set_user_attr("steps", report.steps)
    trial.set_user_attr("precision", report.precision)
    return model, values


def _scored_configs(
    definition: FinetuneStudy, model: LengthAdaptiveModel, loaded: LoadedWorkload
) -> list[LengthConfig]:
    """The configs whose mean score is the objective; full length first."""
    costs = AREA_COSTS if definition.objective == "area" else AREA_COSTS[:1]
    return [constant_rate_config(model.shape, loaded.search.num_tokens, cost) for cost in costs]


def _keep_if_best(
    study: optuna.Study, trial: Trial, value: float, model: LengthAdaptiveModel, loaded: LoadedWorkload, runs: StudyRuns
) -> None:
    """Write the checkpoint of a trial that beats all before it, and record its place and hash."""
    best = _best_trial(study)
    if best is not None and value <= float(best.value or 0.0):
        return

    place = runs.write_model(f"trial-{trial.number}", model, loaded.tokenizer)
    trial.set_user_attr("checkpoint", place)
    trial.set_user_attr("checkpoint_sha256", model.fingerprint())


def _suggest(trial: Trial, name: str, declared: Range | Choices) -> Any:
    if isinstance(declared, Choices):
        return trial.suggest_categorical(name, declared.choices)
    if declared.whole:
        return trial.suggest_int(
            name, int(declared.low), int(declared.high), step=int(declared.step or 1), log=declared.log
        )
    return trial.suggest_float(name, declared.low, declared.high, step=declared.step, log=declared.log)


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


def _requeue_orphans(study: optuna.Study, runs: StudyRuns) -> None:
    """Fail trials whose process died, and queue their parameters again, a few times at most.

    A trial that got through another stage meanwhile starts counting anew.
    """
    for orphan in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        first = _first_attempt(orphan)
        stages = sum(runs.stage_place(f"trial-{first}", stage).is_dir() for stage in STAGES)
        attempt = int(orphan.user_attrs.get("attempt", 1)) if stages == orphan.user_attrs.get("stages", 0) else 1
        study.tell(orphan.number, state=TrialState.FAIL)
        if orphan.params and attempt < MAX_ATTEMPTS:
            again = {"attempt": attempt + 1, "retry_of": orphan.number, FIRST_ATTEMPT: first, "stages": stages}
            study.enqueue_trial(orphan.params, user_attrs=again)


def _first_attempt(trial: Trial | FrozenTrial) -> int:
    """The number of the trial whose parameters this one was given; its own where it is the first."""
    return int(trial.user_attrs.get(FIRST_ATTEMPT, trial.number))


def _begun(study: optuna.Study) -> set[str]:
    """Names of trials that wait to be gone on with."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return {f"trial-{_first_attempt(trial)}" for trial in waiting if FIRST_ATTEMPT in trial.user_attrs}


def _fail(study: optuna.Study, trial: Trial, reason: str) -> None:
    trial.set_user_attr("failure", reason)
    study.tell(trial, state=TrialState.FAIL)


def _best_trial(study: optuna.Study) -> FrozenTrial | None:
    try:
        return study.best_trial
    except ValueError:
        return None


def _checkpoint_of_best(study: optuna.Study) -> str | None:
    best = _best_trial(study)
    return None if best is None else str(best.user_attrs["checkpoint"])


def _best_in_words(study: optuna.Study) -> str:
    best = _best_trial(study)
    if best is None:
        return ""
    return f"best {best.value:.4f}"
