"""A tiny Qwen3 in bfloat16 whose heads have the smallest size that every attention kernel for GPUs supports."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pmd.bootstrap.random_model import make_random_model


def make_gpu_model(folder: Path) -> Path:
    """Write the model with random weights, the same at every call, and a tokenizer."""
    make_random_model(folder)  # for its tokenizer
    config = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 128, "head_dim": 64, "initializer_range": 0.05})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
