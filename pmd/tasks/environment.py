"""Tasks of an installed environment for the `verifiers` package (0.4): its taskset's prompts, answered in one turn.

`data.taskset` is what verifiers calls the taskset's configuration: `id`, and arguments of the environment's own. The
environment's rewards judge the answers (pmd/verifiers/environment.py). Environments whose answers cannot be judged from
one reply alone are refused: those with tools, agents of their own, or a sandbox.
"""

import functools
import importlib.util
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pmd.config.schema import DataConfig
from pmd.tasks.splits import hold_out_test, prompt_of
from pmd.types import Message, Split, Task

if TYPE_CHECKING:
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

#: What tasks of environments name as their verifier; task files cannot name it.
VERIFIER = "environment"
ROLES = ("system", "user", "assistant")


def describe_taskset_problems(config: DataConfig) -> list[str]:
    """Return what is wrong with the keys, without importing anything of the environment."""
    taskset_id = config.taskset.get("id")
    if not isinstance(taskset_id, str) or not taskset_id:
        return [f"data.taskset={json.dumps(config.taskset)} names no environment; write data.taskset.id=NAME."]
    return []


def read_environment(config: DataConfig, seed: int) -> tuple[list[Task], list[str]]:
    """Return the tasks of the training taskset and the held-out one, or of one with a seeded share held out."""
    if problems := describe_taskset_problems(config):
        return [], problems
    if importlib.util.find_spec("verifiers") is None:
        return [], ["data.task=verifiers needs the package verifiers; install it with pip install 'pmd[verifiers]'."]
    train, problems = _read(config.taskset, "train", config.max_train)
    if config.test_taskset:
        test, wrong = _read({**config.taskset, **config.test_taskset}, "test", config.max_test)
        return train + test, problems + wrong + _describe_repeats(train, test, config)
    source = f"data.taskset.id={config.taskset['id']}"
    tasks, too_few = hold_out_test(train, seed, source, "give data.test_taskset")
    return tasks, problems or too_few


def _describe_repeats(train: Sequence[Task], test: Sequence[Task], config: DataConfig) -> list[str]:
    """Return why the held-out tasks hold nothing out; single questions that recur are reported by every data set."""
    train_ids = {task.task_id for task in train}
    repeated = [task.task_id for task in test if task.task_id in train_ids]
    place = f"data.test_taskset={json.dumps(config.test_taskset)}"
    remedy = "give arguments that choose other tasks, or leave it out to hold a tenth out."
    if repeated:
        return [
            f"{place}: {len(repeated)} of {len(test)} ids, such as {repeated[0]}, are those of training tasks; {remedy}"
        ]
    if test and {prompt_of(task) for task in test} <= {prompt_of(task) for task in train}:
        return [f"{place}: each of its {len(test)} tasks is a training task, too; {remedy}"]
    return []


def _read(options: Mapping[str, Any], split: Split, count: int | None) -> tuple[list[Task], list[str]]:
    place = f"data.taskset.id={options['id']}"
    try:
        found = load_tasks_of(json.dumps(options, sort_keys=True), count)
    except (Exception, SystemExit) as error:  # importing and loading run the environment's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return [], [f"{place}: cannot be loaded ({reason}); install the environment, and check data.taskset."]
    problems = _describe_needs(list(found.values()))
    if problems:
        return [], [f"{place}: {problem}; choose an environment that is answered in one turn." for problem in problems]
    tasks = {}
    for number, (key, task) in enumerate(found.items()):
        messages, rule = _messages_of(task)
        task_id = str(task.data.id or task.data.name or f"{options['id']}-{split}-{number}")
        if not rule and task_id in tasks:
            rule = "its id occurs twice"
        if rule:
            problems.append(f"{place}: task {task_id}: {rule}; repair the environment, or choose another.")
            continue
        columns = {"taskset": json.dumps(options, sort_keys=True), "count": count, "key": key}
        tasks[task_id] = Task(task_id, messages, VERIFIER, split, columns=columns)
    return list(tasks.values()), problems


@functools.cache
def load_tasks_of(taskset: str, count: int | None) -> Mapping[str, "vf.Task"]:
    """Return the tasks of a taskset by key, loaded once.

    Args:
        taskset: JSON of its configuration.
        count: how many tasks are taken of a taskset without end.

    Raises:
        ValueError: it has no end and there is no count, or it is no single-agent environment.
    """
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

    options = json.loads(taskset)
    config = vf.taskset_config_type(options["id"]).model_validate(options)
    if vf.environment_class(options["id"]) is not vf.SingleAgentEnv:
        raise ValueError("it brings an environment of several agents")
    loaded = vf.load_taskset(config)
    if loaded.toolsets(config):
        raise ValueError("its tasks need tools")
    if not loaded.bounded:
        if count is None:
            raise ValueError("it has no end: set data.max_train, and data.max_test for data.test_taskset")
        loaded = loaded.take(count)
    return {task.key: task for task in loaded}


def _describe_needs(tasks: list["vf.Task"]) -> list[str]:
    """Return what the tasks need besides a reply; all tasks of a taskset are of one class."""
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

    if not tasks:
        return ["it has no tasks"]
    kind, config = type(tasks[0]), tasks[0].config
    needs = []
    if kind.NEEDS_CONTAINER:
        needs.append("its tasks run in a container")
    if kind.toolsets(config):
        needs.append("its tasks need tools")
    needs += [
        f"its tasks have a {name} step in a sandbox"
        for name in ("setup", "finalize", "stage_verifier")
        if getattr(kind, name) is not getattr(vf.Task, name)
    ]
    signals = tasks[0].hooks("reward")
    needs += [f"its reward {signal.__name__} needs a sandbox" for signal in signals if _needs_runtime(signal)]
    if not signals and not config.judges:
        needs.append("its tasks have no reward")
    return needs


def _needs_runtime(signal: Any) -> bool:
    parameter = inspect.signature(signal).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _messages_of(task: "vf.Task") -> tuple[tuple[Message, ...], str]:
    """Return what the student sees, or the rule that the task's prompt breaks."""
    data = task.data
    messages = [Message("system", data.system_prompt)] if data.system_prompt else []
    prompt: Any = [] if data.prompt is None else data.prompt
    if isinstance(prompt, str):
        messages.append(Message("user", prompt))
    else:
        for message in prompt:
            if message.role not in ROLES or not isinstance(message.content, str):
                return (), "its prompt holds tool calls or pictures"
            messages.append(Message(message.role, message.content))
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        return (), "its prompt does not end with a user message"
    return tuple(messages), ""
