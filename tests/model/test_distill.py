"""Losses against sums written out in double precision, what passes give, the teacher's cache, and whole trainings."""

import dataclasses
import fcntl
import logging
import math
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, BertConfig, BertTokenizerFast, set_seed

from model.distill import (
    EMBEDDINGS,
    LOGITS,
    UNLIKELY,
    DistillError,
    DistillSettings,
    Learner,
    LiveTeacher,
    Piece,
    TeacherCache,
    attention_divergence,
    checked_layer_map,
    combined_loss,
    distil,
    distillation_loss,
    hidden_loss,
    imitation_loss,
    probability_loss,
    record,
    relation_loss,
    score_loss,
    student_pieces,
    teacher_pieces,
    uniform_layer_map,
)
from model.encoded import EncodedSplit
from model.encoder import HEADS, LengthAdaptiveModel
from model.students import cut_student
from model.training import TrainingDiverged


def log_softmax(logits):
    """Log-probabilities of one row of logits, in Python's own floats."""
    highest = max(logits)
    log_sum = highest + math.log(sum(math.exp(logit - highest) for logit in logits))
    return [logit - log_sum for logit in logits]


def mean_divergence(left, right, temperature):
    """Mean over rows of KL(left‖right) = sum p log(p / q), both logits divided by the temperature."""
    total = 0.0
    for row_left, row_right in zip(left.tolist(), right.tolist(), strict=True):
        log_p = log_softmax([logit / temperature for logit in row_left])
        log_q = log_softmax([logit / temperature for logit in row_right])
        total += sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
    return total / len(left)


