"""Several verifiers: rewards add up by weight, the first decides what is right, options reach each of them."""

import json

import pytest

from pmd.config.schema import DataConfig
from pmd.tasks.combined import describe_part_problems, encode
from pmd.tasks.jsonl import read_task_file
from pmd.types import Message, Task
from pmd.verifiers.pool import verify
from pmd.verifiers.resolve import prepare_verifiers

OWN = """
class Brief:
    def __init__(self, most): self.most = most
    def __call__(self, task, completion): return float(len(completion.split()) <= self.most)
def other_tasks(completions, **columns): return [None for _ in completions]
def rude(completions, penalty=1.0, **columns): return [-penalty for _ in completions]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "combined_checks.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


PARTS = [
    {"name": "exact"},
    {"name": "combined_checks.Brief", "weight": 0.5, "options": {"most": 2}},
    {"name": "combined_checks.rude", "weight": 0.25, "options": {"penalty": 2.0}},
]


def task(parts) -> Task:
    return Task("t", (Message("user", "2 + 2?"),), encode(parts), "train", answer="4")


def test_rewards_add_up_and_the_first_decides(own):
    right, long, wrong = (verify(task(PARTS), text) for text in ("4", "so it is <answer>4</answer>", "5"))
    assert [verdict.reward for verdict in (right, long, wrong)] == [1.0, 0.5, 0.0]
    assert [verdict.correct for verdict in (right, long, wrong)] == [True, True, False]
    assert prepare_verifiers([task(PARTS)], "strongest") == []


def test_the_options_of_a_built_in_verifier_are_its_tests():
    call = '[{"Action": "f", "Action_Input": "{}"}]'
    said = "I call Action: f\nAction Input: {}"
    tasks = [
        Task("t", (Message("user", "?"),), encode([{"name": "tool_use", "options": options}]), "train", answer=call)
        for options in ({}, {"reading": "strict"})
    ]
    assert [verify(task, said).correct for task in tasks] == [True, False]


def test_no_verdict_of_one_is_no_verdict(own):
    assert verify(task([{"name": "exact"}, {"name": "combined_checks.nothing"}]), "4").status == "error"


def test_a_configuration_names_them_for_every_row(own, tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "2 + 2?", "answer": "4"}\n{"prompt": "?", "verifier": "[3]"}\n')
    tasks, problems = read_task_file(str(tmp_path / "tasks.jsonl"), "train", DataConfig(verifier=PARTS))
    assert [json.loads(task.verifier) for task in tasks] == [PARTS]
    assert len(problems) == 1
    assert "verifier[0] must be {name" in problems[0]
    rows = '{"prompt": "?", "verifier": ' + json.dumps(encode(PARTS)) + ', "answer": "4"}\n'
    (tmp_path / "tasks.jsonl").write_text(rows)
    _, problems = read_task_file(str(tmp_path / "tasks.jsonl"), "train", DataConfig())
    assert all("--allow-module combined_checks" in problem for problem in problems)
    assert len(problems) == 2


def test_mistakes_are_named():
    said = "\n".join(
        describe_part_problems("data.verifier", [{"nam": "exact"}, {"name": "exact", "weight": True, "x": 1}])
    )
    for words in ("data.verifier[0] must be", "data.verifier[1].x is not known", "data.verifier[1].weight=True"):
        assert words in said
    assert describe_part_problems("data.verifier", []) != []


def test_one_that_returns_none_is_not_for_this_task(own):
    other = {"name": "combined_checks.other_tasks"}
    assert verify(task([other, *PARTS]), "4").reward == verify(task(PARTS), "4").reward
    assert verify(task([other, other]), "4").status == "error"
