"""A trainer that is ended in the middle of verification leaves no process, no temporary file, no shared memory."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stubborn

ROOT = Path(__file__).parents[3]
#: A tiny model that reads any text, few and short rollouts.
FLAGS = [
    "--config", "configs/tiny_sciknoweval.yaml", "--method=grpo", "--memory.enabled=false", "--data.task=jsonl",
    "--rollouts.tasks_per_step=4", "--rollouts.max_new_tokens=4", "--verification.samples=1",
    "--verification.final_samples=1", "--verification.pass_at=[1]", "--verifiers.workers=2",
]  # fmt: skip


def start(folder: Path, hangs_in: str) -> subprocess.Popen[bytes]:
    """Start a training run whose verification hangs, in training or in the evaluation before it."""
    for split in ("train", "test"):
        answer = "hang" if split == hangs_in else "no"
        lines = [
            {"id": f"{split}{n}", "prompt": f"{split} {n}", "verifier": "stubborn.Stubborn", "answer": answer}
            for n in range(4)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "temporary").mkdir()
    paths = [f"--data.path={folder}/train.jsonl", f"--data.validation_path={folder}/test.jsonl"]
    environment = {"TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"  # torch makes it as it is imported, one for each user
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-m", "pmd", "fit", *FLAGS, *paths, f"--run_dir={folder}/run"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )


def read(path: str) -> bytes:
    """Return a file of /proc; empty if its process has ended."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def processes_of(trainer: int, folder: Path) -> dict[int, bytes]:
    """Return every living process that the trainer started, itself or through others, with its command line."""
    lines = {
        int(entry): read(f"/proc/{entry}/stat").rpartition(b") ")[2].split()
        for entry in os.listdir("/proc")
        if entry.isdigit()
    }
    family, found = {trainer}, {}
    while new := {pid for pid, fields in lines.items() if fields and int(fields[1]) in family} - family:
        family |= new
    for pid, fields in lines.items():
        command = read(f"/proc/{pid}/cmdline")
        named = f"\0{trainer}\0".encode() in command or f"{folder}/temporary".encode() in read(f"/proc/{pid}/environ")
        if pid != trainer and fields and fields[0] not in b"ZX" and (pid in family or named):
            found[pid] = command
    return found


def orphaned_memory() -> set[str]:
    """Return what lies in shared memory and is mapped by no process."""
    names = set(os.listdir("/dev/shm"))
    mapped = b"".join(read(f"/proc/{entry}/maps") for entry in os.listdir("/proc") if entry.isdigit())
    return {name for name in names if f"/dev/shm/{name}".encode() not in mapped}


def wait_for_both(trainer: subprocess.Popen[bytes], folder: Path) -> dict[int, bytes]:
    """Wait until a program and the math helper are at work; return all processes."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert trainer.poll() is None, "the trainer ended by itself"
        found = processes_of(trainer.pid, folder)
        running = any(read(f"/proc/{pid}/comm").strip() == stubborn.NAME.encode() for pid in found)
        if running and any(b"math_worker" in command for command in found.values()):
            time.sleep(2)  # the helper has read its question by now
            return processes_of(trainer.pid, folder)
        time.sleep(0.1)
    raise AssertionError("verification did not begin")


@pytest.mark.parametrize(
    ("number", "hangs_in"),
    [
        (signal.SIGKILL, "train"),
        (signal.SIGTERM, "train"),
        (signal.SIGINT, "train"),
        pytest.param(signal.SIGKILL, "test", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "test", marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_a_trainer_that_is_ended(tmp_path, number, hangs_in):
    memory_before = orphaned_memory()
    trainer = start(tmp_path, hangs_in)
    try:
        found = wait_for_both(trainer, tmp_path)
        assert len(found) >= 4  # supervisor, zygote, program, math helper
        watched = [os.pidfd_open(pid) for pid in found]
        trainer.send_signal(number)
        assert trainer.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    finally:
        trainer.kill()
        trainer.wait()
    for descriptor in watched:
        assert select.select([descriptor], [], [], 20)[0]
        os.close(descriptor)
    assert processes_of(trainer.pid, tmp_path) == {}
    assert list((tmp_path / "temporary").iterdir()) == []
    assert orphaned_memory() - memory_before == set()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"train.jsonl", "test.jsonl", "temporary", "run", "cache"}
