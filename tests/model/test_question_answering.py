"""Questions and contexts made in the test, windows of two kinds of tokenizers, spans against plain loops."""

import json
import logging
import math
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

from model.dataset_files import read_splits
from model.question_answering import (
    MAX_ANSWER_TOKENS,
    METRICS,
    QuestionData,
    WindowSplit,
    exact_match,
    f1,
    normalized,
    unfold,
)
from model.rows import Columns, DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
SQUAD, MINILM = SHARED / "data" / "squad", SHARED / "models" / "minilm-l6-h384"
needs_squad = pytest.mark.skipif(not SQUAD.is_dir(), reason="the benchmark data is not on this machine")
needs_minilm = pytest.mark.skipif(not MINILM.is_dir(), reason="the benchmark model is not on this machine")

COLUMNS = Columns(texts=("question", "context"), label="answers")
WORDS = ["who", "what", "built", "the", "old", "mill", "river", "ann", "##a", "##s", "in", "1850", ".", ",", "?", "caf"]
TEXT_WORDS = ["Who", "built", "the", "mills", "river", "Anna", "1850,", "café", "naïve", "🚂", "In", "xyz."]
PARIS = "Paris is the capital of France."


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """WordPiece: token types, a separator between question and context."""
    vocabulary = tmp_path_factory.mktemp("bert") / "vocab.txt"
    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz018," for prefix in ("", "##")]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS + letters)]
    vocabulary.write_text("\n".join(tokens), encoding="utf-8")
    return BertTokenizerFast(vocab=str(vocabulary), model_max_length=512)


@pytest.fixture(scope="module")
def roberta():
    """Byte-level BPE: no token types, two separators, several tokens of one character."""
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([" ".join(TEXT_WORDS)] * 3, vocab_size=320, special_tokens=special)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return RobertaTokenizerFast(vocab=model["vocab"], merges=merges, model_max_length=512)


@pytest.fixture(params=["bert", "roberta"], scope="module")
def tokenizer(request):
    return request.getfixturevalue(request.param)


def row(question="Who?", context=PARIS, texts=("Paris",), starts=(0,)):
    return {"question": question, "context": context, "answers": {"text": list(texts), "answer_start": list(starts)}}


def as_split(*rows):
    return datasets.Dataset.from_list(list(rows))


def check(split, columns=COLUMNS, **options):
    return QuestionData(**options).check(split, "train", columns)


def encode(rows, tokenizer, max_length, stride=8):
    data = QuestionData(stride=stride)
    return data.encode(datasets.Dataset(data.check(as_split(*rows), "train", COLUMNS).table), tokenizer, max_length)


def spelled(split, window, first, last):
    """The characters of the context from one token of a window to another, by the offsets alone."""
    begin = split.context_N2[window, 0]
    start, end = split.offsets[window][first - begin, 0], split.offsets[window][last - begin, 1]
    return split.contexts[split.question_N[window]][start:end].strip()


# Columns


def test_columns_are_found_by_their_names_in_any_case():
    split = as_split({"id": "1", "Context": "c", "QUESTION": "q", "answers": None})
    found = QuestionData().find_columns(split, None, None)
    assert found == Columns(texts=("QUESTION", "Context"), label="answers")


def test_named_columns_win():
    split = as_split({"context": "c", "question": "q", "answers": None, "passage": "p", "query": "q", "gold": None})
    find = QuestionData().find_columns
    assert find(split, ("query", "passage"), "gold") == Columns(texts=("query", "passage"), label="gold")
    assert find(split, ("query", "passage"), None) == Columns(texts=("query", "passage"), label="answers")
    assert find(split, None, "gold") == Columns(texts=("question", "context"), label="gold")


def test_missing_columns_are_named_with_the_options_that_name_them():
    split = as_split({"question": "q", "passage": "p"})
    with pytest.raises(
        DataError, match=r"no column 'context' and no column 'answers', only question \(string\)"
    ) as error:
        QuestionData().find_columns(split, None, None)
    assert "--text-columns QUESTION,CONTEXT" in str(error.value)
    assert "--label-column ANSWERS" in str(error.value)


def test_one_named_text_column_is_refused():
    with pytest.raises(DataError, match="a question and its context are two; name both with --text-columns"):
        QuestionData().find_columns(as_split(row()), ("question",), None)


def test_a_named_column_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="no column 'gold'"):
        QuestionData().find_columns(as_split(row()), None, "gold")


# Rows


def test_both_forms_of_answers_make_the_same_rows():
    lists = [row(texts=("Paris", "capital"), starts=(0, 13)), row(texts=("France",), starts=(24,))]
    structs = [
        {**entry, "answers": [{"text": t, "answer_start": s} for t, s in zip(*entry["answers"].values(), strict=True)]}
        for entry in lists
    ]
    tables = [check(as_split(*rows)).table for rows in (lists, structs)]
    assert tables[0].equals(tables[1])
    assert tables[0].column_names == ["question", "context", "answers"]
    assert str(tables[0].schema.field("answers").type) == (
        "struct<text: list<item: string>, answer_start: list<item: int64>>"
    )
    assert tables[0].to_pylist() == lists


