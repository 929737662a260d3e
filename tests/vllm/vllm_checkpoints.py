"""Policies on a tiny checkpoint with random weights, and noise for their weights."""

from pathlib import Path

import torch

from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.policy import Policy, make_policy
from pmd.pretrained import load_base, load_tokenizer


def make_random_policy(folder: Path, finetune: str, kind: str = "frozen") -> tuple[Policy, object]:
    """Return a policy whose trained weights differ from the checkpoint's, and the tokenizer."""
    model = ModelConfig(path=str(folder), finetune=finetune, lora_rank=4, prompts="chat")
    torch.manual_seed(1)
    policy = make_policy(load_base(model), model, TeacherConfig(kind=kind), needs_reference=True)
    disturb(policy, 0.3, seed=1)
    return policy, load_tokenizer(model)


@torch.no_grad()
def disturb(policy: Policy, scale: float, seed: int) -> None:
    """Add noise of `scale` times their standard deviation (at least 0.05, for adapters) to the trained weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * max(parameter.std().item(), 0.05) * noise
