"""The whole loop on a small tiny world: learning moves, memory grows, resuming equals never stopping."""

import json
import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
import torch
from command_line import run_pmd, small_fit

from pmd.memory.store import MemoryStore
from pmd.run_dir import RunDir
from pmd.trace import read_trace

AUDITS = "--memory.audit_groups=8"
EVERY_STEP = "--verification.every_steps=1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    small_fit(run_dir, 2, AUDITS, EVERY_STEP)
    return run_dir


def test_a_run_leaves_everything(whole):
    results = json.loads((whole / "results.json").read_text())
    assert set(results["phases"]) == {"initial", "last", "best"}
    assert results["updates"] == 4
    for name in ("config.yaml", "metrics.csv", "curves.png", "samples.jsonl", "checkpoints/last.ckpt"):
        assert (whole / name).is_file(), name
    assert len(list((whole / "traces").glob("*.gz"))) == 4


def test_an_evaluation_within_an_epoch_has_a_row_of_its_own(whole):
    """Two steps an epoch: the first is followed by an evaluation, the second by that of the epoch's end."""
    scored = [row for row in RunDir(whole).read_metrics() if row["verify/avg"]]
    assert [int(row["step"]) for row in scored] == [0, 0, 1, 2, 3]
    assert [bool(row["memory/generation"]) for row in scored] == [False, False, True, False, True]
    tokens = [float(row["cost/generated_tokens"] or 0) for row in RunDir(whole).read_metrics()]
    assert max(tokens) == sum(
        float(row[name] or 0)
        for row in RunDir(whole).read_metrics()
        for name in ("rollout/num_tokens", "reflect/num_tokens", "reflect/num_behaviour_tokens")
    )


def test_the_last_checkpoint_is_of_the_last_epoch(whole):
    state = torch.load(whole / "checkpoints/last.ckpt", weights_only=False)
    assert (state["epoch"], state["global_step"]) == (1, 4)


def test_resuming_equals_never_stopping(whole, tmp_path):
    run_dir = tmp_path / "run"
    small_fit(run_dir, 1, AUDITS, EVERY_STEP)
    small_fit(run_dir, 2, AUDITS, EVERY_STEP, "--ckpt_path=last")
    one = torch.load(whole / "checkpoints/last.ckpt", weights_only=False)
    two = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=False)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    assert dump(whole) == dump(run_dir)
    assert logged(whole) == logged(run_dir)


def generation(run_dir: Path) -> int:
    """How many times the memory was updated."""
    with MemoryStore.open(RunDir(run_dir).memory, read_only=True) as store:
        return store.generation


def dump(run_dir: Path) -> list[str]:
    """The memory's whole content, audits and retrieval log included."""
    db = sqlite3.connect(run_dir / "memory" / "memory.sqlite")
    content = list(db.iterdump())
    db.close()
    assert any('INSERT INTO "audits"' in line for line in content)
    return content


