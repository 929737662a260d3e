"""Whole runs on two ranks, whoever has started them: the first batch is that of one process, and so is the memory."""

import csv
import gzip
import json
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT

pytestmark = pytest.mark.slow
RUN = [
    "fit", "--config", "configs/tiny.yaml", "--data.world.families=3", "--data.world.train_per_family=2",
    "--data.world.test_per_family=1", "--data.world.validation_per_family=1", "--verification.final_samples=2",
    "--verification.samples=2", "--verification.pass_at=[1]", "--rollouts.tasks_per_step=2", "--trainer.max_epochs=2",
    "--trace_every=1",
]  # fmt: skip
COMPUTED = ("per_token_divergence", "student_logprobs", "teacher_logprobs", "entropy")


def by_pmd() -> list[tuple[list[str], dict[str, str]]]:
    return [([sys.executable, "-m", "pmd"], {})]


def by_torchrun() -> list[tuple[list[str], dict[str, str]]]:
    """Two machines, each with a launcher of its own and one rank."""
    end = f"--rdzv-endpoint=localhost:{free_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    return 2 * [([*command, end, "-m", "pmd"], {})]


def by_slurm() -> list[tuple[list[str], dict[str, str]]]:
    """What `srun` starts, with the variables that it sets."""
    shared = {
        "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NAME": "pmd", "SLURM_NTASKS": "2", "SLURM_NODEID": "0",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    command = [sys.executable, "-m", "pmd"]
    return [(command, shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}) for rank in range(2)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fit(launcher, *arguments: str) -> None:
    started = [
        subprocess.Popen([*command, *RUN, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | own)
        for command, own in launcher()
    ]
    assert [process.wait(300) for process in started] == [0] * len(started)


def memory_of(run: Path) -> list[str]:
    with sqlite3.connect(run / "memory" / "memory.sqlite") as store:
        return [line for line in store.iterdump() if line.startswith("INSERT")]


def first_batch_of(run: Path) -> tuple[dict[str, dict], float]:
    """Return the records of the first batch by rollout, and the norm of its gradient."""
    with gzip.open(run / "traces" / "step-000000.jsonl.gz", "rt") as file:
        records = {record["rollout_id"]: record for record in map(json.loads, file)}
    with (run / "metrics.csv").open() as file:
        norm = next(row["student/grad_norm"] for row in csv.DictReader(file) if row["student/grad_norm"])
    return records, float(norm)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, for each way of updating the memory."""
    runs = {update: tmp_path_factory.mktemp("alone") / update for update in ("epoch", "batch")}
    for update, run in runs.items():
        fit(by_pmd, f"--memory.update={update}", f"--run_dir={run}")
    return runs


@pytest.mark.parametrize(
    ("launcher", "strategy", "update"),
    [(by_pmd, "ddp", "epoch"), (by_torchrun, "ddp", "batch"), (by_pmd, "fsdp2", "batch"), (by_slurm, "fsdp2", "epoch")],
)
def test_a_free_run_of_two_ranks_is_that_of_one(alone, tmp_path, launcher, strategy, update):
    one, two = alone[update], tmp_path / "two"
    sizes = ("--trainer.num_nodes=2", "--trainer.devices=1") if launcher is by_torchrun else ("--trainer.devices=2",)
    fit(launcher, f"--memory.update={update}", f"--run_dir={two}", f"--trainer.strategy={strategy}", *sizes)
    (expected, norm), (found, found_norm) = first_batch_of(one), first_batch_of(two)
    assert found.keys() == expected.keys()
    for rollout_id, record in expected.items():
        own = found[rollout_id]
        assert own.keys() == record.keys()
        for name, value in record.items():
            assert own[name] == (pytest.approx(value, abs=1e-6) if name in COMPUTED else value)
    assert found_norm == pytest.approx(norm, rel=1e-6)
    assert memory_of(two) == memory_of(one)
    phases = [json.loads((run / "results.json").read_text())["phases"] for run in (one, two)]
    assert phases[0] == phases[1]
