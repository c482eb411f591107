"""Linear layers of a frozen network, their weights laid out once as a processor's kernels read them.

torch has oneDNN lay them out anew at every call, and leaves products in float32 to another library that does the same.
On two cores of an AMD EPYC with AVX-512, products of 64 to 4,096 rows with MiniLM's weights take 0.80 to 0.91 of the
time in float32 and 0.85 to 0.96 in bf16; without AVX-512, those of 8 to 48 rows in float32 0.6 to 1.0 (one thread), and
more rows about as long as before. Operators of torch's own compiler do it; where it lacks them, on other processors and
on GPUs, queries, keys and values are still made by one product.

Shape letters: R rows, X and Y inputs and outputs of a layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.families import TOGETHER, EncoderFamily, lay_side_by_side
from model.precision import RoundedLinear

USUAL_ROWS = 2048
"""Rows for which weights are laid out; products of any number are right, and about as quick."""


class PackedLinear(nn.Module):
    """One product in place of one linear layer or of several side by side; computes what they do, in their precision.

    Args:
        linears: Frozen layers of the same inputs, each with a bias or none with one.
    """

    def __init__(self, *linears: Any) -> None:
        super().__init__()
        weight_YX = torch.cat([linear.weight.detach() for linear in linears])
        self.dtype = weight_YX.dtype
        self.keeps_bf16 = all(getattr(linear, "widens", True) for linear in linears)
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else nn.Parameter(torch.cat(biases).detach(), requires_grad=False)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_YX, USUAL_ROWS)

    def product(self, rows_RX: Tensor) -> Tensor:
        """(R, X) to (R, Y), in the precision of the weights."""
        rows_RX = rows_RX.to(self.dtype).contiguous()
        product_RY: Tensor = torch.ops.mkldnn._linear_pointwise(rows_RX, self._weight, self.bias, "none", [], "")
        return product_RY

    def forward(self, rows_RX: Tensor) -> Tensor:
        """As `product`, and in float32 where the layer's own results are."""
        product_RY = self.product(rows_RX)
        return product_RY if self.keeps_bf16 else product_RY.float()


def can_pack(network: nn.Module) -> bool:
    """Whether the network is on a processor, and torch has what it takes to be quicker there with all its layers."""
    parameters = list(network.parameters())
    is_exact = all(parameter.dtype == torch.float32 for parameter in parameters)
    quick = ("AVX2", "AVX512") if is_exact else ("AVX512",)  # oneDNN has no bf16 products without AVX-512
    return (
        all(parameter.device.type == "cpu" for parameter in parameters)
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability() in quick
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    )


def arrange(family: EncoderFamily, network: Any, num_layers: int) -> None:
    """Have all encoder layers of a frozen network compute with as few and as quick products as can be, in place.

    Queries, keys and values are one product, and so are keys and values for `EncoderFamily.project_for_first`; see
    `can_pack` for what becomes of the other linear layers. Where a family's own layers make queries, keys and values
    together, nothing changes.
    """
    if not family.has_projections_apart:
        return
    if not can_pack(network):
        lay_side_by_side(family, network, num_layers)
        return
    for number in range(num_layers):
        layer = family.layer(network, number)
        projections = family.projections(layer)
        if not hasattr(projections[0], TOGETHER):  # layers may share their weights
            _pack_layer(layer, projections)


def _pack_layer(layer: nn.Module, projections: Sequence[Any]) -> None:
    for first in (0, 1):
        setattr(projections[first], TOGETHER, PackedLinear(*projections[first:]))
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | RoundedLinear) and child not in projections:
                setattr(parent, name, PackedLinear(child))
