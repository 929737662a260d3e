"""How much of the GPU vLLM may fill beside the trainer, and what it needs there.

Enters: the architecture, the configuration, what the trainer is predicted to need, the GPU. Leaves: the share of the
GPU's memory that vLLM is started with, or a ConfigError if engine and trainer do not fit together.

Trainer and engine take turns where vLLM sleeps (level 1): while it generates, the trainer keeps weights, gradients and
optimizer, and scores a few completions for the parity check; while the trainer trains, vLLM keeps its CUDA graphs
alone. Without sleep vLLM keeps everything, and must leave room for a whole training step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pmd.config.schema import RunConfig
from pmd.engines.vllm_runtime import reserved_rank
from pmd.errors import ConfigError
from pmd.planning.gpu_memory import Shape, max_micro_batch_tokens, predict, read_shape
from pmd.pretrained import DTYPES, resolve_model_path

#: Bytes of a weight under vLLM's own quantisation: NF4 with a float32 scale for each block of 64, or 8-bit floats.
QUANTIZED_BYTES = {"bitsandbytes": 0.5 + 4 / 64, "fp8": 1.0}
#: Parts of the trainer's prediction that exist during a step alone.
TRANSIENT = ("activations", "logits chunk", "backward pass", "KV cache", "sampling")
#: Estimates, not measured: CUDA context and libraries of the process, fragmentation, vLLM's CUDA graphs.
CONTEXT_BYTES, FRAGMENTED_SHARE, GRAPH_BYTES = 1.5e9, 0.03, 1.0e9
MAX_FRACTION = 0.95


@dataclass(frozen=True, slots=True)
class Gpu:
    """The memory of one GPU: all of it, and what no other program holds."""

    total: float
    free: float


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What vLLM is started with, and why."""

    fraction: float
    parts: dict[str, float]  # of vLLM, in bytes; the KV cache is what the others leave
    beside: float  # of the trainer while vLLM generates
    cached_tokens: float  # that the KV cache holds
    is_chosen: bool  # not given by hand

    def phases(self, trainer: Mapping[str, float], run: RunConfig) -> dict[str, dict[str, float]]:
        """Return bytes by part while the trainer trains and while vLLM generates."""
        own = {f"vLLM: {part}": size for part, size in self.parts.items()}
        process = {"CUDA context": CONTEXT_BYTES}
        if not run.rollouts.vllm.sleep:
            return {"always": dict(trainer) | own | process}
        asleep = {name: size for name, size in own.items() if name == "vLLM: CUDA graphs"}
        kept = {part: size for part, size in trainer.items() if part not in TRANSIENT}
        parity = {"parity check": self.beside - sum(kept.values())}
        return {"training": dict(trainer) | asleep | process, "generating": kept | parity | own | process}

    def __str__(self) -> str:
        chosen = "chosen from the plan" if self.is_chosen else "as rollouts.vllm.memory_fraction says"
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in self.parts.items())
        return (
            f"vLLM may fill {self.fraction:.2f} of the GPU's memory, {chosen}. Predicted, in GB: {parts}, which holds "
            f"{self.cached_tokens:,.0f} tokens; the trainer keeps {self.beside / 1e9:.1f} meanwhile."
        )


@dataclass(frozen=True, slots=True)
class Cache:
    """What a model keeps of a sequence; a layer that looks back over a window keeps no more than that."""

    layer_bytes: int  # keys and values of one token in one layer
    windows: tuple[int | None, ...]  # of each layer
    longest: int  # tokens of the longest sequence that vLLM is started for

    @property
    def one_sequence(self) -> float:
        """Bytes of the longest sequence."""
        return float(sum(min(window or self.longest, self.longest) for window in self.windows) * self.layer_bytes)

    def tokens(self, size: float) -> float:
        """Return how many tokens of such sequences `size` bytes hold."""
        return size / self.one_sequence * self.longest


def read_cache(run: RunConfig) -> Cache:
    """Read from the model's config.json what a sequence takes."""
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(resolve_model_path(run.model.path)).get_text_config()
    found, layers = hf.to_dict(), hf.num_hidden_layers
    head = found.get("head_dim") or hf.hidden_size // hf.num_attention_heads
    kinds = found.get("layer_types") or ["full_attention"] * layers
    return Cache(
        layer_bytes=2 * hf.num_key_value_heads * head * DTYPES[run.model.dtype].itemsize,
        windows=tuple(found.get("sliding_window") if kind == "sliding_attention" else None for kind in kinds),
        longest=run.rollouts.vllm.max_model_len or min(hf.max_position_embeddings, run.longest_sequence),
    )


