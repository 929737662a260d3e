"""A step that several ranks share out is the step of one: the same weights, whatever their number."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from examples import make_example, make_rollout, random_ids, take_steps, tiny_module, trained
from rank_processes import on_ranks

from pmd.batch import Example
from pmd.config.schema import ObjectiveConfig, OptimizerConfig, TeacherConfig
from pmd.ranks import Ranks

sys.path.append(str(Path(__file__).with_name("golden")))
from test_training_steps import truly_float64

METHODS = {
    "grpo": (ObjectiveConfig(policy_gradient=1.0, distillation=0.0, kl_weight=0.05), TeacherConfig()),
    "sdpo": (ObjectiveConfig(alpha=0.5, top_k=20, no_context_weight=0.0, reduction="sequence"), TeacherConfig("ema")),
    "pmd": (ObjectiveConfig(alpha="symmetric"), TeacherConfig()),
}
TOLERANCE = 1e-9
METRICS = ("student/grad_norm", "student/entropy")


def recorded_batch(step: int, num_groups: int = 3) -> list[Example]:
    """Groups of different sizes and lengths, so that ranks differ in their number of micro-batches."""
    draw, examples = random.Random(step), []
    for group in range(num_groups):
        prompt, shown = random_ids(draw, draw.randrange(4, 12)), random_ids(draw, draw.randrange(6, 20))
        for _ in range(draw.randrange(1, 4)):
            ids = random_ids(draw, draw.randrange(1, 9))
            logprobs = [-draw.random() * 4 for _ in ids]
            number, version = len(examples), draw.randrange(step + 1)
            rollout = make_rollout(
                number, ids, group=group, prompt_ids=prompt, logprobs=logprobs, policy_version=version
            )
            success = "yes" if draw.random() < 0.7 else None
            examples.append(make_example(rollout, shown, advantage=draw.random() - 0.5, success=success))
    return examples


def weights_after(method: str, finetune: str, num_steps: int, ranks: Ranks | None = None) -> dict[str, np.ndarray]:
    """Return what is trained, and the gradient's norm of the last step, after some steps in float64."""
    objective, teacher = METHODS[method]
    with truly_float64():
        module = tiny_module(objective, teacher=teacher, optimizer=OptimizerConfig(lr=1e-3), finetune=finetune)
        module.double()
        module.layout = replace(module.layout, max_tokens=60)
        if ranks is not None:
            module.share_with(ranks)
        trainer = take_steps(module, [recorded_batch(step) for step in range(num_steps)])
        found = {name: parameter.detach().numpy() for name, parameter in trained(module).items()}
        metrics = trainer.callback_metrics
        return found | {name: metrics[name].double().numpy() for name in METRICS}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, tensor in expected.items():
        limit = TOLERANCE if name not in METRICS else 1e-6  # metrics are logged in float32
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize(("method", "finetune"), [("pmd", "full"), ("sdpo", "lora")])
def test_two_ranks_take_the_steps_of_one(method, finetune, tmp_path):
    alone = weights_after(method, finetune, 3)
    for found in on_ranks(2, tmp_path, lambda ranks: weights_after(method, finetune, 3, ranks)):
        assert_same(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_two_and_four_ranks_end_where_one_ends(method, finetune, tmp_path):
    alone = weights_after(method, finetune, 20)
    for size in (2, 4):  # with four, one of them has no rollouts at all
        for found in on_ranks(size, tmp_path, lambda ranks: weights_after(method, finetune, 20, ranks)):
            assert_same(found, alone)
