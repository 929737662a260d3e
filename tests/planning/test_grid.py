"""A grid file becomes a list of runs, or one error that lists all of its problems."""

from pathlib import Path

import pytest

from pmd.errors import ConfigError
from pmd.planning.sweep.grid import plan, row_label

GRID = """
base: configs/tiny.yaml
seeds: [3, 4]
settings: {trace_every: 0, optimizer.lr: 0.001}
blocks:
  - title: small groups
    settings: {rollouts.group_size: 2}
    arms:
      GRPO: {overlays: [configs/methods/tiny/grpo.yaml], settings: {optimizer.lr: 0.002}}
      PMD: {axes: {memory.k: [1, 4], objective.alpha: [symmetric, 1.0]}}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "grid.yaml"
    file.write_text(text)
    return file


def test_every_arm_choice_and_seed_is_a_run(tmp_path):
    runs = plan(write(tmp_path, GRID), tmp_path)
    assert len(runs) == (1 + 2 * 2) * 2
    assert len({run.run_dir for run in runs}) == len(runs)
    labels = [row_label(run.arm, run.choices) for run in runs[::2]]
    assert labels == [
        "GRPO",
        "PMD (k=1, alpha=symmetric)",
        "PMD (k=1, alpha=1.0)",
        "PMD (k=4, alpha=symmetric)",
        "PMD (k=4, alpha=1.0)",
    ]


def test_the_more_specific_setting_wins(tmp_path):
    runs = plan(write(tmp_path, GRID), tmp_path)
    grpo, pmd = runs[1], runs[-1]
    assert '"lr": 0.002' in grpo.config
    assert '"lr": 0.001' in pmd.config
    assert '"seed_everything": 4' in grpo.config
    assert '"policy_gradient": 1.0' in grpo.config


def test_the_runs_of_a_sweep_are_a_group_in_weights_and_biases(tmp_path):
    out = tmp_path / "my-sweep"
    (run, *_) = plan(
        write(tmp_path, GRID.replace("settings: {", "settings: {wandb: offline, ", 1)), out, for_here=False
    )
    assert '--wandb.group="my-sweep"' in run.arguments
    (run, *_) = plan(write(tmp_path, GRID), out)
    assert not any("wandb" in argument for argument in run.arguments)


def test_a_block_may_have_a_base_and_overlays_that_follow_the_arms(tmp_path):
    text = GRID.replace(
        "title: small groups", "title: t\n    base: configs/tiny_sciknoweval.yaml\n    overlays: [LAST]"
    )
    text = text.replace("LAST", str(tmp_path / "last.yaml"))
    (tmp_path / "last.yaml").write_text("objective: {kl_weight: 0.5}")
    runs = plan(write(tmp_path, text), tmp_path, for_here=False)
    assert '"path": "tiny_exam"' in runs[0].config
    assert '"kl_weight": 0.5' in runs[0].config


def test_an_arm_may_be_tested_with_the_memory_of_another_run(tmp_path):
    arms = "arms: {no memory: {test: true}, memory: {memory: runs/a, axes: {memory.k: [1, 3]}}, fit: {}}"
    runs = plan(write(tmp_path, f"base: configs/tiny.yaml\nblocks: [{{{arms}}}]"), tmp_path)
    assert [run.command for run in runs] == ["test"] * 3 + ["fit"]
    assert ["--memory=runs/a" in run.arguments for run in runs] == [False, True, True, False]
    ends = [run.results.relative_to(run.run_dir).parts[0] for run in runs]
    assert ends == ["test-initial", "test-initial-memory-k1", "test-initial-memory-k3", "results.json"]


def test_a_memory_may_be_that_of_the_run_of_the_same_seed(tmp_path):
    blocks = '[{arms: {memory: {memory: "runs/a/seed-{seed}"}}}]'
    runs = plan(write(tmp_path, f"base: configs/tiny.yaml\nseeds: [3, 4]\nblocks: {blocks}"), tmp_path)
    assert [run.arguments[-1] for run in runs] == ["--memory=runs/a/seed-3", "--memory=runs/a/seed-4"]


def test_a_block_may_have_a_base_of_its_own(tmp_path):
    text = GRID + "  - {title: hard, base: configs/tiny_hard.yaml, arms: {PMD: {}}}\n"
    runs = plan(write(tmp_path, text), tmp_path)
    assert {run.arguments[0] for run in runs if run.block == "hard"} == {"--config=configs/tiny_hard.yaml"}
    assert {run.arguments[0] for run in runs if run.block != "hard"} == {"--config=configs/tiny.yaml"}
    assert all('"task": "tiny_hard"' in run.config for run in runs if run.block == "hard")


def test_all_problems_at_once(tmp_path):
    text = GRID.replace("memory.k: [1, 4]", "memory.q: [1]").replace("optimizer.lr: 0.002", "optimizer.lr: -1")
    with pytest.raises(ConfigError) as caught:
        plan(write(tmp_path, text), tmp_path)
    message = str(caught.value)
    assert "memory.q" in message
    assert "optimizer.lr=-1" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: configs/tiny.yaml\nblocks: []", "blocks is empty"),
        ("seeds: [1, 1]\nblocks: [{arms: {a: {}}}]", "base is missing"),
        ("base: configs/tiny.yaml\nblocks: [{arms: {a: {overlay: []}}}]", "did you mean blocks[0].arms.a.overlays?"),
        ("base: configs/tiny.yaml\nblocks: [{arms: {a: {axes: {memory.k: []}}}}]", "must not be empty"),
        ("- a\n- b", "must be a mapping"),
        ("base: [", "not readable YAML"),
        (GRID.replace("configs/tiny.yaml", "configs/none.yaml"), "configs/none.yaml does not exist"),
    ],
)
def test_bad_grids_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        plan(write(tmp_path, text), tmp_path)
    assert message in str(caught.value)
