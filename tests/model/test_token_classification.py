"""Tagged words of every supported form, how they meet a model's tokens, and how answers to them are scored."""

import json
import logging

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import BertTokenizerFast, CanineTokenizer, PreTrainedTokenizerFast, RobertaTokenizerFast

from model.rows import Columns, DataError
from model.token_classification import IGNORED, METRICS, TagData, accuracy, f1, precision, recall, tokenize_words

DATA = TagData()
COLUMNS = Columns(texts=("tokens",), label="ner_tags")
NAMES = ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]
TEXTS = [["good", "film"], ["very", "badly", "."], ["xyz"]]
TAGS = [["B-PER", "I-PER"], ["O", "B-LOC", "O"], ["I-LOC"]]

strings = datasets.List(datasets.Value("string"))
integers = datasets.List(datasets.Value("int64"))
classes = datasets.List(datasets.ClassLabel(names=NAMES))


def as_split(texts=TEXTS, tags=TAGS, words="tokens", label="ner_tags", features=None):
    features = None if features is None else datasets.Features({words: strings, label: features})
    return datasets.Dataset.from_dict({words: texts, label: tags}, features=features)


def numbered(tags):
    return [[NAMES.index(tag) for tag in row] for row in tags]


def check(split, name="train"):
    return DATA.check(split, name, COLUMNS)


def encode(texts, tags, tokenizer, max_length=32):
    return DATA.encode(datasets.Dataset(check(as_split(texts, tags, features=strings)).table), tokenizer, max_length)


def names_of(split, tags):
    return [split.tag_names[tag] for tag in tags]


# Columns


@pytest.mark.parametrize(
    ("features", "words", "label"),
    [
        ({"id": datasets.Value("string"), "tokens": strings, "ner_tags": classes}, "tokens", "ner_tags"),
        ({"tokens": strings, "pos_tags": classes, "chunk_tags": classes, "ner_tags": classes}, "tokens", "ner_tags"),
        ({"tokens": strings, "pos_tags": classes, "ner_tags": strings}, "tokens", "ner_tags"),
        ({"tags": strings, "words": strings}, "words", "tags"),
        ({"words": strings, "tags": strings, "labels": classes}, "words", "labels"),
        ({"sentence": strings, "labels": strings}, "sentence", "labels"),
        ({"sentence": strings, "entities": classes}, "sentence", "entities"),
        ({"tokens": strings, "langs": strings, "ner": classes}, "tokens", "ner"),
        ({"Tokens": strings, "NER": strings}, "Tokens", "NER"),
        ({"tokens": strings, "bio": strings}, "tokens", "bio"),
        ({"text": datasets.Value("string"), "tokens": strings, "ner_tags": integers}, "tokens", "ner_tags"),
    ],
)
def test_columns_are_found(features, words, label):
    train = datasets.Dataset.from_dict({name: [] for name in features}, features=datasets.Features(features))
    assert DATA.find_columns(train, None, None) == Columns(texts=(words,), label=label)


def test_named_columns_win():
    features = datasets.Features(tokens=strings, ner_tags=classes, other=strings, more=strings)
    train = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    assert DATA.find_columns(train, ("other",), "more") == Columns(texts=("other",), label="more")
    assert DATA.find_columns(train.remove_columns("more"), None, "tokens").texts == ("other",)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ({"tokens": strings}, {"label": "y"}, r"no column 'y'.*--label-column"),
        ({"tokens": strings, "tags": classes}, {"texts": ("tokens", "tags")}, "two columns.*--text-columns"),
        ({"tokens": strings}, {}, r"none is clearly the list of tags; name it with --label-column"),
        ({"tokens": strings, "a": classes, "b": classes}, {}, "a, b could each be the list of tags.*--label-column"),
        ({"text": datasets.Value("string"), "ner_tags": classes}, {}, "none is the list of words.*--text-columns"),
        ({"a": strings, "b": strings, "tags": classes}, {}, "a, b could each be the list of words.*--text-columns"),
    ],
)
def test_unclear_columns_are_refused(features, options, message):
    train = datasets.Dataset.from_dict({name: [] for name in features}, features=datasets.Features(features))
    with pytest.raises(DataError, match=message):
        DATA.find_columns(train, options.get("texts"), options.get("label"))


