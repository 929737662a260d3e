"""Weights that are divided among the ranks of a run (`trainer.strategy: fsdp2`), by PyTorch's `fully_shard`.

Each rank keeps a part of every matrix. A pass through the model gathers one layer at a time, forward and backward, so
it is a collective operation: all ranks make the same passes in the same order. Gradients are summed over the ranks, not
averaged. Adapters are small: they stay whole on every rank, and only their base is divided.

Lightning's ModelParallelStrategy would divide the module when `fit` begins; here the untrained policy is evaluated
before that.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

#: The method that `shard` gives a model, and that returns what its backbone returns: all but the output head.
BACKBONE = "forward_backbone"


def shard(model: PreTrainedModel, mesh: DeviceMesh, whole: Iterable[nn.Parameter], dtype: torch.dtype | None) -> None:
    """Divide a model's weights, layer by layer; each rank then holds its part on its own device.

    Args:
        whole: parameters that every rank keeps as they are.
        dtype: in which layers compute, with weights gathered in it and gradients reduced in float32 at least; None is
            that of the weights.
    """
    head, embedding = cast(nn.Linear, model.get_output_embeddings()), cast(nn.Module, model.get_input_embeddings())
    parts: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if head.weight is not embedding.weight:
        parts.append(head)
    reduced_in = torch.float32 if (dtype or model.dtype).itemsize < 4 else None
    precision = MixedPrecisionPolicy(dtype, reduced_in)
    kept = set(whole)
    for part in (*parts, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precision, ignored_params=kept)
        cast(FSDPModule, part).set_gradient_divide_factor(1.0)
        cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)  # gloo has no other
    setattr(model, BACKBONE, MethodType(_call_backbone, model))
    register_fsdp_forward_method(model, BACKBONE)


def _call_backbone(model: PreTrainedModel, **inputs: Any) -> Any:
    return getattr(model, model.base_model_prefix)(**inputs)


def backbone_of(model: PreTrainedModel) -> Callable[..., Any]:
    """Return the part of a causal LM that ends before the output head; it gathers weights that are divided."""
    return getattr(model, BACKBONE, None) or getattr(model, model.base_model_prefix)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, as it was before its weights were divided."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def whole(weight: Tensor) -> Tensor:
    """Return a weight, gathered if it is divided; its gradient is then summed over the ranks."""
    return weight.full_tensor(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight


def own_part(weight: Tensor) -> Tensor:
    """Return this rank's part of a weight, without a copy."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold all weights of a model on every rank; within, passes are not collective. All ranks must enter together."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
