"""Errors a user can cause; `hpo.cli.main` prints each as one sentence and exits."""


class HpoError(Exception):
    """Something the user can put right; the message says how."""


class StudyNotFound(HpoError):
    """The storage holds no study of that name."""


class StudyChanged(HpoError):
    """The study was made with another model, dataset or search space."""


class StorageError(HpoError):
    """The storage URL is malformed, unreachable or not a database of ours."""


class EmptyFront(HpoError):
    """A front was asked for before any trial finished."""
