"""A vLLM of its own in a process of its own, as only one lives in a process: run as a script by test_vllm_failures.py.

python alone.py CHECKPOINT CASE
"""

import ctypes
import json
import sys

from pmd.engines.base import Request, Sampling
from pmd.engines.vllm_runtime import EngineSettings, Generation, VLLMRuntime
from pmd.errors import EngineError

STOP_IDS = (258,)
SAMPLING = Sampling(1.0, 400)
#: Each reads 60 to 91 tokens and makes up to 400: a cache of 64 blocks of 32 tokens holds four of them.
REQUESTS = [Request(tuple(range(1, 61 + number)), number) for number in range(32)]


def settings(checkpoint: str, cache_bytes: int, stall_s: float = 600.0) -> EngineSettings:
    return EngineSettings(
        model=checkpoint, dtype="float32", max_model_len=512, max_num_seqs=32, memory_fraction=0.5,
        kv_cache_memory_bytes=cache_bytes, block_size=32, enforce_eager=True, quantization="none", sleep=True,
        num_adapters=0, lora_rank=4, seed=0, on_gpu=False, stall_s=stall_s,
    )  # fmt: skip


def generate(runtime: VLLMRuntime) -> dict[int, Generation]:
    found = {}
    for generation in runtime.generate(enumerate(REQUESTS), SAMPLING, STOP_IDS, adapter=None):
        assert generation.key not in found
        found[generation.key] = generation
    return found


def preempted(checkpoint: str) -> None:
    """Print what a cache gives that is too small for all, and how often vLLM sent a request back to wait."""
    runtime = VLLMRuntime(settings(checkpoint, 1 << 20))
    scheduler, sent_back = runtime.llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request

    def counted(*arguments, **named):
        sent_back.append(1)
        return preempt(*arguments, **named)

    scheduler._preempt_request = counted
    found = generate(runtime)
    content = {key: (g.token_ids, g.logprobs, g.finish_reason) for key, g in found.items()}
    print(json.dumps({"sent_back": len(sent_back), "found": content}))


def paused(checkpoint: str) -> None:
    """Let vLLM's scheduler stand still: its steps return, but no token comes."""
    runtime = VLLMRuntime(settings(checkpoint, 32 << 20, stall_s=2.0))
    core = runtime.llm.llm_engine.engine_core.engine_core
    core.pause_scheduler(mode="keep")
    try:
        generate(runtime)
    except EngineError as error:
        print(error)
    core.resume_scheduler()
    print(len(generate(runtime)))


def hung(checkpoint: str) -> None:
    """Let a step of vLLM never return, in C, where no exception reaches it."""
    runtime = VLLMRuntime(settings(checkpoint, 32 << 20, stall_s=2.0))
    runtime.llm.llm_engine.step = lambda: ctypes.CDLL(None).sleep(600)
    generate(runtime)


def died(checkpoint: str) -> None:
    """Let a step of vLLM fail as a full GPU does."""
    runtime = VLLMRuntime(settings(checkpoint, 32 << 20))
    step, steps = runtime.llm.llm_engine.step, []

    def failing():
        steps.append(1)
        if len(steps) > 20:
            raise MemoryError("CUDA out of memory")
        return step()

    runtime.llm.llm_engine.step = failing
    try:
        generate(runtime)
    except EngineError as error:
        print(error)


if __name__ == "__main__":
    {"preempted": preempted, "paused": paused, "hung": hung, "died": died}[sys.argv[2]](sys.argv[1])
