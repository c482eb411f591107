"""Length configs that another method found, for the first generation of a search."""

import logging
import math
from pathlib import Path

from hpo.errors import HpoError
from hpo.workload import LoadedWorkload, ProgressHook, load_encoder
from model.encoder import LengthAdaptiveModel
from model.length_config import LengthConfig
from model.power_bert import PowerBertSettings, learn_family
from model.training import TrainingDiverged

logger = logging.getLogger(__name__)

POWER_BERT = "power-bert"
METHODS = (POWER_BERT,)
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Weights of the mass penalty, each of which gives a config; they span what its authors tried, at our scale."""
UPDATES = 600
"""Least steps of each learning: a factor moves by about half the learning rate in a step, from 1 to near 0."""
MASK_LEARNING_RATE = 1e-2


def learn_seeds(
    method: str,
    checkpoint: Path,
    loaded: LoadedWorkload,
    seed: int = 0,
    on_progress: ProgressHook | None = None,
) -> list[LengthConfig]:
    """The length configs that a method learns from the train split, starting from a checkpoint, which stays as it is.

    Args:
        method: One of `METHODS`.
        checkpoint: Folder of the trained encoder.
        loaded: The data.
        seed: Of batch order and dropout.
        on_progress: Told how many configs are learned.
    Raises:
        ValueError: The method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}; choose one of {', '.join(METHODS)}.")
    begun = 0

    def another() -> LengthAdaptiveModel:
        nonlocal begun
        if on_progress is not None:
            on_progress(begun, len(PENALTIES), f"learning PoWER-BERT's config {begun + 1} of {len(PENALTIES)}")
        begun += 1
        return load_encoder(checkpoint, loaded.corpus)

    batch_size = PowerBertSettings().batch_size
    steps_per_epoch = math.ceil(len(loaded.train) / batch_size)
    settings = PowerBertSettings(
        epochs=math.ceil(UPDATES / steps_per_epoch), mask_learning_rate=MASK_LEARNING_RATE, seed=seed
    )
    try:
        configs = learn_family(another, loaded.train, loaded.tokenizer, settings, PENALTIES)
    except TrainingDiverged as error:
        raise HpoError(
            f"PoWER-BERT cannot learn from {checkpoint} ({str(error).split(';')[0]}); search without --seed-with."
        ) from error
    logger.info("PoWER-BERT gave %d configs for %d penalties.", len(configs), len(PENALTIES))
    return configs
