"""Checks that engine and trainer agree: after each sync, both score a few fresh completions.

The prompts are the same every time, so a prefix cache left over from earlier weights shows up as well.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from pmd.config.schema import VLLMConfig
from pmd.engines.base import Engine, Request, Sampling
from pmd.errors import EngineError
from pmd.policy import Policy
from pmd.ranks import Ranks
from pmd.scoring import PolicyScorer
from pmd.seeds import derive_seed
from pmd.types import Completion

MAX_TOKENS = 16_384  # of a prompt with its completion; all of them are scored in one batch


class ParityCheck:
    """Compares the trainer's log-probs of `config.parity_completions` completions with the engine's."""

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        config: VLLMConfig,
        pad_id: int,
        ranks: Ranks | None = None,
    ):
        """Prepare to compare. Of several ranks, those with an engine sample; all score, as they may share weights."""
        self.engine, self.config, self.ranks = engine, config, ranks
        self.scorer = PolicyScorer(policy, pad_id, config.parity_completions * MAX_TOKENS)
        count = config.parity_completions
        self.prompts = [tuple(prompts[i % len(prompts)]) for i in range(count)] if prompts else []

    def measure(self, precision: AbstractContextManager[None]) -> dict[str, float]:
        """Return statistics of the absolute gap, in nats per token, of all engines.

        Args:
            precision: the trainer's forward context.

        Raises:
            EngineError: the mean gap exceeds `rollouts.vllm.parity_bound`.
        """
        started = time.perf_counter()
        pairs = self._pairs()
        with precision:
            scores = self.scorer([(prompt, completion.token_ids) for prompt, completion in pairs], "student")
        trainer_logprobs = torch.tensor([logprob for completion in scores for logprob in completion])
        engine_logprobs = torch.tensor([float(p) for _, c in pairs for p in c.logprobs if p is not None])
        own = (trainer_logprobs - engine_logprobs).abs()
        gap = own if self.ranks is None else torch.cat(self.ranks.all(own))
        p50, p99 = gap.quantile(torch.tensor([0.5, 0.99])).tolist()
        mean, largest = gap.mean().item(), gap.max().item()
        if not mean <= self.config.parity_bound:
            raise EngineError(self._diagnosis(mean, p99, largest))
        return {
            "parity/mean": mean,
            "parity/p50": p50,
            "parity/p99": p99,
            "parity/max": largest,
            "time/parity_s": time.perf_counter() - started,
        }

    def _pairs(self) -> list[tuple[tuple[int, ...], Completion]]:
        """Return prompts with the completions of this rank's engine, or of the first rank's if no other has one."""
        is_shared = self.ranks is not None and self.ranks.num_generating == 1
        return self.ranks.from_first(self._sample) if self.ranks is not None and is_shared else self._sample()

    def _sample(self) -> list[tuple[tuple[int, ...], Completion]]:
        version, sampling = self.engine.policy_version, Sampling(1.0, self.config.parity_tokens)
        requests = [Request(p, derive_seed("parity", version, i)) for i, p in enumerate(self.prompts)]
        completions = dict(self.engine.generate(requests, sampling))
        return [(request.prompt_ids, completions[i]) for i, request in enumerate(requests)]

    def _diagnosis(self, mean: float, p99: float, largest: float) -> str:
        return (
            f"engine and trainer differ by {mean:.4g} nats per token on average (99th percentile {p99:.4g}, maximum "
            f"{largest:.4g}) at policy version {self.engine.policy_version}; "
            f"rollouts.vllm.parity_bound={self.config.parity_bound}. Likely causes: the engine serves weights of an "
            "earlier version; keys and values cached under earlier weights were kept; model.dtype or "
            "rollouts.vllm.quantization differs from the trainer's precision; this version of vLLM computes the "
            "architecture differently. If precision explains the gap, raise the bound; nothing was trained on these "
            "completions."
        )
