"""What a multiply-accumulate (MAC) is here, and how many one sequence costs.

One MAC is one multiplication with its addition: 2 FLOPs. Counted are the matrix products of every layer and
of the head, and one MAC per element of each LayerNorm. Not counted: the embedding look-ups, softmax, GELU, biases,
residual additions and the sums that score tokens, none of which is a matrix product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.length_config import LengthConfig, counts_of_shares

COUNTS_TOGETHER = 2**16
"""Counts of tokens that are worked on at once; thousands of configs over a split would take gigabytes."""


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The sizes that decide an encoder's cost.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width d of a token vector.
        feed_forward_size: Inner width f of the feed-forward block.
        feed_forward_products: Its matrix products of d by f: 2, or 3 with a gate.
        embedding_macs_per_token: MACs before the first layer: a LayerNorm, and the projection of narrower embeddings;
            None where it is a LayerNorm of width d alone.
        attention_macs_per_token: MACs per arriving token and layer beyond BERT's, such as attention to distances.
        head_macs_per_sequence: MACs of the task head that do not depend on length (a classifier's).
        head_macs_per_token: MACs of the task head for each token of the restored sequence (a span head's).
    """

    num_layers: int
    hidden_size: int
    feed_forward_size: int
    feed_forward_products: int = 2
    embedding_macs_per_token: int | None = None
    attention_macs_per_token: int = 0
    head_macs_per_sequence: int = 0
    head_macs_per_token: int = 0


def layer_macs(shape: EncoderShape, arriving: NDArray[np.int64], kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """MACs of one layer: for BERT `4nd² + 2n²d + 2mdf`, plus `nd + md` for its two LayerNorms.

    Args:
        shape: d, f and what the architecture adds to BERT's.
        arriving: n, tokens entering self-attention.
        kept: m, tokens entering the feed-forward block; dropping happens between the two.
    Source: the counter of clovaai/length-adaptive-transformer; it gives the published totals.
    """
    n, m, d, f = arriving, kept, shape.hidden_size, shape.feed_forward_size
    attention = 4 * n * d * d + 2 * n * n * d + n * shape.attention_macs_per_token
    return attention + shape.feed_forward_products * m * d * f + n * d + m * d


def sequence_macs(
    shape: EncoderShape, num_tokens_N: Sequence[int] | NDArray[np.int64], config: LengthConfig | None = None
) -> NDArray[np.int64]:
    """MACs of each sequence, head included, as int64 (N,).

    Args:
        shape: The encoder's sizes.
        num_tokens_N: Real tokens of each sequence; padding costs nothing here because none is computed.
        config: Tokens left after each layer; None keeps all of them. A skipped layer costs nothing.
    Raises:
        ValueError: `config` speaks of another number of layers.
    """
    num_tokens = np.asarray(num_tokens_N, dtype=np.int64)
    config = config or LengthConfig.full(shape.num_layers)
    if config.num_layers != shape.num_layers:
        raise ValueError(f"The length config has {config.num_layers} layers, the encoder {shape.num_layers}.")
    computed = np.isin(np.arange(shape.num_layers), config.computed)
    return _macs_of_counts(shape, num_tokens, config.count_table(num_tokens), computed)


def _macs_of_counts(
    shape: EncoderShape, num_tokens: NDArray[np.int64], counts: NDArray[np.int64], computed: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """MACs where `counts[..., layer]` tokens are left after each layer and `computed[..., layer]` are not skipped."""
    per_token = shape.hidden_size if shape.embedding_macs_per_token is None else shape.embedding_macs_per_token
    macs = num_tokens * per_token
    arriving = num_tokens
    for layer in range(shape.num_layers):
        kept = counts[..., layer]
        macs = macs + layer_macs(shape, arriving, kept) * computed[..., layer]
        arriving = kept
    return macs + shape.head_macs_per_sequence + num_tokens * shape.head_macs_per_token


def mean_macs(shape: EncoderShape, num_tokens_N: NDArray[np.int64], config: LengthConfig | None = None) -> float:
    """Mean MACs of a split's real sequences, without padding."""
    lengths, repeats = np.unique(num_tokens_N, return_counts=True)
    return float((sequence_macs(shape, lengths, config) * repeats).sum() / repeats.sum())


def mean_macs_of_shares(
    shape: EncoderShape,
    num_tokens_N: NDArray[np.int64],
    shares_CL: NDArray[np.floating[Any]],
    skipped_CL: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """`mean_macs` of thousands of configs at once, (C,).

    Args:
        shape: The encoder's sizes.
        num_tokens_N: Real tokens of each sequence.
        shares_CL: Shares left after the layers of each config; at a skipped layer, those that arrive.
        skipped_CL: Which layers each config skips.
    """
    lengths, repeats = np.unique(num_tokens_N, return_counts=True)
    means_C: NDArray[np.float64] = np.empty(len(shares_CL))
    for part, counts_CNL in _counts_in_parts(lengths, shares_CL):
        macs_CN = _macs_of_counts(shape, lengths, counts_CNL, ~skipped_CL[part, None, :])
        means_C[part] = (macs_CN * repeats).sum(axis=1) / repeats.sum()
    return means_C


def tokens_left(num_tokens_N: NDArray[np.int64], shares_CL: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Tokens of a whole split left after each layer of many configs, (C, L).

    A greater share leaves no sequence fewer tokens, so that equal sums mean equal counts of every sequence.

    Args:
        num_tokens_N: Real tokens of each sequence.
        shares_CL: Shares left after the layers of each config; at a skipped layer, those that arrive.
    """
    lengths, repeats = np.unique(num_tokens_N, return_counts=True)
    left_CL = np.empty(shares_CL.shape, dtype=np.int64)
    for part, counts_CNL in _counts_in_parts(lengths, shares_CL):
        left_CL[part] = (counts_CNL * repeats[:, None]).sum(axis=1)
    return left_CL


def _counts_in_parts(
    lengths: NDArray[np.int64], shares_CL: NDArray[np.floating[Any]]
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Tokens left of sequences of each length, (C, N, L), of a few configs at a time, and which configs those are."""
    together = max(1, COUNTS_TOGETHER // max(1, len(lengths) * shares_CL.shape[1]))
    for first in range(0, len(shares_CL), together):
        part = slice(first, first + together)
        yield part, counts_of_shares(shares_CL[part, None, :], lengths[:, None])


def constant_rate_config(shape: EncoderShape, num_tokens_N: NDArray[np.int64], relative_macs: float) -> LengthConfig:
    """The config with one retention for all layers whose mean cost is `relative_macs` of full length.

    Counts are whole tokens, so the cost is a step function of the rate; the largest rate that stays within
    the budget is returned, to 1e-6. Where even the smallest rate exceeds the budget, that smallest is returned.

    Args:
        shape: The encoder's sizes.
        num_tokens_N: Real tokens of each sequence of the split that the cost is averaged over.
        relative_macs: Share of the full-length cost, in (0, 1].
    """
    if not 0.0 < relative_macs <= 1.0:
        raise ValueError(f"relative_macs={relative_macs}; choose a share in (0, 1].")
    if relative_macs == 1.0:
        return LengthConfig.full(shape.num_layers)
    budget = relative_macs * mean_macs(shape, num_tokens_N)
    low, high = 1e-3, 1.0
    while high - low > 1e-6:
        rate = (low + high) / 2
        config = LengthConfig.from_retention((rate,) * shape.num_layers)
        low, high = (rate, high) if mean_macs(shape, num_tokens_N, config) <= budget else (low, rate)
    return LengthConfig.from_retention((low,) * shape.num_layers)
