"""Optimizer steps under Lightning's trainer: warm-up, clipping, a gradient that is not finite, which weights move."""

import math
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from examples import backward, fit_batches, gradient_of, take_steps, tiny_module, trained, varied_examples
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from pmd.batch import Batch
from pmd.callbacks.trace import TraceCallback
from pmd.config.schema import ObjectiveConfig, OptimizerConfig, TeacherConfig
from pmd.errors import TrainingError
from pmd.module import PMDModule
from pmd.scoring import teacher_part
from pmd.trace import read_trace, trace_path

PMD = ObjectiveConfig(alpha="symmetric")
#: Every way to have a teacher, by how the student is trained.
TEACHERS = [(finetune, kind) for finetune in ("full", "lora") for kind in ("frozen", "ema", "live", "trust_region")]


def copies(named: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


class Watch(Callback):
    """Keeps what the optimizer used in each step, and the weights after it."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.gradient_norms: list[float] = []
        self.weights: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates += [group["lr"] for group in optimizer.param_groups]
        gradients = [
            p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self.gradient_norms.append(torch.cat(gradients).norm().item() if gradients else 0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.weights.append(copies(dict(pl_module.named_parameters())))
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def watched(module: PMDModule, steps: int) -> Watch:
    """Take steps on the same rollouts."""
    watch = Watch()
    take_steps(module, [varied_examples()] * steps, watch)
    return watch


def largest_move(module: PMDModule, before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max((after[name] - before[name]).abs().max().item() for name in trained(module))


def test_the_learning_rate_warms_up_in_equal_steps_and_stays():
    module = tiny_module(PMD, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=4, weight_decay=0.0))
    before = copies(trained(module))
    watch = watched(module, 6)
    assert watch.rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert largest_move(module, before, watch.weights[0]) == pytest.approx(
        0.25e-3, rel=0.02
    )  # AdamW's first is lr g / |g|


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_gradient_above_the_bound_is_clipped_and_logged_as_it_was(finetune):
    module = tiny_module(PMD, optimizer=OptimizerConfig(max_grad_norm=1e-3, warmup_steps=0), finetune=finetune)
    backward(module, varied_examples())
    gradient = gradient_of(module)
    assert gradient.norm() > 0.01
    watch = watched(module, 1)
    assert watch.gradient_norms == pytest.approx([1e-3], rel=1e-3)
    assert watch.metrics[0]["student/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)
    state, beta1 = module.trainer.optimizers[0].state, module.optimizer_config.beta1
    first_moment = torch.cat([state[p]["exp_avg"].flatten() for p in trained(module).values() if p in state])
    torch.testing.assert_close(first_moment, (1 - beta1) * 1e-3 * gradient / gradient.norm(), rtol=1e-3, atol=1e-8)


def test_a_gradient_below_the_bound_is_left_alone():
    module = tiny_module(PMD, optimizer=OptimizerConfig(max_grad_norm=1e6, warmup_steps=0))
    watch = watched(module, 1)
    assert watch.gradient_norms == pytest.approx([watch.metrics[0]["student/grad_norm"]], rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]), ("cosine", [0.5, 1.0, 1.0, 0.85355339, 0.5, 0.14644661])],
)
def test_a_schedule_falls_to_zero_over_the_rest_of_the_run(schedule, expected):
    """Two steps of warm-up, then four steps from the full rate towards 0, which comes right after the last one."""
    module = tiny_module(PMD, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2, schedule=schedule))
    assert watched(module, 6).rates == pytest.approx([1e-3 * factor for factor in expected])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_step_whose_gradient_is_not_finite_is_skipped(finetune, value, caplog):
    """The steps before and after it are those of a run that never saw it, but for the warm-up, which goes on."""
    objective = ObjectiveConfig(policy_gradient=1.0, distillation=0.0)
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1)

    def trained_on(hook, steps):
        module = tiny_module(objective, teacher=TeacherConfig(kind="ema"), finetune=finetune, optimizer=optimizer)
        module.layout = replace(module.layout, max_tokens=10_000)  # one micro-batch a step, so one call of the hook
        list(trained(module).values())[-1].register_hook(hook)
        return module, watched(module, steps)

    calls = count()
    module, watch = trained_on(lambda gradient: torch.full_like(gradient, value) if next(calls) == 1 else gradient, 3)
    _, undisturbed = trained_on(lambda gradient: gradient, 2)
    assert [metrics["student/skipped_step"] for metrics in watch.metrics] == [0.0, 1.0, 0.0]
    assert same(watch.weights[1], watch.weights[0])
    assert same(watch.weights[0], undisturbed.weights[0])
    assert same(watch.weights[2], undisturbed.weights[1])
    assert (module.policy_version, module.trainer.global_step, module.num_skipped) == (2, 3, 0)
    assert "step 1 is skipped, because not finite: gradient norm" in caplog.text


def test_the_rollouts_of_a_skipped_step_are_kept(tmp_path):
    module = tiny_module(PMD)
    list(trained(module).values())[-1].register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    examples = varied_examples()
    take_steps(module, [examples], TraceCallback(tmp_path, every=0))
    records = list(read_trace(trace_path(tmp_path, 0)))
    assert sorted(r["rollout_id"] for r in records) == sorted(e.rollout.rollout_id for e in examples)
    assert all(len(r["per_token_divergence"]) == len(r["completion_ids"]) for r in records)


class Starved(PMDModule):
    """Runs out of memory in the middle of every step whose micro-batches hold more tokens than it has room for."""

    room = 0

    def _score(self, micro_batch):
        longest = max(sequences.input_ids.shape[1] for sequences in (micro_batch.student, micro_batch.teacher))
        self.num_passes += 1
        if self.num_passes % 2 == 0 and len(micro_batch.examples) * longest > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super()._score(micro_batch)


def starved(room: int) -> Starved:
    module = tiny_module(PMD, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0))
    module.__class__, module.room, module.num_passes = Starved, room, 0
    module.layout = replace(module.layout, max_tokens=400)
    return module


def test_micro_batches_shrink_where_memory_runs_out(caplog, tmp_path):
    """The gradient that the failed pass left is dropped: the step is that of smaller micro-batches from the start."""
    short, plenty = starved(room=110), starved(room=10_000)
    plenty.layout = replace(plenty.layout, max_tokens=100)
    trace = TraceCallback(tmp_path, every=1)
    watch, expected = Watch(), Watch()
    take_steps(short, [varied_examples(16)] * 2, watch, trace)
    take_steps(plenty, [varied_examples(16)] * 2, expected)
    assert same(watch.weights[-1], expected.weights[-1])
    assert short.layout.max_tokens == 100
    told = [(record.levelname, record.message.split(";")[0]) for record in caplog.records if "memory" in record.message]
    assert told == [("ERROR", "step 0: out of memory")] * 2  # not a warning, which only the first rank would give
    assert "from here on, rollouts.micro_batch_tokens is 100 instead of 200" in caplog.text
    assert len(list(read_trace(trace_path(tmp_path, 0)))) == 16


def test_a_single_rollout_that_does_not_fit_ends_the_run():
    with pytest.raises(TrainingError, match=r"out of memory at step 0 on a single rollout of \d+ tokens \(CUDA"):
        take_steps(starved(room=1), [varied_examples(16)])


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_frozen_policy_counts_and_logs_its_steps_and_applies_none(finetune):
    module = tiny_module(
        replace(PMD, update_policy=False),
        teacher=TeacherConfig(kind="ema", ema_rate=0.5),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1),
        finetune=finetune,
    )
    before = copies(dict(module.named_parameters()))
    watch = watched(module, 2)
    assert same(before, watch.weights[-1])
    assert (module.policy_version, module.trainer.global_step) == (0, 2)
    assert all(metrics["student/grad_norm"] > 0 and metrics["loss/distillation"] > 0 for metrics in watch.metrics)


@pytest.mark.parametrize(("finetune", "kind"), TEACHERS)
def test_the_student_alone_is_trained_and_an_ema_teacher_follows_its_rule(finetune, kind):
    """EMA: teacher <- (1 - rate) teacher + rate student. All other weights stay as they are, bit for bit."""
    teacher = TeacherConfig(kind=kind, ema_rate=0.25, trust_region_rate=0.5)
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1)
    objective = replace(PMD, kl_weight=0.1)
    module = tiny_module(objective, teacher=teacher, optimizer=optimizer, finetune=finetune)
    parameters, of_student = dict(module.named_parameters()), set(trained(module))
    assert all((".student." in name) or name.startswith("policy.student.") for name in of_student)
    before = copies(parameters)
    watch = watched(module, 3)
    assert set(trained(module)) == of_student
    optimized = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(parameters[name]) for name in of_student}
    assert all(parameters[name].grad is None for name in parameters if name not in of_student)

    followers = {name for name in parameters if ".teacher." in name}
    assert bool(followers) == (kind == "ema")
    for previous, after in zip([before, *watch.weights], watch.weights, strict=False):
        assert any(not torch.equal(after[name], previous[name]) for name in of_student)
        for name in parameters.keys() - of_student:
            expected = previous[name]
            if name in followers:
                expected = 0.75 * expected + 0.25 * after[name.replace(".teacher.", ".student.")]
                torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-7, msg=name)
            else:
                assert torch.equal(after[name], expected), name
    if followers:
        assert not same({n: before[n] for n in followers}, {n: watch.weights[-1][n] for n in followers})


def test_an_ema_teacher_moves_once_per_rollout_batch():
    optimizer, teacher = OptimizerConfig(lr=1e-2, warmup_steps=0), TeacherConfig(kind="ema", ema_rate=0.25)
    module = tiny_module(PMD, teacher=teacher, optimizer=optimizer, finetune="lora")
    name = next(name for name, _ in module.named_parameters() if ".teacher." in name and "lora_B" in name)
    before = copies(dict(module.named_parameters()))[name]
    watch, metrics = Watch(), {"rollout/reward": 0.5}
    batches = [Batch(tuple(varied_examples()), 0, step, metrics, is_last=step % 2 == 1) for step in range(4)]
    fit_batches(module, batches, watch)
    weights = [after[name] for after in watch.weights]
    assert torch.equal(weights[0], before)
    for moved, previous, step in ((weights[1], before, 1), (weights[3], weights[1], 3)):
        student = watch.weights[step][name.replace(".teacher.", ".student.")]
        torch.testing.assert_close(moved, 0.75 * previous + 0.25 * student)
    assert torch.equal(weights[2], weights[1])


@pytest.mark.parametrize(("finetune", "kind"), TEACHERS)
def test_the_teachers_scores_carry_no_gradient(finetune, kind):
    module = tiny_module(PMD, teacher=TeacherConfig(kind=kind), finetune=finetune)
    (micro_batch, terms), *_ = backward(module, varied_examples()).scored
    assert not terms.teacher_logprobs.requires_grad
    for role, weight in module.policy.teacher_mixture:
        assert not teacher_part(module.policy, role, micro_batch.teacher, weight).hidden.requires_grad


def test_the_policy_version_counts_the_steps_applied():
    module = tiny_module(PMD)
    watched(module, 3)
    assert module.policy_version == 3