def test_other_columns_and_integer_widths_do_not_matter():
    split = as_split({"id": "7", "title": "T", **row()})
    features = split.features.copy()
    features["answers"] = {
        "text": datasets.List(datasets.Value("large_string")),
        "answer_start": datasets.List(datasets.Value("int32")),
    }
    assert check(split.cast(features)).table.equals(check(as_split(row())).table)


def test_questions_of_one_context_form_a_group():
    rows = check(
        as_split(row("a?"), row("b?", "Rome is old.", ["Rome"]), row("c?"), row("d?", "Rome is old.", ["old"], [8]))
    )
    assert rows.group_N.tolist() == [0, 1, 0, 1]
    assert (rows.stratum_N.tolist(), rows.label_names, len(rows)) == ([0] * 4, (), 4)
    assert rows.take(np.array([1, 2])).group_N.tolist() == [1, 0]


BAD_ROWS = {
    "a blank question": (row(question=" \t"), r"Row 2 of the train split .* no text in column 'question'"),
    "a missing context": (row(context=None), r"Row 2 .* no text in column 'context'"),
    "no answer": (
        row(texts=(), starts=()),
        r"Row 2 .* no answer in column 'answers' \(only questions that their context",
    ),
    "a null answer": ({**row(), "answers": None}, r"Row 2 .* no answer .* remove"),
    "a blank answer": (row(texts=(" ",), starts=(8,)), r"Row 2 .* an answer without text or answer_start"),
    "an answer without a start": (
        row(texts=("Paris", "is"), starts=(0,)),
        r"Row 2 .* an answer without text or answer_start",
    ),
    "a null start": (row(starts=(None,)), r"Row 2 .* an answer without text or answer_start"),
    "a shifted answer": (
        row(starts=(1,)),
        r"Row 2 .* should have the answer 'Paris' at answer_start=1 of its context, but 'aris ' stands there; correct",
    ),
    "a second answer beyond the end": (
        row(texts=("Paris", "France"), starts=(0, 40)),
        r"'France' at answer_start=40 .* but '' stands",
    ),
    "a start from the end": (row(context="in Paris", starts=(-5,)), r"answer_start=-5 .* but '' stands"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(bad, message):
    with pytest.raises(DataError, match=message):
        check(as_split(row(), row(), bad))


def test_further_bad_rows_are_counted():
    with pytest.raises(DataError, match="and 2 more answers are like it"):
        check(as_split(row(), *[row(starts=(3,))] * 3))
    with pytest.raises(DataError, match="and 2 more are like it"):
        check(as_split(row(), *[row(texts=(), starts=())] * 3))


@pytest.mark.parametrize("answers", ["Paris", 3, ["Paris"], {"text": "Paris", "answer_start": 0}, {"text": ["Paris"]}])
def test_a_column_without_places_of_answers_is_refused(answers):
    with pytest.raises(DataError, match=r"Column 'answers' of the train split holds .*, not answers.*--label-column"):
        check(as_split({**row(), "answers": answers}))


def test_a_column_that_is_not_text_is_refused():
    with pytest.raises(DataError, match="Column 'question' of the train split holds int64, not text"):
        check(as_split({**row(), "question": 3}))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([{"text": [], "answer_start": []}, {"text": ["Paris"], "answer_start": [0]}], True),
        ([{"text": [], "answer_start": []}], False),
        ([[]], False),
        ([None, None], False),
        ([{"text": [""], "answer_start": [0]}], False),
    ],
)
def test_a_split_has_labels_if_any_question_is_answered(answers, expected):
    split = as_split(*({**row(), "answers": answer} for answer in answers))
    assert QuestionData().has_labels(split, COLUMNS) is expected


def test_a_split_without_the_column_has_no_labels():
    assert not QuestionData().has_labels(as_split(row()).remove_columns("answers"), COLUMNS)


def test_rows_are_counted_as_they_are_and_none_are_refused():
    data = QuestionData()
    rows = check(as_split(row()))
    assert data.count_as(rows, rows) is rows
    data.check_train(rows, COLUMNS)
    with pytest.raises(DataError, match="The train split has no questions"):
        data.check_train(rows.take(np.array([], dtype=np.int64)), COLUMNS)


# The official file


def official(num_articles=2):
    return [
        {
            "title": f"T{article}",
            "paragraphs": [
                {
                    "context": f"{name} is old.",
                    "qas": [
                        {
                            "id": f"{article}{name}{number}",
                            "question": f"{number}?",
                            "answers": [{"text": name, "answer_start": 0}],
                        }
                        for number in range(2)
                    ],
                }
                for name in ("Rome", "Bath")
            ],
        }
        for article in range(num_articles)
    ]


