import json
from importlib.metadata import version

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, BertForSequenceClassification

from hpo.errors import HpoError
from hpo.workload import (
    DEFAULT_MAX_LENGTH,
    Workload,
    library_versions,
    load_encoder,
    load_tokenizer,
    load_trained_encoder,
    load_workload,
    require_trials,
    with_paths,
)
from model.data import DataSpec, load_corpus
from model.encoder import CheckpointError
from model.rows import DataError

PAIRS = DataSpec(
    dataset="nyu-mll/glue:mrpc",
    text_columns=("sentence1", "sentence2"),
    label_column="label",
    train_limit=4000,
    search_size=500,
    seed=7,
)


# As recorded in the database


@pytest.mark.parametrize(
    "workload",
    [
        Workload(model="a/b", data=DataSpec(dataset="reviews")),
        Workload(model="folder", data=PAIRS, metric="f1", max_length=128),
    ],
)
def test_a_workload_survives_the_database(workload):
    recorded = json.loads(json.dumps(workload.to_attribute()))
    assert Workload.from_attribute(recorded) == workload


def test_the_record_names_every_setting():
    assert Workload(model="m", data=PAIRS, metric="f1", max_length=128).to_attribute() == {
        "model": "m",
        "task": None,
        "metric": "f1",
        "max_length": 128,
        "stride": 128,
        "data": {
            "dataset": "nyu-mll/glue:mrpc",
            "text_columns": ["sentence1", "sentence2"],
            "label_column": "label",
            "train_limit": 4000,
            "search_size": 500,
            "seed": 7,
        },
    }


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"metric='speed' is unknown; choose one of .*accuracy"):
        Workload(model="m", data=PAIRS, metric="speed")


@pytest.mark.parametrize("max_length", [3, 0, -5])
def test_a_length_with_no_room_for_words_is_refused(max_length):
    with pytest.raises(ValueError, match=f"max_length={max_length}; choose at least 4"):
        Workload(model="m", data=PAIRS, max_length=max_length)


def test_a_record_with_an_impossible_value_is_refused():
    recorded = Workload(model="m", data=PAIRS).to_attribute()
    with pytest.raises(DataError, match="seed=-1"):
        Workload.from_attribute(recorded | {"data": recorded["data"] | {"seed": -1}})


@pytest.mark.parametrize("trials", [0, -1])
def test_a_total_that_is_not_positive_is_refused(trials):
    with pytest.raises(HpoError, match=f"--trials {trials}; choose at least 1"):
        require_trials(trials)
    require_trials(1)


# Loaded


def test_texts_are_cut_at_the_workloads_length_or_the_encoders_own(workload, tiny_encoder):
    own = AutoTokenizer.from_pretrained(tiny_encoder).model_max_length
    assert own < DEFAULT_MAX_LENGTH
    short = Workload(model=workload.model, data=workload.data, max_length=5)
    for declared, limit in ((workload, own), (short, 5)):
        loaded = load_workload(declared, tiny_encoder)
        expected = AutoTokenizer.from_pretrained(tiny_encoder)(
            list(loaded.corpus.search["text"]), truncation=True, max_length=limit
        )["input_ids"]
        assert [list(ids) for ids in loaded.search.input_ids] == expected


def test_the_datasets_identity_depends_on_its_texts_and_on_where_they_are_cut(workload, tiny_encoder):
    def identity(**changes):
        data = DataSpec(**(workload.data.to_dict() | changes.pop("data", {})))
        return load_workload(Workload(model=workload.model, data=data, **changes), tiny_encoder).dataset_identity

    identities = [identity(), identity(max_length=5), identity(data={"seed": 1}), identity(data={"train_limit": 20})]
    assert len(set(identities)) == 4
    assert identity() == identities[0]


@pytest.mark.parametrize(("classes", "expected"), [(2, 0.8), (3, (0.8 + 2 / 3) / 2)])
def test_f1_is_chosen_by_the_classes_of_the_dataset_not_of_a_split(tiny_encoder, tmp_path, classes, expected):
    for split, labels in (("train", range(classes)), ("validation", range(2))):
        rows = [f"good film {row},{label}" for row, label in enumerate([*labels] * 20)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    dataset = f"train={tmp_path}/train.csv,validation={tmp_path}/validation.csv"
    declared = Workload(model=str(tiny_encoder), data=DataSpec(dataset=dataset), metric="f1")
    metric = load_workload(declared, tiny_encoder).metric
    assert metric.name == "f1"
    assert metric.compute(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])) == pytest.approx(expected)


def test_the_encoders_head_has_the_datasets_classes(workload, tiny_encoder):
    corpus = load_workload(workload, tiny_encoder).corpus
    config = load_encoder(tiny_encoder, corpus).network.config
    assert tuple(config.id2label[label] for label in range(config.num_labels)) == tuple(corpus.label_names)


