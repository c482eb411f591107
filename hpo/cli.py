"""The `hpo` command: parses, calls, prints. All printing and all exit codes of the project are here."""

import dataclasses
import io
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpo.errors import HpoError
from model.paths import user_path
from studies.loader import StudyFileError

if TYPE_CHECKING:
    import optuna

    from hpo.front import Front, FrontPoint
    from hpo.ray_engine import RayCluster
    from hpo.workload import Workload
    from studies.loader import FinetuneStudy

# Commands import what they run: torch and its company take seconds, and `hpo --help` needs none of it.

FINETUNE, DEMO_FINETUNE, DISTILL, LENGTHS = "finetune", "finetune-demo", "distill", "lengths"
TRAINING_KINDS = ("finetune", "distill")

STORAGE_TIMEOUT_S = 600.0
SIGNALS_HEARD_AFTER_S = 0.5
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")

app = typer.Typer(
    name="hpo",
    help="Train an encoder once with LengthDrop, search how many tokens each layer keeps, serve it at any budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Storage = Annotated[
    str | None,
    typer.Option(
        "--storage", metavar="URL", help="Database; else HPO_STORAGE, else sqlite:///hpo.db.", show_default=False
    ),
]
StorageTimeout = Annotated[
    float,
    typer.Option(
        "--storage-timeout", metavar="SECONDS", min=0.0, help="Wait for a database that goes away; 0 for not at all."
    ),
]
Runs = Annotated[
    Path | None,
    typer.Option(
        "--runs", metavar="DIR", help="Checkpoints and reports; else HPO_RUNS, else runs/.", show_default=False
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="FOLDER|ID", help="Encoder: a transformers folder or hub id.", show_default=False)
]
Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Hub id (owner/name:config), folder, file, or train=FILE,validation=FILE (Parquet, JSON, CSV).",
        show_default=False,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="FOLDER|ID", help="Fine-tuned encoder that the full passes learn from.", show_default=False),
]
StudentLayers = Annotated[
    str | None,
    typer.Option(metavar="0,2,4", help="Cut the student from these layers, counted from 0.", show_default="all layers"),
]
Objective = Annotated[str | None, typer.Option(help="area or metric.", show_default="as the study file says")]
TextColumns = Annotated[
    str | None,
    typer.Option(metavar="NAME[,NAME]", help="Column of the text, or of a pair of texts.", show_default=False),
]
LabelColumn = Annotated[str | None, typer.Option(metavar="NAME", help="Column of the label.", show_default=False)]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help="classification, regression, question-answering or token-classification.",
        show_default="as the columns tell",
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="What trials are scored by; README lists them.",
        show_default="the task's usual",
    ),
]
TrainLimit = Annotated[
    int | None, typer.Option(min=1, help="Train on this many examples at most; other splits stay.", show_default="all")
]
SearchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Examples carved out of train to score trials on.", show_default="2,000, or 10 % of train"
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=4, help="Tokens after which a text is cut, or a window of a context.", show_default="512"),
]
Stride = Annotated[
    int | None, typer.Option(min=0, help="Tokens that neighbouring windows of a context share.", show_default="128")
]
Windows = Annotated[
    bool | None,
    typer.Option(
        "--windows/--no-windows", help="Cut long contexts into windows, or refuse them.", show_default="windows"
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the splits, the sampler and the training.")]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes of this machine that share the study; other machines may join it.")
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS|local",
        help="Run the workers on a Ray cluster: auto or host:port.",
        show_default=False,
    ),
]
CpusPerWorker = Annotated[
    int | None, typer.Option(min=1, help="Cores and threads of a worker on Ray.", show_default="1")
]
GpusPerWorker = Annotated[
    float | None, typer.Option(min=0.0, help="GPUs of a worker on Ray; a part of 1 shares one.", show_default="0")
]
Launcher = Annotated[
    str | None,
    typer.Option(
        metavar="accelerate", help="Train each model in several processes, one per GPU.", show_default="one process"
    ),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="How many, with --launcher.", show_default="one per GPU of a worker")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        min=0.0, help="Choose the cheapest point that loses at most this much on the search split.", show_default=False
    ),
]
MaxLatency = Annotated[
    float | None,
    typer.Option(
        "--max-latency-ms",
        min=0.0,
        help="Choose the best point that was seen to take at most this long for a sequence.",
        show_default=False,
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="Choose the best point of at most this share of full length's FLOPs.", show_default=False
    ),
]


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"hpo {version('hpo')}")
        raise typer.Exit


@app.callback()
def configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is going on.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Set up logging before any command."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("hpo", "model", "studies"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they speak to programmers; `python -W` brings them back


