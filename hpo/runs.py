"""The runs folder: checkpoints of trials, which the workers of a study share where they reach the same disk.

A study's files lie in `<runs>/<study name>-<id>/`, the id being drawn when the study is made, so that studies
of one name in different databases never share a folder, unless one is a copy of the other.
"""

import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

from hpo.errors import HpoError
from model.modes import as_the_umask_says
from model.paths import user_path
from studies.loader import STAGES

if TYPE_CHECKING:  # listing and drawing studies needs no torch
    from transformers import PreTrainedTokenizerBase

    from model.encoder import LengthAdaptiveModel

logger = logging.getLogger(__name__)

DEFAULT_RUNS = "runs"
FOLDER_ATTRIBUTE = "runs_folder"
CACHE = "teacher-cache"
"""What a teacher said of the training split, in a study's folder."""
SPOOL = "spool"
"""Results that the database has not been told yet, in a study's folder."""
STAGE_MARK = ".after-"
"""In the names of checkpoints of trials that are not through."""
STEPS_FILE = "steps.txt"
"""In the checkpoint of a stage: the optimizer steps of it and those before."""
TRIAL_FOLDER = re.compile(
    rf"(?P<hidden>\.)?(?P<name>trial-(?P<number>\d+))({re.escape(STAGE_MARK)}({'|'.join(STAGES)}))?"
    r"(?(hidden)\.(partial|former))"
)
"""A trial's checkpoint or stage, also while it is written or replaced; whatever else is there is a user's."""
FOLDER_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Folder names read from a database, which others may write to, become paths that are deleted."""


def runs_folder(given: Path | None) -> Path:
    """The folder to use: the given one, else `HPO_RUNS`, else `runs`."""
    return user_path(given or os.environ.get("HPO_RUNS") or DEFAULT_RUNS)


def new_folder_name(study_name: str) -> str:
    """A folder name no other study has; recorded in the study attribute `runs_folder`."""
    return f"{study_name}-{uuid.uuid4().hex[:8]}"


def write_folder(place: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside its place and rename it into it; one that is there is moved aside until then.

    Args:
        place: Where it shall be.
        write: Fills the folder it is given.
    Raises:
        HpoError: The disk is full or the folder cannot be written; the message is the reason alone.
    """
    temporary, former = (place.with_name(f".{place.name}.{what}") for what in ("partial", "former"))
    shutil.rmtree(temporary, ignore_errors=True)
    _put_back(former, place)  # who wrote here before may have been killed
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        as_the_umask_says(temporary)
        if place.is_dir() and not place.is_symlink():
            place.rename(former)
        temporary.rename(place)
    except Exception as error:
        reason = str((isinstance(error, OSError) and error.strerror) or error)
        if not isinstance(error, OSError) and "os error" not in reason:
            raise
        # safetensors and tokenizers give a full disk as their own exceptions, ending in "(os error 28)"
        raise HpoError(reason) from error
    finally:
        _put_back(former, place)
        shutil.rmtree(temporary, ignore_errors=True)


def _put_back(former: Path, place: Path) -> None:
    """Remove what was moved aside for another folder, or put it back where that did not come."""
    with suppress(OSError):
        if place.exists():
            shutil.rmtree(former)
        else:
            former.rename(place)


class StudyRuns:
    """One study's part of the runs folder.

    Attributes:
        root: The runs folder.
        folder: The study's own folder in it.
        study_name: The study's name, for messages.
    Raises:
        HpoError: The study records no folder, or one that might lie outside the runs folder.
    """

    def __init__(self, root: Path, study: optuna.Study) -> None:
        self.root = root
        self.study_name = study.study_name
        folder = study.user_attrs.get(FOLDER_ATTRIBUTE)
        if not isinstance(folder, str) or not FOLDER_PATTERN.fullmatch(folder):
            raise HpoError(
                f"Study {self.study_name!r} names no folder for its files ({FOLDER_ATTRIBUTE}={folder!r}), so this "
                "tool did not make it; choose another study."
            )
        self.folder = root / folder

    def prepare(self) -> None:
        """Make the folder, and see that it can be written to.

        Raises:
            HpoError: It cannot be.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise HpoError(
                f"Cannot write to {self.folder} ({error.strerror}); choose another folder with --runs."
            ) from error

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
        try:
            write_folder(place, write)
        except HpoError as error:
            raise HpoError(
                f"Cannot write the checkpoint {place} ({error}); make room or choose another folder "
                "with --runs, and run the same command again to continue."
            ) from error
        return f"{self.folder.name}/{name}"

    def write_model(
        self, name: str, model: "LengthAdaptiveModel", tokenizer: "PreTrainedTokenizerBase", steps: int | None = None
    ) -> str:
        """`write_checkpoint` for a model and its tokenizer, and the steps that made it where they are given."""

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if steps is not None:
                (folder / STEPS_FILE).write_text(str(steps), encoding="utf-8")

        return self.write_checkpoint(name, write)

    def keep_only(self, place: str | None, begun: Collection[str] = (), newer: int | None = None) -> None:
        """Remove every checkpoint of this study's trials but the one at `place` (relative to the runs folder).

        Args:
            place: Of the checkpoint that stays; None where none does.
            begun: Names of trials whose checkpoints and stages stay too: those that are not through.
            newer: Number of a trial; of this one and later ones everything stays, since other workers may have begun
                them after `begun` was read. None where there are none.
        """
        kept = None if place is None else (self.root / place).name
        for folder in self.folder.glob("*/"):
            trial = TRIAL_FOLDER.fullmatch(folder.name)
            if trial is None or folder.name == kept or trial["name"] in begun:
                continue
            if newer is None or int(trial["number"]) < newer:
                shutil.rmtree(folder, ignore_errors=True)

    def stage_place(self, trial: str, stage: str) -> Path:
        """Where the checkpoint lies that a trial has after one of its stages."""
        return self.folder / f"{trial}{STAGE_MARK}{stage}"

    def steps_after(self, trial: str, stage: str) -> int:
        """The steps that a trial has made when a stage that is kept is done; 0 where an earlier version kept it."""
        file = self.stage_place(trial, stage) / STEPS_FILE
        return int(file.read_text(encoding="utf-8")) if file.is_file() else 0
