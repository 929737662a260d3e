"""`python -m pmd score`: verifies completions that were generated elsewhere.

Completions are streamed, so the file may be larger than memory. Bad lines in either file are reported before the first
completion is verified.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TextIO

from pmd.cli.arguments import make_parser
from pmd.config.schema import DataConfig
from pmd.errors import ConfigError
from pmd.tasks.code_tests import DEFAULT_TIME_LIMIT_S
from pmd.tasks.jsonl import read_task_file
from pmd.tasks.lines import Line, cap_problems, iterate_lines
from pmd.types import Task, Verdict
from pmd.verifiers.pool import DEADLINE_S, VerificationPool, Verified
from pmd.verifiers.resolve import describe_answer_problems, describe_verifier_problem

DESCRIPTION = """Verify completions that were generated elsewhere: one verdict line per completion, in the same order.

  python -m pmd score --tasks tasks.jsonl --completions completions.jsonl --out verdicts.jsonl

Task lines hold `id`, `prompt` (or `messages`), `verifier` (mcq, exact, math, tool_use, code, or a class path), and
`answer` or `tests`; a class path needs --allow-module. For code, `tests` is
  {"kind": "stdin", "cases": [{"input": "...", "output": "..."}], "time_limit_s": 2, "memory_mb": 512}
or
  {"kind": "functional", "entry": "add", "cases": [{"args": [1, 2], "expected": 3}]}
with `scorer` lcb (default) or sdpo. Completion lines hold `id` and `completion`; several may share an id.
Verdict lines hold `id`, `reward`, `correct`, `status`, `feedback`, `seconds`; for code also `passed`, the share of
tests that passed; for math also `explanation`, how the task's answer and the given one were read."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    parser = make_parser("score", DESCRIPTION)
    parser.add_argument("--tasks", type=Path, required=True, help="JSON Lines file of tasks")
    parser.add_argument("--completions", type=Path, required=True, help="JSON Lines file of completions")
    parser.add_argument("--out", type=Path, required=True, help="file for the verdict lines")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="completions verified at once (default: one per core)"
    )
    parser.add_argument(
        "--sandbox",
        choices=["namespaces", "bubblewrap", "landlock", "rlimits"],
        help="run programs at this level (default: the strongest there is; never rlimits, which is weak)",
    )
    parser.add_argument(
        "--allow-module",
        action="append",
        default=[],
        metavar="NAME",
        help="a module whose verifiers the tasks may name; it is imported and run (may be repeated)",
    )
    options = parser.parse_args(argv)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        score_file(options)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the verdicts so far are kept", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def score_file(options: argparse.Namespace) -> None:
    """Check both files, then verify the completions and write their verdicts.

    Raises:
        ConfigError: with every bad line, unusable verifier and missing folder.
    """
    if options.workers < 1:
        raise ConfigError(f"--workers={options.workers} must be at least 1; leave it out to use every core.")
    tasks = _checked_tasks(options)
    from pmd.verifiers.code import close_sandbox, sandbox

    if any(task.verifier == "code" for task in tasks.values()):
        print(sandbox().describe(), file=sys.stderr)
    statuses: Counter[str] = Counter()
    num_correct, started, last_report = 0, time.monotonic(), time.monotonic()
    try:
        with _opened(options.out) as out:
            for task_id, verdict in _judge(options.completions, tasks, options.workers):
                _write(out, options.out, {"id": task_id, **_fields(verdict)})
                statuses[verdict.status] += 1
                num_correct += verdict.correct
                if time.monotonic() - last_report > 2:
                    last_report = time.monotonic()
                    print(f"\rscored {statuses.total()}", end="", file=sys.stderr, flush=True)
    finally:
        close_sandbox()
    seconds = time.monotonic() - started
    counted = ", ".join(f"{status} {count}" for status, count in statuses.most_common())
    print(f"\rscored {statuses.total()} in {seconds:.1f} s: {num_correct} correct ({counted})", file=sys.stderr)


