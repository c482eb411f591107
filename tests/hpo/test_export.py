"""A study's front as folders, and predictions from them, from the command line."""

import codecs
import dataclasses
import io
import itertools
import json
import os
import py_compile
import random
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import optuna
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hpo.export import model_card
from hpo.front import compute_front
from hpo.predict import predict_lines
from hpo.search_lengths import search_lengths
from hpo.storage import open_storage
from hpo.workload import Workload
from model import LengthAdaptiveModel, LengthAdaptivePipeline
from model.data import DataSpec
from model.encoder import CheckpointError, labels_of, read_config
from model.front_file import FRONT_FILE, ExportError, NothingFits, ServedFront
from model.length_config import LengthConfig
from model.remote_code import MODULE
from model.rows import DataError

OUTSIDE = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification as Auto, AutoTokenizer

assert "model" not in sys.modules and "hpo" not in sys.modules
folder, texts = sys.argv[1], json.loads(sys.argv[2])
batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
plain, chosen = Auto.from_pretrained(folder), Auto.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = [network.eval()(**batch).logits.tolist() for network in (plain, chosen)]
assert not any(name == "model" or name.startswith(("model.", "hpo")) for name in sys.modules)
print(json.dumps([*logits, type(plain).__name__]))
"""
TEXTS = ["the film was good", "a poor plot", "music", "the story is very fine and the actor was not great"]


@pytest.fixture(scope="module")
def encoder(tiny_encoder, tmp_path_factory):
    """The tiny encoder with weights large enough for attention to differ clearly between tokens."""
    folder = tmp_path_factory.mktemp("large")
    network = AutoModelForSequenceClassification.from_pretrained(tiny_encoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            weight.normal_(mean=mean, std=0.4 if weight.dim() > 1 else 0.1, generator=generator)
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def searched(search_once, encoder):
    return search_once(encoder)


@pytest.fixture
def study(searched, copied):
    return copied(searched)


@pytest.fixture
def served(command, study, made_once, tmp_path, monkeypatch):
    """An export for transformers of a middling budget, which the test may change."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    folder = tmp_path / "served"

    def export() -> None:
        code, _, err = command("export", "--budget", "0.8", "--out", str(folder))
        assert code == 0, err

    made_once(folder, export)
    return folder


def shortest(folder):
    return ServedFront.read(folder).points[0]


def test_the_folder_loads_with_its_whole_front(served, encoder, study):
    model = LengthAdaptiveModel.from_pretrained(served)
    by_number = {trial.number: trial for trial in study.best_trials}
    assert {point.trial for point in model.front.points} <= by_number.keys()
    for point in model.front.points:
        assert list(point.length_config.shares) == by_number[point.trial].user_attrs["shares"]
        assert [point.metric, point.macs] == by_number[point.trial].values
    assert model.front.chosen.relative_macs <= 0.8
    assert model.front.text_columns == ("text",)
    assert model.fingerprint() == LengthAdaptiveModel.from_pretrained(encoder).fingerprint()
    assert LengthAdaptiveModel.from_pretrained(encoder).front is None


