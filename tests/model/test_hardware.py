"""What is kept of freed memory and what is given back, seen from outside, and what products are computed in."""

import os
import subprocess
import sys
from itertools import chain, repeat

import pytest
import torch

from model.hardware import MALLOC_VARIABLES, _product_seconds, gains_from_bf16

WORK = """
import ctypes, resource, sys
from model.hardware import SurplusMemory, keep_freed_memory
surplus = SurplusMemory()
if "keep" in sys.argv:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
SIZE = 24 * 2**20
def rounds(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        arrays = [libc.malloc(ctypes.c_size_t(SIZE)) for _ in range(20)]
        for array in arrays:
            ctypes.memset(array, 1, SIZE)
        for array in arrays:
            libc.free(ctypes.c_void_p(array))
        if "give" in sys.argv:
            surplus.give_back()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
rounds(5)
print(rounds(5))
"""
ROUND_PAGES = 20 * 24 * 2**20 // os.sysconf("SC_PAGE_SIZE")


def page_faults(*arguments, **variables):
    """Page faults of five rounds of 20 arrays of 24 MiB, filled and freed, when as many rounds went before."""
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC_VARIABLES} | variables
    done = subprocess.run([sys.executable, "-c", WORK, *arguments], env=environment, capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_unless_the_environment_says_how_memory_is_to_be_had():
    assert page_faults("keep") < ROUND_PAGES / 10
    assert page_faults("leave") > ROUND_PAGES
    assert page_faults("keep", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > ROUND_PAGES


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_every_piece_of_work_takes_is_not_given_back():
    assert page_faults("keep", "give") < ROUND_PAGES / 10


GAPS = """
import ctypes, os, sys
from model.hardware import SurplusMemory, keep_freed_memory
keep_freed_memory()
surplus = SurplusMemory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
SIZE = 2**20
arrays = [libc.malloc(ctypes.c_size_t(SIZE)) for _ in range(1600)]
for array in arrays:
    ctypes.memset(array, 1, SIZE)
for number, array in enumerate(arrays[:-1]):
    if number % 10:  # what is left keeps the gaps from the end
        libc.free(ctypes.c_void_p(array))
if sys.argv[1] == "give":
    surplus.give_back()
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_gaps_between_arrays_are_given_back_once_there_are_many():
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC_VARIABLES}
    resident = {
        how: int(
            subprocess.run([sys.executable, "-c", GAPS, how], env=environment, capture_output=True, check=True).stdout
        )
        for how in ("give", "leave")
    }
    assert resident["leave"] - resident["give"] > 1300 * 2**20


@pytest.mark.parametrize(("bf16_s", "gains"), [(0.5, True), (0.9, False), (1.9, False)])
def test_bf16_is_worth_while_where_its_products_are_clearly_quicker(bf16_s, gains, monkeypatch):
    monkeypatch.setattr("model.hardware.computes_in_bf16", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("model.hardware._product_seconds", lambda _: [1.0, bf16_s])
    assert gains_from_bf16.__wrapped__() == gains


def test_a_processor_without_bf16_is_not_timed(monkeypatch):
    monkeypatch.setattr("model.hardware.computes_in_bf16", lambda: False)
    monkeypatch.setattr("model.hardware._product_seconds", lambda _: pytest.fail("timed"))
    assert not gains_from_bf16.__wrapped__()


def test_a_gpu_that_has_bf16_gains_from_it(monkeypatch):
    monkeypatch.setattr("model.hardware.computes_in_bf16", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("model.hardware._product_seconds", lambda _: pytest.fail("timed"))
    assert gains_from_bf16.__wrapped__()


def test_the_quicker_of_two_types_is_told_apart(monkeypatch):
    """On a clock of its own, on which other work slows the first products, the quicker type's for longer."""
    now = [0.0]
    calls = {
        torch.float64: chain([90, 7, 5, 8, 4, 6], repeat(4.01)),
        torch.float32: chain([80, 40, 35, 30, 25, 20, 12, 6, 3], repeat(2)),
    }

    def take_time(hidden, weight):
        assert hidden.dtype == weight.dtype
        now[0] += next(calls[hidden.dtype])

    monkeypatch.setattr("model.hardware.F.linear", take_time)
    monkeypatch.setattr("model.hardware.time.perf_counter", lambda: now[0])
    double_s, single_s = _product_seconds((torch.float64, torch.float32))
    assert 0 < single_s < double_s
    assert (double_s, single_s) == (4, 2)
