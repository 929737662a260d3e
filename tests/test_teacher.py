"""What the teacher sees, and what it must not see."""

import random
from dataclasses import replace

import pytest
from examples import make_rollout

from pmd.config.schema import TeacherConfig
from pmd.tasks.prompts.base import PromptFormat
from pmd.teacher import ContextBuilder, TeacherContext
from pmd.types import MemoryItem, Message, Rollout, Task, Verdict

TASK = Task("t", (Message("user", "question"),), "exact", "train")


class Spelled(PromptFormat):
    """Prompts of one id per letter, so that a test can read them."""

    def student(self, task):
        return ids(task.question)

    def teacher(self, task, items, success, failure, show_attempt=True):
        parts = [f"[{item}]" for item in items]
        parts += [f"<{success}>"] if success is not None else []
        attempt = failure.completion.text if failure is not None and show_attempt else ""
        parts += [f"!{attempt}:{failure.verdict.feedback}!"] if failure is not None else []
        return ids("".join(parts) + task.question)


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def read(context) -> str:
    return "".join(chr(i) for i in context.prompt_ids)


def rollout(number: int, correct: bool, status: str = "", feedback: str = "no") -> Rollout:
    verdict = Verdict(float(correct), correct, status or ("ok" if correct else "wrong_answer"), feedback)
    return make_rollout(number, verdict=verdict)


def item(number: int, similarity: float = 0.5, length: int = 1) -> MemoryItem:
    return MemoryItem(number, 1, "strategy", f"{number}" * length, 1, "other", similarity)


def build(group, items=(), past=None, tokens=768, generation=3, **config):
    builder = ContextBuilder(Spelled(), TeacherConfig(**config), tokens)
    return builder.build(TASK, group, items, past, generation, random.Random(0))


def test_a_success_of_a_sibling_never_ones_own():
    group = [rollout(0, True), rollout(1, False), rollout(2, False)]
    own, *others = build(group, context="sibling")
    assert read(own) == "question"
    assert not own.shows_anything
    assert [read(c) for c in others] == ["<answer0>question"] * 2


def test_an_attempt_in_memory_is_not_shown_to_the_rollout_that_it_is():
    group = [rollout(0, True), rollout(1, False)]
    memory = [replace(item(1), level=0, kind="experience", text=f"answer{n}") for n in range(3)]
    own, other = build(group, memory, context="memory")
    assert (read(own), read(other)) == ("[answer1][answer2]question", "[answer0][answer2]question")
    _, beside = build(group, memory, context="both")  # nor beside the success that is shown anyway
    assert read(beside) == "[answer2]<answer0>question"


def test_one_thing_to_show_is_enough():
    shown = {"items": (item(1),)}, {"success": "yes"}, {"shows_failure": True}
    assert [TeacherContext("r", (), **one).shows_anything for one in (*shown, {})] == [True, True, True, False]


def test_two_successes_show_each_other():
    first, second = build([rollout(0, True), rollout(1, True)], context="sibling")
    assert (first.success, second.success) == ("answer1", "answer0")


def test_ones_own_failure_only_where_no_success_can_be_shown():
    alone = build([rollout(0, False), rollout(1, False)], context="sibling")
    assert [read(c) for c in alone] == ["!:no!question"] * 2
    assert all(c.shows_failure for c in alone)
    helped = build([rollout(0, False), rollout(1, True)], context="sibling")[0]
    assert not helped.shows_failure
    assert not any(c.shows_failure for c in build([rollout(0, False)] * 2, context="sibling", feedback=False))


def test_the_failed_attempt_is_shown_only_if_asked_for():
    (shown,) = build([rollout(0, False)], context="sibling", failed_attempt=True)
    assert (read(shown), shown.shows_failure) == ("!answer0:no!question", True)
    assert read(build([rollout(0, False)], [item(7)])[0]) == "[7]!:no!question"  # beside memory too


