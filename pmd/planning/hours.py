"""Predicts the GPU hours of a run on real data, before there is one: tokens by kind, divided by measured speeds.

A prediction, not a measurement: lengths are assumed (`LENGTHS`), speeds were measured once for an 8B model with LoRA on
one H200 and are scaled by the number of weights.
"""

import re
from dataclasses import dataclass
from typing import Any

from pmd.config.schema import RunConfig
from pmd.config.values import build_section

#: Training tasks and test tasks of each SciKnowEval domain (SDPO's split), and of LiveCodeBench v6.
SIZES = {
    "biology": (450, 50), "chemistry": (1890, 210), "material": (841, 94), "physics": (720, 80),
    "livecodebench": (131, 131),
}  # fmt: skip
#: Assumed mean lengths in tokens, without thinking: the student's prompt, its completion. Unmeasured.
LENGTHS = {"sciknoweval": (350, 800), "livecodebench": (700, 2000)}
#: Assumed mean length of a reflection, and of what a teacher sees besides the task.
REFLECTION_TOKENS, CONTEXT_TOKENS = 300, 1000
#: Measured, Qwen3-8B with LoRA and gradient checkpointing on one H200: tokens (prompts and completions) per second in
#: training with a teacher, and completion tokens per second of the engine in this process.
TRAINED_PER_S, GENERATED_PER_S, MEASURED_BILLIONS = 15_886.0, 6500.0, 8.19
#: Share of a step without the teacher's pass (measured: 0.88 of 3.09 s are the teacher's).
WITHOUT_TEACHER = 0.72
#: Weights in billions, by a part of the model's name.
BILLIONS = {"0.6B": 0.6, "1.7B": 1.72, "4B": 4.02, "7B": 7.3, "8B": 8.19, "14B": 14.8, "32B": 32.8}


@dataclass(frozen=True, slots=True)
class Hours:
    """Predicted GPU hours of a run, by part."""

    training: float
    rollouts: float
    reflections: float
    evaluation: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.training + self.rollouts + self.reflections + self.evaluation


def predict_hours(run: RunConfig, trainer: dict[str, Any]) -> Hours:
    """Predict a run on SciKnowEval or LiveCodeBench.

    Raises:
        ValueError: the data or the model is none whose sizes are known.
    """
    if run.data.task not in LENGTHS:
        raise ValueError(f"lengths are assumed for {' and '.join(LENGTHS)} only, not for data.task={run.data.task}")
    prompt, completion = LENGTHS[run.data.task]
    num_train, num_validation, num_test = _num_tasks(run)
    epochs, group, verification = int(trainer.get("max_epochs", 1)), run.rollouts.group_size, run.verification
    rollouts = num_train * epochs * group
    trained = rollouts * (prompt + completion) if run.objective.update_policy else 0
    slower = _billions(run) / MEASURED_BILLIONS
    teacher = 1.0 if run.objective.distillation > 0 else WITHOUT_TEACHER
    steps = -(-num_train // run.rollouts.tasks_per_step) * run.rollouts.updates_per_batch * epochs
    evaluations = 1 + epochs // verification.every_epochs + steps // (verification.every_steps or steps + 1)
    conditioned = 2 if run.memory.enabled and verification.memory_conditioned else 1
    evaluated = evaluations * num_validation * verification.samples * conditioned
    evaluated += num_test * (3 * verification.final_samples + (conditioned - 1) * verification.samples)
    reflections = num_train * epochs if run.memory.enabled and run.reflection.enabled else 0
    if run.memory.frozen:
        reflections = min(reflections, num_train)
    read = (group * completion + CONTEXT_TOKENS) * WITHOUT_TEACHER / TRAINED_PER_S / 4  # prompts, in a forward pass
    seconds = {
        "training": trained * teacher / TRAINED_PER_S,
        "rollouts": rollouts * completion / GENERATED_PER_S,
        "reflections": reflections * (REFLECTION_TOKENS / GENERATED_PER_S + read),
        "evaluation": evaluated * completion / GENERATED_PER_S,
    }
    return Hours(**{part: slower * value / 3600 for part, value in seconds.items()})


def predict_run(config: dict[str, Any], *, trains: bool = True) -> float:
    """Return the predicted GPU hours of a run from its resolved configuration, or of a test of the untrained policy.

    Raises:
        ValueError: as `predict_hours`.
    """
    own = {key: value for key, value in config.items() if key != "trainer"}
    run, problems = build_section(RunConfig, own)
    assert not problems, problems  # the configuration was checked when the grid was read
    hours = predict_hours(run, config.get("trainer") or {})
    if trains:
        return hours.total
    _, completion = LENGTHS[run.data.task]
    samples = _num_tasks(run)[2] * run.verification.final_samples
    return samples * completion / GENERATED_PER_S / 3600 * _billions(run) / MEASURED_BILLIONS


def _billions(run: RunConfig) -> float:
    """Return the number of weights, in billions, that the model's name tells.

    Raises:
        ValueError: it tells none.
    """
    found = re.search(r"(?<![\d.])[\d.]+B", run.model.path)
    if found is None or found[0] not in BILLIONS:
        raise ValueError(f"the size of model.path={run.model.path} is not in its name")
    return BILLIONS[found[0]]


def _num_tasks(run: RunConfig) -> tuple[int, int, int]:
    """Return the training, validation and test tasks of a run, without reading any data."""
    data = run.data
    trained = data.domains if data.task == "sciknoweval" else ["livecodebench"]
    tested = data.test_domains or trained if data.task == "sciknoweval" else trained
    available = sum(round(SIZES[name][0] * data.weights.get(name, 1.0)) for name in trained)
    num_test = min(sum(SIZES[name][1] for name in tested), data.max_test or 10**9)
    held_out = round(available * data.validation_share)
    num_validation = min(held_out or num_test, data.max_validation or 10**9)
    return min(available - held_out, data.max_train or 10**9), num_validation, num_test
