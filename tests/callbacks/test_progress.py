"""What a run says while it trains: in a log file and in a terminal of 80 columns."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from pmd.callbacks import progress
from pmd.callbacks.progress import SILENCE_S, ProgressCallback
from pmd.config.schema import ModelConfig, RunConfig
from pmd.module import PMDModule

METRICS = {"loss": 0.0321, "reward": 0.875, "held_out": 0.932, "memory/insights": 1935.0, "student/entropy": 1.0}


@pytest.fixture(scope="module")
def module() -> PMDModule:
    built = PMDModule(RunConfig(model=ModelConfig("tiny")))
    built.num_steps = 24
    return built


def trainer_at(step: int, epoch: int) -> SimpleNamespace:
    metrics = {name: torch.tensor(value) for name, value in METRICS.items()}
    return SimpleNamespace(
        global_step=step, current_epoch=epoch, max_epochs=12, callback_metrics=metrics, num_training_batches=2
    )


def follow(callback: ProgressCallback, module: PMDModule, clock: list[float], monkeypatch) -> None:
    """Train for two epochs of two steps; `clock` gives the time at which each step ends."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    callback.on_train_start(trainer_at(0, 0), module)
    for step, seconds in enumerate(clock):
        if step % 2 == 0:
            callback.on_train_epoch_start(trainer_at(step, step // 2), module)
        now[0] = seconds
        callback.on_train_batch_end(trainer_at(step + 1, step // 2), module, None, None, step % 2)
    callback.on_train_end(trainer_at(len(clock), len(clock) // 2), module)


def test_a_log_file_gets_a_line_for_each_epoch(module, monkeypatch, capsys):
    follow(ProgressCallback(bar=True), module, [1.0, 2.0, 3.0, 4.0], monkeypatch)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "epoch 1/12: loss 0.032, reward 0.875, held-out 93.2%, insights 1935; 00:22 left",
        "epoch 2/12: loss 0.032, reward 0.875, held-out 93.2%, insights 1935; 00:20 left",
    ]
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""


def test_a_long_epoch_is_not_silent(module, monkeypatch, capsys):
    follow(ProgressCallback(bar=True), module, [SILENCE_S + 1, SILENCE_S + 2], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "epoch 1/12: loss 0.032, reward 0.875",
        "epoch 1/12: loss 0.032, reward 0.875, held-out 93.2%, insights 1935",
    ]


@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_gets_one_bar_unless_it_is_turned_off(bar, module, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    follow(ProgressCallback(bar=bar), module, [1.0, 2.0], monkeypatch)
    err = capsys.readouterr().err
    drawn = [line for line in err.split("\r") if "step" in line]
    assert bool(drawn) == bar
    assert all(len(line) <= 80 for line in drawn)
    assert not bar or re.search(r"epoch 00:0\d, run 0\d:\d\d left, loss 0.032, reward 0.875", drawn[-1])
