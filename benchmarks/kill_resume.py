"""Ends runs in every way, resumes them until they are done, and compares them with a run that was never stopped.

python benchmarks/kill_resume.py [--kills 100] [--seed 0] [--update epoch|batch] [--only PART ...] [--out FOLDER]

Parts: `random` (kill -9 at random moments), `points` (kill -9 at each named point: rollouts, step, reflection, memory
update, checkpoint, log, before and after each replacement of a file), `signals` (SIGINT and SIGTERM, once and twice),
`disk` (a limit on file sizes, a small tmpfs, a read-only folder; the last two as root), `together` (two processes in
one run directory). Each runs a small tiny world for three epochs on one thread, with a checkpoint within each epoch
too; `--update` is `memory.update`. Weights, optimizer, memory, metrics, samples and results must be equal bit for bit,
and nothing may end in a traceback. Prints the counts; exits with 1 on a failure.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot  # noqa: E402, F401  (imported before the runs are forked)
import small_world  # noqa: E402
import torch  # noqa: E402

import pmd.cli.run  # noqa: E402, F401
from pmd.callbacks import memory  # noqa: E402
from pmd.checkpoint_file import _HashingWriter  # noqa: E402
from pmd.cli import main as pmd_main  # noqa: E402
from pmd.memory import files, reflect, stream  # noqa: E402
from pmd.memory.update import Writer  # noqa: E402
from pmd.metrics_log import MetricsLog  # noqa: E402
from pmd.module import PMDModule  # noqa: E402
from pmd.rollouts import datamodule  # noqa: E402
from pmd.run_dir import RunDir  # noqa: E402

CONFIG = [*small_world.CONFIG, "--rollouts.tasks_per_step=2", "--checkpoint_every_steps=2", "--trainer.max_epochs=3"]
#: What the two modes of `memory.update` differ in: audits judge a whole epoch, so only one of them has any.
MODES = {
    "epoch": ["--memory.update=epoch", "--memory.audit_groups=2"],
    "batch": ["--memory.update=batch", "--memory.behaviour_every=2", "--memory.scope=own"],
}
#: Endings of files that not every run has: remnants of a kill, and the checksum that a memory's next update writes.
SOMETIMES = (".log", ".part", ".partial", ".sum")
#: Functions at which a run can be told to die: before the call and after it.
POINTS: dict[str, tuple[Any, str]] = {
    "rollouts": (datamodule, "generate_rollouts"),
    "step": (PMDModule, "_step"),
    "reflection": (reflect, "reflect"),
    "memory transaction": (Writer, "merge"),
    "memory restoration": (files, "fold_in_log"),
    "checkpoint (bytes)": (_HashingWriter, "write"),
    "log": (MetricsLog, "_append"),
}


class Ended:
    """How a process of pmd ended."""

    def __init__(self, code: int, text: str):
        self.code, self.text = code, text


class Process:
    """A command of pmd, forked from this process, which has imported everything."""

    def __init__(self, arguments: Sequence[str], folder: Path, prepare: Callable[[], None] | None = None):
        self.log = folder / f"{time.monotonic_ns()}.log"
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT, 0o644)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if prepare is not None:
                    prepare()
                code = pmd_main(list(arguments))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def cpu_s(self) -> float:
        """Return the processor time that it has used, so that moments do not depend on how busy the machine is."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("inf")
        return float("inf") if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_until(self, cpu_s: float) -> None:
        """Return when it has used this much processor time, or has ended."""
        while self.cpu_s() < cpu_s:
            time.sleep(0.002)

    def kill(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Return how it ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ended(code, self.log.read_text(errors="replace"))


class Trials:
    """Runs trials in a folder of their own, compares what comes out, and counts."""

    def __init__(self, folder: Path, seed: int, update: str):
        self.folder, self.random = folder, random.Random(seed)
        self.config = [*CONFIG, *MODES[update]]
        # The function is imported where it is called.
        self.named_points = POINTS | {"memory update": ({"epoch": memory, "batch": stream}[update], "evolve_memory")}
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.number = 0
        whole = self.new()
        process = self.fit(whole)
        process.wait_until(float("inf"))
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.expect("a run that is never stopped", process.wait(), 0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.seconds = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
        self.whole = contents(whole)

    def new(self) -> Path:
        """Return a new run directory."""
        self.number += 1
        return self.folder / f"run{self.number}"

    def fit(self, run: Path, prepare: Callable[[], None] | None = None) -> Process:
        """Start or resume the run, as its user would."""
        if RunDir(run).last.is_file():
            arguments = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last"]
        else:
            shutil.rmtree(run, ignore_errors=True)
            arguments = ["fit", *self.config, f"--run_dir={run}"]
        return Process(arguments, self.folder, prepare)

    def expect(self, what: str, ended: Ended, *codes: int) -> bool:
        """Count an ending; note it as a failure if it is none of the codes, or if there is a traceback."""
        self.counts[f"{what.split(' (')[0]}: exit code {ended.code}"] += 1
        if ended.code in codes and "Traceback" not in ended.text:
            return True
        self.failures.append(f"{what}: exit code {ended.code}\n{ended.text[-3000:]}")
        return False

    def finish(self, what: str, run: Path) -> None:
        """Resume the run until it is done, and compare it with the one that was never stopped."""
        if self.expect(f"resumed after {what}", self.fit(run).wait(), 0):
            different = [name for name, value in contents(run).items() if value != self.whole[name]]
            self.counts[f"resumed after {what.split(' (')[0]}: {'differs' if different else 'equal'}"] += 1
            if different:
                self.failures.append(f"{what}: {run} differs in {', '.join(different)}")
                return
        shutil.rmtree(run, ignore_errors=True)

    def random_kills(self, number: int) -> None:
        """Kill runs at random moments, several times each, and resume them until they are done."""
        run, left = self.new(), number
        while left:
            process = self.fit(run)
            process.wait_until(self.random.uniform(0, 1.1 * self.seconds))
            process.kill(signal.SIGKILL)
            ended = process.wait()
            if ended.code == -signal.SIGKILL:
                left -= 1
                self.counts[
                    "random: killed " + ("after a checkpoint" if RunDir(run).last.is_file() else "before one")
                ] += 1
            if ended.code == 0 or not left or self.random.random() < 0.3:
                self.finish("random", run)
                run = self.new()

    def points(self) -> None:
        """Kill a run before and after each named point, at its second call, and each replacement of a file."""
        for name, (owner, attribute) in self.named_points.items():
            for when in ("before", "after"):
                self.die(f"{when} {name}", lambda o=owner, a=attribute, w=when: die_at(o, a, w, 2))
        for target in replaced_files(self):
            for when in ("before", "after"):
                self.die(f"{when} replacing {target}", lambda t=target, w=when: die_replacing(t, w))

    def die(self, name: str, prepare: Callable[[], None]) -> None:
        """Start a run that kills itself at a point, then resume it; it dies there again if it is resumed first."""
        run = self.new()
        if not name.endswith(("restoration", "memory.sqlite")):
            ended = self.fit(run, prepare).wait()
            self.counts[f"points: {'killed' if ended.code < 0 else 'not reached'}"] += 1
        else:  # happens in a resumed run only
            process = self.fit(run)
            while not RunDir(run).last.is_file() and process.cpu_s() < float("inf"):
                time.sleep(0.01)
            process.kill(signal.SIGKILL)
            process.wait()
        if RunDir(run).last.is_file():
            ended = self.fit(run, prepare).wait()
            self.counts[f"points, in a resumed run: {'killed' if ended.code < 0 else 'not reached'}"] += 1
        self.finish(f"points ({name})", run)

    def signals(self, number: int) -> None:
        """Interrupt runs at random moments, once and twice."""
        for which, twice in ((s, t) for s in (signal.SIGINT, signal.SIGTERM) for t in (False, True)):
            name = f"{which.name} {'twice' if twice else 'once'}"
            for _ in range(number):
                run = self.new()
                process = self.fit(run)
                process.wait_until(self.random.uniform(0.05, self.seconds))
                process.kill(which)
                if twice:
                    process.wait_until(process.cpu_s() + self.random.uniform(0, 0.05))
                    process.kill(which)
                self.expect(name, process.wait(), 130, 0)
                self.finish(name, run)

    def disk(self) -> None:
        """Let files not grow, fill a small file system, and make the folder read-only."""
        for limit in (1_000, 50_000, 1_000_000, 6_000_000):
            run = self.new()
            self.expect(f"files of at most {limit} bytes", self.fit(run, lambda n=limit: limit_files(n)).wait(), 1)
            self.finish(f"files of at most {limit} bytes", run)
        if os.getuid() != 0:
            self.counts["disk: full and read-only file systems need root; skipped"] += 1
            return
        for size in (1, 7, 8, 14):
            run = self.new()
            run.mkdir()
            if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(run)]).returncode:
                self.counts["disk: nothing can be mounted here; skipped"] += 1
                return
            try:
                self.expect(
                    f"a disk of {size} MB", Process(["fit", *self.config, f"--run_dir={run}"], self.folder).wait(), 1
                )
                kept = self.new()
                shutil.copytree(run, kept)
                subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
                for arguments in (
                    ["fit", *self.config, f"--run_dir={run}", "--ckpt_path=last"],
                    ["test", *self.config, f"--run_dir={run}"],
                ):
                    self.expect(f"read-only: {arguments[0]}", Process(arguments, self.folder).wait(), 2)
            finally:
                subprocess.run(["umount", str(run)], check=True)
            self.finish(f"a disk of {size} MB", kept)

    def together(self) -> None:
        """Start a second process in the directory of a running one."""
        for second in ("fit", "resume", "test", "validate"):
            run = self.new()
            first = self.fit(run)
            while not RunDir(run).last.is_file() and first.cpu_s() < float("inf"):
                time.sleep(0.01)
            first.kill(signal.SIGSTOP)  # so that it is still there when the other one looks
            command = {"resume": "fit"}.get(second, second)
            checkpoint = ["--ckpt_path=last"] if second != "fit" else []
            ended = Process([command, *self.config, f"--run_dir={run}", *checkpoint], self.folder).wait()
            first.kill(signal.SIGCONT)
            self.expect(f"{second} beside a run", ended, 2)
            if f"process {first.pid} on " not in ended.text:
                self.failures.append(f"{second} beside a run does not name process {first.pid}: {ended.text}")
            self.expect("the run beside which something was started", first.wait(), 0)
            self.finish(f"{second} beside a run", run)


