"""Loads the base model and its tokenizer: one shipped with the package, a local directory, or a Hugging Face id."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from pmd.config.schema import ModelConfig
from pmd.tiny import shipped_model_path

SHIPPED = ("tiny", "tiny_exam")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_model_path(path: str) -> str:
    """Return what `from_pretrained` takes: the shipped directory for the shipped names, else `path` itself."""
    return str(shipped_model_path(path)) if path in SHIPPED else path


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer; if it has no padding token, the end-of-sequence token is used."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(config.path))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: ModelConfig) -> PreTrainedModel:
    """Load the base weights in eval mode, without any adapter."""
    if config.path in SHIPPED:
        hf_logging.disable_progress_bar()  # they load in well under a second
    quantization = None
    if config.finetune == "qlora":
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model_path(config.path),
        dtype=DTYPES[config.dtype],
        attn_implementation=config.attention,
        quantization_config=quantization,
    )
    if config.finetune == "qlora":
        _keep_packing(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval()


def _keep_packing(model: PreTrainedModel) -> None:
    """Disable the CPU path that repacks 4-bit weights in the first eval pass: later gradients would be wrong."""
    from bitsandbytes.nn.modules import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that end a completion: the tokenizer's, and those of the model's generation settings."""
    settings = model.generation_config
    named = settings.eos_token_id if settings is not None else None
    listed = named if isinstance(named, list) else [named]
    return sorted({token_id for token_id in (tokenizer.eos_token_id, *listed) if isinstance(token_id, int)})
