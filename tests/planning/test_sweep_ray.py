"""A sweep on a real Ray cluster of two machines (processes of this one) outlives a killed run and a lost machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from child_processes import read_proc
from command_line import ROOT
from small_sweep import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs ray: pip install 'pmd[ray]'")

GRID = f"""
base: {ROOT}/configs/tiny.yaml
seeds: [0, 1, 2, 3]
settings:
  trace_every: 0
{SMALL}blocks:
  - arms:
      PMD: {{}}
      GRPO: {{overlays: [{ROOT}/configs/methods/tiny/grpo.yaml]}}
"""
DEADLINE_S = 3000.0  # on a busy machine; minutes are usual


@pytest.fixture
def cluster(monkeypatch):
    """A cluster with a head that runs nothing, and two machines that run one task at a time."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray lets its workers wait for everything else
    started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield started, [add_machine(started) for _ in range(2)]
    started.shutdown()


def add_machine(cluster: Any) -> Any:
    """Add a machine. Ray gives it half a minute to start, which a busy computer may exceed."""
    for _ in range(5):
        with suppress(Exception):
            return cluster.add_node(num_cpus=1)
    raise AssertionError("Ray did not start a second machine")


def machine_of(pid: int, machines: list[Any]) -> Any:
    """Return the machine that runs a process: one of the processes above it is the machine's raylet."""
    raylets = {machine.all_processes["raylet"][0].process.pid: machine for machine in machines}
    while pid not in raylets:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert pid > 1, "the run is on no machine of the cluster"
    return raylets[pid]


def sweep(grid: Path, out: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pmd", "sweep", str(grid), "--out", str(out), *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition: Any, process: subprocess.Popen[str]) -> Any:
    """Return what the condition returns, once it is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert process.poll() is None, f"the sweep ended too early: {process.communicate()[0][-3000:]}"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    return found


def training(out: Path) -> list[int]:
    """Return the processes of the runs that have saved a checkpoint and are not finished."""
    runs = [file.parents[1] for file in out.glob("*/*/checkpoints/last.ckpt")]
    locks = [(run / ".lock").read_text() for run in runs if not (run / "results.json").is_file()]
    pids = [int(found[1]) for lock in locks if (found := re.match(r"process (\d+) on ", lock))]
    return [pid for pid in pids if b"\0fit\0" in read_proc(f"/proc/{pid}/cmdline")]  # the others have been killed


def table(out: Path) -> list[dict[str, Any]]:
    """Return the table without what the clock says."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads((out / "sweep.json").read_text())]


def test_a_sweep_outlives_a_run_and_a_machine(cluster, tmp_path):
    started, machines = cluster
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    out = tmp_path / "on_ray"
    process = sweep(grid, out, "--on", "ray", RAY_ADDRESS=started.address)
    os.kill(wait_for(lambda: training(out), process)[0], signal.SIGKILL)
    wait_for(lambda: list(out.glob("*/*/results.json")), process)
    lost = machine_of(wait_for(lambda: training(out), process)[0], machines)
    started.remove_node(lost, allow_graceful=False)
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said[-3000:]
    assert "was killed by signal 9; it goes on from its last checkpoint (retries left: 1)" in " ".join(said.split())
    logs = "\n".join(file.read_text() for file in out.glob("*/*.log"))
    assert "Ray: " in logs
    assert logs.count("Resumed from ") >= 2
    assert len(list(out.glob("*/*/results.json"))) == 8

    serial = tmp_path / "serial"
    alone = sweep(grid, serial, "--jobs", "1")
    said, _ = alone.communicate(timeout=DEADLINE_S)
    assert alone.returncode == 0, said[-3000:]
    assert table(out) == table(serial)
