"""Times one trivial program: at each sandbox level, in a plain `python` subprocess, and in bubblewrap if installed.

python benchmarks/bench_sandbox.py [--runs 200]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from pmd.verifiers.sandbox.pool import Level, Limits, Sandbox, SandboxUnavailable

PROGRAM, INPUT, OUTPUT = "print(sum(map(int, input().split())))", b"1 2\n", b"3\n"
BWRAP = [
    "bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--tmpfs", "/tmp", "--new-session",
]  # fmt: skip


def run_command(command: list[str]) -> None:
    done = subprocess.run([*command, sys.executable, "-S", "-c", PROGRAM], input=INPUT, capture_output=True, check=True)
    assert done.stdout == OUTPUT


def measure(run: Callable[[], None], runs: int) -> tuple[float, float]:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times), sorted(times)[int(0.95 * runs)]


def throughput(run: Callable[[], None], runs: int, threads: int) -> float:
    workers = [threading.Thread(target=lambda: [run() for _ in range(runs // threads)]) for _ in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return runs // threads * threads / (time.perf_counter() - started)


def report(name: str, run: Callable[[], None], runs: int, threads: int) -> None:
    run()
    median, high = measure(run, runs)
    rate = throughput(run, runs, threads)
    print(f"{name:28} {median:8.2f} ms {high:8.2f} ms {rate:8.0f} runs/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    threads = os.cpu_count() or 1
    print(f"{'':28} {'median':>11} {'95 %':>11} {f'{threads} threads':>15}")
    levels: list[Level] = ["namespaces", "bubblewrap", "landlock", "rlimits"]
    for level in levels:
        sandbox = Sandbox(level=level)

        def run(sandbox: Sandbox = sandbox) -> None:
            assert sandbox.run(PROGRAM, INPUT, Limits()).stdout == OUTPUT

        try:
            report(f"pmd, level {level}", run, options.runs, threads)
        except SandboxUnavailable as error:
            print(f"pmd, level {level}: {error}")
        sandbox.close()
    report("plain python subprocess", lambda: run_command([]), options.runs // 4, threads)
    if shutil.which("bwrap"):
        report("plain python in bubblewrap", lambda: run_command(BWRAP), options.runs // 4, threads)
    else:
        print("bubblewrap: not installed")


if __name__ == "__main__":
    main()
