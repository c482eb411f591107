"""The command line: the whole path, exit codes, one-line errors, JSON on stdout and nothing else."""

import json
import os
import random
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

import hpo.cli
import hpo.search_lengths
import hpo.tune
from hpo.storage import open_storage

TINY_FINETUNE = """
kind = "finetune"
name = "finetune"
[space]
learning_rate = { low = 1e-3, high = 1e-2, log = true }
[fixed]
plain_epochs = 1
epochs = 1
precision = "fp32"
[[first]]
learning_rate = 5e-3
"""

TINY_LENGTHS = """
kind = "lengths"
name = "lengths"
[retention]
low = 0.4
high = 1.0
step = 0.1
[sampler]
population_size = 10
"""


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Study files that take no time."""
    (tmp_path / "finetune.toml").write_text(TINY_FINETUNE)
    (tmp_path / "lengths.toml").write_text(TINY_LENGTHS)
    return {"finetune": str(tmp_path / "finetune.toml"), "lengths": str(tmp_path / "lengths.toml")}


@pytest.fixture
def tuned(command, files, tiny_encoder, tiny_dataset, made_once, tmp_path):
    """A finetune study of one trial, which the test may change, and the command."""

    def tune() -> None:
        model = ("--model", str(tiny_encoder), "--dataset", str(tiny_dataset), "--search-size", "60")
        code, _, err = command("tune", "--study", files["finetune"], *model, "--trials", "1")
        assert code == 0, err

    made_once(tmp_path, tune)
    return command


def test_tune_search_and_pareto_lead_to_a_chosen_point(tuned, files, tmp_path):
    code, out, err = tuned("search-lengths", "--study", files["lengths"], "--trials", "20", "--json")
    assert code == 0, err
    searched = json.loads(out)
    assert (searched["study"], searched["trials"]) == ("lengths", 20)
    assert searched["chosen"] is None
    assert all(point["report_metric"] is not None for point in searched["points"])

    code, out, err = tuned("pareto", "--max-drop", "1", "--json")
    document = json.loads(out)
    assert document["chosen"]["macs"] == min(point["macs"] for point in document["points"])
    assert {key: document[key] for key in searched if key != "chosen"} == {
        key: searched[key] for key in searched if key != "chosen"
    }
    page = next((tmp_path / "runs").glob("lengths-*/front.html"))
    assert "plotly" in page.read_text(encoding="utf-8")

    code, out, _ = tuned("pareto", "--budget", "0.99")
    assert code == 0
    assert "%" in out


@pytest.mark.usefixtures("browser")
def test_search_draws_its_front(tuned, files, tmp_path):
    code, _, err = tuned("search-lengths", "--study", files["lengths"], "--trials", "3")
    assert code == 0, err
    (folder,) = (tmp_path / "runs").glob("lengths-*")
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (folder / "front.svg").read_text().startswith("<svg")


def test_studies_lists_what_is_there(tuned, files):
    tuned("search-lengths", "--study", files["lengths"], "--trials", "3")
    code, out, _ = tuned("studies", "--json")
    listed = {entry["study"]: entry for entry in json.loads(out)["studies"]}
    assert code == 0
    assert (listed["finetune"]["kind"], listed["finetune"]["finished"]) == ("finetune", 1)
    assert (listed["lengths"]["finished"], listed["lengths"]["running"], listed["lengths"]["failed"]) == (3, 0, 0)
    assert [best["name"] for best in listed["lengths"]["best"]] == ["accuracy", "macs"]
    assert "lengths" in tuned("studies")[1]


def test_tune_json_names_the_best_checkpoint(tuned, files, tiny_encoder, tiny_dataset):
    model = ("--model", str(tiny_encoder), "--dataset", str(tiny_dataset), "--search-size", "60")
    code, out, _ = tuned("tune", "--study", files["finetune"], *model, "--trials", "1", "--json")
    document = json.loads(out)
    assert code == 0
    assert (Path(document["best"]["checkpoint"]) / "model.safetensors").is_file()
    assert document["objective"]["direction"] == "maximize"


def test_a_search_whose_front_has_no_point_within_the_budget_shows_it_all_the_same(tuned, files, tmp_path):
    arguments = ("search-lengths", "--study", files["lengths"], "--trials", "8", "--budget", "0.01", "--json")
    code, out, err = tuned(*arguments)
    assert code == 1
    assert err.splitlines()[-1].startswith("hpo: No point of study 'lengths' costs 0.01 of full length or less")
    document = json.loads(out)
    assert (document["trials"], document["chosen"]) == (8, None)
    assert document["points"]
    assert len(list(tmp_path.glob("runs/lengths-*/front.html"))) == 1


def test_search_takes_a_checkpoint_and_dataset_without_any_finetune_study(command, files, tiny_encoder, tiny_dataset):
    given = ("--checkpoint", str(tiny_encoder), "--dataset", str(tiny_dataset))
    code, out, err = command("search-lengths", "--study", files["lengths"], "--trials", "4", *given, "--json")
    assert code == 0, err
    assert json.loads(out)["trials"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("tune", "--trials", "0"), 2, "--trials"),
        (("tune", "--model", "somewhere"), 2, "--dataset"),
        (("tune", "--colour", "red"), 2, "--colour"),
        (("tune", "--task", "translation", "--model", "{model}", "--dataset", "{data}"), 2, "translation"),
        (("tune", "--metric", "bleu", "--model", "{model}", "--dataset", "{data}"), 2, "bleu"),
        (("tune", "--study", "nothing"), 1, "finetune"),
        (("tune", "--study", "nowhere.toml"), 1, "nowhere.toml"),
        (("tune", "--study", "lengths", "--model", "{model}", "--dataset", "{data}"), 1, "search-lengths"),
        (("tune", "--objective", "speed", "--model", "{model}", "--dataset", "{data}"), 1, "speed"),
        (("tune", "--model", "./no/such/folder", "--dataset", "{data}"), 1, "no/such/folder"),
        (("tune", "--model", "{model}", "--dataset", "./no/such/data"), 1, "no/such/data"),
        (("tune", "--model", "{model}", "--dataset", "{data}", "--label-column", "grade"), 1, "grade"),
        (("tune", "--storage", "nonsense", "--model", "{model}", "--dataset", "{data}"), 1, "sqlite:///hpo.db"),
        (("search-lengths",), 1, "hpo tune"),
        (("search-lengths", "--max-drop", "0.1", "--budget", "0.5"), 2, "not both"),
        (("pareto",), 1, "hpo tune"),
        (("pareto", "--budget", "2"), 2, "--budget"),
        (("pareto", "--budget", "0"), 2, "--budget"),
        (("pareto", "--max-drop", "-1"), 2, "--max-drop"),
        (("pareto", "--image", "front.png", "--image", "front.bmp"), 2, "jpeg, webp"),
        (("studies", "--storage", "sqlite:////no/such/folder/hpo.db"), 1, "/no/such/folder"),
        (("dashboard", "--port", "0"), 2, "--port"),
    ],
)
def test_bad_input_is_one_sentence_with_its_exit_code(command, tiny_encoder, tiny_dataset, arguments, code, words):
    given = [argument.format(model=tiny_encoder, data=tiny_dataset) for argument in arguments]
    returned, out, err = command(*given)
    assert returned == code, err
    assert out == ""
    assert words in " ".join(err.split())
    assert "Traceback" not in err
    if code == 1:
        assert err.startswith("hpo: ")
        assert err.count("\n") == 1


def test_python_runs_the_package_as_the_command(command, tmp_path):
    environment = {**os.environ, "HPO_STORAGE": f"sqlite:///{tmp_path}/hpo.db"}
    done = subprocess.run(
        [sys.executable, "-m", "hpo", "pareto"], env=environment, capture_output=True, text=True, check=False
    )
    code, out, err = command("pareto")
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
    assert err.startswith("hpo: ")


def test_unknown_study_lists_those_that_are_there(tuned):
    code, _, err = tuned("pareto", "--study", "other")
    assert code == 1
    assert "'finetune'" in err


def test_front_of_a_study_without_trials_says_what_to_run(tuned, storage):
    optuna.create_study(storage=open_storage(storage), study_name="empty", directions=["maximize", "minimize"])
    code, out, err = tuned("pareto", "--study", "empty", "--max-drop", "0.01")
    assert (code, out) == (1, "")
    assert "search-lengths" in err


def test_finetune_study_has_no_front(tuned):
    code, _, err = tuned("pareto", "--study", "finetune")
    assert code == 1
    assert "Traceback" not in err


def test_a_lengths_study_gives_no_model_to_search(command, files, storage, workload):
    study = optuna.create_study(storage=open_storage(storage), study_name="l2", directions=["maximize", "minimize"])
    study.set_user_attr("kind", "lengths")
    study.set_user_attr("workload", workload.to_attribute())
    code, out, err = command("search-lengths", "--study", files["lengths"], "--finetune-study", "l2")
    assert (code, out) == (1, "")
    assert err.startswith("hpo: Study 'l2' searches lengths and trains no model; pass one of `hpo tune`")
    assert "--finetune-study" in err


def test_interrupt_says_how_to_go_on_and_exits_130(tuned, files, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("model.evaluate.Evaluator.predict_block", interrupt)
    code, _, err = tuned("search-lengths", "--study", files["lengths"], "--trials", "20")
    assert code == 130
    assert "0 of 20 trials" in err
    assert "same command again" in err


def test_interrupt_while_the_database_is_away_does_not_say_that_trials_are_lost(
    command, files, tiny_encoder, tiny_dataset, monkeypatch
):
    pytest.importorskip("psycopg")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hpo.workers.complete", interrupt)
    model = ("--model", str(tiny_encoder), "--dataset", str(tiny_dataset))
    nowhere = "postgresql+psycopg://postgres@127.0.0.1:1/hpo"
    code, _, err = command("tune", "--study", files["finetune"], *model, "--trials", "20", "--storage", nowhere)
    assert code == 130
    assert f"the database {nowhere} does not answer" in err
    assert "trials of study 'finetune' that are finished are safe in it" in err
    assert "0 of 20" not in err


def test_full_database_disk_is_a_sentence(tuned, files, monkeypatch):
    def full(*args, **kwargs):
        from sqlalchemy.exc import OperationalError

        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(hpo.search_lengths, "open_study", full)
    code, _, err = tuned("search-lengths", "--study", files["lengths"], "--trials", "20")
    assert code == 1
    assert "disk is full" in err
    assert "INSERT" not in err


def test_runs_folder_that_is_a_file_is_refused(tuned, files, tmp_path):
    (tmp_path / "taken").write_text("")
    code, _, err = tuned("search-lengths", "--study", files["lengths"], "--runs", str(tmp_path / "taken"))
    assert code == 1
    assert str(tmp_path / "taken") in err


@pytest.mark.parametrize("arguments", [("tune",), ("search-lengths",), ("pareto",)])
def test_a_study_file_may_lie_in_the_home_that_the_shell_did_not_read(command, monkeypatch, tmp_path, arguments):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_storage(f"sqlite:///{tmp_path}/hpo.db")
    code, _, err = command(*arguments, "--study=~/absent.toml", "--storage", f"sqlite:///{tmp_path}/hpo.db")
    assert code == 1
    assert f"no study file {tmp_path}/absent.toml" in err


def test_password_of_the_storage_is_in_no_output(command, tiny_encoder, tiny_dataset):
    given = ("--model", str(tiny_encoder), "--dataset", str(tiny_dataset))
    for url in ("postgresql+psycopg://u:hidden-s3cret@127.0.0.1:1/x", "nonsense://u:hidden-s3cret@h/x"):
        code, out, err = command("tune", "--storage", url, *given)
        assert code == 1
        assert "s3cret" not in out + err


def test_second_process_joins_the_study(tuned, files, storage, tmp_path, start_process):
    environment = {**os.environ, "HPO_STORAGE": storage, "HPO_RUNS": str(tmp_path / "runs")}
    arguments = ["search-lengths", "--study", files["lengths"], "--trials", "60"]
    other = start_process([sys.executable, "-m", "hpo.cli", *arguments], env=environment)
    code, _, err = tuned(*arguments)
    assert other.wait(120) == 0
    assert code == 0, err
    study = optuna.load_study(study_name="lengths", storage=open_storage(storage))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 60
    reused = [trial for trial in study.trials if "reused_from" in trial.user_attrs]
    assert len({trial.system_attrs["hpo:key"] for trial in study.trials}) == 60 - len(reused)


def test_search_killed_at_random_moments_ends_with_exactly_its_trials(tuned, files, storage, tmp_path, start_process):
    arguments = ["search-lengths", "--study", files["lengths"], "--trials", "150"]
    environment = {**os.environ, "HPO_STORAGE": storage, "HPO_RUNS": str(tmp_path / "runs")}
    generator = random.Random(3)
    database = Path(storage.removeprefix("sqlite:///"))

    def finished() -> dict[int, list[float]]:
        study = optuna.load_study(study_name="lengths", storage=open_storage(storage))
        return {t.number: t.values for t in study.trials if t.state == TrialState.COMPLETE}

    told_before: dict[int, list[float]] = {}
    for _ in range(2):
        process = start_process([sys.executable, "-m", "hpo.cli", *arguments], env=environment, stderr=subprocess.PIPE)
        _wait_for_new_trial(database, process, after=len(told_before))
        time.sleep(generator.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        told = finished()
        assert told.items() >= told_before.items()
        told_before = told
    code, _, err = tuned(*arguments)
    assert code == 0, err
    told = finished()
    assert len(told) == 150
    assert told.items() >= told_before.items()
    study = optuna.load_study(study_name="lengths", storage=open_storage(storage))
    assert not [trial for trial in study.trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)]


def _wait_for_new_trial(database: Path, process: subprocess.Popen, after: int) -> None:
    deadline = time.monotonic() + 120
    query = (
        "SELECT COUNT(*) FROM trials JOIN studies USING (study_id) WHERE study_name = 'lengths' AND state = 'COMPLETE'"
    )
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.stderr.read().decode() if process.stderr else "ended early")
        with sqlite3.connect(database) as connection:
            if connection.execute(query).fetchone()[0] > after:
                return
        time.sleep(0.02)
    raise AssertionError("no trial was finished in two minutes")


@pytest.mark.parametrize("pressed", [signal.SIGINT, signal.SIGTERM])
def test_real_ctrl_c_exits_130_and_leaves_no_running_trial(tuned, files, storage, tmp_path, start_process, pressed):
    environment = {**os.environ, "HPO_STORAGE": storage, "HPO_RUNS": str(tmp_path / "runs")}
    arguments = ["search-lengths", "--study", files["lengths"], "--trials", "2000"]
    process = start_process(
        [sys.executable, "-m", "hpo.cli", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
    )
    _wait_for_new_trial(Path(storage.removeprefix("sqlite:///")), process, after=0)
    process.send_signal(pressed)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Interrupted: " in err
    assert b"Traceback" not in err
    study = optuna.load_study(study_name="lengths", storage=open_storage(storage))
    assert not [trial for trial in study.trials if trial.state == TrialState.RUNNING]


@pytest.mark.parametrize(
    "arguments",
    [("tune", "--study", "finetune", "--model", "m", "--dataset", "d"), ("search-lengths", "--study", "lengths")],
)
def test_database_that_fails_while_the_best_model_is_looked_up_is_named(tuned, files, monkeypatch, storage, arguments):
    def fail(*args, **kwargs):
        raise optuna.exceptions.StorageInternalError from sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("hpo.tune.best_trial", fail)
    monkeypatch.setattr("hpo.workers.complete", lambda *_, **__: optuna.create_study())
    code, _, err = tuned(*(files.get(argument, argument) for argument in arguments))
    assert code == 1
    assert f"{storage} failed (disk I/O error)" in err


def test_database_that_fails_in_mid_run_is_named_without_its_password(tuned, files, monkeypatch, storage):
    def fail(*args, **kwargs):
        raise optuna.exceptions.StorageInternalError from sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("hpo.mirror.MirroredStudy.ask", fail)
    monkeypatch.delenv("HPO_STORAGE")
    code, _, err = tuned("search-lengths", "--study", files["lengths"], "--storage", storage)
    assert code == 1
    assert err.endswith("run the same command again to continue.\n")
    assert f"{storage} failed (database or disk is full)" in err


def test_what_is_said_to_run_next_can_be_pasted_where_paths_have_blanks(
    command, files, tiny_encoder, tiny_dataset, tmp_path
):
    places = ("--storage", f"sqlite:///{tmp_path}/my study.db", "--runs", str(tmp_path / "my runs"))
    model = ("--model", str(tiny_encoder), "--dataset", str(tiny_dataset), "--search-size", "60")
    _, out, _ = command("tune", "--study", files["finetune"], *model, "--trials", "1", *places)
    program, *arguments = shlex.split(out.rpartition("Next: ")[2])
    assert program == "hpo"
    code, _, err = command(*(argument.replace("500", "3") for argument in arguments), "--study", files["lengths"])
    assert code == 0, err
    assert "lengths" in command("studies", *places[:2])[1]


@pytest.mark.parametrize("given", ["lr=5e-5/data", "data:default"])
def test_a_dataset_is_recorded_with_its_whole_path_whatever_it_looks_like(
    command, files, tiny_encoder, tiny_dataset, tmp_path, monkeypatch, storage, given
):
    folder = tmp_path / given.partition(":")[0]
    shutil.copytree(tiny_dataset, folder)
    monkeypatch.chdir(tmp_path)
    model = ("--model", str(tiny_encoder), "--dataset", given, "--search-size", "60")
    code, _, err = command("tune", "--study", files["finetune"], *model, "--trials", "1")
    assert code == 0, err
    study = optuna.load_study(study_name="finetune", storage=open_storage(storage))
    assert study.user_attrs["workload"]["data"]["dataset"] == f"{tmp_path}/{given}"


def test_the_version_is_that_of_the_package(command):
    assert command("--version") == (0, f"hpo {version('hpo')}\n", "")


def test_names_that_an_output_cannot_spell_are_written_all_the_same(storage):
    optuna.create_study(study_name="\xe9tude", storage=open_storage(storage))
    environment = {**os.environ, "HPO_STORAGE": storage, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "hpo", "studies"], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\xe9tude" in done.stdout


def test_a_page_that_would_replace_a_folder_is_refused_by_its_name(tuned, files, tmp_path):
    tuned("search-lengths", "--study", files["lengths"], "--trials", "3")
    (tmp_path / "pages").mkdir()
    code, _, err = tuned("pareto", "--html", str(tmp_path / "pages"))
    assert code == 1
    assert f"{tmp_path}/pages: Is a directory" in err


@pytest.mark.parametrize(
    ("host", "listens", "place"),
    [("::1", "::1", "[::1]"), ("[::1]", "::1", "[::1]"), ("127.0.0.1",) * 3, ("0.0.0.0",) * 3],
)
def test_the_dashboard_says_where_it_listens_and_whom_it_lets_in(command, storage, monkeypatch, host, listens, place):
    served = []
    monkeypatch.setattr("optuna_dashboard.run_server", lambda _, host, port: served.append((host, port)))
    monkeypatch.setattr("hpo.cli._check_address", lambda *_: None)
    open_storage(storage)
    code, _, err = command("dashboard", "--host", host, "--port", "8123")
    assert code == 0, err
    assert served == [(listens, 8123)]
    assert f"on http://{place}:8123/ " in err
    assert ("Whoever reaches 0.0.0.0:8123 may read and change every study." in err) == (host == "0.0.0.0")
