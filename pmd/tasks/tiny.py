"""The tiny world as tasks: the size of a world and a seed in, a list of tasks per split out. No torch, no files.

Training, validation and held-out problems of a family are distinct; every family occurs in all three, so that what is
measured is whether a family was learnt, not whether a problem was.
"""

from pmd.config.schema import TinyWorldConfig
from pmd.tasks.prompts.words import memory_key, statement
from pmd.tiny.world import Problem, answer, family_problems, make_world
from pmd.types import Message, Split, Task


def load_tiny(world: TinyWorldConfig, seed: int) -> dict[Split, list[Task]]:
    """Return the tasks of every split, family by family; the same seed gives the same tasks."""
    sizes: dict[Split, int] = {
        "train": world.train_per_family,
        "validation": world.validation_per_family,
        "test": world.test_per_family,
    }
    tasks: dict[Split, list[Task]] = {split: [] for split in sizes}
    for name, rule in make_world(world.boxes, world.families, seed).items():
        problems = iter(family_problems(name, world.boxes, seed, sum(sizes.values())))
        for split, size in sizes.items():
            for index in range(size):
                task_id = f"tiny{world.boxes}-s{seed}/{split}/{name}/{index}"
                tasks[split].append(_task(task_id, split, next(problems), rule))
    return tasks


def _task(task_id: str, split: Split, problem: Problem, rule: str) -> Task:
    return Task(
        task_id=task_id,
        messages=(Message("user", statement(problem)),),
        verifier="boxes",
        split=split,
        answer=answer(rule, problem),
        memory_key=memory_key(problem),
        domain=f"tiny{problem.boxes}",
    )
