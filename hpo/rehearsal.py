"""A study whose trials cost nothing, to test what surrounds them: asking, telling, sharing, surviving.

It is searched as length configs are, over twelve retentions, and its objectives are two formulas. Nothing here needs
torch, so that a worker is at work soon after it was started.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from hpo.bulk import ENDED, KEY
from hpo.heartbeats import GRACE_S, INTERVAL_S, Heartbeats
from hpo.mirror import AskedTrial, MirroredStudy, Told
from hpo.sharing import complete_study, part_of, worker_seed
from hpo.storage import Storage, close, open_storage, open_study
from studies.loader import LengthsStudy, Range

if TYPE_CHECKING:  # it needs torch
    from hpo.workload import ProgressHook

LAYERS = 12
SPACE: dict[str, BaseDistribution] = {
    f"retention_{layer}": FloatDistribution(0.05, 1.0, step=0.05) for layer in range(LAYERS)
}
REUSED_FROM = "reused_from"
CUTS = {
    "postgresql": (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
        "SELECT pg_terminate_backend({})",
    ),
    "mysql": (
        "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()",
        "KILL {}",
    ),
}
"""By kind of database: how its connections are found, and how one is cut."""


@dataclass(frozen=True, kw_only=True)
class RehearsalJob:
    """A job as those of `hpo.workers`.

    Attributes:
        storage: URL of the database.
        trials: Finished trials that the study shall have in all.
        study: Its name.
        workers: How many share it.
        sampler: "tpe" asks for one trial at a time, for one objective, as `hpo tune`; the others for a generation.
        trial_s: How long a trial takes.
        interval_s: Time between heartbeats.
        grace_s: How long a heartbeat stands still until its worker counts as dead.
        storage_timeout_s: How long a database that is away is waited for.
    """

    storage: str
    trials: int
    study: str = "rehearsal"
    workers: int = 1
    sampler: Literal["nsga2", "surrogate", "tpe", "random"] = "nsga2"
    trial_s: float = 0.0
    interval_s: float = INTERVAL_S
    grace_s: float = GRACE_S
    storage_timeout_s: float = 0.0

    def run(self, on_progress: "ProgressHook | None" = None) -> None:
        """Work as one worker until the study has its trials."""
        storage = open_storage(self.storage, timeout_s=self.storage_timeout_s)
        try:
            study = self.open_study(storage)
            with Heartbeats(storage, self.interval_s, self.grace_s) as heartbeats:
                mirror = self.mirror(study, storage, heartbeats)
                complete_study(mirror, _Instant(self, mirror, on_progress), self.trials)
        finally:
            close(storage)

    def open_study(self, storage: Storage) -> optuna.Study:
        """The study, made where it is missing."""
        return open_study(
            storage,
            self.study,
            directions=("maximize",) if self.sampler == "tpe" else ("maximize", "minimize"),
            metric_names=("quality",) if self.sampler == "tpe" else ("quality", "cost"),
            identity={"sampler": self.sampler},
            attributes={"kind": "rehearsal"},
        )

    def mirror(self, study: optuna.Study, storage: Storage, heartbeats: Heartbeats | None) -> MirroredStudy:
        """The study as a worker sees it."""
        sampler = _sampler(self.sampler, worker_seed(study, 0, self.workers), alone=self.workers == 1)
        return MirroredStudy(study, storage, sampler, SPACE, heartbeats=heartbeats)


def objectives(params: Mapping[str, float]) -> list[float]:
    """Quality and cost: shares of the sequence that are left, early layers mattering most for quality."""
    shares_L = np.cumprod([params[name] for name in SPACE])
    weights_L = np.linspace(1.0, 2.0, LAYERS)
    return [float(1 - (weights_L * (1 - shares_L) ** 2).mean()), float(shares_L.mean())]


def survivors(job: RehearsalJob) -> dict[str, int]:
    """What stands in the database at the end: trials by what became of them, and lengths evaluated more than once."""
    storage = open_storage(job.storage)
    try:
        trials = optuna.load_study(study_name=job.study, storage=storage).get_trials(deepcopy=False)
        keys = [trial.system_attrs[KEY] for trial in trials if trial.state in ENDED]
        evaluated = [trial.system_attrs[KEY] for trial in trials if trial.state in ENDED and not _is_reused(trial)]
        numbers = [trial.number for trial in trials]
        return {
            "finished": len(keys),
            "unfinished": sum(not trial.state.is_finished() for trial in trials),
            "failed": sum(trial.state == TrialState.FAIL for trial in trials),
            "answered_from_cache": len(keys) - len(evaluated),
            "evaluated_twice": len(evaluated) - len(set(evaluated)),
            "wrong_numbers": len(set(numbers) ^ set(range(len(numbers)))),
            "studies": len(optuna.get_all_study_names(storage)),
        }
    finally:
        close(storage)


def cut_connections(url: str) -> int:
    """Cut the connections of all others to a database of a server; returns how many."""
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    find, kill = CUTS[engine.dialect.name]
    cut = 0
    with engine.connect() as connection:
        for number in list(connection.scalars(sqlalchemy.text(find))):
            with suppress(sqlalchemy.exc.DBAPIError):  # it has just been closed
                connection.execute(sqlalchemy.text(kill.format(number)))
                cut += 1
    return cut


def _is_reused(trial: FrozenTrial) -> bool:
    return REUSED_FROM in trial.user_attrs


@dataclass
class _Instant:
    """The plan of trials that take no time, or a fixed one."""

    job: RehearsalJob
    mirror: MirroredStudy
    on_progress: "ProgressHook | None"
    answers: dict[str, int] = field(default_factory=dict)

    def learn(self, trials: Sequence[FrozenTrial]) -> None:
        for trial in trials:
            if KEY in trial.system_attrs:
                self.answers.setdefault(trial.system_attrs[KEY], trial.number)

    def first(self) -> list[dict[str, float]]:
        rates = (dict.fromkeys(SPACE, rate) for rate in (1.0, 0.05, 0.5))
        under_way = self.mirror.under_way()
        return [params for params in rates if self.key_of(params) not in self.answers and params not in under_way]

    def part(self, done: int) -> int:
        size, workers = LengthsStudy.population_size, max(self.job.workers, self.mirror.workers)
        if self.job.sampler == "tpe":
            return 1
        return size - done % size if workers == 1 else part_of(size, workers)

    def attributes_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def key_of(self, params: Mapping[str, Any]) -> str:
        return hashlib.blake2b(json.dumps(params, sort_keys=True).encode(), digest_size=16).hexdigest()

    def passes(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def resumes(self, error: BaseException) -> bool:
        return False

    def evaluate(self, asked: Sequence[AskedTrial]) -> list[Told]:
        told = []
        for trial in asked:
            first = self.answers.setdefault(self.key_of(trial.params), trial.number)
            if first == trial.number and self.job.trial_s:
                time.sleep(self.job.trial_s)
            attributes = {} if first == trial.number else {REUSED_FROM: first}
            values = objectives(trial.params)[: 1 if self.job.sampler == "tpe" else 2]
            told.append(Told(trial=trial, values=values, attributes=attributes))
        if self.on_progress is not None:
            self.on_progress(self.mirror.ended + len(asked), self.job.trials, "")
        return told


def _sampler(name: str, seed: int, alone: bool) -> BaseSampler:
    if name == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return optuna.samplers.TPESampler(multivariate=True, n_startup_trials=8, seed=seed)
    from hpo.samplers import make_sampler  # takes a second to import, which a worker that is often killed lacks

    definition = LengthsStudy(name="rehearsal", retention=Range(low=0.05, high=1.0, step=0.05), sampler=name)
    return make_sampler(
        definition, SPACE, lambda configs: configs.shares_CN.mean(axis=1), seed, reads_first=False, alone=alone
    )
