"""The runs folder: checkpoints of trials, and the lock that keeps two processes off one study.

A study's files lie in `<runs>/<study name>-<id>/`, the id being drawn when the study is made, so that studies
of one name in different databases never share a folder.
"""

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna

from hpo.errors import HpoError

logger = logging.getLogger(__name__)

DEFAULT_RUNS = "runs"
FOLDER_ATTRIBUTE = "runs_folder"


def runs_folder(given: Path | None) -> Path:
    """The folder to use: the given one, else `HPO_RUNS`, else `runs`."""
    return given or Path(os.environ.get("HPO_RUNS") or DEFAULT_RUNS)


def new_folder_name(study_name: str) -> str:
    """A folder name no other study has; recorded in the study attribute `runs_folder`."""
    return f"{study_name}-{uuid.uuid4().hex[:8]}"


class StudyRuns:
    """One study's part of the runs folder.

    Attributes:
        root: The runs folder.
        folder: The study's own folder in it.
    """

    def __init__(self, root: Path, study: optuna.Study) -> None:
        self.root = root
        self.folder = root / str(study.user_attrs[FOLDER_ATTRIBUTE])
        self.study_name = study.study_name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the study's lock; the system frees it when the process ends, however it ends.

        Raises:
            HpoError: Another process runs the study, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("a+")
        except OSError as error:
            raise HpoError(
                f"Cannot write to {self.folder} ({error.strerror}); choose another folder with --runs."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise HpoError(
                    f"Study {self.study_name!r} is being run by process {holder}; wait for it, or use another study."
                ) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def write_checkpoint(self, name: str, write: Callable[[Path], None]) -> str:
        """Write a checkpoint folder beside its place and rename it into it.

        Args:
            name: Folder name of the checkpoint.
            write: Fills the folder it is given.
        Returns:
            The place, relative to the runs folder, as it is recorded in the database.
        Raises:
            HpoError: The disk is full or the folder cannot be written.
        """
        place = self.folder / name
        temporary = self.folder / f".{name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            shutil.rmtree(place, ignore_errors=True)
            temporary.rename(place)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise HpoError(
                f"Cannot write the checkpoint {place} ({error.strerror or error}); make room or choose another folder "
                "with --runs, and run the same command again to continue."
            ) from error
        return f"{self.folder.name}/{name}"

    def keep_only(self, place: str | None) -> None:
        """Remove every checkpoint of this study but the one at `place` (relative to the runs folder)."""
        kept = None if place is None else (self.root / place).name
        for folder in self.folder.glob("*/"):
            if folder.name != kept:
                shutil.rmtree(folder, ignore_errors=True)