OFFICIAL_FORMS = {
    "one row": lambda articles: [{"version": "1.1", "data": articles}],
    "a row per article": lambda articles: [{"data": article, "version": "1.1"} for article in articles],
    "no version": lambda articles: [{"data": articles}],
}


@pytest.mark.parametrize("form", OFFICIAL_FORMS.values(), ids=OFFICIAL_FORMS)
def test_the_official_file_becomes_one_row_per_question(form):
    flat = unfold(as_split(*form(official())))
    assert flat.column_names == ["id", "title", "context", "question", "answers"]
    assert flat["id"][:] == [f"{a}{name}{n}" for a in range(2) for name in ("Rome", "Bath") for n in range(2)]
    assert flat[5] == {
        "id": "1Rome1", "title": "T1", "context": "Rome is old.", "question": "1?",
        "answers": {"text": ["Rome"], "answer_start": [0]},
    }  # fmt: skip
    assert check(flat).group_N.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("indent", [None, 1])
def test_the_official_file_is_read_from_disk(tmp_path, monkeypatch, indent):
    path = tmp_path / "dev-v1.1.json"
    path.write_text(json.dumps({"data": official(), "version": "1.1"}, indent=indent), encoding="utf-8")
    datasets.disable_progress_bars()
    read = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    datasets.enable_progress_bars()
    assert len(unfold(read)) == 8


def test_objects_of_the_official_file_may_differ_in_their_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    articles = official(6)
    del articles[1]["title"]
    articles[2]["paragraphs"][0]["note"] = "old"
    articles[3]["paragraphs"][1]["qas"][0]["plausible_answers"] = []
    articles[4]["paragraphs"][1]["qas"][1]["answers"][0]["answer_end"] = 4
    differing = [[article] for article in articles[1:5]]
    for number, part in enumerate([articles, *differing]):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"data": [articles[0], *part], "version": "v2.0"}), encoding="utf-8")
        flat = unfold(read_splits(str(path))["train"])
        assert check(flat).table.num_rows == 4 * (1 + len(part))
        assert flat["answers"][:] == [
            {"text": [name], "answer_start": [0]} for name in ("Rome",) * 2 + ("Bath",) * 2
        ] * (1 + len(part))


def test_ids_of_the_official_file_may_be_numbers():
    articles = official(1)
    for number, paragraph in enumerate(articles[0]["paragraphs"]):
        for question in paragraph["qas"]:
            question["id"] = number
    assert unfold(as_split({"data": articles}))["id"][:] == ["0", "0", "1", "1"]


@pytest.mark.parametrize("lacking", ["context", "qas", "question", "answer_start"])
def test_an_official_file_that_lacks_something_gets_a_sentence(lacking):
    articles = official(1)
    for paragraph in articles[0]["paragraphs"]:
        questions = paragraph["qas"]
        for part in (paragraph, *questions, *(answer for question in questions for answer in question["answers"])):
            part.pop(lacking, None)
    with pytest.raises(DataError, match=f"looks like SQuAD's, .*'{lacking}'"):
        unfold(as_split({"data": articles}))


def test_unanswerable_questions_of_the_official_file_are_refused_as_such():
    articles = official(1)
    articles[0]["paragraphs"][0]["qas"][1]["answers"] = []
    with pytest.raises(DataError, match=r"Row 1 .* no answer .* SQuAD 2\.0"):
        check(unfold(as_split({"data": articles})))


def test_other_datasets_are_not_unfolded():
    for split in (as_split(row()), as_split({"data": "text", "version": "1"}), as_split({"data": [1], "label": 0})):
        assert unfold(split) is split


# Windows


def test_short_pairs_are_one_window_each(bert, roberta):
    texts = "Who built the mill?", "Anna built the mill in 1850."
    split = encode([row(*texts, ["the mill"], [11])], bert, max_length=64)
    assert bert.convert_ids_to_tokens(split.input_ids[0]) == [
        *("[CLS]", "who", "built", "the", "mill", "?", "[SEP]"),
        *("ann", "##a", "built", "the", "mill", "in", "1850", ".", "[SEP]"),
    ]
    assert split.token_type_ids == [[0] * 7 + [1] * 9]
    assert (split.context_N2.tolist(), split.labels.tolist(), split.labels.dtype) == ([[7, 15]], [[10, 11]], np.int64)
    assert (split.question_N.tolist(), split.gold, split.num_truncated) == ([0], (("the mill",),), 0)
    split = encode([row(*texts, ["the mill"], [11])], roberta, max_length=200)
    assert split.token_type_ids == [[0] * len(split.input_ids[0])]
    first, end = split.context_N2[0]
    assert roberta.decode(split.input_ids[0][first:end]) == texts[1]
    assert split.input_ids[0][first - 2 : first] == [roberta.sep_token_id] * 2
    assert split.input_ids[0][end:] == [roberta.sep_token_id]


