"""The hard tiny world as tasks, generated from a seed. No torch, no files.

Every plan is a different pair of names, and every name occurs in all three splits: a held-out task is solved by
whoever has learned both of its names from other plans.
"""

import random

from pmd.config.schema import TinyWorldConfig
from pmd.tasks.prompts.hard_words import memory_key, statement
from pmd.tiny.hard_world import Plan, answer, make_hard_world, partners, random_plan
from pmd.types import Message, Split, Task


def load_tiny_hard(world: TinyWorldConfig, seed: int) -> dict[Split, list[Task]]:
    """Return the tasks of every split, name by name; the same seed gives the same tasks.

    `world.families` is the number of names, an even one; the sizes per family count the plans that begin with a name.
    """
    sizes: dict[Split, int] = {
        "train": world.train_per_family,
        "validation": world.validation_per_family,
        "test": world.test_per_family,
    }
    boxes = make_hard_world(world.families, seed)
    tasks: dict[Split, list[Task]] = {split: [] for split in sizes}
    for name in boxes:
        others = iter(partners(name, list(boxes), seed))
        for split, size in sizes.items():
            for index in range(size):
                other = next(others)
                plan = random_plan(random.Random(f"hard tiny row {seed} {name} {other}"), (name, other))
                task_id = f"tiny_hard-s{seed}/{split}/{name}/{index}"
                tasks[split].append(_task(task_id, split, plan, (boxes[name], boxes[other])))
    return tasks


def _task(task_id: str, split: Split, plan: Plan, boxes: tuple[str, str]) -> Task:
    return Task(
        task_id=task_id,
        messages=(Message("user", statement(plan)),),
        verifier="each_box",
        split=split,
        answer=answer(boxes, plan),
        memory_key=memory_key(plan),
        domain="tiny_hard",
    )
