"""Scoring many length configs over one split in a single walk, without padding.

Sequences of one exact length form a batch, so nothing is padded or masked. Configs that keep the same counts in
their first layers share the computation of those layers: the walk goes depth first through the tree of counts. Memory
holds one batch at one node per layer, however many configs come at once.

Shape letters: C configs, N examples, B sequences of a batch, L tokens arriving, D hidden size, U distinct rows of
counts.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data import EncodedSplit
from model.encoder import LengthAdaptiveModel, keep_significant
from model.length_config import LengthConfig
from model.tasks import Metric

TOKENS_PER_BATCH = 2048
"""Tokens that enter the first layer together; larger batches leave the processor's cache and get slower."""


def predict(
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    configs: Sequence[LengthConfig],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    on_progress: Callable[[float], None] | None = None,
) -> NDArray[np.int64]:
    """The class that each config predicts for each example, as int64 (C, N).

    Args:
        model: The encoder; it is evaluated without dropout and left in the mode it was in.
        split: Tokenised examples.
        configs: Length configs of the model's number of layers; none give an array of no rows.
        tokens_per_batch: Most tokens of one batch; a single longer sequence is a batch of its own.
        on_progress: Called after each batch with the share of the split's tokens that is done.
    Raises:
        ValueError: A config has another number of layers.
    """
    for config in configs:
        if config.num_layers != model.num_layers:
            raise ValueError(f"A length config has {config.num_layers} layers, the model {model.num_layers}.")
    predictions_CN = np.empty((len(configs), len(split.labels)), dtype=np.int64)
    if not configs:
        return predictions_CN
    num_tokens_N = split.num_tokens
    total_tokens, done_tokens = max(1, int(num_tokens_N.sum())), 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for examples_B in _equal_length_batches(num_tokens_N, tokens_per_batch):
                num_tokens = int(num_tokens_N[examples_B[0]])
                counts_CL = np.array([config.lengths(num_tokens) for config in configs], dtype=np.int64)
                counts_UL, row_of_config_C = np.unique(counts_CL, axis=0, return_inverse=True)
                hidden = model.family.embed(model.network, *_batch_inputs(split, examples_B, model.device))
                classes_UB = np.empty((len(counts_UL), len(examples_B)), dtype=np.int64)
                _walk(model, 0, hidden, counts_UL, np.arange(len(counts_UL)), classes_UB)
                predictions_CN[:, examples_B] = classes_UB[row_of_config_C.reshape(-1)]
                done_tokens += num_tokens * len(examples_B)
                if on_progress is not None:
                    on_progress(done_tokens / total_tokens)
    finally:
        model.train(was_training)
    return predictions_CN


def score(
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    configs: Sequence[LengthConfig],
    metric: Metric,
    *,
    on_progress: Callable[[float], None] | None = None,
) -> list[float]:
    """The metric of each config over the split."""
    predictions_CN = predict(model, split, configs, on_progress=on_progress)
    return [metric.compute(predictions_N, split.labels) for predictions_N in predictions_CN]


def _walk(
    model: LengthAdaptiveModel,
    layer: int,
    hidden_BLD: Tensor,
    counts_UL: NDArray[np.int64],
    rows_U: NDArray[np.int64],
    classes_UB: NDArray[np.int64],
) -> None:
    """Fill the classes of `rows_U`, whose counts are equal before `layer`, from the vectors that arrive there."""
    if layer == model.num_layers:
        logits_BC = model.family.classify(model.network, hidden_BLD)
        classes_UB[rows_U] = logits_BC.argmax(dim=1).cpu().numpy()
        return
    arriving = hidden_BLD.size(1)
    kept_U = counts_UL[rows_U, layer]
    drops = bool((kept_U < arriving).any())
    attended_BLD, score_BL = model.family.attend(model.network, layer, hidden_BLD, None, with_scores=drops)
    for keep in np.unique(kept_U):
        survivors = attended_BLD
        if keep < arriving and score_BL is not None:
            survivors, _ = keep_significant(attended_BLD, score_BL, int(keep))
        passed_on = model.family.feed_forward(model.network, layer, survivors)
        _walk(model, layer + 1, passed_on, counts_UL, rows_U[kept_U == keep], classes_UB)


def _equal_length_batches(num_tokens_N: NDArray[np.int64], tokens_per_batch: int) -> Iterator[NDArray[np.int64]]:
    """Example numbers of each batch: all of one length, and together at most `tokens_per_batch` tokens."""
    for num_tokens in np.unique(num_tokens_N):
        examples = np.flatnonzero(num_tokens_N == num_tokens)
        size = max(1, tokens_per_batch // int(num_tokens))
        for start in range(0, len(examples), size):
            yield examples[start : start + size]


def _batch_inputs(split: EncodedSplit, examples_B: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    input_ids = torch.tensor([split.input_ids[example] for example in examples_B], device=device)
    token_type_ids = torch.tensor([split.token_type_ids[example] for example in examples_B], device=device)
    return input_ids, token_type_ids
