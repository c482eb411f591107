"""The encoder against transformers' own dense model and against a token-by-token reference; loading and its errors."""

import copy
import json
import math
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from model.encoder import CheckpointError, LengthAdaptiveModel, significant
from model.length_config import LengthConfig

MINILM = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "minilm-l6-h384"

LENGTHS = (19, 30, 1, 7, 2, 30, 3, 12)
SHORTENED = [
    LengthConfig.from_retention((0.9, 0.8, 0.7, 0.5)),
    LengthConfig.from_shares((0.3, 0.3, 0.3, 0.1)),
    LengthConfig.from_shares((1.0, 0.6, 0.6, 0.6)),
    LengthConfig.from_shares((1.0, 1.0, 1.0, 0.01)),
    LengthConfig.from_lengths((25, 18, 10, 4), max_length=64),
    LengthConfig.from_lengths((12, 12, 5, 2), max_length=64),
]
shortened = pytest.mark.parametrize("config", SHORTENED, ids=str)


def kept_after(config, layer, num_tokens):
    """The rule of a length config, in plain numbers."""
    if config.shares is not None:
        return min(num_tokens, max(2, math.ceil(config.shares[layer] * num_tokens - 1e-9)))
    return min(num_tokens, config.caps[layer])


def reference_logits(network, input_ids, token_type_ids, config):
    """One sequence through transformers' own modules, tokens dropped in a plain loop.

    Args:
        network: A BertForSequenceClassification with eager attention, which returns its weights.
        input_ids: A list of ids.
        token_type_ids: A list alike.
        config: Tokens left after each layer.
    """
    hidden = network.bert.embeddings(torch.tensor([input_ids]), torch.tensor([token_type_ids]))
    for index, layer in enumerate(network.bert.encoder.layer):
        attended, weights = layer.attention(hidden)
        received = weights[0].sum(dim=(0, 1)).tolist()
        ranking = sorted(range(1, len(received)), key=lambda token: (-received[token], token))
        keep = kept_after(config, index, len(input_ids))
        survivors = [0, *sorted(ranking[: keep - 1])]
        attended = torch.stack([attended[0, token] for token in survivors])[None]
        hidden = layer.output(layer.intermediate(attended), attended)
    return network.classifier(network.bert.pooler(hidden))[0]


