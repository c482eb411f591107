"""Datasets of every supported form, made in the test, and the sentences that wrong ones get."""

import csv
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from model.data import DataSpec, _share_out, encode, load_corpus
from model.dataset_files import CSV_OPTIONS
from model.encoder import CheckpointError
from model.rows import DataError
from model.tokenizer import load_tokenizer

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the benchmark data is not on this machine")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The Arrow cache of `datasets`, away from the user's own."""
    folder = tmp_path / "hf-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def unplugged(monkeypatch):
    """No host name resolves."""

    def refuse(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def rows(count, labels=("neg", "pos"), tag="a"):
    return [{"text": f"{tag} sentence {i}", "label": labels[i % len(labels)]} for i in range(count)]


def write_csv(path, records, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path, records, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records, features=features).to_parquet(path)
    datasets.enable_progress_bars()
    return path


def load(dataset, **options):
    return load_corpus(DataSpec(dataset=str(dataset), **options))


def pairs_of(split):
    return list(zip(split["text"], split["label"], strict=True))


# The three splits


def test_no_row_is_lost_or_in_two_splits(tmp_path):
    records = rows(1000, labels=("neg", "pos", "pos"))
    write_csv(tmp_path / "data" / "train.csv", records)
    write_csv(tmp_path / "data" / "validation.csv", rows(50, tag="v"))
    corpus = load(tmp_path / "data")
    texts = [*corpus.train["text"], *corpus.search["text"]]
    assert sorted(texts) == sorted(record["text"] for record in records)
    assert (len(corpus.train), len(corpus.search), len(corpus.report)) == (900, 100, 50)
    assert corpus.report["text"][:] == [record["text"] for record in rows(50, tag="v")]
    assert corpus.report_split == "validation"


def test_labels_stay_with_their_texts(tmp_path):
    records = rows(300, labels=("b", "a", "c"))
    corpus = load(write_csv(tmp_path / "data.csv", records))
    label_of = {record["text"]: record["label"] for record in records}
    for split in (corpus.train, corpus.search, corpus.report):
        assert split.features["label"].dtype == "int64"
        assert all(corpus.label_names[label] == label_of[text] for text, label in pairs_of(split))


def test_search_split_has_the_label_shares_of_train(tmp_path):
    corpus = load(write_csv(tmp_path / "data.csv", rows(2000, labels=("a",) * 6 + ("b",) * 3 + ("c",))))
    assert Counter(corpus.search["label"]) == {0: 120, 1: 60, 2: 20}
    assert Counter(corpus.report["label"]) == {0: 120, 1: 60, 2: 20}


def test_without_a_validation_split_a_report_split_is_carved_and_said_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    corpus = load(write_csv(tmp_path / "data.csv", rows(500)))
    splits = [set(split["text"]) for split in (corpus.train, corpus.search, corpus.report)]
    assert [len(split) for split in splits] == [400, 50, 50]
    assert len(set.union(*splits)) == 500
    assert corpus.report_split == "carved from train"
    assert "50 train rows become the report split" in caplog.text


def test_search_size_is_at_most_two_thousand_unless_named(tmp_path):
    path = write_csv(tmp_path / "data.csv", rows(30_000))
    assert len(load(path).search) == 2_000
    assert len(load(path, search_size=2_500).search) == 2_500


def test_train_limit_shrinks_train_alone(tmp_path):
    path = write_csv(tmp_path / "data.csv", rows(1000, labels=("a", "a", "a", "b")))
    whole, limited = load(path), load(path, train_limit=200)
    assert pairs_of(limited.search) == pairs_of(whole.search)
    assert pairs_of(limited.report) == pairs_of(whole.report)
    assert set(limited.train["text"]) < set(whole.train["text"])
    assert Counter(limited.train["label"]) == {0: 150, 1: 50}
    assert pairs_of(load(path, train_limit=5000).train) == pairs_of(whole.train)


def test_every_label_stays_in_train_however_rare(tmp_path):
    records = [*rows(200, labels=("a", "b")), {"text": "the only one", "label": "rare"}]
    path = write_csv(tmp_path / "data.csv", records)
    for seed in range(5):
        corpus = load(path, train_limit=3, search_size=100, seed=seed)
        assert sorted(corpus.train["label"]) == [0, 1, 2]


def test_a_seed_decides_the_splits(tmp_path):
    path = write_csv(tmp_path / "data.csv", rows(400))
    first, again, other = load(path, seed=1), load(path, seed=1), load(path, seed=2)
    assert pairs_of(first.search) == pairs_of(again.search)
    assert first.fingerprint == again.fingerprint
    assert set(first.search["text"]) != set(other.search["text"])
    assert first.fingerprint != other.fingerprint


def test_splits_are_the_same_on_every_machine(tmp_path):
    """Rows and fingerprint as first released: a study made then must still recognise its data."""
    corpus = load(write_csv(tmp_path / "data.csv", rows(60)), seed=7)
    assert [int(text.split()[-1]) for text in corpus.search["text"]] == [11, 19, 28, 34, 54, 57]
    assert corpus.fingerprint == "88936158a39d9f2ed05ba88210c0080396cae97b758f55c627876f4ec66f72d9"


def test_fingerprint_depends_on_content_and_not_on_the_file_format(tmp_path):
    records = rows(100)
    as_csv = load(write_csv(tmp_path / "a.csv", records)).fingerprint
    assert load(write_parquet(tmp_path / "b.parquet", records)).fingerprint == as_csv
    records[3]["text"] += "!"
    assert load(write_csv(tmp_path / "c.csv", records)).fingerprint != as_csv


def test_fingerprint_hashes_names_texts_and_labels_with_their_lengths(tmp_path):
    corpus = load(write_csv(tmp_path / "a.csv", rows(40)))

    def framed(text):
        return len(text.encode()).to_bytes(8, "little") + text.encode()

    content = b"".join(map(framed, corpus.label_names))
    for split in (corpus.train, corpus.search, corpus.report):
        content += framed(f"{len(split)} rows") + framed("text") + b"".join(map(framed, split["text"]))
        content += b"".join(label.to_bytes(8, "little") for label in split["label"])
    assert corpus.fingerprint == hashlib.sha256(content).hexdigest()


def test_texts_that_train_repeats_are_counted_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_csv(tmp_path / "data" / "train.csv", rows(100))
    write_csv(tmp_path / "data" / "validation.csv", [*rows(10, tag="v"), *([rows(1)[0]] * 3)])
    corpus = load(tmp_path / "data")
    repeats = sum(text in set(corpus.train["text"]) for text in corpus.report["text"])
    assert f"{repeats} texts of the report split stand in train too" in caplog.text


@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=12),
    share=st.floats(0.0, 1.0),
    keep_one=st.booleans(),
)
def test_rows_are_shared_out_in_proportion_within_their_bounds(counts, share, keep_one):
    counts = np.array(counts)
    lowest = np.zeros_like(counts) if keep_one else np.ones_like(counts)
    highest = counts - 1 if keep_one else counts
    size = int(lowest.sum() + share * (highest.sum() - lowest.sum()))
    shares = _share_out(counts, size, lowest, highest)
    assert shares.sum() == size
    assert (lowest <= shares).all()
    assert (shares <= highest).all()
    quota = size * counts / counts.sum()
    free = (lowest < shares) & (shares < highest)
    spread = (shares - quota)[free]
    assert not spread.size or spread.max() - spread.min() <= 1 + 1e-9  # no exchange of one row would be fairer


