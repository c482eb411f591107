"""What every family of encoders has to pass, on random weights; a new one needs a line in `SMALL`."""

import ast
import copy
import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedTokenizerFast

from model.encoder import HEADS, CheckpointError, LengthAdaptiveModel, max_tokens, significant
from model.evaluate import Evaluator
from model.export import write_transformers_folder
from model.families import FAMILIES, TOKEN_TASKS
from model.front_file import ServedFront, ServedPoint
from model.length_config import LengthConfig
from model.macs import layer_macs
from model.packed import PackedNetwork
from model.precision import RoundedLinear
from model.prepacked import PackedLinear
from model.remote_code import standalone_source
from model.train import TrainingSettings, train
from model.training import with_dropout

VOCABULARY, FIRST_WORD, LAYERS, WIDTH = 60, 5, 4, 32
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_labels": 5,
    "pad_token_id": 0,
}
DISTILBERT_TOO = ("vocab_size", "max_position_embeddings", "num_labels", "pad_token_id")
DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
MODERN = {name: 1 for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")} | {"local_attention": 6}
SMALL = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "camembert": {"pad_token_id": 1, "type_vocab_size": 1},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": WIDTH, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4},
    "albert": {"embedding_size": 16, "num_hidden_groups": 2},
    "mpnet": {"pad_token_id": 1},
    "deberta-v2": DEBERTA_V3,
    "modernbert": MODERN,
}
VARIANTS = {
    **{name: (name, changes) for name, changes in SMALL.items()},
    "electra of one width": ("electra", {"embedding_size": WIDTH}),
    "albert with inner groups": ("albert", {"embedding_size": 16, "num_hidden_layers": 2, "inner_group_num": 2}),
    "deberta-v2 with keys of its own": (
        "deberta-v2",
        {**DEBERTA_V3, "share_att_key": False, "position_buckets": -1, "max_relative_positions": 12},
    ),
    "deberta-v2 without distances": (
        "deberta-v2",
        {"relative_attention": False, "pos_att_type": None, "type_vocab_size": 2},
    ),
}
SHORT = LengthConfig.from_retention((0.9, 0.7, 0.7, 0.5))
MILD, STRONG = LengthConfig.from_retention((0.9,) * LAYERS), LengthConfig.from_retention((0.5,) * LAYERS)
SKIPS = ((0,), (3,), (1, 2), (0, 1, 3))
SHORT_AND_SHALLOW = LengthConfig.from_retention((0.9, 0.7, 0.7, 0.5), skipped=(0, 2))
SKIPPING = LengthConfig.from_retention((0.8, 1.0, 0.7, 1.0), skipped=(1, 3))
LENGTHS = (19, 30, 3, 30, 12)


def build(variant, task="classification", seed=0, **changes):
    """A random network in evaluation mode, every bias and LayerNorm random too."""
    model_type, own = VARIANTS[variant]
    common = {name: value for name, value in COMMON.items() if model_type != "distilbert" or name in DISTILBERT_TOO}
    config = AutoConfig.for_model(model_type, **{**common, **own, **changes})
    if task == "question-answering":
        config.num_labels = 2
    network = HEADS[task].from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            norm = weight.dim() == 1 and name.endswith("weight")
            weight.normal_(mean=1.0 if norm else 0.0, std=0.3 if weight.dim() > 1 else 0.1, generator=generator)
    return network


def batch_of(network, lengths, seed=0):
    """Random sequences, padded on the right as the family's tokenizer would."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    words = torch.randint(FIRST_WORD, VOCABULARY, size, generator=generator)
    batch = {
        "input_ids": words.where(mask, torch.tensor(network.config.pad_token_id)),
        "attention_mask": mask.long(),
    }
    if getattr(network.config, "type_vocab_size", 0) > 1 and network.config.model_type != "mpnet":
        batch["token_type_ids"] = torch.randint(0, 2, size, generator=generator) * mask
    return batch


def tokenizer_of(network):
    """Knows the words w0, w1, ... of a network."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w4")),
        pad_token=f"w{network.config.pad_token_id}",
    )


