"""Counts of kept tokens against exact fractions, the text forms, and the sentences that wrong values get."""

import json
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.length_config import LengthConfig

twentieths = st.lists(st.integers(1, 20), min_size=1, max_size=6)
retentions = st.lists(st.floats(0.02, 1.0), min_size=1, max_size=12)
token_counts = st.integers(1, 600)
share_configs = retentions.map(LengthConfig.from_retention)
cap_configs = st.builds(
    lambda caps, room: LengthConfig.from_lengths(sorted(caps, reverse=True), max_length=max(caps) + room),
    st.lists(st.integers(2, 512), min_size=1, max_size=12),
    st.integers(0, 100),
)
skipping_configs = st.lists(st.tuples(st.floats(0.02, 1.0), st.booleans()), min_size=2, max_size=12).map(
    lambda layers: LengthConfig.from_retention(
        [kept for kept, _ in layers], [layer for layer, (_, skip) in enumerate(layers[:-1]) if skip]
    )
)
any_configs = share_configs | cap_configs | skipping_configs


@given(twentieths, token_counts)
def test_retention_keeps_the_exact_product_rounded_up_and_at_least_two(retention, num_tokens):
    config = LengthConfig.from_retention([twentieth / 20 for twentieth in retention])
    expected, share = [], Fraction(1)
    for twentieth in retention:
        share *= Fraction(twentieth, 20)
        expected.append(min(num_tokens, max(2, math.ceil(share * num_tokens))))
    assert config.lengths(num_tokens) == tuple(expected)


@given(cap_configs, token_counts)
def test_caps_hold_for_long_sequences_and_leave_short_ones_alone(config, num_tokens):
    assert config.lengths(num_tokens) == tuple(min(cap, num_tokens) for cap in config.caps)


@given(any_configs, token_counts)
def test_counts_never_rise_and_never_exceed_what_arrived(config, num_tokens):
    lengths = (num_tokens, *config.lengths(num_tokens))
    assert all(kept <= arriving for arriving, kept in pairwise(lengths))
    assert min(lengths) >= min(2, num_tokens)


@given(any_configs, st.lists(token_counts, min_size=1, max_size=20))
def test_the_table_has_one_row_of_counts_per_sequence(config, num_tokens):
    table = config.count_table(np.array(num_tokens))
    assert [tuple(row) for row in table.tolist()] == [config.lengths(count) for count in num_tokens]


def test_counts_of_a_worked_example():
    config = LengthConfig.from_retention((0.9, 0.9, 0.8, 0.8, 0.7, 0.7))
    assert config.lengths(100) == (90, 81, 65, 52, 37, 26)
    assert config.lengths(3) == (3, 3, 2, 2, 2, 2)
    assert config.lengths(1) == (1,) * 6


def test_rounding_noise_of_a_product_keeps_no_extra_token():
    assert 0.55 * 0.8 * 100 > 44, "the product of floats lies above the whole number"
    assert LengthConfig.from_retention((0.55, 0.8)).lengths(100)[1] == 44


def test_published_lengths_are_caps():
    config = LengthConfig.from_lengths((269, 253, 252, 202, 104, 34), max_length=384)
    assert config.lengths(384) == (269, 253, 252, 202, 104, 34)
    assert config.lengths(200) == (200, 200, 200, 200, 104, 34)


def test_full_keeps_every_token():
    assert LengthConfig.full(3) == LengthConfig.from_retention((1.0, 1.0, 1.0))
    assert LengthConfig.full(3).lengths(77) == (77, 77, 77)


def test_a_skipped_layer_drops_nothing_whatever_its_retention():
    config = LengthConfig.from_retention((0.9, 0.1, 0.5, 0.3), skipped=(3, 1))
    assert config.skipped == (1, 3)
    assert config.computed == (0, 2)
    assert config.shares == (0.9, 0.9, 0.45, 0.45)
    assert config == LengthConfig.from_retention((0.9, 1.0, 0.5, 1.0), skipped=np.array([1, 3]))
    assert config != LengthConfig.from_shares(config.shares)
    assert LengthConfig.from_retention((0.2, 0.5), skipped=[0]).lengths(100) == (100, 50)


def test_a_skipped_layer_drops_nothing_of_a_sequence_longer_than_its_caps_were_made_for():
    config = LengthConfig.from_lengths((40, 30, 30), max_length=40, skipped=(0, 2))
    assert config.lengths(30) == (30, 30, 30)
    assert config.lengths(60) == (60, 30, 30)


