"""Every task from an exported folder, against the model run on one input at a time."""

import codecs
import dataclasses
import functools
import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, pipeline

from model.encoder import HEADS, MULTI_LABEL, LengthAdaptiveModel
from model.export import quantise_folder, write_onnx_folder, write_transformers_folder
from model.front_file import ExportError, Graph, ServedFront, ServedPoint
from model.length_config import LengthConfig
from model.pipeline import FIELDS, LengthAdaptivePipeline, batches
from model.rows import DataError

WORDS = ("film", "plot", "scene", "music", "actor", "story", "good", "poor", "fine", "was", "the", "##s")
CONFIG = LengthConfig.from_shares((0.7, 0.4))
SENTENCES = ("the film was good", "music", "poor plots, fine scenes: the story was the music of the actors")
NAMES = {
    "classification": ("no", "yes", "maybe"),
    "multi-label": ("praise", "blame", "doubt"),
    "token-classification": ("O", "B-x", "I-x"),
}
INPUTS = {
    "classification": [(one, other) for one in SENTENCES for other in SENTENCES],
    "multi-label": list(SENTENCES),
    "regression": list(SENTENCES),
    "question-answering": [("was the film good", SENTENCES[2] * 5), ("who", "the actor"), ("which plot", SENTENCES[0])],
    "token-classification": [sentence.split() for sentence in SENTENCES],
}


def make_tokenizer(with_types=True, **options):
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: index for index, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in specials}
    given = ["input_ids", "token_type_ids", "attention_mask"] if with_types else ["input_ids", "attention_mask"]
    settings = {"model_max_length": 32, "model_input_names": given, **names, **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def make(kind):
    """A random model of a kind, and a front whose only point drops tokens in both layers."""
    task = "classification" if kind == "multi-label" else kind
    names = NAMES.get(kind, ())
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, num_labels=len(names) or {"regression": 1}.get(kind, 2),
        problem_type=MULTI_LABEL if kind == "multi-label" else None,
    )  # fmt: skip
    network = HEADS[task].from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            weight.normal_(mean=mean, std=0.4 if weight.dim() > 1 else 0.1, generator=generator)
    point = ServedPoint(trial=3, length_config=CONFIG, metric=0.8, report_metric=0.7, macs=5e5, relative_macs=0.5)
    columns = FIELDS[kind] if kind in ("classification", "question-answering") else FIELDS[kind][:1]
    front = ServedFront(
        task=task, kind=kind, label_names=names, text_columns=columns, max_length=24,
        stride=6 if kind == "question-answering" else None, metric="f1", full=point, points=(point,), chosen=point,
    )  # fmt: skip
    return LengthAdaptiveModel(network, task).eval(), front


def alone(model, tokenizer, *texts, **options):
    """The logits of one input, its encoding, by the model itself."""
    encoding = tokenizer(*texts, truncation=True, max_length=24, return_tensors="pt", **options)
    with torch.no_grad():
        return model(**encoding, length_config=CONFIG).logits[0].double(), encoding


@pytest.mark.parametrize("kind", FIELDS)
def test_a_pipeline_says_what_the_model_says_of_each_input_alone(kind, tmp_path):
    model, front = make(kind)
    tokenizer = make_tokenizer()
    assert write_transformers_folder(tmp_path, model, tokenizer, front) < 1e-4
    pipeline = LengthAdaptivePipeline(tmp_path, tokens_per_batch=40)
    inputs = INPUTS[kind]
    as_rows = [dict(zip(front.text_columns, pipeline.read(given), strict=True)) for given in inputs]
    said = pipeline(inputs, budget=0.5)
    assert pipeline(as_rows) == said
    for given, one in zip(inputs, said, strict=True):
        match kind:
            case "classification":
                scores = alone(model, tokenizer, *given)[0].softmax(0)
                assert one == {
                    "label": NAMES[kind][scores.argmax()],
                    "score": pytest.approx(float(scores.max()), abs=1e-5),
                }
            case "multi-label":
                scores = alone(model, tokenizer, given)[0].sigmoid().tolist()
                assert one["scores"] == pytest.approx(dict(zip(NAMES[kind], scores, strict=True)), abs=1e-5)
                assert one["labels"] == [name for name, score in one["scores"].items() if score > 0.5]
            case "regression":
                assert one == {"value": pytest.approx(float(alone(model, tokenizer, given)[0]), abs=1e-5)}
            case "token-classification":
                logits, encoding = alone(model, tokenizer, given, is_split_into_words=True)
                words = encoding.word_ids()
                tags = [NAMES[kind][logits[words.index(word)].argmax()] for word in range(len(given))]
                assert one == {"tags": tags}
            case "question-answering":
                assert one["answer"] == given[1][one["start"] : one["end"]]
                assert one["answer"] == best_span(model, tokenizer, *given)
                assert 0 < one["score"] <= 1


