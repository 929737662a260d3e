"""vLLM in this process as the rollout engine.

Enters: requests, and the policy whose weights it takes over in `sync`. Leaves: completions under a policy version. An
adapter is handed over as it is, never merged into the base; with full fine-tuning all weights are reloaded. The prefix
cache is emptied after every change of weights, or attention would read keys and values of earlier ones.
"""

import math
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from pmd.engines.base import Request, Sampling
from pmd.engines.vllm_runtime import Generation, VLLMRuntime
from pmd.errors import EngineError
from pmd.policy import AdapterPolicy, Policy
from pmd.pretrained import stop_ids
from pmd.types import Completion, Role

MAX_TRIES = 3  # of a request that vLLM gave back unfinished


class VLLMEngine:
    """Generates with a copy of the weights; the lock keeps a sync out of a batch that another thread generates."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, runtime: VLLMRuntime):
        self.policy, self.tokenizer, self.runtime = policy, tokenizer, runtime
        self.policy_version = 0
        with policy.weights("student") as model:
            self.stop_ids = tuple(stop_ids(model, tokenizer))
        self._holds: Role | None = None  # full fine-tuning: whose weights vLLM has; LoRA: `student` once it was pushed
        self._lock = threading.RLock()
        self._adapters = tempfile.TemporaryDirectory(prefix="pmd-adapters-")

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, role: Role = "student"
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (position, completion) as completions finish, while vLLM still works on the others."""
        self._check_lengths(requests, sampling)
        pending = dict(enumerate(requests))
        with self._lock:
            self.wake()
            adapter = self._prepare(self.policy.resolve(role))
            for _ in range(MAX_TRIES):
                for generation in self.runtime.generate(list(pending.items()), sampling, self.stop_ids, adapter):
                    if generation.finish_reason in ("stop", "length") and generation.token_ids:
                        completion = to_completion(
                            generation, sampling, self.tokenizer, self.stop_ids, self.policy_version
                        )
                        yield generation.key, completion
                        del pending[generation.key]
                if not pending:
                    return
        raise EngineError(
            f"vLLM gave up on {len(pending)} of {len(requests)} completions {MAX_TRIES} times, first on request "
            f"{min(pending)}; nothing of them is used. Lower rollouts.vllm.max_num_seqs."
        )

    def sync(self, policy_version: int) -> None:
        """Take over the student's weights."""
        with self._lock:
            self.wake()
            self.policy_version = policy_version
            self._push("student")

    def sleep(self) -> None:
        """Free the GPU for training."""
        with self._lock:
            self.runtime.sleep()

    def wake(self) -> None:
        """Take the GPU back; the KV cache is new, so nothing stale is in it."""
        with self._lock:
            self.runtime.wake()

    def close(self) -> None:
        """End vLLM and remove the adapter files."""
        self.runtime.close()
        self._adapters.cleanup()

    def _prepare(self, role: Role) -> Path | None:
        """Make vLLM hold the weights of `role`; return its adapter, None for the base."""
        with_adapters = isinstance(self.policy, AdapterPolicy)
        if with_adapters and role == "reference":
            return None
        if role == "teacher" or self._holds != role:  # a teacher with weights of its own may have moved
            self._push(role)
        return self.adapter_folder(role) if with_adapters else None

    def _push(self, role: Role) -> None:
        if isinstance(self.policy, AdapterPolicy):
            save_adapter(self.policy, role, Path(self._adapters.name))
            self.runtime.load_adapter(self.adapter_folder(role))
            self._holds = "student" if role == "student" else self._holds
        else:
            with self.policy.weights(role) as model:
                if model is None:
                    raise EngineError(f"role={role}: this run keeps no such weights; use reflection.by=student.")
                self.runtime.load_weights(model.state_dict().items())
            self._holds = role
        self.runtime.reset_cache()

    def adapter_folder(self, role: Role) -> Path:
        """Return where the adapter of `role` is kept."""
        return Path(self._adapters.name) / role

    def _check_lengths(self, requests: Sequence[Request], sampling: Sampling) -> None:
        most = self.runtime.settings.max_model_len
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest + sampling.max_new_tokens > most:
            raise EngineError(
                f"a prompt of {longest} tokens with {sampling.max_new_tokens} new ones exceeds "
                f"rollouts.vllm.max_model_len={most}; raise it, or shorten prompts or completions."
            )


def to_completion(
    generation: Generation,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    policy_version: int,
) -> Completion:
    """Return the completion of a finished generation.

    Raises:
        EngineError: it is empty, was cut short, or has log-probs that are no numbers.
    """
    ids, logprobs = generation.token_ids, generation.logprobs
    if not ids or len(ids) != len(logprobs):
        raise EngineError(f"request {generation.key} came back with {len(ids)} tokens and {len(logprobs)} log-probs.")
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise EngineError(
            f"request {generation.key}: log-prob nan or inf under policy version {policy_version}; the weights have "
            "diverged: resume from an earlier checkpoint with a lower optimizer.lr."
        )
    finish_reason = "stop" if ids[-1] in stop_ids else "length"
    if finish_reason == "length" and len(ids) != sampling.max_new_tokens:
        raise EngineError(
            f"request {generation.key} was cut at {len(ids)} of {sampling.max_new_tokens} tokens; "
            "raise rollouts.vllm.max_model_len."
        )
    text = cast(str, tokenizer.decode(list(ids), skip_special_tokens=True))
    return Completion(ids, logprobs, text, finish_reason, policy_version)


def save_adapter(policy: AdapterPolicy, role: Role, folder: Path) -> None:
    """Write the adapter of `role` to `folder`/role, as PEFT does."""
    policy.peft_model.save_pretrained(str(folder), selected_adapters=[role], save_embedding_layers=False)
