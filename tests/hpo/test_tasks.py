"""Every task from the command line: training, search, and a chosen point of the front."""

import json
import random
import re

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
NEUTRAL = ("film", "plot", "scene", "music", "actor", "story", "the", "a", "was", "is", "and")
STUDIES = {
    "finetune": """
kind = "finetune"
name = "finetune"
objective = "metric"
[space]
learning_rate = { low = 2e-3, high = 3e-3, log = true }
[fixed]
batch_size = 8
plain_epochs = 4
epochs = 1
precision = "fp32"
""",
    "lengths": """
kind = "lengths"
name = "lengths"
[retention]
low = 0.4
high = 1.0
step = 0.1
[sampler]
population_size = 10
""",
}


def review(generator, *extra):
    words = generator.choices(NEUTRAL, k=generator.randint(3, 12))
    for word in extra:
        words.insert(generator.randrange(len(words)), word)
    return words


def pairs(generator):
    label = generator.random() < 0.5
    texts = (" ".join(review(generator, generator.choice(GOOD if label else BAD))) for _ in range(2))
    return dict(zip(("sentence1", "sentence2"), texts, strict=True)) | {"label": int(label)}


def values(generator):
    good, bad = generator.randint(0, 2), generator.randint(0, 2)
    words = review(generator, *generator.choices(GOOD, k=good), *generator.choices(BAD, k=bad))
    return {"text": " ".join(words), "score": (good - bad) / 2}


def label_sets(generator):
    praised, blamed = generator.random() < 0.5, generator.random() < 0.5
    words = review(generator, *generator.choices(GOOD, k=praised), *generator.choices(BAD, k=blamed))
    return {"text": " ".join(words), "labels": ["praise"] * praised + ["blame"] * blamed}


def entities(generator):
    words = review(generator, generator.choice(GOOD), generator.choice(BAD))
    tags = [{**dict.fromkeys(GOOD, "B-GOOD"), **dict.fromkeys(BAD, "B-BAD")}.get(word, "O") for word in words]
    return {"tokens": words, "ner_tags": tags}


def questions(generator):
    answer = generator.choice(GOOD)
    context = " ".join(review(generator, answer, generator.choice(BAD)))
    start = f" {context} ".index(f" {answer} ")
    return {"question": "was the film", "context": context, "answers": {"text": [answer], "answer_start": [start]}}


TASKS = {
    "pairs": (pairs, "accuracy", (), 0.75),
    "values": (values, "pearson", ("spearman",), 0.6),
    "label sets": (label_sets, "micro_f1", ("macro_f1",), 0.75),
    "entities": (entities, "f1", (), 0.75),
    "questions": (questions, "f1", ("exact_match",), 0.6),
}


@pytest.fixture(params=TASKS)
def task(request, tmp_path):
    """A dataset of the task, and what is measured there."""
    make, metric, beside, learned = TASKS[request.param]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", 500), ("validation", 60)):
        generator = random.Random(name)
        records = [make(generator) for _ in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder), metric, beside, learned


@pytest.fixture(scope="module")
def encoder(tiny_encoder, tmp_path_factory):
    """A folder with a tiny encoder of no task."""
    folder = tmp_path_factory.mktemp("headless")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.1, hidden_dropout_prob=0.0, **sizes
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def output(command, monkeypatch):
    """What `hpo ARGUMENTS` prints."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        code, out, err = command(*arguments)
        assert code == 0, err
        return out

    return run


def test_every_task_leads_from_its_columns_to_a_chosen_point(output, task, encoder, tmp_path):
    dataset, metric, beside, learned = task
    files = {}
    for name, text in STUDIES.items():
        files[name] = str(tmp_path / f"{name}.toml")
        (tmp_path / f"{name}.toml").write_text(text)
    output("tune", "--study", files["finetune"], "--model", encoder, "--dataset", dataset, "--trials", "1")
    searched = json.loads(output("search-lengths", "--study", files["lengths"], "--trials", "20", "--json"))
    assert searched["metric"]["name"] == metric
    assert searched["full"]["report_metric"] > learned, "the tiny encoder should have learned something"
    for point in searched["points"]:
        assert set(point.get("metrics", {metric})) == set(point.get("report_metrics", {metric})) == {metric, *beside}
        if beside:
            values = (point["metrics"][metric], point["report_metrics"][metric])
            assert values == (point["metric"], point["report_metric"])
    document = json.loads(output("pareto", "--max-drop", "2", "--json"))
    assert document["chosen"]["trial"] == searched["points"][0]["trial"]
    table = output("pareto", "--budget", "1.0")
    for name in (metric, *beside):
        assert name.split("_")[0] in table


def misplaced_answer(record):
    return {**record, "answers": {"text": ["elsewhere"], "answer_start": [0]}}


def outside_the_scheme(record):
    return {**record, "ner_tags": [tag.replace("B-", "S-") for tag in record["ner_tags"]]}


def long_context(record):
    return {**record, "context": record["context"] + " the film" * 40}


def unchanged(record):
    return record


BAD_INPUTS = {
    "another task's columns": (values, unchanged, ("--task", "question-answering"), "question.*--text-columns"),
    "a context without the answer": (questions, misplaced_answer, (), "'elsewhere'.*answer_start"),
    "tags outside the scheme": (entities, outside_the_scheme, (), "S-.*BIO"),
    "a long context without windows": (questions, long_context, ("--no-windows",), "32 tokens.*--windows|--max-length"),
    "another task's metric": (values, unchanged, ("--metric", "accuracy"), "regression.*pearson, spearman"),
    "a task that does not exist": (values, unchanged, ("--task", "translation"), "translation.*regression"),
    "a stride and no windows": (questions, unchanged, ("--stride", "8", "--no-windows"), "--stride or --no-windows"),
}


@pytest.mark.parametrize(("make", "spoil", "flags", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_told_in_a_sentence(command, encoder, tmp_path, make, spoil, flags, message):
    generator = random.Random(0)
    records = [spoil(make(generator)) for _ in range(50)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    code, out, err = command("tune", "--model", encoder, "--dataset", str(tmp_path / "train.jsonl"), *flags)
    assert code in (1, 2)
    assert re.search(message, " ".join(err.split()))
    assert out == ""
    assert "Traceback" not in err
