"""Measures what `rollouts.prefetch` gains: seconds of a step with and without it, with a vLLM server of its own.

python benchmarks/bench_prefetch.py [--rounds 3] [--steps 8] [--tokens 48]

On a machine with vLLM's CPU build: a tiny random model, the server on one core and the trainer on another. Runs with
and without prefetch alternate; a step is timed from one trace to the next. Prints the median of each, and the parts of
a step without prefetch: with it, a step cannot be shorter than the longer of them.
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
from itertools import pairwise
from pathlib import Path

from questions import make_questions

from pmd.bootstrap.random_model import make_random_model
from pmd.engines.server_client import ServerClient
from pmd.run_dir import RunDir

ROOT = Path(__file__).parents[1]
BASE = ["--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml"]
PARTS = ("time/student_s", "time/teacher_s", "time/backward_s", "time/optimizer_s", "time/sync_s")


def start(arguments: list[str], core: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a command of pmd on one core."""
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "pmd", *arguments], cwd=ROOT, stdout=out, stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip


def step_seconds(run: RunDir) -> list[float]:
    """Return the seconds between the traces of consecutive steps."""
    written = sorted(file.stat().st_mtime for file in run.traces.glob("step-*"))
    return [later - earlier for earlier, later in pairwise(written)]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="of each run (default: 8)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a rollout at most (default: 48)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_prefetch_"))
    cores = sorted(os.sched_getaffinity(0))
    checkpoint = make_random_model(folder / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = [
        *BASE, f"--model.path={checkpoint}", f"--data.path={make_questions(folder, 8 * options.steps)}",
        f"--rollouts.max_new_tokens={options.tokens}", "--data.max_train=null", "--rollouts.tasks_per_step=4",
        "--rollouts.group_size=4",
    ]  # fmt: skip
    server = start(["serve", f"--port={port}", *common], cores[0], folder / "server.log")
    seconds: dict[bool, list[float]] = {False: [], True: []}
    generate: list[float] = []
    train: list[float] = []
    try:
        client = ServerClient(f"http://127.0.0.1:{port}", 60.0)
        while not client.is_healthy():
            if server.poll() is not None:
                raise SystemExit((folder / "server.log").read_text()[-3000:])
            time.sleep(1)
        for number in range(2 * options.rounds):
            prefetch = bool(number % 2)
            run = RunDir(folder / f"run-{number}")
            arguments = [
                "fit", *common, f"--run_dir={run.root}", "--rollouts.engine=vllm_server",
                f"--rollouts.server.urls=[http://127.0.0.1:{port}]", f"--rollouts.prefetch={str(prefetch).lower()}",
                f"--trainer.max_steps={options.steps}", "--trainer.max_epochs=1", "--trace_every=1",
                "--rollouts.vllm.parity_completions=0",
            ]  # fmt: skip
            log = folder / f"run-{number}.log"
            if start(arguments, cores[-1], log).wait():
                raise SystemExit(log.read_text()[-3000:])
            seconds[prefetch] += step_seconds(run)
            if not prefetch:
                rows = [row for row in run.read_metrics() if row.get("time/backward_s")][1:]
                generate += [float(row["time/rollout_s"]) for row in rows]
                train += [sum(float(row.get(part) or 0) for part in PARTS) for row in rows]
            print(f"prefetch={prefetch}: {[f'{s:.2f}' for s in step_seconds(run)]} s", flush=True)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    plain, ahead = (statistics.median(seconds[kind]) for kind in (False, True))
    num_steps = [len(seconds[kind]) for kind in (False, True)]
    print(f"median step: {plain:.2f} s without prefetch, {ahead:.2f} s with it: {1 - ahead / plain:.0%} less")
    print(f"parts without it: generate {statistics.median(generate):.2f} s, train {statistics.median(train):.2f} s")
    print(f"{num_steps[0]} and {num_steps[1]} steps; server on core {cores[0]}, trainer on core {cores[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
