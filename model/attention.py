"""Scaled dot-product attention that also says how much attention each token received.

Shape letters: B sequences, L tokens, Q tokens that ask, H heads, d size of a head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

TOKEN_SCORES = ("attention", "value_norm")
"""What tokens may be ranked by: the attention they receive, or that times the norm of their value vectors."""

WEIGHT_BYTES = 3 * 2**20
"""Attention weights that are worked on together where a processor has to write them out."""
SHORT = 32
"""Tokens up to which torch's fused attention is slower on a processor than its parts."""
SUMS_IN_RANGE = (1e-20, 1e33)
"""Sums of exponentials, between which float32 has room for each of them, and for its products with values."""


def token_score(config: PreTrainedConfig) -> str:
    """What a checkpoint's tokens are ranked by: one of `TOKEN_SCORES`, the first where its config names none."""
    return str(getattr(config, "token_score", None) or TOKEN_SCORES[0])


def attention(
    query_BHLd: Tensor,
    key_BHLd: Tensor,
    value_BHLd: Tensor,
    mask_BL: Tensor | None,
    dropout: float,
    with_scores: bool,
    by_value: bool = False,
    bias_BHLL: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention and, where asked for, the attention each token receives.

    torch's fused attention returns no weights, so they are computed in the open only where a layer needs scores.

    Args:
        query_BHLd: Queries per head.
        key_BHLd: Keys per head.
        value_BHLd: Values per head.
        mask_BL: True at real tokens; None where all are real.
        dropout: Probability on the attention weights; the scores see the weights before it.
        with_scores: Also return the scores.
        by_value: Weigh each head's attention to a token by the norm of the token's value vector there, which is what
            the attention brings into the context. Here we leave the paper.
        bias_BHLL: Added to the scaled products before the softmax; the least number of its type keeps a token from
            seeing another. The first two dimensions may be 1.
    Returns:
        The context (B, H, L, d), and the float32 scores (B, L) or None: attention received, summed over heads
        and real queries; meaningless at padding. No gradient flows through scores, which only select.
    Source: the score is from Goyal et al. 2020 (PoWER-BERT), "Word-vector Selection".
    """
    together = _sequences_in_cache(query_BHLd, key_BHLd)
    if mask_BL is None and bias_BHLL is None and _infers_on_processor(query_BHLd):
        if with_scores:
            return _attention_written_once(query_BHLd, key_BHLd, value_BHLd, by_value, together)
        if query_BHLd.size(2) == key_BHLd.size(2) <= SHORT:
            return _attention_of_short(query_BHLd, key_BHLd, value_BHLd), None
    if with_scores and together < query_BHLd.size(0):
        arguments = (query_BHLd, key_BHLd, value_BHLd, mask_BL, bias_BHLL)
        parts = zip(*(_parts(argument, together, query_BHLd.size(0)) for argument in arguments), strict=True)
        results = [attention(q, k, v, mask, dropout, True, by_value, bias) for q, k, v, mask, bias in parts]
        return torch.cat([context for context, _ in results]), torch.cat(
            [score for _, score in results if score is not None]
        )
    if torch.compiler.is_exporting():
        return _attention_of_a_graph(query_BHLd, key_BHLd, value_BHLd, mask_BL, with_scores, by_value, bias_BHLL)
    mask_or_bias = _mask_or_bias(mask_BL, bias_BHLL)
    if not with_scores:
        context = F.scaled_dot_product_attention(query_BHLd, key_BHLd, value_BHLd, mask_or_bias, dropout_p=dropout)
        return context, None
    weights = (query_BHLd * query_BHLd.size(-1) ** -0.5) @ key_BHLd.transpose(-1, -2)
    if mask_or_bias is not None and mask_or_bias.dtype == torch.bool:
        weights = weights.masked_fill(~mask_or_bias, -torch.inf)
    elif mask_or_bias is not None:
        weights = weights + mask_or_bias
    weights = weights.softmax(-1)
    context = F.dropout(weights, dropout, training=dropout > 0) @ value_BHLd
    received = weights.detach().float()
    if mask_BL is not None:
        received = received * mask_BL[:, None, :, None]
    received_BHL = received.sum(dim=2)
    if by_value:
        received_BHL = received_BHL * value_BHLd.detach().float().norm(dim=-1)
    score_BL = received_BHL.sum(dim=1)
    return context, score_BL


def _attention_of_a_graph(
    query_BHLd: Tensor,
    key_BHLd: Tensor,
    value_BHLd: Tensor,
    mask_BL: Tensor | None,
    with_scores: bool,
    by_value: bool,
    bias_BHLL: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """As `attention`, in operations that runtimes of graphs are quick at: they have the fused one in parts anyway.

    A mask is added, once for all heads, rather than chosen by; and real queries' weights are summed by a product, which
    reads them once.
    """
    weights = (query_BHLd * query_BHLd.size(-1) ** -0.5) @ key_BHLd.transpose(-1, -2)
    if bias_BHLL is not None:
        weights = weights + bias_BHLL
    if mask_BL is not None:
        unseen_BL = torch.zeros_like(mask_BL, dtype=weights.dtype).masked_fill(~mask_BL, torch.finfo(weights.dtype).min)
        weights = weights + unseen_BL[:, None, None, :]
    weights = weights.softmax(-1)
    context = weights @ value_BHLd
    if not with_scores:
        return context, None
    if mask_BL is None:
        received_BHL = weights.sum(dim=2)
    else:
        received_BHL = (mask_BL.to(weights.dtype)[:, None, None, :] @ weights).squeeze(2)
    if by_value:
        received_BHL = received_BHL * value_BHLd.norm(dim=-1)
    return context, received_BHL.sum(dim=1)


def _infers_on_processor(query_BHLd: Tensor) -> bool:
    """Whether a processor computes in float32, in torch's inference mode."""
    return torch.is_inference_mode_enabled() and query_BHLd.device.type == "cpu" and query_BHLd.dtype == torch.float32


def _attention_written_once(
    query_BHLd: Tensor, key_BHLd: Tensor, value_BHLd: Tensor, by_value: bool, together: int
) -> tuple[Tensor, Tensor]:
    """Context and scores of unpadded sequences, with the weights in one buffer that stays in the cache.

    The weights are never divided by their sums: what is computed from them is, which is far smaller.
    """
    size, heads, length, _ = query_BHLd.shape
    context_BLHd = value_BHLd.new_empty(size, length, heads, value_BHLd.size(3))
    received_BHL = query_BHLd.new_empty(size, heads, length)
    buffer = query_BHLd.new_empty(min(together, size) * heads, length, length)
    for first in range(0, size, together):
        part = slice(first, min(first + together, size))
        query_GLd, key_GLd, value_GLd = (tensor[part].flatten(0, 1) for tensor in (query_BHLd, key_BHLd, value_BHLd))
        weights_GLL = buffer[: len(query_GLd)]
        share_GL1 = _exponentials(query_GLd, key_GLd, weights_GLL).reciprocal_()
        context_GLd = (weights_GLL @ value_GLd).mul_(share_GL1)
        context_BLHd[part] = context_GLd.view(-1, heads, length, value_BHLd.size(3)).transpose(1, 2)
        received_BHL[part] = (share_GL1.mT @ weights_GLL).view(-1, heads, length)
    if by_value:
        received_BHL *= value_BHLd.norm(dim=-1)
    return context_BLHd.transpose(1, 2), received_BHL.sum(dim=1)


def _attention_of_short(query_BHLd: Tensor, key_BHLd: Tensor, value_BHLd: Tensor) -> Tensor:
    """Context of unpadded sequences that are so short that what fused attention saves is less than what it costs."""
    query_GLd, key_GLd, value_GLd = (tensor.flatten(0, 1) for tensor in (query_BHLd, key_BHLd, value_BHLd))
    weights_GLL = query_GLd.new_empty(len(query_GLd), query_GLd.size(1), key_GLd.size(1))
    sum_GL1 = _exponentials(query_GLd, key_GLd, weights_GLL)
    return (weights_GLL @ value_GLd).div_(sum_GL1).view(query_BHLd.shape)


def _exponentials(query_GLd: Tensor, key_GLd: Tensor, out_GLL: Tensor) -> Tensor:
    """Fill `out_GLL` with the attention weights times their sums over the keys, and return the sums (G, L, 1).

    They are not shifted by the greatest product first, which saves two passes, unless that leaves float32's range.
    """
    scale = query_GLd.size(2) ** -0.5
    torch.baddbmm(out_GLL, query_GLd, key_GLd.mT, beta=0, alpha=scale, out=out_GLL)
    sum_GL1 = out_GLL.exp_().sum(dim=2, keepdim=True)
    least, most = torch.aminmax(sum_GL1)
    if least > SUMS_IN_RANGE[0] and most < SUMS_IN_RANGE[1]:
        return sum_GL1
    torch.baddbmm(out_GLL, query_GLd, key_GLd.mT, beta=0, alpha=scale, out=out_GLL)
    out_GLL -= out_GLL.amax(dim=2, keepdim=True)
    return out_GLL.exp_().sum(dim=2, keepdim=True)


def _mask_or_bias(mask_BL: Tensor | None, bias_BHLL: Tensor | None) -> Tensor | None:
    """Both in one, as torch takes them: which keys are seen, or what is added to the products."""
    seen_B11L = None if mask_BL is None else mask_BL[:, None, None, :]
    if bias_BHLL is None or seen_B11L is None:
        return seen_B11L if bias_BHLL is None else bias_BHLL
    # Not -inf: padding that may see nothing but padding would get no number.
    return bias_BHLL.masked_fill(~seen_B11L, torch.finfo(bias_BHLL.dtype).min)


def _sequences_in_cache(query_BHLd: Tensor, key_BHLd: Tensor) -> int:
    """How many sequences' attention weights stay in a processor's cache together; all, on a GPU or in a graph."""
    size, heads, queries, _ = query_BHLd.shape
    if query_BHLd.device.type != "cpu" or torch.compiler.is_exporting():
        return size
    return max(1, WEIGHT_BYTES // (heads * queries * key_BHLd.size(2) * query_BHLd.element_size()))


def _parts(tensor_BX: Tensor | None, rows: int, size: int) -> Sequence[Tensor | None]:
    """Consecutive parts of a batch; of what is the same for all, or of nothing, as many times that."""
    if tensor_BX is None or len(tensor_BX) < size:
        return [tensor_BX] * -(-size // rows)
    return torch.split(tensor_BX, rows)
