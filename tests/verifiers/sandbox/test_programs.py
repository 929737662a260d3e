"""No hostile program gets a verdict it has not earned or leaves anything behind; every correct program passes."""

import json
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attacks_on_comparison
import attacks_on_files
import attacks_on_kernel
import attacks_on_limits
import attacks_on_network
import attacks_on_processes
import attacks_on_returned_values
import attacks_on_the_host
import attacks_on_verdict
import correct_concurrency
import correct_files
import correct_functions
import correct_language
import correct_libraries
import correct_mappings
import correct_streams
import pytest

from pmd.cli.score import main

STDIN = {"kind": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}], "memory_mb": 256}
CALL = {"kind": "functional", "entry": "add", "cases": [{"args": [1, 2], "expected": 3}], "memory_mb": 256}
REFUSED = {"wrong_answer", "runtime_error"}


@dataclass(frozen=True)
class Group:
    """Programs, the task they are run on, and the statuses that are right."""

    programs: dict[str, str]
    task: dict[str, Any]
    time_limit_s: float
    statuses: set[str]
    memory_mb: int = 256

    @property
    def tests(self) -> dict[str, Any]:
        return {**self.task, "time_limit_s": self.time_limit_s, "memory_mb": self.memory_mb}


HOSTILE = {
    "verdict": Group(attacks_on_verdict.PROGRAMS, STDIN, 10, REFUSED),
    "comparison": Group(attacks_on_comparison.PROGRAMS, STDIN, 10, REFUSED),
    "processes": Group(attacks_on_processes.PROGRAMS, STDIN, 10, REFUSED),
    "kernel": Group(attacks_on_kernel.PROGRAMS, STDIN, 10, REFUSED),
    "network": Group(attacks_on_network.PROGRAMS, STDIN, 10, REFUSED),
    "host": Group(attacks_on_the_host.PROGRAMS, STDIN, 10, REFUSED),
    "files": Group(attacks_on_files.PROGRAMS, STDIN, 10, REFUSED),
    "returned value": Group(attacks_on_returned_values.FUNCTIONS, CALL, 5, REFUSED),
    "long returned value": Group(attacks_on_returned_values.LONG, CALL, 5, {"output_limit"}),
    "time": Group(attacks_on_limits.TIME | attacks_on_the_host.TIME, STDIN, 0.15, {"timeout"}),
    "memory at once": Group(attacks_on_limits.MEMORY_AT_ONCE, STDIN, 60, {"memory"}, memory_mb=64),
    "memory": Group(attacks_on_limits.MEMORY_FILLED_SLOWLY, STDIN, 60, {"memory"}, memory_mb=64),
    "several limits": Group(attacks_on_limits.SEVERAL, STDIN, 2, {"memory", "runtime_error", "timeout"}),
    "output": Group(attacks_on_limits.OUTPUT, STDIN, 20, {"output_limit"}),
}
CORRECT = {
    "streams": Group(correct_streams.PROGRAMS, STDIN, 20, {"ok"}),
    "language": Group(correct_language.PROGRAMS, STDIN, 20, {"ok"}),
    "libraries": Group(correct_libraries.PROGRAMS, STDIN, 20, {"ok"}),
    "mappings": Group(correct_mappings.PROGRAMS, STDIN, 20, {"ok"}),
    "own files": Group(correct_files.PROGRAMS, STDIN, 20, {"ok"}),
    "concurrency": Group(correct_concurrency.PROGRAMS, STDIN, 20, {"ok"}),
    "functions": Group(correct_functions.FUNCTIONS, CALL, 20, {"ok"}),
}
GROUPS = HOSTILE | CORRECT
#: How many programs of each group run once, where the level changes little: the first, and every eighth after it.
SAMPLE = 8
#: What a level does not offer: a writable directory, modes of files; as root, a bound on threads; a bound on files.
GAPS = {
    "namespaces": set(),
    "landlock": {
        *("cwd and env", "write a file", "temporary file", "thread bomb", "file too large", "sqlite file", "shelve"),
        *("tempfile", "tmpfs and memory", "write helper import", "runpy", "execfile"),
        *("NamedTemporaryFile", "mkstemp", "pathlib mkdir", "10MB file"),
        *("lock an own file", "lockf", "fsync", "map an own file"),
    },
    "bubblewrap": {"many files", "deep folders", "thread bomb", "shelve"},
}
#: Names of the files that the programs try to write.
LEFT_BEHIND = {"pmd_hostile", "pmd_hostile.py", "x", "l", "note"}


