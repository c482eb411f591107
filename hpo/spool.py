"""Results on disk until the database has them.

What became of trials is written to the study's runs folder before it is told, and removed once that is done. So it
outlives a database that stays away and a process that is killed in between; `hpo storage replay`, or the next run of
the same command, tells it then.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from hpo.bulk import Outcome, finish_trials
from hpo.errors import HpoError, StorageError, StudyNotFound
from hpo.outage import DATABASE_ERRORS, DatabaseAway, Patience, database_reason
from hpo.runs import FOLDER_ATTRIBUTE, SPOOL
from hpo.storage import Storage, find_study

logger = logging.getLogger(__name__)

ASIDE = ".aside"
"""Ending of files with results of trials that the database does not have."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a trial.

    Attributes:
        number: Its number in the study, which stays when a study is copied to another database.
        state: A finished state.
        values: Its objectives; None where it has none.
        attributes: User attributes to add.
        params: Its parameters, by which it is told from another that has taken its number; None where they are not
            known, as in files of earlier versions.
    """

    number: int
    state: TrialState
    values: Sequence[float] | None
    attributes: Mapping[str, Any]
    params: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """How a replay went, in trials.

    Attributes:
        told: Finished now.
        known: Were finished with the same result already.
        lost: Had been given up meanwhile or are not in the database any more, so that their results count no more.
    """

    told: int = 0
    known: int = 0
    lost: int = 0

    def __add__(self, other: "Replayed") -> "Replayed":
        return Replayed(told=self.told + other.told, known=self.known + other.known, lost=self.lost + other.lost)


class ResultsKept(DatabaseAway):
    """The database did not take results; they are on disk."""


class Spool:
    """Results of one study on disk.

    Attributes:
        folder: Where they lie; made when it is needed.
        study_name: The study.
    """

    def __init__(self, study_folder: Path, study_name: str) -> None:
        self.folder = study_folder / SPOOL
        self.study_name = study_name

    @contextmanager
    def kept(self, results: Sequence[Result], patience: Patience) -> Iterator[None]:
        """Keep results while the block tells them.

        Raises:
            ResultsKept: The database did not take them.
            HpoError: They cannot be written.
        """
        if not results:
            yield
            return
        with self.telling(self.put(results), len(results), patience):
            yield

    @contextmanager
    def telling(self, file: Path, count: int, patience: Patience) -> Iterator[None]:
        """Tell the results in a file, which is removed at the end.

        Raises:
            ResultsKept: The database did not take them.
        """
        try:
            yield
        except DATABASE_ERRORS as error:
            raise ResultsKept(
                f"The database {patience.shown} does not answer ({database_reason(error)}); the results of "
                f"{count} trials are kept in {file}, so put it right, and run the same command again or "
                f"`hpo storage replay --runs {self.folder.parent.parent}`."
            ) from error
        file.unlink(missing_ok=True)  # another worker may have told them

    def put(self, results: Sequence[Result]) -> Path:
        """Write results to a file of their own, beside its place first.

        Raises:
            HpoError: The disk is full or the folder cannot be written.
        """
        document = {
            "study": self.study_name,
            "results": [
                {
                    "number": result.number,
                    "state": result.state.name,
                    "values": None if result.values is None else [float(value) for value in result.values],
                    "attributes": dict(result.attributes),
                    "params": None if result.params is None else dict(result.params),
                }
                for result in results
            ],
        }
        file = self.folder / f"{uuid.uuid4().hex}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(document), encoding="utf-8")
            partial.rename(file)
        except OSError as error:
            raise HpoError(
                f"Cannot write to {self.folder} ({error.strerror}); make room or choose another folder with --runs, "
                "and run the same command again to continue."
            ) from error
        return file

    def replay(self, storage: Storage, study: optuna.Study) -> Replayed:
        """Tell all that is kept, each result once, and remove it; put aside what is of trials that are gone."""
        total = Replayed()
        for file in sorted(self.folder.glob("*.json")):
            results = read(file)
            if results is not None:
                told, gone = _tell(storage, study, results)
                total += told
                if gone:
                    self._put_aside(file, gone)
            file.unlink(missing_ok=True)
        if total.told:
            logger.warning("Results of %d trials that were kept on disk are told now.", total.told)
        return total

    def _put_aside(self, file: Path, gone: Sequence[int]) -> None:
        aside = file.with_suffix(ASIDE)
        with suppress(FileNotFoundError):  # another worker was first
            file.replace(aside)
        logger.warning(
            "Study %r has no trial %s with these parameters any more, as after a restored backup; the results are put "
            "aside in %s.",
            self.study_name,
            ", ".join(map(str, gone)),
            aside,
        )


def read(file: Path) -> list[Result] | None:
    """The results in a file; None where another worker told them, or a power cut left it broken."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return [Result(**{**entry, "state": TrialState[entry["state"]]}) for entry in document["results"]]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s holds no results that can be read (%s); its trials are run again.", file, error)
        return None


def replay_all(storage: Storage, runs: Path) -> tuple[Replayed, list[str]]:
    """Tell what is kept in a runs folder for studies of this database.

    Returns:
        How it went, and the folders of studies that are not in this database.
    Raises:
        StorageError: The database failed.
    """
    total, others = Replayed(), []
    for folder in sorted({file.parent.parent for file in runs.glob(f"*/{SPOOL}/*.json")}):
        study = _study_of(storage, folder)
        if study is None:
            others.append(folder.name)
            continue
        try:
            total += Spool(folder, study.study_name).replay(storage, study)
        except DatabaseAway:
            raise
        except DATABASE_ERRORS as error:
            raise StorageError(
                f"The results in {folder / SPOOL} were not all told ({database_reason(error)}); put the database right "
                "and run the same command again."
            ) from error
    return total, others


def _study_of(storage: Storage, folder: Path) -> optuna.Study | None:
    """The study that a folder belongs to, if it is in this database."""
    for file in folder.glob(f"{SPOOL}/*.json"):
        try:
            name = json.loads(file.read_text(encoding="utf-8"))["study"]
            study = find_study(storage, name, start_with="hpo tune")
        except (OSError, ValueError, KeyError, TypeError, StudyNotFound):
            continue
        if study.user_attrs.get(FOLDER_ATTRIBUTE) == folder.name:
            return study
    return None


def _tell(storage: Storage, study: optuna.Study, results: Sequence[Result]) -> tuple[Replayed, list[int]]:
    """Tell results; returns how it went, and the numbers of trials that the study does not have."""
    total, gone = Replayed(), []
    for result in results:
        try:
            trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, result.number)
            trial = storage.get_trial(trial_id)
        except KeyError:
            trial = None
        if trial is None or result.params not in (None, trial.params):
            total += Replayed(lost=1)
            gone.append(result.number)
            continue
        outcome = Outcome(trial_id=trial_id, state=result.state, values=result.values, attributes=result.attributes)
        try:
            finish_trials(storage, [outcome])
        except UpdateFinishedTrialError:
            logger.warning("Trial %d was given up before its result could be told.", result.number)
            total += Replayed(lost=1)
            continue
        total += Replayed(known=1) if trial.state.is_finished() else Replayed(told=1)
    return total, gone