# Formats


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_each_format_gives_the_same_rows(tmp_path, ending):
    records, path = rows(100), tmp_path / f"data{ending}"
    match ending:
        case ".csv" | ".tsv":
            write_csv(path, records, "\t" if ending == ".tsv" else ",")
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, records)))
        case ".json":
            path.write_text(json.dumps(records))
        case ".parquet":
            write_parquet(path, records)
    corpus = load(path)
    found = [(text, corpus.label_names[label]) for text, label in pairs_of(corpus.train)]
    assert set(found) <= {(record["text"], record["label"]) for record in records}
    assert len(found) == 80


@pytest.mark.parametrize("read", [lambda path: path, lambda path: path.parent], ids=["file", "folder"])
def test_quotes_of_tab_separated_files_are_text_unless_they_quote_cells(tmp_path, read):
    """As GLUE writes them, and as spreadsheets do."""
    records = rows(100)
    records[3]["text"] = '"Never, he said'
    records[4]["text"] = 'he said "never"'
    records[60]["text"] = '"Never" was a word'
    texts = {record["text"] for record in records}
    lines = ["\t".join(record.values()) for record in [dict(zip(records[0], records[0], strict=True)), *records]]
    plain = tmp_path / "plain" / "train.tsv"
    plain.parent.mkdir()
    plain.write_text("\n".join(lines))
    corpus = load(read(plain))
    assert {text for text, _ in pairs_of(corpus.train)} <= texts
    assert len(corpus.train) == 80
    records[5]["text"] = 'first line\nsecond "line"\tand more'
    texts.add(records[5]["text"])
    corpus = load(read(write_csv(tmp_path / "quoted" / "train.tsv", records, "\t")))
    assert {text for text, _ in pairs_of(corpus.train)} <= texts
    assert len(corpus.train) == 80


