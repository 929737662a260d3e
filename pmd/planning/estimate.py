"""Estimates, before a run starts, its tokens and hours from the last finished run of the same model beside it."""

import json
from pathlib import Path

import yaml

from pmd.config.schema import RunConfig
from pmd.evaluation.costs import clock_seconds, cost_of, count
from pmd.run_dir import RunDir


def estimate_run(config: RunConfig, run_dir: RunDir, num_steps: int) -> str:
    """Return one line: tokens and hours of the `num_steps` optimizer steps that are left.

    The speed is that of the newest finished run in the same folder with the same model, fine-tuning and longest
    completion; without one, the line gives the upper bound of the tokens.
    """
    rollouts = config.rollouts
    num_rollouts = num_steps * rollouts.tasks_per_step * rollouts.group_size / rollouts.updates_per_batch
    if num_steps < 0:
        return "Cost: unknown, because neither trainer.max_epochs nor trainer.max_steps ends the run."
    for results in sorted(run_dir.root.parent.glob("*/results.json"), key=_age):
        found = _cost_of_rollout(config, results)
        if found is not None and results.parent != run_dir.root:
            tokens, seconds = (value * num_rollouts for value in found)
            speed = f"at the speed of {results.parent}"
            return f"Cost: about {count(tokens)} generated tokens and {_duration(seconds)}, {speed}."
    bound = count(num_rollouts * rollouts.max_new_tokens)
    return f"Cost: at most {bound} tokens of rollouts; no finished run of this model beside this one tells the hours."


def _age(file: Path) -> float:
    return -file.stat().st_mtime


def _cost_of_rollout(config: RunConfig, results: Path) -> tuple[float, float] | None:
    """Return the tokens and the seconds that a finished run spent on each rollout; None if it is of another kind."""
    try:
        known = json.loads(results.read_text(encoding="utf-8"))
        saved = yaml.safe_load(RunDir(results.parent).config.read_text(encoding="utf-8"))
        alike = all(saved["model"][key] == getattr(config.model, key) for key in ("finetune", "dtype"))
        alike = alike and Path(saved["model"]["path"]).name == Path(config.model.path).name
        alike = alike and saved["rollouts"]["max_new_tokens"] == config.rollouts.max_new_tokens
        cost = cost_of(known)
        if not alike or cost is None or not known["rollouts"]:
            return None
        return cost.tokens / known["rollouts"], clock_seconds(known["totals"]) / known["rollouts"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None  # not a run, or not one that is still readable


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
