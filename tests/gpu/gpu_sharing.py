"""Trainer and vLLM on one base on a GPU: test_gpu_engine.py runs this file as a script.

python gpu_sharing.py CHECKPOINT        (a folder that does not exist is filled with a tiny model)
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from gpu_model import make_gpu_model

from pmd.config.schema import ModelConfig, RolloutsConfig, RunConfig, TeacherConfig, VLLMConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.make import GpuShare, make_engine, start_vllm
from pmd.engines.parity import ParityCheck
from pmd.policy import make_policy
from pmd.pretrained import load_base, load_tokenizer

PROMPTS = [tuple(range(1, 4)), tuple(range(5, 45)), tuple(range(50, 147))]
CACHE_BYTES = 1 << 30


def main(checkpoint: str) -> None:
    if not Path(checkpoint).exists():
        make_gpu_model(Path(checkpoint))
    vllm = VLLMConfig(
        kv_cache_memory_bytes=CACHE_BYTES, enforce_eager=True, max_num_seqs=16, max_model_len=512, parity_bound=0.05,
        parity_completions=len(PROMPTS), parity_tokens=16,
    )  # fmt: skip
    run = RunConfig(
        model=ModelConfig(path=checkpoint, dtype="bfloat16", finetune="lora", lora_rank=8, prompts="chat"),
        teacher=TeacherConfig(), rollouts=RolloutsConfig(engine="vllm", vllm=vllm),
    )  # fmt: skip
    own = load_base(run.model).state_dict()
    runtime, base = start_vllm(run, GpuShare(0.1, shares_weights=True, sleeps=True))
    assert all(torch.equal(weight.cpu(), own[name].cpu()) for name, weight in base.state_dict().items())
    held = {tensor.untyped_storage().data_ptr() for tensor in runtime.weights().tensors.values()}
    assert all(parameter.untyped_storage().data_ptr() in held for parameter in base.parameters())
    policy, tokenizer = make_policy(base, run.model, run.teacher), load_tokenizer(run.model)
    engine = make_engine(run, policy, tokenizer, runtime)
    check = ParityCheck(engine, policy, PROMPTS, vllm, tokenizer.pad_token_id)
    draw, prompts = torch.Generator("cuda").manual_seed(0), [Request(prompt, 0) for prompt in PROMPTS]
    for version in range(4):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter += 0.03 * torch.randn(parameter.shape, generator=draw, device="cuda")
        engine.sync(version)
        print(check.measure(nullcontext()))
        greedy = dict(engine.generate(prompts, Sampling(0.0, 16)))
        awake = torch.cuda.mem_get_info()[0]
        engine.sleep()
        freed = torch.cuda.mem_get_info()[0] - awake
        assert freed >= 0.9 * CACHE_BYTES, f"sleep freed {freed} of {CACHE_BYTES} bytes"
        with policy.weights("student") as model:  # trains while vLLM sleeps, on the weights that stayed
            ids = torch.arange(1, 200, device="cuda")[None]
            model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
        policy.zero_grad()
        engine.wake()
        again = dict(engine.generate(prompts, Sampling(0.0, 16)))
        assert {p: c.token_ids for p, c in again.items()} == {p: c.token_ids for p, c in greedy.items()}
    assert all(torch.equal(weight.cpu(), own[name].cpu()) for name, weight in base_weights(policy).items())
    engine.close()
    print("one base")


def base_weights(policy) -> dict[str, torch.Tensor]:
    """Return the base's weights under their names in the checkpoint."""
    named = policy.peft_model.get_base_model().state_dict()
    return {name.replace(".base_layer.", "."): weight for name, weight in named.items() if "lora_" not in name}


if __name__ == "__main__":
    main(sys.argv[1])
