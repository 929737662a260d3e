"""Losses and gradients of one training step against numbers recorded in float64 before the package was restructured.

`training_steps.json.gz` holds the inputs (token ids, engine log-probs, teacher prompts, whole configurations), the
rules that make a student that differs from its teacher (`rules`), and what commit b5fe179 computed from them. A change
of any recorded number is a change of the objective: it needs a reason in the changelog, not a new recording.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import backward, gradient_of
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding

from pmd.batch import Batch, Example, MicroBatch
from pmd.config.schema import ModelConfig, ObjectiveConfig, RolloutsConfig, RunConfig, TeacherConfig
from pmd.losses.distillation import TokenTerms
from pmd.losses.policy_gradient import group_advantages
from pmd.module import PMDModule
from pmd.teacher import TeacherContext
from pmd.types import Completion, MemoryItem, Rollout, Verdict

RECORDED = json.loads(gzip.decompress(Path(__file__).with_name("training_steps.json.gz").read_bytes()))
CASES, BATCHES = RECORDED["cases"], RECORDED["batches"]
#: What the recording calls it -> what it is called today.
RENAMED = {
    "anchor_weight": "no_context_weight",
    "engine_cap": "tis_cap",
    "loss/initial_kl": "loss/reference_kl",
    "initial_kl": "per_token_reference_kl",
    "divergence": "per_token_divergence",
}
SECTIONS = {
    "model": ModelConfig, "teacher": TeacherConfig, "objective": ObjectiveConfig, "rollouts": RolloutsConfig,
}  # fmt: skip
#: Recorded settings that no part of a training step reads: they may move or go.
NOT_OF_THE_STEP = {"prompts", "context", "feedback", "max_prompt_tokens", "normalize_std"}
#: What the readable implementation repeats: every kind of loss, teacher and sharing is among them.
REFERENCE_CASES = {*list(CASES)[::2], "pmd, live teacher", "long prompts, teacher shares"}
TOLERANCE = 1e-9


def today(values: dict[str, Any]) -> dict[str, Any]:
    """Return recorded values under today's names."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def build_module(config: dict[str, Any]) -> PMDModule:
    """Construct the module with every recorded setting, as a run would."""
    sections = {
        name: section(**{k: v for k, v in today(config[name]).items() if k not in NOT_OF_THE_STEP})
        for name, section in SECTIONS.items()
    }
    return PMDModule(RunConfig(seed_everything=config["seed_everything"], **sections))


def build_batch(recorded: dict[str, Any]) -> Batch:
    """Return the recorded rollouts as one batch."""
    examples = []
    for row in recorded["rollouts"]:
        completion = Completion(
            tuple(row["completion_ids"]), tuple(row["sampling_logprobs"]), "", "stop", row["policy_version"]
        )
        solved = row["reward"] == 1.0
        verdict = Verdict(row["reward"], solved, "ok" if solved else "wrong_answer")
        rollout = Rollout(
            row["rollout_id"], row["group_id"], row["task_id"], tuple(row["prompt_ids"]), completion, verdict
        )
        shows = row["teacher_shows"]
        context = TeacherContext(
            row["rollout_id"],
            tuple(row["teacher_prompt_ids"]),
            items=(MemoryItem(1, 1, "strategy", "x", 1, "t"),) if "memory" in shows else (),
            success="x" if "success" in shows else None,
            shows_failure="failure" in shows,
        )
        assert context.shows_anything == bool(shows)
        examples.append(Example(rollout, row["advantage"], context))
    return Batch(tuple(examples), 0, 0)


# How the recorded student was made to differ from its teacher and from the reference policy: `rules` in the recording.


def key_of(name: str) -> str:
    """Return a parameter's recorded key: its name from the decoder on, without the adapter's."""
    parts = name.split(".")
    parts = parts[next(i for i, part in enumerate(parts) if part in ("embed_tokens", "layers", "norm")) :]
    return ".".join(part for i, part in enumerate(parts) if parts[i - 1] not in ("lora_A", "lora_B"))


def wave(numel: int, phase: float = 0.0) -> Tensor:
    n = torch.arange(numel, dtype=torch.float64)
    return n + 0.001 * n * n + phase


def roles(module: PMDModule) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return what is trained, and a teacher's own weights, by key."""
    named = list(module.named_parameters())
    student = {key_of(name): p for name, p in named if p.requires_grad}
    return student, {key_of(name): p for name, p in named if ".teacher." in name and not p.requires_grad}


@torch.no_grad()
def prepare(module: PMDModule) -> None:
    """Flatten every copy's distribution, then move the student (and a teacher's adapter) away from the rest."""
    for name, parameter in module.named_parameters():
        if key_of(name) == "norm.weight":
            parameter.mul_(0.3)
    for phase, parameters in zip((0.0, 0.5), roles(module), strict=True):
        for key, parameter in parameters.items():
            if "lora_" in key:
                amplitude = 0.08 if "lora_A" in key else 0.05
                drawn = amplitude * wave(parameter.numel(), zlib.crc32(key.encode()) % 1000 + phase).sin()
                parameter.copy_(drawn.view_as(parameter))
            elif phase == 0.0:  # only the student: a teacher with whole weights stays as it was loaded
                moved = parameter.double() + 0.2 * parameter.double().std() * wave(parameter.numel()).cos().view_as(
                    parameter
                )
                parameter.copy_(moved)


