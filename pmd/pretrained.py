"""Loads the base model and its tokenizer: one shipped with the package, a local directory, or a Hugging Face id."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from pmd import attention
from pmd.config.schema import ModelConfig
from pmd.errors import ConfigError
from pmd.hub import prepare_hub
from pmd.tasks.thinking import MARK, OPENED
from pmd.tiny import SHIPPED_MODELS, shipped_model_path

CONTROL_TOKEN = re.compile(r"<\|.*\|>")
#: Control tokens of gpt-oss without which its thinking cannot be told from its answer.
CHANNEL_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Fields of model configurations that make training mode random: dropout in all its spellings, noise of routers.
NOISE = re.compile(r"drop(out|path|_path)|pdrop|layerdrop|jitter")
#: The function that computes rotary embedding in an architecture's module.
ROTARY = "apply_rotary_pos_emb"
#: Under which transformers notes that it has warned of more tokens than the model has positions.
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
MARK_TOKENS = 32  # that an opening mark takes at most, one token for each character
Loaded = TypeVar("Loaded")


def resolve_model_path(path: str) -> str:
    """Return what `from_pretrained` takes: the shipped directory for the shipped names, else `path` itself."""
    return str(shipped_model_path(path)) if path in SHIPPED_MODELS else path


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """Read the architecture of the base, without its weights.

    Raises:
        ConfigError: there is none that transformers can read, or it needs code from the model's own repository.
    """
    path, trusted = resolve_model_path(config.path), config.trust_remote_code
    return _loaded(config, "configuration", lambda: AutoConfig.from_pretrained(path, trust_remote_code=trusted))


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer; if it has no padding token, the end-of-sequence token is used.

    With `model.chat_template` it has that file's template.

    Raises:
        ConfigError: there is none that transformers can read.
    """
    path, trusted = resolve_model_path(config.path), config.trust_remote_code
    tokenizer = _loaded(config, "tokenizer", lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=trusted))
    if config.chat_template is not None:
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.deprecation_warnings[TOO_LONG] = True  # its warning is given: pmd itself refuses or shortens long prompts
    return tokenizer


def load_base(config: ModelConfig) -> PreTrainedModel:
    """Load the base weights in eval mode, without any adapter and without dropout.

    Raises:
        ConfigError: the weights cannot be read, or some are missing.
    """
    if config.path in SHIPPED_MODELS:
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
    architecture = load_model_config(config)
    for owner, name, _ in noise_in(architecture):
        _set(owner, name, 0.0)
    model, report = _loaded(
        config,
        "weights",
        lambda: cast(Callable[..., tuple[PreTrainedModel, dict[str, Any]]], AutoModelForCausalLM.from_pretrained)(
            resolve_model_path(config.path),
            config=architecture,
            dtype=DTYPES[config.dtype],
            attn_implementation=_own_attention(config),
            quantization_config=quantization,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        ),
    )
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise ConfigError(
            f"model.path={config.path} lacks {len(missing)} of the weights of {type(model).__name__} ({missing[0]}, "
            "...); give a complete checkpoint of a causal language model."
        )
    if config.finetune == "qlora":
        _keep_packing(model)
    return prepare_base(model, config)


