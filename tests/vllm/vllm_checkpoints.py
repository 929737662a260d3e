"""Tiny checkpoints with random weights and a local byte tokenizer, made on the spot; policies on them."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pmd.config import ModelConfig, TeacherConfig
from pmd.models.load import load_base, load_tokenizer
from pmd.models.policy import Policy, make_policy
from pmd.tiny import shipped_model_path

#: A head of 32 is the smallest that vLLM's attention on the CPU computes.
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 4096, "initializer_range": 0.1, "tie_word_embeddings": True,
}  # fmt: skip


def make_checkpoint(folder: Path, model_type: str = "qwen3") -> Path:
    """Write a random checkpoint with the byte tokenizer of the shipped exam model."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path("tiny_exam"))
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shape = SHAPE | ({"head_dim": 32} if model_type == "qwen3" else {})
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **shape, **special)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_random_policy(folder: Path, finetune: str, kind: str = "frozen") -> tuple[Policy, object]:
    """Return a policy on the checkpoint, its adapter (if any) no longer neutral, and the tokenizer."""
    model = ModelConfig(path=str(folder), finetune=finetune, lora_rank=4, prompts="chat")
    torch.manual_seed(1)
    policy = make_policy(load_base(model), model, TeacherConfig(kind=kind), needs_initial=True)
    disturb(policy, 0.3, seed=1)
    return policy, load_tokenizer(model)


@torch.no_grad()
def disturb(policy: Policy, scale: float, seed: int) -> None:
    """Move the trained weights by noise of `scale` times their own size; an adapter's zeros count as 0.05."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * max(parameter.std().item(), 0.05) * noise
