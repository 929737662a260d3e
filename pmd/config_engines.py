"""Configuration of the rollout engines that hold weights of their own: sections `rollouts.vllm` and below."""

from dataclasses import dataclass
from typing import Literal

from pmd.config_option import option


@dataclass
class VLLMConfig:
    """vLLM, in this process or as a server: its memory, its limits, and how far its log-probs may differ."""

    memory_fraction: float | None = option(
        None,
        "Share of the GPU's memory that vLLM may fill while awake; null is what the trainer leaves (pmd doctor).",
        above=0, most=0.98,
    )  # fmt: skip
    kv_cache_memory_bytes: int | None = option(
        None, "Size of the KV cache; null takes what memory_fraction leaves. Needed on a CPU.", least=1 << 20
    )
    max_num_seqs: int = option(256, "Completions generated at once.", least=1)
    max_model_len: int | None = option(
        None, "Longest prompt with its completion; null is the longest prompt and completion that the sections allow.",
        least=16,
    )  # fmt: skip
    block_size: int | None = option(None, "Tokens in a block of the KV cache; null leaves it to vLLM.", least=8)
    enforce_eager: bool = option(False, "No CUDA graphs: slower, starts sooner, less memory.")
    quantization: Literal["none", "fp8", "bitsandbytes"] = option(
        "none", "vLLM's own quantisation of the frozen base; adapters go on top of it."
    )
    sleep: bool = option(True, "Free the GPU while training: weights go to main memory, the KV cache is dropped.")
    parity_completions: int = option(4, "Completions scored by the trainer after each sync; 0 turns it off.", least=0)
    parity_tokens: int = option(32, "Tokens of each of them.", least=1)
    parity_bound: float = option(
        0.1, "Stop where engine and trainer differ by more than this on average over their tokens, in nats.", above=0
    )
    stall_s: float = option(600.0, "Stop where no token comes for this long; the pending request is named.", above=0)


@dataclass
class ServerConfig:
    """vLLM servers that generate, started by `python -m pmd serve`; used by `rollouts.engine: vllm_server`."""

    urls: list[str] = option(["http://127.0.0.1:8000"], "Where the servers listen.")
    adapter_dir: str | None = option(
        None, "Folder that this process and the servers see under the same path; null is the system's temporary folder."
    )
    concurrency: int = option(64, "Requests in flight at each server.", least=1)
    retries: int = option(5, "How often a request is sent again before the run stops.", least=0)
    backoff_s: float = option(1.0, "First pause before a server that failed is asked again; pauses double.", above=0)
    recovery_s: float = option(600.0, "How long all servers may be away before the run stops.", above=0)
    request_timeout_s: float = option(1800.0, "A request that is out for longer is sent again.", above=0)
