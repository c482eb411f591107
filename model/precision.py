"""What an encoder's products are computed in.

bf16 keeps 8 bits of each factor. What hurts accuracy is not the products, which are summed in float32, but vectors that
are rounded again and again on their way through the layers, and tokens whose attention is so close that rounding
decides which is kept. So only the factors of the large products are rounded, the attention's with the values among
them: vectors pass from layer to layer and are normalised in float32, and who attends to whom is decided there.

"mixed" leaves the first layers' products in float32 too. What rounding does there goes through every later layer, and a
search over length configs computes those layers least often, since configs share them.
"""

import copy
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

Precision = Literal["fp32", "mixed", "bf16"]

EXACT_LAYERS = 2
"""First layers that "mixed" does not round; none of an encoder whose layers share their weights."""


class RoundedLinear(nn.Module):
    """A linear layer whose product has bf16 factors.

    Its results are float32, unless it widens vectors: then another product follows, which rounds its factors anyway.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)
        self.widens = linear.out_features > linear.in_features

    def forward(self, rows_RX: Tensor) -> Tensor:
        """(R, X) to (R, Y)."""
        product_RY = F.linear(rows_RX.bfloat16(), self.weight, self.bias)
        return product_RY if self.widens else product_RY.float()


def snapshot(network: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """A frozen copy without dropout, unless in fp32 with rounded linear layers in place of the encoder layers' own."""
    frozen = copy.deepcopy(network).requires_grad_(False)
    frozen.train(False)
    if precision != "fp32":
        stacks = [module for module in frozen.base_model.modules() if isinstance(module, nn.ModuleList)]
        rounded = {module for stack in stacks for module in stack.modules()}
        if precision == "mixed":
            layers = next((stack for stack in stacks if len(stack) == frozen.config.num_hidden_layers), ())
            rounded -= {module for layer in layers[:EXACT_LAYERS] for module in layer.modules()}
        for parent in rounded:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, RoundedLinear(child))
    return frozen
