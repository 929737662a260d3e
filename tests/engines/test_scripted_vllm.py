"""VLLMEngine on a scripted runtime, without vLLM: what it accepts, what it retries, and which weights it loads when."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.hf import TextDecoder
from pmd.engines.vllm import MAX_TRIES, VLLMEngine, to_completion
from pmd.engines.vllm_runtime import RawCompletion, get_random_state, preserve_trainer_state, random_state_of
from pmd.errors import EngineError
from pmd.policy import make_policy
from pmd.pretrained import load_base, load_tokenizer

REQUESTS = [Request((1, 2, number), number) for number in range(6)]
SAMPLING = Sampling(1.0, 4)
TOKENIZER = load_tokenizer(ModelConfig(path="tiny_exam"))


def checked(token_ids, logprobs, finish_reason):
    raw = RawCompletion(7, tuple(token_ids), tuple(logprobs), finish_reason)
    return to_completion(raw, SAMPLING, TextDecoder(TOKENIZER, (258,)), (258,), policy_version=3)


def test_a_complete_completion_is_returned_unchanged():
    hi = TOKENIZER.encode("Hi", add_special_tokens=False)
    completion = checked([*hi, 258], [-1.0, -2.0, -0.5], "stop")
    assert (completion.token_ids, completion.logprobs) == ((*hi, 258), (-1.0, -2.0, -0.5))
    assert (completion.text, completion.finish_reason, completion.policy_version) == ("Hi", "stop", 3)
    assert checked([72, 105, 72, 105], [-1.0] * 4, "length").finish_reason == "length"


@pytest.mark.parametrize(
    ("token_ids", "logprobs", "finish_reason", "message"),
    [
        ([], [], "stop", "0 tokens"),
        ([72, 258], [-1.0], "stop", "2 tokens and 1 log-probs"),
        ([72, 258], [-1.0, math.nan], "stop", "diverged"),
        ([72, 105], [-1.0, -1.0], "length", "cut at 2 of 4"),
    ],
)
def test_an_incomplete_completion_is_refused(token_ids, logprobs, finish_reason, message):
    with pytest.raises(EngineError, match=message):
        checked(token_ids, logprobs, finish_reason)


class ScriptedRuntime:
    """Answers each try of a request as `script(position, try)` says, and notes which weights it is given."""

    def __init__(self, script, stop_id):
        self.script, self.stop_id, self.tries = script, stop_id, Counter()
        self.settings = SimpleNamespace(max_model_len=64)
        self.loaded = []  # adapters by name, weights by their first value; None where the prefix cache is reset

    def generate(self, requests, sampling, stop_ids, adapter):
        for position, _ in requests:
            self.tries[position] += 1
            answers = {
                "complete": RawCompletion(position, (5, position, self.stop_id), (-1.0, -2.0, -0.5), "stop"),
                "aborted": RawCompletion(position, (5,), (-1.0,), "abort"),
                "empty": RawCompletion(position, (), (), "stop"),
                "truncated": RawCompletion(position, (5, 6), (-1.0, -1.0), "length"),
                "lost": None,
            }
            answer = answers[self.script(position, self.tries[position])]
            if answer is not None:
                yield answer

    def load_adapter(self, folder, weights):
        self.loaded.append(folder.name)

    def load_weights(self, weights):
        self.loaded.append(next(iter(dict(weights).values())).flatten()[0].item())

    def reset_cache(self):
        self.loaded.append(None)

    def wake(self): ...


def engine_with(script, finetune="full", **teacher) -> VLLMEngine:
    model = ModelConfig(path="tiny", finetune=finetune, lora_rank=4)
    tokenizer = load_tokenizer(model)
    policy = make_policy(load_base(model), model, TeacherConfig(**teacher))
    return VLLMEngine(policy, tokenizer, ScriptedRuntime(script, tokenizer.eos_token_id))


@pytest.mark.parametrize("failure", ["aborted", "empty", "lost"])
def test_an_unfinished_completion_is_requested_again_and_arrives_once(failure):
    engine = engine_with(lambda position, tries: failure if position % 2 and tries < MAX_TRIES else "complete")
    arrived = list(engine.generate(REQUESTS, SAMPLING))
    assert sorted(position for position, _ in arrived) == list(range(len(REQUESTS)))
    assert all(completion.token_ids[1] == position for position, completion in arrived)
    assert engine.runtime.tries == {position: MAX_TRIES if position % 2 else 1 for position in range(len(REQUESTS))}


@pytest.mark.parametrize("failure", ["aborted", "empty", "lost"])
def test_tries_are_limited_and_the_first_unfinished_request_is_named(failure):
    engine = engine_with(lambda position, tries: failure if position in (2, 4) else "complete")
    with pytest.raises(EngineError, match=r"2 of 6 completions unfinished 3 times.* request 2; they were discarded"):
        list(engine.generate(REQUESTS, SAMPLING))
    assert max(engine.runtime.tries.values()) == MAX_TRIES


def test_a_truncated_completion_is_refused():
    engine = engine_with(lambda position, tries: "truncated" if position == 3 else "complete")
    with pytest.raises(EngineError, match=r"request 3 was cut at 2 of 4 tokens; raise rollouts.vllm.max_model_len"):
        list(engine.generate(REQUESTS, SAMPLING))


def first_value(engine, role):
    with engine.policy.weights(role) as model:
        return next(iter(model.state_dict().values())).flatten()[0].item()


def change(engine):
    """Change the student, as an optimizer step does."""
    with torch.no_grad(), engine.policy.weights("student") as model:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1


def loads_of(engine, role):
    """What the runtime is given when completions of `role` are asked for."""
    engine.runtime.loaded.clear()
    list(engine.generate(REQUESTS, SAMPLING, role))
    return engine.runtime.loaded


def test_full_fine_tuning_reloads_a_roles_weights_when_another_role_was_loaded():
    engine = engine_with(lambda *_: "complete")
    engine.sync(0)
    assert loads_of(engine, "student") == []
    change(engine)
    engine.sync(1)
    assert loads_of(engine, "student") == []
    assert loads_of(engine, "teacher") == [first_value(engine, "reference"), None]
    assert loads_of(engine, "teacher") == []  # a frozen teacher does not change
    assert loads_of(engine, "student") == [first_value(engine, "student"), None]
    assert first_value(engine, "student") != first_value(engine, "reference")


def test_full_fine_tuning_loads_a_refreshed_teacher():
    engine = engine_with(lambda *_: "complete", kind="frozen", refresh_epochs=1)
    engine.sync(0)
    before = loads_of(engine, "teacher")[0]
    change(engine)
    engine.sync(1)
    engine.policy.after_epoch(0)
    assert loads_of(engine, "teacher") == [first_value(engine, "student"), None]
    assert before != first_value(engine, "student")


def test_adapters_of_student_and_teacher_are_kept_side_by_side():
    engine = engine_with(lambda *_: "complete", "lora", kind="ema")
    assert loads_of(engine, "student") == ["student", None]
    assert loads_of(engine, "teacher") == ["teacher", None]
    assert loads_of(engine, "student") == []  # still loaded
    assert loads_of(engine, "reference") == []  # the base model
    assert loads_of(engine, "teacher") == ["teacher", None]  # it may have changed


@pytest.mark.filterwarnings("error")
def test_the_random_state_is_that_of_this_processs_gpu_among_many(monkeypatch):
    """torch's own `fork_rng` saves that of every GPU of the machine, at each step of vLLM, and warns."""
    states = {"cuda": torch.arange(16, dtype=torch.uint8)}  # "cuda" is the current one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": states.update({device: state}))
    before = get_random_state()
    with preserve_trainer_state():
        torch.rand(1)
        states["cuda"] = torch.zeros(16, dtype=torch.uint8)
    of_seed = random_state_of(3)
    assert all(torch.equal(*pair) for pair in zip(get_random_state(), before, strict=True))
    assert torch.equal(of_seed[0], random_state_of(3)[0])
    assert not torch.equal(of_seed[0], before[0])