# Rows


def test_tags_are_sorted_with_outside_first():
    rows = check(as_split())
    assert rows.label_names == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    assert rows.table.column("tokens").to_pylist() == TEXTS
    assert rows.table.column("tags").to_pylist() == numbered(TAGS)
    assert [str(kind) for kind in rows.table.schema.types] == ["list<item: string>", "list<item: int64>"]
    assert (rows.stratum_N.dtype, rows.stratum_N.tolist(), rows.group_N) == (np.int64, [0, 0, 0], None)


def test_class_labels_and_strings_give_the_same_rows():
    by_name, by_number = check(as_split()), check(as_split(tags=numbered(TAGS), features=classes))
    assert by_number.table.equals(by_name.table)
    assert by_number.label_names == by_name.label_names


def test_class_labels_keep_their_order():
    own = ["B-x", "I-x", "O"]
    rows = check(as_split(tags=[[0, 1], [2, 2, 2], [1]], features=datasets.List(datasets.ClassLabel(names=own))))
    assert rows.label_names == ("B-x", "I-x", "O")
    assert rows.table.column("tags").to_pylist() == [[0, 1], [2, 2, 2], [1]]


@pytest.mark.parametrize(
    "features",
    [
        datasets.Features(tokens=datasets.LargeList(datasets.Value("large_string")), ner_tags=strings),
        datasets.Features(
            tokens=datasets.List(datasets.Value("string"), length=2),
            ner_tags=datasets.List(datasets.Value("string"), length=2),
        ),
    ],
    ids=["large lists", "lists of one length"],
)
def test_other_kinds_of_lists_are_read(features):
    split = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [["O", "B-x"]]}, features=features)
    assert check(split).table.to_pydict() == {"tokens": [["a", "b"]], "tags": [[0, 1]]}


def test_a_part_of_a_dataset_is_read_as_its_rows():
    rows = check(as_split().select([2, 1]))
    assert rows.table.column("tokens").to_pylist() == [TEXTS[2], TEXTS[1]]
    assert rows.label_names == ("O", "B-LOC", "I-LOC")


def test_taken_rows_keep_the_names_of_their_tags():
    table = check(as_split()).take(np.array([1])).table
    assert datasets.Dataset(table).features["tags"].feature.names == NAMES


LOST_TAG = "a word without a tag in column 'ner_tags'"

BAD_ROWS = {
    "no words": ([*TEXTS[:2], []], [*TAGS[:2], []], None, "Row 2 of the train .* no words in column 'tokens'"),
    "no list of words": ([*TEXTS[:2], None], TAGS, None, "Row 2 of the train .* no words in column 'tokens'"),
    "a blank word": ([["a", " \n"], ["a"]], [["O", "O"], ["O"]], None, "Row 0 .* a blank word in column 'tokens'"),
    "a missing word": ([["a"], ["a", None]], [["O"], ["O", "O"]], None, "Row 1 .* a blank word in column 'tokens'"),
    "no list of tags": (TEXTS, [*TAGS[:2], None], None, "Row 2 .* no tags in column 'ner_tags'"),
    "a tag too few": (
        TEXTS * 2,
        [TAGS[0], ["O", "O"], TAGS[2]] * 2,
        None,
        "Row 1 .* has 3 words in column 'tokens' but 2 tags in column 'ner_tags', and 1 more",
    ),
    "a tag too many": ([["a"]], [["O", "O"]], None, "Row 0 .* 1 words in column 'tokens' but 2 tags"),
    "counts that even out": ([["a"], ["b", "c"]], [["O", "O"], ["O"]], None, "Row 0 .* 1 words .* 2 tags .* 1 more"),
    "a missing tag": ([["a"], ["a", "b"]], [["O"], ["O", None]], None, f"Row 1 .*{LOST_TAG}"),
    "a blank tag": ([["a"], ["a", "b"]], [["O"], ["O", ""]], None, f"Row 1 .*{LOST_TAG}"),
    "a hidden tag": ([["a"], ["a", "b"]], [[0], [0, -1]], classes, f"Row 1 .*{LOST_TAG}"),
    "a null among classes": ([["a"], ["a", "b"]], [[0], [None, 0]], classes, f"Row 1 .*{LOST_TAG}"),
    "another scheme": ([["a"]], [["S-PER"]], None, "tag 'S-PER', which is not O, B-x or I-x; .*BIOES or BILOU"),
    "a tag without prefix": ([["a"]], [["PER"]], None, "the tag 'PER', which is not"),
    "a tag without type": ([["a"]], [["B-"]], None, "the tag 'B-', which is not"),
    "a class of another scheme": (
        [["a"]],
        [[0]],
        datasets.List(datasets.ClassLabel(names=["O", "U-x"])),
        "the tag 'U-x', which is not",
    ),
    "numbers without names": ([["a"]], [[3]], integers, "tag numbers without their names; give .*strings.*ClassLabel"),
    "fractions": ([["a"]], [[0.5]], datasets.List(datasets.Value("float32")), "holds lists of float32, not lists of t"),
    "one tag per text": ([["a"]], ["O"], datasets.Value("string"), "holds string, not lists of tags.*--label-column"),
}


