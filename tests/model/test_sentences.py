"""Label sets, values and what a dataset's columns tell of its task."""

import itertools

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertTokenizerFast

from model.data import KINDS, DataSpec, encode, kind_of, load_corpus
from model.rows import DataError
from model.tasks import choose_metric

TOPICS = ("art", "food", "law")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "text", "on", *map(str, range(10))]
    return BertTokenizerFast(vocab={word: place for place, word in enumerate(words)}, model_max_length=32)


def topics_of(row):
    return [name for bit, name in enumerate(TOPICS) if row >> bit & 1]


def label_sets(count, names=topics_of):
    return {"text": [f"text {row}" for row in range(count)], "topics": [names(row) for row in range(count)]}


def scores(count, column="score"):
    columns = {"sentence1": [f"text {row}" for row in range(count)], "sentence2": [f"on {row}" for row in range(count)]}
    return {**columns, column: [row % 11 / 2 for row in range(count)]}


def save(folder, *, features=None, **splits):
    for name, columns in splits.items():
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


def load(dataset, task=None, **options):
    return load_corpus(DataSpec(dataset=str(dataset), **options), task)


# What the columns tell

QUESTIONS = {
    "id": ["1", "2"],
    "question": ["who ?", "what ?"],
    "context": ["it was me .", "a thing ."],
    "answers": [{"text": ["me"], "answer_start": [7]}, {"text": ["thing"], "answer_start": [2]}],
}
TAGGED = {"tokens": [["a", "b"], ["c"]], "ner_tags": [["O", "B-x"], ["O"]], "id": ["1", "2"]}
TOLD = {
    "classes": ({"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}, "classification"),
    "whole floats": ({"text": ["a", "b", "c", "d"], "label": [0.0, 1.0, 0.0, 1.0]}, "classification"),
    "fractions": ({"text": ["a", "b", "c"], "label": [0.5, 1.0, 2.25]}, "regression"),
    "fractions of a usual name": (scores(30), "regression"),
    "lists of words": (label_sets(8), "multi-label"),
    "lists under a usual name of one class": (
        {"text": ["a", "b", "c", "d"], "labels": [[0], [1], [0, 1], []]},
        "multi-label",
    ),
    "questions": (QUESTIONS, "question-answering"),
    "tags": (TAGGED, "token-classification"),
    "a yes-no question on a passage": (
        {"question": ["a", "b", "c", "d"], "passage": ["w", "x", "y", "z"], "answer": [True, False, True, False]},
        "classification",
    ),
}


@pytest.mark.parametrize(("columns", "kind"), TOLD.values(), ids=TOLD)
def test_the_columns_tell_the_task(columns, kind):
    texts = ("question", "passage") if "passage" in columns else None
    label = "answer" if "passage" in columns else "topics" if "topics" in columns else None
    assert kind_of(datasets.Dataset.from_dict(columns), texts, label) == kind


def test_a_named_task_wins():
    ratings = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [1, 2, 1, 5]})
    assert kind_of(ratings) == "classification"
    assert kind_of(ratings, task="regression") == "regression"


WRONG = {
    "questions of a table of classes": ({"text": ["a", "b"], "label": [0, 1]}, "question-answering", "context"),
    "tags of a table of classes": ({"text": ["a", "b"], "label": [0, 1]}, "token-classification", "the list of tags"),
    "values of words": ({"text": ["a", "b"], "label": ["x", "y"]}, "regression", "none is the value"),
    "classes of fractions": ({"text": list("abcd"), "label": [0.5, 1.5, 2, 3]}, "classification", "--task regression"),
    "classes of questions": (QUESTIONS, "classification", "--label-column"),
}


@pytest.mark.parametrize(("columns", "task", "message"), WRONG.values(), ids=WRONG)
def test_a_task_that_does_not_suit_the_columns_is_refused(tmp_path, columns, task, message):
    with pytest.raises(DataError, match=message) as caught:
        load(save(tmp_path / "data", train=columns), task)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


# Label sets


@pytest.mark.parametrize("form", ["words", "class labels", "numbers"])
def test_label_sets_become_rows_of_zeros_and_ones(tmp_path, form, tokenizer):
    features = None
    columns = label_sets(200)
    if form != "words":
        columns["topics"] = [[TOPICS.index(name) for name in names] for names in columns["topics"]]
    if form == "class labels":
        topics = datasets.List(datasets.ClassLabel(names=list(TOPICS)))
        features = datasets.Features({"text": datasets.Value("string"), "topics": topics})
    corpus = load(save(tmp_path / "data", train=columns, features=features))
    assert (corpus.kind, corpus.task) == ("multi-label", "classification")
    assert corpus.label_names == (("0", "1", "2") if form == "numbers" else TOPICS)
    for part in (corpus.train, corpus.search, corpus.report):
        split = encode(part, tokenizer, 32, corpus.kind)
        assert split.labels.dtype == np.float32
        expected = [[int(text.split()[1]) >> bit & 1 for bit in range(3)] for text in part["text"]]
        assert split.labels.tolist() == expected


