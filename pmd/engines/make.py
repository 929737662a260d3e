"""Starts the engine that `rollouts.engine` selects."""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pmd.config.schema import RunConfig
from pmd.config.values import shown
from pmd.engines.base import Engine
from pmd.engines.hf import HFEngine
from pmd.engines.server import VLLMServerEngine
from pmd.engines.shared_weights import NotShareable, share_weights
from pmd.engines.vllm import VLLMEngine
from pmd.engines.vllm_runtime import (
    EngineSettings,
    VLLMRuntime,
    check_version,
    describe_version,
    exempt_from_compilation,
)
from pmd.errors import ConfigError
from pmd.policy import AdapterPolicy, Policy
from pmd.pretrained import empty_base, load_base, load_model_config, resolve_model_path


@dataclass(frozen=True, slots=True)
class GpuShare:
    """How trainer and vLLM divide the GPU."""

    memory_fraction: float | None  # of the GPU's memory, for vLLM while awake; None without a GPU
    shares_weights: bool
    sleeps: bool  # vLLM gives back memory while the policy trains


def check_engine(config: RunConfig) -> None:
    """Check that the selected engine can run here, before any weights load; print what may not work.

    Raises:
        ConfigError: vLLM is missing or too old.
    """
    if config.rollouts.engine == "vllm":
        for line in describe_version(check_version()):
            print(line, flush=True)


def start_vllm(
    config: RunConfig, share: GpuShare, cache_dir: Path | None = None, dtype: str | None = None
) -> tuple[VLLMRuntime, PreTrainedModel]:
    """Start vLLM in this process; return it with the trainer's base, which may have vLLM's weights.

    The base is made first: for some architectures vLLM changes the classes of transformers that it is made of.

    Args:
        dtype: in which vLLM computes; None is that of the weights.

    Raises:
        ConfigError: sharing was planned for, and vLLM holds the weights in another form.
    """
    base = empty_base(config.model) if share.shares_weights else load_base(config.model)
    max_positions = load_model_config(config.model).get_text_config().max_position_embeddings
    settings = engine_settings(config, max_positions, share, cache_dir)
    runtime = VLLMRuntime(replace(settings, dtype=dtype or settings.dtype))
    exempt_from_compilation(base)
    if share.shares_weights:
        try:
            share_weights(base, runtime.weights(), config.model)
        except NotShareable as error:  # the GPU was divided for one base, so there is no room for two
            asked = shown(config.rollouts.vllm.share_weights)
            raise ConfigError(f"rollouts.vllm.share_weights={asked}: {error}; set it to false.") from error
    return runtime, base


def make_engine(
    config: RunConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, runtime: VLLMRuntime | None = None
) -> Engine:
    """Return the engine. It loads the policy's weights when it first generates.

    Args:
        runtime: vLLM in this process, already started, if that is the engine.
    """
    if config.rollouts.engine == "hf":
        return HFEngine(policy, tokenizer, config.rollouts.engine_batch)
    if config.rollouts.engine == "vllm_server":
        assert isinstance(policy, AdapterPolicy)  # the configuration check refuses anything else
        folder = Path(mkdtemp(prefix="pmd-adapters-", dir=config.rollouts.server.adapter_dir))
        # Servers run in other directories, so the path must be absolute.
        return VLLMServerEngine(policy, tokenizer, config.rollouts.server, folder.absolute())
    assert runtime is not None
    return VLLMEngine(policy, tokenizer, runtime)


def engine_settings(
    config: RunConfig, max_positions: int, share: GpuShare, cache_dir: Path | None = None
) -> EngineSettings:
    """Return the settings to start vLLM with.

    Args:
        max_positions: the model's own limit on sequence length.
        cache_dir: where vLLM keeps what it compiles; None is vLLM's own folder.
    """
    vllm, uses_adapters = config.rollouts.vllm, config.model.finetune != "full"
    return EngineSettings(
        model=resolve_model_path(config.model.path),
        dtype=config.model.dtype,
        max_model_len=vllm.max_model_len or min(max_positions, config.longest_sequence),
        max_num_seqs=vllm.max_num_seqs,
        memory_fraction=share.memory_fraction,
        kv_cache_memory_bytes=vllm.kv_cache_memory_bytes,
        block_size=vllm.block_size,
        enforce_eager=vllm.enforce_eager,
        quantization=vllm.quantization,
        sleep=share.sleeps,
        shares_weights=share.shares_weights,
        request_seeds=vllm.request_seeds,
        num_adapters=(2 if config.teacher.has_own_weights else 1) if uses_adapters else 0,
        lora_rank=config.model.lora_rank,
        seed=config.seed_everything,
        on_gpu=torch.cuda.is_available(),
        trust_remote_code=config.model.trust_remote_code,
        stall_s=vllm.stall_s,
        cache_dir=cache_dir,
        of_rank=dist.is_initialized(),
    )