def logged(run_dir: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, what the clock says left out."""
    rows = RunDir(run_dir).read_metrics()
    assert rows
    return [{k: float(v) for k, v in row.items() if v and not k.startswith("time/")} for row in rows]


def test_a_refused_resumption_leaves_the_run_as_it_was(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    before, config = logged(run_dir), (run_dir / "config.yaml").read_text()
    done = small_fit(run_dir, 3, AUDITS, "--ckpt_path=last", "--model.finetune=lora", code=2)
    assert "model.finetune=lora (was full) cannot change when a run is resumed" in done.stderr
    assert logged(run_dir) == before
    assert (run_dir / "config.yaml").read_text() == config


def test_a_copied_run_remembers_its_best_epoch(tmp_path):
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    small_fit(run_dir, 1, "--optimizer.lr=1e-2")  # too high: the second epoch is worse than the first
    shutil.copytree(run_dir, copy)
    before = (run_dir / "checkpoints" / "best.ckpt").read_bytes()
    small_fit(copy, 2, "--optimizer.lr=1e-2", "--ckpt_path=last")
    scores = [(float(r["verify/avg"]), -int(float(r["step"]))) for r in RunDir(copy).read_metrics() if r["verify/avg"]]
    best = torch.load(copy / "checkpoints" / "best.ckpt", weights_only=False)
    assert len(scores) == 3
    assert best["global_step"] == 1 - max(scores[1:])[1]
    assert (run_dir / "checkpoints" / "best.ckpt").read_bytes() == before
    assert best["policy_version"] < 4  # the best checkpoint is evaluated last, and is not what the run ends with
    assert json.loads((copy / "results.json").read_text())["updates"] == 4


def test_a_run_that_ended_within_an_epoch_goes_on_where_it_stopped(tmp_path):
    run_dir = tmp_path / "run"
    batches_of_four = ["--rollouts.tasks_per_step=4", "--rollouts.updates_per_batch=2"]
    small_fit(run_dir, 2, *batches_of_four, "--trainer.max_steps=3", "--verification.every_epochs=9")
    assert generation(run_dir) == 0  # the epoch is not over
    small_fit(run_dir, 2, *batches_of_four, "--ckpt_path=last")
    files = sorted((run_dir / "traces").glob("*.gz"))
    assert [int(file.name[5:11]) for file in files] == list(range(12))
    assert [int(row["step"]) for row in RunDir(run_dir).read_metrics() if row["loss/total"]] == list(range(12))
    assert json.loads((run_dir / "results.json").read_text())["rollouts"] == 2 * 24
    assert generation(run_dir) == 2
    for epoch in (files[:6], files[6:]):
        visited = Counter(record["task_id"] for file in epoch for record in read_trace(file))
        assert (len(visited), set(visited.values())) == (12, {2})


def test_a_run_that_its_time_ended_goes_on_where_it_stopped(tmp_path):
    run_dir, short = tmp_path / "run", "--trainer.max_time={milliseconds: 1}"  # checked after the first step
    small_fit(run_dir, 2, "--rollouts.tasks_per_step=4", short)
    assert len(list((run_dir / "traces").iterdir())) == 1
    done = small_fit(run_dir, 1, "--rollouts.tasks_per_step=3", "--trainer.max_time=null", "--ckpt_path=last")
    assert "within epoch 0, at step 1." in " ".join(done.stdout.split())
    said = "trainer.max_time.milliseconds=null (was 1)"
    assert said in " ".join(done.stdout.split())
    files = sorted((run_dir / "traces").iterdir())
    visited = [Counter(record["task_id"] for record in read_trace(file)) for file in files]
    assert [len(tasks) for tasks in visited] == [4, 3, 3, 2]
    assert set(sum(visited, Counter()).values()) == {2}


def test_no_held_out_task_is_in_memory(whole):
    listed = run_pmd("memory", "list", str(whole), "--json").stdout
    assert "/train/" in listed
    assert "/test/" not in listed
    assert "/validation/" not in listed


def test_inspect_and_export(whole, tmp_path):
    shown = run_pmd("inspect", "step", str(whole), "--step", "3").stdout
    assert "teacher's prompt" in shown
    listed = run_pmd("inspect", "step", str(whole), "--step", "3", "--list").stdout
    assert "memory items" in listed
    assert "use one of 0-" in run_pmd("inspect", "step", str(whole), "--step", "99", code=2).stderr
    assert "--list shows them" in run_pmd("inspect", "step", str(whole), "--rollout", "999", code=2).stderr
    run_pmd("export", str(whole), "--out", str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_all_problems_of_a_configuration_are_reported_at_once():
    done = run_pmd(
        "fit", "--config", "configs/tiny.yaml", "--memory.kk=3", "--optimizer.lr=fast", "--memory.capacity=2",
        "--model.finetune=qlora", code=2,
    )  # fmt: skip
    for words in ("memory.kk", "memory.k?", "optimizer.lr", "memory.capacity=2", "qlora"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_testing_a_checkpoint_repeats_the_last_row_and_overwrites_nothing(whole, tmp_path):
    before = (whole / "results.json").read_bytes()
    done = run_pmd("test", "--config", str(whole / "config.yaml"), "--run_dir=null", "--ckpt_path=last")
    assert "last checkpoint" in done.stdout
    assert (whole / "results.json").read_bytes() == before
    last, again = json.loads(before)["phases"]["last"], json.loads((whole / "test-last" / "results.json").read_text())
    assert (again["split"], again["sampling"]) == ("test", {"temperature": 1.0, "top_p": 1.0})
    assert again["phases"]["last"]["by_domain"] == last["by_domain"]
    assert (whole / "test-last" / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (whole / "test-last" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8 * last["num_tasks"]
    compared = run_pmd("compare", str(whole / "test-last"), str(whole / "test-last"), "--resamples=100")
    assert f"{100 * last['avg']:.1f}" in compared.stdout
