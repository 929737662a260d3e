"""The user's own code as a verifier: numbers, booleans, and TRL's reward functions as they are."""

import asyncio
import json
import logging
import re

import numpy as np
import pytest

from pmd.config.schema import DataConfig
from pmd.tasks import load_tasks
from pmd.types import Message, Task
from pmd.verifiers import pool
from pmd.verifiers.pool import verify
from pmd.verifiers.resolve import describe_verifier_problem

HERE = __name__


def task(name: str, **fields) -> Task:
    return Task("t", (Message("user", "q"),), f"{HERE}.{name}", "train", **fields)


def length(task, completion):
    return len(completion) / 10


def is_even(task, completion):
    return int(completion) % 2 == 0


def of_numpy(task, completion):
    return np.float32(0.5)


def text(task, completion):
    return "good"


def infinite(task, completion):
    return float("inf")


@pytest.mark.parametrize(
    ("name", "completion", "reward", "correct", "status"),
    [
        ("length", "1234567", 0.7, True, "ok"),
        ("length", "1234", 0.4, False, "wrong_answer"),
        ("is_even", "2", 1.0, True, "ok"),
        ("is_even", "3", 0.0, False, "wrong_answer"),
        ("of_numpy", "", 0.5, True, "ok"),
        ("text", "", 0.0, False, "error"),
        ("infinite", "", 0.0, False, "error"),
    ],
)
def test_a_number_or_a_bool_is_a_reward(name, completion, reward, correct, status):
    verdict = verify(task(name), completion)
    assert (verdict.reward, verdict.correct, verdict.status) == (pytest.approx(reward), correct, status)


def leaves(task, completion):
    raise SystemExit("no API key")


def test_a_verifier_that_exits_is_said(caplog):
    assert verify(task("leaves"), "x").status == "error"
    assert "SystemExit: no API key" in caplog.text


def test_the_same_error_is_said_once_and_with_its_traceback_if_it_is_the_users(caplog):
    pool._crashes.clear()
    with caplog.at_level(logging.ERROR):  # so that all ranks of a run say it
        for completion in ("x", "y", "z"):
            assert verify(task("is_even"), completion).status == "error"
            assert verify(task("text"), completion).status == "error"
    theirs, shape = (record.getMessage() for record in caplog.records)
    assert "ValueError" in theirs
    assert "return int(completion) % 2 == 0" in theirs
    assert "it returned str; a verifier takes (task: Task, completion: str) and returns a Verdict" in shape
    assert "Traceback" not in shape


# ---- TRL: the calls are those of its GRPOTrainer

CALLS: list[dict] = []


def accuracy_reward(completions, solution, **kwargs):
    """As in TRL's examples for conversational data."""
    CALLS.append({"completions": completions, "solution": solution, **kwargs})
    return [
        1.0 if completion[0]["content"] == right else 0.0
        for completion, right in zip(completions, solution, strict=True)
    ]


def plain_reward(prompts, completions, answer):
    return [
        float(completion == f"{prompt} {right}")
        for prompt, completion, right in zip(prompts, completions, answer, strict=True)
    ]


class Judge:
    def __call__(self, prompts, completions, **kwargs):
        return np.array([0.25])


async def slow_judge(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.75]


def two(prompts, completions):
    return [1.0, 1.0]


def test_a_trl_function_on_conversational_data(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"{n}?"}], "solution": str(n), "level": n, "id": f"t{n}"}
        for n in range(10)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_tasks(DataConfig(task="jsonl", path=str(path), verifier=f"{HERE}.accuracy_reward"), seed=0)
    third = next(t for part in loaded.values() for t in part if t.task_id == "t3")
    CALLS.clear()
    assert [verify(third, text).correct for text in ("3", "4")] == [True, False]
    assert CALLS[0] == {
        "prompts": [[{"role": "user", "content": "3?"}]],
        "completions": [[{"role": "assistant", "content": "3"}]],
        "solution": ["3"],
        "level": [3],
        "id": ["t3"],
    }


def test_a_trl_function_on_plain_data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": n, "extra": 0}) + "\n" for n in range(10)))
    loaded = load_tasks(DataConfig(task="jsonl", path=str(path), verifier=f"{HERE}.plain_reward"), seed=0)
    first = loaded["train"][0]
    n = first.columns["answer"]
    assert verify(first, f"{n}? {n}").reward == 1.0
    assert verify(first, "no").reward == 0.0


def think_format_reward(completions, **kwargs):
    """As TRL's function of this name, on plain data."""
    form = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL)
    return [float(form.match(text) is not None) for text in completions]


def test_a_trl_function_sees_the_thinking_and_a_verifier_beside_it_does_not():
    both = json.dumps([{"name": f"{HERE}.think_format_reward"}, {"name": "exact", "weight": 2.0}])
    for name, rewards in ((f"{HERE}.think_format_reward", (1.0, 0.0)), (both, (3.0, 2.0))):
        judged = Task("t", (Message("user", "q"),), name, "train", answer="3")
        assert [verify(judged, text).reward for text in ("<think>4</think>3", "3")] == [*rewards]


def test_other_forms():
    assert verify(task("Judge"), "x").reward == 0.25
    assert verify(task("slow_judge"), "x").reward == 0.75
    assert verify(task("two"), "x").status == "error"
    assert describe_verifier_problem(f"{HERE}.Judge") is None
