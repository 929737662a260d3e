"""Watches a run: ends it if step after step had to be skipped, warns if the policy collapses or leaves its range.

A policy that trains on its own completions can ruin itself: its reward falls to nothing, its entropy vanishes or
explodes, its completions grow without end. Each of the last steps alone looks harmless; their mean over `WINDOW` steps,
beside the best or the first such mean of the run, does not. The bounds are our choice.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from lightning import Callback, LightningModule, Trainer

from pmd.batch import Batch
from pmd.errors import TrainingError
from pmd.module import PMDModule

#: Steps over which metrics are averaged.
WINDOW = 10
#: So many steps in a row may be skipped before the run ends.
MAX_SKIPPED = 5
#: A policy has collapsed if its mean reward is below this share of its best ...
COLLAPSED = 0.25
#: ... provided the best stands for at least this much reward in all, so that chance alone cannot explain the fall.
MIN_TOTAL_REWARD = 8.0
#: Ranges of other metrics, as factors of their mean over the first steps.
RANGES = {"student/entropy": (0.02, 3.0), "rollout/mean_length": (0.2, 4.0)}
#: Below this reward, vanished entropy is a warning; above it, the policy is sure because it is right.
SURE_AND_RIGHT = 0.5
log = logging.getLogger(__name__)


@dataclass
class Ranges:
    """What the metrics of a run were and are; knows when they have left their range."""

    recent: dict[str, list[float]] = field(default_factory=dict)  # the last WINDOW values of each metric
    reference: dict[str, float] = field(default_factory=dict)  # what recent values are compared with
    warned: list[str] = field(default_factory=list)  # metrics out of their range

    def add(self, metrics: Mapping[str, float], num_rollouts: int) -> dict[str, str]:
        """Take note of a step; return a sentence for each metric that has just left its range."""
        for name in ("rollout/reward", *RANGES):
            self.recent[name] = [*self.recent.get(name, []), metrics[name]][-WINDOW:]
        if len(self.recent["rollout/reward"]) < WINDOW:
            return {}
        means = {name: fmean(values) for name, values in self.recent.items()}
        problems = dict(self._problems(means, num_rollouts))
        new = {name: sentence for name, sentence in problems.items() if name not in self.warned}
        self.warned = list(problems)
        return new

    def _problems(self, means: Mapping[str, float], num_rollouts: int) -> Iterator[tuple[str, str]]:
        """Yield each metric that is out of its range, with a sentence; keep the references up to date."""
        reward = means["rollout/reward"]
        best = self.reference["rollout/reward"] = max(reward, self.reference.get("rollout/reward", 0.0))
        if reward < COLLAPSED * best and best * WINDOW * num_rollouts >= MIN_TOTAL_REWARD:
            yield (
                "rollout/reward",
                f"the policy has collapsed: its mean reward over {WINDOW} steps is {reward:.3f}, and was {best:.3f}. "
                "A lower optimizer.lr or a slower teacher (teacher.kind: frozen) often prevents this.",
            )
        for name, (low, high) in RANGES.items():
            first = self.reference.setdefault(name, means[name])
            is_sure_and_right = name == "student/entropy" and reward >= SURE_AND_RIGHT
            if means[name] > high * first or (means[name] < low * first and not is_sure_and_right):
                yield name, f"{name} is {means[name]:.3g} over {WINDOW} steps, and was {first:.3g} in the first ones."


class HealthCallback(Callback):
    """Looks at every optimizer step, after its trace was written. A resumed run begins anew to compare."""

    def __init__(self, run_dir: Path, *, stop_on_collapse: bool):
        self.run_dir, self.stop_on_collapse = run_dir, stop_on_collapse
        self.ranges = Ranges()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """End the run, or warn, if it is not healthy.

        Raises:
            TrainingError: too many steps in a row were skipped, or the policy has collapsed and the run was to stop.
        """
        assert isinstance(pl_module, PMDModule)
        if pl_module.num_skipped >= MAX_SKIPPED:
            raise TrainingError(
                f"{pl_module.num_skipped} steps in a row were skipped, because losses or gradients were not finite; "
                f"the policy is still version {pl_module.policy_version}. Look at the rollouts of one: python -m pmd "
                f"inspect step {self.run_dir} --step {batch.step}. "
                "A lower optimizer.lr or model.dtype: float32 often helps."
            )
        if pl_module.num_skipped:
            return
        metrics = batch.metrics | {"student/entropy": float(trainer.callback_metrics["student/entropy"])}
        warnings = self.ranges.add(metrics, len(batch.examples))
        for sentence in warnings.values():
            log.warning("step %d: %s", batch.step, sentence)
        if self.stop_on_collapse and "rollout/reward" in warnings:
            raise TrainingError(
                f"stop_on_collapse=true ended the run at step {batch.step}: {warnings['rollout/reward']}"
            )
