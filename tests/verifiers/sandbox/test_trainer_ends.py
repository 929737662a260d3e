"""A trainer that is killed in the middle of verification leaves no process, no temporary file and no shared memory."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import verifier_that_hangs
from child_processes import all_end, command_lines, read_proc, watch
from command_line import PmdProcess, start_pmd

#: A tiny model that reads any text, few and short rollouts.
FLAGS = [
    "--config", "configs/tiny_sciknoweval.yaml", "--method=grpo", "--memory.enabled=false", "--data.task=jsonl",
    "--data.validation_share=0",
    "--rollouts.tasks_per_step=4", "--rollouts.max_new_tokens=4", "--verification.samples=1",
    "--verification.final_samples=1", "--verification.pass_at=[1]", "--verifiers.workers=2",
]  # fmt: skip


def start_trainer(folder: Path, hangs_in: str) -> PmdProcess:
    """Start a training run whose verification hangs, in training or in the evaluation before it."""
    for split in ("train", "test"):
        answer = "hang" if split == hangs_in else "no"
        lines = [
            {"id": f"{split}{n}", "prompt": f"{split} {n}", "verifier": "verifier_that_hangs.NeverReturns"}
            | {"answer": answer}
            for n in range(4)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "temporary").mkdir()
    paths = [f"--data.path={folder}/train.jsonl", f"--data.validation_path={folder}/test.jsonl"]
    environment = {"TMPDIR": f"{folder}/temporary", verifier_that_hangs.ASKED: f"{folder}/asked"}
    arguments = ["--allow-module", "verifier_that_hangs", *FLAGS, *paths, f"--run_dir={folder}/run"]
    return start_pmd("fit", *arguments, environment=environment)


def processes_of(trainer: int, folder: Path) -> dict[int, bytes]:
    """Return the command line of every living process that the trainer started, directly or indirectly."""
    commands = command_lines()
    stats = {pid: read_proc(f"/proc/{pid}/stat").rpartition(b") ")[2].split() for pid in commands}
    family, found = {trainer}, {}
    while new := {pid for pid, fields in stats.items() if fields and int(fields[1]) in family} - family:
        family |= new
    for pid, fields in stats.items():
        named = f"\0{trainer}\0".encode() in commands[pid]
        named |= f"{folder}/temporary".encode() in read_proc(f"/proc/{pid}/environ")
        if pid != trainer and fields and fields[0] not in b"ZX" and (pid in family or named):
            found[pid] = commands[pid]
    return found


def orphaned_memory() -> set[str]:
    """Return the files in shared memory that no process maps."""
    names = set(os.listdir("/dev/shm"))
    mapped = b"".join(read_proc(f"/proc/{pid}/maps") for pid in command_lines())
    return {name for name in names if f"/dev/shm/{name}".encode() not in mapped}


def wait_for_both(trainer: PmdProcess, folder: Path) -> dict[int, bytes]:
    """Wait until a program and the math helper are at work; return all processes of the trainer."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert not trainer.has_ended(), "the trainer ended by itself"
        found = processes_of(trainer.pid, folder)
        running = any(read_proc(f"/proc/{pid}/comm").strip() == verifier_that_hangs.NAME.encode() for pid in found)
        if running and (folder / "asked").exists() and any(b"math_worker" in command for command in found.values()):
            time.sleep(0.2)  # by now the helper is computing
            return processes_of(trainer.pid, folder)
        time.sleep(0.1)
    raise AssertionError("verification did not begin")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_a_trainer_that_is_killed_while_it_trains(tmp_path, number):
    check_that_nothing_is_left(tmp_path, "train", number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_trainer_that_is_killed_while_it_evaluates(tmp_path, number):
    check_that_nothing_is_left(tmp_path, "test", number)


def check_that_nothing_is_left(folder: Path, hangs_in: str, number: signal.Signals) -> None:
    memory_before = orphaned_memory()
    trainer = start_trainer(folder, hangs_in)
    try:
        found = wait_for_both(trainer, folder)
        assert len(found) >= 4  # supervisor, zygote, program, math helper
        watched = watch(found)
        trainer.send_signal(number)
    finally:
        ended = trainer.wait(60)
    assert ended.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), ended.stderr
    assert all_end(watched)
    assert processes_of(trainer.pid, folder) == {}
    assert list((folder / "temporary").iterdir()) == []
    assert orphaned_memory() - memory_before == set()
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "test.jsonl", "temporary", "run", "asked"}