def test_transformers_alone_runs_full_length_or_the_chosen_point(served, encoder, tmp_path):
    environment = {
        "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PATH": "", "HOME": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, str(served), json.dumps(TEXTS)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, chosen, name = json.loads(done.stdout)
    assert name == "BertForSequenceClassification"
    model = LengthAdaptiveModel.from_pretrained(encoder).eval()
    batch = AutoTokenizer.from_pretrained(encoder)(TEXTS, padding=True, return_tensors="pt")
    config = ServedFront.read(served).chosen.length_config
    with torch.no_grad():
        for logits, length_config in ((plain, None), (chosen, config)):
            expected = model(**batch, length_config=length_config).logits
            torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    assert not np.allclose(plain, chosen, atol=1e-3), "dropping tokens should matter"


def test_a_model_trained_on_from_an_export_is_no_export(served, tmp_path):
    LengthAdaptiveModel.from_pretrained(served).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "auto_map" not in config
    assert "length_config" not in config


def test_the_card_tells_the_front_and_no_path_of_this_machine(served, study, tmp_path, storage):
    card = (served / "README.md").read_text()
    front = ServedFront.read(served)
    for point in (*front.points, front.full):
        assert f"{point.metric:.4f} | {point.report_metric:.4f}" in card.replace("**", "")
    assert f"**{front.chosen.trial}**" in card
    assert "the same model at full length without padding" in card
    assert str(tmp_path) not in card
    assert str(Path(study.user_attrs["workload"]["data"]["dataset"])) not in card


@pytest.mark.parametrize(
    ("dataset", "shown"),
    [
        ("train=/data/a.csv,validation=/data/b.csv", "train=a.csv,validation=b.csv"),
        ("/data/day=1", "day=1"),
        ("nyu-mll/glue:sst2", "nyu-mll/glue:sst2"),
    ],
)
def test_the_card_names_the_whole_dataset_without_its_place(served, study, storage, dataset, shown):
    front = compute_front(study, storage)
    front = dataclasses.replace(front, workload={"data": {"dataset": dataset}})
    assert f"The dataset is {shown}, from" in model_card(front, front.full, ServedFront.read(served), {})


def test_predictions_are_those_of_the_model_at_every_budget(served, encoder):
    pipeline = LengthAdaptivePipeline(served, tokens_per_batch=24)
    model, tokenizer = LengthAdaptiveModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    generator = random.Random(0)
    texts = [
        " ".join(generator.choices(("good", "film", "poor", "the"), k=generator.randint(1, 20))) for _ in range(40)
    ]
    for point in pipeline.front.points:
        said = pipeline(texts, budget=point.relative_macs)
        for text, one in zip(texts, said, strict=True):
            with torch.no_grad():
                logits = model(**tokenizer(text, return_tensors="pt"), length_config=point.length_config).logits[0]
            label = int(logits.argmax())
            assert one == {"label": str(label), "score": pytest.approx(float(logits.softmax(0)[label]), abs=1e-5)}


def test_threads_may_share_a_pipeline(served):
    pipeline = LengthAdaptivePipeline(served)
    budgets = [point.relative_macs for point in pipeline.front.points]
    expected = {budget: pipeline(TEXTS, budget=budget) for budget in budgets}
    wrong, start = [], threading.Barrier(4)

    def work(number):
        start.wait()
        for budget in itertools.islice(itertools.cycle(budgets[number % len(budgets) :] + budgets), 15):
            try:
                if pipeline(TEXTS, budget=budget) != expected[budget]:
                    wrong.append(budget)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_wishes_and_inputs_that_cannot_be_served_are_told(served):
    pipeline = LengthAdaptivePipeline(served)
    with pytest.raises(NothingFits, match="budget of 0"):
        pipeline(TEXTS, budget=0.001)
    for given, message in [
        ("a text", "into a list"),
        (None, "into a list"),
        (5, "into a list"),
        ([3], "Input 0 .* no text"),
        ([TEXTS[0], {"sentence": "x"}], "Input 1 .*no 'text', only 'sentence'"),
        ([{}], r"Input 0 \(the first is 0\) is an empty object\."),
        ([("a", "b")], "2 texts, but 1 are needed"),
        ([" "], "no text in 'text'"),
    ]:
        with pytest.raises(DataError, match=message):
            pipeline(given)
    assert pipeline([]) == []


def test_predict_answers_line_by_line_and_goes_on_over_bad_ones(command, served, monkeypatch):
    lines = [b'{"text": "a good film"}', b"{", b'"music"', b'{"other": 1}', b"\xff", b"", b'{"text": "bad"}']
    lines += [b'{"text": "cut \\ud83d"}', b"9" * 5000]
    lines[0] = codecs.BOM_UTF8 + lines[0]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
    code, out, err = command("predict", str(served), "--max-drop", "1")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert ["error" in answer for answer in answers] == [False, True, False, True, True, True, False, True, True]
    pipeline = LengthAdaptivePipeline(served)
    assert [answers[0], answers[2], answers[6]] == pipeline(["a good film", "music", "bad"], max_drop=1)
    for number, reason in ((2, "JSON"), (4, "'text'"), (5, "UTF-8"), (6, "empty"), (8, "surrogate"), (9, "too long")):
        assert f"Line {number} " in err
        assert reason in err
    assert "6 of 9 lines could not be read" in err


def test_predict_in_bf16_stays_close(command, served, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(map(json.dumps, TEXTS)).encode())))
    code, out, err = command("predict", str(served), "--bf16", "--budget", "1")
    assert code == 0, err
    exact = LengthAdaptivePipeline(served)(TEXTS, budget=1)
    for line, one in zip(out.splitlines(), exact, strict=True):
        assert json.loads(line)["score"] == pytest.approx(one["score"], abs=0.1)


