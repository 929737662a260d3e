"""Decides which share of the GPU's memory vLLM gets when it shares the GPU with the trainer.

If vLLM sleeps (level 1), trainer and engine take turns: while vLLM generates, the trainer keeps weights, gradients and
optimizer state, and scores a few completions for the parity check; while the trainer trains, vLLM keeps only its CUDA
graphs. Without sleep vLLM keeps everything, and must leave room for a whole training step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pmd.config.schema import RunConfig
from pmd.engines.vllm_runtime import reserved_rank
from pmd.errors import ConfigError
from pmd.planning.gpu_memory import Shape, max_micro_batch_tokens, predict, read_shape
from pmd.pretrained import DTYPES, load_model_config

#: Bytes per weight with vLLM's own quantisation: NF4 with a float32 scale for each block of 64, or 8-bit floats.
QUANTIZED_BYTES = {"bitsandbytes": 0.5 + 4 / 64, "fp8": 1.0}
#: Parts of the trainer's predicted memory that exist only during a step.
TRANSIENT = ("activations", "logits chunk", "backward pass", "KV cache", "sampling")
#: Estimates, not measurements: CUDA context and libraries of the process, fragmentation, vLLM's CUDA graphs.
CUDA_CONTEXT_BYTES, FRAGMENTED_SHARE, CUDA_GRAPH_BYTES = 1.5e9, 0.03, 1.0e9
MAX_FRACTION = 0.95


@dataclass(frozen=True, slots=True)
class Gpu:
    """The memory of one GPU, in bytes."""

    total: float
    free: float  # not in use by any program


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The share of the GPU that vLLM is started with, and the reasons. Sizes are in bytes."""

    fraction: float
    parts: dict[str, float]  # vLLM's memory by part; the KV cache takes the rest
    trainer_bytes: float  # held by the trainer while vLLM generates
    cached_tokens: float  # capacity of the KV cache
    is_automatic: bool  # False if the configuration gives the fraction

    def phases(self, trainer: Mapping[str, float], run: RunConfig) -> dict[str, dict[str, float]]:
        """Return bytes by part while the trainer trains and while vLLM generates."""
        engine = {f"vLLM: {part}": size for part, size in self.parts.items()}
        process = {"CUDA context": CUDA_CONTEXT_BYTES}
        if not run.rollouts.vllm.sleep:
            return {"always": dict(trainer) | engine | process}
        asleep = {name: size for name, size in engine.items() if name == "vLLM: CUDA graphs"}
        kept = {part: size for part, size in trainer.items() if part not in TRANSIENT}
        parity = {"parity check": self.trainer_bytes - sum(kept.values())}
        return {"training": dict(trainer) | asleep | process, "generating": kept | parity | engine | process}

    def __str__(self) -> str:
        origin = "chosen from the plan" if self.is_automatic else "set by rollouts.vllm.memory_fraction"
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in self.parts.items())
        return (
            f"vLLM may fill {self.fraction:.2f} of the GPU's memory, {origin}. Predicted, in GB: {parts}, which holds "
            f"{self.cached_tokens:,.0f} tokens; the trainer keeps {self.trainer_bytes / 1e9:.1f} at the same time."
        )


@dataclass(frozen=True, slots=True)
class Cache:
    """Size of the KV cache of a sequence; a layer with sliding-window attention caches no more than its window."""

    layer_bytes: int  # keys and values of one token in one layer
    windows: tuple[int | None, ...]  # of each layer; None for full attention
    longest: int  # tokens in the longest sequence that vLLM must handle

    @property
    def one_sequence(self) -> float:
        """Bytes that the longest sequence needs."""
        return float(sum(min(window or self.longest, self.longest) for window in self.windows) * self.layer_bytes)

    def tokens(self, size: float) -> float:
        """Return how many tokens of such sequences fit into `size` bytes."""
        return size / self.one_sequence * self.longest


def read_cache(run: RunConfig) -> Cache:
    """Read the size of a sequence's KV cache from the model's config.json."""
    hf = load_model_config(run.model).get_text_config()
    found, layers = hf.to_dict(), hf.num_hidden_layers
    head = found.get("head_dim") or hf.hidden_size // hf.num_attention_heads
    kinds = found.get("layer_types") or ["full_attention"] * layers
    return Cache(
        layer_bytes=2 * hf.num_key_value_heads * head * DTYPES[run.model.dtype].itemsize,
        windows=tuple(found.get("sliding_window") if kind == "sliding_attention" else None for kind in kinds),
        longest=run.rollouts.vllm.max_model_len or min(hf.max_position_embeddings, run.longest_sequence),
    )