@app.command("tune")
def tune_command(
    study: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Study file: ours by name, or a path ending in .toml.")
    ] = FINETUNE,
    trials: Annotated[int, typer.Option(min=1, help="Finished trials the study shall have in all.")] = 20,
    model: Model = None,
    dataset: Dataset = None,
    teacher: Teacher = None,
    student_layers: StudentLayers = None,
    task: Task = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    metric: MetricName = None,
    objective: Objective = None,
    train_limit: TrainLimit = None,
    search_size: SearchSize = None,
    max_length: MaxLength = None,
    stride: Stride = None,
    windows: Windows = None,
    seed: Seed = 0,
    workers: Workers = 1,
    ray: Ray = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    launcher: Launcher = None,
    processes: Processes = None,
    storage: Storage = None,
    storage_timeout: StorageTimeout = STORAGE_TIMEOUT_S,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Search how to train the encoder: a TPE study over training settings. The best model is kept."""
    from hpo.runs import runs_folder

    root = runs_folder(runs)
    cluster = _cluster(ray, cpus_per_worker, gpus_per_worker)
    together = _processes(launcher, processes, cluster)
    layers = _layers(student_layers)
    if layers is not None and model is None:
        model = teacher
    if (model is None) != (dataset is None):
        absent = "model" if model is None else "dataset"
        raise typer.BadParameter(f"give --{absent} too, or neither for the embedded demo task")
    _quieten_libraries()
    definition = _definition(DEMO_FINETUNE if model is None and study == FINETUNE else study, objective)
    if model is None:
        model, dataset = _demo(root)
    data_flags = _data_flags(dataset, text_columns, label_column, train_limit, search_size, seed)
    workload = _workload(model, data_flags, _workload_flags(task, metric, max_length, stride, windows))
    _tune(
        definition,
        workload,
        trials,
        teacher,
        layers,
        seed,
        workers,
        cluster,
        together,
        storage,
        storage_timeout,
        runs,
        as_json,
    )


@app.command("distill")
def distill_command(
    teacher: Annotated[str, typer.Option("--teacher", metavar="FOLDER|ID", help="Fine-tuned encoder to learn from.")],
    dataset: Annotated[
        str, typer.Option("--dataset", metavar="DATA", help="Hub id, folder, file, or train=FILE,validation=FILE.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--student", metavar="FOLDER|ID", help="Encoder that learns.", show_default="cut with --student-layers"
        ),
    ] = None,
    student_layers: StudentLayers = None,
    study: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Study file: ours by name, or a path ending in .toml.")
    ] = DISTILL,
    task: Task = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    metric: MetricName = None,
    objective: Objective = None,
    train_limit: TrainLimit = None,
    search_size: SearchSize = None,
    max_length: MaxLength = None,
    stride: Stride = None,
    windows: Windows = None,
    seed: Seed = 0,
    ray: Ray = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    launcher: Launcher = None,
    processes: Processes = None,
    storage: Storage = None,
    storage_timeout: StorageTimeout = STORAGE_TIMEOUT_S,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Distil a teacher into a student that works at any length: the first trial of `hpo tune --study distill`."""
    layers = _layers(student_layers)
    if model is None and layers is None:
        raise typer.BadParameter("give --student, or --student-layers to cut one from the teacher")
    cluster = _cluster(ray, cpus_per_worker, gpus_per_worker)
    together = _processes(launcher, processes, cluster)
    _quieten_libraries()
    data_flags = _data_flags(dataset, text_columns, label_column, train_limit, search_size, seed)
    workload = _workload(model or teacher, data_flags, _workload_flags(task, metric, max_length, stride, windows))
    definition = _definition(study, objective)
    _tune(definition, workload, 1, teacher, layers, seed, 1, cluster, together, storage, storage_timeout, runs, as_json)


def _definition(study: str, objective: str | None) -> "FinetuneStudy":
    """A study file, with the objective that a flag names."""
    from studies.loader import load_finetune

    definition = load_finetune(_name_or_file(study))
    if objective is None:
        return definition
    return dataclasses.replace(definition, objective=objective)  # type: ignore[arg-type]  # checks itself


def _tune(
    definition: "FinetuneStudy",
    workload: "Workload",
    trials: int,
    teacher: str | None,
    student_layers: list[int] | None,
    seed: int,
    workers: int,
    cluster: "RayCluster | None",
    processes: int,
    storage: str | None,
    storage_timeout: float,
    runs: Path | None,
    as_json: bool,
) -> None:
    """Run or complete a study over training settings, and show its best trial."""
    from hpo.runs import runs_folder
    from hpo.storage import display_url, storage_url
    from hpo.tune import best_checkpoint, best_trial
    from hpo.workers import TuneJob, complete

    url, root = storage_url(storage), runs_folder(runs)
    job = TuneJob(
        definition=definition,
        workload=workload,
        trials=trials,
        storage=url,
        runs=root,
        teacher=None if teacher is None else _absolute(teacher),
        student_layers=student_layers,
        seed=seed,
        workers=workers,
        processes=processes,
        storage_timeout_s=storage_timeout,
    )
    with _resumable(definition.name, url, trials), _progress("trials") as on_progress:
        finished = complete(job, on_progress=on_progress, prepare=_quieten_libraries, cluster=cluster)
    with _database(url):
        folder, best, done = best_checkpoint(finished, root), best_trial(finished), _finished_count(finished)
        name, direction = (finished.metric_names or ["value"])[0], finished.direction.name.lower()
    if as_json:
        _print_json(
            {
                "study": finished.study_name,
                "storage": display_url(url),
                "trials": done,
                "objective": {"name": name, "direction": direction},
                "best": {
                    "trial": best.number,
                    "value": best.value,
                    "parameters": best.params,
                    "checkpoint": str(folder),
                },
            }
        )
        return
    out.print(f"{done} trials in study {finished.study_name!r} of {display_url(url)}.", markup=False)
    out.print(f"Best: trial {best.number}, {name} {best.value:.4f} on the search split.", markup=False)
    for key, value in sorted(best.params.items()):
        out.print(f"  {key} = {value:.4g}" if isinstance(value, float) else f"  {key} = {value}", markup=False)
    out.print(f"Its model: {folder}", markup=False, soft_wrap=True)
    following = ["hpo", "search-lengths", "--trials", "500"]
    following += ["--finetune-study", finished.study_name] * (finished.study_name != FINETUNE)
    following += ["--storage", display_url(url)] * (storage is not None) + ["--runs", str(root)] * (runs is not None)
    out.print(f"Next: {shlex.join(following)}", markup=False, soft_wrap=True)


