"""Linear layers for bf16 inference: their weights rounded once, and on a CPU laid out once as its kernels want them."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import GELUActivation


class PrepackedLinear(nn.Linear):
    """A linear layer in bf16 whose weight oneDNN has already reordered. The bits are those of `F.linear` on the same bf16 numbers.

    `activation` is oneDNN's name of what is applied before the result is rounded.
    """

    activation = "none"

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().to(torch.bfloat16).contiguous()
        # Models ask a weight for its dtype and shape; the numbers live in `packed`, which no other operation can read.
        self.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(torch.bfloat16), requires_grad=False)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] of any floating dtype -> bf16 [..., out_features]."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            input.to(torch.bfloat16), self.packed, self.bias, self.activation, [], "none"
        )
        return found


def hold_linears_in_bf16(model: nn.Module) -> None:
    """Round the weights of float32 linear layers, for inference under bf16 autocast.

    Autocast rounds them the same way, but again in every forward; what it computes in float32 (norms, embeddings) stays as it is. So each
    layer's answers are the same to the bit. Only a BERT's GELU is taken into the layer before it, where it comes before the rounding.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer.weight.dtype != torch.float32:
                continue
            if layer.weight.device.type == "cpu" and (prepacked := _prepacked(layer)) is not None:
                setattr(parent, name, prepacked)
                continue
            # Parameters of its own: embeddings that are tied to it are not read in bf16.
            for key, held in list(layer.named_parameters(recurse=False)):
                setattr(layer, key, nn.Parameter(held.detach().to(torch.bfloat16), requires_grad=False))
    for module in model.modules():
        dense, activation = getattr(module, "dense", None), getattr(module, "intermediate_act_fn", None)
        if isinstance(dense, PrepackedLinear) and isinstance(activation, GELUActivation):
            dense.activation = "gelu"
            module.intermediate_act_fn = nn.Identity()


@torch.inference_mode()
def _prepacked(layer: nn.Linear) -> PrepackedLinear | None:
    """None where oneDNN cannot do it, or does not give the same bits."""
    try:
        prepacked = PrepackedLinear(layer)
        for rows in (1, 40):
            x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
            bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)
            if not torch.equal(prepacked(x), nn.functional.linear(x, layer.weight.to(torch.bfloat16), bias)):
                return None
    except (RuntimeError, NotImplementedError, AttributeError):  # a build of PyTorch without oneDNN, a CPU without bf16
        return None
    return prepacked
