"""Packed predictions equal the encoder's own, sequence by sequence, for every family and head."""

import pytest
import torch
from test_onnx_export import FAMILIES, POINTS, build

from model.encoder import TASKS, LengthAdaptiveModel
from model.length_config import LengthConfig
from model.packed import PackedNetwork

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (19, 30, 3, 30, 12, 2, 31, 13)


def apart(batch, lengths):
    return [
        [row[:count].tolist() for row, count in zip(batch[name], lengths, strict=True)]
        for name in ("input_ids", "token_type_ids")
    ]


def alone(model, batch, row, count, config):
    """The logits of one sequence by itself."""
    names = ("input_ids", "token_type_ids")
    given = {name: batch[name][row : row + 1, :count] for name in names}
    if not getattr(model.network.config, "type_vocab_size", 0):
        del given["token_type_ids"]
    with torch.no_grad():
        return model(**given, length_config=config).logits[0]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_sequences_get_the_logits_they_get_alone(model_type, task, make_batch):
    model, batch = build(model_type, task), make_batch(LENGTHS)
    packed = PackedNetwork(model)
    for config in (*POINTS, LengthConfig.full(2), LengthConfig.from_retention((0.5, 0.5), skipped=(0,))):
        for row, logits in enumerate(packed.logits(*apart(batch, LENGTHS), config)):
            expected = alone(model, batch, row, LENGTHS[row], config)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_bf16_stays_close(task, make_batch):
    """Of a full-length config: where tokens are dropped, rounding may decide which."""
    model, batch = build("bert", task), make_batch(LENGTHS)
    said = PackedNetwork(model, "bf16").logits(*apart(batch, LENGTHS), LengthConfig.full(2))
    for row, logits in enumerate(said):
        expected = alone(model, batch, row, LENGTHS[row], None)
        assert logits.dtype == torch.float32
        assert (logits - expected).norm() < 0.05 * expected.norm()


def test_the_encoder_is_left_as_it_was(model, make_batch):
    before = model.fingerprint()
    PackedNetwork(model, "bf16")
    assert model.fingerprint() == before
    assert isinstance(model, LengthAdaptiveModel)
    assert all(weight.requires_grad for weight in model.parameters())
