"""Chooses gradient checkpointing and the size of micro-batches, where they are `auto`, by the memory that is free.

Recomputing costs up to a third of a step, and micro-batches beyond some thousands of tokens gain nothing. So the first
way that leaves room for `EFFICIENT_TOKENS`, and for the longest sequence, is taken: recompute nothing, every second
layer, every layer. Then micro-batches become as large as the prediction (gpu_memory.py) allows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pmd.config.schema import MICRO_BATCH_TOKENS, RunConfig
from pmd.planning.engine_memory import CUDA_CONTEXT_BYTES, CUDA_GRAPH_BYTES
from pmd.planning.gpu_memory import UNDIVIDED, Shape, Shards, max_micro_batch_tokens, predict, read_shape

#: From here on, larger matrix products are hardly more efficient.
EFFICIENT_TOKENS = 8192
#: The largest micro-batch that is chosen, and the step in which sizes are tried.
MAX_CHOSEN_TOKENS, TOKEN_STEP = 32768, 1024
#: Share of the free memory that a step may be predicted to need; the rest is for fragmentation and errors.
USED_SHARE = 0.88
#: What vLLM leaves to the trainer if it never sleeps and its own share is not set.
SHARE_BESIDE_VLLM = 0.5

Checkpointing = Literal["auto", "selective"] | bool
WORDS: dict[Checkpointing, str] = {
    False: "nothing recomputed", "selective": "every second layer recomputed", True: "every layer recomputed",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """What replaces `auto`, and what it is predicted to need, in bytes."""

    checkpointing: Checkpointing
    micro_batch_tokens: int
    predicted: float
    available: float

    def __str__(self) -> str:
        return (
            f"Micro-batches of up to {self.micro_batch_tokens:,} tokens, {WORDS[self.checkpointing]} in the backward "
            f"pass: a step is predicted to need {self.predicted / 1e9:.1f} of {self.available / 1e9:.1f} GB."
        )

    def applied(self, run: RunConfig) -> RunConfig:
        """Return the configuration with these values instead of `auto`."""
        model = replace(run.model, gradient_checkpointing=self.checkpointing)
        return replace(run, model=model, rollouts=replace(run.rollouts, micro_batch_tokens=self.micro_batch_tokens))


def choose(shape: Shape, run: RunConfig, available: float, shards: Shards = UNDIVIDED) -> MemoryChoice:
    """Return what `auto` means for a GPU with `available` free bytes; values that are set stay as they are.

    If nothing fits, everything is recomputed, and the longest sequence has a micro-batch of its own.

    Args:
        shards: how the ranks divide the weights.
    """
    choices = [_largest(shape, run, mode, available, shards) for mode in _modes(run)]
    return next((choice for choice in choices if choice is not None), _smallest(shape, run, available, shards))


def choose_here(run: RunConfig, shards: Shards = UNDIVIDED) -> tuple[RunConfig, str | None]:
    """Return the configuration without `auto` for this machine, and a line that says what was chosen on a GPU."""
    if not is_open(run):
        return run, None
    if not torch.cuda.is_available():
        return without_gpu(run), None
    choice = choose(read_shape(run.model), run, available_bytes(run, *torch.cuda.mem_get_info()), shards)
    return choice.applied(run), str(choice)


def is_open(run: RunConfig) -> bool:
    """Whether something is left to choose."""
    return "auto" in (run.model.gradient_checkpointing, run.rollouts.micro_batch_tokens)


def without_gpu(run: RunConfig) -> RunConfig:
    """Return the configuration with the values that `auto` has on a CPU."""
    tokens, mode = run.rollouts.micro_batch_tokens, run.model.gradient_checkpointing
    model = replace(run.model, gradient_checkpointing=False if mode == "auto" else mode)
    tokens = MICRO_BATCH_TOKENS if tokens == "auto" else tokens
    return replace(run, model=model, rollouts=replace(run.rollouts, micro_batch_tokens=tokens))


def available_bytes(run: RunConfig, free: float, total: float) -> float:
    """Return the memory that the trainer may use: what is free, without what vLLM holds while it trains."""
    left = free - CUDA_CONTEXT_BYTES
    if run.rollouts.engine != "vllm":
        return left
    if run.rollouts.vllm.sleep:
        return left - (0.0 if run.rollouts.vllm.enforce_eager else CUDA_GRAPH_BYTES)
    return left - (run.rollouts.vllm.memory_fraction or SHARE_BESIDE_VLLM) * total


def _modes(run: RunConfig) -> list[Checkpointing]:
    mode = run.model.gradient_checkpointing
    return [False, "selective", True] if mode == "auto" else [mode]


def _largest(
    shape: Shape, run: RunConfig, mode: Checkpointing, available: float, shards: Shards
) -> MemoryChoice | None:
    """Return the largest micro-batches that fit with this way of recomputing; None if they would be too small."""
    for tokens in _sizes(run):
        choice = _predicted(shape, run, mode, tokens, available, shards)
        if choice.predicted <= USED_SHARE * available:
            return choice
    return None


def _sizes(run: RunConfig) -> Iterator[int]:
    """Yield the sizes to try, the largest first: none that is inefficient, or too small for the longest sequence."""
    tokens = run.rollouts.micro_batch_tokens
    if tokens != "auto":
        yield tokens
        return
    longest, step = longest_sequence(run), max_micro_batch_tokens(_with_tokens(run, 1 << 40))
    largest = max(min(MAX_CHOSEN_TOKENS, step), longest)
    smallest = min(max(EFFICIENT_TOKENS, longest), largest)
    yield from range(largest, smallest, -TOKEN_STEP)
    yield smallest


def _smallest(shape: Shape, run: RunConfig, available: float, shards: Shards) -> MemoryChoice:
    tokens, mode = run.rollouts.micro_batch_tokens, _modes(run)[-1]
    return _predicted(shape, run, mode, longest_sequence(run) if tokens == "auto" else tokens, available, shards)


def _predicted(
    shape: Shape, run: RunConfig, mode: Checkpointing, tokens: int, available: float, shards: Shards
) -> MemoryChoice:
    tried = MemoryChoice(mode, tokens, 0.0, available).applied(run)
    largest = max_micro_batch_tokens(tried)
    parts = predict(shape, tried, largest, largest, "cuda", shards)
    return replace(MemoryChoice(mode, tokens, 0.0, available), predicted=sum(parts.values()))


def longest_sequence(run: RunConfig) -> int:
    """Return the tokens of the longest prompt with its completion that the configuration allows."""
    return max(run.rollouts.max_prompt_tokens, run.teacher.max_prompt_tokens) + run.rollouts.max_new_tokens


def _with_tokens(run: RunConfig, tokens: int) -> RunConfig:
    return replace(run, rollouts=replace(run.rollouts, micro_batch_tokens=tokens))