def test_a_skipped_layer_is_written_as_a_hyphen():
    shares = LengthConfig.from_shares((1.0, 0.5, 0.5), skipped=(0, 2))
    assert str(shares) == "-,0.5,-"
    assert shares.to_json() == '{"shares": [1.0, 0.5, 0.5], "skipped": [0, 2]}'
    caps = LengthConfig.from_lengths((384, 252, 252), max_length=384, skipped=(0, 2))
    assert str(caps) == "-,252,-@384"
    assert LengthConfig.parse(" - , 252, -@384") == caps


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        ((0,), r"layer 0 is skipped and leaves 0\.9, but 1\.0 arrive; give it 1\.0"),
        ((2,), r"layer 2 is skipped and leaves 0\.5, but 0\.9 arrive; give it 0\.9"),
        ((3,), "skipped layer 3 is none of the 3; choose from 0 to 2"),
        ((-1,), "skipped layer -1 is none of the 3"),
        ((1.0,), r"skipped layer 1\.0 is none of the 3"),
        ((True,), "skipped layer True is none of the 3"),
        (("1",), "skipped layer '1' is none of the 3"),
        ((1, 1), r"skipped=\[1, 1\]; name each layer once"),
        ((0, 1, 2), "all 3 layers are skipped; let at least one stay"),
    ],
)
def test_impossible_skips_are_refused_by_value(skipped, message):
    with pytest.raises(ValueError, match=message):
        LengthConfig.from_shares((0.9, 0.9, 0.5), skipped)


def test_skipped_layers_of_caps_leave_what_arrives():
    with pytest.raises(ValueError, match="layer 0 is skipped and leaves 30, but 40 arrive; give it 40"):
        LengthConfig.from_lengths((30, 20), max_length=40, skipped=(0,))


@given(any_configs)
def test_text_and_json_give_the_same_config_back(config):
    assert LengthConfig.parse(str(config)) == config
    assert LengthConfig.from_json(config.to_json()) == config
    assert hash(LengthConfig.parse(str(config))) == hash(config)


@given(any_configs)
def test_json_holds_plain_numbers_under_the_names_of_its_form(config):
    fields = json.loads(config.to_json())
    assert tuple(fields.pop("skipped", ())) == config.skipped
    if config.shares is not None:
        assert fields == {"shares": list(config.shares)}
    else:
        assert fields == {"lengths": list(config.caps), "max_length": config.max_length}


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("0.9,0.81", LengthConfig.from_shares((0.9, 0.81))),
        (" ( 1, 0.5 ) ", LengthConfig.from_shares((1.0, 0.5))),
        ("269,34@384", LengthConfig.from_lengths((269, 34), max_length=384)),
        ("(269, 34) @ 384", LengthConfig.from_lengths((269, 34), max_length=384)),
    ],
)
def test_parse_reads_what_people_write(text, config):
    assert LengthConfig.parse(text) == config


def test_shares_of_any_number_type_are_stored_as_floats():
    config = LengthConfig.from_shares((1, np.float32(0.5), np.float64(0.25)))
    assert config == LengthConfig.from_shares((1.0, 0.5, 0.25))
    assert str(config) == "1.0,0.5,0.25"


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((), "one share per layer, got none"),
        ((0.9, 0.0), r"share of layer 1 is 0\.0; choose a share in \(0, 1\]"),
        ((-0.1,), r"share of layer 0 is -0\.1; choose a share in \(0, 1\]"),
        ((1.01,), r"share of layer 0 is 1\.01; choose a share in \(0, 1\]"),
        ((math.nan,), r"share of layer 0 is nan; choose a share in \(0, 1\]"),
        ((1.0, math.inf), r"share of layer 1 is inf; choose a share in \(0, 1\]"),
        ((True,), r"share of layer 0 is True; choose a share in \(0, 1\]"),
        ((1.0, None), r"share of layer 1 is None; choose a share in \(0, 1\]"),
        (("0.5",), r"share of layer 0 is '0\.5'; choose a share in \(0, 1\]"),
        ((0.5, 0.6), r"share of layer 1 rises from 0\.5 to 0\.6"),
    ],
)
def test_wrong_shares_are_refused_by_value(shares, message):
    with pytest.raises(ValueError, match=message):
        LengthConfig.from_shares(shares)
    with pytest.raises(ValueError, match=message):
        LengthConfig(shares=shares)