def slice_batch(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


@pytest.fixture
def dense(bert_folder):
    return AutoModelForSequenceClassification.from_pretrained(bert_folder).eval()


@pytest.fixture
def loaded(bert_folder):
    return LengthAdaptiveModel.from_pretrained(bert_folder).eval()


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


# The plain model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, LengthConfig.full(4)], ids=["no config", "all ones"])
@pytest.mark.parametrize("lengths", [(30, 30, 30), (30, 4, 17, 1)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("absent", [(), ("token_type_ids",)], ids=["token types", "no token types"])
def test_the_full_length_equals_the_dense_model(loaded, dense, make_batch, config, lengths, absent):
    batch = {name: tensor for name, tensor in make_batch(lengths).items() if name not in absent}
    torch.testing.assert_close(loaded(**batch, length_config=config).logits, dense(**batch).logits, rtol=0, atol=1e-5)


def test_without_a_mask_every_token_is_real(loaded, dense, make_batch):
    input_ids = make_batch((30, 4))["input_ids"]
    torch.testing.assert_close(loaded(input_ids).logits, dense(input_ids).logits, rtol=0, atol=1e-5)


def test_labels_bring_the_cross_entropy_of_the_dense_model(loaded, dense, make_batch):
    batch, labels = make_batch((9, 5, 20)), torch.tensor([4, 0, 2])
    torch.testing.assert_close(loaded(**batch, labels=labels).loss, dense(**batch, labels=labels).loss)
    assert loaded(**batch).loss is None


def test_the_gradient_equals_that_of_the_dense_model(make_network, make_batch):
    network = make_network(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    dense, model = copy.deepcopy(network).train(), LengthAdaptiveModel(network).train()
    batch, labels = make_batch((9, 5, 20)), torch.tensor([4, 0, 2])
    with torch.enable_grad():
        dense(**batch, labels=labels).loss.backward()
        model(**batch, labels=labels).loss.backward()
    for (name, expected), found in zip(dense.named_parameters(), model.network.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(not MINILM.is_dir(), reason="the pretrained encoder is not on this machine")
def test_a_pretrained_encoder_equals_its_dense_model(make_batch):
    model = LengthAdaptiveModel.from_pretrained(MINILM, num_labels=2).eval()
    dense = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=2, dtype=torch.float32).eval()
    dense.classifier.load_state_dict(model.network.classifier.state_dict())  # both heads were drawn at random
    batch = make_batch((40, 7, 23))
    expected = dense(**batch).logits
    for config in (None, LengthConfig.full(6)):
        found = model(**batch, length_config=config).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert next(model.parameters()).dtype == torch.float32


# Dropping tokens ------------------------------------------------------------------------------------------------------


@shortened
def test_a_shortened_pass_equals_the_reference_that_drops_token_by_token(loaded, bert_folder, make_batch, config):
    eager = AutoModelForSequenceClassification.from_pretrained(bert_folder, attn_implementation="eager").eval()
    batch = make_batch(LENGTHS)
    logits = loaded(**batch, length_config=config).logits
    for row, num_tokens in enumerate(LENGTHS):
        ids, types = (batch[name][row, :num_tokens].tolist() for name in ("input_ids", "token_type_ids"))
        torch.testing.assert_close(logits[row], reference_logits(eager, ids, types, config), rtol=0, atol=1e-5)


@shortened
def test_results_do_not_depend_on_batch_mates_or_padding(model, make_batch, config):
    batch = make_batch(LENGTHS)
    together = model(**batch, length_config=config).logits
    for row, num_tokens in enumerate(LENGTHS):
        alone = {name: tensor[row : row + 1, :num_tokens] for name, tensor in batch.items()}
        torch.testing.assert_close(model(**alone, length_config=config).logits[0], together[row], rtol=0, atol=1e-5)
    order = torch.tensor([5, 2, 7, 0])
    torch.testing.assert_close(
        model(**slice_batch(batch, order), length_config=config).logits, together[order], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("config", [None, *SHORTENED], ids=str)
def test_what_stands_in_the_padding_does_not_matter(model, make_batch, config):
    batch = make_batch(LENGTHS)
    filled = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 37)}
    wider = {name: nn.functional.pad(tensor, (0, 9)) for name, tensor in batch.items()}
    expected = model(**batch, length_config=config).logits
    for other in (filled, wider):
        torch.testing.assert_close(model(**other, length_config=config).logits, expected, rtol=0, atol=1e-5)


class Spy:
    """A family that computes as `inner` does and records what arrives at each half of a layer."""

    def __init__(self, inner):
        self.inner, self.arriving, self.masks, self.fed, self.scored = inner, [], [], [], []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def mix(self, network, layer, projected, positions, mask, with_scores):
        self.arriving.append(projected.size(1))
        self.masks.append(mask)
        self.scored.append(with_scores)
        return self.inner.mix(network, layer, projected, positions, mask, with_scores)

    def feed_forward(self, network, layer, attended):
        self.fed.append(attended.size(1))
        return self.inner.feed_forward(network, layer, attended)


@shortened
def test_each_sequence_keeps_exactly_the_counts_of_its_config(model, make_batch, config):
    model.family = spy = Spy(model.family)
    model(**make_batch(LENGTHS), length_config=config)
    counts = [config.lengths(num_tokens) for num_tokens in LENGTHS]
    assert spy.fed == [max(column) for column in zip(*counts, strict=True)]
    for layer in range(1, 4):
        kept = [lengths[layer - 1] for lengths in counts]
        mask = spy.masks[layer]
        found = [spy.arriving[layer]] * len(LENGTHS) if mask is None else mask.sum(dim=1).tolist()
        assert found == kept


def test_scores_are_asked_for_only_where_a_layer_drops(model, make_batch):
    for lengths, expected in (((20, 20), [False, True, False, True]), ((2, 1), [False] * 4)):
        model.family = spy = Spy(model.family)
        model(**make_batch(lengths), length_config=LengthConfig.from_shares((1.0, 0.6, 0.6, 0.3)))
        assert spy.scored == expected


@pytest.mark.parametrize("skipped", [(0,), (2,), (3,), (1, 2)], ids=str)
@pytest.mark.parametrize("config", [None, (0.9, 0.7, 0.7, 0.5), (0.3, 1.0, 0.8, 0.6)], ids=str)
def test_skipping_layers_equals_deleting_them(model, make_batch, config, skipped):
    remaining = [layer for layer in range(4) if layer not in skipped]
    network = copy.deepcopy(model.network)
    network.bert.encoder.layer = nn.ModuleList(network.bert.encoder.layer[layer] for layer in remaining)
    network.config.num_hidden_layers = len(remaining)
    if config is None:
        shorter, skipping = None, LengthConfig.full(4, skipped)
    else:
        shorter = LengthConfig.from_retention([config[layer] for layer in remaining])
        skipping = LengthConfig.from_retention(config, skipped)
    batch = make_batch(LENGTHS)
    torch.testing.assert_close(
        model(**batch, length_config=skipping).logits,
        LengthAdaptiveModel(network)(**batch, length_config=shorter).logits,
    )


def test_every_weight_of_a_shortened_pass_gets_a_gradient(model, make_batch):
    batch, labels = make_batch((9, 5, 20)), torch.tensor([4, 0, 2])
    with torch.enable_grad():
        model(**batch, labels=labels, length_config=SHORTENED[0]).loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_a_config_of_another_number_of_layers_is_refused(model, make_batch):
    with pytest.raises(ValueError, match="length config has 3 layers, the model 4"):
        model(**make_batch((5,)), length_config=LengthConfig.full(3))


def test_padding_on_the_left_is_refused(model):
    with pytest.raises(ValueError, match="starts with padding; pad on the right"):
        model(torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]]))


