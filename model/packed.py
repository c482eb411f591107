"""Predictions of sequences of any length on a processor, with no padding and nothing computed that nobody reads.

As in `model.evaluate`, rows of tokens from many sequences are packed together, attention runs over groups of sequences
with equally many tokens, scores are computed in groups that drop tokens, and the last layer for the first token alone
where the head reads only that. There is one length config, so nothing has to be shared or remembered. Short sequences
of nearly equal length attend in one group, padded: there a call costs more than the arithmetic it saves.

Shape letters: B sequences, L tokens of each of a group, K of them kept, R rows of a batch, T rows that entered the
first layer, D hidden size, C outputs of the head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.encoder import LengthAdaptiveModel, significant
from model.hardware import keep_freed_memory
from model.length_config import LengthConfig
from model.precision import Precision, snapshot
from model.prepacked import arrange

FEW_ROWS = 512
ROW_STEPS = {"fp32": 8, "mixed": 16, "bf16": 16}
MANY_ROW_STEP = 64
"""Rows are filled up to a multiple of the first, or of the second where they are more than `FEW_ROWS`: oneDNN prepares
a kernel for each number of rows it meets, at more cost in bf16, and keeps about a thousand."""
SHORT, SPREAD = 96, 8
"""Sequences of at most so many tokens attend together where their lengths differ by no more than the second."""

Ints = NDArray[np.int64]
Rows = TypeVar("Rows", int, Ints)


class PackedNetwork:
    """A frozen copy of an encoder that computes logits. A call leaves nothing behind, so threads may share it."""

    def __init__(self, model: LengthAdaptiveModel, precision: Precision = "fp32") -> None:
        """Copy the weights.

        Args:
            model: The encoder; left as it was.
            precision: "bf16" rounds the factors of the large products.
        """
        keep_freed_memory()
        self.family, self.reads_first = model.family, model.reads_first
        self.precision: Precision = precision
        self.network: Any = snapshot(model.network, precision)
        arrange(self.family, self.network, model.num_layers)

    def logits(
        self,
        input_ids: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]],
        length_config: LengthConfig,
        on_layer: Callable[[], object] | None = None,
    ) -> list[Tensor]:
        """What `LengthAdaptiveModel.forward` says of each sequence, float32 (C,), or (L, C) of heads that read all.

        Args:
            input_ids: Token ids of B sequences, without padding; at least one.
            token_type_ids: Of each token; ignored by encoders that know none.
            length_config: Of the model's number of layers.
            on_layer: Called before each layer that is computed.
        """
        length_B = np.fromiter(map(len, input_ids), dtype=np.int64, count=len(input_ids))
        order_B = np.argsort(length_B, kind="stable")
        with torch.inference_mode():
            ids_T, types_T = (
                torch.from_numpy(np.concatenate([given[number] for number in order_B]))
                for given in (input_ids, token_type_ids)
            )
            said = self._run(ids_T, types_T, length_B[order_B], length_config, on_layer)
            sizes = [1] * len(order_B) if self.reads_first else length_B[order_B].tolist()
            logits: list[Any] = [None] * len(order_B)
            for number, own in zip(order_B, torch.split(said.float(), sizes), strict=True):
                logits[number] = own[0] if self.reads_first else own
        return logits

    def _run(
        self,
        ids_T: Tensor,
        types_T: Tensor,
        arriving_B: Ints,
        length_config: LengthConfig,
        on_layer: Callable[[], object] | None,
    ) -> Tensor:
        """The logits of sequences in ascending order of length, (B, C) or (T, C)."""
        family, network = self.family, self.network
        left_BM = length_config.count_table(arriving_B)
        place_R = torch.from_numpy(np.concatenate([np.arange(count) for count in arriving_B]))
        token_R = torch.arange(len(place_R))
        hidden_RD = self._fill(family.embed(network, ids_T[None], types_T[None], place_R[None])[0])
        restored_TD = None
        for layer in length_config.computed:
            if on_layer is not None:
                on_layer()
            if self.reads_first and layer == length_config.computed[-1]:
                return self._read_first(layer, hidden_RD, place_R, arriving_B)
            keep_B = left_BM[:, layer]
            drops = bool((keep_B < arriving_B).any())
            if drops and not self.reads_first:
                restored_TD = self._put_back(restored_TD, hidden_RD, token_R)
            projected_RP = family.project(network, layer, hidden_RD)
            contexts, kept = [], []
            for group in _groups(arriving_B, keep_B):
                projected_BLP, place_BL = group.take(projected_RP), group.take(place_R)
                context_BLD, score_BL = family.mix(
                    network, layer, projected_BLP, place_BL, group.mask_BL, group.keep_B is not None
                )
                slot_R, row_R = group.all_rows() if score_BL is None else group.kept_rows(score_BL)
                contexts.append(context_BLD.flatten(0, 1) if slot_R is None else _rows(context_BLD, slot_R))
                kept.append(row_R)
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
        for group in _groups(arriving_B, arriving_B):
            projected_BLP = group.take(projected_RP)
            own_BD = first_BD[done : done + len(projected_BLP)]
            done += len(own_BD)
            place_BL = group.take(place_R)
            contexts.append(family.mix_first(network, layer, own_BD, projected_BLP, place_BL, group.mask_BL))
        attended_BD = family.merge(network, layer, self._fill(torch.cat(contexts)), first_BD)
        last_BD = family.feed_forward(network, layer, attended_BD)
        return family.classify(network, last_BD[: len(arriving_B), None])

    def _put_back(self, restored_TD: Tensor | None, hidden_RD: Tensor, token_R: Tensor) -> Tensor:
        """All tokens' last vectors, of which some have newer ones."""
        newer_RD = hidden_RD[: len(token_R)]
        return newer_RD if restored_TD is None else restored_TD.index_copy(0, token_R, newer_RD)

    def _fill(self, rows_RX: Tensor) -> Tensor:
        """The rows with fillers after them, copies of nothing in particular."""
        surplus = filled(len(rows_RX), self.precision) - len(rows_RX)
        return F.pad(rows_RX, (0, 0) * (rows_RX.dim() - 1) + (0, surplus)) if surplus else rows_RX


