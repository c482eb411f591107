"""Who works on a trial, and whether it still does.

Optuna records heartbeats within `study.optimize` alone. Here a worker asks and tells, so a thread of its own records
them, one statement for all trials it has running, however long an evaluation takes.

A worker of another machine counts as dead once somebody alive has seen its heartbeat stand still for a while. That is
measured by the clock of who looks, and starts anew whenever the database did not answer: no clocks are compared, and
nobody is taken for dead because the database was away. A process of the same machine is looked up instead.
"""

import hashlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from hpo.bulk import Stale, beat, read_heartbeats
from hpo.outage import DATABASE_ERRORS
from hpo.storage import Storage

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0
"""Time between two heartbeats."""
GRACE_S = 60.0
"""How long a heartbeat stands still until its worker counts as dead; longer than the database may take to answer."""

ENDING_S = 5.0
"""How long a heartbeat that is being recorded is waited for at the end."""

_alive: set[str] = set()
"""Names of this process's workers that are at work."""


@dataclass(frozen=True)
class WorkerName:
    """What a worker is called in the database: enough to find its process again.

    Attributes:
        host: The machine's name, for people.
        machine: Equal for processes that see each other's ids; empty where that cannot be told.
        pid: Process id.
        started: When the process started, in the kernel's ticks; tells it from a later one of the same id.
        token: Tells workers of one process apart.
    """

    host: str
    machine: str
    pid: int
    started: str
    token: str

    @classmethod
    def new(cls) -> Self:
        """A worker of this process."""
        pid = os.getpid()
        started = _process(pid)
        machine = "" if started is None else _machine()
        return cls(socket.gethostname(), machine, pid, started or "", uuid.uuid4().hex[:8])

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`."""
        host, machine, pid, started, token = text.split("/")
        return cls(host, machine, int(pid), started, token)

    def __str__(self) -> str:
        return "/".join((self.host, self.machine, str(self.pid), self.started, self.token))

    def is_dead(self) -> bool:
        """Whether its process is known to have ended; False where that cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return False
        if _process(self.pid) != self.started:
            return True
        return self.pid == os.getpid() and str(self) not in _alive


def is_dead(worker: str) -> bool:
    """`WorkerName.is_dead` for a name that stands in a database, whoever wrote it."""
    try:
        return WorkerName.parse(worker).is_dead()
    except ValueError:
        return False


class Heartbeats:
    """Records the heartbeats of one worker, and watches those of others, in a thread; use it as a context.

    Attributes:
        storage: The database; the thread has a connection of its own.
        worker: The worker's name.
        interval_s: Time between two heartbeats.
        grace_s: How long another's heartbeat must stand still.
    """

    def __init__(self, storage: Storage, interval_s: float = INTERVAL_S, grace_s: float = GRACE_S) -> None:
        self.storage = storage
        self.worker = str(WorkerName.new())
        self.interval_s = interval_s
        self.grace_s = grace_s
        self._own: frozenset[int] = frozenset()
        self._others: dict[int, str] = {}
        self._seen: dict[int, tuple[datetime, float]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def __enter__(self) -> Self:
        _alive.add(self.worker)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(ENDING_S)  # what it waits for may hang
        _alive.discard(self.worker)

    def watch(self, own: Collection[int], others: dict[int, str]) -> None:
        """Say which trials this worker has running, and which others do.

        Args:
            own: Ids of its trials.
            others: The worker of each trial that another has running.
        """
        with self._lock:
            self._own, self._others = frozenset(own), dict(others)
            self._seen = {trial_id: seen for trial_id, seen in self._seen.items() if trial_id in others}

    def stale(self) -> list[Stale]:
        """Trials whose worker's heartbeat has stood still for longer than it may."""
        now = time.monotonic()
        with self._lock:
            return [
                Stale(trial_id=trial_id, worker=self._others[trial_id], heartbeat=heartbeat)
                for trial_id, (heartbeat, since) in self._seen.items()
                if now - since > self.grace_s
            ]

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self.interval_s):
            try:
                self._beat()
            except DATABASE_ERRORS as error:
                logger.debug("No heartbeat was recorded: %s", error)
                with self._lock:
                    self._seen.clear()
            if time.monotonic() - last > max(2 * self.interval_s, self.grace_s / 2):
                with self._lock:
                    self._seen.clear()  # this process was stopped, or the database slow: others may have been too
            last = time.monotonic()

    def _beat(self) -> None:
        with self._lock:
            own, others = self._own, frozenset(self._others)
        if own:
            beat(self.storage, own)
        if not others:
            return
        heartbeats, now = read_heartbeats(self.storage, others), time.monotonic()
        with self._lock:
            for trial_id, heartbeat in heartbeats.items():
                if trial_id in self._others and self._seen.get(trial_id, (None, 0.0))[0] != heartbeat:
                    self._seen[trial_id] = (heartbeat, now)


def _process(pid: int) -> str | None:
    """When a process of this machine started; None where there is none, or one that has ended and is not yet reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """The kernel that runs this process and the processes that it can see; a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return hashlib.sha256(f"{boot}/{Path('/proc/self/ns/pid').readlink()}".encode()).hexdigest()[:12]
    except OSError:
        return ""