@pytest.mark.parametrize(("texts", "tags", "features", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_named(texts, tags, features, message):
    with pytest.raises(DataError, match=message) as raised:
        check(as_split(texts, tags, features=features))
    assert "\n" not in str(raised.value)


def test_a_class_beyond_the_names_is_refused():
    table = as_split([["a"]], [[7]], features=integers).data.table
    features = datasets.Features(tokens=strings, ner_tags=classes)
    split = datasets.Dataset(table.replace_schema_metadata(features.arrow_schema.metadata))
    with pytest.raises(DataError, match=r"Row 0 .* a tag number beyond the 5 names of column 'ner_tags'"):
        check(split)


def test_texts_that_are_not_cut_into_words_are_refused():
    split = datasets.Dataset.from_dict({"tokens": ["a b"], "ner_tags": [["O", "O"]]})
    with pytest.raises(DataError, match="'tokens' of the report split holds string, not lists of words"):
        check(split, "report")


def test_train_without_an_entity_is_refused():
    with pytest.raises(DataError, match=r"Every tag of column 'ner_tags' in train is 'O'.*--label-column"):
        DATA.check_train(check(as_split([["a", "b"]], [[0, 0]], features=classes)), COLUMNS)
    DATA.check_train(check(as_split()), COLUMNS)


@pytest.mark.parametrize(
    ("tags", "features", "expected"),
    [
        ([[0, 2]], classes, True),
        ([[-1, -1]], classes, False),
        ([[0, 0]], classes, False),
        ([[]], classes, False),
        ([["O", "B-x"]], None, True),
        ([["", ""]], None, False),
        ([["O", "O"]], None, False),
        ([[None, None]], None, False),
        ([None], None, False),
        ([[3, 0]], integers, True),
    ],
)
def test_hidden_tags_are_no_labels(tags, features, expected):
    assert DATA.has_labels(as_split([["a", "b"]], tags, features=features), COLUMNS) is expected


def test_tags_of_another_split_are_matched_by_name():
    train, other = check(as_split()), check(as_split(TEXTS[1:], TAGS[1:]), "validation")
    assert other.label_names == ("O", "B-LOC", "I-LOC")
    counted = DATA.count_as(train, other)
    assert counted.label_names == train.label_names
    assert counted.split == "validation"
    assert counted.table.equals(train.take(np.array([1, 2])).table.combine_chunks())
    assert datasets.Dataset(counted.table).features["tags"].feature.names == NAMES


def test_a_tag_that_train_does_not_have_is_refused():
    other = check(as_split([["a"]], [["B-ORG"]]), "validation")
    with pytest.raises(DataError, match=r"Tag 'B-ORG' stands in the validation split but not in train.*'O', 'B-LOC'"):
        DATA.count_as(check(as_split()), other)


def test_a_class_that_no_row_has_needs_no_counterpart_in_train():
    own = datasets.List(datasets.ClassLabel(names=["B-ORG", "O"]))
    other = check(as_split([["a"]], [[1]], features=own), "validation")
    assert DATA.count_as(check(as_split()), other).table.column("tags").to_pylist() == [[0]]


@pytest.mark.parametrize("form", ["parquet", "jsonl", "parquet of classes"])
def test_files_give_the_same_rows(tmp_path, form):
    path = tmp_path / ("train.jsonl" if form == "jsonl" else "train.parquet")
    split = as_split(tags=numbered(TAGS), features=classes) if form == "parquet of classes" else as_split()
    datasets.disable_progress_bars()
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in split.to_list()), encoding="utf-8")
    else:
        split.to_parquet(path)
    kind = "json" if form == "jsonl" else "parquet"
    loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    datasets.enable_progress_bars()
    columns = DATA.find_columns(loaded, None, None)
    assert columns == COLUMNS
    assert DATA.check(loaded, "train", columns).table.equals(check(as_split()).table)


# Tokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very", "##ly", "."]


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    return BertTokenizerFast(vocab=str(vocabulary), model_max_length=64)


def byte_level(**options):
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("Ġ", "g"), ("o", "o"), ("Ġg", "oo"), ("Ġgoo", "d"), ("b", "a"), ("Ġ", "."), ("Ġ", "ba")]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    return RobertaTokenizerFast(vocab=vocabulary, merges=merges, model_max_length=64, **options)


@pytest.fixture(scope="module", params=["wordpiece", "byte-level"])
def tokenizer(request, wordpiece):
    return wordpiece if request.param == "wordpiece" else byte_level()


pieces = st.sampled_from(["good", "bad", "ly", ".", "x", "é", "\u200b"])
words_of_a_text = st.lists(pieces, min_size=1, max_size=3).map("".join)
tagged_texts = st.lists(
    st.lists(st.tuples(words_of_a_text, st.sampled_from(NAMES)), min_size=1, max_size=12), min_size=1, max_size=5
)


@given(tagged=tagged_texts, max_length=st.integers(3, 30))
@example(tagged=[[("\u200b", "B-LOC")], [("good", "O"), ("bad", "O")]], max_length=3)
def test_tags_stand_at_the_first_token_of_their_word(tokenizer, tagged, max_length):
    texts, tags = ([[pair[part] for pair in row] for row in tagged] for part in (0, 1))
    split = encode(texts, tags, tokenizer, max_length)
    encoding = tokenize_words(tokenizer, texts, max_length)
    assert split.input_ids == encoding["input_ids"]
    for row, tags_of_row in enumerate(tags):
        seen, expected, first = None, [], [-1] * len(tags_of_row)
        for position, word in enumerate(encoding.word_ids(row)):
            is_first = word is not None and word != seen
            expected.append(tags_of_row[word] if is_first else None)
            if is_first:
                first[word] = position
            seen = word
        found = [None if label == IGNORED else split.tag_names[label] for label in split.labels[row]]
        assert found == expected
        assert split.first_tokens[row] == first
        assert names_of(split, split.word_tags[row]) == tags_of_row


def test_labels_of_a_small_example(wordpiece):
    split = encode(TEXTS, TAGS, wordpiece)
    assert [[WORDS[token] for token in ids] for ids in split.input_ids] == [
        ["[CLS]", "good", "film", "[SEP]"],
        ["[CLS]", "very", "bad", "##ly", ".", "[SEP]"],
        ["[CLS]", "[UNK]", "[SEP]"],
    ]
    assert split.labels == [[-100, 2, 4, -100], [-100, 0, 1, -100, 0, -100], [-100, 3, -100]]
    assert split.token_type_ids == [[0] * 4, [0] * 6, [0] * 3]
    assert split.num_truncated == 0
    assert issubclass(split.answer_type, np.integer)
    assert split.answer_starts.tolist() == [0, 4, 10, 13]


