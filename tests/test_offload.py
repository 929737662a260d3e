"""On a CPU offloading does nothing."""

import torch

from pmd.offload import MIN_ELEMENTS, OffloadedActivations


def test_without_a_gpu_every_tensor_stays_and_gradients_are_the_same():
    weight = torch.randn(2, MIN_ELEMENTS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (weight.exp() * weight).sum().backward()
    expected = weight.grad
    weight.grad = None
    with OffloadedActivations([weight]):
        loss = (weight.exp() * weight).sum()
    loss.backward()
    assert torch.equal(weight.grad, expected)
