"""LoRA layers that multiply in their base's dtype.

The weights of an adapter are float32, so that small updates are not lost. PEFT's forward pass converts each layer's
input to float32 as well, which costs a copy of it, kept for the backward pass, and products without the tensor cores.
On a base in half precision, this one converts the two small matrices instead, in every pass, and adds their product to
the base's result in the same matrix product. Gradients reach the float32 weights, and are added up there, in float32.

A base in float32 keeps PEFT's own forward pass, and all else of PEFT stays in place: names in the state dict, switching
of adapters, dropout, export, 4-bit bases.

Not done: one product for the down-projections that share an input (q, k, v; gate, up). It would read the input once
instead of three times or twice, by our reckoning under half a percent of a step of an 8B model.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def multiply_in_base_dtype(model: nn.Module) -> None:
    """Replace the forward pass of every LoRA layer on a linear base in half precision, 4-bit ones included."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and product_dtype(layer.get_base_layer()) in HALF:
            layer.__class__ = _in_base_dtype(type(layer))


@cache
def _in_base_dtype(kind: type) -> type:
    """Return a subclass of a LoRA layer: one class for all its layers, so that `torch.compile` compiles them once."""

    def forward(self: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return adapted(self, kind.forward, inputs, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": "Multiplies in its base's dtype."})


def product_dtype(base: nn.Module) -> torch.dtype | None:
    """Return the dtype in which a linear layer multiplies; None if it is not a linear layer."""
    if not isinstance(base, nn.Linear):
        return None
    return base.weight.dtype if base.weight.is_floating_point() else getattr(base, "compute_dtype", None)


def adapted(layer: Any, original: Callable[..., Tensor], inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return base(x) + scaling B A x, for one active adapter at a time, with the products in the base's dtype.

    What this does not know, such as merged weights or variants of LoRA, goes to PEFT's `original`.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    has_bias = any(layer.lora_B[name].bias is not None for name in names)
    if layer.disable_adapters or layer.merged or layer.lora_variant or has_bias or args or kwargs:
        return original(layer, inputs, *args, **kwargs)
    dtype = product_dtype(layer.get_base_layer())
    rows = inputs.reshape(-1, inputs.shape[-1])
    result = layer.base_layer(rows)
    for name in names:
        down, up = layer.lora_A[name].weight.to(dtype), layer.lora_B[name].weight.to(dtype)
        small = nn.functional.linear(layer.lora_dropout[name](rows).to(dtype), down)
        result = add_product(result, small, up, layer.scaling[name])
    return result.view(*inputs.shape[:-1], -1)


def add_product(total: Tensor, small: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return total [N, O] + scaling small [N, R] @ up [O, R] transposed, from one product, in the memory of `total`."""
    if total.dtype != small.dtype:
        return total.add(small @ up.T, alpha=scaling)
    return total.addmm_(small, up.T, alpha=scaling)
