"""What VLLMEngine does with a runtime that gives requests back unfinished, empty, cut short, or not at all."""

from collections import Counter
from types import SimpleNamespace

import pytest

from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.vllm import MAX_TRIES, VLLMEngine
from pmd.engines.vllm_runtime import Generation
from pmd.errors import EngineError
from pmd.policy import make_policy
from pmd.pretrained import load_base, load_tokenizer

REQUESTS = [Request((1, 2, number), number) for number in range(6)]
SAMPLING = Sampling(1.0, 4)


class ScriptedRuntime:
    """Answers each try of a request as `script(key, try)` says: whole, or one of the ways to fail."""

    def __init__(self, script, stop_id):
        self.script, self.stop_id, self.tries = script, stop_id, Counter()
        self.settings = SimpleNamespace(max_model_len=64)

    def generate(self, requests, sampling, stop_ids, adapter):
        for key, _ in requests:
            self.tries[key] += 1
            whole = Generation(key, (5, key, self.stop_id), (-1.0, -2.0, -0.5), "stop")
            answers = {
                "whole": whole,
                "aborted": Generation(key, (5,), (-1.0,), "abort"),
                "empty": Generation(key, (), (), "stop"),
                "cut": Generation(key, (5, 6), (-1.0, -1.0), "length"),
                "lost": None,
            }
            answer = answers[self.script(key, self.tries[key])]
            if answer is not None:
                yield answer

    def load_weights(self, weights): ...
    def reset_cache(self): ...
    def wake(self): ...


def engine_with(script) -> VLLMEngine:
    model = ModelConfig(path="tiny")
    tokenizer = load_tokenizer(model)
    policy = make_policy(load_base(model), model, TeacherConfig())
    return VLLMEngine(policy, tokenizer, ScriptedRuntime(script, tokenizer.eos_token_id))


@pytest.mark.parametrize("failure", ["aborted", "empty", "lost"])
def test_what_comes_back_unfinished_is_asked_for_again_and_arrives_once(failure):
    engine = engine_with(lambda key, attempt: failure if key % 2 and attempt < MAX_TRIES else "whole")
    arrived = list(engine.generate(REQUESTS, SAMPLING))
    assert sorted(position for position, _ in arrived) == list(range(len(REQUESTS)))
    assert all(completion.token_ids[1] == position for position, completion in arrived)
    assert engine.runtime.tries == {key: MAX_TRIES if key % 2 else 1 for key in range(len(REQUESTS))}


@pytest.mark.parametrize("failure", ["aborted", "empty", "lost"])
def test_tries_are_bounded_and_the_first_request_is_named(failure):
    engine = engine_with(lambda key, attempt: failure if key in (2, 4) else "whole")
    with pytest.raises(
        EngineError, match=r"gave up on 2 of 6 completions 3 times, first on request 2; nothing of them"
    ):
        list(engine.generate(REQUESTS, SAMPLING))
    assert max(engine.runtime.tries.values()) == MAX_TRIES


def test_a_completion_that_was_cut_short_is_not_taken_for_a_whole_one():
    engine = engine_with(lambda key, attempt: "cut" if key == 3 else "whole")
    with pytest.raises(EngineError, match=r"request 3 was cut at 2 of 4 tokens; raise rollouts.vllm.max_model_len"):
        list(engine.generate(REQUESTS, SAMPLING))