@app.command("search-lengths")
def search_lengths_command(
    trials: Annotated[int, typer.Option(min=1, help="Finished trials the study shall have in all.")] = 500,
    study: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Study file: ours by name, or a path ending in .toml.")
    ] = LENGTHS,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", parser=user_path, help="Trained encoder.", show_default="best model of the finetune study"
        ),
    ] = None,
    finetune_study: Annotated[
        str, typer.Option(metavar="NAME", help="Study whose best model and dataset are taken.")
    ] = FINETUNE,
    dataset: Dataset = None,
    task: Task = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    metric: MetricName = None,
    train_limit: TrainLimit = None,
    search_size: SearchSize = None,
    max_length: MaxLength = None,
    stride: Stride = None,
    windows: Windows = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the splits and the sampler.", show_default="the finetune study's")
    ] = None,
    seed_with: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD", help="power-bert: learn length configs for the first generation.", show_default=False
        ),
    ] = None,
    workers: Workers = 1,
    ray: Ray = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    cost: Annotated[
        str | None,
        typer.Option(
            metavar="macs|latency|both",
            help="What is minimised; latency is predicted for this machine, which is timed first.",
            show_default="as the study file says",
        ),
    ] = None,
    max_drop: MaxDrop = None,
    budget: Budget = None,
    storage: Storage = None,
    storage_timeout: StorageTimeout = STORAGE_TIMEOUT_S,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Search how many tokens each layer should keep: a multi-objective study over quality and cost."""
    _check_choice(max_drop, budget)
    from hpo.front import NothingFits, compute_front, hypervolume_history
    from hpo.runs import StudyRuns, runs_folder
    from hpo.search_lengths import stopped_and_reused
    from hpo.storage import storage_url
    from hpo.tune import best_checkpoint
    from hpo.workers import SearchJob, complete
    from studies.loader import COSTS, load_lengths

    _quieten_libraries()
    from hpo.seeds import METHODS

    if cost is not None and cost not in COSTS:
        raise typer.BadParameter(f"--cost {cost}: choose {', '.join(COSTS)}")

    if seed_with is not None and seed_with not in METHODS:
        raise typer.BadParameter(f"--seed-with {seed_with}: choose {' or '.join(METHODS)}")
    cluster = _cluster(ray, cpus_per_worker, gpus_per_worker)
    url, root = storage_url(storage), runs_folder(runs)
    definition = load_lengths(_name_or_file(study))
    if cost is not None:
        definition = dataclasses.replace(definition, cost=cost)  # type: ignore[arg-type]  # checks itself
    flags = _data_flags(dataset, text_columns, label_column, train_limit, search_size, seed)
    workload_flags = _workload_flags(task, metric, max_length, stride, windows)
    if checkpoint is not None and dataset is not None:
        workload = _workload(str(checkpoint), flags, workload_flags)
    else:
        trained, workload = _trained_by(finetune_study, url, flags, workload_flags)
        with _database(url):
            checkpoint = checkpoint or best_checkpoint(trained, root)
    job = SearchJob(
        definition=definition,
        workload=workload,
        checkpoint=checkpoint,
        trials=trials,
        storage=url,
        runs=root,
        seed=workload.data.seed,
        seed_with=seed_with,
        workers=workers,
        storage_timeout_s=storage_timeout,
    )
    with _resumable(definition.name, url, trials), _progress("trials") as on_progress:
        search = complete(job, on_progress=on_progress, prepare=_quieten_libraries, cluster=cluster)
    with _database(url):
        front, history = compute_front(search.study, url), hypervolume_history(search.study)
        stopped, reused = stopped_and_reused(search.study)
    chosen, unmet = None, None
    try:
        chosen = _choose(front, max_drop, budget)
    except NothingFits as error:  # told in the end: what hours of search have found is shown all the same
        unmet = error
    if stopped:
        err.print(f"{stopped} trials were stopped early: a cheaper one had beaten them.", markup=False)
    if reused:
        err.print(f"{reused} trials resolved to lengths already scored and reused the score.", markup=False)
    if (table := search.table) is not None:
        err.print(
            f"Times are predicted for {table}: {table.median_error:.1%} off (median) on {len(table.held_out)} length "
            f"configs that were timed whole, {table.worst_error:.1%} at worst.",
            markup=False,
            soft_wrap=True,
        )
    if (measured := search.prediction) is not None:
        err.print(
            f"The front's {measured.points} points were timed in the end: predictions are {measured.median_error:.1%} "
            f"off (median), {measured.worst_error:.1%} at worst.",
            markup=False,
            soft_wrap=True,
        )
    folder = StudyRuns(root, search.study).folder
    _draw(front, history, chosen, folder / "front.html", [folder / "front.png", folder / "front.svg"])
    _show_front(front, chosen, as_json)
    if unmet is not None:
        raise unmet


@app.command("pareto")
def pareto_command(
    study: Annotated[str, typer.Option(metavar="NAME", help="A lengths study.")] = LENGTHS,
    max_drop: MaxDrop = None,
    budget: Budget = None,
    max_latency_ms: MaxLatency = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=user_path, help="Where the page goes.", show_default="in the runs folder"),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            parser=user_path,
            help="Also draw a PNG, SVG, PDF, JPEG or WebP; may be repeated.",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Print and draw the front of a lengths study, and the point that meets a budget."""
    _check_choice(max_drop, budget, max_latency_ms)
    _check_images(image or [])
    from hpo.front import compute_front, hypervolume_history
    from hpo.runs import StudyRuns, runs_folder
    from hpo.storage import find_study, open_storage, storage_url

    _quieten_libraries()
    url = storage_url(storage)
    with _database(url):
        found = find_study(open_storage(url, create=False), _study_name(study), start_with="hpo search-lengths")
        front, history = compute_front(found, url), hypervolume_history(found)
    chosen = _choose(front, max_drop, budget, max_latency_ms)
    page = html or StudyRuns(runs_folder(runs), found).folder / "front.html"
    try:
        _draw(front, history, chosen, page, image or [])
    except OSError as error:
        if html is not None or image:
            raise
        logging.getLogger(__name__).warning("The page was not written: %s (%s).", page, error.strerror or error)
    _show_front(front, chosen, as_json)