@st.composite
def asked(draw):
    """A row whose answer is a run of words of its context."""
    question = draw(st.lists(st.sampled_from(TEXT_WORDS), min_size=1, max_size=4))
    words = draw(st.lists(st.sampled_from(TEXT_WORDS), min_size=1, max_size=30))
    first = draw(st.integers(0, len(words) - 1))
    answer = " ".join(words[first : first + draw(st.integers(1, 4))])
    return row(" ".join(question), " ".join(words), [answer], [len(" ".join([*words[:first], ""]))])


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(asked(), min_size=1, max_size=3), room=st.integers(40, 120), stride=st.integers(0, 15))
def test_windows_cover_the_context_and_share_the_stride(tokenizer, rows, room, stride):
    split = encode(rows, tokenizer, room, stride)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    limit = (room - special - stride) // 2
    assert split.num_tokens.max() <= room
    assert np.all(np.diff(split.question_N) >= 0)
    for question, entry in enumerate(rows):
        whole = tokenizer(entry["question"], entry["context"])
        if len(tokenizer(entry["question"], add_special_tokens=False)["input_ids"]) > limit:
            continue
        side = whole.sequence_ids(0)
        context = [token for token, number in zip(whole["input_ids"], side, strict=True) if number == 1]
        before = whole["input_ids"][: side.index(1)]
        windows = np.flatnonzero(split.question_N == question)
        parts = []
        for window in windows:
            first, end = split.context_N2[window]
            assert split.input_ids[window][:first] == before
            parts.append(split.input_ids[window][first:end])
        joined = parts[0]
        for part in parts[1:]:
            assert joined[len(joined) - stride :] == part[:stride]
            joined = joined + part[stride:]
        assert joined == context


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(asked(), min_size=1, max_size=3), room=st.integers(40, 120))
def test_labels_spell_the_answer_or_are_zero(tokenizer, rows, room):
    split = encode(rows, tokenizer, room, stride=8)
    for window, (first, last) in enumerate(split.labels.tolist()):
        entry = rows[split.question_N[window]]
        text, start = entry["answers"]["text"][0], entry["answers"]["answer_start"][0]
        offsets = split.offsets[window]
        if (first, last) == (0, 0):
            assert offsets[0, 0] > start or offsets[-1, 1] < start + len(text)
            continue
        begin, end = split.context_N2[window]
        assert begin <= first <= last < end
        assert spelled(split, window, first, last) == text
        assert offsets[first - begin, 0] <= start < offsets[first - begin, 1]  # that place, not another of the text


@settings(max_examples=60, deadline=None)
@given(entry=asked())
def test_labels_of_whole_pairs_are_what_the_tokenizer_says(tokenizer, entry):
    whole = tokenizer(entry["question"], entry["context"])
    text, start = entry["answers"]["text"][0], entry["answers"]["answer_start"][0]
    first = whole.char_to_token(0, start, sequence_index=1)
    last = max(
        token
        for token, number in enumerate(whole.sequence_ids(0))
        if number == 1 and whole.token_to_chars(0, token).start < start + len(text)
    )
    split = encode([entry], tokenizer, max_length=512)
    assert split.labels.tolist() == [[first, last]]


def test_an_answer_of_at_most_the_stride_is_whole_in_some_window(bert):
    context = " ".join(["the old mill"] * 30)
    rows = [row("who?", context, [context[s : s + 8]], [s]) for s in range(0, len(context) - 8, 13)]
    split = encode(rows, bert, max_length=24, stride=8)
    held = split.labels[:, 1] > 0
    assert not held.all()
    assert set(split.question_N[held]) == set(range(len(rows)))


def test_an_answer_that_lacks_one_character_is_not_whole(bert):
    context = "mill" + "," * 40  # each comma is a token
    split = encode([row("who?", context, [",,,,"], [start]) for start in range(4, 41)], bert, max_length=24)
    for window, (first, last) in enumerate(split.labels.tolist()):
        start = 4 + split.question_N[window]
        whole = split.offsets[window][0, 0] <= start and start + 4 <= split.offsets[window][-1, 1]
        assert (last - first + 1 == 4) == whole
        assert (last > 0) == whole


def test_a_part_of_a_word_is_labelled_by_the_tokens_that_hold_it(bert):
    split = encode([row("who?", "Annas mills", ["na"], [2])], bert, max_length=64)
    assert spelled(split, 0, *split.labels[0]) == "Anna"  # "ann", "##a"


def test_blanks_around_an_answer_do_not_count(tokenizer):
    split = encode([row("Who?", "the mill built", [" mill "], [3])], tokenizer, max_length=512)
    assert spelled(split, 0, *split.labels[0]) == "mill"


def test_blanks_around_a_question_take_no_tokens(roberta):
    padded, plain = (encode([row(q, "the mill", ["mill"], [4])], roberta, 200) for q in (" " * 500 + "Who? ", "Who?"))
    assert padded.input_ids == plain.input_ids