def test_files_can_be_named_by_split(tmp_path):
    train = write_csv(tmp_path / "a.csv", rows(100))
    report = write_parquet(tmp_path / "b.parquet", rows(20, tag="v"))
    corpus = load(f"train={train},validation={report}")
    assert corpus.report_split == "validation"
    assert corpus.report["text"][0] == "v sentence 0"


def test_a_path_with_glob_characters_is_read_literally(tmp_path):
    write_csv(tmp_path / "a1.csv", rows(10, labels=("other", "wrong")))
    assert load(write_csv(tmp_path / "a[1].csv", rows(100))).label_names == ("neg", "pos")


def test_a_saved_dataset_folder_is_read(tmp_path):
    saved = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows(100)), dev=datasets.Dataset.from_list(rows(20, tag="v"))
    )
    datasets.disable_progress_bars()
    saved.save_to_disk(tmp_path / "both")
    saved["train"].save_to_disk(tmp_path / "one")
    datasets.enable_progress_bars()
    assert load(tmp_path / "both").report_split == "dev"
    assert load(tmp_path / "one").report_split == "carved from train"


def test_words_that_look_like_missing_values_are_words(tmp_path):
    records = rows(100, labels=("None", "NA"))
    records[4]["text"] = "null"
    corpus = load(write_csv(tmp_path / "data" / "train.csv", records).parent)
    assert corpus.label_names == ("NA", "None")
    assert "null" in [*corpus.train["text"], *corpus.search["text"], *corpus.report["text"]]


def test_a_column_is_of_a_type_that_suits_all_its_rows(tmp_path):
    records = [
        {**record, "note": "7" if number < 15_000 else "see above"} for number, record in enumerate(rows(15_100))
    ]
    corpus = load(write_csv(tmp_path / "data" / "train.csv", records).parent)
    assert len(corpus.train) + len(corpus.search) + len(corpus.report) == 15_100


def test_local_data_is_read_without_the_network(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args))
    load(write_csv(tmp_path / "data" / "train.csv", rows(100)))
    load(tmp_path / "data")
    assert not asked


def test_a_changed_file_is_read_anew(tmp_path):
    path = write_csv(tmp_path / "data.csv", rows(100))
    before = load(path)
    write_csv(path, rows(100, tag="b"))
    assert load(path).train["text"][0].startswith("b")
    assert before.train["text"][0].startswith("a")


def test_a_config_of_a_folder_is_named_after_a_colon(tmp_path):
    folder = tmp_path / "data"
    write_csv(folder / "a.csv", rows(100, tag="a"))
    write_csv(folder / "b.csv", rows(100, tag="b"))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in "ab")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert load(f"{folder}:b").train["text"][0].startswith("b ")
    for dataset in (folder, f"{folder}:c"):
        with pytest.raises(DataError, match=r"Name one config of .* after a colon.*'a', 'b'"):
            load(dataset)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "test", "validation"), "validation"),
        (("train", "test"), "test"),
        (("train", "val", "dev"), "dev"),
        (("train", "validation_matched", "test"), "validation_matched"),
    ],
)
def test_the_report_split_is_the_one_made_for_validation(tmp_path, splits, expected):
    files = {name: write_csv(tmp_path / f"{name}.csv", rows(100, tag=name)) for name in splits}
    corpus = load(",".join(f"{name}={path}" for name, path in files.items()))
    assert corpus.report_split == expected
    assert corpus.report["text"][0] == f"{expected} sentence 0"


