"""Every hostile program gets no verdict it has not earned, and nothing of it stays; every correct program passes."""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import attacks
import correct
import hostile
import idioms
import newcomers
import pytest
import strangers
import unusual

from pmd.cli.score import main

STDIN = {"kind": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}], "memory_mb": 256}
CALL = {"kind": "functional", "entry": "add", "cases": [{"args": [1, 2], "expected": 3}], "memory_mb": 256}
#: group: programs, tests, the statuses that are right
GROUPS = {
    "refused": (hostile.REFUSED, {**STDIN, "time_limit_s": 5}, {"wrong_answer", "runtime_error"}),
    "function": (hostile.FUNCTIONS, {**CALL, "time_limit_s": 5}, {"wrong_answer", "runtime_error"}),
    "hang": (hostile.HANGS, {**STDIN, "time_limit_s": 0.6}, {"timeout"}),
    "greedy": (hostile.GREEDY, {**STDIN, "time_limit_s": 20}, {"memory"}),
    "stopped": (hostile.STOPPED, {**STDIN, "time_limit_s": 4}, {"memory", "runtime_error", "timeout"}),
    "flood": (hostile.FLOODS, {**STDIN, "time_limit_s": 20}, {"output_limit"}),
    "refused 2": (unusual.REFUSED, {**STDIN, "time_limit_s": 5}, {"wrong_answer", "runtime_error"}),
    "function 2": (unusual.FUNCTIONS, {**CALL, "time_limit_s": 5}, {"wrong_answer", "runtime_error", "output_limit"}),
    "hang 2": (unusual.HANGS, {**STDIN, "time_limit_s": 0.6}, {"timeout"}),
    "greedy 2": (unusual.GREEDY, {**STDIN, "time_limit_s": 60}, {"memory"}),
    "flood 2": (unusual.FLOODS, {**STDIN, "time_limit_s": 20}, {"output_limit"}),
    "refused 3": (attacks.REFUSED, {**STDIN, "time_limit_s": 10}, {"wrong_answer", "runtime_error"}),
    "function 3": (attacks.FUNCTIONS, {**CALL, "time_limit_s": 5}, {"wrong_answer", "runtime_error"}),
    "hang 3": (attacks.HANGS, {**STDIN, "time_limit_s": 0.6}, {"timeout"}),
    "greedy 3": (attacks.GREEDY, {**STDIN, "time_limit_s": 60}, {"memory"}),
    "flood 3": (attacks.FLOODS, {**STDIN, "time_limit_s": 20}, {"output_limit"}),
    "refused 4": (strangers.REFUSED, {**STDIN, "time_limit_s": 10}, {"wrong_answer", "runtime_error"}),
    "function 4": (strangers.FUNCTIONS, {**CALL, "time_limit_s": 5}, {"wrong_answer", "runtime_error"}),
    "hang 4": (strangers.HANGS, {**STDIN, "time_limit_s": 0.6}, {"timeout"}),
    "greedy 4": (strangers.GREEDY, {**STDIN, "time_limit_s": 60}, {"memory"}),
    "flood 4": (strangers.FLOODS, {**STDIN, "time_limit_s": 20}, {"output_limit"}),
    "correct 4": (newcomers.PROGRAMS, {**STDIN, "time_limit_s": 20}, {"ok"}),
    "correct 3": (idioms.PROGRAMS, {**STDIN, "time_limit_s": 20}, {"ok"}),
    "correct function 3": (idioms.FUNCTIONS, {**CALL, "time_limit_s": 20}, {"ok"}),
    "correct 2": (unusual.CORRECT, {**STDIN, "time_limit_s": 20}, {"ok"}),
    "correct function 2": (unusual.CORRECT_FUNCTIONS, {**CALL, "time_limit_s": 20}, {"ok"}),
    "correct": (correct.PROGRAMS, {**STDIN, "time_limit_s": 20}, {"ok"}),
    "correct function": (correct.FUNCTIONS, {**CALL, "time_limit_s": 20}, {"ok"}),
}
#: What a level does not offer: a writable directory, modes of files; as root, a bound on threads; a bound on files.
GAPS = {
    "namespaces": set(),
    "landlock": {
        "cwd and env",
        "write a file",
        "temporary file",
        "thread bomb",
        "file too large",
        "sqlite file",
        "shelve",
        "tempfile",
        "flock self deadlock",
        "tmpfs and memory",
        "write helper import",
        "runpy",
        "execfile",
        "NamedTemporaryFile",
        "mkstemp",
        "pathlib mkdir",
        "10MB file",
    },
    "bubblewrap": {"many files", "deep folders", "thread bomb", "shelve"},
}
NEEDS_BWRAP = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")]
#: Names that the programs write to.
LEFT_BEHIND = {"pmd_hostile", "pmd_hostile.py", "x", "l", "note"}


def fence(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def host_state() -> set[str]:
    processes = {entry for entry in os.listdir("/proc") if entry.isdigit() and is_supervisor(entry)}
    places = ("/tmp", "/dev/shm", "/", str(Path(os.__file__).parent))
    return processes | {f"{place}/{name}" for place in places for name in os.listdir(place) if name in LEFT_BEHIND}


def is_supervisor(pid: str) -> bool:
    try:
        return b"pmd.verifiers.sandbox" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def score(folder: Path, groups: list[str], level: str) -> dict[tuple[str, str], dict]:
    tasks = [{"id": group, "prompt": "Add.", "verifier": "code", "tests": GROUPS[group][1]} for group in groups]
    lines = [(group, name, program) for group in groups for name, program in GROUPS[group][0].items()]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    completions = [{"id": group, "completion": fence(program)} for group, _, program in lines]
    (folder / "completions.jsonl").write_text("".join(json.dumps(completion) + "\n" for completion in completions))
    paths = [f"--{name}={folder / name}.jsonl" for name in ("tasks", "completions")]
    assert main([*paths, f"--out={folder / 'verdicts.jsonl'}", "--workers=3", f"--sandbox={level}"]) == 0
    verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    return {(group, name): verdict for (group, name, _), verdict in zip(lines, verdicts, strict=True)}


def test_there_are_more_than_a_hundred_hostile_programs():
    assert sum(len(programs) for group, (programs, _, _) in GROUPS.items() if "correct" not in group) >= 600


@pytest.mark.parametrize("level", ["namespaces", "landlock", pytest.param("bubblewrap", marks=NEEDS_BWRAP)])
def test_every_verdict_is_right_and_nothing_stays(tmp_path, level):
    before, memory_before = host_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts = score(tmp_path, list(GROUPS), level)
    wrong = {
        key: (verdict["status"], verdict["feedback"][-300:])
        for key, verdict in verdicts.items()
        if verdict["status"] not in GROUPS[key[0]][2] or verdict["correct"] != (verdict["status"] == "ok")
        if key[1] not in GAPS[level]
    }
    assert not wrong, json.dumps({str(key): value for key, value in wrong.items()}, indent=1)
    deadline = time.monotonic() + 5
    while host_state() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert host_state() - before == set()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before < 200 << 10  # KB
