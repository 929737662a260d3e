"""A trainer that is killed in the middle of verification leaves no process, no temporary file and no shared memory."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import verifier_that_hangs
from child_processes import all_end, command_lines, read_proc, start, watch

ROOT = Path(__file__).parents[3]
#: A tiny model that reads any text, few and short rollouts.
FLAGS = [
    "--config", "configs/tiny_sciknoweval.yaml", "--method=grpo", "--memory.enabled=false", "--data.task=jsonl",
    "--rollouts.tasks_per_step=4", "--rollouts.max_new_tokens=4", "--verification.samples=1",
    "--verification.final_samples=1", "--verification.pass_at=[1]", "--verifiers.workers=2",
]  # fmt: skip


def start_trainer(folder: Path, hangs_in: str) -> subprocess.Popen[bytes]:
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
    environment = {
        "TMPDIR": f"{folder}/temporary",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache",  # torch creates it on import, one for each user
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
        verifier_that_hangs.ASKED: f"{folder}/asked",
    }
    command = [
        sys.executable,
        "-m",
        "pmd",
        "fit",
        "--allow-module",
        "verifier_that_hangs",
        *FLAGS,
        *paths,
        f"--run_dir={folder}/run",
    ]
    return start(command, environment)


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


def wait_for_both(trainer: subprocess.Popen[bytes], folder: Path) -> dict[int, bytes]:
    """Wait until a program and the math helper are at work; return all processes of the trainer."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert trainer.poll() is None, "the trainer ended by itself"
        found = processes_of(trainer.pid, folder)
        running = any(read_proc(f"/proc/{pid}/comm").strip() == verifier_that_hangs.NAME.encode() for pid in found)
        if running and (folder / "asked").exists() and any(b"math_worker" in command for command in found.values()):
            time.sleep(0.2)  # by now the helper is computing
            return processes_of(trainer.pid, folder)
        time.sleep(0.1)
    raise AssertionError("verification did not begin")


SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
Trainers = dict[signal.Signals, tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture(scope="module")
def trainers(tmp_path_factory) -> Iterator[Trainers]:
    """One trainer per signal, all started at once because most of their time goes into imports."""
    folders = {number: tmp_path_factory.mktemp(number.name) for number in SIGNALS}
    started = {number: (start_trainer(folder, "train"), folder) for number, folder in folders.items()}
    yield started
    for trainer, _ in started.values():
        trainer.kill()
        trainer.wait()


@pytest.mark.parametrize("number", SIGNALS)
def test_nothing_outlives_a_trainer_that_is_killed_while_it_trains(trainers, number):
    check_that_nothing_is_left(*trainers[number], number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_trainer_that_is_killed_while_it_evaluates(tmp_path, number):
    trainer = start_trainer(tmp_path, "test")
    try:
        check_that_nothing_is_left(trainer, tmp_path, number)
    finally:
        trainer.kill()
        trainer.wait()


def check_that_nothing_is_left(trainer: subprocess.Popen[bytes], folder: Path, number: signal.Signals) -> None:
    memory_before = orphaned_memory()
    found = wait_for_both(trainer, folder)
    assert len(found) >= 4  # supervisor, zygote, program, math helper
    watched = watch(found)
    trainer.send_signal(number)
    assert trainer.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert all_end(watched)
    assert processes_of(trainer.pid, folder) == {}
    assert list((folder / "temporary").iterdir()) == []
    assert orphaned_memory() - memory_before == set()
    left = {path.name for path in folder.iterdir()}
    assert left == {"train.jsonl", "test.jsonl", "temporary", "run", "cache", "asked"}
