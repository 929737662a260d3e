"""The stream of batches: each task once an epoch, prompts within their limits, no memory in the student's prompt."""

from dataclasses import dataclass, field, replace
from itertools import chain

import pytest
from epochs import make_epoch, no_behaviours

from pmd.cli.run import build
from pmd.config.schema import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    RolloutsConfig,
    RunConfig,
    TinyWorldConfig,
    VerificationConfig,
)
from pmd.engines.hf import HFEngine
from pmd.errors import ConfigError
from pmd.memory import evolve_memory
from pmd.run_dir import RunDir
from pmd.types import InsightChange

WORLD = TinyWorldConfig(families=4, train_per_family=3, validation_per_family=1, test_per_family=1)


def run_with(tmp_path, memory=None, **rollouts):
    settings = {"tasks_per_step": 5, "group_size": 3, "max_new_tokens": 8} | rollouts
    config = RunConfig(
        model=ModelConfig(path="tiny"),
        memory=memory or MemoryConfig(),
        data=DataConfig(world=WORLD),
        rollouts=RolloutsConfig(**settings),
        verification=VerificationConfig(temperature=1.0, top_p=1.0),
    )
    return build(config, RunDir(tmp_path / "run"))


@pytest.mark.parametrize("updates", [1, 2])
def test_an_epoch_visits_every_task_once(tmp_path, updates):
    data = run_with(tmp_path, updates_per_batch=updates).data
    batches = list(data.epoch(0))
    assert len(batches) == data.steps_per_epoch == 3 * updates
    assert [batch.step for batch in batches] == list(range(3 * updates))
    visited = [e.rollout.task_id for batch in batches for e in batch.examples]
    assert sorted(visited) == sorted(task.task_id for task in data.tasks["train"] for _ in range(3))
    # The cost of a rollout batch is logged once, so that the sum over steps is that of the run.
    made = sum(len(e.completion_ids) for batch in batches for e in batch.examples)
    assert sum(batch.metrics["rollout/num_tokens"] for batch in batches) == made
    assert all(batch.metrics["time/rollout_s"] == 0 for batch in batches if batch.step % updates)
    assert [batch.is_last for batch in batches] == [False, True] * 3 if updates == 2 else [True] * 3


@dataclass
class Recorder:
    """An engine that notes the prompts it is given."""

    engine: HFEngine
    prompts: list = field(default_factory=list)

    def generate(self, requests, sampling, role="student"):
        self.prompts += [request.prompt_ids for request in requests]
        return self.engine.generate(requests, sampling, role)


@pytest.mark.parametrize(("max_tokens", "max_lines"), [(6, 1), (768, 2)])
def test_memory_in_an_evaluation_obeys_the_teachers_limits(tmp_path, max_tokens, max_lines):
    run = run_with(tmp_path, memory=MemoryConfig(max_tokens=max_tokens))
    tasks = {task.task_id: task for task in run.tasks["train"]}
    rollouts = [e.rollout for batch in run.data.epoch(0) for e in batch.examples]
    texts = ("strategy use zam red>gold", "strategy use teb red>gold")
    changes = [InsightChange(r.task_id, "strategy", text, (r.rollout_id,)) for r in rollouts for text in texts]
    evolve_memory(make_epoch(run.memory, tasks, rollouts, changes), run.memory, no_behaviours, 0)
    recorder = Recorder(run.data.engine)
    replace(run.evaluator, engine=recorder).memory_conditioned(run.tasks["train"], 1, run.memory)
    strategy = run.module.tokenizer.convert_tokens_to_ids("strategy")
    assert {prompt.count(strategy) for prompt in recorder.prompts} == {max_lines}


def test_epochs_differ_in_order_and_in_draws_and_repeat_exactly(tmp_path):
    data = run_with(tmp_path).data

    def seen(epoch):
        return [(e.rollout.task_id, e.rollout.completion.token_ids) for b in data.epoch(epoch) for e in b.examples]

    assert seen(0) == seen(0)
    assert [task for task, _ in seen(0)] != [task for task, _ in seen(1)]
    assert dict(seen(0)) != dict(seen(1))


def test_only_the_teachers_prompt_contains_memory(tmp_path):
    run = run_with(tmp_path)
    tasks = {task.task_id: task for task in run.tasks["train"]}
    rollouts = [e.rollout for batch in run.data.epoch(0) for e in batch.examples]
    changes = [InsightChange(r.task_id, "strategy", "strategy use zam red>gold", (r.rollout_id,)) for r in rollouts]
    evolve_memory(make_epoch(run.memory, tasks, rollouts, changes), run.memory, no_behaviours, 0)
    memory_word = run.module.tokenizer.convert_tokens_to_ids("memory")
    shown = 0
    for batch in run.data.epoch(1):
        for example in batch.examples:
            plain = tuple(run.data.prompts.student(tasks[example.rollout.task_id]))
            assert example.rollout.prompt_ids == plain
            assert memory_word not in example.rollout.prompt_ids
            shown += bool(example.context.items) and memory_word in example.context.prompt_ids
    assert shown == 36


def test_a_prompt_that_is_too_long_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"rollouts.max_prompt_tokens=5 is exceeded by 20 of 20 tasks"):
        run_with(tmp_path, max_prompt_tokens=5)