def test_answers_that_no_window_holds_are_counted(bert, caplog):
    caplog.set_level(logging.INFO)
    context = " ".join(["mill"] * 60)
    split = encode([row("who?", context, [context], [0])], bert, max_length=24)
    assert not split.labels.any()
    assert "No window holds the whole answer of 1 questions" in caplog.text
    assert f"1 questions in {len(split)} windows of at most 24 tokens" in caplog.text


def test_a_long_question_is_cut_to_leave_room_for_new_context(tokenizer, caplog):
    question, context = " ".join(["river"] * 200), " ".join(["the mill"] * 40)
    split = encode(
        [row(question, context, ["mill"], [4]), row("who?", context, ["mill"], [4])], tokenizer, 60, stride=16
    )
    limit = (60 - tokenizer.num_special_tokens_to_add(pair=True) - 16) // 2
    assert f"1 questions are cut to their first {limit} tokens" in caplog.text
    long = split.question_N == 0
    sizes = split.context_N2[:, 1] - split.context_N2[:, 0]
    assert sizes[long].max() >= 16 + limit
    asked_again = tokenizer.decode(split.input_ids[0][: split.context_N2[0, 0]], skip_special_tokens=True)
    assert question.startswith(asked_again.strip())
    assert split.num_tokens.max() <= 60
    assert len({tuple(split.input_ids[w][: split.context_N2[w, 0]]) for w in np.flatnonzero(long)}) == 1


def test_without_windows_longer_pairs_are_counted_and_refused(bert):
    context = " ".join(["mill"] * 30)
    rows = [
        row("who?", context, ["mill"], [0]),
        row("who?", "the mill", ["mill"], [4]),
        row("what?", context + " mill", ["mill"], [0]),
    ]
    with pytest.raises(
        DataError,
        match=r"2 of 3 questions are longer than max_length=32 .* longest 36; allow windows .* raise --max-length",
    ):
        encode(rows, bert, max_length=32, stride=None)
    split = encode(rows, bert, max_length=36, stride=None)
    assert split.num_tokens.tolist() == [35, 7, 36]
    assert [spelled(split, window, *split.labels[window]) for window in range(3)] == ["mill"] * 3


@pytest.mark.parametrize(("max_length", "stride"), [(12, 8), (128, 128)])
def test_a_maximum_without_room_for_new_context_is_refused(bert, max_length, stride):
    message = (
        rf"max_length={max_length} .* stride={stride}; choose max_length={stride + 5} or more, or a smaller stride"
    )
    with pytest.raises(DataError, match=message):
        encode([row()], bert, max_length, stride)
    encode([row()], bert, stride + 5, stride)


def test_a_maximum_beyond_the_model_is_refused(bert):
    with pytest.raises(DataError, match=r"max_length=513; choose 4..512 tokens"):
        encode([row()], bert, 513)


def test_a_negative_stride_is_refused():
    with pytest.raises(DataError, match="stride=-1; choose 0 tokens or more"):
        QuestionData(stride=-1)


def test_a_tokenizer_that_does_not_know_places_is_refused():
    class Slow:
        is_fast, model_max_length = False, 512

        def num_special_tokens_to_add(self, pair):
            return 3

    with pytest.raises(DataError, match="Slow cannot tell where in a text its tokens stand"):
        encode([row()], Slow(), 64)


def test_a_context_without_tokens_has_empty_answers(bert):
    split = encode([row("who?", "\u200b\ufffd", ["\ufffd"], [1])], bert, max_length=16)
    assert len(split.offsets[0]) == 0
    logits = torch.zeros(1, len(split.input_ids[0]), 2)
    assert split.predictions(split.answer(logits, np.array([0])), np.array([0])) == [""]
    assert split.n_best([logits[0]], np.array([0])) == [[]]


# Spans


def plain_split(ranges, contexts=None, questions=None):
    """Windows of made-up tokens, each of one character."""
    questions = list(range(len(ranges))) if questions is None else questions
    length = max(end for _, end in ranges) + 1
    contexts = contexts or ["".join(chr(0x4E00 + i) for i in range(length))] * (max(questions) + 1)
    return WindowSplit(
        input_ids=[[0] * length] * len(ranges),
        token_type_ids=[[0] * length] * len(ranges),
        labels=np.zeros((len(ranges), 2), dtype=np.int64),
        num_truncated=0,
        question_N=np.array(questions),
        context_N2=np.array(ranges),
        offsets=[np.array([(i, i + 1) for i in range(end - start)], dtype=np.int32) for start, end in ranges],
        contexts=tuple(contexts),
        gold=tuple((context[:1],) for context in contexts),
    )


def best_span(logits_L2, start, end):
    """First and last token and score by trying all spans; of equal ones the first in reading order."""
    best = None
    for first in range(start, end):
        for last in range(first, min(end, first + MAX_ANSWER_TOKENS)):
            score = float(logits_L2[first, 0] + logits_L2[last, 1])
            if best is None or score > best[2]:
                best = (first, last, score)
    return best