@pytest.mark.parametrize("gains", [True, False])
def test_who_asks_for_bf16_is_told_where_it_makes_nothing_faster(command, served, monkeypatch, gains):
    monkeypatch.setattr("model.pipeline.gains_from_bf16", lambda: gains)
    monkeypatch.setattr("model.pipeline.compute_device", lambda: "cpu")
    for flags in ([], ["--bf16"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a good film"}')))
        code, _, err = command("predict", str(served), *flags)
        assert code == 0, err
        assert ("no quicker in bf16" in err) == (bool(flags) and not gains)


def test_predict_holds_a_part_of_the_lines_at_a_time(served):
    pipeline, read = LengthAdaptivePipeline(served), itertools.count()
    lines = (json.dumps({"text": f"film {next(read)}"}).encode() for _ in itertools.count())
    answers = predict_lines(pipeline, lines, pipeline.front.chosen, lines_at_once=8)
    numbers = [next(answers).number for _ in range(20)]
    assert numbers == list(range(1, 21))
    assert next(read) == 24


def test_predict_stops_quietly_where_nobody_reads_on(served):
    program = f"{sys.executable} -m hpo.cli predict {served} < in.jsonl | head -1"
    folder = served.parent
    (folder / "in.jsonl").write_text('{"text": "a film"}\n' * 3000)
    done = subprocess.run(program, shell=True, capture_output=True, text=True, cwd=folder, check=False, env=here())
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


@pytest.mark.parametrize(("redirection", "name"), [("<&-", "input"), ("< /dev/null >&-", "output")])
def test_predict_without_its_input_or_output_says_so(redirection, name):
    program = f"{sys.executable} -m hpo.cli predict served {redirection}"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, check=False, env=here())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"hpo: Standard {name} is closed; run `hpo predict served < in.jsonl > out.jsonl`.\n"


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full"])
def test_predict_answers_every_line_where_nobody_can_be_told_of_bad_ones(served, redirection):
    (served.parent / "some.jsonl").write_text('{\n{"text": "a film"}\n[]\n{"text": "another"}\n')
    program = f"{sys.executable} -m hpo.cli predict {served} < some.jsonl {redirection}"
    done = subprocess.run(program, shell=True, capture_output=True, cwd=served.parent, check=False, env=here())
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in answer for answer in answers] == [True, False, True, False]
    assert done.returncode == 1