def test_a_tokenizer_that_knows_more_tokens_than_the_encoder_is_refused(workload, tiny_encoder, tmp_path):
    network = BertForSequenceClassification.from_pretrained(tiny_encoder)
    network.resize_token_embeddings(12)
    network.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"numbers a token \d+, .* vocab_size of 12; give the encoder its own"):
        load_workload(workload, tmp_path / "other")


def test_texts_without_any_token_are_refused(tiny_encoder, tmp_path):
    bare = AutoTokenizer.from_pretrained(tiny_encoder)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    BertForSequenceClassification.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "bare")
    bare.save_pretrained(tmp_path / "bare")
    rows = [f"{'good film' if row else chr(0x200B)},{row % 2}" for row in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]))
    declared = Workload(model=str(tmp_path / "bare"), data=DataSpec(dataset=f"{tmp_path}/train.csv"))
    load_workload(declared, tiny_encoder)
    with pytest.raises(DataError, match=r"1 texts of the \w+ split have no tokens: .* adds no \[CLS\]"):
        load_workload(declared, tmp_path / "bare")


@pytest.fixture
def trained_encoder_of(workload, tiny_encoder, tmp_path):
    """Loads the tiny encoder, whose classes are called `theirs`, for a dataset whose classes are called `ours`."""

    def load(ours, theirs):
        rows = [f"good film {row},{label}" for row, label in enumerate([*ours] * 20)]
        (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]))
        network = BertForSequenceClassification.from_pretrained(tiny_encoder)
        network.config.id2label = dict(enumerate(theirs))
        network.save_pretrained(tmp_path / "trained")
        return load_trained_encoder(tmp_path / "trained", load_corpus(DataSpec(dataset=f"{tmp_path}/train.csv")))

    return load


@pytest.mark.parametrize("theirs", [("NEG", "pos"), ("LABEL_0", "LABEL_1")])
def test_a_checkpoint_that_calls_classes_as_the_dataset_does_needs_no_word(trained_encoder_of, theirs, caplog):
    assert trained_encoder_of(("neg", "pos"), theirs).label_names == ("neg", "pos")
    assert not caplog.text


def test_a_checkpoint_that_calls_classes_otherwise_is_warned_of(trained_encoder_of, caplog):
    trained_encoder_of((0, 1), ("negative", "positive"))
    assert "takes 0, 1 for the checkpoint's classes negative, positive, in this order" in caplog.text


def test_a_checkpoint_that_numbers_the_datasets_classes_otherwise_is_refused(trained_encoder_of):
    with pytest.raises(CheckpointError, match=r"numbers the classes Pos, Neg, the dataset neg, pos.*ClassLabel"):
        trained_encoder_of(("neg", "pos"), ("Pos", "Neg"))


@pytest.mark.parametrize(
    ("fault", "start", "end"),
    [
        ("empty folder", "Cannot load a tokenizer from {} (", "the folder needs tokenizer.json or vocab.txt."),
        ("no tokenizer", "{} holds no tokenizer", "the folder needs tokenizer.json or vocab.txt."),
        ("broken tokenizer", "Cannot load a tokenizer from {} (", "the folder needs tokenizer.json or vocab.txt."),
        ("no such folder", "There is no model folder {}", "or a hub id as in 'owner/name'."),
    ],
)
def test_an_encoder_without_a_usable_tokenizer_is_refused_in_one_sentence(
    tiny_encoder, tmp_path, monkeypatch, fault, start, end
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "encoder"
    if fault != "no such folder":
        folder.mkdir()
    if fault in ("no tokenizer", "broken tokenizer"):
        (folder / "config.json").write_bytes((tiny_encoder / "config.json").read_bytes())
    if fault == "broken tokenizer":
        (folder / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    sentence = str(caught.value)
    assert sentence.startswith(start.format(folder))
    assert sentence.endswith(end)
    assert "\n" not in sentence


def test_versions_of_what_decides_a_result_are_recorded():
    versions = library_versions()
    assert versions["torch"] == version("torch")
    assert versions["optuna"] == version("optuna")
    assert {"python", "hpo", "transformers", "datasets", "tokenizers", "numpy"} <= versions.keys()
    assert json.loads(json.dumps(versions)) == versions


@pytest.mark.parametrize(
    ("source", "there", "expected"),
    [
        ("data", {"data"}, "/here/data"),
        ("train=a.csv,validation=b.csv", {"a.csv", "b.csv"}, "train=/here/a.csv,validation=/here/b.csv"),
        ("lr=5e-5/data", {"lr=5e-5/data"}, "/here/lr=5e-5/data"),
        ("train=lr=5e-5/a.csv", {"lr=5e-5/a.csv"}, "train=/here/lr=5e-5/a.csv"),
        ("reviews,long", {"reviews,long", "reviews", "long"}, "/here/reviews,long"),
        ("data:en", {"data"}, "/here/data:en"),
        ("owner/name:en", set(), "owner/name:en"),
    ],
)
def test_paths_are_changed_wherever_they_stand_in_a_name(source, there, expected):
    assert with_paths(source, lambda path: f"/here/{path}" if path in there else path) == expected
