"""Splits tasks without leaks, draws nested subsets, and finds duplicates across splits.

Everything depends only on a seed and the tasks, so a resumed run sees the same split.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pmd.types import Split, Task

#: A train task `X/train` and a held-out task `X` are the same problem by the data set's protocol, not by accident.
TRAIN_SUFFIX = "/train"
#: Share of a single set of tasks that is held out for the test; data.validation_share is of what remains.
TEST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class DuplicateReport:
    """Train tasks that also occur among the held-out ones."""

    same_prompt: tuple[tuple[str, str], ...]  # (train id, held-out id) where the student sees the same text
    same_stem: tuple[tuple[str, str], ...]  # the same question with different options

    def __str__(self) -> str:
        if not self.same_prompt and not self.same_stem:
            return "No task occurs in both train and held-out data."
        num_same = len({train for train, _ in self.same_prompt})
        num_recurring = len({held_out for _, held_out in self.same_stem})
        parts = [f"Training tasks identical to a held-out task, and kept out of memory: {num_same}."]
        parts += [f"Held-out questions that recur in training with different options: {num_recurring}."]
        return " ".join(parts[:1] * bool(num_same) + parts[1:] * bool(num_recurring))


def prompt_of(task: Task) -> str:
    """Return the question with white space normalized; tasks with the same result look the same to a student."""
    return " ".join(task.question.split())


def stem_of(task: Task) -> str:
    """Return the question without its options, with white space normalized."""
    return " ".join(task.lookup_key.split())


def find_duplicates(tasks: Iterable[Task]) -> DuplicateReport:
    """Pair every train task with the held-out tasks that ask the same question."""
    tasks = list(tasks)
    train = [task for task in tasks if task.split == "train"]
    held_out = list({task.task_id: task for task in tasks if task.split != "train"}.values())
    same_prompt = _pairs(train, held_out, prompt_of)
    same_stem = [pair for pair in _pairs(train, held_out, stem_of) if pair not in set(same_prompt)]
    return DuplicateReport(tuple(same_prompt), tuple(same_stem))


def _pairs(train: Sequence[Task], held_out: Sequence[Task], key: Callable[[Task], str]) -> list[tuple[str, str]]:
    by_key: dict[str, list[str]] = defaultdict(list)
    for task in held_out:
        by_key[key(task)].append(task.task_id)
    pairs = [(task.task_id, other) for task in train for other in by_key.get(key(task), [])]
    return [(one, other) for one, other in pairs if one != other + TRAIN_SUFFIX]


def duplicated_task_ids(tasks_by_split: Mapping[Split, Sequence[Task]]) -> frozenset[str]:
    """Return the train tasks that must never enter memory, because a held-out task has the same prompt."""
    everything = {task.task_id: task for tasks in tasks_by_split.values() for task in tasks}
    return frozenset(train for train, _ in find_duplicates(everything.values()).same_prompt)


def hold_out(tasks: Sequence[Task], share: float, split: Split, seed: int) -> tuple[list[Task], list[Task]]:
    """Move about `share` of the tasks to `split`; tasks with the same stem stay on one side."""
    groups: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        groups[stem_of(task)].append(task)
    stems = list(groups)
    random.Random(f"hold out {split} {seed}").shuffle(stems)
    wanted, moved = round(share * len(tasks)), set[str]()
    for stem in stems:
        if len(moved) + len(groups[stem]) <= wanted:
            moved |= {task.task_id for task in groups[stem]}
    kept = [task for task in tasks if task.task_id not in moved]
    return kept, [replace(task, split=split) for task in tasks if task.task_id in moved]


def hold_out_test(tasks: Sequence[Task], seed: int, source: str, remedy: str) -> tuple[list[Task], list[str]]:
    """Hold out a test set where there is only one set of tasks; return all, and a problem if there are too few.

    Args:
        source: the key and value that name the tasks.
        remedy: what to do if there are too few.
    """
    train, test = hold_out(tasks, TEST_SHARE, "test", seed)
    problems = [] if train and test else [f"{source}: too few different tasks to hold some out; {remedy}."]
    return train + test, problems


def tasks_of_epoch(tasks: Sequence[Task], weights: Mapping[str, float], seed: int, epoch: int) -> list[Task]:
    """Return the tasks that an epoch visits: of each domain the weighted share, the next ones in every epoch."""
    by_domain: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        by_domain[task.domain].append(task)
    visited = []
    for domain, own in by_domain.items():
        count = max(1, round(weights.get(domain, 1.0) * len(own)))
        if count < len(own):
            random.Random(f"mixture {domain} {seed}").shuffle(own)
            own = [own[(epoch * count + number) % len(own)] for number in range(count)]
        visited += own
    return visited


def first_shuffled(tasks: Sequence[Task], count: int | None, seed: int) -> list[Task]:
    """Return the first `count` tasks of a seeded shuffle, so that a larger `count` only adds tasks."""
    if count is None or count >= len(tasks):
        return list(tasks)
    order = list(tasks)
    random.Random(f"subset {seed}").shuffle(order)
    return order[:count]