@app.command("export")
def export_command(
    out_folder: Annotated[Path, typer.Option("--out", metavar="DIR", parser=user_path, help="Where the folder goes.")],
    study: Annotated[str, typer.Option(metavar="NAME", help="A lengths study.")] = LENGTHS,
    max_drop: MaxDrop = None,
    budget: Budget = None,
    max_latency_ms: MaxLatency = None,
    trial: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Choose this completed trial.", show_default=False)
    ] = None,
    format: Annotated[
        str, typer.Option(metavar="hf|onnx", help="For transformers with the whole front, or one ONNX graph.")
    ] = "hf",
    fixed_length: Annotated[
        int | None,
        typer.Option(min=4, metavar="N", help="onnx: pad to N tokens, as TensorRT needs.", show_default="any length"),
    ] = None,
    opset: Annotated[
        int | None, typer.Option(metavar="N", help="onnx: version of the operators.", show_default="18")
    ] = None,
    int8: Annotated[
        str | None,
        typer.Option(metavar="dynamic|static", help="onnx: quantise, and measure again.", show_default="float32"),
    ] = None,
    storage: Storage = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Write a point of the front as a folder that serves it, checked against the model."""
    _check_choice(max_drop, budget, max_latency_ms)
    if (trial is None) == (max_drop is None and budget is None and max_latency_ms is None):
        raise typer.BadParameter("give one of --max-drop, --budget, --max-latency-ms and --trial")
    if format != "onnx" and (fixed_length, opset, int8) != (None, None, None):
        raise typer.BadParameter("--fixed-length, --opset and --int8 go with --format onnx")
    from hpo.export import FORMATS, INT8, NOTABLE, export
    from hpo.runs import runs_folder
    from hpo.storage import find_study, open_storage, storage_url
    from model.onnx_export import OPSET

    if format not in FORMATS:
        raise typer.BadParameter(f"--format {format}: choose {' or '.join(FORMATS)}")
    if int8 is not None and int8 not in INT8:
        raise typer.BadParameter(f"--int8 {int8}: choose {' or '.join(INT8)}")
    _quieten_libraries()
    url = storage_url(storage)
    with _database(url):
        found = find_study(open_storage(url, create=False), _study_name(study), start_with="hpo search-lengths")
        done = export(
            found,
            url,
            runs_folder(runs),
            out_folder,
            format=format,
            max_drop=max_drop,
            budget=budget,
            max_latency_ms=max_latency_ms,
            trial=trial,
            fixed_length=fixed_length,
            opset=OPSET if opset is None else opset,
            int8=int8,
        )
    chosen, name, length = done.front.chosen, done.front.metric, done.front.max_length
    if done.uncut is not None and done.float32 is not None and (lost := done.uncut - done.float32) > NOTABLE:
        err.print(
            f"Texts cut after {length} tokens lose {lost:.4f} of {name} on the report split; a longer --fixed-length "
            "may serve better.",
            markup=False,
            soft_wrap=True,
        )
    if done.int8 is not None and done.float32 is not None and (lost := done.float32 - done.int8) > NOTABLE:
        err.print(f"int8 loses {lost:.4f} of {name} on the report split; float32 may serve better.")
    if as_json:
        _print_json(
            {
                "folder": str(out_folder),
                "format": format,
                "trial": chosen.trial,
                "relative_macs": chosen.relative_macs,
                "metric": {"name": name, "search": chosen.metric, "report": chosen.report_metric},
                "largest_difference": done.difference,
                "uncut": done.uncut,
                "float32": done.float32,
                "int8": done.int8,
            }
        )
        return
    out.print(
        f"Trial {chosen.trial}, {chosen.relative_macs:.1%} of full length, is in {out_folder}; its logits differ from "
        f"the model's by at most {done.difference:.1g}.",
        markup=False,
        soft_wrap=True,
    )
    if done.uncut is not None:
        out.print(
            f"{name} on the report split: {done.uncut:.4f} with texts cut after {done.front.scored_length} tokens, "
            f"{done.float32:.4f} after {length}.",
            markup=False,
            soft_wrap=True,
        )
    if done.int8 is not None:
        alike = f", both after {length} tokens" * (done.uncut is not None)
        out.print(
            f"{name} on the report split: {done.float32:.4f} in float32, {done.int8:.4f} in int8{alike}.",
            markup=False,
            soft_wrap=True,
        )
    if format == "hf":
        following = shlex.join(["hpo", "predict", str(out_folder), "--budget", "0.5"])
        out.print(f"Next: {following} < in.jsonl", markup=False, soft_wrap=True)


@app.command("bench")
def bench_command(
    study: Annotated[str, typer.Option(metavar="NAME", help="A lengths study.")] = LENGTHS,
    batch_size: Annotated[
        str, typer.Option(metavar="SIZES", help="Sequences to run together, parted by commas.")
    ] = "1,8,32",
    points: Annotated[
        int | None,
        typer.Option(
            min=1, help="Points of the front to time, evenly chosen.", show_default="10, or all that were timed before"
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Of the search split.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="In which all take turns; more where they are short.")] = 5,
    baselines: Annotated[
        str, typer.Option(metavar="NAMES", help="To time beside: eager, sdpa, compile, onnx-fp32, onnx-int8; or none.")
    ] = "eager,sdpa,compile,onnx-fp32,onnx-int8",
    threads: Annotated[
        int | None, typer.Option(min=1, help="That compute.", show_default="as many as torch takes")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Round the factors of our large products to bf16.")] = False,
    storage: Storage = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Time points of the front on this machine's processor, beside what else one would run."""
    sizes = _numbers("--batch-size", batch_size)
    import torch

    from hpo.bench import bench, bench_table, bench_to_json
    from hpo.front import compute_front
    from hpo.runs import runs_folder
    from hpo.storage import find_study, open_storage, storage_url
    from model.timing import BASELINES

    names = [] if baselines == "none" else [name.strip() for name in baselines.split(",")]
    if unknown := [name for name in names if name not in BASELINES]:
        raise typer.BadParameter(f"--baselines {unknown[0]}: choose among {', '.join(BASELINES)}, or none")
    _quieten_libraries()
    if threads is not None:
        if threads > (most := os.cpu_count() or threads):
            raise typer.BadParameter(f"--threads {threads}: this machine has {most} processors")
        torch.set_num_threads(threads)
    url = storage_url(storage)
    with _abandoned_by_ctrl_c(), _database(url), _progress("size", say=True) as progress:
        found = find_study(open_storage(url, create=False), _study_name(study), start_with="hpo search-lengths")
        records = bench(
            found,
            url,
            runs_folder(runs),
            batch_sizes=sizes,
            sequences=sequences,
            points=points,
            rounds=rounds,
            baselines=names,
            precision="bf16" if bf16 else "fp32",
            on_progress=progress,
        )
        front = compute_front(found, url)
    for name, reason in records[0].left_out.items():
        err.print(f"{name} is left out: {reason}", markup=False, soft_wrap=True)
    if as_json:
        _print_json(bench_to_json(front, records))
        return
    for record in records:
        out.print(bench_table(record))


