"""Predictions of sequences of any length on a processor, with no padding and nothing computed that nobody reads.

As in `model.evaluate`, rows of tokens from many sequences are packed together, attention runs over groups of sequences
with equally many tokens, scores are computed in groups that drop tokens, and the last layer for the first token alone
where the head reads only that. There is one length config, so nothing has to be shared or remembered.

Shape letters: B sequences, L tokens of each of a group, R rows of a batch, T rows that entered the first layer, D
hidden size, C outputs of the head.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.encoder import LengthAdaptiveModel, significance_order
from model.families import lay_side_by_side
from model.length_config import LengthConfig
from model.precision import Precision, snapshot

FEW_ROWS = 512
ROW_STEPS = 16, 64
"""Rows are filled up to a multiple of the first, or of the second where they are more than `FEW_ROWS`, in bf16: oneDNN
builds a kernel for each number of rows it meets, and keeps about a thousand."""

Ints = NDArray[np.int64]


class PackedNetwork:
    """A frozen copy of an encoder that computes logits. A call leaves nothing behind, so threads may share it."""

    def __init__(self, model: LengthAdaptiveModel, precision: Precision = "fp32") -> None:
        """Copy the weights.

        Args:
            model: The encoder; left as it was.
            precision: "bf16" rounds the factors of the large products.
        """
        self.family, self.reads_first = model.family, model.reads_first
        self.precision: Precision = precision
        self.network: Any = snapshot(model.network, precision)
        lay_side_by_side(self.family, self.network, model.num_layers)

    def logits(
        self, input_ids: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]], length_config: LengthConfig
    ) -> list[Tensor]:
        """What `LengthAdaptiveModel.forward` says of each sequence, float32 (C,), or (L, C) of heads that read all.

        Args:
            input_ids: Token ids of B sequences, without padding; at least one.
            token_type_ids: Of each token; ignored by encoders that know none.
            length_config: Of the model's number of layers.
        """
        length_B = np.fromiter(map(len, input_ids), dtype=np.int64, count=len(input_ids))
        order_B = np.argsort(length_B, kind="stable")
        with torch.inference_mode():
            ids = [np.concatenate([given[number] for number in order_B]) for given in (input_ids, token_type_ids)]
            said = self._run(*map(torch.from_numpy, ids), length_B[order_B], length_config)
            sizes = [1] * len(order_B) if self.reads_first else length_B[order_B].tolist()
            logits: list[Any] = [None] * len(order_B)
            for number, own in zip(order_B, said.float().split(sizes), strict=True):
                logits[number] = own[0] if self.reads_first else own
        return logits

    def _run(self, ids_T: Tensor, types_T: Tensor, arriving_B: Ints, length_config: LengthConfig) -> Tensor:
        """The logits of sequences in ascending order of length, (B, C) or (T, C)."""
        family, network = self.family, self.network
        left_BM = length_config.count_table(arriving_B)
        place_R = torch.from_numpy(np.concatenate([np.arange(count) for count in arriving_B]))
        token_R = torch.arange(len(place_R))
        hidden_RD = self._fill(family.embed(network, ids_T[None], types_T[None], place_R[None])[0])
        restored_TD = None
        for layer in length_config.computed:
            if self.reads_first and layer == length_config.computed[-1]:
                return self._read_first(layer, hidden_RD, place_R, arriving_B)
            keep_B = left_BM[:, layer]
            drops = bool((keep_B < arriving_B).any())
            if drops and not self.reads_first:
                restored_TD = self._put_back(restored_TD, hidden_RD, token_R)
            projected_RP = family.project(network, layer, hidden_RD)
            contexts, kept = [], []
            for first, rows, length, keep in _groups(arriving_B, keep_B):
                projected_BLP = projected_RP[rows].float().view(-1, length, projected_RP.size(1))
                place_BL = place_R[rows].view(-1, length)
                context_BLD, score_BL = family.mix(network, layer, projected_BLP, place_BL, None, keep < length)
                context_RD = context_BLD.flatten(0, 1)
                if score_BL is None:
                    contexts.append(context_RD)
                    kept.append(torch.arange(rows.start, rows.stop))
                else:
                    kept_BK = significance_order(score_BL)[:, :keep].sort(dim=1).values
                    row_R = (kept_BK + length * torch.arange(len(kept_BK))[:, None]).flatten()
                    contexts.append(context_RD.index_select(0, row_R))
                    kept.append(row_R + first)
            context_RD = self._fill(contexts[0] if len(contexts) == 1 else torch.cat(contexts))
            if drops:
                row_R = torch.cat(kept)
                place_R, token_R = place_R[row_R], token_R[row_R]
                hidden_RD = hidden_RD.index_select(0, self._fill(row_R))
                arriving_B = keep_B
            hidden_RD = family.feed_forward(network, layer, family.merge(network, layer, context_RD, hidden_RD))
        return family.read_tokens(network, self._put_back(restored_TD, hidden_RD, token_R)[None])[0]

    def _read_first(self, layer: int, hidden_RD: Tensor, place_R: Tensor, arriving_B: Ints) -> Tensor:
        """The last layer for each sequence's first token alone, and what the head says of it, (B, C)."""
        family, network = self.family, self.network
        start_B = torch.from_numpy(np.cumsum(arriving_B) - arriving_B)
        first_BD = hidden_RD.index_select(0, self._fill(start_B))
        projected_RP = family.project_for_first(network, layer, hidden_RD)
        contexts, done = [], 0
        for _, rows, length, _ in _groups(arriving_B, arriving_B):
            projected_BLP = projected_RP[rows].float().view(-1, length, projected_RP.size(1))
            own_BD = first_BD[done : done + len(projected_BLP)]
            done += len(own_BD)
            contexts.append(family.mix_first(network, layer, own_BD, projected_BLP, place_R[rows].view(-1, length)))
        attended_BD = family.merge(network, layer, self._fill(torch.cat(contexts)), first_BD)
        last_BD = family.feed_forward(network, layer, attended_BD)
        return family.classify(network, last_BD[: len(arriving_B), None])

    def _put_back(self, restored_TD: Tensor | None, hidden_RD: Tensor, token_R: Tensor) -> Tensor:
        """All tokens' last vectors, of which some have newer ones."""
        newer_RD = hidden_RD[: len(token_R)]
        return newer_RD if restored_TD is None else restored_TD.index_copy(0, token_R, newer_RD)

    def _fill(self, rows_RX: Tensor) -> Tensor:
        """The rows with fillers after them, copies of nothing in particular, where kernels are built for a size."""
        if self.precision == "fp32":
            return rows_RX
        surplus = -len(rows_RX) % ROW_STEPS[len(rows_RX) > FEW_ROWS]
        return F.pad(rows_RX, (0, 0) * (rows_RX.dim() - 1) + (0, surplus)) if surplus else rows_RX


def _groups(arriving_B: Ints, keep_B: Ints) -> Iterator[tuple[int, slice, int, int]]:
    """Consecutive sequences of which as many tokens arrive and are kept: their first row, rows, and both counts."""
    starts = np.concatenate([[0], np.cumsum(arriving_B)])
    edges = np.flatnonzero(np.diff(arriving_B, prepend=-1, append=-1) | np.diff(keep_B, prepend=-1, append=-1))
    for first, last in itertools.pairwise(edges.tolist()):
        row = int(starts[first])
        yield row, slice(row, int(starts[last])), int(arriving_B[first]), int(keep_B[first])
