"""Resuming: with other settings, from damaged checkpoints, in a directory that is in use, and the end of a run."""

import json
import os
import shutil
import sqlite3
from dataclasses import replace

import pytest
import torch
from command_line import ROOT, SMALL, run_pmd, small_fit

from pmd.callbacks.checkpoint import CheckpointCallback, copy_checkpoint, restore_best
from pmd.checkpoint_file import read_checkpoint
from pmd.cli import main
from pmd.cli.interrupt import _how_to_resume, explaining_failures
from pmd.cli.run import build, evaluate, evaluate_checkpoints, report
from pmd.config.load import load_config
from pmd.errors import ConfigError, DiskError, EngineError, RankLost, RunFailed, RunInterrupted
from pmd.run_dir import RunDir
from pmd.run_lock import locked


@pytest.fixture
def run_dir(full_run, tmp_path) -> RunDir:
    """A finished run of one epoch."""
    shutil.copytree(full_run, tmp_path / "run")
    return RunDir(tmp_path / "run")


def test_another_learning_rate_is_used(run_dir):
    before = read_checkpoint(run_dir.last, mmap=False)
    done = small_fit(run_dir.root, 2, "--ckpt_path=last", "--optimizer.lr=1e-12", "--optimizer.weight_decay=0.5")
    said = " ".join(done.stdout.split())
    assert "optimizer.lr=1e-12 (was 0.003), optimizer.weight_decay=0.5 (was 0.0)" in said
    after = read_checkpoint(run_dir.last)
    for name, weight in before["state_dict"].items():
        torch.testing.assert_close(after["state_dict"][name], weight, rtol=0, atol=1e-9)
    (group,) = after["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (1e-12, 0.5)
    assert after["lr_schedulers"][0]["_last_lr"] == [1e-12]
    config = load_config([run_dir.config]).run
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-12, 0.5)
    assert after["pmd"]["config"]["optimizer"]["lr"] == 1e-12


def test_a_change_of_method_is_refused_and_changes_nothing(run_dir):
    before = run_dir.config.read_bytes(), run_dir.metrics.read_bytes(), run_dir.last.read_bytes()
    done = small_fit(run_dir.root, 2, "--ckpt_path=last", "--objective.alpha=0.5", "--optimizer.lr=1", code=2)
    assert "objective.alpha=0.5 (was symmetric) cannot change when a run is resumed" in done.stderr
    assert "optimizer.lr=1.0 (was 0.003)" in done.stderr
    assert before == (run_dir.config.read_bytes(), run_dir.metrics.read_bytes(), run_dir.last.read_bytes())


@pytest.mark.parametrize("command", ["fit", "test", "validate", "export"])
def test_a_damaged_checkpoint_ends_in_one_sentence(run_dir, command, tmp_path):
    data = bytearray(run_dir.last.read_bytes())
    data[len(data) // 2] ^= 1
    run_dir.last.write_bytes(data)
    arguments = ["--config", str(run_dir.config), "--ckpt_path=last"]
    if command == "export":
        arguments = [str(run_dir.root), "--out", str(tmp_path / "out")]
    said = run_pmd(command, *arguments, code=1).stderr
    assert said.startswith("CheckpointError: ")
    assert "last.ckpt is damaged" in said
    assert "--ckpt_path=best" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use_is_refused(run_dir):
    with locked(run_dir.root):
        config = ["--config", str(run_dir.config)]
        resume, test, fit = (
            ["fit", "--ckpt_path=last"],
            ["test", "--ckpt_path=last"],
            ["fit", f"--run_dir={run_dir.root}"],
        )
        for command, option in (resume, test, fit):
            said = run_pmd(command, *config, option, code=2).stderr
            assert f"is in use by process {os.getpid()} on " in said


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fit", "--config", str(ROOT / "configs" / "tiny.yaml")]) == 2
    assert "WORLD_SIZE=2: torchrun has started several processes" in capsys.readouterr().err


def test_what_cannot_be_written_is_found_before_anything_is_computed(run_dir):
    for path in (run_dir.metrics, run_dir.results):
        path.unlink()
        path.mkdir()
    shutil.rmtree(run_dir.traces)
    run_dir.traces.write_text("")
    said = run_pmd("fit", "--config", str(run_dir.config), "--ckpt_path=last", code=2).stderr
    for path, what in ((run_dir.metrics, "folder"), (run_dir.results, "folder"), (run_dir.traces, "file")):
        assert f"{path} is a {what} where a" in said


def test_a_disk_without_room_for_a_checkpoint_is_found_at_the_start(run_dir, monkeypatch):
    run_dir.check_writable()
    usage = shutil.disk_usage(run_dir.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=run_dir.last.stat().st_size - 1))
    with pytest.raises(ConfigError, match=r"a checkpoint takes \d+ MB, and \d+ MB are free"):
        run_dir.check_writable()