@pytest.mark.parametrize("hidden", ["-1", "None", "no column"])
def test_a_test_split_without_labels_is_not_reported_on(tmp_path, hidden):
    test = rows(20, tag="t")
    for record in test:
        record["label"] = {"-1": -1, "None": None}.get(hidden)
        if hidden == "no column":
            del record["label"]
    train = write_parquet(tmp_path / "train.parquet", rows(100, labels=(0, 1)))
    corpus = load(f"train={train},test={write_parquet(tmp_path / 'test.parquet', test)}")
    assert corpus.report_split == "carved from train"


# Columns and labels


@pytest.mark.parametrize(
    ("columns", "texts", "label"),
    [
        (("sentence", "label", "idx"), ("sentence",), "label"),
        (("premise", "hypothesis", "label"), ("premise", "hypothesis"), "label"),
        (("question2", "question1", "target"), ("question1", "question2"), "target"),
        (("id", "review", "sentiment"), ("review",), "sentiment"),
        (("Review body", "Stars"), ("Review body",), "Stars"),
        (("text", "title", "label"), ("text",), "label"),
    ],
)
@pytest.mark.parametrize("kind", ["integers", "words"])
def test_columns_are_found(tmp_path, columns, texts, label, kind):
    def value(column, i):
        if column == label:
            return i % 3 if kind == "integers" else "xyz"[i % 3]
        return i if column in ("id", "idx") else f"{column} {i}"

    path = write_csv(tmp_path / "data.csv", [{column: value(column, i) for column in columns} for i in range(60)])
    corpus = load(path)
    assert (corpus.columns.texts, corpus.columns.label) == (texts, label)
    assert corpus.train.column_names == [*["text", "text_pair"][: len(texts)], "label"]


def test_columns_can_be_named(tmp_path):
    records = [{"a": f"a {i}", "b": f"b {i}", "c": i % 2, "label": i % 5} for i in range(100)]
    path = write_csv(tmp_path / "data.csv", records)
    corpus = load(path, text_columns=("b", "a"), label_column="c")
    assert corpus.train["text"][0][0] == "b"
    assert corpus.train["text_pair"][0][0] == "a"
    assert corpus.label_names == ("0", "1")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ((7, -1, 10), ("-1", "7", "10")),
        ((True, False), ("False", "True")),
        (("spam", "ham"), ("ham", "spam")),
        ((1.0, 0.0), ("0", "1")),
    ],
    ids=["integers", "bools", "strings", "whole floats"],
)
def test_labels_are_sorted_and_counted_from_zero(tmp_path, values, names):
    corpus = load(write_parquet(tmp_path / "data.parquet", rows(120, labels=values)))
    assert corpus.label_names == names
    by_number = {text: corpus.label_names[label] for text, label in pairs_of(corpus.train)}
    as_text = [str(int(value)) if isinstance(value, float) else str(value) for value in values]
    assert all(name == as_text[int(text.split()[-1]) % len(values)] for text, name in by_number.items())


def test_class_labels_keep_their_names_and_numbers(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "maybe", "yes"]))
    corpus = load(write_parquet(tmp_path / "data.parquet", rows(90, labels=(2, 0, 1)), features))
    assert corpus.label_names == ("no", "maybe", "yes")
    assert corpus.train["label"][:3] == [{0: 2, 1: 0, 2: 1}[int(t.split()[-1]) % 3] for t in corpus.train["text"][:3]]


