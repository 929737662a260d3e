"""Decides which share of the GPU's memory vLLM gets when it shares the GPU with the trainer.

If vLLM sleeps, trainer and engine take turns: while vLLM generates, the trainer keeps weights, gradients and optimizer
state, and scores a few completions for the parity check; while the trainer trains, vLLM keeps only its CUDA graphs, and
the base and the adapters if it shares the base with the trainer. Without sleep vLLM keeps everything, and must leave
room for a whole training step. Left to itself (`rollouts.vllm.sleep: auto`, our choice), vLLM stays awake only if the
KV cache still holds all completions that are generated at once, at full length.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pmd.config.schema import RunConfig
from pmd.engines.make import GpuShare
from pmd.engines.shared_weights import why_not_shared
from pmd.engines.vllm_runtime import reserved_rank
from pmd.errors import ConfigError
from pmd.planning.gpu_memory import UNDIVIDED, Shape, Shards, max_micro_batch_tokens, predict, read_shape
from pmd.pretrained import DTYPES, load_model_config

#: Bytes per weight with vLLM's own quantisation: NF4 with a float32 scale for each block of 64, or 8-bit floats.
QUANTIZED_BYTES = {"bitsandbytes": 0.5 + 4 / 64, "fp8": 1.0}
#: Parts of the trainer's predicted memory that exist only during a step.
TRANSIENT = ("activations", "logits chunk", "backward pass", "gathered weights", "KV cache", "sampling")
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
    sleeps: bool
    shares_weights: bool
    parts: dict[str, float]  # vLLM's memory by part; the KV cache takes the rest
    trainer_bytes: float  # held by the trainer while vLLM generates
    cached_tokens: float  # capacity of the KV cache
    is_automatic: bool  # False if the configuration gives the fraction

    def phases(self, trainer: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return bytes by part while the trainer trains and while vLLM generates."""
        trainer = without_shared(trainer, shares_weights=self.shares_weights)
        engine = {f"vLLM: {part}": size for part, size in self.parts.items()}
        process = {"CUDA context": CUDA_CONTEXT_BYTES}
        if not self.sleeps:
            return {"always": dict(trainer) | engine | process}
        stays = ("CUDA graphs", *(("weights", "adapters") if self.shares_weights else ()))
        asleep = {f"vLLM: {part}": self.parts[part] for part in stays}
        kept = {part: size for part, size in trainer.items() if part not in TRANSIENT}
        parity = {"parity check": self.trainer_bytes - sum(kept.values())}
        return {"training": dict(trainer) | asleep | process, "generating": kept | parity | engine | process}

    @property
    def share(self) -> GpuShare:
        """What vLLM is started with."""
        return GpuShare(self.fraction, self.shares_weights, self.sleeps)

    def __str__(self) -> str:
        origin = "chosen from the plan" if self.is_automatic else "set by rollouts.vllm.memory_fraction"
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in self.parts.items())
        base = "share one base" if self.shares_weights else "each hold a base"
        if self.sleeps and self.shares_weights:
            asleep = "vLLM frees its KV cache while the policy trains"
        elif self.sleeps:
            main = self.parts["weights"] / 1e9
            asleep = f"vLLM sleeps while the policy trains, with {main:.1f} GB of weights in main memory"
        else:
            asleep = "vLLM stays awake while the policy trains"
        return (
            f"vLLM may fill {self.fraction:.2f} of the GPU's memory, {origin}. Predicted, in GB: {parts}, which holds "
            f"{self.cached_tokens:,.0f} tokens; the trainer keeps {self.trainer_bytes / 1e9:.1f} at the same time. "
            f"Trainer and vLLM {base}; {asleep}."
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


def plan_engine(
    shape: Shape, cache: Cache, run: RunConfig, trainer: Mapping[str, float], gpu: Gpu, *, shares_weights: bool = False
) -> EnginePlan:
    """Return the plan for `gpu`; a fraction from the configuration is used unchanged.

    Args:
        trainer: the trainer's predicted bytes by part, as returned by `predict`.
        shares_weights: trainer and vLLM compute with the same base, which is counted as vLLM's.

    Raises:
        ConfigError: vLLM's weights and one sequence do not fit into the memory that the trainer leaves.
    """
    vllm, fixed = run.rollouts.vllm, engine_parts(shape, run, gpu)
    trainer = without_shared(trainer, shares_weights=shares_weights)
    sleeps = vllm.sleep
    if sleeps == "auto":
        left = _left(gpu, sum(trainer.values())) - sum(fixed.values())
        num_sequences = min(vllm.max_num_seqs, run.rollouts.tasks_per_step * run.rollouts.group_size)
        sleeps = left < (vllm.kv_cache_memory_bytes or num_sequences * cache.one_sequence)
    needed = sum(fixed.values()) + (vllm.kv_cache_memory_bytes or cache.one_sequence)
    trainer_bytes = trainer_bytes_while_generating(shape, run, trainer, sleeps=sleeps)
    left = _left(gpu, trainer_bytes)
    if vllm.memory_fraction is None and left < needed:
        raise ConfigError(
            f"rollouts.vllm.memory_fraction=null: vLLM needs {needed / 1e9:.1f} GB for its weights and one sequence of "
            f"{cache.longest} tokens, but the trainer needs {trainer_bytes / 1e9:.1f} GB and leaves only "
            f"{max(left, 0) / 1e9:.1f} of {gpu.total / 1e9:.1f}: {'; '.join(remedies(run))}."
        )
    fraction = vllm.memory_fraction or min(int(100 * left / gpu.total) / 100, MAX_FRACTION)
    size = vllm.kv_cache_memory_bytes or max(0.0, fraction * gpu.total - sum(fixed.values()))
    parts = fixed | {"KV cache": float(size)}
    is_automatic = vllm.memory_fraction is None
    return EnginePlan(fraction, sleeps, shares_weights, parts, trainer_bytes, cache.tokens(size), is_automatic)


def fits_on(shape: Shape, run: RunConfig, tokens: int, gpu: Gpu, shards: Shards) -> bool:
    """Return whether a run is predicted to fit on GPUs of this size, with vLLM if that is the engine in the process.

    Args:
        tokens: of the largest micro-batch.
    """
    trainer, served = predict(shape, run, tokens, tokens, "cuda", shards), shards.computed(run)
    if run.rollouts.engine != "vllm":
        return sum(trainer.values()) <= gpu.free
    shares_weights, _ = shares_base(run, on_gpu=True, divides=shards.number > 1)
    try:
        plan = plan_engine(shape, read_cache(served), served, trainer, gpu, shares_weights=shares_weights)
    except ConfigError:
        return False
    return all(sum(parts.values()) <= gpu.free for parts in plan.phases(trainer).values())


def _left(gpu: Gpu, trainer_bytes: float) -> float:
    """Return the bytes that vLLM may fill beside `trainer_bytes`."""
    return gpu.free - trainer_bytes - CUDA_CONTEXT_BYTES - FRAGMENTED_SHARE * gpu.total


def without_shared(trainer: Mapping[str, float], *, shares_weights: bool) -> dict[str, float]:
    """Return the trainer's bytes by part, without the base if it is vLLM's."""
    return {part: size for part, size in trainer.items() if not (shares_weights and part == "base")}


def shares_base(run: RunConfig, *, on_gpu: bool, divides: bool = False) -> tuple[bool, list[str]]:
    """Return whether trainer and vLLM are to compute with one copy of the base, and a line if they could not.

    Args:
        divides: the ranks of the run divide the trainer's weights.

    Raises:
        ConfigError: `rollouts.vllm.share_weights` asks for what is not possible.
    """
    asked = run.rollouts.vllm.share_weights
    reason = why_not_shared(run) if asked else None
    if asked and reason is None and divides:
        reason = "trainer.strategy=fsdp2 divides the trainer's base among the ranks"
    if asked == "auto" and reason is None and not on_gpu:
        reason = "vLLM's CPU build repacks its weights"
    if reason is None:
        return bool(asked), []
    if asked is True:
        raise ConfigError(f"rollouts.vllm.share_weights=true, but {reason}; use auto or false.")
    return False, [f"Trainer and vLLM each hold a copy of the base: {reason}."] if run.model.finetune == "lora" else []


def share_gpu(run: RunConfig, shards: Shards | None = None) -> tuple[GpuShare, list[str]]:
    """Return how trainer and vLLM divide this process's GPU, and what to print about it.

    Args:
        shards: how the ranks of the run divide its weights; None if they do not.

    Raises:
        ConfigError: engine and trainer do not fit on the GPU, or one sequence does not fit into the KV cache.
    """
    divides, shards = shards is not None, shards or UNDIVIDED
    served, on_gpu = shards.computed(run), torch.cuda.is_available()
    cache = read_cache(served)
    refuse_small_cache(cache, run)
    shares_weights, lines = shares_base(run, on_gpu=on_gpu, divides=divides)
    if not on_gpu:
        return GpuShare(None, shares_weights, sleeps=False), lines
    shape, tokens, (free, total) = read_shape(run.model), max_micro_batch_tokens(run), torch.cuda.mem_get_info()
    trainer = predict(shape, run, tokens, tokens, "cuda", shards)
    plan = plan_engine(shape, cache, served, trainer, Gpu(total, free), shares_weights=shares_weights)
    return plan.share, [*lines, str(plan)]


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


def trainer_bytes_while_generating(
    shape: Shape, run: RunConfig, trainer: Mapping[str, float], *, sleeps: bool
) -> float:
    """Return the memory that the trainer holds while vLLM is awake."""
    if not sleeps:
        return sum(trainer.values())
    vllm, size = run.rollouts.vllm, DTYPES[run.model.dtype].itemsize
    scored = vllm.parity_completions * (run.rollouts.max_prompt_tokens + vllm.parity_tokens)
    parity = scored * 4.0 * (shape.hidden + shape.intermediate) * size
    parity += trainer.get("logits chunk", 0.0) + trainer.get("gathered weights", 0.0)
    kept = sum(size for part, size in trainer.items() if part not in TRANSIENT)
    return kept + (parity if vllm.parity_completions else 0.0)


def remedies(run: RunConfig) -> list[str]:
    """Return changes that leave more memory to vLLM, the cheapest first."""
    vllm, found = run.rollouts.vllm, []
    if vllm.sleep is False:
        found.append("set rollouts.vllm.sleep=true")
    if run.rollouts.max_new_tokens > 1024:
        found.append("lower rollouts.max_new_tokens or the max_prompt_tokens")
    if vllm.quantization == "none" and run.model.finetune != "full":
        found.append("set rollouts.vllm.quantization=fp8 or bitsandbytes")
    if run.model.finetune != "qlora":
        found.append("set model.finetune=" + ("lora" if run.model.finetune == "full" else "qlora"))
    return [*found, "use rollouts.engine=vllm_server on another GPU"]
