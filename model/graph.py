"""One length config of an encoder as a graph of tensor operations.

`LengthAdaptiveModel` asks for each batch, in Python, which layers drop tokens and whether anything is padded. A graph
that another runtime computes cannot ask. Here every decision is either known before, from the config, or a tensor: how
many tokens a sequence keeps is looked up by how many it has, and each layer hands on as many as the sequence that keeps
most, the others' surplus being masked. So later layers really work on fewer tokens.

Shape letters: B sequences, L tokens arriving, K tokens handed on, D hidden size, M layers, N lengths from 0 up, R rows
of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.families import EncoderFamily
from model.length_config import MIN_TOKENS, LengthConfig


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """What a length config decides before any sequence is seen.

    Attributes:
        layers: Layers that are computed.
        dropping: Those that drop tokens of some sequence.
        sizes: Tokens that each dropping layer hands on, whatever the batch; empty where the batch decides.
        left_NM: Tokens left after each layer of a sequence of 0, 1, ... tokens, int64.
    """

    layers: tuple[int, ...]
    dropping: frozenset[int]
    sizes: Mapping[int, int]
    left_NM: Tensor

    @classmethod
    def of(cls, length_config: LengthConfig, longest: int, *, fixed_length: bool = False) -> "GraphPlan":
        """The plan for sequences of at most `longest` tokens, or of exactly that many with their padding."""
        num_tokens_N = np.arange(longest + 1)
        left_NM = length_config.count_table(num_tokens_N)
        arriving_NM = np.column_stack([num_tokens_N, left_NM[:, :-1]])
        dropping = np.flatnonzero((left_NM < arriving_NM).any(axis=0)).tolist()
        sizes = {layer: max(MIN_TOKENS, int(left_NM[-1, layer])) for layer in dropping} if fixed_length else {}
        return cls(
            layers=length_config.computed,
            dropping=frozenset(dropping),
            sizes=sizes,
            left_NM=torch.from_numpy(left_NM),
        )


def graph_logits(
    family: EncoderFamily,
    network: Any,
    plan: GraphPlan,
    reads_first: bool,
    input_ids_BL: Tensor,
    attention_mask_BL: Tensor,
    token_type_ids_BL: Tensor | None,
    left_NM: Tensor,
    *,
    for_onnx: bool = False,
) -> Tensor:
    """The logits of `LengthAdaptiveModel.forward` under one length config.

    Where the head reads the first token alone, the last layer computes that one only. Tokens that are handed on come in
    the order of their scores, the most attended first, since no layer minds and sorting them again would take time;
    unless scores may be equal, which the next layer decides by the order of the text.

    Args:
        family: The adapter of the network's architecture.
        network: The transformers network, in evaluation mode.
        plan: What the length config decides.
        reads_first: Whether the head reads the first token alone.
        input_ids_BL: int64 token ids, 2 or more to a sequence; padding, if any, on the right.
        attention_mask_BL: 1 at real tokens.
        token_type_ids_BL: int64, or None.
        left_NM: That of the plan, where the network is.
        for_onnx: Whether rows are moved by ONNX's own operators, which only an export understands.
    Source: Kim & Cho 2021, "Drop-and-Restore".
    """
    size, length = input_ids_BL.size(0), input_ids_BL.size(1)
    mask_BL = attention_mask_BL.bool()
    left_BM = F.embedding(mask_BL.sum(dim=1), left_NM)
    most_M = left_BM.amax(dim=0).clamp(min=MIN_TOKENS)
    place_L = torch.arange(length, device=input_ids_BL.device)
    is_first_L = place_L == 0
    within_BML = place_L < left_BM[:, :, None]
    positions_BL = place_L.expand(size, length)
    nowhere = size * length
    home_BL = length * torch.arange(size, device=input_ids_BL.device)[:, None] + place_L
    hidden = family.embed(network, input_ids_BL, token_type_ids_BL, positions_BL)
    restored = None
    for layer in plan.layers:
        if reads_first and layer == plan.layers[-1]:
            first_BD, projected = hidden[:, 0], family.project_for_first(network, layer, hidden)
            context_BD = family.mix_first(network, layer, first_BD, projected, positions_BL, mask_BL)
            attended = family.merge(network, layer, context_BD[:, None], first_BD[:, None])
            return family.classify(network, family.feed_forward(network, layer, attended))
        drops = layer in plan.dropping
        if drops and not reads_first:
            restored = _put_back(restored, hidden, home_BL, for_onnx)
        projected = family.project(network, layer, hidden)
        context, score = family.mix(network, layer, projected, positions_BL, mask_BL, with_scores=drops)
        if score is not None:
            most: Any = plan.sizes.get(layer) or most_M[layer].item()
            torch._check(most >= MIN_TOKENS)  # type: ignore[no-untyped-call]  # what an export cannot see for itself
            torch._check(most <= hidden.size(1))  # type: ignore[no-untyped-call]
            ranked_BL = score.masked_fill(~mask_BL, -torch.inf).masked_fill(is_first_L[: score.size(1)], torch.inf)
            mask_BL = within_BML[:, layer, :most]
            if family.scores_alike:
                places_BK = _most_attended_in_turn(ranked_BL, most, mask_BL, for_onnx)
            else:
                places_BK = ranked_BL.topk(most, dim=1).indices
            hidden, context = _take(hidden, places_BK, for_onnx), _take(context, places_BK, for_onnx)
            positions_BL = positions_BL.gather(1, places_BK)
            home_BL = home_BL.gather(1, places_BK).masked_fill(~mask_BL, nowhere)
        hidden = family.feed_forward(network, layer, family.merge(network, layer, context, hidden))
    if restored is not None:
        hidden = _put_back(restored, hidden, home_BL, for_onnx)[:-1].view(size, length, -1)
    return family.read_tokens(network, hidden)


def _most_attended_in_turn(ranked_BL: Tensor, most: Any, mask_BK: Tensor, for_onnx: bool) -> Tensor:
    """The places of the tokens with the highest scores in the order that they stand in, (B, K); of equals the first.

    Args:
        ranked_BL: Scores.
        most: K.
        mask_BK: True for as many places as a sequence keeps; those that follow are anybody's.
        for_onnx: Whether `topk` is ONNX's, which prefers the first of equals; torch's promises nothing.
    """
    length = ranked_BL.size(1)
    if for_onnx:
        places_BK = ranked_BL.topk(most, dim=1).indices
    else:
        places_BK = ranked_BL.sort(dim=1, descending=True, stable=True).indices[:, :most]
    in_turn_BK = places_BK.masked_fill(~mask_BK, length).topk(most, dim=1, largest=False).values
    return in_turn_BK.clamp(max=length - 1)


def _take(hidden_BLD: Tensor, places_BK: Tensor, for_onnx: bool) -> Tensor:
    """The vectors at some places of each sequence, (B, K, D)."""
    if for_onnx:
        shape = (*places_BK.shape, hidden_BLD.size(2))
        return _operator("GatherND", (hidden_BLD, places_BK[..., None]), hidden_BLD.dtype, shape, batch_dims=1)
    arriving = hidden_BLD.size(1)
    start_B1 = arriving * torch.arange(len(places_BK), device=places_BK.device)[:, None]
    return F.embedding(start_B1 + places_BK, hidden_BLD.flatten(0, 1))  # whole vectors are copied faster than elements


def _put_back(restored_RD: Tensor | None, hidden_BKD: Tensor, home_BK: Tensor, for_onnx: bool) -> Tensor:
    """Newer vectors at their places among all sequences' tokens' last ones, which a row follows for what has none."""
    if restored_RD is None:
        return F.pad(hidden_BKD.flatten(0, 1), (0, 0, 0, 1))
    if for_onnx:
        inputs = (restored_RD, home_BK[..., None], hidden_BKD)
        return _operator("ScatterND", inputs, restored_RD.dtype, restored_RD.shape)
    return restored_RD.index_put((home_BK,), hidden_BKD)


def _operator(
    name: str, inputs: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[Any], **attributes: Any
) -> Tensor:
    """What an operator of ONNX makes of tensors, in a graph that is exported."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape)
