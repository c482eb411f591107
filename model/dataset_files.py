"""Reading a dataset: a hub id, a folder or files become one table per split."""

import contextlib
import csv
import errno
import glob
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from model.hub import hub_answers
from model.paths import user_path
from model.rows import DataError

TRAIN_SPLIT = "train"
REPORT_SPLITS = ("validation", "validation_matched", "dev", "valid", "val", "eval", "test")  # in order of preference

CSV_OPTIONS = {
    "keep_default_na": False,  # else the words "None", "NA" and "null" read as missing
    "na_values": [""],
    "chunksize": 1_000_000,  # rows that a column's type is told from; else the first 10,000
}
FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", CSV_OPTIONS),
    ".tsv": ("csv", {**CSV_OPTIONS, "sep": "\t"}),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@contextlib.contextmanager
def _without_network() -> Iterator[None]:
    """Let `datasets` read its cache and local files alone; it would report each load of a file to a counter, too."""
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def read_splits(dataset: str) -> dict[str, datasets.Dataset]:
    """Every split of `dataset` by its name, none of them empty."""
    with _quiet_libraries(), _explained_errors(dataset):
        path = user_path(dataset)
        folder, _, config = dataset.rpartition(":")
        if path.is_dir():
            splits = _read_folder(path, None)
        elif path.is_file():
            splits = {TRAIN_SPLIT: _read_file(path, TRAIN_SPLIT)}
        elif "=" in dataset:
            splits = _read_named_files(dataset)
        elif folder and user_path(folder).is_dir():
            splits = _read_folder(user_path(folder), config)
        elif _looks_like_path(dataset):
            raise DataError(f"There is no file or folder {dataset!r}; check the path given as --dataset.")
        else:
            splits = _read_hub(dataset)
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"The {name} split of {dataset!r} has no rows; fill it or leave it out.")
    return splits


def _looks_like_path(dataset: str) -> bool:
    return (
        dataset.startswith((".", "/", "~"))
        or "\\" in dataset
        or dataset.count("/") > 1
        or Path(dataset).suffix.lower() in FORMATS
    )


def _read_named_files(dataset: str) -> dict[str, datasets.Dataset]:
    """The splits of `train=a.csv,validation=b.csv`, each read alone, so their columns need not all agree."""
    allowed = (TRAIN_SPLIT, *REPORT_SPLITS)
    splits: dict[str, datasets.Dataset] = {}
    for part in dataset.split(","):
        name, _, file = (piece.strip() for piece in part.partition("="))
        if name not in allowed or name in splits or not file:
            raise DataError(
                f"Cannot read {part!r} in --dataset {dataset!r}; write train=FILE,validation=FILE, each split once, "
                f"with split names from {', '.join(allowed)}."
            )
        path = user_path(file)
        if not path.is_file():
            raise DataError(f"There is no file {file!r} for the {name} split; check the path given as --dataset.")
        splits[name] = _read_file(path, name)
    return splits


@_without_network()
def _read_file(path: Path, split: str) -> datasets.Dataset:
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{str(path)!r} has none of the known endings {', '.join(FORMATS)}; convert or rename it.")
    if not path.stat().st_size:
        raise DataError(f"{str(path)!r} is an empty file; give one with rows.")
    builder, options = FORMATS[path.suffix.lower()]
    with _explained_errors(str(path)):
        pattern = glob.escape(str(path.resolve()))
        options = {**options, **_quoting([path])}
        return datasets.load_dataset(builder, data_files={split: pattern}, split=split, **options)


@_without_network()
def _read_folder(path: Path, config: str | None) -> dict[str, datasets.Dataset]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # saved with save_to_disk
        saved = datasets.load_from_disk(str(path))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {TRAIN_SPLIT: saved}
    if set("*?[") & set(str(path.resolve())):
        raise DataError(f"The folder {str(path)!r} has one of * ? [ in its path; rename it.")  # read as patterns
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in FORMATS and file.is_file()]
    if not files:
        raise DataError(f"The folder {str(path)!r} holds no data; it needs files ending in {', '.join(FORMATS)}.")
    try:
        return dict(_load_dataset(str(path.resolve()), config, files))
    except Exception as error:
        if config is None and "Config name is missing" not in str(error):
            for file in files:
                _read_file(file, TRAIN_SPLIT)  # where one file is at fault, this names it
        raise


