"""Students cut from teachers of every family, against the teacher's own layers run one after the other."""

import pytest
import torch
from transformers import AutoConfig

from model.encoder import HEADS, LengthAdaptiveModel
from model.families import FAMILIES
from model.length_config import LengthConfig
from model.students import cut_student

VOCABULARY, LAYERS, WIDTH, LENGTHS = 60, 4, 32, (19, 30, 3, 12)
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
DISTILBERT = {"dim": WIDTH, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4} | {
    name: COMMON[name] for name in ("vocab_size", "max_position_embeddings", "num_labels", "pad_token_id")
}
DEBERTA = COMMON | {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
SPECIAL = {name: 1 for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")}
LIKE_ROBERTA = COMMON | {"pad_token_id": 1, "type_vocab_size": 1}
VARIANTS = {
    "bert": ("bert", COMMON),
    "roberta": ("roberta", LIKE_ROBERTA),
    "xlm-roberta": ("xlm-roberta", LIKE_ROBERTA),
    "camembert": ("camembert", LIKE_ROBERTA),
    "electra": ("electra", COMMON | {"embedding_size": 16}),
    "electra of one width": ("electra", COMMON | {"embedding_size": WIDTH}),
    "distilbert": ("distilbert", DISTILBERT),
    "albert": ("albert", COMMON | {"embedding_size": 16, "num_hidden_groups": 2}),
    "albert of one group": ("albert", COMMON | {"embedding_size": 16}),
    "albert with inner groups": (
        "albert",
        COMMON | {"embedding_size": 16, "num_hidden_layers": 2, "inner_group_num": 2},
    ),
    "mpnet": ("mpnet", COMMON | {"pad_token_id": 1}),
    "deberta-v2": ("deberta-v2", DEBERTA),
    "deberta-v2 with keys of its own": (
        "deberta-v2",
        DEBERTA | {"share_att_key": False, "position_buckets": -1, "max_relative_positions": 12},
    ),
    "deberta-v2 without distances": (
        "deberta-v2",
        COMMON | {"relative_attention": False, "pos_att_type": None, "type_vocab_size": 2},
    ),
    "modernbert": ("modernbert", COMMON | SPECIAL | {"local_attention": 6}),
}
CUTS = {
    "albert with inner groups": (0, 3),
    "modernbert": (0, 2, 3),  # of every third layer with global attention, two remain, neither where it was
    "albert": (0, 2),
}


def build(variant, task="classification", **changes):
    """A random teacher in evaluation mode, every bias and LayerNorm random too."""
    model_type, sizes = VARIANTS[variant]
    network = HEADS[task].from_config(AutoConfig.for_model(model_type, **{**sizes, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            norm = weight.dim() == 1 and name.endswith("weight")
            weight.normal_(mean=1.0 if norm else 0.0, std=0.3 if weight.dim() > 1 else 0.1, generator=generator)
    return LengthAdaptiveModel(network, task).eval()


def batch_of(model):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    words = torch.randint(5, VOCABULARY, mask.shape, generator=generator)
    return {
        "input_ids": words.where(mask, torch.tensor(model.network.config.pad_token_id)),
        "attention_mask": mask.long(),
    }


def logits_of_layers(model, batch, layers):
    """The teacher's logits if it had only these layers."""
    left_out = [layer for layer in range(model.num_layers) if layer not in layers]
    return model(**batch, length_config=LengthConfig.full(model.num_layers, left_out)).logits


@pytest.fixture(params=VARIANTS)
def teacher(request):
    return build(request.param)


@pytest.fixture
def cut(request, teacher):
    """Some of the teacher's layers that its architecture can be cut to."""
    return CUTS.get(request.node.callspec.params["teacher"], (0, 3))


def test_every_family_is_cut():
    assert {model_type for model_type, _ in VARIANTS.values()} == FAMILIES.keys()


@torch.no_grad()
def test_a_student_of_all_layers_equals_its_teacher(teacher):
    student = cut_student(teacher, range(LAYERS))
    assert student.fingerprint() == teacher.fingerprint()
    batch = batch_of(teacher)
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)
    short = LengthConfig.from_retention((0.9, 0.7, 0.7, 0.5))
    assert torch.equal(student(**batch, length_config=short).logits, teacher(**batch, length_config=short).logits)


@torch.no_grad()
def test_a_student_of_some_layers_is_the_teacher_without_the_others(teacher, cut, tmp_path):
    batch = batch_of(teacher)
    expected = logits_of_layers(teacher, batch, cut)
    assert (expected - teacher(**batch).logits).abs().max() > 1e-2
    student = cut_student(teacher, cut)
    assert type(student.network) is type(teacher.network)
    assert (student.num_layers, student.shape.hidden_size) == (len(cut), WIDTH)
    torch.testing.assert_close(student(**batch).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(student.network(**batch).logits, expected, rtol=0, atol=1e-5)
    student.save_pretrained(tmp_path)
    again = LengthAdaptiveModel.from_pretrained(tmp_path).eval()
    assert again.fingerprint() == student.fingerprint()
    torch.testing.assert_close(again(**batch).logits, expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("task", ["question-answering", "token-classification"])
@pytest.mark.parametrize("variant", ["bert", "distilbert", "modernbert"])
def test_heads_that_read_every_token_are_kept(variant, task):
    teacher = build(variant, task, num_labels=2)
    batch, cut = batch_of(teacher), CUTS.get(variant, (0, 3))
    student = cut_student(teacher, cut)
    assert student.task == task
    torch.testing.assert_close(student(**batch).logits, logits_of_layers(teacher, batch, cut), rtol=0, atol=1e-6)


def test_teacher_and_student_share_nothing(teacher, cut):
    before = teacher.fingerprint()
    student = cut_student(teacher, cut)
    with torch.no_grad():
        for weight in student.parameters():
            weight.fill_(7.0)
    student.token_score = "value_norm"
    assert (teacher.fingerprint(), teacher.token_score, teacher.num_layers) == (before, "attention", LAYERS)


def test_a_cut_draws_no_random_numbers(teacher, cut):
    state = torch.get_rng_state()
    cut_student(teacher, cut)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_student_ranks_tokens_and_names_classes_as_its_teacher(teacher, cut):
    teacher.token_score = "value_norm"
    teacher.network.config.id2label = {index: f"class {index}" for index in range(5)}
    student = cut_student(teacher.train(), cut)
    assert student.token_score == "value_norm"
    assert student.network.config.id2label[3] == "class 3"
    assert student.training


def test_a_layer_keeps_its_window():
    student = cut_student(build("modernbert"), (0, 2, 3))
    assert student.network.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    "layers", [(), (0, 0), (2, 0), (0, 4), (-1, 0)], ids=["none", "repeated", "descending", "too high", "negative"]
)
def test_impossible_layers_are_refused_with_those_there_are(layers):
    with pytest.raises(
        ValueError, match=r"layers=\[.*\]; choose one or more of the teacher's layers 0\.\.3, ascending"
    ):
        cut_student(build("bert"), layers)


def test_a_first_layer_that_is_built_otherwise_is_kept():
    with pytest.raises(ValueError, match=r"Layer 1 of the teacher cannot be layer 0 of a modernbert encoder.*layer 0"):
        cut_student(build("modernbert"), (1, 2))


def test_layers_that_cannot_share_weights_are_refused():
    with pytest.raises(ValueError, match=r"layer 0 of 3 has to share weights.*teacher's layer 0 are not"):
        cut_student(build("albert"), (0, 2, 3))
    with pytest.raises(ValueError, match="repeats 2 layers, choose a multiple"):
        cut_student(build("albert with inner groups"), (0, 1, 2))
