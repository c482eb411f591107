import errno
import os
import stat
from pathlib import Path

import optuna
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hpo.errors import HpoError
from hpo.runs import DEFAULT_RUNS, FOLDER_ATTRIBUTE, StudyRuns, new_folder_name, runs_folder


def make_study(folder=None, name="finetune"):
    study = optuna.create_study(study_name=name)
    study.set_user_attr(FOLDER_ATTRIBUTE, new_folder_name(name) if folder is None else folder)
    return study


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def runs(root):
    return StudyRuns(root, make_study())


def writer(content, names=("weights", "config")):
    def write(folder):
        for name in names:
            (folder / name).write_text(content)

    return write


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def visible(runs):
    return sorted(path.name for path in runs.folder.iterdir())


# Where files lie


def test_a_given_folder_comes_before_the_environment_and_the_default(monkeypatch):
    assert runs_folder(None) == Path(DEFAULT_RUNS)
    monkeypatch.setenv("HPO_RUNS", "from-environment")
    assert runs_folder(None) == Path("from-environment")
    assert runs_folder(Path("given")) == Path("given")


def test_a_home_that_the_shell_did_not_read_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HPO_RUNS", "~/runs")
    assert runs_folder(None) == tmp_path / "runs"
    assert runs_folder(Path("~/runs")) == tmp_path / "runs"
    assert runs_folder(Path("~nobody-has-this-name/runs")) == Path("~nobody-has-this-name/runs")


def test_studies_of_one_name_have_different_folders(root):
    one, two = (StudyRuns(root, make_study()) for _ in range(2))
    assert one.folder != two.folder
    assert one.folder.parent == two.folder.parent == root
    assert one.folder.name.startswith("finetune-")


def test_a_study_finds_its_folder_again(root):
    study = make_study()
    assert StudyRuns(root, study).folder == StudyRuns(root, study).folder


@pytest.mark.parametrize("folder", ["..", ".", "", "../elsewhere", "/etc", "a/b", ".hidden", "a\n", 3])
def test_a_recorded_folder_that_might_lie_elsewhere_is_refused(root, folder):
    with pytest.raises(HpoError, match="names no folder for its files"):
        StudyRuns(root, make_study(folder))


def test_a_study_without_a_recorded_folder_is_refused(root):
    with pytest.raises(HpoError, match="Study 'other' names no folder for its files"):
        StudyRuns(root, optuna.create_study(study_name="other"))


# The folder


@pytest.mark.parametrize("blocked", ["runs folder", "study folder"])
def test_a_runs_folder_that_cannot_be_written_is_explained(root, runs, blocked):
    if blocked == "study folder":
        root.mkdir()
    (root if blocked == "runs folder" else runs.folder).write_text("a file in its place")
    with pytest.raises(HpoError, match="choose another folder with --runs") as caught:
        runs.prepare()
    assert str(runs.folder) in str(caught.value)
    with pytest.raises(HpoError, match=r"Cannot write the checkpoint .* with --runs"):
        runs.write_checkpoint("trial-0", writer("new"))


# Checkpoints


def test_a_checkpoint_is_recorded_relative_to_the_runs_folder(root, runs):
    place = runs.write_checkpoint("trial-3", writer("new"))
    assert place == f"{runs.folder.name}/trial-3"
    assert contents(root / place) == {"weights": "new", "config": "new"}
    assert visible(runs) == ["trial-3"]


def test_a_checkpoint_is_not_in_its_place_before_it_is_whole(runs):
    seen = []

    def look_while_writing(folder):
        (folder / "weights").write_text("half")
        seen.append((runs.folder / "trial-3").exists())

    runs.write_checkpoint("trial-3", look_while_writing)
    assert seen == [False]


def test_a_newer_checkpoint_replaces_the_whole_older_one(runs):
    runs.write_checkpoint("trial-3", writer("old", names=("weights", "config", "extra")))
    seen = []

    def write(folder):
        writer("new")(folder)
        seen.append(contents(runs.folder / "trial-3"))

    runs.write_checkpoint("trial-3", write)
    assert seen == [{"weights": "old", "config": "old", "extra": "old"}]
    assert contents(runs.folder / "trial-3") == {"weights": "new", "config": "new"}


def test_what_a_killed_writer_left_does_not_get_into_the_next_checkpoint(runs):
    leftover = runs.folder / ".trial-3.partial"
    leftover.mkdir(parents=True)
    (leftover / "stale").write_text("stale")
    runs.write_checkpoint("trial-3", writer("new"))
    assert contents(runs.folder / "trial-3") == {"weights": "new", "config": "new"}
    assert visible(runs) == ["trial-3"]


def test_an_older_checkpoint_is_there_until_the_newer_one_is(runs, monkeypatch):
    runs.write_checkpoint("trial-3", writer("old"))
    rename = Path.rename

    def interrupted(path, target):
        if path.name == ".trial-3.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.write_checkpoint("trial-3", writer("new"))
    assert contents(runs.folder / "trial-3") == {"weights": "old", "config": "old"}
    assert visible(runs) == ["trial-3"]