@app.command("predict")
def predict_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=user_path, help="What `hpo export` wrote.")],
    max_drop: MaxDrop = None,
    budget: Budget = None,
    max_latency_ms: MaxLatency = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Round the factors of large products: faster where bf16 products are.")
    ] = False,
) -> None:
    """Read JSON lines, write a prediction for each, in order; lines that cannot be read are told and passed over."""
    _check_choice(max_drop, budget, max_latency_ms)
    for name, stream in (("input", sys.stdin), ("output", sys.stdout)):
        if stream is None:
            command = shlex.join(["hpo", "predict", str(folder)])
            raise HpoError(f"Standard {name} is closed; run `{command} < in.jsonl > out.jsonl`.")
    _quieten_libraries()
    from hpo.predict import predict_lines
    from model.pipeline import LengthAdaptivePipeline

    answered, unread = 0, 0
    try:
        pipeline = LengthAdaptivePipeline(folder, precision="bf16" if bf16 else "fp32")
        point = pipeline.front.choose(max_drop=max_drop, budget=budget, max_latency_ms=max_latency_ms)
        for answer in predict_lines(pipeline, sys.stdin.buffer, point):
            sys.stdout.buffer.write(f"{answer.to_json()}\n".encode())
            answered += 1
            if answer.problem is not None:
                unread += 1
                _remark(f"Line {answer.number} {answer.problem}")
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # whoever read the predictions has enough; nothing is left to say
        _silence(sys.stdout)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        sys.stdout.buffer.flush()
        err.print(f"\nInterrupted after {answered} lines.", markup=False)
        raise typer.Exit(130) from None
    if unread:
        _remark(f"{unread} of {answered} lines could not be read.")
        raise typer.Exit(1)


def _remark(line: str) -> None:
    """Say something on standard error that the output says too; where that is closed or full, nothing from then on."""
    try:
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    except OSError:  # what is left in the stream's buffer would fail again at the end, and change the exit code
        _silence(sys.stderr)


