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
WORTH_ROUNDING = 2**16
"""Attention weights from which on a product in bf16 saves more than it costs to round them."""
WIDTH_STEP = 16
"""Weights of a query are filled up to a multiple: torch's softmax takes those beyond one by one."""
FEW_KEYS = {torch.float32: 28, torch.bfloat16: 12}
"""Tokens, by the type of the values, up to which exponentials are quicker than a softmax of so many weights."""
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

    torch's fused attention returns no weights, so they are computed in the open where a layer needs scores, and where
    that is quicker.

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
    if infers_on_processor(query_BHLd):
        is_short = mask_BL is None and bias_BHLL is None and key_BHLd.size(2) <= FEW_KEYS[value_BHLd.dtype]
        if is_short or with_scores or value_BHLd.dtype == torch.bfloat16:  # else the fused one is as quick or quicker
            rest = (mask_BL, with_scores, by_value, bias_BHLL)
            return _attention_in_parts(query_BHLd, key_BHLd, value_BHLd, *rest, is_short=is_short, together=together)
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
    seen_B11L = None if mask_BL is None else mask_BL.view(mask_BL.size(0), 1, 1, -1)
    if seen_B11L is not None:
        weights = weights + torch.where(seen_B11L, 0.0, torch.finfo(weights.dtype).min).to(weights.dtype)
    weights = weights.softmax(-1)
    context = weights @ value_BHLd
    if not with_scores:
        return context, None
    received_BH1L = weights.sum(dim=2, keepdim=True) if seen_B11L is None else seen_B11L.to(weights.dtype) @ weights
    if by_value:
        received_BH1L = received_BH1L * value_BHLd.norm(dim=-1)[:, :, None]
    return context, received_BH1L.sum(dim=(1, 2))


def infers_on_processor(tensor: Tensor) -> bool:
    """Whether a processor computes with it, in torch's inference mode and in no more than single precision."""
    is_single = tensor.dtype in (torch.float32, torch.bfloat16)
    return torch.is_inference_mode_enabled() and tensor.device.type == "cpu" and is_single and not _is_traced()


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def as_weighed(tensor_BHLd: Tensor) -> Tensor:
    """Queries or keys as `attention` takes them: in float32, and by heads where copied, on a processor that infers."""
    if tensor_BHLd.dtype == torch.float32 or not infers_on_processor(tensor_BHLd):
        return tensor_BHLd
    return tensor_BHLd.to(torch.float32, memory_format=torch.contiguous_format)


def _attention_in_parts(
    query_BHLd: Tensor,
    key_BHLd: Tensor,
    value_BHLd: Tensor,
    mask_BL: Tensor | None,
    with_scores: bool,
    by_value: bool,
    bias_BHLL: Tensor | None,
    *,
    is_short: bool,
    together: int,
) -> tuple[Tensor, Tensor | None]:
    """As `attention`, with the float32 weights of a few sequences at a time in one buffer that stays in the cache.

    Beside `attention`'s arguments: whether sequences are so short that weights are left undivided by their sums, by
    which what is computed from them is divided, and how many sequences are worked on together.
    """
    size, heads, queries, _ = query_BHLd.shape
    length = key_BHLd.size(2)
    surplus = 0 if is_short else -length % WIDTH_STEP
    added_BHLL = _added(mask_BL, bias_BHLL)
    query_BHLd = as_weighed(query_BHLd)
    key_BHLd = _padded(key_BHLd, surplus, query_BHLd.dtype) if surplus else as_weighed(key_BHLd)
    values_BHLd = _padded(value_BHLd, surplus, value_BHLd.dtype) if surplus else value_BHLd
    context_BLHd = value_BHLd.new_empty(size, queries, heads, value_BHLd.size(3))
    received_BHL = query_BHLd.new_empty(size, heads, length)
    buffer = query_BHLd.new_empty(min(together, size) * heads, queries, length + surplus)
    for first in range(0, size, together):
        part = slice(first, min(first + together, size))
        query_GLd, key_GLd, value_GLd = (tensor[part].flatten(0, 1) for tensor in (query_BHLd, key_BHLd, values_BHLd))
        weights_GLL = buffer[: len(query_GLd)]
        weights_BHLL = weights_GLL.view(-1, heads, *weights_GLL.shape[1:])
        asking_BHQ = None if mask_BL is None else mask_BL[part, None].float()
        if is_short:
            sum_GL1 = _exponentials(query_GLd, key_GLd, weights_GLL)
            context_GLd = _product(weights_GLL, value_GLd).div_(sum_GL1)
            asking_BHQ = sum_GL1.reciprocal_().view(-1, heads, queries)
        else:
            _scaled_products(query_GLd, key_GLd, weights_GLL)
            weights_BHLL[..., length:] = -torch.inf
            if added_BHLL is not None:
                weights_BHLL[..., :length] += added_BHLL if len(added_BHLL) == 1 else added_BHLL[part]
            torch.softmax(weights_GLL, -1, out=weights_GLL)
            context_GLd = _product(weights_GLL, value_GLd)
        context_BLHd[part] = context_GLd.view(-1, heads, *context_GLd.shape[1:]).transpose(1, 2)
        if with_scores:
            summed = weights_BHLL.sum(dim=2) if asking_BHQ is None else (asking_BHQ[:, :, None] @ weights_BHLL)[:, :, 0]
            received_BHL[part] = summed[..., :length]
    if not with_scores:
        return context_BLHd.transpose(1, 2), None
    if by_value:
        copied_BHLd = values_BHLd[:, :, :length]  # quicker than the original
        received_BHL *= torch.linalg.vector_norm(copied_BHLd, dim=-1, dtype=received_BHL.dtype)
    return context_BLHd.transpose(1, 2), received_BHL.sum(dim=1)