@settings(deadline=None)
@given(
    data=st.data(), length=st.integers(1, 90), windows=st.integers(1, 4), seed=st.integers(0, 2**31), ties=st.booleans()
)
def test_the_best_span_is_that_of_a_plain_loop(data, length, windows, seed, ties):
    starts = [data.draw(st.integers(0, length - 1)) for _ in range(windows)]
    ranges = [(start, data.draw(st.integers(start + 1, length))) for start in starts]
    logits = torch.randn(windows, length, 2, generator=torch.Generator().manual_seed(seed))
    if ties:
        logits = logits.round()
    split = plain_split(ranges)
    answers = split.answer(logits, np.arange(windows))
    assert (answers.shape, answers.dtype) == ((windows, 3), np.float32)
    expected = [best_span(logits[window], *ranges[window]) for window in range(windows)]
    np.testing.assert_array_equal(answers, np.array(expected, dtype=np.float32))


def test_a_span_has_at_most_thirty_tokens():
    logits = torch.zeros(1, 50, 2)
    split = plain_split([(1, 49)])
    logits[0, 5, 0] = logits[0, 34, 1] = 9
    assert split.answer(logits, np.array([0])).tolist() == [[5, 34, 18]]
    logits[0, 34, 1], logits[0, 35, 1] = 0, 9
    assert split.answer(logits, np.array([0]))[0, 2] == 9


def test_an_answer_does_not_depend_on_its_batch(bert):
    rows = [
        row("who?", "the old mill in 1850", ["mill"], [8]),
        row("what built the", "mill the river ann", ["mill"], [0]),
    ]
    split = encode(rows, bert, max_length=64)
    assert split.num_tokens[0] == split.num_tokens[1]
    logits = torch.randn(2, int(split.num_tokens[0]), 2, generator=torch.Generator().manual_seed(0))
    both = split.answer(logits, np.array([0, 1]))
    np.testing.assert_array_equal(both[::-1], split.answer(logits.flip(0), np.array([1, 0])))
    np.testing.assert_array_equal(both[1:], split.answer(logits[1:], np.array([1])))


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_logits_that_are_no_numbers_still_give_a_text(bert, value):
    split = encode([row("who?", "the old mill", ["mill"], [8])], bert, max_length=64)
    logits = torch.full((1, int(split.num_tokens[0]), 2), value)
    (text,) = split.predictions(split.answer(logits, np.array([0])), np.array([0]))
    assert text in "the old mill"
    assert split.n_best([logits[0]], np.array([0])) == [[]]


# Answers of questions


def windows_of_two_questions(tokenizer):
    context = "Anna built the old mill in 1850. " * 4
    rows = [row("Who?", context, ["Anna"], [0]), row("what?", context, ["the old mill", "mill"], [11, 19])]
    return encode(rows, tokenizer, max_length=40, stride=8)


def test_the_best_window_answers_its_question(tokenizer):
    split = windows_of_two_questions(tokenizer)
    assert min(np.bincount(split.question_N)) >= 2
    rng = np.random.default_rng(0)
    spans = [sorted(rng.integers(*bounds, size=2)) for bounds in split.context_N2]
    answers = np.array([[*span, score] for span, score in zip(spans, rng.permutation(len(split)), strict=True)])
    answers = answers.astype(np.float32)
    expected = []
    for question in (0, 1):
        window = max(np.flatnonzero(split.question_N == question), key=lambda number: answers[number, 2])
        expected.append(spelled(split, window, *spans[window]))
    everything = np.arange(len(split))
    assert split.predictions(answers.reshape(-1), everything) == expected
    shuffled = rng.permutation(everything)
    assert split.predictions(answers[shuffled].reshape(-1), shuffled) == expected
    assert split.references(shuffled) == [["Anna"], ["the old mill", "mill"]]


def test_equal_windows_answer_alike_in_any_order():
    split = plain_split([(0, 4), (0, 4)], contexts=["wxyz"], questions=[0, 0])
    answers = np.array([[0, 0, 1], [2, 2, 1]], dtype=np.float32)
    assert split.predictions(answers, np.array([0, 1])) == ["w"]
    assert split.predictions(answers[::-1], np.array([1, 0])) == ["w"]


def test_only_questions_with_a_window_are_answered(bert):
    split = windows_of_two_questions(bert)
    second = np.flatnonzero(split.question_N == 1)
    answers = np.column_stack([split.context_N2[second][:, [0, 0]], np.zeros(len(second))])
    assert len(split.predictions(answers, second)) == 1
    assert split.references(second) == [["the old mill", "mill"]]


