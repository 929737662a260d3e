"""The tiny tokenizer and the tiny language's prompts, compared with texts written by hand."""

import pytest
from transformers import AutoTokenizer

from pmd.bootstrap.tiny_tokenizer import make_tokenizer
from pmd.errors import AlignmentError
from pmd.tasks.prompts.parsing import ParsedInsight
from pmd.tasks.prompts.words import VOCABULARY, WordPrompts, solve_prompt
from pmd.tiny.world import NAMES
from pmd.types import Completion, Message, Rollout, Task, Verdict

ZIB, OTHER = NAMES[:2]
STATED = f"task red 3 blue 5 green 1 gold 7 plan {ZIB}"
TASK = Task("t", (Message("user", STATED),), "boxes", "train", answer="3 7")


@pytest.fixture(scope="module")
def prompts():
    return WordPrompts(make_tokenizer())


def rollout(text, correct=False, status="wrong_answer"):
    completion = Completion((2,), (0.0,), text, "stop", 0)
    verdict = Verdict(float(correct), correct, "ok" if correct else status)
    return Rollout("r", "g", "t", (1,), completion, verdict)


def test_tokenizer_round_trip(tmp_path):
    tokenizer = make_tokenizer()
    text = solve_prompt(STATED, [f"strategy use {ZIB} red>gold"])
    ids = tokenizer.encode(text)
    assert ids == [VOCABULARY.index(word) for word in text.split()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text.removeprefix("<bos> ")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text) == ids
    assert loaded.decode(ids) == text
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_the_student_sees_the_bare_task(prompts):
    assert prompts.tokenizer.decode(prompts.student(TASK)) == f"<bos> {STATED}"


def test_the_teacher_sees_memory_lines_then_success_or_failure(prompts):
    lines = [f"lesson not {ZIB} red>blue", f"pattern use {OTHER} gold>red"]
    shown = prompts.teacher(TASK, lines, "red>gold ; red 3 gold 7 <eos>", None)
    assert prompts.tokenizer.decode(shown) == (
        f"<bos> memory {lines[0]} . {lines[1]} . solved use {ZIB} red>gold ; red 3 gold 7 . {STATED}"
    )
    shown = prompts.teacher(TASK, [], None, rollout("red>blue ; red 3 blue 5"))
    assert prompts.tokenizer.decode(shown) == f"<bos> memory failed not {ZIB} red>blue . {STATED}"
    assert prompts.teacher(TASK, [], None, rollout("; ; ;", status="format")) == prompts.student(TASK)


def test_one_reflection_per_rule_and_verdict(prompts):
    group = [
        rollout("red>gold ; red 3 gold 7 <eos>", correct=True),
        rollout("red>blue ; red 3 blue 5"),
        rollout("red>gold ; red 3 gold 7", correct=True),
        rollout("; gold", status="format"),
        rollout("red>green ; red 3 green 1", status="error"),
    ]
    texts = [prompts.tokenizer.decode(ids) for ids in prompts.reflection(TASK, group)]
    assert texts == [
        f"<bos> {STATED} red>gold ; red 3 gold 7 verdict right insight",
        f"<bos> {STATED} red>blue ; red 3 blue 5 verdict wrong insight",
    ]


def test_reflections_are_parsed_strictly(prompts):
    assert prompts.parse_reflection(f"strategy use {ZIB} red>gold <eos>").items == [
        ParsedInsight("strategy", f"strategy use {ZIB} red>gold")
    ]
    lesson = f"lesson not {ZIB} red>gold"
    assert prompts.parse_reflection(lesson).items == [ParsedInsight("lesson", lesson)]
    for text in ("", "strategy", f"failed not {ZIB} red>gold", f"lesson use {ZIB} red>gold", "1 2 3 4"):
        assert prompts.parse_reflection(text).items == []


def test_abstraction_starts_with_the_name_that_succeeded_most(prompts):
    lesson, strategy = f"lesson not {ZIB} red>blue", f"strategy use {ZIB} red>gold"
    shown = prompts.abstraction([f"lesson not {OTHER} red>blue", lesson, strategy, strategy])
    text = f"<bos> insights {strategy} . {lesson} . lesson not {OTHER} red>blue . pattern"
    assert prompts.tokenizer.decode(shown) == text
    assert prompts.abstraction([lesson]) == []
    assert prompts.parse_abstraction(f"use {ZIB} red>gold <eos>") == f"pattern use {ZIB} red>gold"
    for malformed in ("", f"not {ZIB} red>gold", f"use {ZIB}", f"pattern use {ZIB} red>gold"):
        assert prompts.parse_abstraction(malformed) is None


def test_text_of_another_world_is_refused(prompts):
    with pytest.raises(AlignmentError, match="no word 'What'"):
        prompts.student(Task("t", (Message("user", "What is this?"),), "mcq", "train"))