def test_labels_of_separate_files_are_matched_by_name(tmp_path):
    train = write_parquet(tmp_path / "a.parquet", rows(100, labels=(1, 2, 3)))
    report = write_csv(tmp_path / "b.csv", rows(30, labels=("3", "1"), tag="v"))
    corpus = load(f"train={train},validation={report}")
    assert corpus.report["label"][:4] == [2, 0, 2, 0]


def test_a_label_that_only_train_has_is_a_warning(tmp_path, caplog):
    train = write_csv(tmp_path / "a.csv", rows(90, labels=("a", "b", "c")))
    load(f"train={train},validation={write_csv(tmp_path / 'b.csv', rows(30, labels=('a', 'b')))}")
    assert "1 labels of train are not in the report split: 'c'" in caplog.text


# Bad input: one sentence each


def bad_rows(**changes):
    records = rows(100)
    records[17] = {**records[17], **changes}
    return records


BAD_RECORDS = {
    "a missing text": (bad_rows(text=None), {}, r"Row 17 of the train split .* no text in column 'text'"),
    "a blank text": (bad_rows(text=" \n"), {}, r"Row 17 of the train split .* no text in column 'text'"),
    "a missing label": (bad_rows(label=None), {}, r"Row 17 of the train split .* no label in column 'label'"),
    "a blank label": (bad_rows(label=""), {}, r"Row 17 of the train split .* no label in column 'label'"),
    "one class": (rows(100, labels=("pos",)), {}, r"Every train row has the label 'pos'.*--label-column"),
    "an id as label": (rows(100, labels=range(100)), {}, r"100 different values in 100 train rows.*an id"),
    "an unknown text column": (rows(100), {"text_columns": ("body",)}, r"no column 'body', only text \(string\)"),
    "an unknown label column": (rows(100), {"label_column": "y"}, r"no column 'y'.*--label-column"),
    "a number as text": (
        [{"n": i, "label": i % 2} for i in range(100)],
        {"text_columns": ("n",)},
        "Column 'n' .* holds int64, not text",
    ),
    "no text": ([{"n": i, "label": i % 2} for i in range(100)], {}, "none holds text.*--text-columns"),
    "two texts": (
        [{"title": f"t {i}", "body": f"b {i}", "label": i % 2} for i in range(100)],
        {},
        r"title \(string\), body \(string\).*several could be the text.*--text-columns",
    ),
    "two labels": (
        [{"text": f"t {i}", "stars": i % 5, "helpful": i % 2} for i in range(100)],
        {},
        "stars, helpful could each be the label.*--label-column",
    ),
    "no label": ([{"text": f"t {i}", "number": i} for i in range(100)], {}, "none is clearly the label"),
    "too large a search split": (rows(100), {"search_size": 99}, "search split should have 99 rows, but only 98"),
    "too small a train limit": (rows(90, labels=("a", "b", "c")), {"train_limit": 2}, "train_limit=2.*3 labels"),
}