@pytest.mark.parametrize("as_type", [list, np.array])
def test_taken_windows_answer_as_they_did(bert, as_type):
    split = windows_of_two_questions(bert)
    numbers = as_type([len(split) - 1, 0, 2])
    taken = split.take(numbers)
    assert isinstance(taken, WindowSplit)
    assert len(taken) == 3
    assert (taken.contexts, taken.gold) == (split.contexts, split.gold)
    for position, number in enumerate(numbers):
        assert taken.input_ids[position] == split.input_ids[number]
        assert taken.labels[position].tolist() == split.labels[number].tolist()
        logits = torch.randn(1, len(split.input_ids[number]), 2, generator=torch.Generator().manual_seed(position))
        before = split.answer(logits, np.array([number]))
        np.testing.assert_array_equal(taken.answer(logits, np.array([position])), before)
        assert taken.predictions(before, np.array([position])) == split.predictions(before, np.array([number]))


def test_each_window_has_three_numbers_of_an_answer(bert):
    split = windows_of_two_questions(bert)
    assert split.answer_starts.tolist() == list(range(0, 3 * len(split) + 1, 3))
    assert split.answer_type is np.float32


def test_labels_as_logits_score_full_marks(tokenizer):
    split = windows_of_two_questions(tokenizer)
    answers = []
    for window, (first, last) in enumerate(split.labels.tolist()):
        logits = torch.zeros(1, len(split.input_ids[window]), 2)
        logits[0, first, 0] = logits[0, last, 1] = 5 if first else 0
        answers.append(split.answer(logits, np.array([window])).reshape(-1))
    assert [split.quality(metric, np.concatenate(answers)) for metric in METRICS] == [1.0, 1.0]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 40))
def test_the_n_best_are_those_of_a_plain_loop(tokenizer, seed, count):
    split = windows_of_two_questions(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(len(ids), 2, generator=generator) for ids in split.input_ids]
    order = np.random.default_rng(seed).permutation(len(split))
    found = split.n_best([logits[window] for window in order], order, count)
    assert len(found) == 2
    for question, candidates in enumerate(found):
        best = {}
        for window in np.flatnonzero(split.question_N == question):
            first_token, end = split.context_N2[window]
            for first in range(first_token, end):
                for last in range(first, min(end, first + MAX_ANSWER_TOKENS)):
                    text = spelled(split, window, first, last)
                    score = float(logits[window][first, 0] + logits[window][last, 1])
                    if text:
                        best[text] = max(best.get(text, -math.inf), score)
        expected = sorted(best, key=lambda text: -best[text])[:count]
        assert [candidate.text for candidate in candidates] == expected
        total = sum(math.exp(best[text]) for text in expected)
        for candidate in candidates:
            assert candidate.probability == pytest.approx(math.exp(best[candidate.text]) / total, rel=1e-5)
            assert split.contexts[question][candidate.start : candidate.end] == candidate.text
        answers = np.concatenate([split.answer(logits[w][None], np.array([w])) for w in range(len(split))])
        if predicted := split.predictions(answers, np.arange(len(split)))[question]:  # else a token of blanks alone
            assert predicted == candidates[0].text


def test_huge_scores_do_not_overflow():
    split = plain_split([(0, 3)], contexts=["abc"])
    (candidates,) = split.n_best([torch.full((4, 2), 3e4)], np.array([0]))
    assert [candidate.text for candidate in candidates] == ["a", "ab", "abc", "b", "bc", "c"]
    assert [candidate.probability for candidate in candidates] == pytest.approx([1 / 6] * 6)


def test_wrong_arguments_of_n_best_are_refused():
    split = plain_split([(0, 3)])
    with pytest.raises(ValueError, match="count=0; choose 1 or more"):
        split.n_best([torch.zeros(4, 2)], np.array([0]), count=0)
    with pytest.raises(ValueError, match="logits of 2 windows for 1 sequences"):
        split.n_best([torch.zeros(4, 2)] * 2, np.array([0]))
    assert split.n_best([], np.array([], dtype=np.int64)) == []


# Metrics


def test_f1_is_the_metric_unless_another_is_named():
    assert [(metric.name, metric.compute) for metric in METRICS] == [("f1", f1), ("exact_match", exact_match)]
    assert QuestionData.metrics == METRICS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Mill", "mill"),
        ("a mill, an axe & the theatre", "mill axe theatre"),
        ("U.S.A.", "usa"),
        ("the-mill", "themill"),  # punctuation goes before articles do
        ("«naïve»\u00a0café", "«naïve» café"),  # only ASCII punctuation, every kind of blank
        ("The.", ""),
    ],
)
def test_texts_are_compared_without_what_does_not_matter(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "words"),
    [
        ("the Old Mill!", ["old mill"], 1, 1),
        ("old mill", ["river", "old mill"], 1, 1),
        ("old mill", ["the old mill of Anna"], 0, 2 * 1 * (2 / 4) / (1 + 2 / 4)),
        ("mill mill", ["mill"], 0, 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # a word counts as often as it stands in both
        ("mill mill", ["mill of mill"], 0, 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("river", ["old mill"], 0, 0),
        ("", ["old mill"], 0, 0),
        ("The", ["a"], 1, 0),  # nothing is left of either: so the official evaluation of 1.1
    ],
)
def test_metrics_of_one_question(prediction, golds, exact, words):
    assert exact_match([prediction], [golds]) == exact
    assert f1([prediction], [golds]) == pytest.approx(words)


def test_metrics_are_means_over_questions():
    predictions, references = ["mill", "river", "old mill"], [["mill"], ["mill"], ["old"]]
    assert exact_match(predictions, references) == pytest.approx(1 / 3)
    assert f1(predictions, references) == pytest.approx((1 + 0 + 2 / 3) / 3)


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], [["a"], ["b"]]), (["a"], [[]])])
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_metrics_refuse_what_does_not_match(metric, predictions, references):
    with pytest.raises(ValueError, match=f"Got {len(predictions)} predictions for {len(references)} questions"):
        metric.compute(predictions, references)