def here():
    """This process's environment, with the checkout on the path."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_an_export_is_replaced_and_other_folders_are_left_alone(command, served, tmp_path):
    assert not any(entry.is_dir() for entry in served.iterdir())
    compiled = Path(py_compile.compile(str(served / f"{MODULE}.py"), doraise=True)).parent
    assert compiled.parent == served
    code, _, err = command("export", "--max-drop", "0", "--out", str(served))
    assert code == 0, err
    assert not compiled.exists()
    compiled.mkdir()
    (compiled / "mine.txt").write_text("keep")
    assert command("export", "--max-drop", "0", "--out", str(served))[0] == 1
    assert (compiled / "mine.txt").read_text() == "keep"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    code, _, err = command("export", "--max-drop", "0", "--out", str(mine))
    assert code == 1
    assert "no export wrote" in err
    assert [entry.name for entry in mine.iterdir()] == ["notes.txt"]
    assert not list(tmp_path.glob(".*partial"))


def test_what_a_user_put_beside_an_export_is_not_replaced_with_it(command, served):
    assert set(ServedFront.read(served).files) == {entry.name for entry in served.iterdir()}
    (served / "serve.py").write_text("mine")
    code, _, err = command("export", "--max-drop", "0", "--out", str(served))
    assert code == 1
    assert "holds serve.py, which no export wrote" in " ".join(err.split())
    (served / "serve.py").unlink()
    assert command("export", "--max-drop", "0", "--out", str(served))[0] == 0


def test_a_home_that_the_shell_did_not_read_is_where_an_export_goes(command, served, monkeypatch):
    monkeypatch.setenv("HOME", str(served.parent))
    code, _, err = command("export", "--max-drop", "0", "--out=~/another")
    assert code == 0, err
    assert (served.parent / "another" / "config.json").is_file()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a good film"}')))
    code, _, err = command("predict", "~/another")
    assert code == 0, err


def test_an_export_through_a_link_takes_the_place_of_what_it_leads_to(command, study, tmp_path):
    (tmp_path / "current").symlink_to("first version")
    for _ in range(2):
        code, out, err = command("export", "--budget", "0.8", "--out", str(tmp_path / "current"))
        assert code == 0, err
    assert (tmp_path / "current").readlink() == Path("first version")
    assert ServedFront.read(tmp_path / "first version").points
    (tmp_path / "current").rename(tmp_path / "the current")
    _, out, _ = command("export", "--budget", "0.8", "--out", str(tmp_path / "the current"))
    assert shlex.split(out.rpartition("Next: ")[2])[:3] == ["hpo", "predict", str(tmp_path / "the current")]


def test_a_graph_of_a_fixed_length_is_quantised_with_texts_cut_to_it(command, study, tmp_path):
    pytest.importorskip("onnxscript")
    flags = ["--budget", "0.8", "--format", "onnx", "--fixed-length", "8", "--int8", "static"]
    code, _, err = command("export", *flags, "--out", str(tmp_path / "graph"))
    assert code == 0, err
    assert LengthAdaptivePipeline(tmp_path / "graph")([TEXTS[3]]) == LengthAdaptivePipeline(tmp_path / "graph")(
        [" ".join(TEXTS[3].split()[:6])]
    )


@pytest.mark.parametrize("on_front", [True, False])
def test_what_a_fixed_length_loses_is_measured_and_told(
    command, study, encoder, tiny_dataset, tmp_path, on_front, monkeypatch
):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("hpo.export.NOTABLE", -1.0)
    best = {trial.number for trial in study.best_trials}
    trial = next(trial for trial in study.get_trials() if (trial.number in best) == on_front)
    rows = datasets.Dataset.from_parquet(str(tiny_dataset / "validation.parquet")).to_dict()
    whole = right_of(encoder, rows, trial.user_attrs["shares"])
    flags = ["--trial", str(trial.number), "--format", "onnx", "--fixed-length", "8", "--int8", "dynamic"]
    code, out, err = command("export", *flags, "--out", str(tmp_path / "graph"), "--json")
    assert code == 0, err
    told = json.loads(out)
    cut = right_of(encoder, rows, trial.user_attrs["shares"], max_length=8)
    assert told["uncut"] == pytest.approx(whole, abs=0.02)
    assert told["float32"] == pytest.approx(cut, abs=0.02)
    assert f"after 8 tokens lose {told['uncut'] - told['float32']:.4f} of accuracy" in err
    front = ServedFront.read(tmp_path / "graph")
    assert (front.max_length, front.scored_length, front.graph.report_metric) == (8, 32, told["int8"])
    card = " ".join((tmp_path / "graph" / "README.md").read_text().split())
    assert "The table's figures are of texts cut after 32 tokens" in card
    assert f"is {told['float32']:.4f} instead of {told['uncut']:.4f}" in card
    assert f"in float32, of texts cut alike, it was {told['float32']:.4f}" in card


def right_of(folder, rows, shares, max_length=32):
    """The share of texts that a model labels right under a length config, one text at a time."""
    model, tokenizer = LengthAdaptiveModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    config, right = LengthConfig.from_shares(shares), 0
    for text, label in zip(rows["text"], rows["label"], strict=True):
        batch = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            right += int(model(**batch, length_config=config).logits.argmax()) == label
    return right / len(rows["label"])


def test_a_fixed_length_that_cuts_no_text_is_not_measured(command, study, tmp_path):
    pytest.importorskip("onnxscript")
    flags = ["--budget", "0.8", "--format", "onnx", "--fixed-length", "24", "--json"]
    code, out, err = command("export", *flags, "--out", str(tmp_path / "graph"))
    assert (code, err) == (0, "")
    assert (json.loads(out)["uncut"], json.loads(out)["float32"]) == (None, None)
    card = " ".join((tmp_path / "graph" / "README.md").read_text().split())
    assert "cut after 32 tokens; this graph takes 24, and no text of the report split is longer" in card


def test_a_graph_that_knows_no_windows_refuses_what_its_fixed_length_has_no_room_for(
    command, lengths, tiny_encoder, storage, tmp_path
):
    pytest.importorskip("onnxscript")
    answers = {"text": ["film"], "answer_start": [4]}
    row = {"question": "was the film good", "context": "the film was very good", "answers": answers}
    data, model = tmp_path / "train.jsonl", tmp_path / "model"
    data.write_text("\n".join(json.dumps({**row, "context": f"{row['context']} {number}"}) for number in range(40)))
    LengthAdaptiveModel.from_pretrained(tiny_encoder, "question-answering").save_pretrained(model)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(model)
    workload = Workload(model=str(model), data=DataSpec(dataset=str(data)), task="question-answering", stride=None)
    search_lengths(lengths, workload, model, trials=5, storage=storage, runs=tmp_path / "runs")
    flags = ["--budget", "1", "--format", "onnx", "--fixed-length", "8", "--json"]
    code, out, err = command("export", *flags, "--out", str(tmp_path / "graph"))
    assert code == 0, err
    assert json.loads(out)["uncut"] is None
    assert "this graph takes 8, and refuses longer texts" in (tmp_path / "graph" / "README.md").read_text()


def test_the_current_folder_is_not_replaced(command, study, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = command("export", "--budget", "0.8", "--out", ".")
    assert code == 1
    assert "choose a new one in it" in " ".join(err.split())


def test_a_front_of_other_layers_is_refused(served):
    path = served / FRONT_FILE
    front = json.loads(path.read_text())
    for point in (front["full"], front["chosen"], *front["points"]):
        point["shares"].pop()
    path.write_text(json.dumps(front))
    with pytest.raises(CheckpointError, match="of another; export the model again"):
        LengthAdaptivePipeline(served)


def test_labels_are_named_by_their_ids_in_whatever_order_a_config_has_them(served):
    config = json.loads((served / "config.json").read_text())
    numbers = sorted(map(str, range(12)))
    config["id2label"] = {number: f"class {number}" for number in numbers}
    config["label2id"] = {f"class {number}": int(number) for number in numbers}
    (served / "config.json").write_text(json.dumps(config))
    assert labels_of(read_config(served)) == tuple(f"class {number}" for number in range(12))


@pytest.mark.parametrize(
    ("own", "served"),
    [
        (("LABEL_0", "LABEL_1"), ("bad", "good")),
        (("no", "yes"), ("no", "yes")),
    ],
)
def test_classes_that_the_checkpoint_does_not_name_are_called_as_the_dataset_calls_them(
    command, study, encoder, tmp_path, own, served
):
    assert study.user_attrs["label_names"] == ["0", "1"]
    study.set_user_attr("label_names", ["bad", "good"])
    network = AutoModelForSequenceClassification.from_pretrained(encoder)
    network.config.id2label = dict(enumerate(own))
    network.save_pretrained(tmp_path / "checkpoint")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "checkpoint")
    study.set_user_attr("checkpoint", str(tmp_path / "checkpoint"))
    code, _, err = command("export", "--budget", "0.8", "--out", str(tmp_path / "served"))
    assert code == 0, err
    assert ServedFront.read(tmp_path / "served").label_names == served
    assert labels_of(read_config(tmp_path / "served")) == served


def test_labels_whose_ids_are_left_out_are_refused_where_they_would_name_predictions(served):
    model = LengthAdaptiveModel.from_pretrained(served)
    model.network.config.id2label = {1: "no", 2: "yes"}
    with pytest.raises(CheckpointError, match=r"numbered \[1, 2\]; number them from 0"):
        _ = model.label_names


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((), 2, "one of --max-drop, --budget, --max-latency-ms and --trial"),
        (("--budget", "0.01"), 1, "budget of 0"),
        (("--trial", "999"), 1, "no completed trial 999"),
        (("--budget", "0.9", "--format", "tflite"), 2, "hf or onnx"),
        (("--budget", "0.9", "--int8", "dynamic"), 2, "--format onnx"),
        (("--budget", "0.9", "--opset", "0"), 2, "--format onnx"),
        (("--budget", "0.9", "--format", "onnx", "--fixed-length", "600"), 1, "choose 4 to 32"),
        (("--budget", "0.9", "--format", "onnx", "--opset", "9"), 1, "opset 9; choose 18"),
        (("--budget", "0.9", "--study", "other"), 1, "No study 'other'"),
    ],
)
def test_bad_exports_are_told_in_a_sentence(command, study, tmp_path, flags, code, message):
    got, out, err = command("export", "--out", str(tmp_path / "served"), *flags)
    assert (got, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "served").exists()


def test_a_study_without_a_front_or_with_another_checkpoint_is_refused(
    command, lengths, study, storage, encoder, tmp_path
):
    optuna.create_study(study_name="empty", storage=open_storage(storage), directions=["maximize", "minimize"])
    code, _, err = command("export", "--study", "empty", "--budget", "0.9", "--out", str(tmp_path / "x"))
    assert code == 1
    assert "no completed trial yet" in err
    study.set_user_attr("checkpoint", str(tmp_path / "gone" / "trial-1"))
    code, _, err = command("export", "--budget", "0.9", "--out", str(tmp_path / "x"))
    assert code == 1
    assert f"neither at {tmp_path}/gone/trial-1 nor at {tmp_path}/runs/gone/trial-1" in " ".join(err.split())
    assert "pass its runs folder as --runs" in " ".join(err.split())


def test_folders_of_other_kinds_and_versions_are_refused(command, served, encoder, tmp_path):
    code, _, err = command("predict", str(encoder))
    assert code == 1
    assert "is no export" in err
    path = served / FRONT_FILE
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    for load in (LengthAdaptivePipeline, LengthAdaptiveModel.from_pretrained):
        with pytest.raises(ExportError, match="format 7"):
            load(served)
    path.write_text(path.read_text().replace('"format": 7', '"format": 1'))
    (served / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="damaged"):
        LengthAdaptivePipeline(served)


def test_a_graph_is_quantised_measured_and_run_with_and_without_us(command, study, encoder, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    code, out, err = command(
        "export", "--budget", "0.8", "--format", "onnx", "--int8", "static", "--out", str(tmp_path / "graph"), "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    chosen = ServedFront.read(tmp_path / "graph").chosen
    trial = next(trial for trial in study.best_trials if trial.number == chosen.trial)
    assert told["float32"] == pytest.approx(study.user_attrs[f"report_metric:{trial.number}"], abs=0.02)
    assert 0 <= told["int8"] <= 1
    assert f"{told['int8']:.4f}" in (tmp_path / "graph" / "README.md").read_text()
    pipeline = LengthAdaptivePipeline(tmp_path / "graph")
    said = pipeline(TEXTS)
    alone = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "graph" / "runner.py")],
        input="\n".join(map(json.dumps, TEXTS)), capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    for line, expected in zip(alone.stdout.splitlines(), said, strict=True):
        assert json.loads(line) == {"label": expected["label"], "score": pytest.approx(expected["score"], abs=0.05)}
    alone = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "graph" / "runner.py")],
        input=f'{json.dumps({"text": TEXTS[0], "id": 3})}\n{{"id": 4}}\n["a", "b"]\n"', capture_output=True, text=True,
        cwd=tmp_path, check=False,
    )  # fmt: skip
    first, *wrong = map(json.loads, alone.stdout.splitlines())
    assert first == {"label": said[0]["label"], "score": pytest.approx(said[0]["score"], abs=0.05)}
    for line, problem in zip(
        wrong, ("no 'text', only 'id'", "not what the model reads: text", "Unterminated"), strict=True
    ):
        assert problem in line["error"]
    with pytest.raises(NothingFits, match="smallest there is"):
        pipeline(TEXTS, budget=0.01)
    with pytest.raises(ExportError, match=r"int8-static, which cannot run in bf16; leave"):
        LengthAdaptivePipeline(tmp_path / "graph", precision="bf16")

    class TooOld:
        def __init__(self, *_, **__):
            raise RuntimeError("ONNX opset 18 is under development")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", TooOld)
        with pytest.raises(ExportError, match=r"opset 18.*newer onnxruntime"):
            LengthAdaptivePipeline(tmp_path / "graph")