def task_ids(batches):
    """Return the tasks of each batch, in order."""
    return [list(dict.fromkeys(e.rollout.task_id for e in batch.examples)) for batch in batches]


@pytest.mark.parametrize(("size", "updates"), [(5, 1), (5, 2), (4, 3), (12, 2)])
def test_a_position_counts_tasks_whatever_the_batches_were(tmp_path, size, updates):
    """After any step, batches of the same size go on as if nothing had stopped, and others leave no gap."""
    data = run_with(tmp_path, tasks_per_step=size, updates_per_batch=updates, group_size=1).data
    stream, whole, positions = data.epoch(0), [], []
    for batch in stream:
        whole.append(batch)
        positions.append(data.state_dict())
    everything = sorted(task.task_id for task in data.tasks["train"])
    assert sorted(chain(*task_ids(whole))) == everything
    assert (positions[-1]["epoch"], positions[-1]["step"], positions[-1]["num_rollouts"]) == (1, len(whole), 12)
    for done, state in enumerate(positions[:-1], start=1):
        data.load_state_dict(state)
        rest = list(data.train_dataloader().dataset)
        assert task_ids(rest) == task_ids(whole[done:])
        assert [batch.step for batch in rest] == [batch.step for batch in whole[done:]]
        assert [batch.is_last for batch in rest] == [batch.is_last for batch in whole[done:]]
        assert data.state_dict() == positions[-1]
        data.config = replace(
            data.config, rollouts=replace(data.config.rollouts, tasks_per_step=3, updates_per_batch=1)
        )
        data.load_state_dict(state)
        stream = data.train_dataloader().dataset
        num_steps = len(stream)
        rest = list(stream)
        assert len(rest) == num_steps
        assert sorted(chain(*task_ids(whole[:done] + rest))) == everything
        assert data.position.epoch == 1
        assert data.position.num_rollouts == 12
        rollouts = replace(data.config.rollouts, tasks_per_step=size, updates_per_batch=updates)
        data.config = replace(data.config, rollouts=rollouts)


def test_a_run_does_not_go_on_with_other_tasks(tmp_path):
    run = run_with(tmp_path)
    digest = run.data.state_dict()["tasks"]
    build(run.config, RunDir(tmp_path / "again"), digest)
    changed = replace(run.config, data=replace(run.config.data, world=replace(WORLD, train_per_family=2)))
    with pytest.raises(ConfigError, match=r"tasks are not those that this run began with"):
        build(changed, RunDir(tmp_path / "changed"), digest)


def uniform(examples):
    """Return the tasks whose rollouts all have the same reward."""
    rewards = {}
    for example in examples:
        rewards.setdefault(example.rollout.task_id, set()).add(example.rollout.verdict.reward)
    return {task_id for task_id, seen in rewards.items() if len(seen) == 1}


def test_groups_without_signal_are_left_out_or_attempted_again(tmp_path):
    """Whatever is generated is counted, and metrics of the policy are those of its first attempts."""
    memory = MemoryConfig(enabled=False)
    made, kept = {}, {}
    for choice in ("keep", "drop", "resample"):
        data = run_with(tmp_path / choice, memory, tasks_per_step=12, uniform_groups=choice).data
        (batch,) = data.epoch(0)
        made[choice], kept[choice] = batch, {e.rollout.task_id for e in batch.examples}
        extra = 3 * int(batch.metrics.get("rollout/resampled_groups", 0))
        assert data.position.num_rollouts == 36 + extra
    without = uniform(made["keep"].examples)
    assert 0 < len(without) < 12
    assert kept["drop"] == kept["keep"] - without
    assert made["drop"].metrics["rollout/uniform_groups"] == len(without)
    assert kept["resample"] > kept["drop"]
    assert not uniform(made["resample"].examples)
    again = made["resample"].metrics
    assert len(without) < again["rollout/resampled_groups"] <= 2 * len(without)
    assert len(kept["resample"]) == 12 - again["rollout/uniform_groups"]
    assert again["rollout/num_tokens"] > made["keep"].metrics["rollout/num_tokens"]
    for name in ("rollout/reward", "rollout/mean_length"):
        assert again[name] == made["keep"].metrics[name]


def test_a_step_of_groups_without_signal_keeps_them(tmp_path):
    data = run_with(tmp_path, MemoryConfig(enabled=False), tasks_per_step=1, uniform_groups="drop").data
    assert all(batch.examples for batch in data.epoch(0))


def test_a_mixture_visits_a_share_of_a_domain_and_all_of_it_in_time(tmp_path):
    data = run_with(tmp_path, group_size=1).data
    tasks = [replace(task, domain="a" if n < 8 else "b") for n, task in enumerate(data.tasks["train"])]
    data.tasks = {**data.tasks, "train": tasks}
    data.config = replace(data.config, data=replace(data.config.data, weights={"a": 0.25}))
    assert data.steps_per_epoch == 2  # 2 of a's tasks and 4 of b's, 5 a step
    domain_of, seen = {task.task_id: task.domain for task in tasks}, []
    for epoch in range(4):
        visited = [task for batch in task_ids(data.epoch(epoch)) for task in batch]
        assert sorted(domain_of[task] for task in visited) == ["a"] * 2 + ["b"] * 4
        assert data.position.epoch == epoch + 1
        seen += [task for task in visited if domain_of[task] == "a"]
    assert len(set(seen)) == 8
