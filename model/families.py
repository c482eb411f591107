"""What the length-adaptive encoder needs to know of each transformers architecture.

An `EncoderFamily` names the parts of a transformers network and computes one layer in two halves, self-attention and
feed-forward, because tokens are dropped between them. Of self-attention only `mix` looks at more than one token, so
all other parts take rows of tokens packed from sequences of any length. Nothing else in the project knows an
architecture.

Shape letters: B sequences, L tokens arriving, R rows (any leading dimensions of tokens), D hidden size, P what
`project` makes of a token, H heads, C classes.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from model.macs import EncoderShape

TOKEN_SCORES = ("attention", "value_norm")
"""What tokens may be ranked by: the attention they receive, or that times the norm of their value vectors."""


WEIGHT_BYTES = 3 * 2**20
"""Attention weights that are worked on together where a processor has to write them out."""


class EncoderFamily(Protocol):
    """One architecture's parts; implementations hold no state."""

    def shape(self, config: PreTrainedConfig) -> EncoderShape:
        """The sizes that decide the encoder's cost."""

    def embed(
        self, network: PreTrainedModel, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor
    ) -> Tensor:
        """Token vectors (R, D) that enter the first layer; `positions_R` counts from 0 in each sequence."""

    def project(self, network: PreTrainedModel, layer: int, hidden_RD: Tensor) -> Tensor:
        """What self-attention needs of each token, its query, key and value, as (R, P)."""

    def mix(
        self, network: PreTrainedModel, layer: int, projected_BLP: Tensor, mask_BL: Tensor | None, with_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Let the tokens of each sequence attend to each other.

        Args:
            network: The transformers network.
            layer: Index of the layer.
            projected_BLP: `project` of the token vectors that arrive.
            mask_BL: True at real tokens; None where all are real.
            with_scores: Also return how much attention each token received.
        Returns:
            The context (B, L, D), and the float32 scores (B, L) or None.
        """

    def project_for_first(self, network: PreTrainedModel, layer: int, hidden_RD: Tensor) -> Tensor:
        """What `mix_first` needs of each token, without the queries that nobody asks, as (R, Q)."""

    def mix_first(self, network: PreTrainedModel, layer: int, first_BD: Tensor, projected_BLQ: Tensor) -> Tensor:
        """The context (B, D) of each sequence's first token alone, whose vector is given; all tokens are real."""

    def merge(self, network: PreTrainedModel, layer: int, context_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        """The attended vectors: output projection of the context, residual and LayerNorm."""

    def feed_forward(self, network: PreTrainedModel, layer: int, attended_RD: Tensor) -> Tensor:
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

    def embed(self, network: Any, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor) -> Tensor:
        embeddings: Tensor = network.bert.embeddings(
            input_ids=input_ids_R, token_type_ids=token_type_ids_R, position_ids=positions_R
        )
        return embeddings

    def project(self, network: Any, layer: int, hidden_RD: Tensor) -> Tensor:
        block = network.bert.encoder.layer[layer].attention.self
        return _together(hidden_RD, block.query, block.key, block.value)

    def mix(
        self, network: Any, layer: int, projected_BLP: Tensor, mask_BL: Tensor | None, with_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self._heads(network, projected_BLP)
        dropout = network.config.attention_probs_dropout_prob if network.training else 0.0
        by_value = token_score(network.config) == "value_norm"
        context_BHLd, score_BL = attention(query, key, value, mask_BL, dropout, with_scores, by_value)
        return context_BHLd.transpose(1, 2).flatten(2), score_BL

    def project_for_first(self, network: Any, layer: int, hidden_RD: Tensor) -> Tensor:
        block = network.bert.encoder.layer[layer].attention.self
        return _together(hidden_RD, block.key, block.value)

    def mix_first(self, network: Any, layer: int, first_BD: Tensor, projected_BLQ: Tensor) -> Tensor:
        query = network.bert.encoder.layer[layer].attention.self.query(first_BD)
        query_BH1d = query.view(len(query), network.config.num_attention_heads, 1, -1)
        key, value = self._heads(network, projected_BLQ)
        return attention(query_BH1d, key, value, None, 0.0, with_scores=False)[0].flatten(1)

    def _heads(self, network: Any, projected_BLP: Tensor) -> tuple[Tensor, ...]:
        """The parts of width D that were projected together, (B, H, L, d) each."""
        size, length, width = projected_BLP.shape
        parts = width // network.config.hidden_size
        per_head = projected_BLP.view(size, length, parts, network.config.num_attention_heads, -1)
        return per_head.permute(2, 0, 3, 1, 4).unbind()

    def merge(self, network: Any, layer: int, context_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        attended: Tensor = network.bert.encoder.layer[layer].attention.output(context_RD, hidden_RD)
        return attended

    def feed_forward(self, network: Any, layer: int, attended_RD: Tensor) -> Tensor:
        hidden: Tensor = network.bert.encoder.layer[layer].feed_forward_chunk(attended_RD)
        return hidden

    def classify(self, network: Any, hidden_BKD: Tensor) -> Tensor:
        logits: Tensor = network.classifier(network.dropout(network.bert.pooler(hidden_BKD)))
        return logits


def _together(hidden_RD: Tensor, *projections: torch.nn.Linear) -> Tensor:
    """Several projections of the same rows as one product, in the precision of their weights."""
    weight = torch.cat([projection.weight for projection in projections])
    return F.linear(hidden_RD.to(weight.dtype), weight, torch.cat([projection.bias for projection in projections]))


FAMILIES: dict[str, EncoderFamily] = {"bert": BertFamily()}
"""Adapters by transformers' `model_type`."""


def attend(
    family: EncoderFamily,
    network: PreTrainedModel,
    layer: int,
    hidden_BLD: Tensor,
    mask_BL: Tensor | None,
    with_scores: bool,
) -> tuple[Tensor, Tensor | None]:
    """The whole self-attention half of a layer, for a batch; see `EncoderFamily.mix` for arguments and results."""
    projected_BLP = family.project(network, layer, hidden_BLD)
    context_BLD, score_BL = family.mix(network, layer, projected_BLP, mask_BL, with_scores)
    return family.merge(network, layer, context_BLD, hidden_BLD), score_BL


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
    Returns:
        The context (B, H, L, d), and the float32 scores (B, L) or None: attention received, summed over heads
        and real queries; meaningless at padding. No gradient flows through scores, which only select.
    Source: the score is from Goyal et al. 2020 (PoWER-BERT), "Word-vector Selection".
    """
    together = _sequences_in_cache(query_BHLd, key_BHLd)
    if with_scores and together < len(query_BHLd):
        arguments = (query_BHLd, key_BHLd, value_BHLd, mask_BL)
        parts = zip(*(_parts(argument, together, len(query_BHLd)) for argument in arguments), strict=True)
        results = [attention(q, k, v, mask, dropout, True, by_value) for q, k, v, mask in parts]
        return torch.cat([context for context, _ in results]), torch.cat(
            [score for _, score in results if score is not None]
        )
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
    received_BHL = received.sum(dim=2)
    if by_value:
        received_BHL = received_BHL * value_BHLd.detach().float().norm(dim=-1)
    score_BL = received_BHL.sum(dim=1)
    return F.dropout(weights, dropout, training=dropout > 0) @ value_BHLd, score_BL


def _sequences_in_cache(query_BHLd: Tensor, key_BHLd: Tensor) -> int:
    """How many sequences' attention weights stay in a processor's cache together; all of them on a GPU."""
    size, heads, queries, _ = query_BHLd.shape
    if query_BHLd.device.type != "cpu":
        return size
    return max(1, WEIGHT_BYTES // (heads * queries * key_BHLd.size(2) * query_BHLd.element_size()))


def _parts(tensor_BX: Tensor | None, rows: int, size: int) -> Sequence[Tensor | None]:
    """Consecutive parts of a batch, or as many times nothing."""
    if tensor_BX is None:
        return [None] * -(-size // rows)
    return torch.split(tensor_BX, rows)
