"""vLLM's worker on a GPU, with the start timed by part, and with weights that sleeping leaves where they are.

vLLM imports the workers by name. This file imports vllm, so nothing else imports it at the start.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
from vllm.v1.worker.gpu_worker import Worker  # pyright: ignore[reportMissingImports]


class TimedWorker(Worker):
    """vLLM's own worker; `seconds` says how long each part of its start took."""

    def __init__(self, *arguments: Any, **named: Any):  # they differ between versions of vLLM
        super().__init__(*arguments, **named)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - started

    def load_model(self, *arguments: Any, **named: Any) -> Any:
        """Load the weights."""
        with self._timed("weights"):
            return super().load_model(*arguments, **named)

    def determine_available_memory(self) -> int:
        """Compile the model, and run it on the longest input to see how much memory is left."""
        with self._timed("compilation and profile"):
            return super().determine_available_memory()

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the KV cache."""
        with self._timed("KV cache"):
            super().initialize_from_config(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        """Capture CUDA graphs."""
        with self._timed("CUDA graphs"):
            return super().compile_or_warm_up_model()


class SharingWorker(TimedWorker):
    """Keeps its weights out of the memory that sleeping takes away, because the trainer computes with them."""

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        return nullcontext() if tag == "weights" else super()._maybe_get_memory_pool_context(tag)


class AdaptersInMemory:
    """Takes the place of the class through which vLLM reads adapters from files."""

    def __init__(self, handed_over: Mapping[str, Mapping[str, Tensor]]):
        self.handed_over = handed_over

    def from_local_checkpoint(
        self, lora_dir: str, expected_lora_modules: set[str], *, peft_helper: Any, lora_model_id: int, **named: Any
    ) -> LoRAModel:
        """Return the adapter that was handed over for `lora_dir`; a copy, since vLLM scales it in place."""
        weights, dtype = self.handed_over[lora_dir], named["dtype"]
        return LoRAModel.from_lora_tensors(
            lora_model_id=lora_model_id,
            tensors={name: weight.detach().to(dtype, copy=True) for name, weight in weights.items()},
            peft_helper=peft_helper,
            device=str(next(iter(weights.values())).device),
            dtype=dtype,
            weights_mapper=named.get("weights_mapper"),
        )


def read_adapters_from(handed_over: Mapping[str, Mapping[str, Tensor]], llm: Any) -> None:
    """Make vLLM read adapters from `handed_over`, by folder, instead of from the folder itself."""

    def replace(worker: Any) -> None:
        worker.model_runner.lora_manager._lora_model_cls = AdaptersInMemory(handed_over)

    llm.collective_rpc(replace)
