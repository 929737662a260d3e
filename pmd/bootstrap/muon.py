"""Muon: momentum with orthogonalised matrix updates (Jordan et al., 2024). Used only to make the shipped models.

`torch.optim.Muon` works in bfloat16, which is slow on a CPU, on one matrix at a time, and only exists since torch 2.9;
this one works in float32 and batches matrices of the same shape.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of the reference implementation
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for 2-D parameters."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update."""
        for group in self.param_groups:
            wide_updates: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                velocity = state["velocity"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(velocity, group["momentum"])
                wide = update if update.size(0) <= update.size(1) else update.T
                wide_updates.setdefault((wide.size(0), wide.size(1)), []).append((parameter, wide))
            for pairs in wide_updates.values():
                for (parameter, _), wide in zip(pairs, orthogonalised([w for _, w in pairs]), strict=True):
                    update = wide if parameter.size(0) <= parameter.size(1) else wide.T
                    scale = max(1.0, parameter.size(0) / parameter.size(1)) ** 0.5
                    parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalised(matrices: list[Tensor]) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrices: singular values between about 0.7 and 1.2."""
    a, b, c = QUINTIC
    x = torch.stack(matrices)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