def test_transformers_own_pipeline_says_the_value_of_a_regression(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    make("multi-label")[0].network.base_model.save_pretrained(tmp_path)
    model = LengthAdaptiveModel.from_pretrained(tmp_path, "regression").eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        full = model(**make_tokenizer()(SENTENCES[0], return_tensors="pt")).logits
    (said,) = pipeline("text-classification", model=str(tmp_path))(SENTENCES[0])
    assert said["score"] == pytest.approx(full.item(), abs=1e-5)


def best_span(model, tokenizer, question, context):
    """The likeliest span of at most 30 tokens in any window, by trying all."""
    options = {"truncation": "only_second", "stride": 6, "return_overflowing_tokens": True}
    windows = tokenizer(question, context, max_length=24, return_offsets_mapping=True, **options)
    found = []
    for window, ids in enumerate(windows["input_ids"]):
        types = torch.tensor([windows["token_type_ids"][window]])
        with torch.no_grad():
            logits = model(torch.tensor([ids]), None, types, length_config=CONFIG).logits[0]
        inside = [place for place, side in enumerate(windows.sequence_ids(window)) if side == 1]
        offsets = windows["offset_mapping"][window]
        found += [
            (float(logits[first, 0] + logits[last, 1]), context[offsets[first][0] : offsets[last][1]])
            for first in inside
            for last in inside
            if first <= last < first + 30
        ]
    return max(found)[1]


@pytest.fixture(scope="module")
def graph_of(tmp_path_factory):
    """Gives the folder with a graph of a kind."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    @functools.cache
    def write(kind):
        model, front = make(kind)
        folder = tmp_path_factory.mktemp("graph")
        tokenizer = make_tokenizer(with_types=kind != "question-answering")
        assert write_onnx_folder(folder, model, tokenizer, front) < 1e-4
        return folder

    return write


@pytest.mark.parametrize("kind", ["question-answering", "token-classification"])
def test_the_runner_beside_a_graph_says_what_the_pipeline_says(kind, graph_of):
    inputs = INPUTS[kind]
    if kind == "question-answering":
        inputs = [*inputs, ("was the film good " * 20, SENTENCES[2] * 3)]
    said = runner_of(graph_of(kind))(inputs)
    for one, other in zip(said, LengthAdaptivePipeline(graph_of(kind))(inputs), strict=True):
        near = {name: pytest.approx(value, abs=1e-5) for name, value in other.items() if name == "score"}
        assert one == {**other, **near}


def test_the_runner_cuts_texts_on_the_tokenizers_side(tmp_path):
    pytest.importorskip("onnxscript")
    model, front = make("multi-label")
    write_onnx_folder(tmp_path, model, make_tokenizer(truncation_side="left"), front)
    inputs = ["film " * 30 + SENTENCES[2], SENTENCES[2] + " film" * 30]
    said = runner_of(tmp_path)(inputs)
    for one, other in zip(said, LengthAdaptivePipeline(tmp_path)(inputs), strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert said[0]["scores"] != pytest.approx(said[1]["scores"], abs=1e-3)


REFUSED = {
    "multi-label": ["", "   ", ["", "film"], ["film", "plot"], [], {"other": "film"}, {"text": " "}, 3, None, b"film"],
    "classification": [["", ""], ["film", " "], ["film"], "film", {"text": "film"}, {"text": "film", "text_pair": ""}],
    "question-answering": [["", "the film"], ["who", " "], ["who"], {"question": "who", "context": ""}],
    "token-classification": ["film", [], ["film", ""], [" "], ["film", 3], {"tokens": "film"}, {"other": ["film"]}],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_runner_refuses_what_the_pipeline_refuses(kind, graph_of):
    runner, pipeline = runner_of(graph_of(kind)), LengthAdaptivePipeline(graph_of(kind))
    for given in REFUSED[kind]:
        with pytest.raises(DataError, match="Input 0 "):
            pipeline([given])
        with pytest.raises(ValueError, match=r"An input|The input"):
            runner([given])
    for given in ("film", {"text": "film"}, None, 5):
        with pytest.raises(DataError, match="into a list"):
            pipeline(given)
        with pytest.raises(ValueError, match="into a list"):
            runner(given)
    with pytest.raises(ValueError, match="one of the table's rows"):
        runner(pandas.DataFrame({"text": ["film"]}))


def test_the_runner_goes_on_over_lines_that_it_cannot_read(graph_of):
    runner = graph_of("question-answering") / "runner.py"
    good = json.dumps(INPUTS["question-answering"][0]).encode()
    wrong = {
        good.replace(b"film", b"\\ud83d"): "half a character",
        b"\xff": "utf-8",
        b"[" * 100_000: "nested too deeply",
        b"9" * 5000: "limit",
        b"": "Expecting value",
        b"{": "Expecting property name",
        b"{}": "An input is an empty object.",
    }
    lines = b"\n".join([codecs.BOM_UTF8 + good, *wrong, good])
    done = subprocess.run([sys.executable, "-I", str(runner)], input=lines, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    first, *answers, last = map(json.loads, done.stdout.splitlines())
    assert first == last
    for answer, problem in zip(answers, wrong.values(), strict=True):
        assert problem in answer["error"]


def test_the_runner_stops_quietly_where_nobody_reads_on(graph_of):
    folder = graph_of("question-answering")
    (folder / "in.jsonl").write_text(f"{json.dumps(INPUTS['question-answering'][0])}\n" * 3000)
    program = f"{sys.executable} -I runner.py < in.jsonl | head -1"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, cwd=folder, check=False)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("options", "redirection", "message"),
    [
        ("-S", "", "No module named 'numpy'; install what it needs by `pip install onnxruntime tokenizers numpy`."),
        ("", "<&-", "Standard input is closed; run `python runner.py < in.jsonl > out.jsonl`."),
        ("", "< /dev/null >&-", "Standard output is closed; run `python runner.py < in.jsonl > out.jsonl`."),
        ("", "< in.jsonl > /dev/full", "Cannot read or write: No space left on device."),
    ],
)
def test_the_runner_says_in_a_sentence_why_it_cannot_answer(options, redirection, message, graph_of):
    folder = graph_of("question-answering")
    (folder / "in.jsonl").write_text(f"{json.dumps(INPUTS['question-answering'][0])}\n")
    program = f"{sys.executable} -I {options} runner.py {redirection}"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, cwd=folder, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"runner.py: {message}\n")


def test_a_graph_that_is_gone_or_cut_off_is_told_in_a_sentence(graph_of, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(graph_of("multi-label"), folder)
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    for problem in ("failed:Protobuf parsing failed.", "File doesn't exist"):
        with pytest.raises(ExportError, match=rf"model.onnx \(.*{problem}\); copy the whole folder again"):
            LengthAdaptivePipeline(folder)
        done = subprocess.run([sys.executable, "-I", folder / "runner.py"], capture_output=True, text=True, check=False)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1
        assert f"{problem}); copy the whole folder again, or install a newer onnxruntime." in line
        graph.unlink(missing_ok=True)


def runner_of(folder):
    """What the runner beside a graph makes of its folder, from the file that stands there."""
    spec = importlib.util.spec_from_file_location("runner", folder / "runner.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    return runner.Runner(folder)


def test_without_windows_what_is_too_long_is_refused_by_its_number(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, front = make("question-answering")
    write_onnx_folder(tmp_path, model, make_tokenizer(), dataclasses.replace(front, stride=None))
    inputs = [("who", "the actor"), ("who", "the actor " * 40)]
    with pytest.raises(DataError, match=r"Input 1 .* has 84 tokens, but the model reads no more than 24"):
        LengthAdaptivePipeline(tmp_path)(inputs)
    with pytest.raises(ValueError, match="84 tokens; the most are 24"):
        runner_of(tmp_path)(inputs)


@pytest.mark.parametrize("fixed_length", [6, 10])
def test_windows_that_bring_nothing_new_are_refused(fixed_length, tmp_path):
    model, front = make("question-answering")
    with pytest.raises(ExportError, match="choose 11 or more"):
        write_onnx_folder(tmp_path, model, make_tokenizer(), front, fixed_length=fixed_length)


def test_of_a_large_graph_int8_weights_alone_are_left(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("model.onnx_export.PROTOBUF_LIMIT", 20_000)
    model, front = make("regression")
    write_onnx_folder(tmp_path, model, make_tokenizer(), front)
    before = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    exact = LengthAdaptivePipeline(tmp_path)(SENTENCES)
    quantise_folder(tmp_path, 0, None)
    after = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after["model.onnx.data"] < before["model.onnx.data"] / 2
    for one, other in zip(LengthAdaptivePipeline(tmp_path)(SENTENCES), exact, strict=True):
        assert one["value"] != other["value"]
        assert one["value"] == pytest.approx(other["value"], abs=1.0)


@pytest.mark.parametrize(("wrong", "message"), [(np.nan, "by up to inf"), (1.0, "by up to")])
def test_an_export_that_says_something_else_is_refused(wrong, message, tmp_path, monkeypatch):
    model, front = make("regression")
    monkeypatch.setattr("model.export._joined", lambda output: output.logits + wrong)
    with pytest.raises(ExportError, match=message):
        write_transformers_folder(tmp_path, model, make_tokenizer(), front)


def test_a_model_that_says_no_numbers_is_not_exported(tmp_path):
    model, front = make("regression")
    with torch.no_grad():
        model.network.classifier.bias.fill_(torch.nan)
    with pytest.raises(ExportError, match="could not be compared"):
        write_transformers_folder(tmp_path, model, make_tokenizer(), front)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"label_names": ()}, "what its labels are called"), ({"kind": "ranking"}, "'ranking', not one")],
)
def test_a_folder_that_says_too_little_is_refused(change, message, tmp_path):
    model, front = make("classification")
    write_transformers_folder(tmp_path, model, make_tokenizer(), dataclasses.replace(front, **change))
    with pytest.raises(ExportError, match=message):
        LengthAdaptivePipeline(tmp_path)


def test_labels_that_are_fewer_than_the_model_tells_apart_are_refused(tmp_path):
    model, front = make("classification")
    write_transformers_folder(tmp_path, model, make_tokenizer(), dataclasses.replace(front, label_names=("no", "yes")))
    with pytest.raises(ExportError, match="names 2 labels, but the model tells 3 apart"):
        LengthAdaptivePipeline(tmp_path)(INPUTS["classification"])


def test_a_precision_that_is_mistyped_and_a_table_are_refused(tmp_path):
    model, front = make("regression")
    write_transformers_folder(tmp_path, model, make_tokenizer(), front)
    with pytest.raises(ValueError, match="precision='float32'; choose one of fp32, mixed, bf16"):
        LengthAdaptivePipeline(tmp_path, precision="float32")
    table = pandas.DataFrame({"text": SENTENCES})
    pipeline = LengthAdaptivePipeline(tmp_path)
    with pytest.raises(DataError, match="one of the table's rows"):
        pipeline(table)
    assert pipeline(table["text"]) == pipeline(table.to_dict("records")) == pipeline(SENTENCES)


@pytest.mark.parametrize(
    ("kind", "nothing"),
    [
        ("classification", ("\u200b", "\u200b")),
        ("token-classification", ["\u200b"]),
        ("question-answering", ("\u200b", "\u200b")),
    ],
)
def test_what_leaves_no_tokens_is_refused(kind, nothing, tmp_path, monkeypatch):
    onnx_runner = pytest.importorskip("model.onnx_runner")
    model, front = make(kind)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B:1", special_tokens=[]
    )
    write_transformers_folder(tmp_path, model, tokenizer, front)
    pipeline = LengthAdaptivePipeline(tmp_path)
    with pytest.raises(DataError, match=r"Input 1 .* has no tokens"):
        pipeline([INPUTS[kind][0], nothing])
    monkeypatch.setattr(onnx_runner, "SplitSession", lambda *_, **__: None)
    graph = Graph(file="model.onnx", opset=18, precision="float32", fixed_length=None, token_types=True)
    dataclasses.replace(front, graph=graph).write(tmp_path)
    with pytest.raises(ValueError, match="An input has no tokens"):
        onnx_runner.Runner(tmp_path)([nothing])


def test_a_list_of_words_has_to_be_one(tmp_path):
    model, front = make("token-classification")
    write_transformers_folder(tmp_path, model, make_tokenizer(), front)
    pipeline = LengthAdaptivePipeline(tmp_path)
    for given in ("the film", [], ["film", " "], [3]):
        with pytest.raises(DataError, match=r"no list of words|no text or blank"):
            pipeline([given])


def test_batches_hold_every_sequence_once_and_near_equal_lengths():
    num_tokens = np.array([5, 30, 3, 7, 7, 50, 6])
    made = list(batches(num_tokens, 21))
    assert [num_tokens[batch].tolist() for batch in made] == [[3, 5, 6], [7, 7], [30], [50]]
    assert sorted(np.concatenate(made).tolist()) == list(range(7))
