"""Full fine-tuning of bfloat16 weights at small rates learns almost nothing, so `fit` warns of it."""

import pytest
import torch

from pmd.config.check import MIN_BFLOAT16_LR, describe_rounding
from pmd.config.schema import ModelConfig, OptimizerConfig, RunConfig


def share_moved(lr: float, dtype: torch.dtype) -> float:
    """The share of weights of usual size that a steady gradient moves in one step."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter((0.02 * torch.randn(10_000)).to(dtype))
    before = weights.detach().clone()
    weights.grad = torch.ones_like(before)
    torch.optim.AdamW([weights], lr=lr, weight_decay=0.0).step()
    return (weights != before).float().mean().item()


def test_the_bound_is_where_weights_begin_to_change():
    assert share_moved(MIN_BFLOAT16_LR, torch.bfloat16) > 0.8
    assert share_moved(MIN_BFLOAT16_LR / 10, torch.bfloat16) < 0.2
    assert share_moved(MIN_BFLOAT16_LR / 10, torch.float32) == 1.0


@pytest.mark.parametrize(
    ("finetune", "dtype", "lr", "warned"),
    [
        ("full", "bfloat16", 1e-5, True),
        ("full", "bfloat16", 1e-3, False),
        ("full", "float32", 1e-5, False),
        ("lora", "bfloat16", 1e-5, False),
    ],
)
def test_who_is_warned(finetune, dtype, lr, warned):
    run = RunConfig(model=ModelConfig(finetune=finetune, dtype=dtype), optimizer=OptimizerConfig(lr=lr))
    said = " ".join(describe_rounding(run))
    assert ("model.dtype=float32 with trainer.precision=bf16-mixed" in said) == warned