@given(texts=st.lists(st.lists(st.text("gobad.é !", min_size=1), min_size=1), min_size=1, max_size=4))
def test_byte_level_words_are_read_as_with_add_prefix_space(texts):
    expected = byte_level(add_prefix_space=True)(texts, is_split_into_words=True)
    encoding = tokenize_words(byte_level(), texts)
    assert encoding["input_ids"] == expected["input_ids"]
    assert [encoding.word_ids(row) for row in range(len(texts))] == [
        expected.word_ids(row) for row in range(len(texts))
    ]
    assert tokenize_words(byte_level(add_prefix_space=True), texts)["input_ids"] == expected["input_ids"]


def test_a_byte_level_tokenizer_of_the_generic_class_hears_spaces_too(tmp_path):
    byte_level().save_pretrained(tmp_path)
    generic = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), add_prefix_space=True)
    assert generic([["good", "good"]], is_split_into_words=True).tokens(0).count("Ġgood") == 0
    assert tokenize_words(generic, [["good", "good"]]).tokens(0) == ["<s>", "Ġgood", "Ġgood", "</s>"]


def test_a_tokenizer_that_does_not_know_words_is_refused():
    with pytest.raises(DataError, match=r"CanineTokenizer does not say which word.*tokenizer\.json"):
        encode([["good"]], [["B-x"]], CanineTokenizer(model_max_length=64))


@pytest.mark.parametrize("max_length", [0, 2, 65])
def test_a_length_without_room_is_refused(wordpiece, max_length):
    with pytest.raises(DataError, match=rf"max_length={max_length}; choose 3\.\.64"):
        encode([["good"]], [["B-x"]], wordpiece, max_length)


def test_rows_cut_off_are_counted_and_logged(wordpiece, caplog):
    caplog.set_level(logging.INFO)
    texts = [["good"] * count for count in (4, 5, 60)] + [["\u200b", "good"], ["good", "good", "good", "badly"]]
    split = encode(texts, [["B-x"] * len(words) for words in texts], wordpiece, max_length=6)
    assert split.num_truncated == 3
    assert split.num_tokens.tolist() == [6, 6, 6, 3, 6]
    assert "3 of 5 rows are truncated to 6 tokens; 57 of their words are lost" in caplog.text


def test_an_empty_split_is_encoded(wordpiece):
    table = check(as_split()).table.slice(0, 0)
    split = DATA.encode(datasets.Dataset(table), wordpiece, 16)
    assert (len(split), split.labels, split.num_truncated) == (0, [], 0)


def test_rows_beyond_the_first_batch_are_encoded_alike(wordpiece, monkeypatch):
    whole = encode(TEXTS * 3, TAGS * 3, wordpiece)
    monkeypatch.setattr("model.token_classification.ROWS_AT_ONCE", 2)
    assert encode(TEXTS * 3, TAGS * 3, wordpiece) == whole


# Answers


def right_answers(split, sequences):
    """What a perfect model would say of each token; 0, an entity in these tests, of tokens without a tag."""
    return np.array([max(label, 0) for sequence in sequences for label in split.labels[sequence]])


@given(tagged=tagged_texts, data=st.data())
def test_a_perfect_model_is_wrong_about_lost_words_alone(wordpiece, tagged, data):
    texts, tags = ([[pair[part] for pair in row] for row in tagged] for part in (0, 1))
    split = encode(texts, tags, wordpiece, max_length=data.draw(st.integers(3, 16)))
    sequences = np.array(data.draw(st.permutations(range(len(texts)))))[: data.draw(st.integers(1, len(texts)))]
    expected = []
    for sequence in sequences:
        kept = {word for word in tokenize_words(wordpiece, [texts[sequence]], split.num_tokens[sequence]).word_ids(0)}
        expected.append([tag if word in kept else "O" for word, tag in enumerate(tags[sequence])])
    assert split.predictions(right_answers(split, sequences), sequences) == expected
    assert split.references(sequences) == [tags[sequence] for sequence in sequences]


