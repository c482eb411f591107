"""Engines in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.apart import Engine, EngineDied, apart


class Told:
    """An engine that writes down what it runs, where, and with how many threads."""

    def __init__(self, path, seconds=0.0):
        self.path, self.seconds = path, seconds

    def __call__(self, batches):
        def run():
            time.sleep(self.seconds)
            with self.path.open("a") as file:
                file.write(f"{batches} {os.getpid()} {torch.get_num_threads()}\n")

        return run


def failing(what):
    if what == "made":
        raise ValueError("cannot be made")

    def make(_):
        def run():
            if what == "run":
                raise ValueError("cannot run")
            os.kill(os.getpid(), signal.SIGKILL)

        return run

    return make


def test_runs_are_made_there_and_say_how_long_they_took(tmp_path):
    path = tmp_path / "runs"
    with apart(Engine(Told, (path, 0.05)), "told") as make:
        first = make("first")
        assert 0.05 <= first() < 5
        first()
        make("second")()
    lines = [line.split() for line in path.read_text().splitlines()]
    assert [line[0] for line in lines] == ["first", "first", "second"]
    (pid,) = {int(line[1]) for line in lines}
    assert pid != os.getpid()
    assert {int(line[2]) for line in lines} == {torch.get_num_threads()}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(("what", "error"), [("made", ValueError), ("run", ValueError), ("dies", EngineDied)])
def test_failures_are_told_as_they_were(what, error):
    said = {"made": "^cannot be made$", "run": "^cannot run$", "dies": "^the process of it was killed by SIGKILL; "}
    with pytest.raises(error, match=said[what]), apart(Engine(failing, (what,)), "it") as make:
        make(None)()


CALLER = """
import sys, time
from pathlib import Path
from model.apart import Engine, apart
from tests.model.test_apart import Told
if __name__ == "__main__":
    with apart(Engine(Told, (Path(sys.argv[1]),)), "told") as make:
        make("here")()
        time.sleep(600)
"""


def test_nothing_is_left_of_a_caller_that_is_killed(tmp_path):
    script, path, home = tmp_path / "caller.py", tmp_path / "runs", Path(__file__).parents[2]
    script.write_text(CALLER)
    with subprocess.Popen([sys.executable, script, path], env={**os.environ, "PYTHONPATH": str(home)}) as caller:
        deadline = time.monotonic() + 60
        while not path.is_file() or not path.read_text().endswith("\n"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        caller.kill()
    pid = int(path.read_text().split()[1])
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
