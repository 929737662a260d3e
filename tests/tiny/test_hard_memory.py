"""What each difficulty of the hard world is there for, seen by an ideal reader of what retrieval returns.

A policy that never learns attempts every training task by habit, reflects with errors, and a real memory keeps what it
writes. The reader's rule then says how a teacher with these items would answer the held-out tasks.
"""

import random
from dataclasses import replace

import pytest

from pmd.bootstrap.hard_samples import BOXES, HABIT, RARE_BOXES, choice, reflection_shares
from pmd.bootstrap.tiny_tokenizer import make_tokenizer
from pmd.config.load import load_config
from pmd.memory import EpochRecord, GroupRecord, ProceduralMemory, evolve_memory
from pmd.memory.behaviour_writer import Written
from pmd.memory.reflect import Reflections
from pmd.memory.retrieve import Retriever
from pmd.tasks import load_tasks
from pmd.tasks.prompts.hard_words import HARD_VOCABULARY, HardWordPrompts, attempt, stated_choices
from pmd.tasks.prompts.words import Line, parse_line
from pmd.tiny.hard_world import HARD_NAMES, RARE, Plan, make_hard_world
from pmd.types import Completion, InsightChange, Rollout
from pmd.verifiers.boxes import verify_each_box

SEED = 0
CONFIG = load_config(["configs/tiny_hard.yaml"], []).run
PROMPTS = HardWordPrompts(make_tokenizer(HARD_VOCABULARY))
WORLD = make_hard_world(CONFIG.data.world.families, SEED)


@pytest.fixture(scope="module")
def tasks():
    found = load_tasks(CONFIG.data, SEED)
    return found | {"test": found["test"][::2]}


@pytest.fixture(scope="module")
def memory(tmp_path_factory, tasks):
    """A memory after one epoch of a policy that does not learn."""
    path = tmp_path_factory.mktemp("memory") / "memory.sqlite"
    found = ProceduralMemory(path, CONFIG.memory, [task.memory_key for task in tasks["train"]], frozenset())
    draw = random.Random(5)
    evolve_memory(attempted(draw, 0, tasks["train"], found), found, first_strategies, 0)
    yield found
    found.close()


def attempted(draw, epoch, tasks, memory):
    record, changes = EpochRecord(epoch), []
    for number, task in enumerate(tasks):
        group = [habitual_rollout(draw, task, f"{epoch}.{number}", each) for each in range(2)]
        record.groups[f"{epoch}.{number}"] = GroupRecord(number, task, group, (), (), memory.generation)
        judged = {about for rollout in group for about in PROMPTS.judged(rollout)}
        for name, box, right in sorted(judged):
            shares = reflection_shares(box)
            (said,) = draw.choices(list(shares), list(shares.values()))
            kind = "strategy" if right else "lesson"
            changes.append(InsightChange(task.task_id, kind, Line(kind, name, said).text, (group[0].rollout_id,)))
    record.reflections = Reflections(tuple(changes))
    return record


def habitual_rollout(draw, task, group_id, each):
    words = task.question.split()
    plan = Plan((words[-2], words[-1]), tuple(words[2:13:2]))
    first, second = (box[1:] for box in draw.choices(list(HABIT), list(HABIT.values()), k=2))
    text = attempt(plan, (first, second))
    completion = Completion((1,), (0.0,), text, "stop", 0)
    return Rollout(f"{group_id}/{each}", group_id, task.task_id, (1,), completion, verify_each_box(task, text))


def first_strategies(clusters):
    """Describe each cluster as the model is taught to: by the first line of its prompt."""
    prompts = [PROMPTS.tokenizer.decode(PROMPTS.abstraction(cluster)).split() for cluster in clusters]
    return Written([f"pattern use {words[4]} {words[5]}" for words in prompts])


def answered(memory, tasks, **changes):
    """Return the reader's accuracy, and its share of rare boxes for names that stand for one."""
    retriever = Retriever(memory.store, memory.index, replace(CONFIG.memory, **changes))
    right, reached = [], []
    for task in tasks:
        about: dict[str, list[Line]] = {}
        for item in retriever.retrieve(task.memory_key, seed=0):
            line = parse_line(item.text, HARD_NAMES, BOXES)
            lines = [line] if line else [Line("solved", name, box) for name, box in stated_choices(item.text)]
            for each in lines:
                about.setdefault(each.name, []).append(each)
        shares = {name: choice(about.get(name, [])) for name in task.question.split()[-2:]}
        first, second = (share.get(f"@{WORLD[name]}", 0.0) for name, share in shares.items())
        right.append(first * second)
        reached += [
            sum(share.get(box, 0.0) for box in RARE_BOXES) for name, share in shares.items() if WORLD[name] in RARE
        ]
    return sum(right) / len(right), sum(reached) / len(reached)


def test_deeper_retrieval_answers_more_and_reaches_rare_boxes(memory, tasks):
    (one, none), (five, _), (twelve, most) = (answered(memory, tasks["test"], k=k) for k in (1, 5, 12))
    assert one + 0.05 < five
    assert five + 0.05 < twelve
    assert none < 0.01  # a rare box is opened only where the common ones are known to be wrong
    assert most > 0.5
    assert twelve < 0.5  # a memory of a policy that never learned leaves the rare boxes open


def test_experience_is_narrower_than_insight_and_behaviours_add_to_it(memory, tasks):
    experience, insight, both = (answered(memory, tasks["test"], levels=levels)[0] for levels in ([0], [1], [1, 2]))
    assert experience + 0.1 < insight < both
