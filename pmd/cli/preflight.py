"""The pre-flight check of `fit`, `validate`, `test` and `check`: what takes seconds is tried before weights load.

The tasks are read, the model's files looked at, one prompt of each role is written, and each verifier judges an empty
and a plausible completion.
"""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pmd.config.check import describe_rounding
from pmd.config.schema import RunConfig
from pmd.engines.make import check_engine
from pmd.errors import ConfigError
from pmd.model_check import check_pretrained, fit_to_positions, max_positions
from pmd.pretrained import describe_noise, load_model_config, load_tokenizer
from pmd.rollouts.datamodule import refuse_long_prompts
from pmd.tasks import find_duplicates, load_tasks
from pmd.tasks.prompts import PromptFormat, make_prompts
from pmd.tasks.prompts.examples import example_prompts
from pmd.types import Split, Task, Verdict
from pmd.verifiers.pool import VerificationPool, judge
from pmd.verifiers.resolve import prepare_verifiers

MAX_TRIAL_S = 20.0  # for an example: a verifier that is slower than this is named, not refused


@dataclass
class Ready:
    """What the check found in order, and lines to print about it."""

    config: RunConfig  # with the limits that the model can hold
    tasks: Mapping[Split, list[Task]]
    prompts: PromptFormat
    notes: list[str] = field(default_factory=list)  # at the start of every run
    report: list[str] = field(default_factory=list)  # of `pmd check` alone


def check_run(config: RunConfig) -> Ready:
    """Try everything that needs no weights; return what can be used.

    Raises:
        ConfigError: with every problem of engine, tasks, verifiers, model and prompts.
    """
    problems: list[str] = []
    with _collecting(problems):
        check_engine(config)
    tasks = load_tasks(config.data, config.seed_everything)
    everything = [task for part in tasks.values() for task in part]
    notes, report = describe_rounding(config), [", ".join(f"{len(part)} {name} tasks" for name, part in tasks.items())]
    with _collecting(problems):
        notes += prepare_verifiers(everything, config.verifiers.sandbox)
        warnings, lines = try_verifiers(everything, config)
        notes, report = [*notes, *warnings], [*report, *lines]
    duplicates = find_duplicates(everything)
    if duplicates.same_prompt or duplicates.same_stem:
        notes.append(str(duplicates))
    fitted, prompts = config, None
    with _collecting(problems):
        fitted, prompts, lines = _check_model(config, tasks)
        notes += lines
        warnings, lines = try_prompts(fitted, prompts, (tasks["train"] or everything)[0])
        notes, report = [*notes, *warnings], [*report, *lines]
    if problems or prompts is None:
        raise ConfigError(problems)
    return Ready(fitted, tasks, prompts, notes, report)


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _check_model(config: RunConfig, tasks: Mapping[Split, list[Task]]) -> tuple[RunConfig, PromptFormat, list[str]]:
    """Refuse a model or tokenizer that cannot serve the tasks; return the limits that it can hold, and the prompts."""
    architecture, tokenizer = load_model_config(config.model), load_tokenizer(config.model)
    check_pretrained(config, architecture, tokenizer, [task for part in tasks.values() for task in part])
    prompts = make_prompts(config, tokenizer)
    longest = refuse_long_prompts(tasks, prompts, config.rollouts.max_prompt_tokens)
    config, lines = fit_to_positions(config, max_positions(architecture), longest)
    return config, prompts, [*lines, *describe_noise(architecture)]


def try_prompts(config: RunConfig, prompts: PromptFormat, task: Task) -> tuple[list[str], list[str]]:
    """Write one prompt of each role; return warnings, and a line with their lengths.

    Raises:
        ConfigError: the chat template refuses one.
    """
    lengths = {name: len(ids) for name, ids in example_prompts(prompts, task).items()}
    limits = {
        "teacher": ("teacher.max_prompt_tokens", config.teacher.max_prompt_tokens),
        "reflection": ("reflection.max_prompt_tokens", config.reflection.max_prompt_tokens),
    }
    warnings = [
        f"{key}={limit} is below the {lengths[name]} tokens of an example of that prompt (task {task.task_id}), so "
        "little or nothing can be shown in it; raise it."
        for name, (key, limit) in limits.items()
        if lengths[name] > limit
    ]
    return warnings, [
        f"tokens of prompts of task {task.task_id}: " + ", ".join(f"{name} {n}" for name, n in lengths.items())
    ]


def try_verifiers(tasks: list[Task], config: RunConfig) -> tuple[list[str], list[str]]:
    """Have each verifier judge an empty and a plausible completion of a task; return warnings, and what it said.

    Raises:
        ConfigError: a verifier fails on both.
    """
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.verifier, task)
    problems, warnings, report = [], [], []
    for name, task in first.items():
        trials = _try_both(task, min(config.verifiers.deadline_s, MAX_TRIAL_S))
        said = (
            f"{trial.verdict.status if trial.verdict.scored else 'no verdict'} for {kind} completion"
            for kind, trial in trials
        )
        report.append(f"verifier {name}: {', '.join(said)}")
        failed = [(kind, trial) for kind, trial in trials if not trial.verdict.scored]
        errors = ", ".join(f"{kind} one ({trial.reason})" for kind, trial in failed)
        where = f"verifier={name}, task {task.task_id}: no verdict on a completion: {errors}"
        if len(failed) == len(trials) and not any(trial.is_late for _, trial in failed):
            problems.append(f"{where}; repair it, and try it with `python -m pmd score`.")
        elif failed:
            warnings.append(f"{where}.")
    if problems:
        raise ConfigError(problems)
    return warnings, report


@dataclass(frozen=True)
class Trial:
    """What a verifier said about one example."""

    verdict: Verdict
    reason: str  # why there is no verdict
    is_late: bool


def _try_both(task: Task, deadline_s: float) -> list[tuple[str, Trial]]:
    """Return what the task's verifier says about an empty and a plausible completion, both at once."""
    errors: dict[str, str] = {}

    def trying(task: Task, text: str) -> Verdict:
        try:
            return judge(task, text)
        except (Exception, SystemExit) as error:  # of the user's code; its traceback comes with the run's first crash
            errors[text] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{_place(error)}"
            return Verdict(0.0, False, "error")

    trials = []
    with VerificationPool(2, deadline_s, verifier=trying) as pool:
        texts = {"an empty": "", "a plausible": _plausible(task)}
        waiting = {kind: pool.submit(task, text) for kind, text in texts.items()}
        for kind, text in texts.items():
            verdict = waiting[kind].result()
            is_late = verdict.status == "error" and text not in errors
            reason = f"none within {deadline_s:g} s" if is_late else errors.get(text, f"status {verdict.status}")
            trials.append((kind, Trial(verdict, reason, is_late)))
    return trials


def _place(error: BaseException) -> str:
    """Return the line of the user's code that failed, if it did."""
    ours = Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not Path(frame.filename).is_relative_to(ours)]
    return f", in {Path(theirs[0].filename).name}, line {theirs[0].lineno}" if theirs else ""


def _plausible(task: Task) -> str:
    """Return a completion in every form that verifiers look for."""
    answer = task.answer or "42"
    return f"The answer is {answer}.\n```python\nprint({answer!r})\n```\n\\boxed{{{answer}}}\n<answer>{answer}</answer>"
