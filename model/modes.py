"""Who may read files: safetensors writes weights that only their owner may, whatever the umask says."""

import stat
from pathlib import Path


def as_the_umask_says(folder: Path) -> None:
    """Give every file in a folder, and in those within it, the mode that a new file gets there.

    A new file tells it: the umask itself can only be asked for by setting it, for all threads at once.
    """
    new = folder / ".mode"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)
