"""The tiny world's tasks and their verifier."""

import subprocess
import sys

import pytest

from pmd.config.schema import TinyWorldConfig
from pmd.tasks.prompts.words import parse_statement
from pmd.tasks.tiny import load_tiny
from pmd.tiny.world import answer, make_world
from pmd.types import Message, Task
from pmd.verifiers.boxes import verify_boxes


@pytest.mark.parametrize("boxes", [4, 6])
def test_tasks_of_a_world(boxes):
    world = TinyWorldConfig(boxes=boxes, families=16)
    tasks = load_tiny(world, seed=2)
    assert {split: len(found) for split, found in tasks.items()} == {"train": 96, "validation": 32, "test": 64}
    rules = make_world(boxes, 16, 2)
    for split, found in tasks.items():
        for task in found:
            puzzle = parse_statement(task.question)
            assert puzzle is not None
            assert task.split == split
            assert task.answer == answer(rules[puzzle.name], puzzle)
            assert task.memory_key.split() == [w for w in task.question.split() if w not in ("task", "plan")]
    assert load_tiny(world, seed=2) == tasks


def test_ids_are_unique_and_questions_never_cross_splits():
    tasks = [task for found in load_tiny(TinyWorldConfig(), seed=0).values() for task in found]
    assert len({task.task_id for task in tasks}) == len({task.question for task in tasks}) == len(tasks)
    assert tasks[0].task_id.startswith("tiny4-s0/train/")


def test_split_sizes_do_not_change_the_training_tasks():
    small = load_tiny(TinyWorldConfig(test_per_family=1), seed=0)
    large = load_tiny(TinyWorldConfig(test_per_family=50), seed=0)
    assert small["train"] == large["train"]


@pytest.mark.parametrize(
    ("text", "status", "given"),
    [
        ("red>gold ; red 3 gold 7", "ok", "3 7"),
        ("red>gold ; red 3 gold 7 <eos>", "ok", "3 7"),
        ("; 3 7", "ok", "3 7"),
        ("gold>red ; gold 7 red 3", "wrong_answer", "7 3"),
        ("red>blue ; red 3 blue 5", "wrong_answer", "3 5"),
        ("red>gold ; red 3 gold 7 blue 5", "format", None),
        ("red>gold ; red 3", "format", None),
        ("red>gold ; red 3 ; gold 7", "format", None),
        ("red 3 gold 7", "format", None),
        ("red>gold ; red 3 gold 77", "format", None),
        ("", "format", None),
    ],
)
def test_verdicts(text, status, given):
    question = Message("user", "task red 3 blue 5 green 1 gold 7 plan zib")
    verdict = verify_boxes(Task("t", (question,), "boxes", "train", answer="3 7"), text)
    assert (verdict.status, verdict.answer) == (status, given)
    assert verdict.correct == (status == "ok")
    assert verdict.reward == float(verdict.correct)
    assert verdict.feedback
    assert not any(digit in verdict.feedback for digit in "37")


def test_tasks_and_verifier_need_no_torch():
    code = "import sys, pmd.tasks.tiny, pmd.verifiers.boxes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