def _silence(stream: TextIO) -> None:
    """Have what is still written to a stream go nowhere."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@app.command("studies")
def studies_command(storage: Storage = None, as_json: Json = False) -> None:
    """List the studies of a database, their states and best values."""
    from rich.table import Table
    from rich.text import Text

    from hpo.storage import describe_studies, display_url, open_storage, printable, storage_url

    _quieten_libraries()
    url = storage_url(storage)
    with _database(url):
        described = describe_studies(open_storage(url, create=False))
    if as_json:
        _print_json({"storage": display_url(url), "studies": described})
        return
    if not described:
        out.print(f"No studies in {display_url(url)}; start with `hpo tune`.", markup=False)
        return
    table = Table("study", "kind", "finished", "running", "failed", "best")
    for entry in described:
        keys = ("study", "kind", "finished", "running", "failed", "best_text")
        table.add_row(*(Text(printable(str(entry[key]))) for key in keys))
    out.print(table)


storage_app = typer.Typer(help="Serve databases, copy studies between them, upgrade old ones.", no_args_is_help=True)
app.add_typer(storage_app, name="storage")


@storage_app.command("copy")
def storage_copy_command(
    source: Annotated[str, typer.Argument(metavar="FROM", help="Database to read; it may be in use.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="Database to write; a SQLite file may be new.")],
    study: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Study to copy; may be repeated.", show_default="all")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy studies from one database to another: each whole, or not at all.

    Go on with one of the two, copy or original: in one runs folder they would remove each other's models.
    """
    from hpo.storage import display_url
    from hpo.storage_admin import copy_studies

    _quieten_libraries()
    copied = copy_studies(source, target, study or None)
    if as_json:
        _print_json(
            {
                "from": display_url(source),
                "to": display_url(target),
                "studies": [{"study": one.name, "trials": one.trials, "found": one.found} for one in copied],
            }
        )
        return
    if not copied:
        out.print(f"No studies in {display_url(source)}.", markup=False, soft_wrap=True)
    for one in copied:
        remark = "was there already, from an earlier copy" if one.found else "copied"
        out.print(f"Study {one.name!r} with {one.trials} trials {remark}.", markup=False, soft_wrap=True)
    if not all(one.found for one in copied):
        remark = "Go on with one of the two: in one runs folder copy and original would remove each other's models."
        out.print(remark, soft_wrap=True)


@storage_app.command("serve")
def storage_serve_command(
    storage: Storage = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 13000,
) -> None:
    """Let many workers reach a database through one server, as --storage grpc://host:port."""
    from hpo.proxy import address
    from hpo.storage import display_url, storage_url

    try:
        from hpo.proxy_server import served
    except ImportError as error:
        raise HpoError(
            f"Serving needs grpcio and protobuf ({error}); install them with `pip install grpcio protobuf`."
        ) from error

    _quieten_libraries()
    url = storage_url(storage)
    _check_address(host, port)
    with served(url, host, port) as bound, _ended_by_signals():
        place = address(host, bound)
        _warn_of_others(host, place)
        err.print(f"Serving {display_url(url)} on grpc://{place} (Ctrl-C ends it).", markup=False, soft_wrap=True)
        # A wait without end would miss a signal that comes just before it, or that another thread hears.
        while not threading.Event().wait(SIGNALS_HEARD_AFTER_S):
            pass
    err.print("Ended.")


@storage_app.command("replay")
def storage_replay_command(storage: Storage = None, runs: Runs = None) -> None:
    """Tell a database the results that were kept on disk while it was away."""
    from hpo.runs import runs_folder
    from hpo.spool import replay_all
    from hpo.storage import display_url, open_storage, storage_url

    _quieten_libraries()
    url, root = storage_url(storage), runs_folder(runs)
    with _database(url):
        replayed, others = replay_all(open_storage(url, create=False), root)
    remarks = [f"{replayed.known} were there already"] * bool(replayed.known)
    remarks += [f"{replayed.lost} count no more, and those trials are run again"] * bool(replayed.lost)
    out.print(
        f"Told {display_url(url)} the results of {replayed.told} trials{''.join(f'; {one}' for one in remarks)}.",
        markup=False,
        soft_wrap=True,
    )
    for folder in others:
        err.print(f"Left {root / folder}: its study is in another database.", markup=False, soft_wrap=True)


@storage_app.command("upgrade")
def storage_upgrade_command(storage: Storage = None) -> None:
    """Bring a database that an older Optuna made up to the installed one."""
    from hpo.storage import display_url, storage_url
    from hpo.storage_admin import upgrade

    _quieten_libraries()
    url = storage_url(storage)
    before, after = upgrade(url)
    if before == after:
        out.print(f"{display_url(url)} is up to date ({after}).", markup=False, soft_wrap=True)
        return
    out.print(f"Upgraded {display_url(url)} from {before} to {after}.", markup=False, soft_wrap=True)


@app.command("dashboard")
def dashboard_command(
    storage: Storage = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
) -> None:
    """Open optuna-dashboard on the database."""
    from hpo.proxy import address
    from hpo.storage import display_url, open_database, storage_url

    _quieten_libraries()
    url = storage_url(storage)
    opened = open_database(url, create=False)
    _check_address(host, port)
    from optuna_dashboard import run_server

    place = address(host, port)
    _warn_of_others(host, place)
    err.print(f"Studies of {display_url(url)} on http://{place}/ (Ctrl-C ends it).", markup=False, soft_wrap=True)
    run_server(opened, host=host.strip("[]"), port=port)


