"""What this machine computes with, and what it says when its memory is full."""

import ctypes
import functools
import math
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""How glibc's `mallopt` calls them."""
PRODUCT_SHAPE = (512, 384, 1536)
"""Rows, inputs and outputs of the product that is timed to choose a type."""
SETTLED_ROUNDS, MOST_ROUNDS, QUICKER = 16, 100, 0.99
"""Rounds without a lower time after which the least times stand, rounds in all, and the share that counts as lower."""
WORTH_ROUNDING = 1.2
"""How much quicker than float32 a product in bf16 must be for its rounding to be worth while."""
FREED_BYTES_KEPT, BYTES_FROM_HEAP = 512 * 2**20, 32 * 2**20
"""What of freed memory stays the process's, and how large an array may be that is made of it."""
WORTH_GIVING_BACK, SURPLUS_BYTES = 2**30, 256 * 2**20
"""Growth of a process after which gaps between arrays are given back, and its growth from one time to the next."""
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def processor_name() -> str:
    """What this machine's processor calls itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def compute_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_in_bf16() -> bool:
    """Whether the GPU, or without one this processor, has bf16 matrix products."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


@functools.cache
def gains_from_bf16() -> bool:
    """Whether products are quicker in bf16 than in float32 here, which not all processors that have both can say.

    On 2 cores of EPYCs with AVX-512 bf16 takes half of float32's time, on those of a Xeon whose AMX is switched off
    nearly twice as much. So a processor's products are timed, once in a process; a GPU that has them gains.
    """
    if torch.cuda.is_available() or not computes_in_bf16():
        return computes_in_bf16()
    exact_s, rounded_s = _product_seconds((torch.float32, torch.bfloat16))
    return exact_s > WORTH_ROUNDING * rounded_s


def _product_seconds(types: tuple[torch.dtype, ...]) -> list[float]:
    """The least time of a feed-forward half's product in each type, taking turns, after an untimed round.

    Other work may keep the cores for a while, so rounds are added until the least times have settled.
    """
    rows, inputs, outputs = PRODUCT_SHAPE
    factors = [(torch.ones(rows, inputs, dtype=kind), torch.ones(outputs, inputs, dtype=kind)) for kind in types]
    least_s, settled = [math.inf] * len(types), 0
    for done in range(1 + MOST_ROUNDS):
        seconds = []
        for hidden_RD, weight_FD in factors:
            start = time.perf_counter()
            F.linear(hidden_RD, weight_FD)
            seconds.append(time.perf_counter() - start)
        if done == 0:
            continue
        fell = any(new_s < QUICKER * old_s for new_s, old_s in zip(seconds, least_s, strict=True))
        least_s = list(map(min, seconds, least_s))
        settled = 0 if fell else settled + 1
        if settled == SETTLED_ROUNDS:
            break
    return least_s


@functools.cache
def keep_freed_memory() -> None:
    """Have this process keep memory that arrays gave back, for the arrays to come.

    glibc gives it to the system and asks for it anew, which fills it with zeros page by page: 14 MB of them for each
    layer of a network that computes 2,000 tokens. Where the environment says how memory is to be had, or there is no
    glibc, nothing changes.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, FREED_BYTES_KEPT)
    mallopt(M_MMAP_THRESHOLD, BYTES_FROM_HEAP)


class SurplusMemory:
    """Gives freed memory back that lies between what is in use, in a process that has grown much.

    Arrays of ever other sizes leave gaps that later ones do not fit into, and glibc gives back only what lies behind
    the last of them. What is given back and needed again has to be filled with zeros first, so nothing happens before
    the process has grown by `WORTH_GIVING_BACK`, and then after it has grown by `SURPLUS_BYTES` again. Where there is
    no glibc, or no /proc, nothing happens at all.
    """

    def __init__(self) -> None:
        self._least_bytes = self._most_bytes = _resident_bytes() + WORTH_GIVING_BACK

    def give_back(self) -> None:
        """To be called now and then; costs a few microseconds where there is nothing to do."""
        if _resident_bytes() <= self._most_bytes:
            return
        with suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
        self._most_bytes = max(self._least_bytes, _resident_bytes() + SURPLUS_BYTES)


def _resident_bytes() -> int:
    """Memory that this process has now; 0 where nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the machine has no memory left for what was tried."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