def test_a_report_splits_label_sets_are_counted_as_train_counts_them(tmp_path):
    train = label_sets(40)
    other = {"text": ["text 1", "text 2"], "topics": [["law"], ["food", "law"]]}
    corpus = load(save(tmp_path / "data", train=train, validation=other))
    assert corpus.report["label"][:] == [[0, 0, 1], [0, 1, 1]]
    other["topics"][1] = ["war"]
    with pytest.raises(DataError, match="'war' stands in the validation split but not in train"):
        load(save(tmp_path / "data", train=train, validation=other))


SET_FEATURES = datasets.Features({"text": datasets.Value("string"), "topics": datasets.List(datasets.Value("string"))})
BAD_SETS = {
    "nothing applies": (label_sets(20, names=lambda row: []), "No train row has a label"),
    "keywords": (label_sets(20, names=lambda row: [f"word{row}"]), "probably keywords"),
    "a missing label": (label_sets(20, names=lambda row: ["art", None] if row == 7 else ["law"]), "Row 7 .* an empty"),
}
WORDS, CLASSES = datasets.Value("string"), datasets.ClassLabel(names=["no", "yes"])
NO_SETS = {
    "of structs": (lambda row: [{"name": "art"}], {"name": WORDS}, "lists of dict, which are no classes"),
    "of lists": (lambda row: [["art"]], datasets.List(WORDS), "lists of List, which are no classes"),
    "of probabilities": (lambda row: [0.25, 0.75], datasets.Value("float64"), "lists of fractions such as 0.25"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_SETS.values(), ids=BAD_SETS)
def test_label_sets_that_cannot_be_learned_are_refused(tmp_path, columns, message):
    folder = save(tmp_path / "data", train=columns, features=SET_FEATURES)
    with pytest.raises(DataError, match=message):
        load(folder, label_column="topics")


@pytest.mark.parametrize(("names", "element", "message"), NO_SETS.values(), ids=NO_SETS)
def test_lists_of_what_no_class_can_be_are_refused(tmp_path, names, element, message):
    features = datasets.Features({"text": WORDS, "topics": datasets.List(element)})
    folder = save(tmp_path / "data", train=label_sets(20, names=names), features=features)
    with pytest.raises(DataError, match=f"'topics' of the train split holds {message}.*--label-column"):
        load(folder, label_column="topics")


@pytest.mark.parametrize("element", [CLASSES, datasets.List(CLASSES)], ids=["classes", "label sets"])
def test_a_class_beyond_the_names_is_refused(tmp_path, element):
    features = datasets.Features({"text": WORDS, "label": element})
    numbers = [2 if row == 7 else row % 2 for row in range(40)]
    labels = numbers if element is CLASSES else [[number] for number in numbers]
    table = pa.table({"text": [f"text {row}" for row in range(40)], "label": labels}, schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"Row 7 of the train split .* a class number beyond the 2 names of column"):
        load(tmp_path / "train.parquet")


LABELS = {"label sets": [["law"], ["art", "law"]], "classes": ["law", "art"], "values": [0.5, 1.5]}
OTHERS = {
    "lists of numbers": [[0.5], [1.5]],
    "structs": [{"name": "law"}, {"name": "art"}],
    "words": ["law", "art"],
}


def named_files(folder, **labels):
    """Files with these labels and a text each, as --dataset names them."""
    for split, values in labels.items():
        save(folder, **{split: {"text": [f"text {row}" for row in range(len(values))], "label": values}})
    return ",".join(f"{split}={folder / split}.parquet" for split in labels)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_a_split_whose_labels_are_all_missing_is_not_reported_on(tmp_path, labels):
    dataset = named_files(tmp_path / "data", train=labels * 20, validation=[None] * 4)
    assert load(dataset).report_split == "carved from train"


@pytest.mark.parametrize("labels", [[0.0, 1.0], [0.5, 1.5]], ids=["classes", "values"])
def test_labels_that_are_no_numbers_are_missing(tmp_path, labels):
    dataset = named_files(tmp_path / "data", train=labels * 20, test=[float("nan")] * 4)
    assert load(dataset).report_split == "carved from train"


@pytest.mark.parametrize(
    ("kind", "other"), [pair for pair in itertools.product(LABELS, OTHERS) if pair != ("classes", "words")]
)
def test_labels_of_another_kind_than_trains_are_refused(tmp_path, kind, other):
    dataset = named_files(tmp_path / "data", train=LABELS[kind] * 20, validation=OTHERS[other])
    with pytest.raises(DataError, match=r"holds (no lists|no numbers|lists of fractions|\w+; one class per row)"):
        load(dataset)


def test_a_zero_or_a_one_for_each_class_is_refused(tmp_path):
    masks = label_sets(20, names=lambda row: [row % 2, 1, 0])
    with pytest.raises(DataError, match="a zero or a one for each class"):
        load(save(tmp_path / "masks", train=masks), label_column="topics")
    numbers = label_sets(20, names=lambda row: [0, 1][: 1 + row % 2])
    assert load(save(tmp_path / "numbers", train=numbers), label_column="topics").label_names == ("0", "1")


@pytest.mark.parametrize("average", ["micro_f1", "macro_f1"])
def test_f1_of_a_single_class_is_its_own(average):
    metric = choose_metric(KINDS["multi-label"].metrics, average)
    predictions, labels = (np.array(column)[:, None] for column in ([1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]))
    assert metric.compute(predictions, labels) == pytest.approx(2 * 1 / (2 + 2))
    assert metric.compute(np.zeros_like(labels), labels) == 0.0


def test_answers_to_label_sets_are_the_classes_more_likely_than_not(tmp_path, tokenizer):
    corpus = load(save(tmp_path / "data", train=label_sets(40)))
    split = encode(corpus.search, tokenizer, 32, corpus.kind)
    logits = torch.tensor([[0.1, -0.1, 3.0], [-1.0, -2.0, -3.0]])
    answers = split.answer(logits, np.array([0, 1]))
    assert answers.tolist() == [[1, 0, 1], [0, 0, 0]]
    perfect = split.labels.astype(np.int32).ravel()
    for metric in KINDS["multi-label"].metrics:
        assert split.quality(metric, perfect) == 1.0
    # one of the three right labels and one wrong: 2 hits of 1 + 3
    wrong = np.array([[1, 0, 0]] * len(split)).ravel()
    truth = split.labels
    hits, said, true = truth[:, 0].sum(), len(split), truth.sum()
    metric = choose_metric(KINDS["multi-label"].metrics, "micro_f1")
    assert split.quality(metric, wrong) == pytest.approx(2 * hits / (said + true))


# Values


def test_values_stay_what_they_are(tmp_path, tokenizer):
    corpus = load(save(tmp_path / "data", train=scores(300), validation=scores(40)))
    assert (corpus.kind, corpus.task, corpus.label_names) == ("regression", "regression", ())
    assert corpus.columns.texts == ("sentence1", "sentence2")
    split = encode(corpus.report, tokenizer, 32, corpus.kind)
    assert split.labels.tolist() == [row % 11 / 2 for row in range(40)]
    for metric in KINDS["regression"].metrics:
        assert split.quality(metric, split.labels) == pytest.approx(1.0)
        assert split.quality(metric, -split.labels) == pytest.approx(-1.0)


def test_values_of_whole_numbers_need_the_task_named(tmp_path):
    stars = {"text": [f"text {row}" for row in range(100)], "stars": [row % 5 for row in range(100)]}
    folder = save(tmp_path / "data", train=stars)
    assert load(folder).kind == "classification"
    assert load(folder, "regression", label_column="stars").train["label"][:3] == pytest.approx(
        [float(text.split()[1]) % 5 for text in load(folder, "regression").train["text"][:3]]
    )


def test_large_whole_numbers_are_values(tmp_path):
    prices = {"text": [f"text {row}" for row in range(100)], "price": [20_000_001 + row for row in range(100)]}
    corpus = load(save(tmp_path / "data", train=prices), "regression", label_column="price")
    assert sum(corpus.train["label"]) / len(corpus.train) == pytest.approx(2e7, rel=1e-3)


BAD_VALUES = {
    "all alike": ({"text": ["a"] * 20, "score": [1.5] * 20}, "Every train row has the value 1.5"),
    "missing": ({"text": ["a"] * 20, "score": [0.5, None, *[1.5] * 18]}, "Row 1 .* has no number"),
    "infinite": ({"text": ["a"] * 20, "score": [0.5, float("inf"), *[1.5] * 18]}, "Row 1 .* has no number"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_that_cannot_be_learned_are_refused(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        load(save(tmp_path / "data", train=columns))


def test_a_report_split_without_values_is_not_reported_on(tmp_path):
    unlabelled = {**scores(40), "score": [-1.0] * 40}
    corpus = load(save(tmp_path / "data", train=scores(300), validation=unlabelled))
    assert corpus.report_split == "carved from train"
