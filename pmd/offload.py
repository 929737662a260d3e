"""Keeps what the backward pass needs in main memory instead of the GPU's (`model.offload_activations`).

Copies run on a stream of their own, from and to pinned memory, beside the computation. With gradient checkpointing what
is kept are the inputs of the layers, so that the longest sequence that fits no longer depends on their number.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

#: Smaller tensors stay: a copy costs more than they take.
MIN_ELEMENTS = 2**20


class OffloadedActivations(saved_tensors_hooks):
    """Within this context, large tensors that autograd saves go to main memory until the backward pass needs them."""

    def __init__(self, weights: Iterable[Tensor]):
        """Offload everything large but `weights`, which stay on the GPU anyway."""
        kept = {weight.untyped_storage().data_ptr() for weight in weights}
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if stream is None or not tensor.is_cuda or tensor.numel() < MIN_ELEMENTS:
                return tensor
            if tensor.untyped_storage().data_ptr() in kept:
                return tensor
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            return tensor.device, host

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, host = packed
            assert stream is not None
            torch.cuda.current_stream().wait_stream(stream)
            return host.to(device, non_blocking=True)

        super().__init__(pack, unpack)