@pytest.fixture
def student():
    return (3 * torch.randn(7, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()


@pytest.fixture
def teacher():
    return 3 * torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_forward_is_the_expectation_under_the_teacher(student, teacher, temperature):
    expected = mean_divergence(teacher, student, temperature) * temperature**2
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_reverse_is_the_expectation_under_the_student(student, teacher, temperature):
    expected = mean_divergence(student, teacher, temperature) * temperature**2
    loss = distillation_loss(student, teacher, temperature, "reverse")
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_two_directions_differ(student, teacher):
    forward, reverse = (distillation_loss(student, teacher, 1.0, kind).item() for kind in ("forward", "reverse"))
    assert abs(forward - reverse) > 0.1


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_equal_logits_have_nothing_to_learn(teacher, divergence):
    student = (teacher + 5.0).requires_grad_()  # a shift leaves the probabilities as they are
    loss = distillation_loss(student, teacher, 2.0, divergence)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert student.grad.abs().max().item() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_forward_gradient_is_the_difference_of_probabilities(student, teacher, temperature):
    distillation_loss(student, teacher, temperature).backward()
    difference = (student.detach() / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(student.grad, difference * temperature / len(student))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_detached_teacher_learns_nothing(student, divergence):
    source = torch.randn(7, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    distillation_loss(student, source.detach(), 2.0, divergence).backward()
    assert source.grad is None
    assert student.grad.abs().min().item() > 0


def test_half_precision_logits_are_compared_in_single_precision(student, teacher):
    student, teacher = student.detach().bfloat16(), teacher.bfloat16()
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mean_divergence(teacher, student, 1.0), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(student, teacher, temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}; choose a positive number"):
        distillation_loss(student, teacher, temperature)


def test_an_unknown_divergence_is_refused(student, teacher):
    with pytest.raises(ValueError, match="divergence='sideways'; choose 'forward' or 'reverse'"):
        distillation_loss(student, teacher, 1.0, "sideways")


# Per task


def model_of(task, **config):
    return SimpleNamespace(task=task, is_multi_label=config.get("is_multi_label", False))


@pytest.fixture
def padded():
    """Logits (3, 5, 2) of sequences of 5, 3 and 1 tokens, those of padding far off."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    student, teacher = (3 * torch.randn(3, 5, 2, generator=generator) for _ in range(2))
    return student.where(mask[:, :, None], 50.0), teacher.where(mask[:, :, None], -50.0), mask.long()


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_tags_are_taught_token_by_token_and_padding_is_not(padded, divergence):
    student, teacher, mask = padded
    rows = [(row, token) for row in range(3) for token in range(5) if mask[row, token]]
    left, right = (torch.stack([logits[place] for place in rows]) for logits in (teacher, student))
    expected = mean_divergence(*((left, right) if divergence == "forward" else (right, left)), 2.0) * 4
    actual = imitation_loss(model_of("token-classification"), student, teacher, mask, 2.0, divergence)
    assert actual.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_starts_and_ends_of_answers_are_distributions_over_real_tokens(padded, divergence):
    student, teacher, mask = padded
    expected = []
    for row in range(3):
        for side in range(2):
            left, right = (logits[row : row + 1, : mask[row].sum(), side] for logits in (teacher, student))
            expected.append(mean_divergence(*((left, right) if divergence == "forward" else (right, left)), 1.0))
    actual = imitation_loss(model_of("question-answering"), student, teacher, mask, 1.0, divergence)
    assert actual.item() == pytest.approx(sum(expected) / 6, rel=1e-5)


def test_each_class_of_a_label_set_is_a_distribution_of_its_own(student, teacher):
    model = model_of("classification", is_multi_label=True)
    expected = 0.0
    for column in range(4):
        left, right = (torch.stack([logits[:, column], torch.zeros(7)], 1) for logits in (teacher, student.detach()))
        expected += mean_divergence(left, right, 1.0)
    actual = imitation_loss(model, student, teacher, torch.ones(7, 3))
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_values_are_taught_by_their_squared_difference():
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert imitation_loss(model_of("regression"), student, teacher, torch.ones(2, 3)).item() == 2.5


def test_one_class_is_taught_as_before(student, teacher):
    actual = imitation_loss(model_of("classification"), student, teacher, torch.ones(7, 3), 2.0, "reverse")
    assert torch.equal(actual, distillation_loss(student, teacher, 2.0, "reverse"))


# Inside the network

COUNTS, HEADS_OF_BOTH = (5, 3, 1), 2


def softmax(scores):
    return [math.exp(score) for score in log_softmax(scores)]


def divergence(left, right):
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(left, right, strict=True) if p > 0)


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def distributions(scores):
    """What each real token of each sequence and head attends to, padding left out."""
    for row, count in enumerate(COUNTS):
        for head in range(HEADS_OF_BOTH):
            for query in range(count):
                yield softmax(scores[row][head][query][:count])


def relations(values):
    """The scaled products of value vectors, written out."""
    size = len(values[0][0][0])
    return [
        [
            [[sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(size) for y in head] for x in head]
            for head in row
        ]
        for row in values
    ]


@pytest.fixture
def mask():
    return torch.arange(5) < torch.tensor(COUNTS)[:, None]


@pytest.fixture
def inner(mask):
    """Hidden vectors, scores and values of a student and its teacher, far off at padding."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape, padding):
        real = mask.view(3, *([1] * (len(shape) - 2)), 5, 1)
        return (2 * torch.randn(3, *shape, generator=generator)).where(real, padding)

    sides = {}
    for side, padding in (("student", 70.0), ("teacher", -70.0)):
        scores = random(HEADS_OF_BOTH, 5, 5, padding=padding).where(mask[:, None, None, :], padding)
        size = 4 if side == "student" else 6
        sides[side] = SimpleNamespace(
            hidden=random(5, 6, padding=padding),
            scores=scores,
            probabilities=scores.masked_fill(~mask[:, None, None, :], UNLIKELY).softmax(-1),
            values=random(HEADS_OF_BOTH, 5, size, padding=padding),
        )
    return SimpleNamespace(**sides)


def test_hidden_vectors_are_compared_at_real_tokens(inner, mask):
    student, teacher = inner.student.hidden.tolist(), inner.teacher.hidden.tolist()
    expected = mean(
        (student[row][token][place] - teacher[row][token][place]) ** 2
        for row, count in enumerate(COUNTS)
        for token in range(count)
        for place in range(6)
    )
    assert hidden_loss(inner.student.hidden, inner.teacher.hidden, mask).item() == pytest.approx(expected, rel=1e-5)


def test_scores_are_compared_at_pairs_of_real_tokens(inner, mask):
    student, teacher = inner.student.scores.tolist(), inner.teacher.scores.tolist()
    expected = mean(
        (student[row][head][query][key] - teacher[row][head][query][key]) ** 2
        for row, count in enumerate(COUNTS)
        for head in range(HEADS_OF_BOTH)
        for query in range(count)
        for key in range(count)
    )
    assert score_loss(inner.student.scores, inner.teacher.scores, mask).item() == pytest.approx(expected, rel=1e-5)


def test_probabilities_are_compared_at_pairs_of_real_tokens(inner, mask):
    sides = (distributions(side.scores.tolist()) for side in (inner.student, inner.teacher))
    expected = mean((p - q) ** 2 for left, right in zip(*sides, strict=True) for p, q in zip(left, right, strict=True))
    actual = probability_loss(inner.student.scores, inner.teacher.probabilities, mask)
    assert actual.item() == pytest.approx(expected, rel=1e-4)


def test_attention_diverges_as_seen_by_the_teacher(inner, mask):
    sides = (distributions(side.scores.tolist()) for side in (inner.teacher, inner.student))
    expected = mean(divergence(left, right) for left, right in zip(*sides, strict=True))
    actual = attention_divergence(inner.student.scores, inner.teacher.probabilities, mask)
    assert actual.item() == pytest.approx(expected, rel=1e-4)


def test_relations_are_those_of_attention_and_of_values(inner, mask):
    attention = (distributions(side.scores.tolist()) for side in (inner.teacher, inner.student))
    values = (distributions(relations(side.values.tolist())) for side in (inner.teacher, inner.student))
    expected = sum(
        mean(divergence(left, right) for left, right in zip(*sides, strict=True)) for sides in (attention, values)
    )
    sides = (inner.student.scores, inner.teacher.probabilities, inner.student.values, inner.teacher.values)
    assert relation_loss(*sides, mask).item() == pytest.approx(expected, rel=1e-4)


def losses_of_scores(student, teacher, mask):
    """All losses of attention, by what they compare."""
    probabilities = teacher.masked_fill(~mask[:, None, None, :], UNLIKELY).softmax(-1)
    return {
        "scores": score_loss(student, teacher, mask),
        "probabilities": probability_loss(student, probabilities, mask),
        "divergence": attention_divergence(student, probabilities, mask),
    }


@pytest.mark.parametrize("rounded", [False, True])
def test_pairs_that_a_window_hides_from_the_student_take_no_part(inner, mask, rounded):
    hidden = (torch.arange(5)[:, None] - torch.arange(5)).abs() > 1
    narrow = inner.student.scores.masked_fill(hidden, UNLIKELY).requires_grad_()
    teacher = inner.teacher.scores.bfloat16() if rounded else inner.teacher.scores
    # As if there were no such keys at all.
    alike = losses_of_scores(narrow, teacher.masked_fill(hidden, UNLIKELY), mask)
    losses = losses_of_scores(narrow, teacher, mask)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(alike[name].item(), rel=2e-2 if rounded else 1e-4)
        assert loss.item() < 30
    sum(losses.values()).backward()
    assert narrow.grad.isfinite().all()
    assert not narrow.grad[hidden.expand_as(narrow)].any()


def test_scores_that_a_window_hides_from_the_teacher_take_no_part(inner, mask):
    hidden = (torch.arange(5)[:, None] - torch.arange(5)).abs() > 1
    narrow = inner.teacher.scores.masked_fill(hidden, UNLIKELY).bfloat16()
    alike = score_loss(inner.student.scores.masked_fill(hidden, UNLIKELY), narrow, mask)
    assert score_loss(inner.student.scores, narrow, mask).item() == pytest.approx(alike.item(), rel=1e-6)


def test_equal_insides_have_nothing_to_learn(inner, mask):
    own = inner.teacher
    losses = losses_of_scores(own.scores, own.scores, mask) | {
        "hidden": hidden_loss(own.hidden, own.hidden, mask),
        "relation": relation_loss(own.scores, own.probabilities, own.values, own.values, mask),
    }
    assert {name: round(loss.item(), 5) for name, loss in losses.items()} == dict.fromkeys(losses, 0)


# Layer maps


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers", "expected"),
    [
        (6, 12, (2, 4, 6, 8, 10, 12)),
        (4, 12, (3, 6, 9, 12)),
        (3, 3, (1, 2, 3)),
        (1, 6, (6,)),
        (4, 6, (2, 3, 5, 6)),
        (2, 5, (3, 5)),
        (6, 3, (1, 1, 2, 2, 3, 3)),
        (4, 1, (1, 1, 1, 1)),
    ],
)
def test_a_uniform_map_spreads_layers_evenly_and_ends_at_the_last(student_layers, teacher_layers, expected):
    assert uniform_layer_map(student_layers, teacher_layers) == expected
    assert checked_layer_map(None, student_layers, teacher_layers) == expected


@pytest.mark.parametrize("layer_map", [(1, 2), (1, 2, 3, 4), (0, 1, 2), (1, 2, 7)])
def test_an_impossible_map_is_refused_with_what_is_possible(layer_map):
    with pytest.raises(ValueError, match=r"layer_map=\(.*has 3 layers and the teacher 6.*1\.\.6.*\(2, 4, 6\)"):
        checked_layer_map(layer_map, 3, 6)


def test_a_map_may_repeat_and_go_back():
    assert checked_layer_map([6, 2, 2], 3, 6) == (6, 2, 2)


def test_no_layers_cannot_be_mapped():
    with pytest.raises(ValueError, match="0 student and 6 teacher layers"):
        uniform_layer_map(0, 6)


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("batch_size", 0),
        ("epochs", 0),
        ("warmup_ratio", 1.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("precision", "fp8"),
        ("embedding_weight", -1.0),
        ("hidden_weight", math.nan),
        ("attention_weight", math.inf),
        ("relation_weight", -0.5),
        ("logit_weight", -1),
        ("label_weight", -1),
        ("attention_of", "values"),
        ("attention_loss", "cosine"),
        ("attention_loss", "kl"),  # of scores
        ("temperature", 0.0),
        ("layer_map", ()),
        ("layer_map", (0, 1)),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        DistillSettings(**{name: value})


def test_there_has_to_be_something_to_learn():
    with pytest.raises(ValueError, match=r"Every weight is 0.*logit_weight"):
        DistillSettings(embedding_weight=0, hidden_weight=0, attention_weight=0)


def test_only_what_losses_need_is_asked_for():
    nothing = dict.fromkeys(("embedding_weight", "hidden_weight", "attention_weight"), 0.0)
    labels = DistillSettings(**nothing, label_weight=1)
    assert (student_pieces(labels, 2), teacher_pieces(labels, (2, 4))) == ({LOGITS}, set())
    related = DistillSettings(**nothing, relation_weight=1)
    assert student_pieces(related, 2) == {Piece("scores", 2), Piece("values", 2)}
    assert teacher_pieces(related, (2, 4)) == {Piece("probabilities", 4), Piece("values", 4)}
    usual = DistillSettings(attention_of="probabilities")
    expected = {EMBEDDINGS, *(Piece(kind, layer) for kind in ("hidden", "probabilities") for layer in (2, 4))}
    assert teacher_pieces(usual, (2, 4)) == expected


# What a pass gives

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_labels": 5,
    "pad_token_id": 0,
}
SPECIAL = {name: 1 for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")}
FAMILY_CONFIGS = {
    "bert": SIZES,
    "roberta": SIZES | {"pad_token_id": 1, "type_vocab_size": 1},
    "electra": SIZES | {"embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, "vocab_size": 60, "num_labels": 5},
    "albert": SIZES | {"embedding_size": 16},
    "mpnet": SIZES | {"pad_token_id": 1},
    "deberta-v2": SIZES | {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": SIZES | SPECIAL | {"local_attention": 6},
}
LENGTHS = (12, 19, 3)


@pytest.fixture(params=FAMILY_CONFIGS)
def network(request):
    """A random network whose attention transformers itself computes in the open."""
    config = AutoConfig.for_model(request.param, **FAMILY_CONFIGS[request.param])
    network = HEADS["classification"].from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.3 if weight.dim() > 1 else 0.5, generator=generator)
    return network


@torch.no_grad()
def test_a_pass_gives_what_transformers_gives(network, make_batch):
    batch = make_batch(LENGTHS)
    del batch["token_type_ids"]
    mask = batch["attention_mask"].bool()
    batch["input_ids"] = batch["input_ids"].clamp(min=2).where(mask, torch.tensor(network.config.pad_token_id))
    expected = network(**batch, output_hidden_states=True, output_attentions=True)
    layers = range(1, 5)
    wanted = {Piece(kind, layer) for kind in ("hidden", "scores", "probabilities", "values") for layer in layers}
    found = record(LengthAdaptiveModel(network), batch, wanted | {EMBEDDINGS, LOGITS})
    torch.testing.assert_close(found[LOGITS], expected.logits, rtol=0, atol=1e-4)
    # ModernBERT normalises the last one before it gives it.
    for layer in range(4 if network.config.model_type == "modernbert" else 5):
        states = found[Piece("hidden", layer)][mask], expected.hidden_states[layer][mask]
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    for layer in layers:
        probabilities = found[Piece("probabilities", layer)]
        attended = (side.transpose(1, 2)[mask] for side in (probabilities, expected.attentions[layer - 1]))
        torch.testing.assert_close(*attended, rtol=0, atol=1e-4)
        scores = found[Piece("scores", layer)].masked_fill(~mask[:, None, None, :], UNLIKELY)
        torch.testing.assert_close(scores.softmax(-1), probabilities, rtol=0, atol=1e-6)
        assert scores.min() >= UNLIKELY


@torch.no_grad()
def test_scores_are_scaled_products_before_the_softmax(model, make_batch):
    batch = make_batch((7, 4))
    found = record(model, batch, {EMBEDDINGS, Piece("scores", 1), Piece("values", 1)})
    block, hidden = model.network.bert.encoder.layer[0].attention.self, found[EMBEDDINGS]
    query, key, value = (part(hidden).view(2, 7, 4, 8) for part in (block.query, block.key, block.value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(8)
    torch.testing.assert_close(found[Piece("scores", 1)], scores)
    torch.testing.assert_close(found[Piece("values", 1)], value.transpose(1, 2))


@torch.no_grad()
def test_layers_that_nothing_needs_are_not_run(model, make_batch, monkeypatch):
    run = []
    forward = model.family.feed_forward
    monkeypatch.setattr(type(model.family), "feed_forward", lambda _, *args: (run.append(args[1]), forward(*args))[1])
    assert record(model, make_batch((7, 4)), {Piece("hidden", 2)}).keys() == {Piece("hidden", 2)}
    assert run == [0, 1]


# Trainings

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(30))]


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return BertTokenizerFast(vocab=str(path))


def encoder(layers=4, width=16, seed=0, task="classification", **changes):
    """A random BERT with dropout; its attention is far from even."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    return LengthAdaptiveModel(HEADS[task].from_config(BertConfig(**{**sizes, **changes})), task)


def copy_of(model):
    return cut_student(model, range(model.num_layers))


@pytest.fixture
def split():
    """Sequences of 4 to 13 tokens; the label is whether the word 5 stands in them."""
    generator = np.random.default_rng(0)
    labels = np.arange(48) % 2
    lengths = generator.integers(1, 11, size=48)
    words = (generator.integers(6, 35, size=length).tolist() for length in lengths)
    ids = [[2, *row, 5 if label else 6, 3] for row, label in zip(words, labels, strict=True)]
    return EncodedSplit(input_ids=ids, token_type_ids=[[0] * len(row) for row in ids], labels=labels, num_truncated=0)


EVERYTHING = DistillSettings(
    learning_rate=5e-3,
    batch_size=16,
    epochs=2,
    precision="fp32",
    relation_weight=0.7,
    logit_weight=1.3,
    label_weight=0.4,
    temperature=2.0,
)
OTHERS = dict.fromkeys(
    (field.name for field in dataclasses.fields(DistillSettings) if field.name.endswith("_weight")), 0.0
)
CHOICES = {
    "everything": EVERYTHING,
    "probabilities": dataclasses.replace(EVERYTHING, attention_of="probabilities", attention_loss="kl"),
    "logits": dataclasses.replace(EVERYTHING, **{**OTHERS, "logit_weight": 1.0}),
}


@pytest.mark.parametrize("settings", CHOICES.values(), ids=CHOICES)
def test_cached_and_live_teachers_train_the_same_weights(split, tokenizer, settings, tmp_path):
    teacher = encoder(seed=1)
    student = cut_student(teacher, (0, 2))
    kept = copy_of(student)
    live = distil(student, teacher, split, tokenizer, settings)
    cached = distil(kept, teacher, split, tokenizer, settings, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*/*.bf16"))
    assert kept.fingerprint() == student.fingerprint()
    assert cached == live
    assert live.steps == 2 * 3
    other = cut_student(teacher, (0, 2))
    distil(other, teacher, split, tokenizer, dataclasses.replace(settings, seed=1), cache_dir=tmp_path / "cache")
    assert other.fingerprint() != student.fingerprint()


def test_a_run_reads_the_cache_and_not_the_teacher(split, tokenizer, tmp_path, monkeypatch):
    teacher = encoder(seed=1)
    students = [cut_student(teacher, (0, 2)) for _ in range(2)]
    distil(students[0], teacher, split, tokenizer, EVERYTHING, cache_dir=tmp_path)
    monkeypatch.setattr(LiveTeacher, "sequences", lambda *_: pytest.fail("the teacher was run"))
    distil(students[1], teacher, split, tokenizer, EVERYTHING, cache_dir=tmp_path)
    assert students[0].fingerprint() == students[1].fingerprint()


def test_a_student_comes_to_agree_with_a_wider_teacher(split, tokenizer):
    undropped = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    teacher, student = encoder(3, width=24, seed=1), encoder(2, initializer_range=0.02, **undropped)
    before, names = teacher.fingerprint(), list(student.state_dict())
    settings = dataclasses.replace(EVERYTHING, epochs=30, **{**OTHERS, "hidden_weight": 0.1, "logit_weight": 1.0})
    live = LiveTeacher(teacher.eval(), split, {LOGITS})

    def agreement():
        own = LiveTeacher(student.eval(), split, {LOGITS}).sequences(range(48))
        pairs = zip(own, live.sequences(range(48)), strict=True)
        return mean(int(mine[LOGITS].argmax() == its[LOGITS].argmax()) for mine, its in pairs)

    assert agreement() < 0.8
    teacher.train()
    report = distil(student, teacher, split, tokenizer, settings)
    assert teacher.training
    assert agreement() > 0.9
    assert (teacher.eval().fingerprint(), list(student.state_dict())) == (before, names)
    assert math.isfinite(report.final_loss)


def test_a_projection_learns_along_and_starts_from_the_seed(split):
    teacher, student = encoder(3, width=24), encoder(2)
    learners = [Learner(student, teacher, dataclasses.replace(EVERYTHING, seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (learner.hidden_projection.weight for learner in learners)
    assert first.shape == (24, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    trained = {id(parameter) for parameter in learners[0].parameters()}
    assert {id(parameter) for parameter in student.parameters()} | {
        id(learners[0].hidden_projection.weight),
        id(learners[0].embedding_projection.weight),
    } == trained
    assert list(Learner(student, encoder(3), EVERYTHING).hidden_projection.parameters()) == []


def test_the_loss_is_the_weighted_sum_of_its_parts(inner, mask):
    layer_map = (3, 1)
    names = ("hidden", "scores", "probabilities", "values")
    generator = torch.Generator().manual_seed(9)

    def side(source, layers):
        pieces = {Piece(kind, layer): getattr(source, kind) * (1 + layer / 8) for kind in names for layer in layers}
        return {**pieces, EMBEDDINGS: source.hidden * 2, LOGITS: torch.randn(3, 2, generator=generator)}

    learned, taught = side(inner.student, (1, 2)), side(inner.teacher, (1, 3))
    labels = torch.tensor([0, 1, 1])
    loss = combined_loss(encoder(2), EVERYTHING, layer_map, learned, taught, mask, labels)
    pairs = {kind: [(learned[kind, mine], taught[kind, its]) for mine, its in ((1, 3), (2, 1))] for kind in names}
    related = (learned["scores", 2], taught["probabilities", 1], learned["values", 2], taught["values", 1])
    expected = (
        hidden_loss(learned[EMBEDDINGS], taught[EMBEDDINGS], mask)
        + sum(hidden_loss(*pair, mask) for pair in pairs["hidden"])
        + sum(score_loss(*pair, mask) for pair in pairs["scores"])
        + 0.7 * relation_loss(*related, mask)
        + 1.3 * distillation_loss(learned[LOGITS], taught[LOGITS], 2.0)
        + 0.4 * torch.nn.functional.cross_entropy(learned[LOGITS], labels)
    )
    torch.testing.assert_close(loss, expected)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_but_labels(split, tokenizer):
    teacher = encoder(3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = dataclasses.replace(EVERYTHING, epochs=4, learning_rate=1e-12, label_weight=0.0)
    report = distil(copy_of(teacher), teacher, split, tokenizer, settings)
    assert report.final_loss < 1e-3  # what rounding to bf16 leaves


def test_labels_alone_ask_the_teacher_nothing(split, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(LiveTeacher, "sequences", lambda *_: pytest.fail("the teacher was run"))
    settings = dataclasses.replace(EVERYTHING, **{**OTHERS, "label_weight": 1.0})
    distil(encoder(2), encoder(3), split, tokenizer, settings, cache_dir=tmp_path)
    assert list(tmp_path.glob("teacher-*")) == []


def test_same_seed_trains_the_same_weights_whatever_came_before(split, tokenizer):
    teacher, results = encoder(3, width=24), []
    for before in (1, 2):
        student = encoder(2)
        set_seed(before)
        distil(student, teacher, split, tokenizer, EVERYTHING)
        results.append(student.fingerprint())
    assert results[0] == results[1]


@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
def test_heads_that_read_every_token_learn_too(split, tokenizer, task, tmp_path):
    if task == "question-answering":
        labels = np.array([[1, len(row) - 2] for row in split.input_ids])
    else:
        labels = [[-100, *(token % 2 for token in row[1:-1]), -100] for row in split.input_ids]
    tagged = dataclasses.replace(split, labels=labels)
    teacher = encoder(3, task=task)
    students = [cut_student(teacher, (0, 2)) for _ in range(2)]
    for student, cache_dir in zip(students, (None, tmp_path), strict=True):
        distil(student, teacher, tagged, tokenizer, EVERYTHING, cache_dir=cache_dir)
    assert students[0].fingerprint() == students[1].fingerprint() != cut_student(teacher, (0, 2)).fingerprint()


def test_bf16_training_reads_what_a_bf16_teacher_says(split, tokenizer, tmp_path):
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no bf16 products")
    teacher = encoder(3)
    students = [cut_student(teacher, (0, 2)) for _ in range(2)]
    for student, cache_dir in zip(students, (None, tmp_path), strict=True):
        report = distil(
            student, teacher, split, tokenizer, dataclasses.replace(EVERYTHING, precision="bf16"), cache_dir=cache_dir
        )
        assert report.precision == "bf16"
    assert students[0].fingerprint() == students[1].fingerprint()


def test_hooks_see_every_step_and_epoch(split, tokenizer):
    steps, epochs = [], []
    hooks = {"on_epoch": epochs.append, "on_progress": lambda *step: steps.append(step)}
    distil(encoder(2), encoder(3), split, tokenizer, EVERYTHING, **hooks)
    assert epochs == [1, 2]
    assert steps == [(step, 6) for step in range(1, 7)]


def test_loss_that_is_not_finite_ends_the_training(split, tokenizer):
    student = encoder(2)
    student.network.bert.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="nan at step 1"):
        distil(student, encoder(3), split, tokenizer, EVERYTHING)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({}, {"task": "token-classification"}, "task is classification, the teacher's token-classification"),
        ({"num_labels": 3}, {}, "number of labels is 3, the teacher's 2"),
        ({"vocab_size": 40}, {}, "vocabulary size is 40, the teacher's 35"),
        ({"problem_type": "multi_label_classification"}, {}, "choice of classes is any number, the teacher's one"),
        (
            {"id2label": {0: "no", 1: "yes"}},
            {"id2label": {0: "yes", 1: "no"}},
            r"labels are \['no', 'yes'\], the teacher's \['yes', 'no'\]",
        ),
        ({"num_attention_heads": 4}, {}, "4 attention heads, the teacher 2, .* set attention_weight=0"),
        ({}, {"max_position_embeddings": 12}, "13 tokens, but the teacher takes 12"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(split, tokenizer, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        distil(encoder(2, **student), encoder(3, **teacher), split, tokenizer, EVERYTHING)


def test_relations_need_as_many_heads_and_vectors_do_not(split, tokenizer):
    student, settings = encoder(2, num_attention_heads=4), dataclasses.replace(EVERYTHING, attention_weight=0.0)
    with pytest.raises(ValueError, match="set relation_weight=0"):
        distil(student, encoder(3), split, tokenizer, settings)
    settings = dataclasses.replace(settings, relation_weight=0.0)
    assert distil(student, encoder(3), split, tokenizer, settings).steps == 6


def test_names_of_classes_count_only_where_both_have_them(split, tokenizer):
    named = encoder(3, id2label={0: "yes", 1: "no"})
    assert distil(encoder(2), named, split, tokenizer, EVERYTHING).steps == 6


def test_a_layer_map_is_followed_or_refused(split, tokenizer):
    teacher = encoder(3)
    results = set()
    for layer_map in (None, (2, 3), (1, 3)):
        student = encoder(2)
        distil(student, teacher, split, tokenizer, dataclasses.replace(EVERYTHING, layer_map=layer_map))
        results.add(student.fingerprint())
    assert len(results) == 2  # (2, 3) is the uniform one
    with pytest.raises(ValueError, match=r"layer_map=\(1, 4\)"):
        distil(encoder(2), teacher, split, tokenizer, dataclasses.replace(EVERYTHING, layer_map=(1, 4)))


def test_an_empty_split_and_a_teacher_of_itself_are_refused(split, tokenizer):
    model = encoder(2)
    empty = EncodedSplit(input_ids=[], token_type_ids=[], labels=np.array([], dtype=np.int64), num_truncated=0)
    with pytest.raises(ValueError, match="empty"):
        distil(model, encoder(3), empty, tokenizer, EVERYTHING)
    with pytest.raises(ValueError, match="one model"):
        distil(model, model, split, tokenizer, EVERYTHING)


# The cache

ALL_KINDS = {
    EMBEDDINGS,
    LOGITS,
    Piece("hidden", 2),
    Piece("scores", 1),
    Piece("probabilities", 2),
    Piece("values", 2),
}


@pytest.fixture
def live(split):
    return LiveTeacher(encoder(2).eval(), split, ALL_KINDS)


def test_the_cache_gives_what_the_teacher_says_in_any_order(live, split, tmp_path):
    cache = TeacherCache(live, tmp_path)
    cache.fill()
    numbers = [7, 0, 47, 7]
    length = max(len(split.input_ids[number]) for number in numbers) + 2
    cached, spoken = (source.batch(numbers, length) for source in (cache, live))
    assert cached.keys() == spoken.keys() == ALL_KINDS
    for piece in ALL_KINDS:
        assert cached[piece].dtype == torch.bfloat16
        assert torch.equal(cached[piece], spoken[piece])
    assert cached[Piece("scores", 1)].shape == (4, 2, length, length)
    assert not cached[Piece("hidden", 2)][:, -2:].any()


@torch.no_grad()
@pytest.mark.parametrize("alone", [True, False])
def test_a_teacher_says_what_its_padded_pass_says_rounded(live, split, alone, unpadded, make_batch):
    batch = make_batch((9, 4, 6))
    batch["input_ids"] %= len(WORDS)
    source = LiveTeacher(live.teacher, unpadded(batch), ALL_KINDS, alone=alone)
    spoken = source.batch([0, 1, 2], 9)
    expected = record(live.teacher, batch, ALL_KINDS)
    for piece in ALL_KINDS:
        for row, count in enumerate((9, 4, 6)):
            places = tuple(slice(count) if size == 9 else slice(None) for size in expected[piece][row].shape)
            torch.testing.assert_close(
                spoken[piece][row][places].float(), expected[piece][row][places], rtol=8e-3, atol=1e-5
            )


def test_the_size_is_said_before_anything_is_written(live, split, tmp_path, caplog, monkeypatch):
    counts = [len(row) for row in split.input_ids]
    numbers = sum(count * 16 * 3 + 2 * count**2 * 2 + 2 for count in counts)
    cache = TeacherCache(live, tmp_path)
    assert cache.size_bytes == 2 * numbers
    monkeypatch.setattr(LiveTeacher, "sequences", lambda *_: pytest.fail("the teacher was run"))
    with caplog.at_level(logging.INFO, "model.distill"), pytest.raises(pytest.fail.Exception):
        cache.fill()
    assert f"48 sequences take {2 * numbers / 2**20:.1f} MiB in {cache.folder}" in caplog.text
    assert [path.name for path in cache.folder.iterdir()] == ["lock"]
    monkeypatch.undo()
    cache.fill()
    assert sum(path.stat().st_size for path in cache.folder.glob("*.bf16")) == cache.size_bytes
    assert not cache.missing()


def test_a_full_disk_is_refused_before_anything_is_written(live, split, tokenizer, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DistillError, match=r"has 0\.0 MiB free; free some space.*cache_limit_bytes"):
        distil(encoder(2), encoder(3), split, tokenizer, EVERYTHING, cache_dir=tmp_path)
    assert list(tmp_path.rglob("*.bf16")) + list(tmp_path.rglob("*.partial")) == []


def test_a_place_that_cannot_be_written_is_refused(split, tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DistillError, match=r"cannot be kept in .*file/teacher-.*; free some space, or give another"):
        distil(encoder(2), encoder(3), split, tokenizer, EVERYTHING, cache_dir=tmp_path / "file")


def test_a_cache_above_the_limit_or_read_once_is_not_made(split, tokenizer, tmp_path, caplog):
    teacher, students = encoder(3), [encoder(2) for _ in range(3)]
    settings = {"cache_dir": tmp_path, "cache_limit_bytes": 1000}
    with caplog.at_level(logging.INFO, "model.distill"):
        distil(students[0], teacher, split, tokenizer, EVERYTHING, **settings)
    assert "runs along: its outputs would take 0." in caplog.text
    once = dataclasses.replace(EVERYTHING, epochs=1)
    distil(students[1], teacher, split, tokenizer, once, cache_dir=tmp_path)
    assert list(tmp_path.glob("teacher-*")) == []


def test_what_another_teacher_said_or_of_other_texts_is_never_read(live, split, tmp_path):
    other_text = dataclasses.replace(split, input_ids=[[*row[:-1], 4] for row in split.input_ids])
    other_types = dataclasses.replace(split, token_type_ids=[[1] * len(row) for row in split.input_ids])
    moved = dataclasses.replace(split, input_ids=split.input_ids[::-1], token_type_ids=split.token_type_ids[::-1])
    first, second, *rest = split.input_ids
    regrouped = dataclasses.replace(
        split,
        input_ids=[first[:-1], [first[-1], *second], *rest],
        token_type_ids=[[0] * (len(first) - 1), [0] * (len(second) + 1), *([0] * len(row) for row in rest)],
    )
    other_labels = dataclasses.replace(split, labels=1 - split.labels)
    other_heads = encoder(2, num_attention_heads=4)
    other_heads.load_state_dict(live.teacher.state_dict())
    trained = copy_of(live.teacher)
    trained.network.classifier.bias.data[0] += 1e-3

    def folder(teacher=live.teacher, sequences=split, **how):
        return TeacherCache(LiveTeacher(teacher, sequences, ALL_KINDS, **how), tmp_path).folder

    own = folder()
    others = [
        *(folder(sequences=sequences) for sequences in (other_text, other_types, moved, regrouped)),
        *(folder(teacher) for teacher in (other_heads, trained)),
        folder(bf16=True),
        folder(alone=False),
    ]
    assert len({own, *others}) == 9
    assert folder(copy_of(live.teacher), other_labels) == own


def test_pieces_are_shared_and_only_what_is_missing_is_made(live, split, tmp_path):
    TeacherCache(LiveTeacher(live.teacher, split, {EMBEDDINGS, LOGITS}), tmp_path).fill()
    cache = TeacherCache(live, tmp_path)
    assert set(cache.missing()) == ALL_KINDS - {EMBEDDINGS, LOGITS}
    made = cache.path(LOGITS).stat().st_mtime_ns
    cache.fill()
    assert cache.path(LOGITS).stat().st_mtime_ns == made
    assert not cache.missing()


def test_a_broken_off_or_cut_cache_is_made_anew(live, tmp_path, monkeypatch):
    cache = TeacherCache(live, tmp_path)
    sequences = LiveTeacher.sequences

    def broken(self, numbers):
        if 40 in numbers:
            raise KeyboardInterrupt
        return sequences(self, numbers)

    monkeypatch.setattr(LiveTeacher, "sequences", broken)
    with pytest.raises(KeyboardInterrupt):
        cache.fill()
    assert set(cache.missing()) == ALL_KINDS
    assert [path.name for path in cache.folder.iterdir()] == ["lock"]
    monkeypatch.undo()
    left_behind = cache.path(LOGITS).with_suffix(".partial")
    left_behind.write_bytes(b"left by a process that was killed")
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: pytest.fail("in the way") if left_behind.exists() else room)
    cache.fill()
    cache.path(EMBEDDINGS).write_bytes(cache.path(EMBEDDINGS).read_bytes()[:-2])
    assert cache.missing() == [EMBEDDINGS]
    cache.fill()
    assert torch.equal(cache.batch([47], 13)[EMBEDDINGS], live.batch([47], 13)[EMBEDDINGS])


def test_another_process_that_fills_the_cache_is_waited_for(live, tmp_path):
    cache = TeacherCache(live, tmp_path)
    cache.folder.mkdir()
    waiting = threading.Thread(target=cache.fill)
    with (cache.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(timeout=0.3)
        assert waiting.is_alive()
        assert set(cache.missing()) == ALL_KINDS
    waiting.join()
    assert not cache.missing()
