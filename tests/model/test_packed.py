"""What packed predictions leave alone and how far bf16 moves them; that they are the encoder's is in test_families."""

import itertools
import threading

import pytest
import torch

from model.length_config import LengthConfig
from model.packed import PackedNetwork

LENGTHS = (19, 30, 3, 30, 12, 2, 31, 13)
SHORT = LengthConfig.from_retention((0.9, 0.7, 0.7, 0.5))


@pytest.fixture
def sequences(make_batch, unpadded):
    split = unpadded(make_batch(LENGTHS))
    return split.input_ids, split.token_type_ids


def test_bf16_stays_close(model, sequences):
    """At full length: where tokens are dropped, rounding may decide which."""
    config = LengthConfig.full(4)
    exact = torch.stack(PackedNetwork(model).logits(*sequences, config))
    rounded = torch.stack(PackedNetwork(model, "bf16").logits(*sequences, config))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_a_result_does_not_depend_on_batch_mates(model, sequences):
    packed = PackedNetwork(model)
    together = packed.logits(*sequences, SHORT)
    for row, (ids, types) in enumerate(zip(*sequences, strict=True)):
        torch.testing.assert_close(packed.logits([ids], [types], SHORT)[0], together[row], rtol=0, atol=1e-5)


def test_the_encoder_is_left_as_it_was(model):
    before = model.fingerprint()
    PackedNetwork(model, "bf16")
    assert model.fingerprint() == before
    assert all(weight.requires_grad for weight in model.parameters())


def test_threads_may_share_it(model, sequences):
    packed = PackedNetwork(model)
    configs = (SHORT, LengthConfig.full(4))
    expected = [packed.logits(*sequences, config) for config in configs]
    wrong, start = [], threading.Barrier(4)

    def work(number):
        start.wait()
        for which in itertools.islice(itertools.cycle((number % 2, 1 - number % 2)), 20):
            told = packed.logits(*sequences, configs[which])
            wrong.extend(one for one, other in zip(told, expected[which], strict=True) if not torch.equal(one, other))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
