"""Kills ranks of runs on several devices (gloo, on the CPU) at random moments, and resumes on one, two or four ranks.

python benchmarks/kill_rank.py [--strategy ddp] [--kills 20] [--ranks 2] [--seed 0] [--out FOLDER]

After each kill -9 of a random rank: the launcher must have ended within 30 s, its message must name the rank, the
process and the signal, and no process of the run may be left. The run is resumed and killed again with a chance of 0.7,
else resumed until it is done. Then its memory and its evaluations must be those of a run that was never stopped, on one
device or on as many ranks. If it has never had another number of ranks, its weights must be equal to the latter's, bit
for bit; else within 2e-3: sums over ranks round differently, and Adam moves a weight whose gradient is rounding by
a part of the learning rate (3e-3). Prints the counts; exits with 1 on a failure.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import small_world
import torch

from pmd.checkpoint_file import read_checkpoint
from pmd.checkpoint_shards import filled
from pmd.config.processes import STRATEGIES

ROOT = Path(__file__).parents[1]
CONFIG = [*small_world.CONFIG, "--rollouts.tasks_per_step=2", "--checkpoint_every_steps=2", "--trainer.max_epochs=4"]
MARK = "PMD_KILL_RANK"  # in the environment of all processes of a trial
LIMIT_S = 30.0
TOLERANCE = 2e-3


class Group:
    """The processes of one `pmd fit` on several ranks."""

    def __init__(self, run: Path, num_ranks: int, folder: Path, strategy: str):
        self.mark, self.log = f"{os.getpid()}-{time.monotonic_ns()}", folder / f"{time.monotonic_ns()}.log"
        last = (run / "checkpoints" / "last.ckpt").is_file()
        if not last:
            shutil.rmtree(run, ignore_errors=True)
        arguments = ["--config", str(run / "config.yaml"), "--ckpt_path=last"] if last else [*CONFIG]
        if num_ranks > 1 or last:
            arguments += [f"--trainer.strategy={strategy}", f"--trainer.devices={num_ranks}"]
        command = [sys.executable, "-m", "pmd", "fit", *arguments, f"--run_dir={run}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def processes(self) -> dict[int, int | None]:
        """Return each process that is left, with its rank if it is one."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                is_pmd = b"-m\0pmd\0fit" in (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{MARK}={self.mark}" in environment:
                rank = dict(pair.partition("=")[::2] for pair in environment).get("RANK")
                found[int(folder.name)] = int(rank) if is_pmd and rank is not None else None
        return found

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit code; None if it still runs after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")


