"""Finds the verifier that a task names, and checks before a run that it can be used.

A verifier takes a task and the text of a completion, and returns a verdict. Its feedback is shown to the model and must
never contain the expected answer; what explains a verdict to people goes into `explanation`.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from pmd.errors import ConfigError
from pmd.tasks.combined import Part, is_combined, parts_of
from pmd.tasks.environment import VERIFIER as ENVIRONMENT
from pmd.tasks.jsonl import CLASS_PATH, NAMED_VERIFIERS
from pmd.tasks.lines import cap_problems
from pmd.types import Task
from pmd.verifiers.combined import Combined
from pmd.verifiers.reward import as_verifier

Verifier = Callable[[Task, str], object]  # a Verdict, a reward, or whether the completion is right
SandboxChoice = Literal["strongest", "namespaces", "bubblewrap", "landlock", "rlimits"]
log = logging.getLogger(__name__)


@functools.cache
def find_verifier(name: str) -> Verifier:
    """Return the verifier of that name; its module is imported on first use."""
    if is_combined(name):
        return Combined([(part.weight, _with_options(part)) for part in parts_of(name)])
    match name:
        case "mcq":
            from pmd.verifiers.mcq import verify_mcq as found
        case "exact":
            from pmd.verifiers.exact import verify_exact as found
        case "math":
            from pmd.verifiers.math import verify_math as found
        case "tool_use":
            from pmd.verifiers.tool_use import verify_tool_use as found
        case "code":
            from pmd.verifiers.code import verify_code as found
        case "boxes":
            from pmd.verifiers.boxes import verify_boxes as found
        case "environment":
            from pmd.verifiers.environment import verify_environment as found
        case "each_box":
            from pmd.verifiers.boxes import verify_each_box as found
        case _:
            return load_custom_verifier(name)
    return found


@functools.cache
def load_custom_verifier(path: str) -> Verifier:
    """Return the function at a dotted path, or the one instance of the class there; see `as_verifier`."""
    module_name, _, attribute = path.rpartition(".")
    found = getattr(importlib.import_module(module_name), attribute)
    return as_verifier(found)


def _with_options(part: Part) -> Verifier:
    """Return one of several verifiers, with its options: a built-in one reads them from the task's `tests`."""
    if not part.options:
        return find_verifier(part.name)
    if part.name in NAMED_VERIFIERS:
        verifier = find_verifier(part.name)
        return lambda task, completion: verifier(replace(task, tests={**task.tests, **part.options}), completion)
    module_name, _, attribute = part.name.rpartition(".")
    return as_verifier(getattr(importlib.import_module(module_name), attribute), part.options)


def describe_verifier_problem(name: str) -> str | None:
    """Return why a verifier of that name cannot be used, or None."""
    if name == "code":
        return _describe_sandbox_problem()
    if name in (*NAMED_VERIFIERS, ENVIRONMENT):
        return None
    if is_combined(name):
        try:
            find_verifier(name)
        except (Exception, SystemExit) as error:  # of the user's code, or options that it does not take
            return f"verifier={name}: cannot be made ({type(error).__name__}: {error}); check names and options."
        return None
    if not CLASS_PATH.fullmatch(name):
        known = ", ".join(NAMED_VERIFIERS)
        return f"verifier={name}: must be {known} or a class path such as package.module.Class; name one of them."
    try:
        found = load_custom_verifier(name)
    except (Exception, SystemExit) as error:  # an import runs the user's code, which may raise anything
        return f"verifier={name}: cannot be loaded ({type(error).__name__}: {error}); check the path and PYTHONPATH."
    if not callable(found):
        return f"verifier={name}: must take (task, completion), or (prompts, completions, ...) as in TRL."
    return None


def describe_answer_problems(tasks: Iterable[Task]) -> list[str]:
    """Return a sentence for each task whose answer its verifier cannot judge, with the place it was read from."""
    mathematical = [task for task in tasks if any(part.name == "math" for part in parts_of(task.verifier))]
    if not mathematical:
        return []
    from pmd.verifiers.math import describe_gold_problems

    return describe_gold_problems(mathematical)


def prepare_verifiers(tasks: Iterable[Task], sandbox_level: SandboxChoice) -> list[str]:
    """Check the verifiers of all tasks and set the sandbox level; return lines to print at the start of a run.

    Raises:
        ConfigError: naming every verifier that cannot be used, and every answer that its verifier cannot judge.
    """
    tasks = list(tasks)
    parts = {part.name for task in tasks for part in parts_of(task.verifier)}
    names = sorted((parts & {*NAMED_VERIFIERS}) | {task.verifier for task in tasks})
    if "code" in names:
        from pmd.verifiers.code import choose_sandbox_level

        choose_sandbox_level(None if sandbox_level == "strongest" else sandbox_level)
    problems = [problem for name in names if (problem := describe_verifier_problem(name))]
    problems += describe_answer_problems(tasks)
    if problems:
        raise ConfigError(cap_problems(problems))
    if "code" not in names:
        return []
    from pmd.verifiers.code import sandbox

    return [sandbox().describe()]


def _describe_sandbox_problem() -> str | None:
    from pmd.verifiers.code import sandbox
    from pmd.verifiers.sandbox.pool import SandboxUnavailable

    try:
        sandbox().describe()
    except SandboxUnavailable as error:
        return f"verifier=code: {error}."
    return None