# Choosing tokens ------------------------------------------------------------------------------------------------------


def chosen_in_a_loop(scores, real, keep):
    """Positions kept of one sequence: [CLS], then the best scores among real tokens, earlier ones first."""
    ranking = sorted((token for token in range(1, len(scores)) if real[token]), key=lambda t: (-scores[t], t))
    return sorted([0, *ranking[: keep - 1]])


@given(st.data())
def test_significant_tokens_are_those_of_a_plain_loop(data):
    length = data.draw(st.integers(1, 12))
    # few distinct scores make ties; padding may score anything
    scores = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=1, max_size=4))
    reals = [data.draw(st.integers(1, length)) for _ in scores]
    keeps = [data.draw(st.integers(1, real)) for real in reals]
    mask = torch.arange(length) < torch.tensor(reals)[:, None]
    kept, kept_mask = significant(torch.tensor(scores, dtype=torch.float32), keeps, mask)
    assert kept.shape == (len(scores), max(keeps))
    if kept_mask is None:
        assert len(set(keeps)) == 1
        kept_mask = torch.ones(kept.shape, dtype=torch.bool)
    for row, keep in enumerate(keeps):
        expected = chosen_in_a_loop(scores[row], mask[row].tolist(), keep)
        assert kept_mask[row].tolist() == [True] * keep + [False] * (max(keeps) - keep)
        assert kept[row, :keep].tolist() == expected


def test_one_count_goes_for_all_sequences():
    kept, mask = significant(torch.tensor([[0.0, 4, 3, 2, 1], [9.0, 1, 2, 3, 4]]), 3)
    assert kept.tolist() == [[0, 1, 2], [0, 3, 4]]
    assert mask is None


@pytest.mark.parametrize(("keep", "named"), [(0, 0), (6, 6), ([3, 6], 6), ([0, 5], 0)])
def test_a_count_outside_the_arriving_tokens_is_refused(keep, named):
    with pytest.raises(ValueError, match=rf"keep={named}, but 5 tokens arrive; choose 1\.\.5"):
        significant(torch.zeros(2, 5), keep)


# Saving and loading ---------------------------------------------------------------------------------------------------