# The published development set


@pytest.fixture(scope="module")
def published():
    return pq.read_table(SQUAD / "validation.parquet").to_pylist()


def shifted(entry):
    text, start = entry["answers"]["text"][0], entry["answers"]["answer_start"][0]
    return " ".join(entry["context"][start:].split(" ")[1 : 1 + len(text.split())])


def test_empty_predictions_are_wrong():
    assert (f1(["", "mill"], [["mill"], ["mill"]]), exact_match(["", "mill"], [["mill"], ["mill"]])) == (0.5, 0.5)


def shouted(entry):
    return f"The, {entry['answers']['text'][0].upper()}!?"


def first_sentence(entry):
    return entry["context"].split(". ")[0]


# Exact match and F1 of predictions made from the set itself. The figures are what a copy of the authors'
# evaluate-v1.1.py returned for these very predictions. torchmetrics 1.9 (`functional.text.squad`), which follows the
# evaluation of 2.0 where nothing is left of a text, agrees to within 1e-5, as much as its float32 sums lose.
OFFICIAL_FIGURES = {
    "shifted words": (shifted, 0.02346263008514664, 0.49216535230034495),
    "wrong case and punctuation": (shouted, 0.9998107852412488, 0.9998107852412488),
    "the first sentence": (first_sentence, 0.0002838221381267739, 0.0975613384389411),
    "every third empty": (None, 0.6666035950804163, 0.6666035950804163),
}


@needs_squad
@pytest.mark.parametrize(("predict", "exact", "words"), OFFICIAL_FIGURES.values(), ids=OFFICIAL_FIGURES)
def test_corrupted_answers_get_the_official_figures(published, predict, exact, words):
    golds = [entry["answers"]["text"] for entry in published]
    if predict is None:
        predictions = ["" if number % 3 == 0 else texts[0] for number, texts in enumerate(golds)]
    else:
        predictions = [predict(entry) for entry in published]
    assert exact_match(predictions, golds) == pytest.approx(exact, abs=1e-12)
    assert f1(predictions, golds) == pytest.approx(words, abs=1e-12)


@needs_squad
def test_human_answers_get_the_official_figures(published):
    """The second answer of each question as the prediction, the others as gold, as Rajpurkar et al. 2016 describe it.

    They print 80.3 and 90.5 for the development set, which this does not reproduce: on the set as it is published
    today, a copy of the authors' evaluate-v1.1.py returns the figures below. Three questions have one answer only and
    are left out. Of several other readings of the procedure none gives both printed figures; to keep the first three
    answers of each question comes closest (0.8031 and 0.9040), which says nothing about how they did it.
    """
    several = [entry["answers"]["text"] for entry in published if len(entry["answers"]["text"]) > 1]
    assert len(several) == 10_567
    predictions, golds = [texts[1] for texts in several], [[texts[0], *texts[2:]] for texts in several]
    assert exact_match(predictions, golds) == pytest.approx(0.8152739661209426, abs=1e-12)
    assert f1(predictions, golds) == pytest.approx(0.9104449323137314, abs=1e-12)


@needs_squad
@needs_minilm
def test_windows_of_the_development_set_hold_their_answers(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    split = datasets.Dataset(pq.read_table(SQUAD / "validation.parquet"))
    data = QuestionData()
    begin = time.perf_counter()
    rows = data.check(split, "validation", data.find_columns(split, None, None))
    encoded = data.encode(datasets.Dataset(rows.table), tokenizer, max_length=384)
    assert time.perf_counter() - begin < 30
    assert len(rows) == 10_570
    assert encoded.num_tokens.max() == 384
    answers = rows.table.column("answers").to_pylist()
    held = set()
    for window, (first, last) in enumerate(encoded.labels.tolist()):
        if last:
            question, begin_token = encoded.question_N[window], encoded.context_N2[window, 0]
            start, end = encoded.offsets[window][first - begin_token, 0], encoded.offsets[window][last - begin_token, 1]
            text, place = answers[question]["text"][0], answers[question]["answer_start"][0]
            assert start <= place
            assert place + len(text) <= end
            held.add(int(question))
    assert len(held) == 10_570