@pytest.mark.parametrize("kept", [0.0, -1.0, 1.5, math.nan, math.inf, True, "0.5", None])
def test_wrong_retention_is_refused_by_layer_and_value(kept):
    with pytest.raises(ValueError, match="retention of layer 1 is ") as refusal:
        LengthConfig.from_retention((0.9, kept))
    assert f"{kept!r}; choose a share in (0, 1]" in str(refusal.value)


def test_retention_of_no_layer_is_refused():
    with pytest.raises(ValueError, match="one share per layer, got none"):
        LengthConfig.from_retention(())


@pytest.mark.parametrize(
    ("caps", "max_length", "message"),
    [
        ((), 384, "one length per layer"),
        ((10,), None, "the max_length they were made for"),
        ((10, 1), 384, "length of layer 1 is 1; choose a whole number from 2 up"),
        ((10, 9.0), 384, r"length of layer 1 is 9\.0; choose a whole number"),
        ((10, math.nan), 384, "length of layer 1 is nan; choose a whole number"),
        ((True,), 384, "length of layer 0 is True; choose a whole number"),
        ((10, 11), 384, "length of layer 1 rises from 10 to 11"),
        ((385,), 384, "length of layer 0 rises from 384 to 385"),
        ((10,), 384.5, r"max_length is 384\.5; choose a whole number"),
        ((10,), True, "max_length is True; choose a whole number"),
    ],
)
def test_wrong_lengths_are_refused_by_value(caps, max_length, message):
    with pytest.raises(ValueError, match=message):
        LengthConfig.from_lengths(caps, max_length=max_length)


@pytest.mark.parametrize("fields", [{}, {"shares": (0.5,), "caps": (5,), "max_length": 9}])
def test_exactly_one_form_is_given(fields):
    with pytest.raises(ValueError, match="either shares or caps"):
        LengthConfig(**fields)


def test_max_length_does_not_go_with_shares():
    with pytest.raises(ValueError, match="max_length=9 goes with caps"):
        LengthConfig(shares=(0.5,), max_length=9)


@pytest.mark.parametrize("num_tokens", [0, -3])
def test_a_sequence_has_a_token(num_tokens):
    with pytest.raises(ValueError, match=f"num_tokens={num_tokens}; a sequence has at least 1"):
        LengthConfig.full(2).lengths(num_tokens)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ",",
            "@",
            "abc",
            "0.9;0.8",
            "0.9,",
            "[0.5]",
            "nan",
            "inf",
            "True",
            "0.5,0.6",
            "1.5",
            "0",
            "-0.5",
            "-",
            "-,-",
        ),
        *("9,8@", "9,8@x", "9.0@12", "9@8", "9@8@7", "1@8", "__import__('os')"),
    ],
)
def test_unreadable_text_is_quoted_with_both_forms(text):
    with pytest.raises(ValueError, match="Cannot read length config") as refusal:
        LengthConfig.parse(text)
    message = str(refusal.value)
    assert repr(text) in message
    assert "'0.9,0.81,0.65'" in message
    assert "'269,253,252@384'" in message


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "3", "[0.5]", "{}", '{"shares": 0.5}', '{"shares": [0.5], "max_length": 3}', '{"lengths": [5]}'),
        *('{"lengths": [5], "max_length": 7.5}', '{"lengths": [5], "max_length": 9, "shares": [0.5]}'),
        *('{"shares": [0.5, 0.5], "skipped": 1}', '{"shares": [0.5, 0.5], "skipped": [1], "more": 2}'),
    ],
)
def test_json_of_another_shape_is_quoted(text):
    with pytest.raises(ValueError, match="Cannot read length config") as refusal:
        LengthConfig.from_json(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"shares": []}', "got none"),
        ('{"shares": [null]}', "share of layer 0 is None"),
        ('{"shares": [1.0, NaN]}', "share of layer 1 is nan"),
        ('{"shares": [true]}', "share of layer 0 is True"),
        ('{"shares": [[1]]}', r"share of layer 0 is \[1\]"),
        ('{"lengths": [5, "4"], "max_length": 8}', "length of layer 1 is '4'"),
        ('{"lengths": [9], "max_length": 8}', "rises from 8 to 9"),
        ('{"shares": [1.0, 0.5], "skipped": [null]}', "skipped layer None"),
        ('{"shares": [1.0, 0.5], "skipped": [[0]]}', r"skipped layer \[0\]"),
    ],
)
def test_json_with_wrong_values_is_refused_by_value(text, message):
    with pytest.raises(ValueError, match=message):
        LengthConfig.from_json(text)
