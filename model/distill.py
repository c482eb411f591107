"""Losses by which one forward pass teaches another."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.encoder import LengthAdaptiveModel

Divergence = Literal["forward", "reverse"]
UNLIKELY = -1e4
"""The logit of what cannot be."""


def distillation_loss(
    student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0, divergence: Divergence = "forward"
) -> Tensor:
    """Mean Kullback-Leibler divergence between two batches of logits, times the temperature squared.

    Args:
        student_BC: Logits that learn.
        teacher_BC: Logits to learn from; detach them.
        temperature: Divides both logits; the square restores the size of the gradient.
        divergence: "forward" is KL(teacher‖student), the expectation under the teacher; "reverse" is
            KL(student‖teacher), as the code of Kim & Cho 2021 has it.
    Raises:
        ValueError: The temperature is not positive and finite, or the divergence unknown.
    Source: Hinton et al. 2015, "Distillation"; Kim & Cho 2021, "LengthDrop" (in-place distillation).
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}; choose a positive number.")
    student = (student_BC.float() / temperature).log_softmax(dim=-1)
    teacher = (teacher_BC.float() / temperature).log_softmax(dim=-1)
    if divergence == "forward":
        target, estimate = teacher, student
    elif divergence == "reverse":
        target, estimate = student, teacher
    else:
        raise ValueError(f"divergence={divergence!r}; choose 'forward' or 'reverse'.")
    return F.kl_div(estimate, target, reduction="batchmean", log_target=True) * temperature**2


def imitation_loss(
    model: LengthAdaptiveModel,
    student: Tensor,
    teacher: Tensor,
    attention_mask_BL: Tensor,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
) -> Tensor:
    """How far one pass's logits are from another's, as the model's task sees it.

    Classes and tags are one distribution per text or token, and so are the starts and the ends of answers over a
    text's tokens; each class of several that may apply is one of its own, whose divergences add up. Values have the
    mean squared difference. Padding takes no part.

    Args:
        model: Tells what its head predicts.
        student: Logits that learn, (B, C) or (B, L, C).
        teacher: Logits to learn from; detach them.
        attention_mask_BL: 1 at real tokens.
        temperature: See `distillation_loss`.
        divergence: See `distillation_loss`.
    """
    if model.task == "regression":
        return F.mse_loss(student.float(), teacher.float())
    real_BL = attention_mask_BL.bool()
    if model.task == "token-classification":
        return distillation_loss(student[real_BL], teacher[real_BL], temperature, divergence)
    if model.task == "question-answering":
        # -inf times a probability of 0 would be no number.
        student, teacher = (
            logits.float().masked_fill(~real_BL[:, :, None], UNLIKELY).transpose(1, 2).flatten(0, 1)
            for logits in (student, teacher)
        )
        return distillation_loss(student, teacher, temperature, divergence)
    if model.is_multi_label:
        student, teacher = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (student, teacher))
        per_class = distillation_loss(student.flatten(0, 1), teacher.flatten(0, 1), temperature, divergence)
        return per_class * student.size(1)
    return distillation_loss(student, teacher, temperature, divergence)