class Trials:
    """Runs trials in a folder, compares what comes out, and counts."""

    def __init__(self, folder: Path, num_ranks: int, seed: int, strategy: str):
        self.folder, self.num_ranks, self.random, self.strategy = folder, num_ranks, random.Random(seed), strategy
        self.counts: Counter[str] = Counter()
        self.num_failures = 0
        self.ends_s: list[float] = []
        self.largest = 0.0  # difference of a weight
        self.whole: dict[int, dict[str, Any]] = {}  # by the number of ranks
        for size in (1, num_ranks):
            run = folder / f"whole{size}"
            undisturbed = Group(run, size, folder, strategy)
            if undisturbed.wait() != 0:
                raise SystemExit(f"a run that is never stopped has failed:\n{undisturbed.text[-3000:]}")
            self.whole[size] = contents(run)

    def fail(self, text: str) -> None:
        """Report a failure."""
        self.num_failures += 1
        print(f"FAILED {text}", flush=True)

    def kill_and_resume(self, number: int) -> None:
        """Kill a run a few times, resume it until it is done, and compare."""
        run = self.folder / f"run{number}"
        self.kill(f"run {number}", run, self.num_ranks)
        while self.random.random() < 0.7:
            self.kill(f"run {number}", run, self.num_ranks)
        size = self.random.choice((1, 2, 4))
        resumed = Group(run, size, self.folder, self.strategy)
        code = resumed.wait(1800)
        if code != 0:
            self.fail(f"run {number}: resumed on {size} rank(s): exit code {code}\n{resumed.text[-3000:]}")
            return
        if self.is_same(f"run {number}, resumed on {size} rank(s)", run, size):
            shutil.rmtree(run)

    def kill(self, name: str, run: Path, num_ranks: int) -> None:
        """Start or resume a run, kill one of its ranks at a random moment, and look at how the others end."""
        group = Group(run, num_ranks, self.folder, self.strategy)
        epochs = self.random.randrange(-1, 5)  # -1: while the ranks start; then when so many rows are logged
        pause_s = self.random.uniform(0, 20 if epochs <= 0 else 3)
        while group.wait(0.02) is None:
            ranks = {rank: pid for pid, rank in group.processes().items() if rank is not None}
            if len(ranks) == num_ranks and num_rows(run) >= epochs:
                break
        if group.wait(pause_s) is not None:
            self.counts["ended before it was killed"] += 1
            return
        victim = self.random.randrange(num_ranks)
        where = "in training" if num_rows(run) else "before the first epoch's end"
        try:
            os.kill(ranks[victim], signal.SIGKILL)
        except ProcessLookupError:
            self.counts["ended before it was killed"] += 1
            return
        started = time.monotonic()
        code = group.wait(LIMIT_S)
        while (left := group.processes()) and time.monotonic() < started + LIMIT_S:
            time.sleep(0.05)
        took_s = time.monotonic() - started
        print(f"{name}: rank {victim} killed {where}; exit code {code}, all ended after {took_s:.1f} s", flush=True)
        self.ends_s.append(took_s)
        self.counts[f"killed rank {victim}, {where}"] += 1
        self.counts[f"exit code {code}"] += 1
        named = f"rank {victim} of {num_ranks} (process {ranks[victim]}) was killed by signal 9 (SIGKILL)"
        wrong = []
        if code != 128 + signal.SIGKILL:
            wrong.append(f"exit code {code}")
        if named not in group.text:
            wrong.append(f"no message {named!r}")
        if "Traceback" in group.text:
            wrong.append("a traceback")
        if left:
            wrong.append(f"processes {left} are left after {took_s:.0f} s")
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if wrong:
            self.fail(f"{name} ({where}): {'; '.join(wrong)}\n{group.text[-3000:]}")

    def is_same(self, name: str, run: Path, size: int) -> bool:
        """Return whether a run that is done has the result of the one that was never stopped."""
        found, whole = contents(run), self.whole[self.num_ranks if size == self.num_ranks else 1]
        different = [key for key in ("memory", "results", "position") if found[key] != whole[key]]
        gap = max(
            float((tensor.double() - whole["weights"][key]).abs().max()) for key, tensor in found["weights"].items()
        )
        self.largest = max(self.largest, gap)
        if gap > (0.0 if size == self.num_ranks else TOLERANCE):
            different.append(f"weights (by {gap:.1e})")
        self.counts[f"resumed on {size} rank(s): {'differs' if different else 'same result'}"] += 1
        if different:
            self.fail(f"{name}: differs in {', '.join(different)}; it is kept in {run}")
        return not different


def num_rows(run: Path) -> int:
    """Return how many rows the run has logged."""
    try:
        return max(0, (run / "metrics.csv").read_text().count("\n") - 1)
    except OSError:
        return 0


def contents(run: Path) -> dict[str, Any]:
    """Return what must be the same."""
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")
    if "shards" in state["pmd"]:
        state = filled(state, {}, None)
    db = sqlite3.connect(run / "memory" / "memory.sqlite")
    dump = [line for line in db.iterdump() if "CREATE" not in line]
    db.close()
    results = json.loads((run / "results.json").read_text())
    return {
        "weights": state["state_dict"],
        "position": {key: state["RolloutDataModule"][key] for key in ("epoch", "step")},
        "memory": dump,
        "results": {name: phase["avg"] for name, phase in results["phases"].items()},
    }


def main() -> int:
    """Run the trials and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of the ranks (default: ddp)")
    parser.add_argument("--kills", type=int, default=20, help="how many kills at least (default: 20)")
    parser.add_argument("--ranks", type=int, default=2, help="of the runs that are killed (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="an empty folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.out or Path(tempfile.mkdtemp(prefix="kill_rank_"))
    folder.mkdir(parents=True, exist_ok=True)
    trials, number = Trials(folder, options.ranks, options.seed, options.strategy), 0
    while len(trials.ends_s) < options.kills:
        trials.kill_and_resume(number)
        number += 1
        print(f"{len(trials.ends_s)} kills, {trials.num_failures} failure(s) so far", flush=True)
    for name, count in sorted(trials.counts.items()):
        print(f"{count:5}  {name}")
    ends_s = sorted(trials.ends_s)
    print(
        f"all processes ended within {ends_s[-1]:.1f} s of a kill, half of them within {ends_s[len(ends_s) // 2]:.1f} s"
    )
    print(f"the largest difference of a weight was {trials.largest:.1e}")
    print(f"{trials.num_failures} failure(s); runs are in {folder}")
    return 1 if trials.num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