def test_a_checkpoint_that_a_killed_writer_had_moved_aside_is_put_back(runs):
    runs.write_checkpoint("trial-3", writer("old"))
    (runs.folder / "trial-3").rename(runs.folder / ".trial-3.former")

    def write(folder):
        raise ValueError("our own bug")

    with pytest.raises(ValueError, match="our own bug"):
        runs.write_checkpoint("trial-3", write)
    assert contents(runs.folder / "trial-3") == {"weights": "old", "config": "old"}
    assert visible(runs) == ["trial-3"]


@pytest.mark.parametrize("error", [ValueError("our own bug"), KeyboardInterrupt()])
def test_a_writer_that_raises_leaves_nothing_and_the_older_checkpoint_whole(runs, error):
    runs.write_checkpoint("trial-3", writer("old"))

    def write(folder):
        (folder / "weights").write_text("half")
        raise error

    for name in ("trial-3", "trial-4"):
        with pytest.raises(type(error)) as caught:
            runs.write_checkpoint(name, write)
        assert caught.value is error
    assert visible(runs) == ["trial-3"]
    assert contents(runs.folder / "trial-3") == {"weights": "old", "config": "old"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # what tokenizers raises
    ],
)
def test_a_full_disk_is_explained_and_leaves_the_older_checkpoint_whole(runs, error):
    runs.write_checkpoint("trial-3", writer("old"))

    def write(folder):
        (folder / "weights").write_text("half")
        raise error

    with pytest.raises(HpoError) as caught:
        runs.write_checkpoint("trial-3", write)
    sentence = str(caught.value)
    assert "No space left on device" in sentence
    assert str(runs.folder / "trial-3") in sentence
    assert "make room or choose another folder with --runs, and run the same command again" in sentence
    assert visible(runs) == ["trial-3"]
    assert contents(runs.folder / "trial-3") == {"weights": "old", "config": "old"}


def test_safetensors_reports_a_file_it_cannot_write_as_expected_here(runs):
    def write(folder):
        save_file({"weight": torch.zeros(2)}, folder / "no such folder" / "model.safetensors")

    with pytest.raises(HpoError, match=r"os error"):
        runs.write_checkpoint("trial-3", write)


def test_weights_survive_the_rename(root, runs):
    weights = torch.arange(5.0)
    place = runs.write_checkpoint("trial-3", lambda folder: save_file({"weight": weights}, folder / "w.safetensors"))
    assert torch.equal(load_file(root / place / "w.safetensors")["weight"], weights)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_of_a_folder_are_for_whom_the_umask_says(root, runs, umask):
    def write(folder):
        (folder / "parts").mkdir()
        save_file({"weight": torch.zeros(2)}, folder / "parts" / "model.safetensors")
        writer("new")(folder)

    before = os.umask(umask)
    try:
        place = root / runs.write_checkpoint("trial-3", write)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in place.rglob("*") if file.is_file()}
    assert modes == dict.fromkeys(("model.safetensors", "weights", "config"), 0o666 & ~umask)


# Removing what was beaten


@pytest.fixture
def filled(runs):
    for number in range(3):
        runs.write_checkpoint(f"trial-{number}", writer(str(number)))
    (runs.folder / ".trial-7.partial").mkdir()
    (runs.folder / ".trial-7.partial" / "weights").write_text("half")
    (runs.folder / "front.html").write_text("<html>")
    return runs


def test_beaten_checkpoints_and_leftovers_go_and_files_stay(filled):
    filled.keep_only(f"{filled.folder.name}/trial-1")
    assert visible(filled) == ["front.html", "trial-1"]
    assert contents(filled.folder / "trial-1") == {"weights": "1", "config": "1"}


def test_without_a_best_trial_every_checkpoint_goes(filled):
    filled.keep_only(None)
    assert visible(filled) == ["front.html"]


def test_what_other_workers_have_under_way_stays(filled):
    for name in ("trial-2.after-logits", "trial-3", ".trial-4.partial", "trial-41"):
        (filled.folder / name).mkdir()
    filled.keep_only(f"{filled.folder.name}/trial-1", begun={"trial-2"}, newer=4)
    assert visible(filled) == [
        ".trial-4.partial",
        ".trial-7.partial",
        "front.html",
        "trial-1",
        "trial-2",
        "trial-2.after-logits",
        "trial-41",
    ]


def test_folders_that_a_user_made_stay(filled):
    own = [".trial-0", "my-export", "trial-0-backup", "trial-0.after-lunch", "trial-0.partial", "trial-x"]
    for name in own:
        (filled.folder / name).mkdir()
    for name in ("trial-0.after-intermediate", ".trial-0.after-logits.partial", ".trial-2.former"):
        (filled.folder / name).mkdir()
    filled.keep_only(f"{filled.folder.name}/trial-1")
    assert visible(filled) == sorted(["front.html", "trial-1", *own])


def test_other_studies_checkpoints_stay(root, filled):
    other = StudyRuns(root, make_study())
    other.write_checkpoint("trial-0", writer("other"))
    filled.keep_only(None)
    assert visible(other) == ["trial-0"]


def test_there_is_nothing_to_remove_where_nothing_was_written(runs):
    runs.keep_only(None)
    assert not runs.folder.exists()
