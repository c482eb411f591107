"""What this machine computes with."""

import torch


def compute_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_in_bf16() -> bool:
    """Whether the GPU, or without one this processor, has bf16 matrix products."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())