@contextmanager
def truly_float64() -> Iterator[None]:
    """Let Qwen3's norms and rotary embedding, which compute in float32, and new tensors be float64."""

    def norm(self: Any, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((frequencies, frequencies), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen3RMSNorm, "forward", norm)
        patch.setattr(Qwen3RotaryEmbedding, "forward", rotary)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def by_rollout(micro_batch: MicroBatch, terms: TokenTerms) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yield each rollout's per-token terms."""
    lengths = [len(example.completion_ids) for example in micro_batch.examples]
    named = {field.name: getattr(terms, field.name) for field in fields(terms)}
    columns = {name: values.detach().split(lengths) for name, values in named.items() if values is not None}
    for row, example in enumerate(micro_batch.examples):
        yield example.rollout.rollout_id, {name: parts[row].tolist() for name, parts in columns.items()}


def statistics(tensor: Tensor | None) -> list[float]:
    """Return sum, norm, and the dot product with a fixed cosine."""
    assert tensor is not None
    flat = tensor.detach().double().flatten()
    return [flat.sum().item(), flat.norm().item(), (flat @ (0.1 * torch.arange(len(flat)).double() + 1).cos()).item()]


def assert_close(tensors: dict[str, Tensor | None], recorded: dict[str, list[float]], tolerance: float) -> None:
    """Compare statistics on the scale that the sum and the dot product of a tensor of this norm can have."""
    assert tensors.keys() == recorded.keys()
    for key, (total, norm, dot) in recorded.items():
        tensor = tensors[key]
        assert tensor is not None, key
        scale = tolerance * max(1.0, norm) * math.sqrt(tensor.numel())
        found = statistics(tensor)
        assert found[1] == pytest.approx(norm, abs=tolerance * max(1.0, norm)), key
        assert [found[0], found[2]] == pytest.approx([total, dot], abs=scale), key


def assert_repeats(module: PMDModule, batch: Batch, outputs: dict[str, Any]) -> None:
    """Compare loss parts, entropy, per-token terms and gradients with the recorded ones; prompts are shared alike."""
    found = backward(module, batch.examples)
    assert found.totals == pytest.approx(today(outputs["totals"]), rel=TOLERANCE, abs=TOLERANCE)
    per_token = {rollout_id: values for scored in found.scored for rollout_id, values in by_rollout(*scored)}
    assert per_token.keys() == outputs["per_token"].keys()
    for rollout_id, columns in outputs["per_token"].items():
        assert per_token[rollout_id].keys() == today(columns).keys()
        for name, values in today(columns).items():
            assert per_token[rollout_id][name] == pytest.approx(values, rel=TOLERANCE, abs=TOLERANCE), name
    assert_close({key: p.grad for key, p in roles(module)[0].items()}, outputs["gradients"], TOLERANCE)
    shares = {(m.student.prefixes is not None, m.teacher.prefixes is not None) for m, _ in found.scored}
    assert shares == {(m["student_shares_prefixes"], m["teacher_shares_prefixes"]) for m in outputs["micro_batches"]}


@pytest.mark.parametrize("name", CASES)
def test_a_step_computes_what_was_recorded(name):
    case = CASES[name]
    config, outputs, batch = case["config"], case["outputs"], BATCHES[case["batch"]]
    module = build_module(config)
    if "initial_adapter" in outputs:  # the seeded draw
        drawn = {key: parameter.data for key, parameter in roles(module)[0].items()}
        assert_close(drawn, outputs["initial_adapter"], TOLERANCE)
    module.double()
    module.policy_version = batch["policy_version"]
    prepare(module)
    with truly_float64():
        assert_repeats(module, build_batch(batch), outputs)
        if name in REFERENCE_CASES:
            module.objective = replace(module.objective, implementation="reference")
            assert_repeats(module, build_batch(batch), outputs)
    if "after_step" in outputs:
        module.policy.after_rollout_batch()
        assert_close({key: p.data for key, p in roles(module)[1].items()}, outputs["after_step"], TOLERANCE)


@pytest.mark.parametrize("name", ["grpo", "pmd, lora, EMA teacher", "long prompts, both share"])
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_a_step_in_float32_is_near_what_was_recorded(name, implementation):
    """As a run computes it, with nothing replaced."""
    case = CASES[name]
    module = build_module(case["config"])
    module.objective = replace(module.objective, implementation=implementation)
    module.policy_version = BATCHES[case["batch"]]["policy_version"]
    prepare(module)
    found, recorded = backward(module, build_batch(BATCHES[case["batch"]]).examples), case["outputs"]["float32"]
    assert found.totals == pytest.approx(today(recorded["totals"]), rel=1e-4, abs=1e-5)
    assert gradient_of(module).norm().item() == pytest.approx(recorded["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_advantages_are_what_was_recorded(batch):
    rows = BATCHES[batch]["rollouts"]
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    groups = torch.tensor([int(row["group_id"].removeprefix("g")) for row in rows])
    for normalize_std, name in ((False, "advantage"), (True, "advantage_normalised")):
        found = group_advantages(rewards, groups, normalize_std=normalize_std).tolist()
        assert found == pytest.approx([row[name] for row in rows], abs=1e-12)


def test_the_readable_implementation_repeats_every_kind_of_case():
    configs = [CASES[name]["config"] for name in REFERENCE_CASES]
    assert {c["model"]["finetune"] for c in configs} == {"full", "lora"}
    assert {c["teacher"]["kind"] for c in configs} == {"frozen", "ema", "live", "trust_region"}
    assert {c["rollouts"]["share_prefixes"] for c in configs} == {"off", "teacher", "both"}
