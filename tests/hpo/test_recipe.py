"""Distillation as a study: stages that outlive the process, and teachers that do not suit."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import hpo.recipe
from hpo.errors import HpoError
from hpo.recipe import Recipe
from hpo.storage import open_storage
from hpo.workload import Workload, load_workload
from model.data import DataSpec
from studies.loader import STAGES, load_finetune

DISTILL = """
kind = "distill"
name = "distill"
[space.logits]
learning_rate = { low = 1e-3, high = 3e-3 }
[fixed.intermediate]
epochs = 1
learning_rate = 1e-3
precision = "fp32"
[fixed.logits]
epochs = 1
embedding_weight = 0.0
hidden_weight = 0.0
attention_weight = 0.0
logit_weight = 1.0
label_weight = 0.5
precision = "fp32"
[fixed.lengthdrop]
plain_epochs = 0
epochs = 1
learning_rate = 1e-3
precision = "fp32"
"""
KILLED = """
import os, signal, sys
import hpo.cli, hpo.recipe

stage, marker = sys.argv.pop(1), sys.argv.pop(1)
def reported(function):
    def run(*arguments, on_progress, **named):
        def on_step(step, steps):
            on_progress(step, steps)
            done = [name for name in hpo.recipe.STAGES if list(runs.glob(f"*/trial-0.after-{name}"))]
            if step == 3 and hpo.recipe.STAGES[len(done)] == stage and not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, on_progress=on_step, **named)
    return run
