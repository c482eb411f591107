"""One training in several processes of this machine, which share every batch; accelerate averages their gradients.

The caller's process takes no part in it: it starts the others, hears of their progress, has the model after each epoch
and ends them. So whatever it does between epochs, such as asking a database whether to go on, is done once.
"""

import io
import multiprocessing
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import patch_environment

from model.children import how_it_ended, live_and_die_with_caller, portable
from model.encoder import LengthAdaptiveModel
from model.hardware import compute_device
from model.training import EpochHook, ProgressHook, TrainingReport

GRACE_S = 1.0
"""How long a death is waited for after a failure: who loses a partner fails too, and may be heard first."""
RECORDED = ("token_score", "layer_drop")
"""What a training may write into the model's config."""
PATIENCE = timedelta(hours=12)
"""How long processes wait for each other: an epoch's end may take long, and who ends is noticed by the caller."""


class TrainingProcessDied(RuntimeError):
    """A process of a training was killed, or ended without a word."""


def train_in_processes(
    training: Callable[..., TrainingReport],
    processes: int,
    model: LengthAdaptiveModel,
    *arguments: Any,
    on_epoch: EpochHook | None = None,
    on_progress: ProgressHook | None = None,
    **options: Any,
) -> TrainingReport:
    """What `training(model, *arguments, **options)` does, in several processes: the same up to rounding and dropout.

    Args:
        training: `model.train.train` or `model.distill.distil`.
        processes: How many share each batch; every one has a GPU of its own where there are GPUs.
        model: The encoder; trained in place.
        arguments: Further arguments of the training, its settings last. Where their precision is "auto", this process
            decides for all.
        on_epoch: Called in this process after each epoch, when the model has that epoch's weights; what it raises ends
            the training.
        on_progress: Called in this process after each step with the steps done and the steps in all.
        options: Further options of the training.
    Raises:
        TrainingProcessDied: A process was killed.
        ValueError: There are fewer GPUs than processes.
        Exception: Whatever the training raised in one of the processes.
    """
    check_processes(processes)
    *inputs, settings = arguments
    arguments = (*inputs, settings.with_precision_settled())
    with tempfile.TemporaryDirectory(prefix="hpo-processes-") as folder:
        job = io.BytesIO()
        torch.save((training, model, arguments, options), job)
        team = _Team(
            job=job.getvalue(),
            folder=Path(folder),
            processes=processes,
            threads=max(1, torch.get_num_threads() // processes),
            stops_at_epochs=on_epoch is not None,
        )
        with _started(team) as members:
            return _follow(members, model, team.weights, on_epoch, on_progress)


def check_processes(processes: int) -> None:
    """Refuse more processes than there are GPUs, where there are any, or less than one.

    Raises:
        ValueError: With both numbers.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}; choose at least 1.")
    if 0 < torch.cuda.device_count() < processes:
        raise ValueError(f"processes={processes}, but GPUs here: {torch.cuda.device_count()}; choose one per GPU.")


@dataclass(frozen=True, kw_only=True)
class _Team:
    """What every process of a training knows.

    Attributes:
        job: The training and its arguments, as `torch.save` writes them.
        folder: Where the processes meet, and the weights are handed over.
        processes: How many there are.
        threads: Of each.
        stops_at_epochs: Whether the caller wants the model after each epoch.
    """

    job: bytes
    folder: Path
    processes: int
    threads: int
    stops_at_epochs: bool

    @property
    def weights(self) -> Path:
        return self.folder / "weights"


# What processes tell the caller, beside their report, or what they raised, at the end.


@dataclass(frozen=True)
class _Step:
    done: int
    total: int


@dataclass(frozen=True)
class _Epoch:
    done: int


_Members = dict[Connection, BaseProcess]


@contextmanager
def _started(team: _Team) -> Iterator[_Members]:
    """The team's processes by how to talk to them, the first one first; none outlives the block."""
    context = multiprocessing.get_context("spawn")
    members: _Members = {}
    try:
        for process in range(team.processes):
            ours, theirs = context.Pipe()
            member: BaseProcess = context.Process(target=_work, args=(team, process, theirs), daemon=True)
            members[ours] = member
            with patch_environment(**_environment(team, process)):
                member.start()
            theirs.close()
        yield members
    finally:
        begun = {connection: member for connection, member in members.items() if member.pid is not None}
        for member in begun.values():
            member.kill()
        for connection, member in begun.items():
            member.join()
            connection.close()


def _environment(team: _Team, process: int) -> dict[str, Any]:
    """What accelerate, and the libraries below it, are told before they are loaded."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {
        "RANK": process,
        "LOCAL_RANK": process,
        "WORLD_SIZE": team.processes,
        "LOCAL_WORLD_SIZE": team.processes,
        "OMP_NUM_THREADS": team.threads,
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "TMPDIR": team.folder,  # of a process that is ended, nothing stays
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a warning of lost speed where LayerDrop happens to leave nothing out
    }


def _follow(
    members: _Members,
    model: LengthAdaptiveModel,
    weights: Path,
    on_epoch: EpochHook | None,
    on_progress: ProgressHook | None,
) -> TrainingReport:
    """Pass on what the processes say until all are through."""
    reports: list[TrainingReport] = []
    failures: list[Exception] = []
    busy = list(members)
    while busy:
        ready = wait(busy, timeout=GRACE_S if failures else None)
        if failures and not ready:
            break
        for connection in busy.copy():
            if connection not in ready:
                continue
            try:
                message = connection.recv()
            except (EOFError, ConnectionError):
                message = TrainingProcessDied(
                    f"A process of the training {how_it_ended(members[connection])}; see that the machine has memory "
                    "enough."
                )
            match message:
                case _Step(done, total) if on_progress is not None:
                    on_progress(done, total)
                case _Epoch(done) if on_epoch is not None:
                    _take_over(weights, model)
                    on_epoch(done)
                    with suppress(ConnectionError):  # what is received next tells that the process is gone
                        connection.send("go on")
                case TrainingReport():
                    reports.append(message)
                    busy.remove(connection)
                case Exception():
                    failures.append(message)
                    busy.remove(connection)
    if failures:
        raise next((error for error in failures if isinstance(error, TrainingProcessDied)), failures[0])
    _take_over(weights, model)
    return reports[0]


def _take_over(weights: Path, model: LengthAdaptiveModel) -> None:
    """Give the caller's model what the first process has learned, on the device that training leaves a model on."""
    learned = torch.load(weights, weights_only=True, map_location="cpu")
    for name, value in learned["recorded"].items():
        setattr(model, name, value)
    model.load_state_dict(learned["model"])
    model.to(compute_device())


# In the processes


def _work(team: _Team, process: int, caller: Connection) -> None:
    """Train, and tell the caller of it."""
    live_and_die_with_caller()
    try:
        caller.send(_train(team, process, caller))
    except Exception as error:
        caller.send(portable(error))
    threading.Event().wait()  # for the caller to end all processes: one that leaves early makes others fail


def _train(team: _Team, process: int, caller: Connection) -> TrainingReport:
    _join(team, process)
    training, model, arguments, options = torch.load(io.BytesIO(team.job), weights_only=False, map_location="cpu")

    def write() -> None:
        config = model.network.config
        recorded = {name: getattr(config, name) for name in RECORDED if hasattr(config, name)}
        torch.save({"recorded": recorded, "model": model.state_dict()}, team.weights)

    def stop_at_epoch(done: int) -> None:
        write()
        caller.send(_Epoch(done))
        caller.recv()

    if process:
        others_report: TrainingReport = training(model, *arguments, **options)
        return others_report
    report: TrainingReport = training(
        model,
        *arguments,
        **options,
        on_epoch=stop_at_epoch if team.stops_at_epochs else None,
        on_progress=lambda done, total: caller.send(_Step(done, total)),
    )
    write()
    return report


def _join(team: _Team, process: int) -> None:
    """Meet the others."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if compute_device().type == "cuda":
        torch.cuda.set_device(process)
    dist.init_process_group(
        "nccl" if compute_device().type == "cuda" else "gloo",
        init_method=f"file://{team.folder / 'meeting'}",
        rank=process,
        world_size=team.processes,
        timeout=PATIENCE,
    )