def prepare_base(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """Set up a base as its section says: no dropout, attention, recomputation, kernels; eval mode. It may be repeated.

    Raises:
        ConfigError: the architecture attends in a way that packed rows do not know.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    _set_attention(model, config)
    _checkpoint_layers(model, config)
    _replace_kernels(model, config)
    return model.eval()


def _set_attention(model: PreTrainedModel, config: ModelConfig) -> None:
    """Use `model.attention`; `auto` packs rows where that is fast."""
    packs = config.attention == attention.NAME or (config.attention == "auto" and _packs_fast(model, config))
    reason = attention.unsupported(model) if packs else None
    if reason is not None:
        raise ConfigError(f"model.attention={attention.NAME}: {type(model).__name__} {reason}; use sdpa.")
    wanted = attention.NAME if packs else _own_attention(config)
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)


def _own_attention(config: ModelConfig) -> str:
    """Return the attention that transformers is asked for."""
    return "sdpa" if config.attention in ("auto", attention.NAME) else config.attention


def _packs_fast(model: PreTrainedModel, config: ModelConfig) -> bool:
    """Whether torch's flash attention serves this GPU and this model."""
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return capable and config.dtype == "bfloat16" and attention.unsupported(model) is None


def _checkpoint_layers(model: PreTrainedModel, config: ModelConfig) -> None:
    """Recompute all layers, or every second one, in the backward pass, as `model.gradient_checkpointing` says."""
    model.gradient_checkpointing_disable()
    if config.gradient_checkpointing in (False, "auto"):  # `auto` is replaced at a run's start if there is a GPU
        return
    # Only LoRA's dropout is random.
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": config.lora_dropout > 0})
    if config.gradient_checkpointing == "selective":
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers[1::2]:
            layer.gradient_checkpointing = False


def _replace_kernels(model: PreTrainedModel, config: ModelConfig) -> None:
    """Fuse norms, rotary embedding and SwiGLU, as `model.layer_kernels` says."""
    if config.layer_kernels == "compiled":
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(dynamic=True)
    elif uses_liger(config, "cuda" if torch.cuda.is_available() else "cpu"):
        _use_liger(model)


def _use_liger(model: PreTrainedModel) -> None:
    """Let liger-kernel compute norms, rotary embedding and SwiGLU of this model.

    Its kernels run on a GPU only, so each goes by the device: a model loads on the CPU, and may be used there. What it
    replaces for all models of the architecture is put back, because another one, such as an embedder, may be on a CPU;
    the rotary embedding, a function that all share, goes by the device as well.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore[reportMissingImports]

    architecture = sys.modules[type(model).__module__]
    before = dict(vars(architecture))
    own = {module: vars(module).get("forward") for module in model.modules()}
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    fused = getattr(architecture, ROTARY, None)
    for name, value in before.items():
        setattr(architecture, name, value)
    plain = before.get(ROTARY)
    if plain is not None and fused is not None:
        setattr(architecture, ROTARY, lambda query, *rest: (fused if query.is_cuda else plain)(query, *rest))
    for module, forward in own.items():
        replaced = vars(module).get("forward")
        if replaced is not None and replaced is not forward:
            module.forward = MethodType(_by_device(replaced.__func__), module)  # copied with the module


def _by_device(fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a forward pass that is `fused` on a GPU, and else that of the module's class."""

    def forward(module: nn.Module, inputs: Tensor) -> Tensor:
        return (fused if inputs.is_cuda else type(module).forward)(module, inputs)

    return forward


def uses_liger(config: ModelConfig, device: str) -> bool:
    """Whether liger-kernel computes norms, rotary embedding and SwiGLU on such a device.

    A GPU that is not here, which `pmd doctor` predicts for, counts as one where `pmd[gpu]` is installed.
    """
    if config.layer_kernels != "auto":
        return config.layer_kernels == "liger"
    installed = find_spec("liger_kernel") is not None or not torch.cuda.is_available()
    return device == "cuda" and config.dtype == "bfloat16" and installed


def empty_base(config: ModelConfig) -> PreTrainedModel:
    """Return the unquantised base on the meta device, without weights; what it computes for itself is on the CPU."""
    architecture = load_model_config(config)
    for owner, name, _ in noise_in(architecture):
        _set(owner, name, 0.0)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            architecture,
            dtype=DTYPES[config.dtype],
            attn_implementation=_own_attention(config),
            trust_remote_code=config.trust_remote_code,
        )
    with suppress(OSError):  # without a file of its own, generation_config is derived from the architecture
        model.generation_config = GenerationConfig.from_pretrained(resolve_model_path(config.path))
    return model


def describe_noise(architecture: PretrainedConfig) -> list[str]:
    """Return one line if the base has dropout, which `load_base` switches off."""
    found = ", ".join(sorted({f"{name}={value}" for _, name, value in noise_in(architecture)}))
    if not found:
        return []
    return [
        f"Dropout of the base is switched off in training ({found}): the policy that is trained must be the one that "
        "sampled. model.lora_dropout, if set, still applies."
    ]


def noise_in(architecture: PretrainedConfig) -> Iterator[tuple[Any, str, float]]:
    """Yield (owner, field, value) of every field above 0 that makes training mode random, parts of models included."""
    waiting: list[Any] = [architecture]
    while waiting:
        owner = waiting.pop()
        fields = dict(owner) if isinstance(owner, dict) else dict(vars(owner))
        for name, value in fields.items():
            if isinstance(value, PretrainedConfig | dict):
                waiting.append(value)
            elif (
                NOISE.search(str(name)) and isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            ):
                yield owner, str(name), value


def _set(owner: Any, name: str, value: float) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _loaded(config: ModelConfig, part: str, load: Callable[[], Loaded]) -> Loaded:
    """Return what `load` returns; whatever it raises about the model's files becomes a ConfigError."""
    prepare_hub(resolve_model_path(config.path))
    try:
        return load()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers, safetensors, tokenizers, the Hub and JSON share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        if not config.trust_remote_code and "trust_remote_code" in reason:
            raise ConfigError(
                f"model.path={config.path} needs code from its own repository, which is not run unasked; if you trust "
                "it, set model.trust_remote_code=true, or use another model."
            ) from error
        raise ConfigError(
            f"model.path={config.path}: its {part} cannot be loaded ({type(error).__name__}: {reason[:300]}); give a "
            "complete Hugging Face checkpoint, and check the network if it is an id."
        ) from error


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


def opened_thinking(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """Return the opening mark of thinking with which a prompt ends, or an empty text.

    Put before a completion, it tells thinking that never ended from an answer.
    """
    opened = OPENED.search(cast(str, tokenizer.decode(list(prompt_ids[-MARK_TOKENS:]))))
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
