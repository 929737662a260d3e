"""Trainer and vLLM on one base, on a CPU: test_vllm_sharing.py runs this file as a script.

python sharing.py CHECKPOINT

vLLM's CPU build normally repacks its matrices and drops the originals. Told that the library for it is missing, it
computes with plain matrices, as on a GPU.
"""

import sys
from contextlib import nullcontext

import torch
import vllm._custom_ops
from vllm_checkpoints import disturb

from pmd.config.schema import ModelConfig, RolloutsConfig, RunConfig, TeacherConfig, VLLMConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.make import GpuShare, make_engine, start_vllm
from pmd.engines.parity import ParityCheck
from pmd.policy import make_policy
from pmd.pretrained import load_tokenizer

PROMPTS = [tuple(range(1, 4)), tuple(range(5, 45)), tuple(range(50, 147))]


def main(checkpoint: str) -> None:
    vllm._custom_ops._supports_onednn = False
    cpu = VLLMConfig(
        kv_cache_memory_bytes=32 << 20, block_size=32, max_num_seqs=16, parity_completions=len(PROMPTS),
        parity_tokens=8, parity_bound=1e-4, max_model_len=512, share_weights=True, request_seeds=False,
    )  # fmt: skip
    run = RunConfig(
        model=ModelConfig(path=checkpoint, finetune="lora", lora_rank=4, prompts="chat"),
        teacher=TeacherConfig(kind="ema"), rollouts=RolloutsConfig(engine="vllm", vllm=cpu),
    )  # fmt: skip
    runtime, base = start_vllm(run, GpuShare(None, shares_weights=True, sleeps=False))
    held = {tensor.untyped_storage().data_ptr() for tensor in runtime.weights().tensors.values()}
    own = [parameter for parameter in base.parameters() if parameter.untyped_storage().data_ptr() not in held]
    assert not own, "the trainer has weights of its own"
    assert not any(parameter.is_inference() for parameter in base.parameters())
    policy, tokenizer = make_policy(base, run.model, run.teacher), load_tokenizer(run.model)
    engine = make_engine(run, policy, tokenizer, runtime)
    check = ParityCheck(engine, policy, PROMPTS, cpu, tokenizer.pad_token_id)
    for version in range(4):
        disturb(policy, 0.3, seed=version)
        before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
        engine.sync(version)
        gaps = check.measure(nullcontext())
        assert 0 < gaps["parity/max"] <= 1e-4, gaps
        assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
        learn(policy)
        policy.after_rollout_batch()  # the teacher is an adapter of its own, on the same base
    # From one stream: two requests with the same prompt and seed differ, and the same call gives the same again.
    requests = [Request(PROMPTS[0], 3)] * 4
    first, again = (dict(engine.generate(requests, Sampling(1.0, 16))) for _ in range(2))
    assert first == again
    assert len({completion.token_ids for completion in first.values()}) == len(requests)
    # The reference policy and the teacher generate as well, each with its own weights.
    greedy = {
        role: dict(engine.generate(requests[:1], Sampling(0.0, 16), role))[0].logprobs
        for role in ("student", "teacher", "reference")
    }
    assert len(set(greedy.values())) == 3
    engine.close()
    print("one base")


def learn(policy) -> None:
    """Backpropagate through the base that vLLM computes with."""
    with policy.weights("student") as model:
        ids = torch.arange(1, 30)[None]
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters() if p.requires_grad)
    policy.zero_grad()


if __name__ == "__main__":
    main(sys.argv[1])