def contents(run: Path) -> dict[str, Any]:
    """Return what must be equal: everything except what the clock says."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    db = sqlite3.connect(run / "memory" / "memory.sqlite")
    dump = list(db.iterdump())
    db.close()
    rows = [
        {name: value for name, value in row.items() if value and not name.startswith("time/")}
        for row in RunDir(run).read_metrics()
    ]
    results = json.loads((run / "results.json").read_text())
    results.pop("fit_s")
    results["totals"] = {name: value for name, value in results["totals"].items() if not name.startswith("time/")}
    return {
        "weights": plain(state["state_dict"]),
        "optimizer": plain(state["optimizer_states"]),
        "schedule": state["lr_schedulers"],
        "position": state["RolloutDataModule"],
        "best weights": plain(best["state_dict"]),
        "memory": dump,
        "index": (run / "memory" / "tasks.hnsw").read_bytes(),
        "metrics": rows,
        "results": results,
        "samples": (run / "samples.jsonl").read_text(),
        "configuration": (run / "config.yaml").read_text(),
        "files": sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.suffix not in SOMETIMES),
    }


def plain(value: Any) -> Any:
    """Return tensors as bytes, so that they can be compared."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def die_at(owner: Any, attribute: str, when: str, call_number: int) -> None:
    """Have this process kill itself before or after a call of a function."""
    function, calls = getattr(owner, attribute), Counter[str]()

    def dying(*arguments: Any, **options: Any) -> Any:
        calls["all"] += 1
        if calls["all"] == call_number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        value = function(*arguments, **options)
        if calls["all"] == call_number:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, attribute, dying)


