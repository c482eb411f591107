"""What the examples start is what the command line takes, and what texts say to install is ours to install."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from hpo.cli import app

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RUNNER = ROOT / "model" / "onnx_runner.py"
"""Runs where nothing of ours is installed, so that it says itself what it imports."""


def told_by(file: Path) -> list[str]:
    """What a file says to install by pip."""
    return re.findall(r"pip install ([^`\"\n]+)", file.read_text())


def options_of(command: list[str]) -> dict[str, object]:
    """What the command line makes of a command, without running it; wrong usage is an error."""
    program, name, *arguments = command
    assert program == "hpo"
    group = typer.main.get_command(app)
    return group.commands[name].make_context(name, arguments).params


def kubernetes_command() -> list[str]:
    (job,) = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container["command"]


def slurm_command() -> list[str]:
    (line,) = [line for line in (EXAMPLES / "slurm.sh").read_text().splitlines() if line.startswith("srun ")]
    return shlex.split(line)[1:]


@pytest.mark.parametrize("command", [kubernetes_command(), slurm_command()], ids=["kubernetes", "slurm"])
def test_example_starts_a_worker(command):
    assert options_of(command)["trials"] == 5000


def test_kubernetes_job_is_whole():
    (job,) = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["restartPolicy"] in ("OnFailure", "Never")
    assert {entry["name"] for entry in container["env"]} >= {"HPO_STORAGE"}
    assert "postgresql" not in str(job)  # the URL, with its password, is the secret's


def test_slurm_script_is_bash():
    subprocess.run(["bash", "-n", EXAMPLES / "slurm.sh"], check=True)


def test_texts_say_to_install_this_checkout_or_packages_that_an_extra_names():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {re.split("[>=<]", needed)[0] for extra in extras.values() for needed in extra}
    sources = {file for folder in ("hpo", "model", "studies") for file in (ROOT / folder).glob("*.py")} - {RUNNER}
    told = [wanted for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *sources) for wanted in told_by(file)]
    checkouts = [wanted for wanted in told if wanted.startswith("-e ")]
    for wanted in checkouts:
        extra = re.fullmatch(r"-e (?:\.|'\.\[(\w+)\]')", wanted)
        assert extra is not None
        assert extra[1] is None or extra[1] in extras
    for wanted in set(told) - set(checkouts):
        assert set(shlex.split(wanted)) <= packages
    assert {"-e .", "-e '.[ray]'", "ray"} <= set(told)


def test_every_package_that_is_installed_tells_type_checkers_that_it_is_typed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in setuptools["package-data"]["*"]
    for package in setuptools["packages"]:
        assert (ROOT / package / "py.typed").is_file()


def test_the_runner_says_to_install_all_that_it_imports():
    imports = [node for node in ast.walk(ast.parse(RUNNER.read_text())) if isinstance(node, ast.Import)]
    packages = {alias.name for node in imports for alias in node.names} - sys.stdlib_module_names
    (told,) = told_by(RUNNER)
    assert set(shlex.split(told)) == packages