def without_layers(network, skipped):
    """A copy of a transformers network from whose list of layers some are gone."""
    shallow = copy.deepcopy(network)
    config, base = shallow.config, shallow.base_model
    remaining = [layer for layer in range(LAYERS) if layer not in skipped]
    if config.model_type == "albert":
        base.encoder.albert_layer_groups = nn.ModuleList(albert_use(config, base.encoder, layer) for layer in remaining)
        config.num_hidden_groups, config.inner_group_num = len(remaining), 1
    elif config.model_type == "modernbert":
        base.layers = nn.ModuleList(base.layers[layer] for layer in remaining)
        config.layer_types = [config.layer_types[layer] for layer in remaining]
    else:
        encoder = base.transformer if config.model_type == "distilbert" else base.encoder
        encoder.layer = nn.ModuleList(encoder.layer[layer] for layer in remaining)
    config.num_hidden_layers = len(remaining)
    return shallow


def albert_use(config, encoder, layer):
    """One use of ALBERT's shared layers, as a group of its own."""
    use, inner = divmod(layer, config.inner_group_num)
    group = copy.deepcopy(encoder.albert_layer_groups[use * config.num_hidden_groups // config.num_hidden_layers])
    group.albert_layers = nn.ModuleList([group.albert_layers[inner]])
    return group


@pytest.fixture(params=VARIANTS)
def family_variant(request):
    return request.param


@pytest.fixture
def network(family_variant):
    return build(family_variant)


@pytest.fixture
def model(network):
    return LengthAdaptiveModel(network).eval()


@pytest.fixture(params=["attention", "value_norm"])
def scored_model(request, model):
    model.token_score = request.param
    return model


def test_every_family_is_tested():
    assert SMALL.keys() == FAMILIES.keys()


@torch.no_grad()
@pytest.mark.parametrize("lengths", [LENGTHS, (30,), (2, 1)])
def test_without_a_config_it_is_the_transformers_model(network, model, lengths):
    batch = batch_of(network, lengths)
    torch.testing.assert_close(model(**batch).logits, network(**batch).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_longest_sequence_is_as_long_as_positions_allow(network, model, tmp_path):
    network.save_pretrained(tmp_path)
    longest = max_tokens(tmp_path)
    batch = batch_of(network, [longest])
    torch.testing.assert_close(model(**batch).logits, network(**batch).logits, rtol=0, atol=1e-5)
    if network.config.model_type not in ("deberta-v2", "modernbert"):  # which have no table of positions
        with pytest.raises((IndexError, RuntimeError)):
            network(**batch_of(network, [longest + 1]))


@torch.no_grad()
def test_keeping_everything_is_the_plain_model(model):
    batch = batch_of(model.network, LENGTHS)
    full = model(**batch, length_config=LengthConfig.full(model.num_layers)).logits
    torch.testing.assert_close(full, model(**batch).logits, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("skipped", SKIPS, ids=str)
def test_skipping_layers_is_the_transformers_model_without_them(network, model, skipped):
    batch = batch_of(network, LENGTHS)
    expected = without_layers(network, skipped)(**batch).logits
    logits = model(**batch, length_config=LengthConfig.full(LAYERS, skipped)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (logits - model(**batch).logits).abs().max() > 1e-2, "a layer should matter"


@torch.no_grad()
@pytest.mark.parametrize("skipped", SKIPS, ids=str)
def test_skipping_layers_and_dropping_tokens_go_together(network, scored_model, skipped):
    batch, retention = batch_of(network, LENGTHS), (0.9, 0.7, 0.7, 0.5)
    shallow = LengthAdaptiveModel(without_layers(network, skipped)).eval()
    remaining = [kept for layer, kept in enumerate(retention) if layer not in skipped]
    expected = shallow(**batch, length_config=LengthConfig.from_retention(remaining)).logits
    config = LengthConfig.from_retention(retention, skipped)
    torch.testing.assert_close(scored_model(**batch, length_config=config).logits, expected, rtol=0, atol=1e-5)
    assert shallow.macs(30, LengthConfig.from_retention(remaining)) == scored_model.macs(30, config)


@torch.no_grad()
def test_a_result_does_not_depend_on_padding_or_batch_mates(scored_model):
    model = scored_model
    batch = batch_of(model.network, LENGTHS)
    together = model(**batch, length_config=SHORT).logits
    for row, count in enumerate(LENGTHS):
        alone = {name: part[row : row + 1, :count] for name, part in batch.items()}
        torch.testing.assert_close(model(**alone, length_config=SHORT).logits[0], together[row], rtol=0, atol=1e-5)
    assert (together - model(**batch).logits).abs().max() > 1e-2, "dropping tokens should matter"


@torch.no_grad()
def test_a_dropped_token_is_one_that_nobody_sees_any_more(scored_model):
    """The oracle keeps all tokens where they are and hides the dropped ones."""
    model, family, network = scored_model, scored_model.family, scored_model.network
    batch = batch_of(network, [30])
    positions, mask = torch.arange(30)[None], torch.ones(1, 30, dtype=torch.bool)
    hidden = family.embed(network, batch["input_ids"], batch.get("token_type_ids"), positions)
    for layer, keep in enumerate(SHORT.lengths(30)):
        projected = family.project(network, layer, hidden)
        context, score = family.mix(network, layer, projected, positions, mask, with_scores=True)
        places, _ = significant(score, keep, mask)
        mask = torch.zeros_like(mask).scatter_(1, places, True)
        hidden = family.feed_forward(network, layer, family.merge(network, layer, context, hidden))
    expected = family.classify(network, hidden)
    torch.testing.assert_close(model(**batch, length_config=SHORT).logits, expected, rtol=0, atol=1e-5)


@pytest.fixture(params=TOKEN_TASKS)
def token_model(request, family_variant):
    """An encoder with a head that reads every token."""
    model = LengthAdaptiveModel(build(family_variant, request.param), request.param).eval()
    model.token_score = "value_norm"
    return model


def every_logit(output):
    """Of a transformers model with a head that reads every token, (B, L, C)."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits


@torch.no_grad()
def test_a_token_head_reads_what_the_transformers_model_reads(token_model):
    batch = batch_of(token_model.network, LENGTHS)
    real = batch["attention_mask"].bool()
    logits = token_model(**batch).logits
    torch.testing.assert_close(logits[real], every_logit(token_model.network(**batch))[real], rtol=1e-5, atol=1e-5)
    full = token_model(**batch, length_config=LengthConfig.full(LAYERS)).logits
    torch.testing.assert_close(full, logits, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("skipped", SKIPS, ids=str)
def test_a_token_head_reads_past_skipped_layers(token_model, skipped):
    batch, retention = batch_of(token_model.network, LENGTHS), (0.9, 0.7, 0.7, 0.5)
    real = batch["attention_mask"].bool()
    network = without_layers(token_model.network, skipped)
    logits = token_model(**batch, length_config=LengthConfig.full(LAYERS, skipped)).logits
    torch.testing.assert_close(logits[real], every_logit(network(**batch))[real], rtol=1e-5, atol=1e-5)
    remaining = [kept for layer, kept in enumerate(retention) if layer not in skipped]
    shallow = LengthAdaptiveModel(network, token_model.task).eval()
    expected = shallow(**batch, length_config=LengthConfig.from_retention(remaining)).logits
    logits = token_model(**batch, length_config=LengthConfig.from_retention(retention, skipped)).logits
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_restored_tokens_do_not_depend_on_padding_or_batch_mates(token_model):
    batch = batch_of(token_model.network, LENGTHS)
    together = token_model(**batch, length_config=SHORT).logits
    for row, count in enumerate(LENGTHS):
        alone = {name: part[row : row + 1, :count] for name, part in batch.items()}
        logits = token_model(**alone, length_config=SHORT).logits[0]
        torch.testing.assert_close(logits, together[row, :count], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_dropped_token_is_back_with_the_vector_that_entered_its_last_layer(token_model):
    """The oracle keeps all tokens where they are, hides the dropped ones and writes down what they were."""
    family, network = token_model.family, token_model.network
    batch = batch_of(network, [30])
    positions, mask = torch.arange(30)[None], torch.ones(1, 30, dtype=torch.bool)
    hidden = family.embed(network, batch["input_ids"], batch.get("token_type_ids"), positions)
    last = hidden.clone()
    for layer, keep in enumerate(SHORT.lengths(30)):
        projected = family.project(network, layer, hidden)
        context, score = family.mix(network, layer, projected, positions, mask, with_scores=True)
        mask = torch.zeros_like(mask).scatter_(1, significant(score, keep, mask)[0], True)
        hidden = family.feed_forward(network, layer, family.merge(network, layer, context, hidden))
        last = torch.where(mask[:, :, None], hidden, last)
    expected = family.read_tokens(network, last)
    torch.testing.assert_close(token_model(**batch, length_config=SHORT).logits, expected, rtol=0, atol=1e-5)
    assert int(mask.sum()) == SHORT.lengths(30)[-1] < 30


def test_a_loss_is_that_of_transformers(token_model):
    batch = batch_of(token_model.network, [12, 12, 12])
    generator = torch.Generator().manual_seed(1)
    if token_model.task == "question-answering":
        labels = torch.randint(0, 12, (3, 2), generator=generator)
        theirs = token_model.network(**batch, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    else:
        labels = torch.randint(0, 5, (3, 12), generator=generator)
        labels[:, ::3] = -100
        theirs = token_model.network(**batch, labels=labels).loss
    torch.testing.assert_close(token_model(**batch, labels=labels).loss, theirs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "num_tokens"),
    [
        *((config, n) for config in (None, SHORT, LengthConfig.from_shares((1.0, 0.6, 0.6, 0.1))) for n in (1, 17, 30)),
        (SHORT_AND_SHALLOW, 17),
        (LengthConfig.full(LAYERS, (1, 2, 3)), 30),
    ],
    ids=str,
)
@pytest.mark.parametrize("task", HEADS)
def test_a_forward_pass_does_the_products_that_are_counted(family_variant, task, num_tokens, config):
    model = LengthAdaptiveModel(build(family_variant, task), task).eval()
    config = config or LengthConfig.full(LAYERS)
    shape, lengths = model.shape, [config.lengths(num_tokens)[layer] for layer in config.computed]
    batch = batch_of(model.network, [num_tokens])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch, length_config=config)
    arriving = np.array([num_tokens, *lengths[:-1]])
    without_norms = replace(shape, embedding_macs_per_token=0)
    norms = [shape.hidden_size * (n + m) for n, m in zip(arriving, lengths, strict=True)]
    products = sum(
        int(layer_macs(without_norms, n, m)) - norm for n, m, norm in zip(arriving, lengths, norms, strict=True)
    )
    products += shape.head_macs_per_sequence + num_tokens * shape.head_macs_per_token
    counted = products + num_tokens * embedding_products(model)
    assert counter.get_total_flops() == 2 * (counted + distance_products(model, len(lengths)))
    embedding = num_tokens * (shape.embedding_macs_per_token or shape.hidden_size)
    assert model.macs(num_tokens, config) == embedding + products + sum(norms)


def embedding_products(model):
    """The projection of narrower embeddings."""
    config = model.network.config
    narrow = getattr(config, "embedding_size", WIDTH)
    return narrow * WIDTH if narrow != WIDTH or config.model_type == "albert" else 0


def distance_products(model, layers):
    """DeBERTa's projections of its distances: of weights alone, so that they are no sequence's cost."""
    config = model.network.config
    if not getattr(config, "relative_attention", False):
        return 0
    distances = 2 * (config.position_buckets if config.position_buckets > 0 else config.max_relative_positions)
    return layers * len(config.pos_att_type) * distances * WIDTH * WIDTH


@torch.no_grad()
@pytest.mark.parametrize("task", HEADS)
def test_a_saved_model_loads_as_it_was(family_variant, task, tmp_path):
    changes = {"num_labels": 1} if task == "regression" else {}
    model = LengthAdaptiveModel(build(family_variant, task, **changes), task).eval()
    model.token_score = "value_norm"
    model.save_pretrained(tmp_path)
    again = LengthAdaptiveModel.from_pretrained(tmp_path, task=task).eval()
    batch = batch_of(model.network, LENGTHS)
    assert again.fingerprint() == model.fingerprint()
    for config in (None, SHORT):
        expected = model(**batch, length_config=config).logits
        torch.testing.assert_close(again(**batch, length_config=config).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", HEADS)
def test_a_step_of_sandwich_training_changes_every_weight(family_variant, task, unpadded):
    network = build(family_variant, task, **({"num_labels": 1} if task == "regression" else {}))
    model, tokenizer = LengthAdaptiveModel(network, task), tokenizer_of(network)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    settings = TrainingSettings(
        learning_rate=1e-2, batch_size=8, plain_epochs=0, epochs=1, warmup_ratio=0.0, precision="fp32"
    )
    lengths = [12, 20, 7, 9, 15, 30, 4, 11]
    labels = {
        "classification": [0, 1, 2, 3, 4, 0, 1, 2],
        "regression": np.linspace(-1, 1, 8, dtype=np.float32),
        "question-answering": [(1, 2)] * 8,
        "token-classification": 0,
    }[task]
    split = unpadded(batch_of(network, lengths), labels)
    if task == "token-classification":
        split = replace(split, labels=[[-100, *(place % 5 for place in range(count - 1))] for count in lengths])
    report = train(model, split, tokenizer, settings)
    assert report.steps == 1
    same = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert same == []


@pytest.mark.parametrize("rows_per_chunk", [18, 2048])
def test_the_engine_gives_the_answers_of_the_plain_forward_pass(scored_model, rows_per_chunk, unpadded):
    model = scored_model
    model.network.classifier = wide_head(model.network)
    batch = batch_of(model.network, [9, 4, 21, 2, 9, 30, 1, 21] * 3, seed=3)
    split = unpadded(batch)
    generator = np.random.default_rng(0)
    configs = [LengthConfig.from_retention(row) for row in generator.choice([0.4, 0.7, 0.9, 1.0], (4, LAYERS))]
    configs += [LengthConfig.from_retention((0.7, 0.9, 1.0, 0.4), skipped) for skipped in SKIPS]
    configs.append(LengthConfig.full(LAYERS))
    predictions = Evaluator(model, split, rows_per_chunk=rows_per_chunk).predict(configs)
    with torch.no_grad():
        for config, predicted in zip(configs, predictions, strict=True):
            expected = [
                int(
                    model(
                        torch.tensor([ids]),
                        token_type_ids=torch.tensor([types]) if "token_type_ids" in batch else None,
                        length_config=config,
                    ).logits.argmax()
                )
                for ids, types in zip(split.input_ids, split.token_type_ids, strict=True)
            ]
            assert predicted.tolist() == expected
    assert len({tuple(row) for row in predictions.tolist()}) > 1, "the configs should not all agree"


@pytest.mark.parametrize("task", ["regression", "question-answering", "token-classification"])
@pytest.mark.parametrize("rows_per_chunk", [18, 2048])
def test_the_engine_gives_the_logits_of_every_task(family_variant, task, rows_per_chunk, unpadded):
    changes = {"num_labels": 1} if task == "regression" else {}
    model = LengthAdaptiveModel(build(family_variant, task, **changes), task).eval()
    batch = batch_of(model.network, [9, 4, 21, 2, 9, 30, 1, 21] * 3, seed=3)
    outputs = model.network.config.num_labels
    split = unpadded(batch, outputs=outputs, per_token=task in TOKEN_TASKS)
    generator = np.random.default_rng(0)
    configs = [LengthConfig.from_retention(row) for row in generator.choice([0.4, 0.7, 0.9, 1.0], (4, LAYERS))]
    configs += [LengthConfig.from_retention((0.7, 0.9, 1.0, 0.4), skipped) for skipped in SKIPS]
    configs.append(LengthConfig.full(LAYERS))
    evaluator = Evaluator(model, split, rows_per_chunk=rows_per_chunk, num_blocks=2)
    answers = evaluator.predict(configs)
    with torch.no_grad():
        for config, told in zip(configs, answers, strict=True):
            logits = model(**batch, length_config=config).logits
            real = batch["attention_mask"].bool() if task in TOKEN_TASKS else slice(None)
            np.testing.assert_allclose(told, logits[real].flatten(), rtol=0, atol=5e-5)  # of sums in another order
    assert np.abs(answers[:-1] - answers[-1]).max() > 0.1, "dropping tokens should change something"
    assert (evaluator.predict(configs[::-1])[::-1] == answers).all(), "what is remembered should be what was computed"


@pytest.mark.parametrize("task", HEADS)
def test_packed_rows_give_the_logits_of_every_task(family_variant, task, unpadded):
    changes = {"num_labels": 1} if task == "regression" else {}
    model = LengthAdaptiveModel(build(family_variant, task, **changes), task).eval()
    model.token_score = "value_norm"
    batch = batch_of(model.network, (9, 4, 21, 2, 9, 30, 1, 21))
    split, packed = unpadded(batch), PackedNetwork(model)
    for config in (SHORT, SKIPPING, LengthConfig.full(LAYERS)):
        with torch.no_grad():
            expected = model(**batch, length_config=config).logits
        told = packed.logits(split.input_ids, split.token_type_ids, config)
        for row, own in enumerate(told):
            theirs = expected[row, : len(own)] if task in TOKEN_TASKS else expected[row]
            torch.testing.assert_close(own, theirs, rtol=0, atol=5e-5)


def wide_head(network):
    """The classifier with so many classes that dropping tokens changes answers."""
    torch.manual_seed(0)
    head = network.classifier
    last = head if isinstance(head, nn.Linear) else head.out_proj
    wide = nn.Linear(last.in_features, 200)
    nn.init.normal_(wide.weight)
    if isinstance(head, nn.Linear):
        return wide
    head.out_proj = wide
    return head


@torch.no_grad()
def test_without_dropout_training_sees_what_evaluation_sees(model):
    batch = batch_of(model.network, LENGTHS)
    expected = model(**batch, length_config=SHORT).logits
    before = model.network.config.to_dict()
    model.train()
    with with_dropout(model.network, 0.0):
        torch.testing.assert_close(model(**batch, length_config=SHORT).logits, expected)
    assert model.network.config.to_dict() == before
    with with_dropout(model.network, 0.5):
        assert not torch.allclose(model(**batch, length_config=SHORT).logits, expected)


def test_the_engine_in_bf16_rounds_the_layers_of_every_family(model, unpadded):
    split = unpadded(batch_of(model.network, LENGTHS))
    evaluator = Evaluator(model, split, precision="bf16")
    rounded = [
        module
        for module in evaluator._network.modules()
        if isinstance(module, RoundedLinear) or (isinstance(module, PackedLinear) and module.dtype == torch.bfloat16)
    ]
    assert len(rounded) >= 4 * 2
    assert evaluator.predict([SHORT]).shape == (1, len(LENGTHS))


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("modernbert", {"classifier_pooling": "mean"}, "classifier_pooling='mean'; set 'cls'"),
        ("deberta-v2", {"conv_kernel_size": 3}, "convolution after its first layer"),
    ],
)
def test_what_a_family_cannot_do_is_said(variant, changes, message, tmp_path):
    build(variant, **changes).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        LengthAdaptiveModel.from_pretrained(tmp_path)


def loaded_from(source, name):
    """A class of a file that is not on the path."""
    module = types.ModuleType("standalone")
    sys.modules["standalone"] = module  # where dataclasses look for their own module
    try:
        exec(compile(source, "standalone", "exec"), module.__dict__)
    finally:
        del sys.modules["standalone"]
    return getattr(module, name)


@torch.no_grad()
@pytest.mark.parametrize("task", HEADS)
def test_the_standalone_file_gives_the_same_logits(family_variant, task):
    """The file is the graph's code too, so that every family's graph is tested here."""
    network = build(family_variant, task)
    model = LengthAdaptiveModel(network, task).eval()
    model.token_score = "value_norm"
    source, name = standalone_source(network, model.family, task)
    assert "model" not in get_imports_of(source)
    standalone = loaded_from(source, name)(network.config).eval()
    standalone.load_state_dict(network.state_dict())
    for config in (SHORT, SKIPPING, LengthConfig.full(LAYERS)):
        standalone.config.length_config = json.loads(config.to_json())
        for lengths in (LENGTHS, (7,)):
            batch = batch_of(network, lengths)
            expected, got = model(**batch, length_config=config).logits, every_logit(standalone(**batch))
            real = batch["attention_mask"].bool() if expected.dim() == 3 else slice(None)
            torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def remote_modules(tmp_path_factory):
    """Where transformers keeps the files that it runs with `trust_remote_code`, and Python finds them."""
    folder, before = tmp_path_factory.mktemp("modules"), set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.setattr("sys.path", [*sys.path])
        yield
        for name in sys.modules.keys() - before:
            if name.partition(".")[0] == "transformers_modules":
                del sys.modules[name]


def served_points(model, configs):
    """Points of a front under these configs, whose quality nobody measured."""
    costs = [model.macs(30, config) for config in configs]
    return tuple(
        ServedPoint(
            trial=number,
            length_config=config,
            metric=0.5,
            report_metric=None,
            macs=cost,
            relative_macs=cost / model.macs(30, LengthConfig.full(LAYERS)),
        )
        for number, (config, cost) in enumerate(zip(configs, costs, strict=True))
    )


@torch.no_grad()
@pytest.mark.usefixtures("remote_modules")
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("variant", ["bert", "distilbert", "mpnet", "deberta-v2", "modernbert"])
def test_an_exported_folder_gives_the_same_logits_at_every_point_of_its_front(variant, task, tmp_path):
    """The folder is run as `hpo` does, by plain transformers, and by transformers with the file beside the weights."""
    changes = {"num_labels": 1} if task == "regression" else {}
    model = LengthAdaptiveModel(build(variant, task, **changes), task).eval()
    model.token_score = "value_norm"
    *shorter, full = points = served_points(model, (STRONG, MILD, LengthConfig.full(LAYERS)))
    front = ServedFront(
        task=task,
        kind=task,
        label_names=(),
        text_columns=("text",),
        max_length=40,
        stride=None,
        metric="quality",
        full=full,
        points=points,
        chosen=shorter[0],
    )
    write_transformers_folder(tmp_path, model, tokenizer_of(model.network), front)
    again = LengthAdaptiveModel.from_pretrained(tmp_path).eval()
    plain = HEADS[task].from_pretrained(tmp_path).eval()
    remote = HEADS[task].from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(plain) is type(model.network)
    assert remote.config.length_config == json.loads(STRONG.to_json())
    for seed, lengths in enumerate((LENGTHS, (40,), (2, 2), (5, 40, 9, 2))):
        batch = batch_of(model.network, lengths, seed)
        real = batch["attention_mask"].bool() if task in TOKEN_TASKS else slice(None)
        for point in again.front.points:
            expected = model(**batch, length_config=point.length_config).logits[real]
            remote.config.length_config = json.loads(point.length_config.to_json())
            told = [again(**batch, length_config=point.length_config).logits, every_logit(remote(**batch))]
            if point == again.front.full:
                told += [every_logit(plain(**batch)), again(**batch).logits]
            for logits in told:
                torch.testing.assert_close(logits[real], expected, rtol=0, atol=1e-4)


def get_imports_of(source):
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [getattr(node, "module", None) or node.names[0].name for node in statements]
    return {module.partition(".")[0] for module in modules}


def test_the_standalone_file_holds_one_family_and_says_what_it_cannot(network):
    source, name = standalone_source(network, FAMILIES[network.config.model_type], "classification")
    families = {type(family).__name__ for family in FAMILIES.values()}
    used = type(FAMILIES[network.config.model_type])
    assert {family for family in families if f"class {family}(" in source} == {
        base.__name__ for base in used.__mro__ if base.__name__ in families
    }
    standalone = loaded_from(source, name)(network.config)
    batch = batch_of(network, (4, 3))
    with pytest.raises(ValueError, match="pad on the right"):
        standalone(batch["input_ids"], batch["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="without trust_remote_code to train"):
        standalone(**batch, labels=torch.zeros(2))
