"""The sections that say what is trained and how it is stepped; `config.py` joins them with the others."""

from dataclasses import dataclass
from typing import Literal

from pmd.config_option import option


@dataclass
class ModelConfig:
    """The policy: which weights, in which precision, and what of them is trained."""

    path: str = option(
        "tiny", "`tiny` or `tiny_exam` (shipped with the package), a Hugging Face id, or a local directory."
    )
    dtype: Literal["float32", "bfloat16"] = option("float32", "Precision of the base weights.")
    finetune: Literal["full", "lora", "qlora"] = option(
        "full", "Train all weights, an adapter, or an adapter on a 4-bit base."
    )
    lora_rank: int = option(16, "Rank of the adapter.", least=1)
    lora_alpha: float = option(
        32.0, "Scale of the adapter: its output is multiplied by lora_alpha / lora_rank.", above=0
    )
    lora_dropout: float = option(0.0, "Dropout inside the adapter.", least=0, most=0.9)
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: slower, far less memory.")
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = option(
        "sdpa", "How attention is computed; flash attention (CUDA, its own package) also packs rows without padding."
    )
    prompts: Literal["words", "chat"] = option(
        "words", "`words` is the tiny world's own language; `chat` uses the tokenizer's chat template."
    )


@dataclass
class OptimizerConfig:
    """AdamW with a linear warm-up and then a constant rate (SDPO's recipe)."""

    kind: Literal["adamw", "adamw_8bit_paged"] = option(
        "adamw", "`adamw_8bit_paged` keeps AdamW's state in 8 bits and moves it to the CPU under pressure (CUDA only)."
    )
    lr: float = option(1e-5, "Learning rate after the warm-up.", above=0)
    weight_decay: float = option(0.01, "Decoupled weight decay.", least=0)
    beta1: float = option(0.9, "AdamW's first decay rate.", least=0, most=1)
    beta2: float = option(0.999, "AdamW's second decay rate.", least=0, most=1)
    warmup_steps: int = option(0, "Optimizer steps over which the rate rises from 0.", least=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", above=0)
