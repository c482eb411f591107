"""Losses by which one forward pass teaches another."""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["forward", "reverse"]


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