def filled(rows: Rows, precision: Precision) -> Rows:
    """Rows that a product has where so many are asked for; of a number or of many."""
    few = ROW_STEPS[precision]
    return rows + -rows % (few + (rows > FEW_ROWS) * (MANY_ROW_STEP - few))


@dataclass(frozen=True)
class _Group:
    """Consecutive sequences that attend together.

    Attributes:
        start_B: The row of each one's first token.
        count_B: Tokens of each, ascending.
        keep_B: Tokens that each keeps; None where all of them keep all.
        mask_BL: True at tokens; None where all have equally many.
    """

    start_B: Ints
    count_B: Ints
    keep_B: Ints | None
    mask_BL: Tensor | None

    def take(self, rows_RX: Tensor) -> Tensor:
        """The sequences' rows, (B, L, X); what pads them is anything."""
        first, end, length = int(self.start_B[0]), int(self.start_B[-1] + self.count_B[-1]), int(self.count_B[-1])
        if self.mask_BL is None:
            return rows_RX[first:end].view(-1, length, *rows_RX.shape[1:])
        row_BL = np.minimum(self.start_B[:, None] + np.arange(length), end - 1)
        taken = rows_RX.index_select(0, torch.from_numpy(row_BL.ravel()))
        return taken.view(*row_BL.shape, *rows_RX.shape[1:])

    def all_rows(self) -> tuple[Tensor | None, Tensor]:
        """Every token: its place in the group, None where that is the order of the rows, and its row."""
        row_R = torch.arange(int(self.start_B[0]), int(self.start_B[-1] + self.count_B[-1]))
        return None if self.mask_BL is None else self.mask_BL.flatten().nonzero()[:, 0], row_R

    def kept_rows(self, score_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that are kept: their places in the group and their rows."""
        assert self.keep_B is not None
        place_BK, kept_BK = significant(score_BL, self.keep_B, self.mask_BL)
        slot_BK = place_BK + score_BL.size(1) * torch.arange(len(place_BK))[:, None]
        row_BK = place_BK + torch.from_numpy(self.start_B)[:, None]
        return (slot_BK.flatten(), row_BK.flatten()) if kept_BK is None else (slot_BK[kept_BK], row_BK[kept_BK])


def _groups(arriving_B: Ints, keep_B: Ints) -> Iterator[_Group]:
    """Sequences in ascending order of length, in groups: of one length and count kept, or short and near each other."""
    starts = np.cumsum(arriving_B) - arriving_B
    counts, keeps = arriving_B.tolist(), keep_B.tolist()
    first = 0
    for end in range(1, len(counts) + 1):
        if end < len(counts):
            is_like = counts[end] == counts[first] and keeps[end] == keeps[first]
            if is_like or (counts[end] <= SHORT and counts[end] - counts[first] <= SPREAD):
                continue
        own = slice(first, end)
        drops = bool((keep_B[own] < arriving_B[own]).any())
        mask_BL = None
        if counts[first] < counts[end - 1]:
            mask_BL = torch.from_numpy(np.arange(counts[end - 1]) < arriving_B[own, None])
        yield _Group(starts[own], arriving_B[own], keep_B[own] if drops else None, mask_BL)
        first = end


def _rows(context_BLD: Tensor, slot_R: Tensor) -> Tensor:
    return context_BLD.flatten(0, 1).index_select(0, slot_R)
