"""Packed layers against the layers that they stand for, and networks with them against those without."""

import copy

import pytest
import torch
from torch import nn

from model.families import TOGETHER, BertFamily, ModernBertFamily
from model.precision import RoundedLinear, snapshot
from model.prepacked import PackedLinear, can_pack, pack

pytestmark = [
    pytest.mark.skipif(not can_pack(nn.Linear(1, 1)), reason="needs a processor with AVX-512 and torch's operators"),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (2, 33)])
def test_a_packed_layer_computes_what_the_layers_do(shape, bias):
    torch.manual_seed(0)
    linears, rows = [nn.Linear(48, width, bias=bias) for width in (16, 48, 96)], torch.randn(*shape, 48)
    with torch.inference_mode():
        expected = torch.cat([linear(rows) for linear in linears], -1)
        torch.testing.assert_close(PackedLinear(*linears)(rows), expected)


@pytest.mark.parametrize(("width", "dtype"), [(48, torch.float32), (96, torch.bfloat16)])
def test_a_packed_layer_rounds_as_the_rounded_one_does(width, dtype):
    torch.manual_seed(0)
    rounded, rows = RoundedLinear(nn.Linear(48, width)), torch.randn(9, 48)
    with torch.inference_mode():
        packed = PackedLinear(rounded)
        assert packed(rows).dtype == dtype
        torch.testing.assert_close(packed(rows), rounded(rows))
        assert packed.product(rows).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_a_packed_network_computes_what_it_did(make_network, precision):
    frozen = snapshot(make_network(num_hidden_layers=3), precision)
    packed, family = copy.deepcopy(frozen), BertFamily()
    pack(family, packed, 3)
    kinds = {type(module) for layer in packed.bert.encoder.layer for module in layer.modules()}
    assert PackedLinear in kinds
    rows = torch.randn(11, frozen.config.hidden_size)
    with torch.inference_mode():
        for layer in range(3):
            for compute in (family.project, family.project_for_first, family.query_of_first, family.feed_forward):
                torch.testing.assert_close(compute(packed, layer, rows), compute(frozen, layer, rows))
            merged = family.merge(packed, layer, rows, rows)
            torch.testing.assert_close(merged, family.merge(frozen, layer, rows, rows))


def test_shared_layers_are_packed_once(make_network):
    frozen = snapshot(make_network(num_hidden_layers=2), "fp32")
    layers = frozen.bert.encoder.layer
    layers[1] = layers[0]
    pack(BertFamily(), frozen, 2)
    query = layers[0].attention.self.query
    assert isinstance(query, nn.Linear)
    assert isinstance(getattr(query, TOGETHER), PackedLinear)
    assert not any(isinstance(module, PackedLinear) for module in getattr(query, TOGETHER).children())


def test_what_cannot_be_packed_stays_as_it_is(make_network, monkeypatch):
    frozen = snapshot(make_network(), "fp32")
    before = [type(module) for module in frozen.modules()]
    pack(ModernBertFamily(), frozen, 2)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    pack(BertFamily(), frozen, 2)
    assert [type(module) for module in frozen.modules()] == before