def plan_engine(shape: Shape, cache: Cache, run: RunConfig, trainer: Mapping[str, float], gpu: Gpu) -> EnginePlan:
    """Return the plan for `gpu`; a fraction from the configuration is used unchanged.

    Args:
        trainer: the trainer's predicted bytes by part, as returned by `predict`.

    Raises:
        ConfigError: vLLM's weights and one sequence do not fit into the memory that the trainer leaves.
    """
    vllm, fixed = run.rollouts.vllm, engine_parts(shape, run, gpu)
    needed = sum(fixed.values()) + (vllm.kv_cache_memory_bytes or cache.one_sequence)
    trainer_bytes = trainer_bytes_while_generating(shape, run, trainer)
    left = gpu.free - trainer_bytes - CUDA_CONTEXT_BYTES - FRAGMENTED_SHARE * gpu.total
    if vllm.memory_fraction is None and left < needed:
        raise ConfigError(
            f"rollouts.vllm.memory_fraction=null: vLLM needs {needed / 1e9:.1f} GB for its weights and one sequence of "
            f"{cache.longest} tokens, but the trainer needs {trainer_bytes / 1e9:.1f} GB and leaves only "
            f"{max(left, 0) / 1e9:.1f} of {gpu.total / 1e9:.1f}: {'; '.join(remedies(run))}."
        )
    fraction = vllm.memory_fraction or min(int(100 * left / gpu.total) / 100, MAX_FRACTION)
    size = vllm.kv_cache_memory_bytes or max(0.0, fraction * gpu.total - sum(fixed.values()))
    parts = fixed | {"KV cache": float(size)}
    return EnginePlan(fraction, parts, trainer_bytes, cache.tokens(size), vllm.memory_fraction is None)


def plan_here(run: RunConfig) -> EnginePlan | None:
    """Return the plan for this machine's GPU; without a GPU, only check that the KV cache is large enough.

    Raises:
        ConfigError: engine and trainer do not fit on the GPU, or one sequence does not fit into the KV cache.
    """
    cache = read_cache(run)
    refuse_small_cache(cache, run)
    if not torch.cuda.is_available():
        return None
    shape, tokens, (free, total) = read_shape(run.model), max_micro_batch_tokens(run), torch.cuda.mem_get_info()
    return plan_engine(shape, cache, run, predict(shape, run, tokens, tokens, "cuda"), Gpu(total, free))


def refuse_small_cache(cache: Cache, run: RunConfig) -> None:
    """Refuse a configured KV cache that cannot hold even one sequence of maximum length.

    Raises:
        ConfigError: names the size that is needed.
    """
    size = run.rollouts.vllm.kv_cache_memory_bytes
    if size is not None and size < cache.one_sequence:
        raise ConfigError(
            f"rollouts.vllm.kv_cache_memory_bytes={size} holds {cache.tokens(size):.0f} tokens, but one sequence can "
            f"have {cache.longest} (rollouts.vllm.max_model_len, or the longest prompt and completion that the "
            f"configuration allows): set it to at least {cache.one_sequence:.0f}, or lower max_model_len, "
            "max_prompt_tokens or max_new_tokens."
        )


def engine_parts(shape: Shape, run: RunConfig, gpu: Gpu) -> dict[str, float]:
    """Return vLLM's bytes by part, without its KV cache. Weights and adapters are exact, the rest is an estimate."""
    vllm, size = run.rollouts.vllm, DTYPES[run.model.dtype].itemsize
    adapters = 0 if run.model.finetune == "full" else 1 + run.teacher.has_own_weights
    tokens = 16384 if gpu.total >= 70 * 2**30 else 8192  # processed by vLLM at once
    forward = tokens * 3.0 * (shape.hidden + shape.intermediate) * size
    return {
        "weights": shape.linear * QUANTIZED_BYTES.get(vllm.quantization, size) + float(shape.embedding * size),
        "adapters": float(adapters * shape.adapter(reserved_rank(run.model.lora_rank)) * size),
        "forward pass": forward + vllm.max_num_seqs * shape.vocabulary * 16.0,
        "CUDA graphs": 0.0 if vllm.enforce_eager else CUDA_GRAPH_BYTES,
    }


def trainer_bytes_while_generating(shape: Shape, run: RunConfig, trainer: Mapping[str, float]) -> float:
    """Return the memory that the trainer holds while vLLM is awake."""
    if not run.rollouts.vllm.sleep:
        return sum(trainer.values())
    vllm, size = run.rollouts.vllm, DTYPES[run.model.dtype].itemsize
    scored = vllm.parity_completions * (run.rollouts.max_prompt_tokens + vllm.parity_tokens)
    parity = scored * 4.0 * (shape.hidden + shape.intermediate) * size + trainer.get("logits chunk", 0.0)
    kept = sum(size for part, size in trainer.items() if part not in TRANSIENT)
    return kept + (parity if vllm.parity_completions else 0.0)


def remedies(run: RunConfig) -> list[str]:
    """Return changes that leave more memory to vLLM, the cheapest first."""
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
