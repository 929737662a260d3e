"""The tiny world as tasks, generated from a seed. No torch, no files.

Training, validation and test puzzles of a family are distinct, and every family occurs in all three splits: evaluation
measures whether a family was learned, not whether a puzzle was memorized.
"""

from pmd.config.schema import TinyWorldConfig
from pmd.tasks.prompts.words import memory_key, statement
from pmd.tiny.world import Puzzle, answer, family_puzzles, make_world
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
        puzzles = iter(family_puzzles(name, world.boxes, seed, sum(sizes.values())))
        for split, size in sizes.items():
            for index in range(size):
                task_id = f"tiny{world.boxes}-s{seed}/{split}/{name}/{index}"
                tasks[split].append(_task(task_id, split, next(puzzles), rule))
    return tasks


def _task(task_id: str, split: Split, puzzle: Puzzle, rule: str) -> Task:
    return Task(
        task_id=task_id,
        messages=(Message("user", statement(puzzle)),),
        verifier="boxes",
        split=split,
        answer=answer(rule, puzzle),
        memory_key=memory_key(puzzle),
        domain=f"tiny{puzzle.boxes}",
    )
