"""The distillation loss against sums written out in double precision."""

import math
from types import SimpleNamespace

import pytest
import torch

from model.distill import distillation_loss, imitation_loss


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
