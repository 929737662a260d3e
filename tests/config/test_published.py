"""The baselines have the hyper-parameters that their authors released, whatever the order of models and data."""

import re
from pathlib import Path

import pytest

from pmd.config.load import load_config
from pmd.config.save import resolved_values
from pmd.planning.sweep.grid import plan, read_grid

ROOT = Path(__file__).parents[2]
#: What SDPO and GRPO share on SciKnowEval (github.com/lasgroup/SDPO; docs/method.md).
SHARED = {
    "optimizer.kind": "adamw", "optimizer.lr": 1e-5, "optimizer.warmup_steps": 10, "optimizer.weight_decay": 0.01,
    "optimizer.beta1": 0.9, "optimizer.beta2": 0.999, "optimizer.schedule": "constant", "optimizer.max_grad_norm": 1.0,
    "rollouts.tasks_per_step": 32, "rollouts.group_size": 8, "rollouts.updates_per_batch": 1,
    "rollouts.temperature": 1.0, "rollouts.max_prompt_tokens": 2048, "rollouts.max_new_tokens": 8192,
    "rollouts.uniform_groups": "keep", "objective.kl_weight": 0.0, "objective.tis_cap": 2.0,
    "objective.update_policy": True, "memory.enabled": False,
    "verification.temperature": 0.6, "verification.top_p": 0.95, "verification.final_samples": 16,
    "trainer.max_epochs": 30,
}  # fmt: skip
SDPO = {
    "method": "sdpo", "objective.distillation": 1.0, "objective.policy_gradient": 0.0, "objective.alpha": 0.5,
    "objective.top_k": 100, "objective.tail": True, "objective.no_context_weight": 0.0,
    "objective.reduction": "sequence",
    "objective.importance_clip": 2.0, "teacher.kind": "ema", "teacher.ema_rate": 0.05, "teacher.context": "sibling",
    "teacher.feedback": False,
}  # fmt: skip
GRPO = {
    "method": "grpo", "objective.distillation": 0.0, "objective.policy_gradient": 1.0, "objective.clip_low": 0.2,
    "objective.clip_high": 0.28, "objective.dual_clip": 3.0, "objective.normalize_std": False,
    "teacher.context": "none",
}  # fmt: skip
#: On LiveCodeBench: feedback, and other rates, divergence and updates.
CODE = {
    "optimizer.lr": 1e-6, "optimizer.warmup_steps": 0, "rollouts.updates_per_batch": 32, "data.task": "livecodebench",
    "data.first_day": "2025-02-01", "data.end_day": "2025-05-01", "verification.final_samples": 4,
}  # fmt: skip
SDPO_CODE = {"objective.alpha": 1.0, "objective.top_k": 20, "teacher.ema_rate": 0.01, "teacher.feedback": True}
MODELS = {"qwen3_8b": "Qwen/Qwen3-8B", "olmo3_7b": "allenai/Olmo-3-7B-Instruct"}
DOMAINS = ("biology", "chemistry", "material", "physics")
GRIDS = sorted((ROOT / "ablations" / "grids" / "paper").glob("*.yaml"))


def printed(*names: str) -> dict[str, object]:
    """Return what `fit --print_config` prints for these files of configs/, by dotted key."""
    loaded = load_config([ROOT / "configs" / f"{name}.yaml" for name in names])
    assert loaded.problems == []
    return dict(flat(resolved_values(loaded)))


def flat(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differences(found: dict[str, object], wanted: dict[str, object]) -> dict[str, object]:
    return {key: found[key] for key, value in wanted.items() if found[key] != value}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("method", "own", "own_code"), [("sdpo", SDPO, SDPO_CODE), ("grpo", GRPO, {})])
def test_a_baseline_is_the_published_one(model, method, own, own_code):
    base = SHARED | own | {"model.path": MODELS[model]}
    assert differences(printed(model, f"methods/{method}"), base) == {}
    for domain in DOMAINS:
        found = printed(model, f"methods/{method}", f"data/sciknoweval_{domain}")
        assert differences(found, base | {"data.domains": [domain], "verification.every_steps": 5}) == {}
    found = printed(model, f"methods/{method}", "data/livecodebench_v6")
    assert differences(found, base | CODE | own_code) == {}


@pytest.mark.parametrize("overlay", [(), ("overlays/lora_rate",)])
def test_all_methods_have_one_rate_and_choose_no_checkpoint_on_test(overlay):
    found = [printed("qwen3_8b", f"methods/{method}", *overlay) for method in ("grpo", "sdpo", "pmd")]
    assert len({one["optimizer.lr"] for one in found}) == 1
    assert all(0 < float(str(one["data.validation_share"])) < 0.2 for one in found)


@pytest.mark.parametrize("grid", GRIDS, ids=[grid.stem for grid in GRIDS])
def test_a_grid_of_the_paper_names_files_that_exist_and_gives_no_arm_a_rate_of_its_own(grid):
    found, blocks = read_grid(grid)
    for block, arms in blocks:
        files = [block.base or found.base, *block.overlays, *(file for arm in arms.values() for file in arm.overlays)]
        assert [file for file in files if not (ROOT / file).is_file()] == []
        assert not any("optimizer.lr" in arm.settings for arm in arms.values())


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=[grid.stem for grid in GRIDS])
def test_a_grid_of_the_paper_can_be_planned(grid, monkeypatch, tmp_path):
    """On a machine with a GPU and vLLM; and what it reads from another grid's runs is what that grid writes."""
    monkeypatch.chdir(ROOT)
    runs = plan(grid, tmp_path / "runs" / grid.stem, for_here=False)
    assert len(runs) >= 8
    for name, number in re.findall(r"memory: runs/(\w+)/(\S+?)[,}]", grid.read_text()):
        other = plan(grid.with_name(f"{name}.yaml"), Path("runs") / name, for_here=False)
        assert f"runs/{name}/{number}" in {str(run.run_dir) for run in other}
