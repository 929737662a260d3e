"""Gradient checkpointing recomputes the student's layers and changes no gradient; adapters come from the seed."""

import random

import pytest
import torch
from torch import nn

from pmd.config.schema import ModelConfig, OptimizerConfig, RunConfig
from pmd.module import PMDModule
from pmd.planning.bench import measure_steps
from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples


class CountForwards:
    """Counts the forward passes of every decoder layer, of student and teacher."""

    def __init__(self, module: PMDModule):
        self.count = 0
        for layer in module.modules():
            if type(layer).__name__ == "Qwen3DecoderLayer":
                layer.self_attn.register_forward_hook(self._called)

    def _called(self, layer: nn.Module, inputs: object, output: object) -> None:
        self.count += 1


def step(finetune: str, checkpointing: bool) -> tuple[PMDModule, int]:
    model = ModelConfig(path="tiny", finetune=finetune, lora_rank=4, gradient_checkpointing=checkpointing)
    module = PMDModule(RunConfig(model=model, optimizer=OptimizerConfig(lr=1e-2)))
    forwards = CountForwards(module)
    measure_steps(module, FixedBatches(synthetic_examples(2, 2, Lengths(10, 20, 3, 9), 110), 2), 2, "cpu")
    return module, forwards.count


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_checkpointing_recomputes_and_gives_the_same_weights(finetune):
    plain, checkpointed = step(finetune, False), step(finetune, True)
    layers, steps = 3, 2
    assert plain[1] == steps * layers * 2  # student and teacher
    assert checkpointed[1] == steps * layers * 3  # the student's again in the backward pass
    for (name, weight), other in zip(plain[0].named_parameters(), checkpointed[0].parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5, msg=name)


def test_two_builds_have_equal_adapters_whatever_was_drawn_before():
    builds = []
    for noise in (1, 2):
        random.seed(noise)
        torch.manual_seed(noise)
        module = PMDModule(RunConfig(model=ModelConfig(path="tiny", finetune="lora", lora_rank=4)))
        builds.append({n: p for n, p in module.named_parameters() if ".lora_A.student." in n})
    assert builds[0]
    assert all(torch.equal(value, builds[1][name]) for name, value in builds[0].items())
    other = PMDModule(RunConfig(model=ModelConfig(path="tiny", finetune="lora", lora_rank=4), seed_everything=1))
    values = dict(other.named_parameters())
    assert not any(torch.equal(value, values[name]) for name, value in builds[0].items())
