"""Packed layers against the layers that they stand for, and arranged networks against those that are not."""

import copy

import pytest
import torch
from torch import nn

from model.families import TOGETHER, BertFamily, ModernBertFamily
from model.precision import RoundedLinear, snapshot
from model.prepacked import PackedLinear, arrange, can_pack

needs_packing = pytest.mark.skipif(
    not can_pack(nn.Linear(1, 1)), reason="needs a processor with AVX2 or AVX-512 and torch's operators"
)
needs_packing_in_bf16 = pytest.mark.skipif(
    not can_pack(nn.Linear(1, 1, dtype=torch.bfloat16)), reason="needs a processor with AVX-512 and torch's operators"
)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (2, 33)])
def test_a_packed_layer_computes_what_the_layers_do(shape, bias):
    torch.manual_seed(0)
    linears, rows = [nn.Linear(48, width, bias=bias) for width in (16, 48, 96)], torch.randn(*shape, 48)
    with torch.inference_mode():
        expected = torch.cat([linear(rows) for linear in linears], -1)
        torch.testing.assert_close(PackedLinear(*linears)(rows), expected)


@needs_packing_in_bf16
@pytest.mark.parametrize(("width", "dtype"), [(48, torch.float32), (96, torch.bfloat16)])
def test_a_packed_layer_rounds_as_the_rounded_one_does(width, dtype):
    torch.manual_seed(0)
    rounded, rows = RoundedLinear(nn.Linear(48, width)), torch.randn(9, 48)
    with torch.inference_mode():
        packed = PackedLinear(rounded)
        assert packed(rows).dtype == dtype
        torch.testing.assert_close(packed(rows), rounded(rows))
        assert packed.product(rows).dtype == torch.bfloat16


@pytest.mark.parametrize("capability", [None, "DEFAULT"])
@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_an_arranged_network_computes_what_it_did(make_network, precision, capability, monkeypatch):
    if capability:
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    frozen = snapshot(make_network(num_hidden_layers=3), precision)
    packed, family = copy.deepcopy(frozen), BertFamily()
    arrange(family, packed, 3)
    kinds = {type(module) for layer in packed.bert.encoder.layer for module in layer.modules()}
    assert (PackedLinear in kinds) == can_pack(frozen)
    rows = torch.randn(11, frozen.config.hidden_size)
    with torch.inference_mode():
        for layer in range(3):
            for compute in (family.project, family.project_for_first, family.query_of_first, family.feed_forward):
                torch.testing.assert_close(compute(packed, layer, rows), compute(frozen, layer, rows))
            merged = family.merge(packed, layer, rows, rows)
            torch.testing.assert_close(merged, family.merge(frozen, layer, rows, rows))


@needs_packing
def test_shared_layers_are_packed_once(make_network):
    frozen = snapshot(make_network(num_hidden_layers=2), "fp32")
    layers = frozen.bert.encoder.layer
    layers[1] = layers[0]
    arrange(BertFamily(), frozen, 2)
    query = layers[0].attention.self.query
    assert isinstance(query, nn.Linear)
    assert isinstance(getattr(query, TOGETHER), PackedLinear)
    assert not any(isinstance(module, PackedLinear) for module in getattr(query, TOGETHER).children())


@pytest.mark.parametrize(
    ("capability", "precision", "packs"),
    [
        ("AVX512", "fp32", True),
        ("AVX512", "bf16", True),
        ("AVX2", "fp32", True),
        ("AVX2", "mixed", False),
        ("DEFAULT", "fp32", False),
    ],
)
def test_layers_are_packed_where_the_processor_is_quicker_with_all_of_them(
    capability, precision, packs, make_network, monkeypatch
):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    assert can_pack(snapshot(make_network(num_hidden_layers=3), precision)) == packs


def test_layers_that_project_together_stay_as_they_are(make_network):
    frozen = snapshot(make_network(), "fp32")
    before = [type(module) for module in frozen.modules()]
    arrange(ModernBertFamily(), frozen, 2)
    assert [type(module) for module in frozen.modules()] == before


def test_projections_side_by_side_are_one_product_without_a_copy(make_network, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    frozen, family = snapshot(make_network(), "fp32"), BertFamily()
    arrange(family, frozen, 2)
    first, *others = family.projections(family.layer(frozen, 1))
    assert all(
        other.weight.untyped_storage().data_ptr() == first.weight.untyped_storage().data_ptr() for other in others
    )
