"""What a length config costs a study: MACs, which are exact, milliseconds, which a table predicts, or both.

The table is fitted once, by the first who opens the study, and kept with it: a study's objectives are the same for all
its trials, whoever runs them and whenever.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray

from hpo.bulk import record_once
from hpo.errors import HpoError
from hpo.front import FULL_MS, MACS, MS, TABLE
from hpo.samplers import Configs
from hpo.staircase import Array
from hpo.storage import Storage
from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.hardware import computes_in_bf16, processor_name
from model.latency import Hook, LatencyTable, calibrate, lengths_of
from model.length_config import LengthConfig
from model.macs import EncoderShape, mean_macs, mean_macs_of_shares, tokens_left
from model.timing import sample
from studies.loader import LengthsStudy

logger = logging.getLogger(__name__)

OTHER_MACHINE = (
    "Times of study %r are predicted for %s. This one (%s) goes by the same predictions, so that its trials can be "
    "compared, but would take its own time; for times of its own, start another study here."
)


@dataclass(frozen=True)
class Costs:
    """What configs cost over the search split.

    Attributes:
        names: The objectives, of `MACS` and `MS`.
        shape: The encoder's sizes.
        num_tokens_N: Lengths of the split's sequences.
        table: Predicts times; None where nothing costs time.
    """

    names: tuple[str, ...]
    shape: EncoderShape
    num_tokens_N: NDArray[np.int64]
    table: LatencyTable | None = None
    lengths_MB: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls, definition: LengthsStudy, model: LengthAdaptiveModel, split: EncodedSplit, table: LatencyTable | None
    ) -> "Costs":
        """Times are those of the sequences that `hpo bench` times as well."""
        lengths_MB = None if table is None else lengths_of(sample(split).num_tokens, table.batch_size)
        return cls(definition.costs, model.shape, split.num_tokens, table, lengths_MB)

    def macs(self, config: LengthConfig) -> float:
        """Mean MACs of a sequence."""
        return mean_macs(self.shape, self.num_tokens_N, config)

    def ms(self, config: LengthConfig) -> float:
        """Predicted milliseconds of a sequence."""
        assert self.table is not None
        assert self.lengths_MB is not None
        return self.table.ms_of(self.lengths_MB, config)

    def values(self, config: LengthConfig) -> tuple[float, ...]:
        """The objectives beside quality."""
        return tuple(self.macs(config) if name == MACS else self.ms(config) for name in self.names)

    def attributes(self, config: LengthConfig) -> dict[str, float]:
        """What a trial records of its costs, where its values do not tell all."""
        return {} if self.table is None else {MACS: self.macs(config), MS: self.ms(config)}

    @cached_property
    def full(self) -> tuple[float, ...]:
        """The objectives of full length."""
        return self.values(LengthConfig.full(self.shape.num_layers))

    def shares(self, configs: Configs) -> Array:
        """What many configs cost, as shares of full length's: (C,) of one objective, (C, 2) of two."""
        costs_CK = np.stack([self.macs_of(configs) if name == MACS else self.ms_of(configs) for name in self.names], 1)
        shares_CK: Array = costs_CK / self.full
        return shares_CK[:, 0] if len(self.names) == 1 else shares_CK

    def ms_of(self, configs: Configs) -> Array:
        """Predicted milliseconds of a sequence under each of many configs."""
        assert self.table is not None
        assert self.lengths_MB is not None
        return self.table.ms(self.lengths_MB, configs.shares_CN, configs.skipped_CN)

    def macs_of(self, configs: Configs) -> Array:
        """Mean MACs of a sequence under each of many configs."""
        return mean_macs_of_shares(self.shape, self.num_tokens_N, configs.shares_CN, configs.skipped_CN)

    def tokens_left(self, configs: Configs) -> NDArray[np.int64]:
        """Tokens of all sequences left after each layer, (C, N), which tell apart what keeps other counts."""
        return tokens_left(self.num_tokens_N, configs.shares_CN)


def cost_table(
    study: optuna.Study,
    storage: Storage,
    definition: LengthsStudy,
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    on_progress: Hook | None = None,
) -> LatencyTable | None:
    """The study's table, fitted on this machine's processor where the study has none yet; None where MACs are all.

    Args:
        study: The study.
        storage: Its database.
        definition: Says what is a cost.
        model: The encoder, on the processor.
        split: The search split.
        on_progress: Told the share of the fitting that is done, and of what.
    Raises:
        HpoError: This processor lacks what is asked for, or another version fitted the table.
    """
    if MS not in definition.costs:
        return None
    recorded = study.user_attrs.get(TABLE)
    if recorded is None:
        recorded = _calibrated(study, storage, definition, model, split, on_progress)
    try:
        table = LatencyTable.from_attribute(recorded)
    except (ValueError, KeyError, TypeError) as error:
        raise HpoError(
            f"Study {study.study_name!r} was made by another version of hpo ({error}); go on with that version, or "
            "start a new study under another name."
        ) from error
    if table.processor != (own := processor_name()):
        logger.warning(OTHER_MACHINE, study.study_name, table, own)
    return table


def _calibrated(
    study: optuna.Study,
    storage: Storage,
    definition: LengthsStudy,
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    on_progress: Hook | None,
) -> dict[str, Any]:
    """Fit and record a table; where another worker was faster, it is that one's."""
    if definition.latency_precision == "bf16" and not computes_in_bf16():
        raise HpoError('This processor has no bf16 products; set precision = "fp32" under [latency].')
    logger.info("Timing layers on %s; this takes about half a minute.", processor_name())
    fitted = calibrate(
        model,
        split,
        batch_size=definition.latency_batch_size,
        precision=definition.latency_precision,
        on_progress=on_progress,
    )
    full_ms = Costs.of(definition, model, split, fitted).ms(LengthConfig.full(model.num_layers))
    there = record_once(storage, study._study_id, {TABLE: fitted.to_attribute(), FULL_MS: full_ms})
    table: dict[str, Any] = there[TABLE]
    return table


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch compute with so many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
