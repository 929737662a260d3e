from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pmd.bootstrap.random_model import make_random_model
from pmd.engines.vllm_runtime import EngineSettings, VLLMRuntime


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="session")
def only_runtime(checkpoint) -> Iterator[VLLMRuntime]:
    """The one vLLM of this process; blocks of 32 tokens, so that short prompts are cached, too."""
    settings = EngineSettings(
        model=str(checkpoint), dtype="float32", max_model_len=512, max_num_seqs=32, memory_fraction=0.5,
        kv_cache_memory_bytes=32 << 20, block_size=32, enforce_eager=True, quantization="none", sleep=True,
        num_adapters=2, lora_rank=4, seed=0, on_gpu=False, stall_s=600.0,
    )  # fmt: skip
    started = VLLMRuntime(settings)
    yield started
    started.close()


@pytest.fixture
def runtime(only_runtime, checkpoint) -> VLLMRuntime:
    """The same vLLM with the checkpoint's own weights and an empty cache, whatever another test left in it."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied in the file, a copy of its own in vLLM
    only_runtime.load_weights(weights.items())
    only_runtime.reset_cache()
    return only_runtime
