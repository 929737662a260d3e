"""Chat prompts: the student sees only the task, the teacher also sees what helps, nobody sees the hidden answer."""

from dataclasses import replace

import pytest

from pmd.config.schema import ModelConfig
from pmd.pretrained import load_tokenizer
from pmd.tasks.prompts.base import Extent
from pmd.tasks.prompts.chat import ChatPrompts
from pmd.tasks.prompts.parsing import ParsedInsight
from pmd.types import Completion, Message, Rollout, Task, Verdict

TOKENIZER = load_tokenizer(ModelConfig(path="tiny_exam"))
PROMPTS = ChatPrompts(TOKENIZER)
TASK = Task(
    "t", (Message("system", "Be brief."), Message("user", "Which gas is lightest?\nA: helium\nB: neon")), "mcq",
    "train", answer="SECRET",
)  # fmt: skip


def decoded(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


def rollout(number: int, correct: bool, text: str, feedback: str = "", status: str = "") -> Rollout:
    verdict = Verdict(float(correct), correct, status or ("ok" if correct else "wrong_answer"), feedback)
    return Rollout(f"r{number}", "g", "t", (), Completion((1,), (-1.0,), text, "stop", 0), verdict)


def test_the_student_sees_only_the_tasks_messages():
    expected = TOKENIZER.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TASK.question}],
        add_generation_prompt=True, tokenize=True, return_dict=False,
    )  # fmt: skip
    assert PROMPTS.student(TASK) == list(expected)


def test_the_teacher_without_extras_sees_what_the_student_sees():
    assert PROMPTS.teacher(TASK, [], None, None) == PROMPTS.student(TASK)


def test_the_teacher_sees_items_success_and_failure_without_thinking():
    failed = rollout(0, False, "<think>hmm QQQ</think>I say neon", "neon is heavier")
    shown = decoded(PROMPTS.teacher(TASK, ["mind the mass", "braces {stay}"], "<think>ZZZ</think>helium", failed))
    for text in (
        "Be brief.",
        TASK.question,
        "mind the mass",
        "braces {stay}",
        "helium",
        "I say neon",
        "neon is heavier",
    ):
        assert text in shown, text
    for text in ("QQQ", "ZZZ", "SECRET"):
        assert text not in shown, text


def test_the_teacher_sees_a_conversation_as_the_student_does_and_a_reflection_all_of_it():
    turns = (Message("user", "First?"), Message("assistant", "Hm."), Message("user", "Again."))
    task = replace(TASK, messages=turns)
    teacher = decoded(PROMPTS.teacher(task, ["An item."], None, None))
    assert teacher.count("First?") == teacher.count("Again.") == 1
    reflection = decoded(PROMPTS.reflection(task, [rollout(1, True, "right")])[0])
    assert "First?" in reflection
    assert "Again." in reflection


def test_feedback_without_the_attempt_and_nothing_without_feedback():
    failed = rollout(0, False, "I say neon", "neon is heavier")
    shown = decoded(PROMPTS.teacher(TASK, [], None, failed, False))
    assert "neon is heavier" in shown
    assert "I say neon" not in shown
    for show_attempt in (True, False):
        silent = rollout(0, False, "I say neon", " ")
        assert PROMPTS.teacher(TASK, [], None, silent, show_attempt) == PROMPTS.student(TASK)
        assert "say neon" not in decoded(PROMPTS.teacher(TASK, ["mind the mass"], None, silent, show_attempt))


def test_a_reflection_prompt_has_the_verdicts_but_not_the_answer():
    group = [rollout(0, True, "helium it is"), rollout(1, False, "neon it is"), rollout(2, False, "neon it is")]
    (ids,) = PROMPTS.reflection(TASK, group)
    shown = decoded(ids)
    assert shown.count("neon it is") == 1  # equal attempts are shown once
    assert "helium it is" in shown
    assert "mixed" in shown
    assert "SECRET" not in shown


def test_an_entirely_failed_group_is_reflected_on_only_with_feedback():
    assert PROMPTS.reflection(TASK, [rollout(0, False, "neon")]) == []
    assert len(PROMPTS.reflection(TASK, [rollout(0, False, "neon", "too heavy")])) == 1
    assert PROMPTS.reflection(TASK, [rollout(0, False, "neon", "boom", "sandbox_error")]) == []


def test_an_attempt_that_was_cut_off_is_something_to_reflect_on():
    endless = replace(rollout(0, False, "neon, or"), completion=Completion((1,), (-1.0,), "neon, or", "length", 0))
    (ids,) = PROMPTS.reflection(TASK, [endless])
    assert "reached the length limit" in decoded(ids)
    assert "reached the length limit" not in decoded(PROMPTS.reflection(TASK, [rollout(0, True, "helium")])[0])


def test_an_extent_leaves_out_attempts_and_then_the_middle_of_each():
    texts = [f"begin{n} {'x' * 500} end{n}" for n in range(4)]
    group = [rollout(n, n < 2, text, f"first {'y' * 500} last") for n, text in enumerate(texts)]
    shown = decoded(PROMPTS.reflection(TASK, group, (), Extent(1))[0])
    assert [f"begin{n}" in shown for n in range(4)] == [True, False, True, False]  # one of each outcome
    assert "x" * 500 in shown
    cut = decoded(PROMPTS.reflection(TASK, group, (), Extent(1, 40))[0])
    assert all(word in cut for word in ("begin0", "end0", "begin2", "end2", "first", "last"))
    assert cut.count("[... left out ...]") == 4
    assert "x" * 40 not in cut
    assert "y" * 40 not in cut


GOOD = '{"kind": "strategy", "title": "Mass", "content": "Compare masses."}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"Here you are:\n```json\n{GOOD}\n```\nDone.",
        f"<think>{{}}</think>{GOOD}",
        f'{{"kind": "nonsense"}} {GOOD} {{"broken": ',
        f"```json\n[1]\n```\nrather\n```json\n{GOOD}\n```",
    ],
)
def test_well_formed_items_are_extracted(text):
    assert PROMPTS.parse_reflection(text).items == [ParsedInsight("strategy", "Mass: Compare masses.")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "{",
        '{"kind": "strategy"}',
        '{"kind": "strategy", "title": 1, "content": "x"}',
        "[" * 100_000,
        '{"kind": "strategy", "title": "t", "content": "' + "x" * 5000 + '"}',
        '{"kind": "order", "title": "a", "content": "b"}',
    ],
)
def test_malformed_items_are_dropped(text):
    assert PROMPTS.parse_reflection(text).items == []


@pytest.mark.parametrize("text", ["a", "Read twice: slowly.", "word " * 300])
def test_a_placebo_has_the_length_of_the_text_to_a_word(text):
    placebo = PROMPTS.placebo(text)
    wanted, longest_word = len(TOKENIZER.encode(text)), max(map(len, placebo.split()))
    assert wanted <= len(TOKENIZER.encode(placebo)) <= wanted + longest_word
    assert "twice" not in placebo
