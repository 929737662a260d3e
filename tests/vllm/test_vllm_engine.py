"""The real vLLM compared with the trainer: same tokens and log-probs, before and after every change of weights."""

from contextlib import nullcontext

import pytest
import torch
from vllm_checkpoints import disturb, make_random_policy

from pmd.config.schema import VLLMConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.hf import HFEngine
from pmd.engines.parity import ParityCheck
from pmd.engines.vllm import VLLMEngine
from pmd.errors import EngineError

pytestmark = pytest.mark.vllm
PROMPTS = [tuple(torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (3, 40, 97)]
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS * 2)]


def parity(engine: VLLMEngine, bound: float = 1e-4) -> ParityCheck:
    config = VLLMConfig(parity_completions=len(PROMPTS), parity_tokens=8, parity_bound=bound)
    return ParityCheck(engine, engine.policy, PROMPTS, config, pad_id=engine.tokenizer.pad_token_id)


def greedy(engine, role="student"):
    return dict(engine.generate(REQUESTS[:3], Sampling(0.0, 32), role))


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("role", ["student", "reference", "teacher"])
def test_same_greedy_tokens_and_logprobs_as_the_embedded_engine(runtime, checkpoint, finetune, role):
    policy, tokenizer = make_random_policy(checkpoint, finetune, kind="ema")
    ours, embedded = VLLMEngine(policy, tokenizer, runtime), HFEngine(policy, tokenizer, 8)
    theirs = greedy(embedded, role)
    for position, completion in greedy(ours, role).items():
        assert completion.token_ids == theirs[position].token_ids
        assert completion.text == theirs[position].text
        assert completion.finish_reason == theirs[position].finish_reason
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), torch.tensor(theirs[position].logprobs), atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_twenty_syncs_each_change_the_output_and_keep_the_gap_small(runtime, checkpoint, finetune):
    policy, tokenizer = make_random_policy(checkpoint, finetune)
    engine = VLLMEngine(policy, tokenizer, runtime)
    engine.sync(0)
    before = parity(engine).measure(nullcontext())
    assert 0 < before["parity/max"] <= 1e-4
    for version in range(1, 21):
        earlier = greedy(engine)
        disturb(policy, 0.3, seed=version)
        assert {p: c.token_ids for p, c in greedy(engine).items()} == {p: c.token_ids for p, c in earlier.items()}
        engine.sync(version)
        later = greedy(engine)
        assert all(completion.policy_version == version for completion in later.values())
        assert any(later[p].logprobs != earlier[p].logprobs for p in later)
        assert parity(engine).measure(nullcontext())["parity/max"] <= 1e-4


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_parity_catches_a_skipped_sync(runtime, checkpoint, finetune):
    policy, tokenizer = make_random_policy(checkpoint, finetune)
    engine = VLLMEngine(policy, tokenizer, runtime)
    engine.sync(1)
    disturb(policy, 0.3, seed=9)
    with pytest.raises(EngineError, match="earlier version"):
        parity(engine).measure(nullcontext())


class KeepsCache:
    """A runtime that does not empty its prefix cache."""

    def __init__(self, runtime):
        self.settings, self.generate, self.wake = runtime.settings, runtime.generate, runtime.wake
        self.load_adapter, self.load_weights = runtime.load_adapter, runtime.load_weights

    def reset_cache(self) -> None:
        pass


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_parity_catches_a_cache_that_was_not_reset(runtime, checkpoint, finetune):
    policy, tokenizer = make_random_policy(checkpoint, finetune)
    engine = VLLMEngine(policy, tokenizer, KeepsCache(runtime))
    engine.sync(1)
    assert parity(engine).measure(nullcontext())["parity/max"] <= 1e-4
    disturb(policy, 0.5, seed=2)
    engine.sync(2)
    with pytest.raises(EngineError, match="cached under earlier weights"):
        parity(engine).measure(nullcontext())


def test_a_completion_depends_on_its_seed_and_not_on_the_batch(runtime, checkpoint):
    policy, tokenizer = make_random_policy(checkpoint, "lora")
    engine, sampling = VLLMEngine(policy, tokenizer, runtime), Sampling(1.0, 16)
    together = dict(engine.generate(REQUESTS, sampling))
    alone = dict(engine.generate([REQUESTS[4]], sampling))[0]
    assert alone.token_ids == together[4].token_ids
    assert together[1].token_ids != together[4].token_ids  # same prompt, different seed


def test_completions_arrive_while_others_are_generated(runtime, checkpoint):
    policy, tokenizer = make_random_policy(checkpoint, "lora")
    engine = VLLMEngine(policy, tokenizer, runtime)
    engine.stop_ids = tuple(range(0, 250, 20))  # completions end at different times
    arrivals = engine.generate(REQUESTS, Sampling(1.0, 64))
    next(arrivals)
    assert runtime.llm.llm_engine.has_unfinished_requests()
    arrivals.close()
    assert not runtime.llm.llm_engine.has_unfinished_requests()
    finished = dict(engine.generate(REQUESTS, Sampling(1.0, 64)))
    assert sorted(finished) == list(range(len(REQUESTS)))
    assert {c.finish_reason for c in finished.values()} >= {"stop"}
    assert all(c.token_ids[-1] in engine.stop_ids for c in finished.values() if c.finish_reason == "stop")


def test_a_prompt_that_is_too_long_is_refused(runtime, checkpoint):
    policy, tokenizer = make_random_policy(checkpoint, "lora")
    engine = VLLMEngine(policy, tokenizer, runtime)
    with pytest.raises(EngineError, match="max_model_len=512"):
        list(engine.generate([Request((1,) * 500, 0)], Sampling(1.0, 64)))


def test_the_trainers_random_state_and_threads_are_not_changed(runtime, checkpoint):
    policy, tokenizer = make_random_policy(checkpoint, "lora")
    engine = VLLMEngine(policy, tokenizer, runtime)
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    list(engine.generate(REQUESTS, Sampling(1.0, 8)))
    engine.sync(1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    torch.set_num_threads(threads)
    assert torch.set_num_threads.__module__ == "torch" or torch.set_num_threads.__name__ == "set_num_threads"
