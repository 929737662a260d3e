"""Starts the engine that `rollouts.engine` selects."""

from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import PreTrainedTokenizerBase

from pmd.config.schema import RunConfig
from pmd.engines.base import Engine
from pmd.engines.hf import HFEngine
from pmd.engines.server import VLLMServerEngine
from pmd.engines.vllm import VLLMEngine
from pmd.engines.vllm_runtime import EngineSettings, VLLMRuntime, check_version, exempt_from_compilation
from pmd.policy import AdapterPolicy, Policy
from pmd.pretrained import resolve_model_path


def check_engine(config: RunConfig) -> None:
    """Check that the selected engine can run here, before any weights load.

    Raises:
        ConfigError: vLLM is missing or its version is untested.
    """
    if config.rollouts.engine == "vllm":
        check_version()


def make_engine(
    config: RunConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, memory_fraction: float | None
) -> Engine:
    """Start the engine. It loads the policy's weights when it first generates.

    Args:
        memory_fraction: share of the GPU's memory that vLLM in this process may use; None for other engines.
    """
    if config.rollouts.engine == "hf":
        return HFEngine(policy, tokenizer, config.rollouts.engine_batch)
    if config.rollouts.engine == "vllm_server":
        assert isinstance(policy, AdapterPolicy)  # the configuration check refuses anything else
        folder = Path(mkdtemp(prefix="pmd-adapters-", dir=config.rollouts.server.adapter_dir))
        # Servers run in other directories, so the path must be absolute.
        return VLLMServerEngine(policy, tokenizer, config.rollouts.server, folder.absolute())
    with policy.weights("student") as model:
        max_positions = model.config.get_text_config().max_position_embeddings
    runtime = VLLMRuntime(engine_settings(config, max_positions, memory_fraction))
    exempt_from_compilation(policy)
    return VLLMEngine(policy, tokenizer, runtime)


def engine_settings(config: RunConfig, max_positions: int, memory_fraction: float | None) -> EngineSettings:
    """Return the settings to start vLLM with; `max_positions` is the model's own limit on sequence length."""
    vllm, uses_adapters = config.rollouts.vllm, config.model.finetune != "full"
    return EngineSettings(
        model=resolve_model_path(config.model.path),
        dtype=config.model.dtype,
        max_model_len=vllm.max_model_len or min(max_positions, config.longest_sequence),
        max_num_seqs=vllm.max_num_seqs,
        memory_fraction=memory_fraction,
        kv_cache_memory_bytes=vllm.kv_cache_memory_bytes,
        block_size=vllm.block_size,
        enforce_eager=vllm.enforce_eager,
        quantization=vllm.quantization,
        sleep=vllm.sleep,
        num_adapters=(2 if config.teacher.has_own_weights else 1) if uses_adapters else 0,
        lora_rank=config.model.lora_rank,
        seed=config.seed_everything,
        on_gpu=torch.cuda.is_available(),
        trust_remote_code=config.model.trust_remote_code,
        stall_s=vllm.stall_s,
    )
