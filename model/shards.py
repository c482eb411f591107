"""Losses of a batch whose rows several processes share: each process has some rows, and gradients are averaged.

The mean over the whole batch is not the mean of the processes' means where one has more rows, tokens or labels than
another. `share_of` is what a process's own mean is multiplied by for the two to be equal.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def share_of(count: Tensor | int, device: torch.device) -> Tensor | float:
    """This process's count over the mean count of all processes that train together; 1 where it trains alone.

    Every process must call this at the same points of a step.

    Args:
        count: What the loss at hand is a mean over: sequences, tokens, pairs of tokens or labels.
        device: Where the loss is.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return 1.0
    own = torch.as_tensor(count, dtype=torch.float64, device=device)
    total = own.clone()
    dist.all_reduce(total)
    return (own * dist.get_world_size() / total.clamp(min=1)).float()


class ShardCollator:
    """Collates a process's rows of every batch; a batch with fewer rows than processes goes to each of them whole.

    Args:
        collate: Makes a batch of rows.
        process: The process's number.
        processes: How many share each batch.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any], process: int, processes: int) -> None:
        self.collate = collate
        self.process = process
        self.processes = processes

    def __call__(self, rows: Sequence[Any]) -> Any:
        return self.collate(rows if len(rows) < self.processes else rows[self.process :: self.processes])