def _checked_tasks(options: argparse.Namespace) -> dict[str, Task]:
    found, problems = read_task_file(str(options.tasks), "test", DataConfig(allow_modules=options.allow_module))
    tasks = {task.task_id: task for task in found}
    if options.sandbox and any(task.verifier == "code" for task in found):
        from pmd.verifiers.code import choose_sandbox_level

        choose_sandbox_level(options.sandbox)
    named = {task.verifier: describe_verifier_problem(task.verifier) for task in found}
    problems += [f"{options.tasks}: {problem}" for problem in named.values() if problem]
    problems += describe_answer_problems(found)
    known = set(tasks) if not problems else None
    if options.completions.exists() and not options.completions.is_file():
        problems.append(f"--completions={options.completions} must be a file, since it is read twice; write one.")
    else:
        for entry in iterate_lines(options.completions, judged="completion"):
            problems += [entry] if isinstance(entry, str) else _check_completion(entry, known)
    problems += _out_problems(options)
    if problems:
        raise ConfigError(cap_problems(problems))
    return tasks


def _out_problems(options: argparse.Namespace) -> list[str]:
    out = options.out
    if not out.resolve().parent.is_dir():
        return [f"--out={out}: its folder does not exist; make it first."]
    if out.exists() and any(path.exists() and out.samefile(path) for path in (options.tasks, options.completions)):
        return [f"--out={out} must not be one of the files that are read; give another."]
    return []


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"--out={path} cannot be written ({error.strerror}); give another file.") from None


def _write(out: TextIO, path: Path, fields: dict[str, Any]) -> None:
    try:
        out.write(json.dumps(fields) + "\n")
        out.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # closing tries to write the rest again
            out.close()
        raise ConfigError(f"--out={path} cannot be written to ({error.strerror}); free some space.") from None


def _check_completion(line: Line, known: set[str] | None) -> list[str]:
    problems = []
    if not isinstance(line.fields.get("completion"), str):
        problems.append(line.problem("completion", "must be a string", "write the completion there"))
    if not isinstance(line.fields.get("id"), str | int):
        problems.append(line.problem("id", "must be the id of a task", "name the task"))
    elif known is not None and str(line.fields["id"]) not in known:
        problems.append(line.problem("id", "must be the id of a task in --tasks", "add the task or remove the line"))
    return problems


def _judge(path: Path, tasks: dict[str, Task], workers: int) -> Iterator[tuple[str, Verdict]]:
    """Yield verdicts in the order of the lines, reading a bounded number of lines ahead."""
    waiting: deque[tuple[str, Future[Verdict] | Verified]] = deque()
    with VerificationPool(workers, _deadline_s(tasks, workers)) as pool:
        for line in iterate_lines(path, judged="completion"):
            assert isinstance(line, Line)  # checked before
            task_id = str(line.fields["id"])
            waiting.append((line.fields["id"], pool.submit(tasks[task_id], line.fields["completion"])))
            if len(waiting) >= 4 * workers:
                name, future = waiting.popleft()
                yield name, future.result()
        while waiting:
            name, future = waiting.popleft()
            yield name, future.result()


def _deadline_s(tasks: dict[str, Task], workers: int) -> float:
    """Return the seconds after which a verification counts as hung: enough for the longest, waiting included."""
    tests = [task.tests for task in tasks.values() if task.verifier == "code"]
    longest = max((len(one["cases"]) * one.get("time_limit_s", DEFAULT_TIME_LIMIT_S) for one in tests), default=0.0)
    return (DEADLINE_S + longest) * max(1.0, workers / (os.cpu_count() or 1))


def _fields(verdict: Verdict) -> dict[str, Any]:
    passed = {"passed": round(verdict.tests.share, 6)} if verdict.tests else {}
    explanation = {"explanation": verdict.explanation} if verdict.explanation else {}
    fields = {
        "reward": verdict.reward,
        "correct": verdict.correct,
        "status": verdict.status,
        "feedback": verdict.feedback,
        "seconds": round(verdict.seconds, 6),
    }
    return fields | explanation | passed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
