"""What completions have in common: copies, loops, hedging, distinct answers; counted by hand."""

from dataclasses import replace

import pytest
from examples import make_rollout

from pmd.callbacks.wording import describe
from pmd.evaluation.evaluate import sample_of
from pmd.evaluation.metrics import score_samples
from pmd.types import Message, Task, Verdict

TASK = Task("t", (Message("user", "question"),), "exact", "train")


def rollout(text: str, answer: str | None = None):
    made = make_rollout(0, verdict=Verdict(0.0, False, "ok", answer=answer))
    return replace(made, completion=replace(made.completion, text=text))


def test_counted_by_hand():
    first = [rollout("Hmm, it is A.", "A"), rollout("Hmm, it is A.", "A"), rollout("it is B", "B"), rollout("or", None)]
    second = [rollout("a b c d a b c d", "C")]
    found = describe([first, second])
    assert found["rollout/repeated"] == pytest.approx(1 / 5)
    assert found["rollout/hedging"] == pytest.approx(2 / (4 + 4 + 3 + 1 + 8))
    assert found["rollout/distinct_answers"] == pytest.approx((2 + 1) / 2)
    assert found["rollout/looping"] == pytest.approx((1 / 5) / 5)  # one of five runs of four words came before


def test_programs_have_no_answers_so_their_texts_are_compared():
    assert describe([[rollout("x"), rollout("y"), rollout("x")]])["rollout/distinct_answers"] == 2
    assert describe([]) == {}


def test_procedural_words_per_thousand():
    texts = ["The strategy and its LESSONS: behaviour, behaviors.", "patterned strategical words do not count"]
    samples = [sample_of(TASK, Verdict(1.0, True, "ok"), text) for text in texts]
    assert score_samples(samples).procedural_rate == pytest.approx(1000 * 4 / 13)
