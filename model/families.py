"""What the length-adaptive encoder needs to know of each transformers architecture.

An `EncoderFamily` names the parts of a transformers network and computes one layer in two halves, self-attention and
feed-forward, because tokens are dropped between them. Of self-attention only `mix` looks at more than one token, so
all other parts take rows of tokens packed from sequences of any length. Nothing else in the project knows an
architecture. CONTRIBUTING says how to add one.

Shape letters: B sequences, L tokens arriving, R rows (any leading dimensions of tokens), D hidden size, P what
`project` makes of a token, H heads, d size of a head, C classes.
"""

import abc
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from model.attention import as_weighed, attention, token_score
from model.macs import EncoderShape

TOKEN_TASKS = ("question-answering", "token-classification")
"""Tasks whose heads read every token."""
TOGETHER = "packed_with_those_after_it"
"""Attribute of a projection: a product in place of it and those that follow it, where `model.prepacked` left one."""


Prepared = tuple[Tensor, Tensor, Tensor | None]
"""Queries and keys, and what is added to their scaled products, (B, H or 1, Q, L), or None."""


class Places(NamedTuple):
    """Where tokens stood in their sequences.

    Attributes:
        asking_BQ: Those that queries are of.
        asked_BL: Those that keys are of.
    """

    asking_BQ: Tensor
    asked_BL: Tensor

    def distances(self) -> Tensor:
        """How far behind each asking token each asked one stood, (B, Q, L)."""
        return self.asked_BL[:, None, :] - self.asking_BQ[:, :, None]


