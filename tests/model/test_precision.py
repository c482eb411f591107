"""Rounded layers against the same products written out, and snapshots against the networks they are of."""

import pytest
import torch
from torch import nn

from model.precision import RoundedLinear, snapshot


def rounded(values):
    return values.bfloat16().double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "dtype"), [(48, torch.float32), (32, torch.float32), (96, torch.bfloat16)])
def test_a_rounded_layer_rounds_its_factors_and_its_result(width, dtype, bias):
    torch.manual_seed(0)
    linear, rows = nn.Linear(48, width, bias=bias), torch.randn(7, 48)
    product = RoundedLinear(linear)(rows)
    assert product.dtype == dtype, "in bf16 only where it widens"
    exact = rounded(rows) @ rounded(linear.weight).T
    if bias:
        exact = exact + rounded(linear.bias)
    torch.testing.assert_close(product.double(), exact, rtol=2**-8, atol=1e-3)
    assert not torch.allclose(product.double(), (rows.double() @ linear.weight.double().T), rtol=0, atol=1e-4)


def test_a_snapshot_in_fp32_is_the_network_itself_and_a_copy(make_network, make_batch):
    network = make_network(hidden_dropout_prob=0.5)
    batch = make_batch([9, 4, 21])
    frozen = snapshot(network.train(), "fp32")
    with torch.no_grad():
        before = network.eval()(**batch).logits
        nn.init.zeros_(network.classifier.weight)
        torch.testing.assert_close(frozen(**batch).logits, before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_snapshot_in_bf16_rounds_the_layers_alone(make_network, make_batch):
    network, batch = make_network().eval(), make_batch([9, 4, 21])
    frozen = snapshot(network, "bf16")
    kinds = {name: type(module) for name, module in frozen.named_modules() if hasattr(module, "weight")}
    layers = {name: kind for name, kind in kinds.items() if ".layer." in name and "LayerNorm" not in name}
    assert set(layers.values()) == {RoundedLinear}
    assert len(layers) == 6 * network.config.num_hidden_layers
    assert {kind for name, kind in kinds.items() if name not in layers} == {nn.Embedding, nn.LayerNorm, nn.Linear}
    with torch.no_grad():
        exact, near = network(**batch).logits, frozen(**batch).logits
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_a_mixed_snapshot_leaves_the_first_two_layers_as_they_are(make_network, num_layers):
    layers = snapshot(make_network(num_hidden_layers=num_layers), "mixed").bert.encoder.layer
    kinds = [{type(module) for module in layer.modules() if hasattr(module, "weight")} for layer in layers]
    exact, rounded = {nn.Linear, nn.LayerNorm}, {RoundedLinear, nn.LayerNorm}
    assert kinds == [exact, exact, rounded, rounded, rounded][:num_layers]


def test_a_snapshot_is_nearer_to_the_network_than_rounding_everything(make_network, make_batch):
    network, batch = make_network(num_hidden_layers=8).eval(), make_batch([30] * 12)
    with torch.no_grad():
        exact, near = network(**batch).logits, snapshot(network, "bf16")(**batch).logits
        network.bfloat16()
        far = network(**batch).logits
    assert (near - exact).square().mean() < 0.7 * (far - exact).square().mean()
