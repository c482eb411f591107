"""Tiny random encoders and batches that the tests of this folder share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel

Batch = dict[str, Tensor]

VOCABULARY, MAX_TOKENS = 60, 64


@pytest.fixture(scope="session")
def make_network() -> Callable[..., BertForSequenceClassification]:
    """Builds a random BERT in evaluation mode; keywords change its config.

    Weights are large enough for attention to differ clearly between tokens and classes between sequences, and every
    bias and LayerNorm is random too, so that leaving one out shows.
    """

    def build(seed: int = 0, **changes: object) -> BertForSequenceClassification:
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": MAX_TOKENS,
            "num_labels": 5,
        }
        network = BertForSequenceClassification(BertConfig(**{**sizes, **changes})).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
                weight.normal_(mean=mean, std=0.4 if weight.dim() > 1 else 0.1, generator=generator)
        return network

    return build


@pytest.fixture(scope="session")
def bert_folder(make_network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote, with a network of four layers and five classes; do not change it."""
    folder: Path = tmp_path_factory.mktemp("bert")
    make_network().save_pretrained(folder)
    return folder


@pytest.fixture
def model(make_network) -> LengthAdaptiveModel:
    """A length-adaptive encoder of four layers and five classes, in evaluation mode."""
    return LengthAdaptiveModel(make_network()).eval()


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Builds random sequences of the given lengths, padded on the right as a tokenizer would."""

    def build(lengths: Sequence[int], seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        size = (len(lengths), max(lengths))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        input_ids = torch.randint(1, VOCABULARY, size, generator=generator) * mask
        token_type_ids = torch.randint(0, 2, size, generator=generator) * mask
        return {"input_ids": input_ids, "attention_mask": mask.long(), "token_type_ids": token_type_ids}

    return build


@dataclass(frozen=True, kw_only=True)
class LogitSplit(EncodedSplit):
    """Sequences whose answers are the logits themselves, `outputs` for each of them or for each of its tokens."""

    outputs: int
    per_token: bool
    answer_type: ClassVar[type[np.generic]] = np.float32

    def answer_size(self, num_tokens: int) -> int:
        return self.outputs * (num_tokens if self.per_token else 1)

    def answer(self, logits: Tensor, sequences: np.ndarray) -> np.ndarray:
        return logits.flatten(1).numpy()


@pytest.fixture(scope="session")
def unpadded() -> Callable[..., EncodedSplit]:
    """A batch's sequences without their padding, as a split of classes or, with `outputs`, one that answers logits."""

    def build(batch: Batch, labels: Any = None, outputs: int | None = None, per_token: bool = False) -> EncodedSplit:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        types = batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))
        fields = {
            "input_ids": [row[:count].tolist() for row, count in zip(batch["input_ids"], lengths, strict=True)],
            "token_type_ids": [row[:count].tolist() for row, count in zip(types, lengths, strict=True)],
            "labels": np.zeros(len(lengths), dtype=np.int64) if labels is None else np.asarray(labels),
            "num_truncated": 0,
        }
        if outputs is None:
            return EncodedSplit(**fields)
        return LogitSplit(**fields, outputs=outputs, per_token=per_token)

    return build
