"""What a path that a user gives means."""

from contextlib import suppress
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """The path with a `~` in front read as the home, as it is where there is none.

    Shells leave the `~` of `--out=~/served` alone, and so do files that set a variable.
    """
    with suppress(RuntimeError):
        return Path(text).expanduser()
    return Path(text)
