"""Completions are verified while others are generated; rollouts come back complete, in order, each once."""

import threading
import time
from dataclasses import dataclass, field, replace

import pytest

from pmd.config.schema import VerifiersConfig
from pmd.engines.base import Sampling
from pmd.errors import EngineError
from pmd.rollouts.generate import generate_rollouts
from pmd.types import Completion, Message, Task, Verdict

SAMPLING = Sampling(1.0, 8)
VERIFIED = threading.Event()
RELEASED = threading.Event()


def announce(task: Task, text: str) -> Verdict:
    VERIFIED.set()
    return Verdict(1.0, True, "ok", answer=text)


def hang(task: Task, text: str) -> Verdict:
    RELEASED.wait(60)
    return Verdict(1.0, True, "ok")


def task(task_id: str, verifier: str = "exact") -> Task:
    return Task(task_id, (Message("user", "q"),), verifier, "train", answer="0")


@dataclass
class ScriptedEngine:
    """Completes request n with the text str(n), in the given order; `between` runs before each but the first."""

    order: list[int] | None = None
    between: list = field(default_factory=list)
    policy_version: int = 0

    def generate(self, requests, sampling, role="student"):
        for count, position in enumerate(self.order if self.order is not None else range(len(requests))):
            if count and self.between:
                self.between[0]()
            yield position, Completion((1, 2), (-0.5, -0.5), str(position), "stop", 0)

    def sync(self, policy_version): ...
    def sleep(self): ...
    def wake(self): ...
    def close(self): ...


def run(engine, tasks, num_samples=1, **config):
    prompts = [(t, [7]) for t in tasks]
    return generate_rollouts(engine, prompts, num_samples, SAMPLING, "0/key", VerifiersConfig(**config))


def test_a_completion_is_verified_before_the_next_is_generated():
    VERIFIED.clear()
    seen = []
    engine = ScriptedEngine(between=[lambda: seen.append(VERIFIED.wait(20))])
    found = run(engine, [task("a", f"{__name__}.announce"), task("b", f"{__name__}.announce")])
    assert seen == [True]
    assert [rollout.verdict.answer for rollout in found.rollouts] == ["0", "1"]


def test_rollouts_are_in_the_order_of_the_tasks_however_they_arrive():
    found = run(ScriptedEngine(order=[5, 0, 3, 1, 4, 2]), [task("a"), task("b"), task("c")], num_samples=2)
    assert [[r.rollout_id for r in group] for group in found.groups] == [
        [f"0/key/{name}#{sample}" for sample in range(2)] for name in "abc"
    ]
    assert [rollout.completion.text for rollout in found.rollouts] == list("012345")
    assert [rollout.verdict.correct for rollout in found.rollouts] == [True, *[False] * 5]


def test_a_hung_verification_is_abandoned_and_counted():
    try:
        found = run(ScriptedEngine(), [task("a", f"{__name__}.hang"), task("b")], deadline_s=0.2)
    finally:
        RELEASED.set()
    assert [rollout.verdict.status for rollout in found.rollouts] == ["error", "wrong_answer"]
    assert found.num_hung == 1


@pytest.mark.parametrize(("order", "words"), [([0, 0], "#0 twice"), ([1], "1 of 2 completions"), ([], "0 of 2")])
def test_repeated_or_missing_completions_are_refused(order, words):
    with pytest.raises(EngineError, match=words):
        run(ScriptedEngine(order=order), [task("a"), task("b")])


def test_an_empty_completion_is_refused():
    class Empty(ScriptedEngine):
        def generate(self, requests, sampling, role="student"):
            for position, completion in super().generate(requests, sampling, role):
                yield position, replace(completion, token_ids=())

    with pytest.raises(EngineError, match="0 tokens with 2 log-probs"):
        run(Empty(), [task("a")])


def test_an_interrupt_drops_pending_verifications_and_leaves_no_thread():
    RELEASED.clear()
    before = threading.active_count()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ScriptedEngine(between=[interrupt]), [task(str(n), f"{__name__}.hang") for n in range(4)])
    RELEASED.set()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before
