"""Measures what `rollouts.prefetch` gains: how long a step generates while it trains, with vLLM servers of its own.

python benchmarks/bench_prefetch.py [--servers 2] [--rounds 3] [--steps 8] [--tokens 48]

On a machine with vLLM's CPU build: a tiny random model, the servers on one core and the trainer on another. Runs with
and without prefetch alternate. Prints, for both, the median seconds of a step's parts: generating (verdicts included),
training, and how much of the two passed at the same time, which can be no more than the shorter of them; and of the
whole step, from one trace to the next. The overlap is what prefetch gains where servers and trainer do not slow each
other down. The first step of a run, which nothing precedes, is left out.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from questions import make_questions

from pmd.bootstrap.random_model import make_random_model
from pmd.engines.server_client import ServerClient
from pmd.run_dir import RunDir

ROOT = Path(__file__).parents[1]
BASE = ["--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml"]
GENERATES = ("rollout", "verify")
TRAINS = ("context", "student", "teacher", "reference", "backward", "optimizer", "sync")


def start(arguments: list[str], core: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a command of pmd on one core."""
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "pmd", *arguments], cwd=ROOT, stdout=out, stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip


class Server:
    """`pmd serve` on a free port of this machine."""

    def __init__(self, arguments: list[str], core: int, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.process = start(["serve", f"--port={port}", *arguments], core, log)

    def wait(self) -> None:
        """Wait until it answers."""
        client = ServerClient(self.url, 60.0)
        while not client.is_healthy():
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text()[-3000:])
            time.sleep(1)

    def num_completions(self) -> int:
        """Return how many completions it has sent."""
        return self.log.read_text().count('POST /v1/completions HTTP/1.1" 200')


def steps_of(run: RunDir) -> dict[str, list[float]]:
    """Return the seconds of a run's steps but the first, by part; the clock runs from one trace to the next."""
    rows = [row for row in run.read_metrics() if row.get("time/backward_s")]
    written = sorted(file.stat().st_mtime for file in run.traces.glob("step-*"))
    return {
        "generates": [seconds(row, *GENERATES) for row in rows[1:]],
        "trains": [seconds(row, *TRAINS) for row in rows[1:]],
        # What had passed when training asked for the batch, but for the wait before the weights could change.
        "does both at once": [seconds(row, "overlap") - seconds(last, "wake") for last, row in pairwise(rows)],
        "takes": [later - earlier for earlier, later in pairwise(written)],
    }


def seconds(row: Mapping[str, str], *parts: str) -> float:
    """Return the seconds of some parts of a step."""
    return sum(float(row.get(f"time/{part}_s") or 0.0) for part in parts)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=2, help="vLLM servers, all on one core (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="of each run (default: 8)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a rollout at most (default: 48)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_prefetch_"))
    cores = sorted(os.sched_getaffinity(0))
    checkpoint = make_random_model(folder / "model")
    common = [
        *BASE, f"--model.path={checkpoint}", f"--data.path={make_questions(folder, 8 * options.steps)}",
        f"--rollouts.max_new_tokens={options.tokens}", "--data.max_train=null", "--rollouts.tasks_per_step=4",
        "--rollouts.group_size=4",
    ]  # fmt: skip
    servers = [Server(common, cores[0], folder / f"server-{number}.log") for number in range(options.servers)]
    found: dict[bool, dict[str, list[float]]] = {kind: defaultdict(list) for kind in (False, True)}
    try:
        for server in servers:
            server.wait()
        for number in range(2 * options.rounds):
            prefetch = bool(number % 2)
            run = RunDir(folder / f"run-{number}")
            arguments = [
                "fit", *common, f"--run_dir={run.root}", "--rollouts.engine=vllm_server",
                f"--rollouts.server.urls=[{','.join(server.url for server in servers)}]",
                f"--rollouts.prefetch={str(prefetch).lower()}", f"--trainer.max_steps={options.steps}",
                "--trainer.max_epochs=1", "--trace_every=1", "--rollouts.vllm.parity_completions=0",
            ]  # fmt: skip
            log = folder / f"run-{number}.log"
            if start(arguments, cores[-1], log).wait():
                raise SystemExit(log.read_text()[-3000:])
            for part, values in steps_of(run).items():
                found[prefetch][part] += values
            print(f"prefetch={prefetch}: {[f'{s:.2f}' for s in steps_of(run)['takes']]} s", flush=True)
    finally:
        for server in servers:
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
    for prefetch, parts in found.items():
        medians = ", ".join(f"{part} {statistics.median(values):.2f} s" for part, values in parts.items())
        print(f"{'with' if prefetch else 'without'} prefetch, the median step {medians} ({len(parts['takes'])} steps)")
    print(f"completions of each server: {[server.num_completions() for server in servers]}")
    print(f"servers on core {cores[0]}, trainer on core {cores[-1]}; load of the last minute {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