def plan_engine(shape: Shape, cache: Cache, run: RunConfig, trainer: Mapping[str, float], gpu: Gpu) -> EnginePlan:
    """Return what vLLM is started with on `gpu`; a fraction given by hand is taken as it is.

    Args:
        trainer: its predicted bytes by part, as `predict` returns them.

    Raises:
        ConfigError: vLLM would not hold its weights and one sequence in what the trainer leaves.
    """
    vllm, fixed = run.rollouts.vllm, engine_parts(shape, run, gpu)
    needed = sum(fixed.values()) + (vllm.kv_cache_memory_bytes or cache.one_sequence)
    beside = beside_bytes(shape, run, trainer)
    left = gpu.free - beside - CONTEXT_BYTES - FRAGMENTED_SHARE * gpu.total
    if vllm.memory_fraction is None and left < needed:
        raise ConfigError(
            f"rollouts.vllm.memory_fraction=null: vLLM needs {needed / 1e9:.1f} GB for its weights and one sequence of "
            f"{cache.longest} tokens, and {max(left, 0) / 1e9:.1f} GB of {gpu.total / 1e9:.1f} are left beside the "
            f"trainer's {beside / 1e9:.1f}: {'; '.join(remedies(run))}."
        )
    fraction = vllm.memory_fraction or min(int(100 * left / gpu.total) / 100, MAX_FRACTION)
    size = vllm.kv_cache_memory_bytes or max(0.0, fraction * gpu.total - sum(fixed.values()))
    parts = fixed | {"KV cache": float(size)}
    return EnginePlan(fraction, parts, beside, cache.tokens(size), vllm.memory_fraction is None)


def plan_here(run: RunConfig) -> EnginePlan | None:
    """Return the plan for this machine's GPU; without one, see only that the KV cache is large enough.

    Raises:
        ConfigError: engine and trainer, or one sequence and the KV cache, do not fit.
    """
    cache = read_cache(run)
    refuse_small_cache(cache, run)
    if not torch.cuda.is_available():
        return None
    shape, tokens, (free, total) = read_shape(run.model), max_micro_batch_tokens(run), torch.cuda.mem_get_info()
    return plan_engine(shape, cache, run, predict(shape, run, tokens, tokens, "cuda"), Gpu(total, free))


def refuse_small_cache(cache: Cache, run: RunConfig) -> None:
    """Refuse a KV cache of a given size in which not even one sequence of the greatest length fits.

    Raises:
        ConfigError: with the size that is needed.
    """
    size = run.rollouts.vllm.kv_cache_memory_bytes
    if size is not None and size < cache.one_sequence:
        raise ConfigError(
            f"rollouts.vllm.kv_cache_memory_bytes={size} holds {cache.tokens(size):.0f} tokens, but one sequence may "
            f"have {cache.longest} (rollouts.vllm.max_model_len, or the longest prompt and completion that the "
            f"sections allow): give it at least {cache.one_sequence:.0f}, or lower max_model_len, max_prompt_tokens or "
            "max_new_tokens."
        )


def engine_parts(shape: Shape, run: RunConfig, gpu: Gpu) -> dict[str, float]:
    """Return bytes by part of vLLM without its KV cache. Weights and adapters are exact, the rest is an estimate."""
    vllm, size = run.rollouts.vllm, DTYPES[run.model.dtype].itemsize
    adapters = 0 if run.model.finetune == "full" else 1 + run.teacher.has_own_weights
    tokens = 16384 if gpu.total >= 70 * 2**30 else 8192  # read by vLLM at once
    forward = tokens * 3.0 * (shape.hidden + shape.intermediate) * size
    return {
        "weights": shape.linear * QUANTIZED_BYTES.get(vllm.quantization, size) + float(shape.embedding * size),
        "adapters": float(adapters * shape.adapter(reserved_rank(run.model.lora_rank)) * size),
        "forward pass": forward + vllm.max_num_seqs * shape.vocabulary * 16.0,
        "CUDA graphs": 0.0 if vllm.enforce_eager else GRAPH_BYTES,
    }


def beside_bytes(shape: Shape, run: RunConfig, trainer: Mapping[str, float]) -> float:
    """Return what the trainer holds while vLLM holds all of its own."""
    if not run.rollouts.vllm.sleep:
        return sum(trainer.values())
    vllm, size = run.rollouts.vllm, DTYPES[run.model.dtype].itemsize
    scored = vllm.parity_completions * (run.rollouts.max_prompt_tokens + vllm.parity_tokens)
    parity = scored * 4.0 * (shape.hidden + shape.intermediate) * size + trainer.get("logits chunk", 0.0)
    kept = sum(size for part, size in trainer.items() if part not in TRANSIENT)
    return kept + (parity if vllm.parity_completions else 0.0)


def remedies(run: RunConfig) -> list[str]:
    """Name what would leave vLLM more, the cheapest change first."""
    vllm, found = run.rollouts.vllm, []
    if not vllm.sleep:
        found.append("set rollouts.vllm.sleep=true")
    if run.rollouts.max_new_tokens > 1024:
        found.append("lower rollouts.max_new_tokens or the max_prompt_tokens")
    if vllm.quantization == "none" and run.model.finetune != "full":
        found.append("set rollouts.vllm.quantization=fp8 or bitsandbytes")
    if run.model.finetune != "qlora":
        found.append("set model.finetune=" + ("lora" if run.model.finetune == "full" else "qlora"))
    return [*found, "use rollouts.engine=vllm_server on another GPU"]