def die_replacing(name: str, when: str) -> None:
    """Have this process kill itself before or after a file is put in place."""
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if Path(target).name == name and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying


def replaced_files(trials: Trials) -> list[str]:
    """Return the names of the files that a run puts in place, found by watching one, and one name for each series."""
    log = trials.folder / "replaced.txt"

    def watch() -> None:
        replace = os.replace

        def noting(source: Any, target: Any) -> None:
            replace(source, target)
            with log.open("a") as file:
                file.write(Path(target).name + "\n")

        os.replace = noting

    run = trials.new()
    trials.expect("a run that is watched", trials.fit(run, watch).wait(), 0)
    trials.finish("a run that is watched", run)  # it is resumed, and has nothing left to do
    series = {"step-000003.jsonl.gz", "epoch-001.csv"}
    names = {name for name in log.read_text().split() if not name.startswith(("step-", "epoch-")) or name in series}
    return sorted(names | {"memory.sqlite"})  # put in place in resumed runs only


def limit_files(size: int) -> None:
    """Limit the size of files, which stands for a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main() -> int:
    """Run the chosen parts and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="random moments (default: 100)")
    parser.add_argument("--signals", type=int, default=5, help="moments for each signal, once and twice (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", choices=MODES, default="epoch", help="memory.update (default: epoch)")
    parser.add_argument("--only", nargs="+", choices=("random", "points", "signals", "disk", "together"))
    parser.add_argument("--out", type=Path, help="an empty folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.out or Path(tempfile.mkdtemp(prefix="kill_resume_"))
    folder.mkdir(parents=True, exist_ok=True)
    trials = Trials(folder, options.seed, options.update)
    parts: dict[str, Callable[[], None]] = {
        "random": lambda: trials.random_kills(options.kills),
        "points": trials.points,
        "signals": lambda: trials.signals(options.signals),
        "disk": trials.disk,
        "together": trials.together,
    }
    for name, part in parts.items():
        if options.only is None or name in options.only:
            part()
            print(f"{name} is done: {len(trials.failures)} failure(s) so far", flush=True)
    print(f"seed {options.seed}; a whole run takes {trials.seconds:.1f} s of processor time")
    for name, count in trials.counts.items():
        print(f"{count:5}  {name}")
    for failure in trials.failures:
        print(f"\nFAILED {failure}")
    print(f"\n{len(trials.failures)} failure(s); runs are in {folder}")
    return 1 if trials.failures else 0


if __name__ == "__main__":
    sys.exit(main())