def test_lost_words_and_words_without_a_token_are_predicted_outside(wordpiece):
    texts = [["good", "\u200b", "film", "very"], ["\u200b", "bad"]]
    split = encode(texts, [["B-x"] * 4, ["B-x"] * 2], wordpiece, max_length=4)
    assert split.first_tokens == [[1, -1, 2, -1], [-1, 1]]
    everything = np.arange(2)
    answers = np.zeros(split.answer_starts[-1], dtype=np.int64)  # B-x, the only tag
    assert split.predictions(answers, everything) == [["B-x", "O", "B-x", "O"], ["O", "B-x"]]
    assert split.references(everything) == [["B-x"] * 4, ["B-x"] * 2]


def test_the_answer_is_the_likeliest_tag_of_each_token(wordpiece):
    split = encode(TEXTS, TAGS, wordpiece)
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    answers = split.answer(logits, np.array([0, 0]))
    assert (answers.dtype, answers.shape) == (np.int64, (2, 4))
    assert answers.tolist() == [[max(range(5), key=token.__getitem__) for token in row] for row in logits.tolist()]


def test_the_quality_of_a_whole_split(wordpiece):
    split = encode(TEXTS, TAGS, wordpiece)
    answers = right_answers(split, range(3))
    assert [split.quality(metric, answers) for metric in METRICS] == [1.0] * 4
    answers[split.answer_starts[2] + 1] = 0  # the last row's entity is missed
    assert split.quality(METRICS[0], answers) == pytest.approx(0.8)


def test_a_taken_split_answers_as_the_whole_does(wordpiece):
    split = encode(TEXTS, TAGS, wordpiece, max_length=4)
    whole = split.references(np.arange(3))
    part = split.take([2, 0])
    assert part.references(np.arange(2)) == [whole[2], whole[0]]
    assert part.labels == [split.labels[2], split.labels[0]]
    assert part.predictions(right_answers(part, range(2)), np.arange(2)) == [["I-LOC"], ["B-PER", "I-PER"]]
    assert (part.tag_names, part.answer_starts.tolist()) == (split.tag_names, [0, 3, 7])


# Metrics


def entities(tags):
    """(type, first word, word after the last) of each entity of a row, in any BIO."""
    found, word = set(), 0
    while word < len(tags):
        kind, end = tags[word][2:], word + 1
        if tags[word] != "O":
            while end < len(tags) and tags[end] == f"I-{kind}":
                end += 1
            found.add((kind, word, end))
        word = end
    return found


tag = st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b", "B-a-b", "I-a-b"])
aligned = st.lists(st.lists(st.tuples(tag, tag), max_size=8), min_size=1, max_size=5).filter(any)


@given(aligned)
@example([[("O", "O")]])
@example([[("B-a", "O")]])
@example([[("O", "B-a")]])
@example([[("I-a", "B-a"), ("I-b", "B-b")], [], [("I-a", "I-a")]])
def test_scores_are_those_of_sets_of_entities(pairs):
    predictions, references = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
    predicted, true = (
        {(row, *entity) for row, tags in enumerate(rows) for entity in entities(tags)}
        for rows in (predictions, references)
    )
    right = len(predicted & true)
    assert precision(predictions, references) == pytest.approx(right / len(predicted) if predicted else 0.0)
    assert recall(predictions, references) == pytest.approx(right / len(true) if true else 0.0)
    both = len(predicted) + len(true)
    assert f1(predictions, references) == pytest.approx(2 * right / both if both else 0.0)
    words = [pair for row in pairs for pair in row]
    assert accuracy(predictions, references) == pytest.approx(sum(a == b for a, b in words) / len(words))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@pytest.mark.parametrize(
    ("predictions", "references"), [([["O"]], [["O", "O"]]), ([["O"]], []), ([], []), ([[]], [[]])]
)
def test_unaligned_or_missing_tags_are_refused(metric, predictions, references):
    with pytest.raises(ValueError, match=r"Got \d tags for \d words"):
        metric.compute(predictions, references)


def test_f1_is_the_usual_metric():
    assert [metric.name for metric in METRICS] == ["f1", "precision", "recall", "accuracy"]
    assert {metric.direction for metric in METRICS} == {"maximize"}
    assert all(type(metric.compute([["B-a"]], [["B-a"]])) is float for metric in METRICS)
