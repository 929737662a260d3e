"""The embedded engine: what it samples, and that only prompt, seed and policy matter."""

import random
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.hf import HFEngine, _cumulative
from pmd.errors import EngineError
from pmd.policy import make_policy
from pmd.pretrained import load_tokenizer

TOKENIZER = load_tokenizer(ModelConfig(path="tiny"))
PROMPTS = [(1, 5, 9), (1, 7), (1, 4, 4, 8, 12), (1, 20, 21)]


def engine(batch: int = 64, scale: float = 1.0) -> HFEngine:
    """An engine over a random model of 110 tokens."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=110, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= scale * 20  # far from uniform
    return HFEngine(make_policy(model, ModelConfig(), TeacherConfig()), TOKENIZER, batch)


def run(one: HFEngine, requests: list[Request], sampling: Sampling):
    found = dict(one.generate(requests, sampling))
    return [found[position] for position in range(len(requests))]


def test_a_completion_depends_only_on_its_prompt_and_seed():
    requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS * 3)]
    sampling = Sampling(1.0, 8)
    together = run(engine(), requests, sampling)
    for batch in (1, 5):
        assert [c.token_ids for c in run(engine(batch), requests, sampling)] == [c.token_ids for c in together]
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    shuffled = run(engine(), [requests[i] for i in order], sampling)
    assert [c.token_ids for c in shuffled] == [together[i].token_ids for i in order]


def test_the_seed_matters():
    found = run(engine(), [Request(PROMPTS[0], seed) for seed in range(20)], Sampling(1.0, 8))
    assert len({c.token_ids for c in found}) > 10


def test_torchs_random_state_is_not_changed():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(engine_ := engine(), [Request(PROMPTS[0], 1)], Sampling(1.0, 4))
    torch.manual_seed(5)
    run(engine_, [Request(PROMPTS[0], 1)], Sampling(1.0, 4))
    assert torch.equal(torch.rand(3), expected)


def test_greedy_is_what_transformers_generates():
    one = engine()
    found = run(one, [Request(prompt, 0) for prompt in PROMPTS], Sampling(0.0, 8))
    for prompt, completion in zip(PROMPTS, found, strict=True):
        generated = one.policy.student.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=TOKENIZER.eos_token_id,
            pad_token_id=TOKENIZER.pad_token_id,
        )  # fmt: skip
        assert list(completion.token_ids) == generated[0, len(prompt) :].tolist()


def test_logprobs_are_those_of_a_plain_forward_pass():
    one = engine()
    for completion, prompt in zip(run(one, [Request(p, 3) for p in PROMPTS], Sampling(1.0, 8)), PROMPTS, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logprobs = one.policy.student(ids).logits.log_softmax(-1)[0]
        expected = [logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(completion.token_ids)]
        assert completion.logprobs == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_the_first_token_follows_the_distribution(temperature, top_p):
    """4,000 draws against exact probabilities: the chi-square statistic lies within 5 deviations of its mean."""
    one, draws = engine(batch=4000, scale=0.5), 4000
    found = run(one, [Request(PROMPTS[0], seed) for seed in range(draws)], Sampling(temperature, 1, top_p))
    counts = Counter(c.token_ids[0] for c in found)
    logits = one.policy.student(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ranked, ids = probs.sort(descending=True)
        outside = ids[ranked.cumsum(0) - ranked >= top_p]
        assert not set(outside.tolist()) & set(counts)
        probs[outside] = 0
        probs /= probs.sum()
    common = [i for i in range(110) if probs[i] * draws > 5]
    statistic = sum((counts[i] - draws * probs[i].item()) ** 2 / (draws * probs[i].item()) for i in common)
    assert abs(statistic - len(common)) < 5 * (2 * len(common)) ** 0.5


def test_completions_end_at_the_stop_token_or_at_the_limit():
    found = run(engine(scale=0.2), [Request(PROMPTS[0], seed) for seed in range(300)], Sampling(1.0, 12))
    eos = TOKENIZER.eos_token_id
    assert {c.finish_reason for c in found} == {"stop", "length"}
    for completion in found:
        assert eos not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == eos) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12
        assert len(completion.logprobs) == len(completion.token_ids)


def test_completions_carry_the_version_of_the_weights_that_sampled_them():
    one = engine()
    one.sync(7)
    assert run(one, [Request(PROMPTS[0], 0)], Sampling(1.0, 2))[0].policy_version == 7


def test_diverged_weights_are_refused():
    one = engine()
    with torch.no_grad():
        one.policy.student.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EngineError, match=r"optimizer\.lr"):
        run(one, [Request(PROMPTS[0], 0)], Sampling(1.0, 2))


def test_every_stop_token_of_the_model_ends_a_completion():
    """Chat models have several: the end of a turn and the end of a text."""
    one = engine(scale=0.2)
    one.policy.student.generation_config.eos_token_id = [TOKENIZER.eos_token_id, 50, 51, 52]
    several = HFEngine(one.policy, TOKENIZER, 64)
    found = run(several, [Request(PROMPTS[0], seed) for seed in range(300)], Sampling(1.0, 12))
    last = {c.token_ids[-1] for c in found if c.finish_reason == "stop"}
    assert last & {50, 51, 52}
    assert not any({50, 51, 52} & set(c.token_ids[:-1]) for c in found)


@pytest.mark.parametrize(("deterministic", "device"), [(True, "cpu"), (False, "cuda")])
def test_sums_are_the_cpus_where_those_of_a_gpu_are_forbidden(deterministic, device, monkeypatch):
    """torch raises for a sum of fractions along a row on a GPU if only deterministic operations are allowed."""
    devices, cumsum = [], torch.Tensor.cumsum

    def note(tensor, dim):
        devices.append(tensor.device.type)
        return cumsum(tensor, dim)

    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr(torch.Tensor, "cumsum", note)
    with FakeTensorMode():
        assert _cumulative(torch.empty(2, 50, dtype=torch.float64, device="cuda")).device.type == "cuda"
    assert devices == [device]