def test_a_saved_model_loads_as_it_was_here_and_in_transformers(model, make_batch, tmp_path):
    model.save_pretrained(tmp_path)
    again = LengthAdaptiveModel.from_pretrained(tmp_path).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = make_batch(LENGTHS)
    assert again.fingerprint() == model.fingerprint()
    for config in (None, SHORTENED[0]):
        expected = model(**batch, length_config=config).logits
        torch.testing.assert_close(again(**batch, length_config=config).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
    assert not list(tmp_path.glob("*.bin"))


def test_the_fingerprint_tells_any_weight_apart(model):
    before, encoder_before = model.fingerprint(), model.fingerprint(encoder_only=True)
    model.network.classifier.bias[1] += 1e-3
    assert model.fingerprint() != before
    assert model.fingerprint(encoder_only=True) == encoder_before
    model.network.bert.encoder.layer[2].output.dense.weight[0, 0] += 1e-3
    assert model.fingerprint(encoder_only=True) != encoder_before


def test_weights_stored_in_half_precision_run_in_single(make_network, make_batch, tmp_path):
    make_network().half().save_pretrained(tmp_path)
    model = LengthAdaptiveModel.from_pretrained(tmp_path).eval()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    rounded = {name: weight.half().float() for name, weight in make_network().state_dict().items()}
    for name, weight in model.network.state_dict().items():
        torch.testing.assert_close(weight, rounded[name], rtol=0, atol=0)


def test_a_checkpoint_without_a_head_gets_one_of_the_size_asked_for(make_network, make_batch, tmp_path):
    network = make_network()
    network.bert.save_pretrained(tmp_path)
    model = LengthAdaptiveModel.from_pretrained(tmp_path, num_labels=3, label_names=("bad", "fair", "good")).eval()
    assert model(**make_batch((4, 9))).logits.shape == (2, 3)
    assert model.network.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert model.fingerprint(encoder_only=True) == LengthAdaptiveModel(network).fingerprint(encoder_only=True)


def test_a_model_knows_its_sizes(model):
    assert (model.num_layers, model.device) == (4, torch.device("cpu"))


@pytest.fixture
def damaged(bert_folder, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(bert_folder, tmp_path / "copy")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(source, **options):
    """The sentence that loading `source` is refused with; it names the source."""
    with pytest.raises(CheckpointError) as refused:
        LengthAdaptiveModel.from_pretrained(source, **options)
    message = str(refused.value)
    assert str(source) in message
    assert "\n" not in message
    return message


def test_a_missing_folder_is_named(tmp_path):
    assert "There is no model folder" in refusal(tmp_path / "absent")


@pytest.mark.parametrize("source", ["./absent", "~/absent", "../a/b/absent"])
def test_a_missing_relative_folder_is_not_looked_for_on_the_hub(source):
    assert "There is no model folder" in refusal(source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_in_place_of_a_folder_is_named(bert_folder, name):
    assert "is a file; give the model's folder" in refusal(bert_folder / name)


def test_a_folder_without_config_is_named(tmp_path):
    assert "no config.json; give one that `save_pretrained` wrote" in refusal(tmp_path)


@pytest.mark.parametrize("text", ['{"model_type": "be', "{}", '{"model_type": "nonsense"}'])
def test_an_unreadable_config_is_named(damaged, text):
    (damaged / "config.json").write_text(text)
    assert "Cannot load the model in" in refusal(damaged)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "nope"}, {"vocab_size": None}]
)
def test_a_config_with_impossible_values_is_named(damaged, changes):
    change_config(damaged, **changes)
    assert "Cannot load the model in" in refusal(damaged)


@pytest.mark.parametrize("size", [0, 4, 1000, -100], ids=["empty", "no header", "cut header", "cut at the end"])
def test_truncated_weights_are_called_damaged(damaged, size):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "damaged or cut off" in refusal(damaged)


def test_pickled_weights_that_hold_something_else_are_called_damaged(damaged):
    (damaged / "model.safetensors").unlink()
    (damaged / "pytorch_model.bin").write_bytes(b"no weights at all")
    assert "damaged or cut off" in refusal(damaged)