def test_best_is_copied_if_a_kill_came_first(run_dir):
    state = read_checkpoint(run_dir.last)
    assert state["callbacks"]["CheckpointCallback"]["best_step"] == state["RolloutDataModule"]["step"] == 2
    for spoil in (run_dir.best.unlink, lambda: run_dir.best.write_bytes(b"torn")):
        spoil()
        restore_best(run_dir, run_dir.last, state)
        assert run_dir.best.read_bytes() == run_dir.last.read_bytes()
    state["callbacks"]["CheckpointCallback"]["best_step"] = 1
    run_dir.best.unlink()
    restore_best(run_dir, run_dir.last, state)
    assert not run_dir.best.exists()


class BrokenEngine:
    policy_version = 0

    def generate(self, *arguments):
        raise ZeroDivisionError("inside the engine")


def test_the_end_of_a_run_reports_what_is_there(tmp_path, capsys):
    config = load_config([ROOT / "configs" / "tiny.yaml"], [option.removeprefix("--") for option in SMALL]).run
    run = build(replace(config, memory=replace(config.memory, enabled=False)), RunDir(tmp_path / "run"))
    run.run_dir.root.mkdir()
    initial, best = evaluate(run, "initial", with_memory=False), CheckpointCallback(run.run_dir, {})
    best.best_step = 7

    def ending(phases, problems):
        with pytest.raises(RunFailed, match=r"training is complete, but not all of its results are") as failed:
            report(run, initial | phases, {"fit_s": float("inf")}, problems)
        results = json.loads(run.run_dir.results.read_text())
        return set(results["phases"]), results["problems"], str(failed.value)

    phases, problems, said = ending(*evaluate_checkpoints(run, best))
    assert phases == {"initial", "last"}
    assert len(problems) == 1
    assert "best.ckpt cannot be read (No such file or directory)" in problems[0]
    assert problems[0].rstrip(".") in said
    run.evaluator = replace(run.evaluator, engine=BrokenEngine())
    run.run_dir.curves.unlink()
    run.run_dir.curves.mkdir()
    phases, problems, said = ending(*evaluate_checkpoints(run, best))
    assert phases == {"initial"}
    assert problems == [f"ZeroDivisionError: inside the engine (traceback in {run.run_dir.error_log})"]
    assert f"{run.run_dir.curves}" in said
    assert "before training" in capsys.readouterr().out


def during(first: Exception, second: Exception) -> Exception:
    """Return the second error as if it had come up while the first was handled."""
    second.__context__ = first
    return second


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device", "a.csv"), DiskError, "a.csv: No space left on device; what was saved"),
        (sqlite3.OperationalError("database or disk is full"), DiskError, "memory.sqlite: database or disk is full"),
        (EngineError("it died"), EngineError, "it died"),
        (ConfigError(["a", "b"]), ConfigError, "3 problems"),
        (KeyError("a\nb"), RunFailed, "KeyError: 'a\\nb' (traceback in "),
        (ConnectionResetError(104, "reset"), RunFailed, "ConnectionResetError: [Errno 104] reset (traceback in "),
        (RuntimeError("[pair.cc:553] Connection closed by peer"), RankLost, "this rank has lost another one"),
        (during(RankLost("rank 0 of 2 has lost another rank"), OSError(9, "x")), RankLost, "rank 0 of 2 has lost"),
        (KeyboardInterrupt(), RunInterrupted, "stopped"),
        (SystemExit(1), RunInterrupted, "stopped"),
    ],
)
@pytest.mark.parametrize("is_resumable", [True, False])
def test_whatever_ends_a_run_it_says_how_to_go_on(tmp_path, error, kind, words, is_resumable):
    run_dir = RunDir(tmp_path)
    if is_resumable:
        run_dir.checkpoints.mkdir()
        run_dir.last.write_bytes(b"")
    remedy = f"--config {run_dir.config} --ckpt_path last" if is_resumable else "so there is nothing to resume"
    with pytest.raises(kind) as raised, explaining_failures(run_dir):
        raise error
    assert words in str(raised.value)
    assert remedy in str(raised.value)
    assert run_dir.error_log.exists() == (kind is RunFailed)


def test_a_copy_that_fails_leaves_the_old_one(run_dir):
    before = run_dir.best.read_bytes()
    run_dir.best.with_name("best.ckpt.part").mkdir()
    with pytest.raises(DiskError, match=r"best.ckpt could not be written"):
        copy_checkpoint(run_dir.last, run_dir.best)
    assert run_dir.best.read_bytes() == before


def test_the_command_that_resumes_can_be_pasted(tmp_path):
    run_dir = RunDir(tmp_path / "my run")
    run_dir.last.parent.mkdir(parents=True)
    run_dir.last.touch()
    assert _how_to_resume(run_dir).endswith(f"--config '{run_dir.config}' --ckpt_path last")