def fence(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def host_state() -> set[str]:
    """Return the supervisors that run, and the hostile programs' files outside the sandbox."""
    processes = {entry for entry in os.listdir("/proc") if entry.isdigit() and is_supervisor(entry)}
    places = ("/tmp", "/dev/shm", "/", str(Path(os.__file__).parent))
    return processes | {f"{place}/{name}" for place in places for name in os.listdir(place) if name in LEFT_BEHIND}


def is_supervisor(pid: str) -> bool:
    """Whether a process is a sandbox of this one; a supervisor has its trainer's pid among its arguments."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(os.getpid()).encode() in arguments and any(b"pmd.verifiers.sandbox" in one for one in arguments)


def score(folder: Path, level: str, step: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the verdict of every `step`th program of each group, by group and program, from one `pmd score`."""
    tasks = [{"id": name, "prompt": "Add.", "verifier": "code", "tests": group.tests} for name, group in GROUPS.items()]
    programs = [
        (name, title, program)
        for name, group in GROUPS.items()
        for title, program in list(group.programs.items())[::step]
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    completions = [{"id": name, "completion": fence(program)} for name, _, program in programs]
    (folder / "completions.jsonl").write_text("".join(json.dumps(completion) + "\n" for completion in completions))
    paths = [f"--{name}={folder / name}.jsonl" for name in ("tasks", "completions")]
    assert main([*paths, f"--out={folder / 'verdicts.jsonl'}", "--workers=3", f"--sandbox={level}"]) == 0
    verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    return {(name, title): verdict for (name, title, _), verdict in zip(programs, verdicts, strict=True)}


def check(folder: Path, level: str, step: int = 1) -> None:
    """Run every `step`th program of each group; every verdict must be right, and nothing may be left behind."""
    before, memory_before = host_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts = score(folder, level, step)
    wrong = {
        str((name, title)): (verdict["status"], verdict["feedback"][-300:])
        for (name, title), verdict in verdicts.items()
        if verdict["status"] not in GROUPS[name].statuses or verdict["correct"] != (verdict["status"] == "ok")
        if title not in GAPS[level]
    }
    assert not wrong, json.dumps(wrong, indent=1)
    deadline = time.monotonic() + 5
    while host_state() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert host_state() - before == set()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before < 200 << 10  # KB


def test_no_program_was_lost():
    assert sum(len(group.programs) for group in HOSTILE.values()) >= 658
    left_out = len(correct_libraries.RECURSIVE_IN_C) if sys.version_info >= (3, 12) else 0
    assert sum(len(group.programs) for group in CORRECT.values()) >= 438 - left_out


def test_every_verdict_is_right_and_nothing_is_left_behind_in_namespaces(tmp_path):
    check(tmp_path, "namespaces")


@pytest.mark.parametrize("step", [SAMPLE, pytest.param(1, marks=pytest.mark.slow)])
def test_every_verdict_is_right_and_nothing_is_left_behind_under_landlock(tmp_path, step):
    """All groups in any case; what a level adds is the same code for every program of a group."""
    check(tmp_path, "landlock", step)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
def test_every_verdict_is_right_and_nothing_is_left_behind_in_bubblewrap(tmp_path):
    check(tmp_path, "bubblewrap")