def test_a_folder_without_weights_is_named(damaged):
    (damaged / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(damaged)


def test_another_architecture_is_named_by_its_type(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    assert "holds a 'gpt2' model; supported are bert" in refusal(tmp_path)


def test_a_decoder_is_refused(damaged):
    change_config(damaged, is_decoder=True)
    assert "is a decoder; LengthDrop needs a bidirectional encoder" in refusal(damaged)


def test_relative_positions_are_refused(damaged):
    change_config(damaged, position_embedding_type="relative_key")
    assert "'relative_key' positions; only absolute ones are supported" in refusal(damaged)


def test_weights_of_another_architecture_under_a_bert_config_are_refused(damaged):
    config = DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    DistilBertForSequenceClassification(config).save_pretrained(damaged / "other")
    shutil.copy(damaged / "other" / "model.safetensors", damaged / "model.safetensors")
    assert "of the encoder's weights (first: bert.embeddings.LayerNorm.bias)" in refusal(damaged)


def test_missing_encoder_weights_are_counted_and_the_first_is_named(damaged):
    path = damaged / "model.safetensors"
    absent = [f"bert.encoder.layer.{layer}.output.dense.weight" for layer in (2, 3)]
    save_file({name: weight for name, weight in load_file(path).items() if name not in absent}, path, {"format": "pt"})
    assert f"lacks 2 of the encoder's weights (first: {absent[0]})" in refusal(damaged)


def test_weights_of_other_shapes_than_the_config_says_are_refused(damaged):
    change_config(damaged, intermediate_size=40)
    message = refusal(damaged)
    assert "bert.encoder.layer.0.intermediate.dense.bias has the shape (48,)" in message
    assert "config.json says (40,)" in message


@pytest.mark.parametrize("options", [{"num_labels": 2}, {"label_names": ("bad", "good")}], ids=str)
def test_a_head_for_other_classes_is_refused(bert_folder, options):
    assert "classifies into 5 classes, not 2" in refusal(bert_folder, **options)


def test_a_hub_id_without_network_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "is no local folder and could not be fetched from the hub" in refusal("nobody/no-such-encoder")


def test_an_unknown_task_is_refused_with_the_known_ones(bert_folder, make_network):
    for build in (
        lambda: LengthAdaptiveModel.from_pretrained(bert_folder, task="translation"),
        lambda: LengthAdaptiveModel(make_network(), task="translation"),
    ):
        with pytest.raises(ValueError, match="task='translation' is not supported; choose one of classification"):
            build()


def test_a_network_of_another_family_is_refused():
    network = GPT2ForSequenceClassification(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(CheckpointError, match="type 'gpt2' are not supported"):
        LengthAdaptiveModel(network)


def test_a_masked_language_model_lends_its_encoder(make_network, tmp_path):
    language_model = BertForMaskedLM(BertConfig(**make_network().config.to_diff_dict())).eval()
    language_model.save_pretrained(tmp_path)
    model = LengthAdaptiveModel.from_pretrained(tmp_path, num_labels=2)
    expected = {name: weight for name, weight in language_model.state_dict().items() if name.startswith("bert.")}
    found = model.network.state_dict()
    assert len(expected) > 60
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


def test_config_that_hides_stored_layers_is_refused(bert_folder, tmp_path):
    folder = tmp_path / "shallow"
    shutil.copytree(bert_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="num_hidden_layers=2"):
        LengthAdaptiveModel.from_pretrained(folder)


# What tokens are ranked by


def test_the_ranking_is_saved_with_the_checkpoint_and_changes_what_is_kept(model, make_batch, tmp_path):
    batch, config = make_batch(LENGTHS), LengthConfig.from_shares((0.6, 0.5, 0.4, 0.2))
    by_attention, fingerprint = model(**batch, length_config=config).logits, model.fingerprint()
    full = model(**batch).logits
    assert model.token_score == "attention"
    model.token_score = "value_norm"
    by_value = model(**batch, length_config=config).logits
    assert not torch.allclose(by_value, by_attention)
    torch.testing.assert_close(model(**batch).logits, full, rtol=0, atol=0)
    assert model.fingerprint() != fingerprint
    model.save_pretrained(tmp_path)
    loaded = LengthAdaptiveModel.from_pretrained(tmp_path).eval()
    assert loaded.token_score == "value_norm"
    torch.testing.assert_close(loaded(**batch, length_config=config).logits, by_value, rtol=0, atol=1e-5)
    model.token_score = "attention"
    assert model.fingerprint() == fingerprint


def test_an_unknown_ranking_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="token_score='norm'; choose one of attention, value_norm"):
        model.token_score = "norm"
    model.network.config.token_score = "norm"
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="ranks tokens by 'norm'; supported are attention, value_norm"):
        LengthAdaptiveModel.from_pretrained(tmp_path)
