"""Loads the base model and its tokenizer: one shipped with the package, a local directory, or a Hugging Face id."""

import re
from collections.abc import Iterable
from typing import cast

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from pmd.config.schema import ModelConfig
from pmd.tasks.thinking import MARK, OPENED
from pmd.tiny import shipped_model_path

SHIPPED = ("tiny", "tiny_exam")
CONTROL_TOKEN = re.compile(r"<\|.*\|>")
#: Control tokens of gpt-oss without which its thinking cannot be told from its answer.
CHANNEL_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>")
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


def hidden_ids(tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> frozenset[int]:
    """Return the special tokens that are no part of a completion's text: end, padding, and turns of the chat.

    Other special tokens spell text that verifiers read, such as `<answer>` or `<think>`, and must stay. A turn token is
    one spelled `<|like this|>`, or one that the chat template writes around plain messages.
    """
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    special = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    chat = _plain_chat(tokenizer)
    hidden = {
        token_id
        for token_id, text in special.items()
        if (text in named or CONTROL_TOKEN.fullmatch(text) or text in chat)
        and not MARK.fullmatch(text)
        and text not in CHANNEL_TOKENS
    }
    return frozenset(hidden | set(stop_ids))


def opened_thinking(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the opening mark with which the chat template ends every prompt, or an empty text.

    Put before a completion, it tells thinking that never ended from an answer.
    """
    opened = OPENED.search(_plain_chat(tokenizer))
    return opened[0].strip() if opened else ""


def _plain_chat(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return how the chat template writes three short messages and the beginning of a fourth; empty without one."""
    if not tokenizer.chat_template:
        return ""
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        written = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    except TemplateError:  # a template may refuse messages
        return ""
    return cast(str, written)
