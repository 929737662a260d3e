"""A run that goes on within an epoch equals one that never stopped, whenever the memory is updated; batch by batch, the
teachers read what their own batch taught."""

import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ROOT, run_pmd, start_pmd

from pmd.run_dir import RunDir
from pmd.trace import read_trace

FIT = [
    "fit", "--config", str(ROOT / "configs" / "tiny.yaml"), "--trainer.max_epochs=2", "--data.world.families=3",
    "--data.world.train_per_family=2", "--data.world.validation_per_family=1", "--data.world.test_per_family=1",
    "--rollouts.tasks_per_step=2", "--verification.samples=1", "--verification.final_samples=1",
    "--verification.pass_at=[1]", "--verification.every_epochs=2", "--verification.memory_conditioned=false",
]  # fmt: skip
BATCH = ["--memory.update=batch", "--memory.scope=own", "--memory.levels=[0,1,2]", "--memory.k=9"]
STOP = "--trainer.max_steps"


def fit(run_dir: Path, *arguments: str) -> Path:
    run_pmd(*FIT, f"--run_dir={run_dir}", *arguments)
    return run_dir


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return fit(tmp_path_factory.mktemp("whole") / "run", *BATCH)


def test_in_the_first_epoch_teachers_read_what_their_own_batch_taught(whole):
    with sqlite3.connect(RunDir(whole).memory) as db:
        splits = {split for (split,) in db.execute("SELECT split FROM tasks")}
        task_of = dict(db.execute("SELECT i.id, task_id FROM insights i JOIN tasks t ON t.id = task_row"))
    assert splits == {"train"}
    first_epoch = [record for step in range(3) for record in read_trace(whole / f"traces/step-{step:06d}.jsonl.gz")]
    assert len({record["task_id"] for record in first_epoch}) == 6  # each of them for the first time
    own = 0
    for record in first_epoch:
        assert record["memory_generation"] == record["step"] + 1
        insights = [item for item in record["memory"] if item["level"] == 1]
        assert {task_of[item["id"]] for item in insights} <= {record["task_id"]}
        own += bool(insights)
    assert own == len(first_epoch)


def test_a_run_killed_within_an_epoch_goes_on_as_if_it_had_not_been(whole, tmp_path):
    run_dir = RunDir(tmp_path / "run")
    arguments = [*BATCH, "--checkpoint_every_steps=1"]
    process = start_pmd(*FIT, f"--run_dir={run_dir.root}", *arguments)
    while not run_dir.last.is_file() and not process.has_ended(0.01):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    fit(run_dir.root, *arguments, "--ckpt_path=last")
    assert_equal(whole, run_dir.root)


def test_the_best_checkpoint_may_lie_within_an_epoch(tmp_path):
    """A policy that stands still is best at its first evaluation, after one step of three."""
    run = fit(tmp_path / "run", "--trainer.max_epochs=1", "--optimizer.lr=1e-12", "--verification.every_steps=1")
    states = {name: torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last")}
    assert {name: state["RolloutDataModule"]["step"] for name, state in states.items()} == {"best": 1, "last": 3}
    assert [float(row["verify/avg"]) for row in RunDir(run).read_metrics() if row["verify/avg"]] == [
        states["last"]["callbacks"]["CheckpointCallback"]["best_score"]
    ] * 4


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("mode", [BATCH, [], ["--memory.frozen=true"]])
def test_a_run_that_ends_within_an_epoch_and_goes_on_equals_one_that_never_ended(tmp_path, mode, stop):
    one, two = fit(tmp_path / "whole", *mode), tmp_path / "run"
    fit(two, *mode, f"{STOP}={stop}")
    fit(two, *mode, f"{STOP}=99", "--ckpt_path=last")
    assert_equal(one, two)


def assert_equal(one: Path, two: Path) -> None:
    """Compare weights, optimizer, memory, position and the logged steps; each end of a run is also evaluated."""
    first, second = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, two))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "RolloutDataModule", "policy_version"):
        assert plain(first[name]) == plain(second[name]), name
    memories = []
    for run in (one, two):
        with sqlite3.connect(RunDir(run).memory) as db:
            memories.append(list(db.iterdump()))
    assert memories[0] == memories[1]
    assert steps(one) == steps(two)


def steps(run: Path) -> list[dict[str, str]]:
    """The rows of the optimizer steps and of the memory, without what the clock says."""
    rows = [row for row in RunDir(run).read_metrics() if row["loss/total"] or row["memory/insights"]]
    return [{k: v for k, v in row.items() if v and not k.startswith(("time/", "verify/"))} for row in rows]


def plain(value: Any) -> Any:
    """Return tensors as bytes, so that they can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value