def main() -> NoReturn:
    """Run the command line; every failure a user can cause is one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or name that the locale cannot spell is no failure
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="hpo")
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        err.print(f"hpo: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


def _explain(error: Exception) -> str | None:
    """One sentence for an error the user can put right; None for one that only we can."""
    if isinstance(error, HpoError | StudyFileError):
        return str(error)
    from model.encoder import CheckpointError
    from model.front_file import ExportError
    from model.rows import DataError

    if isinstance(error, DataError | CheckpointError | ExportError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        place = error.filename2 or error.filename  # of what is renamed, its new name is the user's
        named = f" {place}" if place else ""
        return f"Cannot read or write{named}: {error.strerror}. Put it right and run the same command again."
    return None


def _quieten_libraries() -> None:
    """Keep other libraries' reports and bars off the user's screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    import optuna
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)  # shows SQL when a connection is lost
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)  # reports a Ctrl-C within a query as a traceback


@contextmanager
def _progress(unit: str, *, say: bool = False) -> Iterator[Callable[[float, int, str], None]]:
    """A bar on stderr, or nothing where stderr is no terminal; with `say`, there a line for each new remark. What shows
    progress raises a Ctrl-C that was swallowed."""
    from hpo.interrupts import heard

    with heard() as check, _shown(unit, say=say) as show:

        def update(done: float, total: int, remark: str) -> None:
            check()
            if show is not None:
                show(done, total, remark)

        yield update


@contextmanager
def _shown(unit: str, *, say: bool) -> Iterator[Callable[[float, int, str], None] | None]:
    if not err.is_terminal:
        yield _say_each_once() if say else None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[remark]}"), console=err, transient=True) as bar:
        line = bar.add_task(unit, total=None, remark="")

        def update(done: float, total: int, remark: str) -> None:
            bar.update(line, completed=done, total=total, remark=remark)

        yield update


def _say_each_once() -> Callable[[float, int, str], None]:
    """Shows progress as lines, for steps of which each takes a while."""
    said = ""

    def update(_done: float, _total: int, remark: str) -> None:
        nonlocal said
        if remark != said:
            said = remark
            err.print(f"{remark} ...", markup=False, highlight=False, soft_wrap=True)

    return update


@contextmanager
def _abandoned_by_ctrl_c() -> Iterator[None]:
    """On Ctrl-C exit 130 with a line; what a step had finished is kept."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("\nInterrupted; what was timed whole is kept with the study.", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None


@contextmanager
def _database(url: str) -> Iterator[None]:
    """Name the database that fails in the middle of a command, in one sentence."""
    from hpo.outage import DATABASE_ERRORS
    from hpo.storage import explain_database_error

    try:
        yield
    except DATABASE_ERRORS as error:
        raise explain_database_error(error, url) from error


@contextmanager
def _resumable(study: str, url: str, trials: int) -> Iterator[None]:
    """On Ctrl-C or SIGTERM say what is safe and how to go on, and exit 130."""
    from hpo.interrupts import pressed_by_sigterm
    from hpo.storage import count_finished, display_url

    try:
        with pressed_by_sigterm(), _database(url):
            yield
    except KeyboardInterrupt:
        done, shown = count_finished(url, study), display_url(url)
        if done is None:
            safe = f"the database {shown} does not answer; trials of study {study!r} that are finished are safe in it."
            safe += " Put it right, and run"
        else:
            safe = f"{done} of {trials} trials of study {study!r} are in {shown}. Run"
        err.print(f"\nInterrupted: {safe} the same command again to continue.", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _check_address(host: str, port: int) -> None:
    """Whether a server may listen there, in one sentence where not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host.strip("[]"), port), family=family):
            pass
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not an address"
        raise HpoError(
            f"Cannot listen on {host!r}, port {port} ({reason}); choose another --host or --port."
        ) from error


def _warn_of_others(host: str, place: str) -> None:
    """Neither server asks for a password."""
    if host not in LOOPBACK:
        err.print(f"Whoever reaches {place} may read and change every study.", markup=False, soft_wrap=True)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave the block at Ctrl-C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _cluster(ray: str | None, cpus_per_worker: int | None, gpus_per_worker: float | None) -> "RayCluster | None":
    """The Ray cluster that flags name, or wrong usage."""
    if ray is None:
        if cpus_per_worker is not None or gpus_per_worker is not None:
            raise typer.BadParameter("--cpus-per-worker and --gpus-per-worker go with --ray")
        return None
    from hpo.ray_engine import RayCluster

    return RayCluster(address=ray, cpus_per_worker=cpus_per_worker or 1, gpus_per_worker=gpus_per_worker or 0.0)


def _processes(launcher: str | None, processes: int | None, cluster: "RayCluster | None") -> int:
    """How many processes train one model together, or wrong usage."""
    if launcher is None:
        if processes is not None:
            raise typer.BadParameter("--processes goes with --launcher accelerate")
        return 1
    if launcher != "accelerate":
        raise typer.BadParameter(f"--launcher {launcher}: choose accelerate")
    import torch

    gpus = torch.cuda.device_count() if cluster is None else int(cluster.gpus_per_worker)
    if processes is None and not gpus:
        raise typer.BadParameter("--launcher accelerate finds no GPU to count; say how many with --processes")
    return processes or gpus