@pytest.mark.parametrize("failed_attempt", [False, True])
@pytest.mark.parametrize("feedback", ["", " \n"])
def test_a_failure_without_feedback_is_never_shown(feedback, failed_attempt):
    group = [rollout(0, False, feedback=feedback), rollout(1, False)]
    silent, told = build(group, context="sibling", failed_attempt=failed_attempt)
    assert (read(silent), silent.shows_anything) == ("question", False)
    assert told.shows_failure


def test_a_failure_that_the_prompt_has_no_words_for_is_not_counted_as_shown():
    class Mute(Spelled):
        def teacher(self, task, items, success, failure, show_attempt=True):
            return super().teacher(task, items, success, None, show_attempt)

    builder = ContextBuilder(Mute(), TeacherConfig(context="both"), 768)
    bare, with_item = (builder.build(TASK, [rollout(0, False)], items, None, 0, random.Random(0))[0]
                       for items in ((), (item(1),)))  # fmt: skip
    assert (bare.shows_failure, bare.shows_anything) == (False, False)
    assert (with_item.shows_failure, with_item.shows_anything) == (False, True)


def test_an_attempt_without_a_verdict_is_no_failure():
    assert not build([rollout(0, False, "sandbox_error")], context="sibling")[0].shows_anything


@pytest.mark.parametrize(
    ("context", "expected"),
    [("none", "question"), ("sibling", "!:no!question"), ("memory", "[7]question"), ("both", "[7]<past>question")],
)
def test_each_kind_of_context(context, expected):
    assert read(build([rollout(0, False)], [item(7)], "past", context=context)[0]) == expected


def test_a_sibling_goes_before_an_earlier_success():
    found = build([rollout(0, False), rollout(1, True)], [], "past", context="both")
    assert [c.success for c in found] == ["answer1", "past"]


def test_memory_is_cut_by_whole_items_the_least_similar_first():
    items = [item(1, 0.9, 10), item(2, 0.1, 10), item(3, 0.5, 10)]
    found = build([rollout(0, True)], items, tokens=24, context="memory")[0]
    assert read(found) == "[1111111111][3333333333]question"
    assert (len(found.items), found.num_dropped) == (2, 1)


def test_whole_items_within_the_budget_whatever_their_lengths():
    draw = random.Random(0)
    for _ in range(300):
        items = [item(n, draw.random(), draw.randint(1, 30)) for n in range(draw.randint(0, 6))]
        budget, longest = draw.randint(1, 80), draw.randint(8, 90)
        found = build([rollout(0, False)], items, "past", tokens=budget, context="both", max_prompt_tokens=longest)[0]
        assert len(found.prompt_ids) <= longest
        without = len("<past>" * (found.success is not None) + "question")
        assert len(found.prompt_ids) <= without + budget
        assert read(found) == "".join(f"[{p.text}]" for p in found.items) + (
            f"<{found.success}>question" if found.success else "question"
        )
        assert set(found.items) | set(found.dropped) == set(items)
        assert not set(found.items) & set(found.dropped)


def test_nothing_fits():
    found = build([rollout(0, True)], [item(1, 0.9, 100)], tokens=24, context="memory")[0]
    assert read(found) == "question"
    assert not found.shows_anything
    assert found.num_dropped == 1


def test_a_success_too_long_for_the_prompt_is_left_out_whole():
    found = build([rollout(0, False)], [item(1)], "x" * 100, context="both", max_prompt_tokens=20)[0]
    assert read(found) == "[1]question"
    assert found.success is None
    assert found.attempt_dropped
    assert not build([rollout(0, False)], [item(1)], "past", context="both")[0].attempt_dropped
    failed = build([rollout(0, False)], [item(1)], context="both", max_prompt_tokens=12)[0]
    assert (read(failed), failed.shows_failure, failed.attempt_dropped) == ("[1]question", False, True)


def test_the_generation_of_the_memory_is_recorded():
    assert build([rollout(0, True)], [item(1)], context="memory", generation=9)[0].memory_generation == 9


def test_a_context_of_which_nothing_is_said_shows_nothing():
    assert not TeacherContext("r0", ()).shows_anything