@pytest.mark.parametrize(("records", "options", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_unusable_rows_and_columns_get_a_sentence(tmp_path, records, options, message):
    path = write_parquet(tmp_path / "data.parquet", records)
    with pytest.raises(DataError, match=message) as caught:
        load(path, **options)
    assert_one_sentence(caught.value)


def assert_one_sentence(error):
    assert "\n" not in str(error)
    assert str(error).endswith(".")


def unlabelled_row_of_class_labels(folder):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    return write_parquet(folder / "a.parquet", [*rows(50, labels=(0, 1)), {"text": "?", "label": -1}], features)


def truncated_parquet(folder):
    path = write_parquet(folder / "data" / "train.parquet", rows(100))
    validation = path.with_name("validation.parquet")
    validation.write_bytes(path.read_bytes()[:-200])
    return folder / "data"


def with_text(name, content):
    def write(folder):
        path = folder / name
        path.write_bytes(content)
        return path

    return write


def with_splits(**splits):
    def write(folder):
        files = [f"{name}={write_parquet(folder / f'{name}.parquet', records)}" for name, records in splits.items()]
        return ",".join(files)

    return write


def folder_of(**files):
    def write(folder):
        for name, records in files.items():
            write_csv(folder / "data" / f"{name}.csv", records)
        return folder / "data"

    return write


def header_only_validation(folder):
    write_csv(folder / "data" / "train.csv", rows(50))
    (folder / "data" / "validation.csv").write_text("text,label\n")
    return folder / "data"


def parquet_without_rows(folder):
    datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


BAD_SOURCES = {
    "a path that is not there": (lambda folder: folder / "nope", "There is no file or folder '.*nope'"),
    "a relative file that is not there": (lambda _: "nope.csv", "There is no file or folder 'nope.csv'"),
    "no name at all": (lambda _: "what is this?", "neither an existing folder or file nor a hub id"),
    "the name of a format": (lambda _: "csv", "neither an existing folder or file nor a hub id"),
    "an unknown ending": (with_text("a.txt", b"text"), r"none of the known endings \.parquet"),
    "an empty file": (with_text("a.csv", b""), "is an empty file"),
    "a file of one header": (with_text("a.csv", b"text,label\n"), "train split of .* has no rows"),
    "a file of no rows": (parquet_without_rows, r"a\.parquet' has no rows"),
    "an empty list": (with_text("a.json", b"[]"), "has no rows"),
    "a broken line": (with_text("a.csv", b"text,label\na,1\nb,2,3\n"), "a.csv' cannot be read .*line 3, saw 3"),
    "half an object": (with_text("a.json", b'{"text": "a", "la'), "a.json' cannot be read as a dataset"),
    "another encoding": (with_text("a.csv", b"text,label\n\xff,1\nb,2\n"), "a.csv' cannot be read .*UTF8"),
    "a truncated file of a folder": (truncated_parquet, r"validation\.parquet' cannot be read as a dataset"),
    "an empty folder": (lambda folder: folder, r"holds no data; it needs files ending in \.parquet"),
    "a folder named with a pattern": (
        lambda folder: write_csv(folder / "a[1]" / "train.csv", rows(20)).parent,
        "has one of .* in its path; rename it",
    ),
    "a folder without train": (folder_of(test=rows(50)), "has no train split, only test"),
    "a folder of different columns": (
        folder_of(train=rows(50), validation=[{"text": "a", "stars": 1}]),
        "do not have the same columns .*name one file per split",
    ),
    "an empty validation split": (header_only_validation, "validation.* has no rows"),
    "an unknown split name": (lambda _: "holdout=b.csv,train=a.csv", "Cannot read 'holdout=b.csv'"),
    "a split named twice": (
        lambda folder: f"train={write_csv(folder / 'a.csv', rows(9))},train=b.csv",
        "each split once",
    ),
    "a split file that is not there": (lambda _: "train=nope.csv", "no file 'nope.csv' for the train split"),
    "a label that only validation has": (
        with_splits(train=rows(50), validation=rows(9, labels=("new",))),
        "Label 'new' stands in the validation split but not in train, whose labels are 'neg', 'pos'",
    ),
    "a text column that one split lacks": (
        with_splits(train=rows(50), test=[{"body": "a", "label": "neg"}]),
        "The test split has no column 'text', only body",
    ),
    "a label column that one split lacks": (
        with_splits(train=rows(50), dev=[{"text": "a"}]),
        "The dev split has no column 'label', only text",
    ),
    "a row without gold label": (unlabelled_row_of_class_labels, "Row 50 of the train split .* no label"),
}


@pytest.mark.parametrize(("make", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_unreadable_sources_get_a_sentence(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as caught:
        load(make(tmp_path))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("dataset", ["nyu-mll/glue:sst2", "rotten_tomatoes"])
def test_a_hub_id_without_network_is_refused_at_once(dataset, unplugged):
    started = time.monotonic()
    with pytest.raises(DataError, match=r"could not be fetched .*no connection to the hub.*give a local folder"):
        load(dataset)
    assert time.monotonic() - started < 10


def test_a_hub_id_in_offline_mode_says_so(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="offline mode is set"):
        load("nyu-mll/glue:sst2")


def test_a_hub_dataset_fetched_before_is_read_from_the_cache(tmp_path, cache, unplugged):
    folder = write_csv(tmp_path / "name" / "train.csv", rows(100)).parent
    builder = datasets.load_dataset_builder(str(folder), **CSV_OPTIONS)
    from_folder = load(folder)
    fetched = cache / "org___name" / "default" / "0.0.0" / ("0" * 40)
    fetched.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(fetched)
    assert load("org/name").fingerprint == from_folder.fingerprint
    assert not datasets.config.HF_HUB_OFFLINE


def test_an_unwritable_cache_gets_a_sentence(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "data.csv", rows(100))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "cache")  # a file is no folder
    with pytest.raises(DataError, match=r"cache '.*' cannot be written \(Not a directory\).*set HF_DATASETS_CACHE"):
        load(path)


def test_a_full_disk_gets_a_sentence(tmp_path):
    """The kernel refuses to let a file grow beyond the limit, as it does on a full quota."""
    path = write_csv(tmp_path / "data.csv", rows(5000))
    program = f"""
import resource, signal
import datasets
from model.data import DataSpec, load_corpus
from model.rows import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    load_corpus(DataSpec(dataset={str(path)!r}))
except DataError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    root = Path(__file__).resolve().parents[2]
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert "cannot be written (File too large); make room there" in finished.stdout
    assert not finished.stderr


def test_loading_is_quiet_and_leaves_the_libraries_as_they_were(tmp_path, capfd, caplog):
    caplog.set_level(logging.WARNING)
    datasets.enable_progress_bars()
    enable_progress_bars()

    def state():
        bars = (datasets.are_progress_bars_disabled(), are_progress_bars_disabled())
        levels = (logging.getLogger("datasets").level, logging.getLogger("huggingface_hub").level)
        return bars, levels, datasets.config.HF_HUB_OFFLINE

    before = state()
    load(write_csv(tmp_path / "data.csv", rows(100)))
    with pytest.raises(DataError):
        load(with_text("bad.json", b"{")(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert state() == before


# The spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": " "}, "dataset is empty"),
        ({"text_columns": ()}, "name one column, or two"),
        ({"text_columns": ("a", "b", "c")}, "name one column, or two"),
        ({"text_columns": ("a", "a")}, "a column twice"),
        ({"text_columns": ("a", "b"), "label_column": "b"}, "a column twice"),
        ({"train_limit": 1}, "train_limit=1; choose 2 rows or more"),
        ({"search_size": 0}, "search_size=0; choose 1 row or more"),
        ({"seed": -1}, r"seed=-1; choose 0\.\."),
    ],
)
def test_a_spec_checks_itself(options, message):
    with pytest.raises(DataError, match=message):
        DataSpec(**{"dataset": "data.csv", **options})


@pytest.mark.parametrize(
    "spec",
    [
        DataSpec(dataset="nyu-mll/glue:sst2"),
        DataSpec(dataset="a", text_columns=("x", "y"), label_column="z", train_limit=9, search_size=5, seed=3),
    ],
)
def test_a_spec_survives_json(spec):
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("values", [{}, {"dataset": "a", "sede": 1}])
def test_a_spec_of_unknown_or_missing_fields_is_refused(values):
    with pytest.raises(DataError, match="Cannot read a data spec"):
        DataSpec.from_dict(values)


# Tokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very", "##ly", "."]


@pytest.fixture
def tokenizer(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    return BertTokenizerFast(vocab=str(vocabulary), model_max_length=64)


def as_split(texts, pairs=None, labels=None):
    columns = {"text": texts, **({"text_pair": pairs} if pairs else {}), "label": labels or [0] * len(texts)}
    return datasets.Dataset.from_dict(columns)


def test_texts_become_ids_without_padding(tokenizer):
    split = encode(as_split(["good film", "very badly . xyz"], labels=[1, 0]), tokenizer, max_length=16)
    words = [[WORDS[token] for token in ids] for ids in split.input_ids]
    assert words == [["[CLS]", "good", "film", "[SEP]"], ["[CLS]", "very", "bad", "##ly", ".", "[UNK]", "[SEP]"]]
    assert split.token_type_ids == [[0] * 4, [0] * 7]
    assert split.num_tokens.tolist() == [4, 7]
    assert (split.labels.dtype, split.labels.tolist(), split.num_truncated) == (np.int64, [1, 0], 0)


def test_pairs_are_told_apart_by_their_token_types(tokenizer):
    split = encode(as_split(["good film"], ["bad"]), tokenizer, max_length=16)
    assert [WORDS[token] for token in split.input_ids[0]] == ["[CLS]", "good", "film", "[SEP]", "bad", "[SEP]"]
    assert split.token_type_ids == [[0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("pairs", [None, ["good"] * 4], ids=["single", "pairs"])
def test_truncated_rows_are_counted_and_logged(tokenizer, pairs, caplog):
    caplog.set_level(logging.INFO)
    extra = 0 if pairs is None else 2
    texts = ["good " * count for count in (3, 4, 5, 60)]
    split = encode(as_split(texts, pairs), tokenizer, max_length=6 + extra)
    assert split.num_tokens.tolist() == [5 + extra, 6 + extra, 6 + extra, 6 + extra]
    assert split.num_truncated == 2
    assert f"2 of 4 rows are truncated to {6 + extra} tokens" in caplog.text


def test_rows_are_tokenised_a_part_at_a_time(tokenizer, monkeypatch):
    split = as_split(["good film", "bad", "very good film", "film ."], ["bad"] * 4)
    whole = encode(split, tokenizer, max_length=6)
    monkeypatch.setattr("model.sentences.ROWS_AT_ONCE", 3)
    parts = encode(split, tokenizer, max_length=6)
    assert (parts.input_ids, parts.token_type_ids) == (whole.input_ids, whole.token_type_ids)
    assert parts.num_truncated == whole.num_truncated == 1


def test_a_tokenizer_that_pads_on_the_left_is_told_otherwise(tokenizer, tmp_path):
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "left")
    assert load_tokenizer(tmp_path / "left").padding_side == "right"


def test_a_tokenizer_that_names_no_padding_pads_with_another_special_token(tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "film": 1, "plot": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    padded = tokenizer.pad({"input_ids": [[1], [1, 2]]})
    assert (padded["input_ids"], padded["attention_mask"]) == ([[1, 0], [1, 2]], [[1, 0], [1, 1]])
    assert tokenizer("film [UNK] plot scene")["input_ids"] == [1, 0, 2, 0]


def test_a_tokenizer_without_any_special_token_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"film": 0, "plot": 1}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no special token .* pad_token in its tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_token_types_gets_zeros(tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    split = encode(as_split(["good film"], ["bad"]), tokenizer, max_length=16)
    assert split.token_type_ids == [[0] * 6]


@pytest.mark.parametrize(("max_length", "pairs"), [(2, None), (3, ["bad"]), (65, None), (0, None)])
def test_a_maximum_without_room_or_beyond_the_model_is_refused(tokenizer, max_length, pairs):
    with pytest.raises(DataError, match=rf"max_length={max_length}; choose {3 if pairs is None else 4}..64 tokens"):
        encode(as_split(["good"], pairs), tokenizer, max_length)


# Benchmarks as published


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "texts", "label_names", "report_split", "sizes"),
    [
        ("sst2", ("sentence",), 2, "validation", (65_349, 2_000, 872)),
        ("mnli", ("premise", "hypothesis"), 3, "validation_matched", (46_364, 2_000, 9_815)),
        ("imdb", ("text",), 2, "test", (22_877, 2_000, 25_000)),
    ],
)
def test_published_benchmarks_load_without_a_word_of_help(name, texts, label_names, report_split, sizes):
    corpus = load(SHARED_DATA / name)
    assert (corpus.columns.texts, corpus.columns.label) == (texts, "label")
    assert (len(corpus.label_names), corpus.report_split) == (label_names, report_split)
    assert (len(corpus.train), len(corpus.search), len(corpus.report)) == sizes


@needs_shared_data
def test_the_search_split_of_sst2_has_its_label_shares():
    corpus = load(SHARED_DATA / "sst2", train_limit=4_000)
    expected = round(2_000 * 29_780 / 67_349)
    assert Counter(corpus.search["label"]) == {0: expected, 1: 2_000 - expected}
    assert len(corpus.train) == 4_000
