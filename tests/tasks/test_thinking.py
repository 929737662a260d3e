"""Thinking is removed in one place, and no verifier, prompt or memory sees it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmd.tasks.thinking import MARK, strip_thinking
from pmd.types import Message, Task
from pmd.verifiers.pool import verify

GPT_OSS = "<|channel|>analysis<|message|>5?<|end|><|start|>assistant<|channel|>final<|message|>It is 6.<|return|>"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>a</think>b", "b"),
        ("<think>never closed", ""),
        ("a<think>x</think>b<think>y", "ab"),
        (" b ", "b"),
        ("x</think>b", "b"),  # the chat template wrote the opening tag
        ("x</think>y</think>b", "b"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<think>the tag <think> opens</think>d", "d"),
        ("<think>\n\n</think>\n\nb", "b"),
        ("<think></think><think>a</think>b<think>c</think>d", "bd"),
        ("<thinking>a</thinking>b", "b"),
        ("<THINK>a</Think >b", "b"),
        ("<thought>a</thought>b", "b"),
        ("<seed:think>a</seed:think>b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("[THINK]never closed", ""),
        ("a[/THINK]b", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
        ("<|START_THINKING|>a<|END_THINKING|>b", "b"),
        ("◁think▷a◁/think▷b", "b"),
        (GPT_OSS, "It is 6."),
        (GPT_OSS.split("<|end|>")[0], ""),
        ("<|channel|>final <|constrain|>json<|message|>{}", "{}"),
        ("analysis5?assistantfinalIt is 6.", "It is 6."),
        ("<reasoning>a</reasoning>b", "<reasoning>a</reasoning>b"),
        ("the analysis says assistantfinal", "the analysis says assistantfinal"),
        ("if x < 3: y[1] <b> thinking", "if x < 3: y[1] <b> thinking"),
    ],
)
def test_what_is_left_without_thinking(text, left):
    assert strip_thinking(text) == left
    assert bool(MARK.search(text)) or left == text.strip()


PIECES = st.sampled_from(
    ["<think>", "</think>", "[THINK]", "[/THINK]", GPT_OSS, "<|channel|>analysis<|message|>", "a "]
)


@settings(max_examples=60)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_no_mark_survives_and_unmarked_text_stays(text):
    left = strip_thinking(text)
    assert not MARK.search(left)
    assert strip_thinking(left) == left


def task(verifier, answer, tests=None):
    return Task("t", (Message("user", "Q?\n\nA: one\nB: two"),), verifier, "test", answer=answer, tests=tests or {})


ADD = {"kind": "stdin", "cases": [{"input": "1 2", "output": "3"}]}
RIGHT, WRONG = "```python\nprint(3)\n```", "```python\nprint(4) # and much longer\n```"
CALL, OTHER_CALL = (f"Action: {name}\nAction Input: {{}}" for name in ("go", "stay"))


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        (task("mcq", "B"), "<answer>B</answer>", "<answer>A</answer>"),
        (task("exact", "4"), "4", "5"),
        (task("tool_use", '[{"Action": "go", "Action_Input": {}}]'), CALL, OTHER_CALL),
        (task("code", "", ADD), RIGHT, WRONG),
        (task("code", "", {**ADD, "scorer": "sdpo"}), RIGHT, WRONG),
        (task("boxes", "1 2"), "; 1 2", "; 3 4"),
        (task(f"{__name__}.own", "4"), "4", "5"),
    ],
    ids=lambda value: value.verifier if isinstance(value, Task) else "",
)
def test_a_verifier_judges_what_follows_the_thinking(task, right, wrong):
    assert verify(task, f"<think>{wrong}</think>{right}").correct
    assert verify(task, f"{wrong}\n[/THINK]\n{right}").correct
    assert not verify(task, f"<think>{right}</think>{wrong}").correct
    assert not verify(task, f"<think>{right}").correct
    assert not verify(task, f"<think>{right}</think>").correct


def own(task, completion):
    from pmd.types import Verdict

    return Verdict(1.0, completion == task.answer, "ok")


def test_a_completion_without_thinking_reaches_the_verifier_unchanged():
    assert verify(task(f"{__name__}.own", " 4\n"), " 4\n").correct
