"""Measures the engine alone: tokens per second beside vLLM called directly, and the seconds of sync, sleep and wake."""

import statistics
import time
from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from pmd.engines.base import Request, Sampling
from pmd.engines.vllm import VLLMEngine


def measure_engine(engine: VLLMEngine, batches: Sequence[Sequence[Request]], sampling: Sampling) -> dict[str, float]:
    """Generate each batch through our engine and through vLLM's own `LLM.generate`, in turns.

    Both have the same adapter, seeds and log-probs. Unless it is the only one, the first batch warms up. Rates are
    medians, in tokens per second.
    """
    rates: dict[str, list[float]] = {"ours": [], "direct": []}
    ways: dict[str, Callable[[Sequence[Request]], int]] = {
        "ours": lambda requests: sum(len(c.token_ids) for _, c in engine.generate(requests, sampling)),
        "direct": lambda requests: _generate_directly(engine, requests, sampling),
    }
    engine.sync(engine.policy_version)
    for number, requests in enumerate(batches):
        for way in ("ours", "direct") if number % 2 else ("direct", "ours"):
            engine.runtime.reset_cache()
            started = time.perf_counter()
            count = ways[way](requests)
            if number or len(batches) == 1:
                rates[way].append(count / (time.perf_counter() - started))
    ours, direct = (statistics.median(rates[way]) for way in ("ours", "direct"))
    return {"tokens_per_s": ours, "vllm_tokens_per_s": direct, "share_of_vllm": ours / direct} | measure_turns(engine)


def measure_turns(engine: VLLMEngine, rounds: int = 2) -> dict[str, float]:
    """Return the seconds of sleep, wake and sync, of the last of `rounds`; earlier ones warm up."""
    found: dict[str, float] = {}
    for _ in range(rounds):
        for name, act in (
            ("sleep_s", engine.sleep),
            ("wake_s", engine.wake),
            ("sync_s", lambda: engine.sync(engine.policy_version)),
        ):
            _wait_for_gpu()
            started = time.perf_counter()
            act()
            _wait_for_gpu()
            found[name] = time.perf_counter() - started
    return found


def _generate_directly(engine: VLLMEngine, requests: Sequence[Request], sampling: Sampling) -> int:
    """Call vLLM's own `LLM.generate` and read ids and log-probs; return the number of tokens."""
    settings, vllm = engine.runtime.settings, import_module("vllm")
    params = [
        vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=request.seed if settings.request_seeds else None,
            logprobs=0,
            detokenize=False,
            stop_token_ids=list(engine.stop_ids),
            ignore_eos=True,
        )
        for request in requests
    ]
    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
    lora = None
    if settings.num_adapters:
        folder = str(engine.adapter_folder("student"))
        lora = import_module("vllm.lora.request").LoRARequest("student", 1, folder)
    outputs = engine.runtime.llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    logprobs = [
        [row[token].logprob for row, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)]
        for o in outputs
    ]
    return sum(map(len, logprobs))


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