class EncoderFamily(abc.ABC):
    """One architecture's parts; implementations hold no state.

    What is here suits encoders that project queries, keys and values with a linear layer each; the abstract methods say
    what an architecture calls its parts.

    Attributes:
        has_projections_apart: Whether queries, keys and values are made by a linear layer each.
        scores_alike: Whether tokens receive exactly equal attention other than by chance.
    """

    has_projections_apart: ClassVar[bool] = True
    scores_alike: ClassVar[bool] = False

    def refusal(self, config: Any, task: str) -> str | None:
        """Why an encoder with this configuration cannot drop tokens, in words that follow its name; None if it can."""
        return None

    def shape(self, config: Any, task: str) -> EncoderShape:
        """The sizes that decide the encoder's cost."""
        d = config.hidden_size
        pooled, read = d * d + d * config.num_labels, d * config.num_labels
        return EncoderShape(
            num_layers=config.num_hidden_layers,
            hidden_size=d,
            feed_forward_size=self.feed_forward_size(config),
            head_macs_per_sequence=0 if task in TOKEN_TASKS else pooled,
            head_macs_per_token=read if task in TOKEN_TASKS else 0,
        )

    def feed_forward_size(self, config: Any) -> int:
        """Inner width of the feed-forward half."""
        return int(config.intermediate_size)

    def max_tokens(self, config: Any) -> int:
        """The longest sequence, special tokens included."""
        return int(config.max_position_embeddings)

    @abc.abstractmethod
    def embed(self, network: Any, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor) -> Tensor:
        """Token vectors (R, D) that enter the first layer; `positions_R` counts from 0 in each sequence."""

    @abc.abstractmethod
    def layer(self, network: Any, layer: int) -> Any:
        """The network's module for a layer."""

    @abc.abstractmethod
    def projections(self, layer: Any) -> tuple[Any, Any, Any]:
        """A layer's linear layers for queries, keys and values."""

    def project(self, network: PreTrainedModel, layer: int, hidden_RD: Tensor) -> Tensor:
        """What self-attention needs of each token, its query, key and value, as (R, P)."""
        return _together(hidden_RD, *self.projections(self.layer(network, layer)))

    def mix(
        self,
        network: Any,
        layer: int,
        projected_BLP: Tensor,
        positions_BL: Tensor,
        mask_BL: Tensor | None,
        with_scores: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Let the tokens of each sequence attend to each other.

        Args:
            network: The transformers network.
            layer: Index of the layer.
            projected_BLP: `project` of the token vectors that arrive.
            positions_BL: Where they stood in their sequence.
            mask_BL: True at real tokens; None where all are real.
            with_scores: Also return how much attention each token received.
        Returns:
            The context (B, L, D), and the float32 scores (B, L) or None.
        """
        query, key, value = self.heads(network, projected_BLP)
        dropout = self.attention_dropout(network.config) if network.training else 0.0
        query, key, bias = self.prepare(network, layer, query, key, Places(positions_BL, positions_BL))
        by_value = token_score(network.config) == "value_norm"
        context_BHLd, score_BL = attention(query, key, value, mask_BL, dropout, with_scores, by_value, bias)
        return context_BHLd.transpose(1, 2).flatten(2), score_BL

    def project_for_first(self, network: PreTrainedModel, layer: int, hidden_RD: Tensor) -> Tensor:
        """What `mix_first` needs of each token, without the queries that nobody asks, as (R, Q)."""
        return _together(hidden_RD, *self.projections(self.layer(network, layer))[1:])

    def query_of_first(self, network: PreTrainedModel, layer: int, first_BD: Tensor) -> Tensor:
        """The query (B, D) of each sequence's first token."""
        query: Tensor = self.projections(self.layer(network, layer))[0](first_BD)
        return query

    def mix_first(
        self,
        network: Any,
        layer: int,
        first_BD: Tensor,
        projected_BLQ: Tensor,
        positions_BL: Tensor,
        mask_BL: Tensor | None = None,
    ) -> Tensor:
        """The context (B, D) of each sequence's first token alone, whose vector is given; no mask, no padding."""
        query_BD = self.query_of_first(network, layer, first_BD).to(projected_BLQ.dtype)
        query = query_BD.view(query_BD.size(0), network.config.num_attention_heads, 1, -1)
        key, value = self.heads(network, projected_BLQ)
        query, key, bias = self.prepare(network, layer, query, key, Places(positions_BL[:, :1], positions_BL))
        return attention(query, key, value, mask_BL, 0.0, with_scores=False, bias_BHLL=bias)[0].flatten(1)

    def prepare(self, network: Any, layer: int, query_BHQd: Tensor, key_BHLd: Tensor, places: Places) -> Prepared:
        """Bring in where tokens stood, for families that tell their layers.

        Args:
            network: The transformers network.
            layer: Index of the layer.
            query_BHQd: Queries per head.
            key_BHLd: Keys per head.
            places: Where the tokens stood that the queries and the keys are of.
        """
        return query_BHQd, key_BHLd, None

    def attention_dropout(self, config: Any) -> float:
        """Dropout on the attention weights in training."""
        return float(config.attention_probs_dropout_prob)

    @abc.abstractmethod
    def merge(self, network: Any, layer: int, context_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        """The attended vectors: output projection of the context, residual and, where it comes here, LayerNorm."""

    @abc.abstractmethod
    def feed_forward(self, network: Any, layer: int, attended_RD: Tensor) -> Tensor:
        """The feed-forward half of a layer, its residual and LayerNorm included."""

    @abc.abstractmethod
    def classify(self, network: Any, hidden_BKD: Tensor) -> Tensor:
        """Logits (B, C) from the last layer's vectors; the first token is [CLS]."""

    def read_tokens(self, network: Any, hidden_BLD: Tensor) -> Tensor:
        """Logits (B, L, C) of a token-level head from every token's last vector, its padding's included."""
        if hasattr(network, "dropout"):
            hidden_BLD = network.dropout(hidden_BLD)
        head = network.qa_outputs if hasattr(network, "qa_outputs") else network.classifier
        logits: Tensor = head(hidden_BLD)
        return logits

    def heads(self, network: Any, projected_BLP: Tensor) -> tuple[Tensor, ...]:
        """The parts of width D that were projected together, (B, H, L, d) each."""
        size, length, width = projected_BLP.shape
        parts = width // network.config.hidden_size
        per_head = projected_BLP.view(size, length, parts, network.config.num_attention_heads, -1)
        return per_head.permute(2, 0, 3, 1, 4).unbind()


class BertFamily(EncoderFamily):
    """BERT, with absolute positions and a pooled [CLS] classifier; those that differ in their head build on it."""

    def embed(self, network: Any, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor) -> Tensor:
        embeddings: Tensor = network.base_model.embeddings(
            input_ids=input_ids_R, token_type_ids=token_type_ids_R, position_ids=positions_R
        )
        return embeddings

    def layer(self, network: Any, layer: int) -> Any:
        return network.base_model.encoder.layer[layer]

    def projections(self, layer: Any) -> tuple[Any, Any, Any]:
        block = layer.attention.self
        return block.query, block.key, block.value

    def merge(self, network: Any, layer: int, context_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        attended: Tensor = self.layer(network, layer).attention.output(context_RD, hidden_RD)
        return attended

    def feed_forward(self, network: Any, layer: int, attended_RD: Tensor) -> Tensor:
        block = self.layer(network, layer)
        hidden: Tensor = block.output(block.intermediate(attended_RD), attended_RD)
        return hidden

    def classify(self, network: Any, hidden_BKD: Tensor) -> Tensor:
        logits: Tensor = network.classifier(network.dropout(network.base_model.pooler(hidden_BKD)))
        return logits


class WholeHeadFamily(BertFamily):
    """BERT's layers under a classifier that takes all vectors and has a hidden layer of its own instead of a pooler."""

    def classify(self, network: Any, hidden_BKD: Tensor) -> Tensor:
        logits: Tensor = network.classifier(hidden_BKD)
        return logits


class ElectraFamily(WholeHeadFamily):
    """ELECTRA's discriminator: embeddings may be narrower than the layers."""

    def shape(self, config: Any, task: str) -> EncoderShape:
        e, d = config.embedding_size, config.hidden_size
        return dataclasses.replace(super().shape(config, task), embedding_macs_per_token=e + (e * d if e != d else 0))

    def embed(self, network: Any, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor) -> Tensor:
        hidden_RD = super().embed(network, input_ids_R, token_type_ids_R, positions_R)
        if hasattr(network.base_model, "embeddings_project"):
            hidden_RD = network.base_model.embeddings_project(hidden_RD)
        return hidden_RD


class RobertaFamily(WholeHeadFamily):
    """RoBERTa, XLM-R and CamemBERT: positions are counted from behind the padding token's id."""

    def max_tokens(self, config: Any) -> int:
        return int(config.max_position_embeddings - config.pad_token_id - 1)

    def embed(self, network: Any, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor) -> Tensor:
        first = network.base_model.embeddings.padding_idx + 1
        if token_type_ids_R is None:
            token_type_ids_R = torch.zeros_like(input_ids_R)
        return super().embed(network, input_ids_R, token_type_ids_R, positions_R + first)


class MpnetFamily(WholeHeadFamily):
    """MPNet: attention depends on the distance between tokens, wherever those between them have gone."""

    def max_tokens(self, config: Any) -> int:
        return int(config.max_position_embeddings) - 2  # its padding token is always the second

    def embed(self, network: Any, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor) -> Tensor:
        embeddings = network.base_model.embeddings
        hidden: Tensor = embeddings(input_ids=input_ids_R, position_ids=positions_R + embeddings.padding_idx + 1)
        return hidden

    def projections(self, layer: Any) -> tuple[Any, Any, Any]:
        block = layer.attention.attn
        return block.q, block.k, block.v

    def prepare(self, network: Any, layer: int, query_BHQd: Tensor, key_BHLd: Tensor, places: Places) -> Prepared:
        encoder = network.base_model.encoder
        bias_BQLH = encoder.relative_attention_bias(encoder.relative_position_bucket(places.distances()))
        return query_BHQd, key_BHLd, bias_BQLH.permute(0, 3, 1, 2)

    def merge(self, network: Any, layer: int, context_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        block = self.layer(network, layer).attention
        attended: Tensor = block.LayerNorm(block.dropout(block.attn.o(context_RD)) + hidden_RD)
        return attended


class DistilBertFamily(EncoderFamily):
    """DistilBERT: no token types, no pooler."""

    def embed(self, network: Any, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor) -> Tensor:
        hidden: Tensor = network.base_model.embeddings(input_ids=input_ids_R, position_ids=positions_R)
        return hidden

    def feed_forward_size(self, config: Any) -> int:
        return int(config.hidden_dim)

    def layer(self, network: Any, layer: int) -> Any:
        return network.base_model.transformer.layer[layer]

    def projections(self, layer: Any) -> tuple[Any, Any, Any]:
        return layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin

    def attention_dropout(self, config: Any) -> float:
        return float(config.attention_dropout)

    def merge(self, network: Any, layer: int, context_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        block = self.layer(network, layer)
        attended: Tensor = block.sa_layer_norm(block.attention.out_lin(context_RD) + hidden_RD)
        return attended

    def feed_forward(self, network: Any, layer: int, attended_RD: Tensor) -> Tensor:
        block = self.layer(network, layer)
        hidden: Tensor = block.output_layer_norm(block.ffn.ff_chunk(attended_RD) + attended_RD)
        return hidden

    def classify(self, network: Any, hidden_BKD: Tensor) -> Tensor:
        pooled_BD = network.pre_classifier(hidden_BKD[:, 0]).relu()
        logits: Tensor = network.classifier(network.dropout(pooled_BD))
        return logits


class AlbertFamily(EncoderFamily):
    """ALBERT: few layers' weights, used again and again; each use is a layer that may drop tokens."""

    def shape(self, config: Any, task: str) -> EncoderShape:
        e, d = config.embedding_size, config.hidden_size
        layers = config.num_hidden_layers * config.inner_group_num
        return dataclasses.replace(super().shape(config, task), num_layers=layers, embedding_macs_per_token=e + e * d)

    def embed(self, network: Any, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor) -> Tensor:
        embeddings = network.base_model.embeddings(
            input_ids=input_ids_R, token_type_ids=token_type_ids_R, position_ids=positions_R
        )
        hidden: Tensor = network.base_model.encoder.embedding_hidden_mapping_in(embeddings)
        return hidden

    def layer(self, network: Any, layer: int) -> Any:
        config, groups = network.config, network.base_model.encoder.albert_layer_groups
        use, inner = divmod(layer, config.inner_group_num)
        return groups[use * config.num_hidden_groups // config.num_hidden_layers].albert_layers[inner]

    def projections(self, layer: Any) -> tuple[Any, Any, Any]:
        return layer.attention.query, layer.attention.key, layer.attention.value

    def merge(self, network: Any, layer: int, context_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        block = self.layer(network, layer).attention
        attended: Tensor = block.LayerNorm(hidden_RD + block.output_dropout(block.dense(context_RD)))
        return attended

    def feed_forward(self, network: Any, layer: int, attended_RD: Tensor) -> Tensor:
        block = self.layer(network, layer)
        hidden: Tensor = block.full_layer_layer_norm(block.ff_chunk(attended_RD) + attended_RD)
        return hidden

    def classify(self, network: Any, hidden_BKD: Tensor) -> Tensor:
        encoder = network.base_model
        pooled_BD = encoder.pooler_activation(encoder.pooler(hidden_BKD[:, 0]))
        logits: Tensor = network.classifier(network.dropout(pooled_BD))
        return logits


class ModernBertFamily(EncoderFamily):
    """ModernBERT: rotary positions, LayerNorms before the halves, gated feed-forward, local attention in most layers.

    Tokens keep the positions they stood at, so that a window holds what is left of the tokens that were near. Those
    that are left alone in it receive all their own attention and no other's.
    """

    has_projections_apart = False
    scores_alike = True

    def refusal(self, config: Any, task: str) -> str | None:
        if task not in TOKEN_TASKS and config.classifier_pooling != "cls":
            return f"has classifier_pooling={config.classifier_pooling!r}; set 'cls' in its config.json and train it"
        return None

    def shape(self, config: Any, task: str) -> EncoderShape:
        shape = super().shape(config, task)
        hidden_layer = config.hidden_size**2 if task in TOKEN_TASKS else 0
        return dataclasses.replace(
            shape, feed_forward_products=3, head_macs_per_token=shape.head_macs_per_token + hidden_layer
        )

    def embed(self, network: Any, input_ids_R: Tensor, token_type_ids_R: Tensor | None, positions_R: Tensor) -> Tensor:
        hidden: Tensor = network.base_model.embeddings(input_ids=input_ids_R)
        return hidden

    def layer(self, network: Any, layer: int) -> Any:
        return network.base_model.layers[layer]

    def projections(self, layer: Any) -> tuple[Any, Any, Any]:
        raise NotImplementedError("ModernBERT projects queries, keys and values with one linear layer")

    def project(self, network: Any, layer: int, hidden_RD: Tensor) -> Tensor:
        block = self.layer(network, layer)
        projected: Tensor = block.attn.Wqkv(block.attn_norm(hidden_RD))
        return projected

    def project_for_first(self, network: Any, layer: int, hidden_RD: Tensor) -> Tensor:
        block = self.layer(network, layer)
        return _part(block.attn.Wqkv, block.attn_norm(hidden_RD), slice(network.config.hidden_size, None))

    def query_of_first(self, network: Any, layer: int, first_BD: Tensor) -> Tensor:
        block = self.layer(network, layer)
        return _part(block.attn.Wqkv, block.attn_norm(first_BD), slice(network.config.hidden_size))

    def prepare(self, network: Any, layer: int, query_BHQd: Tensor, key_BHLd: Tensor, places: Places) -> Prepared:
        kind, rotary = network.config.layer_types[layer], network.base_model.rotary_emb
        query_BHQd, key_BHLd = as_weighed(query_BHQd), as_weighed(key_BHLd)
        query = _rotated(query_BHQd, *rotary(query_BHQd, places.asking_BQ, kind))
        key = _rotated(key_BHLd, *rotary(key_BHLd, places.asked_BL, kind))
        if kind != "sliding_attention":
            return query, key, None
        distance_BQL = places.distances().abs()
        bias = torch.zeros_like(distance_BQL, dtype=query.dtype)
        bias.masked_fill_(distance_BQL > network.config.sliding_window, torch.finfo(query.dtype).min)
        return query, key, bias[:, None]

    def attention_dropout(self, config: Any) -> float:
        return float(config.attention_dropout)

    def merge(self, network: Any, layer: int, context_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        block = self.layer(network, layer).attn
        attended: Tensor = hidden_RD + block.out_drop(block.Wo(context_RD))
        return attended

    def feed_forward(self, network: Any, layer: int, attended_RD: Tensor) -> Tensor:
        block = self.layer(network, layer)
        hidden: Tensor = attended_RD + block.mlp(block.mlp_norm(attended_RD))
        return hidden

    def classify(self, network: Any, hidden_BKD: Tensor) -> Tensor:
        pooled_BD = network.head(network.base_model.final_norm(hidden_BKD[:, 0]))
        logits: Tensor = network.classifier(network.drop(pooled_BD))
        return logits

    def read_tokens(self, network: Any, hidden_BLD: Tensor) -> Tensor:
        logits: Tensor = network.classifier(network.drop(network.head(network.base_model.final_norm(hidden_BLD))))
        return logits


class DebertaV2Family(BertFamily):
    """DeBERTa-v2 and v3: content attends to distance and distance to content, wherever those between have gone."""

    def refusal(self, config: Any, task: str) -> str | None:
        if getattr(config, "conv_kernel_size", 0):
            return "has a convolution after its first layer, which needs every neighbour; use another encoder"
        return None

    def shape(self, config: Any, task: str) -> EncoderShape:
        d, e = config.hidden_size, getattr(config, "embedding_size", config.hidden_size)
        distances = 2 * self._span(config) if config.relative_attention else 0
        return dataclasses.replace(
            super().shape(config, task),
            embedding_macs_per_token=d + (e * d if e != d else 0),
            attention_macs_per_token=len(self._terms(config)) * distances * d,
        )

    def projections(self, layer: Any) -> tuple[Any, Any, Any]:
        block = layer.attention.self
        return block.query_proj, block.key_proj, block.value_proj

    def prepare(self, network: Any, layer: int, query_BHQd: Tensor, key_BHLd: Tensor, places: Places) -> Prepared:
        config, block = network.config, self.layer(network, layer).attention.self
        terms = self._terms(config)
        share = (1 + len(terms)) ** -0.5
        query_BHQd, key_BHLd = as_weighed(query_BHQd), as_weighed(key_BHLd)
        query = query_BHQd * share
        if not config.relative_attention:
            return query, key_BHLd, None
        span, scale = self._span(config), share * query.size(-1) ** -0.5
        bucket_BQL = -places.distances()
        if block.position_buckets > 0:
            bucket_BQL = make_log_bucket_position(bucket_BQL, block.position_buckets, block.max_relative_positions)
        index_B1QL = (bucket_BQL.long() + span).clamp(0, 2 * span - 1)[:, None]
        index_BHQL = index_B1QL.expand(-1, config.num_attention_heads, -1, -1)
        distances_SD = block.pos_dropout(network.base_model.encoder.get_rel_embedding()[: 2 * span])

        def heads_of(projection: Any) -> Tensor:
            """The distances as keys or queries, (H, d, S)."""
            projected_SD: Tensor = projection(distances_SD).to(query.dtype)
            return projected_SD.view(len(projected_SD), config.num_attention_heads, -1).permute(1, 2, 0)

        shared = block.share_att_key
        bias = torch.zeros_like(index_B1QL, dtype=query.dtype)
        if "c2p" in terms:
            seen_BHQS = query_BHQd @ heads_of(block.key_proj if shared else block.pos_key_proj)
            bias = bias + seen_BHQS.gather(-1, index_BHQL) * scale
        if "p2c" in terms:
            seen_BHLS = key_BHLd @ heads_of(block.query_proj if shared else block.pos_query_proj)
            bias = bias + seen_BHLS.gather(-1, index_BHQL.transpose(-1, -2)).transpose(-1, -2) * scale
        return query, key_BHLd, bias

    def classify(self, network: Any, hidden_BKD: Tensor) -> Tensor:
        logits: Tensor = network.classifier(network.dropout(network.pooler(hidden_BKD)))
        return logits

    def _terms(self, config: Any) -> list[str]:
        """Which of content-to-position and position-to-content attention there are."""
        return [term for term in ("c2p", "p2c") if term in (config.pos_att_type or [])]

    def _span(self, config: Any) -> int:
        """Distances that are told apart, to either side."""
        if getattr(config, "position_buckets", -1) > 0:
            return int(config.position_buckets)
        most = getattr(config, "max_relative_positions", -1)
        return int(most if most > 0 else config.max_position_embeddings)


def _together(hidden_RD: Tensor, *projections: Any) -> Tensor:
    """Several projections of the same rows as one product, in the precision of their weights."""
    packed = getattr(projections[0], TOGETHER, None)
    if packed is not None:
        product: Tensor = packed.product(hidden_RD)
        return product
    weight = _as_one([projection.weight for projection in projections])
    return F.linear(hidden_RD.to(weight.dtype), weight, _as_one([projection.bias for projection in projections]))


def _as_one(parts: Sequence[Tensor]) -> Tensor:
    """Weights one after the other; without a copy where that is how `lay_side_by_side` left them in memory."""
    if parts[0].requires_grad or torch.compiler.is_compiling():
        return torch.cat(list(parts))
    for one, other in itertools.pairwise(parts):
        is_next = one.data_ptr() + one.nbytes == other.data_ptr() and one.is_contiguous() and other.is_contiguous()
        if not is_next or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
            return torch.cat(list(parts))
    return parts[0].as_strided((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].stride())


def lay_side_by_side(family: EncoderFamily, network: Any, num_layers: int) -> None:
    """Have the queries', keys' and values' weights of each layer lie together, so that one product takes them all.

    Args:
        family: The network's adapter, which has them apart.
        network: Frozen; changed in place, not in what it computes.
        num_layers: Its layers.
    """
    for layer in range(num_layers):
        projections = family.projections(family.layer(network, layer))
        for name in ("weight", "bias"):
            parts = [getattr(projection, name) for projection in projections]
            together = torch.cat([part.detach() for part in parts])
            for projection, part in zip(projections, torch.split(together, [len(part) for part in parts]), strict=True):
                setattr(projection, name, torch.nn.Parameter(part, requires_grad=False))


def _part(projection: Any, hidden_RD: Tensor, outputs: slice) -> Tensor:
    """Some of a linear layer's outputs, in the precision of its weights."""
    weight, bias = projection.weight[outputs], projection.bias
    return F.linear(hidden_RD.to(weight.dtype), weight, None if bias is None else bias[outputs])


def _rotated(part_BHLd: Tensor, cosine_BLd: Tensor, sine_BLd: Tensor) -> Tensor:
    """Queries or keys turned by their positions' angles.

    Source: Su et al. 2021, "RoFormer".
    """
    first, second = part_BHLd.chunk(2, dim=-1)
    return part_BHLd * cosine_BLd[:, None] + torch.cat((-second, first), dim=-1) * sine_BLd[:, None]


FAMILIES: dict[str, EncoderFamily] = {
    "bert": BertFamily(),
    "roberta": RobertaFamily(),
    "xlm-roberta": RobertaFamily(),
    "camembert": RobertaFamily(),
    "electra": ElectraFamily(),
    "distilbert": DistilBertFamily(),
    "albert": AlbertFamily(),
    "mpnet": MpnetFamily(),
    "deberta-v2": DebertaV2Family(),
    "modernbert": ModernBertFamily(),
}
"""Adapters by transformers' `model_type`."""


def attend(
    family: EncoderFamily,
    network: PreTrainedModel,
    layer: int,
    hidden_BLD: Tensor,
    positions_BL: Tensor,
    mask_BL: Tensor | None,
    with_scores: bool,
) -> tuple[Tensor, Tensor | None]:
    """The whole self-attention half of a layer, for a batch; see `EncoderFamily.mix` for arguments and results."""
    projected_BLP = family.project(network, layer, hidden_BLD)
    context_BLD, score_BL = family.mix(network, layer, projected_BLP, positions_BL, mask_BL, with_scores)
    return family.merge(network, layer, context_BLD, hidden_BLD), score_BL