def _padded(tensor_BHLd: Tensor, surplus: int, dtype: torch.dtype) -> Tensor:
    """A copy with so many more tokens of zeros, head after head, in the type asked for."""
    size, heads, length, width = tensor_BHLd.shape
    padded_BHLd = tensor_BHLd.new_empty(size, heads, length + surplus, width, dtype=dtype)
    padded_BHLd[:, :, :length] = tensor_BHLd
    padded_BHLd[:, :, length:] = 0
    return padded_BHLd


def _product(weights_GLL: Tensor, value_GLd: Tensor) -> Tensor:
    """Weights times values, in the type of the values unless there are so few that it does not matter."""
    if weights_GLL.numel() < WORTH_ROUNDING:
        return weights_GLL @ value_GLd.float()
    return weights_GLL.to(value_GLd.dtype) @ value_GLd


def _scaled_products(query_GLd: Tensor, key_GLd: Tensor, out_GLL: Tensor) -> None:
    torch.baddbmm(out_GLL, query_GLd, key_GLd.mT, beta=0, alpha=query_GLd.size(2) ** -0.5, out=out_GLL)


def _exponentials(query_GLd: Tensor, key_GLd: Tensor, out_GLL: Tensor) -> Tensor:
    """Fill `out_GLL` with the attention weights times their sums over the keys, and return the sums (G, L, 1).

    They are not shifted by the greatest product first, which saves two passes, unless that leaves float32's range.
    """
    _scaled_products(query_GLd, key_GLd, out_GLL)
    sum_GL1 = out_GLL.exp_().sum(dim=2, keepdim=True)
    least, most = torch.aminmax(sum_GL1)
    if least > SUMS_IN_RANGE[0] and most < SUMS_IN_RANGE[1]:
        return sum_GL1
    _scaled_products(query_GLd, key_GLd, out_GLL)
    out_GLL -= out_GLL.amax(dim=2, keepdim=True)
    return out_GLL.exp_().sum(dim=2, keepdim=True)


def _added(mask_BL: Tensor | None, bias_BHLL: Tensor | None) -> Tensor | None:
    """What is added to the scaled products, in float32, of four dimensions; None for nothing."""
    both = _mask_or_bias(mask_BL, bias_BHLL)
    if both is None or both.dtype != torch.bool:
        return None if both is None else both.float()
    return torch.zeros(both.shape).masked_fill(~both, torch.finfo(torch.float32).min)


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
    bytes_of_each = torch.float32.itemsize if infers_on_processor(query_BHLd) else query_BHLd.element_size()
    return max(1, WEIGHT_BYTES // (heads * queries * key_BHLd.size(2) * bytes_of_each))


def _parts(tensor_BX: Tensor | None, rows: int, size: int) -> Sequence[Tensor | None]:
    """Consecutive parts of a batch; of what is the same for all, or of nothing, as many times that."""
    if tensor_BX is None or len(tensor_BX) < size:
        return [tensor_BX] * -(-size // rows)
    return torch.split(tensor_BX, rows)