def _numbers(option: str, given: str) -> list[int]:
    """Whole numbers above 0, parted by commas."""
    try:
        numbers = [int(part) for part in given.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise typer.BadParameter(f"{option} {given}: give numbers of 1 or more, parted by commas, such as 1,8,32")
    return list(dict.fromkeys(numbers))


def _layers(given: str | None) -> list[int] | None:
    """The numbers of `0,2,4`, or wrong usage."""
    if given is None:
        return None
    try:
        return [int(number) for number in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--student-layers {given}: write numbers as in 0,2,4") from error


def _data_flags(
    dataset: str | None,
    text_columns: str | None,
    label_column: str | None,
    train_limit: int | None,
    search_size: int | None,
    seed: int | None,
) -> dict[str, Any]:
    """The fields of a `DataSpec` that flags were given for."""
    flags = {
        "dataset": None if dataset is None else _absolute(dataset),
        "text_columns": None if text_columns is None else tuple(name.strip() for name in text_columns.split(",")),
        "label_column": label_column,
        "train_limit": train_limit,
        "search_size": search_size,
        "seed": seed,
    }
    return {name: value for name, value in flags.items() if value is not None}


def _workload_flags(
    task: str | None, metric: str | None, max_length: int | None, stride: int | None, windows: bool | None
) -> dict[str, Any]:
    """The fields of a `Workload` that flags were given for, but for model and data."""
    if stride is not None and windows is False:
        raise typer.BadParameter("give --stride or --no-windows, not both")
    flags = {"task": task, "metric": metric, "max_length": max_length, "stride": stride}
    given = {name: value for name, value in flags.items() if value is not None}
    return {**given, "stride": None} if windows is False else given


def _workload(model: str, data_flags: dict[str, Any], workload_flags: dict[str, Any]) -> "Workload":
    """What the flags name, or wrong usage."""
    from hpo.workload import Workload
    from model.data import DataSpec

    try:
        return Workload(model=_absolute(model), data=DataSpec(**data_flags), **workload_flags)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _demo(root: Path) -> tuple[str, str]:
    """Folders of the embedded task's encoder and dataset, made where they are missing."""
    from model.demo import build_demo

    err.print(
        "No --model and no --dataset: using the embedded demo task, generated reviews and a tiny untrained BERT.",
        markup=False,
    )
    demo = build_demo(root / "demo")
    return str(demo.model), str(demo.dataset)


def _trained_by(
    finetune_study: str, url: str, data_flags: dict[str, Any], workload_flags: dict[str, Any]
) -> "tuple[optuna.Study, Workload]":
    """A finetune study, and its workload with what the flags change."""
    from hpo.storage import find_study, open_storage
    from hpo.workload import Workload

    with _database(url):
        found = find_study(open_storage(url, create=False), finetune_study, start_with="hpo tune")
        attributes = found.user_attrs
    recorded = attributes.get("workload")
    if recorded is None:
        raise HpoError(f"Study {finetune_study!r} does not say what it used; pass --checkpoint and --dataset.")
    if attributes.get("kind") not in TRAINING_KINDS:
        raise HpoError(
            f"Study {finetune_study!r} searches lengths and trains no model; pass one of `hpo tune` as "
            "--finetune-study, or --checkpoint and --dataset."
        )
    workload = Workload.from_attribute(recorded)
    try:
        data = dataclasses.replace(workload.data, **data_flags)
        return found, dataclasses.replace(workload, data=data, **workload_flags)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check_choice(max_drop: float | None, budget: float | None, max_latency_ms: float | None = None) -> None:
    wishes = {"--max-drop": max_drop, "--budget": budget, "--max-latency-ms": max_latency_ms}
    given = [name for name, wish in wishes.items() if wish is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}")
    if budget == 0:
        raise typer.BadParameter("--budget is a share of full length above 0")
    if max_latency_ms == 0:
        raise typer.BadParameter("--max-latency-ms is a time above 0")


def _check_images(images: list[Path]) -> None:
    if not images:
        return
    from hpo.plot import image_kind

    for image in images:
        try:
            image_kind(image)
        except ValueError as error:
            raise typer.BadParameter(f"--image: {error}") from error


def _choose(
    front: "Front", max_drop: float | None, budget: float | None, max_latency_ms: float | None = None
) -> "FrontPoint | None":
    from hpo.front import choose

    if max_drop is None and budget is None and max_latency_ms is None:
        return None
    return choose(front, max_drop=max_drop, budget=budget, max_latency_ms=max_latency_ms)


def _show_front(front: "Front", chosen: "FrontPoint | None", as_json: bool) -> None:
    from hpo.front import front_table, front_to_json

    if as_json:
        _print_json(front_to_json(front, chosen))
        return
    out.print(front_table(front, chosen, out.width))


def _draw(front: "Front", history: list[float], chosen: "FrontPoint | None", page: Path, images: list[Path]) -> None:
    from hpo.plot import draw_front, write_image, write_page

    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(front, history, page, chosen)
    err.print(f"Page: {page}", markup=False, soft_wrap=True)
    figure = draw_front(front, chosen)
    for image in images:
        if not write_image(figure, image):
            break
        err.print(f"Image: {image}", markup=False, soft_wrap=True)


def _finished_count(study: "optuna.Study") -> int:
    from hpo.storage import finished_trials

    return len(finished_trials(study))


def _study_name(name_or_path: str) -> str:
    """A study's name in the database, also from the file that declares it."""
    if not name_or_path.endswith(".toml"):
        return name_or_path
    from studies.loader import load

    return load(_name_or_file(name_or_path)).name


def _name_or_file(study: str) -> str:
    """What a user calls a study; only a file has a home in front of it."""
    return str(user_path(study)) if study.startswith("~") else study


def _absolute(place: str) -> str:
    """Local paths are recorded absolute, so that a later command may run elsewhere."""
    from hpo.workload import with_paths

    return with_paths(place, lambda path: str(user_path(path).resolve()) if user_path(path).exists() else path)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
