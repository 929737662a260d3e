"""Cases that need a vLLM engine of their own, and so a process: test_vllm_failures.py runs this file as a script.

python alone.py CHECKPOINT CASE
"""

import ctypes
import json
import sys

from pmd.engines.base import Request, Sampling
from pmd.engines.vllm_runtime import EngineSettings, RawCompletion, VLLMRuntime
from pmd.errors import EngineError

STOP_IDS = (258,)
SAMPLING = Sampling(1.0, 400)
#: Prompts of 60 to 91 tokens, up to 400 new ones: a cache of 64 blocks of 32 tokens holds four of them.
REQUESTS = [Request(tuple(range(1, 61 + number)), number) for number in range(32)]


def settings(checkpoint: str, cache_bytes: int, stall_s: float = 600.0, num_adapters: int = 0) -> EngineSettings:
    return EngineSettings(
        model=checkpoint, dtype="float32", max_model_len=512, max_num_seqs=32, memory_fraction=0.5,
        kv_cache_memory_bytes=cache_bytes, block_size=32, enforce_eager=True, quantization="none", sleep=True,
        shares_weights=False, request_seeds=True, num_adapters=num_adapters, lora_rank=4, seed=0, on_gpu=False,
        stall_s=stall_s,
    )  # fmt: skip


def generate(runtime: VLLMRuntime) -> dict[int, RawCompletion]:
    found = {}
    for raw in runtime.generate(enumerate(REQUESTS), SAMPLING, STOP_IDS, adapter=None):
        assert raw.position not in found
        found[raw.position] = raw
    return found


def preempted(checkpoint: str) -> None:
    """Generate with a cache too small for all requests; print the completions and the number of preemptions."""
    runtime = VLLMRuntime(settings(checkpoint, 1 << 20))
    scheduler, preemptions = runtime.llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request

    def counted(*arguments, **named):
        preemptions.append(1)
        return preempt(*arguments, **named)

    scheduler._preempt_request = counted
    found = generate(runtime)
    content = {position: (raw.token_ids, raw.logprobs, raw.finish_reason) for position, raw in found.items()}
    print(json.dumps({"preemptions": len(preemptions), "found": content}))


def paused(checkpoint: str) -> None:
    """Pause vLLM's scheduler: its steps return, but produce no token."""
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
    """Make a step of vLLM hang in C, where no exception reaches it."""
    runtime = VLLMRuntime(settings(checkpoint, 32 << 20, stall_s=2.0))
    runtime.llm.llm_engine.step = lambda: ctypes.CDLL(None).sleep(600)
    generate(runtime)


def died(checkpoint: str) -> None:
    """Make a step of vLLM fail as on a full GPU."""
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
