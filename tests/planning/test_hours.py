"""Predicted GPU hours, and the estimate of a run's cost from an earlier one."""

import json
import os

import pytest

from pmd.cli import main
from pmd.config.load import load_config
from pmd.config.save import resolved_yaml
from pmd.planning.estimate import estimate_run
from pmd.planning.hours import predict_hours
from pmd.run_dir import RunDir


def hours(*overrides: str):
    loaded = load_config(["configs/qwen3_8b.yaml"], ["trainer.max_epochs=10", *overrides])
    return predict_hours(loaded.run, loaded.trainer)


def test_hours_are_tokens_divided_by_speeds():
    """720 tasks of physics, 36 of them held out: 684 x 10 epochs x 8 rollouts of 350 + 800 tokens."""
    found = hours("data.domains=[physics]")
    assert found.training == pytest.approx(54_720 * 1150 / 15_886 / 3600)
    assert found.rollouts == pytest.approx(54_720 * 800 / 6500 / 3600)
    without = hours("data.domains=[physics]", "memory.enabled=false")
    assert without.reflections == 0.0 < found.reflections
    assert without.evaluation < found.evaluation
    assert hours("data.domains=[physics]", "objective.update_policy=false").training == 0.0
    assert hours("data.domains=[physics]", "memory.frozen=true").reflections == pytest.approx(found.reflections / 10)


def test_a_model_of_14b_is_not_one_of_4b():
    small, large = (hours(f"model.path=Qwen/Qwen3-{size}").training for size in ("4B", "14B"))
    assert large / small == pytest.approx(14.8 / 4.02)
    with pytest.raises(ValueError, match="not in its name"):
        hours("model.path=a/b")
    with pytest.raises(ValueError, match="tooluse"):
        hours("data.task=tooluse")


def finished(folder, name, rollouts, seconds, *overrides):
    root = folder / name
    root.mkdir()
    (root / "config.yaml").write_text(resolved_yaml(load_config(["configs/tiny.yaml"], overrides)))
    totals = {"rollout/num_tokens": 10.0 * rollouts, "reflect/num_tokens": 2.0 * rollouts, "time/student_s": seconds}
    (root / "results.json").write_text(json.dumps({"rollouts": rollouts, "totals": totals, "phases": {}}))
    return root / "results.json"


def test_an_estimate_uses_the_newest_finished_run_of_the_model(tmp_path):
    config = load_config(["configs/tiny.yaml"]).run  # 32 tasks x 2 rollouts a step
    here = RunDir(tmp_path / "new")
    assert "at most 5.12 k tokens of rollouts" in estimate_run(config, here, 10)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    os.utime(finished(tmp_path, "old", 100, 5.0), (1, 1))
    finished(tmp_path, "newer", 100, 50.0)
    finished(tmp_path, "other", 100, 1.0, "model.finetune=lora")
    assert estimate_run(config, here, 10) == (
        f"Cost: about 7.68 k generated tokens and 5.3 min, at the speed of {tmp_path / 'newer'}."
    )
    assert "unknown" in estimate_run(config, here, -1)


GRID = """
base: configs/qwen3_8b.yaml
settings: {trainer.max_epochs: 100, data.domains: [physics]}
blocks: [{title: physics, arms: {base: {test: true}, PMD: {}}}]
"""


def test_a_sweep_prints_the_hours_of_a_grid(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(GRID)
    assert main(["sweep", str(tmp_path / "grid.yaml"), "--hours"]) == 0
    total = hours("data.domains=[physics]", "trainer.max_epochs=100").total  # the base is only evaluated: .1 h more
    assert f"│ all │ 2 │ {total:,.0f} │" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "grid.yaml").write_text("base: configs/tiny.yaml\nblocks: [{arms: {PMD: {}}}]")
    assert main(["sweep", str(tmp_path / "grid.yaml"), "--hours"]) == 2
    assert "`pmd bench` measures any configuration" in capsys.readouterr().err
