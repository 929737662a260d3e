"""Generates completions with vLLM in this process, which shares the trainer's base or holds a copy of the weights.

An adapter is handed over in memory, never merged into the base; with full fine-tuning all weights are reloaded. The
prefix cache is emptied after every weight change; otherwise attention would use keys and values from the old weights.
"""

import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pmd.engines.base import Request, Sampling
from pmd.engines.hf import TextDecoder
from pmd.engines.vllm_runtime import RawCompletion, VLLMRuntime
from pmd.errors import EngineError
from pmd.policy import AdapterPolicy, Policy
from pmd.pretrained import stop_ids
from pmd.types import Completion, Role

MAX_TRIES = 3  # for a request that vLLM returns unfinished


class VLLMEngine:
    """Generates with vLLM; a lock keeps `sync` from changing them in the middle of a batch."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, runtime: VLLMRuntime):
        self.policy, self.tokenizer, self.runtime = policy, tokenizer, runtime
        self.policy_version = 0
        with policy.weights("student") as model:
            self.stop_ids = tuple(stop_ids(model, tokenizer))
        self.decode = TextDecoder(tokenizer, self.stop_ids)
        # Full fine-tuning: the role whose weights vLLM holds. LoRA: `student` once its adapter has been loaded.
        self._loaded: Role | None = None
        self._lock = threading.RLock()
        self._adapters = tempfile.TemporaryDirectory(prefix="pmd-adapters-")  # their settings, without weights
        if isinstance(policy, AdapterPolicy):
            for role, settings in policy.peft_model.peft_config.items():
                settings.save_pretrained(str(Path(self._adapters.name) / role))

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, role: Role = "student"
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (position, completion) as completions finish, while vLLM works on the others."""
        self._check_lengths(requests, sampling)
        pending = dict(enumerate(requests))
        with self._lock:
            self.wake()
            adapter = self._prepare(self.policy.resolve(role))
            for _ in range(MAX_TRIES):
                for raw in self.runtime.generate(list(pending.items()), sampling, self.stop_ids, adapter):
                    if raw.finish_reason in ("stop", "length") and raw.token_ids:
                        decode = partial(self.decode, prompt_ids=requests[raw.position].prompt_ids)
                        completion = to_completion(raw, sampling, decode, self.stop_ids, self.policy_version)
                        yield raw.position, completion
                        del pending[raw.position]
                if not pending:
                    return
        raise EngineError(
            f"vLLM left {len(pending)} of {len(requests)} completions unfinished {MAX_TRIES} times, the first of them "
            f"request {min(pending)}; they were discarded. Lower rollouts.vllm.max_num_seqs."
        )

    def sync(self, policy_version: int) -> None:
        """Load the student's current weights."""
        with self._lock:
            self.wake()
            self.policy_version = policy_version
            self._load("student")

    def sleep(self) -> None:
        """Free the GPU for training."""
        with self._lock:
            self.runtime.sleep()

    def wake(self) -> None:
        """Take back the GPU, with an empty KV cache."""
        with self._lock:
            self.runtime.wake()

    def close(self) -> None:
        """Shut vLLM down and remove the adapters' folder."""
        self.runtime.close()
        self._adapters.cleanup()

    def _prepare(self, role: Role) -> Path | None:
        """Load the weights of `role` if vLLM does not hold them; return its adapter, or None for the base model."""
        uses_adapters = isinstance(self.policy, AdapterPolicy)
        if uses_adapters and role == "reference":
            return None
        if role == "teacher" or self._loaded != role:  # a teacher's own weights may have changed since
            self._load(role)
        return self.adapter_folder(role) if uses_adapters else None

    def _load(self, role: Role) -> None:
        if isinstance(self.policy, AdapterPolicy):
            self.runtime.load_adapter(self.adapter_folder(role), adapter_weights(self.policy, role))
            self._loaded = "student" if role == "student" else self._loaded
        else:
            with self.policy.weights(role) as model:
                if model is None:
                    raise EngineError(f"role={role}: this run keeps no such weights; use reflection.by=student.")
                self.runtime.load_weights(self.policy.whole_weights(model))
            self._loaded = role
        self.runtime.reset_cache()

    def adapter_folder(self, role: Role) -> Path:
        """Return the folder that stands for the adapter of `role`."""
        return Path(self._adapters.name) / role

    def _check_lengths(self, requests: Sequence[Request], sampling: Sampling) -> None:
        limit = self.runtime.settings.max_model_len
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest + sampling.max_new_tokens > limit:
            raise EngineError(
                f"a prompt of {longest} tokens with {sampling.max_new_tokens} new ones exceeds "
                f"rollouts.vllm.max_model_len={limit}; raise it, or shorten prompts or completions."
            )


def to_completion(
    raw: RawCompletion,
    sampling: Sampling,
    decode: Callable[[Sequence[int]], str],
    stop_ids: Sequence[int],
    policy_version: int,
) -> Completion:
    """Check what vLLM returned and decode its text.

    Raises:
        EngineError: it is empty, was cut short, or has log-probs that are nan or infinite.
    """
    ids, logprobs = raw.token_ids, raw.logprobs
    if not ids or len(ids) != len(logprobs):
        raise EngineError(f"request {raw.position} came back with {len(ids)} tokens and {len(logprobs)} log-probs.")
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise EngineError(
            f"request {raw.position}: log-prob nan or inf under policy version {policy_version}; the weights have "
            "diverged: resume from an earlier checkpoint with a lower optimizer.lr."
        )
    finish_reason = "stop" if ids[-1] in stop_ids else "length"
    if finish_reason == "length" and len(ids) != sampling.max_new_tokens:
        raise EngineError(
            f"request {raw.position} was cut at {len(ids)} of {sampling.max_new_tokens} tokens; "
            "raise rollouts.vllm.max_model_len."
        )
    return Completion(ids, logprobs, decode(ids), finish_reason, policy_version)


def adapter_weights(policy: AdapterPolicy, role: Role) -> dict[str, Tensor]:
    """Return the adapter of `role` under PEFT's names."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(policy.peft_model, adapter_name=role, save_embedding_layers=False)


def save_adapter(policy: AdapterPolicy, role: Role, folder: Path) -> None:
    """Write the adapter of `role` to `folder`/role, in PEFT's format."""
    policy.peft_model.save_pretrained(str(folder), selected_adapters=[role], save_embedding_layers=False)
