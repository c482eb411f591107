"""What the length-adaptive encoder needs to know of each transformers architecture.

An `EncoderFamily` names the parts of a transformers network and computes one layer in two halves, self-attention and
feed-forward, because tokens are dropped between them. Nothing else in the project knows an architecture.

Shape letters: B sequences, L tokens arriving, D hidden size, H heads, C classes.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from model.macs import EncoderShape


class EncoderFamily(Protocol):
    """One architecture's parts; implementations hold no state."""

    def shape(self, config: PreTrainedConfig) -> EncoderShape:
        """The sizes that decide the encoder's cost."""

    def embed(self, network: PreTrainedModel, input_ids_BL: Tensor, token_type_ids_BL: Tensor | None) -> Tensor:
        """Token vectors (B, L, D) that enter the first layer."""

    def attend(
        self, network: PreTrainedModel, layer: int, hidden_BLD: Tensor, mask_BL: Tensor | None, with_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The self-attention half of a layer, its residual and LayerNorm included.

        Args:
            network: The transformers network.
            layer: Index of the layer.
            hidden_BLD: Token vectors that arrive.
            mask_BL: True at real tokens; None where all are real.
            with_scores: Also return how much attention each token received.
        Returns:
            The attended vectors (B, L, D), and the float32 scores (B, L) or None.
        """

    def feed_forward(self, network: PreTrainedModel, layer: int, attended_BKD: Tensor) -> Tensor:
        """The feed-forward half of a layer, its residual and LayerNorm included."""

    def classify(self, network: PreTrainedModel, hidden_BKD: Tensor) -> Tensor:
        """Logits (B, C) from the last layer's vectors; the first token is [CLS]."""


class BertFamily:
    """BERT as transformers builds it, with absolute positions and a pooled [CLS] classifier."""

    def shape(self, config: PreTrainedConfig) -> EncoderShape:
        d = config.hidden_size
        return EncoderShape(
            num_layers=config.num_hidden_layers,
            hidden_size=d,
            feed_forward_size=config.intermediate_size,
            head_macs_per_sequence=d * d + d * config.num_labels,
        )

    def embed(self, network: Any, input_ids_BL: Tensor, token_type_ids_BL: Tensor | None) -> Tensor:
        embeddings: Tensor = network.bert.embeddings(input_ids=input_ids_BL, token_type_ids=token_type_ids_BL)
        return embeddings

    def attend(
        self, network: Any, layer: int, hidden_BLD: Tensor, mask_BL: Tensor | None, with_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        block = network.bert.encoder.layer[layer].attention
        heads = block.self.num_attention_heads
        query, key, value = (
            projection(hidden_BLD).unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection in (block.self.query, block.self.key, block.self.value)
        )
        dropout = block.self.dropout.p if network.training else 0.0
        context_BHLd, score_BL = attention(query, key, value, mask_BL, dropout, with_scores)
        attended = block.output(context_BHLd.transpose(1, 2).flatten(2), hidden_BLD)
        return attended, score_BL

    def feed_forward(self, network: Any, layer: int, attended_BKD: Tensor) -> Tensor:
        hidden: Tensor = network.bert.encoder.layer[layer].feed_forward_chunk(attended_BKD)
        return hidden

    def classify(self, network: Any, hidden_BKD: Tensor) -> Tensor:
        logits: Tensor = network.classifier(network.dropout(network.bert.pooler(hidden_BKD)))
        return logits


FAMILIES: dict[str, EncoderFamily] = {"bert": BertFamily()}
"""Adapters by transformers' `model_type`."""


def attention(
    query_BHLd: Tensor, key_BHLd: Tensor, value_BHLd: Tensor, mask_BL: Tensor | None, dropout: float, with_scores: bool
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
    Returns:
        The context (B, H, L, d), and the float32 scores (B, L) or None: attention received, summed over heads
        and real queries; meaningless at padding. No gradient flows through scores, which only select.
    Source: the score is from Goyal et al. 2020 (PoWER-BERT), "Word-vector Selection".
    """
    mask_B11L = None if mask_BL is None else mask_BL[:, None, None, :]
    if not with_scores:
        context = F.scaled_dot_product_attention(query_BHLd, key_BHLd, value_BHLd, mask_B11L, dropout_p=dropout)
        return context, None
    weights = (query_BHLd * query_BHLd.size(-1) ** -0.5) @ key_BHLd.transpose(-1, -2)
    if mask_B11L is not None:
        weights = weights.masked_fill(~mask_B11L, -torch.inf)
    weights = weights.softmax(-1)
    received = weights.detach().float()
    if mask_BL is not None:
        received = received * mask_BL[:, None, :, None]
    score_BL = received.sum(dim=(1, 2))
    return F.dropout(weights, dropout, training=dropout > 0) @ value_BHLd, score_BL