def _read_hub(dataset: str) -> dict[str, datasets.Dataset]:
    name, _, config = dataset.partition(":")
    if not HUB_ID.fullmatch(name) or name in {builder for builder, _ in FORMATS.values()}:
        raise DataError(
            f"{dataset!r} is neither an existing folder or file nor a hub id; give a path, or an id as in "
            "nyu-mll/glue:sst2."
        )
    reached = not datasets.config.HF_HUB_OFFLINE and hub_answers()
    try:
        with contextlib.nullcontext() if reached else _without_network():
            return dict(_load_dataset(name, config or None))
    except ConnectionError as error:
        reason = "offline mode is set" if datasets.config.HF_HUB_OFFLINE else "no connection to the hub"
        raise DataError(
            f"{dataset!r} is no local path and could not be fetched from {datasets.config.HF_ENDPOINT} ({reason}); "
            "give a local folder, or connect and run it again."
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"The hub has no dataset {name!r} that you may read; check its spelling, log in with `hf auth login`, or "
            "give a local folder."
        ) from error


def _load_dataset(path: str, config: str | None, files: Iterable[Path] = ()) -> datasets.DatasetDict:
    """What a folder, whose files are named, or a hub id holds."""
    builder = datasets.load_dataset_builder(path, config)
    is_csv = type(builder.config).__name__ == "CsvConfig"
    return datasets.load_dataset(path, config, **({**CSV_OPTIONS, **_quoting(files)} if is_csv else {}))


def _quoting(files: Iterable[Path]) -> Mapping[str, Any]:
    """Options for files of which a tab-separated one, as GLUE's, quotes no cells: a quote is one there, wherever it
    stands. Read as a spreadsheet's, such a file loses the rows from one quote to the next."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        for path in files:
            if path.suffix.lower() == ".tsv":
                with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
                    for _ in csv.reader(lines, delimiter="\t", strict=True):
                        pass
    except csv.Error:
        return {"quoting": csv.QUOTE_NONE}
    finally:
        csv.field_size_limit(limit)
    return {}


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep progress bars, log lines and warnings of the loading libraries from the user; our errors say it all."""
    with warnings.catch_warnings(), contextlib.ExitStack() as restore:
        warnings.simplefilter("ignore")
        for library in map(logging.getLogger, ("datasets", "huggingface_hub")):
            restore.callback(library.setLevel, library.level)
            library.setLevel(logging.CRITICAL + 1)
        if datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not datasets.are_progress_bars_disabled():
            restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        if HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled():
            restore.callback(enable_progress_bars)
            disable_progress_bars()
        yield


@contextlib.contextmanager
def _explained_errors(source: str) -> Iterator[None]:
    """Turn whatever reading `source` raises into one sentence: the libraries below raise errors of many families."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(_explain(error, source)) from error


def _explain(error: Exception, source: str) -> str:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, OSError) and _is_about_cache(cause):
            return (
                f"The dataset cache {str(datasets.config.HF_DATASETS_CACHE)!r} cannot be written "
                f"({cause.strerror or _first_line(cause)}); make room there, or set HF_DATASETS_CACHE to a folder "
                "that can be written."
            )
        if isinstance(cause, PermissionError):
            return f"{cause.filename or source!r} may not be read (permission denied); change its permissions."
        if isinstance(cause, datasets.table.CastError):
            return (
                f"The files of {source!r} do not have the same columns ({cause.details().strip()}); make them "
                "agree, or name one file per split as in --dataset train=a.csv,validation=b.csv."
            )
    message = str(error)
    if match := re.search(r'Instruction "(\w+)" corresponds to no data', message):
        return f"The {match[1]} split of {source!r} has no rows; fill it or leave it out."
    if match := re.search(r"[Aa]vailable(?: configs(?: in the cache)?)?: \[(.*?)\]", message):
        return f"Name one config of {source!r} after a colon, as in `name:config`; it has {match[1]}."
    if isinstance(causes[-1], StopIteration) or "BatchSize must be greater than 0" in str(causes[-1]):
        return f"{source!r} has no rows; give a file with rows."
    return f"{source!r} cannot be read as a dataset ({_first_line(causes[-1])}); repair or replace it."


def _is_about_cache(error: OSError) -> bool:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS) or "Not enough disk space" in str(error):
        return True
    if not isinstance(error.filename, str):
        return False
    cache, path = Path(datasets.config.HF_DATASETS_CACHE).absolute(), Path(error.filename).absolute()
    return path.is_relative_to(cache) or cache.is_relative_to(path)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:200]
