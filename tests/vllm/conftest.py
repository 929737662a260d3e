from collections.abc import Iterator
from pathlib import Path

import pytest
from alone import settings
from safetensors.torch import load_file

from pmd.bootstrap.random_model import make_random_model
from pmd.engines.vllm_runtime import VLLMRuntime


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="session")
def only_runtime(checkpoint) -> Iterator[VLLMRuntime]:
    """The only vLLM engine of this process; blocks of 32 tokens, so that even short prompts are cached."""
    started = VLLMRuntime(settings(str(checkpoint), 32 << 20, num_adapters=2))
    yield started
    started.close()


@pytest.fixture
def runtime(only_runtime, checkpoint) -> VLLMRuntime:
    """The same engine with the checkpoint's weights and an empty cache, whatever another test left behind."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied in the file, a separate copy in vLLM
    only_runtime.load_weights(weights.items())
    only_runtime.reset_cache()
    return only_runtime
