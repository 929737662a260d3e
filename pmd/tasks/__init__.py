"""Loads the tasks of a run from the `data` section, split into train, validation and test. One file per data set.

Held-out tasks never reach memory: `duplicated_task_ids` finds training tasks that duplicate one.
"""

from collections.abc import Mapping, Sequence
from datetime import date

from pmd.config.schema import DataConfig, RunConfig
from pmd.errors import ConfigError
from pmd.tasks.lines import cap_problems
from pmd.tasks.prompts.check import describe_prompt_problems
from pmd.tasks.splits import (
    DuplicateReport,
    duplicated_task_ids,
    find_duplicates,
    first_shuffled,
    hold_out,
    tasks_of_epoch,
)
from pmd.tasks.table import check_columns, is_data_set
from pmd.types import Split, Task

__all__ = [
    "DuplicateReport",
    "describe_data_problems",
    "describe_task_problems",
    "duplicated_task_ids",
    "find_duplicates",
    "load_tasks",
    "tasks_of_epoch",
    "validates_on_test",
]


def load_tasks(config: DataConfig, seed: int) -> dict[Split, list[Task]]:
    """Return the tasks of a run by split.

    Without validation tasks of its own, a data set gives `validation_share` of its training tasks, at least one; with a
    share of 0, or a single training task, the test tasks serve as both (see `validates_on_test`).

    Raises:
        ConfigError: naming every bad line and missing file at once.
    """
    seed = seed if config.seed is None else config.seed
    tasks, problems = _read(config, seed)
    if problems:
        raise ConfigError(cap_problems(problems))
    by_split: dict[Split, list[Task]] = {"train": [], "validation": [], "test": []}
    for task in tasks:
        by_split[task.split].append(task)
    if config.validation_share and not by_split["validation"] and len(by_split["train"]) > 1:
        share = max(config.validation_share, 1 / len(by_split["train"]))
        by_split["train"], by_split["validation"] = hold_out(by_split["train"], share, "validation", seed)
    validation = by_split["validation"] or by_split["test"]
    if unknown := sorted(config.weights.keys() - {task.domain for task in by_split["train"]}):
        known = ", ".join(sorted({task.domain for task in by_split["train"]}))
        raise ConfigError(
            f"data.weights names {', '.join(unknown)}, which has no training tasks; the domains are {known}."
        )
    return {
        "train": first_shuffled(by_split["train"], config.max_train, seed),
        "validation": first_shuffled(validation, config.max_validation, seed),
        "test": first_shuffled(by_split["test"], config.max_test, seed),
    }


def validates_on_test(tasks: Mapping[Split, Sequence[Task]]) -> bool:
    """Whether the best checkpoint is chosen on test tasks, which makes its test score too good."""
    return not {task.task_id for task in tasks["validation"]}.isdisjoint(task.task_id for task in tasks["test"])


def describe_task_problems(run: RunConfig) -> list[str]:
    """Return what is wrong with a run's local data files and prompts; never raises and never uses the network."""
    return [*describe_data_problems(run.data), *describe_prompt_problems(run)]


def describe_data_problems(config: DataConfig) -> list[str]:
    """Return what is wrong with a run's local data files; never raises and never uses the network."""
    if problems := _window_problems(config):
        return problems
    if config.task in ("tiny", "tiny_hard") or (
        config.path is None and config.task in ("sciknoweval", "livecodebench")
    ):
        return []
    if config.task == "jsonl" and any(path and is_data_set(path) for path in (config.path, config.validation_path)):
        return check_columns(config)
    if config.task == "verifiers":
        from pmd.tasks.environment import describe_taskset_problems

        return describe_taskset_problems(config)
    return cap_problems(_read(config, config.seed or 0)[1])


def _window_problems(config: DataConfig) -> list[str]:
    """Return what is wrong with LiveCodeBench's date window."""
    days, problems = [], []
    for key, value in (("first_day", config.first_day), ("end_day", config.end_day)):
        try:
            days.append(date.fromisoformat(value))
        except ValueError:
            problems.append(f"data.{key}={value} must be a day such as 2025-02-01.")
    if not problems and days[0] >= days[1]:
        problems.append(f"data.first_day={config.first_day} must lie before data.end_day={config.end_day}.")
    return problems


def _read(config: DataConfig, seed: int) -> tuple[list[Task], list[str]]:
    match config.task:
        case "tiny":
            from pmd.tasks.tiny import load_tiny

            return [task for part in load_tiny(config.world, seed).values() for task in part], []
        case "tiny_hard":
            from pmd.tasks.tiny_hard import load_tiny_hard

            return [task for part in load_tiny_hard(config.world, seed).values() for task in part], []
        case "sciknoweval":
            from pmd.tasks.sciknoweval import read_sciknoweval

            return read_sciknoweval(config, seed)
        case "jsonl":
            from pmd.tasks.jsonl import read_jsonl

            return read_jsonl(config, seed)
        case "livecodebench":
            from pmd.tasks.livecodebench import read_livecodebench

            return read_livecodebench(config, seed)
        case "verifiers":
            from pmd.tasks.environment import read_environment

            return read_environment(config, seed)
        case "tooluse":
            from pmd.tasks.tooluse import read_tooluse

            return read_tooluse(config, seed)