import pathlib
runs = pathlib.Path(os.environ["HPO_RUNS"])
hpo.recipe.distil, hpo.recipe.train = reported(hpo.recipe.distil), reported(hpo.recipe.train)
hpo.cli.main()
"""


@pytest.fixture
def distill_file(tmp_path):
    path = tmp_path / "distill.toml"
    path.write_text(DISTILL)
    return str(path)


@pytest.fixture
def arguments(distill_file, tiny_encoder, tiny_dataset):
    data = ("--dataset", str(tiny_dataset), "--search-size", "60")
    return ["--study", distill_file, "--teacher", str(tiny_encoder), "--student-layers", "0,2", *data]


def environment(folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    places = {"HPO_STORAGE": f"sqlite:///{folder}/hpo.db", "HPO_RUNS": str(folder / "runs")}
    return {**os.environ, **places, "HF_DATASETS_CACHE": str(folder / "cache")}


def weights_of(folder: Path) -> dict[str, object]:
    (model,) = folder.glob("runs/distill-*/trial-*/model.safetensors")
    return load_file(model)


def test_a_distilled_student_is_searched_like_any_model(command, arguments, tmp_path):
    lengths = tmp_path / "lengths.toml"
    lengths.write_text('kind = "lengths"\nname = "lengths"\n[retention]\nlow = 0.4\nhigh = 1.0\nstep = 0.1\n')
    code, out, err = command("distill", *arguments, "--json")
    assert code == 0, err
    best = json.loads(out)["best"]
    assert best["parameters"].keys() == {"logits.learning_rate"}
    config = json.loads((Path(best["checkpoint"]) / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    runs = Path(best["checkpoint"]).parent
    assert sorted(folder.name for folder in runs.glob("trial-*")) == ["trial-0"], (
        "stages go when their trial is through"
    )
    code, out, err = command(
        "search-lengths", "--study", str(lengths), "--finetune-study", "distill", "--trials", "12", "--json"
    )
    assert code == 0, err
    assert len(json.loads(out)["full"]["shares"]) == 2
    assert command("distill", *arguments)[0] == 0
    assert len(optuna.load_study(study_name="distill", storage=os.environ["HPO_STORAGE"]).trials) == 1


def test_a_run_killed_in_every_stage_ends_as_an_unbroken_one(arguments, tmp_path):
    whole = tmp_path / "whole"
    unbroken = subprocess.run(
        [sys.executable, "-m", "hpo.cli", "distill", *arguments], env=environment(whole), capture_output=True, text=True
    )
    assert unbroken.returncode == 0, unbroken.stderr
    broken = tmp_path / "broken"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    for stage in STAGES:
        marker = str(tmp_path / f"killed-in-{stage}")
        run = [sys.executable, str(script), stage, marker, "distill", *arguments]
        killed = subprocess.run(run, env=environment(broken), capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    ended = subprocess.run(
        [sys.executable, "-m", "hpo.cli", "distill", *arguments],
        env=environment(broken),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    study = optuna.load_study(study_name="distill", storage=open_storage(environment(broken)["HPO_STORAGE"]))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]  # it went on where it was
    there, expected = weights_of(broken), weights_of(whole)
    assert there.keys() == expected.keys()
    assert all(bool((there[name] == expected[name]).all()) for name in expected)
    assert (
        study.best_value
        == optuna.load_study(study_name="distill", storage=open_storage(environment(whole)["HPO_STORAGE"])).best_value
    )


def another_vocabulary(tiny_encoder, folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(folder)
    config = BertConfig.from_pretrained(tiny_encoder)
    config.vocab_size += 1
    BertForSequenceClassification(config).save_pretrained(folder)


def knowing(*names):
    """Makes a teacher whose labels are called so."""

    def make(tiny_encoder, folder):
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
        config = BertConfig.from_pretrained(tiny_encoder, id2label=dict(enumerate(names)))
        BertForSequenceClassification(config).save_pretrained(folder)

    return make


def more_labels(tiny_encoder, folder):
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    config = BertConfig.from_pretrained(tiny_encoder, num_labels=5)
    BertForSequenceClassification(config).save_pretrained(folder)


def no_head(tiny_encoder, folder):
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    BertForSequenceClassification.from_pretrained(tiny_encoder).bert.save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (another_vocabulary, "different vocabularies of 25 and 24 tokens.*'unheard'"),
        (more_labels, "classifies into 5 classes, not 2"),
        (no_head, "has no head for classification.*fine-tuned"),
    ],
)
def test_a_teacher_that_does_not_suit_is_refused(
    command, distill_file, tiny_encoder, tiny_dataset, tmp_path, make, message
):
    make(tiny_encoder, tmp_path / "teacher")
    data = ("--dataset", str(tiny_dataset), "--search-size", "60", "--student", str(tiny_encoder))
    code, _, err = command("distill", "--study", distill_file, "--teacher", str(tmp_path / "teacher"), *data)
    assert code == 1
    assert re.search(message, " ".join(err.split())), err


@pytest.fixture
def recipe_of(distill_file, tiny_encoder, tmp_path):
    """The recipe of a dataset and a teacher whose labels are called so."""

    def make(ours, theirs):
        rows = [f"good film {row},{label}" for row, label in enumerate([*ours] * 20)]
        (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]))
        workload = Workload(model=str(tiny_encoder), data=DataSpec(dataset=f"{tmp_path}/train.csv"))
        knowing(*theirs)(tiny_encoder, tmp_path / "teacher")
        loaded = load_workload(workload, tiny_encoder)
        return Recipe.of(load_finetune(distill_file), loaded, str(tmp_path / "teacher"), None)

    return make


def test_a_teachers_labels_may_differ_in_case(recipe_of, caplog):
    assert recipe_of(("neg", "pos"), ("NEG", "POS")).teacher is not None
    assert "labels" not in caplog.text


def test_numbers_of_a_dataset_are_taken_for_a_teachers_labels_in_their_order_with_a_warning(recipe_of, caplog):
    assert recipe_of((0, 1), ("negative", "positive")).teacher is not None
    assert "takes 0, 1 for the teacher's labels negative, positive" in " ".join(caplog.text.split())


@pytest.mark.parametrize("ours", [("neg", "pos"), (1, 2)])
@pytest.mark.parametrize("theirs", [("cat", "dog"), ("POS", "NEG")])
def test_a_teacher_of_other_labels_is_refused(recipe_of, ours, theirs):
    known, found = ", ".join(theirs), ", ".join(map(str, ours))
    with pytest.raises(HpoError, match=f"knows the labels {known}, the dataset has {found}"):
        recipe_of(ours, theirs)


def test_a_teacher_no_better_than_chance_is_warned_of(command, arguments):
    _, _, err = command("distill", *arguments)
    assert "no better than chance" in " ".join(err.split())


@pytest.mark.parametrize("layers", ["0,7", "2,0", "0,0", "a"])
def test_impossible_students_are_refused(command, arguments, layers):
    arguments[arguments.index("0,2")] = layers
    code, _, err = command("distill", *arguments)
    assert code in (1, 2)
    assert "--student-layers" in err


def test_a_layer_map_that_cannot_be_is_refused_and_leaves_no_study(command, arguments, distill_file):
    for layers, wrong in (("[1, 9]", "9"), ("[1]", "2 layers"), ("[0, 1]", "0"), ("3", "3")):
        Path(distill_file).write_text(DISTILL.replace("[fixed.logits]", f"layer_map = {layers}\n[fixed.logits]"))
        code, _, err = command("distill", *arguments)
        assert code == 1
        assert "layer_map" in err
        assert wrong in " ".join(err.split())
        assert "Traceback" not in err
    Path(distill_file).write_text(DISTILL)
    code, _, err = command("distill", *arguments)
    assert code == 0, err


def test_a_disk_without_room_for_the_teachers_outputs_is_named_with_a_way_out(command, arguments, monkeypatch):
    monkeypatch.setattr("model.distill.shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    code, _, err = command("distill", *arguments, "--study", "distill")
    assert code == 1
    assert re.search("outputs take .* has 0.0 MiB free; free some space, or choose another folder with --runs", err)
    assert "cache_" not in err.replace("teacher-cache", "")


def test_a_distillation_without_a_teacher_is_refused(command, distill_file, tiny_encoder, tiny_dataset):
    code, _, err = command(
        "tune", "--study", distill_file, "--model", str(tiny_encoder), "--dataset", str(tiny_dataset)
    )
    assert code == 1
    assert "--teacher" in err


@pytest.mark.parametrize(
    ("error", "exit_code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)]
)
def test_an_interrupted_run_goes_on_after_the_last_stage_it_kept(command, arguments, monkeypatch, error, exit_code):
    real, calls = hpo.recipe.distil, []

    def interrupted_in_the_second(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            raise error
        return real(*given, **named)

    monkeypatch.setattr(hpo.recipe, "distil", interrupted_in_the_second)
    code, _, err = command("distill", *arguments)
    assert code == exit_code
    assert "run the same command again" in " ".join(err.split()).lower()
    assert command("distill", *arguments)[0] == 0
    assert len(calls) == 3, "the first stage is not run again"
    study = optuna.load_study(study_name="distill", storage=os.environ["HPO_STORAGE"])
    assert study.best_trial.user_attrs["steps"] == len(STAGES) * math.ceil(180 / 32)


def test_a_distillation_that_goes_on_computes_in_what_it_began_with(command, arguments, distill_file, monkeypatch):
    Path(distill_file).write_text(DISTILL.replace('precision = "fp32"\n', ""))
    monkeypatch.setattr("hpo.tune.computes_in_bf16", lambda: True)
    taken, gains = [], True

    def recorded(training):
        def run(*given, **named):
            nonlocal gains
            gains = not gains
            taken.append(given[-1].precision)
            if len(taken) == 2:
                raise KeyboardInterrupt
            return training(*given, **named)

        return run

    monkeypatch.setattr("model.training.gains_from_bf16", lambda: gains)
    for name in ("distil", "train"):
        monkeypatch.setattr(hpo.recipe, name, recorded(getattr(hpo.recipe, name)))
    assert command("distill", *arguments)[0] == 130
    assert command("distill", *arguments)[0] == 0
    assert taken == ["bf16"] * 4
