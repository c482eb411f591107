"""Drop-and-restore over random lengths, shares and masks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForTokenClassification

from model.encoder import LengthAdaptiveModel, restore
from model.length_config import LengthConfig

LAYERS = 4
retentions = st.lists(st.floats(0.05, 1.0), min_size=LAYERS, max_size=LAYERS)
lengths = st.lists(st.integers(1, 24), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def tagger(make_network):
    """A token classifier whose config is that of the random BERT."""
    torch.manual_seed(0)
    network = BertForTokenClassification(make_network().config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.normal_(mean=1.0 if name.endswith("LayerNorm.weight") else 0.0, std=0.3)
    return LengthAdaptiveModel(network, "token-classification").eval()


class Kept:
    """A family that computes as `inner` does and records the vectors that go through each feed-forward half."""

    def __init__(self, inner):
        self.inner, self.positions, self.masks, self.attended = inner, [], [], []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def mix(self, network, layer, projected, positions, mask, with_scores):
        self.positions.append(positions)
        self.masks.append(mask)
        return self.inner.mix(network, layer, projected, positions, mask, with_scores)

    def feed_forward(self, network, layer, attended):
        self.attended.append(attended)
        return self.inner.feed_forward(network, layer, attended)


@given(retentions, lengths)
@settings(max_examples=40, deadline=None)
def test_counts_never_rise_and_the_first_token_survives(tagger, make_batch, retention, counts):
    config = LengthConfig.from_retention(retention)
    family = tagger.family
    tagger.family = kept = Kept(family)
    try:
        with torch.no_grad():
            tagger(**make_batch(counts), length_config=config)
    finally:
        tagger.family = family
    arriving = [
        torch.full((len(counts),), positions.size(1)) if mask is None else mask.sum(dim=1)
        for positions, mask in zip(kept.positions, kept.masks, strict=True)
    ]
    for before, after in itertools.pairwise(arriving):
        assert (after <= before).all()
    for positions, mask in zip(kept.positions, kept.masks, strict=True):
        assert (positions[:, 0] == 0).all(), "[CLS] stays first"
        real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
        for row, seen in zip(positions, real, strict=True):
            places = row[seen].tolist()
            assert places == sorted(set(places)), "tokens keep their order"


@given(lengths)
@settings(max_examples=20, deadline=None)
def test_nothing_dropped_is_nothing_moved(tagger, make_batch, counts):
    batch = make_batch(counts)
    with torch.no_grad():
        plain = tagger(**batch).logits
        torch.testing.assert_close(
            tagger(**batch, length_config=LengthConfig.full(LAYERS)).logits, plain, rtol=0, atol=0
        )


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_restoring_equals_writing_each_vector_to_its_place(data):
    size, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    counts = [data.draw(st.integers(1, length)) for _ in range(size)]
    places = [sorted(data.draw(st.permutations(range(length)))[:count]) for count in counts]
    most = max(counts)
    restored = torch.randn(size, length, 2)
    hidden = torch.randn(size, most, 2)
    positions = torch.tensor([row + [length - 1] * (most - len(row)) for row in places])
    mask = torch.arange(most) < torch.tensor(counts)[:, None]
    expected = restored.clone()
    for sequence, row in enumerate(places):
        for slot, place in enumerate(row):
            expected[sequence, place] = hidden[sequence, slot]
    unpadded = None if all(count == most for count in counts) else mask
    torch.testing.assert_close(restore(restored, hidden, positions, unpadded), expected, rtol=0, atol=0)


@given(retentions, st.integers(6, 24))
@settings(max_examples=25, deadline=None)
def test_a_token_learns_only_through_layers_that_kept_it(tagger, make_batch, retention, count):
    config, family = LengthConfig.from_retention(retention), tagger.family
    tagger.family = kept = Kept(family)
    try:
        logits = tagger(**make_batch([count]), length_config=config).logits
    finally:
        tagger.family = family
    for layer in range(LAYERS - 1):
        there = set(kept.positions[layer + 1][0].tolist())
        assert len(there) == config.lengths(count)[layer]
        for place in range(count):
            loss = logits[0, place].square().sum()
            (gradient,) = torch.autograd.grad(loss, kept.attended[layer], retain_graph=True)
            assert bool(gradient.any()) == (place in there)
